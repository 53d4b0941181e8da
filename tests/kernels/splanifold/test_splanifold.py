"""
splanifold: the reference against the equations written out for one point, the chunked form against the reference, and
what the equations imply: the spine, affine equivariance, cubics, continuity, fitting. Gradients are always those of r
and the four controls for a random gradient of the output.
"""
import math
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import splanifold as package
from kernels.splanifold import MIXES, SplanifoldControls, chunked, splanifold, splanifold_reference
from tests.errors import cancellation, float_bound, rounding_bound
from tests.kernels.marks import slow
from tests.kernels.poison import poisoned_memory
from tests.kernels.splanifold.runs import assert_close, bounds, make_inputs, run

# ---- Reference --------------------------------------------------------------

def literal(r, points, bases, point_tangents, base_tangents, expansion, delta_max, eps):
    """One point of one splanifold from lists of numbers: r (K), P (S, n), the others (S, n, K)."""
    K, S, n = len(r), len(points), len(points[0])
    u = [(1 + 2 * expansion) * x - expansion for x in r]
    total = sum(u)
    t = total / K
    delta = [x - t for x in u]
    warp = 1 / math.sqrt(1 + sum(x * x for x in delta) / delta_max ** 2)
    w = [(total * x + eps ** 2 / K) / (total ** 2 + eps ** 2) for x in u]
    j = min(max(math.floor(t * (S - 1)), 0), S - 2)
    tau = t * (S - 1) - j
    h00, h01 = 2 * tau ** 3 - 3 * tau ** 2 + 1, -2 * tau ** 3 + 3 * tau ** 2
    h10, h11 = tau ** 3 - 2 * tau ** 2 + tau, tau ** 3 - tau ** 2

    def row(matrix, i, vector):
        return sum(a * b for a, b in zip(matrix[i], vector))

    out = []
    for i in range(n):
        spine = h00 * points[j][i] + h01 * points[j + 1][i]
        spine += h10 * row(point_tangents[j], i, w) + h11 * row(point_tangents[j + 1], i, w)
        directions = (h00, bases[j]), (h01, bases[j + 1]), (h10, base_tangents[j]), (h11, base_tangents[j + 1])
        out.append(spine + sum(h * warp * row(matrices, i, delta) for h, matrices in directions))
    return out


@pytest.mark.parametrize("K", [1, 2, 3, 16])
@pytest.mark.parametrize("S", [2, 3, 5])
@pytest.mark.parametrize("expansion, delta_max, eps", [(0.0, math.inf, 1e-3), (0.25, 0.5, 0.3)])
def test_reference_is_the_equations(K, S, expansion, delta_max, eps, relative_rms):
    inputs = make_inputs(11, 2, K, 3, S, low=-0.5, high=1.5)
    r, *controls = inputs
    expected = torch.tensor([[literal(r[m, g].tolist(), *(x[g].tolist() for x in controls), expansion, delta_max, eps)
                              for g in range(2)] for m in range(11)], dtype=torch.float64)
    for mix, shaped in (("sum", expected.sum(1)), ("concat", expected.flatten(1))):
        out = splanifold_reference(r, SplanifoldControls(*controls), expansion, delta_max, eps, mix)
        tolerance = bounds(inputs, expansion=expansion, delta_max=delta_max, eps=eps, mix=mix)
        assert relative_rms(out, shaped) < tolerance["out"]


# ---- PyTorch chunks ---------------------------------------------------------

SHAPES = [  # M, G, K, n, S, mix, expansion, delta_max, eps
    (1, 1, 1, 1, 2, "sum", 0.0, math.inf, 1e-3),
    (1, 2, 2, 3, 2, "concat", 0.0, math.inf, 1e-3),
    (37, 3, 1, 4, 3, "sum", 0.1, 0.5, 1e-3),
    (37, 5, 1, 3, 2, "concat", 0.0, math.inf, 1e-3),
    (129, 4, 2, 7, 2, "sum", 0.0, math.inf, 1e-3),
    (129, 4, 2, 2, 5, "concat", 0.2, 0.3, 0.1),
    (63, 7, 3, 8, 2, "sum", 0.1, 1.0, 1e-3),
    (63, 7, 3, 5, 3, "concat", 0.0, math.inf, 1e-3),
    (200, 3, 4, 4, 2, "concat", 0.0, math.inf, 1e-3),
    (65, 3, 4, 9, 5, "sum", 0.0, 2.0, 1e-3),
    (33, 2, 16, 5, 2, "sum", 0.0, math.inf, 1e-3),
    (33, 2, 16, 6, 5, "concat", 0.1, 1.0, 1e-2),
    (57, 2, 16, 6, 5, "sum", 0.0, math.inf, 1e-2),
    (31, 1, 32, 17, 3, "sum", 0.0, 3.0, 1e-3),
    (31, 3, 32, 8, 2, "concat", 0.0, math.inf, 1e-3),
    (40, 1, 64, 33, 2, "sum", 0.5, math.inf, 1e-3),
    (35, 1, 256, 12, 2, "sum", 0.0, math.inf, 1e-3),
    (35, 1, 256, 5, 3, "sum", 0.0, 2.0, 1e-3),
]


