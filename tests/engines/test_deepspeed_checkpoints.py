"""DeepSpeed's own save_checkpoint, load_checkpoint, zero_to_fp32 and save_16bit_model keep working."""

from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.engines.setups import batch_for, build_model, running
from tests.world import World


def batches(step: int):
    return batch_for("llama", 3, 12, step), batch_for("llama", 3, 6, step + 5)


def model(name: str, dtype: torch.dtype, scale: float = 1.0):
    built = build_model(name, dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(scale)
    built.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    return built


def save(engine: str, name: str, dtype: torch.dtype, folder: Path) -> str:
    """Digest of a run of three steps, saved after the second."""
    with running(engine, model(name, dtype), zero={"stage3_gather_16bit_weights_on_model_save": True}) as run:
        for step in range(2):
            run.train_step(*batches(step))
        run.deepspeed.save_checkpoint(str(folder / "checkpoint"), client_state={"note": 7})
        assert run.deepspeed.save_16bit_model(str(folder / "whole"))
        weights = run.weights()
        if run.engine.rank == 0:
            torch.save(weights, folder / "weights.pt")
        run.train_step(*batches(2))
        return run.digest()


def load_and_step(engine: str, name: str, dtype: torch.dtype, folder: Path, weights_alone: bool = False) -> str:
    with running(engine, model(name, dtype, scale=3.0)) as run:
        # DeepSpeed's ZeRO-3 finds the weights alone only where it is told to leave the optimizer's states too.
        alone = {"load_module_only": True, "load_optimizer_states": False} if weights_alone else {}
        path, client_state = run.deepspeed.load_checkpoint(str(folder / "checkpoint"), **alone)
        assert path is not None and client_state["note"] == 7
        assert run.optimizer.steps == (0 if weights_alone else 2)
        run.optimizer.steps = 2
        run.train_step(*batches(2))
        return run.digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize(
    ("world", "engine"),
    [(1, "zero2"), *((3, engine) for engine in ("zero0", "zero1", "zero2", "zero3", "zero3-evicting"))],
    indirect=["world"],
)
def test_checkpoints_of_deepspeed(world: World, engine, name, dtype, tmp_path):
    cell = {"engine": engine, "name": name, "dtype": dtype, "folder": tmp_path}
    expected = world.run(save, **cell)
    assert world.run(load_and_step, **cell) == expected
    assert world.run(load_and_step, **cell, weights_alone=True) == expected
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    whole = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    for key, weight in weights.items():
        assert torch.equal(whole[key], weight), key
    if engine != "zero0":
        converted = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "checkpoint"))
        # DeepSpeed leaves frozen weights out of its ZeRO-1 checkpoints.
        frozen = {"model.layers.0.mlp.up_proj.weight"} if engine == "zero1" else set()
        for key in weights.keys() - frozen:
            assert torch.equal(converted[key].float(), weights[key].float()), key
