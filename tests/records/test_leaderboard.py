"""The leaderboard: what is added, the rules, every fault's one line, the tables, and the statistics of any folder."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats as tests

from records import leaderboard
from records.arms import rule_settings, stored_arms
from records.leaderboard import CHOSEN, RECORDS, main, make_stats, read_records, record_readme
from records.pages import BEGIN, END, is_current, pages_of
from records.report import write_report
from records.results import summarize
from records.runs import compressed, file_beside, read_folder, read_run, read_text
from records.verdicts import RULE as VERDICTS
from train_gpt import TRACKS, make_config

ROOT = RECORDS.parent
RULE = "=" * 100
TARGET = make_config(dict(track="cpu")).target
SPREAD = (-0.001, 0.0, 0.001, 0.0004)
SIX = (1, 2, 3, 4, 5, 6)        # seeds, where a verdict is wanted
README = f"# Records\n\nthe rules\n\n{BEGIN}\n{END}\n\nthe end\n"


@pytest.fixture
def root(tmp_path):
    """A folder of records, with docs/ beside it, and none in it yet."""
    folder = tmp_path / "records"
    for page in pages_of(folder):
        page.parent.mkdir()
        page.write_text(README)
    return folder


@pytest.fixture
def write_arm(write_log):
    """
    write_arm(folder, loss relative to the target, ms_per_step, **as write_log takes it): four seeds, with a little
    spread in both, which is one in all arms. apart: how far losses of odd seeds lie below this, and others above.
    """

    def write(folder, loss=-0.02, ms_per_step=100.0, seeds=(1, 2, 3, 4), apart=0.0, **options):
        for seed in seeds:
            noise = SPREAD[(seed - 1) % 4]
            final = TARGET + loss + noise + apart * (-1) ** seed
            path = write_log({0: 5.576, 4: 2.0, 8: final}, folder, f"{Path(folder).name}_{seed}", seed=seed,
                             ms_per_step=ms_per_step * (1 + noise), **options)
        return path.parent.parent

    return write


@pytest.fixture
def run(root, capsys):
    """run("add", folder, ...) -> (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["--records", str(root), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def add(run):
    def add(folder, name, *options, track="cpu"):
        return run("add", folder, "--name", name, "--track", track, "--what", f"what {name} does", *options)

    return add


def record(root, name, kind="cpu") -> Path:
    (folder,) = root.glob(f"{kind}/*_{name}")
    return folder


def stats_of(folder) -> dict:
    return json.loads((folder / "stats.json").read_text())


def contents(root) -> dict:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(result, root, before) -> str:
    """The one line of a fault that changed nothing."""
    code, out, err = result
    assert code == 1
    assert out == ""
    assert err.startswith("records.leaderboard: error: ")
    assert err.count("\n") == 1
    assert contents(root) == before
    return err


# ---- adding

def test_first_record_needs_the_target_only(root, write_arm, add, run):
    code, out, err = add(write_arm("source/baseline"), "First")
    folder = record(root, "First")
    assert (code, out, err) == (0, f"{folder}\n", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_First", folder.name)
    (source,) = folder.glob("source-*.txt")
    assert sorted(path.name for path in folder.iterdir()) == ["A0", "README.md", source.name, "stats.json"]
    logs = [f"A0-seed{seed}.{kind}" for seed in range(1, 5) for kind in ("json", "txt.gz")]
    assert sorted(path.name for path in (folder / "A0").iterdir()) == logs
    stats = stats_of(folder)
    (arm,) = stats["arms"]
    assert arm["losses"] == pytest.approx([TARGET - 0.02 + noise for noise in SPREAD], abs=1e-9)
    assert arm["seeds"] == [1, 2, 3, 4]
    assert arm["train_seconds"] == pytest.approx([0.799, 0.8, 0.801, 0.8], abs=6e-4)
    assert arm["loss"]["n"] == arm["time"]["n"] == 4
    assert stats["hardware"] == "1 x x86_64, 2 threads"
    assert stats["rules"]["target"] == TARGET
    assert arm["p_target"] < 1e-4
    assert f"n = 4; p < 0.0001 for a mean that is not below {TARGET}" in (folder / "README.md").read_text()
    assert run("check")[0] == 0


def test_a_record_is_judged_by_the_target_it_was_set_under(root, write_arm, add, run, monkeypatch):
    add(write_arm("a/baseline"), "First")
    monkeypatch.setitem(TRACKS, "cpu", TRACKS["cpu"] | dict(target=TARGET - 0.5))
    assert run("check")[0] == 0
    assert "not shown to be reached" in add(write_arm("b/baseline", target=TARGET - 0.5), "Second")[2]


def test_faster_record_and_history(root, write_arm, add, run):
    add(write_arm("a/baseline"), "First")
    write_arm("b/baseline", seeds=SIX)
    quick = dict(ms_per_step=90.0, variant=["quick"], modules=[("variants.quick", "x = 1")])
    assert add(write_arm("b/quick", seeds=SIX, apart=0.0002, **quick), "Second")[0] == 0
    stats = stats_of(record(root, "Second"))
    assert stats["arm"] == "quick" and [arm["folder"] for arm in stats["arms"]] == ["A0", "A1"]
    assert stats["arms"][1]["vs_baseline"]["time"]["verdict"] == "better"
    assert stats["arms"][1]["vs_baseline"]["loss"]["verdict"] == "equivalent"
    readme = (record(root, "Second") / "README.md").read_text().replace("\\", "")
    assert re.search(r"The record before it, cpu/.*_First, took 0.80 ± 0.00 s: p < 0.0001", readme)
    assert "- quick is equivalent to baseline within 0.004 nats, " in readme and ", 10.0 % faster." in readme
    text = (root / "README.md").read_text()
    assert text.startswith(README[: README.index(END)].rstrip("\n")) and text.endswith(README[README.index(END) :])
    assert "### cpu, 1 x x86_64, 2 threads: 0.72 s" in text and text.index("_First)") < text.index("_Second)")
    assert re.search(r"\n\| 0.72 ± 0.00 s \| .* \| 6 \| < 0.0001 \| \[Second\]\(cpu/[\d-]+_Second\) \|\n", text)
    assert re.search(r"\n- Second, [\d-]+, arm quick: what Second does\n", text)
    code, out, _ = run("check")
    assert code == 0 and len(out.splitlines()) == 4 and all(": ok" in line for line in out.splitlines())


def test_other_hardware_or_validation_data_has_its_own_table(root, write_arm, add, run):
    add(write_arm("a/baseline"), "First")
    assert add(write_arm("b/baseline", ms_per_step=200.0, device="H200"), "Slow")[0] == 0
    assert (
        add(write_arm("c/baseline", ms_per_step=200.0, val_sha256={"python_val_000000.bin": "c" * 64}), "Other")[0]
        == 0
    )
    text = (root / "README.md").read_text()
    assert text.count("### cpu, 1 x x86_64") == 2
    assert text.count("### cpu, 1 x H200: 1.60 s") == 1
    assert run("check")[0] == 0


def test_negative_results(root, write_arm, add, run):
    write_arm("a/baseline", seeds=SIX)
    write_arm("a/slow", loss=0.1, ms_per_step=150.0, seeds=SIX, apart=0.0005, variant=["slow"])
    write_arm("a/wild", loss=-0.0202, seeds=SIX, apart=0.01, variant=["wild"])
    assert add(write_arm("a/even", loss=-0.0202, seeds=SIX, apart=0.0002), "Losers", "--negative")[0] == 0
    folder = record(root, "Losers", "negative")
    text = (root / "README.md").read_text()
    results = root.parent / "docs" / "results.md"
    assert (folder / "A2" / "A2-seed1.txt.gz").exists() and stats_of(folder)["arm"] is None
    assert "No record yet." in text
    assert "#### Losers\n\nwhat Losers does\n\n" in text
    assert f"[{folder.name[:10]}](negative/{folder.name}), track cpu, 6 runs an arm, 1 x x86_64" in text
    assert re.search(r"\n\| slow \| 0.9199 .* \| \+0.1200 \(\+0.1.* to \+0.1.*\) \| < 0.0001 \| worse \|\n", text)
    assert re.search(r"\n\| even \| .* \| -0.0002 \(.*\) \| .* \| equivalent \|\n", text)
    assert re.search(r"\n\| wild \| .* \| -0.0002 \(.*\) \| .* \| undecided \|\n", text)
    assert run("check") == (0, f"negative/{folder.name}: ok\n{root / 'README.md'}: ok\n{results}: ok\n", "")


def test_a_better_arm_stands_under_no_heading_of_negative_results(root, write_arm, add):
    """It sets no record, for instance because it is slower to the target, and is better than its baseline."""
    write_arm("a/baseline", seeds=SIX)
    add(write_arm("a/slow_but_good", loss=-0.1, ms_per_step=150.0, seeds=SIX, apart=0.0005), "Better", "--negative")
    lines = (root / "README.md").read_text().splitlines()
    row = next(i for i, line in enumerate(lines) if "| better |" in line)
    headings = [line for line in lines[:row] if line.startswith("#")]
    assert headings[-2:] == ["### Comparisons that set no record", "#### Better"]
    assert not any("negative" in heading.lower() for heading in headings)
    assert record(root, "Better", "negative").is_dir()


DESIGN = dict(looks=[4, 5, 6], levels=[0.002, 0.001, 0.0012], levels_equivalence=[0.002, 0.001, 0.0012],
              levels_interval=[0.03, 0.02, 0.02])


@pytest.mark.parametrize("design, seeds, word", [
    (None, (9, 10, 11, 12, 13, 14), "equivalent"), (DESIGN, (9, 10, 11, 12, 13), "undecided")])
def test_folder_of_compare(root, write_arm, add, run, tmp_path, design, seeds, word):
    """By name, seed 10 comes before 9. An arm that was decided before the others has fewer runs."""
    write_arm("compared/logs/baseline", seeds=seeds)
    write_arm("compared/logs/wide:hidden=8/x", ms_per_step=90.0, seeds=seeds, apart=0.0002 if design is None else 0.01)
    write_arm("compared/logs/worse", loss=0.1, seeds=seeds[:4], apart=0.0002)
    arms = []
    for name, options in (("baseline", []), ("wide:hidden=8/x", ["--layers", "4"]), ("worse", [])):
        runs = sorted(read_folder(tmp_path / "compared/logs" / name), key=lambda run: run.seed)
        arms.append(dict(name=name, variant=[], options=options, runs=runs))
    settings = dict(
        rule=VERDICTS, alpha=0.01, margin=0.003, design=design, track="cpu", seeds=list(seeds), budget="tokens",
        budget_seconds=0, target=TARGET, command="compare.py baseline wide", order=[["baseline", 1]], sweep=None,
        tried=3, overhead=None)
    results = summarize(settings, arms)
    write_report(tmp_path / "compared", results)
    assert add(tmp_path / "compared", "Compared", "--arm", "wide:hidden=8/x")[0] == 0
    stats = stats_of(record(root, "Compared"))
    wide, worse = stats["arms"][1:]
    assert stats["settings"] == settings and wide["options"] == ["--layers", "4"] and wide["folder"] == "A1"
    assert wide["vs_baseline"] == results["arms"][1]["vs_baseline"] and wide["vs_baseline"]["loss"]["verdict"] == word
    assert worse["vs_baseline"]["loss"]["verdict"] == ("worse" if design else "too few pairs")
    assert (worse["vs_baseline"]["loss"]["look"] is None) == (design is None)
    assert run("check")[0] == 0


# ---- which rule a record's verdicts follow

def write_comparison(write_arm) -> Path:
    """Of three arms; by Welch's test nothing is known of b, by pairs it is better."""
    write_arm("a/baseline", seeds=SIX, apart=0.01)
    write_arm("a/b", loss=-0.025, seeds=SIX, apart=0.0105)
    return write_arm("a/c", loss=-0.0202, seeds=SIX, apart=0.0102)


def test_what_is_added_follows_the_rule_of_today(root, write_arm, add, run, tmp_path):
    """Whatever rule the comparison's own results followed: those of before it say no rule."""
    source = write_comparison(write_arm)
    assert add(source, "Today", "--negative")[0] == 0
    stats = stats_of(record(root, "Today", "negative"))
    rule = dict(rule=VERDICTS, alpha=0.01, margin=0.004, design=None)  # half a hundredth of the target, in thousandths
    assert TARGET == 0.82 and {name: stats["settings"][name] for name in rule} == rule
    assert [arm["vs_baseline"]["loss"]["verdict"] for arm in stats["arms"][1:]] == ["better", "equivalent"]
    runs = {name: read_folder(source / name) for name in ("baseline", "b", "c")}
    losses = {name: [run.val_loss for run in arm] for name, arm in runs.items()}
    p = tests.ttest_rel(losses["b"], losses["baseline"]).pvalue
    assert stats["arms"][1]["vs_baseline"]["loss"]["p_holm"] == pytest.approx(2 * p, rel=1e-4) and 2 * p < 0.01

    # a folder of compare.py of before the rule
    arms = [dict(name=name, variant=[], options=[], runs=arm) for name, arm in runs.items()]
    results = summarize(dict(track="cpu", target=TARGET, order=[], tried=3), arms)
    assert results["arms"][1]["vs_baseline"]["loss"]["verdict"] == "not distinguishable"
    (source / "results.json").write_text(json.dumps(results | dict(format="knotgpt-comparison-1")))
    assert add(source, "Older", "--negative")[0] == 0
    stats = stats_of(record(root, "Older", "negative"))
    assert stats["settings"]["rule"] == VERDICTS and run("check")[0] == 0
    assert [arm["vs_baseline"]["loss"]["verdict"] for arm in stats["arms"][1:]] == ["better", "equivalent"]


def restate(folder, settings: dict, **chosen) -> tuple[dict, list[dict]]:
    """Write a comparison's stats.json again by the rule of these settings. Returns it and the arms."""
    stats = stats_of(folder)
    arms = stored_arms(folder, stats)
    stats = make_stats({name: stats[name] for name in CHOSEN if name in stats} | dict(settings=settings) | chosen, arms)
    (folder / "stats.json").write_text(json.dumps(stats))
    return stats, arms


OLDER = dict(track="cpu", target=TARGET, command="", order=[], sweep=None, tried=3, overhead=None)     # without a rule


def test_an_older_comparison_is_checked_by_the_rule_before(root, write_arm, add, run):
    add(write_comparison(write_arm), "Old", "--negative")
    folder = record(root, "Old", "negative")
    restate(folder, OLDER)
    assert run("render")[0] == 0 and run("check")[0] == 0
    stats = stats_of(folder)
    tested = stats["arms"][1]["vs_baseline"]["loss"]
    baseline, *losses = [arm["losses"] for arm in stats["arms"]]
    p = [tests.ttest_ind(each, baseline, equal_var=False).pvalue for each in losses]
    assert [arm["vs_baseline"]["loss"]["verdict"] for arm in stats["arms"][1:]] == ["not distinguishable"] * 2
    assert tested["p"] == pytest.approx(p[0]) and tested["p_holm"] == pytest.approx(2 * p[0])
    assert tested["paired"]["n"] == 6 and "look" not in tested and "margin" not in tested
    assert "| not distinguishable |" in (root / "README.md").read_text()

    # words of today's rule are not what its logs say by the rule it follows, and the other way round
    change_stats(folder, lambda stats: stats["arms"][1]["vs_baseline"]["loss"].update(verdict="undecided"))
    code, out, _ = run("check")
    assert code == 1 and "arms[1].vs_baseline.loss.verdict is not what the logs say" in out
    restate(folder, OLDER | rule_settings("cpu"))
    run("render")
    assert run("check")[0] == 0
    change_stats(folder, lambda stats: stats["arms"][1]["vs_baseline"]["loss"].update(verdict="not distinguishable"))
    assert "arms[1].vs_baseline.loss.verdict is not what the logs say" in run("check")[1]


def test_a_comparison_that_was_read_again_says_so(root, write_arm, add, run):
    """Its README names the words that changed; check keeps the note."""
    add(write_comparison(write_arm), "Old", "--negative")
    folder = record(root, "Old", "negative")
    restate(folder, OLDER)
    words = {"b": ["not distinguishable", "better"], "c": ["not distinguishable", "equivalent"]}
    stats, arms = restate(folder, OLDER | rule_settings("cpu"), reread=dict(date="2026-12-02", words=words))
    run("render")
    assert run("check")[0] == 0 and stats_of(folder)["reread"]["words"] == words
    readme = record_readme(stats, arms, None)
    assert "- b is better than baseline by 0.0050 nats" in readme
    assert "Read again on 2026-12-02 by the rule of that day" in readme
    assert "Words that changed: b: not distinguishable, now better; c: not distinguishable, now equivalent." in readme
    for fault in (dict(date=3, words={}), dict(date="2026-12-02", words={"b": "better"})):
        change_stats(folder, lambda stats, fault=fault: stats.update(reread=fault))
        assert "stats.json: damaged: reread." in run("check")[1]


def test_a_comparison_with_runs_of_an_earlier_one_sets_no_record(root, write_arm, add, tmp_path):
    """Their times were not measured in turn; as a comparison it counts."""
    folder = write_arm("c/baseline")
    add(write_arm("first/baseline"), "First")
    settings, arms = leaderboard.read_arms(folder)
    results = summarize(settings | dict(reused=[dict(arm="baseline", seed=1, log="x.txt", seen=[])]), arms)
    (folder / "results.json").write_text(json.dumps(results))
    before = contents(root)
    assert "some of its runs were taken over from earlier comparisons" in refused(add(folder, "No"), root, before)


def test_arm_of_several(root, write_arm, add):
    for name, speed in (("baseline", 100.0), ("a", 95.0), ("b", 90.0)):
        source = write_arm(f"source/{name}", ms_per_step=speed)
    assert "which arm sets the record? give --arm and one of baseline, a, b" in refused(
        add(source, "Best"), root, contents(root)
    )
    assert "which arm sets the record?" in refused(add(source, "Best", "--arm", "c"), root, contents(root))
    assert add(source, "Best", "--arm", "b")[0] == 0 and stats_of(record(root, "Best"))["arm"] == "b"


def test_a_source_is_stored_once_and_read_back(root, write_arm, add, tmp_path):
    """Two arms of one source and one of another: two files, and each stored log gives the run that was added."""
    write_arm("a/baseline")
    write_arm("a/same", variant=["same"])
    assert add(write_arm("a/other", modules=[("variants.other", "x = 1")]), "Sources", "--negative")[0] == 0
    folder = record(root, "Sources", "negative")
    assert len(list(folder.glob("source-*.txt"))) == 2
    rows = {arm["name"]: arm["folder"] for arm in stats_of(folder)["arms"]}
    assert rows == {"baseline": "A0", "other": "A1", "same": "A2"}
    readme = (folder / "README.md").read_text()
    for name, arm in rows.items():
        assert f"| {arm} | {name} | [2]({arm}/{arm}-seed2.txt.gz) |" in readme
        for stored, run in zip(read_folder(folder / arm), read_folder(tmp_path / "a" / name)):
            assert "import torch" not in read_text(stored.path)
            facts = json.loads(run.path.with_suffix(".json").read_text())
            assert facts.pop("train_curve")
            assert json.loads(file_beside(stored.path, ".json").read_text()) == facts
            assert {**vars(stored), "path": None} == {**vars(run), "path": None}


def test_a_resumed_log_names_its_source_in_each_header(root, write_arm, write_log, add):
    write_arm("a/baseline", seeds=(1, 2))
    write_log({0: 5.0}, "a/baseline", "b", seed=3, steps=8, last_step=4, end="SIGTERM")
    log = write_log({8: TARGET - 0.02}, "a/baseline", "b", seed=3, resumed_from=4)
    assert add(log.parent.parent, "Resumed")[0] == 0
    (stored,) = record(root, "Resumed").glob("A0/A0-seed3.txt.gz")
    lines = read_text(stored).splitlines()
    assert sum(line.startswith("source: source-") for line in lines) == 2 and "import torch" not in lines
    assert {**vars(read_run(stored)), "path": None} == {**vars(read_run(log)), "path": None}


def test_a_record_can_be_added_again(root, write_arm, add, tmp_path):
    """What is stored is read like any other folder of logs: another leaderboard takes it, and keeps its texts."""
    add(write_arm("a/baseline"), "First")
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    for folder in ("cpu", "sources"):
        shutil.rmtree(root / folder)
    assert add(record(copy, "First"), "Again")[0] == 0
    (text,) = (root / "sources").iterdir()
    assert text.read_bytes() == (copy / "sources" / text.name).read_bytes() and "import torch" in text.read_text()


def test_records_share_the_texts_of_modules(root, write_arm, add, run):
    """A second record adds the texts that are new; a record that goes leaves its texts, and check names them."""
    add(write_arm("a/baseline", modules=[("variants", "x = 1\n"), ("variants.a", "y = 1")]), "First")
    first = contents(root / "sources")
    assert {content.decode() for content in first.values()} == {
        "import torch\nprint('step:')", "x = 1\n", "y = 1\n"}
    options = dict(ms_per_step=90.0, modules=[("variants.a", "y = 1\n"), ("variants.b", "z = 1")])
    add(write_arm("b/baseline", **options), "Second")
    (new,) = contents(root / "sources").keys() - first.keys()
    assert new.read_text() == "z = 1\n" and contents(root / "sources").items() > first.items()
    assert run("check")[0] == 0

    # without the second record
    shutil.rmtree(record(root, "Second"))
    run("render")
    code, out, _ = run("check")
    assert code == 0 and f"{root / 'sources'}: no record uses {new.name}; delete" in out
    new.unlink()
    code, out, _ = run("check")
    assert code == 0 and "no record uses" not in out


def test_an_older_record_is_read(root, write_arm, add, run, tmp_path):
    """It holds the source itself."""
    add(write_arm("a/baseline"), "First")
    folder = record(root, "First")
    hold_whole_source(folder)
    shutil.rmtree(root / "sources")
    assert run("check")[0] == 0
    for stored, added in zip(read_folder(folder / "A0"), read_folder(tmp_path / "a" / "baseline")):
        assert stored.source == added.source


# ---- what is refused

@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(loss=0.01),
            f"target {TARGET} not shown to be reached: mean loss {TARGET + 0.0101:.4f}, n = 4, p = 1.00",
        ),
        (dict(loss=-0.001), "not shown to be reached"),
        (dict(seeds=(1,)), "one run alone, and no test can be made of it"),
        (dict(target=5.0), f"has target 5.0, the track {TARGET}"),
        (dict(val_tokens=64), "has val_tokens 64, the track"),
        (dict(known_target=0.0), "was validated on data for which the track's target is not known"),
        (dict(val_sha256={}), "does not say which validation data it used"),
        (dict(track="short"), "a run of track short, not cpu"),
        (dict(end="SIGTERM", steps=8, last_step=4), "stopped by SIGTERM after step 4 of 8; only finished runs count"),
    ],
)
def test_no_record(root, write_arm, add, options, message):
    before = contents(root)
    assert message in refused(add(write_arm("source/baseline", **options), "No"), root, before)


