"""What a GPU holds once a model lies in shards: `ADDAX_TEST_DEVICE=cuda pytest tests/training/test_gpu.py`."""

import gc

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from addax_ds.config import RunConfig
from addax_ds.training.models import build_optimizer, open_model
from addax_ds.training.world import World as RunWorld
from tests.forkserver import DEVICE
from tests.plan.real import SHAPES
from tests.world import World

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, and ADDAX_TEST_DEVICE=cuda")


def held(config: RunConfig) -> tuple[int, int]:
    """Bytes on the GPU, and those of the model."""
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    model, unread = open_model(config.model, config)
    assert unread
    optimizer = build_optimizer(
        model, config, RunWorld(dist.get_rank(), device.index, dist.get_world_size(), device), unread
    )
    gc.collect()
    shards = sum(shard.local.nbytes for shard in optimizer.engine.shards())
    return torch.cuda.memory_allocated() - before, shards


@pytest.mark.parametrize("world", [1], indirect=True)
@pytest.mark.parametrize("offload", [False, True])
def test_a_gpu_holds_its_shards_alone(world: World, tmp_path, offload):
    AutoModelForCausalLM.from_config(SHAPES["llama"]()).save_pretrained(tmp_path / "model")
    config = RunConfig(model=str(tmp_path / "model"), data="movies", engine="fsdp", offload=offload)
    on_gpu, shards = world.run(held, config=config)[0]
    assert on_gpu == pytest.approx(0 if offload else shards, abs=0.02 * shards)
