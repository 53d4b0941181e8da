"""The trainer: model, loss, masks, optimizers, loader, checkpoints, faults. Small models, byte vocabulary, CPU."""
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import AttentionMask, Ranks, RunError, SoftcappedCrossEntropy, TokenLoader, Trainer, attend, main, make_config, orthogonalize
from data.shards import write_meta, write_shard
from tests.errors import float_bound, relative_rms

ROOT = Path(train_gpt.__file__).resolve().parent
END = 256
TINY = dict(vocab_size=257, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=32, batch_tokens=256, micro_batch_tokens=64,
            steps=8, val_tokens=640, val_every=4, bigram_rows=100, window_pattern="SL", window_short=(8, 6), window_long=(0, 20), compile="off", device="cpu")
ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)


def tiny_model(**changes):
    config = make_config({**TINY, **changes})
    model = train_gpt.build_model(config, ALONE)
    model.set_windows(1.0)
    return model, config


def wake(model):
    """Give every parameter a random value, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def logit_bound(config, logits):
    """How far two ways to the same logits may differ: in every layer a chain of sums over the keys, the channels and the hidden channels."""
    terms = config.layers * (logits.shape[1] + 3 * config.model_dim + config.mlp_hidden)
    return float_bound(terms, torch.float32) * logits.abs().max().item()


def rows_of_documents(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (rows, length))
    tokens[rng.random((rows, length)) < 0.1] = END
    return torch.from_numpy(tokens.astype(np.int32))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Three training shards of odd sizes, of text that a model can learn, and one validation shard."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    words = [rng.integers(97, 123, rng.integers(2, 7)) for _ in range(30)]

    def documents(count):
        return np.concatenate([np.concatenate([[END]] + [np.append(words[i], 32) for i in rng.integers(0, 30, rng.integers(5, 60))]) for _ in range(count)])

    for number, count in enumerate((9, 14, 11)):
        write_shard(folder / f"words_train_{number:06d}.bin", documents(count))
    write_shard(folder / "words_val_000000.bin", documents(12))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


def arguments(corpus, folder, **changes):
    settings = {**TINY, "data": corpus, "log_dir": folder, "run_id": "run", **changes}
    result = []
    for name, value in settings.items():
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        result += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return result


def start(corpus, folder, **changes):
    return subprocess.Popen([sys.executable, "train_gpt.py", *arguments(corpus, folder, **changes)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- the file

def test_import_does_nothing_and_loads_little(tmp_path):
    """No output, no file, no process group; of the slow packages only PyTorch and NumPy, whose compilers stay unloaded."""
    check = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; before = set(sys.modules); import train_gpt
slow = ("torch._dynamo", "torch._inductor", "triton", "scipy", "matplotlib", "tiktoken", "huggingface_hub", "pyarrow", "numba", "variants", "kernels", "records")
assert not train_gpt.dist.is_initialized()
assert not [name for name in set(sys.modules) - before if name.startswith(slow)], sorted(set(sys.modules) - before)"""
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == ("", "", [])


def test_waiting_threads_spin_a_bounded_time_unless_the_user_chose(tmp_path):
    """Set before torch loads its OpenMP; GNU's own report of its settings shows that the library read it."""
    check = f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import train_gpt; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")}

    def shown(**environment):
        result = subprocess.run([sys.executable, "-c", check], env=plain | dict(OMP_DISPLAY_ENV="verbose") | environment, capture_output=True, text=True)
        return result.stdout.strip(), re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    assert shown() in (("20000", ["20000"]), ("20000", []))  # []: another library than GNU's
    assert shown(GOMP_SPINCOUNT="7")[0] == "7" and shown(OMP_WAIT_POLICY="PASSIVE")[0] == shown(KMP_BLOCKTIME="0")[0] == "None"


def test_scripts_load_the_trainer_before_pytorch():
    """PyTorch's OpenMP reads the bounded spin once, when it is loaded; so a file of the project comes before it in every script's imports."""
    scripts = [file for folder in (".", "benchmarks", "data", "records") for file in sorted((ROOT / folder).glob("*.py")) if file.name != "train_gpt.py"]
    own = {file.stem for file in ROOT.glob("*.py")} | {"benchmarks", "data", "records", "variants"}
    wrong = []
    for file in scripts:
        imports = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        loading = [name for name in imports if name in own | {"torch", "kernels"}]
        if "torch" in loading and loading[0] not in own:
            wrong.append(str(file.relative_to(ROOT)))
    assert len(scripts) > 20 and not wrong


