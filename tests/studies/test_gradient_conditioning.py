"""
The image check: equal terms for all arms, the search, the statistics and the measures of flatness; one reduced run of
everything.
"""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from studies import gradient_conditioning as check
from train_gpt import RunError


@pytest.fixture(scope="module")
def protocol():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(96) % 10
    images = torch.randn(10, 1, 8, 8, generator=generator)[labels] + 0.5 * torch.randn(96, 1, 8, 8, generator=generator)
    data = {name: (images[part], labels[part])
            for name, part in dict(train=slice(64), choose=slice(64, 80), test=slice(80, 96)).items()}
    return check.Protocol(data, rates=(0.01, 0.1), momenta=(0.0, 0.9), epochs=3, search_seeds=(7,), seeds=(1, 2),
                          products=30, target=1.0)


def test_digits():
    pytest.importorskip("sklearn")
    data = check.digits()
    assert {name: len(labels) for name, (_, labels) in data.items()} == dict(train=640, choose=400, test=757)
    images = torch.cat([images for images, _ in data.values()]).flatten(1)
    # no image in two parts
    assert len(images.unique(dim=0)) == 1797 and all(labels.bincount().min() > 20 for _, labels in data.values())
    assert abs(data["train"][0].mean()) < 1e-4 and data["train"][0].std().item() == pytest.approx(1, abs=1e-3)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = "^the digits come with scikit-learn, which is not installed; pip install scikit-learn$"
    with pytest.raises(RunError, match=message):
        check.digits()


