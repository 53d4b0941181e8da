"""The trainer: model, loss, masks, optimizers, loader, checkpoints, faults. Small models, byte vocabulary, CPU."""

import base64
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
import variants
from data.shards import write_meta, write_shard
from tests.children import exit_code_of, in_a_child
from tests.errors import float_bound, relative_rms
from tests.loading import load_file
from tests.ranks import run_ranks
from train_gpt import (
    AttentionMask,
    Ranks,
    RunError,
    SoftcappedCrossEntropy,
    TokenLoader,
    Trainer,
    attend,
    main,
    make_config,
    orthogonalize,
)

ROOT = Path(train_gpt.__file__).resolve().parent
END = 256
TINY = dict(
    vocab_size=257, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=32, batch_tokens=256,
    micro_batch_tokens=64, steps=8, val_tokens=640, val_every=4, bigram_rows=100, window_pattern="SL",
    window_short=(8, 6), window_long=(0, 20), compile="off", device="cpu",
)
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
    """
    How far two ways to the same logits may differ: in every layer a chain of sums over the keys, the channels and the
    hidden channels.
    """
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
    words = [np.append(rng.integers(97, 123, rng.integers(2, 7)), 32) for _ in range(30)]

    def documents(count):
        texts = [[words[i] for i in rng.integers(0, 30, rng.integers(5, 60))] for _ in range(count)]
        return np.concatenate([token for text in texts for token in ([END], *text)])

    for number, count in enumerate((9, 14, 11)):
        write_shard(folder / f"words_train_{number:06d}.bin", documents(count))
    write_shard(folder / "words_val_000000.bin", documents(12))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


def arguments(corpus, folder, **changes):
    """The command line of a run in this folder."""
    settings = {**TINY, "data": corpus, "log_dir": folder, "run_id": "run", **changes}
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def facts_of(folder, run_id="run") -> dict:
    """The JSON of a run."""
    return json.loads((folder / f"{run_id}.json").read_text())


def checkpoint_of(folder, run_id="run") -> dict:
    return train_gpt.read_checkpoint(folder / f"{run_id}.pt")


def run(corpus, folder, **changes) -> dict:
    """The JSON of a run that ends well."""
    assert main(arguments(corpus, folder, **changes)) == 0
    return facts_of(folder, changes.get("run_id", "run"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The folder of one finished run, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    run(corpus, folder)
    return folder


def assert_same_tensors(one: dict, other: dict):
    """Equal tensors under equal names."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---- The file ---------------------------------------------------------------


def test_import_does_nothing_and_loads_little(tmp_path):
    """
    No output, no file, no process group; of the slow packages only PyTorch and NumPy, whose compilers stay unloaded.
    """
    check = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; before = set(sys.modules); import train_gpt
slow = ("torch._dynamo", "torch._inductor", "triton", "scipy", "matplotlib", "tiktoken", "huggingface_hub", "pyarrow",
        "numba", "variants", "kernels", "records")
assert not train_gpt.dist.is_initialized()
assert not [name for name in set(sys.modules) - before if name.startswith(slow)], sorted(set(sys.modules) - before)"""
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert (result.stdout, result.stderr, list(tmp_path.iterdir())) == ("", "", [])


def test_waiting_threads_spin_a_bounded_time_unless_the_user_chose(monkeypatch):
    """Set before torch loads its OpenMP; GNU's own report of its settings shows that the library read it."""
    names = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"
    check = (f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import train_gpt\n"
             "print(os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME'])")
    plain = {name: value for name, value in os.environ.items() if name not in names} | dict(OMP_DISPLAY_ENV="verbose")
    result = subprocess.run([sys.executable, "-c", check], env=plain, capture_output=True, text=True)
    assert result.stdout == "20000 1\n"
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr) in (["20000"], [])  # []: another library than GNU's

    # the same source, as imported where the user has chosen
    for name, value in dict(GOMP_SPINCOUNT="7", OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0").items():
        for other in names:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        load_file(train_gpt.__file__, monkeypatch)
        assert {other: os.environ[other] for other in names if other in os.environ} == {name: value}


def test_scripts_load_the_trainer_before_pytorch():
    """
    PyTorch's OpenMP reads the bounded spin once, when it is loaded; so a file of the project comes before it in the
    imports of every script, or of the package that a script is run from.
    """
    folders = ("benchmarks", "data", "records", "studies", "tasks", "variants")
    project = {file.stem for file in ROOT.glob("*.py")} | set(folders)
    scripts = [file for file in sorted(ROOT.glob("*.py")) if file.name != "train_gpt.py"]
    for package in (ROOT / folder for folder in folders):
        text = (package / "__init__.py").read_text(encoding="utf-8")
        first = re.findall(r"^(?:from|import) (train_gpt|benchmarks|torch)\b", text, re.M)
        if first[:1] not in (["train_gpt"], ["benchmarks"]):
            scripts += sorted(package.glob("*.py"))
    wrong = []
    for file in scripts:
        imports = re.findall(r"^(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.M)
        loading = [name for name in imports if name in project | {"torch", "kernels"}]
        if "torch" in loading and loading[0] not in project:
            wrong.append(str(file.relative_to(ROOT)))
    assert len(scripts) >= 3 and not wrong


def test_every_option_is_explained_in_its_group_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as end:
        train_gpt.parse_config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    groups = re.split(r"^(what to train|data|model|optimizer|run):$", text, flags=re.M)[1:]
    groups = dict(zip(groups[::2], groups[1::2]))
    assert len(groups) == 5
    for field in train_gpt.dataclasses.fields(train_gpt.Config):
        explained = [re.search(rf"^  --{field.name}\b.*\n?.*[a-z]", options, re.M) for options in groups.values()]
        assert sum(map(bool, explained)) == 1, field.name
    assert re.search(r"--lr_head .* Adam's, for the head \(default: 0.016\)", groups["optimizer"])
    assert "(default: True)" in groups["model"]


@pytest.mark.parametrize("track", train_gpt.TRACKS)
def test_tracks_are_consistent(track):
    config = make_config(dict(track=track, vocab_size=50257))
    assert config.heads * config.head_dim == config.model_dim and config.steps >= 1
    assert config.micro_batch_tokens % config.sequence_length == 0
    with torch.device("meta"):
        parameters = sum(p.numel() for p in train_gpt.GPT(config).parameters())
    millions = dict(cpu=(0.5, 40), english_cpu=(7, 8), small=(28, 36), exodus18m=(17.5, 18.5), long=(28, 36),
                    short=(124, 360), medium=(300, 600), benchmark=(124, 170), golf=(42, 43), golf_cpu=(0.6, 6))
    least, most = millions[track]
    assert least * 1e6 < parameters < most * 1e6


# ---- Model ------------------------------------------------------------------


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


@pytest.mark.parametrize("position", [5, 12, 19, 20])
def test_another_document_changes_nothing(position):
    model, config = tiny_model()
    wake(model)
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tokens[0, [0, 12, 21]] = END  # documents 0..11, 12..20, 21..31
    changed = tokens.clone()
    changed[0, position if position != 12 else 11] = 7
    unchanged = slice(0, 12) if position in (19, 20) else slice(12, 32)
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    bound = logit_bound(config, before)
    torch.testing.assert_close(before[:, unchanged], after[:, unchanged], rtol=0, atol=bound)
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
    bare = dict(x0_skip=False, unet_skips=False, smear=False, attention_gate=False, value_embeddings=0, bigram_rows=0)
    for changes in ({}, dict(tied_embedding=True), dict(rope="full"), bare, dict(kv_heads=1, channel_scales=True)):
        model = wake(tiny_model(**changes)[0])
        tokens = rows_of_documents(8, 33)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


SWITCHES = dict(
    qk_norm=False, zero_init_projections=False, tied_embedding=True, x0_skip=False, unet_skips=False, smear=False,
    attention_gate=False, document_mask=False, value_embeddings=0, bigram_rows=0, logit_softcap=0.0, rope="none",
    window_pattern="L",
)


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_feature_is_behind_a_switch(switch):
    """Turned, each changes what the awake model computes or holds."""
    tokens = rows_of_documents(2, 32)
    base, other = tiny_model()[0], tiny_model(**{switch: SWITCHES[switch]})[0]
    if dict(base.named_parameters()).keys() != dict(other.named_parameters()).keys():
        return
    if switch == "zero_init_projections":
        assert base.blocks[0].mlp.proj.weight.abs().sum() == 0 < other.blocks[0].mlp.proj.weight.abs().sum()
        return
    with torch.no_grad():
        assert (wake(base)(tokens) - wake(other)(tokens)).abs().max() > 1e-4


def test_equal_names_begin_equal():
    base, other = tiny_model()[0].state_dict(), tiny_model(bigram_rows=0, layers=2, smear=False)[0].state_dict()
    for name in ("embedding.weight", "blocks.1.attention.q.weight", "blocks.0.mlp.fc.weight"):
        assert torch.equal(base[name], other[name])
    assert not torch.equal(base["blocks.0.attention.q.weight"], base["blocks.0.attention.k.weight"])
    assert not torch.equal(base["embedding.weight"], tiny_model(seed=2)[0].state_dict()["embedding.weight"])


def test_normalisation_activation_and_rotation():
    normalize, square = train_gpt.RMSNormalize.apply, train_gpt.ReLUSquared.apply
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(normalize(x), F.rms_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(square(x), F.relu(x).square())
    assert torch.autograd.gradcheck(normalize, x) and torch.autograd.gradcheck(square, x)
    half = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(normalize(half), F.rms_norm(half, (8,), eps=1e-6), rtol=1e-2, atol=1e-2)

    # the first pairs turn, by cosine and sine in float32; the others stay
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.3])
    turned = train_gpt.rotate(x, (angles.cos(), angles.sin()))
    turn = torch.polar(torch.ones(5, 2), -angles)[:, None].to(torch.complex128)
    expected = torch.complex(x[..., :2], x[..., 4:6]) * turn
    for ours, theirs in ((turned[..., :2], expected.real), (turned[..., 4:6], expected.imag)):
        assert relative_rms(ours, theirs) < float_bound(2, torch.float32)
    assert torch.equal(turned[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]])


# ---- Attention and its masks ------------------------------------------------


def reference_attention(q, k, v, first_key, scale):
    T = q.shape[1]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    allowed = (j <= i) & (j >= first_key[:, :, None])
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale
    weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v.double()).float()


