"""
compare.py: the plan with a stand-in for training that copies prepared logs. Real runs, which are killed, are in
faults/test_compare.py.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compare
import records.identity as identity
import records.processes
import records.report
from compare import BUDGET_SEED, SWEEP_SEED, Comparison, main
from data.shards import write_meta, write_shard
from tests.records.conftest import log_lines
from train_gpt import TRACKS, adopt_vocabulary, parse_config

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """
import json, os, pathlib, shutil, sys
prepared, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
given = dict(zip(argv[::2], argv[1::2]))
with open(prepared / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
run = given["--run_id"]
(prepared / "environment.json").write_text(json.dumps(dict(os.environ)))
if (prepared / (run + ".fault")).exists():
    sys.exit("train_gpt.py: error: " + (prepared / (run + ".fault")).read_text())
print("step 1/2  loss 3.0", flush=True)
for kind in ("txt", "json"):
    shutil.copy(prepared / f"{run}.{kind}", pathlib.Path(given["--log_dir"]) / f"{run}.{kind}")
"""


def module_of(file):
    """The module that a file of this repository is."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One for all tests, so that equal command lines are parsed once. A test that changes a shard puts it back."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "corpus"
    folder.mkdir()
    for split, tokens in (("train", 40_000), ("val", 3_000)):
        write_shard(folder / f"x_{split}_000000.bin", np.append(256, rng.integers(97, 105, tokens)))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


@pytest.fixture
def stage(tmp_path, monkeypatch, corpus):
    """
    stage.prepare(run, loss) or stage.prepare(run, fault=text), then stage.call(arms and options) -> exit code;
    stage.calls(): the trainer's arguments. A prepared log has the configuration of the command line that would have
    made it, and the source of its arm.
    """

    class Stage:
        folder, prepared, runs, data = tmp_path / "out", tmp_path / "prepared", {}, corpus
        faults = {}  # variant: what variants.check finds
        parse = staticmethod(compare.parse_options)

        def prepare(self, run, loss=1.0, fault=None, ms=100.0, **facts):
            (self.prepared / f"{run}.fault").unlink(missing_ok=True)
            if fault:
                (self.prepared / f"{run}.fault").write_text(fault)
            self.runs[run] = dict(loss=loss, ms=ms, facts=facts)

        def write(self, comparison, job, argv):
            run = self.runs[job.name]
            at = argv.index("--seed")
            own = dict(zip(argv[at::2], argv[at + 1 :: 2]))
            config = replace(
                self.parse(argv[:at]), seed=int(own["--seed"]), run_id=own["--run_id"], log_dir=own["--log_dir"]
            )
            adopt_vocabulary(config)
            files = identity.source_of(job.arm.variant)
            texts = {module_of(file): (ROOT / file).read_text(encoding="utf-8") for file in files}
            facts = comparison.machine(config) | dict(val_sha256=comparison.plan["data"][config.data]["val"])
            facts |= dict(val_tokens=64, seed=config.seed, target=0.0) | run["facts"]
            facts["config"] = json.loads(json.dumps(asdict(config)))
            lines, saved = log_lines(
                {0: 5.0, 1: 2 * run["loss"], 2: run["loss"]},
                run_id=job.name,
                ms_per_step=run["ms"],
                source=texts.pop("train_gpt"),
                modules=texts.items(),
            )
            saved |= facts
            at = next(i for i, line in enumerate(lines) if line.startswith("facts: "))
            lines[at] = f"facts: {json.dumps(json.loads(lines[at][7:]) | facts)}"
            (self.prepared / f"{job.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (self.prepared / f"{job.name}.json").write_text(json.dumps(saved))

        def call(self, *argv, folder=None, options=()):
            trainer = ["--data", str(self.data), "--steps", "2", *options]
            return main([*argv, "-o", str(folder or self.folder), "--", *trainer])

        def calls(self):
            file = self.prepared / "calls.jsonl"
            calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            return [dict(zip(call[::2], call[1::2])) for call in calls]

        def results(self, folder=None):
            return json.loads(((folder or self.folder) / "results.json").read_text())

    stage = Stage()
    stage.prepared.mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    original = Comparison.command

    def command(self, job):
        argv = original(self, job)[2:]
        if job.name in stage.runs:
            stage.write(self, job, argv)
        return [sys.executable, "-IS", str(tmp_path / "stand_in.py"), str(stage.prepared), *argv]

    monkeypatch.setattr(Comparison, "command", command)
    monkeypatch.setattr(records.processes, "POLL", 0.005)  # a stand-in ends in less than a tenth of a second
    check = SimpleNamespace(faults_of=lambda config: stage.faults.get(config.variant, []))
    monkeypatch.setitem(sys.modules, "variants.check", check)
    monkeypatch.chdir(tmp_path)  # ./comparisons
    stage.draw = records.report.draw
    monkeypatch.setattr(records.report, "draw", lambda *parts: None)  # most tests need no picture
    return stage


def prepare_all(stage, slug, losses, first=1, **facts):
    for seed, loss in enumerate(losses, first):
        stage.prepare(f"{slug}-seed{seed}", loss, **facts)


def test_runs_take_turns_and_the_report_has_a_verdict(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.00, 1.01, 0.99, 1.02, 0.98])
    prepare_all(stage, "A1-swiglu_mlp-lr_matrix-0.02", [0.90, 0.91, 0.89, 0.93, 0.87])
    assert stage.call("baseline", "swiglu_mlp --lr_matrix 0.02", "--seeds", "5") == 0
    calls = stage.calls()
    assert [(call.get("--variant"), call["--seed"]) for call in calls] == [
        (variant, seed) for seed in "12345" for variant in (None, "swiglu_mlp")
    ]
    assert calls[1]["--lr_matrix"] == "0.02"
    assert "--lr_matrix" not in calls[0]
    assert {call["--track"] for call in calls} == {"cpu"}
    out = capsys.readouterr().out
    assert "run 10/10: swiglu_mlp --lr_matrix 0.02, seed 5" in out
    assert "swiglu_mlp --lr_matrix 0.02 is better than baseline by 0.1000 nats (95 % " in out
    assert out.index("is better than") < out.index("\narm  ") < out.index("report: ")
    assert re.search(r"0\.9000 ± 0\.0224  5 of 5  -0\.1000", out)
    results = stage.results()
    assert results["settings"]["order"][:2] == [["baseline", 1], ["swiglu_mlp --lr_matrix 0.02", 1]]
    assert results["settings"]["target"] == TRACKS["cpu"]["target"]
    assert results["settings"]["margin"] == pytest.approx(0.004), "half a per cent of the target"
    assert results["settings"]["company"] == []
    assert results["settings"]["overhead"]["wall_seconds"] >= results["settings"]["overhead"]["runs_seconds"] > 0
    assert {path.name for path in stage.folder.iterdir()} >= {
        "README.md",
        "report.html",
        "curves.png",
        "results.json",
        "logs",
    }


def test_a_run_inherits_the_bound_on_spinning_and_threads_are_an_arms_own(stage):
    texts = ["baseline", "baseline --threads 3"]
    assert [arm.options for arm in compare.parse_arms(texts, 1, [])] == [[], ["--threads", "3"]]
    prepare_all(stage, "A0-baseline", [1.0])
    prepare_all(stage, "A1-baseline-threads-3", [1.0])
    assert stage.call(*texts, "--seeds", "1") == 0
    inherited = json.loads((stage.prepared / "environment.json").read_text())
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    spin = [inherited.get(name) for name in names]
    assert spin == [os.environ.get(name) for name in names] and any(spin)
    usual, three = (identity.machine_facts("cpu", threads, 1) for threads in (0, 3))
    assert three["threads"] == 3 and three["device"].endswith(", 3 threads")
    assert usual["threads"] == torch.get_num_threads()
    assert stage.results()["environment_differs"]["device"] == [usual["device"], three["device"]]


def test_the_picture_may_have_a_logarithmic_axis(stage, monkeypatch):
    monkeypatch.setattr(records.report, "draw", stage.draw)
    prepare_all(stage, "A0-baseline", [1.0])
    prepare_all(stage, "A1-baseline-2", [1.1], first=2)
    pictures = []
    for options in ((), ("--log-x",)):
        assert stage.call("baseline", "baseline", "--seeds", "1", *options) == 0
        pictures.append((stage.folder / "curves.png").read_bytes())
    assert pictures[0] != pictures[1] and len(stage.calls()) == 2


def test_finished_runs_are_neither_lost_nor_repeated(stage):
    for slug in ("A0-baseline", "A1-swiglu_mlp"):
        prepare_all(stage, slug, [1.0, 1.1])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2") == 0
    log = stage.folder / "logs/A1-swiglu_mlp-seed1.txt"
    cut = log.read_text().splitlines(keepends=True)
    log.write_text("".join(cut[:-6]))  # killed in its last step
    saved = json.loads(log.with_suffix(".json").read_text())
    log.with_suffix(".json").write_text(json.dumps(saved | dict(status="running")))
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2") == 0
    assert [call["--run_id"] for call in stage.calls()[4:]] == ["A1-swiglu_mlp-seed1"]
    assert log.read_text() == "".join(cut)


def test_a_checkpoint_is_gone_on_from(stage):
    prepare_all(stage, "A0-baseline", [1.0])
    prepare_all(stage, "A1-baseline-2", [1.1], first=2)
    logs = stage.folder / "logs"
    logs.mkdir(parents=True)
    (logs / "A0-baseline-seed1.txt").write_text("cut off")
    (logs / "A0-baseline-seed1.pt").write_bytes(b"")
    assert stage.call("baseline", "baseline", "--seeds", "1") == 0
    assert stage.calls()[0]["--resume"] == str(logs / "A0-baseline-seed1.pt")
    assert not (logs / "A0-baseline-seed1.pt").exists()


def test_a_failing_arm_is_reported_and_the_others_go_on(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.0, 1.1])
    stage.prepare("A1-swiglu_mlp-seed1", fault="the training loss is nan at step 7")
    stage.prepare("A1-swiglu_mlp-seed2", 1.2)
    call = ("baseline", "swiglu_mlp", "--seeds", "2")
    assert stage.call(*call) == 0
    assert (
        "failed: the training loss is nan at step 7 (exit code 1; all of its output: logs/A1-swiglu_mlp-seed1.out)"
        in capsys.readouterr().out
    )
    arm = stage.results()["arms"][1]
    assert arm["status"] == "1 of 2 finished"
    assert "the training loss is nan" in (stage.folder / "README.md").read_text()
    assert stage.call(*call) == 0 and len(stage.calls()) == 4, "a failure is not tried again by itself"
    stage.prepare("A1-swiglu_mlp-seed1", 1.3)
    assert stage.call(*call, "--retry") == 0
    assert len(stage.calls()) == 5
    assert stage.results()["arms"][1]["status"] == "complete"