def test_not_faster_than_the_standing_record(root, write_arm, add):
    add(write_arm("a/baseline"), "First")
    before = contents(root)
    for name, speed in (("same", 100.0), ("slower", 110.0), ("hardly", 99.95)):
        err = refused(add(write_arm(f"{name}/baseline", ms_per_step=speed), "Again"), root, before)
        assert re.search(
            r"cpu/.*_Again: not faster than cpu/.*_First: 0.[78]\d s \(n = 4\) against 0.80 s \(n = 4\), "
            r"p = [01].\d+, and p < 0.01 is asked for",
            err,
        )


def test_slower_than_the_fastest_but_not_than_an_older_one(root, write_arm, add):
    add(write_arm("a/baseline"), "First")
    add(write_arm("b/baseline", ms_per_step=80.0), "Second")
    err = refused(add(write_arm("c/baseline", ms_per_step=90.0), "Third"), root, contents(root))
    assert re.search(r"_Third: not faster than cpu/.*_Second: 0.72 s \(n = 4\) against 0.64 s", err)


def test_runs_that_are_not_alike(root, write_arm, write_log, add):
    source, before = write_arm("a/baseline"), contents(root)
    log = write_log({0: 5.0, 8: TARGET - 0.02}, "a/baseline", "other", seed=9, source="import numpy")
    assert "ran different code" in refused(add(source, "No"), root, before)
    for change, message in (
        (dict(lr_matrix=0.1), "differ in lr_matrix"),
        (dict(seed=1), "second run of arm baseline with seed 1"),
        (dict(val_sha256={"a": "b"}), "different data"),
        (dict(device="H200"), "device is not one in all runs (x86_64, 2 threads, H200)"),
    ):
        log.unlink()
        log = write_log({0: 5.0, 4: 2.0, 8: TARGET - 0.02}, "a/baseline", "other", **{"seed": 9, **change})
        assert message in refused(add(source, "No"), root, before)


