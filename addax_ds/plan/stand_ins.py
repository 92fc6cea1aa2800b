"""Stand-ins for what a rehearsal cannot have: other ranks, and numbers.

What depends on numbers that are not there (losses, token ids, agreement between ranks) is stood in
for; kernels, which allocate nothing, are left out.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.functional import embedding

from addax_ds import baselines, loss, optimizer
from addax_ds.core import kernels, lanes
from addax_ds.core.scalars import Scalars
from addax_ds.data.tasks import Example
from addax_ds.engines import fsdp
from addax_ds.engines.base import Engine, ShardedEngine
from addax_ds.errors import UserError
from addax_ds.training import evaluation, models

Replacement = tuple[Any, str, Any]
"""An owner, the name of an attribute of it, and what stands there meanwhile."""


@contextlib.contextmanager
def replaced(attributes: list[Replacement]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
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
def without_numbers(columns: Callable[[int, int], int]) -> Iterator[None]:
    """Stand-ins for what reads numbers. columns: how many places have logits, of a batch's rows and width."""

    def outside(function: Callable) -> Callable:
        """The function on real tensors: of meshes, which are not part of a step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return run

    def target_columns(labels: torch.Tensor) -> torch.Tensor:
        return torch.arange(columns(len(labels), labels.shape[1] + 1))  # they come without the first token's

    def last_columns(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(columns(*mask.shape)), torch.zeros(len(mask), dtype=torch.int64)

    def zeros(engine: Engine, values: torch.Tensor) -> _Zeros:
        add(engine, values)
        return _Zeros(values)

    def to(module: nn.Module, *where: Any, **wanted: Any) -> nn.Module:
        # All is on one device, and fake parameters cannot be put in place of others.
        return module if where and isinstance(where[0], torch.device | str) else move(module, *where, **wanted)

    add, move = Engine.sum, nn.Module.to
    kernel = SimpleNamespace(perturb=lambda *_: None, perturb_rows=_no_rows, update=lambda *_: None)
    stand_ins: list[Replacement] = [
        (optimizer, "Scalars", _Scalars),
        (baselines, "Scalars", _Scalars),
        (optimizer, "fingerprint", lambda _: 0),
        (baselines, "fingerprint", lambda _: 0),
        (loss, "_target_columns", target_columns),
        (loss, "_last_columns", last_columns),
        (optimizer.Addax, "_check_batches_agree", lambda *_: None),
        (evaluation, "_choice_score", _no_scores),
        (evaluation, "_completion_score", _no_scores),
        (Engine, "sum", zeros),
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
    with replaced(stand_ins):
        yield


class _Scalars(Scalars):
    """The step's losses: finite ones, whatever was computed."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._failed: list[int] = []

    def put_zo(self, *_: Any) -> None:
        pass

    def put_fo(self, *_: Any) -> None:
        pass

    def put_fingerprint(self, *_: Any) -> None:
        pass

    def put_fault(self, rank: int) -> None:
        self._failed.append(rank)

    def faults(self) -> list[int]:
        return self._failed

    def check_fingerprints(self) -> None:
        pass

    def zo_means(self) -> tuple[list[float], list[float]]:
        return [1.0] * self._directions.count, [0.5] * self._directions.count

    def fo_mean(self) -> float | None:
        return 1.0 if self.fo_samples else None


class _Zeros:
    """A sum over ranks."""

    def __init__(self, values: torch.Tensor) -> None:
        self._shape = values.shape

    def item(self) -> float:
        return 0.0

    def mean(self, dim: int) -> "_Zeros":
        return self

    def tolist(self) -> list[float]:
        return [0.0] * self._shape[-1]


def _no_scores(_: torch.Tensor, chunk: list[Example], *__: Any) -> torch.Tensor:
    return torch.zeros(len(chunk), 2, dtype=torch.float64)


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
