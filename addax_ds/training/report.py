"""The report of a finished run: one HTML page with plots beside it, and the table in the terminal."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text

from addax_ds.errors import UserError
from addax_ds.training.metrics import METRICS, Lengths, Step, Summary, check_kind, read_json, read_metrics

# Okabe and Ito's palette, told apart by colour-blind readers. One colour, one meaning in every plot.
_ZO, _FO, _OTHER, _SECOND, _INK, _FAINT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#24292f", "#8c959f"

_STYLE = {
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 30,  # room for the legend, which stands above the axes where it hides no data
    "lines.markersize": 5,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class _Run:
    """The files of a run folder, checked."""

    config: str
    steps: list[dict[str, Any]]
    summary: dict[str, Any]
    lengths: dict[str, Any]

    @property
    def x(self) -> np.ndarray:
        return np.array([record["step"] for record in self.steps])


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html and its five PNGs, and return the path of the page.

    Reads config.yaml, metrics.jsonl, summary.json and lengths.json of the run. Raises `UserError`
    for a missing or damaged file, before anything is written, and where the report cannot be written.
    """
    run = _load(folder)
    page = folder / "report.html"
    try:
        _draw(run, folder)
        page.write_text(_page(run), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}: the run itself is complete: "
            f"mend that and draw its report with addax-ds report {folder}"
        ) from None
    return page


def _draw(run: _Run, folder: Path) -> None:
    with style.context(["default", _STYLE]):  # a user's matplotlibrc has no say here
        for name, (draw, _) in _PLOTS.items():
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            draw(figure.add_subplot(), run)
            FigureCanvasAgg(figure)  # becomes the figure's canvas: no window system, no pyplot
            figure.savefig(folder / f"{name}.png", dpi=150)


