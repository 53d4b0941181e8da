"""
relu_squared_feed_forward against its equations; its Triton kernels in the interpreter, compiled ahead of time and,
where there is one, on a GPU. Gradients are those of x, fc and proj for a random gradient of y.
"""
import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.relu_squared_feed_forward import relu_squared_feed_forward, relu_squared_feed_forward_reference
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory

# the package may hand on the function under the module's name
ff = importlib.import_module("kernels.relu_squared_feed_forward")
NAMES = ("x", "fc", "proj")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(N, D, H, D_out=None, dtype=torch.float64, seed=0):
    """
    dict(x (N, D), fc (H, D), proj (D_out, H), dy (N, D_out)): float64 numbers that are exact in dtype, products near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    D_out = D_out or D
    inputs = dict(x=randn(N, D), fc=randn(H, D) / D ** 0.5, proj=randn(D_out, H) / H ** 0.5, dy=randn(N, D_out))
    return {name: x.to(dtype).double() for name, x in inputs.items()}


def positive_if_one(inputs):
    """A single product is made positive: all results would be zeros."""
    return inputs | {name: inputs[name].abs() for name in ("x", "fc") if inputs["fc"].numel() == 1}


def run(inputs, backend, dtype=torch.float64, device="cpu", function=relu_squared_feed_forward, needed=NAMES):
    """{y, and dx, dfc, dproj as far as needed}"""
    tensors = {name: x.detach().to(device, dtype) for name, x in inputs.items()}
    dy = tensors.pop("dy")
    wanted = [tensors[name].requires_grad_() for name in needed]
    y = function(**tensors, backend=backend)
    gradients = torch.autograd.grad(y, wanted, dy)
    results = dict(y=y) | {f"d{name}": d for name, d in zip(needed, gradients)}
    return {name: x.detach().cpu() for name, x in results.items()}


def run_interpreted(inputs, dtype=torch.float32, needed=NAMES):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, needed=needed)


def rounding_reference(dtype):
    """
    The operation in float64 but for s, which is rounded to dtype as the kernel rounds it, and the gradient before the
    activation, made of that s and rounded.
    """
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, fc, proj):
            s = (x @ fc.T).relu().square().to(dtype).double()
            ctx.save_for_backward(x, fc, proj, s)
            return s @ proj.T
        @staticmethod
        def backward(ctx, dy):
            x, fc, proj, s = ctx.saved_tensors
            d = (2 * s.sqrt() * (dy @ proj)).to(dtype).double()
            return d @ fc, d.T @ x, dy.T @ s
    return lambda x, fc, proj, backend=None: Function.apply(x, fc, proj)


def sums(inputs, dtype):
    """
    Tolerances by name for sums in dtype: over D and H for y, D, D_out and H for dx, and N where a weight's gradient is
    a sum over rows.
    """
    (N, D), (D_out, H) = inputs["x"].shape, inputs["proj"].shape
    terms = dict(y=D + H, dx=D + D_out + H, dfc=D + D_out + N, dproj=D + N)
    return {name: float_bound(count, dtype) for name, count in terms.items()}


def assert_close(results, expected, relative_rms, tolerance):
    """tolerance: a number, or numbers by name."""
    if not isinstance(tolerance, dict):
        tolerance = dict.fromkeys(expected, tolerance)
    found = {name: relative_rms(results[name], expected[name], floor=0.0) for name in expected}
    assert results.keys() == expected.keys()
    assert all(error < tolerance[name] for name, error in found.items()), (found, tolerance)


# ---- Reference --------------------------------------------------------------

def test_reference_is_the_definition(relative_rms):
    inputs = make_inputs(7, 5, 11, 3)
    x, fc, proj, dy = inputs.values()
    y = torch.stack([sum(max(fc[h] @ row, torch.zeros(())) ** 2 * proj[:, h] for h in range(11)) for row in x])
    positive = (x @ fc.T).clamp_min(0)
    d = 2 * positive * (dy @ proj)
    assert_close(run(inputs, "reference"), dict(y=y, dx=d @ fc, dfc=d.T @ x, dproj=dy.T @ positive.square()),
                 relative_rms, sums(inputs, torch.float64))


def test_gradcheck():
    x, fc, proj, _ = (tensor.requires_grad_() for tensor in make_inputs(4, 5, 6, 3).values())
    assert (x @ fc.T).abs().min() > 1e-3  # no product so near the kink that a difference would cross it
    assert torch.autograd.gradcheck(relu_squared_feed_forward_reference, (x, fc, proj), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    """
    In half precision the product, its square or the gradient before it, and the result are rounded; a square doubles
    the error of what it is made of.
    """
    inputs = make_inputs(65, 64, 128, dtype=dtype)
    results = run(inputs, "auto", dtype)
    assert all(x.dtype == dtype for x in results.values())
    assert_close(results, run(inputs, "reference"), relative_rms,
                 sums(inputs, dtype) if dtype == torch.float32 else rounding_bound(4, dtype))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    inputs = make_inputs(12, 16, 40)
    compiled = torch.compile(relu_squared_feed_forward, fullgraph=True, backend=compiler)
    assert_close(run(inputs, "auto", torch.float32, function=compiled), run(inputs, "reference"), relative_rms,
                 sums(inputs, torch.float32))


# ---- The CPU's loops --------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("N, D, H, D_out", [(1, 1, 1, 1), (7, 5, 33, 3), (129, 70, 257, 40)])
def test_loops(N, D, H, D_out, dtype, relative_rms):
    """
    In half precision the product, s, the gradient before it and the result are rounded; a square doubles the error of
    what it is made of.
    """
    inputs = positive_if_one(make_inputs(N, D, H, D_out, dtype))
    with poisoned_memory():
        results = run(inputs, "loops", dtype)
    assert all(x.dtype == dtype for x in results.values())
    assert_close(results, run(inputs, "reference"), relative_rms,
                 rounding_bound(4, dtype) if dtype.itemsize == 2 else sums(inputs, dtype))


@pytest.mark.parametrize("needed", [("x",), ("fc",), ("proj",), ("x", "proj")])
def test_loops_make_only_the_gradients_asked_for(needed, relative_rms):
    inputs = make_inputs(7, 5, 33, 3)
    assert_close(run(inputs, "loops", torch.float32, needed=needed), run(inputs, "reference", needed=needed),
                 relative_rms, sums(inputs, torch.float32))


def test_loops_strides_and_batches(relative_rms):
    inputs = make_inputs(12, 5, 33, 3, torch.float32)
    x, fc, proj = (inputs[name].float().T.contiguous().T for name in NAMES)
    y = relu_squared_feed_forward(x.unflatten(0, (3, 4)), fc, proj, backend="loops")
    assert y.shape == (3, 4, 3)
    assert relative_rms(y.flatten(0, 1), run(inputs, "reference")["y"]) < float_bound(38, torch.float32)


def test_loops_keep_nan():
    inputs = make_inputs(6, 4, 8)
    inputs["x"][2, 1] = float("nan")
    results, expected = run(inputs, "loops", torch.float32), run(inputs, "reference", torch.float32)
    assert all(torch.equal(results[name].isnan(), expected[name].isnan())
               for name in expected) and expected["y"].isnan().any()


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(0, 4)), r"x must be a tensor \(..., D\), not empty; got \(0, 4\)"),
    (dict(x=1.0), "x must be a tensor.*float"),
    (dict(fc=torch.zeros(6, 5)), r"fc must be a tensor \(H, D\) of sizes \(any, 4\), not empty; got \(6, 5\)"),
    (dict(fc=torch.zeros(4)), "fc must be a tensor"),
    (dict(proj=torch.zeros(4, 5)), r"proj must be a tensor \(D_out, H\) of sizes \(any, 6\), not empty; got \(4, 5\)"),
    (dict(proj=None), "proj must be a tensor.*NoneType"),
    (dict(x=torch.zeros(3, 4, dtype=torch.int32)), "x must be bfloat16, float16, float32 or float64; got torch.int32"),
    (dict(fc=torch.zeros(6, 4).half()),
     "fc must be float32, as x is; got torch.float16"),
    (dict(proj=torch.zeros(4, 6, device="meta")), "proj must be on the device of x, cpu; got meta"),
    (dict(backend="cuda"), "backend must be one of auto, reference, loops, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        relu_squared_feed_forward(**dict(x=torch.zeros(3, 4), fc=torch.zeros(6, 4), proj=torch.zeros(4, 6)) | change)


# ---- Triton, interpreted ----------------------------------------------------

# one tile; tails of every axis; more tiles than one group of rows (8) has, of them the last group not whole; widths
# that fill their tiles
SHAPES = [(1, 1, 1, 1), (7, 5, 33, 3), (129, 70, 257, 40), (1160, 32, 300, 16), (33, 64, 256, 96)]


@pytest.mark.parametrize("N, D, H, D_out", [shape for shape in SHAPES if shape[0] < 1000]
                         + slow_rows(*(shape for shape in SHAPES if shape[0] >= 1000)))
def test_interpreted_kernels_equal_the_reference(N, D, H, D_out, interpreter, relative_rms):
    inputs = positive_if_one(make_inputs(N, D, H, D_out, torch.float32))
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs, "reference"), relative_rms,
                 sums(inputs, torch.float32))


def test_interpreted_float16(interpreter, relative_rms):
    """
    The interpreter multiplies bfloat16 numbers' bits: only a GPU can show those. The reference that rounds as the
    kernels do leaves the last rounding.
    """
    inputs = make_inputs(65, 48, 130, dtype=torch.float16)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16)
    assert all(x.dtype == torch.float16 for x in results.values())
    assert_close(results, run(inputs, "reference"), relative_rms, rounding_bound(3, torch.float16))
    assert_close(results, run(inputs, "reference", function=rounding_reference(torch.float16)), relative_rms,
                 rounding_bound(1, torch.float16))


@pytest.mark.parametrize("needed", [("x",), ("fc",), ("proj",), ("x", "proj")], ids="-".join)
def test_interpreted_gradients_asked_for(needed, interpreter):
    inputs = make_inputs(20, 16, 24)
    everything, some = (interpreter(__name__, "run_interpreted", inputs, needed=names) for names in (NAMES, needed))
    assert all(torch.equal(some[name], everything[name]) for name in some) and len(some) == 1 + len(needed)


def calls_of_backward_kernel(needed):
    """How often a backward pass for these arguments calls the kernel."""
    calls, original = [], ff._backward_op
    ff._backward_op = lambda *tensors: calls.append(tensors) or original(*tensors)
    try:
        run(make_inputs(5, 4, 6), "triton", torch.float32, needed=needed)
    finally:
        ff._backward_op = original
    return len(calls)


def test_interpreted_kernel_runs_only_where_its_result_is_used(interpreter):
    assert [interpreter(__name__, "calls_of_backward_kernel", needed) for needed in (("proj",), ("fc",), ("x",))] == [0,
            1, 1]


def special_values(device="cpu", dtype=torch.float32):
    """
    s and gradient of fc for products -1, 0, NaN, infinity, and in float16 for one whose square is nothing, one whose
    square is too much.
    """
    products = torch.tensor([-1.0, 0.0, float("nan"), float("inf"), 1e-4, 300.0], dtype=dtype, device=device)
    x = products[:, None]
    fc = torch.ones(1, 1, dtype=dtype, device=device)
    proj = torch.ones(1, 1, dtype=dtype, device=device)
    y = relu_squared_feed_forward(x.requires_grad_(), fc, proj, "triton")
    return y.detach().cpu()[:, 0], torch.autograd.grad(y, x, torch.ones_like(y))[0].cpu()[:, 0]


def test_interpreted_special_values(interpreter):
    (y, dx), nan, inf = interpreter(__name__, "special_values"), float("nan"), float("inf")
    torch.testing.assert_close(y, torch.tensor([0, 0, nan, inf, 1e-8, 9e4]), rtol=float_bound(1, torch.float32), atol=0,
                               equal_nan=True)
    torch.testing.assert_close(dx, torch.tensor([0, 0, nan, inf, 2e-4, 600]), rtol=float_bound(1, torch.float32),
                               atol=0, equal_nan=True)


def test_interpreted_float16_loses_small_and_large(interpreter):
    y, dx = interpreter(__name__, "special_values", dtype=torch.float16)
    assert y[4:].tolist() == [0, float("inf")] and dx[4:].tolist() == [0, float("inf")]


def strided_results(inputs, device="cpu", dtype=torch.float32):
    """
    Results for rows apart in memory, for columns apart and for contiguous rows, with three dimensions, and with one
    gradient everywhere.
    """
    ready = {name: x.to(device, dtype) for name, x in inputs.items()}

    def apart(x):
        return torch.nn.functional.pad(x, (0, 16))[:, :x.shape[1]]

    def across(x):
        return x.mT.contiguous().mT

    results = []
    for form in (apart, across, torch.clone):
        x, fc, proj, dy = (form(ready[name]) for name in (*NAMES, "dy"))
        tensors = [tensor.requires_grad_() for tensor in (x.unflatten(0, (2, -1)), fc, proj)]
        y = relu_squared_feed_forward(*tensors, backend="triton")
        gradients = [*torch.autograd.grad(y, tensors, dy.unflatten(0, (2, -1)), retain_graph=True),
                     *torch.autograd.grad(y.sum(), tensors)]
        results.append([y.detach().cpu(), *(d.cpu() for d in gradients)])
    return results


def test_interpreted_strides(interpreter, relative_rms):
    """The products may add in another order."""
    apart, across, contiguous = interpreter(__name__, "strided_results", make_inputs(12, 10, 40, 6))
    for a, b, c in zip(apart, across, contiguous, strict=True):
        assert max(relative_rms(a, c), relative_rms(b, c)) < float_bound(12 + 10 + 40 + 6, torch.float32)


def opcheck_interpreted():
    x, fc, proj, dy = (tensor.float().requires_grad_() for tensor in make_inputs(6, 4, 10, 5).values())
    forward = torch.library.opcheck(torch.ops.knotgpt.relu_squared_feed_forward.default, (x.view(2, 3, 4), fc, proj))
    s = torch.rand(6, 10)
    return [forward, torch.library.opcheck(torch.ops.knotgpt.relu_squared_feed_forward_backward.default,
                                           (dy.detach(), proj.detach(), s))]


def test_interpreted_registration(interpreter):
    for results in interpreter(__name__, "opcheck_interpreted"):
        assert set(results.values()) == {"SUCCESS"}


def compiled_interpreted(inputs):
    """run() eager and within torch.compile, which may not make a constant of N."""
    def dynamic(x, **others):
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x, **others)
    compiled = torch.compile(relu_squared_feed_forward, fullgraph=True, backend="aot_eager")
    return [run(inputs, "triton", torch.float32, function=function)
            for function in (relu_squared_feed_forward, dynamic)]


def test_interpreted_within_a_compiled_function(interpreter):
    eager, compiled = interpreter(__name__, "compiled_interpreted", make_inputs(20, 16, 24))
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def flops_interpreted(inputs):
    with FlopCounterMode(display=False) as counter:
        run(inputs, "triton", torch.float32)
    return counter.get_total_flops()


def test_interpreted_flops_are_counted(interpreter):
    N, D, H, D_out = 6, 4, 10, 5
    assert interpreter(__name__, "flops_interpreted", make_inputs(N, D, H, D_out)) == 6 * N * H * (D + D_out)


# ---- Triton, compiled ahead of time -----------------------------------------

PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_ahead(aot, name, D, H, dtype, capability, precision="ieee", ones=()):
    """
    A kernel as a training step launches it, of contiguous matrices. ones: arguments that are 1, of which a launch makes
    constants.
    """
    kernel, launch = getattr(ff, f"_relu_squared_feed_forward_{name}_kernel"), dict(ff._launch(capability, dtype))
    warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = dict(H=H, K=D, PRECISION=precision, **launch, **dict.fromkeys(ones, 1))
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    signature = {argument: element if argument.endswith("_ptr") else "i32" for argument in kernel.arg_names
                 if argument not in constants}
    widths = dict(x_row=D, fc_row=D, dy_row=D, proj_row=H)
    return aot(kernel, signature, constants, capability, warps, stages,
               [argument for argument in signature if widths.get(argument, 16) % 16 == 0])


# (D, H, dtype, capability, pass); by default one of each card
USUAL = [(768, 3072, torch.bfloat16, *case) for case in ((80, "fwd"), (90, "bwd"), (100, "fwd"))]
SLOW = [(*shape, *case, name) for shape,
        cases in {(768, 3072): ((torch.bfloat16, 80), (torch.bfloat16, 90), (torch.bfloat16, 100), (torch.float16, 90)),
                  (384, 1536): ((torch.bfloat16, 90),), (1024, 4096): ((torch.bfloat16, 90),)}.items() for case in cases
        for name in ("fwd", "bwd")]


@pytest.mark.parametrize("D, H, dtype, capability, name",
                         [*USUAL, *slow_rows(*(case for case in SLOW if case not in USUAL))])
def test_kernels_compile_for_cards(D, H, dtype, capability, name, aot):
    result = compile_ahead(aot, name, D, H, dtype, capability)
    assert PRODUCT[capability] in result.ptx
    assert result.spills <= (128 if (capability, name) == (100, "bwd") else 0)  # of that one's epilogue: once a tile
    assert result.shared <= (99 * 1024 if capability == 80 else result.shared_limit)  # consumer cards take 80's launch


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("capability, precision", [(80, "tf32"), (90, "tf32"), (90, "ieee"), (100, "tf32")])
def test_float32_kernels_compile_for_cards(capability, precision, name, aot):
    result = compile_ahead(aot, name, 768, 3072, torch.float32, capability, precision)
    assert result.has_tensor_cores == (precision == "tf32") and result.spills == 0
    assert result.shared <= (99 * 1024 if capability == 80 else result.shared_limit)


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("fwd", ("x_row", "fc_row")), ("bwd", ("dy_row", "proj_row"))])
@pytest.mark.parametrize("D, H", [(100, 1000), (1, 1)])
def test_kernels_compile_for_odd_widths(D, H, name, rows, aot):
    """
    Rows that are no multiple of 16 bytes apart are not copied asynchronously, and their masks spill: right, not fast.
    """
    result = compile_ahead(aot, name, D, H, torch.bfloat16, 90, ones=("N", *rows) if D == 1 else ())
    assert PRODUCT[90] in result.ptx and result.shared <= result.shared_limit


# ---- On a GPU ---------------------------------------------------------------

@pytest.fixture
def exact_products():
    """float32 products without TF32, until the test says otherwise."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1.5e-3), (torch.float32, None)])
