"""
A depth ladder: residual parts at 4, 12, 24 and 48 thin layers of equal parameters, where they claim their gain.

    python -m studies.depth_ladder                  all arms at all depths: hours of two cores
    python -m studies.depth_ladder --dry-run        the widths, what is done, and how long the rest will take
    python -m studies.depth_ladder --depths 4 24 --arms tied split --seeds 3 --steps 200 --sweep 1,2
    python -m studies.depth_ladder --quick          a reduced run: proves that it runs, measures nothing

Every depth has the parameters in blocks of track cpu's four layers within 2 %: the width is the multiple of 8 nearest
to sqrt(parameters / (12 layers)), the feed-forward takes up what the width misses, and the count is the model's own, on
PyTorch's meta device. Heads are as wide as is nearest to 32 channels. Everything else is track cpu's.

Each depth has one comparison of all arms with the baseline of that depth by compare.py, over pairs of equal seeds at
equal steps. Every arm first tries the learning rates times each factor of --sweep, on other seeds than the reported
ones, and keeps the best. The largest stable factor of an arm is the largest of these whose run ended within 0.1 nats of
the arm's best one. Spikes are counted in the training losses of a run's JSON: a loss that is above the median of the
ten before it by more than 0.3 nats; neighbours count once. The part stream_statistics, which is in every arm, notes the
norm of the stream at every residual; the slope of its logarithm over the residuals is a least-squares fit.

The claims, by the rules that were set before:
S2  splanifold feed-forwards work in a deep stack: no run fails, and from 12 layers on the difference from the baseline
    does not grow by more than 0.005 nats.
L1  the split of the residual is worth something: split_published against tied_published, whose gains have the same
    initial distribution without a split; better at p < 0.01 confirms, no lower mean refutes.
L2  the split balances norms: its slope is at most 0.8 times that of the baseline and of both tied controls.
L3  it is more stable: its largest stable factor is at least twice the baseline's at 24 layers and more.

Finished runs are in ./comparisons, so that the same command goes on wherever it was stopped. The results are written
after every depth: JSON, tables (.md) and a picture (.png) in studies/results/.
"""

import argparse
import math
import sys
from functools import cache

from benchmarks.timing import describe, markdown  # isort: skip  before PyTorch, see there
import numpy as np
import torch

import compare
from compare import Comparison
from data import local_corpus
from data.command_line import run_script
from records.statistics import ALPHA, PAIRS, test_pairs
from studies import build_parser, save
from studies.comparisons import (
    add_run_options,
    cell,
    check_steps,
    choose_arms,
    compare_conditions,
    draw_differences,
    errors_of,
    interval_of,
    length_options,
    rows_of,
    table_of,
    trainer_options,
    with_variant,
)
from train_gpt import GPT, TRACKS, Config, count_parameters, data_folder, make_config, require, say

RESIDUAL = "orthogonal_residual:form="
# short name: arm of compare.py
ARMS = dict(
    baseline="baseline",
    tied=f"{RESIDUAL}layerscale",
    tied_channel=f"{RESIDUAL}layerscale,gates=channel",
    tied_published=f"{RESIDUAL}layerscale,gates=channel,init=published",
    orthogonal=f"{RESIDUAL}orthogonal",
    orthogonal_scaled=f"{RESIDUAL}orthogonal_scaled",
    split=f"{RESIDUAL}split",
    split_channel=f"{RESIDUAL}split,gates=channel",
    split_published=f"{RESIDUAL}split,gates=channel,init=published",
    angle=f"{RESIDUAL}angle",
    stream_scale=f"{RESIDUAL}stream_scale",
    parallel="parallel_residual",
    routed_skips="routed_skips",
    splanifold="splanifold_mlp:preset=dense16",
)
SPLITS = ("split", "split_channel", "split_published")
TIED = ("baseline", "tied", "tied_channel", "tied_published")
STATISTICS = "stream_statistics"