def test_an_arm_given_again_has_seeds_of_its_own(stage):
    prepare_all(stage, "A0-baseline", [1.0, 1.01])
    prepare_all(stage, "A1-baseline-2", [1.005, 1.012], first=3)
    assert stage.call("baseline", "baseline", "--seeds", "2") == 0
    assert [call["--seed"] for call in stage.calls()] == ["1", "3", "2", "4"]
    assert stage.results()["arms"][1]["vs_baseline"]["loss"]["verdict"] == "too few pairs"


def test_a_sweep_chooses_each_arms_rates_on_other_seeds(stage):
    best = {"baseline": 1, "swiglu_mlp": 2}
    for index, name in enumerate(best):
        prepare_all(stage, f"A{index}-{name}", [1.0, 1.1])
        for factor in (0.5, 1.0, 2.0):
            stage.prepare(f"A{index}-{name}-lr{factor}-seed{SWEEP_SEED}", 1.5 + abs(factor - best[name]))
    stage.prepare(f"A1-swiglu_mlp-lr0.5-seed{SWEEP_SEED}", fault="the training loss is inf")
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2", "--sweep", "0.5,1,2") == 0
    tries, reported = stage.calls()[:6], stage.calls()[6:]
    assert {call["--seed"] for call in tries} == {str(SWEEP_SEED)}
    assert {call["--seed"] for call in reported} == {"1", "2"}
    lr = TRACKS["cpu"] | dict(lr_matrix=0.03)
    for call in reported:
        rates = {name: float(call[f"--{name}"]) for name in compare.RATES if f"--{name}" in call}
        assert rates.get("lr_matrix") == (pytest.approx(2 * lr["lr_matrix"]) if "--variant" in call else None)
        assert len(rates) == (4 if "--variant" in call else 0)
    sweep = stage.results()["settings"]["sweep"]
    assert {arm: entry["chosen"] for arm, entry in sweep.items()} == best
    assert sweep["swiglu_mlp"]["tries"][0]["losses"] == [None]


