"""The quickstart's model on a sharded engine, for a benchmark's ranks."""

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from addax_ds.config import RunConfig
from addax_ds.engines.base import Engine
from addax_ds.engines.fsdp import shard
from addax_ds.engines.ops import COLLECTIVES, build_op
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from addax_ds.training.models import load_model, locate_model
from addax_ds.training.world import World

MODEL = "smollm2-135m"
ENGINES = ("fsdp", "zero3")
# As it is for models of more than `stage3_max_live_parameters`: nothing stays gathered for the backward.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


def sharded_engine(world: World, name: str, config: RunConfig) -> Engine:
    """The run's model, with its adapters and in its dtype, sharded over all ranks by FSDP2 or ZeRO-3."""
    model = load_model(locate_model(config.model), config)
    if name == "fsdp":
        shard(model, init_device_mesh(world.device.type, (world.size,)))
        optimizer: Any = Addax(model)
    else:
        import deepspeed

        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": ZERO3, "optimizer": {"type": "Addax"}}
        deepspeed.utils.logger.setLevel("WARNING")
        if world.local_rank == 0:
            build_op(COLLECTIVES)
        dist.barrier()
        _, wrapped, _, _ = deepspeed.initialize(model=model, config=settings)
        optimizer = wrapped.optimizer
    engine = optimizer.engine
    optimizer.detach()
    return engine


def check(engine: str, ranks: int, config: RunConfig) -> None:
    """Raises `UserError` for an unknown engine, and unless every rank gets as many micro-batches."""
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: give one of {', '.join(ENGINES)}")
    for size, micro_batch in ((config.k0, config.zo_micro_batch), (config.k1, config.fo_micro_batch)):
        if ranks < 1 or size % (micro_batch * ranks):
            raise UserError(f"{ranks} ranks cannot share {size // micro_batch} micro-batches evenly: give a divisor")


def on_engine(kind: type[Addax], engine: Engine, **hyperparameters: Any) -> Addax:
    """An optimizer of class `kind` on an engine that no other holds."""
    optimizer = kind(list(engine.model.parameters()), **hyperparameters)
    optimizer.attach(engine)
    return optimizer
