"""Bytes that a rank receives in a step, counted from the collectives, and what a formula says."""

from typing import Any

import torch

from addax_ds.bench.engines import ENGINES, MODEL, on_engine, sharded_engine
from addax_ds.bench.ranks import on_ranks
from addax_ds.bench.table import Bench
from addax_ds.config import RunConfig
from addax_ds.optimizer import Addax
from addax_ds.training.wire import WireCounter
from addax_ds.training.world import World

# Kinds of step, their settings, and the formula: model sizes that go over the wire. Where embedding
# and head are tied, a forward that gathers for itself gathers their weight twice.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "first-order only": ({"alpha": 0.0}, 3),
    "perturb: shard": ({"perturb": "shard"}, 5),
    "lockstep": ({}, 3),
}


def bench_wire(worlds: tuple[int, ...] = (2, 4), model: str = MODEL) -> Bench:
    """A mixed step beside plain first-order training and beside a gather for every forward."""
    bench = Bench("wire", f"MB received per rank and step, {model} in float32, one direction")
    for engine in ENGINES:
        for ranks in worlds:
            counted, model_bytes = on_ranks(count, ranks, engine=engine, model=model)[0]
            plain = sum(counted["first-order only"].values())
            for kind, received in counted.items():
                total = sum(received.values())
                bench.rows.append(
                    {
                        "engine": engine,
                        "ranks": ranks,
                        "step": kind,
                        **{
                            name: received.get(name, 0) / 1e6 for name in ("all_gather", "reduce_scatter", "all_reduce")
                        },
                        "total": total / 1e6,
                        "of first-order": total / plain,
                        "formula": KINDS[kind][1] * model_bytes * (ranks - 1) / ranks / 1e6,
                    }
                )
    return bench


def count(world: World, engine: str, model: str) -> tuple[dict[str, dict[str, int]], int]:
    """Bytes by collective of each kind of step, and the model's size in bytes."""
    held = sharded_engine(world, engine, RunConfig(model=model))
    shards = list(held.shards())
    model_bytes = sum(shard.numel * shard.local.element_size() for shard in shards)
    ids = torch.randint(0, 50, (world.size, 16), generator=torch.Generator().manual_seed(0)).to(held.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    counted = {}
    for kind, (settings, _) in KINDS.items():
        optimizer = on_engine(Addax, held, lr=0.0, **settings)
        optimizer.train_step(batch, batch)  # engines trace or build what they need in their first step
        optimizer.train_step(batch, batch)
        with WireCounter() as wire:
            optimizer.train_step(batch, batch)
        optimizer.detach()
        counted[kind] = dict(wire.received)
    return counted, model_bytes
