"""Deaths at chosen instants, to be given to a command as what it calls first."""

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

# And in the middle of what follows the last step: "export".
PLACES = ("probe", "backward", "journal", "staging", "shard", "manifest", "name", "latest", "pruning")
"""In a zeroth-order forward; half-way through the writes of a backward; with half a line of the journal
written; and in each phase of a save."""


@dataclass(frozen=True)
class Death:
    """A signal to one rank the first time that it comes to a place, from the given time on."""

    place: str
    rank: int
    time: int
    signal: int = signal.SIGKILL

    def __call__(self) -> None:
        if os.environ.get("RANK", "0") == str(self.rank):
            getattr(self, f"_in_{self.place}")()

    def _die(self) -> None:
        os.kill(os.getpid(), self.signal)

    def _die_in(self, owner: object, name: str, times: int) -> None:
        """Die at the beginning of the call with this number, from 0."""
        calls = itertools.count()
        self._before(owner, name, lambda: next(calls) == times and self._die())

    def _before(self, owner: object, name: str, act: Callable[[], object]) -> None:
        original = getattr(owner, name)

        def acting(*args, **kwargs):
            act()
            return original(*args, **kwargs)

        setattr(owner, name, acting)

    def _in_probe(self) -> None:
        from addax_ds.core import lanes

        self._die_in_step(lanes, "perturb", 5)

    def _in_backward(self) -> None:
        from addax_ds.core import kernels

        self._die_in_step(kernels, "update", 9)

    def _die_in_step(self, owner: object, name: str, times: int) -> None:
        """Die at the call with this number within the step with number `time`, from 0."""
        from addax_ds.optimizer import Addax

        steps = itertools.count()
        self._before(Addax, "train_step", lambda: next(steps) == self.time and self._die_in(owner, name, times))

    def _in_journal(self) -> None:
        from addax_ds.training.checkpoint import Checkpoints
        from addax_ds.training.journal import Journal

        original, save = Journal.step, Checkpoints.save

        def saving(checkpoints, *args, **kwargs):  # to its end, so that what is left does not depend on time
            digest = save(checkpoints, *args, **kwargs)
            checkpoints._writing.result()
            return digest

        Checkpoints.save = saving

        def dying(journal, record):
            if record.step == self.time:
                journal._file.write(f'[{record.step},"half a li'.encode())
                journal._file.flush()
                self._die()
            original(journal, record)

        Journal.step = dying

    def _in_evaluation(self) -> None:
        from addax_ds.training import run

        self._die_in(run, "evaluate", self.time)

    def _in_export(self) -> None:
        from addax_ds.training import export

        self._die_in(export, "link_buffers", self.time)

    def _in_staging(self) -> None:
        from addax_ds.training import checkpoint

        self._die_in(checkpoint, "digest_over", 1)

    def _in_shard(self) -> None:
        from torch.distributed.checkpoint import filesystem

        self._die_in(filesystem, "_write_item", 12)

    def _in_loading(self) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self._die_in(HuggingFaceStorageReader, "read_data", self.time)

    def _in_manifest(self) -> None:
        from addax_ds.training import checkpoint

        self._die_in(checkpoint, "write_json", 1)

    def _in_name(self) -> None:
        self._die_on_rename("step-")

    def _in_latest(self) -> None:
        self._die_on_rename("latest")

    def _in_pruning(self) -> None:
        from addax_ds.training import checkpoint

        # In this module's eyes only: others remove folders too.
        checkpoint.shutil = SimpleNamespace(rmtree=lambda path: self._die())

    def _die_on_rename(self, start: str) -> None:
        original = os.replace

        def dying(source, target):
            if (
                Path(target).name.startswith(start)
                and not Path(target).suffix
                and Path(target).parent.joinpath("latest").exists()
            ):
                self._die()
            return original(source, target)

        os.replace = dying
