"""
Regularisation: dropout of each branch's output, label smoothing of the targets; both in training only.

    x + m y / (1 - p)                                       m: 0 with probability p for each number of y, else 1
    loss = (1 - s) mean(-log p(target)) + s mean over tokens and ids of -log p(id)

Cost: dropout reads and writes each branch once more; smoothing keeps the logits (tokens, vocabulary) of a whole micro
batch for the backward pass, which the baseline never does.

Source: Srivastava et al., Dropout, 2014; label smoothing: Szegedy et al., 2016, arxiv.org/abs/1512.00567
Status: unmeasured
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import train_gpt
from train_gpt import Config, require

Residual, LanguageModelHead = train_gpt.Residual, train_gpt.LanguageModelHead


@dataclass
class Options:
    dropout: float = 0.1    # p
    smoothing: float = 0.0  # s

    def __post_init__(self):
        require(0 <= self.dropout < 1 and 0 <= self.smoothing < 1 and self.dropout + self.smoothing > 0,
                f"dropout={self.dropout},smoothing={self.smoothing} do nothing or are out of range; give numbers of at "
                "least 0 and below 1, one of them above 0")


class DropoutResidual(Residual):
    def __init__(self, config: Config, layer: int, branch: str, options: Options):
        super().__init__(config, layer, branch)
        self.dropout = options.dropout

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        return super().forward(x, F.dropout(branch_output, self.dropout, self.training))


class SmoothingHead(LanguageModelHead):
    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.smoothing = options.smoothing

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None or not self.training:
            return super().forward(x, targets)
        logits = super().forward(x)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), label_smoothing=self.smoothing)


def patch(options: Options):
    if options.dropout:
        train_gpt.Residual = partial(DropoutResidual, options=options)
    if options.smoothing:
        train_gpt.LanguageModelHead = partial(SmoothingHead, options=options)
