"""low_rank against dense matrices, its first tensors, and what follows a step."""

import pytest
import torch

import train_gpt
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, stream_of
from variants import low_rank
from variants.check import ALONE

STYLES = ("two_factor", "stiefel", "published")


def dense(layer: low_rank.LowRankLinear) -> torch.Tensor:
    """The matrix of a layer, (n_out, n_in)."""
    sigma = 1.0 if layer.sigma is None else layer.sigma
    return (layer.up * sigma) @ layer.down


def layers_of(model) -> dict[str, low_rank.LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, low_rank.LowRankLinear)}


@pytest.mark.parametrize("style", STYLES)
def test_full_rank_is_the_dense_layer(style, monkeypatch):
    monkeypatch.setattr(low_rank, "PUBLISHED_STD", 0.5 * 32 ** -0.5)  # the baseline's, where a matrix has 32 columns
    model, baseline = build(f"low_rank:rank=32,style={style}"), build()
    for name, layer in layers_of(model).items():
        if layer.down.shape[1] == 32:
            expected = baseline.get_submodule(name).weight
            assert relative_rms(dense(layer), expected) < 10 * float_bound(32, torch.float32), name


@pytest.mark.parametrize("style", STYLES)
def test_begins_as_the_nearest_matrix_of_its_rank(style):
    model = build(f"low_rank:rank=4,style={style}")
    layer = model.blocks[1].attention.q
    start = train_gpt.draw_normal("blocks.1.attention.q.weight", (32, 32), layer.std, 1).double()
    u, s, v = torch.linalg.svd(start)
    nearest = (u[:, :4] * s[:4]) @ v[:4]
    assert relative_rms(dense(layer), nearest) < 10 * float_bound(32, torch.float32)


@pytest.mark.parametrize("style", STYLES)
def test_gradients_are_those_of_the_composite(style):
    layer = build(f"low_rank:rank=4,style={style}").blocks[0].mlp.fc
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    results = []
    for y in (layer(x), x @ dense(layer).T):
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))))
    for got, expected in zip(*results):
        assert relative_rms(got, expected) < float_bound(32 + 4 + 64 + 2, torch.float64)


@pytest.mark.parametrize("style", ("stiefel", "published"))
def test_a_branch_that_begins_at_zero_can_leave_it(style):
    model = build(f"low_rank:rank=4,style={style}", config=config_of(zero_init_projections=True))
    layer = model.blocks[0].attention.o
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert not layer(x).any() and not layer.sigma.any()
    layer(x).sum().backward()
    assert layer.sigma.grad.all() and not layer.up.grad.any()


def test_ranks_and_targets():
    def ranks(options):
        model = build(f"low_rank:{options}")
        return {name.removeprefix("blocks.0."): len(layer.down) for name, layer in layers_of(model).items()
                if name.startswith("blocks.0.")}

    assert ranks("targets=q,rank=5") == {"attention.q": 5}
    assert ranks("targets=mlp") == {"mlp.fc": 8, "mlp.proj": 8}
    attention = dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.o"), 3)
    assert ranks("attn_rank=3,mlp_rank=7") == attention | {"mlp.fc": 7, "mlp.proj": 7}
    assert ranks("rank=6,attn_rank=0") == {"mlp.fc": 6, "mlp.proj": 6}
    assert set(ranks("rank=1000,style=published").values()) == {32}


def step_once(model, config):
    """One step on random gradients."""
    optimizers = train_gpt.build_optimizers(model, config, ALONE)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad.copy_(torch.randn(p.shape, generator=generator))
    optimizers = low_rank.build_optimizers(model, config, ALONE, lambda *arguments: optimizers)
    for optimizer in optimizers:
        optimizer.step(1.0, 0.5)


def test_stiefel_stays_orthonormal():
    config = config_of()
    model = build("low_rank:rank=4,style=stiefel", config=config, dtype=torch.float32)
    before = model.blocks[0].mlp.fc.up.clone()
    for _ in range(2):
        step_once(model, config)
    for layer in layers_of(model).values():
        for gram in (layer.up.T @ layer.up, layer.down @ layer.down.T):
            assert (gram - torch.eye(4)).abs().max() < 4 * float_bound(64, torch.float32)
        # sigma is the singular values
        singular = torch.linalg.svdvals(dense(layer))[:4]
        torch.testing.assert_close(singular, layer.sigma.abs().sort(descending=True).values, rtol=1e-4, atol=1e-5)
    assert (model.blocks[0].mlp.fc.up - before).abs().max() > 1e-3


def test_newton_schulz_comes_back_from_a_long_step():
    x = torch.linalg.qr(torch.randn(2, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    y = low_rank.orthonormalize(x @ torch.diag(torch.linspace(0.7, 1.3, 5, dtype=torch.float64)))
    assert (y.mT @ y - torch.eye(5, dtype=torch.float64)).abs().max() < 1e-12


def test_decay_is_of_the_product():
    """Weight decay moves both factors down the slope of half the product's squared norm."""
    config = config_of(weight_decay=0.5)
    model = build("low_rank:rank=4")
    layer = model.blocks[2].mlp.proj
    (dense(layer).square().sum() / 2).backward()
    expected = [p - config.lr_matrix * 0.25 * 0.5 * p.grad for p in (layer.up, layer.down)]
    low_rank.FactorStep(model, config).step(0.25, 0.5)
    for p, value in zip((layer.up, layer.down), expected):
        torch.testing.assert_close(p.detach(), value.detach(), rtol=1e-12, atol=1e-12)
    assert layer.up.wd_mul == 0


def test_a_smaller_rank_is_another_model():
    tokens = random_tokens()
    assert relative_rms(stream_of(build("low_rank:rank=2"), tokens), stream_of(build(), tokens)) > 0.01
