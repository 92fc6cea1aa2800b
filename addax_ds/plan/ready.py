"""A planned run as files: settings, hosts, and how they are started."""

import shlex
from pathlib import Path

import yaml

from addax_ds.config import RunConfig, values_of
from addax_ds.plan.cluster import Cluster
from addax_ds.training.metrics import write_whole

RUN, HOSTS = "run.yaml", "hostfile"


def write(config: RunConfig, about: str, cluster: Cluster, folder: Path) -> list[str]:
    """Write FOLDER/run.yaml, which loads as `config`, and FOLDER/hostfile; the commands that start it."""
    names = [f"node-{node}" for node in range(cluster.nodes)]
    write_whole(folder / HOSTS, "".join(f"{name} slots={cluster.gpus_per_node}\n" for name in names).encode())
    run, hosts = (shlex.quote(str(folder / name)) for name in (RUN, HOSTS))
    each = f"NODES={cluster.nodes} GPUS_PER_NODE={cluster.gpus_per_node}"
    slurm = f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node}"
    commands = [
        f"HEAD={names[0]} {each} bash launch/torchrun.sh {run} output=/shared/run    # on each node",
        f"HOSTFILE={hosts} bash launch/deepspeed.sh {run} output=/shared/run    # over ssh",
        f"sbatch {slurm} launch/torchrun.sbatch {run} output=/shared/run    # under Slurm",
    ]
    head = "".join(f"# {line}\n" for line in [*about.splitlines(), *commands])
    write_whole(folder / RUN, (head + yaml.safe_dump(values_of(config), sort_keys=False)).encode())
    return commands
