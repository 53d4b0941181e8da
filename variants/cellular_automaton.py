"""
Neural cellular automaton: a rule that all cells share grows the blocks' matrices out of nothing.

    s_i <- s_i + mask_i rule([s_i; s_i - s_{i-1}; s_i - s_{i+1}; p_i])        `steps` times, from s = 0
    W = W_0 + gain S        S: the cells' states of a matrix, flattened; W_0: the baseline's first matrix

A cell i has `channels` numbers s_i of a matrix, in the order of its rows; a matrix is a line of cells, beyond whose
ends nothing differs. rule has two hidden layers of ReLU and a linear one without bias. p_i says where the cell is: the
layer, sines and cosines of its row and column, a learned vector of the kind of matrix. A gain a matrix begins at zero.
Matrices are grown once an optimizer step.

    steps         0: the baseline
    p             each cell takes part in a step of training with this probability; elsewhere all take part, by p
    positions     whether there are p_i
    style         published: all parameters of the model are one line of cells, whose first states have standard
                  deviation 0.02, and W = S; no p_i, p = 0.5 in training and 1 elsewhere, the rule's last layer begins
                  at zero. No cell can know more than `steps` cells around it, and scales begin near 0 instead of 1

Cost: the rule's parameters alone are learned, and a gain a matrix; W_0 comes from the seed. A step spends about
8 steps / channels times the rule's parameters in multiply-adds for every number grown; states of all steps are kept.

Source: Mordvintsev et al., Growing Neural Cellular Automata, 2020, distill.pub/2020/growing-ca; published:
parameter-golf pull request 1589
Status: unmeasured
Declared: style=published fails test_trains
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import train_gpt
from train_gpt import Config, WeightSource, draw_normal, require
from variants.hypernetwork import draw, gains, kind_of, linear, set_rate

KIND_CHANNELS = 8
FREQUENCIES = 4         # of sines and cosines of rows and of columns
PUBLISHED_STD = 0.02


@dataclass
class Options:
    steps: int = 8
    channels: int = 16
    hidden: int = 64
    p: float = 1.0
    positions: bool = True
    lr: float = 1e-3
    style: Literal["residual", "published"] = "residual"

    def __post_init__(self):
        if self.style == "published":
            self.positions = False
            self.p = 0.5
        require(0 <= self.steps <= 1024 and 1 <= self.channels <= 1024 and 1 <= self.hidden <= 65_536,
                f"steps={self.steps},channels={self.channels},hidden={self.hidden} are out of range; give positive "
                "numbers, or steps=0 for the baseline")
        require(0 < self.p <= 1, f"p={self.p} is no probability above 0; give one, at most 1")
        require(self.lr > 0, f"lr={self.lr} is not positive; give a learning rate above 0")


def positions_of(shape: torch.Size, layer: float, cells: int, channels: int) -> Tensor:
    """
    (cells, 1 + 4 FREQUENCIES): a matrix' layer, from 0 to 1, and sines and cosines of the row and the column, from 0 to
    1, where each of its cells begins.
    """
    first = torch.arange(cells) * channels
    ways = torch.stack((first // shape[-1] / shape[0], first % shape[-1] / shape[-1]), dim=-1)
    angles = (ways[..., None] * (math.pi * 2.0 ** torch.arange(FREQUENCIES))).flatten(1)
    return torch.cat((torch.full((cells, 1), layer), angles.sin(), angles.cos()), dim=-1)


class CellSource(WeightSource):
    """All matrices of the blocks, or all parameters of the model, from the states of cells."""

    def __init__(self, model: nn.Module, config: Config, options: Options):
        is_published = options.style == "published"
        names = [name for name, _ in model.named_parameters()] if is_published else train_gpt.matrices_of(model)
        super().__init__(model, names)
        self.options = options
        self.is_published = is_published
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.lines = [sum(self.sizes)] if self.is_published else self.sizes     # numbers of each line of cells
        self.cells = [-(-size // options.channels) for size in self.lines]      # cells of each line
        kinds = dict.fromkeys(kind_of(name)[1] for name in self.shapes)
        self.numbers = {kind: number for number, kind in enumerate(kinds)}

        # the rule
        inputs = 3 * options.channels
        if options.positions:
            inputs += 1 + 4 * FREQUENCIES + KIND_CHANNELS
        self.first = linear(inputs, options.hidden, (2 / inputs) ** 0.5)
        self.second = linear(options.hidden, options.hidden, (2 / options.hidden) ** 0.5)
        std = 0.0 if self.is_published else 0.1 * options.hidden ** -0.5
        self.last = draw(nn.Parameter(torch.empty(options.channels, options.hidden)), std)

        # the kinds' vectors and the gains; None: there are none
        self.kinds = None
        if options.positions:
            self.kinds = draw(nn.Parameter(torch.empty(len(kinds), KIND_CHANNELS)), 1.0)
        self.gains = None if self.is_published else gains([0.0] * len(self.sizes))
        set_rate(self, options.lr, config)
        self._register_constants(config)

    def _register_constants(self, config: Config):
        """What is not learned, and which a checkpoint needs not hold."""
        options = self.options
        # W_0 (D,), or the first states (cells, channels)
        shape = (sum(self.cells), options.channels) if self.is_published else (sum(self.sizes),)
        self.register_buffer("start", torch.empty(shape), persistent=False)
        # (cells - 1, 1): whether a cell and the next one are of one line
        cells = torch.tensor(self.cells)
        lines = torch.repeat_interleave(torch.arange(len(self.cells)), cells, output_size=sum(self.cells))
        self.register_buffer("joined", (lines[1:] == lines[:-1]).float()[:, None], persistent=False)

        # (cells, n): where each cell is, and (cells,): its kind of matrix
        if self.kinds is None:
            return
        features, numbers = [], []
        for (name, shape), count in zip(self.shapes.items(), self.cells):
            layer, kind = kind_of(name)
            features.append(positions_of(shape, max(layer, 0) / max(config.layers - 1, 1), count, options.channels))
            numbers += [self.numbers[kind]] * count
        self.register_buffer("features", torch.cat(features), persistent=False)
        self.register_buffer("kind_of_cell", torch.tensor(numbers), persistent=False)

    def initialize(self, name: str, seed: int):
        """Draw W_0 as the baseline does, or the first states."""
        if self.is_published:
            self.start.copy_(draw_normal(f"{name}.start", self.start.shape, PUBLISHED_STD, seed))
        else:
            tensors = [draw_normal(matrix, shape, self.stds[matrix], seed) for matrix, shape in self.shapes.items()]
            self.start.copy_(torch.cat([tensor.flatten() for tensor in tensors]))

    def step(self, state: Tensor, takes_part: Tensor | float, positions: Tensor) -> Tensor:
        """The next states of (cells, channels); takes_part: 0 or 1 for each (cells, 1), or one number for all."""
        # beyond the end of a line nothing differs
        difference = (state[1:] - state[:-1]) * self.joined
        left, right = F.pad(difference, (0, 0, 1, 0)), F.pad(-difference, (0, 0, 0, 1))
        x = torch.cat((state, left, right, positions), dim=-1)
        x = F.relu(self.second(F.relu(self.first(x))))
        return state + takes_part * (x @ self.last.T)

    def grow(self) -> Tensor:
        """The states after all steps, (cells, channels)."""
        options = self.options
        state, positions = self.start, self.start.new_zeros(sum(self.cells), 0)
        if not self.is_published:
            state = self.start.new_zeros(sum(self.cells), options.channels)
        if self.kinds is not None:
            positions = torch.cat((self.features, self.kinds[self.kind_of_cell]), dim=-1)

        takes_part = 1.0 if self.is_published else options.p
        for _ in range(options.steps):
            if self.training and options.p < 1:
                takes_part = (torch.rand(len(state), 1, device=state.device) < options.p).float()
            if torch.is_grad_enabled():
                arguments = state, takes_part, positions
                state = checkpoint(self.step, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state = self.step(state, takes_part, positions)
        return state

    def forward(self) -> dict[str, Tensor]:
        """{name: its tensor}."""
        # the numbers of each line, without what its last cell has too many
        lines = [cells.flatten()[:size] for cells, size in zip(self.grow().split(self.cells), self.lines)]
        numbers = torch.cat(lines).split(self.sizes)
        if self.gains is not None:
            pairs = zip(self.start.split(self.sizes), self.gains, numbers)
            numbers = [start + gain * grown for start, gain, grown in pairs]
        return {name: flat.view(shape) for (name, shape), flat in zip(self.shapes.items(), numbers)}


def build(model: nn.Module, config: Config, options: Options) -> CellSource | None:
    """The source, or none without a step."""
    return CellSource(model, config, options) if options.steps else None


def patch(options: Options):
    train_gpt.build_source = partial(build, options=options)