def summary_table(summary: dict[str, Any]) -> Table:
    """The results in `summary` (the content of summary.json), as a table for the terminal."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _results(summary):
        table.add_row(name, Text(value))  # Text: a name with [brackets] is no markup
    return table


def _load(folder: Path) -> _Run:
    steps = read_metrics(folder)
    if not steps:
        raise UserError(f"{folder / METRICS}: no step in it: give the folder of a finished run")
    for number, record in enumerate(steps, start=1):
        check_kind(record, Step, f"{folder / METRICS}: line {number}")
    summary, lengths = read_json(folder / "summary.json"), read_json(folder / "lengths.json")
    check_kind(summary, Summary, f"{folder / 'summary.json'}")
    check_kind(lengths, Lengths, f"{folder / 'lengths.json'}")
    path = folder / "config.yaml"
    try:
        config = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the folder of a finished run") from None
    return _Run(config, steps, summary, lengths)


# Plots: each draws one figure of a run on empty axes.


def _draw_loss(axes: Axes, run: _Run) -> None:
    losses = {
        "zeroth-order (mean of plus and minus)": (_ZO, [_zo_loss(record["loss_zo"]) for record in run.steps]),
        "first-order": (_FO, [math.nan if r["loss_fo"] is None else r["loss_fo"] for r in run.steps]),
    }
    window = 2 * min(len(run.steps) // 20, 12) + 1  # a wider one would hide how fast the loss first falls
    for name, (colour, raw) in losses.items():
        values = _finite(raw)
        if np.isnan(values).all():
            continue
        axes.plot(run.x, values, "o", markersize=4, color=colour, alpha=0.3, markeredgewidth=0)
        _line(axes, run.x, _smoothed(values, window), colour, name)
    title = "Training loss" if window == 1 else f"Training loss (lines: mean over {window} steps)"
    _note_if_empty(axes, "no finite loss")
    _mark_skipped(axes, run)
    _finish_steps(axes, run, title, "loss (nats)")


def _draw_projected_gradient(axes: Axes, run: _Run) -> None:
    pairs = [(record["step"], g0) for record in run.steps for g0 in record["g0"] if math.isfinite(g0)]
    if pairs:
        x, values = np.array(pairs).T
        sizes = np.abs(values[values != 0])
        # A few giants on a linear axis would press all other steps into the zero line.
        if sizes.size and sizes.max() > 30 * np.median(sizes):
            axes.set_yscale("symlog", linthresh=float(np.median(sizes)))
        axes.axhline(0, color=_INK, linewidth=1)
        axes.plot(x, values, "o", color=_ZO, alpha=0.5, markeredgewidth=0, label="one dot per direction")
        reach = 1.3 * np.abs(values).max() or 1.0
        axes.set_ylim(-reach, reach)
    has_zo = any(record["g0"] for record in run.steps)
    empty = "no finite projected gradient" if has_zo else "no zeroth-order part in this run (alpha = 0)"
    _note_if_empty(axes, empty)
    _mark_skipped(axes, run)
    title = "Projected gradient $g_0$ of each step"
    _finish_steps(axes, run, title, "$g_0$ (change of loss per unit of z)")


def _draw_score(axes: Axes, run: _Run) -> None:
    for name, colour in zip(_score_names(run.summary), (_OTHER, _SECOND), strict=False):
        before, after = (run.summary.get(f"{name}_{when}") for when in ("before", "after"))
        points = {r["step"]: r[name] for r in run.steps if r.get(name) is not None}
        points |= {step: value for step, value in ((0, before), (run.x[-1], after)) if value is not None}
        if not points:
            continue
        points = dict(sorted(points.items()))
        if before is not None:
            axes.axhline(before, color=colour, linestyle=":", label=f"zero-shot {_words(name)}")
        axes.plot(list(points), list(points.values()), "o-", color=colour, label=_words(name))
        for step in points if len(points) <= 10 else (min(points), max(points)):
            # A rising curve leaves room above to the left and below to the right; F1 is above exact match.
            offset, side = ((4, -14), "left") if name == "exact_match" else ((-2, 6), "right")
            at: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": side}
            axes.annotate(_score(points[step]), (step, points[step]), **at)
    axes.margins(y=0.2)
    name = _words(run.summary["metric_name"])
    title = f"Held-out {name} before, during and after training"
    _note_if_empty(axes, f"{name} was not evaluated")
    _finish_steps(axes, run, title, "score (0 to 1)", margin=0.09)  # the outermost labels need the room


def _draw_lengths(axes: Axes, run: _Run) -> None:
    lengths, lt = np.array(run.lengths["lengths"]), run.lengths["lt"]
    zo, fo = run.lengths["zo"], run.lengths["fo"]
    title = "Token lengths of the training samples"
    split = lengths.max() if lt is None else lt
    # Edges are counted from the split, so that no bar holds samples of both sides.
    width = max(1, math.ceil((lengths.max() - lengths.min() + 1) / 40))
    first = math.floor((lengths.min() - split - 1) / width)
    last = math.ceil((lengths.max() - split) / width)
    edges = split + 0.5 + width * np.arange(first, last + 1)
    edges[0] = max(edges[0], 0)
    bars: dict[str, Any] = {"bins": edges, "edgecolor": "white", "linewidth": 0.5}
    if lt is None:
        label = f"no length split: zeroth-order pool {zo:,}, first-order pool {fo:,}"
        axes.hist(lengths, color=_OTHER, label=label, **bars)
    else:
        title += ", split at $L_T$"
        axes.hist(lengths[lengths <= lt], color=_FO, label=f"first-order, {fo:,} samples", **bars)
        axes.hist(lengths[lengths > lt], color=_ZO, label=f"zeroth-order, {zo:,} samples", **bars)
        axes.axvline(lt + 0.5, color=_INK, linestyle="--")
        axes.margins(y=0.15)  # room for the label above the bars
        offset, side = ((6, -4), "left") if lt < edges.mean() else ((-6, -4), "right")
        at: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "top"}
        axes.annotate(f"$L_T$ = {lt} tokens", (lt + 0.5, 1), xycoords=axes.get_xaxis_transform(), **at)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    _finish(axes, title, "length (tokens, after the template)", "samples")


def _draw_memory(axes: Axes, run: _Run) -> None:
    peak = max(run.summary["peak_memory_bytes"])
    own = np.array([record["memory_bytes"] for record in run.steps], dtype=float)
    scale, unit = _byte_unit(max(peak, own.max()))
    _line(axes, run.x, own / scale, _OTHER, "rank 0, in this step")
    axes.axhline(peak / scale, color=_INK, linestyle=":", label=f"peak of all ranks, {_size(peak)}")
    axes.set_ylim(0, 1.15 * max(peak, own.max()) / scale or 1.0)
    _finish_steps(axes, run, "Peak memory", f"memory ({unit})")


_PLOTS: dict[str, tuple[Callable[[Axes, _Run], None], str]] = {
    "accuracy": (
        _draw_score,
        "Each point is the whole held-out set; the dotted line is the model before training. "
        "What counts is how far the last point stands above it.",
    ),
    "loss": (
        _draw_loss,
        "A line should fall. The zeroth-order line is the loss of the perturbed weights on the zeroth-order "
        "batch, the first-order line that of the weights themselves on the first-order batch, so their "
        "heights need not agree. A cross at the bottom is a step that was skipped because a number was not "
        "finite.",
    ),
    "projected_gradient": (
        _draw_projected_gradient,
        "The slope of the loss along each random direction. Dots scatter evenly around zero; a fan that "
        "opens towards the right warns of divergence: lower lr or alpha.",
    ),
    "lengths": (
        _draw_lengths,
        "With a length split, samples longer than L_T train by forward passes alone and the others with "
        "back-propagation, so that L_T bounds the memory of activations. Without one, any sample may do "
        "either.",
    ),
    "memory": (
        _draw_memory,
        "The most memory that was in use in each step. It should be level after the first few steps; "
        "a line that keeps climbing is a leak.",
    ),
}


def _zo_loss(probes: dict[str, list[float]] | None) -> float:
    return math.nan if probes is None else float(np.mean([*probes["plus"], *probes["minus"]]))


def _finite(values: list[float]) -> np.ndarray:
    array = np.array(values, dtype=float)
    return np.where(np.isfinite(array), array, math.nan)


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) steps; a step without a value weighs nothing."""
    present, ones = ~np.isnan(values), np.ones(window)
    count = np.convolve(present, ones, mode="same")
    total = np.convolve(np.where(present, values, 0), ones, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    marker = "o" if np.isfinite(y).sum() == 1 else None  # a line through one point is invisible
    axes.plot(x, y, color=colour, linewidth=2, marker=marker, label=label)


def _note_if_empty(axes: Axes, why: str) -> None:
    if not axes.has_data():
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", fontsize=13)
        axes.set_yticks([])


def _mark_skipped(axes: Axes, run: _Run) -> None:
    steps = [record["step"] for record in run.steps if record["skipped"]]
    if steps:  # at the bottom, since what is not finite has no height of its own
        label, bottom = f"skipped steps: {len(steps):,}", axes.get_xaxis_transform()
        axes.plot(steps, [0.03] * len(steps), "x", color=_INK, transform=bottom, label=label)


def _finish_steps(axes: Axes, run: _Run, title: str, y: str, margin: float = 0.04) -> None:
    last = run.x[-1]
    axes.set_xlim(-margin * last, (1 + margin) * last)
    _finish(axes, title, "step", y)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=10)