@pytest.mark.parametrize(
    "T,window", [(1, None), (63, None), (63, 1), (300, 7), (300, 130), (1100, None), (1100, 200)])
def test_attention_sees_exactly_its_keys(T, window):
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, T, 2, 8, generator=generator) for _ in range(3))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.02, index, 0).cummax(1).values
    first_key = torch.maximum(starts, index - (window or T) + 1).int()
    stretches = train_gpt.mask_stretches(first_key, window, torch.float32)
    mask = AttentionMask(starts.int(), (index - starts).int(), window, first_key, stretches=stretches)
    expected = reference_attention(q, k, v, first_key, 0.3)
    assert relative_rms(attend(q, k, v, mask, 0.3), expected) < float_bound(T + 8, torch.float32)


@pytest.mark.parametrize("masked", ("not at all", "by stretches", "by blocks"))
def test_grouped_queries_are_those_of_repeated_keys(masked):
    """Heads of queries that share a key, against a copy of the key for each of them; gradients too."""
    generator, T = torch.Generator().manual_seed(0), 256
    tensors = [torch.randn(2, T, heads, 8, generator=generator) for heads in (6, 2, 2)]
    index = torch.arange(T)
    first_key = (index - 100).clamp_min(0).int().expand(2, -1)
    mask = AttentionMask(first_key * 0, first_key, None, None)
    if masked == "by stretches":
        mask = AttentionMask(first_key * 0, first_key, 101, first_key)
        mask.stretches = train_gpt.mask_stretches(first_key, 101, torch.float32)
    if masked == "by blocks":
        mask = AttentionMask(first_key * 0, first_key, 101, first_key)
        mask.block_mask = train_gpt.interval_block_mask(first_key)

    # FlexAttention takes no tensors with gradients on a CPU
    has_gradients = masked != "by blocks"
    q, k, v = (tensor.requires_grad_(has_gradients) for tensor in tensors)
    grouped = attend(q, k, v, mask, 0.3)
    repeated = attend(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), mask, 0.3)
    assert relative_rms(grouped, repeated) < float_bound(T + 8, torch.float32)
    if has_gradients:
        gradients = [torch.autograd.grad(y.square().sum(), tensors) for y in (grouped, repeated)]
        for got, expected in zip(*gradients):
            assert relative_rms(got, expected) < 4 * float_bound(T + 8, torch.float32)


def test_scales_by_channel_begin_as_factors_of_one():
    """With channel_scales a model is one with scalars of the same values; its queries begin 1.5 times as long."""
    fine, plain = tiny_model(channel_scales=True)[0], tiny_model()[0]
    shapes = {name: p.shape for name, p in fine.named_parameters()}
    assert shapes["blocks.0.stream_mix"] == (2, 32) and shapes["skip_weights"] == (2, 32)
    assert shapes["blocks.1.mlp_residual.scale"] == (32,) and shapes["blocks.1.attention.query_gain"] == (2,)
    for block in fine.blocks:
        assert (block.attention.query_gain == 1.5).all() and (block.attention_residual.scale == 1).all()
        assert block.stream_mix.optimizer == "adam"
        block.attention.query_gain.data.fill_(1.0)
    fine.skip_weights.data.fill_(0.2)
    for name, p in plain.named_parameters():
        if p.shape == shapes[name]:
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
            fine.get_parameter(name).data.copy_(p.data)
    tokens = rows_of_documents(2, 32)
    with torch.no_grad():
        expected = plain(tokens)
        assert relative_rms(fine(tokens), expected) < 100 * float_bound(64, torch.float32)


