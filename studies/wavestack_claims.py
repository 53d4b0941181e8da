"""
The claims W1 to W10 about wave lanes against the results of studies/wavestack.py: what was claimed, what was measured,
and a verdict: confirmed, refuted, undecided, not run, or, where a claim has no figure to test, documented.

A rule is written beside its claim. It stood before the first run. "better", "worse" and "equivalent" are the words of
compare.py over pairs of equal seeds. Tiers are {number: {run: result}}, as wavestack.py keeps them.
"""

import math
from collections.abc import Callable

import numpy as np

PUBLISHED = 0.7         # what the published losses multiply the cross-entropy by
PARITY = 0.01           # nats that count as equal to the transformer
LINEAR = (0.95, 1.05)   # exponents of a time that is linear in the tokens
FIT_FROM = 1024         # tokens from which on an exponent is fitted
LONG = 4096             # tokens of a long row
LAST = 16_384           # tokens up to which the lanes are to overtake attention
NOT_RUN = "not run", "not run"


def judge_claims(tiers: dict) -> list[dict]:
    """A row for each claim: claim, claimed, measured, verdict."""
    rows = []
    for number, (claimed, judge) in CLAIMS.items():
        measured, verdict = judge(tiers)
        rows.append(dict(claim=number, claimed=claimed, measured=measured, verdict=verdict))
    return rows


def arms_of(tiers: dict, comparison: str) -> dict[str, dict]:
    """{arm: row} of a comparison's arms that have a loss; empty where it was not run."""
    rows = tiers.get("2", {}).get(comparison, {}).get("arms", [])
    return {row["arm"]: row for row in rows if row["loss"] is not None}


def without_attention(arms: dict[str, dict]) -> list[dict]:
    """The lane arms of a comparison with the transformer that have no attention, and more than convolutions."""
    return [row for arm, row in arms.items()
            if arm.startswith("wave_lanes") and "attention" not in arm and "lanes=conv" not in arm]


def decide(outcomes: list[bool | None]) -> str:
    """confirmed if all are true, refuted if one is false, else undecided."""
    if False in outcomes:
        return "refuted"
    return "undecided" if None in outcomes else "confirmed"


def has_verdict(row: dict, wanted: str) -> bool | None:
    """Whether an arm's verdict is this one; None where there is none."""
    return None if row["verdict"] in (None, "undecided") else row["verdict"] == wanted


def tell(rows: list[dict]) -> str:
    """What came of arms in words: difference, interval, verdict."""
    texts = []
    for row in rows:
        text = f"{row['arm']}: {row['loss']:.4f}"
        if row["difference"] is not None:
            text += f" ({row['difference']:+.4f}"
            if row["interval"] and row["interval"][0] is not None:
                text += ", {:+.4f} to {:+.4f}".format(*row["interval"])
            text += f", {row['verdict'] or 'no verdict'})"
        texts.append(text)
    return "; ".join(texts)


# ---- The claims -------------------------------------------------------------


def judge_w1(tiers: dict) -> tuple[str, str]:
    """
    As written: refuted if the tuned transformer's loss is below the lane model's. At equal parameters: confirmed if an
    arm without attention is within PARITY of the transformer by its whole interval, refuted if every one is above it.
    """
    texts, verdicts = [], []
    written = tiers.get("1", {})
    tuned = [run["loss"] for arm, run in written.items() if "tuned" in arm]
    if "all lanes" in written and tuned:
        lanes, plain = PUBLISHED * written["all lanes"]["loss"], PUBLISHED * min(tuned)
        texts.append(f"0.7 x loss as written: all lanes {lanes:.4f}, tuned transformer {plain:.4f}")
        verdicts.append(f"as written {'refuted' if plain < lanes else 'holds'}")

    rows = without_attention(arms_of(tiers, "tokens"))
    if rows:
        known = [row["interval"] for row in rows if row["interval"] and row["interval"][0] is not None]
        verdict = "undecided"
        if any(high <= PARITY for _, high in known):
            verdict = "confirmed"
        elif len(known) == len(rows) and all(low > PARITY for low, _ in known):
            verdict = "refuted"
        texts.append(tell(rows))
        verdicts.append(f"at equal parameters {verdict}")
    return ("; ".join(texts), "; ".join(verdicts)) if texts else NOT_RUN


