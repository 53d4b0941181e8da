"""
topological_attention: every option against a float64 form that holds all scores, where each starts, what each refuses,
and stored Laplacians.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
import variants
from tests.errors import float_bound, perturbed, relative_rms
from variants import topological_attention as variant

END, T = 256, 24
# of a layer: sums over tokens, in attention and in weights' gradients, and over the width
BOUND = float_bound(2 * 2 * T + 5 * 32, torch.float32)
# of a quotient of sums over a head, of sums over the width
COORDINATE = dict(rtol=float_bound(16 + 32, torch.float32), atol=float_bound(1, torch.float32))
SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, zero_init_projections=False)
COLUMNS = {16: [0, 1, 2, 3], 8: [0, 3], 4: [0], 32: [0, 1, 2, 3]}  # of the rotary tables, for each width of a head


def build(options: str = "", **changes) -> train_gpt.GPT:
    config = train_gpt.make_config(SMALL | changes)
    with variants.applied((f"topological_attention:{options}".removesuffix(":"),), config):
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


def stream_and_context(model: train_gpt.GPT, layer: int = 1) -> tuple[torch.Tensor, train_gpt.AttentionContext]:
    tokens = torch.randint(END, (2, T), generator=torch.Generator().manual_seed(1))
    tokens[0, [0, 7, 9]], tokens[1, [4, 20]] = END, END
    with torch.no_grad():
        x, contexts = model.embed(tokens, model.masks(tokens))
    return x, contexts[layer]


def error_of(options: str, **changes) -> str:
    with pytest.raises(train_gpt.RunError) as caught:
        build(options, **changes)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("variant topological_attention: ")
    return message.removeprefix("variant topological_attention: ")


@pytest.fixture
def arguments(monkeypatch) -> dict:
    """What the layer last gave to the kernel."""
    seen, kernel = {}, variant.topological_attention

    def spy(query_coord, key_coord, value, **others):
        seen.update(others, query_coord=query_coord, key_coord=key_coord, value=value)
        return kernel(query_coord, key_coord, value, **others)
    monkeypatch.setattr(variant, "topological_attention", spy)
    return seen

# ---- The formula ------------------------------------------------------------


def energy(x: torch.Tensor, options, parameters: dict) -> torch.Tensor:
    """x'Lx of x (B, T, H, D), as a sum over the links of the graph."""
    n, total = x.shape[-1], 0.0
    if options.laplacian == "learned":
        links = [(c, d) for c in range(n) for d in range(c + 1, n)]
        weights = torch.log1p(parameters["edge_logits"].exp())
    else:
        links, weights = [(c, c + 1) for c in range(n - 1)], torch.ones(n - 1)
    for (c, d), weight in zip(links, weights, strict=True):
        total = total + weight * (x[..., c] - x[..., d]) ** 2
    return total


def convolution(x: torch.Tensor, taps: torch.Tensor, start: list) -> torch.Tensor:
    """The causal convolution of each channel, within documents that begin at start[row][position]."""
    def at(b: int, t: int) -> torch.Tensor:
        reach = min(len(taps), t - start[b][t] + 1)
        return sum(taps[len(taps) - 1 - back] * x[b, t - back] for back in range(reach))

    return torch.stack([torch.stack([at(b, t) for t in range(x.shape[1])]) for b in range(len(x))])


