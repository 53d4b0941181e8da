"""
Everything that wants a GPU, in one command: the GPU tests, the kernels' benchmarks, a few steps of the main tracks, a
profile of one, as a JSON file and tables.

    python -m benchmarks.gpu_suite              all of it, nine minutes at most, on all GPUs of this machine
    python -m benchmarks.gpu_suite --sections tracks --tracks short,small --steps 50 --data data/fineweb10B
    python -m benchmarks.gpu_suite --list       the sections

benchmarks/results/<device>.json and .md are rewritten after every run: what was measured stays, whatever happens to the
rest. A section that comes before others leaves them their shares of the time (SHARES).
Without a GPU a reduced form runs (a tiny batch, few and narrow layers, nothing compiled; no kernels): it proves that
the tracks run and measures nothing.
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

import numpy as np
import torch

from benchmarks.timing import ROOT, markdown, slug
from data.shards import write_shard
from train_gpt import TRACKS, Config, Ranks, RunError, command_output, environment, require, write_atomically

# a section's status
PASSED = "passed"
SKIPPED = "skipped"
STOPPED = "stopped: out of time"
LATE = "not run: out of time"


@dataclass
class Run:
    """
    What a section has to work with. GPU work belongs in command(): a faulty kernel spoils CUDA for the whole process
    that it runs in.
    """
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
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def record(self, **facts):
        """Add facts to the present section's result and write the files."""
        self.results["sections"].setdefault(self.section, {}).update(facts)
        write_atomically(self.output, lambda file: file.write(json.dumps(self.results, indent=1).encode() + b"\n"))
        write_atomically(self.output.with_suffix(".md"), lambda file: file.write(report(self.results).encode()))

    def command(self, name: str, arguments: list[str], fine: tuple[int, ...] = (0,)) -> dict:
        """
        Run a command in the repository's root, for the time left at most. Returns status ("passed": the exit code is
        fine), exit code, seconds.
        """
        if self.left() <= 0:
            return dict(status=LATE)
        print(f"{name} ...", flush=True)

        # start it, and wait for it
        start = time.monotonic()
        path = self.folder / f"{name}.output"
        threads = {"OMP_NUM_THREADS": "1"} if self.reduced else {}  # on a busy CPU a second one costs time
        shown = shlex.join("python" if word == sys.executable else word for word in arguments)
        result = dict(status=PASSED, exit_code=None, seconds=0.0, command=shown)
        with open(path, "wb") as file:
            process = subprocess.Popen(arguments, cwd=ROOT, env=threads | os.environ | {"PYTHONUNBUFFERED": "1"},
                                       start_new_session=True, stdin=subprocess.DEVNULL, stdout=file,
                                       stderr=subprocess.STDOUT)
            try:
                result["exit_code"] = process.wait(self.left())
            except subprocess.TimeoutExpired:
                result["status"] = STOPPED
            finally:
                if process.returncode is None:
                    end(process, 10 if self.world <= 1 else 40)  # torchrun gives its ranks 30 seconds

        # what became of it
        output = path.read_text(errors="replace").replace(f"{ROOT}{os.sep}", "")
        if result["exit_code"] not in (None, *fine):
            result["status"] = f"failed: {fault(output, result['exit_code'])}"
        if result["status"] != PASSED:
            result["output_tail"] = output[-2000:]
        result["seconds"] = round(time.monotonic() - start, 1)
        line = f"{name}: {result['seconds']:.0f} s"
        if result["status"] != PASSED:
            line += f", {result['status']}"
        print(line, flush=True)
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
    """
    One line that says why a command failed: the first line of its output that names an error (later ones are
    torchrun's), else the last one.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(^|[\s.])\w*[Ee]rror: ", line)]
    return (named[:1] or lines[-1:] or [f"exit code {exit_code}"])[0][:300]


# ---- Sections ---------------------------------------------------------------

# name -> function(run) -> dict with a "status"; its docstring is the section's help


def run_tests(run: Run) -> dict:
    """every test marked gpu"""
    # several at once, as most of a test's time is compilation
    file = run.folder / "tests.xml"
    together = [] if run.reduced or not find_spec("xdist") else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", *together, f"--junitxml={file}"]
    result = run.command("tests", command, fine=(0, 5))  # 5: found none
    if not file.exists():
        return result

    # what pytest's own report says
    cases = ElementTree.parse(file).findall(".//testcase")
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases
              if case.find("failure") is not None or case.find("error") is not None]
    result |= dict(tests=len(cases), skipped=sum(case.find("skipped") is not None for case in cases), failed=failed)
    if failed:
        result["status"] = f"failed: {len(failed)} of {len(cases)} tests, the first {failed[0]}"
    elif result["status"] == PASSED and result["skipped"] == len(cases):
        result["status"] = SKIPPED if run.reduced else "failed: no test marked gpu ran on this GPU"
    return result


def summarise(rows: dict, what: str) -> str:
    """The status of a section of several runs: passed, or how many of them are."""
    good = sum(row["status"] == PASSED for row in rows.values())
    return PASSED if good == len(rows) else f"incomplete: {good} of {len(rows)} {what} passed"


def run_tracks(run: Run) -> dict:
    """a few steps of every track, timed by the trainer"""
    data, rows = run.data or synthetic_shards(run.folder / "shards"), {}
    for track in run.tracks:
        rows[track] = dict(status="interrupted")  # unless it comes to an end
        run.record(tracks=rows)
        rows[track] = run_track(run, track, data)
        run.record(tracks=rows)
    return dict(status=summarise(rows, "tracks"), tracks=rows)


def run_kernels(run: Run) -> dict:
    """the benchmark of every kernel, at a few sizes"""
    if run.reduced:
        return dict(status=SKIPPED)
    rows = {}
    for script in KERNEL_BENCHMARKS:
        output = run.folder / f"{script}.json"
        command = [sys.executable, "-m", f"benchmarks.{script}", "--quick", "--output", str(output)]
        rows[script] = run.command(script, command)
        if output.exists():
            facts = json.loads(output.read_text())
            rows[script] |= {name: facts[name] for name in ("ceilings", "dtype", "rows", "triton_is_fastest")
                             if name in facts}
            if not run.reduced:  # for variants/fused_kernels.py, beside the full run's
                shutil.copy(output, run.output.parent / f"{script}-{slug(facts['device'])}-quick.json")
        run.record(kernels=rows)
    return dict(status=summarise(rows, "benchmarks"), kernels=rows)


def run_profile(run: Run) -> dict:
    """one step of track benchmark by kind of work, on one GPU; on a CPU of track cpu, reduced"""
    output, track = run.folder / "profile.json", "cpu" if run.reduced else "benchmark"
    data = run.data or next(run.folder.glob("shards"), None) or synthetic_shards(run.folder / "shards")
    options = words_of(track_overrides(track, run) | dict(steps=3))
    result = run.command("profile", [sys.executable, "-m", "benchmarks.train_step", "--output", str(output), "profile",
                                     "--track", track, "--data", str(data), *options])
    facts = json.loads(output.read_text()) if output.exists() else {}
    return result | {name: facts[name] for name in PROFILE_FACTS if name in facts}


def words_of(options: dict) -> list[str]:
    """Options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


