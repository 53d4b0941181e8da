"""
symmetric_product against its equation, in Muon's orthogonalisation too; its Triton kernel in the interpreter, compiled
ahead of time and, where there is one, on a GPU.
"""
import importlib
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.symmetric_product import orthogonalize_symmetric
from kernels.symmetric_product import symmetric_product, symmetric_product_reference
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory
from train_gpt import orthogonalize

# the package may hand on the function under the module's name
sp = importlib.import_module("kernels.symmetric_product")
SCALES = dict(alpha=0.7, beta=-1.3)


# ---- Inputs and runs --------------------------------------------------------

def make_inputs(*shape, dtype=torch.float32, summand=True, tall=False, seed=0):
    """
    dict(x (..., m, k), alpha, and a symmetric (..., m, m) and beta) with numbers exact in dtype. tall: x is a
    transposed view.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    if tall:
        x = x.mT.contiguous().mT
    if not summand:
        return dict(x=x, alpha=SCALES["alpha"])
    a = torch.randn(*shape[:-1], shape[-2], generator=generator)
    return dict(x=x, a=(a + a.mT).to(dtype), **SCALES)


def exact(inputs):
    return symmetric_product_reference(**{name: x.double() if isinstance(x, torch.Tensor) else x
                                          for name, x in inputs.items()})


def run_interpreted(inputs):
    """Called in the interpreter's process, as the functions below that are named to the interpreter."""
    with poisoned_memory():
        return symmetric_product(**inputs, backend="triton")


def moved(inputs, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


# ---- Reference --------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 5), (2, 4, 3, 5)])
def test_reference_is_the_definition(shape, relative_rms):
    inputs = make_inputs(*shape, dtype=torch.float64)
    product = torch.einsum("...ik,...jk->...ij", inputs["x"], inputs["x"])
    expected = 0.7 * product - 1.3 * inputs["a"]
    assert relative_rms(symmetric_product_reference(**inputs), expected) < float_bound(5, torch.float64)
    assert relative_rms(symmetric_product_reference(inputs["x"]), product) < float_bound(5, torch.float64)


def test_gradcheck():
    inputs = make_inputs(2, 3, 4, dtype=torch.float64)

    def call(x, a):
        return symmetric_product(x, a, **SCALES)

    assert torch.autograd.gradcheck(call, (inputs["x"].requires_grad_(), inputs["a"].requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_in_other_dtypes(dtype, relative_rms):
    inputs = make_inputs(3, 40, 70, dtype=dtype)
    result = symmetric_product(**inputs)
    tolerance = float_bound(70, torch.float32) + (rounding_bound(1, dtype) if dtype != torch.float32 else 0.0)
    assert result.dtype == dtype and relative_rms(result, exact(inputs), floor=0.0) < tolerance


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_reference_equals_eager(compiler, relative_rms):
    inputs = make_inputs(3, 20, 30)
    result = torch.compile(symmetric_product, fullgraph=True, backend=compiler)(**inputs)
    assert relative_rms(result, exact(inputs)) < float_bound(30, torch.float32)


def test_flops_are_the_plain_products():
    x = torch.empty(3, 20, 30, device="meta")
    with FlopCounterMode(display=False) as kernel:
        torch.ops.knotgpt.symmetric_product(x, None, 1.0, 0.0)
    with FlopCounterMode(display=False) as plain:
        symmetric_product(x)
    assert kernel.get_total_flops() == plain.get_total_flops() == 2 * 3 * 20 * 20 * 30


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(0, 3, 4)), r"x must be a tensor \(..., m, k\), not empty; got \(0, 3, 4\)"),
    (dict(x=torch.zeros(4)), "x must be a tensor"),
    (dict(x=torch.zeros(3, 4, dtype=torch.int32)), "x must be bfloat16.*int32"),
    (dict(a=torch.zeros(4, 4)), r"a must be a tensor \(..., m, m\) of sizes \(3, 3\), not empty; got \(4, 4\)"),
    (dict(a=1.0), "a must be a tensor.*got float"),
    (dict(a=torch.zeros(3, 3).half()), "a must be float32, as x is; got torch.float16"),
    (dict(a=torch.zeros(3, 3, device="meta")), "a must be on the device of x, cpu; got meta"),
    (dict(alpha=torch.ones(())), r"alpha must be a number; got \(\)"),
    (dict(beta="1"), "beta must be a number; got str"),
    (dict(a=None), "beta must be 0 where a is None; got -1.3: give a"),
    (dict(backend="cuda"), "backend must be one of auto, reference, triton; got 'cuda'"),
    (dict(backend="triton"), "backend 'triton' needs CUDA tensors"),
])
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        symmetric_product(**dict(x=torch.zeros(3, 4), a=torch.zeros(3, 3), **SCALES) | change)


