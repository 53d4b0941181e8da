"""
Gated linear attention with one decay a token and head: a causal scan whose state is an M x D matrix, in chunks.

    S_i = e^{g_i} S_{i-1} + k_i v_i'      out_i = S_i' q_i = sum over j <= i of e^{F_i - F_j} (q_i . k_j) v_j      F_i = sum over t <= i of g_t, g_t <= 0

with S = 0 at the start of every document and no normaliser: append a column of ones to v and divide by it. q, k (B, T, H, M), v (B, T, H, D), g (B, T, H).

Chunks of C tokens. S_c, M x D, is the state that enters chunk c; f = F from the chunk's start on, f_C its last:
    S_{c+1} = e^{f_C} S_c + sum_j e^{f_C - f_j} k_j v_j'        out_i = e^{f_i} S_c' q_i + sum over j <= i in the chunk of e^{f_i - f_j} (q_i . k_j) v_j
Every exponent is <= 0 and a difference inside one chunk, so that nothing overflows and no precision is lost to the length of the sequence: a factor's relative
error is half a unit in the last place of f, 4e-6 in float32 where a chunk decays by e^-64.
Backward, with u_i the gradient of out_i, the same products and the mirrored scan R (queries and gradients of later chunks):
    dq_i = sum_j e^{F_i - F_j} (u_i . v_j) k_j      dk_j = sum_i e^{F_i - F_j} (u_i . v_j) q_i      dv_j = sum_i e^{F_i - F_j} (q_i . k_j) u_i
    dg_t = sum over j < t <= i of e^{F_i - F_j} (q_i . k_j)(u_i . v_j)
dg is summed by where j and i lie, before, in or after t's chunk: a difference of running sums over the whole sequence would leave the rounding of all T tokens in it.

Work for one token of one head, e bytes an element (counted, masked pairs included; one more reading of k and v, u and q where segments run side by side):
    forward    2 C (M + D) + 4 M D FLOPs       e (3 M + 3 D + 2 M D / C) bytes      32 FLOPs a byte at M = D = C = 64 in bfloat16: bound by memory
    backward   2 C (3 M + 2 D) + 8 M D FLOPs   e (5 M + 4 D + 3 M D / C) bytes      48
    kept for the backward pass: the inputs and the chunk states, e M D / C bytes; decode: M D numbers a head whatever the length

Sources: Yang et al., Gated Linear Attention Transformers, arxiv.org/abs/2312.06635, and Dao and Gu, Mamba-2, arxiv.org/abs/2405.21060: the chunked form.
On a CPU compiled loops take four tokens at a time and pass over the state once for them (kernels/gated_linear_attention_loops.py): 2 C (M + D) + 4 M D FLOPs with
C = 4, and backward three times as many. They keep a state for every 64 tokens only where the decays may want a gradient. The chunks in PyTorch serve without Numba.

Status: the CPU's loops are measured (benchmarks/gated_linear_attention.py); the Triton kernels never ran on a GPU: they are tested in Triton's interpreter and compiled
ahead of time, and their launch table is a choice, not a measurement.
"""

from types import SimpleNamespace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import cpu_loops, loops_serve

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform: the PyTorch backends serve it
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function


def gated_linear_attention_reference(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, doc_start: Tensor | None = None) -> Tensor:
    """
    out_i = sum over j <= i in i's document of e^{F_i - F_j} (q_i . k_j) v_j, from the whole T x T matrix. Any device and floating dtype, differentiable.

    query, key (B, T, H, M); value (B, T, H, D); log_decay (B, T, H), <= 0 and finite, or None; doc_start (B, T) integer or None. Returns (B, T, H, D) in
    value's dtype. Sums run in float32, in float64 for float64 values; F in float64.
    """
    dtype, T = torch.promote_types(value.dtype, torch.float32), value.shape[1]
    query, key, values = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    index = torch.arange(T, device=value.device)
    allowed = index <= index[:, None]
    if doc_start is not None:
        allowed = allowed & (index >= doc_start[:, None, :, None])
    pairs = (query @ key.transpose(-1, -2)).masked_fill(~allowed, 0.0)
    if log_decay is not None:
        total = log_decay.double().cumsum(1).transpose(1, 2)
        pairs = pairs * (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, 0.0).exp().to(dtype)
    return (pairs @ values).transpose(1, 2).to(value.dtype)


# ---- Triton kernels -----------------------------------------------------------------------------------------------------------------------------------
# Pointers are moved to a chunk's first token of one batch row and head in int64; offsets inside a tile are int32. Operands of products are bfloat16 where the
# values are, else float32 (as TF32 for float16, whose range a state can leave; as three TF32 products for float32). Sums are float32.

@jit
def _tile(ptr, stride, rows, x0, X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) of a matrix of `rows` x X, from its column x0 on; 0 outside it."""
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
    """f (CHUNK,): the running sum of a chunk's log-decay, constant after its last token. Below -104 e^g is 0 in float32; -inf - -inf would be NaN."""
    offs_t = tl.arange(0, CHUNK)
    b_g = tl.load(ptr + offs_t * stride, mask=offs_t < rows, other=0.0).to(tl.float32)
    return tl.cumsum(tl.where(b_g < -104.0, -104.0, b_g), 0)


