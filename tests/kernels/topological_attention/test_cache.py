"""Topological attention token by token: equal to the whole rows in every mode, with what is kept as small as stated."""
import os
import subprocess
import sys

import pytest
import torch

from kernels.topological_attention import cache as module
from kernels.topological_attention import topological_attention_binned
from kernels.topological_attention import topological_attention_reference as reference
from kernels.topological_attention.cache import TokenBuffer, TopologicalCache, hidden_keys
from tests.errors import float_bound, reference_bound, rounding_bound
from tests.kernels.processes import ROOT


def rows(T, B=2, H=4, kv=2, D=8, decay=0.0, bias=False, docs=False, coordinates=True, seed=0):
    """Arguments of topological_attention by name, in float32, and doc_start (B, T) or None."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = dict(
        query_coord=draw(B, T, H) if coordinates else None,
        key_coord=draw(B, T, kv) if coordinates else None,
        value=draw(B, T, kv, D),
        log_decay=-decay * draw(B, T, H).abs() if decay else None,
        key_bias=draw(B, T, kv) if bias else None,
    )
    starts = torch.rand(B, T, generator=generator) < 0.1
    return tensors, torch.where(starts, torch.arange(T), 0).cummax(1).values.int() if docs else None


def decode(cache, tensors, doc_start, window, steps):
    """The outputs of all tokens, given in pieces of so many."""
    outs, end = [], 0
    T = tensors["value"].shape[1]
    index = torch.arange(T, dtype=torch.int32)
    starts = torch.zeros(tensors["value"].shape[0], T, dtype=torch.int32) if doc_start is None else doc_start
    first_key = starts if window is None else torch.maximum(starts, index - (window - 1))
    for count in steps:
        part = slice(end, end + count)
        now = {name: None if x is None else x[:, part] for name, x in tensors.items()}
        outs.append(cache.attend(*now.values(), (index - starts)[:, part], first_key[:, part], window))
        end += count
    assert end == T
    return torch.cat(outs, 1)


def exactly(tensors):
    """The same numbers in float64."""
    return {name: None if x is None else x.double() for name, x in tensors.items()}


def assert_near(got, whole, tensors, terms=None):
    """
    Every number within the bound of a mean of values over so many keys (all if not given) and of the columns beside
    them, in float32, and of the exponents that a token adds, its decay and its bias.
    """
    T, _, D = tensors["value"].shape[1:]
    exponent = sum(x.abs().max().item() for x in (tensors["log_decay"], tensors["key_bias"]) if x is not None)
    bound = float_bound((terms or T) + D, torch.float32) + rounding_bound(2, torch.float32) * exponent
    torch.testing.assert_close(got.double(), whole, rtol=0, atol=bound * tensors["value"].abs().max().item())


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small reads: threads would wait for each other where the machine has other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(decay=0.3), dict(decay=20.0, bias=True, docs=True), dict(bias=True), dict(docs=True)],
    ids=str,
)
def test_pieces_equal_the_whole(options, window, coordinates):
    tensors, doc_start = rows(60, coordinates=coordinates, **options)
    whole = reference(**exactly(tensors), doc_start=doc_start, window=window)
    for steps in ([60], [1] * 60, [20, 3, 1, 1, 35]):
        got = decode(TopologicalCache(), tensors, doc_start, window, steps)
        assert_near(got, whole, tensors)


@pytest.fixture
def short_runs(monkeypatch):
    """Several sorted runs in rows that a test can afford."""
    monkeypatch.setattr(module, "RUN", 16)
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "WINDOW_RUNS", 4)


def check_runs(cache):
    """
    Runs that follow each other, each in order, with less than the shortest behind them but for the last piece's tokens.
    """
    runs = cache.runs
    assert all(earlier[1] == later[0] for earlier, later in zip(runs.runs, runs.runs[1:])) and (
        not runs.runs or runs.runs[-1][1] == runs.end
    )
    first_kept = cache.length - cache.key.tokens.shape[2]
    for begin, end in runs.runs:
        places = runs.order.data[:, :, runs.order.end - (runs.end - begin):runs.order.end - (runs.end - end)].long()
        assert torch.equal(places.sort(-1).values, torch.arange(begin, end).expand_as(places))
        if begin >= first_kept:
            assert (cache.key.tokens.gather(2, places - first_kept).diff() >= 0).all()


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("B, docs", [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize(
    "options", [dict(), dict(kv=4, D=24), dict(decay=20.0, bias=True), dict(decay=0.01, bias=True, H=2)], ids=str
)
def test_sorted_runs_equal_the_whole(short_runs, monkeypatch, options, window, B, docs, loops):
    tensors, doc_start = rows(240, B=B, **options)
    if docs:
        starts = torch.zeros(B, 240, dtype=torch.bool)
        starts[0, 130] = starts[-1, 200] = True
        doc_start = torch.where(starts, torch.arange(240), 0).cummax(1).values.int()
    if not loops:
        monkeypatch.setattr(module, "cpu_loops", lambda name: None)
    whole = reference(**exactly(tensors), doc_start=doc_start, window=window)
    for steps in ([120, 3, 1, 1, 35] + [1] * 80, [1] * 240):
        cache = TopologicalCache()
        assert_near(decode(cache, tensors, doc_start, window, steps), whole, tensors)
        if loops:
            check_runs(cache)
    if loops and window is None and not docs:
        assert [end - begin for begin, end in cache.runs.runs] == [128, 64, 32] and cache.runs.end == 224
    assert (cache.runs is not None) == loops
    if docs and B == 1:  # a new document begins with nothing
        assert cache.length - cache.key.tokens.shape[2] == 200


def test_what_loops_do_not_take(short_runs):
    """A width that is no multiple of 8, and float64, without loops."""
    tensors, _ = rows(100, D=6)
    for dtype in (torch.float32, torch.float64):
        given = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
        cache = TopologicalCache()
        assert_near(decode(cache, given, None, None, [1] * 100), reference(**exactly(tensors)), tensors)
        assert cache.runs is None


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name, place",
    [
        ("query_coord", (0, 90, 1)),
        ("key_coord", (0, 3, 1)),
        ("key_coord", (0, 95, 0)),
        ("value", (0, 5, 0, 2)),
        ("key_bias", (0, 40, 0)),
        ("log_decay", (0, 60, 2)),
    ],
)
def test_what_is_no_number(short_runs, name, place, number):
    """
    Nothing before it changes; from it on NaN wherever the reference has it, and where both are finite no number but
    that.
    """
    tensors, _ = rows(120, B=1, decay=0.1, bias=True)
    clean = decode(TopologicalCache(), tensors, None, None, [1] * 120)
    tensors[name][place] = -abs(number) if name == "log_decay" else number  # a decay is never above 0
    got = decode(TopologicalCache(), tensors, None, None, [1] * 120)
    assert torch.equal(got[:, :place[1]], clean[:, :place[1]])
    got, expected = got[:, place[1]:], reference(**exactly(tensors))[:, place[1]:]
    assert got[expected.isnan()].isnan().all()
    finite = expected.isfinite() & got.isfinite()
    if number != number:
        assert torch.equal(finite, expected.isfinite())
    tensors = {key: x.nan_to_num(0, 0, 0) for key, x in tensors.items()}
    assert_near(torch.where(finite, got, 0), torch.where(finite, expected, 0), tensors)


def test_threads_change_nothing(short_runs):
    """Bit for bit; 1,200 tokens at once are enough work for two threads."""
    tensors, _ = rows(1400, decay=0.1)
    outs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        outs.append(decode(TopologicalCache(), tensors, None, None, [100, 1200] + [1] * 100)[:, 100:])
    assert torch.equal(*outs)


@pytest.mark.slow  # nothing of it is in the cache: 20 s of compilation
def test_indices_stay_inside():
    """With every index checked, in a process of its own: Numba decides about that when it is imported."""
    script = """
