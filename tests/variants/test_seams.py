"""The seams of the trainer that no part of the model is: each is replaced, by a shipped variant, and seen to act."""

import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
import variants
from data.shards import write_meta, write_shard
from generate import decodes_from_cache
from tests.errors import float_bound, relative_rms
from tests.models import build, gradients_of, random_tokens, scramble
from tests.ranks import run_ranks
from train_gpt import Config, Ranks, TokenLoader, Trainer, make_config

T = 32
TINY = dict(
    vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=T, batch_tokens=8 * T,
    micro_batch_tokens=4 * T, steps=8, val_tokens=8 * T, val_every=4, compile="off", device="cpu", run_id="run",
)
ALONE = Ranks(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two training shards of documents of one letter each, a quarter of them equal, and a validation shard."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)

    def documents(count):
        letters = rng.integers(97, 101, count)
        return np.concatenate([np.append(256, rng.integers(letter, letter + 9, 50)) for letter in letters])

    write_shard(folder / "letters_train_000000.bin", documents(40))
    write_shard(folder / "letters_train_000001.bin", documents(30))
    write_shard(folder / "letters_val_000000.bin", documents(12))
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


def arguments(corpus, folder, *specs, **changes) -> list[str]:
    """The command line of a run in this folder, with these variants."""
    words = [f"--{name}={value}" for name, value in {**TINY, "data": corpus, "log_dir": folder, **changes}.items()]
    return [*words, "--variant", *specs] if specs else words


def run(corpus, folder, *specs, **changes) -> dict:
    """The JSON of a run that ends well."""
    assert train_gpt.main(arguments(corpus, folder, *specs, **changes), loader=variants) == 0
    return facts_of(folder)


def facts_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The folder of the baseline's run, which keeps the weights of every step; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("plain")
    run(corpus, folder, keep_every=1)
    return folder


def checkpoint(folder, name="run") -> dict:
    return train_gpt.read_checkpoint(folder / f"{name}.pt")


def go_on(file):
    """Resume a run from a kept checkpoint, whose last one it writes anew."""
    (file.parent / "run.pt").unlink()
    assert train_gpt.main(["--resume", str(file), "--keep_every", "0"], loader=variants) == 0


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_seam_exists_and_the_readme_gives_its_signature():
    table = Path(variants.__path__[0], "README.md").read_text(encoding="utf-8")
    for name in train_gpt.SEAMS:
        seam = getattr(train_gpt, name)
        row = re.search(rf"`{name}\(([^`]*)\)`", table)
        assert row, f"variants/README.md does not describe the seam {name}"
        if inspect.isfunction(seam):
            signature = [part.split("=")[0].strip() for part in row[1].split(",")]
            assert signature == list(inspect.signature(seam).parameters), name


# ---- Schedules --------------------------------------------------------------


def schedules(**options):
    module = variants.load("schedules")
    return module, module.Options(**options)


def test_linear_rate_is_the_baselines():
    module, options = schedules(rate="linear")
    config = Config(decay_fraction=0.6)
    for progress in np.linspace(0, 0.999, 50):
        assert module.learning_rate(config, progress, options) == train_gpt.schedule_learning_rate(config, progress)


def test_rates_at_points():
    module, cosine = schedules(rate="cosine", end=0.1)
    config = Config(decay_fraction=0.5)
    assert module.learning_rate(config, 0.0, cosine) == 1
    assert module.learning_rate(config, 0.5, cosine) == pytest.approx(0.55)
    _, wsd = schedules(rate="wsd", fall=0.25, warmup=0.1)
    assert module.learning_rate(config, 0.05, wsd) == pytest.approx(0.5)
    assert module.learning_rate(config, 0.7, wsd) == 1
    assert module.learning_rate(config, 0.9375, wsd) == pytest.approx(1 - math.sqrt(0.75))
    _, falling = schedules(momentum_end=0.5)
    assert module.momentum(config, 1.0, falling, train_gpt.schedule_momentum) == pytest.approx(0.5)
    ends = schedules(beta2_end=0.99)[1]
    assert module.adam_betas(config, 0.0, ends) == (0.8, 0.95)
    assert module.adam_betas(config, 0.99, ends) == pytest.approx((0.8, 0.99))
    assert module.adam_betas(config, 0.5, ends) == pytest.approx((0.8, 0.95 + 0.04 * 8 / 15))


def test_optimizers_follow_the_schedules(monkeypatch):
    """Rate, decay, momentum and betas that arrive at an update are what the four functions say at that progress."""
    config = make_config(TINY)
    model = train_gpt.build_model(config, ALONE)
    muon, adam = train_gpt.build_optimizers(model, config, ALONE)
    monkeypatch.setattr(train_gpt, "schedule_weight_decay", lambda config, progress: 3.0)
    monkeypatch.setattr(train_gpt, "schedule_momentum", lambda config, progress: progress / 2)
    monkeypatch.setattr(train_gpt, "schedule_adam_betas", lambda config, progress: (0.1, progress))
    seen = {}

    def note(name):
        def update(data, gradient, *arguments):
            seen[name] = [float(value) for value in arguments[2:]]
        return update

    muon.update, adam.update = note("muon"), note("adam")
    for optimizer in (muon, adam):
        optimizer.buckets = optimizer.buckets[:1]
        optimizer.step(0.5, 0.25)
    lr = muon.buckets[0].lr * 0.5
    assert seen["muon"][:3] == pytest.approx([lr, 3 * lr * config.weight_decay, 0.125])
    assert seen["adam"][2:] == pytest.approx([0.1, 0.25, 0.9, 0.75])


def test_the_rate_is_the_one_of_the_schedule(corpus, tmp_path, monkeypatch):
    factors = []
    step = train_gpt.ShardedOptimizer.step

    def note(self, lr_factor, progress):
        factors.append((lr_factor, progress))
        step(self, lr_factor, progress)

    monkeypatch.setattr(train_gpt.ShardedOptimizer, "step", note)
    run(corpus, tmp_path, "schedules:rate=cosine")
    assert factors[-1] == (pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2), 7 / 8)


