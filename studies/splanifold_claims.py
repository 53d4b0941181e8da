"""
The splanifold paper's tables 2, 3 and 4 measured again: what it claims beside what our implementation and honest
baselines give, on one CPU thread.

    python -m studies.splanifold_claims             all three (four minutes of one core)
    python -m studies.splanifold_claims --quick     a reduced run: proves that it runs, measures nothing

Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034; definitions of curves, targets, noise, sampling and quantiser
from its repository, github.com/curvedinf/k-splanifolds. Its script for table 2 writes constants. Those for tables 3 and
4 write constants too unless told to compute.

Table 2, time of a query with N = 256 outputs: a splanifold of two nodes, an RBF network of 256 centres (squared
distances by one product), a ReLU MLP with two hidden layers of 256; a batch's time by its queries, and single queries,
where what PyTorch takes to call an operator counts most. "Frozen": without eps, which a splanifold without a warp does
not need, as h10 / Sigma and h11 / Sigma are polynomials of t: it is then sum_p t^p (c_p + B_p delta), p = 0 .. 3, and
its controls become these four vectors and matrices beforehand, as the RBF's centres are squared beforehand. All arms of
all K take turns.

Table 3, curves fitted by 2,000 steps of Adam, 128 noisy samples, error on 128 others, all as the script draws them. The
author's chain of 16 Hermite segments is a splanifold of one coordinate and 17 nodes: with K = 1 delta is 0 and w is 1,
so points and tangents are all it has, and a tangent is per segment as his is.
"Paper's protocol" is the script's: the chain starts on the noise-free curve at its nodes and learns at 0.05; RBF and
MLP start at random, learn at 0.005 and have a weight decay of 1e-4.
"Equal terms": nobody has seen the curve (the chain starts at zero), nobody's weights decay, every rate falls linearly
to zero from the best of the same six, for each curve and method by a fourth seed's error. "Least squares": what is
linear in its parameters solved at once, on the same samples.

Table 4, bits a parameter at equal error, 4D to 4D, 256 noisy samples, error on 256 others without noise, over several
targets. Every tensor is quantised to 2^bits - 1 levels up to its largest entry, with the fewest bits that keep the
error within 1.05 of the unquantised model's. The paper's measure is the entropy of each tensor's own histogram, the
histogram free of charge: of 16 numbers it cannot exceed 4 bits ("most possible"). "Decodable" bytes have no such gap:
for the tensors apart or all as one, whichever is shorter, 4 bytes of scale a tensor and the shorter of a fixed-length
code and a Krichevsky-Trofimov adaptive one. "Its 16 polynomials": t^p and t^p delta_k, p = 0 .. 3, k = 1 .. 3: all that
the splanifold's 26 features can say where eps is small.
"""

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.timing import describe, in_turn, markdown, require_tests
from data.command_line import run_script
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from studies import build_parser, save
from train_gpt import RunError

TESTS = "tests/kernels/splanifold/test_splanifold.py"
CPU = torch.device("cpu")

N = 256               # table 2: outputs, centres, hidden units
BATCH = 64            # a call of a millisecond: what shares the machine seldom falls into it, and all stays in caches
TIMES = {             # K: microseconds a query of splanifold, RBF, MLP
    2: (2.73, 12.18, 5.40), 4: (3.00, 25.51, 6.58), 8: (2.83, 37.23, 3.98), 16: (3.44, 60.37, 4.46),
    32: (3.43, 96.42, 4.75), 64: (5.20, 214.85, 4.93), 128: (15.39, 447.35, 5.38), 256: (21.74, 779.06, 8.29),
}

SEGMENTS = 16                # table 3: of the chain
CENTRES = 64                 # of the RBF network
CURVE_NOISE = 0.002          # standard deviation
SEEDS = (1234, 2234, 3234)   # the author's; the search has one of its own
SEARCH_SEED = 4234
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
CURVES = {                   # angle (..) -> (.., 3); one turn is the whole curve
    "circle": lambda angle: torch.stack([angle.cos(), angle.sin(), 0 * angle], -1),
    "helix": lambda angle: torch.stack([angle.cos(), angle.sin(), angle / math.pi - 1], -1),
    "trefoil": lambda angle: torch.stack([angle.sin() + 2 * (2 * angle).sin(), angle.cos() - 2 * (2 * angle).cos(),
                                          -(3 * angle).sin()], -1) / 2,
}
CURVE_ERRORS = {  # RMSE and its standard deviation over three seeds
    "circle": dict(splanifold=(0.0014, 0.0009), RBF=(0.0158, 0.0113), MLP=(0.0066, 0.0039)),
    "helix": dict(splanifold=(0.0024, 0.0013), RBF=(0.0146, 0.0068), MLP=(0.0234, 0.0198)),
    "trefoil": dict(splanifold=(0.0023, 0.0004), RBF=(0.0242, 0.0194), MLP=(0.0045, 0.0011)),
}

