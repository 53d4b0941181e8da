"""Texts from checkpoints: the cache against the whole forward pass, sampling, tokens and text, exported models, bad input."""
import json
import math
import os
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
TINY = dict(vocab_size=61, layers=3, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=64, attention_scale=0.25)
SHORT = dict(window_pattern="SL", window_short=(9,))
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
CACHED = ["baseline", "forgetting_attention:short_conv=3", "forgetting_attention:decay=per_head", "topological_attention", "topological_attention:preset=fast",
          "topological_attention:preset=key_only", "topological_attention:coordinate=linear,temperature=per_head,decay=per_head,key_bias=on,gate=output",
          "topological_attention:preset=fast,quantize_bins=32", "topological_attention:preset=fast,layers=0-1+forgetting_attention:layers=2", "parallel_residual", "swiglu_mlp"]


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
    """model_of("variant+variant", **settings) -> a shaken model; its variants stay applied for the length of the test."""
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


# ---- decoding

@pytest.mark.parametrize("windows", [{}, SHORT, dict(document_mask=False)], ids=["long", "short", "no-documents"])
@pytest.mark.parametrize("specs", CACHED)
def test_decoding_equals_the_whole_pass(model_of, specs, windows):
    model, tokens = model_of(specs, **windows), text_rows(90)
    with torch.no_grad():
        whole = model(tokens)
    assert whole.square().mean().sqrt() > 0.3
    assert worst(Decoder(model, 90), tokens, whole, 40) < 1e-4
    assert decodes_from_cache(model)


@pytest.mark.slow
@pytest.mark.parametrize("specs", ["baseline", "topological_attention:preset=fast", "forgetting_attention", "topological_attention:preset=fast,layers=0-1+forgetting_attention:layers=2"])
def test_two_thousand_tokens(model_of, specs):
    model, tokens = model_of(specs), text_rows(2000, B=1, ends=False)
    with torch.no_grad():
        whole = model(tokens)
    assert worst(Decoder(model, 2000), tokens, whole, 100) < 1e-4


@pytest.mark.parametrize("specs", ["topological_attention:preset=fast,quantize_bins=64", "topological_attention:preset=key_only"])
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


# ---- sampling

