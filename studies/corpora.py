"""
Two corpora and their mixes: does the order of the parts hold across data?

    python -m studies.corpora                       all parts on all six corpora: hours of two cores
    python -m studies.corpora --dry-run             what is done, and how long the rest will take
    python -m studies.corpora --corpora python english --arms forgetting low_rank --seeds 3 --steps 200
    python -m studies.corpora --quick               a reduced run: proves that it runs, measures nothing

The corpora: the bytes of Python's library (--python); those of an English text, which are decoded from its GPT-2 shards
into --english-bytes where they are missing; both mixed, a quarter, half and three quarters of all rows English; and the
English text as GPT-2's tokens (--english). Bytes and mixtures are on track cpu, tokens on track english_cpu. A mixture
is a folder of data/mixed_corpus.py, whose rows the variant data_order mixes by its option take, in every arm, so that
every batch has the same share.

Each corpus has one comparison of all parts with the baseline by compare.py, over pairs of equal seeds at equal steps;
verdicts are records/statistics.py's, p values hold for all parts of a corpus together. Rates are the track's for every
arm: none is tuned, on no corpus. What is "best" of a part is what was best, or nearest to it, on Python.

The order of the parts on a corpus is that of their mean differences from the baseline, so that no unit matters. Of each
two corpora Kendall's tau and Spearman's rho say how much the orders agree: 1 the same, 0 unrelated, -1 reversed. Their
95 % intervals are percentiles of a bootstrap over seeds: a seed is drawn with all its arms on both corpora. With few
seeds such an interval is too narrow, by a factor of about sqrt(1 - 1 / n) and more. Beside a corpus itself stands how
well a draw of its seeds agrees with another draw: noise alone lets no two corpora agree better than that.

Finished runs are in ./comparisons, so that the same command goes on wherever it was stopped. The results are written
after every corpus: JSON, tables (.md) and a picture (.png) in studies/results/.
"""

import argparse
import sys
from itertools import combinations_with_replacement

from benchmarks.timing import describe, markdown  # isort: skip  before PyTorch, see there
import numpy as np
import torch
from scipy import stats

from compare import Comparison
from data import local_corpus, mixed_corpus, tokenize_text
from data.command_line import run_script
from studies import build_parser, save
from studies.comparisons import (
    add_run_options,
    cell,
    check_steps,
    choose_arms,
    compare_conditions,
    draw_differences,
    errors_of,
    length_options,
    rows_of,
    table_of,
    trainer_options,
    with_variant,
)
from train_gpt import Config, data_folder, find_shards, read_json, require, say

# short name: arm of compare.py
ARMS = dict(
    baseline="baseline",
    topological="topological_attention:preset=fast",
    forgetting="forgetting_attention",
    splanifold="splanifold_mlp:preset=dense16",
    orthogonal="orthogonal_residual",
    wave_lanes="wave_lanes:lanes=fourier,wavelet,attention",
    convolution="context_convolution",
    low_rank="low_rank",
    latent_attention="latent_attention",
    depth_recurrence="depth_recurrence",
)
# short name: rows of Python and of English in every eight; None: tokens of GPT-2
CORPORA = dict(python=(8, 0), english25=(6, 2), english50=(4, 4), english75=(2, 6), english=(0, 8), english_tokens=None)
STEPS = 300             # of a run on bytes
TOKEN_STEPS = 128       # of a run on tokens: the track's
SEEDS = 5               # the least that a verdict needs
MARGIN = 0.005          # nats: smaller differences are equivalent
DRAWS = 2000            # of the bootstrap
QUICK = dict(arms=["forgetting"], corpora=["python", "english50"], seeds=1, steps=10, token_steps=10)


# ---- The corpora ------------------------------------------------------------


def mixture_folder(options: argparse.Namespace, corpus: str) -> str:
    """Where the shards of a mixture are."""
    return f"{options.mixtures}/{corpus}"


def folder_of(options: argparse.Namespace, corpus: str) -> str:
    """The folder of a corpus' shards."""
    folders = dict(python=options.python, english=options.english_bytes, english_tokens=options.english)
    return folders.get(corpus) or mixture_folder(options, corpus)


def prepare(options: argparse.Namespace, corpus: str):
    """Make the shards of a corpus where they are missing. RunError without the English text."""
    if corpus == "english_tokens":
        find_shards(Config(data=options.english), "train")
    elif corpus == "python":
        if not data_folder(Config(data=options.python)).exists():
            say(f"making {options.python} from this Python's library")
            local_corpus.build(data_folder(Config(data=options.python)))
    elif corpus == "english":
        decode_english(options)
    else:
        prepare(options, "python")
        prepare(options, "english")
        mix(options, corpus)


def decode_english(options: argparse.Namespace):
    """Decode the English tokens into bytes, where that is not done."""
    target = data_folder(Config(data=options.english_bytes))
    if (target / "meta.json").exists():
        return
    find_shards(Config(data=options.english), "train")
    say(f"decoding {options.english} into {options.english_bytes}")
    code = tokenize_text.main([f"shards:{options.english}", "-o", str(target), "--name", "english", "--tokenizer",
                               "bytes"])
    require(code == 0, f"{options.english} was not decoded, see above; make {options.english_bytes} by "
            "data/tokenize_text.py")