def test_every_option_is_explained_in_its_group_with_its_default():
    text = subprocess.run([sys.executable, "train_gpt.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "500"}).stdout
    groups = re.split(r"^(what to train|data|model|optimizer|run):$", text, flags=re.M)[1:]
    groups = dict(zip(groups[::2], groups[1::2]))
    assert len(groups) == 5
    for field in train_gpt.dataclasses.fields(train_gpt.Config):
        assert sum(bool(re.search(rf"^  --{field.name}\b.*\n?.*[a-z]", options, re.M)) for options in groups.values()) == 1, field.name
    assert re.search(r"--lr_head .* Adam's, for the head \(default: 0.016\)", groups["optimizer"]) and "(default: True)" in groups["model"]


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_tracks_are_consistent(track):
    config = make_config(dict(track=track, vocab_size=50257))
    assert config.heads * config.head_dim == config.model_dim and config.steps >= 1
    assert config.micro_batch_tokens % config.sequence_length == 0
    with torch.device("meta"):
        parameters = sum(p.numel() for p in train_gpt.GPT(config).parameters())
    low, high = dict(cpu=(0.5e6, 40e6), small=(28e6, 36e6), exodus18m=(17.5e6, 18.5e6), long=(28e6, 36e6), short=(124e6, 360e6), medium=(300e6, 600e6), benchmark=(124e6, 170e6))[track]
    assert low < parameters < high


# ---- model

def test_loss_at_the_start_is_log_vocabulary():
    for changes in ({}, dict(tied_embedding=True), dict(zero_init_projections=False)):
        model, _ = tiny_model(**changes)
        tokens = rows_of_documents(4, 33)
        loss = model(tokens[:, :-1], tokens[:, 1:]).item()
        assert abs(loss / math.log(257) - 1) < 0.02, (changes, loss)


def test_a_later_token_changes_nothing_before_it():
    model, config = tiny_model()
    wake(model)
    tokens = rows_of_documents(2, 32)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=logit_bound(config, before))
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 1e-3


@pytest.mark.parametrize("place", [5, 12, 19, 20])
def test_another_document_changes_nothing(place):
    model, config = tiny_model()
    wake(model)
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tokens[0, [0, 12, 21]] = END  # documents 0..11, 12..20, 21..31
    changed = tokens.clone()
    changed[0, place if place != 12 else 11] = 7
    own = slice(0, 12) if place in (19, 20) else slice(12, 32)
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    bound = logit_bound(config, before)
    torch.testing.assert_close(before[:, own], after[:, own], rtol=0, atol=bound)
    torch.testing.assert_close(before[:, 21:], after[:, 21:], rtol=0, atol=bound)
    assert (before - after).abs().max() > 1e-3 > 5 * bound


def test_without_document_mask_the_row_is_one_document():
    model = wake(tiny_model(document_mask=False)[0])
    tokens = rows_of_documents(1, 32)
    tokens[0, 10] = END
    changed = tokens.clone()
    changed[0, 9] = 7
    with torch.no_grad():
        assert (model(tokens)[:, 12:] - model(changed)[:, 12:]).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient():
    for changes in ({}, dict(tied_embedding=True), dict(rope="full"), dict(x0_skip=False, unet_skips=False, smear=False, attention_gate=False, value_embeddings=0, bigram_rows=0)):
        model = wake(tiny_model(**changes)[0])
        tokens = rows_of_documents(8, 33)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("switch", ["qk_norm", "zero_init_projections", "tied_embedding", "x0_skip", "unet_skips", "smear", "attention_gate", "document_mask",
                                    "value_embeddings", "bigram_rows", "logit_softcap", "rope", "window_pattern"])
def test_every_feature_is_behind_a_switch(switch):
    """Turned, each changes what the awake model computes or holds."""
    turned = dict(rope="none", window_pattern="L", value_embeddings=0, bigram_rows=0, logit_softcap=0.0, zero_init_projections=False, tied_embedding=True).get(switch, False)
    tokens = rows_of_documents(2, 32)
    base, other = tiny_model()[0], tiny_model(**{switch: turned})[0]
    same_names = dict(base.named_parameters()).keys() == dict(other.named_parameters()).keys()
    if same_names and switch != "zero_init_projections":
        wake(base), wake(other)
    if same_names and switch == "zero_init_projections":
        assert base.blocks[0].mlp.proj.weight.abs().sum() == 0 < other.blocks[0].mlp.proj.weight.abs().sum()
    elif same_names:
        with torch.no_grad():
            assert (base(tokens) - other(tokens)).abs().max() > 1e-4


def test_equal_names_begin_equal():
    base, other = tiny_model()[0].state_dict(), tiny_model(bigram_rows=0, layers=2, smear=False)[0].state_dict()
    for name in ("embedding.weight", "blocks.1.attention.q.weight", "blocks.0.mlp.fc.weight"):
        assert torch.equal(base[name], other[name])
    assert not torch.equal(base["blocks.0.attention.q.weight"], base["blocks.0.attention.k.weight"])
    assert not torch.equal(base["embedding.weight"], tiny_model(seed=2)[0].state_dict()["embedding.weight"])


def test_normalisation_activation_and_rotation():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(train_gpt.RMSNormalize.apply(x), F.rms_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(train_gpt.ReLUSquared.apply(x), F.relu(x).square())
    assert torch.autograd.gradcheck(train_gpt.RMSNormalize.apply, x) and torch.autograd.gradcheck(train_gpt.ReLUSquared.apply, x)
    half = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(train_gpt.RMSNormalize.apply(half), F.rms_norm(half, (8,), eps=1e-6), rtol=1e-2, atol=1e-2)
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3])
    turned = train_gpt.rotate(x, (angles.cos(), angles.sin()))
    expected = (torch.complex(x[..., :2], x[..., 4:6]) * torch.polar(torch.ones(5, 2), -angles)[:, None].to(torch.complex128))
    for ours, theirs in ((turned[..., :2], expected.real), (turned[..., 4:6], expected.imag)):  # cosine and sine are float32's
        assert relative_rms(ours, theirs) < float_bound(2, torch.float32)
    assert torch.equal(turned[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]])


# ---- attention and its masks

def reference_attention(q, k, v, first_key, scale):
    T = q.shape[1]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    allowed = (j <= i) & (j >= first_key[:, :, None])
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1), v.double()).float()


@pytest.mark.parametrize("T,window", [(1, None), (63, None), (63, 1), (300, 7), (300, 130), (1100, None), (1100, 200)])
def test_attention_sees_exactly_its_keys(T, window):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, 2, 8, generator=generator) for _ in range(3))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.02, index, 0).cummax(1).values
    first_key = torch.maximum(starts, index - (window or T) + 1).int()
    stretches = train_gpt.mask_stretches(first_key, window, torch.float32)
    ctx = AttentionMask(starts.int(), (index - starts).int(), window, first_key, stretches=stretches)
    assert relative_rms(attend(q, k, v, ctx, 0.3), reference_attention(q, k, v, first_key, 0.3)) < float_bound(T + 8, torch.float32)


def test_block_mask_is_the_same_rule():
    from torch.nn.attention.flex_attention import flex_attention
    generator, T = torch.Generator().manual_seed(0), 512
    q, k, v = (torch.randn(2, 2, T, 16, generator=generator) for _ in range(3))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.004, index, 0).cummax(1).values
    for window in (1, 100, 128, 129, 300, T):
        first_key = torch.maximum(starts, index - window + 1).int()
        mask = train_gpt.interval_block_mask(first_key)
        allowed = ((index[None, :] <= index[:, None]) & (index >= first_key[:, :, None])).view(2, 4, 128, 4, 128)
        some, whole = allowed.any(4).any(2), allowed.all(4).all(2)
        assert torch.equal(mask.to_dense()[:, 0].bool(), some), window
        assert torch.equal(mask.full_kv_num_blocks[:, 0].long(), whole.sum(-1)), window
        expected = reference_attention(*(t.transpose(1, 2) for t in (q, k, v)), first_key, 0.25).transpose(1, 2)
        assert relative_rms(flex_attention(q, k, v, block_mask=mask, scale=0.25), expected) < float_bound(T + 16, torch.float32)


def test_flex_attention_model_equals_the_other():
    model, config = tiny_model(sequence_length=128, window_short=(20,), window_long=(70,))
    wake(model)
    tokens = rows_of_documents(2, 128)
    with torch.no_grad():
        expected = model(tokens)
        model.use_flex = True
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=logit_bound(config, expected))


def test_windows_follow_their_schedule():
    model, _ = tiny_model(window_short=(1, 2, 3), window_long=(4, 5, 6))
    seen = []
    for progress in (0, 0.33, 0.34, 0.67, 0.99, 1.0):
        model.set_windows(progress)
        seen.append(model.windows)
    assert seen == [(1, 4), (1, 4), (2, 5), (3, 6), (3, 6), (3, 6)]


@pytest.mark.parametrize("track", ["small", "exodus18m", "long", "short", "medium", "benchmark"])
def test_gpu_tracks_compile_without_a_graph_break(track, monkeypatch):
    """The GPU's own path, FlexAttention and block mask included, traced on CPU tensors; depth, width, vocabulary and length reduced."""
    base = train_gpt.TRACKS[track]
    config = make_config(dict(track=track, vocab_size=400, layers=4, model_dim=64, heads=2, head_dim=32, mlp_hidden=128, sequence_length=256, batch_tokens=256,
                              bigram_rows=min(base.get("bigram_rows", 0), 50), loss_chunk=100))
    model = train_gpt.build_model(config, ALONE)
    model.use_flex = True
    model.set_windows(0.0)
    tokens = torch.randint(0, 400, (1, 257))
    # FlexAttention refuses to be differentiated on a CPU; tracing needs no backward pass
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch._dynamo.reset()
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    report = torch._dynamo.explain(model.predict)(tokens, model.masks(tokens), targets)
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["model", "blocks"])
def test_new_windows_and_documents_compile_nothing_anew(mode, monkeypatch):
    """Counted graphs over window stages and batches, on the GPU's path (without gradients: FlexAttention has none on a CPU)."""
    compile_, graphs = torch.compile, []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compile_(f, backend=backend, **settings))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: setattr(self, "_compiled_call_impl", compile_(self._call_impl, backend=backend, **settings)))
    torch._dynamo.reset()
    model, _ = tiny_model(sequence_length=256, window_short=(20, 100, 130), window_long=(60, 140, 200), layers=6)
    model.use_flex = True
    train_gpt.compile_model(model, mode)
    seen = []
    with torch.no_grad():
        for step, progress in enumerate((0.0, 0.0, 0.4, 0.8, 1.0)):
            model.set_windows(progress)
            tokens = rows_of_documents(2, 257, seed=step)
            model(tokens[:, :-1], tokens[:, 1:])
            seen.append(len(graphs))
    assert seen[-1] == seen[0] == dict(model=1, blocks=4)[mode]  # blocks: the first, whose stream is x0 itself; with and without value embedding; the head
    torch._dynamo.reset()


