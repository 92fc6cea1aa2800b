"""Zeroth-order forwards may need weights that the first-order forward of the step does not enter."""

import pytest
import torch
from torch import nn

from tests.engines.setups import running
from tests.world import World

ENGINES = ("replicated", "fsdp", "zero3", "zero3-evicting")


class TwoHeads(nn.Module):
    """Blocks and two heads, of which a batch takes those that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 9)
        self.layers = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
        self.a = nn.Linear(9, 1)
        self.b = nn.Linear(9, 1)

    def forward(self, ids: torch.Tensor, heads: str) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return sum(getattr(self, head)(hidden).mean((1, 2)) + 0 for head in heads)


def ids(samples: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 50, (samples, 5), generator=torch.Generator().manual_seed(seed))


def loss_of(zo: str, fo: str):
    return lambda model, batch: model(batch, fo if torch.is_grad_enabled() else zo)


def other_heads(engine: str, samples: int) -> list:
    torch.manual_seed(0)
    with running(engine, TwoHeads()) as run:
        return [run.train_step(ids(samples, step), ids(4, step + 9), loss_of("b", "a"))["g0"] for step in range(3)]


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("samples", [2, 4])  # a micro-batch for one rank alone, or for both
@pytest.mark.parametrize("engine", ENGINES)
def test_guests_gather_what_the_host_has_not(world: World, engine: str, samples: int):
    first, second = world.run(other_heads, engine=engine, samples=samples)
    assert first == second and all(g0 for g0 in first)


def later(engine: str) -> list[str]:
    torch.manual_seed(0)
    outcomes = []
    with running(engine, TwoHeads()) as run:
        for step, (zo, fo) in enumerate([("a", "ab"), ("b", "a"), ("b", "a"), ("a", "ab"), ("b", "a")]):
            try:
                run.train_step(ids(2, step), ids(4, step + 9), loss_of(zo, fo))
                outcomes.append("taken")
            except RuntimeError as error:
                outcomes.append(str(error))
        assert run.optimizer.steps == 4
    return outcomes


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", ["fsdp", "zero3-evicting"])  # zero3 keeps weights this small
def test_needs_that_come_up_later_fail_one_step_on_every_rank_and_no_rank_waits(world: World, engine: str):
    """One rank has the only guests, and the other would not know that it must gather."""
    guests, other = world.run(later, engine=engine)
    if "which says why" in guests[1]:
        guests, other = other, guests
    assert guests[1].startswith("b is needed by zeroth-order forwards, and no first-order forward")
    assert "a forward failed on rank" in other[1]
    for outcomes in (guests, other):
        assert outcomes[:1] + outcomes[2:] == ["taken"] * 4


def no_progress() -> None:
    with running("fsdp", TwoHeads()) as run:
        run.engine.is_gathered = lambda path: False
        with pytest.raises(RuntimeError, match="was gathered, and its weights are not there"):
            run.optimizer.run_guests([lambda model: model(ids(2, 0), "a")])
        del run.engine.is_gathered
        run.optimizer.run_guests([lambda model: model(ids(2, 0), "a")])


@pytest.mark.parametrize("world", [1], indirect=True)
def test_a_gather_that_brings_nothing_is_an_error_and_no_endless_loop(world: World):
    world.run(no_progress)
