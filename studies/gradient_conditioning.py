"""
Gradient conditioning on images: does a network conditioned by any of the families end better than one whose learning rates were tuned, and flatter?

    python benchmarks/gradient_conditioning.py             all of it (minutes of one core)
    python benchmarks/gradient_conditioning.py --quick     a reduced run of every part: proves that it runs, measures nothing

scikit-learn's digits, 8 x 8: 640 images to train, 400 to choose settings by, 757 to report. Two convolutions of stride 2 and two linear layers, 13,706 parameters,
batches of 32, 10 epochs, constant rates, no augmentation. Biases are not conditioned. Published, without code, seeds or values: two CNNs of about 1M parameters on
CIFAR-10, test accuracy 38.3 -> 45.5 % and 42.9 -> 53.1 %, at lr 0.01 and momentum 0.9 for both arms.

Every arm searches alike, by the mean loss on the 400 images over seeds of the search alone: its 7 learning rates times 2 momenta, then its own settings one after
another, then rates and momenta again. The best goes on to the reported seeds, and so do lr 0.01 and momentum 0.9 with the arm's own settings. Arms share a seed's
initial tensors and order of the data, so differences are paired; an arm that a search leaves at a = 1, b = 0 is SGDm. AdamW's momentum is its first beta. A diverged
run's loss is 100.

Flatness is measured where the loss on all training images first is at most 0.05, in coordinates w + D u, D the norm of an entry's filter, 0 for biases: the largest
eigenvalue and the trace of D H D (power iteration, Hutchinson) and the largest rise of the loss over |u| <= 0.05 (projected ascent).
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import describe, markdown, require_tests, save
from train_gpt import Config, Ranks, RunError
from variants.gradient_conditioning import Options, build

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = "tests/variants/test_gradient_conditioning.py"
CPU = torch.device("cpu")
PUBLISHED = dict(lr=0.01, momentum=0.9)
WEIGHTS = ("0.weight", "2.weight", "5.weight", "7.weight")


@dataclass
class Arm:
    """options: of the variant, from the arm's own settings; start: these at first; search: what each is tried at. base "adamw" is PyTorch's."""
    options: Callable[[dict], dict] = lambda own: {}
    start: dict = field(default_factory=dict)
    search: dict = field(default_factory=dict)
    conditioned: bool = False  # a G + b and more than a constant rate for each tensor: what the claim could mean


def table_of(own: dict) -> dict:
    """Neutral settings, here and below, make no option: equal runs have equal options, and are made once."""
    pairs = {name: (own[f"a {name}"], own.get(f"b {name}", 0)) for name in WEIGHTS}
    table = ";".join(f"{name}/{a:g}/{b:g}" for name, (a, b) in pairs.items() if (a, b) != (1, 0))
    return dict(source="table", table=table) if table else {}


def structural_of(own: dict) -> dict:
    chosen = {name: value for name, value in own.items() if value}
    return dict(source="structural", **chosen) if chosen else {}


SCALES, SHIFTS, RATES = {f"a {name}": (1 / 3, 3) for name in WEIGHTS}, {f"b {name}": (-1e-3, -1e-4, 1e-4, 1e-3) for name in WEIGHTS}, (1e-4, 1e-3, 1e-2, 1e-1, 1)
SHIFT_RATES = (1e-7, 1e-6, 1e-5, *RATES)  # the derivative by a shift sums over a whole tensor
FORM = dict(p=(-0.5, 0.5), q=(-0.25, 0.25), r=(-1, 1))
SHIFT = dict(beta0=(-1e-2, -1e-3, -1e-4, -1e-5, 1e-5, 1e-4, 1e-3, 1e-2))
learned = lambda learn, start, rates: Arm(lambda own: dict(source="hypergradient", learn=learn, **own), dict(rho=start), dict(rho=rates), True)
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
    **{source: Arm(lambda own, source=source: dict(source=source)) for source in ("centralize", "normalize", "trust", "orthograd")},
    "AdamW": Arm(lambda own: dict(base="adamw")),
}


@dataclass
class Protocol:
    """How much of everything. data: {part: (images (n, 1, 8, 8), labels (n,))}."""
    data: dict
    rates: tuple = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    momenta: tuple = (0.0, 0.9)
    epochs: int = 10
    search_seeds: tuple = (1000, 1001)
    seeds: tuple = tuple(range(8))
    products: int = 40
    target: float = 0.05


def digits() -> dict:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RunError("scikit-learn, whose digits are the data, is not installed; pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.tensor(images[order], dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[order])
    x = (x - x[:640].mean()) / x[:640].std()
    return {name: (x[part], y[part]) for name, part in dict(train=slice(640), choose=slice(640, 1040), test=slice(1040, None)).items()}


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
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


def batches(count: int, epochs: int, seed: int, size: int = 32):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


@torch.no_grad()
def measure(model: nn.Module, images: Tensor, labels: Tensor) -> dict:
    logits = model(images)
    loss = F.cross_entropy(logits, labels).item()
    return dict(loss=min(loss, 100.0) if math.isfinite(loss) else 100.0, accuracy=100 * (logits.argmax(1) == labels).float().mean().item())


def train(options: dict, seed: int, protocol: Protocol) -> dict:
    """{part of the data: loss, accuracy in %}, and of each weight tensor |W - W0| / |W0| (moved) and mean(W) - mean(W0) (drift)."""
    model, (images, labels) = network(seed), protocol.data["train"]
    start = {name: model.get_parameter(name).detach().clone() for name in WEIGHTS}
    step = stepper(model, options)
    for batch in batches(len(labels), protocol.epochs, seed):
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        step()
    weights = {name: model.get_parameter(name).detach() for name in WEIGHTS}
    return {part: measure(model, *data) for part, data in protocol.data.items()} | dict(
        moved={name: ((weights[name] - start[name]).norm() / start[name].norm()).item() for name in WEIGHTS},
        drift={name: (weights[name].mean() - start[name].mean()).item() for name in WEIGHTS})


class Search:
    """Runs by their settings, each made once."""
    def __init__(self, protocol: Protocol, run: Callable = train):
        self.protocol, self.run, self.known = protocol, run, {}

    def results(self, options: dict, seeds: tuple) -> list[dict]:
        for seed in seeds:
            key = json.dumps([options, seed], sort_keys=True)
            if key not in self.known:
                self.known[key] = self.run(options, seed, self.protocol)
        return [self.known[json.dumps([options, seed], sort_keys=True)] for seed in seeds]

    def loss(self, options: dict) -> float:
        return float(np.mean([result["choose"]["loss"] for result in self.results(options, self.protocol.search_seeds)]))

    def tune(self, arm: Arm) -> tuple[dict, dict, list[dict], int]:
        """(lr and momentum, own settings, the last sweep, settings tried)."""
        tried = set()

        def loss(own: dict, common: dict) -> float:
            options = arm.options(own) | common
            tried.add(json.dumps(options, sort_keys=True))
            return self.loss(options)

        def sweep(own: dict) -> tuple[dict, list[dict]]:
            points = [dict(lr=lr, momentum=momentum) for momentum, lr in itertools.product(self.protocol.momenta, self.protocol.rates)]
            points = [point | dict(loss=loss(own, point)) for point in points]
            best = min(points, key=lambda point: point["loss"])
            return dict(lr=best["lr"], momentum=best["momentum"]), points

        own = dict(arm.start)
        common, points = sweep(own)
        for name, values in arm.search.items():
            own[name] = min((own[name], *values), key=lambda value: loss(own | {name: value}, common))
        if own != arm.start:
            common, points = sweep(own)
        return common, own, points, len(tried)


def paired(values: list[float], others: list[float]) -> dict:
    """Mean difference, its standard error and the two-sided p of a paired t test."""
    from scipy import stats
    differences = np.subtract(values, others)
    error = float(differences.std(ddof=1) / len(differences) ** 0.5)
    return dict(mean=float(differences.mean()), error=error, p=float(stats.ttest_rel(values, others).pvalue) if error else 1.0)


def flatness(model: nn.Module, images: Tensor, labels: Tensor, products: int, radius: float = 0.05) -> dict:
    """lambda_max, trace and sharpness of the loss in the coordinates u of w + D u, and the loss; the model is left as it was."""
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(0)
    sizes = [p.numel() for p in parameters]
    units = torch.cat([(p.detach().flatten(1).norm(dim=1).repeat_interleave(p[0].numel()) if p.ndim > 1 else torch.zeros(p.numel())) for p in parameters])
    start = torch.cat([p.detach().flatten() for p in parameters])

    def place(u: Tensor):
        for p, part in zip(parameters, (start + units * u).split(sizes)):
            p.data.copy_(part.view(p.shape))

    def gradient(u: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        place(u)
        loss = F.cross_entropy(model(images), labels)
        return loss, units * torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=graph)])

    zero = torch.zeros_like(start)
    loss, slope = gradient(zero, graph=True)

    def product(v: Tensor) -> Tensor:
        return units * torch.cat([h.flatten() for h in torch.autograd.grad(slope, parameters, v, retain_graph=True)])

    v = torch.randn(start.shape, generator=generator) * (units > 0)
    for _ in range(products):
        v = v / v.norm()
        image = product(v)
        largest, v = v.dot(image).item(), image
    probes = [torch.randint(2, start.shape, generator=generator) * 2.0 - 1 for _ in range(products)]
    trace = float(np.mean([probe.dot(product(probe)).item() for probe in probes]))
    u, rise = radius * slope.detach() / slope.detach().norm(), 0.0
    for _ in range(20):
        there, direction = gradient(u)
        rise = max(rise, (there - loss).item())
        u = u + radius / 4 * direction / direction.norm()
        u = u * min(1.0, radius / u.norm().item())
    place(zero)
    return dict(train_loss=loss.item(), lambda_max=largest, trace=trace, sharpness=rise)


def flatness_at(options: dict, seed: int, protocol: Protocol) -> dict | None:
    """flatness() where the loss on all training images first is at most the target, looked at every fourth step; None if it never is in ten times the epochs."""
    model, (images, labels) = network(seed), protocol.data["train"]
    step = stepper(model, options)
    for n, batch in enumerate(batches(len(labels), 10 * protocol.epochs, seed)):
        if n % 4 == 0 and measure(model, images, labels)["loss"] <= protocol.target:
            return flatness(model, images, labels, protocol.products) | dict(steps=n, test=measure(model, *protocol.data["test"])["accuracy"])
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        step()
    return None


def compare(arms: dict[str, Arm], protocol: Protocol) -> dict:
    """All results but the flatness."""
    search, rows = Search(protocol), {}
    for name, arm in arms.items():
        common, own, points, tried = search.tune(arm)
        reported = {label: search.results(arm.options(own) | chosen, protocol.seeds) for label, chosen in dict(best=common, published=PUBLISHED).items()}
        rows[name] = dict(**common, own=own, tried=tried, sweep=points, conditioned=arm.conditioned, choose_loss=search.loss(arm.options(own) | common), runs=reported,
                          options=arm.options(own) | common)
        print(f"{name}: {common}, {({k: v for k, v in own.items() if v != arm.start[k]})}, {tried} settings; test accuracy "
              f"{np.mean([r['test']['accuracy'] for r in reported['best']]):.2f} %", flush=True)
    values = lambda name, what, label="best": [result["test"][what] for result in rows[name]["runs"][label]]
    for name, row in rows.items():
        for what in ("accuracy", "loss"):
            row[what] = dict(mean=float(np.mean(values(name, what))), sd=float(np.std(values(name, what), ddof=1)),
                             published=float(np.mean(values(name, what, "published"))),
                             against={other: paired(values(name, what), values(other, what)) for other in ("SGDm", "per-tensor lr")})
    return rows


def candidate_of(rows: dict) -> str:
    """The conditioned arm of the smallest loss in the search: chosen before the test images are seen."""
    return min((name for name, row in rows.items() if row["conditioned"]), key=lambda name: rows[name]["choose_loss"])


def tables(results: dict) -> str:
    rows, flat, n = results["arms"], results["flatness"], len(results["seeds"])
    difference = lambda row, other, what: "{mean:+.3g} ± {error:.2g} (p = {p:.2g})".format(**row[what]["against"][other])
    settings = lambda own: ", ".join(f"{name} {value:.3g}" for name, value in own.items() if value != name.startswith("a ")) or "-"  # the neutral ones left out
    lines = [f"Digits, test images, {n} seeds (mean ± standard deviation; differences are paired, ± their standard error)", ""]
    lines += [markdown([{
        "arm": name, "lr": row["lr"], "momentum": row["momentum"], "own settings": settings(row["own"]), "settings tried": row["tried"],
        "accuracy, %": f"{row['accuracy']['mean']:.2f} ± {row['accuracy']['sd']:.2f}", "against SGDm": difference(row, "SGDm", "accuracy"),
        "against per-tensor lr": difference(row, "per-tensor lr", "accuracy"), "loss": f"{row['loss']['mean']:.4f} ± {row['loss']['sd']:.4f}",
        "loss against SGDm": difference(row, "SGDm", "loss"), "loss against per-tensor lr": difference(row, "per-tensor lr", "loss"),
        "accuracy at lr 0.01, momentum 0.9": f"{row['accuracy']['published']:.2f}"} for name, row in rows.items()])]
    lines += ["", f"Loss in the search by learning rate (momentum {', '.join(map(str, results['momenta']))} in each cell), the last sweep of an arm", ""]
    number = lambda loss: f"{loss:.3f}" if loss < 10 else "> 10"
    cell = lambda row, lr: ", ".join(number(next(point["loss"] for point in row["sweep"] if (point["lr"], point["momentum"]) == (lr, mu))) for mu in results["momenta"])
    lines += [markdown([{"arm": name} | {f"{lr:g}": cell(row, lr) for lr in results["rates"]} for name, row in rows.items()])]
    lines += ["", f"Flatness at a training loss of at most {results['target']}, {n} seeds, in units of a filter's norm (mean ± standard deviation)", ""]
    shown = []
    for name, found in flat.items():
        reached = [f for f in found if f]
        stat = lambda what: f"{np.mean([f[what] for f in reached]):.4g} ± {np.std([f[what] for f in reached], ddof=1):.2g}" if len(reached) > 1 else "-"
        shown.append({"arm": name, "reached": f"{len(reached)} of {len(found)}", "training loss": stat("train_loss"), "lambda_max": stat("lambda_max"),
                      "trace": stat("trace"), "sharpness": stat("sharpness"), "test accuracy there, %": stat("test")})
    return "\n".join([*lines, markdown(shown), "", results["verdict"]])


def verdict_of(rows: dict, flat: dict) -> str:
    """The rule was set before the run: ahead of per-tensor rates by two standard errors in test accuracy, and flatter at equal training loss by two as well."""
    name, plain = candidate_of(rows), rows["SGDm"]["accuracy"]
    ahead = rows[name]["accuracy"]["against"]["per-tensor lr"]
    both = [(a["lambda_max"], b["lambda_max"]) for a, b in zip(flat[name], flat["per-tensor lr"]) if a and b]
    flatter = paired(*map(list, zip(*both))) if len(both) > 1 else None
    confirmed = ahead["mean"] > 2 * ahead["error"] and flatter and flatter["mean"] < -2 * flatter["error"]
    return (f"Chosen in the search: {name}. Accuracy against per-tensor lr {ahead['mean']:+.2f} ± {ahead['error']:.2f} points, lambda_max against it "
            + (f"{flatter['mean']:+.3g} ± {flatter['error']:.2g}" if flatter else "not measured") + f": {'confirmed' if confirmed else 'not confirmed'}. "
            f"Tuning the rate and momentum alone takes SGDm from {plain['published']:.2f} to {plain['mean']:.2f} %.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a reduced run of every part")
    parser.add_argument("--output", type=Path, help="JSON file, beside which the tables go as .md (default: benchmarks/results/)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        data = digits()
        require_tests(TESTS)
        protocol, arms = Protocol(data), ARMS
        if given.quick:
            protocol = Protocol(data, rates=(1e-2, 1e-1), momenta=(0.9,), epochs=1, search_seeds=(1000,), seeds=(0, 1), products=3, target=2.25)
            arms = {name: Arm(arm.options, arm.start, {key: values[-1:] for key, values in arm.search.items()}, arm.conditioned) for name, arm in ARMS.items()}
        rows = compare(arms, protocol)
        flat = {name: [flatness_at(rows[name]["options"], seed, protocol) for seed in protocol.seeds] for name in ("SGDm", "per-tensor lr", candidate_of(rows))}
        results = describe(CPU) | dict(threads=1, dtype="float32", quick=given.quick, epochs=protocol.epochs, rates=protocol.rates, momenta=protocol.momenta,
                                       search_seeds=protocol.search_seeds, seeds=protocol.seeds, target=protocol.target,
                                       parameters=sum(p.numel() for p in network(0).parameters()), arms=rows, flatness=flat, verdict=verdict_of(rows, flat))
        text = tables(results)
        path = save("gradient_conditioning", results, given.output)
    except RunError as error:
        print(f"gradient_conditioning.py: error: {error}", file=sys.stderr)
        return 1
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
