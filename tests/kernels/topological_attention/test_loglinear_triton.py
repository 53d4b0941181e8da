"""
The Triton kernels of topological attention's backend "loglinear" against the reference in float64: in the interpreter,
compiled ahead of time and, where there is one, on a GPU. Gradients are those of a fixed random projection of the
result.
"""
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from kernels.topological_attention import loglinear as host
from kernels.topological_attention import loglinear_triton as module
from kernels.topological_attention import topological_attention_reference as reference
from kernels.topological_attention.reference import Arguments
from tests.errors import float_bound
from tests.kernels.marks import slow
from tests.kernels.poison import poisoned_memory
from tests.kernels.topological_attention.test_topological_attention import NAMES, exactly, float32_bounds, inputs, run

# several levels at lengths that the interpreter can afford
SMALL = dict(chunk=32, tile=16, block=16, carry=16, carry_warps=4)


@contextmanager
def triton_kernels():
    """The public operation by these kernels, whatever the device."""
    forward, backward = host._forward, host._backward
    host._forward, host._backward = partial(host._triton_forward, module), partial(host._triton_backward, module)
    try:
        yield
    finally:
        host._forward, host._backward = forward, backward


def run_interpreted(tensors, doc_start, window, launch):
    """run() by the kernels, called in the interpreter's process."""
    module.LAUNCH, module.SEARCH = dict.fromkeys(module.LAUNCH, launch), 16
    tensors = [None if x is None else x.requires_grad_() for x in tensors]
    with poisoned_memory(), triton_kernels():
        return run(host.topological_attention_loglinear, tensors, doc_start, window, tensors[2].dtype)


def interpreted(interpreter, tensors, doc_start, window=None, launch=SMALL):
    return interpreter(
        __name__, "run_interpreted", [None if x is None else x.detach() for x in tensors], doc_start, window, launch
    )


def assert_close(got, tensors, doc_start, window, relative_rms, roundings=0):
    expected = run(reference, exactly(tensors), doc_start, window, tensors[2].dtype)
    bounds, floor = float32_bounds(tensors, expected, doc_start, window, roundings)
    errors = {name: relative_rms(x, expected[name], floor) for name, x in got.items()}
    assert got.keys() == expected.keys()
    assert all(error < bounds[name] for name, error in errors.items()), (errors, bounds)
    assert all(
        got[name].dtype == x.dtype and got[name].shape == x.shape for name, x in zip(NAMES, tensors) if x is not None
    )


# ---- Interpreted ------------------------------------------------------------

CASES = {  # T, window, changed tile sizes, options of inputs
    "key_only": (40, None, {}, dict(B=1, H=2, kv=1, decay=0.1, bias=1.0, docs=0.05, coordinates=False)),
    "one": (1, None, {}, dict(H=1, kv=1, D=1)),
    "pair": (33, None, {}, dict(B=1, H=1, kv=1, bias=1.0)),
    "all": (40, None, {}, dict(B=2, H=1, kv=1, D=17, decay=0.2, bias=1.0, docs=0.05)),
    "window": (70, 40, {}, dict(B=1, H=1, kv=1, decay=0.1, bias=1.0, docs=0.02)),
    "ties": (70, None, {}, dict(B=1, H=1, kv=1, scale=0.4, ties=True)),
}
SLOW_CASES = {
    "key_only_window": (70, 20, {}, dict(B=1, H=1, kv=1, decay=0.1, coordinates=False)),
    "chunk": (32, None, {}, dict(B=1, H=3, kv=1, decay=0.1, bias=1.0, docs=0.1)),
    "decay": (90, None, dict(block=32), dict(B=1, H=1, kv=1, decay=5.0)),
    "narrow window": (40, 7, {}, dict(B=1, H=1, kv=1, decay=0.1, bias=1.0, docs=0.05)),
    "narrow window of groups": (40, 7, {}, dict(B=1, H=2, kv=1, decay=0.1, bias=1.0, docs=0.05)),
    "groups": (65, None, {}, dict(B=2, H=2, kv=1, D=17, decay=0.2, bias=1.0, docs=0.03)),
    "plain": (131, None, dict(tile=32), dict(B=1, H=1, kv=1, D=33)),
    "more blocks": (100, 45, {}, dict(B=1, H=1, kv=1, decay=0.1, bias=1.0, docs=0.004)),
    "window of chunks": (128, 64, {}, dict(B=1, H=1, kv=1, ties=True)),
    "more ties": (128, None, {}, dict(B=1, H=1, kv=1, scale=0.4, ties=True)),
    "all equal": (130, None, {}, dict(B=1, H=1, kv=1, scale=0.0, bias=1.0)),
    "key only": (70, None, {}, dict(B=1, H=2, kv=1, decay=0.1, bias=1.0, docs=0.03, coordinates=False)),
}


