"""
Stream statistics: at every validation the run's JSON gets what each branch adds to the stream; training stays as it is.

For a residual with the stream x, its branch's output y and the new stream z, over the tokens (B, T) of the first
validation batch: norms are a token's, over its channels. Numbers without a name of their own are means over tokens:
shares of |y|^2 along and across x (rho_par, rho_ortho), cosines of x with y and with z, kurtosis of a token's channels.
`./run.sh visualize stream RUN.json` draws them over depth.

Cost: one eager forward pass a validation, while the clock stands.

Source: ours, for orthogonal residuals
Status: unmeasured
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import train_gpt


@dataclass
class Options:
    pass


def describe_branch(name: str, module: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> dict:
    """The statistics of one residual as JSON values; x, y, z (B, T, model_dim)."""
    x, y, z = (t.float() for t in (x, y, z))
    x_norm, y_norm, z_norm = (t.norm(dim=-1).clamp_min(1e-30) for t in (x, y, z))
    cosine = (x * y).sum(-1) / (x_norm * y_norm)
    centred = x - x.mean(-1, keepdim=True)
    means = dict(
        x_norm=x_norm, z_norm=z_norm, rho_par=cosine.square(), rho_ortho=(1 - cosine.square()) * (y_norm > 1e-30),
        cos_x_y=cosine, cos_x_out=(x * z).sum(-1) / (x_norm * z_norm), y_over_x=y_norm / x_norm,
        relative_step=(z - x).norm(dim=-1) / x_norm,
        kurtosis=centred.pow(4).mean(-1) / centred.square().mean(-1).square().clamp_min(1e-30),
    )
    levels = torch.tensor([0.01, 0.5, 0.99], device=x.device)
    quantiles = torch.quantile(x_norm.flatten(), levels).tolist()
    gates = {
        key: dict(mean=p.mean().item(), std=p.std(correction=0).item(), negative=(p < 0).float().mean().item())
        for key, p in module.named_parameters()
    }
    row = dict(branch=name) | {key: value.mean().item() for key, value in means.items()}
    row |= dict(zip(("x_norm_p1", "x_norm_p50", "x_norm_p99"), quantiles))
    return row | dict(x_max=x.abs().max().item(), parameters=gates)


@torch.no_grad()
def collect_facts(model: nn.Module, tokens: Tensor) -> dict:
    """{"stream": what describe_branch() says of every residual of the model, in the order of depth}; tokens (B, T)."""
    rows, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith("_residual"):
            def look(module, inputs, z, name=name):
                rows.append(describe_branch(name, module, *inputs, z))

            hooks.append(module.register_forward_hook(look))
    try:
        with torch.compiler.set_stance("force_eager"):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(stream=rows)


def patch(options: Options):
    train_gpt.collect_facts = collect_facts