@pytest.mark.parametrize("N, D, H, D_out",
                         [*SHAPES, (4096, 768, 3072, 768), (1000, 384, 1536, 384), (777, 1024, 4096, 512),
                          (300, 100, 1000, 50)])
def test_gpu_equals_the_reference(N, D, H, D_out, dtype, tolerance, exact_products, relative_rms):
    inputs = positive_if_one(make_inputs(N, D, H, D_out, dtype))
    with poisoned_memory():
        results = run(inputs, "triton", dtype, "cuda")
    on_card = {name: x.cuda() for name, x in inputs.items()}
    assert_close(results, run(on_card, "reference", device="cuda"), relative_rms, tolerance or sums(inputs, dtype))
    if dtype != torch.float32:
        assert_close(results, run(on_card, "reference", device="cuda", function=rounding_reference(dtype)),
                     relative_rms, tolerance / 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_runs_repeat_bit_for_bit_and_compiled_ones_agree(dtype, exact_products, relative_rms):
    """A compiled call may choose other products of PyTorch's; the kernels are the same."""
    inputs = make_inputs(2000, 384, 1536, dtype=dtype)
    compiled = torch.compile(relu_squared_feed_forward, fullgraph=True)
    eager, again, graph = (run(inputs, "auto", dtype, "cuda", function)
                           for function in (relu_squared_feed_forward, relu_squared_feed_forward, compiled))
    assert all(torch.equal(eager[name], again[name]) for name in eager)
    assert_close(graph, {name: x.double() for name, x in eager.items()}, relative_rms,
                 5e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.gpu
def test_gpu_tf32_where_it_is_allowed(exact_products, relative_rms):
    inputs, errors = make_inputs(512, 256, 512, dtype=torch.float32), []
    for torch.backends.cuda.matmul.allow_tf32 in (False, True):
        errors.append(relative_rms(run(inputs, "triton", torch.float32, "cuda")["y"], run(inputs, "reference")["y"],
                                   floor=0.0))
    assert errors[0] < 1e-6 and 1e-5 < errors[1] < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("needed", [("x",), ("fc",), ("proj",)], ids="-".join)
def test_gpu_gradients_asked_for(needed):
    inputs = make_inputs(300, 128, 512)
    everything, some = (run(inputs, "triton", torch.bfloat16, "cuda", needed=names) for names in (NAMES, needed))
    assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.gpu
def test_gpu_strides_and_special_values(exact_products):
    apart, across, contiguous = strided_results(make_inputs(12, 10, 40, 6), "cuda")
    for a, b, c in zip(apart, across, contiguous, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-5)
    y, dx = special_values("cuda", torch.float16)
    assert y[4:].tolist() == [0, float("inf")] and y[2].isnan() and dx[2].isnan() and dx[4:].tolist() == [0,
            float("inf")]


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """
    2^20 + 1000 rows of 2048 hidden channels are more than 2^31 elements; the last rows are compared with those of a
    call of their own.
    """
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    N, D, H, last = 2**20 + 1000, 64, 2048, 1000
    x, fc, proj, dy = (torch.randn(shape, dtype=torch.bfloat16, device="cuda",
                                   generator=torch.Generator("cuda").manual_seed(seed)) / shape[1] ** 0.5
                       for seed, shape in enumerate(((N, D), (H, D), (D, H), (N, D))))
    results = []
    for rows in (slice(None), slice(-last, None)):
        own = x[rows].detach().requires_grad_()
        y = relu_squared_feed_forward(own, fc, proj, "triton")
        results.append([y[-last:].detach().clone(), torch.autograd.grad(y, own, dy[rows])[0][-last:].clone()])
        del y, own
    for whole, part in zip(*results):
        torch.testing.assert_close(whole, part, rtol=2e-2, atol=1e-2)