def test_equal_time_is_what_the_first_arm_takes(stage):
    stage.prepare(f"A0-baseline-budget-seed{BUDGET_SEED}", 1.0, ms=2500.0)
    prepare_all(stage, "A0-baseline", [1.0])
    prepare_all(stage, "A1-swiglu_mlp", [1.1])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "1", "--budget", "time") == 0
    assert [float(call.get("--time_budget", 0)) for call in stage.calls()] == [0, 5, 5]
    assert stage.results()["settings"]["budget_seconds"] == 5


def fault(capsys, text):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("compare.py: error: ") and re.search(text, error), error


@pytest.mark.parametrize(
    "argv, text",
    [
        (["baseline", "no_such_thing"], "arm 'no_such_thing': unknown variant 'no_such_thing'; there are"),
        (
            ["baseline", "swiglu_mlp --no_such_option 1"],
            "arm 'swiglu_mlp --no_such_option 1': train_gpt.py does not take these options",
        ),
        (["baseline", "swiglu_mlp --seed 3"], "--seed is set for every run; leave it out"),
        (["baseline", "swiglu_mlp --dry_run"], "--dry_run is set for every run; leave it out"),
        (["baseline", "baseline 'x"], 'arm "baseline \'x": No closing quotation; close its quotation marks'),
        (["baseline", "--heads 3"], "does not begin with a name|arguments are required"),
        (["baseline", "baseline --head_dim 3"], "arm 'baseline --head_dim 3': .*--head_dim 3 is not a multiple of 4"),
        (
            ["baseline", "baseline --val_tokens 64"],
            "is validated on 64 tokens, 'baseline' on 65,536; give --val_tokens to all",
        ),
        (["baseline"], "one arm, 'baseline', has nothing to be compared with; name two or more"),
        (["baseline", "baseline", "--track", "no_such_track"], "unknown track 'no_such_track'"),
        (["baseline", "baseline", "--seeds", "0"], "--seeds must be at least 1 and at most 10,000, got 0"),
        (["baseline", "baseline", "--seeds", str(10**9)], "at most 10,000, got 1000000000"),
        ([*["baseline"] * 101, "--seeds", "10000"], "given too often: its seeds would pass"),
        (["baseline", "baseline", "--sweep-seeds", str(10**9)], "--sweep-seeds must be at least 1 and at most 1,000"),
        (["baseline", "baseline", "--ranks", str(10**6)], "--ranks must be at least 1 and at most"),
        (["baseline", "baseline", "--sweep", "1,-1"], "greater than 0"),
        (["baseline", "baseline", "--sweep", "nan"], "up to 100 factors, all different, greater than 0"),
        (["baseline", "baseline", "--sweep", "inf"], "up to 100 factors"),
        (["baseline", "baseline", "--sweep", "1,1"], "all different"),
        (["baseline", "baseline", "--sweep", ""], "--sweep: invalid numbers value"),
        (["baseline", "baseline", "--sweep", "999999"], "--sweep factor 999999: --lr_matrix must be from 0.0 to"),
        (
            ["baseline", "baseline", "--budget", "time", "--seconds", "nan"],
            "--seconds must be greater than 0 and at most 31,536,000, got nan",
        ),
        (["baseline", "baseline", "--budget", "time", "--seconds", "1e20"], "got 1e\\+20"),
        (["baseline", "baseline", "--seconds", "5"], "belongs to --budget time"),
        (["baseline", "baseline", "--reuse", "r" * 300], "--reuse 'r+': File name too long"),
        (["baseline", "swiglu_mlp", "--max-seeds", "9"], "--max-seeds 9 belongs to --until-decided"),
        (["baseline", "swiglu_mlp", "--until-decided", "--seeds", "9"], "--until-decided exclude each other"),
        (["baseline", "swiglu_mlp", "--until-decided", "--max-seeds", "4"], "at least 5 and at most 200, got 4"),
        (["baseline", "swiglu_mlp", "--until-decided", "--max-seeds", "201"], "at least 5 and at most 200, got 201"),
        (["baseline", "baseline", "--until-decided"], "named twice has seeds of its own; give --seeds"),
        (["baseline", "swiglu_mlp", "--margin", "0"], "--margin must be greater than 0 and at most 100, got 0"),
        (["baseline", "swiglu_mlp", "--margin", "nan"], "--margin must be greater than 0"),
        (["baseline", "swiglu_mlp", "--jobs", "0"], "--jobs must be at least 1 and at most"),
        (["baseline", "swiglu_mlp", "--hang-seconds", "-1"], "--hang-seconds must be at least 0"),
        (["baseline", "swiglu_mlp", "--hang-seconds", "nan"], "--hang-seconds must be at least 0"),
        (["baseline", "swiglu_mlp", "--add-arm", "baseline"], "--add-arm takes the folder of one comparison, got 2"),
        (["no_such_folder", "--add-arm", "swiglu_mlp"], "no_such_folder/plan.json: .*give the folder of a comparison"),
    ],
)
def test_bad_arguments(stage, capsys, argv, text):
    try:
        assert stage.call(*argv) == 1
        fault(capsys, text)
    except SystemExit as stop:  # argparse's own
        assert stop.code == 2 and re.search(text, capsys.readouterr().err)
    assert not stage.folder.exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_folders_that_cannot_be(stage, capsys, tmp_path, dry):
    (tmp_path / "file").write_text("")
    for folder, text in ((tmp_path / ("o" * 300), "File name too long"), (tmp_path / "file", "is a file")):
        assert stage.call("baseline", "baseline", *dry, folder=folder) == 1
        fault(capsys, text)


