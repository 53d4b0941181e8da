"""
RMS normalisation of every head, without gain, and rotary positions on what comes out, in one pass over memory.

    n = rho x   rho = (mean(x^2) + eps)^-1/2, over the D channels of a head
    y = R n     channel c < D / 2 is paired with c + D / 2; R turns the first P pairs,
                (a, b) -> (a cos + b sin, b cos - a sin), and leaves the others

Backward, with g the gradient of y. For the norm's gradient of u = R'g, rho (u - n mean(u n)), neither x nor n is
needed: <u, n> = <g, y>, and R'y is n but for a factor w^-1 = cos^2 + sin^2 of each pair (1 where it stays), which is
not 1 where the tables are rounded:
    dx = rho R'(g - w y mean(g y))
In exact arithmetic that is the gradient for any tables with w finite. y is read as it was rounded, which leaves an
error of its rounding's size, |y| 2^-9 in bfloat16, in the term along y alone; the trainer's RMSNormalize reads its
rounded result likewise. Cosine and sine get no gradient.

For N heads of D numbers, A = N D e bytes at e bytes a number (rho, 4 bytes a head, and the tables, which stay in the
caches, aside), P = D / 2:
    forward    2A: read x, write y         6 N D FLOPs
    backward   3A: read g, y, write dx     10 N D FLOPs
    kept for the backward pass: y, which attention keeps, and rho; x is free
    the trainer's rotate(RMSNormalize(x)), bfloat16, P = D / 4: 12.7A and 25.1A over the operands of every operation;
    compiled 4.5A and 5.5A, as Inductor counts the kernels that it makes for a CPU
Two to three FLOPs a byte in bfloat16: bound by memory.

Sources: Zhang and Sennrich, Root Mean Square Layer Normalization, arxiv.org/abs/1910.07467; Su et al., RoFormer,
arxiv.org/abs/2104.09864. The backward pass is derived here.
Status: the CPU's loops are measured in benchmarks/results/; never run on a GPU; the kernels are tested in Triton's
interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import (
    array,
    check_backend,
    check_device,
    check_dtype,
    check_positive,
    check_shape,
    cpu_operation,
    describe,
    jit,
    loops_serve,
    parallel_loops,
    strided_array,
    tl,
    triton,
    triton_operation,
    wrap_triton,
)


def norm_rotary_reference(x: Tensor, cosine: Tensor, sine: Tensor, eps: float = 1e-6) -> Tensor:
    """
    Returns norm_rotary's y, computed term by term: on any device, in any floating dtype, differentiable by autograd, in
    the tables too. It runs in x's dtype, float32 at least, and is rounded to x's once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    c, s = (table[:, None].to(wide.dtype) for table in (cosine, sine))
    n = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    P, half = c.shape[-1], x.shape[-1] // 2
    a, a_still, b, b_still = n.split((P, half - P) * 2, -1)
    return torch.cat((a * c + b * s, a_still, b * c - a * s, b_still), -1).to(x.dtype)


# ---- Triton kernels ---------------------------------------------------------
# A program works on ROWS heads, rows in the order (B, T, H), each as its two halves in tiles (ROWS, HALF), so that a
# pair's channels lie in one thread. HALF is D / 2 rounded up to a power of two. Arithmetic is float32. Rows from N on
# and channels from D / 2 on are read as 0 and not written. Row offsets are int64.

@jit
def _place(offs_r, T, stride_b, stride_t, stride_h, H: tl.constexpr):
    """Returns where each row begins in a tensor (B, T, H, D) of these strides."""
    offs_token = offs_r // H
    offs_b, offs_t, offs_h = offs_token // T, offs_token % T, offs_r % H
    return offs_b.to(tl.int64) * stride_b + offs_t.to(tl.int64) * stride_t + offs_h.to(tl.int64) * stride_h


