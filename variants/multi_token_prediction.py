"""
Multi-token prediction: training also asks for the tokens after the next one; validation does not.

    loss + weight sum_d mean_t -log p_d(token t + 1 + d)        d = 1 .. ahead
    p_d = softmax(head(norm(x_t + M_d norm(x_t))))

x (B, T, model_dim) is the stream after the blocks, M_d (model_dim, model_dim) one matrix for each distance, zero at the
start; the head is shared. Targets of another document, and those behind the end of the row, do not count.

Cost: model_dim^2 parameters and one more pass of the head for each distance, in training only.

Source: Gloeckle et al., 2024, arxiv.org/abs/2404.19737, with one matrix in place of a block for each distance: ours
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import Config, require

GPT = train_gpt.GPT


@dataclass
class Options:
    ahead: int = 1          # how many tokens after the next one are asked for
    weight: float = 0.3     # of each of their losses

    def __post_init__(self):
        require(1 <= self.ahead <= 16, f"ahead={self.ahead} is out of range; give 1 to 16")
        require(0 < self.weight <= 10, f"weight={self.weight} is out of range; give a number above 0, at most 10")


class FarSightedGPT(GPT):
    """The model with a matrix for each distance."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.options = options
        width = config.model_dim
        self.distances = nn.ModuleList(train_gpt.Linear(config, None,
                                                        "gate", width, width) for _ in range(options.ahead))

    def auxiliary_loss(self, x: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        total = 0.0
        for distance, linear in enumerate(self.distances, 1):
            stream = x[:, :-distance]
            inside = self.same_document(tokens, targets, distance)
            logits = self.head(self.final_norm(stream + linear(self.final_norm(stream))))
            nats = logits.logsumexp(-1) - logits.gather(-1, targets[:, distance:, None].long())[..., 0]
            total = total + (nats * inside).sum() / inside.sum().clamp_min(1)
        return self.options.weight * total

    def same_document(self, tokens: Tensor, targets: Tensor, distance: int) -> Tensor:
        """(B, T - distance): whether no document begins between a token and its target, the target included."""
        begins = (targets == self.config.end_of_text).int().cumsum(1)
        before = (tokens[:, :1] * 0).int()  # none begins before the first target
        since = torch.cat((before, begins), dim=1)
        count = begins[:, distance:] - since[:, :-1 - distance]
        return (count == 0).float() if self.config.document_mask else torch.ones_like(count, dtype=torch.float32)


def patch(options: Options):
    train_gpt.GPT = partial(FarSightedGPT, options=options)
