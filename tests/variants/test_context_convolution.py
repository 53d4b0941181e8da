"""
context_convolution: it starts as the identity, is its formula at every site, goes with every attention and
feed-forward, and decodes.
"""

import pytest
import torch
import torch.nn.functional as F

import train_gpt
import variants
from generate import Decoder
from tests.errors import float_bound, relative_rms
from variants import context_convolution as variant

END = 256
SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=4, head_dim=8, mlp_hidden=64, zero_init_projections=False)
SITES = list(variant.SITES)


def build(*specs: str, **changes) -> train_gpt.GPT:
    config = train_gpt.make_config(SMALL | changes)
    with variants.applied(specs, config):
        model = train_gpt.GPT(config)
    model.initialize(1)
    model.set_windows(1.0)
    return model


def awake(model: train_gpt.GPT) -> train_gpt.GPT:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def tokens_of(rows: int, length: int) -> torch.Tensor:
    tokens = torch.randint(END, (rows, length), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    tokens[0, [0, 7, 9]], tokens[1, [4, 20]] = END, END
    return tokens


@pytest.mark.parametrize("form", ["linear", "residual"])
@pytest.mark.parametrize("site", SITES)
def test_it_starts_as_the_identity(site, form):
    tokens = tokens_of(2, 24)
    assert torch.equal(build(f"context_convolution:site={site},form={form}")(tokens), build()(tokens))


def formula(module: variant.ContextConvolution, u: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """c(u) in float64, token by token."""
    rows = []
    taps = module.taps.double()
    for b in range(u.shape[0]):
        sums = []
        for t in range(u.shape[1]):
            seen = min(len(taps), int(positions[b, t]) + 1)
            sums.append(sum(taps[-1 - j] * u[b, t - j].double() for j in range(seen)))
        rows.append(torch.stack(sums))
    total = torch.stack(rows)
    return total if module.bias is None else u.double() + F.gelu(total + module.bias.double())


@pytest.mark.parametrize("form", ["linear", "residual"])
@pytest.mark.parametrize("taps", [3, 4])
def test_every_site_is_the_formula(taps, form):
    model = awake(build(f"context_convolution:site=all,taps={taps},form={form}"))
    seen = {}

    def note(name, module, inputs, output):
        seen[name] = (inputs[0], inputs[1].positions, output)

    for name, module in model.blocks[1].convolutions.items():
        module.register_forward_hook(lambda *arguments, name=name: note(name, *arguments))
    with torch.no_grad():
        model(tokens_of(2, 24))
    assert list(seen) == ["attention", "q", "k", "v", "mlp"]
    for name, (u, positions, output) in seen.items():
        expected = formula(model.blocks[1].convolutions[name], u, positions)
        assert relative_rms(output, expected) < float_bound(taps + 2, torch.float32), name


@pytest.mark.parametrize("other", ["forgetting_attention:short_conv=4", "topological_attention:preset=fast",
                                   "topological_attention", "swiglu_mlp", "splanifold_mlp",
                                   "fused_kernels:residual=off"])
def test_it_goes_with_other_variants(other):
    model = awake(build("context_convolution:site=all", other))
    tokens = tokens_of(2, 25)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    convolutions = {name: p for name, p in model.named_parameters() if "convolutions" in name}
    assert len(convolutions) >= 2 * 3 and all(p.grad.any() for p in convolutions.values())
    assert all(name in dict(model.named_parameters()) for name, _ in build(other).named_parameters())


def test_an_attention_without_such_matrices_is_named():
    with pytest.raises(train_gpt.RunError, match="site=qkv, but the attention has none of the matrices q, k and v"):
        class Bare(train_gpt.CausalSelfAttention):
            def __init__(self, config, layer):
                torch.nn.Module.__init__(self)

        original = train_gpt.CausalSelfAttention
        train_gpt.CausalSelfAttention = Bare
        try:
            variant.ConvolvedBlock(train_gpt.make_config(SMALL), 0, variant.Options(site="qkv"))
        finally:
            train_gpt.CausalSelfAttention = original


@pytest.mark.parametrize("specs", [("context_convolution:site=all,taps=4",),
                                   ("context_convolution:site=all,form=residual", "forgetting_attention:short_conv=3"),
                                   ("context_convolution:site=all", "topological_attention:preset=fast")], ids=str)
def test_decoding_equals_the_whole_pass(specs):
    model, tokens = awake(build(*specs)).eval(), tokens_of(2, 70)
    with torch.no_grad():
        whole = model(tokens)
    decoder, end, sizes = Decoder(model, 70), 0, []
    for count in (30, 5, *[1] * 35):
        end += count
        assert (decoder.feed(tokens[:, end - count:end]) - whole[:, end - 1]).abs().max() < 1e-4
        sizes.append(sum(part.bytes_kept for cache in decoder.caches for name, part in cache.parts.items()
                         if name.startswith("convolution")))
    assert len(set(sizes)) == 1 and sizes[0] > 0
