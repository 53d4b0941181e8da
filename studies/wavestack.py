"""
The claims about wave lanes (variants/wave_lanes.py) of jefflinwood/wavestack-hybrid, in five tiers, at sizes that fit
two cores.

    python -m studies.wavestack                    all tiers
    python -m studies.wavestack --dry-run          the runs, which of them are done, how long the others will take
    python -m studies.wavestack --tiers 3,5        some tiers
    python -m studies.wavestack --quick            a reduced run: proves that it runs, measures nothing
    python -m studies.wavestack --data DIR --second DIR -- --layers 6
                                                   other corpora; settings of the trainer, of tiers 2, 4 and 5

The claims were made on TinyStories, WikiText-2 and code, which are not at hand: the corpus is --data, the bytes of
Python's standard library by default, or any folder of shards, such as one of English text by data/local_corpus.py.
Published losses are quoted beside the measured ones, not reproduced; what can be tested is their order.

1  As written: one layer, rows of up to --length tokens of one document, the rest pads, which are scored, AdamW at a
   constant rate, no warm-up: the lane model with all lanes, each one alone, each one left out, no convolution; no
   context at all; the transformer of two layers with embeddings of unit size, as it was published, and of 0.02 with
   warm-up at several rates. A tuned transformer below the lane model refutes the headline.
2  Corrected: nats a real token by the trainer, whose schedule both sides have, at equal tokens and at equal seconds,
   both sides with a sweep of their rates; lanes left out, other bases and other gates. compare.py makes and judges the
   runs, over pairs of equal seeds.
3  Length: a layer of lanes beside one of softmax attention, and of softmax attention with a dense mask, of one width,
   as many tokens in each: forward, both passes, one token of decoding. Memory is what a forward pass keeps for its
   backward pass, without parameters, and what decoding keeps.
4  Recall: pairs of key and value, then queries; one pair in a long row. With attention, lanes, lanes and the recall
   lane. The prediction is that lanes alone are at chance beyond about 12 tokens.
5  Lanes at run time: (a) the loss with each lane left out, of a model trained with and without lane dropout; (b) a
   recall lane is added to the second model, whose other parameters stay, and trained on a second corpus, beside all
   parameters and low-rank changes of as many. Without --second, that corpus is the first with its letters moved by 13
   places.

Every run is kept in studies/results/wavestack-<device>.json as soon as it is done, and the same command goes on from
there; so does one with other tiers. The claims' verdicts (studies/wavestack_claims.py) and all tables are beside it.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timing import ROOT, describe, in_turn, markdown, slug  # isort: skip  before PyTorch, see there
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compare
import train_gpt
import variants
from data.command_line import run_script
from generate import Decoder
from records.results import outcome_of
from studies import RESULTS, build_parser, save
from studies.comparisons import cell, interval_of, run_comparison
from studies.wavestack_claims import PUBLISHED, judge_claims
from tasks import recall
from train_gpt import GPT, Config, Ranks, find_shards, open_shard, require
from variants.wave_lanes import set_lanes

ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)
TIERS = {1: "as written", 2: "corrected", 3: "length", 4: "recall", 5: "lanes at run time"}
COUNTS = dict(  # in full, in a quick run, what it counts
    rows=(2000, 24, "rows of tier 1 and of tier 5's second corpus"), length=(256, 32, "tokens of these rows"),
    width=(128, 32, "channels of tier 1's and tier 3's models"), steps=(600, 3, "steps of tier 1 and of tier 5's (b)"),
    batch=(32, 4, "rows of these steps"), seeds=(6, 2, "of tiers 2 and 4, from 1 on; of lanes left out 8 or more"),
    tokens=(1_500_000, 6144, "tokens of a run of tiers 2, 4 and 5"), longest=(32_768, 256, "tokens of tier 3's rows"),
    jobs=(2, 1, "runs of tier 2 at a time"))

# tier 1: arm -> variant
HYBRID = "wave_lanes:pack=faithful,faithful=on"
WRITTEN = {
    "all lanes": HYBRID,
    "no poly": f"{HYBRID},lanes=fourier,wavelet",
    "no fourier": f"{HYBRID},lanes=poly,wavelet",
    "no wavelet": f"{HYBRID},lanes=poly,fourier",
    "only poly": f"{HYBRID},lanes=poly",
    "only fourier": f"{HYBRID},lanes=fourier",
    "only wavelet": f"{HYBRID},lanes=wavelet",
    "no convolution": f"{HYBRID},context_conv=none",
    "no context": f"{HYBRID},lanes=token,context_conv=none",
}
RATE = 3e-4                 # the published one
RATES = (RATE, 1e-3, 3e-3)  # of the tuned transformer
PLAIN = dict(x0_skip=False, unet_skips=False, smear=False, attention_gate=False, value_embeddings=0, logit_softcap=0.0,
             document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,))

# tier 2: comparison -> what is equal, and arms, of which the first is what the others are compared with
WITH_ATTENTION = "wave_lanes:lanes=fourier,wavelet,attention"
CORRECTED = ("baseline", "wave_lanes", "wave_lanes:pack=block", WITH_ATTENTION, "wave_lanes:lanes=conv",
             "wave_lanes:pack=faithful")
COMPARISONS = {
    "tokens": ("tokens", CORRECTED),
    "time": ("time", CORRECTED),
    "lanes": ("tokens", ("wave_lanes", "wave_lanes:lanes=fourier,wavelet", "wave_lanes:lanes=poly,wavelet",
                         "wave_lanes:lanes=poly,fourier", "wave_lanes:basis=random", "wave_lanes:gains=frozen",
                         "wave_lanes:lanes=fourier,wavelet,F=1,gains=frozen")),
    "gates": ("tokens", ("wave_lanes:pack=block", "wave_lanes:pack=block,gate_map=uniform",
                         "wave_lanes:pack=block,gate_map=top1")),
}
LEAST_SEEDS = dict(lanes=8)     # the Fourier lane is worth little

# tier 3: layer -> variant; no dense mask of more pairs, softmax attention of eight times as many
DENSE = "softmax, dense mask"
LAYERS = {"lanes": "wave_lanes", "softmax attention": "", DENSE: ""}
PAIRS = 1 << 28

# tier 4: arms, and task -> (pairs, queries, tokens of a row; 0: as few as possible)
RECALL = ("baseline", "wave_lanes", "wave_lanes:lanes=poly,fourier,wavelet,recall", WITH_ATTENTION)
TASKS = {"4 pairs": (4, 4, 0), "16 pairs": (16, 16, 0), "1 pair, 250 tokens": (1, 1, 256)}

# tier 5
LANES = "poly,fourier,wavelet"
NEW_LANE, NEW_LANE_LOGIT = "recall", -6.0
DROPOUTS = (0.0, 0.1)
ADAPTED = ("before", "new lane", "all parameters", "low rank")


# ---- Runs outside the trainer -----------------------------------------------


def read_documents(data: str, split: str, count: int, length: int) -> Tensor:
    """
    Return `count` rows of a split, (n, length + 1) int64, or as many as there are: the end of text, up to `length`
    tokens of one document, the end again and again. They are taken at equal distances from all documents.
    """
    # where rows begin and their documents end
    config = train_gpt.make_config(dict(data=data))
    train_gpt.adopt_vocabulary(config)
    end = config.end_of_text
    pieces = []
    for shard in find_shards(config, split):
        tokens = open_shard(shard)
        ends = np.flatnonzero(np.asarray(tokens) == end).tolist()
        for start, stop in zip(ends, [*ends[1:], len(tokens)]):
            pieces += [(tokens, at, min(at + length, stop)) for at in range(start + 1, stop, length)]
    require(pieces, f"{data} has no document of its split {split}; give --data another folder of shards")

    # the rows
    count = min(count, len(pieces))
    rows = torch.full((count, length + 1), end)
    for row, number in zip(rows, np.linspace(0, len(pieces) - 1, count).astype(int)):
        tokens, at, stop = pieces[number]
        row[1:1 + stop - at] = torch.from_numpy(np.asarray(tokens[at:stop], dtype=np.int64))
    return rows


def config_of(data: str, length: int, width: int, **settings) -> Config:
    """The settings of tier 1's models: those of a plain transformer, where nothing else is said."""
    values = dict(data=data, sequence_length=length, batch_tokens=length, model_dim=width, head_dim=32,
                  heads=width // 32, mlp_hidden=4 * width, layers=2, compile="off")
    config = train_gpt.make_config(values | PLAIN | settings)
    train_gpt.adopt_vocabulary(config)
    return config


@contextmanager
def built(variant: str, config: Config) -> Iterator[GPT]:
    """The model of a variant ("": the baseline's), which stays applied for the length of the with block."""
    with variants.applied((variant,) if variant else (), config):
        yield train_gpt.build_model(config, ALONE)


def cross_entropy(model: GPT, rows: Tensor) -> Tensor:
    """The mean over all tokens, pads too, of rows (n, T + 1)."""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT, rows: Tensor, batch: int) -> float:
    model.eval()
    total = sum(cross_entropy(model, some).item() * len(some) for some in rows.split(batch))
    return total / len(rows)


