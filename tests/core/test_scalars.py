"""The scalars of a step do not depend on who computed which loss."""

import math

import pytest
import torch

from addax_ds.core.directions import Directions
from addax_ds.core.scalars import Scalars, mean, projected_gradients
from addax_ds.errors import UserError

ZO_SIZES, FO_SIZES = [2, 2, 1], [3, 1]


def losses(kind: int, index: int, size: int) -> torch.Tensor:
    return torch.tensor([math.sin(100 * kind + 10 * index + i) * 10.0**i for i in range(size)], dtype=torch.float64)


def reduced(ranks: int, bad: tuple[int, float] | None = None, fingerprints: list[int] | None = None) -> Scalars:
    """What every rank holds after the all-reduce when micro-batches are dealt to `ranks` ranks."""
    parts = [Scalars(Directions("shared", 2, (2, 2, 1)), FO_SIZES, ranks) for _ in range(ranks)]
    for index, size in enumerate(ZO_SIZES):
        for query in range(2):
            for sign in (1, -1):
                values = losses(2 * query + (sign < 0), index, size)
                if bad is not None and bad[0] == index:
                    values[-1] = bad[1]
                parts[index % ranks].put_zo(query, sign, index, values)
    for index, size in enumerate(FO_SIZES):
        parts[index % ranks].put_fo(index, losses(9, index, size).float().requires_grad_())
    for rank, part in enumerate(parts):
        part.put_fingerprint(rank, (fingerprints or [7] * ranks)[rank])
    parts[0].vector = torch.stack([part.vector for part in parts]).sum(dim=0)
    return parts[0]


def test_means_are_the_same_for_any_number_of_ranks():
    one = reduced(1)
    for ranks in (2, 3, 4, 7):
        other = reduced(ranks)
        other.check_fingerprints()
        assert (other.zo_means(), other.fo_mean()) == (one.zo_means(), one.fo_mean())
    plus, minus = one.zo_means()
    for query in range(2):
        for side, means in ((0, plus), (1, minus)):
            values = torch.cat([losses(2 * query + side, i, size) for i, size in enumerate(ZO_SIZES)]).tolist()
            assert means[query] == math.fsum(values) / 5


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_loss_that_is_not_finite_reaches_the_mean_on_every_rank(bad):
    plus, minus = reduced(3, bad=(1, bad)).zo_means()
    assert all(math.isnan(value) for value in plus + minus)


def test_both_infinities_are_not_a_number_instead_of_an_error():
    assert math.isnan(mean([math.inf, -math.inf]))


def test_different_batches_are_noticed():
    with pytest.raises(UserError, match="ranks 0 and 2 were given different batches"):
        reduced(3, fingerprints=[7, 7, 8]).check_fingerprints()


def test_without_samples_there_is_no_mean():
    empty = Scalars(Directions("shared", 1, ()), [], 1)
    assert empty.zo_means() == ([], []) and empty.fo_mean() is None


def test_the_mean_is_rounded_once():
    assert mean([1e16, 1.0, -1e16]) == 1 / 3
    assert projected_gradients([1.25], [1.0], 0.5) == [0.25]


def test_faults_name_their_ranks_and_leave_everything_else_alone():
    ranks = [Scalars(Directions("shared", 1, (2,)), [1], 3) for _ in range(3)]
    for rank, scalars in enumerate(ranks):
        scalars.put_fingerprint(rank, 7)
    ranks[2].put_fault(2)
    ranks[0].put_zo(0, 1, 0, torch.tensor([1.0, 3.0], dtype=torch.float64))
    ranks[0].vector = sum(scalars.vector for scalars in ranks)
    assert ranks[0].faults() == [2]
    ranks[0].check_fingerprints()
    assert ranks[0].zo_means() == ([2.0], [0.0])
    assert ranks[1].faults() == []
