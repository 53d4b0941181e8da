"""
What the kernels' benchmarks share: the tests come first, arms are timed in turn, figures stand beside the device's two
ceilings, results are a table and a JSON file.

A benchmark is a function measure(place, **size) -> rows, one for each arm and pass, and a table of sizes;
kernel_benchmark() makes a command of it. Milliseconds everywhere. On a GPU times are the device's own (events), with
the cache emptied before each call; on a CPU the wall clock's.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.command_line import run_script
from train_gpt import Ranks, RunError, environment, measured_peak, require, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
COPY = "copy"  # the arm that only moves as many bytes
SHARES = dict(  # of a row -> title and form
    speedup=("against {}", "{:.2f}x"), product_share=("% of product rate", "{:.0%}"),
    copy_share=("% of copy", "{:.0%}"), bound_share=("% of bound", "{:.0%}"), peak_mib=("peak MiB", "{:,}"))


class Place(NamedTuple):
    """Where and how a benchmark measures."""
    device: torch.device
    dtype: torch.dtype
    seconds: float      # for each arm and pass
    limits: dict        # ceilings()
    quick: bool = False


def require_tests(*paths: str):
    """
    Run these test files, where there is a GPU those that need one. RunError if one fails: a speed of something wrong is
    no speed.
    """
    chosen = ["-m", "gpu"] if torch.cuda.is_available() else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", *chosen, *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        failed = lines[0] if lines else f"exit code {result.returncode}"
        raise RunError(f"no figures while tests fail: {failed}; mend it, or see it by pytest {' '.join(paths)}")


# ---- Times ------------------------------------------------------------------


def in_turn(arms: dict[str, Callable], device: torch.device, seconds: float = 1.0,
            least: int = 5) -> dict[str, dict | str]:
    """
    {arm: dict(median, p20, p80 in ms, n, peak_mib on a GPU)}. Arms take turns: one call each on a GPU; on a CPU calls
    for a tenth of a second, the first of which brings back the arm's caches and is not counted unless it takes that
    long. An arm that fails has its error's first line instead, "out of memory" where that is it. seconds: for each arm,
    after two calls that are not counted; `least` calls in any case.
    """
    # two calls of each
    cuda = device.type == "cuda"
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if cuda else None
    results, first = {}, {}
    for name, function in arms.items():
        try:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            function()
            first[name] = timed(function, flush)
            results[name] = dict(peak_mib=torch.cuda.max_memory_allocated() >> 20) if cuda else {}
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            results[name] = "out of memory" if memory else first_line(error)

    # in turn, until each has enough
    together = {name: 1 if cuda else max(1, int(100 / ms)) for name, ms in first.items()}
    wanted = {name: max(least, int(1000 * seconds / ms)) for name, ms in first.items()}
    times = {name: [] for name in first}
    unfinished = list(times)
    while unfinished:
        for name in unfinished:
            if together[name] > 1:
                arms[name]()
            times[name] += [timed(arms[name], flush) for _ in range(together[name])]
        unfinished = [name for name in times if len(times[name]) < wanted[name]]

    for name, ms in times.items():
        low, median, high = np.percentile(ms, (20, 50, 80)).tolist()
        results[name] |= dict(median=median, p20=low, p80=high, n=len(ms))
    return results


def timed(function: Callable, flush: torch.Tensor | None) -> float:
    """Milliseconds of a call; on a GPU, where there is a tensor that empties its cache, the device's own."""
    if flush is None:
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """flops: FLOP/s of a large product in this dtype; bytes: bytes/s read and written by a large copy."""
    n = 1 << 30 if device.type == "cuda" else 1 << 26
    source, target = (torch.zeros(n, dtype=torch.int8, device=device) for _ in range(2))
    copy = in_turn({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return dict(flops=measured_peak(Ranks(0, 1, device, dtype)), bytes=2 * n / (copy["median"] / 1000))


# ---- Arms and their rows ----------------------------------------------------


def sizes(names: str, *shapes: tuple) -> list[dict]:
    """sizes("N D", (4, 2), (8, 2)) -> [dict(N=4, D=2), dict(N=8, D=2)]"""
    return [dict(zip(names.split(), shape)) for shape in shapes]


def compile_arms(**functions: Callable) -> dict[str, Callable]:
    """{"NAME, compiled": the function compiled}, for one size: what is compiled for others is forgotten."""
    torch.compiler.reset()  # it counts towards the number after which nothing more is compiled
    return {f"{name}, compiled": torch.compile(function, dynamic=False) for name, function in functions.items()}


def rows_in_turn(place: Place, case: dict, what: str, arms: dict[str, Callable], flops: float = 0, moved: float = 0,
                 bound: Callable | None = None, against: str | None = None, others: tuple[str, ...] = ()) -> list[dict]:
    """
    A row for each arm: the case's own names, arm, what, and its times or its fault; product_share and copy_share, the
    parts that FLOPs and bytes `moved` need at the ceilings; bound_share, the part that bound(arm) in ms is; speedup
    over the arm `against`. With `moved` there is an arm more that only copies as many bytes. others: arms that do
    something else, and have no shares.
    """
    # the times
    arms = dict(arms)
    if moved:
        source, target = (torch.zeros(int(moved) // 2, dtype=torch.int8, device=place.device) for _ in range(2))
        arms[COPY] = lambda: target.copy_(source)
    times = in_turn(arms, place.device, place.seconds)

    # beside what they could be
    rows = []
    for arm, result in times.items():
        row = case | dict(arm=arm, what=what)
        if isinstance(result, str):
            rows.append(row | dict(fault=result))
            continue
        if arm not in others:
            least = dict(copy_share=1000 * moved / place.limits["bytes"])
            if arm != COPY:
                product = dict(product_share=1000 * flops / place.limits["flops"])
                least = product | least | dict(bound_share=bound and bound(arm))
            result = result | {name: ms / result["median"] for name, ms in least.items() if ms}
        peer = times.get(against)
        if isinstance(peer, dict):
            result = result | dict(speedup=peer["median"] / result["median"], against=against)
        rows.append(row | result)
    return rows


def fault_of(results: Callable, expected: list[torch.Tensor], tolerances: float | list[float],
             least: Callable = lambda y: 0.0) -> str | None:
    """
    What is wrong with the tensors that results() returns, by the relative RMS error of each against `expected`
    (float64); None if nothing is. least(y): the smallest norm that an error is put in relation to.
    """
    try:
        errors = [((x.double() - y).norm() / y.norm().clamp_min(least(y))).item()
                  for x, y in zip(results(), expected, strict=True)]
    except Exception as error:
        return first_line(error)
    tolerances = tolerances if isinstance(tolerances, list) else [tolerances] * len(errors)
    if all(error < tolerance for error, tolerance in zip(errors, tolerances, strict=True)):
        return None
    return f"wrong: relative RMS errors {', '.join(f'{error:.1e}' for error in errors)}"


def faults_of(arms: dict[str, Callable], check: Callable) -> dict[str, str]:
    """{arm: fault} of the arms in which check(function) finds one."""
    faults = {arm: check(function) for arm, function in arms.items()}
    return {arm: fault for arm, fault in faults.items() if fault}


def fault_rows(case: dict, faults: dict[str, str]) -> list[dict]:
    """The rows of arms that are wrong, and have no time."""
    return [case | dict(arm=arm, what="check", fault=fault) for arm, fault in faults.items()]


def both_passes(function: Callable, tensors: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    The results of function(*tensors), and the gradients of the tensors that have some, for the gradients of the
    results.
    """
    results = function(*tensors)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    return [*results, *torch.autograd.grad(results, [x for x in tensors if x.requires_grad], gradients)]


def check_arms(arms: dict[str, Callable], tensors: list, gradients: list, reference: Callable, tolerance: float,
               least: Callable) -> dict[str, str]:
    """faults_of() arms whose results or gradients are not those of the reference in float64."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    expected = both_passes(reference, exact, [gradient.double() for gradient in gradients])

    def check(function: Callable) -> str | None:
        return fault_of(lambda: both_passes(function, tensors, gradients), expected, tolerance, least)
    return faults_of(arms, check)


def measure_arms(place: Place, case: dict, arms: dict[str, Callable], inputs: tuple[list, list], reference: Callable,
                 tolerance: float, work: tuple[dict, dict] = ({}, {}), checked: tuple[list, list] | None = None,
                 unchecked: dict | None = None, least: Callable = lambda y: 0.0, **options) -> list[dict]:
    """
    Rows of arms that are functions of the same tensors, forward (without what a backward pass needs) and forward +
    backward; an arm that is wrong has a row that says so, and no time. inputs: (tensors, gradients of the results);
    checked: smaller ones to compare with the reference in float64; work: flops, moved and bound of rows_in_turn, of the
    forward pass and of both; unchecked: {arm: (forward, both passes)} of another operation; options: of rows_in_turn.
    """
    faults = check_arms(arms, *(checked or inputs), reference, tolerance, least)
    forward = torch.no_grad()(lambda function: function(*inputs[0]))
    passes = {"forward": forward, "forward + backward": lambda function: both_passes(function, *inputs)}
    rows = fault_rows(case, faults)
    for index, (what, call) in enumerate(passes.items()):
        calls = {arm: lambda function=function, call=call: call(function) for arm, function in arms.items()
                 if arm not in faults}
        calls |= {arm: pair[index] for arm, pair in (unchecked or {}).items()}
        rows += rows_in_turn(place, case, what, calls, others=tuple(unchecked or ()), **work[index], **options)
    return rows


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# ---- Results ----------------------------------------------------------------


def describe(device: torch.device) -> dict:
    """Machine, versions and commit as the trainer records them, a GPU's compute capability, and the time."""
    capability = torch.cuda.get_device_capability() if device.type == "cuda" else None
    return environment(Ranks(0, 1, device, torch.float32)) | dict(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"), capability=capability)


def is_fastest(arm: str, rows: list[dict], size: tuple[str, ...], others: tuple[str, ...] = (COPY,)) -> bool:
    """
    Whether this arm took less time than every other arm but `others`, which do something else, forward and backward at
    every size: what variants/fused_kernels.py turns a kernel on by. size: the names in a row that make the size. An arm
    that failed counts as infinitely slow.
    """
    never = float("inf")
    times = {}  # size -> {arm: least ms}
    for row in rows:
        if row["what"] != "forward" and row["arm"] not in others:
            arms = times.setdefault(tuple(str(row[name]) for name in size), {arm: never})
            arms[row["arm"]] = min(arms.get(row["arm"], never), row.get("median", never))

    def leads(arms: dict) -> bool:
        return len(arms) > 1 and all(arms[arm] < ms for other, ms in arms.items() if other != arm)

    return bool(times) and all(map(leads, times.values()))


def verdict(device: torch.device, rows: list[dict], size: tuple[str, ...], others: tuple[str, ...]) -> dict:
    """
    {"triton_is_fastest": ...} of a GPU, {"loops_are_fastest": ...} of a CPU. There compiled arms are shown and do not
    compete: short runs are eager, and in a compiled step the compiler fuses more than one operation;
    benchmarks/train_step.py variant compares the steps.
    """
    if device.type == "cuda":
        return dict(triton_is_fastest=is_fastest("triton", rows, size, others))
    compiled = {row["arm"] for row in rows if row["arm"].endswith("compiled")}
    return dict(loops_are_fastest=is_fastest("loops", rows, size, (*others, *compiled)))


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(name: str, results: dict, output: Path | None = None, folder: Path = RESULTS) -> Path:
    """Write results, with their "device", to <name>-<device>.json in a folder or to `output`; returns the path."""
    output = output or folder / f"{name}-{slug(results['device'])}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(json.dumps(results, indent=1).encode() + b"\n"))
    return output


def markdown(rows: list[dict]) -> str:
    """A Markdown table of rows with equal keys."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def shown(rows: list[dict]) -> str:
    """The rows as Markdown, the names that come before "arm" as columns of their own."""
    def cell(value, form: str) -> str:
        return "-" if value is None else form.format(value)

    # the shares that some row has
    against = next((row["against"] for row in rows if "against" in row), "")
    shares = {name: (title.format(against), form) for name, (title, form) in SHARES.items()
              if any(row.get(name) is not None for row in rows)}

    lines = []
    for row in rows:
        size = list(row.items())[:list(row).index("arm")]
        line = {name: cell(value, "{:,}" if isinstance(value, int) else "{}") for name, value in size}
        line |= {"arm": row["arm"], "pass": row["what"], "ms": row.get("fault") or f"{row['median']:.3g}"}
        line["20 to 80 %"] = "-" if "fault" in row else f"{row['p20']:.3g} to {row['p80']:.3g}"
        line["n"] = row.get("n", "-")
        lines.append(line | {title: cell(row.get(name), form) for name, (title, form) in shares.items()})
    return markdown(lines)


# ---- The command ------------------------------------------------------------


def parse_size(text: str) -> dict:
    """N=65536,D=768 as a dict; numbers where they are some."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and sign and value for name, sign, value in pairs):
        raise argparse.ArgumentTypeError(f"a size is written N=65536,D=768; got {text!r}")
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


def kernel_benchmark(name: str, doc: str, measure: Callable, tests: dict[str, list[str]], sizes: dict[str, list[dict]],
                     quick: dict[str, list[dict]], seconds: float = 1.0, names: tuple[str, ...] = (),
                     others: tuple[str, ...] = (), facts: Callable[[list[dict]], dict] | None = None) -> int:
    """
    A benchmark's command line: runs its tests, measures at every size, writes benchmarks/results/<name>-<device>.json
    after each, prints a table. tests, sizes, quick: by the device's type; names: of a row's columns within which arms
    compete, where these are more than a size's; others: arms that do something else, with which "triton" and, on a CPU,
    "loops" do not compete; facts(rows): what the file and the last line say of all sizes together. Returns the exit
    code.
    """
    # the options
    example = ",".join(f"{key}={value}" for key, value in sizes["cpu"][0].items())
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sizes, shorter timing")
    parser.add_argument("--sizes", nargs="+", type=parse_size,
                        help=f"such as {example}; what is left out is as there")
    parser.add_argument("--seconds", type=float,
                        help=f"of timing for each arm and pass ({seconds:g}; quick: {0.3 * seconds:g})")
    parser.add_argument("--minutes", type=float, default=60.0, help="no size begins later than this (60)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    options = parser.parse_args()
    options.seconds = options.seconds or seconds * (0.3 if options.quick else 1)

    def work():
        # the place and the sizes
        start = time.monotonic()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        first = sizes[device.type][0]
        chosen = (quick if options.quick else sizes)[device.type]
        if options.sizes:
            for key in (key for size in options.sizes for key in size):
                require(key in first, f"--sizes has no {key!r}; there are {', '.join(first)}")
            chosen = [first | size for size in options.sizes]

        # the tests, then every size
        require_tests(*tests[device.type])
        place = Place(device, dtype, options.seconds, ceilings(device, dtype), options.quick)
        results = describe(device) | dict(dtype=str(dtype).removeprefix("torch."), ceilings=place.limits, rows=[],
                                          left_out=[])
        for size in chosen:
            if time.monotonic() - start > 60 * options.minutes:
                results["left_out"].append(size)
                continue
            results["rows"] += measure(place, **size)
            results |= verdict(device, results["rows"], names or tuple(size), (COPY, *others))
            if facts is not None:
                results |= facts(results["rows"])
            save(name, results, options.output)
            print(f"{', '.join(f'{key} {value}' for key, value in size.items())}: done", flush=True)
        require(results["rows"], f"--minutes {options.minutes:g} left no time for a size after the tests; give more")

        path = save(name, results, options.output)
        limits = place.limits
        print(f"\n{shown(results['rows'])}\n\n{limits['flops'] / 1e12:.3g} TFLOP/s of a large product, "
              f"{limits['bytes'] / 1e9:.3g} GB/s copied; {len(results['left_out'])} sizes left out; {path}")
        if facts is not None:
            print("; ".join(f"{key}: {fact}" for key, fact in facts(results["rows"]).items()))
    return run_script(f"{name}.py", work)
