"""
Topological (scalar-key) attention: the score of a query and a key is minus the distance of two scalars.

    s_ij = -|a_i - b_j| + F_i - F_j + c_j        max(doc_start_i, i - window + 1) <= j <= i
    F_i = sum over t <= i of g_t                 g_t <= 0
    out_i = (1/Z_i) sum_j e^{s_ij - M_i} v_j     M_i = max_j s_ij     Z_i = sum_j e^{s_ij - M_i}

a, g (B, T, H); b, c (B, T, Hkv); v (B, T, Hkv, D). The coordinates carry the temperature. Without coordinates (key
only) there is no distance.

Files: reference.py has the formula as it stands, and what all backends share; loglinear.py, with loops for a CPU in
loglinear_cpu.py and kernels for a GPU in loglinear_triton.py, tiled.py and binned.py are the other backends; cache.py,
with its loops in cache_cpu.py, decodes token by token.

Source: Moriondo, Topological Transformer (Tauformer), TechRxiv 176800983.30631144; decay, bias and documents: ours.
"""

from torch import Tensor

from kernels.topological_attention.binned import topological_attention_binned
from kernels.topological_attention.loglinear import topological_attention_loglinear
from kernels.topological_attention.reference import Arguments, check_arguments, topological_attention_reference
from kernels.topological_attention.tiled import topological_attention_tiled

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


def _choose(T: int, rows: int, window: int | None, on_gpu: bool) -> str:
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
    x = Arguments(query_coord, key_coord, value, log_decay, key_bias, doc_start, window)
    check_arguments(x)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be auto, {' or '.join(BACKENDS)}, got {backend!r}")

    # the backend
    if backend == "auto":
        backend = _choose(value.shape[1], len(value) * x.heads, window, value.is_cuda)
    if query_coord is None and backend != "reference":
        backend = "loglinear"
    return BACKENDS[backend](*x)
