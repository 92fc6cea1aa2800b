"""The plan of a step held against what a GPU's allocator counts in one: `ADDAX_TEST_DEVICE=cuda pytest tests/plan`."""

import pytest
import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from addax_ds.config import RunConfig
from addax_ds.plan.batches import LAST_TOKEN
from addax_ds.plan.rehearse import a_step, rehearse
from addax_ds.plan.tracker import Tracker
from addax_ds.training.world import World as RunWorld
from tests.forkserver import DEVICE
from tests.plan.real import SHAPES, run_of
from tests.world import World

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU, and ADDAX_TEST_DEVICE=cuda")


def counted(shape: PretrainedConfig, config: RunConfig, long: int, short: int) -> int:
    """Bytes at most in a step by torch's allocator."""
    tracker, device = Tracker("weights"), torch.device("cuda", torch.cuda.current_device())
    tracker.begin = torch.cuda.reset_peak_memory_stats
    before = torch.cuda.memory_allocated()
    world = RunWorld(dist.get_rank(), device.index, dist.get_world_size(), device)
    a_step(shape, config, world, long, short, tracker, LAST_TOKEN, warm=1)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("world", [1], indirect=True)
@pytest.mark.parametrize("method", ["addax", "mezo", "adazeta", "ip-sgd", "adamw", "lora"])
def test_the_plan_of_smollm2_is_what_a_gpu_takes(record_property, world: World, method):
    config, shape = run_of(method, 1, dtype="bfloat16"), SHAPES["smollm2-135m"]()
    planned = rehearse(shape, config, 1, 512, 256).peak
    real = world.run(counted, shape=shape, config=config, long=512, short=256)[0]
    figures = f"{planned / 1e6:7.1f} MB, counted {real / 1e6:7.1f}, {planned / real - 1:+.2%}"
    record_property("planned peak on a GPU", f"{method:8} {figures}")
    assert planned == pytest.approx(real, rel=0.05)
