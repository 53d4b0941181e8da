"""
wave_lanes: every lane is its formula, sees neither later tokens nor other documents, agrees with itself on a prefix and
in decoding; the packings have the parameters that they should; gates, run-time lanes, guards.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
import variants
from generate import Decoder
from kernels import backend
from kernels.lane_scan import chebyshev_table, harmonic_frequencies
from tests.errors import float_bound, relative_rms
from variants import wave_lanes as variant

END, T = 256, 48
SMALL = dict(vocab_size=257, layers=2, model_dim=48, heads=3, head_dim=16, mlp_hidden=96, sequence_length=T,
             batch_tokens=4 * T, zero_init_projections=False)
ALL = ",".join(variant.LANES) + ",recall_features=8"
STATELESS = ",".join(name for name in variant.LANES if name != "attention") + ",recall_features=8"


@pytest.fixture(autouse=True)
def form(request, monkeypatch):
    """
    Kernels run in plain PyTorch, because their loops take a minute to compile; these have tests of their own. Slow
    tests run them here, too.
    """
    if getattr(request, "param", "pytorch") == "pytorch":
        monkeypatch.setattr(backend, "has_cpu_loops", lambda: False)


in_both_forms = pytest.mark.parametrize("form", ["pytorch", pytest.param("loops", marks=pytest.mark.slow)],
                                        indirect=True)


def build(options: str = "", dtype: torch.dtype = torch.float32, **changes) -> train_gpt.GPT:
    """The model of wave_lanes:options, with noise on every parameter, in evaluation."""
    config = train_gpt.make_config(SMALL | changes)
    with variants.applied((f"wave_lanes:{options}",), config):
        torch.manual_seed(1)
        model = train_gpt.GPT(config)
    model.initialize(1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.set_windows(1.0)
    if dtype == torch.float64:
        model.dtype = dtype
        model.double()
    return model.eval()


def plain(options: str = "", **changes) -> train_gpt.GPT:
    """The same without noise, as training begins."""
    config = train_gpt.make_config(SMALL | changes)
    with variants.applied((f"wave_lanes:{options}",), config):
        torch.manual_seed(1)
        model = train_gpt.GPT(config)
    model.initialize(1)
    return model


def tokens_of(rows: int, length: int, ends: bool = True) -> Tensor:
    tokens = torch.randint(END, (rows, length), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    if ends:
        tokens[0, [0, 7, 9]] = END
    return tokens


def mask_of(tokens: Tensor) -> train_gpt.AttentionMask:
    index = torch.arange(tokens.shape[1], dtype=torch.int32)
    doc_start = torch.where(tokens == END, index, 0).cummax(1).values.int()
    return train_gpt.AttentionMask(doc_start, index - doc_start, None, doc_start,
                                   stretches=train_gpt.mask_stretches(doc_start, None, torch.float64))


def context_of(tokens: Tensor) -> train_gpt.AttentionContext:
    return train_gpt.AttentionContext(mask_of(tokens), None, None, None)


def filter_of(name: str, width: int, **options) -> torch.nn.Module:
    config = train_gpt.make_config(SMALL | dict(rope="none"))
    torch.manual_seed(2)
    return variant.FILTERS[name](config, variant.Options(**options).resolve(), width).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Filters are their formulas ---------------------------------------------


def sums_in_documents(weight, u: Tensor, tokens: Tensor) -> Tensor:
    """Sum over s <= t in t's document of weight(p_t, p_s) u_s / n_t, n_t from weight's second result."""
    y = torch.zeros_like(u)
    positions = mask_of(tokens).positions
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            p = int(positions[b, t])
            y[b, t] = sum(weight(p, p - back) * u[b, t - back] for back in range(p + 1))
    return y


@in_both_forms
def test_poly_is_its_formula():
    tokens, u, x = tokens_of(2, T), draw(2, T, 4), draw(2, T, 6, seed=1)
    table = chebyshev_table(4, T)
    scaled = u / x.abs().amax(-1, keepdim=True)

    def weight(p, q):
        return (table[p] * table[q]).sum() / (p + 1)

    y = filter_of("poly", 4)(u, context_of(tokens), x)
    torch.testing.assert_close(y, sums_in_documents(weight, scaled, tokens), rtol=0, atol=1e-12)


@in_both_forms
@pytest.mark.parametrize("decay", ["none", "learned"])
def test_fourier_is_its_formula(decay):
    tokens, u = tokens_of(2, T), draw(2, T, 6)
    module = filter_of("fourier", 6, F=8, decay=decay, gains="per_head", mean=False)
    with torch.no_grad():
        module.gain.copy_(draw(3, 8))
        if decay == "learned":
            module.decay.copy_(draw(3, 8, seed=1))
    frequencies = harmonic_frequencies(8, 2 * T)
    fade = F.softplus(module.decay) if decay == "learned" else torch.zeros(3, 8, dtype=torch.float64)

    def weight(p, q):
        waves = torch.cos(2 * math.pi * frequencies * (p - q)) * torch.exp(-fade * (p - q))
        return (module.gain * waves).sum(-1).repeat_interleave(2)

    y = module(u, context_of(tokens), u)
    torch.testing.assert_close(y, sums_in_documents(weight, u, tokens), rtol=0, atol=1e-11)


def box_means(x: Tensor, tokens: Tensor, width: int) -> Tensor:
    return sums_in_documents(lambda p, q: float(p - q < width) / width, x, tokens)


@in_both_forms
def test_wavelet_means_and_their_rank():
    tokens, x = tokens_of(2, T), draw(2, T, 3)
    module = filter_of("wavelet", 3, L=3)
    lows = [box_means(x, tokens, 2 ** level) for level in (1, 2, 3)]
    features = module.features(x, mask_of(tokens))
    expected = torch.cat([part for low in lows for part in (low, x - low)], -1)
    torch.testing.assert_close(features, expected, rtol=0, atol=4e-16 * 8)
    # [low, x - low] of three levels are six signals of a channel, but only four of them differ
    assert torch.linalg.matrix_rank(features.unflatten(-1, (6, 3))[1, :, :, 0]) == 4

    bands = draw(2, T, 12, seed=4)
    inputs = bands.chunk(4, -1)
    expected = inputs[0] + sum(box_means(band, tokens, 2 ** level) for level, band in enumerate(inputs[1:], 1))
    torch.testing.assert_close(module(bands, context_of(tokens), x), expected, rtol=0, atol=1e-14)


def recurrence(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, decay: float) -> Tensor:
    """The recall lane of one head, token by token."""
    B, length, M = q.shape
    y = torch.zeros_like(v)
    for b in range(B):
        state, norm = q.new_zeros(M, v.shape[-1]), q.new_zeros(M)
        for t in range(length):
            if tokens[b, t] == END:
                state, norm = torch.zeros_like(state), torch.zeros_like(norm)
            state = decay * state + k[b, t][:, None] * v[b, t]
            norm = decay * norm + k[b, t]
            y[b, t] = (q[b, t] @ state) / (q[b, t] @ norm).clamp_min(1e-6)
    return y


@in_both_forms
@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_recall_is_its_recurrence(decay):
    tokens, u = tokens_of(2, T), draw(2, T, 16 + 5)
    y = filter_of("recall", 5, recall_features=8, recall_decay=decay)(u, context_of(tokens), u)
    q, k = (F.elu(x) + 1 for x in (u[..., :8], u[..., 8:16]))
    torch.testing.assert_close(y, recurrence(q, k, u[..., 16:], tokens, decay), rtol=0, atol=1e-11)


@in_both_forms
@pytest.mark.parametrize("decay", [0.9, pytest.param(1.0, marks=pytest.mark.slow)])
def test_recall_over_a_long_row(decay):
    """At d = 0.9 a factor d^-t would leave float32's range after 842 tokens."""
    tokens, u = tokens_of(1, 8192, ends=False), draw(1, 8192, 16 + 2)
    y = filter_of("recall", 2, recall_features=8, recall_decay=decay)(u, context_of(tokens), u)
    low = filter_of("recall", 2, recall_features=8, recall_decay=decay).float()(u.float(), context_of(tokens), u)
    q, k = (F.elu(x) + 1 for x in (u[..., :8], u[..., 8:16]))
    expected = recurrence(q, k, u[..., 16:], tokens, decay)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert relative_rms(low, expected) < 2 * float_bound(8192 + 8, torch.float32)


