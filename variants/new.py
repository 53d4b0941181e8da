"""
Writes the file of a new variant: a small idea that runs, with its docstring, options and patch, to be changed into
yours.

    python -m variants.new my_mlp --part mlp        writes variants/my_mlp.py
    python -m variants.new my_rule --part optimizer
    ./run.sh check my_mlp                           it is sound from the start, and has to stay so

Every part but the last two, optimizer and schedule, is the baseline's with a learned factor for each channel. The
factors begin at 1, so that the model begins as the baseline, bit for bit.
"""

import argparse
import difflib
import keyword
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import variants
from train_gpt import RunError, require, say

FOLDER = Path(__file__).resolve().parent


@dataclass
class Part:
    """What the file of one kind of variant holds."""

    replaced: str           # the name of train_gpt that it assigns
    title: str              # the docstring's first line
    formula: str            # what it computes in place of the baseline, with shapes
    cost: str
    options: str            # the fields of Options
    code: str               # its class or function, which is called {name}


FACTOR_OPTIONS = "    start: float = 1.0  # the factors' first value; at 1 the model begins as the baseline"
FACTOR_COST = "model_dim parameters a layer, and as many multiplications a token."

PARTS = dict(
    mlp=Part(
        "MLP", "Feed-forward whose output has a learned factor for each channel.",
        """    y = s * W_proj max(W_fc x, 0)^2        x, y (B, T, model_dim), s (model_dim,)""",
        FACTOR_COST, FACTOR_OPTIONS,
        '''class {name}(train_gpt.MLP):
    """forward(x (B, T, model_dim)) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        self.factor = nn.Parameter(torch.full((config.model_dim,), options.start))

    def forward(self, x: Tensor) -> Tensor:
        hidden = train_gpt.ReLUSquared.apply(self.fc(x))  # (B, T, mlp_hidden)
        return self.factor.type_as(x) * self.proj(hidden)
'''),
    attention=Part(
        "CausalSelfAttention", "Attention whose output has a learned factor for each channel.",
        """    y = s * W_o attend(q, k, v)        y (B, T, model_dim), s (model_dim,), q (B, T, H, D), k, v (B, T, G, D)

Query i sees the keys max(doc_start_i, i - window + 1) <= j <= i; ctx.mask has them.""",
        FACTOR_COST, FACTOR_OPTIONS,
        '''class {name}(train_gpt.CausalSelfAttention):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        self.factor = nn.Parameter(torch.full((config.model_dim,), options.start))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        q, k, v = self.heads(x, ctx)
        y = train_gpt.attend(q, k, v, ctx.mask, self.scale)  # (B, T, H, D)
        return self.factor.type_as(x) * self.o(self.gate_heads(y, x))
'''),
    residual=Part(
        "Residual", "Residual whose branches have a learned factor for each channel.",
        """    y = x + s * branch(norm(x))        x, y (B, T, model_dim), s (model_dim,)""",
        "2 model_dim parameters a layer, and as many multiplications a token.", FACTOR_OPTIONS,
        '''class {name}(train_gpt.Residual):
    """forward(x, branch_output), both (B, T, model_dim), returns the new stream, of the same shape."""

    def __init__(self, config: Config, layer: int, branch: str, options: Options):
        super().__init__(config, layer, branch)
        self.factor = nn.Parameter(torch.full((config.model_dim,), options.start))

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        return x + self.factor.type_as(x) * branch_output
'''),
    block=Part(
        "Block", "Block whose feed-forward has a learned factor for each channel.",
        """    h = x + attention(norm(x)),  y = h + s * mlp(norm(h))        x, y (B, T, model_dim), s (model_dim,)""",
        FACTOR_COST, FACTOR_OPTIONS,
        '''class {name}(train_gpt.Block):
    """forward(x (B, T, model_dim), ctx) returns a tensor of the same shape."""

    def __init__(self, config: Config, layer: int, options: Options):
        super().__init__(config, layer)
        self.factor = nn.Parameter(torch.full((config.model_dim,), options.start))

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x = self.mix_stream(x, ctx)
        x = self.attention_residual(x, self.attention(self.attention_norm(x), ctx))
        return self.mlp_residual(x, self.factor.type_as(x) * self.mlp(self.mlp_norm(x)))
'''),
    norm=Part(
        "Norm", "RMS normalisation with a learned factor for each channel.",
        """    y = s * x / sqrt(mean(x^2) + 1e-6)        x, y (..., n), s (n,)""",
        "n parameters a norm, and as many multiplications a token.", FACTOR_OPTIONS,
        '''class {name}(train_gpt.Norm):
    """forward(x (..., n)) returns a tensor of the same shape."""

    def __init__(self, config: Config, n: int, options: Options):
        super().__init__(config, n)
        self.factor = nn.Parameter(torch.full((n,), options.start))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor.type_as(x) * train_gpt.RMSNormalize.apply(x)
'''),
    matrix=Part(
        "Linear", "Matrices whose outputs have a learned factor for each channel.",
        """    y = s * (W x)        x (..., n_in), y (..., n_out), s (n_out,)

The head keeps its matrix: its weight is read without the layer.""",
        "n_out parameters a matrix, and as many multiplications a token.", FACTOR_OPTIONS,
        '''class {name}(train_gpt.Linear):
    """forward(x (..., n_in)) returns (..., n_out)."""

    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int, options: Options):
        super().__init__(config, layer, role, n_in, n_out)
        self.factor = None
        if role != "head":
            self.factor = nn.Parameter(torch.full((n_out,), options.start))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.factor is None else self.factor.type_as(x) * y
'''),
    head=Part(
        "LanguageModelHead", "Head that reads the stream with a learned factor for each channel.",
        """    logits = c tanh(W (s * x) / c)        x (B, T, model_dim), s (model_dim,), W (V, model_dim)""",
        "model_dim parameters, and as many multiplications a token.", FACTOR_OPTIONS,
        '''class {name}(train_gpt.LanguageModelHead):
    """forward(x (B, T, model_dim), targets (B, T)) returns the mean loss; without targets logits (B, T, V)."""

    def __init__(self, config: Config, options: Options):
        super().__init__(config)
        self.factor = nn.Parameter(torch.full((config.model_dim,), options.start))

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.factor.type_as(x) * x, self.projection.weight
'''),
    optimizer=Part(
        "Muon", "Muon without Nesterov's look ahead: its update is that of the momentum alone.",
        """    m <- mu m + (1 - mu) g,  W <- W - lr s orthogonalize(m)        W, m, g (n, rows, columns)

s is the root of rows / columns where that is above 1, else 1.""",
        "less than the baseline's: it keeps no second moment.",
        "    momentum: float = 0.95  # mu, in place of the trainer's --momentum and its rise",
        '''class {name}(train_gpt.Muon):
    """Its buckets are batches (n, rows, columns) of equal matrices, float32."""

    def __init__(self, buckets: list[train_gpt.Bucket], config: Config, *wrap, options: Options):
        super().__init__(buckets, config, *wrap)
        self.mu = options.momentum

    def new_state(self, local: Tensor) -> dict:
        return dict(momentum=torch.zeros_like(local))

    def hyperparameters(self, progress: float) -> tuple:
        return (self.mu,)

    @staticmethod
    def update(data, gradient, momentum, lr, decay, mu: float):
        momentum.lerp_(gradient, 1 - mu)
        update = train_gpt.orthogonalize(momentum.to(torch.bfloat16 if data.is_cuda else torch.float32)).float()
        scale = max(1.0, data.shape[-2] / data.shape[-1]) ** 0.5
        data.sub_(lr * scale * update + decay * data * (update * data > 0))
'''),
    schedule=Part(
        "schedule_learning_rate", "Learning rate that falls along a straight line from the first step to the last.",
        """    factor = 1 - (1 - end) progress        progress in [0, 1): the part of the run that is done""",
        "none.",
        "    end: float = 0.0  # the factor at the end of the run",
        '''def {name}(config: Config, progress: float, options: Options) -> float:
    """The factor on all learning rates at `progress`."""
    return 1 - (1 - options.end) * progress
'''),
)

