"""
Reading logs: what a whole one says, modded-nanogpt's forms, resumed and unfinished runs, and the one line of every
fault.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from records.runs import Point, compressed, list_runs, main, read_folder, read_run, read_trials, read_usable
from train_gpt import RunError

ROOT = Path(__file__).resolve().parents[2]
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
    assert (run.seed, run.variant, run.track, run.val_sha256) == (
        3,
        ("swiglu_mlp:hidden=8",),
        "cpu",
        {"python_val_000000.bin": "b" * 64},
    )
    assert (run.peak_memory_mib, run.warmup_seconds, run.mfu, run.tokens_per_second, run.ms_per_step) == (
        661,
        1.2,
        0.265,
        20480,
        100.0,
    )
    assert run.bits_per_byte == pytest.approx(1.1629, abs=1e-4)
    assert run.facts["git_commit"] == "a" * 40 and run.path == path


def test_source_and_its_parts(write_log):
    run = read_run(write_log(LOSSES, source="import torch", modules=[("variants", ""), ("variants.a", "x = 1")]))
    assert run.source == "# ---- train_gpt\nimport torch\n# ---- variants\n\n# ---- variants.a\nx = 1"
    assert run.code == {
        name: hashlib.sha256(text).hexdigest()
        for name, text in {"train_gpt": b"import torch", "variants": b"", "variants.a": b"x = 1"}.items()
    }
    other = read_run(
        write_log(LOSSES, "other", source="import numpy", modules=[("variants", ""), ("variants.a", "x = 1")])
    )
    assert other.source_sha256 != run.source_sha256
    assert {name for name in run.code if run.code[name] != other.code[name]} == {"train_gpt"}


def test_a_source_that_was_altered(write_log):
    """A log of the present trainer names the SHA-256 of each module's text."""
    modules = {"train_gpt": "import torch\n", "variants": "", "variants.a": "# ---- variants\nx = 1\n\n"}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in modules.items()}
    others = [(name, modules[name]) for name in ("variants", "variants.a")]
    path = write_log(LOSSES, source=modules["train_gpt"], modules=others, sources=digests)
    assert read_run(path, strict=True).facts["sources"] == digests
    whole = path.read_text()
    for old, new, message in (
        ("import torch", "import  torch", "the source of train_gpt was altered"),
        ("x = 1", "x = 2", "the source of variants.a was altered"),
        ("x = 1\n", "x = 1\n\n\n\n\ny = 1", "the source of variants.a was altered"),
        ("# ---- variants.a", "# ---- variants.b", "its source lacks the module variants.a"),
    ):
        path.write_text(whole.replace(old, new, 1))
        assert message in error_of(path)


def test_a_source_with_kernels_in_folders(write_log):
    """kernels/op/__init__.py is the module kernels.op, and kernels/op/cpu.py is kernels.op.cpu."""
    modules = {"train_gpt": "import torch", "kernels": "", "kernels.op": "import kernels", "kernels.op.cpu": "op = 1"}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in modules.items()}
    path = write_log(LOSSES, source="import torch", modules=list(modules.items())[1:], sources=digests)
    assert read_run(path, strict=True).code == digests
    edit(path, "op = 1", "op = 2")
    path.with_suffix(".json").unlink()
    assert "the source of kernels.op.cpu was altered" in error_of(path)


def test_steps_in_the_source_are_not_steps(write_log):
    run = read_run(
        write_log(LOSSES, source=f"'''\nstep:1/2 train_time:5ms step_avg:5.00ms\n{RULE}\nerror: none\n'''")
    )
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
    write_log(
        {0: 5.0, 4: 3.5}, steps=8, last_step=6, end="SIGTERM"
    )  # steps 5 and 6 are lost: the checkpoint is of step 4
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


@pytest.mark.parametrize(
    "end, status",
    [
        ("SIGTERM", "stopped by SIGTERM"),
        ("the training loss is nan at step 5", "failed: the training loss is nan at step 5"),
    ],
)
def test_unfinished_logs_are_read_unless_strict(write_log, end, status):
    path = write_log({0: 5.0, 4: 3.0}, steps=8, last_step=5, end=end)
    run = read_run(path)
    assert not run.finished
    assert run.status == status
    assert (run.last_step, run.steps, run.val_loss, run.train_ms) == (5, 8, 3.0, 500.0)
    assert f"{status} after step 5 of 8; only finished runs count" in error_of(path, strict=True)


