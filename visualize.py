"""
Pictures of what a part of a model is made of, or has learnt.

    python visualize.py manifold FILE.npz -o FILE.png [--data DIR]
    python visualize.py stream RUN... -o FILE.png [--log-dir DIR]
    python visualize.py splanifold RUN... -o FILE.png|.gif|.mp4 [--layer N...] [--groups 4] [--tokens 1024]
                                   [--data DIR] [--log-dir DIR] [--size 2.4]

A RUN is a run's file (for stream its JSON), its id, the beginning of its id, or `last`.

manifold: a file of data/manifold.py. The graph, laid out by the second and third eigenvector (of L v = m D v, D the
degrees: those of L alone are little but the most loosely tied nodes), a node with the token of its largest entry; a
random matrix is shown as a matrix. The spectrum, beside that of a chain of as many nodes. How lambda = E / (E + tau) is
distributed over the vectors in the file, each as often as its token occurs there, or in the training shards of DIR, for
the file's tau and for tau = 1.
splanifold: what the splanifolds of a model's feed-forwards (variants/splanifold_mlp.py) make of validation tokens, a
row of panels a layer, a panel a group. The n outputs of a group are projected on the two principal axes of its control
points P_i and P_i + E_i e_k, over all checkpoints: axes and limits stay, so that frames can be compared; a group of one
output is drawn over t. Line: the spine, from t = 0 to 1; dots on spokes: nodes and control points; cloud: the tokens,
coloured by t. One checkpoint gives a PNG, several, in the order of their steps, an animation (MP4 needs ffmpeg).
Checkpoints of a run on its way: train_gpt.py --keep_every.
stream: what the branches add to the stream, over depth, from the JSON of runs with --variant stream_statistics: norm
with the slope of its logarithm over the branches, share of a branch's output along the stream, relative step, kurtosis.
One run: a line a validation; several: the last of each.
Exit code 1 and one line for a fault, 141 when nobody reads the output. A further picture is a run_ function and its
options in COMMANDS.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import train_gpt  # isort: skip  before torch: it sets how long PyTorch's waiting threads spin
import numpy as np
import torch

import variants
from data.command_line import Parser, check_limits, run_script
from data.manifold import TAU_MODES, Manifold, read_manifold
from generate import load_model, read_model, start_alone, warn
from kernels.splanifold import splanifold
from train_gpt import (
    Config,
    RunError,
    adopt_vocabulary,
    check_value,
    checked,
    config_from,
    find_checkpoint,
    find_shards,
    open_shard,
    read_json,
    require,
    validation_batches,
    write_atomically,
)
from variants.splanifold_mlp import SplanifoldMLP
from variants.topological_attention import chain_laplacian

BOLD, MUTED = "#d55e00", "#7d838c"  # told apart by the colour-blind
BINS = 60                           # of the histogram of lambda
SPINE = 65                          # points of a spine's line
FRAMES_A_SECOND = 8
FONT = 7.5                          # points, of labels
PANEL = np.array([440, 370])        # points, of the graph's nodes
LIMITS = dict(layer=(0, 4095), groups=(1, 4096), tokens=(1, 2 ** 24), size=(0.1, 50.0))  # of splanifold's options
MOST_SIDE = 65_535                  # pixels of a picture's side: matplotlib's limit
MOST_PIXELS = 2 ** 27               # of a picture: they take half a gigabyte


def legible(text: str) -> str:
    """A text from a file as matplotlib shows it: $ would begin a formula."""
    return text.replace("$", r"\$")[:120]


def save_png(figure, file):
    """Write a figure as a PNG, silent about characters that the font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(file, format="png")


# ---- manifold ---------------------------------------------------------------