# ---- The size of a step -----------------------------------------------------


def test_batch_schedule_keeps_tokens_and_order(corpus, tmp_path):
    """Half batches at first: more steps, as many tokens, and the rows of the baseline in its order."""
    facts = run(corpus, tmp_path, "batch_schedule:batch_until=0.5,rows_until=0.25", val_every=1)
    tokens = [point["tokens"] for point in facts["curve"]]
    assert np.diff(tokens).tolist() == [4 * T] * 8 + [8 * T] * 4
    assert facts["step"] == 12 and tokens[-1] == 8 * 8 * T

    loader = TokenLoader(make_config({**TINY, "data": str(corpus)}))
    fixed = torch.cat([loader.next_batch()[0] for _ in range(8)])
    loader = TokenLoader(make_config({**TINY, "data": str(corpus)}))
    varied = torch.cat([loader.next_batch(count)[0] for count in [4] * 8 + [8] * 4])
    assert torch.equal(fixed, varied)


def test_rows_are_cut_so_that_every_target_counts_once():
    rows = torch.arange(2 * (T + 1)).view(2, T + 1)
    short = train_gpt.cut_rows(rows, T // 4)
    assert short.shape == (8, T // 4 + 1)
    assert torch.equal(short[:, 1:].flatten(), rows[:, 1:].flatten())
    assert torch.equal(short[:, :-1].flatten(), rows[:, :-1].flatten())


def test_a_run_with_a_batch_schedule_resumes_exactly(corpus, tmp_path):
    spec = "batch_schedule:batch_until=0.5,rows_until=0.75"
    run(corpus, tmp_path, spec, keep_every=5)
    before = checkpoint(tmp_path)
    go_on(tmp_path / "run-step000005.pt")
    after = checkpoint(tmp_path)
    assert same_tensors(before["model"], after["model"]) and after["tokens"] == before["tokens"]


def test_sizes_that_do_not_divide_are_refused(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train_gpt, "schedule_batch", lambda config, progress: (8 * T, 5))
    assert train_gpt.main(arguments(corpus, tmp_path)) == 1
    assert "schedule_batch gives 256 tokens in rows of 5 at 0.000 of the run" in capfd.readouterr().err


# ---- Gradients --------------------------------------------------------------


def test_gradients_are_clipped_to_the_norm(corpus, tmp_path, plain, monkeypatch):
    norms = []
    treat = variants.load("gradient_clipping").treat

    def note(optimizers, *arguments):
        treat(optimizers, *arguments)
        buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]
        norms.append(math.sqrt(sum(bucket.grad.square().sum().item() for bucket in buckets)))

    monkeypatch.setattr(variants.load("gradient_clipping"), "treat", note)
    run(corpus, tmp_path / "clipped", "gradient_clipping:norm=0.01")
    assert len(norms) == 9 and norms == pytest.approx([0.01] * 9, rel=1e-3)  # the warm-up has one step
    run(corpus, tmp_path / "far", "gradient_clipping:norm=1e9")
    assert same_tensors(checkpoint(tmp_path / "far")["model"], checkpoint(plain)["model"])


# ---- Averages ---------------------------------------------------------------


@pytest.mark.parametrize("options", ["kind=ema,decay=0.5", "kind=last,count=3,every=2"])
def test_validation_and_checkpoint_see_the_average_and_training_goes_on(corpus, tmp_path, plain, options):
    run(corpus, tmp_path, f"weight_average:{options}")
    averaged, baseline = checkpoint(tmp_path), checkpoint(plain)
    assert same_tensors(averaged["trained"], baseline["model"])
    assert not same_tensors(averaged["model"], baseline["model"])
    assert averaged["curve"][0]["val_loss"] == baseline["curve"][0]["val_loss"]
    assert averaged["curve"][-1]["val_loss"] != baseline["curve"][-1]["val_loss"]

    # the average by hand from the plain run's kept weights
    name = "blocks.0.mlp.fc.weight"
    kept = [checkpoint(plain, f"run-step{step:06d}") for step in range(1, 8)]
    weights = [saved["model"][name] for saved in (*kept, baseline)]
    if "last" in options:
        expected = torch.stack([weights[i] for i in (3, 5, 7)]).mean(0)
    else:
        expected = weights[0].clone()
        for n, w in enumerate(weights[1:], 2):
            expected = expected.lerp(w, 1 - min(0.5, (1 + n) / (10 + n)))
    torch.testing.assert_close(averaged["model"][name], expected, rtol=1e-6, atol=1e-7)


def test_a_run_with_an_average_resumes_exactly(corpus, tmp_path):
    run(corpus, tmp_path, "weight_average", keep_every=5)
    before = checkpoint(tmp_path)
    go_on(tmp_path / "run-step000005.pt")
    after = checkpoint(tmp_path)
    assert same_tensors(before["model"], after["model"]) and same_tensors(before["trained"], after["trained"])


# ---- Weights that a source makes --------------------------------------------

SOURCES = ("seed_model:dim=16", "hypernetwork:hidden=8", "siren_weights:hidden=8",
           "cellular_automaton:hidden=8,steps=2")


@pytest.mark.parametrize("spec", SOURCES)
def test_one_product_a_step_gives_the_composites_gradients(spec):
    """Of three micro batches: weights made once against weights made within each pass, in float64."""
    gradients, rows = [], [(random_tokens(seed=n), random_tokens(seed=n + 3)) for n in (1, 2, 3)]
    for once in (True, False):
        model = scramble(build(spec), 0.05)
        source = model.source
        if once:
            source.hold()
        for tokens, targets in rows:
            (model(tokens, targets) / 3).backward()
        if once:
            assert not any(p.grad is not None for p in source.parameters())
            source.release()
        gradients.append(gradients_of(model))
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    bound = 100 * float_bound(257, torch.float32)  # logits are float32
    for name, expected in gradients[1].items():
        assert expected.any() and relative_rms(gradients[0][name], expected) < bound, name


def test_a_source_leaves_no_parameter_behind():
    model, baseline = build("seed_model:dim=16"), build()
    made = set(model.source.shapes)
    assert dict(model.named_parameters()).keys() == dict(baseline.named_parameters()).keys() - made | {"source.phi"}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    costs = [train_gpt.count_parameters(m) for m in (model, baseline)]
    written = sum(shape.numel() for shape in model.source.shapes.values())
    assert costs[0] == tuple(count - written + 16 for count in costs[1])


def test_costs_count_a_source_once_a_step(corpus):
    """A step of 256 tokens pays eight times as much for each of them as one of 2,048."""
    flops = []
    for batch_tokens in (8 * T, 64 * T):
        config = make_config({**TINY, "batch_tokens": batch_tokens, "data": str(corpus)})
        with variants.applied(("siren_weights:hidden=8",), config):
            flops.append(train_gpt.flops_per_token(config))
    baseline = train_gpt.flops_per_token(config)
    assert flops[0] - baseline == pytest.approx(8 * (flops[1] - baseline)) and flops[1] > baseline


def test_a_run_with_a_source_resumes_exactly_and_decodes(corpus, tmp_path):
    spec = "hypernetwork:hidden=8"
    run(corpus, tmp_path, spec, "weight_average:decay=0.5", keep_every=5)
    before = checkpoint(tmp_path)
    assert "blocks.0.mlp.fc.weight" not in before["model"] and "source.embeddings" in before["model"]
    go_on(tmp_path / "run-step000005.pt")
    after = checkpoint(tmp_path)
    assert same_tensors(before["model"], after["model"]) and same_tensors(before["trained"], after["trained"])

    # what a checkpoint's model says is what was validated
    config = train_gpt.config_from(after["config"], "test")
    with variants.applied((spec,), config):
        model = train_gpt.trained_model(after, config, ALONE)
        rows = torch.from_numpy(np.concatenate(train_gpt.validation_batches(config)))
        with torch.no_grad():
            loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).item()
        assert decodes_from_cache(model)
    assert loss == pytest.approx(after["curve"][-1]["val_loss"], rel=1e-5)


