"""What runs came to: one result a run, one row a method, and the plots of their scores."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from rich.markup import escape
from rich.table import Table

from addax_ds.compare.plan import Comparison, Trial, points_of
from addax_ds.training.folder import SUMMARY
from addax_ds.training.metrics import Summary, check_kind, read_json, read_metrics, write_json

TABLE = "comparison.json"
PLOT = "scores.png"
FAULTS = {"lower lr": "diverged", "out of memory": "out of memory"}
"""Words of the complaints of runs that are results all the same, and what they are called in the table."""


@dataclasses.dataclass(frozen=True)
class Score:
    """A score on the dev samples in the course of a run."""

    seconds: float
    """In training steps until then, evaluations left out."""
    samples: float
    """Taken into steps until then, once for each direction that a sample is probed along."""
    score: float


@dataclasses.dataclass(frozen=True)
class Result:
    """A run that has ended; fault: why it has no scores."""

    trial: Trial
    folder: Path
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    course: tuple[Score, ...] = ()
    losses: tuple[float, float] | None = None
    """Mean training loss in the first fifth of the steps and in the last; None of a run without steps."""
    fault: str = ""
    seconds: float = 0.0
    """From its start to its end, of all its parts where it has gone on."""

    @property
    def metric(self) -> str:
        """The score that counts."""
        return str(self.summary["metric_name"])

    @property
    def dev_score(self) -> float:
        """On the samples by which settings are chosen."""
        return self.summary[f"dev_{self.metric}"]

    @property
    def score(self) -> float:
        """On the held-out samples."""
        return self.summary[f"{self.metric}_after"]

    def describe(self) -> str:
        """One line of what it came to."""
        if self.fault:
            return f"{self.trial.name}: {self.fault} (once it can be otherwise, remove {self.folder}.fault)"
        return f"{self.trial.name}: {self.metric} {self.score:.3f}, on the dev samples {self.dev_score:.3f}"


def read_result(trial: Trial, folder: Path) -> Result:
    """The result in a run folder."""
    summary = read_json(folder / SUMMARY)
    check_kind(summary, Summary, str(folder / SUMMARY))
    # Of a run that has lost lines, sums over them would be too small.
    config, records = trial.config, [] if summary["metrics_lost"] else read_metrics(folder)
    metric = summary["metric_name"]
    drawn = len(config.zo_sizes) if config.directions == "per-micro-batch" else 1  # directions of one query
    first_order = config.k1 * (config.alpha < 1)
    seconds = list(itertools.accumulate(record["seconds"] for record in records))
    samples = list(itertools.accumulate(first_order + config.k0 * len(r["g0"]) // drawn for r in records))
    course = [
        Score(at, taken, record[metric])
        for at, taken, record in zip(seconds, samples, records, strict=True)
        if record.get(metric) is not None
    ]
    if records:
        course.append(Score(seconds[-1], samples[-1], summary[f"dev_{metric}"]))
    return Result(trial, folder, summary, tuple(course), _losses(records))


def _losses(records: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """A step of both orders counts by the mean of its two."""
    losses = [loss for loss in map(_loss, records) if math.isfinite(loss)]
    if not losses:
        return None
    fifth = -(-len(losses) // 5)
    return statistics.fmean(losses[:fifth]), statistics.fmean(losses[-fifth:])


def _loss(record: dict[str, Any]) -> float:
    zo, fo = record["loss_zo"], record["loss_fo"]
    told = [statistics.fmean([*zo["plus"], *zo["minus"]])] if zo else []
    return statistics.fmean(told + ([fo] if fo is not None else []))


def _mean_course(results: Sequence[Result]) -> list[Score]:
    """The mean over seeds; empty where one of them has no scores, for the others would be the lucky ones."""
    if any(result.fault for result in results):
        return []
    together = zip(*(result.course for result in results), strict=False)
    return [
        Score(
            statistics.fmean(score.seconds for score in at),
            statistics.fmean(score.samples for score in at),
            statistics.fmean(score.score for score in at),
        )
        for at in together
    ]


def _courses(comparison: Comparison, results: Sequence[Result]) -> dict[str, list[Score]]:
    return {name: _mean_course([r for r in results if r.trial.method == name]) for name in comparison.methods}


def _targets(comparison: Comparison, courses: dict[str, list[Score]]) -> dict[str, float]:
    """The scores to reach, by the file's words for them; a method without a course has no best."""
    best = {name: max(score.score for score in course) for name, course in courses.items() if course}
    scores = {str(target): best.get(str(target), target) for target in comparison.targets}
    return {word: score for word, score in scores.items() if isinstance(score, float)}


