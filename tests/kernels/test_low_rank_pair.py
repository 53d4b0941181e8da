"""
low_rank_pair against its equations; its Triton kernel in the interpreter, compiled ahead of time and, where there is
one, on a GPU. Gradients are those of x, down, up and sigma for a random gradient of y.
"""
import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.low_rank_pair import low_rank_pair
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow_rows
from tests.kernels.poison import poisoned_memory

# the package may hand on the function under the module's name
lr = importlib.import_module("kernels.low_rank_pair")
NAMES = ("x", "down", "up", "sigma")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(N, n_in, k, n_out, sigma=True, dtype=torch.float64, seed=0):
    """
    dict(x (N, n_in), down (k, n_in), up (n_out, k), sigma (k,) if asked for, g (N, n_out)): float64 numbers that are
    exact in dtype, those of a product near 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    inputs = dict(x=randn(N, n_in), down=randn(k, n_in) / n_in ** 0.5, up=randn(n_out, k) / k ** 0.5)
    if sigma:
        inputs["sigma"] = randn(k)
        inputs["sigma"][1:2] = 0  # as a branch begins
    inputs["g"] = randn(N, n_out)
    return {name: x.to(dtype).double() for name, x in inputs.items()}


def run(inputs, backend, dtype=torch.float64, device="cpu", function=low_rank_pair, needed=NAMES):
    """{y, and dx, ddown, dup, dsigma as far as needed and there}"""
    tensors = {name: x.detach().to(device, dtype) for name, x in inputs.items()}
    g = tensors.pop("g")
    needed = [name for name in needed if name in tensors]
    wanted = [tensors[name].requires_grad_() for name in needed]
    y = function(**tensors, backend=backend)
    gradients = torch.autograd.grad(y, wanted, g)
    results = dict(y=y) | {f"d{name}": d for name, d in zip(needed, gradients)}
    return {name: x.detach().cpu() for name, x in results.items()}


def run_interpreted(inputs, dtype=torch.float32, needed=NAMES):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, needed=needed)


def sums(inputs, dtype):
    """Tolerances by name for sums in dtype, of the terms of all sums that a result is made of one after another."""
    N, n_in = inputs["x"].shape
    n_out, k = inputs["up"].shape
    terms = dict(y=n_in + k, dx=n_out + k, ddown=n_out + N, dup=n_in + N, dsigma=n_in + N + n_out)
    return {name: float_bound(count, dtype) for name, count in terms.items()}


def assert_close(results, expected, relative_rms, tolerance):
    """tolerance: a number, or numbers by name."""
    if not isinstance(tolerance, dict):
        tolerance = dict.fromkeys(expected, tolerance)
    errors = {name: relative_rms(results[name], expected[name]) for name in expected}
    assert results.keys() == expected.keys()
    assert all(error < tolerance[name] for name, error in errors.items()), (errors, tolerance)


# ---- Reference --------------------------------------------------------------

@pytest.mark.parametrize("sigma", [True, False])
def test_reference_is_the_definition(sigma, relative_rms):
    inputs = make_inputs(7, 5, 3, 11, sigma)
    x, down, up, *scale, g = inputs.values()
    scale = scale[0] if sigma else torch.ones(3, dtype=torch.float64)
    matrix = torch.einsum("ok,k,ki->oi", up, scale, down)
    slope = g.T @ x
    expected = dict(y=x @ matrix.T, dx=g @ matrix, ddown=torch.einsum("ok,k,oi->ki", up, scale, slope),
                    dup=torch.einsum("oi,k,ki->ok", slope, scale, down))
    if sigma:
        expected["dsigma"] = torch.einsum("ok,oi,ki->k", up, slope, down)
    tolerance = {name: 2 * bound for name, bound in sums(inputs, torch.float64).items()}  # both sides are rounded
    assert_close(run(inputs, "reference"), expected, relative_rms, tolerance)


@pytest.mark.parametrize("sigma", [True, False])
def test_gradcheck(sigma):
    tensors = list(make_inputs(4, 5, 2, 3, sigma).values())[:-1]
    assert torch.autograd.gradcheck(low_rank_pair, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    """In half precision both products are rounded, and what sigma multiplies; the sums are longer than that."""
    inputs = make_inputs(65, 64, 16, 48, dtype=dtype)
    results = run(inputs, "auto", dtype)
    assert all(x.dtype == dtype for x in results.values())
    assert_close(results, run(inputs, "reference"), relative_rms,
                 sums(inputs, dtype) if dtype == torch.float32 else rounding_bound(4, dtype))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    inputs = make_inputs(12, 16, 4, 10)
    compiled = torch.compile(low_rank_pair, fullgraph=True, backend=compiler)
    assert_close(run(inputs, "auto", torch.float32, function=compiled), run(inputs, "reference"), relative_rms,
                 sums(inputs, torch.float32))


def results_without_rows(backend):
    tensors = [x.float().requires_grad_() for x in list(make_inputs(3, 5, 2, 4).values())[1:-1]]
    x = torch.zeros(2, 0, 5, requires_grad=True)
    y = low_rank_pair(x, *tensors, backend=backend)
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *tensors])]


def test_no_rows(interpreter):
    for results in (results_without_rows("auto"), interpreter(__name__, "results_without_rows", "triton")):
        assert [tuple(x.shape) for x in results] == [(2, 0, 4), (2, 0, 5), (2, 5), (4, 2), (2,)]
        assert not any(x.any() for x in results)


def test_flops_are_the_two_products():
    x, down, up = (torch.empty(*shape, device="meta") for shape in ((2, 10, 30), (4, 30), (20, 4)))
    with FlopCounterMode(display=False) as kernel:
        torch.ops.knotgpt.low_rank_pair(x, down, up, None, False)
    with FlopCounterMode(display=False) as products:
        low_rank_pair(x, down, up)
    assert kernel.get_total_flops() == products.get_total_flops() == 2 * 20 * 4 * (30 + 20)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(3, 5)), r"x must be a tensor \(..., n_in\) of sizes \(..., 4\), not empty; got \(3, 5\)"),
    (dict(x=torch.zeros(0, 5)), "x must be a tensor"),
    (dict(x=1.0), "x must be a tensor.*got float"),
    (dict(down=torch.zeros(4)), "down must be a tensor"),
    (dict(down=torch.zeros(0, 4)), r"down must be a tensor \(k, n_in\), not empty; got \(0, 4\)"),
    (dict(up=torch.zeros(5, 3)), r"up must be a tensor \(n_out, k\) of sizes \(any, 2\), not empty; got \(5, 3\)"),
    (dict(sigma=torch.zeros(3)), r"sigma must be a tensor \(k,\) of sizes \(2\), not empty; got \(3,\)"),
    (dict(x=torch.zeros(3, 4, dtype=torch.int32)), "x must be bfloat16, float16, float32 or float64; got torch.int32"),
    (dict(down=torch.zeros(2, 4).half()), "down must be float32, as x is; got torch.float16"),
    (dict(sigma=torch.zeros(2).double()), "sigma must be float32, as x is; got torch.float64"),
    (dict(up=torch.zeros(5, 2, device="meta")), "up must be on the device of x, cpu; got meta"),
    (dict(backend="cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    arguments = dict(x=torch.zeros(3, 4), down=torch.zeros(2, 4), up=torch.zeros(5, 2), sigma=torch.zeros(2)) | change
    with pytest.raises(ValueError, match=message):
        low_rank_pair(**arguments)


# ---- Triton, interpreted ----------------------------------------------------

# N, n_in, k, n_out: one number; tails of every axis; several programs; widths that fill their tiles; a large rank
SHAPES = [(1, 1, 1, 1), (7, 5, 3, 9), (130, 70, 20, 75), (64, 64, 16, 128), (33, 40, 100, 50)]
FEW = [(SHAPES[0], True), (SHAPES[2], True), (SHAPES[2], False), (SHAPES[3], True)]
MORE = [(shape, sigma) for shape in SHAPES for sigma in (True, False) if (shape, sigma) not in FEW]


@pytest.mark.parametrize("shape, sigma", [*FEW, *slow_rows(*MORE)])
def test_interpreted_kernel_equals_the_reference(shape, sigma, interpreter, relative_rms):
    inputs = make_inputs(*shape, sigma, torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs, "reference"), relative_rms,
                 sums(inputs, torch.float32))


def test_interpreted_float16(interpreter, relative_rms):
    """The interpreter multiplies bfloat16 numbers' bits: only a GPU can show those."""
    inputs = make_inputs(65, 48, 20, 70, dtype=torch.float16)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16)
    assert all(x.dtype == torch.float16 for x in results.values())
    assert_close(results, run(inputs, "reference"), relative_rms, rounding_bound(4, torch.float16))


