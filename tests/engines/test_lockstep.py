"""Lanes in lockstep give the bits that the same lanes give one after the other."""

import contextlib
import os
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from addax_ds.core import moved
from tests.engines.setups import batch_for, build_model, built_under_zero_init, loss_for, running
from tests.forkserver import DEVICE
from tests.world import World

MODELS = ("llama-tied", "llama-untied", "opt", "bert", "gpt2", "qwen3", "mixtral")
ENGINES = ("fsdp", "zero3-evicting")


def prepared_by_accelerate(model: torch.nn.Module) -> torch.nn.Module:
    """The model with accelerate's mixed precision wrapped around its forward."""
    ranks = str(torch.distributed.get_world_size())
    with mock.patch.dict(os.environ, MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=ranks):
        accelerator = Accelerator(mixed_precision="bf16", cpu=DEVICE == "cpu")
        # Else it would be wrapped for data parallelism, which is the engine's business.
        model = accelerator.prepare_model(model, evaluation_mode=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    return model


def three_steps(engine: str, model_name: str, *, in_turn: bool, with_: tuple[str, ...] = (), **hyper) -> list:
    """Losses, g0 and digest of three steps with two directions.

    Every rank has as many guests, so that each of them can have gathers of its own.
    """
    model = build_model(model_name, torch.bfloat16 if "bfloat16" in with_ else torch.float32)
    if "checkpointing" in with_:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "accelerate" in with_:
        model = prepared_by_accelerate(model)
    if "zero.Init" in with_:
        model = built_under_zero_init(model_name, engine)
    seen, graphs = [], []

    def compiled(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with contextlib.ExitStack() as stack:
        if "chunks" in with_:  # a head's weight is made in pieces
            stack.enter_context(mock.patch.object(moved, "CHUNK", 300))
        run = stack.enter_context(running(engine, model, queries=2, **hyper))
        raw = getattr(run.optimizer, "optimizer", run.optimizer)
        if in_turn:
            raw._begin = lambda jobs, _: [raw._lanes.run([job]) for job in jobs]
        if "compile" in with_:
            torch.compiler.reset()  # what runs before have compiled serves no more, nor counts as a recompilation
            for unit in raw.engine.units:
                if len(unit) == 1 and unit[0].split(".")[-1].isdigit():  # a block
                    model.get_submodule(unit[0]).compile(backend=compiled)
        autocast = torch.autocast(DEVICE, torch.bfloat16) if "autocast" in with_ else contextlib.nullcontext()
        for step in range(3):
            zo, fo = batch_for(model_name, 7, 12, step), batch_for(model_name, 3, 6, step + 5)
            if step == 1:  # micro-batches of their own lengths
                zo = [batch_for(model_name, 2, tokens, tokens) for tokens in (9, 12, 10, 7)]
            with autocast:
                metrics = run.train_step(zo, fo, loss_for(model_name))
            seen.append((metrics["loss_zo"], metrics["loss_fo"], metrics["g0"], run.digest()))
    assert bool(graphs) == ("compile" in with_)
    return seen


def compare(engine: str, model: str, with_: tuple[str, ...] = ()) -> None:
    together = three_steps(engine, model, in_turn=False, with_=with_)
    in_turn = three_steps(engine, model, in_turn=True, with_=with_)
    assert together == in_turn
    assert len({digest for *_, digest in together}) == 3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_lockstep_is_bit_equal_on_every_model(world: World, engine: str, model: str):
    world.run(compare, engine=engine, model=model)


@pytest.mark.parametrize(
    ("engine", "with_"),
    [
        ("fsdp", ("checkpointing",)),
        ("zero3-evicting", ("checkpointing",)),
        ("fsdp", ("bfloat16",)),
        ("zero3", ("bfloat16",)),
        ("zero3-evicting", ("bfloat16",)),
        ("fsdp", ("chunks",)),
        ("zero3-evicting", ("chunks",)),
        ("fsdp", ("autocast",)),
        ("zero3-evicting", ("autocast",)),
        ("fsdp", ("autocast", "checkpointing")),
        ("fsdp", ("compile",)),
        ("zero3", ("compile",)),
        ("zero3-evicting", ("compile",)),
        ("zero3", ()),
        ("fsdp-offload", ()),
        ("zero3-offload", ()),
        ("zero3", ("zero.Init",)),
        ("fsdp", ("accelerate",)),
        ("zero3", ("accelerate",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_lockstep_is_bit_equal_with_what_a_step_may_come_with(
    world: World, engine: str, model: str, with_: tuple[str, ...]
):
    world.run(compare, engine=engine, model=model, with_=with_)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["hsdp", "zero3-hpz"])
@pytest.mark.parametrize("world", [4], indirect=True)
def test_lockstep_is_bit_equal_on_two_by_two_ranks(world: World, engine: str, model: str):
    world.run(compare, engine=engine, model=model)