def check_manifold(manifold: Manifold, path: str):
    """
    Raise RunError, which names the file, unless its arrays fit each other and its provenance says what a picture needs.
    """
    # the provenance
    remedy = "make it again by data/manifold.py"
    source = manifold.provenance.get("of", manifold.provenance)
    sources = ("corpus", "checkpoint", "random", "chain")
    known = isinstance(source, dict) and isinstance(source.get("data", ""), str) and source.get("source") in sources
    require(known and manifold.provenance.get("source") in sources,
            f"{path}: its provenance does not say what it was made from; {remedy}")
    tau = manifold.provenance.get("tau")
    require(isinstance(tau, dict) and tau.keys() == {"mode", "percentile"} and tau["mode"] in TAU_MODES,
            f"{path}: the tau of its provenance is {tau!r:.60}, not a mode and a percentile; {remedy}")
    check_value(float, tau["percentile"], f"{path}: the percentile of its tau", (0, 100))

    # the arrays
    n = len(manifold.laplacian)
    vectors = manifold.vectors
    counts = manifold.counts
    require(vectors.ndim == 2 and vectors.shape[1] == n and vectors.dtype.kind == "f" and np.isfinite(vectors).all(),
            f"{path}: its vectors are no finite numbers (n, {n}) but {vectors.dtype} {vectors.shape}; {remedy}")
    are_counts = counts.shape == (len(vectors),) and counts.dtype.kind in "iu" and (counts >= 0).all()
    require(are_counts and (counts.any() or not len(counts)),
            f"{path}: its counts are no numbers of occurrences of {len(vectors)} vectors; {remedy}")
    require(manifold.tokens.shape in ((0,), counts.shape) and manifold.tokens.dtype.kind in "iu",
            f"{path}: its tokens are no ids of {len(vectors)} vectors; {remedy}")
    require(manifold.labels.shape in ((0,), (n,)) and manifold.labels.dtype.kind == "U",
            f"{path}: its labels are no texts for {n} nodes; {remedy}")
    is_graph = manifold.provenance["source"] != "random"
    require(not is_graph or ((np.diag(manifold.laplacian) > 0).all() and (manifold.laplacian < -1e-12).any()),
            f"{path}: a node of its graph has no edge; {remedy}")


def count_occurrences(manifold: Manifold, folder: str) -> np.ndarray:
    """
    How often each vector's token occurs in the training shards of a folder (n,). RunError where vectors are not
    tokens', or others'.
    """
    # are they tokens of this folder?
    require(len(manifold.tokens),
            "--data counts tokens, and the vectors of this file are not those of tokens; leave it out")
    config = Config(data=folder)
    adopt_vocabulary(config)
    size = manifold.provenance.get("of", manifold.provenance).get("vocab_size")
    require(config.vocab_size == size, f"the vectors are those of a vocabulary of {size} tokens, {folder} has "
            f"{config.vocab_size}; give shards of the same tokenizer")
    least = manifold.tokens.min()
    most = manifold.tokens.max()
    require(least >= 0 and most < size,
            f"the vectors are those of tokens {least} to {most}, and the vocabulary has {size}; make the file again")

    # count them
    shards = (checked(open_shard(file), config) for file in find_shards(config, "train"))
    counts = sum(np.bincount(shard, minlength=size) for shard in shards)[manifold.tokens]
    require(counts.any(), f"none of the file's {len(counts)} tokens occurs in {folder}")
    return counts


def place_labels(positions: np.ndarray, labels: list[str],
                 order: np.ndarray) -> list[tuple[int, str, tuple[int, int]]]:
    """
    (node, label, offset in points) of the labels of nodes at these positions (n, 2) that find room beside their node,
    in this order; the others are left out.
    """
    points = (positions - positions.min(0)) / np.ptp(positions, axis=0) * PANEL
    taken = []      # boxes (lowest, highest corner)
    result = []     # the labels that have one
    for i in order[:len(labels)]:
        for offset in ((3, 3), (3, -3), (-3, 3), (-3, -3)):
            corner = points[i] + offset
            size = np.sign(offset) * (0.62 * FONT * len(labels[i]), FONT)
            low = np.minimum(corner, corner + size)
            high = np.maximum(corner, corner + size)
            if all((high < other_low).any() or (other_high < low).any() for other_low, other_high in taken):
                taken.append((low, high))
                result.append((i, labels[i], offset))
                break
    return result


