"""Methods side by side on planned GPUs."""

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from addax_ds.config import BASELINES, RunConfig, build, require, values_of
from addax_ds.errors import UserError
from addax_ds.plan.batches import Targets
from addax_ds.plan.choose import Batch
from addax_ds.plan.cluster import RESERVED, Cluster
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.memory import Curve
from addax_ds.plan.padding import padding_of
from addax_ds.plan.parts import PARTS
from addax_ds.plan.rehearsals import RehearsalLostError, Rehearsals
from addax_ds.plan.rehearse import Rehearsal
from addax_ds.plan.seconds import estimate
from addax_ds.shapes import sizes_of

METHODS: dict[str, dict[str, Any]] = {
    "addax": {"method": "addax"},
    "mezo": {"method": "mezo"},
    "adazeta": {"method": "adazeta"},
    "ip-sgd": {"method": "ip-sgd"},
    "sgd": {"method": "sgd"},
    "adamw": {"method": "adamw"},
    "lora, adamw": {"method": "adamw", "adapter": {"kind": "lora"}},
}
"""What is planned side by side: a method and its settings."""

_NOT_OFFLOADED = "DeepSpeed's optimizers are not rehearsed with offloaded parameters: plan fsdp-offload"
_MOST_NODES = 128
_TELLING = 0.2
"""Share by which shards on two numbers of GPUs differ at least, so that memory on both tells them from the rest: where
weights are filled up, more GPUs may hold as much of each."""


@dataclass(frozen=True)
class Steps:
    """Steps of a model on planned GPUs, with samples of at most `long` tokens."""

    shape: PretrainedConfig
    run: RunConfig
    """Addax's, of which the sharding and the sizes of batches are planned; the others compute in its dtype."""
    rehearsals: Rehearsals
    cluster: Cluster
    sharding: dict[str, Any]
    """Settings of the engine."""
    batch: Batch
    long: int
    targets: Targets
    evaluated: Evaluated

    @property
    def methods(self) -> list[str]:
        """Those that can be rehearsed: not DeepSpeed's optimizers with offloaded parameters."""
        others = not self.offloads or self.sharding["engine"] == "fsdp"
        return [name for name, settings in METHODS.items() if others or settings["method"] not in BASELINES]

    @property
    def offloads(self) -> bool:
        """Whether shards lie on the host."""
        path = self.sharding["ds_config"]
        if path is None:
            return bool(self.sharding["offload"])
        return "offload_param" in json.loads(Path(path).read_text())["zero_optimization"]

    @cached_property
    def sizes(self) -> dict[str, torch.Size]:
        """Of each parameter."""
        return sizes_of(self.shape)

    @property
    def weights(self) -> int:
        """Bytes of the whole model."""
        return sum(size.numel() for size in self.sizes.values()) * getattr(torch, self.run.dtype).itemsize

    @cached_property
    def _paddings(self) -> dict[int, float]:
        return {}

    def padding(self, ranks: int) -> float:
        """Weights on so many GPUs with what fills them up, of the model's."""
        if self.sharding["engine"] != "fsdp":
            return 1.0
        if ranks not in self._paddings:
            self._paddings[ranks] = padding_of(self.sizes, self.shards(ranks)).share
        return self._paddings[ranks]

    def shards(self, ranks: int) -> int:
        """Parts that each weight lies in."""
        return ranks // int(self.sharding["replicas"])

    def config(self, method: str, ranks: int, **more: Any) -> RunConfig:
        """The run of a method: sgd and adamw keep float32 weights beside, as torch's mixed precision does."""
        zo, fo = self.batch.zo_micro_batch, self.batch.fo_micro_batch
        planned = {"zo_micro_batch": zo, "fo_micro_batch": fo, "k0": zo * ranks, "k1": fo * ranks, **self.sharding}
        if method == "addax":
            return build(RunConfig, {**values_of(self.run), **planned, **more}, "plan")
        shared = {
            name: getattr(self.run, name) for name in ("dtype", "activation_checkpointing", "atomic", "distribution")
        }
        return build(RunConfig, {**shared, "checkpoint_every": 0, **planned, **METHODS[method], **more}, method)

    def begin(
        self, method: str, short: int, ranks: int | None = None, all_layers: bool = False, **more: Any
    ) -> "Future[Rehearsal]":
        """A step whose first-order samples are of `short` tokens."""
        ranks = ranks or self.cluster.ranks
        config = self.config(method, ranks, **more)
        options = {"all_layers": all_layers, "targets": self.targets}
        return self.rehearsals.begin(config, ranks, self.long, short, **options)

    def begin_evaluation(self, short: int, **more: Any) -> "Future[Rehearsal]":
        """One of Addax's run, whose steps take first-order samples of `short` tokens."""
        ranks = self.cluster.ranks
        options = {"targets": self.targets, "evaluated": self.evaluated}
        return self.rehearsals.begin(self.config("addax", ranks, **more), ranks, self.long, short, **options)


