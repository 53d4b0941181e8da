"""
Fused kernels for the baseline's arithmetic, Triton's on a GPU and loops on a CPU: the same model and loss to rounding.

    feed_forward    relu(x W_fc')^2 W_proj' with the squared ReLU in the first product, and its derivative in a product
                    of the backward pass
    cross_entropy   the head's loss and its gradients from the logits of some tokens at a time; fp8=on: its products in
                    float8 (Hopper or newer)
    muon            half of each symmetric product of the orthogonalisation
    residual        the mix of stream and embedding, the residual of attention, and the norm after each, in one pass
    optimizer       Muon's and Adam's elementwise parts in one or two passes, on a CPU; on a GPU the trainer compiles
                    them
    rotary          QK-norm and rotary positions in one pass over q and k
    embedding       rows of all tables and their cast in one pass, gradients without atomic additions, tokens sorted
                    once for all tables

Each option is on, off or auto. auto turns a kernel on where benchmarks/results/ has at least one result file of it from
a GPU of this compute capability, or from a CPU, and every such file has it ahead of all other arms, forward and
backward, at every size; on a CPU compiled arms do not count, as short runs there are eager. On a CPU the kernels are
loops that Numba compiles; muon and embedding are the plain references there. No GPU has run the kernels yet, so auto
turns nothing on there.

A variant that replaces the same module is refused as a collision (turn the option off). A feed-forward or head whose
linear layers are replaced is left alone.

Cost: no parameter; FLOPs as the baseline's, but muon's products, of which it takes 56 to 67 % at 384 channels or more.
Memory: the feed-forward keeps its hidden activations once where the baseline's keeps them twice.

Source: kernels/relu_squared_feed_forward, softcapped_cross_entropy.py, symmetric_product.py, norm_rotary.py,
residual_norm.py, optimizer_updates.py and embedding_lookup.py, which name theirs
Status: unmeasured by a record; benchmarks/README.md has what the loops save on a CPU
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Embedding

import train_gpt
from kernels.backend import has_cpu_loops
from kernels.embedding_lookup import embedding_lookup
from kernels.norm_rotary import norm_rotary
from kernels.optimizer_updates import adam_step, nesterov, normalised_step
from kernels.relu_squared_feed_forward import relu_squared_feed_forward
from kernels.residual_norm import scaled_sum_norm
from kernels.softcapped_cross_entropy import softcapped_cross_entropy
from kernels.symmetric_product import symmetric_product
from train_gpt import AttentionContext, Linear, Norm, Residual, require

Choice = Literal["auto", "on", "off"]

KERNELS = dict(  # option -> the kernel whose result files decide where it is auto
    feed_forward="relu_squared_feed_forward",
    cross_entropy="softcapped_cross_entropy",
    muon="symmetric_product",
    rotary="norm_rotary",
    residual="residual_norm",
    optimizer="optimizer_updates",
    embedding="embedding_lookup",
)
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks/results"


@dataclass
class Options:
    feed_forward: Choice = "on"
    cross_entropy: Choice = "on"
    muon: Choice = "on"
    rotary: Choice = "on"
    residual: Choice = "on"
    optimizer: Choice = "on"
    embedding: Choice = "on"
    fp8: bool = False

    def __post_init__(self):
        for name, kernel in KERNELS.items():
            if getattr(self, name) == "auto":
                setattr(self, name, "on" if is_measured_win(kernel) else "off")
        require(any(getattr(self, name) == "on" for name in KERNELS),
                "no kernel is on: benchmarks/results/ has no win on this device; measure with benchmarks/gpu_suite.py, "
                "or turn one on")
        require(not self.fp8 or self.cross_entropy == "on",
                "fp8=on is of the cross-entropy's kernel, which is off; turn it on, or leave fp8= out")


def is_measured_win(kernel: str) -> bool:
    """
    Return whether there are result files of this kernel's benchmark from a GPU like this machine's, or from a CPU where
    it has none, and all say that the kernel or the loops were the fastest at every size.
    """
    capability, fact = None, "loops_are_fastest"
    if torch.cuda.is_available():
        capability, fact = list(torch.cuda.get_device_capability()), "triton_is_fastest"
    elif not has_cpu_loops():
        return False
    results = [json.loads(file.read_text()) for file in RESULTS.glob(f"{kernel}-*.json")]
    wins = [result[fact] for result in results if result.get("capability") == capability and fact in result]
    return bool(wins) and all(wins)


# ---- Parts of the model -----------------------------------------------------
# Each goes the baseline's way where what it fuses is switched off or replaced.

plain_feed_forward = train_gpt.MLP.forward
plain_heads = train_gpt.CausalSelfAttention.heads
plain_block = train_gpt.Block.forward
plain_mix_stream = train_gpt.Block.mix_stream
plain_look_up = train_gpt.GPT.look_up
plain_cross_entropy = train_gpt.LanguageModelHead.forward


def feed_forward(self, x: Tensor) -> Tensor:
    if type(self.fc) is not Linear or type(self.proj) is not Linear:
        return plain_feed_forward(self, x)
    return relu_squared_feed_forward(x, self.fc.weight.type_as(x), self.proj.weight.type_as(x))


def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    if not self.config.qk_norm or ctx.rotary is None:
        return plain_heads(self, x, ctx)
    q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
    q, k = norm_rotary(q, *ctx.rotary), norm_rotary(k, *ctx.rotary)
    if self.query_gain is not None:
        q = q * self.query_gain.type_as(q)[:, None]
    return q, k, self.mix_value(v, ctx)


def block(self, x: Tensor, ctx: AttentionContext) -> Tensor:
    modules = self.attention_norm, self.mlp_norm, self.attention_residual
    is_plain = tuple(map(type, modules)) == (Norm, Norm, Residual) and type(self).mix_stream is plain_mix_stream
    if not is_plain or self.attention_residual.scale is not None:
        return plain_block(self, x, ctx)
    if self.stream_mix is None:
        h = self.attention_norm(x)
    else:
        x, h = scaled_sum_norm(x, ctx.x0, self.stream_mix)
    x, h = scaled_sum_norm(x, self.attention(h, ctx))
    return self.mlp_residual(x, self.mlp(h))


def look_up(self, tokens: Tensor) -> list[Tensor]:
    tables = [self.embedding, *self.value_embeddings]
    is_fused = all(type(table) is Embedding and table.weight.shape == self.embedding.weight.shape for table in tables)
    if not is_fused:
        return plain_look_up(self, tokens)
    return embedding_lookup(tokens, [table.weight for table in tables], self.dtype)


def make_cross_entropy(fp8: bool):
    """Return a forward() of the head. fp8: its products are in float8 on a GPU."""
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not torch.is_grad_enabled() or type(self.projection) is not Linear:
            return plain_cross_entropy(self, x, targets)
        x, weight = self.operands(x)
        x, targets = x.flatten(0, 1), targets.flatten().long()
        use_fp8 = fp8 and x.is_cuda
        return softcapped_cross_entropy(x, weight, targets, self.softcap, self.chunk, fp8=use_fp8) / len(targets)
    return forward


# ---- Parts of the optimizer -------------------------------------------------

plain_muon_update = train_gpt.Muon.update
plain_adam_update = train_gpt.Adam.update


def muon_update(data, gradient, momentum, second, lr, decay, mu, beta2: float):
    if data.is_cuda:
        plain_muon_update(data, gradient, momentum, second, lr, decay, mu, beta2)
    else:
        update = train_gpt.orthogonalize(nesterov(gradient, momentum, mu))
        normalised_step(data, update, second, lr, decay, beta2)


def adam_update(data, gradient, mean, square, lr, decay, beta1: float, beta2: float, correction1, correction2):
    if data.is_cuda:
        plain_adam_update(data, gradient, mean, square, lr, decay, beta1, beta2, correction1, correction2)
    else:
        adam_step(data, gradient, mean, square, lr, decay, (beta1, beta2), (correction1, correction2))


def patch(options: Options):
    if options.feed_forward == "on":
        train_gpt.MLP.forward = feed_forward
    if options.rotary == "on":
        train_gpt.CausalSelfAttention.heads = heads
    if options.residual == "on":
        train_gpt.Block.forward = block
    if options.optimizer == "on":
        train_gpt.Muon.update = staticmethod(muon_update)
        train_gpt.Adam.update = staticmethod(adam_update)
    if options.embedding == "on":
        train_gpt.GPT.look_up = look_up
    if options.muon == "on":
        train_gpt.symmetric_product = symmetric_product
    if options.cross_entropy == "on":
        train_gpt.LanguageModelHead.forward = make_cross_entropy(options.fp8)
