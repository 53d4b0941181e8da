"""
Cross-entropy of softcapped logits, summed over N tokens, from the last layer's input: the loss and both gradients in
one pass, some tokens at a time.

    s = W x      z = c tanh(s / c)      loss = sum over tokens of log sum_v e^{z_v} - z_target
    x (N, D), W (V, D), targets (N,); c = 0: z = s
    d = (p - onehot(target)) . (1 - (z / c)^2), p = softmax(z), is the gradient of s      dx = d W      dW = d' x

Every row of W counts in the normaliser, padding of the vocabulary too. For n = chunk tokens at a time: s by one
product; a kernel that takes each row of s twice, for the normaliser and to write d in its place; the other two
products. All in the forward pass: the backward pass multiplies dx and dW by a number. tanh comes from e = exp(-2 |s| /
c) in (0, 1]: it is (1 - e) / (1 + e), and its slope 4 e / (1 + e)^2 keeps its digits where tanh is near 1. Near 0 tanh
is right to half a unit in the last place of 1, hence z to that of c: as good as it gets elsewhere. With 0 < c <= 40
e^{z - c} needs no running maximum.

For N tokens and numbers of e bytes in a training step (12 N bytes and W's cast aside; loss alone: the first product, s
written and read once, W and x read once):
    products   6 N D V FLOPs
    s, d       6 N V e bytes: s written by its product and read twice, d written and read by two products; 5 where the
               second reading finds s in L2
    the rest   2 (N / n) V D e bytes for W, 3 N D e for x and dx, 8 (N / n) V D for dW
    kernel     6 exponentials and reciprocals a logit (2 with c = 0): at 16 a clock and multiprocessor about as long as
               s and d take in memory
    held       n V e bytes, W in x's dtype, dx, and dW in float32; never N V

Numerics: s and d are rounded to x's dtype, as in the trainer (in float16 a |d| below 6e-5 loses digits). What is
between them is float32; so is dW's sum. fp8: x and W in float8_e4m3fn, each with one scale, largest magnitude / 448; s
in x's dtype; 2^15 d in float8_e5m2, which keeps two bits of mantissa down to |d| = 2e-9. Some per cent of error in dx
and dW.

Sources: the trainer's SoftcappedCrossEntropy; gradients formed in the forward pass: Liger Kernel,
linkedin/Liger-Kernel; softcap: Gemma 2, arxiv.org/abs/2408.00118; float8 in the head: KellerJordan/modded-nanogpt.
Status: the CPU's loops are measured in benchmarks/results/; never run on a GPU; the kernel is tested in Triton's
interpreter and compiled ahead of time, and its launch table is a choice, not a measurement.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backend import (
    INTERPRETED,
    check_backend,
    check_device,
    check_dtype,
    check_no_float64,
    check_shape,
    cpu_operation,
    jit,
    loops_serve,
    parallel_loops,
    tl,
    triton,
    wide,
)


def softcapped_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 15.0) -> Tensor:
    """
    Returns the loss with all (N, V) logits at once: on any device, in any floating dtype, differentiable by autograd.
    It runs in float32 from the logits on; float64 stays float64.
    """
    logits = x @ weight.to(x.dtype).T
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]).sum()


# ---- Triton kernel ----------------------------------------------------------
# A program works on one row, in tiles of BLOCK logits. Sums are float32, one for each place of a tile until the row
# ends. Row offsets are int64.

@jit
def _cap(b_s, softcap, CAPPED: tl.constexpr):
    """Returns (c tanh(s / c), 1 - tanh^2) in float32."""
    b_s = b_s.to(tl.float32)
    if CAPPED:
        b_e = tl.exp(tl.abs(b_s) * (-2.0 / softcap))
        b_inverse = 1.0 / (1.0 + b_e)
        b_z = softcap * ((1.0 - b_e) * b_inverse)
        return tl.where(b_s < 0, -b_z, b_z), 4.0 * b_e * b_inverse * b_inverse
    else:
        return b_s, 1.0


@jit
def _softcapped_cross_entropy_kernel(s_ptr, targets_ptr, loss_ptr, d_ptr, softcap, V: tl.constexpr,
                                     CAPPED: tl.constexpr, BOUNDED: tl.constexpr, D_SCALE: tl.constexpr,
                                     BLOCK: tl.constexpr):
    """
    Writes of a row of s (n, V) the loss and, with d_ptr, D_SCALE times its gradient; d_ptr may be s_ptr. BOUNDED:
    e^{z - c} does not underflow.
    """
    # the target's logit, before any of the row is overwritten
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * V
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < V)
    b_target = _cap(tl.load(s_ptr + target, mask=inside, other=0.0), softcap, CAPPED)[0]

    # the normaliser
    b_sum, b_max = tl.zeros((BLOCK,), tl.float32), tl.full((), float("-inf"), tl.float32)
    if BOUNDED:
        b_max = softcap
    for start in range(0, V, BLOCK):
        offs_v = start + tl.arange(0, BLOCK)
        b_s = tl.load(s_ptr + offs_v, mask=offs_v < V, other=0.0, eviction_policy="evict_last")
        b_z = _cap(b_s, softcap, CAPPED)[0]
        b_z = tl.where(offs_v < V, b_z, float("-inf"))
        if not BOUNDED:
            b_larger = tl.maximum(b_max, tl.max(b_z, 0))
            b_sum *= tl.exp(b_max - b_larger)
            b_max = b_larger
        b_sum += tl.exp(b_z - b_max)
    b_normaliser = b_max + tl.log(tl.sum(b_sum, 0))
    tl.store(loss_ptr + row, tl.where(inside, b_normaliser - b_target, float("nan")))

    # the gradient
    if d_ptr is not None:
        d_ptr += row * V
        for start in range(0, V, BLOCK):
            offs_v = start + tl.arange(0, BLOCK)
            b_s = tl.load(s_ptr + offs_v, mask=offs_v < V, other=0.0, eviction_policy="evict_first")
            b_z, b_slope = _cap(b_s, softcap, CAPPED)
            b_d = (tl.exp(b_z - b_normaliser) - tl.where(offs_v == target, 1.0, 0.0)) * b_slope
            tl.store(d_ptr + offs_v, (b_d * D_SCALE).to(d_ptr.dtype.element_ty), mask=offs_v < V)


# ---- Launches ---------------------------------------------------------------

WIDEST_BOUND = 40.0     # e^-80, the least that e^{z - c} can be with this c, is a normal float32
D_SCALE = 2.0 ** 15     # of d, within [-1, 1], for float8_e5m2, which ends at 57,344


def _launch(V: int) -> dict:
    """
    Returns the launch: eight logits a thread, one load of 16 bytes in bfloat16; large programs, so that the rows at
    work (100 kB each at V = 50,304) fit in L2.
    """
    block = min(triton.next_power_of_2(V), 4096)
    return dict(BLOCK=block, num_warps=max(1, min(16, block // 256)))


def _constants(V: int, softcap: float, fp8: bool) -> dict:
    """Returns the kernel's sizes and switches."""
    return dict(V=V, CAPPED=softcap > 0, BOUNDED=0 < softcap <= WIDEST_BOUND, D_SCALE=D_SCALE if fp8 else 1.0)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (q in float8_e4m3fn, scale in float32, 0-dim) with x about q scale."""
    scale = torch.linalg.vector_norm(x, float("inf")).float().clamp_min(1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def _fp8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype,
                 fast: bool = False) -> Tensor:
    """
    Returns a b in dtype, of a (M, K) and b (K, N) in float8, laid out as the cards' products take them: a by rows, b by
    columns.
    """
    return torch._scaled_mm(a.contiguous(), b.T.contiguous().T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


def _add_product(sums: Tensor, a: Tensor, b: Tensor):
    """Adds a b to sums, in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:  # the CPU has no product of 16-bit numbers with a float32 result
        sums.addmm_(a.float(), b.float())


