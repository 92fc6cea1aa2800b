"""What a run leaves on disk as it goes, and takes up again when it is started anew."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from addax_ds.config import RunConfig
from addax_ds.core.kernels import noise
from addax_ds.digest import weights_digest
from addax_ds.errors import PreemptedError, UserError
from addax_ds.training.agreement import from_main
from addax_ds.training.checkpoint import Checkpoints
from addax_ds.training.journal import JOURNAL, Entries, Journal, Record, read_journal
from addax_ds.training.metrics import MetricsWriter
from addax_ds.training.models import Optimizer

CHECKPOINTS = "checkpoints"
# What a replay needs and an audit compares; everything else of a step stands in its line.
_RECORDED = ("seed", "alpha", "eps", "queries", "weight_decay", "distribution", "rounding", "k0", "k1")


class RunState:
    """Metrics, journal and checkpoints of one run. All methods are collectives.

    After construction the weights are those of the newest checkpoint, where the run goes on from
    one. Raises `UserError` where what is on disk cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        optimizer: Optimizer,
        train_samples: int,
        resuming: bool,
        say: Callable[[str], Any],
    ) -> None:
        self._config, self._folder, self._optimizer, self._say = config, folder, optimizer, say
        self._engine, self._resuming = optimizer.engine, resuming
        self._header = {"train_samples": train_samples, **recorded(config)}
        self._checkpoints = Checkpoints(folder / CHECKPOINTS, self._engine, config.checkpoints_kept)
        loaded, complaints = self._checkpoints.load_newest() if resuming else (None, [])
        for complaint in complaints:
            say(complaint)
        self.steps = loaded.step if loaded else 0
        """Steps that the weights have taken."""
        self.before: dict[str, float] | None = None
        """Scores before the first step, where an earlier process has measured them."""
        self._line: str | None = None  # digest of the journal's line of that step
        if loaded is not None:
            if not loaded.run.keys() >= {"before", "journal"}:
                raise UserError(f"checkpoint step-{loaded.step:06d} in {folder} was not saved by a run: remove it")
            self.before, self._line = loaded.run["before"], loaded.run["journal"]
        self._spoilt_in_row = 0
        # Rank 0 alone has files.
        self._metrics: MetricsWriter | None = None
        self._journal: Journal | None = None

    def begin(self, before: dict[str, float]) -> None:
        """Open metrics and journal where the run goes on.

        A zeroth-order run goes on after the last step of its journal, which is repeated without
        forwards; any other after its newest checkpoint.
        """
        self.before = before
        zeroth_order = self._config.alpha == 1
        entries: Entries | None = None
        if self._line is not None or (self._resuming and zeroth_order):
            entries = from_main(self._engine, self._read_journal)
        digest = weights_digest(self._engine)
        if entries is not None:
            check_header(entries.header, self._header)
            if self._line is None and entries.header["weights"] != digest:
                raise UserError(f"{self._folder} was begun with another model {self._config.model}: restore it")
            self._line = self._line or entries.ends[0][2]
            if zeroth_order:
                self._catch_up(entries)

        def open_files() -> None:
            self._metrics = MetricsWriter(self._folder, self.steps)
            path = self._folder / JOURNAL
            if entries is None:
                self._journal = Journal(path, {**self._header, "weights": digest})
            else:
                self._journal = Journal.resume(path, entries, self.steps, str(self._line))
            if self._resuming:
                self._journal.event(resumed=self.steps, engine=self._engine.name, ranks=self._engine.world_size)

        from_main(self._engine, open_files)
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "steps": self.steps})
        if self._resuming:
            self._say(f"going on after step {self.steps}")

    def _read_journal(self) -> Entries | None:
        path = self._folder / JOURNAL
        # Killed before the first line was written.
        begun = self._line is not None or (path.exists() and b"\n" in path.read_bytes())
        return read_journal(path) if begun else None

    def _catch_up(self, entries: Entries) -> None:
        """Repeat the steps that the journal holds beyond the weights."""
        entries.position(self.steps, str(self._line))
        missing = entries.records[self.steps :]
        self._optimizer.replay([(record.seed, record.g0 or (), record.lr) for record in missing])
        self.steps += len(missing)
        self._line = entries.ends[-1][2]
        if missing:
            self._say(f"{len(missing)} steps repeated from the journal")

    def took(self, metrics: dict[str, Any], samples: tuple[Sequence[int], Sequence[int]], asked_to_end: bool) -> None:
        """Note a step, and save where it is time.

        samples: of the zeroth-order and the first-order batch. Raises `PreemptedError` once saved, where
        any rank was asked to end, and `UserError` after too many spoilt steps in a row.
        """
        flags = torch.tensor([float(asked_to_end), float(self._optimizer.gradients_left_out)], dtype=torch.float64)
        asked, left_out = self._engine.sum(flags).tolist()
        self.steps += 1
        metrics["gradients_left_out"] = int(left_out)
        if self._journal is not None and self._metrics is not None:
            self._metrics.append(metrics)
            g0 = None if metrics["skipped"] else tuple(metrics["g0"])
            self._journal.step(Record(self.steps, metrics["seed"], g0, metrics["lr"], *map(tuple, samples)))
        self._spoilt_in_row = self._spoilt_in_row + 1 if metrics["skipped"] or left_out else 0
        every = self._config.checkpoint_every
        due = asked or (every and self.steps % every == 0 and self.steps < self._config.steps)
        if due and not self._spoilt_in_row:  # else they would push out the good ones
            self._save()
        if self._spoilt_in_row >= self._config.max_skipped:
            self._checkpoints.wait()
            raise UserError(
                f"{self._spoilt_in_row} steps in a row, up to step {self.steps}, had losses or gradients that are not "
                "finite: lower lr, or look at the data; the checkpoints are intact"
            )
        if asked:
            self._checkpoints.wait()
            raise PreemptedError(
                f"asked to end after step {self.steps}, and saved: the same command with output={self._folder} goes on"
            )

    def _save(self) -> None:
        line = ""
        if self._journal is not None and self._metrics is not None:
            self._metrics.sync()
            self._journal.sync()
            line = self._journal.digest
        facts = {"seed": self._config.seed, "steps": self._config.steps, "before": self.before, "journal": line}
        facts.update(engine=self._engine.name, ranks=self._engine.world_size)
        digest = self._checkpoints.save(self.steps, facts)
        if self._journal is not None:
            self._journal.event(checkpoint=self.steps, weights=digest)

    def end(self, digest: str) -> None:
        """The last step is taken and the weights have this digest."""
        self._checkpoints.wait()
        if self._journal is not None and self._metrics is not None:
            self._journal.event(end=self.steps, weights=digest)
            self._journal.sync()
            self._journal.close()
            self._metrics.close()


def recorded(config: RunConfig) -> dict[str, Any]:
    """What the header of a run's journal holds of its settings, and a digest of a piece of its noise.

    The piece is drawn on the CPU: it tells versions apart that draw otherwise.
    """
    piece = noise(config.seed, "addax_ds", 0, 1000, query=config.queries - 1, distribution=config.distribution)
    digest = hashlib.sha256(piece.numpy().tobytes()).hexdigest()[:16]
    return {**{name: getattr(config, name) for name in _RECORDED}, "noise": digest}


def check_header(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `UserError` where a journal was begun with other settings or other noise."""
    for name, value in here.items():
        if there.get(name) != value:
            raise UserError(
                f"the journal was begun with {name} {there.get(name)}, and here it is {value}: "
                "use the settings and the version that began it"
            )
