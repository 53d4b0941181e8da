"""
KnotGPT's trainer, whole, in one file: a modded-nanoGPT baseline whose parts can be replaced one by one.

    python train_gpt.py                                                        the cpu track: two cores, two minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track short        eight GPUs
    python train_gpt.py --track small --data DIR --variant "swiglu_mlp:layers=0-3"

- What an idea may touch is a list, SEAMS: classes and functions of this module, looked up here when they are used. A
  variant assigns its own to such a name. All else is the referee's: the data, the clock, validation, log, checkpoints.
- Importing this file does nothing. Run as a script, it imports itself by name, so that there is one trainer module.
- One rule for every attention on every backend: query i sees the keys max(doc_start_i, i - window + 1) <= j <= i.
- The loss curve does not depend on the number of ranks beyond rounding: the global batch is fixed, ranks take its rows.
- The log is the record: the source, the versions, the configuration and every step.

Sources, by name; docs/sources.md says what is from where: modded-nanogpt, Muon, Polar Express, NorMuon, Cautious Weight
Decay, RoPE, QK-norm, Primer, value residual learning, U-net skips, Gemma 2 (logit cap), Liger-Kernel (gradient of the
loss in its forward pass), FlexAttention, ZeRO.
"""

import argparse
import base64
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args, get_origin

# On a machine with other work, threads that wait by spinning take the cores from those that compute: steps of 2 to 17
# times their length were measured. Read by the OpenMP libraries when torch loads them: GNU's counts turns, LLVM's and
# Intel's milliseconds.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= dict(GOMP_SPINCOUNT="20000", KMP_BLOCKTIME="1")

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# What a variant may assign, and methods of these classes. All else in this file is the referee's, which every arm of a
# comparison must share.
SEAMS = (
    # the model
    "Linear", "Norm", "RMSNormalize", "ReLUSquared", "SoftcappedCrossEntropy", "rotate", "attend",
    "CausalSelfAttention", "MLP", "Residual", "Block", "LanguageModelHead", "build_source", "GPT",
    # the optimizer and its schedules, what it reads, and the weights that validation sees
    "build_optimizers", "Muon", "Adam", "orthogonalize", "symmetric_product", "schedule_learning_rate",
    "schedule_weight_decay", "schedule_momentum", "schedule_adam_betas", "treat_gradients", "build_average",
    # the order of the data, the size of a step, and what else a run's JSON holds
    "order_shards", "order_rows", "schedule_batch", "collect_facts",
)

# ---- Faults -----------------------------------------------------------------


class RunError(Exception):
    """A fault that the user can mend. Its message is one line: what was wrong, what was got, what to do."""


def require(condition, message: str):
    """Raise RunError with this message unless the condition holds."""
    if not condition:
        raise RunError(message)


def read_json(path: Path | str, remedy: str) -> dict:
    """
    Return the JSON object that a file holds. RunError, one line that names the file and ends with `remedy`, for a file
    that cannot be read, is no UTF-8, no JSON or no object, nests too deeply, or holds a number that is none (NaN,
    Infinity) or has thousands of digits.
    """
    def refuse(word):
        raise ValueError(f"it holds {word}")

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise RunError(f"{path} is damaged, not a JSON object ({reason}); {remedy}") from None
    require(isinstance(content, dict), f"{path} holds a JSON {type(content).__name__}, not an object; {remedy}")
    return content


# ---- Configuration and tracks -----------------------------------------------


@dataclass
class Config:
    """
    All settings of a run. Every field is a command-line option, the comment beside it its help text, the comments
    between them its groups.
    """

    # what to train
    track: str = "cpu"                  # which of TRACKS supplies the defaults
    variant: tuple[str, ...] = ()       # "name" or "name:key=value,key=value"; several as arguments or joined by +
    # data
    data: str = "data/python_bytes"     # folder of shards: *train*.bin and *val*.bin
    vocab_size: int = 0                 # number of token ids (0: from the folder's meta.json, else GPT-2's 50257)
    document_token: int = -1            # token id that begins every document (-1: meta.json's, else the data's last id)
    sequence_length: int = 256          # tokens of one row
    batch_tokens: int = 2048            # tokens of one optimizer step, over all ranks
    micro_batch_tokens: int = 8192      # at most so many tokens a forward pass
    tokens: int = 1_500_000             # training tokens; the number of steps follows
    steps: int = 0                      # optimizer steps (0: from tokens)
    time_budget: float = 0.0            # seconds of training in place of steps: schedules follow the clock (0: off)
    align_documents: bool = False       # every row begins at the start of a document
    val_tokens: int = 131_072           # validation tokens, from the start of the validation shards
    val_every: int = -1                 # steps between validations, and one at the end (0: only that; -1: a twelfth)
    target: float = 0.0                 # validation loss that the track asks for, in nats a token (0: none)
    target_data: str = ""               # how sha256 or name of the target's validation shard begins (empty: any)
    # model
    layers: int = 4                     # number of blocks
    model_dim: int = 128                # width of the residual stream
    heads: int = 4                      # attention heads
    head_dim: int = 32                  # width of one head
    kv_heads: int = 0                   # heads of keys and values, each for as many query heads (0: one for each)
    mlp_hidden: int = 512               # hidden width of the feed-forward
    document_mask: bool = True          # tokens see their own document only
    window_pattern: str = "L"           # S(hort) or L(ong) window for each layer, repeated; the last layer is always L
    window_short: tuple[int, ...] = (0,)  # short window in tokens, one for each equal part of the run (0: unlimited)
    window_long: tuple[int, ...] = (0,)  # long window likewise
    qk_norm: bool = True                # RMS-normalise queries and keys
    attention_scale: float = 0.0        # factor on the scores (0: 1 / sqrt(head_dim))
    rope: str = "half"                  # rotary positions: half (half of the pairs do not turn), full or none
    rope_base: float = 1024.0           # longest wavelength of the rotation, over 2 pi
    zero_init_projections: bool = True  # output projections begin at zero: every block begins as the identity
    tied_embedding: bool = False        # head and embedding share one matrix
    embedding_std: float = 0.0          # standard deviation of its first tensor (0: 0.02 where tied, else 1)
    logit_softcap: float = 15.0         # logits are c tanh(logits / c) (0: off)
    x0_skip: bool = True                # every block reads a learned mix of the stream and the embedding
    unet_skips: bool = True             # the second half adds the first half's streams, mirrored, with learned weights
    channel_scales: bool = False        # a factor a channel for mixes, skips and branches, one a head for queries
    value_embeddings: int = 2           # tables added to the values of the first and last so many layers (0: off)
    smear: bool = True                  # every embedding takes a gated part of the one before it
    attention_gate: bool = True         # each head's output is gated by the first few channels of the stream
    bigram_rows: int = 0                # rows of the hashed bigram embedding (0: off)
    # optimizer
    lr_matrix: float = 0.03             # Muon's learning rate
    lr_embed: float = 0.3               # Adam's, for embeddings
    lr_head: float = 0.008              # Adam's, for the head
    lr_scalar: float = 0.02             # Adam's, for scalars and gates
    momentum: float = 0.95              # Muon's momentum, after a rise from 0.85 over the first tenth of the run
    normuon_beta2: float = 0.95         # decay of Muon's second moment by row (0: off)
    weight_decay: float = 0.1           # of Muon's matrices, where it agrees in sign with the update
    adam_beta1: float = 0.8             # decay of Adam's first moment
    adam_beta2: float = 0.95            # decay of Adam's second moment
    decay_fraction: float = 0.6         # last part of the run, in which the learning rate falls linearly to zero
    # run
    seed: int = 1                       # of initial tensors and data order
    threads: int = 0                    # of this process on a CPU (0: PyTorch's choice, one a core)
    device: str = "auto"                # auto, cpu or cuda
    dtype: str = "auto"                 # of activations: auto, float32 or bfloat16
    compile: str = "auto"               # auto, model (one graph), blocks (one a block) or off
    loss_chunk: int = 4096              # tokens whose logits exist at one time
    keep_losses: int = 10_000_000       # validation tokens whose losses a run keeps at its end; 0: none
    resume: str = ""                    # checkpoint to continue, bit for bit
    init_from: str = ""                 # checkpoint whose matching tensors are this run's start
    log_dir: str = "logs"               # folder of logs, JSON files and checkpoints
    run_id: str = ""                    # name of the files (empty: date, time, track, variants, seed, random digits)
    dry_run: bool = False               # say the run's parameters, FLOPs, steps, memory and expected time, and end
    save: bool = True                   # write a checkpoint at the end, on a signal and every checkpoint_seconds
    checkpoint_seconds: float = 600.0   # time between checkpoints
    keep_every: int = 0                 # steps between kept checkpoints, from step 0 on: RUN_ID-step000100.pt (0: none)

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def end_of_text(self) -> int:
        """
        The token that begins every document: as set or as the data say, else the vocabulary's last: 256 of bytes, 50256
        of GPT-2.
        """
        return self.document_token if self.document_token >= 0 else self.vocab_size - 1

    @property
    def padded_vocabulary(self) -> int:
        """
        Rows of the embedding and the head: a multiple of 128 for matrix units, of 8 where the vocabulary is small.
        """
        unit = 128 if self.vocab_size > 4096 else 8
        return -(-self.vocab_size // unit) * unit


# Settings that a resumed run may change.
RESUME_FIELDS = {
    "resume", "data", "log_dir", "save", "checkpoint_seconds", "keep_every", "keep_losses", "val_every", "device",
    "dry_run",
}
# What a setting may be. Numbers: the least and the most, both allowed; of a tuple, each of its numbers.
RANGES = dict(
    vocab_size=(0, 65_536), document_token=(-1, 65_535), sequence_length=(2, 2 ** 24), batch_tokens=(1, 2 ** 32),
    micro_batch_tokens=(1, 2 ** 32), tokens=(1, 10 ** 15), steps=(0, 10 ** 9), time_budget=(0.0, 31_536_000.0),
    val_tokens=(1, 10 ** 12), val_every=(-1, 10 ** 9), target=(0.0, 100.0), layers=(1, 1024), model_dim=(1, 2 ** 18),
    heads=(1, 2 ** 14), head_dim=(1, 2 ** 14), kv_heads=(0, 2 ** 14), mlp_hidden=(1, 2 ** 20),
    window_short=(0, 2 ** 24), window_long=(0, 2 ** 24), attention_scale=(0.0, 1e4), rope_base=(1.0, 1e12),
    embedding_std=(0.0, 1e4), logit_softcap=(0.0, 1e6), value_embeddings=(0, 4096), bigram_rows=(0, 2 ** 28),
    lr_matrix=(0.0, 1e4), lr_embed=(0.0, 1e4),
    lr_head=(0.0, 1e4), lr_scalar=(0.0, 1e4), momentum=(0.0, 0.999999), normuon_beta2=(0.0, 0.999999),
    weight_decay=(0.0, 1e4), adam_beta1=(0.0, 0.999999), adam_beta2=(0.0, 0.999999), decay_fraction=(0.0, 1.0),
    seed=(0, 2 ** 48), threads=(0, 1024), loss_chunk=(1, 2 ** 32), keep_losses=(0, 2 ** 32),
    checkpoint_seconds=(0.0, 31_536_000.0), keep_every=(0, 10 ** 9),
)
CHOICES = dict(
    rope=("half", "full", "none"), device=("auto", "cpu", "cuda"), dtype=("auto", "float32", "bfloat16"),
    compile=("auto", "model", "blocks", "off"),
)
RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._=+,@-]{0,119}"  # a file's name on every system, which cannot leave its folder

FINEWEB = dict(
    data="data/fineweb10B", val_tokens=10_485_760, sequence_length=2048, batch_tokens=524_288,
    micro_batch_tokens=65_536, align_documents=True, window_pattern="SSSL", window_short=(128, 256, 384),
    window_long=(384, 896, 1408), value_embeddings=0, lr_matrix=0.023, lr_head=0.004, lr_scalar=0.015,
)
ROWS_OF_1024 = dict(sequence_length=1024, window_long=(384, 640, 1024))
WHOLE_ROWS = dict(align_documents=False, document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,))
MODEL_30M = dict(layers=8, model_dim=384, heads=6, head_dim=64, mlp_hidden=1536, tied_embedding=True, lr_embed=0.01)
MODEL_124M = dict(layers=12, model_dim=768, heads=6, head_dim=128, mlp_hidden=3072, attention_scale=0.12)
MODEL_350M = dict(layers=16, model_dim=1024, heads=8, head_dim=128, mlp_hidden=4096, attention_scale=0.12)
# the base of the parameter-golf contest: grouped queries, scales by channel, plain Muon
MODEL_GOLF = dict(
    layers=9, model_dim=512, heads=8, head_dim=64, kv_heads=4, mlp_hidden=1024, rope="full", rope_base=10_000.0,
    tied_embedding=True, embedding_std=0.005, logit_softcap=30.0, channel_scales=True, value_embeddings=0, smear=False,
    attention_gate=False, lr_matrix=0.04, lr_embed=0.05, lr_scalar=0.04, normuon_beta2=0.0, weight_decay=0.0,
    decay_fraction=0.69,
)
TARGET_3_28 = dict(target=3.28, target_data="fineweb_val_")

TRACKS = {
    # the machine's own Python library as bytes, two CPU cores, about two minutes; the target is for Python 3.11.7's
    # library
    "cpu": dict(
        window_pattern="SSSL", window_short=(64,), window_long=(0,), attention_scale=0.25, lr_embed=0.4, lr_head=0.016,
        val_tokens=65_536, target=0.82, target_data="326315b03067da8b",
    ),
    # the same model on English text as GPT-2's tokens, two CPU cores, about two minutes: the tied table is nine tenths
    # of its parameters, the head most of a step. Logits of 128 tokens are small enough for the allocator to keep them;
    # those of 256 cost more time in page faults than in arithmetic
    "english_cpu": dict(
        data="data/english", window_pattern="SSSL", window_short=(64,), window_long=(0,), attention_scale=0.25,
        tied_embedding=True, value_embeddings=0, lr_embed=0.01, batch_tokens=1024, tokens=131_072, val_tokens=16_384,
        loss_chunk=128,
    ),
    # about 30M parameters, any GPU from 8 GB
    "small": FINEWEB | MODEL_30M | ROWS_OF_1024 | dict(
        tokens=100_000_000, batch_tokens=65_536, micro_batch_tokens=16_384,
    ),
    # 128 thin layers: attention 8.39M + tied embedding 6.44M + feed-forward 3.15M
    "exodus18m": FINEWEB | ROWS_OF_1024 | dict(
        layers=128, model_dim=128, heads=2, head_dim=64, mlp_hidden=96, tied_embedding=True, lr_embed=0.01,
        tokens=5_000_000_000, micro_batch_tokens=32_768, compile="blocks",
    ),
    # rows of 65,536 tokens, full causal attention: attention is most of the step
    "long": FINEWEB | MODEL_30M | WHOLE_ROWS | dict(tokens=500_000_000, sequence_length=65_536),
    # modded-nanogpt's track 1
    "short": FINEWEB | MODEL_124M | TARGET_3_28 | dict(tokens=900_000_000, value_embeddings=3, bigram_rows=50_304),
    # modded-nanogpt's track 2
    "medium": FINEWEB | MODEL_350M | dict(
        tokens=3_000_000_000, micro_batch_tokens=32_768, value_embeddings=3, bigram_rows=50_304, target=2.92,
        target_data="fineweb_val_",
    ),
    # parameter-golf's base: 17.06M parameters with a vocabulary of 1,024; any shards, their vocabulary
    "golf": FINEWEB | WHOLE_ROWS | MODEL_GOLF | dict(tokens=900_000_000, sequence_length=1024),
    # the same in small: bytes of the machine's Python library, two CPU cores, about a minute
    "golf_cpu": WHOLE_ROWS | MODEL_GOLF | dict(
        model_dim=96, heads=4, head_dim=24, kv_heads=2, mlp_hidden=192, tokens=600_000, val_tokens=65_536,
    ),
    # the fixed architecture of modded-nanogpt's track 3, for step times
    "benchmark": FINEWEB | MODEL_124M | WHOLE_ROWS | TARGET_3_28 | dict(
        tokens=1_703_936_000, sequence_length=1024, x0_skip=False, unet_skips=False, smear=False, attention_gate=False,
    ),
}


