"""latent_attention against dense keys and values, its widths, its first tensors and its decoupled positions."""

import pytest
import torch

import train_gpt
from generate import Decoder, decodes_from_cache
from tests.errors import float_bound, relative_rms
from tests.models import build, config_of, random_tokens, scramble, stream_of
from variants.latent_attention import Options, latent_width
from variants.low_rank import leading_vectors


def test_a_wide_latent_reproduces_dense_keys_and_values():
    """The singular vectors of [W_k; W_v] as W_d, and what is left as W_k and W_v."""
    config = config_of(kv_heads=1, value_embeddings=2)
    baseline, model = build(config=config), build("latent_attention:latent=32,norm=none", config=config)
    shared = model.state_dict()
    shared.update({name: p for name, p in baseline.state_dict().items() if name in shared and ".k." not in name
                   and ".v." not in name})
    model.load_state_dict(shared)
    with torch.no_grad():
        for before, after in zip(baseline.blocks, model.blocks):
            joined = torch.cat((before.attention.k.weight, before.attention.v.weight))
            left, sigma, right = torch.linalg.svd(joined, full_matrices=False)
            after.attention.down.weight.copy_(right)
            after.attention.k.weight.copy_((left * sigma)[:16])
            after.attention.v.weight.copy_((left * sigma)[16:])
    tokens = random_tokens()
    assert relative_rms(stream_of(model, tokens), stream_of(baseline, tokens)) < 100 * float_bound(64, torch.float64)


def test_without_norm_it_is_dense_with_the_product():
    baseline, model = build(), build("latent_attention:latent=6,norm=none")
    with torch.no_grad():
        for before, after in zip(baseline.blocks, model.blocks):
            for role in "kv":
                product = after.attention.get_submodule(role).weight @ after.attention.down.weight
                before.attention.get_submodule(role).weight.copy_(product)
    tokens = random_tokens()
    assert relative_rms(stream_of(model, tokens), stream_of(baseline, tokens)) < 100 * float_bound(64, torch.float64)


def test_norm_acts_on_the_latent():
    attention = build("latent_attention:latent=6").blocks[0].attention
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ctx = train_gpt.AttentionContext(None, None, x, torch.zeros(1, 3, 32, dtype=torch.float64))
    values = [attention.heads(factor * x, ctx)[2] for factor in (10, 70)]
    assert relative_rms(*values) < 1e-6
    c = x @ attention.down.weight.T
    c = c / c.square().mean(-1, keepdim=True).sqrt()
    expected = 0.5 * (c @ attention.v.weight.T).view(1, 3, 2, 16)
    assert relative_rms(values[0], expected) < 1e-5  # the norm's 1e-6


@pytest.mark.parametrize("changes, latent", [
    (dict(model_dim=512, heads=8, head_dim=64, kv_heads=4), 128),
    (dict(model_dim=768, heads=6, head_dim=128), 256),
    (dict(), 11)])
def test_default_width_halves_the_parameters(changes, latent):
    config = config_of(value_embeddings=0, **changes)
    assert latent_width(config, Options()) == latent
    width, kv_width = config.model_dim, config.key_heads * config.head_dim
    assert latent * (width + 2 * kv_width) == pytest.approx(width * kv_width, rel=0.05)


def test_published_start():
    model = build("latent_attention:latent=5,style=published", dtype=torch.float32)
    attention = model.blocks[1].attention
    gram = attention.down.weight @ attention.down.weight.T
    assert (gram - torch.eye(5)).abs().max() < 10 * float_bound(32, torch.float32)
    dense = [train_gpt.draw_normal(f"blocks.1.attention.{role}.dense", (32, 32), 0.02, 1) for role in "kv"]
    vectors = leading_vectors(torch.cat(dense), 5)[2]
    assert torch.equal(attention.down.weight, vectors)
    assert attention.k.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_decoupled_keys_share_what_turns():
    config = config_of(rope="full", value_embeddings=0, attention_scale=0.0)
    model = build("latent_attention:latent=6,rope=decoupled", config=config)
    attention, tokens = model.blocks[0].attention, random_tokens()
    x, contexts = model.embed(tokens, model.masks(tokens))
    q, k, v = attention.heads(x, contexts[0])
    assert q.shape == k.shape == (2, 16, 2, 24) and v.shape == (2, 16, 2, 16)
    assert attention.scale == 24 ** -0.5
    # QK-norm is of all channels, and a rotation keeps it; its 1e-6 is less than a thousandth of any mean square
    assert (k.square().mean(-1) - 1).abs().max() < 1e-3
    # keys depend on positions in their last channels alone
    still = [table.clone() for table in contexts[0].rotary]
    contexts[0].rotary = torch.ones_like(still[0]), torch.zeros_like(still[1])
    _, plain, _ = attention.heads(x, contexts[0])
    assert torch.equal(plain[..., :16], k[..., :16]) and not torch.equal(plain[..., 16:], k[..., 16:])
    shared = plain[..., 16:] / plain[..., 16:].norm(dim=-1, keepdim=True)
    assert relative_rms(shared[:, :, 0], shared[:, :, 1]) < 1e-6


@pytest.mark.parametrize("options", ("latent=6", "latent=6,rope=decoupled"))
def test_decodes_from_its_keys(options):
    config = config_of(kv_heads=1, value_embeddings=0)
    model = scramble(build(f"latent_attention:{options}", config=config, dtype=torch.float32), 0.05).eval()
    assert decodes_from_cache(model)


@pytest.mark.parametrize("changes", (dict(), dict(window_pattern="SL", window_short=(9,)), dict(document_mask=False),
                                     dict(qk_norm=False), dict(kv_heads=2, channel_scales=True)))
def test_decodes_from_latents(changes):
    """Queries that W_k was multiplied into give the logits of the whole pass; and what is kept is counted."""
    config = config_of(heads=4, head_dim=8, sequence_length=64, **dict(kv_heads=1, value_embeddings=0) | changes)
    model = scramble(build("latent_attention:latent=6,rope=decoupled", config=config, dtype=torch.float32), 0.2).eval()
    tokens = random_tokens(2, 60).int()
    tokens[0, 20] = tokens[1, 47] = 256
    decoder, end = Decoder(model, 60), 0
    with torch.no_grad():
        whole = model(tokens)
    assert whole.square().mean().sqrt() > 0.1
    for count in (30, 7, *[1] * 23):
        end += count
        got = decoder.feed(tokens[:, end - count:end])
        torch.testing.assert_close(got, whole[:, end - 1], rtol=0, atol=1e-4)

    # of each token the latent, the shared key and with QK-norm a factor for each head of keys
    numbers = 6 + 4 + (config.key_heads if config.qk_norm else 0)
    lengths = [min(model.window(layer) or 60, 60) for layer in range(4)]
    assert decoder.bytes_kept == 4 * 2 * numbers * sum(lengths)


def test_other_forms_keep_keys_and_values():
    """Where positions stand between W_k and the queries, and where value embeddings are added."""
    for options, changes, kept in (("rope=after_up", dict(value_embeddings=0), 2 * 32),
                                   ("rope=decoupled", dict(value_embeddings=2), 2 * 2 * 24)):
        model = build(f"latent_attention:latent=6,{options}", config=config_of(**changes), dtype=torch.float32)
        model = scramble(model, 0.05).eval()
        assert decodes_from_cache(model)
        decoder = Decoder(model, 32)
        decoder.feed(random_tokens(1, 20).int())
        assert decoder.caches[0].bytes_kept == 4 * 20 * kept
