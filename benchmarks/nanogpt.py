"""
Head to head with karpathy/nanoGPT on its own CPU example: Tiny Shakespeare by characters, 4 layers, 4 heads, width 128,
rows of 64, 1.54M tokens.

    python -m benchmarks.nanogpt --peer ../nanoGPT --text ../nanoGPT/data/shakespeare_char/input.txt [--rounds 3]

--peer is a checkout of nanoGPT, --text its data file (1,115,394 bytes; nanoGPT's data/shakespeare_char/prepare.py
fetches it). Both train on the same first 90 % of the characters with the same 65 ids, the same model size and number of
tokens, in turn on the same machine, each as a process of its own: the time is the whole process', start, validation and
checkpoint included. nanoGPT reports its estimate over random blocks of the last 10 %, the trainer the mean over all of
them in order; both predict with at most 64 characters of context. The result is printed and written to
benchmarks/results/nanogpt-<device>.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import RESULTS, ROOT, slug
from data.command_line import run_script
from data.shards import write_meta, write_shard
from train_gpt import Ranks, RunError, environment, make_config, require, write_atomically

NANOGPT = ["config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
           "--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
           "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"]
OURS = ["--track", "cpu", "--device", "cpu", "--layers", "4", "--heads", "4", "--head_dim", "32", "--model_dim", "128",
        "--mlp_hidden", "512", "--value_embeddings", "0", "--bigram_rows", "0", "--sequence_length", "64",
        "--batch_tokens", "6144", "--micro_batch_tokens", "3072", "--tokens", "1536000", "--val_tokens", "111540",
        "--val_every", "0", "--no-document_mask", "--no-smear", "--no-attention_gate", "--no-x0_skip",
        "--no-unet_skips", "--compile", "off", "--target", "1.6"]


def write_characters(text: str, folder: Path):
    """
    Shards of the first 90 % and the last 10 % of a text, a character's id its index in the sorted set of all: nanoGPT's
    preparation.
    """
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = np.array([ids[character] for character in text])
    split = int(0.9 * len(tokens))
    write_shard(folder / "text_train_000000.bin", tokens[:split])
    write_shard(folder / "text_val_000000.bin", tokens[split:])
    write_meta(folder, vocab_size=len(ids), tokenizer="characters")


def timed(command: list[str], folder: Path, name: str) -> tuple[float, str]:
    """(seconds of a process, what it printed). RunError with its last line if it fails."""
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise RunError(f"{name} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return time.perf_counter() - start, result.stdout


def run_peer(peer: Path) -> dict:
    """nanoGPT's time and loss."""
    seconds, output = timed([sys.executable, "train.py", *NANOGPT], peer, "nanoGPT")
    return dict(seconds=seconds, val_loss=float(re.findall(r"step 2000: .*val loss ([\d.]+)", output)[-1]))


def run_ours(folder: str, seed: int, arguments: list[str]) -> dict:
    """The trainer's time, loss and parameters, on the shards of a folder."""
    run = ["--data", folder, "--log_dir", folder, "--run_id", "ours", "--seed", str(seed), *OURS, *arguments]
    seconds, _ = timed([sys.executable, "train_gpt.py", *run], ROOT, "train_gpt.py")
    facts = json.loads((Path(folder) / "ours.json").read_text())
    return dict(seconds=seconds) | {name: facts[name] for name in ("val_loss", "train_seconds", "parameters")}


def compare(options: argparse.Namespace):
    """Run both in turn; print and write the results."""
    # what there must be
    for path in (options.peer / "train.py", options.text):
        require(path.exists(), f"{path} is not there; give --peer a checkout of nanoGPT and --text its input.txt")
    if not (options.peer / "data/shakespeare_char/train.bin").exists():
        timed([sys.executable, "data/shakespeare_char/prepare.py"], options.peer, "nanoGPT's prepare.py")

    # the rounds
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        write_characters(options.text.read_text(), Path(folder))
        for number in range(1, options.rounds + 1):
            peer = run_peer(options.peer)
            ours = run_ours(folder, number, options.arguments)
            rounds.append(dict(nanogpt=peer, knotgpt=ours))
            print(f"round {number}: nanoGPT {peer['val_loss']:.4f} in {peer['seconds']:.1f} s, "
                  f"KnotGPT {ours['val_loss']:.4f} in {ours['seconds']:.1f} s", flush=True)

    # the results
    for name in ("nanogpt", "knotgpt"):
        for what, unit in (("val_loss", "nats"), ("seconds", "s")):
            values = [results[name][what] for results in rounds]
            print(f"{name} {what}: median {statistics.median(values):.4g} {unit}, "
                  f"{min(values):.4g} to {max(values):.4g}, n = {len(values)}")
    ratio = statistics.median(results["nanogpt"]["seconds"] / results["knotgpt"]["seconds"] for results in rounds)
    print(f"time, nanoGPT's over KnotGPT's: median {ratio:.3f}")

    machine = environment(Ranks.start(make_config(dict(device="cpu"))))
    facts = dict(environment=machine, nanogpt=NANOGPT, knotgpt=OURS + options.arguments, rounds=rounds)
    output = RESULTS / f"nanogpt-{slug(machine['device'])}.json"
    output.parent.mkdir(exist_ok=True)
    write_atomically(output, lambda file: file.write(json.dumps(facts, indent=1).encode() + b"\n"))


def main() -> int:
    """Run the command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare, input.txt")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run, in turn")
    parser.add_argument("arguments", nargs="*", help="more arguments for train_gpt.py, after --")
    options = parser.parse_args()
    return run_script("nanogpt.py", lambda: compare(options))


if __name__ == "__main__":
    sys.exit(main())