def check_settings(values: dict, name=lambda setting: f"--{setting}"):
    """
    Raise RunError unless every value is of its field's type and within its range, and all of them agree with each
    other. values: all fields of Config. name(setting) is how a message calls a setting: an option of the command line,
    or a position in a file.
    """
    # each value by itself
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    for setting, value in values.items():
        check_value(kinds[setting], value, name(setting), RANGES.get(setting))
        choices = CHOICES.get(setting, (value,))
        require(value in choices, f"{name(setting)} must be one of {', '.join(map(str, choices))}; got {value!r}")

    # values together
    c = Config(**values)
    require(c.track in TRACKS, f"unknown track {c.track!r}; the tracks are {', '.join(TRACKS)}")
    require(not c.run_id or re.fullmatch(RUN_ID, c.run_id),
            f"{name('run_id')} is a file's name of up to 120 letters, digits and ._=+,@- without a folder; got "
            f"{c.run_id!r}")
    require(c.batch_tokens % c.sequence_length == 0,
            f"{name('batch_tokens')} {c.batch_tokens} is not a multiple of {name('sequence_length')} "
            f"{c.sequence_length}")
    require(re.fullmatch("[SL]+", c.window_pattern) and len(c.window_short) == len(c.window_long) > 0,
            f"{name('window_pattern')} takes letters S and L, and both windows equally many stages; got "
            f"{c.window_pattern!r}, {c.window_short} and {c.window_long}")
    require(c.rope == "none" or c.head_dim % 4 == 0,
            f"{name('head_dim')} {c.head_dim} is not a multiple of 4, as rotary positions need; choose another or "
            "--rope none")
    require(c.heads % c.key_heads == 0,
            f"{name('heads')} {c.heads} is not a multiple of {name('kv_heads')} {c.kv_heads}; choose another, or 0 for "
            "as many")
    require(not c.value_embeddings or c.heads * c.head_dim == c.model_dim,
            f"value embeddings need heads x head_dim = model_dim, got {c.heads} x {c.head_dim} and {c.model_dim}; or "
            "use --value_embeddings 0")
    require(c.bigram_rows != 1, f"{name('bigram_rows')} is 0 or at least 2: row 0 stands for no token before; got 1")
    require(not c.vocab_size or c.document_token < c.vocab_size,
            f"{name('document_token')} {c.document_token} is outside the vocabulary of {c.vocab_size}")


def check_value(kind, value, name: str, limits: tuple | None):
    """
    Raise RunError, which calls the value `name`, unless it is of a field's type and, if a number, within limits. A
    tuple's items are looked at.
    """
    # a tuple is looked at item by item
    items = (value,)
    if get_origin(kind) is tuple:
        kind, items = get_args(kind)[0], value
    require(isinstance(items, tuple), f"{name} is a list of values, got {value!r:.60}")
    article = dict(int="an integer", float="a number", bool="true or false", str="text")[kind.__name__]

    for item in items:
        # its type: a bool is no number, an integer is one
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if kind in (int, float):
            fits = number and (kind is float or isinstance(item, int))
        else:
            fits = isinstance(item, kind)
        require(fits, f"{name} must be {article}, got {item!r:.60}")
        # its size
        if limits and number:  # NaN is within no limits
            least, most = limits
            require(least <= item <= most, f"{name} must be from {least:,} to {most:,}, got {item!r:.60}")
        # its length and letters
        if kind is str:
            require(len(item) < 4096 and not re.search(r"[\x00-\x1f\x7f]", item),
                    f"{name} must be text of less than 4096 characters without control characters, got {item[:60]!r}")


def config_from(values, origin: str) -> Config:
    """
    Return the Config that a file holds as a JSON or checkpoint object. RunError, one line that names `origin`, for an
    unknown setting or a bad value.
    """
    require(isinstance(values, dict),
            f"{origin}: its config is no set of settings but a {type(values).__name__}; give another file")
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    unknown = ", ".join(sorted(str(name) for name in values if name not in defaults))
    require(not unknown,
            f"{origin}: its config has settings that this trainer does not know ({unknown[:80]}); use the trainer that "
            "wrote it")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    check_settings(defaults | values, lambda setting: f"{origin}: config.{setting}")
    return Config(**values)


@functools.cache
def config_comments() -> list[tuple[str, str, str]]:
    """
    Return (comment, "", "") for each line of Config's source that is one and ("", field, comment beside it) for each
    field, in their order.
    """
    return re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", inspect.getsource(Config), re.M)


def parse_config(argv: list[str] | None = None) -> Config:
    """Return the Config of a command line (default: this process')."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", usage="train_gpt.py [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False,
        description="Train the baseline or a variant of it.",
        epilog="Defaults are the cpu track's; another --track brings its own. A run is named by its id, the beginning "
               "of it, or last.")
    kinds = {
        int: dict(type=int),
        float: dict(type=float),
        bool: dict(action=argparse.BooleanOptionalAction),
        tuple[str, ...]: dict(nargs="+"),
        tuple[int, ...]: dict(type=lambda text: tuple(int(number) for number in text.split(","))),
    }

    # a group for each comment of its own in Config's source, an option for each field, with the comment beside it
    group = parser
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    defaults = {field.name: field.default for field in dataclasses.fields(Config)} | TRACKS[Config.track]
    for title, name, comment in config_comments():
        if title:
            group = parser.add_argument_group(title)
            continue
        value = defaults[name]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = f" (default: {text})" if text else ""
        group.add_argument("--" + name, help=comment.replace("%", "%%") + shown, **kinds.get(types[name], {}))

    # --init-from is --init_from, and --no_save is --no-save
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub("^--[^=]*", lambda match: "--" + match[0][2:].replace("-", "_"), word) for word in words]
    settings = vars(parser.parse_args([re.sub("^--no_", "--no-", word) for word in words]))
    if "variant" in settings:
        settings["variant"] = tuple(spec for text in settings["variant"] for spec in re.split(r"\+(?=[a-z_])", text))
    return make_config(settings)


def make_config(settings: dict) -> Config:
    """
    Return the Config of explicit settings over their track's or, with resume, over the checkpoint's. RunError for
    settings that contradict each other.
    """
    # runs by their names
    track = settings.get("track", Config.track)
    require(track in TRACKS, f"unknown track {track!r}; the tracks are {', '.join(TRACKS)}")
    for name in ("resume", "init_from"):
        if settings.get(name):
            settings = settings | {name: str(find_checkpoint(settings[name], settings.get("log_dir", Config.log_dir)))}

    # what explicit settings stand over
    base = TRACKS[track]
    if settings.get("resume"):
        base = read_checkpoint(settings["resume"])["config"]
        for name in settings.keys() - RESUME_FIELDS:
            require(settings[name] == base[name],
                    f"--{name} {settings[name]} differs from the checkpoint's {base[name]}: a resumed run keeps its "
                    "settings; change them with --init_from")
    if "target" in settings and "target_data" not in settings:
        base = base | dict(target_data="")
    c = Config(**{**base, **settings})
    check_settings(dataclasses.asdict(c))

    # the length of the run, and what follows from it
    planned = c.steps or max(1, c.tokens // c.batch_tokens)
    c.steps = 0 if c.time_budget else planned
    if c.val_every < 0:
        c.val_every = max(1, planned // 12)
    return c


# ---- Ranks ------------------------------------------------------------------


@dataclass
class Ranks:
    """This process among those that torchrun started, or alone."""

    rank: int               # 0 alone
    world: int              # how many there are
    device: torch.device
    dtype: torch.dtype      # of activations

    @staticmethod
    def start(config: Config) -> "Ranks":
        """
        Join the process group, choose the device and the dtype. RunError for an environment that torchrun would not
        have made.
        """
        # who this process is
        texts = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        wrong = [f"{name}={text}" for name, text in texts.items() if text and not re.fullmatch(r"\d{1,6}", text)]
        require(not wrong, f"{', '.join(wrong)} in the environment is no number; unset it, or start by torchrun")
        rank, world, local = (int(text or default) for text, default in zip(texts.values(), (0, 1, 0)))
        by_torchrun = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT") and texts["RANK"]
        require(world <= 1 or by_torchrun,
                f"WORLD_SIZE={world} in the environment, but not by torchrun (no RANK, MASTER_ADDR or MASTER_PORT); "
                "unset it, or start by torchrun")

        # its device
        cuda = torch.cuda.is_available() and config.device != "cpu"
        require(cuda or config.device != "cuda",
                "--device cuda: PyTorch sees no CUDA device; use --device cpu, or install a CUDA build of PyTorch and "
                "a driver")
        require(not cuda or local < torch.cuda.device_count(), f"rank {local} of this machine has no GPU of its own, "
                f"{torch.cuda.device_count()} seen; start as many ranks as there are GPUs")
        if cuda:
            torch.cuda.set_device(local)
            torch.backends.cuda.matmul.allow_tf32 = True

        # its peers
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

        # Without AMX tiles a CPU multiplies float32 1.5 to 2 times as fast as bfloat16 (measured), and attends 2 to 6
        # times as fast.
        dtype = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if cuda and torch.cuda.get_device_capability()[0] >= 8 else "float32"
        return Ranks(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"), getattr(torch, dtype))

    def synchronize(self):
        """Wait for this rank's device and for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier()

    def agree(self, value: int) -> int:
        """The largest of all ranks' values; over the host, so that nothing waits for a GPU."""
        tensor = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)


# ---- Optimizers: parameters in buckets, each rank updates its slice ---------

# PyTorch 2.13 renamed them.
ALL_GATHER = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


