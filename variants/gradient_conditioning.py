"""
Gradient conditioning: every weight tensor's gradient is scaled and shifted by two numbers before the optimizer.

    G'_k = a_k G_k + b_k        with base=sgd:  V <- momentum V + G'_k,  W_k <- W_k - lr V

W_k, G_k and V are float32 of one shape, a_k > 0, b_k is added to every entry; k = 0 .. K-1 counts the model's tensors
in forward order, without those of one dimension unless include_1d. base=default keeps Muon and Adam. Where a_k and b_k
come from is not published, so these are families, and a result has to name the one it used:

    table           table=*/1/0;blocks.*.fc.weight/2/1e-5: glob of names/a/b, the last match counts, no match: 1 and 0
    structural      a_k = kappa fan_in^p numel^q ((k+1)/K)^r, b_k = beta0 fan_in^p_shift numel^q_shift ((k+1)/K)^r_shift
    hypergradient   a_k = exp(theta_k); theta_k += rho lr a_k <G_k, S_k>, b_k += rho lr m sum(G_k): the step's descent
                    on the last one's lr, S and m. S = momentum S + G, m = 1 + momentum + ..; with momentum_aware=off
                    the last G and 1. learn=scale leaves b at 0, learn=shift a at 1
    centralize      b = -mean(G_k) over all dimensions but the output's: Gradient Centralization
    normalize       a_k = 1 / |G_k|
    trust           a_k = |W_k| / |G_k|, and 1 where W_k = 0: as LARS and LAMB
    orthograd       G_k without its component along W_k, given its norm back; not of the form above, the peer with the
                    same motive

fan_in is the number of inputs of an output: all dimensions but the first, of three (a stack of matrices) the last. lr=0
is --lr_matrix, so that compare.py --sweep reaches it; weight_decay is decoupled and so not scaled. clip bounds the norm
of all gradients together, with conditioning before or after it (clip_order). It follows that a constant a_k is a
learning rate of the tensor alone and a constant b_k the penalty b_k sum(W_k), which has no lower bound; that Adam
cancels a constant a_k but for its epsilon, and Muon too. Muon lifts the rank-one shift to a singular value near 1: that
is refused without allow_shift_muon.

Cost: one pass over the gradients (a read and a write), norms and products another read each; hypergradient keeps S, as
many numbers as the model, and orthograd reads twice more. The table with its hash and hypergradient's trajectory, a
hundred points, are in LOG_DIR/RUN_ID-conditioning.json.

Source: github.com/lof310/projects (the form a G + b; no code or values); centralize: Yong et al., 2020,
arxiv.org/abs/2004.01461; trust: You et al., LARS, 2017, arxiv.org/abs/1708.03888; orthograd: Prieto et al., 2025,
arxiv.org/abs/2501.04697; hypergradient: Baydin et al., 2018, arxiv.org/abs/1703.04782
Status: too few pairs in 2026-11-23_GradientConditioningLanguage
"""

import hashlib
import json
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import Bucket, Config, Ranks, RunError, ShardedOptimizer, require

STRUCTURAL = ("kappa", "p", "q", "r", "beta0", "p_shift", "q_shift", "r_shift")
NEEDS = dict(  # option -> the choice without which it does nothing
    lr=("base", "sgd"),
    weight_decay=("base", "sgd"),
    table=("source", "table"),
    rho=("source", "hypergradient"),
) | dict.fromkeys(STRUCTURAL, ("source", "structural"))
FIXED = ("none", "table", "structural")                         # sources whose a and b stay
MEASURED = ("centralize", "normalize", "trust", "orthograd")    # sources that measure them in every step

Source = Literal["none", "table", "structural", "hypergradient", "centralize", "normalize", "trust", "orthograd"]


