"""
The elementwise parts of the baseline's optimizers on a CPU: Muon's before and after its orthogonalisation, and all of
Adam's update, each in one or two passes.

    nesterov          m <- mu m + (1 - mu) g              returns mu m + (1 - mu) g
    normalised_step   s_r = mean of u^2 over row r        v <- v + (1 - beta2) (s - v)       f_r = max(v_r, 1e-10)^-1/2
                      k = max(1, rows / columns)^1/2 |u| / |f . u|        (beta2 = 0: f = 1)
                      w <- w - lr k f . u - decay w [u . w > 0]           by column where rows < columns
    adam_step         m <- m + (1 - beta1) (g - m)        v <- v + (1 - beta2) (g^2 - v)
                      u = (m / c1) / ((v / c2)^1/2 + 1e-10)
                      w <- w - lr u - decay w [u w > 0]

|f . u|^2 is the sum of f_r^2 times that of u^2 over row r: no pass over u for it. For A bytes of a tensor:
    nesterov          4A: read g, m, write m, u           the trainer's operations 12A
    normalised_step   4A: read u, and u, w, write w       about 23A with beta2
    adam_step         7A: read g, m, v, w, write m, v, w  about 35A
All run in place, in the tensors' dtype, without gradients.

Source: train_gpt.py's Muon and Adam, which name theirs
Status: measured in benchmarks/results/
"""

import torch
from torch import Tensor

from kernels.backend import array, loops_serve, parallel_loops


def nesterov_reference(gradient: Tensor, momentum: Tensor, mu: float) -> Tensor:
    """Does what nesterov does, in PyTorch's operations and the trainer's order."""
    gradient = gradient * (1 - mu)
    momentum.mul_(mu).add_(gradient)
    return gradient + momentum * mu


def normalised_step_reference(data: Tensor, update: Tensor, second: Tensor, lr: float, decay: float, beta2: float):
    """Does what normalised_step does, in PyTorch's operations and the trainer's order."""
    scale = max(1.0, data.shape[-2] / data.shape[-1]) ** 0.5
    if beta2:
        norm = update.norm(dim=(-2, -1), keepdim=True)
        second.lerp_(update.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True), 1 - beta2)
        update = update * second.clamp_min(1e-10).rsqrt()
        scale = scale * norm / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
    data.sub_(lr * scale * update + decay * data * (update * data > 0))


def adam_step_reference(data: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, lr: float, decay: float,
                        betas: tuple, corrections: tuple):
    """Does what adam_step does, in PyTorch's operations and the trainer's order."""
    mean.lerp_(gradient, 1 - betas[0])
    square.lerp_(gradient.square(), 1 - betas[1])
    update = (mean / corrections[0]) / ((square / corrections[1]).sqrt() + 1e-10)
    data.sub_(lr * update + decay * data * (update * data > 0))


# ---- Public functions -------------------------------------------------------

def nesterov(gradient: Tensor, momentum: Tensor, mu: float) -> Tensor:
    """
    Returns the direction that momentum and gradient give, and changes momentum in place. Both are (...), of one shape
    and dtype, float32 or float64. This and the other two are the CPU's loops where they can be (contiguous tensors on a CPU,
    Numba), else the references.
    """
    if not _fit(gradient, momentum):
        return nesterov_reference(gradient, momentum, mu)
    update = torch.empty_like(gradient)
    parallel_loops("optimizer_updates.cpu").nesterov(*_flat(gradient, momentum), float(mu), *_flat(update))
    return update


def normalised_step(data: Tensor, update: Tensor, second: Tensor, lr: float, decay: float, beta2: float):
    """
    Takes Muon's step of data (n, rows, columns) along update, of its shape, in place. second, which changes in place,
    holds the running mean squares: (n, rows, 1) where rows are not fewer than columns, else (n, 1, columns).
    """
    update = update.contiguous()
    if not _fit(data, update, second):
        normalised_step_reference(data, update, second, lr, decay, beta2)
        return
    parallel_loops("optimizer_updates.cpu").normalised_step(
        array(data), array(update), array(second.flatten(1)), float(lr), float(decay), float(beta2))


def adam_step(data: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, lr: float, decay: float,
              betas: tuple, corrections: tuple):
    """
    Takes Adam's step of data, and changes data, mean and square in place; all are of one shape. corrections: what the
    means are divided by.
    """
    if not _fit(data, gradient, mean, square):
        adam_step_reference(data, gradient, mean, square, lr, decay, betas, corrections)
        return
    scalars = [float(number) for number in (lr, decay, *betas, *corrections)]
    parallel_loops("optimizer_updates.cpu").adam(*_flat(data, gradient, mean, square), *scalars)


def _fit(*tensors: Tensor) -> bool:
    """Returns whether the loops can take these tensors as they are."""
    return all(loops_serve(x) and x.is_contiguous() and x.dtype in (torch.float32, torch.float64) for x in tensors)


def _flat(*tensors: Tensor) -> list:
    """Returns the tensors' memory as flat arrays."""
    return [array(x).reshape(-1) for x in tensors]
