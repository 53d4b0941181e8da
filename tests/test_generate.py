"""
Texts from checkpoints: the cache against the whole forward pass, sampling, tokens and text, exported models, bad input.
"""
import io
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate
import train_gpt
import variants
from data.shards import write_folder
from generate import Decoder, Tokenizer, choose, decodes_from_cache, sample
from train_gpt import Config

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(vocab_size=61, layers=3, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=64,
            attention_scale=0.25)
SHORT = dict(window_pattern="SL", window_short=(9,))
GROUPED = dict(kv_heads=1, value_embeddings=0, channel_scales=True)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
CACHED = ["baseline", "forgetting_attention:short_conv=3", "forgetting_attention:decay=per_head",
          "topological_attention", "topological_attention:preset=fast", "topological_attention:preset=key_only",
          "topological_attention:coordinate=linear,temperature=per_head,decay=per_head,key_bias=on,gate=output",
          "topological_attention:preset=fast,quantize_bins=32",
          "topological_attention:preset=fast,layers=0-1+forgetting_attention:layers=2", "parallel_residual",
          "swiglu_mlp"]


def shaken(model):
    """With noise on every parameter: at the start the projections out of an attention are zero and would hide it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3))
    model.set_windows(1.0)
    return model.eval()


@pytest.fixture
def model_of():
    """
    model_of("variant+variant", **settings) -> a shaken model; its variants stay applied for the length of the test.
    """
    contexts = []
    def make(specs, **settings):
        config = Config(variant=() if specs == "baseline" else tuple(specs.split("+")), **(TINY | settings))
        contexts.append(variants.applied(config.variant, config))
        contexts[-1].__enter__()
        return shaken(train_gpt.build_model(config, ALONE))
    yield make
    for context in reversed(contexts):
        context.__exit__(None, None, None)


def text_rows(T, B=2, seed=1, ends=True):
    tokens = torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return tokens if ends else tokens.clamp_max(59)


def worst(decoder, tokens, whole, first):
    """The largest difference of the logits, the first tokens at once, some together, then one by one."""
    steps, end, worst = [first, 5] + [1] * (tokens.shape[1] - first - 5), 0, 0.0
    for count in steps:
        end += count
        worst = max(worst, (decoder.feed(tokens[:, end - count:end]) - whole[:, end - 1]).abs().max().item())
    return worst


# ---- decoding ---------------------------------------------------------------


@pytest.mark.parametrize("windows", [{}, SHORT, dict(document_mask=False), GROUPED],
                         ids=["long", "short", "no-documents", "grouped"])
@pytest.mark.parametrize("specs", CACHED)
def test_decoding_equals_the_whole_pass(model_of, specs, windows):
    model, tokens = model_of(specs, **windows), text_rows(90)
    with torch.no_grad():
        whole = model(tokens)
    assert whole.square().mean().sqrt() > 0.3
    assert worst(Decoder(model, 90), tokens, whole, 40) < 1e-4
    assert decodes_from_cache(model)


def test_grouped_queries_keep_fewer_keys(model_of):
    sizes = []
    for heads in (2, 1):
        decoder = Decoder(model_of("baseline", kv_heads=heads, value_embeddings=0), 64)
        decoder.feed(text_rows(50))
        sizes.append(decoder.bytes_kept)
    assert sizes[0] == 2 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("specs", ["baseline", "topological_attention:preset=fast", "forgetting_attention",
                                   "topological_attention:preset=fast,layers=0-1+forgetting_attention:layers=2"])
def test_two_thousand_tokens(model_of, specs):
    model, tokens = model_of(specs), text_rows(2000, B=1, ends=False)
    with torch.no_grad():
        whole = model(tokens)
    assert worst(Decoder(model, 2000), tokens, whole, 100) < 1e-4


@pytest.mark.parametrize("specs", ["topological_attention:preset=fast,quantize_bins=64",
                                   "topological_attention:preset=key_only"])
def test_a_state_of_fixed_size(model_of, specs):
    """Coordinates that were rounded in training lie on the bins: the state is exact, and it does not grow."""
    model, tokens, sizes = model_of(specs), text_rows(120), []
    with torch.no_grad():
        whole = model(tokens)
    decoder = Decoder(model, 120, bins=64)
    assert worst(decoder, tokens[:, :60], whole, 20) < 1e-4
    sizes.append(decoder.bytes_kept)
    for t in range(60, 120):
        assert (decoder.feed(tokens[:, t:t + 1]) - whole[:, t]).abs().max() < 1e-4
    assert decoder.bytes_kept == sizes[0]


def test_bins_and_a_temperature_a_head(model_of):
    with pytest.raises(train_gpt.RunError, match="temperature=per_head"):
        Decoder(model_of("topological_attention:temperature=per_head"), 64, bins=16).feed(text_rows(5))


def test_a_context_hides_what_lies_further_back(model_of):
    model = model_of("baseline", layers=1, unet_skips=False, value_embeddings=0, smear=False)
    long, other = text_rows(40, ends=False), text_rows(40, seed=2, ends=False)
    other[:, -16:] = long[:, -16:]
    logits = []
    for tokens in (long, other):
        decoder = Decoder(model, 16)
        for t in range(40):
            found = decoder.feed(tokens[:, t:t + 1])
        logits.append(found)
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(Decoder(model, 16, cached=False).feed(long), logits[0], atol=1e-4, rtol=1e-4)


def test_a_part_that_mixes_tokens_runs_the_whole_context(model_of, monkeypatch):
    class Mixing(train_gpt.MLP):
        def forward(self, x):
            return super().forward(x + torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))
    monkeypatch.setattr(train_gpt, "MLP", Mixing)
    model, tokens = model_of("baseline"), text_rows(50)
    assert not decodes_from_cache(model)
    with torch.no_grad():
        whole = model(tokens)
    assert worst(Decoder(model, 64, cached=False), tokens, whole, 20) < 1e-5


# ---- sampling ---------------------------------------------------------------


def test_choose():
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).repeat(20_000, 1)
    assert (choose(logits, 0, 0, 1.0, generator) == 1).all()
    assert (choose(logits, 5.0, 1, 1.0, generator) == 1).all()
    assert set(choose(logits, 5.0, 2, 1.0, generator).tolist()) == {1, 2}
    probability = logits[0].softmax(-1)  # 0.09 0.66 0.24 0.01
    assert set(choose(logits, 1.0, 0, 0.7, generator).tolist()) == {1, 2}
    assert set(choose(logits, 1.0, 0, 0.6, generator).tolist()) == {1}
    shares = torch.bincount(choose(logits, 1.0, 0, 1.0, generator), minlength=4) / 20_000
    torch.testing.assert_close(shares, probability, atol=0.015, rtol=0)
    hot = torch.bincount(choose(logits, 2.0, 0, 1.0, generator), minlength=4) / 20_000
    torch.testing.assert_close(hot, (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-12])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (2, 1.0), (0, 0.9)])
def test_a_temperature_near_zero_is_zero(temperature, top_k, top_p):
    logits = torch.tensor([[-30.0, 14.9999, 15.0, 0.0], [-1e30, 1e30, 0.0, -1e-30]])
    assert choose(logits, temperature, top_k, top_p, torch.Generator().manual_seed(1)).tolist() == [2, 1]


def test_logits_that_are_none():
    for bad in (math.nan, math.inf):
        with pytest.raises(train_gpt.RunError, match="infinite or no numbers"):
            choose(torch.tensor([[0.0, bad]]), 0, 0, 1.0, torch.Generator())
    assert choose(torch.tensor([[-math.inf, 0.0]]), 1.0, 0, 1.0, torch.Generator()) == 1  # what a head forbids


def test_samples_depend_on_the_seed_alone(model_of):
    model, prompt = model_of("topological_attention:preset=fast"), text_rows(8)
    texts = [torch.stack(list(sample(Decoder(model, 64), prompt, 30, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0].shape == (30, 2) and torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_samples_follow_the_probabilities(model_of):
    """Samples follow the probabilities: their mean log-probability is minus the entropy, within its error."""
    model = model_of("baseline")
    decoder, prompt, gains = Decoder(model, 64), text_rows(8, B=64), []
    logits, generator = decoder.feed(prompt), torch.Generator().manual_seed(3)
    for _ in range(30):
        logp = logits.log_softmax(-1)
        tokens = choose(logits, 1.0, 0, 1.0, generator)
        gains.append(logp.gather(1, tokens[:, None])[:, 0] - (logp.exp() * logp).sum(-1))
        logits = decoder.feed(tokens[:, None].int())
    gains = torch.cat(gains)
    assert abs(gains.mean()) < 4 * gains.std() / math.sqrt(len(gains))


# ---- text -------------------------------------------------------------------


def test_characters_over_several_tokens():
    tokenizer = Tokenizer(None)
    tokens, shown = tokenizer.encode("aé€"), tokenizer.text_of()
    assert tokens == list("aé€".encode()) and [shown(token) for token in tokens] == ["a", "", "é", "", "", "€"]
    merges = {bytes([n]): n for n in range(256)} | {b"he": 256, b"hel": 257}
    tokenizer = Tokenizer(merges)
    shown = tokenizer.text_of()
    assert tokenizer.encode("hello") == [257, 108, 111] and "".join(map(shown, [257, 108, 111])) == "hello"


# ---- the command, from a run's checkpoint -----------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of two steps on bytes: its checkpoint run.pt and its shards in data/."""
    folder = tmp_path_factory.mktemp("run")
    text = [("train", b"def main():\n    return 0\n" * 200, 0, True), ("val", b"import sys\n" * 60, 0, True)]
    write_folder(folder / "data", "tiny",
                 ((split, list(words), len(words), begins) for split, words, _, begins in text), end_of_text=256,
                 tokenizer="bytes")
    settings = ("--steps 2 --run_id run --val_tokens 256 --layers 2 --model_dim 32 --heads 2 --head_dim 16 "
                "--mlp_hidden 32 --batch_tokens 256 --sequence_length 64 --window_pattern L --device cpu").split()
    words = ["--data", str(folder / "data"), "--log_dir", str(folder), *settings]
    assert train_gpt.main([*words, "--variant", "topological_attention:preset=fast,layers=0"], loader=variants) == 0
    return folder