@pytest.mark.parametrize("scored", [65_537, None])
def test_arms_that_were_scored_on_different_numbers_of_tokens(root, write_arm, write_log, add, scored):
    """The setting is the same: the trainer left out rows that filled no whole batch."""
    write_arm("a/baseline", scored=65_536)
    source, before = write_arm("a/other", scored=scored), contents(root)
    if scored is None:  # a log that does not say
        for path in (source / "other").glob("*.txt"):
            edit(path, '"val_tokens": null, ', "")
            path.with_suffix(".json").unlink()
    err = refused(add(source, "No", "--negative"), root, before)
    number = "an unknown number of" if scored is None else "65,537"
    assert "baseline_1.txt was scored on 65,536 tokens, " in err
    assert f"other_1.txt on {number} tokens, so their losses cannot be compared" in err


def test_a_record_whose_arms_were_scored_on_different_numbers_of_tokens(two_records, run):
    """check finds it, too."""
    for path in (two_records / "A1").glob("*.txt.gz"):
        edit(path, '"val_tokens": 65536, "target"', '"val_tokens": 65537, "target"')
        file_beside(path, ".json").unlink()
    code, out, _ = run("check")
    assert code == 1 and " was scored on 65,536 tokens, " in out and "on 65,537 tokens, so their losses" in out