def formula(attention, x: torch.Tensor, ctx, parameters: dict) -> torch.Tensor:
    """The layer in float64 from the formulas of the variant's docstring; parameters: name -> tensor."""
    options, H, D, (B, T, _) = attention.options, attention.config.heads, attention.config.head_dim, x.shape
    x, start = x.double(), ctx.mask.doc_start.tolist()
    if options.short_conv:
        x = convolution(x, parameters["taps"], start)

    def product(name: str) -> torch.Tensor:
        return x @ parameters[f"{name}.weight"].T

    # coordinates
    a = b = torch.zeros(B, T, H, dtype=torch.float64)
    if options.coordinate == "rayleigh":
        coordinates, rotary = [], [table.double()[:, COLUMNS[D]] for table in ctx.rotary]
        for name in "qk":
            z = product(name).view(B, T, H, D)
            z = train_gpt.rotate(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rotary)
            e = energy(z, options, parameters) / (z.square().sum(-1) + 1e-6)
            coordinates.append(e / (e + 1))
        a, b = coordinates
    elif options.coordinate == "linear":
        a, b = x @ parameters["coordinates"][:H].T, x @ parameters["coordinates"][H:].T
    if options.quantize_bins:
        low, high = (0, 1) if options.coordinate == "rayleigh" else (-8, 8)
        values = torch.linspace(low, high, options.quantize_bins, dtype=torch.float64)
        b = b + (values[(b[..., None] - values).abs().argmin(-1)] - b).detach()
    if options.temperature == "per_head":
        a, b = a / parameters["log_temperature"].exp(), b / parameters["log_temperature"].exp()

    # scores, of shape (B, queries, keys, H)
    scores = -(a[:, :, None] - b[:, None]).abs()
    if options.decay != "none":
        gate = product("forget") if options.decay == "data" else torch.zeros(B, T, 1)
        total = -torch.log1p(torch.exp(-(parameters["forget_bias"] + gate))).cumsum(1)
        scores = scores + total[:, :, None] - total[:, None]
    if options.key_bias == "on":
        scores = scores + product("key_bias")[:, None]
    window = ctx.mask.window or T
    allowed = torch.tensor([[[max(start[row][i], i - window + 1) <= j <= i for j in range(T)] for i in range(T)]
                            for row in range(B)])
    weights = scores.masked_fill(~allowed[..., None], -math.inf).softmax(2)

    # values and gates
    v = product("v").view(B, T, H, D)
    if "value_mix" in parameters:
        v = parameters["value_mix"][0] * v + parameters["value_mix"][1] * ctx.value.double().view(B, T, H, D)
    y = torch.einsum("bijh,bjhd->bihd", weights, v)
    if "gate.weight" in parameters:
        y = y * 2 * torch.sigmoid(x[..., :12] @ parameters["gate.weight"].T)[..., None]
    y = y.flatten(2)
    if options.gate == "output":
        y = y * 2 * torch.sigmoid(product("output_gate"))
    return y @ parameters["o.weight"].T


EVERYTHING = "coordinate=linear,temperature=per_head,decay=data,heads=8,short_conv=4,gate=output,key_bias=on"
RAYLEIGH = EVERYTHING.replace("linear", "rayleigh").replace("heads=8", "heads=2")
CHOICES = ["", "preset=fast", "preset=key_only", "coordinate=linear", "coordinate=none", "laplacian=learned",
           "temperature=per_head", "decay=per_head", "decay=data", "heads=4", "head_dim=4", "heads=1", "short_conv=3",
           "short_conv=4", "gate=output", "key_bias=on", "quantize_bins=16", "coordinate=linear,quantize_bins=40",
           EVERYTHING, RAYLEIGH + ",laplacian=learned,quantize_bins=7"]


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("window", [0, 5])
def test_formula_and_gradients(options, window):
    model = awake(build(options, window_long=(window,)))
    x, ctx = stream_and_context(model)
    attention, x = model.blocks[1].attention, x.requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y = attention(x, ctx)
    y.backward(grad)

    def exactly(change):
        """The result and the gradients in float64, from float32 numbers that are changed."""
        parameters = {name: change(p.detach()).double().requires_grad_() for name, p in attention.named_parameters()}
        wide = change(x.detach()).double().requires_grad_()
        expected = formula(attention, wide, ctx, parameters)
        expected.backward(grad.double())
        return dict(y=expected.detach(), x=wide.grad) | {name: p.grad for name, p in parameters.items()}

    found = dict(y=y, x=x.grad) | {name: p.grad for name, p in attention.named_parameters()}
    rounded = exactly(perturbed)
    # a gradient whose terms cancel is as wrong as one rounding of every number makes it
    for name, wanted in exactly(lambda p: p).items():
        bound = max(BOUND, min(100 * BOUND, 8 * relative_rms(rounded[name], wanted)))
        assert wanted.abs().max() > 0 and relative_rms(found[name], wanted) < bound, name


