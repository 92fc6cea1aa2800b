"""A plan, made from a few layers, held against a rehearsal with all of them and against what the method says."""

from collections.abc import Iterator
from typing import Any

from addax_ds.errors import UserError
from addax_ds.plan.methods import Steps
from addax_ds.plan.rehearse import Rehearsal

_APART = 0.05
"""Share that figures may differ by."""


def rows(steps: Steps, lt: int) -> Iterator[dict[str, Any]]:
    """A row a figure of Addax's step. Raises `UserError` after the last one where any two are too far apart."""
    begun = [steps.begin("addax", lt), steps.begin("addax", lt, all_layers=True)]
    few, whole = (future.result() for future in begun)
    figures = {
        "peak, GiB": (few.peak / 2**30, whole.peak / 2**30),
        "received, GiB": (sum(few.received.values()) / 2**30, sum(whole.received.values()) / 2**30),
        **{
            f"by {kind}, GiB": (few.received.get(kind, 0) / 2**30, received / 2**30)
            for kind, received in whole.received.items()
        },
    }
    shards = steps.shards(steps.cluster.ranks)
    if shards > 1:

        def model_sizes(step: Rehearsal) -> float:
            moved = sum(size for kind, size in step.received.items() if kind != "all_reduce")
            return moved * shards / (shards - 1) / steps.weights

        figures["model sizes received"] = _by_the_method(steps) or model_sizes(few), model_sizes(whole)
    names = sorted({*few.collectives, *whole.collectives})
    counts = {name: (few.collectives.get(name, 0), whole.collectives.get(name, 0)) for name in names}
    # How many weights DeepSpeed gathers at once depends on what is ahead: its counts are told alone.
    held = {*figures, *(counts if steps.sharding["engine"] == "fsdp" else ())}
    faults = []
    for name, (planned, rehearsed) in {**figures, **counts}.items():
        apart = planned / rehearsed - 1 if rehearsed else float(planned > 0)
        yield {"figure": name, "planned": planned, "rehearsed": rehearsed, "apart": f"{apart:+.2%}"}
        if name in held and abs(apart) > _APART:
            faults.append(f"{name}: planned {planned:.4g}, rehearsed {rehearsed:.4g}")
    if faults:
        raise UserError(f"the plan is not what the rehearsal takes: {'; '.join(faults)}")


def _by_the_method(steps: Steps) -> float | None:
    """Model sizes that a step receives: all weights twice and all gradients once, as in any first-order step.

    None where that is not said: of other ways to gather, and where DeepSpeed keeps much gathered, or gathers tied
    weights at both of their places.
    """
    if steps.run.perturb != "gathered" or steps.run.adapter is not None:
        return None
    if steps.sharding["engine"] == "fsdp":
        return 3 * steps.padding(steps.cluster.ranks)
    from addax_ds.plan import zero3

    sizes = [size.numel() for size in steps.sizes.values()]
    spared = zero3.kept(steps.config("addax", steps.cluster.ranks), sizes) / (3 * sum(sizes))  # at most one gather
    is_tied = getattr(steps.shape, "tie_word_embeddings", False)
    return None if spared > _APART / (1 + _APART) or is_tied else 3.0
