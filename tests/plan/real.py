"""Rehearsals held against the same steps of real ranks."""

import contextlib
import itertools
import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

from addax_ds.config import RunConfig, build
from addax_ds.core.moved import LINEAR
from addax_ds.plan.batches import LAST_TOKEN, Targets
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.parts import by_part
from addax_ds.plan.rehearse import Rehearsal, a_step, rehearse
from addax_ds.plan.tracker import Tracker, work_of
from addax_ds.shapes import shape_of
from addax_ds.training.world import World as RunWorld
from tests.world import World

STEP_SECONDS = 600.0
"""What ranks get for a few steps: four of them with 30 blocks on two cores that others use, too, want minutes."""

METHODS = {
    "addax": {"method": "addax", "alpha": 1e-3},
    "mezo": {"method": "mezo"},
    "ip-sgd": {"method": "ip-sgd"},
    "sgd": {"method": "sgd"},
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


SHAPES = {
    "llama": small_llama,
    "llama-tied": lambda: small_llama(tied=True),
    "opt": small_opt,
    "smollm2-135m": lambda: shape_of("HuggingFaceTB/SmolLM2-135M"),
}


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


def measured(
    shape: PretrainedConfig,
    config: RunConfig,
    long: int,
    short: int,
    targets: Targets,
    evaluated: Evaluated | None = None,
) -> Rehearsal:
    """The same step with real tensors, on real ranks."""
    tracker = OnRanks("weights")
    world = RunWorld(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
    with by_part(tracker, config), own_linear(config), tracker:
        # In DeepSpeed's second step ranks compare what they have noted of the first.
        warm = 2 if config.engine == "deepspeed" else 1
        return a_step(shape, config, world, long, short, tracker, targets, evaluated, warm=warm)


def allocated(shape: PretrainedConfig, config: RunConfig, long: int, short: int) -> int:
    """Bytes at most in the same step by the count of torch's allocator, which sees this thread's alone: not guests'."""
    tracker, begun = Tracker("weights"), []
    tracker.begin = lambda: begun.append(time.time_ns())
    world = RunWorld(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
    with own_linear(config), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as noted:
        a_step(shape, config, world, long, short, tracker, LAST_TOKEN, warm=2 if config.engine == "deepspeed" else 1)
    events = noted.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = itertools.accumulate(change for _, change in changes)
    return max(size for (at, _), size in zip(changes, held, strict=True) if at >= begun[-1])


def own_linear(config: RunConfig) -> contextlib.AbstractContextManager:
    """torch's own linear function under FSDP2.

    ZeRO-3 leaves DeepSpeed's in a process for good, which keeps inputs of frozen layers, too, for the backward; and
    these ranks may have run cases of ZeRO-3 before.
    """
    return mock.patch.object(functional, "linear", LINEAR) if config.engine == "fsdp" else contextlib.nullcontext()


def compare(
    record,
    world: World,
    method: str,
    shape: str,
    long: int,
    short: int,
    *,
    targets: Targets = LAST_TOKEN,
    evaluated: Evaluated | None = None,
    **more,
) -> Rehearsal:
    """The rehearsal of a step, held against the real one; `record` is pytest's `record_property`."""
    config = run_of(method, world.size, **more)
    options = {"targets": targets, "evaluated": evaluated}
    planned = rehearse(SHAPES[shape](), config, world.size, long, short, **options)
    step = {"shape": SHAPES[shape](), "config": config, "long": long, "short": short, **options}
    real = world.run(measured, seconds=STEP_SECONDS, **step)[0]
    engine = "fsdp" if config.engine == "fsdp" else "zero3"
    sizes = f"{config.zo_micro_batch} x {long}, {config.fo_micro_batch} x {short}, {config.dtype}"
    figures = f"{planned.peak / 1e6:7.1f} MB, measured {real.peak / 1e6:7.1f}, {planned.peak / real.peak - 1:+.2%}"
    record("planned peak", f"{shape:13} {engine:5} {world.size} {method:8} {sizes:28} {figures}")
    apart = {part: size - real.parts[part] for part, size in planned.parts.items()}
    assert planned.peak == pytest.approx(real.peak, rel=0.005), apart
    assert planned.host == pytest.approx(real.host, rel=0.005)
    assert planned.collectives == real.collectives
    assert planned.received == real.received
    return planned


def under_zero(folder: Path, zero: dict) -> dict:
    """A run's settings for ZeRO-3 with these in zero_optimization."""
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}
    (folder / "ds.json").write_text(json.dumps(settings))
    return {"engine": "deepspeed", "ds_config": str(folder / "ds.json")}
