"""
short_convolution against its formula in plain loops; its Triton kernels in the interpreter, compiled ahead of time and,
where there is one, on a GPU; the CPU's loops on random shapes.
"""
import os
import subprocess
import sys

import pytest
import torch

from kernels import short_convolution as sc
from kernels.backend import has_cpu_loops
from kernels.short_convolution import short_convolution, short_convolution_reference
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import LOOP_FLOATS, slow, slow_rows
from tests.kernels.poison import poisoned_memory

needs_loops = pytest.mark.skipif(not has_cpu_loops(), reason="needs Numba")
LOOPS = pytest.param("loops", torch.float32, marks=needs_loops)


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(B=2, T=11, C=3, n=4, lead=False, seed=0, document=5.0):
    """
    dict(x, taps, positions, g) in float64; documents of `document` tokens on average, the first of which began before
    the row in every second one; g: gradient of y. With lead x is `padded`.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    begins, index = torch.rand(B, T, generator=generator) < 1 / document, torch.arange(T)
    positions = index - torch.where(begins, index, -2 * torch.arange(B)[:, None]).cummax(1).values
    return dict(x=randn(B, T + lead * (n - 1), C), taps=randn(n, C), positions=positions, g=randn(B, T, C))


def rounded(inputs, dtype):
    """Inputs that are exact in dtype."""
    return {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in inputs.items()}


def run(inputs, backend="reference", dtype=torch.float64, taps=None, device="cpu", function=short_convolution,
        form=lambda x: x):
    """(y, dx, dtaps), with x as `padded` where it is longer than y. form: how x and g lie in memory."""
    x, g = (form(inputs[name].detach().to(device, dtype)) for name in ("x", "g"))
    weights = inputs["taps"].to(device, taps or dtype).requires_grad_()
    positions, T = inputs["positions"].to(device), g.shape[1]
    x.requires_grad_()
    padded = x if x.shape[1] > T else None
    y = function(x if padded is None else x.detach()[:, -T:], weights, positions, padded, backend=backend)
    return [result.detach().cpu() for result in (y, *torch.autograd.grad(y, (x, weights), g))]


def run_interpreted(inputs, dtype=torch.float32, **options):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, **options)


def formula(x, taps, positions, padded=None, backend=None):
    n, T = len(taps), positions.shape[1]
    y = [[sum(taps[n - 1 - s] * x[b, t - s] for s in range(min(n, int(positions[b, t]) + 1)) if s <= t)
          for t in range(T)] for b in range(len(x))]
    return torch.stack([torch.stack(row) for row in y])


def assert_close(results, inputs, relative_rms, dtype=torch.float32, taps=None):
    """
    Results in dtype against float64: y and dx within a sum over the taps, the taps' gradient within one over tokens;
    in half precision each is rounded once. Terms that cancel: the sums of absolute values are what errors relate to.
    """
    exact = run(inputs)
    absolute = run({name: x if name == "positions" else x.abs() for name, x in inputs.items()})
    n = len(inputs["taps"])
    tokens = inputs["positions"].numel()
    sums = torch.promote_types(dtype, torch.float32)
    for result, wide, most, terms, kind in zip(results, exact, absolute, (n, n, tokens), (dtype, dtype, taps or dtype)):
        assert result.dtype == kind and result.shape == wide.shape
        scale = max(most.square().mean().sqrt().item(), 1e-300)
        tolerance = float_bound(terms, sums) + (0.0 if kind == sums else rounding_bound(1, kind))
        error = (result.double() - wide).square().mean().sqrt().item() / scale
        assert error < tolerance, (error, tolerance)


SHAPES = [dict(), dict(T=1, lead=True), dict(T=7, C=40, n=3, lead=True), dict(B=1, T=37, C=5, n=1), dict(T=3, n=7),
          dict(B=3, T=65, C=33, n=4, document=20.0), dict(T=9, C=17, n=6, lead=True), dict(T=1),
          dict(T=19, document=1.0)]
FORMS = dict(contiguous=lambda x: x, joined=lambda x: torch.cat((x, x), 2)[:, :, :x.shape[2]],
             channels_first=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
             every_second=lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2])


# ---- Reference --------------------------------------------------------------

@pytest.mark.parametrize("shape", [dict(), dict(n=1), dict(T=3, n=7), dict(B=3, C=1, document=1.0)], ids=str)
def test_reference_is_the_formula_and_stays_in_the_document(shape, relative_rms):
    inputs = make_inputs(**shape)
    for result, expected in zip(run(inputs), run(inputs, function=formula), strict=True):
        assert relative_rms(result, expected) < float_bound(inputs["positions"].numel(), torch.float64)


@pytest.mark.parametrize("lead", [False, True])
def test_gradcheck(lead):
    inputs = make_inputs(T=7, lead=lead)
    def call(x, taps):
        return short_convolution_reference(x[:, -7:], taps, inputs["positions"], x if lead else None)
    assert torch.autograd.gradcheck(call, (inputs["x"].requires_grad_(), inputs["taps"].requires_grad_()))


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), LOOPS])
def test_a_row_goes_on(backend, dtype):
    inputs = make_inputs(seed=1)
    x = inputs["x"].to(dtype)
    taps = inputs["taps"].to(dtype)
    positions = inputs["positions"].clamp_max(torch.arange(11))
    whole, padded = short_convolution(x, taps, positions, backend=backend), torch.cat((x.new_zeros(2, 3, 3), x), 1)
    for t in range(11):
        own = short_convolution(x[:, t:t + 1], taps, positions[:, t:t + 1], padded[:, t:t + 4], backend=backend)
        torch.testing.assert_close(own, whole[:, t:t + 1], rtol=0, atol=float_bound(4, dtype) * 16)


@pytest.mark.parametrize("backend", ["reference", pytest.param("loops", marks=needs_loops)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("taps", [None, torch.float32])
def test_half_precision(backend, dtype, taps, relative_rms):
    inputs = rounded(make_inputs(B=3, T=65, C=33, document=20.0), dtype)
    assert_close(run(inputs, backend, dtype, taps), inputs, relative_rms, dtype, taps)


@pytest.mark.parametrize("backend, dtype", [("reference", torch.float64), LOOPS])
def test_a_nan_stays_in_its_document(backend, dtype):
    inputs = make_inputs(T=40, document=10.0)
    begins = (inputs["positions"][0] == 0).nonzero().flatten().tolist()
    inputs["x"][0, begins[1] - 1] = float("nan")
    inputs["g"][0, begins[2]] = float("inf")
    y, dx, _ = run(inputs, backend, dtype)
    assert y[0, begins[1] - 1].isnan().all() and y[0, begins[1]:].isfinite().all()
    assert not dx[0, begins[2]].isfinite().any() and dx[0, :begins[2]].isfinite().all()
    assert y[1].isfinite().all() and dx[1].isfinite().all()


X = torch.zeros(2, 3, 8)
TAPS = torch.zeros(4, 8)
POSITIONS = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(3, 8)), r"x must be a tensor \(B, T, C\), not empty; got \(3, 8\) torch.float32"),
    (dict(x=1.0), "x must be a tensor.*got float"),
    (dict(x=torch.zeros(2, 0, 8)), "not empty"),
    (dict(x=X.int()), "x must be bfloat16"),
    (dict(taps=torch.zeros(4, 7)), r"taps must be a tensor \(n, C\) of sizes \(any, 8\), not empty; got \(4, 7\)"),
    (dict(taps=torch.zeros(0, 8)), "taps must be a tensor"),
    (dict(taps=TAPS.double()), "taps must be float32, as x is; got torch.float64"),
    (dict(taps=TAPS.to("meta")), "taps must be on the device of x, cpu; got meta"),
    (dict(positions=POSITIONS[:1]), r"positions must be a tensor \(B, T\) of sizes \(2, 3\), not empty; got \(1, 3\)"),
    (dict(positions=POSITIONS.float()), "positions must be int32 or int64; got torch.float32"),
    (dict(padded=X), r"padded must be a tensor \(B, n - 1 \+ T, C\) of sizes \(2, 6, 8\), not empty; got \(2, 3, 8\)"),
    (dict(padded=torch.zeros(2, 6, 8).double()), "padded must be float32, as x is; got torch.float64"),
    (dict(backend="cuda"), "backend must be one of auto, reference, loops, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors and Triton"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        short_convolution(**dict(x=X, taps=TAPS, positions=POSITIONS) | change)


# ---- The CPU's loops --------------------------------------------------------

# One to three taps and each dtype have loops of their own, from four taps on the loops are the same: by default one tap
# and many are compiled, in float32.
THREE_TAPS = dict(T=7, C=40, n=3, lead=True)


@needs_loops
@pytest.mark.parametrize("shape", [*(shape for shape in SHAPES if shape != THREE_TAPS), *slow(THREE_TAPS)], ids=str)
@pytest.mark.parametrize("dtype", LOOP_FLOATS, ids=str)
def test_loops_equal_the_reference(shape, dtype, relative_rms):
    inputs = rounded(make_inputs(**shape), dtype)
    with poisoned_memory():
        results = run(inputs, "loops", dtype)
    assert_close(results, inputs, relative_rms, dtype)


@needs_loops
@pytest.mark.parametrize("least, most", [(4, 6), *slow_rows((1, 3))])
def test_loops_on_random_shapes(least, most, relative_rms):
    """With so many taps."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        B, T, C, n, lead = (int(torch.randint(low, high, (), generator=generator))
                            for low, high in ((1, 4), (1, 300), (1, 70), (least, most + 1), (0, 2)))
        document = float(10 ** (3 * torch.rand((), generator=generator)))
        inputs = rounded(make_inputs(B, T, C, n, bool(lead), seed, document), torch.float32)
        assert_close(run(inputs, "loops", torch.float32), inputs, relative_rms)


