"""
Are probability maps without exponentials less over-confident than softmax? A classifier with each of them. How fast
they are is benchmarks/probability_maps.py's question.

    python -m studies.probability_maps             minutes of one core
    python -m studies.probability_maps --quick     a reduced run: proves that it runs, measures nothing

scikit-learn's digits (1,797 images of 8 x 8; 1,000 to train, 297 to choose rates and temperatures, 500 to test, drawn
anew for each seed and the same for all arms), 64-128-64-10 with batch normalisation and GELU, Adam, every arm with the
rate of three that has the lowest validation loss on two other seeds. Arms: a map as the last layer and a loss on its
probabilities, clamped to 1e-12: cross-entropy, Brier, focal (gamma 2), cross-entropy + 0.1 Jensen-Shannon divergence
from the uniform distribution. Beside them softmax with the logarithm taken before the exponential, softmax with a
learned temperature, and that first one with a temperature fitted afterwards on the validation images, which is what a
claim of less over-confidence has to beat, in both loss and calibration error.
Measured on the test images: accuracy, loss (NLL), Brier score, calibration error (ECE: 15 bins of equal mass by the
largest probability), the same averaged over classes, mean largest probability, and how well it tells digits from digits
with shuffled pixels (AUROC). Differences are paired by seed, 95 % by Student's t.

Source: the claim is lof310/projects' of an unpublished normaliser; temperature scaling and ECE: Guo et al., 2017,
arxiv.org/abs/1706.04599; equal-mass bins: Nixon et al., 2019, arxiv.org/abs/1904.01685
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import describe, markdown, require_tests
from data.command_line import run_script
from kernels.probability_maps import MAPS, probability_map
from studies import build_parser, load_digits, save
from train_gpt import require

TESTS = ["tests/kernels/test_probability_maps.py"]
RATES = (1e-3, 3e-3, 1e-2)
CHOICE_SEEDS = (101, 102)
BINS = 15
LEAST = 1e-12  # a probability whose logarithm is taken
LOSSES = ("cross-entropy", "Brier", "focal", "cross-entropy + JSD")
HONEST, LEARNED, FITTED = "log-softmax", "softmax, temperature learned", "log-softmax, temperature fitted"


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """train, choice, test -> images (n, 64) in [-1, 1], classes (n,). RunError without scikit-learn."""
    images, classes = load_digits(np.random.default_rng(seed))
    images = torch.tensor(images / 8 - 1, dtype=torch.float32)
    rows = dict(train=slice(0, 1000), choice=slice(1000, 1297), test=slice(1297, None))
    return {name: (images[some], torch.tensor(classes[some])) for name, some in rows.items()}


def network(seed: int) -> nn.Sequential:
    """64-128-64-10, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(),
                         nn.Linear(128, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 10))


def log_of(p: Tensor) -> Tensor:
    """The logarithm of probabilities, bounded below."""
    return p.clamp_min(LEAST).log()


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Kullback and Leibler's of rows a from b (n, 10), the mean."""
    return (a * (log_of(a) - log_of(b))).sum(1).mean()


def loss_of(name: str, p: Tensor, classes: Tensor) -> Tensor:
    """The loss of this name on probabilities p (n, 10)."""
    if name == "Brier":
        return (p - F.one_hot(classes, p.shape[1])).square().sum(1).mean()
    right = p.gather(1, classes[:, None])[:, 0]
    if name == "focal":
        return -((1 - right).square() * log_of(right)).mean()
    loss = -log_of(right).mean()
    if name == "cross-entropy + JSD":
        uniform = torch.full_like(p, 1 / p.shape[1])
        middle = (p + uniform) / 2
        loss = loss + 0.1 * (divergence(p, middle) + divergence(uniform, middle)) / 2
    return loss


