"""The writes of a step: the one place where weights change."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from addax_ds.config import AddaxConfig
from addax_ds.core import kernels
from addax_ds.core.plain import Step
from addax_ds.engines.base import Engine

# Elements that replayed steps move while they lie in the cache.
_REPLAYED = 1 << 18


@dataclass
class Pending:
    """A step whose scalars are known and whose writes are under way."""

    seed: int
    coefficients: tuple[float, ...]
    """alpha * g0_q / Q, one per direction; empty without a zeroth-order part."""
    gradient_weight: float
    skipped: bool = False
    accumulating: bool = False
    """Gradients are added up: another first-order micro-batch of this rank follows."""
    written: set[str] = field(default_factory=set)
    steps: dict[int, Step] = field(default_factory=dict)
    """By parameter group, what its updates apply."""


class Updates:
    """Applies each gradient to its shard, with the zeroth-order part, as it leaves its reduction.

    groups: the optimizer's parameter groups as they are now, group_of: the index of each trainable
    parameter's. own_backward: what is pending when a backward comes without a probe.
    """

    def __init__(
        self,
        engine: Engine,
        config: AddaxConfig,
        groups: Callable[[], list[dict[str, Any]]],
        group_of: dict[str, int],
        own_backward: Callable[[], Pending],
    ) -> None:
        self._engine, self._config, self._groups, self._group_of = engine, config, groups, group_of
        self._own_backward = own_backward
        self._accumulated: dict[str, torch.Tensor] = {}
        self.pending: Pending | None = None
        self.left_out = torch.zeros((), dtype=torch.int64, device=engine.device)
        """Gradient elements of this rank that were not finite, in the step under way or the last one."""

    @torch.no_grad()
    def on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """A gradient has left its reduction: apply it now, or add it up until the last micro-batch."""
        pending = self.pending = self.pending or self._own_backward()
        if pending.accumulating:
            if name in self._accumulated:
                self._accumulated[name].add_(gradient)
            else:
                self._accumulated[name] = gradient.float().clone()
        elif not pending.skipped:
            if name in pending.written:
                raise RuntimeError(
                    f"{name} got two gradients in one step, the second on moved weights: accumulate by "
                    "train_step's micro-batches, and checkpoint activations with use_reentrant=False"
                )
            self._write(name, gradient, pending)

    @torch.no_grad()
    def write_rest(self) -> None:
        """Update what got no gradient in the last backward."""
        pending = self.pending
        if pending is None or pending.skipped:
            return
        for name in sorted(self._group_of.keys() - pending.written):
            if pending.coefficients or name in self._accumulated:
                self._write(name, None, pending)

    @torch.no_grad()
    def replay(self, steps: list[tuple[Pending, float]]) -> None:
        """The writes of zeroth-order steps, each with its learning rate, in order, without their forwards."""
        for name in self._group_of:
            shard = self._engine.shard(name)
            taken = [self._step(name, pending, lr) for pending, lr in steps]
            for begin in range(0, shard.local.numel(), _REPLAYED):
                part = shard.local[begin : begin + _REPLAYED]
                for step in taken:
                    kernels.update(part, shard.start + begin, None, name, step)

    def begin(self) -> None:
        """A step begins."""
        self.left_out.zero_()

    def end(self) -> None:
        """The step is over, whatever has become of it."""
        self.pending, self._accumulated = None, {}

    def _write(self, name: str, gradient: torch.Tensor | None, pending: Pending) -> None:
        """The fused update of this rank's shard of one parameter."""
        if name in self._accumulated:
            earlier = self._accumulated.pop(name)
            gradient = earlier if gradient is None else earlier.add_(gradient)
        shard, group = self._engine.shard(name), self._group_of[name]
        if group not in pending.steps:
            pending.steps[group] = self._step(name, pending, float(self._groups()[group]["lr"]))
        # Other weights are written by now, so the step cannot be skipped any more; and a weight that
        # is not finite would spoil every later step.
        kernels.update(shard.local, shard.start, gradient, name, pending.steps[group], self.left_out)
        pending.written.add(name)

    def _step(self, name: str, pending: Pending, lr: float) -> Step:
        return Step(
            seed=pending.seed,
            lr=lr,
            weight_decay=self._groups()[self._group_of[name]]["weight_decay"],
            gradient_weight=pending.gradient_weight,
            coefficients=pending.coefficients,
            distribution=self._config.distribution,
            stochastic=self._config.rounding == "stochastic",
        )
