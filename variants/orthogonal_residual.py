"""
Orthogonal-parallel residual: a branch's output is split along the stream and across it, and each part is added with a gain of its own.

    c = <x, y> / max(<x, x>, eps)     y_par = c x     y_perp = y - c x     z = x + alpha y_perp + beta y_par = (1 + c (beta - alpha)) x + alpha y

x is the stream (B, T, model_dim), y what attention or feed-forward made of it, z the new stream; products and sums over the channels of a token, at least
float32. alpha = beta = 1 is x + y, bit for bit. The options:

    form          split: alpha and beta learned. layerscale: alpha = beta learned, LayerScale or SkipInit. orthogonal: alpha = 1, beta = 0, the orthogonal
                  residual update. orthogonal_scaled: alpha learned, beta = 0. angle: alpha = sin t, beta = cos t, t learned from pi / 4. stream_scale: z = lambda x + y
                  with lambda learned from 1. published: z = x + alpha y_perp + beta (c / S) y with S the sum of y's channels, as in the author's notebook; l2: the
                  same with S = |y|. Both point along y, not along x
    gates         scalar: a number for each branch; channel: a vector; fixed: numbers that stay
    alpha, beta   where they begin, or stay; alpha_std, beta_std: of a normal distribution around these
    init          identity: by these four; published: N(0.25, 0.5^2) and N(0.15, 0.25^2) instead
    sites         both, or the branches of attention or mlp alone; the others are added as ever
    eps_mode      clamp: max(<x, x>, eps); add: <x, x> + eps
    guard_kappa   of published and l2: |S| is at least so much |y|, a deviation from the source without which a branch that begins at zero gives NaN; 0: none
    gate_lr_mul, gate_wd_mul   of the gates' learning rate, and of --weight_decay for their distance from where they begin (0: none)
    kernel        on: the attention's residual and the feed-forward's norm are one operation, kernels/residual_norm.py, for split, layerscale and orthogonal forms,
                  with gates=fixed the plain residual too; off: the formula. No GPU has decided between them yet

With scalar gates and a norm at every reader of the stream, beta only rescales a token's step and alpha is LayerScale: the null hypothesis. Where a
sublayer reads the normalised stream, as here, the stream and what the sublayer read have one direction, so there is no choice of reference.

Cost: 2 numbers, or 2 model_dim, a branch; the stream and y are read once more forward and twice backward, on a CPU 12 % of a step, compiled 6 %; a kernel saves
these reads on a GPU (not measured).

Source: lof310/projects, orthogonal-parallel residual; Oh et al., Revisiting Residual Connections (ORU), 2025, arxiv.org/abs/2505.11881; angle and scaled form also in
BootsofLagrangian/ortho-residual; Touvron et al., LayerScale, 2021, arxiv.org/abs/2103.17239; De & Smith, SkipInit, 2020, arxiv.org/abs/2002.10444
Status: cpu track, 500k bytes, 4 seeds, eleven forms: none distinguishable from plain addition, published gates 0.03 worse in every pair, norms not balanced; variants/README.md
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.residual_norm import residual_norm
from train_gpt import Block, Config, Norm, RunError

FORMS = dict(split=("alpha", "beta"), layerscale=("alpha",), orthogonal=(), orthogonal_scaled=("alpha",), angle=("angle",), stream_scale=("scale",),
             published=("alpha", "beta"), l2=("alpha", "beta"))  # what is learned, where gates are not fixed
PUBLISHED = dict(alpha=(0.25, 0.5), beta=(0.15, 0.25))  # mean and standard deviation

@dataclass
class Options:
    form: Literal["split", "layerscale", "orthogonal", "orthogonal_scaled", "angle", "stream_scale", "published", "l2"] = "split"
    gates: Literal["scalar", "channel", "fixed"] = "scalar"
    init: Literal["identity", "published"] = "identity"
    alpha: float = 1.0
    beta: float = 1.0
    alpha_std: float = 0.0
    beta_std: float = 0.0
    sites: Literal["both", "attention", "mlp"] = "both"
    eps: float = 1e-8
    eps_mode: Literal["clamp", "add"] = "clamp"
    guard_kappa: float = 1e-2
    gate_lr_mul: float = 1.0
    gate_wd_mul: float = 0.0
    kernel: Literal["off", "on"] = "off"

    def __post_init__(self):
        faults = [
            (not all(map(math.isfinite, (self.alpha, self.beta))), f"alpha={self.alpha},beta={self.beta}: give finite numbers"),
            (not (self.alpha_std >= 0 and self.beta_std >= 0), f"alpha_std={self.alpha_std},beta_std={self.beta_std}: a standard deviation is 0 or above"),
            (not self.eps > 0, f"eps={self.eps}: give a number above 0, which keeps a stream of zeros from dividing by zero"),
            (not 0 <= self.guard_kappa <= 1, f"guard_kappa={self.guard_kappa}: give a share of |y| from 0 to 1"),
            (not (self.gate_lr_mul > 0 and self.gate_wd_mul >= 0), f"gate_lr_mul={self.gate_lr_mul},gate_wd_mul={self.gate_wd_mul}: give a factor above 0 and one of at least 0"),
            (self.gates == "fixed" and (self.alpha_std or self.beta_std or self.init == "published"), "gates=fixed are two numbers, not drawn; give alpha= and beta="),
            (self.form in ("orthogonal", "stream_scale") and self.gates == "channel", f"form={self.form} has no gates for channels; leave gates= out"),
            (self.kernel == "on" and self.form in ("stream_scale", "published", "l2"), f"form={self.form} is not what the kernel computes; leave kernel= out")]
        if message := next((message for fault, message in faults if fault), None):
            raise ValueError(message)

def wide(x: Tensor) -> Tensor:
    """At least float32: a coefficient in bfloat16 leaves 1e-3 of the stream in what should be orthogonal to it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