def test_choose():
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]]).repeat(20_000, 1)
    assert (choose(logits, 0, 0, 1.0, generator) == 1).all()
    assert (choose(logits, 5.0, 1, 1.0, generator) == 1).all()
    assert set(choose(logits, 5.0, 2, 1.0, generator).tolist()) == {1, 2}
    probability = logits[0].softmax(-1)  # 0.09 0.66 0.24 0.01
    assert set(choose(logits, 1.0, 0, 0.7, generator).tolist()) == {1, 2} and set(choose(logits, 1.0, 0, 0.6, generator).tolist()) == {1}
    shares = torch.bincount(choose(logits, 1.0, 0, 1.0, generator), minlength=4) / 20_000
    torch.testing.assert_close(shares, probability, atol=0.015, rtol=0)
    hot = torch.bincount(choose(logits, 2.0, 0, 1.0, generator), minlength=4) / 20_000
    torch.testing.assert_close(hot, (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)


def test_samples_depend_on_the_seed_alone(model_of):
    model, prompt = model_of("topological_attention:preset=fast"), text_rows(8)
    texts = [torch.stack(list(sample(Decoder(model, 64), prompt, 30, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0].shape == (30, 2) and torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


# ---- text

def test_characters_over_several_tokens():
    tokenizer = Tokenizer(None)
    tokens, shown = tokenizer.encode("aé€"), tokenizer.text_of()
    assert tokens == list("aé€".encode()) and [shown(token) for token in tokens] == ["a", "", "é", "", "", "€"]
    merges = {bytes([n]): n for n in range(256)} | {b"he": 256, b"hel": 257}
    tokenizer = Tokenizer(merges)
    shown = tokenizer.text_of()
    assert tokenizer.encode("hello") == [257, 108, 111] and "".join(map(shown, [257, 108, 111])) == "hello"


# ---- the command, from a run's checkpoint

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a run of two steps on bytes: its checkpoint run.pt and its shards in data/."""
    folder = tmp_path_factory.mktemp("run")
    text = [("train", b"def main():\n    return 0\n" * 200, 0, True), ("val", b"import sys\n" * 60, 0, True)]
    write_folder(folder / "data", "tiny", ((split, list(words), len(words), begins) for split, words, _, begins in text), end_of_text=256, tokenizer="bytes")
    done = subprocess.run([sys.executable, "train_gpt.py", "--steps", "2", "--data", str(folder / "data"), "--log_dir", str(folder), "--run_id", "run", "--val_tokens", "256",
                           "--layers", "2", "--model_dim", "32", "--heads", "2", "--head_dim", "16", "--mlp_hidden", "32", "--batch_tokens", "256", "--sequence_length", "64", "--window_pattern", "L",
                           "--variant", "topological_attention:preset=fast,layers=0"], cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
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
    code, out, error = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "def", "--tokens", 20, "--endless", "--temperature", 0.5)
    assert code == 0 and out.startswith("def") and "20 tokens in" in error and "runs the whole context" not in error
    again = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "def", "--tokens", 20, "--endless", "--temperature", 0.5, "--no-cache")
    assert again[1] == out and "every token runs the whole context" in again[2]
    (run / "prompt.txt").write_text("import é")
    code, out, _ = command(capsys, "--checkpoint", run / "run.pt", "--prompt-file", run / "prompt.txt", "--tokens", 5, "--batch", 3, "--bins", 16)
    assert code == 0 and out.count("import é") == 3 and "--- 3\n" in out


def test_exported_models_give_identical_logits(run, capsys, tmp_path):
    code, out, _ = command(capsys, "--checkpoint", run / "run.pt", "--export", tmp_path / "model")
    assert code == 0 and sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "meta.json", "model.safetensors"]
    logits = []
    for path in (run / "run.pt", tmp_path / "model"):
        saved = generate.read_model(str(path))
        config = generate.config_of(saved, str(path))
        with variants.applied(config.variant, config), torch.no_grad():
            logits.append(train_gpt.trained_model(saved, config, ALONE)(text_rows(30)))
    assert torch.equal(*logits)
    texts = [command(capsys, "--checkpoint", path, "--prompt", "re", "--tokens", 9)[1] for path in (run / "run.pt", tmp_path / "model")]
    assert texts[0] == texts[1]


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_bad_input_is_one_line(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = torch.load(run / "run.pt", weights_only=True)
    other = dict(saved, config=saved["config"] | dict(mlp_hidden=48))
    newer = dict(saved, config=saved["config"] | dict(wings=2))
    torch.save(other, "other.pt")
    torch.save(newer, "newer.pt")
    torch.save(dict(format="knotgpt-1", model=Malicious()), "malicious.pt")
    Path("short.pt").write_bytes((run / "run.pt").read_bytes()[:5000])
    Path("exported").mkdir()
    Path("exported/config.json").write_text(json.dumps(dict(config=saved["config"])))
    Path("latin.txt").write_bytes(b"\xff\xfe\xfa")
    good = ["--checkpoint", run / "run.pt"]
    faults = [
        (["--checkpoint", "none.pt"], "there is no checkpoint none.pt"), (["--checkpoint", "short.pt"], "not a whole checkpoint"),
        (["--checkpoint", "malicious.pt"], "not a whole checkpoint"), (["--checkpoint", "other.pt", "--data", run / "data"], "does not fit the model"),
        (["--checkpoint", "newer.pt"], "does not know (wings)"), (["--checkpoint", "exported"], "has no model.safetensors"),
        ([*good, "--prompt", ""], "the prompt is empty"), ([*good, "--prompt-file", "latin.txt"], "cannot read latin.txt"),
        ([*good, "--prompt", "x" * 64], "the prompt has 65 tokens and the model sees 64 back; give a shorter one or --context 65"),
        ([*good, "--prompt", "x", "--tokens", 0], "--tokens must be at least 1"), ([*good, "--prompt", "x", "--top-p", 0], "--top-p must lie above 0"),
        ([*good, "--prompt", "x", "--temperature", -1], "--temperature must be 0 or above"), ([*good, "--prompt", "x", "--bins", 1], "--bins must be at least 2")]
    for arguments, message in faults:
        prompt = [] if any(str(a).startswith("--prompt") for a in arguments) else ["--prompt", "x"]
        code, out, error = command(capsys, *arguments, *prompt)
        assert code == 1 and out == "" and error.count("\n") == 1 and message in error, (arguments, error)
    assert not Path("executed").exists()


def test_a_tokenizer_of_another_size(run, capsys, tmp_path):
    write_folder(tmp_path / "other", "other", [(split, [1, 2, 3] * 50, 150, True) for split in ("train", "val")], end_of_text=99, tokenizer="recall")
    code, _, error = command(capsys, "--checkpoint", run / "run.pt", "--prompt", "x", "--data", tmp_path / "other")
    assert code == 1 and "no tokenizer of 257 ids for text" in error and error.count("\n") == 1


def test_perplexity_of_its_own_samples_is_low(model_of):
    """A sharp distribution is sampled as it is: mean log-probability of samples = minus the entropy, within its error."""
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
