"""
norm_rotary against its equations and the trainer's; its Triton kernels in the interpreter, compiled ahead of time and,
where there is one, on a GPU.
"""
import importlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from kernels.norm_rotary import norm_rotary, norm_rotary_reference
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory
from train_gpt import RMSNormalize, rotate

# where a package hands on the function under the module's name, too
nr = importlib.import_module("kernels.norm_rotary")


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(B=2, T=7, H=3, D=32, P=8, seed=0):
    """dict(x, cosine, sine, g) in float64, of angles that do not fall into order; g: gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    angles = 3 * randn(T, P)
    return dict(x=2 * randn(B, T, H, D), cosine=angles.cos(), sine=angles.sin(), g=randn(B, T, H, D))


def rounded(inputs, dtype, tables=torch.float32):
    """Inputs that are exact in dtype, tables in theirs."""
    return {name: x.to(tables if name in ("cosine", "sine") else dtype).double() for name, x in inputs.items()}


def run(inputs, backend="reference", dtype=torch.float64, tables=None, device="cpu", function=norm_rotary,
        form=lambda x: x, **options):
    """(y, dx). form: how x and g lie in memory."""
    x, g = (form(inputs[name].detach().to(device, dtype)) for name in ("x", "g"))
    cosine, sine = (inputs[name].to(device, tables or torch.promote_types(dtype, torch.float32))
                    for name in ("cosine", "sine"))
    y = function(x.requires_grad_(), cosine, sine, backend=backend, **options)
    return [result.detach().cpu() for result in (y, *torch.autograd.grad(y, x, g))]


def run_interpreted(inputs, dtype=torch.float32, **options):
    """run(backend="triton"), called in the interpreter's process."""
    with poisoned_memory():
        return run(inputs, "triton", dtype, **options)


def trainer(x, cosine, sine, backend=None):
    return rotate(RMSNormalize.apply(x), (cosine, sine))


def zero_heads():
    inputs = make_inputs()
    inputs["x"][0, 2], inputs["x"][1, 4, 1] = 0, 0
    return inputs


def assert_close(results, expected, relative_rms, dtype=torch.float32):
    """
    Results in dtype against float64: within sums over a head's D channels in float32, or float64 where it is dtype; in
    half precision y, which the gradient is made of, and dx are rounded.
    """
    tolerance = float_bound(expected[0].shape[-1], torch.promote_types(dtype, torch.float32))
    if dtype.itemsize == 2:
        tolerance += rounding_bound(1, dtype)
    errors = [relative_rms(result, wide) for result, wide in zip(results, expected, strict=True)]
    assert all(result.dtype == dtype for result in results) and max(errors) < tolerance, errors


FORMS = dict(contiguous=lambda x: x, projection=lambda x: torch.cat((x, x), 2)[:, :, :x.shape[2]],
             heads_first=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
             apart=lambda x: torch.cat((x, x[..., :4]), -1)[..., :x.shape[3]],
             channels_first=lambda x: x.transpose(1, 3).contiguous().transpose(1, 3))


# ---- Reference --------------------------------------------------------------

@pytest.mark.parametrize("P", [0, 3, 8])
def test_reference_is_the_definition(P, relative_rms):
    """A pair (a, b) as a + ib turns by the factor exp(-i angle)."""
    x, cosine, sine, _ = make_inputs(D=16, P=P).values()
    n = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    pairs = torch.complex(n[..., :8], n[..., 8:])
    pairs[..., :P] *= torch.complex(cosine, -sine)[:, None]
    y = norm_rotary(x, cosine, sine, eps=0.1)
    assert relative_rms(y, torch.cat((pairs.real, pairs.imag), -1)) < float_bound(16, torch.float64)
    assert y.is_contiguous()


@pytest.mark.parametrize("P", [0, 8, 16])
def test_equals_the_trainer(P, relative_rms):
    inputs = rounded(make_inputs(P=P), torch.float32)
    for function in (norm_rotary, trainer):
        assert_close(run(inputs, dtype=torch.float32, function=function), run(inputs), relative_rms)


