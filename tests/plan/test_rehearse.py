"""Rehearsals against real runs, and against what the method says of traffic."""

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import MambaConfig, Qwen2MoeConfig, Qwen3Config

from addax_ds.data.tasks import Example
from addax_ds.errors import UserError
from addax_ds.plan.batches import Targets
from addax_ds.plan.cluster import GPUS, Cluster
from addax_ds.plan.evaluated import Evaluated
from addax_ds.plan.memory import Curve
from addax_ds.plan.rehearse import blocks_are_alike, rehearse, with_layers
from addax_ds.plan.shardings import settings_of
from addax_ds.shapes import SHAPES, count_of, shape_of
from addax_ds.training import evaluation
from tests.plan.real import STEP_SECONDS, allocated, compare, run_of, small_llama, under_zero
from tests.world import World

pytestmark = pytest.mark.timeout(2 * STEP_SECONDS)  # so that ranks that hang are told of by their world

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

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
def test_the_peak_of_a_real_step_is_that_of_its_rehearsal(
    record_property, world: World, method, shape, more, long, short
):
    compare(record_property, world, method, shape, long, short, **more)


@pytest.mark.parametrize(
    ("world", "method", "more"),
    [
        (1, "addax", {"perturb": "shard"}),
        (1, "ip-sgd", {"activation_checkpointing": True}),
        (1, "adamw", {}),
        (1, "lora", {}),
    ],
    indirect=["world"],
)
def test_torchs_allocator_counts_the_same_bytes(record_property, world: World, method, more):
    """On one rank, where gloo makes no copies, and in float32: in bfloat16 a CPU's kernels take room of their own."""
    config = run_of(method, 1, **more)
    planned = rehearse(small_llama(), config, 1, 256, 64).peak
    counted = world.run(allocated, shape=small_llama(), config=config, long=256, short=64)[0]
    record_property("peak by torch's allocator", f"{method:7} {planned / 1e6:6.2f} MB, counted {counted / 1e6:6.2f}")
    assert planned == pytest.approx(counted, rel=0.005)


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
    (2, "sgd", "llama", {}, LARGE, 64, 256),
    (2, "addax", "llama", {}, {**LARGE, **ON_CPU}, 256, 64),
    (4, "addax", "llama-tied", {}, EVICTING, 256, 64),
    (4, "addax", "opt", {}, {**LARGE, "zero_hpz_partition_size": 2}, 128, 128),
    (4, "addax", "llama", {}, {**EVICTING, **ON_CPU, "zero_hpz_partition_size": 2}, 128, 128),
]
"""As above, with what stands in zero_optimization."""


@pytest.mark.parametrize(("world", "method", "shape", "more", "zero", "long", "short"), ZERO_POINTS, indirect=["world"])
def test_so_it_is_under_zero_3(record_property, world: World, tmp_path, method, shape, more, zero, long, short):
    settings = under_zero(tmp_path, zero)
    planned = compare(record_property, world, method, shape, long, short, **settings, **more)
    assert (planned.host > 0) == ("offload_param" in zero)


@pytest.mark.parametrize(
    ("world", "method", "more"),
    [(2, "addax", {}), (2, "ip-sgd", {"dtype": "bfloat16"}), (2, "sgd", {}), (2, "lora", {}), (1, "adamw", {})],
    indirect=["world"],
)
def test_so_it_is_with_weights_on_the_host(record_property, world: World, method, more):
    planned = compare(record_property, world, method, "llama", 256, 64, offload=True, **more)
    assert planned.host > 0


@pytest.mark.parametrize(
    ("world", "method", "targets"),
    [
        (2, "addax", Targets(tokens=40, scattered=True)),
        (2, "adamw", Targets(tokens=2, words=3)),
    ],
    indirect=["world"],
)
def test_so_it_is_with_targets_of_several_tokens_and_words(record_property, world: World, method, targets):
    of_one = rehearse(small_llama(), run_of(method, world.size), world.size, 128, 128)
    planned = compare(record_property, world, method, "llama", 128, 128, targets=targets)
    assert planned.peak > 1.01 * of_one.peak
    # Logits of all places, and at least as much once more as the loss is taken of them.
    columns = targets.columns(2 * max(targets.words, 1), 128) * 2 * max(targets.words, 1)
    assert max(parts["logits"] for parts in planned.moments.values()) >= 2 * columns * 6000 * 4


SPAN = Example((0,) * 200, (0, 0), choices=(), answer=-1, references=("a",))
LONGER = replace(SPAN, prompt=SPAN.prompt * 2)
RECORD = Example((0,) * 150, (0,), choices=((0,),) + ((0, 0),) * 8, answer=0, references=())
FIVE, THREE = (replace(RECORD, prompt=(0,) * 100, choices=((0, 0),) * rows) for rows in (5, 3))


