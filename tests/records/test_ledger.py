"""
The ledger: its rules against results by hand, published ones and their own bounds, what they keep in simulated
ledgers, and the file under kills, damage, edits and several processes.
"""

import json
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from records import ledger
from records.ledger import (
    ALPHA,
    CAP,
    HEADER,
    LAMBDA,
    WEALTH,
    Entry,
    close_entry,
    describe,
    lord_alpha,
    next_alpha,
    open_entry,
    open_locked,
    read_entries,
    saffron_alpha,
    spend,
)
from records.statistics import ALPHA as ALPHA_WITHOUT_LEDGER
from train_gpt import RunError

fcntl = pytest.importorskip("fcntl")
ROUNDING = 1e-12  # relative: sums of some hundred numbers in float64

# ---- The rules


def halves(index):
    """2^-j, which sums to 1 and can be added up by hand; 0 below 1."""
    index = np.asarray(index, dtype=np.float64)
    return np.where(index < 1, 0.0, 0.5 ** index)


def logarithms(index):
    """The sequence of Javanmard and Montanari, 2018, with the constant of the R package onlineFDR."""
    index = np.asarray(index, dtype=np.float64)
    j = np.maximum(index, 1.0)
    return np.where(index < 1, 0.0, 0.07720838 * np.log(np.maximum(j, 2.0)) / (j * np.exp(np.sqrt(np.log(j)))))


def power(exponent):
    """j^-exponent over its sum."""
    def gamma(index):
        index = np.asarray(index, dtype=np.float64)
        return np.where(index < 1, 0.0, np.maximum(index, 1.0) ** -exponent / special.zeta(exponent))
    return gamma


def history(*known, candidates=()):
    """(rejected, known, candidate) of comparisons, one a number: when its rejection became known, 0 for none."""
    known = np.array(known, dtype=np.int64)
    candidate = known > 0
    candidate[list(candidates)] = True
    return known > 0, known, candidate


def test_what_is_spent_falls_and_sums_to_1():
    terms = spend(np.arange(1, 100_001))
    tail = 100_000.5 ** (1 - ledger.EXPONENT) / (ledger.EXPONENT - 1) / special.zeta(ledger.EXPONENT)
    assert (np.diff(terms) < 0).all() and (terms > 0).all()
    assert terms.sum() + tail == pytest.approx(1, abs=1e-10)  # midpoint rule: the error is below the last term / n
    assert spend([0, -3]).tolist() == [0, 0] and spend(1) == pytest.approx(1 / 3.93194921180954)


@pytest.mark.parametrize("known, alpha_t", [
    ((), 0.01),                             # W0 / 2
    ((0, 0, 0), 0.00125),                   # W0 / 16
    ((0, 2, 0), 0.01625),                   # W0 / 16 + (alpha - W0) / 4
    ((0, 2, 3, 0), 0.028125),               # W0 / 32 + (alpha - W0) / 8 + alpha / 4
    ((0, 3, 3, 0), 0.035625),               # both became known when three had begun: W0 / 32 + (2 alpha - W0) / 4
    ((4, 0, 3, 0), 0.055625),               # the later one was known first: W0 / 32 + (alpha - W0) / 4 + alpha / 2
])
def test_lord_by_hand(known, alpha_t):
    rejected, known, _ = history(*known)
    assert lord_alpha(rejected, known, alpha=0.08, wealth=0.02, gamma=halves) == pytest.approx(alpha_t, rel=ROUNDING)


@pytest.mark.parametrize("known, candidates, alpha_t", [
    ((), (), 0.0075),                       # 3/4 W0 / 2
    ((0, 0, 0), (), 0.0009375),             # 3/4 W0 / 16
    ((0, 0, 0), (0, 2), 0.00375),           # 3/4 W0 / 4
    ((0, 2, 0), (), 0.013125),              # 3/4 (W0 / 8 + (alpha - W0) / 4): the second is a candidate
    ((0, 2, 0), (2,), 0.02625),             # 3/4 (W0 / 4 + (alpha - W0) / 2)
    ((0, 2, 3, 0), (), 0.028125),           # 3/4 (W0 / 8 + (alpha - W0) / 4 + alpha / 4)
    ((0, 4, 0, 0), (2,), 0.024375),         # 3/4 (W0 / 8 + (alpha - W0) / 2): candidates after r_1 = 4 alone count
])
def test_saffron_by_hand(known, candidates, alpha_t):
    result = saffron_alpha(*history(*known, candidates=candidates), alpha=0.08, wealth=0.02, threshold=0.25,
                           gamma=halves)
    assert result == pytest.approx(alpha_t, rel=ROUNDING)


