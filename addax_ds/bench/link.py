"""Two ranks in network namespaces of their own, joined by a link of a known speed."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from addax_ds.errors import UserError

_CLONE_NEWNET = 0x40000000  # of linux/sched.h


@dataclass(frozen=True)
class Host:
    """One end of the link."""

    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Move this thread, and those that it starts from now on, into the namespace."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self.namespace).open() as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace}")

    def plug(self, state: Literal["up", "down"]) -> None:
        """Set this end of the link up or down."""
        _run("ip", "-n", self.namespace, "link", "set", self.interface, state)


@contextlib.contextmanager
def linked(gigabits: float) -> Iterator[list[Host]]:
    """Two hosts, joined for the length of the context by a link of `gigabits` per second each way.

    Needs Linux's `ip` and `tc`, and the right to use them; raises `UserError` where either lacks.
    """
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise UserError(f"a slowed link needs {missing[0]}: install iproute2")
    mark = f"addax{os.getpid()}"
    hosts = [Host(f"{mark}-{end}", f"link{end}", f"10.213.7.{end + 1}") for end in (0, 1)]
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "delete", host.namespace)
        first, second = hosts
        _run(
            *("ip", "link", "add", first.interface, "netns", first.namespace),
            *("type", "veth", "peer", "name", second.interface, "netns", second.namespace),
        )
        for host in hosts:
            inside = ("ip", "-n", host.namespace)
            _run(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
            _run(*inside, "link", "set", "lo", "up")
            host.plug("up")
            _run(
                *("tc", "-n", host.namespace, "qdisc", "add", "dev", host.interface, "root"),
                *("tbf", "rate", f"{gigabits}gbit", "burst", "1mb", "latency", "50ms"),
            )
        yield hosts


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a slowed link cannot be made here ({' '.join(words)}: {done.stderr.strip()}): run as root")
