"""
Topological attention, the reference: the formula of __init__.py with the whole matrix of scores. The file also holds
what all backends share: the list of arguments, their checks, and constants.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
LOWEST = -1e30              # the potential of no key at all: finite, as it is subtracted from itself
CHUNK = 32                  # tokens of a chunk of loglinear's loops, by which FLOPs are counted too

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)

# the arguments as the schema of an operation has them
SCHEMA = (
    "Tensor? query_coord, Tensor? key_coord, Tensor value, Tensor? log_decay, Tensor? key_bias, Tensor? doc_start, "
    "SymInt? window"
)


class Arguments(NamedTuple):
    """The arguments of every backend, in their order; topological_attention says what they are."""
    query_coord: Tensor | None          # (B, T, H)
    key_coord: Tensor | None            # (B, T, Hkv)
    value: Tensor                       # (B, T, Hkv, D)
    log_decay: Tensor | None = None     # (B, T, H)
    key_bias: Tensor | None = None      # (B, T, Hkv)
    doc_start: Tensor | None = None     # (B, T)
    window: int | None = None

    @property
    def floats(self) -> tuple[Tensor | None, ...]:
        """The five floating tensors, which have gradients, in their order."""
        return self[:5]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of sums."""
        return compute_dtype(*self[:5])

    @property
    def heads(self) -> int:
        """H, the number of the queries' heads."""
        return query_heads(self.query_coord, self.value, self.log_decay)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Returns the dtype of sums: float64 where a tensor has it, else float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def query_heads(query_coord: Tensor | None, value: Tensor, log_decay: Tensor | None) -> int:
    """Returns H: the heads of query_coord, else those of log_decay, else those of value."""
    for x in (query_coord, log_decay):
        if x is not None:
            return x.shape[2]
    return value.shape[2]


def topological_attention_reference(*arguments, **named) -> Tensor:
    """
    Computes the formula with the whole matrix of scores. It needs O(B H T^2) memory, runs on any device and in any
    floating dtype, and autograd differentiates it.

    The arguments are those of Arguments; they are not checked. The result is topological_attention's. Sums run in
    float32, or in float64 where an argument is float64.
    """
    x = Arguments(*arguments, **named)
    dtype = x.dtype
    B, T, kv_heads, _ = x.value.shape

    def by_head(of_keys: Tensor) -> Tensor:
        """(B, T, Hkv, ...) -> (B, H, T, ...)"""
        return of_keys.repeat_interleave(x.heads // kv_heads, 2).to(dtype).transpose(1, 2)

    # the scores of all pairs (B, H, T, T)
    scores = torch.zeros(B, x.heads, T, T, dtype=dtype, device=x.value.device)
    if x.query_coord is not None:
        queries = x.query_coord.to(dtype).transpose(1, 2)
        scores = scores - (queries[..., :, None] - by_head(x.key_coord)[..., None, :]).abs()
    if x.log_decay is not None:
        total = x.log_decay.double().cumsum(1).transpose(1, 2)  # float64: differences of long sums
        scores = scores + (total[..., :, None] - total[..., None, :]).to(dtype)
    if x.key_bias is not None:
        scores = scores + by_head(x.key_bias)[..., None, :]

    # the pairs that exist
    index = torch.arange(T, device=x.value.device)
    allowed = index <= index[:, None]
    if x.window is not None:
        allowed = allowed & (index > index[:, None] - x.window)
    if x.doc_start is not None:
        allowed = allowed & (index >= x.doc_start[:, None, :, None])

    # weights and sums
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return (weights @ by_head(x.value)).transpose(1, 2).to(x.value.dtype)


# ---- Checks -----------------------------------------------------------------


class Form(NamedTuple):
    """What the checks look at in a tensor."""
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def check_arguments(x: Arguments):
    """Raises topological_attention's ValueErrors, but for that of an unknown backend."""
    # forms that were right once are right
    forms = tuple(_form(tensor) for tensor in x[:6])
    if torch.compiler.is_compiling():
        _check_forms(*forms)
    else:
        _check_new_forms(*forms)
    window = x.window
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be an integer of at least 1 or None, got {window!r}")

    # values, where they are there already
    if x.value.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(x.log_decay, x.doc_start)


def _form(x) -> Form | str | None:
    """Returns what is checked in an argument: a tensor's form, None, or the name of another type."""
    if x is None:
        return None
    return Form(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x).__name__


def _describe(form: Form | str | None) -> str:
    return str(tuple(form.shape)) if isinstance(form, Form) else form or "NoneType"


def _check_forms(query, key, value, log_decay, key_bias, doc_start):
    """Raises the ValueErrors that tensors' shapes, dtypes and devices decide."""
    # tensors
    if not isinstance(value, Form) or len(value.shape) != 4 or 0 in value.shape:
        raise ValueError(f"value must be a tensor (B, T, Hkv, D) with no empty dimension, got {_describe(value)}")
    B, T, kv_heads, _ = value.shape
    if (query is None) != (key is None):
        only = "key_coord" if query is None else "query_coord"
        raise ValueError("query_coord and key_coord must be given both or neither, got only " + only)
    optional = dict(query_coord=query, log_decay=log_decay, key_coord=key, key_bias=key_bias, doc_start=doc_start)
    forms = {name: form for name, form in optional.items() if form is not None}
    for name, form in forms.items():
        if not isinstance(form, Form):
            raise ValueError(f"{name} must be a tensor or None, got {form}")

    # shapes and devices
    heads = kv_heads
    for form in (log_decay, query):
        if form is not None and len(form.shape) == 3:
            heads = form.shape[2]
    shapes = dict(
        query_coord=(B, T, heads),
        log_decay=(B, T, heads),
        key_coord=(B, T, kv_heads),
        key_bias=(B, T, kv_heads),
        doc_start=(B, T),
    )
    for name, form in forms.items():
        if form.shape != shapes[name]:
            raise ValueError(
                f"{name} must have the shape {shapes[name]} beside value's {tuple(value.shape)}, "
                f"got {tuple(form.shape)}"
            )
        if form.device != value.device:
            raise ValueError(f"{name} must be on value's device {value.device}, got {form.device}")
    if heads == 0 or heads % kv_heads:
        name = "log_decay" if query is None else "query_coord"
        raise ValueError(f"{name} has {heads} heads, which value's {kv_heads} must divide")

    # dtypes
    for name, form in dict(forms, value=value).items():
        valid = INTEGERS if name == "doc_start" else FLOATS
        if form.dtype not in valid:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in valid)
            raise ValueError(f"{name} must be {names}, got {form.dtype}")


_check_new_forms = functools.lru_cache(maxsize=1024)(_check_forms)


def _check_values(log_decay: Tensor | None, doc_start: Tensor | None):
    """Raises the ValueErrors that numbers decide."""
    if doc_start is not None:
        index = torch.arange(doc_start.shape[1])
        before = F.pad(doc_start[:, :-1], (1, 0), value=0)
        wrong = (doc_start != index) & ((doc_start != before) | (index == 0))
        if wrong.any():
            row, t = wrong.nonzero()[0].tolist()
            raise ValueError(
                "doc_start must at each token t be t, where a document begins, or what it was at t - 1; "
                f"got {doc_start[row, t].item()} at t = {t} after {before[row, t].item()} (row {row})"
            )
    if log_decay is not None and (log_decay > 0).any():
        raise ValueError(f"log_decay must be <= 0, got {log_decay.max().item():g}")