def test_killed_run(write_log):
    path = write_log({0: 5.0}, steps=8, last_step=2, end="SIGTERM")
    edit(path, path.read_text()[path.read_text().index("stopped by") :], "")
    assert read_run(path).status == "unfinished"


def test_killed_before_the_first_step(write_log):
    path = write_log(LOSSES)
    text = path.read_text()
    path.with_suffix(".json").unlink()
    path.write_text(text[: text.index("step:0/8")])
    run = read_run(path)
    assert run.status == "unfinished"
    assert run.val_loss is None
    assert run.train_ms == 0.0
    assert run.points == run.step_ms == []
    path.write_text(text[: text.index("no GPU")])
    assert read_run(path).status == "unfinished"


# ---- modded-nanogpt's logs

def test_modded_nanogpt(write_text):
    run = read_run(write_text(MODDED), strict=True)
    assert run.points == [Point(0, None, 0.0, 10.8311), Point(3, None, 170.0, 3.2775)]
    assert run.step_ms == [94.0, 134.0, 163.0]
    assert run.facts == run.code == run.val_sha256 == {}
    assert run.seed is None
    assert run.variant == ()
    assert run.peak_memory_mib == 30220
    assert run.source == 'import os\nprint(f"step:{step} val_loss:{loss}")'


def test_modded_nanogpt_track_3(write_text):
    text = f'"""source"""\n{RULE}\nRunning PyTorch 2.11.0+cu128 compiled for CUDA 12.8\n{RULE}\n' + "".join(
        f"step:{step}/250 val_loss:{loss:.5f} train_time:{seconds:.3f}s step_avg:1.00ms{extra}\n"
        for step, loss, seconds, extra in (
            (0, 10.82584, 0, ""),
            (125, 4.60783, 22.151, " ema_beta:0"),
            (250, 3.27765, 41.389, " handoff:none"),
        )
    )
    run = read_run(write_text(text), strict=True)
    assert [(p.step, p.train_ms, p.val_loss) for p in run.points] == [
        (0, 0.0, 10.82584),
        (125, 22151.0, 4.60783),
        (250, 41389.0, 3.27765),
    ]
    assert run.step_ms == []


def test_modded_nanogpt_2024(write_text):
    text = (
        RULE
        + "\n"
        + MODDED.replace("Running Python 3.12.3 (main) [GCC 13.3.0]\nRunning PyTorch", "Running pytorch").replace(
            "train_time:94", "train_loss:10.1 train_time:94"
        )
    )
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
    with pytest.raises(RunError, match=r"no log \(.txt or .log, or either with .gz\) in this folder"):
        (tmp_path / "sub").mkdir()
        read_folder(tmp_path / "sub")
    with pytest.raises(RunError, match="no such folder"):
        read_folder(tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        "s:0 tel:10.968871\ns:9536 tel:3.275959\n",
        MODDED.replace(RULE, "-" * 100),
        MODDED.replace("Running P", "Ran p"),
    ],
)
def test_other_forms(write_text, text):
    assert "no log of this trainer or modded-nanogpt: no line of 100 '='" in error_of(write_text(text))


def test_no_source(write_text):
    assert "the source of the code is missing before line 1" in error_of(write_text(MODDED[MODDED.index(RULE) :]))


def test_truncated(write_log):
    path = write_log(LOSSES)
    text = path.read_text()
    path.write_text(text[:-20])
    assert "truncated: the last line has no end" in error_of(path)
    path.write_text(text[: text.index("step:7/8")])
    assert "truncated: run.json says finished, the log ends after step 6 of 8" in error_of(path)


