"""The scalars of a step: every per-sample loss, in one vector for one all-reduce."""

import itertools
import math

import torch

from addax_ds.core.directions import Directions
from addax_ds.errors import UserError


class Scalars:
    """Per-sample losses of a step in global order: float64, on the CPU.

    Each rank fills in its own places and adds zeros elsewhere, so the sum over ranks is exact and
    what follows from it does not depend on who computed what. A number that is not finite stays so
    in the sum, which is how all ranks learn of it together.
    """

    def __init__(self, directions: Directions, fo_sizes: list[int], world_size: int) -> None:
        self._directions = directions
        # Of each direction the losses on one side of theta, and then those on the other.
        self._starts = list(
            itertools.accumulate((2 * directions.samples(d) for d in range(directions.count)), initial=0)
        )
        self._fo_sizes, self.fo_samples = fo_sizes, sum(fo_sizes)
        self._fo_at = self._starts[-1]
        self._fingerprints_at = self._fo_at + self.fo_samples
        self._faults_at = self._fingerprints_at + world_size
        self.vector = torch.zeros(self._faults_at + world_size, dtype=torch.float64)

    def put_zo(self, direction: int, sign: int, index: int, losses: torch.Tensor) -> None:
        """Losses of zeroth-order micro-batch `index` at theta + sign * eps * z of a direction."""
        directions = self._directions
        at = self._starts[direction] + (sign < 0) * directions.samples(direction)
        at += directions.samples_before(direction, index)
        self.vector[at : at + len(losses)] = losses

    def put_fo(self, index: int, losses: torch.Tensor) -> None:
        """Losses of first-order micro-batch `index`."""
        at = self._fo_at + sum(self._fo_sizes[:index])
        self.vector[at : at + len(losses)] = losses.detach().double().cpu()

    def put_fingerprint(self, rank: int, fingerprint: int) -> None:
        """A checksum of the batches that this rank was given."""
        self.vector[self._fingerprints_at + rank] = float(fingerprint)

    def put_fault(self, rank: int) -> None:
        """A forward of this rank has failed."""
        self.vector[self._faults_at + rank] = 1.0

    def faults(self) -> list[int]:
        """Ranks of which a forward has failed."""
        return self.vector[self._faults_at :].nonzero().flatten().tolist()

    def check_fingerprints(self) -> None:
        """Raises `UserError` where ranks were given different batches."""
        fingerprints = self.vector[self._fingerprints_at : self._faults_at].tolist()
        if len(set(fingerprints)) > 1:
            other = next(rank for rank, value in enumerate(fingerprints) if value != fingerprints[0])
            raise UserError(f"ranks 0 and {other} were given different batches: pass every rank the same global batch")

    def zo_means(self) -> tuple[list[float], list[float]]:
        """Mean losses at theta + eps z and at theta - eps z, one per direction."""
        plus, minus = [], []
        for begin, end in itertools.pairwise(self._starts):
            losses = self.vector[begin:end].tolist()
            plus.append(mean(losses[: len(losses) // 2]))
            minus.append(mean(losses[len(losses) // 2 :]))
        return plus, minus

    def fo_mean(self) -> float | None:
        """Mean loss of the first-order batch; None without one."""
        return mean(self.vector[self._fo_at : self._fingerprints_at].tolist()) if self.fo_samples else None


class RankSums:
    """Scalars of a step of which every rank has samples of its own: float64, on the CPU.

    Sums of losses for each perturbed point, the number of samples, and which ranks have failed.
    """

    def __init__(self, points: int, world_size: int) -> None:
        self._points = points
        self.vector = torch.zeros(points + 1 + world_size, dtype=torch.float64)

    def put(self, losses: list[torch.Tensor]) -> None:
        """Per-sample losses of this rank, [samples] for each point."""
        sums = [math.fsum(loss.tolist()) if loss.isfinite().all() else math.nan for loss in losses]
        self.vector[: self._points + 1] = torch.tensor([*sums, len(losses[0])], dtype=torch.float64)

    def put_fault(self, rank: int) -> None:
        """A forward of this rank has failed."""
        self.vector[self._points + 1 + rank] = 1.0

    def faults(self) -> list[int]:
        """Ranks of which a forward has failed."""
        return self.vector[self._points + 1 :].nonzero().flatten().tolist()

    def means(self) -> list[float]:
        """Mean loss over all ranks' samples at each point."""
        *totals, count = self.vector[: self._points + 1].tolist()
        return [total / count for total in totals]


def mean(values: list[float]) -> float:
    """Correctly rounded mean, whatever the order; not a number where one of them is not finite."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def projected_gradients(plus: list[float], minus: list[float], eps: float) -> list[float]:
    """g0_q = (L(theta + eps z_q) - L(theta - eps z_q)) / (2 eps) (MeZO, definition 1)."""
    return [(p - m) / (2.0 * eps) for p, m in zip(plus, minus, strict=True)]
