"""A writer of logs as the trainer makes them, with chosen numbers instead of training."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from train_gpt import make_config

RULE = "=" * 100
CONFIG = asdict(make_config(dict(track="cpu"))) | dict(variant=[], batch_tokens=2048, time_budget=0.0)
FACTS = dict(
    python="3.11.2",
    torch="2.13.0+cpu",
    cuda=None,
    triton="3.9.0",
    device="x86_64, 2 threads",
    platform="Linux",
    world_size=1,
    git_commit="a" * 40,
    git_dirty=False,
    command="train_gpt.py",
    replaced={},
    parameters=1000,
    parameters_without_embeddings=800,
    flops_per_token=6000,
    peak_flops=2.5e11,
    dtype="float32",
    compile="off",
    train_tokens_available=10**6,
    val_bytes_per_token=1.0,
    val_sha256={"python_val_000000.bin": "b" * 64},
)


def log_lines(losses: dict[int, float], *, run_id="run", ms_per_step=100.0, source=None, modules=(), end="finished",
              resumed_from=None, **facts) -> tuple[list[str], dict]:
    """
    (lines of a log, its JSON) of a run with these validation losses {step: loss}. Any key of FACTS or CONFIG can be
    given; steps follows from losses.

    modules: further modules of the source, [(name, text)]. end: finished, or SIGTERM or an error's text, then with
    last_step and steps. resumed_from: the step after which it goes on. scored: the number of validation tokens that
    the losses are of (the fact val_tokens; by default the setting). known_target: the target that is known for the
    validation data (the fact target; likewise).
    """
    steps = facts.pop("steps", None) or max(losses)
    first = (resumed_from or 0) + 1
    last = steps if end == "finished" else facts.pop("last_step")
    config = CONFIG | {"run_id": run_id, "steps": steps, "tokens": steps * CONFIG["batch_tokens"]}
    config |= {name: facts.pop(name) for name in list(facts) if name in CONFIG.keys() - FACTS.keys()}
    scored = facts.pop("scored", config["val_tokens"])
    target = facts.pop("known_target", config["target"])
    known = dict(seed=config["seed"], val_tokens=scored, target=target)
    facts = dict(run_id=run_id, status="running", config=config) | FACTS | known | facts

    # the header
    texts = [("train_gpt", source or "import torch\nprint('step:')"), *modules]
    lines = [line for name, text in texts for line in (f"# ---- {name}", *text.split("\n"))]
    lines += [RULE, "Running Python 3.11.2, PyTorch 2.13.0+cpu compiled for CUDA None, Triton 3.9.0",
              f"facts: {json.dumps(facts)}", "no GPU", RULE]
    if resumed_from is None:
        lines.append("warm-up, compilation included, not timed: 1.2 s")
    else:
        lines.append(f"resumed from logs/{run_id}.pt at step {resumed_from}")

    # the steps
    curve = []
    for step in range(first - 1, last + 1):
        ms = step * ms_per_step
        if step >= first:
            lines.append(f"step:{step}/{steps} train_time:{ms:.0f}ms step_avg:{ms_per_step:.2f}ms")
        if step in losses:
            average = ms / max(step, 1)
            bits = losses[step] / 0.6931
            lines.append(
                f"step:{step}/{steps} val_loss:{losses[step]:.4f} train_time:{ms:.0f}ms step_avg:{average:.2f}ms")
            lines.append(f"val_bits_per_byte:{bits:.4f}")
            curve.append(dict(step=step, tokens=step * config["batch_tokens"], train_ms=ms, val_loss=losses[step],
                              val_bits_per_byte=bits, train_loss=None))

    # the end
    statuses = {"finished": "finished", "SIGTERM": "stopped by SIGTERM"}
    saved = facts | dict(status=statuses.get(end, f"failed: {end}"), warmup_seconds=1.2, step=last, curve=curve,
                         train_curve=[[step, 4.5] for step in range(first, last + 1)])
    if end == "finished":
        rate = 1000 * config["batch_tokens"] / ms_per_step
        reached = "reached" if losses[last] <= config["target"] else "not reached"
        lines += [f"ms_per_step:{ms_per_step:.2f} tokens_per_second:{rate:.0f} mfu:0.2650 of 0.25 TFLOP/s a device, "
                  "the measured rate of a large product",
                  f"target {config['target']}: {reached} with val_loss {losses[last]:.4f}",
                  "peak memory allocated: 661 MiB reserved: 662 MiB"]
        saved |= dict(val_loss=losses[last], val_bits_per_byte=losses[last] / 0.6931,
                      train_seconds=last * ms_per_step / 1000, ms_per_step=ms_per_step, tokens_per_second=rate,
                      mfu=0.265, peak_memory_mib=661, peak_memory_reserved_mib=662)
    elif end == "SIGTERM":
        lines.append(f"stopped by SIGTERM after step {last}; continue with --resume logs/{run_id}.pt")
    else:
        lines.append(f"error: {end}")
    return lines, saved


@pytest.fixture
def write_log(tmp_path):
    """
    write_log(losses, folder="logs", run_id="run", **as log_lines takes it) -> path of RUN_ID.txt under tmp_path,
    RUN_ID.json beside it.
    """

    def write(losses: dict[int, float], folder="logs", run_id="run", **options) -> Path:
        path = tmp_path / folder / f"{run_id}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, saved = log_lines(losses, run_id=run_id, **options)
        if options.get("resumed_from") and path.exists():
            earlier = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["curve"]
            saved["curve"] = [point for point in earlier if point["step"] < options["resumed_from"]] + saved["curve"]
        with open(path, "a", encoding="utf-8") as file:  # a resumed run goes on in its log
            file.write("\n".join(lines) + "\n")
        path.with_suffix(".json").write_text(json.dumps(saved), encoding="utf-8")
        return path

    return write