def test_a_validation_makes_the_weights_once(corpus, tmp_path, monkeypatch):
    """Not once a batch; and no gradient goes back from it."""
    hypernetwork, validate = variants.load("hypernetwork"), Trainer.validate
    runs, sizes, forward = [], [], hypernetwork.ChunkSource.forward

    def counted(self, batches):
        before = len(runs)
        loss = validate(self, batches)
        assert len(runs) == before + 1 and self.model.source.held is None
        sizes.append(len(batches))
        return loss

    monkeypatch.setattr(hypernetwork.ChunkSource, "forward", lambda self: runs.append(1) or forward(self))
    monkeypatch.setattr(Trainer, "validate", counted)
    run(corpus, tmp_path, "hypernetwork:hidden=8")
    assert sizes == [1, 2, 2, 2]  # the warm-up's, and the run's


def test_a_model_that_is_used_has_the_automatons_expectation():
    """Not the random masks of training, in what a checkpoint gives to texts and pictures."""
    config = make_config(TINY)
    with variants.applied(("cellular_automaton:p=0.5,steps=2,hidden=8",), config):
        saved = dict(model=scramble(train_gpt.build_model(config, ALONE), 0.1).state_dict())
        first, second = (train_gpt.trained_model(saved, config, ALONE) for _ in range(2))
    for name in first.source.shapes:
        tensors = [getattr(*model.source.readers[name][0]) for model in (first, second)]
        assert torch.equal(*tensors), name


