"""The report of every kind of run: it is drawn, complete, escaped, and refuses what is no run."""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from addax_ds.errors import UserError
from addax_ds.training import report
from addax_ds.training.metrics import MetricsWriter, read_json, read_metrics, write_json
from addax_ds.training.report import summary_table, write_report

PNGS = ("loss.png", "projected_gradient.png", "accuracy.png", "lengths.png", "memory.png")
DIGEST = "sha256:" + "ab12" * 16


def make_run(folder, *, steps=20, alpha=0.5, lt=24, skipped=(), queries=1, metric="accuracy", scores=True, **changes):
    """A run folder as the train command leaves it; `changes` go into the summary."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.2, 0.45, 300).astype(int), 4, 71)
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            bad = math.nan if step in skipped else 0.0
            probe = [float(value) + bad for value in random.normal(0.7, 0.1, queries)]
            record = {
                "step": step,
                "seed": 7 * step,
                "g0": [float(value) + bad for value in random.normal(0, 20, queries)] if alpha else [],
                "loss_zo": {"plus": probe, "minus": probe} if alpha else None,
                "loss_fo": 0.6 + bad if alpha < 1 else None,
                "lr": 1e-3,
                "skipped": step in skipped,
                "seconds": 0.8,
                "tokens": 600,
                "memory_bytes": 2**30 + step,
            }
            if scores and step % 10 == 0:
                record[metric] = 0.7
            writer.append(record)
    summary = {
        "method": "Addax",
        "engine": "deepspeed",
        "world_size": 2,
        "steps": steps,
        "metrics_lost": 0,
        "skipped_steps": len(skipped),
        "trainable_parameters": 134_515_008,
        "model": "smollm2-135m",
        "data": "movies",
        "metric_name": metric,
        "seconds_per_step": 0.8123,
        "wire_bytes_per_step": {"all_gather": 538 * 2**20, "reduce_scatter": 96},
        "peak_memory_bytes": [2**30, 3 * 2**29],
        "step_memory_bytes": [2**29, 2**30],
        "seconds_total": 4000.0,
        "final_digest": DIGEST,
    }
    if scores:
        summary |= {f"{metric}_before": 0.528, f"{metric}_after": 0.848}
    write_json(folder / "summary.json", summary | changes)
    zo = len(lengths) if lt is None else int((lengths > lt).sum())
    fo = len(lengths) if lt is None else len(lengths) - zo
    write_json(folder / "lengths.json", {"lengths": lengths.tolist(), "lt": lt, "zo": zo, "fo": fo})
    (folder / "config.yaml").write_text("model: smollm2-135m\nlr: 0.001\n")
    return folder


def draw(name, folder):
    """The axes of one plot of a run, for looking at what was drawn."""
    axes = Figure().add_subplot()
    report._PLOTS[name][0](axes, report._load(folder))
    return axes


def legend(axes):
    return axes.get_legend_handles_labels()[1]


def notes(axes):
    return [text.get_text() for text in axes.texts]


def printed(summary):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    return console.export_text()


RUNS = {
    "mixed": {"skipped": (4, 11)},
    "one step": {"steps": 1},
    "one skipped step": {"steps": 1, "skipped": (1,)},
    "alpha 0": {"alpha": 0},
    "alpha 1": {"alpha": 1, "queries": 4},
    "Addax-WA": {"lt": None},
    "all steps skipped": {"skipped": tuple(range(1, 21))},
    "no evaluation": {"scores": False},
    "null evaluation": {"accuracy_before": None, "accuracy_after": None},
    "completion": {"metric": "f1", "exact_match_before": 0.6, "exact_match_after": 0.9},
    "one process": {"world_size": 1, "wire_bytes_per_step": {}, "peak_memory_bytes": [2**30]},
    "L_T above every length": {"lt": 500},
    "L_T below every length": {"lt": 1},
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_gets_a_page_and_five_real_pictures(tmp_path, case):
    folder = make_run(tmp_path, **RUNS[case])
    page = write_report(folder)
    assert page == folder / "report.html"
    for name in PNGS:
        pixels = mpl.image.imread(folder / name)
        assert pixels.shape[1] >= 1000 and pixels.shape[0] >= 500
        assert (pixels[..., :3].min(axis=-1) < 0.5).sum() > 1000, f"{name} is blank"
        assert f'src="{name}"' in page.read_text()


def test_a_torn_last_line_does_not_stop_the_report(tmp_path):
    folder = make_run(tmp_path)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "g0": [')
    write_report(folder)
    assert len(report._load(folder).steps) == 20


def test_the_page_leads_with_the_result_and_speaks_in_human_units(tmp_path):
    text = write_report(make_run(tmp_path, skipped=(3,))).read_text()
    assert text.index("0.528 → 0.848") < text.index("<table>") < text.index("<img") < text.index("lr: 0.001")
    for words in (
        "1.50 GiB",
        "538.00 MiB",
        "96 B",
        "0.812 s",
        "4,000 s (1 h 7 min)",
        "20, 1 of them skipped",
        DIGEST,
    ):
        assert words in text
    assert "prefers-color-scheme: dark" in text
    assert "<script" not in text and "http" not in text


def test_the_page_says_so_when_nothing_was_evaluated(tmp_path):
    text = write_report(make_run(tmp_path, scores=False)).read_text()
    assert "No accuracy was measured" in text and "→" not in text


def test_everything_foreign_is_escaped(tmp_path):
    attack = "<script>alert('x')</script> & \"{braces}\""
    folder = make_run(tmp_path, model=attack, data=attack, method=attack, engine=attack, final_digest=attack)
    write_json(folder / "summary.json", read_json(folder / "summary.json") | {"wire_bytes_per_step": {attack: 1}})
    (folder / "config.yaml").write_text(f"model: {attack}\n</pre><b>\n")
    text = write_report(folder).read_text()
    tags, words = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)
    parser.handle_data = words.append
    parser.feed(text)
    assert not {"script", "b"} & set(tags)
    assert "".join(words).count(attack) == 3 + 3 + 6 + 1  # title, heading, table, configuration


def test_loss_plot_shows_the_mean_of_all_probes_and_marks_skipped_steps(tmp_path):
    folder = make_run(tmp_path, steps=2, skipped=(2,))
    first, second = read_metrics(folder)
    first["loss_zo"] = {"plus": [1.0, 2.0], "minus": [3.0, 6.0]}
    (folder / "metrics.jsonl").unlink()
    with MetricsWriter(folder) as writer:
        writer.append(first)
        writer.append(second)
    axes = draw("loss", folder)
    zo, fo, skipped = (line for line in axes.lines if not line.get_label().startswith("_"))
    assert zo.get_ydata()[0] == 3.0 and fo.get_ydata()[0] == 0.6
    assert np.isnan(zo.get_ydata()[1])
    assert list(skipped.get_xdata()) == [2] and skipped.get_label() == "skipped steps: 1"


def test_smoothing_ignores_skipped_steps_and_is_not_dragged_down_at_the_ends():
    values = np.array([2.0, 2.0, math.nan, 2.0, 2.0])
    assert np.array_equal(report._smoothed(values, 3), np.full(5, 2.0))
    assert np.array_equal(report._smoothed(np.array([0.0, 3.0, 6.0]), 3), [1.5, 3.0, 4.5])
    assert np.isnan(report._smoothed(np.full(3, math.nan), 1)).all()


@pytest.mark.parametrize(
    ("run", "name", "note"),
    [
        ({"alpha": 0}, "projected_gradient", "no zeroth-order part in this run (alpha = 0)"),
        ({"steps": 2, "skipped": (1, 2)}, "projected_gradient", "no finite projected gradient"),
        ({"steps": 2, "skipped": (1, 2)}, "loss", "no finite loss"),
        ({"scores": False}, "accuracy", "accuracy was not evaluated"),
    ],
)
def test_an_empty_plot_says_why_it_is_empty(tmp_path, run, name, note):
    assert notes(draw(name, make_run(tmp_path, **run))) == [note]


def test_projected_gradient_has_one_dot_per_direction_and_goes_symlog_only_for_giants(tmp_path):
    folder = make_run(tmp_path, queries=3, skipped=(5,))
    axes = draw("projected_gradient", folder)
    assert len(next(line for line in axes.lines if "dot" in line.get_label()).get_xdata()) == 3 * 19
    assert axes.get_yscale() == "linear"
    record = read_metrics(folder)[-1] | {"step": 21, "g0": [1e6]}
    with MetricsWriter(folder, steps=20) as writer:
        writer.append(record)
    axes = draw("projected_gradient", folder)
    assert axes.get_yscale() == "symlog" and axes.get_ylim()[1] > 1e6


def test_accuracy_plot_writes_the_values_before_during_and_after(tmp_path):
    axes = draw("accuracy", make_run(tmp_path))
    assert notes(axes) == ["0.528", "0.700", "0.848"]
    curve = next(line for line in axes.lines if line.get_label() == "accuracy")
    assert list(curve.get_xdata()) == [0, 10, 20]
    assert "zero-shot accuracy" in legend(axes)


def test_accuracy_plot_of_many_evaluations_labels_only_the_ends(tmp_path):
    assert notes(draw("accuracy", make_run(tmp_path, steps=200))) == ["0.528", "0.848"]


def test_completion_runs_show_exact_match_and_f1(tmp_path):
    folder = make_run(tmp_path, metric="f1", exact_match_before=0.6, exact_match_after=0.7)
    assert {"exact match", "F1"} <= set(legend(draw("accuracy", folder)))
    table = printed(read_json(folder / "summary.json"))
    assert all(words in table for words in ("F1 after", "0.848", "exact match before", "0.600"))


@pytest.mark.parametrize("lt", [5, 20, 24, 70])
def test_every_histogram_bar_lies_on_one_side_of_the_threshold(tmp_path, lt):
    folder = make_run(tmp_path, lt=lt)
    counts = read_json(folder / "lengths.json")
    axes = draw("lengths", folder)
    fo, zo = axes.containers
    assert sum(bar.get_height() for bar in fo) == counts["fo"]
    assert sum(bar.get_height() for bar in zo) == counts["zo"]
    assert all(bar.get_x() + bar.get_width() <= lt + 0.5 for bar in fo if bar.get_height())
    assert all(bar.get_x() >= lt + 0.5 for bar in zo if bar.get_height())
    assert legend(axes) == [f"first-order, {counts['fo']} samples", f"zeroth-order, {counts['zo']} samples"]
    assert [line.get_xdata()[0] for line in axes.lines] == [lt + 0.5]
    assert notes(axes) == [f"$L_T$ = {lt} tokens"]


def test_addax_wa_has_no_threshold_line_and_counts_every_sample(tmp_path):
    axes = draw("lengths", make_run(tmp_path, lt=None))
    assert not axes.lines and not axes.texts
    assert sum(bar.get_height() for bar in axes.patches) == 300
    assert "zeroth-order pool 300, first-order pool 300" in legend(axes)[0]


def test_memory_plot_shows_the_peak_of_all_ranks(tmp_path):
    axes = draw("memory", make_run(tmp_path))
    assert "peak of all ranks, 1.50 GiB" in legend(axes)
    assert axes.get_ylabel() == "memory (GiB)" and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.5


def test_terminal_table_has_the_results_and_takes_no_name_for_markup(tmp_path):
    summary = read_json(make_run(tmp_path, final_digest="[red]ab[/red]") / "summary.json")
    table = printed(summary)
    for words in ("accuracy before", "0.528", "0.848", "0.812 s", "1.50 GiB (the fullest of 2 ranks)"):
        assert words in table
    assert "all gather" in table and "538.00 MiB" in table and "[red]ab[/red]" in table


def test_terminal_table_without_results_says_so(tmp_path):
    table = printed(read_json(make_run(tmp_path, scores=False, wire_bytes_per_step={}) / "summary.json"))
    assert table.count("not evaluated") == 2 and "nothing" in table


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json", "lengths.json"])
def test_a_missing_file_is_named_and_nothing_is_written(tmp_path, name):
    folder = make_run(tmp_path)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        write_report(folder)
    assert not list(folder.glob("*.png")) and not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "lengths.json"])
def test_a_file_of_another_kind_is_named_and_nothing_is_written(tmp_path, name):
    folder = make_run(tmp_path)
    (folder / name).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=rf"{name}.*: no \w+ in it"):
        write_report(folder)
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in ("metrics.jsonl", "summary.json", "lengths.json") for content in ("{}", "[1]", "3")]
    + [("lengths.json", '{"lengths": [], "lt": 3, "zo": 0, "fo": 0}')]
    + [(name, "[" * 100_000) for name in ("metrics.jsonl", "summary.json", "lengths.json")],
)
def test_damage_is_one_line_that_names_the_file(tmp_path, name, content):
    folder = make_run(tmp_path)
    (folder / name).write_text(content + "\n")
    with pytest.raises(UserError, match=name) as refusal:
        write_report(folder)
    assert "\n" not in str(refusal.value) and not list(folder.glob("*.png"))


@pytest.mark.parametrize("key", ["step", "g0", "loss_zo", "loss_fo", "skipped", "memory_bytes", "accuracy"])
@pytest.mark.parametrize("value", ["3", {"a": 1}, [[]]])
def test_a_step_with_a_value_of_another_kind_is_named(tmp_path, key, value):
    folder = make_run(tmp_path, steps=1)
    record = json.loads((folder / "metrics.jsonl").read_text())
    (folder / "metrics.jsonl").write_text(json.dumps(record | {key: value}) + "\n")
    with pytest.raises(UserError, match=rf"metrics.jsonl: line 1: .*{key}"):
        write_report(folder)


@pytest.mark.parametrize(
    "key", ["world_size", "metric_name", "seconds_per_step", "wire_bytes_per_step", "accuracy_after"]
)
def test_a_summary_with_a_value_of_another_kind_is_named(tmp_path, key):
    with pytest.raises(UserError, match=rf"summary.json: {key}"):
        write_report(make_run(tmp_path, **{key: [[]]}))


@pytest.mark.parametrize("name", ["loss.png", "report.html"])
def test_a_report_that_cannot_be_written_says_that_the_run_is_complete(tmp_path, name, monkeypatch):
    folder = make_run(tmp_path)
    again = f"the run itself is complete: mend that and draw its report with addax-ds report {folder}"
    (folder / name).mkdir()
    with pytest.raises(UserError, match=re.escape(f"{folder / name}: Is a directory: {again}")):
        write_report(folder)

    def read_only(figure: Figure, path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Figure, "savefig", read_only)
    with pytest.raises(UserError, match=rf"\.png: Read-only file system: {re.escape(again)}"):
        write_report(folder)


def test_a_run_without_a_step_is_refused(tmp_path):
    folder = make_run(tmp_path, steps=0)
    with pytest.raises(UserError, match="no step in it"):
        write_report(folder)


def test_matplotlib_keeps_its_global_state_and_needs_no_display(tmp_path):
    folder = make_run(tmp_path)
    program = (
        "import pathlib, sys, matplotlib\n"
        "from addax_ds.training.report import write_report\n"
        "def params():\n"
        "    return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = params()\n"
        f"write_report(pathlib.Path({str(folder)!r}))\n"
        "assert params() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
