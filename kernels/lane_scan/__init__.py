"""
The lane scan: a causal sum over a document's tokens with weights that do not depend on the data, the same for all
channels of a head. It is linear attention whose queries and keys are fixed features of the position.

    y_t = m_t sum over s <= t in t's document of kappa(t, s) u_s        m_t = 1, or 1 / (p_t + 1) with the mean

    waves    kappa(t, s) = sum over f < F of g_f cos(w_f (t - s)) e^{-a_f (t - s)}        a_f >= 0, w_f in turns a token
    table    kappa(t, s) = sum over k < K of g_k Phi_k(p_t) Phi_k(p_s)                    p_t: t's place in its document

u, y (B, T, W); gains g and decays a (F,), or (H, F) for H heads of W / H channels.

Chunks of C tokens. Of waves, lambda_f = -a_f + i w_f, z_f is the state at the chunk's first token t, the sum over the
document's s < t of e^{lambda_f (t - s)} u_s:
    y_{t+i} = sum over j <= i of kappa(i - j) u_{t+j} + sum over f of g_f Re(e^{lambda_f i} z_f)
    z_f <- e^{lambda_f C} z_f + sum over j of e^{lambda_f (C - j)} u_{t+j}
so that tables of waves are the same for all chunks, only the state turns, and no exponent is above 0. Of a table z_k is
the sum of Phi_k(p_s) u_s, which does not turn.

Backward, with v_t = m_t dy_t: du is the same scan from the last token to the first (kappa is symmetric),
    dg_f = sum over s <= t of cos(w_f (t - s)) e^{-a_f (t - s)} v_t . u_s
    da_f = -g_f (the same, each term times t - s)
of pairs inside a chunk by their distance, of the others from both sides of a chunk's beginning: Re(G_f z_f) with
G_f = sum over i of e^{lambda_f i} v_{t+i}. Frequencies and tables have no gradient.

Work for a token and channel, e bytes a number (counted; C = 32 on a CPU, X = 2 F numbers of state, K of a table):
    forward           C + 4 X FLOPs, of a table on a CPU 4 X       2 e bytes, with segments 3 e
    du                the same                                     2 e
    dg                C + 4 X; with da 8 X more                    2 e
640 FLOPs at F = 64 and C = 128: bound by arithmetic. Kept for the backward pass: u. Decoding: X numbers a channel.

Backends: reference.py, the T x T matrix; chunked.py, PyTorch, and a kernel that ends at a window, in Toeplitz tiles;
cpu.py, compiled loops; chunked_triton.py, a GPU.

Numerics: tables are made in float64 and rounded to the dtype of the products, bfloat16 where u is, else float32; sums
and states are float32. What rounding leaves out of a state's rotation is added, so that thousands of chunks turn it by
the right angle. All in float64 for float64.

Source: jefflinwood/wavestack-hybrid for the two kinds of lanes; chunks: Yang et al., Gated Linear Attention
Transformers, arxiv.org/abs/2312.06635. Decays, gains of heads, the constant tables and the gradients are ours.
Status: the CPU's loops are measured (benchmarks/lane_scan.py); the Triton kernels never ran on a GPU.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    FLOATS,
    array,
    check_backend,
    check_device,
    check_documents,
    check_dtype,
    check_no_float64,
    check_shape,
    cpu_loops,
    cpu_operation,
    loops_serve,
    sum_dtype,
    triton,
)
from kernels.lane_scan import chunked, chunked_triton, step
from kernels.lane_scan.reference import (
    chebyshev_table,
    harmonic_frequencies,
    lane_scan_reference,
    logarithmic_frequencies,
    time_kernel,
)

__all__ = [
    "chebyshev_table", "harmonic_frequencies", "lane_scan", "lane_scan_reference", "lane_scan_step",
    "logarithmic_frequencies", "time_kernel",
]

BACKENDS = ("auto", "reference", "chunked", "banded", "loops", "triton")


# ---- Host functions: the CPU's loops ----------------------------------------


def _loops_arguments(u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None) -> list:
    """Returns [features, gain, decay, doc_start] as cpu.py takes them."""
    if doc_start is None:
        doc_start = torch.zeros(u.shape[:2], dtype=torch.int32)
    tables = [None if x is None else array(x, torch.float64) for x in (features, gain, decay)]
    return [*tables, array(doc_start, torch.int32)]


def _loops_forward(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool, chunk: int,
    segment: int
) -> Tensor:
    y = torch.empty(u.shape, dtype=sum_dtype(u))
    arguments = _loops_arguments(u, features, gain, decay, doc_start)
    cpu_loops("lane_scan.cpu").scan(array(u), *arguments, False, mean, y.numpy())
    return y.to(u.dtype)


def _loops_backward(
    grad: Tensor, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    chunk: int, segment: int, gain_grad: bool, decay_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # du
    loops = cpu_loops("lane_scan.cpu")
    du = torch.empty(u.shape, dtype=sum_dtype(u))
    arguments = _loops_arguments(u, features, gain, decay, doc_start)
    g = array(grad, du.dtype)
    loops.scan(g, *arguments, True, mean, du.numpy())
    dgain, ddecay = _no_gradient(u), _no_gradient(u)

    # the others
    if gain_grad or decay_grad:
        gradients = loops.gain_gradients(array(u), g, *arguments, mean, decay_grad)
        dgain = torch.from_numpy(gradients[0].copy())
        if decay_grad:
            ddecay = torch.from_numpy(gradients[1].copy())
    return du.to(u.dtype), dgain, ddecay


# ---- Registration -----------------------------------------------------------

FORWARD = {"triton": chunked_triton.forward, "chunked": chunked.forward, "loops": _loops_forward}
BACKWARD = {"triton": chunked_triton.backward, "chunked": chunked.backward, "loops": _loops_backward}


def _no_gradient(u: Tensor) -> Tensor:
    """Returns what stands for a gradient that is not wanted."""
    return torch.empty(0, dtype=torch.float64, device=u.device)


def _forward_body(
    u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool, chunk: int,
    segment: int, backend: str
) -> Tensor:
    """Returns y (B, T, W); gain and decay (H, F)."""
    return FORWARD[backend](u, features, gain, decay, doc_start, mean, chunk, segment)


def _backward_body(
    grad: Tensor, u: Tensor, features: Tensor, gain: Tensor, decay: Tensor | None, doc_start: Tensor | None, mean: bool,
    chunk: int, segment: int, gain_grad: bool, decay_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns the gradients of u, and of gain and decay in float64, which are empty where they are not wanted.
    """
    return BACKWARD[backend](grad, u, features, gain, decay, doc_start, mean, chunk, segment, gain_grad, decay_grad)


