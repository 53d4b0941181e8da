"""
The training step: where its time goes, and how long it takes beside another trainer on the same machine in the same run.

    python benchmarks/train_step.py profile --track cpu                      one step by kind of work, beside the machine's two ceilings
    python benchmarks/train_step.py against ../older -- --track cpu          another checkout of this trainer, with the same arguments
    python benchmarks/train_step.py variant fused_kernels -- --track cpu     the baseline with a variant of it, eager, and the baseline compiled
    python benchmarks/train_step.py peer PATH/records/track_3_optimization/train_gpt_simple.py    modded-nanogpt's, beside track benchmark, on GPUs

Runs take turns, each a process of its own, for --rounds rounds; the ratio is the median over the rounds. Result: benchmarks/results/train_step-<mode>-<device>.json.
Our milliseconds are the trainer's own: training time, taken after a synchronisation, by steps, warm-up and compilation outside. The peer counts its compilation, and
the host's time between its lines of a step is all it prints: the median of these after the first ten counts, which on a GPU that is kept busy is a step's time;
it is given for ours, too (host_ms_median). Both train on the same random GPT-2 tokens, the peer's microbatches 64 rows of 1,024 tokens as ours.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_suite import end, fault, step_spread, synthetic_shards
from benchmarks.timing import ceilings, describe, markdown, save
from train_gpt import RunError, Trainer, compile_mode, compile_model, parse_config

import numpy as np
import torch

# kind of work -> what the names of its operators and kernels have; the first that fits counts
KINDS = {"attention": r"flash|fmha|attention|flex", "products": r"gemm|cutlass|cublas|nvjet|xmma|splitk|::mm$|::bmm$|addmm|baddbmm|_dot_", "between ranks": r"nccl|allreduce|all_reduce|gloo",
         "copies and fills": r"memcpy|memset|copy_|fill_|zero_|::cat$|CatArray", "all else": ""}
PEER_ROWS = 20  # x 524,288 tokens: what the peer reads for its validation
PEER_LINE = re.compile(r"^step:(\d+)/\d+ train_time:([\d.]+)s step_avg:[\d.]+ms$", re.M)


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def profiled(arguments: list[str], steps: int, warm: int = 3) -> dict:
    """
    A trainer's step by kind of work, in ms, as torch.profiler counts them: the device's own time of every kernel, on a CPU the operators'. operators: the
    ten longest. wall: of the same number of steps without the profiler. The log goes to a folder that is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(["--no-save", "--log_dir", folder, *arguments])
        trainer = Trainer(config)
        compile_model(trainer.model, compile_mode(config, trainer.ranks))
        rows = trainer.loader.next_batch()[0].to(trainer.ranks.device)
        cuda = trainer.ranks.device.type == "cuda"

        def some(n: int) -> float:
            start = trainer._now()
            for _ in range(n):
                trainer.train_step(rows, 0.5)
            return 1000 * (trainer._now() - start) / n

        some(warm)
        wall = some(steps)
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
        with torch.profiler.profile(activities=activities) as profile:
            profiled_wall = some(steps)
        facts = trainer.log.facts
    own = lambda event: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / steps
    events = [(event.key, own(event), event.count // steps) for event in profile.key_averages() if own(event) > 0 and not event.key.startswith("Profiler")]
    kinds = {kind: sum(ms for name, ms, _ in events if kind_of(name) == kind) for kind in KINDS}
    kinds["idle" if cuda else "outside operators"] = max(0.0, profiled_wall - sum(kinds.values()))
    flops = facts["flops_per_token"] * config.batch_tokens
    return dict(track=config.track, batch_tokens=config.batch_tokens, dtype=facts["dtype"], compile=facts["compile"], steps=steps, wall=wall, profiled_wall=profiled_wall, kinds=kinds,
                flops=flops, operators=[dict(name=name, ms=ms, calls=calls) for name, ms, calls in sorted(events, key=lambda event: -event[1])[:10]])


def profile_table(found: dict, limits: dict) -> str:
    whole, busy = found["profiled_wall"], found["kinds"]["products"] + found["kinds"]["attention"]
    rows = [{"kind of work": kind, "ms a step": f"{ms:.1f}", "share": f"{ms / whole:.0%}"} for kind, ms in found["kinds"].items()]
    rows += [{"kind of work": f"`{event['name'][:60]}`, {event['calls']} calls", "ms a step": f"{event['ms']:.1f}", "share": f"{event['ms'] / whole:.0%}"} for event in found["operators"]]
    floor = 1000 * found["flops"] / limits["flops"]
    return (f"{markdown(rows)}\n\nA step takes {found['wall']:.1f} ms ({whole:.1f} profiled). Its {found['flops'] / 1e9:.3g} GFLOP at the measured {limits['flops'] / 1e9:.4g} GFLOP/s of a "
            f"large product take {floor:.1f} ms, {floor / found['wall']:.0%} of it; in products and attention it reaches {found['flops'] / busy / 1e6 / limits['flops'] * 1e9:.0%} of that "
            f"rate. Copies run at {limits['bytes'] / 1e9:.3g} GB/s.")


def ours(root: Path, arguments: list[str], folder: Path, world: int) -> dict:
    """A run of the trainer in the checkout `root`: ms_per_step, val_loss and the host's time between steps. RunError if it fails."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, "train_gpt.py", *arguments, "--no-save", "--log_dir", str(folder), "--run_id", "run"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        raise RunError(f"{root.name}/train_gpt.py failed: {fault(result.stdout + result.stderr, result.returncode)}")
    facts = json.loads((folder / "run.json").read_text())
    log = (folder / "run.txt").read_text()
    for suffix in ("json", "txt"):
        (folder / f"run.{suffix}").unlink()
    return dict(ms_per_step=facts["ms_per_step"], val_loss=facts["val_loss"]) | step_spread(log)


def peer(script: Path, data: Path, steps: int, world: int, minutes: float = 8.0) -> dict:
    """The peer's own steps in a folder where it finds `data` under the name that it asks for; it is ended after `steps` of them. RunError if it prints fewer."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data/fineweb10B").mkdir(parents=True)
        for file in data.glob("*.bin"):
            (Path(folder) / "data/fineweb10B" / re.sub(r"^.*?_(train|val)_", r"fineweb_\1_", file.name)).symlink_to(file)
        output, start = Path(folder) / "output", time.monotonic()
        with open(output, "wb") as file:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script)]
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
            try:
                while process.poll() is None and len(PEER_LINE.findall(output.read_text(errors="replace"))) < steps and time.monotonic() - start < 60 * minutes:
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    end(process, 40)
        text = output.read_text(errors="replace")
    times = [1000 * float(seconds) for _, seconds in PEER_LINE.findall(text)][:steps]
    if len(times) < steps:
        raise RunError(f"the peer printed {len(times)} of {steps} steps: {fault(text, process.returncode or 0)}")
    own = np.diff(times)[9:]
    return dict(host_ms_median=float(np.median(own)), host_ms_p10=float(np.percentile(own, 10)), host_ms_p90=float(np.percentile(own, 90)))


