"""
Gradient conditioning on images: does a network conditioned by any of the families end better than one whose learning
rates were tuned, and flatter?

    python -m studies.gradient_conditioning             all of it (minutes of one core)
    python -m studies.gradient_conditioning --quick     a reduced run: proves that it runs, measures nothing

scikit-learn's digits, 8 x 8: 640 images to train, 400 to choose settings by, 757 to report. Two convolutions of stride
2 and two linear layers, 13,706 parameters, batches of 32, 10 epochs, constant rates, no augmentation. Biases are not
conditioned. Published, without code, seeds or values: two CNNs of about 1M parameters on CIFAR-10, test accuracy 38.3
-> 45.5 % and 42.9 -> 53.1 %, at lr 0.01 and momentum 0.9 for both arms.

Every arm searches alike, by the mean loss on the 400 images over seeds of the search alone: its 7 learning rates times
2 momenta, then its settings one after another, then rates and momenta again. The best goes on to the reported seeds,
and so do lr 0.01 and momentum 0.9 with the arm's settings. Arms share a seed's initial tensors and order of the data,
so differences are paired; an arm that a search leaves at a = 1, b = 0 is SGDm. AdamW's momentum is its first beta. A
diverged run's loss is 100.

Flatness is measured where the loss on all training images first is at most 0.05, in coordinates w + D u, D the norm of
an entry's filter, 0 for biases: the largest eigenvalue and the trace of D H D (power iteration, Hutchinson) and the
largest rise of the loss over |u| <= 0.05 (projected ascent).
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import describe, markdown, require_tests
from data.command_line import run_script
from studies import build_parser, load_digits, save
from train_gpt import Config, Ranks
from variants.gradient_conditioning import Options, build

TESTS = "tests/variants/test_gradient_conditioning.py"
CPU = torch.device("cpu")
PUBLISHED = dict(lr=0.01, momentum=0.9)
WEIGHTS = ("0.weight", "2.weight", "5.weight", "7.weight")


# ---- Arms


@dataclass
class Arm:
    """An optimizer with settings to search. They are those of the arm, beside rate and momentum, by name."""
    options: Callable[[dict], dict] = lambda settings: {}  # the variant's, of settings; base "adamw" is PyTorch's
    start: dict = field(default_factory=dict)              # setting -> its value at first
    search: dict = field(default_factory=dict)             # setting -> the values that it is tried at
    conditioned: bool = False  # a G + b and more than a constant rate for each tensor: what the claim could mean


def table_of(settings: dict) -> dict:
    """Neutral settings, here and below, make no option: equal runs have equal options, and are made once."""
    pairs = {name: (settings[f"a {name}"], settings.get(f"b {name}", 0)) for name in WEIGHTS}
    table = ";".join(f"{name}/{a:g}/{b:g}" for name, (a, b) in pairs.items() if (a, b) != (1, 0))
    return dict(source="table", table=table) if table else {}


def structural_of(settings: dict) -> dict:
    chosen = {name: value for name, value in settings.items() if value}
    return dict(source="structural", **chosen) if chosen else {}


def learned(learn: str, start: float, rates: tuple) -> Arm:
    """The variant's hypergradient, of scales, of shifts or of both; its rate rho is searched."""
    return Arm(lambda settings: dict(source="hypergradient", learn=learn, **settings), dict(rho=start), dict(rho=rates),
               True)


SCALES = {f"a {name}": (1 / 3, 3) for name in WEIGHTS}
SHIFTS = {f"b {name}": (-1e-3, -1e-4, 1e-4, 1e-3) for name in WEIGHTS}
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1)
SHIFT_RATES = (1e-7, 1e-6, 1e-5, *RATES)  # the derivative by a shift sums over a whole tensor
FORM = dict(p=(-0.5, 0.5), q=(-0.25, 0.25), r=(-1, 1))
SHIFT = dict(beta0=(-1e-2, -1e-3, -1e-4, -1e-5, 1e-5, 1e-4, 1e-3, 1e-2))
ARMS = {
    "SGDm": Arm(),
    "per-tensor lr": Arm(table_of, dict.fromkeys(SCALES, 1.0), SCALES),
    "table": Arm(table_of, dict.fromkeys(SCALES, 1.0) | dict.fromkeys(SHIFTS, 0.0), SCALES | SHIFTS, True),
    "structural": Arm(structural_of, dict.fromkeys(FORM | SHIFT, 0.0), FORM | SHIFT, True),
    "structural, scale only": Arm(structural_of, dict.fromkeys(FORM, 0.0), FORM),
    "shift only": Arm(structural_of, dict.fromkeys(SHIFT, 0.0), SHIFT, True),
    "hypergradient": learned("both", 1e-5, SHIFT_RATES),
    "hypergradient, scale only": learned("scale", 1e-3, RATES),
    "hypergradient, shift only": learned("shift", 1e-5, SHIFT_RATES),
    **{source: Arm(lambda settings, source=source: dict(source=source))
       for source in ("centralize", "normalize", "trust", "orthograd")},
    "AdamW": Arm(lambda settings: dict(base="adamw")),
}


