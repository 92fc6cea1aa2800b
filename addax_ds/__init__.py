"""Addax for sharded models: zeroth-order and first-order gradients mixed in every step.

engine, optimizer, _, _ = deepspeed.initialize(model=model, config="ds_configs/zero3.json")
metrics = optimizer.train_step(zo_batch, fo_batch)

addax_ds.shard(model, mesh)
optimizer = addax_ds.Addax(model, lr=1e-3, alpha=1e-3, eps=1e-3)
metrics = optimizer.train_step(zo_batch, fo_batch)
"""

import torch

from addax_ds.config import AddaxConfig, RunConfig, TaskConfig
from addax_ds.core.kernels import noise
from addax_ds.engines.fsdp import shard
from addax_ds.errors import UserError
from addax_ds.loss import token_loss
from addax_ds.optimizer import Addax

__version__ = "0.1.0"
__all__ = ["Addax", "AddaxConfig", "RunConfig", "TaskConfig", "UserError", "noise", "shard", "token_loss"]

# DeepSpeed resolves an optimizer's name in a ds_config through torch.optim.
torch.optim.Addax = Addax  # type: ignore[attr-defined]
