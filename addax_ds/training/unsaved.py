"""What a run of a baseline leaves on disk: its metrics. Nothing it could go on from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from addax_ds.config import RunConfig
from addax_ds.errors import PreemptedError
from addax_ds.training.agreement import agree, from_main
from addax_ds.training.evaluation import EvaluationStoppedError
from addax_ds.training.finite import check_model, check_result
from addax_ds.training.metrics import MetricsWriter
from addax_ds.training.models import Optimizer
from addax_ds.training.preemption import Request


class UnsavedState:
    """In place of `RunState` where an optimizer has state that is not saved: such a run starts anew."""

    before: dict[str, float] | None = None
    steps = 0

    def __init__(
        self, config: RunConfig, folder: Path, optimizer: Optimizer, resuming: bool, say: Callable[[str], Any]
    ) -> None:
        self._config, self._folder, self._engine = config, folder, optimizer.engine
        check_model(self._engine, config)
        if resuming:
            say(f"{config.method} keeps no checkpoints: the run starts anew")
        self._metrics: MetricsWriter | None = None
        self._score: Callable[[], dict[str, float]]

    def begin(self, before: dict[str, float], score: Callable[[], dict[str, float]]) -> None:
        """Open the metrics, without what an earlier run has left of them."""
        self._score = score

        def open_file() -> None:
            self._metrics = MetricsWriter(self._folder)

        from_main(self._engine, open_file)

    def took(self, metrics: dict[str, Any], samples: tuple[Sequence[int], Sequence[int]], asked_to_end: bool) -> None:
        """Note a step, and measure the model where it is time.

        Raises `PreemptedError` where any rank was asked to end.
        """
        self.steps += 1
        metrics["gradients_left_out"] = 0
        asked = bool(self._engine.sum(torch.tensor([float(asked_to_end)])).item())
        if asked:
            self.end_early()
        every = self._config.eval_every
        if every and self.steps % every == 0 and self.steps < self._config.steps:
            try:
                metrics.update(self._score())
            except EvaluationStoppedError:
                self.end_early()
        fault = ""
        if self._metrics is not None:
            try:
                self._metrics.append(metrics)
            except OSError as error:
                fault = f"cannot write to {self._folder}: {error.strerror}: mend that and start anew"
        agree(self._engine, fault)

    def end_early(self) -> NoReturn:
        """Raises `PreemptedError`."""
        raise PreemptedError(
            f"asked to end after step {self.steps}: {self._config.method} keeps no checkpoints, so the same command "
            "starts anew"
        )

    def steps_are_taken(self) -> None:
        """Raises `UserError` where the steps have left weights that are not finite."""
        check_result(self._engine, self.steps)

    def prepare_export(self, request: Request) -> None:
        """Whoever is asked to end from here on finishes: the export is all that is left of the run."""

    def end(self, digest: str) -> None:
        """Nothing follows."""
        if self._metrics is not None:
            self._metrics.close()