@pytest.mark.slow
def test_on_several_ranks_a_source_has_the_composites_gradients(corpus, tmp_path):
    """
    Two ranks with two micro batches each: weights made once a step, and within every pass, where the gradients that
    ranks exchange are those of the composite. After a step from zero Adam's first moments are the gradients, scaled.
    Without QK-norm, under which gains of queries and keys have none but by rounding.
    """
    moments = []
    for refresh in ("step", "micro"):
        spec = f"hypernetwork:hidden=8,refresh={refresh}"
        words = arguments(corpus, tmp_path / refresh, spec, steps=1, micro_batch_tokens=2 * T, val_every=1)
        result = run_ranks({2: [*words, "--tied_embedding", "--no-zero_init_projections", "--no-qk_norm"]})
        assert result.returncode == 0, result.stderr[-3000:]
        adam = checkpoint(tmp_path / refresh)["optimizers"][1]
        moments.append({name: p for name, p in adam["state"]["mean"].items() if name.startswith("source.")})
    assert {"source.embeddings", "source.inner.weight", "source.gains.0"} < moments[0].keys()
    for name, expected in moments[1].items():
        assert expected.any() and relative_rms(moments[0][name], expected) < 100 * float_bound(257, torch.float32), name


@pytest.mark.slow
def test_a_source_holds_for_several_ranks(corpus, tmp_path):
    """Two ranks see the losses of one; reductions and updates go on under the product that ends a step."""
    specs = "seed_model:dim=32,lr=0.1", "gradient_clipping:norm=1"
    for number, words in enumerate((specs[:1], specs)):
        folders = {world: tmp_path / f"{number}-{world}" for world in (1, 2)}
        result = run_ranks({world: arguments(corpus, folder, *words) for world, folder in folders.items()})
        assert result.returncode == 0, result.stderr[-3000:]
        alone, shared = ([point["val_loss"] for point in facts_of(folder)["curve"]] for folder in folders.values())
        assert len(alone) > 2 and shared == pytest.approx(alone, rel=2e-5)
        one, two = (checkpoint(folder)["model"]["source.phi"] for folder in folders.values())
        assert one.abs().max() > 0.01 and (two - one).norm() <= 1e-3 * one.norm()


