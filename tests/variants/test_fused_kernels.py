"""
fused_kernels: the same losses as the baseline's, where the kernels' references run, and on a GPU; when auto turns a
kernel on.
"""

import json

import pytest
import torch

import train_gpt
import variants
from benchmarks.timing import is_fastest, verdict
from tests.errors import float_bound, perturbed

ALL = "fused_kernels"
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
SMALL = dict(vocab_size=257, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=32,
             batch_tokens=128)


def losses_of(specs: tuple, ranks=ALONE, steps: int = 5, mode: str = "off", rounding: bool = False,
              **given) -> list[float]:
    """
    The losses of some training steps on rows of random bytes, float32 numbers as the trainer rounds them. rounding:
    from weights that are each off by one.
    """
    config = train_gpt.make_config(SMALL | given)
    shape = steps, config.batch_tokens // config.sequence_length, config.sequence_length + 1
    rows = torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(ranks.device)
    rows[:, :, 0] = 256
    with variants.applied(specs, config):
        model = train_gpt.build_model(config, ranks)
        if rounding:
            with torch.no_grad():
                for seed, p in enumerate(model.parameters()):
                    p.copy_(perturbed(p, seed))
        optimizers, losses = train_gpt.build_optimizers(model, config, ranks), []
        model.set_windows(0.0)
        train_gpt.compile_model(model, mode)
        for step in range(steps):
            loss = model(rows[step % 3, :, :-1].contiguous(), rows[step % 3, :, 1:].contiguous())
            loss.backward()
            for optimizer in optimizers:
                optimizer.step(1.0, step / steps)
            losses.append(loss.item())
    return losses


def baseline(**given):
    """
    The baseline's losses, to compare others with: within several times what one rounding of every weight makes of them,
    as differences of rounding grow from step to step.
    """
    losses = losses_of((), **given)
    grown = max(abs(a - b) / b for a, b in zip(losses_of((), rounding=True, **given), losses))
    return pytest.approx(losses, rel=max(8 * grown, float_bound(1, torch.float32)))


@pytest.fixture(scope="module")
def ten_steps():
    return baseline(steps=10)


@pytest.mark.parametrize("kernel", list(variants.load(ALL).KERNELS))
def test_the_same_losses(kernel, ten_steps):
    spec = ",".join(f"{name}={'on' if name == kernel else 'off'}" for name in variants.load(ALL).KERNELS)
    losses = losses_of((f"{ALL}:{spec}",), steps=10)
    assert losses[-1] < 0.9 * losses[0] and losses == ten_steps


def test_every_kernel_is_called(monkeypatch):
    module, called = variants.load(ALL), []
    expected = dict(
        relu_squared_feed_forward=4, softcapped_cross_entropy=1, norm_rotary=8, embedding_lookup=1, scaled_sum_norm=8,
        symmetric_product=2 * 5 * len(MUON_BUCKETS), nesterov=len(MUON_BUCKETS), normalised_step=len(MUON_BUCKETS),
        adam_step=ADAM_BUCKETS)

    def count(name):
        function = getattr(module, name)

        def counted(*arguments, **options):
            called.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    for name in expected:
        count(name)
    losses_of((ALL,), steps=1)
    assert {name: called.count(name) for name in set(called)} == expected


ADAM_BUCKETS = 3  # embeddings, the head, scalars and gates
MUON_BUCKETS = ((32, 32), (64, 32), (32, 64))  # q k v o; fc; proj


@pytest.mark.parametrize("given", [
    dict(qk_norm=False), dict(rope="none"), dict(logit_softcap=0.0), dict(x0_skip=False), dict(normuon_beta2=0.0)])
def test_without_the_parts_it_fuses(given):
    assert losses_of((ALL,), steps=5, **given) == baseline(steps=5, **given)