def test_damaged_lines(write_log):
    path = write_log(LOSSES)
    edit(path, "step:5/8 train_time:500ms step_avg:100.00ms", "step:5/8 train_ti")
    assert re.search(r"damaged: line \d+ is cut or no line of steps", error_of(path))
    path = write_log(LOSSES, "facts")
    edit(path, '"status": "running"', '"status": running')
    assert "damaged: its facts are not a JSON object" in error_of(path)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("step:5/8 train_time:500ms step_avg:100.00ms\n", "", "step 5 is missing at step 6 (line 18)"),
        ("step:1/8 train_time:100ms step_avg:100.00ms\n", "", "step 1 is missing at step 2 (line 12)"),
        ("step:8/8 train_time:800ms step_avg:100.00ms\n", "", "step 8 is missing at step 8 (line 21)"),
        (
            "step:5/8 train",
            "step:5/8 train_time:500ms step_avg:100.00ms\nstep:5/8 train",
            "steps are repeated or out of order at step 5 (line 19)",
        ),
        (
            "step:4/8 val",
            "step:4/8 val_loss:2.5 train_time:400ms step_avg:100.00ms\nstep:4/8 val",
            "steps are repeated or out of order at step 4 (line 17)",
        ),
        (
            "step:6/8 train_time:600ms",
            "step:6/8 train_time:499ms",
            "train_time falls from 500 to 499 ms at step 6 (line 19)",
        ),
        ("step:6/8 train", "step:6/9 train", "8 steps become 9 at step 6 (line 19)"),
        ("val_loss:2.5000", "val_loss:nan", "val_loss is not a number at step 4 (line 16: nan)"),
        ("val_loss:2.5000", "val_loss:1e300", "val_loss is not a number at step 4 (line 16: 1e300)"),
        ("val_loss:2.5000", "val_loss:inf", "val_loss is not a number at step 4 (line 16: inf)"),
        ("val_loss:2.5000", "val_loss:2.5.0", "val_loss is not a number at step 4 (line 16: 2.5.0)"),
    ],
)
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
    text = (
        f'"""source"""\n{RULE}\nRunning PyTorch 2.11\n{RULE}\n'
        + 2 * "step:0/9 val_loss:10.8 train_time:0.000s step_avg:nanms\n"
    )
    assert "steps are repeated or out of order at step 0" in error_of(write_text(text))


def test_resumed_log_without_its_beginning(write_log):
    assert "step 1 is missing at step 5" in error_of(write_log({8: 1.0}, resumed_from=4))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(source="x = 2"), "source"),
        (dict(seed=2), "seed"),
        (dict(variant=["a"]), "variant"),
        (dict(val_sha256={}), "val_sha256"),
    ],
)
def test_resumed_as_another_run(write_log, change, name):
    write_log({0: 5.0}, steps=8, last_step=4, end="SIGTERM")
    assert f"resumed with another {name} (line" in error_of(write_log({8: 1.0}, resumed_from=4, **change))


def test_resumed_on_another_device(write_log):
    write_log({0: 5.0}, steps=8, last_step=4, end="SIGTERM")
    assert "resumed on another device" in error_of(write_log({8: 1.0}, resumed_from=4, device="H200"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("val_loss", 0.7059),
        ("step", 7),
        ("train_seconds", 0.79),
        ("config", {}),
        ("seed", 2),
        ("val_sha256", {}),
        ("status", "running"),
        ("curve", []),
        ("curve", [dict(step=step, val_loss=loss) for step, loss in {**LOSSES, 4: 2.4}.items()]),
    ],
)
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


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]", "run.json holds a JSON list, not an object"),
        ("{", "run.json is damaged, not a JSON object"),
        ("", "run.json is damaged, not a JSON object"),
        ("[" * 100_000, "run.json is damaged, not a JSON object"),
        ('{"a": ' * 40 + "1" + "}" * 40, "run.json: damaged: its objects and lists nest more than 16 levels deep"),
        ('{"step": ' + "9" * 5000 + "}", "run.json is damaged, not a JSON object"),
    ],
)
def test_damaged_json(write_log, text, message):
    path = write_log(LOSSES)
    path.with_suffix(".json").write_text(text)
    assert message in error_of(path) and "copy it again, or delete it: the log alone will do" in error_of(path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("val_loss", None, "val_loss must be a number, got None"),
        ("curve", None, "curve must be a list, got None"),
        ("curve", [1], "curve[0] must be an object, got 1"),
        ("curve", [dict(step=4)], "curve[0].val_loss is missing"),
        ("parameters", "many", "parameters must be an integer, got 'many'"),
        ("parameters", -1, "parameters must be from 0 to"),
        ("seed", True, "seed must be an integer, got True"),
        ("train_seconds", 1e999, "Infinity"),
        ("val_sha256", {"a": 1}, "val_sha256.a must be text, got 1"),
        ("val_sha256", {"a\nb": "c"}, "a name in val_sha256 must be text"),
        ("config", {"steps": [8]}, "config.steps must be an integer, got (8,)"),
        ("config", {"layers": 10**12}, "config.layers must be from 1 to"),
        ("config", {"variant": "swiglu_mlp"}, "config.variant is a list of values, got 'swiglu_mlp'"),
        ("config", {"older_setting": {"a": 1}}, "config.older_setting must be a value or a list of values"),
        ("config", [], "config must be an object of settings, got []"),
        ("world_size", 0, "world_size must be from 1 to"),
        ("device", "\ud800", r"it holds text that is no Unicode, '\ud800'"),
        ("flops_per_token", "6e9", "flops_per_token must be a number, got '6e9'"),
    ],
)
def test_fields_of_a_wrong_type_or_range(write_log, name, value, message):
    """In the JSON and, where the field stands there, in the facts of the log."""
    path = write_log(LOSSES)
    saved = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(saved | {name: value}))
    assert message in error_of(path) and "run.json" in error_of(path)

    path.with_suffix(".json").unlink()
    line = next(line for line in path.read_text().splitlines() if line.startswith("facts: "))
    facts = json.loads(line.removeprefix("facts: "))
    if name in facts:
        edit(path, line, "facts: " + json.dumps(facts | {name: value}))
        assert f"{path}: damaged: {message}" in error_of(path)


