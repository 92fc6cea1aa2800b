"""Peaks of memory, read from this process."""

import sys

import pytest
import torch

from addax_ds.training.memory import PeakMemory, read_peak, reset_peak

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="resident peaks are Linux's, and a GPU has its own"
)
SIZE = 2**24  # numbers, 64 MiB


def hold_and_drop(numbers: int) -> None:
    torch.ones(numbers)


def test_a_step_is_told_what_it_took_alone():
    memory = PeakMemory()
    hold_and_drop(4 * SIZE)  # before the first step
    memory.begin_step()
    begun = read_peak()
    hold_and_drop(SIZE)
    taken = memory.end_step() - begun
    assert 0.9 * 4 * SIZE < taken < 1.5 * 4 * SIZE
    assert memory.in_all > memory.in_steps + 2 * 4 * SIZE


def test_a_reset_forgets():
    hold_and_drop(2 * SIZE)
    before = read_peak()
    reset_peak()
    assert read_peak() < before - 4 * SIZE