# ---- loss

@pytest.mark.parametrize("softcap,chunk", [(0.0, 7), (15.0, 7), (15.0, 1000), (2.0, 50)])
def test_chunked_loss_and_its_gradients(softcap, chunk):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 16, generator=generator, requires_grad=True), torch.randn(33, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 33, (50,), generator=generator)
    (3 * SoftcappedCrossEntropy.apply(x, weight, targets, softcap, chunk)).backward()
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x64 @ w64.T
    expected = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, reduction="sum")
    (3 * expected).backward()
    # sums over the 16 channels, the 33 words and the 50 tokens; a logit's own error is that of its channels times its size, or the cap
    bound = float_bound(16 + 33 + 50, torch.float32) + max(logits.detach().abs().max().item(), softcap) * torch.finfo(torch.float32).eps
    assert abs(SoftcappedCrossEntropy.apply(x, weight, targets, softcap, chunk).item() / expected.item() - 1) < bound
    for ours, theirs in ((x.grad, x64.grad), (weight.grad, w64.grad)):
        assert relative_rms(ours, theirs) < bound


def test_loss_equals_the_logits_cross_entropy():
    model, config = tiny_model()
    wake(model)
    tokens = rows_of_documents(2, 33)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
        assert logits.shape == (2, 32, 257) and logits.dtype == torch.float32
        loss = model(tokens[:, :-1], tokens[:, 1:])
        model.head.vocab_size = config.padded_vocabulary  # the loss' normaliser counts the padding too
        padded = model(tokens[:, :-1])
    assert torch.equal(padded[..., :257], logits)
    with_gradient = model(tokens[:, :-1], tokens[:, 1:]).detach()
    expected = F.cross_entropy(padded.flatten(0, 1), tokens[:, 1:].flatten().long())
    for ours in (loss, with_gradient):
        assert abs(ours.item() - expected.item()) < logit_bound(config, logits) + float_bound(64 + 264, torch.float32) * expected.item()


# ---- optimizers

def test_orthogonalize():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        x = torch.randn(*shape, generator=generator)
        y = orthogonalize(x)
        singular = torch.linalg.svdvals(y)
        assert y.shape == x.shape and 0.6 < singular.min() and singular.max() < 1.4
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert (F.cosine_similarity((u @ v).flatten(1), y.flatten(1)) > 0.95).all()
        # alone as among others: 15 products, whose errors the polynomials' slopes of up to 8 multiply
        assert relative_rms(orthogonalize(x[1:2]), y[1:2].double()) < 8 * float_bound(15 * 48, torch.float32)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_adam_is_adam():
    torch.manual_seed(0)
    model, reference = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    reference.load_state_dict(model.state_dict())
    config = make_config({**TINY, "lr_scalar": 0.01})
    for p in model.parameters():
        p.optimizer = "adam"
    ours = train_gpt.build_optimizers(model, config, ALONE)
    theirs = torch.optim.Adam(reference.parameters(), lr=0.01, betas=(config.adam_beta1, config.adam_beta2), eps=1e-10)
    x = torch.randn(64, 7)
    for _ in range(10):
        for network in (model, reference):
            network(x).square().mean().backward()
        for optimizer in ours:
            optimizer.step(1.0, 0.5)
        theirs.step()
        theirs.zero_grad()
    # ten updates of at most 0.01, each of a quotient of sums of 64 products whose own sums have 7 and 5 terms
    for ours, exact in ((model.weight, reference.weight), (model.bias, reference.bias)):
        torch.testing.assert_close(ours, exact, rtol=10 * torch.finfo(torch.float32).eps, atol=10 * 0.01 * float_bound(10 * (64 + 12), torch.float32))


def test_parameters_choose_their_optimizer():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
            self.stack = torch.nn.Parameter(torch.randn(3, 8, 4))
            self.stack.optimizer, self.stack.lr_mul, self.stack.wd_mul = "muon", 2.0, 0.0
    model, config = Odd(), make_config(TINY)
    muon, adam = train_gpt.build_optimizers(model, config, ALONE)
    assert sorted(tuple(b.data.shape) for b in muon.buckets) == [(1, 8, 8), (3, 8, 4)] and [tuple(b.data.shape) for b in adam.buckets] == [(64,)]
    stack = next(b for b in muon.buckets if b.data.shape == (3, 8, 4))
    assert (stack.lr, stack.weight_decay) == (2 * config.lr_matrix, 0.0)
    before = model.stack.detach().clone()
    model.stack.grad.copy_(torch.randn(3, 8, 4))
    muon.step(1.0, 0.5)
    moved = (before - model.stack.detach()) / stack.lr
    assert (torch.linalg.svdvals(moved) > 0.3).all()  # each slice moved along a nearly orthogonal matrix
    model.blocks[0].bias.optimizer = "muon"
    with pytest.raises(RunError, match="blocks.0.bias.*muon takes matrices only"):
        train_gpt.build_optimizers(model, config, ALONE)


def test_weight_decay_is_of_matrices_unless_asked_for():
    model, config = tiny_model()
    model.blocks[0].stream_mix.wd_mul = 0.5
    muon, adam = train_gpt.build_optimizers(model, config, ALONE)
    assert {bucket.weight_decay for bucket in muon.buckets} == {config.weight_decay}
    decays = {bucket.weight_decay: bucket.parameters for bucket in adam.buckets}
    assert set(decays) == {0.0, 0.5 * config.weight_decay} and [p is model.blocks[0].stream_mix for p in decays[0.5 * config.weight_decay]] == [True]


