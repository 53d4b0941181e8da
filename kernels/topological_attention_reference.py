"""
Topological attention, the reference: the formula of topological_attention.py with the whole matrix of scores. The file
also holds what all backends share.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LOWEST = -1e30              # the potential of no key at all: finite, as it is subtracted from itself


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns the dtype of sums: float64 where a tensor has it, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def query_heads(query: Tensor | None, value: Tensor, log_decay: Tensor | None) -> int:
    """Returns H: the heads of query, else those of log_decay, else those of value."""
    return next((x.shape[2] for x in (query, log_decay) if x is not None), value.shape[2])


def topological_attention_reference(
    query_coord: Tensor | None,
    key_coord: Tensor | None,
    value: Tensor,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    doc_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """
    Computes the formula with the whole matrix of scores. It needs O(B H T^2) memory, runs on any device and in any
    floating dtype, and autograd differentiates it.

    Arguments and result are topological_attention's. Sums run in float32, or in float64 where an argument is float64.
    """
    dtype = compute_dtype(query_coord, key_coord, value, log_decay, key_bias)
    B, T, kv_heads, _ = value.shape
    heads = query_heads(query_coord, value, log_decay)
    by_head = lambda x: x.repeat_interleave(heads // kv_heads, 2).to(dtype).transpose(1, 2)

    # the scores of all pairs (B, H, T, T)
    scores = torch.zeros(B, heads, T, T, dtype=dtype, device=value.device)
    if query_coord is not None:
        scores = scores - (query_coord.to(dtype).transpose(1, 2)[..., :, None] - by_head(key_coord)[..., None, :]).abs()
    if log_decay is not None:
        total = log_decay.double().cumsum(1).transpose(1, 2)  # float64: differences of long sums
        scores = scores + (total[..., :, None] - total[..., None, :]).to(dtype)
    if key_bias is not None:
        scores = scores + by_head(key_bias)[..., None, :]

    # the pairs that exist
    index = torch.arange(T, device=value.device)
    allowed = index <= index[:, None]
    if window is not None:
        allowed = allowed & (index > index[:, None] - window)
    if doc_start is not None:
        allowed = allowed & (index >= doc_start[:, None, :, None])

    # weights and sums
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ by_head(value)).transpose(1, 2).to(value.dtype)