# ---- Triton, interpreted ----------------------------------------------------

SHAPES = [(1, 1), (64, 64), (2, 3, 40, 70), (2, 130, 33), (161, 16), (22, 130, 5)]  # the last in larger tiles
FEW = [((1, 1), False, False), ((2, 3, 40, 70), True, False), ((2, 130, 33), True, True), ((161, 16), False, True),
       ((22, 130, 5), True, False)]
MORE = [case for case in product(SHAPES, (False, True), (False, True)) if case not in FEW]


@pytest.mark.parametrize("shape, summand, tall", [*FEW, *slow_rows(*MORE)])
def test_interpreted_kernel_equals_the_reference(shape, summand, tall, interpreter, relative_rms):
    inputs = make_inputs(*shape, summand=summand, tall=tall)
    result = interpreter(__name__, "run_interpreted", inputs)
    assert relative_rms(result, exact(inputs)) < float_bound(shape[-1], torch.float32)
    assert torch.equal(result, result.mT)


def test_interpreted_float16(interpreter, relative_rms):
    inputs = make_inputs(2, 70, 90, dtype=torch.float16)
    result = interpreter(__name__, "run_interpreted", inputs)
    assert result.dtype == torch.float16 and torch.equal(result, result.mT)
    tolerance = rounding_bound(1, torch.float16) + float_bound(90, torch.float32)
    assert relative_rms(result, exact(inputs)) < tolerance


def test_interpreted_kernel_reads_half_of_a(interpreter):
    """Nothing above the diagonal, and nothing at all where beta is 0."""
    inputs = make_inputs(2, 70, 20)
    above = torch.ones(70, 70).triu(1).bool()
    half = inputs | dict(a=inputs["a"].masked_fill(above, float("nan")))
    assert torch.equal(interpreter(__name__, "run_interpreted", half), interpreter(__name__, "run_interpreted", inputs))
    none = make_inputs(2, 70, 20, summand=False)
    unread = dict(x=inputs["x"], alpha=0.7, a=torch.full_like(inputs["a"], float("nan")))
    assert torch.equal(interpreter(__name__, "run_interpreted", unread), interpreter(__name__, "run_interpreted", none))
    assert not symmetric_product(**unread).isnan().any()


