"""
Products of a vector with a random matrix of signs that is never stored: the large random projections of a model that
learns in a subspace.

    theta = S phi      phi (dim,), theta (rows,), S (rows, dim) of -1 and +1
    dphi = S' g        g (rows,), the gradient of theta; each of the two is the other's gradient

The signs come from a counter. The 32 signs of row i, columns 32 w to 32 w + 31, are the bits of the word mix(mix(i +
seed) - 1640531527 w), the lowest the first, 1 for +1. In numbers modulo 2^32 without sign, mix is

    x ^= x >> 16;  x *= 0x21f0aaad;  x ^= x >> 15;  x *= 0x735a2d97;  x ^= x >> 15

so that all devices have the same bits. Of S a call takes the rows first to first + rows - 1.

For D rows and n columns a product with a stored matrix has 2 D n FLOPs and reads D n bits at least. Here phi and theta
alone move, D + n numbers, and the time is arithmetic:
    reference   makes the sums of eight phi by their signs, 256 for each group of eight columns: D n / 8 reads of them,
                and as many 4-byte indices written and read. S' adds up the rows of equal signs of each group, D n / 8
                additions in memory, then multiplies the 256 sums with their signs
    loops       the same sums, but the words of some rows and columns at a time, whose tables and rows stay in the first
                cache: D n / 8 reads or additions, and about 12 operations on integers a word, 8 words at once or more
    triton      adds a number or its negative for every sign, in registers: 3 to 4 operations a sign

Numerics: sums run in float32, in float64 for float64, and are rounded once to the dtype of phi or g. Tasks and programs
have their rows by shape alone and their sums are added in a fixed order, without atomic additions: results repeat bit
for bit, on a CPU with any number of threads.

Source: Li, Farkhoor, Liu & Yosinski, Measuring the Intrinsic Dimension of Objective Landscapes, 2018,
arxiv.org/abs/1804.08838 (the projection); hash-prospector (the constants of mix). The products by tables are derived
here.
Status: the CPU's loops are measured (benchmarks/README.md); the Triton kernels never ran on a GPU: they are tested in
Triton's interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    array,
    check_backend,
    check_dtype,
    check_no_float64,
    check_shape,
    cpu_operation,
    jit,
    loops_serve,
    parallel_loops,
    sum_dtype,
    tl,
    triton,
    wide,
)

STRIDE = -1_640_531_527     # between the words of a row: 2^32 over the golden ratio, as a signed number
SIGNS_AT_ONCE = 2 ** 24     # signs, about, that the reference looks at in one go
MOST_ROWS = 2 ** 31 - 1     # the last row that has a number


# ---- The signs, and the reference -------------------------------------------


def mix(x: Tensor) -> Tensor:
    """Returns x, int32, well mixed: its bits are those of a number without sign, products lose what passes 32."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * 0x735A2D97
    return x ^ (x >> 15 & 0x1FFFF)