def command(capsys, *arguments):
    code = generate.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def unpatched():
    """The command applies variants for good."""
    before = dict(vars(train_gpt))
    yield
    for name, value in before.items():
        setattr(train_gpt, name, value)


def test_text_to_the_terminal(run, capsys):
    code, out, error = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "def", "--tokens", 20, "--endless",
                               "--temperature", 0.5)
    assert code == 0 and out.startswith("def") and "20 tokens in" in error and "runs the whole context" not in error
    again = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "def", "--tokens", 20, "--endless",
                    "--temperature", 0.5, "--no-cache")
    assert again[1] == out and "every token runs the whole context" in again[2]
    (run / "prompt.txt").write_text("import é")
    code, out, _ = command(capsys, "--checkpoint", run / "run.pt", "--prompt-file", run / "prompt.txt", "--tokens", 5,
                           "--batch", 3, "--bins", 16)
    assert code == 0 and out.count("import é") == 3 and "--- 3\n" in out


def test_exported_models_give_identical_logits(run, capsys, tmp_path):
    code, out, _ = command(capsys, "--checkpoint", run / "run.pt", "--export", tmp_path / "model")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "meta.json",
                                                                            "model.safetensors"]
    config = train_gpt.config_from(train_gpt.read_checkpoint(run / "run.pt")["config"], "run.pt")
    assert train_gpt.config_from(generate.read_model(str(tmp_path / "model"))["config"], "model") == config
    logits = []
    for path in (run / "run.pt", tmp_path / "model"):
        saved = generate.read_model(str(path))
        config = train_gpt.config_from(saved["config"], str(path))
        with variants.applied(config.variant, config), torch.no_grad():
            logits.append(train_gpt.trained_model(saved, config, ALONE)(text_rows(30)))
    assert torch.equal(*logits)
    texts = [command(capsys, "--checkpoint", path, "--prompt", "re", "--tokens", 9)[1]
             for path in (run / "run.pt", tmp_path / "model")]
    assert texts[0] == texts[1]


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def write_changed(run, path: Path, **changes):
    """The run's checkpoint with other contents, its digest in order."""
    saved = train_gpt.read_checkpoint(run / "run.pt")
    contents = {name: value for name, value in saved.items() if name not in ("format", "digest")}
    train_gpt.write_checkpoint(path, contents | changes)


