"""
Topological attention, backend "binned": linear time and a state of fixed size, with key coordinates on M bin centres
c_m, equally spaced from low to high.

    out_i = sum_j p_ij v_j / sum_j p_ij                             doc_start_i <= j <= i
    p_ij = e^{F_i - F_j + c_j} sum_m e^{-|a_i - c_m|} k_jm          F_i = sum over t <= i of g_t

k_j has a 1 at the bin nearest to b_j, or linear weights on the two bins around it (spread). This is gated linear
attention of M query features e^{-|a_i - c_m|}, sparse key features and values [v, 1], and exact for coordinates on bin
centres. With spread it is softmax attention whose kernel e^{-|a - b|} is interpolated linearly in b. Its error falls
with the square of the bins' distance, but to its power 1.5 for queries that lie between a key's bins, where the kink is
cut off. At 256 bins, with normal coordinates and values, T = 400, it is 0.3 % of the result (nearest bins: 1.7 %), and
19 % of the coordinates' gradients (20 to 23 %): there a pair within a step of each other counts as much as any, and
smoothed or rounded signs in place of theirs make the error fall with the root of the distance only.

What keeps it in range: mu_i = max(c_i, mu_{i-1} + g_i), anew in each document, is the largest exponent F_i - F_j + c_j
of the keys that i sees. With key features e^{c_j - mu_j} k_j and log-decay g_i + mu_{i-1} - mu_i, which is <= 0, the
state is the one above times e^{-mu_i}, which cancels in out_i: an online softmax's maximum, told by the past alone.
Queries are clamped to [low, high], which changes no ratio of weights, so that a sum of weights is at least
e^{low - high}. In a range wider than NARROW query features are divided by their row's largest weight, from running
maxima for each bin.

Gradients are those of the formula. mu is a constant, as the result does not depend on it. Nearest bins pass a gradient
straight through, that of the distance at the bin centre, by M more features: sgn(a_i - c_m) e^{-|a_i - c_m|} of the
query, and of the key b_j less itself, a zero with a derivative, in its bin.

Work for one token of one head: that of gated linear attention (its file) for M features and D + 1 values,
2 C (M + D + 1) + 4 M (D + 1) FLOPs forward, and M exponentials. Memory: 2 M features a token and head in the compute
dtype, 2 M / D times value, for about SLICE features at a time, or those of one head of one sequence if they are more;
where there are several slices, each is computed anew for the backward pass. A wide range takes a few times as many in
float64 besides. Decode: M (D + 1) numbers a head and 4 M (D + 1) FLOPs a token, whatever the length.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the form as
gated linear attention is ours. Straight-through gradients: Bengio et al., arxiv.org/abs/1308.3432. Running maximum:
Milakov and Gimelshein, arxiv.org/abs/1805.02867.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from kernels.segmented_scan import running, starts_of, sums_after
from kernels.topological_attention.reference import LOWEST, compute_dtype, query_heads

# of coordinates of about unit variance
RANGE = (-8.0, 8.0)
# the widest range in which plain query features do: e^-40, and e^-80 where gated linear attention forgets, are nothing
# in float32
NARROW = 40.0
# the largest logarithm of a query feature in wider ranges: keys whose factor is below e^-60 of the largest can be gone
LIVE = 60.0
# less is dropped from a state: it would become denormal numbers, which a CPU multiplies many times as slowly
LEAST = 1e-35
# features of queries, and of keys, that are made at a time
SLICE = 1 << 24


class BinnedState(NamedTuple):
    """What the keys of one document leave behind."""
    sums: Tensor        # (B, H, M, D + 1): the sums of weighted [v, 1] in each bin, times e^-log_scale
    log_scale: Tensor   # (B, H)

    @classmethod
    def empty(
        cls, batch: int, heads: int, bins: int, head_dim: int,
        dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> "BinnedState":
        """Returns the state at a document's start. dtype: float32 or float64."""
        sums = torch.zeros(batch, heads, bins, head_dim + 1, dtype=dtype, device=device)
        return cls(sums, torch.full((batch, heads), LOWEST, dtype=dtype, device=device))


