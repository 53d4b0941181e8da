"""
Results of comparisons against numbers worked out by hand, and the report's files as a reader and a browser get them.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from statistics import mean, stdev

import numpy as np
import pytest
from scipy import stats

from records.pictures import COLORS, LATE
from records.report import TEMPLATE, console_table, markdown, page, write_report
from records.results import ORDER, START, VALIDATION, mean_curve, outcome_of, summarize
from records.runs import read_run
from records.verdicts import RULE
from train_gpt import RunError

BASE = [0.8000, 0.8100, 0.8200, 0.8050, 0.8150, 0.8100]
GOOD = [0.6000, 0.6100, 0.6300, 0.6020, 0.6200, 0.6180]     # by 0.19 to 0.203
BAD = [0.9500, 0.9600, 0.9800, 0.9550, 0.9620, 0.9630]      # by 0.147 to 0.16
SAME = [0.8000, 0.8200, 0.8100, 0.8050, 0.8120, 0.8190]     # by -0.01 to 0.01, 0.001 in the mean
EVEN = [0.8004, 0.8097, 0.8202, 0.8046, 0.8151, 0.8106]     # by -0.0004 to 0.0006, 0.0001 in the mean
HOSTILE = [
    "</script><script>alert(1)</script>",
    "a|b `c` *d* <img src=http://x.invalid/y.png onerror=alert(2)>",
    "_$\\frac{$",
    "two\nlines\u202e",
    "<!--DATA-->",
    "&amp;",
]
SETTINGS = dict(
    rule=RULE,
    alpha=0.01,
    margin=0.004,
    design=None,
    track="cpu",
    seeds=[1, 2, 3, 4, 5, 6],
    budget="tokens",
    budget_seconds=0,
    target=0,
    command="compare.py baseline good --seeds 6",
    tried=5,
    sweep=None,
    order=[["baseline", 1], ["good", 1]],
    overhead=dict(wall_seconds=100.0, runs_seconds=90.0),
)
# Of an arm, of at most six pairs.
DESIGN = dict(looks=[4, 5, 6], levels=[0.002, 0.001, 0.0012], levels_equivalence=[0.002, 0.001, 0.0012],
              levels_interval=[0.03, 0.02, 0.02])


@pytest.fixture
def make_arm(write_log):
    """
    make_arm(name, final losses of seeds first, first + 1, ..., more runs, **as write_log takes it) -> an arm of
    summarize().
    """

    def make(name, finals, more=(), middle=1.0, ms=(100.0, 101.0, 102.0), variant=(), first=1, **facts):
        folder = re.sub(r"\W", "", name) or "arm"
        runs = []
        for seed, (final, time) in enumerate(zip(finals, ms * 9), first):
            log = write_log({0: 5.0, 4: middle, 8: final}, folder=folder, run_id=f"{folder}-{seed}", seed=seed,
                            ms_per_step=time, variant=list(variant), **facts)
            runs.append(read_run(log))
        return dict(name=name, variant=list(variant), options=[], runs=[*runs, *more])

    return make


@pytest.fixture
def results(make_arm):
    good = make_arm("good", GOOD, ms=(110.0, 111.0, 112.5), variant=["swiglu_mlp"], replaced={"swiglu_mlp": ["MLP"]},
                    parameters=1100, modules=[("variants.swiglu_mlp", "class MLP: pass")])
    bad = make_arm("bad", BAD, ms=(90.0, 91.0, 92.5))
    return summarize(SETTINGS, [make_arm("baseline", BASE), good, bad, make_arm("same", SAME), make_arm("even", EVEN)])


def words_of(results: dict) -> str:
    """README.md without the marks that keep Markdown from reading names."""
    return re.sub(r"\\(.)", r"\1", markdown(results))


def paired(losses: list[float], baseline: list[float] = BASE):
    """SciPy's t test of the pairs, and the ends of its 95 % interval."""
    test = stats.ttest_rel(losses, baseline)
    return test, test.confidence_interval(0.95)