def calls_of_kernel(needed):
    """What each call of the kernel in a forward and a backward pass for these arguments keeps, and the results."""
    calls, original = [], lr._pair_op

    def call(*arguments):
        calls.append(arguments[-1])
        return original(*arguments)

    lr._pair_op = call
    try:
        return calls, run(make_inputs(20, 16, 5, 24), "triton", torch.float32, needed=needed)
    finally:
        lr._pair_op = original


def test_interpreted_gradients_asked_for(interpreter):
    """They are the same, and the kernel runs and keeps only what they need."""
    _, everything = interpreter(__name__, "calls_of_kernel", NAMES)
    keeps = {("x",): [False, False], ("down",): [False], ("up",): [True], ("sigma",): [True],
             ("x", "down"): [False, True], NAMES: [True, True]}
    for needed, expected in keeps.items():
        calls, results = interpreter(__name__, "calls_of_kernel", needed)
        assert calls == expected and len(results) == 1 + len(needed), needed
        if needed != ("down",):  # whose e is a product of PyTorch's
            assert all(torch.equal(results[name], everything[name]) for name in results)


def recomputed_results(inputs):
    """Of an operation that was told to keep nothing."""
    tensors = [x.float().requires_grad_() for name, x in inputs.items() if name != "g"]
    y, h = torch.ops.knotgpt.low_rank_pair(*tensors, False)
    assert h.shape == (0, tensors[3].shape[0])
    gradients = torch.autograd.grad(y, tensors, inputs["g"].float())
    return dict(y=y.detach()) | {f"d{name}": d for name, d in zip(NAMES, gradients)}


