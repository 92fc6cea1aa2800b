"""Run what a comparison plans, one run after the other; what is done already is not run again."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console

from addax_ds.compare.plan import Comparison, Trial, points_of, trial
from addax_ds.compare.results import Result, read_result
from addax_ds.errors import UserError
from addax_ds.training.folder import SUMMARY

_REFUSED = 2  # exit status of bad input, and of a run that diverges


def execute(comparison: Comparison, output: Path) -> list[Result]:
    """The results of each method's best point, seed by seed, in the order of methods.

    The grid is run with the first seed, and the point with the highest score on the dev samples with
    the others. A run that diverges is a result; raises `UserError` where one cannot run at all.
    """
    say = Console().print
    results = []
    for method in comparison.methods:
        tried = []
        for point in points_of(comparison, method):
            tried.append(_run(trial(comparison, method, point, comparison.seeds[0]), comparison.ranks, output))
            say(f"{method}: {tried[-1].describe()}")
        good = [result for result in tried if not result.fault]
        if not good:
            raise UserError(f"{method}: no point of its grid came to an end: {tried[0].fault}")
        best = max(good, key=lambda result: result.dev_score)
        results.append(best)
        for seed in comparison.seeds[1:]:
            results.append(_run(trial(comparison, method, best.trial.point, seed), comparison.ranks, output))
            say(f"{method}: {results[-1].describe()}")
    return results


def _run(trial: Trial, ranks: int, output: Path) -> Result:
    folder = output / trial.method / trial.name
    log = folder.with_name(f"{folder.name}.log")
    if not (folder / SUMMARY).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_file = folder.with_name(f"{folder.name}.yaml")
        run_file.write_text(yaml.safe_dump(trial.values, sort_keys=False))
        train = ["-m", "addax_ds", "train", str(run_file), f"output={folder}"]
        if ranks > 1:
            train = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *train]
        threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        with log.open("wb") as file:
            status = subprocess.run([sys.executable, *train], stdout=file, stderr=file, env=environment).returncode
        if status:
            complaint = _complaint(log)
            if "lower lr" not in complaint:
                raise UserError(f"{trial.method}: {complaint or 'the run failed'}: see {log}")
            return Result(trial, folder, fault=complaint)
    return read_result(trial, folder)


def _complaint(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "addax-ds: " in line]
    return lines[-1].partition("addax-ds: ")[2] if lines else ""