def test_arms_of_one_name(root, write_arm, add, tmp_path):
    write_arm("compared/logs/baseline")
    write_arm("compared/logs/other")
    runs = [[dict(seed=1, log=f"{folder}_1.txt")] for folder in ("baseline", "other")]
    arms = [dict(name="baseline", options=[], runs=of) for of in runs]
    results = dict(format="knotgpt-comparison-1", settings={}, arms=arms)
    (tmp_path / "compared" / "results.json").write_text(json.dumps(results))
    err = refused(add(tmp_path / "compared", "No", "--negative"), root, contents(root))
    assert "two arms have the same name among baseline, baseline; give them names of their own" in err


def test_a_negative_result_on_two_machines_says_nothing_of_time(root, write_arm, add, run):
    write_arm("a/baseline", seeds=SIX)
    source = write_arm("a/slow", loss=0.1, ms_per_step=120.0, seeds=SIX, variant=["slow"], device="H200")
    assert add(source, "Two", "--negative")[0] == 0
    text = (record(root, "Two", "negative") / "README.md").read_text()
    assert "slow is worse than baseline" in text and "1 x x86_64, 2 threads, H200" in text
    assert "times not compared" in text and "slower" not in text
    assert run("check")[0] == 0


def test_folders_that_will_not_do(root, tmp_path, write_arm, write_log, add):
    before = contents(root)
    assert "no such folder" in refused(add(tmp_path / "none", "No"), root, before)
    assert "no subfolder with logs" in refused(add(root, "No"), root, before)
    write_arm("a/one")
    assert "no baseline among one, two" in refused(add(write_arm("a/two"), "No"), root, before)
    assert "one arm alone is no comparison" in refused(add(write_arm("b/one"), "No", "--negative"), root, before)
    (tmp_path / "b" / "results.json").write_text('{"format": "other", "settings": {}, "arms": []}')
    err = refused(add(tmp_path / "b", "No"), root, before)
    assert "results.json: no results of compare.py, but of format other" in err
    lost = dict(
        format="knotgpt-comparison-1",
        settings={},
        arms=[dict(name="one", options=[], runs=[dict(seed=1, log="one_1.txt"), dict(seed=2, error="killed")])],
    )
    (tmp_path / "b" / "results.json").write_text(json.dumps(lost))
    assert "0 logs of one, seed 2, where one is expected" in refused(add(tmp_path / "b", "No"), root, before)


