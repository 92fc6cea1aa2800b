"""One gather for all forwards, or one for each of them: which is faster over which link."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from addax_ds.plan.methods import Steps
from addax_ds.plan.rehearse import Rehearsal
from addax_ds.plan.seconds import estimate

NODE_LINKS = (3200, 800, 400, 100, 25, 10)
"""Gbit/s into a node."""
GPU_LINKS = (900, 450, 300, 64, 32, 16)
"""GB/s into a GPU of one node: NVLink of three generations, and PCIe."""


def about(steps: Steps) -> str:
    """What the table tells."""
    return (
        f"seconds of Addax's step, estimated, by what joins the {'nodes' if _across_nodes(steps) else 'GPUs of a node'}"
    )


def _across_nodes(steps: Steps) -> bool:
    """Whether weights are gathered from other nodes."""
    return steps.cluster.nodes > 1 and int(steps.sharding["replicas"]) == 1


def begin(steps: Steps, lt: int) -> "dict[str, Future[Rehearsal]]":
    """The step with noise on gathered weights, and with noise on shards."""
    return {place: steps.begin("addax", lt, perturb=place) for place in ("gathered", "shard")}


def rows(steps: Steps, lt: int) -> Iterator[dict[str, Any]]:
    """A row a link between nodes, or between the GPUs of one: seconds of Addax's step with one gather of a weight, and
    with one for each forward.

    In lockstep each GPU draws the noise of all weights that pass; with `perturb: shard` each draws that of its
    own shard, and perturbed weights are gathered again for either point.
    """
    ranks = steps.cluster.ranks
    begun = begin(steps, lt)
    field, told, unit, links = "gpu_link", "GB/s into a GPU", 1e9, GPU_LINKS
    if _across_nodes(steps):
        field, told, unit, links = "node_link", "Gbit/s into a node", 1e9 / 8, NODE_LINKS
    own = getattr(steps.cluster.gpu, field) / unit
    for link in sorted({own, *links}, reverse=True):
        gpu = dataclasses.replace(steps.cluster.gpu, **{field: link * unit})
        cluster = dataclasses.replace(steps.cluster, gpu=gpu)
        seconds = {
            place: estimate(future.result(), steps.config("addax", ranks, perturb=place), cluster, steps.weights).step
            for place, future in begun.items()
        }
        yield {
            told: link,
            "one gather for all": seconds["gathered"],
            "a gather for each": seconds["shard"],
            "faster": "perturb: " + min(seconds, key=lambda place: seconds[place]),
        }
