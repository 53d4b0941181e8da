"""
splanifold's loops on a CPU against the reference in float64. Gradients are those of r and the four controls for a
random gradient of the output. test_splanifold.py has what all backends must do.
"""
import math
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("numba")

from kernels import splanifold as package
from kernels.splanifold import SplanifoldControls, splanifold
from tests.errors import rounding_bound
from tests.kernels.marks import LOOP_FLOATS, slow
from tests.kernels.poison import poisoned_memory
from tests.kernels.splanifold.runs import assert_close, bounds, make_inputs, run

with_floats = pytest.mark.parametrize("dtype", LOOP_FLOATS, ids=str)
SHAPES = [  # M, G, K, n, S, expansion, delta_max, eps
    (1, 1, 1, 1, 2, 0.0, math.inf, 1e-3),
    (7, 2, 2, 3, 2, 0.0, math.inf, 1e-3),
    (8, 3, 1, 4, 3, 0.1, 0.5, 1e-3),
    (129, 4, 2, 2, 3, 0.0, math.inf, 1e-3),
    (129, 4, 2, 2, 5, 0.2, 0.3, 0.1),
    (300, 7, 3, 5, 3, 0.0, math.inf, 1e-3),
    (200, 3, 4, 4, 2, 0.0, 2.0, 1e-3),
    (9000, 2, 3, 2, 2, 0.0, math.inf, 1e-3),
    (77, 3, 16, 16, 5, 0.0, math.inf, 1e-3),
    (50, 2, 11, 7, 2, 0.1, 1.0, 1e-2),
]