# ---- Host function, the body of its registration ----------------------------

@torch.library.custom_op("knotgpt::softcapped_cross_entropy", mutates_args=())
def _loss_op(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int, fp8: bool,
             wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss, dx and dW; a gradient that is not wanted is empty."""
    dx_wanted, dw_wanted = wanted
    N, V = len(x), len(weight)
    targets = targets.contiguous()
    loss = torch.empty(N, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if dx_wanted else 0, dtype=x.dtype, device=x.device)
    dw = torch.zeros(weight.shape if dw_wanted else 0, dtype=torch.float32, device=x.device)

    # what the products take
    if fp8:
        x8, x_scale = _quantise(x)
        w8, w_scale = _quantise(weight)
        d_scale = torch.full((), 1 / D_SCALE, device=x.device)
        w8_columns = w8.T.contiguous().T if dx_wanted else None
        buffer = torch.empty(min(chunk, N), V, dtype=torch.float8_e5m2, device=x.device)
    else:
        w = weight.to(x.dtype)
        buffer = x.new_empty(min(chunk, N), V)

    constants = _constants(V, softcap, fp8) | _launch(V)
    for start in range(0, N, chunk):
        # logits of some tokens, in d's place but for float8
        tokens = slice(start, min(start + chunk, N))
        d = buffer[:tokens.stop - start]
        if fp8:
            s = _fp8_product(x8[tokens], w8.T, x_scale, w_scale, x.dtype, fast=True)
        else:
            s = torch.mm(x[tokens], w.T, out=d)

        # their loss and gradient
        with torch.cuda.device_of(x):
            _softcapped_cross_entropy_kernel[(len(d),)](
                s, targets[tokens], loss[tokens], d if any(wanted) else None, softcap, **constants)

        # the gradients of x and W
        if dx_wanted and fp8:
            dx[tokens] = _fp8_product(d, w8_columns, d_scale, w_scale, x.dtype)
        elif dx_wanted:
            torch.mm(d, w, out=dx[tokens])
        if dw_wanted and fp8:
            dw += _fp8_product(d.T, x8[tokens], d_scale, x_scale, torch.float32)
        elif dw_wanted:
            _add_product(dw, d.T, x[tokens])
    return loss.sum(), dx, dw.to(weight.dtype)


@_loss_op.register_fake
def _(x, weight, targets, softcap, chunk, fp8, wanted):
    dx, dw = (torch.empty(tensor.shape if is_wanted else 0, dtype=tensor.dtype, device=x.device)
              for tensor, is_wanted in zip((x, weight), wanted))
    return torch.empty((), dtype=torch.float32, device=x.device), dx, dw


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    dx, dw = (grad.to(d.dtype) * d if is_wanted else None for d, is_wanted in zip(ctx.saved_tensors, ctx.wanted))
    return dx, dw, None, None, None, None, None


_loss_op.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.knotgpt.softcapped_cross_entropy)
def _flops(x, weight, targets, softcap, chunk, fp8, wanted, *_, out_shape=None, **__) -> int:
    return 2 * x[0] * x[1] * weight[0] * (1 + sum(wanted))


# ---- The CPU's loops --------------------------------------------------------
# Between the products, which are PyTorch's, one pass over the logits of some tokens, in their place.

def _loss_body(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, chunk: int,
               wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """
    Returns loss, dx and dW; a gradient that is not wanted is empty. Half precision is computed in float32.
    """
    dx_wanted, dw_wanted = wanted
    rows, w = wide(x), wide(weight.to(x.dtype))
    targets = targets.contiguous().numpy()
    loss = torch.empty(len(rows), dtype=rows.dtype)
    dx = rows.new_empty(rows.shape if dx_wanted else 0)
    dw = torch.zeros(w.shape if dw_wanted else 0, dtype=rows.dtype)

    buffer = rows.new_empty(min(chunk, len(rows)), len(w))
    loops = parallel_loops("softcapped_cross_entropy.cpu")
    for start in range(0, len(rows), chunk):
        tokens = slice(start, min(start + chunk, len(rows)))
        d = torch.mm(rows[tokens], w.T, out=buffer[:tokens.stop - start])
        loops.loss_and_gradient(d.numpy(), targets[tokens], softcap, any(wanted), loss.numpy()[tokens])
        if dx_wanted:
            torch.mm(d, w, out=dx[tokens])
        if dw_wanted:
            dw.addmm_(d.T, rows[tokens])
    return loss.sum(), dx.to(x.dtype), dw.to(weight.dtype)


def _fake_loops(x, weight, targets, softcap, chunk, wanted):
    dx, dw = (torch.empty(tensor.shape if is_wanted else 0, dtype=tensor.dtype)
              for tensor, is_wanted in zip((x, weight), wanted))
    return torch.empty((), dtype=torch.float32), dx, dw


def _backward_loops(ctx, *gradients):
    return _backward(ctx, *gradients)[:-1]


_loss_loops = cpu_operation(
    "knotgpt::softcapped_cross_entropy_loops", _loss_body, _fake_loops, _save, _backward_loops)


@register_flop_formula(torch.ops.knotgpt.softcapped_cross_entropy_loops)
def _(x, weight, targets, softcap, chunk, wanted, *_, out_shape=None, **__) -> int:
    return _flops(x, weight, targets, softcap, chunk, False, wanted)


# ---- Public function --------------------------------------------------------

BACKENDS = ("auto", "reference", "loops", "triton")


def softcapped_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 15.0, chunk: int = 4096,
                             backend: str = "auto", fp8: bool = False) -> Tensor:
    """
    Returns the sum over N tokens of the cross-entropy, in nats, of softcap tanh(x W' / softcap) at the targets: a
    float32 scalar (float64 where x is).

    x        (N, D)        bfloat16, float16, float32 or float64
    weight   (V, D)        of any of these dtypes; cast to x's, while its gradient has its own: keep master weights in
                           float32
    targets  (N,) int64    in 0 .. V - 1, not looked at: one outside makes the loss NaN ("loops" and "triton", which
                           read nothing there) or is PyTorch's error
    softcap  >= 0; 0: no cap
    chunk    tokens at a time of backends "loops" and "triton", which hold chunk x V logits
    backend  "reference": PyTorch, N x V logits; "loops": the CPU's, no float64; "triton": fused, no float64; "auto":
             triton for CUDA tensors where it can, loops for a CPU's where Numba is, else reference
    fp8      products in float8 (backend "triton"; compute capability 8.9 or newer; D, V, N and chunk multiples of 16):
             see above

    Gradients for x and weight, once, formed at once: under torch.no_grad, or of what needs none, none are. Works under
    torch.compile(fullgraph=True). ValueError that names the argument for a wrong shape, dtype, device or option.
    """
    _check(x, weight, targets, softcap, chunk, backend, fp8)
    if backend == "auto":
        backend = _choose(x, fp8)
    if backend == "reference":
        return softcapped_cross_entropy_reference(x, weight, targets, softcap)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    if backend == "loops":
        return _loss_loops(x, weight, targets, float(softcap), chunk, wanted)[0]
    return _loss_op(x, weight, targets, float(softcap), chunk, fp8, wanted)[0]


def _choose(x: Tensor, fp8: bool) -> str:
    """Returns the backend of "auto"."""
    if fp8:
        return "triton"
    if x.dtype == torch.float64:
        return "reference"
    if x.is_cuda and triton is not None:
        return "triton"
    return "loops" if loops_serve(x) else "reference"


def _check(x, weight, targets, softcap, chunk, backend, fp8):
    """Raises softcapped_cross_entropy's ValueErrors."""
    # tensors
    check_shape("x", x, "(N, D)", (None, None))
    check_dtype("x", x)
    check_shape("weight", weight, "(V, D)", (None, x.shape[1]))
    check_dtype("weight", weight)
    check_shape("targets", targets, "(N,)", (x.shape[0],))
    check_dtype("targets", targets, (torch.int64,))
    check_device("weight", weight, "x", x)
    check_device("targets", targets, "x", x)

    # options
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and not below 0 (0: no cap); got {softcap}")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of tokens, at least 1; got {chunk!r}")
    check_backend(backend, BACKENDS, x)
    if backend in ("loops", "triton"):
        check_no_float64(backend, [x.dtype])
    if fp8:
        _check_fp8(x, weight, chunk, backend)


def _check_fp8(x, weight, chunk, backend):
    """Raises ValueError where products in float8 cannot be had."""
    if backend == "reference" or triton is None or x.dtype == torch.float64:
        raise ValueError(
            f"fp8 needs backend 'triton' and no float64; got backend {backend!r} and {x.dtype}: leave fp8 off")
    if not INTERPRETED and not x.is_cuda:
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer; got tensors on {x.device}: "
                         "leave fp8 off")
    if not INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(x.device)
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or newer; got compute capability {major}.{minor}: "
                         "leave fp8 off")
    for name, size in (("D", x.shape[1]), ("V", len(weight)), ("N", len(x)), ("chunk", chunk)):
        if size % 16:
            raise ValueError(f"fp8 needs multiples of 16; got {name} = {size}: pad it, or leave fp8 off")
