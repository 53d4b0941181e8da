"""
The lane scan, the reference: the formula of __init__.py from all pairs of tokens, and the features that lanes are made
of.

Features are float64 tensors without gradients, whatever the lane's dtype: frequencies (F,) in turns a token, or a table
(P, K) with a row for each position in a document.
"""

import math

import torch
from torch import Tensor

from kernels.backend import sum_dtype

# ---- Features ---------------------------------------------------------------


def harmonic_frequencies(count: int, length: int) -> Tensor:
    """
    Returns f / length for f = 0 .. F - 1, in turns a token, float64: F = count, but no frequency above half a turn a
    token. The kernel that they make has the period `length`.
    """
    return torch.arange(min(count, length // 2 + 1), dtype=torch.float64) / length


def logarithmic_frequencies(count: int, length: int, shortest: float = 4.0) -> Tensor:
    """
    Returns `count` frequencies in turns a token, float64, whose wavelengths lie at equal ratios from `length` down to
    `shortest` tokens. The kernel that they make has no period.
    """
    exponents = torch.linspace(0, 1, count, dtype=torch.float64)
    return (shortest / length) ** -exponents / length


def chebyshev_table(count: int, length: int, grid: str = "linear") -> Tensor:
    """
    Returns the Chebyshev polynomials T_0 .. T_{count-1} at `length` positions, (length, count) float64. Position p lies
    at z = -1 + 2 p / (length - 1) on the linear grid and at -1 + 2 ln(1 + p) / ln(length) on the grid "log"; a single
    position at -1.
    """
    p = torch.arange(length, dtype=torch.float64)
    last = max(length - 1, 1)
    z = -1 + 2 * (p / last if grid == "linear" else torch.log1p(p) / math.log(last + 1))
    return torch.cos(torch.arange(count, dtype=torch.float64) * torch.acos(z.clamp(-1, 1))[:, None])


def time_kernel(frequencies: Tensor, gain: Tensor, decay: Tensor | None, distances: Tensor) -> Tensor:
    """
    Returns kappa at distances (n,), integers, for every head: sum over f of gain_f cos(2 pi frequency_f distance)
    e^{-decay_f distance}, (H, n) float64. gain, decay (H, F) may have gradients. Whole turns are left out of the angle
    before the cosine.
    """
    distances = distances.double()
    waves = torch.cos(2 * math.pi * (frequencies[:, None] * distances).remainder(1.0))
    if decay is not None:
        waves = waves * torch.exp(-decay.double()[..., None] * distances)
    return (gain.double()[..., None] * waves).sum(-2)


# ---- The scan ---------------------------------------------------------------


def pair_weights(features: Tensor, gain: Tensor, decay: Tensor | None, start: Tensor, positions: Tensor) -> Tensor:
    """
    Returns kappa(t, s) where s <= t in one document, else 0: (B or 1, H, T, T) float64. gain, decay (H, F); start and
    positions (B or 1, T): the first token of each token's document, and its place there.
    """
    index = torch.arange(start.shape[1], device=start.device)
    if features.ndim == 1:
        distances = (index[:, None] - index).clamp_min(0)
        weights = time_kernel(features, gain, decay, index)[:, distances][None]
    else:
        rows = features[positions.long().clamp(0, len(features) - 1)]
        weights = torch.einsum("btk,hk,bsk->bhts", rows, gain.double(), rows)
    allowed = (index <= index[:, None]) & (index >= start[..., None])
    return weights.masked_fill(~allowed[:, None], 0.0)


def lane_scan_reference(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None = None, doc_start: Tensor | None = None,
    mean: bool = False, window: int | None = None
) -> Tensor:
    """
    Returns lane_scan's y (B, T, W) from the full T x T matrix of each head, on any device and in any floating dtype;
    autograd differentiates it for u, gain and decay. Arguments are lane_scan's, but gain and decay (H, F) have heads.
    The matrix is made in float64; sums run in u's dtype, in float32 at least.
    """
    # the matrix
    index = torch.arange(u.shape[1], device=u.device)
    start = index.new_zeros(1, len(index)) if doc_start is None else doc_start
    positions = index - start
    weights = pair_weights(features, gain, decay, start, positions)
    if window is not None:
        weights = weights.masked_fill(index <= index[:, None] - window, 0.0)
    if mean:
        weights = weights / (positions + 1)[:, None, :, None]

    # the sums
    dtype = sum_dtype(u)
    values = u.to(dtype).unflatten(2, (len(gain), -1)).transpose(1, 2)
    return (weights.to(dtype) @ values).transpose(1, 2).flatten(2).to(u.dtype)
