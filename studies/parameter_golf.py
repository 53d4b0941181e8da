"""
The 30 runs of a parameter-golf submission again, under two fair protocols, with their repaired forms: what each of its
13 architectures is worth for its parameters and for its time.

    python -m studies.parameter_golf                       all presets, both protocols: hours of two cores
    python -m studies.parameter_golf --dry-run             the presets, what is done, how long the rest will take
    python -m studies.parameter_golf --presets mla_l64 mla_l128 --protocol A --seeds 3
    python -m studies.parameter_golf --quick               a reduced run: proves that it runs, measures nothing
    python -m studies.parameter_golf --track golf -- --data data/fineweb10B      the published size, on a GPU

Source: github.com/openai/parameter-golf, pull request 1589. Every figure there is of one seed and 600 s on one H100,
without a log, and its learning rate fell with the time left, so that a slow run had decayed further at an equal step.

A, fixed steps: every preset has the same steps and tokens, and its rates follow the share of the steps that are done.
B, fixed time: the time of a step is measured in the runs of A, after their first 50 steps or first half; a preset then
   has N = floor(budget / time) steps and the same decay over its N. The budget is the baseline's time under A. What
   the runs of B then took stands beside it: where it is not the budget, the machine had other work.

compare.py makes and judges the runs; --seeds says how many: three of every preset, six of those whose mean loss after
the three is within 0.02 nats of the baseline's. That choice depends on how small a difference is, so that it makes no
difference look larger than it is. Verdicts and p values are by records/verdicts.py, over pairs of equal seeds, for all
presets of a protocol together; fewer than five pairs have an interval and no verdict. An arm that is not sound, as some
are that were published, runs and is marked. Auxiliary losses are in no figure: validation never sees them.

A preset is an arm of compare.py. {a|b} in it is a at the published size and b on track golf_cpu, where widths and ranks
are 3/16 of the published ones; seed_model's dimension and the bond of mps keep their share of the parameters.

Finished runs are in ./comparisons, so that the same command goes on wherever it was stopped. The results are written
after every comparison: JSON, tables (.md) and a picture (.png) in studies/results/.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.timing import describe, markdown  # isort: skip  before PyTorch, see there
import numpy as np
import torch

import compare
import train_gpt
import variants
from compare import Comparison
from data import local_corpus
from data.command_line import run_script
from records.results import summarize
from records.runs import Run
from studies import build_parser, save
from studies.comparisons import (
    add_run_options,
    arms_of,
    cell,
    check_steps,
    interval_of,
    length_options,
    losses_of,
    mean_of,
    plan_comparison,
    run_comparison,
    show_plan,
    tests_of,
    trainer_options,
)
from studies.golf_claims import Evidence, judge_claims
from studies.golf_picture import draw
from studies.ngram_loss import first_tokens, unigram
from train_gpt import Config, adopt_vocabulary, data_folder, find_shards, require, say

TRACKS = ("golf", "golf_cpu")
WARM_STEPS = 50         # the first steps of a run, whose time is not measured
MARGIN = 0.01           # nats: smaller differences are equivalent
NEAR = 0.02             # nats from the baseline: within that a preset has more seeds
TRAIN_TOKENS = 10_000_000   # of the unigram model that a repaired form must beat
# the small models that were published: three plain blocks with GELU
PLAIN = ("--layers 3 --model_dim {128|24} --heads {4|2} --head_dim {32|12} --mlp_hidden {256|48} --kv_heads 0 "
         "--no-x0_skip --no-unet_skips --no-channel_scales")
ONE_BLOCK = "--layers 1 --no-unet_skips"


# ---- The presets ------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """One arm of the study."""

    name: str
    line: str                       # an arm of compare.py, with {a|b} for sizes
    bits: float | None = None       # bits a byte that were published; None: none were
    parameters: int | None = None   # of the published size with a vocabulary of 1,024; None: it was not published
    style: str = "published"        # or repaired, control

    def arm(self, track: str) -> str:
        """The arm of compare.py on a track."""
        return re.sub(r"\{([^|}]+)\|([^}]+)\}", rf"\{1 + TRACKS.index(track)}", self.line)


PUBLISHED = (
    Preset("baseline", "baseline", 1.3094, 17_059_912),
    Preset("mla_l64", "latent_attention:latent={64|12},style=published", 1.3362, 15_290_440),
    Preset("mla_l128", "latent_attention:latent={128|24},style=published", 1.3223, 15_880_264),
    Preset("recur_34x2", "depth_recurrence:looped=3,4,style=published", 1.3226, 17_060_424),
    Preset("recur_345x2", "depth_recurrence:looped=3,4,5,style=published", 1.3324, 17_060_936),
    Preset("recur_34x3", "depth_recurrence:looped=3,4,times=3,style=published", 1.3399, 17_060_936),
    Preset("pause_4x64", "pause_tokens:num=4,every=64,style=published", 1.3318, 17_061_960),
    Preset("pause_8x32", "pause_tokens:num=8,every=32,style=published", 1.3438, 17_064_008),
    Preset("eigen_r64", "low_rank:rank={64|12},style=published", 1.4997, 4_382_152),
    Preset("eigen_r128", "low_rank:rank={128|24},style=published", 1.4171, 8_219_464),
    Preset("eigen_r256", "low_rank:rank={256|48},style=published", 1.3643, 15_894_088),
    Preset("eigen2_a32m96", "low_rank:attn_rank={32|6},mlp_rank={96|18},style=published", 1.5138, 4_234_120),
    Preset("eigen2_a96m32", "low_rank:attn_rank={96|18},mlp_rank={32|6},style=published", 1.5888, 4_530_184),
    Preset("eigen2_a128m32", "low_rank:attn_rank={128|24},mlp_rank={32|6},style=published", 1.5538, 5_563_528),
    Preset("eigen2_d1024_r64", "low_rank:rank={64|12},style=published --model_dim {1024|192} --head_dim {128|48} "
           "--mlp_hidden {2048|384}", 1.5785, 8_760_776),
    Preset("eigen2_d768_r48", "low_rank:rank={48|9},style=published --model_dim {768|144} --head_dim {96|36} "
           "--mlp_hidden {1536|288}", 1.6098, 5_132_904),
    Preset("eigen2_d1024_r32", "low_rank:rank={32|6},style=published --model_dim {1024|192} --head_dim {128|48} "
           "--mlp_hidden {2048|384}", 1.8539, 4_925_192),
    Preset("eigen2_r128_rec34", "low_rank:rank={128|24},style=published+"
           "depth_recurrence:looped=3,4,style=published", 1.4306, 8_219_976),
    Preset("eigen2_a96m48_rec34", "low_rank:attn_rank={96|18},mlp_rank={48|9},style=published+"
           "depth_recurrence:looped=3,4,style=published", 1.5469, 4_973_352),
    Preset("basis_r64", "basis_sharing:rank={64|12},style=published", 2.03, 2_805_832),
    Preset("basis_r128", "basis_sharing:rank={128|24},style=published", 1.8226, 5_066_824),
    Preset("ut_act12", f"universal_transformer:t_max=12,halt_bias=-3,style=published {ONE_BLOCK}", 1.6967, 2_361_865),
    Preset("ut_act20", f"universal_transformer:t_max=20,halt_bias=-3,style=published {ONE_BLOCK}", 1.8591, 2_361_865),
    Preset("hyper_r32", "hypernetwork:z_dim={64|12},hidden={512|96},rank={32|6},refresh=micro,lr=3e-4,style=published",
           2.7445, 110_106_248),
    Preset("attractor_128", f"hopfield:style=published {PLAIN}", 3.0826, 638_978),
    Preset("agents_m64", f"communicating_agents:message={{64|12}},style=published {PLAIN}", 4.2103, 1_269_760),
    Preset("mps_b64", "tensor_train:bond={64|24},pos_dim={32|12},style=published", 15.3803, 4_238_720),
    Preset("seed_2048", "seed_model:dim={2048|72},style=published", None, 546_888),
    Preset("nca_s50", "cellular_automaton:steps=50,hidden={128|24},style=published", 4.1640, 24_832),
    Preset("siren_h256", "siren_weights:hidden={256|48},lr=1e-4,style=published --no-x0_skip --no-unet_skips "
           "--no-zero_init_projections", 5.1245, 668_617),
)

# What the claims need besides. Equal in parameters: mla_l128_repaired and low_rank_r256, low_rank_r90 and basis_r130,
# rank_in_mlp and rank_in_attention.
FURTHER = (
    Preset("mla_l128_repaired", "latent_attention:latent={128|24}", style="repaired"),
    Preset("recur_34x2_repaired", "depth_recurrence:looped=3,4", style="repaired"),
    Preset("pause_4x64_repaired", "pause_tokens:num=4,every=64", style="repaired"),
    Preset("low_rank_r256", "low_rank:rank={256|48}", style="repaired"),
    Preset("low_rank_r90", "low_rank:rank={90|18}", style="repaired"),
    Preset("basis_r130", "basis_sharing:rank={130|26},group=3,types=all", style="repaired"),
    Preset("rank_in_mlp", "low_rank:attn_rank={32|6},mlp_rank={102|20}", style="control"),
    Preset("rank_in_attention", "low_rank:attn_rank={92|18},mlp_rank={32|6}", style="control"),
    Preset("eigen_r512", "low_rank:rank={512|96},style=published", style="control"),
    Preset("tt_mlp", "tensor_train", style="control"),
    Preset("ut_act12_repaired", f"universal_transformer:t_max=12 {ONE_BLOCK}", style="repaired"),
    Preset("ut_off12", f"universal_transformer:t_max=12,style=off {ONE_BLOCK}", style="control"),
    Preset("hyper_repaired", "hypernetwork:chunk={64|16},z_dim={64|16},hidden={256|64}", style="repaired"),
    Preset("attractor_repaired", "hopfield", style="repaired"),
    Preset("agents_repaired", "communicating_agents:message={64|12}", style="repaired"),
    Preset("mps_repaired", "tensor_train:style=mps,bond={64|24},pos_dim={32|12}", style="repaired"),
    Preset("seed_repaired", "seed_model:dim={2048|72}", style="repaired"),
    Preset("nca_repaired", "cellular_automaton:hidden={64|24}", style="repaired"),
    Preset("siren_repaired", "siren_weights:hidden={256|48}", style="repaired"),
)
ALL = {preset.name: preset for preset in PUBLISHED + FURTHER}
QUICK = ("mla_l128", "eigen_r64")


def choose_presets(words: list[str]) -> list[Preset]:
    """
    The presets of these names, all of a style where a word names one, in the table's order, the baseline first.
    RunError for a word that names none.
    """
    styles = {preset.style for preset in ALL.values()}
    for word in words:
        require(word in ALL or word in styles,
                f"there is no preset {word!r:.60}; choose from {', '.join([*sorted(styles), *ALL])}")
    return [preset for preset in ALL.values() if preset.name == "baseline" or {preset.name, preset.style} & set(words)]


def config_of(arm: str, options: list[str]) -> Config:
    """The trainer's configuration of an arm with these options, whose vocabulary is its data's unless they say one."""
    words = shlex.split(arm)
    variant = [] if words[0] == "baseline" else ["--variant", words[0]]
    config = compare.parse_options([*options, *words[1:], *variant])
    if not config.vocab_size:
        adopt_vocabulary(config)
    return config


def count_numbers(config: Config) -> dict:
    """
    dict(stored, generated, bytes) of a model: its parameters, the numbers that a source makes of some of them, and the
    bytes of the parameters as the trainer holds them.
    """
    with variants.applied(config.variant, config), torch.device("meta"):
        model = train_gpt.GPT(config)
    generated = 0 if model.source is None else sum(shape.numel() for shape in model.source.shapes.values())
    parameters = list(model.parameters())
    return dict(stored=sum(p.numel() for p in parameters), generated=generated, bytes=sum(p.nbytes for p in parameters))


# ---- The comparisons --------------------------------------------------------


def compare_arms(arms: list[str], seeds: int, options: argparse.Namespace,
                 length: list[str]) -> tuple[Comparison, dict | None]:
    """
    Do what is missing of the comparison of these arms, the first of which is the baseline; returns it and its results,
    None of a dry run. length: options of the trainer for all arms. KeyboardInterrupt for a signal; finished runs are
    kept.
    """
    argv = [*arms, "--track", options.track, "--seeds", str(seeds), "--jobs", str(options.jobs), "--margin",
            str(options.margin), "--anyway", "--", *trainer_options(options.settings), *length]
    if not options.dry_run:
        return run_comparison(argv)
    return plan_comparison(argv), None


def find_near(results: dict) -> list[str]:
    """The arms whose mean loss is within NEAR of the baseline's."""
    tests = {arm["name"]: arm["vs_baseline"] for arm in results["arms"][1:]}
    return [name for name, test in tests.items() if test and abs(test["loss"]["difference"]) <= NEAR]


