"""Methods by name, and the schedule of their directions."""

import math
from typing import Any

from pydantic.dataclasses import dataclass

from addax_ds.config.adapters import TensorTrainConfig
from addax_ds.config.checks import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuerySchedule:
    """Directions that grow with the epoch (AdaZeta, Yang et al., 2024, equation 7): min(alpha e^beta, maximum).

    Rounded down, at least 1; e counts epochs of the zeroth-order pool from 0.
    """

    alpha: float = 0.85
    beta: float = 0.45
    maximum: int = 20

    def __post_init__(self) -> None:
        require(0 < self.alpha < math.inf, f"alpha is {self.alpha}: it must be above 0, and finite")
        require(0 <= self.beta <= 10, f"beta is {self.beta}: it must lie in [0, 10]")
        require(self.maximum >= 1, f"maximum is {self.maximum}: it must be 1 or more")

    def queries(self, epoch: int) -> int:
        """Directions of a step in this epoch."""
        return max(int(min(self.alpha * epoch**self.beta, self.maximum)), 1)


BASELINES = ("sgd", "adamw")
"""Methods with an optimizer of torch's or DeepSpeed's."""

_ALL_DATA: dict[str, Any] = {"lt": "none"}
_USUAL = {**_ALL_DATA, "schedule": "linear", "checkpoint_every": 0}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "addax": ({}, {}),
    "addax-wa": ({"lt": "none"}, {}),
    "mezo": ({"alpha": 1.0}, _ALL_DATA),
    "adazeta": ({"alpha": 1.0}, {**_ALL_DATA, "adapter": TensorTrainConfig(), "query_schedule": QuerySchedule()}),
    "ip-sgd": ({"alpha": 0.0}, _ALL_DATA),
    "sgd": ({"alpha": 0.0}, _USUAL),
    "adamw": ({"alpha": 0.0}, _USUAL),
    "zero-shot": ({"steps": 0}, {**_ALL_DATA, "save": False}),
}
"""What each method says of other settings, and their defaults with it."""


def for_method(values: dict[str, Any], method: str) -> dict[str, Any]:
    """Settings that were made for another method, without those that this one sets."""
    of_method = {name for settings in METHODS.get(method, ()) for name in settings}
    return {name: value for name, value in values.items() if name not in of_method}
