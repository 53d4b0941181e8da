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
from torch.utils.flop_counter import register_flop_formula


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


# ---- Host functions: PyTorch ----------------------------------------------------------------------------------------------------------------------------
# Tokens last: a chunk's features are (G, rows, m), so that scalars of a token and group multiply contiguous numbers whatever K is.

CHUNK = 1 << 19     # numbers in a chunk's features, with the gradients of as many: what they need stays in a CPU's cache
BUCKETED = 16       # least K for which several segments are worked on one after another, with their own tokens; below, every token meets every node


class _Chunk:
    """
    What the controls of G groups are multiplied by, for m tokens: features (G, rows, m), h_c delta~ and h_c for the 2 S Hermite weights h_c of the nodes, zero
    for nodes that are not the token's segment's; and, where alpha h is not one of their combinations, alpha h_c delta for the nodes' tangents.
    """
    def __init__(self, r: Tensor, nodes: int, segments: int, segment: int | None, expansion: float, bend: float, eps: float, dtype: torch.dtype, rows_first: bool):
        """r (m, G, K). nodes: all, or the two of the one segment. bend: 1 / delta_max."""
        (m, G, K), self.segments, self.bend, self.nodes, self.stretch = r.shape, segments, bend, nodes, 1 + 2 * expansion
        delta = torch.empty(m, G * K, dtype=dtype, device=r.device).t() if rows_first else torch.empty(G * K, m, dtype=dtype, device=r.device)
        delta = delta.copy_(r.reshape(m, G * K).t()).unflatten(0, (G, K))
        t = delta.mean(1)
        self.delta = self.warped = delta.sub_(t[:, None])
        if expansion:
            delta.mul_(self.stretch)
            t.mul_(self.stretch).sub_(expansion)
        self.total = K * t
        if bend:
            self.warp = torch.linalg.vector_norm(delta, dim=1).mul_(bend).square_().add_(1).rsqrt_()
            self.warped = delta * self.warp[:, None]
        if segment is None:
            self.segment = (t * segments).floor_().clamp_(0, segments - 1)
        else:
            self.segment = segment
        self.tau = (t * segments).sub_(self.segment)
        squared = self.total.square()
        inverse = squared + eps ** 2
        # four: alpha Sigma = Sigma^2 / (Sigma^2 + eps^2) rounds to 1, alpha h10 = (h00 - 2 h10) / K and alpha h11 = (h11 - h10) / K
        self.four = segments == 1 and not bend and torch.equal(squared, inverse)
        self.inverse = inverse.reciprocal_()
        self.alpha = self.total * self.inverse
        self.h = self.by_node(*self.weights())

    def weights(self) -> tuple[Tensor, ...]:
        """h00, h01, h10, h11, each (G, m)."""
        tau = self.tau
        rest = 1 - tau
        square, rest_square = tau.square(), rest.square()
        return rest_square * (2 * tau).add_(1), square * (3 - 2 * tau), tau * rest_square, -square * rest

    def slopes(self) -> tuple[Tensor, ...]:
        """Their derivatives by tau."""
        tau = self.tau
        first = 6 * tau * (tau - 1)
        return first, -first, (3 * tau - 1) * (tau - 1), (3 * tau - 2) * tau

    def by_node(self, *ends: Tensor) -> Tensor:
        """(G, 2 nodes, m): a value's weight for every node, then a tangent's."""
        if self.nodes == 2:
            return torch.stack(ends, 1)
        G, m = self.tau.shape
        table, node = self.tau.new_zeros(G, 2, self.nodes, m), self.segment[:, None].long()
        for place, (first, second) in enumerate((ends[:2], ends[2:])):
            table[:, place].scatter_(1, node, first[:, None]).scatter_(1, node + 1, second[:, None])
        return table.flatten(1, 2)

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Views of (G, rows, x): (G, 2 nodes, K + 1, x) and, for alpha's part, (G, nodes, K, x), without nodes where there is none."""
        K, first = self.delta.shape[1], 2 * self.nodes * (self.delta.shape[1] + 1)
        return features[:, :first].unflatten(1, (2 * self.nodes, K + 1)), features[:, first:].unflatten(1, (-1, K))

    def rows(self) -> int:
        K = self.delta.shape[1]
        return 2 * self.nodes * (K + 1) + (0 if self.four else self.nodes * K)

    def features(self, room: Tensor) -> Tensor:
        """In the memory of room, tokens last or first as delta."""
        (G, K, m), rows = self.delta.shape, self.rows()
        room = room[:G * rows * m]
        features = room.view(m, G, rows).permute(1, 2, 0) if self.delta.stride(1) == 1 and m > 1 else room.view(G, rows, m)
        curve, tangents = self.parts(features)
        torch.mul(self.warped[:, None], self.h[:, :, None], out=curve[:, :, :K])
        curve[:, :, K] = self.h
        if not self.four:
            torch.mul(self.delta[:, None], (self.alpha[:, None] * self.h[:, self.nodes:])[:, :, None], out=tangents)
        return features

    def backward(self, dfeatures: Tensor) -> Tensor:
        """dr (G, K, m) from the features' gradient."""
        G, K, m = self.delta.shape
        curve, tangents = self.parts(dfeatures)
        h, slopes = self.h, self.by_node(*self.slopes())
        dwarped, dtau = _combined(h, curve[:, :, :K]), _combined(slopes, curve)
        dtau = _inner(dtau[:, :K], self.warped) + dtau[:, K]
        ddelta = dwarped
        if self.bend:
            ddelta = dwarped * self.warp[:, None]
            ddelta.addcmul_(self.delta, (_inner(dwarped, self.delta) * self.warp ** 3 * -self.bend ** 2)[:, None])
        dtotal = 0.0
        if not self.four:
            by_alpha = _combined(h[:, self.nodes:], tangents)
            dtau.addcmul_(self.alpha, _inner(_combined(slopes[:, self.nodes:], tangents), self.delta))
            dtotal = _inner(by_alpha, self.delta) * (self.inverse - 2 * self.alpha.square())
            ddelta.addcmul_(by_alpha, self.alpha[:, None])
        dtotal = dtotal + (dtau * self.segments - ddelta.sum(1)) / K
        ddelta.add_(dtotal[:, None])
        return ddelta.mul_(self.stretch) if self.stretch != 1 else ddelta


