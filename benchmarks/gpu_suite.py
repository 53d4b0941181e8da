"""
Everything that wants a GPU, in one command: the GPU tests, the kernels' benchmarks, a few steps of the main tracks, a profile of one, as a JSON file and tables.

    python benchmarks/gpu_suite.py                                            all of it, nine minutes at most, on all GPUs of this machine
    python benchmarks/gpu_suite.py --sections tracks --tracks short,small --steps 50 --data data/fineweb10B
    python benchmarks/gpu_suite.py --list                                     the sections

benchmarks/results/<device>.json and .md are rewritten after every run: what was measured stays, whatever happens to the rest. A section that comes before others
leaves them their parts of the time (SHARES).
Without a GPU a reduced form runs (a tiny batch, few and narrow layers, nothing compiled; no kernels): it proves that the tracks run and measures nothing.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import markdown
from data.shards import write_shard
from train_gpt import TRACKS, Config, Ranks, RunError, command_output, environment, write_atomically

import numpy as np
import torch

PASSED, SKIPPED, STOPPED, LATE = "passed", "skipped", "stopped: out of time", "not run: out of time"


@dataclass
class Run:
    """What a section has to work with. GPU work belongs in command(): a faulty kernel spoils CUDA for the whole process that it runs in."""
    steps: int                # timed steps of a track
    tracks: list[str]
    data: Path | None         # folder of GPT-2 shards; None: synthetic ones
    reduced: bool             # no GPU here
    world: int                # GPUs
    deadline: float           # on time.monotonic()'s clock
    folder: Path              # for temporary files
    output: Path
    results: dict             # what the output holds
    section: str = ""

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, **facts):
        """Add facts to the present section's result and write the files."""
        self.results["sections"].setdefault(self.section, {}).update(facts)
        write_atomically(self.output, lambda file: file.write(json.dumps(self.results, indent=1).encode() + b"\n"))
        write_atomically(self.output.with_suffix(".md"), lambda file: file.write(report(self.results).encode()))

    def command(self, name: str, arguments: list[str], fine: tuple[int, ...] = (0,)) -> dict:
        """Run a command in the repository's root, for the time left at most. Returns status ("passed": the exit code is fine), exit code, seconds."""
        if self.left() <= 0:
            return dict(status=LATE)
        print(f"{name} ...", flush=True)
        start, path = time.monotonic(), self.folder / f"{name}.output"
        threads = {"OMP_NUM_THREADS": "1"} if self.reduced else {}  # on a busy CPU a second one costs time
        shown = shlex.join("python" if part == sys.executable else part for part in arguments)
        result = dict(status=PASSED, exit_code=None, seconds=0.0, command=shown)
        with open(path, "wb") as file:
            process = subprocess.Popen(arguments, cwd=ROOT, env=threads | os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
                                       stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            try:
                result["exit_code"] = process.wait(self.left())
            except subprocess.TimeoutExpired:
                result["status"] = STOPPED
            finally:
                if process.returncode is None:
                    end(process, 10 if self.world <= 1 else 40)  # torchrun gives its ranks 30 seconds
        output = path.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "")
        if result["exit_code"] not in (None, *fine):
            result["status"] = f"failed: {fault(output, result['exit_code'])}"
        if result["status"] != PASSED:
            result["output_tail"] = output[-2000:]
        result["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {result['seconds']:.0f} s" + (f", {result['status']}" if result["status"] != PASSED else ""), flush=True)
        return result