def rows(steps: Steps, lt: int) -> Iterator[dict[str, Any]]:
    """A row a method: GiB of each GPU by part, whether they fit, on how many they would, GiB received, seconds.

    The peak is of torch's memory, without the overhead. The last row is of an evaluation in place of a step.

    Addax takes samples of at most `lt` tokens first-order; the others take all as they come.
    """
    require(steps.long >= 1 and lt >= 1, f"long is {steps.long} and lt {lt}: they must be 1 or more")
    require(lt <= steps.long, f"lt is {lt} and long {steps.long}: the longest first-order sample is no longer")
    short = {name: lt if name == "addax" else steps.long for name in steps.methods}
    begun = {name: steps.begin(name, short[name]) for name in steps.methods}
    evaluation = steps.begin_evaluation(lt)
    left_out = {name: _NOT_OFFLOADED for name in METHODS if name not in steps.methods}
    rehearsed: dict[str, Rehearsal] = {}
    others: dict[str, int] = {}
    for name, future in begun.items():  # what follows upon one begins while the next are under way
        if (reason := _left_out(steps, name, future)) is not None:
            left_out[name] = reason
            continue
        rehearsed[name] = future.result()
        others[name] = _another_number(steps, rehearsed[name])
        steps.begin(name, short[name], others[name])
    enough: dict[str, list[int]] = {}
    for name, step in rehearsed.items():
        elsewhere = steps.begin(name, short[name], others[name]).result()
        enough[name] = _enough(steps, step, elsewhere, others[name])
        for ranks in enough[name][:1]:
            steps.begin(name, short[name], ranks)
    offloaded = any(step.host for step in rehearsed.values())
    for name, step in rehearsed.items():
        seconds = estimate(step, steps.config(name, steps.cluster.ranks), steps.cluster, steps.weights)
        smallest = _smallest(steps, name, short[name], step, enough[name])
        yield _row(steps, name, step, offloaded, smallest) | {"seconds": seconds.step}
    yield _row(steps, "evaluation", evaluation.result(), offloaded, None) | {"seconds": None}
    yield from ({"method": name, "left out": reason} for name, reason in left_out.items())


def _left_out(steps: Steps, name: str, begun: "Future[Rehearsal]") -> str | None:
    """What is said of a method whose adapters have no places in the model that are known; waits for its rehearsal."""
    fault = begun.exception()
    if steps.config(name, steps.cluster.ranks).adapter is None or isinstance(fault, RehearsalLostError):
        return None
    return str(fault) if isinstance(fault, UserError) else None


def _row(steps: Steps, name: str, step: Rehearsal, offloaded: bool, smallest: int | None) -> dict[str, Any]:
    return {
        "method": name,
        "fits": "yes" if steps.cluster.fits(step.peak) else "no",
        "GPUs at least": smallest,
        "peak": step.peak / 2**30,
        **{part: step.parts[part] / 2**30 for part in PARTS},
        "overhead": RESERVED / 2**30,
        **({"on each node": step.host * steps.cluster.gpus_per_node / 2**30} if offloaded else {}),
        "received": sum(step.received.values()) / 2**30,
    }