def test_no_data(stage, capsys, tmp_path):
    assert main(["baseline", "baseline", "-o", str(stage.folder), "--", "--data", str(tmp_path)]) == 1
    fault(capsys, "no train shards")


def test_another_plan_other_code_other_data_or_an_altered_log_is_refused(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.0])
    prepare_all(stage, "A1-baseline-2", [1.1], first=2)
    call = ("baseline", "baseline", "--seeds", "1")
    assert stage.call(*call) == 0
    assert stage.call(*call[:2], "--seeds", "2") == 1
    fault(capsys, r"holds another plan \(seeds: 1, now 2\)")
    plan = json.loads((stage.folder / "plan.json").read_text())
    (stage.folder / "plan.json").write_text(json.dumps(plan | dict(source=plan["source"] | {"train_gpt.py": "0"})))
    assert stage.call(*call) == 1
    fault(capsys, r"train_gpt\.py changed since")
    (stage.folder / "plan.json").write_text(json.dumps(plan))
    shard = next(stage.data.glob("*train*.bin"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert stage.call(*call) == 1
    fault(capsys, "the shards of .*corpus changed since")
    shard.write_bytes(content)
    log = stage.folder / "logs/A0-baseline-seed1.txt"
    before = log.read_text()
    log.write_text(before.replace("val_loss:1.0000", "val_loss:0.9000"))
    assert stage.call(*call) == 1
    fault(capsys, "A0-baseline-seed1.* was altered|altered: restore it")
    log.write_text(before)
    assert stage.call(*call) == 0 and len(stage.calls()) == 2


def test_two_comparisons_do_not_share_a_folder(stage, capsys, monkeypatch):
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    stage.folder.mkdir()
    with open(stage.folder / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert stage.call("baseline", "baseline", "--seeds", "1") == 1
    fault(capsys, "another comparison uses")


# ---- Until decided, several at once, hanging runs

def test_a_decided_arm_gets_no_more_runs(stage, capsys):
    """One arm is far better, one is like the baseline; the third differs, but by less than eight pairs can tell."""
    rng = np.random.default_rng(3)
    base = 1 + rng.normal(0, 0.05, 8)
    noise = rng.normal(0, 0.001, (3, 8))
    prepare_all(stage, "A0-baseline", base)
    prepare_all(stage, "A1-swiglu_mlp", base - 0.1 + noise[0])
    prepare_all(stage, "A2-parallel_residual", base + noise[1] / 10)
    prepare_all(stage, "A3-forgetting_attention", base - 0.001 + noise[2])
    call = ["baseline", "swiglu_mlp", "parallel_residual", "forgetting_attention", "--until-decided"]
    call += ["--max-seeds", "8", "--margin", "0.004"]
    assert stage.call(*call) == 0
    out = capsys.readouterr().out
    results = stage.results()
    design = results["settings"]["design"]
    assert design["looks"] == [4, 5, 6, 7, 8] and design["levels"][0] < 0.01 / 3
    looks = [arm["vs_baseline"]["loss"]["look"] for arm in results["arms"][1:]]
    assert [look["word"] for look in looks[:2]] == ["better", "equivalent"]
    assert [look["pairs"] for look in looks[:2]] == [4, 4]
    assert [len(arm["runs"]) for arm in results["arms"][1:]] == [look["pairs"] for look in looks]
    assert len(results["arms"][0]["runs"]) == max(look["pairs"] for look in looks)
    assert len(stage.calls()) == sum(len(arm["runs"]) for arm in results["arms"])
    assert "swiglu_mlp: better after 4 pairs" in out
    assert "swiglu_mlp is better than baseline by 0." in out
    assert "parallel_residual is equivalent to baseline within 0.004 nats" in out

    # the same command changes nothing, another number of seeds is another design
    before = (stage.folder / "results.json").read_text()
    calls = len(stage.calls())
    assert stage.call(*call) == 0 and len(stage.calls()) == calls
    after = json.loads((stage.folder / "results.json").read_text())
    assert [arm["vs_baseline"] for arm in after["arms"]] == [arm["vs_baseline"] for arm in json.loads(before)["arms"]]
    assert stage.call(*call[:-4], "--max-seeds", "9", "--margin", "0.004") == 1
    fault(capsys, r"holds another plan \(seeds: 8, now 9\)")
    text = (stage.folder / "README.md").read_text()
    assert "Until decided: looks after 4, 5, 6, 7, 8 pairs." in text and "better after 4 pairs." in text


def test_an_arm_that_always_fails_is_given_up_at_the_first_look(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.0, 1.1, 1.2, 1.3, 1.4])
    for seed in range(1, 6):
        stage.prepare(f"A1-swiglu_mlp-seed{seed}", fault="out of memory")
    assert stage.call("baseline", "swiglu_mlp", "--until-decided", "--max-seeds", "5") == 0
    assert len(stage.calls()) == 8
    assert "swiglu_mlp: no run of it finished after 4 pairs" in capsys.readouterr().out
    assert "no verdict, because swiglu_mlp has no finished run" in (stage.folder / "README.md").read_text()


@pytest.mark.parametrize(
    "jobs, arms, batches", [(2, 2, [2, 2, 2]), (4, 2, [4, 2]), (2, 3, [2, 1] * 3), (1, 2, [1] * 6)]
)
def test_runs_of_a_turn_are_started_together(stage, monkeypatch, jobs, arms, batches):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    names = ["baseline", "swiglu_mlp", "parallel_residual"][:arms]
    for index, name in enumerate(names):
        prepare_all(stage, f"A{index}-{name}", [1.0, 1.1, 1.2])
    started = []
    original = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, missing, total: (
        started.append([job.seed for _, job in missing]), original(self, missing, total)))
    assert stage.call(*names, "--seeds", "3", "--jobs", str(jobs)) == 0
    assert [len(seeds) for seeds in started] == batches
    calls = stage.calls()
    assert len(calls) == 3 * arms and sorted(call["--seed"] for call in calls) == sorted("123" * arms)
    assert ("--threads" in calls[0]) == (jobs > 1), "each has its share of the cores"
    results = stage.results()
    company = {count for *_, count in results["settings"]["company"]}
    assert company == set(batches) - {1}

    # times count where company was equal
    left_out = [line for arm in results["arms"][1:] for line in arm["vs_baseline"]["time"]["left_out"]]
    unequal = [line for line in left_out if "runs were started together with this one" in line]
    assert len(unequal) == (3 if (jobs, arms) == (2, 3) else 0)


HANG = """
import pathlib, sys, time
argv = sys.argv[1:]
given = dict(zip(argv[::2], argv[1::2]))
log = pathlib.Path(given["--log_dir"]) / (given["--run_id"] + ".txt")
with open(log, "w") as file:
    for step in range(1, 4):
        print(f"step:{step}/9 train_time:{step}ms step_avg:1.00ms", file=file, flush=True)
print("step 3/9 loss 1.0", flush=True)
time.sleep(1000)
"""


def test_a_run_that_hangs_is_stopped_and_the_others_go_on(stage, tmp_path, monkeypatch, capsys):
    prepare_all(stage, "A0-baseline", [1.0, 1.1])
    prepare_all(stage, "A1-swiglu_mlp", [1.2, 1.3])
    (tmp_path / "hang.py").write_text(HANG)
    original = Comparison.command

    def command(self, job):
        words = original(self, job)
        return [words[0], str(tmp_path / "hang.py"), *words[4:]] if job.name == "A1-swiglu_mlp-seed1" else words

    monkeypatch.setattr(Comparison, "command", command)
    call = ("baseline", "swiglu_mlp", "--seeds", "2", "--hang-seconds", "0.5")
    assert stage.call(*call) == 0
    out = capsys.readouterr().out
    assert re.search(r"failed: it hung: no step for \d+ s, so it was stopped \(exit code -9; all of its output", out)
    results = stage.results()
    assert results["arms"][1]["status"] == "1 of 2 finished" and "it hung" in results["arms"][1]["errors"][0]
    monkeypatch.setattr(Comparison, "command", original)
    assert stage.call(*call, "--retry") == 0
    assert stage.results()["arms"][1]["status"] == "complete"


def test_a_run_that_compiles_long_does_not_hang(tmp_path):
    """Before the first step it may be silent for longer; then ten usual steps, or what it was silent before, count."""
    log = tmp_path / "run.txt"
    assert records.processes.STARTUP * 120 >= 1800
    log.write_text("facts: {}\nstep:0/9 val_loss:5.0 train_time:0ms step_avg:0.00ms\n")
    assert records.processes.step_seconds(log) is None
    log.write_text("step:1/9 train_time:2000ms step_avg:2000.00ms\nstep:2/9 train_time:5000ms step_avg:2500.00ms\n")
    assert records.processes.step_seconds(log) == 2.5


# ---- For scripts and agents

def test_one_json_object_is_all_of_stdout(stage, capsys):
    losses = [1.00, 1.02, 0.99, 1.03, 0.98, 1.01]
    prepare_all(stage, "A0-baseline", losses)
    prepare_all(stage, "A1-swiglu_mlp", [loss - 0.1 + 0.001 * (-1) ** i for i, loss in enumerate(losses)])
    assert stage.call("baseline", "swiglu_mlp", "--json") == 0
    shown = capsys.readouterr()
    outcome = json.loads(shown.out)
    assert outcome["verdict"] == "better" and outcome["difference"] == pytest.approx(-0.1, abs=0.001)
    low, high = outcome["interval"]
    assert low < -0.1 < high < -0.09 and outcome["p"] < 1e-6
    assert outcome["pairs"] == 6 and outcome["runs"] == 12 and outcome["seconds"] > 0 and outcome["sound"]
    assert outcome["folder"] == str(stage.folder) and outcome["arms"][0]["arm"] == "swiglu_mlp"
    assert outcome["time"]["verdict"] == "equivalent"
    assert "swiglu_mlp is better than baseline" in shown.err

    # the verdict is no fault, and a fault is no verdict
    assert stage.call("baseline", "no_such_thing", "--json") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "unknown variant" in shown.err
    assert stage.call("baseline", "swiglu_mlp", "--json", "--dry-run") == 0
    assert capsys.readouterr().out == ""


def test_an_arm_is_added_to_a_finished_comparison(stage, capsys):
    losses = [1.00, 1.02, 0.99, 1.03, 0.98, 1.01]
    prepare_all(stage, "A0-baseline", losses)
    prepare_all(stage, "A1-swiglu_mlp", [loss - 0.1 + 0.002 * (-1) ** i for i, loss in enumerate(losses)])
    prepare_all(stage, "A2-parallel_residual", [loss + 0.1 + 0.001 * (-1) ** i for i, loss in enumerate(losses)])
    add = ["--add-arm", "parallel_residual", str(stage.folder)]
    assert main(add) == 1
    fault(capsys, "plan.json: ")
    assert stage.call("baseline", "swiglu_mlp") == 0 and len(stage.calls()) == 12
    alone = stage.results()["arms"][1]["vs_baseline"]["loss"]
    assert main(add) == 0
    assert len(stage.calls()) == 18, "only the new arm is trained"
    assert [call["--variant"] for call in stage.calls()[12:]] == ["parallel_residual"] * 6
    results = stage.results()
    words = [arm["vs_baseline"]["loss"]["verdict"] for arm in results["arms"][1:]]
    assert words == ["better", "worse"]
    both = results["arms"][1]["vs_baseline"]["loss"]
    assert both["p"] == alone["p"] and both["p_holm"] >= alone["p_holm"], "corrected for one arm more"
    time = results["arms"][2]["vs_baseline"]["time"]
    assert time["ratio"] is None and "added later" in time["left_out"][0]
    assert "added after the results of the others were known" in (stage.folder / "README.md").read_text()
    capsys.readouterr()

    # the same call changes nothing; an arm of the plan is no new one; code and data are the same
    assert main(add) == 0 and len(stage.calls()) == 18
    assert stage.results()["arms"] == results["arms"]
    assert main(["--add-arm", "swiglu_mlp", str(stage.folder)]) == 1
    fault(capsys, "has an arm 'swiglu_mlp' already")
    plan = json.loads((stage.folder / "plan.json").read_text())
    (stage.folder / "plan.json").write_text(json.dumps(plan | dict(source=plan["source"] | {"train_gpt.py": "0"})))
    assert main(["--add-arm", "forgetting_attention", str(stage.folder)]) == 1
    fault(capsys, r"train_gpt\.py changed since")
    assert len(stage.calls()) == 18


def test_no_arm_is_added_to_a_design_or_a_ledger(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.00, 1.02, 0.99, 1.03, 0.98])
    prepare_all(stage, "A1-swiglu_mlp", [0.9, 0.93, 0.88, 0.94, 0.87])
    assert stage.call("baseline", "swiglu_mlp", "--until-decided", "--max-seeds", "5") == 0
    assert main(["--add-arm", "parallel_residual", str(stage.folder)]) == 1
    fault(capsys, "takes no other arm: its error was divided by its arms beforehand")


