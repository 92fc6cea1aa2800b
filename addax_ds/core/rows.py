"""Rows of an embedding at a guest's point: those that are looked up and no others, drawn once for both signs."""

import torch
from torch.nn import functional

from addax_ds.core.kernels import perturb_rows
from addax_ds.core.plain import Perturbation


class Rows:
    """The rows of W + scale * z and W - scale * z that forwards along one direction have looked up so far.

    They take no more memory than what those forwards have looked up with them, and a number for each
    row of W. The sign of `point` does not enter.
    """

    def __init__(self, weight: torch.Tensor, name: str, point: Perturbation) -> None:
        self._of = weight, name, point
        self._places = weight.new_empty(0, dtype=torch.int64)  # of each row among those drawn, once rows are looked up
        self._plus = self._minus = weight[:0]

    def look_up(self, ids: torch.Tensor, sign: int) -> torch.Tensor:
        """The rows `ids`, int [...], of one of the two: [..., width]. IndexError for a row that W lacks."""
        weight, name, point = self._of
        rows = ids.long().unique()  # sorted
        if len(rows) and (rows[0] < 0 or rows[-1] >= weight.shape[0]):
            unknown = int(rows[0] if rows[0] < 0 else rows[-1])
            raise IndexError(f"token id {unknown} of a batch is not among the {weight.shape[0]} rows of {name}")
        if not len(self._places):
            self._places = torch.full(weight.shape[:1], -1, device=weight.device)
        missing = rows[self._places[rows] < 0]
        if len(missing):
            plus, minus = perturb_rows(weight, missing, name, point)
            places = torch.arange(len(self._plus), len(self._plus) + len(missing), device=weight.device)
            if len(self._plus):
                plus, minus = torch.cat((self._plus, plus)), torch.cat((self._minus, minus))
            self._plus, self._minus = plus, minus
            self._places[missing] = places
        return functional.embedding(self._places[ids.long()], self._plus if sign > 0 else self._minus)
