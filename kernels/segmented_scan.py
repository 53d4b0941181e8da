"""
Scans along the last dimension that begin anew where a document does: running sums and maxima.

They are parts of other kernels, in plain PyTorch on any device; gradients are those kernels' own affair.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sums_after(x: Tensor) -> Tensor:
    """The sum of what follows each element of the last dimension."""
    return F.pad(x[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def running(combine, x: Tensor, starts: Tensor | None, backward: bool = False) -> Tensor:
    """
    Running combination (torch.add or torch.maximum) of the last dimension of x, anew where starts (same shape or broadcast, bool) is true; backward: from each
    position to the end. None: no start but the first.

    In documents by doubling, so that a result has not even the rounding of another document in it.
    """
    if starts is None:
        scan = torch.cumsum if combine is torch.add else lambda x, dim: x.cummax(dim).values
        return scan(x.flip(-1), -1).flip(-1) if backward else scan(x, -1)
    if backward:
        return running(combine, x.flip(-1), F.pad(starts[..., 1:], (0, 1), value=True).flip(-1)).flip(-1)
    index, distance = torch.arange(x.shape[-1], device=x.device), 1
    since = index - torch.where(starts, index, 0).cummax(-1).values
    while distance < x.shape[-1]:
        earlier = x.roll(distance, -1).masked_fill_(since < distance, 0 if combine is torch.add else -math.inf)
        x, distance = combine(x, earlier), 2 * distance
    return x


def starts_of(doc: Tensor | None) -> Tensor | None:
    """Where a number differs from the one before it in the last dimension."""
    return None if doc is None else F.pad(doc[..., 1:] != doc[..., :-1], (1, 0), value=True)
