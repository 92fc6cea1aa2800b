"""Seconds of a step, estimated from what a rehearsal counted and from what datasheets promise."""

from dataclasses import dataclass

from addax_ds.config import RunConfig
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.rehearse import Rehearsal

COMPUTED = 0.4
"""Share of a GPU's products per second that large models reach: assumed, as training runs report 30 to 50 %."""
CARRIED = 0.8
"""Share of a link's bytes per second that collectives reach: assumed."""
DRAWN = {"normal": 0.42, "rademacher": 0.72}
"""Perturbed copies per second, of plain copies: `addax-ds bench noise` on an H200, bfloat16."""
UPDATED = {"normal": 0.30, "rademacher": 0.41}
"""Updates per second, of additions of a constant, in the same way."""


@dataclass(frozen=True)
class Seconds:
    """Parts of a step that run beside each other as far as they can."""

    computing: float
    """Products of matrices."""
    perturbing: float
    """Both points of every weight, and the update of the shard, written on the same GPU."""
    receiving: float
    """Collectives."""

    @property
    def step(self) -> float:
        """Weights are gathered while others are computed with, so that the slower of the two counts."""
        return max(self.computing + self.perturbing, self.receiving)


def estimate(step: Rehearsal, config: RunConfig, cluster: Cluster, weights: float) -> Seconds:
    """weights: bytes of the whole model. Launches of kernels, which bound models of few billions, are left out."""
    gpu = cluster.gpu
    drawn = updated = 0.0
    if config.alpha > 0 and config.adapter is None:
        # For both points each GPU draws for all that it gathers, or for its own shard, and in the update for its shard.
        shards = cluster.ranks // config.replicas
        updated = config.queries * weights / shards
        drawn = 2 * (updated if config.perturb == "shard" else config.queries * weights)
    copied = gpu.bandwidth / 2  # a byte is read and written
    return Seconds(
        step.flops / ((gpu.float32_flops if config.dtype == "float32" else gpu.flops) * COMPUTED),
        (drawn / DRAWN[config.distribution] + updated / UPDATED[config.distribution]) / copied,
        sum(size / (_speed(kind, config, cluster) * CARRIED) for kind, size in step.received.items()),
    )


def _speed(kind: str, config: RunConfig, cluster: Cluster) -> float:
    """Bytes per second that a GPU receives in a ring, which enters each node once and passes all its GPUs."""
    gpu = cluster.gpu
    if cluster.nodes == 1:
        return gpu.gpu_link
    if config.replicas == 1:
        return min(gpu.gpu_link, gpu.node_link)
    # HSDP: copies lie on nodes of their own, and each GPU sums its shard with those of other nodes.
    return gpu.node_link / cluster.gpus_per_node if kind == "all_reduce" else gpu.gpu_link