def judge_w2(tiers: dict) -> tuple[str, str]:
    """Confirmed if the best arm without attention has at most 1.1 times the transformer's loss."""
    arms = arms_of(tiers, "tokens")
    rows = without_attention(arms)
    if not rows or "baseline" not in arms:
        return NOT_RUN
    ratio = min(row["loss"] for row in rows) / arms["baseline"]["loss"]
    return f"{ratio:.4f} times the transformer's loss", decide([ratio <= 1.1])


def judge_arms(tiers: dict, comparison: str, names: list[str], wanted: str) -> tuple[str, str]:
    """Confirmed if these arms all have this verdict against their comparison's first arm."""
    arms = arms_of(tiers, comparison)
    rows = [arms[name] for name in names if name in arms]
    if len(rows) < len(names):
        return NOT_RUN
    return tell(rows), decide([has_verdict(row, wanted) for row in rows])


def judge_w3(tiers: dict) -> tuple[str, str]:
    """Confirmed if the model is worse without each of its lanes, whose parameters the others then have."""
    names = [f"wave_lanes:lanes={lanes}" for lanes in ("fourier,wavelet", "poly,wavelet", "poly,fourier")]
    return judge_arms(tiers, "lanes", names, "worse")


def times_of(tiers: dict, layer: str, what: str, key: str = "median") -> dict[int, float]:
    """{tokens: a figure of a layer's pass}; times of a row."""
    figures = {}
    for result in tiers.get("3", {}).values():
        for row in result["rows"]:
            if row["layer"] == layer and row["what"] == what:
                rows = row["rows"] if what != "decode" and key == "median" else 1
                figures[row["T"]] = row[key] / rows
    return dict(sorted(figures.items()))


def fit_exponent(times: dict[int, float]) -> float | None:
    """The slope of the logarithms from FIT_FROM tokens on; None of fewer than two lengths."""
    points = [(T, ms) for T, ms in times.items() if T >= FIT_FROM]
    if len(points) < 2:
        return None
    tokens, ms = np.log(np.array(points)).T
    return float(np.polyfit(tokens, ms, 1)[0])


def find_crossover(lanes: dict[int, float], attention: dict[int, float]) -> int | None:
    """The shortest length from which on the lanes take less time wherever both were measured; None: there is none."""
    crossover = None
    for T in sorted(lanes.keys() & attention.keys(), reverse=True):
        if lanes[T] >= attention[T]:
            break
        crossover = T
    return crossover


def judge_w4(tiers: dict) -> tuple[str, str]:
    """Confirmed if both passes' exponents are within LINEAR and lanes overtake fused attention up to LAST tokens."""
    texts, outcomes = [], []
    for what in ("forward", "forward + backward"):
        lanes, attention = (times_of(tiers, layer, what) for layer in ("lanes", "softmax attention"))
        slopes = [fit_exponent(times) for times in (lanes, attention)]
        if None in slopes:
            return NOT_RUN
        crossover = find_crossover(lanes, attention)
        outcomes += [LINEAR[0] <= slopes[0] <= LINEAR[1], (crossover or math.inf) <= LAST]
        place = "never faster" if crossover is None else f"faster from {crossover:,} tokens on"
        texts.append(f"{what}: exponent {slopes[0]:.3f}, attention {slopes[1]:.3f}, {place}")
    return "; ".join(texts), decide(outcomes)


def judge_w5(tiers: dict) -> tuple[str, str]:
    """Confirmed if at every length from LONG on lanes keep less than 0.8 of fused attention's bytes."""
    texts, outcomes = [], []
    for what, words in (("forward + backward", "training"), ("decode", "decoding")):
        lanes, attention = (times_of(tiers, layer, what, "kept") for layer in ("lanes", "softmax attention"))
        ratios = [lanes[T] / attention[T] for T in lanes if T >= LONG and attention.get(T)]
        if not ratios:
            return NOT_RUN
        outcomes.append(max(ratios) < 0.8)
        texts.append(f"{words}: {min(ratios):.3g} to {max(ratios):.3g} times the bytes from {LONG:,} tokens on")
    return "; ".join(texts), decide(outcomes)


