"""SIGTERM, as clusters send it before they take a machine away: save, and end in time."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Request:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.received = False

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


@contextmanager
def requests() -> Iterator[Request]:
    """Note SIGTERM for the length of the context, in place of dying of it."""
    request = Request()
    before = signal.signal(signal.SIGTERM, request._receive)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