def test_without_document_mask_norm_and_rotation(arguments):
    model = awake(build(document_mask=False, qk_norm=False, rope="none"))
    x, ctx = stream_and_context(model)
    attention = model.blocks[1].attention
    attention(x, ctx)
    z = (x.double() @ attention.q.weight.double().T).view(2, T, 2, 16)
    e = (z[..., 1:] - z[..., :-1]).square().sum(-1) / (z.square().sum(-1) + 1e-6)
    torch.testing.assert_close(arguments["query_coord"].double(), e / (1 + e), **COORDINATE)
    assert not arguments["doc_start"].any() and arguments["window"] is None

# ---- Where the options start ------------------------------------------------


def test_presets():
    def fields(**given) -> dict:
        resolved = vars(variant.Options(**given).resolve())
        return {name: value for name, value in resolved.items() if name != "preset"}

    off = dict(coordinate="rayleigh", laplacian="chain", tau="fixed", temperature="fixed", decay="none", heads=0,
               head_dim=0, short_conv=0, gate="none", key_bias="off", quantize_bins=0)
    fast = off | dict(coordinate="linear", decay="data", head_dim=8, short_conv=4)
    assert fields() == fields(preset="faithful") == off and fields(preset="fast") == fast
    assert fields(preset="key_only") == fast | dict(coordinate="none", key_bias="on")
    assert fields(preset="fast", decay="none", short_conv=0) == fast | dict(decay="none", short_conv=0)
    assert fields(preset="fast", heads=2) == fast | dict(heads=2, head_dim=0)
    assert fields(preset="fast", head_dim=4)["head_dim"] == 4


@pytest.mark.parametrize("options, same", [
    ("preset=fast", "preset=fast,short_conv=0"), ("decay=data", "decay=per_head"), ("key_bias=on", ""),
    ("temperature=per_head", ""), ("preset=key_only", "preset=key_only,key_bias=off")])
def test_an_option_starts_as_if_it_were_off(options, same):
    outputs = []
    for text in (options, same):
        model = build(text)
        outputs.append(model.blocks[1].attention(*stream_and_context(model)))
    assert relative_rms(*outputs) < 2 * BOUND


@pytest.mark.parametrize("decay", ["per_head", "data"])
def test_decay_starts_with_slopes(decay, arguments):
    model = build(f"decay={decay},heads=4")
    model.blocks[0].attention(*stream_and_context(model, 0))
    torch.testing.assert_close(arguments["log_decay"], -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).expand(2, T, 4))


def test_linear_coordinates_start_with_unit_variance(arguments):
    model = build("coordinate=linear,heads=8", model_dim=256, heads=8, head_dim=32)
    x = F.rms_norm(torch.randn(2, T, 256, generator=torch.Generator().manual_seed(0)), (256,))
    model.blocks[0].attention(x, stream_and_context(model, 0)[1])
    for coordinate in (arguments["query_coord"], arguments["key_coord"]):
        assert coordinate.shape == (2, T, 8) and coordinate.std().item() == pytest.approx(1, rel=0.1)
    assert not torch.equal(arguments["query_coord"], arguments["key_coord"])


def test_learned_laplacian_starts_near_the_chain():
    attention = build("laplacian=learned").blocks[0].attention
    weights = torch.zeros(256).scatter(0, attention.edges, F.softplus(attention.edge_logits)).view(16, 16)
    chain = torch.diag(torch.ones(15), 1)
    assert torch.allclose(weights[chain.bool()], torch.ones(15))
    assert weights[torch.triu(1 - chain, 1).bool()].max() < 0.02 and not weights.tril().any()


