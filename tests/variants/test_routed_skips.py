"""routed_skips against its formula, its start, its options and its faults."""

import pytest
import torch
import torch.nn.functional as F

import train_gpt
import variants
from kernels.probability_maps import MAPS
from tests.errors import float_bound, relative_rms
from variants.routed_skips import Router

SMALL = dict(vocab_size=257, layers=5, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, zero_init_projections=False)
CONFIG = train_gpt.make_config(SMALL)


def build(options: str = "", config=CONFIG) -> train_gpt.GPT:
    with variants.applied((f"routed_skips:{options}".rstrip(":"),), config):
        model = train_gpt.GPT(config)
    model.initialize(1)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(1))


def awake(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for router in model.routers.values():
            for p in router.parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return model


def test_formula():
    model = awake(build("temperature=learned"))
    assert {layer: router.bias.numel() for layer, router in model.routers.items()} == {"2": 2, "3": 3, "4": 4}
    x, contexts = model.embed(tokens(), model.masks(tokens()))
    streams, y = [x], x
    for layer, (block, ctx) in enumerate(zip(model.blocks, contexts)):
        if layer >= 2:
            router = model.routers[str(layer)]
            scores = F.rms_norm(y, (32,), eps=1e-6)[..., :12] @ router.scores.weight.T + router.bias
            scores = scores / router.log_temperature.exp()
            p = torch.softmax(scores, -1)
            y = y + router.weight * sum(p[..., j:j + 1] * streams[j] for j in range(layer))
        y = block(y, ctx)
        streams.append(y)
    # of either form, in five layers
    assert relative_rms(model.run_blocks(x, contexts), y) < 2 * float_bound(5 * (16 + 5 * 32 + 64), torch.float32)


@pytest.mark.parametrize("name", MAPS)
def test_every_map_starts_with_equal_weights_and_is_used(name):
    model = build(f"map={name}")
    router, x = model.routers["3"], torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(router.probabilities(x), torch.full((2, 5, 3), 1 / 3))
    awake(model)
    p = router.probabilities(x)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 5))
    softmax = build()
    awake(softmax)
    assert torch.allclose(p, softmax.routers["3"].probabilities(x), atol=1e-4) == (name == "softmax")


@pytest.mark.parametrize("options, default, differs", [
    ("map=max_shift_rational,power=3", "map=max_shift_rational", 1e-4),
    ("map=min_shift_linear,eps=0.5", "map=min_shift_linear", 1e-3),
    ("map=squareplus,logit_scale=2", "map=squareplus", 0.0),
    ("logit_scale=2", "", 1e-3)])
def test_options_reach_the_map(options, default, differs):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    p, expected = (awake(build(text)).routers["4"].probabilities(x) for text in (options, default))
    if differs:
        assert not torch.allclose(p, expected, atol=differs)
    else:  # 2 is its slope already
        torch.testing.assert_close(p, expected)


def test_parameters():
    model = build()
    count, baseline = (sum(p.numel() for p in m.parameters()) for m in (model, train_gpt.GPT(CONFIG)))
    assert count - baseline == sum(12 * n + n + 1 for n in (2, 3, 4)) - 2  # two mirrored weights go
    assert all(p.optimizer == "adam" for p in model.routers.parameters() if p.ndim > 1)
    assert isinstance(model.routers["2"], Router)


@pytest.mark.parametrize("options, layers, message", [
    ("logit_scale=big", 5, "logit_scale=big: give auto or a factor above 0"),
    ("logit_scale=0", 5, "logit_scale=0: give auto"),
    ("power=0", 5, "power=0.0,eps=0.001: give numbers above 0"),
    ("", 2, "with 2 layers there is nothing to choose from; give --layers 3 or more")])
def test_faults(options, layers, message):
    with pytest.raises(train_gpt.RunError, match=f"variant routed_skips: {message}"):
        build(options, train_gpt.make_config(SMALL | dict(layers=layers)))