def test_interpreted_h_is_made_again_where_it_was_not_kept(interpreter, relative_rms):
    inputs = make_inputs(20, 16, 5, 24, dtype=torch.float32)
    assert_close(interpreter(__name__, "recomputed_results", inputs), run(inputs, "reference"), relative_rms,
                 sums(inputs, torch.float32))


def second_gradients(inputs, backend, dtype=torch.float32):
    """Gradients of a sum of squares of all gradients."""
    tensors = [x.to(dtype).requires_grad_() for x in inputs.values()]
    *arguments, g = tensors
    y = low_rank_pair(*arguments, backend=backend)
    first = torch.autograd.grad(y, arguments, g, create_graph=True)
    seconds = torch.autograd.grad(sum(d.square().sum() for d in first), tensors)
    return {name: d.detach() for name, d in zip(inputs, seconds)}


def test_interpreted_gradients_of_gradients(interpreter, relative_rms):
    inputs = make_inputs(9, 16, 5, 12, dtype=torch.float32)
    expected = second_gradients(inputs, "reference", torch.float64)
    # three chains of sums over every axis, of squares that do not cancel
    tolerance = 4 * float_bound(3 * (9 + 16 + 5 + 12), torch.float32)
    assert_close(interpreter(__name__, "second_gradients", inputs, "triton"), expected, relative_rms, tolerance)


def strided_results(inputs, device="cpu", dtype=torch.float32):
    """Results for rows apart in memory, for columns apart and for contiguous rows, with three dimensions."""
    def apart(x):
        return torch.nn.functional.pad(x, (0, 16))[..., :x.shape[-1]]

    def across(x):
        return x.mT.contiguous().mT

    def every_second(x):
        return x.repeat_interleave(2, -1)[..., ::2]

    results = []
    for form in (apart, across, every_second, torch.clone):
        ready = {name: form(x.to(device, dtype)) for name, x in inputs.items() if name != "sigma"}
        ready["sigma"] = every_second(inputs["sigma"].to(device, dtype))
        tensors = [ready[name].requires_grad_() for name in NAMES]
        y = low_rank_pair(tensors[0].unflatten(0, (2, -1)), *tensors[1:], backend="triton")
        gradients = torch.autograd.grad(y, tensors, ready["g"].unflatten(0, (2, -1)))
        broadcast = torch.autograd.grad(low_rank_pair(*tensors, backend="triton").sum(), tensors)
        results.append([x.detach().cpu() for x in (y, *gradients, *broadcast)])
    return results


def test_interpreted_strides(interpreter, relative_rms):
    """The products may add in another order."""
    inputs = make_inputs(12, 10, 6, 20)
    *others, contiguous = interpreter(__name__, "strided_results", inputs)
    for results in others:
        assert all(relative_rms(x, y) < float_bound(12 + 10 + 6 + 20, torch.float32)
                   for x, y in zip(results, contiguous, strict=True))


