"""Reading logs: what a whole one says, modded-nanogpt's forms, resumed and unfinished runs, and the one line of every fault."""

import hashlib
import json
import re

import pytest

from records.runs import Point, read_folder, read_run
from train_gpt import RunError

RULE = "=" * 100
LOSSES = {0: 5.576, 4: 2.5, 8: 0.806}
MODDED = f"""import os
print(f"step:{{step}} val_loss:{{loss}}")
{RULE}
Running Python 3.12.3 (main) [GCC 13.3.0]
Running PyTorch 2.10.0+cu128 compiled for CUDA 12.8
Running Triton version 3.6.0
|=========================================+========================+======================|
{RULE}
Compiling model and warming up kernels (~7 minutes on first execution)
step:0/3 val_loss:10.8311 train_time:0ms step_avg:0.03ms
step:1/3 train_time:94ms step_avg:94.04ms
step:2/3 train_time:134ms step_avg:66.75ms
step:3/3 train_time:163ms step_avg:54.29ms
step:3/3 val_loss:3.2775 train_time:170ms step_avg:56.67ms
peak memory allocated: 30220 MiB reserved: 38672 MiB
"""


@pytest.fixture
def write_text(tmp_path):
    def write(text, name="log.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name
    return write


def error_of(path, **options) -> str:
    with pytest.raises(RunError) as caught:
        read_run(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path).removesuffix(".txt"))
    return message


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


# ---- whole logs

def test_a_whole_log(write_log):
    path = write_log(LOSSES, seed=3, variant=["swiglu_mlp:hidden=8"], modules=[("variants.swiglu_mlp", "x = 1\n")])
    run = read_run(str(path), strict=True)
    assert run.finished and (run.last_step, run.steps, run.val_loss, run.train_ms) == (8, 8, 0.806, 800.0)
    assert run.points == [Point(0, 0, 0.0, 5.576), Point(4, 4 * 2048, 400.0, 2.5), Point(8, 8 * 2048, 800.0, 0.806)]
    assert run.step_ms == [100.0 * step for step in range(1, 9)]
    assert (run.seed, run.variant, run.track, run.val_sha256) == (3, ("swiglu_mlp:hidden=8",), "cpu", {"python_val_000000.bin": "b" * 64})
    assert (run.peak_memory_mib, run.warmup_seconds, run.mfu, run.tokens_per_second, run.ms_per_step) == (661, 1.2, 0.265, 20480, 100.0)
    assert run.bits_per_byte == pytest.approx(1.1629, abs=1e-4)
    assert run.facts["git_commit"] == "a" * 40 and run.path == path


def test_source_and_its_parts(write_log):
    run = read_run(write_log(LOSSES, source="import torch", modules=[("variants", ""), ("variants.a", "x = 1")]))
    assert run.source == "# ---- train_gpt\nimport torch\n# ---- variants\n\n# ---- variants.a\nx = 1"
    assert run.code == {name: hashlib.sha256(text).hexdigest() for name, text in {"train_gpt": b"import torch", "variants": b"", "variants.a": b"x = 1"}.items()}
    other = read_run(write_log(LOSSES, "other", source="import numpy", modules=[("variants", ""), ("variants.a", "x = 1")]))
    assert other.source_sha256 != run.source_sha256 and {name for name in run.code if run.code[name] != other.code[name]} == {"train_gpt"}


def test_steps_in_the_source_are_not_steps(write_log):
    run = read_run(write_log(LOSSES, source=f"'''\nstep:1/2 train_time:5ms step_avg:5.00ms\n{RULE}\nerror: none\n'''"))
    assert run.finished and len(run.step_ms) == 8


def test_unknown_lines_are_ignored(write_log):
    path = write_log(LOSSES)
    edit(path, "step:5/8", "warning: cannot write run.pt\ninit_from a.pt: 3 tensors loaded\nstep:5/8")
    run, plain = read_run(path), read_run(write_log(LOSSES, "plain"))
    assert run.finished and run.points == plain.points and run.step_ms == plain.step_ms


def test_without_json(write_log):
    path = write_log(LOSSES)
    path.with_suffix(".json").unlink()
    assert read_run(path).val_loss == 0.806


