"""
The claims about wave lanes (variants/wave_lanes.py) of jefflinwood/wavestack-hybrid, in five tiers, at sizes that fit
two cores.

    python -m studies.wavestack                    all tiers, hours
    python -m studies.wavestack --tiers 3,5        some
    python -m studies.wavestack --quick            a reduced run: proves that it runs, measures nothing
    python -m studies.wavestack --tiers 2 -- --track small     settings of the trainer, of tiers 2, 4 and 5

1  As written: one layer, one document a row, padded, pads scored, 0.7 x cross-entropy, AdamW at a constant rate, no
   warm-up; the lane model with all lanes, each one alone, each one left out and no convolution; no context at all; the
   transformer with embeddings of unit size, as it was published, and of 0.02 with warm-up at several rates. On
   TinyStories 0.728 to 0.730 was logged for all lanes, 1.036 for no context, 1.048 for the transformer: a tuned
   transformer below the lane model refutes the headline.
2  Corrected: nats a real token, the trainer's own schedule, equal tokens and equal seconds, several seeds; compare.py
   makes and judges the runs. The claim stands if lanes without attention are within 0.01 nats of the transformer, or
   below it, at equal parameters.
3  Length: a layer of lanes beside one of softmax attention, and of softmax attention with a dense mask, of one width,
   as many tokens in each: forward, both passes, one token of decoding, and bytes kept for the backward pass. The
   exponent of a line through the logarithms from 1,024 tokens on: 0.95 to 1.05 was claimed for lanes.
4  Recall: pairs of key and value, then queries; one pair in a long row. With attention, lanes, lanes and the recall
   lane. Prediction: lanes alone are at chance.
5  Lanes at run time: (a) the loss with each lane left out, of a model trained with and without lane dropout; (b) a
   recall lane is added to a trained model, whose other parameters stay, and trained on a second corpus, beside all
   parameters and low-rank changes of as many parameters; confirmed if it has 80 % of what training all gains, at 0.005
   nats of the first corpus' loss at most. Without --second the second corpus is the first with its letters moved by
   13 places.

The tables are printed and written beside studies/results/wavestack-<device>.json, which is rewritten after every run.
Losses of these runs compare with no other corpus's.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.timing import ROOT, describe, in_turn, markdown  # isort: skip  before PyTorch, see there
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
import variants
from data.command_line import run_script
from generate import Decoder
from studies import build_parser, save
from tasks import recall
from train_gpt import GPT, Config, Ranks, find_shards, open_shard, require
from variants.wave_lanes import set_lanes

ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)
TIERS = {1: "as written", 2: "corrected", 3: "length", 4: "recall", 5: "lanes at run time"}
PUBLISHED = 0.7             # what the published losses multiply the cross-entropy by

# tier 1: arm -> (variant, standard deviation of the embedding, None: the variant's; warm-up; learning rates)
HYBRID = "wave_lanes:pack=faithful,faithful=on"
RATES = (1e-3, 3e-3)        # of the tuned transformer, besides the published one
RATE = 3e-4
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
PLAIN = dict(x0_skip=False, unet_skips=False, smear=False, attention_gate=False, value_embeddings=0, logit_softcap=0.0,
             document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,))
# tier 2: the first is what the others are compared with
CORRECTED = ("baseline", "wave_lanes", "wave_lanes:pack=block", "wave_lanes:lanes=fourier,wavelet,attention",
             "wave_lanes:lanes=conv", "wave_lanes:lanes=fourier,wavelet,F=1,gains=frozen",
             "wave_lanes:lanes=fourier,wavelet,gains=frozen", "wave_lanes:basis=random")
# tier 4
RECALL = ("baseline", "wave_lanes", "wave_lanes:lanes=poly,fourier,wavelet,recall",
          "wave_lanes:lanes=fourier,wavelet,attention")
TASKS = {  # name -> (pairs, queries, tokens of a row; 0: as few as possible)
    "4 pairs": (4, 4, 0),
    "16 pairs": (16, 16, 0),
    "1 pair, 250 tokens": (1, 1, 256),
}
# tier 5
LANES = "poly,fourier,wavelet"
NEW_LANE, NEW_LANE_LOGIT = "recall", -6.0
COUNTS = dict(  # in full, in a quick run, what it counts
    rows=(2000, 24, "documents of tier 1"), length=(256, 32, "tokens of tier 1's rows"),
    width=(128, 16, "channels of tier 1's and tier 3's models"), steps=(600, 3, "steps of tier 1 and of tier 5's (b)"),
    batch=(32, 4, "rows of these steps"), seeds=(3, 2, "of tiers 2 and 4, from 1 on"),
    tokens=(1_500_000, 6144, "tokens of a run of tiers 2, 4 and 5"), longest=(32_768, 256, "tokens of tier 3's rows"))


# ---- Runs outside the trainer -----------------------------------------------


def read_documents(data: str, split: str, count: int, length: int) -> Tensor:
    """
    Return `count` documents of a split as rows (n, length + 1) int64: a document's first tokens, then its end, again
    and again.
    """
    config = train_gpt.make_config(dict(data=data))
    train_gpt.adopt_vocabulary(config)
    end = config.end_of_text
    rows = []
    for shard in find_shards(config, split):
        tokens = np.asarray(open_shard(shard), dtype=np.int64)
        for start in np.flatnonzero(tokens == end).tolist():
            document = tokens[start + 1:start + 1 + length]
            following = np.flatnonzero(document == end)
            if len(following):
                document = document[:following[0]]
            rows.append(np.concatenate(([end], document, np.full(length - len(document), end))))
            if len(rows) == count:
                return torch.from_numpy(np.stack(rows))
    require(rows, f"{data} has no document of its split {split}; give --data another folder of shards")
    return torch.from_numpy(np.stack(rows))


def config_of(data: str, length: int, width: int, **settings) -> Config:
    """The settings of tier 1's models: those of a plain transformer, where nothing else is said."""
    values = dict(data=data, sequence_length=length, batch_tokens=length, model_dim=width, head_dim=32,
                  heads=width // 32, mlp_hidden=4 * width, layers=2, compile="off")
    if width < 32:
        values |= dict(head_dim=width, heads=1)
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
    total = sum(cross_entropy(model, part).item() * len(part) for part in rows.split(batch))
    return total / len(rows)


def train(model: GPT, rows: Tensor, steps: int, batch: int, rate: float, warmup: int = 0, seed: int = 1):
    """AdamW with a weight decay of 0.01 and gradients clipped to 1, on the parameters that want a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
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


def run_as_written(options: argparse.Namespace, keep: Callable) -> dict:
    """{arm: dict(parameters, loss, published: 0.7 x the loss)}"""
    rows = read_documents(options.data, "train", options.rows, options.length)
    held_out = read_documents(options.data, "val", 256, options.length)
    results = {}

    def run(arm: str, variant: str, config: Config, rate: float = RATE, std: float | None = None, warmup: int = 0):
        with built(variant, config) as model:
            if std is not None:
                nn.init.normal_(model.embedding.weight, std=std)
            train(model, rows, options.steps, options.batch, rate, warmup)
            loss = evaluate(model, held_out, options.batch)
        parameters = sum(p.numel() for p in model.parameters())
        results[arm] = dict(parameters=parameters, loss=loss, published=PUBLISHED * loss)
        keep(results)

    # the lane model, and the transformer as it was published and tuned
    config = config_of(options.data, options.length, options.width)
    for arm, variant in WRITTEN.items():
        run(arm, variant, config)
    run("transformer as published", "", config, std=1.0)
    for rate in (RATE, *RATES):
        run(f"transformer, tuned, rate {rate:g}", "", config, rate, 0.02, options.steps // 10)
    return results


def table_of_tier_1(results: dict) -> str:
    return markdown([{"arm": arm, "parameters": f"{row['parameters']:,}", "loss": f"{row['loss']:.4f}",
                      "0.7 x loss": f"{row['published']:.4f}"} for arm, row in results.items()])


# ---- Tier 2 -----------------------------------------------------------------


def run_corrected(options: argparse.Namespace, keep: Callable) -> dict:
    """{budget: the results.json of compare.py}"""
    results = {}
    for budget in ("tokens", "time"):
        with TemporaryDirectory() as folder:
            command = [sys.executable, "compare.py", *CORRECTED, "--seeds", str(options.seeds), "--budget", budget,
                       "-o", folder, "--", "--data", options.data, "--tokens", str(options.tokens), "--device", "cpu",
                       *options.settings]
            call(command, f"compare.py with --budget {budget}")
            results[budget] = json.loads(Path(folder, "results.json").read_text())
        keep(results)
    return results


def call(command: list[str], name: str):
    """Run a command of this checkout. RunError with its last line if it fails."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.strip().splitlines() or ["no message"]
    require(result.returncode == 0, f"{name} failed: {lines[-1]}")


def table_of_tier_2(results: dict) -> str:
    lines = []
    for budget, result in results.items():
        for arm in result["arms"]:
            loss, difference = arm["loss"], (arm["vs_baseline"] or {}).get("loss")
            if loss is None:
                continue
            line = {"equal": budget, "arm": arm["name"], "loss": f"{loss['mean']:.4f}", "n": loss["n"], "against": "-",
                    "95 %": "-", "verdict": "-"}
            if difference is not None:
                line |= {"against": f"{difference['difference']:+.4f}", "verdict": difference["verdict"]}
                if difference["low"] is not None:
                    line["95 %"] = f"{difference['low']:+.4f} to {difference['high']:+.4f}"
            lines.append(line)
    return markdown(lines)


# ---- Tier 3 -----------------------------------------------------------------


def dense_mask(config: Config, layer: int) -> nn.Module:
    """The trainer's attention with a boolean mask of all pairs."""
    class DenseMask(train_gpt.CausalSelfAttention):
        def forward(self, x: Tensor, ctx) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in self.heads(x, ctx))
            allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale).transpose(1, 2)
            return self.o(self.gate_heads(y, x))
    return DenseMask(config, layer)