def special_rows(backend, device="cpu"):
    inputs = make_inputs(4, 6, 3, 5)
    x, down, up, sigma, _ = (tensor.to(device, torch.float32) for tensor in inputs.values())
    down = down.abs()
    x[1, 2], x[2, 0] = float("nan"), float("inf")
    return low_rank_pair(x, down, up.abs(), sigma.abs() + 1, backend=backend).cpu()


def test_interpreted_special_values_stay_in_their_rows(interpreter):
    result, expected = interpreter(__name__, "special_rows", "triton"), special_rows("reference")
    assert expected[1].isnan().all() and expected[2].isinf().all() and expected[[0, 3]].isfinite().all()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def opcheck_interpreted(sigma, keep):
    tensors = [x.float().requires_grad_() for x in list(make_inputs(6, 4, 3, 5, sigma).values())[:-1]]
    x, down, up, *scale = tensors
    return torch.library.opcheck(torch.ops.knotgpt.low_rank_pair.default,
                                 (x.view(2, 3, 4), down, up, *(scale or [None]), keep))


@pytest.mark.parametrize("sigma, keep", [(True, True), *slow_rows((False, False))])
def test_interpreted_registration(sigma, keep, interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted", sigma, keep).values()) == {"SUCCESS"}


def compiled_interpreted(inputs):
    """run() eager and within torch.compile, which may not make a constant of N."""
    def dynamic(x, **others):
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x, **others)
    compiled = torch.compile(low_rank_pair, fullgraph=True, backend="aot_eager")
    return [run(inputs, "triton", torch.float32, function=function) for function in (low_rank_pair, dynamic)]


def test_interpreted_within_a_compiled_function(interpreter):
    eager, compiled = interpreter(__name__, "compiled_interpreted", make_inputs(20, 16, 5, 24))
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


@pytest.mark.parametrize("k, dtype, message", [
    (2, torch.float64, "backend 'triton' has no float64"),
    (129, torch.float32, "backend 'triton' takes a rank of at most 128 in torch.float32; got 129: use 'reference'"),
    (257, torch.float16, "backend 'triton' takes a rank of at most 256 in torch.float16; got 257"),
])
def test_interpreted_wrong_arguments(k, dtype, message, interpreter):
    with pytest.raises(ValueError, match=message):
        interpreter(__name__, "run_interpreted", make_inputs(2, 3, k, 4), dtype)


# ---- Triton, compiled ahead of time -----------------------------------------

PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_ahead(aot, shape, dtype, capability, backward=False, precision="ieee", ones=()):
    """
    The kernel as a training step launches it, of contiguous matrices: with sigma, and h kept; backward: of transposed
    weights. ones: arguments that are 1, of which a launch makes constants.
    """
    n_in, k, n_out = shape
    kernel, launch = lr._low_rank_pair_kernel, lr._launch(capability, dtype, k)
    warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
    unit = ("down_row", "up_row") if backward else ("down_column", "up_column")
    constants = dict(IN=n_in, OUT=n_out, K=k, PRECISION=precision, **launch, **dict.fromkeys((*unit, *ones), 1))
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    signature = {name: element if name.endswith("_ptr") else "i32" for name in kernel.arg_names
                 if name not in constants}
    even = n_in % 16 == 0 and k % 16 == 0 and n_out % 16 == 0
    aligned = [name for name in signature if name.endswith("_ptr") or even and name != "N"]
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


# by default one rank and pass of each card
USUAL = [((768, 192, 3072), torch.bfloat16, 80, False), ((3072, 128, 768), torch.bfloat16, 90, True),
         ((768, 256, 768), torch.bfloat16, 100, False)]
SLOW = [(shape, dtype, capability, backward) for capability in (80, 90, 100) for backward in (False, True)
        for shape, dtype in (((768, 64, 768), torch.bfloat16), ((768, 128, 3072), torch.bfloat16),
                             ((3072, 256, 768), torch.bfloat16), ((768, 192, 768), torch.float16))]


@pytest.mark.parametrize("shape, dtype, capability, backward",
                         [*USUAL, *slow_rows(*(case for case in SLOW if case not in USUAL))])