# ---- Auxiliary losses, dropout and smoothing --------------------------------


def test_more_tokens_are_predicted_in_training_only(corpus, tmp_path):
    """The auxiliary loss is what its formula says; validation's loss is that of the same weights without it."""
    config = make_config({**TINY, "data": str(corpus)})
    with variants.applied(("multi_token_prediction:ahead=2,weight=0.5",), config):
        model = train_gpt.build_model(config, ALONE)
    rows = torch.from_numpy(train_gpt.validation_batches(config)[0])
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        total, plain = model(tokens, targets), model.eval()(tokens, targets)
        x = model.run_blocks(*model.embed(tokens, model.masks(tokens)))
        expected = 0.0
        for distance in (1, 2):
            nats = []
            for b in range(len(rows)):
                for t in range(T - distance):
                    if 256 in rows[b, t + 1:t + 2 + distance]:
                        continue
                    h = model.final_norm(x[b, t] + model.distances[distance - 1](model.final_norm(x[b, t])))
                    nats.append(F.cross_entropy(model.head(h), rows[b, t + 1 + distance].long()))
            expected += 0.5 * torch.stack(nats).mean()
    torch.testing.assert_close(total - plain, expected, rtol=1e-4, atol=1e-5)


def test_dropout_and_smoothing_are_of_training_only(corpus):
    config = make_config({**TINY, "data": str(corpus)})
    plain = train_gpt.build_model(config, ALONE)
    with variants.applied(("regularization:dropout=0.5,smoothing=0.2",), config):
        model = train_gpt.build_model(config, ALONE)
    for p, q in zip(model.parameters(), plain.parameters()):
        p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
        q.data.copy_(p.data)
    rows = torch.from_numpy(train_gpt.validation_batches(config)[0])
    arguments = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*arguments), plain.eval()(*arguments))
        model.train()
        assert model(*arguments) != model(*arguments)  # dropout draws anew

        for residual in (module for module in model.modules() if hasattr(module, "dropout")):
            residual.dropout = 0.0
        logits = plain(arguments[0]).flatten(0, 1)
        log_p = logits.log_softmax(-1)
        expected = 0.8 * F.nll_loss(log_p, arguments[1].flatten().long()) - 0.2 * log_p.mean()
        torch.testing.assert_close(model(*arguments), expected, rtol=1e-5, atol=1e-5)