def test_names_and_tracks(root, write_arm, add):
    source, before = write_arm("a/baseline"), contents(root)
    assert "--name takes letters" in refused(add(source, "../No"), root, before)
    assert "unknown track 'tiny'; the tracks are cpu" in refused(add(source, "No", track="tiny"), root, before)
    free = next((track for track in TRACKS if not make_config(dict(track=track)).target), None)
    if free:
        write_arm("b/baseline", track=free)
        assert f"track {free} has no target, so no record" in refused(
            add(source.parent / "b", "No", track=free), root, before
        )
    add(source, "Yes")
    assert "there is a record of this name and date" in refused(add(source, "Yes"), root, contents(root))


def test_foreign_logs_are_not_added(root, tmp_path, add):
    (tmp_path / "a" / "baseline").mkdir(parents=True)
    (tmp_path / "a" / "baseline" / "log.txt").write_text(
        f"import os\n{RULE}\nRunning Python 3.12\n{RULE}\n"
        "step:0/1 val_loss:3.0 train_time:0ms step_avg:0.1ms\n"
        "step:1/1 train_time:5ms step_avg:5.00ms\nstep:1/1 val_loss:2.0 train_time:5ms step_avg:5.00ms\n"
    )
    assert "log.txt: does not say which validation data it used; only logs of this trainer can be added" in refused(
        add(tmp_path / "a", "No"), root, contents(root)
    )


