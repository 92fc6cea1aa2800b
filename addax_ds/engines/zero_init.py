"""ZeRO-3's partition of a model before `deepspeed.initialize`, one parameter at a time.

DeepSpeed itself partitions a model that is whole on every rank. Names of its internals were checked
against version 0.19.
"""

from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from addax_ds.core.hollow import give_memory
from addax_ds.errors import UserError


def partition(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Split each parameter as DeepSpeed does, hollow ones too, of which no rank holds two whole (a collective)."""
    size = ds_config["zero_optimization"].get("zero_hpz_partition_size", 1)
    init = deepspeed.zero.Init(
        module=nn.Module(),  # with one it sets its linear function, too, as it does for a whole model
        config_dict_or_path=ds_config,
        dtype=next(model.parameters()).dtype,
        zero_param_parallel_group=hpz_group(size, dist.get_world_size()),
    )
    for parameter in model.parameters():
        give_memory([parameter], init.local_device)
        init._convert_to_zero_parameters([parameter])
    for buffer in model.buffers():  # DeepSpeed leaves a partitioned model where it is
        buffer.data = buffer.data.to(init.local_device)


def hpz_group(size: int, ranks: int) -> Any:
    """The ranks that hold a secondary copy together, with `zero_hpz_partition_size`; else None.

    DeepSpeed keeps one such group a process, for good.
    """
    if size <= 1:
        return None
    size = min(size, ranks)
    if ranks % size:
        raise UserError(f"zero_optimization.zero_hpz_partition_size is {size}: give a divisor of the {ranks} ranks")
    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    group = groups._get_zero_param_intra_parallel_group()
    if dist.get_world_size(group) != size:
        raise UserError(
            f"zero_hpz_partition_size {size}: this process has partitions of {dist.get_world_size(group)} ranks "
            "already: keep one size a process"
        )
    return group
