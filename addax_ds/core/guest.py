"""Guests: no-grad forwards on threads of their own, which hand over to the host's thread and back."""

import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from addax_ds.core.atomic import Owner, held_together
from addax_ds.core.plain import Perturbation


@dataclass
class Job:
    """A forward to run as a guest, and what came of it."""

    run: Callable[[nn.Module], Any]
    """Called with the guest's model; returns what the caller wants to keep, no logits."""
    perturbation: Perturbation = field(default_factory=Perturbation)
    result: Any = None
    error: BaseException | None = None


def raise_first(jobs: list[Job]) -> None:
    """Raise the first error of the jobs, if there is one."""
    for job in jobs:
        if job.error is not None:
            raise job.error


class Stopped(BaseException):
    """Unwinds a parked guest whose step has been given up."""


class Guest:
    """A worker thread with a skeleton of its own; idle between steps."""

    def __init__(
        self, skeleton: nn.Module, atomic: tuple[str, ...], goes_on: Callable, fetch: Callable, left: Callable
    ) -> None:
        self.skeleton = skeleton
        self.goes_on, self.fetch, self.left = goes_on, fetch, left
        self.job: Job | None = None
        self.perturbation = Perturbation()
        self.parked = False
        self.need = ""  # path of the module that it is about to enter, or has entered last
        self.owners: list[Owner] = []  # and of which it needs the weights for that
        self.visited = 0  # modules entered in this job
        self.open = 0  # those of them whose forward is not over
        # Bare locks, of which each is held until the other thread lets go: the cheapest hand-over there is.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._stopping = False
        for path, module, owners in held_together(skeleton, atomic):
            module.register_forward_pre_hook(self._enter(path, owners), prepend=True, with_kwargs=True)
            module.register_forward_hook(self._leave(owners), prepend=True, always_call=True)
        # Daemon: a parked thread must never keep a failing process alive.
        threading.Thread(target=self._work, name="addax-guest", daemon=True).start()

    def _enter(self, path: str, owners: list[Owner]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.visited += 1
            self.need, self.owners = path, owners
            if not self.goes_on(self):
                self._park()
            fetched = self.fetch(self.perturbation, path, owners)
            for owner, weights in zip(owners, fetched, strict=True):
                owner.module._parameters.update(weights)
            self.open += 1

        return hook

    def _leave(self, owners: list[Owner]) -> Callable:
        absent = [dict(owner.module._parameters) for owner in owners]

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            # Also after an error in the forward, and then once more for a module that was never entered.
            self.open = max(self.open - 1, 0)
            for owner, placeholders in zip(owners, absent, strict=True):
                owner.module._parameters.update(placeholders)
            return self.left(output)

        return hook

    def _park(self) -> None:
        """Hand over, until resumed."""
        self.parked = True
        self._back.release()
        self._go.acquire()
        self.parked = False
        if self._stopping:
            raise Stopped

    def asks_for(self) -> tuple[str, int]:
        """The module and direction whose copies it needs next."""
        return self.need, self.perturbation.query

    def begin(self, job: Job, settings: "HostSettings") -> None:
        """Start a job and run it up to its first weight."""
        self.job, self.perturbation, self._settings = job, job.perturbation, settings
        self.visited = self.open = 0
        self.resume()

    def resume(self) -> None:
        """Let the guest run until it parks again or is done."""
        self._go.release()
        try:
            self._back.acquire()
        except BaseException:
            # A signal's exception in this thread: the guest runs on, and must not meet another at work.
            self._back.acquire()
            raise

    def stop(self) -> None:
        """Unwind a parked job."""
        self._stopping = True
        self.resume()
        self._stopping = False

    def close(self) -> None:
        """End the thread of an idle guest."""
        self.job = None
        self._go.release()

    def _work(self) -> None:
        while True:
            self._go.acquire()
            if self.job is None:
                return
            self._run(self.job)
            self.job = None
            self._back.release()

    def _run(self, job: Job) -> None:
        try:
            job.result = self._settings.run(lambda: job.run(self.skeleton))
        except BaseException as error:  # carried over to the host's thread
            job.error = error


class HostSettings:
    """What torch and contextvars keep per thread, taken from the host's thread for its guests."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        self._autocast = [
            (device, torch.get_autocast_dtype(device)) for device in devices if torch.is_autocast_enabled(device)
        ]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run(self, forward: Callable[[], Any]) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._device is not None:
                # A new thread's is GPU 0, on which a stream's end would make a context of half a GiB.
                torch.cuda.set_device(self._device)
            for device, dtype in self._autocast:
                # No weight cache: a guest's weights live for one module only.
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            return self._context.copy().run(forward)