def test_the_verdict_on_finished_runs(stage, capsys, tmp_path):
    losses = [1.00, 1.02, 0.99, 1.03, 0.98, 1.01]
    prepare_all(stage, "A0-baseline", losses)
    prepare_all(stage, "A1-swiglu_mlp", [loss - 0.1 + 0.002 * (-1) ** i for i, loss in enumerate(losses)])
    assert stage.call("baseline", "swiglu_mlp") == 0
    trained = stage.results()["arms"][1]["vs_baseline"]["loss"]
    capsys.readouterr()

    # the comparison itself, and its logs in a folder for each arm
    assert main([str(stage.folder), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["verdict"] == "better" and outcome["p"] == pytest.approx(trained["p"]) and outcome["folder"] is None
    for slug, name in (("A0-baseline", "before"), ("A1-swiglu_mlp", "after")):
        (tmp_path / name).mkdir()
        for log in (stage.folder / "logs").glob(f"{slug}-*"):
            (tmp_path / name / log.name).write_bytes(log.read_bytes())
    assert main([str(tmp_path / "before"), str(tmp_path / "after"), "-o", str(tmp_path / "report")]) == 0
    out = capsys.readouterr().out
    assert "after is better than before by 0.1000 nats" in out
    assert (tmp_path / "report/report.html").exists()
    assert main([str(tmp_path / "before")]) == 1
    fault(capsys, "before")
    assert len(stage.calls()) == 12


def test_a_ledger_gives_the_error_and_is_told_what_came_of_it(stage, capsys, tmp_path):
    ledger = tmp_path / "ideas.jsonl"
    losses = [1.00, 1.02, 0.99, 1.03, 0.98, 1.01]
    prepare_all(stage, "A0-baseline", losses)
    prepare_all(stage, "A1-swiglu_mlp", [loss - 0.1 + 0.0002 * (-1) ** i for i, loss in enumerate(losses)])
    prepare_all(stage, "A1-parallel_residual", [loss + 0.003 * (-1) ** i for i, loss in enumerate(losses)])
    call = ("baseline", "swiglu_mlp", "--ledger", str(ledger))
    assert stage.call(*call) == 0 and stage.call(*call) == 0
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [next(iter(line)) for line in lines[1:]] == ["begun", "ended"], "called again it has one entry"
    plan = json.loads((stage.folder / "plan.json").read_text())
    assert 0 < plan["alpha"] <= 0.01 and stage.results()["settings"]["alpha"] == plan["alpha"]
    assert "swiglu_mlp is better than baseline" in capsys.readouterr().out

    # the next one, which a find has made richer
    other = tmp_path / "other"
    assert stage.call("baseline", "parallel_residual", "--ledger", str(ledger), folder=other) == 0
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [next(iter(line)) for line in lines[1:]] == ["begun", "ended"] * 2
    ledger.write_text("no ledger\n")
    assert stage.call("baseline", "parallel_residual", "--ledger", str(ledger), folder=tmp_path / "third") == 1
    fault(capsys, "ideas.jsonl")


# ---- What belongs to an arm

def test_arms_that_look_alike_have_runs_of_their_own(stage):
    texts = [
        "swiglu_mlp:layers=0-3",
        "swiglu_mlp:layers=0,3",
        "swiglu_mlp:layers=0+parallel_residual:layers=3",
        "swiglu_mlp:layers=3",
    ]
    arms = compare.parse_arms(texts, 1, ["--data", str(stage.data)])
    assert arms[0].readable == arms[1].readable and len({arm.slug.lower() for arm in arms}) == 4
    for n, arm in enumerate(arms):
        prepare_all(stage, arm.slug, [1.0 + n / 10])
    assert stage.call(*texts, "--seeds", "1") == 0
    assert len(stage.calls()) == 4
    assert [arm["loss"]["mean"] for arm in stage.results()["arms"]] == pytest.approx([1.0, 1.1, 1.2, 1.3])
    long = compare.parse_arms(["baseline", "baseline" + " --lr_matrix 0.1" * 100], 1, [])[1]
    assert len(f"{long.slug}-lr1e-05-seed{SWEEP_SEED}") < 80


@pytest.mark.parametrize(
    "field, value",
    [("variant", ["parallel_residual"]), ("layers", 5), ("seed", 2), ("no_such_setting", 1), (None, None)],
)
def test_a_log_of_other_settings_is_not_taken(stage, capsys, field, value):
    for slug in ("A0-baseline", "A1-swiglu_mlp"):
        prepare_all(stage, slug, [1.0])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "1") == 0
    log = stage.folder / "logs/A1-swiglu_mlp-seed1.txt"
    lines, saved = log.read_text(encoding="utf-8").split("\n"), json.loads(log.with_suffix(".json").read_text())
    if field:
        at = next(i for i, line in enumerate(lines) if line.startswith("facts: "))
        header = json.loads(lines[at][7:])
        header["config"][field] = saved["config"][field] = value
        lines[at] = f"facts: {json.dumps(header)}"
    else:
        lines.insert(lines.index("# ---- variants.swiglu_mlp") + 1, "# other code")
    log.write_text("\n".join(lines), encoding="utf-8")
    log.with_suffix(".json").write_text(json.dumps(saved))
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "1") == 1
    fault(
        capsys, f"is no run of arm 'swiglu_mlp': its {field} is" if field else r"ran another variants/swiglu_mlp\.py"
    )


