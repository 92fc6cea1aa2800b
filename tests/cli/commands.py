"""Commands in processes of their own, forked from a server that has imported everything once.

    result = run("train", run_file, "steps=2", ranks=2, cwd=tmp_path)

Each process is what a launcher would start: its own environment, standard streams and exit status.
The real launchers are tested in tests/launch.
"""

import contextlib
import faulthandler
import itertools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from tests.forkserver import ENVIRONMENT, context

SECONDS = 300.0
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(15000 + _WORKER % 4 * 4000, 19000 + _WORKER % 4 * 4000))


@dataclass(frozen=True)
class Result:
    """What a command left, by rank."""

    statuses: list[int]
    outputs: list[str]
    errors: list[str]

    @property
    def status(self) -> int:
        """Of rank 0."""
        return self.statuses[0]

    @property
    def output(self) -> str:
        return self.outputs[0]

    @property
    def error(self) -> str:
        return self.errors[0]

    def check(self) -> "Result":
        """Fail with what the ranks wrote unless every status is 0."""
        assert not any(self.statuses), "\n".join([str(self.statuses), *self.outputs, *self.errors])
        return self


def run(
    *arguments: object,
    cwd: Path,
    ranks: int = 1,
    plots: bool = False,
    seconds: float = SECONDS,
    before: Callable[[], None] | None = None,
    until: int | None = None,
) -> Result:
    """`addax-ds ARGUMENTS` on `ranks` ranks in the folder `cwd`; a hang is a failure with stacks.

    plots: whether `train` writes its report, which takes longer than a tiny run. before: called in
    each process first; picklable. until: the rank whose end is the end of all, in place of every rank's.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="command-") as logs:
        places = [Path(logs) / str(rank) for rank in range(ranks)]
        for place in places:  # here, since a rank may be ended before it has begun
            place.with_suffix(".out").touch()
            place.with_suffix(".err").touch()
        launcher = {}
        if ranks > 1:
            launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank, place in enumerate(places):
            own = launcher | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            process = context().Process(target=_main, args=(words, own, str(cwd), str(place), plots, seconds, before))
            process.start()
            processes.append(process)
        awaited = processes if until is None else [processes[until]]
        hung = _join(awaited, time.monotonic() + seconds + 5)
        _end(processes)
        outputs = [place.with_suffix(".out").read_text(errors="replace") for place in places]
        errors = [place.with_suffix(".err").read_text(errors="replace") for place in places]
        assert not hung, "\n".join([f"ranks {hung} did not end within {seconds} s", *outputs, *errors])
        return Result([process.exitcode for process in processes], outputs, errors)


def environment() -> dict[str, str]:
    """For real processes: this one's environment and what the forked ones get."""
    return {**os.environ, **ENVIRONMENT}


def free_port() -> int:
    """A port that stays free until somebody listens there: none that the system gives away, or other workers take."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("ports do not end")


def _join(processes: list, deadline: float) -> list[int]:
    """The places of processes that were still running at the deadline."""
    waiting = {process.sentinel for process in processes}
    while waiting and (left := deadline - time.monotonic()) > 0:
        waiting -= set(wait(waiting, timeout=left))
    return [place for place, process in enumerate(processes) if process.is_alive()]


def _end(processes: list) -> None:
    for process in processes:
        process.kill()
        process.join()


def _main(
    words: list[str], own: dict[str, str], cwd: str, place: str, plots: bool, seconds: float, before: Callable | None
) -> None:
    """One rank."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(place + suffix, os.O_WRONLY)
        os.dup2(file, number)
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ.update(ENVIRONMENT, **own)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    if not plots:
        from addax_ds.training import report

        report.write_report = lambda folder: folder / "report.html"
    if before is not None:
        before()
    sys.argv = ["addax-ds", *words]
    from addax_ds.cli.main import main

    main()