@jit
def _pair_factors(b_f, b_doc, DECAY: tl.constexpr, DOCS: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK, CHUNK): e^{f_i - f_j} where j <= i in one document, else 0. b_doc: start of i's document, from the chunk's first token."""
    offs_t = tl.arange(0, CHUNK)
    allowed = offs_t[:, None] >= offs_t[None, :]
    if DOCS:
        allowed = allowed & (b_doc[:, None] <= offs_t[None, :])
    if DECAY:
        return tl.exp(tl.where(allowed, b_f[:, None] - b_f[None, :], float("-inf")))
    return tl.where(allowed, 1.0, 0.0)


@jit
def _gla_state_kernel(key_ptr, value_ptr, log_decay_ptr, doc_start_ptr, state_ptr, total_ptr, carry_ptr,
                      key_b, key_t, key_h, value_b, value_t, value_h, decay_b, decay_t, decay_h, doc_b, H, T, N, SEGMENTS, SEGMENT_CHUNKS,
                      M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                      OPERAND: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr):
    """
    The state that enters every chunk, from the keys and values before it; with REVERSE the one behind every chunk, from queries (as key) and gradients (as
    value) behind it. A program walks through one segment of chunks, for one head and block of the state. Without state_ptr it writes only what the segment
    adds (total_ptr) and the factor on what came before (carry_ptr); with all three it starts from the other segments' totals.
    """
    pid = tl.program_id(0)
    h, segment, b = pid % H, (pid // H) % SEGMENTS, (pid // H // SEGMENTS).to(tl.int64)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    m0, d0 = (tl.program_id(1) // D_BLOCKS) * BLOCK_M, (tl.program_id(1) % D_BLOCKS) * BLOCK_D
    offs_t = tl.arange(0, CHUNK)
    key_ptr += b * key_b + h * key_h
    value_ptr += b * value_b + h * value_h

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

    first = segment * SEGMENT_CHUNKS
    count = tl.minimum(SEGMENT_CHUNKS, N - first)
    for i in range(0, count):
        c = first + (count - 1 - i if REVERSE else i)
        start = c.to(tl.int64) * CHUNK
        rows = tl.minimum(T - c * CHUNK, CHUNK)
        if state_ptr is not None:
            _store_tile(state_ptr + (((b * H + h) * N + c) * M + m0) * D_STORED, b_state, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
        b_k = _tile(key_ptr + start * key_t, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_v = _tile(value_ptr + start * value_t, value_t, rows, d0, D, CHUNK, BLOCK_D).to(tl.float32)
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
        b_state = tl.dot(tl.trans(b_k), (b_v * b_weight[:, None]).to(OPERAND), b_state * kept, input_precision=PRECISION)
        carry = carry * kept
    if state_ptr is None:
        _store_tile(total_ptr + segment * (M * D_STORED), b_state, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
        tl.store(carry_ptr + segment, carry)


@jit
def _gla_out_kernel(query_ptr, key_ptr, value_ptr, log_decay_ptr, doc_start_ptr, state_ptr, out_ptr,
                    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, decay_b, decay_t, decay_h, doc_b, H, T, N,
                    M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                    OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """One chunk's outputs of one head: the pairs inside the chunk, and its queries on the state that enters it."""
    pid = tl.program_id(0)
    h, c, b = pid % H, (pid // H) % N, (pid // H // N).to(tl.int64)
    start = c.to(tl.int64) * CHUNK
    rows = tl.minimum(T - c * CHUNK, CHUNK)
    offs_t = tl.arange(0, CHUNK)
    query_ptr += b * query_b + h * query_h + start * query_t
    key_ptr += b * key_b + h * key_h + start * key_t
    value_ptr += b * value_b + h * value_h + start * value_t
    state_ptr += ((b * H + h) * N + c) * M * D_STORED
    out_ptr += ((b * T + start) * H + h) * D

    b_f = tl.zeros((CHUNK,), tl.float32)
    b_doc = tl.zeros((CHUNK,), tl.int32)
    if log_decay_ptr is not None:
        b_f = _decay_sums(log_decay_ptr + b * decay_b + h * decay_h + start * decay_t, decay_t, rows, CHUNK)
    b_enter = tl.exp(b_f)
    if doc_start_ptr is not None:
        b_doc = tl.load(doc_start_ptr + b * doc_b + start + offs_t, mask=offs_t < rows, other=0) - c * CHUNK
        b_enter = tl.where(b_doc < 0, b_enter, 0.0)

    b_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        b_q = _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_pairs = tl.dot(b_q, tl.trans(b_k), b_pairs, input_precision=PRECISION)
    b_weights = (b_pairs * _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)).to(OPERAND)

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
def _gla_bwd_kernel(query_ptr, key_ptr, value_ptr, grad_ptr, log_decay_ptr, doc_start_ptr, state_ptr, behind_ptr, dquery_ptr, dkey_ptr, dvalue_ptr, ddecay_ptr,
                    query_b, query_t, query_h, key_b, key_t, key_h, value_b, value_t, value_h, grad_b, grad_t, grad_h, decay_b, decay_t, decay_h, doc_b, H, T, N,
                    M: tl.constexpr, D: tl.constexpr, D_STORED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
                    OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """One chunk's gradients of one head, from its tokens, the state that enters it (state_ptr) and the one behind it (behind_ptr)."""
    pid = tl.program_id(0)
    h, c, b = pid % H, (pid // H) % N, (pid // H // N).to(tl.int64)
    start = c.to(tl.int64) * CHUNK
    rows = tl.minimum(T - c * CHUNK, CHUNK)
    offs_t = tl.arange(0, CHUNK)
    query_ptr += b * query_b + h * query_h + start * query_t
    key_ptr += b * key_b + h * key_h + start * key_t
    value_ptr += b * value_b + h * value_h + start * value_t
    grad_ptr += b * grad_b + h * grad_h + start * grad_t
    state_ptr += ((b * H + h) * N + c) * M * D_STORED
    behind_ptr += ((b * H + h) * N + c) * M * D_STORED
    token = (b * T + start) * H + h

    b_f = tl.zeros((CHUNK,), tl.float32)
    b_doc = tl.zeros((CHUNK,), tl.int32)
    if log_decay_ptr is not None:
        b_f = _decay_sums(log_decay_ptr + b * decay_b + h * decay_h + start * decay_t, decay_t, rows, CHUNK)
    f_end = tl.sum(tl.where(offs_t == CHUNK - 1, b_f, 0.0), 0)
    b_enter, b_leave, kept = tl.exp(b_f), tl.exp(f_end - b_f), tl.exp(f_end)
    if doc_start_ptr is not None:
        doc_ptr = doc_start_ptr + b * doc_b + start
        b_doc = tl.load(doc_ptr + offs_t, mask=offs_t < rows, other=0) - c * CHUNK
        last_doc = tl.load(doc_ptr + rows - 1) - c * CHUNK
        b_enter = tl.where(b_doc < 0, b_enter, 0.0)
        b_leave = tl.where(offs_t >= last_doc, b_leave, 0.0)
        kept = tl.where(last_doc < 0, kept, 0.0)

    # One matrix of pairs and one accumulator live at a time: registers are what is short.
    b_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        b_q = _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
        b_pairs = tl.dot(b_q, tl.trans(b_k), b_pairs, input_precision=PRECISION)
    b_weights = (b_pairs * _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)).to(OPERAND)
    for d0 in range(0, D, BLOCK_D):
        b_dv = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for m0 in range(0, M, BLOCK_M):
            b_k = _tile(key_ptr, key_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND)
            b_behind = _tile(behind_ptr + m0 * D_STORED, D_STORED, M - m0, d0, D_STORED, BLOCK_M, BLOCK_D)
            b_dv = tl.dot(b_k, b_behind, b_dv, input_precision=PRECISION)
        b_u = _tile(grad_ptr, grad_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_dv = tl.dot(tl.trans(b_weights), b_u, b_dv * b_leave[:, None], input_precision=PRECISION)
        _store_tile(dvalue_ptr + token * D, b_dv, H * D, rows, d0, D, CHUNK, BLOCK_D)

    b_pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        b_u = _tile(grad_ptr, grad_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_v = _tile(value_ptr, value_t, rows, d0, D, CHUNK, BLOCK_D).to(OPERAND)
        b_pairs = tl.dot(b_u, tl.trans(b_v), b_pairs, input_precision=PRECISION)
    b_weights = (b_pairs * _pair_factors(b_f, b_doc, log_decay_ptr is not None, doc_start_ptr is not None, CHUNK)).to(OPERAND)
    # Of dg: pairs that end at a token less those inside the chunk that begin there, both from the same rounded b_weights, so that they cancel where they must.
    b_ends = tl.zeros((CHUNK,), tl.float32)
    b_begins = tl.zeros((CHUNK,), tl.float32)  # pairs from a token to one behind the chunk
    b_through = tl.zeros((BLOCK_M,), tl.float32)  # pairs from before the chunk to behind it
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
            b_ends += tl.sum(b_dq * _tile(query_ptr, query_t, rows, m0, M, CHUNK, BLOCK_M).to(OPERAND).to(tl.float32), 1)
        _store_tile(dquery_ptr + token * M, b_dq, H * M, rows, m0, M, CHUNK, BLOCK_M)
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
    if ddecay_ptr is not None:
        b_dg = tl.cumsum(b_ends, 0, reverse=True) + tl.cumsum(b_begins, 0) - b_begins + tl.sum(b_through, 0) * kept
        tl.store(ddecay_ptr + token + offs_t * H, b_dg.to(ddecay_ptr.dtype.element_ty), mask=offs_t < rows)


# ---- Host functions: Triton -----------------------------------------------------------------------------------------------------------------------------

# By the major number of the compute capability (0: any other) and the bytes of an operand: tokens of a chunk, largest block of M and D, and warps and stages of
# each kernel. Chosen for what compiles without spills, not measured.
LAUNCH = {(0, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 2), bwd=(8, 1)),
          (9, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 2), bwd=(4, 1)),
          (10, 2): dict(chunk=64, block=64, state=(4, 3), out=(4, 1), bwd=(4, 1)),
          (0, 4): dict(chunk=32, block=32, state=(4, 2), out=(4, 2), bwd=(8, 1))}
PROGRAMS = 264         # the state kernel has about so many, two for each multiprocessor of an H200, where the sequence can be cut into segments of
SEGMENT_CHUNKS = 16    # chunks or more


def _launch(value: Tensor) -> dict:
    major = torch.cuda.get_device_capability(value.device)[0] if value.is_cuda else 0
    operand = _operand(value.dtype).itemsize
    return LAUNCH.get((major, operand), LAUNCH[0, operand])


def _operand(dtype: torch.dtype) -> torch.dtype:
    """What values of a dtype are multiplied as, and their states kept in: a state can leave float16's range."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _block(size: int, most: int) -> int:
    """The largest of 16, 32 and 64, up to `most`, whose multiples cover `size` with at most a quarter more than those of 16 do: 64 for 64, 32 for 65 and 129."""
    covered = lambda block: -(-size // block) * block
    return max(block for block in (16, 32, 64) if block <= most and covered(block) <= 1.25 * covered(16))


def _constants(M: int, D: int, dtype: torch.dtype, launch: dict) -> dict:
    return dict(M=M, D=D, D_STORED=_stored(D), CHUNK=launch["chunk"], BLOCK_M=_block(M, launch["block"]), BLOCK_D=_block(D, launch["block"]),
                OPERAND=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, PRECISION="tf32" if dtype == torch.float16 else "tf32x3")


def _stored(D: int) -> int:
    """Columns of a stored state: its rows are whole words of 16 bytes, whatever D is."""
    return -(-D // 8) * 8


def _state_shape(B: int, T: int, H: int, M: int, D: int, chunk: int) -> tuple[int, ...]:
    return B * H, -(-T // chunk), M, _stored(D)


def _strides(*tensors: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> tuple[int, ...]:
    decay = (0, 0, 0) if log_decay is None else log_decay.stride()
    return *(stride for x in tensors for stride in x.stride()[:3]), *decay, 0 if doc_start is None else doc_start.stride(0)


def _triton_states(key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, reverse: bool) -> Tensor:
    """The states that enter the chunks, or with reverse those behind them: (B*H, N, M, D rounded up)."""
    (B, T, H, M), D, launch = key.shape, value.shape[-1], _launch(value)
    constants = _constants(M, D, value.dtype, launch)
    states = torch.empty(_state_shape(B, T, H, M, D, launch["chunk"]), dtype=_operand(value.dtype), device=value.device)
    N = states.shape[1]
    blocks = -(-M // constants["BLOCK_M"]) * -(-D // constants["BLOCK_D"])
    segments = max(1, min(PROGRAMS // (B * H * blocks), N // SEGMENT_CHUNKS))
    segment_chunks = -(-N // segments)
    segments = -(-N // segment_chunks)
    totals = carries = None
    if segments > 1:
        totals = torch.empty(B * H, segments, *states.shape[2:], dtype=torch.float32, device=value.device)
        carries = torch.empty(B * H, segments, dtype=torch.float32, device=value.device)
    warps, stages = launch["state"]
    for target in (None, states) if segments > 1 else (states,):
        _gla_state_kernel[(B * H * segments, blocks)](
            key, value, log_decay, doc_start, target, totals, carries, *_strides(key, value, log_decay=log_decay, doc_start=doc_start),
            H, T, N, segments, segment_chunks, **constants, REVERSE=reverse, num_warps=warps, num_stages=stages)
    return states


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """The kernels take any strides but the last dimension's, which is 1."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _triton_forward(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, states (B*H, N, M, D rounded up))"""
    query, key, value, doc_start = _rows(query, key, value, doc_start)
    (B, T, H, M), D, launch = key.shape, value.shape[-1], _launch(value)
    with torch.cuda.device_of(value):
        states = _triton_states(key, value, log_decay, doc_start, False)
        out = torch.empty(B, T, H, D, dtype=value.dtype, device=value.device)
        N, (warps, stages) = states.shape[1], launch["out"]
        _gla_out_kernel[(B * H * N,)](
            query, key, value, log_decay, doc_start, states, out, *_strides(query, key, value, log_decay=log_decay, doc_start=doc_start),
            H, T, N, **_constants(M, D, value.dtype, launch), num_warps=warps, num_stages=stages)
    return out, states


def _triton_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, states: Tensor,
                     decay_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, grad, doc_start = _rows(query, key, value, grad, doc_start)
    (B, T, H, M), D, launch = key.shape, value.shape[-1], _launch(value)
    dquery, dkey, dvalue, ddecay = _empty_gradients(query, key, value, log_decay if decay_grad else None)
    with torch.cuda.device_of(value):
        behind = _triton_states(query, grad, log_decay, doc_start, True)
        N, (warps, stages) = states.shape[1], launch["bwd"]
        _gla_bwd_kernel[(B * H * N,)](
            query, key, value, grad, log_decay, doc_start, states, behind, dquery, dkey, dvalue, ddecay if decay_grad else None,
            *_strides(query, key, value, grad, log_decay=log_decay, doc_start=doc_start),
            H, T, N, **_constants(M, D, value.dtype, launch), num_warps=warps, num_stages=stages)
    return dquery, dkey, dvalue, ddecay


# ---- Host functions: PyTorch, where there is no Triton or no Numba -----------------------------------------------------
# Chunk-major: (N, B*H, C, X), so that any run of chunks is one batch of products without a copy.

GROUP = 4096   # tokens times heads that are worked on at once: what they need stays in a CPU's cache


def _cpu_chunk(T: int, M: int, D: int) -> int:
    """Tokens of a chunk. Small states are cheaper than many pairs."""
    return min(32 if M * D < 2048 else 64, T)


def _gather(x: Tensor, chunk: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Chunks first to last of x (B, T, H, X) as (last - first, B*H, chunk, X), zeros after the last token."""
    x = x[:, first * chunk:last * chunk]
    if missing := (last - first) * chunk - x.shape[1]:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    x = x.unflatten(1, (last - first, chunk)).permute(1, 0, 3, 2, 4)
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).flatten(1, 2)


def _scatter(chunks: Tensor, out: Tensor, first: int):
    """Chunks (n, B*H, C, X), the first of them number `first`, to their places in out (B, T, H, X)."""
    n, _, chunk, _ = chunks.shape
    rows, chunks = out[:, first * chunk:(first + n) * chunk], chunks.unflatten(1, (len(out), -1)).permute(1, 0, 3, 2, 4)
    if rows.shape[1] == n * chunk:
        rows.unflatten(1, (n, chunk)).copy_(chunks)
    else:
        rows.copy_(chunks.flatten(1, 2)[:, :rows.shape[1]])


class _Chunks:
    """How the tokens are cut, and the factors of the recurrence, none above 1, as (N, B*H, ...)."""
    def __init__(self, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None):
        B, T, H, M = key.shape
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        self.chunk = chunk = _cpu_chunk(T, M, value.shape[-1])
        self.N = N = -(-T // chunk)
        per_group = max(1, GROUP // (B * H * chunk))
        self.groups = [(first, min(first + per_group, N)) for first in range(0, N, per_group)]
        self.index = torch.arange(chunk, device=key.device)
        self.f = self.doc = None
        f = torch.zeros(N, B * H, chunk, dtype=self.dtype, device=key.device)
        # Exponents stay in the dtype's normal range, since -inf and denormal results make exp ten to a hundred times as slow on a CPU.
        self.least = -80.0 if self.dtype == torch.float32 else -700.0
        if log_decay is not None:
            self.f = f = _gather(log_decay[..., None], chunk, 0, N, self.dtype)[..., 0].clamp_min_(self.least).cumsum(-1)
        self.enter, self.leave, self.keep = (x.clamp_min(self.least).exp_().mul_(x > self.least) for x in (f, f[..., -1:] - f, f[..., -1]))
        if doc_start is not None:
            doc = torch.cat([doc_start, doc_start[:, -1:].expand(B, N * chunk - T)], 1).view(B, N, chunk).transpose(0, 1)
            self.doc = doc = doc - chunk * torch.arange(N, device=doc.device)[:, None, None]  # (N, B, C), counted from the chunk's start
            for factor, seen in ((self.enter, doc < 0), (self.leave, doc[..., -1:] <= self.index), (self.keep, doc[..., -1] < 0)):
                factor.unflatten(1, (B, H)).mul_(seen.unsqueeze(2))

    def pair_factors(self, first: int, last: int) -> Tensor:
        """e^{f_i - f_j} where j <= i in one document, else 0: (n, B*H, C, C), without decay and documents (C, C)."""
        if self.f is None:
            factors = torch.ones(self.chunk, self.chunk, dtype=self.dtype, device=self.index.device)
        else:
            f = self.f[first:last]
            factors = (f[..., :, None] - f[..., None, :]).clamp_(self.least, 0.0).exp_()
        factors.tril_()
        if self.doc is None:
            return factors
        same = (self.index >= self.doc[first:last, :, :, None]).to(self.dtype)
        return factors * same.repeat_interleave(self.enter.shape[1] // same.shape[1], 1)


def _flush_(states: Tensor) -> Tensor:
    """Zero for what has decayed to the edge of the normal range, in place: products with denormal numbers are many times as slow on a CPU."""
    return torch.ops.aten.hardshrink.out(states, 1e-35 if states.dtype == torch.float32 else 1e-300, out=states)


def _add_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x + a b, in place, over two batch dimensions."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return x


def _chunked_forward(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, states (N, B*H, M, D))"""
    (B, _, H, M), D, cut = key.shape, value.shape[-1], _Chunks(key, value, log_decay, doc_start)
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    states = torch.empty(cut.N, B * H, M, D, dtype=cut.dtype, device=value.device)
    states[0] = 0
    for first, last in cut.groups:
        q, k, v = (_gather(x, cut.chunk, first, last, cut.dtype) for x in (query, key, value))
        weights = (q @ k.transpose(-1, -2)).mul_(cut.pair_factors(first, last))
        added = k.mul_(cut.leave[first:last, ..., None]).transpose(-1, -2) @ v
        for c in range(first, min(last, cut.N - 1)):
            torch.addcmul(added[c - first], states[c], cut.keep[c, :, None, None], out=states[c + 1])
        result = q.mul_(cut.enter[first:last, ..., None]) @ _flush_(states[first:last])
        _scatter(_add_product(result, weights, v), out, first)
    return out, states


def _chunked_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, states: Tensor,
                      decay_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cut = _Chunks(key, value, log_decay, doc_start)
    dquery, dkey, dvalue, ddecay = _empty_gradients(query, key, value, log_decay if decay_grad else None)
    after = torch.zeros_like(states[0])
    for first, last in reversed(cut.groups):
        q, k, v, u = (_gather(x, cut.chunk, first, last, cut.dtype) for x in (query, key, value, grad))
        enter, leave, factors, state = cut.enter[first:last, ..., None], cut.leave[first:last, ..., None], cut.pair_factors(first, last), states[first:last]
        added = (q * enter).transpose(-1, -2) @ u
        behind = torch.empty(last - first + 1, *after.shape, dtype=cut.dtype, device=grad.device)
        behind[-1] = after
        for c in reversed(range(first, last)):
            torch.addcmul(added[c - first], behind[c - first + 1], cut.keep[c, :, None, None], out=behind[c - first])
        after, behind = _flush_(behind)[0], behind[1:]
        weights = (q @ k.transpose(-1, -2)).mul_(factors)
        dpairs = u @ v.transpose(-1, -2)
        dq = (u @ state.transpose(-1, -2)).mul_(enter)
        dk = (v @ behind.transpose(-1, -2)).mul_(leave)
        if decay_grad:
            both = weights * dpairs
            both.diagonal(dim1=-2, dim2=-1).zero_()
            ends = both.sum(-1) - both.sum(-2) + (dq * q).sum(-1)
            begins = F.pad((dk * k).sum(-1)[..., :-1], (1, 0))
            through = cut.keep[first:last] * (state * behind).sum((-1, -2))
            dg = ends.flip(-1).cumsum(-1).flip(-1) + begins.cumsum(-1) + through[..., None]
            _scatter(dg[..., None], ddecay[..., None], first)
        dweights = dpairs.mul_(factors)
        _scatter(_add_product(dq, dweights, k), dquery, first)
        _scatter(_add_product(dk, dweights.transpose(-1, -2), q), dkey, first)
        _scatter(_add_product((k @ behind).mul_(leave), weights.transpose(-1, -2), u), dvalue, first)
    return dquery, dkey, dvalue, ddecay


# ---- Host functions: the CPU's loops ----------------------------------------------------------------------------------

def _loop_decay(value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None) -> Tensor:
    """The decays (B, T, H) in float64, 0 at a document's start."""
    T = value.shape[1]
    if log_decay is None:
        decay = torch.ones(value.shape[:3], dtype=torch.float64)
    else:
        decay = log_decay.double().clamp_min(-700.0).exp()  # a normal number: others make exp many times as slow
    if doc_start is None:
        return decay.contiguous()
    return decay.masked_fill((doc_start == torch.arange(T, dtype=doc_start.dtype))[..., None], 0.0).contiguous()


def _arrays(*tensors: Tensor, dtype: torch.dtype) -> list:
    """Contiguous arrays of a dtype, no copies where the tensors are so."""
    return [x.detach().to(dtype).contiguous().numpy() for x in tensors]


def _loop_states(key: Tensor, value: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    """
    The shape of the states that are kept for the decays' gradient, those of all rows and heads in one dimension: for one
    whose size can be 1, torch.compile would make a graph of its own.
    """
    (B, T, H, M), D = key.shape, value.shape[-1]
    return B * H * (0 if log_decay is None else cpu_loops("gated_linear_attention.cpu").stored_states(T)), D, M


def _loops_forward(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None,
                   doc_start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, states (B*H*N, D, M))"""
    dtype = torch.promote_types(value.dtype, torch.float32)
    out, states = torch.empty(value.shape, dtype=dtype), torch.empty(_loop_states(key, value, log_decay), dtype=dtype)
    decay = _loop_decay(value, log_decay, doc_start)
    arrays = _arrays(query, key, value, dtype=dtype)
    cpu_loops("gated_linear_attention.cpu").forward(*arrays, decay.numpy(), out.numpy(), states.numpy())
    return out.to(value.dtype), states


def _loops_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None,
                    doc_start: Tensor | None, states: Tensor,
                    decay_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, decay = (query, key, value), _loop_decay(value, log_decay, doc_start)
    gradients = [torch.empty(x.shape, dtype=states.dtype) for x in inputs]
    ddecay = torch.empty(log_decay.shape if decay_grad else (0, 0, 0), dtype=torch.float64)
    arrays = _arrays(grad, *inputs, dtype=states.dtype)
    cpu_loops("gated_linear_attention.cpu").backward(*arrays, decay.numpy(), states.numpy(),
                                                       *(x.numpy() for x in gradients), ddecay.numpy())
    gradients = [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs)]
    return *gradients, ddecay.to(log_decay.dtype) if decay_grad else value.new_empty(0)


# ---- Registration ---------------------------------------------------------------------------------------------------------------------------------------

def _empty_gradients(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients, contiguous; of the log-decay's, nothing without one."""
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value, log_decay) if x is not None]
    return *gradients, *(value.new_empty(0) for _ in range(4 - len(gradients)))


FORWARD = {"triton": _triton_forward, "chunked": _chunked_forward, "loops": _loops_forward}
BACKWARD = {"triton": _triton_backward, "chunked": _chunked_backward, "loops": _loops_backward}


@torch.library.custom_op("knotgpt::gated_linear_attention", mutates_args=())
def _forward_op(query: Tensor, key: Tensor, value: Tensor, log_decay: Optional[Tensor], doc_start: Optional[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    return FORWARD[backend](query, key, value, log_decay, doc_start)


@_forward_op.register_fake
def _(query, key, value, log_decay, doc_start, backend):
    (B, T, H, M), D = key.shape, value.shape[-1]
    if backend == "triton":
        shape = _state_shape(B, T, H, M, D, _launch(value)["chunk"])
        dtype = _operand(value.dtype)
    elif backend == "loops":
        shape, dtype = _loop_states(key, value, log_decay), torch.promote_types(value.dtype, torch.float32)
    else:
        shape, dtype = (-(-T // _cpu_chunk(T, M, D)), B * H, M, D), torch.promote_types(value.dtype, torch.float32)
    return value.new_empty(value.shape), value.new_empty(shape, dtype=dtype)


@torch.library.custom_op("knotgpt::gated_linear_attention_backward", mutates_args=())
def _backward_op(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Optional[Tensor], doc_start: Optional[Tensor], states: Tensor,
                 decay_grad: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return BACKWARD[backend](grad, query, key, value, log_decay, doc_start, states, decay_grad)


@_backward_op.register_fake
def _(grad, query, key, value, log_decay, doc_start, states, decay_grad, backend):
    return _empty_gradients(query, key, value, log_decay if decay_grad else None)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # of the states there is none


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    *tensors, states = ctx.saved_tensors
    *gradients, ddecay = _backward_op(grad, *tensors, states, ctx.needs_input_grad[3], ctx.backend)
    return *gradients, ddecay if ctx.needs_input_grad[3] else None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def _work(query: tuple, value: tuple) -> tuple[int, int, int, int]:
    """(tokens times heads, C as on a CPU, M, D) from shapes."""
    (B, T, H, M), D = query, value[-1]
    return B * T * H, _cpu_chunk(T, M, D), M, D


@register_flop_formula(torch.ops.knotgpt.gated_linear_attention)
def _forward_flops(query, key, value, *_, out_shape=None, **__) -> int:
    tokens, C, M, D = _work(query, value)
    return tokens * (2 * C * (M + D) + 4 * M * D)


@register_flop_formula(torch.ops.knotgpt.gated_linear_attention_backward)
def _backward_flops(grad, query, key, value, *_, out_shape=None, **__) -> int:
    tokens, C, M, D = _work(query, value)
    return tokens * (2 * C * (3 * M + 2 * D) + 8 * M * D)


# ---- Public functions -----------------------------------------------------------------------------------------------------------------------------------

BACKENDS = ("auto", "reference", "chunked", "loops", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _interpreted() -> bool:
    return not isinstance(_gla_out_kernel, triton.JITFunction)


def _check(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, doc_start: Tensor | None, backend: str):
    def shapes():  # text is made where it is needed: with dynamic shapes it cannot be part of a graph
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("query", query), ("key", key), ("value", value)))
    if query.ndim != 4 or value.ndim != 4 or query.shape != key.shape or key.shape[:3] != value.shape[:3] or min(*query.shape, *value.shape) < 1:
        raise ValueError(f"query and key must be (B, T, H, M) and value (B, T, H, D), none of them empty; got {shapes()}")
    B, T, H, _ = value.shape
    for name, x, shape in (("log_decay", log_decay, (B, T, H)), ("doc_start", doc_start, (B, T))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape} for {shapes()}; got {tuple(x.shape)}")
    for name, x in (("query", query), ("key", key), ("value", value), ("log_decay", log_decay), ("doc_start", doc_start)):
        if x is not None and x.device != value.device:
            raise ValueError(f"{name} is on {x.device}, value on {value.device}; move them to one device")
        if x is not None and x.dtype not in ((torch.int32,) if name == "doc_start" else DTYPES):
            raise ValueError(f"{name} must be {'int32' if name == 'doc_start' else 'float64, float32, bfloat16 or float16'}; got {x.dtype}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and (triton is None or not (value.is_cuda or _interpreted())):
        raise ValueError(f"backend 'triton' needs CUDA tensors and Triton; got tensors on {value.device}: use 'chunked' or 'auto'")
    if backend == "triton" and value.dtype == torch.float64:
        raise ValueError("backend 'triton' has no float64; use 'chunked' or 'reference'")
    if backend == "loops" and not loops_serve(value):
        raise ValueError(f"backend 'loops' needs Numba and tensors on a CPU; got tensors on {value.device}: use 'auto'")
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return  # a look at the contents would wait for the device, or break the graph
    if log_decay is not None and (log_decay > 0).any():
        raise ValueError(f"log_decay must be <= 0; its largest is {log_decay.max().item():.6g}")
    if doc_start is not None:
        index = torch.arange(T, dtype=torch.int32)
        if (doc_start < 0).any() or (doc_start > index).any() or (doc_start.diff(dim=1) < 0).any():
            raise ValueError("doc_start must hold for every token the index of its document's first token: 0 <= doc_start[b, t] <= t, never falling")


def gated_linear_attention(query: Tensor, key: Tensor, value: Tensor, *, log_decay: Tensor | None = None, doc_start: Tensor | None = None,
                           backend: str = "auto") -> Tensor:
    """
    out_i = sum over j <= i in i's document of e^{F_i - F_j} (q_i . k_j) v_j,  F_i = sum over t <= i of log_decay_t. No normaliser, no scale.

    query, key   (B, T, H, M)    any M; float32, bfloat16, float16 or float64; dense or one-hot alike (zeros are not skipped)
    value        (B, T, H, D)    any D; products run in its dtype on tensor cores (float16 and float32 as TF32 with float32's range), sums in float32
    log_decay    (B, T, H)       <= 0, best in float32; None: no decay. Factors below 2e-35 (1e-304 in float64) may count as 0, or as that: so does e^-inf
    doc_start    (B, T) int32    index of the first token of each token's document; None: one document
    backend      "reference": T x T matrix; "chunked": PyTorch, O(T (C + M) D); "loops": the CPU's, which Numba compiles;
                 "triton": CUDA; "auto": triton for CUDA tensors (not float64); on a CPU with Numba loops, but for both
                 passes of long rows of many channels; else chunked
    Returns (B, T, H, D) in value's dtype. Gradients for query, key, value and log_decay, once. Any strides; on a GPU those that are multiples of 16 elements load
    fastest: a column of ones after D - 1 values is best a slice of a wider tensor, value.new_ones(B, T, H, 80)[..., :65] with the values written to it.
    ValueError for wrong shapes, dtypes, devices and backends; for contents (log_decay above 0, doc_start) on a CPU only and not in a compiled graph.
    """
    _check(query, key, value, log_decay, doc_start, backend)
    if backend == "reference":
        return gated_linear_attention_reference(query, key, value, log_decay, doc_start)
    if backend == "auto":
        backend = _best_backend(query, key, value, log_decay)
    return _forward_op(query, key, value, log_decay, doc_start, backend)[0]


# Where the chunks' large products are as fast as the loops, both passes taken together: from this many tokens in a row and
# more channels than this of queries and of values on. Elsewhere the loops are, and forward they are everywhere
# (benchmarks/gated_linear_attention.py, two cores).
CHUNKED_TOKENS, CHUNKED_CHANNELS = 4096, 32


def _best_backend(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> str:
    if value.is_cuda and triton is not None and value.dtype != torch.float64:
        return "triton"
    if not loops_serve(value):
        return "chunked"
    inputs = [x for x in (query, key, value, log_decay) if x is not None]
    both_passes = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    wide = min(query.shape[-1], value.shape[-1]) > CHUNKED_CHANNELS
    return "chunked" if both_passes and wide and value.shape[1] >= CHUNKED_TOKENS else "loops"


def gated_linear_attention_step(state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    One more token: (out, state) with state = e^{log_decay} state + key value' and out = state' query.

    state (B, H, M, D), zeros at a document's start, best in float32: sums run in its dtype; query, key (B, H, M); value (B, H, D); log_decay (B, H), <= 0,
    or None. Returns out (B, H, D) in value's dtype and the new state. Differentiable; ValueError for wrong shapes.
    """
    B, H, M, D = state.shape
    if query.shape != (B, H, M) or key.shape != (B, H, M) or value.shape != (B, H, D) or log_decay is not None and log_decay.shape != (B, H):
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in dict(query=query, key=key, value=value, log_decay=log_decay).items() if x is not None)
        raise ValueError(f"for a state (B, H, M, D) = {tuple(state.shape)} query and key must be (B, H, M), value (B, H, D) and log_decay (B, H); got {got}")
    if log_decay is not None:
        state = state * log_decay.to(state.dtype).exp()[..., None, None]
    state = torch.addcmul(state, key.to(state.dtype)[..., None], value.to(state.dtype)[..., None, :])
    return (query.to(state.dtype)[..., None, :] @ state).squeeze(-2).to(value.dtype), state
