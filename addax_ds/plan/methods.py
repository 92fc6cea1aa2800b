"""Methods side by side on planned GPUs."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from transformers import PretrainedConfig

from addax_ds.config import BASELINES, RunConfig, build, require
from addax_ds.plan.choose import Batch
from addax_ds.plan.cluster import Cluster
from addax_ds.plan.memory import Curve
from addax_ds.plan.parts import PARTS
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.rehearse import Rehearsal
from addax_ds.plan.seconds import estimate
from addax_ds.plan.shardings import offloads
from addax_ds.shapes import count_of

METHODS: dict[str, dict[str, Any]] = {
    "addax": {"method": "addax", "alpha": 1e-3},
    "mezo": {"method": "mezo"},
    "adazeta": {"method": "adazeta"},
    "ip-sgd": {"method": "ip-sgd"},
    "sgd": {"method": "sgd"},
    "adamw": {"method": "adamw"},
    "lora, adamw": {"method": "adamw", "adapter": {"kind": "lora"}},
}
"""What is planned side by side: a method and its settings."""

_MOST_NODES = 128


@dataclass(frozen=True)
class Steps:
    """Steps of a model on planned GPUs, with samples of at most `long` tokens."""

    shape: PretrainedConfig
    rehearsals: Rehearsals
    cluster: Cluster
    sharding: dict[str, Any]
    """Settings of the engine."""
    batch: Batch
    long: int

    @property
    def methods(self) -> list[str]:
        """Those that can be rehearsed: not DeepSpeed's optimizers with offloaded parameters."""
        others = self.sharding["engine"] != "deepspeed" or not offloads(self.sharding["ds_config"])
        return [name for name, settings in METHODS.items() if others or settings["method"] not in BASELINES]

    @cached_property
    def weights(self) -> int:
        """Bytes of the whole model."""
        return 2 * count_of(self.shape)

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return int(self.sharding.get("replicas", 1))

    def shards(self, ranks: int) -> int:
        """Parts that each weight lies in."""
        return ranks // self.replicas

    def config(self, method: str, ranks: int, **more: Any) -> RunConfig:
        """The run of a method: weights in bfloat16, those of sgd and adamw float32 with torch's mixed precision."""
        zo, fo = self.batch.zo_micro_batch, self.batch.fo_micro_batch
        sizes = {"zo_micro_batch": zo, "fo_micro_batch": fo, "k0": zo * ranks, "k1": fo * ranks}
        common = {"dtype": "bfloat16", "checkpoint_every": 0, **self.sharding}
        return build(RunConfig, {**common, **sizes, **METHODS[method], **more}, method)

    def begin(
        self, method: str, short: int, ranks: int | None = None, all_layers: bool = False, **more: Any
    ) -> "Future[Rehearsal]":
        """A step whose first-order samples are of `short` tokens."""
        ranks = ranks or self.cluster.ranks
        return self.rehearsals.begin(self.config(method, ranks, **more), ranks, self.long, short, all_layers=all_layers)


def rows(steps: Steps, lt: int) -> Iterator[dict[str, Any]]:
    """A row a method: GiB of each GPU by part, whether they fit, on how many they would, GiB received, seconds.

    Addax takes samples of at most `lt` tokens first-order; the others take all as they come.
    """
    require(steps.long >= 1 and lt >= 1, f"long is {steps.long} and lt {lt}: they must be 1 or more")
    require(lt <= steps.long, f"lt is {lt} and long {steps.long}: the longest first-order sample is no longer")
    short = {name: lt if name == "addax" else steps.long for name in steps.methods}
    begun = {name: steps.begin(name, short[name]) for name in steps.methods}
    rehearsed = {name: future.result() for name, future in begun.items()}
    for name, step in rehearsed.items():  # beside each other
        for ranks in _enough(steps, step)[:1]:
            steps.begin(name, short[name], ranks)
    offloaded = any(step.host for step in rehearsed.values())
    for name, step in rehearsed.items():
        seconds = estimate(step, steps.config(name, steps.cluster.ranks), steps.cluster, steps.weights)
        yield {
            "method": name,
            "fits": "yes" if steps.cluster.fits(step.peak) else "no",
            "GPUs at least": smallest(steps, name, short[name], step),
            "peak": step.peak / 2**30,
            **{part: step.parts[part] / 2**30 for part in PARTS},
            **({"on each node": step.host * steps.cluster.gpus_per_node / 2**30} if offloaded else {}),
            "received": sum(step.received.values()) / 2**30,
            "seconds": seconds.step,
        }


def curves(steps: Steps, shortest: int) -> dict[str, Curve]:
    """The memory of every method but Addax against the length of all samples."""

    def of(method: str, length: int) -> "Future[Rehearsal]":
        return dataclasses.replace(steps, long=length).begin(method, length)

    names = [name for name in steps.methods if name != "addax"]
    for name in names:  # beside each other
        of(name, shortest)
    return {name: Curve(partial(of, name), shortest, steps.long, points=2) for name in names}


def smallest(steps: Steps, method: str, short: int, step: Rehearsal) -> int | None:
    """GPUs that suffice, each with the same batch: whole nodes, or a part of one; None where no number does."""
    for ranks in _enough(steps, step):
        if steps.cluster.fits(steps.begin(method, short, ranks).result().peak):
            return ranks
    return None


def _enough(steps: Steps, step: Rehearsal) -> list[int]:
    """Numbers of GPUs on which it should fit, from the smallest on: shards are what becomes less on more of them."""
    cluster = steps.cluster
    weights = step.parts["weights"] * steps.shards(cluster.ranks)
    others = step.peak - step.parts["weights"]
    some = [*range(1, cluster.gpus_per_node), *(cluster.gpus_per_node * nodes for nodes in range(1, _MOST_NODES + 1))]
    whole = [ranks for ranks in some if ranks % steps.replicas == 0]
    return [ranks for ranks in whole if cluster.fits(others + weights / steps.shards(ranks))]