def test_against_scipy(results):
    base, good, bad, same, even = results["arms"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results and results["format"] == "knotgpt-comparison-2"
    assert base["vs_baseline"] is None
    assert base["status"] == "complete"
    assert base["loss"]["mean"] == pytest.approx(0.81)
    assert base["loss"]["sd"] == pytest.approx(stdev(BASE))

    # losses; the smallest of four p values times 4, the next times 3, and none below the one before
    p = [paired(losses)[0].pvalue for losses in (GOOD, BAD, EVEN, SAME)]
    assert p[0] < p[1] < p[2] < p[3] and 2 * p[2] > 1
    adjusted = [4 * p[0], 3 * p[1], 1.0, 1.0]
    for arm, losses, expected, verdict in zip(
            (good, bad, even, same), (GOOD, BAD, EVEN, SAME), adjusted, ("better", "worse", "equivalent", "undecided")):
        loss = arm["vs_baseline"]["loss"]
        ends = paired(losses)[1]
        assert (loss["test"], loss["n"], loss["margin"], loss["look"]) == ("pairs", 6, 0.004, None)
        assert loss["difference"] == pytest.approx(mean(losses) - mean(BASE), abs=1e-12)
        assert (loss["low"], loss["high"]) == pytest.approx((ends.low, ends.high))
        assert loss["p_holm"] == pytest.approx(expected)
        assert loss["verdict"] == verdict
        assert loss["welch"]["p"] == pytest.approx(stats.ttest_ind(losses, BASE, equal_var=False).pvalue)

        # found in four of five cases at the strictest level: the power of a t test, by the noncentral t distribution
        shift = loss["detectable"] / stdev(np.subtract(losses, BASE)) * 6 ** 0.5
        assert stats.nct.sf(stats.t.isf(0.01 / 4 / 2, 5), 5, shift) == pytest.approx(0.8, abs=1e-6)

    # times
    ratios = [np.log(np.array(ms) / (100, 101, 102)) for ms in ((110.0, 111.0, 112.5), (90.0, 91.0, 92.5))]
    for arm, logarithms, verdict in zip((good, bad), ratios, ("worse", "better")):
        time = arm["vs_baseline"]["time"]
        assert time["ratio"] == pytest.approx(np.exp(logarithms.mean())) and time["verdict"] == verdict
        assert time["p"] == pytest.approx(stats.ttest_1samp([*logarithms] * 2, 0.0).pvalue, rel=1e-6)
        assert (time["n"], time["left_out"]) == (6, [])
    assert good["vs_baseline"]["time"]["p_holm"] == pytest.approx(4 * good["vs_baseline"]["time"]["p"])
    assert same["vs_baseline"]["time"]["p"] == 1 and same["vs_baseline"]["time"]["verdict"] == "equivalent"

    # what an arm is and what it cost
    assert good["tokens"] == 8 * 2048 and good["steps"] == 8 and good["training_flops"] == 8 * 2048 * 6000
    assert good["replaced"] == {"swiglu_mlp": ["MLP"]} and good["changed"] == {}
    assert good["mfu"]["mean"] == pytest.approx(0.265)
    assert good["warmup_seconds"]["mean"] == 1.2
    assert good["peak_memory_mib"]["mean"] == 661
    assert good["runs"][1] == dict(
        seed=2,
        status="finished",
        log="good-2.txt",
        val_loss=0.61,
        train_seconds=0.888,
        curve=[[0, 0, 0.0, 5.0], [4, 8192, 0.444, 1.0], [8, 16384, 0.888, 0.61]],
    )
    assert results["environment"]["torch"] == "2.13.0+cpu" and results["environment_differs"] == {}


def test_way_to_the_target(make_arm):
    base = make_arm("baseline", BASE)
    good, bad = make_arm("good", [0.6, 0.7, 0.92], middle=1.0), make_arm("bad", BAD[:3])
    goals = [arm["to_target"] for arm in summarize(SETTINGS | dict(target=0.9), [base, good, bad])["arms"]]
    assert goals[1]["reached"] == "2 of 3"
    assert goals[1]["steps_each"] == [pytest.approx(5), pytest.approx(4 + 4 / 3), None]
    assert goals[1]["steps"] == pytest.approx(4 + 4 * 0.1 / 0.26)  # the mean curve goes from 1 to 0.74
    assert goals[1]["seconds"] == pytest.approx(0.404 + 0.404 * 0.1 / 0.26)
    assert goals[1]["seconds_each"][0] == pytest.approx(0.5)
    assert goals[2] == dict(
        target=0.9, reached="0 of 3", steps=None, seconds=None, steps_each=[None] * 3, seconds_each=[None] * 3
    )
    own = summarize(SETTINGS, [base, bad])["arms"][0]["to_target"]
    assert own["target"] == pytest.approx(mean(BASE))
    assert own["steps"] == 8
    assert own["seconds"] == pytest.approx(0.808)  # the baseline's mean reaches its own end


def test_runs_of_equal_time(write_log, tmp_path):
    assert mean_curve([]) == []
    short, long = (
        [[0, None, 0.0, 5.0], [4, None, 2.0, 2.0], [9, None, 4.0, 1.0]],
        [[0, None, 0.0, 7.0], [4, None, 2.5, 3.0], [9, None, 4.0, 2.0], [11, None, 5.0, 1.5]],
    )
    assert mean_curve([short, long]) == [[0, None, 0, 6], [4, None, 2.25, 2.5], [10, None, 4.5, 1.25]]
    runs = [
        read_run(write_log({0: 5.0, 4: 1.0, last: loss}, run_id=f"r{last}", seed=last, time_budget=1.0))
        for last, loss in ((8, 0.8), (10, 0.9))
    ]
    settings = SETTINGS | dict(budget="time", budget_seconds=1.0)
    results = summarize(settings, [dict(name="baseline", variant=[], options=[], runs=runs)])
    arm = results["arms"][0]
    assert arm["steps"]["mean"] == 9
    assert arm["tokens"]["min"] == 8 * 2048
    assert arm["training_flops"] == 9 * 2048 * 6000
    assert arm["curve"][-1][3] == pytest.approx(0.85)
    write_report(tmp_path / "report", results)
    text = (tmp_path / "report/README.md").read_text()
    assert text.startswith("# baseline at equal time\n")
    assert "1.0 s of training time for every run" in text
    assert "9 ± 1" in text


def edit_facts(log, **facts):
    """Change what the header and the JSON of a log say."""
    lines = log.read_text().split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("facts: "))
    lines[at] = f"facts: {json.dumps(json.loads(lines[at][7:]) | facts)}"
    log.write_text("\n".join(lines))
    log.with_suffix(".json").write_text(json.dumps(json.loads(log.with_suffix(".json").read_text()) | facts))


