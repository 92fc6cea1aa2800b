"""Directions of a step: spread over ranks, of each micro-batch where asked for, the same on any world size."""

import copy

import pytest
import torch

import addax_ds
from addax_ds import Addax, UserError
from addax_ds.core import lanes
from tests.engines.agreement import check_steps
from tests.engines.setups import batch_for, build_model, loss_for, running
from tests.world import World

ENGINES = ("replicated", "fsdp", "zero3", "zero3-evicting")
OWN = {"directions": "per-micro-batch", "queries": 2, "zo_micro_batch": 2}


def digests(engine: str, hyper: dict) -> list[str]:
    found = []
    with running(engine, build_model("llama-tied"), **{"alpha": 1.0, "lr": 1e-2, **hyper}) as run:
        for step in range(3):
            run.train_step(batch_for("llama", 5, 12, step), None)
            found.append(run.digest())
    return found


@pytest.mark.parametrize(("world", "engine"), [(n, e) for n in (2, 3, 4) for e in ENGINES], indirect=["world"])
def test_directions_per_micro_batch_do_not_depend_on_the_world_size(one_thread, world: World, engine: str):
    expected = digests("replicated", OWN)
    assert expected != digests("replicated", {**OWN, "directions": "shared"})
    for found in world.run(digests, engine=engine, hyper=OWN):
        assert found == expected


def take_steps(engine: str, kind: str) -> None:
    plain = build_model(kind)
    reference = copy.deepcopy(plain)
    batches = [(batch_for(kind, 5, 12, 2 * i), batch_for(kind, 3, 6, 2 * i + 1)) for i in range(3)]
    with running(engine, plain, **OWN) as run:
        check_steps(run, reference, batches, loss_for(kind))


@pytest.mark.parametrize("world", [1, 3], indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_steps_with_directions_per_micro_batch_agree_with_the_reference(world: World, engine: str):
    world.run(take_steps, engine=engine, kind="opt")


def directions_of_this_rank(engine: str, queries: int, samples: int) -> set[int]:
    drawn = set()
    perturb = lanes.perturb

    def watched(weight, start, plus, minus, name, point):
        drawn.add(point.query)
        return perturb(weight, start, plus, minus, name, point)

    lanes.perturb = watched
    try:
        with running(engine, build_model("opt"), queries=queries, alpha=1.0, zo_micro_batch=2) as run:
            metrics = run.train_step(batch_for("opt", samples, 12), None)
            assert len(metrics["g0"]) == queries
    finally:
        lanes.perturb = perturb
    return drawn


@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_take_distinct_directions_of_one_batch(world: World, engine: str):
    """Where every rank drew the same ones, four queries on four ranks would be one."""
    assert world.run(directions_of_this_rank, engine=engine, queries=4, samples=2) == [{0}, {1}, {2}, {3}]


def scheduled(engine: str) -> tuple[list[int], str]:
    with running(engine, build_model("opt"), alpha=1.0) as run:
        counts = []
        for step, queries in enumerate((1, 3, 2)):
            run.optimizer.queries = queries
            counts.append(len(run.train_step(batch_for("opt", 3, 12, step), None)["g0"]))
        return counts, run.digest()


@pytest.mark.parametrize("world", [3], indirect=True)
def test_queries_may_change_from_step_to_step(one_thread, world: World):
    expected = scheduled("replicated")
    assert expected[0] == [1, 3, 2]
    for engine in ENGINES:
        assert world.run(scheduled, engine=engine) == [expected] * 3


@pytest.mark.parametrize("kind", ["shared", "per-micro-batch"])
def test_steps_are_repeated_from_their_scalars(kind: str):
    settings = {"alpha": 1.0, "lr": 1e-2, "zo_micro_batch": 2, "directions": kind}
    model, again = build_model("opt"), build_model("opt")
    optimizer = Addax(model, **settings)
    steps = []
    for step, queries in enumerate((1, 3, 2)):
        optimizer.queries = queries
        metrics = optimizer.train_step(batch_for("opt", 5, 12, step), None)
        steps.append((metrics["seed"], tuple(metrics["g0"]), metrics["lr"]))
    Addax(again, **settings).replay(steps, zo_sizes=(2, 2, 1))
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_the_estimate_spreads_less_with_directions_per_micro_batch():
    """Four micro-batches that agree: about a quarter of the variance, for the same forwards."""
    model = build_model("opt")
    batch = {key: value.repeat(4, 1) for key, value in batch_for("opt", 2, 12).items()}
    addax_ds.token_loss(model, batch).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    spread = {}
    for kind in ("shared", "per-micro-batch"):
        total = 0.0
        for seed in range(200):
            moved = copy.deepcopy(model)
            optimizer = Addax(moved, alpha=1.0, lr=1.0, zo_micro_batch=2, directions=kind, seed=seed, eps=1e-4)
            optimizer.train_step(batch, None)
            optimizer.detach()
            pairs = zip(model.parameters(), moved.parameters(), strict=True)
            step = torch.cat([(before - after).detach().flatten() for before, after in pairs])
            total += (step - gradient).square().sum().item()
        spread[kind] = total / 200
    assert spread["per-micro-batch"] / spread["shared"] == pytest.approx(0.25, rel=0.2)


def test_what_per_micro_batch_cannot_do_is_refused():
    with pytest.raises(UserError, match="perturb: shard gathers for each direction anew"):
        Addax(build_model("opt"), directions="per-micro-batch", perturb="shard")
    optimizer = Addax(build_model("opt"), directions="per-micro-batch")
    with pytest.raises(UserError, match=r"probe\(\) sees no micro-batches"):
        optimizer.probe(lambda model: addax_ds.token_loss(model, batch_for("opt", 2, 12)))