def judge_w6(tiers: dict) -> tuple[str, str]:
    """
    Confirmed if a new lane has 80 % of what training all parameters gains on the second corpus, and loses at most 0.005
    nats of the first.
    """
    runs = tiers.get("5", {})
    if not {"before", "new lane", "all parameters"} <= runs.keys():
        return NOT_RUN
    before, lane, full = (runs[name] for name in ("before", "new lane", "all parameters"))
    gain, lost = before["second"] - full["second"], lane["first"] - before["first"]
    if gain <= 0:
        return "training all parameters gains nothing", "undecided"
    share = (before["second"] - lane["second"]) / gain
    return (f"{100 * share:.0f} % of the gain, {lost:+.4f} nats of the first corpus",
            decide([share >= 0.8, lost <= 0.005]))


def judge_w7(tiers: dict) -> tuple[str, str]:
    """Confirmed if random features of as many numbers are worse."""
    return judge_arms(tiers, "lanes", ["wave_lanes:basis=random"], "worse")


def judge_w8(tiers: dict) -> tuple[str, str]:
    """Confirmed if equal weights and one lane a token are both worse than the gate."""
    names = [f"wave_lanes:pack=block,gate_map={gate}" for gate in ("uniform", "top1")]
    return judge_arms(tiers, "gates", names, "worse")


def judge_w9(tiers: dict) -> tuple[str, str]:
    """Confirmed if lanes with attention are better than attention at equal tokens and at equal seconds."""
    judged = [judge_arms(tiers, name, ["wave_lanes:lanes=fourier,wavelet,attention"], "better")
              for name in ("tokens", "time")]
    if NOT_RUN in judged:
        return NOT_RUN
    verdicts = [verdict for _, verdict in judged]
    verdict = next((word for word in ("refuted", "undecided") if word in verdicts), "confirmed")
    return f"equal tokens: {judged[0][0]}; equal time: {judged[1][0]}", verdict


def judge_w10(tiers: dict) -> tuple[str, str]:
    """What the best of both sides' tried rates gains over the factor 1."""
    texts = []
    for arm, row in arms_of(tiers, "tokens").items():
        tries = (row["sweep"] or dict(tries=[]))["tries"]
        losses = {entry["factor"]: [loss for loss in entry["losses"] if loss is not None] for entry in tries}
        means = {factor: sum(values) / len(values) for factor, values in losses.items() if values}
        if 1 in means:
            texts.append(f"{arm}: {means[1] - min(means.values()):.4f} nats by {len(means)} rates")
    return ("; ".join(texts), "documented") if texts else NOT_RUN


CLAIMS: dict[str, tuple[str, Callable]] = {
    "W1": ("beats a transformer of as many parameters: 0.7 x loss 0.728 against 1.048, 0.600 against 1.020 "
           "(TinyStories)", judge_w1),
    "W2": ("within 10 % of the transformer (WikiText-2: +11.4 % at the end, -6 % at the best step)", judge_w2),
    "W3": ("each lane contributes: 0.745 with all; 0.750 without Fourier, 0.768 without poly, 0.823 without wavelet",
           judge_w3),
    "W4": ("time linear in the length: exponent 0.997, a transformer's 1.475", judge_w4),
    "W5": ("less memory at long context: 6.76 against 6.97 GB", judge_w5),
    "W6": ("lanes can be added at run time instead of fine-tuning", judge_w6),
    "W7": ("explicit mathematics is more efficient than an implicit model", judge_w7),
    "W8": ("a gated mix of lanes is more than a mixture of experts", judge_w8),
    "W9": ("lanes combined with attention may be best", judge_w9),
    "W10": ("much can still be tuned", judge_w10),
}