def train(model: GPT, rows: Tensor, steps: int, batch: int, rate: float, warmup: int = 0, decay: float = 0.01,
          seed: int = 1):
    """AdamW with a weight decay and gradients clipped to 1, on the parameters that want a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(rows), (batch,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
        loss = cross_entropy(model.train(), rows[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


# ---- Tier 1 -----------------------------------------------------------------
# The runs of a tier are {name: function}; a function returns a dictionary for JSON.


def list_written(options: argparse.Namespace) -> dict[str, Callable]:
    runs = {arm: partial(run_as_written, options, variant) for arm, variant in WRITTEN.items()}
    runs["transformer as published"] = partial(run_as_written, options, "", std=1.0)
    for rate in RATES:
        runs[f"transformer, tuned, rate {rate:g}"] = partial(run_as_written, options, "", rate, 0.02,
                                                             options.steps // 10)
    return runs


def run_as_written(options: argparse.Namespace, variant: str, rate: float = RATE, std: float | None = None,
                   warmup: int = 0) -> dict:
    """dict(parameters, loss). std: of the embedding, None: the variant's."""
    rows = read_documents(options.data, "train", options.rows, options.length)
    held_out = read_documents(options.data, "val", 256, options.length)
    with built(variant, config_of(options.data, options.length, options.width)) as model:
        if std is not None:
            nn.init.normal_(model.embedding.weight, std=std)
        train(model, rows, options.steps, options.batch, rate, warmup)
        return dict(parameters=sum(p.numel() for p in model.parameters()),
                    loss=evaluate(model, held_out, options.batch))


