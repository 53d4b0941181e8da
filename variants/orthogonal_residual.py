"""
Orthogonal-parallel residual: a branch's output is split along the stream and across it, each part with its own gain.

    c = <x, y> / max(<x, x>, eps)     y_par = c x     y_perp = y - c x
    z = x + alpha y_perp + beta y_par = (1 + c (beta - alpha)) x + alpha y

x is the stream (B, T, model_dim), y what attention or feed-forward made of it, z the new stream. Products and sums are
over the channels of a token, at least float32. alpha = beta = 1 is x + y, bit for bit. The options:

    form          split: alpha and beta learned
                  layerscale: alpha = beta learned, LayerScale or SkipInit
                  orthogonal: alpha = 1, beta = 0, the orthogonal residual update
                  orthogonal_scaled: alpha learned, beta = 0
                  angle: alpha = sin t, beta = cos t, t learned from pi / 4
                  stream_scale: z = lambda x + y with lambda learned from 1
                  published: z = x + alpha y_perp + beta (c / S) y with S the sum of y's channels, as in the author's
                  notebook; l2: the same with S = |y|. Both point along y, not along x
    gates         scalar: a number for each branch; channel: a vector; fixed: numbers that stay
    alpha, beta   where they begin, or stay; alpha_std, beta_std: of a normal distribution around these
    init          identity: by these four; published: N(0.25, 0.5^2) and N(0.15, 0.25^2) instead
    sites         both, or the branches of attention or mlp alone; the others are added as ever
    eps_mode      clamp: max(<x, x>, eps); add: <x, x> + eps
    guard_kappa   of published and l2: |S| is at least so much |y|, a deviation from the source without which a branch
                  that begins at zero gives NaN; 0: none
    gate_lr_mul   of the gates' learning rate
    gate_wd_mul   of --weight_decay for the gates' distance from where they begin (0: none)
    kernel        on: the attention's residual and the feed-forward's norm are one operation, kernels/residual_norm,
                  for split, layerscale and orthogonal forms, with gates=fixed the plain residual too; off: the formula.
                  No GPU has decided between them yet

With scalar gates and a norm at every reader of the stream, beta only rescales a token's step and alpha is LayerScale:
the null hypothesis. Where a sublayer reads the normalised stream, as here, the stream and what the sublayer read have
one direction, so there is no choice of reference.

Cost: 2 numbers, or 2 model_dim, a branch; the stream and y are read once more forward and twice backward, on a CPU 12 %
of a step, compiled 6 %; a kernel saves these reads on a GPU (not measured).

Source: lof310/projects, orthogonal-parallel residual; Oh et al., Revisiting Residual Connections (ORU), 2025,
arxiv.org/abs/2505.11881; angle and scaled form also in BootsofLagrangian/ortho-residual; Touvron et al., LayerScale,
2021, arxiv.org/abs/2103.17239; De & Smith, SkipInit, 2020, arxiv.org/abs/2002.10444
Status: too few pairs in 2026-11-22_ElevenResiduals
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from kernels.backend import wide
from kernels.residual_norm import residual_norm
from train_gpt import AttentionContext, Block, Config, Norm, require

FORMS = dict(  # form -> what is learned, where gates are not fixed
    split=("alpha", "beta"),
    layerscale=("alpha",),
    orthogonal=(),
    orthogonal_scaled=("alpha",),
    angle=("angle",),
    stream_scale=("scale",),
    published=("alpha", "beta"),
    l2=("alpha", "beta"),
)
PUBLISHED = dict(alpha=(0.25, 0.5), beta=(0.15, 0.25))  # mean and standard deviation of the gates' first values

Form = Literal["split", "layerscale", "orthogonal", "orthogonal_scaled", "angle", "stream_scale", "published", "l2"]


@dataclass
class Options:
    form: Form = "split"
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
        # numbers
        require(math.isfinite(self.alpha) and math.isfinite(self.beta),
                f"alpha={self.alpha},beta={self.beta}: give finite numbers")
        require(self.alpha_std >= 0 and self.beta_std >= 0,
                f"alpha_std={self.alpha_std},beta_std={self.beta_std}: a standard deviation is 0 or above")
        require(self.eps > 0,
                f"eps={self.eps}: give a number above 0, which keeps a stream of zeros from dividing by zero")
        require(0 <= self.guard_kappa <= 1, f"guard_kappa={self.guard_kappa}: give a share of |y| from 0 to 1")
        require(self.gate_lr_mul > 0 and self.gate_wd_mul >= 0,
                f"gate_lr_mul={self.gate_lr_mul},gate_wd_mul={self.gate_wd_mul}: give a factor above 0 and one of at "
                "least 0")

        # what goes together
        drawn = self.alpha_std or self.beta_std or self.init == "published"
        require(not (self.gates == "fixed" and drawn),
                "gates=fixed are two numbers, not drawn; give alpha= and beta=")
        require(not (self.form in ("orthogonal", "stream_scale") and self.gates == "channel"),
                f"form={self.form} has no gates for channels; leave gates= out")
        require(not (self.kernel == "on" and self.form in ("stream_scale", "published", "l2")),
                f"form={self.form} is not what the kernel computes; leave kernel= out")


class OrthogonalMix(torch.autograd.Function):
    """
    z of x and y (.., D), alpha and beta () or (D,), with a backward pass of its own, which keeps x, y and three numbers
    a token. add: eps is added to <x, x>, which else is at least eps. A coefficient in bfloat16 would leave 1e-3 of the
    stream in what should be orthogonal to it, so everything is computed in float32 or more.
    """

    @staticmethod
    def forward(ctx, x, y, alpha, beta, eps: float, add: bool):
        stream, new = wide(x), wide(y)
        squared = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).square()
        inverse = 1 / (squared + eps if add else squared.clamp_min(eps))
        c = (stream * new).sum(-1, keepdim=True) * inverse
        doubled = 2 * c if add else 2 * c * (squared > eps)  # below eps the denominator does not depend on x
        ctx.save_for_backward(x, y, alpha, beta, c, inverse, doubled)
        return torch.addcmul(new * alpha, stream, 1 + c * (beta - alpha)).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, y, alpha, beta, c, inverse, doubled = ctx.saved_tensors
        stream, new, g = wide(x), wide(y), wide(grad)
        gap = beta - alpha

        # sums over channels for x and y, over tokens for the gates; across: of alpha and beta together
        along, across = g * stream, None
        if alpha.ndim:
            gap_along = (along * gap).sum(-1, keepdim=True)
            d_beta = (along * c).flatten(0, -2).sum(0)
            across = (g * new).flatten(0, -2).sum(0)
        else:
            along = along.sum(-1, keepdim=True)
            gap_along = along * gap
            d_beta = (along * c).sum()
            if any(ctx.needs_input_grad[2:4]):
                across = (g * new).sum()

        ratio = gap_along * inverse
        d_y = torch.addcmul(g * alpha, stream, ratio)
        d_x = torch.addcmul(g * (1 + c * gap), new, ratio).addcmul_(stream, -doubled * ratio)
        d_alpha = None if across is None else across - d_beta
        return d_x.type_as(x), d_y.type_as(y), d_alpha, d_beta, None, None


def add_along_output(x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, options: Options) -> Tensor:
    """Return z of the forms published and l2, whose "parallel" part is (c / S) y."""
    stream, new = wide(x), wide(y)
    squared = stream.square().sum(-1, keepdim=True)
    denominator = squared + options.eps if options.eps_mode == "add" else squared.clamp_min(options.eps)
    c = (stream * new).sum(-1, keepdim=True) / denominator

    # S
    norm = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    size = norm if options.form == "l2" else new.sum(-1, keepdim=True)
    if options.guard_kappa:
        floor = options.guard_kappa * norm
        size = torch.where(size.abs() >= floor, size, torch.where(size < 0, -floor, floor))
        size = torch.where(norm == 0, 1.0, size)

    return (stream + alpha * (new - c * stream) + beta * (c / size) * new).type_as(x)


class OrthogonalResidual(nn.Module):
    """forward(x (B, T, model_dim), branch_output) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, branch: str, options: Options):
        super().__init__()
        self.options = options
        self.form = options.form if options.sites in ("both", branch) else "plain"  # plain: x + y

        # name -> where a gate begins
        first = dict(alpha=(options.alpha, options.alpha_std), beta=(options.beta, options.beta_std))
        if options.init == "published":
            first = PUBLISHED
        self.begin = {name: mean for name, (mean, _) in first.items()}

        # the gates, () or (model_dim,), as distances from where they begin, to which weight decay pulls them; None: it
        # stays there, or is none of this form's
        learned = () if options.gates == "fixed" else FORMS.get(self.form, ())
        shape = (config.model_dim,) if options.gates == "channel" else ()
        for name in ("alpha", "beta", "angle", "scale"):
            if name not in learned:
                self.register_parameter(name, None)
                continue
            p = nn.Parameter(torch.zeros(shape))
            p.init_std = first[name][1] if name in first else 0.0
            p.lr_mul = options.gate_lr_mul
            p.wd_mul = options.gate_wd_mul
            p.optimizer = "adam"
            self.register_parameter(name, p)

    def gate(self, name: str, begin: float, x: Tensor) -> Tensor:
        """Return one gate, () or (model_dim,), at least float32."""
        distance = getattr(self, name)
        if distance is None:
            return torch.full((), begin, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return distance + begin

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and beta, both () or both (model_dim,), at least float32."""
        if self.form == "angle":
            angle = self.gate("angle", math.pi / 4, x)
            return angle.sin(), angle.cos()
        alpha = self.gate("alpha", 1.0 if self.form == "orthogonal" else self.begin["alpha"], x)
        if self.form in ("orthogonal", "orthogonal_scaled"):
            return alpha, torch.zeros_like(alpha)
        if self.form == "layerscale":
            return alpha, alpha
        return alpha, self.gate("beta", self.begin["beta"], x)

    @property
    def is_plain(self) -> bool:
        """Whether it is x + y: of a site that is left out, or with gates that stay at 1."""
        if self.form == "plain":
            return True
        stays_at_one = self.options.gates == "fixed" and self.begin == dict(alpha=1, beta=1)
        return stays_at_one and self.form in ("split", "layerscale")

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        if self.form == "plain":
            return x + branch_output
        if self.form == "stream_scale":
            return (x if self.scale is None else x * (1 + self.scale).type_as(x)) + branch_output
        alpha, beta = self.gates(x)
        if self.form in ("published", "l2"):
            return add_along_output(x, branch_output, alpha, beta, self.options)
        return OrthogonalMix.apply(x, branch_output, alpha, beta, self.options.eps, self.options.eps_mode == "add")


class FusedBlock(Block):
    """A block whose attention joins the stream in one operation with the feed-forward's norm."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        require(type(self.mlp_norm) is Norm,
                "variant orthogonal_residual: kernel=on computes the trainer's own norm, which another variant "
                "replaces; leave one of them out")

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x, residual = self.mix_stream(x, ctx), self.attention_residual
        alpha, beta = (None, None) if residual.is_plain else residual.gates(x)
        attention = self.attention(self.attention_norm(x), ctx)
        options = residual.options
        x, normed = residual_norm(x, attention, alpha, beta, eps=options.eps, eps_mode=options.eps_mode)
        return self.mlp_residual(x, self.mlp(normed))


def patch(options: Options):
    train_gpt.Residual = partial(OrthogonalResidual, options=options)
    if options.kernel == "on":
        train_gpt.Block = FusedBlock