def end(process: subprocess.Popen, seconds: float):
    """End a process and its group, politely first."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def fault(output: str, exit_code: int) -> str:
    """One line that says why a command failed: the first line of its output that names an error (later ones are torchrun's), else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(^|[\s.])\w*[Ee]rror: ", line)]
    return (named[:1] or lines[-1:] or [f"exit code {exit_code}"])[0][:300]


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# Sections: name -> function(run) -> dict with a "status"

def run_tests(run: Run) -> dict:
    """every test marked gpu"""
    file = run.folder / "tests.xml"
    together = [] if run.reduced or not find_spec("xdist") else ["-n", str(min(8, os.cpu_count() or 1))]  # most of a test's time is compilation
    result = run.command("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "tests", *together, f"--junitxml={file}"], fine=(0, 5))  # 5: found none
    if file.exists():
        cases = ElementTree.parse(file).findall(".//testcase")
        failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("failure") is not None or
                  case.find("error") is not None]
        result |= dict(tests=len(cases), skipped=sum(case.find("skipped") is not None for case in cases), failed=failed)
        if failed:
            result["status"] = f"failed: {len(failed)} of {len(cases)} tests, the first {failed[0]}"
        elif result["status"] == PASSED and result["skipped"] == len(cases):
            result["status"] = SKIPPED if run.reduced else "failed: no test marked gpu ran on this GPU"
    return result


def run_tracks(run: Run) -> dict:
    """a few steps of every track, timed by the trainer"""
    data, rows = run.data or synthetic_shards(run.folder / "shards"), {}
    for track in run.tracks:
        rows[track] = dict(status="interrupted")  # unless it comes to an end
        run.record(tracks=rows)
        rows[track] = run_track(run, track, data)
        run.record(tracks=rows)
    good = sum(row["status"] == PASSED for row in rows.values())
    return dict(status=PASSED if good == len(rows) else f"incomplete: {good} of {len(rows)} tracks passed", tracks=rows)


def run_kernels(run: Run) -> dict:
    """the benchmark of every kernel, at a few sizes"""
    if run.reduced:
        return dict(status=SKIPPED)
    rows = {}
    for script in KERNEL_BENCHMARKS:
        output = run.folder / f"{script}.json"
        rows[script] = run.command(script, [sys.executable, f"benchmarks/{script}.py", "--quick", "--output", str(output)])
        if output.exists():
            found = json.loads(output.read_text())
            rows[script] |= {name: found[name] for name in ("ceilings", "dtype", "rows", "triton_is_fastest") if name in found}
            if not run.reduced:  # for variants/fused_kernels.py
                shutil.copy(output, run.output.parent / f"{script}-{slug(found['device'])}-quick.json")  # beside the full run's
        run.record(kernels=rows)
    good = sum(row["status"] == PASSED for row in rows.values())
    return dict(status=PASSED if good == len(rows) else f"incomplete: {good} of {len(rows)} benchmarks passed", kernels=rows)


def run_profile(run: Run) -> dict:
    """one step of track benchmark by kind of work, on one GPU; on a CPU of track cpu, reduced"""
    output, track = run.folder / "profile.json", "cpu" if run.reduced else "benchmark"
    data = run.data or next(run.folder.glob("shards"), None) or synthetic_shards(run.folder / "shards")
    options = [text for name, value in track_overrides(track, run).items() if name != "steps" for text in (f"--{name}", str(value))]
    result = run.command("profile", [sys.executable, "benchmarks/train_step.py", "--output", str(output), "profile", "--steps", "3", "--track", track, "--data", str(data), *options])
    return result | ({name: value for name, value in json.loads(output.read_text()).items() if name in PROFILE_FACTS} if output.exists() else {})


KERNEL_BENCHMARKS = ("relu_squared_feed_forward", "softcapped_cross_entropy", "symmetric_product", "norm_rotary", "embedding_lookup", "residual_norm",
                     "topological_attention", "gated_linear_attention", "splanifold", "short_convolution")
SECTIONS = {"tests": run_tests, "kernels": run_kernels, "tracks": run_tracks, "profile": run_profile}
SHARES = {"tests": 0.35, "kernels": 0.35, "tracks": 0.25, "profile": 0.05}  # of the time, for a section that others follow
MAIN_TRACKS = ("small", "long", "benchmark", "short")  # few layers first: they compile soonest
PROFILE_FACTS = ("track", "ceilings", "wall", "profiled_wall", "kinds", "flops", "operators", "compile", "dtype", "batch_tokens", "table")

# ---------------------------------------------------------------------------------------------------------------------------------------------------
# One track

# of the trainer's JSON file
FACTS = ("dtype", "compile", "parameters", "parameters_without_embeddings", "flops_per_token", "peak_flops", "warmup_seconds", "train_seconds",
         "ms_per_step", "tokens_per_second", "mfu", "peak_memory_mib", "peak_memory_reserved_mib", "val_loss")


def run_track(run: Run, track: str, data: Path) -> dict:
    overrides = track_overrides(track, run)
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.world}"] if run.world > 1 else []
    result = run.command(track, [sys.executable, *torchrun, "train_gpt.py", "--track", track, "--data", str(data), *options,
                                 "--no-save", "--run_id", track, "--log_dir", str(run.folder)])
    result["overrides"] = overrides
    log, facts = run.folder / f"{track}.txt", run.folder / f"{track}.json"
    if facts.exists():  # a run that was stopped has some of them
        found = json.loads(facts.read_text())
        result |= {name: found[name] for name in FACTS if name in found and not (run.reduced and name in ("mfu", "peak_flops"))}
        if result["status"] == PASSED and found["status"] != "finished":
            result["status"] = f"failed: the trainer left with status {found['status']!r}"
    if log.exists():
        result |= step_spread(log.read_text(errors="replace"))
    return result


def track_overrides(track: str, run: Run) -> dict:
    """What differs from the track's own settings. On a GPU only its length and its validation: a batch of it for each rank."""
    settings = vars(Config(**TRACKS[track]))
    if not run.reduced:
        return dict(steps=run.steps, val_tokens=run.world * max(settings["micro_batch_tokens"], settings["sequence_length"]))
    return dict(steps=run.steps, val_tokens=512, batch_tokens=512, sequence_length=256, micro_batch_tokens=256, compile="off",
                layers=min(settings["layers"], 4), heads=2, head_dim=32, model_dim=64, mlp_hidden=min(settings["mlp_hidden"], 256),
                bigram_rows=min(settings["bigram_rows"], 1024))