@pytest.mark.parametrize("P", [0, 2, 4])
def test_gradcheck(P):
    x, cosine, sine, _ = (x.requires_grad_() for x in make_inputs(2, 3, 2, 8, P).values())
    with torch.no_grad():
        x[0, 1] = 0
    assert torch.autograd.gradcheck(lambda *tensors: norm_rotary_reference(*tensors, eps=0.1), [x, cosine, sine],
                                    eps=1e-6, atol=1e-8, rtol=1e-6)


def test_heads_of_zeros():
    y, dx = run(zero_heads(), dtype=torch.float32)
    assert not y[0, 2].any() and not y[1, 4, 1].any() and dx.isfinite().all()


def test_float16_does_not_overflow():
    """Squares of 600 leave float16's range."""
    x, still = torch.full((1, 2, 1, 8), 600.0, dtype=torch.float16), torch.empty(2, 0)
    assert torch.equal(norm_rotary(x, still, still), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [True, False], ids=["tables in x's dtype", "tables in float32"])
def test_reference_in_other_dtypes(dtype, own, relative_rms):
    tables = dtype if own else torch.float32
    inputs = rounded(make_inputs(), dtype, tables)
    results = run(inputs, "auto", dtype, tables)
    assert_close(results, run(inputs), relative_rms, dtype)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    inputs = rounded(make_inputs(), torch.float32)
    compiled = torch.compile(norm_rotary, fullgraph=True, backend=compiler)
    assert_close(run(inputs, "auto", torch.float32, function=compiled), run(inputs), relative_rms)


# ---- The CPU's loops --------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *slow(torch.float64)], ids=str)
@pytest.mark.parametrize("B, T, H, D, P",
                         [(2, 7, 3, 32, 8), (2, 7, 3, 32, 0), (3, 37, 5, 96, 24), (1, 1, 1, 2, 1), (1, 5, 2, 6, 3),
                          (2, 9, 2, 14, 4)])
def test_loops(B, T, H, D, P, dtype, relative_rms):
    inputs = rounded(make_inputs(B, T, H, D, P), dtype, torch.promote_types(dtype, torch.float32))
    with poisoned_memory():
        results = run(inputs, "loops", dtype)
    assert_close(results, run(inputs), relative_rms, dtype)


def test_loops_gradient_is_that_of_any_tables(relative_rms):
    """cos^2 + sin^2 is not 1."""
    inputs = make_inputs()
    inputs = rounded(inputs | dict(cosine=1.5 * inputs["cosine"] + 0.1), torch.float32)
    assert_close(run(inputs, "loops", torch.float32), run(inputs), relative_rms)


def test_loops_strides():
    contiguous, *others = (run(make_inputs(), "loops", torch.float32, form=form) for form in FORMS.values())
    assert all(torch.equal(result, expected) for results in others
               for result, expected in zip(results, contiguous, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loops_keep_what_is_not_finite(value):
    inputs = zero_heads()
    inputs["x"][1, 3, 2, 5] = value
    for result, expected in zip(run(inputs, "loops", torch.float32), run(inputs, dtype=torch.float32)):
        assert torch.equal(result.isfinite(), expected.isfinite()) and not expected.isfinite().all()


TABLE = torch.zeros(3, 2)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 3, 8)), r"x must be a tensor \(B, T, H, D\), not empty; got \(2, 3, 8\)"),
    (dict(x=torch.zeros(2, 3, 2, 7)), r"x must be a tensor \(B, T, H, D\), D even"),
    (dict(x=torch.zeros(2, 3, 0, 8)), "x must be a tensor.*not empty"),
    (dict(x=1.0), "x must be a tensor.*got float"),
    (dict(x=torch.zeros(2, 3, 2, 8, dtype=torch.int32)), "x must be bfloat16"),
    (dict(cosine=torch.zeros(2, 2)), r"cosine must be a tensor \(T, P\), T = 3, P <= D / 2 = 4; got \(2, 2\)"),
    (dict(sine=torch.zeros(3, 5)), "sine must be a tensor"),
    (dict(sine=TABLE.double()), "sine must be float32, as x is; got torch.float64"),
    (dict(cosine=TABLE.to("meta")), "cosine must be on the device of x, cpu; got meta"),
    (dict(cosine=TABLE.clone().requires_grad_()), "cosine gets no gradient"),
    (dict(sine=torch.zeros(3, 1)), "cosine and sine must have one shape"),
    (dict(eps=0.0), "eps must be above 0"),
    (dict(backend="cuda"), "backend must be one of auto, reference, loops, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        norm_rotary(**dict(x=torch.zeros(2, 3, 2, 8), cosine=TABLE, sine=TABLE) | change)


# ---- Triton, interpreted ----------------------------------------------------

@pytest.mark.parametrize("D", [2, 96, 256, *slow(8, 32, 128)])
@pytest.mark.parametrize("part", [0, 4, 2])
def test_interpreted_kernels_equal_the_reference(D, part, interpreter, relative_rms):
    inputs = rounded(make_inputs(D=D, P=part and D // part), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs), relative_rms)


@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (3, 37, 5), (2, 129, 2)])
def test_interpreted_kernels_over_many_programs(B, T, H, interpreter, relative_rms):
    inputs = rounded(make_inputs(B, T, H, 32, 8), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs, eps=0.1), run(inputs, eps=0.1), relative_rms)