@pytest.mark.parametrize(
    "difference, named",
    [
        (dict(source="import another"), "different code"),
        (dict(modules=[("variants.x", "x = 1")]), "different code"),
        (dict(layers=5), "differ in layers"),
        (dict(seed=1), "with seed 1"),
        (dict(val_sha256={"v.bin": "c" * 64}), "different data"),
        (dict(scored=64), "baseline-1.txt was scored on .* tokens, .*odd.txt on 64"),
    ],
)
def test_runs_that_cannot_be_compared(write_log, make_arm, difference, named):
    scored = {"val_tokens": difference["scored"]} if "scored" in difference else {}
    options = dict(seed=2) | {name: value for name, value in difference.items() if name != "scored"}
    log = write_log({0: 5.0, 4: 1.0, 8: 0.7}, run_id="odd", **options)
    arm = make_arm("good", [0.7])
    edit_facts(log, **scored)
    with pytest.raises(RunError) as error:
        summarize(SETTINGS, [make_arm("baseline", BASE), arm | dict(runs=[*arm["runs"], read_run(log)])])
    first = "good" if "seed" in difference else "good-1.txt"
    if difference.keys() & {"val_sha256", "scored"}:
        first = "baseline-1.txt"
    text = str(error.value)
    assert re.search(named, text) and "odd.txt" in text and first in text and "\n" not in text


def test_runs_that_did_not_finish(write_log, make_arm, tmp_path):
    stopped = read_run(write_log({0: 5.0, 4: 1.0}, run_id="stopped", seed=7, steps=8, last_step=6, end="SIGTERM"))
    lost = dict(seed=8, error="no log: <killed>")
    arms = [
        make_arm("baseline", BASE),
        make_arm("good", GOOD, more=[stopped, lost]),
        make_arm("one", [0.6]),
        make_arm("none", [], more=[lost]),
    ]
    results = summarize(SETTINGS, arms)
    _, good, one, none = results["arms"]
    assert good["status"] == "6 of 8 finished"
    assert good["errors"] == ["seed 7: stopped by SIGTERM", "seed 8: no log: <killed>"]
    assert good["loss"]["n"] == 6
    assert good["runs"][6]["curve"][-1][0] == 4 and good["runs"][6]["val_loss"] is None and good["runs"][7] == lost
    loss = one["vs_baseline"]["loss"]
    assert loss["p_holm"] is None and loss["detectable"] is None and loss["verdict"] == "too few pairs"
    assert good["vs_baseline"]["loss"]["n"] == 6 and good["vs_baseline"]["loss"]["verdict"] == "better"
    assert good["vs_baseline"]["loss"]["p_holm"] == good["vs_baseline"]["loss"]["p"]  # the only arm that was tested
    assert none["vs_baseline"] is None and none["loss"] is None and none["curve"] == []
    write_report(tmp_path / "report", results)
    text = (tmp_path / "report/README.md").read_text()
    for words in (
        "- one against baseline: too few pairs for a verdict, 5 are needed; difference -0.2000 nats (1 pair), time too "
        "few turns (+0.0 %). Parameters equal, FLOPs a token equal.",
        "- none: no verdict, because none has",
        "good, seed 7: stopped by SIGTERM",
        "none, seed 8: no log: \\<killed>",
        "| 6 of 8 |",
        "| none | - | - | 0 of 1 |",
    ):
        assert words in text
    assert not re.search(r"\bnan\b|None", text + (tmp_path / "report/report.html").read_text().split("<script")[0])
    alone = summarize(SETTINGS, [make_arm("baseline", [], more=[lost]), arms[1]])
    assert alone["arms"][1]["vs_baseline"] is None and alone["arms"][1]["to_target"]["target"] is None
    write_report(tmp_path / "alone", alone)
    assert "good: no verdict, because baseline has no finished run" in (tmp_path / "alone/README.md").read_text()