def _forward_fake(u, features, gain, decay, doc_start, mean, chunk, segment, backend):
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


def _backward_fake(
    grad, u, features, gain, decay, doc_start, mean, chunk, segment, gain_grad, decay_grad, backend
):
    dgain = torch.empty(gain.shape, dtype=torch.float64, device=u.device)
    of_gain = dgain if gain_grad or decay_grad else _no_gradient(u)
    return _forward_fake(u, *[None] * 8), of_gain, torch.empty_like(dgain) if decay_grad else _no_gradient(u)


def _save(ctx, inputs, output):
    *tensors, ctx.mean, ctx.chunk, ctx.segment, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    u, features, gain, decay, doc_start = ctx.saved_tensors
    _, _, gain_grad, decay_grad, *_ = ctx.needs_input_grad
    du, dgain, ddecay = _backward_op(
        grad, u, features, gain, decay, doc_start, ctx.mean, ctx.chunk, ctx.segment, gain_grad, decay_grad, ctx.backend
    )
    dgain = dgain.to(gain.dtype) if gain_grad else None
    ddecay = ddecay.to(decay.dtype) if decay_grad else None
    return du, None, dgain, ddecay, None, None, None, None, None


_backward_op = cpu_operation("knotgpt::lane_scan_backward", _backward_body, _backward_fake)
_forward_op = cpu_operation("knotgpt::lane_scan", _forward_body, _forward_fake, _save, _backward)