# ---- Runs


@dataclass
class Protocol:
    """How much of everything."""
    data: dict                                                # train, choose, test: (images (n, 1, 8, 8), labels (n,))
    rates: tuple = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    momenta: tuple = (0.0, 0.9)
    epochs: int = 10
    search_seeds: tuple = (1000, 1001)
    seeds: tuple = tuple(range(8))                            # the reported ones
    products: int = 40                                        # with the Hessian, for each figure
    target: float = 0.05                                      # training loss at which flatness is measured


def digits() -> dict:
    """A Protocol's data. RunError without scikit-learn."""
    images, labels = load_digits(np.random.default_rng(0))
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    x = (x - x[:640].mean()) / x[:640].std()
    rows = dict(train=slice(640), choose=slice(640, 1040), test=slice(1040, None))
    return {name: (x[some], y[some]) for name, some in rows.items()}


def network(seed: int) -> nn.Sequential:
    """The CNN, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
                             nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                             nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def stepper(model: nn.Module, options: dict) -> Callable[[], None]:
    """What applies the gradients and clears them."""
    if options.get("base") == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"], betas=(options["momentum"], 0.999))

        def step():
            optimizer.step()
            optimizer.zero_grad()
        return step
    optimizer, = build(model, Config(), Ranks(0, 1, CPU, torch.float32), Options(**options), None)
    return lambda: optimizer.step(1.0, 0.0)


def batches(count: int, epochs: int, seed: int, size: int = 32) -> Iterator[Tensor]:
    """Indices of a batch's images, in another order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """Mean loss, at most 100, and accuracy in %."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels).item()
    accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    return dict(loss=min(loss, 100.0) if math.isfinite(loss) else 100.0, accuracy=accuracy)


def train(options: dict, seed: int, protocol: Protocol) -> dict:
    """
    {train, choose, test: loss, accuracy in %}, and of each weight tensor |W - W0| / |W0| (moved) and mean(W) - mean(W0)
    (drift).
    """
    model, (images, labels) = network(seed), protocol.data["train"]
    start = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    step = stepper(model, options)
    for batch in batches(len(labels), protocol.epochs, seed):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        step()

    results = {name: measure(model, *data) for name, data in protocol.data.items()}
    weights = {name: model.get_parameter(name).detach() for name in WEIGHTS}
    moved = {name: ((weights[name] - start[name]).norm() / start[name].norm()).item() for name in WEIGHTS}
    drift = {name: (weights[name].mean() - start[name].mean()).item() for name in WEIGHTS}
    return results | dict(moved=moved, drift=drift)


