"""
Are probability maps without exponentials less over-confident than softmax, and faster? A classifier for the one, rows of scores for the other.

    python benchmarks/probability_maps.py             both (minutes of one core)
    python benchmarks/probability_maps.py --quick     a reduced run of every part: proves that they run, measures nothing

Confidence: scikit-learn's digits (1,797 images of 8 x 8; 1,000 to train, 297 to choose rates and temperatures, 500 to test, drawn anew for each seed and the same
for all arms), 64-128-64-10 with batch normalisation and GELU, Adam, every arm with the rate of three that has the lowest validation loss on two other seeds.
Arms: a map as the last layer and a loss on its probabilities, clamped to 1e-12: cross-entropy, Brier, focal (gamma 2), cross-entropy + 0.1 Jensen-Shannon
divergence from the uniform distribution. Beside them softmax with the logarithm taken before the exponential, softmax with a learned temperature, and that first
one with a temperature fitted afterwards on the validation images, which is what a claim of less over-confidence has to beat, in both loss and calibration error.
Measured on the test images: accuracy, loss (NLL), Brier score, calibration error (ECE: 15 bins of equal mass by the largest probability), the same averaged over
classes, mean largest probability, and how well it tells digits from digits with shuffled pixels (AUROC). Differences are paired by seed, 95 % by Student's t.

Speed: p = map(x) for 2^22 scores in rows of n, eager and compiled, each against softmax of the same kind; forward, and forward + backward.

Source: the claims are lof310/projects' of an unpublished normaliser; temperature scaling and ECE: Guo et al., 2017, arxiv.org/abs/1706.04599; equal-mass bins: Nixon et al., 2019,
arxiv.org/abs/1904.01685
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import describe, in_turn, markdown, require_tests, save
from kernels.probability_maps import MAPS, probability_map
from train_gpt import RunError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = ["tests/kernels/test_probability_maps.py"]
RATES, CHOICE_SEEDS, BINS, LEAST = (1e-3, 3e-3, 1e-2), (101, 102), 15, 1e-12
LOSSES = ("cross-entropy", "Brier", "focal", "cross-entropy + JSD")
HONEST, LEARNED, FITTED = "log-softmax", "softmax, temperature learned", "log-softmax, temperature fitted"
SIZES = (16, 64, 256, 1024, 50_257)


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """part -> images (n, 64) in [-1, 1], classes (n,). RunError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RunError("the digits come with scikit-learn, which is not installed; pip install scikit-learn") from None
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, classes = torch.tensor(images[order] / 8 - 1, dtype=torch.float32), torch.tensor(classes[order])
    return {part: (images[rows], classes[rows]) for part, rows in dict(train=slice(0, 1000), choice=slice(1000, 1297), test=slice(1297, None)).items()}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))


def loss_of(name: str, p: Tensor, classes: Tensor) -> Tensor:
    """The loss named on probabilities p (n, 10)."""
    log = lambda q: q.clamp_min(LEAST).log()
    own = p.gather(1, classes[:, None])[:, 0]
    if name == "Brier":
        return (p - F.one_hot(classes, p.shape[1])).square().sum(1).mean()
    if name == "focal":
        return -((1 - own).square() * log(own)).mean()
    loss = -log(own).mean()
    if name == "cross-entropy + JSD":
        uniform = torch.full_like(p, 1 / p.shape[1])
        middle = (p + uniform) / 2
        kl = lambda a, b: (a * (log(a) - log(b))).sum(1).mean()
        loss = loss + 0.1 * (kl(p, middle) + kl(uniform, middle)) / 2
    return loss


