"""
Splanifold: a cubic Hermite curve in t with directions off the curve, a map of K control coordinates to N numbers.

    u = (1 + 2E) r - E     Sigma = sum_k u_k     t = Sigma / K     delta = u - t     s = 1 / sqrt(1 + (|delta| / delta_max)^2)
    w = (Sigma u + eps^2 / K) / (Sigma^2 + eps^2) = alpha delta + 1 / K     alpha = Sigma / (Sigma^2 + eps^2)
    Phi = H(P_j, P_j+1, P'_j w, P'_j+1 w; tau) + H(E_j, E_j+1, E'_j, E'_j+1; tau) s delta
    H(A, B, A', B'; tau) = h00 A + h01 B + h10 A' + h11 B'     h00 = 2 tau^3 - 3 tau^2 + 1, h01 = 1 - h00, h10 = tau (tau - 1)^2, h11 = tau^2 (tau - 1)

r (M, G, K): G splanifolds side by side. A splanifold of S nodes has S - 1 segments of equal length in t; j = floor(t (S - 1)), kept in 0 .. S - 2, is the
segment and tau = t (S - 1) - j the place in it. Neighbouring segments share a node and its tangents: the map is C1 in t. Outside [0, 1] the first and the
last cubic go on.

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034, github.com/curvedinf/k-splanifolds; segments that share nodes: ours.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class SplanifoldControls(NamedTuple):
    """The learned numbers of G splanifolds of S nodes, K coordinates and n outputs each; N (2 + 6 K) of them where S = 2. All of one dtype."""
    points: Tensor          # P (G, S, n)
    bases: Tensor           # E (G, S, n, K)
    point_tangents: Tensor  # P' (G, S, n, K)
    base_tangents: Tensor   # E' (G, S, n, K)


def splanifold_reference(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf, eps: float = 1e-3, mix: str = "sum") -> Tensor:
    """
    The formula term by term, as the paper has it: any device, any floating dtype, differentiable by autograd. Forms every node's products, (M, G, S, n).

    Arguments and result as splanifold's. Runs in the widest dtype among the arguments, float32 at least.
    """
    dtype = torch.promote_types(torch.promote_types(r.dtype, controls.points.dtype), torch.float32)
    points, bases, point_tangents, base_tangents = (x.to(dtype) for x in controls)
    (M, G, K), S = r.shape, points.shape[1]
    u = (1 + 2 * expansion) * r.to(dtype) - expansion
    total = u.sum(-1, keepdim=True)
    t = total / K
    delta = u - t
    warped = delta * torch.rsqrt(1 + delta.square().sum(-1, keepdim=True) / delta_max ** 2)
    w = (total * u + eps ** 2 / K) / (total.square() + eps ** 2)
    segment = (t.detach() * (S - 1)).floor().clamp(0, S - 2)
    tau = t * (S - 1) - segment
    row, group, node = torch.arange(M, device=r.device)[:, None], torch.arange(G, device=r.device), segment[..., 0].long()  # together they index as (M, G)
    curve = lambda first, second, first_tangent, second_tangent: ((2 * tau ** 3 - 3 * tau ** 2 + 1) * first + (3 * tau ** 2 - 2 * tau ** 3) * second
                                                                 + tau * (tau - 1) ** 2 * first_tangent + tau ** 2 * (tau - 1) * second_tangent)
    times = lambda matrices, x: torch.einsum("gsnk,mgk->mgsn", matrices, x)
    ends = lambda products: (products[row, group, node], products[row, group, node + 1])
    result = curve(points[group, node], points[group, node + 1], *ends(times(point_tangents, w)))
    result = result + curve(*ends(times(bases, warped)), *ends(times(base_tangents, warped)))
    return (result.sum(1) if mix == "sum" else result.flatten(1)).to(r.dtype)