@pytest.mark.parametrize(
    ("world", "method", "engine", "evaluated"),
    [
        (1, "addax", "fsdp", Evaluated((SPAN,), samples=32, new_tokens=6)),
        (2, "mezo", "fsdp", Evaluated((replace(RECORD, choices=RECORD.choices[:1] * 2),), samples=99, new_tokens=0)),
        (2, "adamw", "fsdp", Evaluated((SPAN,), samples=24, new_tokens=6)),
        (2, "adazeta", "fsdp", Evaluated((RECORD,), samples=8, new_tokens=0)),
        (2, "addax", "zero3", Evaluated((SPAN,), samples=64, new_tokens=6)),
    ],
    indirect=["world"],
)
def test_so_it_is_in_evaluations(record_property, world: World, tmp_path, method, engine, evaluated):
    settings = under_zero(tmp_path, LARGE) if engine == "zero3" else {}
    compare(record_property, world, method, "llama", 64, 64, evaluated=evaluated, **settings)


@pytest.mark.parametrize(
    ("world", "words", "padding"),
    [
        (1, ((0,) * 4, *23 * ((0,) * 5,)), "right"),
        (1, 4 * ((0,) * 40,), "right"),
        (1, ((0, 0), *3 * ((0,) * 40,)), "left"),
        (1, ((0, 0), *3 * ((0,) * 40,)), "right"),
    ],
    indirect=["world"],
)
def test_so_it_is_where_choices_are_longer_than_what_is_right(record_property, world: World, words, padding):
    evaluated = Evaluated((replace(RECORD, choices=words),), samples=64, new_tokens=0)
    compare(record_property, world, "mezo", "llama", 64, 64, evaluated=evaluated, padding=padding)


@pytest.mark.parametrize(
    ("others", "at_once", "wanted"),
    [
        ([SPAN, LONGER], 8, LONGER),
        # Nine rows of 152 tokens are more than eight of 159.
        ([replace(SPAN, prompt=(0,) * 150), RECORD], 8, RECORD),
        # Three of five rows are as many as five of three, but one of them is fewer than two.
        ([FIVE, THREE], 16, FIVE),
        ([FIVE, THREE], 8, THREE),
    ],
)
def test_what_takes_most_of_an_evaluation_is_found(monkeypatch, others, at_once, wanted):
    evaluated, given = Evaluated.of([others * 20, others * 30], new_tokens=9), []
    monkeypatch.setattr(evaluation, "evaluate", lambda _, examples, *__: given.extend(examples))
    config = run_of("addax", 2, eval_micro_batch=at_once)
    evaluated.run(SimpleNamespace(engine=SimpleNamespace(world_size=2)), config, frozenset())
    assert evaluated.samples == 60 and given[0] == wanted
    # Two ranks, four lanes each, as many as a forward takes.
    assert len(given) == min(2 * 4 * max(at_once // max(len(wanted.choices), 1), 1), 60)
    assert {example.length for example in given} == {wanted.length}


def test_a_model_that_cannot_be_rehearsed_says_so_in_the_step():
    """As a Mamba's forward reads a weight of a module that it does not call."""
    with pytest.raises(UserError, match="outside the forward"):
        rehearse(mamba(), run_of("mezo", 2), 2, 32, 32)


def test_it_can_be_where_the_run_holds_those_weights_together():
    assert rehearse(mamba(), run_of("mezo", 2, atomic=["*.mixer"]), 2, 32, 32).peak > 0
    evaluated = Evaluated.words(32, 8)  # baselines, too, evaluate through lanes
    assert rehearse(mamba(), run_of("adamw", 2, atomic=["*.mixer"]), 2, 32, 32, evaluated=evaluated).peak > 0


def mamba():
    return MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=500, state_size=4)


@pytest.mark.parametrize("world", [1], indirect=True)
def test_so_it_is_with_label_words_after_prompts_of_different_lengths(record_property, world: World):
    compare(record_property, world, "ip-sgd", "llama", 128, 128, targets=Targets(words=2, scattered=True))


@pytest.mark.parametrize("targets", [Targets(tokens=30, scattered=True), Targets(tokens=100)])
def test_a_few_lengths_tell_of_those_between(targets):
    config, shape = run_of("ip-sgd", 2), small_llama()
    shape.vocab_size, shape.num_hidden_layers = 32000, 2

    def rehearsed(length):
        future = Future()
        future.set_result(rehearse(shape, config, 2, 300, length, targets=targets))
        return future

    curve = Curve(rehearsed, 20, 300, kinks=targets.kinks(config.fo_micro_batch))
    for length in (40, 95, 200):
        assert curve.at(length) == pytest.approx(rehearsed(length).result().peak, rel=0.002), length


@pytest.mark.parametrize(
    ("world", "method", "shape"),
    [(4, "addax", "llama"), (4, "ip-sgd", "opt"), (4, "adamw", "llama"), (4, "lora", "llama")],
    indirect=["world"],
)
def test_so_it_is_with_replicas_of_shards(record_property, world: World, method, shape):
    compare(record_property, world, method, shape, 256, 64, replicas=2)


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
    ("model", "sharding"),
    [("meta-llama/Llama-2-70b-hf", "fsdp"), ("facebook/opt-13b", "fsdp"), ("Qwen/Qwen2.5-0.5B", "zero3")],
)
def test_so_do_those_of_a_large_model_and_of_tied_embeddings(tmp_path, model, sharding):
    shape, nodes = shape_of(model), Cluster(2, 8, GPUS["h100"])
    config = run_of("addax", 16, dtype="bfloat16", **settings_of(sharding, nodes, shape, "bfloat16", tmp_path))
    few, whole = (rehearse(shape, config, 16, 256, 64, all_layers=every) for every in (False, True))
    assert few.peak == pytest.approx(whole.peak, rel=0.01)
    assert few.received == pytest.approx(whole.received, rel=0.01)