def test_interpreted_heads_of_zeros(interpreter, relative_rms):
    inputs = rounded(zero_heads(), torch.float32)
    y, dx = interpreter(__name__, "run_interpreted", inputs)
    assert not y[0, 2].any() and not y[1, 4, 1].any()
    assert_close((y, dx), run(inputs), relative_rms)


def test_interpreted_gradient_is_that_of_any_tables(interpreter, relative_rms):
    """cos^2 + sin^2 is not 1."""
    inputs = make_inputs()
    inputs = rounded(inputs | dict(cosine=1.5 * inputs["cosine"] + 0.1), torch.float32)
    assert_close(interpreter(__name__, "run_interpreted", inputs), run(inputs), relative_rms)


@pytest.mark.parametrize("tables", [torch.float16, torch.float32])
def test_interpreted_float16(tables, interpreter, relative_rms):
    inputs = make_inputs()
    inputs["x"][1, 2] = 600.0
    inputs = rounded(inputs, torch.float16, tables)
    results = interpreter(__name__, "run_interpreted", inputs, torch.float16, tables=tables)
    assert_close(results, run(inputs), relative_rms, torch.float16)


def strided_results(inputs, device="cpu", dtype=torch.float32):
    return {name: run(inputs, "triton", dtype, device=device, form=form) for name, form in FORMS.items()}


def test_interpreted_strides(interpreter):
    contiguous, *others = interpreter(__name__, "strided_results", make_inputs()).values()
    assert all(torch.equal(result, expected) for results in others
               for result, expected in zip(results, contiguous, strict=True))


def opcheck_interpreted(inputs):
    x, cosine, sine, _ = (x.float() for x in inputs.values())
    return torch.library.opcheck(torch.ops.knotgpt.norm_rotary.default, (x.requires_grad_(), cosine, sine, 1e-6))


def test_interpreted_registration(interpreter):
    assert set(interpreter(__name__, "opcheck_interpreted", make_inputs()).values()) == {"SUCCESS"}


