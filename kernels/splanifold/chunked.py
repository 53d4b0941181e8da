"""
Splanifold, backend "chunked": PyTorch's operations on a chunk of tokens at a time, on any device.

A chunk of m tokens is a tensor (G, rows, m). In memory its tokens come last, so that scalars of a token multiply
neighbours whatever K is, or first, as in r, which saves turning r over.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.splanifold.reference import SplanifoldControls, compute_dtype

CHUNK = 1 << 21     # most numbers in a chunk's features: larger ones miss the cache, smaller ones cost calls

# Least K for which tokens come first in memory (where the groups are summed), and for which segments are worked on one
# after another, each with its own tokens and two nodes. Below it every token meets every node, mostly with weight 0.
WIDE = 16

# Most K for which the last deviation, minus the sum of the others, is left out: no matrix for K = 1, K - 1 of its K
# columns above.
NARROW = 4


class _Chunk:
    """
    What the controls of G groups and S nodes are multiplied by: features (G, rows, m). With b = (1, the values' weights
    h of the nodes but the first, the tangents' weights of all), which is 0 for nodes off the token's segment: the rows
    are b_c delta~, then alpha h delta for every node's tangent, then b.

    Where S = 2, no warp bends delta and alpha Sigma = Sigma^2 / (Sigma^2 + eps^2) rounds to 1 for every token,
    alpha h10 is (h00 - 2 h10) / K and alpha h11 is (h11 - h10) / K to the last place. Then the second kind of rows is
    not needed ("four" matrices are left), as the matrices of the first can have the tangents added.
    """

    def __init__(self, r: Tensor, S: int, segments: int, segment: int | None, expansion: float, bend: float, eps: float,
                 dtype: torch.dtype, tokens_first: bool):
        """
        r (m, G, K). segments: of the splanifold. segment: that of all tokens, None if they differ. bend: 1 / delta_max.
        """
        m, G, K = r.shape
        self.S = S                          # nodes
        self.segments = segments
        self.bend = bend                    # 1 / delta_max, 0 for no warp
        self.stretch = 1 + 2 * expansion    # of r to u
        self.warp = None                    # (G, m): by which delta is bent, None for no warp
        self.node = None                    # (G, m): the first node of each token's segment, None where `segment` is it

        # t, Sigma, alpha, the segment and tau, each (G, m)
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

        # delta (G, K, m), and bent in the first row of the features
        width = _width(K)
        rows = _rows(S, width, self.four)
        stride = (rows, 1, G * _stride(G, rows)) if tokens_first else (rows * m, m, 1)
        self.features = torch.empty_strided((G, rows, m), stride, dtype=dtype, device=r.device)
        curve, tangents, spine = _split(self.features, S, width, self.four)
        self.delta = torch.sub(r, mean[:, None], out=curve[:, 0] if width == K and not bend else None)
        if expansion:
            self.delta.mul_(self.stretch)
        kept = self.delta[:, :width]
        if bend:
            self.warp = torch.linalg.vector_norm(self.delta, dim=1).mul_(bend).square_().add_(1).rsqrt_()
            torch.mul(kept, self.warp[:, None], out=curve[:, 0])
        elif width < K:
            curve[:, 0] = kept

        # b (G, 2 S, m), and the other rows of the features
        self.basis = self.by_node(self.hermite())
        self.basis[:, 0] = 1
        for c in range(1, 2 * S):
            torch.mul(curve[:, 0], self.basis[:, c, None], out=curve[:, c])
        for c in range(tangents.shape[1]):
            torch.mul(kept, (self.alpha * self.basis[:, S + c])[:, None], out=tangents[:, c])
        spine.copy_(self.basis)

    def hermite(self) -> Tensor:
        """Returns h00, h01, h10, h11: (G, 4, m)."""
        tau = self.tau
        rest = 1 - tau
        square, rest_square = tau.square(), rest.square()
        return torch.stack([rest_square * (1 + 2 * tau), square * (3 - 2 * tau), tau * rest_square, -square * rest], 1)

    def slopes(self) -> Tensor:
        """Returns their derivatives by tau."""
        tau = self.tau
        last = 6 * tau * (1 - tau)
        return torch.stack([-last, last, (3 * tau - 1) * (tau - 1), (3 * tau - 2) * tau], 1)

    def by_node(self, ends: Tensor) -> Tensor:
        """Makes weights of all nodes (G, 2 S, m), the values' first, of weights of a segment's ends (G, 4, m)."""
        if self.S == 2:
            return ends
        G, _, m = ends.shape
        table, node = ends.new_zeros(G, 2, self.S, m), self.node[:, None].long()
        for i in (0, 1):
            table[:, i].scatter_(1, node, ends[:, 2 * i, None]).scatter_(1, node + 1, ends[:, 2 * i + 1, None])
        return table.flatten(1, 2)

    def backward(self, dfeatures: Tensor) -> Tensor:
        """Returns dr (G, K, m) from the features' gradient, which is overwritten."""
        S, K, basis = self.S, self.delta.shape[1], self.basis
        slopes = self.by_node(self.slopes())
        width = _width(K)
        kept, warped = self.delta[:, :width], self.features[:, :width]

        # of the bent deviation, and of tau
        dcurve, dtangents, dspine = _split(dfeatures, S, width, self.four)
        ddelta = _combine(basis[:, 1:], dcurve[:, 1:], dcurve[:, 0])
        dtau = _inner(_combine(slopes[:, 1:], dcurve[:, 1:]), warped) + (slopes[:, 1:] * dspine[:, 1:]).sum(1)
        if self.bend:
            dwarp = _inner(ddelta.clone(), kept)
            ddelta.mul_(self.warp[:, None])

        # of Sigma, by tau and alpha, and of the deviation by alpha
        dtotal = dtau * (self.segments / K)
        if not self.four:
            by_alpha = _combine(basis[:, S:], dtangents)
            dtotal.addcmul_(self.alpha * (self.segments / K), _inner(_combine(slopes[:, S:], dtangents), kept))
            ddelta.addcmul_(by_alpha, self.alpha[:, None])
            dtotal.addcmul_(_inner(by_alpha, kept), self.inverse - 2 * self.alpha.square())

        # of the deviation by the bend, and of r
        if width < K:
            ddelta = F.pad(ddelta, (0, 0, 0, 1))
        if self.bend:
            ddelta.addcmul_(self.delta, (dwarp * self.warp ** 3 * -self.bend ** 2)[:, None])
        ddelta.add_(dtotal.sub_(ddelta.mean(1))[:, None])
        return ddelta.mul_(self.stretch) if self.stretch != 1 else ddelta


def _width(K: int) -> int:
    """Returns how many deviations meet matrices."""
    return K - 1 if K <= NARROW else K


def _rows(S: int, width: int, four: bool) -> int:
    """Returns how many features a token and group have."""
    return (2 if four else 3) * S * width + 2 * S


def _stride(G: int, rows: int) -> int:
    """
    Returns the numbers from a token to the next where tokens come first: vectors that begin at multiples of 64 bytes
    are quicker to write.
    """
    return -(-rows // 16) * 16 if G == 1 else rows


def _split(x: Tensor, S: int, width: int, four: bool) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns views of (G, rows, x): (G, 2 S, width, x) for the bent deviations; (G, S, width, x) for alpha's, with `four`
    (G, 0, width, x); (G, 2 S, x) for the spine.
    """
    matrices = x[:, :-2 * S].unflatten(1, ((2 if four else 3) * S, width))
    return matrices[:, :2 * S], matrices[:, 2 * S:], x[:, -2 * S:]


def _combine(weights: Tensor, x: Tensor, first: Tensor | None = None) -> Tensor:
    """Returns first + sum_c weights (G, c, m) x (G, c, K, m)."""
    weights = weights[:, :, None]
    result = x[:, 0] * weights[:, 0] if first is None else torch.addcmul(first, x[:, 0], weights[:, 0])
    for c in range(1, x.shape[1]):
        result.addcmul_(x[:, c], weights[:, c])
    return result


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Returns sum_k x y, (G, m) of (G, K, m), and overwrites x."""
    return x.mul_(y).sum(1)


def _stack(controls: SplanifoldControls, four: bool, mix: str, dtype: torch.dtype) -> Tensor:
    """Returns what features are multiplied by, (G, rows, n); an output's numbers are neighbours in memory."""
    G, S, n, K = controls.bases.shape
    width = _width(K)

    # the matrices of the deviations that are kept
    if width == K:
        bases, tangents, base_tangents = (x.to(dtype) for x in controls[1:])
    else:
        bases, tangents, base_tangents = (x[..., :-1].to(dtype) - x[..., -1:] for x in controls[1:])

    # room for them, side by side
    shape, order = ((n, G), (1, 2, 0)) if mix == "sum" else ((G, n), (0, 2, 1))
    stack = torch.empty(*shape, _rows(S, width, four), dtype=dtype, device=controls.bases.device).permute(order)
    curve, by_alpha, spine = _split(stack, S, width, four)
    curve, by_alpha = curve.mT, by_alpha.mT

    # their places
    curve[:, :S] = bases
    curve[:, S:] = base_tangents
    spine[:, :S] = controls.points
    spine[:, S:] = controls.point_tangents.mean(-1, dtype=dtype)
    if four:
        first, last = (tangents / K).unbind(1)
        curve[:, 0] += first
        curve[:, 2] -= 2 * first + last
        curve[:, 3] += last
    else:
        by_alpha.copy_(tangents)

    # the first node's value has weight 1, with the others' weights taken off
    for values in (curve, spine):
        values[:, 1:S] -= values[:, :1]
    return stack


def _unstack(dstack: Tensor, four: bool, S: int, K: int) -> list[Tensor]:
    """Returns the controls' gradients from the stack's, which is overwritten."""
    curve, tangents, spine = _split(dstack, S, _width(K), four)
    curve, tangents = curve.mT, tangents.mT
    for values in (curve, spine):
        values[:, 0] -= values[:, 1:S].sum(1)
    if four:
        tangents = torch.stack([curve[:, 0] - 2 * curve[:, 2], curve[:, 3] - curve[:, 2]], 1) / K
    matrices = [curve[:, :S], tangents, curve[:, S:]]
    if _width(K) < K:
        matrices = [torch.cat([x, -x.sum(-1, keepdim=True)], -1) for x in matrices]
    dbases, dtangents, dbase_tangents = matrices
    return [spine[:, :S], dbases, dtangents + spine[:, S:, :, None] / K, dbase_tangents]


def _by_segment(S: int, K: int) -> bool:
    """Returns whether each segment's tokens are worked on by themselves, group by group."""
    return S > 2 and K >= WIDE


def _walk(r: Tensor, S: int, expansion: float, bend: float, eps: float, mix: str,
          dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice | Tensor, _Chunk]]:
    """
    Yields chunk by chunk (groups, nodes, tokens, _Chunk). A chunk has all groups and nodes and a slice of the tokens,
    or one group, one segment's nodes and tokens.
    """
    M, G, K = r.shape

    # (groups, nodes, tokens, how many), None for all tokens
    batches = [(slice(0, G), slice(0, S), None, M)]
    if _by_segment(S, K):
        t = (1 + 2 * expansion) * r.to(dtype).mean(-1) - expansion
        segments = (t * (S - 1)).floor_().clamp_(0, S - 2).nan_to_num_(0.0)
        batches = []
        for g in range(G):
            for j in range(S - 1):
                tokens = (segments[:, g] == j).nonzero()[:, 0]
                if len(tokens):
                    batches.append((slice(g, g + 1), slice(j, j + 2), tokens, len(tokens)))

    for groups, nodes, tokens, count in batches:
        group_count, node_count = groups.stop - groups.start, nodes.stop - nodes.start
        chunks = -(-count * group_count * _rows(node_count, _width(K), False) // CHUNK)
        size = -(-count // chunks)
        segment = None if tokens is None else nodes.start
        tokens_first = K >= WIDE and (group_count == 1 or mix == "sum")
        for first in range(0, count, size):
            index = slice(first, first + size) if tokens is None else tokens[first:first + size]
            chunk = _Chunk(r[index, groups], node_count, S - 1, segment, expansion, bend, eps, dtype, tokens_first)
            yield groups, nodes, index, chunk


class _Stacks:
    """The stacks of the chunks' groups and nodes, made when they are first asked for, and their gradients."""

    def __init__(self, controls: SplanifoldControls, mix: str, dtype: torch.dtype):
        self.controls = controls
        self.mix = mix
        self.dtype = dtype      # of stacks and gradients
        self.stacks = {}        # by the first and last group and node, and `four`
        self.gradients = {}     # likewise

    def __call__(self, groups: slice, nodes: slice, four: bool) -> Tensor:
        key = groups.start, groups.stop, nodes.start, nodes.stop, four
        if key not in self.stacks:
            controls = SplanifoldControls(*(x[groups, nodes] for x in self.controls))
            self.stacks[key] = _stack(controls, four, self.mix, self.dtype)
        return self.stacks[key]

    def gradient(self, groups: slice, nodes: slice, four: bool) -> Tensor:
        key = groups.start, groups.stop, nodes.start, nodes.stop, four
        if key not in self.gradients:
            self.gradients[key] = torch.zeros_like(self(groups, nodes, four))
        return self.gradients[key]

    def control_gradients(self) -> list[Tensor]:
        """Returns the controls' gradients from all stacks', which are overwritten."""
        K = self.controls.bases.shape[-1]
        totals = [torch.zeros(x.shape, dtype=self.dtype, device=x.device) for x in self.controls]
        for (first_group, last_group, first_node, last_node, four), gradient in self.gradients.items():
            for total, x in zip(totals, _unstack(gradient, four, last_node - first_node, K)):
                total[first_group:last_group, first_node:last_node] += x
        return [total.to(x.dtype) for total, x in zip(totals, self.controls)]


def _put(x: Tensor, index: slice | Tensor, groups: slice, rows: Tensor):
    """
    Writes rows (m, groups times X) to their places in x (M, G, X). A slice has all groups: two dimensions, which
    PyTorch turns over by blocks.
    """
    if isinstance(index, slice):
        x.flatten(1)[index].copy_(rows)
    else:
        x[index, groups] = rows.unflatten(1, (-1, x.shape[2])).to(x.dtype)


def _chunked_forward(r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float,
                     mix: str) -> Tensor:
    """Returns splanifold's result for r (M, G, K). bend: 1 / delta_max."""
    dtype = compute_dtype(r, controls)
    M, (G, S, n) = len(r), controls.points.shape
    stacks = _Stacks(controls, mix, dtype)
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
    """Returns the gradients of r and the controls, without numbers where they are not asked for."""
    dtype = compute_dtype(r, controls)
    M, (G, S, n) = len(r), controls.points.shape
    stacks = _Stacks(controls, mix, dtype)
    dr, *dcontrols = _empty_gradients(r, *controls, r_grad, control_grads)
    for groups, nodes, index, chunk in _walk(r, S, expansion, bend, eps, mix, dtype):
        stack, features = stacks(groups, nodes, chunk.four), chunk.features
        dstack = stacks.gradient(groups, nodes, chunk.four) if control_grads else None

        # of the controls
        if mix == "sum":
            g = grad[index].to(dtype)
            if control_grads:
                dstack.flatten(0, 1).addmm_(features.flatten(0, 1), g)
        else:
            g = grad.view(M, G, n)[index, groups].to(dtype).flatten(1).t().contiguous().unflatten(0, (-1, n))
            if control_grads:
                dstack.mT.baddbmm_(g, features.mT)

        # of r
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
    """Returns room for the gradients, contiguous; none for those that are not asked for."""
    wanted = [(r, r_grad), *((x, control_grads) for x in (points, bases, point_tangents, base_tangents))]
    return [torch.empty(x.shape if is_wanted else 0, dtype=x.dtype, device=x.device) for x, is_wanted in wanted]


# ---- Registration -----------------------------------------------------------

@torch.library.custom_op("knotgpt::splanifold", mutates_args=())
def _forward_op(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                expansion: float, bend: float, eps: float, mix: str) -> Tensor:
    controls = SplanifoldControls(points, bases, point_tangents, base_tangents)
    return _chunked_forward(r, controls, expansion, bend, eps, mix)


@_forward_op.register_fake
def _(r, points, bases, point_tangents, base_tangents, expansion, bend, eps, mix):
    return r.new_empty(r.shape[0], points.shape[-1] * (1 if mix == "sum" else len(points)))


@torch.library.custom_op("knotgpt::splanifold_backward", mutates_args=())
def _backward_op(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                 expansion: float, bend: float, eps: float, mix: str, r_grad: bool,
                 control_grads: bool) -> list[Tensor]:
    controls = SplanifoldControls(points, bases, point_tangents, base_tangents)
    return _chunked_backward(grad, r, controls, expansion, bend, eps, mix, r_grad, control_grads)


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
    return *(x if is_wanted else None for x, is_wanted in zip(gradients, wanted)), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.splanifold)
def _forward_flops(r, points, bases, point_tangents, base_tangents, expansion, bend, *_, out_shape=None, **__) -> int:
    """
    Returns the FLOPs of the products. From K = WIDE on tokens meet two nodes; without a warp all of them are taken to
    need four matrices, which is likely for K >= 32.
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
    Returns splanifold's result, chunk by chunk: features of all tokens are never in memory, and only r and the controls
    are kept for the backward pass.
    """
    return _forward_op(r, *controls, float(expansion), 1 / delta_max, float(eps), mix)
