"""Seconds per step, beside the floor of the same forwards and backward and beside the textbook's step."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch

from addax_ds.bench.engines import MODEL, check, on_engine, sharded_engine
from addax_ds.bench.link import linked
from addax_ds.bench.ranks import on_ranks
from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig
from addax_ds.core import kernels
from addax_ds.core.guest import Job
from addax_ds.core.plain import Perturbation
from addax_ds.core.scalars import projected_gradients
from addax_ds.data.partition import partition
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError
from addax_ds.loss import choice_loss
from addax_ds.micro_batches import Batch
from addax_ds.optimizer import Addax
from addax_ds.training.models import accepted
from addax_ds.training.run import prepare_inputs, step_batches, step_samples
from addax_ds.training.world import World

# The quickstart's batches.
CONFIG = RunConfig(model=MODEL, train_samples=8000, k0=6, k1=16, zo_micro_batch=3, fo_micro_batch=8)

_STEPS = 2  # timed steps of a kind in its turn


class Floor(Addax):
    """The same forwards and backward on the same engine, with neither perturbation nor update."""

    def _point(self, seed: int, query: int, sign: int) -> Perturbation:
        return Perturbation()

    def attach(self, engine: Engine) -> None:
        super().attach(engine)
        vars(self._updates)["_write"] = lambda name, gradient, pending: pending.written.add(name)


class Copies(Addax):
    """The floor, but that guests read copies of every weight, as W + eps z and W - eps z are: traffic without noise."""

    def train_step(self, *arguments: Any) -> dict[str, Any]:
        with mock.patch.multiple(
            kernels.backend(self.engine.device.type),
            perturb=lambda weight, _, plus, minus, *__: [s.copy_(weight) for s in (plus, minus) if s is not None],
            perturb_rows=lambda weight, rows, *_: (weight[rows], weight[rows]),
            update=lambda *_: None,
        ):
            return super().train_step(*arguments)


class OneAfterTheOther(Addax):
    """The same lanes, each with gathers of its own; every rank must have as many micro-batches."""

    def _begin(self, jobs: list[Job], points: list[Perturbation]) -> None:
        for job in jobs:
            self._lanes.run([job], alike="one after the other")


class Textbook:
    """A step without this package: noise from torch's generator, drawn tensor by tensor.

    It is added in place three times and once more for the update, which is in-place SGD otherwise.

    Every rank moves its own shards. A sequential generator gives a parameter the same z on every
    number of ranks only if each rank draws all of it; with `local_noise` a rank draws as much as it
    holds, and z depends on the sharding.
    """

    def __init__(self, engine: Engine, lr: float, alpha: float, eps: float, local_noise: bool) -> None:
        self.engine, self.lr, self.alpha, self.eps, self.local_noise = engine, lr, alpha, eps, local_noise
        parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        self.names = list(parameters)
        self.steps = 0
        engine.attach(parameters, lambda: None, self._on_gradient)

    def train_step(self, zo: list[Batch], fo: list[Batch], loss_fn: Callable) -> None:
        """One step; ranks take micro-batches in turn, as many for each."""
        engine = self.engine
        engine.model.eval()
        losses = []
        for move in (1.0, -2.0):
            self._add_noise(move * self.eps)
            with torch.no_grad():
                mine = [loss_fn(engine.model, batch).sum() for batch in zo[engine.rank :: engine.world_size]]
            engine.after_step(False)
            losses.append(engine.sum(torch.stack(mine).sum().double().cpu().view(1)).item())
        self._add_noise(self.eps)
        samples = sum(len(batch["input_ids"]) for batch in zo)
        (g0,) = projected_gradients([losses[0] / samples], [losses[1] / samples], self.eps)
        count = sum(len(batch["input_ids"]) for batch in fo)
        for batch in fo[engine.rank :: engine.world_size]:
            (loss_fn(engine.model, batch).sum() / count).backward()
        engine.after_step(True)
        self._add_noise(-self.lr * self.alpha * g0)
        self.steps += 1

    @torch.no_grad()
    def _add_noise(self, scale: float) -> None:
        own = self.engine.rank << 32 if self.local_noise else 0
        generator = torch.Generator(self.engine.device).manual_seed(self.steps + own)
        for name in self.names:
            shard = self.engine.shard(name)
            local, start = shard.local, 0 if self.local_noise else shard.start
            numel = len(local) if self.local_noise else shard.numel
            noise = torch.randn(numel, generator=generator, device=local.device, dtype=local.dtype)
            local.add_(noise[start : start + len(local)], alpha=scale)

    @torch.no_grad()
    def _on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        self.engine.shard(name).local.add_(gradient, alpha=-self.lr * (1.0 - self.alpha))

    def detach(self) -> None:
        """Remove the hooks."""
        self.engine.detach()


def bench_step(
    engine: str = "fsdp", ranks: int = 2, rounds: int = 4, config: RunConfig = CONFIG, gigabits: float | None = None
) -> Bench:
    """Seconds of a step of each kind, normal noise unless named otherwise; the kinds take turns.

    Each kind takes the same steps in every round, and of each step its fastest time counts: what else a
    machine does can only slow it. gigabits: speed per second of the link between two ranks; None is this machine's own.
    """
    check(engine, ranks, config)
    if gigabits is not None and ranks != 2:
        raise UserError(f"a slowed link joins 2 ranks, not {ranks}: set --ranks 2")
    if gigabits is not None and torch.cuda.is_available():
        raise UserError("GPUs of one machine do not use its network: hide them (CUDA_VISIBLE_DEVICES=)")
    prepare_inputs(config)  # fetched here, since hosts on a slowed link reach nothing else
    link = "" if gigabits is None else f", joined at {gigabits:g} Gbit/s"
    bench = Bench("step", f"seconds per step, {config.model} on {config.data}, {engine}, {ranks} ranks{link}")
    with contextlib.nullcontext(()) if gigabits is None else linked(gigabits) as hosts:
        arguments: dict[str, Any] = {"engine": engine, "rounds": rounds, "config": config}
        seconds = on_ranks(time_steps, ranks, seconds=3600.0, hosts=hosts, **arguments)[0]
    for kind, (mean, perturbing, updating) in seconds.items():
        row = {
            "step": kind,
            "seconds": mean,
            "of the floor": mean / seconds["floor"][0],
            "textbook / this": seconds["textbook"][0] / mean,
            "lane after lane / this": seconds["lane after lane"][0] / mean,
        }
        if not torch.cuda.is_available():  # where kernels run beside the thread that starts them
            row |= {"perturbing": perturbing, "updating": updating}
        bench.rows.append(row)
    return bench


@contextlib.contextmanager
def kernel_seconds(device: torch.device) -> Iterator[list[float]]:
    """Seconds that this process spends perturbing and updating within the context."""
    backend, seconds = kernels.backend(device.type), [0.0, 0.0]

    def timed(place: int, kernel: Callable) -> Callable:
        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = kernel(*arguments)
            seconds[place] += time.perf_counter() - begun
            return result

        return run

    kinds = {"perturb": 0, "perturb_rows": 0, "update": 1}
    timers: dict[str, Any] = {name: timed(place, getattr(backend, name)) for name, place in kinds.items()}
    with mock.patch.multiple(backend, **timers):
        yield seconds


def time_steps(world: World, engine: str, rounds: int, config: RunConfig) -> dict[str, list[float]]:
    """Mean seconds of the same `_STEPS` steps, each at its fastest, and those spent perturbing and updating."""
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    held = sharded_engine(world, engine, config)
    hyper = {"lr": 1e-5, "zo_micro_batch": config.zo_micro_batch, "fo_micro_batch": config.fo_micro_batch}
    kinds: dict[str, Callable[[], Any]] = {
        "floor": lambda: on_engine(Floor, held, **hyper),
        "floor, weights copied": lambda: on_engine(Copies, held, **hyper),
        "addax, rademacher": lambda: on_engine(Addax, held, distribution="rademacher", **hyper),
        "addax, normal": lambda: on_engine(Addax, held, **hyper),
        "lane after lane": lambda: on_engine(OneAfterTheOther, held, **hyper),
        "textbook": lambda: Textbook(held, lr=1e-5, alpha=1e-3, eps=1e-3, local_noise=False),
        "textbook, z by shard": lambda: Textbook(held, lr=1e-5, alpha=1e-3, eps=1e-3, local_noise=True),
    }
    batches = [
        step_batches(config, prepared, step_samples(config, pools, step), accepted(held.model), held.device)
        for step in range(_STEPS)
    ]
    fastest: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, build in kinds.items():
            optimizer = build()
            optimizer.train_step(*batches[0], choice_loss)  # also builds what later steps keep
            times = [time_step(held.device, partial(optimizer.train_step, *batch, choice_loss)) for batch in batches]
            fastest[kind] = [min(pair) for pair in zip(times, fastest[kind] or times, strict=True)]
            optimizer.detach()
    return {kind: [statistics.fmean(column) for column in zip(*times, strict=True)] for kind, times in fastest.items()}


def time_step(device: torch.device, step: Callable[[], Any]) -> list[float]:
    """Seconds of one step of all ranks, and those that this one spends perturbing and updating."""
    torch.distributed.barrier()
    begun = time.perf_counter()
    with kernel_seconds(device) as inside:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        torch.distributed.barrier()
    return [time.perf_counter() - begun, *inside]
