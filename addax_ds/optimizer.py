"""Addax: the optimizer that a user holds.

A step runs all its forwards before any write: zeroth-order guests beside the host's first-order
forward, one all-reduce of the losses, and then the backward, in which each gradient is applied to
its shard together with the zeroth-order part as soon as it leaves its reduction.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from addax_ds.config import AddaxConfig, build
from addax_ds.core.checkpointing import refuse_reentrant
from addax_ds.core.directions import Directions
from addax_ds.core.dropout import dropout, dropout_seed
from addax_ds.core.guest import Job, raise_first
from addax_ds.core.lanes import Lanes
from addax_ds.core.noise import step_seed
from addax_ds.core.plain import Perturbation
from addax_ds.core.scalars import RankSums, Scalars, projected_gradients
from addax_ds.engines.base import Engine, ShardedEngine
from addax_ds.engines.choose import choose_engine, register_with_deepspeed
from addax_ds.engines.host_forward import HostForwardError
from addax_ds.engines.placement import MovedShards, choose_placement
from addax_ds.errors import UserError
from addax_ds.loss import LossFunction, per_sample, token_loss
from addax_ds.micro_batches import Batch, batch_size, cut, fingerprint
from addax_ds.updates import Pending, Updates

_LARGEST = torch.finfo(torch.float32).max
_NONE = Directions("shared", 0, ())


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
        self.steps = 0
        self.queries = self.config.queries
        """`queries` of the next step, for schedules; `config.queries` to begin with."""
        self._engine: Engine | None = None
        self.placement = ""
        """Where the noise is added, "gathered" or "shard"; empty before the first zeroth-order step."""
        self.placement_reason = ""
        self._checked = False  # what only the first step of a process checks
        self._host_is_forwarding = False
        self._host_entered: set[str] = set()  # paths of modules, noted in the first step
        defaults = {"lr": self.config.lr, "weight_decay": self.config.weight_decay}
        if isinstance(params, nn.Module):
            trainable = [p for p in params.parameters() if p.requires_grad]
            if not trainable:
                raise UserError("no parameter of the model is trainable: leave requires_grad on for some")
            super().__init__(trainable, defaults)
            self.attach(choose_engine(params))
        else:
            super().__init__(params, defaults)
        # Parameters without their model come from DeepSpeed, or go to it.
        if "deepspeed" in sys.modules or not isinstance(params, nn.Module):
            register_with_deepspeed(Addax)

    # -- set-up ---------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """What holds the weights."""
        if self._engine is None:
            raise UserError(
                "Addax holds parameters but no model: build it with the model, or give it to deepspeed.initialize"
            )
        return self._engine

    def attach(self, engine: Engine) -> None:
        """Bind the optimizer to what holds the weights; a previous engine is let go."""
        self.detach()
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad and id(p) in group_of}
        if not parameters:
            raise UserError("no parameter of the model is trainable: leave requires_grad on for some")
        for name, p in parameters.items():
            if p.dtype not in (torch.float32, torch.bfloat16):
                raise UserError(f"{name} is {p.dtype}: load the model in float32 or bfloat16")
        indices = {name: group_of[id(p)] for name, p in parameters.items()}
        if self.config.perturb == "shard" and not isinstance(engine, ShardedEngine):
            raise UserError(
                "perturb: shard needs sharded weights, and here every rank holds all: set perturb: gathered"
            )
        self._engine, self.placement = engine, ""
        engine.trainable_names = set(parameters)
        self._lanes = Lanes(engine.model, engine.skeleton, engine, self.config.atomic)
        self._updates = Updates(engine, self.config, lambda: self.param_groups, indices, self._own_backward)
        engine.attach(parameters, self._unit_gathered, self._updates.on_gradient)

    def detach(self) -> None:
        """Remove every hook and end the guests' threads."""
        if self._engine is not None:
            self._engine.detach()
            self._lanes.close()
            self._engine = None

    @torch.compiler.disable
    def _unit_gathered(self) -> None:
        # Only in a step's own forward: recomputation enters modules again in the backward.
        if self._host_is_forwarding:
            self._lanes.advance()

    def _place(self, directions: int) -> None:
        if not self.placement:
            self.placement, self.placement_reason = choose_placement(self.engine, self.config, directions)

    # -- the step -------------------------------------------------------------------------------

    def train_step(
        self,
        zo_batch: Batch | list[Batch] | None,
        fo_batch: Batch | list[Batch] | None,
        loss_fn: LossFunction = token_loss,
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
        engine, config = self.engine, self.config
        zo = cut(zo_batch, config.zo_micro_batch, "zo_batch") if config.alpha > 0 else []
        fo = cut(fo_batch, config.fo_micro_batch, "fo_batch") if config.alpha < 1 else []
        seed = step_seed(config.seed, self.steps)
        directions = Directions(config.directions, self.queries, tuple(map(batch_size, zo)))
        scalars = Scalars(directions, list(map(batch_size, fo)), engine.world_size)
        mine = fingerprint(zo + fo)
        scalars.put_fingerprint(engine.rank, mine)
        self._check_idle()
        self._updates.begin()
        refuse_reentrant(engine.model)
        engine.before_step()
        if not self._checked:
            self._check_batches_agree(mine)
        if zo:
            self._place(directions.most_of_a_rank(engine.world_size))
        backward_ran = not fo
        try:
            with dropout(engine.model, config.dropout):
                guests = self._guests(zo, directions, seed, loss_fn)
                self._begin([job for _, job in guests], self._points(seed, directions.count))
                loss, error = self._first_order_forwards(fo, seed, loss_fn, scalars)
                self._lanes.drive("beyond the host" if fo else "without a host")
                errors = [error, *(job.error for _, job in guests)]
                if any(errors):
                    scalars.put_fault(engine.rank)
                for (direction, sign, index), job in guests:
                    if job.error is None:
                        scalars.put_zo(direction, sign, index, job.result)
                scalars.vector = engine.sum(scalars.vector)
                self._raise_faults(scalars, errors)
                scalars.check_fingerprints()
                if not self._checked:
                    engine.check_reached(self._lanes.entered | self._host_entered)
                    self._checked = True
                means = *scalars.zo_means(), scalars.fo_mean()
                metrics, self._updates.pending = self._decide(*means, directions, seed, 1.0 - config.alpha)
                self.steps += 1
                if loss is not None and not metrics["skipped"]:
                    loss.backward()
                    backward_ran = True
                self._updates.write_rest()
            return metrics
        finally:
            self._lanes.abandon()
            self._updates.end()
            engine.after_step(backward_ran)

    def _guests(
        self, zo: list[Batch], directions: Directions, seed: int, loss_fn: LossFunction
    ) -> list[tuple[tuple[int, int, int], Job]]:
        """This rank's guests, each with its direction, sign and micro-batch."""
        rank, ranks = self.engine.rank, self.engine.world_size
        if self.placement == "shard":
            # Every point has gathers of its own, so a rank takes its micro-batches to all of them.
            work = [
                (direction, index) for direction in range(directions.count) for index in range(rank, len(zo), ranks)
            ]
        else:
            work = [*directions.share(rank, ranks)]
        points = [(direction, sign, index) for direction, index in work for sign in (1, -1)]
        return [
            ((direction, sign, index), Job(_loss_of(loss_fn, zo[index]), self._point(seed, direction, sign)))
            for direction, sign, index in points
        ]

    def _begin(self, jobs: list[Job], points: list[Perturbation]) -> None:
        """Start guests: on gathered weights up to the first that is not gathered, on shards to their end.

        points: all of the step, of which this rank may have no guest.
        """
        if self.placement != "shard" or not isinstance(self.engine, ShardedEngine):
            self._lanes.start(jobs)
            self._lanes.advance()
            return
        for point in points:
            at_point = [job for job in jobs if job.perturbation == point]
            self._lanes.run(at_point, MovedShards(self.engine, point), alike="of moved shards")

    def _check_batches_agree(self, mine: int) -> None:
        """Raises `UserError` where ranks hold different batches, before any forward.

        Every step notices other tokens in its own all-reduce; but with batches of other sizes ranks
        would wait for each other in vain. An all-reduce of its own, so only in the first step.
        """
        check = Scalars(_NONE, [], self.engine.world_size)
        check.put_fingerprint(self.engine.rank, mine)
        check.vector = self.engine.sum(check.vector)
        check.check_fingerprints()

    def _point(self, seed: int, query: int, sign: int) -> Perturbation:
        return Perturbation(seed, query, sign, self.config.eps, self.config.distribution)

    def _points(self, seed: int, directions: int) -> list[Perturbation]:
        return [self._point(seed, direction, sign) for direction in range(directions) for sign in (1, -1)]

    def _first_order_forwards(
        self, fo: list[Batch], seed: int, loss_fn: LossFunction, scalars: Scalars
    ) -> tuple[torch.Tensor | None, BaseException | None]:
        """Forward of this rank's first-order micro-batches, with the guests beside the first.

        Backward of all but the last, into a buffer; the last one's loss is returned, for the
        backward that writes, or the error of its forward.
        """
        loss: torch.Tensor | None = None
        error: BaseException | None = None
        for first in range(0, len(fo), self.engine.world_size):
            if first:
                self._raise_together(error)
            if loss is not None:
                self._updates.pending = Pending(seed, (), 1.0, accumulating=True)
                loss.backward()
            mine = first + self.engine.rank
            try:
                if mine < len(fo):
                    losses = self._host_forward(fo[mine], loss_fn, seed + mine)
                    scalars.put_fo(mine, losses)
                    loss = losses.sum() / scalars.fo_samples
                else:
                    # A rank without a micro-batch of its own joins the collectives with weight zero.
                    loss = self._host_forward(fo[-1], loss_fn, seed).sum() * 0.0
            except HostForwardError as finished:
                loss, error = None, finished.__cause__
        return loss, error

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank where a forward of some rank has failed, before a backward (one all-reduce)."""
        told = Scalars(_NONE, [], self.engine.world_size)
        if error is not None:
            told.put_fault(self.engine.rank)
        told.vector = self.engine.sum(told.vector)
        self._raise_faults(told, [error])

    def _raise_faults(self, scalars: Scalars | RankSums, errors: list[BaseException | None]) -> None:
        """Raise on every rank where a forward of some rank has failed; errors: this rank's own."""
        if not (ranks := scalars.faults()):
            return
        self._lanes.forget()
        for error in filter(None, errors):
            raise error
        raise RuntimeError(f"a forward failed on rank {ranks[0]}, which says why: no rank takes this step")

    def _host_forward(self, batch: Batch, loss_fn: LossFunction, seed: int) -> torch.Tensor:
        """Per-sample losses of the model itself: [batch]; `seed` is that of its dropout."""
        self._host_is_forwarding = True
        watches = [] if self._checked else self._watch_host()
        try:
            with self.engine.host_forward(), dropout_seed(seed, self.engine.device, self.config.dropout):
                return per_sample(loss_fn(self.engine.model, batch), batch_size(batch))
        finally:
            self._host_is_forwarding = False
            for watch in watches:
                watch.remove()

    def _watch_host(self) -> list[Any]:
        """Hooks that note which modules with weights the host's forward enters."""

        def note(path: str) -> Callable:
            return lambda *_: self._host_entered.add(path)

        modules = self.engine.model.get_submodule
        return [modules(path).register_forward_pre_hook(note(path)) for path in self.engine.owners]

    def _decide(
        self,
        plus: list[float],
        minus: list[float],
        loss_fo: float | None,
        directions: Directions,
        seed: int,
        gradient_weight: float,
    ) -> tuple[dict[str, Any], Pending]:
        """Metrics and writes of a step, from the mean losses over all ranks."""
        config = self.config
        g0 = projected_gradients(plus, minus, config.eps)
        coefficients = directions.coefficients(config.alpha, g0)
        losses = [*plus, *minus, loss_fo or 0.0]
        # Beyond float32 an update would be as good as infinite.
        skipped = not all(abs(x) <= _LARGEST for x in [*losses, *coefficients]) or max(losses) > config.max_loss
        metrics = {
            "step": self.steps + 1,
            "seed": seed,
            "g0": g0,
            "loss_zo": {"plus": plus, "minus": minus} if plus else None,
            "loss_fo": loss_fo,
            "lr": float(self.param_groups[0]["lr"]),
            "skipped": skipped,
        }
        return metrics, Pending(seed, coefficients, gradient_weight, skipped)

    # -- the loops of others --------------------------------------------------------------------

    def probe(self, loss_fn: Callable[[nn.Module], torch.Tensor]) -> dict[str, Any]:
        """The zeroth-order half of a step, for loops that own their forward and backward.

        loss_fn(model) -> float32 [n], per-sample losses of this rank's zeroth-order batch; every
        rank calls it. Then run the first-order forward, the backward of this rank's mean loss
        (gradients are averaged over ranks) and `step()`. Weights are written in that backward, so a
        first-order loss that is not finite is the caller's to notice; `train_step` skips such a step.
        Returns what `train_step` does, without a first-order loss.
        """
        engine, seed = self.engine, step_seed(self.config.seed, self.steps)
        self._check_idle()
        self._updates.begin()
        refuse_reentrant(engine.model)
        engine.before_step()
        self._place(self.queries)
        if self.config.directions != "shared":
            raise UserError("probe() sees no micro-batches: set directions: shared, or call train_step")
        directions = Directions("shared", self.queries, (1,))
        points = self._points(seed, self.queries)
        jobs = [Job(lambda model: per_sample(loss_fn(model)).double().cpu(), point) for point in points]
        try:
            self._begin(jobs, points)
            self._lanes.drive("without a host")
        finally:
            self._lanes.abandon()  # those that a failure has left
        scalars = RankSums(len(jobs), engine.world_size)
        if any(job.error for job in jobs):
            scalars.put_fault(engine.rank)
        else:
            scalars.put([job.result for job in jobs])
        scalars.vector = engine.sum(scalars.vector)
        self._raise_faults(scalars, [job.error for job in jobs])
        if not self._checked:
            engine.check_reached(self._lanes.entered)
            self._checked = True
        means = scalars.means()
        weight = self._own_loop_weight()
        metrics, self._updates.pending = self._decide(means[0::2], means[1::2], None, directions, seed, weight)
        return metrics

    def _own_loop_weight(self) -> float:
        return (1.0 - self.config.alpha) / self.engine.world_size

    def _own_backward(self) -> Pending:
        """What a backward without a probe amounts to: in-place SGD."""
        if self.config.alpha > 0:
            raise RuntimeError("a backward without probe(): call probe() before it, or train_step()")
        self._updates.begin()
        return Pending(step_seed(self.config.seed, self.steps), (), self._own_loop_weight())

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """End of a step begun by `probe` or, with alpha 0, by a backward; without one, nothing.

        Weights that got no gradient receive their zeroth-order part here.
        """
        if closure is not None:
            raise UserError("Addax.step takes no closure: call probe, backward and step, or train_step")
        pending = self._updates.pending
        if pending is None:
            return
        try:
            if self.config.alpha < 1 and not pending.written and not pending.skipped:
                raise UserError(
                    "no gradient reached Addax before step(): run the backward between probe() and step(), "
                    "and leave the engine's gradient synchronisation on"
                )
            self._updates.write_rest()
            self.steps += 1
        finally:
            self._updates.end()
            self.engine.after_step(True)

    # -- everything else ------------------------------------------------------------------------

    def replay(self, steps: list[tuple[int, tuple[float, ...], float]], zo_sizes: tuple[int, ...] = (1,)) -> None:
        """Repeat zeroth-order steps, (seed, g0, lr) each, without their forwards: the same bits.

        For steps of alpha 1 under these hyper-parameters, in order; a skipped one has no g0. zo_sizes:
        samples of their micro-batches, for directions per micro-batch. No collectives: every rank moves
        its own shards. Raises `UserError` with several parameter groups,
        which have learning rates of their own.
        """
        self._check_idle()
        if len(self.param_groups) > 1:
            raise UserError("steps can be repeated with one parameter group: give all parameters one learning rate")
        writes = []
        for seed, g0, lr in steps:
            coefficients = Directions.of_scalars(self.config.directions, g0, zo_sizes).coefficients(
                self.config.alpha, g0
            )
            writes.append((Pending(seed, coefficients, 1.0 - self.config.alpha), lr))
        self._updates.replay([write for write in writes if write[0].coefficients])
        self.steps += len(steps)
        self.engine.after_step(True)

    @property
    def gradients_left_out(self) -> int:
        """Gradient elements that were not finite in the last step, and were taken as zero, in this rank's shards.

        Further replicas of a shard count none, so that ranks add up to the whole.
        """
        return int(self._updates.left_out.item()) if self.engine.is_primary_copy() else 0

    def run_guests(self, runs: list[Callable[[nn.Module], Any]]) -> list[Any]:
        """Forwards of the unperturbed model in evaluation mode, on one gather of every unit.

        Each run is called with the model and returns what to keep. A collective: every rank passes
        one run at least, and each run has as many forwards as any other.
        """
        self._check_idle()
        self.engine.before_step()
        jobs = [Job(run) for run in runs]
        self._lanes.run(jobs)
        raise_first(jobs)
        return [job.result for job in jobs]

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the number of steps taken; the method has no other state."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        state = dict(state_dict)
        self.steps = state.pop("steps", self.steps)
        super().load_state_dict(state)

    def _check_idle(self) -> None:
        if self._updates.pending is not None:
            raise RuntimeError("a step is under way: call step() after the backward that follows probe()")


def _loss_of(loss_fn: LossFunction, batch: Batch) -> Callable[[nn.Module], torch.Tensor]:
    """A guest's run: only its losses are kept, no logits."""
    return lambda model: per_sample(loss_fn(model, batch), batch_size(batch)).double().cpu()
