"""Run what a comparison plans, so many runs at once; what is done already is not run again."""

import contextlib
import dataclasses
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import IO

import torch
import yaml
from rich.console import Console
from rich.markup import escape

from addax_ds.compare.plan import Comparison, Trial, points_of, trial
from addax_ds.compare.results import FAULTS, Result, read_result
from addax_ds.cores import available_cores
from addax_ds.errors import UserError
from addax_ds.training.folder import SUMMARY
from addax_ds.training.metrics import write_whole


def execute(comparison: Comparison, output: Path, at_once: int = 1) -> tuple[list[Result], float]:
    """The results of each method's best point, seed by seed, in the order of methods, and seconds of all runs.

    The grid is run with the first seed, and the point with the highest score on the dev samples with
    the others. at_once: runs beside each other, which share GPUs and CPU threads out. A run that
    diverges or is out of memory is a result; raises `UserError` where one cannot run at all, once those beside it are
    over.
    """
    first, *others = comparison.seeds
    with _Runs(output, at_once, comparison.ranks) as runs:
        tried = runs.take(
            [
                trial(comparison, method, point, first)
                for method in comparison.methods
                for point in points_of(comparison, method)
            ]
        )
        # Where no point comes to its end, the first stands for the method.
        best = {
            method: max(
                (result for result in tried if result.trial.method == method),
                key=lambda result: -math.inf if result.fault else result.dev_score,
            )
            for method in comparison.methods
        }
        repeated = runs.take(
            [
                trial(comparison, method, result.trial.point, seed)
                for method, result in best.items()
                for seed in (() if result.fault else others)
            ]
        )
    seeds = {method: [result for result in repeated if result.trial.method == method] for method in best}
    seconds = sum(result.seconds for result in (*tried, *repeated))
    return [result for method in best for result in (best[method], *seeds[method])], seconds


class _Runs:
    """Runs some trials at once; a context, at whose end, SIGTERM's too, none goes on."""

    def __init__(self, output: Path, at_once: int, ranks: int) -> None:
        self._output = output
        self._pool = ThreadPoolExecutor(at_once)
        self._processes: set[subprocess.Popen] = set()
        self._ending = threading.Event()
        self._threads = max(available_cores() // (ranks * at_once), 1)
        self._gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        """The GPUs of each run that is free to begin; an empty string leaves the choice to it."""
        gpus = _visible_gpus()
        for first in range(0, at_once * ranks, ranks):
            own = [gpus[(first + rank) % len(gpus)] for rank in range(ranks) if len(gpus) >= ranks]
            self._gpus.put(",".join(own))

    def __enter__(self) -> "_Runs":
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for process in [*self._processes]:
            process.terminate()
        self._pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, self._before)

    def take(self, trials: list[Trial]) -> list[Result]:
        """Their results, in their order."""
        say = Console().print
        futures = [self._pool.submit(self._run, one) for one in trials]
        try:
            for future in as_completed(futures):
                result = future.result()
                say(escape(f"{result.trial.method}: {result.describe()}"))
        except UserError:
            # Those under way go to their end: of some, what is ended early is lost.
            wait([future for future in futures if not future.cancel()])
            raise
        return [future.result() for future in futures]

    def _run(self, trial: Trial) -> Result:
        folder = self._output / trial.method / trial.name
        log, fault, taken = (folder.with_name(f"{folder.name}.{ending}") for ending in ("log", "fault", "seconds"))
        if not fault.exists() and not (folder / SUMMARY).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            run_file = folder.with_name(f"{folder.name}.yaml")
            run_file.write_text(yaml.safe_dump({**trial.values, "output": str(folder)}, sort_keys=False))
            with log.open("wb") as file, self._own_gpus() as environment:
                begun = time.monotonic()
                status = self._to_its_end(_command(trial, run_file), file, {**self._environment(), **environment})
            # Of a run that goes on, all its parts.
            write_whole(taken, str(_seconds(taken) + time.monotonic() - begun).encode())
            if status:
                complaint = _complaint(log)
                if not any(words in complaint for words in FAULTS):
                    raise UserError(f"{trial.method}: {complaint or 'the run failed'}: see {log}")
                write_whole(fault, complaint.encode())
        result = Result(trial, folder, fault=fault.read_text()) if fault.exists() else read_result(trial, folder)
        return dataclasses.replace(result, seconds=_seconds(taken))

    @contextlib.contextmanager
    def _own_gpus(self) -> Iterator[dict[str, str]]:
        gpus = self._gpus.get()
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        finally:
            self._gpus.put(gpus)

    def _environment(self) -> dict[str, str]:
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        return environment

    def _to_its_end(self, command: list[str], log: IO[bytes], environment: dict[str, str]) -> int:
        """The status of a command, which ends with this process where that is asked to end."""
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._processes.add(process)
        if self._ending.is_set():  # between its start and its entry in the list
            process.terminate()
        try:
            return process.wait()
        finally:
            self._processes.discard(process)


def _command(trial: Trial, run_file: Path) -> list[str]:
    train = ["-m", "addax_ds", "train", str(run_file)]
    if trial.ranks > 1:
        train = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.ranks), *train]
    return [sys.executable, *train]


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as its environment names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _seconds(taken: Path) -> float:
    return float(taken.read_text()) if taken.exists() else 0.0


def _complaint(log: Path) -> str:
    """The last one, and before it one that makes a result: the ranks beside it may complain that it has left them."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "addax-ds: " in line]
    results = [line for line in lines if any(words in line for words in FAULTS)]
    return [*lines, *results][-1].partition("addax-ds: ")[2] if lines else ""
