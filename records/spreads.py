"""
What a comparison can find before it has run: by how much the differences of equal seeds spread in earlier ones.
"""

import math
import statistics
from pathlib import Path

from records.fields import RESULTS, STATS, read_fields
from records.sequential import looks_until
from records.statistics import PAIRS, POWER, detectable_by_pairs
from train_gpt import RunError

RECORDS = Path(__file__).resolve().parent
LEAST = 3       # pairs that a standard deviation is taken from


def find_spreads(track: str, comparisons: Path) -> tuple[list[float], str]:
    """
    (the standard deviation of the paired differences of each arm that was compared on a track, where they are from):
    the comparisons in a folder or, where there are none, the records. Folders that cannot be read are passed over.
    """
    spreads = []
    for path in sorted(comparisons.glob("*/results.json")):
        try:
            results = read_fields(path, "", RESULTS)
        except RunError:
            continue
        if results["settings"].get("track") == track:
            spreads += spreads_of(results["arms"], losses_in_results)
    if spreads:
        return spreads, f"the earlier ones in {comparisons}"
    for path in sorted(RECORDS.glob("*/*/stats.json")):
        try:
            stats = read_fields(path, "", STATS)
        except RunError:
            continue
        if stats["track"] == track:
            spreads += spreads_of(stats["arms"], losses_in_stats)
    return spreads, "the records"


def losses_in_results(arm: dict) -> dict[int, float]:
    """{seed: final loss} of an arm in results.json."""
    return {run["seed"]: run["val_loss"] for run in arm["runs"] if run.get("val_loss") is not None}


def losses_in_stats(arm: dict) -> dict[int, float]:
    """{seed: final loss} of an arm in stats.json."""
    return dict(zip(arm["seeds"], arm["losses"]))


def spreads_of(arms: list[dict], losses_of) -> list[float]:
    """The standard deviation of each arm's differences from the first, where there are pairs enough and they differ."""
    baseline = losses_of(arms[0]) if arms else {}
    spreads = []
    for arm in arms[1:]:
        differences = [loss - baseline[seed] for seed, loss in losses_of(arm).items() if seed in baseline]
        if len(differences) >= LEAST:
            spreads.append(statistics.stdev(differences))
    return [spread for spread in spreads if spread > 0 and math.isfinite(spread)]


def describe_power(track: str, plan: dict, compared: int, comparisons: Path) -> list[str]:
    """
    Lines that say which differences a plan can find, by the spread of earlier comparisons of the track. compared: the
    number of arms beside the baseline.
    """
    n = plan["seeds"]
    if n < PAIRS:
        return [f"it can find nothing: {n} pairs are too few for a verdict, {PAIRS} are needed; raise --seeds"]
    spreads, origin = find_spreads(track, comparisons)
    if not spreads:
        return [f"what it can find is not known: nothing was compared on track {track} yet"]
    alpha = plan["alpha"] / max(compared, 1)
    quartiles = statistics.quantiles(spreads, n=4, method="inclusive") if len(spreads) > 1 else spreads * 3
    low, usual, high = (f"{detectable_by_pairs(spread, n, alpha, POWER):.4f}" for spread in quartiles)
    lines = [f"{n} pairs find a difference of {usual} nats in four of five cases, {low} where pairs are alike and "
             f"{high} where they are not (quartiles of {len(spreads)} comparisons on track {track}, {origin})"]
    if plan["until_decided"]:
        first = looks_until(n)[0]
        large = detectable_by_pairs(quartiles[1], first, alpha, POWER)
        lines.append(f"a difference of {large:.4f} or more is mostly found at the first look, after {first} pairs")
    return lines