def test_budget_of_time_estimates_the_number_of_steps(write_log):
    path = write_log(LOSSES, time_budget=0.8)
    for step, estimate in ((0, 11), (3, 9), (4, 9)):
        edit(path, f"step:{step}/8", f"step:{step}/{estimate}", 2)
    run = read_run(path)
    assert run.finished and (run.steps, run.last_step) == (8, 8)


# ---- resumed and unfinished runs

def test_resumed_run(write_log):
    losses = {0: 5.0, 4: 3.0, 8: 1.0}
    write_log({0: 5.0, 4: 3.5}, steps=8, last_step=6, end="SIGTERM")  # steps 5 and 6 are lost: the checkpoint is of step 4
    path = write_log({0: 9.0, 4: 3.0, 8: 1.0}, ms_per_step=120.0, resumed_from=4)
    run = read_run(path)
    assert run.finished and [(p.step, p.val_loss) for p in run.points] == list(losses.items())
    assert run.step_ms == [100.0, 200.0, 300.0, 400.0, 600.0, 720.0, 840.0, 960.0]
    assert run.source == read_run(write_log(LOSSES, "other")).source and run.train_ms == 960.0


def test_resumed_without_validation_at_the_checkpoint(write_log):
    write_log({0: 5.0}, steps=8, last_step=5, end="SIGTERM")
    run = read_run(write_log({8: 1.0}, resumed_from=5))
    assert run.finished and [p.step for p in run.points] == [0, 8] and len(run.step_ms) == 8


def test_resumed_twice_and_stopped(write_log):
    write_log({0: 5.0}, steps=8, last_step=3, end="SIGTERM")
    write_log({}, steps=8, last_step=5, end="SIGTERM", resumed_from=3)
    run = read_run(write_log({}, steps=8, last_step=7, end="SIGTERM", resumed_from=4))
    assert run.status == "stopped by SIGTERM" and run.last_step == 7 and len(run.step_ms) == 7


@pytest.mark.parametrize("end, status", [("SIGTERM", "stopped by SIGTERM"), ("the training loss is nan at step 5", "failed: the training loss is nan at step 5")])
def test_unfinished_logs_are_read_unless_strict(write_log, end, status):
    path = write_log({0: 5.0, 4: 3.0}, steps=8, last_step=5, end=end)
    run = read_run(path)
    assert not run.finished and run.status == status and (run.last_step, run.steps, run.val_loss, run.train_ms) == (5, 8, 3.0, 500.0)
    assert f"{status} after step 5 of 8; only finished runs count" in error_of(path, strict=True)


def test_killed_run(write_log):
    path = write_log({0: 5.0}, steps=8, last_step=2, end="SIGTERM")
    edit(path, path.read_text()[path.read_text().index("stopped by"):], "")
    assert read_run(path).status == "unfinished"


def test_killed_before_the_first_step(write_log):
    path = write_log(LOSSES)
    text = path.read_text()
    path.with_suffix(".json").unlink()
    path.write_text(text[:text.index("step:0/8")])
    run = read_run(path)
    assert run.status == "unfinished" and run.val_loss is None and run.train_ms == 0.0 and run.points == run.step_ms == []
    path.write_text(text[:text.index("no GPU")])
    assert read_run(path).status == "unfinished"


# ---- modded-nanogpt's logs

def test_modded_nanogpt(write_text):
    run = read_run(write_text(MODDED), strict=True)
    assert run.points == [Point(0, None, 0.0, 10.8311), Point(3, None, 170.0, 3.2775)] and run.step_ms == [94.0, 134.0, 163.0]
    assert run.facts == run.code == run.val_sha256 == {} and run.seed is None and run.variant == () and run.peak_memory_mib == 30220
    assert run.source == 'import os\nprint(f"step:{step} val_loss:{loss}")'