class OrthogonalMix(torch.autograd.Function):
    """z of x, y (.., D), alpha and beta () or (D,), with a backward pass of its own, which keeps x, y and three numbers a token. add: eps is added to <x, x>."""
    @staticmethod
    def forward(ctx, x, y, alpha, beta, eps: float, add: bool):
        stream, new = wide(x), wide(y)
        squared = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).square()
        inverse = 1 / (squared + eps if add else squared.clamp_min(eps))
        c = (stream * new).sum(-1, keepdim=True) * inverse
        # below eps the denominator does not depend on x
        ctx.save_for_backward(x, y, alpha, beta, c, inverse, 2 * c if add else 2 * c * (squared > eps))
        return torch.addcmul(new * alpha, stream, 1 + c * (beta - alpha)).type_as(x)
    @staticmethod
    def backward(ctx, grad):
        x, y, alpha, beta, c, inverse, doubled = ctx.saved_tensors
        stream, new, g, gap = wide(x), wide(y), wide(grad), beta - alpha
        along, across = g * stream, None
        if alpha.ndim:
            gap_along, d_beta = (along * gap).sum(-1, keepdim=True), (along * c).flatten(0, -2).sum(0)
            across = (g * new).flatten(0, -2).sum(0)
        else:
            along = along.sum(-1, keepdim=True)
            gap_along, d_beta = along * gap, (along * c).sum()
            across = (g * new).sum() if any(ctx.needs_input_grad[2:4]) else None
        ratio = gap_along * inverse
        d_y = torch.addcmul(g * alpha, stream, ratio)
        d_x = torch.addcmul(g * (1 + c * gap), new, ratio).addcmul_(stream, -doubled * ratio)
        d_alpha = across - d_beta if across is not None else None
        return d_x.type_as(x), d_y.type_as(y), d_alpha, d_beta, None, None