LAYERS = {"lanes": "wave_lanes", "softmax attention": "", "softmax, dense mask": ""}
PAIRS = 1 << 28     # no dense mask of more pairs; softmax attention of eight times as many


def bytes_kept(function: Callable) -> int:
    """Bytes of tensors that a forward pass keeps for its backward pass, each storage once."""
    storages = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        function()
    return sum(storages.values())


def measure_length(T: int, options: argparse.Namespace) -> list[dict]:
    """A row for every layer and pass at rows of T tokens, `longest` tokens in all."""
    rows = options.longest // T
    calls, kept, work = {}, {}, []
    for name, variant in LAYERS.items():
        pairs = rows * T * T
        if name != "lanes" and pairs > (PAIRS if "dense" in name else 8 * PAIRS):
            continue
        config = config_of(options.data, T, options.width, layers=1)
        with built(variant, config) as model:
            layer = model.blocks[0].attention
            if "dense" in name:
                layer = dense_mask(config, 0)
            tokens = torch.zeros(rows, T, dtype=torch.int32)
            with torch.no_grad():
                x, (ctx,) = model.embed(tokens, model.masks(tokens))
        x = torch.randn(x.shape).requires_grad_()
        parameters = [p for p in layer.parameters() if p.requires_grad]
        inputs = [x, *parameters]

        def both(layer=layer, inputs=inputs, ctx=ctx):
            y = layer(inputs[0], ctx)
            return torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

        calls[name, "forward"] = torch.no_grad()(partial(layer, x.detach(), ctx))
        calls[name, "forward + backward"] = both
        own = sum(p.nbytes for p in parameters)
        kept[name] = max(0, bytes_kept(partial(layer, x, ctx)) - own)
        if "dense" not in name:
            decoder = Decoder(model, T + 1)
            decoder.feed(tokens[:1, :-1])
            calls[name, "decode"] = partial(decoder.feed, tokens[:1, -1:])

    for (name, what), times in in_turn(calls, torch.device("cpu"), options.seconds, least=3).items():
        require(not isinstance(times, str), f"{name}, {what} at {T} tokens: {times}")
        work.append(dict(T=T, rows=rows, layer=name, what=what, kept=kept[name]) | times)
    return work


