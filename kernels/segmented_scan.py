"""
Scans along the last dimension that begin anew where a document does: running sums and maxima.

They serve other kernels, in plain PyTorch on any device; gradients are those kernels' affair.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def sums_after(x: Tensor) -> Tensor:
    """Returns the sum of what follows each element of the last dimension."""
    return F.pad(x[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def running(combine: Callable, x: Tensor, starts: Tensor | None, backward: bool = False) -> Tensor:
    """
    Returns the running combination (torch.add or torch.maximum) of the last dimension of x. It begins anew where
    `starts` (bool, x's shape or one that broadcasts to it) is true; None: only at the first element. With `backward` it
    runs from each position to the end.

    In documents it is made by doubling, so that a result has not even the rounding of another document in it.
    """
    if starts is None:
        return _scan(combine, x.flip(-1)).flip(-1) if backward else _scan(combine, x)
    if backward:
        ends = F.pad(starts[..., 1:], (0, 1), value=True)
        return running(combine, x.flip(-1), ends.flip(-1)).flip(-1)

    # each step takes in the result that ends `distance` before, if it belongs to the same document
    index = torch.arange(x.shape[-1], device=x.device)
    since = index - torch.where(starts, index, 0).cummax(-1).values
    neutral = 0 if combine is torch.add else -math.inf
    distance = 1
    while distance < x.shape[-1]:
        earlier = x.roll(distance, -1).masked_fill_(since < distance, neutral)
        x = combine(x, earlier)
        distance *= 2
    return x


def _scan(combine: Callable, x: Tensor) -> Tensor:
    """Returns the running combination of the last dimension of x, which begins at its first element only."""
    return x.cumsum(-1) if combine is torch.add else x.cummax(-1).values


def starts_of(doc: Tensor | None) -> Tensor | None:
    """Returns where a number differs from the one before it in the last dimension; None for None."""
    return None if doc is None else F.pad(doc[..., 1:] != doc[..., :-1], (1, 0), value=True)
