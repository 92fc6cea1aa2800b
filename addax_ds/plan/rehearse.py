"""A step of the project's own code for a planned layout, without its weights, ranks and data.

The process group is fake and of the real size, tensors are fake, and everything else is what a run
does: wrapping, lanes, hooks, updates. What depends on numbers that are not there (losses, token
ids, agreement between ranks) has stand-ins in `_without_numbers`; kernels, which allocate nothing,
are left out.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.functional import cross_entropy, embedding
from transformers import AutoModelForCausalLM, PretrainedConfig

from addax_ds import baselines, optimizer
from addax_ds.adapters.choose import adapt
from addax_ds.config import RunConfig
from addax_ds.core import kernels, lanes, moved
from addax_ds.core.scalars import Scalars
from addax_ds.core.scratch import Scratch
from addax_ds.engines import fsdp
from addax_ds.engines.base import Engine, ShardedEngine
from addax_ds.errors import UserError
from addax_ds.loss import takes_logits_to_keep
from addax_ds.plan.tracker import Tracker
from addax_ds.training import models
from addax_ds.training.models import build_optimizer, checkpoint_activations
from addax_ds.training.world import World

PARTS = ("weights", "gathered", "perturbed copies", "zeroth-order forwards", "first-order forward", "backward")
"""What bytes are for. "weights" are the shards, with an optimizer's states."""

_FEW_LAYERS = 4, 8
"""Traffic, and memory at one kind of moment, are affine in the number of layers from the first of these on."""


@dataclass(frozen=True)
class Rehearsal:
    """A step as it is for one rank."""

    moments: dict[str, dict[str, float]]
    """By the part that something was allocated for, bytes of all parts when they were most in all then."""
    collectives: dict[str, float]
    """How many of each kind."""
    received: dict[str, float]
    """Bytes that the rank receives, by kind."""
    flops: float
    """Of products of matrices, an addition and a multiplication as two."""

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part when they were most in all."""
        return max(self.moments.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.parts.values())


def rehearse(
    shape: PretrainedConfig, config: RunConfig, ranks: int, long: int, short: int, all_layers: bool = False
) -> Rehearsal:
    """The second step of a run on `ranks` ranks (FSDP2), whose batches are `long` and `short` tokens wide.

    Rehearsed with few layers, and extrapolated, unless with `all_layers`.
    """
    layers = shape.num_hidden_layers
    if all_layers or layers <= _FEW_LAYERS[1]:
        return _rehearse(shape, config, ranks, long, short)
    few, more = (_rehearse(with_layers(shape, n), config, ranks, long, short) for n in _FEW_LAYERS)

    def at_all(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
        slope = {key: (b.get(key, 0) - a.get(key, 0)) / (_FEW_LAYERS[1] - _FEW_LAYERS[0]) for key in {**a, **b}}
        return {key: a.get(key, 0) + rise * (layers - _FEW_LAYERS[0]) for key, rise in slope.items()}

    return Rehearsal(
        # Which moment is the peak may be another one with more layers.
        {moment: at_all(few.moments[moment], more.moments[moment]) for moment in few.moments.keys() & more.moments},
        at_all(few.collectives, more.collectives),
        at_all(few.received, more.received),
        at_all({"": few.flops}, {"": more.flops})[""],
    )


def with_layers(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with another number of blocks."""
    settings = {**shape.to_dict(), "num_hidden_layers": layers}
    settings.pop("layer_types", None)  # one for each layer; made anew
    return type(shape)(**settings)


def _rehearse(shape: PretrainedConfig, config: RunConfig, ranks: int, long: int, short: int) -> Rehearsal:
    if config.engine != "fsdp":
        raise UserError(f"engine {config.engine} cannot be rehearsed yet: set engine: fsdp")
    fake, tracker = FakeTensorMode(), Tracker("weights")
    with _fake_ranks(ranks), _without_numbers(), by_part(tracker, fake), fake, tracker:
        return second_step(shape, config, World(0, 0, ranks, torch.device("cpu")), long, short, tracker)


def second_step(
    shape: PretrainedConfig, config: RunConfig, world: World, long: int, short: int, tracker: Tracker
) -> Rehearsal:
    """What the tracker sees of the second step of a run with random weights."""
    taking = build_optimizer(_model(shape, config), config, world)
    zo = _micro_batches(config.k0, config.zo_micro_batch, long, shape.vocab_size)
    fo = _micro_batches(config.k1, config.fo_micro_batch, short, shape.vocab_size)
    with tracker.within("first-order forward"):
        for _ in range(2):  # the first builds what later steps keep
            gc.collect()  # of the model as it was before its weights were sharded
            tracker.begin()
            taking.train_step(zo, fo, last_token_loss)
    if isinstance(taking, optimizer.Addax):
        taking.detach()
    moments = {moment: {part: float(held[part]) for part in PARTS} for moment, held in tracker.peaks.items()}
    return Rehearsal(moments, {**tracker.collectives}, {**tracker.received}, tracker.flops)


def _model(shape: PretrainedConfig, config: RunConfig) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.weights_dtype))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    return model if config.adapter is None else adapt(model, config.adapter, None, config.seed)


