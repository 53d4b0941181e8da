"""
gradient_conditioning against its formulas, its exact consequences for SGD, Adam and Muon, finite differences,
checkpoints and several ranks.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train_gpt
import variants
from data.shards import write_meta, write_shard
from tests.children import exit_code_of, start_child
from tests.errors import float_bound
from train_gpt import Ranks, RunError
from variants import gradient_conditioning as gc

ROOT = Path(train_gpt.__file__).resolve().parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)
CONFIG = train_gpt.make_config(dict(vocab_size=257))
TINY = dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, value_embeddings=1,
            sequence_length=32, batch_tokens=128, micro_batch_tokens=64, steps=6, val_tokens=320, val_every=2,
            window_pattern="L", window_short=(0,), window_long=(0,), compile="off", device="cpu", dtype="float32",
            lr_matrix=0.02)
ACTIVE = dict(  # source -> settings with which it does something
    none="",
    table="table=*/1/0;blocks*/2/1e-3",
    structural="kappa=0.5,p=-0.5,q=0.25,r=1,beta0=1e-3,r_shift=-1",
    hypergradient="rho=0.002",
    centralize="",
    normalize="",
    trust="",
    orthograd="",
)

SUMS = float_bound(288, torch.float32)      # of numbers near 1 after sums over a tensor, of at most 3 x 12 x 8 numbers
STEPS = float_bound(4 * 20, torch.float32)  # of weights near 1 after 20 steps of a few roundings each


class Toy(torch.nn.Module):
    """Tensors of all kinds, no multiples of 64: with two ranks most are split inside a row."""
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.table = draw(17, 7)
        self.blocks = torch.nn.ParameterList([draw(12, 8), draw(8, 12), draw(3, 12, 8)])
        self.kernel, self.gain, self.zero = draw(5, 3, 3, 3), draw(9), torch.nn.Parameter(torch.zeros(6, 5))


def gradients(model: torch.nn.Module, step: int) -> dict:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: (torch.randn(p.shape, generator=generator) + 0.3).to(p.device)
            for name, p in model.named_parameters()}


def copies(model: torch.nn.Module) -> dict:
    """name -> the parameter, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def build(options: str, model: torch.nn.Module, config=CONFIG, ranks=ALONE):
    with variants.applied((f"gradient_conditioning:{options}",), config):
        optimizer, = train_gpt.build_optimizers(model, config, ranks)
    return optimizer


def follow(optimizers: list, model: torch.nn.Module, steps: int, share: float = 1.0, start: int = 0) -> dict:
    """The weights after steps with gradients that do not depend on them; share: this rank's of every gradient."""
    parameters = dict(model.named_parameters())
    for step in range(start, start + steps):
        for bucket in (bucket for optimizer in optimizers for bucket in optimizer.buckets):
            bucket.missing = len(bucket.parameters)
        sum((share * gradient * parameters[name]).sum() for name, gradient in gradients(model, step).items()).backward()
        for optimizer in optimizers:
            optimizer.step(1.0 - step / 40, step / 40)
    return copies(model)


def trained(options: str, steps: int = 20) -> dict:
    model = Toy()
    return follow([build(options, model)], model, steps)


def same(a: dict, b: dict, rtol: float = 0.0):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol, msg=f"{name}: {{}}".format)


def conditioned(options: str, model=None) -> tuple[dict, dict, dict]:
    """(weights, gradients, what SGD's first step subtracts by its rate, which is the conditioned gradient)."""
    model = model or Toy()
    before, given = copies(model), gradients(model, 0)
    optimizer = build(f"lr=1,{options}", model)
    follow([optimizer], model, 1)
    velocity, = (bucket.state["velocity"] for bucket in optimizer.buckets)
    result = {name: velocity[p.storage_offset():][:p.numel()].view(p.shape).clone()
              for name, p in model.named_parameters()}
    return before, given, result


# ---- The families -----------------------------------------------------------

