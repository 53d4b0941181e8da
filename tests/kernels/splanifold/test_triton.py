"""
splanifold_triton against the reference in float64: its kernels in the interpreter, compiled ahead of time and, where
there is one, on a GPU. Gradients are always those of r and the four tensors of controls for a random gradient of the
output.
"""
import math
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.splanifold import SplanifoldControls, basis_triton, products_triton, small_triton, splanifold_reference
from kernels.splanifold.fused import splanifold_triton
from kernels.splanifold.products_triton import Tiles
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows
from tests.kernels.poison import poisoned_memory

NAMES = ("out", "r", "points", "bases", "point_tangents", "base_tangents")


# ---- Inputs and runs --------------------------------------------------------

class Settings(NamedTuple):
    expansion: float = 0.0
    delta_max: float = math.inf
    eps: float = 1e-3
    mix: str = "sum"


def make_inputs(M, G, K, n, S, settings, low=0.0, high=1.0, seed=0):
    """Returns [r, the four controls, gradient] in float64; r uniform in [low, high]."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    r = low + (high - low) * torch.rand(M, G, K, dtype=torch.float64, generator=generator)
    return [r, randn(G, S, n), randn(G, S, n, K), randn(G, S, n, K), randn(G, S, n, K),
            randn(M, n if settings.mix == "sum" else G * n)]


def rounded(inputs, dtype):
    return [x.to(dtype).double() for x in inputs]


def run(inputs, settings, function=splanifold_triton, dtype=torch.float64, device="cpu"):
    """Returns [out, gradients of r and the controls]."""
    *tensors, grad = (x.detach().to(device, dtype) for x in inputs)
    r, *controls = (x.requires_grad_() for x in tensors)
    out = function(r, SplanifoldControls(*controls), *settings)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, [r, *controls], grad))]


def expected(inputs, settings):
    return run(inputs, settings, splanifold_reference)


def shrink(threshold=None):
    """Makes tiles and splits small, so that small inputs have many."""
    tiles = dict.fromkeys(("fwd", "fwd_groups", "bwd_r", "bwd_controls"), Tiles(16, 16, 32, 4, 2))
    products_triton.LAUNCH = dict.fromkeys(products_triton.LAUNCH, tiles)
    products_triton.SPLIT_TOKENS = 16
    small_triton.FORWARD_TOKENS = small_triton.BACKWARD_TOKENS = small_triton.SPLIT_TOKENS = 4
    if threshold is not None:
        basis_triton.THRESHOLD = dict.fromkeys(basis_triton.THRESHOLD, threshold)


def interpreted(inputs, settings, dtype=torch.float32, threshold=None):
    """Returns run's result, called in the interpreter's process."""
    before = dict(basis_triton.THRESHOLD)
    shrink(threshold)
    try:
        with poisoned_memory():
            return run(inputs, settings, dtype=dtype)
    finally:
        basis_triton.THRESHOLD = before


def errors(results, reference, relative_rms):
    """Returns relative RMS errors by name."""
    assert len(results) == len(reference) == len(NAMES)
    return {name: relative_rms(x, y, floor=1e-12) for name, x, y in zip(NAMES, results, reference)}


def bounds(inputs, settings, reference, device="cpu", factor=4.0):
    """
    Returns float32's tolerances by name: what the reference loses in float32, to which 1 / Sigma adds, and sums over
    tokens, outputs and six matrices.
    """
    (M, G, K), n = inputs[0].shape, inputs[1].shape[-1]
    terms = M + 6 * G * K + n
    low = run(inputs, settings, splanifold_reference, torch.float32, device)
    floor = float_bound(terms, torch.float32)
    return {name: reference_bound(x, y, terms, factor=factor, floor=floor) for name, x, y in zip(NAMES, low, reference)}


def assert_close(results, reference, relative_rms, tolerance):
    """tolerance: by name, or a number."""
    tolerance = tolerance if isinstance(tolerance, dict) else dict.fromkeys(NAMES, tolerance)
    found = errors(results, reference, relative_rms)
    assert all(error < tolerance[name] for name, error in found.items()), (found, tolerance)


# ---- Interpreted ------------------------------------------------------------

WARP = 0.7
CASES = [  # M, G, K, n, S, expansion, delta_max, mix
    (21, 1, 2, 3, 3, 0.1, math.inf, "sum"),
    (19, 1, 40, 5, 2, 0.2, WARP, "sum"),
    (5, 2, 16, 7, 2, 0.1, WARP, "sum"),
    (18, 5, 1, 6, 2, 0.0, math.inf, "sum"),
    (7, 11, 3, 5, 3, 0.1, WARP, "sum"),
    (5, 2, 33, 4, 3, 0.1, WARP, "concat"),
    (7, 3, 4, 9, 2, 0.1, math.inf, "concat"),
    (7, 3, 1, 4, 2, 0.1, math.inf, "concat"),
    (5, 35, 2, 2, 2, 0.1, math.inf, "concat"),
    (5, 2, 4, 5, 2, 0.1, WARP, "concat"),
]
SLOW_CASES = [
    (33, 1, 64, 18, 2, 0.2, math.inf, "sum"),
    (17, 3, 32, 16, 2, 0.1, math.inf, "sum"),
    (7, 3, 3, 4, 5, 0.0, math.inf, "concat"),
    (1, 2, 4, 8, 2, 0.0, math.inf, "concat"),
    (18, 9, 4, 4, 3, 0.1, math.inf, "sum"),
    (1, 5, 4, 8, 2, 0.0, math.inf, "concat"),
    (1, 1, 1, 1, 2, 0.0, math.inf, "sum"),
    (17, 1, 16, 17, 2, 0.0, math.inf, "sum"),
    (7, 11, 3, 5, 2, 0.1, WARP, "sum"),
    (19, 1, 64, 5, 5, 0.0, WARP, "sum"),
    (5, 2, 40, 7, 3, 0.1, math.inf, "sum"),
    (18, 9, 2, 17, 2, 0.0, math.inf, "sum"),
    (17, 2, 32, 17, 2, 0.1, math.inf, "concat"),
    (6, 3, 3, 3, 2, 0.1, math.inf, "concat"),
]


@pytest.mark.parametrize("case", [*CASES, *slow(*SLOW_CASES)], ids=str)
def test_interpreted_kernels_equal_the_reference(case, interpreter, relative_rms):
    *shape, expansion, delta_max, mix = case
    settings = Settings(expansion, delta_max, mix=mix)
    inputs = rounded(make_inputs(*shape, settings, -0.1, 1.1), torch.float32)
    reference = expected(inputs, settings)
    assert_close(interpreter(__name__, "interpreted", inputs, settings), reference, relative_rms,
                 bounds(inputs, settings, reference))


EDGES = [(9, 2, 16, 5, 2, WARP, "sum"), (5, 2, 2, 3, 2, math.inf, "concat"),
         *slow((9, 1, 16, 5, 2, math.inf, "sum"), (9, 5, 2, 5, 2, math.inf, "sum"),
               (9, 2, 20, 5, 2, math.inf, "concat"), (5, 2, 4, 2, 2, WARP, "concat"),
               (9, 1, 17, 5, 3, math.inf, "sum"))]


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_interpreted_coordinates_far_outside(case, interpreter, relative_rms):
    *shape, delta_max, mix = case
    settings = Settings(0.3, delta_max, mix=mix)
    inputs = rounded(make_inputs(*shape, settings, -2.0, 3.0), torch.float32)
    reference = expected(inputs, settings)
    assert_close(interpreter(__name__, "interpreted", inputs, settings), reference, relative_rms,
                 bounds(inputs, settings, reference))


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_interpreted_sums_near_zero(case, interpreter, relative_rms):
    """
    Negative and positive coordinates whose sums are 0, about eps and far above: in 1 / eps float32's rounding of a sum
    counts, of the few tokens next to 0, which the reference may round luckily.
    """
    *shape, delta_max, mix = case
    settings = Settings(0.0, delta_max, 0.03, mix)
    inputs = make_inputs(*shape, settings, -0.5, 0.5)
    sums = torch.linspace(-0.1, 0.1, shape[0], dtype=torch.float64)
    inputs[0] += (sums[:, None] - inputs[0].sum(-1))[..., None] / shape[2]
    inputs = rounded(inputs, torch.float32)
    reference = expected(inputs, settings)
    assert_close(interpreter(__name__, "interpreted", inputs, settings), reference, relative_rms,
                 bounds(inputs, settings, reference, factor=16.0))
    if delta_max == math.inf and shape[4] == 2:  # four matrices alone are far off there
        found = errors(interpreter(__name__, "interpreted", inputs, settings, torch.float32, math.inf), reference,
                       relative_rms)
        assert found["out"] > 1e-3 and found["r"] > 1e-2, found


@pytest.mark.parametrize("case", [(5, 2, 16, 3, 2, math.inf, "sum"), (5, 3, 2, 3, 2, math.inf, "concat"),
                                  *slow((5, 3, 3, 2, 2, WARP, "concat"), (5, 3, 2, 3, 3, WARP, "sum"))], ids=str)
def test_interpreted_without_smoothing(case, interpreter, relative_rms):
    *shape, delta_max, mix = case
    settings = Settings(0.0, delta_max, 0.0, mix)
    inputs = rounded(make_inputs(*shape, settings), torch.float32)
    reference = expected(inputs, settings)
    assert_close(interpreter(__name__, "interpreted", inputs, settings), reference, relative_rms,
                 bounds(inputs, settings, reference))


@pytest.mark.parametrize("G, mix", [(2, "sum"), *slow_rows((2, "concat"), (1, "sum"))])
def test_interpreted_threshold(G, mix, interpreter, relative_rms):
    """
    Four matrices where bfloat16's threshold says that they are enough: not exact, but far below its rounding. By
    float32's threshold the same tokens need the corrections, and have them.
    """
    settings = Settings(eps=0.01, mix=mix)
    inputs = rounded(make_inputs(20, G, 2, 3, 2, settings, 0.6, 0.95), torch.float32)
    reference = expected(inputs, settings)
    four = interpreter(__name__, "interpreted", inputs, settings, torch.float32, 2.0 ** -13)
    found, bound = errors(four, reference, relative_rms), bounds(inputs, settings, reference)
    assert max(found["r"] / bound["r"], found["point_tangents"] / bound["point_tangents"]) > 1, (found, bound)
    assert max(found.values()) < 2.0 ** -13, found
    assert_close(interpreter(__name__, "interpreted", inputs, settings), reference, relative_rms, bound)


@pytest.mark.parametrize("case", [(17, 3, 32, 16, 2, WARP, "sum"), (6, 3, 4, 4, 2, math.inf, "concat"),
                                  *slow((33, 1, 64, 18, 2, math.inf, "sum"), (18, 9, 3, 17, 3, math.inf, "sum"))],
                         ids=str)
def test_interpreted_half_precision(case, interpreter, relative_rms):
    """float16 only: the interpreter multiplies bfloat16 as the integers that it keeps them in."""
    *shape, delta_max, mix = case
    settings = Settings(0.1, delta_max, mix=mix)
    inputs = rounded(make_inputs(*shape, settings), torch.float16)
    results = interpreter(__name__, "interpreted", inputs, settings, torch.float16)
    assert [x.dtype for x in results] == [torch.float16] * 6
    reference = expected(inputs, settings)
    exact = bounds(inputs, settings, reference)
    half = rounding_bound(2, torch.float16)
    assert_close(results, reference, relative_rms, {name: half + bound for name, bound in exact.items()})


# ---- As an operator ---------------------------------------------------------

def check_operator(inputs, settings):
    """
    opcheck, one graph with and without controls' gradients, mixed dtypes, strides and repeats, in the interpreter's
    process.
    """
    shrink()
    *tensors, grad = (x.float() for x in inputs)
    torch.library.opcheck(torch.ops.knotgpt.splanifold_triton.default,
                          (*(x.clone().requires_grad_() for x in tensors), *settings))
    eager = run(inputs, settings, dtype=torch.float32)
    graph = torch.compile(splanifold_triton, fullgraph=True, dynamic=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(eager, run(inputs, settings, graph, torch.float32)))
    r, *controls = tensors
    scattered = torch.stack([r, r], -1)[..., 0].requires_grad_()
    out = splanifold_triton(scattered, controls, *settings)
    d_r, = torch.autograd.grad(out, scattered, grad.T.contiguous().T)  # alone
    assert not scattered.is_contiguous() and torch.equal(out, eager[0]) and torch.equal(d_r, eager[1])
    controls = [x.requires_grad_() for x in controls]
    out = splanifold_triton(r, controls, *settings)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, controls, grad), eager[2:]))
    half = r.half().requires_grad_()
    out = splanifold_triton(half, controls, *settings)
    assert out.dtype == torch.float16
    assert [x.dtype for x in torch.autograd.grad(out, [half, *controls],
                                                 grad.half())] == [torch.float16] + [torch.float32] * 4
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        splanifold_triton(r.requires_grad_(), controls, *settings)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in (r, *controls))
    return True


@pytest.mark.parametrize("shape, settings",
                         [((5, 1, 17, 3, 2), Settings(0.1)),
                          *slow_rows(((9, 2, 17, 3, 2), Settings(0.1)), ((9, 2, 2, 2, 2), Settings(0.1, mix="concat")),
                                     ((9, 2, 3, 2, 3), Settings(0.1, WARP)))], ids=str)
def test_operator_is_registered_rightly(shape, settings, interpreter):
    assert interpreter(__name__, "check_operator", make_inputs(*shape, settings), settings)


@pytest.mark.parametrize("S, delta_max, columns",
                         [(2, math.inf, 4 * 16 + 4), (2, 1.0, 6 * 16 + 4), (3, math.inf, 9 * 16 + 6)])
def test_flops_are_counted(S, delta_max, columns):
    """By the formulas of the docstring, without data."""
    with torch.device("meta"):
        r, *controls = (torch.empty(*shape) for shape in ((10, 3, 16), (3, S, 5), *[(3, S, 5, 16)] * 3))
    with FlopCounterMode(display=False) as counter:
        out = splanifold_triton(r.requires_grad_(), controls, 0.0, delta_max, 1e-3, "concat")
        assert out.shape == (10, 15) and counter.get_total_flops() == 2 * 10 * 3 * 5 * columns
        out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 10 * 3 * 5 * columns
        splanifold_triton(r, [x.requires_grad_() for x in controls], 0.0, delta_max, 1e-3, "concat").sum().backward()
    assert counter.get_total_flops() == 5 * 2 * 10 * 3 * 5 * columns


# ---- Compiled ahead of time -------------------------------------------------

def compile_ahead(aot, name, capability, G, K, n, S=2, delta_max=math.inf, mix="sum", dtype=torch.bfloat16, kind=None,
                  given=()):
    """A kernel as a training step launches it; kind: which of bwd_controls' launches; given: further constants."""
    # constants, warps and stages
    r, points = torch.empty(1, G, K, device="meta"), torch.empty(G, S, n, device="meta")
    layout = basis_triton.layout_of(r, points, delta_max, mix)
    module = small_triton if name.startswith("small") else products_triton
    if name.startswith("small"):
        tokens = small_triton.FORWARD_TOKENS if name == "small_fwd" else small_triton.BACKWARD_TOKENS
        constants = small_triton._launch(layout, tokens)
        warps, stages = constants.pop("num_warps"), 3
    elif name in ("stats", "bwd_rows"):
        constants = layout._asdict() | dict(BLOCK_M=module.ROWS, BLOCK_K=module.COLUMNS, CHUNKS=12)
        warps, stages = 4, 3
    else:
        tiles = module._tiles(name, layout, capability, dtype)
        constants = module._constants(layout, dtype, tiles)
        warps, stages = tiles.warps, tiles.stages
        if name == "bwd_r":
            constants["BLOCK_F"] = module._features(layout, constants["BLOCK_K"])
        else:
            constants["BLOCK_F"] = module._spine_columns(layout)
    if kind is not None:
        kinds = [*module._kinds(layout), (SPINE, 1, 1, 1)]
        _, count, width, nodes = next(row for row in kinds if row[0] == kind)
        constants |= dict(KIND=kind, COUNT=count, WIDTH=width, NODES=nodes, MATRICES=6)
        if kind == SPINE:
            constants["BLOCK_K"] = module._spine_columns(layout)
    if layout.J > 1:
        constants["sums_ptr"] = None

    # arguments
    kernel = getattr(module, f"_splanifold_{name}_kernel")
    constants = {argument: value for argument, value in (constants | dict(given)).items()
                 if argument in kernel.arg_names}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    kinds = dict.fromkeys(("stats_ptr", "partial_ptr", "table_ptr", "sums_ptr"), "*fp32")
    kinds |= dict.fromkeys(("scale", "shift", "eps2", "threshold", "inverse_delta_max2"), "fp32")
    signature = {argument: kinds.get(argument, element if argument.endswith("_ptr") else "i32")
                 for argument in kernel.arg_names if argument not in constants}
    aligned = [argument for argument in signature if argument.endswith("_ptr") or argument in ("M", "items")]
    return aot(kernel, signature, constants, capability, warps, stages, aligned)