def _micro_batches(samples: int, size: int, tokens: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches as they are where samples differ in length: all with padding, and so with a mask."""
    generator, batches = torch.Generator().manual_seed(0), []
    for first in range(0, samples, size):
        count = min(size, samples - first)
        mask = torch.ones(count, tokens, dtype=torch.int64)
        mask[:, -1] = 0
        ids = torch.randint(vocabulary, (count, tokens), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0]})
    return batches


def last_token_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a token after each sample, as a label word has it: [batch]."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    kept = {"use_cache": False, "logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    return cross_entropy(model(**inputs, **kept).logits[:, -1].float(), batch["labels"], reduction="none")


@contextlib.contextmanager
def _fake_ranks(ranks: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is the first and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a rehearsal has a process group of its own: run it in a process without one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def by_part(tracker: Tracker, *modes: contextlib.AbstractContextManager) -> Iterator[None]:
    """Names for what a step allocates; modes: what guests' threads enter with the tracker, real runs' none."""

    def counted(part: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with tracker.within(part):
                return function(*args, **kwargs)

        return run

    def in_guest(settings: Any, forward: Callable[[], Any]) -> Any:
        with contextlib.ExitStack() as stack:
            for mode in (*modes, tracker, tracker.within("zeroth-order forwards")):
                stack.enter_context(mode)
            return run_guest(settings, forward)

    run_guest = lanes._HostSettings.run
    parts: dict[tuple[Any, str], str] = {
        (Scratch, "_reserve"): "perturbed copies",
        (lanes.Rows, "look_up"): "perturbed copies",
        (moved.Moved, "_memory"): "perturbed copies",
        (FSDPParamGroup, "unshard"): "gathered",
        (FSDPParamGroup, "wait_for_unshard"): "gathered",
        (torch.Tensor, "backward"): "backward",
        (torch.optim.SGD, "step"): "weights",
        (torch.optim.AdamW, "step"): "weights",
    }
    named = [(owner, name, counted(part, getattr(owner, name))) for (owner, name), part in parts.items()]
    with _replaced([*named, (lanes._HostSettings, "run", in_guest)]), tracker.resizes():
        yield


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Stand-ins for what reads numbers."""

    def outside(function: Callable) -> Callable:
        """The function on real tensors: of meshes, which are not part of a step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return run

    def to(module: nn.Module, *where: Any, **wanted: Any) -> nn.Module:
        # All is on one device, and fake parameters cannot be put in place of others.
        return module if where and isinstance(where[0], torch.device | str) else move(module, *where, **wanted)

    move = nn.Module.to
    kernel = SimpleNamespace(perturb=lambda *_: None, perturb_rows=_no_rows, update=lambda *_: None)
    stand_ins: list[tuple[Any, str, Any]] = [
        (optimizer, "Scalars", _Scalars),
        (baselines, "Scalars", _Scalars),
        (optimizer, "fingerprint", lambda _: 0),
        (baselines, "fingerprint", lambda _: 0),
        (optimizer.Addax, "_check_batches_agree", lambda *_: None),
        (Engine, "check_reached", lambda *_: None),
        (Engine, "agree", lambda _, path, failed: (path, failed)),
        (ShardedEngine, "failed_on", lambda *_: []),
        (kernels, "backend", lambda _: kernel),
        (lanes, "Rows", _Rows),
        (fsdp, "_start", outside(fsdp._start)),
        (models, "init_device_mesh", outside(models.init_device_mesh)),
        (torch.nn.utils, "clip_grad_norm_", lambda *_: SimpleNamespace(item=lambda: 1.0)),
        (nn.Module, "to", to),
    ]
    with _replaced(stand_ins):
        yield


@contextlib.contextmanager
def _replaced(attributes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class _Scalars(Scalars):
    """The step's losses: finite ones, whatever was computed."""

    def put_zo(self, *_: Any) -> None:
        pass

    def put_fo(self, *_: Any) -> None:
        pass

    def put_fingerprint(self, *_: Any) -> None:
        pass

    def faults(self) -> list[int]:
        return []

    def check_fingerprints(self) -> None:
        pass

    def zo_means(self) -> tuple[list[float], list[float]]:
        return [1.0] * self._directions.count, [0.5] * self._directions.count

    def fo_mean(self) -> float | None:
        return 1.0 if self.fo_samples else None


def _no_rows(weight: torch.Tensor, rows: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(weight.new_empty(len(rows), *weight.shape[1:]) for _ in range(2))  # type: ignore[return-value]


class _Rows:
    """Rows of an embedding as if no token came twice."""

    def __init__(self, weight: torch.Tensor, *_: Any) -> None:
        self._weight = weight
        self._places = torch.full(weight.shape[:1], -1)
        self._drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def look_up(self, ids: torch.Tensor, sign: int) -> torch.Tensor:
        """See `rows.Rows.look_up`."""
        if self._drawn is None:
            self._drawn = _no_rows(self._weight, ids.view(-1))
        return embedding(self._places[ids] % ids.numel(), self._drawn[sign < 0])