def mix(options: argparse.Namespace, corpus: str):
    """Write the folder of a mixture, unless it is there with these sources and shares."""
    folder = data_folder(Config(data=mixture_folder(options, corpus)))
    sources = [options.python, options.english_bytes]
    wanted = dict(sources=sources, shares=list(CORPORA[corpus]))
    meta = folder / "meta.json"
    if meta.exists():
        made = read_json(meta, "delete it")
        if {name: made.get(name) for name in wanted} == wanted:
            return
    say(f"mixing {' and '.join(sources)} into {folder}")
    mixed_corpus.build(sources, list(CORPORA[corpus]), folder)


# ---- The comparisons --------------------------------------------------------


def arms_on(corpus: str, arms: dict[str, str]) -> dict[str, str]:
    """{arm of compare.py: its short name} on a corpus: a mixture's rows are mixed in every arm."""
    shares = CORPORA[corpus]
    if shares is None or 0 in shares:
        return {line: name for name, line in arms.items()}
    order = f"data_order:rows=shuffled,take={shares[0]},{shares[1]}"
    return {with_variant(line, order): name for name, line in arms.items()}


def command_of(options: argparse.Namespace, corpus: str, arms: dict[str, str]) -> list[str]:
    """The command line of compare.py for a corpus."""
    tokens = CORPORA[corpus] is None
    track = "english_cpu" if tokens else "cpu"
    steps = options.token_steps if tokens else options.steps
    return [*arms_on(corpus, arms), "--track", track, "--seeds", str(options.seeds), "--jobs", str(options.jobs),
            "--margin", str(options.margin), "--anyway", "--", "--data", folder_of(options, corpus),
            *trainer_options(options.settings), *length_options(steps)]


# ---- The order of the parts -------------------------------------------------


def differences_of(rows: dict[str, dict]) -> dict[str, dict[int, float]]:
    """{arm: {seed: its loss minus the baseline's}} of a corpus, arms without a pair left out."""
    losses = {name: dict(map(tuple, row["losses"])) for name, row in rows.items()}
    baseline = losses.pop("baseline", {})
    paired = {name: {seed: loss - baseline[seed] for seed, loss in of_seeds.items() if seed in baseline}
              for name, of_seeds in losses.items()}
    return {name: pairs for name, pairs in paired.items() if pairs}


