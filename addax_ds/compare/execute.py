"""Run what a comparison plans, one run after the other; what is done already is not run again."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import torch
import yaml
from rich.console import Console
from rich.markup import escape

from addax_ds.compare.plan import Comparison, Trial, points_of, trial
from addax_ds.compare.results import Result, read_result
from addax_ds.errors import UserError
from addax_ds.training.folder import SUMMARY
from addax_ds.training.metrics import write_whole


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
            tried.append(_run(trial(comparison, method, point, comparison.seeds[0]), output))
            say(escape(f"{method}: {tried[-1].describe()}"))
        # Where every point diverges, the first stands for the method.
        best = max(tried, key=lambda result: -math.inf if result.fault else result.dev_score)
        results.append(best)
        for seed in comparison.seeds[1:] if not best.fault else []:
            results.append(_run(trial(comparison, method, best.trial.point, seed), output))
            say(escape(f"{method}: {results[-1].describe()}"))
    return results


def _run(trial: Trial, output: Path) -> Result:
    folder = output / trial.method / trial.name
    log, fault = (folder.with_name(f"{folder.name}.{ending}") for ending in ("log", "fault"))
    if fault.exists():
        return Result(trial, folder, fault=fault.read_text())
    if not (folder / SUMMARY).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_file = folder.with_name(f"{folder.name}.yaml")
        run_file.write_text(yaml.safe_dump({**trial.values, "output": str(folder)}, sort_keys=False))
        train = ["-m", "addax_ds", "train", str(run_file)]
        if trial.ranks > 1:
            train = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.ranks), *train]
        threads = max(len(os.sched_getaffinity(0)) // trial.ranks, 1)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        with log.open("wb") as file:
            status = _to_its_end([sys.executable, *train], file, environment)
        if status:
            complaint = _complaint(log)
            if "lower lr" not in complaint:
                raise UserError(f"{trial.method}: {complaint or 'the run failed'}: see {log}")
            write_whole(fault, complaint.encode())
            return Result(trial, folder, fault=complaint)
    return read_result(trial, folder)


def _to_its_end(command: list[str], log: IO[bytes], environment: dict[str, str]) -> int:
    """The status of a command, which ends with this process where that is asked to end."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            process.terminate()
            process.wait()


def _complaint(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if "addax-ds: " in line]
    return lines[-1].partition("addax-ds: ")[2] if lines else ""