# ---- Data -------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_variant(corpus):
    config = make_config({**TINY, "data": str(corpus)})

    def rows(spec):
        with variants.applied((spec,), config):
            loader = TokenLoader(config)
            rows = [loader.next_batch()[0] for _ in range(7)]  # less than the first shard
        return torch.cat(rows)

    tokens = torch.from_numpy(np.array(train_gpt.open_shard(corpus / "letters_train_000000.bin"), dtype=np.int32))
    sequential = rows("data_order:rows=sequential")
    start = next(i for i in range(T + 1) if torch.equal(tokens[i:i + T + 1], sequential[0]))
    assert torch.equal(sequential[1], tokens[start + T:start + 2 * T + 1])
    counts = [len(set(row[:-1].tolist())) for row in rows("data_order:rows=easy_first").unbind()]
    assert counts == sorted(counts)
    counts = [len(set(row[:-1].tolist())) for row in rows("data_order:rows=hard_first").unbind()]
    assert counts == sorted(counts, reverse=True)


def test_repeated_beginnings_are_read_once():
    module = variants.load("data_order")
    tokens = np.tile(np.arange(64, dtype=np.uint16), 4)
    starts = np.array([0, 64, 10, 128, 74])
    kept = module.order(Config(), tokens, starts, np.random.default_rng(0), module.Options(rows="unique"))
    assert len(kept) == 2 and sorted(start % 64 for start in kept) == [0, 10]


def test_a_mixture_repeats_and_leaves_out_shards(corpus):
    module = variants.load("data_order")
    assert module.mix(Config(), 0, 5, module.Options(mixture=(2, 1))) == [0, 1, 2, 3, 4, 0, 2, 4]
    config = make_config({**TINY, "data": str(corpus)})
    second = set(map(tuple, np.lib.stride_tricks.sliding_window_view(
        np.array(train_gpt.open_shard(corpus / "letters_train_000001.bin")), T + 1).tolist()))
    with variants.applied(("data_order:mixture=0,1",), config):
        loader = TokenLoader(config)
        batches = [loader.next_batch()[0] for _ in range(12)]  # more than one epoch
        assert all(tuple(row.tolist()) in second for batch in batches for row in batch)
        state = loader.state
        again = TokenLoader(config)
        again.load_state_dict(state)
        assert torch.equal(again.next_batch()[0], loader.next_batch()[0])


@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory):
    """Training shards of 41 and 301 times T random letters, before n the one, from n on the other."""
    folder, random = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for number, (count, first) in enumerate(((41, "a"), (301, "n"))):
        tokens = random.integers(ord(first), ord(first) + 13, count * T)
        write_shard(folder / f"x_train_00000{number}.bin", tokens)
    write_shard(folder / "x_val_000000.bin", tokens[:200])
    write_meta(folder, vocab_size=257, tokenizer="bytes")
    return folder


def places_of(folder) -> dict:
    """{a row's tokens: (shard, its number in the shard)}"""
    places = {}
    for shard in range(2):
        tokens = np.array(train_gpt.open_shard(folder / f"x_train_00000{shard}.bin"))
        for at, window in enumerate(np.lib.stride_tricks.sliding_window_view(tokens, T + 1).tolist()):
            places[tuple(window)] = shard, at // T
    return places


def read_places(folder, spec, count) -> list[list[tuple]]:
    """Where the rows of so many batches of 8 come from; a loader that is set back to the fifth reads the same."""
    config = make_config({**TINY, "data": str(folder)})
    places = places_of(folder)
    with variants.applied((spec,), config):
        loader = TokenLoader(config)
        batches = [loader.next_batch() for _ in range(count)]
        again = TokenLoader(config)
        again.load_state_dict(batches[4][1])
        assert torch.equal(again.next_batch()[0], batches[5][0])
    return [[places[tuple(row.tolist())] for row in rows] for rows, _ in batches]


@pytest.mark.parametrize("take", [(2, 6), (4, 4), (6, 2)])
def test_take_gives_every_batch_its_share(two_corpora, take):
    batches = read_places(two_corpora, f"data_order:rows=shuffled,take={take[0]},{take[1]}", 30)
    for batch in batches:
        assert [shard for shard, _ in batch] == [0] * take[0] + [1] * take[1]

    # a pass reads every row of a shard once, and the next one has another order
    numbers = [number for batch in batches for shard, number in batch if shard == 0]
    passes = [numbers[start:start + 40] for start in range(0, len(numbers) - 39, 40)]
    assert len(passes) == 30 * take[0] // 40 and all(sorted(numbers) == list(range(40)) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) == len(passes) and passes[0] != list(range(40))