def test_block_mask_is_the_same_rule():
    from torch.nn.attention.flex_attention import flex_attention

    generator, T = torch.Generator().manual_seed(0), 512
    q, k, v = (torch.randn(2, 2, T, 16, generator=generator) for _ in range(3))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.004, index, 0).cummax(1).values
    for window in (1, 100, 128, 129, 300, T):
        first_key = torch.maximum(starts, index - window + 1).int()
        mask = train_gpt.interval_block_mask(first_key)
        allowed = (index[None, :] <= index[:, None]) & (index >= first_key[:, :, None])
        blocks = allowed.view(2, 4, 128, 4, 128)
        assert torch.equal(mask.to_dense()[:, 0].bool(), blocks.any(4).any(2)), window
        assert torch.equal(mask.full_kv_num_blocks[:, 0].long(), blocks.all(4).all(2).sum(-1)), window
        expected = reference_attention(*(t.transpose(1, 2) for t in (q, k, v)), first_key, 0.25).transpose(1, 2)
        result = flex_attention(q, k, v, block_mask=mask, scale=0.25)
        assert relative_rms(result, expected) < float_bound(T + 16, torch.float32)


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


@pytest.mark.parametrize("track", ["exodus18m", "short", "benchmark", *(
    pytest.param(track, marks=pytest.mark.slow) for track in ("small", "long", "medium"))])
def test_gpu_tracks_compile_without_a_graph_break(track, monkeypatch):
    """
    The GPU's path, FlexAttention and block mask included, traced on CPU tensors; depth, width, vocabulary and length
    reduced: a first layer, one between, a last one.
    """
    config = make_config(dict(
        track=track, vocab_size=400, layers=3, model_dim=64, heads=2, head_dim=32, mlp_hidden=128, sequence_length=256,
        batch_tokens=256, bigram_rows=min(train_gpt.TRACKS[track].get("bigram_rows", 0), 50), loss_chunk=100,
    ))
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
    """
    Counted graphs over window stages and batches, on the GPU's path (without gradients: FlexAttention has none on a
    CPU).
    """
    compile_, graphs = torch.compile, []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def compile_module(self, **settings):
        self._compiled_call_impl = compile_(self._call_impl, backend=backend, **settings)

    monkeypatch.setattr(torch, "compile", lambda f, **settings: compile_(f, backend=backend, **settings))
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
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
    # blocks: the first, whose stream is x0 itself; with and without value embedding; the head
    assert seen[-1] == seen[0] == dict(model=1, blocks=4)[mode]
    torch._dynamo.reset()


# ---- Loss -------------------------------------------------------------------


@pytest.mark.parametrize("softcap,chunk", [(0.0, 7), (15.0, 7), (15.0, 1000), (2.0, 50)])
def test_chunked_loss_and_its_gradients(softcap, chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator, requires_grad=True)
    weight = torch.randn(33, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 33, (50,), generator=generator)
    (3 * SoftcappedCrossEntropy.apply(x, weight, targets, softcap, chunk)).backward()

    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = x64 @ w64.T
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(capped, targets, reduction="sum")
    (3 * expected).backward()

    # sums over the 16 channels, the 33 words and the 50 tokens; a logit's error is that of its channels times its size,
    # or the cap
    largest = max(logits.detach().abs().max().item(), softcap)
    bound = float_bound(16 + 33 + 50, torch.float32) + largest * torch.finfo(torch.float32).eps
    loss = SoftcappedCrossEntropy.apply(x, weight, targets, softcap, chunk)
    assert abs(loss.item() / expected.item() - 1) < bound
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
    bound = logit_bound(config, logits) + float_bound(64 + 264, torch.float32) * expected.item()
    for ours in (loss, with_gradient):
        assert abs(ours.item() - expected.item()) < bound


# ---- Optimizers -------------------------------------------------------------


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
    betas = config.adam_beta1, config.adam_beta2
    theirs = torch.optim.Adam(reference.parameters(), lr=0.01, betas=betas, eps=1e-10)
    x = torch.randn(64, 7)
    for _ in range(10):
        for network in (model, reference):
            network(x).square().mean().backward()
        for optimizer in ours:
            optimizer.step(1.0, 0.5)
        theirs.step()
        theirs.zero_grad()

    # ten updates of at most 0.01, each of a quotient of sums of 64 products whose sums have 7 and 5 terms
    rtol = 10 * torch.finfo(torch.float32).eps
    atol = 10 * 0.01 * float_bound(10 * (64 + 12), torch.float32)
    for result, exact in ((model.weight, reference.weight), (model.bias, reference.bias)):
        torch.testing.assert_close(result, exact, rtol=rtol, atol=atol)