def options_of(expansion, delta_max, eps):
    return dict(mix="concat", expansion=expansion, delta_max=delta_max, eps=eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@with_floats
def test_loops_equal_the_reference(dtype, shape, relative_rms):
    inputs, options = make_inputs(*shape[:5]), options_of(*shape[5:])
    expected = run(inputs, "reference", **options)
    with poisoned_memory():
        results = run(inputs, "loops", dtype, **options)
    assert_close(results, expected, relative_rms, bounds(inputs, dtype, **options))


@pytest.mark.parametrize("seed", [*range(20), *slow(*range(20, 60))])
@with_floats
def test_loops_of_any_shape_and_option(dtype, seed, relative_rms):
    draw = random.Random(seed)
    M, G, K, n, S = (draw.randint(1, most) for most in (300, 6, 16, 9, 5))
    options = options_of(draw.choice([0.0, 0.5]), draw.choice([0.2, math.inf]), draw.choice([1e-9, 1e-1]))
    inputs = make_inputs(M, G, K, n, S + 1, seed=seed, low=0.1)
    expected = run(inputs, "reference", **options)
    assert_close(run(inputs, "loops", dtype, **options), expected, relative_rms, bounds(inputs, dtype, **options))


def test_loops_do_not_depend_on_the_threads(torch_threads):
    """The order of all sums depends on the number of tokens alone."""
    inputs = make_inputs(700, 5, 2, 2, 3)
    results = []
    for threads in (1, 2, 5):
        torch_threads(threads)
        results += [run(inputs, "loops", torch.float32, mix="concat") for _ in range(2)]
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("K, S", [(1, 2), (2, 3), (4, 4)])
@with_floats
def test_loops_keep_a_bad_number_with_its_token_and_group(dtype, bad, K, S):
    """Its result and r's gradient are not finite where the reference's are not, and all others are finite."""
    r, *controls = make_inputs(19, 3, K, 3, S)
    r[4, 1, 0] = bad
    for backend in ("reference", "loops"):
        out, dr, *_ = run([r, *controls], backend, dtype, mix="concat")
        out = out.view(19, 3, 3)
        assert not out[4, 1].isfinite().any() and not dr[4, 1].isfinite().all()
        out[4, 1], dr[4, 1] = 0.0, 0.0
        assert out.isfinite().all() and dr.isfinite().all()


@pytest.mark.parametrize("eps", [1e-3, 1e-15])
@with_floats
def test_loops_are_finite_where_sigma_is_zero(dtype, eps):
    r, *controls = make_inputs(24, 2, 4, 3, 2)
    r[:12] = 0.0
    assert all(x.isfinite().all() for x in run([r, *controls], "loops", dtype, mix="concat", eps=eps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loops_of_half_precision(dtype, relative_rms):
    """What is computed is float32; results are rounded."""
    inputs = [x.to(dtype).double() for x in make_inputs(100, 4, 3, 2, 3)]
    results = run(inputs, "loops", dtype, mix="concat")
    assert all(x.dtype == dtype for x in results)
    exact = bounds(inputs, torch.float32, mix="concat")
    assert_close(results, run(inputs, "reference", mix="concat"), relative_rms,
                 {name: rounding_bound(1, dtype) + bound for name, bound in exact.items()})


@with_floats
def test_loops_of_mixed_dtypes_and_any_strides(dtype, relative_rms):
    """r in dtype or in float16, the controls in float32."""
    inputs = [x.float().double() for x in make_inputs(60, 4, 3, 2, 3)]
    expected = run(inputs, "loops", torch.float32, mix="concat")
    r, *controls = (torch.stack([x.float()] * 2, -1)[..., 0].requires_grad_() for x in inputs)
    assert not r.is_contiguous()
    out = splanifold(r.to(dtype), SplanifoldControls(*controls), mix="concat", backend="loops")
    assert out.dtype == dtype
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, [r, *controls], grad.T.contiguous().T)
    assert all(x.dtype == torch.float32 for x in gradients)
    assert_close([out.detach(), *gradients], expected, relative_rms, bounds(inputs, torch.float32, mix="concat"))
    half = splanifold(r.half(), SplanifoldControls(*controls), mix="concat", backend="loops")
    assert half.dtype == torch.float16 and half.isfinite().all()


def test_loops_leave_out_what_is_not_asked_for():
    r, *controls = (x.float() for x in make_inputs(30, 2, 3, 5, 2))
    out = splanifold(r, SplanifoldControls(*controls), mix="concat", backend="loops")
    assert not out.requires_grad
    bases = controls[1].clone().requires_grad_()
    splanifold(r, SplanifoldControls(controls[0], bases, *controls[2:]), mix="concat", backend="loops").sum().backward()
    assert bases.grad.isfinite().all()


def test_auto_takes_loops():
    r, *controls = make_inputs(65, 3, 4, 5, 2)
    controls = SplanifoldControls(*controls)
    assert package._choose(r, controls, "concat") == "loops"
    assert package._choose(r, controls, "sum") == "chunked"
    for K, n in ((17, 2), (16, 65)):
        r, *controls = make_inputs(65, 3, K, n, 2)
        assert package._choose(r, SplanifoldControls(*controls), "concat") == "chunked"


def test_loops_in_a_graph():
    """One graph for any number of tokens, bit for bit as without; the registration is right; FLOPs are counted."""
    compiled = torch.compile(splanifold, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (70, 130):
        inputs = make_inputs(M, 2, 4, 3, 3)
        with torch._dynamo.config.patch(error_on_recompile=M > 70):
            results = run(inputs, "loops", torch.float32, function=compiled, mix="concat")
        expected = run(inputs, "loops", torch.float32, mix="concat")
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    tensors = [x.float().requires_grad_() for x in inputs]
    checks = torch.library.opcheck(torch.ops.knotgpt.splanifold_loops.default, (*tensors, 0.1, 0.5, 1e-3))
    assert set(checks.values()) == {"SUCCESS"}
    with FlopCounterMode(display=False) as counter:
        splanifold(tensors[0], SplanifoldControls(*tensors[1:]), mix="concat", backend="loops").sum().backward()
    assert counter.get_total_flops() == 2 * 130 * 2 * 3 * 3 * (3 * 3 + 3 + 10 * 3 + 7)