def test_network():
    one, again, other = check.network(1), check.network(1), check.network(2)
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert sum(p.numel() for p in one.parameters()) == 13_706
    assert tuple(name for name, p in one.named_parameters() if p.ndim > 1) == check.WEIGHTS
    assert one(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_plain_arm_is_sgd_of_pytorch(protocol):
    model, (images, labels) = check.network(1), protocol.data["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in check.batches(64, protocol.epochs, 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    result = check.train(dict(lr=0.05, momentum=0.9), 1, protocol)
    assert result["test"]["loss"] == pytest.approx(check.measure(model, *protocol.data["test"])["loss"], rel=1e-4)
    start = check.network(1)
    assert result["moved"]["5.weight"] == pytest.approx(
        ((model[5].weight - start[5].weight).norm() / start[5].weight.norm()).item(), rel=1e-3)
    assert result["drift"]["0.weight"] == pytest.approx((model[0].weight.mean() - start[0].weight.mean()).item(),
                                                        rel=1e-2)


def test_arms_begin_alike_and_neutral_ones_are_sgd(protocol):
    settings = dict(lr=0.05, momentum=0.9)
    results = {name: check.train(arm.options(arm.start) | settings, 1, protocol) for name, arm in check.ARMS.items()}
    neutral = {"SGDm", "per-tensor lr", "table", "structural", "structural, scale only", "shift only"}
    assert {name for name, result in results.items() if result == results["SGDm"]} == neutral
    assert len({json.dumps(results[name]) for name in results.keys() - neutral}) == len(results) - len(neutral)


def test_every_choice_of_every_search_is_accepted(protocol):
    model = check.network(0)
    for arm in check.ARMS.values():
        for name, values in arm.search.items():
            for value in values:
                check.Options(**arm.options(arm.start | {name: value}))
    with pytest.raises(RunError, match="matches no conditioned tensor"):
        check.stepper(model, dict(source="table", table="1.weight/2/0"))


def test_a_diverged_run_has_a_number(protocol):
    result = check.train(dict(lr=1e6, momentum=0.9), 1, protocol)
    assert result["choose"]["loss"] == 100.0 and 0 <= result["test"]["accuracy"] <= 100


def test_search(protocol):
    seen = []

    def run(options, seed, _protocol):
        seen.append((options["lr"], options["momentum"], options.get("r"), options.get("p"), seed))
        loss = abs(np.log10(options["lr"] * 3 ** options.get("r", 0) / 0.3)) + abs(
            options.get("p", 0) - 0.5) + options["momentum"]
        return dict(choose=dict(loss=loss))
    search = check.Search(protocol, run)
    arm = check.Arm(check.structural_of, dict(r=0.0, p=0.0), dict(r=(-1, 0.5, 1), p=(-0.5, 0.5)))
    common, own, points, tried = search.tune(arm)
    assert common == dict(lr=0.1, momentum=0.0) and own == dict(r=1, p=0.5)
    assert len(points) == 4 and min(points, key=lambda point: point["loss"])["loss"] == pytest.approx(0)
    assert tried == len(seen) == len(set(seen)) == 4 + 3 + 2 + 3 and {seed for *_, seed in seen} == {7}
    search.tune(arm)
    assert search.tune(check.Arm())[3] == 4 and len(seen) == tried  # nothing is run twice


def test_paired():
    a, b = [3.0, 5.0, 4.0, 8.0], [2.0, 3.0, 4.0, 4.0]
    found = check.paired(a, b)
    assert found["mean"] == 1.75 and found["error"] == pytest.approx(np.std([1, 2, 0, 4], ddof=1) / 2)
    assert found["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert check.paired(a, a) == dict(mean=0.0, error=0.0, p=1.0)


def small_network(scale: float = 1.0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 10, bias=False))
    with torch.no_grad():
        for p, factor in zip(model.parameters(), (scale, 1 / scale)):
            p.copy_(factor * torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
    return model


def test_flatness_against_the_whole_hessian(protocol):
    model, (images, labels) = small_network(), protocol.data["train"]
    parameters = dict(model.named_parameters())
    start = torch.cat([p.detach().flatten() for p in parameters.values()])
    units = torch.cat([p.detach().norm(dim=1, keepdim=True).expand_as(p).flatten() for p in parameters.values()])

    def loss(u):
        w = start + units * u
        return F.cross_entropy(torch.relu(images.flatten(1) @ w[:256].view(4, 64).T) @ w[256:].view(10, 4).T, labels)
    hessian = torch.func.hessian(loss)(torch.zeros_like(start))
    found = check.flatness(model, images, labels, 400)
    values = torch.linalg.eigvalsh(hessian)
    assert found["lambda_max"] == pytest.approx(values.abs().max().item(), rel=1e-2)
    assert found["trace"] == pytest.approx(hessian.trace().item(), rel=0.1)
    assert found["train_loss"] == pytest.approx(loss(torch.zeros_like(start)).item(), rel=1e-5)
    generator = torch.Generator().manual_seed(6)
    steps = [0.05 * F.normalize(torch.randn(start.shape, generator=generator), dim=0) for _ in range(50)]
    slope = torch.func.grad(loss)(torch.zeros_like(start)).norm().item()
    bound = 0.05 * slope + 0.5 * 0.05 ** 2 * values.abs().max().item()
    assert max((loss(u) - loss(0 * u)).item() for u in steps) < found["sharpness"]
    assert 0.9 * 0.05 * slope < found["sharpness"] < 1.2 * bound
    assert torch.equal(start, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_flatness_does_not_see_the_scale_of_filters(protocol):
    one, other = (check.flatness(small_network(scale), *protocol.data["train"], 40) for scale in (1.0, 8.0))
    assert other == {name: pytest.approx(value, rel=2e-2) for name, value in one.items()}


def test_flatness_is_measured_at_the_target(protocol):
    found = check.flatness_at(dict(lr=0.1, momentum=0.9), 1, protocol)
    assert 0.3 < found["train_loss"] <= 1.0 and found["steps"] % 4 == 0 and found["lambda_max"] > 0
    assert check.flatness_at(dict(lr=1e-6, momentum=0.0), 1, protocol) is None


@pytest.mark.parametrize("gain, sharper, word",
                         [(1.0, -0.5, "confirmed"), (1.0, 0.5, "not confirmed"), (0.0, -0.5, "not confirmed"),
                          (-1.0, -0.5, "not confirmed")])
def test_verdict(gain, sharper, word):
    def row(loss, conditioned, mean):
        return (dict(choose_loss=loss, conditioned=conditioned, accuracy=dict(
        mean=95.0, published=40.0, against={"per-tensor lr": dict(mean=mean, error=0.3)})))

    rows = {"SGDm": row(0.1, False, 0.0), "per-tensor lr": row(0.1, False, 0.0), "table": row(0.3, True, gain),
            "structural": row(0.4, True, 9.0)}
    flat = {"per-tensor lr": [dict(lambda_max=value) for value in (1.0, 2.0, 3.0)] + [None],
            "table": [dict(lambda_max=value + sharper + noise)
                      for value, noise in ((1.0, 0.01), (2.0, -0.02), (3.0, 0.0))] + [dict(lambda_max=9.0)]}
    text = check.verdict_of(rows, flat)
    assert text.startswith("Chosen in the search: table.") and f": {word}. " in text and "from 40.00 to 95.00 %" in text
    assert "not measured: not confirmed" in check.verdict_of(rows, flat | {"table": [None] * 4})


def test_script_writes_results_and_tables(tmp_path, monkeypatch, capsys, protocol):
    monkeypatch.setattr(check, "require_tests", lambda *paths: None)
    monkeypatch.setattr(check, "digits", lambda: protocol.data)
    monkeypatch.setattr(sys, "argv", ["gradient_conditioning.py", "--quick", "--output", str(tmp_path / "out.json")])
    threads = torch.get_num_threads()
    try:
        assert check.main() == 0
    finally:
        torch.set_num_threads(threads)
    results, tables = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    assert results["quick"] and results["threads"] == 1 and {"git_commit", "torch", "device", "date"} <= set(results)
    assert list(results["arms"]) == list(check.ARMS)
    assert tables in capsys.readouterr().out and results["verdict"] in tables
    assert "Infinity" not in (tmp_path / "out.json").read_text()
    assert sum(line.startswith("| ") for line in tables.splitlines()) == 3 * 2 + 2 * len(check.ARMS) + len(
        results["flatness"])
    assert results["arms"]["SGDm"]["accuracy"]["against"]["SGDm"] == dict(mean=0.0, error=0.0, p=1.0)


def test_no_figure_while_tests_fail(tmp_path, monkeypatch, capsys, protocol):
    def failing(*paths):
        raise RunError("no figures while tests fail: made up")
    monkeypatch.setattr(check, "require_tests", failing)
    monkeypatch.setattr(check, "digits", lambda: protocol.data)
    monkeypatch.setattr(sys, "argv", ["gradient_conditioning.py", "--quick", "--output", str(tmp_path / "out.json")])
    threads = torch.get_num_threads()
    try:
        assert check.main() == 1
    finally:
        torch.set_num_threads(threads)
    assert "made up" in capsys.readouterr().err and not list(tmp_path.iterdir())