def test_compilers_see_the_kernels():
    """
    In the graphs of both passes stands the kernel, not an opaque operation; what they would compute stays unrun, as
    there is no card.
    """
    graphs, x = [], torch.zeros(2, 3, 2, 8, requires_grad=True)
    def note(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        results = [node if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]
        return make_boxed_func(lambda *inputs: [x if x is None else torch.zeros(x.shape) for x in results])
    compiled = torch.compile(lambda x: nr._forward_op(x, TABLE, TABLE, 1e-6)[0], fullgraph=True,
                             backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    compiled(x).sum().backward()
    assert len(graphs) == 2 and all(any("triton_kernel_wrapper" in target for target in graph)
                                    and not any("knotgpt" in target for target in graph) for graph in graphs)


# ---- Triton, compiled ahead of time -----------------------------------------

def compile_ahead(aot, name, D, P, dtype, capability):
    """A kernel as _operands launches it for heads of a joined projection."""
    kernel, launch = getattr(nr, f"_norm_rotary_{name}_kernel"), nr._launch(D, capability)
    warps = launch.pop("num_warps")
    constants = dict(H=6, D=D, P=P, **launch)
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    kinds = dict(eps="fp32", cosine_ptr="*fp32", sine_ptr="*fp32", rho_ptr="*fp32")
    kinds |= dict.fromkeys(("x_ptr", "y_ptr", "g_ptr", "dx_ptr"), element)
    signature = {argument: kinds.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument[1:] in ("_b", "_t", "_h")
               and D % 16 == 0]
    return aot(kernel, signature, constants, capability, warps, 3, aligned)


SLOW = [*((D, D // 4, torch.bfloat16, capability) for D in (32, 64, 96, 128, 256) for capability in (80, 90, 100)),
        (128, 64, torch.bfloat16, 90), (128, 0, torch.bfloat16, 90), (2, 1, torch.bfloat16, 90),
        (128, 32, torch.float32, 90), (128, 32, torch.float32, 100)]
FEW = [(128, 32, torch.bfloat16, capability) for capability in (80, 90, 100)]


@pytest.mark.parametrize("name", ["fwd", "bwd"])
@pytest.mark.parametrize("D, P, dtype, capability",
                         [*FEW, *slow_rows(*(case for case in SLOW if case not in FEW))])
def test_kernels_compile_for_cards(D, P, dtype, capability, name, aot):
    result = compile_ahead(aot, name, D, P, dtype, capability)
    # a word a warp and row, for the sums
    assert result.spills == 0 and result.shared <= 4096 and not result.has_tensor_cores
    assert D < 32 or "ld.global.v4.b32" in result.ptx and "st.global.v4.b32" in result.ptx  # 16 bytes at a time


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [True, False], ids=["tables in x's dtype", "tables in float32"])
@pytest.mark.parametrize("B, T, H, D, P",
                         [(2, 7, 3, 32, 8), (2, 7, 3, 32, 0), (3, 37, 5, 96, 24), (1, 1, 1, 2, 1), (2, 300, 6, 128, 32),
                          (2, 300, 6, 128, 64), (1, 100, 2, 256, 128)])
def test_gpu_equals_the_reference(B, T, H, D, P, own, dtype, relative_rms):
    tables = dtype if own else torch.float32
    inputs = rounded(make_inputs(B, T, H, D, P), dtype, tables)
    with poisoned_memory():
        results = run(inputs, "triton", dtype, tables, "cuda")
    assert_close(results, run(inputs), relative_rms, dtype)


@pytest.mark.gpu
def test_gpu_heads_of_zeros(relative_rms):
    inputs = rounded(zero_heads(), torch.bfloat16)
    y, dx = run(inputs, "triton", torch.bfloat16, device="cuda")
    assert not y[0, 2].any() and not y[1, 4, 1].any()
    assert_close((y, dx), run(inputs), relative_rms, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_gpu_compiled_equals_eager_and_runs_repeat_bit_for_bit(dynamic):
    compiled = torch.compile(norm_rotary, fullgraph=True, dynamic=dynamic)
    for T in (1000, 1003):
        inputs = make_inputs(2, T, 6, 128, 32)
        eager, again, graph = (run(inputs, "auto", torch.bfloat16, device="cuda", function=function)
                               for function in (norm_rotary, norm_rotary, compiled))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(eager, again, graph))


@pytest.mark.gpu
def test_gpu_strides():
    contiguous, *others = strided_results(make_inputs(), "cuda", torch.bfloat16).values()
    assert all(torch.equal(result, expected) for results in others
               for result, expected in zip(results, contiguous, strict=True))


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """2^31.1 numbers; the last tokens are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    T, last, results = 3_000_000, 1000, []
    x, g = (torch.randn(1, T, 6, 128, dtype=torch.bfloat16, device="cuda",
                        generator=torch.Generator("cuda").manual_seed(seed)) for seed in range(2))
    angles = torch.randn(T, 32, device="cuda")
    for rows in (slice(None), slice(-last, None)):
        own = x[:, rows].detach().requires_grad_()
        y = norm_rotary(own, angles[rows].cos(), angles[rows].sin())
        results.append([part[:, -last:].detach().clone() for part in (y, *torch.autograd.grad(y, own, g[:, rows]))])
        del y, own
    assert all(torch.equal(a, b) for a, b in zip(*results))