def _scan_flops(u: tuple, features: tuple, chunk: int) -> int:
    """Returns the FLOPs of one scan, from shapes."""
    tokens, T, W = u
    state = features[-1] if len(features) == 2 else 2 * features[0]
    return tokens * T * W * (min(chunk or chunked.CHUNK, T) + 4 * state)


@register_flop_formula(torch.ops.knotgpt.lane_scan)
def _forward_flops(u, features, gain, decay, doc_start, mean, chunk, *_, out_shape=None, **__) -> int:
    return _scan_flops(u, features, chunk)


@register_flop_formula(torch.ops.knotgpt.lane_scan_backward)
def _backward_flops(
    grad, u, features, gain, decay, doc_start, mean, chunk, segment, gain_grad, decay_grad, *_, out_shape=None, **__
) -> int:
    passes = 1 + (gain_grad or decay_grad)
    state = features[-1] if len(features) == 2 else 2 * features[0]
    return passes * _scan_flops(u, features, chunk) + decay_grad * 8 * state * u[0] * u[1] * u[2]


# ---- Public functions -------------------------------------------------------


def lane_scan(
    u: Tensor, features: Tensor, gain: Tensor, *, decay: Tensor | None = None, doc_start: Tensor | None = None,
    mean: bool = False, window: int | None = None, chunk: int = 0, segment: int = 0, backend: str = "auto"
) -> Tensor:
    """
    Returns y_t = m_t sum over s <= t in t's document of kappa(t, s) u_s, (B, T, W) in u's dtype.

    Arguments:
        u            (B, T, W)       bfloat16, float16, float32 or float64
        features     float64, without a gradient: (F,), frequencies w in turns a token; or (P, K), a table whose row p
                     is that of a document's token p, its last row also that of all tokens behind it
        gain         (F,) or (H, F)  g, for all channels or for each of H heads of W / H neighbouring ones; float32 or
                     float64
        decay        gain's shape    a >= 0, of frequencies only; None: 0
        doc_start    (B, T) int32    the first token of each token's document; None: one document
        mean         divides each sum by the number of tokens of the document up to t
        window       kappa is 0 from this distance on, of frequencies only; None: nowhere
        chunk        tokens of a chunk in "chunked" and "banded"; 0: their choice. Loops and Triton have their own
        segment      tokens of a segment in "triton", rounded up to whole chunks; 0: as many segments as fill a card
        backend      one of the following

    Backends:
        "reference"     the T x T matrix
        "chunked"       PyTorch, linear in T
        "banded"        PyTorch, of a window only: O(T window)
        "loops"         the CPU's, which Numba compiles
        "triton"        CUDA, no float64
        "auto"          banded with a window; else triton for CUDA tensors (not float64), on a CPU with Numba loops,
                        else chunked

    There are gradients for u, gain and decay, once. Raises ValueError for wrong shapes, dtypes, devices, backends; for
    contents (a decay below 0, doc_start) on a CPU only and not in a compiled graph.
    """
    _check(u, features, gain, decay, doc_start, window, chunk, segment, backend)
    gain = gain[None] if gain.ndim == 1 else gain
    decay = decay[None] if decay is not None and decay.ndim == 1 else decay
    if backend == "reference":
        return lane_scan_reference(u, features, gain, decay, doc_start, mean, window)
    if window is not None:
        return chunked.banded(u, features, gain, decay, doc_start, mean, window, chunk)
    if backend == "auto":
        backend = _best_backend(u)
    return _forward_op(u, features, gain, decay, doc_start, mean, chunk, segment, backend)


def _best_backend(u: Tensor) -> str:
    if u.is_cuda and triton is not None and u.dtype != torch.float64:
        return "triton"
    return "loops" if loops_serve(u) else "chunked"


