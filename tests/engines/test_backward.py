"""In the backward a gradient lives until its layer is done, and is applied in its reduction's hook."""

import gc
import time

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from addax_ds.core import kernels
from tests.engines.setups import batch_for, running
from tests.world import World

ENGINES = ("replicated", "zero2", "fsdp", "zero3", "zero3-evicting")
LAYERS = 5
FLOAT = 4


def deep_model() -> nn.Module:
    """Many equal layers and a small vocabulary: one unit is a small part of the whole."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=30,
            intermediate_size=60,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=False,
        )
    )


def grad_bytes() -> int:
    """Bytes of every `.grad` of every tensor in this process, whoever holds it."""
    grads = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing).__name__ != "Absent" and thing.is_leaf:
            grad = thing.grad
            if grad is not None:
                grad = getattr(grad, "_local_tensor", grad)
                grads[grad.untyped_storage().data_ptr()] = grad.untyped_storage().nbytes()
    return sum(grads.values())


def all_expired(references: list[StorageWeakRef]) -> bool:
    """Whether every storage is freed: gloo's thread lets go of a tensor a moment after its work is waited for."""
    deadline = time.monotonic() + 10
    while not all(reference.expired() for reference in references):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def watch_gradients(engine: str, forget_to_free: bool = False) -> None:
    gc.collect()
    gc.freeze()  # what exists by now is not looked through again and again
    model = deep_model()
    unit = FLOAT * max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    total = FLOAT * sum(p.numel() for p in model.parameters())
    assert unit < total / 4
    reduced: list[tuple[StorageWeakRef, int]] = []
    alive: list[int] = []
    kept = []
    update, reduce_scatter = kernels.update, torch.distributed.reduce_scatter_tensor

    def watched_reduce_scatter(output, whole, *args, **kwargs):
        if engine.startswith("zero3"):  # ours; FSDP2's input is its own copy of a whole unit
            reduced.append((StorageWeakRef(whole.untyped_storage()), whole.untyped_storage().nbytes()))
        return reduce_scatter(output, whole, *args, **kwargs)

    def watched_update(local, start, gradient, *more):
        if gradient is not None:
            storage = gradient.untyped_storage()
            reduced.append((StorageWeakRef(storage), storage.nbytes()))
            if forget_to_free:
                kept.append(gradient)
        storages = {ref.cdata: size for ref, size in reduced if not ref.expired()}
        alive.append(grad_bytes() + sum(storages.values()))
        return update(local, start, gradient, *more)

    with running(engine, model) as run:
        for step in range(2):  # ZeRO-3 traces the first step and prefetches in the second
            kernels.update, torch.distributed.reduce_scatter_tensor = watched_update, watched_reduce_scatter
            try:
                run.train_step(batch_for("llama", 4, 4, step), batch_for("llama", 4, 4, step + 9))
            finally:
                kernels.update, torch.distributed.reduce_scatter_tensor = update, reduce_scatter
        del model
        gc.collect()
        assert len(alive) >= 2 * 9 * LAYERS
        # The whole layer's, and what left its reduction of the same layer.
        assert max(alive) <= 2 * unit, f"{max(alive)} bytes of gradients alive, a layer has {unit}"
        assert grad_bytes() == 0
        assert all_expired([ref for ref, _ in reduced]), "a reduced gradient outlived the step"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_no_gradient_outlives_its_layer(world: World, engine: str):
    world.run(watch_gradients, engine=engine)


@pytest.mark.parametrize("world", [2], indirect=True)
def test_the_measurement_notices_gradients_that_are_kept(world: World):
    world.run(keep_gradients)


def keep_gradients() -> None:
    with pytest.raises(AssertionError, match=r"bytes of gradients alive|outlived"):
        watch_gradients("fsdp", forget_to_free=True)


def watch_order(engine: str) -> None:
    model = deep_model()
    with running(engine, model) as run:
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(LAYERS)]
        for step in range(2):
            shards = {shard.name: shard.local for shard in run.engine.shards()}
            before = [shards[name].clone() for name in names]
            moved_when: list[list[bool]] = []

            def look(gradient: torch.Tensor, shards=shards, before=before, moved_when=moved_when) -> None:
                moved_when.append([not torch.equal(shards[name], old) for name, old in zip(names, before, strict=True)])

            def watch_output(module: nn.Module, args: tuple, output: torch.Tensor, look=look) -> None:
                if torch.is_grad_enabled():
                    output.register_hook(look)

            handles = [layer.register_forward_hook(watch_output) for layer in run.model.model.layers]
            run.train_step(batch_for("llama", 4, 4, step), batch_for("llama", 4, 4, step + 9))
            for handle in handles:
                handle.remove()
            # The backward reaches the output of layer 4, then 3, ...: by then nothing below has moved,
            # and two layers up everything has (FSDP2 reduces a layer when the next one has begun).
            assert len(moved_when) == LAYERS
            for layer, moved in zip(reversed(range(LAYERS)), moved_when, strict=True):
                assert not any(moved[: layer + 1]), f"a shard at or below layer {layer} moved before its backward"
                assert all(moved[layer + 2 :]), f"a shard above layer {layer} waited: {moved}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_a_later_layers_shard_is_written_before_an_earlier_layers_backward(world: World, engine: str):
    world.run(watch_order, engine=engine)
