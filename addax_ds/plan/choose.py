"""Which samples fit a backward on these GPUs, and how many of them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from addax_ds.config import require
from addax_ds.data.partition import partition
from addax_ds.errors import UserError
from addax_ds.plan.cluster import RESERVED, Cluster
from addax_ds.plan.memory import Curve


@dataclass(frozen=True)
class Batch:
    """Samples that a GPU takes at once: the paper's K^0 and K^1 for OPT-13B by default."""

    zo_micro_batch: int = 6
    fo_micro_batch: int = 4

    def __post_init__(self) -> None:
        for name in ("zo_micro_batch", "fo_micro_batch"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")


@dataclass(frozen=True)
class Choice:
    """L_T and the batches of all GPUs, for data of given lengths."""

    lt: int | Literal["none"]
    """Tokens; "none" where every sample fits a backward."""
    batch: Batch
    ranks: int
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    curve: Curve
    """A GPU's bytes against L_T."""
    fits: int
    """Tokens of the longest that would fit a backward."""

    @property
    def k0(self) -> int:
        """Global zeroth-order batch size."""
        return self.batch.zo_micro_batch * self.ranks

    @property
    def k1(self) -> int:
        """Global first-order batch size."""
        return self.batch.fo_micro_batch * self.ranks

    @property
    def longest_first_order(self) -> int:
        """Tokens of the longest sample that takes a backward."""
        longest = max(self.lengths)
        return longest if self.lt == "none" else max(length for length in self.lengths if length <= self.lt)

    def __str__(self) -> str:
        each = f"{self.batch.fo_micro_batch} first-order samples at once on each GPU"
        sizes = f"K^0 = {self.k0}, K^1 = {self.k1}."
        longest = max(self.lengths)
        if self.lt == "none":
            return f"no L_T: {each} fit at all lengths, up to {longest} tokens, so both batches are of all. {sizes}"
        short = sum(length <= self.lt for length in self.lengths)
        why = f"the longest with which {each} fit"
        if self.lt < self.fits:
            why = f"{each} would fit up to {self.fits}, and this leaves K^0 longer ones"
        return (
            f"L_T = {self.lt} tokens: {why}, beside {self.batch.zo_micro_batch} zeroth-order ones of up to {longest}; "
            f"{short:,} of {len(self.lengths):,} samples are no longer. {sizes}"
        )


class TooLargeError(UserError):
    """Too few samples fit a backward, or none."""


def choose(lengths: Sequence[int], cluster: Cluster, curve_of: Callable[[Batch], Curve], most: Batch) -> Choice:
    """The largest L_T that fits and leaves both pools a batch, with as many samples at once, up to `most`, as leave
    half of the data first-order.

    curve_of: a GPU's memory against L_T with a batch, its zeroth-order samples as long as the longest.
    Raises `TooLargeError` where too few samples fit, and `UserError` where there are too few in all.
    """
    lengths, room, batch = sorted(lengths), cluster.gpu.memory - RESERVED, most
    too_few = UserError(
        f"{len(lengths)} samples are too few for {cluster.ranks} GPUs, of which each takes one of either order "
        "in a step: plan fewer GPUs, or give more data"
    )
    if len(lengths) < cluster.ranks:
        raise too_few
    while True:
        curve = curve_of(batch)
        fitting = curve.longest_within(room, lengths)
        if batch != Batch(1, 1) and (fitting is None or fitting < median(lengths)):
            batch = _with_fewer(batch, "fo")
            continue
        if fitting is None:
            raise TooLargeError(
                f"one sample of {lengths[0]} tokens first-order beside one of {lengths[-1]} zeroth-order takes "
                f"{(curve.at(lengths[0]) + RESERVED) / 2**30:.3g} GiB of a GPU: plan more GPUs, or shorter samples"
            )
        lt = _with_a_pool(fitting, lengths, batch.zo_micro_batch * cluster.ranks)
        choice = Choice(lt, batch, cluster.ranks, (*lengths,), curve, fitting)
        pools = partition(lengths, lt)
        # What leaves K^0 longer samples takes them from the others.
        longest = fitting if lt == "none" else lt
        lowered = longest < fitting
        too_low = longest < median(lengths) and batch.zo_micro_batch > 1
        if len(pools.zo) >= choice.k0 and len(pools.fo) >= choice.k1 and not too_low:
            return choice
        if batch == Batch(1, 1):
            if longest == fitting < lengths[-1] and len(pools.fo) < choice.k1:
                raise TooLargeError(
                    f"{len(pools.fo)} of {len(lengths)} samples are short enough for a backward, up to {fitting} "
                    f"tokens, and a step takes one on each of {cluster.ranks} GPUs: plan larger ones, or give more data"
                )
            raise too_few
        batch = _with_fewer(batch, "zo" if lowered or len(pools.zo) < choice.k0 else "fo")


def _with_fewer(batch: Batch, order: Literal["zo", "fo"]) -> Batch:
    """Half of the zeroth-order samples, or of the first-order ones; of the other ones where there is one left."""
    zo, fo = batch.zo_micro_batch, batch.fo_micro_batch
    halves_zo = zo > 1 if order == "zo" else fo == 1
    return Batch(zo // 2, fo) if halves_zo else Batch(zo, fo // 2)


def _with_a_pool(lt: int, lengths: Sequence[int], k0: int) -> int | Literal["none"]:
    """L_T, or a smaller one that leaves a batch of longer samples."""
    if lt >= lengths[-1]:
        return "none"
    enough = (length for length in {*lengths} if length <= lt and len(lengths) - bisect_right(lengths, length) >= k0)
    return max(enough, default=lt)