@dataclass
class Options:
    base: Literal["sgd", "default"] = "sgd"
    lr: float = 0.2            # of SGD, for all tensors (0: --lr_matrix)
    momentum: float = 0.9      # of SGD, and hypergradient's in S
    weight_decay: float = 0.0  # of SGD, decoupled
    source: Source = "none"
    table: str = "*/1/0"
    kappa: float = 1.0
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    beta0: float = 0.0
    p_shift: float = 0.0
    q_shift: float = 0.0
    r_shift: float = 0.0
    rho: float = 1e-5          # b needs so little: its derivative sums over a tensor; learn=scale bears 1
    learn: Literal["both", "scale", "shift"] = "both"
    momentum_aware: bool = True
    include_1d: bool = False
    clip: float = 0.0          # largest norm of all gradients together (0: any)
    clip_order: Literal["before", "after"] = "before"  # conditioning before the clip, or after it
    allow_shift_muon: bool = False

    def __post_init__(self):
        for name, (choice, value) in NEEDS.items():
            require(getattr(self, name) == getattr(Options, name) or getattr(self, choice) == value,
                    f"{name}={getattr(self, name)} does nothing with {choice}={getattr(self, choice)}; add "
                    f"{choice}={value} or leave it out")
        for name in ("lr", "weight_decay", "rho", "clip"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name}={value} is out of range; give a finite number of at least 0")
        require(0 <= self.momentum < 1,
                f"momentum={self.momentum} is out of range; give at least 0 and below 1")
        require(0 < self.kappa < math.inf,
                f"kappa={self.kappa} would make scales that are not positive; give a positive number")
        self.parse_table()

    def parse_table(self) -> list[tuple[str, float, float]]:
        """Return the table's (glob, a, b). RunError for a text that is none."""
        rows = []
        for text in self.table.split(";"):
            try:
                glob, a, b = text.strip().rsplit("/", 2)
                a, b = float(a), float(b)
            except ValueError:
                raise RunError(f"table={self.table}: {text!r} is no glob/a/b; write it such as "
                               "table=*/1/0;blocks.*.fc.weight/2/1e-5") from None
            require(0 < a < math.inf and math.isfinite(b),
                    f"table={self.table}: {text!r} needs a positive a and a finite b")
            rows.append((glob, a, b))
        return rows


# ---- What is used of the trainer's buckets ----------------------------------


def local(bucket: Bucket, tensor: Tensor) -> Tensor:
    """Return this rank's slice of a bucket's tensor, its data or its gradient: a view."""
    return tensor[bucket.slice]


class SGD(ShardedOptimizer):
    """V <- momentum V + G; W <- W - lr V - lr weight_decay W. Its buckets are flat."""

    def __init__(self, buckets: list[Bucket], config: Config, momentum: float):
        self.momentum = momentum
        super().__init__(buckets, config)

    def new_state(self, data: Tensor) -> dict:
        return dict(velocity=torch.zeros_like(data))

    def hyperparameters(self, progress: float) -> tuple:
        return (self.momentum,)

    @staticmethod
    def update(data, gradient, velocity, lr, decay, momentum: float):
        velocity.mul_(momentum).add_(gradient)
        data.sub_(lr * velocity + decay * data)


def build_sgd(model: nn.Module, config: Config, ranks: Ranks, options: Options) -> list[ShardedOptimizer]:
    """Return one SGD for every parameter; .lr_mul and .wd_mul of a parameter count, .optimizer does not."""
    groups = {}
    for name, p in model.named_parameters():
        factors = getattr(p, "lr_mul", 1.0), getattr(p, "wd_mul", 1.0)
        groups.setdefault(factors, {})[name] = p
    lr = options.lr or config.lr_matrix
    buckets = [Bucket(parameters, False, lr * lr_mul, options.weight_decay * wd_mul, ranks)
               for (lr_mul, wd_mul), parameters in groups.items()]
    return [SGD(buckets, config, options.momentum)]


# ---- Conditioning -----------------------------------------------------------


