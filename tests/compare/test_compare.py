"""Comparisons: planned, run, gone on with, and told in one table."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from addax_ds.compare.execute import _complaint
from addax_ds.compare.plan import Comparison, check, load_comparison, points_of, trial
from addax_ds.compare.results import Result, Score, rows, table, write
from addax_ds.config import build
from addax_ds.errors import UserError
from tests.cli.commands import run

METHODS = {
    "addax": {"method": "addax", "alpha": 0.01, "grid": {"lr": [0.3, 1e9]}},
    "adamw-lora": {"method": "adamw", "adapter": {"kind": "lora", "rank": 2}, "grid": {"lr": [0.01, 0.02]}},
    "zero-shot": {"method": "zero-shot"},
}


def shared(tiny, **more):
    values = yaml.safe_load(tiny.run_file.read_text())
    return {**values, "steps": 4, "eval_every": 2, "dev_samples": 12, "save": False, **more}


def comparison(tiny, methods=METHODS, **settings):
    values = {"run": shared(tiny), "methods": methods, "targets": [0.1, 1.1], **settings}
    return build(Comparison, values, "compare.yaml")


def test_a_grid_is_every_value_with_every_other(tiny):
    grid = {"lr": [0.1, 0.2], "alpha": [0.3, 0.4, 0.5]}
    planned = comparison(tiny, {"addax": {"grid": grid}})
    points = points_of(planned, "addax")
    assert len(points) == 6 and {"lr": 0.2, "alpha": 0.3} in points
    configs = [trial(planned, "addax", point, 7).config for point in points]
    assert {(config.lr, config.alpha) for config in configs} == {(p["lr"], p["alpha"]) for p in points}
    assert {config.seed for config in configs} == {7}
    assert len({trial(planned, "addax", point, seed).name for point in points for seed in (0, 1)}) == 12


def test_a_methods_meaning_comes_before_what_all_runs_share(tiny):
    planned = comparison(tiny, {"mezo": {"method": "mezo"}, "short": {"method": "ip-sgd", "lt": 20}})
    assert shared(tiny)["alpha"] != 1
    assert trial(planned, "mezo", {}, 0).config.alpha == 1
    assert trial(planned, "short", {}, 0).config.lt == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"../a": {}}}, r"methods: \.\./a: use letters"),
        ({"methods": {"a": None}}, "methods is"),
        ({"run": 3}, "run is 3"),
        ({"methods": {"a": {"grid": {"seed": [4, 5]}}}}, "seed is set by the comparison"),
        ({"methods": {"a": {"grid": {"lr": [1, 1]}}}}, "grid has a point twice"),
        ({"seeds": [0, 1, -1]}, "seed is -1"),
        ({"seeds": [0, 1]}, "seeds has 2: a spread needs 3"),
        ({"seeds": [0, 1, 1]}, "seeds holds one twice"),
        ({"methods": {"a": {"seed": 4}}}, "seed is set by the comparison"),
        ({"methods": {"a": {"grid": {"lr": 3}}}}, "grid gives each setting a list"),
        ({"methods": {"a": {"lrr": 3}}}, "methods: a: unknown key lrr, did you mean lr?"),
        ({"methods": {"a": {"method": "sgdd"}}}, "method is sgdd"),
        ({"methods": {"a": {"k0": 5000}}}, "methods: a: k0=5000 is more than the"),
        ({"methods": {"a": {"grid": {"k0": [4, 5000]}}}}, "methods: a: k0=5000 is more than the"),
        (
            {"methods": {"a": {}, "b": {"engine": "deepspeed", "ds_config": "none.json"}}},
            "methods: b: ds_config none.json",
        ),
        ({"methods": {"a": {"grid": {"lr": [1, 2]}}, "b": {"grid": {"lr": [1]}}}}, r"grids differ in size \(a 2, b 1"),
        ({"targets": ["adam"]}, "targets: adam is no method"),
        ({"rnks": 2}, "unknown key rnks, did you mean ranks?"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tiny, tmp_path, change, words):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({"run": shared(tiny), "methods": METHODS, **change}))
    with pytest.raises(UserError, match=words):
        check(load_comparison(path))
    assert [*tmp_path.iterdir()] == [path]


def test_grids_need_samples_of_their_own(tiny):
    with pytest.raises(UserError, match="set dev_samples"):
        check(comparison(tiny, run=shared(tiny, dev_samples=0)))


def test_a_run_with_other_ranks_is_another_run(tiny):
    names = {trial(comparison(tiny, ranks=ranks), "zero-shot", {}, 0).name for ranks in (1, 2)}
    assert len(names) == 2


def results_of(planned, method, scores, diverged=0, out_of_memory=0, lost=0):
    """Results of runs with these held-out scores, which reach 0.6 after the second of their steps."""
    faults = ["lower lr"] * diverged + ["out of memory"] * out_of_memory
    made = [trial(planned, method, {"lr": 0.3}, seed) for seed in range(len(scores) + len(faults))]
    ended = [
        Result(
            one,
            one.config.output,
            {
                **{"metric_name": "accuracy", "accuracy_after": score, "dev_accuracy": score},
                **{
                    "seconds_per_step": 2.0,
                    "peak_memory_bytes": [15, 17],
                    "step_memory_bytes": [5, 7],
                    "trainable_parameters": 11,
                },
                **{"wire_bytes_per_step": {"all_gather": 3, "all_reduce": 1}, "metrics_lost": lost},
            },
            (Score(2.0, 10, 0.5), Score(4.0 + number, 20, 0.6)),
        )
        for number, (one, score) in enumerate(zip(made, scores, strict=False))
    ]
    without = zip(made[len(scores) :], faults, strict=True)
    return ended + [Result(one, one.config.output, fault=fault) for one, fault in without]


def test_a_row_is_the_mean_and_spread_over_seeds_and_what_it_cost(tiny):
    planned = comparison(tiny, {"addax": METHODS["addax"]}, targets=[0.6, 0.9])
    (row,) = rows(planned, results_of(planned, "addax", [0.7, 0.8, 0.9]))
    assert row["score"] == pytest.approx(0.8) and row["spread"] == pytest.approx(0.1)
    assert row["points tried"] == 2 and row["best point"] == {"lr": 0.3}
    assert (row["peak memory bytes"], row["wire bytes per step"], row["trainable parameters"]) == (7, 4, 11)
    assert row["seconds to 0.6"] == 5.0 and row["samples to 0.6"] == 20
    assert row["seconds to 0.9"] is None and row["samples to 0.9"] is None
    (row,) = rows(planned, results_of(planned, "addax", [0.7, 0.8], diverged=1))
    # Those that got there would be the lucky ones.
    assert row["diverged"] == 1 and row["runs"] == 2 and row["seconds to 0.6"] is None


def test_a_methods_best_is_the_target_of_others(tiny):
    methods = {name: {"method": "addax", "alpha": 0.01, "grid": {"lr": [0.3]}} for name in ("fast", "slow", "apart")}
    planned = comparison(tiny, methods, targets=["slow", 0.6])
    fast, slow = (results_of(planned, name, [0.7, 0.8, 0.9]) for name in ("fast", "slow"))
    # The mean over seeds is 0.5 at its best.
    slow = [
        dataclasses.replace(one, course=(Score(2.0, 10, 0.4), Score(9.0, 20, 0.6 - 0.1 * seed)))
        for seed, one in enumerate(slow)
    ]
    told = {row["method"]: row for row in rows(planned, [*fast, *slow, *results_of(planned, "apart", [0.5], 2)])}
    assert told["slow"]["seconds to slow"] == 9.0
    assert told["fast"]["seconds to slow"] == 2.0 and told["fast"]["samples to slow"] == 10
    assert told["slow"]["seconds to 0.6"] is None and told["fast"]["seconds to 0.6"] == 5.0
    assert told["apart"]["seconds to slow"] is None


def test_a_method_that_diverges_everywhere_keeps_its_row(tiny, tmp_path):
    planned = comparison(tiny, {"addax": METHODS["addax"], "zero-shot": METHODS["zero-shot"]})
    results = results_of(planned, "addax", [], diverged=1) + results_of(planned, "zero-shot", [0.5, 0.5, 0.5])
    first, second = rows(planned, results)
    assert first["diverged"] == 1 and first["runs"] == 0 and second["score"] == 0.5
    shown = io.StringIO()
    Console(file=shown, width=200).print(table(planned, results))
    assert "2: none ran to its end" in shown.getvalue() and "0 runs, 1 diverged" in shown.getvalue()
    assert write(planned, results, tmp_path).exists()


def test_runs_that_were_out_of_memory_or_have_lost_lines_are_counted_in_the_table(tiny):
    planned = comparison(tiny, {"addax": METHODS["addax"], "zero-shot": METHODS["zero-shot"]})
    results = results_of(planned, "addax", [0.5], out_of_memory=2) + results_of(planned, "zero-shot", [0.5], lost=3)
    first, second = rows(planned, results)
    assert (first["out of memory"], first["diverged"], first["with lost lines"]) == (2, 0, 0)
    assert (second["out of memory"], second["diverged"], second["with lost lines"]) == (0, 0, 1)
    shown = io.StringIO()
    Console(file=shown, width=200).print(table(planned, results))
    assert "1 runs, 2 out of memory" in shown.getvalue() and "1 runs, 1 with lost lines" in shown.getvalue()


def test_what_makes_a_result_is_found_among_complaints_of_ranks_that_it_has_left(tmp_path):
    log, left = tmp_path / "log", "addax-ds: rank 1: another rank has ended"
    for lines, told in (
        (["addax-ds: rank 0 is out of memory (12): lower", left], "rank 0 is out of memory (12): lower"),
        (["[rank0]: addax-ds: lower lr", "more"], "lower lr"),
        (["addax-ds: first", left], left.partition(" ")[2]),
        (["Traceback"], ""),
    ):
        log.write_text("\n".join(lines))
        assert _complaint(log) == told


def test_a_method_that_does_not_fit_is_a_row_beside_those_that_do(tiny, tmp_path):
    """More bytes than any machine can address."""
    methods = {
        "large": {"method": "adamw", "adapter": {"kind": "lora", "rank": 10**16}},
        "zero-shot": METHODS["zero-shot"],
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({"run": shared(tiny), "methods": methods}))
    done = run("compare", file, "--output", "out", cwd=tmp_path, seconds=300, plots=True).check()
    large, zero_shot = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert large["out of memory"] == 1 and large["runs"] == 0 and zero_shot["runs"] == 3
    (log,) = (tmp_path / "out" / "large").glob("*.log")
    complaint = log.read_text().splitlines()[-1]
    assert complaint.startswith("addax-ds: rank 0 is out of memory (") and "Traceback" not in log.read_text()
    assert "lower zo_micro_batch, fo_micro_batch, lt or eval_micro_batch, or take more ranks" in complaint
    assert "all runs took" in done.output


def mean_loss(output, step):
    """Of the runs with every seed in a step of both orders, a fifth of four steps being one."""
    records = [json.loads(path.read_text().splitlines()[step]) for path in output.glob("addax/lr-0.3*/metrics.jsonl")]
    assert len(records) == 3
    both = [(*r["loss_zo"]["plus"], *r["loss_zo"]["minus"], 2 * r["loss_fo"]) for r in records]
    return sum(map(sum, both)) / 12


def test_methods_are_compared_and_what_is_done_is_not_run_again(tiny, tmp_path):
    file = tmp_path / "compare.yaml"
    methods = {name: METHODS[name] for name in ("addax", "zero-shot")}
    file.write_text(yaml.safe_dump({"run": shared(tiny), "methods": methods, "targets": [0.1, 1.1]}))
    first = run("compare", file, "--output", "out", cwd=tmp_path, seconds=500, plots=True).check()
    assert "addax" in first.output and (tmp_path / "out" / "scores.png").stat().st_size > 5000
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())
    addax, zero_shot = told["rows"]
    assert addax["best point"] == {"lr": 0.3} and addax["runs"] == 3  # the other point is too large
    assert addax["seconds to 0.1"] > 0 and addax["seconds to 1.1"] is None
    assert addax["losses"] == pytest.approx([mean_loss(tmp_path / "out", step) for step in (0, 3)])
    assert zero_shot["best point"] == {} and zero_shot["runs"] == 3 and zero_shot["seconds per step"] is None
    assert zero_shot["losses"] is None
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert len(made) == 7
    run("compare", file, "--output", "out", cwd=tmp_path, seconds=500, plots=True).check()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")} == made


def asked_to_end_in_the_second_run() -> None:
    """What a scheduler that takes the machine back asks of the comparison alone."""
    begin, numbers = subprocess.Popen, itertools.count(1)

    def beginning(*words, **options):
        process = begin(*words, **options)  # by more than one thread at a time
        if next(numbers) == 2:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return process

    subprocess.Popen = beginning


def running_below(folder):
    """Processes that were told to write there, as Linux tells of them."""
    told = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.fsencode(folder) in (path / "cmdline").read_bytes():
                told[path.name] = (path / "status").read_text()
    return told


def left_running_below(folder):
    """Those of them that go on: a run of these takes many times as long as is waited for here."""
    deadline = time.monotonic() + 3
    while running := running_below(folder):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return running


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for where Linux lists them")
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_comparison_that_is_ended_takes_its_runs_along_and_goes_on(tiny, tmp_path, at_once):
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump({"run": shared(tiny), "methods": {"addax": {"alpha": 0.01}}}))
    out = tmp_path / "out"
    words = ["compare", file, "--output", out, "--at-once", at_once]
    ended = run(*words, cwd=tmp_path, seconds=300, before=asked_to_end_in_the_second_run)
    assert ended.status == 143 and not left_running_below(out / "addax")
    made = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert len(made) == 1 and not (out / "comparison.json").exists()
    run(*words, cwd=tmp_path, seconds=300, plots=True).check()
    summaries = [*out.rglob("summary.json")]
    assert len(summaries) == 3 and all(path.stat().st_mtime_ns == when for path, when in made.items())
    assert json.loads((out / "comparison.json").read_text())["rows"][0]["runs"] == 3
