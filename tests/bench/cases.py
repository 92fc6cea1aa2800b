"""Cases for ranks, in a file that costs them little to import."""

import time

import torch


def fail_on_the_second(world) -> int:
    if world.rank == 1:
        raise ValueError("this one is bad")
    torch.distributed.barrier()
    return world.size


def answer(world, number: int) -> tuple[int, int]:
    return world.rank, number


def seconds_of_an_all_reduce(world, numbers: int) -> float:
    data = torch.ones(numbers)
    torch.distributed.all_reduce(data)
    torch.distributed.barrier()
    begun = time.perf_counter()
    torch.distributed.all_reduce(data)
    return time.perf_counter() - begun
