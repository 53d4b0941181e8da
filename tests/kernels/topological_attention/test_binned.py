"""
The binned backend of topological attention: on bin centres against the reference, between them against the reference
with two keys for each, its limit for many bins, and decoding against the whole sequence. Gradients are those of a fixed
random projection of the result.
"""
import math

import pytest
import torch

from kernels.topological_attention import binned
from kernels.topological_attention import topological_attention_reference as reference
from kernels.topological_attention.binned import (
    BinnedState,
    topological_attention_binned,
    topological_attention_binned_state,
    topological_attention_binned_step,
)
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.marks import slow, slow_rows

pytestmark = pytest.mark.usefixtures("chunks_in_float64")

NAMES = ("query_coord", "key_coord", "value", "log_decay", "key_bias")
# exact centres
GRIDS = dict(
    narrow=dict(bins=64, low=-8.0, high=7.75),
    wide=dict(bins=64, low=-32.0, high=31.0),
    sharp=dict(bins=64, low=-10080.0, high=10080.0),
)
OPTIONS = dict(
    plain={},
    grouped=dict(H=4, kv=2, D=1),
    decay=dict(decay=0.3, D=16),
    strong_decay=dict(decay=10.0),
    bias=dict(bias=1.0, H=3, kv=1),
    strong_bias=dict(bias=30.0),
    docs=dict(docs=0.03),
    all=dict(decay=0.2, bias=10.0, docs=0.03, H=4, kv=2),
)