def draw_graph(panel, laplacian: np.ndarray, labels: np.ndarray):
    """The nodes, each at its entries in the second and third solution v of L v = m D v; heavier edges are darker."""
    from matplotlib.collections import LineCollection

    # the nodes' positions
    scale = np.diag(laplacian) ** -0.5
    positions = scale[:, None] * np.linalg.eigh(laplacian * np.outer(scale, scale))[1][:, 1:3]

    # the edges, the lightest first, and the nodes
    first, second = np.nonzero(np.triu(laplacian < -1e-12, 1))
    weight = -laplacian[first, second]
    order = np.argsort(weight)
    strength = (weight[order] / weight.max()) ** 2
    lines = np.stack((positions[first], positions[second]), 1)[order]
    panel.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.3 + 1.4 * strength,
                                        alpha=0.05 + 0.6 * strength))
    panel.scatter(*positions.T, s=16, color=BOLD, zorder=2, linewidths=0)
    panel.margins(0.08)

    # labels, those of the heaviest nodes first
    words = [label.split(" ")[0][:14] for label in labels]
    heaviest_first = np.argsort(-np.diag(laplacian), kind="stable")
    for i, text, offset in place_labels(positions, words, heaviest_first):
        horizontal = "left" if offset[0] > 0 else "right"
        vertical = "bottom" if offset[1] > 0 else "top"
        panel.annotate(legible(text), positions[i], xytext=offset, textcoords="offset points", fontsize=FONT, zorder=3,
                       ha=horizontal, va=vertical)
    panel.set(title=f"graph: {len(positions)} nodes, {len(weight)} edges of weight {weight.min():.2f} to "
              f"{weight.max():.2f}", xlabel="2nd eigenvector", ylabel="3rd eigenvector")