KERNEL_BENCHMARKS = (
    "relu_squared_feed_forward", "softcapped_cross_entropy", "symmetric_product", "norm_rotary", "embedding_lookup",
    "residual_norm", "topological_attention", "gated_linear_attention", "splanifold", "short_convolution", "lane_scan",
    "low_rank_pair", "sign_projection")
SECTIONS = {"tests": run_tests, "kernels": run_kernels, "tracks": run_tracks, "profile": run_profile}
SHARES = {"tests": 0.35, "kernels": 0.35, "tracks": 0.25, "profile": 0.05}  # of the time, where others follow
MAIN_TRACKS = ("small", "long", "benchmark", "short")  # few layers first: they compile soonest
PROFILE_FACTS = ("track", "ceilings", "wall", "profiled_wall", "kinds", "flops", "operators", "compile", "dtype",
                 "batch_tokens", "table")

# ---- One track --------------------------------------------------------------

FACTS = (  # of the trainer's JSON file
    "dtype", "compile", "parameters", "parameters_without_embeddings", "flops_per_token", "peak_flops",
    "warmup_seconds", "train_seconds", "ms_per_step", "tokens_per_second", "mfu", "peak_memory_mib",
    "peak_memory_reserved_mib", "val_loss")
GPU_FACTS = ("mfu", "peak_flops")  # that say nothing of a reduced run


