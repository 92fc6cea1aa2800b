"""What must not depend on engine or world size by a single bit."""

import pytest
import torch
from torch import nn

from tests.engines.setups import ENGINES, TWO_BY_TWO, batch_for, build_model, loss_for, running
from tests.world import World

ZO_HYPER = {"alpha": 1.0, "lr": 1e-2, "queries": 2, "weight_decay": 0.05}
CELLS = [
    pytest.param(size, engine, id=f"{engine}-{size}")
    for engine in ENGINES
    for size in (
        (4,) if engine in TWO_BY_TWO else (1, 2, 3, 4) if engine in ("replicated", "fsdp", "zero3-evicting") else (3,)
    )
]


def zeroth_order_digests(engine: str) -> list[str]:
    """Digests after each of 3 steps in float32 (normal), then 3 in bfloat16 (signs, rounded stochastically)."""
    digests = []
    for dtype, distribution in ((torch.float32, "normal"), (torch.bfloat16, "rademacher")):
        with running(engine, build_model("llama-tied", dtype), distribution=distribution, **ZO_HYPER) as run:
            for step in range(3):
                run.train_step(batch_for("llama", 5, 12, step), None)
                digests.append(run.digest())
    return digests


@pytest.fixture(scope="module")
def one_process_digests() -> list[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a world
    digests = zeroth_order_digests("replicated")
    torch.set_num_threads(threads)
    return digests


@pytest.mark.parametrize(("world", "engine"), CELLS, indirect=["world"])
def test_zeroth_order_weights_are_those_of_one_process(world: World, engine: str, one_process_digests: list[str]):
    assert len(set(one_process_digests)) == 6
    for digests in world.run(zeroth_order_digests, engine=engine):
        assert digests == one_process_digests


def mixed_digests(engines: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        digests = {}
        for engine in engines:
            with running(engine, build_model("opt", dtype)) as run:
                for step in range(2):
                    run.train_step(batch_for("opt", 3, 12, step), batch_for("opt", 3, 6, step + 5))
                digests[engine] = run.digest()
        assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("world", [1], indirect=True)
def test_without_a_reduction_mixed_steps_are_bit_equal_on_every_engine(world: World):
    world.run(mixed_digests, engines=[engine for engine in ENGINES if engine != "hsdp"])


def bfloat16_step(engine: str) -> None:
    """A mixed bfloat16 step against one in float32 arithmetic from the same weights."""
    zo, fo = batch_for("llama", 5, 12), batch_for("llama", 3, 6, 1)
    plain = build_model("llama-untied", torch.bfloat16)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    wide = build_model("llama-untied", torch.bfloat16).float()
    with running(engine, plain, rounding="nearest", lr=1.0) as run:
        metrics = run.train_step(zo, fo)
        after, config = run.weights(), run.optimizer.config
    from addax_ds.reference import addax_step

    expected, _ = addax_step(wide, [zo], [fo], loss_for("llama"), config, 0, g0=metrics["g0"])
    moved = 0
    for name, weight in after.items():
        step = expected[name] - before[name].float()
        # bfloat16 keeps 8 bits: a weight is rounded once. Gradients pass through bfloat16 activations
        # and sums over LAYERS blocks; 5 % of the step's norm bounds what they lose at this depth.
        error = (weight.float() - expected[name]).norm()
        assert error <= 2**-8 * expected[name].norm() + 0.05 * step.norm(), name
        moved += int((weight != before[name]).sum())
    assert moved > 1000


@pytest.mark.parametrize(
    ("world", "engine"), [(3, "fsdp"), (3, "zero3"), (3, "replicated"), (4, "hsdp")], indirect=["world"]
)
def test_bfloat16_mixed_steps_are_near_the_float32_step(world: World, engine: str):
    world.run(bfloat16_step, engine=engine)


def guests_outputs(engine: str, model: str) -> None:
    plain = build_model(model).eval()
    inputs = [{k: v for k, v in batch_for(model, 3, 6 + i, i).items() if k != "labels"} for i in range(2)]
    with torch.no_grad():
        expected = [plain(**one).logits for one in inputs]

    def logits_of(one: dict) -> object:
        return lambda guest: guest(**one).logits

    with running(engine, plain) as run:
        before = run.digest()
        outputs = run.optimizer.run_guests([logits_of(one) for one in inputs])
        assert run.digest() == before
    for got, wanted in zip(outputs, expected, strict=True):
        assert isinstance(got, torch.Tensor) and not isinstance(got, nn.Parameter)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("model", ["llama-tied", "opt-dropout", "bert"])
@pytest.mark.parametrize(
    ("world", "engine"),
    [
        (2, "replicated"),
        (2, "fsdp"),
        (2, "fsdp-offload"),
        (2, "zero3"),
        (2, "zero3-evicting"),
        (2, "zero3-offload"),
        (4, "hsdp"),
        (4, "zero3-hpz"),
    ],
    indirect=["world"],
)
def test_guests_compute_what_the_plain_model_computes(world: World, engine: str, model: str):
    world.run(guests_outputs, engine=engine, model=model)