def strided_results(inputs, device="cpu"):
    """Results for matrices in other places of memory; the last of the list is that of contiguous ones."""
    x, a = inputs["x"].to(device), inputs["a"].to(device)

    def sparse(x):
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2]

    def swapped(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    forms = [(sparse(x), sparse(a)), (swapped(x), swapped(a)), (x.mT.contiguous().mT, a.mT.contiguous().mT), (x, a)]
    return [symmetric_product(x, a, **SCALES, backend="triton").cpu() for x, a in forms]


def broadcast_results(inputs, device="cpu"):
    """For one matrix as a batch of three, and for that matrix alone."""
    x, a = inputs["x"][0].to(device), inputs["a"][0].to(device)
    pairs = [(x[:1].expand(3, -1, -1), a[:1].expand(3, -1, -1)), (x[:1], a[:1])]
    return [symmetric_product(x, a, **SCALES, backend="triton").cpu() for x, a in pairs]


def test_interpreted_strides(interpreter):
    *others, contiguous = interpreter(__name__, "strided_results", make_inputs(2, 3, 40, 36))
    assert all(torch.equal(x, contiguous) for x in others)
    batch, alone = interpreter(__name__, "broadcast_results", make_inputs(2, 3, 40, 36))
    assert torch.equal(batch, alone.expand_as(batch))


def orthogonalize_interpreted(matrices):
    with poisoned_memory():
        return orthogonalize_symmetric(matrices, backend="triton")


@pytest.mark.parametrize("shape", [(2, 80, 48), *slow((3, 48, 80))])
def test_interpreted_orthogonalisation_is_the_trainers(shape, interpreter, relative_rms):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result, true = interpreter(__name__, "orthogonalize_interpreted", matrices), orthogonalize(matrices.double())
    trainers, terms = orthogonalize(matrices), 15 * 80  # five steps of three products
    bound = reference_bound(trainers, true, terms)
    assert relative_rms(result, true) < bound < 10 * float_bound(terms, torch.float32)
    assert torch.equal(orthogonalize_symmetric(matrices), trainers)


def opcheck_interpreted(x, a):
    return torch.library.opcheck(torch.ops.knotgpt.symmetric_product.default,
                                 (x, a, 0.7, -1.3 if a is not None else 0.0))


@pytest.mark.parametrize("summand", [True, *slow(False)])
def test_interpreted_registration(summand, interpreter):
    inputs = make_inputs(2, 3, 10, 7, summand=summand)
    assert set(interpreter(__name__, "opcheck_interpreted", inputs["x"], inputs.get("a")).values()) == {"SUCCESS"}


@pytest.mark.parametrize("inputs, message", [
    (dict(x=torch.zeros(3, 4, dtype=torch.float64)), "backend 'triton' has no float64"),
    (dict(x=torch.zeros(3, 4, requires_grad=True)), "backend 'triton' has no gradient, and x or a requires one"),
    (dict(x=torch.zeros(3, 4), a=torch.zeros(3, 3, requires_grad=True), beta=1.0), "backend 'triton' has no gradient"),
])
def test_interpreted_wrong_arguments(inputs, message, interpreter):
    with pytest.raises(ValueError, match=message):
        interpreter(__name__, "run_interpreted", inputs)


# ---- Triton, compiled ahead of time -----------------------------------------

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def compile_ahead(aot, N, m, k, dtype, capability, summand, tall):
    """The kernel as a launch on that card compiles it for contiguous matrices (tall: for a transposed view of such)."""
    kernel, launch = sp._symmetric_product_kernel, sp._launch(capability // 10, dtype, N, m, k)
    warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
    constants = launch | {"x_row" if tall else "x_column": 1} | (dict(a_column=1) if summand else dict(a_ptr=None))
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    kinds = dict(x_ptr=element, a_ptr=element, s_ptr=element, alpha="fp32", beta="fp32")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = [name for name in signature if name.endswith("_ptr") or name not in ("alpha", "beta") and m % 16 == 0
               and k % 16 == 0]
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


# the polynomial of the gram matrix, whose k is m; the gram matrix of wide matrices and of tall ones, transposed
CASES = [(shape, summand, tall) for shape in [(12, 768, 768), (12, 768, 3072), (16, 1024, 4096), (8, 384, 384)]
         for summand, tall in ([(True, False)] if shape[1] == shape[2] else []) + [(False, False), (False, True)]]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape, summand, tall",
                         [CASES[0], *slow_rows(*CASES[1:])])
def test_kernel_compiles_for_cards(shape, summand, tall, capability, aot):
    result = compile_ahead(aot, *shape, torch.bfloat16, capability, summand, tall)
    assert INSTRUCTION[capability] in result.ptx and result.has_tensor_cores
    assert result.spills <= (0 if capability == 90 else 16) and result.shared <= result.shared_limit


@pytest.mark.slow
# consumer cards launch as the first
@pytest.mark.parametrize("capability, shared_limit", [(80, 99 * 1024), (90, 227 * 1024)])
@pytest.mark.parametrize("dtype, shape", [(torch.bfloat16, (3, 208, 112)), (torch.bfloat16, (3, 200, 100)),
                                          (torch.float16, (12, 768, 768)), (torch.float32, (12, 768, 768))])
def test_kernel_compiles_for_other_dtypes_and_sizes(dtype, shape, capability, shared_limit, aot):
    result = compile_ahead(aot, *shape, dtype, capability, True, False)
    assert result.shared <= shared_limit and result.has_tensor_cores == (dtype != torch.float32)
    assert result.spills == 0 or shape[1] % 16  # loads number by number take more pointers than registers


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("summand, tall", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(12, 768, 768), (8, 384, 384), (2, 1024, 4096), (2, 3, 40, 70), (5, 65, 33),
                                   (2, 200, 136), (1, 1)])
