"""
Causal convolution of every channel by itself over a few tokens, which stays in the document.

    y_t = sum over s < n with s <= t - doc_start_t of taps_{n-1-s} x_{t-s}        x, y (B, T, C), taps (n, C), the last for the token itself

Plain PyTorch, its own reference. Work for a token and channel: 2 n FLOPs; bytes: x read and y written once where torch.compile fuses
the sum, which on two cores is 6 to 10 times as fast as eager forward, and 4 to 6 times with the backward pass (benchmarks/short_convolution.py).

Source: Fu et al., H3, 2022, arxiv.org/abs/2212.14052
"""

import torch.nn.functional as F
from torch import Tensor


def short_convolution(x: Tensor, taps: Tensor, positions: Tensor, padded: Tensor | None = None) -> Tensor:
    """
    x (B, T, C) and taps (n, C) floating, of one dtype; positions (B, T) int: each token's place in its document. padded (B, n - 1 + T, C): x with the n - 1
    inputs before it, where the row goes on from earlier tokens; None: zeros. Returns (B, T, C). Differentiable by autograd.
    """
    n, T = len(taps), x.shape[1]
    padded = F.pad(x, (0, 0, n - 1, 0)) if padded is None else padded
    y = x * taps[-1]
    for shift in range(1, n):
        y = y + padded[:, n - 1 - shift:n - 1 - shift + T] * taps[-1 - shift] * (positions >= shift)[..., None]
    return y
