"""
Splanifold: a cubic Hermite curve in t with directions off the curve, a map of K control coordinates to N numbers.

    u = (1 + 2E) r - E     Sigma = sum_k u_k     t = Sigma / K     delta = u - t     s = 1 / sqrt(1 + (|delta| /
                                                                                     delta_max)^2)
    w = (Sigma u + eps^2 / K) / (Sigma^2 + eps^2) = alpha delta + 1 / K     alpha = Sigma / (Sigma^2 + eps^2)
    Phi = H(P_j, P_j+1, P'_j w, P'_j+1 w; tau) + H(E_j, E_j+1, E'_j, E'_j+1; tau) s delta
    H(A, B, A', B'; tau) = h00 A + h01 B + h10 A' + h11 B'     h00 = 2 tau^3 - 3 tau^2 + 1, h01 = 1 - h00, h10 = tau
                                                               (tau - 1)^2, h11 = tau^2 (tau - 1)

r (M, G, K): G splanifolds side by side. A splanifold of S nodes has S - 1 segments of equal length in t; j = floor(t (S
- 1)), kept in 0 .. S - 2, is the segment and tau = t (S - 1) - j the place in it. Neighbouring segments share a node
and its tangents: the map is C1 in t. Outside [0, 1] the first and the last cubic go on.

Two nodes meet a token, so that a token of a splanifold is six matrices times delta: h E, h E' with s and h P' with
alpha, and no more than four where alpha h is one of the h's combinations (_Chunk). With R matrices, R = 4 or 6, e bytes
a number, G N outputs (or their sum, N), for one token (counted):
    forward    2 R G K N FLOPs       e (G K + outputs) bytes, once for all tokens the controls
    backward   4 R G K N             e (2 G K + outputs), and the controls and their gradients
    kept for the backward pass: r and the controls

The PyTorch forms are here; the fused kernels are splanifold_triton.py.

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034, github.com/curvedinf/k-splanifolds; segments that share
nodes: ours.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.splanifold_triton import INTERPRETED, splanifold_triton, triton


class SplanifoldControls(NamedTuple):
    """
    The learned numbers of G splanifolds of S nodes, K coordinates and n outputs each; N (2 + 6 K) of them where S = 2.
    All of one dtype.
    """
    points: Tensor          # P (G, S, n)
    bases: Tensor           # E (G, S, n, K)
    point_tangents: Tensor  # P' (G, S, n, K)
    base_tangents: Tensor   # E' (G, S, n, K)


def splanifold_reference(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf,
                         eps: float = 1e-3, mix: str = "sum") -> Tensor:
    """
    The formula term by term, as the paper has it: any device, any floating dtype, differentiable by autograd. Forms
    every node's products, (M, G, S, n).

    Arguments and result as splanifold's. Runs in the widest dtype among the arguments, float32 at least.
    """
    dtype = _compute_dtype(r, controls)
    points, bases, point_tangents, base_tangents = (x.to(dtype) for x in controls)
    (M, G, K), S = r.shape, points.shape[1]
    u = (1 + 2 * expansion) * r.to(dtype) - expansion
    total = u.sum(-1, keepdim=True)
    t = total / K
    delta = u - t
    warped = delta * torch.rsqrt(1 + delta.square().sum(-1, keepdim=True) / delta_max ** 2)
    w = (total * u + eps ** 2 / K) / (total.square() + eps ** 2)
    segment = (t.detach() * (S - 1)).floor().clamp(0, S - 2).nan_to_num(0.0)  # a NaN's result is NaN, as tau is
    tau = t * (S - 1) - segment
    # together they index as (M, G)
    row, group, node = torch.arange(M, device=r.device)[:, None], torch.arange(G, device=r.device), segment[...,
            0].long()
    curve = lambda first, second, first_tangent, second_tangent: ((2 * tau ** 3 - 3 * tau ** 2 + 1) * first
                                                                  + (3 * tau ** 2 - 2 * tau ** 3) * second + tau
                                                                  * (tau - 1) ** 2 * first_tangent + tau ** 2
                                                                  * (tau - 1) * second_tangent)
    times = lambda matrices, x: torch.einsum("gsnk,mgk->mgsn", matrices, x)
    ends = lambda products: (products[row, group, node], products[row, group, node + 1])
    result = curve(points[group, node], points[group, node + 1], *ends(times(point_tangents, w)))
    result = result + curve(*ends(times(bases, warped)), *ends(times(base_tangents, warped)))
    return (result.sum(1) if mix == "sum" else result.flatten(1)).to(r.dtype)


# ---- Host functions: PyTorch ------------------------------------------------
# A chunk of m tokens is a tensor (G, rows, m). In memory its tokens come last, so that scalars of a token multiply
# neighbours whatever K is, or first, as in r, which saves turning r over.

CHUNK = 1 << 21     # most numbers in a chunk's features: larger ones miss the cache, smaller ones cost calls
# least K for which tokens come first in memory (where the groups are summed), and for which segments are worked on one
# after another,
WIDE = 16
                    # each with its own tokens and two nodes; below it every token meets every node, mostly with weight
                    # 0
# most K for which the last deviation, minus the sum of the others, is left out: no matrix for K = 1, K - 1 of its K
# columns above
NARROW = 4


class _Chunk:
    """
    What the controls of G groups and S nodes are multiplied by: features (G, rows, m). With b = (1, the values' weights
    h of the nodes but the first, the tangents' weights of all), which is 0 for nodes off the token's segment: rows b_c
    delta~, then alpha h delta for every node's tangent, then b. Where S = 2, no warp bends delta and alpha Sigma =
    Sigma^2 / (Sigma^2 + eps^2) rounds to 1 for every token, alpha h10 is (h00 - 2 h10) / K and alpha h11 is (h11 - h10)
    / K to the last place: the second part is not needed ("four" matrices are left), as the first part's matrices can
    have the tangents added.
    """

    def __init__(self, r: Tensor, S: int, segments: int, segment: int | None, expansion: float, bend: float, eps: float,
                 dtype: torch.dtype, tokens_first: bool):
        """r (m, G, K). segment: the tokens', None if they differ. bend: 1 / delta_max."""
        (m, G, K), self.S, self.segments, self.bend, self.stretch = r.shape, S, segments, bend, 1 + 2 * expansion
        if tokens_first:
            r = r.to(dtype).permute(1, 2, 0)
        else:
            r = torch.empty(G * K, m, dtype=dtype, device=r.device).copy_(r.reshape(m, G * K).t()).view(G, K, m)
        mean = r.mean(1)
        t = self.stretch * mean - expansion
        total = K * t
        square = total.square()
        inverse = square + eps ** 2
        self.four = segments == 1 and not bend and torch.equal(square, inverse)
        self.inverse = inverse.reciprocal_()
        self.alpha = total * self.inverse
        if segment is None:
            self.node = (t * segments).floor_().clamp_(0, segments - 1).nan_to_num_(0.0)
        self.tau = (t * segments).sub_(self.node if segment is None else segment)

        width = _width(K)
        rows = _rows(S, width, self.four)
        stride = (rows, 1, G * _stride(G, rows)) if tokens_first else (rows * m, m, 1)
        self.features = torch.empty_strided((G, rows, m), stride, dtype=dtype, device=r.device)
        curve, tangents, spine = _parts(self.features, S, width, self.four)
        self.delta = torch.sub(r, mean[:, None], out=curve[:, 0] if width == K and not bend else None)
        if expansion:
            self.delta.mul_(self.stretch)
        kept = self.delta[:, :width]
        if bend:
            self.warp = torch.linalg.vector_norm(self.delta, dim=1).mul_(bend).square_().add_(1).rsqrt_()
            torch.mul(kept, self.warp[:, None], out=curve[:, 0])
        elif width < K:
            curve[:, 0] = kept
        self.basis = self.by_node(self.hermite())
        self.basis[:, 0] = 1
        for c in range(1, 2 * S):
            torch.mul(curve[:, 0], self.basis[:, c, None], out=curve[:, c])
        for c in range(tangents.shape[1]):
            torch.mul(kept, (self.alpha * self.basis[:, S + c])[:, None], out=tangents[:, c])
        spine.copy_(self.basis)

    def hermite(self) -> Tensor:
        """h00, h01, h10, h11: (G, 4, m)"""
        tau = self.tau
        rest = 1 - tau
        square, rest_square = tau.square(), rest.square()
        return torch.stack([rest_square * (1 + 2 * tau), square * (3 - 2 * tau), tau * rest_square, -square * rest], 1)

    def slopes(self) -> Tensor:
        """Their derivatives by tau."""
        tau = self.tau
        last = 6 * tau * (1 - tau)
        return torch.stack([-last, last, (3 * tau - 1) * (tau - 1), (3 * tau - 2) * tau], 1)

    def by_node(self, ends: Tensor) -> Tensor:
        """From weights of a segment's ends (G, 4, m) to weights of all nodes (G, 2 S, m), the values' first."""
        if self.S == 2:
            return ends
        G, _, m = ends.shape
        table, node = ends.new_zeros(G, 2, self.S, m), self.node[:, None].long()
        for i in (0, 1):
            table[:, i].scatter_(1, node, ends[:, 2 * i, None]).scatter_(1, node + 1, ends[:, 2 * i + 1, None])
        return table.flatten(1, 2)

    def backward(self, dfeatures: Tensor) -> Tensor:
        """dr (G, K, m) from the features' gradient, which is overwritten."""
        S, K, basis, slopes = self.S, self.delta.shape[1], self.basis, self.by_node(self.slopes())
        width = _width(K)
        kept, warped = self.delta[:, :width], self.features[:, :width]
        dcurve, dtangents, dspine = _parts(dfeatures, S, width, self.four)
        ddelta = _combined(basis[:, 1:], dcurve[:, 1:], dcurve[:, 0])
        dtau = _inner(_combined(slopes[:, 1:], dcurve[:, 1:]), warped) + (slopes[:, 1:] * dspine[:, 1:]).sum(1)
        if self.bend:
            dwarp = _inner(ddelta.clone(), kept)
            ddelta.mul_(self.warp[:, None])
        dtotal = dtau * (self.segments / K)
        if not self.four:
            by_alpha = _combined(basis[:, S:], dtangents)
            dtotal.addcmul_(self.alpha * (self.segments / K), _inner(_combined(slopes[:, S:], dtangents), kept))
            ddelta.addcmul_(by_alpha, self.alpha[:, None])
            dtotal.addcmul_(_inner(by_alpha, kept), self.inverse - 2 * self.alpha.square())
        ddelta = ddelta if width == K else F.pad(ddelta, (0, 0, 0, 1))
        if self.bend:
            ddelta.addcmul_(self.delta, (dwarp * self.warp ** 3 * -self.bend ** 2)[:, None])
        ddelta.add_(dtotal.sub_(ddelta.mean(1))[:, None])
        return ddelta.mul_(self.stretch) if self.stretch != 1 else ddelta


def _compute_dtype(r: Tensor, controls: SplanifoldControls) -> torch.dtype:
    return torch.promote_types(torch.promote_types(r.dtype, controls.points.dtype), torch.float32)


def _width(K: int) -> int:
    """Deviations that meet matrices."""
    return K - 1 if K <= NARROW else K


def _rows(S: int, width: int, four: bool) -> int:
    return (2 if four else 3) * S * width + 2 * S


def _stride(G: int, rows: int) -> int:
    """
    Numbers from a token to the next where tokens come first: vectors that begin at multiples of 64 bytes are quicker to
    write.
    """
    return -(-rows // 16) * 16 if G == 1 else rows


def _parts(x: Tensor, S: int, width: int, four: bool) -> tuple[Tensor, Tensor, Tensor]:
    """
    Views of (G, rows, x): (G, 2 S, width, x); for alpha's part (G, S, width, x), with `four` (G, 0, width, x); (G, 2 S,
    x) for the spine.
    """
    matrices = x[:, :-2 * S].unflatten(1, ((2 if four else 3) * S, width))
    return matrices[:, :2 * S], matrices[:, 2 * S:], x[:, -2 * S:]


def _combined(weights: Tensor, x: Tensor, first: Tensor | None = None) -> Tensor:
    """first + sum_c weights (G, c, m) x (G, c, K, m)"""
    weights = weights[:, :, None]
    result = x[:, 0] * weights[:, 0] if first is None else torch.addcmul(first, x[:, 0], weights[:, 0])
    for c in range(1, x.shape[1]):
        result.addcmul_(x[:, c], weights[:, c])
    return result


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """sum_k x y, (G, K, m) to (G, m), in x's memory."""
    return x.mul_(y).sum(1)


def _stack(controls: SplanifoldControls, four: bool, mix: str, dtype: torch.dtype) -> Tensor:
    """What features are multiplied by, (G, rows, n); an output's numbers are neighbours in memory."""
    (G, S, n, K), device = controls.bases.shape, controls.bases.device
    bases, tangents, base_tangents = (x.to(dtype) if _width(K) == K else x[..., :-1].to(dtype) - x[..., -1:]
                                      for x in controls[1:])
    shape, order = ((n, G), (1, 2, 0)) if mix == "sum" else ((G, n), (0, 2, 1))
    stack = torch.empty(*shape, _rows(S, _width(K), four), dtype=dtype, device=device).permute(order)
    curve, matrices, spine = _parts(stack, S, _width(K), four)
    curve, matrices = curve.mT, matrices.mT
    curve[:, :S], curve[:, S:], spine[:, :S], spine[:,
                                                    S:] = bases, base_tangents, controls.points, controls.point_tangents.mean(
        -1, dtype=dtype)
    if four:
        first, last = (tangents / K).unbind(1)
        curve[:, 0] += first
        curve[:, 2] -= 2 * first + last
        curve[:, 3] += last
    else:
        matrices.copy_(tangents)
    for values in (curve, spine):
        values[:, 1:S] -= values[:, :1]
    return stack


def _unstack(dstack: Tensor, four: bool, S: int, K: int) -> list[Tensor]:
    """The controls' gradients from the stack's, which is overwritten."""
    curve, tangents, spine = _parts(dstack, S, _width(K), four)
    curve, tangents = curve.mT, tangents.mT
    for values in (curve, spine):
        values[:, 0] -= values[:, 1:S].sum(1)
    if four:
        tangents = torch.stack([curve[:, 0] - 2 * curve[:, 2], curve[:, 3] - curve[:, 2]], 1) / K
    matrices = curve[:, :S], tangents, curve[:, S:]
    dbases, dtangents, dbase_tangents = matrices if _width(K) == K else (torch.cat([x, -x.sum(-1, keepdim=True)], -1)
                                                                         for x in matrices)
    return [spine[:, :S], dbases, dtangents + spine[:, S:, :, None] / K, dbase_tangents]


def _by_segment(S: int, K: int) -> bool:
    """Whether each segment's tokens are worked on by themselves, group by group."""
    return S > 2 and K >= WIDE


def _walk(r: Tensor, S: int, expansion: float, bend: float, eps: float, mix: str, dtype: torch.dtype):
    """
    Chunk by chunk: (groups, nodes, tokens, _Chunk). A chunk has all groups and nodes and a slice of the tokens, or one
    group, one segment's nodes and tokens.
    """
    M, G, K = r.shape
    pieces = [(slice(0, G), slice(0, S), None, M)]
    if _by_segment(S, K):
        segments = (((1 + 2 * expansion) * r.to(dtype).mean(-1) - expansion) * (S - 1)).floor_().clamp_(0,
                S - 2).nan_to_num_(0.0)
        own = [(g, j, (segments[:, g] == j).nonzero()[:, 0]) for g in range(G) for j in range(S - 1)]
        pieces = [(slice(g, g + 1), slice(j, j + 2), tokens, len(tokens)) for g, j, tokens in own if len(tokens)]
    for groups, nodes, tokens, count in pieces:
        own_groups, own_nodes, segment = groups.stop - groups.start, nodes.stop - nodes.start, None if tokens is None else nodes.start
        size = -(-count // -(-count * own_groups * _rows(own_nodes, _width(K), False) // CHUNK))
        tokens_first = K >= WIDE and (own_groups == 1 or mix == "sum")
        for first in range(0, count, size):
            index = slice(first, first + size) if tokens is None else tokens[first:first + size]
            yield groups, nodes, index, _Chunk(r[index, groups], own_nodes, S - 1, segment, expansion, bend, eps, dtype,
                                               tokens_first)


class _Stacks:
    """Each piece's stack, and its gradient."""

    def __init__(self, controls: SplanifoldControls, mix: str, dtype: torch.dtype):
        self.controls, self.mix, self.dtype, self.stacks, self.gradients = controls, mix, dtype, {}, {}

    def __call__(self, groups: slice, nodes: slice, four: bool) -> Tensor:
        key = groups.start, groups.stop, nodes.start, nodes.stop, four
        if key not in self.stacks:
            self.stacks[key] = _stack(SplanifoldControls(*(x[groups, nodes] for x in self.controls)), four, self.mix,
                                      self.dtype)
        return self.stacks[key]

    def gradient(self, groups: slice, nodes: slice, four: bool) -> Tensor:
        key = groups.start, groups.stop, nodes.start, nodes.stop, four
        if key not in self.gradients:
            self.gradients[key] = torch.zeros_like(self(groups, nodes, four))
        return self.gradients[key]

    def control_gradients(self) -> list[Tensor]:
        totals = [torch.zeros(x.shape, dtype=self.dtype, device=x.device) for x in self.controls]
        for (first_group, last_group, first_node, last_node, four), gradient in self.gradients.items():
            for total, x in zip(totals, _unstack(gradient, four, last_node - first_node,
                                                 self.controls.bases.shape[-1])):
                total[first_group:last_group, first_node:last_node] += x
        return [total.to(x.dtype) for total, x in zip(totals, self.controls)]


def _put(x: Tensor, index: slice | Tensor, groups: slice, rows: Tensor):
    """
    rows (m, groups times X) to their places in x (M, G, X). A slice has all groups: two dimensions, which PyTorch turns
    over by blocks.
    """
    if isinstance(index, slice):
        x.flatten(1)[index].copy_(rows)
    else:
        x[index, groups] = rows.unflatten(1, (-1, x.shape[2])).to(x.dtype)


def _chunked_forward(r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float,
                     mix: str) -> Tensor:
    dtype = _compute_dtype(r, controls)
    M, (G, S, n), stacks = len(r), controls.points.shape, _Stacks(controls, mix, dtype)
    empty = torch.zeros if _by_segment(S, r.shape[2]) else torch.empty
    out = empty(M, n if mix == "sum" else G * n, dtype=dtype, device=r.device)
    for groups, nodes, index, chunk in _walk(r, S, expansion, bend, eps, mix, dtype):
        stack, features = stacks(groups, nodes, chunk.four), chunk.features
        if mix == "concat":
            _put(out.view(M, G, n), index, groups, (stack.mT @ features).flatten(0, 1).t())
        elif isinstance(index, slice):
            torch.mm(features.flatten(0, 1).t(), stack.flatten(0, 1), out=out[index])
        else:
            out.index_add_(0, index, features.flatten(0, 1).t() @ stack.flatten(0, 1))
    return out.to(r.dtype)


def _chunked_backward(grad: Tensor, r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float,
                      mix: str, r_grad: bool, control_grads: bool) -> list[Tensor]:
    dtype = _compute_dtype(r, controls)
    M, (G, S, n), stacks = len(r), controls.points.shape, _Stacks(controls, mix, dtype)
    dr, *dcontrols = _empty_gradients(r, *controls, r_grad, control_grads)
    for groups, nodes, index, chunk in _walk(r, S, expansion, bend, eps, mix, dtype):
        stack, features = stacks(groups, nodes, chunk.four), chunk.features
        dstack = stacks.gradient(groups, nodes, chunk.four) if control_grads else None
        if mix == "sum":
            g = grad[index].to(dtype)
            if control_grads:
                dstack.flatten(0, 1).addmm_(features.flatten(0, 1), g)
        else:
            g = grad.view(M, G, n)[index, groups].to(dtype).flatten(1).t().contiguous().unflatten(0, (-1, n))
            if control_grads:
                dstack.mT.baddbmm_(g, features.mT)
        if r_grad:
            dfeatures = torch.empty_strided(features.shape, features.stride(), dtype=dtype, device=r.device)
            if mix == "sum":
                torch.mm(stack.flatten(0, 1), g.t(), out=dfeatures.flatten(0, 1))
            else:
                torch.bmm(stack, g, out=dfeatures)
            _put(dr, index, groups, chunk.backward(dfeatures).flatten(0, 1).t())
    return [dr, *(stacks.control_gradients() if control_grads else dcontrols)]


def _empty_gradients(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                     r_grad: bool, control_grads: bool) -> list[Tensor]:
    """Room for the gradients, contiguous; none for those that are not asked for."""
    wanted = ((r, r_grad), *((x, control_grads) for x in (points, bases, point_tangents, base_tangents)))
    return [torch.empty(x.shape if own else 0, dtype=x.dtype, device=x.device) for x, own in wanted]


# ---- Registration -----------------------------------------------------------

@torch.library.custom_op("knotgpt::splanifold", mutates_args=())
def _forward_op(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                expansion: float, bend: float, eps: float, mix: str) -> Tensor:
    return _chunked_forward(r, SplanifoldControls(points, bases, point_tangents, base_tangents), expansion, bend, eps,
                            mix)


@_forward_op.register_fake
def _(r, points, bases, point_tangents, base_tangents, expansion, bend, eps, mix):
    return r.new_empty(r.shape[0], points.shape[-1] * (1 if mix == "sum" else len(points)))


@torch.library.custom_op("knotgpt::splanifold_backward", mutates_args=())
def _backward_op(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                 expansion: float, bend: float, eps: float, mix: str, r_grad: bool,
                 control_grads: bool) -> list[Tensor]:
    return _chunked_backward(grad, r, SplanifoldControls(points, bases, point_tangents, base_tangents), expansion, bend,
                             eps, mix, r_grad, control_grads)


@_backward_op.register_fake
def _(grad, r, points, bases, point_tangents, base_tangents, expansion, bend, eps, mix, r_grad, control_grads):
    return _empty_gradients(r, points, bases, point_tangents, base_tangents, r_grad, control_grads)


def _save(ctx, inputs, output):
    *tensors, expansion, bend, eps, mix = inputs
    ctx.options = expansion, bend, eps, mix
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    wanted = ctx.needs_input_grad[:5]
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.options, wanted[0], any(wanted[1:]))
    return *(x if own else None for x, own in zip(gradients, wanted)), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.splanifold)
def _forward_flops(r, points, bases, point_tangents, base_tangents, expansion, bend, *_, out_shape=None, **__) -> int:
    """
    Of the products. From K = WIDE on tokens meet two nodes; without a warp all of them are taken to need four matrices,
    which is likely for K >= 32.
    """
    (M, G, K), (_, S, n) = r, points
    return 2 * M * G * n * _rows(2 if K >= WIDE else S, _width(K), S == 2 and not bend and K >= WIDE)


@register_flop_formula(torch.ops.knotgpt.splanifold_backward)
def _backward_flops(grad, *arguments, out_shape=None, **__) -> int:
    return sum(arguments[-2:]) * _forward_flops(*arguments)


# ---- Public function --------------------------------------------------------

def splanifold_chunked(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf,
                       eps: float = 1e-3, mix: str = "sum") -> Tensor:
    """
    In PyTorch, chunk by chunk: features of all tokens are never in memory, and only r and the controls are kept for the
    backward pass.
    """
    return _forward_op(r, *controls, float(expansion), 1 / delta_max, float(eps), mix)


BACKENDS = dict(reference=splanifold_reference, chunked=splanifold_chunked, triton=splanifold_triton)
MIXES = ("sum", "concat")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TINY = 64  # M G up to which "auto" takes the reference on a CPU: it calls fewer operations


def _chosen(r: Tensor, controls: SplanifoldControls) -> str:
    """The backend of "auto"."""
    if r.is_cuda and triton is not None and torch.float64 not in (r.dtype, controls.points.dtype):
        return "triton"
    return "reference" if not r.is_cuda and r.shape[0] * r.shape[1] <= TINY else "chunked"


def splanifold(r: Tensor, controls: SplanifoldControls, *, expansion: float = 0.0, delta_max: float = math.inf,
               eps: float = 1e-3, mix: str = "sum", backend: str = "auto") -> Tensor:
    """
    Phi for every token, of G splanifolds that are added or stand side by side.

    r (..., G, K)    control coordinates, meant for [0, 1]; outside, the first and the last cubic go on
    controls         SplanifoldControls, points (G, S, n), the others (G, S, n, K), S >= 2; zeros give zeros
    expansion        E >= 0: u = (1 + 2E) r - E, so that [0, 1] reaches E beyond both ends of the curve
    delta_max        > 0: the length that deviations from the diagonal stay below; math.inf: no warp
    eps              >= 1e-15: smooths the tangents' weights w around Sigma = 0
    mix              "sum": (..., n); "concat": (..., G n), the first splanifold's n first
    backend          "reference": eager PyTorch, forms every node's products; "chunked": PyTorch, a chunk of tokens at a
                     time; "triton": fused, for CUDA; "auto": triton on CUDA (chunked for float64), else chunked, or the
                     reference for a few tokens

    Returns r's dtype. Tensors may be bfloat16, float16, float32 or float64, the controls all of one. "reference" and
    "chunked" compute in float32, or in float64 where an argument has it; "chunked" keeps r and the controls for the
    backward pass and nothing else. Gradients for r and all controls, once. All backends work under
    torch.compile(fullgraph=True). ValueError that names the argument for a wrong type, shape, dtype, device or option.
    """
    _check(r, controls, expansion, delta_max, eps, mix, backend)
    tokens, controls = r if r.dim() == 3 else r.flatten(0, -3), SplanifoldControls(*controls)
    out = BACKENDS[_chosen(tokens, controls) if backend == "auto" else backend](tokens, controls, expansion, delta_max,
                                                                                eps, mix)
    return out if r.dim() == 3 else out.unflatten(0, r.shape[:-2])


def _check(r, controls, expansion, delta_max, eps, mix, backend):
    if not isinstance(r, Tensor) or r.dim() < 3 or min(r.shape) < 1:
        raise ValueError(
            f"r must be a tensor (..., G, K) of at least three dimensions, none of them empty; got {_describe(r)}")
    if not isinstance(controls, (tuple, list)) or len(controls) != 4 or not all(isinstance(x, Tensor)
                                                                                for x in controls):
        raise ValueError(f"controls must be a SplanifoldControls of four tensors; got {_describe(controls)}")
    (G, K), points = r.shape[-2:], controls[0]
    if points.dim() != 3 or points.shape[0] != G or points.shape[1] < 2 or points.shape[2] < 1:
        raise ValueError(
            f"controls.points must be (G, S, n) with G = {G} as in r and S >= 2 nodes; got {_describe(points)}")
    for name, x in zip(SplanifoldControls._fields, controls):
        shape = points.shape if name == "points" else (*points.shape, K)
        if x.shape != shape:
            raise ValueError(
                f"controls.{name} must be (G, S, n, K) = {tuple(shape)} beside controls.points and r's K; got {_describe(x)}")
        if x.device != r.device:
            raise ValueError(f"controls.{name} must be on r's device {r.device}; got {x.device}")
        if x.dtype != points.dtype:
            raise ValueError(f"controls.{name} must be {points.dtype} as controls.points is; got {x.dtype}")
    for name, x in (("r", r), ("controls", points)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; got {x.dtype}")
    if not 0 <= expansion < math.inf:
        raise ValueError(f"expansion must be at least 0 and finite; got {expansion}")
    if not delta_max > 0:
        raise ValueError(f"delta_max must be above 0, math.inf for no warp; got {delta_max}")
    if not 1e-15 <= eps < math.inf:
        raise ValueError(f"eps must be at least 1e-15, whose square float32 can hold, and finite; got {eps}")
    if mix not in MIXES:
        raise ValueError(f"mix must be {' or '.join(MIXES)}; got {mix!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and (triton is None or not (r.is_cuda or INTERPRETED)):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors and Triton; got tensors on {r.device}: use 'chunked' or 'auto'")
    if backend == "triton" and torch.float64 in (r.dtype, points.dtype):
        raise ValueError("backend 'triton' has no float64; use 'chunked' or 'reference'")


def _describe(x) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
