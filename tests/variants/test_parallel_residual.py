"""parallel_residual against its formula, with the trainer's attention, feed-forward and residual and with others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
import variants
from tests.errors import float_bound, relative_rms

# of two forms of a block: sums over tokens, the width and hidden channels
BOUND = 2 * float_bound(16 + 5 * 32 + 64, torch.float32)

CONFIG = train_gpt.make_config(dict(
    vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, zero_init_projections=False))


def build(*specs: str) -> train_gpt.GPT:
    with variants.applied(specs, CONFIG):
        model = train_gpt.GPT(CONFIG)
    model.initialize(1)
    return model


def shapes_of(model: train_gpt.GPT) -> dict:
    return {name: p.shape for name, p in model.named_parameters()}


def stream_and_context(model, layer):
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(1))
    x, contexts = model.embed(tokens, model.masks(tokens))
    return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), contexts[layer]


@pytest.mark.parametrize("spec", ["parallel_residual", "parallel_residual:norm=separate"])
def test_formula(spec):
    model, baseline = build(spec), build()
    assert shapes_of(model) == shapes_of(baseline)
    block, plain = model.blocks[1], baseline.blocks[1]  # the same initial tensors, as their names are the same
    with torch.no_grad():
        block.stream_mix.copy_(torch.tensor([0.7, 0.4]))
    x, ctx = stream_and_context(model, 1)
    mixed = 0.7 * x + 0.4 * ctx.x0
    normed = F.rms_norm(mixed, (32,), eps=1e-6)
    expected = mixed + plain.attention(normed, ctx) + plain.mlp(normed)
    assert relative_rms(block(x, ctx), expected) < BOUND
    assert not torch.allclose(plain(x, ctx), plain.attention_residual(x, expected - mixed), atol=1e-2)


def test_norms(monkeypatch):
    class LearnedNorm(train_gpt.Norm):
        def __init__(self, config, n):
            super().__init__(config, n)
            self.gain = nn.Parameter(torch.ones(n))

        def forward(self, x):
            return super().forward(x) * self.gain
    monkeypatch.setattr(train_gpt, "Norm", LearnedNorm)
    norms_of = {"parallel_residual": ["attention_norm"],
                "parallel_residual:norm=separate": ["attention_norm", "mlp_norm"]}
    for spec, norms in norms_of.items():
        model = build(spec)
        block = model.blocks[0]
        gains = [name for name, _ in block.named_parameters() if name.endswith("gain")]
        assert gains == [f"{name}.gain" for name in norms]
        x, ctx = stream_and_context(model, 0)
        with torch.no_grad():
            getattr(block, norms[-1]).gain.mul_(2.0)
        normed = F.rms_norm(x, (32,), eps=1e-6)
        expected = x + block.attention(normed * block.attention_norm.gain, ctx) + block.mlp(2 * normed)
        assert relative_rms(block(x, ctx), expected) < BOUND


def test_both_residual_seams_are_used_in_turn(monkeypatch):
    calls = []

    class ScaledResidual(nn.Module):
        def __init__(self, config, layer, branch):
            super().__init__()
            self.name, self.factor = f"{layer} {branch}", dict(attention=0.5, mlp=3.0)[branch]

        def forward(self, x, branch_output):
            calls.append(self.name)
            return 0.9 * x + self.factor * branch_output
    monkeypatch.setattr(train_gpt, "Residual", ScaledResidual)
    model = build("parallel_residual")
    block = model.blocks[1]
    x, ctx = stream_and_context(model, 1)
    normed = F.rms_norm(x, (32,), eps=1e-6)
    expected = 0.9 * (0.9 * x + 0.5 * block.attention(normed, ctx)) + 3.0 * block.mlp(normed)
    assert relative_rms(block(x, ctx), expected) < BOUND and calls == ["1 attention", "1 mlp"]


def test_with_swiglu_mlp():
    model = build("swiglu_mlp", "parallel_residual:layers=1")
    assert [type(block).__name__ for block in model.blocks] == ["Block", "ParallelBlock"]
    assert [type(block.mlp).__name__ for block in model.blocks] == ["GatedMLP", "GatedMLP"]
    x, ctx = stream_and_context(model, 1)
    block, normed = model.blocks[1], F.rms_norm(x, (32,), eps=1e-6)
    assert relative_rms(block(x, ctx), x + block.attention(normed, ctx) + block.mlp(normed)) < BOUND