class Grid(NamedTuple):
    """The bins' centres, and how keys lie on them."""
    bins: int
    low: float
    high: float
    spread: bool

    def centres(self, like: Tensor) -> Tensor:
        """Returns the centres (bins), in this tensor's dtype and on its device."""
        index = torch.arange(self.bins, dtype=torch.float64, device=like.device)
        return (self.low + self.step * index).to(like.dtype)

    @property
    def step(self) -> float:
        return (self.high - self.low) / (self.bins - 1)

    @property
    def is_wide(self) -> bool:
        return self.high - self.low > NARROW


def _grid(bins: int, low: float | None, high: float | None, spread: bool) -> Grid:
    """Returns the grid, or raises the ValueErrors of bins, low and high."""
    low = RANGE[0] if low is None else float(low)
    high = RANGE[1] if high is None else float(high)
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 2:
        raise ValueError(f"bins must be an integer of at least 2, got {bins!r}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high and both finite, got low={low:g}, high={high:g}")
    return Grid(bins, low, high, spread)


def _bins_of(key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """
    Returns the bins (..., n), int64, that keys at the coordinates (...) lie in, and their weights there (..., n), where
    n is 2 with spread, else 1.
    """
    position = ((key - grid.low) / grid.step).clamp(0, grid.bins - 1)
    if grid.spread:
        lower = position.detach().floor().clamp_max(grid.bins - 2)
        above = (position - lower)[..., None]
        return lower.long()[..., None] + torch.arange(2, device=key.device), torch.cat((1 - above, above), -1)
    nearest = position.detach().round()[..., None]
    return nearest.long(), torch.ones_like(nearest)


def _fold_bias(log_decay: Tensor | None, key_bias: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """
    Returns, (B, T, H) in float64 each, the log-decay with mu_{t-1} - mu_t in it, never above 0, and e^{c_t - mu_t}.
    """
    bias = key_bias.double().clamp_min(LOWEST)
    with torch.no_grad():
        # mu
        starts = None if doc_start is None else starts_of(doc_start)[:, None]
        scales = bias.transpose(1, 2)
        decay = torch.zeros_like(bias)
        if log_decay is None:
            scales = running(torch.maximum, scales, starts)
        else:
            decay = log_decay.double()
            total = running(torch.add, decay.transpose(1, 2), starts)
            scales = total + running(torch.maximum, scales - total, starts)

        # the log-decay with its steps
        scales = scales.transpose(1, 2)
        decay = (decay + F.pad(scales[:, :-1] - scales[:, 1:], (0, 0, 1, 0))).clamp_max(0)
    if log_decay is not None:
        decay = decay + (log_decay - log_decay.detach())  # a zero with the log-decay's derivative
    return decay, (bias - scales).exp()


def _row_shift(
    query: Tensor, bins: Tensor, weights: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, centres: Tensor
) -> Tensor:
    """
    Returns (B, T, H): the logarithm of the largest e^{F_i - F_j} k_jm e^-|a_i - c_m|, but for keys with
    e^{F_i - F_j} k_jm below e^-LIVE. log_decay is float64, and has mu in it, as the weights have.
    """
    # the logarithm of each bin's largest weight so far (B, H, M, T)
    logs = torch.full((*query.shape, len(centres)), -math.inf, dtype=torch.float64, device=query.device)
    logs = logs.scatter_reduce(-1, bins, weights.log().double(), "amax").movedim(1, -1)
    starts = None if doc_start is None else starts_of(doc_start)[:, None, None]
    if log_decay is None:
        logs = running(torch.maximum, logs, starts)
    else:
        # bounded from below, as what a bias of -inf hides would drown the rest
        bounded = log_decay.clamp_min(-2 * LIVE).transpose(1, 2)[:, :, None]
        total = running(torch.add, bounded, starts)
        logs = total + running(torch.maximum, logs - total, starts)

    # the largest of all bins
    logs = logs.movedim(-1, 1)
    scores = logs - (query[..., None] - centres).abs()
    return scores.masked_fill(logs < -LIVE, -math.inf).amax(-1).to(query.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, key_bias: Tensor | None,
    doc_start: Tensor | None, grid: Grid
) -> Tensor:
    """Returns topological_attention_binned's result for one slice of rows."""
    dtype = compute_dtype(query, key, value, log_decay, key_bias)
    B, T, H = query.shape
    D = value.shape[-1]

    def by_head(x: Tensor) -> Tensor:
        return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], 2)

    # the values [v, 1]: bfloat16 is what tensor cores take as it is; float16's range a sum of weights can leave
    for_tensor_cores = value.is_cuda and value.dtype == torch.bfloat16 and dtype == torch.float32
    values = by_head(value if for_tensor_cores else value.to(dtype))
    values = F.pad(values, (0, 16 - D % 16), value=1.0)[..., :D + 1]

    # where the keys lie, and their weights
    query = query.to(dtype)
    key = key.to(dtype)
    bins, weights = (by_head(x) for x in _bins_of(key, grid))
    if key_bias is not None:
        log_decay, factors = _fold_bias(log_decay, by_head(key_bias), doc_start)
        weights = weights * factors.to(dtype)[..., None]

    # the exponents of the queries' features
    centres = grid.centres(query)
    inside = query.clamp(grid.low, grid.high)
    exponent = -(inside[..., None] - centres).abs()
    if grid.is_wide:
        with torch.no_grad():
            decay = None if log_decay is None else log_decay.double()
            shift = _row_shift(inside, bins, weights, decay, doc_start, centres)
        exponent = exponent - shift[..., None]
        exponent = exponent.masked_fill(exponent > LIVE, -math.inf)

    # the features
    of_queries = exponent.exp()
    of_keys = weights.new_zeros(B, T, H, grid.bins).scatter_add(-1, bins, weights)
    if not grid.spread and torch.is_grad_enabled() and key.requires_grad:
        # d/db e^-|a - b| = sgn(a - b) e^-|a - b|, for features that are zero
        of_queries = torch.cat((of_queries, of_queries * (query[..., None] - centres).sign()), -1)
        of_keys = torch.cat((of_keys, of_keys.detach() * by_head(key - key.detach())[..., None]), -1)

    # the sums of [v, 1]
    sums = gated_linear_attention(
        of_queries.to(values.dtype),
        of_keys.to(values.dtype),
        values,
        log_decay=None if log_decay is None else log_decay.to(dtype),
        doc_start=None if doc_start is None else doc_start.int(),
    )
    sums = sums.to(dtype)
    return (sums[..., :D] / sums[..., D:]).to(value.dtype)