def test_gpu_equals_the_reference_and_runs_repeat_bit_for_bit(shape, summand, tall, dtype, relative_rms):
    inputs = moved(make_inputs(*shape, dtype=dtype, summand=summand, tall=tall), "cuda")
    with poisoned_memory():
        result, again = (symmetric_product(**inputs, backend="triton") for _ in range(2))
    assert torch.equal(result, again) and torch.equal(result, result.mT)
    assert relative_rms(result, exact(inputs), floor=0.0) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.gpu
def test_gpu_strides():
    *others, contiguous = strided_results(make_inputs(2, 3, 40, 36, dtype=torch.bfloat16), "cuda")
    assert all(torch.equal(x, contiguous) for x in others)
    batch, alone = broadcast_results(make_inputs(2, 3, 40, 36, dtype=torch.bfloat16), "cuda")
    assert torch.equal(batch, alone.expand_as(batch))


@pytest.mark.gpu
def test_gpu_compiled_equals_eager():
    inputs = moved(make_inputs(4, 256, 320, dtype=torch.bfloat16), "cuda")
    assert torch.equal(torch.compile(symmetric_product, fullgraph=True)(**inputs),
                       symmetric_product(**inputs, backend="triton"))


@pytest.mark.gpu
def test_gpu_auto_keeps_gradients(relative_rms):
    inputs = moved(make_inputs(2, 30, 40), "cuda")
    x = inputs["x"].requires_grad_()
    gradient, = torch.autograd.grad(symmetric_product(**inputs).sum(), x)
    assert relative_rms(gradient, 1.4 * x.detach().double().sum(-2, keepdim=True).expand_as(x), floor=0.0) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6, 768, 768), (3, 768, 3072), (3, 3072, 768)])
@pytest.mark.parametrize("function", [orthogonalize_symmetric,
                                      lambda x: orthogonalize_symmetric(x,
                                                                        function=torch.compile(
    lambda x: orthogonalize(x), fullgraph=True))], ids=["eager", "compiled"])
def test_gpu_orthogonalisation_is_as_near_as_the_trainers(function, shape, relative_rms):
    """Both against float64: 15 products rounded to bfloat16, which are not those of each other."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    true = orthogonalize(matrices.double())
    assert relative_rms(function(matrices), true, floor=0.0) < 1.2 * relative_rms(orthogonalize(matrices), true,
                                                                                  floor=0.0)


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits():
    """4,096 results of 768 x 768 are 2^31.2 elements; the last ones are compared with those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    x = torch.randn(4096, 768, 16, device="cuda", dtype=torch.bfloat16,
                    generator=torch.Generator("cuda").manual_seed(0))
    gram = symmetric_product(x)
    assert torch.equal(gram[-20:], symmetric_product(x[-20:]))
    assert torch.equal(symmetric_product(gram, gram, 0.5, 2.0)[-20:],
                       symmetric_product(gram[-20:], gram[-20:], 0.5, 2.0))