def words(first: int, stop: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Returns the first `count` words of the rows first to stop - 1, (rows, count) int32."""
    rows = torch.arange(first, stop, dtype=torch.int32, device=device) + seed % 2 ** 31
    columns = torch.arange(count, dtype=torch.int32, device=device) * STRIDE
    return mix(mix(rows)[:, None] + columns)


def sign_bytes(first: int, stop: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """
    Returns the signs of the rows first to stop - 1 as 256 j + byte, (rows, groups) int32, groups = ceil(dim / 8): bit b
    of group j's byte is column 8 j + b, and 1 stands for +1.
    """
    groups = -(-dim // 8)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=device)
    byte = (words(first, stop, -(-groups // 4), seed, device)[..., None] >> shifts & 255).flatten(1)[:, :groups]
    return byte + 256 * torch.arange(groups, dtype=torch.int32, device=device)


def signs_of_bytes(like: Tensor) -> Tensor:
    """Returns the signs that each byte stands for, (256, 8), of like's dtype."""
    byte = torch.arange(256, device=like.device)
    bit = torch.arange(8, device=like.device)
    return (2 * (byte[:, None] >> bit & 1) - 1).to(like.dtype)


def table_of_sums(phi: Tensor) -> Tensor:
    """
    Returns the sums of eight numbers of phi (dim,) by their signs, (groups, 256): number `byte` of group j. A product
    with signs_of_bytes would be the same to rounding, which depends on the number of threads there.
    """
    dim, groups = phi.shape[0], -(-phi.shape[0] // 8)
    eights = torch.cat((phi, phi.new_zeros(8 * groups - dim))).view(groups, 8)
    sums = phi.new_zeros(groups, 1)
    for bit in range(8):
        number = eights[:, bit:bit + 1]
        sums = torch.cat((sums - number, sums + number), 1)
    return sums


def blocks_of_rows(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    """Yields some rows at a time: (first, the one after the last)."""
    size = max(1, SIGNS_AT_ONCE // max(dim, 1))
    for first in range(0, rows, size):
        yield first, min(rows, first + size)


def sign_projection_reference(phi: Tensor, rows: int, first: int = 0, seed: int = 0) -> Tensor:
    """Returns S phi, (rows,), by PyTorch's operations, on any device, in any floating dtype. It has no gradient."""
    dim = phi.shape[0]
    sums = table_of_sums(wide(phi)).flatten()
    results = []
    for start, stop in blocks_of_rows(rows, dim):
        index = sign_bytes(first + start, first + stop, dim, seed, phi.device)
        results.append(sums.index_select(0, index.flatten()).view(index.shape).sum(1))
    return torch.cat(results).to(phi.dtype)


def sign_projection_transposed_reference(g: Tensor, dim: int, first: int = 0, seed: int = 0) -> Tensor:
    """Returns S' g, (dim,), by PyTorch's operations, on any device, in any floating dtype. It has no gradient."""
    # rows of equal signs, summed for every group of eight columns
    groups, numbers = -(-dim // 8), wide(g)
    sums = numbers.new_zeros(256 * groups)
    for start, stop in blocks_of_rows(len(g), dim):
        index = sign_bytes(first + start, first + stop, dim, seed, g.device)
        sums.index_add_(0, index.flatten(), numbers[start:stop, None].expand(-1, groups).flatten())
    return (sums.view(groups, 256) @ signs_of_bytes(numbers)).flatten()[:dim].to(g.dtype)


# ---- Triton kernels ---------------------------------------------------------
# A program holds ROWS rows and 32 columns, the signs of a word, at a time. Arithmetic is float32 and uint32.

@jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@jit
def _signed(b_state, b_numbers):
    """
    Returns the numbers, (ROWS, 1) or (1, 32), with the signs of a word, (ROWS, 32). b_state (ROWS,): the mixed rows
    plus the word's step.
    """
    b_word = _mix(b_state)
    b_bits = (b_word[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    return tl.where(b_bits != 0, b_numbers, -b_numbers)


@jit
def _sign_projection_fwd_kernel(phi_ptr, theta_ptr, rows, first, dim, ROWS: tl.constexpr):
    """Makes ROWS numbers of theta (rows,). first: the first row's, with the seed added, modulo 2^32 as int32."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_state = _mix((offs_r + first).to(tl.uint32))
    b_sums = tl.zeros((ROWS, 32), tl.float32)
    for start in range(0, dim, 32):
        offs_c = start + tl.arange(0, 32)
        b_phi = tl.load(phi_ptr + offs_c, mask=offs_c < dim, other=0.0).to(tl.float32)
        b_sums += _signed(b_state, b_phi[None, :])
        b_state += 2654435769
    tl.store(theta_ptr + offs_r, tl.sum(b_sums, 1).to(theta_ptr.dtype.element_ty), mask=offs_r < rows)


@jit
def _sign_projection_bwd_kernel(g_ptr, partial_ptr, rows, first, dim, STEPS, ROWS: tl.constexpr):
    """Makes 32 numbers of a row of partial (programs, dim): sums over this program's STEPS tiles of rows."""
    b_step = tl.program_id(1).to(tl.uint32) * 2654435769
    b_sums = tl.zeros((ROWS, 32), tl.float32)
    for step in range(0, STEPS):
        offs_r = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        b_g = tl.load(g_ptr + offs_r, mask=offs_r < rows, other=0.0).to(tl.float32)
        b_sums += _signed(_mix((offs_r + first).to(tl.uint32)) + b_step, b_g[:, None])
    offs_c = tl.program_id(1) * 32 + tl.arange(0, 32)
    partial_ptr += tl.program_id(0).to(tl.int64) * dim
    tl.store(partial_ptr + offs_c, tl.sum(b_sums, 0), mask=offs_c < dim)


# ---- Host functions: Triton -------------------------------------------------

# By the major number of the compute capability (0: any other): rows of a tile, and warps. Chosen for what compiles
# without spills, not measured.
LAUNCH = {0: dict(ROWS=128, num_warps=4)}
PROGRAMS = 1024     # rows of partial sums, at most: what is written of them is little beside g


def _launch(capability: int) -> dict:
    """Returns the launch for a compute capability (90 for 9.0)."""
    return LAUNCH.get(capability // 10, LAUNCH[0])


def _constants(x: Tensor) -> dict:
    return _launch(10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0)


def _first_row(first: int, seed: int) -> int:
    """Returns first + seed modulo 2^32 as a signed number of 32 bits, as kernels take it."""
    return (first + seed % 2 ** 31 + 2 ** 31) % 2 ** 32 - 2 ** 31


def _triton_forward(phi: Tensor, rows: int, first: int, seed: int) -> Tensor:
    theta = phi.new_empty(rows)
    launch = _constants(phi)
    with torch.cuda.device_of(phi):
        _sign_projection_fwd_kernel[(triton.cdiv(rows, launch["ROWS"]),)](
            phi.contiguous(), theta, rows, _first_row(first, seed), len(phi), **launch
        )
    return theta


def _triton_transposed(g: Tensor, dim: int, first: int, seed: int) -> Tensor:
    launch = _constants(g)
    tiles = triton.cdiv(len(g), launch["ROWS"])
    steps = triton.cdiv(tiles, PROGRAMS)
    grid = triton.cdiv(tiles, steps), triton.cdiv(dim, 32)
    partial = torch.empty(grid[0], dim, dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):
        _sign_projection_bwd_kernel[grid](
            g.contiguous(), partial, len(g), _first_row(first, seed), dim, steps, **launch
        )
    return partial.sum(0).to(g.dtype)


# ---- Host functions: the CPU's loops ----------------------------------------

def _loops_forward(phi: Tensor, rows: int, first: int, seed: int) -> Tensor:
    theta = torch.empty(rows, dtype=sum_dtype(phi))
    table = table_of_sums(wide(phi)).flatten()
    parallel_loops("sign_projection.cpu").multiply(array(table), _first_row(first, seed), theta.numpy())
    return theta.to(phi.dtype)


def _loops_transposed(g: Tensor, dim: int, first: int, seed: int) -> Tensor:
    groups, loops = -(-dim // 8), parallel_loops("sign_projection.cpu")
    signs = signs_of_bytes(wide(g))
    partial = loops.add_rows(array(g), groups, _first_row(first, seed), array(signs))
    return torch.from_numpy(partial).sum(0)[:dim].to(g.dtype)


# ---- Registration -----------------------------------------------------------

def _forward_body(phi: Tensor, rows: int, first: int, seed: int, backend: str) -> Tensor:
    """Returns S phi, (rows,)."""
    project = dict(triton=_triton_forward, loops=_loops_forward).get(backend, sign_projection_reference)
    return project(phi, rows, first, seed)


def _transposed_body(g: Tensor, dim: int, first: int, seed: int, backend: str) -> Tensor:
    """Returns S' g, (dim,)."""
    project = dict(triton=_triton_transposed, loops=_loops_transposed).get(backend,
                                                                           sign_projection_transposed_reference)
    return project(g, dim, first, seed)


def _fake(x, size, first, seed, backend):
    return x.new_empty(size)


def _save(ctx, inputs, output):
    x, _, *ctx.options = inputs
    ctx.size = x.shape[0]


def _forward_backward(ctx, g):
    return _transposed_op(g, ctx.size, *ctx.options), None, None, None, None


def _transposed_backward(ctx, g):
    return _forward_op(g, ctx.size, *ctx.options), None, None, None, None


_forward_op = cpu_operation("knotgpt::sign_projection", _forward_body, _fake, _save, _forward_backward)
_transposed_op = cpu_operation("knotgpt::sign_projection_transposed", _transposed_body, _fake, _save,
                               _transposed_backward)


@register_flop_formula([torch.ops.knotgpt.sign_projection, torch.ops.knotgpt.sign_projection_transposed])
def _flops(x, size, *_, out_shape=None, **__) -> int:
    """Returns those of the product with a stored matrix, so that counts compare."""
    return 2 * x[0] * size


# ---- Public functions -------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")


def sign_projection(phi: Tensor, rows: int, first: int = 0, seed: int = 0, backend: str = "auto") -> Tensor:
    """
    Returns S phi, (rows,), in phi's dtype, for the rows first to first + rows - 1 of the matrix of signs S.

    phi           (dim,)     bfloat16, float16, float32 or float64, any stride
    rows, first   integers   at least 1 and 0; the last row is below 2^31 - 1
    seed          integer    of the matrix; only its remainder modulo 2^31 counts
    backend       "reference": PyTorch's operations; "loops": the CPU's, which Numba compiles; "triton": CUDA, no
                  float64; "auto": the device's, where it can, else reference

    It has a gradient for phi, which is sign_projection_transposed's result, once. It works under
    torch.compile(fullgraph=True). Raises a ValueError that names the argument for a wrong shape, dtype, number or
    backend.
    """
    _check("phi", phi, "(dim,)", "rows", rows, rows, first, backend)
    return _forward_op(phi, rows, first, seed, _choose(phi, backend))


def sign_projection_transposed(g: Tensor, dim: int, first: int = 0, seed: int = 0, backend: str = "auto") -> Tensor:
    """
    Returns S' g, (dim,), in g's dtype, of g (rows,). Arguments, gradient and errors are sign_projection's; dim is at
    least 1.
    """
    _check("g", g, "(rows,)", "dim", dim, len(g) if isinstance(g, Tensor) and g.dim() else 0, first, backend)
    return _transposed_op(g, dim, first, seed, _choose(g, backend))


def _choose(x: Tensor, backend: str) -> str:
    """Returns the backend, and that of "auto"."""
    if backend != "auto":
        return backend
    if x.is_cuda and triton is not None and x.dtype != torch.float64:
        return "triton"
    return "loops" if loops_serve(x) else "reference"


def _check(name, x, form, size_name, size, rows, first, backend):
    """Raises the public functions' ValueErrors."""
    check_shape(name, x, form, (None,))
    check_dtype(name, x)
    if size < 1:
        raise ValueError(f"{size_name} must be at least 1; got {size}")
    if first < 0 or first + rows > MOST_ROWS:
        raise ValueError(f"first must be at least 0 and the last row below 2^31 - 1; got first {first} and {rows} rows")
    check_backend(backend, BACKENDS, x)
    if backend == "triton":
        check_no_float64(backend, [x.dtype])