@needs_loops
def test_loops_repeat_bit_for_bit_with_any_threads():
    """Tasks and their order of summation are the shape's, so that not even the number of threads makes a difference."""
    inputs = make_inputs(3, 300, 33, document=50.0)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(inputs, "loops", torch.float32))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_loops
def test_loops_take_any_strides():
    inputs = make_inputs(T=65, document=20.0)
    contiguous, *others = [run(inputs, "loops", torch.float32, form=form) for form in FORMS.values()]
    assert all(torch.equal(a, b) for results in others for a, b in zip(results, contiguous, strict=True))


@needs_loops
@pytest.mark.parametrize("lead", [False, True])
def test_loops_registration(lead):
    inputs = make_inputs(lead=lead)
    x, taps = (inputs[name].float().requires_grad_() for name in ("x", "taps"))
    arguments = x, taps, inputs["positions"], "loops"
    assert set(torch.library.opcheck(torch.ops.knotgpt.short_convolution.default, arguments).values()) == {"SUCCESS"}


@needs_loops
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler):
    compiled, inputs = torch.compile(short_convolution, fullgraph=True, backend=compiler), make_inputs()
    results = (run(inputs, "auto", torch.float32, function=compiled), run(inputs, "loops", torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


BOUNDS = """
import sys
sys.path.insert(0, ".")
from tests.kernels.test_short_convolution import SHAPES, make_inputs, run
for shape in SHAPES:
    inputs = make_inputs(**shape | dict(n=max(4, shape.get("n", 4))))  # fewer taps: the same text, compiled once more
    inputs["positions"] = 3 * inputs["positions"] - 1
    run(inputs, "loops")
"""


@needs_loops
@pytest.mark.slow
def test_loops_stay_in_their_arrays():
    """Whatever the positions say."""
    environment = os.environ | dict(NUMBA_BOUNDSCHECK="1")
    result = subprocess.run([sys.executable, "-c", BOUNDS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- Triton, interpreted ----------------------------------------------------

@pytest.mark.parametrize("shape", [*SHAPES[1:6], *slow(SHAPES[0], *SHAPES[6:])], ids=str)
def test_interpreted_kernels_equal_the_reference(shape, interpreter, relative_rms):
    inputs = rounded(make_inputs(**shape), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), inputs, relative_rms)


def test_interpreted_kernels_over_many_programs(interpreter, relative_rms):
    inputs = rounded(make_inputs(2, 30, 300, 3, document=10.0), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), inputs, relative_rms)


@pytest.mark.parametrize("taps", [torch.float32, *slow(None)])
def test_interpreted_float16(taps, interpreter, relative_rms):
    inputs = rounded(make_inputs(T=37, C=40), torch.float16)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16, taps=taps)
    assert_close(results, inputs, relative_rms, torch.float16, taps)


def strided_results(inputs, device="cpu", dtype=torch.float32):
    return {name: run(inputs, "triton", dtype, device=device, form=form) for name, form in FORMS.items()}


def test_interpreted_strides(interpreter):
    contiguous, *others = interpreter(__name__, "strided_results", make_inputs()).values()
    assert all(torch.equal(a, b) for results in others for a, b in zip(results, contiguous, strict=True))


def opcheck_interpreted(inputs):
    arguments = inputs["x"].float().requires_grad_(), inputs["taps"].float().requires_grad_(), inputs["positions"]
    return torch.library.opcheck(torch.ops.knotgpt.short_convolution.default, (*arguments, "triton"))


def test_interpreted_registration(interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted", make_inputs()).values()) == {"SUCCESS"}


# ---- Triton, compiled ahead of time -----------------------------------------

def compile_ahead(aot, name, C, n, lead, dtype, capability):
    """A kernel as _triton_forward and _triton_backward launch it for a contiguous x."""
    kernel = getattr(sc, f"_short_convolution_{name}_kernel")
    launch = sc._launch(C, n, capability, name == "bwd")
    warps, element = launch.pop("num_warps"), {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    constants = dict(C=C, N=n, LEAD=lead, **launch)
    kinds = dict.fromkeys(kernel.arg_names, "i32")
    kinds |= dict.fromkeys(("x_ptr", "g_ptr", "y_ptr", "dx_ptr", "taps_ptr"), element)
    kinds |= dict(partial_ptr="*fp32", positions_ptr="*i32")
    signature = {argument: kinds[argument] for argument in kernel.arg_names if argument not in constants}
    strides = [argument for argument in ("x_b", "x_t", "g_b", "g_t") if C % 16 == 0]
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument in strides]
    return aot(kernel, signature, constants, capability, warps, 3, aligned)


FEW = [(768, 4, 0, torch.bfloat16, capability) for capability in (80, 90, 100)]
SLOW = [(C, n, lead, dtype, capability) for capability in (80, 90, 100) for C, n, lead, dtype in
        ((768, 3, 0, torch.bfloat16), (128, 4, 3, torch.bfloat16), (768, 16, 15, torch.bfloat16),
         (33, 4, 0, torch.bfloat16), (768, 4, 0, torch.float32), (8, 16, 0, torch.float32))]


@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("C, n, lead, dtype, capability",
                         [*FEW, *slow_rows(*SLOW)])
def test_kernels_compile_for_cards(C, n, lead, dtype, capability, name, aot):
    result = compile_ahead(aot, name, C, n, lead, dtype, capability)
    assert result.spills == 0 and result.shared <= 32 * 1024 and not result.has_tensor_cores
    if C % 128 == 0 and n <= 4:  # 16 bytes at a time
        assert "ld.global.v4.b32" in result.ptx and "st.global.v4.b32" in result.ptx


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, dict(B=2, T=1003, C=768, document=200.0), dict(T=300, C=768, n=16)],
                         ids=str)
