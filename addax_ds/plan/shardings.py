"""Ways to shard a model over planned GPUs, as settings of a run."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from addax_ds.config import nearest
from addax_ds.errors import UserError
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.rehearse import with_layers
from addax_ds.shapes import count_of
from addax_ds.training.metrics import write_json

SHARDINGS = ("fsdp", "hsdp", "fsdp-offload", "zero3", "zero3-offload")
"""FSDP2; the same with a copy on each node, or with shards in the nodes' own memory; ZeRO-3; the same with parameters
there."""

DS_CONFIG = "ds_config.json"


def settings_of(sharding: str, cluster: Cluster, shape: PretrainedConfig, dtype: str, folder: Path) -> dict[str, Any]:
    """The settings; those of DeepSpeed are written to FOLDER/ds_config.json. Raises `UserError` for an unknown name."""
    if sharding not in SHARDINGS:
        raise UserError(f"sharding {sharding}{nearest(sharding, [*SHARDINGS])}")
    if sharding == "hsdp" and cluster.nodes == 1:
        raise UserError("hsdp keeps a copy on each node, and there is one: plan fsdp, or more nodes")
    if sharding in ("fsdp", "hsdp", "fsdp-offload"):
        replicas = cluster.nodes if sharding == "hsdp" else 1
        return {"engine": "fsdp", "ds_config": None, "replicas": replicas, "offload": sharding == "fsdp-offload"}
    zero = _zero3(shape, dtype)
    if sharding == "zero3-offload":
        zero["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    write_json(folder / DS_CONFIG, zero)
    return {"engine": "deepspeed", "ds_config": str(folder / DS_CONFIG), "replicas": 1, "offload": False}


def _zero3(shape: PretrainedConfig, dtype: str) -> dict[str, Any]:
    block = count_of(with_layers(shape, 2)) - count_of(with_layers(shape, 1))
    zero = {
        "stage": 3,
        # The next block is gathered beside the one that computes, and none is kept for its backward.
        "stage3_prefetch_bucket_size": block,
        "stage3_max_live_parameters": 2 * block,
        "stage3_max_reuse_distance": 0,
    }
    common = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0, "bf16": {"enabled": dtype == "bfloat16"}}
    return {**common, "zero_optimization": zero, "optimizer": {"type": "Addax"}}