# The numbers in words, and the page.


def _score_names(summary: dict[str, Any]) -> tuple[str, ...]:
    name = summary["metric_name"]
    return (name, "exact_match") if name == "f1" else (name,)


def _words(name: str) -> str:
    return "F1" if name == "f1" else name.replace("_", " ")


def _score(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.3f}"


def _byte_unit(count: float) -> tuple[int, str]:
    power = max((n for n in range(4) if count >= 1024**n), default=0)
    return 1024**power, ("B", "KiB", "MiB", "GiB")[power]


def _size(count: float) -> str:
    scale, unit = _byte_unit(count)
    return f"{count:.0f} B" if unit == "B" else f"{count / scale:.2f} {unit}"


def _time(seconds: float) -> str:
    if not 100 <= seconds < math.inf:  # nan, too
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{seconds:,.0f} s" + (f" ({minutes // 60} h {minutes % 60} min)" if minutes >= 60 else "")


def _setting(summary: dict[str, Any]) -> list[tuple[str, str]]:
    steps = f"{summary['steps']:,}"
    if summary["skipped_steps"]:
        steps += f", {summary['skipped_steps']:,} of them skipped"
    return [
        ("method", str(summary["method"])),
        ("model", str(summary["model"])),
        ("data", str(summary["data"])),
        ("engine", str(summary["engine"])),
        ("ranks", str(summary["world_size"])),
        ("steps", steps),
    ]


def _results(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name in _score_names(summary):
        for when in ("before", "after"):
            rows.append((f"{_words(name)} {when}", _score(summary.get(f"{name}_{when}"))))
    if summary["steps"]:
        rows.append(("time per step", _time(summary["seconds_per_step"])))
    peaks = summary["peak_memory_bytes"]
    peak = _size(max(peaks))
    rows.append(("peak memory", peak if len(peaks) == 1 else f"{peak} (the fullest of {len(peaks)} ranks)"))
    wire = summary["wire_bytes_per_step"]
    for name, count in wire.items():
        rows.append((f"wire per step, {_words(name)}", f"{_size(count)} received per rank"))
    if not wire:
        rows.append(("wire per step", "nothing"))
    rows.append(("time in all", _time(summary["seconds_total"])))
    rows.append(("final digest", str(summary["final_digest"])))
    return rows


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --page: #ffffff; --ink: #24292f; --soft: #57606a; --line: #d8dee4; --panel: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --panel: #161b22; }}
}}
body {{ margin: 0 auto; max-width: 54rem; padding: 2rem 1.25rem 4rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
h1 {{ margin: 0; font-size: 1.1rem; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }}
h2 {{ margin: 2.5rem 0 0.75rem; font-size: 1.25rem; }}
.result {{ margin: 0.5rem 0 0; font-size: 2.75rem; font-weight: 700; line-height: 1.2; }}
.what {{ margin: 0; color: var(--soft); }}
table {{ width: 100%; border-collapse: collapse; }}
th, td {{ padding: 0.4rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th {{ width: 40%; padding-right: 1rem; font-weight: 400; color: var(--soft); }}
td {{ overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.5rem 0 2.25rem; }}
img {{ display: block; box-sizing: border-box; width: 100%; height: auto; padding: 0.75rem;
  background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }}
figcaption {{ margin-top: 0.6rem; color: var(--soft); }}
pre {{ overflow-x: auto; padding: 1rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  font: 0.85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
</style>
</head>
<body>
<h1>{title}</h1>
{headline}
<h2>Summary</h2>
<table>
{rows}
</table>
<h2>Plots</h2>
{figures}
<h2>Configuration</h2>
<pre>{config}</pre>
</body>
</html>
"""


def _page(run: _Run) -> str:
    def escaped_row(name: str, value: str) -> str:
        return f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'

    summary = run.summary
    figures = [
        f'<figure><img src="{name}.png" alt="{_words(name)}"><figcaption>{caption}</figcaption></figure>'
        for name, (_, caption) in _PLOTS.items()
    ]
    return _HTML.format(
        title=html.escape(f"{summary['method']}: {summary['model']} on {summary['data']}"),
        headline=_headline(summary),
        rows="\n".join(escaped_row(*row) for row in _setting(summary) + _results(summary)),
        figures="\n".join(figures),
        config=html.escape(run.config),
    )


def _headline(summary: dict[str, Any]) -> str:
    name = summary["metric_name"]
    before, after = summary.get(f"{name}_before"), summary.get(f"{name}_after")
    what = html.escape(_words(name))
    if after is None:
        return f'<p class="what">No {what} was measured after training.</p>'
    result = _score(after) if before is None else f"{_score(before)} → {_score(after)}"
    when = "after training" if before is None else "before → after training"
    return f'<p class="result">{result}</p>\n<p class="what">held-out {what}, {when}</p>'