@dataclass
class Shard:
    """This rank's share of one parameter: its numbers from start on, as flat views; perhaps none."""
    name: str
    shape: torch.Size    # of the parameter
    muon: bool           # whether Muon updates it
    lr: float            # the learning rate of its bucket, before the schedule
    start: int           # the first of its numbers that are this rank's
    data: Tensor
    grad: Tensor
    sums: Tensor | None  # S of hypergradient; None for other sources

    @property
    def fan_in(self) -> int:
        """The number of inputs of an output."""
        if len(self.shape) < 2:
            return 1
        return self.shape[-1] if len(self.shape) == 3 else math.prod(self.shape[1:])

    def row_sums(self) -> Tensor:
        """Return the sums (outputs,) of the gradient over the inputs of each output, as far as they are this rank's."""
        n = self.fan_in
        sums = self.grad.new_zeros(self.shape.numel() // n)
        if len(self.grad):
            # whole rows: with zeros in place of the other ranks' numbers
            before, first = self.start % n, self.start // n
            after = -(before + len(self.grad)) % n
            rows = F.pad(self.grad, (before, after)).view(-1, n)
            sums[first:first + len(rows)] = rows.sum(1)
        return sums

    def subtract_rows(self, values: Tensor):
        """Subtract each of values (outputs,) from the gradient of all inputs of its output."""
        n = self.fan_in
        first, end = self.start // n, -(-(self.start + len(self.grad)) // n)
        repeated = values[first:end].repeat_interleave(n)
        self.grad.sub_(repeated[self.start - first * n:][:len(self.grad)])


class ConditionedOptimizer:
    """
    To the trainer one optimizer: it conditions the reduced gradients of all buckets, then lets the optimizers that it
    holds step.
    """

    def __init__(self, optimizers: list[ShardedOptimizer], model: nn.Module, config: Config, ranks: Ranks,
                 options: Options):
        self.options = options
        self.ranks = ranks
        self.optimizers = optimizers  # which update the weights
        self.buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]

        # S of hypergradient: this rank's slice for each bucket; empty for other sources
        self.sums = []
        if options.source == "hypergradient":
            self.sums = [torch.zeros_like(local(bucket, bucket.grad)) for bucket in self.buckets]

        # this rank's shards of the conditioned tensors, K in forward order, and a and b of each
        self.shards = self.cut_shards(model)
        pairs = self.choose_pairs()
        scales, shifts = zip(*pairs)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=ranks.device)  # (K,) a
        self.shifts = torch.tensor(shifts, dtype=torch.float32, device=ranks.device)  # (K,) b
        self.theta = torch.zeros_like(self.scales)                                    # (K,) log a, where it is learned
        self.acting = [k for k, pair in enumerate(pairs) if pair != (1, 0)]           # whose fixed a and b do something

        self.steps = 0        # updates so far
        self.lr_factor = 0.0  # the learning rate's factor in the last of them
        self.trajectory = []  # hypergradient's a and b, a point for each hundredth of the run

        # where the report goes; None: nowhere
        self.path = None
        if config.run_id and ranks.rank == 0:
            self.path = Path(config.log_dir, f"{config.run_id}-conditioning.json")
        self.write()

    def cut_shards(self, model: nn.Module) -> list[Shard]:
        """Return this rank's shard of every conditioned tensor. RunError if there is none."""
        homes = {}  # parameter -> (its bucket, the bucket's S or None, whether Muon updates it)
        sums = iter(self.sums)
        for optimizer in self.optimizers:
            for bucket in optimizer.buckets:
                home = bucket, next(sums, None), isinstance(optimizer, train_gpt.Muon)
                homes |= dict.fromkeys(bucket.parameters, home)
        shards = [cut_shard(name, p, *homes[p]) for name, p in model.named_parameters()
                  if p.ndim >= 2 or self.options.include_1d]
        require(shards, "variant gradient_conditioning: the model has no tensor of two dimensions; add include_1d=on")
        return shards

    # ---- Where a and b come from --------------------------------------------

    def choose_pairs(self) -> list[tuple[float, float]]:
        """
        Return (a, b) of every shard, which are (1, 0) for sources that learn or measure them. RunError for a pair that
        cannot be used.
        """
        pairs = [(1.0, 0.0)] * len(self.shards)
        if self.options.source == "table":
            pairs = self.match_table()
        if self.options.source == "structural":
            pairs = self.compute_structural_pairs()

        moves_shift = self.options.source == "hypergradient" and self.options.learn != "scale"
        for shard, (a, b) in zip(self.shards, pairs):
            require(0 < a < math.inf and math.isfinite(b),
                    f"variant gradient_conditioning: {shard.name} would get a = {a}, b = {b}; choose other exponents")
            require(not shard.muon or self.options.allow_shift_muon or not (b or moves_shift),
                    f"variant gradient_conditioning: Muon would turn the shift of {shard.name} into a singular "
                    "direction of its own; use base=sgd or learn=scale, shift other tensors only, or add "
                    "allow_shift_muon=on")
        return pairs

    def match_table(self) -> list[tuple[float, float]]:
        names = [shard.name for shard in self.shards]
        pairs = [(1.0, 0.0)] * len(names)
        hint = "" if self.options.include_1d else "; include_1d=on adds those of one dimension"
        for glob, a, b in self.options.parse_table():
            matches = [fnmatchcase(name, glob) for name in names]
            require(any(matches),
                    f"variant gradient_conditioning: table: {glob!r} matches no conditioned tensor; there are "
                    f"{', '.join(names[:3])}, .. {names[-1]}{hint}")
            pairs = [(a, b) if is_match else pair for is_match, pair in zip(matches, pairs)]
        return pairs

    def compute_structural_pairs(self) -> list[tuple[float, float]]:
        o, pairs = self.options, []
        for k, shard in enumerate(self.shards):
            factors = shard.fan_in, shard.shape.numel(), (k + 1) / len(self.shards)
            a = o.kappa * product_of_powers(factors, (o.p, o.q, o.r))
            b = o.beta0 * product_of_powers(factors, (o.p_shift, o.q_shift, o.r_shift))
            pairs.append((a, b))
        return pairs

    # ---- A step -------------------------------------------------------------

    @torch.no_grad()
    def step(self, lr_factor: float, progress: float):
        """Make one update at `progress` in [0, 1) of the run."""
        for bucket in self.buckets:
            bucket.reduced_gradient()

        # condition and clip
        if self.options.clip_order == "after":
            self.clip()
        self.condition(lr_factor)
        if self.options.clip_order == "before":
            self.clip()

        for optimizer in self.optimizers:
            optimizer.step(lr_factor, progress)

        # a point of the trajectory for each hundredth of the run
        is_new = not self.trajectory or int(100 * progress) > int(100 * self.trajectory[-1]["progress"])
        if self.sums and is_new:
            a, b = self.scales.tolist(), self.shifts.tolist()
            self.trajectory.append(dict(step=self.steps, progress=progress, a=a, b=b))
            self.write()

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        if self.ranks.world > 1:
            dist.all_reduce(sums)
        return sums

    def products(self, *pairs) -> Tensor:
        """
        Return products (len(pairs), K) over all ranks. pairs: functions of a shard to the two flat tensors that are
        multiplied.
        """
        rows = [torch.stack([torch.dot(*pair(shard)) for shard in self.shards]) for pair in pairs]
        return self.sum_over_ranks(torch.stack(rows))

    def clip(self):
        limit = self.options.clip
        if not limit:
            return
        gradients = [local(bucket, bucket.grad).flatten() for bucket in self.buckets]
        norm = self.sum_over_ranks(torch.stack([g.dot(g) for g in gradients]).sum()).sqrt()
        for gradient in gradients:
            gradient.mul_((limit / (norm + 1e-6)).clamp_max(1.0))

    def condition(self, lr_factor: float):
        """G <- a G + b, in place, in one pass."""
        source = self.options.source
        self.steps += 1
        if source == "centralize":
            self.centralize()
            return
        if source == "orthograd":
            self.orthogonalize()
            return
        if source == "hypergradient":
            self.learn(lr_factor)
        if source in ("normalize", "trust"):
            self.measure_scales()
        for k in self.acting if source in FIXED else range(len(self.shards)):
            gradient = self.shards[k].grad
            torch.addcmul(self.shifts[k], gradient, self.scales[k], out=gradient)

    def measure_scales(self):
        """a of normalize and trust."""
        gradients, weights = self.products(grad_and_grad, data_and_data).sqrt()
        wanted = 1  # the norm of a conditioned gradient
        if self.options.source == "trust":
            wanted = torch.where(weights > 0, weights, gradients + 1e-12)
        self.scales = wanted / (gradients + 1e-12)

    def centralize(self):
        shards = [shard for shard in self.shards if len(shard.shape) > 1]
        sums = [shard.row_sums() for shard in shards]
        totals = self.sum_over_ranks(torch.cat(sums)).split([len(rows) for rows in sums])
        for shard, total in zip(shards, totals):
            shard.subtract_rows(total / shard.fan_in)

    def orthogonalize(self):
        # without the component along the weights
        both, weights, norms = self.products(data_and_grad, data_and_data, grad_and_grad)
        for shard, share in zip(self.shards, both / (weights + 1e-30)):
            shard.grad.sub_(share * shard.data)

        # the norm it had
        left, = self.products(grad_and_grad)
        for shard, factor in zip(self.shards, norms.sqrt() / (left.sqrt() + 1e-30)):
            shard.grad.mul_(factor)

    def learn(self, lr_factor: float):
        """
        Move theta and b by the descent of this step's loss, its dependence through earlier gradients left out; S and
        the rate are those of the step before.
        """
        options = self.options
        momentum = options.momentum if options.momentum_aware else 0.0
        if self.steps > 1:
            along, = self.products(grad_and_sums)
            sums = self.sum_over_ranks(torch.stack([shard.grad.sum() for shard in self.shards]))
            lr = torch.tensor([shard.lr for shard in self.shards], device=self.theta.device)
            rates = options.rho * self.lr_factor * lr
            if options.learn != "shift":
                self.theta += rates * self.scales * along
            if options.learn != "scale":
                self.shifts += rates * sums * (1 - momentum ** (self.steps - 1)) / (1 - momentum)
            self.scales = self.theta.exp()
        for sums, bucket in zip(self.sums, self.buckets):
            sums.mul_(momentum).add_(local(bucket, bucket.grad))
        self.lr_factor = lr_factor

    # ---- What is kept -------------------------------------------------------

    def report(self) -> dict:
        """Return the table of a and b (none where every step measures its own), its hash, and the trajectory."""
        pairs = zip(self.scales.tolist(), self.shifts.tolist())
        if self.options.source in MEASURED:
            pairs = [(None, None)] * len(self.shards)
        table = [dict(name=shard.name, shape=list(shard.shape), a=a, b=b) for shard, (a, b) in zip(self.shards, pairs)]
        sha256 = hashlib.sha256(json.dumps(table).encode()).hexdigest()
        return dict(source=self.options.source, sha256=sha256, table=table, trajectory=self.trajectory)

    def write(self):
        """Write the report into the run's log folder, if there is one."""
        if self.path is None:
            return
        text = json.dumps(self.report(), indent=1)
        train_gpt.write_atomically(self.path, lambda file: file.write(text.encode()))

    def state_dict(self) -> dict:
        """Return a copy of the state, the same on every rank. Collective."""
        sums = {}
        for bucket, local_sums in zip(self.buckets, self.sums):
            sums |= bucket.collect(local_sums)
        return dict(
            steps=self.steps,
            lr_factor=self.lr_factor,
            theta=self.theta.clone(),
            shifts=self.shifts.clone(),
            trajectory=list(self.trajectory),
            sums=sums,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
        )

    def load_state_dict(self, saved: dict):
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for bucket, local_sums in zip(self.buckets, self.sums):
            bucket.distribute(saved["sums"], local_sums)
        self.steps = saved["steps"]
        self.lr_factor = saved["lr_factor"]
        self.trajectory = list(saved["trajectory"])
        if self.sums:
            self.theta = saved["theta"].to(self.theta)
            self.shifts = saved["shifts"].to(self.shifts)
            self.scales = self.theta.exp()


