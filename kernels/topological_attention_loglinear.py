"""
Topological attention, backend "loglinear": exact in O(T log T), and without coordinates ("key only") in O(T).

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i        F_i = sum over t <= i of g_t, g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

e^-|a - b| is separable on either side of the query once keys are sorted. Tokens lie in chunks of C; pairs inside a chunk are dense, and at each level of nodes
of s = C, 2C, ... tokens the keys of a node act on the queries of its right neighbour. Keys b_1 <= b_2 <= ... of a node with log-weights w = c - F have the sums
    U_r = sum over t <= r of e^{w_t + b_t - y_r} [v_t, 1]      y_r = max over t <= r of (w_t + b_t)
    V_r = sum over t > r of e^{w_t - b_t - z_r} [v_t, 1]       z_r = max over t > r of (w_t - b_t)
no factor above 1. A query with r keys at or below it reads
    e^{F_i - M_i} (e^{y_r - a_i} U_r + e^{z_r + a_i} V_r)
A window of W cuts the tokens into blocks of W: the lower triangle of every block, and the strictly upper triangle of its queries and the keys before it.

Backward: with u_i = dOut_i / Z_i, delta_i = dOut_i . out_i / Z_i, p_ij = e^{s_ij - M_i} and E_ij = p_ij (u_i . v_j - delta_i)
    dv_j = sum_i p_ij u_i      da_i = -sum_j sgn(a_i - b_j) E_ij      db_j = sum_i sgn(a_i - b_j) E_ij      dc_j = sum_i E_ij      dg_t = -sum over j >= t of dc_j
where sgn(0) = 0. The sums over i are the same operator transposed (right queries act on left keys) on rows [u, delta].

On a CPU these are loops, topological_attention_loglinear_loops.py; on a GPU kernels, topological_attention_loglinear_triton.py, which take zeros for coordinates that
are absent. What neither takes (no Numba; on a GPU float64, or rows of values of more than 512 bytes) goes through the reference and its matrix of scores.

Work for a token of a head and L levels, by the CPU's loops: forward 2 (C / 2 + 2 L)(D + 1) FLOPs, backward 2 (C + 5 L)(D + 1); without coordinates 4 (D + 1)
and 6 (D + 1). Each level reads v, and reads and writes out, once, in the order of the coordinates.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144, for scores of scalars; the algorithm and its gradient are ours.
Rows kept with the exponent of their maximum: Milakov and Gimelshein, arxiv.org/abs/1805.02867
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
    query: Tensor | None
    key: Tensor | None
    value: Tensor
    log_decay: Tensor | None
    key_bias: Tensor | None
    doc_start: Tensor | None
    window: int | None


# ---- On a CPU: compiled loops


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., D) contiguous and in this dtype, each row with zeros up to a multiple of 8 numbers."""
    return F.pad(x.to(dtype), (0, -x.shape[-1] % 8)).contiguous()


def _loop_inputs(loops, x: _Arguments):
    """The arguments as the loops take them."""
    dtype, (B, T, kv_heads, _) = compute_dtype(*x[:5]), x.value.shape

    def array(t: Tensor | None, heads: int):
        return (torch.zeros(B, T, heads) if t is None else t).to(dtype).contiguous().numpy()

    query, key = array(x.query, query_heads(x.query, x.value, x.log_decay)), array(x.key, kv_heads)
    no_codes = torch.empty(B, T, 0, dtype=torch.int32).numpy()
    query_codes, key_codes = (no_codes, no_codes) if x.query is None else loops.order_codes(query, key)
    start = torch.zeros(B, T, dtype=torch.int32) if x.doc_start is None else x.doc_start.to(torch.int32).contiguous()
    value = _rows(x.value, dtype).numpy().reshape(-1)
    return loops.Inputs(query, key, value, array(x.log_decay, 0), array(x.key_bias, 0), start.numpy(), query_codes, key_codes)


def _loop_forward(loops, x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, _, D), heads, dtype = x.value.shape, query_heads(x.query, x.value, x.log_decay), compute_dtype(*x[:5])
    out, row_max, normalizer = torch.empty(B, T, heads, D + -D % 8, dtype=dtype), torch.empty(B, heads, T, dtype=torch.float64), torch.empty(B, heads, T, dtype=dtype)
    results = loops.Results(out.numpy().reshape(-1), row_max.numpy(), normalizer.numpy())
    nothing = torch.empty(0, dtype=dtype).numpy()
    nobody = nothing.reshape(0, 0, 0)
    gradients = loops.Gradients(nothing, nobody, nobody, nothing, nobody, nobody)
    loops.topological_pass(False, _loop_inputs(loops, x), results, gradients, x.window or T, out.shape[-1])
    return out[..., :D].contiguous(), row_max, normalizer