def options_of(mix, expansion, delta_max, eps):
    return dict(mix=mix, expansion=expansion, delta_max=delta_max, eps=eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_equal_the_reference(shape, relative_rms):
    inputs, options = make_inputs(*shape[:5]), options_of(*shape[5:])
    with poisoned_memory():
        results = run(inputs, "chunked", **options)
    expected = run(inputs, "reference", **options)
    assert_close(results, expected, relative_rms, bounds(inputs, **options))
    assert_close(run(inputs, "chunked", torch.float32, **options), expected, relative_rms,
                 bounds(inputs, torch.float32, **options))


@pytest.mark.parametrize("chunk", [1, 700, 5000])
@pytest.mark.parametrize("K, mix, S", [(3, "sum", 2), (3, "concat", 4), (32, "sum", 2), (32, "concat", 2),
                                       (32, "sum", 4), (32, "concat", 4)])
def test_any_number_of_chunks(chunk, K, mix, S, monkeypatch, relative_rms):
    inputs = make_inputs(53, 2, K, 6, S)
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    assert_close(run(inputs, "chunked", mix=mix), run(inputs, "reference", mix=mix), relative_rms,
                 bounds(inputs, mix=mix))


def fours(r, S, dtype, eps=1e-3, delta_max=math.inf):
    """Which chunks make do with four matrices."""
    return [chunk.four for *_, chunk in chunked._walk(r.to(dtype), S, 0.0, 1 / delta_max, eps, "sum", dtype)]


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_four_matrices_do_where_alpha_is_a_polynomial(dtype, eps, monkeypatch, relative_rms):
    """Tokens near Sigma = 0 need the six: here one of the last chunk does."""
    r, *controls = make_inputs(40, 1, 256, 9, 2)
    r[-1] = 2 * eps * r[-1]
    monkeypatch.setattr(chunked, "CHUNK", 10 * chunked._rows(2, 256, False))
    assert fours(r, 2, dtype, eps) == [True, True, True, False]
    results, expected = run([r, *controls], "chunked", dtype, eps=eps), run([r, *controls], "reference", eps=eps)
    assert_close(results, expected, relative_rms, bounds([r, *controls], dtype, eps=eps))
    assert not any(fours(r, 2, dtype, 0.5) + fours(r, 3, dtype, eps) + fours(r, 2, dtype, eps, delta_max=1.0))


def test_six_matrices_keep_small_tangent_weights(relative_rms):
    """With K = 4 and eps = 0.05, alpha Sigma differs from 1 by 1e-3 on average: the four would miss that."""
    inputs = make_inputs(64, 2, 4, 5, 2, low=0.2)
    assert_close(run(inputs, "chunked", torch.float32, eps=0.05), run(inputs, "reference", eps=0.05), relative_rms,
                 bounds(inputs, torch.float32, eps=0.05))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("eps", [1e-3, 1e-15])
def test_sigma_zero_is_finite(backend, eps, relative_rms):
    r, *controls = make_inputs(12, 2, 4, 3, 2)
    r[:3] = 0.0
    r[3:6] -= r[3:6].mean(-1, keepdim=True)
    out, dr, *_ = run([r, *controls], backend, eps=eps)
    at_zero = sum(controls[0][g, 0] for g in range(2))  # delta = 0 and h = (1, 0, 0, 0)
    assert relative_rms(out[:3], at_zero.expand(3, -1)) < float_bound(2 * 6 * 4, torch.float64) and dr.isfinite().all()
    out, *gradients = run([r, *controls], backend, torch.float32, eps=eps)
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("K, S", [(4, 2), (4, 4), (16, 4)])
def test_a_nan_stays_with_its_token(backend, K, S):
    r, *controls = make_inputs(9, 2, K, 3, S)
    r[4, 1, 0] = math.nan
    out = splanifold(r, SplanifoldControls(*controls), backend=backend)
    assert out[4].isnan().all() and out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("expansion, delta_max, S, mix", [(0.1, 0.5, 2, "sum"), (0.0, math.inf, 3, "concat")])
def test_gradcheck(expansion, delta_max, S, mix):
    tensors = [x.requires_grad_() for x in make_inputs(4, 2, 3, 2, S, low=0.05, high=0.45 if S == 3 else 1.0)]

    def call(r, *controls):
        return splanifold(r, SplanifoldControls(*controls), expansion=expansion, delta_max=delta_max, eps=0.1, mix=mix,
                          backend="chunked")

    assert torch.autograd.gradcheck(call, tensors, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("seed", [*range(15), *slow(*range(15, 40))])
def test_any_shape_and_option(seed, monkeypatch, relative_rms):
    draw = random.Random(seed)
    M, G, K, n, S = draw.randint(1, 40), draw.randint(1, 4), draw.randint(1, 20), draw.randint(1, 9), draw.randint(2, 6)
    options = dict(mix=draw.choice(MIXES), expansion=draw.choice([0.0, 0.5]),
                   delta_max=draw.choice([0.2, math.inf]), eps=draw.choice([1e-9, 1e-1]))
    monkeypatch.setattr(chunked, "CHUNK", draw.choice([200, 1 << 21]))
    inputs = make_inputs(M, G, K, n, S, low=0.1)
    assert_close(run(inputs, "chunked", **options), run(inputs, "reference", **options), relative_rms,
                 bounds(inputs, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, relative_rms):
    """What is computed is float32; results are rounded."""
    inputs = [x.to(dtype).double() for x in make_inputs(100, 2, 16, 9, 2)]
    results = run(inputs, "chunked", dtype)
    assert all(x.dtype == dtype for x in results)
    exact = bounds(inputs, torch.float32)
    assert_close(results, run(inputs, "reference"), relative_rms,
                 {name: rounding_bound(1, dtype) + bound for name, bound in exact.items()})


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_mixed_dtypes(backend):
    r, *controls = make_inputs(70, 2, 4, 3, 2)
    tensors = [r.bfloat16().requires_grad_(), *(x.float().requires_grad_() for x in controls)]
    out = splanifold(tensors[0], SplanifoldControls(*tensors[1:]), backend=backend)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in tensors)


@pytest.mark.parametrize("K, mix", [(3, "sum"), (3, "concat"), (32, "sum"), (32, "concat")])
def test_any_strides(K, mix, relative_rms):
    inputs = make_inputs(60, 2, K, 4, 2)
    expected = run(inputs, "chunked", mix=mix)
    scattered = [torch.stack([x, x], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
                 for x in inputs]
    assert not any(x.is_contiguous() for x in scattered)
    out = splanifold(scattered[0], SplanifoldControls(*scattered[1:]), mix=mix, backend="chunked")
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close([out.detach(), *torch.autograd.grad(out, scattered, grad.T.contiguous().T)], expected, relative_rms,
                 bounds(inputs, mix=mix))


def test_leading_dimensions():
    r, *controls = make_inputs(24, 2, 3, 5, 2)
    for mix in MIXES:
        flat = splanifold(r, SplanifoldControls(*controls), mix=mix)
        assert torch.equal(splanifold(r.view(2, 3, 4, 2, 3), SplanifoldControls(*controls), mix=mix),
                           flat.view(2, 3, 4, -1))


def test_gradients_that_are_not_asked_for(relative_rms):
    r, *controls = make_inputs(30, 2, 3, 5, 2)
    expected = run([r, *controls], "chunked")
    grad = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tolerance = bounds([r, *controls])
    leaf = r.clone().requires_grad_()
    splanifold(leaf, SplanifoldControls(*controls), backend="chunked").backward(grad)
    bases = controls[1].clone().requires_grad_()
    splanifold(r, SplanifoldControls(controls[0], bases, *controls[2:]), backend="chunked").backward(grad)
    assert relative_rms(leaf.grad, expected[1]) < tolerance["r"]
    assert relative_rms(bases.grad, expected[3]) < tolerance["bases"]


def test_runs_repeat_bit_for_bit():
    for inputs in (make_inputs(300, 8, 3, 8, 4), make_inputs(300, 1, 64, 8, 4)):
        first, second = (run(inputs, "chunked", torch.float32) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_auto_takes_the_reference_for_a_few_tokens_only():
    r, *controls = make_inputs(65, 1, 3, 5, 2)
    assert package._choose(r, SplanifoldControls(*controls), "sum") == "chunked"
    assert package._choose(r[:64], SplanifoldControls(*controls), "sum") == "reference"


# ---- What the equations imply -----------------------------------------------

EXACT = ["reference", "chunked"]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("S", [2, 4])
def test_the_diagonal_is_the_spine(backend, S, relative_rms):
    """
    All coordinates equal: delta = 0 and w = 1 / K (for eps = 0 too), so that only points and mean tangents are left,
    and delta_max says nothing.
    """
    _, points, bases, point_tangents, base_tangents = make_inputs(1, 1, 5, 3, S)
    t = torch.linspace(-0.2, 1.2, 29, dtype=torch.float64)
    out = splanifold(t[:, None, None].expand(29, 1, 5),
                     SplanifoldControls(points, bases, point_tangents, base_tangents), delta_max=0.3, backend=backend)
    narrow = SplanifoldControls(points, torch.zeros(1, S, 3, 1).double(), point_tangents.mean(-1, keepdim=True),
                                torch.zeros(1, S, 3, 1).double())
    expected = splanifold(t[:, None, None], narrow, backend=backend)
    assert relative_rms(out, expected) < float_bound(6 * 5, torch.float64)


@pytest.mark.parametrize("backend", EXACT)
def test_affine_equivariance(backend, relative_rms):
    """Phi of controls moved by y -> A y + b is A Phi + b: points move by both, bases and tangents by A."""
    r, *controls = make_inputs(30, 1, 4, 3, 3)
    A, b = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).split((3, 1), 1)
    b = b[:, 0]
    moved = SplanifoldControls(controls[0] @ A.T + b, *(A @ x for x in controls[1:]))
    plain = splanifold(r, SplanifoldControls(*controls), delta_max=0.5, backend=backend)
    expected = plain @ A.T + b
    bound = float_bound(6 * 4 + 3, torch.float64) * cancellation(plain.abs() @ A.abs().T + b.abs(), expected)
    assert relative_rms(splanifold(r, moved, delta_max=0.5, backend=backend), expected) < bound


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("S", [2, 3, 5])
def test_one_coordinate_reproduces_cubics(backend, S, relative_rms):
    """Nodes at i / (S - 1) with a cubic's values and, by tau, its slopes give that cubic everywhere."""

    def cubic(t):
        return 3 * t ** 3 - 5 * t ** 2 + t + 2

    def slope(t):
        return 9 * t ** 2 - 10 * t + 1

    nodes, t = torch.linspace(0, 1, S, dtype=torch.float64), torch.linspace(-0.5, 1.5, 81, dtype=torch.float64)
    unused = torch.randn(1, S, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    controls = SplanifoldControls(cubic(nodes).view(1, S, 1), unused, slope(nodes).view(1, S, 1, 1) / (S - 1), unused)
    out = splanifold(t.view(-1, 1, 1), controls, backend=backend)[:, 0]
    bound = float_bound(6, torch.float64) * 1.5 ** 3 * 4 ** 3  # of cubics up to 1.5 x 4 segments away from theirs
    assert relative_rms(out, cubic(t)) < bound


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("K", [3, 16])
def test_segments_meet_in_value_and_slope(backend, K):
    """
    At a node's two sides, 1e-9 apart, values and Jacobians are the same but for that distance; inside the segments they
    differ.
    """
    S, step = 4, 1e-9
    _, *controls = make_inputs(1, 1, K, 5, S)
    controls = SplanifoldControls(*controls)

    def value(x):
        return splanifold(x, controls, delta_max=0.8, backend=backend)

    def jacobian(x):
        return torch.stack([torch.autograd.grad(value(x)[0, i], x)[0] for i in range(5)])

    for node in (1, 2):
        r = torch.rand(1, 1, K, dtype=torch.float64, generator=torch.Generator().manual_seed(node))
        r = r - r.mean() + node / (S - 1)
        sides = [r - step, r + step]
        assert [int((x.mean() * (S - 1)).floor()) for x in sides] == [node - 1, node]
        inputs = [x.requires_grad_() for x in (*sides, r + 0.1)]
        left, right, far = ((value(x), jacobian(x)) for x in inputs)
        # rounding is 1e-6 of a step
        assert (left[0] - right[0]).abs().max() < 100 * step and (left[1] - right[1]).abs().max() < 1000 * step
        assert (left[1] - far[1]).abs().max() > 1e-2


@pytest.mark.parametrize("S", [2, 3])
def test_ridge_fit_reproduces_a_planted_map(S, relative_rms):
    """
    Phi is linear in its controls: unit controls give the design matrix, and least squares with a small ridge gives the
    map back on new points.
    """
    K, numbers = 3, S * (1 + 3 * 3)

    def design(r):
        unit = torch.eye(numbers, dtype=torch.float64)
        points, *others = unit.split([S, S * K, S * K, S * K], 1)
        controls = SplanifoldControls(points.T.reshape(1, S, numbers),
                                      *(x.view(numbers, S, K).transpose(0, 1)[None] for x in others))
        return splanifold(r, controls, delta_max=1.0, eps=0.1, backend="chunked")

    r, points, bases, point_tangents, base_tangents = make_inputs(400, 1, K, 2, S)
    planted = SplanifoldControls(points, bases, point_tangents, base_tangents)

    def target(r):
        return splanifold(r, planted, delta_max=1.0, eps=0.1, backend="reference")

    X = design(r[:200])
    fitted = torch.linalg.solve(X.T @ X + 1e-10 * torch.eye(numbers, dtype=torch.float64), X.T @ target(r[:200]))
    assert relative_rms(design(r[200:]) @ fitted, target(r[200:]), floor=0.0) < 1e-6


# ---- As an operator ---------------------------------------------------------

def test_operator_is_registered_rightly():
    for mix, S, K in (("sum", 2, 3), ("concat", 3, 16)):
        tensors = [x.requires_grad_() for x in make_inputs(20, 2, K, 4, S)]
        torch.library.opcheck(torch.ops.knotgpt.splanifold.default, (*tensors, 0.1, 0.5, 1e-3, mix))


@pytest.mark.parametrize("backend, compiler",
                         [("chunked", "aot_eager"), ("reference", "aot_eager"),
                          pytest.param("chunked", "inductor", marks=pytest.mark.slow),
                          pytest.param("reference", "inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend, compiler, relative_rms):
    inputs = make_inputs(70, 2, 4, 3, 2)
    compiled = torch.compile(lambda *args, **kwargs: 2 * splanifold(*args, **kwargs), fullgraph=True, backend=compiler)
    assert_close(run(inputs, backend, function=compiled), [2 * x for x in run(inputs, backend)], relative_rms,
                 bounds(inputs))


def test_one_graph_serves_any_number_of_tokens(relative_rms):
    compiled = torch.compile(splanifold, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (70, 130, 200):
        inputs = make_inputs(M, 2, 4, 3, 2)
        with torch._dynamo.config.patch(error_on_recompile=M > 70):
            results = run(inputs, "auto", function=compiled)
        assert_close(results, run(inputs, "chunked"), relative_rms, bounds(inputs))


@pytest.mark.parametrize("K, G, mix", [(64, 1, "sum"), (4, 8, "concat"), (1, 8, "sum")])
def test_keeps_r_and_controls_only(K, G, mix):
    kept = []
    tensors = [x.float().requires_grad_() for x in make_inputs(500, G, K, 16, 2)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        splanifold(tensors[0], SplanifoldControls(*tensors[1:]), mix=mix, backend="chunked")
    controls = {x.untyped_storage().data_ptr() for x in tensors[1:]}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(size for pointer, size in storages.items() if pointer not in controls) <= 1.05 * tensors[0].nbytes


def test_flops_are_counted_on_any_device():
    for device in ("cpu", "meta"):
        with torch.device(device):
            r = torch.zeros(200, 2, 8)
            matrices = [torch.zeros(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
            controls = SplanifoldControls(torch.zeros(2, 3, 5), *matrices)
        with FlopCounterMode(display=False) as counter:
            splanifold(r.requires_grad_(), controls, backend="chunked").sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 200 * 2 * 5 * (9 * 8 + 6)


GOOD = SplanifoldControls(torch.zeros(3, 2, 5), *(torch.zeros(3, 2, 5, 4) for _ in range(3)))


@pytest.mark.parametrize("changes, message", [
    (dict(r=torch.zeros(9, 3)),
     r"r must be a tensor \(..., G, K\) of three dimensions or more, not empty; got \(9, 3\)"),
    (dict(r=torch.zeros(0, 3, 4)), r"r must be .* got \(0, 3, 4\)"),
    (dict(r=[0.5]), r"r must be a tensor .* got list"),
    (dict(r=torch.zeros(9, 3, 4, dtype=torch.int32)),
     r"r must be bfloat16, float16, float32 or float64; got torch.int32"),
    (dict(controls=torch.zeros(3, 2, 5)), r"controls must be a SplanifoldControls of four tensors; got \(3, 2, 5\)"),
    (dict(controls=GOOD[:3]), r"controls must be a SplanifoldControls of four tensors; got tuple"),
    (dict(controls=GOOD._replace(points=torch.zeros(2, 2, 5))),
     r"controls.points must be a tensor \(G, S, n\) of sizes \(3, any, any\), not empty; got \(2, 2, 5\)"),
    (dict(controls=GOOD._replace(points=torch.zeros(3, 1, 5))),
     r"controls.points must have S >= 2 nodes, \(G, S, n\); got \(3, 1, 5\)"),
    (dict(controls=GOOD._replace(bases=torch.zeros(3, 2, 5, 3))),
     r"controls.bases must be a tensor \(G, S, n, K\) of sizes \(3, 2, 5, 4\), not empty; got \(3, 2, 5, 3\)"),
    (dict(r=torch.zeros(9, 3, 6)), r"controls.bases must be .* of sizes \(3, 2, 5, 6\)"),
    (dict(controls=GOOD._replace(base_tangents=torch.zeros(3, 2, 5))),
     r"controls.base_tangents must be .* got \(3, 2, 5\)"),
    (dict(controls=GOOD._replace(point_tangents=torch.zeros(3, 2, 5, 4, device="meta"))),
     r"controls.point_tangents must be on the device of r, cpu; got meta"),
    (dict(controls=GOOD._replace(bases=torch.zeros(3, 2, 5, 4, dtype=torch.float64))),
     r"controls.bases must be float32, as controls.points is; got torch.float64"),
    (dict(controls=SplanifoldControls(*(x.int() for x in GOOD))),
     r"controls.points must be bfloat16, .* got torch.int32"),
    (dict(expansion=-0.1), r"expansion must be at least 0 and finite; got -0.1"),
    (dict(expansion=math.nan), r"expansion must be at least 0 and finite; got nan"),
    (dict(delta_max=0.0), r"delta_max must be above 0, math.inf for no warp; got 0.0"),
    (dict(delta_max=math.nan), r"delta_max must be above 0"),
    (dict(eps=0.0), r"eps must be at least 1e-15, whose square float32 can hold, and finite; got 0.0"),
    (dict(eps=math.inf), r"eps must be .* got inf"),
    (dict(mix="mean"), r"mix must be one of sum, concat; got 'mean'"),
    (dict(backend="fast"), r"backend must be one of auto, reference, chunked, loops, triton; got 'fast'"),
    (dict(backend="triton"),
     r"backend 'triton' needs CUDA tensors and Triton; got tensors on cpu: use 'chunked' or 'auto'"),
    (dict(backend="loops"), r"backend 'loops' takes mix 'concat', K <= 16 and S n K <= 2048; got 'sum' and"),
], ids=str)
def test_wrong_arguments_are_named(changes, message):
    arguments = dict(r=torch.zeros(9, 3, 4), controls=GOOD) | changes
    with pytest.raises(ValueError, match=message) as error:
        splanifold(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mix", MIXES)
def test_triton_is_a_backend(mix, interpreter, relative_rms):
    """Interpreted; the kernels' own tests are in test_triton.py."""
    inputs = make_inputs(5, 2, 3, 5, 3)
    options = dict(mix=mix, expansion=0.1, delta_max=0.5, eps=1e-2)
    assert_close(interpreter(__name__, "run", inputs, "triton", torch.float32, **options),
                 run(inputs, "reference", **options), relative_rms, bounds(inputs, torch.float32, **options))


# ---- On a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_chunks_equal_the_reference(shape, relative_rms):
    inputs, options = make_inputs(*shape[:5]), options_of(*shape[5:])
    with poisoned_memory():
        results = run(inputs, "chunked", torch.float64, "cuda", **options)
    assert_close(results, run(inputs, "reference", **options), relative_rms, bounds(inputs, **options))


@pytest.mark.gpu
def test_gpu_auto_is_triton():
    r, *controls = (x.cuda().bfloat16() for x in make_inputs(300, 4, 4, 16, 2))
    controls = SplanifoldControls(*controls)
    assert torch.equal(splanifold(r, controls), splanifold(r, controls, backend="triton"))
    assert package._choose(r.double(), SplanifoldControls(*(x.double() for x in controls)), "sum") == "chunked"
