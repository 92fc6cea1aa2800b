"""Which engine serves a model."""

import importlib.util

from torch import nn
from torch.distributed.tensor import DTensor

from addax_ds.core.skeleton import strip
from addax_ds.engines.base import Engine
from addax_ds.engines.fsdp import FSDP, refuse_fsdp1, skeleton_of
from addax_ds.engines.replicated import Replicated
from addax_ds.errors import UserError


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


def register_with_deepspeed(addax: type) -> None:
    """Have DeepSpeed, where it is installed, build its engines around optimizers of class `addax`."""
    if importlib.util.find_spec("deepspeed") is not None:
        from addax_ds.engines import deepspeed_plugin

        deepspeed_plugin.register(addax)
