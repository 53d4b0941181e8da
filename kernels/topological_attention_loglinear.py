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

On a CPU these sums are loops, topological_attention_loglinear_loops.py; on a GPU they are kernels,
topological_attention_loglinear_triton.py, which take zeros for coordinates that are absent. What neither takes (no
Numba; on a GPU float64, or rows of values of more than 512 bytes) goes through the reference and its matrix of scores.

Work of the CPU's loops, for a token of a head and L levels, in FLOPs:
    forward     2 (C / 2 + 2 L) (D + 1)      without coordinates 4 (D + 1)
    backward    2 (C + 5 L) (D + 1)          without coordinates 6 (D + 1)
Each level reads v once, and reads and writes out once, in the order of the coordinates.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the algorithm
and its gradient are ours. Rows kept with the exponent of their maximum: Milakov and Gimelshein,
arxiv.org/abs/1805.02867
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import cpu_loops, cpu_operation
from kernels.topological_attention_reference import compute_dtype, query_heads, topological_attention_reference

CHUNK = 32  # C of the CPU's loops


class _Arguments(NamedTuple):
    """The arguments of topological_attention_loglinear."""
    query: Tensor | None
    key: Tensor | None
    value: Tensor
    log_decay: Tensor | None
    key_bias: Tensor | None
    doc_start: Tensor | None
    window: int | None


# ---- On a CPU: compiled loops


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x (..., D), contiguous and in this dtype, with each row padded by zeros to a multiple of 8 numbers."""
    missing = -x.shape[-1] % 8
    x = x.to(dtype)
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _loop_inputs(loops, x: _Arguments):
    """Returns the arguments as the loops take them, loops.Inputs."""
    dtype = compute_dtype(*x[:5])
    B, T, kv_heads, _ = x.value.shape

    def array(t: Tensor | None, heads: int):
        return (torch.zeros(B, T, heads) if t is None else t).to(dtype).contiguous().numpy()

    # coordinates, and integers in their order; no integers where there are no coordinates
    query = array(x.query, query_heads(x.query, x.value, x.log_decay))
    key = array(x.key, kv_heads)
    no_codes = torch.empty(B, T, 0, dtype=torch.int32).numpy()
    query_codes, key_codes = (no_codes, no_codes) if x.query is None else loops.order_codes(query, key)

    # the others
    start = torch.zeros(B, T, dtype=torch.int32) if x.doc_start is None else x.doc_start.to(torch.int32).contiguous()
    value = _rows(x.value, dtype).numpy().reshape(-1)
    log_decay = array(x.log_decay, 0)
    key_bias = array(x.key_bias, 0)
    return loops.Inputs(query, key, value, log_decay, key_bias, start.numpy(), query_codes, key_codes)


def _loop_forward(loops, x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (out, M, Z) as _forward_body does."""
    B, T, _, D = x.value.shape
    heads = query_heads(x.query, x.value, x.log_decay)
    dtype = compute_dtype(*x[:5])

    # the results' arrays
    out = torch.empty(B, T, heads, D + -D % 8, dtype=dtype)
    row_max = torch.empty(B, heads, T, dtype=torch.float64)
    normalizer = torch.empty(B, heads, T, dtype=dtype)
    results = loops.Results(out.numpy().reshape(-1), row_max.numpy(), normalizer.numpy())

    # there are no gradients yet
    nothing = torch.empty(0, dtype=dtype).numpy()
    nobody = nothing.reshape(0, 0, 0)
    gradients = loops.Gradients(nothing, nobody, nobody, nothing, nobody, nobody)
    loops.topological_pass(False, _loop_inputs(loops, x), results, gradients, x.window or T, out.shape[-1])
    return out[..., :D].contiguous(), row_max, normalizer


def _loop_backward(
    loops, grad_out: Tensor, x: _Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor
) -> list[Tensor]:
    """Returns the gradients as _backward_body does."""
    B, T, kv_heads, D = x.value.shape
    dtype = out.dtype

    # what the loops read
    inputs = _loop_inputs(loops, x)
    upstream = _rows(grad_out, dtype)
    results = loops.Results(
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
    loops.topological_pass(True, inputs, results, gradients, x.window or T, upstream.shape[-1])
    made = (query, key, value[..., :D].contiguous(), log_decay, key_bias)
    return [gradient.to(t.dtype) for gradient, t in zip(made, x) if t is not None]


# ---- Where neither loops nor kernels serve: the reference


def _reference_forward(x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    wide = [None if t is None else t.to(compute_dtype(*x[:5])) for t in x[:5]]
    out = topological_attention_reference(*wide, x.doc_start, x.window)
    shape = (out.shape[0], out.shape[2], out.shape[1])
    return out, out.new_zeros(shape, dtype=torch.float64), out.new_ones(shape)


def _reference_backward(grad_out: Tensor, x: _Arguments) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().to(grad_out.dtype).requires_grad_() for t in x[:5]]
        out = topological_attention_reference(*leaves, x.doc_start, x.window)
        gradients = torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out)
    return [gradient.to(t.dtype) for gradient, t in zip(gradients, [t for t in x[:5] if t is not None])]


# ---- On a GPU: Triton


def _with_coordinates(x: _Arguments) -> _Arguments:
    """Returns x, with zeros for coordinates that are absent, so that all distances are 0."""
    if x.query is not None:
        return x
    B, T, kv_heads, _ = x.value.shape
    heads = query_heads(None, x.value, x.log_decay)
    query = x.value.new_zeros(B, T, heads, dtype=torch.float32)
    key = x.value.new_zeros(B, T, kv_heads, dtype=torch.float32)
    return x._replace(query=query, key=key)