def rows(comparison: Comparison, results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a method: score with its spread over seeds, and what it cost."""
    table = []
    courses = _courses(comparison, results)
    targets = _targets(comparison, courses)
    for method in comparison.methods:
        own = [result for result in results if result.trial.method == method]
        good = [result for result in own if not result.fault]
        scores = [result.score for result in good]
        summaries = [result.summary for result in good]
        row: dict[str, Any] = {
            "method": method,
            "points tried": len(points_of(comparison, method)),
            "best point": own[0].trial.point,
            "runs": len(good),
            **{kind: sum(words in result.fault for result in own) for words, kind in FAULTS.items()},
            "with lost lines": sum(summary["metrics_lost"] > 0 for summary in summaries),
        }
        table.append(row)
        if not good:
            continue
        row |= {
            "metric": good[0].metric,
            "score": statistics.fmean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
            "seconds per step": statistics.fmean(s["seconds_per_step"] for s in summaries) if good[0].course else None,
            "peak memory bytes": max(max(s["step_memory_bytes"]) or max(s["peak_memory_bytes"]) for s in summaries),
            "wire bytes per step": max(sum(s["wire_bytes_per_step"].values()) for s in summaries),
            "trainable parameters": summaries[0]["trainable_parameters"],
            "losses": [statistics.fmean(at) for at in zip(*(r.losses for r in good if r.losses), strict=True)] or None,
        }
        for word, target in targets.items():
            reached = next((score for score in courses[method] if score.score >= target), None)
            row[f"seconds to {word}"] = reached.seconds if reached else None
            row[f"samples to {word}"] = reached.samples if reached else None
    return table


def write(comparison: Comparison, results: Sequence[Result], output: Path) -> Path:
    """Write comparison.json and scores.png; the former's path."""
    courses = [
        {"method": r.trial.method, "seed": r.trial.config.seed, "course": [dataclasses.astuple(s) for s in r.course]}
        for r in results
    ]
    told = {
        "comparison": dataclasses.asdict(comparison),
        "targets": _targets(comparison, _courses(comparison, results)),
        "rows": rows(comparison, results),
        "courses": courses,
    }
    write_json(output / TABLE, told)
    _plot(comparison, results, output / PLOT)
    return output / TABLE


def table(comparison: Comparison, results: Sequence[Result]) -> Table:
    """The rows for the terminal."""
    shown = Table(title=escape(f"{comparison.run.get('model', 'model')} on {comparison.run.get('data', 'data')}"))
    for column in ("method", "best of", "score", "loss", "s/step", "peak", "wire/step", "trained"):
        shown.add_column(column, justify="left" if column in ("method", "best of") else "right")
    targets = _targets(comparison, _courses(comparison, results))
    for word, target in targets.items():
        title = f"{escape(word)}'s {target:.3f}" if word in comparison.methods else f"{target:g}"
        shown.add_column(f"s to {title}", justify="right")
        shown.add_column(f"samples to {title}", justify="right")
    for row in rows(comparison, results):
        point = " ".join(f"{name}={value}" for name, value in row["best point"].items())
        marks = "".join(f", {row[kind]} {kind}" for kind in (*FAULTS.values(), "with lost lines") if row[kind])
        if not row["runs"]:
            shown.add_row(escape(row["method"]), f"{row['points tried']}: none ran to its end", f"(0 runs{marks})")
            continue
        spread = f" ± {row['spread']:.3f}" if row["spread"] is not None else ""
        cells = [
            escape(row["method"]),
            escape(f"{row['points tried']}: {point}") if point else "-",
            f"{row['metric']} {row['score']:.3f}{spread} ({row['runs']} runs{marks})",
            " → ".join(f"{loss:.2f}" for loss in row["losses"] or ()) or "-",
            "-" if row["seconds per step"] is None else f"{row['seconds per step']:.2f}",
            f"{row['peak memory bytes'] / 2**30:.2f} GiB",
            f"{row['wire bytes per step'] / 1e6:,.0f} MB",
            f"{row['trainable parameters']:,}",
        ]
        for word in targets:
            reached = row[f"seconds to {word}"], row[f"samples to {word}"]
            cells += ["-" if number is None else f"{number:,.0f}" for number in reached]
        shown.add_row(*cells)
    return shown


def _plot(comparison: Comparison, results: Sequence[Result], path: Path) -> None:
    """Scores in the course of the runs, by seconds and by samples: mean and range over seeds."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    by_seconds, by_samples = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(comparison.methods):
        courses = [r.course for r in results if r.trial.method == method and r.course]
        if not courses:
            flat = [r.dev_score for r in results if r.trial.method == method and not r.fault]
            for axes in (by_seconds, by_samples) if flat else ():
                axes.axhline(statistics.fmean(flat), color=_colour(number), linestyle=":", label=method)
            continue
        together = list(zip(*courses, strict=False))
        scores = [[score.score for score in at] for at in together]
        means = [statistics.fmean(at) for at in scores]
        for axes, kind in ((by_seconds, "seconds"), (by_samples, "samples")):
            x = [statistics.fmean(getattr(score, kind) for score in at) for at in together]
            axes.plot(x, means, "o-", markersize=3, color=_colour(number), label=method)
            axes.fill_between(
                x, [min(at) for at in scores], [max(at) for at in scores], color=_colour(number), alpha=0.15
            )
    metric = next((r.metric for r in results if not r.fault), "score")
    by_seconds.set(xlabel="seconds in training steps", ylabel=f"{metric} on the dev samples", xscale="log")
    by_samples.set(xlabel="samples taken into steps", xscale="log")
    for axes in (by_seconds, by_samples):
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*by_samples.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    FigureCanvasAgg(figure).print_png(str(path))


def _colour(number: int) -> Any:
    """Twenty that differ; the strong ones first."""
    return colormaps["tab20"](number * 2 % 20 + number // 10 % 2)
