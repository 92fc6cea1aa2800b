"""What a run leaves on disk as it goes, and takes up again when it is started anew."""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from addax_ds.config import RunConfig
from addax_ds.core.kernels import noise
from addax_ds.digest import weights_digest
from addax_ds.errors import PreemptedError, UserError
from addax_ds.optimizer import Addax
from addax_ds.training.agreement import agree, from_main
from addax_ds.training.checkpoint import Checkpoints, Manifest, UnusableError, complete
from addax_ds.training.evaluation import EvaluationStoppedError
from addax_ds.training.finite import check_model, check_result, not_finite
from addax_ds.training.folder import CHECKPOINTS, JOURNAL, versions
from addax_ds.training.journal import Entries, Journal, Record, is_begun, read_journal
from addax_ds.training.metrics import METRICS, MetricsWriter, read_metrics
from addax_ds.training.preemption import Request

if TYPE_CHECKING:
    from addax_ds.engines.deepspeed_plugin import DeepSpeedAddax

# What a replay needs and an audit compares; everything else of a step stands in its line.
_RECORDED = (
    *("seed", "alpha", "eps", "queries", "directions", "weight_decay", "distribution", "rounding"),
    *("k0", "k1", "zo_micro_batch"),
)


class RunState:
    """Metrics, journal and checkpoints of one run. All methods are collectives.

    After construction the weights are those of the newest checkpoint that can be used, where the run
    goes on from one. data: a digest of the training samples. Raises `UserError` where what is on disk
    cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        optimizer: "Addax | DeepSpeedAddax",
        data: str,
        train_samples: int,
        resuming: bool,
        say: Callable[[str], Any],
    ) -> None:
        self._config, self._folder, self._optimizer, self._say = config, folder, optimizer, say
        self._engine, self._resuming = optimizer.engine, resuming
        self._where = {"engine": self._engine.name, "ranks": self._engine.world_size}
        self._header = {"train_samples": train_samples, "data": data, **recorded(config)}
        timeout = timedelta(minutes=config.timeout_minutes)
        self._checkpoints = Checkpoints(folder / CHECKPOINTS, self._engine, config.checkpoints_kept, timeout)
        self._checkpoints.tidy()
        self._entries: Entries | None = from_main(self._engine, self._read_journal) if resuming else None
        if self._entries is not None:
            check_header(self._entries.header, self._header)
        loaded, complaints = self._checkpoints.load_newest(self._check) if resuming else (None, [])
        for complaint in complaints:
            say(complaint)
        if loaded is not None and loaded.step > config.steps:
            raise UserError(f"the run has taken {loaded.step} steps already: set steps to that or more")
        # No checkpoint of it could be saved; what is loaded has been looked at.
        if loaded is None:
            check_model(self._engine, config)
        self.steps = loaded.step if loaded else 0
        """Steps that the weights have taken."""
        self.before: dict[str, float] | None = loaded.run["before"] if loaded else None
        """Scores before the first step, where an earlier process has measured them."""
        self._line: str | None = None  # digest of that step's line
        if loaded is not None and self._entries is not None:
            self._line = self._entries.line_of(loaded.step, loaded.run["journal"], loaded.digest)
        self._saved = self.steps  # step of the newest checkpoint
        self._spoilt_in_row = 0
        self._score: Callable[[], dict[str, float]]
        # Rank 0 alone has files; what goes wrong with them is told to all with the next step.
        self._metrics: MetricsWriter | None = None
        self._journal: Journal | None = None
        self._fault = ""

    def _read_journal(self) -> Entries | None:
        path = self._folder / JOURNAL
        # Without a checkpoint nothing is lost where its first line was never written; whoever has removed
        # it goes on from the newest checkpoint.
        if not path.exists() or not (is_begun(path) or complete(self._folder / CHECKPOINTS)):
            return None
        return read_journal(path, to_go_on=True)

    def _check(self, manifest: Manifest) -> None:
        """Raises `UnusableError` where a checkpoint does not belong to the run and its journal."""
        if not manifest.run.keys() >= {"before", "journal"}:
            raise UnusableError(
                f"checkpoint step-{manifest.step:06d} in {self._folder} was not saved by its run: remove it"
            )
        try:
            if self._entries is None:
                check_header(manifest.run, self._header)
            else:
                self._entries.line_of(manifest.step, str(manifest.run["journal"]), manifest.digest)
        except UserError as error:
            raise UnusableError(str(error)) from None

    def begin(self, before: dict[str, float], score: Callable[[], dict[str, float]]) -> None:
        """Open metrics and journal where the run goes on.

        A zeroth-order run goes on after the last step of its journal, which is repeated without
        forwards; any other after its newest checkpoint. score: measures the model, every
        `eval_every` steps. Raises `PreemptedError` where it is asked to end in that.
        """
        self.before, self._score = before, score
        entries, digest = self._entries, weights_digest(self._engine)
        if entries is not None:
            if self._line is None and entries.first:
                raise UserError(f"{JOURNAL} begins after step {entries.first}, and there is no checkpoint: restore one")
            if self._line is None and entries.header["weights"] != digest:
                raise UserError(f"{self._folder} was begun with another model {self._config.model}: restore it")
            self._line = self._line or entries.ends[0][2]
            if self._config.alpha == 1:
                self._catch_up(entries)
                digest = weights_digest(self._engine)

        def open_files() -> tuple[bool, int]:
            """Whether the last step is without its score, because the run was asked to end before it, and the
            spoilt steps in a row up to it."""
            self._metrics = MetricsWriter(self._folder, self.steps)
            if self._metrics.kept < self.steps:
                kept = f"{METRICS} has lines of {self._metrics.kept} of the {self.steps} steps taken"
                self._say(f"{kept}: the others were damaged or lost, and stand in {JOURNAL} alone")
            path = self._folder / JOURNAL
            if entries is None:
                taken = {"after": self.steps} if self.steps else {}
                self._journal = Journal(path, {**self._header, **taken, "weights": digest, "versions": versions()})
            else:
                self._journal = Journal.resume(path, entries, self.steps, str(self._line))
            if self._resuming:
                self._journal.event(resumed=self.steps, weights=digest, versions=versions(), **self._where)
            last = self._metrics.last
            unscored = self._score_is_due() and last.get("step") == self.steps and not before.keys() <= last.keys()
            return unscored, self._count_spoilt(entries.records if entries is not None else [])

        def amend() -> None:
            if self._metrics is not None:
                self._metrics.amend_last(scores)

        unscored, self._spoilt_in_row = from_main(self._engine, open_files)
        self._optimizer.steps = self.steps
        if self._resuming:
            self._say(f"going on after step {self.steps}")
        if unscored:
            try:
                scores = score()
            except EvaluationStoppedError:
                self.end_early()
            from_main(self._engine, amend)

    def _count_spoilt(self, records: list[Record]) -> int:
        """Spoilt steps in a row up to the last one taken: a restart is no way round `max_skipped`."""
        spoilt = {record.step for record in records if record.g0 is None}
        # That gradients were left out stands in the metrics alone.
        spoilt |= {record["step"] for record in read_metrics(self._folder) if record.get("gradients_left_out")}
        return len(list(itertools.takewhile(spoilt.__contains__, range(self.steps, 0, -1))))

    def _score_is_due(self) -> bool:
        every, steps = self._config.eval_every, self.steps
        return 0 < steps < self._config.steps and every > 0 and steps % every == 0

    def _catch_up(self, entries: Entries) -> None:
        """Repeat the steps that the journal holds beyond the weights."""
        missing = entries.between(self.steps, self._config.steps)
        steps = [(record.seed, record.g0 or (), record.lr) for record in missing]
        self._optimizer.replay(steps, self._config.zo_sizes)
        self.steps += len(missing)
        self._line = next(line for after, _, line in reversed(entries.ends) if after == self.steps)
        if missing:
            self._say(f"{len(missing)} steps repeated from the journal")

    def took(
        self,
        metrics: dict[str, Any],
        samples: tuple[Sequence[int], Sequence[int]],
        asked_to_end: bool,
    ) -> None:
        """Note a step, measure the model and save where it is time.

        samples: of the zeroth-order and the first-order batch. Raises `PreemptedError` once saved,
        where any rank was asked to end, and `UserError` after too many spoilt steps in a row and where
        a file cannot be written.
        """
        left_out = self._optimizer.gradients_left_out
        flags = torch.tensor([asked_to_end, left_out, bool(self._fault)], dtype=torch.float64)
        asked, left_out, fault = self._engine.sum(flags).tolist()
        self.steps += 1
        if fault:
            raise UserError(self._fault or "rank 0 cannot write to the run folder, and says why")
        metrics["gradients_left_out"] = int(left_out)
        self._spoilt_in_row = self._spoilt_in_row + 1 if metrics["skipped"] or left_out else 0
        if self._score_is_due() and not asked:
            try:
                metrics.update(self._score())
            except EvaluationStoppedError:
                asked = True
        g0 = None if metrics["skipped"] else tuple(metrics["g0"])
        self._write(metrics, Record(self.steps, metrics["seed"], g0, metrics["lr"], *map(tuple, samples)))
        every = self._config.checkpoint_every
        due = every and (self.steps % every == 0 or self.steps == self._config.steps)
        if asked:
            self.end_early()
        # What is saved amid spoilt steps pushes nothing out, so it is saved only where it has to be.
        if due and not self._spoilt_in_row and not self._save():
            name = not_finite(self._engine, self._engine.shards())
            self._say(f"no checkpoint of step {self.steps}: {name} has weights that are not finite")
        if self._spoilt_in_row >= self._config.max_skipped:
            self._checkpoints.wait()
            most = self._config.max_loss
            limit = f", or losses above max_loss={most:g}" if most < math.inf else ""
            raise UserError(
                f"{self._spoilt_in_row} steps in a row, up to step {self.steps}, had losses or gradients that are not "
                f"finite{limit}: lower lr, or look at the data; the checkpoints before them are intact"
            )

    def end_early(self) -> NoReturn:
        """Save after the step taken last and raise `PreemptedError`."""
        # A run that has gone on from its last step has nothing new to save.
        saved = self._saved == self.steps or self._save()
        self._checkpoints.wait()
        what = "saved" if saved else "did not save, since weights are not finite"
        raise PreemptedError(
            f"asked to end after step {self.steps}, and {what}: the same command with output={self._folder} goes on"
        )

    def _write(self, metrics: dict[str, Any], record: Record) -> None:
        if self._journal is None or self._metrics is None or self._fault:
            return
        try:
            self._metrics.append(metrics)
            self._journal.step(record)
        except OSError as error:
            self._fault = self._told(error)

    def _save(self) -> bool:
        """Whether the step was saved: not where a weight is not finite."""
        line = ""
        if self._journal is not None and self._metrics is not None and not self._fault:
            try:
                self._metrics.sync()
                self._journal.sync()
                line = self._journal.digest
            except OSError as error:
                self._fault = self._told(error)
        # A checkpoint whose step the journal may not hold could not be gone on from.
        agree(self._engine, self._fault)
        schedule = {name: getattr(self._config, name) for name in ("steps", "lr", "schedule", "warmup_steps")}
        facts = {**self._header, **schedule, **self._where, "before": self.before, "journal": line}
        # Spoilt steps must not push out the good ones.
        digest = self._checkpoints.save(self.steps, facts, prune=not self._spoilt_in_row)
        if digest is not None and self._journal is not None:
            try:
                self._journal.event(checkpoint=self.steps, weights=digest)
            except OSError as error:
                self._fault = self._told(error)
        if digest is not None:
            self._saved = self.steps
        return digest is not None

    def _told(self, error: OSError) -> str:
        return f"cannot write to {self._folder}: {error.strerror}: mend that and start the same command to go on"

    def steps_are_taken(self) -> None:
        """Have the last save end; raises `UserError` where the steps have left weights that are not finite."""
        try:
            self._checkpoints.wait()
        except UserError as error:  # the weights are here, and worth more than their copy
            self._say(f"the last step is not saved ({error}): the run comes to its end all the same")
            self._saved = -1
            self._checkpoints.tidy()  # what follows may need its place
        check_result(self._engine, self.steps)

    def prepare_export(self, request: Request) -> None:
        """Raises `PreemptedError`, once saved, where any rank was asked to end; later only where nothing is lost."""
        if self._engine.sum(torch.tensor([float(request.received)])).item():
            self.end_early()
        if self._saved == self.steps:
            request.obey()

    def end(self, digest: str) -> None:
        """The weights after the last step have this digest."""

        def close() -> None:
            if self._journal is not None and self._metrics is not None:
                self._journal.event(end=self.steps, weights=digest)
                self._journal.sync()
                self._journal.close()
                self._metrics.close()

        agree(self._engine, self._fault)
        from_main(self._engine, close)


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
