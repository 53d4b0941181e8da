"""
Scans along the last dimension that begin anew where a document does: running sums and maxima, and sums of rows with falling weights.

They are parts of other kernels, in plain PyTorch on any device; gradients are those kernels' own affair.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SCAN_BLOCK = 32             # most elements that a scan sums as a tile
TILES = 1 << 18             # elements of tiles that are made at a time, so that they stay in the cache


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


def segmented_scan(potential: Tensor, rows: Tensor, first: Tensor) -> Tensor:
    """
    out_r = sum over first_r <= t <= r of 2^(y_t - y_r) rows_t, for a potential y that rises wherever first allows. potential, first (R, n), rows (R, n, E).

    first_r is the start of the segment that holds r. Blocks of at most SCAN_BLOCK, 2^k of them, then a scan of their ends.
    """
    R, n, columns = rows.shape
    halvings = ((n - 1) // SCAN_BLOCK).bit_length()
    if not halvings:
        out, index = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.arange(n, device=rows.device)
        step = max(1, TILES // n ** 2)
        for lo in range(0, R, step):
            y = potential[lo:lo + step]
            exponent = (y[:, None, :] - y[:, :, None]).masked_fill_((index > index[:, None]) | (index < first[lo:lo + step, :, None]), -math.inf)
            torch.bmm(exponent.to(rows.dtype).exp2_(), rows[lo:lo + step], out=out[lo:lo + step])
        return out
    block, blocks = -(-n >> halvings), 1 << halvings
    padding, start = block * blocks - n, torch.arange(0, block * blocks, block, device=rows.device)[:, None]
    if padding:  # each a segment of its own
        potential, rows = F.pad(potential, (0, padding)), F.pad(rows, (0, 0, 0, padding))
        first = torch.cat((first, torch.arange(n, n + padding, device=rows.device).expand(R, -1)), 1)
    y, first = potential.reshape(R, blocks, block), first.reshape(R, blocks, block)
    out = segmented_scan(y.flatten(0, 1), rows.reshape(R * blocks, block, columns), (first - start).clamp_(min=0).flatten(0, 1)).view(R, blocks, block, columns)
    ends = segmented_scan(y[..., -1], out[:, :, -1], first[..., -1] // block)
    carried = (y[:, :-1, -1:] - y[:, 1:]).masked_fill_(first[:, 1:] >= start[1:], -math.inf).to(rows.dtype).exp2_()
    out[:, 1:].addcmul_(carried[..., None], ends[:, :-1, None])
    return out.view(R, n + padding, columns)[:, :n]