class Bucket:
    """
    Parameters updated by one batched operation. They and their gradients become views of two stacked tensors: a step
    takes one reduce-scatter, one update of this rank's slice and one all-gather for all of them, and no copies. With
    matrices the tensors are (n, rows, columns), every rank having whole matrices; otherwise flat, (numbers,), every
    parameter aligned to 64 numbers.
    """

    def __init__(self, parameters: dict, matrices: bool, lr: float, weight_decay: float, ranks: Ranks):
        """parameters: name -> nn.Parameter."""
        # where each parameter lies
        sizes = [p[..., 0, 0].numel() if matrices else p.numel() for p in parameters.values()]
        offsets = np.cumsum([0] + [size if matrices else -(-size // 64) * 64 for size in sizes]).tolist()
        length = -(-offsets[-1] // ranks.world)
        first = next(iter(parameters.values()))
        unit = first.shape[-2:] if matrices else ()

        # state
        self.parameters = list(parameters.values())
        self.lr = lr
        self.weight_decay = weight_decay
        self.world = ranks.world
        self.slice = slice(ranks.rank * length, (ranks.rank + 1) * length)  # this rank's
        self.slices = {}            # parameter's name -> where it lies
        self.data = torch.zeros(length * ranks.world, *unit, device=ranks.device)
        self.grad = torch.zeros_like(self.data)
        self.state = {}             # the optimizer's: name -> tensor of this rank's slice
        self.missing = 0            # parameters without their last gradient of this step
        self.work = None            # the reduction under way; None where there is none
        self.reduced = False        # whether the gradient holds the sum over the ranks
        self.follow = None          # what is called with the bucket when its reduction has begun; None: nothing

        # parameters and gradients become views
        for (name, p), offset, size in zip(parameters.items(), offsets, sizes):
            self.slices[name] = region = slice(offset, offset + size)
            self.data[region] = p.detach().reshape(size, *unit)
            p.data = self.data[region].view(p.shape)
            p.grad = self.grad[region].view(p.shape)
            if ranks.world > 1:
                p.register_post_accumulate_grad_hook(self._count)

    def expect(self, follow=None):
        """
        Reduce in the coming backward pass, as soon as every parameter has its gradient; `follow(self)` is called next.
        """
        self.missing = len(self.parameters)
        self.follow = follow

    def _count(self, _parameter):
        self.missing -= 1
        if self.missing == 0:
            self._reduce()
            if self.follow is not None:
                self.follow(self)

    def _reduce(self):
        # NCCL leaves each rank its slice; gloo sums all of it
        if self.grad.is_cuda:
            self.work = REDUCE_SCATTER(self.grad[self.slice], self.grad, async_op=True)
        else:
            self.work = dist.all_reduce(self.grad, async_op=True)

    def reduced_gradient(self) -> Tensor:
        """Return this rank's slice of the gradient, summed over the ranks once a step."""
        if self.world > 1 and not self.reduced:
            if self.work is None:  # some parameter took no part in the pass
                self._reduce()
            self.work.wait()
        self.missing, self.work, self.reduced = 0, None, True
        return self.grad[self.slice]

    def clear_gradient(self):
        self.grad.zero_()
        self.reduced = False

    def gather(self, local: Tensor, joined: Tensor):
        """Join the ranks' slices; returns what to wait for, None of one rank."""
        return ALL_GATHER(joined, local.clone(), async_op=True) if self.world > 1 else None

    def collect(self, local: Tensor) -> dict[str, Tensor]:
        """
        A tensor of this rank's slice -> each parameter's share of all, copied: equal for any number of ranks.
        Collective.
        """
        # the slices of all ranks, then each parameter by its name
        joined = local if self.world == 1 else local.new_empty(len(local) * self.world, *local.shape[1:])
        work = self.gather(local, joined)
        if work is not None:
            work.wait()
        return {name: joined[region].clone() for name, region in self.slices.items()}

    def distribute(self, tensors: dict[str, Tensor], local: Tensor):
        """The way back from collect."""
        joined = local.new_zeros(len(self.data), *local.shape[1:])
        for name, region in self.slices.items():
            joined[region] = tensors[name].to(local.device)
        local.copy_(joined[self.slice])


class Overlap:
    """
    Updates under a step's last backward pass, of several ranks. A bucket is updated when the next one, of any
    optimizer, has all its gradients: its own reduction is then over or nearly so. Nothing of the pass reads its
    parameters any more, but for a module that keeps one detached, which would find it updated. With update=False
    gradients are reduced and nothing else, as for an optimizer without update_bucket.
    """

    def __init__(self, optimizers: list, lr_factor: float, progress: float, update: bool):
        self.lr_factor = lr_factor
        self.progress = progress
        self.waiting = None     # (optimizer, bucket) whose reduction began last; None before the first
        for optimizer in optimizers:
            # a bucket says when its reduction has begun
            follow = functools.partial(self._begun, optimizer) if update and hasattr(optimizer,
                                                                                     "update_bucket") else None
            for bucket in getattr(optimizer, "buckets", ()):
                bucket.expect(follow)

    def _begun(self, optimizer, bucket: Bucket):
        before, self.waiting = self.waiting, (optimizer, bucket)
        if before is not None:
            optimizer, bucket = before
            optimizer.update_bucket(bucket, self.lr_factor, self.progress)


class ShardedOptimizer:
    """
    Base of the optimizers (ZeRO stage 1). For one rank's slice of a bucket a subclass has new_state(local), a dict of
    tensors, hyperparameters(progress), and update(data, gradient, *state, lr, decay, *hyperparameters), which changes
    data and state.
    """

    def __init__(self, buckets: list[Bucket], config: Config, wrap=lambda function: function):
        self.buckets = buckets
        self.config = config
        self.steps = 0              # finished ones
        self.update = wrap(self.update)
        self.gathering = {}         # buckets updated in this step -> what to wait for until all ranks have them
        for bucket in buckets:
            bucket.state = self.new_state(bucket.data[bucket.slice])

    @torch.no_grad()
    def update_bucket(self, bucket: Bucket, lr_factor: float, progress: float):
        """Update one bucket, reduced by then, and begin to gather it."""
        gradient, data = bucket.reduced_gradient(), bucket.data[bucket.slice]
        lr = bucket.lr * lr_factor
        decay = lr * bucket.weight_decay * schedule_weight_decay(self.config, progress)
        # tensors of no dimension: a compiled update takes them as inputs and need not be compiled anew when they change
        rates = torch.tensor(lr), torch.tensor(decay)
        self.update(data, gradient, *bucket.state.values(), *rates, *self.hyperparameters(progress))
        # other ranks get this slice while the next bucket is updated
        self.gathering[bucket] = bucket.gather(data, bucket.data)
        bucket.clear_gradient()

    def step(self, lr_factor: float, progress: float):
        """One update at `progress` in [0, 1) of the run, or what Overlap has left of it; slices travel meanwhile."""
        for bucket in self.buckets:
            if bucket not in self.gathering:
                self.update_bucket(bucket, lr_factor, progress)
        # no rank goes on before it has every slice
        for work in self.gathering.values():
            if work is not None:
                work.wait()
        self.gathering = {}
        self.steps += 1

    def state_dict(self) -> dict:
        """A copy of the whole state, the same on every rank. Collective."""
        state = {}
        for bucket in self.buckets:
            for name, local in bucket.state.items():
                state.setdefault(name, {}).update(bucket.collect(local))
        return dict(steps=self.steps, state=state)

    def load_state_dict(self, saved: dict):
        """Take up a state_dict(). KeyError, ValueError or another of Python's own errors for what is none."""
        self.steps = saved["steps"]
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(f"an optimizer's steps are {self.steps!r:.40}")
        for bucket in self.buckets:
            for name, local in bucket.state.items():
                bucket.distribute(saved["state"][name], local)


# Schedules: progress in [0, 1) is the part of the run that is done.


def schedule_learning_rate(config: Config, progress: float) -> float:
    """The factor on all learning rates: 1, then in the run's last decay_fraction linearly to 0."""
    return min(1.0, (1 - progress) / max(config.decay_fraction, 1e-9))


def schedule_weight_decay(config: Config, progress: float) -> float:
    """The factor on weight decay, which follows the learning rate besides."""
    return 1.0


def schedule_momentum(config: Config, progress: float) -> float:
    """Muon's momentum: from 0.85 up to the setting over the first tenth of the run."""
    return config.momentum - max(0.0, 1 - 10 * progress) * max(0.0, config.momentum - 0.85)


def schedule_adam_betas(config: Config, progress: float) -> tuple[float, float]:
    """The decays of Adam's two moments."""
    return config.adam_beta1, config.adam_beta2


# None, or treat_gradients(optimizers, config, progress, ranks), called before an update when all gradients are summed
# over the ranks: bucket.grad[bucket.slice] of every bucket of an optimizer is this rank's slice, to be changed in place
# (clipping, noise).
treat_gradients = None

# Coefficients of the Polar Express paper for five steps, with its safety factor of 2 %.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233002837),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def symmetric_product(x: Tensor, a: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x' + beta a of every matrix x (n, rows, columns)."""
    return x @ x.mT if a is None else torch.baddbmm(a, x, x.mT, beta=beta, alpha=alpha)


def orthogonalize(matrices: Tensor) -> Tensor:
    """
    (n, rows, columns) -> about U V' of each matrix' U S V' (singular values within about 0.3 of 1), in the input's
    dtype.
    """
    # the smaller Gram matrix; a norm of at most 1, as the series needs
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    # x <- a x + (b G + c G^2) x with G = x x'
    for a, b, c in POLAR_EXPRESS:
        gram = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram, gram, alpha=c, beta=b), x, beta=a)
    return x.mT if tall else x


class Muon(ShardedOptimizer):
    """For matrices; its buckets are batches of equal ones."""

    def new_state(self, local: Tensor) -> dict:
        # a number for each line of the longer side
        lines = local[..., :1] if local.shape[-2] >= local.shape[-1] else local[..., :1, :]
        return dict(momentum=torch.zeros_like(local), second=torch.zeros_like(lines))

    def hyperparameters(self, progress: float) -> tuple:
        return torch.tensor(schedule_momentum(self.config, progress)), self.config.normuon_beta2

    @staticmethod
    def update(data, gradient, momentum, second, lr, decay, mu, beta2: float):
        """
        Nesterov momentum, orthogonalisation, NorMuon's normalisation by row, cautious weight decay; of equal matrices.
        """
        # Nesterov momentum, then the nearest orthogonal matrix
        gradient = gradient * (1 - mu)
        momentum.mul_(mu).add_(gradient)  # no lerp: its weight may not be on another device
        update = (gradient + momentum * mu).to(torch.bfloat16 if data.is_cuda else torch.float32)
        update = orthogonalize(update).float()
        scale = max(1.0, data.shape[-2] / data.shape[-1]) ** 0.5

        if beta2:  # divide each row by its running size, then give the matrix its norm back
            norm = update.norm(dim=(-2, -1), keepdim=True)
            dim = -1 if second.shape[-1] == 1 else -2
            second.lerp_(update.square().mean(dim, keepdim=True), 1 - beta2)
            update = update * second.clamp_min(1e-10).rsqrt()
            scale = scale * norm / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
        data.sub_(lr * scale * update + decay * data * (update * data > 0))


class Adam(ShardedOptimizer):
    """For embeddings, the head, scalars and gates; its buckets are flat. Bias correction, cautious weight decay."""

    def new_state(self, local: Tensor) -> dict:
        return dict(mean=torch.zeros_like(local), square=torch.zeros_like(local))

    def hyperparameters(self, progress: float) -> tuple:
        betas = schedule_adam_betas(self.config, progress)
        return *betas, *(torch.tensor(1 - beta ** (self.steps + 1)) for beta in betas)

    @staticmethod
    def update(data, gradient, mean, square, lr, decay, beta1: float, beta2: float, correction1, correction2):
        # m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        # both divided by 1 - b^t; weight decay where it agrees in sign
        update = (mean / correction1) / ((square / correction2).sqrt() + 1e-10)
        data.sub_(lr * update + decay * data * (update * data > 0))


def build_optimizers(model: nn.Module, config: Config, ranks: Ranks) -> list[ShardedOptimizer]:
    """
    Muon for the matrices of blocks, Adam for the rest. A parameter's own attributes override this: .optimizer ("muon",
    "adam", "adam_embed", "adam_head"), .lr_mul, .wd_mul (Muon's 1, Adam's 0). Muon takes a parameter of three
    dimensions as a batch of matrices. The trainer calls step, state_dict and load_state_dict of what this returns; of
    several ranks it also reads .buckets and, where there is one, calls update_bucket: see Overlap.
    """
    # learning rates by kind
    rates = dict(muon=config.lr_matrix, adam=config.lr_scalar, adam_embed=config.lr_embed, adam_head=config.lr_head)

    # Several ranks: a bucket of matrices for every few layers, up to four, so that all but the first layers' are
    # reduced and updated while the backward pass goes on. As many layers as a multiple of the ranks, counted from the
    # last one: where each has one matrix of a shape, every rank gets equally many.
    deep = -(-config.layers // (4 * ranks.world)) * ranks.world if ranks.world > 1 else config.layers
    groups = {}  # (optimizer, factors, shape and depth of matrices) -> {name: parameter}
    for name, p in model.named_parameters():
        kind = getattr(p, "optimizer", "muon" if p.ndim >= 2 and name.startswith("blocks.") else "adam")
        require(kind in rates and (kind != "muon" or p.ndim >= 2),
                f"parameter {name} of shape {tuple(p.shape)} asks for optimizer {kind!r}; there are "
                f"{', '.join(rates)}, and muon takes matrices only")
        match = re.match(r"blocks\.(\d+)\.", name)
        layer = int(match[1]) if match else 0
        matrix = (p.shape[-2:], (config.layers - 1 - layer) // deep) if kind == "muon" else None
        key = kind, getattr(p, "lr_mul", 1.0), getattr(p, "wd_mul", float(kind == "muon")), matrix
        groups.setdefault(key, {})[name] = p

    buckets = dict(muon=[], adam=[])
    for (kind, lr_mul, wd_mul, matrix), parameters in groups.items():
        lr, weight_decay = rates[kind] * lr_mul, config.weight_decay * wd_mul
        bucket = Bucket(parameters, matrix is not None, lr, weight_decay, ranks)
        buckets["muon" if matrix else "adam"].append(bucket)

    def compiled(function):
        on = ranks.device.type == "cuda" and compile_mode(config, ranks) != "off"
        return torch.compile(function, dynamic=False) if on else function

    return [Muon(buckets["muon"], config, compiled), Adam(buckets["adam"], config, compiled)]


def build_average(model: nn.Module, config: Config, ranks: Ranks):
    """
    None: validation, the last checkpoint's texts and pictures see the weights as they are. Or an object whose averages
    they see: update(progress) after every step, applied(), a context manager in which the model has the averages,
    state_dict() of tensors and numbers, load_state_dict(saved).
    """
    return None


# ---- Model ------------------------------------------------------------------


@dataclass
class AttentionMask:
    """
    Which keys a layer's queries see; B rows of T tokens. Made outside the compiled graph, which only takes tensors from
    it: a new window compiles nothing anew.
    """

    doc_start: Tensor                   # (B, T) int32: where in the row each token's document begins (0: no mask)
    positions: Tensor                   # (B, T) int32: the token's number in its document
    window: int | None                  # in tokens; None: unlimited
    first_key: Tensor | None            # (B, T) int32: max(doc_start_i, i - window + 1); None: 0 throughout
    block_mask: object | None = None    # the same rule for FlexAttention
    stretches: list | None = None       # or for PyTorch's attention, see mask_stretches
    cache: object | None = None         # what the layer keeps of earlier tokens of a text: generate.LayerCache


@dataclass
class AttentionContext:
    """
    What a layer may know besides the stream; B rows of T tokens. A graph is compiled for every value that it reads.
    """

    mask: AttentionMask
    rotary: tuple[Tensor, Tensor] | None    # cosine and sine, (T, pairs that turn)
    x0: Tensor                              # (B, T, model_dim): the embedded tokens
    value: Tensor | None                    # (B, T, kv_heads * head_dim): the layer's value embedding


class Linear(nn.Module):
    """
    y = x W'; W (n_out, n_in) is float32, cast to x's dtype. role: q k v o fc proj gate head; the head's must offer
    .weight.
    """

    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int):
        super().__init__()
        # gates begin at a half, the head at equal logits, a branch at nothing
        zero = role in ("gate", "head") or role in ("o", "proj") and config.zero_init_projections
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.weight.role = role
        self.weight.init_std = 0.0 if zero else 0.5 * n_in ** -0.5
        self.weight.optimizer = dict(gate="adam", head="adam_head").get(role, "muon")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x))


class RMSNormalize(torch.autograd.Function):
    """
    x / sqrt(mean(x^2) + 1e-6) over the last dimension. Half the passes over memory of PyTorch's own where nothing is
    compiled.
    """

    @staticmethod
    def forward(ctx, x):
        # sums of squares in float32 at least
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = (norm.square() / x.shape[-1] + 1e-6).rsqrt()
        y = (x * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
        # dx = (dy - y mean(dy y)) / rms
        return (grad - y * (grad * y).mean(-1, keepdim=True, dtype=inverse.dtype)).mul_(inverse).to(y.dtype)


class ReLUSquared(torch.autograd.Function):
    """max(x, 0)^2, with one product in its backward pass."""

    @staticmethod
    def forward(ctx, x):
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad):
        return torch.addcmul(grad.new_zeros(()), grad, ctx.saved_tensors[0], value=2)  # 2 grad x in one pass


class Norm(nn.Module):
    """RMS normalisation of the last n channels, without gain."""

    def __init__(self, config: Config, n: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormalize.apply(x)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """
    Rotary positions on x (B, T, H, D): channel c < D / 2 is paired with c + D / 2; the first pairs turn, as many as
    rotary (T, n).
    """
    # (T, 1, n): the same for all heads
    cosine, sine = (t[:, None, :].type_as(x) for t in rotary)
    still = x.shape[-1] // 2 - cosine.shape[-1]
    a, a_still, b, b_still = x.split((cosine.shape[-1], still) * 2, dim=-1)
    return torch.cat((a * cosine + b * sine, a_still, b * cosine - a * sine, b_still), dim=-1)


def interval_block_mask(first_key: Tensor, block: int = 128):
    """
    FlexAttention's mask for first_key_i <= j <= i; first_key (B, T). As first_key never falls along a row, the first
    and the last query of a block decide: exact at a cost of (T / block)^2, no score is looked at.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # which blocks of keys a block of queries needs: some of its pairs, or all
    index = torch.arange(first_key.shape[1] // block, device=first_key.device)
    query, key = index[:, None], index[None, :]
    some = (key <= query) & (key * block + block > first_key[:, ::block, None])
    full = (key < query) & (key * block >= first_key[:, block - 1::block, None])

    # as lists of blocks, which FlexAttention reads
    def count(dense):
        return dense.sum(-1, dtype=torch.int32)[:, None]

    def order(dense):
        return torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()[:, None].contiguous()

    def mask_mod(b, h, i, j):
        return (j <= i) & (j >= first_key[b, i])

    partial = some & ~full
    blocks = count(partial), order(partial), count(full), order(full)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=block, mask_mod=mask_mod)


def mask_stretches(first_key: Tensor, window: int | None, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor]]:
    """
    The same rule for some queries at a time, so that the mask of a long row never exists at once: (first query, query
    after the last, first key, mask to add to the scores (B, 1, queries, keys)).
    """
    # queries a stretch
    T = first_key.shape[1]
    size = min(T, max(128, min(window or T, 1024)))
    stretches = []
    for start in range(0, T, size):
        # keys that its queries may see, and which of them each does not
        stop, begin = min(T, start + size), max(0, start - (window or T) + 1)
        key = torch.arange(begin, stop, device=first_key.device)
        query = torch.arange(start, stop, device=first_key.device)
        hidden = (key > query[:, None]) | (key < first_key[:, start:stop, None])
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
        stretches.append((start, stop, begin, mask[:, None]))
    return stretches


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """
    Softmax attention of q (B, T, H, D), k and v (B, T, G, D) over the keys that the mask allows; returns (B, T, H, D).
    G divides H: each head of keys serves H / G heads of queries, none is copied.
    """
    # of a text that is continued
    if mask.cache is not None:
        return mask.cache.attend(q, k, v, mask, scale)

    # by blocks, whole rows, or stretches
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if mask.block_mask is not None:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(q, k, v, block_mask=mask.block_mask, **options).transpose(1, 2)
    if mask.stretches is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options).transpose(1, 2)
    outputs = []
    for start, stop, begin, bias in mask.stretches:
        keys, values = k[:, :, begin:stop], v[:, :, begin:stop]
        outputs.append(F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=bias, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2)


GATE_CHANNELS = 12  # of the stream, which the sparse gates read


def stream_weights(config: Config, start: Tensor) -> nn.Parameter:
    """Learned factors on streams: start (n,), with channel_scales (n, model_dim)."""
    weights = nn.Parameter(start[:, None].repeat(1, config.model_dim) if config.channel_scales else start)
    weights.optimizer = "adam"
    return weights


class CausalSelfAttention(nn.Module):
    """
    Multi-head softmax attention with QK-norm, half-truncated rotary positions, value embeddings and a sparse output
    gate; with kv_heads several heads of queries share one of keys and values.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        width, kv_width = config.heads * config.head_dim, config.key_heads * config.head_dim
        self.q = Linear(config, layer, "q", config.model_dim, width)
        self.k, self.v = (Linear(config, layer, role, config.model_dim, kv_width) for role in "kv")
        self.o = Linear(config, layer, "o", width, config.model_dim)
        self.gate = None
        if config.attention_gate:
            self.gate = Linear(config, layer, "gate", min(GATE_CHANNELS, config.model_dim), config.heads)
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if value_table(config, layer) is not None else None
        self.query_gain = nn.Parameter(torch.full((config.heads,), 1.5)) if config.channel_scales else None
        self.scale = config.attention_scale or config.head_dim ** -0.5

    def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D), ready to attend."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
        return *self.turn(q, k, ctx), self.mix_value(v, ctx)

    def turn(self, q: Tensor, k: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        """Queries (B, T, H, D) and keys (B, T, G, D), normalised, at their positions, queries with their gains."""
        # norm before rotation: a rotation keeps it
        if self.config.qk_norm:
            q, k = RMSNormalize.apply(q), RMSNormalize.apply(k)
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        if self.query_gain is not None:
            q = q * self.query_gain.type_as(q)[:, None]
        return q, k

    def mix_value(self, v: Tensor, ctx: AttentionContext) -> Tensor:
        if self.value_mix is None:
            return v
        # two numbers for all heads
        mix = self.value_mix.type_as(v)
        return mix[0] * v + mix[1] * ctx.value.view_as(v)

    def gate_heads(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, H, D), each head gated by the first channels of the layer's input x -> (B, T, H D)."""
        # a factor in (0, 2) for each token and head
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])))[..., None]
        return y.flatten(2)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        y = attend(*self.heads(x, ctx), ctx.mask, self.scale)
        return self.o(self.gate_heads(y, x))


