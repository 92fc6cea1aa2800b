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


def steps_of(engine: str, *steps: tuple[int, object]) -> list[str]:
    """What became of each step: (samples, loss function)."""
    torch.manual_seed(0)
    outcomes = []
    with running(engine, TwoHeads()) as run:
        for step, (samples, loss_fn) in enumerate(steps):
            try:
                run.train_step(ids(samples, step), ids(4, step + 9), loss_fn)
                outcomes.append("taken")
            except RuntimeError as error:
                outcomes.append(str(error))
        assert run.optimizer.steps == outcomes.count("taken")
    return outcomes


def later(engine: str) -> list[str]:
    heads = [("a", "ab"), ("b", "a"), ("b", "a"), ("a", "ab"), ("b", "a")]
    return steps_of(engine, *((2, loss_of(zo, fo)) for zo, fo in heads))


SHARDED = ["fsdp", "zero3-evicting"]  # zero3 keeps weights this small


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", SHARDED)
def test_needs_that_come_up_later_fail_one_step_on_every_rank_and_no_rank_waits(world: World, engine: str):
    """One rank has the only guests, and the other would not know that it must gather."""
    guests, other = world.run(later, engine=engine)
    if "which says why" in guests[1]:
        guests, other = other, guests
    assert guests[1].startswith("b is needed by zeroth-order forwards at a place where no step before has gathered it")
    assert "a forward failed on rank" in other[1]
    for outcomes in (guests, other):
        assert outcomes[:1] + outcomes[2:] == ["taken"] * 4


def head_by_batch(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """First-order on a; zeroth-order on b where the first id is even."""
    is_even = batch[0, 0] % 2 == 0
    return model(batch, "b" if not torch.is_grad_enabled() and is_even else "a")


def other_needs_on_every_rank(engine: str) -> list[str]:
    return steps_of(engine, *[(4, head_by_batch)] * 4)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", ["replicated", *SHARDED])
def test_ranks_whose_guests_need_other_weights_gather_for_each_other(world: World, engine: str):
    firsts = [[int(ids(4, step)[2 * rank, 0]) % 2 for rank in range(2)] for step in range(3)]
    assert firsts == [[0, 1], [1, 0], [0, 0]], "one of them needs b, the other, both"
    for outcomes in world.run(other_needs_on_every_rank, engine=engine):
        assert outcomes == ["taken"] * 4


def fails_before_its_forward(engine: str) -> list[str]:
    """In the fourth step rank 0's guests fail at once, when the others gather beyond the host."""

    def failing(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and torch.distributed.get_rank() == 0:
            raise RuntimeError("of this rank")
        return loss_of("b", "a")(model, batch)

    later = [(4, loss_of("b", "a"))] * 2
    return steps_of(engine, (4, loss_of("a", "ab")), *later, (4, failing), *later)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", SHARDED)
def test_a_rank_whose_guests_fail_gathers_what_has_come_up_since_the_first_step(world: World, engine: str):
    one, other = world.run(fails_before_its_forward, engine=engine)
    assert one[3] == "of this rank" and "failed on rank 0, which says why" in other[3]
    for outcomes in (one, other):
        assert outcomes[0] == outcomes[2] == outcomes[4] == outcomes[5] == "taken"
        assert outcomes[1] != "taken"


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
