"""
Topological attention, backend "loglinear": exact in O(T log T), and on a CPU without coordinates ("key only") in O(T).

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i
    F_i = sum over t <= i of g_t                 g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

Once keys are sorted, e^-|a - b| is separable on either side of the query. Tokens lie in chunks of C; pairs inside a
chunk are dense, and at each level of nodes of s = C, 2C, ... tokens the keys of a node act on the queries of its right
neighbour. The keys b_1 <= b_2 <= ... of a node, with log-weights w = c - F, have the sums
    U_r = sum over t <= r of e^{w_t + b_t - y_r} [v_t, 1]      y_r = max over t <= r of (w_t + b_t)
    V_r = sum over t > r of e^{w_t - b_t - z_r} [v_t, 1]       z_r = max over t > r of (w_t - b_t)
where no factor is above 1. A query with r keys at or below it reads
    e^{F_i - M_i} (e^{y_r - a_i} U_r + e^{z_r + a_i} V_r)
A window of W cuts the tokens into blocks of W. Each block has two triangles of pairs: the lower one of its own queries
and keys, and the strictly upper one of its queries and the keys of the block before it.

Backward: with u_i = dOut_i / Z_i, delta_i = dOut_i . out_i / Z_i, p_ij = e^{s_ij - M_i} and
E_ij = p_ij (u_i . v_j - delta_i)
    da_i = -sum_j sgn(a_i - b_j) E_ij      dv_j = sum_i p_ij u_i      dg_t = -sum over j >= t of dc_j
    db_j = sum_i sgn(a_i - b_j) E_ij       dc_j = sum_i E_ij
where sgn(0) = 0. The sums over i are the same operator transposed: right queries act on left keys, with the rows
[u, delta].

On a CPU these sums are loops, loglinear_cpu.py; on a GPU they are kernels,
loglinear_triton.py, which take zeros for coordinates that are absent. What neither takes (no
Numba; on a GPU float64, or rows of values of more than 512 bytes) goes through the reference and its matrix of scores.

Work of the CPU's loops, for a token of a head and L levels, in FLOPs:
    forward     2 (C / 2 + 2 L) (D + 1)      without coordinates 4 (D + 1)
    backward    2 (C + 5 L) (D + 1)          without coordinates 6 (D + 1)
Each level reads v once, and reads and writes out once, in the order of the coordinates.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the algorithm
and its gradient are ours. Rows kept with the exponent of their maximum: Milakov and Gimelshein,
arxiv.org/abs/1805.02867
"""

from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import cpu_loops, cpu_operation
from kernels.topological_attention.reference import CHUNK, SCHEMA, Arguments, topological_attention_reference

# ---- On a CPU: compiled loops -----------------------------------------------


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x (..., D), contiguous and in this dtype, with each row padded by zeros to a multiple of 8 numbers."""
    missing = -x.shape[-1] % 8
    x = x.to(dtype)
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _loop_inputs(loops, x: Arguments):
    """Returns the arguments as the loops take them, loops.Inputs."""
    dtype = x.dtype
    B, T, kv_heads, _ = x.value.shape
    value = _rows(x.value, dtype).numpy().reshape(-1)

    def array(t: Tensor | None, heads: int) -> np.ndarray:
        if t is None:
            return np.zeros((B, T, heads), value.dtype)
        return t.to(dtype).contiguous().numpy()

    # coordinates, and integers in their order; no integers where there are no coordinates
    query = array(x.query_coord, x.heads)
    key = array(x.key_coord, kv_heads)
    if x.query_coord is None:
        query_codes = key_codes = np.empty((B, T, 0), np.int32)
    else:
        query_codes, key_codes = loops.order_codes(query, key)

    # the others
    start = np.zeros((B, T), np.int32) if x.doc_start is None else x.doc_start.to(torch.int32).contiguous().numpy()
    log_decay = array(x.log_decay, 0)
    key_bias = array(x.key_bias, 0)
    return loops.Inputs(query, key, value, log_decay, key_bias, start, query_codes, key_codes)


def _loop_forward(loops, x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, M, Z) as _forward_body does."""
    B, T, _, D = x.value.shape
    heads = x.heads
    dtype = x.dtype

    # the results' arrays
    out = torch.empty(B, T, heads, D + -D % 8, dtype=dtype)
    row_max = torch.empty(B, heads, T, dtype=torch.float64)
    normalizer = torch.empty(B, heads, T, dtype=dtype)
    results = loops.Results(out.numpy().reshape(-1), row_max.numpy(), normalizer.numpy())

    inputs = _loop_inputs(loops, x)
    loops.topological_pass(False, inputs, results, loops.no_gradients(inputs.value.dtype), x.window or T, out.shape[-1])
    return out[..., :D].contiguous(), row_max, normalizer


