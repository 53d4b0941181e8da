"""
Pictures of what a part of a model is made of, or has learnt.

    python visualize.py manifold FILE.npz -o FILE.png [--data DIR]

manifold: a file of data/manifold.py. The graph, laid out by the second and third eigenvector (of L v = m D v, D the degrees: those of L alone are little
but the most loosely tied nodes), a node with the token of its largest entry; a random matrix is shown as a matrix. The spectrum, beside that of a chain of
as many nodes. How lambda = E / (E + tau) is distributed over the vectors in the file, each as often as its token occurs there, or in the training shards
of DIR, for the file's tau and for tau = 1.
Exit code 1 and one line for a fault. Later parts are functions of their own in COMMANDS.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

from data.manifold import Manifold, read_manifold
from train_gpt import Config, RunError, adopt_vocabulary, checked, find_shards, open_shard, write_atomically
from variants.topological_attention import chain_laplacian

OWN, MUTED = "#d55e00", "#7d838c"  # told apart by the colour-blind
BINS = 60
FONT, PANEL = 7.5, np.array([440, 370])  # points: of labels, of the graph's nodes


def occurrences(manifold: Manifold, folder: str) -> np.ndarray:
    """How often each vector's token occurs in the training shards of a folder (n,). RunError where vectors are not tokens', or others'."""
    if not len(manifold.tokens):
        raise RunError("--data counts tokens, and the vectors of this file are not those of tokens; leave it out")
    config, source = Config(data=folder), manifold.provenance
    adopt_vocabulary(config)
    size = source.get("of", source)["vocab_size"]
    if config.vocab_size != size:
        raise RunError(f"the vectors are those of a vocabulary of {size} tokens, {folder} has {config.vocab_size}; give shards of the same tokenizer")
    counts = sum(np.bincount(checked(open_shard(file), config), minlength=size) for file in find_shards(config, "train"))[manifold.tokens]
    if not counts.any():
        raise RunError(f"none of the file's {len(counts)} tokens occurs in {folder}")
    return counts


def placed_labels(place: np.ndarray, labels: list[str], order: np.ndarray) -> list[tuple[int, str, tuple[int, int]]]:
    """(node, label, offset in points) of the labels of nodes at place (n, 2) that find room beside their node, in this order; the others are left out."""
    points = (place - place.min(0)) / np.ptp(place, axis=0) * PANEL
    taken, result = [], []
    for i in order[:len(labels)]:
        for offset in ((3, 3), (3, -3), (-3, 3), (-3, -3)):
            corner, size = points[i] + offset, np.sign(offset) * (0.62 * FONT * len(labels[i]), FONT)
            low, high = np.minimum(corner, corner + size), np.maximum(corner, corner + size)
            if all((high < other_low).any() or (other_high < low).any() for other_low, other_high in taken):
                taken.append((low, high))
                result.append((i, labels[i], offset))
                break
    return result


def draw_graph(panel, laplacian: np.ndarray, labels: np.ndarray):
    """The nodes, each at its entries in the second and third solution v of L v = m D v; the heavier an edge, the darker."""
    from matplotlib.collections import LineCollection
    scale = np.diag(laplacian) ** -0.5
    place = scale[:, None] * np.linalg.eigh(laplacian * np.outer(scale, scale))[1][:, 1:3]
    first, second = np.nonzero(np.triu(laplacian < -1e-12, 1))
    weight = -laplacian[first, second]
    order = np.argsort(weight)
    strength = (weight[order] / weight.max()) ** 2
    lines = np.stack((place[first], place[second]), 1)[order]
    panel.add_collection(LineCollection(lines, colors=MUTED, linewidths=0.3 + 1.4 * strength, alpha=0.05 + 0.6 * strength))
    panel.scatter(*place.T, s=16, color=OWN, zorder=2, linewidths=0)
    panel.margins(0.08)
    for i, text, offset in placed_labels(place, [label.split(" ")[0][:14] for label in labels], np.argsort(-np.diag(laplacian), kind="stable")):
        align = dict(ha="left" if offset[0] > 0 else "right", va="bottom" if offset[1] > 0 else "top")
        panel.annotate(text.replace("$", r"\$"), place[i], xytext=offset, textcoords="offset points", fontsize=FONT, zorder=3, **align)  # $ begins a formula
    panel.set(title=f"graph: {len(place)} nodes, {len(weight)} edges of weight {weight.min():.2f} to {weight.max():.2f}")
    panel.set(xlabel="2nd eigenvector", ylabel="3rd eigenvector")


