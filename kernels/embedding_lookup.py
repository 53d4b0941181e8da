"""
Rows of several tables for the same tokens, cast in the same pass; gradients of the tables without atomics, from tokens
that are sorted once for all of them.

    y_k = dtype(table_k[tokens])        dtable_k[v] = sum over the tokens n = v of dy_k[n]        k = 1 .. K

A stable sort brings the tokens of a row v of the tables together, its run, which begins at starts[v]. Text has a few
runs of several per cent of all tokens, many of a few, and more rows without any. So the sorted tokens are cut into
chunks of CHUNK, and a run is its whole chunks and what is left over:
    1. every chunk of one token alone is summed: in parallel, however long a run
    2. at the first whole chunk of a run the sums of all of them are joined
    3. every row of the gradient is written once: 2.'s sum and its tokens left over, at most 2 CHUNK - 2, or zeros
Sums are float32, in an order that depends on the tokens alone. Sizes depend on N and V alone: nothing waits for the
host.

Bytes for N tokens and tables (V, D) of w bytes a number, e bytes a number of the results, for each table; in brackets N
= 65,536, V = 50,304, D = 768, w = 4, e = 2:
    forward    N D (w + e): read rows (those that repeat come from a cache), write y                       [302 MB]
    backward   N D e + V D w: read dy once, write every row once                                           [255 MB]
               8 f N D / CHUNK: the sums of chunks, written and read, where a share f of the tokens is in them
                                                                                                       [25 f MB, in L2]
    sort       once for all tables: of 4-byte tokens with 8-byte places; 12 N + 4 V bytes are kept         [1 MB]
PyTorch's table(tokens).to(dtype), by its source, w = 4:
    eager      forward N D (12 + e); backward N D (8 + e) to widen dy and read it again, zeros V D 4, and above 3,072
               tokens, which every table sorts anew, sums of up to 10 of them, written, read and written to their rows
    compiled   forward N D (4 + e); backward zeros V D 4 and N D atomic additions, each a read and a write: those of a
               frequent token take turns at one address, in an order of no two runs
One addition a number: bound by memory.

Sources: pytorch/pytorch, Embedding.cu and EmbeddingBackwardKernel.cu (a sort, then sums of parts of runs), and its
decomposition of embedding_dense_backward.
Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch
table is a choice, not a measurement.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import (
    FLOATS,
    check_backend,
    check_device,
    check_dtype,
    check_shape,
    describe,
    jit,
    tl,
    triton,
    triton_operation,
    wrap_triton,
)


def embedding_lookup_reference(tokens: Tensor, tables: Sequence[Tensor],
                               dtype: torch.dtype | None = None) -> list[Tensor]:
    """
    Returns embedding_lookup's result by F.embedding and a cast: on any device, in any floating dtype, differentiable by
    autograd, which adds up in the table's dtype.
    """
    return [F.embedding(tokens, table).to(dtype or table.dtype) for table in tables]


# ---- Triton kernels ---------------------------------------------------------
# A program works on BLOCK columns of some rows; programs of the same rows are neighbours. Sums are float32. Columns
# from D on are read as 0 and not written, and so are tokens outside [0, V). Offsets of rows are int64. ids (N): the
# tokens sorted, those outside as -1 and V; order (N): their places; starts (V + 1).

@jit
def _columns(D: tl.constexpr, BLOCK: tl.constexpr):
    """Returns which rows or chunk a program works on, and its columns."""
    COLUMNS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    return tl.program_id(0) // COLUMNS, tl.program_id(0) % COLUMNS * BLOCK + tl.arange(0, BLOCK)


@jit
def _load(ptr, offs_r, stride, exists, offs_d, D: tl.constexpr):
    """Returns those columns of the rows, (rows, BLOCK); 0 where a row does not exist."""
    return tl.load(ptr + offs_r.to(tl.int64)[:, None] * stride + offs_d[None, :],
                   mask=exists[:, None] & (offs_d < D)[None, :], other=0.0)


@jit
def _store(ptr, b_rows, offs_r, exists, offs_d, D: tl.constexpr):
    """Writes those columns of the rows of a contiguous matrix."""
    tl.store(ptr + offs_r.to(tl.int64)[:, None] * D + offs_d[None, :], b_rows.to(ptr.dtype.element_ty),
             mask=exists[:, None] & (offs_d < D)[None, :])


@jit
def _embedding_lookup_fwd_kernel(tokens_ptr, table_ptr, y_ptr, table_row, N, V, D: tl.constexpr, ROWS: tl.constexpr,
                                 BLOCK: tl.constexpr):
    """Writes y (N, D)."""
    block, offs_d = _columns(D, BLOCK)
    offs_n = block * ROWS + tl.arange(0, ROWS)
    b_tokens = tl.load(tokens_ptr + offs_n, mask=offs_n < N, other=-1)
    b_y = _load(table_ptr, b_tokens, table_row, (b_tokens >= 0) & (b_tokens < V), offs_d, D)
    _store(y_ptr, b_y, offs_n, offs_n < N, offs_d, D)


@jit
def _common_row(ids_ptr, chunk, N, V, CHUNK: tl.constexpr):
    """Returns the row of the table that all of a chunk's tokens name; -1 if there is none."""
    first = tl.load(ids_ptr + chunk * CHUNK)
    last = tl.load(ids_ptr + chunk * CHUNK + CHUNK - 1, mask=chunk * CHUNK + CHUNK <= N, other=-1)
    return tl.where((first == last) & (first < V), first, -1)


