"""
Gated linear attention with one decay a token and head: a causal scan whose state is an M x D matrix, in chunks.

    S_i = e^{g_i} S_{i-1} + k_i v_i'                                          g_i <= 0
    out_i = S_i' q_i = sum over j <= i of e^{F_i - F_j} (q_i . k_j) v_j       F_i = sum over t <= i of g_t

with S = 0 at the start of every document and no normaliser: append a column of ones to v and divide by it.
q, k (B, T, H, M), v (B, T, H, D), g (B, T, H).

Chunks of C tokens. S_c, M x D, is the state that enters chunk c; f = F from the chunk's start on, f_C its last:
    S_{c+1} = e^{f_C} S_c + sum_j e^{f_C - f_j} k_j v_j'
    out_i = e^{f_i} S_c' q_i + sum over j <= i in the chunk of e^{f_i - f_j} (q_i . k_j) v_j
Every exponent is <= 0 and a difference inside one chunk, so that nothing overflows and no precision is lost to the
length of the sequence: a factor's relative error is half a unit in the last place of f, 4e-6 in float32 where a chunk
decays by e^-64.

Backward, with u_i the gradient of out_i, the same products and the mirrored scan R (queries and gradients of later
chunks):
    dq_i = sum_j e^{F_i - F_j} (u_i . v_j) k_j
    dk_j = sum_i e^{F_i - F_j} (u_i . v_j) q_i
    dv_j = sum_i e^{F_i - F_j} (q_i . k_j) u_i
    dg_t = sum over j < t <= i of e^{F_i - F_j} (q_i . k_j)(u_i . v_j)
dg is summed by where j and i lie, before, in or after t's chunk: a difference of running sums over the full sequence
would leave the rounding of all T tokens in it.

Work for one token of one head, e bytes an element (counted, masked pairs included; one more reading of k and v, u and q
where segments run side by side):
    forward    2 C (M + D) + 4 M D FLOPs       e (3 M + 3 D + 2 M D / C) bytes
    backward   2 C (3 M + 2 D) + 8 M D FLOPs   e (5 M + 4 D + 3 M D / C) bytes
32 and 48 FLOPs a byte at M = D = C = 64 in bfloat16: bound by memory. Kept for the backward pass: the inputs and the
chunk states, e M D / C bytes. Decode: M D numbers a head whatever the length.

Backends: reference.py; chunked.py, the chunks in PyTorch; chunked_triton.py, the chunks on a GPU; cpu.py, compiled
loops, which take four tokens at a time and pass over the state once for them: 2 C (M + D) + 4 M D FLOPs with C = 4, and
backward three times as many. They keep a state for every 64 tokens only where the decays may want a gradient.

Sources: Yang et al., Gated Linear Attention Transformers, arxiv.org/abs/2312.06635, and Dao and Gu, Mamba-2,
arxiv.org/abs/2405.21060: the chunked form.
Status: the CPU's loops are measured (benchmarks/gated_linear_attention.py); the Triton kernels never ran on a GPU.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    array,
    check_backend,
    check_device,
    check_documents,
    check_dtype,
    check_no_float64,
    cpu_loops,
    loops_serve,
    sum_dtype,
    triton,
)
from kernels.gated_linear_attention import chunked, chunked_triton
from kernels.gated_linear_attention.reference import empty_gradients, gated_linear_attention_reference

BACKENDS = ("auto", "reference", "chunked", "loops", "triton")

# Where the chunks' large products are as fast as the loops, both passes taken together: from this many tokens in a row
# and more channels than this of queries and of values on. Elsewhere the loops are, and forward they are everywhere
# (benchmarks/gated_linear_attention.py, two cores).
CHUNKED_TOKENS = 4096
CHUNKED_CHANNELS = 32


# ---- Host functions: the CPU's loops ----------------------------------------


def _loop_decay(value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> Tensor:
    """Returns the decays (B, T, H) in float64, 0 at a document's start."""
    if log_decay is None:
        decay = torch.ones(value.shape[:3], dtype=torch.float64)
    else:
        decay = log_decay.double().clamp_min(-700.0).exp()  # a normal number: others make exp many times as slow
    if doc_start is None:
        return decay.contiguous()
    starts = doc_start == torch.arange(value.shape[1], dtype=doc_start.dtype)
    return decay.masked_fill(starts[..., None], 0.0).contiguous()


