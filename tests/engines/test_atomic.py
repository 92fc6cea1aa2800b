"""Modules whose forward reads weights of modules within them: torch's own, and those that are named."""

import copy
import re

import pytest
import torch
from torch import nn

from addax_ds import Addax, UserError
from tests.engines.agreement import check_steps
from tests.engines.setups import running
from tests.world import World

ENGINES = ("replicated", "fsdp", "zero3", "zero3-evicting")


class Reading(nn.Module):
    """Reads its inner layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.scale @ self.inner.weight.T + self.inner.bias)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


def encoder() -> nn.Module:
    # Its fused kernel, which guests would take alone, is not bit-equal to the host's way.
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True, activation=torch.tanh)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        make = {"reading": Reading, "attention": Attending, "encoder": encoder}[kind]
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).mean((1, 2))


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model(kind)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.head.bias.data.fill_(0.5)  # a step that takes it near zero would leave of it what is rounded alone
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square()


def take_steps(engine: str, kind: str, alpha: float) -> None:
    plain = model_of(kind)
    reference = copy.deepcopy(plain)
    with running(engine, plain, alpha=alpha, atomic=["layers.*"] if kind == "reading" else []) as run:
        check_steps(run, reference, [(batch(2 * step), batch(2 * step + 1)) for step in range(3)], loss)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["reading", "attention", "encoder"])
@pytest.mark.parametrize("engine", ENGINES)
def test_their_steps_agree_with_the_reference(world: World, engine: str, kind: str, alpha: float):
    world.run(take_steps, engine=engine, kind=kind, alpha=alpha)


def take_a_step_without_the_setting(engine: str, alpha: float) -> str:
    with running(engine, model_of("reading"), alpha=alpha) as run:
        with pytest.raises((UserError, RuntimeError)) as caught:
            run.train_step(batch(0), batch(1), loss)
        return str(caught.value)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_the_setting_they_are_refused_with_it(world: World, engine: str, alpha: float):
    for message in world.run(take_a_step_without_the_setting, engine=engine, alpha=alpha):
        assert re.search(r"layers\.0\.inner\.weight is read outside .* for example \[layers\.0\]", message)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"atomic: \*\.attn matches no module of the model"):
        Addax(model_of("reading"), atomic=["*.attn"])


def test_compiled_modules_are_told_how_to_be_compiled():
    model = model_of("reading")
    model.layers[0] = torch.compile(model.layers[0])
    with pytest.raises(UserError, match=r"layers\.0 was wrapped by torch.compile.* module\.compile\(\)"):
        Addax(model)
