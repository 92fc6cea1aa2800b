"""Addax: the optimizer that a user holds.

A step runs all its forwards before any write: zeroth-order guests beside the host's first-order
forward, one all-reduce of the losses, and then the backward, in which each gradient is applied to
its shard together with the zeroth-order part as soon as it leaves its reduction.
"""

import importlib.util
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from addax_ds.config import AddaxConfig, build
from addax_ds.core import kernels
from addax_ds.core.lanes import Job, Lanes, Perturbation
from addax_ds.core.noise import step_seed
from addax_ds.core.plain import Step
from addax_ds.core.skeleton import strip
from addax_ds.engines.base import Engine
from addax_ds.engines.fsdp import FSDP, refuse_fsdp1, skeleton_of
from addax_ds.engines.replicated import Replicated
from addax_ds.errors import UserError
from addax_ds.loss import token_loss

Batch = Any
LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass
class _Pending:
    """A step whose scalars are known and whose writes are under way."""

    seed: int
    coefficients: tuple[float, ...]
    gradient_weight: float
    skipped: bool = False
    accumulating: bool = False
    written: set[str] = field(default_factory=set)


class Addax(torch.optim.Optimizer):
    """Addax (Li et al., ICLR 2025, algorithm 1) on sharded or replicated weights.

    params: a model (plain, or wrapped by `addax_ds.shard`), or parameters as for any torch
    optimizer when `deepspeed.initialize` builds or receives it. The keyword arguments are those of
    `AddaxConfig`. Parameter groups may set `lr` and `weight_decay`; parameters that require no
    gradient or belong to no group stay as they are.

    Raises `UserError` (a ValueError) for hyper-parameters out of range and for models wrapped in a
    way that would give wrong numbers.
    """

    def __init__(self, params: nn.Module | Iterable, **hyperparameters: Any) -> None:
        self.config: AddaxConfig = build(AddaxConfig, hyperparameters, "Addax")
        self.engine: Engine | None = None
        self.steps = 0
        self._pending: _Pending | None = None
        self._accumulated: dict[str, torch.Tensor] = {}
        model = params if isinstance(params, nn.Module) else None
        if model is None:
            _register_with_deepspeed()
        groups = [p for p in model.parameters() if p.requires_grad] if model is not None else params
        super().__init__(groups, {"lr": self.config.lr, "weight_decay": self.config.weight_decay})
        if model is not None:
            self.attach(choose_engine(model))

    # -- set-up ---------------------------------------------------------------------------------

    def attach(self, engine: Engine) -> None:
        """Bind the optimizer to what holds the weights; a previous engine is let go."""
        self.detach()
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        parameters = {
            name: p for name, p in engine.model.named_parameters() if p.requires_grad and id(p) in group_of
        }
        if not parameters:
            raise UserError("no parameter of the model is trainable: leave requires_grad on for some")
        for name, p in parameters.items():
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(f"{name} is {p.dtype}: load the model in float32 or bfloat16")
        self._group_of = {name: group_of[id(p)] for name, p in parameters.items()}
        self.engine = engine
        engine.trainable_names = set(parameters)
        self._lanes = Lanes(engine.model, engine.skeleton, engine)
        self._host_is_forwarding = False
        engine.attach(parameters, self._unit_gathered, self._on_gradient)

    def detach(self) -> None:
        """Remove every hook and end the guests' threads."""
        if self.engine is not None:
            self.engine.detach()
            self._lanes.close()
            self.engine = None

    def _unit_gathered(self) -> None:
        # Only in a step's own forward: recomputation enters modules again in the backward.
        if self._host_is_forwarding:
            self._lanes.advance()

    # -- the step -------------------------------------------------------------------------------

    def train_step(
        self, zo_batch: Batch | list[Batch] | None, fo_batch: Batch | list[Batch] | None, loss_fn: LossFunction = token_loss
    ) -> dict[str, Any]:
        """One Addax step (algorithm 1): every rank passes the same global batches.

        zo_batch, fo_batch: what the model takes, with samples along dimension 0, cut here into
        micro-batches of the configured sizes; or a list of micro-batches. `zo_batch` is not looked
        at when alpha is 0, `fo_batch` not when alpha is 1.
        loss_fn(model, batch) -> float32 [batch], a loss per sample; it must reach weights only
        through the model it is given.

        Returns step, seed, g0 (one per direction), loss_zo (plus and minus, per direction),
        loss_fo, lr and skipped. A step with a scalar that is not finite writes nothing, on any rank.
        """
        engine = self._attached()
        config = self.config
        zo = _cut(zo_batch, config.zo_micro_batch, "zo_batch") if config.alpha > 0 else []
        fo = _cut(fo_batch, config.fo_micro_batch, "fo_batch") if config.alpha < 1 else []
        scalars = _Scalars(config.queries, zo, fo, engine.world_size)
        seed = step_seed(config.seed, self.steps)
        self._check_idle()
        engine.before_step()
        backward_ran = False
        try:
            jobs, places = self._zeroth_order_jobs(zo, seed, loss_fn, idle_joins=not fo)
            self._lanes.start(jobs)
            self._lanes.advance()
            if not fo:
                self._lanes.drive()
            rounds = -(-len(fo) // engine.world_size)
            for round_ in range(rounds):
                # A rank without a micro-batch of its own joins the collectives with weight zero.
                mine = round_ * engine.world_size + engine.rank
                losses = self._host_forward(fo[mine] if mine < len(fo) else fo[-1], loss_fn)
                if mine < len(fo):
                    scalars.put_fo(mine, losses)
                loss = losses.sum() / scalars.fo_samples if mine < len(fo) else losses.sum() * 0.0
                if round_ < rounds - 1:
                    self._pending = _Pending(seed, (), 1.0, accumulating=True)
                    loss.backward()
            for job, place in zip(jobs, places, strict=True):
                scalars.put_zo(place, job.result)
            scalars.put_fingerprint(engine.rank, _fingerprint(zo + fo))
            scalars.vector = engine.sum(scalars.vector)
            metrics = self._decide(scalars, seed)
            if fo and not metrics["skipped"]:
                loss.backward()
                backward_ran = True
            self._write_rest()
            return metrics
        except BaseException:
            self._lanes.abandon()
            raise
        finally:
            self._pending = None
            self._accumulated = {}
            engine.after_step(backward_ran or not fo)

    def _zeroth_order_jobs(self, zo: list[Batch], seed: int, loss_fn: LossFunction, idle_joins: bool):
        """The guests of this rank and, for each, its (direction, sign, micro-batch)."""
        config, engine = self.config, self.engine
        mine = range(engine.rank, len(zo), engine.world_size)
        places = [(query, sign, index) for query in range(config.queries) for index in mine for sign in (1, -1)]
        if not places and zo and idle_joins:
            places = [(0, 1, None)]  # without a host, gathers need a guest on every rank
        jobs = [
            Job(
                _loss_of(loss_fn, zo[index or 0]),
                Perturbation(seed, query, sign, config.eps, config.distribution),
            )
            for query, sign, index in places
        ]
        return jobs, places

    def _host_forward(self, batch: Batch, loss_fn: LossFunction) -> torch.Tensor:
        """Per-sample losses of the model itself, with every guest run along."""
        set_dropout(self.engine.model, self.config.dropout)
        self._host_is_forwarding = True
        try:
            losses = _per_sample(loss_fn(self.engine.model, batch), batch)
        finally:
            self._host_is_forwarding = False
        self._lanes.drive()  # units that the host did not enter
        return losses

    def _decide(self, scalars: "_Scalars", seed: int) -> dict[str, Any]:
        """g0 and whether all ranks write, from the losses of all ranks."""
        config = self.config
        scalars.check_fingerprints()
        plus, minus = scalars.zo_means()
        # n-SPSA (MeZO, definition 1): the mean over the whole ZO batch, a scalar per direction.
        g0 = [(p - m) / (2.0 * config.eps) for p, m in zip(plus, minus, strict=True)]
        skipped = not all(map(math.isfinite, [*plus, *minus, *scalars.fo_losses()]))
        self._pending = _Pending(
            seed, tuple(config.alpha * g / config.queries for g in g0), 1.0 - config.alpha, skipped=skipped
        )
        self.steps += 1
        return {
            "step": self.steps,
            "seed": seed,
            "g0": g0,
            "loss_zo": {"plus": plus, "minus": minus} if plus else None,
            "loss_fo": scalars.fo_mean(),
            "lr": self.param_groups[0]["lr"],
            "skipped": skipped,
        }

    # -- the loops of others --------------------------------------------------------------------

    @torch.no_grad()
    def probe(self, loss_fn: Callable[[nn.Module], torch.Tensor]) -> dict[str, Any]:
        """The zeroth-order half of a step, for loops that own their forward and backward.

        loss_fn(model) -> float32 [n], per-sample losses of this rank's zeroth-order batch; every
        rank calls it. Then run the first-order forward, the backward of this rank's mean loss
        (gradients are averaged over ranks) and `step()`. Weights are written in that backward.
        """
        engine = self._attached()
        config, seed = self.config, step_seed(self.config.seed, self.steps)
        self._check_idle()
        engine.before_step()
        places = [(query, sign) for query in range(config.queries) for sign in (1, -1)]
        jobs = [
            Job(
                lambda model: _per_sample(loss_fn(model), None).double().cpu(),
                Perturbation(seed, query, sign, config.eps, config.distribution),
            )
            for query, sign in places
        ]
        self._lanes.start(jobs)
        self._lanes.drive()
        sums = torch.tensor([math.fsum(job.result.tolist()) for job in jobs] + [len(jobs[0].result)], dtype=torch.float64)
        *totals, count = engine.sum(sums).tolist()
        plus, minus = ([total / count for total in totals[offset::2]] for offset in (0, 1))
        g0 = [(p - m) / (2.0 * config.eps) for p, m in zip(plus, minus, strict=True)]
        skipped = not all(map(math.isfinite, plus + minus))
        coefficients = tuple(config.alpha * g / config.queries for g in g0)
        self._pending = _Pending(seed, coefficients, self._own_loop_weight(), skipped=skipped)
        return {
            "step": self.steps + 1,
            "seed": seed,
            "g0": g0,
            "loss_zo": {"plus": plus, "minus": minus},
            "lr": self.param_groups[0]["lr"],
            "skipped": skipped,
        }

    def _own_loop_weight(self) -> float:
        return (1.0 - self.config.alpha) / self.engine.world_size

    def step(self, closure: None = None) -> None:
        """End of a step begun by `probe` or, with alpha 0, by a backward; without one, nothing.

        Weights that got no gradient receive their zeroth-order part here.
        """
        if closure is not None:
            raise UserError("Addax.step takes no closure: call probe, backward and step, or train_step")
        if self._pending is None:
            return
        try:
            if self.config.alpha < 1 and not self._pending.written and not self._pending.skipped:
                raise UserError(
                    "no gradient reached Addax before step(): run the backward between probe() and step(), "
                    "and leave the engine's gradient synchronisation on"
                )
            self._write_rest()
            self.steps += 1
        finally:
            self._pending = None
            self.engine.after_step(True)

    # -- writes ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """A gradient has left its reduction: apply it now, or add it up until the last micro-batch."""
        pending = self._pending
        if pending is None:
            if self.config.alpha > 0:
                raise RuntimeError("a backward without probe(): call probe() before it, or train_step()")
            seed = step_seed(self.config.seed, self.steps)
            pending = self._pending = _Pending(seed, (), self._own_loop_weight())
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
            self._write(name, gradient)

    @torch.no_grad()
    def _write_rest(self) -> None:
        """Update what got no gradient in the last backward."""
        pending = self._pending
        if pending.skipped:
            return
        for name in sorted(self._group_of.keys() - pending.written):
            if pending.coefficients or name in self._accumulated:
                self._write(name, None)

    def _write(self, name: str, gradient: torch.Tensor | None) -> None:
        pending, group = self._pending, self.param_groups[self._group_of[name]]
        if name in self._accumulated:
            earlier = self._accumulated.pop(name)
            gradient = earlier if gradient is None else earlier.add_(gradient)
        shard = self.engine.shard(name)
        kernels.update(
            shard.local,
            shard.start,
            gradient,
            name,
            Step(
                seed=pending.seed,
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                gradient_weight=pending.gradient_weight,
                coefficients=pending.coefficients,
                distribution=self.config.distribution,
                stochastic=self.config.rounding == "stochastic",
            ),
        )
        pending.written.add(name)

    # -- everything else ------------------------------------------------------------------------

    def run_guests(self, runs: list[Callable[[nn.Module], Any]]) -> list[Any]:
        """Forwards of the unperturbed model in evaluation mode, on one gather of every unit.

        Each run is called with the model and returns what to keep. A collective: ranks pass the
        same number of runs, each with the same number of forwards.
        """
        engine = self._attached()
        self._check_idle()
        engine.before_step()
        jobs = [Job(run) for run in runs]
        self._lanes.start(jobs)
        self._lanes.drive()
        return [job.result for job in jobs]

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the number of steps taken; the method has no other state."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        state = dict(state_dict)
        self.steps = state.pop("steps", self.steps)
        super().load_state_dict(state)

    def _attached(self) -> Engine:
        if self.engine is None:
            raise UserError("Addax holds parameters but no model: build it with the model, or let deepspeed.initialize")
        return self.engine

    def _check_idle(self) -> None:
        if self._pending is not None:
            raise RuntimeError("a step is under way: call step() after the backward that follows probe()")


def _register_with_deepspeed() -> None:
    """Parameters without a model come from DeepSpeed, or go to it."""
    if importlib.util.find_spec("deepspeed") is not None:
        from addax_ds.engines import deepspeed_plugin

        deepspeed_plugin.register(Addax)


def choose_engine(model: nn.Module) -> Engine:
    """FSDP2 where the model is wrapped by `addax_ds.shard`, else replicated weights."""
    refuse_fsdp1(model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UserError("the model is wrapped for data parallelism: give Addax the plain model, it reduces itself")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError("the model is partitioned by DeepSpeed: let deepspeed.initialize build Addax")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return FSDP(model, skeleton_of(model))
    return Replicated(model, strip(model))


def set_dropout(model: nn.Module, enabled: bool) -> None:
    """Training mode with dropout, or without any.

    Hugging Face models checkpoint activations in training mode only, so layers that checkpoint stay
    in it; what they drop themselves is switched off by its probability.
    """
    model.train(enabled)
    if enabled:
        return
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for attribute, value in vars(module).items():
                if isinstance(value, float) and ("dropout" in attribute or "drop" in attribute):
                    setattr(module, attribute, 0.0)


# -- batches and scalars ------------------------------------------------------------------------


class _Scalars:
    """Every per-sample loss of a step in global order, in one vector for one all-reduce.

    Each rank fills in its own places and adds zeros elsewhere, so the sum over ranks is exact and
    what follows from it does not depend on who computed what.
    """

    def __init__(self, queries: int, zo: list[Batch], fo: list[Batch], world_size: int) -> None:
        self._queries = queries
        self._zo_sizes, self._fo_sizes = [batch_size(b) for b in zo], [batch_size(b) for b in fo]
        self.zo_samples, self.fo_samples = sum(self._zo_sizes), sum(self._fo_sizes)
        self._fo_at = 2 * queries * self.zo_samples
        self._fingerprints_at = self._fo_at + self.fo_samples
        self.vector = torch.zeros(self._fingerprints_at + world_size, dtype=torch.float64)

    def put_zo(self, place: tuple[int, int, int | None], losses: torch.Tensor) -> None:
        query, sign, index = place
        if index is not None:
            at = (2 * query + (sign < 0)) * self.zo_samples + sum(self._zo_sizes[:index])
            self.vector[at : at + len(losses)] = losses

    def put_fo(self, index: int, losses: torch.Tensor) -> None:
        at = self._fo_at + sum(self._fo_sizes[:index])
        self.vector[at : at + len(losses)] = losses.detach().double().cpu()

    def put_fingerprint(self, rank: int, fingerprint: int) -> None:
        self.vector[self._fingerprints_at + rank] = float(fingerprint)

    def check_fingerprints(self) -> None:
        fingerprints = self.vector[self._fingerprints_at :].tolist()
        if len(set(fingerprints)) > 1:
            other = next(rank for rank, value in enumerate(fingerprints) if value != fingerprints[0])
            raise UserError(f"ranks 0 and {other} were given different batches: pass every rank the same global batch")

    def zo_means(self) -> tuple[list[float], list[float]]:
        if not self.zo_samples:
            return [], []
        rows = self.vector[: self._fo_at].view(self._queries, 2, self.zo_samples)
        return tuple([_mean(rows[query, side].tolist()) for query in range(self._queries)] for side in (0, 1))

    def fo_losses(self) -> list[float]:
        return self.vector[self._fo_at : self._fingerprints_at].tolist()

    def fo_mean(self) -> float | None:
        return _mean(self.fo_losses()) if self.fo_samples else None


def _mean(values: list[float]) -> float:
    # fsum is exact, so no order of summation enters; it refuses mixed infinities, which stay NaN.
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def batch_size(batch: Batch) -> int:
    """Samples of a batch: the length of dimension 0 of its first tensor."""
    return len(_tensors(batch)[0])


def _tensors(batch: Batch) -> list[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        raise UserError("a batch holds no tensor: give a tensor, or a mapping or sequence of tensors")
    return tensors


def _cut(batch: Batch | list[Batch] | None, size: int, what: str) -> list[Batch]:
    """Micro-batches of `size` samples, the last one smaller where it does not divide."""
    if batch is None:
        raise UserError(f"{what} is None: alpha strictly between 0 and 1 needs both batches")
    if isinstance(batch, list):
        pieces = [piece for piece in batch if batch_size(piece)]
    else:
        count = batch_size(batch)

        def piece(value: Any, begin: int) -> Any:
            whole = isinstance(value, torch.Tensor) and value.ndim and len(value) == count
            return value[begin : begin + size] if whole else value

        def slice_(begin: int) -> Batch:
            if isinstance(batch, torch.Tensor):
                return piece(batch, begin)
            if isinstance(batch, Mapping):
                return {key: piece(value, begin) for key, value in batch.items()}
            return type(batch)(piece(value, begin) for value in batch)

        pieces = [slice_(begin) for begin in range(0, count, size)]
    if not pieces:
        raise UserError(f"{what} is empty: give at least one sample")
    return pieces


def _fingerprint(batches: list[Batch]) -> int:
    checksum = 0
    for batch in batches:
        for tensor in _tensors(batch):
            # Through bytes, since numpy has no bfloat16.
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def _per_sample(losses: torch.Tensor, batch: Batch | None) -> torch.Tensor:
    if not isinstance(losses, torch.Tensor) or losses.ndim != 1 or (batch is not None and len(losses) != batch_size(batch)):
        shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise UserError(f"loss_fn must return one loss per sample, [batch]: it returned {shape}")
    return losses.float()


def _loss_of(loss_fn: LossFunction, batch: Batch) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: _per_sample(loss_fn(model, batch), batch).double().cpu()