def _loop_states(key: Tensor, value: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    """
    Returns the shape of the states that are kept for the decays' gradient, those of all rows and heads in one
    dimension: for one whose size can be 1, torch.compile would make a graph of its own.
    """
    B, T, H, M = key.shape
    states = 0 if log_decay is None else cpu_loops("gated_linear_attention.cpu").stored_states(T)
    return B * H * states, value.shape[-1], M


def _loops_forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, states (B H N, D, M))."""
    dtype = sum_dtype(value)
    out = torch.empty(value.shape, dtype=dtype)
    states = torch.empty(_loop_states(key, value, log_decay), dtype=dtype)
    decay = _loop_decay(value, log_decay, doc_start)
    arrays = [array(x, dtype) for x in (query, key, value)]
    cpu_loops("gated_linear_attention.cpu").forward(*arrays, decay.numpy(), out.numpy(), states.numpy())
    return out.to(value.dtype), states


def _loops_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None,
    states: Tensor, decay_grad: bool
) -> tuple[Tensor, ...]:
    """Returns the four gradients; that of the log-decay is empty without decay_grad."""
    inputs = (query, key, value)
    decay = _loop_decay(value, log_decay, doc_start)
    gradients = [torch.empty(x.shape, dtype=states.dtype) for x in inputs]
    ddecay = torch.empty(log_decay.shape if decay_grad else (0, 0, 0), dtype=torch.float64)
    cpu_loops("gated_linear_attention.cpu").backward(
        *(array(x, states.dtype) for x in (grad, *inputs)), decay.numpy(), states.numpy(),
        *(x.numpy() for x in gradients), ddecay.numpy()
    )
    gradients = [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs)]
    return *gradients, ddecay.to(log_decay.dtype) if decay_grad else value.new_empty(0)


# ---- Registration -----------------------------------------------------------

FORWARD = {"triton": chunked_triton.forward, "chunked": chunked.forward, "loops": _loops_forward}
BACKWARD = {"triton": chunked_triton.backward, "chunked": chunked.backward, "loops": _loops_backward}


@torch.library.custom_op("knotgpt::gated_linear_attention", mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return FORWARD[backend](query, key, value, log_decay, doc_start)


@_forward_op.register_fake
def _(query, key, value, log_decay, doc_start, backend):
    dtype = sum_dtype(value)
    if backend == "triton":
        shape = chunked_triton.state_shape(key, value)
        dtype = chunked_triton.operand_dtype(value.dtype)
    elif backend == "loops":
        shape = _loop_states(key, value, log_decay)
    else:
        shape = chunked.state_shape(key, value)
    return value.new_empty(value.shape), value.new_empty(shape, dtype=dtype)


@torch.library.custom_op("knotgpt::gated_linear_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None,
    states: Tensor, decay_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return BACKWARD[backend](grad, query, key, value, log_decay, doc_start, states, decay_grad)


@_backward_op.register_fake
def _(grad, query, key, value, log_decay, doc_start, states, decay_grad, backend):
    return empty_gradients(query, key, value, log_decay if decay_grad else None)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # of the states there is none


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    *tensors, states = ctx.saved_tensors
    decay_grad = ctx.needs_input_grad[3]
    *gradients, ddecay = _backward_op(grad, *tensors, states, decay_grad, ctx.backend)
    return *gradients, ddecay if decay_grad else None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def _sizes(query: tuple, value: tuple) -> tuple[int, int, int, int]:
    """Returns (tokens times heads, C as in PyTorch, M, D) from shapes."""
    B, T, H, M = query
    D = value[-1]
    return B * T * H, chunked.chunk_length(T, M, D), M, D


@register_flop_formula(torch.ops.knotgpt.gated_linear_attention)
def _forward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    tokens, C, M, D = _sizes(query, value)
    return tokens * (2 * C * (M + D) + 4 * M * D)


@register_flop_formula(torch.ops.knotgpt.gated_linear_attention_backward)
def _backward_flops(grad, query, key, value, *_, out_shape=None, **__) -> int:
    tokens, C, M, D = _sizes(query, value)
    return tokens * (2 * C * (3 * M + 2 * D) + 8 * M * D)


# ---- Public functions -------------------------------------------------------


def gated_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, log_decay: Tensor | None = None, doc_start: Tensor | None = None,
    backend: str = "auto"
) -> Tensor:
    """
    Returns out_i = sum over j <= i in i's document of e^{F_i - F_j} (q_i . k_j) v_j, F_i = sum over t <= i of
    log_decay_t. There is no normaliser and no scale.

    Arguments:
        query, key   (B, T, H, M)    any M; float32, bfloat16, float16 or float64; dense or one-hot alike (zeros are not
                                     skipped)
        value        (B, T, H, D)    any D; products run in its dtype on tensor cores (float16 and float32 as TF32 with
                                     float32's range), sums in float32
        log_decay    (B, T, H)       <= 0, best in float32; None: no decay. Factors below 2e-35 (1e-304 in float64) may
                                     count as 0, or as that: so does e^-inf
        doc_start    (B, T) int32    the first token of each token's document; None: one document
        backend      one of the following

    Backends:
        "reference"     the T x T matrix
        "chunked"       PyTorch, O(T (C + M) D)
        "loops"         the CPU's, which Numba compiles
        "triton"        CUDA, no float64
        "auto"          triton for CUDA tensors (not float64); on a CPU with Numba loops, but for both passes of long
                        rows of many channels; else chunked

    The result (B, T, H, D) has value's dtype. There are gradients for query, key, value and log_decay, once. Strides
    may be any; on a GPU those that are multiples of 16 elements load fastest: a column of ones after D - 1 values is
    best a slice of a wider tensor, value.new_ones(B, T, H, 80)[..., :65] with the values written to it.

    Raises ValueError for wrong shapes, dtypes, devices and backends; for contents (log_decay above 0, doc_start) on a
    CPU only and not in a compiled graph.
    """
    _check(query, key, value, log_decay, doc_start, backend)
    if backend == "reference":
        return gated_linear_attention_reference(query, key, value, log_decay, doc_start)
    if backend == "auto":
        backend = _best_backend(query, key, value, log_decay)
    return _forward_op(query, key, value, log_decay, doc_start, backend)[0]


def _best_backend(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> str:
    if value.is_cuda and triton is not None and value.dtype != torch.float64:
        return "triton"
    if not loops_serve(value):
        return "chunked"
    inputs = [x for x in (query, key, value, log_decay) if x is not None]
    both_passes = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    wide = min(query.shape[-1], value.shape[-1]) > CHUNKED_CHANNELS
    return "chunked" if both_passes and wide and value.shape[1] >= CHUNKED_TOKENS else "loops"


def gated_linear_attention_step(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Takes one more token. Returns out (B, H, D) in value's dtype and the new state, where
    state' = e^{log_decay} state + key value' and out = state'' query.

    state (B, H, M, D), zeros at a document's start, best in float32: sums run in its dtype; query, key (B, H, M); value
    (B, H, D); log_decay (B, H), <= 0, or None. It is differentiable. Raises ValueError for wrong shapes.
    """
    _check_step(state, query, key, value, log_decay)
    if log_decay is not None:
        state = state * log_decay.to(state.dtype).exp()[..., None, None]
    state = torch.addcmul(state, key.to(state.dtype)[..., None], value.to(state.dtype)[..., None, :])
    return (query.to(state.dtype)[..., None, :] @ state).squeeze(-2).to(value.dtype), state


# ---- Checks -----------------------------------------------------------------


def _shapes(**tensors: Tensor | None) -> str:
    """Returns the tensors' shapes in words."""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items() if x is not None)


