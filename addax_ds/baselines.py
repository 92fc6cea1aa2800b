"""SGD and AdamW as people use them today: torch's on plain and FSDP2 weights, DeepSpeed's under ZeRO.

They take the global batches that `Addax.train_step` takes, and score through guests as it does.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from addax_ds.core.directions import Directions
from addax_ds.core.dropout import dropout, dropout_seed
from addax_ds.core.guest import Job, raise_first
from addax_ds.core.lanes import Lanes
from addax_ds.core.noise import step_seed
from addax_ds.core.scalars import Scalars
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError
from addax_ds.loss import LossFunction, per_sample, token_loss
from addax_ds.micro_batches import Batch, batch_size, cut, fingerprint

_NO_DIRECTIONS = Directions("shared", 0, ())


class Baseline(ABC):
    """First-order steps with an optimizer of others; what a run asks of `Addax` is here, too.

    fo_micro_batch: samples of a micro-batch. seed: of the dropout, if there is any. atomic: as of `Addax`.
    """

    placement = placement_reason = ""
    queries = 1
    gradients_left_out = 0

    def __init__(
        self, engine: Engine, fo_micro_batch: int, seed: int, with_dropout: bool, atomic: tuple[str, ...]
    ) -> None:
        self.engine, self.steps = engine, 0
        engine.trainable_names = {name for name, p in engine.model.named_parameters() if p.requires_grad}
        self._fo_micro_batch, self._seed, self._dropout = fo_micro_batch, seed, with_dropout
        self._lanes = Lanes(engine.model, engine.skeleton, engine, atomic)
        self._forward: nn.Module = engine.model

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, with `lr`."""

    @abstractmethod
    def _forward_in(self) -> contextlib.AbstractContextManager:
        """Around a forward: mixed precision, where the engine does not bring it."""

    @abstractmethod
    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add this rank's gradient of a part of the mean loss; last: no further part of the step follows."""

    @abstractmethod
    def _update(self) -> float:
        """Clip and update; returns the norm of the whole gradient before."""

    def train_step(
        self, zo_batch: Any, fo_batch: Batch | list[Batch] | None, loss_fn: LossFunction = token_loss
    ) -> dict[str, Any]:
        """One step on the mean loss of the global batch, like `Addax.train_step` with alpha 0.

        The metrics have gradient_norm, too. Raises `UserError` where the loss is not finite, on every rank
        and before anything is written.
        """
        engine = self.engine
        fo = cut(fo_batch, self._fo_micro_batch, "fo_batch")
        seed = step_seed(self._seed, self.steps)
        scalars = Scalars(_NO_DIRECTIONS, list(map(batch_size, fo)), engine.world_size)
        scalars.put_fingerprint(engine.rank, fingerprint(fo))
        engine.before_step()
        with dropout(engine.model, self._dropout):
            for first in range(0, len(fo), engine.world_size):
                mine = first + engine.rank
                batch = fo[min(mine, len(fo) - 1)]
                with self._forward_in(), dropout_seed(seed + mine, engine.device, self._dropout):
                    losses = per_sample(loss_fn(self._forward, batch), batch_size(batch))
                # A rank without a micro-batch of its own joins the collectives with weight zero.
                weight = 1.0 / scalars.fo_samples if mine < len(fo) else 0.0
                if mine < len(fo):
                    scalars.put_fo(mine, losses)
                self._backward(losses.sum() * weight, last=first + engine.world_size >= len(fo))
        scalars.vector = engine.sum(scalars.vector)
        scalars.check_fingerprints()
        loss = scalars.fo_mean()
        assert loss is not None  # there is a batch
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {self.steps + 1} is {loss}: lower lr, or look at the data")
        lr = float(self.param_groups[0]["lr"])
        norm = self._update()
        self.steps += 1
        return {
            **{"step": self.steps, "seed": seed, "g0": [], "loss_zo": None, "loss_fo": loss},
            **{"lr": lr, "skipped": False, "gradient_norm": norm},
        }

    def run_guests(self, runs: list[Callable[[nn.Module], Any]]) -> list[Any]:
        """See `Addax.run_guests`."""
        self.engine.before_step()
        jobs = [Job(self._in_precision(run)) for run in runs]
        self._lanes.run(jobs)
        raise_first(jobs)
        return [job.result for job in jobs]

    def _in_precision(self, run: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        def computed(model: nn.Module) -> Any:
            with self._forward_in():  # a thread's own
                return run(model)

        return computed


class TorchBaseline(Baseline):
    """An optimizer of torch on plain weights, data parallel, or on those of `addax_ds.shard`.

    maximal_norm: global norm to which gradients are clipped, 0 for none. autocast: compute in bfloat16.
    """

    def __init__(
        self, engine: Engine, optimizer: torch.optim.Optimizer, maximal_norm: float, autocast: bool, **common: Any
    ) -> None:
        super().__init__(engine, **common)
        self.optimizer, self._maximal_norm, self._autocast = optimizer, maximal_norm, autocast
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def _forward_in(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self._autocast)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()
        if last and self.engine.name == "replicated" and self.engine.world_size > 1:
            for parameter in self._parameters:
                if parameter.grad is None:  # ranks may reach different weights
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def _update(self) -> float:
        maximal = self._maximal_norm or math.inf
        norm: Any = torch.nn.utils.clip_grad_norm_(self._parameters, maximal)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.engine.after_step(True)
        return norm.item()


class DeepSpeedBaseline(Baseline):
    """The optimizer that a DeepSpeed engine has made, at any ZeRO stage, with its clipping and precision.

    deepspeed: the engine. rounds: micro-batches of a rank in a step, its gradient_accumulation_steps.
    """

    def __init__(self, engine: Engine, deepspeed: Any, rounds: int, **common: Any) -> None:
        super().__init__(engine, **common)
        self._deepspeed, self._rounds = deepspeed, rounds
        self._forward = deepspeed  # which counts its forwards

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._deepspeed.optimizer.param_groups

    def _forward_in(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        # It takes the mean over ranks and micro-batches, of losses that are weighted already.
        self._deepspeed.backward(loss * (self.engine.world_size * self._rounds))
        if not last:
            self._deepspeed.step()

    def _update(self) -> float:
        self._deepspeed.step()
        self.engine.after_step(True)
        return float(self._deepspeed.get_global_grad_norm() or 0.0)
