"""
Splanifold, backend "triton": the weights of a token's matrices, which both of its algorithms take, and the sizes and
matrices that their host functions share.

    t = mean_k u_k     delta = u - t     Sigma = K t     alpha = Sigma / (Sigma^2 + eps^2)     u = (1 + 2E) r - E
    s = 1 / sqrt(1 + (|delta| / delta_max)^2)
    Phi = sum over nodes i of h_i P_i + h'_i mean_k P'_i + (s h_i E_i + s h'_i E'_i + alpha h'_i P'_i) delta

with h_i(t) and h'_i(t) the cubic Hermite weights of node i's value and tangent, 0 unless the node bounds t's segment:
per token and group one number c_m a matrix. With two nodes and no warp, with beta = Sigma^2 / (Sigma^2 + eps^2),
alpha h10 = beta / K (h00 - 2 h10) and alpha h11 = beta / K (h11 - h10), so that six matrices are four,
    A00 = E0 + P0' / K     A01 = E1     A10 = E0' - (2 P0' + P1') / K     A11 = E1' + P1' / K
and (beta - 1) / K [(t - 1)^2 P0' + t (t - 1) P1'] delta, which only tiles compute where a token's 1 - beta, or its
effect (1 - beta) |t - 1| / |t| on the derivative in t, is above 2^-13 for bfloat16, 2^-16 for float16 (1/32 of a unit
roundoff, relative to the terms in P') and 2^-27 for float32 (1/8).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import jit, tl

# ---- Triton functions -------------------------------------------------------

# which matrices share a deviation tile
FOUR, CORRECTION, NODE, SPINE = (tl.constexpr(kind) for kind in range(4))


@jit
def first_node(b_t, S: tl.constexpr):
    """Returns the node at which t's segment begins."""
    return tl.minimum(tl.maximum(tl.floor(b_t * (S - 1)), 0.0), S - 2.0).to(tl.int32)


@jit
def basis(b_t, node, tangent, S: tl.constexpr):
    """
    Returns the weight of a node's value, or where `tangent` of its tangent, at t, and its derivative in t: 0 for nodes
    that do not bound t's segment.
    """
    # the segment
    b_segment = first_node(b_t, S).to(tl.float32)
    b_tau = b_t * (S - 1) - b_segment
    b_place = node - b_segment
    first, second = b_place == 0.0, b_place == 1.0

    # of its first node and of its second
    b_rest = b_tau - 1.0
    b_rise, b_slope = b_tau * b_tau * (3.0 - 2.0 * b_tau), -6.0 * b_tau * b_rest
    b_value = tl.where(tangent, tl.where(first, b_tau * b_rest * b_rest, b_tau * b_tau * b_rest),
                       tl.where(first, 1.0 - b_rise, b_rise))
    b_derivative = tl.where(tangent, tl.where(first, b_rest * (3.0 * b_tau - 1.0), b_tau * (3.0 * b_tau - 2.0)),
                            tl.where(first, -b_slope, b_slope))
    return tl.where(first | second, b_value, 0.0), tl.where(first | second, b_derivative * (S - 1), 0.0)


@jit
def coefficients(b_t, b_s, m, node, eps2, K: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr):
    """Returns c_m, dc_m / dt and dc_m / ds of matrix m of a kind (for NODE, of that node; its fourth is none)."""
    if KIND == FOUR:
        b_c, b_ct = basis(b_t, m % 2, m >= 2, 2)
        return b_c, b_ct, b_c
    else:
        b_sigma = b_t * K
        b_inverse = 1.0 / (b_sigma * b_sigma + eps2)
        b_alpha = b_sigma * b_inverse
        if KIND == CORRECTION:
            # its factors are (beta - 1) / K and, by matrix, (t - 1)^2 or t (t - 1)
            b_factor, b_factor_t = -(eps2 * b_inverse) / K, 2.0 * (eps2 * b_inverse) * b_alpha
            b_rest = b_t - 1.0
            b_p, b_pt = tl.where(m == 0, b_rest, b_t) * b_rest, tl.where(m == 0, 2.0 * b_rest, 2.0 * b_t - 1.0)
            b_c = b_factor * b_p
            return b_c, b_factor_t * b_p + b_factor * b_pt, b_c
        else:
            b_alpha_t = K * ((eps2 - b_sigma * b_sigma) * b_inverse) * b_inverse
            b_h, b_ht = basis(b_t, node, m >= 1, S)
            b_h, b_ht = tl.where(m < 3, b_h, 0.0), tl.where(m < 3, b_ht, 0.0)
            b_c = tl.where(m < 2, b_s, b_alpha) * b_h
            b_ct = tl.where(m < 2, b_s * b_ht, b_alpha * b_ht + b_alpha_t * b_h)
            return b_c, b_ct, tl.where(m < 2, b_h, 0.0)