class Search:
    """Runs by their settings, each made once."""

    def __init__(self, protocol: Protocol, run: Callable = train):
        self.protocol = protocol
        self.run = run    # train(), or what stands for it
        self.known = {}   # options and seed as JSON -> what run() returned

    def results(self, options: dict, seeds: tuple) -> list[dict]:
        """Of these options, a run a seed."""
        keys = [json.dumps([options, seed], sort_keys=True) for seed in seeds]
        for key, seed in zip(keys, seeds):
            if key not in self.known:
                self.known[key] = self.run(options, seed, self.protocol)
        return [self.known[key] for key in keys]

    def loss(self, options: dict) -> float:
        """What the search goes by."""
        results = self.results(options, self.protocol.search_seeds)
        return float(np.mean([result["choose"]["loss"] for result in results]))

    def tune(self, arm: Arm) -> tuple[dict, dict, list[dict], int]:
        """(lr and momentum, the arm's settings, the last sweep, settings tried)."""
        tried = set()

        def loss(settings: dict, common: dict) -> float:
            options = arm.options(settings) | common
            tried.add(json.dumps(options, sort_keys=True))
            return self.loss(options)

        def sweep(settings: dict) -> tuple[dict, list[dict]]:
            pairs = itertools.product(self.protocol.momenta, self.protocol.rates)
            points = [dict(lr=lr, momentum=momentum) for momentum, lr in pairs]
            points = [point | dict(loss=loss(settings, point)) for point in points]
            best = min(points, key=lambda point: point["loss"])
            return dict(lr=best["lr"], momentum=best["momentum"]), points

        # rates and momenta, the arm's settings one by one, rates and momenta again
        settings = dict(arm.start)
        common, points = sweep(settings)
        for name, values in arm.search.items():
            losses = {value: loss(settings | {name: value}, common) for value in (settings[name], *values)}
            settings[name] = min(losses, key=losses.get)
        if settings != arm.start:
            common, points = sweep(settings)
        return common, settings, points, len(tried)


def paired(values: list[float], others: list[float]) -> dict:
    """Mean difference, its standard error and the two-sided p of a paired t test."""
    from scipy import stats
    differences = np.subtract(values, others)
    error = float(differences.std(ddof=1) / len(differences) ** 0.5)
    p = float(stats.ttest_rel(values, others).pvalue) if error else 1.0
    return dict(mean=float(differences.mean()), error=error, p=p)


def compare(arms: dict[str, Arm], protocol: Protocol) -> dict:
    """All results but the flatness."""
    # search, then the reported seeds
    search, rows = Search(protocol), {}
    for name, arm in arms.items():
        common, settings, points, tried = search.tune(arm)
        options = arm.options(settings) | common
        runs = dict(best=search.results(options, protocol.seeds),
                    published=search.results(arm.options(settings) | PUBLISHED, protocol.seeds))
        rows[name] = dict(**common, own=settings, tried=tried, sweep=points, conditioned=arm.conditioned,
                          choose_loss=search.loss(options), runs=runs, options=options)
        chosen = {setting: value for setting, value in settings.items() if value != arm.start[setting]}
        accuracy = np.mean([result["test"]["accuracy"] for result in runs["best"]])
        print(f"{name}: {common}, {chosen}, {tried} settings; test accuracy {accuracy:.2f} %", flush=True)

    # beside each other
    def values(name: str, what: str, label: str = "best") -> list[float]:
        return [result["test"][what] for result in rows[name]["runs"][label]]

    for name, row in rows.items():
        for what in ("accuracy", "loss"):
            numbers = values(name, what)
            against = {other: paired(numbers, values(other, what)) for other in ("SGDm", "per-tensor lr")}
            row[what] = dict(mean=float(np.mean(numbers)), sd=float(np.std(numbers, ddof=1)),
                             published=float(np.mean(values(name, what, "published"))), against=against)
    return rows


# ---- Flatness


