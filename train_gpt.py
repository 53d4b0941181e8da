"""
KnotGPT's trainer, whole, in one file: a modded-nanoGPT baseline whose parts can be replaced one by one.

    python train_gpt.py                                                        the cpu track: two cores, about two minutes
    torchrun --standalone --nproc_per_node=8 train_gpt.py --track short        eight GPUs
    python train_gpt.py --track small --data DIR --variant "swiglu_mlp:layers=0-3"

- A replaceable part is a module-level class or function with a fixed signature, looked up here when the model is built: Linear, Norm, attend,
  CausalSelfAttention, MLP, Residual, Block, LanguageModelHead, GPT, build_optimizers. A variant assigns its own to that name.
- Importing this file does nothing. Run as a script, it imports itself by name, so that there is one trainer module for everybody.
- One rule for every attention on every backend: query i sees the keys max(doc_start_i, i - window + 1) <= j <= i.
- The loss curve does not depend on the number of ranks beyond rounding: the global batch is fixed, ranks take rows of it.
- The log is the record: the source, the versions, the configuration and every step.

Sources, by name; README.md says what is from where: modded-nanogpt, Muon, Polar Express, NorMuon, Cautious Weight Decay, RoPE, QK-norm, Primer,
value residual learning, U-net skips, Gemma 2 (logit cap), Liger-Kernel (gradient of the loss in its forward pass), FlexAttention, ZeRO.
"""

import argparse, base64, dataclasses, functools, hashlib, inspect, json, math, os, platform, re, secrets, shutil, signal, subprocess, sys, time, traceback, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args, get_origin

# On a machine with other work, threads that wait by spinning take the cores from those that compute: steps of 2 to 17 times their length were measured.
# Read by the OpenMP libraries when torch loads them: GNU's counts turns, LLVM's and Intel's milliseconds.
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

class RunError(Exception):
    """A fault that the user can mend. Its message is one line: what was wrong, what was got, what to do."""


def require(condition, message: str):
    """Raise RunError with this message unless the condition holds."""
    if not condition:
        raise RunError(message)


def read_json(path: Path | str, remedy: str) -> dict:
    """
    Return the JSON object that a file holds. RunError, one line that names the file and ends with `remedy`, for a file that cannot be read, is no
    UTF-8, no JSON or no object, nests too deeply, or holds a number that is none (NaN, Infinity) or has thousands of digits.
    """
    def refuse(word):
        raise ValueError(f"it holds {word}")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RunError(f"{path} is damaged, not a JSON object ({type(error).__name__}: {str(error)[:80]}); {remedy}") from None
    require(isinstance(content, dict), f"{path} holds a JSON {type(content).__name__}, not an object; {remedy}")
    return content

# What a variant may assign: the parts of the model and of its optimizer, and methods of these. All else in this file is the referee: the loader of
# data, the clock, validation, the log and the checkpoints, which every arm of a comparison must share.
SEAMS = ("Linear", "Norm", "RMSNormalize", "ReLUSquared", "SoftcappedCrossEntropy", "rotate", "attend", "CausalSelfAttention", "MLP", "Residual", "Block",
         "LanguageModelHead", "GPT", "build_optimizers", "Muon", "Adam", "orthogonalize", "symmetric_product")

# ---- Configuration and tracks -------------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """All settings of a run. Every field is a command-line option, the comment beside it its help text, the comments between them its groups."""
    # what to train
    track: str = "cpu"                  # which of TRACKS supplies the defaults
    variant: tuple[str, ...] = ()       # replacement parts: "name" or "name:key=value,key=value"; several as several arguments or joined by +
    # data
    data: str = "data/python_bytes"     # folder of shards: *train*.bin and *val*.bin
    vocab_size: int = 0                 # number of token ids (0: from the folder's meta.json, else GPT-2's 50257)
    document_token: int = -1            # token id that begins every document (-1: end_of_text of meta.json, else the last of the data's vocabulary)
    sequence_length: int = 256          # tokens of one row
    batch_tokens: int = 2048            # tokens of one optimizer step, over all ranks
    micro_batch_tokens: int = 8192      # at most so many tokens a forward pass
    tokens: int = 1_500_000             # training tokens; the number of steps follows
    steps: int = 0                      # optimizer steps (0: from tokens)
    time_budget: float = 0.0            # seconds of training instead of a number of steps: the schedule follows the clock (0: off)
    align_documents: bool = False       # every row begins at the start of a document
    val_tokens: int = 131_072           # validation tokens, from the start of the validation shards
    val_every: int = -1                 # steps between validations, from step 0 on, and one after the last (0: that one only; -1: a twelfth of the run)
    target: float = 0.0                 # validation loss that the track asks for, in nats a token (0: none)
    target_data: str = ""               # how the sha256 or the name of the validation shard begins that the target is for (empty: any)
    # model
    layers: int = 4                     # number of blocks
    model_dim: int = 128                # width of the residual stream
    heads: int = 4                      # attention heads
    head_dim: int = 32                  # width of one head
    mlp_hidden: int = 512               # hidden width of the feed-forward
    document_mask: bool = True          # tokens see their own document only
    window_pattern: str = "L"           # S(hort) or L(ong) window for each layer, repeated; the last layer is always L
    window_short: tuple[int, ...] = (0,)  # short window in tokens, one for each equal part of the run (0: unlimited)
    window_long: tuple[int, ...] = (0,)   # long window likewise
    qk_norm: bool = True                # RMS-normalise queries and keys
    attention_scale: float = 0.0        # factor on the scores (0: 1 / sqrt(head_dim))
    rope: str = "half"                  # rotary positions: half (half of the pairs do not turn), full or none
    rope_base: float = 1024.0           # longest wavelength of the rotation, over 2 pi
    zero_init_projections: bool = True  # output projections begin at zero: every block begins as the identity
    tied_embedding: bool = False        # head and embedding share one matrix
    logit_softcap: float = 15.0         # logits are c tanh(logits / c) (0: off)
    x0_skip: bool = True                # every block reads a learned mix of the stream and the embedding
    unet_skips: bool = True             # the second half adds the first half's streams, mirrored, with learned weights
    value_embeddings: int = 2           # tables of embeddings added to the values of the first and last so many layers (0: off)
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
    resume: str = ""                    # checkpoint to continue, bit for bit
    init_from: str = ""                 # checkpoint whose matching tensors are this run's start
    log_dir: str = "logs"               # folder of logs, JSON files and checkpoints
    run_id: str = ""                    # name of this run's files (empty: date, time, track, variants, seed and four random digits)
    dry_run: bool = False               # say what the run would be, its parameters, FLOPs, steps, memory and expected time, and end
    save: bool = True                   # write a checkpoint at the end, on a signal and every checkpoint_seconds
    checkpoint_seconds: float = 600.0   # time between checkpoints
    stream_statistics: bool = False     # at every validation, what each branch adds to the stream, in the run's JSON: visualize.py stream draws it
    keep_every: int = 0                 # steps between checkpoints that are kept, from step 0 on, as RUN_ID-step000100.pt (0: none)
    @property
    def end_of_text(self) -> int:
        """The token that begins every document: as given or as the data say, else the last of the vocabulary, 256 in bytes and 50256 in GPT-2's."""
        return self.document_token if self.document_token >= 0 else self.vocab_size - 1
    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding and the head: a multiple of 128 for matrix units, of 8 where the vocabulary is small."""
        return -(-self.vocab_size // (unit := 128 if self.vocab_size > 4096 else 8)) * unit

RESUME_FIELDS = {"resume", "data", "log_dir", "save", "checkpoint_seconds", "keep_every", "stream_statistics", "val_every", "device", "dry_run"}  # may differ
# What a setting may be. Numbers: the least and the most, both allowed; of a tuple, each of its numbers.
RANGES = dict(
    vocab_size=(0, 65_536), document_token=(-1, 65_535), sequence_length=(2, 2 ** 24), batch_tokens=(1, 2 ** 32), micro_batch_tokens=(1, 2 ** 32),
    tokens=(1, 10 ** 15), steps=(0, 10 ** 9), time_budget=(0.0, 31_536_000.0), val_tokens=(1, 10 ** 12), val_every=(-1, 10 ** 9), target=(0.0, 100.0),
    layers=(1, 1024), model_dim=(1, 2 ** 18), heads=(1, 2 ** 14), head_dim=(1, 2 ** 14), mlp_hidden=(1, 2 ** 20), window_short=(0, 2 ** 24),
    window_long=(0, 2 ** 24), attention_scale=(0.0, 1e4), rope_base=(1.0, 1e12), logit_softcap=(0.0, 1e6), value_embeddings=(0, 4096),
    bigram_rows=(0, 2 ** 28), lr_matrix=(0.0, 1e4), lr_embed=(0.0, 1e4), lr_head=(0.0, 1e4), lr_scalar=(0.0, 1e4), momentum=(0.0, 0.999999),
    normuon_beta2=(0.0, 0.999999), weight_decay=(0.0, 1e4), adam_beta1=(0.0, 0.999999), adam_beta2=(0.0, 0.999999), decay_fraction=(0.0, 1.0),
    seed=(0, 2 ** 48), threads=(0, 1024), loss_chunk=(1, 2 ** 32), checkpoint_seconds=(0.0, 31_536_000.0), keep_every=(0, 10 ** 9))
CHOICES = dict(
    rope=("half", "full", "none"), device=("auto", "cpu", "cuda"), dtype=("auto", "float32", "bfloat16"), compile=("auto", "model", "blocks", "off"))
RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._=+,@-]{0,119}"  # a file's name on every system, which cannot leave its folder


def check_settings(values: dict, name=lambda setting: f"--{setting}"):
    """
    Raise RunError unless every value is of its field's type and within its range, and all of them agree with each other. values: all fields of
    Config. name(setting) is how a message calls a setting: an option of the command line, or a place in a file.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    for setting, value in values.items():
        check_value(kinds[setting], value, name(setting), RANGES.get(setting))
        choices = CHOICES.get(setting, (value,))
        require(value in choices, f"{name(setting)} must be one of {', '.join(map(str, choices))}; got {value!r}")
    c = Config(**values)
    require(c.track in TRACKS, f"unknown track {c.track!r}; the tracks are {', '.join(TRACKS)}")
    require(not c.run_id or re.fullmatch(RUN_ID, c.run_id),
            f"{name('run_id')} is a file's name of up to 120 letters, digits and ._=+,@- without a folder; got {c.run_id!r}")
    require(c.batch_tokens % c.sequence_length == 0,
            f"{name('batch_tokens')} {c.batch_tokens} is not a multiple of {name('sequence_length')} {c.sequence_length}")
    require(re.fullmatch("[SL]+", c.window_pattern) and len(c.window_short) == len(c.window_long) > 0,
            f"{name('window_pattern')} takes letters S and L, and both windows equally many stages; got {c.window_pattern!r}, {c.window_short} and "
            f"{c.window_long}")
    require(c.rope == "none" or c.head_dim % 4 == 0,
            f"{name('head_dim')} {c.head_dim} is not a multiple of 4, as rotary positions need; choose another or --rope none")
    require(not c.value_embeddings or c.heads * c.head_dim == c.model_dim,
            f"value embeddings need heads x head_dim = model_dim, got {c.heads} x {c.head_dim} and {c.model_dim}; or use --value_embeddings 0")
    require(c.bigram_rows != 1, f"{name('bigram_rows')} is 0 or at least 2: row 0 stands for no token before; got 1")
    require(not c.vocab_size or c.document_token < c.vocab_size,
            f"{name('document_token')} {c.document_token} is outside the vocabulary of {c.vocab_size}")


def check_value(kind, value, name: str, limits: tuple | None):
    """Raise RunError, which calls the value `name`, unless it is of a field's type and, if a number, within limits. A tuple's items are looked at."""
    items = value if get_origin(kind) is tuple else (value,)
    require(isinstance(items, tuple), f"{name} is a list of values, got {value!r:.60}")
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    for item in items:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        fits = number and (kind is float or isinstance(item, int)) if kind in (int, float) else isinstance(item, kind)
        require(fits, f"{name} must be {dict(int='an integer', float='a number', bool='true or false', str='text')[kind.__name__]}, got {item!r:.60}")
        if limits and number:  # NaN is within no limits
            require(limits[0] <= item <= limits[1], f"{name} must be from {limits[0]:,} to {limits[1]:,}, got {item!r:.60}")
        if kind is str:
            require(len(item) < 4096 and not re.search(r"[\x00-\x1f\x7f]", item),
                    f"{name} must be text of less than 4096 characters without control characters, got {item[:60]!r}")


