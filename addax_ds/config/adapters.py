"""What is trained in place of all weights."""

from typing import Literal, TypeAlias

from pydantic.dataclasses import dataclass

from addax_ds.config.checks import STRICT, Items, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TensorTrainConfig:
    """Tensor-train adapters (AdaZeta, Yang et al., EMNLP 2024), after attention and feed-forward of every block."""

    kind: Literal["tensor-train"] = "tensor-train"
    bottleneck: int = 64
    """Width between the two layers of an adapter."""
    rank: int = 5
    """Rank of every bond between cores."""
    hidden_modes: Items[int] | None = None
    """Modes that multiply to the hidden size; without them balanced factors of it."""
    bottleneck_modes: Items[int] | None = None
    """Modes that multiply to the bottleneck, the same way."""
    groups: Literal[2, 3, 4] = 2
    """Chains into which the cores of a layer are contracted apart from each other."""
    activation: Literal["gelu", "relu", "none"] = "gelu"
    """Between the two layers; with none an adapter is linear, and can be merged."""
    bias: bool = True
    """Whether both layers have one."""
    modules: Items[str] | None = None
    """Paths of the projections that adapters follow, * stands for any text; without them the last ones of
    attention and of the feed-forward part of every block, for models whose names are known."""

    def __post_init__(self) -> None:
        for name in ("bottleneck", "rank"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")
        require(self.modules != (), "modules is empty: name projections, or leave it out")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2022), through peft."""

    kind: Literal["lora"] = "lora"
    rank: int = 8
    alpha: int = 16
    """The product of both matrices is multiplied by alpha / rank."""
    modules: Items[str] | None = None
    """Names of the modules that have them; peft's for the model (queries and values) without any."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be 1 or more")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrefixConfig:
    """Trainable keys and values before the prompt (Li & Liang, 2021), through peft."""

    kind: Literal["prefix"] = "prefix"
    tokens: int = 5
    """Positions of the prefix; they begin as those of random words."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, f"tokens is {self.tokens}: it must be 1 or more")


AdapterConfig: TypeAlias = TensorTrainConfig | LoraConfig | PrefixConfig
EPS = {"tensor-train": 1e-2, "lora": 1e-2, "prefix": 1e-1}
"""Perturbation scale by kind, of LoRA and prefixes MeZO's (Malladi et al., 2023): adapters move the loss little, with
the scale of all weights less than a bfloat16 backbone rounds."""
ADAPTERS: dict[str, type] = {"tensor-train": TensorTrainConfig, "lora": LoraConfig, "prefix": PrefixConfig}