def step_spread(log: str) -> dict:
    """
    Median, 10th and 90th percentile of the milliseconds between a log's steps; nothing of fewer than two steps. On a GPU these are the host's
    times: it runs ahead of the device, so that only the run's total (ms_per_step, taken after a synchronisation) says how long a step takes.
    """
    lines = re.findall(r"^step:(\d+)/\d+ train_time:(\d+)ms step_avg:([\d.]+)ms$", log, re.M)
    if len(lines) < 2:
        return {}
    # the average has two decimals and the total none: below step 100 the average times the step is the finer clock
    elapsed = [float(average) * int(step) if int(step) < 100 else float(total) for step, total, average in lines]
    low, median, high = np.percentile(np.diff(elapsed, prepend=0.0), (10, 50, 90)).round(3).tolist()
    return dict(host_ms_p10=low, host_ms_median=median, host_ms_p90=high)


def synthetic_shards(folder: Path, shard_tokens: int = 8 * 524_288, val_tokens: int = 2 * 524_288) -> Path:
    """Two training shards and a validation shard of random GPT-2 tokens, in documents of 400 tokens (median). Returns the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train_000000", shard_tokens), ("train_000001", shard_tokens), ("val_000000", val_tokens)):
        tokens = random.integers(0, 50256, count)
        starts = np.cumsum(random.lognormal(6, 1, count // 100).astype(np.int64) + 2)
        tokens[0] = tokens[starts[starts < count]] = 50256
        write_shard(folder / f"synthetic_{name}.bin", tokens)
    return folder


# ---------------------------------------------------------------------------------------------------------------------------------------------------
# The whole

def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


COLUMNS = (("ms/step", "ms_per_step", "{:.1f}"), ("host median", "host_ms_median", "{:.1f}"), ("p10", "host_ms_p10", "{:.1f}"),
           ("p90", "host_ms_p90", "{:.1f}"), ("tokens/s", "tokens_per_second", "{:,.0f}"), ("MFU", "mfu", "{:.1%}"),
           ("memory MiB", "peak_memory_mib", "{:,}"), ("compile s", "warmup_seconds", "{:.1f}"))


def tracks_table(rows: dict) -> str:
    """The tracks' results as Markdown; "-" where there is no number."""
    return markdown([{"track": track, **{title: form.format(row[name]) if name in row else "-" for title, name, form in COLUMNS}, "status": row["status"]} for track, row in rows.items()])


