"""siren_weights: the network by its formula, deviations and effective ranks of what it writes, sizes."""

import math

import pytest
import torch

import train_gpt
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of

WIDE = dict(model_dim=128, heads=4, head_dim=32, mlp_hidden=128, layers=2, value_embeddings=0)


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the squared singular values, which sum to 1."""
    p = torch.linalg.svdvals(matrix.double()).square()
    p = p / p.sum()
    return math.exp(-(p * p.clamp_min(1e-300).log()).sum().item())


def test_formula():
    model = build("siren_weights:hidden=6,depth=3,omega_first=40")
    source, name = model.source, "blocks.2.mlp.fc.weight"
    kind = list(source.numbers).index("mlp.fc.weight")
    weight = source()[name]
    for r, c in ((0, 0), (5, 31), (63, 7)):
        point = torch.tensor([2 * r / 63 - 1, 2 * c / 31 - 1, 2 * 2 / 3 - 1], dtype=torch.float64)
        x = torch.cat((point, source.kinds[kind]))
        x = torch.sin(40 * (source.net[0].weight @ x + source.net[0].bias))
        x = torch.sin(30 * (source.net[1].weight @ x + source.net[1].bias))
        x = source.net[2].weight @ x + source.net[2].bias
        gain = source.gains[list(source.shapes).index(name)]
        # coordinates are float32
        torch.testing.assert_close(weight[r, c, None], gain * x, rtol=1e-3, atol=1e-4 * gain.item())


def test_starts_with_the_baselines_deviations():
    model = build("siren_weights:hidden=64", config=config_of(zero_init_projections=True, **WIDE), dtype=torch.float32)
    for name, weight in model.source().items():
        std = model.source.stds[name]
        if std == 0:
            assert not weight.any()
        else:
            assert weight.std().item() == pytest.approx(std, rel=0.25), name
            assert abs(weight.mean().item()) < 0.25 * std


def test_a_fast_first_layer_raises_the_rank():
    """The published network writes matrices of hardly more than one direction."""
    config = config_of(**WIDE)
    ranks = {}
    for options in ("style=published,hidden=64", "omega_first=1000", "omega_first=3000", "fourier=64"):
        model = build(f"siren_weights:{options}", config=config, dtype=torch.float32)
        ranks[options] = effective_rank(model.source()["blocks.1.attention.q.weight"])
    assert ranks["style=published,hidden=64"] < 3
    assert 20 < ranks["omega_first=1000"] < ranks["omega_first=3000"]
    assert ranks["fourier=64"] > 20
    baseline = build(config=config).blocks[1].attention.q.weight
    assert ranks["omega_first=3000"] < effective_rank(baseline) < 128


def test_counts():
    def count(options):
        return sum(p.numel() for p in build(f"siren_weights:{options}", dtype=torch.float32).source.parameters())

    assert count("style=published,hidden=256") == 135_041
    kinds, matrices = 6, 24
    assert count("hidden=10,depth=3") == 12 * 10 + 11 * 10 + 11 + 8 * kinds + matrices


def test_checkpointed_gradient_is_the_plain_one():
    source = build("siren_weights:hidden=5,depth=3").source
    name = next(iter(source.shapes))
    source()[name].square().sum().backward()
    got = [p.grad.clone() for p in source.net.parameters()]
    source.zero_grad()
    (source.gains[0] * source.write(name)).square().sum().backward()
    for p, g in zip(source.net.parameters(), got):
        assert relative_rms(g, p.grad) < 10 * float_bound(1024, torch.float64)


def test_kinds_of_every_layer_share_a_vector():
    source = build("siren_weights").source
    assert sorted(source.numbers) == sorted({name.split(".", 2)[2] for name in source.shapes})
    assert len(train_gpt.matrices_of(build())) == len(source.shapes)