class Odd(torch.nn.Module):
    """A model with a batch of matrices among its parameters, which has rates of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.stack = torch.nn.Parameter(torch.randn(3, 8, 4))
        self.stack.optimizer = "muon"
        self.stack.lr_mul = 2.0
        self.stack.wd_mul = 0.0


def test_parameters_choose_their_optimizer():
    model, config = Odd(), make_config(TINY)
    muon, adam = train_gpt.build_optimizers(model, config, ALONE)
    assert sorted(tuple(bucket.data.shape) for bucket in muon.buckets) == [(1, 8, 8), (3, 8, 4)]
    assert [tuple(bucket.data.shape) for bucket in adam.buckets] == [(64,)]
    stack = next(bucket for bucket in muon.buckets if bucket.data.shape == (3, 8, 4))
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
    half = 0.5 * config.weight_decay
    assert set(decays) == {0.0, half} and [p is model.blocks[0].stream_mix for p in decays[half]] == [True]


def test_weight_decay_is_cautious():
    data, gradient = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 1.0]]])
    plain, decayed = data.clone(), data.clone()
    for target, decay in ((plain, 0.0), (decayed, 0.1)):
        state = torch.zeros(1, 1, 2), torch.zeros(1, 1, 1)
        rates = torch.tensor(0.01), torch.tensor(decay), torch.tensor(0.9)
        train_gpt.Muon.update(target, gradient.clone(), *state, *rates, 0.0)
    difference = plain - decayed
    assert difference[0, 0, 0] > 0.09 and difference[0, 0, 1] == 0  # only where update and weight agree in sign


# ---- Data -------------------------------------------------------------------


def loader(corpus, rank=0, world=1, **changes):
    return TokenLoader(make_config({**TINY, "data": str(corpus), **changes}), rank, world)


def batches(source, count):
    return [source.next_batch()[0] for _ in range(count)]


def test_loader_is_deterministic_and_seeded(corpus):
    first, second, other = (torch.stack(batches(loader(corpus, seed=seed), 12)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_loader_rows_are_pieces_of_the_shards_and_cover_them(corpus):
    shards = [np.array(train_gpt.open_shard(file)) for file in sorted(corpus.glob("*train*"))]
    source, T = loader(corpus), 32
    assert len(source.starts) > 1
    rows_seen = []
    for rows, state in (source.next_batch() for _ in range(40)):
        rows_seen += [row.numpy() for row in rows]
        if state["epoch"] >= 1:
            break
    assert state["epoch"] == 1
    windows = [np.lib.stride_tricks.sliding_window_view(shard, T + 1) for shard in shards]
    counts = [0, 0, 0]
    for row in rows_seen:
        holders = [number for number, view in enumerate(windows) if (view == row).all(1).any()]
        assert holders, "a row that is in no shard"
        counts[holders[0]] += 1
    for count, shard in zip(counts, shards):  # each shard gives nearly all its tokens in an epoch
        assert count * T > 0.8 * (len(shard) - 2 * T)


def test_loader_restarts_exactly_across_shards(corpus):
    source = loader(corpus)
    read = [source.next_batch() for _ in range(20)]
    assert {state["shard"] for _, state in read} == {0, 1, 2}
    for stop in (3, 7, 12):
        restarted = loader(corpus)
        restarted.load_state_dict(read[stop][1])
        for rows, _ in read[stop + 1:]:
            assert torch.equal(restarted.next_batch()[0], rows)


def test_ranks_share_the_batch(corpus):
    expected = batches(loader(corpus), 10)
    for world in (2, 4):
        shares = [batches(loader(corpus, rank, world), 10) for rank in range(world)]
        for step, rows in enumerate(expected):
            assert torch.equal(torch.cat([share[step] for share in shares]), rows)
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


def test_validation_scores_every_row_whatever_the_micro_batch(corpus, tmp_path):
    """
    20 rows in batches of 20, 7, 3 and 1: the loss is that of all rows at once, up to the rounding of a mean of float32
    losses.
    """
    trainer = Trainer(train_gpt.parse_config(arguments(corpus, tmp_path)))
    rows = torch.from_numpy(np.concatenate(trainer.val_batches))
    assert len(rows) == 20 and trainer.val_tokens == trainer.log.facts["val_tokens"] == 640
    wake(trainer.model).eval()
    trainer.model.set_windows(1.0)
    with torch.no_grad():
        losses = [trainer.model(row[None, :-1], row[None, 1:]) for row in rows]
    expected = torch.stack(losses).double().mean().item()
    for micro, size in ((640, 20), (224, 7), (96, 3), (32, 1)):
        batches = train_gpt.validation_batches(make_config({**TINY, "data": str(corpus), "micro_batch_tokens": micro}))
        assert len(batches[0]) == size and sum(map(len, batches)) == 20
        assert trainer.validate(batches) == pytest.approx(expected, rel=16 * 32 * 2 ** -24), micro


def write_shards(folder, **tokens):
    """Shards with these names and tokens."""
    for name, content in tokens.items():
        write_shard(folder / f"{name}.bin", np.array(content))


def copy_shards(corpus, folder):
    """The corpus in another folder, to be damaged."""
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def shards_of(folder, split):
    return [file.stem for file in train_gpt.find_shards(make_config({**TINY, "data": str(folder)}), split)]


def test_a_split_stands_between_separators(tmp_path):
    series = dict(medieval_train_000001=[1] * 9, medieval_val_000000=[1] * 9)
    write_shards(tmp_path, **series, trainees=[1], interval=[1], other_val=[1], retrain_val_x=[1])
    assert shards_of(tmp_path, "train") == ["medieval_train_000001"]
    assert shards_of(tmp_path, "val") == ["medieval_val_000000"]
    (tmp_path / "medieval_val_000000.bin").unlink()
    assert shards_of(tmp_path, "val") == ["other_val", "retrain_val_x"]  # as llm.c's small sets are called
    write_shards(tmp_path, train_val_000000=[1])
    fault = "train_val_000000.bin says both train and val, so its split is not known; rename it"
    with pytest.raises(RunError, match=fault):
        shards_of(tmp_path, "train")


def end_of(folder, meta=None, **settings):
    """(vocabulary, id that begins documents) that a run on these shards has; meta: what meta.json holds."""
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta))
    config = make_config({**TINY, "vocab_size": 0, "data": str(folder), **settings})
    train_gpt.adopt_vocabulary(config)
    return config.vocab_size, config.end_of_text


def test_the_data_say_what_begins_a_document(tmp_path):
    write_shards(tmp_path, x_train_000000=[50256] + [5] * 99, x_val_000000=[50256] + [5] * 99)
    assert end_of(tmp_path) == (50257, 50256)
    assert end_of(tmp_path, vocab_size=50304) == (50304, 50256)  # a larger vocabulary only pads
    assert end_of(tmp_path, vocab_size=50304, document_token=5) == (50304, 5)
    assert end_of(tmp_path, dict(vocab_size=100, end_of_text=1, tokenizer="own")) == (100, 1)
    assert end_of(tmp_path, dict(vocab_size=257, tokenizer="bytes")) == (257, 256)  # of before meta.json named it
    assert end_of(tmp_path, dict(vocab_size=257, tokenizer="bytes"), vocab_size=300) == (300, 256)


def test_shards_without_the_token_that_begins_a_document_are_named(corpus, tmp_path, capsys):
    fault = "hold no id 255, which begins a document; give its id by --document_token"
    assert main(arguments(corpus, tmp_path, document_token=255)) == 0
    assert re.search(rf"warning: the first \d[\d,]* training tokens {fault}", capsys.readouterr().out)
    assert main(arguments(corpus, tmp_path, run_id="b", document_token=255, align_documents=True)) == 1
    assert f"{fault}, or --no-align_documents" in capsys.readouterr().err
    assert not (tmp_path / "b.txt").exists()


@pytest.mark.parametrize("content", [
    "[]", "{", '{"tokenizer": "bytes"}', '{"vocab_size": 100000}', '{"vocab_size": "257"}',
    '{"vocab_size": 257, "end_of_text": 257}', '{"vocab_size": 257, "val": 3}',
    '{"vocab_size": 257, "val": {"sha256": [1]}}', "[" * 100_000, "\udcff", '{"vocab_size": NaN}',
])
def test_a_foreign_meta_file_is_one_line_and_a_vocabulary_by_option_goes_round_it(corpus, tmp_path, content):
    copy_shards(corpus, tmp_path)
    (tmp_path / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(RunError, match=r"meta\.json.*give --vocab_size and delete it") as error:
        end_of(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert end_of(tmp_path, vocab_size=257) == (257, 256)


def test_a_shard_that_is_not_the_one_meta_describes_is_refused(corpus, tmp_path, capsys):
    copy_shards(corpus, tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    for split in ("train", "val"):
        sha256 = {file.name: train_gpt.sha256_of_file(file) for file in tmp_path.glob(f"*{split}*.bin")}
        meta[split] = dict(sha256=sha256)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
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
    """
    The name or the sha256 of the validation shard begins with target_data; a target by option is for any data.
    """
    sha256 = train_gpt.sha256_of_file(next(corpus.glob("*val*.bin")))
    reached, unknown = "9.0 nats a token: reached", "none is known for these data"
    cases = {"": (9.0, reached), "words_val": (9.0, reached), sha256[:12]: (9.0, reached),
             "fineweb_val_": (0.0, unknown)}
    for number, (data, (target, text)) in enumerate(cases.items()):
        capsys.readouterr()
        facts = run(corpus, tmp_path, run_id=f"r{number}", steps=1, target=9, target_data=data)
        assert facts["target"] == target and text in capsys.readouterr().out
    assert make_config(dict(track="short")).target_data
    assert not make_config(dict(track="short", target=3.0)).target_data


def test_bits_per_byte(corpus, tmp_path):
    config = make_config({**TINY, "data": str(corpus)})
    assert train_gpt.token_bytes(config).tolist() == [1] * 256 + [0]
    write_shards(tmp_path, x_train_0=[258, 256], x_val_0=[258, 257, 97])
    merges = [bytes([i]) for i in range(256)] + [b"ab", b"abc"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(merges)]
    (tmp_path / "own.tiktoken").write_text("".join(lines))
    sizes = train_gpt.token_bytes(make_config({**TINY, "vocab_size": 259, "data": str(tmp_path)}))
    assert sizes[[97, 256, 257, 258]].tolist() == [1, 2, 3, 0]


# ---- Runs -------------------------------------------------------------------


def test_a_run_learns_and_writes_its_record(corpus, tmp_path, capsys):
    facts, text = run(corpus, tmp_path, steps=60, val_every=30, lr_matrix=0.05), (tmp_path / "run.txt").read_text()

    # the log: sources, header, steps
    source, head, body = text.split("=" * 100 + "\n", 2)
    assert (ROOT / "train_gpt.py").read_text() in source
    assert head.startswith("Running Python ") and "PyTorch " + torch.__version__ in head
    header = json.loads(re.search(r"^facts: (.*)$", head, re.M)[1])
    assert header == {name: facts[name] if name != "status" else "running" for name in header}
    assert header.keys() >= {
        "seed", "config", "git_commit", "val_sha256", "command", "device", "triton", "replaced", "parameters",
        "flops_per_token",
    }
    times = r"train_time:\d+ms step_avg:\d+\.\d\dms$"
    steps = re.findall(rf"^step:(\d+)/60 {times}", body, re.M)
    assert [int(n) for n in steps] == list(range(1, 61))
    losses = [float(x) for x in re.findall(rf"^step:\d+/60 val_loss:(\d+\.\d{{4}}) {times}", body, re.M)]
    assert len(losses) == 3 and abs(losses[0] - math.log(264)) < 1e-3 and losses[2] < 3.2 < losses[0]
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", body.strip().splitlines()[-1])

    # the JSON
    assert facts["status"] == "finished" and [point["step"] for point in facts["curve"]] == [0, 30, 60]
    bits = facts["val_loss"] / math.log(2) / facts["val_bytes_per_token"]
    assert facts["val_bits_per_byte"] == pytest.approx(bits) and 0.9 < facts["val_bytes_per_token"] < 1
    assert facts["tokens_per_second"] > 0 and facts["mfu"] > 0 and facts["peak_memory_mib"] > 0
    assert "MiB" in capsys.readouterr().out


def kept_losses(folder, run_id="run") -> np.ndarray:
    """The losses of single tokens that a run kept."""
    return np.load(folder / f"{run_id}.losses.npz")["losses"]


def test_the_loss_of_every_validation_token_is_kept(corpus, tmp_path):
    facts = run(corpus, tmp_path, steps=20, lr_matrix=0.05)
    losses = kept_losses(tmp_path)
    config = train_gpt.config_from(facts["config"], "the JSON")
    rows = np.concatenate(train_gpt.validation_batches(config))
    assert losses.shape == rows[:, 1:].shape and losses.dtype == np.float16

    # they are the model's, token by token
    saved = checkpoint_of(tmp_path)
    model = train_gpt.trained_model(saved, config, train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32))
    tokens = torch.from_numpy(rows)
    with torch.no_grad():
        logits = model(tokens[:, :-1])
        expected = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None].long())[..., 0].numpy()
    bound = np.spacing(losses).astype(np.float32) + logit_bound(config, logits)
    assert (np.abs(losses.astype(np.float32) - expected) <= bound).all()

    # the validation loss counts the padding of the vocabulary, which these leave out
    padding = math.log(config.padded_vocabulary / config.vocab_size)
    assert -1e-3 < facts["val_loss"] - losses.mean(dtype=np.float64) < padding


@pytest.mark.parametrize("kept, rows", [(0, None), (1, 1), (33, 2)])
def test_so_many_losses_are_kept_as_asked_for(corpus, tmp_path, kept, rows):
    facts = run(corpus, tmp_path, steps=2, keep_losses=kept)
    assert (tmp_path / "run.losses.npz").exists() == bool(kept)
    if kept:
        assert kept_losses(tmp_path).shape == (rows, facts["config"]["sequence_length"])


def test_a_run_is_worth_more_than_the_losses_of_its_tokens(corpus, tmp_path, monkeypatch, capsys):
    """A model without logits, or no memory for them: a warning, and the run has its result."""
    def refuse(trainer, rows):
        raise RuntimeError("not enough memory\nand more")

    monkeypatch.setattr(Trainer, "token_losses", refuse)
    assert run(corpus, tmp_path, steps=2)["status"] == "finished"
    warning = "warning: the losses of single tokens are not kept: RuntimeError: not enough memory"
    assert warning in (tmp_path / "run.txt").read_text() and warning in capsys.readouterr().out
    assert not (tmp_path / "run.losses.npz").exists()


@pytest.mark.parametrize("kv_heads", (0, 1))
def test_flops_by_formula(corpus, kv_heads):
    plain = dict(document_mask=False, window_pattern="L", window_long=(0,), window_short=(0,), attention_gate=False,
                 smear=False, kv_heads=kv_heads)
    config = make_config({**TINY, **plain})
    d, h, T, L, V = 32, 64, 32, 4, config.padded_vocabulary
    kv = config.key_heads * config.head_dim
    products = L * (2 * d * d + 2 * d * kv + 2 * d * h)
    assert train_gpt.flops_per_token(config) == 6 * products + 6 * d * V + 12 * L * d * T


def stop_at(step, monkeypatch, number=signal.SIGTERM):
    """Let this signal come during this step of the next run."""
    original = Trainer.train_step

    def train_step(self, rows, progress):
        loss = original(self, rows, progress)
        if self.clock is not None and self.step + 1 == step:  # in the warm-up the clock stands
            signal.raise_signal(number)
        return loss

    monkeypatch.setattr(Trainer, "train_step", train_step)


def slow_clock(monkeypatch, seconds):
    """A clock that goes on by so much every time that it is read."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * seconds, strftime=time.strftime)
    monkeypatch.setattr(train_gpt, "time", clock)