SPINE = basis_triton.SPINE.value
PRODUCTS = ("fwd", "bwd_r", "bwd_controls")
# G, K, n: K >= 16
PRESETS = [(1, 128, 128), (1, 256, 256), (1, 768, 768), (1, 32, 128), (2, 32, 128), (4, 32, 128)]
PACKED = [(32, 2, 128), (32, 3, 128), (32, 4, 128), (64, 2, 128), (64, 3, 128), (64, 4, 128)]
SMALL = [(32, 2, 2), (32, 3, 3), (32, 4, 4), (64, 2, 2), (64, 3, 3), (64, 4, 4)]


def assert_fits(result):
    assert result.shared <= result.shared_limit and result.spills == 0, (result.shared, result.spills)


@pytest.mark.parametrize("name, kind", [("fwd", None), ("bwd_r", None), ("bwd_controls", 0),
                                        *slow_rows(("bwd_controls", 1), ("bwd_controls", 3))])
@pytest.mark.parametrize("shape", [PRESETS[2], *slow(*PRESETS[:2], *PRESETS[3:], *PACKED)], ids=str)
def test_products_compile_for_hopper(name, kind, shape, aot):
    result = compile_ahead(aot, name, 90, *shape, kind=kind)
    assert_fits(result)
    assert "wgmma.mma_async" in result.ptx


