"""
Topological attention, backend "binned": linear time and a state of fixed size, with key coordinates on M bin centres c_m, equally spaced from low to high.

    out_i = sum_j p_ij v_j / sum_j p_ij      p_ij = e^{F_i - F_j + c_j} sum_m e^{-|a_i - c_m|} k_jm      doc_start_i <= j <= i      F_i = sum over t <= i of g_t

k_j has a 1 at the bin nearest to b_j, or linear weights on the two bins around it (spread). This is gated linear attention of M query features e^{-|a_i - c_m|},
sparse key features and values [v, 1], and exact for coordinates on bin centres. With spread it is softmax attention whose kernel e^{-|a - b|} is interpolated
linearly in b: the error falls with the square of the bins' distance, but to its power 1.5 for queries that lie between a key's bins, where the kink is cut off. At
256 bins, with normal coordinates and values, T = 400, it is 0.3 % of the result (nearest bins: 1.7 %), and 19 % of the coordinates' gradients (20 to 23 %): there a
pair within a step of each other counts as much as any, and smoothed or rounded signs in place of theirs make it fall with the root of the distance only.

What keeps it in range: mu_i = max(c_i, mu_{i-1} + g_i), anew in each document, is the largest exponent F_i - F_j + c_j of the keys that i sees. With key features
e^{c_j - mu_j} k_j and log-decay g_i + mu_{i-1} - mu_i, which is <= 0, the state is the one above times e^{-mu_i}, which cancels in out_i: an online softmax's
maximum, told by the past alone. Queries are clamped to [low, high], which changes no ratio of weights, so that a sum of weights is at least e^{low - high}. In a
range wider than NARROW query features are divided by their row's largest weight, from running maxima for each bin.

Gradients are those of the formula. mu is a constant, as the result does not depend on it. Nearest bins pass a gradient straight through, that of the distance at
the bin centre, by M more features: sgn(a_i - c_m) e^{-|a_i - c_m|} of the query and of the key b_j less itself, a zero with a derivative, in its bin.

Work for one token of one head: that of gated linear attention (its file) for M features and D + 1 values, 2 C (M + D + 1) + 4 M (D + 1) FLOPs forward, and M
exponentials. Memory: 2 M features a token and head in the compute dtype, 2 M / D times value, for about SLICE features at a time, or those of one head of one
sequence if they are more; where there are several slices, each is computed anew for the backward pass. A wide range takes a few times as many in float64 besides.
Decode: M (D + 1) numbers a head and 4 M (D + 1) FLOPs a token, whatever the length.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the form as gated linear attention is ours. Straight-through
gradients: Bengio et al., arxiv.org/abs/1308.3432. Running maximum: Milakov and Gimelshein, arxiv.org/abs/1805.02867.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from kernels.segmented_scan import running, starts_of, sums_after
from kernels.topological_attention_reference import LOWEST, compute_dtype, query_heads

RANGE = (-8.0, 8.0)         # of coordinates of about unit variance
NARROW = 40.0               # widest range in which plain query features do: e^-40, and e^-80 where gated linear attention forgets, are nothing in float32
LIVE = 60.0                 # largest logarithm of a query feature in wider ranges: keys whose factor is below e^-60 of the largest can be gone
LEAST = 1e-35               # less is dropped from a state: it would become denormal numbers, which a CPU multiplies many times as slowly
SLICE = 1 << 24             # features of queries, and of keys, that are made at a time


class BinnedState(NamedTuple):
    """What the keys of one document leave behind: sums (B, H, M, D + 1) of weighted [v, 1] in each bin, times e^-log_scale; log_scale (B, H)."""
    sums: Tensor
    log_scale: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, bins: int, head_dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> "BinnedState":
        """The state at a document's start. dtype: float32 or float64."""
        return cls(torch.zeros(batch, heads, bins, head_dim + 1, dtype=dtype, device=device), torch.full((batch, heads), LOWEST, dtype=dtype, device=device))


def _range(bins: int, low: float | None, high: float | None) -> tuple[float, float]:
    low, high = (default if x is None else float(x) for x, default in zip((low, high), RANGE))
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 2:
        raise ValueError(f"bins must be an integer of at least 2, got {bins!r}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low must be below high and both finite, got low={low:g}, high={high:g}")
    return low, high