def test_chain_laplacian():
    assert variant.chain_laplacian(3).tolist() == [[1, -1, 0], [-1, 2, -1], [0, -1, 1]]


def test_quantize():
    x = torch.tensor([-9.0, -7.9, -0.1, 0.0, 3.9, 100.0], requires_grad=True)
    y = variant.quantize(x, 5, -8.0, 8.0)
    y.backward(torch.arange(6.0))
    assert y.tolist() == [-8, -8, 0, 0, 4, 8] and x.grad.tolist() == [0, 1, 2, 3, 4, 5]
    values = variant.quantize(torch.rand(10_000, generator=torch.Generator().manual_seed(0)), 256, 0.0, 1.0)
    assert len(values.unique()) == 256  # whatever the input, never a 257th by rounding

# ---- What goes where --------------------------------------------------------


def test_optimizers_and_shapes():
    model = build(EVERYTHING)
    ranks = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
    kinds = {id(p): (type(optimizer).__name__, bucket.lr)
             for optimizer in train_gpt.build_optimizers(model, model.config, ranks)
             for bucket in optimizer.buckets for p in bucket.parameters}
    found = {name: (*p.shape, *kinds[id(p)]) for name, p in model.blocks[0].attention.named_parameters()}
    matrix, scalar = ("Muon", model.config.lr_matrix), ("Adam", model.config.lr_scalar)
    assert found == {
        "v.weight": (32, 32, *matrix),
        "o.weight": (32, 32, *matrix),
        "output_gate.weight": (32, 32, *matrix),
        "gate.weight": (8, 12, *scalar),
        "value_mix": (2, *scalar),
        "coordinates": (16, 32, "Adam", model.config.lr_scalar * 32 ** -0.5),
        "log_temperature": (8, *scalar),
        "forget_bias": (8, *scalar),
        "forget.weight": (8, 32, *scalar),
        "key_bias.weight": (8, 32, *scalar),
        "taps": (4, 32, *scalar)}
    plain = build("preset=key_only,short_conv=0,key_bias=off,decay=none").blocks[0].attention
    assert {name for name, _ in plain.named_parameters()} == {"v.weight", "o.weight", "gate.weight", "value_mix"}


def test_heads_and_widths():
    def shape(options, **changes) -> tuple[int, int, int]:
        attention = build(options, **changes).blocks[0].attention
        return attention.config.heads, attention.config.head_dim, len(attention.v.weight)

    assert shape("") == (2, 16, 32) and shape("heads=8,coordinate=linear") == (8, 4, 32)
    assert shape("head_dim=8") == (4, 8, 32)
    assert shape("head_dim=1,coordinate=linear") == (32, 1, 32)
    assert shape("heads=3,head_dim=5,coordinate=linear", value_embeddings=0) == (3, 5, 15)
    assert shape("preset=fast") == (4, 8, 32) and shape("preset=fast,heads=2") == (2, 16, 32)


def test_scalars_are_wide_where_the_stream_is_narrow(arguments):
    model = build(EVERYTHING)
    model.dtype = torch.bfloat16
    x, ctx = stream_and_context(model)
    assert model.blocks[1].attention(x, ctx).dtype == arguments["value"].dtype == torch.bfloat16
    assert {arguments[name].dtype for name in ("query_coord", "key_coord", "log_decay", "key_bias")} == {torch.float32}


