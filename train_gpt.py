"""
KnotGPT's trainer, whole, in one file: a modded-nanoGPT baseline whose parts can be replaced one by one.

    python train_gpt.py                                            the cpu track: two cores, about two minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track short
    python train_gpt.py --track small --data DIR --variant "swiglu_mlp:layers=0-3"

- Every replaceable part is a module-level class or function with a fixed signature, looked up here when the model is built: Linear, Norm,
  CausalSelfAttention, MLP, Residual, Block, LanguageModelHead, GPT and build_optimizers. A variant assigns its own to that name.
- Importing this file does nothing; run as a script it imports itself by name, so that there is one trainer module for all.
- One rule for every attention, on every backend: query i sees keys max(doc_start_i, i - window + 1) <= j <= i.
- The loss curve does not depend on the number of ranks beyond rounding: the global batch is fixed, ranks take rows of it.
- The log is the record: it holds the source, the versions, the configuration and every step.

Sources: modded-nanogpt (structure, log format, most of the baseline's features), Muon (K. Jordan), Polar Express (Amsel et al.), NorMuon,
Cautious Weight Decay, RoPE, QK-norm, Primer's ReLU^2, value residuals, U-net skips, Gemma 2's logit cap, FlexAttention. README.md credits each.
"""

# ----------------------------------------------------------------------------------------------------------------------------------------
# Imports and the source that goes into the log

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class RunError(Exception):
    """A fault that the user can mend: its message is one line that says what was wrong, what was got and what to do."""


def source_of_run() -> str:
    """Source text of this file and of every variant and kernel that has been loaded, each under its file name."""
    modules = [sys.modules[__name__]] + [m for name, m in sorted(sys.modules.items()) if name.split(".")[0] in ("variants", "kernels")]
    return "\n".join(f"# ---- {Path(m.__file__).parent.name}/{Path(m.__file__).name}\n{inspect.getsource(m)}"
                     for m in modules if getattr(m, "__file__", None))


# ----------------------------------------------------------------------------------------------------------------------------------------
# Configuration and tracks

@dataclass
class Config:
    """All settings of a run. Every field is a command-line option; the comment beside it is its help text."""
    track: str = "cpu"                  # which of TRACKS supplies the defaults
    variant: tuple[str, ...] = ()       # replacement parts: "name" or "name:key=value,key=value", joined by + or given as several arguments
    # data
    data: str = "data/python_bytes"     # folder of shards: *train*.bin and *val*.bin
    vocab_size: int = 0                 # number of token ids (0: from the folder's meta.json, else GPT-2's 50257)
    sequence_length: int = 256          # tokens of one row
    batch_tokens: int = 2048            # tokens of one optimizer step, over all ranks
    micro_batch_tokens: int = 2048      # at most so many tokens a forward pass on one rank
    tokens: int = 1_500_000             # training tokens; the number of steps follows
    steps: int = 0                      # number of optimizer steps (0: from tokens)
    align_documents: bool = False       # every row begins at the start of a document
    val_tokens: int = 131_072           # validation tokens, from the start of the validation shards
    val_every: int = 125                # steps between validations (the first and last step are always validated; 0: no others)
    target: float = 0.0                 # validation loss that the track asks for, in nats a token (0: none)
    # model
    layers: int = 4                     # number of blocks
    model_dim: int = 128                # width of the residual stream
    heads: int = 4                      # attention heads
    head_dim: int = 32                  # width of one head
    mlp_hidden: int = 512               # hidden width of the feed-forward
    document_mask: bool = True          # tokens see their own document only
    window_pattern: str = "L"           # S(hort) or L(ong) window for each layer, repeated; the last layer is always L
    window_short: tuple[int, ...] = (0,)  # short window in tokens, one for each equal part of the run (0: unlimited)
    window_long: tuple[int, ...] = (0,)   # long window likewise
    qk_norm: bool = True                # RMS-normalise queries and keys
    attention_scale: float = 0.0        # factor on the scores (0: 1/sqrt(head_dim))
    rope: str = "half"                  # rotary position: half (half of the pairs do not turn) | full | none
    rope_base: float = 1024.0           # longest wavelength of the rotation, over 2 pi
    zero_init_projections: bool = True  # output projections begin at zero, so that every block begins as the identity
    tied_embedding: bool = False        # head and embedding share one matrix
    logit_softcap: float = 15.0         # logits are c tanh(logits / c) (0: off)
    x0_skip: bool = True                # every block reads a learned mix of the stream and the embedding
    unet_skips: bool = True             # the second half adds the first half's streams, mirrored, with learned weights
    value_embeddings: int = 2           # embedding tables added to the values of the first and last so many layers (0: off)
    smear: bool = True                  # every token's embedding takes a gated part of the token before it
    attention_gate: bool = True         # each head's output is gated by the first few channels of the stream
    bigram_rows: int = 0                # rows of the hashed bigram embedding (0: off)
    # optimizer
    lr_matrix: float = 0.03             # Muon's learning rate
    lr_embed: float = 0.3               # Adam's, for embeddings
    lr_head: float = 0.008              # Adam's, for the head
    lr_scalar: float = 0.02             # Adam's, for scalars and gates
    momentum: float = 0.95              # Muon's momentum
    momentum_start: float = 0.85        # momentum at step 0, raised to its value over the first tenth of the run
    normuon_beta2: float = 0.95         # decay of Muon's second moment by row (0: off)
    weight_decay: float = 0.1           # of Muon's matrices; applied where it agrees in sign with the update
    adam_beta1: float = 0.8             # decay of Adam's first moment
    adam_beta2: float = 0.95            # decay of Adam's second moment
    decay_fraction: float = 0.6         # last part of the run in which the learning rate falls linearly
    final_lr: float = 0.0               # learning rate at the end, as a part of the full one
    # run
    seed: int = 1                       # of initial tensors and data order
    device: str = "auto"                # auto | cpu | cuda
    dtype: str = "auto"                 # of activations: auto | float32 | bfloat16
    compile: str = "auto"               # auto | model (one graph) | blocks (one a block) | off
    loss_chunk: int = 4096              # tokens whose logits exist at one time
    resume: str = ""                    # checkpoint to continue, bit for bit
    init_from: str = ""                 # checkpoint whose matching tensors are the start of this run
    log_dir: str = "logs"               # folder of logs, JSON files and checkpoints
    run_id: str = ""                    # name of this run's files (default: a new UUID)
    save: bool = True                   # write a checkpoint at the end, on a signal, and every checkpoint_seconds
    checkpoint_seconds: float = 600.0   # time between checkpoints while the run goes on


# What a checkpoint's own configuration does not fix: these may be given again with --resume.
RUN_FIELDS = {"resume", "data", "log_dir", "save", "checkpoint_seconds", "val_every", "micro_batch_tokens", "device"}

FINEWEB = dict(data="data/fineweb10B", val_tokens=10_485_760, val_every=125, sequence_length=2048, batch_tokens=524_288,
               micro_batch_tokens=65_536, align_documents=True, window_pattern="SSSL", window_short=(128, 256, 384), window_long=(384, 896, 1408),
               lr_matrix=0.023, lr_embed=0.3, lr_head=0.004, lr_scalar=0.015, bigram_rows=0, value_embeddings=0)
