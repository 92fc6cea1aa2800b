"""DeepSpeed's part of a rehearsal: what its functions allocate for, and stand-ins for what it asks of ranks.

Names of its internals were checked against version 0.19.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.ops.adam import fused_adam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3, utils
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from torch.nn import functional

from addax_ds.config import BASELINES, RunConfig
from addax_ds.core.moved import LINEAR
from addax_ds.engines.zero3 import Zero3
from addax_ds.errors import UserError
from addax_ds.plan.stand_ins import Replacement, replaced
from addax_ds.plan.tracker import HOST, Tracker
from addax_ds.training import models

PARTS: dict[tuple[Any, str], str] = {
    (PartitionedParameterCoordinator, "fetch_sub_module"): "gathered",
    (Zero3, "prefetch"): "gathered",
    (Zero3, "_wait"): "gathered",
    (Zero3, "_reduce_scatter"): "reduced gradients",
    (stage3.DeepSpeedZeroOptimizer_Stage3, "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"): (
        "reduced gradients"
    ),
    (stage3.DeepSpeedZeroOptimizer_Stage3, "step"): "weights",
}
"""By owner and name of a function, what it allocates for."""


def on_host(tracker: Tracker) -> list[Replacement]:
    """Has the tracker know shards that are offloaded, copies that hpZ keeps beside shards, and what the optimizer keeps
    for gradients."""

    def partition_param(init: Any, parameter: Any, *args: Any, **kwargs: Any) -> None:
        is_new = parameter.ds_tensor is None
        partition(init, parameter, *args, **kwargs)
        # Those that persist are on the GPU.
        if is_new and init.remote_device == OffloadDeviceEnum.cpu and not parameter.ds_persist:
            tracker.move(parameter.ds_tensor, HOST)

    def keep_copy(init: Any, *args: Any, **kwargs: Any) -> None:
        with tracker.within(HOST if init.remote_device == OffloadDeviceEnum.cpu else "weights"):
            partition_secondary(init, *args, **kwargs)

    def set_up(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        run_set_up(optimizer, *args, **kwargs)
        buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values()]
        for buffer in [*buckets, optimizer.grad_partitions_flat_buffer]:
            if buffer is not None:
                tracker.move(buffer, "reduced gradients")

    run_set_up = stage3.DeepSpeedZeroOptimizer_Stage3._setup_for_real_optimizer
    partition, partition_secondary = Init._partition_param, Init._partition_param_sec
    return [
        (Init, "_partition_param", partition_param),
        (Init, "_partition_param_sec", keep_copy),
        (stage3.DeepSpeedZeroOptimizer_Stage3, "_setup_for_real_optimizer", set_up),
    ]


def refuse(config: RunConfig) -> None:
    """Raise `UserError` for settings of DeepSpeed that are not rehearsed."""
    zero = _zero_settings(config)
    if zero.stage != 3:
        raise UserError(f"ZeRO stage {int(zero.stage)} cannot be rehearsed: set zero_optimization.stage to 3")
    offloads = any(part is not None and part.device != "none" for part in (zero.offload_param, zero.offload_optimizer))
    if config.method in BASELINES and offloads:
        raise UserError(f"method {config.method} of DeepSpeed cannot be rehearsed with offloading: remove it")


def horizon(config: RunConfig) -> float:
    """Elements over which DeepSpeed looks ahead, or holds on: weights further apart do not tell on each other."""
    zero = _zero_settings(config)
    updated_at_once = zero.sub_group_size if config.method in BASELINES and config.adapter is None else 0
    # What it gathers ahead is live, too.
    return zero.max_live_parameters + zero.max_reuse_distance + updated_at_once


def kept(config: RunConfig, sizes: Iterable[int]) -> int:
    """Elements at most that DeepSpeed keeps gathered from one use to the next: the smallest of these weights, and what
    its bounds let live."""
    zero = _zero_settings(config)
    small = sum(size for size in sizes if size <= zero.param_persistence_threshold)
    return small + zero.max_live_parameters + zero.max_reuse_distance


def _zero_settings(config: RunConfig) -> DeepSpeedZeroConfig:
    settings = models.read_ds_config(config).get("zero_optimization", {})
    try:
        return DeepSpeedZeroConfig(**settings)
    except ValueError as error:
        raise UserError(f"ds_config {config.ds_config}: DeepSpeed does not take it: {error}") from None


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    """DeepSpeed as in a process that has not used it, with stand-ins for what reads numbers."""
    stand_ins: list[Replacement] = [
        # What it keeps in a process for good.
        (comm, "cdb", None),
        (groups, "_WORLD_GROUP", None),
        (groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None),
        (Init, "num_persisted_parameters", 0),
        (Init, "num_persisted_elements", 0),
        (functional, "linear", LINEAR),
        # Fake tensors are on the CPU, whatever there is; ops that it would compile are not run.
        (real_accelerator, "ds_accelerator", CPU_Accelerator()),
        (CPU_Accelerator, "create_op_builder", lambda *_: None),
        (fused_adam, "FusedAdamBuilder", mock.MagicMock()),
        (fused_adam, "multi_tensor_applier", lambda *_: None),
        (utils, "get_lst_from_rank0", lambda numbers: numbers),  # to be compared with, in a second step alone
        (stage3, "is_invalid_grad_norm", lambda _: False),
        (DeepSpeedEngine, "get_global_grad_norm", lambda _: 1.0),
    ]
    with replaced(stand_ins), mock.patch.dict(os.environ, LOCAL_RANK="0"):
        yield
