"""
orthogonal_residual: every form against its formula in float64, its own backward pass, what the split promises, and the
plain residual bit for bit.
"""

import math

import pytest
import torch

import train_gpt
import variants
from tests.errors import float_bound, perturbed, relative_rms, rounding_bound
from variants.orthogonal_residual import FORMS, Options, OrthogonalMix, add_along_output

SMALL = dict(vocab_size=257, layers=2, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=32,
             batch_tokens=128)
CONFIG = train_gpt.make_config(SMALL)
ALONE = train_gpt.Ranks(0, 1, torch.device("cpu"), torch.float32)
ZERO, ONE = torch.zeros(()), torch.ones(())


def build(spec: str = "") -> train_gpt.GPT:
    with variants.applied((spec,) if spec else (), CONFIG):
        return train_gpt.build_model(CONFIG, ALONE)


def residual(options: str) -> torch.nn.Module:
    return build(f"orthogonal_residual:{options}").blocks[0].mlp_residual


def pair(*shape: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


def mix(x, y, alpha, beta, eps=1e-8, add=False):
    alpha, beta = (torch.as_tensor(gate, dtype=x.dtype) for gate in (alpha, beta))
    return OrthogonalMix.apply(x, y, alpha, beta, eps, add)


def coefficient(x, y):
    return (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True)


def along(x, y):
    return coefficient(x, y) * x


def across(x, y):
    return y - along(x, y)


EXPECTED = {  # of x, y, gates a and b of random size
    "split": lambda x, y, a, b: x + a * across(x, y) + b * along(x, y),
    "layerscale": lambda x, y, a, b: x + a * y,
    "orthogonal": lambda x, y, a, b: x + across(x, y),
    "orthogonal_scaled": lambda x, y, a, b: x + a * across(x, y),
    "angle": lambda x, y, a, b: x + torch.sin(a) * across(x, y) + torch.cos(a) * along(x, y),
    "stream_scale": lambda x, y, a, b: a * x + y,
    "published": lambda x, y, a, b: x + a * across(x, y) + b * coefficient(x, y) / y.sum(-1, keepdim=True) * y,
    "l2": lambda x, y, a, b: x + a * across(x, y) + b * coefficient(x, y) / y.norm(dim=-1, keepdim=True) * y}
WITHOUT_CHANNELS = ("orthogonal", "stream_scale")  # which have no gates for channels


@pytest.mark.parametrize("form, gates", [(form, gates) for form in EXPECTED for gates in ("scalar", "channel")
                                         if gates == "scalar" or form not in WITHOUT_CHANNELS])
def test_form(form, gates):
    assert set(EXPECTED) == set(FORMS)
    module = residual(f"form={form},gates={gates},guard_kappa=0")
    learned = dict(module.named_parameters())
    shape = (32,) if gates == "channel" else ()
    assert set(learned) == set(FORMS[form]) and all(p.shape == shape and not p.any() for p in learned.values())

    # gates that have moved
    begin = dict(alpha=1.0, beta=1.0, angle=math.pi / 4, scale=1.0)
    drift = {name: 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for name in learned}
    with torch.no_grad():
        for name, p in learned.items():
            p.copy_(drift[name])
    value = {name: begin[name] + drift[name].double() for name in learned}
    a, b = value.get("alpha", value.get("angle", value.get("scale"))), value.get("beta")

    x, y = pair(2, 5, 32)
    bound = float_bound(32, torch.float32)
    if form == "published":  # it divides by a sum that can nearly cancel
        bound *= (y.abs().sum(-1) / y.sum(-1).abs()).max().item()
    torch.testing.assert_close(module(x.float(), y.float()), EXPECTED[form](x, y, a, b).float(), rtol=bound, atol=bound)
    module(x.float(), y.float().requires_grad_()).square().sum().backward()
    assert all(p.grad.any() for p in learned.values())


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [(), (6,)])
def test_backward_pass(shape, add):
    x, y = pair(2, 4, 6)
    x[0, 0], x[1, 1], y[1, 2] = 1e-3 * x[0, 0], 0.0, 0.0  # below eps, a row of zeros, a branch that says nothing
    noise = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alpha, beta = torch.tensor([0.7, 1.2], dtype=torch.float64).view(2, *[1] * len(shape)) + 0.1 * noise
    tensors = [t.requires_grad_() for t in (x, y, alpha, beta)]
    assert torch.autograd.gradcheck(lambda *t: OrthogonalMix.apply(*t, 1e-4, add), tensors, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("form,guard", [("published", 0.5), ("l2", 0.01), ("published", 1e-2)])
def test_backward_of_the_published_forms(form, guard):
    x, y = pair(2, 4, 6)
    alpha, beta = (torch.full((6,), value, dtype=torch.float64) for value in (0.7, 1.2))
    options = Options(form=form, guard_kappa=guard)
    tensors = [t.requires_grad_() for t in (x, y, alpha, beta)]
    assert torch.autograd.gradcheck(lambda *t: add_along_output(*t, options), tensors)
    x, y = x.detach(), y.detach()
    size = y.sum(-1, keepdim=True) if form == "published" else y.norm(dim=-1, keepdim=True)
    least = guard * y.norm(dim=-1, keepdim=True)
    size = torch.where(size < 0, -1.0, 1.0) * torch.maximum(size.abs(), least)
    expected = x + 0.7 * across(x, y) + 1.2 * coefficient(x, y) / size * y
    torch.testing.assert_close(add_along_output(x, y, alpha.detach(), beta.detach(), options), expected)


def test_a_branch_of_zeros():
    x, zero = pair(3, 8)[0], torch.zeros(3, 8, dtype=torch.float64)
    gates = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    for form in ("published", "l2"):
        y = zero.clone().requires_grad_()
        z = add_along_output(x, y, *gates, Options(form=form))
        z.sum().backward()
        assert torch.equal(z, x) and y.grad.isfinite().all()
        unguarded = add_along_output(x, zero, *gates, Options(form=form, guard_kappa=0.0))
        assert unguarded.isnan().all()  # as published
    assert torch.equal(mix(x, zero, 0.3, 0.6), x)


def test_identity_is_the_sum_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        x, y = pair(4, 7, 33, dtype=dtype)
        x[0, 0] = 0
        assert torch.equal(OrthogonalMix.apply(x, y, ONE, ONE, 1e-8, False), x + y)
        assert torch.equal(OrthogonalMix.apply(x, y, torch.ones(33), torch.ones(33), 1e-8, True), x + y)


def test_what_the_split_promises():
    def norm(t):
        return t.norm(dim=-1, keepdim=True)

    x, y = pair(64, 48)
    alpha, beta = 0.6, 1.3
    z = mix(x, y, alpha, beta)
    gain = 1 + beta * coefficient(x, y)
    y_perp = across(x, y)

    # norm and direction
    torch.testing.assert_close(norm(z).square(), (gain * norm(x)).square() + alpha ** 2 * norm(y_perp).square())
    direction = x + alpha / gain * y_perp
    torch.testing.assert_close(z / norm(z), torch.where(gain > 0, 1.0, -1.0) * direction / norm(direction))

    # of multiples, of what lies along, across, and of a stream of zeros
    torch.testing.assert_close(mix(3 * x, 3 * y, alpha, beta), 3 * z)
    torch.testing.assert_close(mix(x, 0.4 * x, alpha, beta), (1 + beta * 0.4) * x)
    torch.testing.assert_close(mix(x, y_perp, alpha, beta), x + alpha * y_perp)
    torch.testing.assert_close(mix(torch.zeros_like(x), y, alpha, beta), alpha * y)
    x32, y32 = x.float(), y.float()
    rest = mix(x32, y32, 1.0, 0.0) - x32
    assert ((rest * x32).sum(-1).abs() / (x32.norm(dim=-1) * y32.norm(dim=-1))).max() < float_bound(48, torch.float32)


def test_only_scalar_gates_turn_with_the_stream():
    x, y = pair(16, 12)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    torch.testing.assert_close(mix(x @ turn, y @ turn, 0.6, 1.3), mix(x, y, 0.6, 1.3) @ turn)
    gates = torch.linspace(0.2, 1.5, 12, dtype=torch.float64), torch.linspace(1.5, 0.2, 12, dtype=torch.float64)
    assert not torch.allclose(mix(x @ turn, y @ turn, *gates), mix(x, y, *gates) @ turn, atol=1e-2)


def test_half_precision_computes_the_coefficient_in_single():
    x, y = pair(64, 768, dtype=torch.float32)
    low = OrthogonalMix.apply(x.bfloat16(), y.bfloat16(), ONE, ZERO, 1e-8, False)
    high = mix(x.bfloat16().double(), y.bfloat16().double(), 1.0, 0.0)
    assert low.dtype == torch.bfloat16 and relative_rms(low, high) < rounding_bound(1, torch.bfloat16)
    big = OrthogonalMix.apply((1e3 * x).half(), (1e3 * y).half(), ONE, ZERO, 1e-8, False)
    assert big.isfinite().all()  # squares of 300 and more would not be


def test_initial_gates():
    model = build("orthogonal_residual:init=published,gates=channel")
    residuals = [module for block in model.blocks for module in (block.attention_residual, block.mlp_residual)]
    alpha, beta = (torch.cat([getattr(module, name) + module.begin[name] for module in residuals])
                   for name in ("alpha", "beta"))
    assert alpha.std().item() == pytest.approx(0.5, rel=0.2) and beta.std().item() == pytest.approx(0.25, rel=0.2)
    assert alpha.mean().item() == pytest.approx(0.25, abs=0.15) and beta.mean().item() == pytest.approx(0.15, abs=0.08)
    module = residual("alpha=0.5,beta=2,gates=fixed")
    x, y = pair(3, 32, dtype=torch.float32)
    assert not list(module.parameters())
    torch.testing.assert_close(module(x, y), mix(x.double(), y.double(), 0.5, 2.0).float(),
                               rtol=float_bound(32, torch.float32), atol=float_bound(32, torch.float32))


def test_sites():
    for sites, counts in (("both", (2, 2)), ("attention", (2, 0)), ("mlp", (0, 2))):
        block = build(f"orthogonal_residual:sites={sites}").blocks[1]
        residuals = block.attention_residual, block.mlp_residual
        assert tuple(len(list(module.parameters())) for module in residuals) == counts


def adam_buckets(model) -> list[train_gpt.Bucket]:
    return train_gpt.build_optimizers(model, CONFIG, ALONE)[1].buckets


def test_optimizer_of_the_gates():
    model = build("orthogonal_residual:gate_lr_mul=3,gate_wd_mul=0.5")
    gate = model.blocks[0].mlp_residual.beta
    bucket, = [bucket for bucket in adam_buckets(model) if any(p is gate for p in bucket.parameters)]
    assert len(bucket.parameters) == 8
    assert (bucket.lr, bucket.weight_decay) == (3 * CONFIG.lr_scalar, 0.5 * CONFIG.weight_decay)
    assert {bucket.weight_decay for bucket in adam_buckets(build("orthogonal_residual"))} == {0.0}


def losses(spec: str, steps: int = 20) -> list[float]:
    model, tokens = build(spec), torch.randint(257, (steps, 4, 33), generator=torch.Generator().manual_seed(7))
    model.set_windows(1.0)
    optimizers, result = train_gpt.build_optimizers(model, CONFIG, ALONE), []
    for step, rows in enumerate(tokens):
        loss = model(rows[:, :-1].int(), rows[:, 1:]).mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(1.0, step / steps)
        result.append(loss.item())
    return result


def test_twenty_steps_of_the_identity_are_those_of_the_baseline():
    baseline = losses("")
    assert baseline[-1] != baseline[0] and losses("orthogonal_residual:gates=fixed") == baseline
    assert losses("orthogonal_residual") != baseline


@pytest.mark.parametrize("options", [
    "form=split", "form=split,gates=channel,init=published", "form=layerscale", "form=orthogonal,eps_mode=add",
    "form=angle", "gates=fixed", "sites=mlp"])
def test_the_kernel_computes_the_same(options):
    """
    Attention's residual and the feed-forward's norm as one operation, here by its reference: loss and every gradient,
    within several times what one rounding of every weight makes of them, the most of three drawings: of a single number
    one drawing may be small by luck.
    """
    results, tokens = {}, torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(2))
    for kernel, rounding in (("off", 0), ("on", 0), ("off", 1), ("off", 2), ("off", 3)):
        model = build(f"orthogonal_residual:{options},kernel={kernel}")
        assert (type(model.blocks[0]).__name__ == "FusedBlock") == (kernel == "on")
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
                if rounding:
                    p.copy_(perturbed(p, p.numel() + rounding))
        model.set_windows(1.0)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results[kernel, rounding] = [loss.detach(), *(p.grad for p in model.parameters())]
    arms = [results["on", 0], results["off", 0], *(results["off", rounding] for rounding in (1, 2, 3))]
    for fused, expected, *rounded in zip(*arms, strict=True):
        lost = max(relative_rms(gradient, expected) for gradient in rounded)
        assert relative_rms(fused, expected) <= max(8 * lost, float_bound(32, torch.float32))


def test_the_kernel_wants_the_trainer_s_norm(monkeypatch):
    monkeypatch.setattr(train_gpt, "Norm", type("Other", (train_gpt.Norm,), {}))
    with pytest.raises(train_gpt.RunError, match="kernel=on computes the trainer's own norm"):
        build("orthogonal_residual:kernel=on")


@pytest.mark.parametrize("options, message", [
    ("form=l2,kernel=on", "form=l2 is not what the kernel computes"),
    ("eps=0", "eps=0.0: give a number above 0"),
    ("alpha=nan", "give finite numbers"),
    ("alpha_std=-1", "a standard deviation is 0 or above"),
    ("guard_kappa=2", "give a share of |y| from 0 to 1"),
    ("gate_lr_mul=0", "give a factor above 0"),
    ("gates=fixed,init=published", "gates=fixed are two numbers"),
    ("form=orthogonal,gates=channel", "form=orthogonal has no gates for channels"),
    ("form=stream_scale,gates=channel", "form=stream_scale has no gates for channels")])
def test_faults(options, message):
    with pytest.raises(train_gpt.RunError, match="variant orthogonal_residual: ") as error:
        build(f"orthogonal_residual:{options}")
    assert message in str(error.value) and "\n" not in str(error.value)
