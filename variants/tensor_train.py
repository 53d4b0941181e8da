"""
Tensor trains: the feed-forward's matrices as products of two cores, or a whole model that is one train of matrices.

    layer        W[(o1, o2), (i1, i2)] = sum over a of G1[o1, i1, a] G2[a, o2, i2]      o1 o2 = n_out, i1 i2 = n_in
    mps          h_t = norm((h_{t-1} * l_t) A[x_t] * r_t),   logits_t = head(h_t)       A (vocabulary, bond, bond)
    published    z_t = (h_{t-1} * l_t) A[v] . r_t + b_v for all v, no cap; then h_t as above

x_t is the token, h (bond,) the state, which begins anew with every document; l_t, r_t (bond,) = 1 + tanh(.) / 2 come
from the token's place in its row by a small network. In published z_t is made before x_t is taken in, but scored on
x_{t+1}, and begins at a standard deviation of about 8; A is drawn with 1 / bond. mps takes the token in first, begins
with A[v] near the identity and has a head of its own, which begins at zero.

    factors_in, factors_out    i1, i2 and o1, o2 of the feed-forward's first matrix, of the second the other way around;
                               none, and in attention: the two factors of a width that are nearest to each other
    rank                       of the sum over a; -1: as many parameters as a quarter of the matrix has; 0: the baseline
    targets                    mlp, or all matrices of the blocks
    bond, pos_dim              width of the state, of the embedding of positions
    norm                       of the state. layernorm: with gains and biases; scalar: by its length alone

Cores begin with standard deviation (1 / (rank n_in))^(1/4), so that W has 1 / n_in; where W begins at zero, G1 does.

Cost: a layer has rank (o1 i1 + o2 i2) parameters, and rank (i1 o2 (i2 + o1)) multiply-adds a token. A train of matrices
is computed token by token: T small products one after the other.

Source: Novikov et al., Tensorizing Neural Networks, 2015, arxiv.org/abs/1509.06569; matrix product states as language
models: Miller et al., 2021, arxiv.org/abs/2003.01039; published: parameter-golf pull request 1589
Status: unmeasured
Declared: style=published fails test_loss_at_start, test_causal
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import AttentionMask, Config, require

Linear = train_gpt.Linear
ROLES = dict(mlp=("fc", "proj"), all=("q", "k", "v", "o", "fc", "proj"))


@dataclass
class Options:
    rank: int = -1
    factors_in: tuple[int, ...] = ()
    factors_out: tuple[int, ...] = ()
    targets: Literal["mlp", "all"] = "mlp"
    bond: int = 32
    pos_dim: int = 32
    norm: Literal["layernorm", "scalar"] = "layernorm"
    style: Literal["layer", "mps", "published"] = "layer"

    def __post_init__(self):
        require(self.rank >= -1, f"rank={self.rank} is out of range; give at least 1, 0 for the baseline, or -1")
        require(1 <= self.bond <= 4096 and 1 <= self.pos_dim <= 4096,
                f"bond={self.bond},pos_dim={self.pos_dim} are out of range; give 1 to 4,096")
        for name in ("factors_in", "factors_out"):
            factors = getattr(self, name)
            require(len(factors) in (0, 2) and 0 not in factors,
                    f"{name}={','.join(map(str, factors))} are not two factors; give such as {name}=16,32")
        if self.style == "published":
            self.norm = "layernorm"


# ---- A layer ----------------------------------------------------------------


def split_width(n: int, name: str, factors: tuple[int, ...]) -> tuple[int, ...]:
    """The two factors of a width, those called `name` if there are any. RunError where they do not multiply to it."""
    require(not factors or factors[0] * factors[1] == n,
            f"variant tensor_train: {name}={','.join(map(str, factors))} do not multiply to the width {n}; give two "
            "factors of it")
    first = next(factor for factor in range(int(n ** 0.5), 0, -1) if n % factor == 0)
    return factors or (first, n // first)


class TensorTrainLinear(nn.Module):
    """forward(x (..., n_in)) returns (..., n_out)."""

    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int, options: Options):
        super().__init__()
        # the factors of both sides
        sides = [("factors_in", options.factors_in), ("factors_out", options.factors_out)]
        if role == "proj":
            sides.reverse()
        if role not in ROLES["mlp"]:
            sides = [("", ()), ("", ())]
        self.i1, self.i2 = split_width(n_in, *sides[0])
        self.o1, self.o2 = split_width(n_out, *sides[1])

        # the rank
        most = min(self.o1 * self.i1, self.o2 * self.i2)
        self.rank = options.rank
        if options.rank < 0:
            self.rank = max(1, min(most, n_in * n_out // (4 * (self.o1 * self.i1 + self.o2 * self.i2))))
        require(self.rank <= most, f"variant tensor_train: rank={self.rank} is above what cores of the {role} matrix "
                                   f"{n_out} x {n_in} can have; give at most {most}")

        # G1 (o1, i1 a) and G2 (a o2, i2), as matrices
        self.outer = nn.Parameter(torch.empty(self.o1, self.i1 * self.rank))
        self.inner = nn.Parameter(torch.empty(self.rank * self.o2, self.i2))
        for core in (self.outer, self.inner):
            core.init_std = (self.rank * n_in) ** -0.25
            core.optimizer = "muon"
        if role in ("o", "proj") and config.zero_init_projections:
            self.outer.init_std = 0.0

    def forward(self, x: Tensor) -> Tensor:
        # over i2: (..., i1, a o2); then over i1 and a: (..., o2, o1)
        y = x.unflatten(-1, (self.i1, self.i2)) @ self.inner.type_as(x).T
        y = y.unflatten(-1, (self.rank, self.o2)).movedim(-1, -3).flatten(-2)
        return (y @ self.outer.type_as(x).T).transpose(-2, -1).flatten(-2)


def build_linear(config: Config, layer: int | None, role: str, n_in: int, n_out: int, options: Options) -> nn.Module:
    """A tensor train, or the trainer's own layer."""
    if options.rank == 0 or role not in ROLES[options.targets]:
        return Linear(config, layer, role, n_in, n_out)
    return TensorTrainLinear(config, layer, role, n_in, n_out, options)