def config_from(values, origin: str) -> Config:
    """The Config that a file holds as a JSON or checkpoint object. RunError, one line that names `origin`, for an unknown setting or a bad value."""
    require(isinstance(values, dict), f"{origin}: its config is no set of settings but a {type(values).__name__}; give another file")
    known = {field.name: field for field in dataclasses.fields(Config)}
    unknown = sorted(str(name) for name in values if name not in known)
    require(not unknown, f"{origin}: its config has settings that this trainer does not know ({', '.join(unknown)[:80]}); use the trainer that wrote it")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    check_settings({field.name: field.default for field in known.values()} | values, lambda setting: f"{origin}: config.{setting}")
    return Config(**values)

FINEWEB = dict(data="data/fineweb10B", val_tokens=10_485_760, sequence_length=2048, batch_tokens=524_288, micro_batch_tokens=65_536, align_documents=True,
               window_pattern="SSSL", window_short=(128, 256, 384), window_long=(384, 896, 1408), value_embeddings=0, lr_matrix=0.023, lr_head=0.004, lr_scalar=0.015)
MODEL_30M = dict(layers=8, model_dim=384, heads=6, head_dim=64, mlp_hidden=1536, tied_embedding=True, lr_embed=0.01)
MODEL_124M = dict(layers=12, model_dim=768, heads=6, head_dim=128, mlp_hidden=3072, attention_scale=0.12)
WHOLE_ROWS = dict(align_documents=False, document_mask=False, window_pattern="L", window_short=(0,), window_long=(0,))
TRACKS = {
    # the machine's own Python library as bytes; two CPU cores, about two minutes
    "cpu": dict(window_pattern="SSSL", window_short=(64,), window_long=(0,), attention_scale=0.25, lr_embed=0.4, lr_head=0.016, val_tokens=65_536,
                target=0.82, target_data="326315b03067da8b"),  # of Python 3.11.7's library
    # about 30M parameters, any GPU from 8 GB
    "small": FINEWEB | MODEL_30M | dict(tokens=100_000_000, batch_tokens=65_536, micro_batch_tokens=16_384, sequence_length=1024, window_long=(384, 640, 1024)),
    # 128 thin layers: attention 8.39M + tied embedding 6.44M + feed-forward 3.15M
    "exodus18m": FINEWEB | dict(layers=128, model_dim=128, heads=2, head_dim=64, mlp_hidden=96, tied_embedding=True, lr_embed=0.01, tokens=5_000_000_000,
                                micro_batch_tokens=32_768, sequence_length=1024, window_long=(384, 640, 1024), compile="blocks"),
    # rows of 65,536 tokens, full causal attention: attention is most of the step
    "long": FINEWEB | MODEL_30M | WHOLE_ROWS | dict(tokens=500_000_000, sequence_length=65_536),
    # modded-nanogpt's track 1
    "short": FINEWEB | MODEL_124M | dict(tokens=900_000_000, value_embeddings=3, bigram_rows=50_304, target=3.28, target_data="fineweb_val_"),
    # modded-nanogpt's track 2
    "medium": FINEWEB | dict(layers=16, model_dim=1024, heads=8, head_dim=128, mlp_hidden=4096, attention_scale=0.12, tokens=3_000_000_000,
                             micro_batch_tokens=32_768, value_embeddings=3, bigram_rows=50_304, target=2.92, target_data="fineweb_val_"),
    # the fixed architecture of modded-nanogpt's track 3, for step times
    "benchmark": FINEWEB | MODEL_124M | WHOLE_ROWS | dict(tokens=1_703_936_000, sequence_length=1024, x0_skip=False, unet_skips=False, smear=False, attention_gate=False, target=3.28, target_data="fineweb_val_"),
}

