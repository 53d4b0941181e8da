"""
Comparisons that stop when they are decided: the looks of a group-sequential design on paired t tests, its thresholds,
and what a look says. Pure functions of numbers; lower is better.

Looking at a difference again and again finds one where there is none, unless the thresholds allow for it. Here a design
fixes the looks and the error beforehand. Of its error alpha the share n / n_max may be spent up to the look at n pairs
(alpha spending, linear). At each look the p value of the paired t test is compared with that look's level. The levels
follow from the joint distribution of the t values of all looks, which is simulated: t values do not depend on the
standard deviation, so that one simulation serves every comparison. Equivalence is tested at the same looks, with
spending of its own. A comparison also ends, undecided, when a verdict within n_max pairs has become unlikely; this can
only lower the probability of a false verdict.

Linear spending was chosen by simulation (400,000 null paths, alpha 0.01, looks after 4 to 24 pairs; 60,000 paths an
effect). Pairs on average and, after the stroke, power, for true effects in standard deviations of a difference, without
equivalence and without the rule for unlikely verdicts; HSD: Hwang, Shih and De Cani, KD: Kim and DeMets:

    spending        0.4          0.8          1.2          1.6          2.4          3.0
    HSD 2        23.1 / 0.11  19.0 / 0.66  13.0 / 0.98   9.5 / 1.00   6.7 / 1.00   5.7 / 1.00     near Pocock's
    HSD 1        23.1 / 0.13  18.8 / 0.71  13.0 / 0.99   9.7 / 1.00   6.9 / 1.00   5.9 / 1.00
    linear       23.1 / 0.15  18.8 / 0.75  13.1 / 0.99   9.9 / 1.00   7.2 / 1.00   6.2 / 1.00     HSD 0, KD 1
    KD 1.5       23.1 / 0.17  18.7 / 0.79  13.2 / 0.99  10.2 / 1.00   7.6 / 1.00   6.6 / 1.00
    HSD -1       23.2 / 0.17  18.9 / 0.79  13.3 / 0.99  10.3 / 1.00   7.6 / 1.00   6.5 / 1.00
    HSD -4       23.4 / 0.20  19.6 / 0.83  14.5 / 1.00  11.6 / 1.00   8.9 / 1.00   7.8 / 1.00     near O'Brien-Fleming's

Without a difference the rule for unlikely verdicts at 10 % ends linear spending after 9.9 pairs where equivalence is
not asked for, and after 13.8 where the margin is 3 standard errors of 24 pairs (HSD -1: 10.4 and 15.0); at an effect of
0.8 it costs 0.02 of the power.

Sources: Lan and DeMets 1983 (spending); Jennison and Turnbull 2000, chapters 7 and 11 (t tests by their significance
levels, repeated intervals); Schuirmann 1987 (two one-sided tests); Spiegelhalter, Freedman and Blackburn 1986 (the
predictive probability of a verdict).
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import stats

from records.statistics import LEVEL, test_pairs

LOOKS = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)     # pairs; further ones grow by a quarter
UNLIKELY = 0.1      # a verdict is not waited for if its predictive probability is lower
PATHS = 200_000     # simulated, of each design
SEED = 20_261_201
# The true effects, in standard deviations of a difference, that simulated paths are drawn under: paths that cross a
# strict threshold are many then, and each is weighed by how probable it is without an effect.
EFFECTS = (0.0, 0.3, 0.6, 1.2, 2.4, 4.8, 9.6, 19.2, 38.4)


def looks_until(most: int) -> list[int]:
    """The looks of a design with at most so many pairs: those of LOOKS below it, and it. ValueError below the first."""
    if most < LOOKS[0]:
        raise ValueError(f"a design needs at least {LOOKS[0]} pairs, got {most}")
    looks = list(LOOKS)
    while looks[-1] < most:
        looks.append(looks[-1] + looks[-1] // 4)
    return [n for n in looks if n < most] + [most]


def make_design(most: int, alpha: float, equivalence: bool) -> dict:
    """
    The design of a comparison of at most so many pairs at a two-sided alpha, ready for JSON:

    looks                   pairs at each look
    levels                  a two-sided p value of the paired t test at or below the look's level is a difference
    levels_equivalence      both one-sided p values at or below this level are equivalence; None if it is not asked for
    levels_interval         the level of the look's repeated interval, which covers with probability LEVEL at all looks
    """
    looks = looks_until(most)
    shares = [n / most for n in looks]

    def levels(error, sides):
        return list(spend(tuple(looks), tuple(error * share for share in shares), sides))
    return dict(looks=looks, levels=levels(alpha, 2), levels_equivalence=levels(alpha, 1) if equivalence else None,
                levels_interval=levels(1 - LEVEL, 2))


@cache
def spend(looks: tuple[int, ...], errors: tuple[float, ...], sides: int) -> tuple[float, ...]:
    """
    The level of each look for p values with one or two sides, so that without an effect the probability that this look
    or one before it has a p value at or below its level is the look's number in errors.
    """
    t, weights = simulate(looks, sides)
    alive = np.ones(len(t), dtype=bool)     # the paths that have not crossed before
    spent = 0.0
    levels = []
    for k, n in enumerate(looks):
        # the largest t values that together weigh what may be spent here
        due = errors[k] - spent
        paths = np.flatnonzero(alive)
        order = paths[np.argsort(-t[paths, k])]
        heights = np.cumsum(weights[order, k]) / len(t)
        count = int(np.searchsorted(heights, due))
        threshold = t[order[min(count, len(order) - 1)], k]
        levels.append(float(sides * stats.t.sf(threshold, n - 1)))

        crossing = alive & (t[:, k] > threshold)
        spent += float(weights[crossing, k].sum()) / len(t)
        alive &= ~crossing
    return tuple(levels)


@cache
def simulate(looks: tuple[int, ...], sides: int) -> tuple[np.ndarray, np.ndarray]:
    """
    (t values, weights), each (paths, looks) float64: of paths of normal differences, whose mean is one of EFFECTS, and
    how much more probable a path's t values up to a look are without an effect than under the mixture of EFFECTS. With
    two sides the t values are absolute ones.
    """
    rng = np.random.default_rng(SEED)
    effects = np.resize(EFFECTS, PATHS)
    n = np.array(looks)
    totals = np.empty((PATHS, len(looks)))
    squares = np.empty((PATHS, len(looks)))

    # in slices of paths, which bound the memory
    for start in range(0, PATHS, 20_000):
        rows = slice(start, start + 20_000)
        x = rng.standard_normal((len(effects[rows]), looks[-1])) + effects[rows, None]
        totals[rows] = np.cumsum(x, axis=1)[:, n - 1]
        squares[rows] = np.cumsum(np.square(x), axis=1)[:, n - 1]
    spread = np.sqrt((squares - np.square(totals) / n) / (n - 1))
    t = totals / np.sqrt(n) / spread
    weights = np.exp(-np.stack([log_likelihood_ratio(t[:, k], looks[k], sides) for k in range(len(looks))], axis=1))
    return (np.abs(t), weights) if sides == 2 else (t, weights)


def log_likelihood_ratio(t: np.ndarray, n: int, sides: int) -> np.ndarray:
    """
    The logarithm of how much more probable t values of n pairs (any shape) are under the mixture of EFFECTS than
    without an effect; with two sides each effect is there with both signs.

    The t value depends on the cosine u = t / sqrt(t^2 + n - 1) between the differences and the direction (1, ..., 1)
    alone. Under a mean e, with r the length of the differences, the ratio is
    exp(-n e^2 / 2) int r^(n-1) exp(-r^2 / 2 + sqrt(n) e u r) dr / int r^(n-1) exp(-r^2 / 2) dr. The integral is the
    trapezoidal rule around the integrand's peak; between the nodes of a grid in atanh(u) it is interpolated.
    """
    # the exponent that is linear in r, for each node and effect
    nodes = np.linspace(-9.0, 9.0, 1201)
    effects = np.array(EFFECTS)
    if sides == 2:
        effects = np.concatenate((effects, -effects))
    push = math.sqrt(n) * effects * np.tanh(nodes)[:, None]

    # the integral, (nodes, effects, steps)
    peak = (push + np.sqrt(np.square(push) + 4 * (n - 1))) / 2
    width = 1 / np.sqrt(1 + (n - 1) / np.square(peak))
    steps = np.linspace(-9.0, 9.0, 73)
    r = np.maximum(peak[..., None] + width[..., None] * steps, 1e-300)
    exponent = (n - 1) * np.log(r) - np.square(r) / 2 + push[..., None] * r
    top = exponent.max(axis=-1)
    integral = top + np.log(np.exp(exponent - top[..., None]).sum(axis=-1) * width * (steps[1] - steps[0]))
    without = (n / 2 - 1) * math.log(2) + math.lgamma(n / 2)
    ratios = integral - without - n * np.square(effects) / 2
    mixture = np.logaddexp.reduce(ratios, axis=1) - math.log(len(effects))
    return np.interp(np.arcsinh(t / math.sqrt(n - 1)), nodes, mixture)  # atanh(u) = asinh(t / sqrt(n - 1))


def predictive_probability(mean: float, sd: float, n: int, design: dict, margin: float | None) -> float:
    """
    The probability that the last look of a design says better, worse or equivalent (within the margin, if one is
    given), after n pairs with this mean and standard deviation of the differences, without knowledge of the true
    difference beforehand.
    """
    most = design["looks"][-1]
    if n >= most or sd == 0:
        return 1.0
    spread = sd * math.sqrt(1 / n - 1 / most)       # of the last look's mean
    error = sd / math.sqrt(most)
    outer = stats.t.isf(design["levels"][-1] / 2, most - 1) * error
    likely = stats.t.sf((outer - mean) / spread, n - 1) + stats.t.cdf((-outer - mean) / spread, n - 1)
    if margin is not None:
        inner = margin - stats.t.isf(design["levels_equivalence"][-1], most - 1) * error
        if inner > 0:
            likely += stats.t.cdf((inner - mean) / spread, n - 1) - stats.t.cdf((-inner - mean) / spread, n - 1)
    return float(min(likely, 1.0))


def look_at(differences: Sequence[float], planned: int, design: dict, margin: float | None) -> str | None:
    """
    What the look at so many planned pairs says of the differences of those pairs that there are: better, worse,
    equivalent, undecided (no verdict within the design is likely any more), or None: go on.
    """
    k = design["looks"].index(planned)
    last = planned == design["looks"][-1]
    if len(differences) < LOOKS[0] - 1:  # too many runs failed
        return "undecided" if last else None
    test = test_pairs(differences, margin)
    if test["p"] <= design["levels"][k] and test["difference"] != 0:
        return "better" if test["difference"] < 0 else "worse"
    if margin is not None and test["p_equivalent"] <= design["levels_equivalence"][k]:
        return "equivalent"
    likely = predictive_probability(test["difference"], test["sd"], len(differences), design, margin)
    return "undecided" if last or likely < UNLIKELY else None


