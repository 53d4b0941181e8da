"""
The splanifold paper's tables 2, 3 and 4 measured again: what it claims beside what our implementation and honest baselines give, on one CPU thread.

    python benchmarks/splanifold_claims.py             all three (four minutes of one core)
    python benchmarks/splanifold_claims.py --quick     a reduced run of every part: proves that they run, measures nothing

Adams, K-Splanifolds, 2026, doi 10.5281/zenodo.18673034; definitions of curves, targets, noise, sampling and quantiser from its repository,
github.com/curvedinf/k-splanifolds. Its script for table 2 writes constants. Those for tables 3 and 4 write constants too unless told to compute.

Table 2, time of a query with N = 256 outputs: a splanifold of two nodes, an RBF network of 256 centres (squared distances by one product), a ReLU MLP with two
hidden layers of 256; a batch's time by its queries, and single queries, where what PyTorch takes to call an operator counts most. "Frozen": without eps, which
a splanifold without a warp does not need, as h10 / Sigma and h11 / Sigma are polynomials of t: it is then sum_p t^p (c_p + B_p delta), p = 0 .. 3, and its
controls become these four vectors and matrices beforehand, as the RBF's centres are squared beforehand. All arms of all K take turns.

Table 3, curves fitted by 2,000 steps of Adam, 128 noisy samples, error on 128 others, all as the script draws them. The author's chain of 16 Hermite segments
is a splanifold of one coordinate and 17 nodes: with K = 1 delta is 0 and w is 1, so points and tangents are all it has, and a tangent is per segment as his is.
"Paper's protocol" is the script's: the chain starts on the noise-free curve at its nodes and learns at 0.05; RBF and MLP start at random, learn at 0.005 and have
a weight decay of 1e-4.
"Equal terms": nobody has seen the curve (the chain starts at zero), nobody's weights decay, every rate falls linearly to zero from the best of the same six,
for each curve and method by a fourth seed's error. "Least squares": what is linear in its parameters solved at once, on the same samples.

Table 4, bits a parameter at equal error, 4D to 4D, 256 noisy samples, error on 256 others without noise, over several targets. Every tensor is quantised to
2^bits - 1 levels up to its largest entry, with the fewest bits that keep the error within 1.05 of the unquantised model's. The paper's measure is the entropy of each
tensor's own histogram, the histogram free of charge: of 16 numbers it cannot exceed 4 bits ("most possible"). "Decodable" bytes have no such gap: for the
tensors apart or all as one, whichever is shorter, 4 bytes of scale a tensor and the shorter of a fixed-length code and a Krichevsky-Trofimov adaptive one.
"Its 16 polynomials": t^p and t^p delta_k, p = 0 .. 3, k = 1 .. 3: all that the splanifold's 26 features can say where eps is small.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import describe, in_turn, markdown, require_tests, save
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from train_gpt import RunError

import numpy as np
import torch

TESTS = "tests/kernels/splanifold/test_splanifold.py"
CPU = torch.device("cpu")

N = 256               # table 2: outputs, centres, hidden units
BATCH = 64            # a call of a millisecond: what shares the machine seldom falls into it, and no temporary leaves the caches
TIMES = {             # K: microseconds a query of splanifold, RBF, MLP
    2: (2.73, 12.18, 5.40), 4: (3.00, 25.51, 6.58), 8: (2.83, 37.23, 3.98), 16: (3.44, 60.37, 4.46),
    32: (3.43, 96.42, 4.75), 64: (5.20, 214.85, 4.93), 128: (15.39, 447.35, 5.38), 256: (21.74, 779.06, 8.29),
}

SEGMENTS, CENTRES, CURVE_NOISE = 16, 64, 0.002
SEEDS = (1234, 2234, 3234)   # the author's; the search has one of its own
SEARCH_SEED = 4234
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
CURVES = {                   # angle (..) -> (.., 3); one turn is the whole curve
    "circle": lambda angle: torch.stack([angle.cos(), angle.sin(), 0 * angle], -1),
    "helix": lambda angle: torch.stack([angle.cos(), angle.sin(), angle / math.pi - 1], -1),
    "trefoil": lambda angle: torch.stack([angle.sin() + 2 * (2 * angle).sin(), angle.cos() - 2 * (2 * angle).cos(), -(3 * angle).sin()], -1) / 2,
}
CURVE_ERRORS = {  # RMSE and its standard deviation over three seeds
    "circle": dict(splanifold=(0.0014, 0.0009), RBF=(0.0158, 0.0113), MLP=(0.0066, 0.0039)),
    "helix": dict(splanifold=(0.0024, 0.0013), RBF=(0.0146, 0.0068), MLP=(0.0234, 0.0198)),
    "trefoil": dict(splanifold=(0.0023, 0.0004), RBF=(0.0242, 0.0194), MLP=(0.0045, 0.0011)),
}

FACTOR, HIDDEN, RIDGE, EPS = 1.05, 64, 1e-4, 1e-4
TASKS = {"cubic": dict(noise=0.07, irregular=0.0, steps=1200), "irregular": dict(noise=0.18, irregular=0.15, steps=400)}  # steps: the paper's for its MLP
ENTROPIES = {  # RMSE, bits of the quantiser, entropy-coded bits a parameter, bytes
    ("cubic", "splanifold"): (0.0232, 6, 3.71, 48.2), ("cubic", f"MLP 1x{HIDDEN}"): (0.0221, 7, 5.94, 430.4),
    ("irregular", "splanifold"): (0.4449, 4, 2.97, 38.6), ("irregular", f"MLP 1x{HIDDEN}"): (0.4409, 6, 4.70, 341.1),
}


def query_arms(K: int, M: int) -> dict:
    """{arm: (function to the output (M, N), multiply-adds a query)} for M queries of K coordinates."""
    random = torch.Generator().manual_seed(K)
    draw = lambda *shape: torch.randn(*shape, generator=random) / shape[-1] ** 0.5
    x, centres, weights = torch.rand(M, K, generator=random), torch.rand(N, K, generator=random), draw(N, N)
    controls = SplanifoldControls(draw(1, 2, N), *(draw(1, 2, N, K) for _ in range(3)))
    r, sharpness = x[:, None], 3 / K  # of exp(-sharpness |x - c|^2): about exp(-1/2) between two random points
    scaled, offset = 2 * sharpness * centres.T, -sharpness * centres.square().sum(1)
    layers = [(draw(N, width), draw(N)) for width in (K, N, N)]
    points, bases, point_tangents, base_tangents = (p[0] for p in controls)
    hermite = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]])      # powers of t by h00, h01, h10, h11
    over_sigma = torch.tensor([[1.0, 0], [-2, -1], [1, 1], [0, 0]]) / K                         # powers of t by h10 / Sigma, h11 / Sigma
    vectors = hermite @ torch.cat([points, point_tangents.mean(2)])                             # (4, N)
    matrices = torch.einsum("pc,cnk->pkn", torch.cat([hermite, over_sigma], 1), torch.cat([bases, base_tangents, point_tangents]))
    stacked, powers, one = torch.cat([vectors[:, None], matrices], 1).flatten(0, 1), torch.arange(4), torch.ones(M, 1)

    def frozen():
        t = x.mean(1, keepdim=True)
        return ((t ** powers)[:, :, None] * torch.cat([one, x - t], 1)[:, None]).flatten(1) @ stacked

    def rbf():
        exponent = torch.addmm(offset, x, scaled).sub_(sharpness * x.square().sum(1, keepdim=True))
        return exponent.exp_() @ weights

    def mlp():
        h = x
        for i, (matrix, bias) in enumerate(layers):
            h = torch.addmm(bias, h, matrix.T)
            h = h.relu_() if i < 2 else h
        return h

    return {"splanifold": (lambda: splanifold(r, controls), N * (6 * K + 4)), "splanifold, frozen": (frozen, N * (4 * K + 4)), "RBF": (rbf, N * (K + N)),
            "MLP": (mlp, N * (K + 2 * N))}


def runtime(counts: list[int], batch: int, seconds: float) -> tuple[list[dict], dict]:
    """A row for every K and arm, microseconds a query, and lines_of them."""
    arms = {M: {(K, arm): found for K in counts for arm, found in query_arms(K, M).items()} for M in (batch, 1)}
    with torch.no_grad():
        times = {M: in_turn({key: function for key, (function, _) in own.items()}, CPU, seconds) for M, own in arms.items()}
    per_query = lambda M, key: {name: times[M][key][name] * 1000 / M for name in ("median", "p20", "p80")} | dict(n=times[M][key]["n"])
    rows = [dict(K=K, arm=arm, claimed=TIMES[K][("splanifold", "RBF", "MLP").index(arm.split(",")[0])], batched=per_query(batch, (K, arm)), single=per_query(1, (K, arm)),
                 multiply_adds=multiply_adds) for (K, arm), (_, multiply_adds) in arms[1].items()]
    return rows, lines_of(rows)


def lines_of(rows: list[dict]) -> dict:
    """{arm: {"median" and "p20": the line through its batched times}}; the 20th percentile has less of what else ran on the machine."""
    points = lambda arm, name: [(row["K"], row["batched"][name]) for row in rows if row["arm"] == arm]
    return {arm: {name: line(points(arm, name)) for name in ("median", "p20")} for arm in dict.fromkeys(row["arm"] for row in rows)}


def line(points: list[tuple[float, float]]) -> dict:
    """Least squares a + b K: a and b in microseconds, the residuals' RMS in microseconds, R^2."""
    x, y = np.array(points, float).T
    slope, start = np.polyfit(x, y, 1)
    residual = y - (start + slope * x)
    return dict(start=start, slope=slope, residual=float(np.sqrt(np.mean(residual ** 2))), r2=float(1 - residual.var() / y.var()))