import torch
from kernels.topological_attention import cache as module
from tests.kernels.topological_attention.test_cache import assert_near, decode, exactly, reference, rows
module.RUN, module.BLOCK = 16, 4
for options in (dict(), dict(decay=0.3, bias=True, D=16), dict(coordinates=False, decay=0.1)):
    for window in (None, 60):
        tensors, _ = rows(150, **options)
        got = decode(module.TopologicalCache(), tensors, None, window, [40, 3] + [1] * 107)
        assert_near(got, reference(**exactly(tensors), window=window), tensors)
    if options and tensors["key_coord"] is not None:
        tensors["key_coord"][0, ::7] = float("nan")
        decode(module.TopologicalCache(), tensors, None, None, [1] * 150)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | dict(NUMBA_BOUNDSCHECK="1", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_runs_of_equal_and_of_far_coordinates(short_runs, scale, relative_rms):
    tensors, _ = rows(100, B=1)
    tensors |= {name: tensors[name] * scale for name in ("query_coord", "key_coord")}
    whole, cache = reference(**exactly(tensors)), TopologicalCache()
    bound = reference_bound(reference(**tensors), whole, 100 + 8, factor=8.0)
    assert relative_rms(decode(cache, tensors, None, None, [1] * 100), whole) < bound
    assert cache.runs.runs


@pytest.mark.parametrize("options", [dict(), dict(decay=0.3, bias=True, docs=True)], ids=str)
def test_binned_pieces_equal_the_binned_whole(chunks_in_float64, options):
    tensors, doc_start = rows(60, **options)
    whole = topological_attention_binned(**exactly(tensors), doc_start=doc_start, bins=32)
    for steps in ([1] * 60, [20, 3, 1, 36]):
        got = decode(TopologicalCache(32), tensors, doc_start, None, steps)
        assert_near(got, whole, tensors)


def test_many_tokens_lose_no_digits():
    """A decay of e^-1 a token moves the sum by 3,000: log-weights relative to the start would be off by 1e-4."""
    tensors, _ = rows(3000, B=1, H=1, kv=1, decay=1.0)
    got = decode(TopologicalCache(), tensors, None, None, [2000] + [1] * 1000)
    assert_near(got, reference(**exactly(tensors)), tensors, 100)  # a hundred tokens back weigh e^-80


def test_bytes_kept(monkeypatch):
    tensors, _ = rows(100, B=1, H=2, kv=2, D=16)
    exact = TopologicalCache()
    binned = TopologicalCache(8)
    short = TopologicalCache()
    decode(exact, tensors, None, None, [50, 50])
    assert exact.bytes_kept == 100 * 2 * (16 + 1) * 4
    monkeypatch.setattr(module, "RUN", 64)
    sorted_rows = TopologicalCache()
    decode(sorted_rows, tensors, None, None, [50, 50])
    assert sorted_rows.runs.end == 0
    sorted_rows.append(tensors["key_coord"][:, :1], tensors["value"][:, :1])
    of_a_block = 4 + 2 * (8 + 4 + 16 * 4)  # its first coordinate and two sums, each a potential, a weight and a row
    assert sorted_rows.bytes_kept == 2 * (101 * (16 + 1) * 4 + 64 * 4 + of_a_block)
    decode(binned, tensors, None, None, [90] + [1] * 10)
    assert binned.bytes_kept == 2 * (8 * (16 + 1) + 1) * 4
    decode(short, tensors, None, 5, [90] + [1] * 10)
    assert short.bytes_kept == 5 * 2 * (16 + 1) * 4
    alone, _ = rows(100, B=1, H=2, kv=2, D=16, coordinates=False)
    scan = TopologicalCache()
    decode(scan, alone, None, None, [1] * 100)
    assert scan.bytes_kept == 2 * (2 * (16 + 1) + 1) * 4


def test_bins_refuse_a_window():
    tensors, _ = rows(4)
    with pytest.raises(ValueError, match="a state of 8 bins forgets nothing, and this layer sees 3 tokens back"):
        TopologicalCache(8).attend(*tensors.values(), window=3)


def test_append_then_read():
    tensors, _ = rows(9, decay=0.2)
    cache = TopologicalCache()
    cache.append(tensors["key_coord"], tensors["value"], tensors["log_decay"])
    got = cache.read(tensors["query_coord"][:, -1:])
    assert_near(got, reference(**exactly(tensors))[:, -1:], tensors)


def test_token_buffer_keeps_what_it_is_told():
    buffer, everything = TokenBuffer(), torch.randn(2, 3, 500, 4)
    for start in range(0, 500, 25):
        buffer.keep(60)
        buffer.append(everything[:, :, start:start + 25])
        assert torch.equal(buffer.tokens, everything[:, :, max(0, start - 60):start + 25])
    assert buffer.bytes_kept == 2 * 3 * 85 * 4 * 4 and buffer.data.shape[2] < 200


def test_hidden_keys():
    assert hidden_keys(None, 3, 1, 9) is None and hidden_keys(torch.tensor([[2]]), 3, 1, 9) is None
    assert hidden_keys(None, 0, 2, 3).tolist() == [[[False, False, True], [False, False, False]]]
    assert hidden_keys(torch.tensor([[5], [3]]), 4, 1, 7).tolist() == [[[True, False, False]], [[False, False, False]]]
