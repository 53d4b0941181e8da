"""
splanifold_mlp against the paper's formula written with its stored tensors, its sizes, initial tensors and optimizers,
and the faults of its options.
"""

import math

import pytest
import torch

import train_gpt
import variants
from kernels.splanifold import SplanifoldControls, splanifold_reference
from tests.errors import float_bound, relative_rms

SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=96, zero_init_projections=False)
PRESETS = ("lowdim2", "lowdim3", "dense16", "small", "fast", "paper", "exodus18m")
SUM4 = "preset=lowdim2,mix=sum,out_proj=off,dims=4,nodes=2"
EQUAL = ("preset=lowdim2", "preset=lowdim3", "preset=dense16", SUM4)


def config_of(**given) -> train_gpt.Config:
    return train_gpt.make_config(SMALL | given)


def build_mlp(spec: str, config: train_gpt.Config):
    with variants.applied((spec,), config):
        model = train_gpt.GPT(config)
    model.initialize(1)
    return model.blocks[1].mlp


def awake(mlp):
    """Random numbers in what begins as a constant."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (mlp.points, mlp.gain, mlp.centre):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return mlp


def parameters_of(spec: str, config: train_gpt.Config) -> tuple[int, int]:
    """(of the feed-forward that is replaced, of the variant's)."""
    with torch.device("meta"):
        original = train_gpt.MLP(config, 0)
        with variants.applied((spec,), config):
            replaced = train_gpt.MLP(config, 0)
    return tuple(sum(p.numel() for p in mlp.parameters()) for mlp in (original, replaced))


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def squash_mean(z):
    mean = z.sum(-1, keepdim=True) / z.shape[-1]
    return (z - mean) / 5 + sigmoid(mean * math.sqrt(z.shape[-1]))


@pytest.mark.parametrize("spec, squash, settings", [
    ("preset=lowdim2", squash_mean, {}),
    ("preset=lowdim2,squash=sigmoid", sigmoid, {}),
    (SUM4 + ",squash=sigmoid", sigmoid, {}),
    ("preset=paper", sigmoid, {}),
    ("preset=exodus18m,dims=8", sigmoid, {}),
    ("preset=dense16,dims=8", sigmoid, {}),
    ("preset=lowdim3,squash=none", lambda z: 0.5 + 0.2 * z, {}),
    ("preset=small,mix=sum", squash_mean, {}),
    ("preset=lowdim2,squash=sigmoid,nodes=4,expansion=0.3,delta_max=0.2,eps=0.05", sigmoid,
     dict(expansion=0.3, delta_max=0.2, eps=0.05))])
def test_formula(spec, squash, settings):
    mlp = awake(build_mlp(f"splanifold_mlp:{spec}", config_of()).double())
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    # the formula
    z = x if mlp.fc is None else x @ mlp.fc.weight.T
    K = mlp.bases.shape[-1]
    z = (z * mlp.gain - mlp.centre).view(10, -1, K)
    controls = SplanifoldControls(mlp.points, 8 * mlp.bases, 8 * K * mlp.point_tangents, 32 * mlp.base_tangents)
    mix = "sum" if "sum" in spec or "paper" in spec else "concat"
    expected = splanifold_reference(squash(z), controls, mix=mix, **settings).view(2, 5, -1)
    expected = expected if mlp.proj is None else expected @ mlp.proj.weight.T

    terms = 6 * mlp.bases.shape[0] * K + 2 * 96  # six matrices, summed groups, the products before and after
    assert expected.std() > 1e-2 and relative_rms(mlp(x), expected) < float_bound(terms, torch.float64)


def test_relative_tangents():
    mlp = awake(build_mlp("splanifold_mlp:preset=dense16,dims=8,tangents=relative", config_of()))
    with torch.no_grad():
        mlp.sigma.fill_(0.7)
        controls = mlp.controls(torch.float32)
    assert torch.allclose(controls.point_tangents, 0.7 * (64 * mlp.point_tangents - mlp.points[..., None]))
    assert torch.allclose(controls.base_tangents, 0.7 * (32 * mlp.base_tangents - 8 * mlp.bases))
    assert mlp.sigma.ndim == 0


@pytest.mark.parametrize("track", ["cpu", "small", "benchmark"])
@pytest.mark.parametrize("spec", EQUAL)
def test_as_many_parameters_as_the_mlp_it_replaces(track, spec):
    config = train_gpt.make_config(dict(track=track, vocab_size=257, layers=1))
    original, replaced = parameters_of(f"splanifold_mlp:{spec}", config)
    # a group of dense16 is a ninth of the layer of track cpu
    assert replaced == pytest.approx(original, rel=0.06 if "dense16" in spec else 0.02)


@pytest.mark.parametrize("preset, share", [
    ("lowdim2", 0.97), ("lowdim3", 0.97), ("dense16", 0.70), ("small", 0.19), ("paper", 0.50)])
def test_flops_beside_those_of_the_mlp_it_replaces(preset, share):
    config = train_gpt.make_config(dict(track="cpu", vocab_size=257))
    original = train_gpt.flops_per_token(config)
    with variants.applied((f"splanifold_mlp:preset={preset}",), config):
        replaced = train_gpt.flops_per_token(config)
    of_mlps = config.layers * 6 * 2 * config.model_dim * config.mlp_hidden
    assert 1 + (replaced - original) / of_mlps == pytest.approx(share, abs=0.02)


def test_sizes_of_the_other_presets():
    config = train_gpt.make_config(dict(track="cpu", vocab_size=257))
    original, small = parameters_of("splanifold_mlp:preset=small", config)
    assert small / original == pytest.approx(0.2, rel=0.05)
    assert parameters_of("splanifold_mlp:preset=small,budget=0.5", config)[1] / original == pytest.approx(0.5, rel=0.05)
    assert parameters_of("splanifold_mlp:preset=paper", config)[1] == 128 * (2 + 6 * 128) + 2 * 128
    exodus = train_gpt.make_config(dict(track="exodus18m", vocab_size=50257))
    controls = 4 * 32 * (2 + 6 * 32)  # 3.18M in 128 layers
    assert parameters_of("splanifold_mlp:preset=exodus18m", exodus)[1] == controls + 2 * 128


@pytest.mark.parametrize("options, nodes", [("preset=paper", 2), ("preset=lowdim2", 3), ("preset=dense16", 5),
                                            ("nodes=7", 7)])
def test_nodes(options, nodes):
    assert build_mlp(f"splanifold_mlp:{options}", config_of()).bases.shape[1] == nodes


def test_groups_given():
    mlp = build_mlp("splanifold_mlp:preset=lowdim2,groups=5,dims=4", config_of())
    assert mlp.fc.weight.shape == (20, 32) and mlp.proj.weight.shape == (32, 20) and mlp.bases.shape == (5, 3, 4, 4)
    assert build_mlp("splanifold_mlp:groups=8,out_proj=off,dims=4,nodes=2", config_of()).bases.shape == (8, 2, 4, 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_begins_as_the_identity(preset):
    config = config_of(zero_init_projections=True)
    mlp = build_mlp(f"splanifold_mlp:preset={preset}", config)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    y = mlp(x)
    assert not y.any()
    y.backward(torch.ones_like(y))
    output = mlp.proj.weight if mlp.proj is not None else mlp.bases
    assert output.grad.abs().max() > 1e-3


@pytest.mark.parametrize("spec, rate", [
    (SUM4, 1), ("preset=lowdim2", 1), ("preset=dense16", 0.25), ("preset=small", 0.25),
    ("preset=lowdim2,rate=0.5", 0.5)])
def test_optimizers(spec, rate):
    mlp = build_mlp(f"splanifold_mlp:{spec}", config_of())
    summed = mlp.groups if spec == SUM4 else 1
    for p in (mlp.bases, mlp.point_tangents, mlp.base_tangents):
        assert p.optimizer == "muon" and p.lr_mul == pytest.approx(rate * summed ** -0.5) and p.ndim == 4
    assert mlp.points.optimizer == "adam" and mlp.points.lr_mul == pytest.approx(1 / summed)
    assert not torch.equal(mlp.bases, mlp.point_tangents) and mlp.bases.std() > 0.01


@pytest.mark.parametrize("spec, message", [
    ("nodes=1", "nodes=1: a curve has at least 2"),
    ("groups=-1", "groups=-1,dims=16: give positive numbers"),
    ("eps=0", "eps=0.0: give a number above 0"),
    ("rate=-1", "rate=-1.0: give a factor"),
    ("budget=-1", "budget=-1.0: give a share"),
    ("expansion=-1", "expansion=-1.0,delta_max=0.0: neither may be negative"),
    ("preset=paper,dims=5", "without in_proj groups x dims must be model_dim = 32, got groups=1,dims=5"),
    ("groups=5,dims=4,out_proj=off", "groups=5 do not divide model_dim = 32 outputs")])
def test_faults(spec, message):
    with pytest.raises(train_gpt.RunError, match=f"variant splanifold_mlp: {message}"):
        build_mlp(f"splanifold_mlp:{spec}", config_of())