def test_words(results, tmp_path):
    write_report(tmp_path / "report", results)
    text = (tmp_path / "report/README.md").read_text()
    assert text.startswith("# 4 arms against baseline at equal tokens\n")

    # the verdicts; of a size where they are one, with the p value that they rest on, over four arms
    good, bad, same = (paired(losses)[1] for losses in (GOOD, BAD, SAME))
    differences = np.subtract(EVEN, BASE)
    even = paired(EVEN)[1]
    sides = [stats.ttest_1samp(differences, side * 0.004, alternative=word).pvalue
             for side, word in ((1, "less"), (-1, "greater"))]
    assert 4 * max(sides) < 1e-4 and 3 * paired(BAD)[0].pvalue < 1e-4
    detectable = results["arms"][3]["vs_baseline"]["loss"]["detectable"]
    plain = re.sub(r"\\(.)", r"\1", text)
    for line in (
        f"- good is better than baseline by 0.1967 nats (95 % {-good.high:.4f} to {-good.low:.4f}, 6 pairs, "
        "p < 0.0001), 10.1 % slower. Parameters unmatched (+10.00 %), FLOPs a token equal.",
        f"- bad is worse than baseline by 0.1517 nats (95 % {bad.low:.4f} to {bad.high:.4f}, 6 pairs, p < 0.0001), "
        "9.7 % faster. Parameters equal, FLOPs a token equal.",
        f"- same against baseline: undecided, difference +0.0010 nats (95 % {same.low:+.4f} to {same.high:+.4f}, 6 "
        f"pairs, p 1.00); 6 pairs find {detectable:.4f} nats in four of five cases, equally fast within 2 % (+0.0 %). "
        "Parameters equal, FLOPs a token equal.",
        f"- even is equivalent to baseline within 0.004 nats, difference +0.0001 nats (95 % {even.low:+.4f} to "
        f"{even.high:+.4f}, 6 pairs, p < 0.0001), equally fast within 2 % (+0.0 %). Parameters equal, FLOPs a token "
        "equal.",
    ):
        assert line in plain, line

    # all else
    gain = (stdev(GOOD) ** 2 + stdev(BASE) ** 2) / stdev(np.subtract(GOOD, BASE)) ** 2
    for words in (
        "To the target, a loss of 0.8100",
        "| 0.8100 ± 0.0071 |",
        "baseline 1, good 1.",
        "excludes compilation and warm-up, validation and checkpoints",
        "Measured noise: sd 0.0071 of the final loss over 6 runs",
        "Arms tried: 5.",
        "variant swiglu_mlp; replaces MLP",
        "bbbb",
        "took 100.0 s, 90.0 s of it",
        "Command: compare.py baseline good --seeds 6",
        "After Holm's correction over 4 arms, p < 0.01 is better or worse; with fewer than 5 pairs there is no",
        "reject a difference of 0.004 nats or more to either side. All else is undecided.",
        f"good: pairs divide the variance of the difference by {gain:.3g}.",
        "No learning rate was tuned",
        "not reached",
        "(curves.png)",
    ):
        assert words in plain, words
    page = unescape((tmp_path / "report/report.html").read_text())
    for line in re.findall(r"^- (.*)", text, re.M):
        assert re.sub(r"\\(.)", r"\1", line) in page  # both say the same


def test_words_of_other_tests(make_arm):
    """Seeds that no other arm has, a difference below the margin, four pairs, and no margin at all."""
    tiny = [round(loss + shift, 4) for loss, shift in zip(BASE, (0.0020, 0.0021, 0.0019, 0.0020, 0.0022, 0.0018))]
    arms = [make_arm("baseline", BASE), make_arm("apart", GOOD, first=11), make_arm("tiny", tiny),
            make_arm("few", [*GOOD[:3], 0.6021])]
    results = summarize(SETTINGS, arms)
    text = words_of(results)
    apart = stats.ttest_ind(GOOD, BASE, equal_var=False).confidence_interval(0.95)
    ends = paired(tiny)[1]
    few = paired([*GOOD[:3], 0.6021], BASE[:4])[1]
    for words in (
        f"- apart is better than baseline by 0.1967 nats (95 % {-apart.high:.4f} to {-apart.low:.4f}, 6 runs a side, "
        "Welch, p < 0.0001), equally fast",
        f"- tiny is worse than baseline by 0.0020 nats (95 % {ends.low:.4f} to {ends.high:.4f}, 6 pairs, p < 0.0001), "
        "which is less than the margin of 0.004, equally fast",
        "- few against baseline: too few pairs for a verdict, 5 are needed; difference -0.1982 nats "
        f"(95 % {few.low:+.4f} to {few.high:+.4f}, 4 pairs, p ",
        "| none, Welch |",
        "in common",
    ):
        assert words in text, words
    table = console_table(results).split("\n")
    assert table[0].split() == ["arm", "verdict", "final", "loss", "runs", "difference", "95", "%", "ms/step"]
    assert re.match(r"few +too few pairs +0\.6105 ± 0\.0137 +4 of 4 +-0\.1982 ", table[4])

    text = words_of(summarize(SETTINGS | dict(margin=None), arms[:3]))
    assert "Equivalence was not tested: no margin was given" in text and "which is less than" not in text


