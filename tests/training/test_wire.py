"""Bytes on the wire: each collective counts what a rank receives, and a step costs what it should."""

import json

import pytest
import torch
import torch.distributed as dist

from addax_ds.training.wire import WireCounter
from tests.cli.commands import run
from tests.training.test_export import write_zero3

PAIR = pytest.mark.parametrize("world", [2], indirect=True)


def count_each() -> dict:
    """What the counter says of one collective of each kind, 2 ranks."""
    shard, whole = torch.ones(6), torch.ones(12)
    calls = {
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, shard),
        "all_gather": lambda: dist.all_gather([torch.empty(6), torch.empty(6)], shard),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(shard, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_reduce in half precision": lambda: dist.all_reduce(whole.bfloat16()),
        "broadcast": lambda: dist.broadcast(whole, src=0),
        "barrier": dist.barrier,
    }
    counts = {}
    for name, call in calls.items():
        with WireCounter() as counter:
            call()
        counts[name] = dict(counter.received)
    with WireCounter() as counter:
        dist.all_reduce(whole)
        dist.all_reduce(whole)
    dist.all_reduce(whole)  # outside: not counted
    counts["two"] = dict(counter.received)
    return counts


@PAIR
def test_every_collective_counts_what_a_rank_receives(world):
    for counts in world.run(count_each):
        assert counts == {
            "all_gather_into_tensor": {"all_gather": 24},  # the other rank's 6 float32
            "all_gather": {"all_gather": 24},
            "reduce_scatter_tensor": {"reduce_scatter": 24},
            "all_reduce": {"all_reduce": 48},  # a reduce-scatter and an all-gather
            "all_reduce in half precision": {"all_reduce": 24},
            "broadcast": {"broadcast": 48},
            "barrier": {},
            "two": {"all_reduce": 96},
        }


def wire(tmp_path, tiny, name, *settings):
    run("train", tiny.run_file, f"output={name}", "save=false", *settings, cwd=tmp_path, ranks=2).check()
    return json.loads((tmp_path / name / "summary.json").read_text())["wire_bytes_per_step"]


def test_a_mixed_step_moves_three_model_sizes_and_a_zeroth_order_step_one(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    half = sum(p.numel() for p in model.parameters()) * 4 // 2  # each of 2 ranks receives the other's half
    # An all-gather for the forward and one for the backward, which the last unit saves; a reduce-scatter.
    mixed = wire(tmp_path, tiny, "fsdp", "engine=fsdp")
    assert 1.5 * half < mixed["all_gather"] <= 2.1 * half
    assert mixed["reduce_scatter"] == pytest.approx(half, rel=0.1)
    assert mixed["all_reduce"] < 1000, "scalars only"
    zo = wire(tmp_path, tiny, "fsdp-zo", "engine=fsdp", "alpha=1")
    tied = model.get_input_embeddings().weight.numel() * 4 // 2  # gathered for the head once more
    assert zo["all_gather"] == pytest.approx(half + tied, rel=0.05) and "reduce_scatter" not in zo
    # Replicated weights need no gather; each gradient is all-reduced.
    replicated = wire(tmp_path, tiny, "replicated")
    assert replicated.keys() == {"all_reduce"}
    assert replicated["all_reduce"] == pytest.approx(2 * half, rel=0.01)
    # At its defaults ZeRO-3 keeps what a forward gathered for the backward.
    zero3 = wire(tmp_path, tiny, "zero3", *write_zero3(tmp_path))
    assert half * 0.99 < zero3["all_gather"] <= 2.1 * half
    assert zero3["reduce_scatter"] == pytest.approx(half, rel=0.1)