def test_a_time_budget_ends_the_run_and_its_schedule_follows_the_clock(corpus, tmp_path, monkeypatch):
    seen, original = [], Trainer.train_step

    def train_step(self, rows, progress):
        seen.append(progress)
        return original(self, rows, progress)

    slow_clock(monkeypatch, 0.01)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    facts, text = run(corpus, tmp_path, time_budget=2, val_every=0), (tmp_path / "run.txt").read_text()
    times = [0] + [int(ms) for ms in re.findall(r"^step:\d+/\d+ train_time:(\d+)ms", text, re.M)]
    longest = max(b - a for a, b in zip(times, times[1:]))
    assert 2000 <= 1000 * facts["train_seconds"] <= 2000 + 2 * longest
    timed = seen[-facts["step"]:]
    assert timed == sorted(timed) and timed[0] < 0.1 and timed[-1] < 1 and facts["step"] >= 2
    assert f"step:{facts['step']}/{facts['step']} val_loss" in text
    assert facts["curve"][-1]["tokens"] == facts["step"] * facts["config"]["batch_tokens"]


def test_training_losses_are_in_the_record(corpus, tmp_path, monkeypatch):
    """
    One a tenth of a second: with a clock of 60 ms a reading, at least every second step; the last lines of the log stay
    the peak memory.
    """
    slow_clock(monkeypatch, 0.06)
    curve, text = run(corpus, tmp_path, steps=30, val_every=0)["train_curve"], (tmp_path / "run.txt").read_text()
    lines = re.findall(r"^train_loss:(\S+) of step (\d+)$", text, re.M)
    assert [(int(step), float(loss)) for loss, step in lines] == [(step, round(loss, 4)) for step, loss in curve]
    assert len(curve) >= 15 and curve[0][1] > curve[-1][1] > 1 and text.splitlines()[-1].startswith("peak memory")