def test_sgd_is_sgd():
    model, reference = Toy(), Toy()
    optimizer = build("lr=0.05,momentum=0.8,weight_decay=0.1", model)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.8)
    for step in range(5):
        for name, p in reference.named_parameters():
            p.grad = gradients(model, step)[name]
            p.data.mul_(1 - 0.05 * 0.1 * (1 - step / 40))
        theirs.param_groups[0]["lr"] = 0.05 * (1 - step / 40)
        theirs.step()
    same(follow([optimizer], model, 5), dict(reference.named_parameters()), STEPS)


def test_rate_of_the_trainer_and_of_parameters():
    model, config = Toy(), train_gpt.make_config(dict(vocab_size=257, lr_matrix=0.07))
    model.gain.lr_mul, model.zero.wd_mul = 3.0, 0.0
    buckets = build("lr=0,weight_decay=0.5", model, config).buckets
    rates = {id(p): (bucket.lr, bucket.weight_decay) for bucket in buckets for p in bucket.parameters}
    assert rates[id(model.gain)] == pytest.approx((0.21, 0.5))
    assert rates[id(model.zero)] == (0.07, 0.0) and rates[id(model.table)] == (0.07, 0.5)


def test_table_last_match_wins():
    before, given, result = conditioned("source=table,table=*/3/0;blocks.*/0.5/1e-2;blocks.1/2/-1;kernel/1/0")
    pairs = dict.fromkeys(given, (3, 0)) | dict(kernel=(1, 0), gain=(1, 0))
    pairs |= {"blocks.0": (0.5, 1e-2), "blocks.2": (0.5, 1e-2), "blocks.1": (2, -1)}
    same(result, {name: a * given[name] + b for name, (a, b) in pairs.items()}, float_bound(1, torch.float32))


def test_structural():
    exponents = "p=-0.5,q=0.25,r=2,p_shift=1,q_shift=-0.5,r_shift=-1"
    before, given, result = conditioned(f"source=structural,kappa=0.5,beta0=0.1,{exponents}")
    fan_in = dict(table=7, kernel=27, zero=5) | {"blocks.0": 8, "blocks.1": 12, "blocks.2": 8}
    assert list(fan_in) == [name for name in given if name != "gain"]
    for k, (name, n) in enumerate(fan_in.items()):
        size = given[name].numel()
        a, b = 0.5 * n ** -0.5 * size ** 0.25 * ((k + 1) / 6) ** 2, 0.1 * n * size ** -0.5 * 6 / (k + 1)
        torch.testing.assert_close(result[name], a * given[name] + b, rtol=SUMS, atol=SUMS)
    assert torch.equal(result["gain"], given["gain"])


def test_include_1d():
    before, given, result = conditioned("source=structural,kappa=2,r=1,beta0=0.5,include_1d=on")
    torch.testing.assert_close(result["gain"], 2 * 3 / 7 * given["gain"] + 0.5)
    before, given, result = conditioned("source=centralize,include_1d=on")
    assert torch.equal(result["gain"], given["gain"]) and not torch.equal(result["table"], given["table"])


def test_centralize():
    before, given, result = conditioned("source=centralize")
    for name, dims in dict(table=(1,), kernel=(1, 2, 3), **{"blocks.0": (1,), "blocks.2": (2,)}).items():
        torch.testing.assert_close(result[name], given[name] - given[name].mean(dims, keepdim=True))
    assert torch.equal(result["gain"], given["gain"])


def test_normalize_and_trust():
    before, given, result = conditioned("source=normalize")
    same(result, {name: g if name == "gain" else g / g.norm() for name, g in given.items()}, SUMS)
    before, given, result = conditioned("source=trust")
    expected = {name: g * before[name].norm() / g.norm() for name, g in given.items()}
    same(result, expected | {name: given[name] for name in ("gain", "zero")}, SUMS)
    assert result["zero"].any()  # a = 0 would keep it at zero for ever


