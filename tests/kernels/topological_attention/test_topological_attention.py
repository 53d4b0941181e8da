"""
Topological attention: the reference against the formula in plain loops, the loglinear backend and the key-only scan
against the reference in float64.
"""
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import topological_attention as package
from kernels.topological_attention import topological_attention as public
from kernels.topological_attention import topological_attention_reference as reference
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.marks import LOOP_FLOATS, slow, slow_rows

NAMES = ("query_coord", "key_coord", "value", "log_decay", "key_bias")
with_floats = pytest.mark.parametrize("dtype", LOOP_FLOATS, ids=str)


def inputs(
    T,
    B=2, H=2, kv=2, D=8, dtype=torch.float64, scale=1.0, decay=0.0, bias=0.0, docs=0.0, ties=False, coordinates=True,
    seed=0
):
    """
    Five leaf tensors (None where absent) and doc_start. scale: standard deviation of the coordinates; docs: chance that
    a token begins a document.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = [
        draw(B, T, H) * scale,
        draw(B, T, kv) * scale,
        draw(B, T, kv, D),
        -draw(B, T, H).abs() * decay,
        draw(B, T, kv) * bias,
    ]
    if ties:
        tensors[:2] = [x.round() for x in tensors[:2]]
    starts = torch.rand(B, T, generator=generator) < docs
    doc_start = torch.where(starts, torch.arange(T), 0).cummax(1).values.int() if docs else None
    present = (coordinates, coordinates, True, decay > 0, bias > 0)
    return [x.to(dtype).requires_grad_() if use else None for x, use in zip(tensors, present)], doc_start


def run(function, tensors, doc_start=None, window=None, dtype=torch.float32):
    """
    The result and the gradients of a fixed random projection of it, by name. dtype: what the projection is rounded to.
    """
    out = function(*tensors, doc_start, window)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(out)
    given = {name: x for name, x in zip(NAMES, tensors) if x is not None}
    return dict(zip(("out", *given), (out.detach(), *torch.autograd.grad(out, list(given.values()), upstream))))


def loglinear(query, key, value, log_decay, key_bias, doc_start, window):
    return public(
        query,
        key,
        value,
        log_decay=log_decay,
        key_bias=key_bias,
        doc_start=doc_start,
        window=window,
        backend="loglinear",
    )


def exactly(tensors):
    """The same numbers as float64 leaves."""
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def farthest(query, key):
    """The largest distance of a query and a key; 0 without coordinates."""
    return 0.0 if query is None else max((query.max() - key.min()).item(), (key.max() - query.min()).item())


def bound(tensors, dtype=None):
    """
    The bound of sums over T tokens and D columns in dtype (at least float32; the values' if not given), and of weights
    whose exponents, float64 in any case, are as wrong as the rounding of the largest distance and the longest sum of
    decays.
    """
    query, key, value, log_decay, _ = tensors
    exponent = farthest(query, key) + (0.0 if log_decay is None else log_decay.abs().sum(1).max().item())
    dtype = dtype or torch.promote_types(value.dtype, torch.float32)
    return float_bound(value.shape[1] + value.shape[3], dtype) + rounding_bound(4, torch.float64) * exponent


def check(relative_rms, tensors, doc_start=None, window=None, roundings=0):
    """
    loglinear against the reference in float64, within bound(tensors) and so many roundings to the values' dtype. The
    gradients of saturated rows are vanishing differences of sums over D columns, where an error of such a sum is none;
    that of log_decay adds them over the tokens.
    """
    columns, dtype = tensors[2].shape[3], tensors[2].dtype
    wide = torch.promote_types(dtype, torch.float32)
    tolerance = bound(tensors) + (rounding_bound(roundings, dtype) if roundings else 0.0)
    floor = float_bound(columns, wide) + columns ** 0.5 * (bound(tensors) if wide == torch.float64 else 0.0)
    expected = run(reference, exactly(tensors), doc_start, window, dtype)
    got = run(loglinear, tensors, doc_start, window, dtype)
    floors = {"log_decay": floor * tensors[2].shape[1] ** 0.5}
    errors = {name: relative_rms(x, expected[name], floors.get(name, floor)) for name, x in got.items()}
    assert max(errors.values()) <= tolerance, (errors, tolerance)
    assert all(
        got[name].dtype == x.dtype and got[name].shape == x.shape for name, x in zip(NAMES, tensors) if x is not None
    )


def float32_bounds(tensors, expected, doc_start, window, roundings=0):
    """
    (tolerances by name, floor) of kernels whose distances are float32 differences: several times what the reference in
    float32 loses by them, and sums over tokens and columns; with so many roundings to the values' dtype. floor: in
    vanishing gradients of saturated rows, the error of the weights times a sum over D columns.
    """
    low = run(reference, [None if x is None else x.detach().float().requires_grad_() for x in tensors], doc_start,
              window, tensors[2].dtype)
    (_, T, _, D), dtype = tensors[2].shape, tensors[2].dtype
    half = rounding_bound(roundings, dtype) if roundings else 0.0
    floor = (reference_bound(low["out"], expected["out"], 4, factor=8.0) + half) * D ** 0.5

    def allowed(name):
        return reference_bound(low[name], expected[name], T + D, factor=8.0, floor=floor) + half

    bounds = {name: allowed(name) for name in expected}
    return bounds, floor


# ---- the reference ----------------------------------------------------------

@pytest.mark.parametrize("coordinates", [True, False])
def test_reference_is_the_formula(coordinates):
    (a, b, v, g, c), doc_start = inputs(9, B=2, H=4, kv=2, D=3, decay=0.3, bias=1.0, docs=0.2, coordinates=coordinates)
    window, out = 4, reference(a, b, v, g, c, doc_start, 4)
    for n, i, h in itertools.product(range(2), range(9), range(4)):
        visible = range(max(doc_start[n, i].item(), i - window + 1), i + 1)
        scores = [
            c[n, j, h // 2].item()
            + sum(g[n, t, h].item() for t in range(j + 1, i + 1))
            - (abs(a[n, i, h] - b[n, j, h // 2]).item() if coordinates else 0)
            for j in visible
        ]
        weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
        expected = sum(weight * v[n, j, h // 2] for weight, j in zip(weights, visible))
        assert torch.allclose(out[n, i, h], expected, rtol=0,
                              atol=bound((a, b, v, g, c), torch.float64) * v.abs().max().item())


# ---- loglinear and key only -------------------------------------------------

LENGTHS = (1, 2, 63, 64, 65, 129, 500, *slow(1023))
OPTIONS = dict(
    plain={},
    grouped=dict(H=4, kv=2, D=1),
    decay=dict(decay=0.1, D=64),
    bias=dict(bias=1.0, H=3, kv=1),
    docs=dict(docs=0.02, D=5),
    all=dict(decay=0.2, bias=1.0, docs=0.01, H=2, kv=1),
    ties=dict(ties=True, docs=0.01),
    wide=dict(D=128, H=1, kv=1),
)


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("T", LENGTHS)
@with_floats
def test_values_and_gradients(relative_rms, dtype, T, options, coordinates):
    tensors, doc_start = inputs(T, dtype=dtype, coordinates=coordinates, **options)
    check(relative_rms, tensors, doc_start)


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@pytest.mark.parametrize("window", [1, 7, 100, 129, 299, 300])
@with_floats
def test_windows(relative_rms, dtype, window, coordinates):
    for options in ({}, dict(decay=0.1, bias=1.0, docs=0.02, H=4, kv=2), dict(ties=True, docs=0.01)):
        tensors, doc_start = inputs(300, dtype=dtype, coordinates=coordinates, **options)
        check(relative_rms, tensors, doc_start, window)


@pytest.mark.parametrize(
    "coordinates, window, dtype",
    [
        (True, None, torch.float32),
        (False, 700, torch.float32),
        *slow_rows((True, 64, torch.float32), (True, 700, torch.float32), (False, None, torch.float32)),
        *slow_rows(*itertools.product((True, False), (None, 64, 700), [torch.float64])),
    ],
)
def test_several_tables_and_groups_of_rows(relative_rms, coordinates, window, dtype):
    """Nodes of more sources than a table holds, more tokens than are worked on at once, heads that share keys."""
    for options in (
        dict(B=1, H=2, kv=1, D=128, ties=True),
        dict(B=3, H=4, kv=2, D=1, decay=0.02, bias=1.0, docs=0.002),
    ):
        tensors, doc_start = inputs(1400, dtype=dtype, coordinates=coordinates, **options)
        check(relative_rms, tensors, doc_start, window)


def test_many_rows_of_a_short_window(relative_rms):
    """Blocks of the window that are no multiple of a chunk, more of them than of anything else."""
    a, b, v = (x[:, :, :1].float() for x in inputs(40_000, B=1, H=1, kv=1, D=1)[0][:3])
    out = public(a.detach(), b.detach(), v.detach(), window=65, backend="loglinear")
    for lo in (0, 20_000, 39_000):
        part = slice(lo, lo + 1000)
        expected = reference(*(x.detach()[:, part].double() for x in (a, b, v)), window=65)
        assert relative_rms(out[:, part][:, 64:], expected[:, 64:]) < float_bound(65 + 1, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(relative_rms, dtype):
    """Only the result's and the gradient's own rounding may be seen; coordinates stay float32."""
    tensors, doc_start = inputs(300, dtype=torch.float32, decay=0.1, docs=0.01)
    tensors[2] = tensors[2].detach().to(dtype).requires_grad_()
    check(relative_rms, tensors, doc_start, roundings=1)
    everything = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    check(relative_rms, everything, doc_start, roundings=2)


@pytest.mark.parametrize(
    "options", [{}, dict(docs=0.02), dict(decay=1.0, bias=1.0, docs=0.02)], ids=["plain", "docs", "all"]
)
@pytest.mark.parametrize("scale", [1e2, 1e4])
@with_floats
def test_sharp_heads(relative_rms, dtype, scale, options):
    """Distances up to 1e4 and more: most weights underflow."""
    tensors, doc_start = inputs(400, dtype=dtype, scale=scale, **options)
    check(relative_rms, tensors, doc_start)


@with_floats
def test_every_key_is_far(relative_rms, dtype):
    """
    No key is nearer than 1e4, and in the second case a far key in the present competes with near ones that have decayed
    by as much.
    """
    tensors, _ = inputs(200, dtype=dtype)
    with torch.no_grad():
        tensors[0] += 1e4
    check(relative_rms, tensors)
    tensors, _ = inputs(200, dtype=dtype, decay=50.0, scale=1e3)
    check(relative_rms, tensors)
    with torch.no_grad():
        assert relative_rms(tensors[2], reference(*tensors)) > 0.1  # it is not always the token itself that wins


@with_floats
def test_hidden_keys_and_closed_gates(relative_rms, dtype):
    """A bias of -inf hides a key; a decay of -1e4 forgets everything before."""
    for coordinates in (True, False):
        tensors, _ = inputs(150, dtype=dtype, bias=1.0, decay=0.1, coordinates=coordinates)
        with torch.no_grad():
            tensors[4][:, 1::3] = -math.inf
            tensors[3][:, 71] = -1e4
        check(relative_rms, tensors)
        alone = loglinear(*[None if x is None else x[:, 71:] for x in tensors], None, None)
        assert relative_rms(loglinear(*tensors, None, None)[:, 71:], alone.detach()) < bound(tensors)


@with_floats
def test_ties_have_derivative_zero(dtype):
    """
    All coordinates equal: no distance has a derivative, whatever the chunks and levels that hold the pairs; and the
    result is the mean of the values.
    """
    for backend in ("reference", "loglinear"):
        tensors, _ = inputs(150, dtype=dtype)
        with torch.no_grad():
            tensors[0].fill_(0.5), tensors[1].fill_(0.5)
        result = run(lambda a, b, v, *_, backend=backend: public(a, b, v, backend=backend), tensors)
        assert not result["query_coord"].any() and not result["key_coord"].any()
        assert torch.allclose(
            result["out"].double(),
            tensors[2].detach().double().cumsum(1) / torch.arange(1, 151)[:, None, None],
            rtol=0,
            atol=4 * float_bound(150, dtype),
        )


@pytest.mark.slow  # compiles the loops in float64
@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@pytest.mark.parametrize("window", [None, 37])
def test_gradcheck(coordinates, window):
    tensors, doc_start = inputs(41, B=1, H=2, kv=1, D=2, decay=0.3, bias=0.5, docs=0.07, coordinates=coordinates)
    with torch.no_grad():
        tensors[3] -= 0.1  # steps must not make a decay positive
    given = [x for x in tensors if x is not None]

    def call(*x):
        return loglinear(*([None] * (5 - len(x))), *x, doc_start, window)

    assert torch.autograd.gradcheck(call, given)


def test_long_sequence_row_by_row(relative_rms):
    """20,011 tokens, where the matrix of scores would take 3.2 GB: some rows against the formula."""
    T = 20_011
    tensors, doc_start = inputs(T, B=1, H=1, kv=1, D=4, dtype=torch.float32, scale=3.0, decay=1e-4, docs=2e-4)
    with torch.no_grad():
        out = loglinear(*tensors, doc_start, None)
        a, b, v, g, _ = exactly(tensors)
        total = g.cumsum(1)
        for i in torch.randint(T, (40,), generator=torch.Generator().manual_seed(0)).tolist():
            seen = slice(doc_start[0, i].item(), i + 1)
            weights = (total[0, i, 0] - total[0, seen, 0] - (a[0, i, 0] - b[0, seen, 0]).abs()).softmax(0)
            assert relative_rms(out[0, i, 0], weights @ v[0, seen, 0]) < float_bound(len(weights), torch.float32)


# ---- what is exact ----------------------------------------------------------

def changed(tensors, doc_start, window, where):
    """
    Results and gradients by token before and after other values take the place of the tokens `where`, for an upstream
    gradient of 0 there.
    """
    results = []
    for seed in (0, 1):
        fresh, _ = inputs(
            tensors[2].shape[1],
            B=1,
            decay=0.1,
            bias=1.0,
            seed=5 + seed,
            dtype=tensors[2].dtype,
            coordinates=tensors[0] is not None,
        )
        replaced = [
            None if x is None else torch.where(where.view(1, -1, *[1] * (x.dim() - 2)), y, x).detach().requires_grad_()
            for x, y in zip(tensors, fresh)
        ]
        out = loglinear(*replaced, doc_start, window)
        upstream = torch.ones_like(out).masked_fill(where[None, :, None, None], 0)
        given = [x for x in replaced if x is not None]
        results.append([out, *torch.autograd.grad(out, given, upstream)])
    return results


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@with_floats
@pytest.mark.parametrize("window", [None, 20, 100])
def test_causality_is_exact(dtype, window, coordinates):
    T = 300
    for ties, doc_chance in ((False, 0.0), (True, 0.01)):
        tensors, doc_start = inputs(
            T, B=1, dtype=dtype, decay=0.1, bias=1.0, ties=ties, docs=doc_chance, coordinates=coordinates
        )
        for t in (1, 64, 150, 299):
            first, second = changed(tensors, doc_start, window, torch.arange(T) >= t)
            assert torch.equal(first[0][:, :t], second[0][:, :t])
            for x in first[1:]:
                assert not x[:, t:].any()  # nothing flows to what no query with a gradient sees


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
@with_floats
@pytest.mark.parametrize("window", [None, 90])
def test_documents_are_isolated_exactly(dtype, window, coordinates):
    T = 300
    tensors, _ = inputs(T, B=1, dtype=dtype, decay=0.1, bias=1.0, coordinates=coordinates)
    starts = torch.tensor([0, 77, 160, 161, 230])
    doc_start = starts[torch.bucketize(torch.arange(T), starts, right=True) - 1][None].int()
    for document in (0, 77, 160, 230):
        others = doc_start[0] != document
        first, second = changed(tensors, doc_start, window, others)
        for x, y in zip(first, second):
            assert torch.equal(x[:, ~others], y[:, ~others])
        for x in first[1:]:
            assert not x[:, others].any()


@with_floats
def test_window_is_exact(dtype):
    """A query sees its window and nothing before."""
    tensors, _ = inputs(300, B=1, dtype=dtype)
    for window, i in ((20, 150), (64, 200), (100, 299)):
        for outside in (True, False):
            with torch.no_grad():
                other = [None if x is None else x.clone() for x in tensors]
                j = i - window if outside else i - window + 1
                for x in other[:3]:
                    if x is not None:
                        x[:, :j + 1] = 0.25
                same = torch.allclose(loglinear(*other, None, window)[:, i], loglinear(*tensors, None, window)[:, i],
                                      rtol=0, atol=4 * bound(tensors))
                assert same == outside


@pytest.mark.parametrize("function", [reference, *slow(loglinear)], ids=["reference", "loglinear"])
def test_euler(function):
    """sum a da + sum b db is the derivative by a common scale of all coordinates."""
    tensors, doc_start = inputs(200, docs=0.01, decay=0.1)
    result = run(function, tensors, doc_start)
    along = sum((x * result[name]).sum() for name, x in zip(NAMES[:2], tensors)).item()
    value, step = [], 1e-5
    with torch.no_grad():
        for factor in (1 - step, 1 + step):
            out = reference(tensors[0] * factor, tensors[1] * factor, *tensors[2:], doc_start)
            value.append(
                (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
                .sum()
                .item()
            )
    assert along == pytest.approx((value[1] - value[0]) / (2 * step), rel=1e-6)


def test_two_runs_are_equal():
    for coordinates in (True, False):
        tensors, doc_start = inputs(
            500, dtype=torch.float32, decay=0.1, bias=1.0, docs=0.01, coordinates=coordinates, ties=True
        )
        first, second = run(loglinear, tensors, doc_start), run(loglinear, tensors, doc_start)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("window", [None, 50])
@with_floats
def test_nothing_reads_uninitialised_memory(relative_rms, dtype, window):
    """
    In deterministic mode PyTorch fills new tensors with NaN; and no operation used here lacks a deterministic form.
    """
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for coordinates in (True, False):
            tensors, doc_start = inputs(
                150, dtype=dtype, decay=0.1, bias=1.0, docs=0.02, H=4, coordinates=coordinates
            )
            check(relative_rms, tensors, doc_start, window)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- torch.library, dtypes, layouts -----------------------------------------

@with_floats
def test_non_contiguous(relative_rms, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 4, 130, 12, generator=generator, dtype=dtype)
    a, b, g = (wide[:, :2, :, n].transpose(1, 2) for n in (0, 1, 2))
    v, c = wide[:, 2:, :, 4:].transpose(1, 2)[..., ::2], wide[:, 2:, :, 3].transpose(1, 2)
    doc_start = torch.zeros(130, 2, dtype=torch.int32).index_fill_(0, torch.arange(70, 130), 70).T
    tensors = [a, b, v, -g.abs(), c]
    assert not any(x.is_contiguous() for x in tensors)
    check(relative_rms, [x.detach().requires_grad_() for x in tensors], doc_start)
    with torch.no_grad():
        assert torch.equal(
            loglinear(*tensors, doc_start, None),
            loglinear(*[x.contiguous() for x in tensors], doc_start.contiguous(), None),
        )


@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "key_only"])
def test_registered_operation(coordinates):
    tensors, doc_start = inputs(
        40, H=4, D=3, dtype=torch.float32, decay=0.1, bias=1.0, docs=0.1, coordinates=coordinates
    )
    with torch.no_grad():
        tensors[3] -= 0.01
    torch.library.opcheck(torch.ops.knotgpt.topological_attention, (*tensors, doc_start, 9))
    torch.library.opcheck(torch.ops.knotgpt.topological_attention, (None, None, tensors[2], None, None, None, None))


GRAPHS = dict(plain=dict(), all=dict(decay=0.1, bias=1.0, docs=0.05), key_only=dict(coordinates=False, decay=0.1))
FEW_GRAPHS = [("auto", "plain"), ("loglinear", "all"), ("reference", "key_only")]
MORE_GRAPHS = [case for case in itertools.product(("auto", "loglinear", "reference"), GRAPHS) if case not in FEW_GRAPHS]


@pytest.mark.parametrize("backend, name", [*FEW_GRAPHS, *slow_rows(*MORE_GRAPHS)])
def test_compiles_as_one_graph(relative_rms, backend, name):
    options = GRAPHS[name]
    tensors, doc_start = inputs(150, dtype=torch.float32, **options)

    def function(a, b, v, g, c, d, w):
        return 2 * public(a, b, v, log_decay=g, key_bias=c, doc_start=d, window=w, backend=backend).cos()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for window in (None, 20):
        eager, got = run(function, tensors, doc_start, window), run(compiled, tensors, doc_start, window)
        assert all(relative_rms(got[name], eager[name]) < bound(tensors) for name in eager)


@pytest.mark.slow
def test_compiles_with_inductor(relative_rms):
    tensors, doc_start = inputs(150, dtype=torch.float32, decay=0.1, docs=0.05)
    compiled = torch.compile(loglinear, fullgraph=True)
    eager, got = run(loglinear, tensors, doc_start), run(compiled, tensors, doc_start)
    assert all(relative_rms(got[name], eager[name]) < bound(tensors) for name in eager)


def test_autocast_changes_nothing():
    tensors, _ = inputs(150, dtype=torch.float32)
    expected = run(loglinear, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(loglinear, tensors)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_flops_are_counted():
    """By the formula of the docstring, without data too."""
    with torch.device("meta"):
        a = torch.empty(2, 1024, 3, requires_grad=True)
        b = torch.empty(2, 1024, 1)
        v = torch.empty(2, 1024, 1, 16)
    with FlopCounterMode(display=False) as counter:
        out = public(a, b, v, backend="loglinear")
    forward = 2 * (16 + 5 * 2) * 17 * 2 * 3 * 1024
    assert out.shape == (2, 1024, 3, 16) and counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        public(a, b, v, backend="loglinear").sum().backward()
    assert counter.get_total_flops() == forward + 2 * (32 + 5 * 5) * 17 * 2 * 3 * 1024


def test_binned_by_name(chunks_in_float64, relative_rms):
    tensors, doc_start = inputs(50, docs=0.1, decay=0.1)
    on_bins = [(x.detach() * 4).round().clamp(-31, 31) * (16 / 255) + 8 / 255 for x in tensors[:2]]
    out = public(*on_bins, tensors[2], log_decay=tensors[3], doc_start=doc_start, backend="binned")
    expected = reference(*on_bins, *tensors[2:], doc_start)
    assert relative_rms(out, expected) < bound(tensors) + float_bound(256, torch.float64)
    value, log_decay = (x.detach().float() for x in tensors[2:4])
    key_only = [
        public(None, None, value, log_decay=log_decay, doc_start=doc_start, backend=name)
        for name in ("binned", "loglinear")
    ]
    assert torch.equal(*key_only)
    with pytest.raises(ValueError, match="window"):
        public(*on_bins, tensors[2], window=7, backend="binned")


def test_auto(relative_rms):
    for T in (20, 400):
        tensors, doc_start = inputs(T, dtype=torch.float32, docs=0.02)
        out = public(*tensors[:3], doc_start=doc_start)
        assert relative_rms(out, reference(*exactly(tensors), doc_start)) < bound(tensors)


@pytest.mark.parametrize(
    "T, rows, window, on_gpu, backend",
    [
        (64, 8, None, False, "reference"),
        (128, 4, None, False, "loglinear"),
        (256, 32, None, False, "loglinear"),
        (4096, 1, 64, False, "loglinear"),
        (256, 1, None, True, "tiled"),
        (65536, 12, 1024, True, "tiled"),
        (65536, 12, None, True, "loglinear"),
    ],
)
def test_choice_of_auto(T, rows, window, on_gpu, backend):
    assert package._choose(T, rows, window, on_gpu) == backend


# ---- bad input --------------------------------------------------------------

@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(value=torch.zeros(2, 5, 2)), r"value must be a tensor \(B, T, Hkv, D\).*got \(2, 5, 2\)"),
        (dict(value=[1.0]), r"value must be a tensor .* got list"),
        (dict(value=torch.zeros(2, 0, 2, 4)), r"value must .* no empty dimension, got \(2, 0, 2, 4\)"),
        (dict(value=torch.zeros(2, 5, 2, 4, dtype=torch.int32)), r"value must be bfloat16 or .*, got torch.int32"),
        (dict(query_coord=None), "query_coord and key_coord must be given both or neither, got only key_coord"),
        (dict(key_coord=None), "got only query_coord"),
        (dict(query_coord=torch.zeros(2, 5, 3)), "query_coord has 3 heads, which value's 2 must divide"),
        (
            dict(query_coord=torch.zeros(2, 4, 4)),
            r"query_coord must have the shape \(2, 5, 4\) beside value's \(2, 5, 2, 4\), got \(2, 4, 4\)",
        ),
        (dict(query_coord=torch.zeros(2, 5)), r"query_coord must have the shape .* got \(2, 5\)"),
        (dict(query_coord=torch.zeros(2, 5, 0)), "query_coord has 0 heads"),
        (dict(key_coord=torch.zeros(2, 5, 4)), r"key_coord must have the shape \(2, 5, 2\)"),
        (dict(key_coord=torch.zeros(2, 5, 2, dtype=torch.int64)), "key_coord must be bfloat16 .* got torch.int64"),
        (dict(log_decay=torch.zeros(2, 5, 2)), r"log_decay must have the shape \(2, 5, 4\)"),
        (dict(log_decay=torch.full((2, 5, 4), 0.5)), "log_decay must be <= 0, got 0.5"),
        (dict(log_decay=1.0), "log_decay must be a tensor or None, got float"),
        (dict(key_bias=torch.zeros(2, 5, 4)), r"key_bias must have the shape \(2, 5, 2\)"),
        (dict(doc_start=torch.zeros(2, 6, dtype=torch.int32)), r"doc_start must have the shape \(2, 5\)"),
        (dict(doc_start=torch.zeros(2, 5)), "doc_start must be int32 or int64, got torch.float32"),
        (
            dict(doc_start=torch.tensor([[0, 0, 2, 2, 2], [0, 2, 2, 2, 2]])),
            r"doc_start .*; got 2 at t = 1 after 0 \(row 1\)",
        ),
        (dict(doc_start=torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])), r"got 0 at t = 3 after 1 \(row 0\)"),
        (dict(doc_start=torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])), r"got 1 at t = 0"),
        (dict(doc_start=torch.tensor([[-1, -1, 2, 2, 2], [0, 0, 0, 0, 0]])), r"got -1 at t = 0"),
        (dict(window=0), "window must be an integer of at least 1 or None, got 0"),
        (dict(window=2.5), "window must .* got 2.5"),
        (dict(window=True), "window must .* got True"),
        (dict(backend="fast"), "backend must be auto, reference or tiled or loglinear or binned.*, got 'fast'"),
    ],
)
def test_bad_input(changes, message):
    arguments = (
        dict(query_coord=torch.zeros(2, 5, 4), key_coord=torch.zeros(2, 5, 2), value=torch.zeros(2, 5, 2, 4)) | changes
    )
    with pytest.raises(ValueError, match=message):
        public(arguments.pop("query_coord"), arguments.pop("key_coord"), arguments.pop("value"), **arguments)


def test_key_only_decay_without_whole_groups():
    with pytest.raises(ValueError, match="log_decay has 3 heads, which value's 2 must divide"):
        public(None, None, torch.zeros(1, 5, 2, 4), log_decay=torch.zeros(1, 5, 3))


def test_device_is_checked():
    with pytest.raises(ValueError, match="key_bias must be on value's device cpu, got meta"):
        public(None, None, torch.zeros(1, 5, 2, 4), key_bias=torch.zeros(1, 5, 2, device="meta"))


# ---- GPU --------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, None), (torch.bfloat16, 6e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(relative_rms, dtype, tolerance, compiled):
    for options in ({}, dict(decay=0.1, bias=1.0, docs=0.01, H=4), dict(coordinates=False, decay=0.1, docs=0.01)):
        for window in (None, 100):
            tensors, doc_start = inputs(1023, D=64, dtype=torch.float32, **options)
            tensors[2] = tensors[2].detach().to(dtype).requires_grad_()
            expected = run(reference, exactly(tensors), doc_start, window, dtype)
            moved = [None if x is None else x.detach().cuda().requires_grad_() for x in tensors]
            function = torch.compile(loglinear, fullgraph=True) if compiled else loglinear
            got = run(function, moved, None if doc_start is None else doc_start.cuda(), window, dtype)
            assert all(relative_rms(x.cpu(), expected[name], float_bound(64, torch.float32))
                       <= (tolerance or bound(tensors)) for name, x in got.items())
