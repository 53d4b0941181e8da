"""
Cross-entropy of softcapped logits: the fused kernel beside the trainer's loss and the reference with all logits at once, both compiled.

    python benchmarks/softcapped_cross_entropy.py             all sizes, on a GPU if there is one
    python benchmarks/softcapped_cross_entropy.py --quick     one small size: under a minute
    python benchmarks/softcapped_cross_entropy.py --sizes N=65536,D=768 N=65536,D=1024

One table, and benchmarks/results/softcapped_cross_entropy-<device>.json, written after every size. Arms take turns; the kernel's tests run first (on a CPU those of
the reference and of the loops), and an arm is timed only if its loss and gradients are those of the reference in float64. "forward": the loss alone, without gradients; "forward +
backward": with both. Weights are float32, as the trainer's. "% of product rate": the time that the 2 N D V FLOPs of the logits, or the 6 N D V of all three products,
would take at the rate of a large product measured in the same run.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.timing import Place, fault_of, kernel_benchmark, rows_in_turn
from kernels.softcapped_cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_reference
from train_gpt import SoftcappedCrossEntropy, loss_of_chunk

import torch

FILE = "tests/kernels/test_softcapped_cross_entropy.py"
TESTS = {"cpu": [f"{FILE}::{name}" for name in ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager", "test_loops")], "cuda": [FILE]}
sizes = lambda tokens, widths, V: [dict(N=N, D=D, V=V) for D in widths for N in tokens]
SIZES = {"cpu": sizes([2048], [128], 264) + sizes([512, 2048], [64], 4096), "cuda": sizes([16_384, 65_536], [768, 1024], 50_304)}
QUICK = {"cpu": sizes([256], [64], 1024), "cuda": sizes([16_384], [768], 50_304)}
SOFTCAP, CHUNK = 15.0, 4096
FP8 = "triton, fp8"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, FP8: 1e-1}  # relative RMS error of each gradient; of the loss a tenth


def make_inputs(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, targets, for logits of standard deviation 1."""
    generator = torch.Generator(device).manual_seed(0)
    x, weight = torch.randn(N, D, device=device, generator=generator).to(dtype), torch.randn(V, D, device=device, generator=generator) / D ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,), device=device, generator=generator)


def trainer_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """LanguageModelHead's sum, with and without gradients."""
    if torch.is_grad_enabled():
        return SoftcappedCrossEntropy.apply(x, weight, targets, SOFTCAP, CHUNK)
    weight = weight.type_as(x)
    return sum(loss_of_chunk(part, weight, target, SOFTCAP)[0] for part, target in zip(x.split(CHUNK), targets.split(CHUNK)))


def contenders(device: torch.device) -> dict:
    """{arm: function(x, weight, targets) -> loss}"""
    torch.compiler.reset()  # what is compiled for other sizes counts towards the number after which nothing more is
    arms = {"triton": partial(softcapped_cross_entropy, softcap=SOFTCAP, chunk=CHUNK, backend="triton")} if device.type == "cuda" else {}
    if device.type == "cpu":
        arms = {"loops": partial(softcapped_cross_entropy, softcap=SOFTCAP, chunk=CHUNK, backend="loops"), "trainer": trainer_loss}
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        arms[FP8] = partial(arms["triton"], fp8=True)
    reference = partial(softcapped_cross_entropy_reference, softcap=SOFTCAP)
    return arms | {"trainer, compiled": torch.compile(trainer_loss, dynamic=False), "reference, compiled": torch.compile(reference, dynamic=False)}


def both_passes(function, inputs: tuple) -> list[torch.Tensor]:
    loss = function(*inputs)
    return [loss, *torch.autograd.grad(loss, inputs[:2])]


def loss_alone(function, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return function(*inputs)


def exact(inputs: tuple, rows: int = CHUNK) -> list[torch.Tensor]:
    """both_passes of the reference in float64, on the weight in x's dtype, some rows at a time."""
    x, weight, targets = inputs[0].detach(), inputs[1].detach().to(inputs[0].dtype).double().requires_grad_(), inputs[2]
    parts = [both_passes(partial(softcapped_cross_entropy_reference, softcap=SOFTCAP), (part.double().requires_grad_(), weight, target))
             for part, target in zip(x.split(rows), targets.split(rows))]
    losses, dx, dw = zip(*parts)
    return [torch.stack(losses).sum().detach(), torch.cat(dx), sum(dw)]


def measure(place: Place, N: int, D: int, V: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, inputs, arms = dict(N=N, D=D, V=V), make_inputs(N, D, V, place.device, place.dtype), contenders(place.device)
    expected, faults = exact(inputs), {}
    for arm, function in arms.items():
        tolerance = TOLERANCE[FP8 if arm == FP8 else place.dtype]
        if found := fault_of(lambda: [loss_alone(function, inputs), *both_passes(function, inputs)], [expected[0], *expected], [tolerance / 10] * 2 + [tolerance] * 2):
            faults[arm] = found
    del expected
    rows = [case | dict(arm=arm, what="check", fault=found) for arm, found in faults.items()]
    for what, call, products in (("forward", loss_alone, 1), ("forward + backward", both_passes, 3)):
        rows += rows_in_turn(place, case, what, {arm: partial(call, function, inputs) for arm, function in arms.items() if arm not in faults}, flops=products * 2 * N * D * V)
    return rows


if __name__ == "__main__":
    sys.exit(kernel_benchmark("softcapped_cross_entropy", __doc__, measure, TESTS, SIZES, QUICK, others=(FP8,)))