FACTOR = 1.05                # of the error that quantisation may leave
HIDDEN = 64                  # units of the paper's MLP
RIDGE = 1e-4
EPS = 1e-4                   # of the splanifold
TASKS = {                    # steps: the paper's for its MLP
    "cubic": dict(noise=0.07, irregular=0.0, steps=1200),
    "irregular": dict(noise=0.18, irregular=0.15, steps=400),
}
ENTROPIES = {  # RMSE, bits of the quantiser, entropy-coded bits a parameter, bytes
    ("cubic", "splanifold"): (0.0232, 6, 3.71, 48.2), ("cubic", f"MLP 1x{HIDDEN}"): (0.0221, 7, 5.94, 430.4),
    ("irregular", "splanifold"): (0.4449, 4, 2.97, 38.6), ("irregular", f"MLP 1x{HIDDEN}"): (0.4409, 6, 4.70, 341.1),
}


# ---- Table 2 ----------------------------------------------------------------


def freeze(controls: SplanifoldControls) -> torch.Tensor:
    """
    Controls of one group and two nodes as what the powers of t are multiplied by, p = 0 .. 3: (4 (1 + K), N), of every
    power a vector and a matrix. Without eps.
    """
    points, bases, point_tangents, base_tangents = (p[0] for p in controls)
    K = bases.shape[-1]
    hermite = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]])  # t^p in h00, h01, h10, h11
    over_sigma = torch.tensor([[1.0, 0], [-2, -1], [1, 1], [0, 0]]) / K                     # and in h10, h11 over Sigma
    vectors = hermite @ torch.cat([points, point_tangents.mean(2)])                         # (4, N)
    matrices = torch.einsum("pc,cnk->pkn", torch.cat([hermite, over_sigma], 1),
                            torch.cat([bases, base_tangents, point_tangents]))
    return torch.cat([vectors[:, None], matrices], 1).flatten(0, 1)


def query_arms(K: int, M: int) -> dict:
    """{arm: (function to the output (M, N), multiply-adds a query)} for M queries of K coordinates."""
    random = torch.Generator().manual_seed(K)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    # all numbers, in this order
    x, centres = torch.rand(M, K, generator=random), torch.rand(N, K, generator=random)
    weights = draw(N, N)
    controls = SplanifoldControls(draw(1, 2, N), *(draw(1, 2, N, K) for _ in range(3)))
    layers = [(draw(N, width), draw(N)) for width in (K, N, N)]

    # what is made of them beforehand
    r, frozen_controls = x[:, None], freeze(controls)
    powers, one = torch.arange(4), torch.ones(M, 1)
    sharpness = 3 / K  # of exp(-sharpness |x - c|^2): about exp(-1/2) between two random points
    scaled, offset = 2 * sharpness * centres.T, -sharpness * centres.square().sum(1)

    def frozen():
        t = x.mean(1, keepdim=True)
        return ((t ** powers)[:, :, None] * torch.cat([one, x - t], 1)[:, None]).flatten(1) @ frozen_controls

    def rbf():
        exponent = torch.addmm(offset, x, scaled).sub_(sharpness * x.square().sum(1, keepdim=True))
        return exponent.exp_() @ weights

    def mlp():
        h = x
        for i, (matrix, bias) in enumerate(layers):
            h = torch.addmm(bias, h, matrix.T)
            h = h.relu_() if i < 2 else h
        return h

    return {"splanifold": (partial(splanifold, r, controls), N * (6 * K + 4)),
            "splanifold, frozen": (frozen, N * (4 * K + 4)), "RBF": (rbf, N * (K + N)), "MLP": (mlp, N * (K + 2 * N))}


