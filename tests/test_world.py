"""The harness itself: a test suite that cannot fail or that hangs proves nothing."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.world import CaseError, World

PAIR = pytest.mark.parametrize("world", [2], indirect=True)


def total_of_ranks(add: int) -> tuple[int, int]:
    value = torch.tensor(dist.get_rank() + add)
    dist.all_reduce(value)
    return int(value), os.getpid()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    dist.barrier()


def leave_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def wait_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(1000)
    dist.barrier()


@PAIR
def test_a_world_is_started_once_and_talks(world: World):
    first, second = world.run(total_of_ranks, add=1), world.run(total_of_ranks, add=2)
    assert [total for total, _ in first] == [3, 3]
    assert [total for total, _ in second] == [5, 5]
    assert [pid for _, pid in first] == [pid for _, pid in second]


@PAIR
@pytest.mark.parametrize(
    ("case", "evidence"),
    [(raise_on, "KeyError: 'the cause'"), (leave_on, "rank 1 of 2 died"), (wait_on, "in wait_on")],
)
def test_an_error_a_death_and_a_hang_fail_and_the_next_case_works(world: World, case, evidence):
    world.run(total_of_ranks, add=1)  # started, so that the limit is the case's alone
    began = time.monotonic()
    with pytest.raises(CaseError, match=evidence):
        world.run(case, rank=1, seconds=5)
    assert time.monotonic() - began < 60
    assert [total for total, _ in world.run(total_of_ranks, add=1)] == [3, 3]