def test_modded_nanogpt_track_3(write_text):
    text = f'"""source"""\n{RULE}\nRunning PyTorch 2.11.0+cu128 compiled for CUDA 12.8\n{RULE}\n' + "".join(
        f"step:{step}/250 val_loss:{loss:.5f} train_time:{seconds:.3f}s step_avg:1.00ms{extra}\n"
        for step, loss, seconds, extra in ((0, 10.82584, 0, ""), (125, 4.60783, 22.151, " ema_beta:0"), (250, 3.27765, 41.389, " handoff:none")))
    run = read_run(write_text(text), strict=True)
    assert [(p.step, p.train_ms, p.val_loss) for p in run.points] == [(0, 0.0, 10.82584), (125, 22151.0, 4.60783), (250, 41389.0, 3.27765)] and run.step_ms == []


def test_modded_nanogpt_2024(write_text):
    text = RULE + "\n" + MODDED.replace("Running Python 3.12.3 (main) [GCC 13.3.0]\nRunning PyTorch", "Running pytorch").replace("train_time:94", "train_loss:10.1 train_time:94")
    run = read_run(write_text(text + f"{RULE}\n".join([""] * 2)), strict=True)
    assert run.source.startswith("import os") and run.step_ms[0] == 94.0


def test_modded_nanogpt_that_does_not_count_its_first_steps(write_text):
    path = write_text(MODDED.replace("step:3/3 train_time:163ms", "step:3/3 train_time:16ms"))
    assert "train_time falls from 134 to 16 ms at step 3 (line 13)" in error_of(path)


def test_modded_nanogpt_without_its_last_validation(write_text):
    path = write_text("\n".join(MODDED.split("\n")[:-3]) + "\n")
    assert read_run(path).status == "unfinished"


# ---- faults

def test_no_file_folder_or_text(tmp_path, write_text):
    assert "no such file" in error_of(tmp_path / "none.txt")
    assert "cannot be read: Is a directory" in error_of(tmp_path)
    assert "empty" in error_of(write_text(" \n"))
    assert "not UTF-8 text" in error_of(write_text(b"\xff\xfe\x00"))
    with pytest.raises(RunError, match=r"no log \(.txt or .log\) in this folder"):
        (tmp_path / "sub").mkdir()
        read_folder(tmp_path / "sub")
    with pytest.raises(RunError, match="no such folder"):
        read_folder(tmp_path / "none")


@pytest.mark.parametrize("text", ["s:0 tel:10.968871\ns:9536 tel:3.275959\n", MODDED.replace(RULE, "-" * 100), MODDED.replace("Running P", "Ran p")])
def test_other_forms(write_text, text):
    assert "no log of this trainer or modded-nanogpt: no line of 100 '='" in error_of(write_text(text))


def test_no_source(write_text):
    assert "the source of the code is missing before line 1" in error_of(write_text(MODDED[MODDED.index(RULE):]))


def test_truncated(write_log):
    path = write_log(LOSSES)
    text = path.read_text()
    path.write_text(text[:-20])
    assert "truncated: the last line has no end" in error_of(path)
    path.write_text(text[:text.index("step:7/8")])
    assert "truncated: run.json says finished, the log ends after step 6 of 8" in error_of(path)


def test_damaged_lines(write_log):
    path = write_log(LOSSES)
    edit(path, "step:5/8 train_time:500ms step_avg:100.00ms", "step:5/8 train_ti")
    assert re.search(r"damaged: line \d+ is cut or no line of steps", error_of(path))
    path = write_log(LOSSES, "facts")
    edit(path, '"status": "running"', '"status": running')
    assert "its facts are not a JSON object" in error_of(path)


