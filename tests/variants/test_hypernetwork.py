"""hypernetwork: chunks and products by their formulas, first deviations, sizes, how often it runs."""

import pytest
import torch
import torch.nn.functional as F

from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble
from variants.hypernetwork import kind_of


def test_names_of_kinds():
    assert kind_of("blocks.12.mlp.fc.weight") == (12, "mlp.fc.weight")
    assert kind_of("speak.weight") == (-1, "speak.weight")


def test_chunks_stand_side_by_side():
    """Of matrices that chunks of 24 do not fill: row r, column c is in chunk (r // 24, c // 24)."""
    source = scramble(build("hypernetwork:chunk=24,hidden=9,z_dim=5").source, 0.1)
    names = list(source.shapes)
    name = "blocks.1.mlp.fc.weight"
    assert source.grids[name] == [3, 2] and source.chunk == 24
    first = sum(source.counts[:names.index(name)])
    weight = source()[name]
    assert weight.shape == (64, 32)
    for r, c in ((0, 0), (30, 5), (63, 31), (23, 24)):
        z = source.embeddings[first + 2 * (r // 24) + c // 24]
        chunk = source.outer.weight @ torch.tanh(source.inner.weight @ z + source.inner.bias) + source.outer.bias
        expected = source.gains[names.index(name)] * chunk[24 * (r % 24) + c % 24]
        assert relative_rms(weight[r, c], expected) < 10 * float_bound(20, torch.float64)


def test_starts_with_the_baselines_deviations():
    config = config_of(zero_init_projections=True, model_dim=64, head_dim=32, mlp_hidden=128)
    model = build("hypernetwork:chunk=16", config=config, dtype=torch.float32)
    for name, weight in model.source().items():
        std = model.source.stds[name]
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item()) <= 0.1 * std


def test_fewer_numbers_than_it_writes():
    config = config_of(model_dim=256, heads=4, head_dim=64, mlp_hidden=1024, layers=8)
    with torch.device("meta"):
        source = build("hypernetwork:chunk=64,z_dim=64,hidden=64", config=config, dtype=torch.float32).source
    stored = sum(p.numel() for p in source.parameters())
    written = sum(shape.numel() for shape in source.shapes.values())
    chunks = written // 4096
    assert stored == chunks * 64 + 65 * 64 + 65 * 4096 + len(source.shapes)
    assert stored < 0.3 * written


def test_published_products():
    source = scramble(build("hypernetwork:style=published,rank=3,z_dim=4,hidden=8").source, 0.1)
    name = "blocks.2.attention.o.weight"
    head = source.heads[source.numbers["attention.o.weight"]]
    z = source.embeddings[2]
    state = F.gelu(source.outer(F.gelu(source.inner(z))))
    numbers = head.weight @ state + head.bias
    expected = numbers[:96].view(32, 3) @ numbers[96:].view(3, 32)
    assert relative_rms(source()[name], expected) < 10 * float_bound(30, torch.float64)


def test_published_start_is_small():
    source = build("hypernetwork:style=published,hidden=32", dtype=torch.float32).source
    factors = source.heads[0](torch.zeros(32))
    assert factors.std().item() == pytest.approx(1e-3, rel=0.1)
    assert all(0 < weight.abs().max() < 1e-3 for weight in source().values())


@pytest.mark.parametrize("refresh, runs", [("step", 1), ("micro", 3)])
def test_how_often_it_runs(refresh, runs, monkeypatch):
    """Over three micro batches of a step; the gradients are the same."""
    model = scramble(build(f"hypernetwork:hidden=8,refresh={refresh}", dtype=torch.float32), 0.05)
    source, calls = model.source, []
    forward = source.forward
    monkeypatch.setattr(source, "forward", lambda: calls.append(1) or forward())
    source.hold()
    for seed in (1, 2, 3):
        model(random_tokens(seed=seed), random_tokens(seed=seed + 3)).backward()
    source.release()
    assert len(calls) == runs
    assert source.embeddings.grad.any() and source.held is None