def test_disk_that_fills(root, write_arm, add, monkeypatch):
    source, before = write_arm("a/baseline"), contents(root)

    def full(*_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device; free some space" in refused(add(source, "No"), root, before)
    assert not list(root.glob("cpu/.*"))


# ---- checking

@pytest.fixture
def two_records(root, write_arm, add):
    add(write_arm("a/baseline"), "First")
    write_arm("b/baseline")
    add(write_arm("b/quick", ms_per_step=90.0), "Second")
    return record(root, "Second")


def log_without_json(folder) -> Path:
    path = folder / "A1" / "A1-seed2.txt.gz"
    file_beside(path, ".json").unlink()
    return path


def edit(path, old, new):
    """Replace words of a text, which is a compressed one where its file ends in .gz."""
    text = read_text(path)
    assert old in text
    text = text.replace(old, new)
    path.write_bytes(compressed(text) if path.suffix == ".gz" else text.encode())


def source_of(folder) -> Path:
    (source,) = folder.glob("source-*.txt")
    return source


def text_of(folder) -> Path:
    """The only text that the records beside this one share."""
    (text,) = (folder.parent.parent / "sources").iterdir()
    return text


def hold_whole_source(folder):
    """Let a record hold its source as older ones do."""
    source_of(folder).write_text(read_run(folder / "A0" / "A0-seed1.txt.gz").source)


def name_another_source(folder):
    """Let one log of the arm name a source of its own, which is whole."""
    altered = read_run(folder / "A0" / "A0-seed1.txt.gz").source.replace("import torch", "import numpy")
    digest = hashlib.sha256(altered.encode()).hexdigest()
    (folder / f"source-{digest[:12]}.txt").write_text(altered)
    log = log_without_json(folder)
    line = next(line for line in read_text(log).splitlines() if line.startswith("source: "))
    edit(log, line, f"source: source-{digest[:12]}.txt sha256 {digest}")


def change_stats(folder, change):
    stats = stats_of(folder)
    change(stats)
    (folder / "stats.json").write_text(json.dumps(stats))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda folder: edit(folder / "A1/A1-seed2.txt.gz", "val_loss:2.0000", "val_loss:1.9000"),
            "tampered: A1-seed2.json has another curve than the log",
        ),
        (
            lambda folder: edit(
                folder / "A1/A1-seed2.txt.gz", f"val_loss:{TARGET - 0.02:.4f}", f"val_loss:{TARGET - 0.03:.4f}"
            ),
            "tampered: A1-seed2.json has another val_loss, curve than the log",
        ),
        (
            lambda folder: edit(
                log_without_json(folder), f"val_loss:{TARGET - 0.02:.4f}", f"val_loss:{TARGET - 0.03:.4f}"
            ),
            "stats.json: arms[1].losses[1] is not what the logs say",
        ),
        (lambda folder: edit(log_without_json(folder), "val_loss:2.0000", "val_loss:1.9000"), None),
        (
            lambda folder: edit(log_without_json(folder), "step:5/8 train_time:450ms step_avg:90.00ms\n", ""),
            "step 5 is missing",
        ),
        (
            lambda folder: edit(log_without_json(folder), "python_val_00000", "other_val_00000"),
            "validated on different data",
        ),
        (lambda folder: edit(log_without_json(folder), "b" * 64, "c" * 64), "validated on different data"),
        (lambda folder: (folder / "A1/A1-seed2.txt.gz").unlink(), "arms[1].seeds is not what the logs say"),
        (lambda folder: shutil.rmtree(folder / "A0"), "stats.json has the arms A0, A1, the folder A1"),
        (lambda folder: shutil.copytree(folder / "A1", folder / "third"), "the folder A0, A1, third"),
        (lambda folder: source_of(folder).unlink(), "A0-seed1.txt.gz: its source is missing: there is no text"),
        (
            lambda folder: edit(source_of(folder), "train_gpt ", "train_gpt_ "),
            "A0-seed1.txt.gz: its source was altered: the source in ",
        ),
        (
            lambda folder: (hold_whole_source(folder), edit(source_of(folder), "import torch", "import numpy")),
            "A0-seed1.txt.gz: its source was altered: the source in ",
        ),
        (
            lambda folder: source_of(folder).write_text(source_of(folder).read_text() + "x\n"),
            "has a line that is no module and its SHA-256",
        ),
        (
            lambda folder: source_of(folder).write_bytes(b"\xff"),
            "A0-seed1.txt.gz: its source is missing: there is no text",
        ),
        (lambda folder: name_another_source(folder), "ran different code"),
        (
            lambda folder: (folder / "source-0123456789ab.txt").write_text("x"),
            "source-0123456789ab.txt is no run's source",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats["arms"][1]["time"].update(mean=0.5)),
            "arms[1].time.mean is not what the logs say",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats["rules"].update(target=9.0)),
            "p_target is not what the logs say",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats.update(hardware="8 x H100")),
            "stats.json: hardware is not what the logs say",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats.update(extra=1)),
            "stats.json: extra is not what the logs say",
        ),
        (lambda folder: change_stats(folder, lambda stats: stats.update(arm="third")), "stats.json: damaged"),
        (lambda folder: change_stats(folder, lambda stats: stats.pop("what")), "stats.json: damaged"),
        (lambda folder: change_stats(folder, lambda stats: stats["arms"][0].pop("folder")), "stats.json: damaged"),
        (lambda folder: (folder / "stats.json").write_text("[]"), "stats.json holds a JSON list, not an object"),
        (
            lambda folder: change_stats(folder, lambda stats: stats.update(format="knotgpt-record-1")),
            "its format is knotgpt-record-1, not knotgpt-record-2",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats.update(track="no")),
            "damaged: there is no track no;",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats["arms"][1]["losses"].pop()),
            "an arm has not as many losses and times as seeds",
        ),
        (
            lambda folder: change_stats(folder, lambda stats: stats["arms"][1]["time"].update(mean="fast")),
            "stats.json: damaged: arms[1].time.mean must be a number",
        ),
        (lambda folder: (folder / "stats.json").unlink(), "no stats.json"),
        (lambda folder: (folder / "README.md").unlink(), "no README.md"),
        (
            lambda folder: folder.rename(folder.with_name("2020-01-01_Third")),
            "_Second; give the folder its name back",
        ),
    ],
)
def test_spoilt_records(two_records, run, spoil, message):
    spoil(two_records)
    code, out, err = run("check")
    faults = [line for line in out.splitlines() if line.startswith("error: ")]
    assert err == "" and len(out.splitlines()) == 4
    if message:
        assert code == 1 and message in faults[0]
    else:
        assert code == 0  # without the JSON, a loss on the way is no part of the statistics


