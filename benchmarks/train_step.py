"""
The training step: where its time goes, and how long it takes beside another trainer on the same machine in the same
run.

    python -m benchmarks.train_step profile --track cpu
            one step by kind of work, beside the machine's two ceilings
    python -m benchmarks.train_step against ../older -- --track cpu
            another checkout of this trainer, with the same arguments
    python -m benchmarks.train_step variant fused_kernels -- --track cpu
            the baseline with a variant of it, eager, and the baseline compiled
    python -m benchmarks.train_step peer PATH/records/track_3_optimization/train_gpt_simple.py
            modded-nanogpt's, beside track benchmark, on GPUs

Runs take turns, each a process of its own, for --rounds rounds; the ratio is the median over the rounds. Result:
benchmarks/results/train_step-<mode>-<device>.json. Our milliseconds are the trainer's: training time, taken after a
synchronisation, by steps, warm-up and compilation outside. The peer counts its compilation, and the host's time between
its lines of a step is all it prints: the median of these after the first ten counts, which on a GPU that is kept busy
is a step's time; it is given for ours, too (host_ms_median). Both train on the same random GPT-2 tokens, the peer's
microbatches 64 rows of 1,024 tokens as ours.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_suite import end, fault, step_spread, synthetic_shards, torchrun
from benchmarks.timing import ROOT, ceilings, describe, markdown, save
from data.command_line import run_script
from train_gpt import RunError, Trainer, compile_mode, compile_model, parse_config, require

KINDS = {  # kind of work -> what the names of its operators and kernels have; the first that fits counts
    "attention": r"flash|fmha|attention|flex",
    "products": r"gemm|cutlass|cublas|nvjet|xmma|splitk|::mm$|::bmm$|addmm|baddbmm|_dot_",
    "between ranks": r"nccl|allreduce|all_reduce|gloo",
    "copies and fills": r"memcpy|memset|copy_|fill_|zero_|::cat$|CatArray",
    "all else": "",
}
PEER_ROWS = 20  # x 524,288 tokens: what the peer reads for its validation
PEER_LINE = re.compile(r"^step:(\d+)/\d+ train_time:([\d.]+)s step_avg:[\d.]+ms$", re.M)


# ---- A step by kind of work -------------------------------------------------


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def profile_step(arguments: list[str], steps: int, warm: int = 3) -> dict:
    """
    A trainer's step by kind of work, in ms, as torch.profiler counts them: the device's own time of every kernel, on a
    CPU the operators'. operators: the ten longest. wall: of the same number of steps without the profiler. The log goes
    to a folder that is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        # the trainer
        config = parse_config(["--no-save", "--log_dir", folder, *arguments])
        trainer = Trainer(config)
        compile_model(trainer.model, compile_mode(config, trainer.ranks))
        rows = trainer.loader.next_batch()[0].to(trainer.ranks.device)

        def time_steps(n: int) -> float:
            """Milliseconds of a step, the mean of n."""
            start = trainer._now()
            for _ in range(n):
                trainer.train_step(rows, 0.5)
            return 1000 * (trainer._now() - start) / n

        # without and with the profiler
        cuda = trainer.ranks.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        time_steps(warm)
        wall = time_steps(steps)
        with torch.profiler.profile(activities=activities) as profile:
            profiled_wall = time_steps(steps)
        facts = trainer.log.facts

    # its events: an operator's own time, without what it calls
    events = []
    for event in profile.key_averages():
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / steps
        if ms > 0 and not event.key.startswith("Profiler"):
            events.append(dict(name=event.key, ms=ms, calls=event.count // steps))
    kinds = {kind: sum(event["ms"] for event in events if kind_of(event["name"]) == kind) for kind in KINDS}
    kinds["idle" if cuda else "outside operators"] = max(0.0, profiled_wall - sum(kinds.values()))
    return dict(track=config.track, batch_tokens=config.batch_tokens, dtype=facts["dtype"], compile=facts["compile"],
                steps=steps, wall=wall, profiled_wall=profiled_wall, kinds=kinds,
                flops=facts["flops_per_token"] * config.batch_tokens,
                operators=sorted(events, key=lambda event: -event["ms"])[:10])


def profile_table(profile: dict, limits: dict) -> str:
    """A profile as Markdown, with a paragraph about the two ceilings."""
    def line(what: str, ms: float) -> dict:
        return {"kind of work": what, "ms a step": f"{ms:.1f}", "share": f"{ms / profile['profiled_wall']:.0%}"}

    # the table
    rows = [line(kind, ms) for kind, ms in profile["kinds"].items()]
    rows += [line(f"`{event['name'][:60]}`, {event['calls']} calls", event["ms"]) for event in profile["operators"]]

    # beside the ceilings
    wall = profile["wall"]
    busy = profile["kinds"]["products"] + profile["kinds"]["attention"]
    floor = 1000 * profile["flops"] / limits["flops"]
    reached = profile["flops"] / busy / 1e6 / limits["flops"] * 1e9
    return (f"{markdown(rows)}\n\nA step takes {wall:.1f} ms ({profile['profiled_wall']:.1f} profiled). "
            f"Its {profile['flops'] / 1e9:.3g} GFLOP at the measured {limits['flops'] / 1e9:.4g} GFLOP/s of a large "
            f"product take {floor:.1f} ms, {floor / wall:.0%} of it; in products and attention it reaches "
            f"{reached:.0%} of that rate. Copies run at {limits['bytes'] / 1e9:.3g} GB/s.")


# ---- Runs beside each other -------------------------------------------------


def ours(root: Path, arguments: list[str], folder: Path, world: int) -> dict:
    """
    A run of the trainer in the checkout `root`: ms_per_step, val_loss and the host's time between steps. RunError if it
    fails.
    """
    command = [sys.executable, *torchrun(world), "train_gpt.py", *arguments, "--no-save", "--log_dir", str(folder),
               "--run_id", "run"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        raise RunError(f"{root.name}/train_gpt.py failed: {fault(result.stdout + result.stderr, result.returncode)}")
    facts = json.loads((folder / "run.json").read_text())
    log = (folder / "run.txt").read_text()
    for suffix in ("json", "txt"):
        (folder / f"run.{suffix}").unlink()
    return dict(ms_per_step=facts["ms_per_step"], val_loss=facts["val_loss"]) | step_spread(log)


def peer(script: Path, data: Path, steps: int, world: int, minutes: float = 8.0) -> dict:
    """
    The peer's steps in a folder where it finds `data` under the name that it asks for; it is ended after `steps` of
    them. RunError if it prints fewer.
    """
    with tempfile.TemporaryDirectory() as folder:
        # the data under their name
        shards, output = Path(folder) / "data/fineweb10B", Path(folder) / "output"
        shards.mkdir(parents=True)
        for file in data.glob("*.bin"):
            (shards / re.sub(r"^.*?_(train|val)_", r"fineweb_\1_", file.name)).symlink_to(file)

        # until it has printed enough
        start = time.monotonic()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                   str(script)]
        with open(output, "wb") as file:
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT,
                                       start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
            try:
                while process.poll() is None and time.monotonic() - start < 60 * minutes:
                    if len(PEER_LINE.findall(output.read_text(errors="replace"))) >= steps:
                        break
                    time.sleep(0.5)
            finally:
                if process.poll() is None:
                    end(process, 40)
        text = output.read_text(errors="replace")

    times = [1000 * float(seconds) for _, seconds in PEER_LINE.findall(text)][:steps]
    if len(times) < steps:
        raise RunError(f"the peer printed {len(times)} of {steps} steps: {fault(text, process.returncode or 0)}")
    low, median, high = np.percentile(np.diff(times)[9:], (10, 50, 90)).tolist()
    return dict(host_ms_median=median, host_ms_p10=low, host_ms_p90=high)


def in_rounds(rounds: int, arms: dict[str, Callable]) -> list[dict]:
    """[{arm: its result}], the arms in turn; a line for each."""
    results = []
    for number in range(1, rounds + 1):
        results.append({name: arm() for name, arm in arms.items()})
        shown = [f"{name} {', '.join(f'{key} {value:.4g}' for key, value in result.items())}"
                 for name, result in results[-1].items()]
        print(f"round {number}: {'; '.join(shown)}", flush=True)
    return results


def ratio(rounds: list[dict], slow: str, fast: str, key: str) -> str:
    """A line about the ratio of two arms, paired by round."""
    values = [results[slow][key] / results[fast][key] for results in rounds]
    return (f"{key}, {slow}'s over {fast}'s: median {statistics.median(values):.3f}, "
            f"{min(values):.3f} to {max(values):.3f}, n = {len(values)}")


# ---- The modes: options, the trainer's arguments, number of ranks -> facts of the result


def run_profile(options: argparse.Namespace, arguments: list[str], world: int) -> dict:
    """One step by kind of work."""
    profile = profile_step(arguments, options.steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limits = ceilings(device, torch.bfloat16 if profile["dtype"] == "bfloat16" else torch.float32)
    table = profile_table(profile, limits)
    print(table)
    return dict(ceilings=limits, **profile, table=table)


def run_against(options: argparse.Namespace, arguments: list[str], world: int) -> dict:
    """Another checkout beside this one."""
    require((options.checkout / "train_gpt.py").exists(),
            f"there is no train_gpt.py in {options.checkout}; give a checkout of this trainer")
    arguments = [*arguments, "--steps", str(options.steps), "--val_every", "0"]
    roots = dict(other=options.checkout.resolve(), this=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: partial(ours, root, arguments, Path(folder), world) for name, root in roots.items()}
        rounds = in_rounds(options.rounds, arms)
    print(ratio(rounds, "other", "this", "ms_per_step"))
    return dict(rounds=rounds)


def run_variant(options: argparse.Namespace, arguments: list[str], world: int) -> dict:
    """A variant and the baseline, eager, and the baseline compiled."""
    arguments = [*arguments, "--steps", str(options.steps), "--val_every", "0"]
    settings = dict(baseline=["--compile", "off"], variant=["--compile", "off", "--variant", options.variant],
                    compiled=["--compile", "blocks"])
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: partial(ours, ROOT, [*arguments, *words], Path(folder), world)
                for name, words in settings.items()}
        rounds = in_rounds(options.rounds, arms)
    for fast in ("variant", "compiled"):
        print(ratio(rounds, "baseline", fast, "ms_per_step"))
    return dict(rounds=rounds)


def run_peer(options: argparse.Namespace, arguments: list[str], world: int) -> dict:
    """modded-nanogpt's trainer beside this one."""
    require(options.script.exists(), f"there is no {options.script}; give the path of modded-nanogpt's "
            "records/track_3_optimization/train_gpt_simple.py")
    require(torch.cuda.is_available(), "the peer runs on CUDA devices only; none is seen here")
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic_shards(Path(folder) / "shards", (options.steps + 4) * 524_288, PEER_ROWS * 524_288 + 1024)
        arguments = ["--track", "benchmark", "--data", str(data), "--steps", str(options.steps), "--val_every", "0",
                     "--val_tokens", str(world * 65_536), *arguments]
        arms = dict(peer=partial(peer, options.script.resolve(), data, options.steps, world),
                    knotgpt=partial(ours, ROOT, arguments, Path(folder), world))
        rounds = in_rounds(options.rounds, arms)
    print(ratio(rounds, "peer", "knotgpt", "host_ms_median"))
    return dict(rounds=rounds)


def build_parser() -> argparse.ArgumentParser:
    """The command line; an option `run` is the mode's function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")

    # the modes, and what each needs
    modes = parser.add_subparsers(dest="mode", required=True)
    profile = modes.add_parser("profile", help="one step by kind of work; further arguments are train_gpt.py's")
    against = modes.add_parser("against",
                               help="beside another checkout of this trainer; after -- train_gpt.py's arguments")
    against.add_argument("checkout", type=Path)
    variant = modes.add_parser("variant", help="beside a variant, eager, and the baseline compiled; after -- "
                               "train_gpt.py's arguments")
    variant.add_argument("variant")
    peer = modes.add_parser("peer", help="beside modded-nanogpt's train_gpt_simple.py; after -- further arguments of "
                            "train_gpt.py")
    peer.add_argument("script", type=Path)

    # what several have
    for mode, run, steps in ((profile, run_profile, 10), (against, run_against, 60), (variant, run_variant, 60),
                             (peer, run_peer, 40)):
        mode.add_argument("--steps", type=int, default=steps)
        mode.set_defaults(run=run)
    for mode, rounds in ((against, 3), (peer, 3), (variant, 5)):
        mode.add_argument("--rounds", type=int, default=rounds)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    # our options, and after -- the trainer's
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    options, unknown = build_parser().parse_known_args(argv[:split])
    arguments = unknown + argv[split + 1:]

    def work():
        for word in unknown if options.mode != "profile" else ():
            raise RunError(f"unknown argument {word!r}; the trainer's arguments come after --")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        results = describe(device) | dict(mode=options.mode, arguments=arguments)
        results |= options.run(options, arguments, max(1, torch.cuda.device_count()))
        print(save(f"train_step-{options.mode}", results, options.output))
    return run_script("train_step.py", work)


if __name__ == "__main__":
    sys.exit(main())