def kernel_table(rows: list[dict]) -> str:
    """A benchmark's rows as Markdown, whatever their columns are; "-" where there is none."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("p20", "p80")]
    return markdown([{name: f"{row[name]:.4g}" if isinstance(row.get(name), float) else row.get(name, "-") for name in names} for row in rows])


def report(results: dict) -> str:
    """The results as Markdown."""
    sections = results["sections"]
    parts = [f"# {results.get('device', 'unknown device')}\n\nPyTorch {results.get('torch')}, Triton {results.get('triton')}, commit {str(results.get('git_commit'))[:10]}, {results.get('date')}; "
             f"data: {results.get('data')}." + " Reduced run on a CPU: its times say nothing about a GPU." * bool(results.get("reduced"))]
    parts += ["\n".join(f"- {name}: {section.get('status', 'running')}, {section.get('seconds', 0):.0f} s" for name, section in sections.items())]
    if rows := sections.get("tracks", {}).get("tracks"):
        parts += [f"## Tracks\n\n{tracks_table(rows)}"]
    parts += [f"## {script}\n\nMedians in ms.\n\n{kernel_table(found['rows'])}" for script, found in sections.get("kernels", {}).get("kernels", {}).items() if found.get("rows")]
    if table := sections.get("profile", {}).get("table"):
        parts += [f"## One step of track {sections['profile']['track']}\n\n{table}"]
    return "\n\n".join(parts) + "\n"


def run_sections(run: Run, names: list[str]):
    """Run the sections one after another, whatever becomes of each. KeyboardInterrupt passes, once all is recorded."""
    end_of_all = run.deadline
    for index, run.section in enumerate(names):
        start = time.monotonic()
        to_come = sum(SHARES.get(name, 0) for name in names[index:])
        run.deadline = start + (end_of_all - start) * (SHARES[run.section] / to_come if run.section in SHARES else 1)
        if run.left() <= 0:
            run.record(status=LATE)
            continue
        run.record(status="running")
        try:
            result = SECTIONS[run.section](run)
        except KeyboardInterrupt:
            run.record(status="interrupted", seconds=round(time.monotonic() - start, 1))
            for run.section in names[index + 1:]:
                run.record(status="not run: interrupted")
            raise
        except Exception as error:  # the others go on
            result = dict(status=f"failed: {type(error).__name__}: {error}")
        run.record(**{"status": PASSED, **result, "seconds": round(time.monotonic() - start, 1)})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0], allow_abbrev=False)
    names = lambda text: list(dict.fromkeys(text.split(",")))
    parser.add_argument("--sections", type=names, default=list(SECTIONS), help=f"in this order, of {','.join(SECTIONS)}")
    parser.add_argument("--tracks", type=names, default=list(MAIN_TRACKS), help=f"in this order, of {','.join(TRACKS)} ({','.join(MAIN_TRACKS)})")
    parser.add_argument("--minutes", type=float, default=9, help="time for the whole (9); what runs then is ended within 10 s, on several GPUs 40 s")
    parser.add_argument("--steps", type=int, help="timed steps of each track (20; reduced: 2)")
    parser.add_argument("--data", type=Path, help="folder of GPT-2 shards (synthetic ones)")
    parser.add_argument("--output", type=Path, help="JSON file to write (benchmarks/results/<device>.json)")
    parser.add_argument("--list", action="store_true", help="name the sections and leave")
    given = parser.parse_args(argv)
    for kind, asked, there in (("section", given.sections, SECTIONS), ("track", given.tracks, TRACKS)):
        if unknown := [name for name in asked if name not in there]:
            raise RunError(f"unknown {kind} {unknown[0]!r}; there are {', '.join(there)}")
    if given.minutes <= 0 or given.steps is not None and given.steps < 1:
        raise RunError("--minutes must be above 0 and --steps at least 1")
    if given.data and not all(list(given.data.glob(f"*{split}*.bin")) for split in ("train", "val")):
        raise RunError(f"no *train*.bin and *val*.bin in {given.data}; fetch some with data/cached_fineweb10B.py, or leave --data out")
    return given


def interrupt(_number, _frame):
    raise KeyboardInterrupt


def describe(gpus: int) -> dict:
    """Machine, versions and commit, as the trainer records them; the cards as nvidia-smi sees them."""
    facts = environment(Ranks(0, max(gpus, 1), torch.device("cuda" if gpus else "cpu"), torch.float32))
    if not gpus:
        return facts
    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    return facts | dict(cards=command_output("nvidia-smi", query, "--format=csv").splitlines())


def suite(given: argparse.Namespace) -> int:
    start, gpus = time.monotonic(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = describe(gpus)
    name = slug(facts["device"]) if gpus == 1 else f"{gpus}x-{slug(facts['device'])}" if gpus else f"cpu-{slug(facts['device'])}"
    output = given.output or Path(__file__).resolve().parent / "results" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = dict(reduced=not gpus, date=datetime.now(timezone.utc).isoformat(timespec="seconds"), status="running", minutes=given.minutes,
                   seconds=None, **facts, data=str(given.data or "synthetic"), sections={})
    if gpus:
        print(f"{gpus} x {facts['device']}, PyTorch {facts['torch']}, Triton {facts['triton']}, commit {facts['git_commit'][:10]}", flush=True)
    else:
        print(f"reduced run on a CPU ({facts['device']}): proves that the tracks run; its times and memory say nothing about a GPU", flush=True)
    with tempfile.TemporaryDirectory(prefix="knotgpt-") as folder:
        run = Run(given.steps or (20 if gpus else 2), given.tracks, given.data and given.data.resolve(), not gpus, max(gpus, 1),
                  start + 60 * given.minutes, Path(folder), output, results)
        try:
            run_sections(run, given.sections)
            code = int(any(section["status"] not in (PASSED, SKIPPED) for section in results["sections"].values()))
        except KeyboardInterrupt:
            code = 130
        results |= dict(status={0: PASSED, 1: "incomplete", 130: "interrupted"}[code], seconds=round(time.monotonic() - start, 1))
        run.record()
    print()
    if rows := results["sections"].get("tracks", {}).get("tracks"):
        print(tracks_table(rows) + "\n")
    for name, section in results["sections"].items():
        print(f"{name}: {section['status']}, {section.get('seconds', 0):.0f} s")
    print(f"{results['status']} in {results['seconds']:.0f} s; {output}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 all passed (or skipped on a CPU), 1 something did not, 2 nothing could be done, 130 interrupted."""
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        given = parse(argv)
        if given.list:
            print("\n".join(f"{name:10}{function.__doc__}" for name, function in SECTIONS.items()))
            return 0
        return suite(given)
    except RunError as error:
        print(f"gpu_suite.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gpu_suite.py: error: {error.filename}: {error.strerror}; choose another --output or free some space", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    sys.exit(main())