# ---- A model ----------------------------------------------------------------


class BiasedHead(train_gpt.LanguageModelHead):
    """The trainer's head with a bias for every token id."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocabulary))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad(x, (0, 1), value=1.0), torch.cat((self.projection.weight, self.bias[:, None]), dim=1)


class MatrixProductGPT(train_gpt.GPT):
    """
    A language model without attention or feed-forward: the state of a text is a product of its tokens' matrices. Of the
    trainer's model it has what others look at, and none of its layers.
    """

    def __init__(self, config: Config, options: Options):
        nn.Module.__init__(self)
        # what the trainer and the scripts look at
        self.config = config
        self.dtype = torch.float32
        self.use_flex = False
        self.windows = (0, 0)
        self.blocks = nn.ModuleList()
        self.source = None

        # A, a row for each token; published: the distance from zero, else from the identity
        bond = self.bond = options.bond
        self.is_published = options.style == "published"
        std = bond ** -0.5 if self.is_published else 0.02
        self.embedding = train_gpt.embedding(config.padded_vocabulary, bond * bond, std)
        # l and r of every position in a row
        self.positions = train_gpt.embedding(config.sequence_length, options.pos_dim, 1.0)
        self.position_net = nn.Sequential(nn.Linear(options.pos_dim, bond), nn.GELU(), nn.Linear(bond, 2 * bond))
        # the state before a document, and how it is normalised; None: by its length
        self.first_state = nn.Parameter(torch.ones(bond))
        self.norm = nn.LayerNorm(bond) if options.norm == "layernorm" else None

        if self.is_published:
            self.head = BiasedHead(replace(config, model_dim=bond * bond, logit_softcap=0.0))
            self.head.projection.weight = self.embedding.weight
        else:
            self.head = train_gpt.LanguageModelHead(replace(config, model_dim=bond))

    def masks(self, tokens: Tensor) -> list[AttentionMask]:
        """One mask, which says where documents begin; tokens (B, T)."""
        index = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int32)
        begins = tokens == self.config.end_of_text
        doc_start = torch.where(begins & self.config.document_mask, index, 0).cummax(1).values.int()
        return [AttentionMask(doc_start, index - doc_start, None, None)]

    def position_weights(self, T: int) -> tuple[Tensor, Tensor]:
        """l and r, (T, bond)."""
        index = torch.arange(T, device=self.first_state.device).clamp_max(self.config.sequence_length - 1)
        left, right = self.position_net(self.positions(index)).chunk(2, dim=-1)
        return 1 + torch.tanh(left) / 2, 1 + torch.tanh(right) / 2

    def states(self, tokens: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """
        Tokens (B, T), begins (B, T) bool: where a document does -> the states before a token is taken in, and after,
        (B, T, bond), float32.
        """
        T = tokens.shape[1]
        left, right = self.position_weights(T)
        matrices = self.embedding(tokens).unflatten(-1, (self.bond, self.bond))
        if not self.is_published:
            matrices = matrices + torch.eye(self.bond, device=tokens.device)

        # token by token
        state = self.first_state.expand(len(tokens), -1)
        before, after = [], []
        for t in range(T):
            state = torch.where(begins[:, t, None], self.first_state, state)
            before.append(state)
            state = ((state * left[t])[:, None] @ matrices[:, t])[:, 0] * right[t]
            state = train_gpt.RMSNormalize.apply(state) if self.norm is None else self.norm(state)
            after.append(state)
        return torch.stack(before, dim=1), torch.stack(after, dim=1)

    def predict(self, tokens: Tensor, masks: list[AttentionMask], targets: Tensor | None) -> Tensor:
        before, after = self.states(tokens, masks[0].positions == 0)
        if not self.is_published:
            return self.head(after.to(self.dtype), targets)
        # (h * l) A[v] . r for all v: the product of A's rows with all pairs of channels
        left, right = self.position_weights(tokens.shape[1])
        pairs = (before * left)[..., :, None] * right[:, None, :]
        return self.head(pairs.flatten(-2).to(self.dtype), targets)


def patch(options: Options):
    if options.style == "layer":
        train_gpt.Linear = partial(build_linear, options=options)
    else:
        train_gpt.GPT = partial(MatrixProductGPT, options=options)