def cut_shard(name: str, p: nn.Parameter, bucket: Bucket, sums: Tensor | None, muon: bool) -> Shard:
    """Return this rank's shard of a parameter, which is a view of its bucket's data. sums: S of the bucket, if any."""
    data, grad = local(bucket, bucket.data), local(bucket, bucket.grad)

    # places in the bucket, in numbers: of this rank's slice, and of what the parameter has in it
    begin, end = data.storage_offset(), data.storage_offset() + data.numel()
    first = min(max(p.storage_offset(), begin), end)
    last = min(max(p.storage_offset() + p.numel(), begin), end)

    def cut(tensor: Tensor) -> Tensor:
        return tensor.view(-1)[first - begin:last - begin]

    return Shard(name, p.shape, muon, bucket.lr, first - p.storage_offset(), cut(data), cut(grad),
                 None if sums is None else cut(sums))


def product_of_powers(bases: tuple, exponents: tuple) -> float:
    powers = torch.tensor(bases, dtype=torch.float64).pow(torch.tensor(exponents, dtype=torch.float64))
    return powers.prod().item()


def grad_and_grad(shard: Shard) -> tuple[Tensor, Tensor]:
    return shard.grad, shard.grad


def data_and_data(shard: Shard) -> tuple[Tensor, Tensor]:
    return shard.data, shard.data


def data_and_grad(shard: Shard) -> tuple[Tensor, Tensor]:
    return shard.data, shard.grad


def grad_and_sums(shard: Shard) -> tuple[Tensor, Tensor]:
    return shard.grad, shard.sums


def build(model: nn.Module, config: Config, ranks: Ranks, options: Options, default) -> list[ConditionedOptimizer]:
    """Return the optimizers of the trainer, one. default: the trainer's own function for them."""
    if options.base == "default":
        optimizers = default(model, config, ranks)
    else:
        optimizers = build_sgd(model, config, ranks, options)
    return [ConditionedOptimizer(optimizers, model, config, ranks, options)]


def patch(options: Options):
    train_gpt.build_optimizers = partial(build, options=options, default=train_gpt.build_optimizers)