# ---- What a token sees ------------------------------------------------------

LAYERED = [f"pack={pack},lanes={name}" for pack in ("attention", "block") for name in variant.LANES]
PACKED = [*LAYERED, *(f"pack=faithful,lanes={name}" for name in variant.LANES), f"pack=attention,lanes={ALL}",
          f"pack=block,lanes={ALL},context_conv=dense", f"pack=faithful,lanes={ALL},freqs=log,decay=learned",
          "pack=block,gate=softmax_mlp,poly_grid=log,gains=per_head", "pack=faithful,gate=elementwise,residual=on"]


@in_both_forms
@pytest.mark.parametrize("options", PACKED)
def test_no_token_sees_a_later_one_or_another_document(options):
    """Not by a single bit, in float64."""
    model = build(options, torch.float64)
    tokens, other = tokens_of(2, T), tokens_of(2, T)
    other[:, 30:] = (other[:, 30:] + 1) % END
    with torch.no_grad():
        before, after = model(tokens), model(other)
        assert torch.equal(before[:, :30], after[:, :30]) and not torch.equal(before[:, 30:], after[:, 30:])
        other = tokens.clone()
        other[0, 1:7] = (other[0, 1:7] + 1) % END
        changed = model(other)
    assert torch.equal(changed[0, 7:], before[0, 7:]) and not torch.equal(changed[0, :7], before[0, :7])


