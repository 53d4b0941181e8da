"""
topological_attention_tiled against the reference in float64: its kernels in the interpreter, compiled ahead of time
and, where there is one, on a GPU. Gradients are always those of all five inputs that are given, for a random gradient
of the output.
"""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.topological_attention import tiled as module
from kernels.topological_attention import topological_attention_reference as reference
from kernels.topological_attention.loglinear import topological_attention_loglinear
from kernels.topological_attention.tiled import Tiles, topological_attention_tiled
from tests.errors import float_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory
from tests.kernels.topological_attention.test_topological_attention import (
    NAMES,
    bound,
    exactly,
    farthest,
    float32_bounds,
    inputs,
    run,
)

SMALL = (Tiles(16, 16, 4, 2), Tiles(32, 16, 4, 2))
OTHER = (Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2))
LARGE = (Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2))


def interpreted(tensors, doc_start=None, window=None, tiles=SMALL, dtype=torch.float32):
    """run of the kernels with these tiles forward and backward, called in the interpreter's process."""
    module.FORWARD_TILES, module.BACKWARD_TILES = ({0: {size: {256: launch} for size in (2, 4)}} for launch in tiles)
    with poisoned_memory():
        return run(topological_attention_tiled, tensors, doc_start, window, dtype)


def check(relative_rms, got, tensors, doc_start, window, dtype=torch.float32, tolerance=None):
    """
    Relative RMS errors within float32_bounds, with the rounding of the largest distance, since a distance is a sum of
    two by way of a tile's middle, and in half precision roundings of weights, their gradients and results; tolerance:
    in their place.
    """
    expected = run(reference, exactly(tensors), doc_start, window, dtype)
    bounds, floor = float32_bounds(tensors, expected, doc_start, window, 0 if dtype == torch.float32 else 4)
    assert all(
        got[name].dtype == x.dtype and got[name].shape == x.shape for name, x in zip(NAMES, tensors) if x is not None
    )
    assert got["out"].dtype == tensors[2].dtype
    errors = {name: relative_rms(x, expected[name], floor) for name, x in got.items()}
    distance = rounding_bound(1, torch.float32) * farthest(*tensors[:2])
    bounds = {name: tolerance or distance + bound for name, bound in bounds.items()}
    assert all(error <= bounds[name] for name, error in errors.items()), (errors, bounds)


def single(T, **options):
    return inputs(T, dtype=torch.float32, **options)


# ---- Interpreted ------------------------------------------------------------

CASES = [  # T, window, tiles, options
    (1, None, SMALL, dict(decay=0.1, bias=1.0, H=4, D=1)),
    (63, 7, OTHER, dict(B=1, D=5, decay=0.1, docs=0.1, bias=1.0, H=4)),
    (64, 1, SMALL, dict(D=1, H=1, kv=1, bias=1.0)),
    (65, None, OTHER, dict(D=16, B=1, decay=2.0, bias=3.0, docs=0.05, H=3, kv=1)),
    (65, 65, SMALL, dict(H=1, kv=1, D=3, ties=True, docs=0.1)),
    (100, 20, LARGE, dict(D=64, H=1, kv=1, decay=0.5)),
    (500, None, LARGE, dict(B=1, H=1, kv=1, D=128, decay=0.1, docs=0.01)),
]
SLOW_CASES = [
    (2, None, OTHER, dict(decay=0.1, D=8, H=1, kv=1)),
    (130, None, SMALL, dict(B=1, H=1, kv=1, scale=15.0, docs=0.02)),
    (63, None, SMALL, dict(D=8)),
    (130, None, SMALL, dict(B=1, H=1, kv=1, scale=0.0)),
    (200, None, OTHER, dict(B=1, H=1, kv=1, decay=5.0)),
    (200, 50, SMALL, dict(B=1, H=2, kv=1, docs=0.02, bias=1.0)),
    (1023, None, LARGE, dict(B=1, H=1, kv=1, D=8, decay=0.01, bias=1.0)),
]


@pytest.mark.parametrize("case", [*CASES, *slow(*SLOW_CASES)], ids=str)
def test_interpreted_kernels_equal_the_reference(case, interpreter, relative_rms):
    T, window, tiles, options = case
    tensors, doc_start = single(T, **options)
    check(relative_rms, interpreter(__name__, "interpreted", tensors, doc_start, window, tiles), tensors, doc_start,
          window)