def _triton_forward(on_gpu, x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    filled = _with_coordinates(x)
    return on_gpu.loglinear_forward(*filled, query_heads(filled.query, filled.value, filled.log_decay))


def _triton_backward(on_gpu, grad_out: Tensor, x: _Arguments, out: Tensor, row_max: Tensor,
                     normalizer: Tensor) -> list[Tensor]:
    gradients = on_gpu.loglinear_backward(grad_out, *_with_coordinates(x), out, row_max, normalizer)
    return gradients if x.query is not None else gradients[2:]


# ---- The device's choice


def _forward(x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    if x.value.device.type == "cpu":
        loops = cpu_loops("topological_attention_loglinear_loops")
        return _reference_forward(x) if loops is None else _loop_forward(loops, x)
    from kernels import topological_attention_loglinear_triton as on_gpu  # it needs Triton only where there is a GPU
    return _triton_forward(on_gpu, x) if on_gpu.serves(*x[:5]) else _reference_forward(x)


def _backward(grad_out: Tensor, x: _Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor) -> list[Tensor]:
    if x.value.device.type == "cpu":
        loops = cpu_loops("topological_attention_loglinear_loops")
        if loops is None:
            return _reference_backward(grad_out, x)
        return _loop_backward(loops, grad_out, x, out, row_max, normalizer)
    from kernels import topological_attention_loglinear_triton as on_gpu
    if not on_gpu.serves(*x[:5]):
        return _reference_backward(grad_out, x)
    return _triton_backward(on_gpu, grad_out, x, out, row_max, normalizer)


def _forward_body(
    query: Optional[Tensor],
    key: Optional[Tensor],
    value: Tensor,
    log_decay: Optional[Tensor],
    key_bias: Optional[Tensor],
    doc_start: Optional[Tensor],
    window: Optional[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns (out, M, Z): out (B, T, H, D) and Z (B, H, T) are in the compute dtype; M (B, H, T), float64, is the shift
    of each row's exponents.
    """
    with torch.autocast(value.device.type, enabled=False):
        return _forward(_Arguments(query, key, value, log_decay, key_bias, doc_start, window))


def _forward_fake(query, key, value, log_decay, key_bias, doc_start, window):
    B, T, _, D = value.shape
    heads = query_heads(query, value, log_decay)
    out = value.new_empty(B, T, heads, D, dtype=compute_dtype(query, key, value, log_decay, key_bias))
    return out, *(out.new_empty(B, out.shape[2], T, dtype=dtype) for dtype in (torch.float64, out.dtype))


def _backward_body(
    grad_out: Tensor,
    query: Optional[Tensor],
    key: Optional[Tensor],
    value: Tensor,
    log_decay: Optional[Tensor],
    key_bias: Optional[Tensor],
    doc_start: Optional[Tensor],
    window: Optional[int],
    out: Tensor,
    row_max: Tensor,
    normalizer: Tensor,
) -> list[Tensor]:
    """Returns the gradients of query, key, value, log_decay and key_bias, in this order, of those that are not None."""
    x = _Arguments(query, key, value, log_decay, key_bias, doc_start, window)
    with torch.autocast(value.device.type, enabled=False):
        return _backward(grad_out, x, out, row_max, normalizer)


def _backward_fake(grad_out, query, key, value, log_decay, key_bias, doc_start, window, out, row_max, normalizer):
    floats = (query, key, value, log_decay, key_bias)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in floats if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, grad_out, *_):
    *inputs, out, row_max, normalizer = ctx.saved_tensors
    gradients = iter(_loglinear_backward(grad_out, *inputs, ctx.window, out, row_max, normalizer))
    return *(None if x is None else next(gradients) for x in inputs[:5]), None, None


_loglinear_backward = cpu_operation("knotgpt::topological_attention_backward", _backward_body, _backward_fake)
_loglinear = cpu_operation(
    "knotgpt::topological_attention", _forward_body, _forward_fake, _setup_context, _autograd_backward
)


def _flops(query, value, log_decay, window, chunk_share: float, level_share: float, scan_share: int) -> int:
    """
    Returns the FLOPs of a pass: 2 (D + 1) for each token, head and row of D + 1 numbers that it takes. There are
    chunk_share rows for each token of a chunk and level_share for each level, or scan_share without coordinates.
    """
    B, T, kv_heads, D = value
    heads = next((shape[2] for shape in (query, log_decay) if shape is not None), kv_heads)
    width = min(window or T, T)
    tokens = 2 * T - width  # of the lower triangles and the upper ones
    levels = (-(-width // CHUNK) - 1).bit_length()
    rows = scan_share if query is None else min(CHUNK, width) * chunk_share + levels * level_share
    return int(2 * B * heads * tokens * rows * (D + 1))


@register_flop_formula(torch.ops.knotgpt.topological_attention)
def _(query, key, value, log_decay, key_bias, doc_start, window, *, out_shape=None, **_) -> int:
    return _flops(query, value, log_decay, window, 0.5, 2, 2)


@register_flop_formula(torch.ops.knotgpt.topological_attention_backward)
def _(grad_out, query, key, value, log_decay, key_bias, doc_start, window, *_, out_shape=None, **__) -> int:
    return _flops(query, value, log_decay, window, 1, 5, 3)


def topological_attention_loglinear(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    doc_start: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns topological_attention's result, computed by this backend. It does not check the arguments."""
    # The backward pass needs the result before it is rounded to value's dtype: the gradient of log_decay is a running
    # sum of differences from it.
    return _loglinear(query, key, value, log_decay, key_bias, doc_start, window)[0].to(value.dtype)