@pytest.mark.parametrize("name", ["small_fwd", "small_bwd"])
@pytest.mark.parametrize("shape", [SMALL[1], *slow(SMALL[0], *SMALL[2:])], ids=str)
def test_small_kernels_compile_for_hopper(name, shape, aot):
    """Sums over tokens stay inside a thread: the only exchange is the question whether a tile needs corrections."""
    result = compile_ahead(aot, name, 90, *shape, mix="concat")
    assert_fits(result)
    assert result.ptx.count("bar.sync") <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("fwd", None), ("bwd_r", None), ("bwd_controls", 2)])
@pytest.mark.parametrize("S, delta_max", [(2, 1.0), (3, math.inf)])
@pytest.mark.parametrize("shape", [(1, 768, 768), (4, 32, 128), (64, 2, 128)], ids=str)
def test_warps_and_nodes_compile_for_hopper(name, kind, S, delta_max, shape, aot):
    result = compile_ahead(aot, name, 90, *shape, S, delta_max, kind=kind)
    assert result.shared <= result.shared_limit and "wgmma.mma_async" in result.ptx
    # coefficients by channel, of three matrices at once
    assert result.spills == 0 or (name, *shape) == ("bwd_r", 64, 2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("fwd", None), ("bwd_r", None), ("bwd_controls", 0)])