def test_gpu_equals_the_reference(shape, dtype, relative_rms):
    inputs = rounded(make_inputs(**shape), dtype)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, device="cuda")
    assert_close(results, inputs, relative_rms, dtype)


@pytest.mark.gpu
def test_gpu_strides():
    contiguous, *others = strided_results(make_inputs(T=300, C=128), "cuda", torch.bfloat16).values()
    assert all(torch.equal(a, b) for results in others for a, b in zip(results, contiguous, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit(dynamic):
    compiled = torch.compile(short_convolution, fullgraph=True, dynamic=dynamic)
    for T in (1000, 1003):
        inputs = make_inputs(2, T, 768, document=100.0)
        eager, again, graph = (run(inputs, "auto", torch.bfloat16, device="cuda", function=function)
                               for function in (short_convolution, short_convolution, compiled))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, again, graph))


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """2^31.1 numbers; the last tokens are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    T = 3_000_000
    C = 768
    last = 1000
    results = []
    generator = torch.Generator("cuda").manual_seed(0)
    x, g = (torch.randn(1, T, C, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(2))
    taps, positions = torch.randn(4, C, dtype=torch.bfloat16, device="cuda"), torch.arange(T, device="cuda")[None]
    for rows in (slice(None), slice(-last, None)):
        own = x[:, rows].detach().requires_grad_()
        y = short_convolution(own, taps, positions[:, rows] - positions[:, -last] * (rows.start is not None))
        dx, = torch.autograd.grad(y, own, g[:, rows])
        results.append([y[:, -last + 3:].detach().clone(), dx[:, -last + 3:].clone()])
        del y, dx, own
    assert all(torch.equal(a, b) for a, b in zip(*results))