# The example of the R package onlineFDR 2.5 (documentation of LORD and SAFFRON): p values, alphas with their defaults.
PUBLISHED = [2.9e-8, .06743, .01514, .08174, .00171, 3.6e-5, .79149, .27201, .28295, 7.59e-8, .69274, .30443, .00136,
             .72342, .54757]
PUBLISHED_LORD = [
    .0002675839, .0024664457, .0005732818, .0004872805, .0004059066, .0003447286, .0029745013, .0008450114,
    .0007305648, .0006243143, .0032185913, .0010617227, .0009256825, .0008019657, .0007059610]
PUBLISHED_SAFFRON = [
    .005468627, .010937254, .010937254, .010937254, .010937254, .021874508, .032811762, .010823845, .010823845,
    .010823845, .021761099, .009265591, .009265591, .020202846, .009064367]


@pytest.mark.parametrize("rule, expected", [
    (lambda rejected, known, p: lord_alpha(rejected, known, wealth=0.005, gamma=logarithms), PUBLISHED_LORD),
    (lambda rejected, known, p: saffron_alpha(rejected, known, p <= LAMBDA, gamma=power(1.6)), PUBLISHED_SAFFRON),
], ids=["LORD++", "SAFFRON"])
def test_published_example(rule, expected):
    p = np.array(PUBLISHED)
    rejected = np.zeros(len(p), dtype=bool)
    alphas = []
    for t in range(len(p)):
        alphas.append(float(rule(rejected[:t], np.arange(1, t + 1), p[:t])))
        rejected[t] = p[t] <= alphas[-1]
    assert alphas == pytest.approx(expected, abs=6e-10)  # nine or ten decimals are printed


@pytest.mark.parametrize("gamma", [spend, logarithms, halves])
@pytest.mark.parametrize("method", ["LORD++", "SAFFRON"])
def test_the_sum_of_alphas_stays_within_its_bound_while_comparisons_overlap(method, gamma):
    """
    Whatever is rejected and however late that becomes known, LORD++'s alphas sum up to at most alpha max(1, R), and
    SAFFRON's over 1 - lambda likewise without the known candidates, at every moment.
    """
    random = np.random.default_rng(11)
    for scale in (1.0, 0.03) * 12:
        p = scale * random.random(50)
        end = np.arange(50) + random.integers(1, 12, 50)  # how many have begun when the outcome is written
        alphas = np.zeros(50)
        for t in range(50):
            ended = end[:t] <= t
            rejected = ended & (p[:t] <= alphas[:t])
            candidate = ended & (p[:t] <= LAMBDA)
            if method == "LORD++":
                alphas[t] = lord_alpha(rejected, end[:t], gamma=gamma)
                paid = alphas.sum()
            else:
                alphas[t] = saffron_alpha(rejected, end[:t], candidate, gamma=gamma)
                paid = (alphas.sum() - alphas[:t][candidate].sum()) / (1 - LAMBDA)
            assert alphas[t] > 0 and paid <= ALPHA * max(1, rejected.sum()) * (1 + ROUNDING)


def test_alpha_of_entries():
    """The first rejects, the second is open, the third was not better; known is what the file's order says."""
    entry = Entry(1, "", "a", "", "", ["x"], 0.005)
    first = Entry(1, "", "a", "", "", ["x"], 0.005, dict(x="better"), 2)
    third = Entry(3, "", "c", "", "", ["x", "y"], 0.005, dict(x="worse", y="equivalent"), 3)
    gamma = [j ** -1.3 / 3.93194921180954 for j in (1, 2, 3, 4)]
    assert next_alpha([]) == CAP < WEALTH * gamma[0]
    assert next_alpha([entry]) == pytest.approx(WEALTH * gamma[1])
    expected = WEALTH * gamma[3] + (ALPHA - WEALTH) * gamma[1]  # r_1 = 2
    assert next_alpha([first, replace_id(entry, 2), third]) == pytest.approx(expected)
    assert first.rejected and not entry.rejected and not third.rejected
    assert third.arm_alpha == pytest.approx(0.005) and entry.arm_alpha == pytest.approx(0.01)


