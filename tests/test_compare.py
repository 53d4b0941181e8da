"""compare.py: the plan with a stand-in for training that copies prepared logs, and one real comparison that is killed."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import compare
from compare import BUDGET_SEED, SWEEP_SEED, Comparison, main
from data.shards import write_meta, write_shard
from records.runs import read_run
from tests.records.conftest import log_lines
from train_gpt import TRACKS

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """
import json, pathlib, shutil, sys, time
prepared, argv = pathlib.Path(sys.argv[1]), sys.argv[2:]
given = dict(zip(argv[::2], argv[1::2]))
with open(prepared / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\\n")
run = given["--run_id"]
if (prepared / (run + ".fault")).exists():
    sys.exit("train_gpt.py: error: " + (prepared / (run + ".fault")).read_text())
print("step 1/2  loss 3.0", flush=True)
for kind in ("txt", "json"):
    shutil.copy(prepared / f"{run}.{kind}", pathlib.Path(given["--log_dir"]) / f"{run}.{kind}")
"""


@pytest.fixture
def corpus(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for split, tokens in (("train", 40_000), ("val", 3_000)):
        write_shard(tmp_path / "corpus" / f"x_{split}_000000.bin", np.append(256, rng.integers(97, 105, tokens)))
    write_meta(tmp_path / "corpus", vocab_size=257, tokenizer="bytes")
    return tmp_path / "corpus"


@pytest.fixture
def stage(tmp_path, monkeypatch, corpus):
    """stage.prepare(run, loss) or stage.prepare(run, fault=text), then stage.call(arms and options) -> exit code; stage.calls(): the trainer's arguments."""
    class Stage:
        folder, prepared = tmp_path / "out", tmp_path / "prepared"

        def prepare(self, run, loss=1.0, fault=None, ms=100.0, **facts):
            (self.prepared / f"{run}.fault").unlink(missing_ok=True)
            if fault:
                return (self.prepared / f"{run}.fault").write_text(fault)
            lines, saved = log_lines({0: 5.0, 1: 2 * loss, 2: loss}, run_id=run, ms_per_step=ms, **facts)
            (self.prepared / f"{run}.txt").write_text("\n".join(lines) + "\n")
            (self.prepared / f"{run}.json").write_text(json.dumps(saved))

        def call(self, *argv):
            return main([*argv, "-o", str(self.folder), "--", "--data", str(corpus)])

        def calls(self):
            calls = [json.loads(line) for line in (self.prepared / "calls.jsonl").read_text().splitlines()]
            return [dict(zip(call[::2], call[1::2])) for call in calls]

        def results(self):
            return json.loads((self.folder / "results.json").read_text())
    stage = Stage()
    stage.prepared.mkdir()
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    original = Comparison.command
    monkeypatch.setattr(Comparison, "command", lambda self, job: [sys.executable, str(tmp_path / "stand_in.py"), str(stage.prepared), *original(self, job)[2:]])
    return stage


def prepare_all(stage, slug, losses, first=1, **facts):
    for seed, loss in enumerate(losses, first):
        stage.prepare(f"{slug}-seed{seed}", loss, seed=seed, **facts)


def test_runs_take_turns_and_the_report_has_a_verdict(stage, capsys):
    prepare_all(stage, "baseline", [1.00, 1.01, 0.99])
    prepare_all(stage, "swiglu_mlp-lr_matrix-0.02", [0.90, 0.91, 0.89], variant=["swiglu_mlp"], lr_matrix=0.02)
    assert stage.call("baseline", "swiglu_mlp --lr_matrix 0.02", "--seeds", "3") == 0
    calls = stage.calls()
    assert [(call.get("--variant"), call["--seed"]) for call in calls] == [(variant, seed) for seed in "123" for variant in (None, "swiglu_mlp")]
    assert calls[1]["--lr_matrix"] == "0.02" and "--lr_matrix" not in calls[0] and {call["--track"] for call in calls} == {"cpu"}
    out = capsys.readouterr().out
    assert "run 6/6: swiglu_mlp --lr_matrix 0.02, seed 3" in out and "swiglu_mlp --lr_matrix 0.02 is better than baseline by 0.1000 nats" in out
    results = stage.results()
    assert results["settings"]["order"][:2] == [["baseline", 1], ["swiglu_mlp --lr_matrix 0.02", 1]] and results["settings"]["target"] == TRACKS["cpu"]["target"]
    assert results["settings"]["overhead"]["wall_seconds"] >= results["settings"]["overhead"]["runs_seconds"] > 0
    assert {path.name for path in stage.folder.iterdir()} >= {"README.md", "report.html", "curves.png", "results.json", "logs"}


def test_the_picture_may_have_a_logarithmic_axis(stage):
    prepare_all(stage, "baseline", [1.0, 1.1])
    pictures = []
    for options in ((), ("--log-x",)):
        assert stage.call("baseline", "--seeds", "2", *options) == 0
        pictures.append((stage.folder / "curves.png").read_bytes())
    assert pictures[0] != pictures[1] and len(stage.calls()) == 2


def test_finished_runs_are_neither_lost_nor_repeated(stage):
    for slug in ("baseline", "swiglu_mlp"):
        prepare_all(stage, slug, [1.0, 1.1])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2") == 0
    log = stage.folder / "logs/swiglu_mlp-seed1.txt"
    cut = log.read_text().splitlines(keepends=True)
    log.write_text("".join(cut[:-6]))  # killed in its last step
    saved = json.loads(log.with_suffix(".json").read_text())
    log.with_suffix(".json").write_text(json.dumps(saved | dict(status="running")))
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2") == 0
    assert [call["--run_id"] for call in stage.calls()[4:]] == ["swiglu_mlp-seed1"]
    assert log.read_text() == "".join(cut)


def test_a_checkpoint_is_gone_on_from(stage):
    prepare_all(stage, "baseline", [1.0])
    logs = stage.folder / "logs"
    logs.mkdir(parents=True)
    (logs / "baseline-seed1.txt").write_text("cut off")
    (logs / "baseline-seed1.pt").write_bytes(b"")
    assert stage.call("baseline", "--seeds", "1") == 0
    assert stage.calls()[0]["--resume"] == str(logs / "baseline-seed1.pt") and not (logs / "baseline-seed1.pt").exists()


def test_a_failing_arm_is_reported_and_the_others_go_on(stage, capsys):
    prepare_all(stage, "baseline", [1.0, 1.1])
    stage.prepare("swiglu_mlp-seed1", fault="the training loss is nan at step 7")
    stage.prepare("swiglu_mlp-seed2", 1.2, seed=2)
    call = ("baseline", "swiglu_mlp", "--seeds", "2")
    assert stage.call(*call) == 0
    assert "failed: the training loss is nan at step 7 (exit code 1; all of its output: logs/swiglu_mlp-seed1.out)" in capsys.readouterr().out
    arm = stage.results()["arms"][1]
    assert arm["status"] == "1 of 2 finished" and "the training loss is nan" in (stage.folder / "README.md").read_text()
    assert stage.call(*call) == 0 and len(stage.calls()) == 4, "a failure is not tried again by itself"
    stage.prepare("swiglu_mlp-seed1", 1.3, seed=1)
    assert stage.call(*call, "--retry") == 0 and len(stage.calls()) == 5 and stage.results()["arms"][1]["status"] == "complete"


def test_an_arm_given_again_has_seeds_of_its_own(stage):
    prepare_all(stage, "baseline", [1.0, 1.01])
    prepare_all(stage, "baseline-2", [1.005, 1.012], first=3)
    assert stage.call("baseline", "baseline", "--seeds", "2") == 0
    assert [call["--seed"] for call in stage.calls()] == ["1", "3", "2", "4"]
    assert stage.results()["arms"][1]["vs_baseline"]["loss"]["verdict"] == "not distinguishable"


def test_a_sweep_chooses_each_arms_rates_on_other_seeds(stage):
    best = {"baseline": 1, "swiglu_mlp": 2}
    for slug in best:
        for factor in (0.5, 1, 2):
            stage.prepare(f"{slug}-lr{factor:g}-seed{SWEEP_SEED}", 1.5 + abs(factor - best[slug]))
    stage.prepare(f"swiglu_mlp-lr0.5-seed{SWEEP_SEED}", fault="the training loss is inf")
    prepare_all(stage, "baseline", [1.0, 1.1])
    prepare_all(stage, "swiglu_mlp", [1.0, 1.1])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "2", "--sweep", "0.5,1,2") == 0
    tries, reported = stage.calls()[:6], stage.calls()[6:]
    assert {call["--seed"] for call in tries} == {str(SWEEP_SEED)} and {call["--seed"] for call in reported} == {"1", "2"}
    lr = TRACKS["cpu"] | dict(lr_matrix=0.03)
    for call in reported:
        rates = {name: float(call[f"--{name}"]) for name in compare.RATES if f"--{name}" in call}
        assert rates.get("lr_matrix") == (pytest.approx(2 * lr["lr_matrix"]) if "--variant" in call else None)
        assert len(rates) == (4 if "--variant" in call else 0)
    sweep = stage.results()["settings"]["sweep"]
    assert {arm: entry["chosen"] for arm, entry in sweep.items()} == best and sweep["swiglu_mlp"]["tries"][0]["losses"] == [None]