TRACKS = {
    # the machine's own Python library as bytes; two CPU cores, about two minutes
    "cpu": dict(target=1.45),
    # about 30M parameters, any GPU from 8 GB
    "small": {**FINEWEB, **dict(layers=8, model_dim=384, heads=6, head_dim=64, mlp_hidden=1536, tied_embedding=True, tokens=100_000_000,
              batch_tokens=65_536, micro_batch_tokens=16_384, sequence_length=1024, window_long=(384, 640, 1024), target=4.0, lr_embed=0.01)},
    # 128 thin layers: attention 8.39M + tied embedding 6.43M + feed-forward 3.15M
    "exodus18m": {**FINEWEB, **dict(layers=128, model_dim=128, heads=2, head_dim=64, mlp_hidden=96, tied_embedding=True, tokens=5_000_000_000,
                  micro_batch_tokens=32_768, sequence_length=1024, window_long=(384, 640, 1024), compile="blocks", lr_embed=0.01)},
    # 30M parameters, rows of 65,536 tokens, full causal attention: where attention is most of the step
    "long": {**FINEWEB, **dict(layers=8, model_dim=384, heads=6, head_dim=64, mlp_hidden=1536, tied_embedding=True, tokens=500_000_000,
             sequence_length=65_536, align_documents=False, document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,),
             lr_embed=0.01)},
    # modded-nanogpt's track 1: 12 layers of 768, target 3.28
    "short": {**FINEWEB, **dict(layers=12, model_dim=768, heads=6, head_dim=128, mlp_hidden=3072, attention_scale=0.12, tokens=900_000_000,
              value_embeddings=3, bigram_rows=50_304, target=3.28)},
    # modded-nanogpt's track 2: 350M class, target 2.92
    "medium": {**FINEWEB, **dict(layers=16, model_dim=1024, heads=8, head_dim=128, mlp_hidden=4096, attention_scale=0.12, tokens=3_000_000_000,
               micro_batch_tokens=32_768, value_embeddings=3, bigram_rows=50_304, target=2.92)},
    # the fixed architecture of modded-nanogpt's track 3, for step times
    "benchmark": {**FINEWEB, **dict(layers=12, model_dim=768, heads=6, head_dim=128, mlp_hidden=3072, attention_scale=0.12, tokens=1_703_936_000,
                  sequence_length=1024, align_documents=False, document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,),
                  x0_skip=False, unet_skips=False, value_embeddings=0, smear=False, attention_gate=False, bigram_rows=0, target=3.28)},
}


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from a command line: the defaults, then the track's values, then what was given. RunError for a bad value."""
    help_of = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(prog="train_gpt.py", description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS, allow_abbrev=False)
    integers = lambda text: tuple(int(part) for part in text.split(","))
    for field in dataclasses.fields(Config):
        kind = dict(int=dict(type=int), float=dict(type=float), bool=dict(action=argparse.BooleanOptionalAction)).get(getattr(field.type, "__name__", ""), {})
        kind = dict(nargs="+") if field.name == "variant" else dict(type=integers) if field.type == tuple[int, ...] else kind
        parser.add_argument("--" + field.name, *({"--" + field.name.replace("_", "-")} - {"--" + field.name}),
                            help=f"{help_of[field.name]} [{field.default}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    if "variant" in given:
        given["variant"] = tuple(part for text in given["variant"] for part in text.split("+"))
    return make_config(given)


def make_config(given: dict) -> Config:
    """Config from explicit settings over their track's (or, with resume, over the checkpoint's own). Checks every relation between fields."""
    if given.get("resume"):
        saved = read_checkpoint(given["resume"])["config"]
        if fixed := sorted(name for name in set(given) - RUN_FIELDS if given[name] != saved[name]):
            raise RunError(f"--{fixed[0]} {given[fixed[0]]} differs from the checkpoint's {saved[fixed[0]]}: a resumed run keeps its settings; use --init_from to change them")
        config = Config(**{**saved, **given})
    else:
        track = given.get("track", Config.track)
        if track not in TRACKS:
            raise RunError(f"unknown track {track!r}; the tracks are {', '.join(TRACKS)}")
        config = Config(**{**TRACKS[track], **given})
    for name in ("sequence_length", "batch_tokens", "micro_batch_tokens", "layers", "model_dim", "heads", "head_dim", "mlp_hidden", "loss_chunk"):
        if getattr(config, name) < 1:
            raise RunError(f"--{name} must be at least 1, got {getattr(config, name)}")
    for name, allowed in dict(rope=("half", "full", "none"), device=("auto", "cpu", "cuda"), dtype=("auto", "float32", "bfloat16"),
                              compile=("auto", "model", "blocks", "off")).items():
        if getattr(config, name) not in allowed:
            raise RunError(f"--{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
    if config.batch_tokens % config.sequence_length:
        raise RunError(f"--batch_tokens {config.batch_tokens} is not a multiple of --sequence_length {config.sequence_length}")
    if not re.fullmatch("[SL]+", config.window_pattern) or len(config.window_short) != len(config.window_long):
        raise RunError(f"--window_pattern takes letters S and L, and both windows the same number of stages; got {config.window_pattern!r}, {config.window_short}, {config.window_long}")
    if config.head_dim % 4 and config.rope != "none":
        raise RunError(f"--head_dim {config.head_dim} is not a multiple of 4, which rotary positions need; choose another or --rope none")
    if config.value_embeddings and config.heads * config.head_dim != config.model_dim:
        raise RunError(f"value embeddings need heads * head_dim = model_dim, got {config.heads} * {config.head_dim} and {config.model_dim}; or use --value_embeddings 0")
    config.steps = config.steps or max(1, config.tokens // config.batch_tokens)
    return config


def micro_batches(config: Config, world: int) -> tuple[int, int]:
    """(rows of one forward pass, forward passes of one step) on each of `world` ranks. RunError where the batch cannot be divided."""
    rows, rest = divmod(config.batch_tokens // config.sequence_length, world)
    if rest or not rows:
        raise RunError(f"{config.batch_tokens // config.sequence_length} rows of {config.sequence_length} tokens cannot be shared by {world} ranks; change --batch_tokens or the number of ranks")
    micro = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * config.sequence_length <= config.micro_batch_tokens))
    return micro, rows // micro


# ----------------------------------------------------------------------------------------------------------------------------------------
# Ranks

@dataclass
class Ranks:
    """This process among those that torchrun started (or alone): its rank, how many there are, its device and its activations' dtype."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def start(config: Config) -> "Ranks":
        rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if config.device == "cuda" and not torch.cuda.is_available():
            raise RunError("--device cuda: PyTorch sees no CUDA device; use --device cpu, or install a CUDA build of PyTorch and a driver")
        if config.device != "cpu" and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise RunError(f"rank {local} of this machine has no GPU of its own: {torch.cuda.device_count()} seen; start as many ranks as there are GPUs")
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            device = torch.device("cpu")
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # float32 is the faster of the two on CPUs without AMX tiles (measured: 1.3 to 6 times), and exact everywhere.
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return Ranks(rank, world, device, getattr(torch, config.dtype) if config.dtype != "auto" else torch.bfloat16 if fast else torch.float32)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world > 1:
            dist.barrier()

    def agree(self, value: int) -> int:
        """The largest of all ranks' values. On the host: it does not wait for the GPU."""
        if self.world > 1:
            tensor = torch.tensor(value)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            value = int(tensor)
        return value


# ----------------------------------------------------------------------------------------------------------------------------------------
# Optimizers: parameters in buckets, each rank updates its own slice

class Bucket:
    """
    Parameters that are updated by one batched operation. They and their gradients become views of two stacked tensors, so that a step needs
    one reduce-scatter, one update of this rank's slice and one all-gather for all of them, and no copies.
    As matrices: (n, rows, columns), whole matrices a rank. Otherwise flat: (numbers,), each parameter aligned to 64 numbers.
    """

    def __init__(self, parameters: list[nn.Parameter], matrices: bool, world: int, rank: int):
        self.parameters, self.world = parameters, world
        sizes = [p.numel() if not matrices else p[..., 0, 0].numel() for p in parameters]
        offsets = np.cumsum([0] + [size if matrices else -(-size // 64) * 64 for size in sizes]).tolist()
        self.chunk = -(-offsets[-1] // world)
        unit = parameters[0].shape[-2:] if matrices else ()
        self.data = torch.zeros(self.chunk * world, *unit, device=parameters[0].device)
        self.grad = torch.zeros_like(self.data)
        for p, offset, size in zip(parameters, offsets, sizes):
            self.data[offset:offset + size] = p.detach().reshape(size, *unit)
            p.data = self.data[offset:offset + size].view(p.shape)
            p.grad = self.grad[offset:offset + size].view(p.shape)
            if world > 1:
                p.register_post_accumulate_grad_hook(self._count)
        self.own = slice(rank * self.chunk, (rank + 1) * self.chunk)
        self.waiting, self.work = None, None

    def expect_last_gradients(self):
        """The next backward pass is the last of this step: reduce as soon as every parameter has its gradient, while the pass goes on."""
        self.waiting = len(self.parameters)

    def _count(self, _parameter):
        if self.waiting is not None:
            self.waiting -= 1
            if self.waiting == 0:
                self._reduce()

    def _reduce(self):
        self.waiting = None
        if self.grad.is_cuda:
            self.work = dist.reduce_scatter_tensor(self.grad[self.own], self.grad, async_op=True)
        else:  # gloo sums whole tensors only
            self.work = dist.all_reduce(self.grad, async_op=True)

    def reduced_gradient(self) -> Tensor:
        """This rank's slice of the gradient, summed over the ranks."""
        if self.world > 1:
            if self.work is None:  # a parameter had no gradient in this pass
                self._reduce()
            self.work.wait()
            self.work = None
        return self.grad[self.own]

    def gather(self):
        """Send this rank's updated slice to the others; returns what to wait for."""
        return dist.all_gather_into_tensor(self.data, self.data[self.own].clone(), async_op=True) if self.world > 1 else None

    def full(self, own: Tensor) -> Tensor:
        """All ranks' slices of a state tensor, joined."""
        if self.world == 1:
            return own
        whole = own.new_empty(own.shape[0] * self.world, *own.shape[1:])
        dist.all_gather_into_tensor(whole, own.contiguous())
        return whole


class ShardedOptimizer:
    """
    Base of the optimizers: step() reduces every bucket's gradient, calls update(bucket, state, ...) for this rank's slice and gathers the result.
    `groups` holds one dict a bucket: bucket, lr, weight_decay, state (name -> tensor of the slice's first dimension).
    """

    def __init__(self, groups: list[dict], **settings):
        self.groups, self.steps, self.works = groups, 0, []
        self.__dict__.update(settings)

    def expect_last_gradients(self):
        for group in self.groups:
            group["bucket"].expect_last_gradients()

    @torch.no_grad()
    def step(self, lr_factor: float, progress: float):
        """One update at `progress` in [0, 1) of the run. The gathers still run when it returns: see finish()."""
        self.steps += 1
        for group in self.groups:
            bucket = group["bucket"]
            gradient = bucket.reduced_gradient()
            # 0-dimensional tensors: a compiled update takes them as inputs and is not compiled anew when they change
            lr = torch.tensor(group["lr"] * lr_factor)
            self.update(bucket.data[bucket.own], gradient, group["state"], lr, lr * group["weight_decay"], progress)
            self.works.append(bucket.gather())
            bucket.grad.zero_()

    def finish(self):
        for work in self.works:
            if work is not None:
                work.wait()
        self.works.clear()

    def state_dict(self) -> dict:
        """Whole state, the same on every rank and for any number of ranks. Collective."""
        return dict(steps=self.steps, groups=[{name: group["bucket"].full(t) for name, t in group["state"].items()} for group in self.groups])

    def load_state_dict(self, saved: dict):
        self.steps = saved["steps"]
        for group, states in zip(self.groups, saved["groups"], strict=True):
            for name, tensor in group["state"].items():
                own, used = group["bucket"].own, min(len(states[name]), group["bucket"].own.stop) - group["bucket"].own.start
                tensor.zero_()[:max(used, 0)] = states[name][own][:max(used, 0)].to(tensor.device)  # padding differs with the number of ranks


# Coefficients of the Polar Express paper (Amsel et al., 2025), for 5 steps, with its safety factor of 2 %.
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233002837),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> nearest semi-orthogonal matrices U V', nearly: singular values end within about 0.3 of 1. Works in its input's dtype."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def muon_update(data, gradient, momentum, second, lr, decay, mu, beta2, use_second: bool):
    """Muon on a batch of equal matrices: Nesterov momentum, orthogonalisation, NorMuon's normalisation by row, cautious weight decay."""
    momentum.lerp_(gradient, 1 - mu)
    update = orthogonalize(gradient.lerp(momentum, mu).to(torch.bfloat16 if data.is_cuda else torch.float32)).float()
    if use_second:  # divide by the running size of every row (or column), then restore the matrix' norm
        mean = update.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True)
        second.lerp_(mean, 1 - beta2)
        scaled = update * second.clamp_min(1e-10).rsqrt()
        update = scaled * (update.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    update = update * max(1.0, data.shape[-2] / data.shape[-1]) ** 0.5
    data.sub_(lr * update + decay * data * (update * data > 0))


def adam_update(data, gradient, mean, square, lr, decay, beta1: float, beta2: float, correction1, correction2):
    """Adam with bias correction, then cautious weight decay."""
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    update = (mean / correction1) / ((square / correction2).sqrt() + 1e-10)
    data.sub_(lr * update + decay * data * (update * data > 0))


class Muon(ShardedOptimizer):
    """For matrices. Source: K. Jordan's Muon; Polar Express; NorMuon; Cautious Weight Decay."""

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, **settings)
        for group in groups:
            own = group["bucket"].data[group["bucket"].own]
            group["state"] = dict(momentum=torch.zeros_like(own), second=torch.zeros_like(own[..., :1] if own.shape[-2] >= own.shape[-1] else own[..., :1, :]))

    def update(self, data, gradient, state, lr, decay, progress):
        mu = torch.tensor(self.momentum + (self.momentum_start - self.momentum) * max(0.0, 1 - 10 * progress))
        self.function(data, gradient, state["momentum"], state["second"], lr, decay, mu, self.beta2, self.beta2 > 0)


class Adam(ShardedOptimizer):
    """For embeddings, the head, scalars and gates."""

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, **settings)
        for group in groups:
            own = group["bucket"].data[group["bucket"].own]
            group["state"] = dict(mean=torch.zeros_like(own), square=torch.zeros_like(own))

    def update(self, data, gradient, state, lr, decay, progress):
        corrections = (torch.tensor(1 - beta ** self.steps) for beta in (self.beta1, self.beta2))
        self.function(data, gradient, state["mean"], state["square"], lr, decay, self.beta1, self.beta2, *corrections)


def build_optimizers(model: nn.Module, config: Config, ranks: Ranks) -> list[ShardedOptimizer]:
    """
    Muon for matrices inside blocks, Adam for the rest. A parameter may override this by attributes: `.optimizer` ("muon" | "adam" | "adam_embed"
    | "adam_head"), `.lr_mul`, `.wd_mul`. A parameter of three dimensions under Muon is a batch of matrices.
    """
    learning_rates = dict(muon=config.lr_matrix, adam=config.lr_scalar, adam_embed=config.lr_embed, adam_head=config.lr_head)
    buckets: dict[tuple, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        kind = getattr(p, "optimizer", "muon" if p.ndim >= 2 and name.startswith("blocks.") else "adam")
        if kind not in learning_rates or kind == "muon" and p.ndim < 2:
            raise RunError(f"parameter {name} of shape {tuple(p.shape)} asks for optimizer {kind!r}; there are {', '.join(learning_rates)}, and muon takes matrices only")
        buckets.setdefault((kind, getattr(p, "lr_mul", 1.0), getattr(p, "wd_mul", 1.0), p.shape[-2:] if kind == "muon" else None), []).append(p)
    groups: dict[bool, list[dict]] = {True: [], False: []}
    for (kind, lr_mul, wd_mul, _), parameters in buckets.items():
        bucket = Bucket(parameters, kind == "muon", ranks.world, ranks.rank)
        groups[kind == "muon"].append(dict(bucket=bucket, lr=learning_rates[kind] * lr_mul, weight_decay=config.weight_decay * wd_mul if kind == "muon" else 0.0))
    compiled = (lambda f: torch.compile(f, dynamic=False)) if compile_mode(config, ranks) != "off" and ranks.device.type == "cuda" else (lambda f: f)
    return [Muon(groups[True], function=compiled(muon_update), momentum=config.momentum, momentum_start=config.momentum_start, beta2=config.normuon_beta2),
            Adam(groups[False], function=compiled(adam_update), beta1=config.adam_beta1, beta2=config.adam_beta2)]


# ----------------------------------------------------------------------------------------------------------------------------------------
# Model

@dataclass
class AttentionContext:
    """
    What a layer may know besides the stream. B rows of T tokens.
    doc_start (B, T) int32: index in the row of the first token of each token's document (0 everywhere without document mask)
    positions (B, T) int32: place of the token in its document
    window: int or None; first_key (B, T) int32: max(doc_start_i, i - window + 1), or None where that is 0 everywhere (plain causal attention)
    block_mask: the same rule for FlexAttention, or None; rotary: cosine and sine, (T, head_dim / 2)
    x0 (B, T, model_dim): the embedded tokens; value (B, T, model_dim): this layer's value embedding, or None
    """
    doc_start: Tensor
    positions: Tensor
    window: int | None
    first_key: Tensor | None
    block_mask: object | None
    rotary: tuple[Tensor, Tensor] | None
    x0: Tensor
    value: Tensor | None = None


class Linear(nn.Module):
    """y = x W'. W (n_out, n_in) in float32, cast to x's dtype. role: q k v o fc proj gate head. The head's must offer .weight."""

    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        zero = role in ("gate", "head") or role in ("o", "proj") and config.zero_init_projections
        self.weight.init_std = 0.0 if zero else 0.5 * n_in ** -0.5
        self.weight.optimizer = dict(gate="adam", head="adam_head").get(role, "muon")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x))


class Norm(nn.Module):
    """RMS normalisation of the last n channels, without gain."""

    def __init__(self, config: Config, n: int):
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.n,), eps=1e-6)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position on x (B, T, H, D); channel c pairs with channel c + D/2."""
    cosine, sine = (t[:, None, :].type_as(x) for t in rotary)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine + b * sine, b * cosine - a * sine), dim=-1)


def interval_block_mask(first_key: Tensor, block: int = 128):
    """FlexAttention mask of first_key_i <= j <= i. As first_key never falls along a row, the first and last query of a block decide exactly:
    the cost is (T / block)^2, no score is looked at."""
    from torch.nn.attention.flex_attention import BlockMask
    index = torch.arange(first_key.shape[1] // block, device=first_key.device)
    query, key = index[:, None], index[None, :]
    some = (key <= query) & (key * block + block > first_key[:, ::block, None])
    whole = (key < query) & (key * block >= first_key[:, block - 1::block, None])
    count = lambda dense: dense.sum(-1, dtype=torch.int32)[:, None]
    order = lambda dense: dense.int().argsort(-1, descending=True, stable=True).int()[:, None].contiguous()
    part = some & ~whole
    return BlockMask.from_kv_blocks(count(part), order(part), count(whole), order(whole), BLOCK_SIZE=block,
                                    mask_mod=lambda b, h, i, j: (j <= i) & (j >= first_key[b, i]))


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext, scale: float) -> Tensor:
    """Softmax attention of q, k, v (B, T, H, D) over the keys that ctx allows; returns (B, T, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if ctx.block_mask is not None:
        from torch.nn.attention.flex_attention import flex_attention
        y = flex_attention(q, k, v, block_mask=ctx.block_mask, scale=scale)
    elif ctx.first_key is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:  # a stretch of queries at a time, so that the mask of a long row is never whole
        T, window, parts = q.shape[2], ctx.window or q.shape[2], []
        stretch = min(T, max(128, min(window, 1024)))
        for start in range(0, T, stretch):
            stop, begin = min(T, start + stretch), max(0, start - window + 1)
            key, query = torch.arange(begin, stop, device=q.device), torch.arange(start, stop, device=q.device)
            mask = (key <= query[:, None]) & (key >= ctx.first_key[:, start:stop, None])
            parts.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, begin:stop], v[:, :, begin:stop], attn_mask=mask[:, None], scale=scale))
        y = torch.cat(parts, dim=2)
    return y.transpose(1, 2)