class Classifier:
    """Trained on a seed's digits. arm: a map's name, HONEST or LEARNED."""

    def __init__(self, arm: str, loss: str, rate: float, seed: int, epochs: int):
        self.arm = arm
        self.network = network(seed)
        self.log_temperature = torch.zeros((), requires_grad=arm == LEARNED)

        # every rate falls linearly to zero
        images, classes = digits(seed)["train"]
        parameters = [*self.network.parameters()] + ([self.log_temperature] if arm == LEARNED else [])
        optimizer = torch.optim.Adam(parameters, lr=rate)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - epoch / epochs)
            for rows in torch.randperm(len(images), generator=generator).split(100):
                scores = self.network(images[rows])
                if arm == HONEST:
                    value = F.cross_entropy(scores, classes[rows])
                else:
                    value = loss_of(loss, self.probabilities(scores), classes[rows])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        self.network.eval()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of scores (n, 10), by the arm's map."""
        if self.arm in (HONEST, LEARNED):
            return torch.softmax(scores * torch.exp(-self.log_temperature), -1)
        return probability_map(scores, self.arm)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.probabilities(self.network(images))

    @torch.no_grad()
    def fit_temperature(self, images: Tensor, classes: Tensor):
        """By the loss on these images, to a thousandth of its logarithm: it has one minimum."""
        scores = self.network(images)
        low, high = -4.0, 4.0

        def loss_at(t: float) -> float:
            return F.cross_entropy(scores * np.exp(-t), classes).item()

        while high - low > 1e-3:
            first, second = low + (high - low) / 3, high - (high - low) / 3
            low, high = (low, second) if loss_at(first) < loss_at(second) else (first, high)
        self.log_temperature = torch.tensor((low + high) / 2)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Mean |share right - mean confidence| over bins of equal mass, weighted by their mass; confidence, right (n,)."""
    order = confidence.argsort()
    pairs = zip(confidence[order].double().tensor_split(bins), right[order].double().tensor_split(bins))
    gaps = [len(some) * (some.mean() - hits.mean()).abs().item() for some, hits in pairs if len(some)]
    return sum(gaps) / len(confidence)


def auroc(higher: Tensor, lower: Tensor) -> float:
    """The chance that a draw of the first exceeds one of the second; a tie counts half."""
    gap = higher[:, None] - lower[None]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


def measures(model: Classifier, images: Tensor, classes: Tensor, seed: int) -> dict[str, float]:
    """All that is measured of a classifier on these images."""
    p = model(images)
    confidence, guess = p.max(1)
    shuffled = images[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    per_class = [calibration_error(p[:, c], classes == c) for c in range(p.shape[1])]
    return dict(accuracy=(guess == classes).double().mean().item(), nll=F.nll_loss(log_of(p), classes).item(),
                brier=loss_of("Brier", p, classes).item(), ece=calibration_error(confidence, guess == classes),
                class_ece=sum(per_class) / len(per_class), confidence=confidence.mean().item(),
                auroc=auroc(confidence, model(shuffled).max(1).values))


def arms() -> list[tuple[str, str]]:
    """(name, loss) of every arm."""
    return [(HONEST, LOSSES[0]), (FITTED, LOSSES[0]), (LEARNED, LOSSES[0])] + [
        (name, loss) for loss in LOSSES for name in MAPS]


def compare(seeds: int, epochs: int, rates=RATES, choice_seeds=CHOICE_SEEDS) -> list[dict]:
    """
    A row for each arm: the rate chosen, lists of all measures over the seeds, and the paired differences from FITTED in
    nll and ece.
    """
    rows = []
    for name, loss in arms():
        def train(rate: float, seed: int, arm: str = HONEST if name == FITTED else name, loss: str = loss):
            return Classifier(arm, loss, rate, seed, epochs)

        # the rate
        losses = {}
        for rate in rates:
            results = [measures(train(rate, seed), *digits(seed)["choice"], seed) for seed in choice_seeds]
            losses[rate] = np.mean([result["nll"] for result in results])
        rate = min(losses, key=losses.get)

        # the reported seeds
        results = []
        for seed in range(1, seeds + 1):
            model = train(rate, seed)
            if name == FITTED:
                model.fit_temperature(*digits(seed)["choice"])
            results.append(measures(model, *digits(seed)["test"], seed))
        lists = {key: [result[key] for result in results] for key in results[0]}
        rows.append(dict(map=name, loss=loss, rate=rate) | lists)

    control = next(row for row in rows if row["map"] == FITTED)
    for row in rows:
        row["against_fitted"] = {key: interval(np.subtract(row[key], control[key])) for key in ("nll", "ece")}
    return rows


def interval(differences: np.ndarray) -> dict:
    """Mean and the bounds that hold it with 95 % confidence."""
    from scipy.stats import t
    n, mean = len(differences), float(np.mean(differences))
    half = float(t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / n ** 0.5)
    return dict(mean=mean, low=mean - half, high=mean + half)


def shown(rows: list[dict]) -> str:
    """The rows as Markdown, means and standard deviations over the seeds."""
    def number(values: list[float], digits: int = 3) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"

    def change(gap: dict) -> str:
        return f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"

    return markdown([{
        "map": row["map"], "loss": row["loss"], "rate": row["rate"], "accuracy": number(row["accuracy"]),
        "NLL": number(row["nll"]), "Brier": number(row["brier"]), "ECE": number(row["ece"]),
        "by class": number(row["class_ece"], 4), "mean confidence": number(row["confidence"]),
        "AUROC": number(row["auroc"]), "NLL - fitted": change(row["against_fitted"]["nll"]),
        "ECE - fitted": change(row["against_fitted"]["ece"])} for row in rows])


def verdict(rows: list[dict]) -> str:
    """What the rows say of the claim, in one line."""
    better = [f"{row['map']} with {row['loss']}" for row in rows if row["map"] in MAPS and row["map"] != "softmax"
              and all(row["against_fitted"][key]["high"] < 0 for key in ("nll", "ece"))]
    return ("less over-confident than softmax with a fitted temperature, in loss and calibration error: "
            + (", ".join(better) or "none"))


def run(options: argparse.Namespace):
    """Train and measure all arms, write and print."""
    require(options.seeds >= 2 and options.epochs >= 1,
            f"--seeds must be at least 2 and --epochs at least 1, got {options.seeds} and {options.epochs}")
    require_tests(*TESTS)
    if options.quick:
        rows = compare(2, 1, RATES[1:2], CHOICE_SEEDS[:1])
    else:
        rows = compare(options.seeds, options.epochs)
    facts = describe(torch.device("cpu")) | dict(quick=options.quick, epochs=options.epochs, confidence=rows)
    path = save("probability_maps", facts, options.output)
    print(f"{shown(rows)}\n\n{verdict(rows)}\n{path}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = build_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="reported runs an arm (10)")
    parser.add_argument("--epochs", type=int, default=40, help="of a run (40)")
    options = parser.parse_args(argv)
    return run_script("probability_maps.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