def _compute_dtype(r: Tensor, controls: SplanifoldControls) -> torch.dtype:
    return torch.promote_types(torch.promote_types(r.dtype, controls.points.dtype), torch.float32)


def _combined(weights: Tensor, x: Tensor) -> Tensor:
    """sum_c weights (G, c, m) x (G, c, rows, m)"""
    result = x[:, 0] * weights[:, 0, None]
    for c in range(1, x.shape[1]):
        result.addcmul_(x[:, c], weights[:, c, None])
    return result


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """sum_k x y, (G, K, m) to (G, m)"""
    return (x * y).sum(1)


def _stack(controls: SplanifoldControls, four: bool, dtype: torch.dtype) -> Tensor:
    """The matrices that features are multiplied by, (G, rows, n)."""
    points, bases, point_tangents, base_tangents = (x.to(dtype) for x in controls)
    K = bases.shape[-1]
    if four:
        first, last = (point_tangents / K).unbind(1)
        bases, base_tangents = torch.stack([bases[:, 0] + first, bases[:, 1]], 1), base_tangents + torch.stack([-2 * first - last, last], 1)
    curve = torch.cat([torch.cat([bases, points[..., None]], -1), torch.cat([base_tangents, point_tangents.mean(-1, keepdim=True)], -1)], 1)
    rows = lambda x: x.transpose(-1, -2).flatten(1, 2)
    return rows(curve) if four else torch.cat([rows(curve), rows(point_tangents)], 1)


def _unstack(dstack: Tensor, four: bool, S: int, K: int) -> tuple[Tensor, ...]:
    """The controls' gradients from the stack's."""
    curve = dstack[:, :2 * S * (K + 1)].unflatten(1, (2 * S, K + 1)).transpose(-1, -2)
    values, tangents = curve[:, :S], curve[:, S:]
    dbases, dbase_tangents, dpoint_tangents = values[..., :K], tangents[..., :K], tangents[..., K:] / K
    if four:
        (first, _), (first_tangent, last_tangent) = (dbases / K).unbind(1), (dbase_tangents / K).unbind(1)
        dpoint_tangents = dpoint_tangents + torch.stack([first - 2 * first_tangent, last_tangent - first_tangent], 1)
    else:
        dpoint_tangents = dpoint_tangents + dstack[:, 2 * S * (K + 1):].unflatten(1, (S, K)).transpose(-1, -2)
    return values[..., K], dbases, dpoint_tangents, dbase_tangents


