"""
Pause tokens: learned vectors stand between the tokens of a row, for later tokens to read and to compute in.

    register      num vectors after every `every` tokens, but not after the last one of the row
    published     the same, after the last one too, where nothing reads them
    goyal         one vector at a share of random positions, drawn anew in every pass of training and fixed elsewhere; a
                  token's prediction is read after the pauses behind it

A row of T tokens has T' = T + pauses slots. Real tokens keep their order and all that they know of the one before
them; positions, windows and documents count slots, and a pause belongs to the document of the token before it. A pause
has no value embedding, and is the embedding of itself (x0). Pauses are no targets: the loss is the mean over the real
tokens, and a step has as many of these as the baseline's.

    num, every    0: the baseline; every 0: a sixteenth of --sequence_length
    share         one vector for all `num`
    fraction      goyal: pauses for each real token
    pad_to        further pauses at the end make T' a multiple of this (128 for FlexAttention)

Cost: num model_dim parameters; T' / T times the FLOPs of the blocks. Text is generated without a cache.

Source: goyal: Goyal et al., Think before you speak, 2024, arxiv.org/abs/2310.02226; register: Darcet et al., 2024,
arxiv.org/abs/2309.16588; published: parameter-golf pull request 1589
Status: unmeasured
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import train_gpt
from train_gpt import AttentionContext, AttentionMask, Config, require


@dataclass
class Options:
    num: int = 2
    every: int = 0
    share: bool = False
    fraction: float = 0.1
    pad_to: int = 1
    style: Literal["register", "published", "goyal"] = "register"

    def __post_init__(self):
        require(0 <= self.num <= 1024, f"num={self.num} is out of range; give 1 to 1,024 pauses, or 0 for the baseline")
        require(self.every >= 0, f"every={self.every} is negative; give a number of tokens, or 0 for a row's sixteenth")
        require(0 < self.fraction <= 8, f"fraction={self.fraction} is out of range; give a number above 0, at most 8")
        require(1 <= self.pad_to <= 4096, f"pad_to={self.pad_to} is out of range; give 1 to 4,096")


@dataclass
class Layout:
    """Where the T tokens of a row and its pauses stand, in T' slots."""

    source: Tensor      # (T',) int64: the token t of a slot, or T + the number of its pause's vector
    read: Tensor        # (T,) int64: the slot where a token's prediction is read


def lay_out(after: Tensor, vectors: int, pad_to: int, read_last: bool) -> Layout:
    """
    Put after[t] pauses behind token t, after (T,) int64, and further ones at the end up to a multiple of pad_to. The
    pauses behind a token have the vectors 0, 1, .., of `vectors`. read_last: predictions are read after its pauses.
    """
    T = len(after)
    slot = torch.arange(T) + after.cumsum(0) - after  # of each token
    read = slot + after if read_last else slot
    slots = torch.arange(-(-(T + int(after.sum())) // pad_to) * pad_to)

    # a slot belongs to the last token before it
    token = torch.searchsorted(slot, slots, right=True) - 1
    number = slots - slot[token]  # 0 for the token itself, then 1, 2, ..
    source = torch.where(number == 0, token, T + (number - 1) % vectors)
    return Layout(source, read)


class PausingGPT(train_gpt.GPT):
    """The trainer's model with pauses between tokens."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.options = options
        self.every = options.every or max(1, config.sequence_length // 16)
        self.layout = None      # of the rows of this pass; None: there are no pauses
        vectors = 1 if options.share or options.style == "goyal" else options.num
        self.pauses = nn.Parameter(torch.empty(vectors, config.model_dim))  # P
        self.pauses.init_std = 0.02
        self.pauses.optimizer = "adam_embed"

    def lay_out(self, T: int, device: torch.device) -> Layout:
        """Where a row of T tokens has its pauses."""
        options = self.options
        if options.style == "goyal":
            generator = None if self.training else torch.Generator().manual_seed(T)
            behind = torch.randint(T, (max(1, round(options.fraction * T)),), generator=generator)
            after = torch.bincount(behind, minlength=T)
        else:
            after = torch.zeros(T, dtype=torch.int64)
            after[self.every - 1::self.every] = options.num
            if options.style == "register":
                after[-1] = 0
        layout = lay_out(after, len(self.pauses), options.pad_to, options.style == "goyal")
        return Layout(layout.source.to(device), layout.read.to(device))

    def masks(self, tokens: Tensor) -> list[AttentionMask]:
        # a pause begins no document
        self.layout = self.lay_out(tokens.shape[1], tokens.device)
        ordinary = int(self.config.end_of_text == 0)
        return super().masks(self.insert(tokens, tokens.new_full((1, 1), ordinary), self.layout.source))

    def insert(self, x: Tensor, pauses: Tensor, source: Tensor) -> Tensor:
        """x (B, T, ...) and what its pauses have, (1, n, ...) -> (B, T', ...); where n is 1, all have the same."""
        joined = torch.cat((x, pauses.expand(len(x), *pauses.shape[1:])), dim=1)
        return joined.index_select(1, source.clamp_max(joined.shape[1] - 1))

    def embed(self, tokens: Tensor, masks: list, start: int = 0) -> tuple[Tensor, list[AttentionContext]]:
        if start:
            raise TypeError("pauses are placed in whole rows")  # which a decoder takes for a model without a cache
        x, contexts = super().embed(tokens, masks)
        source = self.layout.source

        # the stream, the positions, the value embeddings
        pauses = self.embedding_norm(self.pauses.to(self.dtype))[None]
        x = self.insert(x, pauses, source)
        rotary = None
        if contexts[0].rotary is not None:
            angles = torch.arange(len(source), device=source.device)[:, None] * self.frequencies
            rotary = (angles.cos(), angles.sin())
        expanded = []
        for ctx in contexts:
            value = None
            if ctx.value is not None:
                value = self.insert(ctx.value, torch.zeros_like(ctx.value[:1, :1]), source)
            expanded.append(replace(ctx, rotary=rotary, x0=x, value=value))
        return x, expanded

    def select_outputs(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.layout.read)


def build(config: Config, options: Options) -> train_gpt.GPT:
    """The model with pauses, or the trainer's own without."""
    if options.num == 0:
        return GPT(config)
    return PausingGPT(config, options)


GPT = train_gpt.GPT


def patch(options: Options):
    train_gpt.GPT = partial(build, options=options)