def test_a_comparison_until_it_is_decided(make_arm):
    """What each look said, repeated intervals, and the arms that ended earlier than the baseline."""
    clear = [loss - shift for loss, shift in zip(BASE, (0.0201, 0.0199, 0.0200, 0.0202))]
    hopeless = [loss + shift for loss, shift in zip(BASE, (0.0100, -0.0100, 0.0106, -0.0098))]
    almost = [loss - shift for loss, shift in zip(BASE, (0.0270, 0.0120, 0.0200, 0.0270, 0.0120))]
    arms = [make_arm("baseline", BASE), make_arm("clear", clear), make_arm("hopeless", hopeless),
            make_arm("almost", almost), make_arm("new", GOOD[:2])]
    text = words_of(summarize(SETTINGS | dict(design=DESIGN, margin=None), arms))
    differences = np.subtract(clear, BASE[:4])
    half = stats.t.isf(0.03 / 2, 3) * differences.std(ddof=1) / 2
    low, high = -differences.mean() - half, -differences.mean() + half
    for words in (
        f"- clear is better than baseline by 0.0200 nats (95 % {low:.4f} to {high:.4f}, 4 pairs, p < 0.0001), ",
        "- hopeless against baseline: undecided, difference +0.0002 nats (95 % ",
        "- almost against baseline: undecided, ",
        "- new against baseline: undecided, difference -0.2000 nats (2 pairs, p ",
        "Until decided: looks after 4, 5, 6 pairs. The error of 0.01 is divided by 4 arms and spent linearly over the "
        "looks; the level of p at each look: 4: 0.0020, 5: 0.0010, 6: 0.0012.",
        "clear: better after 4 pairs.",
        "hopeless: ended after 4 pairs, because a verdict within 6 had become unlikely.",
        "almost: not decided after 5 pairs; the comparison goes on.",
        "new: not yet looked at.",
    ):
        assert words in text, words
    assert "Holm's correction" not in text and "Equivalent:" not in text
    text = words_of(summarize(SETTINGS | dict(design=DESIGN), arms))
    assert "Equivalent: at the same looks, with spending of its own" in text


def test_the_outcome_for_scripts(results, make_arm):
    """One object: the first arm's verdict, those of all arms, and how many runs there were."""
    outcome = outcome_of(results)
    assert json.loads(json.dumps(outcome, allow_nan=False)) == outcome
    ends = paired(GOOD)[1]
    assert (outcome["verdict"], outcome["pairs"], outcome["runs"], outcome["sound"]) == ("better", 6, 30, True)
    assert outcome["difference"] == pytest.approx(mean(GOOD) - mean(BASE))
    assert outcome["interval"] == pytest.approx([ends.low, ends.high])
    assert outcome["p"] == pytest.approx(4 * paired(GOOD)[0].pvalue)
    assert (outcome["alpha"], outcome["margin"], outcome["baseline"]) == (0.01, 0.004, "baseline")
    assert (outcome["time"]["verdict"], outcome["time"]["turns"]) == ("worse", 6)
    assert [(arm["arm"], arm["verdict"]) for arm in outcome["arms"]] == [
        ("good", "better"), ("bad", "worse"), ("same", "undecided"), ("even", "equivalent")]

    # an arm that has none, one with no common seed and one that is not sound
    lost = make_arm("lost", [], more=[dict(seed=1, error="killed")])
    apart = make_arm("apart", GOOD, first=11) | dict(faults=["sees the future"])
    outcome = outcome_of(summarize(SETTINGS, [make_arm("plain", BASE), lost, apart]))
    assert (outcome["verdict"], outcome["difference"], outcome["interval"], outcome["time"]) == (None,) * 4
    assert (outcome["pairs"], outcome["runs"]) == (0, 12)
    assert (outcome["arms"][1]["verdict"], outcome["arms"][1]["pairs"], outcome["arms"][1]["sound"]) == (
        "better", 0, False)


def test_a_rule_of_a_later_version(make_arm):
    with pytest.raises(RunError, match="follow the rule of '2031-01-01', which this version does not know"):
        summarize(SETTINGS | dict(rule="2031-01-01"), [make_arm("baseline", BASE), make_arm("good", GOOD)])