TRACK = "cpu"
DEPTHS = (4, 12, 24, 48)
WIDTH_STEP = 8          # widths are multiples of it: halves of a width are heads with rotary positions
HEAD_DIM = 32           # channels of a head, or as near to that as the width allows
TOLERANCE = 0.02        # of the parameters in blocks

STEPS = 300
SEEDS = 5               # the least that a verdict needs
FACTORS = "1,2,4,8"       # of all learning rates
MARGIN = 0.004          # nats: smaller differences are equivalent; 0.5 % of track cpu's target
POINTS = 6              # validations of a run beside that of its start
STABLE = 0.1            # nats: a rate is stable if its run ends so near to the arm's best
SPIKE = 0.3             # nats above the median of the losses before
BEFORE = 10             # losses of that median
GROWTH = 0.005          # nats by which a difference may grow with depth (S2)
BALANCED = 0.8          # of a control's slope (L2)
DEEP = 24               # layers from which L3 counts
QUICK = dict(arms=["split"], depths=[4, 12], seeds=1, steps=10, sweep="")


# ---- Equal parameters -------------------------------------------------------


def count_blocks(**sizes: int) -> int:
    """The parameters of a baseline of track cpu with these sizes but for embeddings and head, on the meta device."""
    config = make_config(dict(track=TRACK, vocab_size=257) | sizes)
    with torch.device("meta"):
        return count_parameters(GPT(config))[1]


def choose_head(width: int) -> int:
    """The width of a head: a multiple of 4, of which the width is a multiple, nearest to HEAD_DIM."""
    fitting = [channels for channels in range(4, width + 1, 4) if width % channels == 0]
    return min(fitting, key=lambda channels: abs(channels - HEAD_DIM))