def _check(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, backend: str
):
    """Raises gated_linear_attention's ValueErrors. Texts are made where they are needed: a graph cannot have them."""
    # shapes
    right = query.ndim == 4 and value.ndim == 4 and query.shape == key.shape and key.shape[:3] == value.shape[:3]
    if not right or min(*query.shape, *value.shape) < 1:
        raise ValueError(
            "query and key must be (B, T, H, M) and value (B, T, H, D), none of them empty; "
            f"got {_shapes(query=query, key=key, value=value)}"
        )
    B, T, H, _ = value.shape
    for name, x, shape in (("log_decay", log_decay, (B, T, H)), ("doc_start", doc_start, (B, T))):
        if x is not None and x.shape != shape:
            shapes = _shapes(query=query, key=key, value=value)
            raise ValueError(f"{name} must be {shape} for {shapes}; got {tuple(x.shape)}")

    # devices and dtypes
    for name, x in dict(query=query, key=key, value=value, log_decay=log_decay).items():
        if x is not None:
            check_device(name, x, "value", value)
            check_dtype(name, x)
    if doc_start is not None:
        check_device("doc_start", doc_start, "value", value)
        check_dtype("doc_start", doc_start, (torch.int32,))

    # the backend
    check_backend(backend, BACKENDS, value, "'chunked' or 'auto'")
    if backend == "triton":
        check_no_float64(backend, (value.dtype,), "'chunked' or 'reference'")

    # contents; a look at them would make a GPU wait, or break a graph
    check_documents(doc_start)
    if log_decay is None or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (log_decay > 0).any():
        raise ValueError(f"log_decay must be <= 0; its largest is {log_decay.max().item():.6g}")


def _check_step(state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None):
    """Raises gated_linear_attention_step's ValueErrors."""
    B, H, M, D = state.shape
    right = query.shape == (B, H, M) and key.shape == (B, H, M) and value.shape == (B, H, D)
    if not right or (log_decay is not None and log_decay.shape != (B, H)):
        got = _shapes(query=query, key=key, value=value, log_decay=log_decay)
        raise ValueError(
            f"for a state (B, H, M, D) = {tuple(state.shape)} query and key must be (B, H, M), value (B, H, D) and "
            f"log_decay (B, H); got {got}"
        )
