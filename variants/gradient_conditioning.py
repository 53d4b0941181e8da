"""
Gradient conditioning: every weight tensor's gradient is scaled and shifted by two numbers before the optimizer reads it.

    G'_k = a_k G_k + b_k        with base=sgd:  V <- momentum V + G'_k,  W_k <- W_k - lr V

W_k, G_k and V are float32 of one shape, a_k > 0, b_k is added to every entry; k = 0 .. K-1 counts the model's tensors in forward order, without those of one dimension
unless include_1d. base=default keeps Muon and Adam. Where a_k and b_k come from is not published, so these are families, and a result has to name the one it used:

    table           table=*/1/0;blocks.*.fc.weight/2/1e-5: glob of names/a/b, the last match counts, no match: 1 and 0
    structural      a_k = kappa fan_in^p numel^q ((k+1)/K)^r, b_k = beta0 fan_in^p_shift numel^q_shift ((k+1)/K)^r_shift
    hypergradient   a_k = exp(theta_k); theta_k += rho lr a_k <G_k, S_k>, b_k += rho lr m sum(G_k): the step's descent on the last one's lr, S and m.
                    S = momentum S + G, m = 1 + momentum + ..; with momentum_aware=off the last G and 1. learn=scale leaves b at 0, learn=shift a at 1
    centralize      b = -mean(G_k) over all dimensions but the output's: Gradient Centralization
    normalize       a_k = 1 / |G_k|
    trust           a_k = |W_k| / |G_k|, and 1 where W_k = 0: as LARS and LAMB
    orthograd       G_k without its part along W_k, given its norm back; not of the form above, the peer with the same motive

fan_in is the number of inputs of an output: all dimensions but the first, of three (a stack of matrices) the last. lr=0 is --lr_matrix, so that compare.py --sweep
reaches it; weight_decay is decoupled and so not scaled. clip bounds the norm of all gradients together, with conditioning before or after it (clip_order). It
follows that a constant a_k is a learning rate of the tensor's own and a constant b_k the penalty b_k sum(W_k), which has no lower bound; that Adam cancels a
constant a_k but for its epsilon, and Muon too. Muon lifts the rank-one shift to a singular value near 1: that is refused without allow_shift_muon.

Cost: one pass over the gradients (a read and a write), norms and products another read each; hypergradient keeps S, as many numbers as the model, and orthograd
reads twice more. The table with its hash and hypergradient's trajectory, a hundred points, are in LOG_DIR/RUN_ID-conditioning.json.

Source: github.com/lof310/projects (the form a G + b; no code or values); centralize: Yong et al., 2020, arxiv.org/abs/2004.01461; trust: You et al., LARS, 2017,
arxiv.org/abs/1708.03888; orthograd: Prieto et al., 2025, arxiv.org/abs/2501.04697; hypergradient: Baydin et al., 2018, arxiv.org/abs/1703.04782
Status: language model under SGD, tuned, 3 seeds: none of a G + b distinguishable, the peer normalize -0.17 (better); digits, 8 seeds: none ahead of per-tensor rates; variants/README.md
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
from train_gpt import Bucket, Config, Ranks, RunError, ShardedOptimizer

NEEDS = dict(lr=("base", "sgd"), weight_decay=("base", "sgd"), table=("source", "table"), rho=("source", "hypergradient")) | dict.fromkeys(
    ("kappa", "p", "q", "r", "beta0", "p_shift", "q_shift", "r_shift"), ("source", "structural"))  # option -> the choice without which it does nothing

@dataclass
class Options:
    base: Literal["sgd", "default"] = "sgd"
    lr: float = 0.2            # of SGD, for all tensors (0: --lr_matrix)
    momentum: float = 0.9      # of SGD, and hypergradient's in S
    weight_decay: float = 0.0  # of SGD, decoupled
    source: Literal["none", "table", "structural", "hypergradient", "centralize", "normalize", "trust", "orthograd"] = "none"
    table: str = "*/1/0"
    kappa: float = 1.0
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0
    beta0: float = 0.0
    p_shift: float = 0.0
    q_shift: float = 0.0
    r_shift: float = 0.0
    rho: float = 1e-5          # b needs so little: its derivative sums over a whole tensor; learn=scale bears 1
    learn: Literal["both", "scale", "shift"] = "both"
    momentum_aware: bool = True
    include_1d: bool = False
    clip: float = 0.0          # largest norm of all gradients together (0: any)
    clip_order: Literal["before", "after"] = "before"  # conditioning before the clip, or after it
    allow_shift_muon: bool = False

    def __post_init__(self):
        for name, (choice, value) in NEEDS.items():
            if getattr(self, name) != getattr(Options, name) and getattr(self, choice) != value:
                raise ValueError(f"{name}={getattr(self, name)} does nothing with {choice}={getattr(self, choice)}; add {choice}={value} or leave it out")
        for name, least in dict(lr=0, weight_decay=0, rho=0, clip=0, momentum=0).items():
            if not least <= getattr(self, name) < (1 if name == "momentum" else math.inf):
                allowed = "at least 0 and below 1" if name == "momentum" else "a finite number of at least 0"
                raise ValueError(f"{name}={getattr(self, name)} is out of range; give {allowed}")
        if not 0 < self.kappa < math.inf:
            raise ValueError(f"kappa={self.kappa} would make scales that are not positive; give a positive number")
        self.entries()

    def entries(self) -> list[tuple[str, float, float]]:
        """The table's (glob, a, b). ValueError for a text that is none."""
        found = []
        for text in self.table.split(";"):
            try:
                glob, a, b = text.strip().rsplit("/", 2)
                found.append((glob, float(a), float(b)))
            except ValueError:
                raise ValueError(f"table={self.table}: {text!r} is no glob/a/b; write it such as table=*/1/0;blocks.*.fc.weight/2/1e-5") from None
            if not (0 < found[-1][1] < math.inf and math.isfinite(found[-1][2])):
                raise ValueError(f"table={self.table}: {text!r} needs a positive a and a finite b")
        return found

