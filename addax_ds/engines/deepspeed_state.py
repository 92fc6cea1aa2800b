"""Weights in the form in which DeepSpeed's `save_checkpoint` and `zero_to_fp32` keep them.

They take an optimizer's float32 copies for the weights. Addax has none: the shards themselves are
handed over, as float32.
"""

from typing import Any

import torch
from deepspeed.checkpoint import constants
from torch import nn


def flat_groups(parameters: list[nn.Parameter], stage: int, rank: int, ranks: int) -> dict[str, Any]:
    """What a ZeRO optimizer of this stage adds to its state for these parameters, in their order."""
    if stage == 3:
        parts: list[Any] = [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]
        return _state(constants.FP32_FLAT_GROUPS, torch.cat([_float(part) for part in parts]), stage, ranks)
    total = sum(parameter.numel() for parameter in parameters)
    size = -(-total // (2 * ranks)) * 2  # as DeepSpeed aligns it
    begin, end = rank * size, (rank + 1) * size
    part, at = torch.zeros(size), 0
    for parameter in parameters:
        first, last = max(begin, at), min(end, at + parameter.numel())
        if first < last:
            part[first - begin : last - begin] = parameter.data.view(-1)[first - at : last - at]
        at += parameter.numel()
    return _state(constants.SINGLE_PARTITION_OF_FP32_GROUPS, part, stage, ranks)


def load_flat_groups(parameters: list[nn.Parameter], state: dict[str, Any]) -> None:
    """Copy what `flat_groups` gave for ZeRO-3 into the shards; at other stages the module holds the weights."""
    (part,), at = state[constants.FP32_FLAT_GROUPS], 0
    for parameter in parameters:
        shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        shard.data.view(-1).copy_(part[at : at + shard.ds_numel])
        at += shard.ds_numel


def _float(shard: Any) -> torch.Tensor:
    return shard.data.view(-1)[: shard.ds_numel].float().cpu()


def _state(key: str, part: torch.Tensor, stage: int, ranks: int) -> dict[str, Any]:
    return {constants.ZERO_STAGE: stage, constants.PARTITION_COUNT: ranks, key: [part]}
