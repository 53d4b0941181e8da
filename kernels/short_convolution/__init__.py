"""
Causal convolution of every channel by itself over a few tokens, which stays in the document, in one pass over memory.

    y_t = sum over s < n with s <= p_t of taps_{n-1-s} x_{t-s}        p_t: t's place in its document

x, y (B, T, C); taps (n, C), the last for the token itself.
x is 0 before a row's first token, or goes on from earlier ones: `padded` (B, n - 1 + T, C) is x behind the n - 1 inputs
before it.

Backward, with g the gradient of y:
    dx_j = sum over s < n with s <= p_{j+s} of taps_{n-1-s} g_{j+s}
    dtaps_{n-1-s} = sum over t with s <= p_t of g_t x_{t-s}
Both come of the same pairs (j, j + s): one pass that holds x_j and reads the n rows of g from j on has them all. Each
program or task adds up the taps' gradient over its own tokens, then it is added up over these: no atomic additions, and
the same bits in every run.

For N tokens of C channels, A = N C e bytes at e bytes a number (taps, positions and sums over many tokens aside):
    forward    2A: read x, write y             2 n N C FLOPs
    backward   3A: read x, g, write dx         4 n N C FLOPs
    kept for the backward pass: x, which the layer before or after it keeps
Four FLOPs a byte at n = 4 in bfloat16: bound by memory. Eager PyTorch moves 2A to 4A for each tap and operation.

Numerics: products and sums in float32, in float64 for float64 inputs, rounded once to x's dtype. What a token may not
see is not read, so that a NaN stays in its document.

Source: Fu et al., H3, 2022, arxiv.org/abs/2212.14052. The backward pass is derived here.
Status: the CPU's loops are measured (benchmarks/short_convolution.py); the Triton kernels never ran on a GPU: they are
tested in Triton's interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import (
    FLOATS,
    check_backend,
    check_device,
    check_dtype,
    check_shape,
    cpu_loops,
    cpu_operation,
    jit,
    loops_serve,
    tl,
    triton,
)


def short_convolution_reference(x: Tensor, taps: Tensor, positions: Tensor, padded: Tensor | None = None) -> Tensor:
    """
    Returns y, tap by tap, on any device and in any floating dtype; autograd differentiates it. Arguments are
    short_convolution's.

    Sums run in x's dtype, in float32 at least, and are rounded to x's once.
    """
    n = len(taps)
    T = positions.shape[1]
    dtype = _sum_dtype(x)
    if padded is None:
        padded = F.pad(x, (0, 0, n - 1, 0))
    padded = padded.to(dtype)
    y = padded[:, n - 1:] * taps[-1].to(dtype)
    for shift in range(1, n):
        seen = (positions >= shift)[..., None]
        earlier = padded[:, n - 1 - shift:n - 1 - shift + T]
        y = y + torch.where(seen, earlier, 0.0) * taps[-1 - shift].to(dtype)
    return y.to(x.dtype)


# ---- Triton kernels ---------------------------------------------------------
# A program works on tiles of ROWS tokens of one row and BLOCK channels. x has LEAD = 0 or N - 1 tokens before the first
# of y. Arithmetic is float32. Row offsets are int64. A row of x or g is read for every tap, all but once from L1.


@jit
def _tile(ptr, offs_t, stride_t, offs_c, mask_t, C: tl.constexpr, BLOCK: tl.constexpr):
    """Returns (ROWS, BLOCK) float32 of a matrix with neighbouring channels, 0 outside the mask."""
    mask = mask_t[:, None]
    if C % BLOCK != 0:
        mask = mask & (offs_c < C)[None, :]
    return tl.load(ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _store_tile(ptr, b_tile, offs_t, offs_c, mask_t, C: tl.constexpr, BLOCK: tl.constexpr):
    mask = mask_t[:, None]
    if C % BLOCK != 0:
        mask = mask & (offs_c < C)[None, :]
    tl.store(ptr + offs_t.to(tl.int64)[:, None] * C + offs_c[None, :], b_tile.to(ptr.dtype.element_ty), mask=mask)


@jit
def _tap(ptr, shift: tl.constexpr, offs_c, C: tl.constexpr, N: tl.constexpr):
    return tl.load(ptr + (N - 1 - shift) * C + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]


@jit
def _short_convolution_fwd_kernel(
    x_ptr, taps_ptr, positions_ptr, y_ptr, x_b, x_t, T,
    C: tl.constexpr, N: tl.constexpr, LEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Makes y (B, T, C)."""
    # the tile
    blocks = tl.cdiv(T, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    offs_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_t < T
    b_position = tl.load(positions_ptr + b * T + offs_t, mask=mask, other=0)
    x_ptr += b * x_b

    # tap by tap
    b_y = _tile(x_ptr, offs_t + LEAD, x_t, offs_c, mask, C, BLOCK) * _tap(taps_ptr, 0, offs_c, C, N)
    for s in tl.static_range(1, N):
        seen = mask & (b_position >= s) & (offs_t + LEAD >= s)
        b_y += _tile(x_ptr, offs_t + LEAD - s, x_t, offs_c, seen, C, BLOCK) * _tap(taps_ptr, s, offs_c, C, N)
    _store_tile(y_ptr + b * T * C, b_y, offs_t, offs_c, mask, C, BLOCK)


@jit
def _short_convolution_bwd_kernel(
    g_ptr, x_ptr, taps_ptr, positions_ptr, dx_ptr, partial_ptr, g_b, g_t, x_b, x_t, T, STEPS,
    C: tl.constexpr, N: tl.constexpr, LEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """
    Makes dx (B, T + LEAD, C), and the taps' gradient from this program's STEPS tiles, in partial (programs, N, C).
    """
    # the first tile
    L = T + LEAD
    blocks = tl.cdiv(L, ROWS * STEPS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g_ptr += b * g_b
    x_ptr += b * x_b
    sums = ()
    for _ in tl.static_range(N):
        sums += (tl.zeros((ROWS, BLOCK), tl.float32),)

    # tile by tile, the sums of all taps in registers
    for step in range(STEPS):
        offs_r = (tl.program_id(0) % blocks * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = offs_r < L
        b_x = _tile(x_ptr, offs_r, x_t, offs_c, mask, C, BLOCK)
        b_dx = tl.zeros((ROWS, BLOCK), tl.float32)
        added = ()
        for s in tl.static_range(N):
            offs_t = offs_r - LEAD + s
            seen = (offs_t >= 0) & (offs_t < T)
            if s > 0:
                seen = seen & (tl.load(positions_ptr + b * T + offs_t, mask=seen, other=0) >= s)
            b_g = _tile(g_ptr, offs_t, g_t, offs_c, seen, C, BLOCK)
            b_dx += b_g * _tap(taps_ptr, s, offs_c, C, N)
            added += (sums[s] + tl.where(seen[:, None], b_g * b_x, 0.0),)
        sums = added
        _store_tile(dx_ptr + b * L * C, b_dx, offs_r, offs_c, mask, C, BLOCK)

    # the taps' gradient
    partial_ptr += tl.program_id(0).to(tl.int64) * N * C
    for s in tl.static_range(N):
        tl.store(partial_ptr + (N - 1 - s) * C + offs_c, tl.sum(sums[s], 0), mask=offs_c < C)


# ---- Host functions: Triton -------------------------------------------------

# By the major number of the compute capability (0: any other): numbers of a tile for each thread, and warps. Chosen for
# what compiles without spills, not measured.
LAUNCH = {0: dict(numbers=8, num_warps=4)}
STEPS = 8       # tiles of a program of the backward pass: what it writes of the taps' gradient is little beside them
WIDEST = 256    # channels of a tile
MOST_TAPS = 16  # each has a tile of sums in registers


def _launch(C: int, n: int, capability: int, backward: bool) -> dict:
    """Returns the launch for C channels and n taps on a card of that compute capability (90 for 9.0)."""
    launch = LAUNCH.get(capability // 10, LAUNCH[0])
    block = min(triton.next_power_of_2(C), WIDEST)
    numbers = launch["numbers"] // 2 if backward and n > 4 else launch["numbers"]
    return dict(ROWS=32 * launch["num_warps"] * numbers // block, BLOCK=block, num_warps=launch["num_warps"])


def _constants(x: Tensor, taps: Tensor, lead: int, backward: bool) -> dict:
    n, C = map(int, taps.shape)  # never symbols: the kernel is compiled for them
    capability = 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    return dict(C=C, N=n, LEAD=int(lead), **_launch(C, n, capability, backward))


def _rows(x: Tensor) -> Tensor:
    """Returns x with a stride of 1 for channels; the kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _triton_forward(x: Tensor, taps: Tensor, positions: Tensor) -> Tensor:
    B, T = positions.shape
    x = _rows(x)
    y = _empty(x, T)
    constants = _constants(x, taps, x.shape[1] - T, False)
    grid = B * triton.cdiv(T, constants["ROWS"]), triton.cdiv(constants["C"], constants["BLOCK"])
    with torch.cuda.device_of(x):
        _short_convolution_fwd_kernel[grid](
            x, taps.contiguous(), positions.contiguous(), y, *x.stride()[:2], T, **constants
        )
    return y


def _triton_backward(g: Tensor, x: Tensor, taps: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    B, T = positions.shape
    g = _rows(g)
    x = _rows(x)
    L = x.shape[1]
    dx = _empty(x, L)
    constants = _constants(x, taps, L - T, True)
    grid = B * triton.cdiv(L, constants["ROWS"] * STEPS), triton.cdiv(constants["C"], constants["BLOCK"])
    partial = torch.empty(grid[0], *taps.shape, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _short_convolution_bwd_kernel[grid](
            g, x, taps.contiguous(), positions.contiguous(), dx, partial, *g.stride()[:2], *x.stride()[:2], T, STEPS,
            **constants
        )
    return dx, partial.sum(0)


# ---- Host functions: the CPU's loops ----------------------------------------

def _arrays(positions: Tensor, *tensors: Tensor) -> list:
    """
    Returns the tensors in the dtype of the sums, then positions as int32: contiguous, and no copies where they are so.
    """
    arrays = [x.detach().to(_sum_dtype(tensors[0])).contiguous().numpy() for x in tensors]
    return [*arrays, positions.to(torch.int32).contiguous().numpy()]


def _loops_forward(x: Tensor, taps: Tensor, positions: Tensor) -> Tensor:
    y = torch.empty(*positions.shape, x.shape[2], dtype=_sum_dtype(x))
    cpu_loops("short_convolution.cpu").forward(*_arrays(positions, x, taps), y.numpy())
    return y.to(x.dtype)


def _loops_backward(g: Tensor, x: Tensor, taps: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=_sum_dtype(x))
    partial = cpu_loops("short_convolution.cpu").backward(*_arrays(positions, g, x, taps), dx.numpy())
    return dx.to(x.dtype), torch.from_numpy(partial).sum(0)


# ---- Registration -----------------------------------------------------------

def _empty(x: Tensor, T: int) -> Tensor:
    return torch.empty(x.shape[0], T, x.shape[2], dtype=x.dtype, device=x.device)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forward_body(x: Tensor, taps: Tensor, positions: Tensor, backend: str) -> Tensor:
    """Returns y (B, T, C); x (B, T or n - 1 + T, C)."""
    if backend == "triton":
        return _triton_forward(x, taps, positions)
    return _loops_forward(x, taps, positions)


def _backward_body(g: Tensor, x: Tensor, taps: Tensor, positions: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Returns dx, and dtaps in the dtype of its sums."""
    if backend == "triton":
        return _triton_backward(g, x, taps, positions)
    return _loops_backward(g, x, taps, positions)


def _forward_fake(x, taps, positions, backend):
    return _empty(x, positions.shape[1])


def _backward_fake(g, x, taps, positions, backend):
    return _empty(x, x.shape[1]), torch.empty(taps.shape, dtype=_sum_dtype(x), device=x.device)


def _save(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g):
    x, taps, positions = ctx.saved_tensors
    dx, dtaps = _backward_op(g, x, taps, positions, ctx.backend)
    return dx, dtaps.to(taps.dtype), None, None


_backward_op = cpu_operation("knotgpt::short_convolution_backward", _backward_body, _backward_fake)
_forward_op = cpu_operation("knotgpt::short_convolution", _forward_body, _forward_fake, _save, _backward)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")


def short_convolution(
    x: Tensor, taps: Tensor, positions: Tensor, padded: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """
    Returns y (B, T, C), contiguous, in x's dtype: y_t = sum over s < n with s <= positions_t of taps_{n-1-s} x_{t-s}.

    x           (B, T, C)            bfloat16, float16, float32 or float64; any strides (channels that are not
                                     contiguous are copied)
    taps        (n, C)               in x's dtype or float32; the last is for the token itself
    positions   (B, T)               each token's place in its document, int32 or int64
    padded      (B, n - 1 + T, C)    x behind the n - 1 inputs before it, in x's dtype, where the rows go on from
                                     earlier tokens: y is made of it, and it gets the gradient, in place of x;
                                     None: x, behind zeros
    backend     "reference": PyTorch; "loops": the CPU's, which Numba compiles; "triton": CUDA, n <= 16, no float64;
                "auto": the device's, where it can, else reference

    There are gradients for x or padded, and for taps, once. It works under torch.compile(fullgraph=True). Raises a
    ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(x, taps, positions, padded, backend)
    if backend == "auto":
        backend = _best_backend(x, taps)
    if backend == "reference":
        return short_convolution_reference(x, taps, positions, padded)
    return _forward_op(x if padded is None else padded, taps, positions, backend)


def _best_backend(x: Tensor, taps: Tensor) -> str:
    if x.is_cuda and triton is not None and x.dtype != torch.float64 and len(taps) <= MOST_TAPS:
        return "triton"
    return "loops" if loops_serve(x) else "reference"


def _check(x, taps, positions, padded, backend):
    """Raises short_convolution's ValueErrors."""
    # shapes
    check_shape("x", x, "(B, T, C)", (None, None, None))
    B, T, C = x.shape
    check_shape("taps", taps, "(n, C)", (None, C))
    check_shape("positions", positions, "(B, T)", (B, T))
    if padded is not None:
        check_shape("padded", padded, "(B, n - 1 + T, C)", (B, len(taps) - 1 + T, C))

    # dtypes
    check_dtype("x", x, FLOATS)
    check_dtype("taps", taps, (torch.float32, x.dtype), "x")
    check_dtype("positions", positions, (torch.int32, torch.int64))
    if padded is not None:
        check_dtype("padded", padded, (x.dtype,), "x")

    # devices, and the backend
    for name, tensor in dict(taps=taps, positions=positions, padded=padded).items():
        if tensor is not None:
            check_device(name, tensor, "x", x)
    check_backend(backend, BACKENDS, x)
    if backend == "triton" and (x.dtype == torch.float64 or len(taps) > MOST_TAPS):
        raise ValueError(
            f"backend 'triton' takes at most {MOST_TAPS} taps and no float64; got {len(taps)} and {x.dtype}: "
            "use 'reference' or 'auto'"
        )