def run_track(run: Run, track: str, data: Path) -> dict:
    """A few steps of a track: the command's result, the trainer's facts and the spread of its steps."""
    # train
    overrides = track_overrides(track, run)
    result = run.command(track, [sys.executable, *torchrun(run.world), "train_gpt.py", "--track", track,
                                 "--data", str(data), *words_of(overrides), "--no-save", "--run_id", track,
                                 "--log_dir", str(run.folder)])
    result["overrides"] = overrides

    # a run that was stopped has some of the facts
    log, file = run.folder / f"{track}.txt", run.folder / f"{track}.json"
    if file.exists():
        facts = json.loads(file.read_text())
        left_out = GPU_FACTS if run.reduced else ()
        result |= {name: facts[name] for name in FACTS if name in facts and name not in left_out}
        if result["status"] == PASSED and facts["status"] != "finished":
            result["status"] = f"failed: the trainer left with status {facts['status']!r}"
    if log.exists():
        result |= step_spread(log.read_text(errors="replace"))
    return result


def torchrun(world: int) -> list[str]:
    """What stands between Python and a script that runs as so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []


def track_overrides(track: str, run: Run) -> dict:
    """
    What differs from the track's settings. On a GPU only its length and its validation: a batch of it for each rank.
    """
    settings = Config(**TRACKS[track])
    if not run.reduced:
        batch = max(settings.micro_batch_tokens, settings.sequence_length)
        return dict(steps=run.steps, val_tokens=run.world * batch)
    return dict(steps=run.steps, val_tokens=512, batch_tokens=512, sequence_length=256, micro_batch_tokens=256,
                compile="off", layers=min(settings.layers, 4), heads=2, head_dim=32, model_dim=64,
                mlp_hidden=min(settings.mlp_hidden, 256), bigram_rows=min(settings.bigram_rows, 1024))


def step_spread(log: str) -> dict:
    """
    Median, 10th and 90th percentile of the milliseconds between a log's steps; nothing of fewer than two steps. On a
    GPU these are the host's times: it runs ahead of the device, so that only the run's total (ms_per_step, taken after
    a synchronisation) says how long a step takes.
    """
    lines = re.findall(r"^step:(\d+)/\d+ train_time:(\d+)ms step_avg:([\d.]+)ms$", log, re.M)
    if len(lines) < 2:
        return {}
    # the average has two decimals and the total none: below step 100 the average times the step is the finer clock
    elapsed = [float(average) * int(step) if int(step) < 100 else float(total) for step, total, average in lines]
    low, median, high = np.percentile(np.diff(elapsed, prepend=0.0), (10, 50, 90)).round(3).tolist()
    return dict(host_ms_p10=low, host_ms_median=median, host_ms_p90=high)


def synthetic_shards(folder: Path, shard_tokens: int = 8 * 524_288, val_tokens: int = 2 * 524_288) -> Path:
    """
    Two training shards and a validation shard of random GPT-2 tokens, in documents of 400 tokens (median). Returns the
    folder.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, count in (("train_000000", shard_tokens), ("train_000001", shard_tokens), ("val_000000", val_tokens)):
        tokens = random.integers(0, 50256, count)
        starts = np.cumsum(random.lognormal(6, 1, count // 100).astype(np.int64) + 2)
        tokens[0] = tokens[starts[starts < count]] = 50256
        write_shard(folder / f"synthetic_{name}.bin", tokens)
    return folder


# ---- Tables -----------------------------------------------------------------

COLUMNS = (("ms/step", "ms_per_step", "{:.1f}"), ("host median", "host_ms_median", "{:.1f}"),
           ("p10", "host_ms_p10", "{:.1f}"), ("p90", "host_ms_p90", "{:.1f}"),
           ("tokens/s", "tokens_per_second", "{:,.0f}"), ("MFU", "mfu", "{:.1%}"),
           ("memory MiB", "peak_memory_mib", "{:,}"), ("compile s", "warmup_seconds", "{:.1f}"))


def tracks_table(rows: dict) -> str:
    """The tracks' results as Markdown; "-" where there is no number."""
    lines = []
    for track, row in rows.items():
        numbers = {title: form.format(row[name]) if name in row else "-" for title, name, form in COLUMNS}
        lines.append({"track": track, **numbers, "status": row["status"]})
    return markdown(lines)


def kernel_table(rows: list[dict]) -> str:
    """A benchmark's rows as Markdown, whatever their columns are; "-" where there is none."""
    def cell(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else value

    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("p20", "p80")]
    return markdown([{name: cell(row.get(name, "-")) for name in names} for row in rows])


def report(results: dict) -> str:
    """The results as Markdown."""
    # the machine
    sections = results["sections"]
    facts = (f"PyTorch {results.get('torch')}, Triton {results.get('triton')}, commit "
             f"{str(results.get('git_commit'))[:10]}, {results.get('date')}; data: {results.get('data')}.")
    if results.get("reduced"):
        facts += " Reduced run on a CPU: its times say nothing about a GPU."
    paragraphs = [f"# {results.get('device', 'unknown device')}", facts]

    # the sections
    paragraphs.append("\n".join(f"- {name}: {section.get('status', 'running')}, {section.get('seconds', 0):.0f} s"
                                for name, section in sections.items()))
    tracks = sections.get("tracks", {}).get("tracks")
    if tracks:
        paragraphs += ["## Tracks", tracks_table(tracks)]
    for script, benchmark in sections.get("kernels", {}).get("kernels", {}).items():
        if benchmark.get("rows"):
            paragraphs += [f"## {script}", "Medians in ms.", kernel_table(benchmark["rows"])]
    profile = sections.get("profile", {})
    if profile.get("table"):
        paragraphs += [f"## One step of track {profile['track']}", profile["table"]]
    return "\n\n".join(paragraphs) + "\n"


# ---- The command ------------------------------------------------------------


def run_sections(run: Run, names: list[str]):
    """Run the sections one after another, whatever becomes of each. KeyboardInterrupt passes, once all is recorded."""
    end_of_all = run.deadline
    for index, run.section in enumerate(names):
        # its share of the time that is left
        start = time.monotonic()
        to_come = sum(SHARES.get(name, 0) for name in names[index:])
        share = SHARES[run.section] / to_come if run.section in SHARES else 1
        run.deadline = start + (end_of_all - start) * share
        if run.left() <= 0:
            run.record(status=LATE)
            continue

        # what it does in it
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


def names_in(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(text.split(",")))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line. RunError for one without a meaning."""
    # the options
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--sections", type=names_in, default=list(SECTIONS),
                        help=f"in this order, of {','.join(SECTIONS)}")
    parser.add_argument("--tracks", type=names_in, default=list(MAIN_TRACKS),
                        help=f"in this order, of {','.join(TRACKS)} ({','.join(MAIN_TRACKS)})")
    parser.add_argument("--minutes", type=float, default=9,
                        help="time for all of it (9); what runs then is ended within 10 s, on several GPUs 40 s")
    parser.add_argument("--steps", type=int, help="timed steps of each track (20; reduced: 2)")
    parser.add_argument("--data", type=Path, help="folder of GPT-2 shards (synthetic ones)")
    parser.add_argument("--output", type=Path, help="JSON file to write (benchmarks/results/<device>.json)")
    parser.add_argument("--list", action="store_true", help="name the sections and leave")
    options = parser.parse_args(argv)

    # their faults
    for kind, names, known in (("section", options.sections, SECTIONS), ("track", options.tracks, TRACKS)):
        for name in names:
            require(name in known, f"unknown {kind} {name!r}; there are {', '.join(known)}")
    require(options.minutes > 0 and (options.steps is None or options.steps >= 1),
            "--minutes must be above 0 and --steps at least 1")
    require(not options.data or all(list(options.data.glob(f"*{split}*.bin")) for split in ("train", "val")),
            f"no *train*.bin and *val*.bin in {options.data}; fetch some with python -m data.cached_fineweb10B, or "
            "leave --data out")
    return options


def interrupt(_number, _frame):
    raise KeyboardInterrupt


def describe(gpus: int) -> dict:
    """Machine, versions and commit, as the trainer records them; the cards as nvidia-smi sees them."""
    facts = environment(Ranks(0, max(gpus, 1), torch.device("cuda" if gpus else "cpu"), torch.float32))
    if not gpus:
        return facts
    query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
    return facts | dict(cards=command_output("nvidia-smi", query, "--format=csv").splitlines())


def file_name(device: str, gpus: int) -> str:
    """The name of the results' file, without its ending."""
    if gpus == 1:
        return slug(device)
    return f"{gpus}x-{slug(device)}" if gpus else f"cpu-{slug(device)}"


def suite(options: argparse.Namespace) -> int:
    """Run what a command line asks for; returns the exit code."""
    # the machine
    start = time.monotonic()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts = describe(gpus)
    output = options.output or Path(__file__).resolve().parent / "results" / f"{file_name(facts['device'], gpus)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = dict(reduced=not gpus, date=datetime.now(timezone.utc).isoformat(timespec="seconds"), status="running",
                   minutes=options.minutes, seconds=None, **facts, data=str(options.data or "synthetic"), sections={})
    if gpus:
        print(f"{gpus} x {facts['device']}, PyTorch {facts['torch']}, Triton {facts['triton']}, "
              f"commit {facts['git_commit'][:10]}", flush=True)
    else:
        print(f"reduced run on a CPU ({facts['device']}): proves that the tracks run; its times and memory say nothing "
              "about a GPU", flush=True)

    # the sections
    with tempfile.TemporaryDirectory(prefix="knotgpt-") as folder:
        run = Run(options.steps or (20 if gpus else 2), options.tracks, options.data and options.data.resolve(),
                  not gpus, max(gpus, 1), start + 60 * options.minutes, Path(folder), output, results)
        try:
            run_sections(run, options.sections)
            code = int(any(section["status"] not in (PASSED, SKIPPED) for section in results["sections"].values()))
        except KeyboardInterrupt:
            code = 130
        status = {0: PASSED, 1: "incomplete", 130: "interrupted"}[code]
        results |= dict(status=status, seconds=round(time.monotonic() - start, 1))
        run.record()

    # what they gave
    print()
    tracks = results["sections"].get("tracks", {}).get("tracks")
    if tracks:
        print(tracks_table(tracks) + "\n")
    for name, section in results["sections"].items():
        print(f"{name}: {section['status']}, {section.get('seconds', 0):.0f} s")
    print(f"{results['status']} in {results['seconds']:.0f} s; {output}")
    return code


def main(argv: list[str] | None = None) -> int:
    """
    Run a command line. Returns the exit code: 0 all passed (or skipped on a CPU), 1 something did not, 2 nothing could
    be done, 130 interrupted.
    """
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        options = parse(argv)
        if options.list:
            print("\n".join(f"{name:10}{function.__doc__}" for name, function in SECTIONS.items()))
            return 0
        return suite(options)
    except RunError as error:
        print(f"gpu_suite.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gpu_suite.py: error: {error.filename}: {error.strerror}; choose another --output or free some space",
              file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    sys.exit(main())
