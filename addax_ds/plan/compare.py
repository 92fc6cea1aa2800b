"""Methods side by side in a planned layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from addax_ds.config import RunConfig, build, require
from addax_ds.plan.rehearse import PARTS, rehearse

METHODS: dict[str, dict[str, Any]] = {
    "addax": {"method": "addax", "alpha": 1e-3},
    "mezo": {"method": "mezo"},
    "ip-sgd": {"method": "ip-sgd"},
    "sgd": {"method": "sgd"},
    "adamw": {"method": "adamw"},
    "lora, adamw": {"method": "adamw", "adapter": {"kind": "lora"}},
}
"""What is planned side by side: a method and its settings."""

RESERVED = 2 * 2**30
"""Bytes of a GPU that torch does not count: the driver's, NCCL's, and gaps between tensors."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a run is to take place, and the batch of each GPU.

    long: tokens of the longest document; lt: L_T, tokens of the longest that Addax takes first-order.
    zo_micro_batch, fo_micro_batch: samples that a GPU takes at once of either batch.
    """

    nodes: int
    gpus_per_node: int
    gpu_memory: float
    long: int
    lt: int
    zo_micro_batch: int = 6
    fo_micro_batch: int = 4

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "long", "lt", "zo_micro_batch", "fo_micro_batch"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")
        require(self.gpu_memory > RESERVED, f"gpu_memory is {self.gpu_memory / 2**30:g} GiB: it must be above 2 GiB")
        require(
            self.lt <= self.long, f"lt is {self.lt} and long {self.long}: the longest first-order sample is no longer"
        )

    @property
    def ranks(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node


def rows(shape: PretrainedConfig, layout: Layout, all_layers: bool) -> Iterator[dict[str, Any]]:
    """A row a method: GiB of each GPU by part, whether they fit, collectives and GiB received in a step.

    Addax takes samples of `long` tokens zeroth-order and of `lt` first-order; the others take all of
    `long`. Weights are bfloat16, those of sgd and adamw float32, with torch's mixed precision.
    """
    sizes = {"zo_micro_batch": layout.zo_micro_batch, "fo_micro_batch": layout.fo_micro_batch}
    batches = {"k0": layout.zo_micro_batch * layout.ranks, "k1": layout.fo_micro_batch * layout.ranks}
    common = {"engine": "fsdp", "dtype": "bfloat16", "checkpoint_every": 0, **sizes, **batches}
    for name, settings in METHODS.items():
        config = build(RunConfig, {**common, **settings}, name)
        short = layout.lt if name == "addax" else layout.long
        step = rehearse(shape, config, layout.ranks, layout.long, short, all_layers)
        fits = step.peak + RESERVED <= layout.gpu_memory
        yield {
            "method": name,
            "fits": "yes" if fits else "no",
            "peak": step.peak / 2**30,
            **{part: step.parts[part] / 2**30 for part in PARTS},
            "gathers": sum(count for name, count in step.collectives.items() if "gather" in name),
            "reductions": sum(count for name, count in step.collectives.items() if "reduce" in name),
            "received": sum(step.received.values()) / 2**30,
        }