@pytest.mark.parametrize("spoil, message", [
    (lambda text: text.unlink(), "A0-seed1.txt.gz: its source is missing: there is no text {};"),
    (lambda text: text.write_bytes(b"\xff"), "A0-seed1.txt.gz: its source is missing: there is no text {};"),
    (lambda text: edit(text, "torch", "numpy"), "A0-seed1.txt.gz: its source was altered: {} has not the SHA-256 "),
])
def test_a_spoilt_text_of_a_module(root, two_records, run, add, write_arm, spoil, message):
    """Each record that needs it says so in one line, and nothing is added beside a text that was altered."""
    text = text_of(two_records)
    spoil(text)
    code, out, err = run("check")
    faults = [line for line in out.splitlines() if line.startswith("error: ")]
    assert (code, err, len(faults), len(out.splitlines())) == (1, "", 2, 4)
    assert all(message.format(text) in fault for fault in faults)
    if text.exists():
        before = contents(root)
        assert f" {text}: " in refused(add(write_arm("c/baseline", ms_per_step=50.0), "Third"), root, before)
        assert not list(root.glob("cpu/.*"))


def test_record_that_is_not_faster(root, write_arm, add, run, tmp_path):
    """Records are checked against the one before them, not only when they are added."""
    add(write_arm("a/baseline"), "First")
    other = tmp_path / "other"
    shutil.copytree(root, other)
    shutil.rmtree(other / "cpu")
    for name, speed, message in (("Hardly", 99.95, "not faster than cpu/"), ("Even", 100.0, "p = 0.50")):
        assert (
            main(
                [
                    "--records",
                    str(other),
                    "add",
                    str(write_arm(f"{name}/baseline", ms_per_step=speed)),
                    "--name",
                    name,
                    "--track",
                    "cpu",
                    "--what",
                    "x",
                ]
            )
            == 0
        )
        folder = root / "cpu" / record(other, name).name
        record(other, name).rename(folder)
        run("render")
        code, out, _ = run("check")
        assert code == 1 and f"{name}: not faster than" in out and message in out
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["README.md", "results.md"])
def test_tables_out_of_date(root, two_records, run, name):
    page = next(page for page in pages_of(root) if page.name == name)
    edit(page, "0.72", "0.71")
    page.write_text(page.read_text() + "\nby hand\n")
    code, out, _ = run("check")
    assert code == 1 and f"{name}: the tables are not those of the records; run ./run.sh board render" in out
    assert run("render") == (0, "", "") and run("check")[0] == 0
    assert page.read_text().endswith(README[README.index(END):] + "\nby hand\n")


def test_results_by_variant(root, write_arm, add, run):
    """The standing record, and the arms of all comparisons under their first variants."""
    add(write_arm("a/baseline"), "First")
    write_arm("b/baseline", seeds=(1, 2, 3, 4, 5))
    write_arm("b/wide", loss=0.1, seeds=SIX, variant=["wide:hidden=8+deep"])
    assert add(write_arm("b/thin", seeds=SIX, apart=0.01, mlp_hidden=64), "Several", "--negative")[0] == 0
    text = (root.parent / "docs/results.md").read_text()
    link = r"\[Several\]\(../records/negative/[\d-]+_Several/README.md\)"
    machine = "1 x x86_64, 2 threads"
    assert re.search(rf"\n\| cpu \| {TARGET} \| 0.80 ± 0.00 s \| .* \| 4 \| {machine} \| \[First\]\(.*\) \|\n", text)
    wide = rf"### wide\n\n.*\n.*\n\| wide \| .* \| \+0.1.* \| worse \| 6, baseline 5 \| {machine} \| {link} \|\n"
    assert re.search(wide, text)
    assert re.search(rf"### baseline\n\n.*\n.*\n\| thin \| .* \| undecided \| .* \| {link} \|\n", text)
    assert text.index("### wide") < text.index("### baseline")


def test_readme_without_marks(root, two_records, run, add, write_arm):
    (root / "README.md").write_text("# Records\n")
    assert "needs the lines" in run("check")[1]
    code, _, err = run("render")
    assert code == 1 and "README.md: needs the lines <!-- tables" in err
    before = contents(root)
    assert "needs the lines" in refused(add(write_arm("c/baseline", ms_per_step=50.0), "Third"), root, before)
    (root / "README.md").unlink()
    assert "README.md: cannot be read" in run("render")[2]


def test_text_in_tables_is_plain(root, write_arm, run):
    write_arm("a/baseline")
    write_arm("a/<b>_x|y", loss=0.1)
    what = "a | b <script>\n*new* [x](y)"
    run("add", root.parent / "a", "--name", "Marks", "--track", "cpu", "--what", what, "--negative")
    for page, cells in zip(pages_of(root), (5, 7)):
        row = next(line for line in page.read_text().splitlines() if line.startswith(r"| \<b>\_x\|y"))
        assert len(re.findall(r"(?<!\\)\|", row)) == cells + 1
    lines = (root / "README.md").read_text().splitlines()
    assert lines[lines.index("#### Marks") + 2] == r"a \| b \<script> \*new\* \[x\](y)"


# ---- the repository's own

def test_records_of_this_repository(capsys):
    assert main(["check"]) == 0, capsys.readouterr().out


def test_a_page_that_is_not_current_is_found():
    """Each page says what its records say, rendered in memory, and a changed number would be seen."""
    records = read_records(RECORDS)
    for page, make in pages_of(RECORDS).items():
        paragraphs = make(records)
        assert is_current(page, paragraphs), f"{page} is not current; run ./run.sh board render"
        assert not is_current(page, [*paragraphs[:-1], paragraphs[-1].replace("1", "2")])


def test_as_a_module_on_a_console_that_is_not_utf_8(write_arm):
    source = write_arm("a/größer")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "records.leaderboard", "stats", os.fsencode(source)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"" and b"er: runs 4, different sources 1" in done.stdout


# ---- statistics of a folder

