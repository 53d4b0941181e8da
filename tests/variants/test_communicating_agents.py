"""communicating_agents: what passes the bottleneck, means over documents, the published pair position by position."""

import pytest
import torch
import torch.nn.functional as F

from generate import decodes_from_cache
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.communicating_agents import mean_so_far


def test_mean_is_of_the_document_so_far():
    model = build("communicating_agents:pool=mean,message=4")
    tokens = random_tokens()
    tokens[0, 5] = tokens[1, 0] = tokens[1, 9] = 256
    mask = model.masks(tokens)[0]
    x = torch.randn(2, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = mean_so_far(x, mask)
    for b, begins in ((0, (0, 5)), (1, (0, 9))):
        for t in range(16):
            start = max(begin for begin in begins if begin <= t)
            assert relative_rms(got[b, t], x[b, start:t + 1].mean(0)) < 10 * float_bound(16, torch.float64)


CASES = [("message=3", 2), ("message=3,at_layer=1", 1), ("message=3,at_layer=3", 3)]


@pytest.mark.parametrize("options, at_layer", CASES)
def test_the_stream_above_is_a_function_of_the_message(options, at_layer):
    model = scramble(build(f"communicating_agents:{options}"), 0.1)
    tokens = random_tokens()
    x, contexts = model.embed(tokens, model.masks(tokens))
    streams = []
    for layer, (block, ctx) in enumerate(zip(model.blocks, contexts)):
        if layer == at_layer:
            x = model.listen.weight @ (model.speak.weight @ F.rms_norm(x, (32,), eps=1e-6)[..., None])
            x = x[..., 0]
        # of the pairs (0, 3) and (1, 2) those on one side
        if layer == 2 and at_layer in (1, 3):
            x = x + model.skip_weights[0] * streams[1]
        x = block(x, ctx)
        streams.append(x)
    assert relative_rms(stream_of(model, tokens), x) < 100 * float_bound(64, torch.float64)
    assert (model.skip_weights is None) == (at_layer == 2)


def test_bottleneck_decodes_from_its_caches():
    model = scramble(build("communicating_agents", dtype=torch.float32), 0.05).eval()
    assert decodes_from_cache(model)
    model = scramble(build("communicating_agents:pool=mean", dtype=torch.float32), 0.05).eval()
    assert not decodes_from_cache(model)


def published(**changes):
    config = config_of(vocab_size=256, value_embeddings=0, **changes)
    return scramble(build("communicating_agents:style=published,message=5,ctx=3,stride=8", config=config), 0.1)


def test_published_pair_by_hand():
    model = published()
    tokens = random_tokens()
    tokens[0, 6] = 255
    x = model.final_norm(model.run_blocks(*model.embed(tokens, model.masks(tokens))))
    logits = model(tokens)
    for t in (0, 1, 5, 6, 7, 15):
        start = 6 if t >= 6 else 0
        message = model.speak.weight @ x[0, start:t + 1].mean(0)
        nothing = torch.zeros(32, dtype=torch.float64)
        last = [model.letters.weight[tokens[0, s]] if s >= start else nothing for s in (t - 2, t - 1, t)]
        y = F.gelu(model.second.weight @ F.gelu(model.first.weight @ torch.cat((message, *last))))
        cap = model.config.logit_softcap
        expected = cap * torch.tanh(model.head.projection.weight @ y / cap)
        assert relative_rms(logits[0, t], expected) < 100 * float_bound(64, torch.float32)


def test_published_pair_learns_at_some_positions_and_is_scored_at_all():
    model, tokens, targets = published(), random_tokens(), random_tokens(seed=2)
    losses = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(2, 16)
    assert model.train()(tokens, targets).item() == pytest.approx(losses[:, 7::8].mean().item(), rel=1e-5)
    assert model.eval()(tokens, targets).item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_published_counts():
    """The reader's and the writer's numbers of the published shape."""
    config = config_of(vocab_size=1024, layers=3, model_dim=128, heads=4, head_dim=32, mlp_hidden=256, x0_skip=False,
                       unet_skips=False, smear=False, attention_gate=False, value_embeddings=0)
    model = build("communicating_agents:style=published,message=64", config=config, dtype=torch.float32)
    writer = sum(p.numel() for module in (model.letters, model.first, model.second, model.head)
                 for p in module.parameters())
    assert writer == 737_280 and sum(p.numel() for p in model.parameters()) - writer == 532_480
