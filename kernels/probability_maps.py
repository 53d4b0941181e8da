"""
Maps from n scores to a point of the simplex, for gates, routers and mixing weights: softmax and maps without an
exponential.

    p = phi(x) / sum phi(x) over the last dimension, x (.., n); masked entries get 0. phi of score x:

    softmax              e^x
    max_shift_rational   (1 + max x - x)^-k, k = 2: polynomial tails, so a leading score is believed less
    stablemax            x + 1 for x >= 0, 1 / (1 - x) below
    squareplus           (x + sqrt(x^2 + 4)) / 2
    min_shift_linear     x - min x + eps; does not depend on the scores' scale
    taylor               1 + x + x^2 / 2; not monotone below -1
    sparsemax            the nearest point of the simplex; entmax15: Tsallis' entropy of 1.5 between it and softmax.
                         Zeros, and more confident than softmax

softmax, max_shift_rational, min_shift_linear, sparsemax and entmax15 do not change when all scores are shifted. With
scaled = True scores are divided by the map's slope at equal scores (at zero, where a shift matters) relative to
softmax's, k and 1/2, so that rational and squareplus start as softmax does; stablemax and taylor do anyhow. The slopes
of min_shift_linear, sparsemax and entmax15 depend on n: they stay as they are.

Cost: max or sum and one division a row, a few operations a score; all sums in float32 or wider. Plain PyTorch, its own
reference; speed: benchmarks/probability_maps.py (not measured on a GPU); in a classifier: studies/probability_maps.py.

Source: StableMax: Prieto et al., Grokking at the Edge of Numerical Stability, 2025, arxiv.org/abs/2501.04697;
squareplus: Barron, 2021, arxiv.org/abs/2112.11687; Taylor softmax: de Brebisson & Vincent, 2015,
arxiv.org/abs/1511.05042; sparsemax: Martins & Astudillo, 2016, arxiv.org/abs/1602.02068; entmax: Peters et al., 2019,
arxiv.org/abs/1905.05702; the rational and the linear map are candidates for the properties of an unpublished normaliser
named in lof310/projects
"""

import torch
from torch import Tensor

# dp/dx at equal scores (at zero) relative to softmax's; None: k; the others 1
SLOPES = dict(max_shift_rational=None, squareplus=0.5)


class _Projection(torch.autograd.Function):
    """
    sparsemax (power 1) and entmax15 (power 2) of float scores: p = max(x - tau, 0)^power, with tau so that p sums to
    one; entmax15 takes x / 2.
    """

    @staticmethod
    def forward(ctx, x: Tensor, power: int) -> Tensor:
        # tau for every possible number of scores above it
        x = x - x.amax(-1, keepdim=True)
        ordered = x.sort(-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        mean = ordered.cumsum(-1) / count
        if power == 1:
            taus = mean - 1 / count
        else:
            spread = ordered.square().cumsum(-1) / count - mean.square()
            taus = mean - ((1 / count - spread).clamp_min(0)).sqrt()

        # the number that fits
        support = (ordered > taus).sum(-1, keepdim=True).clamp_min(1)
        p = (x - taus.gather(-1, support - 1)).clamp_min(0).pow(power)
        ctx.power = power
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad: Tensor):
        p, = ctx.saved_tensors
        weight = (p > 0).type_as(p) if ctx.power == 1 else p.sqrt()
        return weight * (grad - (weight * grad).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)) * ctx.power, None


def _softmax(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return torch.softmax(x, -1)


def _max_shift_rational(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return (1 + _extreme(x, 1, ties) - x).pow(-power)


def _stablemax(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    # clamped: the branch that is not taken must not divide by zero
    return torch.where(x >= 0, x + 1, 1 / (1 - x.clamp_max(0)))


def _squareplus(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    root = (x.square() + 4).sqrt()
    # below zero the difference would lose its digits
    return torch.where(x >= 0, (x + root) / 2, 2 / (root - x.clamp_max(0)))


def _min_shift_linear(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return x - _extreme(x, -1, ties) + eps


def _taylor(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return 1 + x + x.square() / 2


def _sparsemax(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return _Projection.apply(x, 1)


def _entmax15(x: Tensor, power: float, eps: float, ties: str) -> Tensor:
    return _Projection.apply(x / 2, 2)


def _extreme(x: Tensor, sign: int, ties: str) -> Tensor:
    """Returns the largest (sign 1) or smallest (-1) score, kept as a dimension."""
    signed = sign * x
    if ties == "first":
        return sign * signed.max(-1, keepdim=True).values
    return sign * signed.amax(-1, keepdim=True)


# name: weights of scores, k, eps and the tie rule
MAPS = dict(
    softmax=_softmax,
    max_shift_rational=_max_shift_rational,
    stablemax=_stablemax,
    squareplus=_squareplus,
    min_shift_linear=_min_shift_linear,
    taylor=_taylor,
    sparsemax=_sparsemax,
    entmax15=_entmax15,
)


def probability_map(scores: Tensor, name: str = "softmax", mask: Tensor | None = None, *, power: float = 2.0,
                    eps: float = 1e-3, ties: str = "first", scaled: bool = True) -> Tensor:
    """
    Returns the map's point of the simplex for every row of scores, (.., n), in their dtype, differentiable.

    scores   (.., n)   of a floating dtype
    mask     bool, of their shape or broadcast to it: True where a score counts, None: everywhere. A row without any
             gives zeros
    name     one of MAPS
    power    > 0: k of max_shift_rational
    eps      > 0: min_shift_linear's
    ties     "first" or "split": to whom the derivative of the largest or smallest score belongs when several share it
    scaled   see above

    ValueError for an unknown name or tie rule, or numbers that are not above 0.
    """
    # arguments
    if name not in MAPS:
        raise ValueError(f"unknown probability map {name!r}; there are {', '.join(MAPS)}")
    if ties not in ("first", "split"):
        raise ValueError(f"ties must be first or split, got {ties!r}")
    if not (power > 0 and eps > 0):
        raise ValueError(f"power and eps must lie above 0, got {power} and {eps}")

    # scores
    x = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scaled:
        x = x / (SLOPES.get(name, 1.0) or power)
    if mask is not None:
        mask = mask.expand_as(x)
        # a masked score is of no consequence, but finite, and what shift and projection need: neither the largest nor
        # the smallest, and outside of every support
        if name == "min_shift_linear":
            filler = x.masked_fill(~mask, torch.inf).amin(-1, keepdim=True) + 1
        else:
            filler = x.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True) - 2
        filler = filler.detach()
        x = torch.where(mask, x, filler.nan_to_num(0.0, 0.0, 0.0))

    # weights, and their share
    weights = MAPS[name](x, power, eps, ties)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).type_as(scores)
