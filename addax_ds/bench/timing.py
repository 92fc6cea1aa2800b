"""Times of short actions that are compared with each other."""

import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

_Name = TypeVar("_Name", bound=Hashable)


def least_seconds(actions: dict[_Name, Callable[[], object]], repeats: int, device: torch.device) -> dict[_Name, float]:
    """Least time of each action; they take turns, so that a slow moment meets all of them."""
    least = dict.fromkeys(actions, float("inf"))
    for turn in range(repeats + 1):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first compiles and warms up
                least[name] = min(least[name], time.perf_counter() - begun)
    return least