def adam(predict: Callable, parameters: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, rate: float, steps: int, decay: float = 0.0, keep: tuple[int, ...] = (),
         falling: bool = False) -> dict:
    """
    {step: parameters after it} for the steps to keep and the last. x (R, M, in), y (R, M, out) and every parameter (R, ..) hold R independent runs: the loss
    is the sum of their mean squares and Adam works on each number alone. falling: the rate ends at zero.
    """
    parameters, kept = [p.clone().requires_grad_() for p in parameters], {}
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
    """A tanh MLP for each run, x (R, M, in); parameters are weights (R, in, out) and biases (R, 1, out) in turn. With one pair: linear in x."""
    for i in range(0, len(parameters), 2):
        x = torch.baddbmm(parameters[i + 1], x if i == 0 else x.tanh(), parameters[i])
    return x


def network_start(widths: list[int], seeds: list[int]) -> list[torch.Tensor]:
    """PyTorch's own start of linear layers, +- 1 / sqrt(in); a run a seed."""
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = lambda rows, inputs, outputs: torch.stack([(2 * torch.rand(rows, outputs, generator=random) - 1) / inputs ** 0.5 for random in randoms])
    return [p for inputs, outputs in zip(widths, widths[1:]) for p in (uniform(inputs, inputs, outputs), uniform(1, inputs, outputs))]