def _walk(r: Tensor, S: int, expansion: float, bend: float, eps: float, dtype: torch.dtype, rows_first: bool):
    """Chunk by chunk: (groups, nodes, their tokens, _Chunk, room for features). A chunk has all groups and nodes, or one group's tokens of one segment."""
    M, G, K = r.shape
    pieces = [(slice(0, G), slice(0, S), None, M)]
    if S > 2 and K >= BUCKETED:
        segments = (((1 + 2 * expansion) * r.to(dtype).mean(-1) - expansion) * (S - 1)).floor_().clamp_(0, S - 2)
        own = [(g, j, (segments[:, g] == j).nonzero()[:, 0]) for g in range(G) for j in range(S - 1)]
        pieces = [(slice(g, g + 1), slice(j, j + 2), tokens, len(tokens)) for g, j, tokens in own if len(tokens)]
    for groups, nodes, tokens, count in pieces:
        width = nodes.stop - nodes.start
        most = (groups.stop - groups.start) * width * (3 * K + 2)
        size = -(-count // -(-count * most // CHUNK))
        room = torch.empty(size * most, dtype=dtype, device=r.device)
        for first in range(0, count, size):
            index = slice(first, first + size) if tokens is None else tokens[first:first + size]
            segment = None if tokens is None else nodes.start
            yield groups, nodes, index, _Chunk(r[index, groups], width, S - 1, segment, expansion, bend, eps, dtype, rows_first), room


def _chunked_forward(r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float, mix: str) -> Tensor:
    dtype = _compute_dtype(r, controls)
    (M, G, K), (_, S, n), stacks = r.shape, controls.points.shape, {}
    out = torch.zeros(M, n if mix == "sum" else G * n, dtype=dtype, device=r.device)
    for groups, nodes, index, chunk, room in _walk(r, S, expansion, bend, eps, dtype, _rows_first(G, K, mix)):
        key = groups.start, nodes.start, chunk.four
        if key not in stacks:
            stacks[key] = _stack(SplanifoldControls(*(x[groups, nodes] for x in controls)), chunk.four, dtype)
        stack, features = stacks[key], chunk.features(room)
        if mix == "sum":
            if isinstance(index, slice):
                torch.mm(features.flatten(0, 1).t(), stack.flatten(0, 1), out=out[index])
                continue
            result = features.flatten(0, 1).t() @ stack.flatten(0, 1)
        else:
            result = (stack.transpose(1, 2) @ features).flatten(0, 1).t()
        if isinstance(index, slice):
            out[index] = result
        elif mix == "sum":
            out.index_add_(0, index, result)
        else:
            out.view(M, G, n)[index, groups] = result[:, None]
    return out.to(r.dtype)


def _rows_first(G, K, mix):
    return FIRST if FIRST is not None else (mix == "sum" or G == 1) and K >= 32
FIRST = None


def _chunked_backward(grad: Tensor, r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float, mix: str) -> tuple[Tensor, ...]:
    dtype = _compute_dtype(r, controls)
    (M, G, K), (_, S, n), stacks, dstacks = r.shape, controls.points.shape, {}, {}
    dr = torch.empty(M, G, K, dtype=r.dtype, device=r.device)
    for groups, nodes, index, chunk, room in _walk(r, S, expansion, bend, eps, dtype, _rows_first(G, K, mix)):
        key = groups.start, groups.stop, nodes.start, nodes.stop, chunk.four
        if key not in stacks:
            stacks[key] = _stack(SplanifoldControls(*(x[groups, nodes] for x in controls)), chunk.four, dtype)
            dstacks[key] = torch.zeros_like(stacks[key])
        stack, dstack, features = stacks[key], dstacks[key], chunk.features(room)
        if mix == "sum":
            g = grad[index].to(dtype)
            dstack.flatten(0, 1).addmm_(features.flatten(0, 1), g)
            torch.mm(stack.flatten(0, 1), g.t(), out=features.flatten(0, 1))
        else:
            g = grad.view(M, G, n)[index, groups].to(dtype).permute(1, 2, 0).contiguous()
            dstack.baddbmm_(features, g.transpose(1, 2))
            torch.bmm(stack, g, out=features)
        dchunk = chunk.backward(features).flatten(0, 1).t()
        if isinstance(index, slice):
            dr.view(M, G * K)[index].copy_(dchunk)
        else:
            dr[index, groups] = dchunk[:, None].to(r.dtype)
    dcontrols = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in controls]
    for (first_group, last_group, first_node, last_node, four), dstack in dstacks.items():
        for total, x in zip(dcontrols, _unstack(dstack, four, last_node - first_node, K)):
            total[first_group:last_group, first_node:last_node] += x
    return dr, *(total.to(x.dtype) for total, x in zip(dcontrols, controls))


