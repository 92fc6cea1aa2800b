"""Traffic: zeroth-order forwards ride on the gathers of the first-order step."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from addax_ds.core.lanes import Lanes
from addax_ds.engines.fsdp import parameter_groups_of
from tests.engines.setups import batch_for, build_model, loss_for, running
from tests.world import World

GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_", "allgather_", "broadcast_")
REDUCTIONS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_", "allreduce_")


class Collectives(TorchDispatchMode):
    """Counts every c10d operation and its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            assert name in (*GATHERS, *REDUCTIONS, "barrier"), f"{name} is not known to this count"
            self.number[name] += 1
            self.bytes[name] += sum(t.numel() * t.element_size() for t in _tensors(args))
        return function(*args, **(kwargs or {}))


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def count_step(engine: str, model: str, **hyper) -> tuple[dict, dict, int]:
    """Collectives of the third step (ZeRO-3 has its trace by then): numbers, bytes, units."""
    with running(engine, build_model(model), **hyper) as run:
        for step in range(2):
            run.train_step(batch_for(model, 4, 12, step), batch_for(model, 4, 6, step))
        with Collectives() as counted:
            run.train_step(batch_for(model, 4, 12, 2), batch_for(model, 4, 6, 2))
        units = len(run.engine.units)
    return dict(counted.number), dict(counted.bytes), units


def compare_mixed_with_first_order(engine: str, model: str) -> None:
    plain, plain_bytes, units = count_step(engine, model, alpha=0.0)
    gathers = {name: number for name, number in plain.items() if name in GATHERS}
    assert sum(gathers.values()) > 0 or engine == "replicated"
    if engine == "fsdp":  # once for the forward, once for the backward
        assert gathers == {"_allgather_base_": 2 * units}
        assert plain["_reduce_scatter_base_"] == units
    for queries in (1, 2):
        mixed, mixed_bytes, _ = count_step(engine, model, queries=queries)
        assert mixed == plain, f"queries={queries}: {mixed}, a first-order step has {plain}"
        # The scalars' vector is all that grows: a float64 for each sign, direction and sample of 4.
        mixed_bytes["allreduce_"] -= 2 * queries * 4 * 8
        assert mixed_bytes == plain_bytes
        assert engine == "replicated" or mixed["allreduce_"] == 1


@pytest.mark.parametrize("model", ["llama-untied", "opt"])
@pytest.mark.parametrize("engine", ["fsdp", "zero3", "zero3-evicting", "replicated"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_mixed_step_has_the_collectives_of_a_first_order_step(world: World, engine: str, model: str):
    world.run(compare_mixed_with_first_order, engine=engine, model=model)


def count_zeroth_order(engine: str, model: str) -> None:
    plain = build_model(model)
    # FSDP2 pads rows, ZeRO-3 elements.
    rows = {name: p[0].numel() if engine == "fsdp" else 1 for name, p in plain.named_parameters()}
    padded = sum((p.numel() + p.numel() // rows[name] % 2 * rows[name]) * 4 for name, p in plain.named_parameters())
    for queries in (1, 2):
        numbers, sizes, units = count_step(engine, model, alpha=1.0, queries=queries)
        assert numbers == {"_allgather_base_": units, "allreduce_": 1}, numbers
        # The count holds what a rank sends, 1/2, beside the whole that it receives.
        assert sizes["_allgather_base_"] == padded * 3 // 2


@pytest.mark.parametrize("engine", ["fsdp", "zero3", "zero3-evicting"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_zeroth_order_step_gathers_every_weight_once(world: World, engine: str):
    world.run(count_zeroth_order, engine=engine, model="llama-untied")


def count_after_a_skip(engine: str) -> None:
    model, counts = "llama-untied", []

    def unbounded(*args):
        return loss_for(model)(*args) * float("inf")

    for loss in (loss_for(model), unbounded):
        with running(engine, build_model(model)) as run:
            for step in range(2):
                run.train_step(batch_for(model, 4, 12, step), batch_for(model, 4, 6, step))
            skipped = run.train_step(batch_for(model, 4, 12), batch_for(model, 4, 6), loss)["skipped"]
            assert skipped == (loss is unbounded)
            with Collectives() as counted:
                run.train_step(batch_for(model, 4, 12, 2), batch_for(model, 4, 6, 2))
        counts.append((counted.number, counted.bytes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_forward_without_its_backward_leaves_no_stray_gather(world: World, engine: str):
    world.run(count_after_a_skip, engine=engine)


def gathers_begun_ahead() -> list[bool]:
    """As the host enters the first block, whether the second block's gather is under way; one a forward."""
    model = build_model("llama-tied")
    ahead = []
    with running("fsdp", model) as run:
        first, second = model.model.layers[:2]

        def note(*_) -> None:
            (group,) = parameter_groups_of(second._get_fsdp_state())
            ahead.append(group._all_gather_result is not None)

        first.register_forward_pre_hook(note)
        for step in range(2):
            run.train_step(batch_for("llama", 2, 12, step), batch_for("llama", 2, 6, step))
    return ahead


@pytest.mark.parametrize("world", [2], indirect=True)
def test_fsdp_on_cpus_gathers_the_next_unit_while_this_one_computes(world: World):
    for ahead in world.run(gathers_begun_ahead):
        assert not ahead[0] and ahead[-1]


class NothingKept(dict):
    def __setitem__(self, key: object, value: object) -> None:
        pass


def gathers_begun_at_each_unit(run, step: int, ahead: bool) -> list[int]:
    """How many gathers have begun when guests first take a weight of a unit, unit after unit."""
    lanes, counted = getattr(run.optimizer, "optimizer", run.optimizer)._lanes, Collectives()
    seen: list[tuple[tuple[str, ...], int]] = []
    fetch = Lanes._fetch

    def watched(self, point, path, owners):
        unit = tuple(run.engine.gathered_with[owners[0].path])
        if not seen or seen[-1][0] != unit:
            seen.append((unit, sum(counted.number[name] for name in GATHERS)))
        return fetch(self, point, path, owners)

    if not ahead:
        lanes._orders = NothingKept()  # then no drive knows what comes next
    with mock.patch.object(Lanes, "_fetch", watched), counted:
        # Guests that were made before call what they were given then.
        lanes.close()
        run.train_step(batch_for("llama", 4, 12, step), None)
    return [number for _, number in seen]


def compare_with_gathers_in_turn(engine: str, perturb: str) -> None:
    with running(engine, build_model("llama-untied"), alpha=1.0, perturb=perturb) as run:
        run.train_step(batch_for("llama", 4, 12), None)
        ahead = gathers_begun_at_each_unit(run, 1, ahead=True)
        in_turn = gathers_begun_at_each_unit(run, 2, ahead=False)
    drives = 2 if perturb == "shard" else 1  # one for each point, or one for all
    assert len(in_turn) == len(ahead) > 3 * drives
    assert sum(early > late for early, late in zip(ahead, in_turn, strict=True)) == len(ahead) - drives


@pytest.mark.parametrize("perturb", ["gathered", "shard"])
@pytest.mark.parametrize("engine", ["fsdp", "zero3-evicting"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_without_a_host_the_next_unit_is_gathered_while_guests_take_this_one(world: World, engine: str, perturb: str):
    world.run(compare_with_gathers_in_turn, engine=engine, perturb=perturb)