class Surroundings:
    """The loss about a model's weights w, in coordinates u of w + D u."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor):
        self.model = model
        self.images = images
        self.labels = labels
        self.parameters = list(model.parameters())
        self.start = torch.cat([p.detach().flatten() for p in self.parameters])                 # w
        self.units = torch.cat([self.norms_of(p.detach()) for p in self.parameters])            # the diagonal of D
        self.loss, self.slope = self.gradient(torch.zeros_like(self.start), graph=True)         # at u = 0

    @staticmethod
    def norms_of(p: Tensor) -> Tensor:
        """Of every entry the norm of its filter; 0 for biases."""
        if p.ndim == 1:
            return torch.zeros(p.numel())
        return p.flatten(1).norm(dim=1).repeat_interleave(p[0].numel())

    def move(self, u: Tensor):
        """Set the model to w + D u."""
        sizes = [p.numel() for p in self.parameters]
        for p, values in zip(self.parameters, (self.start + self.units * u).split(sizes)):
            p.data.copy_(values.view(p.shape))

    def gradient(self, u: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """(the loss, its gradient by u) at u."""
        self.move(u)
        loss = F.cross_entropy(self.model(self.images), self.labels)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=graph)
        return loss, self.units * torch.cat([g.flatten() for g in gradients])

    def product(self, v: Tensor) -> Tensor:
        """D H D v at u = 0."""
        products = torch.autograd.grad(self.slope, self.parameters, v, retain_graph=True)
        return self.units * torch.cat([h.flatten() for h in products])


def flatness(model: nn.Module, images: Tensor, labels: Tensor, products: int, radius: float = 0.05) -> dict:
    """
    lambda_max, trace and sharpness of the loss in the coordinates u of w + D u, and the loss; the model is left as it
    was.
    """
    about, generator = Surroundings(model, images, labels), torch.Generator().manual_seed(0)

    # the largest eigenvalue, by power iteration
    v = torch.randn(about.start.shape, generator=generator) * (about.units > 0)
    for _ in range(products):
        v = v / v.norm()
        image = about.product(v)
        largest, v = v.dot(image).item(), image

    # the trace, by Hutchinson's estimate
    probes = [torch.randint(2, v.shape, generator=generator) * 2.0 - 1 for _ in range(products)]
    trace = float(np.mean([probe.dot(about.product(probe)).item() for probe in probes]))

    # the largest rise in a ball, by projected ascent
    slope = about.slope.detach()
    u, rise = radius * slope / slope.norm(), 0.0
    for _ in range(20):
        there, direction = about.gradient(u)
        rise = max(rise, (there - about.loss).item())
        u = u + radius / 4 * direction / direction.norm()
        u = u * min(1.0, radius / u.norm().item())
    about.move(torch.zeros_like(u))
    return dict(train_loss=about.loss.item(), lambda_max=largest, trace=trace, sharpness=rise)


def flatness_at(options: dict, seed: int, protocol: Protocol) -> dict | None:
    """
    flatness() where the loss on all training images first is at most the target, looked at every fourth step; None if
    it never is in ten times the epochs.
    """
    model, (images, labels) = network(seed), protocol.data["train"]
    step = stepper(model, options)
    for n, batch in enumerate(batches(len(labels), 10 * protocol.epochs, seed)):
        if n % 4 == 0 and measure(model, images, labels)["loss"] <= protocol.target:
            accuracy = measure(model, *protocol.data["test"])["accuracy"]
            return flatness(model, images, labels, protocol.products) | dict(steps=n, test=accuracy)
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        step()
    return None


# ---- Results


def candidate_of(rows: dict) -> str:
    """The conditioned arm of the smallest loss in the search: chosen before the test images are seen."""
    conditioned = [name for name, row in rows.items() if row["conditioned"]]
    return min(conditioned, key=lambda name: rows[name]["choose_loss"])


def tables(results: dict) -> str:
    """Three tables and the verdict, as Markdown."""
    rows, flat = results["arms"], results["flatness"]
    n = len(results["seeds"])
    return "\n\n".join([
        f"Digits, test images, {n} seeds (mean ± standard deviation; differences are paired, ± their standard error)",
        markdown([arm_line(name, row) for name, row in rows.items()]),
        f"Loss in the search by learning rate (momentum {', '.join(map(str, results['momenta']))} in each cell), the "
        "last sweep of an arm",
        markdown([sweep_line(name, row["sweep"], results) for name, row in rows.items()]),
        f"Flatness at a training loss of at most {results['target']}, {n} seeds, in units of a filter's norm (mean ± "
        "standard deviation)",
        markdown([flatness_line(name, runs) for name, runs in flat.items()]),
        results["verdict"]])


def arm_line(name: str, row: dict) -> dict:
    """An arm's accuracy and loss, beside SGDm's and per-tensor rates'."""
    def difference(other: str, what: str) -> str:
        return "{mean:+.3g} ± {error:.2g} (p = {p:.2g})".format(**row[what]["against"][other])

    accuracy, loss = row["accuracy"], row["loss"]
    settings = [f"{setting} {value:.3g}" for setting, value in row["own"].items()
                if value != (1 if setting.startswith("a ") else 0)]  # the neutral ones left out
    return {
        "arm": name, "lr": row["lr"], "momentum": row["momentum"], "own settings": ", ".join(settings) or "-",
        "settings tried": row["tried"], "accuracy, %": f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f}",
        "against SGDm": difference("SGDm", "accuracy"),
        "against per-tensor lr": difference("per-tensor lr", "accuracy"),
        "loss": f"{loss['mean']:.4f} ± {loss['sd']:.4f}", "loss against SGDm": difference("SGDm", "loss"),
        "loss against per-tensor lr": difference("per-tensor lr", "loss"),
        "accuracy at lr 0.01, momentum 0.9": f"{accuracy['published']:.2f}"}


