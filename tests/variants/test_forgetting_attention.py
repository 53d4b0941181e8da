"""
forgetting_attention against a float64 form that holds all scores, on both of its paths, and its gate against
topological_attention's.
"""

import math

import pytest
import torch

import train_gpt
import variants
from tests.errors import float_bound, relative_rms, rounding_bound
from variants import forgetting_attention as variant

END, T = 256, 24
SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=4, head_dim=8, mlp_hidden=64, zero_init_projections=False)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)


def build(spec: str = "forgetting_attention", **changes) -> train_gpt.GPT:
    config = train_gpt.make_config(SMALL | changes)
    with variants.applied((spec,), config):
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
    tokens = torch.randint(END, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens[0, [0, 7, 9]], tokens[1, [4, 20]] = END, END
    return tokens


def stream_and_context(model: train_gpt.GPT, layer: int = 1) -> tuple[torch.Tensor, train_gpt.AttentionContext]:
    tokens = tokens_of(2, T)
    with torch.no_grad():
        x, contexts = model.embed(tokens, model.masks(tokens))
    return x, contexts[layer]


def weights_and_values(q, k, v, sums, first_key, scale: float) -> torch.Tensor:
    """Attention in the inputs' precision with all scores at once."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])[None, :]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + (sums[:, :, None] - sums[:, None]).permute(0, 3, 1, 2)
    allowed = (j <= i) & (j >= first_key[:, :, None])
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1), v)


def formula(attention, x, ctx, parameters: dict) -> torch.Tensor:
    """The layer in float64; parameters: name -> tensor."""
    (B, T, _), config = x.shape, attention.config
    q, k, v = ((x @ parameters[f"{name}.weight"].T).view(B, T, config.heads, config.head_dim) for name in "qkv")
    q, k = (train_gpt.rotate(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt(), ctx.rotary) for z in (q, k))
    v = parameters["value_mix"][0] * v + parameters["value_mix"][1] * ctx.value.double().view_as(v)
    gate = x @ parameters["forget.weight"].T if "forget.weight" in parameters else torch.zeros(B, T, 1)
    sums = -torch.log1p(torch.exp(-(parameters["forget_bias"] + gate))).cumsum(1)
    first_key = torch.maximum(ctx.mask.doc_start, torch.arange(T) - (ctx.mask.window or T) + 1)
    y = weights_and_values(q, k, v, sums, first_key, config.attention_scale)
    y = y * 2 * torch.sigmoid(x[..., :12] @ parameters["gate.weight"].T)[..., None]
    return y.flatten(2) @ parameters["o.weight"].T


@pytest.mark.parametrize("decay", ["data", "per_head"])
@pytest.mark.parametrize("changes", [{}, dict(window_long=(5,)), dict(document_mask=False)],
                         ids=["documents", "window", "plain causal"])
def test_formula_and_gradients(decay, changes):
    model = awake(build(f"forgetting_attention:decay={decay}", **changes))
    x, ctx = stream_and_context(model)
    attention, x = model.blocks[1].attention, x.requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y = attention(x, ctx)
    y.backward(grad)

    # in float64
    exact = {name: p.detach().double().requires_grad_() for name, p in attention.named_parameters()}
    x_exact = x.detach().double().requires_grad_()
    expected = formula(attention, x_exact, ctx, exact)
    expected.backward(grad.double())
    assert ("forget.weight" in exact) == (decay == "data")

    # sums over tokens, in attention and in weights' gradients, and over the width
    bound = float_bound(2 * 2 * T + 5 * 32, torch.float32)
    pairs = dict(y=(y, expected), x=(x.grad, x_exact.grad))
    pairs |= {name: (p.grad, exact[name].grad) for name, p in attention.named_parameters()}
    for name, (found, wanted) in pairs.items():
        assert wanted.abs().max() > 0 and relative_rms(found, wanted) < bound, name


@pytest.mark.parametrize("changes", [dict(), dict(window_long=(70,)), dict(document_mask=False, window_long=(200,))])
def test_flex_attention_is_the_same(changes):
    model = awake(build(**changes))
    tokens = tokens_of(2, 256)
    with torch.no_grad():
        expected = model(tokens)
        model.use_flex = True
        assert model.masks(tokens)[0].block_mask is not None
        # of either path, in two layers
        assert relative_rms(model(tokens), expected) < 2 * float_bound(2 * (256 + 5 * 32 + 64), torch.float32)


def test_flex_attention_compiles_to_one_graph(monkeypatch):
    config = train_gpt.make_config(SMALL)
    with variants.applied(("forgetting_attention",), config):
        model = train_gpt.build_model(config, ALONE)
    model.use_flex = True
    model.set_windows(1.0)
    # it refuses gradients on a CPU; tracing needs none
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    tokens = tokens_of(2, 129)
    report = torch._dynamo.explain(model.predict)(tokens[:, :-1], model.masks(tokens[:, :-1]), tokens[:, 1:])
    torch._dynamo.reset()
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


def test_no_mask_larger_than_the_baseline_keeps():
    """
    What is kept for the backward pass: of the size of the stretches' masks (1, rows, keys) at most, not (heads, rows,
    keys).
    """
    model = awake(build(window_long=(64,)))
    tokens = tokens_of(2, 512)[:1]
    with torch.no_grad():
        x, contexts = model.embed(tokens, model.masks(tokens))
    largest = max(mask.numel() for *_, mask in contexts[1].mask.stretches)
    kept = []

    def keep(t):
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.blocks[1].attention(x, contexts[1])
    assert largest == 128 * 191 and 512 * 4 * 9 <= max(kept) <= largest


def test_terms_hold_the_number():
    x = torch.logspace(-6, 5, 1000).neg().requires_grad_()
    terms = variant.split_number(x, torch.bfloat16)
    terms.backward(torch.tensor([1.0, 2.0, 4.0]).bfloat16().expand(1000, 3))
    assert terms.dtype == torch.bfloat16 and terms.shape == (1000, 3) and x.grad.tolist() == [1.0] * 1000
    torch.testing.assert_close(terms.double().sum(-1), x.detach().double(), rtol=2 ** -24, atol=0)
    unsplit = variant.split_number(x, torch.float32)
    assert unsplit.shape == (1000, 1) and torch.equal(unsplit[:, 0], x)


def rounded_inputs(T: int, D: int) -> tuple:
    """q, k, v, gradient in bf16 and sums in float32 that fall to about -700, where bf16 alone would be off by 2."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, T, 3, D, generator=generator).bfloat16() for _ in range(4))
    sums = -torch.rand(2, T, 3, generator=generator).mul(torch.tensor([0.02, 0.3, 2.8])).cumsum(1)
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.01, index, 0).cummax(1).values
    return q, k, v, grad, sums, starts.int()