@jit
def uncorrected(b_t, eps2, threshold, K: tl.constexpr):
    """
    Returns 1 where four matrices are not enough: where 1 - beta, or its share of the derivative in t,
    (1 - beta) |t - 1| / |t|, is above the threshold.
    """
    b_sigma = b_t * K
    b_missing = eps2 / (b_sigma * b_sigma + eps2)
    return (b_missing * (tl.abs(b_t) + tl.abs(b_t - 1.0)) > threshold * tl.abs(b_t)).to(tl.int32)


# ---- Host functions ---------------------------------------------------------

# By the dtype of r: what 1 - beta, or its effect, must be above to be computed, see the head of the file.
THRESHOLD = {torch.bfloat16: 2.0 ** -13, torch.float16: 2.0 ** -16, torch.float32: 2.0 ** -27}


def power(size: int, least: int = 1) -> int:
    """Returns the smallest power of two that is size and `least` or more."""
    return max(least, 1 << (size - 1).bit_length())


class Layout(NamedTuple):
    """Sizes as the kernels have them."""
    G: int          # groups
    K: int          # coordinates of each
    N: int          # outputs of each
    S: int          # nodes
    SP: int         # nodes, rounded up to a power of two
    J: int          # groups whose channels a product contracts: G for "sum", 1 for "concat"
    KP: int         # channels of a group in the stacked matrices: K, or PACKED K rounded up to a power of two
    PACKED: bool    # several groups share a tile of channels
    WARP: bool      # delta_max bends deviations


def layout_of(r: Tensor, points: Tensor, delta_max: float, mix: str) -> Layout:
    """Returns the sizes for r (M, G, K) and points (G, S, n)."""
    (_, G, K), (_, S, n) = r.shape, points.shape
    packed = mix == "sum" and G > 1 and K <= 8
    return Layout(
        G=G,
        K=K,
        N=n,
        S=S,
        SP=power(S),
        J=G if mix == "sum" else 1,
        KP=power(K) if packed else K,
        PACKED=packed,
        WARP=delta_max < math.inf,
    )


def needs_four(layout: Layout) -> bool:
    """Returns whether four matrices and corrections serve."""
    return layout.S == 2 and not layout.WARP


def combine(layout: Layout, points: Tensor, bases: Tensor, point_tangents: Tensor,
            base_tangents: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns, in float32, the spine (G, 2, S, n), of points and mean tangents, and the matrices (6 or 3 S, G, n, K).
    """
    points, bases, point_tangents, base_tangents = (x.float() for x in (points, bases, point_tangents, base_tangents))
    if needs_four(layout):
        (E0, E1), (P0, P1), (D0, D1) = (x.unbind(1) for x in (bases, point_tangents, base_tangents))
        matrices = torch.stack((E0 + P0 / layout.K, E1, D0 - (2 * P0 + P1) / layout.K, D1 + P1 / layout.K, P0, P1))
    else:
        matrices = torch.stack((bases, base_tangents, point_tangents), 2).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.stack((points, point_tangents.mean(-1)), 1), matrices


def control_gradients(layout: Layout, d_spine: Tensor, d_matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of the controls from those of combine's results, all in float32."""
    K = layout.K
    d_points, d_means = d_spine.unbind(1)
    if needs_four(layout):
        E0, E1, D0, D1, P0, P1 = d_matrices
        d_bases, d_base_tangents = torch.stack((E0, E1), 1), torch.stack((D0, D1), 1)
        d_point_tangents = torch.stack((P0 + (E0 - 2 * D0) / K, P1 + (D1 - D0) / K), 1)
    else:
        by_node = d_matrices.unflatten(0, (layout.S, 3)).permute(1, 2, 0, 3, 4)
        d_bases, d_base_tangents, d_point_tangents = by_node.unbind(0)
    return d_points, d_bases, d_point_tangents + d_means[..., None] / K, d_base_tangents


def scalars(r: Tensor, expansion: float, eps: float) -> tuple[float, float, float, float]:
    """Returns the kernels' scale, shift, eps2 and threshold."""
    return 1 + 2 * expansion, expansion, eps ** 2, THRESHOLD[r.dtype]