def runtime(counts: list[int], batch: int, seconds: float) -> tuple[list[dict], dict]:
    """A row for every K and arm, microseconds a query, and lines_of them."""
    # milliseconds of all arms of all K in turn, many queries at once and one alone
    times, multiply_adds = {}, {}
    for M in (batch, 1):
        arms = {(K, arm): pair for K in counts for arm, pair in query_arms(K, M).items()}
        multiply_adds = {key: number for key, (_, number) in arms.items()}
        with torch.no_grad():
            times[M] = in_turn({key: function for key, (function, _) in arms.items()}, CPU, seconds)

    def per_query(M: int, key: tuple) -> dict:
        ms = times[M][key]
        return {name: ms[name] * 1000 / M for name in ("median", "p20", "p80")} | dict(n=ms["n"])

    rows = []
    for (K, arm), number in multiply_adds.items():
        claimed = TIMES[K][("splanifold", "RBF", "MLP").index(arm.split(",")[0])]
        rows.append(dict(K=K, arm=arm, claimed=claimed, batched=per_query(batch, (K, arm)),
                         single=per_query(1, (K, arm)), multiply_adds=number))
    return rows, lines_of(rows)


def lines_of(rows: list[dict]) -> dict:
    """
    {arm: {"median" and "p20": the line through its batched times}}; the 20th percentile has less of what else ran on
    the machine.
    """
    lines = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        batched = {row["K"]: row["batched"] for row in rows if row["arm"] == arm}
        lines[arm] = {name: line([(K, times[name]) for K, times in batched.items()]) for name in ("median", "p20")}
    return lines


def line(points: list[tuple[float, float]]) -> dict:
    """Least squares a + b K: a and b in microseconds, the residuals' RMS in microseconds, R^2."""
    x, y = np.array(points, float).T
    slope, start = np.polyfit(x, y, 1)
    residual = y - (start + slope * x)
    return dict(start=start, slope=slope, residual=float(np.sqrt(np.mean(residual ** 2))),
                r2=float(1 - residual.var() / y.var()))


# ---- Models of R runs at once -----------------------------------------------


def adam(predict: Callable, parameters: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, rate: float, steps: int,
         decay: float = 0.0, keep: tuple[int, ...] = (), falling: bool = False) -> dict:
    """
    {step: parameters after it} for the steps to keep and the last. x (R, M, in), y (R, M, out) and every parameter
    (R, ..) hold R independent runs: the loss is the sum of their mean squares and Adam works on each number alone.
    falling: the rate ends at zero.
    """
    parameters = [p.clone().requires_grad_() for p in parameters]
    kept = {}
    optimizer = torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    for step in range(1, steps + 1):
        if falling:
            optimizer.param_groups[0]["lr"] = rate * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        (predict(parameters, x) - y).square().mean((1, 2)).sum().backward()
        optimizer.step()
        if step in keep or step == steps:
            kept[step] = [p.detach().clone() for p in parameters]
    return kept