def table_of_tier_1(results: dict) -> str:
    return markdown([{"arm": arm, "parameters": f"{row['parameters']:,}", "loss": f"{row['loss']:.4f}",
                      "0.7 x loss": f"{PUBLISHED * row['loss']:.4f}"} for arm, row in results.items()])


# ---- Tier 2 -----------------------------------------------------------------


def list_corrected(options: argparse.Namespace) -> dict[str, Callable]:
    return {name: partial(run_corrected, options, name) for name in COMPARISONS}


def comparison_arguments(options: argparse.Namespace, name: str) -> list[str]:
    """The command line of compare.py."""
    budget, arms = COMPARISONS[name]
    seeds = options.seeds if options.quick else max(options.seeds, LEAST_SEEDS.get(name, 0))
    sweep = ["--sweep", options.sweep] if options.sweep else []
    return [*arms, "--seeds", str(seeds), "--budget", budget, "--jobs", str(options.jobs), *sweep, "--", "--data",
            options.data, "--tokens", str(options.tokens), "--device", "cpu", *options.settings]


def run_corrected(options: argparse.Namespace, name: str) -> dict:
    """dict(arms: of each arm, parameters, loss, n, ms_per_step, sweep and what outcome_of says of it; folder)"""
    comparison, results = run_comparison(comparison_arguments(options, name))
    outcomes = {row["arm"]: row for row in outcome_of(results)["arms"]}
    sweep = results["settings"].get("sweep") or {}
    rows = []
    for arm in results["arms"]:
        outcome = outcomes.get(arm["name"], {})
        rows.append(dict(
            arm=arm["name"], parameters=arm["parameters"], loss=(arm["loss"] or {}).get("mean"),
            n=(arm["loss"] or {}).get("n", 0), ms_per_step=(arm["ms_per_step"] or {}).get("mean"),
            sweep=sweep.get(arm["name"]),
            **{key: outcome.get(key) for key in ("difference", "interval", "p", "verdict", "margin", "pairs")}))
    return dict(arms=rows, folder=str(comparison.folder))