def test_stream_statistics():
    model, _ = tiny_model()
    wake(model)
    tokens, seen = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(4), dtype=torch.int32), {}
    keep = lambda name: lambda module, inputs, z: seen.update({name: [t.double() for t in (*inputs, z)]})
    hooks = [getattr(block, f"{kind}_residual").register_forward_hook(keep(f"blocks.{layer}.{kind}_residual"))
             for layer, block in enumerate(model.blocks) for kind in ("attention", "mlp")]
    rows = train_gpt.stream_statistics(model, tokens)
    for hook in hooks:
        hook.remove()
    assert [row["branch"] for row in rows] == list(seen) and len(rows) == 8
    for row in rows:
        x, y, z = seen[row["branch"]]
        along = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x
        share = lambda part, y=y: ((part * part).sum(-1) / (y * y).sum(-1)).mean().item()
        deviation = x - x.mean(-1, keepdim=True)
        expected = dict(x_norm=x.norm(dim=-1).mean().item(), z_norm=z.norm(dim=-1).mean().item(), rho_par=share(along), rho_ortho=share(y - along),
                        x_norm_p50=x.norm(dim=-1).quantile(0.5).item(), x_max=x.abs().max().item(), relative_step=(y.norm(dim=-1) / x.norm(dim=-1)).mean().item(),
                        cos_x_out=torch.cosine_similarity(x, z, dim=-1).mean().item(), kurtosis=((deviation ** 4).mean(-1) / x.var(-1, correction=0) ** 2).mean().item())
        # sums of 64 tokens of 32 channels; a share of a square of a sum has the error of the sum, which may cancel to a hundredth of its terms
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=100 * float_bound(64 + 32, torch.float32))
    assert not any(module._forward_hooks for module in model.modules())
    sleeping = train_gpt.stream_statistics(tiny_model()[0], tokens)  # branches of zeros
    assert all(row["rho_par"] == row["rho_ortho"] == row["cos_x_y"] == row["relative_step"] == 0 for row in sleeping)


@pytest.mark.parametrize("compiled", ["off", pytest.param("blocks", marks=pytest.mark.slow)])
def test_stream_statistics_leave_a_run_as_it_is(corpus, tmp_path, compiled):
    curves = []
    for wanted in (False, True):
        assert main(arguments(corpus, tmp_path / str(wanted), stream_statistics=wanted, compile=compiled)) == 0
        curves.append(json.loads((tmp_path / str(wanted) / "run.json").read_text())["curve"])
    assert [point["val_loss"] for point in curves[1]] == [point["val_loss"] for point in curves[0]]
    assert [len(point["stream"]) for point in curves[1]] == [8, 8, 8] and not any("stream" in point for point in curves[0])


def test_weight_decay_is_cautious():
    data, gradient = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 1.0]]])
    state = torch.zeros(1, 1, 2), torch.zeros(1, 1, 1)
    plain, decayed = data.clone(), data.clone()
    for target, decay in ((plain, 0.0), (decayed, 0.1)):
        train_gpt.Muon.update(target, gradient.clone(), *(s.clone() for s in state), torch.tensor(0.01), torch.tensor(decay), torch.tensor(0.9), 0.0)
    difference = plain - decayed
    assert difference[0, 0, 0] > 0.09 and difference[0, 0, 1] == 0  # only where update and weight agree in sign


# ---- data

def loader(corpus, **changes):
    return TokenLoader(make_config({**TINY, "data": str(corpus), **{k: v for k, v in changes.items() if k not in ("rank", "world")}}), changes.get("rank", 0), changes.get("world", 1))


def batches(source, count):
    return [source.next_batch()[0] for _ in range(count)]


def test_loader_is_deterministic_and_seeded(corpus):
    first, second, other = (torch.stack(batches(loader(corpus, seed=seed), 12)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_loader_rows_are_pieces_of_the_shards_and_cover_them(corpus):
    shards = [np.array(train_gpt.open_shard(file)) for file in sorted(corpus.glob("*train*"))]
    source, T = loader(corpus), 32
    per_epoch = len(source.starts)
    seen = []
    for rows, state in (source.next_batch() for _ in range(40)):
        seen += [row.numpy() for row in rows]
        if state["epoch"] >= 1:
            break
    assert state["epoch"] == 1 and per_epoch > 1
    windows = [np.lib.stride_tricks.sliding_window_view(shard, T + 1) for shard in shards]
    counts = [0, 0, 0]
    for row in seen:
        where = [i for i, view in enumerate(windows) if (view == row).all(1).any()]
        assert where, "a row that is in no shard"
        counts[where[0]] += 1
    for count, shard in zip(counts, shards):  # each shard gives nearly all its tokens in an epoch
        assert count * T > 0.8 * (len(shard) - 2 * T)


def test_loader_restarts_exactly_across_shards(corpus):
    source = loader(corpus)
    batch_states = [source.next_batch() for _ in range(20)]
    assert {state["shard"] for _, state in batch_states} == {0, 1, 2}
    for stop in (3, 7, 12):
        restarted = loader(corpus)
        restarted.load_state_dict(batch_states[stop][1])
        for rows, _ in batch_states[stop + 1:]:
            assert torch.equal(restarted.next_batch()[0], rows)


def test_ranks_share_the_batch(corpus):
    whole = batches(loader(corpus), 10)
    for world in (2, 4):
        parts = [batches(loader(corpus, rank=rank, world=world), 10) for rank in range(world)]
        for step, rows in enumerate(whole):
            assert torch.equal(torch.cat([part[step] for part in parts]), rows)
    with pytest.raises(RunError, match="8 rows of 32 tokens cannot be shared by 3 ranks"):
        loader(corpus, world=3)


def test_aligned_rows_begin_documents(corpus):
    rows = torch.cat(batches(loader(corpus, align_documents=True), 10))
    assert (rows[:, 0] == END).all() and len(torch.unique(rows, dim=0)) > 10


def test_validation_rows_are_in_order(corpus):
    config = make_config({**TINY, "data": str(corpus)})
    batches = train_gpt.validation_batches(config)
    tokens = np.array(train_gpt.open_shard(next(corpus.glob("*val*"))))
    assert [batch.shape for batch in batches] == [(2, 33)] * 10
    rows = np.concatenate(batches)
    assert np.array_equal(rows[:, :-1].ravel(), tokens[:640]) and np.array_equal(rows[:, 1:].ravel(), tokens[1:641])


@pytest.mark.parametrize("micro", [640, 224, 96, 32])
def test_validation_scores_every_row_whatever_the_micro_batch(corpus, tmp_path, micro):
    """20 rows in batches of 20, 7, 3 and 1: the loss is that of all rows at once, up to the rounding of a mean of float32 losses."""
    trainer = Trainer(train_gpt.parse_config(arguments(corpus, tmp_path, micro_batch_tokens=micro)))
    rows = torch.from_numpy(np.concatenate(trainer.val_batches))
    assert len(rows) == 20 and trainer.val_tokens == trainer.log.facts["val_tokens"] == 640
    wake(trainer.model).eval()
    trainer.model.set_windows(1.0)
    with torch.no_grad():
        expected = torch.stack([trainer.model(row[None, :-1], row[None, 1:]) for row in rows]).double().mean().item()
    assert trainer.validate(trainer.val_batches) == pytest.approx(expected, rel=16 * 32 * 2 ** -24)


def named_shards(folder, **tokens):
    """Shards with these names and tokens."""
    for name, content in tokens.items():
        write_shard(folder / f"{name}.bin", np.array(content))


def shards_of(folder, split):
    return [file.stem for file in train_gpt.find_shards(make_config({**TINY, "data": str(folder)}), split)]


def test_a_split_stands_between_separators(tmp_path):
    named_shards(tmp_path, medieval_train_000001=[1] * 9, medieval_val_000000=[1] * 9, trainees=[1], interval=[1], other_val=[1], retrain_val_x=[1])
    assert shards_of(tmp_path, "train") == ["medieval_train_000001"] and shards_of(tmp_path, "val") == ["medieval_val_000000"]
    (tmp_path / "medieval_val_000000.bin").unlink()
    assert shards_of(tmp_path, "val") == ["other_val", "retrain_val_x"]  # as llm.c's small sets are called
    named_shards(tmp_path, train_val_000000=[1])
    with pytest.raises(RunError, match="train_val_000000.bin says both train and val, so its split is not known; rename it"):
        shards_of(tmp_path, "train")


def end_of(folder, meta=None, **settings):
    """(vocabulary, id that begins documents) that a run on these shards has; meta: what meta.json holds."""
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    config = make_config({**TINY, "vocab_size": 0, "data": str(folder), **settings})
    train_gpt.adopt_vocabulary(config)
    return config.vocab_size, config.end_of_text


def test_the_data_say_what_begins_a_document(tmp_path):
    named_shards(tmp_path, x_train_000000=[50256] + [5] * 99, x_val_000000=[50256] + [5] * 99)
    assert end_of(tmp_path) == (50257, 50256)
    assert end_of(tmp_path, vocab_size=50304) == (50304, 50256)  # a larger vocabulary only pads
    assert end_of(tmp_path, vocab_size=50304, document_token=5) == (50304, 5)
    assert end_of(tmp_path, dict(vocab_size=100, end_of_text=1, tokenizer="own")) == (100, 1)
    assert end_of(tmp_path, dict(vocab_size=257, tokenizer="bytes")) == (257, 256)  # of before meta.json named it
    assert end_of(tmp_path, dict(vocab_size=257, tokenizer="bytes"), vocab_size=300) == (300, 256)


def test_shards_without_the_token_that_begins_a_document_are_named(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path, document_token=255)) == 0
    assert re.search(r"warning: the first \d[\d,]* training tokens hold no id 255, which begins a document; give its id by --document_token",
                     capsys.readouterr().out)
    assert main(arguments(corpus, tmp_path, run_id="b", document_token=255, align_documents=True)) == 1
    assert "hold no id 255, which begins a document; give its id by --document_token, or --no-align_documents" in capsys.readouterr().err
    assert not (tmp_path / "b.txt").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"tokenizer": "bytes"}', '{"vocab_size": 100000}', '{"vocab_size": "257"}', '{"vocab_size": 257, "end_of_text": 257}',
                                     '{"vocab_size": 257, "val": 3}', '{"vocab_size": 257, "val": {"sha256": [1]}}', "[" * 100_000, "\udcff", '{"vocab_size": NaN}'])