def draw_matrix(panel, laplacian: np.ndarray):
    """Entries by colour, zero white."""
    limit = np.abs(laplacian).max()
    image = panel.imshow(laplacian, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    panel.figure.colorbar(image, ax=panel, shrink=0.7)
    panel.set(title="random matrix, not made from a graph", xlabel="channel", ylabel="channel")


def draw_lambda(panel, manifold: Manifold, counts: np.ndarray):
    """Histogram of lambda over the vectors, which occur counts (n,) times."""
    energies = manifold.energies
    for tau, color in ({1.0: MUTED} | {manifold.tau: BOLD}).items():
        panel.hist(energies / (energies + tau), bins=BINS, range=(0, 1), weights=counts / counts.sum(), color=color,
                   alpha=0.75, label=f"tau = {tau:.3g}")
    panel.set(xlabel="lambda", ylabel="share of vectors", xlim=(0, 1))
    panel.legend(frameon=False)


def draw_manifold(file, manifold: Manifold, counts: np.ndarray, corpus: str):
    """The PNG of a manifold whose vectors occur counts (n,) times in a corpus of this name."""
    from matplotlib.figure import Figure

    # the graph, or the matrix
    laplacian = manifold.laplacian
    source = manifold.provenance["source"]
    figure = Figure(figsize=(13, 7), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic([["graph", "spectrum"], ["graph", "lambda"]], width_ratios=[1.7, 1])
    if source == "random":
        draw_matrix(panels["graph"], laplacian)
    else:
        draw_graph(panels["graph"], laplacian, manifold.labels)

    # the spectrum, beside a chain's
    matrices = {source: (laplacian, BOLD)}
    if source != "chain":
        matrices["chain"] = (chain_laplacian(len(laplacian)).double().numpy(), MUTED)
    for name, (matrix, color) in matrices.items():
        panels["spectrum"].plot(np.arange(1, len(matrix) + 1), np.linalg.eigvalsh(matrix), color=color, marker=".",
                                markersize=4, linewidth=1, label=name)
    panels["spectrum"].set(title="spectrum", xlabel="index", ylabel="eigenvalue", ylim=(0, None))
    panels["spectrum"].legend(frameon=False)

    # lambda
    if counts.any():
        panels["lambda"].set_title(f"lambda over {legible(corpus)}")
        draw_lambda(panels["lambda"], manifold, counts)
    else:
        panels["lambda"].text(0.5, 0.5, "no vectors in this file", ha="center", va="center", color=MUTED)
        panels["lambda"].set_axis_off()
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    save_png(figure, file)


def run_manifold(options: argparse.Namespace):
    """Draw the picture of a file of data/manifold.py."""
    # the file
    manifold = read_manifold(options.source)
    check_manifold(manifold, options.source)
    require(len(manifold.laplacian) >= 3,
            f"{options.source} has {len(manifold.laplacian)} nodes, and the third eigenvector needs 3")

    # the vectors that lambda is shown of
    source = manifold.provenance.get("of", manifold.provenance)
    corpus = source.get("data", "")
    counts = manifold.counts
    if options.data:
        corpus = Path(options.data).resolve().name
        counts = count_occurrences(manifold, options.data)
    kind = f"the keys of {corpus}" if source["source"] == "checkpoint" else f"the tokens of {corpus}"
    write_atomically(options.output, lambda file: draw_manifold(file, manifold, counts, kind))


def add_manifold(parser: argparse.ArgumentParser):
    """The options of run_manifold."""
    parser.add_argument("source", metavar="FILE.npz", help="a file of data/manifold.py")
    parser.add_argument("--data", default="", metavar="DIR",
                        help="folder of shards whose tokens are counted (default: those that the file is from)")


# ---- splanifold -------------------------------------------------------------


@dataclass
class Group:
    """One group of a layer at one step."""
    nodes: np.ndarray     # (S, n)
    controls: np.ndarray  # (S, K, n): control points
    spine: np.ndarray     # (SPINE, n)
    tokens: np.ndarray    # (M, n)
    t: np.ndarray         # (M,): of the tokens


@torch.no_grad()
def groups_of(mlp: SplanifoldMLP, x: torch.Tensor, count: int) -> list[Group]:
    """The first `count` groups of a feed-forward whose input is x (M, model_dim)."""
    # their controls, and the coordinates of the tokens
    count = min(count, mlp.groups)
    controls = mlp.controls(torch.float32)
    controls = type(controls)(*(tensor[:count] for tensor in controls))
    r = mlp.coordinates(x)[:, :count]

    def outputs(r: torch.Tensor) -> torch.Tensor:
        """Of coordinates (M, count, K): (M, count, n)."""
        return splanifold(r.contiguous(), controls, **mlp.settings, mix="concat").unflatten(-1, (count, -1))

    # where they lead
    line = torch.linspace(0, 1, SPINE)[:, None, None].expand(SPINE, count, r.shape[-1])
    tokens, spine = outputs(r), outputs(line)
    points = controls.points[:, :, None] + controls.bases.mT
    return [Group(controls.points[g].numpy(), points[g].numpy(), spine[:, g].numpy(), tokens[:, g].numpy(),
                  r[:, g].mean(-1).numpy()) for g in range(count)]


def splanifolds_of(path: Path, layers: list[int], groups: int, tokens: int, data: str,
                   first: dict | None) -> tuple[dict, list[list[Group]]]:
    """
    (checkpoint's contents without its tensors, groups of every layer asked for, all layers where none is). first:
    contents of the run's first checkpoint, None for that one.
    """
    # the checkpoint
    saved = read_model(str(path))
    require("step" in saved, f"{path} is an exported model, whose step is not known; give a run's .pt file")
    config = replace(config_from(saved["config"], str(path)), compile="off", device="cpu", dtype="float32")
    config = replace(config, data=data or config.data, val_tokens=max(tokens, config.sequence_length))
    require(not first or first["config"] | dict(run_id="", data="") == saved["config"] | dict(run_id="", data=""),
            f"{path} is of another run than the checkpoints before it; give those of one run")

    # the model, and the layers that are drawn
    with variants.applied(config.variant, config), torch.no_grad():
        model = load_model(saved, config, start_alone(config), str(path))
        chosen = {layer: block.mlp for layer, block in enumerate(model.blocks)
                  if isinstance(block.mlp, SplanifoldMLP) and (not layers or layer in layers)}
        missing = [f" in layer {layer}" for layer in sorted(set(layers) - chosen.keys())]
        require(chosen and not missing, f"{path} has no splanifolds{''.join(missing[:1])}; give checkpoints of "
                "--variant splanifold_mlp and layers that have it")

        # their inputs
        inputs = {}
        for layer, mlp in chosen.items():
            mlp.register_forward_pre_hook(lambda _, arguments, layer=layer:
                                          inputs.update({layer: arguments[0].flatten(0, 1)[:tokens]}))
        batch = torch.from_numpy(validation_batches(config)[0])
        model.run_blocks(*model.embed(batch[:, :-1], model.masks(batch[:, :-1])))
    if first is None:
        warn(saved, path)
    kept = {name: saved[name] for name in ("config", "step", "curve")} | dict(layers=list(chosen))
    return kept, [groups_of(mlp, inputs[layer], groups) for layer, mlp in chosen.items()]


def projection(history: list[Group]) -> Callable[[np.ndarray], np.ndarray] | None:
    """
    outputs (.., n) -> (.., 2): on the principal axes of a group's control points at all its steps. None where n = 1.
    """
    points = np.concatenate([array.reshape(-1, array.shape[-1]) for group in history
                             for array in (group.nodes, group.controls)])
    if points.shape[-1] == 1:
        return None
    centre = points.mean(0)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    axes = axes * np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]  # an axis has no sign of its own
    return lambda x: (x - centre) @ axes.T


def project_group(group: Group, project: Callable | None) -> dict[str, np.ndarray]:
    """The lines and dots of a panel, each (.., 2); without a projection over t."""
    if project is not None:
        return {name: project(getattr(group, name)) for name in ("spine", "nodes", "tokens", "controls")}

    def over(t: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack((t, y[..., 0]), -1)

    t = np.linspace(0, 1, len(group.nodes))
    return dict(spine=over(np.linspace(0, 1, SPINE), group.spine), nodes=over(t, group.nodes),
                tokens=over(group.t, group.tokens),
                controls=over(np.broadcast_to(t[:, None], group.controls.shape[:2]), group.controls))


class SplanifoldPanel:
    """A group's panel, whose axes and limits serve all its steps."""

    def __init__(self, panel, history: list[Group]):
        from matplotlib.collections import LineCollection
        project = projection(history)
        self.history = [project_group(group, project) for group in history]  # of every step: name -> points (.., 2)
        self.t = [group.t for group in history]                              # of every step: (M,), colours of the cloud

        # limits: a far token must not make the rest a dot
        points = np.concatenate([array.reshape(-1, 2) for drawn in self.history for array in drawn.values()])
        low, high = np.quantile(points, (0.002, 0.998), axis=0)
        margin = 0.08 * np.maximum(high - low, 1e-6)
        panel.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))

        # what a step fills
        self.cloud = panel.scatter([], [], s=5, c=[], cmap="viridis", vmin=0, vmax=1, alpha=0.55, linewidths=0)
        self.spokes = panel.add_collection(LineCollection([], colors=MUTED, linewidths=0.6, alpha=0.6))
        self.ends = panel.scatter([], [], s=4, color=MUTED, linewidths=0, zorder=3)
        self.spine, = panel.plot([], [], color=BOLD, linewidth=1.6, zorder=4)
        self.nodes = panel.scatter([], [], s=22, color=BOLD, edgecolors="white", linewidths=0.8, zorder=5)

    def show(self, step: int):
        """Draw the group at one of its steps."""
        drawn = self.history[step]
        starts = np.broadcast_to(drawn["nodes"][:, None], drawn["controls"].shape)
        self.cloud.set_offsets(drawn["tokens"])
        self.cloud.set_array(self.t[step])
        self.spokes.set_segments(np.stack((starts, drawn["controls"]), 2).reshape(-1, 2, 2))
        self.ends.set_offsets(drawn["controls"].reshape(-1, 2))
        self.spine.set_data(*drawn["spine"].T)
        self.nodes.set_offsets(drawn["nodes"])