@cache
def sizes_of(layers: int) -> dict[str, int]:
    """
    dict(layers, model_dim, heads, head_dim, mlp_hidden) of the model of so many layers. RunError where no width has the
    parameters of the track's own model.
    """
    # the width, and the feed-forward by the difference that one more hidden channel makes
    target = count_blocks()
    width = max(WIDTH_STEP, WIDTH_STEP * round(math.sqrt(target / (12 * layers)) / WIDTH_STEP))
    head = choose_head(width)
    sizes = dict(layers=layers, model_dim=width, heads=width // head, head_dim=head)
    one, two = (count_blocks(**sizes, mlp_hidden=hidden) for hidden in (1, 2))
    sizes["mlp_hidden"] = max(1, 1 + round((target - one) / (two - one)))

    # as many?
    count = count_blocks(**sizes)
    require(abs(count / target - 1) <= TOLERANCE,
            f"{layers} layers of width {width} have {count:,} parameters in blocks, wanted {target:,} within "
            f"{TOLERANCE:.0%}; give other --depths")
    return sizes


# ---- The comparisons --------------------------------------------------------


def arms_at(arms: dict[str, str]) -> dict[str, str]:
    """{arm of compare.py: its short name}: every arm notes its stream."""
    return {with_variant(line, STATISTICS): name for name, line in arms.items()}


def title_of(layers: int) -> str:
    return f"{layers} layers"


def command_of(options: argparse.Namespace, layers: int, arms: dict[str, str]) -> list[str]:
    """The command line of compare.py for a depth."""
    sweep = ["--sweep", options.sweep] if options.sweep else []
    sizes = [word for name, value in sizes_of(layers).items() for word in (f"--{name}", str(value))]
    return [*arms_at(arms), "--track", TRACK, "--seeds", str(options.seeds), "--jobs", str(options.jobs), "--margin",
            str(options.margin), *sweep, "--anyway", "--", *sizes, *trainer_options(options.settings),
            *length_options(options.steps, max(1, options.steps // POINTS))]


# ---- What the logs say beside losses ----------------------------------------


def count_spikes(losses: list[float]) -> int:
    """How often a loss is above the median of the BEFORE losses before it by more than SPIKE; neighbours count once."""
    losses = np.asarray(losses, dtype=float)
    if len(losses) <= BEFORE:
        return 0
    medians = np.median(np.lib.stride_tricks.sliding_window_view(losses, BEFORE)[:-1], axis=1)
    high = losses[BEFORE:] > medians + SPIKE
    return int(high[0]) + int((high[1:] & ~high[:-1]).sum())


def slope_of(stream: list[dict]) -> float:
    """The least-squares slope of log |x| over a model's residuals, as stream_statistics lists them, by depth."""
    logarithms = np.log([row["x_norm"] for row in stream])
    return float(np.polyfit(np.arange(len(logarithms)), logarithms, 1)[0])


def largest_stable(sweep: dict | None) -> float | None:
    """The largest factor whose runs ended within STABLE nats of the best one's; None without a sweep."""
    if sweep is None:
        return None
    means = {}  # of the factors with which no run failed
    for attempt in sweep["tries"]:
        if None not in attempt["losses"]:
            means[attempt["factor"]] = float(np.mean(attempt["losses"]))
    return max((factor for factor, loss in means.items() if loss <= min(means.values()) + STABLE), default=None)


def read_logs(comparison: Comparison, results: dict) -> dict[str, dict]:
    """
    {arm of compare.py: dict(spikes, slopes, stable, last)}, of its reported runs [[seed, number], ...], of the sweep
    the largest stable factor, and whether it is the sweep's last.
    """
    sweep = results["settings"].get("sweep")
    common = comparison.time_options(None)
    notes = {}
    for arm, jobs in zip(comparison.arms, comparison.reported(common, sweep)):
        tries = sweep and sweep[arm.name]
        stable = largest_stable(tries)
        row = dict(spikes=[], slopes=[], stable=stable, last=bool(tries) and stable == max(comparison.plan["sweep"]))
        for job in jobs:
            facts = compare.json_facts(comparison.logs / f"{job.name}.txt")
            if facts.get("status") == "finished":
                row["spikes"].append([job.seed, count_spikes([loss for _, loss in facts.get("train_curve", [])])])
                stream = facts["curve"][-1].get("stream") if facts.get("curve") else None
                if stream:
                    row["slopes"].append([job.seed, slope_of(stream)])
        notes[arm.name] = row
    return notes


# ---- Claims -----------------------------------------------------------------


def judge(depths: dict[int, dict[str, dict]]) -> list[dict]:
    """The claims' lines [dict(claim, where, measured, verdict)]; depths: {layers: rows}."""
    lines = judge_s2(depths)
    for layers, rows in depths.items():
        lines += [judge_l1(layers, rows), *judge_l2(layers, rows), *judge_l3(layers, rows)]
    return [line for line in lines if line]


def pair(one: list[list], other: list[list], factor: float = 1.0) -> list[list]:
    """
    [[seed, one's number minus `factor` times the other's], ...] of the seeds that both, [[seed, number], ...], have.
    """
    others = dict(map(tuple, other))
    return [[seed, number - factor * others[seed]] for seed, number in one if seed in others]


def test_seeds(pairs: list[list]) -> dict | None:
    """The t test of [[seed, difference], ...]; None of none."""
    return test_pairs([difference for _, difference in pairs]) if pairs else None


def judge_s2(depths: dict[int, dict[str, dict]]) -> list[dict]:
    """From 12 layers on: no run of splanifold fails, and its difference grows by no more than GROWTH."""
    gaps = {layers: pair(rows["splanifold"]["losses"], rows["baseline"]["losses"])
            for layers, rows in depths.items() if layers >= 12 and "splanifold" in rows}
    lines = []
    first = min(gaps, default=None)
    for layers in sorted(gaps)[1:]:
        errors = depths[layers]["splanifold"]["errors"]
        growth = test_seeds(pair(gaps[layers], gaps[first]))
        if errors or growth is None:
            measured = errors[0] if errors else "no pair"
            lines.append(dict(claim="S2", where=title_of(layers), measured=measured,
                              verdict="refuted" if errors else "not run"))
            continue
        lines.append(dict(claim="S2", where=f"{layers} against {first} layers", measured="the difference grows by "
                          f"{growth['difference']:+.4f} ({interval_of(growth)})", verdict=is_below(growth, GROWTH)))
    return lines


def is_below(test: dict, limit: float) -> str:
    """confirmed, refuted or undecided: is the true difference below the limit, by the 95 % interval?"""
    if test["low"] is None:
        return "too few seeds"
    if test["high"] <= limit:
        return "confirmed"
    return "refuted" if test["low"] > limit else "undecided"


def judge_l1(layers: int, rows: dict[str, dict]) -> dict | None:
    """Is the split better than tied gains of the same initial distribution?"""
    if not {"split_published", "tied_published"} <= set(rows):
        return None
    test = test_seeds(pair(rows["split_published"]["losses"], rows["tied_published"]["losses"]))
    if test is None:
        return dict(claim="L1", where=title_of(layers), measured="no pair", verdict="not run")
    verdict = "undecided"
    if test["n"] < PAIRS:
        verdict = "too few seeds"
    elif test["difference"] >= 0:
        verdict = "refuted"
    elif test["p_less"] < ALPHA:
        verdict = "confirmed"
    measured = f"split minus tied {test['difference']:+.4f} ({interval_of(test)}), p {cell(test['p_less'], '{:.2g}')}"
    return dict(claim="L1", where=title_of(layers), measured=measured, verdict=verdict)


def judge_l2(layers: int, rows: dict[str, dict]) -> list[dict]:
    """Is a split's slope of log norms at most BALANCED times that of every control?"""
    lines = []
    for name in SPLITS:
        for control in TIED:
            if not {name, control} <= set(rows):
                continue
            test = test_seeds(pair(rows[name]["slopes"], rows[control]["slopes"], BALANCED))
            if test:
                measured = (f"{name}: slope minus {BALANCED} times that of {control} {test['difference']:+.4f} "
                            f"({interval_of(test)})")
                lines.append(dict(claim="L2", where=title_of(layers), measured=measured, verdict=is_below(test, 0.0)))
    return lines


def judge_l3(layers: int, rows: dict[str, dict]) -> list[dict]:
    """From DEEP layers on: is a split's largest stable factor at least twice the baseline's?"""
    base = rows["baseline"]
    lines = []
    for name in SPLITS:
        if layers < DEEP or name not in rows or base["stable"] is None or rows[name]["stable"] is None:
            continue
        stable = rows[name]["stable"]
        verdict = "confirmed" if stable >= 2 * base["stable"] else "refuted"
        if verdict == "refuted" and rows[name]["last"]:
            verdict = "undecided"  # a larger factor was not tried
        measured = f"{name}: stable to x {stable:g}, baseline to x {base['stable']:g}"
        lines.append(dict(claim="L3", where=title_of(layers), measured=measured, verdict=verdict))
    return lines


# ---- Results ----------------------------------------------------------------


def mean_of_seeds(pairs: list[list]) -> float | None:
    return float(np.mean([number for _, number in pairs])) if pairs else None


def table_of_logs(depths: dict[int, dict[str, dict]]) -> str:
    """Rates, spikes and slopes as Markdown."""
    lines = []
    for layers, rows in depths.items():
        for name, row in rows.items():
            chosen = row["sweep"] and row["sweep"]["chosen"]
            beyond = " or more" if row["last"] else ""
            lines.append({
                "depth": title_of(layers), "arm": name, "best rate": cell(chosen, "x {:g}"),
                "largest stable": cell(row["stable"], "x {:g}") + beyond,
                "spikes a run": cell(mean_of_seeds(row["spikes"]), "{:.1f}"),
                "slope of log norms": cell(mean_of_seeds(row["slopes"]), "{:+.4f}")})
    return markdown(lines)


def tables(results: dict) -> str:
    """All results as Markdown."""
    depths = results["depths"]
    titled = {title_of(layers): rows for layers, rows in depths.items()}
    paragraphs = ["A quick run, which measures nothing."] if results["quick"] else []
    paragraphs += [f"Differences from the baseline of the depth at equal steps and seeds, nats a token; "
                   f"{results['device']}", table_of(titled, "depth"), errors_of(titled), table_of_logs(depths)]
    if results["claims"]:
        paragraphs += ["Claims", markdown(results["claims"])]
    return "\n\n".join(filter(None, paragraphs))


def show_sizes(depths: list[int]):
    """Print the sizes of each depth's model."""
    lines = []
    for layers in depths:
        sizes = sizes_of(layers)
        lines.append({name: f"{value:,}" for name, value in sizes.items()} | {
            "in blocks": f"{count_blocks(**sizes):,}"})
    say(markdown(lines))


def study(options: argparse.Namespace):
    """Run the comparisons of the depths that were asked for; write and print the results."""
    settle(options)
    arms = choose_arms(ARMS, options.arms)
    titles = {title_of(layers): layers for layers in options.depths}
    commands = {title: command_of(options, layers, arms) for title, layers in titles.items()}
    show_sizes(options.depths)

    # what is kept after every comparison
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device) | dict(
        quick=options.quick, settings=options.settings, seeds=options.seeds, steps=options.steps, sweep=options.sweep,
        margin=options.margin, sizes={layers: sizes_of(layers) for layers in options.depths}, depths={}, claims=[])

    def keep(title: str, comparison: Comparison, outcome: dict):
        results["device"] = outcome["environment"]["device"] or results["device"]
        notes = read_logs(comparison, outcome)
        rows = rows_of(outcome, arms_at(arms))
        results["depths"][titles[title]] = {name: row | notes[row["arm"]] for name, row in rows.items()}
        results["claims"] = judge(results["depths"])
        path = save("depth_ladder", results, options.output, tables(results))
        titled = {title_of(layers): kept for layers, kept in results["depths"].items()}
        draw_differences(path.with_suffix(".png"), titled, "difference from the baseline of the depth, nats a token")

    compare_conditions(commands, options, keep)
    if not options.dry_run:
        say(f"\n{tables(results)}")


def settle(options: argparse.Namespace):
    """Settle what depends on --quick, and make the corpus. RunError for values outside their ranges."""
    defaults = dict(arms=[], depths=list(DEPTHS), seeds=SEEDS, steps=STEPS, sweep=FACTORS)
    for name, value in (QUICK if options.quick else defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    require(all(1 <= layers <= 1024 for layers in options.depths),
            f"--depths are numbers of layers from 1 to 1,024, got {options.depths}")
    options.depths = sorted(set(options.depths))
    check_steps(options.steps)
    require(options.margin > 0, f"--margin must be greater than 0 nats, got {options.margin}")
    folder = data_folder(Config(**TRACKS[TRACK]))
    if "--data" not in options.settings and not folder.exists():
        local_corpus.build(folder)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--depths", nargs="+", type=int, metavar="LAYERS",
                        help=f"(default: {' '.join(map(str, DEPTHS))})")
    parser.add_argument("--arms", nargs="+", metavar="NAME",
                        help=f"beside the baseline, of {', '.join(list(ARMS)[1:])} (default: all)")
    parser.add_argument("--seeds", type=int, help=f"of every arm (default: {SEEDS}, the least for a verdict)")
    parser.add_argument("--steps", type=int, help=f"of a run (default: {STEPS})")
    parser.add_argument("--sweep", metavar="FACTORS",
                        help=f"of the learning rates that every arm tries; empty: none (default: {FACTORS})")
    parser.add_argument("--margin", type=float, default=MARGIN,
                        help="nats: smaller differences are equivalent (default: %(default)s)")
    add_run_options(parser)
    options = parser.parse_args(argv)
    return run_script("depth_ladder.py", lambda: study(options),
                      "stopped; finished runs are kept, call it again to go on")


if __name__ == "__main__":
    sys.exit(main())