def test_what_was_not_held_fixed(make_arm):
    sweep = {
        "deep": dict(
            tries=[dict(factor=0.5, seeds=[1], losses=[0.9]), dict(factor=2, seeds=[1], losses=[None])], chosen=0.5
        )
    }
    deep, patched = (
        make_arm("deep", GOOD, layers=6, device="another card"),
        make_arm("patched", SAME, source="import other", flops_per_token=9000),
    )
    results = summarize(
        SETTINGS | dict(sweep=sweep, tried=9),
        [make_arm("baseline", BASE), deep | dict(options=["--layers", "6"]), patched],
    )
    assert [(arm["changed"], arm["changed_code"]) for arm in results["arms"]] == [
        ({}, []),
        ({"layers": [4, 6]}, []),
        ({}, ["train_gpt"]),
    ]
    assert results["environment_differs"] == {"device": ["x86_64, 2 threads", "another card"]}
    text = markdown(results)
    for words in (
        "deep: options --layers 6; layers 6 instead of 4.",
        "FLOPs a token unmatched (+50.00 %)",
        f"patched: other code of train_gpt; NOT HELD FIXED: {VALIDATION} (other code of train_gpt); NOT HELD",
        "device (x86_64, 2 threads; another card). Their times are not comparable.",
        "Arms tried: 9, 3 of them in this report",
        "deep: learning-rate factor 0.5, chosen of 0.5 (loss 0.9000, n = 1), 2 (loss -, n = 0).",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    "facts, held, broken",
    [
        (dict(replaced={"x": ["MLP", "GPT.run_blocks", "build_optimizers"]}), [VALIDATION, ORDER, START], ""),
        (
            dict(replaced={"x": ["Trainer.validate"]}),
            [],
            f"{VALIDATION} (Trainer.validate); NOT HELD FIXED: the order",
        ),
        (dict(replaced={"x": ["TokenLoader"]}), [], f"{ORDER} (TokenLoader)"),
        (dict(replaced={"x": ["GPT.initialize"]}), [VALIDATION, ORDER], f"{START} (GPT.initialize)"),
        (dict(sequence_length=128), [VALIDATION, START], f"{ORDER} (sequence_length)"),
        (dict(train_data="other"), [VALIDATION, START], f"{ORDER} (other training data)"),
        (
            dict(init_from="a.pt", zero_init_projections=False),
            [VALIDATION, ORDER],
            f"{START} (zero_init_projections, init_from)",
        ),
    ],
)
def test_nothing_is_called_fixed_that_an_arm_changed(make_arm, facts, held, broken):
    results = summarize(SETTINGS, [make_arm("baseline", BASE), make_arm("good", GOOD, **facts)])
    text = unescape(page(results))
    line = re.search(r"<li>Held fixed: every setting of the trainer that is not named here(.*?)\.</li>", text)[1]
    assert [claim for claim in (VALIDATION, ORDER, START) if claim in line] == held
    assert ("NOT HELD FIXED: " + broken in text) if broken else "NOT HELD" not in text


def test_a_target_of_other_data_is_none(make_arm):
    arms = [make_arm("baseline", BASE), make_arm("good", GOOD)]
    assert summarize(SETTINGS | dict(target=0.5), arms)["arms"][0]["to_target"]["target"] == 0.5
    for run in arms[0]["runs"]:
        edit_facts(run.path, target=0)
    arms[0]["runs"] = [read_run(run.path) for run in arms[0]["runs"]]
    results = summarize(SETTINGS | dict(target=0.5), arms)
    goal = results["arms"][1]["to_target"]
    assert goal["target"] == pytest.approx(0.81) and goal["reached"] == "6 of 6" and 5 < goal["steps"] < 7
    text = markdown(results)
    assert "the mean final loss of baseline: 0.5, the track's, was set for other validation data" in text
    assert "not reached" not in text.split("| good |")[-1]


def test_runs_of_other_comparisons(make_arm):
    def entry(arm, seed, *seen):
        return dict(arm=arm, seed=seed, log=f"comparisons/a/logs/A0-{arm}-seed{seed}.txt", seen=list(seen))

    arms = [make_arm("baseline", BASE), make_arm("good", GOOD, ms=(110.0, 111.0, 112.5))]
    results = summarize(SETTINGS | dict(reused=[entry("baseline", seed) for seed in range(1, 7)]), arms)
    base, good = results["arms"]
    assert base["ms_per_step"] is None and base["loss"]["n"] == 6 and good["ms_per_step"]["n"] == 6
    assert good["vs_baseline"]["time"]["ratio"] is None and good["vs_baseline"]["loss"]["verdict"] == "better"
    text = markdown(results)
    for words in (
        "- 6 of the 12 runs were taken over from earlier comparisons; their times are not compared.",
        "p < 0.0001), times not compared. Parameters equal",
        "baseline 1 (comparisons/a/logs/A0-baseline-seed1.txt), baseline 2",
        "Only runs of baseline were taken over",
    ):
        assert words in text, words
    assert "Looks" not in text and "slower" not in text
    reused = [entry("baseline", 1, "a", "b"), entry("good", 1, "a"), entry("good", 2, "c")]
    looked = summarize(SETTINGS | dict(reused=reused), arms)
    time = looked["arms"][1]["vs_baseline"]["time"]
    logarithms = np.log([112.5 / 102, 110 / 100, 111 / 101, 112.5 / 102])  # seeds 3 to 6
    assert time["ratio"] == pytest.approx(np.exp(logarithms.mean()))
    assert (time["n"], time["verdict"]) == (4, "too few pairs")
    text = markdown(looked)
    assert "Looks: 2 earlier comparisons" in text
    assert "one of 3 verdicts finds a difference where there is none happens in up to 3 %" in text
    assert "3 of the 12 runs were taken over from earlier comparisons, whose results had been seen" in text
    assert "time too few turns (+10.1 %)" in text
    reason = "a run was taken over and did not take its turn"
    assert f"good, times left out: seed 1: {reason}; seed 2: {reason}." in text