@pytest.mark.parametrize("case", [*CASES.values(), *slow(*SLOW_CASES.values())], ids=[*CASES, *SLOW_CASES])
def test_interpreted_values_and_gradients(case, interpreter, relative_rms):
    T, window, sizes, options = case
    tensors, doc_start = inputs(T, dtype=torch.float32, **options)
    got = interpreted(interpreter, tensors, doc_start, window, SMALL | sizes)
    assert_close(got, tensors, doc_start, window, relative_rms)


@pytest.mark.parametrize("scale", [1e4, *slow(100.0)])
def test_interpreted_sharp_heads(scale, interpreter, relative_rms):
    """
    Distances are float32 differences: at 1e4 an exponent is right to 5e-4 where a query is as far as that from every
    key.
    """
    tensors, doc_start = inputs(70, B=1, H=1, kv=1, dtype=torch.float32, scale=scale, docs=0.03)
    assert_close(interpreted(interpreter, tensors, doc_start), tensors, doc_start, None, relative_rms)


def test_interpreted_queries_and_keys_far_apart(interpreter, relative_rms):
    """
    Every key below, or above, every query: no weight without its row's maximum, and no gradient of a query's
    coordinate.
    """
    tensors, doc_start = inputs(40, B=1, H=2, kv=2, dtype=torch.float32)
    with torch.no_grad():
        tensors[1] += torch.tensor([-512.0, 512.0])
    assert_close(interpreted(interpreter, tensors, doc_start), tensors, doc_start, None, relative_rms)


def test_interpreted_hidden_keys(interpreter, relative_rms):
    tensors, doc_start = inputs(70, B=1, H=1, kv=1, dtype=torch.float32, bias=1.0)
    with torch.no_grad():
        tensors[4][:, 1:][torch.rand(1, 69, 1, generator=torch.Generator().manual_seed(0)) < 0.8] = -math.inf
    assert_close(interpreted(interpreter, tensors, doc_start), tensors, doc_start, None, relative_rms)


@pytest.mark.slow
def test_interpreted_sums_over_many_blocks(interpreter, relative_rms):
    """More blocks in a node than are summed as a tile, more ends than are compared at a time."""
    tensors, doc_start = inputs(530, B=1, H=1, kv=1, D=2, dtype=torch.float32, decay=1e-3)
    assert_close(interpreted(interpreter, tensors, doc_start, launch=SMALL | dict(chunk=256, tile=128)), tensors,
                 doc_start, None, relative_rms)


def test_interpreted_half_precision(interpreter, relative_rms):
    """float16 only: the interpreter multiplies bfloat16 as the integers that it keeps them in."""
    tensors, doc_start = inputs(40, B=1, H=1, kv=1, D=5, dtype=torch.float32, decay=0.1, docs=0.1)
    tensors[2] = tensors[2].detach().half().requires_grad_()
    assert_close(interpreted(interpreter, tensors, doc_start), tensors, doc_start, None, relative_rms, roundings=2)