def _loop_backward(loops, grad_out: Tensor, x: _Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor) -> list[Tensor]:
    (B, T, kv_heads, D), dtype = x.value.shape, out.dtype
    inputs, upstream = _loop_inputs(loops, x), _rows(grad_out, dtype)
    results = loops.Results(_rows(out, dtype).numpy().reshape(-1), row_max.contiguous().numpy(), normalizer.contiguous().numpy())
    query, key, log_decay, key_bias = (torch.zeros(t.shape, dtype=dtype) for t in (inputs.query, inputs.key, inputs.log_decay, inputs.key_bias))
    value = torch.zeros(B, T, kv_heads, upstream.shape[-1], dtype=dtype)
    gradients = loops.Gradients(upstream.numpy().reshape(-1), query.numpy(), key.numpy(), value.numpy().reshape(-1), log_decay.numpy(), key_bias.numpy())
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


# ---- Either


def _with_coordinates(x: _Arguments) -> _Arguments:
    """Zeros for coordinates that are absent: all distances are 0."""
    if x.query is not None:
        return x
    heads = query_heads(None, x.value, x.log_decay)
    return x._replace(query=x.value.new_zeros(*x.value.shape[:2], heads, dtype=torch.float32), key=x.value.new_zeros(x.value.shape[:3], dtype=torch.float32))


def _forward(x: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    if x.value.device.type == "cpu":
        loops = cpu_loops("topological_attention_loglinear_loops")
        return _reference_forward(x) if loops is None else _loop_forward(loops, x)
    from kernels import topological_attention_loglinear_triton as on_gpu  # it needs Triton only where there is a GPU
    filled = _with_coordinates(x)
    if not on_gpu.serves(*filled[:5]):
        return _reference_forward(x)
    return on_gpu.loglinear_forward(*filled, query_heads(filled.query, filled.value, filled.log_decay))


def _backward(grad_out: Tensor, x: _Arguments, out: Tensor, row_max: Tensor, normalizer: Tensor) -> list[Tensor]:
    if x.value.device.type == "cpu":
        loops = cpu_loops("topological_attention_loglinear_loops")
        return _reference_backward(grad_out, x) if loops is None else _loop_backward(loops, grad_out, x, out, row_max, normalizer)
    from kernels import topological_attention_loglinear_triton as on_gpu
    filled = _with_coordinates(x)
    if not on_gpu.serves(*filled[:5]):
        return _reference_backward(grad_out, x)
    gradients = on_gpu.loglinear_backward(grad_out, *filled, out, row_max, normalizer)
    return gradients if x.query is not None else gradients[2:]


def _forward_body(query: Optional[Tensor], key: Optional[Tensor], value: Tensor, log_decay: Optional[Tensor], key_bias: Optional[Tensor],
               doc_start: Optional[Tensor], window: Optional[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(out, M, Z): out (B, T, H, D) and Z (B, H, T) in the compute dtype, M (B, H, T) float64 the shift of each row's exponents."""
    with torch.autocast(value.device.type, enabled=False):
        return _forward(_Arguments(query, key, value, log_decay, key_bias, doc_start, window))


def _forward_fake(query, key, value, log_decay, key_bias, doc_start, window):
    B, T, _, D = value.shape
    out = value.new_empty(B, T, query_heads(query, value, log_decay), D, dtype=compute_dtype(query, key, value, log_decay, key_bias))
    return out, *(out.new_empty(B, out.shape[2], T, dtype=dtype) for dtype in (torch.float64, out.dtype))


def _backward_body(grad_out: Tensor, query: Optional[Tensor], key: Optional[Tensor], value: Tensor, log_decay: Optional[Tensor],
                        key_bias: Optional[Tensor], doc_start: Optional[Tensor], window: Optional[int], out: Tensor, row_max: Tensor,
                        normalizer: Tensor) -> list[Tensor]:
    """Gradients of query, key, value, log_decay and key_bias, of those that are not None."""
    with torch.autocast(value.device.type, enabled=False):
        return _backward(grad_out, _Arguments(query, key, value, log_decay, key_bias, doc_start, window), out, row_max, normalizer)


def _backward_fake(grad_out, query, key, value, log_decay, key_bias, doc_start, window, out, row_max, normalizer):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value, log_decay, key_bias) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, grad_out, *_):
    *inputs, out, row_max, normalizer = ctx.saved_tensors
    gradients = iter(_loglinear_backward(grad_out, *inputs, ctx.window, out, row_max, normalizer))
    return *(None if x is None else next(gradients) for x in inputs[:5]), None, None


_loglinear_backward = cpu_operation("knotgpt::topological_attention_backward", _backward_body, _backward_fake)
_loglinear = cpu_operation("knotgpt::topological_attention", _forward_body, _forward_fake, _setup_context, _autograd_backward)


def _flops(query, value, log_decay, window, chunk_share: float, level_share: float, scan_share: int) -> int:
    """2 (D + 1) FLOPs for each token and head times these numbers: of a chunk's tokens, of levels, and without coordinates."""
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


def topological_attention_loglinear(query: Tensor | None, key: Tensor | None, value: Tensor, log_decay: Tensor | None = None, key_bias: Tensor | None = None,
                                    doc_start: Tensor | None = None, window: int | None = None) -> Tensor:
    """topological_attention by this backend. What the arguments are is not checked here."""
    # The rounded result would not do for the backward pass: the gradient of log_decay is a running sum of differences from it.
    return _loglinear(query, key, value, log_decay, key_bias, doc_start, window)[0].to(value.dtype)