def _centres(like: Tensor, bins: int, low: float, high: float) -> Tensor:
    return (low + (high - low) / (bins - 1) * torch.arange(bins, dtype=torch.float64, device=like.device)).to(like.dtype)


def _bins_of(key: Tensor, bins: int, low: float, high: float, spread: bool) -> tuple[Tensor, Tensor]:
    """Coordinates (...) -> the bins (..., n) int64 that a key lies in and its weights there (..., n), n = 2 with spread, else 1."""
    step = (high - low) / (bins - 1)
    position = ((key - low) / step).clamp(0, bins - 1)
    if spread:
        lower = position.detach().floor().clamp_max(bins - 2)
        above = (position - lower)[..., None]
        return lower.long()[..., None] + torch.arange(2, device=key.device), torch.cat((1 - above, above), -1)
    nearest = position.detach().round()[..., None]
    return nearest.long(), torch.ones_like(nearest)


def _fold_bias(log_decay: Tensor | None, key_bias: Tensor, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T, H) each: the log-decay with mu_{t-1} - mu_t in it, never above 0, and e^{c_t - mu_t}; float64."""
    bias = key_bias.double().clamp_min(LOWEST)
    with torch.no_grad():
        starts = None if doc_start is None else starts_of(doc_start)[:, None]
        scales, decay = bias.transpose(1, 2), torch.zeros_like(bias)
        if log_decay is None:
            scales = running(torch.maximum, scales, starts)
        else:
            decay = log_decay.double()
            total = running(torch.add, decay.transpose(1, 2), starts)
            scales = total + running(torch.maximum, scales - total, starts)
        scales = scales.transpose(1, 2)
        decay = (decay + F.pad(scales[:, :-1] - scales[:, 1:], (0, 0, 1, 0))).clamp_max(0)
    return decay if log_decay is None else decay + (log_decay - log_decay.detach()), (bias - scales).exp()


def _row_shift(query: Tensor, places: Tensor, weights: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, centres: Tensor) -> Tensor:
    """
    (B, T, H): the logarithm of the largest e^{F_i - F_j} k_jm e^-|a_i - c_m|, but for keys with e^{F_i - F_j} k_jm below e^-LIVE. With log_decay in float64 and
    mu in it and the weights.
    """
    shape = (*query.shape, len(centres))
    logs = torch.full(shape, -math.inf, dtype=torch.float64, device=query.device)
    logs = logs.scatter_reduce(-1, places, weights.log().double(), "amax").movedim(1, -1)  # (B, H, M, T)
    starts = None if doc_start is None else starts_of(doc_start)[:, None, None]
    if log_decay is None:
        logs = running(torch.maximum, logs, starts)
    else:
        total = running(torch.add, log_decay.clamp_min(-2 * LIVE).transpose(1, 2)[:, :, None], starts)  # what is hidden by a bias of -inf would drown the rest
        logs = total + running(torch.maximum, logs - total, starts)
    scores = logs.movedim(-1, 1) - (query[..., None] - centres).abs()
    return scores.masked_fill(logs.movedim(-1, 1) < -LIVE, -math.inf).amax(-1).to(query.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, key_bias: Tensor | None, doc_start: Tensor | None, bins: int, low: float,
            high: float, spread: bool) -> Tensor:
    dtype, (B, T, H), D = compute_dtype(query, key, value, log_decay, key_bias), query.shape, value.shape[-1]
    by_head = lambda x: x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], 2)
    # bfloat16 is what tensor cores take as it is; float16's range a sum of weights can leave
    values = by_head(value if value.is_cuda and value.dtype == torch.bfloat16 and dtype == torch.float32 else value.to(dtype))
    values = F.pad(values, (0, 16 - D % 16), value=1.0)[..., :D + 1]
    query, key = query.to(dtype), key.to(dtype)
    inside = query.clamp(low, high)
    places, weights = (by_head(x) for x in _bins_of(key, bins, low, high, spread))
    if key_bias is not None:
        log_decay, factors = _fold_bias(log_decay, by_head(key_bias), doc_start)
        weights = weights * factors.to(dtype)[..., None]
    centres = _centres(query, bins, low, high)
    exponent = -(inside[..., None] - centres).abs()
    if high - low > NARROW:
        with torch.no_grad():
            shift = _row_shift(inside, places, weights, None if log_decay is None else log_decay.double(), doc_start, centres)
        exponent = exponent - shift[..., None]
        exponent = exponent.masked_fill(exponent > LIVE, -math.inf)
    of_queries, of_keys = exponent.exp(), weights.new_zeros(B, T, H, bins).scatter_add(-1, places, weights)
    if not spread and torch.is_grad_enabled() and key.requires_grad:  # d/db e^-|a - b| = sgn(a - b) e^-|a - b|, for features that are zero
        of_queries = torch.cat((of_queries, of_queries * (query[..., None] - centres).sign()), -1)
        of_keys = torch.cat((of_keys, of_keys.detach() * by_head(key - key.detach())[..., None]), -1)
    log_decay, doc_start = None if log_decay is None else log_decay.to(dtype), None if doc_start is None else doc_start.int()
    sums = gated_linear_attention(of_queries.to(values.dtype), of_keys.to(values.dtype), values, log_decay=log_decay, doc_start=doc_start).to(dtype)
    return (sums[..., :D] / sums[..., D:]).to(value.dtype)


def topological_attention_binned(query_coord: Tensor, key_coord: Tensor, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None,
                                 doc_start: Tensor | None = None, window: int | None = None, *, bins: int = 256, low: float | None = None,
                                 high: float | None = None, spread: bool = True) -> Tensor:
    """
    topological_attention with the key coordinates on `bins` centres from low to high; tensors and result as there, which are not checked here.

    bins        at least 2; each costs D + 1 numbers of state and two features a token
    low, high   of the centres, None: -8 and 8. Queries may lie anywhere, keys outside count as at the end. Where high - low is above 40, keys whose
                e^{F_i - F_j + c_j} is below e^-60 of the largest may count as gone, however near they lie
    spread      linear weights on the two bins around a key, no gradient for keys outside; for bins at most about 1 apart: further apart, a weight on a bin that is
                e^x times as near to a query counts e^x times, and the gradient of a key close to a centre is as large. False: all on the nearest bin, the gradient
                that of its centre passing straight through to any key, for twice the features where there is a gradient
    window      a state of fixed size cannot forget a single token: None, or at least T
    Sums run in the compute dtype of topological_attention, for bfloat16 values on a GPU with bfloat16 products. Gradients once. ValueError for a window, and for
    bins, low and high that are none.
    """
    low, high = _range(bins, low, high)
    B, T, kv_heads, _ = value.shape
    if query_coord is None or key_coord is None:
        raise ValueError("query_coord and key_coord must be given for backend binned; without them use backend loglinear, which is O(T)")
    if window is not None and window < T:
        raise ValueError(f"window must be None or at least T = {T} for backend binned, whose state cannot forget a single token; got {window}")
    repeats = query_coord.shape[2] // kv_heads
    rows, heads = max(1, SLICE // (T * repeats * bins)), kv_heads
    batch = B
    if rows < B * kv_heads:
        batch = max(1, rows // kv_heads)
        heads = min(kv_heads, rows)
    whole = batch == B and heads == kv_heads
    with torch.autocast(value.device.type, enabled=False):
        parts = []
        for first in range(0, B, batch):
            for head in range(0, kv_heads, heads):
                of_keys = lambda x, b=slice(first, first + batch), h=slice(head, head + heads): None if x is None else x[b, :, h]
                of_queries = lambda x, b=slice(first, first + batch), h=slice(head * repeats, (head + heads) * repeats): None if x is None else x[b, :, h]
                arguments = (of_queries(query_coord), of_keys(key_coord), of_keys(value), of_queries(log_decay), of_keys(key_bias),
                             None if doc_start is None else doc_start[first:first + batch], bins, low, high, spread)
                parts.append(_attend(*arguments) if whole or not torch.is_grad_enabled()
                             else checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False))
    if whole:
        return parts[0]
    across = -(-kv_heads // heads)
    return torch.cat([torch.cat(parts[i:i + across], 2) for i in range(0, len(parts), across)])


def topological_attention_binned_state(key_coord: Tensor, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None,
                                       doc_start: Tensor | None = None, *, heads: int | None = None, bins: int = 256, low: float | None = None,
                                       high: float | None = None, spread: bool = True) -> BinnedState:
    """
    The state after the last token of a prompt: what the tokens of its last document leave behind. O(T D) and no features; on a GPU sums in no fixed order.

    Tensors as topological_attention's. heads: of the queries; None: log_decay's, without one Hkv. Returns sums (B, heads, bins, D + 1) and log_scale (B, heads)
    in float32, or float64 where an argument is. No gradients through log_scale, which cancels in what is read.
    """
    low, high = _range(bins, low, high)
    dtype, (B, T, _, D) = compute_dtype(key_coord, value, log_decay, key_bias), value.shape
    heads = heads or query_heads(None, value, log_decay)
    by_row = lambda x: x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2).flatten(0, 1)  # (B*H, T, ...)
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
    rows = F.pad(by_row(value).to(dtype), (0, 1), value=1.0)
    places, weights = (by_row(x) for x in _bins_of(key_coord.to(dtype), bins, low, high, spread))
    places = places + bins * torch.arange(B * heads, device=value.device)[:, None, None]
    sums = rows.new_zeros(B * heads * bins, D + 1)
    for place, weight in zip(places.unbind(-1), weights.unbind(-1)):
        sums = sums.index_add(0, place.flatten(), (rows * (weight * factors)[..., None]).flatten(0, 1))
    return BinnedState(sums.view(B, heads, bins, D + 1), log_scale.view(B, heads).to(dtype))


def topological_attention_binned_step(state: BinnedState, query_coord: Tensor, key_coord: Tensor, value: Tensor, log_decay: Tensor | None = None,
                                      key_bias: Tensor | None = None, *, low: float | None = None, high: float | None = None,
                                      spread: bool = True) -> tuple[Tensor, BinnedState]:
    """
    One more token of a document: (out (B, H, D) in value's dtype, the new state). O(M D) whatever came before.

    query_coord (B, H), key_coord (B, Hkv), value (B, Hkv, D), log_decay (B, H), key_bias (B, Hkv), the latter two or None; low, high and spread as in the forward
    pass. Sums run in the state's dtype. The state before is left as it was. ValueError for wrong shapes.
    """
    dtype, (B, H, bins, columns) = state.sums.dtype, state.sums.shape
    low, high = _range(bins, low, high)
    kv_heads = key_coord.shape[-1]
    shapes = dict(query_coord=(B, H), key_coord=(B, kv_heads), value=(B, kv_heads, columns - 1), log_decay=(B, H), key_bias=(B, kv_heads))
    for (name, shape), x in zip(shapes.items(), (query_coord, key_coord, value, log_decay, key_bias)):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape} for a state of sums {tuple(state.sums.shape)} and {kv_heads} heads of keys, got {tuple(x.shape)}")
    if H % kv_heads:
        raise ValueError(f"key_coord has {kv_heads} heads, which must divide the state's {H}")
    by_head = lambda x: x.repeat_interleave(H // kv_heads, 1).to(dtype)
    decay = torch.zeros_like(state.log_scale) if log_decay is None else log_decay.to(dtype)
    bias = torch.zeros_like(decay) if key_bias is None else by_head(key_bias).clamp_min(LOWEST)
    carried = state.log_scale + decay
    log_scale = torch.maximum(carried, bias).detach()
    places, weights = _bins_of(by_head(key_coord), bins, low, high, spread)
    features = weights.new_zeros(B, H, bins).scatter_add(-1, places, weights * (bias - log_scale).exp()[..., None])
    decay = carried - log_scale
    mass = state.sums[..., -1] * decay.exp()[..., None] + features
    kept = mass > LEAST
    distance = (query_coord.to(dtype).clamp(low, high)[..., None] - _centres(features, bins, low, high)).abs()
    exponent = -distance
    if high - low > NARROW:
        exponent = exponent - (mass.log() - distance).detach().masked_fill(mass < math.exp(-LIVE), -math.inf).amax(-1, keepdim=True)
        exponent = exponent.masked_fill((exponent > LIVE) | ~kept, -math.inf)
    out, sums = gated_linear_attention_step(state.sums, exponent.exp(), features, F.pad(by_head(value), (0, 1), value=1.0), decay)
    return (out[..., :-1] / out[..., -1:]).to(value.dtype), BinnedState(sums.masked_fill(~kept[..., None], 0.0), log_scale)
