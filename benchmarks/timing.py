"""
What the kernels' benchmarks share: the tests come first, arms are timed in turn, figures stand beside the device's two ceilings, results are a JSON file.

Milliseconds everywhere. On a GPU times are the device's own (events), with the cache emptied before each call; on a CPU the wall clock's.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

from train_gpt import Ranks, RunError, environment, measured_peak, write_atomically

ROOT = Path(__file__).resolve().parent.parent


def require_tests(*paths: str):
    """Run these test files, where there is a GPU those that need one. RunError if one fails: a speed of something wrong is no speed."""
    chosen = ["-m", "gpu"] if torch.cuda.is_available() else []
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *chosen, *paths], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        failed = next((line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), f"exit code {result.returncode}")
        raise RunError(f"no figures while tests fail: {failed}; mend it, or see it by pytest {' '.join(paths)}")


def in_turn(arms: dict[str, Callable], device: torch.device, seconds: float = 1.0, least: int = 5) -> dict[str, dict | str]:
    """
    {arm: dict(median, p20, p80 in ms, n, peak_mib on a GPU)}. Arms take turns: one call each on a GPU; on a CPU calls for a tenth of a second, the first of
    which brings back the arm's caches and is not counted unless it takes that long. An arm that fails has its error's first line instead, "out of memory"
    where that is it. seconds: for each arm, after two calls that are not counted; `least` calls in any case.
    """
    results, first, flush = {}, {}, torch.empty(256 << 20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for name, function in arms.items():
        try:
            if flush is not None:
                torch.cuda.reset_peak_memory_stats()
            function()
            first[name] = timed(function, flush)
            results[name] = dict(peak_mib=torch.cuda.max_memory_allocated() >> 20) if flush is not None else {}
        except Exception as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            results[name] = "out of memory" if memory else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    together = {name: 1 if flush is not None else max(1, int(100 / ms)) for name, ms in first.items()}
    wanted, times = {name: max(least, int(1000 * seconds / ms)) for name, ms in first.items()}, {name: [] for name in first}
    while unfinished := [name for name in times if len(times[name]) < wanted[name]]:
        for name in unfinished:
            if together[name] > 1:
                arms[name]()
            times[name] += [timed(arms[name], flush) for _ in range(together[name])]
    for name, own in times.items():
        low, median, high = np.percentile(own, (20, 50, 80)).tolist()
        results[name] |= dict(median=median, p20=low, p80=high, n=len(own))
    return results


def timed(function: Callable, flush: torch.Tensor | None) -> float:
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


def describe(device: torch.device) -> dict:
    """Machine, versions and commit as the trainer records them, a GPU's compute capability, and the time."""
    return environment(Ranks(0, 1, device, torch.float32)) | dict(date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                                                                  capability=torch.cuda.get_device_capability() if device.type == "cuda" else None)


def triton_is_fastest(rows: list[dict], size: tuple[str, ...], least: tuple[str, ...] = ("copy",)) -> bool:
    """
    Whether the arm "triton" took less time than every other arm but those of `least`, which do less, forward and backward at every size: what variants/fused_kernels.py
    turns a kernel on by. size: the names in a row that make the size. An arm that failed counts as infinitely slow.
    """
    times = {}
    for row in rows:
        if row["what"] != "forward" and row["arm"] not in least:
            arms = times.setdefault(tuple(str(row[name]) for name in size), dict(triton=float("inf")))
            arms[row["arm"]] = min(arms.get(row["arm"], float("inf")), row.get("median", float("inf")))
    return bool(times) and all(len(arms) > 1 and all(arms["triton"] < ms for arm, ms in arms.items() if arm != "triton") for arms in times.values())


def save(name: str, results: dict, output: Path | None = None) -> Path:
    """Write results, with their "device", to benchmarks/results/<name>-<device>.json or to `output`; returns the path."""
    output = output or ROOT / "benchmarks/results" / f"{name}-{re.sub('[^a-z0-9]+', '-', results['device'].lower()).strip('-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(json.dumps(results, indent=1).encode() + b"\n"))
    return output


def markdown(rows: list[dict]) -> str:
    """A Markdown table of rows with equal keys."""
    heads = list(rows[0])
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [heads, ["---"] * len(heads), *([row[head] for head in heads] for row in rows)])
