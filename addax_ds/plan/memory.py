"""Memory of a GPU against the length of what it takes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from addax_ds.plan.rehearse import Rehearsal


class Curve:
    """Bytes of a GPU at most, at any length: rehearsals at three lengths tell of all between, and at two nearly.

    At one kind of moment memory is a polynomial of degree 2 in the length: activations grow with it,
    a mask with its square. The peak is that of the fullest moment.
    """

    def __init__(
        self, rehearsed: Callable[[int], "Future[Rehearsal]"], shortest: int, longest: int, points: int = 3
    ) -> None:
        lengths = sorted({round(length) for length in np.linspace(shortest, longest, points)})
        begun = [rehearsed(length) for length in lengths]
        steps = [future.result() for future in begun]
        self._center = lengths[0]
        self._moments = []
        for moment in set.intersection(*({*step.moments} for step in steps)):
            peaks = [sum(step.moments[moment].values()) for step in steps]
            self._moments.append(np.polyfit(np.array(lengths) - self._center, peaks, len(lengths) - 1))

    def at(self, length: float) -> float:
        """Bytes with samples of so many tokens."""
        return max(float(np.polyval(moment, length - self._center)) for moment in self._moments)

    def longest_within(self, size: float, lengths: Sequence[int]) -> int | None:
        """The greatest of the lengths with which so many bytes suffice; None where there is none."""
        return max((length for length in {*lengths} if self.at(length) <= size), default=None)