def topological_attention_binned(
    query_coord: Tensor,
    key_coord: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    doc_start: Tensor | None = None,
    window: int | None = None,
    *,
    bins: int = 256,
    low: float | None = None,
    high: float | None = None,
    spread: bool = True,
) -> Tensor:
    """
    Returns topological_attention's result with the key coordinates on `bins` centres from low to high. Tensors are
    topological_attention's; they are not checked here.

    Arguments:
        bins        at least 2; each costs D + 1 numbers of state and two features a token
        low, high   the first and the last centre; None: -8 and 8. Queries may lie anywhere, keys outside count as at
                    the end. Where high - low is above 40, keys whose e^{F_i - F_j + c_j} is below e^-60 of the largest
                    may count as gone, however near they lie
        spread      True: linear weights on the two bins around a key, and no gradient for keys outside. This is for
                    bins at most about 1 apart: further apart, a weight on a bin that is e^x times as near to a query
                    counts e^x times, and the gradient of a key close to a centre is as large.
                    False: all of a key on the nearest bin. The gradient is that of the bin's centre, which passes
                    straight through to any key; where there is a gradient, there are twice as many features
        window      None, or at least T: a state of fixed size cannot forget a single token

    Sums run in the compute dtype of topological_attention; for bfloat16 values on a GPU products are bfloat16. There
    are gradients once. Raises ValueError for a window, for absent coordinates, and for wrong bins, low and high.
    """
    grid = _grid(bins, low, high, spread)
    B, T, kv_heads, _ = value.shape
    if query_coord is None or key_coord is None:
        raise ValueError(
            "query_coord and key_coord must be given for backend binned; without them use backend loglinear, "
            "which is O(T)"
        )
    if window is not None and window < T:
        raise ValueError(
            f"window must be None or at least T = {T} for backend binned, whose state cannot forget a single token; "
            f"got {window}"
        )
    of_queries = (query_coord, log_decay)
    of_keys = (key_coord, value, key_bias)

    # sequences and heads of keys of a slice
    repeats = query_coord.shape[2] // kv_heads
    rows = max(1, SLICE // (T * repeats * bins))
    batch = B
    heads = kv_heads
    if rows < B * kv_heads:
        batch = max(1, rows // kv_heads)
        heads = min(kv_heads, rows)

    def attend(first: int, head: int) -> Tensor:
        """Returns the result of the slice that begins at this sequence and head of keys."""
        sequences = slice(first, first + batch)
        query, decay = (_cut(x, sequences, head * repeats, heads * repeats) for x in of_queries)
        key, values, bias = (_cut(x, sequences, head, heads) for x in of_keys)
        starts = None if doc_start is None else doc_start[sequences]
        arguments = (query, key, values, decay, bias, starts, grid)
        if (batch == B and heads == kv_heads) or not torch.is_grad_enabled():
            return _attend(*arguments)
        return checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)

    with torch.autocast(value.device.type, enabled=False):
        results = [[attend(first, head) for head in range(0, kv_heads, heads)] for first in range(0, B, batch)]
    if batch == B and heads == kv_heads:
        return results[0][0]
    return torch.cat([torch.cat(of_heads, 2) for of_heads in results])


def _cut(x: Tensor | None, sequences: slice, head: int, heads: int) -> Tensor | None:
    """Returns these sequences of x and so many of its heads, from `head` on."""
    return None if x is None else x[sequences, :, head:head + heads]


def topological_attention_binned_state(
    key_coord: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    doc_start: Tensor | None = None,
    *,
    heads: int | None = None,
    bins: int = 256,
    low: float | None = None,
    high: float | None = None,
    spread: bool = True,
) -> BinnedState:
    """
    Returns the state after the last token of a prompt: what the tokens of its last document leave behind. It is made in
    O(T D) without features; on a GPU sums have no fixed order.

    Tensors are topological_attention's. heads: the queries' number; None: log_decay's, without one Hkv. The state's
    sums (B, heads, bins, D + 1) and log_scale (B, heads) are float32, or float64 where an argument is. There is no
    gradient through log_scale, which cancels in what is read.
    """
    grid = _grid(bins, low, high, spread)
    dtype = compute_dtype(key_coord, value, log_decay, key_bias)
    B, T, _, D = value.shape
    heads = heads or query_heads(None, value, log_decay)

    def by_row(x: Tensor) -> Tensor:
        """(B, T, ...) -> (B heads, T, ...)"""
        return x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2).flatten(0, 1)

    # the logarithm of each token's weight, and its largest
    exponent = torch.zeros(B * heads, T, dtype=torch.float64, device=value.device)
    if log_decay is not None:
        exponent = exponent + sums_after(by_row(log_decay).double())
    if key_bias is not None:
        exponent = exponent + by_row(key_bias).double().clamp_min(LOWEST)
    if doc_start is not None:
        seen = torch.arange(T, device=value.device) >= doc_start[:, -1:]
        exponent = exponent.masked_fill(~seen.repeat_interleave(heads, 0), -math.inf)
    log_scale = exponent.detach().amax(-1)
    factors = (exponent - log_scale[:, None]).exp().to(dtype)

    # the rows [v, 1] are added up in the bins of all rows and heads
    rows = F.pad(by_row(value).to(dtype), (0, 1), value=1.0)
    indices, weights = (by_row(x) for x in _bins_of(key_coord.to(dtype), grid))
    indices = indices + bins * torch.arange(B * heads, device=value.device)[:, None, None]
    sums = rows.new_zeros(B * heads * bins, D + 1)
    for index, weight in zip(indices.unbind(-1), weights.unbind(-1)):
        sums = sums.index_add(0, index.flatten(), (rows * (weight * factors)[..., None]).flatten(0, 1))
    return BinnedState(sums.view(B, heads, bins, D + 1), log_scale.view(B, heads).to(dtype))