ALL = dict(decay=0.5, bias=1.0, docs=0.05, H=4)


@pytest.mark.parametrize("T, scale, options", [(50, 1.0, ALL), *slow_rows(
    (50, 4.0, {}), (100, 1.0, {}), (100, 4.0, ALL))])
def test_interpreted_float16(T, scale, options, interpreter, relative_rms):
    """
    float16 only: the interpreter multiplies bfloat16 as the integers that it keeps them in. Coordinates, decay and bias
    stay float32.
    """
    tensors, doc_start = single(T, B=1, scale=scale, **options)
    tensors[2] = tensors[2].detach().half().requires_grad_()
    check(relative_rms, interpreter(__name__, "interpreted", tensors, doc_start, None, SMALL, torch.float16), tensors,
          doc_start, None, torch.float16)


SHARP = dict(decay=1.0, bias=1.0, docs=0.05)


@pytest.mark.parametrize("scale, options", [(1e2, SHARP), (1e4, {}), *slow_rows((1e2, {}), (1e4, SHARP))])
def test_interpreted_sharp_heads(scale, options, interpreter, relative_rms):
    """A score is float32: its weight's error is that of a distance."""
    tensors, doc_start = single(70, B=1, scale=scale, **options)
    check(relative_rms, interpreter(__name__, "interpreted", tensors, doc_start), tensors, doc_start, None)


def test_interpreted_queries_beyond_all_keys(interpreter, relative_rms):
    tensors, _ = single(50, B=1, decay=0.1)
    with torch.no_grad():
        tensors[0] += 300
    check(relative_rms, interpreter(__name__, "interpreted", tensors), tensors, None, None)


def test_interpreted_ties_have_derivative_zero(interpreter):
    tensors, _ = single(50, B=1)
    with torch.no_grad():
        tensors[0].fill_(0.5), tensors[1].fill_(0.5)
    got = interpreter(__name__, "interpreted", tensors)
    assert not got["query_coord"].any() and not got["key_coord"].any()
    assert torch.allclose(got["out"], tensors[2].detach().cumsum(1) / torch.arange(1, 51)[:, None, None], rtol=0,
                          atol=4 * float_bound(50, torch.float32))


def test_interpreted_hidden_keys_and_closed_gates(interpreter, relative_rms):
    """A bias of -inf hides a key, here whole tiles of them too; a decay of -1e4 forgets everything before."""
    tensors, _ = single(100, B=1, H=1, kv=1, bias=1.0, decay=0.1)
    with torch.no_grad():
        tensors[4][:, 1::3] = -torch.inf
        tensors[4][:, 10:60] = -torch.inf
        tensors[3][:, 71] = -1e4
    check(relative_rms, interpreter(__name__, "interpreted", tensors), tensors, None, None)


def gradients_of_a_sum(tensors):
    """The gradient of the output is expanded. Called in the interpreter's process."""
    module.FORWARD_TILES, module.BACKWARD_TILES = ({0: {4: {256: launch}}} for launch in OTHER)
    return torch.autograd.grad(topological_attention_tiled(*tensors).sum(), tensors)


def test_interpreted_non_contiguous(interpreter, relative_rms):
    wide = torch.randn(2, 4, 20, 12, generator=torch.Generator().manual_seed(0))
    a, b, g, c = (
        wide[:, heads, :, n].transpose(1, 2)
        for n, heads in enumerate((slice(0, 2), slice(2, 3), slice(0, 2), slice(2, 3)))
    )
    v = wide[:, 2:3, :, 4:].transpose(1, 2)
    tensors = [x.detach().requires_grad_() for x in (a, b, v, g.abs().neg(), c)]
    expected = torch.autograd.grad(reference(*(given := exactly(tensors))).sum(), given)
    got = interpreter(__name__, "gradients_of_a_sum", tensors)
    assert not any(x.is_contiguous() for x in (a, b, v, c))
    assert max(relative_rms(x, y) for x, y in zip(got, expected)) <= bound(tensors)
    tensors[2] = v[..., ::2].detach().requires_grad_()
    check(relative_rms, interpreter(__name__, "interpreted", tensors), tensors, None, None)