@pytest.mark.parametrize(
    "old, new",
    [
        ("step:5/8 train_time:500ms", f"step:{'9' * 5000}/8 train_time:500ms"),
        ("step:5/8 train_time:500ms", f"step:5/{'9' * 5000} train_time:500ms"),
        ("step:5/8 train_time:500ms", f"step:5/8 train_time:{'9' * 5000}ms"),
    ],
)
def test_numbers_of_thousands_of_digits(write_log, old, new):
    path = write_log(LOSSES)
    edit(path, old, new)
    assert "is cut or no line of steps" in error_of(path)


# ---- folders

def test_a_compressed_log_is_read_as_it_was(write_log):
    """With the JSON beside it, which must still agree; a folder's list takes it, whoever compressed it."""
    log = write_log(LOSSES)
    run = read_run(log)
    packed = log.with_name("run.txt.gz")
    packed.write_bytes(compressed(log.read_text()))
    log.unlink()
    assert {**vars(read_run(packed)), "path": None} == {**vars(run), "path": None}
    assert read_folder(packed.parent) == [read_run(packed)]

    edit(packed.with_name("run.json"), '"seed": 1', '"seed": 2')
    assert "run.json has another" in error_of(packed)


def test_a_compressed_log_of_another_trainer(write_text):
    log = write_text(compressed(MODDED), "log.log.gz")
    (run,) = read_trials(log)
    assert run.val_loss == 3.2775 and read_usable(log.parent)[0] == [run]


@pytest.mark.parametrize("spoil", [
    lambda data: data[:-12],                            # cut
    lambda data: data[:200] + b"\0\0\0" + data[203:],   # altered
    lambda data: b"a diary\n",                          # never compressed
    lambda data: data + b"x",                           # something after its end
])
def test_a_damaged_compressed_log(write_text, spoil):
    log = write_text(spoil(compressed(MODDED)), "log.txt.gz")
    damage = ": damaged: gzip cannot read it to its end; copy the log again or leave it out"
    assert error_of(log).endswith(damage)


def test_folder(write_log):
    for run_id in ("b", "a", "c"):
        path = write_log(LOSSES, run_id=run_id)
    (path.parent / "README.md").write_text("no log")
    assert [run.path.stem for run in read_folder(path.parent)] == ["a", "b", "c"]
    edit(path, "step:5/8 train_time:500ms step_avg:100.00ms\n", "")
    with pytest.raises(RunError, match="c.txt: step 5 is missing"):
        read_folder(str(path.parent))


# ---- logs that others wrote, for statistics: as much as is sound