def sweep_line(name: str, sweep: list[dict], results: dict) -> dict:
    """An arm's losses by learning rate."""
    losses = {(point["lr"], point["momentum"]): point["loss"] for point in sweep}

    def cell(lr: float) -> str:
        numbers = [losses[lr, momentum] for momentum in results["momenta"]]
        return ", ".join(f"{loss:.3f}" if loss < 10 else "> 10" for loss in numbers)

    return {"arm": name} | {f"{lr:g}": cell(lr) for lr in results["rates"]}


def flatness_line(name: str, runs: list[dict | None]) -> dict:
    """An arm's flatness over the seeds that reached the target."""
    reached = [run for run in runs if run]

    def spread(what: str) -> str:
        values = [run[what] for run in reached]
        return f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "-"

    return {"arm": name, "reached": f"{len(reached)} of {len(runs)}", "training loss": spread("train_loss"),
            "lambda_max": spread("lambda_max"), "trace": spread("trace"), "sharpness": spread("sharpness"),
            "test accuracy there, %": spread("test")}


def verdict_of(rows: dict, flat: dict) -> str:
    """
    The rule was set before the run: ahead of per-tensor rates by two standard errors in test accuracy, and flatter at
    equal training loss by two as well.
    """
    # the two differences
    name, plain = candidate_of(rows), rows["SGDm"]["accuracy"]
    ahead = rows[name]["accuracy"]["against"]["per-tensor lr"]
    both = [(a["lambda_max"], b["lambda_max"]) for a, b in zip(flat[name], flat["per-tensor lr"]) if a and b]
    flatter = paired(*map(list, zip(*both))) if len(both) > 1 else None

    # in words
    confirmed = ahead["mean"] > 2 * ahead["error"] and flatter and flatter["mean"] < -2 * flatter["error"]
    measured = f"{flatter['mean']:+.3g} ± {flatter['error']:.2g}" if flatter else "not measured"
    verdict = "confirmed" if confirmed else "not confirmed"
    return (f"Chosen in the search: {name}. Accuracy against per-tensor lr {ahead['mean']:+.2f} ± {ahead['error']:.2f} "
            f"points, lambda_max against it {measured}: {verdict}. Tuning the rate and momentum alone takes SGDm from "
            f"{plain['published']:.2f} to {plain['mean']:.2f} %.")


def run(options: argparse.Namespace):
    """Compare all arms, measure the flatness of three, write and print."""
    # how much of it
    torch.set_num_threads(1)
    data = digits()
    require_tests(TESTS)
    protocol, arms = Protocol(data), ARMS
    if options.quick:
        protocol = Protocol(data, rates=(1e-2, 1e-1), momenta=(0.9,), epochs=1, search_seeds=(1000,), seeds=(0, 1),
                            products=3, target=2.25)
        arms = {name: Arm(arm.options, arm.start, {key: values[-1:] for key, values in arm.search.items()},
                          arm.conditioned) for name, arm in ARMS.items()}

    # the runs
    rows = compare(arms, protocol)
    flat = {name: [flatness_at(rows[name]["options"], seed, protocol) for seed in protocol.seeds]
            for name in ("SGDm", "per-tensor lr", candidate_of(rows))}

    # the results
    parameters = sum(p.numel() for p in network(0).parameters())
    results = describe(CPU) | dict(
        threads=1, dtype="float32", quick=options.quick, epochs=protocol.epochs, rates=protocol.rates,
        momenta=protocol.momenta, search_seeds=protocol.search_seeds, seeds=protocol.seeds, target=protocol.target,
        parameters=parameters, arms=rows, flatness=flat, verdict=verdict_of(rows, flat))
    text = tables(results)
    path = save("gradient_conditioning", results, options.output, text)
    print(f"\n{text}\n\n{path}")


def main() -> int:
    """Run the command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    options = build_parser(__doc__).parse_args()
    return run_script("gradient_conditioning.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