def lane_scan_step(
    state: Tensor | None, u: Tensor, features: Tensor, gain: Tensor, positions: Tensor, *, decay: Tensor | None = None,
    mean: bool = False
) -> tuple[Tensor, Tensor]:
    """
    Takes t more tokens of B rows. Returns y (B, t, W) in u's dtype and the new state.

    state (B, H, X, D) as this function returned it, D = W / H and X = 2 F for frequencies or K; None at a row's start.
    It is float32, float64 for float64 u. u (B, t, W); positions (B, t) integers: each token's place in its document,
    0 where one begins. The other arguments are lane_scan's. There are no gradients for gain and decay.
    """
    # heads
    gain = (gain[None] if gain.ndim == 1 else gain).detach()
    if decay is not None:
        decay = (decay[None] if decay.ndim == 1 else decay).detach()
    B = len(u)
    values = u.unflatten(2, (len(gain), -1)).transpose(1, 2)
    if state is None:
        columns = features.shape[-1] * (1 if features.ndim == 2 else 2)
        state = torch.zeros(B, len(gain), columns, values.shape[-1], dtype=sum_dtype(u), device=u.device)

    # slice by slice
    sums = []
    for x, places in zip(values.to(state.dtype).split(step.SLICE, 2), positions.split(step.SLICE, 1)):
        y, state = step.advance(state, x, features, gain, decay, places)
        sums.append(y)
    y = torch.cat(sums, 2).transpose(1, 2).flatten(2)
    if mean:
        y = y / (positions + 1)[..., None].to(y.dtype)
    return y.to(u.dtype), state


def _check(u, features, gain, decay, doc_start, window, chunk, segment, backend):
    """Raises lane_scan's ValueErrors."""
    # shapes
    check_shape("u", u, "(B, T, W)", (None, None, None))
    B, T, W = u.shape
    is_table = isinstance(features, Tensor) and features.ndim == 2
    check_shape("features", features, "(F,) or (P, K)", (None, None) if is_table else (None,))
    count = features.shape[-1]
    has_heads = isinstance(gain, Tensor) and gain.ndim == 2
    check_shape("gain", gain, "(F,) or (H, F)", (None, count) if has_heads else (count,))
    if has_heads and W % len(gain):
        raise ValueError(f"gain has {len(gain)} heads, which must divide u's {W} channels; give other gains")
    if decay is not None:
        check_shape("decay", decay, "of gain's shape", tuple(gain.shape))
    if doc_start is not None:
        check_shape("doc_start", doc_start, "(B, T)", (B, T))

    # dtypes and devices
    check_dtype("u", u, FLOATS)
    check_dtype("features", features, (torch.float64,))
    for name, x in dict(gain=gain, decay=decay).items():
        if x is not None:
            check_dtype(name, x, (torch.float32, torch.float64))
    if doc_start is not None:
        check_dtype("doc_start", doc_start, (torch.int32,))
    for name, x in dict(features=features, gain=gain, decay=decay, doc_start=doc_start).items():
        if x is not None:
            check_device(name, x, "u", u)

    _check_options(u, is_table, decay, window, chunk, segment, backend)

    # contents; a look at them would make a GPU wait, or break a graph
    check_documents(doc_start)
    if decay is None or decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (decay < 0).any():
        raise ValueError(f"decay must be >= 0; its smallest is {decay.min().item():.6g}")


def _check_options(u, is_table, decay, window, chunk, segment, backend):
    """Raises lane_scan's ValueErrors for options that exclude each other."""
    check_backend(backend, BACKENDS, u, "'chunked' or 'auto'")
    if is_table and not (decay is None and window is None):
        raise ValueError("a table has neither decay nor window, which are of frequencies; leave them out")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    for name, tokens in dict(chunk=chunk, segment=segment).items():
        if tokens < 0:
            raise ValueError(f"{name} must be at least 1, or 0 for the backend's choice; got {tokens}")
    windowed = ("auto", "banded", "reference")
    if window is None and backend == "banded" or window is not None and backend not in windowed:
        raise ValueError(f"a window is for the backends 'banded' and 'reference', and 'banded' needs one; got window "
                         f"{window} and backend {backend!r}")
    if backend == "triton":
        check_no_float64(backend, (u.dtype,), "'chunked' or 'reference'")
