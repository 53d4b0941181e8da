"""swiglu_mlp against its formula, and its size against the feed-forward it replaces."""

import pytest
import torch

import train_gpt
import variants
from tests.errors import float_bound, relative_rms

SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=96, zero_init_projections=False)


def config_of(**given) -> train_gpt.Config:
    return train_gpt.make_config(SMALL | given)


def build_mlp(spec: str, config: train_gpt.Config):
    with variants.applied((spec,), config):
        model = train_gpt.GPT(config)
    model.initialize(1)
    return model.blocks[1].mlp


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * (1 + torch.erf(x / 2 ** 0.5)) / 2


def squared_relu(x):
    return x.clamp_min(0) ** 2


@pytest.mark.parametrize("activation, formula", [("silu", silu), ("gelu", gelu), ("relu2", squared_relu)])
def test_formula(activation, formula):
    mlp = build_mlp(f"swiglu_mlp:activation={activation}", config_of()).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = (formula(x @ mlp.gate.weight.T) * (x @ mlp.fc.weight.T)) @ mlp.proj.weight.T
    assert expected.std() > 1e-3 and relative_rms(mlp(x), expected) < float_bound(32 + 64, torch.float64)


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_as_many_parameters_as_the_mlp_it_replaces(track):
    config = train_gpt.make_config(dict(track=track, vocab_size=257, layers=1))
    with torch.device("meta"):
        original = train_gpt.MLP(config, 0)
        with variants.applied(("swiglu_mlp",), config):
            gated = train_gpt.MLP(config, 0)
    count, expected = (sum(p.numel() for p in mlp.parameters()) for mlp in (gated, original))
    assert count == pytest.approx(expected, rel=0.01) and gated.fc.weight.shape[0] % 8 == 0


def test_hidden():
    assert build_mlp("swiglu_mlp:hidden=20", config_of()).fc.weight.shape == (20, 32)
    assert build_mlp("swiglu_mlp", config_of(mlp_hidden=1)).fc.weight.shape == (8, 32)
    with pytest.raises(train_gpt.RunError, match="variant swiglu_mlp: hidden=-8 is negative"):
        variants.apply(("swiglu_mlp:hidden=-8",), config_of())


def test_roles_and_initial_tensors():
    mlp = build_mlp("swiglu_mlp", config_of(zero_init_projections=True))
    assert mlp.gate.weight.optimizer == mlp.fc.weight.optimizer == mlp.proj.weight.optimizer == "muon"
    assert mlp.gate.weight.std() > 0.05 and mlp.fc.weight.std() > 0.05
    assert not torch.equal(mlp.gate.weight, mlp.fc.weight)
    assert not mlp.proj.weight.any()


def test_another_linear_is_honoured(monkeypatch):
    calls = []

    class CountedLinear(train_gpt.Linear):
        def forward(self, x):
            calls.append(self.weight.shape)
            return super().forward(x)
    monkeypatch.setattr(train_gpt, "Linear", CountedLinear)
    mlp = build_mlp("swiglu_mlp", config_of())
    mlp(torch.randn(1, 4, 32))
    assert calls == [(64, 32), (64, 32), (32, 64)]
