"""Peaks of memory, read from a process.

It is a process of its own: garbage of other tests, collected in the middle, would hide what is held.
"""

import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from addax_ds.training.memory import PeakMemory, read_peak, reset_peak
from tests.forkserver import context

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="resident peaks are Linux's, and a GPU has its own"
)
SIZE = 2**24  # numbers, 64 MiB


def hold_and_drop(numbers: int) -> None:
    torch.ones(numbers)


def take_a_step() -> tuple[int, int, int]:
    """Bytes that a step took, and the peaks in steps and in all, where more was held before."""
    memory = PeakMemory()
    hold_and_drop(4 * SIZE)
    memory.begin_step()
    begun = read_peak()
    hold_and_drop(SIZE)
    return memory.end_step() - begun, memory.in_steps, memory.in_all


def forget() -> tuple[int, int]:
    """Peaks before and after a reset."""
    hold_and_drop(2 * SIZE)
    before = read_peak()
    reset_peak()
    return before, read_peak()


@pytest.fixture
def process():
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        yield pool


def test_a_step_is_told_what_it_took_alone(process):
    taken, in_steps, in_all = process.submit(take_a_step).result()
    assert 0.9 * 4 * SIZE < taken < 1.5 * 4 * SIZE
    assert in_all > in_steps + 2 * 4 * SIZE


def test_a_reset_forgets(process):
    before, after = process.submit(forget).result()
    assert after < before - 4 * SIZE