def topological_attention_binned_step(
    state: BinnedState,
    query_coord: Tensor,
    key_coord: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    spread: bool = True,
) -> tuple[Tensor, BinnedState]:
    """
    Takes one more token of a document in O(M D), whatever came before. Returns out (B, H, D), in value's dtype, and the
    new state; the state before is left as it was.

    query_coord (B, H), key_coord (B, Hkv), value (B, Hkv, D), log_decay (B, H) or None, key_bias (B, Hkv) or None; low,
    high and spread as in the forward pass. Sums run in the state's dtype. Raises ValueError for wrong shapes.
    """
    dtype = state.sums.dtype
    B, H, bins, columns = state.sums.shape
    grid = _grid(bins, low, high, spread)
    kv_heads = key_coord.shape[-1]
    _check_step(state, kv_heads, dict(
        query_coord=(query_coord, (B, H)),
        key_coord=(key_coord, (B, kv_heads)),
        value=(value, (B, kv_heads, columns - 1)),
        log_decay=(log_decay, (B, H)),
        key_bias=(key_bias, (B, kv_heads)),
    ))

    def by_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(H // kv_heads, 1).to(dtype)

    # the scale of the new state
    decay = torch.zeros_like(state.log_scale) if log_decay is None else log_decay.to(dtype)
    bias = torch.zeros_like(decay) if key_bias is None else by_head(key_bias).clamp_min(LOWEST)
    carried = state.log_scale + decay
    log_scale = torch.maximum(carried, bias).detach()
    decay = carried - log_scale

    # the key's features, and the weights that are then in the bins
    indices, weights = _bins_of(by_head(key_coord), grid)
    weights = weights * (bias - log_scale).exp()[..., None]
    features = weights.new_zeros(B, H, bins).scatter_add(-1, indices, weights)
    mass = state.sums[..., -1] * decay.exp()[..., None] + features
    kept = mass > LEAST

    # the query's features
    inside = query_coord.to(dtype).clamp(grid.low, grid.high)
    distance = (inside[..., None] - grid.centres(features)).abs()
    exponent = -distance
    if grid.is_wide:
        scores = (mass.log() - distance).detach().masked_fill(mass < math.exp(-LIVE), -math.inf)
        exponent = exponent - scores.amax(-1, keepdim=True)
        exponent = exponent.masked_fill((exponent > LIVE) | ~kept, -math.inf)

    # one more token
    values = F.pad(by_head(value), (0, 1), value=1.0)
    out, sums = gated_linear_attention_step(state.sums, exponent.exp(), features, values, decay)
    sums = sums.masked_fill(~kept[..., None], 0.0)
    return (out[..., :-1] / out[..., -1:]).to(value.dtype), BinnedState(sums, log_scale)


def _check_step(state: BinnedState, kv_heads: int, shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]):
    """Raises a step's ValueErrors. shapes: of each argument, by name, what it is and the shape that it must have."""
    for name, (x, shape) in shapes.items():
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} must be {shape} for a state of sums {tuple(state.sums.shape)} and {kv_heads} heads of keys, "
                f"got {tuple(x.shape)}"
            )
    heads = state.sums.shape[1]
    if heads % kv_heads:
        raise ValueError(f"key_coord has {kv_heads} heads, which must divide the state's {heads}")
