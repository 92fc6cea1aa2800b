"""What FSDP2's functions allocate for, and where its shards lie."""

from typing import Any

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from addax_ds.plan.stand_ins import Replacement
from addax_ds.plan.tracker import HOST, Tracker


def parts(offload: bool) -> dict[tuple[Any, str], str]:
    """By owner and name of a function, what it allocates for."""
    states = HOST if offload else "weights"
    return {
        (FSDPParamGroup, "unshard"): "gathered",
        (FSDPParamGroup, "wait_for_unshard"): "gathered",
        (_fsdp_param_group, "foreach_reduce"): "reduced gradients",
        (torch.optim.SGD, "step"): states,
        (torch.optim.AdamW, "step"): states,
    }


def on_host(tracker: Tracker) -> list[Replacement]:
    """Has the tracker know offloaded shards, and copies of reduced gradients to where they lie."""

    def init(parameter: Any, *args: Any, **kwargs: Any) -> None:
        init_sharded(parameter, *args, **kwargs)
        if parameter.offload_to_cpu:
            tracker.move(parameter._sharded_param_data, HOST)

    def to_dtensor(parameter: Any, tensor: torch.Tensor) -> Any:
        if parameter.offload_to_cpu and hasattr(parameter, "sharded_param"):  # else it is the shard itself
            with tracker.within(HOST):
                tensor = tensor.clone()
        return to_sharded_dtensor(parameter, tensor)

    init_sharded, to_sharded_dtensor = FSDPParam._init_sharded_param, FSDPParam.to_sharded_dtensor
    return [(FSDPParam, "_init_sharded_param", init), (FSDPParam, "to_sharded_dtensor", to_dtensor)]