def test_fewer_blocks_have_fewer_of_what_is_listed_by_block():
    shape = Qwen3Config(num_hidden_layers=6, layer_types=["full_attention", "sliding_attention"] * 3, sliding_window=8)
    assert with_layers(shape, 3).layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_blocks_that_are_not_alike_are_known():
    assert all(blocks_are_alike(shape_of(name)) for name in SHAPES)
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 50}
    assert blocks_are_alike(Qwen3Config(**sizes))
    assert not blocks_are_alike(Qwen3Config(**sizes, layer_types=["full_attention", "sliding_attention"] * 2))
    assert not blocks_are_alike(Qwen2MoeConfig(**sizes, num_experts=2, mlp_only_layers=[3]))


@pytest.mark.parametrize(
    ("model", "billions", "of_a_token"),
    [
        ("meta-llama/Llama-2-70b-hf", 68.977, 68.977 - 0.524),
        ("facebook/opt-13b", 12.853, 12.853 - 0.268),
        ("facebook/opt-66b", 65.72, 65.72 - 0.482),
        ("Qwen/Qwen2.5-0.5B", 0.494, 0.494 - 0.136),
        # Experts lie along the dimension that is sharded: on 16 ranks 8 are padded to twice their 45.097 billions. A
        # token takes two of them.
        ("mistralai/Mixtral-8x7B-v0.1", 46.703 + 45.097, 46.703 - 0.262 - 45.097 * 6 / 8),
    ],
)
def test_a_mixed_step_of_16_ranks_receives_three_model_sizes(model, billions, of_a_token):
    """of_a_token: billions of weights of blocks that a token is multiplied by."""
    shape, config = shape_of(model), run_of("addax", 16, dtype="bfloat16")
    step = rehearse(shape, config, 16, 256, 64)
    size = 2e9 * billions * 15 / 16
    # FSDP2 pads what 16 does not divide.
    assert sum(step.received.values()) == pytest.approx(3 * size, rel=0.05)
    assert step.collectives["_allgather_base_"] == 2 * step.collectives["_reduce_scatter_base_"]
    assert step.collectives["allreduce_"] == 1
    a_block = count_of(with_layers(shape, 2)) - count_of(with_layers(shape, 1))
    assert max(parts["reduced gradients"] for parts in step.moments.values()) >= 2 * a_block
    # Two forwards, and a forward and twice that in the backward; attention and the few logits are little.
    assert step.flops == pytest.approx(2e9 * of_a_token * (2 * 2 * 256 + 3 * 2 * 64), rel=0.05)
    shard = 2e9 * billions / 16
    assert shard <= step.parts["weights"] <= 1.01 * shard + 1e6


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"perturb": "auto"}, "plan perturb=gathered or perturb=shard"),
        ({"engine": "replicated"}, "engine replicated cannot be rehearsed: set engine: fsdp or deepspeed"),
        ({"engine": "deepspeed", "ds_config": str(DS_CONFIGS / "zero2.json")}, "ZeRO stage 2 cannot be"),
        (
            {"engine": "deepspeed", "ds_config": str(DS_CONFIGS / "zero3_offload_param.json"), "method": "adamw"},
            "method adamw of DeepSpeed cannot be rehearsed with offloading",
        ),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(settings, told):
    method = settings.pop("method", "addax")
    with pytest.raises(UserError, match=told):
        rehearse(small_llama(), run_of(method, 2, **settings), 2, 64, 64)
