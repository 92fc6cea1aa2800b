"""Rehearsals of SmolLM2-135M, held against real steps: other lengths, batches, methods, ranks and both engines."""

import pytest

from addax_ds.plan.batches import LAST_TOKEN
from addax_ds.plan.rehearse import rehearse
from tests.plan.real import SHAPES, STEP_SECONDS, allocated, compare, measured, run_of, under_zero
from tests.world import World

pytestmark = pytest.mark.timeout(2 * STEP_SECONDS)

BFLOAT16 = {"dtype": "bfloat16"}
POINTS = [
    (1, "fsdp", "addax", BFLOAT16, (2, 512), (2, 128)),
    (1, "fsdp", "ip-sgd", BFLOAT16, (1, 64), (3, 160)),
    (1, "zero3", "addax", BFLOAT16, (2, 256), (2, 64)),
    (2, "fsdp", "addax", {}, (2, 320), (1, 64)),
    (2, "fsdp", "mezo", BFLOAT16, (4, 192), (1, 64)),
    (2, "fsdp", "adamw", BFLOAT16, (1, 64), (1, 128)),
    (2, "zero3", "addax", BFLOAT16, (1, 448), (2, 96)),
    (2, "zero3", "mezo", {}, (4, 128), (1, 64)),
    (4, "fsdp", "addax", BFLOAT16, (2, 256), (1, 128)),
    (4, "fsdp", "lora", BFLOAT16, (1, 64), (2, 128)),
    (4, "zero3", "addax", BFLOAT16, (1, 384), (1, 128)),
    (4, "zero3", "ip-sgd", BFLOAT16, (1, 64), (1, 160)),
]
"""Ranks, engine, method, settings, and samples and tokens of either batch of a rank."""


@pytest.mark.parametrize(("world", "engine", "method", "more", "zo", "fo"), POINTS, indirect=["world"])
def test_the_plan_of_smollm2_is_what_its_steps_take(
    record_property, world: World, tmp_path, engine, method, more, zo, fo
):
    batches = {"zo_micro_batch": zo[0], "fo_micro_batch": fo[0], "k0": zo[0] * world.size, "k1": fo[0] * world.size}
    settings = {**more, **batches, **(under_zero(tmp_path, {}) if engine == "zero3" else {})}
    compare(record_property, world, method, "smollm2-135m", zo[1], fo[1], **settings)


@pytest.mark.parametrize(
    ("world", "engine", "method"),
    [(1, "fsdp", "ip-sgd"), (1, "fsdp", "adamw"), (1, "zero3", "ip-sgd")],
    indirect=["world"],
)
def test_torchs_allocator_counts_the_same_bytes(record_property, world: World, tmp_path, engine, method):
    config = run_of(method, 1, **(under_zero(tmp_path, {}) if engine == "zero3" else {}))
    shape = SHAPES["smollm2-135m"]()
    planned = rehearse(shape, config, 1, 64, 192).peak
    step = {"shape": shape, "config": config, "long": 64, "short": 192}
    counted = world.run(allocated, seconds=STEP_SECONDS, **step)[0]
    figures = f"{planned / 1e6:6.1f} MB, counted {counted / 1e6:6.1f}, {planned / counted - 1:+.2%}"
    record_property("peak by torch's allocator", f"smollm2-135m {engine:5} {method:7} {figures}")
    assert planned == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("world", [1], indirect=True)
def test_adazeta_takes_less_than_an_eighth_of_what_adamw_takes(record_property, world: World):
    sizes = {"zo_micro_batch": 4, "fo_micro_batch": 4, "k0": 4, "k1": 4}
    peaks = {}
    for method in ("adazeta", "adamw"):
        config = run_of(method, 1, **BFLOAT16, **sizes)
        case = {"shape": SHAPES["smollm2-135m"](), "config": config, "long": 512, "short": 512}
        case["targets"] = LAST_TOKEN
        peaks[method] = world.run(measured, seconds=STEP_SECONDS, **case)[0].peak
        record_property("measured peak", f"smollm2-135m, 4 x 512 tokens, {method:7} {peaks[method] / 1e6:7.1f} MB")
    assert 8 * peaks["adazeta"] <= peaks["adamw"]
