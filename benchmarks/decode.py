"""
One token after another: softmax attention with its cache of keys and values beside the attentions that keep less, in
models of one size.

    python -m benchmarks.decode                                      prompts of 384 to 65,536 tokens (half an hour)
    python -m benchmarks.decode --lengths 384,2048 --layers 2        fewer

For every prompt length: prefill (the whole prompt), time to the first token (prefill and sampling), time a token after
it with everything before it kept, bytes kept, and, up to 2,048 tokens, time a token without a cache, the whole context
run anew. Weights are random, as they do not change a time; all layers see everything. Arms take turns. Time a token is
a median; prefill is one call. At the end the fixed-size states of the shortest and the longest prompt take turns. This
is the protocol of the Tauformer's author (TechRxiv 176800983.30631144), whose figures, CPU and Rust, are 1.17 to 1.80
times less time a token with a cache from 128 to 2,048 tokens, 0.70 to 0.77 times without, and a cache 49 % smaller.
One table, and benchmarks/results/decode-<device>.json; the tests of decoding run first, and no figure is printed if one
fails.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import train_gpt
import variants
from benchmarks.timing import describe, in_turn, markdown, require_tests, save
from data.command_line import run_script
from generate import Decoder, choose
from train_gpt import Config, Ranks

TESTS = ["tests/test_generate.py", "tests/kernels/topological_attention/test_cache.py"]
LENGTHS = [384, 1024, 2048, 16384, 65536]
WHOLE = 2048  # no whole pass a token above this length
ARMS = {  # name: (variant, bins)
    "softmax": ("", 0),
    "softmax with a forget gate": ("forgetting_attention", 0),
    "topological, faithful": ("topological_attention", 0),
    "topological, linear coordinate": ("topological_attention:coordinate=linear", 0),
    "topological, linear coordinate, gate": ("topological_attention:coordinate=linear,decay=data", 0),
    "topological, faithful, 256 bins": ("topological_attention", 256),
    "topological, linear coordinate, gate, 256 bins": ("topological_attention:coordinate=linear,decay=data", 256),
}


def measure(T: int, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[list[dict], dict]:
    """
    A row of results for every arm with a prompt of T tokens, and {arm: a function that decodes a token} of those with
    bins.
    """
    prompt = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    width = options.heads * options.width
    rows = {}
    steps, whole_passes = {}, {}  # arm -> what is timed
    for arm, (variant, bins) in ARMS.items():
        config = Config(variant=(variant,) if variant else (), vocab_size=257, sequence_length=T, layers=options.layers,
                        model_dim=width, heads=options.heads, head_dim=options.width, mlp_hidden=4 * width,
                        compile="off")
        with variants.applied(config.variant, config):
            # the prompt and the first token
            model = train_gpt.build_model(config, Ranks(0, 1, device, dtype)).eval()
            model.set_windows(1.0)
            decoder = Decoder(model, 2 * T, bins)
            start = time.perf_counter()
            logits = decoder.feed(prompt)
            prefill = time.perf_counter() - start
            token = choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0))[:, None].int() % 256
            first = time.perf_counter() - start

        # what is timed afterwards
        rows[arm] = dict(T=T, arm=arm, parameters=sum(p.numel() for p in model.parameters()),
                         prefill_ms=1000 * prefill, first_token_ms=1000 * first, bytes_kept=decoder.bytes_kept)
        steps[arm] = lambda decoder=decoder, token=token: decoder.feed(token)
        if T <= WHOLE and not bins:
            whole_passes[arm] = lambda model=model: Decoder(model, T, cached=False).feed(prompt)

    # a token of every arm in turn, and the whole passes
    for name, functions in (("token", steps), ("whole", whole_passes)):
        for arm, times in in_turn(functions, device, options.seconds).items():
            rows[arm][name] = times
    return list(rows.values()), {arm: step for arm, step in steps.items() if ARMS[arm][1]}


def shown(rows: list[dict]) -> str:
    """The rows as Markdown, beside softmax attention's."""
    softmax = {row["T"]: row for row in rows if row["arm"] == "softmax"}

    def ratio(row: dict, name: str) -> str:
        return f"{softmax[row['T']][name]['median'] / row[name]['median']:.2f}x" if name in row else "-"

    lines = []
    for row in rows:
        token, peer = row["token"], softmax[row["T"]]
        spread = f"{token['median']:.3g} ({token['p20']:.3g} to {token['p80']:.3g}, n {token['n']})"
        lines.append({"prompt": f"{row['T']:,}", "arm": row["arm"], "prefill, ms": f"{row['prefill_ms']:,.0f}",
                      "a token, ms (20 to 80 %)": spread, "against softmax": ratio(row, "token"),
                      "no cache": ratio(row, "whole"), "bytes kept": f"{row['bytes_kept']:,}",
                      "of softmax's": f"{row['bytes_kept'] / peer['bytes_kept']:.2%}"})
    return markdown(lines)


def parse_lengths(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def run(options: argparse.Namespace):
    """Measure at every length, then the fixed-size states; write and print the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    require_tests(*TESTS)
    results = describe(device) | dict(layers=options.layers, heads=options.heads, width=options.width,
                                      dtype=str(dtype).removeprefix("torch."), rows=[])
    # every length
    fixed = {}
    for T in options.lengths:
        rows, steps = measure(T, options, device, dtype)
        results["rows"] += rows
        if T in (min(options.lengths), max(options.lengths)):
            fixed |= {f"{arm}, after {T:,} tokens": step for arm, step in steps.items()}
        save("decode", results, options.output)
        print(f"{T:,} tokens: done", flush=True)

    # the states of fixed size
    results["fixed_state"] = in_turn(fixed, device, options.seconds)
    path = save("decode", results, options.output)
    print(f"\n{shown(results['rows'])}\n")
    for arm, times in results["fixed_state"].items():
        print(f"{arm}: {times['median']:.3g} ms a token ({times['p20']:.3g} to {times['p80']:.3g}, n {times['n']})")
    print(path)


def main() -> int:
    """Run the command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=parse_lengths, default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head (64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each arm and length (2)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    options = parser.parse_args()
    return run_script("decode.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