def test_take_in_sequence(two_corpora):
    """The rows of a shard stand one behind the other, from visit to visit."""
    batches = read_places(two_corpora, "data_order:rows=sequential,take=2,6", 25)
    assert [number for batch in batches for _, number in batch[2:]] == list(range(150))
    assert [number for batch in batches for _, number in batch[:2]] == [*range(40), *range(10)]


def test_take_with_a_mixture(two_corpora):
    """An epoch visits the first shard twice; a shard that is left out is not read."""
    batches = read_places(two_corpora, "data_order:rows=sequential,mixture=2,1,take=3,2", 10)
    read = [place for batch in batches for place in batch]
    assert [shard for shard, _ in read] == [0, 0, 0, 1, 1, 0, 0, 0] * 10
    assert [number for shard, number in read if shard == 0][:40] == list(range(40))
    alone = read_places(two_corpora, "data_order:rows=shuffled,mixture=0,1,take=2", 6)
    assert {shard for batch in alone for shard, _ in batch} == {1}


@pytest.mark.parametrize("options, message", [
    (dict(rows="shuffled", take=(2, 0)), "has a visit without rows"),
    (dict(rows="easy_first", take=(2, 6)), "give rows=shuffled or rows=sequential")])
def test_take_is_refused(options, message):
    with pytest.raises(train_gpt.RunError, match=message):
        variants.load("data_order").Options(**options)


# ---- Extra facts ------------------------------------------------------------


def test_facts_stand_in_the_curve_and_leave_the_run_as_it_is(corpus, tmp_path, plain):
    noted, baseline = run(corpus, tmp_path, "stream_statistics"), facts_of(plain)
    assert [len(point["stream"]) for point in noted["curve"]] == [4, 4, 4]
    assert not any("stream" in point for point in baseline["curve"])
    assert [point["val_loss"] for point in noted["curve"]] == [point["val_loss"] for point in baseline["curve"]]
    assert same_tensors(checkpoint(tmp_path)["model"], checkpoint(plain)["model"])


def test_facts_are_of_the_model_as_it_is_validated(corpus, tmp_path):
    """Beside dropout: none in the facts' pass, which draws no random number of training."""
    dropout = "regularization:dropout=0.5"
    run(corpus, tmp_path / "dropout", dropout)
    run(corpus, tmp_path / "noted", dropout, "stream_statistics")
    assert same_tensors(checkpoint(tmp_path / "dropout")["model"], checkpoint(tmp_path / "noted")["model"])


def test_a_trainer_without_variants_needs_no_loader(corpus, tmp_path, capfd):
    assert train_gpt.main(arguments(corpus, tmp_path, "swiglu_mlp")) == 1
    assert "--variant needs the loader of variants" in capfd.readouterr().err
    assert Trainer(train_gpt.parse_config(arguments(corpus, tmp_path))).average is None


# ---- Several ranks ----------------------------------------------------------


def test_seams_hold_for_several_ranks(corpus, tmp_path):
    """Clipped gradients, an average and steps of several sizes: two ranks see the losses of one, and average alike."""
    specs = "gradient_clipping:norm=0.1", "weight_average:decay=0.5", "batch_schedule:batch_until=0.5,rows_until=0.25"
    result = run_ranks({world: arguments(corpus, tmp_path / str(world), *specs) for world in (1, 2)})
    assert result.returncode == 0, result.stderr[-3000:]
    alone, shared = ([(point["tokens"], point["val_loss"]) for point in facts_of(tmp_path / world)["curve"]]
                     for world in "12")
    assert len(alone) > 2 and [tokens for tokens, _ in alone] == [tokens for tokens, _ in shared]
    assert [loss for _, loss in shared] == pytest.approx([loss for _, loss in alone], rel=2e-5)
    one, two = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    for name, average in one["model"].items():
        assert (two["model"][name] - average).norm() <= 1e-3 * average.norm() + 1e-6, name
        assert not torch.equal(two["model"][name], two["trained"][name]) or not average.any(), name