def test_an_unsound_arm_says_so_first(make_arm):
    good = make_arm("good", GOOD) | dict(faults=["position 3 sees position 4"])
    results = summarize(SETTINGS, [make_arm("baseline", BASE), good])
    first, _, rest = markdown(results).partition("![")
    assert "- good IS NOT SOUND, so this says nothing: position 3 sees position 4." in first
    assert "NOT SOUND: position 3" in rest
    assert '<p class="card ">good IS NOT SOUND' in page(results)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.cells, self.scripts = [], None, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "td":
            self.cells.append((dict(attributes)["class"], ""))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append((self.tags[-1][1], data))
            self.tags.append(("", {}))
        elif self.cells and self.tags[-1][0] == "span":
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data)


def test_page_is_one_file_that_loads_nothing(results, tmp_path):
    write_report(tmp_path / "report", results)
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == [
        "README.md",
        "curves.png",
        "report.html",
        "results.json",
    ]
    assert json.loads((tmp_path / "report/results.json").read_text()) == results
    text = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(
        r"https?:|@import|url\((?!#)|\b(fetch|XMLHttpRequest|import)\b",
        text.replace("http://www.w3.org/2000/svg", ""),
    )
    assert "default-src 'none'" in next(
        attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes
    )
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "srcset", "action", "data"}
        assert (attributes.get("href") or "data:,") == "data:,"
    assert not re.search(r"<!--[A-Z]+-->", text)
    data, program = page.scripts
    assert data[0] == {"type": "application/json", "id": "data"} and not program[0]
    embedded = json.loads(data[1])
    assert embedded["results"] == results
    assert embedded["names"] == ["baseline", "good", "bad", "same", "even"]
    assert embedded["late"] == LATE
    assert embedded["axes"] == [["training tokens", 1], ["training time, s", 2]]
    for name in re.findall(r'getElementById\("(\w+)"\)', program[1]):
        assert any(attributes.get("id") == name for _, attributes in page.tags)
    verdicts = [cell for cell in page.cells if cell[0].startswith("verdict")]
    losses = ["baseline", "better", "worse", "undecided", "equivalent"]
    costs = ["baseline", "slower", "faster", *["equally fast within 2 %"] * 2]
    assert verdicts == [(f"verdict {word.split()[0]}", word) for word in losses + costs]
    cards = [attributes["class"] for tag, attributes in page.tags if attributes.get("class", "").startswith("card")]
    assert cards == ["card better", "card worse", "card undecided", "card equivalent"]
    styles = TEMPLATE.read_text().split("</style>")[0]
    assert "prefers-color-scheme: dark" in styles
    words = ("better", "worse", "equivalent", "faster", "slower", "equally")
    assert all(f".{word} span" in styles for word in words)