def table_of_tier_2(results: dict) -> str:
    lines = []
    for name, result in results.items():
        for row in result["arms"]:
            low, high = row["interval"] or (None, None)
            rates = row["sweep"] and row["sweep"]["chosen"]
            lines.append({
                "comparison": name, "arm": row["arm"], "parameters": f"{row['parameters'] or 0:,}",
                "loss": cell(row["loss"], "{:.4f}"), "n": row["n"], "ms a step": cell(row["ms_per_step"], "{:.1f}"),
                "rates": cell(rates, "x {:g}"), "against": cell(row["difference"], "{:+.4f}"),
                "95 %": interval_of(dict(low=low, high=high)), "verdict": row["verdict"] or "-"})
    return markdown(lines)


# ---- Tier 3 -----------------------------------------------------------------


class DenseMask(train_gpt.CausalSelfAttention):
    """The trainer's attention with a boolean mask of all pairs."""

    def forward(self, x: Tensor, ctx) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.heads(x, ctx))
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale).transpose(1, 2)
        return self.o(self.gate_heads(y, x))


def list_lengths(options: argparse.Namespace) -> dict[str, Callable]:
    runs = {}
    T = min(512, options.longest // 4)
    while T <= options.longest:
        runs[f"{T} tokens"] = partial(measure_length, options, T)
        T *= 2
    return runs


def bytes_kept(function: Callable) -> int:
    """Bytes of tensors that a forward pass keeps for its backward pass, each storage once."""
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function()
    return sum(storages.values())


def measure_length(options: argparse.Namespace, T: int) -> dict:
    """
    dict(rows), of each layer and pass at rows of T tokens, `longest` tokens in all: T, rows, layer, what, kept (bytes),
    median and the like in ms.
    """
    # every layer's calls
    rows = options.longest // T
    calls, kept = {}, {}
    for layer, variant in LAYERS.items():
        most = {"lanes": math.inf, DENSE: PAIRS}.get(layer, 8 * PAIRS)
        if rows * T * T <= most:
            for what, (function, size) in prepare_layer(options, layer, variant, rows, T).items():
                calls[layer, what], kept[layer, what] = function, size

    # their times
    results = []
    for (layer, what), times in in_turn(calls, ALONE.device, options.seconds, least=3).items():
        require(not isinstance(times, str), f"{layer}, {what} at {T} tokens: {times}")
        results.append(dict(T=T, rows=rows, layer=layer, what=what, kept=kept[layer, what]) | times)
    return dict(rows=results)


def prepare_layer(options: argparse.Namespace, layer: str, variant: str, rows: int,
                  T: int) -> dict[str, tuple[Callable, int]]:
    """{pass: (function, bytes kept)} of a layer on rows of T tokens; decoding is one token after a row's others."""
    # the layer and its input
    config = config_of(options.data, T, options.width, layers=1)
    with built(variant, config) as model:
        module = DenseMask(config, 0) if layer == DENSE else model.blocks[0].attention
        tokens = torch.zeros(rows, T, dtype=torch.int32)
        with torch.no_grad():
            x, (ctx,) = model.embed(tokens, model.masks(tokens))
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]

    # the passes
    def both():
        y = module(x, ctx)
        return torch.autograd.grad(y, [x, *parameters], y.detach(), allow_unused=True)

    kept = bytes_kept(partial(module, x, ctx)) - sum(p.nbytes for p in parameters)
    passes = {"forward": (torch.no_grad()(partial(module, x.detach(), ctx)), 0),
              "forward + backward": (both, max(0, kept))}
    if layer != DENSE:
        decoder = Decoder(model, T + 1)
        decoder.feed(tokens[:1, :-1])
        passes["decode"] = partial(decoder.feed, tokens[:1, -1:]), decoder.bytes_kept
    return passes