@pytest.mark.parametrize("old, new, message", [
    ("step:5/8 train_time:500ms step_avg:100.00ms\n", "", "step 5 is missing at step 6 (line 18)"),
    ("step:1/8 train_time:100ms step_avg:100.00ms\n", "", "step 1 is missing at step 2 (line 12)"),
    ("step:8/8 train_time:800ms step_avg:100.00ms\n", "", "step 8 is missing at step 8 (line 21)"),
    ("step:5/8 train", "step:5/8 train_time:500ms step_avg:100.00ms\nstep:5/8 train", "steps are repeated or out of order at step 5 (line 19)"),
    ("step:4/8 val", "step:4/8 val_loss:2.5 train_time:400ms step_avg:100.00ms\nstep:4/8 val", "steps are repeated or out of order at step 4 (line 17)"),
    ("step:6/8 train_time:600ms", "step:6/8 train_time:499ms", "train_time falls from 500 to 499 ms at step 6 (line 19)"),
    ("step:6/8 train", "step:6/9 train", "8 steps become 9 at step 6 (line 19)"),
    ("val_loss:2.5000", "val_loss:nan", "val_loss is not a number at step 4 (line 16: nan)"),
    ("val_loss:2.5000", "val_loss:inf", "val_loss is not a number at step 4 (line 16: inf)"),
    ("val_loss:2.5000", "val_loss:2.5.0", "val_loss is not a number at step 4 (line 16: 2.5.0)"),
])
def test_steps_and_times(write_log, old, new, message):
    path = write_log(LOSSES)
    edit(path, old, new)
    assert message in error_of(path)


def test_no_steps_at_all_in_a_log_of_this_trainer(write_log):
    path = write_log(LOSSES)
    path.write_text(re.sub(r"step:\d/8 train_time.*\n", "", path.read_text()))
    assert "step 1 is missing at step 4" in error_of(path)


def test_two_runs_in_one_log(write_log, write_text):
    write_log(LOSSES)
    assert "steps are repeated or out of order at step 0" in error_of(write_log(LOSSES))
    text = f'"""source"""\n{RULE}\nRunning PyTorch 2.11\n{RULE}\n' + 2 * "step:0/9 val_loss:10.8 train_time:0.000s step_avg:nanms\n"
    assert "steps are repeated or out of order at step 0" in error_of(write_text(text))


def test_resumed_log_without_its_beginning(write_log):
    assert "step 1 is missing at step 5" in error_of(write_log({8: 1.0}, resumed_from=4))


@pytest.mark.parametrize("change, name", [(dict(source="x = 2"), "source"), (dict(seed=2), "seed"), (dict(variant=["a"]), "variant"), (dict(val_sha256={}), "val_sha256")])
def test_resumed_as_another_run(write_log, change, name):
    write_log({0: 5.0}, steps=8, last_step=4, end="SIGTERM")
    assert f"resumed with another {name} (line" in error_of(write_log({8: 1.0}, resumed_from=4, **change))


def test_resumed_on_another_device(write_log):
    write_log({0: 5.0}, steps=8, last_step=4, end="SIGTERM")
    assert "resumed on another device" in error_of(write_log({8: 1.0}, resumed_from=4, device="H200"))


@pytest.mark.parametrize("name, value", [("val_loss", 0.7059), ("val_loss", None), ("step", 7), ("train_seconds", 0.79), ("config", {}), ("seed", 2), ("val_sha256", {}), ("status", "running"),
                                         ("curve", []), ("curve", None), ("curve", [dict(step=step, val_loss=loss) for step, loss in {**LOSSES, 4: 2.4}.items()])])
def test_json_that_says_otherwise(write_log, name, value):
    path = write_log(LOSSES)
    saved = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(saved | {name: value}))
    assert f"tampered: run.json has another {name} than the log" in error_of(path)


def test_log_changed_afterwards(write_log):
    path = write_log(LOSSES)
    edit(path, "val_loss:0.8060", "val_loss:0.7960")
    assert "tampered: run.json has another val_loss, curve than the log" in error_of(path)


def test_json_rounds_to_the_log(write_log):
    assert read_run(write_log({0: 5.0, 4: 2.00004999, 8: 0.80605}, ms_per_step=100.04)).finished


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_damaged_json(write_log, text):
    path = write_log(LOSSES)
    path.with_suffix(".json").write_text(text)
    assert "run.json: damaged: not a JSON object" in error_of(path)


# ---- folders

def test_folder(write_log):
    for run_id in ("b", "a", "c"):
        path = write_log(LOSSES, run_id=run_id)
    (path.parent / "README.md").write_text("no log")
    assert [run.path.stem for run in read_folder(path.parent)] == ["a", "b", "c"]
    edit(path, "step:5/8 train_time:500ms step_avg:100.00ms\n", "")
    with pytest.raises(RunError, match="c.txt: step 5 is missing"):
        read_folder(str(path.parent))