def test_orthograd():
    before, given, result = conditioned("source=orthograd")
    for name in given.keys() - {"gain", "zero"}:
        w, g, r = (tensors[name].double() for tensors in (before, given, result))
        assert abs((w * r).sum() / (w.norm() * r.norm())) < SUMS < abs((w * g).sum() / (w.norm() * g.norm()))
        assert r.norm().item() == pytest.approx(g.norm().item(), rel=SUMS)
        left = g - (w * g).sum() / (w * w).sum() * w
        torch.testing.assert_close(r, left * g.norm() / left.norm(), rtol=SUMS, atol=SUMS)
    torch.testing.assert_close(result["zero"], given["zero"])


@pytest.mark.parametrize("source", ["centralize", "normalize", "trust", "orthograd"])
def test_no_gradient_stays_none(source):
    model = Toy()
    optimizer, before = build(f"source={source}", model), copies(model)
    optimizer.step(1.0, 0.0)
    same(dict(model.named_parameters()), before)


@pytest.mark.parametrize("order, factor", [("before", 1), ("after", 4)])
def test_clip(order, factor):
    before, given, result = conditioned(f"source=structural,kappa=4,include_1d=on,clip=0.5,clip_order={order}")
    norm = torch.cat([g.flatten() for g in given.values()]).norm()
    same(result, {name: factor * 0.5 * g / norm for name, g in given.items()}, SUMS)
    before, given, result = conditioned("clip=1000")
    same(result, given)


# ---- Exact consequences -----------------------------------------------------

@pytest.mark.parametrize("base", ["sgd", "default"])
@pytest.mark.parametrize("source", [
    "source=none", "source=table", "source=structural", "source=hypergradient,rho=0,allow_shift_muon=on"])
def test_neutral_is_bit_identical(base, source):
    model = Toy()
    if base == "default":
        plain = train_gpt.build_optimizers(model, CONFIG, ALONE)
    else:
        plain = gc.build_sgd(model, CONFIG, ALONE, gc.Options())
    same(follow(plain, model, 20), trained(f"base={base},{source}"))


def test_scale_is_a_rate_per_tensor():
    for a in (0.1, 10):
        same(trained(f"lr=0.02,source=structural,kappa={a},include_1d=on"), trained(f"lr={0.02 * a}"), STEPS)
    one = trained("lr=0.02,source=table,table=blocks.0/10/0")
    slow, fast = trained("lr=0.02"), trained("lr=0.2")
    same(one, slow | {"blocks.0": fast["blocks.0"]}, STEPS)


@pytest.mark.parametrize("a", [0.1, 10])
def test_scale_does_nothing_to_muon_and_adam(a):
    scaled = trained(f"base=default,source=structural,kappa={a},include_1d=on")
    same(scaled, trained("base=default"), STEPS)
    with pytest.raises(AssertionError):
        same(trained(f"source=structural,kappa={a},include_1d=on"), trained("source=none"), STEPS)


def test_scale_does_nothing_to_adam_of_small_epsilon():
    results = {}
    for a in (1, 0.1, 10):
        model = Toy().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-15)
        for step in range(20):
            for name, p in model.named_parameters():
                p.grad = 1e-6 * a * gradients(model, step)[name].double()
            optimizer.step()
        results[a] = dict(model.named_parameters())
    same(results[0.1], results[1], STEPS)
    same(results[10], results[1], STEPS)


def test_a_clip_lets_the_scale_act_on_adam():
    unclipped, clipped = (trained(f"base=default,source=table,table=table/100/0{clip}") for clip in ("", ",clip=5"))
    same({"gain": unclipped["gain"]}, {"gain": trained("base=default")["gain"]}, STEPS)
    plain = trained("base=default,clip=5")
    assert all((clipped[name] - plain[name]).abs().max() > 2 * STEPS for name in ("gain", "table"))