def test_interpreted_strided_values(interpreter, relative_rms):
    (a, b, v, *_), doc_start = inputs(20, B=1, H=2, kv=2, D=4, dtype=torch.float32)
    for values in (
        v.detach().transpose(1, 2).contiguous().transpose(1, 2),
        v.detach().repeat_interleave(2, -1)[..., ::2],
    ):
        tensors = [a, b, values.requires_grad_(), None, None]
        assert_close(interpreted(interpreter, tensors, doc_start), tensors, doc_start, None, relative_rms)


def other_tokens(tensors, which):
    """The inputs with random ones at tokens where `which` (T,) is true."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        return [
            None
            if x is None
            else torch.where(which.view(1, -1, *[1] * (x.dim() - 2)), -3 * torch.rand(x.shape, generator=generator), x)
            for x in tensors
        ]


def test_interpreted_documents_are_isolated_exactly(interpreter):
    tensors, _ = inputs(45, B=1, H=1, kv=1, dtype=torch.float32, decay=0.1, bias=1.0)
    index = torch.arange(45)
    doc_start = torch.where(index < 13, 0, torch.where(index < 40, 13, 40)).int()[None]
    own = (index >= 13) & (index < 40)
    first, second = (interpreted(interpreter, x, doc_start) for x in (tensors, other_tokens(tensors, ~own)))
    assert all(torch.equal(first[name][:, own], second[name][:, own]) for name in first)


def test_interpreted_causality(interpreter, relative_rms):
    """Later queries share a tile with earlier ones, so that these keep their values but for rounding."""
    tensors, doc_start = inputs(45, B=1, H=1, kv=1, dtype=torch.float32, decay=0.1, bias=1.0)
    first, second = (
        interpreted(interpreter, x, doc_start)["out"] for x in (tensors, other_tokens(tensors, torch.arange(45) >= 40))
    )
    assert relative_rms(first[:, :40], second[:, :40]) < float_bound(45, torch.float32)
    assert relative_rms(first[:, 40:], second[:, 40:]) > 1e-2


def orders(coordinates, doc, width, chunk):
    """[(node size, order)] of _levels, called in the interpreter's process."""
    T = coordinates.shape[2]
    length = chunk << (-(-width // chunk) - 1).bit_length()
    return list(
        module._levels(
            module._Work(coordinates, None, None, doc, width, -(-T // width), length, dict(SMALL, chunk=chunk))
        )
    )


@pytest.mark.parametrize("width", [75, 40])
def test_nodes_are_sorted_at_every_level(width, interpreter):
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randint(-9, 9, (2, 3, 75), generator=generator) / 4 + 0.0
    doc = (
        torch.where(torch.arange(75) < 20, 0, torch.where(torch.arange(75) < 57, 20, 57))
        .int()
        .expand(3, -1)
        .contiguous()
    )
    levels = interpreter(__name__, "orders", coordinates, doc, width, 16)
    assert [size for size, _ in levels] == ([64, 32, 16] if width == 75 else [32, 16])
    for size, order in levels:
        for side, row, block in torch.cartesian_prod(*(torch.arange(n) for n in order.shape[:3])).tolist():
            first, limit = block * width, min(width, 75 - block * width)
            for node in range(0, order.shape[3], size):
                places = sorted(
                    range(node, node + size),
                    key=lambda p: (0, doc[row, first + p], coordinates[side, row, first + p], p) if p < limit else (1,),
                )
                assert (
                    order[side, row, block, node : node + size].tolist()[: max(0, limit - node)]
                    == places[: max(0, limit - node)]
                )


def test_decay_sums_have_no_rounding_of_other_documents():
    g = -torch.rand(2, 300, 3, generator=torch.Generator().manual_seed(0)) * 50
    doc = torch.where(torch.arange(300) < 111, 0, 111).int().expand(2, -1)
    sums = module._decay_sums(g, doc)
    for part in (slice(0, 111), slice(111, 300)):
        assert torch.allclose(sums[..., part], g.double()[:, part].cumsum(1).transpose(1, 2), rtol=0, atol=1e-10)
    g[:, :111] *= 1e5
    assert torch.equal(module._decay_sums(g, doc)[..., 111:], sums[..., 111:])


def test_needs_a_gpu():
    assert not module.serves(Arguments(None, None, torch.zeros(1, 2, 1, 4)))


# ---- Compiled ahead of time -------------------------------------------------

KERNELS = ("forward", "query_grads", "key_grads", "ends", "carry", "upstream")


def compile_ahead(aot, name, D, dtype, capability, diagonal=False, lower=True, **given):
    """
    A kernel as a training step with decay, bias and documents launches it. given: further constants, None for an absent
    pointer.
    """
    kernel = getattr(module, f"_{name}_kernel")
    launch = module.LAUNCH[dtype.itemsize]
    constants = module._constants(D, dtype)
    constants |= (
        dict(
            BLOCK_T=launch["tile"],
            BLOCK_S=launch["block"],
            BLOCK=module.UPSTREAM if name == "upstream" else launch["block"],
            SEARCH=module.SEARCH,
            GROUP=launch["carry"],
            LOWER=lower,
            DIAGONAL=diagonal,
            QUERIES=True,
        )
        | (dict(order_ptr=None) if diagonal else {})
        | given
    )
    if name == "carry":
        constants["BLOCK_D"] = min(64, constants["BLOCK_D"])
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    pointers = dict(order_ptr="*i32", doc_ptr="*i32", value_ptr=element, rows_ptr=element, upstream_ptr=element)
    signature = {
        argument: pointers.get(argument, "*fp32") if argument.endswith("_ptr") else "i32"
        for argument in kernel.arg_names
        if argument not in constants
    }
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument in ("length", "size")
               or D % 16 == 0 and argument.startswith(("value_", "rows_", "grad_"))]
    warps = dict(forward=module._warps(D), key_grads=module._warps(D), carry=launch["carry_warps"]).get(name, 4)
    return aot(kernel, signature, constants, capability, warps, 2, aligned)


SLOW_SHAPES = [
    (D, dtype, capability)
    for capability in (80, 90, 100)
    for D, dtype in (
        (8, torch.bfloat16),
        (16, torch.bfloat16),
        (48, torch.bfloat16),
        (128, torch.bfloat16),
        (64, torch.float16),
        (64, torch.float32),
    )
]


@pytest.mark.parametrize(
    "name, diagonal", [*((name, False) for name in KERNELS), *((name, True) for name in KERNELS[:3])]
)
@pytest.mark.parametrize(
    "D, dtype, capability",
    [(64, torch.bfloat16, 90), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)],
)
def test_kernels_compile_for_cards(name, diagonal, D, dtype, capability, aot):
    result = compile_ahead(aot, name, D, dtype, capability, diagonal)
    assert result.spills <= (0 if capability == 90 else 32) and (
        result.has_tensor_cores or name in ("ends", "upstream")
    )
    assert result.shared <= min(result.shared_limit, 99 * 1024)  # a consumer card's limit, too


ONES = dict.fromkeys(
    (
        "heads", "group", "rows", "blocks", "T", "width", "count", "value_b", "value_t", "value_h", "rows_b", "rows_t",
        "rows_h"
    ),
    1,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "given",
    [
        ONES,
        dict(lower=False),
        dict(lower=False, diagonal=True),
        dict.fromkeys(
            ("query_shift_ptr", "key_shift_ptr", "shift_ptr", "decay_ptr", "doc_ptr", "column_ptr", "dbias_ptr")
        ),
    ],
    ids=str,
)
def test_kernels_compile_for_every_launch(name, given, aot):
    """A launch makes constants of arguments that are 1."""
    always = dict(
        query_grads=("query_shift_ptr", "column_ptr"),
        key_grads=("query_shift_ptr", "column_ptr"),
        upstream=("column_ptr",),
    ).get(name, ())
    given = {
        argument: value
        for argument, value in given.items()
        if argument not in always and (argument != "diagonal" or name in KERNELS[:3])
    }
    assert compile_ahead(aot, name, 7, torch.bfloat16, 90, **given).spills == 0


# ---- On a GPU ---------------------------------------------------------------

GPU_CASES = {  # T, window, options of inputs
    "all": (3000, None, dict(B=2, H=4, kv=2, D=64, decay=0.01, bias=1.0, docs=0.001)),
    "plain": (2049, None, dict(B=1, H=3, kv=3, D=80)),
    "narrow": (1500, None, dict(B=2, H=2, kv=1, D=1, decay=0.1)),
    "wide": (1100, None, dict(B=1, H=1, kv=1, D=128, docs=0.01)),
    "odd": (1023, None, dict(B=1, H=2, kv=2, D=65, bias=1.0)),
    "short": (100, None, dict(B=1, H=2, kv=2, D=8)),
    "window": (5000, 1300, dict(B=1, H=2, kv=1, D=16, decay=0.01, docs=0.001)),
    "ties": (2500, None, dict(B=1, H=2, kv=2, D=32, ties=True)),
    "key only": (1500, None, dict(B=1, H=2, kv=1, D=64, decay=0.01, coordinates=False)),
}


def on_gpu(tensors, dtype):
    """The inputs with values of a dtype and the rest in float32, as leaves."""
    return [
        None if x is None else x.detach().to("cuda", dtype if name == "value" else torch.float32).requires_grad_()
        for name, x in zip(NAMES, tensors)
    ]


def run_on_gpu(tensors, doc_start, window, function=host.topological_attention_loglinear):
    with triton_kernels():
        return run(function, tensors, None if doc_start is None else doc_start.cuda(), window, tensors[2].dtype)


@pytest.mark.gpu
# of sums over a thousand tokens
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3), (torch.float32, 5e-5)])
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
def test_gpu_equals_the_reference(case, dtype, tolerance, relative_rms):
    T, window, options = case
    tensors, doc_start = inputs(T, **options)
    tensors = on_gpu(tensors, dtype)
    with poisoned_memory():
        got = run_on_gpu(tensors, doc_start, window)
    expected = run(reference, exactly(tensors), None if doc_start is None else doc_start.cuda(), window, dtype)
    errors = {name: relative_rms(x, expected[name].cpu()) for name, x in got.items()}
    assert max(errors.values()) < tolerance, errors


