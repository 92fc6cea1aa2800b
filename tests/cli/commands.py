"""Commands in processes of their own, forked from a server that has imported torch and DeepSpeed once.

    result = run("train", run_file, "steps=2", ranks=2, cwd=tmp_path)

Each process is what a launcher would start: its own environment, standard streams and exit status.
The real launchers are tested in tests/launch.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SECONDS = 120.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
}
_PRELOADED = ["addax_ds.training.run", "addax_ds.training.report", "deepspeed", "datasets", "rich.console"]
_context: Any = None


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


def run(*arguments: object, cwd: Path, ranks: int = 1, seconds: float = SECONDS) -> Result:
    """`addax-ds ARGUMENTS` on `ranks` ranks in the folder `cwd`; a hang is a failure with stacks."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory(prefix="command-") as logs:
        places = [Path(logs) / str(rank) for rank in range(ranks)]
        launcher = {}
        if ranks > 1:
            launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank, place in enumerate(places):
            environment = dict(launcher)
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _forkserver().Process(target=_main, args=(words, environment, str(cwd), str(place), seconds))
            process.start()
            processes.append(process)
        hung = _join(processes, time.monotonic() + seconds + 5)
        outputs = [place.with_suffix(".out").read_text(errors="replace") for place in places]
        errors = [place.with_suffix(".err").read_text(errors="replace") for place in places]
        assert not hung, "\n".join([f"ranks {hung} did not end within {seconds} s", *outputs, *errors])
        return Result([process.exitcode for process in processes], outputs, errors)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forkserver() -> Any:
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(_PRELOADED)
        # The server, and so DeepSpeed at its import, sees what the environment is now.
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return _context


def _join(processes: list, deadline: float) -> list[int]:
    """The ranks that were still running at the deadline, killed."""
    waiting = {process.sentinel for process in processes}
    while waiting and (left := deadline - time.monotonic()) > 0:
        waiting -= set(wait(waiting, timeout=left))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    return hung


def _main(words: list[str], environment: dict[str, str], cwd: str, place: str, seconds: float) -> None:
    """One rank."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(place + suffix, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ.update(ENVIRONMENT, **environment)
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["addax-ds", *words]
    from addax_ds.cli.main import main

    main()