def test_muon_lifts_a_shift():
    model = Toy()
    before = model.blocks[0].detach().clone()
    optimizer = build("base=default,source=table,table=blocks.0/1/2,allow_shift_muon=on", model)
    follow([optimizer], model, 1)
    moved = (before - model.blocks[0].detach()) / optimizer.buckets[0].lr
    assert moved.sum() / 96 ** 0.5 > 0.5  # of a unit singular direction: the all-ones matrix'


def test_shift_is_a_penalty_on_the_sum():
    def run(options, penalty):
        model, target = Toy(), Toy()
        optimizer = build(options, model)
        for step in range(20):
            loss = sum((p - 2 * t.detach()).square().sum() for p, t in zip(model.parameters(), target.parameters()))
            (loss + penalty * sum(p.sum() for p in model.parameters() if p.ndim > 1)).backward()
            optimizer.step(1.0, step / 20)
        return {name: p.detach() for name, p in model.named_parameters()}
    same(run("lr=0.01,source=structural,beta0=0.3", 0.0), run("lr=0.01", 0.3), STEPS)
    with pytest.raises(AssertionError):
        same(run("lr=0.01,source=structural,beta0=0.3", 0.0), run("lr=0.01", 0.0), 1e-3)


def test_drift_of_a_shift():
    lr, momentum, b, steps = 0.01, 0.9, 1e-2, 300
    model = Toy()
    optimizer, before = build(f"lr={lr},source=structural,beta0={b}", model), model.table.detach().clone()
    for _ in range(steps):
        optimizer.step(1.0, 0.0)
    expected = -lr * b * sum((1 - momentum ** t) / (1 - momentum) for t in range(1, steps + 1))
    # the same shift a step: roundings need not cancel
    rounded = steps * torch.finfo(torch.float32).eps / 2 * (before.abs().max().item() + abs(expected))
    torch.testing.assert_close(model.table.detach() - before, torch.full((17, 7), expected), rtol=0, atol=rounded)
    assert expected == pytest.approx(-lr * b * steps / (1 - momentum), rel=0.05)


def model_and_rows() -> tuple:
    config = train_gpt.make_config(TINY)
    model = train_gpt.build_model(config, ALONE)
    model.set_windows(0.0)
    return model, torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(3)), config


@pytest.mark.parametrize("source", ACTIVE)
def test_accumulation_and_loss_scale(source):
    def run(micro_batches: int, scale: float):
        model, rows, config = model_and_rows()
        optimizer = build(f"lr=0.1,source={source},{ACTIVE[source]}".rstrip(","), model, config)
        for step in range(4):
            for some in rows.chunk(micro_batches):
                (scale * model(some[:, :-1].contiguous(), some[:, 1:].contiguous()) / micro_batches).backward()
            for p in model.parameters():
                p.grad.div_(scale)
            optimizer.step(1.0, step / 4)
        return {name: p.detach() for name, p in model.named_parameters()}

    expected = run(1, 1.0)
    same(run(2, 1.0), expected, float_bound(4 * 128, torch.float32))  # four steps, gradients of 128 tokens
    same(run(1, 1024.0), expected)


# ---- Hypergradient ----------------------------------------------------------