def draw_splanifolds(file, kind: str, heads: list[dict], frames: list[list[list[Group]]], size: float):
    """A PNG of the only frame, or an animation of all. frames: step -> layer -> groups."""
    from matplotlib.animation import FFMpegWriter, PillowWriter
    from matplotlib.figure import Figure
    from tqdm import tqdm

    # the figure
    layers = heads[0]["layers"]
    columns = max(len(groups) for groups in frames[0])
    width = round(100 * (size * columns + 0.3))
    height = round(100 * (size * len(layers) + 0.6))
    require(max(width, height) <= MOST_SIDE and width * height <= MOST_PIXELS,
            f"a picture of {width:,} x {height:,} pixels takes {4 * width * height:,} bytes and is too large; "
            "choose fewer by --layer and --groups, or lower --size")
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    panels = figure.subplots(len(layers), columns, squeeze=False)
    drawn = []
    for row, groups in enumerate(frames[0]):
        for column in range(columns):
            panel = panels[row, column]
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("#d0d3d8")
            if column >= len(groups):
                panel.set_axis_off()
                continue
            drawn.append(SplanifoldPanel(panel, [frame[row][column] for frame in frames]))
            if column == 0:
                panel.set_ylabel(f"layer {layers[row]}", fontsize=FONT + 1)
            if row == 0:
                panel.set_title(f"group {column}", fontsize=FONT + 1)

    def show(step: int):
        title = f"step {heads[step]['step']:,}"
        curve = heads[step]["curve"]
        if curve and curve[-1]["val_loss"]:
            title += f", validation loss {curve[-1]['val_loss']:.3f}"
        figure.suptitle(title, fontsize=FONT + 2)
        for panel in drawn:
            panel.show(step)

    # the only frame, or all of them
    if kind == ".png":
        show(0)
        save_png(figure, file)
        return
    writer = (PillowWriter if kind == ".gif" else FFMpegWriter)(fps=FRAMES_A_SECOND)
    steps = [*range(len(frames)), *[len(frames) - 1] * FRAMES_A_SECOND]  # the last one stays for a second
    with writer.saving(figure, file, dpi=100):
        for step in tqdm(steps, desc="frames", disable=None):
            show(step)
            writer.grab_frame()