def rmse(predicted: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(R, M, out) -> (R,)"""
    return (predicted - y).square().mean((1, 2)).sqrt()


def network(parameters: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """
    A tanh MLP for each run, x (R, M, in); parameters are weights (R, in, out) and biases (R, 1, out) in turn. With one
    pair: linear in x.
    """
    for i in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[i + 1], x if i == 0 else x.tanh(), parameters[i])
    return x


def network_start(widths: list[int], seeds: list[int]) -> list[torch.Tensor]:
    """PyTorch's start of linear layers, +- 1 / sqrt(in); a run a seed."""
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(rows: int, inputs: int, outputs: int) -> torch.Tensor:
        return torch.stack([(2 * torch.rand(rows, outputs, generator=random) - 1) / inputs ** 0.5
                            for random in randoms])

    parameters = []
    for inputs, outputs in zip(widths, widths[1:]):
        parameters += [uniform(inputs, inputs, outputs), uniform(1, inputs, outputs)]
    return parameters


def chain(parameters: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """Table 3's splanifold: points and tangents (R, S, n), t (R, M, 1) -> (R, M, n)."""
    points, tangents = parameters
    unused = torch.zeros(*points.shape, 1, dtype=points.dtype)
    # the reference: at one coordinate, 17 nodes and 128 tokens less time than splanifold, whose tokens meet every node
    controls = SplanifoldControls(points, unused, tangents[..., None], unused)
    out = splanifold_reference(t.transpose(0, 1), controls, mix="concat")
    return out.unflatten(1, points.shape[::2]).transpose(0, 1)


def least_squares(features: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """(.., M, F), (.., M, n) -> (.., F, n): the least of |features x - y|^2 + ridge |x|^2, in float64."""
    features, y = features.double(), y.double()
    F, n = features.shape[-1], y.shape[-1]

    def below(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, rows.expand(*x.shape[:-2], *rows.shape)], -2)

    wider = below(features, ridge ** 0.5 * torch.eye(F, dtype=torch.float64))
    return torch.linalg.lstsq(wider, below(y, torch.zeros(F, n, dtype=torch.float64)), driver="gelsd").solution


def unit_controls(K: int, S: int) -> SplanifoldControls:
    """
    Controls of S (1 + 3 K) outputs, of which each is what one of the controls of a splanifold of one output is
    multiplied by.
    """
    return controls_of(torch.eye(S * (1 + 3 * K), dtype=torch.float64), K, S)


def controls_of(solution: torch.Tensor, K: int, S: int) -> SplanifoldControls:
    """Rows (S (1 + 3 K), n) in the order of unit_controls -> one splanifold of n outputs."""
    points, *matrices = solution.split([S, S * K, S * K, S * K])
    return SplanifoldControls(points[None], *(x.unflatten(0, (S, K)).transpose(1, 2)[None] for x in matrices))


# ---- Table 3 ----------------------------------------------------------------


def curve_samples(seeds: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """
    t (R, 128, 1), noisy points (R, 128, 3), other t and their points without noise: R = curves x seeds, seeds fastest.
    """
    samples = []
    for curve in CURVES.values():
        for seed in seeds:
            random = torch.Generator().manual_seed(seed)
            t, other = (torch.rand(128, 1, generator=random) for _ in range(2))
            points, others = (curve(2 * math.pi * at[:, 0]) for at in (t, other))
            samples.append((t, points + CURVE_NOISE * torch.randn(128, 3, generator=random), other, others))
    return tuple(map(torch.stack, zip(*samples)))


def bumps(t: torch.Tensor, centres: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Gaussians of t (R, M, 1) about centres (R, C), widths (R,) -> (R, M, C)."""
    return torch.exp(-(t - centres[:, None]).square() / (2 * width[:, None, None] ** 2))


def bump_width(t: torch.Tensor, y: torch.Tensor, centres: torch.Tensor, fit: Callable) -> torch.Tensor:
    """
    (R,): the best of six widths from 0.01 to 1 on the last 32 of 128 samples, after fit(features, y) ->
    predict(features) on the others.
    """
    widths, R = torch.logspace(-2, 0, 6), len(t)
    t, y, centres = (x.repeat(6, *[1] * (x.ndim - 1)) for x in (t, y, centres))
    x = bumps(t, centres, widths.repeat_interleave(R))
    errors = rmse(fit(x[:, :96], y[:, :96])(x[:, 96:]), y[:, 96:]).nan_to_num(math.inf)
    return widths[errors.view(6, R).argmin(0)]


def curve_arms(seeds: tuple[int, ...]) -> dict:
    """{arm: (predict, its start, features of t, or None where the RBF's width is to be chosen)}"""
    runs = [seed for _ in CURVES for seed in seeds]

    def draw(offset: int, *shape: int) -> torch.Tensor:
        """(R, *shape): of every run by its seed."""
        randoms = [torch.Generator().manual_seed(seed + offset) for seed in runs]
        return torch.stack([torch.randn(shape, generator=random) for random in randoms])

    # fixed features of the MLP, and a small start of the RBF's weights
    frequencies = 4 * draw(400, 8)[:, None]
    small = 0.01 * draw(300, CENTRES, 3)

    def waves(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([f(2 * math.pi * t * frequencies) for f in (torch.sin, torch.cos)], -1)

    return {
        "splanifold": (chain, [torch.zeros(len(runs), SEGMENTS + 1, 3)] * 2, lambda t: t),
        "RBF": (network, [small, torch.zeros(len(runs), 1, 3)], None),
        "MLP": (network, network_start([16, 64, 64, 3], [seed + 500 for seed in runs]), waves),
        "MLP of t alone": (network, network_start([1, 64, 64, 3], [seed + 500 for seed in runs]), lambda t: 2 * t - 1),
    }


def on_the_curve() -> list[torch.Tensor]:
    """
    The script's start of a chain, (curves, S, 3): noise-free points at the nodes, tangents their differences by t, not
    by segment.
    """
    points = torch.stack([curve(2 * math.pi * torch.linspace(0, 1, SEGMENTS + 1)) for curve in CURVES.values()])
    return [points, torch.gradient(points, spacing=1 / SEGMENTS, dim=1)[0]]


def curves(steps: int, rates: tuple[float, ...], width_steps: int) -> list[dict]:
    """
    A row for every curve, arm and protocol: RMSE on the other samples, mean and standard deviation over the seeds.
    """
    seeds = (*SEEDS, SEARCH_SEED)
    t, y, other, truth = curve_samples(seeds)
    randoms = [torch.Generator().manual_seed(seed + 100) for _ in CURVES for seed in seeds]
    centres = torch.stack([torch.rand(CENTRES, generator=random) for random in randoms])
    arms, rows = curve_arms(seeds), []

    def errors_of(predicted: torch.Tensor) -> torch.Tensor:
        """On the other samples (curves, seeds)."""
        return rmse(predicted, truth).view(len(CURVES), len(seeds))

    def train(arm: str, rate: float, decay: float = 0.0, start: list[torch.Tensor] | None = None,
              falling: bool = False) -> torch.Tensor:
        """The errors of an arm; the RBF's width is chosen first."""
        predict, blind, features = arms[arm]
        if features is None:
            def fit(x: torch.Tensor, y: torch.Tensor) -> Callable:
                start = [p.repeat(6, 1, 1) for p in blind]
                [parameters] = adam(network, start, x, y, rate, width_steps, falling=falling).values()
                return partial(network, parameters)
            features = partial(bumps, centres=centres, width=bump_width(t, y, centres, fit))
        [parameters] = adam(predict, start or blind, features(t), y, rate, steps, decay, falling=falling).values()
        return errors_of(predict(parameters, features(other)))

    def record(arm: str, protocol: str, errors: torch.Tensor, rates: dict):
        """Rows of errors (curves, seeds). rates: by curve, {} where there is none."""
        parameters = sum(p[0].numel() for p in arms[arm][1])
        for curve, numbers in zip(CURVES, errors[:, :len(SEEDS)].tolist()):
            rows.append(dict(curve=curve, arm=arm, protocol=protocol, parameters=parameters, rate=rates.get(curve),
                             errors=numbers, mean=float(np.mean(numbers)), std=float(np.std(numbers)),
                             claimed=CURVE_ERRORS[curve].get(arm)))
        print(f"curves, {arm}, {protocol}: done", flush=True)

    # the paper's protocol
    known = [p.repeat_interleave(len(seeds), 0) for p in on_the_curve()]
    for arm, rate, decay, start in (("splanifold", 0.05, 0.0, known), ("RBF", 0.005, 1e-4, None),
                                    ("MLP", 0.005, 1e-4, None)):
        record(arm, "paper's protocol", train(arm, rate, decay, start), dict.fromkeys(CURVES, rate))

    # equal terms, at each curve's best rate by the last seed
    for arm in arms:
        errors = torch.stack([train(arm, rate, falling=True) for rate in rates])  # (rates, curves, seeds)
        best = errors[..., -1].nan_to_num(math.inf).argmin(0)
        record(arm, "equal terms", errors[best, range(len(CURVES))],
               {curve: rates[i] for curve, i in zip(CURVES, best)})

    # least squares
    def solve(x: torch.Tensor, y: torch.Tensor) -> Callable:
        solution = least_squares(x, y, 1e-6)
        return lambda other: other.double() @ solution

    def design(t: torch.Tensor) -> torch.Tensor:
        rows = splanifold_reference(t.double().flatten(0, 1)[:, None], unit_controls(1, SEGMENTS + 1))
        return rows.unflatten(0, t.shape[:2])

    record("splanifold", "least squares", errors_of(solve(design(t), y)(design(other))), {})
    width = bump_width(t, y, centres, solve)
    predict = solve(bumps(t, centres, width), y)
    record("RBF", "least squares", errors_of(predict(bumps(other, centres, width))), {})
    return rows


# ---- Table 4 ----------------------------------------------------------------


def entropy(symbols: torch.Tensor) -> float:
    """Bits a symbol by the symbols' own histogram."""
    share = symbols.unique(return_counts=True)[1].double() / symbols.numel()
    return -(share * share.log2()).sum().item()


def adaptive_bits(symbols: torch.Tensor, levels: int) -> float:
    """Length of the Krichevsky-Trofimov code of the symbols, of `levels` kinds: nothing but them is sent."""
    counts, n = symbols.unique(return_counts=True)[1].double(), symbols.numel()
    of_symbols = (torch.lgamma(counts + 0.5) - math.lgamma(0.5)).sum().item()
    return (math.lgamma(n + levels / 2) - math.lgamma(levels / 2) - of_symbols) / math.log(2)


def quantised(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x on 2^bits - 1 levels between plus and minus its largest entry, and the levels' whole numbers."""
    most = 2 ** (bits - 1) - 1
    step = x.abs().max() / most
    symbols = (x / step).round() if step > 0 else torch.zeros_like(x)
    return symbols * step, symbols.int()


def shortest(tensors: list[torch.Tensor], error_of: Callable) -> dict:
    """
    The fewest bits of the quantiser that keep error_of(tensors) within FACTOR of its value, with what they cost.
    RunError if 16 are too few.

    entropy: bits a parameter by every tensor's own histogram; most_possible: where no two numbers of a tensor are
    equal; size: the entropy in bytes; decodable: bytes of a code with scales and without a free histogram.
    """
    exact, total = error_of(tensors), sum(x.numel() for x in tensors)
    for bits in range(2, 17):
        values, symbols = zip(*(quantised(x, bits) for x in tensors))
        error, levels = error_of(list(values)), 2 ** bits - 1
        if error <= FACTOR * exact:
            coded = sum(x.numel() * entropy(x) for x in symbols)
            most = sum(x.numel() * math.log2(x.numel()) for x in tensors)
            decodable = sum(4 + min(bits * x.numel(), adaptive_bits(x, levels)) / 8 for x in symbols)
            return dict(parameters=total, error=exact, quantised_error=error, bits=bits, entropy=coded / total,
                        size=coded / 8, most_possible=most / total, decodable=decodable)
    raise RunError(f"16 bits leave an error of {error:.3g} where the unquantised model has {exact:.3g}")


def measured_code(tensors: list[torch.Tensor], error_of: Callable) -> dict:
    """
    shortest() with every tensor on a scale of its own, as the paper has it; decodable: that, or all numbers on one
    scale as one stream if shorter.
    """
    def error_of_stream(flat: list[torch.Tensor]) -> float:
        pieces = flat[0].split([x.numel() for x in tensors])
        return error_of([piece.view(x.shape) for piece, x in zip(pieces, tensors)])

    apart = shortest(tensors, error_of)
    stream = shortest([torch.cat([x.flatten() for x in tensors])], error_of_stream)
    return apart | dict(one_stream=stream["entropy"], decodable=min(apart["decodable"], stream["decodable"]))


class Target:
    """A map from (M, 4) to (M, 4): one cubic in t and linear in the deviation, and waves on it. Drawn by a seed."""

    def __init__(self, seed: int, irregular: float):
        self.random = torch.Generator().manual_seed(seed)
        self.irregular = irregular                                                  # how much of the waves
        self.spine = 0.5 * self.draw(4, 4)                                          # by powers of t
        self.matrices = 0.5 * self.draw(3, 4, 4)                                    # likewise
        self.pitch = 1 + 3 * torch.rand(64, generator=self.random)
        directions = self.draw(64, 4)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.phase = 2 * math.pi * torch.rand(64, generator=self.random)
        self.waves = 0.5 * self.draw(64, 4)

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def smooth(self, r: torch.Tensor) -> torch.Tensor:
        """Without the waves."""
        t = r.mean(1, keepdim=True)
        deviation = torch.einsum("mp,pnk,mk->mn", t ** torch.arange(3), self.matrices, r - t)
        return t ** torch.arange(4) @ self.spine + deviation

    def __call__(self, r: torch.Tensor) -> torch.Tensor:
        waves = torch.sin(2 * math.pi * (r @ self.directions.T) * self.pitch + self.phase)
        return self.smooth(r) + self.irregular * waves @ self.waves


def targets(task: str, seeds: list[int]) -> tuple[torch.Tensor, ...]:
    """
    r (R, 256, 4), noisy y (R, 256, 4), other r, their y, and the smooth part of those y: another map for every seed.
    """
    samples = []
    for seed in seeds:
        target = Target(seed, TASKS[task]["irregular"])
        r, other = (torch.rand(256, 4, generator=target.random) for _ in range(2))
        noise = TASKS[task]["noise"] * target.draw(256, 4)
        samples.append((r, target(r) + noise, other, target(other), target.smooth(other)))
    return tuple(map(torch.stack, zip(*samples)))


def monomials(r: torch.Tensor, degree: int) -> torch.Tensor:
    """(M, 4) -> (M, F): every product of at most `degree` of the coordinates, scaled to [-1, 1]."""
    x = torch.cat([torch.ones_like(r[:, :1]), 2 * r - 1], 1)
    products = torch.combinations(torch.arange(5), degree, with_replacement=True).tolist()
    return torch.stack([x[:, list(factors)].prod(1) for factors in products], 1)


def spine_monomials(r: torch.Tensor) -> torch.Tensor:
    """(M, 4) -> (M, 16): t^p and t^p delta_k, t scaled to [-1, 1], k but the last, as delta sums to zero."""
    t = r.mean(1, keepdim=True)
    linear = torch.cat([torch.ones_like(t), (r - t)[:, :3]], 1)
    return ((2 * t - 1) ** torch.arange(4)[:, None, None] * linear).transpose(0, 1).flatten(1)


def splanifold_model(r, y, other, truth) -> tuple[list[torch.Tensor], Callable]:
    """
    The least-squares fit of a splanifold of two nodes: its tensors, of each node apart as the paper has them, and their
    error.
    """
    design = splanifold_reference(r.double()[:, None], unit_controls(4, 2), eps=EPS)
    controls = controls_of(least_squares(design, y, RIDGE), 4, 2)

    def error_of(tensors: list[torch.Tensor]) -> float:
        together = SplanifoldControls(*(torch.stack(nodes)[None] for nodes in zip(tensors[::2], tensors[1::2])))
        return rmse(splanifold_reference(other.double()[:, None], together, eps=EPS)[None], truth[None]).item()
    return [node for x in controls for node in x[0]], error_of


def linear_model(r, y, other, truth, features: Callable) -> tuple[list[torch.Tensor], Callable]:
    """The least-squares fit of features of r: its tensor, and the error of one."""
    solution = least_squares(features(r), y, RIDGE)
    return [solution], lambda x: rmse((features(other).double() @ x[0])[None], truth[None]).item()


def network_model(parameters: list[torch.Tensor], run: int, other, truth) -> tuple[list[torch.Tensor], Callable]:
    """One of several trained networks: its tensors, and the error of such."""
    return [p[run] for p in parameters], lambda x: rmse(network([p[None] for p in x], other[None]), truth[None]).item()


def densities(seeds: list[int], steps: tuple[int, ...], hidden: tuple[int, ...],
              rates: tuple[float, ...]) -> tuple[list[dict], dict]:
    """
    A row for every task and model, means over the seeds, and {task: RMSE of the target's smooth part known exactly}.

    Beside the paper's MLP two smaller ones: with the fewest hidden units whose mean error, at the best rate and number
    of steps, is within FACTOR of the splanifold's and of the paper's MLP's; where none is, the most accurate. Chosen,
    as the quantiser's bits are, on the samples that the error is told of.
    """
    rows, smooth_alone = [], {}
    for task, settings in TASKS.items():
        r, y, other, truth, smooth = targets(task, seeds)
        smooth_alone[task] = rmse(smooth, truth).mean().item()
        runs = list(zip(r, y, other, truth))

        def networks(parameters: list[torch.Tensor], other=other, truth=truth) -> list[tuple]:
            return [network_model(parameters, i, other[i], truth[i]) for i in range(len(seeds))]

        # what is linear in its parameters, and the paper's MLP
        models = {"splanifold": [splanifold_model(*run) for run in runs],
                  "its 16 polynomials": [linear_model(*run, spine_monomials) for run in runs]}
        start = network_start([4, HIDDEN, 4], seeds)
        [parameters] = adam(network, start, r, y, 0.01, min(settings["steps"], max(steps)), 1e-4).values()
        models[f"MLP 1x{HIDDEN}"] = networks(parameters)

        # smaller MLPs: of every width the best rate and number of steps
        best = {}
        for width in hidden:
            start, fits = network_start([4, width, 4], seeds), []
            for rate in rates:
                fits += adam(network, start, r, y, rate, max(steps), keep=steps).values()
            errors = [rmse(network(fit, other), truth).mean().nan_to_num(math.inf).item() for fit in fits]
            best[width] = min(errors), fits[int(np.argmin(errors))]
        for peer in ("splanifold", f"MLP 1x{HIDDEN}"):
            wanted = FACTOR * np.mean([error_of(tensors) for tensors, error_of in models[peer]])
            enough = [width for width in hidden if best[width][0] <= wanted]
            width = min(enough) if enough else min(hidden, key=lambda width, best=best: best[width][0])
            relation = "as good as" if enough else "nearest to"
            models[f"MLP 1x{width}, {relation} the {peer}"] = networks(best[width][1])

        for degree in (1, 2, 3):
            features = partial(monomials, degree=degree)
            models[f"polynomial of degree {degree}"] = [linear_model(*run, features) for run in runs]
        rows += [density_row(task, model, fitted) for model, fitted in models.items()]
        print(f"bits, {task}: done", flush=True)
    return rows, smooth_alone


def density_row(task: str, model: str, fitted: list[tuple]) -> dict:
    """Means over the seeds of a model's measured_code, beside the paper's claim."""
    codes = [measured_code(tensors, error_of) for tensors, error_of in fitted]
    means = {key: float(np.mean([code[key] for code in codes])) for key in codes[0]}
    return dict(task=task, model=model, claimed=ENTROPIES.get((task, model)), seeds=len(codes),
                error_std=float(np.std([code["error"] for code in codes]))) | means


# ---- Results ----------------------------------------------------------------


def runtime_tables(results: dict) -> list[str]:
    """Table 2 and the lines through its batched times."""
    def spread(times: dict) -> str:
        return f"{times['median']:.3g} ({times['p20']:.3g} to {times['p80']:.3g}, n {times['n']:,})"

    batched = f"measured, {results['batch']:,} at once (20 to 80 %)"
    rows = [{"K": row["K"], "arm": row["arm"], "claimed, us a query": row["claimed"], batched: spread(row["batched"]),
             "measured, one at a time": spread(row["single"]), "multiply-adds": f"{row['multiply_adds']:,}"}
            for row in results["runtime"]]
    titles = dict(median="medians", p20="20th percentiles")
    lines = [{"batched, us = a + b K": arm, "of": titles[name], "a": f"{fit['start']:.2f}", "b": f"{fit['slope']:.4f}",
              "residuals' RMS, us": f"{fit['residual']:.2g}", "R^2": f"{fit['r2']:.4f}"}
             for arm, fits in results["lines"].items() for name, fit in fits.items()]
    return [markdown(rows), markdown(lines)]


def error(mean: float, std: float) -> str:
    return f"{mean:.4f} ± {std:.4f}"


def curve_table(rows: list[dict]) -> str:
    """Table 3."""
    by_curve = sorted(rows, key=lambda row: list(CURVES).index(row["curve"]))
    return markdown([{
        "curve": row["curve"], "arm": row["arm"], "parameters": row["parameters"],
        "claimed RMSE": error(*row["claimed"]) if row["claimed"] else "-", "measured": error(row["mean"], row["std"]),
        "protocol": row["protocol"], "rate": row["rate"] or "-"} for row in by_curve])


def entropy_table(rows: list[dict]) -> str:
    """Table 4."""
    lines = []
    for row in rows:
        claimed_error, _, claimed_bits, claimed_bytes = row["claimed"] or ("-",) * 4
        lines.append({
            "target": row["task"], "model": row["model"], "parameters": f"{row['parameters']:.0f}",
            "claimed RMSE": claimed_error, "measured": error(row["error"], row["error_std"]),
            "claimed bits": claimed_bits, "bits a parameter": f"{row['entropy']:.2f}",
            "most possible": f"{row['most_possible']:.2f}", "as one stream": f"{row['one_stream']:.2f}",
            "claimed bytes": claimed_bytes, "bytes": f"{row['size']:.1f}",
            "decodable bytes": f"{row['decodable']:.0f}"})
    return markdown(lines)


def shown(results: dict) -> str:
    """The three tables, claimed beside measured, as Markdown."""
    alone = ", ".join(f"{task} {error:.4f}" for task, error in results["smooth_alone"].items())
    return "\n\n".join([
        f"Table 2: time of a query, {N} outputs, one CPU thread",
        *runtime_tables(results),
        f"Table 3: curves, {results['steps']:,} steps of Adam, {len(SEEDS)} seeds (mean ± standard deviation)",
        curve_table(results["curves"]),
        f"Table 4: bits a parameter, quantised within {FACTOR} of the unquantised error, "
        f"{results['densities'][0]['seeds']} targets (means; of the error ± standard deviation)",
        entropy_table(results["densities"]),
        f"RMSE of the smooth part of the target known exactly: {alone}."])


def run(options: argparse.Namespace):
    """Measure all three tables, write and print them."""
    torch.set_num_threads(1)
    require_tests(TESTS)
    quick = options.quick
    results = describe(CPU) | dict(threads=1, dtype="float32", quick=quick, batch=BATCH, steps=50 if quick else 2000)
    if quick:
        results["runtime"], results["lines"] = runtime([2, 4, 8], BATCH, 0.01)
        results["curves"] = curves(results["steps"], RATES[-2:], 20)
        results["densities"], results["smooth_alone"] = densities([0, 1], (30,), (2, 4), (0.03,))
    else:
        results["runtime"], results["lines"] = runtime(list(TIMES), BATCH, options.seconds)
        results["curves"] = curves(results["steps"], RATES, 500)
        results["densities"], results["smooth_alone"] = densities(
            list(range(5)), steps=(400, 1200, 2000), hidden=(2, 3, 4, 6, 8, 12, 16, 24, 32), rates=(0.003, 0.01, 0.03))
    tables = shown(results)
    path = save("splanifold_claims", results, options.output, tables)
    print(f"\n{tables}\n\n{path}")


def main() -> int:
    """Run the command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each arm, K and batch (1)")
    options = parser.parse_args()
    return run_script("splanifold_claims.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
