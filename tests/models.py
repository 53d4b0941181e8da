"""Small models in float64, for tests that compare a variant with its formula or with the baseline."""

import torch

import train_gpt
import variants

SMALL = dict(vocab_size=257, layers=4, model_dim=32, heads=2, head_dim=16, mlp_hidden=64, sequence_length=16,
             batch_tokens=64, zero_init_projections=False)


def config_of(**changes) -> train_gpt.Config:
    """Of a model of 4 layers, 32 channels and rows of 16 bytes, whose branches begin with random tensors."""
    return train_gpt.make_config(SMALL | changes)


def build(*specs: str, config: train_gpt.Config | None = None, dtype: torch.dtype = torch.float64) -> train_gpt.GPT:
    """A model with these variants and its first tensors; without a spec the baseline."""
    config = config or config_of()
    with variants.applied(specs, config):
        model = train_gpt.GPT(config)
    model.initialize(1)
    model.set_windows(1.0)
    model.dtype = dtype
    return model.to(dtype)


def random_tokens(rows: int = 2, T: int = 16, seed: int = 1) -> torch.Tensor:
    """(rows, T) token ids without a document's end, of 256 or more."""
    return torch.randint(255, (rows, T), generator=torch.Generator().manual_seed(seed))


def stream_of(model: train_gpt.GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The stream after the blocks, (rows, T, model_dim)."""
    if model.source is not None:
        model.source.provide()
    return model.select_outputs(model.run_blocks(*model.embed(tokens, model.masks(tokens))))


def scramble(model: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Move every parameter by random numbers of a standard deviation; returns the model."""
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            noise = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(number))
            p.add_(std * noise)
    return model


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """{name: its gradient} of all parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
