"""Memory of a GPU against length, over the lengths that the data have."""

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from addax_ds.plan.choose import Choice
from addax_ds.plan.cluster import RESERVED, Cluster
from addax_ds.plan.memory import Curve

PLOT = "memory.png"

# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_FAINT = "#8c959f"


def draw(choice: Choice, curves: dict[str, Curve], cluster: Cluster, path: Path) -> None:
    """Write the plot: Addax's memory against L_T, other methods' against the longest sample, and a histogram below."""
    lengths = np.array(choice.lengths)
    along = np.linspace(lengths.min(), lengths.max(), 200)
    with style.context("default"):  # a user's matplotlibrc has no say here
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        for (name, curve), colour in zip(
            {"addax, against L_T": choice.curve, **curves}.items(), _COLOURS, strict=False
        ):
            above.plot(along, [(curve.at(x) + RESERVED) / 2**30 for x in along], label=name, color=colour)
        room = cluster.gpu.memory / 2**30
        above.axhline(room, color=_FAINT, linestyle="--", label=f"a GPU, {room:.3g} GiB")
        above.set_ylabel("GiB of a GPU")
        above.set_ylim(0, 2 * room)
        figure.legend(*above.get_legend_handles_labels(), fontsize="small", ncols=4, loc="outside upper center")
        edges = np.histogram_bin_edges(lengths, bins=60)
        first_order = lengths <= choice.longest_first_order
        parts = [lengths[first_order], lengths[~first_order]]
        labels = [f"first-order, {first_order.mean():.0%}", f"zeroth-order, {1 - first_order.mean():.0%}"]
        below.hist(parts, edges, stacked=True, color=_COLOURS[:2], label=labels)
        below.set_ylabel("samples")
        below.set_xlabel("tokens")
        below.legend(fontsize="small")
        for axes in (above, below):
            if choice.lt != "none":
                axes.axvline(choice.lt, color=_FAINT, linewidth=1)
                axes.text(choice.lt, axes.get_ylim()[1], f" L_T = {choice.lt}", color=_FAINT, va="top")
            axes.spines[["top", "right"]].set_visible(False)
        FigureCanvasAgg(figure)  # becomes the figure's canvas: no window system, no pyplot
        figure.savefig(path, dpi=150)
