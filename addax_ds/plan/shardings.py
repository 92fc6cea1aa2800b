"""Ways to shard a model over planned GPUs, as settings of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from addax_ds.config import nearest
from addax_ds.errors import UserError
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.rehearse import with_layers
from addax_ds.shapes import count_of
from addax_ds.training.metrics import write_json

DS_CONFIG = "ds_config.json"

_Make = Callable[[Cluster, PretrainedConfig, Path], dict[str, Any]]


def settings_of(sharding: str, cluster: Cluster, shape: PretrainedConfig, folder: Path) -> dict[str, Any]:
    """The settings; those of DeepSpeed are written to FOLDER/ds_config.json. Raises `UserError` for an unknown name."""
    if sharding not in SHARDINGS:
        raise UserError(f"sharding {sharding}{nearest(sharding, [*SHARDINGS])}")
    return SHARDINGS[sharding](cluster, shape, folder)


def _hsdp(cluster: Cluster, *_: object) -> dict[str, Any]:
    if cluster.nodes == 1:
        raise UserError("hsdp keeps a copy on each node, and there is one: plan fsdp, or more nodes")
    return {"engine": "fsdp", "replicas": cluster.nodes}


def _zero3(shape: PretrainedConfig, folder: Path, **more: Any) -> dict[str, Any]:
    block = count_of(with_layers(shape, 2)) - count_of(with_layers(shape, 1))
    zero = {
        "stage": 3,
        **more,
        # The next block is gathered beside the one that computes, and none is kept for its backward.
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": 0,
    }
    common = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0, "bf16": {"enabled": True}}
    write_json(folder / DS_CONFIG, {**common, "zero_optimization": zero, "optimizer": {"type": "Addax"}})
    return {"engine": "deepspeed", "ds_config": str(folder / DS_CONFIG)}


def offloads(ds_config: str) -> bool:
    """Whether parameters lie on the host."""
    return "offload_param" in json.loads(Path(ds_config).read_text())["zero_optimization"]


SHARDINGS: dict[str, _Make] = {
    "fsdp": lambda *_: {"engine": "fsdp"},
    "hsdp": _hsdp,
    "zero3": lambda _, shape, folder: _zero3(shape, folder),
    "zero3-offload": lambda _, shape, folder: _zero3(
        shape, folder, offload_param={"device": "cpu", "pin_memory": True}
    ),
}
"""FSDP2; the same with a copy on each node; ZeRO-3; the same with parameters in the nodes' own memory."""