GATE_CHANNELS = 12  # of the stream, that the sparse gates read


class CausalSelfAttention(nn.Module):
    """Multi-head softmax attention with QK-norm, half-truncated rotary positions, value embeddings and a sparse output gate."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, width = config, config.heads * config.head_dim
        self.q, self.k, self.v = (Linear(config, layer, role, config.model_dim, width) for role in "qkv")
        self.o = Linear(config, layer, "o", width, config.model_dim)
        self.gate = Linear(config, layer, "gate", min(GATE_CHANNELS, config.model_dim), config.heads) if config.attention_gate else None
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if value_table(config, layer) is not None else None
        self.scale = config.attention_scale or config.head_dim ** -0.5

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, self.config.heads, self.config.head_dim) for project in (self.q, self.k, self.v))
        if self.config.qk_norm:
            q, k = (F.rms_norm(t, (t.shape[-1],), eps=1e-6) for t in (q, k))
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        if self.value_mix is not None:
            mix = self.value_mix.type_as(v)
            v = mix[0] * v + mix[1] * ctx.value.view_as(v)
        y = attend(q, k, v, ctx, self.scale)
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(self.gate(x[..., :self.gate.weight.shape[1]])))[..., None]
        return self.o(y.flatten(2))


class MLP(nn.Module):
    """Feed-forward with ReLU squared (Primer)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.fc = Linear(config, layer, "fc", config.model_dim, config.mlp_hidden)
        self.proj = Linear(config, layer, "proj", config.mlp_hidden, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Residual(nn.Module):
    """How a branch's output joins the stream. branch: "attention" or "mlp"."""

    def __init__(self, config: Config, layer: int, branch: str):
        super().__init__()

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        return x + branch_output


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_skip else None
        self.attention_norm, self.mlp_norm = Norm(config, config.model_dim), Norm(config, config.model_dim)
        self.attention, self.mlp = CausalSelfAttention(config, layer), MLP(config, layer)
        self.attention_residual, self.mlp_residual = Residual(config, layer, "attention"), Residual(config, layer, "mlp")

    def mix_stream(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        if self.stream_mix is None:
            return x
        mix = self.stream_mix.type_as(x)
        return mix[0] * x + mix[1] * ctx.x0

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x = self.mix_stream(x, ctx)
        x = self.attention_residual(x, self.attention(self.attention_norm(x), ctx))
        return self.mlp_residual(x, self.mlp(self.mlp_norm(x)))


def loss_of_chunk(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the cross-entropies, capped logits, log-normalisers) of some tokens. x (n, D), weight (V, D), targets (n,)."""
    logits = (x @ weight.T).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    normaliser = logits.logsumexp(-1, keepdim=True)
    return (normaliser - logits.gather(1, targets[:, None])).sum(), logits, normaliser


class SoftcappedCrossEntropy(torch.autograd.Function):
    """
    Sum over tokens of the cross-entropy of softcap * tanh(x W' / softcap). x (N, D), W (V, D), targets (N,) int64; returns a float32 scalar.
    Gradients are formed in the forward pass, `chunk` tokens at a time: 3 products in all, and (N, V) never exists in any precision.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, chunk):
        w, loss, dx = weight.type_as(x), x.new_zeros((), dtype=torch.float32), []
        dw = torch.zeros_like(weight)
        for part, target in zip(x.split(chunk), targets.split(chunk)):
            part_loss, logits, normaliser = loss_of_chunk(part, w, target, softcap)
            loss = loss + part_loss
            d = torch.exp(logits - normaliser).scatter_add(1, target[:, None], -torch.ones_like(normaliser))
            d = (d * (1 - (logits / softcap).square()) if softcap else d).type_as(x)
            dx.append(d @ w)
            dw = dw + d.T @ part
        ctx.save_for_backward(torch.cat(dx), dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad.to(dx.dtype) * dx, grad * dw, None, None, None


class LanguageModelHead(nn.Module):
    """Logits and loss. forward(x (B, T, D), targets (B, T)) -> mean nats a token; without targets -> logits (B, T, vocabulary) in float32."""

    def __init__(self, config: Config):
        super().__init__()
        self.projection = Linear(config, None, "head", config.model_dim, padded_vocabulary(config))
        self.vocab_size, self.softcap, self.chunk = config.vocab_size, config.logit_softcap, config.loss_chunk

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        weight, flat = self.projection.weight, x.flatten(0, 1)
        if targets is None:
            logits = F.linear(x, weight.type_as(x)[:self.vocab_size]).float()
            return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        targets = targets.flatten().long()
        if torch.is_grad_enabled():
            return SoftcappedCrossEntropy.apply(flat, weight, targets, self.softcap, self.chunk) / len(targets)
        parts = [loss_of_chunk(part, weight.type_as(x), target, self.softcap)[0] for part, target in zip(flat.split(self.chunk), targets.split(self.chunk))]
        return torch.stack(parts).sum() / len(targets)


def padded_vocabulary(config: Config) -> int:
    """Rows of the embedding and the head: a multiple of what matrix units like, but little where the vocabulary is."""
    unit = 128 if config.vocab_size > 4096 else 8
    return -(-config.vocab_size // unit) * unit


def value_table(config: Config, layer: int) -> int | None:
    """Which value embedding a layer uses: tables 0, 1, .. in the first layers and again in the last; None in between."""
    n = min(config.value_embeddings, config.layers // 2)
    return layer if layer < n else layer - config.layers + n if layer >= config.layers - n else None


def embedding(rows: int, columns: int, std: float) -> nn.Embedding:
    table = nn.Embedding(rows, columns)
    table.weight.init_std, table.weight.optimizer = std, "adam_embed"
    return table


class GPT(nn.Module):
    """The model. forward(tokens (B, T) int, targets (B, T) int) -> mean loss; without targets -> logits (B, T, vocabulary)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, rows = config, padded_vocabulary(config)
        self.embedding = embedding(rows, config.model_dim, 0.02 if config.tied_embedding else 1.0)
        self.bigram_embedding = embedding(config.bigram_rows, config.model_dim, 0.0) if config.bigram_rows else None
        n = sum(value_table(config, layer) is not None for layer in range(config.layers)) // 2
        self.value_embeddings = nn.ModuleList(embedding(rows, config.model_dim, 0.1) for _ in range(n))
        self.smear_gate = Linear(config, None, "gate", min(GATE_CHANNELS, config.model_dim), 1) if config.smear else None
        self.smear_scale = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skip_weights = nn.Parameter(torch.full((config.layers // 2,), 0.2)) if config.unet_skips else None
        self.embedding_norm, self.final_norm = Norm(config, config.model_dim), Norm(config, config.model_dim)
        self.head = LanguageModelHead(config)
        if config.tied_embedding:
            self.head.projection.weight = self.embedding.weight
        half = config.head_dim // 2
        turning = half if config.rope == "full" else half // 2
        frequencies = torch.cat((config.rope_base ** -torch.linspace(0, 1, max(turning, 1)), torch.zeros(half - turning)))[:half]
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.dtype, self.use_flex, self.windows = torch.float32, False, (0, 0)

    @torch.no_grad()
    def initialize(self, seed: int):
        """Draw every parameter that has .init_std from a generator of its own name: equal names begin equal, whatever else the model holds."""
        for name, p in self.named_parameters():
            if (std := getattr(p, "init_std", None)) is not None:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) * 1_000_003 + seed)
                p.copy_(torch.randn(p.shape, generator=generator) * std if std else torch.zeros(p.shape))

    def set_windows(self, progress: float) -> tuple[int, int]:
        """Choose the windows for this part of the run (progress in [0, 1]); returns (short, long)."""
        stages = len(self.config.window_long)
        stage = min(int(progress * stages), stages - 1)
        self.windows = (self.config.window_short[stage], self.config.window_long[stage])
        return self.windows

    def contexts(self, tokens: Tensor, x0: Tensor, values: list[Tensor]) -> list[AttentionContext]:
        """One AttentionContext a layer."""
        B, T = tokens.shape
        index = torch.arange(T, device=tokens.device, dtype=torch.int32)
        doc_start = document_starts(tokens, self.config)
        angles = index[:, None] * self.frequencies
        rotary = (angles.cos(), angles.sin()) if self.config.rope != "none" else None
        pattern, shared, result = self.config.window_pattern, {}, []
        for layer in range(self.config.layers):
            long = layer == self.config.layers - 1 or pattern[layer % len(pattern)] == "L"
            window = self.windows[long] if 0 < self.windows[long] < T else None
            if window not in shared:
                first_key = doc_start if window is None else torch.maximum(doc_start, index - (window - 1))
                first_key = first_key if self.config.document_mask or window else None
                block_mask = interval_block_mask(first_key) if self.use_flex and first_key is not None and T % 128 == 0 else None
                shared[window] = (window, first_key, block_mask)
            table = value_table(self.config, layer)
            result.append(AttentionContext(doc_start, index - doc_start, *shared[window], rotary, x0, None if table is None else values[table]))
        return result

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[AttentionContext]]:
        """Tokens (B, T) -> the stream (B, T, model_dim) and the layers' contexts. Nothing is taken from before a document's start."""
        x = self.embedding(tokens).to(self.dtype)
        previous = F.pad(tokens[:, :-1], (1, 0)).long()
        inside = torch.ones_like(tokens, dtype=torch.bool)
        inside[:, 0] = False
        if self.config.document_mask:
            inside = inside & (tokens != end_of_text(self.config))
        if self.smear_gate is not None:
            gate = self.smear_scale.type_as(x) * torch.sigmoid(self.smear_gate(x[..., :self.smear_gate.weight.shape[1]])) * inside[..., None]
            x = x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.bigram_embedding is not None:  # row 0: no token before this one
            row = torch.where(inside, 1 + (previous * 36_313 ^ tokens.long() * 27_191) % (self.config.bigram_rows - 1), 0)
            x = x + self.bigram_embedding(row).to(self.dtype)
        x = self.embedding_norm(x)
        return x, self.contexts(tokens, x, [table(tokens).to(self.dtype) for table in self.value_embeddings])

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        """The order of the blocks; contexts: one a layer."""
        streams, half = [], len(self.blocks) // 2
        for layer, (block, ctx) in enumerate(zip(self.blocks, contexts)):
            if self.skip_weights is not None and layer >= len(self.blocks) - half:
                x = x + self.skip_weights[len(self.blocks) - 1 - layer].type_as(x) * streams[len(self.blocks) - 1 - layer]
            x = block(x, ctx)
            streams.append(x)
        return x

    def select_outputs(self, x: Tensor) -> Tensor:
        """The positions that predict a token: all, unless a variant inserted some."""
        return x

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x, contexts = self.embed(tokens)
        return self.head(self.final_norm(self.select_outputs(self.run_blocks(x, contexts))), targets)


def end_of_text(config: Config) -> int:
    """The token that begins every document: the last of the vocabulary, in bytes (256) as in GPT-2's (50256)."""
    return config.vocab_size - 1


def document_starts(tokens: Tensor, config: Config) -> Tensor:
    """Index of the first token of each token's document, (B, T) int32."""
    index = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int32)
    if not config.document_mask:
        return torch.zeros_like(tokens, dtype=torch.int32)
    return torch.where(tokens == end_of_text(config), index, 0).cummax(1).values.int()


def build_model(config: Config, ranks: Ranks) -> GPT:
    """The model on its device with its initial tensors, ready to be compiled."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    model.initialize(config.seed)
    model.to(ranks.device)
    model.dtype = ranks.dtype
    model.use_flex = ranks.device.type == "cuda" and compile_mode(config, ranks) != "off"
    return model


def compile_mode(config: Config, ranks: Ranks) -> str:
    """
    What `compile = auto` means. A single GPU gets one graph. With several, a graph a block: a whole-model graph hands over all gradients when its
    backward pass ends, so that nothing could be reduced meanwhile. A CPU gets one graph where a C++ compiler is found.
    """
    if config.compile != "auto":
        return config.compile
    if ranks.device.type == "cuda":
        return "model" if ranks.world == 1 else "blocks"
    return "model" if shutil.which(os.environ.get("CXX", "g++")) else "off"


def compile_model(model: GPT, mode: str):
    """Compile in place, whole graphs and static shapes only: a graph break is an error."""
    torch._dynamo.config.recompile_limit = 64  # windows and value embeddings make a few kinds of block
    for part in dict(model=[model], blocks=[*model.blocks, model.head], off=[])[mode]:
        part.compile(dynamic=False, fullgraph=True)


def flops_per_token(config: Config) -> float:
    """Training FLOPs of one token, forward and backward, counted by PyTorch on a row without data. Attention counts every score that its
    PyTorch form computes: the masked half of a causal square, and of a window's stretch, included."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(1, config.sequence_length, dtype=torch.int64)
        model.set_windows(1.0)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    return counter.get_total_flops() / config.sequence_length


# Dense tensor-core rates in bf16, FLOP/s, as their makers state them; other devices are measured.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "A10": 125e12}


def peak_flops(ranks: Ranks) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure is from)."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or "CPU"
    if ranks.dtype == torch.bfloat16:
        for key in sorted(PEAK_FLOPS, key=len, reverse=True):
            if key in name:
                return PEAK_FLOPS[key], f"stated bf16 rate of {name}"
    a, best = torch.randn(1024, 1024, device=ranks.device, dtype=ranks.dtype), math.inf
    for _ in range(5):
        ranks.device.type == "cuda" and torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        ranks.device.type == "cuda" and torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 ** 3 / best, f"measured product rate of {name}, 1024^3, {ranks.dtype}".replace("torch.", "")


# ----------------------------------------------------------------------------------------------------------------------------------------
# Data: shards of uint16 tokens

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def open_shard(path: Path) -> np.ndarray:
    """Tokens of a shard as a read-only memory map of uint16. RunError if it is not a whole shard of modded-nanogpt's or llm.c's format."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise RunError(f"cannot read shard {path}: {error.strerror}") from None
    if len(header) < HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise RunError(f"{path} is not a token shard: header {header[:2].tolist()}, wanted [{SHARD_MAGIC}, {SHARD_VERSION}]; make shards with data/tokenize_text.py")
    if size != HEADER_INTS * 4 + 2 * int(header[2]):
        raise RunError(f"{path} is truncated or damaged: {size} bytes, but its header promises {HEADER_INTS * 4 + 2 * int(header[2])}; delete it and fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4, shape=(int(header[2]),)) if header[2] else np.zeros(0, np.uint16)


def find_shards(folder: str, split: str) -> list[Path]:
    """Sorted shards of a folder; split: train or val. Relative folders that are not here are looked for beside this file."""
    root = next((p for p in (Path(folder), Path(__file__).parent / folder) if p.is_dir()), None)
    files = sorted(root.glob(f"*{split}*.bin")) if root else []
    if not files:
        raise RunError(f"no {split} shards (*{split}*.bin) in {folder}; run ./run.sh, or make them with data/local_corpus.py, data/tokenize_text.py or data/cached_fineweb10B.py")
    return files


def adopt_vocabulary(config: Config):
    """Fill in vocab_size from the folder's meta.json (written by the scripts in data/), else GPT-2's."""
    meta = find_shards(config.data, "train")[0].parent / "meta.json"
    config.vocab_size = config.vocab_size or (json.loads(meta.read_text())["vocab_size"] if meta.exists() else 50257)


def token_bytes(config: Config) -> np.ndarray | None:
    """UTF-8 bytes of every token id (end-of-text: 0), or None where the tokenizer is not known here."""
    if config.vocab_size == 257:
        return np.array([1] * 256 + [0])
    from tiktoken.load import load_tiktoken_bpe
    merges = next(find_shards(config.data, "val")[0].parent.glob("*.tiktoken"), None)
    try:
        ranks = load_tiktoken_bpe(str(merges)) if merges else __import__("tiktoken").get_encoding("gpt2")._mergeable_ranks
    except Exception:  # no merges beside the shards and no way to download them: bits per byte are left out
        return None
    sizes = np.zeros(max(config.vocab_size, max(ranks.values()) + 1), dtype=np.int64)
    sizes[list(ranks.values())] = [len(token) for token in ranks]
    return sizes


class TokenLoader:
    """
    Endless batches of rows of sequence_length + 1 tokens. The order of rows depends on the seed alone: shards in the order of their names, the rows
    of each in an order drawn from (seed, epoch, shard). Rank r of w takes the r-th of w equal parts of every batch.
    """

    def __init__(self, files: list[Path], config: Config, rank: int = 0, world: int = 1):
        self.files, self.config, self.rank, self.world = files, config, rank, world
        self.epoch = self.shard = self.row = 0
        self.total = sum(len(open_shard(file)) for file in files)
        self._open()

    def _open(self):
        config, self.tokens = self.config, open_shard(self.files[self.shard])
        if self.shard + 1 < len(self.files) and hasattr(os, "posix_fadvise"):  # have the next shard read from disk meanwhile
            with open(self.files[self.shard + 1], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        order, T = np.random.default_rng([config.seed, self.epoch, self.shard]), config.sequence_length
        if config.align_documents:
            documents, starts, position = np.flatnonzero(self.tokens == end_of_text(config)), [], 0
            while (next_document := np.searchsorted(documents, position)) < len(documents) and documents[next_document] + T < len(self.tokens):
                starts.append(documents[next_document])
                position = starts[-1] + T
            starts = np.array(starts, dtype=np.int64)
        else:
            starts = np.arange(order.integers(min(T, max(len(self.tokens) - T, 1))), len(self.tokens) - T, T)
        self.starts = order.permutation(starts)

    def state_dict(self) -> dict:
        return dict(epoch=self.epoch, shard=self.shard, row=self.row)

    def load_state_dict(self, state: dict):
        self.epoch, self.shard, self.row = (int(state[name]) for name in ("epoch", "shard", "row"))
        if self.shard >= len(self.files):
            raise RunError(f"the checkpoint stood in training shard {self.shard + 1}, but {self.config.data} has {len(self.files)}; give the same shards")
        self._open()

    def next_batch(self) -> np.ndarray:
        """This rank's rows of the next batch: (rows, sequence_length + 1) int32."""
        T, config, empty = self.config.sequence_length, self.config, 0
        rows, places = config.batch_tokens // T, []
        while len(places) < rows:
            if self.row >= len(self.starts):
                empty = empty + 1 if len(self.starts) == 0 else 0
                if empty >= len(self.files):
                    raise RunError(f"no training shard in {config.data} holds a row of {T + 1} tokens{' that begins a document' * config.align_documents}; lower --sequence_length or add data")
                self.shard, self.row = (self.shard + 1) % len(self.files), 0
                self.epoch += self.shard == 0
                self._open()
                continue
            taken = self.starts[self.row:self.row + rows - len(places)]
            places += [(self.tokens, start) for start in taken]
            self.row += len(taken)
        own = places[self.rank * rows // self.world:(self.rank + 1) * rows // self.world]
        return check_tokens(np.stack([tokens[start:start + T + 1] for tokens, start in own]).astype(np.int32), config)


def check_tokens(rows: np.ndarray, config: Config) -> np.ndarray:
    if rows.size and rows.max() >= config.vocab_size:
        raise RunError(f"token {rows.max()} in {config.data} is outside the vocabulary of {config.vocab_size}; give --vocab_size or shards of this tokenizer")
    return rows


def validation_rows(config: Config) -> np.ndarray:
    """(rows, sequence_length + 1) int32: the first val_tokens tokens in order."""
    T, parts, missing = config.sequence_length, [], config.val_tokens + 1
    for file in find_shards(config.data, "val"):
        parts.append(open_shard(file)[:missing])
        missing -= len(parts[-1])
    tokens = np.concatenate(parts)
    count = (len(tokens) - 1) // T
    if count == 0:
        raise RunError(f"{len(tokens)} validation tokens in {config.data} do not fill a row of {T + 1}; lower --sequence_length or add data")
    return check_tokens(np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[:count * T:T].astype(np.int32), config)


class Prefetcher:
    """Runs a loader on another thread, a few batches ahead. next() gives (rows on the device, the loader's state after them)."""

    def __init__(self, loader: TokenLoader, device: torch.device):
        self.loader, self.device, self.queue, self.stopped = loader, device, queue.Queue(maxsize=4), False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while not self.stopped:
            try:
                rows = torch.from_numpy(self.loader.next_batch())
                item = (rows.pin_memory() if self.device.type == "cuda" else rows, self.loader.state_dict())
            except BaseException as error:  # raised again by next(), on the training thread
                item, self.stopped = error, True
            self.queue.put(item)

    def next(self) -> tuple[Tensor, dict]:
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item[0].to(self.device, non_blocking=True), item[1]


# ----------------------------------------------------------------------------------------------------------------------------------------
# Logs and checkpoints

def write_atomically(path: Path, write):
    """write(file) to a temporary name, then rename: whatever happens, `path` is whole. RunError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free some space or choose another --log_dir") from None


def read_checkpoint(path: str) -> dict:
    """A checkpoint's contents, on the CPU. Nothing in the file is executed. RunError if it is none of ours, or damaged."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise RunError(f"{path} is not a whole checkpoint of this trainer ({type(error).__name__}); give another one") from None
    if not isinstance(saved, dict) or saved.get("format") != "knotgpt-1":
        raise RunError(f"{path} is not a checkpoint of this trainer; give a .pt file from its log folder")
    return saved


def command_output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class RunLog:
    """logs/<run id>.txt, line by line, and logs/<run id>.json. Only rank 0 writes. On a terminal one line is rewritten in place."""

    def __init__(self, config: Config, ranks: Ranks):
        self.main, self.terminal, self.open_line = ranks.rank == 0, sys.stdout.isatty(), False
        folder = Path(config.log_dir)
        self.text, self.json, self.checkpoint = (folder / f"{config.run_id}.{kind}" for kind in ("txt", "json", "pt"))
        self.facts, self.last_shown = {}, 0.0
        if self.main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.file = open(self.text, "a", buffering=1)
            except OSError as error:
                raise RunError(f"cannot write {self.text}: {error.strerror}; choose another --log_dir") from None

    def write(self, text: str, console: bool = False):
        if not self.main:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.text}: {error.strerror}; free some space; the finished steps are kept") from None
        if console:
            print(("\r\033[K" if self.open_line else "") + text, flush=True)
            self.open_line = False

    def progress(self, text: str, now: float):
        """Show a passing state: ten times a second at most on a terminal, every ten seconds elsewhere."""
        if self.main and now - self.last_shown >= (0.1 if self.terminal else 10):
            self.last_shown, self.open_line = now, self.terminal
            print(f"\r\033[K{text}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def save_facts(self, **facts):
        """Update the JSON file."""
        self.facts.update(facts)
        if self.main:
            write_atomically(self.json, lambda file: file.write(json.dumps(self.facts, indent=1, default=str).encode()))

    def header(self, config: Config, ranks: Ranks, source: str, facts: dict):
        """Everything that another needs to repeat the run."""
        cuda = ranks.device.type == "cuda"
        environment = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, triton=package_version("triton"),
                           device=torch.cuda.get_device_name(ranks.device) if cuda else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
                           platform=platform.platform(), world_size=ranks.world, git_commit=command_output("git", "rev-parse", "HEAD"),
                           git_dirty=bool(command_output("git", "status", "--porcelain", "--untracked-files=no")), command=" ".join(sys.argv))
        self.facts.update(run_id=config.run_id, status="running", config=dataclasses.asdict(config), environment=environment, curve=[], **facts)
        self.write(source)
        self.write("=" * 100)
        self.write(f"Running Python {sys.version.split()[0]}, PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}, Triton {environment['triton']}")
        for name in ("device", "platform", "world_size", "git_commit", "git_dirty", "command"):
            self.write(f"{name}: {environment[name]}")
        self.write(f"seed: {config.seed}")
        self.write("config: " + json.dumps(dataclasses.asdict(config)))
        for name, value in facts.items():
            self.write(f"{name}: {value}")
        if cuda and (smi := command_output("nvidia-smi")):
            self.write(smi)
        self.write("=" * 100)


def package_version(name: str) -> str:
    from importlib import metadata
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# ----------------------------------------------------------------------------------------------------------------------------------------
# Training

class Trainer:
    """One run: everything between a configuration and its last checkpoint."""

    def __init__(self, config: Config):
        self.config, self.ranks = config, Ranks.start(config)
        self.resumed = read_checkpoint(config.resume) if config.resume else None
        adopt_vocabulary(config)
        self.micro_rows, self.passes = micro_batches(config, self.ranks.world)
        config.run_id = config.run_id or self._shared_run_id()
        self.loader = TokenLoader(find_shards(config.data, "train"), config, self.ranks.rank, self.ranks.world)
        self.val_rows = validation_rows(config)
        sizes = token_bytes(config)
        self.val_bytes = int(sizes[self.val_rows[:, 1:]].sum()) if sizes is not None else 0
        self.log = RunLog(config, self.ranks)
        self.model = build_model(config, self.ranks)
        if config.init_from:
            self._load_matching(config.init_from)
        self.optimizers = build_optimizers(self.model, config, self.ranks)
        self.flops_per_token, (self.peak, peak_source) = flops_per_token(config), peak_flops(self.ranks)
        self.step, self.train_seconds, self.stop_signal, self.last_loss = 0, 0.0, 0, math.nan
        sha256 = {file.name: hashlib.file_digest(open(file, "rb"), "sha256").hexdigest() if self.log.main else "" for file in find_shards(config.data, "val")}
        count = sum(p.numel() for p in self.model.parameters())
        tables = {id(m.weight): m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Embedding)} | {id(w := self.model.head.projection.weight): w.numel()}
        facts = dict(parameters=count, parameters_without_embeddings=count - sum(tables.values()), flops_per_token=self.flops_per_token, peak_flops=self.peak,
                     peak_flops_source=peak_source, dtype=str(self.ranks.dtype).removeprefix("torch."), compile=compile_mode(config, self.ranks),
                     train_tokens_available=self.loader.total, val_tokens=int(self.val_rows[:, 1:].size), val_bytes=self.val_bytes or None, val_sha256=sha256)
        if self.resumed:
            self._restore(self.resumed)
            self.log.write(f"resumed from {config.resume} at step {self.step}", console=True)
        else:
            self.log.header(config, self.ranks, source_of_run(), facts)
        if self.log.main:
            print(f"run {config.run_id}: track {config.track}{' with ' + ' + '.join(config.variant) if config.variant else ''}, {count / 1e6:.2f}M parameters, "
                  f"{config.steps} steps of {config.batch_tokens} tokens on {self.ranks.world} x {self.ranks.device.type} in {facts['dtype']}; log {self.log.text}", flush=True)

    def _shared_run_id(self) -> str:
        names = [str(uuid.uuid4())]
        if self.ranks.world > 1:
            dist.broadcast_object_list(names, device=torch.device("cpu"))
        return names[0]

    # -- state: what a checkpoint holds

    def _state(self) -> dict:
        """Collective. Model tensors are copies of their own, not views of a bucket."""
        rng = dict(cpu=torch.get_rng_state(), **(dict(cuda=torch.cuda.get_rng_state()) if self.ranks.device.type == "cuda" else {}))
        return dict(format="knotgpt-1", config=dataclasses.asdict(self.config), step=self.step, train_seconds=self.train_seconds, loader=self.loader_state,
                    model={name: tensor.clone() for name, tensor in self.model.state_dict().items()}, optimizers=[o.state_dict() for o in self.optimizers],
                    rng=rng, facts=self.log.facts)

    def _restore(self, saved: dict):
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(f"{self.config.resume} holds another model than this configuration builds: {str(error).splitlines()[-1].strip()}") from None
        self.step, self.train_seconds = saved["step"], saved["train_seconds"]
        self.loader.load_state_dict(saved["loader"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if "cuda" in saved["rng"] and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        self.log.facts.update(saved["facts"])

    def _load_matching(self, path: str):
        """Start from another run's tensors, where name and shape agree; say which did and which did not."""
        saved, own = read_checkpoint(path)["model"], self.model.state_dict()
        matching = {name: saved[name] for name in own if name in saved and saved[name].shape == own[name].shape}
        if not matching:
            raise RunError(f"no tensor of {path} has the name and shape of one in this model; it is of another architecture")
        self.model.load_state_dict(matching, strict=False)
        for title, names in (("loaded", sorted(matching)), ("new in this model", sorted(set(own) - set(matching))), ("left behind", sorted(set(saved) - set(matching)))):
            self.log.write(f"init_from {path}: {title} ({len(names)}): {', '.join(names)}", console=True)

    def save_checkpoint(self):
        state = self._state()
        if self.log.main:
            write_atomically(self.log.checkpoint, lambda file: torch.save(state, file))

    # -- steps

    def train_step(self, rows: Tensor) -> Tensor:
        """One optimizer step on this rank's rows (n, T + 1); returns the mean loss of this rank, without waiting for the device."""
        progress, config, loss = self.step / self.config.steps, self.config, 0.0
        self.model.set_windows(progress)
        for index, part in enumerate(rows.split(self.micro_rows)):
            if index == self.passes - 1:
                for optimizer in self.optimizers:
                    optimizer.expect_last_gradients()
            part_loss = self.model(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (part_loss / (self.passes * self.ranks.world)).backward()
            loss = loss + part_loss.detach() / self.passes
        decay = min(1.0, (1 - progress) / config.decay_fraction) if config.decay_fraction else 1.0
        for optimizer in self.optimizers:
            optimizer.step(config.final_lr + (1 - config.final_lr) * decay, progress)
        for optimizer in self.optimizers:
            optimizer.finish()
        return loss

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation rows, in nats a token; the same for any number of ranks."""
        self.model.eval()
        self.model.set_windows(1.0)
        batch = min(self.micro_rows, len(self.val_rows))
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        starts = range(0, len(self.val_rows), batch)
        for start in starts[self.ranks.rank::self.ranks.world]:
            rows, missing = self.val_rows[start:start + batch], max(0, start + batch - len(self.val_rows))
            rows = torch.from_numpy(rows).to(self.ranks.device)
            if missing:  # the last rows, one at a time: no new shape for the others
                total += sum(self.model(row[None, :-1], row[None, 1:]).double() for row in rows)
            else:
                total += self.model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).double() * batch
        if self.ranks.world > 1:
            dist.all_reduce(total)
        self.model.train()
        return total.item() / len(self.val_rows)

    def warm_up(self):
        """Compile and run every shape and window stage on dummy rows, then put model, optimizers and random state back exactly."""
        self.ranks.synchronize()
        start, step, rng = time.perf_counter(), self.step, torch.get_rng_state()
        kept = [(t, t.clone()) for o in self.optimizers for group in o.groups for t in (group["bucket"].data, *group["state"].values())]
        steps = [o.steps for o in self.optimizers]
        rows = torch.randint(self.config.vocab_size, (self.micro_rows * self.passes, self.config.sequence_length + 1), dtype=torch.int32, device=self.ranks.device)
        stages = len(self.config.window_long)
        for stage in range(stages):
            self.step = math.ceil(stage * self.config.steps / stages)
            self.train_step(rows)
        kept_rows, self.val_rows = self.val_rows, self.val_rows[:self.micro_rows + (len(self.val_rows) % self.micro_rows > 0)]
        self.validate()
        self.val_rows, self.step = kept_rows, step
        for tensor, copy in kept:
            tensor.copy_(copy)
        for optimizer, count in zip(self.optimizers, steps):
            optimizer.steps = count
        torch.set_rng_state(rng)
        self.ranks.synchronize()
        return time.perf_counter() - start

    def run(self) -> int:
        """Train to the end, or until a signal. Returns the exit code."""
        config, log, ranks = self.config, self.log, self.ranks
        self.loader_state = self.loader.state_dict()
        batches = Prefetcher(self.loader, ranks.device)
        compile_model(self.model, compile_mode(config, ranks))
        log.progress("compiling and warming up", time.perf_counter())
        log.save_facts(warmup_seconds=self.warm_up())
        log.write(f"warm-up (compilation included, not timed): {log.facts['warmup_seconds']:.1f} s", console=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ranks.synchronize()
        clock = last_save = time.perf_counter()
        pending = None  # (step, loss, event) of an earlier step: read when it has arrived, so that the host never waits for the device
        while True:
            if self.step == config.steps or self.step == 0 or config.val_every and self.step % config.val_every == 0:
                ranks.synchronize()
                self.train_seconds += time.perf_counter() - clock
                self._validate_and_log()
                ranks.synchronize()
                clock = time.perf_counter()
            if self.step == config.steps:
                break
            rows, next_state = batches.next()
            loss = self.train_step(rows)
            self.step, self.loader_state = self.step + 1, next_state
            now = time.perf_counter()
            elapsed = self.train_seconds + now - clock
            log.write(f"step:{self.step}/{config.steps} train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / self.step:.2f}ms")
            if pending is None:
                event = torch.cuda.Event() if loss.is_cuda else None
                pending = (self.step, loss.to("cpu", non_blocking=True), event)
                event and event.record()
            if pending[2] is None or pending[2].query():
                self._show(*pending[:2], elapsed, now)
                pending = None
            # All ranks must agree: 1 = save and go on, 2 = save and stop
            want = ranks.agree(2 if self.stop_signal else 1 if ranks.rank == 0 and config.save and now - last_save > config.checkpoint_seconds else 0)
            if want:
                ranks.synchronize()
                self.train_seconds += time.perf_counter() - clock
                if config.save:
                    self._save_or_warn(stopping=want == 2)
                if want == 2:
                    return self._stopped()
                ranks.synchronize()
                clock = last_save = time.perf_counter()
        return self._finished()

    def _on_signal(self, number, _frame):
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once

    def _show(self, step: int, loss: Tensor, elapsed: float, now: float):
        self.last_loss = loss.item()
        if not math.isfinite(self.last_loss):
            raise RunError(f"the training loss is {self.last_loss} at step {step}; lower the learning rates or look at the variant's arithmetic. Finished steps are in {self.log.text}")
        rate = self.step * self.config.batch_tokens / elapsed
        left = (self.config.steps - self.step) * elapsed / self.step
        self.log.progress(f"step {self.step}/{self.config.steps}  loss {self.last_loss:.4f}  {rate:,.0f} tokens/s  {1000 * elapsed / self.step:.1f} ms/step  "
                          f"MFU {100 * rate * self.flops_per_token / self.peak / self.ranks.world:.1f} %  {int(left) // 60}:{int(left) % 60:02d} left", now)

    def _validate_and_log(self):
        config, milliseconds = self.config, 1000 * self.train_seconds
        loss = self.validate()
        bits = loss / math.log(2) * self.val_rows[:, 1:].size / self.val_bytes if self.val_bytes else None
        self.log.write(f"step:{self.step}/{config.steps} val_loss:{loss:.4f} train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(self.step, 1):.2f}ms", console=True)
        self.log.write(f"val_bits_per_byte:{bits:.4f}" if bits else "val_bits_per_byte: unknown (no .tiktoken file beside the shards)", console=self.step == config.steps)
        if not math.isfinite(loss):
            raise RunError(f"the validation loss is {loss} at step {self.step}; lower the learning rates or look at the variant's arithmetic")
        point = dict(step=self.step, tokens=self.step * config.batch_tokens, train_ms=milliseconds, val_loss=loss, val_bits_per_byte=bits, train_loss=self.last_loss)
        self.log.save_facts(curve=self.log.facts["curve"] + [point])

    def _save_or_warn(self, stopping: bool):
        try:
            self.save_checkpoint()
        except RunError as error:  # a run is worth more than one of its checkpoints; the one before is still whole
            if stopping:
                raise
            self.log.write(f"warning: {error}", console=True)

    def _stopped(self) -> int:
        name = signal.Signals(self.stop_signal or signal.SIGTERM).name
        self.log.save_facts(status=f"stopped by {name}", step=self.step)
        self.log.write(f"stopped by {name} after step {self.step}" + (f"; continue with --resume {self.log.checkpoint}" if self.config.save else ""), console=True)
        return 128 + (self.stop_signal or signal.SIGTERM)

    def _finished(self) -> int:
        config, final = self.config, self.log.facts["curve"][-1]
        if config.save:
            self.save_checkpoint()
        rate = config.batch_tokens * config.steps / self.train_seconds
        mfu = rate * self.flops_per_token / self.peak / self.ranks.world
        if self.ranks.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated() // 2 ** 20, torch.cuda.max_memory_reserved() // 2 ** 20
        else:
            import resource  # the process' own peak; on Linux in KiB
            allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
        self.log.save_facts(status="finished", step=self.step, val_loss=final["val_loss"], val_bits_per_byte=final["val_bits_per_byte"], train_seconds=self.train_seconds,
                            ms_per_step=1000 * self.train_seconds / config.steps, tokens_per_second=rate, mfu=mfu, peak_memory_mib=allocated, peak_memory_reserved_mib=reserved)
        self.log.write(f"tokens_per_second:{rate:.0f} mfu:{mfu:.4f} ({self.log.facts['peak_flops_source']}: {self.peak / 1e12:.2f} TFLOP/s)", console=True)
        if config.target:
            reached = final["val_loss"] <= config.target
            self.log.write(f"target {config.target}: {'reached' if reached else 'not reached'}, val_loss {final['val_loss']:.4f}", console=True)
        self.log.write(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB", console=True)
        return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 finished, 1 a fault (one line on stderr), 128 + n stopped by signal n."""
    trainer, rank = None, int(os.environ.get("RANK", 0))
    try:
        config = parse_config(argv)
        if config.variant:
            import variants
            variants.apply(config.variant, config)
        trainer = Trainer(config)
        return trainer.run()
    except RunError as error:
        if trainer:
            trainer.log.facts["status"] = f"failed: {error}"
            try:
                trainer.log.write(f"error: {error}")
                trainer.log.save_facts()
            except RunError:  # the disk is full: what is already there stays
                pass
        if rank == 0:
            print(f"train_gpt.py: error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    from train_gpt import main as run_main  # the one trainer module, by name: see the docstring
    sys.exit(run_main())