def changed(tensors, doc_start, window, where):
    """
    Two runs with other numbers in the tokens `where`, whose outputs have the gradient 0: [(out, gradients)] each.
    Called in the interpreter's process.
    """
    module.FORWARD_TILES, module.BACKWARD_TILES = ({0: {4: {256: launch}}} for launch in SMALL)
    results = []
    for seed in (5, 6):
        fresh, _ = inputs(
            tensors[2].shape[1], B=1, H=1, kv=1, decay=0.1, bias=1.0, seed=seed, dtype=torch.float32, scale=seed
        )
        replaced = [
            torch.where(where.view(1, -1, *[1] * (x.dim() - 2)), y, x).detach().requires_grad_()
            for x, y in zip(tensors, fresh)
        ]
        out = topological_attention_tiled(*replaced, doc_start, window)
        results.append(
            [
                out.detach(),
                *torch.autograd.grad(out, replaced, torch.ones_like(out).masked_fill(where[None, :, None, None], 0)),
            ]
        )
    return results


@pytest.mark.parametrize("window, t", [(None, 40), *slow_rows((20, 40), (None, 1), (20, 1), (None, 69), (20, 69))])
def test_interpreted_causality_is_exact(window, t, interpreter):
    tensors, _ = single(70, B=1, H=1, kv=1, decay=0.1, bias=1.0)
    first, second = interpreter(__name__, "changed", tensors, None, window, torch.arange(70) >= t)
    assert torch.equal(first[0][:, :t], second[0][:, :t])
    assert not any(x[:, t:].any() for x in first[1:])  # nothing flows to what no query with a gradient sees


@pytest.mark.parametrize(
    "window, document", [(20, 23), *slow_rows((None, 23), (None, 0), (20, 0), (None, 51), (20, 51))]
)
def test_interpreted_documents_are_isolated_exactly(window, document, interpreter):
    tensors, _ = single(70, B=1, H=1, kv=1, decay=0.1, bias=1.0)
    starts = torch.tensor([0, 23, 50, 51])
    doc_start = starts[torch.bucketize(torch.arange(70), starts, right=True) - 1][None].int()
    others = doc_start[0] != document
    first, second = interpreter(__name__, "changed", tensors, doc_start, window, others)
    assert all(torch.equal(x[:, ~others], y[:, ~others]) for x, y in zip(first, second))
    assert not any(x[:, others].any() for x in first[1:])


