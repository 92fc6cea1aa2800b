"""Weights that are not finite: nothing is scored, saved or exported with them."""

from collections.abc import Iterable

import torch

from addax_ds.config import RunConfig
from addax_ds.core.shard import Shard
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError


def not_finite(engine: Engine, shards: Iterable[Shard]) -> str:
    """The first parameter of which any rank has a weight that is not finite; empty without one (a collective)."""
    spoilt = {shard.name: float(not shard.local.isfinite().all()) for shard in shards}
    totals = engine.sum(torch.tensor(list(spoilt.values()), dtype=torch.float64)).tolist()
    return next((name for name, total in zip(spoilt, totals, strict=True) if total), "")


def check_model(engine: Engine, config: RunConfig) -> None:
    """Raises `UserError` where the model that a run begins with has such a weight (a collective)."""
    if name := not_finite(engine, engine.shards()):
        raise UserError(f"model {config.model}: {name} has weights that are not finite: mend them or choose another")


def check_result(engine: Engine, steps: int) -> None:
    """Raises `UserError` where the steps have left such a weight behind (a collective)."""
    if name := not_finite(engine, engine.shards()):
        raise UserError(
            f"{name} has weights that are not finite after step {steps}: lower lr; nothing is scored or exported, and "
            "checkpoints are as they were"
        )