def _loop_backward(
    loops, grad_out: Tensor, x: Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor
) -> list[Tensor]:
    """Returns the gradients as _backward_body does."""
    B, T, kv_heads, D = x.value.shape
    dtype = out.dtype

    # what the loops read
    inputs = _loop_inputs(loops, x)
    upstream = _rows(grad_out, dtype)
    forward_results = loops.Results(
        _rows(out, dtype).numpy().reshape(-1),
        row_max.contiguous().numpy(),
        normalizer.contiguous().numpy(),
    )

    # what they make, from zeros on
    query = torch.zeros(inputs.query.shape, dtype=dtype)
    key = torch.zeros(inputs.key.shape, dtype=dtype)
    value = torch.zeros(B, T, kv_heads, upstream.shape[-1], dtype=dtype)
    log_decay = torch.zeros(inputs.log_decay.shape, dtype=dtype)
    key_bias = torch.zeros(inputs.key_bias.shape, dtype=dtype)
    gradients = loops.Gradients(
        upstream.numpy().reshape(-1),
        query.numpy(),
        key.numpy(),
        value.numpy().reshape(-1),
        log_decay.numpy(),
        key_bias.numpy(),
    )
    loops.topological_pass(True, inputs, forward_results, gradients, x.window or T, upstream.shape[-1])
    results = (query, key, value[..., :D].contiguous(), log_decay, key_bias)
    return [gradient.to(t.dtype) for gradient, t in zip(results, x.floats) if t is not None]


# ---- Where neither loops nor kernels serve: the reference -------------------


def _reference_forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    wide = [None if t is None else t.to(x.dtype) for t in x.floats]
    out = topological_attention_reference(*wide, x.doc_start, x.window)
    shape = (out.shape[0], out.shape[2], out.shape[1])
    return out, out.new_zeros(shape, dtype=torch.float64), out.new_ones(shape)


def _reference_backward(grad_out: Tensor, x: Arguments) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().to(grad_out.dtype).requires_grad_() for t in x.floats]
        out = topological_attention_reference(*leaves, x.doc_start, x.window)
        gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out)
    return [gradient.to(t.dtype) for gradient, t in zip(gradients, [t for t in x.floats if t is not None])]


# ---- On a GPU: Triton -------------------------------------------------------


def _with_coordinates(x: Arguments) -> Arguments:
    """Returns x, with zeros for coordinates that are absent, so that all distances are 0."""
    if x.query_coord is not None:
        return x
    B, T, kv_heads, _ = x.value.shape
    query = x.value.new_zeros(B, T, x.heads, dtype=torch.float32)
    key = x.value.new_zeros(B, T, kv_heads, dtype=torch.float32)
    return x._replace(query_coord=query, key_coord=key)