def test_stats(write_arm, run, tmp_path):
    write_arm("a/baseline")
    code, out, _ = run("stats", tmp_path / "a" / "baseline")
    losses = [TARGET - 0.02 + noise for noise in SPREAD]
    assert code == 0 and "runs 4, different sources 1" in out
    numbers = f"mean {sum(losses) / 4:.5f}  sd 0.00084  min {min(losses):.5f}  max {max(losses):.5f}"
    assert re.search(rf"val_loss +n 4  {numbers}  p \S+ \(one-sided t test, mean below {TARGET:g}\)", out)
    assert re.search(r"train_seconds +n 4  mean 0.800  sd 0.001  min 0.799  max 0.801\n", out)
    write_arm("a/other", source="import numpy")
    assert len(run("stats", tmp_path / "a")[1].splitlines()) == 6


def test_stats_of_one_foreign_log(tmp_path, run):
    (tmp_path / "log.txt").write_text(
        f"import os\n{RULE}\nRunning PyTorch 2.11\n{RULE}\n"
        "step:0/1 val_loss:3.0 train_time:0.000s step_avg:nanms\n"
        "step:1/1 val_loss:2.00000 train_time:5.125s step_avg:5.00ms\n"
    )
    assert run("stats", tmp_path, "--target", "3.28") == (
        0,
        f"{tmp_path}: runs 1, different sources 1\n  val_loss       n 1  mean 2.00000  sd -  min 2.00000  max 2.00000\n"
        "  train_seconds  n 1  mean 5.125  sd -  min 5.125  max 5.125\n",
        "",
    )
    (tmp_path / "log.txt").write_text("s:0 tel:10.968871\n")
    code, _, err = run("stats", tmp_path)
    assert code == 1
    assert err.startswith("records.leaderboard: error: ")
    assert "no log of this trainer or modded-nanogpt" in err


def rows_of(out: str) -> dict[str, tuple[int, float]]:
    """{arm: (n, mean loss)} of what stats printed."""
    found = re.findall(r"^\S+, (.*): runs (\d+), .*\n +val_loss +n \d+  mean (\S+)", out, re.M)
    return {name: (int(n), float(mean)) for name, n, mean in found}


def test_stats_of_a_comparison_has_a_row_for_each_arm(write_arm, run, tmp_path):
    """Its logs lie in one folder. Arms have the comparison's names or, in that folder itself, variants and settings."""
    arms = dict(baseline=(-0.02, dict()), wide=(-0.05, dict(variant=["wide"])), thin=(0.1, dict(mlp_hidden=64)))
    for name, (loss, options) in arms.items():
        write_arm(f"source/{name}", loss=loss, **options)
    logs = tmp_path / "compared" / "logs"
    logs.mkdir(parents=True)
    for path in (tmp_path / "source").rglob("*_?.*"):
        shutil.copy(path, logs)
    runs = {name: [dict(seed=seed, log=f"{name}_{seed}.txt") for seed in (1, 2, 3, 4)] for name in arms}
    results = dict(
        format="knotgpt-comparison-1",
        settings={},
        arms=[dict(name=f"the {name}", options=[], runs=runs[name]) for name in arms],
    )
    (tmp_path / "compared" / "results.json").write_text(json.dumps(results))
    means = {name: (4, pytest.approx(TARGET + loss + sum(SPREAD) / 4, abs=1e-5)) for name, (loss, _) in arms.items()}

    code, out, err = run("stats", tmp_path / "compared")
    assert (code, err) == (0, "") and rows_of(out) == {f"the {name}": mean for name, mean in means.items()}
    code, out, err = run("stats", logs)
    assert (code, err) == (0, "")
    assert rows_of(out) == {
        "baseline --mlp_hidden 512": means["baseline"],
        "wide --mlp_hidden 512": means["wide"],
        "baseline --mlp_hidden 64": means["thin"],
    }


def test_stats_of_a_record_has_its_arms_names(root, write_arm, add, run):
    write_arm("a/baseline")
    add(write_arm("a/other", loss=0.1), "Two", "--negative")
    code, out, _ = run("stats", record(root, "Two", "negative"))
    assert code == 0 and rows_of(out).keys() == {"baseline", "other"}


def test_stats_goes_on_without_the_logs_that_are_no_good(write_arm, run, tmp_path):
    folder = write_arm("a/baseline") / "baseline"
    edit(folder / "baseline_3.txt", "step:5/8 train_time", "step:5/8 train_t")
    (folder / "requirements.txt").write_text("numpy\n")
    code, out, err = run("stats", folder)
    assert (code, err) == (0, "") and "runs 3, different sources 1" in out
    assert re.findall(r"^  left out: (\S+): (.{12})", out, re.M) == [
        (f"{folder}/baseline_3.txt", "damaged: lin"),
        (f"{folder}/requirements.txt", "no log of th"),
    ]


def test_stats_says_what_must_be_known_of_others_runs(tmp_path, run):
    times = [5 * step if step < 11 else 5 * (step - 10) for step in range(1, 13)]
    lines = [f"step:{step}/13 train_time:{ms}ms step_avg:5.00ms" for step, ms in enumerate(times, 1)]
    for name, loss in (("a", 3.0), ("b", 3.1)):
        last = f"step:12/13 val_loss:{loss} train_time:10ms step_avg:5.00ms\n"
        text = "\n".join(["import os", "=" * 100, "Running PyTorch 2.9", "=" * 100, *lines, last])
        (tmp_path / f"{name}.txt").write_text(text)
    assert run("stats", tmp_path) == (
        0,
        f"""{tmp_path}: runs 2, different sources 1
  val_loss       n 2  mean 3.05000  sd 0.07071  min 3.00000  max 3.10000
  train_seconds  n 2  mean 0.010  sd 0.000  min 0.010  max 0.010
  2 of 2: the clock starts at step 11
  2 of 2: ends at step 12 of 13
""",
        "",
    )
    for path in tmp_path.glob("*.txt"):
        edit(
            path, "train_time:10ms step_avg:5.00ms\nstep:12/13 val", "train_time:6ms step_avg:5.00ms\nstep:12/13 val"
        )
        edit(path, "step:11/13 train_time:5ms", "step:11/13 train_time:4ms")
        edit(path, "step:12/13 train_time:6ms", "step:12/13 train_time:3ms")
    code, out, _ = run("stats", tmp_path)
    assert code == 0 and "  train_seconds  not known\n  2 of 2: no time is known\n" in out and "mean 3.05000" in out
