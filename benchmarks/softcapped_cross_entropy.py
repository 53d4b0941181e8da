"""
Cross-entropy of softcapped logits: the fused kernel beside the trainer's loss and the reference with all logits at
once, both compiled.

    python -m benchmarks.softcapped_cross_entropy             all sizes, on a GPU if there is one
    python -m benchmarks.softcapped_cross_entropy --quick     one small size: under a minute
    python -m benchmarks.softcapped_cross_entropy --sizes N=65536,D=768 N=65536,D=1024

One table, and benchmarks/results/softcapped_cross_entropy-<device>.json, written after every size. Arms take turns; the
kernel's tests run first (on a CPU those of the reference and of the loops), and an arm is timed only if its loss and
gradients are those of the reference in float64. "forward": the loss alone, without gradients; "forward + backward":
with both. Weights are float32, as the trainer's. "% of product rate": the time that the 2 N D V FLOPs of the logits, or
the 6 N D V of all three products, would take at the rate of a large product measured in the same run.
"""

import sys
from functools import partial

import torch

from benchmarks.timing import Place, compile_arms, fault_of, fault_rows, kernel_benchmark, rows_in_turn, sizes
from kernels.softcapped_cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_reference
from train_gpt import SoftcappedCrossEntropy, loss_of_chunk

FILE = "tests/kernels/test_softcapped_cross_entropy.py"
CPU_TESTS = ("test_reference_is_the_definition", "test_gradcheck", "test_compiled_reference_equals_eager",
             "test_loops")
TESTS = {"cpu": [f"{FILE}::{name}" for name in CPU_TESTS], "cuda": [FILE]}
SIZES = {
    "cpu": sizes("N D V", (2048, 128, 264), (512, 64, 4096), (2048, 64, 4096)),
    "cuda": sizes("N D V", *((N, D, 50_304) for D in (768, 1024) for N in (16_384, 65_536))),
}
QUICK = {"cpu": sizes("N D V", (256, 64, 1024)), "cuda": sizes("N D V", (16_384, 768, 50_304))}
SOFTCAP, CHUNK = 15.0, 4096
FP8 = "triton, fp8"
TOLERANCE = {  # relative RMS error of each gradient; of the loss a tenth
    torch.float32: 2e-5, torch.bfloat16: 1e-2, FP8: 1e-1}
REFERENCE = partial(softcapped_cross_entropy_reference, softcap=SOFTCAP)


def make_inputs(N: int, D: int, V: int, place: Place) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, targets, for logits of standard deviation 1."""
    options = dict(device=place.device, generator=torch.Generator(place.device).manual_seed(0))
    x = torch.randn(N, D, **options).to(place.dtype)
    weight = torch.randn(V, D, **options) / D ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,), **options)


def trainer_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """LanguageModelHead's sum, with and without gradients."""
    if torch.is_grad_enabled():
        return SoftcappedCrossEntropy.apply(x, weight, targets, SOFTCAP, CHUNK)
    weight = weight.type_as(x)
    chunks = zip(x.split(CHUNK), targets.split(CHUNK))
    return sum(loss_of_chunk(rows, weight, target, SOFTCAP)[0] for rows, target in chunks)


def contenders(device: torch.device) -> dict:
    """{arm: function(x, weight, targets) -> loss}"""
    kernel = partial(softcapped_cross_entropy, softcap=SOFTCAP, chunk=CHUNK)
    if device.type == "cpu":
        arms = {"loops": partial(kernel, backend="loops"), "trainer": trainer_loss}
    else:
        arms = {"triton": partial(kernel, backend="triton")}
        if torch.cuda.get_device_capability() >= (8, 9):
            arms[FP8] = partial(arms["triton"], fp8=True)
    return arms | compile_arms(trainer=trainer_loss, reference=REFERENCE)


def both_passes(function, inputs: tuple) -> list[torch.Tensor]:
    """The loss and the gradients of x and weight."""
    loss = function(*inputs)
    return [loss, *torch.autograd.grad(loss, inputs[:2])]


def loss_alone(function, inputs: tuple) -> torch.Tensor:
    with torch.no_grad():
        return function(*inputs)


def exact(inputs: tuple, rows: int = CHUNK) -> list[torch.Tensor]:
    """both_passes of the reference in float64, on the weight in x's dtype, some rows at a time."""
    x, weight, targets = inputs
    x = x.detach()
    weight = weight.detach().to(x.dtype).double().requires_grad_()
    chunks = [both_passes(REFERENCE, (chunk.double().requires_grad_(), weight, target))
              for chunk, target in zip(x.split(rows), targets.split(rows))]
    losses, dx, dw = zip(*chunks)
    return [torch.stack(losses).sum().detach(), torch.cat(dx), sum(dw)]


def faults_in(arms: dict, inputs: tuple, dtype: torch.dtype) -> dict[str, str]:
    """{arm: fault} of those whose loss, with and without gradients, or gradients are wrong."""
    expected, faults = exact(inputs), {}
    for arm, function in arms.items():
        tolerance = TOLERANCE[FP8 if arm == FP8 else dtype]
        fault = fault_of(lambda function=function: [loss_alone(function, inputs), *both_passes(function, inputs)],
                         [expected[0], *expected], [tolerance / 10] * 2 + [tolerance] * 2)
        if fault:
            faults[arm] = fault
    return faults


def measure(place: Place, N: int, D: int, V: int) -> list[dict]:
    """A row of results for every arm, forward and forward + backward."""
    case, inputs = dict(N=N, D=D, V=V), make_inputs(N, D, V, place)
    arms = contenders(place.device)
    faults = faults_in(arms, inputs, place.dtype)
    rows = fault_rows(case, faults)
    for what, call, products in (("forward", loss_alone, 1), ("forward + backward", both_passes, 3)):
        calls = {arm: partial(call, function, inputs) for arm, function in arms.items() if arm not in faults}
        rows += rows_in_turn(place, case, what, calls, flops=products * 2 * N * D * V)
    return rows


if __name__ == "__main__":
    sys.exit(kernel_benchmark("softcapped_cross_entropy", __doc__, measure, TESTS, SIZES, QUICK, others=(FP8,)))