def replace_id(entry, number):
    return Entry(**(vars(entry) | dict(id=number, plan=f"plan {number}")))


def test_no_comparison_is_easier_than_without_a_ledger():
    assert 2 * CAP == ALPHA_WITHOUT_LEDGER
    kept = [Entry(n, "", f"{n}", "", "", ["x"], 0.005, dict(x="better"), n) for n in range(1, 30)]
    assert next_alpha(kept) == CAP < lord_alpha(np.ones(29, dtype=bool), np.arange(1, 30))


# ---- Simulated ledgers

IDEAS = 200
PAIRS = 24
LOOKS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)  # pairs after which a comparison until decided looks


def draw(random, ledgers, share, effect, shared=False, looks=(PAIRS,)):
    """
    (true, p), both (ledgers, IDEAS): whether an idea is better, by `effect` standard deviations of a paired difference,
    which each is with probability `share`, and the one-sided p of Student's t over PAIRS differences. shared: all ideas
    of a ledger are compared with the same runs of the baseline, whose noise is half of a difference's variance. Of
    several looks, each is made at an equal share of alpha, which is valid and wasteful: p is the least over the looks,
    times their number.
    """
    true = random.random((ledgers, IDEAS)) < share
    p = np.empty((ledgers, IDEAS))
    counts = np.array(looks)
    for some in np.array_split(np.arange(ledgers), max(1, ledgers // 50)):  # what fits into the cache
        noise = random.standard_normal((len(some), IDEAS, PAIRS))
        if shared:
            noise = (noise + random.standard_normal((len(some), 1, PAIRS))) * 0.5 ** 0.5
        noise += effect * true[some, :, None]

        # t after each look
        mean = noise.cumsum(-1)[..., counts - 1] / counts
        squares = np.square(noise).cumsum(-1)[..., counts - 1]
        variance = (squares - counts * mean ** 2) / (counts - 1)
        tests = stats.t.sf(mean / np.sqrt(variance / counts), counts - 1)
        p[some] = np.minimum(1, len(looks) * tests.min(-1))
    return true, p


def keep(p, rule, overlap=1):
    """
    bool (ledgers, ideas): what is kept at p (ledgers, ideas). rule(rejected, known, p) -> alpha, of the comparisons
    before. overlap: how many comparisons are under way at any time.
    """
    kept = np.zeros(p.shape, dtype=bool)
    for t in range(p.shape[1]):
        ended = max(0, t + 1 - overlap)  # of those before, known to the one that begins
        rejected = kept[:, :t] & (np.arange(t) < ended)
        known = np.broadcast_to(np.arange(t) + overlap, rejected.shape)
        kept[:, t] = p[:, t] <= rule(rejected, known, p[:, :t])
    return kept


def tabulated(gamma):
    """The same sequence from a table: a power for each comparison of each ledger takes most of the time otherwise."""
    return gamma(np.arange(IDEAS + 1)).__getitem__


def lord(gamma=spend, cap=1.0):
    gamma = tabulated(gamma)
    return lambda rejected, known, p: np.minimum(cap, lord_alpha(rejected, known, gamma=gamma))


def saffron(gamma=spend, cap=1.0):
    gamma = tabulated(gamma)
    return lambda rejected, known, p: np.minimum(cap, saffron_alpha(rejected, known, p <= LAMBDA, gamma=gamma))


def same(alpha):
    return lambda rejected, known, p: np.full(len(p), alpha)


PRODUCT = lord(cap=CAP)


def test_the_simulated_rule_is_the_ledgers():
    random = np.random.default_rng(3)
    known = np.maximum.accumulate(random.integers(1, 20, 19))
    known = np.minimum(np.maximum(known, np.arange(1, 20)), 19)
    rejected = random.random(19) < 0.3
    entries = [Entry(n, "", f"{n}", "", "", ["x"], 0.005, dict(x="better" if bad else "worse"), int(when))
               for n, (bad, when) in enumerate(zip(rejected, known), 1)]
    alpha = next_alpha(entries)
    assert PRODUCT(rejected[None], known[None], np.ones((1, 19))) == pytest.approx(alpha, rel=ROUNDING)


@pytest.mark.parametrize("overlap", [1, 8])
def test_ideas_without_effect(overlap):
    """
    At most 2 of 200 may be kept; the bound is lower. Without any effect V is R, and R <= 1 + (R - 1)+, so that
    E[R] <= alpha (1 + E[R]): E[R] <= alpha / (1 - alpha) = 0.053.
    """
    ledgers = 2000
    kept = keep(np.random.default_rng(21).random((ledgers, IDEAS)), PRODUCT, overlap).sum(1)
    assert kept.mean() - 3 * kept.std() / ledgers ** 0.5 <= ALPHA / (1 - ALPHA)
    assert kept.any(), "a rule that keeps nothing proves nothing"


@pytest.mark.parametrize("looks", [(PAIRS,), LOOKS], ids=["24 pairs", "looks"])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_ideas_of_two_standard_deviations(share, looks):
    true, p = draw(np.random.default_rng(22), 40, share, 2.0, looks=looks)
    kept = keep(p, PRODUCT)
    assert kept[true].mean() >= 0.8
    assert (kept & ~true).sum() / kept.sum() <= ALPHA


def test_p_values_of_the_simulation_are_uniform_or_larger():
    """20,000 p values of one look, within 4 standard errors of a share; those of several looks are no smaller."""
    random = np.random.default_rng(23)
    for looks in ((PAIRS,), LOOKS):
        _, p = draw(random, 100, 0.0, 0.0, looks=looks)
        for level in (0.002, 0.05, 0.5):
            error = (level * (1 - level) / p.size) ** 0.5
            share = (p <= level).mean()
            assert share <= level + 4 * error
            assert share >= level - 4 * error or looks == LOOKS


# The rows of the module's table.
ROWS = {
    "the ledger's rule": PRODUCT,
    "the same, 11 looks a comparison": PRODUCT,
    "without the cap of 0.005": lord(),
    "j^-1.6, no cap": lord(power(1.6)),
    "logarithmic gamma, no cap": lord(logarithms),
    "SAFFRON, j^-1.6": saffron(power(1.6)),
    "SAFFRON, j^-1.3": saffron(),
    "SAFFRON, j^-1.3, cap of 0.005": saffron(cap=CAP),
    "0.01 two-sided for each": same(CAP),
    "Bonferroni, 0.05 / 200": same(ALPHA / IDEAS)}
EFFECTS = (0.7, 1.0, 1.5, 2.0)  # standard deviations of a paired difference
SHARES = (0.1, 0.3, 0.5)        # of ideas that are better


def measure(true, p, rule):
    """
    {name: (value, its standard error)} over ledgers: kept, how many ideas; found, in percent of those that are better;
    false, E[V] / E[max(1, R)] in percent.
    """
    kept = keep(p, rule)
    number = kept.sum(1)
    wrong = (kept & ~true).sum(1)
    better = np.maximum(1, true.sum(1))
    some = np.maximum(1, number)
    rate = wrong.mean() / some.mean()

    # a ratio's error is that of its linear form
    values = dict(kept=number, found=100 * (kept & true).sum(1) / better)
    results = {name: (value.mean(), value.std() / len(p) ** 0.5) for name, value in values.items()}
    error = (wrong - rate * some).std() / len(p) ** 0.5 / some.mean()
    return results | dict(false=(100 * rate, 100 * error))


def measure_rows(ledgers):
    """
    {row: [(value, its standard error)]} of ROWS: ideas kept of 200 without effect, alone and with a shared baseline;
    percent of better ideas found, for each of EFFECTS and then SHARES; percent of the kept that are false where the
    fewest are better by the least, alone and with a shared baseline. `ledgers` of the first and the last two, where
    what is kept by mistake is rare, and a twentieth of the others.
    """
    rows = {}
    mixes = [(0.0, 0.0), *((effect, share) for effect in EFFECTS for share in SHARES)]
    for looks in ((PAIRS,), LOOKS):
        names = [name for name in ROWS if (looks == LOOKS) == ("looks" in name)]
        cells = {}  # (row, shared, effect, share): what measure gives
        for shared in (False, True):
            random = np.random.default_rng(24)
            for effect, share in mixes[:2] if shared else mixes:
                number = ledgers if (effect, share) in mixes[:2] else ledgers // 20
                true, p = draw(random, number, share, effect, shared, looks)
                for name in names:
                    cells[name, shared, effect, share] = measure(true, p, ROWS[name])

        # in the order of the table
        for name in names:
            rows[name] = [*(cells[name, shared, *mixes[0]]["kept"] for shared in (False, True)),
                          *(cells[name, False, *mix]["found"] for mix in mixes[1:]),
                          *(cells[name, shared, *mixes[1]]["false"] for shared in (False, True))]
    return rows


def format_row(name, values):
    """A row of the table."""
    none, none_shared, *found, false, false_shared = [value for value, _ in values]
    groups = [" ".join(f"{value:3.0f}" for value in found[i:i + 3]) for i in range(0, len(found), 3)]
    return (f"    {name:33}{none:6.3f}{none_shared:7.2f}   {'   '.join(groups)}  {false:5.1f}{false_shared:6.1f}")


@pytest.mark.slow
def test_table():
    """Every number of the module's table, within 6 standard errors and what its digits leave out."""
    rows = measure_rows(4000)
    table = "\n".join(format_row(name, values) for name, values in rows.items())
    for name, values in rows.items():
        line = next((line for line in ledger.__doc__.splitlines() if line.strip().startswith(f"{name}  ")), "")
        numbers = line.replace(name, "").split()
        assert len(numbers) == len(values), f"no such row: {name}; measured:\n{table}"
        for number, (value, error) in zip(numbers, values):
            digits = len(number.partition(".")[2])
            assert abs(float(number) - value) <= 6 * error + 0.6 * 10 ** -digits, f"{name}: {number}, now:\n{table}"


# ---- The file

@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def begin(path, plan, arms=("idea",)):
    return open_entry(path, plan, Path("comparisons") / plan, f"compare.py baseline {plan}", list(arms))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_ledger_from_its_first_line_to_its_third_comparison(path):
    first = begin(path, "one", ["a", "b"])
    assert (first.id, first.alpha, first.arm_alpha, first.verdicts) == (1, 0.005, 0.005, None)
    second = begin(path, "two")
    assert second.alpha == pytest.approx(WEALTH * 2 ** -1.3 / 3.93194921180954) == second.arm_alpha / 2
    ended = close_entry(path, 1, dict(a="better", b="undecided"))
    assert ended.rejected and ended.known == 2
    third = begin(path, "three")
    budget = WEALTH * 3 ** -1.3 + (ALPHA - WEALTH)  # r_1 = 2
    assert third.alpha == min(CAP, budget / 3.93194921180954) == CAP

    # as it stands in the file
    header, one, two, end, three = lines_of(path)
    assert header == HEADER == {"format": "knotgpt-ledger-1", "method": "LORD++", "alpha": 0.05}
    assert one["begun"]["command"] == "compare.py baseline one" and one["begun"]["folder"] == "comparisons/one"
    assert [line["begun"]["alpha"] for line in (one, two, three)] == [first.alpha, second.alpha, third.alpha]
    assert end["ended"].pop("when").endswith("Z")
    assert end == {"ended": {"id": 1, "verdicts": {"a": "better", "b": "undecided"}, "rejected": True}}
    assert read_entries(path, path.read_bytes()) == [ended, second, third]


def test_a_plan_has_one_alpha(path):
    first = begin(path, "one")
    begin(path, "two")
    before = path.read_bytes()
    assert begin(path, "one") == first
    assert open_entry(path, "one", "another folder", "another command", ["idea"]) == first
    assert path.read_bytes() == before

    # when it has ended, too
    ended = close_entry(path, 1, dict(idea="worse"))
    assert begin(path, "one") == ended and ended.alpha == first.alpha
    with pytest.raises(RunError, match="comparison 1 has this plan and the arms"):
        begin(path, "one", ["another"])


def test_the_first_verdict_stands(path):
    begin(path, "one")
    ended = close_entry(path, 1, dict(idea="undecided"))
    before = path.read_bytes()
    assert close_entry(path, 1, dict(idea="undecided")) == ended and path.read_bytes() == before
    with pytest.raises(RunError, match="the first verdict stands"):
        close_entry(path, 1, dict(idea="better"))
    assert path.read_bytes() == before


@pytest.mark.parametrize("act, fault", [
    (lambda path: close_entry(path, 2, dict(idea="worse")), "no number 2"),
    (lambda path: close_entry(path, 0, dict(idea="worse")), "no number 0"),
    (lambda path: close_entry(path, 1, dict(other="worse")), "give one for each arm"),
    (lambda path: close_entry(path, 1, dict(idea="two\nlines")), "no ledger holds such a line"),
    (lambda path: begin(path, "two", []), "one or more arms"),
    (lambda path: begin(path, "two", ["a", "a"]), "one or more arms"),
    (lambda path: begin(path, "two\n"), "no ledger holds such a line"),
    (lambda path: begin(path, "two", ["\ud800"]), "no ledger holds such a line"),
    (lambda path: close_entry(path.with_name("none"), 1, dict(idea="worse")), "no such ledger"),
    (lambda path: begin(path.parent, "two"), "no such ledger"),
    (lambda path: begin(path / "below", "two"), "cannot open the ledger"),
    (lambda path: begin(path.with_name("no\0name"), "two"), "cannot open the ledger"),
    (lambda path: describe(path.with_name("none")), "cannot read the ledger"),
])
def test_what_is_refused_changes_nothing(path, act, fault):
    begin(path, "one")
    before = path.read_bytes()
    with pytest.raises(RunError, match=fault) as error:
        act(path)
    assert "\n" not in str(error.value) and path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# ---- Kills, damage, edits

def three_comparisons(path):
    """A ledger of three comparisons: better, open, worse."""
    begin(path, "one")
    close_entry(path, 1, dict(idea="better"))
    begin(path, "two")
    begin(path, "three")
    close_entry(path, 3, dict(idea="worse"))
    return path.read_bytes()


@pytest.mark.parametrize("last", [1, 2, 3, 6], ids=["header", "first begun", "first ended", "last ended"])
def test_a_process_killed_while_it_writes(path, last, monkeypatch):
    """Wherever the line is cut off, the next call finds a sound ledger, and gives every plan what it had."""
    monkeypatch.setattr(ledger.os, "fsync", lambda descriptor: None)  # hundreds of calls
    content = three_comparisons(path)
    lines = content.splitlines(keepends=True)
    entries = read_entries(path, b"".join(lines[:last]))
    before = b"".join(lines[:last - 1])
    end = len(lines[last - 1]) - 1
    for cut in (*range(0, end, 5), end):
        path.write_bytes(before + lines[last - 1][:cut])
        complete = cut == end  # only the end of the line is missing
        known = entries if complete else read_entries(path, before)
        assert read_entries(path, path.read_bytes()) == known
        describe(path)
        assert path.stat().st_size == len(before) + cut

        # what follows is the same as if the line had not been begun
        new = begin(path, "new")
        assert new.id == len(known) + 1 and new.alpha == next_alpha(known)
        assert read_entries(path, path.read_bytes()) == [*known, new]


def test_a_process_killed_with_the_lock_in_its_hands(path):
    begin(path, "one")
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        file = open_locked(path, exists=True)
        file.write(b'{"begun": {"id": 2, "wh')
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(path.read_bytes()) == len(before) + 23
    assert begin(path, "two").id == 2 and path.read_bytes().startswith(before + b'{"begun": {"id": 2, "when": ')


def edit(*changes, line=None):
    """An edit of a ledger's text: (pattern, replacement) once each, in one line (from 1) or anywhere."""
    def change(text):
        lines = text.splitlines(keepends=True)
        some = [line - 1] if line else range(len(lines))
        for pattern, replacement in changes:
            number = next(i for i in some if re.search(pattern, lines[i]))
            lines[number] = re.sub(pattern, replacement, lines[number], count=1)
        return "".join(lines)
    return change


def without(*numbers):
    """An edit that takes lines (from 1) out."""
    return lambda text: "".join(line for i, line in enumerate(text.splitlines(True), 1) if i not in numbers)


@pytest.mark.parametrize("change, fault", [
    (edit(('"alpha": 0.05', '"alpha": 0.5')), "no ledger of this version"),
    (edit(("LORD..", "SAFFRON")), "no ledger of this version"),
    (lambda text: "A log\n", "the fields of line 1 are not a JSON object"),
    (lambda text: "A log", "no ledger, or damaged: it ends with b'A log'"),
    (lambda text: text + "and so on", "no ledger, or damaged"),
    (lambda text: text + '["begun"]', "no ledger, or damaged"),
    (lambda text: text + "\0\0\0", "no ledger, or damaged"),
    (lambda text: text + "\n", "the fields of line 7 are not a JSON object"),
    (lambda text: text[:-30] + "\n", "the fields of line 6 are not a JSON object"),
    (lambda text: text.replace("two", "t\xf6o"), "line 4 has characters that no ledger has"),
    (lambda text: text + "[" * 5000 + "\n", "the fields of line 7 are not a JSON object"),
    (lambda text: text + "[1]\n", "its content must be an object, got"),
    (lambda text: text + "{}\n", "line 7 has the fields 'none', not begun or ended alone"),
    (edit(('"begun"', '"began"'), line=4), "line 4 has the fields 'began', not begun or ended alone"),
    (edit(('"id": 2, ', ""), line=4), "begun.id is missing; restore line 4"),
    (edit(('"id": 2', '"id": true'), line=4), "begun.id must be an integer, got True"),
    (edit((r'\["idea"\]', "[]"), line=2), r"line 2 has the arms \[\], not one or more"),
    (edit((r'\["idea"\]', '["idea", "idea"]'), line=2), "not one or more that differ"),
    (edit(("0.005", "0.0051"), line=2), "begun.alpha"),
    (edit(("0.005", "NaN"), line=2), "NaN|nan"),
    (edit(("0.005", "0.0049"), line=2), "line 2 has alpha 0.0049, the lines before it give 0.005: the ledger was edit"),
    (edit(('"better"', '"worse"'), line=3), "line 3 has rejected True with the verdicts"),
    (edit(('"better"', '"worse"'), ("true", "false"), line=3), "line 4 has alpha 0.005, the lines before it give"),
    (edit(('"idea"', '"other"'), line=3), "verdicts on 'other', the comparison is of 'idea'"),
    (edit(('"id": 3', '"id": 1'), line=6), "line 6 ends comparison 1, which is not open there"),
    (edit(('"id": 3', '"id": 4'), line=6), "line 6 ends comparison 4, which is not open there"),
    (edit(('"plan": "two"', '"plan": "one"'), line=4), "line 4 begins a plan that another line began"),
    (without(1), "no ledger of this version"),
    (without(2), "line 2 ends comparison 1, which is not open there"),
    (without(2, 3), "line 2 begins comparison 2 after 0 others"),
    (without(3), "line 3 has alpha 0.005, the lines before it give"),
    (without(4), "line 4 begins comparison 3 after 1 others"),
    (lambda text: text + text.splitlines()[-1] + "\n", "line 7 ends comparison 3, which is not open there"),
])
def test_an_edited_or_damaged_ledger_is_refused(path, change, fault):
    text = three_comparisons(path).decode()
    edited = change(text)
    assert edited != text
    path.write_text(edited, encoding="utf-8")
    for act in (lambda: begin(path, "two"), lambda: close_entry(path, 2, dict(idea="worse")), lambda: describe(path)):
        with pytest.raises(RunError, match=fault) as error:
            act()
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and "\0" not in str(error.value)
    assert path.read_text(encoding="utf-8") == edited


def test_an_empty_file_is_a_new_ledger(path):
    path.touch()
    assert describe(path)[0].startswith(f"{path}: 0 ideas in 0 comparisons, 0 kept")
    assert begin(path, "one").id == 1 and lines_of(path)[0] == HEADER


def test_the_last_digits_of_another_machine_are_no_edit(path):
    begin(path, "one")
    second = begin(path, "two")
    other = np.nextafter(second.alpha, 1)
    path.write_text(path.read_text().replace(repr(second.alpha), repr(float(other))))
    assert begin(path, "two").alpha == other != second.alpha


def test_an_alpha_is_on_the_disk_before_its_comparison_begins(path, monkeypatch):
    """The lines and, of a new ledger, its name in the folder."""
    synced = []
    monkeypatch.setattr(ledger.os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_ino,
                                                                              len(path.read_bytes().splitlines()))))
    begin(path, "one")
    assert synced == [(path.stat().st_ino, 2), (path.parent.stat().st_ino, 2)]
    begin(path, "two")
    close_entry(path, 1, dict(idea="worse"))
    assert synced[2:] == [(path.stat().st_ino, 3), (path.stat().st_ino, 4)]


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_a_full_disk_leaves_the_ledger_as_it_was(path, monkeypatch, name):
    """The disk takes half of the lines, or takes them all and cannot keep them."""
    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            self.file.close()

        def write(self, text):
            return self.file.write(text[:len(text) // 2])

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    before = three_comparisons(path)
    if name == "write":
        monkeypatch.setattr(ledger, "open_locked", lambda path, exists: Full(open_locked(path, exists)))
    else:
        monkeypatch.setattr(ledger.os, "fsync", refuse)
    for act in (lambda: begin(path, "new"), lambda: close_entry(path, 2, dict(idea="worse"))):
        with pytest.raises(RunError, match="cannot write the ledger .*No space left on device"):
            act()
        assert path.read_bytes() == before


# ---- Several processes

def work(path, name, barrier):
    """One of several agents: five ideas, every second one better, and one that all of them try."""
    barrier.wait()
    begin(path, "of all")
    for number in range(5):
        entry = begin(path, f"{name}-{number}")
        word = "undecided"
        if number % 2:
            word = "better"
        close_entry(path, entry.id, dict(idea=word))


def test_several_processes_at_once(path):
    """
    No line is lost or torn, no id or plan is there twice, and every alpha follows from the lines before it, which
    read_entries checks.
    """
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=work, args=(path, name, barrier)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4

    entries = read_entries(path, path.read_bytes())
    assert [entry.id for entry in entries] == list(range(1, 22))
    assert {entry.plan for entry in entries} == {"of all", *(f"{name}-{n}" for name in "abcd" for n in range(5))}
    assert sum(entry.rejected for entry in entries) == 8 and sum(entry.verdicts is None for entry in entries) == 1


def test_a_lock_is_waited_for_and_given_up(path, monkeypatch):
    monkeypatch.setattr(ledger, "ATTEMPTS", 3)
    monkeypatch.setattr(ledger, "PAUSE", 0.001)
    begin(path, "one")
    held = open_locked(path, exists=True)
    with pytest.raises(RunError, match="other processes hold the ledger's lock"):
        begin(path, "two")
    assert len(describe(path)) == 3  # reads without the lock
    monkeypatch.setattr(ledger.time, "sleep", lambda seconds: held.close())
    assert begin(path, "two").id == 2


def test_a_file_that_took_the_ledgers_place(path, monkeypatch):
    """An editor saves by renaming: what was locked is no longer the ledger."""
    begin(path, "one")
    held = open_locked(path, exists=True)

    def save(seconds):
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        os.replace(copy, path)
        held.close()

    monkeypatch.setattr(ledger.time, "sleep", save)
    file = open(path, "rb")
    assert begin(path, "two").id == 2 and len(lines_of(path)) == 3
    assert not ledger.lock(path, file)


def test_systems_without_locks(path, monkeypatch):
    def refuse(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(ledger.fcntl, "flock", refuse)
    with pytest.raises(RunError, match="cannot lock the ledger .*: Operation not supported; choose a file on another"):
        begin(path, "one")
    monkeypatch.setattr(ledger, "fcntl", None)
    with pytest.raises(RunError, match="a ledger cannot be locked on this system"):
        begin(path, "one")


# ---- For people

def test_description(path):
    three_comparisons(path)
    first, kept, opened, last = describe(path)
    assert first == (f"{path}: 3 ideas in 3 comparisons, 1 kept; of what is kept, at most 5 % is expected to be false")
    assert kept == "kept: idea (comparison 1, alpha 0.005, comparisons/one)"
    assert re.fullmatch(r"open: comparison 2 of idea \(alpha 0.005, since \d{4}-.*Z, comparisons/two\)", opened)
    alpha = next_alpha(read_entries(path, path.read_bytes()))
    assert last == f'the next comparison has alpha {alpha:.2g} for "better", {2 * alpha:.2g} two-sided'


def test_command(path, capsys):
    three_comparisons(path)
    assert ledger.main([str(path)]) == 0 and capsys.readouterr() == ("\n".join(describe(path)) + "\n", "")
    path.write_text("A log\n")
    assert ledger.main([str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"records.ledger: error: {path}: damaged: ") and err.count("\n") == 1