def test_a_curve_has_at_least_twelve_points(corpus, tmp_path, capsys):
    for track in train_gpt.TRACKS:
        config = make_config(dict(track=track))
        assert config.steps // config.val_every >= 12
    assert make_config(dict(TINY, val_every=-1, steps=5)).val_every == 1
    assert len(run(corpus, tmp_path, val_every=-1, steps=25)["curve"]) == 14
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["loss", "time", "target", "files", "next"]
    assert "nats a token = " in last[0] and " bits a byte" in last[0] and "--checkpoint run " in last[4]


def test_a_dry_run_says_what_a_run_would_be(corpus, finished, capsys):
    facts, files = facts_of(finished), sorted(finished.iterdir())
    capsys.readouterr()
    assert main([*arguments(corpus, finished, run_id="other", steps=80), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert sorted(finished.iterdir()) == files
    assert (f"{facts['parameters']:,} parameters, {facts['parameters_without_embeddings']:,} of them in blocks; "
            f"{facts['flops_per_token']:,.0f} FLOPs a token") in out
    assert "80 steps of 256 tokens" in out and re.search(r"memory  at least \d+ MiB of [\d,]+", out)
    seconds = int(re.search(r"about (\d+) s of training, as run computed", out)[1])
    assert abs(seconds - 10 * facts["train_seconds"]) <= 0.5  # as many FLOPs a step, ten times the steps


@pytest.mark.parametrize("changes", [
    dict(model_dim=2 ** 17, heads=2 ** 10, head_dim=128, mlp_hidden=2 ** 18),
    dict(micro_batch_tokens=2 ** 30, batch_tokens=2 ** 30),
], ids=["parameters", "streams"])
def test_a_plan_that_does_not_fit_the_memory_is_refused_before_anything_is_allocated(
        corpus, tmp_path, capsys, changes):
    assert main(arguments(corpus, tmp_path, **changes)) == 1
    fault = r"this run needs at least [\d,]{15,} bytes of memory and there are [\d,]+; choose a smaller"
    assert re.search(fault, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_memory_of_a_plan_is_a_lower_bound():
    """
    Parameters are counted exactly, also of a variant that names a late layer; no track is refused on the machines that
    it is for, rows of 65,536 tokens included.
    """
    shallow, deep = (make_config({**TINY, "layers": layers}) for layers in (8, 24))
    parameters = [train_gpt.measure_model(config)["parameters"] for config in (shallow, deep)]
    needed = [train_gpt.memory_needed(config, torch.float32) for config in (shallow, deep)]
    streams = 16 * TINY["micro_batch_tokens"] * TINY["model_dim"] * 4
    assert needed[1] - needed[0] == 28 * (parameters[1] - parameters[0]) + streams
    for track, gigabytes in dict(cpu=4, small=8, exodus18m=24, long=40, short=80, medium=80, benchmark=80).items():
        config = make_config(dict(track=track, vocab_size=50257))
        assert 10 ** 7 < train_gpt.memory_needed(config, torch.bfloat16) < 0.8 * gigabytes * 2 ** 30
    with variants.applied(("depth_recurrence:looped=23",), deep):
        assert train_gpt.memory_needed(deep, torch.float32) > needed[1]


# ---- Checkpoints ------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 5])
def test_resume_is_bit_identical(corpus, tmp_path, finished, monkeypatch, capsys, stop):
    with monkeypatch.context() as patch:
        stop_at(stop, patch)
        assert main(arguments(corpus, tmp_path)) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {stop}; continue with --resume" in capsys.readouterr().out
    assert main(["--resume", str(tmp_path / "run.pt")]) == 0

    through, resumed = checkpoint_of(finished), checkpoint_of(tmp_path)
    assert_same_tensors(through["model"], resumed["model"])
    for one, other in zip(through["optimizers"], resumed["optimizers"], strict=True):
        assert one["steps"] == other["steps"] == 8 and one["state"].keys() == other["state"].keys()
        for name, tensors in one["state"].items():
            assert_same_tensors(tensors, other["state"][name])
    assert [p["val_loss"] for p in through["curve"]] == [p["val_loss"] for p in resumed["curve"]]
    assert resumed["tokens"] == through["tokens"] == 8 * TINY["batch_tokens"]
    text = (tmp_path / "run.txt").read_text()
    assert [int(n) for n in re.findall(r"^step:(\d+)/8 train_time", text, re.M)] == list(range(1, 9))
    assert f"resumed from {tmp_path}/run.pt at step {stop}" in text


def test_kept_checkpoints(corpus, tmp_path, finished):
    run(corpus, tmp_path, keep_every=3)
    kept = [f"run-step{step:06d}.pt" for step in (0, 3, 6)]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [*kept, "run.pt"]
    assert main(["--resume", str(tmp_path / "run-step000003.pt"), "--keep_every", "0"]) == 0
    through, again = checkpoint_of(finished), checkpoint_of(tmp_path)
    assert through["step"] == again["step"] == 8
    assert_same_tensors(through["model"], again["model"])


def test_resume_keeps_its_settings(finished):
    fault = "--lr_matrix 0.5 differs from the checkpoint's 0.03: a resumed run keeps its settings"
    with pytest.raises(RunError, match=fault):
        train_gpt.parse_config(["--resume", str(finished / "run.pt"), "--lr_matrix", "0.5"])


@pytest.mark.parametrize("damage", ["optimizers", "model"])
def test_a_checkpoint_that_does_not_fit_is_one_line(finished, tmp_path, capsys, damage):
    saved = checkpoint_of(finished)
    if damage == "model":
        del saved["model"]["embedding.weight"]
    else:
        del saved["optimizers"][0]["state"]
    train_gpt.write_checkpoint(tmp_path / "other.pt", saved)
    assert main(["--resume", str(tmp_path / "other.pt"), "--log_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "other.pt holds another model than this configuration builds, or is of an older trainer: " in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_an_older_format_is_one_line(finished, tmp_path):
    """As of the trainer before the fields tokens, trained and average: its name says so before any field is missed."""
    content = checkpoint_of(finished) | dict(format="knotgpt-2")
    for name in ("digest", "tokens", "trained", "average"):
        del content[name]
    torch.save(content | dict(digest=train_gpt.digest_of(content)), tmp_path / "old.pt")
    with pytest.raises(RunError, match=r"old\.pt is not a checkpoint of this trainer, or of an older one; give a"):
        train_gpt.read_checkpoint(tmp_path / "old.pt")


def test_warm_up_leaves_no_trace(corpus, tmp_path):
    trainer = Trainer(train_gpt.parse_config(arguments(corpus, tmp_path)))
    trainer.model.register_buffer("calls", torch.zeros(()))  # a variant's running state

    def count(model, *_):
        model.calls.add_(1)

    trainer.model.register_forward_hook(count)
    before, rng = {n: t.clone() for n, t in trainer.model.state_dict().items()}, torch.get_rng_state()
    trainer.warm_up()
    assert_same_tensors(before, trainer.model.state_dict())
    assert torch.equal(rng, torch.get_rng_state())
    for optimizer in trainer.optimizers:
        assert optimizer.steps == 0
        for bucket in optimizer.buckets:
            assert all(tensor.abs().sum() == 0 for tensor in (*bucket.state.values(), bucket.grad))


def test_init_from_lists_what_it_took(corpus, tmp_path, finished, capsys):
    run(corpus, tmp_path, init_from=finished / "run.pt", mlp_hidden=48, bigram_rows=0)
    out = capsys.readouterr().out
    assert "tensors loaded: blocks.0.attention.gate.weight" in out
    assert "8 tensors new: blocks.0.mlp.fc.weight, blocks.0.mlp.proj.weight" in out
    assert "9 tensors unused: bigram_embedding.weight, blocks.0.mlp.fc.weight" in out
    loss = float(re.search(r"step:0/8 val_loss:(\S+)", out)[1])
    assert loss < math.log(257) - 0.2  # it begins where the other ended, not at ln V


def wait_until(condition, seconds=90):
    """Wait for what another process does."""
    deadline = time.time() + seconds
    while time.time() < deadline and not condition():
        time.sleep(0.05)


def test_a_killed_run_leaves_a_readable_log_and_a_loadable_checkpoint(corpus, tmp_path):
    child = in_a_child(arguments(corpus, tmp_path, steps=100_000, val_every=0, checkpoint_seconds=0.01))
    log, checkpoint = tmp_path / "run.txt", tmp_path / "run.pt"
    wait_until(lambda: checkpoint.exists() and len(re.findall("^step:", log.read_text(), re.M)) > 10)
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    text = log.read_text()
    finished_line = text[:text.rfind("\n")].splitlines()[-1]
    assert checkpoint_of(tmp_path)["step"] >= 1 and re.match(r"step:\d+/100000 |train_loss:", finished_line)
    assert facts_of(tmp_path)["status"] == "running"


def assert_stopped(folder, number, code, out, errors):
    """A run that this signal stopped said so, and how to go on."""
    assert code == 128 + number and errors == ""
    name = signal.Signals(number).name
    step = int(re.search(rf"stopped by {name} after step (\d+); continue with --resume", out)[1])
    assert checkpoint_of(folder)["step"] == step
    assert facts_of(folder)["status"] == f"stopped by {name}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(corpus, tmp_path, monkeypatch, capsys, number):
    signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore some
    stop_at(3, monkeypatch, number)
    code = main(arguments(corpus, tmp_path))
    assert_stopped(tmp_path, number, code, *capsys.readouterr())


def test_a_process_that_a_signal_stops_says_so_by_its_exit_code(corpus, tmp_path):
    command, log = [sys.executable, "train_gpt.py", *arguments(corpus, tmp_path, steps=100_000)], tmp_path / "run.txt"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: log.exists() and re.search("^step:3/", log.read_text(), re.M))
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert_stopped(tmp_path, signal.SIGTERM, process.returncode, out, errors)


# ---- Several ranks ----------------------------------------------------------


def test_the_loss_curve_does_not_depend_on_the_number_of_ranks(corpus, tmp_path):
    """
    1, 2 and 4 processes, 2 by torchrun; with several, every reduction, and every update but one, begins inside the
    backward pass; a checkpoint of 4 ranks goes on with 1.
    """
    commands = {world: arguments(corpus, tmp_path / str(world), val_every=2) for world in (1, 2, 4)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for result in (run_ranks({2: commands.pop(2)}, *torchrun), run_ranks(commands)):
        assert result.returncode == 0, result.stderr[-3000:]
    curves = {}
    for world in (1, 2, 4):
        curves[world] = [(point["step"], point["val_loss"]) for point in facts_of(tmp_path / str(world))["curve"]]
    assert [step for step, _ in curves[1]] == [0, 2, 4, 6, 8]
    for world in (2, 4):
        for (_, ours), (_, alone) in zip(curves[world], curves[1], strict=True):
            assert ours == pytest.approx(alone, rel=2e-5)

    # the losses of single tokens are those of one rank, row by row
    kept = {world: kept_losses(tmp_path / str(world)) for world in (1, 2, 4)}
    assert kept[1].shape[0] > 4 and kept[1].dtype == np.float16
    for world in (2, 4):
        spacing = np.spacing(kept[1]).astype(np.float32)
        bound = 2e-5 * kept[1].astype(np.float32) + spacing
        assert (np.abs(kept[world].astype(np.float32) - kept[1].astype(np.float32)) <= bound).all()

    # state gathered from four slices fits one
    one, four = checkpoint_of(tmp_path / "1"), checkpoint_of(tmp_path / "4")
    assert one["loader"] == four["loader"] and one["tokens"] == four["tokens"]
    trainer = Trainer(train_gpt.parse_config(["--resume", str(tmp_path / "4/run.pt")]))
    for optimizer, saved in zip(trainer.optimizers, one["optimizers"], strict=True):
        state = optimizer.state_dict()["state"]
        assert state.keys() == saved["state"].keys()
        for key, tensors in state.items():
            assert tensors.keys() == saved["state"][key].keys()
            for name, tensor in tensors.items():
                expected = saved["state"][key][name]
                assert (tensor - expected).norm() <= 0.05 * expected.norm() + 1e-9


def test_a_world_that_does_not_divide_is_one_line(corpus, tmp_path):
    result = run_ranks({3: arguments(corpus, tmp_path)})
    assert result.returncode == 1
    fault = ("train_gpt.py: error: 8 rows of 32 tokens cannot be shared by 3 ranks; change --batch_tokens or the "
             "number of ranks")
    assert result.stderr.count(fault) == 1


# ---- Faults: one line each --------------------------------------------------


@pytest.mark.parametrize("words,message", [
    (["--track", "fast"], "unknown track 'fast'; the tracks are cpu, english_cpu, small"),
    (["--batch_tokens", "100"], "--batch_tokens 100 is not a multiple of --sequence_length 32"),
    (["--layers", "0"], "--layers must be from 1 to 1,024, got 0"),
    (["--compile", "maybe"], "--compile must be one of auto, model, blocks, off; got 'maybe'"),
    (["--window_pattern", "SX"], "--window_pattern takes letters S and L"),
    (["--window_short", "1,2,3"], "equally many stages"),
    (["--head_dim", "6"], "not a multiple of 4"),
    (["--kv_heads", "3"], "--heads 2 is not a multiple of --kv_heads 3"),
    (["--heads", "1"], "value embeddings need heads x head_dim = model_dim, got 1 x 16 and 32"),
    (["--data", "nowhere"], r"no train shards \(\*_train_\*.bin\) in nowhere; ./run.sh prepares"),
    (["--vocab_size", "100"], "token 256 in .* is outside the vocabulary of 100; give --vocab_size"),
    (["--sequence_length", "100000", "--batch_tokens", "100000"],
     "do not fill a row of 100001; lower --sequence_length or add data"),
    (["--resume", "nothing.pt"], "there is no checkpoint nothing.pt"),
    (["--init_from", "README.md"], "README.md is not a whole checkpoint of this trainer"),
    (["--lr_embed", "10000", "--lr_matrix", "10000", "--steps", "60"], "loss is (nan|inf) at step"),
    (["--device", "cuda"], "PyTorch sees no CUDA device; use --device cpu"),
    (["--log_dir", "/dev/null/logs"],
     "cannot write /dev/null/logs/run.txt: Not a directory; choose another --log_dir"),
])
def test_each_fault_gives_one_line(corpus, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    if words[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if words[0] == "--init_from":
        (tmp_path / "README.md").write_text("no checkpoint")
        words = ["--init_from", str(tmp_path / "README.md")]
    base = arguments(corpus, tmp_path)
    if words[0] == "--track":
        base = ["--data", str(corpus)]
    if words[0] == "--resume":
        base = []
    assert main([*base, *words]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("train_gpt.py: error: ") and errors.count("\n") == 1 and re.search(message, errors), errors


@pytest.mark.parametrize("damage,message", [
    ("cut", "is truncated or empty: .* bytes, its header promises"),
    ("foreign", "is no token shard: it begins with"),
    ("short", "is no token shard"),
])
def test_damaged_shards(corpus, tmp_path, damage, message):
    copy_shards(corpus, tmp_path)
    victim = tmp_path / "words_train_000001.bin"
    victim.write_bytes(dict(cut=victim.read_bytes()[:-3], foreign=b"\x89PNG" * 1000, short=b"abc")[damage])
    with pytest.raises(RunError, match=message):
        loader(tmp_path)


def test_a_full_disk_keeps_the_log_and_the_checkpoint_before(corpus, tmp_path, monkeypatch, capsys):
    """
    The disk fills up at the tenth file: the run ends with one line, its log has all steps, its last checkpoint is
    complete, nothing half stays.
    """
    real, calls = os.fsync, []

    def fill(descriptor):
        calls.append(descriptor)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fill)
    assert main(arguments(corpus, tmp_path, checkpoint_seconds=0)) == 1
    assert re.fullmatch(r"train_gpt.py: error: cannot write .*run\.(pt|json): No space left on device; free some space "
                        r"or choose another folder\n", capsys.readouterr().err)
    step = checkpoint_of(tmp_path)["step"]
    assert step >= 1 and not list(tmp_path.glob(".run*"))
    assert f"step:{step}/8 train_time" in (tmp_path / "run.txt").read_text()


# ---- On a GPU ---------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_flex_attention_on_a_gpu(window):
    """
    Compiled FlexAttention in bf16, forward and backward, against the float64 form on the same rounded inputs.
    """
    generator, T = torch.Generator().manual_seed(0), 512
    q, k, v, grad = (torch.randn(2, T, 3, 64, generator=generator).bfloat16() for _ in range(4))
    index = torch.arange(T)
    starts = torch.where(torch.rand(2, T, generator=generator) < 0.01, index, 0).cummax(1).values
    first_key = torch.maximum(starts, index - (window or T) + 1).int()

    def attend_here(q, k, v):
        on_gpu = first_key.cuda()
        mask = AttentionMask(starts.int().cuda(), None, window, on_gpu, train_gpt.interval_block_mask(on_gpu))
        return attend(q, k, v, mask, 0.125)

    ours = [t.cuda().requires_grad_() for t in (q, k, v)]
    theirs = [t.double().requires_grad_() for t in (q, k, v)]
    y = torch.compile(attend_here, fullgraph=True, dynamic=False)(*ours)
    y.backward(grad.cuda())
    i, j = index[:, None], index[None, :]
    scores = torch.einsum("bihd,bjhd->bhij", theirs[0], theirs[1]) * 0.125
    scores = scores.masked_fill(~((j <= i) & (j >= first_key[:, :, None]))[:, None], -math.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), theirs[2])
    expected.backward(grad.double())
    for a, b in [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, theirs))]:
        assert ((a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()).item() < 6e-3


ON_A_GPU = dict(sequence_length=128, batch_tokens=2048, micro_batch_tokens=1024)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["model", "blocks", "off"])
def test_a_run_on_a_gpu(corpus, tmp_path, mode):
    """bf16, compiled or not, follows the float32 run on the CPU."""
    settings = ON_A_GPU | dict(steps=12, val_every=6, val_tokens=1280, window_short=(20, 30), window_long=(0, 100))
    cpu = run(corpus, tmp_path / "cpu", **settings)
    gpu = run(corpus, tmp_path / "gpu", **settings, device="cuda", compile=mode)
    losses = [[point["val_loss"] for point in facts["curve"]] for facts in (cpu, gpu)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1][-1] < losses[1][0] - 0.5
    assert gpu["dtype"] == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["model", "blocks", "off"])
def test_a_step_does_not_wait_for_the_gpu(corpus, tmp_path, mode):
    settings = ON_A_GPU | dict(window_short=(20,), window_long=(0,), device="cuda", compile=mode)
    trainer = Trainer(train_gpt.parse_config(arguments(corpus, tmp_path, **settings)))
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