@in_both_forms
@pytest.mark.parametrize("options", [*PACKED[:-5:3], *PACKED[-5:]])
def test_a_prefix_is_the_same(options):
    model, tokens = build(options, torch.float64), tokens_of(2, T)
    with torch.no_grad():
        whole = model(tokens)
        for length in (1, 12, 33):
            torch.testing.assert_close(model(tokens[:, :length]), whole[:, :length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lane", ["poly", "fourier"])
def test_the_published_reference_length_depends_on_what_follows(lane):
    model, tokens = build(f"pack=faithful,lanes={lane},faithful=on", torch.float64), tokens_of(2, T)
    with torch.no_grad():
        assert (model(tokens[:, :24]) - model(tokens)[:, :24]).abs().max() > 1e-3


# ---- Decoding ---------------------------------------------------------------


def worst(decoder: Decoder, tokens: Tensor, whole: Tensor, first: int) -> tuple[float, set[int]]:
    """The largest difference of the logits, the first tokens at once, some together, then one by one; bytes kept."""
    error, end, sizes = 0.0, 0, set()
    for count in (first, 5, *[1] * (tokens.shape[1] - first - 5)):
        end += count
        logits = decoder.feed(tokens[:, end - count:end])
        error = max(error, (logits - whole[:, end - 1]).abs().max().item())
        sizes.add(decoder.bytes_kept)
    return error, sizes


@in_both_forms
@pytest.mark.parametrize("options", [f"pack={pack},lanes={STATELESS},context_conv={conv},decay=learned"
                                     for pack in variant.PRESETS for conv in ("dense", "depthwise")]
                         + [f"lanes={ALL},recall_heads=2,gains=per_head,freqs=log", "attention_every=2"])
def test_decoding_equals_the_whole_pass(options):
    model, tokens = build(options), tokens_of(2, T)
    with torch.no_grad():
        whole = model(tokens)
    error, sizes = worst(Decoder(model, T), tokens, whole, 20)
    assert error < 1e-4
    has_attention = ",attention" in options or "every" in options
    assert (len(sizes) == 1) == (not has_attention)


@in_both_forms
def test_two_thousand_tokens_from_a_constant_state(capsys):
    """Half of the longest wave is 1,024 tokens, which is said once."""
    model = build("pack=block,lanes=poly,fourier,wavelet,recall,s_ref_poly=2048,s_ref_fourier=2048", layers=1)
    tokens = tokens_of(1, 2000, ends=False)
    with torch.no_grad():
        whole = model(tokens)
    error, sizes = worst(Decoder(model, 2000), tokens, whole, 1850)
    assert error < 1e-4 and len(sizes) == 1
    assert capsys.readouterr().err.count("the text is longer than 1024 tokens") == 1


def test_the_published_reference_length_is_not_decoded():
    with pytest.raises(TypeError, match="depend on the row's length"):
        Decoder(build("faithful=on"), T).feed(tokens_of(1, 5, ends=False))


# ---- Parameters -------------------------------------------------------------


def counts(options: str, layers: int = 1, **changes) -> dict[str, int]:
    """Numbers of a model's parameters, by name."""
    settings = dict(layers=layers, sequence_length=512, batch_tokens=512, value_embeddings=0, vocab_size=50257)
    config = train_gpt.make_config(SMALL | settings | changes)
    with variants.applied((f"wave_lanes:{options}",), config), torch.device("meta"):
        model = train_gpt.GPT(config)
    return {name: p.numel() for name, p in model.named_parameters()}


WIDE = {384: dict(model_dim=384, heads=6, head_dim=64, mlp_hidden=1536),
        768: dict(model_dim=768, heads=6, head_dim=128, mlp_hidden=3072),
        128: dict(model_dim=128, heads=4, head_dim=32, mlp_hidden=512)}


def test_the_published_model_has_the_published_parameters():
    """3,544,899 of a block, besides gains and LayerNorm; 42,339,715 with 50,257 rows of embedding and head."""
    found = counts("pack=faithful", **WIDE[384])
    in_block = sum(n for name, n in found.items() if name.startswith("blocks."))
    gains = sum(n for name, n in found.items() if name.endswith("gain"))
    assert gains == 64 and in_block - gains == 3_544_899
    padding = 2 * (50_304 - 50_257) * 384
    assert sum(found.values()) - padding == 42_339_715


def matrices(found: dict[str, int], D: int) -> int:
    """Of a layer's lanes, but for what grows with D alone: biases, taps and gains."""
    return sum(n for name, n in found.items()
               if "attention.lanes" in name and ".weight" in name or "attention.gate.last" in name and n > 8 * D
               or "attention.gate.hidden.weight" in name)


@pytest.mark.parametrize("D", [384, 768])
@pytest.mark.parametrize("options, size, rest", [("pack=attention", 4, 0), ("pack=block", 12, 0),
                                                 ("pack=block,gate=softmax_mlp", 12, 4 * 5)])
def test_layers_have_their_packings_parameters(options, size, rest, D):
    """To the number; beside a gate that reads the lanes the wavelet lane has 1.2 D channels but for less than four."""
    assert 0 <= size * D * D - matrices(counts(options, **WIDE[D]), D) <= rest * D


@pytest.mark.parametrize("lanes", ["poly,fourier", "wavelet", "fourier,attention", "conv", "token", "recall,wavelet",
                                   "poly,fourier,wavelet"])
@pytest.mark.parametrize("pack, size", [("attention", 4), ("block", 12)])
@pytest.mark.parametrize("D", [128, 384])
def test_lanes_left_out_leave_their_parameters_to_the_others(lanes, pack, size, D):
    found = matrices(counts(f"pack={pack},lanes={lanes}", **WIDE[D]), D)
    assert 0.85 * size * D * D < found <= size * D * D
    fixed = matrices(counts(f"pack={pack},lanes={lanes},widths=fixed", **WIDE[D]), D)
    assert fixed <= found or lanes == "fourier,attention"


def test_widths_are_multiples_of_16():
    config = train_gpt.make_config(SMALL | WIDE[128])
    widths = variant.choose_widths(config, variant.Options().resolve())
    assert widths == dict(poly=32, fourier=32, wavelet=52)
    config = train_gpt.make_config(SMALL | WIDE[768])
    widths = variant.choose_widths(config, variant.Options(pack="block").resolve())
    assert widths == dict(poly=864, fourier=864, wavelet=1152)


# ---- The start, gates, lanes at run time ------------------------------------


@pytest.mark.parametrize("options", ["pack=attention", f"pack=block,lanes={ALL}", "pack=block,gate=softmax_mlp"])
def test_a_layer_begins_as_the_identity(options):
    model = plain(options, zero_init_projections=True, x0_skip=False, unet_skips=False, layers=1, value_embeddings=0)
    x = torch.randn(2, T, 48)
    tokens = tokens_of(2, T)
    _, contexts = model.embed(tokens, model.masks(tokens))
    with torch.no_grad():
        expected = x if "block" in options else x + model.blocks[0].mlp(model.blocks[0].mlp_norm(x))
        assert torch.equal(model.blocks[0](x, contexts[0]), expected)


@pytest.mark.parametrize("gate_map", ["softmax", "max_shift_rational", "sparsemax", "uniform"])
@pytest.mark.parametrize("gate", ["softmax_mlp", "softmax_linear"])
def test_gates_weights_sum_to_one(gate, gate_map):
    model = build(f"pack=block,gate={gate},gate_map={gate_map}")
    module = model.blocks[0].attention.gate
    x, outputs = torch.randn(2, 5, 48), [torch.randn(2, 5, 48) for _ in range(3)]
    torch.testing.assert_close(module(x, outputs).sum(-1), torch.ones(2, 5))
    module.set_lanes(["fourier"])
    assert (module(x, outputs[1:2]) == 1).all()
    module.set_lanes(list(module.names))
    module.options.lane_dropout = 0.5
    kept = module.train()(x, outputs)
    torch.testing.assert_close(kept.sum(-1), torch.ones(2, 5))
    start = plain(f"pack=block,gate={gate},gate_map={gate_map}").blocks[0].attention.gate
    torch.testing.assert_close(start(x, outputs), torch.full((2, 5, 3), 1 / 3))


@pytest.mark.parametrize("gate_map", variant.CONTROLS)
def test_gates_that_are_controls(gate_map):
    """Uniform weights do not depend on the logits; top1 takes the largest, and the gradient of its logarithm."""
    logits = torch.tensor([[[0.1, 2.0, -1.0], [3.0, 0.0, 1.0]]], requires_grad=True)
    weights = variant.weigh_lanes(logits, gate_map, None)
    expected = torch.full((1, 2, 3), 1 / 3) if gate_map == "uniform" else torch.tensor([[[0.0, 1, 0], [1, 0, 0]]])
    torch.testing.assert_close(weights, expected)
    factors = draw(1, 2, 3).float()
    found, = torch.autograd.grad((weights * factors).sum(), logits)
    logarithms = (logits.log_softmax(-1) * factors * expected).sum()
    wanted, = torch.autograd.grad(logarithms, logits)
    torch.testing.assert_close(found, torch.zeros_like(found) if gate_map == "uniform" else wanted)

    kept = torch.tensor([[[True, False, True]]])
    weights = variant.weigh_lanes(logits, gate_map, kept)
    assert (weights[..., 1] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2))


@pytest.mark.parametrize("options", ["pack=attention", "pack=block", "pack=block,gate=softmax_mlp", "pack=faithful"])
def test_a_lane_left_out_has_no_influence(options):
    model, tokens = build(options), tokens_of(2, T)
    with torch.no_grad():
        whole = model(tokens)
        variant.set_lanes(model, ["wavelet", "poly"])
        without = model(tokens)
        for name, p in model.named_parameters():
            if ".fourier." in name:
                p.fill_(float("nan"))
        assert torch.equal(model(tokens), without) and not torch.allclose(without, whole)


@in_both_forms
def test_all_lanes_come_back():
    model, tokens = build(), tokens_of(2, T)
    with torch.no_grad():
        whole = model(tokens)
        variant.set_lanes(model, ["poly"])
        variant.set_lanes(model, ["poly", "wavelet", "fourier"])
        assert torch.equal(model(tokens), whole)


@in_both_forms
@pytest.mark.parametrize("pack", ["attention", "block"])
def test_lane_dropout_leaves_lanes_out_of_rows_in_training(pack):
    model = build(f"pack={pack},lane_dropout=0.5")
    gate = model.blocks[0].attention.gate.train()
    torch.manual_seed(0)
    kept = gate.is_kept(torch.zeros(1000, 3, 48))
    assert kept.shape == (1000, 1, 3) and kept.any(-1).all() and 0.4 < kept.float().mean() < 0.7
    assert gate.eval().is_kept(torch.zeros(2, 3, 48)) is None
    tokens = tokens_of(2, T)
    model.train()(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pack", list(variant.PRESETS))
@pytest.mark.parametrize("kind", ["cosine", "energy"])
def test_diversity_is_of_training_only(kind, pack):
    config = train_gpt.make_config(SMALL)
    options = f"wave_lanes:pack={pack},diversity={kind},diversity_weight=0.5,dropout=0"
    with variants.applied((options,), config):
        model = train_gpt.build_model(config, train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32))
        tokens = tokens_of(2, T + 1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        training = model.train()(tokens[:, :-1], tokens[:, 1:])
        layers = [m.diversity for m in model.modules() if getattr(m, "diversity", None) is not None]
        validation = model.eval()(tokens[:, :-1], tokens[:, 1:])
        assert len(layers) == (1 if pack == "faithful" else 2)
        torch.testing.assert_close(training - validation, 0.5 * sum(layers) / len(layers), rtol=1e-4, atol=1e-5)
        training.backward()


def test_diversity_of_outputs():
    a, b = torch.tensor([[[1.0, 0]]]), torch.tensor([[[3.0, 4]]])
    assert variant.measure_diversity([a, b], "cosine").item() == pytest.approx(0.6)
    # energies 0.5 and 12.5
    assert variant.measure_diversity([a, b], "energy").item() == pytest.approx(6 / 6.5, rel=1e-4)


def test_every_third_layer_is_the_trainers():
    found = counts("attention_every=3,pack=block", layers=6, **WIDE[128])
    layers = {int(name.split(".")[1]) for name in found if ".attention.q." in name}
    assert layers == {2, 5} and {int(name.split(".")[1]) for name in found if ".mlp.fc." in name} == {2, 5}


@in_both_forms
def test_kernels_are_the_same_model(form):
    tokens = tokens_of(2, T)
    kernels = ["torch", "dense", "banded"] + ["loops"] * backend.has_cpu_loops()
    with torch.no_grad():
        expected = build()(tokens)
        for kernel in kernels:
            found = build(f"kernel={kernel},chunk=16")(tokens)
            assert relative_rms(found, expected) < float_bound(4 * 48 + 2 * T, torch.float32), kernel


@in_both_forms
@pytest.mark.parametrize("pack", ["block", "faithful"])
def test_bfloat16_runs(pack):
    model = build(f"pack={pack},lanes={ALL},context_conv=dense", layers=1)
    model.dtype = torch.bfloat16
    tokens = tokens_of(2, T)
    model.train()(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- Faults -----------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ("lanes=poly,sine", "there is no lane 'sine'; there are poly, fourier"),
    ("lanes=poly,poly", "names a lane twice"),
    ("lanes=", "there is no lane ''"),
    ("K=0", "K=0: give at least 1"),
    ("L=9", "L=9: the widest mean has 2.L tokens; give at most 8"),
    ("conv_k=5", "conv_k=5: give 3 or 4 taps"),
    ("kernel=fast", "kernel=fast is none of auto, triton, loops, torch, dense, banded"),
    ("gate_map=hard", "gate_map=hard is none of softmax"),
    ("widths=wide", "widths=wide is none of matched, fixed"),
    ("basis=odd", "basis=odd is none of chosen, random"),
    ("residual=on", "residual and depth are of pack=faithful"),
    ("recall_decay=1.5", r"recall_decay=1.5 is not in \(0, 1\]"),
    ("lane_dropout=1", "probabilities are below 1"),
    ("pack=faithful,attention_every=2", "attention_every is of packings with several layers"),
    ("depth=deep", "residual and depth are of pack=faithful"),
    ("s_ref_poly=40", "s_ref_poly=40 is below the row length 48"),
    ("s_ref_fourier=95", "s_ref_fourier=95 is below 2 x the row length 48"),
    ("s_ref_fourier=47,freqs=log", "s_ref_fourier=47 is below 1 x the row length 48"),
    ("lanes=recall,recall_features=512", "model_dim=48 is too narrow for lanes=recall"),
    ("pack=faithful,lanes=recall,recall_heads=5", "recall_heads=5 do not divide the recall lane's width 48"),
])
def test_a_fault_is_one_line(options, message):
    with pytest.raises(train_gpt.RunError, match=message) as caught:
        plain(options)
    assert "\n" not in str(caught.value) and "wave_lanes" in str(caught.value)


def test_lanes_that_do_not_exist_at_run_time():
    model = build()
    with pytest.raises(train_gpt.RunError, match=r"set_lanes\(\['recall'\]\): the model has the lanes poly, fourier"):
        variant.set_lanes(model, ["recall"])
    with pytest.raises(train_gpt.RunError, match=r"set_lanes\(\[\]\)"):
        variant.set_lanes(model, [])
    with pytest.raises(train_gpt.RunError, match="the model has no lanes; apply variant wave_lanes"):
        variant.set_lanes(train_gpt.GPT(train_gpt.make_config(SMALL)), ["poly"])