def test_arms_that_are_scored_on_different_tokens_stop_after_the_first_of_them(stage, capsys):
    prepare_all(stage, "A0-baseline", [1.0, 1.0])
    prepare_all(stage, "A1-swiglu_mlp", [1.0, 1.0], val_tokens=32)
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2") == 1
    fault(capsys, r"A0-baseline-seed1\.txt was scored on 64 tokens, .*A1-swiglu_mlp-seed1\.txt on 32")
    assert len(stage.calls()) == 2


def test_an_arm_that_looks_ahead_stops_the_comparison(stage, capsys, monkeypatch):
    for slug in ("A0-baseline", "A1-swiglu_mlp"):
        prepare_all(stage, slug, [1.0, 0.5])
    stage.faults[("swiglu_mlp",)] = ["position 3 sees\nposition 4"]
    call = ("baseline", "swiglu_mlp", "--seeds", "2")
    assert stage.call(*call) == 1 and not stage.calls()
    fault(capsys, "arm 'swiglu_mlp' is not sound: position 3 sees position 4. Mend it, or add --anyway")
    # what is known is not tried again
    monkeypatch.setitem(sys.modules, "variants.check", SimpleNamespace(faults_of=None))
    assert stage.call(*call) == 1
    assert stage.call(*call, "--anyway") == 0
    assert "swiglu_mlp IS NOT SOUND, so this says nothing: position 3 sees position 4." in capsys.readouterr().out
    assert json.loads((stage.folder / "plan.json").read_text())["anyway"] is True
    text = (stage.folder / "README.md").read_text()
    assert text.count("NOT SOUND") == 2
    assert '<p class="card ">swiglu_mlp IS NOT SOUND' in (stage.folder / "report.html").read_text()