def run_length(options: argparse.Namespace, keep: Callable) -> dict:
    """dict(rows, exponents: {"layer, pass": slope over all lengths from 1,024 tokens on})"""
    results = dict(rows=[], exponents={})
    T = min(512, options.longest // 4)
    while T <= options.longest:
        results["rows"] += measure_length(T, options)
        keep(results)
        T *= 2

    # time of a row over its length
    times = {}
    for row in results["rows"]:
        if row["T"] >= 1024 or options.quick:
            rows = 1 if row["what"] == "decode" else row["rows"]
            times.setdefault(f"{row['layer']}, {row['what']}", []).append((row["T"], row["median"] / rows))
    for name, points in times.items():
        if len(points) > 1:
            tokens, ms = np.log(np.array(points)).T
            results["exponents"][name] = float(np.polyfit(tokens, ms, 1)[0])
    return results


def table_of_tier_3(results: dict) -> str:
    rows = [{"tokens a row": f"{row['T']:,}", "rows": row["rows"], "layer": row["layer"], "pass": row["what"],
             "ms": f"{row['median']:.3g}", "MiB kept": f"{row['kept'] / 2 ** 20:.1f}"} for row in results["rows"]]
    slopes = [{"layer, pass": name, "exponent": f"{slope:.3f}"} for name, slope in results["exponents"].items()]
    return markdown(rows) + ("\n\n" + markdown(slopes) if slopes else "")


# ---- Tier 4 -----------------------------------------------------------------


def train_by_trainer(arm: str, data: str, seed: int, folder: Path, options: argparse.Namespace, *settings: str) -> dict:
    """One run of the trainer, its JSON; its checkpoint is folder/<run_id>.pt."""
    name = f"run-{len(list(folder.glob('*.json')))}"
    command = [sys.executable, "train_gpt.py", "--data", data, "--seed", str(seed), "--tokens", str(options.tokens),
               "--device", "cpu", "--val_every", "0", "--target", "0", "--log_dir", str(folder), "--run_id", name,
               *settings, *options.settings]
    if arm != "baseline":
        command += ["--variant", arm]
    call(command, f"the run of {arm} with seed {seed}")
    return json.loads((folder / f"{name}.json").read_text())


def run_recall(options: argparse.Namespace, keep: Callable) -> dict:
    """{task: {arm: [accuracy of each seed]}}"""
    results = {}
    for name, (pairs, queries, length) in TASKS.items():
        task = recall.Recall(pairs, 64, 64, queries, length)
        T = task.sequence_length
        results[name] = dict(chance=1 / task.values)
        with TemporaryDirectory() as work:
            folder = Path(work)
            recall.make(folder / "data", task, max(64, options.tokens // T), 64, 1)
            for arm in RECALL:
                scores = []
                for seed in range(1, options.seeds + 1):
                    run = train_by_trainer(arm, str(folder / "data"), seed, folder, options, "--align_documents",
                                           "--sequence_length", str(T), "--batch_tokens", str(32 * T), "--val_tokens",
                                           str(64 * T))
                    checkpoint = folder / f"{run['run_id']}.pt"
                    scores.append(recall.evaluate(str(checkpoint), count=64 if options.quick else 512, device="cpu"))
                    checkpoint.unlink()
                results[name][arm] = [score["accuracy"] for score in scores]
                keep(results)
    return results


def table_of_tier_4(results: dict) -> str:
    lines = []
    for name, scores in results.items():
        line = {"task": name, "chance": f"{scores['chance']:.3f}"}
        for arm in RECALL:
            if arm in scores:
                line[arm] = ", ".join(f"{score:.3f}" for score in scores[arm])
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


def second_corpus(options: argparse.Namespace, split: str, count: int) -> Tensor:
    if options.second:
        return read_documents(options.second, split, count, options.length)
    return move_letters(read_documents(options.data, split, count, options.length))


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


def add_low_rank(model: GPT, count: int):
    """Freeze the model and give its lanes' matrices low-rank changes of about `count` parameters in all."""
    model.requires_grad_(False)
    linears = [(module, name, child) for module in model.modules() for name, child in module.named_children()
               if name in ("inp", "out") and isinstance(child, train_gpt.Linear)]
    sizes = sum(sum(child.weight.shape) for _, _, child in linears)
    rank = max(1, round(count / sizes))
    for module, name, child in linears:
        setattr(module, name, LowRank(child, rank))


def add_lane(model: GPT, state: dict[str, Tensor]) -> int:
    """
    Give a model with one lane more the tensors of a trained one, and let only the new lane, and its row of the gates,
    learn. Returns how many parameters do.
    """
    count = 0
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        is_new = f".lanes.{NEW_LANE}." in name
        with torch.no_grad():
            if name in state and state[name].shape == p.shape:
                p.copy_(state[name])
            elif name in state:  # a gate: the new lane's row is the last
                p[:len(state[name])] = state[name]
                p[len(state[name]):] = NEW_LANE_LOGIT if p.ndim == 1 else 0.0
            if is_new and name.endswith("out.weight"):
                p.zero_()
        is_gate = ".gate." in name and name in state and state[name].shape != p.shape
        if is_new or is_gate:
            p.requires_grad_(True)
            count += p.numel()
            if is_gate:
                p.register_hook(partial(keep_rows, len(state[name])))
    return count


def keep_rows(count: int, grad: Tensor) -> Tensor:
    """The gradient without that of the first `count` rows."""
    return torch.cat((torch.zeros_like(grad[:count]), grad[count:]))


def measure_lanes_left_out(model: GPT, rows: Tensor, batch: int) -> dict[str, float]:
    """{"all": loss, "no poly": loss, ...}"""
    names = LANES.split(",")
    losses = {"all": evaluate(model, rows, batch)}
    for name in names:
        set_lanes(model, [other for other in names if other != name])
        losses[f"no {name}"] = evaluate(model, rows, batch)
    set_lanes(model, names)
    return losses


def run_at_run_time(options: argparse.Namespace, keep: Callable) -> dict:
    """dict(dropped: {lane dropout: losses}, added: {arm: dict(parameters, first, second)})"""
    results = dict(dropped={}, added={})
    old, new = (read(options, "val", 256) for read in (first_corpus, second_corpus))
    with TemporaryDirectory() as work:
        folder = Path(work)
        for dropout in (0.0, 0.1):
            arm = f"wave_lanes:pack=block,lanes={LANES},lane_dropout={dropout}"
            run = train_by_trainer(arm, options.data, 1, folder, options, "--sequence_length", str(options.length),
                                   "--batch_tokens", str(8 * options.length))
            saved = train_gpt.read_checkpoint(folder / f"{run['run_id']}.pt")
            config = replace(Config(**saved["config"]), compile="off", device="cpu")
            with variants.applied(config.variant, config):
                model = train_gpt.trained_model(saved, config, ALONE)
                results["dropped"][str(dropout)] = measure_lanes_left_out(model, old, options.batch)
            keep(results)

        # a second corpus, from the model with lane dropout
        rows = second_corpus(options, "train", options.rows)
        results["added"]["before"] = dict(parameters=0, first=evaluate(model, old, options.batch),
                                          second=evaluate(model, new, options.batch))
        for arm in ("new lane", "all parameters", "low rank"):
            results["added"][arm] = adapt(arm, saved, config, rows, (old, new), options)
            keep(results)
    return results


def first_corpus(options: argparse.Namespace, split: str, count: int) -> Tensor:
    return read_documents(options.data, split, count, options.length)


def adapt(arm: str, saved: dict, config: Config, rows: Tensor, held_out: tuple[Tensor, Tensor],
          options: argparse.Namespace) -> dict:
    """Train a checkpoint's model on rows in one of three ways; dict(parameters, first, second): losses on held_out."""
    longer = replace(config, variant=(config.variant[0].replace(LANES, f"{LANES},{NEW_LANE},widths=fixed"),))
    with variants.applied(longer.variant, longer):
        grown = train_gpt.build_model(longer, ALONE)
    count = add_lane(grown, saved["model"])
    if arm == "new lane":
        model, settings = grown, longer
    else:
        settings = config
        with variants.applied(config.variant, config):
            model = train_gpt.trained_model(saved, config, ALONE)
        if arm == "low rank":
            add_low_rank(model, count)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with variants.applied(settings.variant, settings):
        train(model, rows, options.steps, options.batch, 1e-3, options.steps // 10)
        first, second = (evaluate(model, part, options.batch) for part in held_out)
    return dict(parameters=count, first=first, second=second)


def table_of_tier_5(results: dict) -> str:
    dropped = [{"lane dropout": dropout} | {name: f"{loss:.4f}" for name, loss in losses.items()}
               for dropout, losses in results["dropped"].items()]
    added = [{"arm": arm, "parameters trained": f"{row['parameters']:,}", "first corpus": f"{row['first']:.4f}",
              "second corpus": f"{row['second']:.4f}"} for arm, row in results["added"].items()]
    text = "\n\n".join(markdown(rows) for rows in (dropped, added) if rows)
    arms = results["added"]
    if {"before", "new lane", "all parameters"} <= arms.keys():
        gains = [arms["before"]["second"] - arms[arm]["second"] for arm in ("new lane", "all parameters")]
        lost = arms["new lane"]["first"] - arms["before"]["first"]
        share = gains[0] / gains[1] if gains[1] > 0 else math.nan
        text += f"\n\nThe new lane has {100 * share:.0f} % of the gain and loses {lost:.4f} nats of the first corpus."
    return text


# ---- The command ------------------------------------------------------------

RUNS = {1: run_as_written, 2: run_corrected, 3: run_length, 4: run_recall, 5: run_at_run_time}
TABLES = {1: table_of_tier_1, 2: table_of_tier_2, 3: table_of_tier_3, 4: table_of_tier_4, 5: table_of_tier_5}


def tables(results: dict) -> str:
    """All tables as Markdown."""
    paragraphs = []
    for number, name in TIERS.items():
        if str(number) in results["tiers"]:
            paragraphs += [f"Tier {number}: {name}", TABLES[number](results["tiers"][str(number)])]
    return "\n\n".join(paragraphs)


def study(options: argparse.Namespace):
    """Run the tiers one after another; write and print the results."""
    for name, counts in COUNTS.items():
        if getattr(options, name) is None:
            setattr(options, name, counts[options.quick])
        require(getattr(options, name) >= 1, f"--{name} must be at least 1, got {getattr(options, name)}")
    options.seconds = 0.05 if options.quick else 2.0
    results = describe(torch.device("cpu")) | dict(
        tiers={}, quick=options.quick, settings=options.settings,
        options={name: getattr(options, name) for name in (*COUNTS, "data", "second")})

    def keep(number: int, found: dict):
        results["tiers"][str(number)] = found
        save("wavestack", results, options.output, tables(results))

    for number in options.tiers:
        keep(number, RUNS[number](options, partial(keep, number)))
        print(f"tier {number}: done", flush=True)
    print(f"\n{tables(results)}\n\n{save('wavestack', results, options.output, tables(results))}")


def parse_tiers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if not set(numbers) <= set(TIERS):
        raise argparse.ArgumentTypeError(f"tiers are {', '.join(map(str, TIERS))}; got {text}")
    return numbers


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--tiers", type=parse_tiers, default=list(TIERS), help="numbers, joined by commas (all)")
    parser.add_argument("--data", default="data/python_bytes", help="folder of shards (data/python_bytes)")
    parser.add_argument("--second", default="", help="folder of shards with the same vocabulary, for tier 5")
    for name, (default, quick, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text} ({default}; quick: {quick})")
    parser.add_argument("settings", nargs="*", help="of the trainer, after --")
    options = parser.parse_args(argv)
    return run_script("wavestack.py", lambda: study(options))


if __name__ == "__main__":
    sys.exit(main())