@jit
def _exist(offs_r, N, D: tl.constexpr, HALF: tl.constexpr):
    """Returns which of the rows and of their channels exist, for tiles (rows, HALF) or (rows, 1)."""
    mask = (offs_r < N)[:, None]
    if 2 * HALF != D:
        mask = mask & (tl.arange(0, HALF) < D // 2)[None, :]
    return mask


@jit
def _load_halves(ptr, offs_start, mask, D: tl.constexpr, HALF: tl.constexpr):
    """Returns the two halves of rows that begin at offs_start, in float32; 0 outside."""
    ptrs = ptr + offs_start[:, None] + tl.arange(0, HALF)[None, :]
    b_a = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(ptrs + D // 2, mask=mask, other=0.0).to(tl.float32)
    return b_a, b_b


@jit
def _store_halves(ptr, b_a, b_b, offs_start, mask, D: tl.constexpr, HALF: tl.constexpr):
    """Writes the two halves of rows that begin at offs_start."""
    ptrs = ptr + offs_start[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(ptrs, b_a.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + D // 2, b_b.to(ptr.dtype.element_ty), mask=mask)


@jit
def _load_angles(cosine_ptr, sine_ptr, offs_r, N, T, H: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    """Returns cosine and sine of each row's position, 1 and 0 for the pairs that stay."""
    offs_p = tl.arange(0, HALF)
    offs = (offs_r // H % T).to(tl.int64)[:, None] * P + offs_p[None, :]
    mask = (offs_r < N)[:, None] & (offs_p < P)[None, :]
    b_c = tl.load(cosine_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    b_s = tl.load(sine_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return b_c, b_s


@jit
def _norm_rotary_fwd_kernel(x_ptr, cosine_ptr, sine_ptr, y_ptr, rho_ptr, x_b, x_t, x_h, N, T, eps,
                            H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Writes y (N, D) and rho (N)."""
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = _exist(offs_r, N, D, HALF)

    # the norm
    b_a, b_b = _load_halves(x_ptr, _place(offs_r, T, x_b, x_t, x_h, H), mask, D, HALF)
    b_rho = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b, 1) / D + eps)
    tl.store(rho_ptr + offs_r, b_rho, mask=offs_r < N)
    b_a, b_b = b_a * b_rho[:, None], b_b * b_rho[:, None]

    # the rotation
    b_c, b_s = _load_angles(cosine_ptr, sine_ptr, offs_r, N, T, H, P, HALF)
    _store_halves(y_ptr, b_a * b_c + b_b * b_s, b_b * b_c - b_a * b_s, offs_r.to(tl.int64) * D, mask, D, HALF)


@jit
def _norm_rotary_bwd_kernel(g_ptr, y_ptr, cosine_ptr, sine_ptr, rho_ptr, dx_ptr, g_b, g_t, g_h, N, T,
                            H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Writes dx (N, D)."""
    # g, y and the angles
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = _exist(offs_r, N, D, HALF)
    offs_start = offs_r.to(tl.int64) * D
    b_ga, b_gb = _load_halves(g_ptr, _place(offs_r, T, g_b, g_t, g_h, H), mask, D, HALF)
    b_ya, b_yb = _load_halves(y_ptr, offs_start, mask, D, HALF)
    b_c, b_s = _load_angles(cosine_ptr, sine_ptr, offs_r, N, T, H, P, HALF)

    # rho R'(g - w y mean(g y))
    b_along = (tl.sum(b_ga * b_ya + b_gb * b_yb, 1) / D)[:, None] / (b_c * b_c + b_s * b_s)
    b_rho = tl.load(rho_ptr + offs_r, mask=offs_r < N, other=0.0)[:, None]
    b_a, b_b = (b_ga - b_along * b_ya) * b_rho, (b_gb - b_along * b_yb) * b_rho
    _store_halves(dx_ptr, b_a * b_c - b_b * b_s, b_b * b_c + b_a * b_s, offs_start, mask, D, HALF)


# ---- Launches ---------------------------------------------------------------

# By the major number of the compute capability (0: any other): pairs of channels a thread, and warps. 10 has more
# bandwidth a multiprocessor to keep busy: by the registers that they take, twice the pairs are a third more bytes in
# flight forward, a tenth backward.
LAUNCH = {0: dict(pairs=8, num_warps=4), 10: dict(pairs=16, num_warps=4)}
WIDEST = 256                # channels of a head
MOST_ROWS = 2**31 - 2**15   # heads in all: they are counted in int32, those past the end of the last program too


def _launch(D: int, capability: int) -> dict:
    """Returns the launch for heads of D channels on a card of that compute capability (90 for 9.0)."""
    launch = LAUNCH.get(capability // 10, LAUNCH[0])
    half = triton.next_power_of_2(D // 2)
    return dict(ROWS=32 * launch["num_warps"] * launch["pairs"] // half, HALF=half, num_warps=launch["num_warps"])


def _operands(x: Tensor, *tables: Tensor) -> tuple:
    """
    Returns x with neighbouring channels, contiguous tables, the grid, (N, T), and the kernel's constants.
    """
    # sizes, never symbols: the kernel is compiled for H, D and P
    B, T = x.shape[:2]
    H, D, P = map(int, (*x.shape[2:], tables[0].shape[1]))
    N = B * T * H

    # the launch
    capability = 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    constants = dict(H=H, D=D, P=P, **_launch(D, capability))
    grid = (-(-N // constants["ROWS"]),)

    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, *(table.contiguous() for table in tables), grid, (N, T), constants


def _empty_results(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns empty tensors for y (B, T, H, D) and rho (B, T, H)."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)


# ---- Host functions, each the body of its registration ----------------------

@triton_operation("knotgpt::norm_rotary", mutates_args=())
def _forward_op(x: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y and rho (B, T, H)."""
    y, rho = _empty_results(x)
    x, cosine, sine, grid, sizes, constants = _operands(x, cosine, sine)
    with torch.cuda.device_of(x):
        wrap_triton(_norm_rotary_fwd_kernel)[grid](x, cosine, sine, y, rho, *x.stride()[:3], *sizes, eps, **constants)
    return y, rho


@_forward_op.register_fake
def _(x, cosine, sine, eps):
    return _empty_results(x)


@triton_operation("knotgpt::norm_rotary_backward", mutates_args=())
def _backward_op(g: Tensor, y: Tensor, cosine: Tensor, sine: Tensor, rho: Tensor) -> Tensor:
    """Returns dx."""
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g, cosine, sine, grid, sizes, constants = _operands(g, cosine, sine)
    with torch.cuda.device_of(g):
        wrap_triton(_norm_rotary_bwd_kernel)[grid](g, y, cosine, sine, rho, dx, *g.stride()[:3], *sizes, **constants)
    return dx


@_backward_op.register_fake
def _(g, y, cosine, sine, rho):
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[0], *inputs[1:3], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _):
    return _backward_op(g, *ctx.saved_tensors), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


# ---- The CPU's loops --------------------------------------------------------
# A token is a task. Each head is gone over twice, while the first-level cache holds it.

def _forward_body(x: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y and rho (B, T, H)."""
    y, rho = _empty_loops(x)
    rows, strides = strided_array(x)
    c, s = _table(cosine, y, 1.0), _table(sine, y, 0.0)
    parallel_loops("norm_rotary.cpu").forward(rows, *strides, c, s, eps, y.numpy(), rho.numpy())
    return y.to(x.dtype), rho


def _backward_body(g: Tensor, y: Tensor, cosine: Tensor, sine: Tensor, rho: Tensor) -> Tensor:
    """Returns dx."""
    dx = torch.empty(y.shape, dtype=rho.dtype)
    rows, strides = strided_array(g)
    c, s = _table(cosine, dx, 1.0), _table(sine, dx, 0.0)
    parallel_loops("norm_rotary.cpu").backward(rows, *strides, array(y), c, s, rho.numpy(), dx.numpy())
    return dx.to(y.dtype)


def _table(table: Tensor, rows: Tensor, still: float):
    """
    Returns a table for all pairs of the loops over `rows`, `still` for those that stay: a loop over few pairs is not
    vectorised.
    """
    return F.pad(table.to(rows.dtype), (0, rows.shape[-1] // 2 - table.shape[1]), value=still).numpy()


def _empty_loops(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns empty tensors for the loops' y and rho."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape, dtype=dtype), torch.empty(x.shape[:3], dtype=dtype)


def _fake_loops(x, cosine, sine, eps):
    y, rho = _empty_loops(x)
    return y.to(x.dtype), rho


def _fake_backward_loops(g, y, *_):
    return torch.empty(y.shape, dtype=y.dtype)


def _gradients_loops(ctx, g, _):
    return _backward_loops(g, *ctx.saved_tensors), None, None, None


_backward_loops = cpu_operation("knotgpt::norm_rotary_loops_backward", _backward_body, _fake_backward_loops)
_forward_loops = cpu_operation("knotgpt::norm_rotary_loops", _forward_body, _fake_loops, _save, _gradients_loops)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")


def norm_rotary(x: Tensor, cosine: Tensor, sine: Tensor, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """
    Returns y (B, T, H, D), contiguous, in x's dtype: the heads of x, each divided by sqrt(mean(x^2) + eps), then turned
    by their positions.

    x              (B, T, H, D)  bfloat16, float16, float32 or float64, D even; any strides, so q or k may be a view of
                                 a joined projection (a last axis that is not contiguous is copied)
    cosine, sine   (T, P)        of the angles of the first P <= D / 2 pairs of channels (c, c + D / 2), float32 or x's
                                 dtype; nowhere both 0. They get no gradient
    eps            > 0
    backend        "reference": PyTorch; "loops": the CPU's; "triton": fused, D <= 256, fewer than 2^31 - 2^15 heads in
                   all, no float64; "auto": triton for CUDA tensors where it can, loops for a CPU's where Numba is, else
                   reference

    Computed in float32, but for triton in float64 where x has it, and rounded once; rows of zeros give zeros and finite
    gradients. Gradient for x, once, from y as it is rounded. All backends work under torch.compile(fullgraph=True).
    ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(x, cosine, sine, eps, backend)
    if backend == "auto":
        backend = _choose(x)
    if backend == "reference":
        return norm_rotary_reference(x, cosine, sine, eps)
    operation = _forward_loops if backend == "loops" else _forward_op
    return operation(x, cosine, sine, float(eps))[0]


def _choose(x: Tensor) -> str:
    """Returns the backend of "auto"."""
    if x.is_cuda and triton is not None and _fits(x):
        return "triton"
    return "loops" if loops_serve(x) else "reference"


def _fits(x: Tensor) -> bool:
    """Returns whether the Triton kernels are made for heads of this width, number and dtype."""
    return x.shape[-1] <= WIDEST and prod(x.shape[:3]) < MOST_ROWS and x.dtype != torch.float64


def _check(x, cosine, sine, eps, backend):
    """Raises norm_rotary's ValueErrors."""
    # x
    check_shape("x", x, "(B, T, H, D)", (None, None, None, None))
    if x.shape[-1] % 2:
        raise ValueError(f"x must be a tensor (B, T, H, D), D even; got {describe(x)}")
    check_dtype("x", x)

    # tables
    T, D = x.shape[1], x.shape[3]
    for name, table in (("cosine", cosine), ("sine", sine)):
        if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[0] != T or table.shape[1] > D // 2:
            raise ValueError(f"{name} must be a tensor (T, P), T = {T}, P <= D / 2 = {D // 2}; got {describe(table)}")
        check_dtype(name, table, (torch.float32, x.dtype), like="x")
        check_device(name, table, "x", x)
        if table.requires_grad:
            raise ValueError(f"{name} gets no gradient; got one that requires it: detach it, or call "
                             "norm_rotary_reference")
    if cosine.shape != sine.shape:
        raise ValueError(f"cosine and sine must have one shape; got {describe(cosine)} and {describe(sine)}")

    # options
    check_positive("eps", eps)
    check_backend(backend, BACKENDS, x)
    if backend == "triton" and not _fits(x):
        raise ValueError(f"backend 'triton' takes D <= {WIDEST}, fewer than {MOST_ROWS} heads in all and no float64; "
                         f"got {describe(x)}: use 'reference' or 'auto'")