@pytest.mark.parametrize("capability, dtype",
                         [(80, torch.bfloat16), (100, torch.bfloat16), (80, torch.float32), (90, torch.float32),
                          (100, torch.float32), (90, torch.float16)])
@pytest.mark.parametrize("shape", [(1, 768, 768), (4, 32, 128), (64, 2, 128)], ids=str)
def test_products_compile_for_cards(name, kind, capability, dtype, shape, aot):
    result = compile_ahead(aot, name, capability, *shape, dtype=dtype, kind=kind)
    # 80's launches serve consumer cards, too
    assert result.shared <= (99 * 1024 if capability == 80 else result.shared_limit) and result.has_tensor_cores
    assert result.spills == 0 or capability != 90


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small_fwd", "small_bwd"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("delta_max", [math.inf, 1.0])
def test_small_kernels_compile_for_cards(name, capability, delta_max, aot):
    assert_fits(compile_ahead(aot, name, capability, 64, 4, 4, delta_max=delta_max, mix="concat"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stats", "bwd_rows"])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("delta_max", [math.inf, 1.0])
def test_passes_over_rows_compile_for_cards(name, capability, delta_max, aot):
    assert_fits(compile_ahead(aot, name, capability, 1, 768, 768, delta_max=delta_max))


ONE_TOKEN = dict.fromkeys(("M", "items", "splits"), 1)  # a launch makes constants of arguments that are 1


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, mix",
                         [("fwd", None, "sum"), ("bwd_r", None, "sum"), ("bwd_controls", 0, "sum"),
                          ("bwd_controls", 1, "sum"), ("bwd_controls", 3, "sum"), ("stats", None, "sum"),
                          ("bwd_rows", None, "sum"), ("small_fwd", None, "concat"), ("small_bwd", None, "concat")])
def test_kernels_compile_for_one_token(name, kind, mix, aot):
    G, K, n = (3, 2, 2) if mix == "concat" else (1, 128, 32)
    assert_fits(compile_ahead(aot, name, 90, G, K, n, mix=mix, kind=kind, given=ONE_TOKEN))


# ---- On a GPU ---------------------------------------------------------------

GPU_CASES = [  # M, G, K, n, S, expansion, delta_max, mix
    (1000, 1, 128, 128, 2, 0.0, math.inf, "sum"),
    (777, 1, 256, 256, 2, 0.1, WARP, "sum"),
    (513, 1, 768, 767, 2, 0.0, math.inf, "sum"),
    (2049, 4, 32, 128, 2, 0.0, math.inf, "sum"),
    (2049, 4, 32, 128, 3, 0.0, WARP, "sum"),
    (300, 1, 100, 65, 5, 0.1, math.inf, "sum"),
    (1000, 64, 2, 128, 2, 0.0, math.inf, "sum"),
    (1000, 33, 3, 100, 2, 0.1, WARP, "sum"),
    (300, 4, 32, 32, 2, 0.0, math.inf, "concat"),
    (300, 3, 17, 33, 3, 0.1, WARP, "concat"),
    (5000, 64, 2, 2, 2, 0.0, math.inf, "concat"),
    (5001, 33, 3, 3, 2, 0.1, math.inf, "concat"),
    (5001, 130, 4, 4, 2, 0.0, WARP, "concat"),
    (301, 5, 1, 7, 2, 0.0, math.inf, "concat"),
    (1, 1, 16, 3, 2, 0.0, math.inf, "sum"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, None)])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_equals_the_reference(case, dtype, tolerance, relative_rms):
    *shape, expansion, delta_max, mix = case
    settings = Settings(expansion, delta_max, mix=mix)
    inputs = rounded(make_inputs(*shape, settings), dtype)
    with poisoned_memory():
        results = run(inputs, settings, dtype=dtype, device="cuda")
    assert all(x.dtype == dtype for x in results)
    reference = run(inputs, settings, splanifold_reference, device="cuda")
    assert_close(results, reference, relative_rms, tolerance or bounds(inputs, settings, reference, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [GPU_CASES[0], GPU_CASES[4], GPU_CASES[10]], ids=str)
def test_gpu_compiled_equals_eager(case, dtype):
    *shape, expansion, delta_max, mix = case
    settings = Settings(expansion, delta_max, mix=mix)
    inputs = make_inputs(*shape, settings)
    compiled = torch.compile(splanifold_triton, fullgraph=True)
    eager, graph = (run(inputs, settings, function, dtype, "cuda") for function in (splanifold_triton, compiled))
    assert all(torch.equal(x, y) for x, y in zip(eager, graph))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gpu_runs_repeat_bit_for_bit(case):
    *shape, expansion, delta_max, mix = case
    settings = Settings(expansion, delta_max, mix=mix)
    inputs = make_inputs(*shape, settings)
    first, second = (run(inputs, settings, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.gpu
@pytest.mark.parametrize("K, G, n, mix", [(64, 40, 40, "concat"), (4, 640, 4, "concat"), (4, 640, 16, "sum")])
def test_gpu_offsets_beyond_32_bits(K, G, n, mix, relative_rms):
    """r has 2^31.3 elements; the last tokens are compared with themselves alone."""
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB of GPU memory")
    M, last, settings = 1 << 20, 512, Settings(mix=mix)
    inputs = make_inputs(last, G, K, n, 2, settings)
    r, *controls, grad = (x.to("cuda", torch.bfloat16) for x in inputs)
    wide, wide_grad = r.new_zeros(M, G, K), grad.new_zeros(M, grad.shape[1])
    wide[-last:], wide_grad[-last:] = r, grad
    out = splanifold_triton(wide.requires_grad_(), controls, *settings)
    d_wide, = torch.autograd.grad(out, wide, wide_grad)
    alone = run(inputs, settings, dtype=torch.bfloat16, device="cuda")
    assert relative_rms(out[-last:].float(), alone[0].float(), floor=0.0) < 6e-3
    assert relative_rms(d_wide[-last:].float(), alone[1].float(), floor=0.0) < 6e-3