def table_of_tier_3(results: dict) -> str:
    return markdown([{"tokens a row": f"{row['T']:,}", "rows": row["rows"], "layer": row["layer"], "pass": row["what"],
                      "ms": f"{row['median']:.3g}", "MiB kept": f"{row['kept'] / 2 ** 20:.1f}"}
                     for result in results.values() for row in result["rows"]])


# ---- Tier 4 -----------------------------------------------------------------


def train_by_trainer(arm: str, data: str, seed: int, folder: Path, options: argparse.Namespace, *settings: str) -> Path:
    """One run of the trainer, whose files are in `folder`; returns its checkpoint."""
    command = [sys.executable, "train_gpt.py", "--data", data, "--seed", str(seed), "--tokens", str(options.tokens),
               "--device", "cpu", "--val_every", "0", "--target", "0", "--log_dir", str(folder), "--run_id", "run",
               *settings, *options.settings]
    if arm != "baseline":
        command += ["--variant", arm]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines() or ["no message"]
    require(result.returncode == 0, f"the run of {arm} with seed {seed} failed: {lines[-1]}")
    return folder / "run.pt"


def list_recalls(options: argparse.Namespace) -> dict[str, Callable]:
    return {f"{task}, {arm}, seed {seed}": partial(run_recall, options, task, arm, seed)
            for task in TASKS for arm in RECALL for seed in range(1, options.seeds + 1)}