def draw_matrix(panel, laplacian: np.ndarray):
    """Entries by colour, zero white."""
    limit = np.abs(laplacian).max()
    image = panel.imshow(laplacian, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    panel.figure.colorbar(image, ax=panel, shrink=0.7)
    panel.set(title="random matrix, not made from a graph", xlabel="channel", ylabel="channel")


def draw_lambda(panel, manifold: Manifold, counts: np.ndarray):
    """Histogram of lambda over the vectors, which occur counts (n,) times."""
    energies = manifold.energies
    for tau, color in ({1.0: MUTED} | {manifold.tau: OWN}).items():
        panel.hist(energies / (energies + tau), bins=BINS, range=(0, 1), weights=counts / counts.sum(), color=color, alpha=0.75, label=f"tau = {tau:.3g}")
    panel.set(xlabel="lambda", ylabel="share of vectors", xlim=(0, 1))
    panel.legend(frameon=False)


def draw_manifold(file, manifold: Manifold, counts: np.ndarray, corpus: str):
    """The PNG of a manifold whose vectors occur counts (n,) times in a corpus of this name."""
    from matplotlib.figure import Figure
    laplacian, source = manifold.laplacian, manifold.provenance["source"]
    n = len(laplacian)
    figure = Figure(figsize=(13, 7), dpi=130, layout="constrained")
    panels = figure.subplot_mosaic([["graph", "spectrum"], ["graph", "lambda"]], width_ratios=[1.7, 1])
    if source == "random":
        draw_matrix(panels["graph"], laplacian)
    else:
        draw_graph(panels["graph"], laplacian, manifold.labels)
    lines = {source: (laplacian, OWN)} | ({} if source == "chain" else dict(chain=(chain_laplacian(n).double().numpy(), MUTED)))
    for name, (matrix, color) in lines.items():
        panels["spectrum"].plot(np.arange(1, n + 1), np.linalg.eigvalsh(matrix), color=color, marker=".", markersize=4, linewidth=1, label=name)
    panels["spectrum"].set(title="spectrum", xlabel="index", ylabel="eigenvalue", ylim=(0, None))
    panels["spectrum"].legend(frameon=False)
    if counts.any():
        panels["lambda"].set_title(f"lambda over {corpus}")
        draw_lambda(panels["lambda"], manifold, counts)
    else:
        panels["lambda"].text(0.5, 0.5, "no vectors in this file", ha="center", va="center", color=MUTED)
        panels["lambda"].set_axis_off()
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks
        figure.savefig(file, format="png")


def run_manifold(options: argparse.Namespace):
    manifold = read_manifold(options.source)
    if len(manifold.laplacian) < 3:
        raise RunError(f"{options.source} has {len(manifold.laplacian)} nodes, and the third eigenvector needs 3")
    source = manifold.provenance.get("of", manifold.provenance)
    corpus, counts = source.get("data", ""), manifold.counts
    if options.data:
        corpus, counts = Path(options.data).resolve().name, occurrences(manifold, options.data)
    kind = f"the keys of {corpus}" if source["source"] == "checkpoint" else f"the tokens of {corpus}"
    write_atomically(options.output, lambda file: draw_manifold(file, manifold, counts, kind))


def add_manifold(parser: argparse.ArgumentParser):
    parser.add_argument("source", metavar="FILE.npz", help="a file of data/manifold.py")
    parser.add_argument("--data", default="", metavar="DIR", help="folder of shards whose tokens are counted (default: those that the file is from)")


COMMANDS = dict(manifold=(run_manifold, add_manifold, "a domain Laplacian"))  # what it does, its own options, its help


def main(argv: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 1 for a fault (one line on stderr), 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, (run, add_options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add_options(command)
        command.add_argument("-o", "--output", metavar="FILE.png", type=Path, required=True)
        command.set_defaults(run=run)
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except RunError as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("visualize.py: interrupted", file=sys.stderr)
        return 130
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