def join(first: tuple[dict, list[dict]], more: tuple[dict, list[dict]], seeds: int) -> tuple[dict, list[dict]]:
    """
    (settings, arms) of a comparison in which some arms have the runs of a second one, which has all of the first's
    `seeds` runs of these arms again.
    """
    (settings, arms), (more_settings, more_arms) = first, more
    longer = {arm["name"]: arm for arm in more_arms}
    added = [entry for entry in more_settings["reused"] if entry["seed"] > seeds]
    joined = settings | dict(
        seeds=more_settings["seeds"], reused=settings["reused"] + added,
        order=settings["order"] + more_settings["order"], company=settings["company"] + more_settings["company"])
    return joined, [longer.get(arm["name"], arm) for arm in arms]


def run_protocol(arms: list[str], options: argparse.Namespace, length: list[str], keep: Callable):
    """
    Run a protocol. keep(results, arms) is called as soon as there are results of all arms, and again with more seeds of
    some; arms: with the runs of the first seeds alone.
    """
    # the first seeds
    seeds, more_seeds = options.seeds
    comparison, results = compare_arms(arms, seeds, options, length)
    first = results["settings"], arms_of(comparison, results)
    keep(results, first[1])

    # more of those that are near the baseline
    near = find_near(results)
    if near and more_seeds > seeds:
        comparison, results = compare_arms([arms[0], *near], more_seeds, options, length)
        results = summarize(*join(first, (results["settings"], arms_of(comparison, results)), seeds))
        keep(results, first[1])


