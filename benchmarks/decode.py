"""
One token after another: softmax attention with its cache of keys and values beside the attentions that keep less, in models of one size.

    python benchmarks/decode.py                                      prompts of 384 to 65,536 tokens (half an hour on two cores)
    python benchmarks/decode.py --lengths 384,2048 --layers 2        fewer

For every prompt length: prefill (the whole prompt), time to the first token (prefill and sampling), time a token after it with everything before it kept,
bytes kept, and, up to 2,048 tokens, time a token without a cache, the whole context run anew. Weights are random, as they do not change a time; all layers see
everything. Arms take turns. Time a token is a median; prefill is one call. At the end the fixed-size states of the shortest and the longest prompt take turns. This is the protocol of the Tauformer's author (TechRxiv 176800983.30631144), whose
figures, CPU and Rust, are 1.17 to 1.80 times less time a token with a cache from 128 to 2,048 tokens, 0.70 to 0.77 times without, and a cache 49 % smaller.
One table, and benchmarks/results/decode-<device>.json; the tests of decoding run first, and no figure is printed if one fails.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt
import variants
from benchmarks.timing import describe, in_turn, markdown, require_tests, save
from generate import Decoder, choose
from train_gpt import Config, Ranks, RunError

import torch

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


def measure(T: int, given: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[list[dict], dict]:
    """A row of results for every arm with a prompt of T tokens, and {arm: a function that decodes a token} of those with bins."""
    prompt = torch.randint(256, (1, T), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows, steps, wholes = {}, {}, {}
    for arm, (variant, bins) in ARMS.items():
        config = Config(variant=(variant,) if variant else (), vocab_size=257, sequence_length=T, layers=given.layers, model_dim=given.heads * given.width,
                        heads=given.heads, head_dim=given.width, mlp_hidden=4 * given.heads * given.width, compile="off")
        with variants.applied(config.variant, config):
            model = train_gpt.build_model(config, Ranks(0, 1, device, dtype)).eval()
            model.set_windows(1.0)
            decoder, start = Decoder(model, 2 * T, bins), time.perf_counter()
            logits = decoder.feed(prompt)
            prefill = time.perf_counter() - start
            token = choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0))[:, None].int() % 256
            first = time.perf_counter() - start
        rows[arm] = dict(T=T, arm=arm, parameters=sum(p.numel() for p in model.parameters()), prefill_ms=1000 * prefill, first_token_ms=1000 * first, bytes_kept=decoder.bytes_kept)
        steps[arm] = lambda decoder=decoder, token=token: decoder.feed(token)
        if T <= WHOLE and not bins:
            wholes[arm] = lambda model=model: Decoder(model, T, cached=False).feed(prompt)
    for name, arms in (("token", steps), ("whole", wholes)):
        for arm, found in in_turn(arms, device, given.seconds).items():
            rows[arm][name] = found
    return list(rows.values()), {arm: step for arm, step in steps.items() if ARMS[arm][1]}


def shown(rows: list[dict]) -> str:
    softmax = {row["T"]: row for row in rows if row["arm"] == "softmax"}
    ratio = lambda row, name: f"{softmax[row['T']][name]['median'] / row[name]['median']:.2f}x" if name in row else "-"
    spread = lambda found: f"{found['median']:.3g} ({found['p20']:.3g} to {found['p80']:.3g}, n {found['n']})"
    return markdown([{"prompt": f"{row['T']:,}", "arm": row["arm"], "prefill, ms": f"{row['prefill_ms']:,.0f}", "a token, ms (20 to 80 %)": spread(row["token"]),
                      "against softmax": ratio(row, "token"), "no cache": ratio(row, "whole"), "bytes kept": f"{row['bytes_kept']:,}",
                      "of softmax's": f"{row['bytes_kept'] / softmax[row['T']]['bytes_kept']:.2%}"} for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=LENGTHS, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head (64)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each arm and length (2)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        require_tests(*TESTS)
        results = describe(device) | dict(layers=given.layers, heads=given.heads, width=given.width, dtype=str(dtype).removeprefix("torch."), rows=[])
        fixed = {}
        for T in given.lengths:
            rows, steps = measure(T, given, device, dtype)
            results["rows"] += rows
            fixed |= {f"{arm}, after {T:,} tokens": step for arm, step in steps.items() if T in (min(given.lengths), max(given.lengths))}
            path = save("decode", results, given.output)
            print(f"{T:,} tokens: done", flush=True)
        results["fixed_state"] = in_turn(fixed, device, given.seconds)
        save("decode", results, given.output)
    except RunError as error:
        print(f"decode.py: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{shown(results['rows'])}\n")
    for arm, found in results["fixed_state"].items():
        print(f"{arm}: {found['median']:.3g} ms a token ({found['p20']:.3g} to {found['p80']:.3g}, n {found['n']})")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
