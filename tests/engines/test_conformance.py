"""Every engine takes the reference's step, on every model and world size."""

import copy

import pytest

from tests.engines.agreement import check_steps
from tests.engines.setups import ENGINES, TWO_BY_TWO, batch_for, build_model, loss_for, running
from tests.world import World

MODELS = ("llama-tied", "llama-untied", "opt", "bert")


def take_steps(engine: str, model: str, steps: int = 3) -> None:
    plain = build_model(model)
    reference = copy.deepcopy(plain)
    batches = [(batch_for(model, 5, 12, 2 * i), batch_for(model, 3, 6, 2 * i + 1)) for i in range(steps)]
    with running(engine, plain) as run:
        check_steps(run, reference, batches, loss_for(model))


def matrix() -> list:
    """Each engine on each world size with another model; each kind of engine with every model."""
    cells = []
    for place, engine in enumerate(ENGINES):
        sizes = (4,) if engine in TWO_BY_TWO else (1, 2, 3, 4)
        for size in sizes:
            # On 3 ranks everything is uneven; on 4 some ranks own nothing of a small parameter.
            every = (engine, size) in (("replicated", 3), ("fsdp", 3), ("zero3", 3), ("zero3-evicting", 3), ("hsdp", 4))
            models = MODELS if every else (MODELS[(place + size) % len(MODELS)],)
            cells += [pytest.param(size, engine, model, id=f"{engine}-{model}-{size}") for model in models]
    # The other families once each: how guests find their weights is a matter of the model, not of the engine.
    cells += [pytest.param(2, "fsdp", model, id=f"fsdp-{model}-2") for model in ("gpt2", "qwen3", "mixtral")]
    return cells


@pytest.mark.parametrize(("world", "engine", "model"), matrix(), indirect=["world"])
def test_three_steps_agree_with_the_reference(world: World, engine: str, model: str):
    world.run(take_steps, engine=engine, model=model)
