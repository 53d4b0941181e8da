"""
Gated linear attention on a GPU: the chunks of __init__.py in Triton, forward and backward.

Three kernels: the states that enter all chunks, or the mirrored ones behind them; the outputs of a chunk; the gradients
of a chunk. A long sequence of few heads is cut into segments of chunks that are scanned side by side, twice: the first
scan makes what each segment adds, the second one starts from the others' sums.

Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement.
"""

import torch
from torch import Tensor

from kernels.backend import jit, launch_entry, operand_dtype, tl, with_unit_stride
from kernels.gated_linear_attention.reference import empty_gradients

# ---- Triton kernels ---------------------------------------------------------
# Pointers are moved to a chunk's first token of one batch row and head in int64; offsets inside a tile are int32.
# Operands of products are bfloat16 where the values are, else float32 (as TF32 for float16, whose range a state can
# leave; as three TF32 products for float32). Sums are float32.


@jit
def _tile(ptr, stride, rows, x0, X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns (ROWS, COLUMNS) of a matrix of `rows` x X, from its column x0 on; 0 outside it."""
    offs_r, offs_x = tl.arange(0, ROWS), x0 + tl.arange(0, COLUMNS)
    mask = (offs_r < rows)[:, None]
    if X % COLUMNS != 0:
        mask = mask & (offs_x < X)[None, :]
    return tl.load(ptr + offs_r[:, None] * stride + offs_x[None, :], mask=mask, other=0.0)


@jit
def _store_tile(ptr, b_x, stride, rows, x0, X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs_r, offs_x = tl.arange(0, ROWS), x0 + tl.arange(0, COLUMNS)
    mask = (offs_r < rows)[:, None]
    if X % COLUMNS != 0:
        mask = mask & (offs_x < X)[None, :]
    tl.store(ptr + offs_r[:, None] * stride + offs_x[None, :], b_x.to(ptr.dtype.element_ty), mask=mask)


@jit
def _decay_sums(ptr, stride, rows, CHUNK: tl.constexpr):
    """
    Returns f (CHUNK,): the running sum of a chunk's log-decay, constant after its last token. Below -104 e^g is 0 in
    float32; -inf - -inf would be NaN.
    """
    offs_t = tl.arange(0, CHUNK)
    b_g = tl.load(ptr + offs_t * stride, mask=offs_t < rows, other=0.0).to(tl.float32)
    return tl.cumsum(tl.where(b_g < -104.0, -104.0, b_g), 0)


@jit
def _pair_factors(b_f, b_doc, DECAY: tl.constexpr, DOCS: tl.constexpr, CHUNK: tl.constexpr):
    """
    Returns (CHUNK, CHUNK): e^{f_i - f_j} where j <= i in one document, else 0. b_doc: start of i's document, from the
    chunk's first token.
    """
    offs_t = tl.arange(0, CHUNK)
    allowed = offs_t[:, None] >= offs_t[None, :]
    if DOCS:
        allowed = allowed & (b_doc[:, None] <= offs_t[None, :])
    if DECAY:
        return tl.exp(tl.where(allowed, b_f[:, None] - b_f[None, :], float("-inf")))
    return tl.where(allowed, 1.0, 0.0)


@jit
def _chunk_of(H, T, N, CHUNK: tl.constexpr):
    """Returns head, chunk and batch row of a program that takes one chunk, and the chunk's first token and length."""
    pid = tl.program_id(0)
    h = pid % H
    c = (pid // H) % N
    b = (pid // H // N).to(tl.int64)
    return h, c, b, c.to(tl.int64) * CHUNK, tl.minimum(T - c * CHUNK, CHUNK)


@jit
def _entering(log_decay_ptr, decay_at, decay_t, doc_start_ptr, doc_at, rows, first, CHUNK: tl.constexpr):
    """
    Returns, (CHUNK,) each, f; the starts of the tokens' documents, from the chunk's first token; and the factors on the
    state that enters, e^{f_i}, or 0 where the document begins inside. decay_at, doc_at: where the chunk begins.
    """
    b_f = tl.zeros((CHUNK,), tl.float32)
    b_doc = tl.zeros((CHUNK,), tl.int32)
    if log_decay_ptr is not None:
        b_f = _decay_sums(log_decay_ptr + decay_at, decay_t, rows, CHUNK)
    b_enter = tl.exp(b_f)
    if doc_start_ptr is not None:
        offs_t = tl.arange(0, CHUNK)
        b_doc = tl.load(doc_start_ptr + doc_at + offs_t, mask=offs_t < rows, other=0) - first
        b_enter = tl.where(b_doc < 0, b_enter, 0.0)
    return b_f, b_doc, b_enter


@jit
def _products(
    a_ptr, a_t, b_ptr, b_t, rows, X: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns (CHUNK, CHUNK): the dot products of a chunk's rows of X numbers of a with those of b."""
    b_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for x0 in range(0, X, BLOCK):
        b_a = _tile(a_ptr, a_t, rows, x0, X, CHUNK, BLOCK).to(OPERAND)
        b_b = _tile(b_ptr, b_t, rows, x0, X, CHUNK, BLOCK).to(OPERAND)
        b_pairs = tl.dot(b_a, tl.trans(b_b), b_pairs, input_precision=PRECISION)
    return b_pairs


@jit
def _gla_state_kernel(
    key_ptr, value_ptr, log_decay_ptr, doc_start_ptr, state_ptr, total_ptr, carry_ptr,
    key_b, key_t, key_h, value_b, value_t, value_h, decay_b, decay_t, decay_h, doc_b, H, T, N, SEGMENTS, SEGMENT_CHUNKS,
    M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr
):
    """
    Makes the state that enters every chunk, from the keys and values before it; with REVERSE the one behind every
    chunk, from queries (as key) and gradients (as value) behind it. A program walks through one segment of chunks, for
    one head and block of the state. Without state_ptr it writes only what the segment adds (total_ptr) and the factor
    on what came before (carry_ptr); with all three it starts from the other segments' totals.
    """
    # which segment, and which block of the state
    pid = tl.program_id(0)
    h = pid % H
    segment = (pid // H) % SEGMENTS
    b = (pid // H // SEGMENTS).to(tl.int64)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m0, d0 = (tl.program_id(1) // D_BLOCKS) * BLOCK_M, (tl.program_id(1) % D_BLOCKS) * BLOCK_D
    offs_t = tl.arange(0, CHUNK)
    key_ptr += b * key_b + h * key_h
    value_ptr += b * value_b + h * value_h

    # the state that enters the segment
    b_state = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    carry = 1.0
    if total_ptr is not None:
        total_ptr += ((b * H + h) * SEGMENTS * M + m0) * D_STORED
        carry_ptr += (b * H + h) * SEGMENTS
    if (total_ptr is not None) and (state_ptr is not None):
        for i in range(0, SEGMENTS - 1 - segment if REVERSE else segment):
            other = SEGMENTS - 1 - i if REVERSE else i
            b_total = _tile(total_ptr + other * (M * D_STORED), D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_state = b_state * tl.load(carry_ptr + other) + b_total

    # chunk by chunk
    first = segment * SEGMENT_CHUNKS
    count = tl.minimum(SEGMENT_CHUNKS, N - first)
    for i in range(0, count):
        c = first + (count - 1 - i if REVERSE else i)
        start = c.to(tl.int64) * CHUNK
        rows = tl.minimum(T - c * CHUNK, CHUNK)
        if state_ptr is not None:
            at = state_ptr + (((b * H + h) * N + c) * M + m0) * D_STORED
            _store_tile(at, b_state, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
        b_k = _tile(key_ptr + start * key_t, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_v = _tile(value_ptr + start * value_t, value_t, rows, d0, D, CHUNK, BLOCK_D).to(tl.float32)

        # the weights of its tokens, and what is kept of the state
        b_weight = tl.full((CHUNK,), 1.0, tl.float32)
        kept = 1.0
        if log_decay_ptr is not None:
            b_f = _decay_sums(log_decay_ptr + b * decay_b + h * decay_h + start * decay_t, decay_t, rows, CHUNK)
            f_end = tl.sum(tl.where(offs_t == CHUNK - 1, b_f, 0.0), 0)
            b_weight = tl.exp(b_f) if REVERSE else tl.exp(f_end - b_f)
            kept = tl.exp(f_end)
        if doc_start_ptr is not None:
            doc_ptr = doc_start_ptr + b * doc_b + start
            last_doc = tl.load(doc_ptr + rows - 1) - c * CHUNK
            if REVERSE:
                seen = tl.load(doc_ptr + offs_t, mask=offs_t < rows, other=0) < c * CHUNK
            else:
                seen = offs_t >= last_doc
            b_weight = tl.where(seen, b_weight, 0.0)
            kept = tl.where(last_doc < 0, kept, 0.0)

        # the next state
        b_weighted = (b_v * b_weight[:, None]).to(OPERAND)
        b_state = tl.dot(tl.trans(b_k), b_weighted, b_state * kept, input_precision=PRECISION)
        carry = carry * kept
    if state_ptr is None:
        _store_tile(total_ptr + segment * (M * D_STORED), b_state, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
        tl.store(carry_ptr + segment, carry)


@jit
def _gla_out_kernel(
    query_ptr, key_ptr, value_ptr, log_decay_ptr, doc_start_ptr, state_ptr, out_ptr,
    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, decay_b, decay_t, decay_h, doc_b,
    H, T, N,
    M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Makes one chunk's outputs of one head: its pairs inside, and its queries on the state that enters it."""
    # where the chunk is
    h, c, b, start, rows = _chunk_of(H, T, N, CHUNK)
    query_ptr += b * query_b + h * query_h + start * query_t
    key_ptr += b * key_b + h * key_h + start * key_t
    value_ptr += b * value_b + h * value_h + start * value_t
    state_ptr += ((b * H + h) * N + c) * M * D_STORED
    out_ptr += ((b * T + start) * H + h) * D

    # the weights of its pairs
    b_f, b_doc, b_enter = _entering(
        log_decay_ptr, b * decay_b + h * decay_h + start * decay_t, decay_t, doc_start_ptr, b * doc_b + start, rows,
        c * CHUNK, CHUNK
    )
    b_pairs = _products(query_ptr, query_t, key_ptr, key_t, rows, M, CHUNK, BLOCK_M, OPERAND, PRECISION)
    b_factors = _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)
    b_weights = (b_pairs * b_factors).to(OPERAND)

    # the outputs
    for d0 in range(0, D, BLOCK_D):
        b_out = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            b_q = _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
            b_state = _tile(state_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_out = tl.dot(b_q, b_state, b_out, input_precision=PRECISION)
        b_v = _tile(value_ptr, value_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_out = tl.dot(b_weights, b_v, b_out * b_enter[:, None], input_precision=PRECISION)
        _store_tile(out_ptr, b_out, H * D, rows, d0, D, CHUNK, BLOCK_D)


@jit
def _gla_bwd_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, log_decay_ptr, doc_start_ptr, state_ptr, behind_ptr, dquery_ptr, dkey_ptr,
    dvalue_ptr, ddecay_ptr,
    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, grad_b, grad_t, grad_h,
    decay_b, decay_t, decay_h, doc_b, H, T, N,
    M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """
    Makes one chunk's gradients of one head, from its tokens, the state that enters it (state_ptr) and the one behind it
    (behind_ptr).
    """
    # where the chunk is
    h, c, b, start, rows = _chunk_of(H, T, N, CHUNK)
    offs_t = tl.arange(0, CHUNK)
    query_ptr += b * query_b + h * query_h + start * query_t
    key_ptr += b * key_b + h * key_h + start * key_t
    value_ptr += b * value_b + h * value_h + start * value_t
    grad_ptr += b * grad_b + h * grad_h + start * grad_t
    state_ptr += ((b * H + h) * N + c) * M * D_STORED
    behind_ptr += ((b * H + h) * N + c) * M * D_STORED
    token = (b * T + start) * H + h

    # the factors on the state that enters, of what leaves, and on the state behind
    b_f, b_doc, b_enter = _entering(
        log_decay_ptr, b * decay_b + h * decay_h + start * decay_t, decay_t, doc_start_ptr, b * doc_b + start, rows,
        c * CHUNK, CHUNK
    )
    f_end = tl.sum(tl.where(offs_t == CHUNK - 1, b_f, 0.0), 0)
    b_leave, kept = tl.exp(f_end - b_f), tl.exp(f_end)
    if doc_start_ptr is not None:
        last_doc = tl.load(doc_start_ptr + b * doc_b + start + rows - 1) - c * CHUNK
        b_leave = tl.where(offs_t >= last_doc, b_leave, 0.0)
        kept = tl.where(last_doc < 0, kept, 0.0)

    # dv. One matrix of pairs and one accumulator live at a time: registers are what is short.
    b_pairs = _products(query_ptr, query_t, key_ptr, key_t, rows, M, CHUNK, BLOCK_M, OPERAND, PRECISION)
    b_factors = _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)
    b_weights = (b_pairs * b_factors).to(OPERAND)
    for d0 in range(0, D, BLOCK_D):
        b_dv = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
            b_behind = _tile(behind_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_dv = tl.dot(b_k, b_behind, b_dv, input_precision=PRECISION)
        b_u = _tile(grad_ptr, grad_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_dv = tl.dot(tl.trans(b_weights), b_u, b_dv * b_leave[:, None], input_precision=PRECISION)
        _store_tile(dvalue_ptr + token * D, b_dv, H * D, rows, d0, D, CHUNK, BLOCK_D)

    # Of dg: pairs that end at a token less those inside the chunk that begin there, both from the same rounded
    # b_weights, so that they cancel where they must; pairs from a token to one behind the chunk; pairs from before the
    # chunk to behind it.
    b_pairs = _products(grad_ptr, grad_t, value_ptr, value_t, rows, D, CHUNK, BLOCK_D, OPERAND, PRECISION)
    b_factors = _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)
    b_weights = (b_pairs * b_factors).to(OPERAND)
    b_ends = tl.zeros((CHUNK,), tl.float32)
    b_begins = tl.zeros((CHUNK,), tl.float32)
    b_through = tl.zeros((BLOCK_M,), tl.float32)

    # dq
    for m0 in range(0, M, BLOCK_M):
        b_dq = tl.zeros((CHUNK, BLOCK_M), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            b_u = _tile(grad_ptr, grad_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
            b_state = _tile(state_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_dq = tl.dot(b_u, tl.trans(b_state), b_dq, input_precision=PRECISION)
            if ddecay_ptr is not None:
                b_behind = _tile(behind_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
                b_through += tl.sum(b_state.to(tl.float32) * b_behind.to(tl.float32), 1)
        b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_dq = tl.dot(b_weights, b_k, b_dq * b_enter[:, None], input_precision=PRECISION)
        if ddecay_ptr is not None:
            b_q = _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
            b_ends += tl.sum(b_dq * b_q.to(tl.float32), 1)
        _store_tile(dquery_ptr + token * M, b_dq, H * M, rows, m0, M, CHUNK, BLOCK_M)

    # dk
    for m0 in range(0, M, BLOCK_M):
        b_dk = tl.zeros((CHUNK, BLOCK_M), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            b_v = _tile(value_ptr, value_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
            b_behind = _tile(behind_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_dk = tl.dot(b_v, tl.trans(b_behind), b_dk, input_precision=PRECISION)
        b_dk = b_dk * b_leave[:, None]
        if ddecay_ptr is not None:
            b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND).to(tl.float32)
            b_behind_k = tl.sum(b_dk * b_k, 1)
            b_begins += b_behind_k
            b_ends += b_behind_k
        b_q = _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_dk = tl.dot(tl.trans(b_weights), b_q, b_dk, input_precision=PRECISION)
        if ddecay_ptr is not None:
            b_ends -= tl.sum(b_dk * b_k, 1)
        _store_tile(dkey_ptr + token * M, b_dk, H * M, rows, m0, M, CHUNK, BLOCK_M)

    # dg
    if ddecay_ptr is not None:
        b_dg = tl.cumsum(b_ends, 0, reverse=True) + tl.cumsum(b_begins, 0) - b_begins + tl.sum(b_through, 0) * kept
        tl.store(ddecay_ptr + token + offs_t * H, b_dg.to(ddecay_ptr.dtype.element_ty), mask=offs_t < rows)


# ---- Host functions ---------------------------------------------------------

# By the major number of the compute capability (0: any other) and the bytes of an operand: tokens of a chunk, largest
# block of M and D, and warps and stages of each kernel. Chosen for what compiles without spills, not measured.
LAUNCH = {
    (0, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 2), bwd=(8, 1)),
    (9, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 2), bwd=(4, 1)),
    (10, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 1), bwd=(4, 1)),
    (0, 4): dict(chunk=32, block=32, state=(4, 2), out=(4, 2), bwd=(8, 1)),
}
# The state kernel has about PROGRAMS programs, two for each multiprocessor of an H200, where the sequence can be cut
# into segments of SEGMENT_CHUNKS chunks or more.
PROGRAMS = 264
SEGMENT_CHUNKS = 16


def _block(size: int, most: int) -> int:
    """
    Returns the largest of 16, 32 and 64, up to `most`, whose multiples cover `size` with at most a quarter more than
    those of 16 do: 64 for 64, 32 for 65 and 129.
    """
    def covered(block: int) -> int:
        return -(-size // block) * block

    return max(block for block in (16, 32, 64) if block <= most and covered(block) <= 1.25 * covered(16))


def _constants(M: int, D: int, dtype: torch.dtype, launch: dict) -> dict:
    return dict(
        M=M,
        D=D,
        D_STORED=_stored(D),
        CHUNK=launch["chunk"],
        BLOCK_M=_block(M, launch["block"]),
        BLOCK_D=_block(D, launch["block"]),
        OPERAND=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        PRECISION="tf32" if dtype == torch.float16 else "tf32x3",
    )


def _stored(D: int) -> int:
    """Returns the columns of a stored state: its rows are full words of 16 bytes, whatever D is."""
    return -(-D // 8) * 8


def state_shape(key: Tensor, value: Tensor) -> tuple[int, ...]:
    """Returns the shape of the chunks' states, (B H, N, M, D rounded up)."""
    B, T, H, M = key.shape
    return B * H, -(-T // launch_entry(LAUNCH, value)["chunk"]), M, _stored(value.shape[-1])


def _strides(*tensors: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> tuple[int, ...]:
    decay = (0, 0, 0) if log_decay is None else log_decay.stride()
    of_documents = 0 if doc_start is None else doc_start.stride(0)
    return *(stride for x in tensors for stride in x.stride()[:3]), *decay, of_documents


def _states(
    key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, reverse: bool
) -> Tensor:
    """Returns the states that enter the chunks, or with reverse those behind them: (B H, N, M, D rounded up)."""
    B, T, H, M = key.shape
    D = value.shape[-1]
    launch = launch_entry(LAUNCH, value)
    constants = _constants(M, D, value.dtype, launch)
    shape = state_shape(key, value)
    states = torch.empty(shape, dtype=operand_dtype(value.dtype), device=value.device)

    # segments
    N = shape[1]
    blocks = -(-M // constants["BLOCK_M"]) * -(-D // constants["BLOCK_D"])
    segments = max(1, min(PROGRAMS // (B * H * blocks), N // SEGMENT_CHUNKS))
    segment_chunks = -(-N // segments)
    segments = -(-N // segment_chunks)
    totals = None
    carries = None
    if segments > 1:
        totals = torch.empty(B * H, segments, *shape[2:], dtype=torch.float32, device=value.device)
        carries = torch.empty(B * H, segments, dtype=torch.float32, device=value.device)

    # where there are several, their totals first
    warps, stages = launch["state"]
    for target in (None, states) if segments > 1 else (states,):
        _gla_state_kernel[(B * H * segments, blocks)](
            key, value, log_decay, doc_start, target, totals, carries,
            *_strides(key, value, log_decay=log_decay, doc_start=doc_start), H, T, N, segments, segment_chunks,
            **constants, REVERSE=reverse, num_warps=warps, num_stages=stages
        )
    return states


def forward(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns (out, states (B H, N, M, D rounded up))."""
    query, key, value, doc_start = map(with_unit_stride, (query, key, value, doc_start))
    B, T, H, M = key.shape
    D = value.shape[-1]
    launch = launch_entry(LAUNCH, value)
    with torch.cuda.device_of(value):
        states = _states(key, value, log_decay, doc_start, False)
        out = torch.empty(B, T, H, D, dtype=value.dtype, device=value.device)
        N = states.shape[1]
        warps, stages = launch["out"]
        _gla_out_kernel[(B * H * N,)](
            query, key, value, log_decay, doc_start, states, out,
            *_strides(query, key, value, log_decay=log_decay, doc_start=doc_start), H, T, N,
            **_constants(M, D, value.dtype, launch), num_warps=warps, num_stages=stages
        )
    return out, states


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None,
    states: Tensor, decay_grad: bool
) -> tuple[Tensor, ...]:
    """Returns the four gradients; that of the log-decay is empty without decay_grad."""
    query, key, value, grad, doc_start = map(with_unit_stride, (query, key, value, grad, doc_start))
    B, T, H, M = key.shape
    D = value.shape[-1]
    launch = launch_entry(LAUNCH, value)
    *gradients, ddecay = empty_gradients(query, key, value, log_decay if decay_grad else None)
    with torch.cuda.device_of(value):
        behind = _states(query, grad, log_decay, doc_start, True)
        N = states.shape[1]
        warps, stages = launch["bwd"]
        _gla_bwd_kernel[(B * H * N,)](
            query, key, value, grad, log_decay, doc_start, states, behind, *gradients, ddecay if decay_grad else None,
            *_strides(query, key, value, grad, log_decay=log_decay, doc_start=doc_start), H, T, N,
            **_constants(M, D, value.dtype, launch), num_warps=warps, num_stages=stages
        )
    return *gradients, ddecay
