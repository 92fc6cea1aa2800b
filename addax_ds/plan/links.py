"""One gather for all forwards, or one for each of them: which is faster over which link."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from addax_ds.plan.methods import Steps
from addax_ds.plan.seconds import estimate

LINKS = (3200, 800, 400, 100, 25, 10)
"""Gbit/s into a node."""


def rows(steps: Steps, lt: int) -> Iterator[dict[str, Any]]:
    """A row a link between nodes: seconds of Addax's step with one gather of a weight, and with one for each forward.

    In lockstep each GPU draws the noise of all weights that pass; with `perturb: shard` each draws that of its
    own shard, and perturbed weights are gathered again for either point.
    """
    ranks = steps.cluster.ranks
    begun = {place: steps.begin("addax", lt, perturb=place) for place in ("gathered", "shard")}
    own = steps.cluster.gpu.node_link * 8e-9
    for link in sorted({own, *LINKS}, reverse=True):
        gpu = dataclasses.replace(steps.cluster.gpu, node_link=link / 8e-9)
        cluster = dataclasses.replace(steps.cluster, gpu=gpu)
        seconds = {
            place: estimate(future.result(), steps.config("addax", ranks, perturb=place), cluster, steps.weights).step
            for place, future in begun.items()
        }
        yield {
            "Gbit/s into a node": link,
            "one gather for all": seconds["gathered"],
            "a gather for each": seconds["shard"],
            "faster": "perturb: " + min(seconds, key=lambda place: seconds[place]),
        }