@pytest.mark.parametrize("momentum, aware, steps", [(0.0, "on", 1), (0.9, "on", 1), (0.9, "on", 3), (0.9, "off", 3)])
def test_hypergradient_against_finite_differences(momentum, aware, steps):
    """Of L(W - lr (a S + b m)) on a quadratic, W, S and m being those before the step."""
    generator, lr, rho = torch.Generator().manual_seed(4), 0.05, 0.01
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    curvature, target = root @ root.T / 12 + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)

    def loss(w):
        return 0.5 * (w.flatten() - target) @ curvature.to(w.dtype) @ (w.flatten() - target)

    # S and m, followed by hand
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    optimizer = build(f"source=hypergradient,lr={lr},momentum={momentum},rho={rho},momentum_aware={aware}", model)
    total, m, before = 0.0, 0.0, None
    for _ in range(steps):
        before, scale, shift = model.w.detach().double().clone(), optimizer.theta.exp().item(), optimizer.shifts.item()
        model.w.grad.copy_((curvature @ (before.flatten() - target)).view(3, 4))
        decay = momentum if aware == "on" else 0.0
        total, m = decay * total + model.w.grad.double(), decay * m + 1
        optimizer.step(1.0, 0.0)
    scale, shift, theta = optimizer.scales.item(), optimizer.shifts.item(), optimizer.theta.item()
    after = model.w.detach().double()

    def slope(da, db, h=1e-5):
        """The derivative of the loss for a -> a + da, b -> b + db in the step that led here."""
        step = lr * (da * total + db * m)
        return (loss(after - h * step) - loss(after + h * step)).item() / (2 * h)

    slope_a, slope_b = slope(1, 0), slope(0, 1)
    model.w.grad.copy_((curvature @ (after.flatten() - target)).view(3, 4))
    optimizer.step(1.0, 0.0)
    assert abs(slope_a) > 0.01 and abs(slope_b) > 0.01
    assert optimizer.theta.item() - theta == pytest.approx(-rho * scale * slope_a, rel=1e-3, abs=1e-8)
    assert optimizer.shifts.item() - shift == pytest.approx(-rho * slope_b, rel=1e-3, abs=1e-8)
    assert optimizer.scales.item() == pytest.approx(np.exp(optimizer.theta.item())) and optimizer.scales.item() > 0


def test_learn_one_of_both():
    for learn, moves in dict(both=(True, True), scale=(True, False), shift=(False, True)).items():
        model = Toy()
        optimizer = build(f"source=hypergradient,rho=0.001,learn={learn}", model)
        follow([optimizer], model, 5)
        assert (bool((optimizer.scales != 1).all()), bool((optimizer.shifts != 0).all())) == moves
        assert bool((optimizer.scales == 1).any()) != moves[0] and bool((optimizer.shifts == 0).any()) != moves[1]


def test_hypergradient_finds_a_better_rate():
    def run(options):
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.ones(8, 8))
        optimizer = build(options, model)
        for _ in range(30):
            model.w.grad.copy_(model.w.detach())
            optimizer.step(1.0, 0.0)
        return model.w.detach().norm().item(), optimizer

    plain, _ = run("lr=0.01,momentum=0")
    learned, optimizer = run("source=hypergradient,lr=0.01,momentum=0,rho=0.1,learn=scale")
    assert learned < 0.8 * plain and optimizer.scales.item() > 1.5


# ---- Record and faults ------------------------------------------------------

def test_report(tmp_path):
    config = train_gpt.make_config(dict(vocab_size=257, log_dir=str(tmp_path), run_id="run"))

    def saved() -> dict:
        return json.loads((tmp_path / "run-conditioning.json").read_text())

    build("source=table,table=*/1/0;table/2/1e-3", Toy(), config)
    table = saved()["table"]
    assert table[0] == dict(name="table", shape=[17, 7], a=2.0, b=pytest.approx(1e-3)) and len(table) == 6
    assert saved()["sha256"] == hashlib.sha256(json.dumps(table).encode()).hexdigest()
    assert saved()["trajectory"] == []

    # learned
    optimizer = build("source=hypergradient,rho=0.1", Toy(), config)
    follow([optimizer], Toy(), 0)
    for step in range(400):
        optimizer.buckets[0].grad.fill_(0.01)
        optimizer.step(1.0, step / 400)
    trajectory, scales = saved()["trajectory"], [row["a"] for row in saved()["table"]]
    assert [point["step"] for point in trajectory][:3] == [1, 5, 9] and len(trajectory) == 100
    assert trajectory[0]["a"] == [1.0] * 6 and trajectory[-1]["a"] == scales != [1.0] * 6

    # measured in every step
    build("source=normalize", Toy(), config)
    assert {row["a"] for row in saved()["table"]} == {None}


