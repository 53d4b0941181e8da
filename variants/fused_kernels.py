"""
The baseline's own arithmetic in fused kernels, Triton's on a GPU and loops on a CPU, each where it was measured to be faster: the same model, the same loss to rounding.

    feed_forward    relu(x W_fc')^2 W_proj' with the squared ReLU in the first product, and its derivative in a product of the backward pass
    cross_entropy   the head's loss and its gradients from the logits of some tokens at a time; fp8=on: its products in float8 (Hopper or newer)
    muon            half of each symmetric product of the orthogonalisation
    residual        the mix of stream and embedding, the residual of attention, and the norm after each, in one pass
    optimizer       Muon's and Adam's elementwise parts in one or two passes, on a CPU; on a GPU the trainer compiles them
    rotary          QK-norm and rotary positions in one pass over q and k
    embedding       rows of all tables and their cast in one pass, gradients without atomic additions, tokens sorted once for all tables

Each option is on, off or auto: on where every result file of the kernel in benchmarks/results/ from a GPU of this compute capability, or from a CPU, and at least one,
has it ahead of all other arms, forward and backward, at every size; on a CPU of all but compiled ones, as short runs there are eager. On a CPU the kernels are loops that Numba compiles, for muon and embedding the plain references. A variant
that replaces the same part is refused as a collision (turn the option off); a feed-forward or head whose linear layers are replaced is left alone.

Cost: no parameter; FLOPs as the baseline's, but muon's products, of which it takes 56 to 67 % at 384 channels or more. Memory: the feed-forward keeps its hidden
activations once where the baseline's keeps them twice.

Source: kernels/relu_squared_feed_forward.py, softcapped_cross_entropy.py, symmetric_product.py, norm_rotary.py, residual_norm.py, optimizer_updates.py and
embedding_lookup.py, which name theirs
Status: never run on a GPU, so auto turns nothing on there; on a CPU the loops take a tenth off an eager step of track cpu (benchmarks/README.md)
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
from train_gpt import GPT, MLP, Adam, AttentionContext, Block, CausalSelfAttention, LanguageModelHead, Linear, Muon, Norm, Residual

Choice = Literal["auto", "on", "off"]
KERNELS = dict(feed_forward="relu_squared_feed_forward", cross_entropy="softcapped_cross_entropy", muon="symmetric_product", rotary="norm_rotary",
               residual="residual_norm", optimizer="optimizer_updates", embedding="embedding_lookup")
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
                capability = list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
                setattr(self, name, "on" if measured_win(kernel, capability) and (capability or has_cpu_loops()) else "off")
        if all(getattr(self, name) == "off" for name in KERNELS):
            raise ValueError("no kernel is on: benchmarks/results/ has no win on this device; measure with benchmarks/gpu_suite.py, or turn one on")
        if self.fp8 and self.cross_entropy == "off":
            raise ValueError("fp8=on is of the cross-entropy's kernel, which is off; turn it on, or leave fp8= out")

def measured_win(kernel: str, capability: list[int] | None) -> bool:
    """
    Whether there are result files of this kernel's benchmark on GPUs of this compute capability, or on CPUs (None), and all say that the kernel or the loops
    were the fastest at every size.
    """
    fact = "triton_is_fastest" if capability else "loops_are_fastest"
    results = [json.loads(file.read_text()) for file in RESULTS.glob(f"{kernel}-*.json")]
    wins = [found[fact] for found in results if found.get("capability") == capability and fact in found]
    return bool(wins) and all(wins)

def feed_forward(self, x: Tensor) -> Tensor:
    if type(self.fc) is not Linear or type(self.proj) is not Linear:
        return plain_feed_forward(self, x)
    return relu_squared_feed_forward(x, self.fc.weight.type_as(x), self.proj.weight.type_as(x))

def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
    if not self.config.qk_norm or ctx.rotary is None:
        return plain_heads(self, x, ctx)
    q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
    return norm_rotary(q, *ctx.rotary), norm_rotary(k, *ctx.rotary), self.mix_value(v, ctx)

def block(self, x: Tensor, ctx: AttentionContext) -> Tensor:
    plain = (type(self.attention_norm), type(self.mlp_norm), type(self.attention_residual)) == (Norm, Norm, Residual)
    if not plain or type(self).mix_stream is not plain_mix_stream:
        return plain_block(self, x, ctx)
    if self.stream_mix is None:
        h = self.attention_norm(x)
    else:
        x, h = scaled_sum_norm(x, ctx.x0, self.stream_mix)
    x, h = scaled_sum_norm(x, self.attention(h, ctx))
    return self.mlp_residual(x, self.mlp(h))

def look_up(self, tokens: Tensor) -> list[Tensor]:
    tables = [self.embedding, *self.value_embeddings]
    if any(type(table) is not Embedding for table in tables):
        return plain_look_up(self, tokens)
    return embedding_lookup(tokens, [table.weight for table in tables], self.dtype)

def muon_update(data, gradient, momentum, second, lr, decay, mu, beta2: float):
    if data.is_cuda:
        plain_muon_update(data, gradient, momentum, second, lr, decay, mu, beta2)
    else:
        normalised_step(data, train_gpt.orthogonalize(nesterov(gradient, momentum, mu)), second, lr, decay, beta2)

def adam_update(data, gradient, mean, square, lr, decay, beta1: float, beta2: float, correction1, correction2):
    if data.is_cuda:
        plain_adam_update(data, gradient, mean, square, lr, decay, beta1, beta2, correction1, correction2)
    else:
        adam_step(data, gradient, mean, square, lr, decay, (beta1, beta2), (correction1, correction2))

def cross_entropy(fp8: bool):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not torch.is_grad_enabled() or type(self.projection) is not Linear:
            return plain_cross_entropy(self, x, targets)
        x, targets = x.flatten(0, 1), targets.flatten().long()
        return softcapped_cross_entropy(x, self.projection.weight, targets, self.softcap, self.chunk, fp8=fp8 and x.is_cuda) / len(targets)
    return forward

plain_feed_forward, plain_heads, plain_look_up, plain_cross_entropy = MLP.forward, CausalSelfAttention.heads, GPT.look_up, LanguageModelHead.forward
plain_block, plain_mix_stream, plain_muon_update, plain_adam_update = Block.forward, Block.mix_stream, Muon.update, Adam.update

def patch(options: Options):
    if options.feed_forward == "on":
        train_gpt.MLP.forward = feed_forward
    if options.rotary == "on":
        train_gpt.CausalSelfAttention.heads = heads
    if options.residual == "on":
        train_gpt.Block.forward = block
    if options.optimizer == "on":
        train_gpt.Muon.update, train_gpt.Adam.update = staticmethod(muon_update), staticmethod(adam_update)
    if options.embedding == "on":
        train_gpt.GPT.look_up = look_up
    if options.muon == "on":
        train_gpt.symmetric_product = symmetric_product
    if options.cross_entropy == "on":
        train_gpt.LanguageModelHead.forward = cross_entropy(options.fp8)
