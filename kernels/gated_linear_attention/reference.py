"""Gated linear attention, the reference: the formula of __init__.py from all pairs of tokens."""

import torch
from torch import Tensor

from kernels.backend import sum_dtype


def gated_linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, doc_start: Tensor | None = None
) -> Tensor:
    """
    Returns out_i = sum over j <= i in i's document of e^{F_i - F_j} (q_i . k_j) v_j, from the full T x T matrix. It
    runs on any device and in any floating dtype, and autograd differentiates it.

    query, key (B, T, H, M); value (B, T, H, D); log_decay (B, T, H), <= 0 and finite, or None; doc_start (B, T),
    integer, or None. The result (B, T, H, D) has value's dtype. Sums run in float32, in float64 for float64 values; F
    in float64.
    """
    dtype = sum_dtype(value)
    T = value.shape[1]
    query, key, values = (x.to(dtype).transpose(1, 2) for x in (query, key, value))

    # the pairs that exist (B, H, T, T)
    index = torch.arange(T, device=value.device)
    allowed = index <= index[:, None]
    if doc_start is not None:
        allowed = allowed & (index >= doc_start[:, None, :, None])
    pairs = (query @ key.transpose(-1, -2)).masked_fill(~allowed, 0.0)

    # their decays
    if log_decay is not None:
        total = log_decay.double().cumsum(1).transpose(1, 2)
        exponent = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, 0.0)
        pairs = pairs * exponent.exp().to(dtype)
    return (pairs @ values).transpose(1, 2).to(value.dtype)


def empty_gradients(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> tuple[Tensor, ...]:
    """Returns room for the four gradients, contiguous; that of an absent log-decay is empty."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    if log_decay is None:
        return *gradients, value.new_empty(0)
    return *gradients, torch.empty(log_decay.shape, dtype=log_decay.dtype, device=log_decay.device)