def check_rounded(path, device: str, window: int | None, mask_of):
    q, k, v, grad, sums, starts = rounded_inputs(512, 64)
    first_key = torch.maximum(starts, torch.arange(512, dtype=torch.int32) - (window or 512) + 1)
    keys = first_key.to(device)
    mask = train_gpt.AttentionMask(starts.to(device), None, window, keys, **mask_of(keys, window))
    ours, theirs = ([t.to(kind, copy=True).requires_grad_() for t in (q, k, v, sums)]
                    for kind in (device, torch.float64))
    y = path(*ours, mask, 0.12)
    y.backward(grad.to(device))
    expected = weights_and_values(*theirs, first_key, 0.12)
    expected.backward(grad.double())
    bound = rounding_bound(3, torch.bfloat16)  # of weights, their gradients and results
    assert relative_rms(y, expected) < bound
    for name, a, b in zip(("q", "k", "v", "sums"), ours, theirs):
        assert relative_rms(a.grad, b.grad) < bound, name


def stretches(first_key, window) -> dict:
    return dict(stretches=train_gpt.mask_stretches(first_key, window, torch.bfloat16))


def blocks(first_key, window) -> dict:
    return dict(block_mask=train_gpt.interval_block_mask(first_key))


@pytest.mark.parametrize("window", [None, 100])
def test_bfloat16_keeps_the_sums(window):
    check_rounded(variant.attend_and_forget, "cpu", window, stretches)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("flex", [True, False], ids=["flex", "stretches"])
def test_bfloat16_on_a_gpu(flex, window):
    path = variant.attend_and_forget
    if flex:
        path = torch.compile(path, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    check_rounded(path, "cuda", window, blocks if flex else stretches)


def test_starts_with_slopes():
    attention = build().blocks[0].attention
    log_decay = torch.nn.functional.logsigmoid(attention.forget_bias)
    torch.testing.assert_close(log_decay, -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]))
    assert not attention.forget.weight.any() and attention.forget.weight.optimizer == "adam"


@pytest.mark.parametrize("decay", ["data", "per_head"])
def test_its_gate_is_that_of_topological_attention(decay, monkeypatch):
    """The same parameters, initial tensors and log-decay: what separates the two arms is the score."""
    other, seen = variants.load("topological_attention"), {}
    kernel, attend = other.topological_attention, variant.attend_and_forget

    def spy_on_kernel(*tensors, log_decay, **options):
        seen["topological"] = log_decay.cumsum(1)
        return kernel(*tensors, log_decay=log_decay, **options)

    def spy_on_attend(q, k, v, sums, mask, scale):
        seen["forgetting"] = sums
        return attend(q, k, v, sums, mask, scale)

    monkeypatch.setattr(other, "topological_attention", spy_on_kernel)
    monkeypatch.setattr(variant, "attend_and_forget", spy_on_attend)
    gates = []
    for spec in (f"forgetting_attention:decay={decay}", f"topological_attention:decay={decay}"):
        model = build(spec)
        gate = {name: p for name, p in model.blocks[0].attention.named_parameters() if name.startswith("forget")}
        with torch.no_grad():
            gates.append({name: (p.clone(), getattr(p, "optimizer", None)) for name, p in gate.items()})
            for p in gate.values():
                p.add_(torch.linspace(-1, 1, p.numel()).view_as(p))
        model.blocks[0].attention(*stream_and_context(model, 0))
    assert gates[0].keys() == gates[1].keys() and len(gates[0]) == dict(data=2, per_head=1)[decay]
    for (a, kind), (b, other_kind) in zip(gates[0].values(), gates[1].values()):
        assert torch.equal(a, b) and kind == other_kind
    assert torch.equal(seen["forgetting"], seen["topological"])