def test_a_foreign_meta_file_is_one_line_and_a_given_vocabulary_goes_round_it(corpus, tmp_path, content):
    for file in corpus.glob("*.bin"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=r"meta\.json.*give --vocab_size and delete it") as error:
        end_of(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert end_of(tmp_path, vocab_size=257) == (257, 256)


def test_a_shard_that_is_not_the_one_meta_describes_is_refused(corpus, tmp_path, capsys):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    meta = json.loads((tmp_path / "meta.json").read_text())
    hashes = {split: dict(sha256={file.name: train_gpt.sha256_of_file(file) for file in tmp_path.glob(f"*{split}*.bin")}) for split in ("train", "val")}
    (tmp_path / "meta.json").write_text(json.dumps(meta | hashes))
    config = make_config({**TINY, "data": str(tmp_path)})
    train_gpt.check_shards(config)
    train_gpt.check_shards(config)  # remembered
    victim = tmp_path / "words_train_000001.bin"
    content = bytearray(victim.read_bytes())
    content[1024 + 50] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RunError, match="words_train_000001.bin is not the file that meta.json describes"):
        train_gpt.check_shards(config)
    assert main(arguments(tmp_path, tmp_path / "logs")) == 1 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", [np.uint32, np.int64])
def test_wider_tokens_are_named(tmp_path, kind):
    header = np.zeros(256, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, 1, 50
    (tmp_path / "x.bin").write_bytes(header.tobytes() + np.arange(50, dtype=kind).tobytes())
    with pytest.raises(RunError, match=f"x.bin holds tokens of {kind().itemsize} bytes, wanted 2"):
        train_gpt.open_shard(tmp_path / "x.bin")


def test_a_target_belongs_to_its_data(corpus, tmp_path, capsys):
    """The name or the sha256 of the validation shard begins with target_data; a target that is given is for any data."""
    sha256 = train_gpt.sha256_of_file(next(corpus.glob("*val*.bin")))
    expected = {"": 9.0, "words_val": 9.0, sha256[:12]: 9.0, "fineweb_val_": 0.0}
    for number, (data, target) in enumerate(expected.items()):
        capsys.readouterr()
        assert main(arguments(corpus, tmp_path, run_id=f"r{number}", target=9, target_data=data)) == 0
        facts, out = json.loads((tmp_path / f"r{number}.json").read_text()), capsys.readouterr().out
        assert facts["target"] == target and ("9.0 nats a token: reached" if target else "none is known for these data") in out
    assert make_config(dict(track="short")).target_data and not make_config(dict(track="short", target=3.0)).target_data


def test_bits_per_byte(corpus, tmp_path):
    config = make_config({**TINY, "data": str(corpus)})
    assert train_gpt.token_bytes(config).tolist() == [1] * 256 + [0]
    import base64
    merges = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    write_shard(tmp_path / "x_train_0.bin", [258, 256]), write_shard(tmp_path / "x_val_0.bin", [258, 257, 97])
    (tmp_path / "own.tiktoken").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(merges)))
    sizes = train_gpt.token_bytes(make_config({**TINY, "vocab_size": 259, "data": str(tmp_path)}))
    assert sizes[[97, 256, 257, 258]].tolist() == [1, 2, 3, 0]


# ---- runs

def test_a_run_learns_and_writes_its_record(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path, steps=60, val_every=30, lr_matrix=0.05)) == 0
    text, facts = (tmp_path / "run.txt").read_text(), json.loads((tmp_path / "run.json").read_text())
    source, head, body = text.split("=" * 100 + "\n", 2)
    assert (ROOT / "train_gpt.py").read_text() in source
    assert head.startswith("Running Python ") and "PyTorch " + torch.__version__ in head
    header = json.loads(re.search(r"^facts: (.*)$", head, re.M)[1])
    assert header == {name: facts[name] if name != "status" else "running" for name in header}
    assert {"seed", "config", "git_commit", "val_sha256", "command", "device", "triton", "replaced", "parameters", "flops_per_token"} <= header.keys()
    steps = re.findall(r"^step:(\d+)/60 train_time:\d+ms step_avg:\d+\.\d\dms$", body, re.M)
    assert [int(n) for n in steps] == list(range(1, 61))
    losses = [float(x) for x in re.findall(r"^step:\d+/60 val_loss:(\d+\.\d{4}) train_time:\d+ms step_avg:\d+\.\d\dms$", body, re.M)]
    assert len(losses) == 3 and abs(losses[0] - math.log(264)) < 1e-3 and losses[2] < 3.2 < losses[0]
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", body.strip().splitlines()[-1])
    assert facts["status"] == "finished" and [point["step"] for point in facts["curve"]] == [0, 30, 60]
    assert facts["val_bits_per_byte"] == pytest.approx(facts["val_loss"] / math.log(2) / facts["val_bytes_per_token"])
    assert 0.9 < facts["val_bytes_per_token"] < 1 and facts["tokens_per_second"] > 0 < facts["mfu"] and facts["peak_memory_mib"] > 0
    assert "MiB" in capsys.readouterr().out