# ---- Registration ---------------------------------------------------------------------------------------------------------------------------------------

@torch.library.custom_op("knotgpt::splanifold", mutates_args=())
def _forward_op(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor, expansion: float, bend: float, eps: float,
                mix: str) -> Tensor:
    return _chunked_forward(r, SplanifoldControls(points, bases, point_tangents, base_tangents), expansion, bend, eps, mix)


@_forward_op.register_fake
def _(r, points, bases, point_tangents, base_tangents, expansion, bend, eps, mix):
    return r.new_empty(len(r), points.shape[-1] * (1 if mix == "sum" else len(points)))


@torch.library.custom_op("knotgpt::splanifold_backward", mutates_args=())
def _backward_op(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor, expansion: float, bend: float,
                 eps: float, mix: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _chunked_backward(grad, r, SplanifoldControls(points, bases, point_tangents, base_tangents), expansion, bend, eps, mix)


@_backward_op.register_fake
def _(grad, r, points, bases, point_tangents, base_tangents, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, points, bases, point_tangents, base_tangents))


def _save(ctx, inputs, output):
    *tensors, ctx.expansion, ctx.bend, ctx.eps, ctx.mix = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *_backward_op(grad, *ctx.saved_tensors, ctx.expansion, ctx.bend, ctx.eps, ctx.mix), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.splanifold)
def _forward_flops(r, points, *_, out_shape=None, **__) -> int:
    return 12 * math.prod(r) * points[-1]


@register_flop_formula(torch.ops.knotgpt.splanifold_backward)
def _backward_flops(grad, r, points, *_, out_shape=None, **__) -> int:
    return 24 * math.prod(r) * points[-1]


# ---- Public function ------------------------------------------------------------------------------------------------------------------------------------

def splanifold_chunked(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf, eps: float = 1e-3, mix: str = "sum") -> Tensor:
    """PyTorch, in chunks of tokens: never the features or the products of all tokens; keeps r and the controls for the backward pass. As splanifold."""
    return _forward_op(r, *controls, float(expansion), 1 / delta_max, float(eps), mix)


BACKENDS = dict(reference=splanifold_reference, chunked=splanifold_chunked)
MIXES = ("sum", "concat")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def splanifold(r: Tensor, controls: SplanifoldControls, *, expansion: float = 0.0, delta_max: float = math.inf, eps: float = 1e-3, mix: str = "sum",
               backend: str = "auto") -> Tensor:
    """
    Phi of every token: the groups' sum, or the groups side by side.

    r (..., G, K)          control coordinates, meant for [0, 1]
    controls               SplanifoldControls of G groups, S >= 2 nodes, K coordinates, n outputs
    expansion              E >= 0: coordinates beyond [0, 1] by E on both sides
    delta_max              > 0: the length that the deviation cannot pass; math.inf: no warp
    eps                    >= 1e-15: smooths the tangents' weights about Sigma = 0
    mix                    "sum" (..., n) or "concat" (..., G n)
    backend                "reference": the formula in eager PyTorch; "chunked": PyTorch, features of a chunk of tokens at a time; "triton": fused, CUDA;
                           "auto": triton for CUDA tensors (not float64), else chunked

    Returns r's dtype. Tensors may be bfloat16, float16, float32 or float64; sums run in float32, or float64 where an argument is. Gradients for r and every
    control, once. ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(r, controls, expansion, delta_max, eps, mix, backend)
    if backend == "auto":
        backend = "triton" if r.is_cuda and "triton" in BACKENDS and r.dtype != torch.float64 else "chunked"
    out = BACKENDS[backend](r.flatten(0, -3) if r.dim() != 3 else r, SplanifoldControls(*controls), expansion, delta_max, eps, mix)
    return out if r.dim() == 3 else out.unflatten(0, r.shape[:-2])


def _check(r, controls, expansion, delta_max, eps, mix, backend):
    pass
