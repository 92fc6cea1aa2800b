"""Ways to hand Addax to deepspeed.initialize, and ZeRO-3 settings that must not matter."""

import copy
import json
from pathlib import Path

import deepspeed
import pytest

from addax_ds.optimizer import Addax
from tests.engines.agreement import check_steps
from tests.engines.setups import (
    EVICTING,
    HYPER,
    Running,
    batch_for,
    build_model,
    built_under_zero_init,
    deepspeed_config,
    loss_for,
    running,
)
from tests.world import World

MODEL = "llama-tied"


def initialize(form: str, model, stage: str, folder: str):
    """deepspeed.initialize with Addax given as `form`."""
    config = deepspeed_config(stage)
    if form == "json":
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(deepspeed_config(stage, HYPER)))
        return deepspeed.initialize(model=model, config=str(path))
    if form == "instance":
        return deepspeed.initialize(model=model, optimizer=Addax(model.parameters(), **HYPER), config=config)
    if form == "instance of a model":
        return deepspeed.initialize(model=model, optimizer=Addax(model, **HYPER), config=config)
    return deepspeed.initialize(model=model, optimizer=lambda groups: Addax(groups, **HYPER), config=config)


def take_steps(form: str, stage: str, folder: str) -> None:
    model = build_model(MODEL)
    reference = copy.deepcopy(model)
    batches = [(batch_for(MODEL, 3, 12, i), batch_for(MODEL, 3, 6, i)) for i in range(2)]
    engine, optimizer, _, _ = initialize(form, model, stage, folder)
    try:
        check_steps(Running(optimizer, optimizer.engine, model, engine), reference, batches, loss_for(MODEL))
        assert engine.global_steps == 2
    finally:
        optimizer.optimizer.detach()
        engine.destroy()


@pytest.mark.parametrize("form", ["json", "instance", "instance of a model", "callable"])
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_every_form_of_the_optimizer_takes_the_reference_step(world: World, form: str, stage: str, tmp_path):
    world.run(take_steps, form=form, stage=stage, folder=str(tmp_path))


def steps_with(zero: dict, zero_init: bool = False) -> None:
    reference = build_model(MODEL)
    model = built_under_zero_init(MODEL, "zero3") if zero_init else copy.deepcopy(reference)
    batches = [(batch_for(MODEL, 3, 12, i), batch_for(MODEL, 3, 6, i)) for i in range(4)]
    with running("zero3", model, zero=zero) as run:
        check_steps(run, reference, batches, loss_for(MODEL))


@pytest.mark.parametrize(
    "zero",
    [
        {"stage3_param_persistence_threshold": 0},
        {"stage3_param_persistence_threshold": 300},
        {**EVICTING, "stage3_prefetch_bucket_size": 2000, "stage3_max_live_parameters": 10**9},
        {"stage3_max_reuse_distance": 0},
        {"overlap_comm": False, "contiguous_gradients": False},
    ],
    ids=lambda zero: ",".join(zero),
)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_no_setting_of_zero3_leaves_stale_weights(world: World, zero: dict):
    world.run(steps_with, zero=zero)


@pytest.mark.parametrize("zero", [{}, EVICTING], ids=["defaults", "evicting"])
@pytest.mark.parametrize("world", [2, 3], indirect=True)
def test_a_model_built_under_zero_init_takes_the_reference_step(world: World, zero: dict):
    world.run(steps_with, zero=zero, zero_init=True)
