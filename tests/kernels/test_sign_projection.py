"""
sign_projection and its transpose against a matrix of signs made by plain integers; the CPU's loops on random shapes;
the Triton kernels in the interpreter, compiled ahead of time and, where there is one, on a GPU.
"""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import sign_projection as sp
from kernels.backend import has_cpu_loops
from kernels.sign_projection import sign_bytes, sign_projection, sign_projection_transposed
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import LOOP_FLOATS, slow
from tests.kernels.poison import poisoned_memory
from tests.kernels.processes import run_process

CPU = torch.device("cpu")
needs_loops = pytest.mark.skipif(not has_cpu_loops(), reason="needs Numba")


# ---- Signs, inputs and runs -------------------------------------------------

def word(row: int, column: int, seed: int) -> int:
    """A word of the signs by plain integers."""
    def mix(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2 ** 32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2 ** 32
        return x ^ x >> 15

    return mix((mix((row + seed % 2 ** 31) % 2 ** 32) + column * (2 ** 32 - 1_640_531_527)) % 2 ** 32)


def signs(first: int, rows: int, dim: int, seed: int) -> torch.Tensor:
    """S (rows, dim) by plain integers, float64."""
    by_row = [[word(row, column, seed) for column in range(-(-dim // 32))] for row in range(first, first + rows)]
    bits = [[words[j // 32] >> j % 32 & 1 for j in range(dim)] for words in by_row]
    return 2 * torch.tensor(bits, dtype=torch.float64) - 1


def make_inputs(rows, dim, first=0, seed=1, dtype=torch.float64):
    """dict(phi (dim,), g (rows,), first, seed): float64 numbers that are exact in dtype."""
    generator = torch.Generator().manual_seed(rows + dim)
    phi, g = (torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).double() for size in (dim, rows))
    return dict(phi=phi, g=g, first=first, seed=seed)


def run(inputs, backend, dtype=torch.float64, device="cpu", functions=(sign_projection, sign_projection_transposed)):
    """{theta, dphi, its gradient; and S' g and its gradient, by the transposed function}"""
    forward, transposed = functions
    options = inputs["first"], inputs["seed"], backend
    phi, g = (inputs[name].detach().to(device, dtype).requires_grad_() for name in ("phi", "g"))
    theta, back = forward(phi, len(g), *options), transposed(g, len(phi), *options)
    dphi, = torch.autograd.grad(theta, phi, g.detach())
    dg, = torch.autograd.grad(back, g, phi.detach())
    results = dict(theta=theta, dphi=dphi, back=back, dg=dg)
    return {name: x.detach().cpu() for name, x in results.items()}


def run_interpreted(inputs, dtype=torch.float32):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype)


def exact(inputs):
    s = signs(inputs["first"], len(inputs["g"]), len(inputs["phi"]), inputs["seed"])
    theta, back = s @ inputs["phi"], s.T @ inputs["g"]
    return dict(theta=theta, dphi=back, back=back, dg=theta)


def assert_close(results, expected, inputs, relative_rms, dtype):
    """A product is a sum of dim or rows terms; half precision rounds it once, too."""
    assert all(x.dtype == dtype for x in results.values())
    wide = torch.promote_types(dtype, torch.float32)
    terms = dict(theta=len(inputs["phi"]), back=len(inputs["g"]))
    terms |= dict(dphi=terms["back"], dg=terms["theta"])
    for name, x in expected.items():
        tolerance = float_bound(terms[name], wide) + (rounding_bound(1, dtype) if dtype != wide else 0.0)
        assert relative_rms(results[name], x) < tolerance, name


# ---- The signs and the reference --------------------------------------------

def test_bits_are_the_formulas():
    assert [f"{word(row, column, 1):08x}" for row, column in ((0, 0), (1, 0), (0, 1), (2 ** 24, 7))] == [
        "cafeba47", "cab8c8eb", "f53ae6cc", "fd53faa4"]
    for first, seed in ((0, 1), (1000, 2 ** 31 - 1)):
        result = sign_bytes(first, first + 5, 77, seed, CPU)
        expected = [[word(row, j // 4, seed) >> 8 * (j % 4) & 255 for j in range(10)]
                    for row in range(first, first + 5)]
        assert (result - 256 * torch.arange(10)).tolist() == expected


def test_signs_are_balanced_and_independent():
    rows, dim = 4096, 64
    s = sp.signs_of_bytes(torch.zeros(()))[sign_bytes(0, rows, dim, 1, CPU) % 256].flatten(1)
    assert s.shape == (rows, dim)
    # sums of so many independent signs pass six deviations in one case of 10^9
    assert s.mean(0).abs().max() < 6 / rows ** 0.5 and s.mean(1).abs().max() < 6 / dim ** 0.5
    gram = (s.T @ s / rows - torch.eye(dim)).abs().max()
    assert gram < 6 / rows ** 0.5


@pytest.mark.parametrize("dim", (1, 8, 13, 40))
def test_reference_is_the_definition(dim, monkeypatch, relative_rms):
    monkeypatch.setattr(sp, "SIGNS_AT_ONCE", 7 * dim)  # several blocks of rows
    inputs = make_inputs(23, dim, 100, 5)
    assert_close(run(inputs, "reference"), exact(inputs), inputs, relative_rms, torch.float64)


def test_gradcheck():
    inputs = make_inputs(23, 13)
    options = 100, 5, "reference"
    assert torch.autograd.gradcheck(lambda phi: sign_projection(phi, 23, *options), inputs["phi"].requires_grad_())
    assert torch.autograd.gradcheck(lambda g: sign_projection_transposed(g, 13, *options), inputs["g"].requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    inputs = make_inputs(70, 40, dtype=dtype)
    assert_close(run(inputs, "reference", dtype), exact(inputs), inputs, relative_rms, dtype)


def compile_functions(compiler):
    return [torch.compile(function, fullgraph=True, backend=compiler)
            for function in (sign_projection, sign_projection_transposed)]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(compiler):
    inputs = make_inputs(70, 40)
    eager = run(inputs, "reference", torch.float32)
    compiled = run(inputs, "reference", torch.float32, functions=compile_functions(compiler))
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


def test_flops_are_the_products():
    with FlopCounterMode(display=False) as counter:
        run(make_inputs(70, 40), "reference", torch.float32)
    assert counter.get_total_flops() == 4 * 2 * 70 * 40


@pytest.mark.parametrize("change, message", [
    (dict(phi=torch.zeros(2, 3)), r"phi must be a tensor \(dim,\).*not empty; got \(2, 3\)"),
    (dict(phi=torch.zeros(0)), "phi must be a tensor"),
    (dict(phi=torch.zeros(3, dtype=torch.int32)), "phi must be bfloat16.*got torch.int32"),
    (dict(rows=0), "rows must be at least 1; got 0"),
    (dict(first=-1), "first must be at least 0 and the last row below 2.31 - 1; got first -1 and 4 rows"),
    (dict(first=2 ** 31 - 4), "the last row below 2.31 - 1; got first 2147483644 and 4 rows"),
    (dict(backend="cuda"), "backend must be one of auto, reference, loops, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sign_projection(**dict(phi=torch.zeros(3), rows=4) | change)
    change = {dict(phi="g", rows="dim").get(name, name): value for name, value in change.items()}
    message = message.replace("phi", "g").replace("(dim,", "(rows,").replace("rows must", "dim must")
    with pytest.raises(ValueError, match=message):
        sign_projection_transposed(**dict(g=torch.zeros(4), dim=3) | change)


# ---- The CPU's loops --------------------------------------------------------

# one sign; a word not full; two tiles of rows; more than a block of words; rows of two tasks; numbers of rows that wrap
SHAPES = [dict(rows=1, dim=1), dict(rows=23, dim=13, first=100, seed=5), dict(rows=600, dim=40),
          dict(rows=300, dim=165, seed=-3), dict(rows=40, dim=72, first=2 ** 31 - 50, seed=2 ** 31 - 1)]
LARGE = dict(rows=17_000, dim=40, first=7)


@needs_loops
@pytest.mark.parametrize("dtype", LOOP_FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_equal_the_definition(shape, dtype, relative_rms):
    inputs = make_inputs(**shape, dtype=dtype)
    with poisoned_memory():
        results = run(inputs, "loops", dtype)
    assert_close(results, exact(inputs), inputs, relative_rms, dtype)


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loops_in_half_precision(dtype, relative_rms):
    inputs = make_inputs(70, 40, dtype=dtype)
    assert_close(run(inputs, "auto", dtype), exact(inputs), inputs, relative_rms, dtype)


@needs_loops
def test_loops_of_several_tasks_repeat_bit_for_bit_with_any_threads(torch_threads, relative_rms):
    inputs, results = make_inputs(**LARGE, dtype=torch.float32), []
    for count in (1, 2, 2):
        torch_threads(count)
        results.append(run(inputs, "loops", torch.float32))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
    assert_close(results[0], run(inputs, "reference"), inputs, relative_rms, torch.float32)


@needs_loops
@pytest.mark.slow
def test_loops_on_random_shapes(relative_rms):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows, dim, first, seed = (int(torch.randint(1, most, (), generator=generator))
                                  for most in (40_000, 700, 2 ** 30, 2 ** 31))
        inputs = make_inputs(rows, dim, first, seed, torch.float32)
        assert_close(run(inputs, "loops", torch.float32), run(inputs, "reference"), inputs, relative_rms, torch.float32)


@needs_loops
def test_loops_take_any_stride():
    inputs = make_inputs(70, 40, dtype=torch.float32)
    phi, g = (inputs[name].float() for name in ("phi", "g"))
    sparse = [x.repeat_interleave(2)[::2] for x in (phi, g)]
    assert torch.equal(sign_projection(sparse[0], 70), sign_projection(phi, 70))
    assert torch.equal(sign_projection_transposed(sparse[1], 40), sign_projection_transposed(g, 40))


@needs_loops
def test_loops_keep_nan():
    phi, g = torch.ones(40), torch.ones(70)
    phi[3] = g[5] = float("nan")
    assert sign_projection(phi, 70, backend="loops").isnan().all()
    assert sign_projection_transposed(g, 40, backend="loops").isnan().all()


@needs_loops
def test_loops_registration():
    inputs = make_inputs(9, 13)
    for operation, x, size in ((torch.ops.knotgpt.sign_projection, inputs["phi"], 9),
                               (torch.ops.knotgpt.sign_projection_transposed, inputs["g"], 13)):
        arguments = x.float().requires_grad_(), size, 5, 1, "loops"
        assert set(torch.library.opcheck(operation.default, arguments).values()) == {"SUCCESS"}


BOUNDS = """
import torch
from tests.kernels.test_sign_projection import LARGE, SHAPES, make_inputs, run
for shape in [*SHAPES, LARGE]:
    run(make_inputs(**shape), "loops", torch.float32)
"""


@needs_loops
@pytest.mark.slow
def test_loops_stay_in_their_arrays(tmp_path):
    run_process("-c", BOUNDS, cache=tmp_path, NUMBA_BOUNDSCHECK="1")


# ---- Triton, interpreted ----------------------------------------------------

@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[4], *slow(SHAPES[1], SHAPES[2])], ids=str)
def test_interpreted_kernels_equal_the_definition(shape, interpreter, relative_rms):
    inputs = make_inputs(**shape, dtype=torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), exact(inputs), inputs, relative_rms, torch.float32)


def few_programs(inputs):
    """With several tiles of rows for a program of the transposed product."""
    programs, sp.PROGRAMS = sp.PROGRAMS, 2
    try:
        return run_interpreted(inputs)
    finally:
        sp.PROGRAMS = programs


def test_interpreted_programs_of_several_tiles(interpreter, relative_rms):
    inputs = make_inputs(600, 40, dtype=torch.float32)
    assert_close(interpreter(__name__, "few_programs", inputs), exact(inputs), inputs, relative_rms, torch.float32)


def test_interpreted_float16(interpreter, relative_rms):
    inputs = make_inputs(150, 40, dtype=torch.float16)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16)
    assert_close(results, exact(inputs), inputs, relative_rms, torch.float16)


def opcheck_interpreted():
    arguments = torch.ones(13, requires_grad=True), 9, 5, 1, "triton"
    return [torch.library.opcheck(operation.default, arguments)
            for operation in (torch.ops.knotgpt.sign_projection, torch.ops.knotgpt.sign_projection_transposed)]


def test_interpreted_registration(interpreter):
    for results in interpreter(__name__, "opcheck_interpreted"):
        assert set(results.values()) == {"SUCCESS"}


def test_interpreted_float64_is_refused(interpreter):
    with pytest.raises(ValueError, match="backend 'triton' has no float64"):
        interpreter(__name__, "run_interpreted", make_inputs(9, 13), torch.float64)


# ---- Triton, compiled ahead of time -----------------------------------------

@pytest.mark.parametrize("name, capability, dtype", [
    ("fwd", 90, torch.float32), ("bwd", 90, torch.float32),
    *(pytest.param(name, capability, dtype, marks=pytest.mark.slow) for name in ("fwd", "bwd")
      for capability in (80, 90, 100) for dtype in (torch.float32, torch.bfloat16)
      if (capability, dtype) != (90, torch.float32))])
def test_kernels_compile_for_cards(name, capability, dtype, aot):
    kernel, launch = getattr(sp, f"_sign_projection_{name}_kernel"), dict(sp._launch(capability))
    warps = launch.pop("num_warps")
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    kinds = dict(phi_ptr=element, theta_ptr=element, g_ptr=element, partial_ptr="*fp32")
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in launch}
    result = aot(kernel, signature, launch, capability, warps, 3)
    assert result.spills == 0 and result.shared <= 32 * 1024 and not result.has_tensor_cores


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
def test_gpu_bits_are_the_same():
    expected = sign_bytes(2 ** 20, 2 ** 20 + 1000, 500, 3, CPU)
    assert torch.equal(sign_bytes(2 ** 20, 2 ** 20 + 1000, 500, 3, torch.device("cuda")).cpu(), expected)
    ones = [sign_projection(phi, 1000, 2 ** 20, 3, "triton").cpu() for phi in torch.eye(40, device="cuda")]
    assert torch.equal(torch.stack(ones, 1).double(), signs(2 ** 20, 1000, 40, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_gpu_equals_the_definition(shape, dtype, relative_rms):
    inputs = make_inputs(**shape, dtype=dtype)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, "cuda")
    assert_close(results, exact(inputs), inputs, relative_rms, dtype)


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_and_compiled_equals_eager():
    inputs = make_inputs(580_608, 72, dtype=torch.float32)
    eager, again = (run(inputs, "auto", torch.float32, "cuda") for _ in range(2))
    compiled = run(inputs, "auto", torch.float32, "cuda", compile_functions("inductor"))
    assert all(torch.equal(eager[name], again[name]) and torch.equal(eager[name], compiled[name]) for name in eager)