@functools.cache
def config_comments() -> list[tuple[str, str, str]]:
    """(comment, "", "") for each line of Config's source that is one, ("", field, comment beside it) for each field, in their order."""
    return re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", inspect.getsource(Config), re.M)


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from a command line (default: this process')."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", usage="train_gpt.py [options]", argument_default=argparse.SUPPRESS, allow_abbrev=False, description="Train the baseline or a variant of it.",
        epilog="Defaults are the cpu track's; another --track brings its own. A run is named by its id, the beginning of it, or last.")
    kinds = {int: dict(type=int), float: dict(type=float), bool: dict(action=argparse.BooleanOptionalAction), tuple[str, ...]: dict(nargs="+"),
             tuple[int, ...]: dict(type=lambda text: tuple(int(part) for part in text.split(",")))}
    defaults = {field.name: TRACKS[Config.track].get(field.name, field.default) for field in dataclasses.fields(Config)}

    # a group for each comment of its own in Config's source, an option for each field, with the comment beside it
    group, types = parser, {field.name: field.type for field in dataclasses.fields(Config)}
    for title, name, comment in config_comments():
        if title:
            group = parser.add_argument_group(title)
            continue
        value = ",".join(map(str, defaults[name])) if isinstance(defaults[name], tuple) else defaults[name]
        shown = f" (default: {value})" if str(value) else ""
        group.add_argument("--" + name, help=comment.replace("%", "%%") + shown, **kinds.get(types[name], {}))
    spelled = (re.sub("^--[^=]*", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in (sys.argv[1:] if argv is None else argv))  # --init-from too
    given = vars(parser.parse_args([re.sub("^--no_", "--no-", word) for word in spelled]))
    if "variant" in given:
        given["variant"] = tuple(part for text in given["variant"] for part in re.split(r"\+(?=[a-z_])", text))
    return make_config(given)

def make_config(given: dict) -> Config:
    """Config from explicit settings over their track's or, with resume, over the checkpoint's. RunError for settings that contradict each other."""
    track = given.get("track", Config.track)
    if track not in TRACKS:
        raise RunError(f"unknown track {track!r}; the tracks are {', '.join(TRACKS)}")
    for name in ("resume", "init_from"):
        if given.get(name):
            given = given | {name: str(find_checkpoint(given[name], given.get("log_dir", Config.log_dir)))}
    base = read_checkpoint(given["resume"])["config"] if given.get("resume") else TRACKS[track]
    for name in given.keys() - RESUME_FIELDS if given.get("resume") else ():
        require(given[name] == base[name], f"--{name} {given[name]} differs from the checkpoint's {base[name]}: a resumed run keeps its settings; "
                "change them with --init_from")
    if "target" in given and "target_data" not in given:
        base = base | dict(target_data="")
    c = Config(**{**base, **given})
    check_settings(dataclasses.asdict(c))

    planned = c.steps or max(1, c.tokens // c.batch_tokens)
    c.steps = 0 if c.time_budget else planned
    if c.val_every < 0:
        c.val_every = max(1, planned // 12)
    return c

# ---- Ranks --------------------------------------------------------------------------------------------------------------------------------------------

@dataclass
class Ranks:
    """This process among those that torchrun started, or alone: its rank, how many there are, its device and its activations' dtype."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    @staticmethod
    def start(config: Config) -> "Ranks":
        texts = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        wrong = [f"{name}={text}" for name, text in texts.items() if text and not re.fullmatch(r"\d{1,6}", text)]
        require(not wrong, f"{', '.join(wrong)} in the environment is no number; unset it, or start by torchrun")
        rank, world, local = (int(text or default) for text, default in zip(texts.values(), (0, 1, 0)))
        require(world <= 1 or os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT") and texts["RANK"],
                f"WORLD_SIZE={world} in the environment, but not by torchrun (no RANK, MASTER_ADDR or MASTER_PORT); unset it, or start by torchrun")
        cuda = torch.cuda.is_available() and config.device != "cpu"
        if config.device == "cuda" and not cuda:
            raise RunError("--device cuda: PyTorch sees no CUDA device; use --device cpu, or install a CUDA build of PyTorch and a driver")
        if cuda and local >= torch.cuda.device_count():
            raise RunError(f"rank {local} of this machine has no GPU of its own, {torch.cuda.device_count()} seen; start as many ranks as there are GPUs")
        if cuda:
            torch.cuda.set_device(local)
            torch.backends.cuda.matmul.allow_tf32 = True
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        # Without AMX tiles a CPU multiplies float32 1.5 to 2 times as fast as bfloat16 (measured), and attends 2 to 6 times as fast.
        dtype = "bfloat16" if cuda and torch.cuda.get_device_capability()[0] >= 8 else "float32"
        return Ranks(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"), getattr(torch, dtype if config.dtype == "auto" else config.dtype))
    def synchronize(self):
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

# ---- Optimizers: parameters in buckets, each rank updates its own slice of every bucket ---------------------------------------------------------------

# PyTorch 2.13 renamed them
ALL_GATHER, REDUCE_SCATTER = (getattr(dist, new, getattr(dist, old, None)) for new, old in
                              (("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")))

class Bucket:
    """
    Parameters updated by one batched operation. They and their gradients become views of two stacked tensors: a step takes one reduce-scatter, one
    update of this rank's slice and one all-gather for all of them, and no copies. matrices: (n, rows, columns), whole matrices a rank; otherwise flat:
    (numbers,), every parameter aligned to 64 numbers. state: name -> tensor of this rank's slice. parameters: name -> parameter.
    """
    def __init__(self, parameters: dict[str, nn.Parameter], matrices: bool, lr: float, weight_decay: float, ranks: Ranks):
        self.parameters, self.lr, self.weight_decay, self.world, self.state, self.places = list(parameters.values()), lr, weight_decay, ranks.world, {}, {}
        sizes = [p[..., 0, 0].numel() if matrices else p.numel() for p in self.parameters]
        offsets = np.cumsum([0] + [size if matrices else -(-size // 64) * 64 for size in sizes]).tolist()
        chunk, unit = -(-offsets[-1] // ranks.world), self.parameters[0].shape[-2:] if matrices else ()
        self.data = torch.zeros(chunk * ranks.world, *unit, device=ranks.device)
        self.grad, self.own = torch.zeros_like(self.data), slice(ranks.rank * chunk, (ranks.rank + 1) * chunk)
        for (name, p), offset, size in zip(parameters.items(), offsets, sizes):
            self.places[name] = place = slice(offset, offset + size)
            self.data[place] = p.detach().reshape(size, *unit)
            p.data, p.grad = (whole[place].view(p.shape) for whole in (self.data, self.grad))
            if ranks.world > 1:
                p.register_post_accumulate_grad_hook(self._count)
        self.missing, self.work, self.then = 0, None, None  # parameters without their last gradient of this step; the reduction under way; what follows its start
    def expect(self, then=None):
        """Reduce in the coming backward pass, as soon as every parameter has its gradient; `then(self)` is called next."""
        self.missing, self.then = len(self.parameters), then
    def _count(self, _parameter):
        self.missing -= 1
        if not self.missing:
            self._reduce()
            self.then and self.then(self)
    def _reduce(self):  # gloo sums whole tensors only
        self.work = REDUCE_SCATTER(self.grad[self.own], self.grad, async_op=True) if self.grad.is_cuda else dist.all_reduce(self.grad, async_op=True)
    def reduced_gradient(self) -> Tensor:
        """This rank's slice of the gradient, summed over the ranks."""
        if self.world > 1:
            self.work or self._reduce()  # some parameter took no part in the pass
            self.work.wait()
        self.missing, self.work = 0, None
        return self.grad[self.own]
    def gather(self, own: Tensor, whole: Tensor):
        """Join the ranks' slices in `whole`; returns what to wait for."""
        return ALL_GATHER(whole, own.clone(), async_op=True) if self.world > 1 else None
    def collect(self, own: Tensor) -> dict[str, Tensor]:
        """A tensor of this rank's slice -> each parameter's part of the whole, copied: the same for any number of ranks. Collective."""
        whole = own if self.world == 1 else own.new_empty(len(own) * self.world, *own.shape[1:])
        (work := self.gather(own, whole)) and work.wait()
        return {name: whole[place].clone() for name, place in self.places.items()}
    def distribute(self, parts: dict[str, Tensor], own: Tensor):
        """The way back from collect."""
        whole = own.new_zeros(len(self.data), *own.shape[1:])
        for name, place in self.places.items():
            whole[place] = parts[name].to(own.device)
        own.copy_(whole[self.own])

class ShardedOptimizer:
    """
    Base of the optimizers (ZeRO stage 1). For one rank's slice of a bucket a subclass gives new_state(own), a dict of tensors, hyperparameters(progress)
    and update(data, gradient, *state, lr, decay, *hyperparameters), which changes data and state in place.
    """
    def __init__(self, buckets: list[Bucket], config: Config, wrap=lambda function: function):
        self.buckets, self.config, self.steps, self.update, self.updated = buckets, config, 0, wrap(self.update), {}
        for bucket in buckets:
            bucket.state = self.new_state(bucket.data[bucket.own])
    def start(self, lr_factor: float, progress: float, reducing: list):
        """
        Before a step's last backward pass: update what is reduced under it. A bucket is updated when the next one, of any optimizer, is complete, its own reduction then
        being over or nearly so. Its parameters have all their gradients, so nothing of the pass reads them any more, but for a part that keeps one detached, which would
        find it updated. reducing: shared by the optimizers, empty.
        """
        def then(bucket):
            reducing.append((self, bucket))
            if len(reducing) > 1:
                optimizer, before = reducing.pop(0)
                optimizer.update_bucket(before, lr_factor, progress)
        for bucket in self.buckets:
            bucket.expect(then)
    @torch.no_grad()
    def update_bucket(self, bucket: Bucket, lr_factor: float, progress: float):
        gradient, data, lr = bucket.reduced_gradient(), bucket.data[bucket.own], bucket.lr * lr_factor
        # tensors of no dimension: a compiled update takes them as inputs and need not be compiled anew when they change
        self.update(data, gradient, *bucket.state.values(), torch.tensor(lr), torch.tensor(lr * bucket.weight_decay), *self.hyperparameters(progress))
        self.updated[bucket] = bucket.gather(data, bucket.data)
        bucket.grad.zero_()
    def step(self, lr_factor: float, progress: float):
        """One update at `progress` in [0, 1) of the run, or what start() has left of it; a bucket's slices travel while the next is updated."""
        for bucket in self.buckets:
            bucket in self.updated or self.update_bucket(bucket, lr_factor, progress)
        for work in self.updated.values():
            work and work.wait()
        self.steps, self.updated = self.steps + 1, {}
    def state_dict(self) -> dict:
        """A copy of the whole state, the same on every rank. Collective."""
        state = {}
        for bucket in self.buckets:
            for name, own in bucket.state.items():
                state.setdefault(name, {}).update(bucket.collect(own))
        return dict(steps=self.steps, state=state)
    def load_state_dict(self, saved: dict):
        """Take up a state_dict(). KeyError, ValueError or another of Python's own errors for what is none."""
        self.steps = saved["steps"]
        if type(self.steps) is not int or self.steps < 0:
            raise ValueError(f"an optimizer's steps are {self.steps!r:.40}")
        for bucket in self.buckets:
            for name, own in bucket.state.items():
                bucket.distribute(saved["state"][name], own)

# Coefficients of the Polar Express paper for five steps, with its safety factor of 2 %.
POLAR_EXPRESS = ((8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233002837),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))

def symmetric_product(x: Tensor, a: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha x x' + beta a of every matrix x (n, rows, columns)."""
    return x @ x.mT if a is None else torch.baddbmm(a, x, x.mT, beta=beta, alpha=alpha)

def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> about U V' of each matrix' U S V' (singular values within about 0.3 of 1), in the input's dtype."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram, gram, alpha=c, beta=b), x, beta=a)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x

class Muon(ShardedOptimizer):
    """For matrices; its buckets are batches of equal ones."""
    def new_state(self, own: Tensor) -> dict:
        return dict(momentum=torch.zeros_like(own), second=torch.zeros_like(own[..., :1] if own.shape[-2] >= own.shape[-1] else own[..., :1, :]))
    def hyperparameters(self, progress: float) -> tuple:
        return torch.tensor(self.config.momentum - max(0.0, 1 - 10 * progress) * max(0.0, self.config.momentum - 0.85)), self.config.normuon_beta2
    @staticmethod
    def update(data, gradient, momentum, second, lr, decay, mu, beta2: float):
        """Nesterov momentum, orthogonalisation, NorMuon's normalisation by row, cautious weight decay, on a batch of equal matrices."""
        gradient = gradient * (1 - mu)
        momentum.mul_(mu).add_(gradient)  # no lerp: its weight may not be on another device
        update, scale = orthogonalize((gradient + momentum * mu).to(torch.bfloat16 if data.is_cuda else torch.float32)).float(), max(1.0, data.shape[-2] / data.shape[-1]) ** 0.5
        if beta2:  # divide each row by its running size, then give the matrix its norm back
            norm = update.norm(dim=(-2, -1), keepdim=True)
            second.lerp_(update.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True), 1 - beta2)
            update = update * second.clamp_min(1e-10).rsqrt()
            scale = scale * norm / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
        data.sub_(lr * scale * update + decay * data * (update * data > 0))

class Adam(ShardedOptimizer):
    """For embeddings, the head, scalars and gates; its buckets are flat. Bias correction, cautious weight decay."""
    def new_state(self, own: Tensor) -> dict:
        return dict(mean=torch.zeros_like(own), square=torch.zeros_like(own))
    def hyperparameters(self, progress: float) -> tuple:
        betas = self.config.adam_beta1, self.config.adam_beta2
        return *betas, *(torch.tensor(1 - beta ** (self.steps + 1)) for beta in betas)
    @staticmethod
    def update(data, gradient, mean, square, lr, decay, beta1: float, beta2: float, correction1, correction2):
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        update = (mean / correction1) / ((square / correction2).sqrt() + 1e-10)
        data.sub_(lr * update + decay * data * (update * data > 0))

def build_optimizers(model: nn.Module, config: Config, ranks: Ranks) -> list[ShardedOptimizer]:
    """
    Muon for the matrices of blocks, Adam for the rest. A parameter's own attributes override this: .optimizer ("muon", "adam", "adam_embed",
    "adam_head"), .lr_mul, .wd_mul (Muon's 1, Adam's 0). Muon takes a parameter of three dimensions as a batch of matrices.
    The trainer calls start, step, state_dict and load_state_dict of what this returns.
    """
    rates, groups = dict(muon=config.lr_matrix, adam=config.lr_scalar, adam_embed=config.lr_embed, adam_head=config.lr_head), {}
    # Several ranks: a bucket of matrices for every few layers, up to four, so that all but the first layers' are reduced and updated while the backward pass goes
    # on. As many layers as a multiple of the ranks, counted from the last one: where each has one matrix of a shape, every rank gets equally many.
    deep = -(-config.layers // (4 * ranks.world)) * ranks.world if ranks.world > 1 else config.layers
    for name, p in model.named_parameters():
        kind = getattr(p, "optimizer", "muon" if p.ndim >= 2 and name.startswith("blocks.") else "adam")
        if kind not in rates or kind == "muon" and p.ndim < 2:
            raise RunError(f"parameter {name} of shape {tuple(p.shape)} asks for optimizer {kind!r}; there are {', '.join(rates)}, and muon takes matrices only")
        layer = int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", name)) else 0
        matrix = (p.shape[-2:], (config.layers - 1 - layer) // deep) if kind == "muon" else None
        groups.setdefault((kind, getattr(p, "lr_mul", 1.0), getattr(p, "wd_mul", float(kind == "muon")), matrix), {})[name] = p
    matrices, numbers = [], []
    for (kind, lr_mul, wd_mul, _), parameters in groups.items():
        (matrices if kind == "muon" else numbers).append(Bucket(parameters, kind == "muon", rates[kind] * lr_mul, config.weight_decay * wd_mul, ranks))
    compiled = (lambda f: torch.compile(f, dynamic=False)) if ranks.device.type == "cuda" and compile_mode(config, ranks) != "off" else (lambda f: f)
    return [Muon(matrices, config, compiled), Adam(numbers, config, compiled)]

# ---- Model --------------------------------------------------------------------------------------------------------------------------------------------

@dataclass
class AttentionMask:
    """Which keys a layer's queries see. Made outside the compiled graph, which only takes tensors from it: a new window compiles nothing anew."""
    doc_start: Tensor                           # (B, T) int32: where in the row each token's document begins (0 without document mask)
    positions: Tensor                           # (B, T) int32: the token's place in its document
    window: int | None
    first_key: Tensor | None                    # (B, T) int32: max(doc_start_i, i - window + 1); None where 0 throughout: plain causal attention
    block_mask: object | None = None            # the same rule for FlexAttention
    stretches: list | None = None               # or for PyTorch's attention
    cache: object | None = None                 # what the layer keeps of earlier tokens, where a text is continued: generate.LayerCache

@dataclass
class AttentionContext:
    """What a layer may know besides the stream; B rows of T tokens. It has the mask's attributes, read late: a graph is compiled for every value it reads."""
    mask: AttentionMask
    rotary: tuple[Tensor, Tensor] | None        # cosine and sine, (T, pairs that turn)
    x0: Tensor                                  # (B, T, model_dim): the embedded tokens
    value: Tensor | None                        # (B, T, model_dim): the layer's value embedding
    doc_start, positions, window, first_key, block_mask, stretches, cache = (property(lambda self, name=name: getattr(self.mask, name))
                                                                  for name in AttentionMask.__dataclass_fields__)

class Linear(nn.Module):
    """y = x W'; W (n_out, n_in) is float32 and cast to x's dtype. role: q k v o fc proj gate head; a replacement of the head's must offer .weight."""
    def __init__(self, config: Config, layer: int | None, role: str, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        zero = role in ("gate", "head") or role in ("o", "proj") and config.zero_init_projections
        self.weight.init_std = 0.0 if zero else 0.5 * n_in ** -0.5
        self.weight.optimizer = dict(gate="adam", head="adam_head").get(role, "muon")
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x))

class RMSNormalize(torch.autograd.Function):
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension. Half the passes over memory of PyTorch's own where nothing is compiled."""
    @staticmethod
    def forward(ctx, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        inverse = (norm.square() / x.shape[-1] + 1e-6).rsqrt()
        y = (x * inverse).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y
    @staticmethod
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
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
    """Rotary positions on x (B, T, H, D): channel c < D / 2 is paired with c + D / 2, and the first pairs turn, as many as rotary (T, n) has."""
    cosine, sine = (t[:, None, :].type_as(x) for t in rotary)
    still = x.shape[-1] // 2 - cosine.shape[-1]
    a, a_still, b, b_still = x.split((cosine.shape[-1], still) * 2, dim=-1)
    return torch.cat((a * cosine + b * sine, a_still, b * cosine - a * sine, b_still), dim=-1)

def interval_block_mask(first_key: Tensor, block: int = 128):
    """FlexAttention's mask for first_key_i <= j <= i. As first_key never falls along a row, the first and the last query of a block decide: exact at
    a cost of (T / block)^2, no score is looked at."""
    from torch.nn.attention.flex_attention import BlockMask
    index = torch.arange(first_key.shape[1] // block, device=first_key.device)
    query, key = index[:, None], index[None, :]
    some = (key <= query) & (key * block + block > first_key[:, ::block, None])
    whole = (key < query) & (key * block >= first_key[:, block - 1::block, None])
    count = lambda dense: dense.sum(-1, dtype=torch.int32)[:, None]
    order = lambda dense: torch.argsort(dense.int(), dim=-1, descending=True, stable=True).int()[:, None].contiguous()
    return BlockMask.from_kv_blocks(count(some & ~whole), order(some & ~whole), count(whole), order(whole), BLOCK_SIZE=block,
                                    mask_mod=lambda b, h, i, j: (j <= i) & (j >= first_key[b, i]))

def mask_stretches(first_key: Tensor, window: int | None, dtype: torch.dtype) -> list[tuple[int, int, int, Tensor]]:
    """The same rule for some queries at a time, so that the mask of a long row is never whole: (first query, query after the last, first key, mask to add
    to the scores (B, 1, queries, keys))."""
    T, result = first_key.shape[1], []
    size = min(T, max(128, min(window or T, 1024)))
    for start in range(0, T, size):
        stop, begin = min(T, start + size), max(0, start - (window or T) + 1)
        key, query = torch.arange(begin, stop, device=first_key.device), torch.arange(start, stop, device=first_key.device)
        hidden = (key > query[:, None]) | (key < first_key[:, start:stop, None])
        result.append((start, stop, begin, torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)[:, None]))
    return result

def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext | AttentionMask, scale: float) -> Tensor:
    """Softmax attention of q, k, v (B, T, H, D) over the keys that ctx allows; returns (B, T, H, D)."""
    if ctx.cache is not None:
        return ctx.cache.attend(q, k, v, ctx, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if ctx.block_mask is not None:
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=ctx.block_mask, scale=scale).transpose(1, 2)
    if ctx.stretches is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    parts = [F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, begin:stop], v[:, :, begin:stop], attn_mask=mask, scale=scale)
             for start, stop, begin, mask in ctx.stretches]
    return torch.cat(parts, dim=2).transpose(1, 2)

GATE_CHANNELS = 12  # of the stream, which the sparse gates read

class CausalSelfAttention(nn.Module):
    """Multi-head softmax attention with QK-norm, half-truncated rotary positions, value embeddings and a sparse output gate."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, width = config, config.heads * config.head_dim
        self.q, self.k, self.v = (Linear(config, layer, role, config.model_dim, width) for role in "qkv")
        self.o = Linear(config, layer, "o", width, config.model_dim)
        self.gate = Linear(config, layer, "gate", min(GATE_CHANNELS, config.model_dim), config.heads) if config.attention_gate else None
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if value_table(config, layer) is not None else None
        self.scale = config.attention_scale or config.head_dim ** -0.5
    def heads(self, x: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, T, H, D), ready to attend."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.config.head_dim)) for linear in (self.q, self.k, self.v))
        if self.config.qk_norm:
            q, k = RMSNormalize.apply(q), RMSNormalize.apply(k)
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        return q, k, self.mix_value(v, ctx)
    def mix_value(self, v: Tensor, ctx: AttentionContext) -> Tensor:
        if self.value_mix is None:
            return v
        mix = self.value_mix.type_as(v)
        return mix[0] * v + mix[1] * ctx.value.view_as(v)
    def gate_heads(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, T, H, D), each head gated by the first channels of the layer's input x -> (B, T, H D)."""
        if self.gate is not None:
            y = y * (2 * torch.sigmoid(self.gate(x[..., :GATE_CHANNELS])))[..., None]
        return y.flatten(2)
    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        return self.o(self.gate_heads(attend(*self.heads(x, ctx), ctx, self.scale), x))

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
    def forward(self, x: Tensor, branch_output: Tensor) -> Tensor:
        return x + branch_output

class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.stream_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_skip else None
        self.attention_norm, self.mlp_norm = Norm(config, config.model_dim), Norm(config, config.model_dim)
        self.attention, self.mlp = CausalSelfAttention(config, layer), MLP(config, layer)
        self.attention_residual, self.mlp_residual = Residual(config, layer, "attention"), Residual(config, layer, "mlp")
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
    """(sum of the cross-entropies, capped logits, log-normalisers) of n tokens. x (n, D), weight (V, D), targets (n,) int64."""
    logits = (x @ weight.T).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    normaliser = logits.logsumexp(-1, keepdim=True)
    return (normaliser - logits.gather(1, targets[:, None])).sum(), logits, normaliser

class SoftcappedCrossEntropy(torch.autograd.Function):
    """
    Sum over N tokens of the cross-entropy of c tanh(x W' / c); x (N, D), W (V, D), targets (N,) int64, c = 0: no cap; returns a float32 scalar.
    The gradients are formed in the forward pass, `chunk` tokens at a time: three products in all, and (N, V) never exists in any precision.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, chunk):
        w, loss, dx, dw = weight.type_as(x), x.new_zeros((), dtype=torch.float32), [], torch.zeros_like(weight)
        for part, target in zip(x.split(chunk), targets.split(chunk)):
            part_loss, logits, normaliser = loss_of_chunk(part, w, target, softcap)
            d = torch.exp(logits - normaliser).scatter_add(1, target[:, None], -torch.ones_like(normaliser))
            d = (d * (1 - (logits / softcap).square()) if softcap else d).type_as(x)
            loss, dw = loss + part_loss, dw + d.T @ part
            dx.append(d @ w)
        ctx.save_for_backward(torch.cat(dx), dw)
        return loss
    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return grad.to(dx.dtype) * dx, grad * dw, None, None, None

class LanguageModelHead(nn.Module):
    """forward(x (B, T, D), targets (B, T)) -> mean loss in nats a token, float32; without targets -> logits (B, T, vocabulary), float32."""
    def __init__(self, config: Config):
        super().__init__()
        self.projection = Linear(config, None, "head", config.model_dim, config.padded_vocabulary)
        self.vocab_size, self.softcap, self.chunk = config.vocab_size, config.logit_softcap, config.loss_chunk
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        weight = self.projection.weight
        if targets is None:
            logits = F.linear(x, weight[:self.vocab_size].type_as(x)).float()
            return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
        x, targets = x.flatten(0, 1), targets.flatten().long()
        if torch.is_grad_enabled():
            return SoftcappedCrossEntropy.apply(x, weight, targets, self.softcap, self.chunk) / len(targets)
        weight = weight.type_as(x)
        return sum(loss_of_chunk(part, weight, target, self.softcap)[0] for part, target in zip(x.split(self.chunk), targets.split(self.chunk))) / len(targets)

def value_table(config: Config, layer: int) -> int | None:
    """Which value embedding a layer uses: tables 0, 1, .. in the first layers and again in the last, None between."""
    n = min(config.value_embeddings, config.layers // 2)
    return layer if layer < n else layer - config.layers + n if layer >= config.layers - n else None

def embedding(rows: int, columns: int, std: float) -> nn.Embedding:
    table = nn.Embedding(rows, columns)
    table.weight.init_std, table.weight.optimizer = std, "adam_embed"
    return table

class GPT(nn.Module):
    """forward(tokens (B, T) int, targets (B, T) int) -> mean loss; without targets -> logits (B, T, vocabulary)."""
    def __init__(self, config: Config):
        super().__init__()
        self.config, width, rows = config, config.model_dim, config.padded_vocabulary
        self.embedding = embedding(rows, width, 0.02 if config.tied_embedding else 1.0)
        self.bigram_embedding = embedding(config.bigram_rows, width, 0.0) if config.bigram_rows else None
        self.value_embeddings = nn.ModuleList(embedding(rows, width, 0.1) for _ in range(min(config.value_embeddings, config.layers // 2)))
        self.smear_gate = Linear(config, None, "gate", min(GATE_CHANNELS, width), 1) if config.smear else None
        self.smear_scale = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.skip_weights = nn.Parameter(torch.full((config.layers // 2,), 0.2)) if config.unet_skips else None
        self.embedding_norm, self.final_norm, self.head = Norm(config, width), Norm(config, width), LanguageModelHead(config)
        if config.tied_embedding:
            self.head.projection.weight = self.embedding.weight
        turning = config.head_dim // (2 if config.rope == "full" else 4)  # pairs of channels
        self.register_buffer("frequencies", config.rope_base ** -torch.linspace(0, 1, turning), persistent=False)
        self.dtype, self.use_flex, self.windows = torch.float32, False, (0, 0)
    @torch.no_grad()
    def initialize(self, seed: int):
        """Draw every parameter that has .init_std from a generator of its own name: equal names begin equal, whatever else a model holds."""
        for name, p in self.named_parameters():
            if (std := getattr(p, "init_std", None)) is not None:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) * 1_000_003 + seed)
                p.copy_(torch.randn(p.shape, generator=generator) * std if std else torch.zeros(p.shape))
    def set_windows(self, progress: float):
        """Choose the windows of this part of the run, progress in [0, 1]."""
        stage = min(int(progress * len(self.config.window_long)), len(self.config.window_long) - 1)
        self.windows = (self.config.window_short[stage], self.config.window_long[stage])
    def window(self, layer: int) -> int:
        """The layer's window in this part of the run, in tokens; 0: unlimited."""
        return self.windows[layer == self.config.layers - 1 or self.config.window_pattern[layer % len(self.config.window_pattern)] == "L"]
    def masks(self, tokens: Tensor) -> list[AttentionMask]:
        """One AttentionMask a layer, for tokens (B, T)."""
        config, T, shared, layers = self.config, tokens.shape[1], {}, []
        index = torch.arange(T, device=tokens.device, dtype=torch.int32)
        starts = torch.where(tokens == config.end_of_text, index, 0) if config.document_mask else torch.zeros_like(tokens)
        doc_start = starts.cummax(1).values.int()
        for layer in range(config.layers):
            window = self.window(layer) if 0 < self.window(layer) < T else None
            if window not in shared:
                first_key = torch.maximum(doc_start, index - (window - 1)) if window else doc_start if config.document_mask else None
                shared[window] = mask = AttentionMask(doc_start, index - doc_start, window, first_key)
                if first_key is not None and self.use_flex and T % 128 == 0:
                    mask.block_mask = interval_block_mask(first_key)
                elif first_key is not None:
                    mask.stretches = mask_stretches(first_key, window, self.dtype)
            layers.append(shared[window])
        return layers
    def look_up(self, tokens: Tensor) -> list[Tensor]:
        """Rows (B, T, model_dim) of the embedding and of every table of value embeddings, in the activations' dtype."""
        return [table(tokens).to(self.dtype) for table in (self.embedding, *self.value_embeddings)]
    def embed(self, tokens: Tensor, masks: list[AttentionMask], start: int = 0) -> tuple[Tensor, list[AttentionContext]]:
        """Tokens (B, T), the first of them at `start` in its row -> the stream (B, T, model_dim) and the layers' contexts. Nothing passes the start of a document."""
        config, index = self.config, torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x, *values = self.look_up(tokens)
        inside = (index > 0) & (tokens != config.end_of_text if config.document_mask else True)
        if self.smear_gate is not None:
            gate = self.smear_scale.type_as(x) * torch.sigmoid(self.smear_gate(x[..., :GATE_CHANNELS])) * inside[..., None]
            x = x + gate * F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.bigram_embedding is not None:  # row 0: there is no token before
            previous = F.pad(tokens[:, :-1], (1, 0)).long()
            row = torch.where(inside, 1 + (previous * 36_313 ^ tokens.long() * 27_191) % (config.bigram_rows - 1), 0)
            x = x + self.bigram_embedding(row).to(self.dtype)
        x = self.embedding_norm(x)
        angles = index[:, None] * self.frequencies
        rotary = (angles.cos(), angles.sin()) if config.rope != "none" else None
        return x, [AttentionContext(mask, rotary, x, None if (table := value_table(config, layer)) is None else values[table]) for layer, mask in enumerate(masks)]
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
    def predict(self, tokens: Tensor, masks: list[AttentionMask], targets: Tensor | None) -> Tensor:
        """All of forward but the masks: what is compiled as one graph."""
        return self.head(self.final_norm(self.select_outputs(self.run_blocks(*self.embed(tokens, masks)))), targets)
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.predict(tokens, self.masks(tokens), targets)

def build_model(config: Config, ranks: Ranks) -> GPT:
    """The model on its device with its initial tensors, not yet compiled."""
    torch.manual_seed(config.seed)
    model = GPT(config)
    model.initialize(config.seed)
    model.dtype, model.use_flex = ranks.dtype, ranks.device.type == "cuda" and compile_mode(config, ranks) != "off"
    return model.to(ranks.device)

def trained_model(saved: dict, config: Config, ranks: Ranks) -> GPT:
    """The model of a checkpoint's contents, as at the end of its run, to be used; its variants must be applied."""
    model = build_model(config, ranks)
    model.load_state_dict(saved["model"])
    model.set_windows(1.0)
    return model.eval()

def compile_mode(config: Config, ranks: Ranks) -> str:
    """What compile = auto means. One GPU: one graph. Several: a graph a block, because a whole graph hands over its gradients only when its backward
    pass ends, and nothing could be reduced meanwhile. CPU: a graph a block (equal blocks share it), a quarter faster, where the run is long enough to
    earn the half minute that this takes and there is a C++ compiler."""
    if config.compile != "auto":
        return config.compile
    if ranks.device.type == "cuda":
        return "model" if ranks.world == 1 else "blocks"
    return "blocks" if (config.steps * config.batch_tokens or config.tokens) >= 10_000_000 and shutil.which(os.environ.get("CXX", "g++")) else "off"

def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work here, in a few words; None if it does. Tried on an addition of a number that no cache has seen."""
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
    for part in [*model.blocks, model.head] if mode == "blocks" else []:
        part.compile(dynamic=False, fullgraph=True)

@torch.no_grad()
def stream_statistics(model: GPT, tokens: Tensor) -> list[dict]:
    """
    What each residual of the model makes of the stream x and its branch's output y on tokens (B, T), in the order of depth; norms are a token's, over its channels. Numbers
    without a name of their own are means: shares of |y|^2 along and across x, cosines of x with y and with the new stream z, kurtosis of a token's channels.
    """
    rows = []
    def look(name, module, inputs, z):
        x, y, z = (t.float() for t in (*inputs, z))
        dot, norms = lambda a, b: (a * b).sum(-1), [t.norm(dim=-1).clamp_min(1e-30) for t in (x, y, z)]
        x_norm, y_norm, z_norm = norms
        centred = x - x.mean(-1, keepdim=True)
        cosine, quantiles = dot(x, y) / (x_norm * y_norm), torch.quantile(x_norm.flatten(), torch.tensor([0.01, 0.5, 0.99], device=x.device)).tolist()
        gates = {key: dict(mean=p.mean().item(), std=p.std(correction=0).item(), negative=(p < 0).float().mean().item()) for key, p in module.named_parameters()}
        means = dict(x_norm=x_norm, z_norm=z_norm, rho_par=cosine.square(), rho_ortho=(1 - cosine.square()) * (y_norm > 1e-30), cos_x_y=cosine, cos_x_out=dot(x, z) / (x_norm * z_norm),
                     y_over_x=y_norm / x_norm, relative_step=(z - x).norm(dim=-1) / x_norm,
                     kurtosis=centred.pow(4).mean(-1) / centred.square().mean(-1).square().clamp_min(1e-30))
        rows.append(dict(branch=name) | {key: value.mean().item() for key, value in means.items()} | dict(zip(("x_norm_p1", "x_norm_p50", "x_norm_p99"), quantiles))
                    | dict(x_max=x.abs().max().item(), parameters=gates))
    hooks = [module.register_forward_hook(lambda module, inputs, z, name=name: look(name, module, inputs, z))
             for name, module in model.named_modules() if name.endswith("_residual")]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return rows

def measure_model(config: Config) -> dict:
    """
    What a model costs, counted on one row without data (PyTorch's meta device), as a dict: parameters; parameters_without_embeddings, which leaves
    the tables and the head out; flops_per_token, of training, forward and backward, scores that are computed and masked counted too.
    """
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model, tokens = GPT(config), torch.zeros(1, config.sequence_length, dtype=torch.int64)
    model.set_windows(1.0)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()

    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    tables[id(model.head.projection.weight)] = model.head.projection.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, parameters_without_embeddings=parameters - sum(tables.values()),
                flops_per_token=counter.get_total_flops() / config.sequence_length)

def flops_per_token(config: Config) -> float:
    """Training FLOPs of one token, forward and backward."""
    return measure_model(config)["flops_per_token"]

def memory_needed(config: Config, dtype: torch.dtype) -> int:
    """
    Bytes that a process of this run takes at the least, whatever is fused: for every parameter its weight, its gradient and two numbers of its
    optimizer, and during the warm-up a copy of three of these; the stream of a micro batch after every layer, the logits of a chunk and the tokens of
    two batches. Parameters of more than eight layers are counted at four and eight and continued in a straight line: any depth takes a second.
    """
    few, more = (dataclasses.replace(config, layers=min(config.layers, n)) for n in (4, 8))
    with torch.device("meta"):
        counts = [sum(p.numel() for p in GPT(c).parameters()) for c in (few, more)]
    parameters = counts[1] + max(config.layers - 8, 0) / 4 * (counts[1] - counts[0])
    tokens = max(1, min(config.micro_batch_tokens, config.batch_tokens) // config.sequence_length) * config.sequence_length
    streams = tokens * config.layers * config.model_dim * dtype.itemsize
    logits = 4 * config.padded_vocabulary * min(config.loss_chunk, tokens)
    return int(28 * parameters + streams + logits + 8 * config.batch_tokens)

def memory_of_machine(ranks: Ranks) -> int:
    """Bytes of memory that a process of this run may take at most: its GPU's, or its share of the machine's, which a container may have limited."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_properties(ranks.device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.exists() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

def measured_peak(ranks: Ranks) -> float:
    """FLOP/s of a large product on this device in the activations' dtype: the ceiling that MFU refers to."""
    from torch.utils.benchmark import Timer
    n = 8192 if ranks.device.type == "cuda" else 1024
    matrices = {name: torch.randn(n, n, device=ranks.device, dtype=ranks.dtype) for name in "ab"}
    timer = Timer("a @ b", globals=matrices, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / min(timer.timeit(4).mean for _ in range(4))

# ---- Data: shards of uint16 tokens --------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256


def open_shard(path: Path) -> np.ndarray:
    """A shard's tokens as a read-only map of uint16. RunError if it is not a whole shard of modded-nanogpt's and llm.c's format."""
    try:
        header, size = np.fromfile(path, dtype="<i4", count=HEADER_INTS), path.stat().st_size
    except OSError as error:
        raise RunError(f"cannot read shard {path}: {error.strerror}") from None
    require(len(header) == HEADER_INTS and header[0] == SHARD_MAGIC and header[1] == SHARD_VERSION,
            f"{path} is no token shard: it begins with {header[:2].tolist()}, wanted [{SHARD_MAGIC}, {SHARD_VERSION}]; "
            "make shards with data/tokenize_text.py")
    tokens, body = int(header[2]), size - 4 * HEADER_INTS
    require(not tokens > 0 or body not in (4 * tokens, 8 * tokens),
            f"{path} holds tokens of {body // max(tokens, 1)} bytes, wanted 2 (uint16); make the shard again with data/tokenize_text.py")
    require(tokens > 0 and body == 2 * tokens, f"{path} is truncated or empty: {size} bytes, its header promises {4 * HEADER_INTS + 2 * tokens}; "
            "delete it and fetch or make it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_INTS * 4)


def is_of_split(path: Path, split: str) -> bool:
    """Whether a shard's name says that it is of this split: the word stands between separators or ends, as in x_val_000000.bin and x_val.bin."""
    return re.search(rf"(^|[_.-]){split}([_.-]|$)", path.stem) is not None


def data_folder(config: Config) -> Path:
    """The folder of shards. A relative one that is not here is looked for beside this file."""
    return Path(config.data) if os.path.isdir(config.data) else Path(__file__).resolve().parent / config.data


def find_shards(config: Config, split: str) -> list[Path]:
    """
    The folder's shards of a split (train or val), sorted. Where some end in a number, as those of a series do, the others are not taken. RunError
    where there is none, and for a file whose name says both splits.
    """
    try:
        files = sorted(data_folder(config).glob("*.bin"))
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise RunError(f"cannot read the folder {config.data[:80]}: {error.strerror}; give --data a folder of shards") from None
    both = [file.name for file in files if is_of_split(file, "train") and is_of_split(file, "val")]
    require(not both, f"{config.data}: {', '.join(both)} says both train and val, so its split is not known; rename it")
    files = [file for file in files if is_of_split(file, split)]
    require(files, f"no {split} shards (*_{split}_*.bin) in {config.data}; ./run.sh prepares a track's data, data/tokenize_text.py makes shards of your "
            "own text")
    return [file for file in files if file.stem[-1].isdigit()] or files


def read_meta(folder: Path, must: bool = True) -> dict:
    """
    meta.json of a folder of shards, {} where there is none: vocab_size, and where it says so end_of_text (a token id), tokenizer and, for each split,
    sha256 {file name: hex}. RunError for a damaged one or another tool's; with must=False it then counts as none.
    """
    path, remedy = folder / "meta.json", "make the shards again, or give --vocab_size and delete it"
    if not path.exists():
        return {}
    try:
        meta = read_json(path, remedy)
        size, end = meta.get("vocab_size"), meta.get("end_of_text", 0)
        require(type(size) is int and 2 <= size <= 65_536, f"{path}: vocab_size is {size!r:.40}, wanted an integer from 2 to 65536; {remedy}")
        require(type(end) is int and 0 <= end < size, f"{path}: end_of_text is {end!r:.40}, wanted a token id below {size}; {remedy}")
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
    Fill in vocab_size and document_token from the folder's meta.json, which the scripts in data/ write, else GPT-2's. A larger --vocab_size only adds
    ids: documents go on beginning with the data's own token.
    """
    meta = read_meta(find_shards(config, "train")[0].parent, must=not config.vocab_size)
    data_size = meta.get("vocab_size", 257 if config.vocab_size == 257 else 50257)
    if not config.vocab_size:
        config.vocab_size = data_size
    if config.document_token < 0:
        config.document_token = meta.get("end_of_text", data_size - 1 if data_size <= config.vocab_size else config.vocab_size - 1)


def check_document_token(config: Config) -> str | None:
    """A warning, in one line, where the first training shard holds no token that begins a document; None otherwise. RunError if rows must begin there."""
    tokens = open_shard(find_shards(config, "train")[0])[:20_000_000]
    if not (config.document_mask or config.align_documents) or (tokens == config.end_of_text).any():
        return None
    text = f"the first {len(tokens):,} training tokens hold no id {config.end_of_text}, which begins a document; give its id by --document_token"
    require(not config.align_documents, f"{text}, or --no-align_documents")
    return f"warning: {text}, or --no-document_mask"


def sha256_of_files(folder: Path, names) -> dict[str, str]:
    """
    {name: sha256} of files in a folder, each read once: a hidden file there, .checked.json, remembers them by size and times. RunError for a file that
    cannot be read.
    """
    store, digests = folder / ".checked.json", {}
    try:
        known = read_json(store, "")
    except RunError:  # there is none, or it is damaged: all files are read
        known = {}
    before = dict(known)
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
    if known != before:
        try:
            write_atomically(store, lambda file: file.write(json.dumps(known).encode()))
        except RunError:  # a folder that cannot be written: files are read again next time
            pass
    return digests


def check_shards(config: Config):
    """RunError unless the folder's shards are those that its meta.json records, by name and sha256; where it records none, any will do."""
    folder = find_shards(config, "train")[0].parent
    meta = read_meta(folder, must=False)
    for split in ("train", "val"):
        recorded = meta.get(split, {}).get("sha256", {})
        there = {file.name for file in find_shards(config, split)}
        other = ", ".join(sorted(there ^ set(recorded)))[:200]
        require(not recorded or not other, f"{folder}: its {split} shards are not those that meta.json records ({other}); fetch or make them again")
        changed = [name for name, sha256 in sha256_of_files(folder, recorded).items() if sha256 != recorded[name]]
        require(not changed, f"{folder}: {', '.join(changed)[:200]} is not the file that meta.json describes (its sha256 differs); fetch or make it "
                "again, or delete meta.json and give --vocab_size")


def sha256_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_of_data(config: Config) -> str:
    """A short hash of the training shards' names, tokens and, where meta.json has them, sha256: equal where two runs read the same tokens."""
    hashes = read_meta(find_shards(config, "train")[0].parent, must=False).get("train", {}).get("sha256", {})
    shards = [[file.name, len(open_shard(file)), hashes.get(file.name)] for file in find_shards(config, "train")]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


MERGES_BYTES = 2 ** 26  # the largest file of merges that is read; GPT-4o's 200,000 merges have 3.6 MB


def read_merges(path: Path) -> dict[bytes, int]:
    """{token: id} of a .tiktoken file. RunError if it is none, or if its ids are not 0, 1, .. n-1 with every single byte among the tokens."""
    try:
        with open(path, "rb") as file:
            content = file.read(MERGES_BYTES + 1)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}; --tokenizer takes gpt2, bytes or a .tiktoken file") from None
    require(len(content) <= MERGES_BYTES,
            f"{path} is no .tiktoken file: it has more than {MERGES_BYTES:,} bytes; give gpt2, bytes or another file")
    merges = {}
    for number, line in enumerate(content.splitlines(), 1):
        match = re.fullmatch(rb"((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?) ([0-9]{1,9})", line)
        require(match or not line,
                f"{path} is no .tiktoken file: its lines must be a token in base64, a space and its id, and line "
                f"{number} is not")
        if match:
            merges[base64.b64decode(match[1])] = int(match[2])
    whole = sorted(merges.values()) == list(range(len(merges))) and all(bytes([b]) in merges for b in range(256))
    require(whole and b"" not in merges,
            f"{path} is no whole set of merges: ids must be 0 to n-1, each once, with all 256 single bytes; got "
            f"{len(merges)} tokens")
    return merges


def token_bytes(config: Config) -> np.ndarray | None:
    """
    UTF-8 bytes of every token id, 0 for the end of text; None where there are no merges (*.tiktoken) beside the shards. RunError for damaged ones.
    """
    if config.vocab_size == 257:
        return np.array([1] * 256 + [0])
    merges = next(find_shards(config, "val")[0].parent.glob("*.tiktoken"), None)
    if merges is None:
        return None
    ranks = read_merges(merges)
    sizes = np.zeros(max(config.vocab_size, max(ranks.values()) + 1), dtype=np.int64)
    sizes[list(ranks.values())] = [len(token) for token in ranks]
    return sizes


def checked(rows: np.ndarray, config: Config) -> np.ndarray:
    """Rows of tokens as int32. RunError for a token outside the vocabulary."""
    if rows.size and rows.max() >= config.vocab_size:
        raise RunError(f"token {rows.max()} in {config.data} is outside the vocabulary of {config.vocab_size}; give --vocab_size or shards of this "
                       "tokenizer")
    return rows.astype(np.int32)


def validation_batches(config: Config) -> list[np.ndarray]:
    """
    Batches (rows, sequence_length + 1) int32 of the first val_tokens tokens in order: as many rows each as a micro batch holds, fewer in the last one.
    Every row is in one of them, so that the loss does not depend on the size of a batch or the number of ranks.
    """
    T, parts, missing = config.sequence_length, [], config.val_tokens + 1
    for file in find_shards(config, "val"):
        parts.append(open_shard(file)[:missing])
        missing -= len(parts[-1])
    tokens = np.concatenate(parts)
    count = (len(tokens) - 1) // T
    require(count > 0, f"{len(tokens)} validation tokens in {config.data} do not fill a row of {T + 1}; lower --sequence_length or add data")
    rows = checked(np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[:count * T:T], config)
    size = max(1, config.micro_batch_tokens // T)
    return [rows[start:start + size] for start in range(0, count, size)]


class TokenLoader:
    """
    Endless batches of rows of sequence_length + 1 tokens, read one batch ahead on another thread. The order of rows depends on the seed alone: shards by
    name, the rows of each in an order drawn from (seed, epoch, shard). Rank r of w takes the r-th of w equal parts of every batch.
    """
    def __init__(self, config: Config, rank: int = 0, world: int = 1):
        self.files, self.config, self.rank, self.world = find_shards(config, "train"), config, rank, world
        self.rows, rest = divmod(config.batch_tokens // config.sequence_length, world)
        if rest or not self.rows:
            raise RunError(f"{self.rows * world + rest} rows of {config.sequence_length} tokens cannot be shared by {world} ranks; change --batch_tokens or the number of ranks")
        self.total, self.thread, self.ahead = sum(len(open_shard(file)) for file in self.files), ThreadPoolExecutor(1), None
        self.load_state_dict(dict(epoch=0, shard=0, row=0))

    def load_state_dict(self, state: dict):
        """Go to where a batch's state was taken, see next_batch(); takes effect before the first of them."""
        self.state = {name: int(state[name]) for name in ("epoch", "shard", "row")}
        self.epoch, self.shard, self.row = self.state.values()
        require(self.shard < len(self.files),
                f"the checkpoint stood in training shard {self.shard + 1}, but {self.config.data} has {len(self.files)}; give the same shards")
        self._open()

    def _open(self):
        T, self.tokens = self.config.sequence_length, open_shard(self.files[self.shard])
        if self.shard + 1 < len(self.files) and hasattr(os, "posix_fadvise"):  # the next shard is read from disk meanwhile
            with open(self.files[self.shard + 1], "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        order = np.random.default_rng([self.config.seed, self.epoch, self.shard])
        if self.config.align_documents:
            documents, starts, place = np.flatnonzero(self.tokens == self.config.end_of_text), [], 0
            while (i := np.searchsorted(documents, place)) < len(documents) and documents[i] + T < len(self.tokens):
                starts.append(documents[i])
                place = documents[i] + T
        else:
            starts = range(order.integers(min(T, max(len(self.tokens) - T, 1))), len(self.tokens) - T, T)
        self.starts = order.permutation(np.array(starts, dtype=np.int64))
    def _read(self) -> tuple[Tensor, dict]:
        T, places, opened = self.config.sequence_length, [], 0
        while len(places) < self.rows * self.world:
            if self.row >= len(self.starts):
                self.shard, self.row, opened = (self.shard + 1) % len(self.files), 0, opened + 1
                self.epoch += self.shard == 0
                self._open()
                if opened > len(self.files) and not places:
                    raise RunError(f"no shard in {self.config.data} holds a row of {T + 1} tokens{' that begins a document' * self.config.align_documents}; lower --sequence_length or add data")
            taken = self.starts[self.row:self.row + self.rows * self.world - len(places)]
            places += [(self.tokens, start) for start in taken]
            self.row += len(taken)
        own = places[self.rank * self.rows:(self.rank + 1) * self.rows]
        rows = torch.from_numpy(checked(np.stack([tokens[start:start + T + 1] for tokens, start in own]), self.config))
        return rows.pin_memory() if torch.cuda.is_available() else rows, dict(epoch=self.epoch, shard=self.shard, row=self.row)
    def next_batch(self) -> tuple[Tensor, dict]:
        """(this rank's rows (rows, sequence_length + 1) int32 on the host, the loader's state after them, which is also its .state)."""
        rows, self.state = (self.ahead or self.thread.submit(self._read)).result()
        self.ahead = self.thread.submit(self._read)
        return rows, self.state


# ---- Logs and checkpoints -----------------------------------------------------------------------------------------------------------------------------

CHECKPOINT = "knotgpt-2"  # the format's name
CHECKPOINT_FIELDS = dict(config=dict, step=int, train_seconds=float, loader=dict, curve=list, train_curve=list, rng=list, model=dict, optimizers=list,
                         data=dict, sources=dict)


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
    """write(file) under a temporary name, then rename: whatever happens, `path` is whole. RunError where the disk refuses."""
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
        raise RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free some space or choose another folder") from None


def digest_of(value, digest=None) -> str:
    """The sha256 (hex) of a checkpoint's contents: dicts, lists, tuples, tensors (with dtype and shape), numbers and text, one in another."""
    digest = digest or hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict | list | tuple):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        for item in (part for pair in value.items() for part in pair) if isinstance(value, dict) else value:
            digest_of(item, digest)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: dict):
    """Write the state of a run, a dict with CHECKPOINT_FIELDS, or what read_checkpoint returned, with its digest. RunError where the disk refuses."""
    state = dict(format=CHECKPOINT) | {name: state[name] for name in CHECKPOINT_FIELDS if name in state}
    write_atomically(path, lambda file: torch.save(state | dict(digest=digest_of(state)), file))


def read_checkpoint(path: str | Path) -> dict:
    """
    Return a checkpoint's contents, tensors on the CPU, after its digest; nothing in the file is executed, and nothing is unpacked beyond its size.
    RunError, one line, if it is none of this trainer's, or damaged.
    """
    whole = f"{path} is not a whole checkpoint of this trainer"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        names = {entry.filename for entry in entries}
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries) and len(names) == len(entries)
        if not plain or sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise ValueError("packed or repeated entries")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = digest_of({name: value for name, value in saved.items() if name != "digest"}) if isinstance(saved, dict) else None
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:
        raise RunError(f"{whole} ({type(error).__name__}); give another one") from None
    require(isinstance(saved, dict) and saved.get("format") == CHECKPOINT,
            f"{path} is not a checkpoint of this trainer, or of an older one; give a .pt file from its log folder")
    require(saved.get("digest") == found, f"{whole}: its contents are not those that were written (their sha256 differs); give an earlier one")

    for name, kind in CHECKPOINT_FIELDS.items():
        require(type(saved.get(name)) is kind, f"{whole}: {name} is no {kind.__name__}; give another one")
    require(0 <= saved["step"] <= RANGES["steps"][1] and 0 <= saved["train_seconds"] < math.inf, f"{whole}: its step or time is impossible; give another one")
    try:
        json.dumps([saved[name] for name in ("curve", "train_curve", "data", "sources")])  # all of it goes into the run's JSON
    except (TypeError, ValueError, RecursionError):
        raise RunError(f"{whole}: its curves, data or sources hold what no JSON can; give another one") from None
    place = [saved["loader"].get(name) for name in ("epoch", "shard", "row")]
    require(all(type(number) is int and number >= 0 for number in place), f"{whole}: its place in the data is {place}; give another one")
    require(all(isinstance(tensor, Tensor) for tensor in (*saved["model"].values(), *saved["rng"])), f"{whole}: its model is no tensors; give another one")
    points = [isinstance(p, dict) and type(p.get("step")) is int and type(p.get("val_loss")) is float for p in saved["curve"]]
    points += [isinstance(p, list) and [type(value) for value in p] == [int, float] for p in saved["train_curve"]]
    require(all(points), f"{whole}: its curves are no steps and losses; give another one")
    names = [isinstance(name, str) and isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*", name) for name, value in saved["sources"].items()]
    require(all(names), f"{whole}: its sources are no modules and their sha256; give another one")
    saved["config"] = dataclasses.asdict(config_from(saved["config"], str(path)))
    return saved


def find_checkpoint(name: str, log_dir: str | Path = "logs") -> Path:
    """
    The checkpoint that a person means by `name`: a file's path, a run's id or the beginning of one that no other run in log_dir has, or "last", the
    newest there. RunError if there is none, or several.
    """
    if os.path.exists(name) or "/" in name or name.endswith(".pt"):
        return Path(name)
    files = sorted(Path(log_dir).glob("*.pt"), key=lambda file: file.stat().st_mtime)
    ends = [file for file in files if not re.search(r"-step\d{6,}$", file.stem)]
    exact = [file for file in files if file.stem == name]
    found = ends[-1:] if name == "last" else exact or [file for file in ends if file.stem.startswith(name)]
    require(found, f"there is no checkpoint of a run {name!r} in {log_dir} ({len(ends)} runs); give a .pt file, a run's id, its beginning, or last")
    require(len(found) == 1, f"{name!r} is the beginning of {len(found)} runs: {', '.join(file.stem for file in found[-4:])}; give more of it")
    return found[0]


def sources_of_run() -> dict[str, str]:
    """{module: source text} of this file and of the variants and kernels that have been loaded."""
    loaded = [m for name, m in sorted(sys.modules.items()) if name.split(".")[0] in ("variants", "kernels") and getattr(m, "__file__", None)]
    return {m.__name__: inspect.getsource(m) for m in [sys.modules[__name__], *loaded]}


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def changed_sources(saved: dict) -> list[str]:
    """The modules whose source is not the one that a checkpoint's run had, by the sha256 that it holds; their files are read, nothing is imported."""
    root, changed = Path(__file__).resolve().parent, []
    for module, sha256 in saved.get("sources", {}).items():
        files = [root.joinpath(*module.split(".")).with_suffix(".py"), root.joinpath(*module.split("."), "__init__.py")]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
        if sha256 not in [sha256_of_text(text) for text in texts]:
            changed.append(module)
    return changed


def command_output(*command: str) -> str:
    """What a program prints, "" where it is not there or fails to answer."""
    try:
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30, cwd=Path(__file__).resolve().parent)
        return result.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def environment(ranks: Ranks) -> dict:
    """What another needs to know to repeat the run."""
    info = Path("/proc/cpuinfo")  # Linux; elsewhere Python's own word for the processor
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", text)), platform.processor() or platform.machine())
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    triton = next((d.version for d in metadata.distributions(name="triton")), "not installed")

    root = Path(__file__).resolve().parent
    top = command_output("git", "rev-parse", "--show-toplevel")
    own = bool(top) and Path(top).resolve() == root  # a folder inside another repository has no commit of its own
    return dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, triton=triton, device=device,
                platform=platform.platform(), world_size=ranks.world, threads=torch.get_num_threads(),
                git_commit=command_output("git", "rev-parse", "HEAD") if own else "",
                git_dirty=own and bool(command_output("git", "status", "--porcelain", "--untracked-files=no")),
                command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def new_run_id(config: Config, ranks: Ranks) -> str:
    """A name such as 1130-0412-cpu-my_mlp-s1-7f3a: month and day, time, track, variants, seed, four random digits; the same on all ranks."""
    stamp = ranks.agree((int(time.strftime("%m%d%H%M")) << 16 | secrets.randbits(16)) * (ranks.rank == 0))
    names = "+".join(variant.partition(":")[0] for variant in config.variant)[:40] or "baseline"
    moment = f"{stamp >> 16:08d}"
    return f"{moment[:4]}-{moment[4:]}-{config.track}-{names}-s{config.seed}-{stamp & 0xffff:04x}"


def json_text(value, indent: int | None = None) -> str:
    """JSON in which bytes that a locale without UTF-8 could not decode, as of a folder's name, are the characters that they are in UTF-8."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class RunLog:
    """
    logs/<run id>.txt, line by line, and logs/<run id>.json from `facts`. Only rank 0 writes. On a terminal one line is rewritten in place. Nothing is
    on the disk before begin(). While a run goes on its log is locked, so that no second one writes there.
    """

    def __init__(self, config: Config, rank: int, resumed: bool):
        """RunError if the id is taken by another run, or this one is still under way, or the folder cannot be written."""
        self.main = rank == 0
        self.terminal = sys.stdout.isatty()
        self.open_line = False              # whether the terminal's last line is a passing state
        self.shown = 0.0                    # when progress was last shown, time.perf_counter()
        self.facts = {}                     # what the JSON holds
        self.file = None                    # the log, open from begin() on
        self.text, self.json, self.checkpoint = (Path(config.log_dir) / f"{config.run_id}.{kind}" for kind in ("txt", "json", "pt"))
        if not self.main:
            return
        try:
            self.text.parent.mkdir(parents=True, exist_ok=True)
            for file in () if resumed else (self.text, self.json, self.checkpoint):
                require(not file.exists(), f"{file} exists: a run's id is its own; go on with --resume {self.checkpoint}, or choose another --run_id, "
                        "or delete its files")
            if resumed and self.text.exists():
                self.file = open(self.text, "r+", encoding="utf-8", errors="replace", newline="\n")
                self._lock()
                self._mend()
            for left in self.text.parent.glob(f".{config.run_id}[.-]*"):  # of a run that was killed while it wrote
                left.unlink(missing_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {self.text}: {error.strerror}; choose another --log_dir") from None

    def _lock(self):
        if fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"the run {self.text.stem} is still under way: {self.text} is locked; wait for it or stop it") from None

    def _mend(self):
        """Cut off what a killed process left unfinished at the end of the log: half a line, or a header without its end; later lines follow."""
        content = self.text.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        header = whole.rfind(b"# ---- train_gpt\n")
        if header > 0 and whole.count(b"\n" + b"=" * 100 + b"\n", header) < 2:
            whole = whole[:header]
        self.file.truncate(len(whole))
        self.file.seek(0, os.SEEK_END)

    def begin(self, header: str):
        """Write the header. A new log appears under its name only when it has all of it."""
        if not self.main:
            return
        try:
            if self.file is None:
                temporary = self.text.with_name(f".{self.text.name}.{os.getpid()}")
                self.file = open(temporary, "w", encoding="utf-8", errors="replace", newline="\n")
                self._lock()
                self.file.write(header + "\n")
                self.file.flush()
                try:
                    os.link(temporary, self.text)  # unlike a rename it fails where the name has been taken meanwhile
                except FileExistsError:
                    raise RunError(f"{self.text} exists: another run has just begun under this id; choose another --run_id") from None
                except OSError:  # a file system without links
                    os.rename(temporary, self.text)
                finally:
                    temporary.unlink(missing_ok=True)
            else:
                self.file.write(header + "\n")
            self.file.reconfigure(line_buffering=True)
        except OSError as error:
            raise RunError(f"cannot write {self.text}: {error.strerror}; choose another --log_dir") from None

    def write(self, text: str, console: bool = False):
        """Add lines to the log and, if asked, to the console."""
        if not self.main:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.text}: {error.strerror}; free some space; the finished steps are kept") from None
        if console:
            self.show(text)

    def show(self, text: str):
        """Lines for the console alone."""
        if self.main:
            say(("\r\033[K" if self.open_line else "") + text)
            self.open_line = False

    def kept(self, step: int) -> Path:
        return self.checkpoint.with_stem(f"{self.checkpoint.stem}-step{step:06d}")

    def due(self) -> bool:
        """Whether it is time to show progress: every second on a terminal, every ten seconds elsewhere."""
        return time.perf_counter() - self.shown >= (1 if self.terminal else 10)

    def progress(self, text: str):
        """Show a passing state."""
        self.shown, self.open_line = time.perf_counter(), self.terminal
        if self.main and self.terminal:
            say(f"\r\033[K{text}", end="")
        elif self.main:
            say(text)

    def save_facts(self, **facts):
        self.facts.update(facts)
        if self.main and self.file:
            write_atomically(self.json, lambda file: file.write(json_text(self.facts, indent=1).encode()))

# ---- Training -----------------------------------------------------------------------------------------------------------------------------------------

class Trainer:
    """One run, from its configuration to its last checkpoint. replaced: variant -> names of this module that it replaced, for the record."""

    def __init__(self, config: Config, replaced: dict | None = None):
        saved = read_checkpoint(config.resume) if config.resume else None
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.ranks = Ranks.start(config)

        # data
        adopt_vocabulary(config)
        if self.ranks.rank == 0:
            check_shards(config)
        warning = check_document_token(config)
        val_sha256 = {file.name: sha256_of_file(file) for file in find_shards(config, "val")}
        self.data = dict(val_sha256=val_sha256, train=identity_of_data(config))
        if saved and saved["data"] != self.data:
            kind = "validation" if saved["data"].get("val_sha256") != val_sha256 else "training"
            raise RunError(f"{config.data} does not hold the {kind} shards of {config.resume}; give --data the folder that the run began with")
        self.loader = TokenLoader(config, self.ranks.rank, self.ranks.world)
        self.val_batches = validation_batches(config)
        self.val_tokens = sum(batch[:, 1:].size for batch in self.val_batches)
        sizes = token_bytes(config)
        self.bytes_per_token = None  # of the validation tokens, in UTF-8; None where there are no merges beside the shards
        if sizes is not None:
            self.bytes_per_token = sum(int(sizes[batch[:, 1:]].sum()) for batch in self.val_batches) / self.val_tokens
        names = [*val_sha256, *val_sha256.values()]
        self.target = config.target if any(name.startswith(config.target_data) for name in names) else 0.0  # 0: none is known for these data

        # model
        fit = max(1, config.micro_batch_tokens // config.sequence_length)
        self.micro_rows = max(n for n in range(1, min(fit, self.loader.rows) + 1) if self.loader.rows % n == 0)
        needed, there = memory_needed(config, self.ranks.dtype), memory_of_machine(self.ranks)
        require(config.dry_run or needed <= there, f"this run needs at least {needed:,} bytes of memory and there are {there:,}; choose a smaller model or "
                "--micro_batch_tokens")
        self.costs = measure_model(config) | dict(memory_needed=needed, memory_of_machine=there)
        self._settle_compilation()
        self.step = 0
        self.train_seconds = 0.0            # on the clock so far
        self.clock = None                   # when it was last started, time.perf_counter(); None while it stands
        self.stop_signal = 0                # number of the signal that asked to stop
        self.loss = None                    # this rank's mean loss of the last step, a tensor that may still be computed
        self.train_loss = None              # the last training loss that is known, a number
        self.loss_on_its_way = None         # (step, copy on the host, event or None) of a training loss
        self.loss_taken = 0.0               # when that was taken, time.perf_counter()
        self.step_seconds = []              # of every step of this process
        config.run_id = config.run_id or new_run_id(config, self.ranks)
        if config.dry_run:
            return
        self.log = RunLog(config, self.ranks.rank, resumed=bool(saved))
        self.model = build_model(config, self.ranks)
        self._write_header(replaced or {})
        if warning:
            self.log.write(warning, console=True)
        if config.init_from and not saved:
            self._load_matching(config.init_from)
        self.optimizers = build_optimizers(self.model, config, self.ranks)
        if saved:
            self.load_state_dict(saved)
            self.loader.load_state_dict(saved["loader"])
            changed = changed_sources(saved) if self.ranks.rank == 0 else []
            if changed:
                self.log.write(f"warning: {', '.join(changed)} changed since {config.resume} was written", console=True)
            self.log.write(f"resumed from {config.resume} at step {self.step}", console=True)

    def _settle_compilation(self):
        """Without a working compiler compile = auto becomes off, with a line; what was asked for by name is a fault."""
        if compile_mode(self.config, self.ranks) == "off":
            return
        fault = compiler_fault(self.ranks.device)
        if self.ranks.agree(int(fault is not None)):
            fault = fault or "on another rank"
            require(self.config.compile == "auto", f"torch.compile does not work here ({fault}); mend it or use --compile off")
            self.config.compile = "off"
            if self.ranks.rank == 0:
                say(f"torch.compile does not work here ({fault}): the run goes on without", stream=sys.stderr)

    def _write_header(self, replaced: dict):
        config, log, ranks = self.config, self.log, self.ranks
        sources = sources_of_run()
        facts = log.facts = dict(
            run_id=config.run_id, status="running", config=dataclasses.asdict(config), **environment(ranks), seed=config.seed, replaced=replaced,
            **self.costs, peak_flops=measured_peak(ranks), dtype=str(ranks.dtype).removeprefix("torch."), compile=compile_mode(config, ranks),
            train_tokens_available=self.loader.total, train_data=self.data["train"], val_tokens=self.val_tokens,
            val_bytes_per_token=self.bytes_per_token, val_sha256=self.data["val_sha256"], target=self.target,
            sources={name: sha256_of_text(text) for name, text in sources.items()})
        self.sources = facts["sources"]
        log.begin("\n".join([
            "\n".join(f"# ---- {name}\n{text}" for name, text in sources.items()), "=" * 100,
            f"Running Python {facts['python']}, PyTorch {facts['torch']} compiled for CUDA {facts['cuda']}, Triton {facts['triton']}",
            f"facts: {json_text(facts)}", command_output("nvidia-smi") if ranks.device.type == "cuda" else "no GPU", "=" * 100]))
        facts["curve"], facts["train_curve"] = [], []  # train_curve: [[step, loss], ...], of rank 0's rows
        length = f"{config.time_budget:.0f} s" if config.time_budget else f"{config.steps} steps"
        log.show(f"run {config.run_id}: track {' + '.join((config.track, *config.variant))}, {facts['parameters'] / 1e6:.2f}M parameters, "
                 f"{length} of {config.batch_tokens} tokens on {ranks.world} x {ranks.device.type} in {facts['dtype']}, compile {facts['compile']}; "
                 f"log {log.text}")

    def _load_matching(self, path: str):
        """Start from another run's tensors where name and shape agree; say which did and which did not."""
        saved, own = read_checkpoint(path)["model"], self.model.state_dict()
        matching = {name: saved[name] for name in own if name in saved and saved[name].shape == own[name].shape}
        require(matching, f"no tensor of {path} has the name and shape of one in this model; it is of another architecture")
        self.model.load_state_dict(matching, strict=False)
        for title, names in dict(loaded=matching, new=own.keys() - matching, unused=saved.keys() - matching).items():
            self.log.write(f"init_from {path}: {len(names)} tensors {title}{': ' * bool(names)}{', '.join(sorted(names))}", console=True)

    def state_dict(self) -> dict:
        """A copy of all that a step changes. Collective. Tensors are copies of their own, not views of a bucket; one of several names is copied once."""
        copies = {}

        def copy(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            return copies.setdefault(key, tensor.clone()) if tensor.numel() else tensor.clone()
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if self.ranks.device.type == "cuda" else [])
        facts = self.log.facts
        return dict(step=self.step, train_seconds=self.train_seconds, loader=self.loader.state, curve=facts["curve"], train_curve=facts["train_curve"],
                    rng=rng, model={name: copy(tensor) for name, tensor in self.model.state_dict().items()},
                    optimizers=[o.state_dict() for o in self.optimizers])

    def load_state_dict(self, saved: dict):
        try:
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(saved["rng"][0])
            if self.ranks.device.type == "cuda" and len(saved["rng"]) > 1:
                torch.cuda.set_rng_state(saved["rng"][1])
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise RunError(f"{self.config.resume} holds another model than this configuration builds, or is of an older trainer: "
                           f"{str(error).splitlines()[-1].strip()}") from None
        self.step, self.train_seconds = saved["step"], saved["train_seconds"]
        self.log.facts |= dict(curve=saved["curve"], train_curve=saved["train_curve"])

    def train_step(self, rows: Tensor, progress: float) -> Tensor:
        """One optimizer step on this rank's rows (n, T + 1), at progress in [0, 1); returns this rank's mean loss, without waiting for the device."""
        loss, parts, lr_factor = 0.0, rows.split(self.micro_rows), min(1.0, (1 - progress) / max(self.config.decay_fraction, 1e-9))
        self.model.set_windows(progress)
        for index, part in enumerate(parts):
            if index == len(parts) - 1 and self.ranks.world > 1:
                reducing = []
                for optimizer in self.optimizers:
                    optimizer.start(lr_factor, progress, reducing)
            part_loss = self.model(part[:, :-1].contiguous(), part[:, 1:].contiguous())
            (part_loss / (len(parts) * self.ranks.world)).backward()
            loss = loss + part_loss.detach() / len(parts)
        for optimizer in self.optimizers:
            optimizer.step(lr_factor, progress)
        return loss

    @torch.no_grad()
    def validate(self, batches: list[np.ndarray]) -> float:
        """Mean loss in nats a token over all rows of the batches (rows, T + 1), whatever their sizes."""
        self.model.eval()
        self.model.set_windows(1.0)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for batch in batches[self.ranks.rank::self.ranks.world]:
            rows = torch.from_numpy(batch).to(self.ranks.device)
            total += self.model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).double() * len(batch)
        if self.ranks.world > 1:
            dist.all_reduce(total)
        self.model.train()
        return total.item() / sum(map(len, batches))

    def warm_up(self) -> float:
        """Compile and run every shape and window stage on dummy rows, then put everything back exactly. Returns seconds."""
        start, kept, stages = self._now(), self.state_dict(), len(self.config.window_long)
        shape = (self.loader.rows, self.config.sequence_length + 1)
        rows = torch.randint(self.config.vocab_size, shape, dtype=torch.int32).to(self.ranks.device)
        for stage in range(stages):
            self.train_step(rows, stage / stages)
        shapes = {len(batch): batch for batch in self.val_batches}
        self.validate([batch for batch in shapes.values() for _ in range(self.ranks.world)])
        self.load_state_dict(kept)
        return self._now() - start

    def run(self) -> int:
        """Train to the end or until a signal. Returns the exit code."""
        config, log, ranks = self.config, self.log, self.ranks
        compile_model(self.model, compile_mode(config, ranks))
        log.progress("compiling and warming up")
        log.save_facts(warmup_seconds=self.warm_up())
        log.write(f"warm-up, compilation included, not timed: {log.facts['warmup_seconds']:.1f} s", console=True)
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's background jobs leave it
                signal.signal(number, self._on_signal)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        saved_at, self.clock = time.perf_counter(), self._now()
        self._measure_progress()
        while self.progress < 1:
            # before the validation, which a run that goes on from here repeats
            if config.keep_every and self.step % config.keep_every == 0 and not log.kept(self.step).exists():
                with self._clock_stopped():
                    self._save(log.kept(self.step))
            if config.val_every and self.step % config.val_every == 0:
                with self._clock_stopped():
                    self._validate_and_log()

            begun = time.perf_counter()
            rows, _ = self.loader.next_batch()
            self.loss = self.train_step(rows.to(ranks.device, non_blocking=True), self.progress)
            self.step += 1
            self._measure_progress()
            log.write(f"step:{self.step}/{self.steps} {self._times()}")
            self._note_train_loss()
            if log.due():
                self._show_progress()
            self.step_seconds.append(time.perf_counter() - begun)

            # what all ranks do now: 0 go on, 1 save and go on, 2 save and stop
            action = ranks.agree(2 if self.stop_signal else int(ranks.rank == 0 and time.perf_counter() - saved_at > config.checkpoint_seconds))
            if action:
                with self._clock_stopped():
                    self._save(log.checkpoint, must=action == 2)
                if action == 2:
                    return self._stopped()
                saved_at = time.perf_counter()
        with self._clock_stopped():
            self._validate_and_log()
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
        """progress: the part of the run that is done, in [0, 1], of its steps or of its time budget as rank 0 measures it; steps: how many it will take."""
        if self.config.time_budget:
            self.ranks.synchronize()
            microseconds = self.ranks.agree(int(1e6 * self._elapsed()) * (self.ranks.rank == 0))
            self.progress = min(1.0, microseconds / 1e6 / self.config.time_budget)
            self.steps = math.ceil(self.step / max(self.progress, 1e-9))
        else:
            self.progress, self.steps = self.step / self.config.steps, self.config.steps
    def _times(self) -> str:
        milliseconds = 1000 * self._elapsed()
        return f"train_time:{milliseconds:.0f}ms step_avg:{milliseconds / max(self.step, 1):.2f}ms"
    def _mfu(self, tokens_per_second: float) -> float:
        return tokens_per_second * self.log.facts["flops_per_token"] / self.log.facts["peak_flops"] / self.ranks.world

    def _note_train_loss(self):
        """
        Put a training loss into log and JSON, at most ten a second and 4,000 in all, and never wait for a GPU: the loss is copied on the device's own
        queue and read when it has come. RunError for one that is no finite number.
        """
        now = time.perf_counter()
        if self.loss_on_its_way is None and now - self.loss_taken >= 0.1:
            self.loss_taken, copy, event = now, self.loss, None
            if self.loss.is_cuda:  # into pinned memory: a copy into other memory waits for the device
                copy = torch.empty_like(self.loss, device="cpu", pin_memory=True).copy_(self.loss, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self.loss_on_its_way = self.step, copy, event
        if self.loss_on_its_way is None or self.loss_on_its_way[2] and not self.loss_on_its_way[2].query():
            return
        step, copy, _ = self.loss_on_its_way
        self.train_loss, self.loss_on_its_way, curve = copy.item(), None, self.log.facts["train_curve"]
        if not math.isfinite(self.train_loss) and self.log.main:  # one rank's fault is everybody's a step later; the first one speaks
            raise RunError(f"the training loss is {self.train_loss} at step {step}; lower the learning rates or look at the variant's arithmetic; "
                           f"finished steps are in {self.log.text}")
        self.log.write(f"train_loss:{self.train_loss:.4f} of step {step}")
        curve.append([step, self.train_loss])
        if len(curve) >= 4000:
            curve[:] = curve[::2]

    def _show_progress(self):
        average = self._elapsed() / self.step
        rate, left = self.config.batch_tokens / average, int((self.steps - self.step) * average)
        loss = "-" if self.train_loss is None else f"{self.train_loss:.4f}"
        self.log.progress(f"step {self.step}/{self.steps}  loss {loss}  {rate:,.0f} tokens/s  {1000 * average:.1f} ms/step  "
                          f"MFU {100 * self._mfu(rate):.1f} %  {left // 60}:{left % 60:02d} left")

    def _validate_and_log(self):
        loss, log = self.validate(self.val_batches), self.log
        bits = loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
        log.write(f"step:{self.step}/{self.steps} val_loss:{loss:.4f} {self._times()}", console=True)
        log.write(f"val_bits_per_byte:{bits:.4f}" if bits else "val_bits_per_byte: unknown, no .tiktoken file beside the shards", console=self.progress == 1)
        if not math.isfinite(loss):
            raise RunError(f"the validation loss is {loss} at step {self.step}; lower the learning rates or look at the variant's arithmetic")
        tokens = torch.from_numpy(self.val_batches[0][:, :-1]).to(self.ranks.device)
        statistics = dict(stream=stream_statistics(self.model, tokens)) if self.config.stream_statistics else {}
        point = dict(step=self.step, tokens=self.step * self.config.batch_tokens, train_ms=1000 * self._elapsed(), val_loss=loss, val_bits_per_byte=bits,
                     train_loss=self.loss.item() if self.loss is not None else None, **statistics)
        before = [earlier for earlier in log.facts["curve"] if earlier["step"] < self.step]  # a finished run that is resumed validates again
        log.save_facts(curve=before + [point])

    def _save(self, path: Path, must: bool = False):
        """Write a checkpoint, if the run wants any. Collective."""
        if not self.config.save:
            return
        state = dict(config=dataclasses.asdict(self.config), data=self.data, sources=self.sources, **self.state_dict())
        try:
            if self.log.main:
                write_checkpoint(path, state)
        except RunError as error:  # a run is worth more than one of its checkpoints, and the one before is still whole
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
        config, log, last = self.config, self.log, self.log.facts["curve"][-1]
        rate = config.batch_tokens * self.step / self.train_seconds
        if self.ranks.device.type == "cuda":
            allocated, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        else:
            import resource  # not on every system; the process' own peak, in KiB on Linux
            allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
        facts = dict(status="finished", step=self.step, val_loss=last["val_loss"], val_bits_per_byte=last["val_bits_per_byte"],
                     train_seconds=self.train_seconds, ms_per_step=1000 * self.train_seconds / self.step, tokens_per_second=rate, mfu=self._mfu(rate),
                     peak_memory_mib=allocated, peak_memory_reserved_mib=reserved)
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
        target = f"{self.target} nats a token: {reached}" if self.target else "none is known for these data; compare.py measures against the baseline"
        files, following = f"{log.text} (the record), .json", f"./run.sh compare baseline {'+'.join(config.variant) or 'VARIANT'} --seeds 6"
        if config.save:
            files += ", .pt (the checkpoint)"
            following = f"./run.sh generate --checkpoint {config.run_id} --prompt TEXT, or {following}"
        log.show(f"loss    {facts['val_loss']:.4f} nats a token{bits}, over {self.val_tokens:,} validation tokens")
        log.show(f"time    {minutes}:{seconds:02d} of training, {facts['ms_per_step']:.1f} ms a step, {rate:,.0f} tokens/s, {allocated:,} MiB, "
                 f"MFU {100 * facts['mfu']:.0f} %{self._swinging()}")
        log.show(f"target  {target}")
        log.show(f"files   {files}")
        log.show(f"next    {following}")
        return 0

    def _swinging(self) -> str:
        """A remark where a tenth of the steps took more than twice the median: other work has shared the machine, and times mean little."""
        if self.ranks.device.type == "cuda" or len(self.step_seconds) < 20:
            return ""
        ordered = sorted(self.step_seconds)
        median, late = ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10]
        if late <= 2 * median:
            return ""
        return f"; steps swing ({1000 * median:.0f} ms the median, {1000 * late:.0f} a tenth): other work shares this machine, fewer --threads may help"

    def describe(self):
        """What --dry_run prints."""
        config, costs = self.config, self.costs
        steps = config.steps or max(1, config.tokens // config.batch_tokens)
        flops = costs["flops_per_token"] * config.batch_tokens * steps
        length = f"{config.time_budget:.0f} s" if config.time_budget else f"{steps:,} steps"
        names = " + ".join((config.track, *config.variant))
        say(f"run     track {names}, seed {config.seed}, on {self.ranks.world} x {self.ranks.device.type}, compile {compile_mode(config, self.ranks)}")
        say(f"model   {costs['parameters']:,} parameters, {costs['parameters_without_embeddings']:,} of them in blocks; "
            f"{costs['flops_per_token']:,.0f} FLOPs a token")
        say(f"plan    {length} of {config.batch_tokens:,} tokens, {flops:.3g} FLOPs; validation on {self.val_tokens:,} tokens every {config.val_every} steps")
        say(f"memory  at least {costs['memory_needed'] >> 20:,} MiB of {costs['memory_of_machine'] >> 20:,}")
        say(f"time    {self._expected_time(flops)}")

    def _expected_time(self, flops: float) -> str:
        """In words, from the last finished run of this track on a machine such as this one, by FLOPs."""
        if self.config.time_budget:
            return f"{self.config.time_budget:.0f} s of training, as asked"
        device = environment(self.ranks)["device"]
        for file in sorted(Path(self.config.log_dir).glob("*.json"), key=lambda file: -file.stat().st_mtime):
            try:
                run = read_json(file, "")
                alike = [run["status"], run["config"]["track"], run["device"], run["world_size"]] == ["finished", self.config.track, device, self.ranks.world]
                spent = run["flops_per_token"] * run["config"]["batch_tokens"] * run["step"]
                if alike and spent > 0:
                    return f"about {run['train_seconds'] * flops / spent:.0f} s of training, as {run['run_id']} computed; validation and start come besides"
            except (RunError, KeyError, TypeError):
                continue  # another program's file, or an older trainer's
        return f"not known: no finished run of track {self.config.track} on this machine in {self.config.log_dir}"


STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]  # what ends a run with a checkpoint


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0 finished, 1 a fault (one line on stderr), 128 + n stopped by signal n."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    trainer, loader = None, None
    try:
        config = parse_config(argv)
        loader = __import__("variants") if config.variant else None
        with loader.applied(config.variant, config) if loader else nullcontext({}) as replaced:
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
            fault = f"torch.compile failed ({type(error).__name__}: {' '.join(str(error).split())[:120]}); use --compile off; details are in the log"
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
    End the process. One rank of several leaves without Python's own end: a thread of gloo that frees a tensor meanwhile, which a busy machine lets
    happen, would abort it ("terminate called without an active exception").
    """
    if alone:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        say("", end="", stream=stream)  # which flushes it
    os._exit(code)


if __name__ == "__main__":
    import train_gpt  # the one trainer module, by name
    train_gpt.leave(train_gpt.main(), alone=os.environ.get("WORLD_SIZE", "1") == "1")