FILE = '''"""
{part.title}

{part.formula}

Cost: {part.cost}

Source: ours
Status: unmeasured
"""

{imports}


@dataclass
class Options:
{part.options}


{code}

def patch(options: Options):
    train_gpt.{part.replaced} = partial({name}, options=options)
'''


def source_of(name: str, part: Part) -> str:
    """The text of variants/NAME.py."""
    is_function = part.code.startswith("def ")
    named = name if is_function else "".join(word.capitalize() for word in name.split("_"))
    code = part.code.format(name=named)

    # what its text needs
    of_torch = [word for word in ("Tensor", "nn") if re.search(rf"\b{word}\b", code)]
    of_trainer = [word for word in ("AttentionContext", "Config") if re.search(rf"\b{word}\b", code)]
    groups = [
        "from dataclasses import dataclass\nfrom functools import partial",
        f"import torch\nfrom torch import {', '.join(of_torch)}" if of_torch else "",
        f"import train_gpt\nfrom train_gpt import {', '.join(of_trainer)}",
    ]
    return FILE.format(part=part, imports="\n\n".join(filter(None, groups)), code=code, name=named)


def write(name: str, part: str, folder: Path) -> Path:
    """
    Write folder/NAME.py, a variant of this part. RunError for a name that is none or is taken, for an unknown part, and
    where the folder refuses.
    """
    nearest = "".join(f", the nearest is {word}" for word in difflib.get_close_matches(part, PARTS, 1, 0.5))
    require(part in PARTS, f"there is no part {part!r}{nearest}; choose from {', '.join(PARTS)}")
    require(re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name),
            f"{name!r} is no name for a variant; use small letters, digits and _, and begin with a letter")
    require(name not in variants.available() and name not in variants.VERBS,
            f"there is a variant or a command {name} already; choose another name")

    path = folder / f"{name}.py"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(source_of(name, PARTS[part]))
    except FileExistsError:
        raise RunError(f"{path}: there is a file of this name already; choose another name") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}; mend the folder's permissions") from None
    return path


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, or 1 for a fault (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="./run.sh new", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the variant: small letters, digits and _")
    parser.add_argument("--part", required=True, metavar="PART", help=f"what it replaces: {', '.join(PARTS)}")
    options = parser.parse_args(argv)
    try:
        path = write(options.name, options.part, FOLDER)
    except RunError as error:
        say(f"variants.new: error: {error}", stream=sys.stderr)
        return 1
    say(f"{path}\nnext: change it, then ./run.sh check {options.name}, then ./run.sh compare baseline {options.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