def test_the_arms_are_tried_by_variants_check(stage, monkeypatch):
    monkeypatch.delitem(sys.modules, "variants.check")  # the stand-in
    argv = ["baseline", "swiglu_mlp", "swiglu_mlp", "--", "--data", str(stage.data), "--steps", "2"]
    plan, arms = compare.plan_of(*compare.parse_arguments(argv), argv)
    comparison = Comparison(stage.folder, plan, arms, None, compare.Interrupt())
    comparison.open(retry=False)
    comparison.check_arms()
    comparison.lock.close()
    faults = json.loads((stage.folder / "state.json").read_text())["faults"]
    assert faults == {"baseline": [], "swiglu_mlp": [], "swiglu_mlp (2)": []}


# ---- Runs of other comparisons

def finished(stage, folder, *argv, **options):
    """Call, and return the run ids that were trained."""
    before = len(stage.calls())
    assert stage.call(*argv, folder=folder, **options) == 0
    return [call["--run_id"] for call in stage.calls()[before:]]


@pytest.fixture
def begun(stage):
    """A finished comparison of two seeds in ./comparisons/first."""
    for slug in ("A0-baseline", "A1-swiglu_mlp", "A1-parallel_residual", "A0-swiglu_mlp", "A1-baseline"):
        prepare_all(stage, slug, [1.00, 1.02, 1.01])
    assert len(finished(stage, Path("comparisons/first"), "baseline", "swiglu_mlp", "--seeds", "2")) == 4
    return stage


def test_finished_runs_of_other_comparisons_are_taken_over(begun, capsys):
    second = Path("comparisons/second")
    new = finished(begun, second, "baseline", "swiglu_mlp", "--seeds", "3")
    assert new == ["A0-baseline-seed3", "A1-swiglu_mlp-seed3"]
    out, results = capsys.readouterr().out, begun.results(second)
    assert "run 1/6: baseline, seed 1: taken over from comparisons/first/logs/A0-baseline-seed1.txt" in out
    assert (
        "4 of the 6 runs were taken over from earlier comparisons, whose results had been seen; their times are "
        "not compared."
    ) in out
    text = (second / "README.md").read_text()
    assert "baseline 1 (comparisons/first/logs/A0-baseline-seed1.txt), baseline 2" in text
    assert "Looks: 1 earlier comparison with runs of these arms had a result" in text
    assert "that one of 2 verdicts finds a difference where there is none happens in up to 2 %" in text
    time, loss = (results["arms"][1]["vs_baseline"][kind] for kind in ("time", "loss"))
    assert time["ratio"] == 1 and time["n"] == 1 and time["p"] is None, "the only pair that took turns"
    assert loss["n"] == 3 and results["arms"][0]["ms_per_step"]["n"] == 1
    assert [seed for _, seed in results["settings"]["order"]] == [3, 3]

    # a third knows where they come from, and another arm of the same name in another place is the same run
    third = Path("comparisons/third")
    assert finished(begun, third, "swiglu_mlp", "baseline", "--seeds", "3") == []
    reused = begun.results(third)["settings"]["reused"]
    assert {entry["log"].split("/")[1] for entry in reused if entry["seed"] < 3} == {"first"}
    assert reused[0]["seen"] == ["first", "second"] and "taken over" in (third / "README.md").read_text()
    assert begun.results(third)["arms"][1]["vs_baseline"]["time"]["ratio"] is None
    assert finished(begun, third, "swiglu_mlp", "baseline", "--seeds", "3") == []


def test_an_edited_variant_alone_is_trained_again(begun, monkeypatch, capsys):
    second = Path("comparisons/second")
    original = identity.text_and_digest

    def edited(file):
        return ("", "edited") if file.name == "swiglu_mlp.py" else original(file)

    monkeypatch.setattr(identity, "text_and_digest", edited)
    begun.write = lambda *parts, write=begun.write: (write(*parts), edit_log(begun.prepared / f"{parts[1].name}.txt"))
    code = compare.Run.code.fget

    def edited_code(run):
        return {"variants.swiglu_mlp": "edited"} if "# edited" in run.source else {}

    monkeypatch.setattr(compare.Run, "code", property(lambda run: code(run) | edited_code(run)))
    assert begun.call("baseline", "swiglu_mlp", "--seeds", "2", folder=Path("comparisons/first")) == 1
    fault(capsys, r"variants/swiglu_mlp\.py changed since .*choose another folder")
    new = finished(begun, second, "baseline", "swiglu_mlp", "--seeds", "2")
    assert new == ["A1-swiglu_mlp-seed1", "A1-swiglu_mlp-seed2"]
    text = (second / "README.md").read_text()
    assert "Only runs of baseline were taken over: verdicts that share them are not independent" in text
    assert "Looks:" not in text

    # editing that variant is nothing to a comparison without it
    new = finished(begun, Path("comparisons/other"), "baseline", "parallel_residual", "--seeds", "2")
    assert new == ["A1-parallel_residual-seed1", "A1-parallel_residual-seed2"]