def foreign(steps=12, loss=3.2, every_step=True, seconds=False, restart=None, last=None, header=True, ms=50) -> str:
    """
    A made-up log in another trainer's form: a validation at 0, in the middle and at the last step. restart: the step at
    which the clock begins again.
    """
    last = last or steps
    lines = ["import os", RULE] + ["Running PyTorch 2.9 compiled for CUDA 13", RULE] * header
    validated = {0: 10.8, steps // 2: 4.5, last: loss}
    for step in range(last + 1):
        time = step * ms if restart is None or step < restart else (step - restart + 1) * ms + 1
        text = f"train_time:{time / 1000:.3f}s" if seconds else f"train_time:{time}ms"
        if step and every_step:
            lines.append(f"step:{step}/{steps} {text} step_avg:{ms}.00ms")
        if step in validated:
            lines.append(f"step:{step}/{steps} val_loss:{validated[step]:.4f} {text} step_avg:{ms}.00ms")
    return "\n".join(lines) + "\n"


def body(text: str) -> str:
    return text[text.index("step:0/") :]


def usable(path):
    """(val_loss, train_ms, notes) of each run that statistics can use, and what is left out."""
    runs, left_out = read_usable(path.parent)
    assert all("\n" not in line for line in left_out)
    return [(run.val_loss, run.train_ms, run.notes) for run in runs], left_out


def test_a_clock_that_starts_at_step_11(write_text):
    path = write_text(foreign(restart=11))
    assert usable(path) == ([(3.2, 101.0, ["the clock starts at step 11"])], [])
    (run,) = read_trials(path)
    assert run.step_ms == [0.0] * 10 + [51.0, 101.0] and [point.train_ms for point in run.points] == [0.0, 0.0, 101.0]
    assert "train_time falls from 500 to 51 ms at step 11" in error_of(path)  # no evidence for a comparison


@pytest.mark.parametrize(
    "text",
    [foreign(restart=7), foreign(restart=11).replace("step:12/12 train_time:101ms", "step:12/12 train_time:1ms")],
)
def test_a_clock_that_falls_elsewhere_gives_losses_only(write_text, text):
    path = write_text(text)
    assert usable(path) == ([(3.2, None, ["no time is known"])], [])
    assert "train_time falls" in error_of(path)


def test_several_runs_in_one_file(write_text):
    text = foreign(loss=3.2, every_step=False, seconds=True)
    other = foreign(loss=3.3, every_step=False, seconds=True, ms=60)
    path = write_text(text + body(other) + body(foreign(loss=3.25, every_step=False, seconds=True)))
    runs, left_out = usable(path)
    assert runs == [(3.2, 600.0, ["trial 1 of 3"]), (3.3, 720.0, ["trial 2 of 3"]), (3.25, 600.0, ["trial 3 of 3"])]
    assert left_out == []
    assert "steps are repeated or out of order" in error_of(path)


def test_a_trial_that_was_cut_is_left_out_and_named(write_text):
    cut = body(foreign(loss=3.3))
    path = write_text(foreign() + cut[: cut.index("step:9/12")])
    runs, left_out = usable(path)
    assert runs == [(3.2, 600.0, ["trial 1 of 2"])]
    ends = "its last validation is of step 6, the last line of steps of step 8 of 12"
    assert left_out == [f"{path}: {ends}, trial 2 of 2"]


@pytest.mark.parametrize("end", ["", "peak memory allocated: 30 MiB reserved: 40 MiB"])
def test_a_last_line_without_an_end(write_text, end):
    path = write_text((foreign() + end).rstrip("\n"))
    assert usable(path) == ([(3.2, 600.0, ["the last line has no end"])], [])
    assert "truncated: the last line has no end" in error_of(path)


@pytest.mark.parametrize("digits", [3, 20, 40, 48])
def test_a_cut_line_is_not_used(write_text, digits):
    """However much of the last validation's line is left."""
    text = foreign()
    line = text.splitlines()[-1]
    path = write_text(text[: -1 - len(line)] + line[:digits])
    runs, left_out = usable(path)
    ends = "its last validation is of step 6, the last line of steps of step 12 of 12"
    assert runs == [] and left_out == [f"{path}: {ends}, the last line has no end"]


def test_without_a_header(write_text):
    path = write_text(foreign(header=False))
    assert usable(path) == ([(3.2, 600.0, ["no header"])], []) and read_trials(path)[0].source == "import os"
    path = write_text("starting\n" + body(foreign()))
    assert usable(path) == ([(3.2, 600.0, ["no header, no source"])], [])
    assert "no log of this trainer or modded-nanogpt" in error_of(path)


def test_a_run_that_ends_before_its_last_step(write_text):
    """After a validation, as a step fixed beforehand; without one at its end, nothing is known of its last loss."""
    path = write_text(foreign(steps=12, last=10))
    assert usable(path) == ([(3.2, 500.0, ["ends at step 10 of 12"])], [])
    path = write_text(foreign()[: foreign().index("step:12/12 val_loss")])
    assert usable(path) == (
        [],
        [f"{path}: its last validation is of step 6, the last line of steps of step 12 of 12"],
    )


def test_one_run_that_lies_there_twice(write_text):
    """A copy, the console's output or its last line alone add nothing; a run with other numbers does."""
    write_text(foreign(), "a.txt")
    write_text(foreign(), "b.txt")
    write_text(body(foreign()), "console.txt")
    write_text(foreign(loss=3.3), "other.txt")
    path = write_text(foreign().splitlines()[-1] + "\n", "last.txt")
    runs, left_out = usable(path)
    assert [run[0] for run in runs] == [3.2, 3.3]
    kept, copies = path.with_name("a.txt"), ("b.txt", "console.txt", "last.txt")
    assert sorted(left_out) == [f"{path.with_name(name)}: the same run as in {kept}" for name in copies]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("numpy\ntorch\n", "it has no line of steps"),
        ("s:0 tel:10.9\ns:99 tel:3.2\n", "it has no line of steps"),
        (foreign().replace("val_loss:", "train_loss:"), "no line of steps with a val_loss after its header"),
        (foreign().replace("val_loss:3.2000", "val_loss:nan"), "val_loss is not a number at step 12"),
        (foreign().replace("step:8/12 train_time:400ms step_avg:50.00ms\n", ""), "step 8 is missing at step 9"),
        (foreign().replace("step:8/12 train_time:400ms", "step:8/12 train_ti"), "is cut or no line of steps"),
        (b"\xff\xfe", "not UTF-8 text"),
        ("", "empty"),
    ],
)
def test_what_is_no_run_is_named_and_the_rest_is_read(write_text, text, reason):
    write_text(foreign(), "a.txt")
    path = write_text(text, "other.log")
    runs, left_out = usable(path)
    assert [run[0] for run in runs] == [3.2] and len(left_out) == 1
    assert left_out[0].startswith(str(path)) and reason in left_out[0]


