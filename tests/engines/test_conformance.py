"""Every engine takes the reference's step, on every model and world size."""

import pytest

from tests.engines.agreement import check_steps
from tests.engines.setups import ENGINES, batch_for, build_model, loss_for, replica_of, running
from tests.world import World

MODELS = ("llama-tied", "llama-untied", "opt", "bert")


def take_steps(engine: str, model: str, steps: int = 3) -> None:
    plain = build_model(model)
    reference = replica_of(plain)
    batches = [(batch_for(model, 5, 12, 2 * i), batch_for(model, 3, 6, 2 * i + 1)) for i in range(steps)]
    with running(engine, plain) as run:
        check_steps(run, reference, batches, loss_for(model))


def matrix() -> list:
    """All models on 3 ranks, where everything is uneven; one model, each time another, on 1, 2 and 4."""
    cells = []
    for place, engine in enumerate(ENGINES):
        for size in (1, 2, 3, 4):
            if engine == "hsdp":
                models = MODELS if size == 4 else ()
            else:
                models = MODELS if size == 3 else (MODELS[(place + size) % len(MODELS)],)
            cells += [pytest.param(size, engine, model, id=f"{engine}-{model}-{size}") for model in models]
    return cells


@pytest.mark.parametrize(("world", "engine", "model"), matrix(), indirect=["world"])
def test_three_steps_agree_with_the_reference(world: World, engine: str, model: str):
    world.run(take_steps, engine=engine, model=model)
