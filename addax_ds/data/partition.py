"""The length partition of Addax: long samples are zeroth-order, short ones first-order.

Forward passes of long sequences cost no activations, backward passes of short ones few (Li et al.,
ICLR 2025, section 3.2: data assignment by the threshold L_T).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from addax_ds.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Which samples feed which pool."""

    lt: int | None
    """L_T in tokens; None where both pools hold all samples (Addax-WA)."""
    zo: tuple[int, ...]
    """Indices of the samples longer than L_T."""
    fo: tuple[int, ...]
    """Indices of the rest."""
    lengths: tuple[int, ...]
    """Tokens of every sample, prompt and target."""

    def describe(self) -> str:
        """One paragraph for people: samples and tokens on each side, and the lengths there are."""
        shortest, longest = min(self.lengths), max(self.lengths)
        spread = f"Lengths: shortest {shortest}, median {_median(self.lengths)}, longest {longest}."
        if self.lt is None:
            return f"No length split: both pools hold all {self._size(self.fo)}. {spread}"
        return (
            f"L_T = {self.lt} tokens: {self._size(self.zo)} are longer (zeroth-order), "
            f"{self._size(self.fo)} are not (first-order). {spread}"
        )

    def _size(self, pool: tuple[int, ...]) -> str:
        return f"{len(pool):,} samples ({sum(self.lengths[index] for index in pool):,} tokens)"


def partition(lengths: Sequence[int], lt: int | Literal["auto", "none"]) -> Partition:
    """The pools for samples of these lengths in tokens; "auto" is the median, "none" splits nothing."""
    lengths = tuple(lengths)
    everything = tuple(range(len(lengths)))
    if lt == "none":
        return Partition(None, everything, everything, lengths)
    threshold = _median(lengths) if lt == "auto" else lt
    zo = tuple(index for index in everything if lengths[index] > threshold)
    fo = tuple(index for index in everything if lengths[index] <= threshold)
    return Partition(threshold, zo, fo, lengths)


def _median(lengths: tuple[int, ...]) -> int:
    return int(median(lengths))


def check_pools(pools: Partition, k0: int, k1: int, alpha: float) -> None:
    """Raises `UserError` when a pool is empty or smaller than its batch.

    k0 and k1 are the global batch sizes. alpha = 0 uses no zeroth-order pool, alpha = 1 no first-order pool.
    """
    used = []
    if alpha > 0:
        used.append(("zeroth-order", "k0", k0, pools.zo, "longer than"))
    if alpha < 1:
        used.append(("first-order", "k1", k1, pools.fo, "of at most"))
    shortest, longest = min(pools.lengths), max(pools.lengths)
    for order, name, size, pool, relation in used:
        if not pool:
            between = f"lt between {shortest} and {longest - 1}, or " if shortest < longest else ""
            raise UserError(
                f"the {order} pool is empty: no sample is {relation} lt={pools.lt} tokens "
                f"(lengths {shortest} to {longest}): set {between}lt=none (method addax-wa)"
            )
        if size > len(pool):
            raise UserError(
                f"{name}={size} is more than the {len(pool)} samples of the {order} pool "
                f"(lt={pools.lt or 'none'}): set {name}={len(pool)} or less, move lt, or raise train_samples"
            )