def edit_log(log):
    head = "# ---- variants.swiglu_mlp\n"
    log.write_text(log.read_text(encoding="utf-8").replace(head, head + "# edited\n"), encoding="utf-8")


def test_what_is_not_the_same_run_is_trained(begun, monkeypatch):
    """Each case in a folder outside ./comparisons, which holds the finished one alone."""
    argv, first = ["baseline", "swiglu_mlp", "--seeds", "1"], Path("comparisons/first")
    machine, shard = Comparison.machine, next(begun.data.glob("*train*.bin"))

    def trained(case, *more, options=()):
        return len(finished(begun, Path("others") / case, *argv, *more, options=options))

    assert trained("the same") == 0
    assert trained("turned off", "--no-reuse") == 2
    assert trained("another setting", options=["--momentum", "0.9"]) == 2
    assert trained("equal time", "--budget", "time", "--seconds", "5") == 2
    for name in ("device", "threads", "torch", "compile"):
        with monkeypatch.context() as patch:

            def other(self, config, name=name):
                return machine(self, config) | {name: "another"}

            patch.setattr(Comparison, "machine", other)
            assert trained(f"another {name}") == 2
    with monkeypatch.context() as patch:

        def without(argv):
            return [word for word in argv if word not in ("--init_from", "x.pt")]  # no such file

        begun.parse = lambda argv: replace(parse_config(without(argv)), init_from="x.pt")
        patch.setattr(compare, "parse_config", begun.parse)
        assert trained("from a checkpoint", options=["--init_from", "x.pt"]) == 2
        begun.parse = compare.parse_options
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert trained("other data") == 2
    shard.write_bytes(content)
    plan = (first / "plan.json").read_text()
    (first / "plan.json").write_text(plan[:-9])
    assert trained("a damaged plan") == 2
    (first / "plan.json").write_text(plan)
    for file in (first / "logs").glob("*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(status="running")))
    assert trained("unfinished") == 2


def test_a_run_that_was_taken_over_in_part_is_not_taken_for_an_own_one(begun, monkeypatch):
    """Stopped between the note and the log: the run is taken over again, or trained and then no longer noted."""
    second = Path("comparisons/second")
    with monkeypatch.context() as patch:
        original = compare.write_atomically
        patch.setattr(compare, "write_atomically", lambda path, write: interrupt_at(path) or original(path, write))
        with pytest.raises(KeyboardInterrupt):
            begun.call("baseline", "swiglu_mlp", "--seeds", "1", folder=second)
    assert list(json.loads((second / "state.json").read_text())["reused"]) == ["A0-baseline-seed1"]
    new = finished(begun, second, "baseline", "swiglu_mlp", "--seeds", "1", "--no-reuse")
    assert new == ["A0-baseline-seed1", "A1-swiglu_mlp-seed1"]
    assert begun.results(second)["settings"]["reused"] == []


def interrupt_at(path):
    if path.name == "A0-baseline-seed1.txt":
        raise KeyboardInterrupt


def test_the_same_command_finds_its_folder(begun, capsys):
    argv = ["baseline", "swiglu_mlp", "--seeds", "2", "--", "--data", str(begun.data), "--steps", "2"]
    assert main(argv) == 0 and main(argv) == 0 and len(begun.calls()) == 4
    assert sorted(path.name[:24] for path in Path("comparisons").iterdir()) == ["cpu-baseline-swiglu_mlp-", "first"]


def test_the_plan_alone(begun, capsys):
    second = Path("comparisons/second")
    assert begun.call("baseline", "swiglu_mlp", "--seeds", "3", "--dry-run", folder=second) == 0
    out = capsys.readouterr().out
    assert "1  baseline, seed 1: taken over from comparisons/first/logs/A0-baseline-seed1.txt" in out
    assert "6  swiglu_mlp, seed 3: to be trained" in out
    assert re.search(r"expected time: \d+:\d\d h, by 4 earlier runs of this track on this machine", out)
    assert begun.call("baseline", "swiglu_mlp", "--seeds", "2", "--dry-run", folder=Path("comparisons/first")) == 0
    out = capsys.readouterr().out
    assert out.count(": finished") == 4 and "it can find nothing: 2 pairs are too few for a verdict" in out
    assert (
        begun.call("baseline", "swiglu_mlp", "--sweep", "1,2", "--dry-run", "--reuse", "nowhere", folder=second) == 0
    )
    out = capsys.readouterr().out
    assert "first, on other seeds for the learning rates: 4 runs, on which what follows depends" in out
    assert "not known; there is no earlier run" in out
    assert not second.exists() and len(begun.calls()) == 4


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(heading in text for heading in ("what is compared:", "how it is run:", "the report:"))
    text = text.partition("what is compared:")[2]
    assert text.count("(default: ") == 18
    assert all(text.count(f" {option} ") == 1 for option in ("--no-reuse", "--until-decided", "--json"))  # have none


# ---- The console

def test_a_closed_console_and_a_locale_without_accents(corpus, tmp_path):
    """A plan whose folder has accents, on a console that knows ASCII only and that closes after the first line."""
    argv = ["baseline", "swiglu_mlp", "--dry-run", "-o", "résultats", "--", "--steps", "2", "--data", str(corpus)]
    locale = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "compare.py"), *argv],
        cwd=tmp_path,
        env=os.environ | locale,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"2 arms x 6 seeds, 12 runs; folder r??sultats\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0 and errors == b"", errors