@pytest.mark.parametrize("options, message", [
    ("table=a", "table=a does nothing with source=none; add source=table or leave it out"),
    ("source=table,table=blocks.0", "'blocks.0' is no glob/a/b; write it such as"),
    ("source=table,table=blocks.0/1/x", "'blocks.0/1/x' is no glob/a/b"),
    ("source=table,table=blocks.0/0/0", "'blocks.0/0/0' needs a positive a and a finite b"),
    ("source=table,table=blocks.0/1/nan", "needs a positive a and a finite b"),
    ("source=table,table=block.*/2/0",
     "'block.\\*' matches no conditioned tensor; there are table, kernel, zero, .. blocks.2; include_1d=on"),
    ("source=table,table=gain/2/0", "'gain' matches no conditioned tensor"),
    ("base=default,source=table,table=blocks.0/1/1e-3",
     "Muon would turn the shift of blocks.0 .* or add allow_shift_muon=on"),
    ("base=default,source=structural,beta0=1e-3", "Muon would turn the shift of blocks.0"),
    ("base=default,source=hypergradient", "Muon would turn the shift of blocks.0"),
    ("base=default,lr=0.1", "lr=0.1 does nothing with base=default"),
    ("source=table,kappa=2", "kappa=2.0 does nothing with source=table; add source=structural"),
    ("source=structural,kappa=-1", "kappa=-1.0 would make scales that are not positive"),
    ("source=structural,q=400", "choose other exponents"),
    ("momentum=1", "momentum=1.0 is out of range; give at least 0 and below 1"),
    ("clip=-1", "clip=-1.0 is out of range"),
    ("rho=0.1", "rho=0.1 does nothing with source=none; add source=hypergradient"),
])
def test_faults_are_one_line(options, message):
    with pytest.raises(RunError, match=message) as error:
        build(options, Toy())
    assert "\n" not in str(error.value) and str(error.value).startswith("variant gradient_conditioning: ")


@pytest.mark.parametrize("options", [
    "base=default,source=table,table=table/1/1e-3", "base=default,source=hypergradient,learn=scale",
    "base=default,source=centralize"])
def test_what_is_no_shift_of_muon_is_allowed(options):
    assert all(tensor.isfinite().all() for tensor in trained(options, 3).values())


# ---- Whole runs -------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    for name, size in (("words_train_000000.bin", 4000), ("words_val_000000.bin", 700)):
        write_shard(folder / name, np.where(random.random(size) < 0.05, 256, random.integers(97, 105, size)))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


@pytest.fixture
def no_peak(monkeypatch):
    monkeypatch.setattr(train_gpt, "measured_peak", lambda ranks: 1e9)  # seconds of products, for the record only


def arguments(corpus, folder, options: str, **changes) -> list[str]:
    settings = TINY | dict(data=corpus, log_dir=folder, run_id="run", variant=f"gradient_conditioning:{options}")
    words = []
    for name, value in (settings | changes).items():
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def validation_losses(checkpoint: dict) -> dict:
    return {point["step"]: point["val_loss"] for point in checkpoint["curve"]}


@pytest.mark.parametrize("options", ["source=hypergradient,rho=0.1", "base=default,source=normalize,clip=1"])
def test_resume_is_bit_identical(corpus, tmp_path, no_peak, options):
    report = tmp_path / "run-conditioning.json"
    assert train_gpt.main(arguments(corpus, tmp_path, options, keep_every=2), loader=variants) == 0
    straight, expected = train_gpt.read_checkpoint(str(tmp_path / "run.pt")), report.read_text()
    assert train_gpt.main(["--resume", str(tmp_path / "run-step000002.pt"), "--keep_every", "0"], loader=variants) == 0
    resumed = train_gpt.read_checkpoint(str(tmp_path / "run.pt"))

    # the model, its curve, the report
    assert straight["step"] == resumed["step"] == 6 and validation_losses(straight) == validation_losses(resumed)
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in straight["model"].items())
    assert report.read_text() == expected

    # the optimizer
    a, b = straight["optimizers"][0], resumed["optimizers"][0]
    assert torch.equal(a["theta"], b["theta"]) and torch.equal(a["shifts"], b["shifts"])
    assert a["sums"].keys() == b["sums"].keys()
    assert all(torch.equal(sums, b["sums"][name]) for name, sums in a["sums"].items())
    assert a["trajectory"] == b["trajectory"]
    if "hypergradient" in options:
        assert [point["step"] for point in a["trajectory"]] == [1, 2, 3, 4, 5, 6]
        assert a["theta"].any() and all(sums.any() for sums in a["sums"].values())