def along_output(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, options: Options) -> Tensor:
    """Forms published and l2: the "parallel" part is (c / S) y."""
    stream, new = wide(x), wide(y)
    squared = stream.square().sum(-1, keepdim=True)
    c = (stream * new).sum(-1, keepdim=True) / (squared + options.eps if options.eps_mode == "add" else squared.clamp_min(options.eps))
    norm = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    size = norm if options.form == "l2" else new.sum(-1, keepdim=True)
    if options.guard_kappa:
        floor = options.guard_kappa * norm
        size = torch.where(size.abs() >= floor, size, torch.where(size < 0, -floor, floor))
        size = torch.where(norm == 0, 1.0, size)
    return (stream + alpha * (new - c * stream) + beta * (c / size) * new).type_as(x)

class OrthogonalResidual(nn.Module):
    """forward(x (B, T, model_dim), branch_output) -> same shape."""
    def __init__(self, config: Config, layer: int, branch: str, options: Options):
        super().__init__()
        self.options, self.form = options, options.form if options.sites in ("both", branch) else "plain"
        begin = PUBLISHED if options.init == "published" else dict(alpha=(options.alpha, options.alpha_std), beta=(options.beta, options.beta_std))
        self.begin = {name: mean for name, (mean, _) in begin.items()}
        learned = () if options.gates == "fixed" else FORMS.get(self.form, ())
        for name in ("alpha", "beta", "angle", "scale"):
            p = nn.Parameter(torch.zeros(config.model_dim if options.gates == "channel" else ())) if name in learned else None
            if p is not None:  # the distance from where it begins, to which weight decay pulls it
                p.init_std, p.lr_mul, p.wd_mul, p.optimizer = begin.get(name, (0, 0.0))[1], options.gate_lr_mul, options.gate_wd_mul, "adam"
            self.register_parameter(name, p)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta, both () or both (model_dim,), at least float32."""
        value = lambda name, begin: torch.full((), begin, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) if getattr(self, name) is None else getattr(self, name) + begin
        if self.form == "angle":
            angle = value("angle", math.pi / 4)
            return angle.sin(), angle.cos()
        alpha = value("alpha", 1.0 if self.form == "orthogonal" else self.begin["alpha"])
        if self.form in ("orthogonal", "orthogonal_scaled"):
            return alpha, torch.zeros_like(alpha)
        return alpha, alpha if self.form == "layerscale" else value("beta", self.begin["beta"])

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        if self.form == "plain":
            return x + branch_output
        if self.form == "stream_scale":
            return (x if self.scale is None else x * (1 + self.scale).type_as(x)) + branch_output
        alpha, beta = self.gates(x)
        if self.form in ("published", "l2"):
            return along_output(x, branch_output, alpha, beta, self.options)
        return OrthogonalMix.apply(x, branch_output, alpha, beta, self.options.eps, self.options.eps_mode == "add")

class FusedBlock(Block):
    """A block whose attention joins the stream in one operation with the feed-forward's norm."""
    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        if type(self.mlp_norm) is not Norm:
            raise RunError("variant orthogonal_residual: kernel=on computes the trainer's own norm, which another variant replaces; leave one of them out")

    def forward(self, x: Tensor, ctx: train_gpt.AttentionContext) -> Tensor:
        x, residual = self.mix_stream(x, ctx), self.attention_residual
        plain = residual.form == "plain" or residual.options.gates == "fixed" and residual.form in ("split", "layerscale") and residual.begin == dict(alpha=1, beta=1)
        alpha, beta = (None, None) if plain else residual.gates(x)
        x, normed = residual_norm(x, self.attention(self.attention_norm(x), ctx), alpha, beta, eps=residual.options.eps, eps_mode=residual.options.eps_mode)
        return self.mlp_residual(x, self.mlp(normed))

def patch(options: Options):
    train_gpt.Residual = partial(OrthogonalResidual, options=options)
    if options.kernel == "on":
        train_gpt.Block = FusedBlock