@jit
def _embedding_lookup_bwd_chunks_kernel(g_ptr, ids_ptr, order_ptr, sums_ptr, g_row, N, V, D: tl.constexpr,
                                        CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Writes sums (chunks, D) of whole chunks; other rows stay unwritten."""
    chunk, offs_d = _columns(D, BLOCK)
    if _common_row(ids_ptr, chunk, N, V, CHUNK) >= 0:
        offs_n = chunk * CHUNK + tl.arange(0, CHUNK)
        b_sum = tl.sum(_load(g_ptr, tl.load(order_ptr + offs_n), g_row, offs_n < N, offs_d, D).to(tl.float32), 0)
        tl.store(sums_ptr + chunk.to(tl.int64) * D + offs_d, b_sum, mask=offs_d < D)


@jit
def _embedding_lookup_bwd_join_kernel(ids_ptr, starts_ptr, sums_ptr, joined_ptr, N, V, D: tl.constexpr,
                                      CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes joined (chunks, D): at a run's first whole chunk the sum of all of them. Other rows stay unwritten."""
    chunk, offs_d = _columns(D, BLOCK)
    v = _common_row(ids_ptr, chunk, N, V, CHUNK)
    if v >= 0:
        if tl.cdiv(tl.load(starts_ptr + v), CHUNK) == chunk:
            end = tl.load(starts_ptr + v + 1) // CHUNK
            b_sum = tl.zeros((BLOCK,), tl.float32)
            for start in range(chunk, end, ROWS):
                offs_c = start + tl.arange(0, ROWS)
                b_sum += tl.sum(_load(sums_ptr, offs_c, D, offs_c < end, offs_d, D), 0)
            tl.store(joined_ptr + chunk.to(tl.int64) * D + offs_d, b_sum, mask=offs_d < D)


@jit
def _embedding_lookup_bwd_rows_kernel(g_ptr, order_ptr, starts_ptr, joined_ptr, dtable_ptr, g_row, D: tl.constexpr,
                                      CHUNK: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Writes dtable (V, D), a row a program. AHEAD tokens are read before the first of them is added."""
    # the row's run: `whole` chunks of it are joined already, `left` tokens are not
    v, offs_d = _columns(D, BLOCK)
    start, end = tl.load(starts_ptr + v), tl.load(starts_ptr + v + 1)
    first = tl.cdiv(start, CHUNK)
    whole = tl.maximum(end // CHUNK - first, 0)
    left = end - start - whole * CHUNK

    # the sum
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if whole > 0:
        b_sum += tl.load(joined_ptr + first.to(tl.int64) * D + offs_d, mask=offs_d < D, other=0.0)
    for step in range(0, left, AHEAD):
        places, rows = (), ()
        for i in tl.static_range(AHEAD):
            n = start + step + i
            n += tl.where(n >= first * CHUNK, whole * CHUNK, 0)
            places += (tl.load(order_ptr + n, mask=step + i < left, other=0),)
        for i in tl.static_range(AHEAD):
            rows += (tl.load(g_ptr + places[i] * g_row + offs_d, mask=offs_d < tl.where(step + i < left, D, 0),
                             other=0.0),)
        for i in tl.static_range(AHEAD):
            b_sum += rows[i].to(tl.float32)
    tl.store(dtable_ptr + v.to(tl.int64) * D + offs_d, b_sum.to(dtable_ptr.dtype.element_ty), mask=offs_d < D)


# ---- Launches ---------------------------------------------------------------

# The same for every card. A warp is a program where it has to read addresses before what they point at: many wait at
# once, and none for another warp.
CHUNK = 16
WIDEST_BLOCK = 256
LAUNCH = dict(
    fwd=dict(ROWS=16, num_warps=4),
    chunks=dict(CHUNK=CHUNK, num_warps=1),
    join=dict(CHUNK=CHUNK, ROWS=32, num_warps=4),
    rows=dict(CHUNK=CHUNK, AHEAD=4, num_warps=1),
)
MOST = 2**31 - 2**15    # tokens, and rows of a table: int32 counts them, those past the end of the last program too


def _launch(name: str, D: int) -> dict:
    """Returns a kernel's constants and warps for tables of D columns."""
    return dict(D=D, BLOCK=min(triton.next_power_of_2(D), WIDEST_BLOCK)) | LAUNCH[name]


def _grid(rows: int, each: int, launch: dict) -> tuple[int]:
    """Returns the grid with a program for every block of columns of `each` rows."""
    return (-(-rows // each) * -(-launch["D"] // launch["BLOCK"]),)


def _rows(x: Tensor) -> Tensor:
    """Returns x as (rows, D) with neighbouring columns, in place where that is possible."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _sort(tokens: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the backward passes of all tables share: ids (N) int32, order (N) int64, starts (V + 1) int32."""
    ids, order = tokens.flatten().clamp(-1, V).to(torch.int32).sort(stable=True)
    rows = torch.arange(V + 1, dtype=torch.int32, device=ids.device)
    return ids, order, torch.searchsorted(ids, rows, out_int32=True)


# ---- Host functions, each the body of its registration ----------------------

@triton_operation("knotgpt::embedding_lookup", mutates_args=())
def _forward_op(tokens: Tensor, table: Tensor, dtype: torch.dtype, ids: Optional[Tensor], order: Optional[Tensor],
                starts: Optional[Tensor]) -> Tensor:
    """Returns y. ids, order and starts are the backward pass's; they are None where there is none."""
    V, D = table.shape
    y = torch.empty(*tokens.shape, D, dtype=dtype, device=table.device)
    tokens = tokens.flatten().contiguous()
    table = _rows(table)

    N = tokens.shape[0]
    launch = _launch("fwd", int(D))
    grid = _grid(N, launch["ROWS"], launch)
    with torch.cuda.device_of(table):
        wrap_triton(_embedding_lookup_fwd_kernel)[grid](tokens, table, y, table.stride(0), N, V, **launch)
    return y


@_forward_op.register_fake
def _(tokens, table, dtype, ids, order, starts):
    return torch.empty(*tokens.shape, table.shape[1], dtype=dtype, device=table.device)


@triton_operation("knotgpt::embedding_lookup_backward", mutates_args=())
def _backward_op(g: Tensor, ids: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns dtable."""
    g = _rows(g)
    N, V, D = ids.shape[0], starts.shape[0] - 1, int(g.shape[-1])
    dtable = torch.empty(V, D, dtype=dtype, device=g.device)
    sums = torch.empty(-(-N // CHUNK), D, dtype=torch.float32, device=g.device)
    joined = torch.empty(-(-N // CHUNK), D, dtype=torch.float32, device=g.device)

    with torch.cuda.device_of(g):
        # whole chunks
        launch = _launch("chunks", D)
        kernel = wrap_triton(_embedding_lookup_bwd_chunks_kernel)
        kernel[_grid(N, CHUNK, launch)](g, ids, order, sums, g.stride(0), N, V, **launch)

        # runs of whole chunks
        launch = _launch("join", D)
        kernel = wrap_triton(_embedding_lookup_bwd_join_kernel)
        kernel[_grid(N, CHUNK, launch)](ids, starts, sums, joined, N, V, **launch)

        # rows of the table
        launch = _launch("rows", D)
        kernel = wrap_triton(_embedding_lookup_bwd_rows_kernel)
        kernel[_grid(V, 1, launch)](g, order, starts, joined, dtable, g.stride(0), **launch)
    return dtable


@_backward_op.register_fake
def _(g, ids, order, starts, dtype):
    return torch.empty(starts.shape[0] - 1, g.shape[-1], dtype=dtype, device=g.device)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[3:])
    ctx.table_dtype = inputs[1].dtype


def _backward(ctx, g):
    return None, _backward_op(g, *ctx.saved_tensors, ctx.table_dtype), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "triton")
MOST_TABLES = 8


def embedding_lookup(tokens: Tensor, tables: Sequence[Tensor], dtype: torch.dtype | None = None,
                     backend: str = "auto") -> list[Tensor]:
    """
    Returns [table[tokens] in dtype for every table], each (..., D), contiguous.

    tokens         (...)         int32 or int64 in [0, V). Others are an error of the caller's: "reference" raises (on a
                                 GPU by an assertion there), "triton" gives rows of zeros and leaves them out of the
                                 gradients
    tables         1 to 8 of     (V, D), a list or tuple, of one shape, dtype (bfloat16, float16, float32 or float64)
                                 and device, the tokens'
    dtype          of the results; None: the tables'
    backend        "reference": PyTorch; "triton": fused, fewer than 2^31 - 2^15 tokens and rows, no float64; "auto":
                   triton for CUDA tensors where it can, else reference

    Gradients for the tables, once, dense, in their dtype, added up in float32 and the same in every run ("reference":
    as PyTorch does it); a table that needs none costs none. The tokens are sorted if a table needs one, in the forward
    pass. Both backends work under torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape,
    dtype, device or option.
    """
    _check(tokens, tables, dtype, backend)
    dtype = dtype or tables[0].dtype
    if backend == "auto":
        backend = "triton" if tokens.is_cuda and triton is not None and _fits(tokens, tables[0], dtype) else "reference"
    if backend == "reference":
        return embedding_lookup_reference(tokens, tables, dtype)

    plan = (None, None, None)
    if torch.is_grad_enabled() and any(table.requires_grad for table in tables):
        plan = _sort(tokens, tables[0].shape[0])
    return [_forward_op(tokens, table, dtype, *plan) for table in tables]


def _fits(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the kernels can count these tokens and rows and have these dtypes."""
    return tokens.numel() < MOST and table.shape[0] < MOST and torch.float64 not in (table.dtype, dtype)


def _check(tokens, tables, dtype, backend):
    """Raises embedding_lookup's ValueErrors."""
    # tokens
    check_shape("tokens", tokens, "(...)", (...,))
    check_dtype("tokens", tokens, (torch.int32, torch.int64))

    # tables
    if not isinstance(tables, (list, tuple)) or not 1 <= len(tables) <= MOST_TABLES:
        number = f" of {len(tables)}" if isinstance(tables, (list, tuple)) else ""
        raise ValueError(f"tables must be a list or tuple of 1 to {MOST_TABLES} tensors; "
                         f"got {describe(tables)}{number}")
    for table in tables:
        check_shape("tables", table, "(V, D)", (None, None))
        check_dtype("tables", table)
        if table.shape != tables[0].shape or table.dtype != tables[0].dtype:
            raise ValueError(f"tables must have one shape and dtype; got {describe(tables[0])} and {describe(table)}")
        check_device("tables", table, "tokens", tokens)

    # options
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be None, bfloat16, float16, float32 or float64; got {dtype}")
    check_backend(backend, BACKENDS, tokens)
    if backend == "triton" and not _fits(tokens, tables[0], dtype):
        raise ValueError(f"backend 'triton' takes fewer than {MOST} tokens and rows and no float64; got "
                         f"{describe(tokens)}, {describe(tables[0])} and dtype {dtype}: use 'reference' or 'auto'")
