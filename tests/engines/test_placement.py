"""Where the noise is added changes no bit, only what is drawn and what goes over the wire."""

import contextlib

import pytest
import torch

from addax_ds.core import moved
from addax_ds.engines import placement
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from tests.engines.setups import batch_for, build_model, loss_for, running
from tests.engines.test_collectives import count_step
from tests.world import World

SIZES = {
    "fsdp": (1, 2, 3),
    "fsdp-offload": (2,),
    "hsdp": (4,),
    "zero3": (2,),
    "zero3-evicting": (1, 3),
    "zero3-offload": (2,),
    "zero3-hpz": (4,),
}
CELLS = [pytest.param(size, engine, id=f"{engine}-{size}") for engine, sizes in SIZES.items() for size in sizes]


def add_unused_and_frozen(model: torch.nn.Module) -> None:
    torch.manual_seed(3)
    model.model.layers[0].unused = torch.nn.Linear(15, 5, dtype=model.dtype)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


@contextlib.contextmanager
def heads_in_chunks():
    """As the heads of large vocabularies are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moved, "CHUNK", 300)
        yield


def three_steps(engine: str, perturb: str, dtype: torch.dtype, **hyper) -> list:
    """Losses, g0 and digest of each of three steps."""
    model = build_model("llama-tied", dtype)
    add_unused_and_frozen(model)
    seen: list = []
    with running(engine, model, perturb=perturb, queries=2, **hyper) as run:
        for step in range(3):
            # One micro-batch, then three: some ranks have none of their own.
            zo, fo = batch_for("llama", 1 + 2 * step, 12, step), batch_for("llama", 3, 6, step + 5)
            metrics = run.train_step(zo, fo)
            seen.append((metrics["loss_zo"], metrics["loss_fo"], metrics["g0"], run.digest()))
        run.optimizer.probe(lambda guest: loss_for("llama")(guest, zo))
        seen.append(run.optimizer.placement)
    return seen


def both_placements(engine: str) -> None:
    for dtype, hyper in ((torch.float32, {}), (torch.bfloat16, {"alpha": 1.0, "distribution": "rademacher"})):
        with heads_in_chunks():
            *gathered, first = three_steps(engine, "gathered", dtype, **hyper)
            *shard, second = three_steps(engine, "shard", dtype, **hyper)
        assert (first, second) == ("gathered", "shard")
        assert gathered == shard


@pytest.mark.parametrize(("world", "engine"), CELLS, indirect=["world"])
def test_losses_g0_and_weights_are_the_same_bits_wherever_the_noise_is_added(world: World, engine: str):
    world.run(both_placements, engine=engine)


def count_both(engine: str) -> None:
    plain, plain_bytes, _ = count_step(engine, "llama-untied", alpha=0.0)
    weights = len(list(build_model("llama-untied").parameters()))
    for queries in (1, 2):
        shard, shard_bytes, _ = count_step(engine, "llama-untied", perturb="shard", queries=queries)
        gathers = shard["_allgather_base_"] - plain.get("_allgather_base_", 0)
        assert gathers == 2 * queries * weights, "one gather of every weight for each point"
        _, once_bytes, _ = count_step(engine, "llama-untied", alpha=1.0)
        extra = shard_bytes["_allgather_base_"] - plain_bytes.get("_allgather_base_", 0)
        assert extra == 2 * queries * once_bytes["_allgather_base_"]
        assert shard["allreduce_"] == 1


@pytest.mark.parametrize("engine", ["fsdp", "zero3-evicting"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_noise_on_shards_costs_a_gather_for_every_point(world: World, engine: str):
    world.run(count_both, engine=engine)


def measured(engine: str) -> tuple[str, str]:
    with running(engine, build_model("llama-tied"), perturb="auto") as run:
        run.train_step(batch_for("llama", 1, 12), batch_for("llama", 3, 6))
        return run.optimizer.placement, run.optimizer.placement_reason


def automatic(engine: str, noise: float, link: float) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_noise_speed", lambda *_: noise)
        patch.setattr(placement, "_link_speed", lambda *_: link)
        return measured(engine)


def automatic_for_a_norm(engine: str) -> str:
    """All but the last norm is frozen: little noise, and every gather is as large as ever."""
    model = build_model("llama-tied").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_noise_speed", lambda *_: 1e6)
        patch.setattr(placement, "_link_speed", lambda *_: 2e7)
        with running(engine, model, perturb="auto") as run:
            run.train_step(batch_for("llama", 1, 12), batch_for("llama", 3, 6))
            return run.optimizer.placement


@pytest.mark.parametrize("engine", ["fsdp", "zero3-evicting"])
@pytest.mark.parametrize("world", [3], indirect=True)
def test_auto_counts_the_gathers_of_frozen_weights(world: World, engine: str):
    assert {choice for choice, _ in world.run(automatic, engine=engine, noise=1e6, link=2e7)} == {"shard"}
    assert set(world.run(automatic_for_a_norm, engine=engine)) == {"gathered"}


@pytest.mark.parametrize(("noise", "link", "choice"), [(1e6, 1e12, "shard"), (1e9, 1e6, "gathered")])
@pytest.mark.parametrize("world", [3], indirect=True)
def test_auto_takes_what_costs_less_and_says_why(world: World, noise: float, link: float, choice: str):
    answers = world.run(automatic, engine="fsdp", noise=noise, link=link)
    assert len(set(answers)) == 1
    assert answers[0][0] == choice
    assert all(word in answers[0][1] for word in ("noise", "link", "3 shards", "gathered costs", "shard"))


@pytest.mark.parametrize("engine", ["fsdp", "zero3", "replicated"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_auto_measures_the_same_choice_on_every_rank(world: World, engine: str):
    first, second = world.run(measured, engine=engine)
    assert first[0] == second[0]
    assert engine != "replicated" or first == ("gathered", "every rank holds every weight")


def test_noise_on_shards_needs_shards():
    with pytest.raises(UserError, match="perturb: shard needs sharded weights"):
        Addax(build_model("llama-tied"), perturb="shard")