def test_replaced_linear_layers_are_left_alone(monkeypatch):
    class Doubled(train_gpt.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    monkeypatch.setattr(train_gpt, "Linear", Doubled)
    assert losses_of((ALL,), steps=5) == baseline(steps=5)


def test_replaced_tables_are_left_alone(monkeypatch):
    class Doubled(torch.nn.Embedding):
        def forward(self, tokens):
            return 2 * super().forward(tokens)
    monkeypatch.setattr(torch.nn, "Embedding", Doubled)
    plain = losses_of((), steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn, "Embedding", Doubled.__base__)
        assert losses_of((), steps=3) != plain
    others = [name for name in variants.load(ALL).KERNELS if name != "embedding"]
    assert losses_of((f"{ALL}:" + ",".join(f"{name}=off" for name in others),), steps=3) == plain


def test_collisions():
    config = train_gpt.make_config(SMALL)
    with pytest.raises(train_gpt.RunError, match="MLP.forward and MLP, one a part of the other; leave one out"):
        variants.apply((ALL, "swiglu_mlp"), config)
    with variants.applied((f"{ALL}:feed_forward=off", "swiglu_mlp"), config) as changed:
        assert changed["swiglu_mlp"] == ["MLP"]


@pytest.fixture
def write_result(monkeypatch, tmp_path):
    """write_result(name, facts) makes a result file of a benchmark in a folder that takes the place of the real one."""
    monkeypatch.setattr(variants.load(ALL), "RESULTS", tmp_path)
    return lambda name, **facts: (tmp_path / f"{name}.json").write_text(json.dumps(facts))


def turned_on_by_auto() -> list[str]:
    module = variants.load(ALL)
    options = module.Options(**dict.fromkeys(module.KERNELS, "auto"))
    return [name for name in module.KERNELS if getattr(options, name) == "on"]


def test_auto_needs_a_measured_win(monkeypatch, write_result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(train_gpt.RunError, match="no kernel is on: .* has no win on this device"):
        turned_on_by_auto()
    write_result("norm_rotary-nvidia-a100", capability=[8, 0], triton_is_fastest=True)
    write_result("norm_rotary-nvidia-h100", capability=[9, 0], triton_is_fastest=False)
    write_result("symmetric_product-nvidia-h100", capability=[9, 0], triton_is_fastest=True)
    assert turned_on_by_auto() == ["muon"]
    write_result("symmetric_product-nvidia-h100-quick", capability=[9, 0], triton_is_fastest=False)
    with pytest.raises(train_gpt.RunError, match="no kernel is on"):
        turned_on_by_auto()


def test_auto_on_a_cpu_needs_a_win_of_the_loops_on_every_one(monkeypatch, write_result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_result("symmetric_product-nvidia-h100", capability=[9, 0], triton_is_fastest=True)
    # of before there were loops: it says nothing about them
    write_result("embedding_lookup-amd", capability=None, triton_is_fastest=False)
    with pytest.raises(train_gpt.RunError, match="no kernel is on"):
        turned_on_by_auto()
    for name in ("norm_rotary", "residual_norm"):
        write_result(f"{name}-amd", capability=None, loops_are_fastest=True)
    write_result("residual_norm-intel", capability=None, loops_are_fastest=False)
    assert turned_on_by_auto() == ["rotary"]
    monkeypatch.setattr(variants.load(ALL), "has_cpu_loops", lambda: False)
    with pytest.raises(train_gpt.RunError, match="no kernel is on"):
        turned_on_by_auto()


def test_fp8_without_its_kernel():
    with pytest.raises(train_gpt.RunError, match="fp8=on is of the cross-entropy's kernel"):
        variants.apply((f"{ALL}:cross_entropy=off,fp8=on",), train_gpt.make_config(SMALL))


def test_what_is_fastest():
    both = "forward + backward"
    medians = [("triton", "forward", 5.0), ("triton", both, 3.0), ("reference", both, 4.0), ("copy", both, 1.0)]
    rows = [dict(N=n, arm=arm, what=what, median=ms) for n in (1, 2) for arm, what, ms in medians]
    assert is_fastest("triton", rows, ("N",))
    assert not is_fastest("triton", rows + [dict(N=2, arm="compiled", what=both, median=2.9)], ("N",))
    wrong = [dict(N=3, arm="triton", what="check", fault="wrong"), dict(N=3, arm="reference", what=both, median=9.0)]
    assert not is_fastest("triton", rows + wrong, ("N",))
    assert not is_fastest("triton", [row for row in rows if row["arm"] == "triton"], ("N",))
    assert not is_fastest("triton", [], ("N",))


def test_on_a_cpu_compiled_arms_do_not_compete():
    medians = {"loops": 3.0, "trainer": 4.0, "trainer, compiled": 2.0, "copy": 1.0}
    for more, is_fastest_arm in ({}, True), (dict(reference=2.9), False):
        rows = [dict(N=1, arm=arm, what="step", median=ms) for arm, ms in (medians | more).items()]
        assert verdict(torch.device("cpu"), rows, ("N",), ("copy",)) == dict(loops_are_fastest=is_fastest_arm)


def test_compiled_blocks_have_the_same_losses():
    """Whole graphs with the loops in them; no C++ compiler is needed."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        compile_module = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile",
                      lambda self, **options: compile_module(self, backend="aot_eager", **options))
        assert losses_of((ALL,), steps=3, mode="blocks") == baseline(steps=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["off", "model", "blocks"])
def test_the_same_losses_on_a_gpu(mode):
    ranks = train_gpt.Ranks(0, 1, torch.device("cuda"), torch.bfloat16)
    given = dict(model_dim=256, heads=2, head_dim=128, mlp_hidden=1024, sequence_length=256, batch_tokens=4096,
                 steps=10)
    torch._dynamo.reset()
    plain = losses_of((), ranks, mode=mode, **given)
    torch._dynamo.reset()
    assert losses_of((ALL,), ranks, mode=mode, **given) == pytest.approx(plain, rel=2e-2)
