"""The method alone, which is what the optimizer holds. Names are those of the paper where it has one."""

import math
from typing import Literal

from pydantic.dataclasses import dataclass

from addax_ds.config.checks import STRICT, Items, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AddaxConfig:
    """Hyper-parameters of the Addax step (Li et al., ICLR 2025, algorithm 1).

    theta <- theta - lr * (alpha * mean_q(g0_q z_q) + (1 - alpha) * g1 + weight_decay * theta)
    """

    lr: float = 1e-3
    """Learning rate (eta), 0 or more."""
    alpha: float = 1e-3
    """Weight of the zeroth-order part, in [0, 1]: 1 is MeZO, 0 is in-place SGD."""
    eps: float = 1e-3
    """Perturbation scale of the two-sided difference, above 0; runs of adapters have 1e-2, of prefixes 1e-1."""
    queries: int = 1
    """Directions that each zeroth-order sample is measured along (Q of n-SPSA), averaged."""
    directions: Literal["shared", "per-micro-batch"] = "shared"
    """Whether all zeroth-order micro-batches of a step have the same directions, or each its own."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as a multiple of lr."""
    distribution: Literal["normal", "rademacher"] = "normal"
    """Distribution of the perturbation z."""
    perturb: Literal["gathered", "shard", "auto"] = "gathered"
    """Where the noise is added: to gathered weights, which one gather serves; to each rank's shard on
    the way into a gather for every point, which draws less; or whichever a trial finds to cost less."""
    atomic: Items[str] = ()
    """Paths of modules whose forward reads weights of modules within it, * stands for any text: zeroth-order
    forwards hold those weights together. Torch's own such modules need not be named."""
    max_loss: float = math.inf
    """A step with a mean loss above this writes nothing on any rank, like one with a loss that is not finite."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How an update is rounded to bfloat16 weights; float32 weights need none."""
    seed: int = 0
    """Root seed of the run; every step derives its own."""
    dropout: bool = False
    """Dropout in the first-order forward. Zeroth-order forwards never have any."""
    zo_micro_batch: int = 1
    """Samples in one zeroth-order micro-batch: the unit that is dealt to ranks."""
    fo_micro_batch: int = 1
    """Samples in one first-order micro-batch. A rank that gets more than one a step needs one
    float32 buffer of the size of its shard."""

    def __post_init__(self) -> None:
        require(0 <= self.lr < math.inf, f"lr is {self.lr}: it must be 0 or more, and finite")
        require(0 <= self.alpha <= 1, f"alpha is {self.alpha}: it must lie in [0, 1]")
        require(0 < self.eps < math.inf, f"eps is {self.eps}: it must be above 0, and finite")
        require(self.max_loss > 0, f"max_loss is {self.max_loss}: it must be above 0")
        require(self.queries >= 1, f"queries is {self.queries}: it must be 1 or more")
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}: it must be 0 or more, and finite",
        )
        require(0 <= self.seed < 2**53, f"seed is {self.seed}: it must lie in [0, 2**53)")
        require(
            self.directions == "shared" or self.perturb != "shard",
            "perturb: shard gathers for each direction anew, and here each micro-batch has its own: "
            "set perturb: gathered, or directions: shared",
        )
        require(self.zo_micro_batch >= 1, f"zo_micro_batch is {self.zo_micro_batch}: it must be 1 or more")
        require(self.fo_micro_batch >= 1, f"fo_micro_batch is {self.fo_micro_batch}: it must be 1 or more")
