"""SIGTERM, as clusters send it before they take a machine away: save, and end in time."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Request:
    """Whether this process was asked to end: by SIGTERM, or by the end of the `deepspeed` command.

    That command does not pass SIGTERM on: it ends, and leaves its ranks behind.
    """

    def __init__(self) -> None:
        self._signalled = False
        launcher = os.getppid()
        self._command = _parent_of(launcher) if "deepspeed.launcher.launch" in _words_of(launcher) else 0
        if "deepspeed" not in {Path(word).name for word in _words_of(self._command)[:2]}:
            self._command = 0  # on other nodes than the command's own
        self._launcher = launcher

    @property
    def received(self) -> bool:
        """Whether it was, so far."""
        return self._signalled or (self._command > 0 and _parent_of(self._launcher) != self._command)

    def obey(self) -> None:
        """From here on SIGTERM ends this process at once: everything is saved."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._signalled = True


def _words_of(process: int) -> list[str]:
    """A process's command line; empty where the system does not tell."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent_of(process: int) -> int:
    """0 where the process is gone, or the system does not tell."""
    try:
        # After the name, which may hold anything, in parentheses: state, parent.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@contextmanager
def requests() -> Iterator[Request]:
    """Note SIGTERM for the length of the context, in place of dying of it."""
    request = Request()
    before = signal.signal(signal.SIGTERM, request._receive)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
