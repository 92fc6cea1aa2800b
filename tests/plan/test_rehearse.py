"""Rehearsals against real runs, and against what the method says of traffic."""

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from addax_ds.config import RunConfig, build
from addax_ds.errors import UserError
from addax_ds.plan.rehearse import Rehearsal, by_part, rehearse, second_step
from addax_ds.plan.tracker import Tracker
from addax_ds.shapes import shape_of
from addax_ds.training.world import World as RunWorld
from tests.world import World

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


def measured(shape: PretrainedConfig, config: RunConfig, long: int, short: int) -> Rehearsal:
    """The same step with real tensors, on real ranks."""
    tracker = Tracker("weights")
    world = RunWorld(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
    with by_part(tracker), tracker:
        return second_step(shape, config, world, long, short, tracker)


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
]
"""Ranks, method, shape, settings, and tokens of the long and of the short samples. No adamw on several ranks: its peak
lies in the reduction of the head's gradient, for which gloo makes a copy of its own, and GPUs none."""


@pytest.mark.parametrize(("world", "method", "shape", "more", "long", "short"), POINTS, indirect=["world"])
def test_the_peak_of_a_real_step_is_that_of_its_rehearsal(world: World, method, shape, more, long, short):
    config = run_of(method, world.size, **more)
    planned = rehearse(SHAPES[shape](), config, world.size, long, short)
    real = world.run(measured, shape=SHAPES[shape](), config=config, long=long, short=short)[0]
    print(f"{method} {shape} {more} {long}/{short}, {world.size} ranks: {planned.peak / real.peak - 1:+.1%}")
    apart = {part: size - real.parts[part] for part, size in planned.parts.items()}
    assert planned.peak == pytest.approx(real.peak, rel=0.005), apart
    assert planned.collectives == real.collectives
    assert planned.received == real.received


@pytest.mark.parametrize("method", ["addax", "mezo", "adamw"])
def test_a_few_layers_tell_of_all(method):
    shape = small_llama()
    shape.num_hidden_layers = 20
    few, whole = (rehearse(shape, run_of(method, 4), 4, 128, 64, all_layers=every) for every in (False, True))
    assert few.peak == pytest.approx(whole.peak, rel=0.01)
    assert few.collectives == whole.collectives
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


def test_what_cannot_be_rehearsed_is_refused():
    with pytest.raises(UserError, match="engine replicated cannot be rehearsed yet: set engine: fsdp"):
        rehearse(small_llama(), run_of("addax", 2, engine="replicated"), 2, 64, 64)