def run_splanifold(options: argparse.Namespace):
    """Draw the splanifolds of one checkpoint, or of several as an animation."""
    from matplotlib.animation import FFMpegWriter
    from tqdm import tqdm

    # the options
    kind = options.output.suffix.lower()
    number = len(options.checkpoints)
    require(kind in (".png", ".gif", ".mp4"), f"{options.output} must end in .png, .gif or .mp4")
    require(kind != ".png" or number == 1,
            f"a PNG shows one checkpoint, got {number}; give one, or an output that ends in .gif or .mp4")
    require(kind == ".png" or number > 1,
            f"an animation needs at least 2 checkpoints, got {number}; keep some with train_gpt.py --keep_every")
    require(kind != ".mp4" or FFMpegWriter.isAvailable(),
            "MP4 needs ffmpeg, which is not installed; install it or give an output that ends in .gif")
    check_limits(options, LIMITS)

    # the checkpoints, in the order of their steps
    paths = [find_checkpoint(name, options.log_dir) for name in options.checkpoints]
    steps = []  # (contents, groups of every layer)
    for path in tqdm(paths, desc="checkpoints", disable=None if number > 1 else True):
        first = steps[0][0] if steps else None
        steps.append(splanifolds_of(path, options.layer, options.groups, options.tokens, options.data, first))
    heads, frames = zip(*sorted(steps, key=lambda step: step[0]["step"]))

    # the picture; the writers of animations want a path, not a file
    if kind == ".png":
        write_atomically(options.output, lambda file: draw_splanifolds(file, kind, heads, frames, options.size))
        return
    temporary = options.output.with_name(f".{os.getpid()}{options.output.name}")
    try:
        draw_splanifolds(temporary, kind, heads, frames, options.size)
        os.replace(temporary, options.output)
    except (OSError, subprocess.CalledProcessError) as error:  # the second: of ffmpeg
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write {options.output}: {reason}; free some space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def add_splanifold(parser: argparse.ArgumentParser):
    """The options of run_splanifold."""
    parser.add_argument("checkpoints", metavar="RUN", nargs="+",
                        help="one checkpoint for a PNG, several of one run for an animation")
    where = parser.add_argument_group("where it comes from")
    where.add_argument("--log-dir", default=Config.log_dir, metavar="DIR", help="folder of runs (default: %(default)s)")
    where.add_argument("--data", default="", metavar="DIR", help="folder of shards (default: that of the run)")
    what = parser.add_argument_group("what to draw")
    what.add_argument("--layer", type=int, nargs="+", default=[], metavar="N", help="layers, from 0 on (default: all)")
    what.add_argument("--groups", type=int, default=4, metavar="N",
                      help="splanifolds of a layer, from the first on (default: %(default)s)")
    what.add_argument("--tokens", type=int, default=1024, metavar="N",
                      help="validation tokens in the cloud (default: %(default)s)")
    what.add_argument("--size", type=float, default=2.4, metavar="INCHES",
                      help="side of a panel, 100 pixels an inch (default: %(default)s)")


# ---- stream -----------------------------------------------------------------

STREAM_PANELS = dict(x_norm="norm of the stream", rho_par="share of |y|² along the stream",
                     relative_step="relative step |z - x| / |x|", kurtosis="kurtosis of the channels")