def test_kernel_compiles_for_cards(shape, dtype, capability, backward, aot):
    result = compile_ahead(aot, shape, dtype, capability, backward)
    assert PRODUCT[capability] in result.ptx and result.spills == 0
    assert result.shared <= (99 * 1024 if capability == 80 else result.shared_limit)  # consumer cards take 80's launch


@pytest.mark.slow
@pytest.mark.parametrize("k", [64, 128])
@pytest.mark.parametrize("capability, precision", [(80, "tf32"), (90, "tf32"), (90, "ieee"), (100, "tf32")])
def test_float32_kernel_compiles_for_cards(capability, precision, k, aot):
    result = compile_ahead(aot, (768, k, 3072), torch.float32, capability, False, precision)
    assert result.has_tensor_cores == (precision == "tf32") and result.spills == 0
    assert result.shared <= (99 * 1024 if capability == 80 else result.shared_limit)


@pytest.mark.slow
@pytest.mark.parametrize("shape, ones", [((100, 30, 1000), ()), ((1, 1, 1), ("N", "x_row", "down_row", "up_row"))])
def test_kernel_compiles_for_odd_widths(shape, ones, aot):
    """Rows that are no multiple of 16 bytes apart are not copied asynchronously: right, not fast."""
    result = compile_ahead(aot, shape, torch.bfloat16, 90, ones=ones)
    assert result.has_tensor_cores and result.shared <= result.shared_limit


# ---- On a GPU ---------------------------------------------------------------

@pytest.fixture
def exact_products():
    """float32 products without TF32, until the test ends."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sigma", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 768, 128, 3072), (1000, 3072, 64, 768), (777, 1000, 127, 520)])
def test_gpu_equals_the_reference(shape, sigma, dtype, exact_products, relative_rms):
    inputs = make_inputs(*shape, sigma, dtype)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, "cuda")
    on_card = {name: x.cuda() for name, x in inputs.items()}
    assert_close(results, run(on_card, "reference", device="cuda"), relative_rms,
                 sums(inputs, dtype) if dtype == torch.float32 else rounding_bound(4, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [192, 256])
def test_gpu_large_ranks(k, relative_rms):
    inputs = make_inputs(2000, 768, k, 3072, dtype=torch.bfloat16)
    assert_close(run(inputs, "triton", torch.bfloat16, "cuda"), run(inputs, "reference"), relative_rms,
                 rounding_bound(4, torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_runs_repeat_bit_for_bit_and_compiled_ones_agree(dtype, exact_products, relative_rms):
    """A compiled call may choose other products of PyTorch's; the kernel is the same."""
    inputs = make_inputs(2000, 384, 96, 1536, dtype=dtype)
    compiled = torch.compile(low_rank_pair, fullgraph=True)
    eager, again, graph = (run(inputs, "auto", dtype, "cuda", function)
                           for function in (low_rank_pair, low_rank_pair, compiled))
    assert all(torch.equal(eager[name], again[name]) for name in eager)
    assert_close(graph, {name: x.double() for name, x in eager.items()}, relative_rms,
                 sums(inputs, dtype) if dtype == torch.float32 else rounding_bound(4, dtype))


@pytest.mark.gpu
def test_gpu_strides_and_special_values(exact_products, relative_rms):
    *others, contiguous = strided_results(make_inputs(12, 10, 6, 20), "cuda")
    for results in others:
        assert all(relative_rms(x, y) < float_bound(12 + 10 + 6 + 20, torch.float32)
                   for x, y in zip(results, contiguous, strict=True))
    torch.testing.assert_close(special_rows("triton", "cuda"), special_rows("reference"), rtol=1e-5, atol=1e-5,
                               equal_nan=True)


@pytest.mark.gpu
def test_gpu_takes_the_two_products_where_the_kernel_cannot(relative_rms):
    inputs = make_inputs(100, 300, 290, 320, dtype=torch.bfloat16)
    assert_close(run(inputs, "auto", torch.bfloat16, "cuda"), run(inputs, "reference"), relative_rms,
                 rounding_bound(4, torch.bfloat16))


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """y has more than 2^31 numbers; the last rows are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    N = 2 ** 20 + 1000
    x, down, up = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)
                   for shape in ((N, 64), (16, 64), (2048, 16)))
    y = low_rank_pair(x, down, up, backend="triton")
    assert torch.equal(y[-1000:], low_rank_pair(x[-1000:], down, up, backend="triton"))