def eval_micro_batch(steps: Steps, lt: int) -> int | None:
    """The run's, halved until an evaluation fits; None where it does not with one example at once."""
    size = steps.run.eval_micro_batch
    while not steps.cluster.fits(steps.begin_evaluation(lt, eval_micro_batch=size).result().peak):
        if size <= steps.evaluated.fewest_rows:
            return None
        size //= 2
    return size


def curves(steps: Steps, shortest: int) -> dict[str, Curve]:
    """The memory of every method but Addax against the length of all samples."""

    def of(method: str, length: int) -> "Future[Rehearsal]":
        return dataclasses.replace(steps, long=length).begin(method, length)

    begun = {name: of(name, shortest) for name in steps.methods if name != "addax"}  # beside each other
    kinks = steps.targets.kinks(steps.batch.fo_micro_batch)
    return {
        name: Curve(partial(of, name), shortest, steps.long, points=2, kinks=kinks)
        for name, future in begun.items()
        if _left_out(steps, name, future) is None
    }


def _smallest(steps: Steps, method: str, short: int, step: Rehearsal, enough: list[int]) -> int | None:
    """The first of these numbers of GPUs that suffices, rehearsed; None where none does."""

    def fits(ranks: int) -> bool:
        return steps.cluster.fits(steps.begin(method, short, ranks).result().peak)

    if steps.cluster.fits(step.peak):  # the planned number does
        enough = [*(ranks for ranks in enough if ranks < steps.cluster.ranks), steps.cluster.ranks]
    if enough and fits(enough[0]):  # nearly always
        return enough[0]
    # More GPUs take no more of each, but where weights are filled up, of which the numbers know.
    place = bisect_left(enough, True, lo=min(1, len(enough)), key=fits)
    return enough[place] if place < len(enough) else None


def _another_number(steps: Steps, step: Rehearsal) -> int:
    """Of GPUs, to rehearse the step on as well: the smallest that suffices if weights alone are sharded."""
    likely = _fitting(steps, _weights_alone(step))
    # What is not sharded at all has no reductions, so that it tells of no other number.
    apart = [ranks for ranks in likely[:1] if ranks != steps.cluster.ranks and steps.shards(ranks) > 1]
    return apart[0] if apart else 2 * steps.cluster.ranks


def _enough(steps: Steps, step: Rehearsal, other: Rehearsal, ranks: int) -> list[int]:
    """Numbers of GPUs on which it should fit, from the smallest on, by what it takes on other `ranks`.

    At one kind of moment memory is a constant and shards: two numbers of GPUs tell them apart.
    """
    share = _share(steps, ranks)
    if abs(1 - share) < _TELLING:
        return _fitting(steps, _weights_alone(step))
    moments = step.moments.keys() & other.moments.keys()
    sizes = [(sum(step.moments[moment].values()), sum(other.moments[moment].values())) for moment in moments]
    return _fitting(steps, [(here, (here - there) / (1 - share)) for here, there in sizes])


def _weights_alone(step: Rehearsal) -> list[tuple[float, float]]:
    """Bytes of each moment, and those of weights among them."""
    return [(sum(parts.values()), parts["weights"]) for parts in step.moments.values()]


def _fitting(steps: Steps, moments: list[tuple[float, float]]) -> list[int]:
    """Numbers of GPUs on which it should fit, from the smallest on: a part of a node, or whole nodes.

    moments: bytes at most on the planned number of GPUs, and those of shards among them.
    """
    cluster = steps.cluster
    a_node = range(1, cluster.gpus_per_node + 1)
    if steps.sharding["replicas"] > 1:
        numbers = [cluster.nodes * gpus for gpus in a_node]
    else:
        numbers = [*a_node, *(cluster.gpus_per_node * nodes for nodes in range(2, _MOST_NODES + 1))]

    def peak(ranks: int) -> float:
        return max(size + shards * (_share(steps, ranks) - 1) for size, shards in moments)

    return [ranks for ranks in numbers if cluster.fits(peak(ranks))]


def _share(steps: Steps, ranks: int) -> float:
    """Size of a shard on so many GPUs, of that on the planned number."""
    planned = steps.cluster.ranks
    return planned / ranks * steps.padding(ranks) / steps.padding(planned)
