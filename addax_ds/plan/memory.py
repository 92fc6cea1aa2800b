"""Memory of a GPU against the length of what it takes."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.polynomial import Polynomial

from addax_ds.plan.rehearse import Rehearsal


class Curve:
    """Bytes of a GPU at most, at any length: rehearsals at three lengths tell of all between, and at two nearly.

    At one kind of moment memory is a polynomial of degree 2 in the length: activations grow with it,
    a mask with its square. The peak is that of the fullest moment. kinks: lengths at which another
    polynomial begins.
    """

    def __init__(
        self,
        rehearsed: Callable[[int], "Future[Rehearsal]"],
        shortest: int,
        longest: int,
        points: int = 3,
        kinks: Iterable[int] = (),
    ) -> None:
        ends = sorted({shortest, longest, *(length for length in kinks if shortest < length < longest)})
        pieces = [
            sorted({round(length) for length in np.linspace(*piece, points)})
            for piece in zip(ends, ends[1:] or ends, strict=False)
        ]
        begun = {length: rehearsed(length) for lengths in pieces for length in lengths}
        steps = {length: future.result() for length, future in begun.items()}
        self._pieces = [(lengths[-1], _through([(length, steps[length]) for length in lengths])) for lengths in pieces]

    def at(self, length: float) -> float:
        """Bytes with samples of so many tokens."""
        polynomials = next((p for longest, p in self._pieces if length <= longest), self._pieces[-1][1])
        return max(float(moment(length)) for moment in polynomials)

    def longest_within(self, size: float, lengths: Sequence[int]) -> int | None:
        """The greatest of the lengths with which so many bytes suffice; None where there is none."""
        return max((length for length in {*lengths} if self.at(length) <= size), default=None)


def _through(points: list[tuple[int, Rehearsal]]) -> list[Polynomial]:
    """A polynomial for each kind of moment that all of the rehearsals have, by the length."""
    lengths = [length for length, _ in points]
    moments = set.intersection(*({*step.moments} for _, step in points))
    # Exact, through as many points as it has coefficients; on a domain of its own, where it is well conditioned.
    return [
        Polynomial.fit(lengths, [sum(step.moments[moment].values()) for _, step in points], len(points) - 1)
        if len(points) > 1
        else Polynomial([sum(points[0][1].moments[moment].values())])
        for moment in moments
    ]