def chain(parameters: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """Table 3's splanifold: points and tangents (R, S, n), t (R, M, 1) -> (R, M, n)."""
    points, tangents = parameters
    unused = torch.zeros(*points.shape, 1, dtype=points.dtype)
    # the reference: at one coordinate, 17 nodes and 128 tokens less time than splanifold, whose tokens meet every node
    out = splanifold_reference(t.transpose(0, 1), SplanifoldControls(points, unused, tangents[..., None], unused), mix="concat")
    return out.unflatten(1, points.shape[::2]).transpose(0, 1)


def least_squares(features: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """(.., M, F), (.., M, n) -> (.., F, n): the least of |features x - y|^2 + ridge |x|^2, in float64."""
    features, y = features.double(), y.double()
    eye, zeros = torch.eye(features.shape[-1], dtype=torch.float64), torch.zeros(features.shape[-1], y.shape[-1], dtype=torch.float64)
    rows = lambda a, b: torch.cat([a, b.expand(*a.shape[:-2], *b.shape)], -2)
    return torch.linalg.lstsq(rows(features, ridge ** 0.5 * eye), rows(y, zeros), driver="gelsd").solution


def unit_controls(K: int, S: int) -> SplanifoldControls:
    """Controls of S (1 + 3 K) outputs, of which each is what one of the controls of a splanifold of one output is multiplied by."""
    return controls_of(torch.eye(S * (1 + 3 * K), dtype=torch.float64), K, S)


def controls_of(solution: torch.Tensor, K: int, S: int) -> SplanifoldControls:
    """Rows (S (1 + 3 K), n) in the order of unit_controls -> one splanifold of n outputs."""
    points, *matrices = solution.split([S, S * K, S * K, S * K])
    return SplanifoldControls(points[None], *(x.unflatten(0, (S, K)).transpose(1, 2)[None] for x in matrices))


def curve_samples(seeds: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """t (R, 128, 1), noisy points (R, 128, 3), other t and their points without noise: R = curves x seeds, seeds fastest."""
    parts = []
    for curve in CURVES.values():
        for seed in seeds:
            random = torch.Generator().manual_seed(seed)
            t, other = (torch.rand(128, 1, generator=random) for _ in range(2))
            points = lambda t: curve(2 * math.pi * t[:, 0])
            parts.append((t, points(t) + CURVE_NOISE * torch.randn(128, 3, generator=random), other, points(other)))
    return tuple(map(torch.stack, zip(*parts)))


def bumps(t: torch.Tensor, centres: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Gaussians of t (R, M, 1) about centres (R, C), widths (R,) -> (R, M, C)."""
    return torch.exp(-(t - centres[:, None]).square() / (2 * width[:, None, None] ** 2))


def bump_width(t: torch.Tensor, y: torch.Tensor, centres: torch.Tensor, fit: Callable) -> torch.Tensor:
    """(R,): the best of six widths from 0.01 to 1 on the last 32 of 128 samples, after fit(features, y) -> predict(features) on the others."""
    widths, R = torch.logspace(-2, 0, 6), len(t)
    repeat = lambda x: x.repeat(6, *[1] * (x.ndim - 1))
    x, y = bumps(repeat(t), repeat(centres), widths.repeat_interleave(R)), repeat(y)
    return widths[rmse(fit(x[:, :96], y[:, :96])(x[:, 96:]), y[:, 96:]).nan_to_num(math.inf).view(6, R).argmin(0)]


def curve_arms(seeds: tuple[int, ...]) -> dict:
    """{arm: (predict, its start, features of t, or None where the RBF's width is to be chosen)}"""
    runs = [seed for _ in CURVES for seed in seeds]
    frequencies = torch.stack([4 * torch.randn(8, generator=torch.Generator().manual_seed(seed + 400)) for seed in runs])[:, None]
    waves = lambda t: torch.cat([f(2 * math.pi * t * frequencies) for f in (torch.sin, torch.cos)], -1)
    small = torch.stack([0.01 * torch.randn(CENTRES, 3, generator=torch.Generator().manual_seed(seed + 300)) for seed in runs])
    return {
        "splanifold": (chain, [torch.zeros(len(runs), SEGMENTS + 1, 3)] * 2, lambda t: t),
        "RBF": (network, [small, torch.zeros(len(runs), 1, 3)], None),
        "MLP": (network, network_start([16, 64, 64, 3], [seed + 500 for seed in runs]), waves),
        "MLP of t alone": (network, network_start([1, 64, 64, 3], [seed + 500 for seed in runs]), lambda t: 2 * t - 1),
    }


def on_the_curve() -> list[torch.Tensor]:
    """The script's start of a chain, (curves, S, 3): noise-free points at the nodes, tangents their differences by t, not by segment."""
    points = torch.stack([curve(2 * math.pi * torch.linspace(0, 1, SEGMENTS + 1)) for curve in CURVES.values()])
    return [points, torch.gradient(points, spacing=1 / SEGMENTS, dim=1)[0]]


def curves(steps: int, rates: tuple[float, ...], width_steps: int) -> list[dict]:
    """A row for every curve, arm and protocol: RMSE on the other samples, mean and standard deviation over the seeds."""
    seeds = (*SEEDS, SEARCH_SEED)
    t, y, other, truth = curve_samples(seeds)
    centres = torch.stack([torch.rand(CENTRES, generator=torch.Generator().manual_seed(seed + 100)) for _ in CURVES for seed in seeds])
    arms, rows = curve_arms(seeds), []

    def trained(arm: str, rate: float, decay: float = 0.0, start: list[torch.Tensor] | None = None, falling: bool = False) -> torch.Tensor:
        predict, blind, features = arms[arm]
        if features is None:
            def fit(x, y):
                [parameters] = adam(network, [p.repeat(6, 1, 1) for p in blind], x, y, rate, width_steps, falling=falling).values()
                return lambda x: network(parameters, x)
            width = bump_width(t, y, centres, fit)
            features = lambda t: bumps(t, centres, width)
        [parameters] = adam(predict, start or blind, features(t), y, rate, steps, decay, falling=falling).values()
        return rmse(predict(parameters, features(other)), truth).view(len(CURVES), len(seeds))

    def record(arm: str, protocol: str, errors: torch.Tensor, rate: dict | float | None):
        parameters = sum(p[0].numel() for p in arms[arm][1])
        for curve, own in zip(CURVES, errors.tolist()):
            own = own[:len(SEEDS)]
            rows.append(dict(curve=curve, arm=arm, protocol=protocol, parameters=parameters, rate=rate[curve] if isinstance(rate, dict) else rate, errors=own,
                             mean=float(np.mean(own)), std=float(np.std(own)), claimed=CURVE_ERRORS[curve].get(arm)))
        print(f"curves, {arm}, {protocol}: done", flush=True)

    known = [p.repeat_interleave(len(seeds), 0) for p in on_the_curve()]
    for arm, rate, decay, start in (("splanifold", 0.05, 0.0, known), ("RBF", 0.005, 1e-4, None), ("MLP", 0.005, 1e-4, None)):
        record(arm, "paper's protocol", trained(arm, rate, decay, start), rate)
    for arm in arms:
        errors = torch.stack([trained(arm, rate, falling=True) for rate in rates])  # (rates, curves, seeds)
        best = errors[..., -1].nan_to_num(math.inf).argmin(0)
        record(arm, "equal terms", errors[best, range(len(CURVES))], {curve: rates[i] for curve, i in zip(CURVES, best)})

    design = lambda t: splanifold_reference(t.double().flatten(0, 1)[:, None], unit_controls(1, SEGMENTS + 1)).unflatten(0, t.shape[:2])
    solve = lambda x, y: (lambda other, found=least_squares(x, y, 1e-6): other.double() @ found)
    record("splanifold", "least squares", rmse(solve(design(t), y)(design(other)), truth).view(len(CURVES), -1), None)
    width = bump_width(t, y, centres, solve)
    record("RBF", "least squares", rmse(solve(bumps(t, centres, width), y)(bumps(other, centres, width)), truth).view(len(CURVES), -1), None)
    return rows


def entropy(symbols: torch.Tensor) -> float:
    """Bits a symbol by the symbols' own histogram."""
    share = symbols.unique(return_counts=True)[1].double() / symbols.numel()
    return -(share * share.log2()).sum().item()


def adaptive_bits(symbols: torch.Tensor, levels: int) -> float:
    """Length of the Krichevsky-Trofimov code of the symbols, of `levels` kinds: nothing but them is sent."""
    counts, n = symbols.unique(return_counts=True)[1].double(), symbols.numel()
    return (math.lgamma(n + levels / 2) - math.lgamma(levels / 2) - (torch.lgamma(counts + 0.5) - math.lgamma(0.5)).sum().item()) / math.log(2)


def quantised(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x on 2^bits - 1 levels between plus and minus its largest entry, and the levels' whole numbers."""
    most = 2 ** (bits - 1) - 1
    step = x.abs().max() / most
    symbols = (x / step).round() if step > 0 else torch.zeros_like(x)
    return symbols * step, symbols.int()


def shortest(tensors: list[torch.Tensor], error_of: Callable) -> dict:
    """
    The fewest bits of the quantiser that keep error_of(tensors) within FACTOR of its value, with what they cost. RunError if 16 are too few.

    entropy: bits a parameter by every tensor's own histogram; most_possible: where no two numbers of a tensor are equal; size: the entropy in bytes;
    decodable: bytes of a code with scales and without a free histogram.
    """
    exact, total = error_of(tensors), sum(x.numel() for x in tensors)
    for bits in range(2, 17):
        values, symbols = zip(*(quantised(x, bits) for x in tensors))
        error, levels = error_of(list(values)), 2 ** bits - 1
        if error <= FACTOR * exact:
            coded = sum(x.numel() * entropy(x) for x in symbols)
            return dict(parameters=total, error=exact, quantised_error=error, bits=bits, entropy=coded / total, size=coded / 8,
                        most_possible=sum(x.numel() * math.log2(x.numel()) for x in tensors) / total,
                        decodable=sum(4 + min(bits * x.numel(), adaptive_bits(x, levels)) / 8 for x in symbols))
    raise RunError(f"16 bits leave an error of {error:.3g} where the unquantised model has {exact:.3g}")


def measured_code(tensors: list[torch.Tensor], error_of: Callable) -> dict:
    """shortest() with every tensor on its own scale, as the paper has it; decodable: that, or all numbers on one scale as one stream if shorter."""
    found, sizes = shortest(tensors, error_of), [x.numel() for x in tensors]
    parts = lambda flat: [part.view(x.shape) for part, x in zip(flat.split(sizes), tensors)]
    whole = shortest([torch.cat([x.flatten() for x in tensors])], lambda flat: error_of(parts(flat[0])))
    return found | dict(one_stream=whole["entropy"], decodable=min(found["decodable"], whole["decodable"]))


def targets(task: str, seeds: list[int]) -> tuple[torch.Tensor, ...]:
    """r (R, 256, 4), noisy y (R, 256, 4), other r, their y, and the smooth part of those y: a map of its own for every seed."""
    own, parts = TASKS[task], []
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=random)
        spine, matrices = 0.5 * draw(4, 4), 0.5 * draw(3, 4, 4)  # by powers of t
        pitch, direction, phase, waves = 1 + 3 * torch.rand(64, generator=random), draw(64, 4), 2 * math.pi * torch.rand(64, generator=random), 0.5 * draw(64, 4)
        direction = direction / direction.norm(dim=1, keepdim=True)

        def smooth(r):
            t = r.mean(1, keepdim=True)
            return t ** torch.arange(4) @ spine + torch.einsum("mp,pnk,mk->mn", t ** torch.arange(3), matrices, r - t)

        clean = lambda r: smooth(r) + own["irregular"] * torch.sin(2 * math.pi * (r @ direction.T) * pitch + phase) @ waves
        r, other = (torch.rand(256, 4, generator=random) for _ in range(2))
        parts.append((r, clean(r) + own["noise"] * draw(256, 4), other, clean(other), smooth(other)))
    return tuple(map(torch.stack, zip(*parts)))


def monomials(r: torch.Tensor, degree: int) -> torch.Tensor:
    """(M, 4) -> (M, F): every product of at most `degree` of the coordinates, scaled to [-1, 1]."""
    x = torch.cat([torch.ones_like(r[:, :1]), 2 * r - 1], 1)
    return torch.stack([x[:, list(chosen)].prod(1) for chosen in torch.combinations(torch.arange(5), degree, with_replacement=True).tolist()], 1)


def splanifold_model(r, y, other, truth) -> tuple[list[torch.Tensor], Callable]:
    """The least-squares fit of a splanifold of two nodes: its tensors, of each node apart as the paper has them, and their error."""
    design = splanifold_reference(r.double()[:, None], unit_controls(4, 2), eps=EPS)
    controls = controls_of(least_squares(design, y, RIDGE), 4, 2)

    def error_of(tensors):
        whole = SplanifoldControls(*(torch.stack(nodes)[None] for nodes in zip(tensors[::2], tensors[1::2])))
        return rmse(splanifold_reference(other.double()[:, None], whole, eps=EPS)[None], truth[None]).item()
    return [node for x in controls for node in x[0]], error_of


def spine_monomials(r: torch.Tensor) -> torch.Tensor:
    """(M, 4) -> (M, 16): t^p and t^p delta_k, t scaled to [-1, 1], k but the last, as delta sums to zero."""
    t = r.mean(1, keepdim=True)
    return ((2 * t - 1) ** torch.arange(4)[:, None, None] * torch.cat([torch.ones_like(t), (r - t)[:, :3]], 1)).transpose(0, 1).flatten(1)


def linear_model(r, y, other, truth, features) -> tuple[list[torch.Tensor], Callable]:
    found = least_squares(features(r), y, RIDGE)
    return [found], lambda x: rmse((features(other).double() @ x[0])[None], truth[None]).item()


def network_model(parameters: list[torch.Tensor], run: int, other, truth) -> tuple[list[torch.Tensor], Callable]:
    return [p[run] for p in parameters], lambda x: rmse(network([p[None] for p in x], other[None]), truth[None]).item()


def densities(seeds: list[int], steps: tuple[int, ...], hidden: tuple[int, ...], rates: tuple[float, ...]) -> tuple[list[dict], dict]:
    """
    A row for every task and model, means over the seeds, and {task: RMSE of the target's smooth part known exactly}.

    Beside the paper's MLP two smaller ones: with the fewest hidden units whose mean error, at the best rate and number of steps, is within FACTOR of the
    splanifold's and of the paper's MLP's; where none is, the most accurate. Chosen, as the quantiser's bits are, on the samples that the error is told of.
    """
    rows, smooth_alone = [], {}
    for task, own in TASKS.items():
        samples = r, y, other, truth, smooth = targets(task, seeds)
        smooth_alone[task] = rmse(smooth, truth).mean().item()
        runs = [[x[i] for x in samples[:4]] for i in range(len(seeds))]
        models = {"splanifold": [splanifold_model(*run) for run in runs], "its 16 polynomials": [linear_model(*run, spine_monomials) for run in runs]}
        paper = adam(network, network_start([4, HIDDEN, 4], seeds), r, y, 0.01, min(own["steps"], max(steps)), 1e-4)
        models[f"MLP 1x{HIDDEN}"] = [network_model(*paper.values(), i, other[i], truth[i]) for i in range(len(seeds))]
        best = {}
        for width in hidden:
            fits = [parameters for rate in rates for parameters in adam(network, network_start([4, width, 4], seeds), r, y, rate, max(steps), keep=steps).values()]
            errors = [rmse(network(parameters, other), truth).mean().nan_to_num(math.inf).item() for parameters in fits]
            best[width] = min(errors), fits[int(np.argmin(errors))]
        for peer in ("splanifold", f"MLP 1x{HIDDEN}"):
            wanted = FACTOR * np.mean([error_of(tensors) for tensors, error_of in models[peer]])
            enough = [width for width in hidden if best[width][0] <= wanted]
            width = min(enough, default=min(hidden, key=lambda width: best[width][0]))
            name = f"MLP 1x{width}, {'as good as' if enough else 'nearest to'} the {peer}"
            models[name] = [network_model(best[width][1], i, other[i], truth[i]) for i in range(len(seeds))]
        for degree in (1, 2, 3):
            models[f"polynomial of degree {degree}"] = [linear_model(*run, lambda r, degree=degree: monomials(r, degree)) for run in runs]
        for model, fitted in models.items():
            found = [measured_code(*one) for one in fitted]
            rows.append(dict(task=task, model=model, claimed=ENTROPIES.get((task, model)), seeds=len(seeds), error_std=float(np.std([one["error"] for one in found])))
                        | {key: float(np.mean([one[key] for one in found])) for key in found[0]})
        print(f"bits, {task}: done", flush=True)
    return rows, smooth_alone


def shown(results: dict) -> str:
    """The three tables, claimed beside measured, as Markdown."""
    time = lambda x: f"{x['median']:.3g} ({x['p20']:.3g} to {x['p80']:.3g}, n {x['n']:,})"
    lines = markdown([{"batched, us = a + b K": arm, "of": dict(median="medians", p20="20th percentiles")[name], "a": f"{x['start']:.2f}", "b": f"{x['slope']:.4f}",
                       "residuals' RMS, us": f"{x['residual']:.2g}", "R^2": f"{x['r2']:.4f}"} for arm, own in results["lines"].items() for name, x in own.items()])
    spread = lambda mean, std: f"{mean:.4f} ± {std:.4f}"
    claim = lambda row, i, form="{}": form.format(row["claimed"][i]) if row["claimed"] else "-"
    runtime_table = markdown([{"K": row["K"], "arm": row["arm"], "claimed, us a query": row["claimed"],
                               f"measured, {results['batch']:,} at once (20 to 80 %)": time(row["batched"]),
                               "measured, one at a time": time(row["single"]), "multiply-adds": f"{row['multiply_adds']:,}"} for row in results["runtime"]])
    curve_table = markdown([{"curve": row["curve"], "arm": row["arm"], "parameters": row["parameters"],
                             "claimed RMSE": spread(*row["claimed"]) if row["claimed"] else "-",
                             "measured": spread(row["mean"], row["std"]), "protocol": row["protocol"], "rate": row["rate"] or "-"}
                            for row in sorted(results["curves"], key=lambda row: list(CURVES).index(row["curve"]))])
    entropy_table = markdown([{"target": row["task"], "model": row["model"], "parameters": f"{row['parameters']:.0f}", "claimed RMSE": claim(row, 0),
                               "measured": spread(row["error"], row["error_std"]), "claimed bits": claim(row, 2), "bits a parameter": f"{row['entropy']:.2f}",
                               "most possible": f"{row['most_possible']:.2f}", "as one stream": f"{row['one_stream']:.2f}", "claimed bytes": claim(row, 3),
                               "bytes": f"{row['size']:.1f}", "decodable bytes": f"{row['decodable']:.0f}"} for row in results["densities"]])
    alone = ", ".join(f"{task} {error:.4f}" for task, error in results["smooth_alone"].items())
    return f"""Table 2: time of a query, {N} outputs, one CPU thread

{runtime_table}

{lines}

Table 3: curves, {results['steps']:,} steps of Adam, {len(SEEDS)} seeds (mean ± standard deviation)

{curve_table}

Table 4: bits a parameter, quantised within {FACTOR} of the unquantised error, {results['densities'][0]['seeds']} targets (means; of the error ± standard deviation)

{entropy_table}

RMSE of the smooth part of the target known exactly: {alone}."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run of every part")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each arm, K and batch (1)")
    parser.add_argument("--output", type=Path, help="JSON file, beside which the tables go as .md (default: benchmarks/results/)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    quick = given.quick
    try:
        require_tests(TESTS)
        results = describe(CPU) | dict(threads=1, dtype="float32", quick=quick, batch=BATCH, steps=50 if quick else 2000)
        results["runtime"], results["lines"] = runtime([2, 4, 8] if quick else list(TIMES), results["batch"], 0.01 if quick else given.seconds)
        results["curves"] = curves(results["steps"], RATES[-2:] if quick else RATES, 20 if quick else 500)
        results["densities"], results["smooth_alone"] = densities([0, 1], (30,), (2, 4), (0.03,)) if quick else densities(
            list(range(5)), steps=(400, 1200, 2000), hidden=(2, 3, 4, 6, 8, 12, 16, 24, 32), rates=(0.003, 0.01, 0.03))
        path = save("splanifold_claims", results, given.output)
    except RunError as error:
        print(f"splanifold_claims.py: error: {error}", file=sys.stderr)
        return 1
    tables = shown(results)
    path.with_suffix(".md").write_text(tables + "\n")
    print(f"\n{tables}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