def _triton_forward(kernels, x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.loglinear_forward(_with_coordinates(x))


def _triton_backward(
    kernels, grad_out: Tensor, x: Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor
) -> list[Tensor]:
    gradients = kernels.loglinear_backward(grad_out, _with_coordinates(x), out, row_max, normalizer)
    return gradients[2:] if x.query_coord is None else gradients


# ---- The device's choice ----------------------------------------------------


def _loops(x: Arguments) -> ModuleType | None:
    """Returns the module of the CPU's loops, if they serve these arguments."""
    return cpu_loops("topological_attention.loglinear_cpu") if x.value.device.type == "cpu" else None


def _kernels(x: Arguments) -> ModuleType | None:
    """Returns the module of the Triton kernels, if they serve these arguments."""
    if x.value.device.type == "cpu":
        return None
    from kernels.topological_attention import loglinear_triton  # it needs Triton only where there is a GPU
    return loglinear_triton if loglinear_triton.serves(x) else None


def _forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    loops = _loops(x)
    if loops is not None:
        return _loop_forward(loops, x)
    with torch.autocast(x.value.device.type, enabled=False):
        kernels = _kernels(x)
        return _reference_forward(x) if kernels is None else _triton_forward(kernels, x)


def _backward(grad_out: Tensor, x: Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor) -> list[Tensor]:
    loops = _loops(x)
    if loops is not None:
        return _loop_backward(loops, grad_out, x, out, row_max, normalizer)
    with torch.autocast(x.value.device.type, enabled=False):
        kernels = _kernels(x)
        if kernels is None:
            return _reference_backward(grad_out, x)
        return _triton_backward(kernels, grad_out, x, out, row_max, normalizer)


# ---- Registration -----------------------------------------------------------


def _forward_body(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns (out, M, Z): out (B, T, H, D) and Z (B, H, T) are in the compute dtype; M (B, H, T), float64, is the shift
    of each row's exponents.
    """
    return _forward(Arguments(*arguments))


def _forward_fake(*arguments):
    x = Arguments(*arguments)
    B, T, _, D = x.value.shape
    out = x.value.new_empty(B, T, x.heads, D, dtype=x.dtype)
    return out, *(out.new_empty(B, x.heads, T, dtype=dtype) for dtype in (torch.float64, out.dtype))


def _backward_body(grad_out: Tensor, *inputs) -> list[Tensor]:
    """
    Returns the gradients of the five floating arguments, in their order, of those that are not None. After the
    arguments come the results of the forward pass.
    """
    *arguments, out, row_max, normalizer = inputs
    return _backward(grad_out, Arguments(*arguments), out, row_max, normalizer)


def _backward_fake(grad_out, *inputs):
    floats = Arguments(*inputs[:-3]).floats
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in floats if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, grad_out, *_):
    *inputs, out, row_max, normalizer = ctx.saved_tensors
    gradients = iter(_loglinear_backward(grad_out, *inputs, ctx.window, out, row_max, normalizer))
    return *(None if x is None else next(gradients) for x in inputs[:5]), None, None


_loglinear_backward = cpu_operation(
    "knotgpt::topological_attention_backward",
    _backward_body,
    _backward_fake,
    schema=f"(Tensor grad_out, {SCHEMA}, Tensor out, Tensor row_max, Tensor normalizer) -> Tensor[]",
)
_loglinear = cpu_operation(
    "knotgpt::topological_attention",
    _forward_body,
    _forward_fake,
    _setup_context,
    _autograd_backward,
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


def _flops(shapes: Arguments, chunk_share: float, level_share: float, scan_share: int) -> int:
    """
    Returns the FLOPs of a pass from the shapes of its arguments: 2 (D + 1) for each token, head and row of D + 1
    numbers that it takes. There are chunk_share rows for each token of a chunk and level_share for each level, or
    scan_share without coordinates.
    """
    B, T, kv_heads, D = shapes.value
    heads = kv_heads
    for shape in (shapes.log_decay, shapes.query_coord):
        if shape is not None:
            heads = shape[2]
    width = min(shapes.window or T, T)
    tokens = 2 * T - width  # of the lower triangles and the upper ones
    levels = (-(-width // CHUNK) - 1).bit_length()
    rows = scan_share if shapes.query_coord is None else min(CHUNK, width) * chunk_share + levels * level_share
    return int(2 * B * heads * tokens * rows * (D + 1))


@register_flop_formula(torch.ops.knotgpt.topological_attention)
def _(*shapes, out_shape=None, **_) -> int:
    return _flops(Arguments(*shapes), 0.5, 2, 2)


@register_flop_formula(torch.ops.knotgpt.topological_attention_backward)
def _(grad_out, *shapes, out_shape=None, **_) -> int:
    return _flops(Arguments(*shapes[:-3]), 1, 5, 3)


def topological_attention_loglinear(*arguments, **named) -> Tensor:
    """Returns topological_attention's result, computed by this backend. It does not check the Arguments."""
    # The backward pass needs the result before it is rounded to value's dtype: the gradient of log_decay is a running
    # sum of differences from it.
    x = Arguments(*arguments, **named)
    return _loglinear(*x)[0].to(x.value.dtype)