def stream_history(name: str, log_dir: str) -> tuple[str, list[dict]]:
    """
    (a title, the points of a run's curve that have stream statistics). RunError, one line, for a file that lacks what
    is drawn.
    """
    # the run
    path = Path(name) if name.endswith(".json") else find_checkpoint(name, log_dir).with_suffix(".json")
    require(path.is_file(), f"there is no file {path}; give the JSON beside a run's log")
    facts = read_json(path, "give the JSON beside a run's log")
    unfit = f"{path} is no run's JSON"
    config = facts.get("config")
    curve = facts.get("curve")
    require(isinstance(config, dict) and isinstance(config.get("variant"), list),
            f"{unfit}: it has no list config.variant")
    for spec in config["variant"]:
        check_value(str, spec, f"{path}: config.variant", None)
    check_value(int, facts.get("seed"), f"{path}: seed", train_gpt.RANGES["seed"])

    # its points
    require(isinstance(curve, list) and all(isinstance(point, dict) for point in curve),
            f"{unfit}: its curve is no list of points")
    points = [point for point in curve if point.get("stream")]
    require(points, f"{path} has no stream statistics; train with --variant stream_statistics")
    for point in points:
        check_value(int, point.get("step"), f"{path}: step of its curve", train_gpt.RANGES["steps"])
        rows = point["stream"]
        require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
                f"{unfit}: its stream is no list of branches")
        for key in (*STREAM_PANELS, "z_norm"):
            for row in rows:
                check_value(float, row.get(key), f"{path}: {key} of step {point['step']}", (-1e30, 1e30))
    return f"{' + '.join(config['variant']) or 'baseline'}, seed {facts['seed']}", points


def norm_slope(rows: list[dict]) -> float:
    """Least-squares slope of the logarithm of the stream's mean norm over the branches."""
    norms = [row["x_norm"] for row in rows] + [rows[-1]["z_norm"]]
    return float(np.polyfit(range(len(norms)), np.log(np.maximum(norms, 1e-30)), 1)[0])


def draw_stream(file, histories: list[tuple[str, list[dict]]]):
    """The PNG: lines over depth, coloured by step for one run and by run for several."""
    import matplotlib
    from matplotlib.figure import Figure

    # the lines
    if len(histories) == 1:
        title, points = histories[0]
        lines = [(f"step {point['step']:,}", point["stream"]) for point in points]
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(lines)))
    else:
        title, lines = "after the last step", [(legible(name), points[-1]["stream"]) for name, points in histories]
        colours = matplotlib.colormaps["tab10"](np.arange(len(lines)) % 10)

    # a panel for each statistic; the norm's goes on to the last output, and has the legend
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    panels = figure.subplots(2, 2).flat
    for panel, (key, label) in zip(panels, STREAM_PANELS.items()):
        for (name, rows), colour in zip(lines, colours):
            values, legend = [row[key] for row in rows], None
            if key == "x_norm":
                values.append(rows[-1]["z_norm"])
                legend = f"{name}, slope {norm_slope(rows):+.3f}"
            panel.plot(values, color=colour, marker="o", markersize=3, linewidth=1.2, label=legend)
        panel.set(title=label, xlabel="branch: attention and feed-forward of every layer in turn")
        if key == "x_norm":
            panel.set_yscale("log")
            panel.legend(frameon=False, fontsize=FONT)
    figure.suptitle(legible(title), fontsize=FONT + 3)
    save_png(figure, file)


def run_stream(options: argparse.Namespace):
    """Draw the streams of runs."""
    require(options.output.suffix.lower() == ".png", f"{options.output} must end in .png")
    histories = [stream_history(name, options.log_dir) for name in options.runs]
    write_atomically(options.output, lambda file: draw_stream(file, histories))


def add_stream(parser: argparse.ArgumentParser):
    """The options of run_stream."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="one for its course, several to compare their ends")
    parser.add_argument("--log-dir", default=Config.log_dir, metavar="DIR",
                        help="folder of runs (default: %(default)s)")


# ---- The command ------------------------------------------------------------

COMMANDS = dict(  # what it does, its options, its help
    manifold=(run_manifold, add_manifold, "a domain Laplacian"),
    stream=(run_stream, add_stream, "norms and directions over depth, of runs with --variant stream_statistics"),
    splanifold=(run_splanifold, add_splanifold, "the splanifolds of a model's layers, at one step or through a run"))


def visualize(argv: list[str] | None):
    """Draw what a command line asks for."""
    parser = Parser(prog="visualize.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="PART")
    for name, (run, add_options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add_options(command)
        output = command.add_argument_group("output")
        output.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the picture")
        command.set_defaults(run=run)
    options = parser.parse_args(argv)
    folder = options.output.parent
    require(folder.is_dir(), f"cannot write {options.output}: there is no folder {folder}; make it or choose another")
    options.run(options)
    print(options.output)


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code, see data.command_line.run_script."""
    return run_script("visualize.py", lambda: visualize(argv), explain=variants.blame)


if __name__ == "__main__":
    sys.exit(main())