def test_hostile_names(make_arm, tmp_path):
    arms = [
        make_arm(f"arm{i}", BASE[:2]) | dict(name=name, variant=[name], options=[name])
        for i, name in enumerate(["<u>baseline</u>", *HOSTILE, *"abcdefgh"])
    ]
    arms[1]["runs"].append(dict(seed=9, error=HOSTILE[0]))
    write_report(
        tmp_path / "plain",
        summarize(SETTINGS, [arm | dict(name="p", variant=[], options=[], runs=arm["runs"][:2]) for arm in arms]),
    )
    results = summarize(SETTINGS | dict(command=HOSTILE[1], order=[[HOSTILE[0], 1]]), arms)
    write_report(tmp_path / "report", results, log_x=True)
    text = (tmp_path / "report/report.html").read_text()
    page, usual = Page(text), Page((tmp_path / "plain/report.html").read_text())
    assert json.loads(page.scripts[0][1])["results"] == results and len(page.scripts) == 2
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in usual.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    names = [text for kind, text in page.cells if kind == "arm"][1:7]
    assert names == [*HOSTILE[:3], "two lines", *HOSTILE[4:]]
    readme = (tmp_path / "report/README.md").read_text()
    for row in (line for line in readme.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", row)) in (6, 15, 18)
    assert not re.search(r"(?<!\\)[`*~$]|(?<!\\)<(?! )|\u202e", readme)
    assert "\\</script>\\<script>alert(1)\\</script>" in readme


def test_curves(results, tmp_path):
    import matplotlib.image

    for name, log_x in (("linear", False), ("log", True)):
        write_report(tmp_path / name, results, log_x=log_x)
    linear, log = (matplotlib.image.imread(tmp_path / name / "curves.png") for name in ("linear", "log"))
    top = linear.shape[0] - 676  # the differences, above the curves
    assert linear.shape == log.shape and 200 < top < 300 and linear.shape[1] == 1560 and (linear != log).any()
    for panel in (linear[top : top + 560, :800], linear[top : top + 560, 830:]):  # above the legend
        ends = []
        for color in ("#d55e00", "#0a84d0"):
            exact = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            rows, columns = (abs(panel[..., :3] - exact).max(-1) < 0.01).nonzero()
            ends.append(rows[columns == columns.max()].mean())
        assert ends[0] - ends[1] > 300  # losses of 0.61 and 0.96 where the run began at 5


def of_color(picture, color):
    exact = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return abs(picture[..., :3] - exact).max(-1) < 0.01


def count(picture, color):
    return int(of_color(picture, color).sum())


def test_the_paired_picture_is_first(results, tmp_path):
    import matplotlib.image

    write_report(tmp_path / "report", results)
    readme, page = (tmp_path / "report/README.md").read_text(), (tmp_path / "report/report.html").read_text()
    assert readme.index("- good is better") < readme.index("(curves.png)") < readme.index("## Loss")
    order = ["good is better", '<svg class="differences"', 'id="chart"', "<h2>Loss</h2>"]
    assert sorted(order, key=page.index) == order
    picture = matplotlib.image.imread(tmp_path / "report/curves.png")
    dots, intervals = picture[25 : -676 - 30, 140:840], picture[25 : -676 - 30, 850:]
    for color in COLORS[1:5]:
        assert count(dots, color) > 30 and count(intervals, color) > 100
    assert count(picture[25 : -676 - 30], COLORS[0]) == 0, "the baseline is the zero line"

    # the dots are the differences at equal seed, on one scale
    labels = re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="4"[^>]*><title>([^<]*)</title>', page)
    expected = [
        f"{name}, seed {seed + 1}: {losses[seed] - BASE[seed]:+.4f}"
        for name, losses in (("good", GOOD), ("bad", BAD), ("same", SAME), ("even", EVEN))
        for seed in range(6)
    ]
    assert sorted(text for _, text in labels) == sorted(expected)
    places = [(float(text.split(": ")[1]), float(x)) for x, text in labels]
    (a, x), (b, y) = min(places), max(places)
    assert all(place == pytest.approx(x + (y - x) * (value - a) / (b - a), abs=0.2) for value, place in places)
    assert len(re.findall('class="thick"', page)) == 4 and len(re.findall('class="thin"', page)) == 4
    pairs = [arm["pairs"] for arm in results["arms"]]
    assert pairs[0] == [] and pairs[1] == [[seed + 1, pytest.approx(GOOD[seed] - BASE[seed])] for seed in range(6)]


def test_a_target_outside_leaves_the_picture_to_the_data(make_arm, tmp_path):
    import matplotlib.image

    rows, arms = {}, [make_arm("baseline", BASE), make_arm("good", GOOD)]
    for target in (0.8, 1e-9):
        results = summarize(SETTINGS | dict(target=target), arms)
        write_report(tmp_path / str(target), results)
        picture = matplotlib.image.imread(tmp_path / str(target) / "curves.png")[-676:-100, :800]
        rows[target] = of_color(picture, COLORS[1]).any(axis=1).nonzero()[0]
        assert count(picture[:, 100:700], "#808080") > 100 or target < 0.1, "a line across"
    assert max(rows[1e-9]) - min(rows[1e-9]) == max(rows[0.8]) - min(rows[0.8]) > 400


def test_the_page_in_a_browser(results, tmp_path):
    """Offline and without an error; the curves are drawn, and "minus baseline" subtracts the run of equal seed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium on this machine; test_page_is_one_file_that_loads_nothing reads the page as text")
    write_report(tmp_path / "report", results)
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    probe = """<script>addEventListener("error", event => document.title += " ERROR " + event.message);
addEventListener("securitypolicyviolation", event => document.title += " REFUSED " + event.violatedDirective);
</script>"""
    after = """<script>
const press = text => [...document.querySelectorAll("button")].find(button => button.textContent === text).click();
press("minus baseline");
const ends = {};
for (const {curve, line} of lines) ends[`${names[curve.arm]} ${curve.mean ? "mean" : curve.seed}`] = line.at(-1)[1];
for (const text of ["training time, s", "logarithmic", "all losses", "seeds", "loss", "linear"]) press(text);
const textContent = JSON.stringify({ends, paths: chart.querySelectorAll("path").length});
document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent}));
</script>"""
    page = page.replace("<title>", probe + "<title>").replace("</body>", after + "</body>")
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,1400",
        "--dump-dom",
        (tmp_path / "probe.html").as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300).stdout
    assert re.findall("<title>(.*?)</title>", shown)[0] == "4 arms against baseline at equal tokens"
    found = json.loads(unescape(re.search('<pre id="probe">(.*?)</pre>', shown)[1]))
    assert found["paths"] >= 4
    for name, losses in (("good", GOOD), ("bad", BAD), ("same", SAME)):
        each = [loss - base for loss, base in zip(losses, BASE)]
        assert [found["ends"][f"{name} {seed}"] for seed in range(1, 7)] == pytest.approx(each)
        assert found["ends"][f"{name} mean"] == pytest.approx(mean(each))


def test_a_folder_that_cannot_be_made(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make .*file/report.*another folder$"):
        write_report(tmp_path / "file/report", results)