@pytest.mark.parametrize("options", ["", EVERYTHING])
def test_another_linear_is_honoured(options, monkeypatch):
    plain = train_gpt.Linear

    class Factored(torch.nn.Module):  # without .weight
        def __init__(self, n_in, n_out):
            super().__init__()
            self.a = torch.nn.Parameter(torch.full((2, n_in), 0.1))
            self.b = torch.nn.Parameter(torch.full((n_out, 2), 0.1))

        def forward(self, x):
            return x @ self.a.T.type_as(x) @ self.b.T.type_as(x)

    def linear(config, layer, role, n_in, n_out):
        return plain(config, layer, role, n_in, n_out) if role == "head" else Factored(n_in, n_out)
    monkeypatch.setattr(train_gpt, "Linear", linear)
    attention = build(options).blocks[0].attention
    linears = {name for name, module in attention.named_children() if isinstance(module, Factored)}
    others = {"forget", "key_bias", "output_gate"} if options else {"q", "k"}
    assert linears == {"v", "o", "gate"} | others
    assert attention(*stream_and_context(build(), 0)).isfinite().all()


@pytest.mark.parametrize("options", [EVERYTHING, "laplacian=learned,quantize_bins=8,head_dim=8", "preset=key_only"])
def test_compiles_to_one_graph(options):
    model = awake(build(options, window_long=(5,)))
    tokens = torch.randint(END, (2, T + 1), generator=torch.Generator().manual_seed(1))
    tokens[:, [0, 7]] = END
    expected = model(tokens[:, :-1], tokens[:, 1:]).item()
    torch._dynamo.reset()
    loss = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch._dynamo.reset()
    assert loss.item() == pytest.approx(expected, rel=2 * BOUND)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_hybrid():
    model = build("preset=fast,layers=1")
    assert [type(block.attention).__name__ for block in model.blocks] == ["CausalSelfAttention", "TopologicalAttention"]

# ---- Faults -----------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ("heads=-1", "heads=-1,head_dim=0: give positive numbers, or 0 for the preset's"),
    ("laplacian=ring", "laplacian=ring is none of chain, learned and domain:FILE"),
    ("coordinate=linear,laplacian=learned",
     "there is no laplacian with coordinate=linear; leave it out or give coordinate=rayleigh"),
    ("preset=key_only,laplacian=learned",
     "there is no laplacian with coordinate=none; leave it out or give coordinate=rayleigh"),
    ("quantize_bins=1", "quantize_bins=1: give at least 2 bins, or 0 for none"),
    ("coordinate=none,temperature=per_head",
     "there is no temperature with coordinate=none, which has no distance term; leave it out"),
    ("preset=key_only,quantize_bins=8", "there is nothing to quantize with coordinate=none; leave quantize_bins out"),
    ("heads=3", "heads=3,head_dim=0 do not divide the width 32; give both"),
    ("heads=64,coordinate=linear", "heads=64,head_dim=0 do not divide the width 32; give both"),
    ("head_dim=5,coordinate=linear", "heads=0,head_dim=5 do not divide the width 32; give both"),
    ("heads=4,head_dim=16",
     "value embeddings need heads x head_dim = 32, got 4 x 16; or use --value_embeddings 0"),
    ("head_dim=2",
     "head_dim=2 is not a multiple of 4, as rotary positions need; choose another, coordinate=linear or --rope none"),
])
def test_faults(options, message):
    assert error_of(options) == message


def test_one_channel_has_no_laplacian():
    assert error_of("head_dim=1", rope="none") == "coordinate=rayleigh needs at least 2 channels a head"

# ---- Stored Laplacians ------------------------------------------------------


PROVENANCE = '{"source": "a test"}'


def store(path, laplacian, provenance=PROVENANCE):
    np.savez(path, laplacian=laplacian, provenance=provenance)
    return f"laplacian=domain:{path}"


def ring(n: int) -> np.ndarray:
    links = np.roll(np.eye(n), 1, axis=0)
    return 2 * np.eye(n) - links - links.T