class MLP(nn.Module):
    """Feed-forward with squared ReLU."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.fc = Linear(config, layer, "fc", config.model_dim, config.mlp_hidden)
        self.proj = Linear(config, layer, "proj", config.mlp_hidden, config.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ReLUSquared.apply(self.fc(x)))


class Residual(nn.Module):
    """How a branch's output joins the stream. branch: "attention" or "mlp"."""

    def __init__(self, config: Config, layer: int, branch: str):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.model_dim)) if config.channel_scales else None

    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        if self.scale is None:
            return x + branch_output
        return x + self.scale.type_as(x) * branch_output


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.stream_mix = stream_weights(config, torch.tensor([1.0, 0.0])) if config.x0_skip else None
        self.attention_norm, self.mlp_norm = Norm(config, config.model_dim), Norm(config, config.model_dim)
        self.attention, self.mlp = CausalSelfAttention(config, layer), MLP(config, layer)
        self.attention_residual, self.mlp_residual = Residual(config, layer,
                                                              "attention"), Residual(config, layer, "mlp")

    def mix_stream(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        if self.stream_mix is None:
            return x
        mix = self.stream_mix.type_as(x)
        return mix[0] * x + mix[1] * ctx.x0

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        x = self.mix_stream(x, ctx)
        x = self.attention_residual(x, self.attention(self.attention_norm(x), ctx))
        return self.mlp_residual(x, self.mlp(self.mlp_norm(x)))


def loss_of_chunk(x: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    (sum of the cross-entropies, capped logits, log-normalisers) of n tokens. x (n, D), weight (V, D), targets (n,)
    int64.
    """
    # (n, V), in float32 from here on
    logits = (x @ weight.T).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    normaliser = logits.logsumexp(-1, keepdim=True)
    return (normaliser - logits.gather(1, targets[:, None])).sum(), logits, normaliser


class SoftcappedCrossEntropy(torch.autograd.Function):
    """
    Sum over N tokens of the cross-entropy of c tanh(x W' / c); x (N, D), W (V, D), targets (N,) int64, c = 0: no cap;
    returns a float32 scalar. The gradients are formed in the forward pass, `chunk` tokens at a time: three products in
    all, and (N, V) never exists in any precision.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, chunk):
        w = weight.type_as(x)
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dw = [], torch.zeros_like(weight)
        for rows, target in zip(x.split(chunk), targets.split(chunk)):
            rows_loss, logits, normaliser = loss_of_chunk(rows, w, target, softcap)
            # dloss/dlogits = (softmax - one at the target) (1 - (logits / c)^2)
            d = torch.exp(logits - normaliser).scatter_add(1, target[:, None], -torch.ones_like(normaliser))
            d = (d * (1 - (logits / softcap).square()) if softcap else d).type_as(x)
            # dx = d W, dW = d' x
            loss, dw = loss + rows_loss, dw + d.T @ rows
            dx.append(d @ w)
        ctx.save_for_backward(torch.cat(dx), dw)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad.to(dx.dtype) * dx, grad * dw, None, None, None


class LanguageModelHead(nn.Module):
    """
    forward(x (B, T, D), targets (B, T)) -> mean loss in nats a token, float32; without targets logits (B, T,
    vocabulary), float32.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.projection = Linear(config, None, "head", config.model_dim, config.padded_vocabulary)
        self.vocab_size = config.vocab_size
        self.softcap = config.logit_softcap
        self.chunk = config.loss_chunk

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors (B, T, n) and (padded vocabulary, n) whose product the logits are, before the cap."""
        return x, self.projection.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x, weight = self.operands(x)
        if targets is None:
            logits = F.linear(x, weight[:self.vocab_size].type_as(x)).float()
            return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

        x, targets = x.flatten(0, 1), targets.flatten().long()
        if torch.is_grad_enabled():
            return SoftcappedCrossEntropy.apply(x, weight, targets, self.softcap, self.chunk) / len(targets)
        weight = weight.type_as(x)
        chunks = zip(x.split(self.chunk), targets.split(self.chunk))
        return sum(loss_of_chunk(rows, weight, target, self.softcap)[0] for rows, target in chunks) / len(targets)


def value_table(config: Config, layer: int) -> int | None:
    """Which value embedding a layer uses: tables 0, 1, .. in the first layers and again in the last, None between."""
    # as many tables as half of the layers at the most
    n = min(config.value_embeddings, config.layers // 2)
    if layer < n:
        return layer
    return layer - config.layers + n if layer >= config.layers - n else None


def embedding(rows: int, columns: int, std: float) -> nn.Embedding:
    table = nn.Embedding(rows, columns)
    table.weight.init_std = std
    table.weight.optimizer = "adam_embed"
    return table


class WeightSource(nn.Module):
    """
    Makes parameters of a model out of numbers of its own: forward() returns {name: tensor} for all names in .shapes.
    What it makes are parameters no more but tensors, which their modules read as before. A pass makes them anew, with
    its gradient running back to the source; between hold() and release() passes share them, as in a step of training:
    they see leaves, whose gradients are summed and go back at once, so that the source runs once a step.
    """

    def __init__(self, model: nn.Module, names: list[str]):
        """Take the parameters of these names from the model."""
        super().__init__()
        self.shapes = {}    # parameter's name -> its shape
        self.stds = {}      # parameter's name -> standard deviation of the baseline's first tensor; None: not drawn
        self.readers = {}   # parameter's name -> (module, attribute) of all that read it: the head may be tied
        self.held = None    # {name: tensor with its graph} between hold() and release(); None: a pass makes them
        parameters = dict(model.named_parameters())
        for name in names:
            p = parameters[name]
            self.shapes[name], self.stds[name] = p.shape, getattr(p, "init_std", None)
            self.readers[name] = [(module, attribute) for module in model.modules()
                                  for attribute, other in module.named_parameters(recurse=False) if other is p]
            for module, attribute in self.readers[name]:
                delattr(module, attribute)
                setattr(module, attribute, p.detach())  # of the right shape and device; its numbers mean nothing

    def _assign(self, tensors: dict[str, Tensor]):
        for name, readers in self.readers.items():
            for module, attribute in readers:
                setattr(module, attribute, tensors[name])

    def provide(self):
        """What a pass begins with."""
        if self.held is None:
            self._assign(self())

    def hold(self):
        """Make the tensors for all passes until release()."""
        self.held = self()
        self._assign({name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in self.held.items()})

    def release(self):
        """
        Take the gradients of all passes since hold(), if there are any, back to the source's parameters: one product
        with a vector.
        """
        leaves = [getattr(*self.readers[name][0]) for name in self.held]
        outputs = [(tensor, leaf.grad) for tensor, leaf in zip(self.held.values(), leaves) if leaf.grad is not None]
        if outputs:
            torch.autograd.backward(*zip(*outputs))
        self.held = None


def matrices_of(model: nn.Module) -> list[str]:
    """Names of the weights that Linear holds in blocks, gates left out. RunError where there are none."""
    names = [name for name, p in model.named_parameters() if getattr(p, "role", "gate") not in ("gate", "head")]
    require(names, f"variants {', '.join(model.config.variant)}: no matrix of the trainer's Linear is left to be made "
                   "by a source; leave out what replaces Linear")
    return names


def build_source(model: nn.Module, config: Config) -> WeightSource | None:
    """
    None: all that a model learns are its parameters. Or what makes some of them, see WeightSource; the model is whole,
    its tensors are not yet drawn.
    """
    return None


def draw_normal(name: str, shape: tuple, std: float, seed: int) -> Tensor:
    """A parameter's first tensor of this standard deviation: normal numbers of a generator of its name and the seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) * 1_000_003 + seed)
    return torch.randn(shape, generator=generator, device="cpu") * std


class GPT(nn.Module):
    """forward(tokens (B, T) int, targets (B, T) int) -> mean loss; without targets -> logits (B, T, vocabulary)."""

    def __init__(self, config: Config):
        super().__init__()
        # state
        width, rows = config.model_dim, config.padded_vocabulary
        self.config = config
        self.dtype = torch.float32      # of activations
        self.use_flex = False           # whether masks are FlexAttention's
        self.windows = (0, 0)           # short and long in this part of the run, in tokens; 0: unlimited

        # parameters; their order is that of the checkpoint
        self.embedding = embedding(rows, width, config.embedding_std or (0.02 if config.tied_embedding else 1.0))
        self.bigram_embedding = embedding(config.bigram_rows, width, 0.0) if config.bigram_rows else None
        tables = min(config.value_embeddings, config.layers // 2)
        kv_width = config.key_heads * config.head_dim
        self.value_embeddings = nn.ModuleList(embedding(rows, kv_width, 0.1) for _ in range(tables))
        self.smear_gate = Linear(config, None, "gate", min(GATE_CHANNELS, width), 1) if config.smear else None
        self.smear_scale = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        start = torch.full((config.layers // 2,), 1.0 if config.channel_scales else 0.2)
        self.skip_weights = stream_weights(config, start) if config.unet_skips else None
        self.embedding_norm, self.final_norm = Norm(config, width), Norm(config, width)
        self.head = LanguageModelHead(config)
        if config.tied_embedding:
            self.head.projection.weight = self.embedding.weight

        # rotary positions
        turning = config.head_dim // (2 if config.rope == "full" else 4)  # pairs of channels
        self.register_buffer("frequencies", config.rope_base ** -torch.linspace(0, 1, turning), persistent=False)
        self.source = build_source(self, config)  # makes parameters; None: there is none

    @torch.no_grad()
    def initialize(self, seed: int):
        """
        Draw every parameter that has .init_std from a generator of its own name: equal names begin equal, whatever else
        there is. Modules with a method initialize(name, seed) draw theirs besides.
        """
        for name, p in self.named_parameters():
            std = getattr(p, "init_std", None)
            if std is not None:
                p.copy_(draw_normal(name, p.shape, std, seed) if std else torch.zeros(p.shape))
        for name, module in self.named_modules():
            if module is not self and hasattr(module, "initialize"):
                module.initialize(name, seed)

    def stage(self, progress: float):
        """What a compiled graph depends on of progress in [0, 1] of the run: every value is compiled in the warm-up."""
        return window_stage(self.config, progress)

    def set_windows(self, progress: float):
        """Choose the windows of this part of the run, progress in [0, 1]."""
        stage = window_stage(self.config, progress)
        self.windows = (self.config.window_short[stage], self.config.window_long[stage])

    def window(self, layer: int) -> int:
        """The layer's window in this part of the run, in tokens; 0: unlimited."""
        pattern = self.config.window_pattern
        is_long = layer == self.config.layers - 1 or pattern[layer % len(pattern)] == "L"
        return self.windows[is_long]

    def masks(self, tokens: Tensor) -> list[AttentionMask]:
        """One AttentionMask a layer, for tokens (B, T)."""
        # where documents begin
        config, T = self.config, tokens.shape[1]
        index = torch.arange(T, device=tokens.device, dtype=torch.int32)
        starts = torch.zeros_like(tokens)
        if config.document_mask:
            starts = torch.where(tokens == config.end_of_text, index, 0)
        doc_start = starts.cummax(1).values.int()

        shared, layers = {}, []  # shared: window -> mask
        for layer in range(config.layers):
            window = self.window(layer) if 0 < self.window(layer) < T else None
            if window not in shared:
                first_key = doc_start if config.document_mask else None
                if window:
                    first_key = torch.maximum(doc_start, index - (window - 1))
                mask = AttentionMask(doc_start, index - doc_start, window, first_key)
                if first_key is not None and self.use_flex and T % 128 == 0:
                    mask.block_mask = interval_block_mask(first_key)
                elif first_key is not None:
                    mask.stretches = mask_stretches(first_key, window, self.dtype)
                shared[window] = mask
            layers.append(shared[window])
        return layers

    def look_up(self, tokens: Tensor) -> list[Tensor]:
        """Rows (B, T, model_dim) of the embedding and of every table of value embeddings, in the activations' dtype."""
        return [table(tokens).to(self.dtype) for table in (self.embedding, *self.value_embeddings)]

    def embed(self, tokens: Tensor, masks: list, start: int = 0) -> tuple[Tensor, list[AttentionContext]]:
        """
        Tokens (B, T), the first of them at `start` in its row -> the stream (B, T, model_dim) and the layers' contexts.
        Nothing passes the start of a document.
        """
        config = self.config
        # the embedding, and which tokens have one before them in their document
        index = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x, *values = self.look_up(tokens)
        inside = (index > 0) & (tokens != config.end_of_text if config.document_mask else True)

        # what a token knows of the one before it
        if self.smear_gate is not None:
            gate = torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS]))
            gate = self.smear_scale.type_as(x) * gate * inside[..., None]
            x = x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.bigram_embedding is not None:  # row 0: there is no token before
            previous = F.pad(tokens[:, :-1], (1, 0)).long()
            row = torch.where(inside, 1 + (previous * 36_313 ^ tokens.long() * 27_191) % (config.bigram_rows - 1), 0)
            x = x + self.bigram_embedding(row).to(self.dtype)
        x = self.embedding_norm(x)

        # what layers need besides
        angles = index[:, None] * self.frequencies
        rotary = (angles.cos(), angles.sin()) if config.rope != "none" else None
        contexts = []
        for layer, mask in enumerate(masks):
            table = value_table(config, layer)
            contexts.append(AttentionContext(mask, rotary, x, None if table is None else values[table]))
        return x, contexts

    def run_blocks(self, x: Tensor, contexts: list[AttentionContext]) -> Tensor:
        """The order of the blocks. contexts: one a layer."""
        streams, n = [], len(self.blocks)
        for layer, (block, ctx) in enumerate(zip(self.blocks, contexts)):
            if self.skip_weights is not None and layer >= n - n // 2:
                x = x + self.skip_weights[n - 1 - layer].type_as(x) * streams[n - 1 - layer]
            x = block(x, ctx)
            streams.append(x)
        return x

    def select_outputs(self, x: Tensor) -> Tensor:
        """The positions that predict a token: all, unless a variant inserts some."""
        return x

    def auxiliary_loss(self, x: Tensor, tokens: Tensor, targets: Tensor) -> Tensor | None:
        """
        None, or what training adds to the loss: a scalar from the stream after the blocks x (B, T, model_dim), tokens
        and targets (B, T). Validation never sees it.
        """
        return None

    def predict(self, tokens: Tensor, masks: list[AttentionMask], targets: Tensor | None) -> Tensor:
        """All of forward but the masks: what is compiled as one graph."""
        x = self.select_outputs(self.run_blocks(*self.embed(tokens, masks)))
        result = self.head(self.final_norm(x), targets)
        if self.training and targets is not None:
            auxiliary = self.auxiliary_loss(x, tokens, targets)
            result = result if auxiliary is None else result + auxiliary
        return result

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.source is not None:
            self.source.provide()
        return self.predict(tokens, self.masks(tokens), targets)


def window_stage(config: Config, progress: float) -> int:
    """Which of the equal parts of the run, each with its windows, progress in [0, 1] lies in."""
    stages = len(config.window_long)
    return min(int(progress * stages), stages - 1)


