"""
The lane scan of a text that goes on: what a layer keeps of earlier tokens, X numbers a channel whatever their number.

    S_t = (p_t > 0) e^{-a} S_{t-1} + phi(p_t) u_t        y_t = m_t sum over x of g_x phi_x(p_t) S_t,x

phi(p) is a table's row, or of waves (cos(w_f p), sin(w_f p)): frequencies that are not turned step by step keep their
angle over any number of tokens. a and g are a frequency's own for both of its columns.
"""

import math

import torch
from torch import Tensor

from kernels.lane_scan.reference import pair_weights

SLICE = 128     # tokens that are taken at one time


def _rows(features: Tensor, positions: Tensor) -> Tensor:
    """Returns phi (B, t, X) float64 at positions (B, t)."""
    if features.ndim == 2:
        return features[positions.long().clamp(0, len(features) - 1)]
    angles = 2 * math.pi * (positions.double()[..., None] * features).remainder(1.0)
    return torch.cat((angles.cos(), angles.sin()), -1)


def _columns(x: Tensor, features: Tensor) -> Tensor:
    """Returns gains or decays (H, F) as (H, X), float64."""
    return x.double() if features.ndim == 2 else torch.cat((x, x), -1).double()


def _fade(state: Tensor, decay: Tensor | None, steps: int) -> Tensor:
    """Returns the state (B, H, X, D) after a number of steps; its factor counts with twice the digits of its dtype."""
    if decay is None:
        return state
    factor = torch.exp(-steps * decay)[..., None]
    rounded = factor.to(state.dtype)
    return torch.addcmul(state * rounded, state, (factor - rounded.double()).to(state.dtype))


def advance(
    state: Tensor, x: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Takes the next t tokens x (B, H, t, D), in the state's dtype; positions (B, t). Returns their sums (B, H, t, D) and
    the state (B, H, X, D) behind them.
    """
    # features
    dtype = state.dtype
    t = x.shape[2]
    index = torch.arange(t, device=x.device)
    write = _rows(features, positions)[:, None]                     # (B, 1, t, X)
    read = write * _columns(gain, features)[:, None]
    columns = None if decay is None else _columns(decay, features)  # (H, X)
    continues = (positions > index)[:, None, :, None]               # from before: not even 0 times that for others

    # one token: what it reads from the state behind it
    if t == 1:
        kept = torch.where(continues, _fade(state, columns, 1), 0.0)
        state = torch.addcmul(kept, write.to(dtype).mT, x)
        return read.to(dtype) @ state, state

    # several: what they read from each other and from the state before them
    start = (index - positions).clamp_min(0)
    y = pair_weights(features, gain, decay, start, positions).to(dtype) @ x
    last = (index >= start[:, -1:])[:, None, :, None]
    if decay is not None:
        read = read * torch.exp(-columns[:, None] * (index + 1)[:, None])
        write = write * torch.exp(-columns[:, None] * (t - 1 - index)[:, None])
    y = y + torch.where(continues, read.to(dtype) @ state, 0.0)

    # the state behind them
    kept = torch.where(continues[:, :, -1:], _fade(state, columns, t), 0.0)
    return y, kept + (write * last).to(dtype).mT @ x
