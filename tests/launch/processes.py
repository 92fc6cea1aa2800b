"""Real launchers as child processes, in a process group of their own that ends with the test."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from addax_ds.bench.link import linked
from addax_ds.errors import UserError
from tests.cli.commands import environment, free_port

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def _python(ranks: int) -> list[str]:
    assert ranks == 1
    return [sys.executable, TRAIN]


def _torchrun(ranks: int) -> list[str]:
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *address, "--nproc_per_node", str(ranks), TRAIN]


def _torchrun_restarting(ranks: int) -> list[str]:
    options = ["--standalone", "--nproc_per_node", str(ranks), "--max-restarts", "5", "--monitor-interval", "0.2"]
    return [sys.executable, "-m", "torch.distributed.run", *options, TRAIN]


def _torchrun_on_a_node(ranks: int) -> list[str]:
    """Which of how many nodes it is, and where the first one listens, stands in torchrun's variables."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), TRAIN]


def _deepspeed(ranks: int) -> list[str]:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_accelerators", str(ranks), "--no_local_rank", "--master_port", str(free_port()), TRAIN]


def _mpirun(ranks: int) -> list[str]:
    launcher = str(Path(sys.executable).with_name("mpirun"))
    if not Path(launcher).exists():
        launcher = shutil.which("mpirun") or "mpirun"
    return [launcher, "-n", str(ranks), "--oversubscribe", sys.executable, TRAIN]


LAUNCHERS = {
    "python": _python,
    "torchrun": _torchrun,
    "torchrun-restarting": _torchrun_restarting,
    "torchrun-node": _torchrun_on_a_node,
    "deepspeed": _deepspeed,
    "mpirun": _mpirun,
}


@dataclass(frozen=True)
class Node:
    """A host that commands can be given to: words before each, and variables."""

    name: str
    words: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


HERE = Node("here")


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two nodes for a job, with networks and names of their own; skips where that is not allowed."""
    try:
        with linked(1.0) as hosts:
            nodes = []
            for rank, host in enumerate(hosts):
                name = f"node-{rank}"
                named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
                job = {"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
                variables = {f"PET_{name}": str(value) for name, value in job.items()}
                variables["GLOO_SOCKET_IFNAME"] = host.interface
                nodes.append(Node(name, ["ip", "netns", "exec", host.namespace, *named], variables))
            yield nodes
    except UserError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")


class Launched:
    """A launcher and all it has started."""

    def __init__(self, launcher: str, ranks: int, *settings: object, cwd: Path, node: Node = HERE) -> None:
        words = [*node.words, *LAUNCHERS[launcher](ranks), *map(str, settings)]
        own = {
            **node.variables,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # Open MPI asks for both before it runs as root, as containers do.
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self._log = cwd / f"{launcher}-{node.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd=cwd, env={**environment(), **own}, stdout=log, stderr=log, start_new_session=True
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        """End what is left: a test that fails must leave nothing behind."""
        self._look()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._send(signal.SIGKILL)
        self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _look(self) -> None:
        try:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                self._seen.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            pass

    def ranks(self) -> list[psutil.Process]:
        """The processes that run the train command, by rank."""
        self._look()
        found = {}
        for process in self.alive():
            try:
                words, variables = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            # The launcher's own processes name the script too; a rank is python with it in front.
            place = words.index(TRAIN) if TRAIN in words else len(words)
            rank = variables.get("RANK") or variables.get("OMPI_COMM_WORLD_RANK")
            if place <= 2 and rank is not None:
                found[int(rank)] = process
        return [found[rank] for rank in sorted(found)]

    def alive(self) -> list[psutil.Process]:
        """Children that still run."""
        return [process for process in self._seen.values() if _runs(process)]

    def terminate(self) -> None:
        """Ask the launcher to end, as a cluster does."""
        self._process.terminate()

    def send_to_all(self, number: int) -> None:
        """A signal to the launcher and all it has started."""
        self._look()
        self._process.send_signal(number)
        self._send(number)

    def _send(self, number: int) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends by itself meanwhile
                process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """The launcher's exit status; a launcher that does not end is a failure."""
        self.until(lambda: self._process.poll() is not None, seconds)
        return self._process.returncode

    def until(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for a condition; a condition that does not come is a failure."""
        end = time.monotonic() + seconds
        while not condition():
            self._look()
            assert time.monotonic() < end, f"not within {seconds} s\n{self.log[-4000:]}"
            time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