def build_model(config: Config, ranks: Ranks) -> GPT:
    """The model on its device with its initial tensors, not yet compiled."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    model.initialize(config.seed)
    model.dtype = ranks.dtype
    model.use_flex = ranks.device.type == "cuda" and compile_mode(config, ranks) != "off"
    return model.to(ranks.device)


def trained_model(saved: dict, config: Config, ranks: Ranks) -> GPT:
    """
    The model of a checkpoint's contents, as validated at the end of its run, to be used; its variants must be applied.
    """
    model = build_model(config, ranks)
    model.load_state_dict(saved["model"])
    model.set_windows(1.0)
    model.eval()
    if model.source is not None:
        with torch.no_grad():
            model.source.hold()
    return model


def compile_mode(config: Config, ranks: Ranks) -> str:
    """
    What compile = auto means. One GPU: one graph. Several: a graph a block, because a whole graph hands over its
    gradients only when its backward pass ends, and nothing could be reduced meanwhile. CPU: a graph a block (equal
    blocks share it), a quarter faster, where the run is long enough to earn the half minute that this takes and there
    is a C++ compiler.
    """
    if config.compile != "auto":
        return config.compile
    if ranks.device.type == "cuda":
        return "model" if ranks.world == 1 else "blocks"
    tokens = config.steps * config.batch_tokens or config.tokens
    return "blocks" if tokens >= 10_000_000 and shutil.which(os.environ.get("CXX", "g++")) else "off"


def compiler_fault(device: torch.device) -> str | None:
    """
    Why torch.compile does not work here, in a few words; None if it does. Tried on an addition that no cache has seen.
    """
    # a number that is in no cache on the disk
    number = 1 + secrets.randbits(50) / 2 ** 50
    try:
        torch.compile(lambda x: x + number, dynamic=False)(torch.ones(8, device=device))
        return None
    except Exception as error:  # whatever the compiler, the linker or the file system raise
        lines = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {lines[0][:100]}"
    finally:
        torch._dynamo.reset()


def compile_model(model: GPT, mode: str):
    """Compile in place, whole graphs and static shapes only: a graph break is an error."""
    torch._dynamo.config.recompile_limit = 64  # windows and value embeddings make a few kinds of block
    if mode == "model":
        model.predict = torch.compile(model.predict, dynamic=False, fullgraph=True)
    if mode == "blocks":
        for module in (*model.blocks, model.head):
            module.compile(dynamic=False, fullgraph=True)


def collect_facts(model: GPT, tokens: Tensor) -> dict:
    """
    What else the run's JSON holds of a validation, as JSON values by name; tokens (B, T) are validation tokens, and the
    model is in its evaluation mode.
    """
    return {}


def measure_model(config: Config) -> dict:
    """
    What a model costs, counted on one row without data (PyTorch's meta device), as a dict: parameters;
    parameters_without_embeddings, which leaves the tables and the head out; flops_per_token, of training, forward and
    backward, scores that are computed and masked counted too, a source of weights once a step.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(1, config.sequence_length, dtype=torch.int64)
    model.set_windows(1.0)

    def count(action) -> int:
        with FlopCounterMode(display=False) as counter:
            action()
        return counter.get_total_flops()

    # of a row, and of a step
    of_step = 0 if model.source is None else count(model.source.hold)
    of_row = count(lambda: model(tokens, tokens).backward())
    if model.source is not None:
        of_step += count(model.source.release)
    flops = of_row / config.sequence_length + of_step / config.batch_tokens

    parameters, others = count_parameters(model)
    return dict(parameters=parameters, parameters_without_embeddings=others, flops_per_token=flops)


def count_parameters(model: GPT) -> tuple[int, int]:
    """A model's parameters, and those without the tables and the head, which are counted once; none of a source's."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    sizes = {id(weight): weight.numel() for weight in (*tables, model.head.projection.weight)
             if isinstance(weight, nn.Parameter)}
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, parameters - sum(sizes.values())


def flops_per_token(config: Config) -> float:
    """Training FLOPs of one token, forward and backward."""
    return measure_model(config)["flops_per_token"]


def memory_needed(config: Config, dtype: torch.dtype) -> int:
    """
    Bytes that a process of this run takes at the least, whatever is fused: for every parameter its weight, its gradient
    and two numbers of its optimizer, and during the warm-up a copy of three of these; the stream of a micro batch after
    every layer, the logits of a chunk and the tokens of two batches.
    """
    # parameters
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    # activations
    rows = max(1, min(config.micro_batch_tokens, config.batch_tokens) // config.sequence_length)
    tokens = rows * config.sequence_length
    streams = tokens * config.layers * config.model_dim * dtype.itemsize
    logits = 4 * config.padded_vocabulary * min(config.loss_chunk, tokens)
    return int(28 * parameters + streams + logits + 8 * config.batch_tokens)


def memory_of_machine(ranks: Ranks) -> int:
    """
    Bytes that a process of this run may take at most: its GPU's, or its share of the machine's, which a container may
    limit.
    """
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    # the machine, then version 2 and 1 of control groups
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = file.read_text().strip() if file.exists() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def measured_peak(ranks: Ranks) -> float:
    """FLOP/s of a large product on this device in the activations' dtype: the ceiling that MFU refers to."""
    from torch.utils.benchmark import Timer

    # large enough to be bound by arithmetic
    n = 8192 if ranks.device.type == "cuda" else 1024
    matrices = {name: torch.randn(n, n, device=ranks.device, dtype=ranks.dtype) for name in "ab"}
    timer = Timer("a @ b", globals=matrices, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / min(timer.timeit(4).mean for _ in range(4))


# ---- Data: shards of uint16 tokens ------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
MERGES_BYTES = 2 ** 26  # the largest file of merges that is read; GPT-4o's 200,000 merges have 3.6 MB


def open_shard(path: Path) -> np.ndarray:
    """
    A shard's tokens as a read-only map of uint16. RunError if it is no sound shard of modded-nanogpt's and llm.c's
    format.
    """
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise RunError(f"cannot read shard {path}: {error.strerror}") from None
    require(len(header) == HEADER_INTS and header[0] == SHARD_MAGIC and header[1] == SHARD_VERSION,
            f"{path} is no token shard: it begins with {header[:2].tolist()}, wanted [{SHARD_MAGIC}, {SHARD_VERSION}]; "
            "make shards with data/tokenize_text.py")
    # its length, by the header and by the file
    tokens, body = int(header[2]), size - 4 * HEADER_INTS
    require(not tokens > 0 or body not in (4 * tokens, 8 * tokens),
            f"{path} holds tokens of {body // max(tokens, 1)} bytes, wanted 2 (uint16); make the shard again with "
            "data/tokenize_text.py")
    require(tokens > 0 and body == 2 * tokens, f"{path} is truncated or empty: {size} bytes, its header promises "
            f"{4 * HEADER_INTS + 2 * tokens}; delete it and fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4)


def is_of_split(path: Path, split: str) -> bool:
    """
    Whether a shard's name says that it is of this split, between separators or ends: x_val_000000.bin and x_val.bin.
    """
    return re.search(rf"(^|[_.-]){split}([_.-]|$)", path.stem) is not None


def data_folder(config: Config) -> Path:
    """The folder of shards. A relative one that is not here is looked for beside this file."""
    return Path(config.data) if os.path.isdir(config.data) else Path(__file__).resolve().parent / config.data


def find_shards(config: Config, split: str) -> list[Path]:
    """
    The folder's shards of a split (train or val), sorted. Where some end in a number, as those of a series do, the
    others are not taken. RunError where there is none, and for a file whose name says both splits.
    """
    try:
        files = sorted(data_folder(config).glob("*.bin"))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise RunError(f"cannot read the folder {config.data[:80]}: {error.strerror}; give --data a folder of "
                       "shards") from None
    # by the split in their names
    both = ", ".join(file.name for file in files if is_of_split(file, "train") and is_of_split(file, "val"))
    require(not both, f"{config.data}: {both} says both train and val, so its split is not known; rename it")
    files = [file for file in files if is_of_split(file, split)]
    require(files, f"no {split} shards (*_{split}_*.bin) in {config.data}; ./run.sh prepares a track's data, "
            "data/tokenize_text.py makes shards of your own text")
    return [file for file in files if file.stem[-1].isdigit()] or files


def read_meta(folder: Path, must: bool = True) -> dict:
    """
    meta.json of a folder of shards, {} where there is none: vocab_size, and where it says so end_of_text (a token id),
    tokenizer and, for each split, sha256 {file name: hex}. RunError for a damaged one or another tool's; with
    must=False it counts as none.
    """
    path, remedy = folder / "meta.json", "make the shards again, or give --vocab_size and delete it"
    if not path.exists():
        return {}
    try:
        meta = read_json(path, remedy)
        # the vocabulary
        size, end = meta.get("vocab_size"), meta.get("end_of_text", 0)
        require(type(size) is int and 2 <= size <= 65_536,
                f"{path}: vocab_size is {size!r:.40}, wanted an integer from 2 to 65536; {remedy}")
        require(type(end) is int and 0 <= end < size,
                f"{path}: end_of_text is {end!r:.40}, wanted a token id below {size}; {remedy}")
        # the files of each split
        for split in ("train", "val"):
            hashes = meta.get(split, {}).get("sha256", {}) if isinstance(meta.get(split, {}), dict) else None
            require(isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values()),
                    f"{path}: {split} has no list of files and their sha256; {remedy}")
        return meta
    except RunError:
        if must:
            raise
        return {}


def adopt_vocabulary(config: Config):
    """
    Fill in vocab_size and document_token from the folder's meta.json, which the scripts in data/ write, else GPT-2's. A
    larger --vocab_size only adds ids: documents go on beginning with the data's token.
    """
    meta = read_meta(find_shards(config, "train")[0].parent, must=not config.vocab_size)
    data_size = meta.get("vocab_size", 257 if config.vocab_size == 257 else 50257)
    config.vocab_size = config.vocab_size or data_size
    if config.document_token < 0:
        config.document_token = meta.get("end_of_text", min(data_size, config.vocab_size) - 1)


def check_document_token(config: Config) -> str | None:
    """
    Return a warning, in one line, where the first training shard holds no token that begins a document; None otherwise.
    RunError if rows must begin there.
    """
    tokens = open_shard(find_shards(config, "train")[0])[:20_000_000]
    if not (config.document_mask or config.align_documents) or (tokens == config.end_of_text).any():
        return None
    text = (f"the first {len(tokens):,} training tokens hold no id {config.end_of_text}, which begins a document; give "
            "its id by --document_token")
    require(not config.align_documents, f"{text}, or --no-align_documents")
    return f"warning: {text}, or --no-document_mask"


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(folder: Path, names) -> dict[str, str]:
    """
    {name: sha256} of files in a folder, each read once: a hidden file there, .checked.json, remembers them by size and
    times. RunError for a file that cannot be read.
    """
    store = folder / ".checked.json"
    try:
        known = read_json(store, "")
    except RunError:  # there is none, or it is damaged: all files are read
        known = {}

    # read what is new
    before, digests = dict(known), {}
    for name in names:
        try:
            status = (folder / name).stat()
            mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            entry = known.get(name)
            if not isinstance(entry, list) or len(entry) != 4 or entry[:3] != mark:
                known[name] = [*mark, sha256_of_file(folder / name)]
        except OSError as error:
            raise RunError(f"cannot read {folder / name}: {error.strerror}; fetch or make it again") from None
        digests[name] = known[name][3]

    # remember
    if known != before:
        try:
            write_atomically(store, lambda file: file.write(json.dumps(known).encode()))
        except RunError:  # a folder that cannot be written: files are read again next time
            pass
    return digests


def check_shards(config: Config):
    """
    RunError unless the folder's shards are those that its meta.json records, by name and sha256; if it records any.
    """
    folder = find_shards(config, "train")[0].parent
    meta = read_meta(folder, must=False)
    for split in ("train", "val"):
        # by name
        recorded = meta.get(split, {}).get("sha256", {})
        present = {file.name for file in find_shards(config, split)}
        other = ", ".join(sorted(present ^ set(recorded)))[:200]
        require(not recorded or not other,
                f"{folder}: its {split} shards are not those that meta.json records ({other}); fetch or make them "
                "again")
        # by contents
        changed = [name for name, sha256 in sha256_of_files(folder, recorded).items() if sha256 != recorded[name]]
        require(not changed,
                f"{folder}: {', '.join(changed)[:200]} is not the file that meta.json describes (its sha256 differs); "
                "fetch or make it again, or delete meta.json and give --vocab_size")


def identity_of_data(config: Config) -> str:
    """
    A short hash of the training shards' names, tokens and sha256, if meta.json has it: equal where runs read the same
    tokens.
    """
    files = find_shards(config, "train")
    hashes = read_meta(files[0].parent, must=False).get("train", {}).get("sha256", {})
    shards = [[file.name, len(open_shard(file)), hashes.get(file.name)] for file in files]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def read_merges(path: Path) -> dict[bytes, int]:
    """
    {token: id} of a .tiktoken file. RunError if it is none, or if its ids are not 0 to n-1 with all 256 bytes among the
    tokens.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MERGES_BYTES + 1)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; --tokenizer takes gpt2, bytes or a .tiktoken "
                       "file") from None
    require(len(content) <= MERGES_BYTES,
            f"{path} is no .tiktoken file: it has more than {MERGES_BYTES:,} bytes; give gpt2, bytes or another file")

    # a token a line
    merges = {}
    for number, line in enumerate(content.splitlines(), 1):
        match = re.fullmatch(rb"((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?) ([0-9]{1,9})", line)
        require(match or not line,
                f"{path} is no .tiktoken file: its lines must be a token in base64, a space and its id, and line "
                f"{number} is not")
        if match:
            merges[base64.b64decode(match[1])] = int(match[2])
    # all ids, all bytes
    complete = sorted(merges.values()) == list(range(len(merges))) and all(bytes([b]) in merges for b in range(256))
    require(complete and b"" not in merges,
            f"{path} is no whole set of merges: ids must be 0 to n-1, each once, with all 256 single bytes; got "
            f"{len(merges)} tokens")
    return merges


def token_bytes(config: Config) -> np.ndarray | None:
    """
    UTF-8 bytes of every token id, 0 of the end of text; None without merges (*.tiktoken) by the shards. RunError for
    damaged ones.
    """
    if config.vocab_size == 257:
        return np.array([1] * 256 + [0])
    merges = next(find_shards(config, "val")[0].parent.glob("*.tiktoken"), None)
    if merges is None:
        return None
    # ids without a token of their own, as the end of text, have no bytes
    ranks = read_merges(merges)
    sizes = np.zeros(max(config.vocab_size, max(ranks.values()) + 1), dtype=np.int64)
    sizes[list(ranks.values())] = [len(token) for token in ranks]
    return sizes


def checked(rows: np.ndarray, config: Config) -> np.ndarray:
    """Rows of tokens as int32. RunError for a token outside the vocabulary."""
    # uint16 has no negative ids
    largest = rows.max() if rows.size else 0
    require(largest < config.vocab_size,
            f"token {largest} in {config.data} is outside the vocabulary of {config.vocab_size}; give --vocab_size or "
            "shards of this tokenizer")
    return rows.astype(np.int32)


def validation_batches(config: Config) -> list[np.ndarray]:
    """
    Batches (rows, sequence_length + 1) int32 of the first val_tokens tokens in order: as many rows each as a micro
    batch holds, fewer in the last one. Every row is in one of them, so that the loss depends on neither the batch's
    size nor the ranks.
    """
    # one more token than is scored: the first is no target
    T, pieces, missing = config.sequence_length, [], config.val_tokens + 1
    for file in find_shards(config, "val"):
        pieces.append(open_shard(file)[:missing])
        missing -= len(pieces[-1])
    # rows overlap by the token that is the last target of one and the first input of the next
    tokens = np.concatenate(pieces)
    count = (len(tokens) - 1) // T
    require(count > 0,
            f"{len(tokens)} validation tokens in {config.data} do not fill a row of {T + 1}; lower --sequence_length "
            "or add data")
    rows = checked(np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[:count * T:T], config)
    size = max(1, config.micro_batch_tokens // T)
    return [rows[start:start + size] for start in range(0, count, size)]


def order_shards(config: Config, epoch: int, count: int) -> list[int]:
    """
    Which of the `count` training shards, sorted by name, an epoch reads, in this order; one may come several times.
    """
    return list(range(count))


def order_rows(config: Config, tokens: np.ndarray, starts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """
    In which order a shard's rows are read. tokens: the shard's, uint16; starts (n,) int64: where its rows begin.
    Returns any of them, none or some several times, drawn from the generator alone, so that a resumed run finds its row
    again.
    """
    return generator.permutation(starts)


def schedule_batch(config: Config, progress: float) -> tuple[int, int]:
    """
    (tokens of the optimizer step at progress in [0, 1), tokens of its rows). The first is a multiple of sequence_length
    times the ranks, the second divides sequence_length: rows are read whole and cut.
    """
    return config.batch_tokens, config.sequence_length


class TokenLoader:
    """
    Endless batches of rows of sequence_length + 1 tokens, read one batch ahead on another thread. The order of rows
    depends on the seed alone: order_shards, and of each shard order_rows with a generator of (seed, epoch, number in
    the epoch). Rank r of w takes the r-th of w equal shares of every batch.
    """

    def __init__(self, config: Config, rank: int = 0, world: int = 1):
        """RunError if the batch cannot be shared by the ranks."""
        self.config = config
        self.rank = rank
        self.world = world
        self.files = find_shards(config, "train")
        self.total = sum(len(open_shard(file)) for file in self.files)  # tokens
        self.rows = self.share(config.batch_tokens)  # of this rank in a batch, unless next_batch is told otherwise
        self.thread = ThreadPoolExecutor(1)
        self.ahead = None           # (rows of a rank, the batch that is being read); None before the first
        self.load_state_dict(dict(epoch=0, shard=0, row=0))

    def share(self, batch_tokens: int) -> int:
        """Rows that each rank has of a batch. RunError if they are none, or not equally many."""
        rows = batch_tokens // self.config.sequence_length
        require(rows > 0 and rows % self.world == 0,
                f"{rows} rows of {self.config.sequence_length} tokens cannot be shared by {self.world} ranks; change "
                "--batch_tokens or the number of ranks")
        return rows // self.world

    def load_state_dict(self, state: dict):
        """Go to where a batch's state was taken, see next_batch(); takes effect before the first of them."""
        self.state = {name: int(state[name]) for name in ("epoch", "shard", "row")}
        self.epoch, self.shard, self.row = self.state.values()
        self._open()

    def _open(self):
        """Read the shard of this number in the epoch, and order its rows."""
        T = self.config.sequence_length
        # the shard
        shards = order_shards(self.config, self.epoch, len(self.files))
        require(self.shard < len(shards), f"the checkpoint stood in training shard {self.shard + 1}, but an epoch of "
                f"{self.config.data} has {len(shards)}; give the same shards")
        self.shards = len(shards)
        self.tokens = open_shard(self.files[shards[self.shard]])
        if self.shard + 1 < len(shards) and hasattr(os, "posix_fadvise"):  # the next shard is read from disk meanwhile
            with open(self.files[shards[self.shard + 1]], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

        # where its rows begin
        generator = np.random.default_rng([self.config.seed, self.epoch, self.shard])
        if self.config.align_documents:
            documents = np.flatnonzero(self.tokens == self.config.end_of_text)
            starts, index = [], 0
            while index < len(documents) and documents[index] + T < len(self.tokens):
                starts.append(documents[index])
                index = np.searchsorted(documents, documents[index] + T)
        else:
            first = generator.integers(min(T, max(len(self.tokens) - T, 1)))
            starts = range(first, len(self.tokens) - T, T)
        self.starts = order_rows(self.config, self.tokens, np.array(starts, dtype=np.int64), generator)

    def _read(self, count: int) -> tuple[Tensor, dict]:
        """The next `count` rows of every rank: this rank's, and the state after them."""
        T, rows, opened = self.config.sequence_length, [], 0  # rows: (a shard's tokens, start)
        # rows of all ranks, from as many shards as it takes
        while len(rows) < count * self.world:
            if self.row >= len(self.starts):
                self.shard, self.row, opened = (self.shard + 1) % self.shards, 0, opened + 1
                self.epoch += self.shard == 0
                self._open()
                begins = " that begins a document" if self.config.align_documents else ""
                require(rows or opened <= self.shards,
                        f"no shard in {self.config.data} holds a row of {T + 1} tokens{begins}; lower "
                        "--sequence_length or add data")
            taken = self.starts[self.row:self.row + count * self.world - len(rows)]
            rows += [(self.tokens, start) for start in taken]
            self.row += len(taken)

        # those of this rank
        rows = rows[self.rank * count:(self.rank + 1) * count]
        batch = np.stack([tokens[start:start + T + 1] for tokens, start in rows])
        batch = torch.from_numpy(checked(batch, self.config))
        state = dict(epoch=self.epoch, shard=self.shard, row=self.row)
        return batch.pin_memory() if torch.cuda.is_available() else batch, state

    def next_batch(self, count: int | None = None) -> tuple[Tensor, dict]:
        """
        (this rank's rows (count, sequence_length + 1) int32 on the host, the loader's state after them, which is also
        its .state). count: self.rows if None. What is read ahead is a batch of the same size.
        """
        # what was read ahead may be of another size
        count = count or self.rows
        if self.ahead is not None and self.ahead[0] != count:  # the size has changed: back to where this batch begins
            self.ahead[1].result()
            self.load_state_dict(self.state)
            self.ahead = None
        batch = self.ahead[1] if self.ahead else self.thread.submit(self._read, count)
        rows, self.state = batch.result()
        self.ahead = count, self.thread.submit(self._read, count)
        return rows, self.state


# ---- Logs and checkpoints ---------------------------------------------------

CHECKPOINT = "knotgpt-3"  # the format's name
CHECKPOINT_FIELDS = dict(
    config=dict, step=int, tokens=int, train_seconds=float, loader=dict, curve=list, train_curve=list, rng=list,
    model=dict, trained=dict, average=dict, optimizers=list, data=dict, sources=dict,
)


def say(text: str, end: str = "\n", stream=None):
    """Print on the console, which may be closed, or the pipe behind it: a run goes on without."""
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # so that Python's own flush at the end succeeds
        except (OSError, ValueError):
            pass


def write_atomically(path: Path, write):
    """
    write(file) under a temporary name, then rename: whatever happens, `path` is sound. RunError where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save makes a RuntimeError of a full disk
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write {path}: {reason}; free some space or choose another folder") from None


def digest_of(value, digest=None) -> str:
    """
    The sha256 (hex) of a checkpoint's contents: dicts, lists, tuples, tensors (with dtype and shape), numbers and text,
    nested.
    """
    digest = digest or hashlib.sha256()
    # a tensor, a container, or a number or text
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict | list | tuple):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        items = [item for pair in value.items() for item in pair] if isinstance(value, dict) else value
        for item in items:
            digest_of(item, digest)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: dict):
    """
    Write the state of a run, a dict with CHECKPOINT_FIELDS, or what read_checkpoint returned, with its digest. RunError
    where the disk refuses.
    """
    state = dict(format=CHECKPOINT) | {name: state[name] for name in CHECKPOINT_FIELDS if name in state}
    write_atomically(path, lambda file: torch.save(state | dict(digest=digest_of(state)), file))


def load_tensors(path: str | Path):
    """A file of torch.save, tensors on the CPU. Nothing in it is executed, and nothing is unpacked beyond its size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    repeated = len({entry.filename for entry in entries}) < len(entries)
    if not stored or repeated or sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("packed or repeated entries")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(path: str | Path) -> dict:
    """
    Return a checkpoint's contents, tensors on the CPU, its digest compared. model is what validation saw; trained, {}
    where that is the same, what training goes on from. RunError, one line, if it is none of this trainer's, or damaged.
    """
    damaged = f"{path} is not a whole checkpoint of this trainer"
    try:
        saved = load_tensors(path)
        content = {name: value for name, value in saved.items() if name != "digest"} if isinstance(saved, dict) else {}
        digest = digest_of(content)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise RunError(f"{damaged} ({type(error).__name__}); give another one") from None
    # its kind and digest
    require(content.get("format") == CHECKPOINT,
            f"{path} is not a checkpoint of this trainer, or of an older one; give a .pt file from its log folder")
    require(saved.get("digest") == digest,
            f"{damaged}: its contents are not those that were written (their sha256 differs); give an earlier one")

    # the digest is no proof of who wrote it: each field must be what the trainer would have written
    def check(condition, fault: str):
        require(condition, f"{damaged}: {fault}; give another one")

    for name, kind in CHECKPOINT_FIELDS.items():
        check(type(saved.get(name)) is kind, f"{name} is no {kind.__name__}")
    sound = 0 <= saved["step"] <= RANGES["steps"][1] and 0 <= saved["tokens"] <= 2 ** 62
    check(sound and 0 <= saved["train_seconds"] < math.inf, "its step, tokens or time is impossible")
    try:
        json.dumps([saved[name] for name in ("curve", "train_curve", "data", "sources")])  # as the run's JSON will hold
    except (TypeError, ValueError, RecursionError):
        check(False, "its curves, data or sources hold what no JSON can")
    position = [saved["loader"].get(name) for name in ("epoch", "shard", "row")]
    check(all(type(number) is int and number >= 0 for number in position), f"its position in the data is {position}")
    tensors = [*saved["model"].values(), *saved["trained"].values(), *saved["rng"]]
    check(all(isinstance(tensor, Tensor) for tensor in tensors), "its model is no tensors")
    for point in saved["curve"]:
        sound = isinstance(point, dict) and type(point.get("step")) is int and type(point.get("val_loss")) is float
        check(sound, "its curve is no steps and losses")
    for point in saved["train_curve"]:
        check(isinstance(point, list) and [type(value) for value in point] == [int, float],
              "its curve of training losses is no steps and losses")
    for name, sha256 in saved["sources"].items():
        sound = isinstance(name, str) and isinstance(sha256, str) and re.fullmatch(r"\w+(\.\w+)*", name)
        check(sound, "its sources are no modules and their sha256")
    saved["config"] = dataclasses.asdict(config_from(saved["config"], str(path)))
    return saved


def find_checkpoint(name: str, log_dir: str | Path = "logs") -> Path:
    """
    The checkpoint that a person means by `name`: a file's path, a run's id or the beginning of one that no other run in
    log_dir has, or "last", the newest there. RunError if there is none, or several.
    """
    if os.path.exists(name) or "/" in name or name.endswith(".pt"):
        return Path(name)
    # the ends of runs, oldest first
    files = sorted(Path(log_dir).glob("*.pt"), key=lambda file: file.stat().st_mtime)
    ends = [file for file in files if not re.search(r"-step\d{6,}$", file.stem)]
    if name == "last":
        matches = ends[-1:]
    else:
        matches = [file for file in files if file.stem == name] or [file for file in ends if file.stem.startswith(name)]
    require(matches,
            f"there is no checkpoint of a run {name!r} in {log_dir} ({len(ends)} runs); give a .pt file, a run's id, "
            "its beginning, or last")
    several = ", ".join(file.stem for file in matches[-4:])
    require(len(matches) == 1, f"{name!r} is the beginning of {len(matches)} runs: {several}; give more of it")
    return matches[0]


def sources_of_run() -> dict[str, str]:
    """{module: source text} of this file and of the variants and kernels that have been loaded."""
    # this file first: a resumed run's later header begins with it
    modules = [sys.modules[__name__]]
    loaded = [name for name in sorted(sys.modules) if name.split(".")[0] in ("variants", "kernels")]
    if not any(name.startswith("variants.") for name in loaded):  # the entry's loader alone takes no part in the run
        loaded = [name for name in loaded if name != "variants"]
    for name in loaded:
        if getattr(sys.modules[name], "__file__", None):
            modules.append(sys.modules[name])
    return {module.__name__: inspect.getsource(module) for module in modules}


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed_sources(saved: dict) -> list[str]:
    """
    The modules whose source is not what a checkpoint's run had, by sha256; their files are read, nothing is imported.
    """
    root, changed = Path(__file__).resolve().parent, []
    for module, sha256 in saved.get("sources", {}).items():
        # a module is a file, a package its __init__.py
        stem = root.joinpath(*module.split("."))
        files = [stem.with_suffix(".py"), stem / "__init__.py"]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
        if sha256 not in [sha256_of_text(text) for text in texts]:
            changed.append(module)
    return changed


def command_output(*command: str) -> str:
    """What a program prints, "" where it is not there or fails to answer."""
    root = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, cwd=root)
        return result.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def environment(ranks: Ranks) -> dict:
    """What another needs to know to repeat the run."""
    # the device
    info = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word for the processor
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", text)), platform.processor() or platform.machine())
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{cpu}, {threads} threads"

    # the commit; a folder inside another repository has none of its own
    top = command_output("git", "rev-parse", "--show-toplevel")
    has_commit = bool(top) and Path(top).resolve() == Path(__file__).resolve().parent
    status = command_output("git", "status", "--porcelain", "--untracked-files=no") if has_commit else ""
    return dict(
        python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda,
        triton=next((d.version for d in metadata.distributions(name="triton")), "not installed"), device=device,
        platform=platform.platform(), world_size=ranks.world, threads=threads,
        git_commit=command_output("git", "rev-parse", "HEAD") if has_commit else "", git_dirty=bool(status),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def new_run_id(config: Config, ranks: Ranks) -> str:
    """
    A name such as 1130-0412-cpu-my_mlp-s1-7f3a: month and day, time, track, variants, seed, four random digits; the
    same on all ranks.
    """
    # rank 0 says, the others say 0
    stamp = ranks.agree((int(time.strftime("%m%d%H%M")) << 16 | secrets.randbits(16)) * (ranks.rank == 0))
    names = "+".join(variant.partition(":")[0] for variant in config.variant)[:40] or "baseline"
    moment = f"{stamp >> 16:08d}"
    return f"{moment[:4]}-{moment[4:]}-{config.track}-{names}-s{config.seed}-{stamp & 0xffff:04x}"


def json_text(value, indent: int | None = None) -> str:
    """
    JSON in which bytes that a locale without UTF-8 could not decode, as of a folder's name, are the characters they are
    in UTF-8.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class RunLog:
    """
    logs/<run id>.txt, line by line, and logs/<run id>.json from `facts`. Only rank 0 writes. On a terminal one line is
    rewritten in place. Nothing is on the disk before begin(). While a run goes on its log is locked, so that no second
    one writes there.
    """

    def __init__(self, config: Config, rank: int, resumed: bool):
        """
        RunError if the id is taken by another run, or this one is still under way, or the folder cannot be written.
        """
        # state
        files = [Path(config.log_dir) / f"{config.run_id}.{kind}" for kind in ("txt", "json", "pt", "losses.npz")]
        self.text, self.json, self.checkpoint, self.losses = files
        self.main = rank == 0
        self.terminal = sys.stdout.isatty()
        self.open_line = False              # whether the terminal's last line is a passing state
        self.shown = 0.0                    # when progress was last shown, time.perf_counter()
        self.facts = {}                     # what the JSON holds
        self.file = None                    # the log, open from begin() on
        if not self.main:
            return

        try:
            self.text.parent.mkdir(parents=True, exist_ok=True)
            # the files of an earlier process of this run, or none
            for file in () if resumed else files:
                require(not file.exists(),
                        f"{file} exists: a run's id is its own; go on with --resume {self.checkpoint}, or choose "
                        "another --run_id, or delete its files")
            if resumed and self.text.exists():
                self.file = open(self.text, "r+", encoding="utf-8", errors="replace", newline="\n")
                self._lock()
                self._mend()
            for left in self.text.parent.glob(f".{config.run_id}[.-]*"):  # of a run that was killed while it wrote
                left.unlink(missing_ok=True)
        except OSError as error:
            raise self._refusal(error, "choose another --log_dir") from None

    def _refusal(self, error: OSError, remedy: str) -> RunError:
        return RunError(f"cannot write {self.text}: {error.strerror}; {remedy}")

    def _lock(self):
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"the run {self.text.stem} is still under way: {self.text} is locked; wait for it or stop "
                           "it") from None

    def _mend(self):
        """
        Cut off what a killed process left unfinished at the end of the log: half a line, or a header without its end.
        """
        # half a line
        content = self.text.read_bytes()
        lines = content[:content.rfind(b"\n") + 1]
        # half a header
        header = lines.rfind(b"# ---- train_gpt\n")
        if header > 0 and lines.count(b"\n" + b"=" * 100 + b"\n", header) < 2:
            lines = lines[:header]
        self.file.truncate(len(lines))
        self.file.seek(0, os.SEEK_END)

    def begin(self, header: str):
        """Write the header. A new log appears under its name only when it has all of it."""
        if not self.main:
            return
        try:
            if self.file is not None:
                self.file.write(header + "\n")
            else:
                self._begin_new(header)
            self.file.reconfigure(line_buffering=True)
        except OSError as error:
            raise self._refusal(error, "choose another --log_dir") from None

    def _begin_new(self, header: str):
        # under another name first
        temporary = self.text.with_name(f".{self.text.name}.{os.getpid()}")
        self.file = open(temporary, "w", encoding="utf-8", errors="replace", newline="\n")
        self._lock()
        self.file.write(header + "\n")
        self.file.flush()
        try:
            os.link(temporary, self.text)  # unlike a rename it fails where the name has been taken meanwhile
        except FileExistsError:
            raise RunError(f"{self.text} exists: another run has just begun under this id; choose another "
                           "--run_id") from None
        except OSError:  # a file system without links
            os.rename(temporary, self.text)
        finally:
            temporary.unlink(missing_ok=True)

    def write(self, text: str, console: bool = False):
        """Add lines to the log and, if asked, to the console."""
        if not self.main:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            raise self._refusal(error, "free some space; the finished steps are kept") from None
        if console:
            self.show(text)

    def show(self, text: str):
        """Lines for the console alone."""
        if self.main:
            clear = "\r\033[K" if self.open_line else ""
            say(clear + text)
            self.open_line = False

    def kept(self, step: int) -> Path:
        return self.checkpoint.with_stem(f"{self.checkpoint.stem}-step{step:06d}")

    def due(self) -> bool:
        """Whether it is time to show progress: every second on a terminal, every ten seconds elsewhere."""
        return time.perf_counter() - self.shown >= (1 if self.terminal else 10)

    def progress(self, text: str):
        """Show a passing state."""
        self.shown = time.perf_counter()
        self.open_line = self.terminal
        if self.main and self.terminal:
            say(f"\r\033[K{text}", end="")
        elif self.main:
            say(text)

    def save_losses(self, losses: np.ndarray):
        """Write RUN_ID.losses.npz: losses (rows, T) float16, nats, of the first validation rows."""
        if not self.main:
            return
        try:
            write_atomically(self.losses, lambda file: np.savez_compressed(file, losses=losses))
        except RunError as error:  # the run has its result without them
            self.write(f"warning: {error}", console=True)

    def save_facts(self, **facts):
        self.facts.update(facts)
        if self.main and self.file:
            write_atomically(self.json, lambda file: file.write(json_text(self.facts, indent=1).encode()))


# ---- Training ---------------------------------------------------------------


def cut_rows(rows: Tensor, T: int) -> Tensor:
    """Rows (n, m T + 1) -> (n m, T + 1): the last token of each, which is only a target, begins the next."""
    return rows if rows.shape[1] == T + 1 else rows.unfold(1, T + 1, T).flatten(0, 1)


def micro_batches(rows: Tensor, config: Config) -> tuple[Tensor, ...]:
    """Rows (n, T + 1) in equal shares of at most micro_batch_tokens, or of one row."""
    # the largest number of rows that fits and divides
    fit = max(1, config.micro_batch_tokens // (rows.shape[1] - 1))
    size = max(n for n in range(1, min(fit, len(rows)) + 1) if len(rows) % n == 0)
    return rows.split(size)


class Trainer:
    """One run, from its configuration to its last checkpoint."""

    def __init__(self, config: Config, replaced: dict | None = None):
        """
        replaced: variant -> names of this module that it replaced, for the record. RunError for what cannot be run.
        """
        # state
        saved = read_checkpoint(config.resume) if config.resume else None
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.ranks = Ranks.start(config)
        self.step = 0                       # optimizer steps done
        self.tokens = 0                     # training tokens they took, over all ranks
        self.train_seconds = 0.0            # on the clock so far
        self.clock = None                   # when it was last started, time.perf_counter(); None while it stands
        self.stop_signal = 0                # number of the signal that asked to stop
        self.loss = None                    # this rank's mean loss of the last step, a tensor perhaps still computed
        self.train_loss = None              # the last training loss that is known, a number
        self.loss_on_its_way = None         # (step, copy on the host, event or None) of a training loss
        self.loss_taken = 0.0               # when that was taken, time.perf_counter()
        self.step_seconds = []              # of every step of this process

        # data, cost and compiler, before anything is written
        warning = self._open_data(saved)
        needed, available = memory_needed(config, self.ranks.dtype), memory_of_machine(self.ranks)
        require(config.dry_run or needed <= available,
                f"this run needs at least {needed:,} bytes of memory and there are {available:,}; choose a smaller "
                "model or --micro_batch_tokens")
        self.costs = measure_model(config) | dict(memory_needed=needed, memory_of_machine=available)
        self._settle_compilation()
        config.run_id = config.run_id or new_run_id(config, self.ranks)
        if config.dry_run:
            return

        # log, model and optimizers
        self.log = RunLog(config, self.ranks.rank, resumed=bool(saved))
        self.model = build_model(config, self.ranks)
        self._write_header(replaced or {})
        if warning:
            self.log.write(warning, console=True)
        if config.init_from and not saved:
            self._load_matching(config.init_from)
        self.optimizers = build_optimizers(self.model, config, self.ranks)
        self.average = build_average(self.model, config, self.ranks)
        if saved:
            self._resume(saved)

    def _open_data(self, saved: dict | None) -> str | None:
        """
        Find and check training and validation data, a resumed run's being those that it began with; returns a warning
        or None.
        """
        config = self.config
        # the shards
        adopt_vocabulary(config)
        if self.ranks.rank == 0:
            check_shards(config)
        warning = check_document_token(config)
        val_sha256 = {file.name: sha256_of_file(file) for file in find_shards(config, "val")}
        self.data = dict(val_sha256=val_sha256, train=identity_of_data(config))
        if saved and saved["data"] != self.data:
            kind = "validation" if saved["data"].get("val_sha256") != val_sha256 else "training"
            raise RunError(f"{config.data} does not hold the {kind} shards of {config.resume}; give --data the folder "
                           "that the run began with")
        self.loader = TokenLoader(config, self.ranks.rank, self.ranks.world)

        # validation: tokens, their UTF-8 bytes, and the loss that the track asks for on these data
        self.val_batches = validation_batches(config)
        self.val_tokens = sum(batch[:, 1:].size for batch in self.val_batches)
        self.bytes_per_token = None         # None where there are no merges beside the shards
        sizes = token_bytes(config)
        if sizes is not None:
            self.bytes_per_token = sum(int(sizes[batch[:, 1:]].sum()) for batch in self.val_batches) / self.val_tokens
        is_meant = any(name.startswith(config.target_data) for name in (*val_sha256, *val_sha256.values()))
        self.target = config.target if is_meant else 0.0  # 0: none is known for these data
        return warning

    def _settle_compilation(self):
        """Without a working compiler compile = auto becomes off, with a line; what was asked for by name is a fault."""
        if compile_mode(self.config, self.ranks) == "off":
            return
        fault = compiler_fault(self.ranks.device)
        if self.ranks.agree(int(fault is not None)):
            fault = fault or "on another rank"
            require(self.config.compile == "auto",
                    f"torch.compile does not work here ({fault}); mend it or use --compile off")
            self.config.compile = "off"
            if self.ranks.rank == 0:
                say(f"torch.compile does not work here ({fault}): the run goes on without", stream=sys.stderr)

    def _write_header(self, replaced: dict):
        config, log, ranks = self.config, self.log, self.ranks
        # for machines: the record, and the JSON beside it
        sources = sources_of_run()
        self.sources = {name: sha256_of_text(text) for name, text in sources.items()}
        facts = log.facts = dict(
            run_id=config.run_id, status="running", config=dataclasses.asdict(config), **environment(ranks),
            seed=config.seed, replaced=replaced, **self.costs, peak_flops=measured_peak(ranks),
            dtype=str(ranks.dtype).removeprefix("torch."), compile=compile_mode(config, ranks),
            train_tokens_available=self.loader.total, train_data=self.data["train"], val_tokens=self.val_tokens,
            val_bytes_per_token=self.bytes_per_token, val_sha256=self.data["val_sha256"], target=self.target,
            sources=self.sources,
        )
        log.begin("\n".join([
            *(f"# ---- {name}\n{text}" for name, text in sources.items()), "=" * 100,
            f"Running Python {facts['python']}, PyTorch {facts['torch']} compiled for CUDA {facts['cuda']}, Triton "
            f"{facts['triton']}",
            "facts: "
            f"{json_text(facts)}", command_output("nvidia-smi") if ranks.device.type == "cuda" else "no GPU", "=" * 100,
        ]))
        # the curves follow; for people a line
        facts |= dict(curve=[], train_curve=[])  # train_curve: [[step, loss], ...], of rank 0's rows
        log.show(f"run {config.run_id}: track {' + '.join((config.track, *config.variant))}, "
                 f"{facts['parameters'] / 1e6:.2f}M parameters, {self._length()} of {config.batch_tokens} tokens on "
                 f"{ranks.world} x {ranks.device.type} in {facts['dtype']}, compile {facts['compile']}; log {log.text}")

    def _length(self) -> str:
        """How long the run is, in words."""
        return f"{self.config.time_budget:.0f} s" if self.config.time_budget else f"{self.config.steps} steps"

    def _load_matching(self, path: str):
        """Start from another run's tensors where name and shape agree; say which did and which did not."""
        # equal name and shape
        saved, current = read_checkpoint(path)["model"], self.model.state_dict()
        matching = {name: saved[name] for name in current if name in saved and saved[name].shape == current[name].shape}
        require(matching,
                f"no tensor of {path} has the name and shape of one in this model; it is of another architecture")
        self.model.load_state_dict(matching, strict=False)
        groups = dict(loaded=matching, new=current.keys() - matching, unused=saved.keys() - matching)
        for title, names in groups.items():
            colon = ": " if names else ""
            self.log.write(f"init_from {path}: {len(names)} tensors "
                           f"{title}{colon}{', '.join(sorted(names))}", console=True)

    def _resume(self, saved: dict):
        """Take up a checkpoint, and say which sources have changed since."""
        self.load_state_dict(saved)
        self.loader.load_state_dict(saved["loader"])
        changed = changed_sources(saved) if self.ranks.rank == 0 else []
        if changed:
            self.log.write(f"warning: {', '.join(changed)} changed since {self.config.resume} was "
                           "written", console=True)
        self.log.write(f"resumed from {self.config.resume} at step {self.step}", console=True)

    def _averaged(self):
        """A context in which the model has the weights that validation and texts see."""
        return nullcontext() if self.average is None else self.average.applied()

    @contextmanager
    def _validated(self):
        """A context in which the model is as it is validated; a source makes its tensors once for all of it."""
        source = self.model.source
        with self._averaged():
            if source is not None:
                with torch.no_grad():
                    source.hold()
            try:
                yield
            finally:
                if source is not None:
                    source.release()

    def _model_state(self) -> dict:
        """Copies of the model's tensors, not views of a bucket; one of several names is copied once."""
        copies, state = {}, {}
        for name, tensor in self.model.state_dict().items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
            if key not in copies:
                copies[key] = tensor.clone()
            state[name] = copies[key]
        return state

    def state_dict(self) -> dict:
        """A copy of all that a step changes. Collective."""
        # generators and tensors
        rng = [torch.get_rng_state()]
        if self.ranks.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state())
        # what is validated; what training goes on from stands beside it only where that is another
        with self._averaged():
            model = self._model_state()
        return dict(
            step=self.step, tokens=self.tokens, train_seconds=self.train_seconds, loader=self.loader.state, rng=rng,
            model=model, trained={} if self.average is None else self._model_state(),
            average={} if self.average is None else self.average.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            curve=self.log.facts["curve"], train_curve=self.log.facts["train_curve"],
        )

    def load_state_dict(self, saved: dict):
        """Take up a state_dict(). RunError where it is of another model."""
        try:
            self.model.load_state_dict(saved["trained"] or saved["model"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(saved["rng"][0])
            if self.ranks.device.type == "cuda" and len(saved["rng"]) > 1:
                torch.cuda.set_rng_state(saved["rng"][1])
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(f"{self.config.resume} holds another model than this configuration builds, or is of an "
                           f"older trainer: {reason}") from None
        self.step, self.tokens, self.train_seconds = saved["step"], saved["tokens"], saved["train_seconds"]
        self.log.facts |= dict(curve=saved["curve"], train_curve=saved["train_curve"])

    def _batch_at(self, progress: float) -> tuple[int, int]:
        """
        (this rank's rows of sequence_length, the length they are cut to) of a step. RunError where they do not divide.
        """
        length = self.config.sequence_length
        tokens, T = schedule_batch(self.config, progress)
        require(T > 0 and length % T == 0 and tokens % length == 0,
                f"schedule_batch gives {tokens} tokens in rows of {T} at {progress:.3f} of the run; wanted a multiple "
                f"of --sequence_length {length}, in rows that divide it")
        return self.loader.share(tokens), T

    def train_step(self, rows: Tensor, progress: float) -> Tensor:
        """
        One optimizer step on this rank's rows (n, sequence_length + 1), at progress in [0, 1); returns this rank's mean
        loss, the auxiliary one included, without waiting for the device.
        """
        config, ranks = self.config, self.ranks
        # what the schedules say
        lr_factor = schedule_learning_rate(config, progress)
        self.model.set_windows(progress)
        batches = micro_batches(cut_rows(rows, self._batch_at(progress)[1]), config)

        # forward and backward; of several ranks the last one's gradients are reduced, and updates made, meanwhile
        loss, source = 0.0, self.model.source
        if source is not None:
            source.hold()
        for index, batch in enumerate(batches):
            if index == len(batches) - 1 and ranks.world > 1:
                Overlap(self.optimizers, lr_factor, progress, update=treat_gradients is None)
            batch_loss = self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            (batch_loss / (len(batches) * ranks.world)).backward()
            loss = loss + batch_loss.detach() / len(batches)
        if source is not None:
            source.release()

        # what is left of the update
        if treat_gradients is not None:
            for bucket in (bucket for optimizer in self.optimizers for bucket in optimizer.buckets):
                bucket.reduced_gradient()
            with torch.no_grad():
                treat_gradients(self.optimizers, config, progress, ranks)
        for optimizer in self.optimizers:
            optimizer.step(lr_factor, progress)
        return loss

    @torch.no_grad()
    def validate(self, batches: list[np.ndarray]) -> float:
        """Mean loss in nats a token over all rows of the batches (rows, T + 1), whatever their sizes."""
        self.model.eval()
        self.model.set_windows(1.0)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        with self._validated():
            for batch in batches[self.ranks.rank::self.ranks.world]:
                rows = torch.from_numpy(batch).to(self.ranks.device)
                total += self.model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).double() * len(batch)
        if self.ranks.world > 1:
            dist.all_reduce(total)
        self.model.train()
        return total.item() / sum(map(len, batches))

    @torch.no_grad()
    def token_losses(self, rows: Tensor) -> np.ndarray:
        """
        The loss of every token of rows (n, T + 1) in nats, (n, T) float16, from the model's logits: what a model says
        of its own loss does not count here.
        """
        # as many rows at a time as give a GiB of logits
        most = max(1, 2 ** 28 // (self.config.padded_vocabulary * (rows.shape[1] - 1)))
        losses = []
        for some in rows.to(self.ranks.device).split(most):
            logits = self.model(some[:, :-1].contiguous())
            losses.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:].long(), reduction="none").half().cpu())
        return torch.cat(losses).numpy()

    def _keep_losses(self):
        """Write the losses of the first keep_losses validation tokens. A run is worth more than these. Collective."""
        # this rank's rows, as the validation deals them out
        config, world = self.config, self.ranks.world
        rows = np.concatenate(self.val_batches)[:-(-config.keep_losses // config.sequence_length)]
        fault = None
        losses = None
        self.model.eval()
        try:
            with self._validated():
                losses = self.token_losses(torch.from_numpy(rows[self.ranks.rank::world]))
        except Exception as error:  # no memory for the logits, a variant without logits, a compiler's fault
            fault = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"
        self.model.train()
        if self.ranks.agree(int(fault is not None)):
            self.log.write(f"warning: the losses of single tokens are not kept: {fault or 'a fault on another rank'}",
                           console=True)
            return

        # all ranks' rows, in order
        shares = [losses]
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, losses)
        losses = np.empty((len(rows), config.sequence_length), np.float16)
        for rank, share in enumerate(shares):
            losses[rank::world] = share
        self.log.save_losses(losses)

    def warm_up(self) -> float:
        """
        Compile and run every shape and window stage on dummy rows, then put everything back exactly. Returns seconds.
        """
        start, kept = self._now(), self.state_dict()
        # every size of a step, under every window
        stages = len(self.config.window_long)
        times = {}  # (stage of the model, rows, their length) -> when in the run that is first so
        for progress in sorted({stage / stages for stage in range(stages)} | {i / 512 for i in range(512)}):
            times.setdefault((self.model.stage(progress), *self._batch_at(progress)), progress)

        # run each once
        for (_, count, _), progress in times.items():
            shape = (count, self.config.sequence_length + 1)
            rows = torch.randint(self.config.vocab_size, shape, dtype=torch.int32).to(self.ranks.device)
            self.train_step(rows, progress)

        # and every size of a validation batch
        shapes = {len(batch): batch for batch in self.val_batches}
        self.validate([batch for batch in shapes.values() for _ in range(self.ranks.world)])
        self.load_state_dict(kept)
        return self._now() - start

    def run(self) -> int:
        """Train to the end or until a signal. Returns the exit code."""
        config, log, ranks = self.config, self.log, self.ranks
        # off the clock
        compile_model(self.model, compile_mode(config, ranks))
        log.progress("compiling and warming up")
        log.save_facts(warmup_seconds=self.warm_up())
        log.write(f"warm-up, compilation included, not timed: {log.facts['warmup_seconds']:.1f} s", console=True)

        # signals stop the run between two steps
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background jobs leave it
                signal.signal(number, self._on_signal)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        saved_at = time.perf_counter()
        self.clock = self._now()
        self._measure_progress()
        while self.progress < 1:
            # before the validation, which a run that goes on from here repeats
            if config.keep_every and self.step % config.keep_every == 0 and not log.kept(self.step).exists():
                with self._clock_stopped():
                    self._save(log.kept(self.step))
            if config.val_every and self.step % config.val_every == 0:
                with self._clock_stopped():
                    self._validate_and_log()

            # one step
            begun = time.perf_counter()
            rows, _ = self.loader.next_batch(self._batch_at(self.progress)[0])
            self.loss = self.train_step(rows.to(ranks.device, non_blocking=True), self.progress)
            self.step += 1
            self.tokens += len(rows) * config.sequence_length * ranks.world
            self._measure_progress()
            if self.average is not None:
                self.average.update(self.progress)
            log.write(f"step:{self.step}/{self.steps} {self._times()}")
            self._note_train_loss()
            if log.due():
                self._show_progress()
            self.step_seconds.append(time.perf_counter() - begun)

            # what all ranks do now: 0 go on, 1 save and go on, 2 save and stop
            due = ranks.rank == 0 and time.perf_counter() - saved_at > config.checkpoint_seconds
            action = ranks.agree(2 if self.stop_signal else int(due))
            if action:
                with self._clock_stopped():
                    self._save(log.checkpoint, must=action == 2)
                if action == 2:
                    return self._stopped()
                saved_at = time.perf_counter()

        with self._clock_stopped():
            self._validate_and_log()
            if config.keep_losses:
                self._keep_losses()
            self._save(log.checkpoint, must=True)
            return self._finished()

    def _on_signal(self, number, _frame):
        self.stop_signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def _now(self) -> float:
        self.ranks.synchronize()
        return time.perf_counter()

    @contextmanager
    def _clock_stopped(self):
        self.train_seconds, self.clock = self.train_seconds + self._now() - self.clock, None
        yield
        self.clock = self._now()

    def _elapsed(self) -> float:
        return self.train_seconds + (time.perf_counter() - self.clock if self.clock else 0.0)

    def _measure_progress(self):
        """
        progress: what is done of the run, in [0, 1], of its tokens or of its time budget as rank 0 measures it; steps:
        how many it will take.
        """
        config = self.config
        if config.time_budget:
            self.ranks.synchronize()
            microseconds = self.ranks.agree(int(1e6 * self._elapsed()) * (self.ranks.rank == 0))
            self.progress = min(1.0, microseconds / 1e6 / config.time_budget)
        else:
            self.progress = min(1.0, self.tokens / (config.steps * config.batch_tokens))
        self.steps = config.steps
        if config.time_budget or self.tokens != self.step * config.batch_tokens:
            self.steps = math.ceil(self.step / max(self.progress, 1e-9))

    def _times(self) -> str:
        # modded-nanogpt's form, which its readers' tools know
        milliseconds = 1000 * self._elapsed()
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(self.step, 1):.2f}ms"

    def _mfu(self, tokens_per_second: float) -> float:
        return tokens_per_second * self.log.facts["flops_per_token"] / self.log.facts["peak_flops"] / self.ranks.world

    def _note_train_loss(self):
        """
        Put a training loss into log and JSON, at most ten a second and 4,000 in all, and never wait for a GPU: the loss
        is copied on the device's queue and read when it has come. RunError for one that is no finite number.
        """
        # take a loss
        now = time.perf_counter()
        if self.loss_on_its_way is None and now - self.loss_taken >= 0.1:
            copy, event = self.loss, None
            if self.loss.is_cuda:  # into pinned memory: a copy into other memory waits for the device
                copy = torch.empty_like(self.loss, device="cpu", pin_memory=True).copy_(self.loss, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.loss_taken = now
            self.loss_on_its_way = self.step, copy, event

        # has one come?
        if self.loss_on_its_way is None:
            return
        step, copy, event = self.loss_on_its_way
        if event is not None and not event.query():
            return

        # note it
        self.train_loss = copy.item()
        self.loss_on_its_way = None
        if not math.isfinite(self.train_loss) and self.log.main:  # one rank's is everybody's a step later
            raise RunError(f"the training loss is {self.train_loss} at step {step}; lower the learning rates or look "
                           f"at the variant's arithmetic; finished steps are in {self.log.text}")
        self.log.write(f"train_loss:{self.train_loss:.4f} of step {step}")
        curve = self.log.facts["train_curve"]
        curve.append([step, self.train_loss])
        if len(curve) >= 4000:
            curve[:] = curve[::2]

    def _show_progress(self):
        # over all steps so far, so that the time left swings little
        average = self._elapsed() / self.step
        rate = self.tokens / self._elapsed()
        left = int((self.steps - self.step) * average)
        loss = "-" if self.train_loss is None else f"{self.train_loss:.4f}"
        self.log.progress(f"step {self.step}/{self.steps}  loss {loss}  {rate:,.0f} tokens/s  {1000 * average:.1f} "
                          f"ms/step  MFU {100 * self._mfu(rate):.1f} %  {left // 60}:{left % 60:02d} left")

    def _validate_and_log(self):
        # the loss
        loss, log = self.validate(self.val_batches), self.log
        # nats a token to bits a byte
        bits = loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
        bits_text = "val_bits_per_byte: unknown, no .tiktoken file beside the shards"
        if bits:
            bits_text = f"val_bits_per_byte:{bits:.4f}"
        log.write(f"step:{self.step}/{self.steps} val_loss:{loss:.4f} {self._times()}", console=True)
        log.write(bits_text, console=self.progress == 1)
        require(math.isfinite(loss),
                f"the validation loss is {loss} at step {self.step}; lower the learning rates or look at the variant's "
                "arithmetic")

        # a point of the curve
        tokens = torch.from_numpy(self.val_batches[0][:, :-1]).to(self.ranks.device)
        self.model.eval()
        with torch.no_grad(), self._averaged():
            facts = collect_facts(self.model, tokens)
        self.model.train()
        try:
            json.dumps(facts)
        except (TypeError, ValueError, RecursionError):
            raise RunError("collect_facts gives what no JSON can hold; give numbers, texts, lists and dicts") from None
        point = facts | dict(
            step=self.step, tokens=self.tokens, train_ms=1000 * self._elapsed(), val_loss=loss, val_bits_per_byte=bits,
            train_loss=self.loss.item() if self.loss is not None else None,
        )
        # a finished run that is resumed validates again
        earlier = [p for p in log.facts["curve"] if p["step"] < self.step]
        log.save_facts(curve=earlier + [point])

    def _save(self, path: Path, must: bool = False):
        """Write a checkpoint, if the run wants any. Collective."""
        if not self.config.save:
            return
        # of all ranks; rank 0 writes
        state = dict(config=dataclasses.asdict(self.config), data=self.data, sources=self.sources, **self.state_dict())
        try:
            if self.log.main:
                write_checkpoint(path, state)
        except RunError as error:  # a run is worth more than one of its checkpoints, and the one before is still there
            if must:
                raise
            self.log.write(f"warning: {error}", console=True)

    def _stopped(self) -> int:
        name = signal.Signals(self.stop_signal or signal.SIGTERM).name
        self.log.save_facts(status=f"stopped by {name}", step=self.step)
        how = f"; continue with --resume {self.log.checkpoint}" if self.config.save else ""
        self.log.write(f"stopped by {name} after step {self.step}{how}", console=True)
        return 128 + signal.Signals[name]

    def _finished(self) -> int:
        """Write the run's figures, for machines and for people."""
        config, log = self.config, self.log
        # figures
        last = log.facts["curve"][-1]
        rate = self.tokens / self.train_seconds
        if self.ranks.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        else:
            import resource  # not on every system; the process' own peak, in KiB on Linux, in bytes on macOS

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            allocated = reserved = peak >> (20 if sys.platform == "darwin" else 10)
        facts = dict(
            status="finished", step=self.step, val_loss=last["val_loss"], val_bits_per_byte=last["val_bits_per_byte"],
            train_seconds=self.train_seconds, ms_per_step=1000 * self.train_seconds / self.step, tokens_per_second=rate,
            mfu=self._mfu(rate), peak_memory_mib=allocated, peak_memory_reserved_mib=reserved,
        )

        # for machines
        log.save_facts(**facts)
        log.write(f"ms_per_step:{facts['ms_per_step']:.2f} tokens_per_second:{rate:.0f} mfu:{facts['mfu']:.4f} "
                  f"of {log.facts['peak_flops'] / 1e12:.2f} TFLOP/s a device, the measured rate of a large product")
        reached = "reached" if facts["val_loss"] <= self.target else "not reached"
        if self.target:
            log.write(f"target {self.target}: {reached} with val_loss {facts['val_loss']:.4f}")
        log.write(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")

        # for people
        bits = f" = {facts['val_bits_per_byte']:.4f} bits a byte" if facts["val_bits_per_byte"] else ""
        minutes, seconds = divmod(round(self.train_seconds), 60)
        target = "none is known for these data; compare.py measures against the baseline"
        if self.target:
            target = f"{self.target} nats a token: {reached}"
        files = f"{log.text} (the record), .json"
        following = f"./run.sh compare baseline {'+'.join(config.variant) or 'VARIANT'}"
        if config.save:
            files += ", .pt (the checkpoint)"
            following = f"./run.sh generate --checkpoint {config.run_id} --prompt TEXT, or {following}"
        log.show(f"loss    {facts['val_loss']:.4f} nats a token{bits}, over {self.val_tokens:,} validation tokens")
        log.show(f"time    {minutes}:{seconds:02d} of training, {facts['ms_per_step']:.1f} ms a step, {rate:,.0f} "
                 f"tokens/s, {allocated:,} MiB, MFU {100 * facts['mfu']:.0f} %{self._swinging()}")
        log.show(f"target  {target}")
        log.show(f"files   {files}")
        log.show(f"next    {following}")
        return 0

    def _swinging(self) -> str:
        """A remark where a tenth of the steps took more than twice the median: other work has shared the machine."""
        if self.ranks.device.type == "cuda" or len(self.step_seconds) < 20:
            return ""
        # the slowest tenth beside the median
        ordered = sorted(self.step_seconds)
        median, late = ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10]
        if late <= 2 * median:
            return ""
        return (f"; steps swing ({1000 * median:.0f} ms the median, {1000 * late:.0f} a tenth): other work shares this "
                "machine, fewer --threads may help")

    def describe(self):
        """What --dry_run prints."""
        config, costs = self.config, self.costs
        steps = config.steps or max(1, config.tokens // config.batch_tokens)
        # of the whole run
        flops = costs["flops_per_token"] * config.batch_tokens * steps
        names = " + ".join((config.track, *config.variant))
        mode = compile_mode(config, self.ranks)
        say(f"run     track {names}, seed {config.seed}, on {self.ranks.world} x {self.ranks.device.type}, compile "
            f"{mode}")
        say(f"model   {costs['parameters']:,} parameters, {costs['parameters_without_embeddings']:,} of them in "
            f"blocks; {costs['flops_per_token']:,.0f} FLOPs a token")
        length = f"{config.time_budget:.0f} s" if config.time_budget else f"{steps:,} steps"
        say(f"plan    {length} of {config.batch_tokens:,} tokens, {flops:.3g} FLOPs; validation on {self.val_tokens:,} "
            f"tokens every {config.val_every} steps")
        say(f"memory  at least {costs['memory_needed'] >> 20:,} MiB of {costs['memory_of_machine'] >> 20:,}")
        say(f"time    {self._expected_time(flops)}")

    def _expected_time(self, flops: float) -> str:
        """In words, from the last finished run of this track on a machine such as this one, by FLOPs."""
        config = self.config
        if config.time_budget:
            return f"{config.time_budget:.0f} s of training, as asked"
        # the newest run that was alike
        here = ["finished", config.track, environment(self.ranks)["device"], self.ranks.world]
        for file in sorted(Path(config.log_dir).glob("*.json"), key=lambda file: -file.stat().st_mtime):
            try:
                run = read_json(file, "")
                spent = run["flops_per_token"] * run["config"]["batch_tokens"] * run["step"]
                if [run["status"], run["config"]["track"], run["device"], run["world_size"]] == here and spent > 0:
                    seconds = run["train_seconds"] * flops / spent
                    return (f"about {seconds:.0f} s of training, as {run['run_id']} computed; validation and start "
                            "come besides")
            except (RunError, KeyError, TypeError):
                continue  # another program's file, or an older trainer's
        return f"not known: no finished run of track {config.track} on this machine in {config.log_dir}"


# ---- Entry ------------------------------------------------------------------

# What ends a run with a checkpoint.
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


def main(argv: list[str] | None = None, loader=None) -> int:
    """
    Run a command line; loader: the package variants, None for the baseline alone. Returns the exit code: 0 finished, 1
    a fault (one line on stderr), 128 + n stopped by signal n.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    trainer = None
    try:
        # the run
        config = parse_config(argv)
        require(loader is not None or not config.variant,
                "--variant needs the loader of variants; start train_gpt.py as a script")
        with loader.applied(config.variant, config) if config.variant else nullcontext({}) as replaced:
            trainer = Trainer(config, replaced)
            if config.dry_run:
                trainer.describe()
                return 0
            code = trainer.run()
            trainer.ranks.synchronize()  # no rank leaves while another still needs it
            return code
    except RunError as error:
        report(trainer, str(error))
        return 1
    except KeyboardInterrupt:
        say("train_gpt.py: interrupted before the first step", stream=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        fault = loader.blame(error) if loader else None
        if fault is None and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            text = " ".join(str(error).split())[:120]
            fault = f"torch.compile failed ({type(error).__name__}: {text}); use --compile off; details are in the log"
        if fault is None:
            raise
        report(trainer, fault, traceback.format_exc())
        return 1
    finally:
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if dist.is_initialized():
            dist.destroy_process_group()


def report(trainer: Trainer | None, fault: str, details: str = ""):
    """Say a fault in one line and note it, with its details, in the run's log, if it has one."""
    log = getattr(trainer, "log", None)
    if log and log.file:
        try:
            if details:
                log.write(details)
            log.write(f"error: {fault}")
            log.save_facts(status=f"failed: {fault}")
        except RunError:  # the disk is full: what is there stays
            pass
    if not re.fullmatch(r"[1-9]\d*", os.environ.get("RANK", "0")):  # the other ranks have the same to say
        say(f"train_gpt.py: error: {fault}", stream=sys.stderr)


def leave(code: int, alone: bool):
    """
    End the process. One rank of several leaves without Python's own end: a thread of gloo that frees a tensor
    meanwhile, which a busy machine lets happen, would abort it ("terminate called without an active exception").
    """
    if alone:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        say("", end="", stream=stream)  # which flushes it
    os._exit(code)


if __name__ == "__main__":
    import train_gpt  # the one trainer module, by name
    import variants

    train_gpt.leave(train_gpt.main(loader=variants), alone=os.environ.get("WORLD_SIZE", "1") == "1")