def test_flops_by_formula(corpus):
    config = make_config({**TINY, "document_mask": False, "window_pattern": "L", "window_long": (0,), "window_short": (0,), "attention_gate": False, "smear": False})
    d, h, T, L, V = 32, 64, 32, 4, config.padded_vocabulary
    products = L * (4 * d * d + 2 * d * h)
    assert train_gpt.flops_per_token(config) == 6 * products + 6 * d * V + 12 * L * d * T


def stopped_at(step, monkeypatch):
    """Make the next run behave as if SIGTERM came during this step."""
    original = Trainer.train_step

    def train_step(self, rows, progress):
        loss = original(self, rows, progress)
        if self.step + 1 == step and not torch.equal(rows, torch.zeros_like(rows)) and self.log.facts.get("warmup_seconds") is not None:
            self._on_signal(signal.SIGTERM, None)
        return loss
    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_a_time_budget_ends_the_run_and_its_schedule_follows_the_clock(corpus, tmp_path, monkeypatch):
    """By a clock that goes on by 10 ms every time that it is read."""
    ticks, seen, original = itertools.count(), [], Trainer.train_step
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100, strftime=time.strftime))
    monkeypatch.setattr(Trainer, "train_step", lambda self, rows, progress: seen.append(progress) or original(self, rows, progress))
    assert main(arguments(corpus, tmp_path, time_budget=2, val_every=0)) == 0
    facts, text = json.loads((tmp_path / "run.json").read_text()), (tmp_path / "run.txt").read_text()
    times = [0] + [int(ms) for ms in re.findall(r"^step:\d+/\d+ train_time:(\d+)ms", text, re.M)]
    longest = max(b - a for a, b in zip(times, times[1:]))
    assert 2000 <= 1000 * facts["train_seconds"] <= 2000 + 2 * longest
    timed = seen[-facts["step"]:]
    assert timed == sorted(timed) and timed[0] < 0.1 and timed[-1] < 1 and facts["step"] >= 2
    assert f"step:{facts['step']}/{facts['step']} val_loss" in text and facts["curve"][-1]["tokens"] == facts["step"] * facts["config"]["batch_tokens"]


def test_training_losses_are_in_the_record(corpus, tmp_path, monkeypatch):
    """One a tenth of a second: with a clock of 60 ms a reading, at least every second step; the last lines of the log stay the peak memory."""
    ticks = itertools.count()
    monkeypatch.setattr(train_gpt, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.06, strftime=time.strftime))
    assert main(arguments(corpus, tmp_path, steps=30, val_every=0)) == 0
    text, curve = (tmp_path / "run.txt").read_text(), json.loads((tmp_path / "run.json").read_text())["train_curve"]
    assert [(int(step), float(loss)) for loss, step in re.findall(r"^train_loss:(\S+) of step (\d+)$", text, re.M)] == [(step, round(loss, 4)) for step, loss in curve]
    assert len(curve) >= 15 and curve[0][1] > curve[-1][1] > 1 and text.splitlines()[-1].startswith("peak memory")


def test_a_curve_has_at_least_twelve_points(corpus, tmp_path, capsys):
    for track in train_gpt.TRACKS:
        config = make_config(dict(track=track))
        assert config.steps // config.val_every >= 12
    assert make_config(dict(TINY, val_every=-1, steps=5)).val_every == 1
    assert main(arguments(corpus, tmp_path, val_every=-1, steps=25)) == 0
    assert len(json.loads((tmp_path / "run.json").read_text())["curve"]) == 14
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["loss", "time", "target", "files", "next"]
    assert "nats a token = " in last[0] and " bits a byte" in last[0] and "--checkpoint run " in last[4]


