"""
Splanifold, backend "loops": few coordinates on a CPU, "concat". Host functions and registration; the loops are cpu.py.

For one token and group of K coordinates, S nodes, n outputs, W = K - 1 (counted in multiply-adds):
    forward    S n (3 W + 3)                r read and the outputs written once; the table stays in the caches
    backward   S n (10 W + 7)               r and the gradient read, dr written once
    kept for the backward pass: r and the controls
Every token meets every node, mostly with weight 0.

Status: against chunked.py, an AMD EPYC with two threads, float32, 2,048 tokens, medians of 15 in turns, forward and
both passes: 47 groups of K = n = 2, S = 3: 3.4x, 3.4x; 235 of them 4.1x, 4.8x; 152 of K = n = 3, S = 3: 3.6x, 5.5x; 64
of K = n = 4, S = 2, 8,192 tokens 3.0x, 3.3x; 32 of K = n = 8, S = 2: 2.2x, 2.5x; 16 of K = n = 16, S = 2: 1.7x, 1.9x,
S = 5: 4.8x, 4.7x. At K = n = 32 chunked.py is as fast.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import cpu_operation, parallel_loops
from kernels.splanifold.reference import SplanifoldControls, compute_dtype

WIDEST = 16         # most coordinates, see above
MOST = 2048         # most numbers S n K in a group's matrices of a kind, whose gradients a cache is to hold


def _table(controls: SplanifoldControls, dtype: torch.dtype) -> Tensor:
    """Returns the loops' table (G, S, n, 2 + 3 (K - 1))."""
    points, bases, point_tangents, base_tangents = (x.to(dtype) for x in controls)
    columns = [x[..., :-1] - x[..., -1:] for x in (bases, base_tangents, point_tangents)]
    return torch.cat((points[..., None], point_tangents.mean(-1, keepdim=True), *columns), -1)


def _control_gradients(dtable: Tensor, controls: SplanifoldControls) -> list[Tensor]:
    """Returns the gradients of the controls from the table's."""
    K = controls.bases.shape[-1]
    dpoints, dmeans, *columns = dtable.split((1, 1, K - 1, K - 1, K - 1), -1)
    dbases, dbase_tangents, dpoint_tangents = (torch.cat((x, -x.sum(-1, keepdim=True)), -1) for x in columns)
    gradients = dpoints[..., 0], dbases, dpoint_tangents + dmeans / K, dbase_tangents
    return [gradient.to(x.dtype) for gradient, x in zip(gradients, controls)]


def _arrays(r: Tensor, controls: SplanifoldControls, expansion: float, bend: float, eps: float) -> list[np.ndarray]:
    """Returns r, the table and the constants as the loops take them."""
    dtype = compute_dtype(r, controls)
    K, S = r.shape[2], controls.points.shape[1]
    constants = torch.tensor([1 + 2 * expansion, expansion, eps ** 2, bend ** 2, S - 1, 1 / K], dtype=dtype)
    return [x.numpy(force=True) for x in (r.to(dtype).contiguous(), _table(controls, dtype), constants)]


def _forward_body(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                  expansion: float, bend: float, eps: float) -> Tensor:
    """Returns the outputs, (M, G n)."""
    controls = SplanifoldControls(points, bases, point_tangents, base_tangents)
    out = parallel_loops("splanifold.cpu").forward(*_arrays(r, controls, expansion, bend, eps))
    return torch.from_numpy(out).flatten(1).to(r.dtype)


def _backward_body(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor,
                   base_tangents: Tensor, expansion: float, bend: float, eps: float) -> list[Tensor]:
    """Returns the gradients of r and the controls."""
    controls = SplanifoldControls(points, bases, point_tangents, base_tangents)
    rows, table, constants = _arrays(r, controls, expansion, bend, eps)
    grad = grad.to(compute_dtype(r, controls)).contiguous().view(*r.shape[:2], -1).numpy(force=True)
    dr, dtable = parallel_loops("splanifold.cpu").backward(grad, rows, table, constants)
    return [torch.from_numpy(dr).to(r.dtype), *_control_gradients(torch.from_numpy(dtable), controls)]


def _fake_forward(r, points, bases, point_tangents, base_tangents, expansion, bend, eps):
    return r.new_empty(r.shape[0], points.shape[0] * points.shape[2])


def _fake_backward(grad, r, points, bases, point_tangents, base_tangents, expansion, bend, eps):
    return [torch.empty(x.shape, dtype=x.dtype) for x in (r, points, bases, point_tangents, base_tangents)]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _gradients(ctx, grad):
    gradients = _backward_operation(grad, *ctx.saved_tensors, *ctx.options)
    wanted = ctx.needs_input_grad[:5]
    return *(x if is_wanted else None for x, is_wanted in zip(gradients, wanted)), None, None, None


_backward_operation = cpu_operation("knotgpt::splanifold_loops_backward", _backward_body, _fake_backward)
_operation = cpu_operation("knotgpt::splanifold_loops", _forward_body, _fake_forward, _save, _gradients)


@register_flop_formula(torch.ops.knotgpt.splanifold_loops)
def _forward_flops(r, points, *_, out_shape=None, **__) -> int:
    (M, G, K), (_, S, n) = r, points
    return 2 * M * G * S * n * (3 * (K - 1) + 3)


@register_flop_formula(torch.ops.knotgpt.splanifold_loops_backward)
def _backward_flops(grad, r, points, *_, out_shape=None, **__) -> int:
    (M, G, K), (_, S, n) = r, points
    return 2 * M * G * S * n * (10 * (K - 1) + 7)


def loops_fit(controls: SplanifoldControls, mix: str) -> bool:
    """Returns whether the loops are made for these splanifolds."""
    _, S, n, K = controls.bases.shape
    return mix == "concat" and K <= WIDEST and S * n * K <= MOST


def splanifold_loops(r: Tensor, controls: SplanifoldControls, expansion: float = 0.0, delta_max: float = math.inf,
                     eps: float = 1e-3, mix: str = "concat") -> Tensor:
    """
    Returns splanifold's result for mix "concat", K <= 16 and S n K <= 2048. It computes in float32, or in float64 where
    an argument has it. The gradients of r and of all controls are made together, whichever are needed.
    """
    return _operation(r, *controls, float(expansion), 1 / delta_max, float(eps))
