"""The suite's bookkeeping, with sections made up here; one real track, reduced."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import gpu_suite
from train_gpt import TRACKS, Config, TokenLoader, open_shard, token_bytes, validation_batches

SLEEP = [sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(60)"]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the reduced form runs where there is no GPU")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """suite(sections, *options) -> (exit code, the file's contents), with SECTIONS replaced by the given ones."""
    def run(sections, *options):
        monkeypatch.setattr(gpu_suite, "SECTIONS", sections)
        code = gpu_suite.main([*options, "--output", str(tmp_path / "out.json")])
        return code, json.loads((tmp_path / "out.json").read_text())
    return run


@pytest.fixture
def run(tmp_path):
    """A Run with a minute left, as a section gets it."""
    return gpu_suite.Run(steps=2, tracks=[], data=None, reduced=True, world=1, deadline=time.monotonic() + 60,
                         folder=tmp_path, output=tmp_path / "out.json", results=dict(sections={}), section="made-up")


def fine(run):
    return dict(answer=42)


def status_of(results):
    return {name: section["status"] for name, section in results["sections"].items()}


def test_sections_run_in_the_order_asked_for(suite):
    code, results = suite(dict(a=fine, b=fine, c=fine), "--sections", "c,a")
    assert code == 0 and results["status"] == "passed"
    assert list(results["sections"]) == ["c", "a"] and results["sections"]["a"]["answer"] == 42
    assert {"python", "torch", "cuda", "triton", "device", "git_commit", "git_dirty", "date", "minutes", "reduced",
            "command"} <= set(results)


def test_time_limit_stops_a_section_and_leaves_out_the_rest(suite, monkeypatch):
    """On a clock that stands still until the section's child has said that it sleeps, and then is past the limit."""
    clock, children, popen = [0.0], [], subprocess.Popen

    class Child(popen):
        def __init__(self, arguments, **options):
            super().__init__(arguments, **options)
            if arguments == SLEEP:
                children.append(self)
                while not os.fstat(options["stdout"].fileno()).st_size:
                    time.sleep(0.02)
                clock[0] = 61.0

    def slow(run):
        return run.command("slow", SLEEP)

    monkeypatch.setattr(gpu_suite, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(subprocess, "Popen", Child)
    code, results = suite(dict(first=fine, slow=slow, late=fine), "--minutes", "1")
    assert code == 1 and results["status"] == "incomplete" and results["seconds"] == 61
    assert status_of(results) == dict(first="passed", slow="stopped: out of time", late="not run: out of time")
    assert "asleep" in results["sections"]["slow"]["output_tail"]
    child, = children
    assert child.returncode in (-signal.SIGTERM, -signal.SIGKILL)  # ended, not waited for


def test_results_outlive_a_section_that_raises(suite):
    def broken(run):
        run.record(measured=1.5)
        raise ValueError("no such shape")

    code, results = suite(dict(broken=broken, after=fine))
    assert code == 1
    assert status_of(results) == dict(broken="failed: ValueError: no such shape", after="passed")
    assert results["sections"]["broken"]["measured"] == 1.5


def test_file_is_whole_while_a_section_runs(suite, tmp_path):
    seen = []

    def look(run):
        run.record(half="way")
        seen.append(json.loads((tmp_path / "out.json").read_text()))
        return {}

    suite(dict(first=fine, look=look))
    assert status_of(seen[0]) == dict(first="passed", look="running") and seen[0]["sections"]["look"]["half"] == "way"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.md"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_child_and_keeps_results(suite, tmp_path, number):
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def slow(run):
        def wait_and_kill():
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.02)
            os.kill(os.getpid(), number)
        threading.Thread(target=wait_and_kill, daemon=True).start()
        return run.command("slow", [sys.executable, "-c", script])

    # a shell's background job begins with it ignored
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, results = suite(dict(first=fine, slow=slow, late=fine))
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert code == 130 and results["status"] == "interrupted"
    assert status_of(results) == dict(first="passed", slow="interrupted", late="not run: interrupted")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_child_that_ignores_sigterm_is_killed():
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    process.stdout.readline()
    gpu_suite.end(process, 0.2)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("options, message", [
    (["--sections", "tests,nonsense"], "unknown section 'nonsense'; there are tests, kernels, tracks, profile"),
    (["--tracks", "smal"], "unknown track 'smal'; there are cpu, english_cpu, small"),
    (["--minutes", "0"], "--minutes must be above 0"),
    (["--steps", "0"], "--steps at least 1"),
    (["--data", "/nowhere"], "no *train*.bin and *val*.bin in /nowhere"),
])
def test_bad_options_are_one_line(capsys, options, message):
    assert gpu_suite.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("gpu_suite.py: error: ") and error.count("\n") == 1


def test_list_names_the_sections(capsys):
    assert gpu_suite.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["tests", "kernels", "tracks",
                                                                                  "profile"]


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu_suite.main(["--sections", "tests", "--output", str(tmp_path / "file" / "out.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_reports_the_first_error(run):
    result = run.command("bad",
                         [sys.executable, "-c",
                          "print('loading'); raise RuntimeError('CUDA error: an illegal memory access')"])
    assert result["status"] == "failed: RuntimeError: CUDA error: an illegal memory access" and result["exit_code"] == 1
    assert result["command"].startswith("python -c ")
    torchrun = ("train_gpt.py: error: no train shards\nTraceback (most recent call last):\n"
                "torch.distributed.elastic.ChildFailedError: \n=====")
    assert gpu_suite.fault(torchrun, 1) == "train_gpt.py: error: no train shards"
    assert gpu_suite.fault("python: No module named pytest\n\n", 1) == "python: No module named pytest"
    assert gpu_suite.fault("", -11) == "exit code -11"


def pytest_section(run, monkeypatch, test: str):
    """What the tests section makes of a folder that holds this test file."""
    (run.folder / "tests").mkdir()
    (run.folder / "tests" / "test_made_up.py").write_text(test)
    monkeypatch.setattr(gpu_suite, "ROOT", run.folder)
    return gpu_suite.run_tests(run)


SKIPPED_TEST = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip\ndef test_a(): pass"


NONE_RAN = "failed: no test marked gpu ran on this GPU"


@pytest.mark.parametrize("test, reduced, status", [
    pytest.param(SKIPPED_TEST, True, "skipped", marks=pytest.mark.slow),
    pytest.param(SKIPPED_TEST, False, NONE_RAN, marks=pytest.mark.slow),
    pytest.param("def test_unmarked(): pass", False, NONE_RAN, marks=pytest.mark.slow),
    pytest.param(SKIPPED_TEST + "\n@pytest.mark.gpu\ndef test_b(): pass", False, "passed", marks=pytest.mark.slow),
    (SKIPPED_TEST + "\n@pytest.mark.gpu\ndef test_b(): assert 0", False,
     "failed: 1 of 2 tests, the first tests.test_made_up::test_b")])
def test_tests_section(run, monkeypatch, test, reduced, status):
    run.reduced = reduced
    assert pytest_section(run, monkeypatch, test)["status"] == status


def test_step_lines_give_median_and_percentiles():
    log = "step:0/4 val_loss:10.8 train_time:0ms step_avg:0.00ms\n" + "".join(
        f"step:{step}/4 train_time:{total:.0f}ms step_avg:{total / step:.2f}ms\n"
        for step, total in ((1, 10.25), (2, 20.5), (3, 50.0), (4, 61.0))) + (
        "step:4/4 val_loss:9.1 train_time:61ms step_avg:15.25ms\n"
        "    log.write(f'step:{self.step}/{config.steps} train_time:1ms step_avg:1ms')\n")
    spread = gpu_suite.step_spread(log)  # steps of 10.25, 10.25, 29.5 and 11.0 ms
    assert spread["host_ms_median"] == pytest.approx(10.62, abs=0.03)
    assert spread["host_ms_p10"] == pytest.approx(10.25, abs=0.03)
    assert spread["host_ms_p90"] == pytest.approx(23.95, abs=0.05)
    assert gpu_suite.step_spread("step:1/1 train_time:5ms step_avg:5.00ms") == {}
    long = "".join(f"step:{step}/300 train_time:{step * 7}ms step_avg:7.00ms\n" for step in range(1, 301))
    assert gpu_suite.step_spread(long)["host_ms_p90"] == 7


def test_synthetic_shards_serve_every_row_length(tmp_path):
    folder = gpu_suite.synthetic_shards(tmp_path / "shards", shard_tokens=300_000)
    for path in sorted(folder.glob("*.bin")):
        tokens = open_shard(path)
        lengths = np.diff(np.flatnonzero(tokens == 50256))
        assert tokens[0] == 50256 and tokens.max() < 50257
        assert 300 < np.median(lengths) < 500 and 500 < lengths.mean() < 850 and lengths.min() >= 2
    for track in ("short", "long"):
        config = Config(**TRACKS[track] | dict(data=str(folder), vocab_size=50257, val_tokens=65_536))
        rows, _ = TokenLoader(config).next_batch()
        assert rows.shape == (524_288 // config.sequence_length, config.sequence_length + 1)
        assert (rows[:, 0] == 50256).all() == config.align_documents
        assert validation_batches(config)[0].shape == (65_536 // config.sequence_length, config.sequence_length + 1)
    assert token_bytes(config) is None  # no text stands behind these tokens, and no merges beside them


def test_gpu_overrides_keep_the_track_as_it_is(run):
    run.reduced, run.world, run.steps = False, 8, 20
    assert gpu_suite.track_overrides("short", run) == dict(steps=20, val_tokens=8 * 65_536)
    assert gpu_suite.track_overrides("long", run) == dict(steps=20, val_tokens=8 * 65_536)


def test_several_gpus_start_torchrun(run, monkeypatch):
    run.reduced, run.world = False, 2
    monkeypatch.setattr(run, "command", lambda name, arguments: dict(status="passed", arguments=arguments))
    arguments = gpu_suite.run_track(run, "small", Path("shards"))["arguments"]
    assert arguments[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py"]


def test_tracks_section_keeps_what_was_measured(run, monkeypatch):
    def fake(run, track, data):
        if track == "long":
            raise KeyboardInterrupt
        return dict(status="passed" if track == "small" else "failed: NaN", ms_per_step=12.5)

    monkeypatch.setattr(gpu_suite, "run_track", fake)
    run.data, run.tracks = run.folder, ["small", "short"]
    assert gpu_suite.run_tracks(run)["status"] == "incomplete: 1 of 2 tracks passed"
    run.tracks = ["small", "long"]
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.run_tracks(run)
    rows = json.loads(run.output.read_text())["sections"]["made-up"]["tracks"]
    assert rows["small"]["ms_per_step"] == 12.5 and rows["long"]["status"] == "interrupted"


def test_table_marks_what_is_missing():
    row = dict(status="passed", ms_per_step=123.45, tokens_per_second=4_000_000.0, mfu=0.512, peak_memory_mib=40_000,
               warmup_seconds=61.2)
    cells = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in gpu_suite.tracks_table(dict(short=row,
                                                     medium=dict(status="not run: out of time"))).splitlines()]
    assert cells[0][:2] == ["track", "ms/step"] and cells[0][-1] == "status"
    assert {"123.5", "4,000,000", "51.2%", "40,000", "61.2"} < set(cells[2]) and cells[2][-1] == "passed"
    assert cells[3] == ["medium", *"-" * 8, "not run: out of time"]


def test_report(run):
    rows = [dict(N=8, arm="triton", what="forward", median=0.12345, p20=0.1, n=5),
            dict(N=8, arm="other", what="forward", fault="wrong")]
    run.results |= dict(device="A Card", torch="2", triton="3", git_commit="0123456789ab", date="today",
                        data="synthetic")
    run.section = "kernels"
    run.record(status="passed", seconds=1.0, kernels=dict(some_op=dict(status="passed", rows=rows)))
    run.section = "profile"
    run.record(status="passed", track="benchmark", table="| kind |")
    text = run.output.with_suffix(".md").read_text()
    assert text.startswith("# A Card\n") and "commit 0123456789," in text and "- kernels: passed, 1 s" in text
    assert "| 8 | triton | forward | 0.1235 | 5 | - |" in text and "| 8 | other | forward | - | - | wrong |" in text
    assert "## One step of track benchmark\n\n| kind |" in text


def test_shares_of_the_time(run, monkeypatch):
    seen = {}

    def look(run):
        return seen.update({run.section: run.left()}) or {}

    monkeypatch.setattr(gpu_suite, "SECTIONS", dict(tests=look, kernels=look, made_up=look, tracks=look))
    gpu_suite.run_sections(run, ["tests", "kernels", "made_up", "tracks"])
    assert {name: round(seconds) for name, seconds in seen.items()} == dict(tests=round(60 * 0.35 / 0.95),
                                                                            kernels=round(60 * 0.35 / 0.6), made_up=60,
                                                                            tracks=60)


def test_what_is_named_exists():
    assert set(gpu_suite.SHARES) == set(gpu_suite.SECTIONS) and sum(gpu_suite.SHARES.values()) == pytest.approx(1)
    assert set(gpu_suite.MAIN_TRACKS) <= set(TRACKS)
    assert all((gpu_suite.ROOT / f"benchmarks/{name}.py").exists() for name in gpu_suite.KERNEL_BENCHMARKS)


@cpu_only
@pytest.mark.slow
def test_reduced_track_from_end_to_end(tmp_path, capsys):
    output = tmp_path / "out.json"
    assert gpu_suite.main(["--sections", "tracks", "--tracks", "small", "--output", str(output)]) == 0
    results, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert printed.startswith("reduced run on a CPU") and results["reduced"] is True
    row = results["sections"]["tracks"]["tracks"]["small"]
    assert row["status"] == "passed" and row["overrides"]["model_dim"] == 64 and "mfu" not in row
    numbers = ("ms_per_step", "tokens_per_second", "peak_memory_mib", "warmup_seconds", "parameters", "flops_per_token",
               "host_ms_median")
    assert all(row[name] > 0 for name in numbers)


@cpu_only
def test_cpu_results_have_a_name_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SECTIONS", dict(a=fine))
    monkeypatch.setattr(gpu_suite, "__file__", str(tmp_path / "gpu_suite.py"))
    assert gpu_suite.main(["--sections", "a"]) == 0
    [path] = (tmp_path / "results").glob("*.json")
    assert path.name.startswith("cpu-") and path.with_suffix(".md").exists()
