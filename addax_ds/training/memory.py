"""Most memory of this process: of the GPU, or resident without one."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Bytes at most: in all, and in steps of training alone, in which no model is loaded and none is scored."""

    def __init__(self) -> None:
        self._before = self.in_steps = 0

    def begin_step(self) -> None:
        """What follows, up to `end_step`, is a step's."""
        self._before = self.in_all
        with contextlib.suppress(OSError):  # a container may forbid it: then the peak goes on
            reset_peak()

    def end_step(self) -> int:
        """The step's peak in bytes."""
        peak = read_peak()
        self.in_steps = max(self.in_steps, peak)
        return peak

    @property
    def in_all(self) -> int:
        """Since the process began."""
        return max(self._before, self.in_steps, read_peak())


def reset_peak() -> None:
    """Forget the peak so far. Systems that know no way to, other than Linux, go on with it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def read_peak() -> int:
    """Bytes at most since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident(key: str = "VmRSS") -> int:
    """Resident bytes of this process, now (VmRSS) or at most since the last reset (VmHWM); Linux alone tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