def test_logs_of_this_trainer_are_read_strictly(write_log):
    """What another's log may do is no excuse for one of ours."""
    path = write_log(LOSSES, run_id="a")
    text = path.read_text()
    spoilt = {
        "falls": (text.replace("train_time:600ms", "train_time:499ms", 1), "train_time falls from 500 to 499"),
        "cut": (text[:-1], "truncated: the last line has no end"),
        "ends": (text[: text.index("step:5/8")], "unfinished after step 4 of 8"),
        "twice": (text + text[text.index("step:0/8") :], "steps are repeated"),
        "headless": (text.replace("Running Python", "On Python"), "no log of this trainer"),
    }
    for name, (changed, _) in spoilt.items():
        (path.parent / f"{name}.txt").write_text(changed)
    runs, left_out = usable(path)
    assert [run[0] for run in runs] == [0.806]
    for line, (name, (_, reason)) in zip(left_out, sorted(spoilt.items())):
        assert line.startswith(f"{path.parent / name}.txt: ") and reason in line


def test_sources_of_records_are_no_logs(write_text):
    path = write_text(foreign(), "a.txt")
    write_text("import os", "source-0123456789ab.txt")
    assert [run.path for run in read_folder(path.parent)] == [path] and usable(path)[1] == []


# ---- the list of past runs

