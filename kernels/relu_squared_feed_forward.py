"""
Feed-forward with the squared ReLU, whose activation is made in the epilogues of the two products beside it.

    y = s proj'     s = max(x fc', 0)^2      rows x of D numbers, fc (H, D), proj (D_out, H)
    d = 2 sqrt(s) . (dy proj)                the gradient before the activation
    dx = d fc       dfc = d' x               dproj = dy' s

Two kernels, one for s and one for d, each a tiled product that stores its result once; the four other products are PyTorch's. s alone is kept: max(x fc', 0)
is sqrt(s), and the root halves the relative error that rounding s made. The trap is float16's range: the gradient of an s below 3e-8, of products below 1.7e-4,
is 0, an s below 6e-5 has lost bits, and above 65,504, of products above 255.9, s is infinite. bfloat16 has none of this.

For N rows, e bytes a number, A = N H e bytes, passes over (N, H) matrices counted (those over x, y and the weights are the same in every form):
    forward    2 N H (D + D_out) FLOPs     2A: write s; read s                             unfused, compiled 4A: the product is written and read, too
    backward   4 N H (D + D_out) FLOPs     5A: read s, write d; read d, d and s            unfused, compiled 7A: so is dy proj, and the product is read for s
    kept       A and x                                                                     unfused 2A and x
One pass over (N, H) takes as long as D bandwidth / (rate e) FLOPs ... 

Sources: So et al., Primer, arxiv.org/abs/2109.08668 (the squared ReLU).
Status: never run on a GPU; the kernels are tested in Triton's interpreter and compiled ahead of time, and their launch table is a choice, not a measurement.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # no Triton for this platform: the reference serves it
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda function: function


def relu_squared_feed_forward_reference(x: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    """y in PyTorch's own operations: any device, any floating dtype, differentiable by autograd. Arguments as relu_squared_feed_forward's."""
    return F.linear(F.relu(F.linear(x, fc)).square(), proj)


# ---- Triton kernels -----------------------------------------------------------------------------------------------------------------------------------
# A program makes one tile (ROWS, COLUMNS) of an (N, H) matrix, the product of a (N, K) and b (K, H) with float32 sums. Rows from N on are read as row N - 1 and
# columns from H on as 0, and neither is written; the sum's tail is masked on both sides, as 0 times a NaN is one. Offsets are int64.

@jit
def _place(N, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile. GROUP rows of tiles are gone through column by column: programs that run together share operands in L2."""
    rows, columns = tl.cdiv(N, ROWS), (H + COLUMNS - 1) // COLUMNS
    i, j = tl.swizzle2d(tl.program_id(0) // columns, tl.program_id(0) % columns, rows, columns, GROUP)
    return i.to(tl.int64) * ROWS + tl.arange(0, ROWS), j.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)


@jit
def _product(a_ptr, a_row, b_ptr, b_inner, b_column, offs_n, offs_h, N, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
             INNER: tl.constexpr, PRECISION: tl.constexpr):
    """The tile in float32. Neighbours in a row of a are neighbours in memory; those of b are b_inner and b_column apart."""
    offs_k = tl.arange(0, INNER)
    a_ptrs = a_ptr + tl.minimum(offs_n, N - 1)[:, None] * a_row + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * b_inner + offs_h[None, :] * b_column
    b_acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, INNER):
        if K % INNER == 0:
            b_a = tl.load(a_ptrs)
        else:
            b_a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if K % INNER == 0 and H % COLUMNS == 0:
            b_b = tl.load(b_ptrs)
        else:
            b_b = tl.load(b_ptrs, mask=(offs_k < K - k)[:, None] & (offs_h < H)[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        a_ptrs += INNER
        b_ptrs += INNER * b_inner
    return b_acc


@jit
def _results(offs_n, offs_h, N, H: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of the tile in a contiguous (N, H) matrix, and which of them exist."""
    mask = (offs_n < N)[:, None]
    if H % COLUMNS != 0:
        mask = mask & (offs_h < H)[None, :]
    return offs_n[:, None] * H + offs_h[None, :], mask


@jit
def _relu_squared_feed_forward_fwd_kernel(x_ptr, fc_ptr, s_ptr, x_row, fc_row, N, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                                          INNER: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """s of x (N, K) and fc (H, K)."""
    offs_n, offs_h = _place(N, H, ROWS, COLUMNS, GROUP)
    b_s = _product(x_ptr, x_row, fc_ptr, 1, fc_row, offs_n, offs_h, N, H, K, ROWS, COLUMNS, INNER, PRECISION)
    b_s = tl.where(b_s < 0, 0.0, b_s)  # a maximum would lose a NaN
    offs, mask = _results(offs_n, offs_h, N, H, COLUMNS)
    tl.store(s_ptr + offs, (b_s * b_s).to(s_ptr.dtype.element_ty), mask=mask)


@jit
def _relu_squared_feed_forward_bwd_kernel(dy_ptr, proj_ptr, s_ptr, d_ptr, dy_row, proj_row, N, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                                          COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    """d of dy (N, K), proj (K, H) and s (N, H)."""
    offs_n, offs_h = _place(N, H, ROWS, COLUMNS, GROUP)
    b_d = _product(dy_ptr, dy_row, proj_ptr, proj_row, 1, offs_n, offs_h, N, H, K, ROWS, COLUMNS, INNER, PRECISION)
    offs, mask = _results(offs_n, offs_h, N, H, COLUMNS)
    b_s = tl.load(s_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(d_ptr + offs, (2.0 * tl.sqrt(b_s) * b_d).to(d_ptr.dtype.element_ty), mask=mask)


# ---- Launches -------------------------------------------------------------------------------------------------------------------------------------------

# (major compute capability, bytes of a number): the launch of both kernels. Cards that are not named, consumer cards among them, take 8's.
LAUNCH = {
    (8, 2): dict(ROWS=128, COLUMNS=256, INNER=32, GROUP=8, num_warps=8, num_stages=4),
    (8, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=3),
    (9, 2): dict(ROWS=128, COLUMNS=256, INNER=64, GROUP=8, num_warps=8, num_stages=4),
    (9, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=4),
    (10, 2): dict(ROWS=128, COLUMNS=256, INNER=64, GROUP=8, num_warps=8, num_stages=4),
    (10, 4): dict(ROWS=128, COLUMNS=128, INNER=32, GROUP=8, num_warps=8, num_stages=4),
}


def _launch(capability: int, dtype: torch.dtype) -> dict:
    """For a compute capability (90 for 9.0)."""
    return LAUNCH.get((capability // 10, dtype.itemsize), LAUNCH[8, dtype.itemsize])