def refused(capsys, *arguments) -> str:
    """The one line that a command line is refused with."""
    prompt = [] if any(str(word).startswith(("--prompt", "--export")) for word in arguments) else ["--prompt", "x"]
    code, out, error = command(capsys, *arguments, *prompt)
    assert code == 1 and out == "" and error.startswith("generate.py: error: ") and error.count("\n") == 1, error
    return error


def test_bad_input_is_one_line(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = train_gpt.read_checkpoint(run / "run.pt")
    write_changed(run, Path("other.pt"), config=saved["config"] | dict(mlp_hidden=48))
    write_changed(run, Path("newer.pt"), config=saved["config"] | dict(wings=2))
    torch.save(dict(format="knotgpt-1", model=Malicious()), "malicious.pt")
    Path("short.pt").write_bytes((run / "run.pt").read_bytes()[:5000])
    Path("exported").mkdir()
    Path("exported/config.json").write_text(json.dumps(dict(format="knotgpt-1", config=saved["config"])))
    Path("latin.txt").write_bytes(b"\xff\xfe\xfa")
    good = ["--checkpoint", run / "run.pt"]
    faults = [
        (["--checkpoint", "none.pt"], "there is no checkpoint none.pt"),
        (["--checkpoint", "short.pt"], "not a whole checkpoint"),
        (["--checkpoint", "malicious.pt"], "not a whole checkpoint"),
        (["--checkpoint", "other.pt", "--data", run / "data"], "does not fit the model"),
        (["--checkpoint", "newer.pt"], "does not know (wings)"),
        (["--checkpoint", "exported"], "exported has no model.safetensors"),
        (["--checkpoint", "/dev/zero"], "/dev/zero is neither a file nor a folder"),
        ([*good, "--data", "nowhere"], "--data nowhere is no folder"), ([*good, "--data", "latin.txt"], "is no folder"),
        ([*good, "--data=--"], "--data=-- is no option with a value"), ([*good, "--batc", 2], "unrecognized arguments"),
        (["--checkpoint", "x\ny"], "there is no checkpoint of a run"), (["--checkpoint", "x" * 300], "no checkpoint"),
        (["--checkpoint", "x" * 300 + ".pt"], "File name too long"), (["--checkpoint", "./" + "x" * 300], "too long"),
        (["--checkpoint", "none", "--log-dir", run], "there is no checkpoint of a run 'none'"),
        ([*good, "--prompt", ""], "the prompt is empty"),
        ([*good, "--prompt", "\udcff"], "cannot read --prompt as UTF-8"),
        ([*good, "--prompt-file", "latin.txt"], "cannot read latin.txt as UTF-8"),
        ([*good, "--prompt-file", "."], "cannot read .: Is a directory"),
        ([*good, "--prompt-file", "/dev/zero"], "/dev/zero has more than"),
        ([*good, "--prompt", "x", "--prompt-file", "latin.txt"], "give --prompt or --prompt-file, not both"),
        ([*good, "--prompt", "x" * 64],
         "the prompt has 65 tokens and the model sees 64 back; give a shorter one or --context 65"),
        ([*good, "--export", "latin.txt"], "cannot export to"), ([*good, "--export", "x" * 300], "File name too long"),
        ([*good, "--export", "latin.txt/model"], "Not a directory")]
    for arguments, message in faults:
        assert message in refused(capsys, *arguments), arguments
    assert not Path("executed").exists()


@pytest.mark.parametrize("option, least, most", [
    ("tokens", 1, 10 ** 9), ("batch", 1, 2 ** 20), ("context", 0, 2 ** 24), ("bins", 0, 65_536), ("top-k", 0, 65_536),
    ("seed", 0, 2 ** 48), ("temperature", 0, 1e6), ("top-p", 1e-6, 1)])
def test_every_number_has_a_range(run, capsys, option, least, most):
    good = ["--checkpoint", run / "run.pt", f"--{option}"]
    for value in (least - 1, most + 1, 10 ** 19, -10 ** 30):
        assert f"--{option} must be from" in refused(capsys, *good, value)
    for value in ("nan", "inf", "-inf", "1e400"):
        assert f"--{option}" in refused(capsys, *good, value)
    for value in ("x", "", "9" * 5000):
        line = refused(capsys, *good, value)
        assert f"--{option}" in line and len(line) < 300
    if option == "bins":
        assert "--bins must be at least 2" in refused(capsys, *good, 1)


def test_extreme_numbers_that_mean_something(run, capsys):
    good = ["--checkpoint", run / "run.pt", "--prompt", "x", "--tokens", 3]
    for extreme in (["--temperature", 1e-40], ["--temperature", 1e6], ["--top-p", 1e-6], ["--top-k", 65_536],
                    ["--seed", 2 ** 48], ["--context", 2 ** 24], ["--context", 2], ["--bins", 2]):
        assert command(capsys, *good, *extreme)[0] == 0, extreme
    assert "prompt has 2 tokens and the model sees 1 back" in refused(capsys, *good, "--context", 1)


# ---- memory -----------------------------------------------------------------


def test_what_the_layers_will_keep_is_known_before(model_of):
    """The estimate's caches are, to the byte, those after the text: growth is measured on 32 tokens, here to 100."""
    for specs, bins in (("baseline", 0), ("forgetting_attention:short_conv=3", 0),
                        ("topological_attention:preset=fast", 0), ("topological_attention:preset=fast,layers=0-1", 32)):
        model = model_of(specs)
        decoder, prompt = Decoder(model, 100, bins), text_rows(20, B=3, ends=False)
        list(sample(decoder, prompt, 80))
        streams = 4 * 20 * (model.config.model_dim + model.config.mlp_hidden)
        others = generate.bytes_needed(model, 100, bins, True, 3, 20, 80) - decoder.bytes_kept
        weights = 4 * sum(p.numel() for p in model.parameters())
        token = (decoder.bytes_kept // 3) // 99 if not bins else 0
        expected = weights + 3 * (12 * 61 + 4 * 20 + 80 + streams)
        assert expected <= others <= expected + 3 * max(token, 2 * 4 * 32), specs  # the last token is never fed


@pytest.mark.parametrize("extreme", [
    ["--batch", 2 ** 20, "--context", 20_000, "--tokens", 20_000],
    ["--batch", 2 ** 20, "--tokens", 10 ** 9, "--no-cache"],
    ["--batch", 2 ** 20, "--tokens", 10 ** 9, "--bins", 65_536]])
def test_what_does_not_fit_is_refused_with_its_bytes(run, capsys, monkeypatch, extreme):
    def refuse(*arguments):
        raise AssertionError("a text was begun")
    monkeypatch.setattr(generate, "sample", refuse)
    monkeypatch.setattr(generate, "memory_of_machine", lambda ranks: 2 ** 33)
    line = refused(capsys, "--checkpoint", run / "run.pt", *extreme)
    needed = int(line.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    assert needed > 2 ** 33 and "8,589,934,592; lower" in line


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 9 GiB"), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_memory_that_others_took(run, capsys, monkeypatch, error):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(generate, "decodes_from_cache", fail)
    assert f"this machine has too little memory for that ({error}); ask for less" in refused(capsys, "--checkpoint",
                                                                                             run / "run.pt")


# ---- where the model comes from ---------------------------------------------


def test_a_run_by_its_name(run, capsys):
    options = ["--log-dir", run, "--prompt", "de", "--tokens", 4]
    texts = {command(capsys, "--checkpoint", name, *options)[:2] for name in (run / "run.pt", "run", "ru", "last")}
    assert len(texts) == 1 and texts.pop()[0] == 0


def write_recall(folder: Path, end_of_text: int):
    """A folder of shards whose tokens are no text."""
    documents = [(split, [1, 2, 3] * 50, 150, True) for split in ("train", "val")]
    write_folder(folder, "other", documents, end_of_text=end_of_text, tokenizer="recall")


def test_data_beside_the_trainer(run, capsys, tmp_path, monkeypatch):
    """A run's relative data folder is looked for here, then beside the trainer, as the trainer does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "__file__", str(run / "train_gpt.py"))
    assert generate.data_folder("data") == run / "data" and generate.data_folder(str(run)) == run
    config = train_gpt.read_checkpoint(run / "run.pt")["config"] | dict(data="other")
    write_changed(run, tmp_path / "moved.pt", config=config)
    write_recall(run / "other", 256)
    assert f"text in {run / 'other'} (its name there: recall)" in refused(capsys, "--checkpoint", "moved.pt")
    (tmp_path / "other").mkdir()
    assert command(capsys, "--checkpoint", "moved.pt", "--prompt", "x", "--tokens", 1)[0] == 0


def test_a_tokenizer_of_another_size(run, capsys, tmp_path):
    write_recall(tmp_path / "other", 99)
    good = ["--checkpoint", run / "run.pt", "--data", tmp_path / "other"]
    assert "no tokenizer of 257 ids for text" in refused(capsys, *good)
    for meta in ("[]", "{", '{"tokenizer": 3}', "[" * 100_000, '{"vocab_size": 257}', '{"tokenizer": NaN}', "\xff"):
        (tmp_path / "other" / "meta.json").write_bytes(meta.encode("latin-1"))
        assert "meta.json" in refused(capsys, *good)


def test_a_padded_vocabulary():
    merges, folder = Path(__file__).parent, Path("nowhere")
    assert Tokenizer.of(folder, Config(vocab_size=257)).encode("a") == [97]
    for size in (256, 385, 50_256):
        with pytest.raises(train_gpt.RunError, match=f"{size} "):
            Tokenizer.of(merges, Config(vocab_size=size))


def test_code_that_changed_is_named(run, capsys, tmp_path, monkeypatch):
    """For a checkpoint and for what is exported from it; the module whose hash differs, no other."""
    sources = train_gpt.read_checkpoint(run / "run.pt")["sources"]
    good = ["--prompt", "x", "--tokens", 1]
    wrong = {"variants.topological_attention": "0" * 64, "variants.gone": "1" * 64}
    assert "variants.topological_attention" in sources
    assert "changed" not in command(capsys, "--checkpoint", run / "run.pt", *good)[2]
    write_changed(run, tmp_path / "a.pt", sources=sources | wrong)
    assert command(capsys, "--checkpoint", tmp_path / "a.pt", "--export", tmp_path / "model")[0] == 0
    for path in (tmp_path / "a.pt", tmp_path / "model"):
        code, _, error = command(capsys, "--checkpoint", path, *good)
        warning = error.splitlines()[0]
        assert code == 0 and error.count("\n") == 2
        assert "code of variants.topological_attention, variants.gone has changed" in warning


@pytest.mark.parametrize("change, message", [
    (lambda model: model.pop("embedding.weight"), "it lacks embedding.weight (1 in all)"),
    (lambda model: model.update(wings=torch.zeros(2)), "it has besides wings (1 in all)"),
    (lambda model: model.update({"embedding.weight": torch.zeros(3, 32)}), "embedding.weight is (3, 32) torch.float32"),
    (lambda model: model.update({"embedding.weight": model["embedding.weight"].double()}), "torch.float64"),
    (lambda model: model["embedding.weight"][3:4].fill_(math.nan), "embedding.weight holds numbers that are infinite"),
    (lambda model: model["embedding.weight"][3:4].fill_(-math.inf), "embedding.weight holds numbers that are infinite"),
    (lambda model: model.update({"embedding.weight": model["embedding.weight"].to_sparse()}), "torch.sparse_coo")])
def test_tensors_that_are_not_the_models(run, capsys, tmp_path, monkeypatch, change, message):
    saved = train_gpt.read_checkpoint(run / "run.pt")
    change(saved["model"])
    monkeypatch.setattr(generate, "read_checkpoint", lambda path: saved)
    line = refused(capsys, "--checkpoint", run / "run.pt")
    assert message in line and "run.pt" in line


def test_a_fault_of_a_variant_is_one_line(run, capsys, monkeypatch):
    import variants.topological_attention as variant
    def broken(*arguments):
        raise ZeroDivisionError("of the variant's own")
    monkeypatch.setattr(variant, "short_convolution", broken, raising=True)
    monkeypatch.setattr(variant, "TopologicalCache", broken, raising=True)
    monkeypatch.setattr(variants, "blame", lambda error: f"variant topological_attention: {error}", raising=False)
    assert "variant topological_attention: of the variant's own" in refused(capsys, "--checkpoint", run / "run.pt")
    monkeypatch.setattr(variants, "blame", lambda error: None, raising=False)
    with pytest.raises(ZeroDivisionError):
        command(capsys, "--checkpoint", run / "run.pt", "--prompt", "x")


def test_bins_where_nothing_can_keep_them(model_of):
    with pytest.raises(train_gpt.RunError, match="--bins 8: no layer of this model can keep a state"):
        generate.bytes_needed(model_of("baseline"), 64, 8, True, 1, 4, 4)
    with pytest.raises(train_gpt.RunError, match="--bins 8: a state of 8 bins forgets nothing"):
        generate.bytes_needed(model_of("topological_attention:preset=fast", **SHORT), 64, 8, True, 1, 4, 4)


def test_bins_without_a_cache(run, capsys, monkeypatch):
    good = ["--checkpoint", run / "run.pt", "--bins", 8]
    assert "--no-cache forbids" in refused(capsys, *good, "--no-cache")
    monkeypatch.setattr(generate, "decodes_from_cache", lambda model: False)
    assert "a part of this model keeps nothing for later tokens" in refused(capsys, *good)


# ---- the console ------------------------------------------------------------


def test_an_interrupt(run, capsys, monkeypatch):
    def interrupt(*arguments):
        yield torch.tensor([98])
        raise KeyboardInterrupt
    monkeypatch.setattr(generate, "sample", interrupt)
    code, out, error = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "a")
    assert (code, out, error) == (130, "ab", "generate.py: interrupted\n")


class ClosedPipe(io.TextIOWrapper):
    """The writing end of a pipe that nobody reads."""
    def __init__(self):
        reading, writing = os.pipe()
        os.close(reading)
        super().__init__(os.fdopen(writing, "wb"))


@pytest.mark.parametrize("options", [["--tokens", "300", "--endless"], ["--tokens", "3", "--batch", "2"], ["--help"]])
def test_output_that_nobody_reads(run, capsys, monkeypatch, options):
    pipe = ClosedPipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    code = generate.main(["--checkpoint", str(run / "run.pt"), "--prompt", "x", *options])
    pipe.close()  # as the interpreter does at its end: nothing is left that could not be written
    assert code == 141 and "error" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk(run, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert generate.main(["--checkpoint", str(run / "run.pt"), "--prompt", "x", "--tokens", "2"]) == 1
    assert "the output cannot be used: No space left on device" in capsys.readouterr().err


STRANGE = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", RANK="3", WORLD_SIZE="8", LOCAL_RANK="x")


def test_a_reader_of_three_bytes_in_a_strange_environment(run):
    """
    As generate.py | head -c 3 in a locale without accents, beside ranks of somebody else's: the process itself ends
    quietly, with the exit code of SIGPIPE.
    """
    start = [sys.executable, ROOT / "generate.py", "--checkpoint", run / "run.pt", "--prompt", "aé€", "--endless"]
    with subprocess.Popen([*start, "--tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | STRANGE) as process:
        assert process.stdout.read(3) == b"a??"
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == 141 and error == ""


@pytest.mark.slow
@pytest.mark.parametrize("optimize", ["", "2"])  # 2: without docstrings; Python compiles all anew
def test_a_strange_environment(run, optimize):
    start = [sys.executable, ROOT / "generate.py", "--checkpoint", run / "run.pt", "--prompt", "aé€", "--tokens", "20"]
    environment = os.environ | STRANGE | dict(PYTHONOPTIMIZE=optimize)
    done = subprocess.run([*start, "--temperature", "1e-40"], capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"a??") and b"20 tokens in" in done.stderr, done.stderr


def test_the_help_names_defaults_in_groups(capsys, monkeypatch):
    monkeypatch.setattr(generate, "__doc__", None)  # as with python -OO
    code, out, error = command(capsys, "--help")
    assert code == 0 and error == ""
    for heading in ("where the model comes from:", "what to say:", "how to sample:", "output"):
        assert f"\n{heading}" in out
    assert "(default: 256)" in " ".join(out.split()) and "(default: 1.0)" in " ".join(out.split())


# ---- exported folders -------------------------------------------------------


def test_the_umask_holds_for_exported_files(run, capsys, tmp_path):
    before = os.umask(0o027)
    try:
        assert command(capsys, "--checkpoint", run / "run.pt", "--export", tmp_path / "model")[0] == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors", "meta.json"), 0o640)


def test_an_export_never_damages_a_folder(run, capsys, tmp_path, monkeypatch):
    model, logs = tmp_path / "model", tmp_path / "logs"
    logs.mkdir()
    (logs / "run.pt").write_bytes((run / "run.pt").read_bytes())
    assert command(capsys, "--checkpoint", logs / "run.pt", "--export", model)[0] == 0
    (tmp_path / "link").symlink_to(model)

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = contents()
    for source, target in ((model, model), (model, tmp_path / "link"), (model, model / ".." / "model"),
                           (model, tmp_path), (logs / "run.pt", logs), (logs / "run.pt", tmp_path), (model, logs),
                           (model, run / "data")):
        assert f"--export {target.resolve()}" in refused(capsys, "--checkpoint", source, "--export", target)
    assert contents() == before

    # a full disk, at any file: the earlier export stays, nothing is left behind
    for file in ("meta.json", "model.safetensors", "config.json"):
        def fill(path, write, file=file, write_atomically=train_gpt.write_atomically):
            if path.name == file:
                raise train_gpt.RunError(f"cannot write {path}: No space left on device")
            write_atomically(path, write)
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt, "write_atomically", fill)
            assert "No space left" in refused(capsys, "--checkpoint", logs / "run.pt", "--export", model)
    assert contents() == before

    # an earlier export is replaced, with what only it had
    settings = json.loads((model / "config.json").read_text())
    (model / "old.tiktoken").write_text("")
    assert "holds old.tiktoken, which --export did not write" in refused(capsys, "--checkpoint", model)
    assert command(capsys, "--checkpoint", logs / "run.pt", "--export", model)[0] == 0
    assert contents() == before and settings["files"].keys() == {"model.safetensors", "meta.json"}


def test_shared_tensors_are_stored_once(model_of, run, tmp_path, monkeypatch):
    """Blocks that share a module, and a tied head: stored once, back under all names, and equal logits."""
    class Shared(train_gpt.GPT):
        def __init__(self, config):
            super().__init__(config)
            for block in self.blocks[1:]:
                block.mlp = self.blocks[0].mlp
    monkeypatch.setattr(train_gpt, "GPT", Shared)
    model = model_of("baseline", tied_embedding=True)
    saved = dict(config=vars(model.config), model=model.state_dict(), sources={})
    generate.export(saved, model.config, tmp_path / "model", run / "run.pt", tmp_path)
    restored = generate.read_model(str(tmp_path / "model"))
    expected = {"head.projection.weight": "embedding.weight"}
    expected |= {f"blocks.{layer}.mlp.{role}.weight": f"blocks.0.mlp.{role}.weight"
                 for layer in (1, 2) for role in ("fc", "proj")}
    assert json.loads((tmp_path / "model/config.json").read_text())["shared"] == expected
    assert all(restored["model"][name] is restored["model"][first] for name, first in expected.items())
    numbers = sum(p.numel() for p in model.parameters())
    assert 4 * numbers < (tmp_path / "model/model.safetensors").stat().st_size < 4 * numbers + 8000
    again = generate.load_model(restored, model.config, ALONE, "model")
    assert again.blocks[2].mlp is again.blocks[0].mlp and again.head.projection.weight is again.embedding.weight
    with torch.no_grad():
        assert torch.equal(again(text_rows(30)), model(text_rows(30)))


def test_views_of_one_storage_are_no_shared_tensors():
    storage = torch.arange(12.0)
    tensors = dict(a=storage[:6], b=storage[6:], c=storage[:6], d=storage[:6].view(2, 3), e=storage[:4])
    tensors |= dict(f=torch.zeros(0), g=torch.zeros(0))
    first, shared = generate.share_tensors(tensors)
    assert shared == dict(c="a") and first.keys() == set("abdefg")


def test_an_export_without_checksums_still_loads(run, capsys, tmp_path):
    """As it was written before there were any: a note on stderr, and the same text."""
    from safetensors.torch import save_file
    saved = train_gpt.read_checkpoint(run / "run.pt")
    (tmp_path / "old").mkdir()
    save_file({name: tensor.clone() for name, tensor in saved["model"].items()}, tmp_path / "old/model.safetensors")
    (tmp_path / "old/config.json").write_text(json.dumps(dict(format="knotgpt-1", config=saved["config"])))
    code, out, error = command(capsys, "--checkpoint", tmp_path / "old", "--prompt", "de", "--tokens", 5)
    assert code == 0 and "old is an older export, without checksums" in error and error.count("\n") == 2
    assert out == command(capsys, "--checkpoint", run / "run.pt", "--prompt", "de", "--tokens", 5)[1]
