"""Which perturbation each zeroth-order micro-batch is measured at, and what each counts for.

`shared`: every direction is measured on the whole batch (n-SPSA, Malladi et al., 2023, definition 1),

    g = mean_q g0_q z_q,   g0_q = mean over B^0 of the two-sided difference along z_q.

`per-micro-batch`: each micro-batch has directions of its own, numbered by its place in the global batch,

    g = sum_m K_m / K^0 mean_q g0_mq z_mq,   g0_mq = mean over micro-batch m,

for as many forwards. Both have the gradient of the smoothed loss as their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class Directions:
    """The directions of one step. queries: of a sample; sizes: samples of each micro-batch."""

    kind: Literal["shared", "per-micro-batch"]
    queries: int
    sizes: tuple[int, ...]

    @classmethod
    def of_scalars(
        cls, kind: Literal["shared", "per-micro-batch"], g0: Sequence[float], sizes: tuple[int, ...]
    ) -> Self:
        """The directions of a step that has these projected gradients."""
        return cls(kind, len(g0) // (1 if kind == "shared" else len(sizes)), sizes)

    @property
    def count(self) -> int:
        """Directions of the step, numbered from 0, which is the `query` of their noise."""
        return self.queries * (min(len(self.sizes), 1) if self.kind == "shared" else len(self.sizes))

    def of(self, micro_batch: int) -> range:
        """Directions that a micro-batch is measured along."""
        first = 0 if self.kind == "shared" else micro_batch * self.queries
        return range(first, first + self.queries)

    def pairs(self) -> list[tuple[int, int]]:
        """Every (direction, micro-batch) that is measured, direction by direction."""
        return sorted((direction, index) for index in range(len(self.sizes)) for direction in self.of(index))

    def share(self, rank: int, world_size: int) -> list[tuple[int, int]]:
        """The pairs of one rank: as many as of any other or one more, of as few directions as can be.

        Ranks take different directions where there are enough of them: a rank draws the noise of its own.
        """
        pairs = self.pairs()
        return pairs[rank * len(pairs) // world_size : (rank + 1) * len(pairs) // world_size]

    def most_of_a_rank(self, world_size: int) -> int:
        """Different directions of the rank that has most: of so many it draws the noise."""
        return max(len({direction for direction, _ in self.share(rank, world_size)}) for rank in range(world_size))

    def micro_batches(self, direction: int) -> range:
        """Micro-batches that are measured along a direction."""
        if self.kind == "shared":
            return range(len(self.sizes))
        return range(direction // self.queries, direction // self.queries + 1)

    def samples(self, direction: int) -> int:
        """Samples that are measured along a direction."""
        return sum(self.sizes[index] for index in self.micro_batches(direction))

    def samples_before(self, direction: int, micro_batch: int) -> int:
        """Of those, the samples of earlier micro-batches."""
        return sum(self.sizes[self.micro_batches(direction).start : micro_batch])

    def coefficients(self, alpha: float, g0: Sequence[float]) -> tuple[float, ...]:
        """What each direction is multiplied by in the update, for alpha times the estimate."""
        whole = sum(self.sizes)
        return tuple(alpha * g * (self.samples(direction) / whole) / self.queries for direction, g in enumerate(g0))