class SGD(ShardedOptimizer):
    """V <- momentum V + G; W <- W - lr V - lr weight_decay W. Its buckets are flat."""
    def __init__(self, buckets: list[Bucket], config: Config, momentum: float):
        self.momentum = momentum
        super().__init__(buckets, config)
    def new_state(self, own: Tensor) -> dict:
        return dict(velocity=torch.zeros_like(own))
    def hyperparameters(self, progress: float) -> tuple:
        return (self.momentum,)
    @staticmethod
    def update(data, gradient, velocity, lr, decay, momentum: float):
        velocity.mul_(momentum).add_(gradient)
        data.sub_(lr * velocity + decay * data)

@dataclass
class Piece:
    """This rank's part of one parameter, flat views: numbers start .. start + len(grad) - 1 of it; perhaps none."""
    name: str
    shape: torch.Size
    muon: bool
    bucket: Bucket
    start: int
    data: Tensor
    grad: Tensor
    sums: Tensor | None  # S of hypergradient

    @property
    def fan_in(self) -> int:
        return 1 if len(self.shape) < 2 else math.prod(self.shape[-1:] if len(self.shape) == 3 else self.shape[1:])

    def row_sums(self) -> Tensor:
        """(outputs,) sums of the gradient over the inputs of each output, as far as they are this rank's."""
        n, sums = self.fan_in, self.grad.new_zeros(self.shape.numel() // self.fan_in)
        if len(self.grad):
            before = self.start % n
            own = F.pad(self.grad, (before, -(before + len(self.grad)) % n)).view(-1, n).sum(1)
            sums[self.start // n:self.start // n + len(own)] = own
        return sums

    def subtract_rows(self, values: Tensor):
        """values (outputs,), each from all inputs of its output."""
        n, first = self.fan_in, self.start // self.fan_in
        whole = values[first:-(-(self.start + len(self.grad)) // n)].repeat_interleave(n)
        self.grad.sub_(whole[self.start - first * n:][:len(self.grad)])

class Reduced:
    """In place of a bucket's reduction under way: it is over."""
    def wait(self):
        pass

class ConditionedOptimizer:
    """To the trainer one optimizer: conditions the reduced gradients of all buckets, then lets the optimizers that it holds step."""
    def __init__(self, optimizers: list[ShardedOptimizer], model: nn.Module, config: Config, ranks: Ranks, options: Options):
        self.optimizers, self.options, self.ranks, self.steps, self.lr_factor, self.trajectory = optimizers, options, ranks, 0, 0.0, []
        self.path = Path(config.log_dir, f"{config.run_id}-conditioning.json") if config.run_id and ranks.rank == 0 else None
        self.buckets = [bucket for optimizer in optimizers for bucket in optimizer.buckets]
        self.sums = [torch.zeros_like(bucket.grad[bucket.own]) for bucket in self.buckets] if options.source == "hypergradient" else []
        self.pieces = self.cut(model)
        scales, shifts = zip(*self.fixed_pairs())
        self.scales, self.shifts = (torch.tensor(values, dtype=torch.float32, device=ranks.device) for values in (scales, shifts))
        self.theta = torch.zeros_like(self.scales)
        self.acting = [k for k, pair in enumerate(zip(scales, shifts)) if pair != (1, 0)]
        self.write()

    def cut(self, model: nn.Module) -> list[Piece]:
        homes, pieces = {}, []
        for optimizer in self.optimizers:
            for bucket in optimizer.buckets:
                homes |= {p: (bucket, isinstance(optimizer, train_gpt.Muon)) for p in bucket.parameters}
        sums = dict(zip(map(id, self.buckets), self.sums))
        for name, p in model.named_parameters():
            if p.ndim < 2 and not self.options.include_1d:
                continue
            bucket, muon = homes[p]
            own_start, own_stop = (place * bucket.data[0].numel() for place in (bucket.own.start, bucket.own.stop))
            first, last = (min(max(place, own_start), own_stop) for place in (p.storage_offset(), p.storage_offset() + p.numel()))
            part = lambda own: own.view(-1)[first - own_start:last - own_start]
            pieces.append(Piece(name, p.shape, muon, bucket, first - p.storage_offset(), part(bucket.data[bucket.own]), part(bucket.grad[bucket.own]),
                                part(sums[id(bucket)]) if sums else None))
        if not pieces:
            raise RunError("variant gradient_conditioning: the model has no tensor of two dimensions; add include_1d=on")
        return pieces

    def fixed_pairs(self) -> list[tuple[float, float]]:
        """(a, b) of every piece, of the sources that learn or measure them (1, 0). RunError for what cannot be."""
        o, names = self.options, [piece.name for piece in self.pieces]
        pairs = [(1.0, 0.0)] * len(names)
        if o.source == "table":
            for glob, a, b in o.entries():
                matches = [fnmatchcase(name, glob) for name in names]
                if not any(matches):
                    raise RunError(f"variant gradient_conditioning: table: {glob!r} matches no conditioned tensor; there are {', '.join(names[:3])}, .. {names[-1]}"
                                   + "; include_1d=on adds those of one dimension" * (not o.include_1d))
                pairs = [(a, b) if match else pair for match, pair in zip(matches, pairs)]
        if o.source == "structural":
            form = lambda k, piece, *exponents: torch.tensor([piece.fan_in, piece.shape.numel(), (k + 1) / len(names)], dtype=torch.float64).pow(
                torch.tensor(exponents, dtype=torch.float64)).prod().item()
            pairs = [(o.kappa * form(k, piece, o.p, o.q, o.r), o.beta0 * form(k, piece, o.p_shift, o.q_shift, o.r_shift)) for k, piece in enumerate(self.pieces)]
        for piece, (a, b) in zip(self.pieces, pairs):
            if not (0 < a < math.inf and math.isfinite(b)):
                raise RunError(f"variant gradient_conditioning: {piece.name} would get a = {a}, b = {b}; choose other exponents")
            if piece.muon and not o.allow_shift_muon and (b or o.source == "hypergradient" and o.learn != "scale"):
                raise RunError(f"variant gradient_conditioning: Muon would turn the shift of {piece.name} into a singular direction of its own; "
                               "use base=sgd or learn=scale, shift other tensors only, or add allow_shift_muon=on")
        return pairs

    def start(self, lr_factor: float, progress: float, reducing: list):
        """Gradients are reduced under the backward pass; their conditioning may need all of them."""
        for bucket in self.buckets:
            bucket.expect()

    @torch.no_grad()
    def step(self, lr_factor: float, progress: float):
        """One update at `progress` in [0, 1) of the run."""
        for bucket in self.buckets:
            bucket.reduced_gradient()
            bucket.work = Reduced() if self.ranks.world > 1 else None
        if self.options.clip_order == "after":
            self.clip()
        self.condition(lr_factor)
        if self.options.clip_order == "before":
            self.clip()
        for optimizer in self.optimizers:
            optimizer.step(lr_factor, progress)
        if self.sums and (not self.trajectory or int(100 * progress) > int(100 * self.trajectory[-1]["progress"])):
            self.trajectory.append(dict(step=self.steps, progress=progress, a=self.scales.tolist(), b=self.shifts.tolist()))
            self.write()

    def over_ranks(self, sums: Tensor) -> Tensor:
        self.ranks.world > 1 and dist.all_reduce(sums)
        return sums

    def products(self, *pairs) -> Tensor:
        """(len(pairs), K): for each function of a piece to two flat tensors their product over all ranks."""
        return self.over_ranks(torch.stack([torch.stack([torch.dot(*pair(piece)) for piece in self.pieces]) for pair in pairs]))

    def clip(self):
        if limit := self.options.clip:
            gradients = [bucket.grad[bucket.own].flatten() for bucket in self.buckets]
            norm = self.over_ranks(torch.stack([g.dot(g) for g in gradients]).sum()).sqrt()
            for gradient in gradients:
                gradient.mul_((limit / (norm + 1e-6)).clamp_max(1.0))

    def condition(self, lr_factor: float):
        """G <- a G + b, in place, in one pass."""
        source, self.steps = self.options.source, self.steps + 1
        if source == "centralize":
            return self.centralize()
        if source == "orthograd":
            return self.orthogonalize()
        if source == "hypergradient":
            self.learn(lr_factor)
        if source in ("normalize", "trust"):
            gradients, weights = self.products(lambda piece: (piece.grad, piece.grad), lambda piece: (piece.data, piece.data)).sqrt()
            self.scales = (1 if source == "normalize" else torch.where(weights > 0, weights, gradients + 1e-12)) / (gradients + 1e-12)
        for k in self.acting if source in ("none", "table", "structural") else range(len(self.pieces)):
            torch.addcmul(self.shifts[k], self.pieces[k].grad, self.scales[k], out=self.pieces[k].grad)

    def centralize(self):
        pieces = [piece for piece in self.pieces if len(piece.shape) > 1]
        sums = [piece.row_sums() for piece in pieces]
        for piece, values in zip(pieces, self.over_ranks(torch.cat(sums)).split([len(own) for own in sums])):
            piece.subtract_rows(values / piece.fan_in)

    def orthogonalize(self):
        both, weights, norms = self.products(lambda piece: (piece.data, piece.grad), lambda piece: (piece.data, piece.data), lambda piece: (piece.grad, piece.grad))
        for piece, share in zip(self.pieces, both / (weights + 1e-30)):
            piece.grad.sub_(share * piece.data)
        left, = self.products(lambda piece: (piece.grad, piece.grad))
        for piece, factor in zip(self.pieces, norms.sqrt() / (left.sqrt() + 1e-30)):
            piece.grad.mul_(factor)

    def learn(self, lr_factor: float):
        """theta and b by the descent of this step's loss, its dependence through earlier gradients left out; S and the rate are those of the step before."""
        momentum = self.options.momentum if self.options.momentum_aware else 0.0
        if self.steps > 1:
            along, = self.products(lambda piece: (piece.grad, piece.sums))
            sums = self.over_ranks(torch.stack([piece.grad.sum() for piece in self.pieces]))
            rates = self.options.rho * self.lr_factor * torch.tensor([piece.bucket.lr for piece in self.pieces], device=self.theta.device)
            if self.options.learn != "shift":
                self.theta += rates * self.scales * along
            if self.options.learn != "scale":
                self.shifts += rates * sums * (1 - momentum ** (self.steps - 1)) / (1 - momentum)
            self.scales = self.theta.exp()
        for sums, bucket in zip(self.sums, self.buckets):
            sums.mul_(momentum).add_(bucket.grad[bucket.own])
        self.lr_factor = lr_factor

    def report(self) -> dict:
        """The table of a and b (none where every step measures its own), its hash, the trajectory."""
        measured = self.options.source in ("centralize", "normalize", "trust", "orthograd")
        pairs = [(None, None)] * len(self.pieces) if measured else zip(self.scales.tolist(), self.shifts.tolist())
        table = [dict(name=piece.name, shape=list(piece.shape), a=a, b=b) for piece, (a, b) in zip(self.pieces, pairs)]
        return dict(source=self.options.source, sha256=hashlib.sha256(json.dumps(table).encode()).hexdigest(), table=table, trajectory=self.trajectory)

    def write(self):
        if self.path:
            text = json.dumps(self.report(), indent=1)
            train_gpt.write_atomically(self.path, lambda file: file.write(text.encode()))

    def state_dict(self) -> dict:
        """A copy of the whole state, the same on every rank. Collective."""
        sums = {name: part for bucket, own in zip(self.buckets, self.sums) for name, part in bucket.collect(own).items()}
        return dict(steps=self.steps, lr_factor=self.lr_factor, theta=self.theta.clone(), shifts=self.shifts.clone(), trajectory=list(self.trajectory),
                    sums=sums, optimizers=[optimizer.state_dict() for optimizer in self.optimizers])

    def load_state_dict(self, saved: dict):
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for bucket, own in zip(self.buckets, self.sums):
            bucket.distribute(saved["sums"], own)
        self.steps, self.lr_factor, self.trajectory = saved["steps"], saved["lr_factor"], list(saved["trajectory"])
        if self.sums:
            self.theta, self.shifts = (saved[name].to(self.theta) for name in ("theta", "shifts"))
            self.scales = self.theta.exp()

def sgd_for_all(model: nn.Module, config: Config, ranks: Ranks, options: Options) -> list[ShardedOptimizer]:
    """One SGD for every parameter; .lr_mul and .wd_mul of a parameter count, .optimizer does not."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault((getattr(p, "lr_mul", 1.0), getattr(p, "wd_mul", 1.0)), {})[name] = p
    lr = options.lr or config.lr_matrix
    return [SGD([Bucket(own, False, lr * lr_mul, options.weight_decay * wd_mul, ranks) for (lr_mul, wd_mul), own in groups.items()], config, options.momentum)]

def build(model: nn.Module, config: Config, ranks: Ranks, options: Options, default) -> list[ConditionedOptimizer]:
    optimizers = default(model, config, ranks) if options.base == "default" else sgd_for_all(model, config, ranks, options)
    return [ConditionedOptimizer(optimizers, model, config, ranks, options)]

def patch(options: Options):
    train_gpt.build_optimizers = partial(build, options=options, default=train_gpt.build_optimizers)