class Classifier:
    """Trained on a seed's digits. arm: a map's name, HONEST or LEARNED."""
    def __init__(self, arm: str, loss: str, rate: float, seed: int, epochs: int):
        self.arm, self.network, self.log_temperature = arm, network(seed), torch.zeros((), requires_grad=arm == LEARNED)
        images, classes = digits(seed)["train"]
        optimizer = torch.optim.Adam([*self.network.parameters()] + [self.log_temperature] * (arm == LEARNED), lr=rate)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - epoch / epochs)
            for rows in torch.randperm(len(images), generator=generator).split(100):
                scores, own = self.network(images[rows]), classes[rows]
                value = F.cross_entropy(scores, own) if arm == HONEST else loss_of(loss, self.probabilities(scores), own)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        self.network.eval()

    def probabilities(self, scores: Tensor) -> Tensor:
        if self.arm in (HONEST, LEARNED):
            return torch.softmax(scores * torch.exp(-self.log_temperature), -1)
        return probability_map(scores, self.arm)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.probabilities(self.network(images))

    @torch.no_grad()
    def fit_temperature(self, images: Tensor, classes: Tensor):
        """By the loss on these images, to a thousandth of its logarithm: it has one minimum."""
        scores, low, high = self.network(images), -4.0, 4.0
        at = lambda t: F.cross_entropy(scores * np.exp(-t), classes).item()
        while high - low > 1e-3:
            first, second = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, second) if at(first) < at(second) else (first, high)
        self.log_temperature = torch.tensor((low + high) / 2)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Mean |share right - mean confidence| over bins of equal mass, weighted by their mass; confidence, right (n,)."""
    order = confidence.argsort()
    parts = zip(confidence[order].double().tensor_split(bins), right[order].double().tensor_split(bins))
    return sum(len(own) * (own.mean() - hits.mean()).abs().item() for own, hits in parts if len(own)) / len(confidence)


def auroc(higher: Tensor, lower: Tensor) -> float:
    """The chance that a draw of the first exceeds one of the second; a tie counts half."""
    gap = higher[:, None] - lower[None]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def measures(model: Classifier, images: Tensor, classes: Tensor, seed: int) -> dict[str, float]:
    p = model(images)
    confidence, guess = p.max(1)
    shuffled = images[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    per_class = [calibration_error(p[:, c], classes == c) for c in range(p.shape[1])]
    return dict(accuracy=(guess == classes).double().mean().item(), nll=F.nll_loss(p.clamp_min(LEAST).log(), classes).item(), brier=loss_of("Brier", p, classes).item(),
                ece=calibration_error(confidence, guess == classes), class_ece=sum(per_class) / len(per_class), confidence=confidence.mean().item(),
                auroc=auroc(confidence, model(shuffled).max(1).values))


def arms() -> list[tuple[str, str]]:
    return [(HONEST, LOSSES[0]), (FITTED, LOSSES[0]), (LEARNED, LOSSES[0])] + [(name, loss) for loss in LOSSES for name in MAPS]


def confidence(seeds: int, epochs: int, rates=RATES, choice_seeds=CHOICE_SEEDS) -> list[dict]:
    """A row for each arm: the rate chosen, lists of all measures over the seeds, and the paired differences from FITTED in nll and ece."""
    rows = []
    for name, loss in arms():
        trained = HONEST if name == FITTED else name
        def at(rate, seed, trained=trained, loss=loss):
            return Classifier(trained, loss, rate, seed, epochs)
        validation = {rate: np.mean([measures(at(rate, seed), *digits(seed)["choice"], seed)["nll"] for seed in choice_seeds]) for rate in rates}
        rate, results = min(validation, key=validation.get), []
        for seed in range(1, seeds + 1):
            model = at(rate, seed)
            if name == FITTED:
                model.fit_temperature(*digits(seed)["choice"])
            results.append(measures(model, *digits(seed)["test"], seed))
        rows.append(dict(map=name, loss=loss, rate=rate) | {key: [result[key] for result in results] for key in results[0]})
    control = next(row for row in rows if row["map"] == FITTED)
    for row in rows:
        row["against_fitted"] = {key: interval(np.subtract(row[key], control[key])) for key in ("nll", "ece")}
    return rows


def interval(differences: np.ndarray) -> dict:
    """Mean and the bounds that hold it with 95 % confidence."""
    from scipy.stats import t
    mean, half = float(np.mean(differences)), float(t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / len(differences) ** 0.5)
    return dict(mean=mean, low=mean - half, high=mean + half)


def speed(device: torch.device, sizes=SIZES, numbers: int = 1 << 22, seconds: float = 0.5, compiled: bool = True) -> list[dict]:
    """A row for each size, map and kind: milliseconds forward and forward + backward."""
    rows = []
    torch._dynamo.config.recompile_limit = 64  # one function's code stands for all maps: beyond the limit it would run eagerly, called compiled
    for n in sizes:
        x = torch.randn(max(1, numbers // n), n, device=device, requires_grad=True)
        grad = torch.randn_like(x)
        for kind in ("eager", "compiled")[:1 + compiled]:
            functions = {}
            for name in MAPS if kind == "eager" else ("softmax", "max_shift_rational", "stablemax", "squareplus"):
                function = lambda x, name=name: probability_map(x, name)
                function = torch.compile(function, dynamic=False) if kind == "compiled" else function
                functions[f"{name}, forward"] = lambda function=function: function(x.detach())
                functions[f"{name}, both"] = lambda function=function: torch.autograd.grad(function(x), x, grad)
            found = in_turn(functions, device, seconds)
            rows += [dict(n=n, kind=kind, map=arm.rpartition(", ")[0], part=arm.rpartition(", ")[2], ms=result) for arm, result in found.items()]
    return rows


def shown_confidence(rows: list[dict]) -> str:
    number = lambda values, digits=3: f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
    change = lambda gap: f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
    return markdown([{"map": row["map"], "loss": row["loss"], "rate": row["rate"], "accuracy": number(row["accuracy"]), "NLL": number(row["nll"]), "Brier": number(row["brier"]),
                      "ECE": number(row["ece"]), "by class": number(row["class_ece"], 4), "mean confidence": number(row["confidence"]), "AUROC": number(row["auroc"]),
                      "NLL - fitted": change(row["against_fitted"]["nll"]), "ECE - fitted": change(row["against_fitted"]["ece"])} for row in rows])


def shown_speed(rows: list[dict]) -> str:
    time = lambda row: row["ms"]["median"] if isinstance(row["ms"], dict) else float("nan")
    softmax = {(row["n"], row["kind"], row["part"]): time(row) for row in rows if row["map"] == "softmax"}
    parts = {}
    for row in rows:
        cell = f"{time(row):.3g} ms ({time(row) / softmax[row['n'], row['kind'], row['part']]:.2f})"
        parts.setdefault((row["n"], row["kind"], row["map"]), {})[row["part"]] = cell
    return markdown([{"n": n, "kind": kind, "map": name, "forward (against softmax)": cells["forward"], "forward + backward": cells["both"]} for (n, kind, name), cells in parts.items()])


def verdict(rows: list[dict]) -> str:
    """What the rows say of the claim, in one line."""
    better = [f"{row['map']} with {row['loss']}" for row in rows if row["map"] in MAPS and row["map"] != "softmax"
              and all(row["against_fitted"][key]["high"] < 0 for key in ("nll", "ece"))]
    return ("less over-confident than softmax with a fitted temperature, in loss and calibration error: " + (", ".join(better) or "none"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run that proves nothing but that it runs")
    parser.add_argument("--seeds", type=int, default=10, help="reported runs an arm (10)")
    parser.add_argument("--epochs", type=int, default=40, help="of a run (40)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if given.seeds < 2 or given.epochs < 1:
            raise RunError(f"--seeds must be at least 2 and --epochs at least 1, got {given.seeds} and {given.epochs}")
        require_tests(*TESTS)
        rows = confidence(2, 1, RATES[1:2], CHOICE_SEEDS[:1]) if given.quick else confidence(given.seeds, given.epochs)
        times = speed(device, SIZES[:1], 1 << 12, 0.001, compiled=False) if given.quick else speed(device)
        path = save("probability_maps", describe(device) | dict(quick=given.quick, epochs=given.epochs, confidence=rows, speed=times), given.output)
    except RunError as error:
        print(f"probability_maps.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{shown_confidence(rows)}\n\n{shown_speed(times)}\n\n{verdict(rows)}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
