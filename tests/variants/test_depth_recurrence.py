"""depth_recurrence: the order of its passes, its gradients, its stages and its cache."""

import re

import torch

import train_gpt
import variants
from generate import decodes_from_cache
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.check import ALONE
from variants.depth_recurrence import list_passes

PLAIN = dict(unet_skips=False, value_embeddings=0)


def test_order_of_passes():
    def layers(order, times=2, looped=(3, 4)):
        return [layer for layer, _ in list_passes(6, list(looped), times, order)]

    assert layers("span") == [0, 1, 2, 3, 4, 3, 4, 5]
    assert layers("in_place") == [0, 1, 2, 3, 3, 4, 4, 5]
    assert layers("span", 3, (0,)) == [0, 0, 0, 1, 2, 3, 4, 5]
    assert layers("in_place", 2, (1, 4)) == [0, 1, 1, 2, 3, 4, 4, 5]
    assert layers("span", 1) == list(range(6))
    assert [number for _, number in list_passes(4, [1, 2], 2, "span")] == [0, 0, 0, 1, 1, 0]


def test_gradient_is_the_sum_over_passes():
    """A looped layer's gradient is that of equal layers one after another, added up."""
    looped = build("depth_recurrence:looped=1,2,order=span,pass_embedding=off,start=0", config=config_of(**PLAIN))
    deep = build(config=config_of(layers=6, **PLAIN))
    order = [0, 1, 2, 1, 2, 3]
    with torch.no_grad():
        for name, p in deep.named_parameters():
            source = re.sub(r"(?<=^blocks\.)\d", lambda match: str(order[int(match[0])]), name)
            p.copy_(looped.get_parameter(source))
    tokens = random_tokens()
    outputs = [stream_of(model, tokens) for model in (looped, deep)]
    assert relative_rms(*outputs) < float_bound(64, torch.float64)
    for y in outputs:
        y.square().sum().backward()
    for name in ("attention.q.weight", "mlp.proj.weight", "stream_mix"):
        expected = sum(deep.get_parameter(f"blocks.{number}.{name}").grad for number in (1, 3))
        got = looped.get_parameter(f"blocks.1.{name}").grad
        assert relative_rms(got, expected) < 100 * float_bound(64 + 32, torch.float64), name


def test_pass_embeddings_begin_without_effect_and_then_have_one():
    spec = "depth_recurrence:looped=1,2,times=3,start=0"
    model, plain = build(spec), build(f"{spec},pass_embedding=off")
    tokens = random_tokens()
    assert model.pass_embeddings.shape == (2, 2, 32) and plain.pass_embeddings is None
    assert torch.equal(stream_of(model, tokens), stream_of(plain, tokens))
    with torch.no_grad():
        model.pass_embeddings[1, 0] += 1
    assert not torch.equal(stream_of(model, tokens), stream_of(plain, tokens))


def test_before_its_start_it_is_the_baseline():
    model, baseline = build("depth_recurrence:start=0.4"), build()
    tokens = random_tokens()
    stages = [model.stage(progress) for progress in (0.0, 0.39, 0.4, 1.0)]
    assert stages == [(0, False), (0, False), (0, True), (0, True)]
    model.set_windows(0.39)
    assert torch.equal(stream_of(model, tokens), stream_of(baseline, tokens))
    model.set_windows(0.4)
    assert not torch.equal(stream_of(model, tokens), stream_of(baseline, tokens))


def test_skips_join_the_passes_mirrored():
    model = build("depth_recurrence:looped=1,times=3,start=0,pass_embedding=off")
    assert len(model.passes) == 6 and model.skip_weights.shape == (3,)
    tokens = random_tokens()
    x, contexts = model.embed(tokens, model.masks(tokens))
    streams = [x]
    for step, layer in enumerate([0, 1, 1, 1, 2, 3]):
        x = streams[-1]
        if step >= 3:
            x = x + model.skip_weights[0] * streams[1 + 5 - step]
        streams.append(model.blocks[layer](x, contexts[layer]))
    assert relative_rms(stream_of(model, tokens), streams[-1]) < float_bound(64, torch.float64)


def test_every_pass_keeps_its_own_keys():
    model = scramble(build("depth_recurrence:times=3", dtype=torch.float32), 0.05).eval()
    assert decodes_from_cache(model)


def test_all_stages_are_warmed_up(monkeypatch):
    """The trainer runs both stages before the clock starts."""
    config = config_of(steps=8, compile="off")
    seen = []
    with variants.applied(("depth_recurrence:start=0.6",), config):
        model = train_gpt.build_model(config, ALONE)
    trainer = object.__new__(train_gpt.Trainer)
    trainer.model, trainer.config, trainer.ranks, trainer.val_batches = model, config, ALONE, []
    trainer.state_dict, trainer.load_state_dict = dict, lambda kept: None
    trainer._batch_at = lambda progress: (4, 16)
    trainer.train_step = lambda rows, progress: seen.append(progress >= 0.6)
    trainer.validate = lambda batches: 0.0
    trainer.warm_up()
    assert sorted(seen) == [False, True]
