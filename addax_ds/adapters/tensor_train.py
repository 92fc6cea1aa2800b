"""Linear layers whose matrix is a tensor train (Oseledets, 2011; AdaZeta, Yang et al., 2024, section 3.1).

A matrix W [inputs, outputs] is written as a chain of cores G_i [r_{i-1}, k_i, r_i] with r_0 = r_last = 1. The
modes k_i of the first cores multiply to the inputs, those of the others to the outputs, and

    W[(i_1 .. i_m), (j_1 .. j_n)] = G_1[:, i_1] ... G_m[:, i_m] G_{m+1}[:, j_1] ... G_{m+n}[:, j_n]

W itself is never built, neither forwards nor backwards.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from addax_ds.errors import UserError

MODES = 3
"""Cores on either side where no modes are given."""


@cache
def balanced_factors(number: int, count: int) -> tuple[int, ...]:
    """`count` factors of a number, descending, of which the largest is as small as can be, then the next."""
    if count == 1:
        return (number,)
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    splits = ((first, *balanced_factors(number // first, count - 1)) for first in divisors)
    return min(tuple(sorted(split, reverse=True)) for split in splits)


class TensorTrainLinear(nn.Module):
    """x [..., inputs] -> x W + bias [..., outputs], in the dtype of x; the cores compute in their own.

    rank: of every bond between cores. in_modes, out_modes: the modes of either side; balanced factors
    where they are not given. groups: 2, 3 or 4 chains of cores that are contracted apart from each other
    before x meets them (AdaZeta, section 3.3); 2 is one chain a side. Raises `UserError` for modes that do
    not multiply to the size, and for ranks and groups that are none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        in_modes: Sequence[int] | None = None,
        out_modes: Sequence[int] | None = None,
        bias: bool = True,
        groups: int = 2,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"tensor-train rank is {rank}: set it to 1 or more")
        self.inputs, self.outputs = inputs, outputs
        self.in_modes = _checked(in_modes, inputs, "inputs")
        self.out_modes = _checked(out_modes, outputs, "outputs")
        self._groups = _grouped(len(self.in_modes), len(self.out_modes), groups)
        modes = (*self.in_modes, *self.out_modes)
        ranks = (1, *[rank] * (len(modes) - 1), 1)
        # Parameters of this module itself: a list of them would be a module without a forward of its own.
        self._names = [f"core_{place}" for place in range(len(modes))]
        for name, before, mode, after in zip(self._names, ranks[:-1], modes, ranks[1:], strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(before, mode, after)))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal cores such that elements of W have the variance 1 / inputs; no bias."""
        paths = math.prod(core.shape[2] for core in self.cores)
        deviation = (self.inputs * paths) ** (-0.5 / len(self._names))
        for core in self.cores:
            nn.init.normal_(core, std=deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def cores(self) -> list[torch.Tensor]:
        """In order, each [rank before, mode, rank after]."""
        return [getattr(self, name) for name in self._names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The parallel contraction: chains first, then x through one after the other."""
        cores = self.cores
        inward, outward = ([chain(cores[begin:end]) for begin, end in side] for side in self._groups)
        return self._through(x, inward, outward)

    def sequential(self, x: torch.Tensor) -> torch.Tensor:
        """The same, x through one core after the other: the twin that the parallel contraction is held against."""
        cores = self.cores
        return self._through(x, cores[: len(self.in_modes)], cores[len(self.in_modes) :])

    def _through(self, x: torch.Tensor, inward: list[torch.Tensor], outward: list[torch.Tensor]) -> torch.Tensor:
        """x through chains [rank before, modes, rank after] of the input side, then of the output side."""
        rows = x.numel() // self.inputs
        state = x.reshape(rows, self.inputs, 1).to(inward[0].dtype)  # [rows, inputs that are left, rank]
        for part in inward:
            rank, modes, _ = part.shape
            state = torch.einsum("bmsr,rma->bsa", state.reshape(rows, modes, -1, rank), part)
        for part in outward:  # state: [rows, outputs so far, rank]
            state = torch.einsum("bsr,rma->bsma", state, part).reshape(rows, -1, part.shape[2])
        result = state.reshape(*x.shape[:-1], self.outputs)
        return (result if self.bias is None else result + self.bias).to(x.dtype)

    def matrix(self) -> torch.Tensor:
        """W [inputs, outputs], for tests and for merging."""
        return chain(self.cores).view(self.inputs, self.outputs)


def chain(cores: list[torch.Tensor]) -> torch.Tensor:
    """Neighbouring cores as one: [first rank, product of the modes, last rank]."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.einsum("amr,rnb->amnb", whole, core).reshape(whole.shape[0], -1, core.shape[2])
    return whole


def _checked(modes: Sequence[int] | None, size: int, side: str) -> tuple[int, ...]:
    if modes is None:
        return balanced_factors(size, MODES)
    if not modes or min(modes) < 1 or math.prod(modes) != size:
        raise UserError(
            f"modes {list(modes)} multiply to {math.prod(modes)}, and the layer has {size} {side}: "
            f"give factors of {size}, for example {list(balanced_factors(size, MODES))}"
        )
    return tuple(modes)


def _grouped(inward: int, outward: int, groups: int) -> list[list[tuple[int, int]]]:
    """Cores [begin, end) of every chain of the input side and of the output side: no chain crosses over."""
    if groups not in (2, 3, 4):
        raise UserError(f"groups is {groups}: set it to 2, 3 or 4")
    sides = [[(0, inward)], [(inward, inward + outward)]]
    for _ in range(groups - 2):
        # The longest chain becomes two.
        side, longest = max(
            ((side, part) for side in sides for part in side), key=lambda found: found[1][1] - found[1][0]
        )
        begin, end = longest
        if end - begin < 2:
            raise UserError(
                f"{groups} groups are more than {inward + outward} cores allow: give more modes, or fewer groups"
            )
        place = side.index(longest)
        side[place : place + 1] = [(begin, (begin + end) // 2), ((begin + end) // 2, end)]
    return sides
