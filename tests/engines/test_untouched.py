"""Zeroth-order forwards leave everything as it was: shards, gathered weights, the host's randomness."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from addax_ds.core import cpu
from addax_ds.errors import UserError
from tests.engines.agreement import check_steps
from tests.engines.setups import batch_for, build_model, loss_for, running
from tests.world import World

ENGINES = ("replicated", "zero2", "fsdp", "zero3", "zero3-evicting", "zero3-offload")


def check_around_probes(engine: str, model: str) -> None:
    plain = build_model(model)
    zo, fo = batch_for(model, 4, 12), batch_for(model, 4, 6, 1)
    with running(engine, plain, queries=2) as run:
        whole = run.weights()
        # The engine's own memory, taken while nothing is gathered.
        shards = [(shard.start, shard.local) for shard in run.engine.shards()]
        before = [cpu.digest(local, start) for start, local in shards]
        looked = []

        def look_inside(path: str, module: nn.Module) -> Callable:
            def hook(*_: object) -> None:
                # Runs in the middle of a guest's forward, its own copy of the weights in place.
                moved = any(
                    not torch.equal(module._parameters[local], whole[name])
                    for local, name in run.engine.owners[path].items()
                )
                for local, name in run.engine.owners[path].items():
                    assert torch.equal(run.engine.weight(path, local), whole[name]), f"{name} was perturbed in place"
                assert [cpu.digest(local, start) for start, local in shards] == before
                looked.append(moved)

            return hook

        def watched_loss(guest: nn.Module, batch: dict) -> torch.Tensor:
            owners = [(path, module) for path, module in guest.named_modules() if path in run.engine.owners]
            handles = [
                module.register_forward_pre_hook(look_inside(path, module))
                for path, module in owners
                if guest is not run.engine.model
            ]
            try:
                return loss_for(model)(guest, batch)
            finally:
                for handle in handles:
                    handle.remove()

        run.optimizer.probe(lambda guest: watched_loss(guest, zo))
        assert len(looked) >= 4 * len(run.engine.owners) and all(looked)
        assert [cpu.digest(local, start) for start, local in shards] == before
        assert all(torch.equal(weight, whole[name]) for name, weight in run.weights().items())

        looked.clear()
        with pytest.raises(UserError, match="no gradient"):
            run.optimizer.step()  # drops the probe: a whole step follows, guests beside a host
        run.train_step(zo, fo, watched_loss)
        assert all(looked) and len(looked) >= 4 * len(run.engine.owners)
        assert [cpu.digest(local, start) for start, local in shards] != before


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [1, 2], indirect=True)
def test_neither_shards_nor_gathered_weights_are_ever_perturbed(world: World, engine: str):
    # One rank is a case of its own: there the gathered weight is the shard's memory.
    world.run(check_around_probes, engine=engine, model="llama-tied")


def dropout_steps(engine: str) -> None:
    zo, fo = batch_for("opt", 4, 12), batch_for("opt", 4, 6, 1)
    plain = build_model("opt-dropout").eval()
    with torch.no_grad():
        eval_loss = loss_for("opt")(plain, fo).double().mean().item()
    seen = {}
    for dropout in (False, True):
        for checkpointing in (False, True):
            torch.manual_seed(3)
            model = build_model("opt-dropout")
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            torch.manual_seed(4)
            with running(engine, model, dropout=dropout, queries=2) as run:
                metrics = run.train_step(zo, fo)
                seen[dropout, checkpointing] = metrics["loss_zo"], metrics["loss_fo"], run.digest()
    with running(engine, build_model("opt"), queries=2) as run:  # the same weights, no dropout at all
        expected = run.train_step(zo, fo)["loss_zo"]
    assert all(losses == expected for losses, _, _ in seen.values()), "dropout reached zeroth-order forwards"
    # The loss of a sample is rounded to float32 once, whatever else differs.
    assert abs(seen[False, False][1] - eval_loss) <= 2 * torch.finfo(torch.float32).eps * eval_loss
    assert seen[False, False][1:] == seen[False, True][1:]
    assert abs(seen[True, False][1] - eval_loss) > 0.01
    # Recomputation sees the masks of the forward, though guests ran in between.
    assert seen[True, False][1:] == seen[True, True][1:]


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3"])
@pytest.mark.parametrize("world", [2], indirect=True)
def test_dropout_never_reaches_guests_and_masks_survive_recomputation(world: World, engine: str):
    world.run(dropout_steps, engine=engine)


def checkpointed_steps_of_a_model_with_dropout(engine: str) -> None:
    reference = build_model("opt-dropout")  # the reference runs in evaluation mode
    model = build_model("opt-dropout")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [(batch_for("opt", 3, 12, i), batch_for("opt", 3, 6, i)) for i in range(2)]
    with running(engine, model) as run:
        check_steps(run, reference, batches, loss_for("opt"))


@pytest.mark.parametrize("engine", ["fsdp", "zero3-evicting"])
@pytest.mark.parametrize("world", [3], indirect=True)
def test_dropout_is_off_by_default_under_checkpointing_too(world: World, engine: str):
    world.run(checkpointed_steps_of_a_model_with_dropout, engine=engine)