def correlate_ranks(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Kendall's tau-b and Spearman's rho, each (...), of values x and y (..., n) over their last axis; NaN where all
    values of one are equal.
    """
    first, second = np.triu_indices(x.shape[-1], 1)
    signs = [np.sign(values[..., first] - values[..., second]) for values in (x, y)]
    ranks = [stats.rankdata(values, axis=-1) for values in (x, y)]
    centred = [values - values.mean(-1, keepdims=True) for values in ranks]
    with np.errstate(invalid="ignore"):
        tau, rho = ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1)) for a, b in (signs, centred))
    return tau, rho


def compare_orders(one: dict[str, dict[int, float]], other: dict[str, dict[int, float]], same: bool) -> dict | None:
    """
    How much the orders of the arms on two corpora agree: dict(arms, seeds, tau, tau_low, tau_high, rho, rho_low,
    rho_high) over the arms and seeds that both have; None for fewer than three arms. Intervals are None for fewer than
    three seeds. same: the two are one corpus, and each draw of its seeds is compared with a second draw; tau and rho
    are then the draws' medians.
    """
    # what both have
    arms = [name for name in one if name in other]
    seeds = sorted(set.intersection(*(set(corpus[name]) for corpus in (one, other) for name in arms))) if arms else []
    if len(arms) < 3 or not seeds or same and len(seeds) < 3:
        return None
    x, y = (np.array([[corpus[name][seed] for name in arms] for seed in seeds]) for corpus in (one, other))
    result = dict(arms=len(arms), seeds=len(seeds))

    # all seeds, and draws of them
    tau, rho = (float(value) for value in correlate_ranks(x.mean(0), y.mean(0)))
    low = high = [None, None]
    if len(seeds) >= 3:
        random = np.random.default_rng(0)
        chosen = random.integers(len(seeds), size=(DRAWS, len(seeds)))
        others = random.integers(len(seeds), size=chosen.shape) if same else chosen
        draws = correlate_ranks(x[chosen].mean(1), y[others].mean(1))
        low, middle, high = np.nanpercentile(draws, (2.5, 50, 97.5), axis=1).tolist()
        if same:
            tau, rho = middle
    return result | dict(tau=tau, tau_low=low[0], tau_high=high[0], rho=rho, rho_low=low[1], rho_high=high[1])


def orders_of(corpora: dict[str, dict[str, dict]]) -> list[dict]:
    """compare_orders of each two corpora and of each with itself, with first and second, their names."""
    differences = {corpus: differences_of(rows) for corpus, rows in corpora.items()}
    orders = []
    for first, second in combinations_with_replacement(differences, 2):
        order = compare_orders(differences[first], differences[second], first == second)
        if order:
            orders.append(dict(first=first, second=second) | order)
    return orders


def word_of(order: dict) -> str:
    """Whether two orders agree, by the interval of tau."""
    if order["tau_low"] is None:
        return "too few seeds"
    if order["tau_low"] > 0:
        return "alike"
    return "reversed" if order["tau_high"] < 0 else "undecided"


# ---- Results ----------------------------------------------------------------


def table_of_orders(orders: list[dict]) -> str:
    lines = []
    for order in orders:
        line = {"corpus": order["first"], "and": order["second"], "arms": order["arms"], "seeds": order["seeds"]}
        for name, title in (("tau", "Kendall's tau"), ("rho", "Spearman's rho")):
            low, high = (cell(order[f"{name}_{end}"], "{:+.2f}") for end in ("low", "high"))
            line |= {title: f"{order[name]:+.2f}", f"{name}, 95 %": f"{low} to {high}"}
        lines.append(line | {"orders": "itself" if order["first"] == order["second"] else word_of(order)})
    return markdown(lines)


def tables(results: dict) -> str:
    """All results as Markdown."""
    paragraphs = ["A quick run, which measures nothing."] if results["quick"] else []
    paragraphs += [f"Differences from the baseline at equal steps and seeds, nats a token; {results['device']}",
                   table_of(results["corpora"], "corpus"), errors_of(results["corpora"])]
    if results["orders"]:
        paragraphs += ["The order of the parts on each two corpora", table_of_orders(results["orders"])]
    return "\n\n".join(filter(None, paragraphs))


def study(options: argparse.Namespace):
    """Run the comparisons of the corpora that were asked for; write and print the results."""
    settle(options)
    arms = choose_arms(ARMS, options.arms)
    for corpus in options.corpora:
        prepare(options, corpus)
    commands = {corpus: command_of(options, corpus, arms) for corpus in options.corpora}

    # what is kept after every comparison
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device) | dict(
        quick=options.quick, settings=options.settings, seeds=options.seeds, steps=options.steps,
        token_steps=options.token_steps, margin=options.margin, corpora={}, orders=[])

    def keep(corpus: str, comparison: Comparison, outcome: dict):
        results["device"] = outcome["environment"]["device"] or results["device"]
        results["corpora"][corpus] = rows_of(outcome, arms_on(corpus, arms))
        results["orders"] = orders_of(results["corpora"])
        path = save("corpora", results, options.output, tables(results))
        draw_differences(path.with_suffix(".png"), results["corpora"], "difference from the baseline, nats a token")

    compare_conditions(commands, options, keep)
    if not options.dry_run:
        say(f"\n{tables(results)}")


def settle(options: argparse.Namespace):
    """Settle what depends on --quick. RunError for values outside their ranges."""
    defaults = dict(arms=[], corpora=list(CORPORA), seeds=SEEDS, steps=STEPS, token_steps=TOKEN_STEPS)
    for name, value in (QUICK if options.quick else defaults).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for word in options.corpora:
        require(word in CORPORA, f"there is no corpus {word!r:.60}; choose from {', '.join(CORPORA)}")
    options.corpora = [corpus for corpus in CORPORA if corpus in options.corpora]
    check_steps(options.steps)
    check_steps(options.token_steps)
    require(options.margin > 0, f"--margin must be greater than 0 nats, got {options.margin}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--corpora", nargs="+", metavar="NAME", help=f"of {', '.join(CORPORA)} (default: all)")
    parser.add_argument("--arms", nargs="+", metavar="NAME",
                        help=f"beside the baseline, of {', '.join(list(ARMS)[1:])} (default: all)")
    parser.add_argument("--seeds", type=int, help=f"of every arm (default: {SEEDS}, the least for a verdict)")
    parser.add_argument("--steps", type=int, help=f"of a run on bytes (default: {STEPS})")
    parser.add_argument("--token-steps", type=int, help=f"of a run on tokens (default: {TOKEN_STEPS}, the track's)")
    parser.add_argument("--margin", type=float, default=MARGIN,
                        help="nats: smaller differences are equivalent (default: %(default)s)")
    parser.add_argument("--python", default="data/python_bytes", help="folder of shards (default: %(default)s)")
    parser.add_argument("--english", default="data/english", help="folder of GPT-2 shards (default: %(default)s)")
    parser.add_argument("--english-bytes", default="data/english_bytes",
                        help="folder of the same as bytes, made where it is missing (default: %(default)s)")
    parser.add_argument("--mixtures", default="data/mixtures", help="folder of the mixtures (default: %(default)s)")
    add_run_options(parser)
    options = parser.parse_args(argv)
    return run_script("corpora.py", lambda: study(options),
                      "stopped; finished runs are kept, call it again to go on")


if __name__ == "__main__":
    sys.exit(main())