def test_equal_time_is_what_the_first_arm_takes(stage):
    stage.prepare(f"baseline-budget-seed{BUDGET_SEED}", 1.0, ms=2500.0)
    prepare_all(stage, "baseline", [1.0])
    prepare_all(stage, "swiglu_mlp", [1.1])
    assert stage.call("baseline", "swiglu_mlp", "--seeds", "1", "--budget", "time") == 0
    assert [float(call.get("--time_budget", 0)) for call in stage.calls()] == [0, 5, 5]
    assert stage.results()["settings"]["budget_seconds"] == 5


def fault(capsys, text):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("compare.py: error: ") and re.search(text, error), error


@pytest.mark.parametrize("argv, text", [
    (["baseline", "no_such_thing"], "arm 'no_such_thing': unknown variant 'no_such_thing'; there are"),
    (["baseline", "swiglu_mlp --no_such_option 1"], "arm 'swiglu_mlp --no_such_option 1': train_gpt.py does not take these options"),
    (["baseline", "swiglu_mlp --seed 3"], "--seed is compare.py's to set"),
    (["baseline", "--heads 3"], "does not begin with a name|arguments are required"),
    (["baseline", "baseline --head_dim 3"], "arm 'baseline --head_dim 3': .*--head_dim 3 is not a multiple of 4"),
    (["baseline", "--track", "no_such_track"], "unknown track 'no_such_track'"),
    (["baseline", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["baseline", "--sweep", "1,-1"], "greater than 0"),
])
def test_bad_arguments(stage, capsys, argv, text):
    try:
        assert stage.call(*argv) == 1
        fault(capsys, text)
    except SystemExit as stop:  # argparse's own
        assert stop.code == 2 and re.search(text, capsys.readouterr().err)
    assert not stage.folder.exists()


def test_no_data(stage, capsys, tmp_path):
    assert main(["baseline", "-o", str(stage.folder), "--", "--data", str(tmp_path)]) == 1
    fault(capsys, "no train shards")


def test_another_plan_other_code_or_an_altered_log_is_refused(stage, capsys):
    prepare_all(stage, "baseline", [1.0, 1.1])
    assert stage.call("baseline", "--seeds", "1") == 0
    assert stage.call("baseline", "--seeds", "2") == 1
    fault(capsys, r"holds another plan \(seeds: 1, now 2\)")
    plan = json.loads((stage.folder / "plan.json").read_text())
    (stage.folder / "plan.json").write_text(json.dumps(plan | dict(source=plan["source"] | {"train_gpt.py": "0"})))
    assert stage.call("baseline", "--seeds", "1") == 1
    fault(capsys, r"train_gpt\.py changed since")
    (stage.folder / "plan.json").write_text(json.dumps(plan))
    log = stage.folder / "logs/baseline-seed1.txt"
    log.write_text(log.read_text().replace("val_loss:1.0000", "val_loss:0.9000"))
    assert stage.call("baseline", "--seeds", "1") == 1
    fault(capsys, "baseline-seed1.* was altered|altered: restore it")
    (stage.folder / "state.json").write_text("{")
    assert stage.call("baseline", "--seeds", "1") == 1
    fault(capsys, "damaged plan.json or state.json")


def test_two_comparisons_do_not_share_a_folder(stage, capsys, monkeypatch):
    import fcntl
    monkeypatch.setattr(compare.time, "sleep", lambda seconds: None)
    stage.folder.mkdir()
    with open(stage.folder / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert stage.call("baseline", "--seeds", "1") == 1
    fault(capsys, "another comparison uses")


TINY = ["--layers", "2", "--model_dim", "32", "--heads", "2", "--head_dim", "16", "--mlp_hidden", "64", "--sequence_length", "32", "--batch_tokens", "256", "--micro_batch_tokens", "256",
        "--val_tokens", "512", "--val_every", "0", "--checkpoint_seconds", "0.2", "--steps"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_real_comparison_is_killed_and_called_again(corpus, tmp_path, number):
    """The run under way ends by itself with its comparison and goes on from its checkpoint; the finished one is left alone."""
    logs, steps = tmp_path / "out/logs", "400"
    command = [sys.executable, "compare.py", "baseline", "swiglu_mlp", "--seeds", "1", "-o", str(tmp_path / "out"), "--", "--data", str(corpus), *TINY, steps]
    settings = dict(cwd=ROOT, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    process = subprocess.Popen(command, **settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline, second = time.time() + 120, logs / "swiglu_mlp-seed1.txt"
    while time.time() < deadline and not ((logs / "swiglu_mlp-seed1.pt").exists() and "step:20/" in second.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and "compare.py: stopped; finished runs are kept, call it again to go on" in errors
    first = logs / "baseline-seed1.txt"
    before = first.stat().st_mtime_ns, first.read_text()
    assert read_run(first).finished and not read_run(second).finished
    again = subprocess.run(command, **settings, capture_output=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert (first.stat().st_mtime_ns, first.read_text()) == before
    assert "resumed from" in second.read_text() and read_run(second).finished and read_run(second).last_step == int(steps)
    assert "report:" in again.stdout and not list(logs.glob("*.pt")) and not os.path.exists(logs / "swiglu_mlp-seed1.out")