def measure_step(runs: list) -> float | None:
    """
    Milliseconds of a step after the warm ones, the median over the finished runs of each one's interquartile mean,
    which no pause moves; None where none is finished.
    """
    means = []
    for run in runs:
        if isinstance(run, Run) and run.finished and len(run.step_ms) > 1:
            times = np.diff(run.step_ms)
            times = np.sort(times[min(WARM_STEPS, len(times) // 2):])
            cut = len(times) // 4
            means.append(float(times[cut:len(times) - cut].mean()))
    return float(np.median(means)) if means else None


def steps_within(budget_ms: float, step_ms: float) -> int:
    """The steps that a budget allows, one at least."""
    return max(1, math.floor(budget_ms / step_ms * (1 + 1e-9)))


def arms_in_time(times: dict[str, float | None], steps: int, budget: float | None) -> tuple[dict[str, str], float]:
    """
    ({arm of protocol A: the arm with its steps of protocol B}, budget in seconds), an arm whose time is not known left
    out. times: milliseconds of a step, of the baseline first; steps: its steps under A; budget: seconds, None: the
    baseline's.
    """
    baseline = next(iter(times.values()))
    require(baseline, "no run of the baseline is finished, so that no time is known; see its log, or choose other "
            "settings")
    budget_ms = 1000 * budget if budget else steps * baseline
    lines = {}
    for name, ms in times.items():
        if ms:
            lines[name] = " ".join([name, *length_options(steps_within(budget_ms, ms))])
    return lines, budget_ms / 1000


# ---- Results ----------------------------------------------------------------


def rows_of(results: dict, names: dict[str, str], times: dict[str, float | None],
            options: argparse.Namespace) -> dict[str, dict]:
    """
    {preset: what came of it} of a protocol's results; names: {arm: preset}; times: {preset: milliseconds of a step, as
    measured under protocol A}.
    """
    rows = {}
    shared = ["--track", options.track, *trainer_options(options.settings)]
    baseline_ms = times["baseline"]
    for arm in results["arms"]:
        preset = ALL[names[arm["name"]]]
        tests = arm["vs_baseline"] or dict(time={})
        ms = times[preset.name]

        rows[preset.name] = dict(
            arm=arm["name"], style=preset.style, published_bits=preset.bits, published_parameters=preset.parameters,
            without_embeddings=arm["parameters_without_embeddings"],
            **count_numbers(config_of(arm["name"], shared)), flops_per_token=arm["flops_per_token"],
            steps=arm["steps"], ms_per_step=ms, times_baseline=ms and baseline_ms and ms / baseline_ms,
            seconds=arm["curve"][-1][2] if arm["curve"] else None,
            peak_memory_mib=(arm["peak_memory_mib"] or {}).get("max"),
            start_loss=arm["curve"][0][3] if arm["curve"] else None, loss=arm["loss"],
            bits_per_byte=mean_of(arm["bits_per_byte"]), time_verdict=tests["time"].get("verdict"),
            losses=losses_of(arm), **tests_of(arm), faults=arm["faults"], errors=arm["errors"])
    return rows


def unigram_loss(config: Config) -> float:
    """Nats a token of a unigram model on the validation tokens: what a model that has learnt anything is below."""
    train = first_tokens(config, "train", TRAIN_TOKENS)
    val = first_tokens(config, "val", config.val_tokens + 1)[1:]
    return float(-np.log(unigram(train, config.vocab_size)[val]).mean())


def table_of(rows: dict[str, dict]) -> str:
    """A protocol's rows as Markdown."""
    lines = []
    for name, row in rows.items():
        loss = row["loss"] or dict(mean=None, n=0)
        mark = "" if not row["faults"] else " (not sound)"
        lines.append({
            "preset": name + mark, "style": row["style"], "stored": f"{row['stored']:,}",
            "without embeddings": cell(row["without_embeddings"], "{:,}"), "generated": f"{row['generated']:,}",
            "FLOPs a token": cell(row["flops_per_token"], "{:.3g}"), "ms a step": cell(row["ms_per_step"], "{:.1f}"),
            "steps": cell(row["steps"], "{:,}"), "s": cell(row["seconds"], "{:.0f}"),
            "at step 0": cell(row["start_loss"], "{:.3f}"), "loss, nats": cell(loss["mean"], "{:.4f}"),
            "bits a byte": cell(row["bits_per_byte"], "{:.4f}"), "difference": cell(row["difference"], "{:+.4f}"),
            "95 %": interval_of(row), "verdict": row["verdict"] or "-", "p": cell(row["p_holm"], "{:.2g}"),
            "n": loss["n"], "published bits": cell(row["published_bits"], "{}")})
    return markdown(lines)


def tables(results: dict) -> str:
    """All results as Markdown."""
    titles = dict(A="Protocol A: equal steps", B=f"Protocol B: {cell(results['budget'], '{:.0f}')} s of training")
    paragraphs = []
    for protocol, rows in results["protocols"].items():
        paragraphs += [f"{titles[protocol]}. Track {results['track']}, {results['device']}; p is corrected over all "
                       "presets (Holm); differences are from the baseline at equal seeds, nats", table_of(rows)]
        failed = [f"- {name}: {'; '.join(row['errors'])}" for name, row in rows.items() if row["errors"]]
        if failed:
            paragraphs.append("\n".join(["Runs without a result:", *failed]))
    paragraphs += ["The submission's claims", markdown(results["claims"])]
    return "\n\n".join(paragraphs)


def write(results: dict, evidence: Evidence, options: argparse.Namespace):
    """Judge the claims and write JSON, tables and picture."""
    results["claims"] = judge_claims(evidence)
    path = save("parameter_golf", results, options.output, tables(results))
    draw(path.with_suffix(".png"), results["protocols"])


# ---- The command ------------------------------------------------------------


def show(presets: list[Preset], options: argparse.Namespace):
    """Print what would run, and the expected time. Runs nothing."""
    # the presets
    lines = []
    shared = ["--track", options.track, *trainer_options(options.settings)]
    for preset in presets:
        arm = preset.arm(options.track)
        numbers = count_numbers(config_of(arm, shared))
        lines.append({"preset": preset.name, "arm": arm, "stored": f"{numbers['stored']:,}",
                      "generated": f"{numbers['generated']:,}"})
    say(markdown(lines))

    # the comparisons
    seeds, more_seeds = options.seeds
    arms = [preset.arm(options.track) for preset in presets]
    comparison, _ = compare_arms(arms, 1 if options.protocol == "B" else seeds, options, length_options(options.steps))
    titles = dict(A="protocol A", B="protocol A once, for the times", both="protocol A")
    show_plan(comparison, titles[options.protocol], options.jobs)
    if options.protocol != "A":
        budget = options.budget
        if not budget:
            expected, _ = comparison.expected_seconds([comparison.job(comparison.arms[0], 1)])
            budget = expected
        count = seeds * len(presets)
        expected = "a time that is not known yet"
        if budget:
            expected = f"{compare.duration(count * budget / options.jobs)} of training, {budget:.0f} s each"
        say(f"protocol B: {count} runs, {expected}")
    if more_seeds > seeds:
        say(f"then {more_seeds - seeds} seeds more of each preset within {NEAR} nats of the baseline, in each protocol")


def study(options: argparse.Namespace):
    """Run both protocols, or what was asked for of them; write and print the results."""
    settle(options)
    presets = choose_presets(options.presets)
    arms = {preset.arm(options.track): preset.name for preset in presets}
    if options.dry_run:
        show(presets, options)
        return

    # what is kept after every comparison
    baseline = config_of("baseline", ["--track", options.track, *trainer_options(options.settings)])
    evidence = Evidence({}, options.margin, unigram_loss(baseline))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device) | dict(
        track=options.track, steps=options.steps, budget=None, seeds=options.seeds, near=NEAR, margin=options.margin,
        quick=options.quick, settings=options.settings, unigram_loss=evidence.unigram, protocols=evidence.rows)

    times = {}  # arm of protocol A -> milliseconds of a step, None where no run of it is finished

    def keep(protocol: str, names: dict[str, str], outcome: dict, timed: list[dict]):
        if protocol == "A":
            times.update({arm["name"]: measure_step(arm["runs"]) for arm in timed})
        of_presets = {arms[arm]: ms for arm, ms in times.items()}
        results["device"] = outcome["environment"]["device"] or results["device"]
        evidence.rows[protocol] = rows_of(outcome, names, of_presets, options)
        write(results, evidence, options)

    # the protocols
    length = length_options(options.steps)
    if options.protocol == "B":
        timed = arms_of(*compare_arms(list(arms), 1, options, length))
        times.update({arm["name"]: measure_step(arm["runs"]) for arm in timed})
    else:
        run_protocol(list(arms), options, length, partial(keep, "A", arms))
    if options.protocol != "A":
        lines, results["budget"] = arms_in_time(times, options.steps, options.budget)
        names = {line: arms[arm] for arm, line in lines.items()}
        run_protocol(list(lines.values()), options, [], partial(keep, "B", names))
    say(f"\n{tables(results)}")


def settle(options: argparse.Namespace):
    """Settle what depends on others, and prepare the data. RunError for values outside their ranges."""
    # how much
    if options.quick:
        options.presets = options.presets or list(QUICK)
        options.seeds = options.seeds or [1]
        options.steps = options.steps or 4
    options.presets = options.presets or sorted({preset.style for preset in ALL.values()})
    options.seeds = options.seeds or [3, 6]
    require(len(options.seeds) <= 2 and 1 <= min(options.seeds) and options.seeds == sorted(options.seeds),
            f"--seeds takes one number, or two that do not fall, from 1 on; got {options.seeds}")
    options.seeds = [options.seeds[0], options.seeds[-1]]
    require(options.budget is None or options.budget > 0,
            f"--budget must be greater than 0 seconds, got {options.budget}")
    require(options.margin > 0, f"--margin must be greater than 0 nats, got {options.margin}")

    # the data, and the steps of the track
    config = compare.parse_options(["--track", options.track, *trainer_options(options.settings)])
    if options.track == "golf_cpu" and config.data == Config.data and not data_folder(config).exists():
        local_corpus.build(data_folder(config))
    find_shards(config, "train")
    options.steps = options.steps or config.steps
    check_steps(options.steps)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=[], metavar="NAME",
                        help="names of presets, or published, repaired, control for all of a style (default: all)")
    parser.add_argument("--protocol", choices=("A", "B", "both"), default="both",
                        help="A: equal steps, B: equal time (default: %(default)s)")
    parser.add_argument("--track", choices=TRACKS, default="golf_cpu", help="of the trainer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of protocol A (default: the track's)")
    parser.add_argument("--budget", type=float, help="seconds of training a run of protocol B (default: what the "
                        "baseline takes for protocol A)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N",
                        help=f"of every preset, and of those within {NEAR} nats of the baseline (default: 3 6)")
    parser.add_argument("--margin", type=float, default=MARGIN,
                        help="nats: smaller differences are equivalent (default: %(default)s)")
    add_run_options(parser)
    options = parser.parse_args(argv)
    return run_script("parameter_golf.py", lambda: study(options),
                      "stopped; finished runs are kept, call it again to go on")


if __name__ == "__main__":
    sys.exit(main())
