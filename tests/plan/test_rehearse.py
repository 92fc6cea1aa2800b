"""Rehearsals against real runs, and against what the method says of traffic."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from addax_ds.config import RunConfig, build
from addax_ds.errors import UserError
from addax_ds.plan.rehearse import Rehearsal, a_step, by_part, rehearse
from addax_ds.plan.tracker import Tracker, work_of
from addax_ds.shapes import shape_of
from addax_ds.training.world import World as RunWorld
from tests.world import World

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

METHODS = {
    "addax": {"method": "addax", "alpha": 1e-3},
    "mezo": {"method": "mezo"},
    "ip-sgd": {"method": "ip-sgd"},
    "adamw": {"method": "adamw"},
    "lora": {"method": "adamw", "adapter": {"kind": "lora"}},
    "adazeta": {"method": "adazeta"},
}


def run_of(method: str, ranks: int, **more) -> RunConfig:
    """Two samples of each kind for a rank."""
    sizes = {"k0": 2 * ranks, "k1": 2 * ranks, "zo_micro_batch": 2, "fo_micro_batch": 2, "checkpoint_every": 0}
    return build(RunConfig, {"engine": "fsdp", **sizes, **METHODS[method], **more}, method)


def small_llama(tied: bool = False) -> PretrainedConfig:
    """6 blocks, of which each is a fifth of the weights outside of them, so that no part hides the others."""
    return LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=6000,
        tie_word_embeddings=tied,
    )


def small_opt() -> PretrainedConfig:
    return OPTConfig(
        hidden_size=192,
        word_embed_proj_dim=192,
        ffn_dim=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=6000,
        max_position_embeddings=512,
        dropout=0.0,
    )


SHAPES = {"llama": small_llama, "llama-tied": lambda: small_llama(tied=True), "opt": small_opt}


class OnRanks(Tracker):
    """Of real ranks. Collectives run on copies, to their end.

    gloo's threads let go of what they work on at a time of their own, after any wait, when the step may have made its
    next tensor; and a reduction makes a whole copy, which is seen in the wait. GPUs do neither.
    """

    def collective(self, function, *args, **kwargs):
        def copied(tensor: torch.Tensor) -> torch.Tensor:
            copy = tensor.clone()
            originals[id(copy)] = tensor, copy
            return copy

        originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        out = function(*tree_map_only(torch.Tensor, copied, args), **kwargs)
        work_of(out).wait()
        for original, copy in originals.values():
            original.copy_(copy)
        over = FakeWork().boxed()
        if not isinstance(out, tuple):  # a barrier
            return over
        return *tree_map_only(torch.Tensor, lambda copy: originals[id(copy)][0], out[:-1]), over


def measured(shape: PretrainedConfig, config: RunConfig, long: int, short: int, offload: bool = False) -> Rehearsal:
    """The same step with real tensors, on real ranks."""
    tracker = OnRanks("weights")
    world = RunWorld(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
    with by_part(tracker, config, offload), tracker:
        return a_step(shape, config, world, long, short, tracker, offload)


POINTS = [
    (1, "addax", "llama", {}, 256, 64),
    (1, "addax", "llama-tied", {"dtype": "bfloat16"}, 128, 64),
    (1, "adamw", "llama", {"dtype": "bfloat16"}, 64, 128),
    (1, "adazeta", "llama", {}, 256, 64),
    (2, "addax", "opt", {}, 96, 96),
    (2, "addax", "llama", {"activation_checkpointing": True}, 128, 128),
    (2, "mezo", "opt", {"dtype": "bfloat16"}, 384, 64),
    (2, "ip-sgd", "llama-tied", {}, 64, 256),
    (2, "lora", "llama", {}, 64, 256),
    (4, "addax", "llama-tied", {}, 256, 64),
    (4, "mezo", "llama", {}, 256, 64),
    (4, "ip-sgd", "opt", {}, 64, 128),
    (4, "adamw", "llama", {}, 64, 128),
]
"""Ranks, method, shape, settings, and tokens of the long and of the short samples."""


@pytest.mark.parametrize(("world", "method", "shape", "more", "long", "short"), POINTS, indirect=["world"])
def test_the_peak_of_a_real_step_is_that_of_its_rehearsal(world: World, method, shape, more, long, short):
    compare(world, method, shape, long, short, **more)


def compare(world: World, method: str, shape: str, long: int, short: int, offload: bool = False, **more) -> Rehearsal:
    """The rehearsal of a step, held against the real one."""
    config = run_of(method, world.size, **more)
    planned = rehearse(SHAPES[shape](), config, world.size, long, short, offload=offload)
    real = world.run(measured, shape=SHAPES[shape](), config=config, long=long, short=short, offload=offload)[0]
    print(f"{method} {shape} {more} {long}/{short}, {world.size} ranks: {planned.peak / real.peak - 1:+.1%}")
    apart = {part: size - real.parts[part] for part, size in planned.parts.items()}
    assert planned.peak == pytest.approx(real.peak, rel=0.005), apart
    assert planned.host == pytest.approx(real.host, rel=0.005)
    assert planned.collectives == real.collectives
    assert planned.received == real.received
    return planned


EVICTING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
LARGE = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 8e5,
    "stage3_prefetch_bucket_size": 4e5,
}
"""As ds_configs/70b has it for 8192: live parameters of two blocks, of which one is gathered ahead."""
ON_CPU = {"offload_param": {"device": "cpu"}}

ZERO_POINTS = [
    (1, "addax", "llama", {}, {}, 256, 64),
    (2, "addax", "llama", {}, {}, 256, 64),
    (2, "addax", "llama", {}, LARGE, 256, 64),
    (2, "addax", "llama", {"activation_checkpointing": True}, EVICTING, 256, 128),
    (2, "mezo", "opt", {"dtype": "bfloat16"}, LARGE, 384, 64),
    (2, "ip-sgd", "llama-tied", {}, EVICTING, 64, 256),
    (2, "lora", "llama", {}, {}, 64, 256),
    (2, "adamw", "llama", {"dtype": "bfloat16"}, LARGE, 64, 256),
    (2, "addax", "llama", {}, {**LARGE, **ON_CPU}, 256, 64),
    (4, "addax", "llama-tied", {}, EVICTING, 256, 64),
    (4, "addax", "opt", {}, {**LARGE, "zero_hpz_partition_size": 2}, 128, 128),
    (4, "addax", "llama", {}, {**EVICTING, **ON_CPU, "zero_hpz_partition_size": 2}, 128, 128),
]
"""As above, with what stands in zero_optimization."""


def under_zero(folder: Path, zero: dict) -> dict:
    """A run's settings for ZeRO-3 with these in zero_optimization."""
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}
    (folder / "ds.json").write_text(json.dumps(settings))
    return {"engine": "deepspeed", "ds_config": str(folder / "ds.json")}