def in_rounds(rounds: int, arms: dict) -> list[dict]:
    """[{arm: its result}], the arms in turn; a line for each."""
    results = []
    for number in range(rounds):
        results.append({name: arm() for name, arm in arms.items()})
        print(f"round {number + 1}: " + "; ".join(f"{name} {', '.join(f'{key} {value:.4g}' for key, value in found.items())}" for name, found in results[-1].items()), flush=True)
    return results


def ratio(rounds: list[dict], slow: str, fast: str, key: str) -> str:
    values = [found[slow][key] / found[fast][key] for found in rounds]
    return f"{key}, {slow}'s over {fast}'s: median {statistics.median(values):.3f}, {min(values):.3f} to {max(values):.3f}, n = {len(values)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("profile", help="one step by kind of work; further arguments are train_gpt.py's")
    two = modes.add_parser("against", help="beside another checkout of this trainer; after -- train_gpt.py's arguments")
    two.add_argument("checkout", type=Path)
    four = modes.add_parser("variant", help="beside a variant, eager, and the baseline compiled; after -- train_gpt.py's arguments")
    four.add_argument("variant")
    four.add_argument("--steps", type=int, default=60)
    three = modes.add_parser("peer", help="beside modded-nanogpt's train_gpt_simple.py; after -- further arguments of train_gpt.py")
    three.add_argument("script", type=Path)
    one.add_argument("--steps", type=int, default=10)
    two.add_argument("--steps", type=int, default=60)
    three.add_argument("--steps", type=int, default=40)
    for mode, rounds in ((two, 3), (three, 3), (four, 5)):
        mode.add_argument("--rounds", type=int, default=rounds)
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    given, rest = parser.parse_known_args(argv[:split])
    rest += argv[split + 1:]
    device, world = torch.device("cuda" if torch.cuda.is_available() else "cpu"), max(1, torch.cuda.device_count())
    results = describe(device) | dict(mode=given.mode, arguments=rest)
    try:
        if given.mode != "profile" and rest != argv[split + 1:]:
            raise RunError(f"unknown argument {rest[0]!r}; the trainer's arguments come after --")
        if given.mode == "profile":
            found = profiled(rest, given.steps)
            limits = ceilings(device, torch.bfloat16 if found["dtype"] == "bfloat16" else torch.float32)
            results |= dict(ceilings=limits, **found, table=profile_table(found, limits))
            print(results["table"])
        elif given.mode == "against":
            if not (given.checkout / "train_gpt.py").exists():
                raise RunError(f"there is no train_gpt.py in {given.checkout}; give a checkout of this trainer")
            with tempfile.TemporaryDirectory() as folder:
                run = lambda root: ours(root, [*rest, "--steps", str(given.steps), "--val_every", "0"], Path(folder), world)
                results["rounds"] = in_rounds(given.rounds, {"other": lambda: run(given.checkout.resolve()), "this": lambda: run(ROOT)})
            print(ratio(results["rounds"], "other", "this", "ms_per_step"))
        elif given.mode == "variant":
            arms = dict(baseline=["--compile", "off"], variant=["--compile", "off", "--variant", given.variant], compiled=["--compile", "blocks"])
            with tempfile.TemporaryDirectory() as folder:
                common = [*rest, "--steps", str(given.steps), "--val_every", "0"]
                results["rounds"] = in_rounds(given.rounds, {name: partial(ours, ROOT, [*common, *own], Path(folder), world) for name, own in arms.items()})
            for fast in ("variant", "compiled"):
                print(ratio(results["rounds"], "baseline", fast, "ms_per_step"))
        else:
            if not given.script.exists():
                raise RunError(f"there is no {given.script}; give the path of modded-nanogpt's records/track_3_optimization/train_gpt_simple.py")
            if device.type != "cuda":
                raise RunError("the peer runs on CUDA devices only; none is seen here")
            with tempfile.TemporaryDirectory() as folder:
                data = synthetic_shards(Path(folder) / "shards", (given.steps + 4) * 524_288, PEER_ROWS * 524_288 + 1024)
                arguments = ["--track", "benchmark", "--data", str(data), "--steps", str(given.steps), "--val_every", "0", "--val_tokens", str(world * 65_536), *rest]
                results["rounds"] = in_rounds(given.rounds, {"peer": lambda: peer(given.script.resolve(), data, given.steps, world),
                                                             "knotgpt": lambda: ours(ROOT, arguments, Path(folder), world)})
            print(ratio(results["rounds"], "peer", "knotgpt", "host_ms_median"))
    except RunError as error:
        print(f"train_step.py: error: {error}", file=sys.stderr)
        return 1
    print(save(f"train_step-{given.mode}", results, given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