def test_a_dry_run_says_what_a_run_would_be(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path)) == 0
    facts = json.loads((tmp_path / "run.json").read_text())
    files = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert main([*arguments(corpus, tmp_path, run_id="other", steps=80), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == files
    assert f"{facts['parameters']:,} parameters, {facts['parameters_without_embeddings']:,} of them in blocks; {facts['flops_per_token']:,.0f} FLOPs a token" in out
    assert "80 steps of 256 tokens" in out and re.search(r"memory  at least \d+ MiB of [\d,]+", out)
    seconds = int(re.search(r"about (\d+) s of training, as run computed", out)[1])
    assert abs(seconds - 10 * facts["train_seconds"]) <= 0.5  # as many FLOPs a step, ten times the steps


def test_a_plan_that_does_not_fit_the_memory_is_refused_before_anything_is_allocated(corpus, tmp_path, capsys):
    """Parameters that do not fit, and streams of a micro batch that do not."""
    for change in (dict(model_dim=2 ** 17, heads=2 ** 10, head_dim=128, mlp_hidden=2 ** 18), dict(micro_batch_tokens=2 ** 30, batch_tokens=2 ** 30)):
        assert main(arguments(corpus, tmp_path, **change)) == 1
        assert re.search(r"this run needs at least [\d,]{15,} bytes of memory and there are [\d,]+; choose a smaller", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_memory_of_a_plan_is_a_lower_bound():
    """Parameters of deep models are counted exactly; no track is refused on the machines that it is for, rows of 65,536 tokens included."""
    shallow, deep = (make_config({**TINY, "layers": layers}) for layers in (8, 24))
    parameters = [train_gpt.measure_model(config)["parameters"] for config in (shallow, deep)]
    needed = [train_gpt.memory_needed(config, torch.float32) for config in (shallow, deep)]
    assert needed[1] - needed[0] == 28 * (parameters[1] - parameters[0]) + 16 * TINY["micro_batch_tokens"] * TINY["model_dim"] * 4
    for track, gigabytes in dict(cpu=4, small=8, exodus18m=24, long=40, short=80, medium=80, benchmark=80).items():
        config = make_config(dict(track=track, vocab_size=50257))
        assert 10 ** 7 < train_gpt.memory_needed(config, torch.bfloat16) < 0.8 * gigabytes * 2 ** 30


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_bit_identical(corpus, tmp_path, monkeypatch, capsys, stop):
    assert main(arguments(corpus, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        stopped_at(stop, patch)
        assert main(arguments(corpus, tmp_path / "parts")) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {stop}; continue with --resume" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path / "parts/run.pt")]) == 0
    whole, parts = (train_gpt.read_checkpoint(str(tmp_path / name / "run.pt")) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    for a, b in zip(whole["optimizers"], parts["optimizers"]):
        assert a["steps"] == b["steps"] == 8 and all(torch.equal(a["state"][key][n], b["state"][key][n]) for key in a["state"] for n in a["state"][key])
    assert [p["val_loss"] for p in whole["curve"]] == [p["val_loss"] for p in parts["curve"]]
    text = (tmp_path / "parts/run.txt").read_text()
    assert [int(n) for n in re.findall(r"^step:(\d+)/8 train_time", text, re.M)] == list(range(1, 9)) and f"resumed from {tmp_path}/parts/run.pt at step {stop}" in text


def test_kept_checkpoints(corpus, tmp_path):
    assert main(arguments(corpus, tmp_path, keep_every=3)) == 0
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["run-step000000.pt", "run-step000003.pt", "run-step000006.pt", "run.pt"]
    whole = train_gpt.read_checkpoint(str(tmp_path / "run.pt"))
    assert main(["--resume", str(tmp_path / "run-step000003.pt"), "--keep_every", "0"]) == 0
    again = train_gpt.read_checkpoint(str(tmp_path / "run.pt"))
    assert whole["step"] == again["step"] == 8 and all(torch.equal(whole["model"][name], again["model"][name]) for name in whole["model"])


def test_resume_keeps_its_settings(corpus, tmp_path):
    assert main(arguments(corpus, tmp_path)) == 0
    with pytest.raises(RunError, match="--lr_matrix 0.5 differs from the checkpoint's 0.03: a resumed run keeps its settings"):
        train_gpt.parse_config(["--resume", str(tmp_path / "run.pt"), "--lr_matrix", "0.5"])


def test_a_checkpoint_that_does_not_fit_is_one_line(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path)) == 0
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    for change in (lambda: saved["optimizers"][0].pop("state"), lambda: saved["model"].pop("embedding.weight")):
        change()
        train_gpt.write_checkpoint(tmp_path / "other.pt", {name: value for name, value in saved.items() if name not in ("format", "digest")})
        capsys.readouterr()
        assert main(["--resume", str(tmp_path / "other.pt")]) == 1
        error = capsys.readouterr().err
        assert "other.pt holds another model than this configuration builds, or is of an older trainer: " in error and error.count("\n") == 1


def test_warm_up_leaves_no_trace(corpus, tmp_path):
    trainer = Trainer(train_gpt.parse_config(arguments(corpus, tmp_path)))
    trainer.model.register_buffer("calls", torch.zeros(()))  # a variant's running state
    trainer.model.register_forward_hook(lambda model, *_: model.calls.add_(1) and None)
    before, rng = {n: t.clone() for n, t in trainer.model.state_dict().items()}, torch.get_rng_state()
    trainer.warm_up()
    assert all(torch.equal(before[n], t) for n, t in trainer.model.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    for optimizer in trainer.optimizers:
        assert optimizer.steps == 0 and all(t.abs().sum() == 0 for bucket in optimizer.buckets for t in (*bucket.state.values(), bucket.grad))


def test_init_from_lists_what_it_took(corpus, tmp_path, capsys):
    assert main(arguments(corpus, tmp_path / "a")) == 0
    capsys.readouterr()
    assert main(arguments(corpus, tmp_path / "b", init_from=tmp_path / "a/run.pt", mlp_hidden=48, bigram_rows=0)) == 0
    out = capsys.readouterr().out
    assert "tensors loaded: blocks.0.attention.gate.weight" in out and "8 tensors new: blocks.0.mlp.fc.weight, blocks.0.mlp.proj.weight" in out
    assert re.search(r"9 tensors unused: bigram_embedding.weight, blocks.0.mlp.fc.weight", out)
    start = float(re.search(r"step:0/8 val_loss:(\S+)", out)[1])
    assert start < math.log(257) - 0.2  # it begins where the other ended, not at ln V


def test_a_killed_run_leaves_a_readable_log_and_a_loadable_checkpoint(corpus, tmp_path):
    process, log, checkpoint = start(corpus, tmp_path, steps=100_000, val_every=0, checkpoint_seconds=0.01), tmp_path / "run.txt", tmp_path / "run.pt"
    deadline = time.time() + 90
    while time.time() < deadline and not (checkpoint.exists() and len(re.findall("^step:", log.read_text(), re.M)) > 10):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved, lines = train_gpt.read_checkpoint(str(checkpoint)), log.read_text().splitlines()
    assert saved["step"] >= 1 and re.match(r"step:\d+/100000 |train_loss:", lines[-1] if log.read_text().endswith("\n") else lines[-2])
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(corpus, tmp_path, number):
    process, log = start(corpus, tmp_path, steps=100_000), tmp_path / "run.txt"
    deadline = time.time() + 90
    while time.time() < deadline and not (log.exists() and re.search("^step:3/", log.read_text(), re.M)):
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == ""
    step = int(re.search(rf"stopped by {signal.Signals(number).name} after step (\d+); continue with --resume", out)[1])
    assert train_gpt.read_checkpoint(str(tmp_path / "run.pt"))["step"] == step
    assert json.loads((tmp_path / "run.json").read_text())["status"].startswith("stopped by SIG")


RANKS_RUN = """
import os, sys, train_gpt
reduced, updated, inside = [], [], [False]
reduce, update, backward = train_gpt.Bucket._reduce, train_gpt.ShardedOptimizer.update_bucket, train_gpt.Tensor.backward
def watched_reduce(self):
    reduced.append(self.missing == 0 and inside[0])
    reduce(self)
def watched_update(self, bucket, *progress):
    updated.append((id(bucket), inside[0]))
    update(self, bucket, *progress)
def watched_backward(self):
    inside[0] = True
    backward(self)
    inside[0] = False
train_gpt.Bucket._reduce, train_gpt.ShardedOptimizer.update_bucket, train_gpt.Tensor.backward = watched_reduce, watched_update, watched_backward
code = train_gpt.main(sys.argv[1:])
buckets, late = len({bucket for bucket, _ in updated}), sum(not early for _, early in updated)
if os.environ.get("WORLD_SIZE", "1") != "1":
    assert reduced and all(reduced), "a reduction began after the backward pass"
    assert late * buckets == len(updated), f"of {len(updated)} updates of {buckets} buckets {late} came after the backward pass, not one a step"
else:
    assert late == len(updated) and not reduced
train_gpt.leave(code, alone=os.environ.get("WORLD_SIZE", "1") == "1")
"""


def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(corpus, tmp_path):
    """1, 2 and 4 processes; with several, every reduction, and every update but one, begins inside the backward pass; a checkpoint of 4 ranks goes on with 1."""
    (tmp_path / "ranks.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + RANKS_RUN)
    curves = {}
    for world in (1, 2, 4):
        command = [sys.executable] if world == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([*command, str(tmp_path / "ranks.py"), *arguments(corpus, tmp_path / str(world), val_every=2)], capture_output=True, text=True, env=environment, timeout=200)
        assert result.returncode == 0, result.stderr[-3000:]
        curves[world] = [(p["step"], p["val_loss"]) for p in json.loads((tmp_path / str(world) / "run.json").read_text())["curve"]]
    assert [step for step, _ in curves[1]] == [0, 2, 4, 6, 8]
    for world in (2, 4):
        for (_, ours), (_, alone) in zip(curves[world], curves[1]):
            assert ours == pytest.approx(alone, rel=2e-5)
    one, four = (train_gpt.read_checkpoint(str(tmp_path / name / "run.pt")) for name in "14")
    assert one["loader"] == four["loader"]
    trainer = Trainer(train_gpt.parse_config(["--resume", str(tmp_path / "4/run.pt")]))  # state gathered from four slices fits one
    for optimizer, saved in zip(trainer.optimizers, one["optimizers"]):
        state = optimizer.state_dict()["state"]
        assert state.keys() == saved["state"].keys()
        for key, tensors in state.items():
            assert tensors.keys() == saved["state"][key].keys()
            for name, tensor in tensors.items():
                assert (tensor - saved["state"][key][name]).norm() <= 0.05 * saved["state"][key][name].norm() + 1e-9


# ---- faults: one line each

@pytest.mark.parametrize("given,message", [
    (["--track", "fast"], "unknown track 'fast'; the tracks are cpu, small"),
    (["--batch_tokens", "100"], "--batch_tokens 100 is not a multiple of --sequence_length 32"),
    (["--layers", "0"], "--layers must be from 1 to 1,024, got 0"),
    (["--compile", "maybe"], "--compile must be one of auto, model, blocks, off; got 'maybe'"),
    (["--window_pattern", "SX"], "--window_pattern takes letters S and L"),
    (["--window_short", "1,2,3"], "equally many stages"),
    (["--head_dim", "6"], "not a multiple of 4"),
    (["--heads", "1"], "value embeddings need heads x head_dim = model_dim, got 1 x 16 and 32"),
    (["--data", "nowhere"], r"no train shards \(\*_train_\*.bin\) in nowhere; ./run.sh prepares"),
    (["--vocab_size", "100"], "token 256 in .* is outside the vocabulary of 100; give --vocab_size"),
    (["--sequence_length", "100000", "--batch_tokens", "100000"], "do not fill a row of 100001; lower --sequence_length or add data"),
    (["--resume", "nothing.pt"], "there is no checkpoint nothing.pt"),
    (["--init_from", "README.md"], "README.md is not a whole checkpoint of this trainer"),
    (["--lr_embed", "10000", "--lr_matrix", "10000", "--steps", "60"], "loss is (nan|inf) at step"),
    (["--device", "cuda"], "PyTorch sees no CUDA device; use --device cpu"),
    (["--log_dir", "/dev/null/logs"], "cannot write /dev/null/logs/run.txt: Not a directory; choose another --log_dir"),
])
def test_each_fault_gives_one_line(corpus, tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.chdir(ROOT)
    if given[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if given[0] == "--init_from":
        (tmp_path / "README.md").write_text("no checkpoint")
        given = ["--init_from", str(tmp_path / "README.md")]
    base = ["--data", str(corpus)] if given[0] == "--track" else arguments(corpus, tmp_path)
    base = [] if given[0] == "--resume" else base
    assert main([*base, *given]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("train_gpt.py: error: ") and errors.count("\n") == 1 and re.search(message, errors), errors


@pytest.mark.parametrize("damage,message", [("cut", "is truncated or empty: .* bytes, its header promises"), ("foreign", "is no token shard: it begins with"), ("short", "is no token shard")])
def test_damaged_shards(corpus, tmp_path, damage, message):
    for file in corpus.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = tmp_path / "words_train_000001.bin"
    victim.write_bytes(dict(cut=victim.read_bytes()[:-3], foreign=b"\x89PNG" * 1000, short=b"abc")[damage])
    with pytest.raises(RunError, match=message):
        loader(tmp_path)


def test_a_full_disk_keeps_the_log_and_the_checkpoint_before(corpus, tmp_path, monkeypatch, capsys):
    """The disk fills up at the tenth file: the run ends with one line, its log has all steps, its last checkpoint is whole, nothing half stays."""
    real, calls = os.fsync, []

    def fill(descriptor):
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(descriptor)
    monkeypatch.setattr(os, "fsync", fill)
    assert main(arguments(corpus, tmp_path, checkpoint_seconds=0)) == 1
    captured = capsys.readouterr()
    assert re.fullmatch(r"train_gpt.py: error: cannot write .*run\.(pt|json): No space left on device; free some space or choose another folder\n", captured.err)
    step = train_gpt.read_checkpoint(tmp_path / "run.pt")["step"]
    assert step >= 1 and not list(tmp_path.glob(".run*"))
    assert f"step:{step}/8 train_time" in (tmp_path / "run.txt").read_text()


def test_a_checkpoint_is_never_executed(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"format": "knotgpt-1", "model": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(RunError, match="is not a whole checkpoint of this trainer"):
            train_gpt.read_checkpoint(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_a_world_that_does_not_divide_is_one_line(corpus, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(ROOT / "train_gpt.py"), *arguments(corpus, tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode != 0
    assert result.stderr.count("train_gpt.py: error: 8 rows of 32 tokens cannot be shared by 3 ranks; change --batch_tokens or the number of ranks") == 1


# ---- on a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_on_a_gpu(window):
    """Compiled FlexAttention in bf16, forward and backward, against the float64 form on the same rounded inputs."""
    generator, T = torch.Generator().manual_seed(0), 512
    q, k, v, grad = (torch.randn(2, T, 3, 64, generator=generator).bfloat16() for _ in range(4))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.01, index, 0).cummax(1).values
    first_key = torch.maximum(starts, index - (window or T) + 1).int()

    def run(q, k, v):
        mask = AttentionMask(starts.int().cuda(), None, window, first_key.cuda(), train_gpt.interval_block_mask(first_key.cuda()))
        return attend(q, k, v, mask, 0.125)
    ours = [t.cuda().requires_grad_() for t in (q, k, v)]
    theirs = [t.double().requires_grad_() for t in (q, k, v)]
    y = torch.compile(run, fullgraph=True, dynamic=False)(*ours)
    y.backward(grad.cuda())
    i, j = index[:, None], index[None, :]
    scores = torch.einsum("bihd,bjhd->bhij", theirs[0], theirs[1]) * 0.125
    scores = scores.masked_fill(~((j <= i) & (j >= first_key[:, :, None]))[:, None], -math.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), theirs[2])
    expected.backward(grad.double())
    for a, b in [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs))]:
        assert ((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()).item() < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["model", "blocks", "off"])
def test_a_run_on_a_gpu(corpus, tmp_path, mode):
    """bf16, compiled or not, follows the float32 run on the CPU; a stopped run goes on."""
    settings = dict(sequence_length=128, batch_tokens=2048, micro_batch_tokens=1024, steps=12, val_every=6, val_tokens=1280, window_short=(20, 30), window_long=(0, 100))
    assert main(arguments(corpus, tmp_path / "cpu", **settings)) == 0
    assert main(arguments(corpus, tmp_path / "gpu", **settings, device="cuda", compile=mode)) == 0
    curves = [[p["val_loss"] for p in json.loads((tmp_path / name / "run.json").read_text())["curve"]] for name in ("cpu", "gpu")]
    assert curves[1] == pytest.approx(curves[0], rel=0.02) and curves[1][-1] < curves[1][0] - 0.5
    assert json.loads((tmp_path / "gpu/run.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["model", "blocks", "off"])
def test_a_step_does_not_wait_for_the_gpu(corpus, tmp_path, mode):
    settings = dict(sequence_length=128, batch_tokens=2048, micro_batch_tokens=1024, window_short=(20,), window_long=(0,), device="cuda", compile=mode)
    trainer = train_gpt.Trainer(train_gpt.parse_config(arguments(corpus, tmp_path, **settings)))
    train_gpt.compile_model(trainer.model, mode)
    rows = trainer.loader.next_batch()[0].cuda()
    for _ in range(2):
        trainer.train_step(rows, 0.5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.train_step(rows, 0.6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
