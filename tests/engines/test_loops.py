"""Loops that own their forward and backward: probe, then a backward, then step."""

import copy

import pytest
import torch
import torch.distributed as dist

from addax_ds.errors import UserError
from addax_ds.reference import addax_step
from tests.engines.agreement import RELATIVE
from tests.engines.setups import Running, batch_for, build_model, loss_for, running
from tests.world import World

MODEL = "opt"
ENGINES = ("replicated", "zero0", "zero1", "zero2", "fsdp", "zero3", "zero3-evicting")
ON_EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES)
ON_THREE_RANKS = pytest.mark.parametrize("world", [3], indirect=True)


def backward(run: Running, batch: dict) -> None:
    """What a loop does with this rank's batch: the mean loss, and its backward."""
    # DeepSpeed's loops call its engine, the others the model itself.
    loss = loss_for(MODEL)(run.deepspeed.module if run.deepspeed else run.model, batch).mean()
    if run.deepspeed:
        run.deepspeed.backward(loss)
    else:
        loss.backward()


def finish(run: Running) -> None:
    (run.deepspeed or run.optimizer).step()


def own_loop(engine: str, alpha: float) -> None:
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    plain = build_model(MODEL)
    reference = copy.deepcopy(plain)
    with running(engine, plain, alpha=alpha, queries=2, weight_decay=0.1) as run:
        for step in range(3):
            # Each rank has batches of its own; the zeroth-order ones even differ in size.
            zo = [batch_for(MODEL, 2 + r % 2, 12, 10 * step + r) for r in ranks]
            fo = [batch_for(MODEL, 2, 6, 10 * step + r + 5) for r in ranks]
            g0 = []
            if alpha > 0:
                g0 = run.optimizer.probe(lambda model, zo=zo: loss_for(MODEL)(model, zo[rank]))["g0"]
            if alpha < 1:
                backward(run, fo[rank])
            finish(run)
            assert run.optimizer.steps == step + 1
            expected, own_g0 = addax_step(reference, zo, fo, loss_for(MODEL), run.optimizer.config, step, g0 or None)
            assert len(own_g0) == len(g0)
            for name, weight in run.weights().items():
                error = (weight - expected[name]).norm() / expected[name].norm()
                assert error <= RELATIVE, f"step {step}: {name} is {error:.1e} from the reference"
                reference.get_parameter(name).data.copy_(weight)


@pytest.mark.parametrize(
    ("engine", "alpha"),
    [
        *((engine, 0.3) for engine in ENGINES),
        *((engine, alpha) for engine in ("replicated", "zero2", "fsdp", "zero3-evicting") for alpha in (0.0, 1.0)),
    ],
)
@ON_THREE_RANKS
def test_probe_backward_step_is_the_reference_step(world: World, engine: str, alpha: float):
    world.run(own_loop, engine=engine, alpha=alpha)


def misuse(engine: str) -> None:
    zo, fo = batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6)
    with running(engine, build_model(MODEL)) as run:
        before = run.digest()
        # Trainer and checkpointing code call step() to materialise optimizer state.
        finish(run)
        run.optimizer.zero_grad()
        assert run.digest() == before and run.optimizer.steps == 0
        # The memory itself: after a backward that broke off, FSDP2 still has units gathered.
        shards = [(shard.local, shard.local.clone()) for shard in run.engine.shards()]
        with pytest.raises(RuntimeError, match=r"probe\(\)"):
            backward(run, fo)
        assert all(torch.equal(local, old) for local, old in shards)
    with running(engine, build_model(MODEL)) as run:
        run.optimizer.probe(lambda model: loss_for(MODEL)(model, zo))
        with pytest.raises(RuntimeError, match="under way"):
            run.train_step(zo, fo)
        with pytest.raises(UserError, match="no gradient reached"):
            finish(run)
        assert run.digest() == before
        run.optimizer.probe(lambda model: loss_for(MODEL)(model, zo))
        backward(run, fo)
        with pytest.raises(RuntimeError, match="two gradients"):
            backward(run, fo)
        with pytest.raises(UserError, match="closure"):
            run.optimizer.step(lambda: None)


@ON_EVERY_ENGINE
@ON_THREE_RANKS
def test_calls_out_of_order_raise_and_write_nothing(world: World, engine: str):
    world.run(misuse, engine=engine)


def resume(engine: str) -> None:
    """A new optimizer with the old one's state goes on with the next step's noise."""
    batches = [(batch_for(MODEL, 3, 12, i), batch_for(MODEL, 3, 6, i)) for i in range(2)]
    with running(engine, build_model(MODEL)) as run:
        run.train_step(*batches[0])
        state, weights = run.optimizer.state_dict(), run.weights()
        run.train_step(*batches[1])
        expected = run.digest()
    model = build_model(MODEL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    with running(engine, model) as run:
        run.optimizer.load_state_dict(state)
        run.train_step(*batches[1])
        assert run.digest() == expected


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3"])
@ON_THREE_RANKS
def test_a_loaded_state_continues_bit_identically(world: World, engine: str):
    world.run(resume, engine=engine)
