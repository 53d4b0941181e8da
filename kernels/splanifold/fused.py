"""
Splanifold, backend "triton": which of the two algorithms of kernels serves a pass, and their registration. Small groups
(small_triton) are bound by memory and stay in registers; all others are products on tensor cores (products_triton).

Source: Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034; the forms are ours.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.splanifold import products_triton, small_triton
from kernels.splanifold.basis_triton import layout_of


def _forward(r: Tensor, controls: tuple, expansion: float, delta_max: float, eps: float, mix: str) -> Tensor:
    """Returns splanifold's result for r (M, G, K), contiguous."""
    layout = layout_of(r, controls[0], delta_max, mix)
    algorithm = small_triton if small_triton.serves(layout) else products_triton
    return algorithm.forward(r, controls, layout, expansion, delta_max, eps)


def _backward(grad: Tensor, r: Tensor, controls: tuple, expansion: float, delta_max: float, eps: float, mix: str,
              r_grad: bool, control_grads: bool) -> list[Tensor]:
    """Returns the gradients of r and the four controls, empty where not asked for."""
    layout = layout_of(r, controls[0], delta_max, mix)
    grad = grad.contiguous()
    settings = layout, expansion, delta_max, eps
    if small_triton.serves(layout):
        d_r, d_controls = small_triton.backward(grad, r, controls, *settings)
    else:
        d_r, d_controls = products_triton.backward(grad, r, controls, *settings, r_grad, control_grads)
    if not control_grads:
        d_controls = [x.new_empty(0) for x in controls]
    return [d_r if r_grad else r.new_empty(0), *(d.to(x.dtype).contiguous() for d, x in zip(d_controls, controls))]


# ---- Registration -----------------------------------------------------------

@torch.library.custom_op("knotgpt::splanifold_triton", mutates_args=())
def _forward_op(r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                expansion: float, delta_max: float, eps: float, mix: str) -> Tensor:
    controls = points, bases, point_tangents, base_tangents
    with torch.cuda.device_of(r):
        return _forward(r.contiguous(), controls, expansion, delta_max, eps, mix)


@_forward_op.register_fake
def _(r, points, bases, point_tangents, base_tangents, expansion, delta_max, eps, mix):
    return r.new_empty(r.shape[0], points.shape[2] * (1 if mix == "sum" else r.shape[1]))


@torch.library.custom_op("knotgpt::splanifold_triton_backward", mutates_args=())
def _backward_op(grad: Tensor, r: Tensor, points: Tensor, bases: Tensor, point_tangents: Tensor, base_tangents: Tensor,
                 expansion: float, delta_max: float, eps: float, mix: str, r_grad: bool,
                 control_grads: bool) -> list[Tensor]:
    controls = points, bases, point_tangents, base_tangents
    with torch.cuda.device_of(r):
        return _backward(grad, r.contiguous(), controls, expansion, delta_max, eps, mix, r_grad, control_grads)


@_backward_op.register_fake
def _(grad, r, points, bases, point_tangents, base_tangents, expansion, delta_max, eps, mix, r_grad, control_grads):
    wanted = [(r, r_grad), *((x, control_grads) for x in (points, bases, point_tangents, base_tangents))]
    return [x.new_empty(x.shape if is_wanted else 0) for x, is_wanted in wanted]


def _save(ctx, inputs, output):
    *tensors, expansion, delta_max, eps, mix = inputs
    ctx.settings = expansion, delta_max, eps, mix
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    wanted = ctx.needs_input_grad
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.settings, wanted[0], any(wanted[1:5]))
    return *(d if is_wanted else None for d, is_wanted in zip(gradients, wanted)), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.splanifold_triton)
def _forward_flops(r, points, bases, point_tangents, base_tangents, expansion, delta_max, *_, out_shape=None,
                   **__) -> int:
    (M, G, K), (_, S, n) = r, points
    matrices = 4 if S == 2 and delta_max == math.inf else 3 * S
    return 2 * M * G * n * (matrices * K + 2 * S)


@register_flop_formula(torch.ops.knotgpt.splanifold_triton_backward)
def _backward_flops(grad, *arguments, out_shape=None, **__) -> int:
    r_grad, control_grads = arguments[-2:]
    return (r_grad + control_grads) * _forward_flops(*arguments)


def splanifold_triton(r: Tensor, controls: tuple[Tensor, Tensor, Tensor, Tensor], expansion: float, delta_max: float,
                      eps: float, mix: str) -> Tensor:
    """
    Returns splanifold's result, (M, n) for mix "sum", (M, G n) for "concat", in r's dtype: r (M, G, K) bfloat16,
    float16 or float32 on CUDA, controls (points (G, S, n), bases, point_tangents and base_tangents (G, S, n, K)) of any
    of these dtypes, any strides. What the arguments are is not checked here.

    t, delta, s, alpha and all sums are float32; the
    operands of products have r's dtype, float32 ones as three TF32 products. Gradients for r and the controls, once,
    each in its tensor's dtype; those not needed are not computed, but for K <= 4 and n <= 8.
    """
    return _forward_op(r, *controls, float(expansion), float(delta_max), float(eps), mix)