@pytest.mark.gpu
def test_gpu_long_sequence(relative_rms):
    """Against the PyTorch path in float64."""
    tensors, doc_start = inputs(70_001, B=1, H=2, kv=2, D=64, decay=1e-4, docs=1e-5)
    tensors = on_gpu(tensors, torch.bfloat16)
    expected = run(host.topological_attention_loglinear, exactly(tensors), doc_start.cuda(), None, torch.bfloat16)
    errors = {name: relative_rms(x, expected[name].cpu()) for name, x in run_on_gpu(tensors, doc_start, None).items()}
    assert max(errors.values()) < 8e-3, errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_compiled_equals_eager(dtype):
    tensors, doc_start = inputs(1500, H=2, kv=1, D=32, decay=0.01, docs=0.001)
    tensors = on_gpu(tensors, dtype)
    compiled = torch.compile(host.topological_attention_loglinear, fullgraph=True)
    first, second = run_on_gpu(tensors, doc_start, None), run_on_gpu(tensors, doc_start, None, compiled)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_runs_repeat_bit_for_bit():
    tensors, doc_start = inputs(5000, H=2, kv=1, D=64, decay=0.01, ties=True)
    tensors = on_gpu(tensors, torch.bfloat16)
    first, second = run_on_gpu(tensors, doc_start, None), run_on_gpu(tensors, doc_start, None)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_gpu_memory():
    """Beside the result at most three times the size of value."""
    value = torch.randn(1, 1 << 16, 12, 64, device="cuda", dtype=torch.bfloat16)
    coordinates = torch.randn(2, 1, 1 << 16, 12, device="cuda")
    with torch.no_grad(), triton_kernels():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        host.topological_attention_loglinear(*coordinates, value)
        assert torch.cuda.max_memory_allocated() - before <= 4 * value.numel() * 2