@pytest.fixture
def past_runs(write_log, tmp_path):
    """A log folder with a run of each status, the newest first by name, and two files that are no runs."""
    endings = dict(
        d_first=dict(losses={0: 5.0, 8: 0.9}),
        c_stopped=dict(losses={0: 5.0, 4: 3.0}, steps=8, last_step=5, end="SIGTERM"),
        b_failed=dict(losses={0: 5.0}, steps=8, last_step=2, end="the training loss is nan"),
        a_running=dict(losses={0: 5.0, 8: 0.8}, variant=["wide", "deep"]),
    )
    for age, (name, options) in enumerate(endings.items()):
        path = write_log(options.pop("losses"), run_id=name, **options).with_suffix(".json")
        if name == "a_running":
            saved = json.loads(path.read_text())
            del saved["val_loss"], saved["val_bits_per_byte"]
            path.write_text(json.dumps(saved | dict(status="running")))
        os.utime(path, (10_000 * age, 10_000 * age))
    (tmp_path / "logs" / "bad.json").write_text("{")
    (tmp_path / "logs" / "meta.json").write_text("{}")
    return tmp_path / "logs"


def test_list_of_past_runs(past_runs, capsys):
    assert main(["--log_dir", str(past_runs)]) == 0
    out, err = capsys.readouterr()
    heads, *rows = [re.split("  +", line) for line in out.splitlines()]
    assert heads == ["id", "when", "track", "loss", "bits/byte", "variants", "status"]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["d_first", "cpu", "0.9000", "1.2985", "baseline", "finished"],
        ["c_stopped", "cpu", "3.0000", "4.3284", "baseline", "stopped by SIGTERM"],
        ["b_failed", "cpu", "5.0000", "7.2140", "baseline", "failed: the training loss is nan"],
        ["a_running", "cpu", "0.8000", "1.1542", "wide+deep", "cut off"],
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row[1]) for row in rows)
    bad, meta = err.splitlines()
    assert bad.startswith(f"left out: {past_runs / 'bad.json'} is damaged, not a JSON object")
    assert meta.startswith(f"left out: {past_runs / 'meta.json'}: no run's: it has no config and status")


def test_list_tells_a_run_from_one_that_was_cut_off(past_runs, capsys):
    """By the lock that the trainer holds on its log."""
    fcntl = pytest.importorskip("fcntl")
    with open(past_runs / "a_running.txt", "rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert list_runs(past_runs)[0][-1]["status"] == "running"
    assert list_runs(past_runs)[0][-1]["status"] == "cut off"
    (past_runs / "a_running.txt").unlink()
    assert list_runs(past_runs)[0][-1]["status"] == "cut off"


def test_list_is_one_plain_line_a_run(past_runs, capsys):
    path = past_runs / "b_failed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(status="failed: a\n\x1b[2Jb\u2028c")))
    main(["--log_dir", str(past_runs)])
    assert "failed: a [2Jb c\n" in capsys.readouterr().out


def test_list_of_past_runs_for_scripts(past_runs, capsys):
    assert main(["--log_dir", str(past_runs), "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [run["id"] for run in runs] == ["d_first", "c_stopped", "b_failed", "a_running"]
    assert runs[0] == dict(
        id="d_first",
        when=0.0,
        track="cpu",
        variant="baseline",
        status="finished",
        val_loss=0.9,
        bits_per_byte=pytest.approx(0.9 / 0.6931),
    )


def test_list_reads_no_texts(past_runs, capsys):
    for path in past_runs.glob("*.txt"):
        path.write_bytes(b"\xff")
    assert main(["--log_dir", str(past_runs)]) == 0 and len(capsys.readouterr().out.splitlines()) == 5


def test_list_of_no_runs(tmp_path, capsys):
    assert main(["--log_dir", str(tmp_path)]) == 0 and capsys.readouterr().out == f"{tmp_path}: no runs yet\n"
    assert main(["--log_dir", str(tmp_path / "none")]) == 1
    message = f"{tmp_path / 'none'}: no such folder; give the trainer's log folder with --log_dir"
    assert capsys.readouterr().err == f"records.runs: error: {message}\n"


def test_list_as_a_module_on_a_console_that_is_not_utf_8(past_runs):
    saved = json.loads((past_runs / "d_first.json").read_text())
    saved["config"]["variant"] = ["größer"]
    (past_runs / "d_first.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "records.runs", "--log_dir", past_runs]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and b"gr??er" in done.stdout and b"Traceback" not in done.stderr