def test_warm_up_leaves_no_trace(corpus, tmp_path, no_peak):
    config = train_gpt.parse_config(arguments(corpus, tmp_path, "source=hypergradient"))
    with variants.applied(config.variant, config):
        trainer = train_gpt.Trainer(config)
    optimizer, = trainer.optimizers
    trainer.warm_up()
    assert optimizer.steps == optimizer.lr_factor == 0 and optimizer.trajectory == [] and (optimizer.scales == 1).all()
    kept = optimizer.theta, optimizer.shifts, *optimizer.sums, *(bucket.grad for bucket in optimizer.buckets)
    assert not any(tensor.any() for tensor in kept)


BASES = ("base=sgd,lr=0.01,clip=40", "base=default,allow_shift_muon=on,include_1d=on,clip=40,clip_order=after")


def train_as_rank(folder: Path, rank: int) -> int:
    """One of two ranks: weights after 4 steps, the state then, and weights after 8, of every source, in RANK.pt."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks, results = Ranks(rank, 2, torch.device("cpu"), torch.float32), {}
    for base in BASES:
        for source, more in ACTIVE.items():
            model = Toy()
            optimizer = build(f"{base},source={source},{more}".rstrip(","), model, ranks=ranks)
            halfway = (follow([optimizer], model, 4, (0.25, 0.75)[rank]), optimizer.state_dict())
            results[base, source] = (*halfway, follow([optimizer], model, 4, (0.25, 0.75)[rank], start=4))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
    return 0


def test_two_ranks_equal_one(tmp_path):
    """Every source, most tensors split between the ranks inside a row; a checkpoint of two ranks goes on with one."""
    children = [start_child(lambda rank=rank: train_as_rank(tmp_path, rank)) for rank in range(2)]
    assert [exit_code_of(child) for child in children] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for (base, source), (halfway, state, final) in results[0].items():
        same(final, results[1][base, source][2])
        options, model = f"{base},source={source},{ACTIVE[source]}".rstrip(","), Toy()
        optimizer = build(options, model)
        same(follow([optimizer], model, 4), halfway, STEPS)
        same(follow([optimizer], model, 4, start=4), final, STEPS)
        resumed = Toy()
        again = build(options, resumed)
        resumed.load_state_dict(halfway)
        again.load_state_dict(state)
        same(follow([again], resumed, 4, start=4), final, STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("source", ACTIVE)
def test_on_a_gpu(source):
    options, model = f"lr=0.01,clip=40,source={source},{ACTIVE[source]}".rstrip(","), Toy().cuda()
    optimizer = build(options, model, ranks=Ranks(0, 1, torch.device("cuda", 0), torch.float32))
    same({name: p.cpu() for name, p in follow([optimizer], model, 8).items()}, trained(options, 8), 1e-4)


@pytest.mark.slow
def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(corpus, tmp_path):
    """The whole trainer, whose reductions begin inside the backward pass."""
    curves = {}
    for world in (1, 2):
        folder, command = tmp_path / str(world), [sys.executable]
        if world > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command += ["train_gpt.py", *arguments(corpus, folder, "source=hypergradient,rho=0.1,clip=1")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
        curves[world] = list(validation_losses(json.loads((folder / "run.json").read_text())).values())
    assert len(curves[1]) == 4 and curves[1][-1] < curves[1][0] - 0.01
    assert curves[2] == pytest.approx(curves[1], rel=2e-5)