def test_interpreted_runs_repeat_bit_for_bit(interpreter):
    tensors, doc_start = single(40, B=1, decay=0.1, bias=1.0, docs=0.03, kv=1)
    first, second = (interpreter(__name__, "interpreted", tensors, doc_start) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def compiled(tensors, doc_start):
    """run of a compiled function and PyTorch's own checks of the operation, called in the interpreter's process."""
    module.FORWARD_TILES, module.BACKWARD_TILES = ({0: {4: {256: launch}}} for launch in SMALL)
    torch.library.opcheck(torch.ops.knotgpt.topological_attention_tiled.default, (*tensors, doc_start, 9))

    def function(*arguments):
        return 2 * topological_attention_tiled(*arguments).cos()

    return run(function, tensors, doc_start, 9), run(
        torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, doc_start, 9
    )


@pytest.mark.parametrize("options", [dict(decay=0.1, bias=1.0, docs=0.3), *slow({})], ids=["all", "plain"])
def test_interpreted_in_a_graph(options, interpreter):
    tensors, doc_start = single(12, B=1, H=2, kv=1, **options)
    eager, graph = interpreter(__name__, "compiled", tensors, doc_start)
    assert eager.keys() == graph.keys() and all(torch.equal(eager[name], graph[name]) for name in eager)


# ---- Elsewhere --------------------------------------------------------------

@pytest.mark.parametrize(
    "options",
    [dict(decay=0.1, bias=1.0, docs=0.03, H=4), dict(D=300), dict(coordinates=False, decay=0.1)],
    ids=str,
)
def test_without_a_gpu_it_is_loglinear(options):
    tensors, doc_start = single(150, **options)
    torch._dynamo.reset()
    graph = torch.compile(topological_attention_tiled, fullgraph=True, backend="aot_eager")
    expected, *others = (
        run(function, tensors, doc_start, 40)
        for function in (topological_attention_loglinear, topological_attention_tiled, graph)
    )
    assert all(torch.equal(got[name], expected[name]) for got in others for name in expected)


@pytest.mark.parametrize("window, pairs", [(None, 10 * 11 // 2), (3, 1 + 2 + 8 * 3), (99, 55)])
def test_flops_are_counted(window, pairs):
    """By the formulas of the docstring, without data."""
    with torch.device("meta"):
        a = torch.empty(2, 10, 4)
        b = torch.empty(2, 10, 2)
        v = torch.empty(2, 10, 2, 16)
        lse = torch.empty(2, 4, 10, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        out, _ = torch.ops.knotgpt.topological_attention_tiled(a, b, v, None, None, None, window)
        assert out.shape == (2, 10, 4, 16) and counter.get_total_flops() == 2 * 2 * 4 * 16 * pairs
        torch.ops.knotgpt.topological_attention_tiled_backward(a, b, v, None, None, None, window, out, lse, out)
    assert counter.get_total_flops() == 6 * 2 * 4 * 16 * pairs


# ---- Compiled ahead of time -------------------------------------------------

def compile_ahead(aot, name, capability, dtype, D, decay=True, documents=True, bias=False, given=()):
    """
    A kernel as a training step launches it: 12 heads, values from a fused projection of queries, keys and values.
    given: further constants.
    """
    kernel = getattr(module, f"_topological_attention_tiled_{name}_kernel")
    tiles = module.tiles_for(module.FORWARD_TILES if name == "fwd" else module.BACKWARD_TILES, capability, dtype, D)
    constants = dict(
        HEADS=12, KEY_HEADS=12, D=D, BLOCK_D=max(16, 1 << (D - 1).bit_length()), HAS_WEIGHT=decay or bias,
        HAS_DECAY=decay, HAS_BIAS=bias, HAS_FIRST=documents, HALF_SPREAD=20.0, UNSHIFT=1.0,
        PAIRS=module.rows_of_a_thread(capability), STRIDE_VT=3 * 12 * D, STRIDE_GT=12 * D, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, BLOCK_TILES=module.SCORE_TILES, **dict(given)
    )
    present = dict(
        decay_ptr=decay,
        most_ptr=decay,
        bias_ptr=bias,
        first_ptr=documents,
        query_end_ptr=documents,
        d_weight_ptr=decay or bias,
    )
    constants |= {pointer: None for pointer, there in present.items() if not there}
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    kinds = dict(
        decay_ptr="*fp64",
        lse_ptr="*fp64",
        first_ptr="*i32",
        query_end_ptr="*i32",
        sums_ptr="*i64",
        shift="fp32",
        **dict.fromkeys(("value_ptr", "out_ptr", "grad_ptr", "d_value_ptr"), element),
    )
    signature = {
        argument: kinds.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
        if argument not in constants
    }
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument.startswith("stride")]
    warps, stages = {"keys": (1, 3), "bwd_queries": (4, 3)}.get(name, tiles[2:])
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


def assert_fits(result, capability):
    """The launch for 80 serves consumer cards too, which have less shared memory."""
    assert (
        result.spills == 0
        and result.has_tensor_cores
        and result.shared <= (99 * 1024 if capability == 80 else result.shared_limit)
    )


PASSES = ("fwd", "bwd_keys")
CARDS = [
    (capability, dtype, D)
    for capability in (80, 90, 100)
    for dtype, D in (
        *((torch.bfloat16, D) for D in (8, 16, 32, 64, 128, 256)),
        (torch.float16, 64),
        *((torch.float32, D) for D in (16, 64, 128)),
    )
]
DEFAULT = [(90, torch.bfloat16, 128)]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    "capability, dtype, D",
    [*DEFAULT, *slow_rows(*(card for card in CARDS if card not in DEFAULT))],
)
def test_kernels_compile_for_cards(name, capability, dtype, D, aot):
    assert_fits(compile_ahead(aot, name, capability, dtype, D), capability)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("D", [128, *slow(64)])
def test_narrow_tiles_take_no_exponential_per_pair(D, name, aot):
    """
    The loop over the other tiles takes one a pair, and both a few a row: with one a pair in either there would be twice
    as many.
    """
    tiles = module.tiles_for(module.FORWARD_TILES if name == "fwd" else module.BACKWARD_TILES, 90, torch.bfloat16, D)
    pairs = tiles.block_m * tiles.block_n // (32 * tiles.warps)
    assert pairs <= compile_ahead(aot, name, 90, torch.bfloat16, D).ptx.count("ex2.approx") < 1.5 * pairs


# a launch makes constants of arguments that are 1
ONE_TOKEN = dict.fromkeys(("T", "n_tiles", "key_tiles", "query_tiles", "stride_vh", "stride_gh"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    "options",
    [
        dict(decay=False),
        dict(documents=False),
        dict(decay=False, documents=False),
        dict(decay=False, bias=True),
        dict(given=ONE_TOKEN),
        dict(given=ONE_TOKEN, documents=False),
    ],
    ids=str,
)
def test_kernels_compile_for_every_launch(name, options, aot):
    assert_fits(compile_ahead(aot, name, 90, torch.bfloat16, 64, **options), 90)


@pytest.mark.parametrize("name", ["keys", "bwd_queries"])
@pytest.mark.parametrize(
    "options", [dict(bias=True), dict(decay=False, documents=False, given=ONE_TOKEN)], ids=["all", "one token"]
)
def test_preparing_kernels_compile(name, options, aot):
    assert compile_ahead(aot, name, 90, torch.bfloat16, 64, **options).spills == 0


# ---- On a GPU ---------------------------------------------------------------

GPU_CASES = [  # T, window, options
    (1023, None, dict(D=64)),
    (1000, 100, dict(D=128, decay=0.1, bias=1.0, docs=0.01, H=4)),
    (777, None, dict(D=8, decay=0.5, H=3, kv=1)),
    (500, None, dict(D=256, docs=0.01, B=1)),
    (2000, None, dict(D=16, scale=15.0, bias=1.0, B=1)),
    (65, 7, dict(D=5, decay=0.1)),
    (1, None, dict(D=1)),
]


def on_a_gpu(function, tensors, doc_start, window, dtype):
    moved = [None if x is None else x.detach().cuda().requires_grad_() for x in tensors]
    with poisoned_memory():
        got = run(function, moved, None if doc_start is None else doc_start.cuda(), window, dtype)
    return {name: x.cpu() for name, x in got.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, None), (torch.bfloat16, 1e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_equals_the_reference(case, dtype, tolerance, relative_rms):
    T, window, options = case
    tensors, doc_start = single(T, **options)
    tensors[2] = tensors[2].detach().to(dtype).requires_grad_()
    check(relative_rms, on_a_gpu(topological_attention_tiled, tensors, doc_start, window, dtype), tensors, doc_start,
          window, dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_compiled_equals_eager_and_runs_repeat(dtype):
    tensors, doc_start = single(1000, D=64, decay=0.1, bias=1.0, docs=0.01, H=4)
    tensors[2] = tensors[2].detach().to(dtype).requires_grad_()
    graph = torch.compile(topological_attention_tiled, fullgraph=True)
    eager, *others = (
        on_a_gpu(function, tensors, doc_start, 300, dtype)
        for function in (topological_attention_tiled, topological_attention_tiled, graph)
    )
    assert all(torch.equal(other[name], eager[name]) for other in others for name in eager)


@pytest.mark.gpu
def test_gpu_causality_is_exact():
    tensors, _ = single(1000, B=1, D=64, decay=0.1, bias=1.0)
    other = [x.detach().clone() for x in tensors]
    for x in other:
        x[:, 700:] -= 1
    first, second = (topological_attention_tiled(*(x.detach().cuda() for x in given)) for given in (tensors, other))
    assert torch.equal(first[:, :700], second[:, :700]) and not torch.equal(first[:, 700:], second[:, 700:])


@pytest.mark.gpu
def test_gpu_offsets_beyond_32_bits(relative_rms):
    """
    A row of 2^20 tokens and 3,072 channels has 2^31.6 elements; its last head's last tokens are compared with those of
    a document of their own.
    """
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    T = 1 << 20
    H = 48
    last = 4096
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(1, T, H, device="cuda", generator=generator).requires_grad_() for _ in range(2))
    v = torch.randn(1, T, H, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_()
    doc_start = torch.where(torch.arange(T, device="cuda") < T - last, 0, T - last).int()[None]
    results = []
    for tensors, docs in (((a, b, v), doc_start), ([x[:, -last:].detach().requires_grad_() for x in (a, b, v)], None)):
        out = topological_attention_tiled(*tensors, doc_start=docs, window=512)
        results.append([out, *torch.autograd.grad(out[:, -last:].square().sum(), tensors)])
    for x, y in zip(*results):
        assert relative_rms(x[:, -last:, -1], y[:, :, -1]) < 1e-2