def test_a_stored_laplacian(tmp_path, arguments):
    model = awake(build(store(tmp_path / "ring.npz", ring(16))))
    attention = model.blocks[1].attention
    assert torch.equal(attention.laplacian, torch.from_numpy(ring(16)).float())
    assert "laplacian" in attention.state_dict()
    x, ctx = stream_and_context(model)
    attention(x, ctx)
    z = (x.double() @ attention.k.weight.double().T).view(2, T, 2, 16)
    z = train_gpt.rotate(z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt(), ctx.rotary)
    e = (z - z.roll(1, dims=-1)).square().sum(-1) / (z.square().sum(-1) + 1e-6)
    torch.testing.assert_close(arguments["key_coord"].double(), e / (1 + e), **COORDINATE)
    chain, stored = build(), build(store(tmp_path / "chain.npz", variant.chain_laplacian(16).numpy()))
    assert torch.equal(*(model.blocks[1].attention(x, ctx) for model in (chain, stored)))


def test_a_checkpoint_keeps_its_laplacian(tmp_path):
    saved = build(store(tmp_path / "a.npz", ring(16))).state_dict()
    other = build(store(tmp_path / "a.npz", 3 * ring(16)))
    other.load_state_dict(saved)
    assert torch.equal(other.blocks[0].attention.laplacian, torch.from_numpy(ring(16)).float())


FILE = "give an .npz file with the arrays laplacian and provenance (JSON)"
NO_PROVENANCE = " has no provenance; store a JSON object that says what the graph was made from"


@pytest.mark.parametrize("laplacian, provenance, message", [
    (ring(8), PROVENANCE, " is of 8 channels, a head has 16; give head_dim=8 and heads="),
    (ring(16), "{}", NO_PROVENANCE),
    (ring(16), json.dumps("text"), NO_PROVENANCE),
    (ring(16), "text", f" cannot be read (JSONDecodeError); {FILE}"),
    (ring(16)[:8], PROVENANCE,
     " holds an array of shape (8, 16) that is not square, finite and symmetric; make it again"),
    (ring(16) * np.nan, PROVENANCE,
     " holds an array of shape (16, 16) that is not square, finite and symmetric; make it again"),
    (ring(16) + np.tri(16), PROVENANCE,
     " holds an array of shape (16, 16) that is not square, finite and symmetric; make it again"),
    (-ring(16), PROVENANCE, " has eigenvalues from -4 on, a Laplacian's are 0 and above, not all 0; make it again"),
    (0 * ring(16), PROVENANCE, " has eigenvalues from 0 on, a Laplacian's are 0 and above, not all 0; make it again"),
])
def test_stored_laplacians_that_do_not_fit(tmp_path, laplacian, provenance, message):
    options = store(tmp_path / "a.npz", laplacian, provenance)
    assert error_of(options) == options + message


def test_tau_of_the_file(tmp_path):
    """lambda = E / (E + tau): the Laplacian is divided by tau."""
    np.savez(tmp_path / "a.npz", laplacian=ring(16), provenance=PROVENANCE, tau=np.float64(2.5))
    options = f"laplacian=domain:{tmp_path / 'a.npz'}"
    plain, divided = (build(text).blocks[0].attention.laplacian for text in (options, options + ",tau=file"))
    torch.testing.assert_close(divided * 2.5, plain)
    assert error_of("tau=2") == "tau=2 is none of fixed and file"
    assert error_of("tau=file") == "tau=file is read with the Laplacian; give laplacian=domain:FILE too"
    options = store(tmp_path / "b.npz", ring(16))
    message = error_of(options + ",tau=file")
    assert message == f"{options} holds no tau above 0; make it by data/manifold.py or leave tau=file out"


def test_files_that_are_no_laplacian(tmp_path):
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "bare.npy", ring(16))
    np.savez(tmp_path / "other.npz", graph=ring(16))
    for name in ("nothing.npz", "text.npz", "bare.npy", "other.npz"):
        options = f"laplacian=domain:{tmp_path / name}"
        message = error_of(options)
        assert message.startswith(f"{options} cannot be read (") and message.endswith(f"); {FILE}")
