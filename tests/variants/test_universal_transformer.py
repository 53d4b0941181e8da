"""universal_transformer: halting against its formula token by token, the penalty, the controls."""

import pytest
import torch

from generate import decodes_from_cache
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of


def halting_model(options: str, **changes):
    """A model whose tokens halt at different runs."""
    model = scramble(build(f"universal_transformer:halt_bias=-0.5,{options}", config=config_of(**changes)), 0.1)
    with torch.no_grad():
        model.halt_weight.mul_(2)
    return model


@pytest.mark.parametrize("style", ("act", "published"))
def test_halting_token_by_token(style):
    t_max = 4
    model = halting_model(f"t_max={t_max},threshold=0.9,style={style}")
    tokens = random_tokens()
    x, contexts = model.embed(tokens, model.masks(tokens))
    weights, streams, penalty = model.halt(x, contexts)

    counts = set()
    for b in range(2):
        for t in range(16):
            # N, R and the weights by their definitions, from the streams' own gates
            h = [torch.sigmoid(s[b, t] @ model.halt_weight + model.halt_bias) for s in streams]
            sums = [sum(h[:n + 1]) for n in range(t_max)]
            full = [n for n in range(t_max) if sums[n] >= 0.9]
            last = full[0] if full else t_max - 1
            counts.add(last)
            nothing = torch.zeros(1, dtype=torch.float64)
            expected = [h[n] if n < last else nothing for n in range(t_max)]
            rest = 1 - sum(h[:last], nothing)
            expected[last] = rest if full or style == "act" else h[last]
            got = torch.stack([weight[b, t] for weight in weights])
            torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-12)

            # the penalty, and streams that stay
            extra = rest
            if style == "published":
                extra = torch.zeros(1) if full else 1 - sums[-1]
            assert penalty[b, t].item() == pytest.approx(last + 1 + extra.item(), abs=1e-12)
            for n in range(last + 1, t_max):
                assert torch.equal(streams[n][b, t], streams[last][b, t])
    assert len(counts) > 1

    total = sum(weight for weight in weights)
    if style == "act":
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    y = sum(weight[..., None] * stream for weight, stream in zip(weights, streams))
    assert relative_rms(stream_of(model, tokens), y) < float_bound(32, torch.float64)


def test_penalty_is_of_training_only_and_reaches_the_gate():
    model, tokens = halting_model("t_max=3,ponder=0.1"), random_tokens()
    targets = random_tokens(seed=2)
    plain = model.eval()(tokens, targets)
    total = model.train()(tokens, targets)
    x, contexts = model.embed(tokens, model.masks(tokens))
    penalty = model.halt(x, contexts)[2].mean()
    torch.testing.assert_close(total - plain, 0.1 * penalty, check_dtype=False, rtol=1e-4, atol=1e-5)
    penalty.backward()
    assert model.halt_weight.grad.any() and model.halt_bias.grad.any()

    model = halting_model("t_max=3,ponder=0")
    assert model.train()(tokens, targets).item() == pytest.approx(model.eval()(tokens, targets).item(), rel=1e-6)


def test_published_penalty_has_a_gradient_where_tokens_never_halt():
    tokens = random_tokens()
    for threshold, has_gradient in ((0.01, False), (1.0, True)):
        model = halting_model(f"t_max=2,threshold={threshold},style=published")
        x, contexts = model.embed(tokens, model.masks(tokens))
        model.halt(x, contexts)[2].mean().backward()
        assert (model.halt_bias.grad is not None and bool(model.halt_bias.grad.any())) == has_gradient


def test_off_is_the_blocks_over_and_over():
    model = build("universal_transformer:t_max=3,style=off,step_embedding=off")
    baseline = build()
    tokens = random_tokens()
    x, contexts = baseline.embed(tokens, baseline.masks(tokens))
    for _ in range(3):
        x = baseline.run_blocks(x, contexts)
    assert torch.equal(stream_of(model, tokens), x)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in baseline.named_parameters()]


def test_every_run_keeps_its_own_keys():
    model = scramble(build("universal_transformer:t_max=2", dtype=torch.float32), 0.05).eval()
    assert decodes_from_cache(model)