@pytest.mark.parametrize(("world", "method", "shape", "more", "zero", "long", "short"), ZERO_POINTS, indirect=["world"])
def test_so_it_is_under_zero_3(world: World, tmp_path, method, shape, more, zero, long, short):
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    planned = compare(
        world, method, shape, long, short, engine="deepspeed", ds_config=str(tmp_path / "ds.json"), **more
    )
    assert (planned.host > 0) == ("offload_param" in zero)


@pytest.mark.parametrize(
    ("world", "method", "more"),
    [(2, "addax", {}), (2, "ip-sgd", {"dtype": "bfloat16"}), (1, "adamw", {})],
    indirect=["world"],
)
def test_so_it_is_with_weights_on_the_host(world: World, method, more):
    planned = compare(world, method, "llama", 256, 64, offload=True, **more)
    assert planned.host > 0


@pytest.mark.parametrize(
    ("world", "method", "shape"),
    [(4, "addax", "llama"), (4, "ip-sgd", "opt")],
    indirect=["world"],
)
def test_so_it_is_with_replicas_of_shards(world: World, method, shape):
    compare(world, method, shape, 256, 64, replicas=2)


@pytest.mark.parametrize(
    ("method", "zero"),
    [("addax", None), ("mezo", None), ("adamw", None), ("addax", LARGE), ("mezo", {**LARGE, **ON_CPU})],
)
def test_a_few_layers_tell_of_all(tmp_path, method, zero):
    shape = small_llama()
    shape.num_hidden_layers = 20 if zero is None else 14
    config = run_of(method, 4, **({} if zero is None else under_zero(tmp_path, zero)))
    few, whole = (rehearse(shape, config, 4, 128, 64, all_layers=every) for every in (False, True))
    assert few.peak == pytest.approx(whole.peak, rel=0.01)
    assert few.host == pytest.approx(whole.host, rel=0.01)
    # How many weights DeepSpeed gathers ahead at once does not come again with each layer.
    assert few.collectives == (whole.collectives if zero is None else pytest.approx(whole.collectives, rel=0.1))
    assert few.received == pytest.approx(whole.received)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("meta-llama/Llama-2-70b-hf", 68.977),
        ("facebook/opt-13b", 12.853),
        ("facebook/opt-66b", 65.72),
        ("Qwen/Qwen2.5-0.5B", 0.494),
        # Experts lie along the dimension that is sharded: on 16 ranks 8 are padded to twice their 45.097 billions.
        ("mistralai/Mixtral-8x7B-v0.1", 46.703 + 45.097),
    ],
)
def test_a_mixed_step_of_16_ranks_receives_three_model_sizes(model, billions):
    shape, config = shape_of(model), run_of("addax", 16, dtype="bfloat16")
    step = rehearse(shape, config, 16, 256, 64)
    size = 2e9 * billions * 15 / 16
    # FSDP2 pads what 16 does not divide.
    assert sum(step.received.values()) == pytest.approx(3 * size, rel=0.05)
    assert step.collectives["_allgather_base_"] == 2 * step.collectives["_reduce_scatter_base_"]
    assert step.collectives["allreduce_"] == 1
    shard = 2e9 * billions / 16
    assert shard <= step.parts["weights"] <= 1.01 * shard + 1e6


@pytest.mark.parametrize(
    ("settings", "offload", "told"),
    [
        ({"engine": "replicated"}, False, "engine replicated cannot be rehearsed: set engine: fsdp or deepspeed"),
        ({"engine": "deepspeed", "ds_config": str(DS_CONFIGS / "zero2.json")}, False, "ZeRO stage 2 cannot be"),
        (
            {"engine": "deepspeed", "ds_config": str(DS_CONFIGS / "zero3.json")},
            True,
            "put offload_param into ds_config",
        ),
        (
            {"engine": "deepspeed", "ds_config": str(DS_CONFIGS / "zero3_offload_param.json"), "method": "adamw"},
            False,
            "method adamw of DeepSpeed cannot be rehearsed with offloading",
        ),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(settings, offload, told):
    method = settings.pop("method", "addax")
    with pytest.raises(UserError, match=told):
        rehearse(small_llama(), run_of(method, 2, **settings), 2, 64, 64, offload=offload)
