"""A planned run as files: settings, hosts, and how they are started."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from addax_ds.config import RunConfig
from addax_ds.plan.cluster import Cluster
from addax_ds.training.metrics import write_whole

RUN, HOSTS = "run.yaml", "hostfile"


def write(config: RunConfig, about: str, cluster: Cluster, folder: Path) -> list[str]:
    """Write FOLDER/run.yaml, which loads as `config`, and FOLDER/hostfile; the commands that start it."""
    hosts = "".join(f"node-{node} slots={cluster.gpus_per_node}\n" for node in range(cluster.nodes))
    write_whole(folder / HOSTS, hosts.encode())
    run, layout = folder / RUN, f"NODES={cluster.nodes} GPUS_PER_NODE={cluster.gpus_per_node}"
    slurm = f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node}"
    commands = [
        f"HEAD=node-0 {layout} bash launch/torchrun.sh {run} output=/shared/run    # on each node",
        f"HOSTFILE={folder / HOSTS} bash launch/deepspeed.sh {run} output=/shared/run    # over ssh",
        f"sbatch {slurm} launch/torchrun.sbatch {run} output=/shared/run    # under Slurm",
    ]
    head = "".join(f"# {line}\n" for line in [*about.splitlines(), *commands])
    write_whole(run, (head + yaml.safe_dump(_told(config), sort_keys=False)).encode())
    return commands


def _told(config: RunConfig) -> dict[str, Any]:
    """The settings that are not as they are by default, as plain values."""
    usual = RunConfig()
    differing = [
        field.name for field in dataclasses.fields(config) if getattr(config, field.name) != getattr(usual, field.name)
    ]
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value := values[name], tuple) else value for name in differing}