def run_recall(options: argparse.Namespace, name: str, arm: str, seed: int) -> dict:
    """dict(task, arm, seed, chance, accuracy)"""
    pairs, queries, length = TASKS[name]
    task = recall.Recall(pairs, 64, 64, queries, length)
    T = task.sequence_length
    with TemporaryDirectory() as work:
        folder = Path(work)
        recall.make(folder / "data", task, max(64, options.tokens // T), 64, 1)
        checkpoint = train_by_trainer(arm, str(folder / "data"), seed, folder, options, "--align_documents",
                                      "--sequence_length", str(T), "--batch_tokens", str(32 * T), "--val_tokens",
                                      str(64 * T))
        scores = recall.evaluate(str(checkpoint), count=64 if options.quick else 512, device="cpu")
    return dict(task=name, arm=arm, seed=seed, chance=scores["chance"], accuracy=scores["accuracy"])


def table_of_tier_4(results: dict) -> str:
    lines = []
    for task in TASKS:
        runs = [run for run in results.values() if run["task"] == task]
        if runs:
            line = {"task": task, "chance": f"{runs[0]['chance']:.3f}"}
            for arm in RECALL:
                line[arm] = ", ".join(f"{run['accuracy']:.3f}" for run in runs if run["arm"] == arm) or "-"
            lines.append(line)
    return markdown(lines)


# ---- Tier 5 -----------------------------------------------------------------


def move_letters(rows: Tensor) -> Tensor:
    """Rows of bytes whose letters are moved by 13 places, upper and lower case each among itself."""
    moved = rows
    for first in (65, 97):
        is_letter = (rows >= first) & (rows < first + 26)
        moved = torch.where(is_letter, first + (rows - first + 13) % 26, moved)
    return moved


def first_corpus(options: argparse.Namespace, split: str, count: int) -> Tensor:
    return read_documents(options.data, split, count, options.length)


def second_corpus(options: argparse.Namespace, split: str, count: int) -> Tensor:
    if options.second:
        return read_documents(options.second, split, count, options.length)
    return move_letters(first_corpus(options, split, count))


def list_at_run_time(options: argparse.Namespace) -> dict[str, Callable]:
    runs = {f"lane dropout {dropout}": partial(run_lanes_left_out, options, dropout) for dropout in DROPOUTS}
    return runs | {arm: partial(run_adapted, options, arm) for arm in ADAPTED}


def trained_lanes(options: argparse.Namespace, dropout: float) -> tuple[dict, Config]:
    """The checkpoint of a model trained with this lane dropout, which is kept in ./comparisons, and its settings."""
    name = slug(f"{options.data}-{options.tokens}-{options.length}-{dropout} {' '.join(options.settings)}")
    kept = compare.COMPARISONS.resolve() / f"wavestack-lanes-{name}.pt"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=kept.parent) as work:
            checkpoint = train_by_trainer(
                f"wave_lanes:pack=block,lanes={LANES},lane_dropout={dropout}", options.data, 1, Path(work), options,
                "--sequence_length", str(options.length), "--batch_tokens", str(8 * options.length))
            checkpoint.replace(kept)
    saved = train_gpt.read_checkpoint(kept)
    return saved, replace(Config(**saved["config"]), compile="off", device="cpu")


def run_lanes_left_out(options: argparse.Namespace, dropout: float) -> dict:
    """{"all": loss, "no poly": loss, ...}"""
    saved, config = trained_lanes(options, dropout)
    with variants.applied(config.variant, config):
        model = train_gpt.trained_model(saved, config, ALONE)
        return measure_lanes_left_out(model, first_corpus(options, "val", 256), options.batch)


def measure_lanes_left_out(model: GPT, rows: Tensor, batch: int) -> dict[str, float]:
    """{"all": loss, "no poly": loss, ...}"""
    names = LANES.split(",")
    losses = {"all": evaluate(model, rows, batch)}
    for name in names:
        set_lanes(model, [other for other in names if other != name])
        losses[f"no {name}"] = evaluate(model, rows, batch)
    set_lanes(model, names)
    return losses


def run_adapted(options: argparse.Namespace, arm: str) -> dict:
    """
    The model with lane dropout, trained on the second corpus in one of the ways of ADAPTED: dict(parameters, of which
    are trained, first, second: losses of the corpora).
    """
    # the model with one lane more, whose parameters the others' arms have as many of
    saved, config = trained_lanes(options, DROPOUTS[-1])
    longer = replace(config, variant=(config.variant[0].replace(LANES, f"{LANES},{NEW_LANE},widths=fixed"),))
    with variants.applied(longer.variant, longer):
        grown = train_gpt.build_model(longer, ALONE)
    count = add_lane(grown, saved["model"])

    # the arm's
    settings = longer if arm == "new lane" else config
    with variants.applied(settings.variant, settings):
        model = grown if arm == "new lane" else train_gpt.trained_model(saved, config, ALONE)
        trained = 0 if arm == "before" else count
        if arm == "low rank":
            trained = add_low_rank(model, count)
        if arm == "all parameters":
            trained = sum(p.numel() for p in model.parameters())
        if arm != "before":
            rows = second_corpus(options, "train", options.rows)
            # without decay, so that a gate's other rows stay
            train(model, rows, options.steps, options.batch, 1e-3, options.steps // 10, decay=0.0)
        first, second = (evaluate(model, read(options, "val", 256), options.batch)
                         for read in (first_corpus, second_corpus))
    return dict(parameters=trained, first=first, second=second)


class LowRank(nn.Module):
    """forward(x) returns linear(x) + x A' B', with A (r, n_in) drawn and B (n_out, r) 0; the linear layer stays."""

    def __init__(self, linear: nn.Module, rank: int):
        super().__init__()
        n_out, n_in = linear.weight.shape
        self.linear = linear
        self.weight = linear.weight
        self.down = nn.Parameter(torch.randn(rank, n_in) * n_in ** -0.5)
        self.up = nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model: GPT, count: int) -> int:
    """
    Freeze the model and give its lanes' matrices low-rank changes of about `count` parameters in all. Returns how many.
    """
    model.requires_grad_(False)
    linears = [(module, name, child) for module in model.modules() for name, child in module.named_children()
               if name in ("inp", "out") and isinstance(child, train_gpt.Linear)]
    sizes = sum(sum(child.weight.shape) for _, _, child in linears)
    rank = max(1, round(count / sizes))
    for module, name, child in linears:
        setattr(module, name, LowRank(child, rank))
    return rank * sizes


def add_lane(model: GPT, state: dict[str, Tensor]) -> int:
    """
    Give a model with one lane more the tensors of a trained one, and let only the new lane, and its row of the gates,
    learn. Returns how many parameters do.
    """
    count = 0
    for name, p in model.named_parameters():
        # what it begins with
        p.requires_grad_(False)
        is_new = f".lanes.{NEW_LANE}." in name
        is_gate = ".gate." in name and name in state and state[name].shape != p.shape
        with torch.no_grad():
            if is_gate:  # the new lane's row is the last
                p[:len(state[name])] = state[name]
                p[len(state[name]):] = NEW_LANE_LOGIT if p.ndim == 1 else 0.0
            elif name in state:
                p.copy_(state[name])
            elif is_new and name.endswith("out.weight"):
                p.zero_()

        # what of it learns
        if is_new or is_gate:
            p.requires_grad_(True)
            count += p[0].numel() if is_gate else p.numel()
            if is_gate:
                p.register_hook(partial(keep_rows, len(state[name])))
    return count


def keep_rows(count: int, grad: Tensor) -> Tensor:
    """The gradient without that of the first `count` rows."""
    return torch.cat((torch.zeros_like(grad[:count]), grad[count:]))


def table_of_tier_5(results: dict) -> str:
    dropped = [{"model": name} | {lanes: f"{loss:.4f}" for lanes, loss in losses.items() if lanes != "seconds"}
               for name, losses in results.items() if "all" in losses]
    adapted = [{"arm": name, "parameters trained": f"{row['parameters']:,}", "first corpus": f"{row['first']:.4f}",
                "second corpus": f"{row['second']:.4f}"} for name, row in results.items() if "first" in row]
    return "\n\n".join(markdown(rows) for rows in (dropped, adapted) if rows)


# ---- The command ------------------------------------------------------------

LISTS = {1: list_written, 2: list_corrected, 3: list_lengths, 4: list_recalls, 5: list_at_run_time}
TABLES = {1: table_of_tier_1, 2: table_of_tier_2, 3: table_of_tier_3, 4: table_of_tier_4, 5: table_of_tier_5}


def tables(results: dict) -> str:
    """The claims and all tables as Markdown."""
    paragraphs = []
    if results["quick"]:
        paragraphs.append("A quick run, which measures nothing.")
    paragraphs += ["Claims", markdown(judge_claims(results["tiers"]))]
    for number, name in TIERS.items():
        runs = results["tiers"].get(str(number))
        if runs:
            paragraphs += [f"Tier {number}: {name}", TABLES[number](runs)]
    return "\n\n".join(paragraphs)


def open_results(options: argparse.Namespace) -> tuple[Path, dict]:
    """
    The results' file, and what is in it, or new results. RunError where it holds those of other options, which would be
    mixed with these.
    """
    results = describe(ALONE.device) | dict(
        quick=options.quick, settings=options.settings,
        options={name: getattr(options, name) for name in (*COUNTS, "data", "second", "sweep")}, tiers={})
    path = options.output or RESULTS / f"wavestack-{slug(results['device'])}.json"
    if path.exists():
        kept = json.loads(path.read_text())
        differing = [name for name in ("quick", "settings", "options") if kept[name] != results[name]]
        require(not differing, f"{path} holds runs of other {', '.join(differing)}; give the same, or another --output")
        results = kept
    return path, results


def show_plan(tiers: list[int], lists: dict[int, dict], results: dict, options: argparse.Namespace):
    """Print every run, and what is left to do. A tier's time is that of its finished runs."""
    for tier in tiers:
        kept = results["tiers"].get(str(tier), {})
        left = [name for name in lists[tier] if name not in kept]
        seconds = [run["seconds"] for run in kept.values()]
        expected = "time not known before one is done"
        if seconds:
            expected = f"{len(left) * sum(seconds) / len(seconds) / 60:.0f} minutes at the pace of those that are done"
        print(f"tier {tier}, {TIERS[tier]}: {len(lists[tier])} runs, {len(left)} to do; {expected}")
        for name in lists[tier]:
            print(f"    {'to do' if name in left else 'done '}  {name}")
            if tier == 2 and name in left:
                arguments = comparison_arguments(options, name)
                at = arguments.index("--")
                run_comparison([*arguments[:at], "--dry-run", *arguments[at:]])


def study(options: argparse.Namespace):
    """Do the runs of the tiers that are not done; write and print the results."""
    # how much of everything
    for name, counts in COUNTS.items():
        if getattr(options, name) is None:
            setattr(options, name, counts[options.quick])
        require(getattr(options, name) >= 1, f"--{name} must be at least 1, got {getattr(options, name)}")
    require(options.width % 32 == 0, f"--width must be a multiple of 32, got {options.width}")
    if options.sweep is None:
        options.sweep = "" if options.quick else "0.5,1,2"
    options.seconds = 0.05 if options.quick else 2.0

    # the runs
    path, results = open_results(options)
    lists = {tier: LISTS[tier](options) for tier in options.tiers}
    if options.dry_run:
        show_plan(options.tiers, lists, results, options)
        return
    for tier, runs in lists.items():
        kept = results["tiers"].setdefault(str(tier), {})
        for name in runs:
            if name in kept:
                continue
            begun = time.perf_counter()
            result = runs[name]()
            kept[name] = result | dict(seconds=round(time.perf_counter() - begun, 3))
            save("wavestack", results, path, tables(results))
            print(f"tier {tier}, {name}: done in {kept[name]['seconds']:.0f} s", flush=True)
    print(f"\n{tables(results)}\n\n{path}")


def parse_tiers(text: str) -> list[int]:
    numbers = text.split(",")
    if not set(numbers) <= set(map(str, TIERS)):
        raise argparse.ArgumentTypeError(f"tiers are {', '.join(map(str, TIERS))}; got {text}")
    return sorted(set(map(int, numbers)))


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--tiers", type=parse_tiers, default=list(TIERS), help="numbers, joined by commas (all)")
    parser.add_argument("--dry-run", action="store_true", help="show the runs, and train nothing")
    parser.add_argument("--data", default="data/python_bytes", help="folder of shards (data/python_bytes)")
    parser.add_argument("--second", default="", help="folder of shards with the same vocabulary, for tier 5")
    parser.add_argument("--sweep", help="factors of the rates that every arm of tier 2 tries (0.5,1,2; quick: none)")
    for name, (default, quick, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({default}; quick: {quick})")
    parser.add_argument("settings", nargs="*", help="of the trainer, after --")
    options = parser.parse_args(argv)
    return run_script("wavestack.py", lambda: study(options))


if __name__ == "__main__":
    sys.exit(main())
