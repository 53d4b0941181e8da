"""The formula of a splanifold in PyTorch, term by term, and what all backends take: the controls, the dtype of sums."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SplanifoldControls(NamedTuple):
    """
    The learned numbers of G splanifolds of S nodes, K coordinates and n outputs each, all of one dtype. Where S = 2, a
    splanifold has n (2 + 6 K) of them.
    """
    points: Tensor          # P (G, S, n)
    bases: Tensor           # E (G, S, n, K)
    point_tangents: Tensor  # P' (G, S, n, K)
    base_tangents: Tensor   # E' (G, S, n, K)


def compute_dtype(r: Tensor, controls: SplanifoldControls) -> torch.dtype:
    """Returns the dtype that PyTorch's backends compute in: the arguments' widest, float32 at least."""
    return torch.promote_types(torch.promote_types(r.dtype, controls.points.dtype), torch.float32)


def splanifold_reference(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf,
                         eps: float = 1e-3, mix: str = "sum") -> Tensor:
    """
    Returns splanifold's result by the formula, as the paper has it: on any device, in any floating dtype,
    differentiable by autograd. It forms every node's products, (M, G, S, n).
    """
    dtype = compute_dtype(r, controls)
    points, bases, point_tangents, base_tangents = (x.to(dtype) for x in controls)
    (M, G, K), S = r.shape, points.shape[1]

    # t, the deviation and its bend, the tangents' weights
    u = (1 + 2 * expansion) * r.to(dtype) - expansion
    total = u.sum(-1, keepdim=True)
    t = total / K
    delta = u - t
    warped = delta * torch.rsqrt(1 + delta.square().sum(-1, keepdim=True) / delta_max ** 2)
    w = (total * u + eps ** 2 / K) / (total.square() + eps ** 2)

    # the segment, and tau in it; a NaN's segment is the first, its result is NaN as tau is
    segment = (t.detach() * (S - 1)).floor().clamp(0, S - 2).nan_to_num(0.0)
    tau = t * (S - 1) - segment

    # the segment's two nodes: row, group and node index a table (M, G, S, ...) together
    row = torch.arange(M, device=r.device)[:, None]
    group = torch.arange(G, device=r.device)
    node = segment[..., 0].long()

    def interpolate(first: Tensor, second: Tensor, first_tangent: Tensor, second_tangent: Tensor) -> Tensor:
        return ((2 * tau ** 3 - 3 * tau ** 2 + 1) * first + (3 * tau ** 2 - 2 * tau ** 3) * second
                + tau * (tau - 1) ** 2 * first_tangent + tau ** 2 * (tau - 1) * second_tangent)

    def multiply(matrices: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the products of x with the matrices of the segment's nodes."""
        products = torch.einsum("gsnk,mgk->mgsn", matrices, x)
        return products[row, group, node], products[row, group, node + 1]

    # the curve, and the directions off it
    result = interpolate(points[group, node], points[group, node + 1], *multiply(point_tangents, w))
    result = result + interpolate(*multiply(bases, warped), *multiply(base_tangents, warped))
    return (result.sum(1) if mix == "sum" else result.flatten(1)).to(r.dtype)
