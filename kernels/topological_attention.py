"""
Topological (scalar-key) attention: the score of a query and a key is minus the distance of two scalars.

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i
    F_i = sum over t <= i of g_t                 g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

a, g (B, T, H); b, c (B, T, Hkv); v (B, T, Hkv, D). The coordinates carry the temperature. Without coordinates (key
only) there is no distance.

Each backend is a file of its own, topological_attention_<backend>.py.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144; decay, bias and documents: ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.topological_attention_binned import topological_attention_binned
from kernels.topological_attention_loglinear import topological_attention_loglinear
from kernels.topological_attention_reference import query_heads, topological_attention_reference
from kernels.topological_attention_tiled import topological_attention_tiled


BACKENDS = dict(
    reference=topological_attention_reference,
    tiled=topological_attention_tiled,
    loglinear=topological_attention_loglinear,
    binned=topological_attention_binned,
)

# On a CPU "auto" takes the whole matrix of scores where B H T^2 is below this: measured on two cores, with heads of 8,
# 32 and 64.
SCORES = 1 << 16

# On a GPU it takes dense tiles where a query sees at most so many keys: by the counts in the files' docstrings, not
# measured yet.
TILED = 1 << 14


def _chosen(T: int, rows: int, window: int | None, on_gpu: bool) -> str:
    """Returns the backend of "auto" for `rows` = B H rows of T tokens."""
    if on_gpu:
        return "tiled" if min(window or T, T) <= TILED else "loglinear"
    return "reference" if rows * T * T < SCORES else "loglinear"


def topological_attention(
    query_coord: Tensor | None,
    key_coord: Tensor | None,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    key_bias: Tensor | None = None,
    doc_start: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """
    Returns out (B, T, H, D) in value's dtype, where F_i = sum over t <= i of g_t and
        out_i = sum_j softmax_j(-|a_i - b_j| + F_i - F_j + c_j) v_j over max(doc_start_i, i - window + 1) <= j <= i

    Arguments:
        query_coord a (B, T, H)     divided by the temperature; None, with key_coord None: no distance term
        key_coord b (B, T, Hkv)     the same; Hkv divides H
        value v (B, T, Hkv, D)
        log_decay g (B, T, H)       the natural logarithm of the factor from a token to the next, <= 0 and finite;
                                    None: 0. Without coordinates it sets H
        key_bias c (B, T, Hkv)      None: 0. -inf hides a key, as long as every query sees one
        doc_start (B, T)            int32 or int64: the first token of each token's document; None: one document
        window                      a query sees that many tokens, itself included; None: all
        backend                     one of the following

    Backends:
        "reference"     the whole matrix of scores; exact
        "tiled"         dense tiles on a GPU, loglinear elsewhere; exact
        "loglinear"     O(T log T), on a CPU O(T) without coordinates; exact
        "auto"          one of these
        "binned"        O(T): coordinates are interpolated between 256 points in [-8, 8]; it takes no window. Other
                        points: topological_attention_binned
    Without coordinates all but "reference" are "loglinear". All work under torch.compile(fullgraph=True).

    Floating tensors may be bfloat16, float16, float32 or float64, mixed. Sums run in float32, or in float64 where an
    argument is float64. The five floating tensors have gradients; where a coordinate equals another, the distance has
    derivative 0.

    Raises a ValueError that names the argument for a wrong shape, dtype, device or backend, and for a window below 1.
    On the CPU outside compiled graphs it also does so for an impossible doc_start and for a positive log_decay;
    elsewhere this check would have to wait for the values.
    """
    _check(query_coord, key_coord, value, log_decay, key_bias, doc_start, window, backend)
    if backend == "auto":
        rows = len(value) * query_heads(query_coord, value, log_decay)
        backend = _chosen(value.shape[1], rows, window, value.is_cuda)
    if query_coord is None and backend != "reference":
        backend = "loglinear"
    return BACKENDS[backend](query_coord, key_coord, value, log_decay, key_bias, doc_start, window)


def _check(query, key, value, log_decay, key_bias, doc_start, window, backend):
    """Raises topological_attention's ValueErrors."""
    # tensors
    if not isinstance(value, Tensor) or value.dim() != 4 or 0 in value.shape:
        raise ValueError(f"value must be a tensor (B, T, Hkv, D) with no empty dimension, got {_describe(value)}")
    B, T, kv_heads, _ = value.shape
    if (query is None) != (key is None):
        only = "key_coord" if query is None else "query_coord"
        raise ValueError("query_coord and key_coord must be given both or neither, got only " + only)
    given = dict(query_coord=query, log_decay=log_decay, key_coord=key, key_bias=key_bias, doc_start=doc_start)
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor or None, got {type(x).__name__}")

    # shapes and devices
    heads = next((x.shape[2] for x in (query, log_decay) if x is not None and x.dim() == 3), kv_heads)
    shapes = dict(
        query_coord=(B, T, heads),
        log_decay=(B, T, heads),
        key_coord=(B, T, kv_heads),
        key_bias=(B, T, kv_heads),
        doc_start=(B, T),
    )
    for name, x in given.items():
        if x is not None and x.shape != shapes[name]:
            raise ValueError(
                f"{name} must have the shape {shapes[name]} beside value's {tuple(value.shape)}, got {tuple(x.shape)}"
            )
        if x is not None and x.device != value.device:
            raise ValueError(f"{name} must be on value's device {value.device}, got {x.device}")
    if heads == 0 or heads % kv_heads:
        name = "query_coord" if query is not None else "log_decay"
        raise ValueError(f"{name} has {heads} heads, which value's {kv_heads} must divide")

    # dtypes
    integers = (torch.int32, torch.int64)
    floats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for name, x in dict(given, value=value).items():
        valid = integers if name == "doc_start" else floats
        if x is not None and x.dtype not in valid:
            names = " or ".join(str(d).removeprefix("torch.") for d in valid)
            raise ValueError(f"{name} must be {names}, got {x.dtype}")

    # options
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window must be an integer of at least 1 or None, got {window!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {' or '.join(BACKENDS)}, got {backend!r}")

    # values, where they are there already
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if doc_start is not None:
            index, before = torch.arange(T), F.pad(doc_start[:, :-1], (1, 0), value=0)
            wrong = (doc_start != index) & ((doc_start != before) | (index == 0))
            if wrong.any():
                row, t = wrong.nonzero()[0].tolist()
                raise ValueError(
                    "doc_start must at each token t be t, where a document begins, or what it was at t - 1; "
                    f"got {doc_start[row, t].item()} at t = {t} after {before[row, t].item()} (row {row})"
                )
        if log_decay is not None and (log_decay > 0).any():
            raise ValueError(f"log_decay must be <= 0, got {log_decay.max().item():g}")


def _describe(x) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