def inputs(T, grid, B=2, H=2, kv=2, D=5, decay=0.0, bias=0.0, docs=0.0, centres=True, seed=0):
    """
    Five float64 leaves (None where absent), exact in float32, and doc_start. Coordinates with a spread of a quarter of
    the grid's range, some outside; centres: keys, and every second query, on bin centres. bias: largest; docs: chance
    that a token begins a document.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    width = grid["high"] - grid["low"]
    query = draw(B, T, H) * width / 4
    key = draw(B, T, kv) * width / 4
    value = draw(B, T, kv, D)
    log_decay = -draw(B, T, H).abs() * decay
    key_bias = bias * (2 * torch.rand(B, T, kv, generator=generator, dtype=torch.float64) - 1)
    if centres:
        key, query[:, ::2] = nearest(key, **grid), nearest(query[:, ::2], **grid)
    starts = torch.rand(B, T, generator=generator) < docs
    doc_start = torch.where(starts, torch.arange(T), 0).cummax(1).values.int() if docs else None
    tensors = (query, key, value, log_decay if decay else None, key_bias if bias else None)
    return [None if x is None else x.float().double().requires_grad_() for x in tensors], doc_start


def nearest(x, bins, low, high):
    step = (high - low) / (bins - 1)
    return low + step * ((x - low) / step).round().clamp(0, bins - 1)


def run(function, tensors, doc_start, dtype=torch.float64, **options):
    """The result and the gradients by name. dtype: of the five tensors."""
    tensors = [None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors]
    out = function(*tensors, doc_start, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    given = {name: x for name, x in zip(NAMES, tensors) if x is not None}
    return dict(zip(("out", *given), (out.detach(), *torch.autograd.grad(out, list(given.values()), upstream))))


def bound(tensors, grid, dtype, rounded=None):
    """
    The bound of sums over tokens, bins and columns in dtype, and of exponents: features' up to the grid's range, or
    LIVE in a wider one, biases, and the decay of a chunk of 64 tokens. rounded: the dtype that results are rounded to.
    """
    query, key, value, log_decay, key_bias = tensors
    exponent = min(grid["high"] - grid["low"], binned.LIVE)
    if key_bias is not None:
        exponent += 2 * key_bias[key_bias.isfinite()].abs().max().item()
    if log_decay is not None:
        exponent += 64 * log_decay.abs().mean().item()
    sums = float_bound(value.shape[1] + grid["bins"] + value.shape[3], dtype)
    return sums + rounding_bound(2, dtype) * exponent + (rounding_bound(1, rounded) if rounded else 0.0)


def check(relative_rms, got, expected, tolerance):
    """
    tolerance: a number, or numbers by name. As an RMS error it is none, as the gradients of saturated rows are
    vanishing differences.
    """
    tolerance = tolerance if isinstance(tolerance, dict) else dict.fromkeys(expected, tolerance)
    errors = {name: relative_rms(got[name], expected[name], tolerance[name] / 4) for name in expected}
    assert all(error < tolerance[name] for name, error in errors.items()), (errors, tolerance)


def two_keys_for_each(query, key, value, log_decay, key_bias, doc_start, bins, low, high):
    """
    The reference with spread keys: a key on the centre below and one on the centre above, the logarithms of their
    linear weights as biases.
    """
    step = (high - low) / (bins - 1)
    position = ((key - low) / step).clamp(0, bins - 1)
    below = position.detach().floor().clamp_max(bins - 2)

    def pairs(first, second):
        return torch.stack((first, second), 2).flatten(1, 2)

    weights = pairs(1 - (position - below), position - below)
    # finite: the first row of a pair, which is left out, may see this key alone
    bias = torch.where(weights > 0, weights.clamp_min(1e-37).log(), -1e30)
    out = reference(
        pairs(query, query),
        pairs(low + step * below, low + step * (below + 1)),
        pairs(value, value),
        None if log_decay is None else pairs(log_decay, torch.zeros_like(log_decay)),
        bias if key_bias is None else bias + pairs(key_bias, key_bias),
        None if doc_start is None else pairs(2 * doc_start, 2 * doc_start),
    )
    return out[:, 1::2]


# ---- values and gradients ---------------------------------------------------

# a sharp grid forgets what has decayed below e^-60, however near: tested below
@pytest.mark.parametrize(
    "options, grid",
    [
        pytest.param(OPTIONS[name], GRIDS[grid], id=f"{name}-{grid}")
        for name in OPTIONS
        for grid in GRIDS
        if (name, grid) != ("strong_decay", "sharp")
    ],
)
def test_exact_on_bin_centres(relative_rms, options, grid):
    for T in (1, 2, 63, 64, 65, 200):
        tensors, doc_start = inputs(T, grid, **options)
        expected = run(reference, tensors, doc_start)
        for dtype in (torch.float64, torch.float32):
            check(relative_rms, run(topological_attention_binned, tensors, doc_start, dtype, spread=False, **grid),
                  expected, bound(tensors, grid, dtype))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_spread_keys_are_two_keys(relative_rms, options, grid):
    tensors, doc_start = inputs(130, grid, centres=False, **options)
    """
    A place between bins is as wrong as the rounding of a coordinate, which the reference has too, a weight next to 0 by
    as much as it is small.
    """
    expected = run(two_keys_for_each, tensors, doc_start, **grid)
    low = run(two_keys_for_each, tensors, doc_start, torch.float32, **grid)
    for dtype in (torch.float64, torch.float32):
        sums = bound(tensors, grid, dtype)
        tolerance = {name: sums + reference_bound(low[name], x, 1, dtype) for name, x in expected.items()}
        check(relative_rms, run(topological_attention_binned, tensors, doc_start, dtype, **grid), expected, tolerance)


@pytest.mark.parametrize("high", [8.0, 40.0])
def test_gradcheck(high):
    grid = dict(bins=9, low=-8.0, high=high)
    tensors, doc_start = inputs(10, grid, B=1, H=2, kv=1, D=2, decay=0.5, bias=2.0, docs=0.2, centres=False)
    inside = [x.detach().clamp(-7.9, high - 0.1) for x in tensors[:2]]  # the derivative jumps at the ends
    tensors = [
        x.requires_grad_() for x in (*inside, tensors[2].detach(), tensors[3].detach() - 0.01, tensors[4].detach())
    ]
    assert torch.autograd.gradcheck(
        lambda *x: topological_attention_binned(*x, doc_start, **grid), tensors, eps=1e-6, atol=1e-7, rtol=1e-5
    )


def test_straight_through_gradient_is_that_of_the_nearest_centre(relative_rms):
    grid = GRIDS["narrow"]
    tensors, doc_start = inputs(100, grid, centres=False, decay=0.2, bias=1.0)
    rounded = [tensors[0], nearest(tensors[1].detach(), **grid), *tensors[2:]]
    got, expected = (run(topological_attention_binned, x, doc_start, spread=False, **grid) for x in (tensors, rounded))
    assert (tensors[1].abs() > 8).any() and (tensors[1] != rounded[1]).all()
    check(relative_rms, got, expected, bound(tensors, grid, torch.float64))


def convergence(relative_rms, tensors, spread, bins=(32, 64, 128, 256)):
    expected = reference(*tensors)
    return [
        relative_rms(topological_attention_binned(*tensors, bins=n, spread=spread), expected, floor=0.0) for n in bins
    ]


def test_error_falls_with_the_square_of_the_bins(relative_rms):
    """Where no query is within a step of a key, whose kernel has a kink there."""
    (query, key, *rest), _ = inputs(300, GRIDS["narrow"], centres=False, decay=0.01)
    with torch.no_grad():
        signs = torch.randn(key.shape, generator=torch.Generator().manual_seed(2)).sign()
        tensors = [query / 40, signs * (1 + key.abs() / 2).clamp_max(7.9), *rest]
        query.clamp_(-0.4, 0.4)
        errors = convergence(relative_rms, tensors, True)
    assert errors[-1] < 1e-3 and all(3.5 < first / second < 4.5 for first, second in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("spread, fall, last", [(True, 16.0, 0.01), (False, 5.0, 0.03)])
def test_error_falls_for_any_coordinates(relative_rms, spread, fall, last):
    """
    About as bins^-1.5 with spread and bins^-1 without: the pairs of which the query lies between the key's bins decide.
    """
    (query, key, *rest), _ = inputs(400, GRIDS["narrow"], centres=False, decay=0.01)
    with torch.no_grad():
        errors = convergence(relative_rms, [query / 4, key / 4, *rest], spread)
    assert errors[-1] < last and errors[0] / errors[-1] > fall, errors


def test_queries_far_outside(relative_rms):
    tensors, _ = inputs(100, GRIDS["narrow"], decay=0.1)
    with torch.no_grad():
        tensors[0].copy_(torch.where(torch.arange(100)[:, None] % 2 == 0, 1e4, -1e4))
    got = run(topological_attention_binned, tensors, None, torch.float32, spread=False, **GRIDS["narrow"])
    check(relative_rms, got, run(reference, tensors, None), bound(tensors, GRIDS["narrow"], torch.float32))


@pytest.mark.parametrize("grid", [GRIDS["narrow"], GRIDS["sharp"]], ids=["narrow", "sharp"])
def test_hidden_keys(relative_rms, grid):
    tensors, _ = inputs(80, grid, decay=0.1, bias=2.0)
    with torch.no_grad():
        tensors[4][:, 5:70:3] = -math.inf
    got = run(topological_attention_binned, tensors, None, torch.float32, spread=False, **grid)
    assert (got["key_bias"][:, 5:70:3] == 0).all()
    check(relative_rms, got, run(reference, tensors, None), bound(tensors, grid, torch.float32))
    with torch.no_grad():
        tensors[4][:, 0] = -math.inf  # the first query sees no key at all
        later = [x[:, 1:] for x in tensors]
    expected = reference(*later).detach()
    got = topological_attention_binned(*tensors, spread=False, **grid).detach()
    assert relative_rms(got[:, 1:], expected) < bound(tensors, grid, torch.float64)


@pytest.mark.parametrize("hidden", [False, True])
def test_sharp_grid_forgets_what_has_decayed(hidden):
    """
    A key beside the query, but e^-100 as heavy as one 1,000 away, whose weight then is e^-1000: gone, where the exact
    result is the near key's value. hidden: by a bias of -inf, the first of all keys.
    """
    def column(*x):
        return torch.tensor([[0.0, *x]])[:, 0 if hidden else 1:, None]

    value = column(3.0, 5.0)[..., None].clone().requires_grad_()
    query = column(0.0, 0.0)
    key = column(0.0, 1000.0)
    log_decay = column(0.0, -100.0)
    key_bias = torch.tensor([[-math.inf, 0.0, 0.0]])[..., None] if hidden else None
    out = topological_attention_binned(query, key, value, log_decay, key_bias, bins=101, low=-1000.0, high=1000.0)[
        :, -2:
    ]
    assert out.flatten().tolist() == [3.0, 5.0]
    out.sum().backward()
    assert value.grad.flatten()[-2:].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_strong_decay_in_float32_is_finite(grid):
    tensors, doc_start = inputs(300, grid, decay=30.0, bias=30.0, docs=0.02)
    for spread in (True, False):
        assert all(
            x.isfinite().all()
            for x in run(
                topological_attention_binned, tensors, doc_start, torch.float32, spread=spread, **grid
            ).values()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(relative_rms, dtype):
    tensors, doc_start = inputs(300, GRIDS["narrow"], decay=0.1, bias=1.0, docs=0.01)
    tensors = [None if x is None else x.float() for x in tensors]
    tensors[2] = tensors[2].detach().to(dtype)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = topological_attention_binned(*leaves, doc_start, spread=False, **GRIDS["narrow"])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, upstream)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = reference(*exact, doc_start)
    assert out.dtype == dtype and [x.dtype for x in gradients] == [x.dtype for x in tensors]
    check(relative_rms, dict(zip(("out", *NAMES), (out, *gradients))),
          dict(zip(("out", *NAMES), (expected, *torch.autograd.grad(expected, exact, upstream.double())))),
          bound(exact, GRIDS["narrow"], torch.float32, dtype))


def test_any_strides():
    tensors, doc_start = inputs(90, GRIDS["narrow"], **OPTIONS["all"])
    scattered = [torch.stack((x, x), -1)[..., 0] for x in tensors]
    assert not any(x.is_contiguous() for x in scattered)
    out = topological_attention_binned(*scattered, doc_start.T.contiguous().T)
    assert torch.equal(out, topological_attention_binned(*tensors, doc_start))
    out.transpose(1, 2).sum().backward()
    assert all(x.grad.isfinite().all() for x in tensors)


def test_documents_may_be_int64():
    tensors, doc_start = inputs(90, GRIDS["narrow"], **OPTIONS["all"])
    assert torch.equal(
        topological_attention_binned(*tensors, doc_start), topological_attention_binned(*tensors, doc_start.long())
    )


# ---- what does not see what -------------------------------------------------

@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_nothing_before_a_token_feels_it(grid, spread):
    for dtype in (torch.float32, torch.float64):
        tensors = [x.detach().to(dtype) for x in inputs(150, grid, decay=0.1, bias=5.0, centres=False)[0]]
        before = topological_attention_binned(*tensors, spread=spread, **grid)
        changed = [x.clone() for x in tensors]
        for x, new in zip(changed, (0.3, -0.7, 50.0, -3.0, 30.0)):
            x[:, 100:] = new
        after = topological_attention_binned(*changed, spread=spread, **grid)
        assert torch.equal(before[:, :100], after[:, :100]) and not torch.isclose(before[:, 100:], after[:, 100:]).any()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_documents_are_separate(relative_rms, grid):
    tensors, _ = inputs(150, grid, decay=0.1, bias=5.0, centres=False)
    doc_start = torch.where(torch.arange(150) < 70, 0, 70).int().expand(2, -1)
    together = run(topological_attention_binned, tensors, doc_start, **grid)
    apart = [
        run(topological_attention_binned, [x[:, part] for x in tensors], None, **grid)["out"]
        for part in (slice(0, 70), slice(70, 150))
    ]
    rounding = bound(tensors, grid, torch.float64)
    assert relative_rms(together["out"], torch.cat(apart, 1)) < rounding
    other = [x.detach().clone() for x in tensors]
    for x in other[:3]:
        x[:, :70] *= -0.5
    assert torch.equal(topological_attention_binned(*other, doc_start, **grid)[:, 70:], together["out"][:, 70:])
    other[4][:, :70] = 30.0  # chunks hold both documents' running sums: the same but for rounding
    assert relative_rms(topological_attention_binned(*other, doc_start, **grid)[:, 70:],
                        together["out"][:, 70:]) < rounding + 30 * rounding_bound(2, torch.float64)


# ---- slices, graphs, arguments ----------------------------------------------

@pytest.mark.parametrize("size", [1, 70 * 2 * 64, 70 * 4 * 64, 70 * 8 * 64])
def test_slices(relative_rms, monkeypatch, size):
    tensors, doc_start = inputs(70, GRIDS["narrow"], B=3, H=6, kv=3, decay=0.2, bias=2.0, docs=0.1)
    whole = run(topological_attention_binned, tensors, doc_start, **GRIDS["narrow"])
    monkeypatch.setattr(binned, "SLICE", size)
    check(relative_rms, run(topological_attention_binned, tensors, doc_start, **GRIDS["narrow"]), whole,
          bound(tensors, GRIDS["narrow"], torch.float64))


def test_slices_keep_no_features(monkeypatch):
    tensors = [x.detach().requires_grad_() for x in inputs(128, GRIDS["narrow"], B=4, H=4, kv=4)[0][:3]]
    kept = {}
    monkeypatch.setattr(binned, "SLICE", 1)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x
    ):
        topological_attention_binned(*tensors, **GRIDS["narrow"])
    assert sum(x.untyped_storage().nbytes() for x in kept.values()) < tensors[0].nbytes * 64


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "grid, spread, size",
    [("narrow", False, 70 * 2 * 64), *slow_rows(("narrow", True, 1 << 24), ("sharp", True, 1 << 24))],
)
def test_compiles_as_one_graph(compiler, grid, spread, size, relative_rms, monkeypatch):
    monkeypatch.setattr(binned, "SLICE", size)
    tensors, doc_start = inputs(70, GRIDS[grid], B=1, kv=2, H=2, decay=0.2, bias=10.0, docs=0.03)
    compiled = torch.compile(topological_attention_binned, fullgraph=True, backend=compiler)
    expected = run(topological_attention_binned, tensors, doc_start, spread=spread, **GRIDS[grid])
    check(relative_rms, run(compiled, tensors, doc_start, spread=spread, **GRIDS[grid]), expected,
          bound(tensors, GRIDS[grid], torch.float64))


def test_autocast_does_not_round():
    tensors, doc_start = inputs(70, GRIDS["narrow"], **OPTIONS["all"])
    tensors = [x.detach().float() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        out = topological_attention_binned(*tensors, doc_start)
    assert torch.equal(out, topological_attention_binned(*tensors, doc_start))


@pytest.mark.parametrize("changes, message", [
    (dict(window=8), r"window must be None or at least T = 9 for backend binned, .* got 8"),
    (dict(bins=1), r"bins must be an integer of at least 2, got 1"),
    (dict(low=2.0, high=-2.0), r"low must be below high and both finite, got low=2, high=-2"),
    (dict(high=math.inf), r"low must be below high and both finite, got low=-8, high=inf"),
    (dict(query_coord=None, key_coord=None), r"query_coord and key_coord must be given for backend binned"),
])
def test_wrong_arguments_are_named(changes, message):
    arguments = dict(
        query_coord=torch.zeros(2, 9, 3), key_coord=torch.zeros(2, 9, 3), value=torch.zeros(2, 9, 3, 2), window=9
    )
    assert topological_attention_binned(**arguments).shape == (2, 9, 3, 2)
    with pytest.raises(ValueError, match=message) as error:
        topological_attention_binned(**arguments | changes)
    assert "\n" not in str(error.value)


# ---- decoding ---------------------------------------------------------------

def steps(state, tensors, first=0, **options):
    outs = []
    for t in range(first, tensors[0].shape[1]):
        out, state = topological_attention_binned_step(
            state, *(None if x is None else x[:, t] for x in tensors), **options
        )
        outs.append(out)
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(
    "options",
    [{}, dict(decay=0.2, bias=10.0, H=4, kv=2), *slow(*(x for x in OPTIONS.values() if x and "docs" not in x))],
    ids=str,
)
def test_steps_equal_the_forward_pass(relative_rms, options, grid, spread):
    tensors, _ = inputs(120, grid, centres=False, **options)
    tensors = [None if x is None else x.detach() for x in tensors]
    expected = topological_attention_binned(*tensors, spread=spread, **grid)
    place = dict(low=grid["low"], high=grid["high"], spread=spread)
    B, T, H = tensors[0].shape
    low = topological_attention_binned(*(None if x is None else x.float() for x in tensors), spread=spread, **grid)
    for dtype in (torch.float64, torch.float32):
        tolerance = bound(tensors, grid, dtype) + reference_bound(low, expected, 1, dtype)
        given = [None if x is None else x.to(dtype) for x in tensors]
        outs, state = steps(BinnedState.empty(B, H, grid["bins"], tensors[2].shape[-1], dtype), given, **place)
        assert relative_rms(outs, expected) < tolerance
        prompt = topological_attention_binned_state(
            *(None if x is None else x[:, :77] for x in given[1:]), heads=H, spread=spread, **grid
        )
        continued, after_prompt = steps(prompt, given, 77, **place)
        assert relative_rms(continued, expected[:, 77:]) < tolerance
        assert (
            [x.shape for x in after_prompt]
            == [x.shape for x in state]
            == [(B, H, grid["bins"], tensors[2].shape[-1] + 1), (B, H)]
        )
        whole = topological_attention_binned_state(*given[1:], heads=H, spread=spread, **grid)
        for other in (after_prompt, whole):
            assert all(x.dtype == dtype and relative_rms(x, y) < tolerance for x, y in zip(other, state))


def test_a_prompt_leaves_its_last_document():
    tensors, _ = inputs(100, GRIDS["narrow"], decay=0.1, bias=5.0)
    doc_start = torch.where(torch.arange(100) < 60, 0, 60).int().expand(2, -1)
    tensors = [x.detach() for x in tensors[1:]]
    whole = topological_attention_binned_state(*tensors, doc_start, **GRIDS["narrow"])
    assert all(
        torch.equal(x, y)
        for x, y in zip(whole, topological_attention_binned_state(*(x[:, 60:] for x in tensors), **GRIDS["narrow"]))
    )


def test_a_step_costs_the_same_after_any_prompt():
    """The same operations on tensors of the same sizes: what they are depends on the state alone."""
    states = []
    for T in (10, 1000):
        (query, key, value, *_), _ = inputs(T, GRIDS["narrow"])
        states.append(topological_attention_binned_state(key, value, bins=256))
    assert len({tuple((x.shape, x.dtype, x.stride()) for x in state) for state in states}) == 1
    assert states[0].sums.numel() == 2 * 2 * 256 * 6


@pytest.mark.parametrize("decay", [-0.5, -1e4])
def test_a_long_decay_leaves_no_denormal_numbers(decay):
    """A CPU multiplies these many times as slowly. A factor for each token, at first in one bin and then in another."""
    state = BinnedState.empty(1, 1, 16, 2)
    for t in range(400):
        coordinate = torch.full((1, 1), -5.0 if t < 5 else 5.0)
        out, state = topological_attention_binned_step(
            state, coordinate, coordinate, torch.tensor([[[1.0, t]]]), torch.full((1, 1), decay)
        )
    assert (
        not ((state.sums != 0) & (state.sums.abs() < 1e-35)).any()
        and (state.sums[..., :8, :] == 0).all()
        and state.sums[..., 8:, :].any()
    )
    assert out[0, 0, 0] == 1 and out.isfinite().all()


def test_step_keeps_the_state_and_values_dtype():
    state = BinnedState.empty(1, 2, 16, 3)
    out, after = topological_attention_binned_step(
        state, torch.zeros(1, 2).bfloat16(), torch.zeros(1, 1), torch.ones(1, 1, 3).bfloat16()
    )
    assert (
        out.dtype == torch.bfloat16 and after.sums.dtype == after.log_scale.dtype == torch.float32 and (out == 1).all()
    )
    assert not state.sums.any()


@pytest.mark.parametrize("changes, message", [
    (
        dict(query_coord=torch.zeros(2, 3)),
        r"query_coord must be \(2, 4\) for a state of sums \(2, 4, 16, 6\) and 2 heads of keys, got \(2, 3\)",
    ),
    (dict(value=torch.zeros(2, 2, 6)), r"value must be \(2, 2, 5\) .* got \(2, 2, 6\)"),
    (dict(log_decay=torch.zeros(2, 2)), r"log_decay must be \(2, 4\)"),
    (dict(key_bias=torch.zeros(2, 4)), r"key_bias must be \(2, 2\)"),
    (dict(key_coord=torch.zeros(2, 3), value=torch.zeros(2, 3, 5)), "key_coord has 3 heads, which must divide the"),
])
def test_step_names_wrong_shapes(changes, message):
    arguments = dict(query_coord=torch.zeros(2, 4), key_coord=torch.zeros(2, 2), value=torch.zeros(2, 2, 5))
    with pytest.raises(ValueError, match=message):
        topological_attention_binned_step(BinnedState.empty(2, 4, 16, 5), **arguments | changes)


# ---- on a GPU ---------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.5e-2), (torch.float16, 1e-3), (torch.float32, 5e-5)])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gpu_equals_the_reference(grid, dtype, tolerance, relative_rms, poison):
    tensors, doc_start = inputs(700, grid, D=64, decay=0.05, bias=3.0, docs=0.005, H=4, kv=2)
    leaves = [
        x.detach().to("cuda", dtype if name == "value" else torch.float32).requires_grad_()
        for name, x in zip(NAMES, tensors)
    ]
    poison(torch.empty(1 << 26, device="cuda"))  # what the allocator hands out next
    out = topological_attention_binned(*leaves, doc_start.cuda(), spread=False, **grid)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, leaves, upstream.cuda())
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    expected = reference(*exact, doc_start)
    check(
        relative_rms,
        dict(zip(("out", *NAMES), (out, *gradients))),
        dict(zip(("out", *NAMES), (expected, *torch.autograd.grad(expected, exact, upstream.double())))),
        tolerance * (3 if grid is GRIDS["sharp"] else 1),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [GRIDS["narrow"], GRIDS["sharp"]], ids=["narrow", "sharp"])
def test_gpu_compiled_equals_eager(grid, relative_rms):
    tensors, doc_start = inputs(300, grid, D=32, **OPTIONS["all"])
    tensors, doc_start = [x.detach().cuda() for x in tensors], doc_start.cuda()
    compiled = torch.compile(topological_attention_binned, fullgraph=True)
    expected = run(topological_attention_binned, tensors, doc_start, torch.float32, **grid)
    check(relative_rms, run(compiled, tensors, doc_start, torch.float32, **grid), expected,
          2 * bound(tensors, grid, torch.float32))


@pytest.mark.gpu
def test_gpu_steps_equal_the_forward_pass(relative_rms):
    grid = GRIDS["narrow"]
    tensors = [x.detach().float().cuda() for x in inputs(120, grid, centres=False, decay=0.2, bias=5.0, H=4, kv=2)[0]]
    state = topological_attention_binned_state(*(x[:, :50] for x in tensors[1:]), **grid)
    outs, _ = steps(state, tensors, 50, low=grid["low"], high=grid["high"])
    expected = topological_attention_binned(*tensors, **grid)[:, 50:]
    assert relative_rms(outs, expected) < 2 * bound(tensors, grid, torch.float32)
