"""Every sample is measured along its directions, once; the shares of ranks are alike and distinct."""

import itertools
import math

import pytest
import torch

from addax_ds.core.directions import Directions
from addax_ds.core.scalars import Scalars

KINDS = ("shared", "per-micro-batch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("sizes", [(4,), (2, 2, 1)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 20])
def test_ranks_share_all_pairs_and_none_has_two_more_than_another(kind, queries, sizes, ranks):
    directions = Directions(kind, queries, sizes)
    shares = [directions.share(rank, ranks) for rank in range(ranks)]
    assert sorted(itertools.chain(*shares)) == sorted(directions.pairs())
    assert len(set(directions.pairs())) == queries * len(sizes)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_queries_of_one_micro_batch_are_distinct_directions_on_every_rank():
    directions = Directions("shared", 4, (8,))
    assert [directions.share(rank, 4) for rank in range(4)] == [[(0, 0)], [(1, 0)], [(2, 0)], [(3, 0)]]


def test_a_rank_has_as_few_directions_as_can_be():
    directions = Directions("shared", 2, (1, 1, 1, 1))
    for rank in range(2):
        assert {direction for direction, _ in directions.share(rank, 2)} == {rank}


def test_numbers_of_directions():
    assert Directions("shared", 3, (2, 2, 1)).count == 3
    own = Directions("per-micro-batch", 3, (2, 2, 1))
    assert own.count == 9
    assert [list(own.of(index)) for index in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert all(list(own.micro_batches(direction)) == [direction // 3] for direction in range(9))
    for kind in KINDS:
        assert Directions(kind, 3, ()).count == 0


def test_an_estimate_weighs_every_sample_alike():
    shared = Directions("shared", 2, (2, 2, 1))
    assert shared.coefficients(0.5, [3.0, 5.0]) == (0.75, 1.25)
    own = Directions("per-micro-batch", 2, (2, 2, 1))
    g0 = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = [0.5 * g * size / 5 / 2 for g, size in zip(g0, (2, 2, 2, 2, 1, 1), strict=True)]
    assert own.coefficients(0.5, g0) == pytest.approx(expected)
    for kind in KINDS:
        whole = Directions(kind, 2, (2, 2, 1))
        assert math.fsum(whole.coefficients(1.0, [1.0] * whole.count)) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_queries_follows_from_the_scalars(kind):
    directions = Directions(kind, 3, (2, 2, 1))
    assert Directions.of_scalars(kind, [0.0] * directions.count, (2, 2, 1)) == directions


def test_means_of_micro_batches_are_their_own():
    sizes = (2, 2, 1)
    parts = [Scalars(Directions("per-micro-batch", 2, sizes), [1], 3) for _ in range(3)]
    for rank, part in enumerate(parts):
        for direction, index in Directions("per-micro-batch", 2, sizes).share(rank, 3):
            for sign in (1, -1):
                losses = torch.arange(sizes[index], dtype=torch.float64) + 10 * direction + sign
                part.put_zo(direction, sign, index, losses)
    parts[0].put_fo(0, torch.tensor([7.0]))
    parts[0].vector = torch.stack([part.vector for part in parts]).sum(dim=0)
    plus, minus = parts[0].zo_means()
    offsets = [(sizes[direction // 2] - 1) / 2 for direction in range(6)]
    assert plus == [10 * direction + 1 + offset for direction, offset in enumerate(offsets)]
    assert minus == [10 * direction - 1 + offset for direction, offset in enumerate(offsets)]
    assert parts[0].fo_mean() == 7


@pytest.mark.parametrize(
    ("queries", "ranks", "micro_batches", "drawn"),
    [(1, 4, 4, 1), (4, 4, 1, 1), (8, 4, 1, 2), (2, 4, 1, 1), (4, 2, 2, 2)],
)
def test_the_noise_that_a_rank_draws(queries, ranks, micro_batches, drawn):
    assert Directions("shared", queries, (2,) * micro_batches).most_of_a_rank(ranks) == drawn
