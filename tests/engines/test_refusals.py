"""Settings that would give wrong numbers in silence are refused by name."""

import types
import warnings
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import addax_ds
from addax_ds.errors import UserError
from addax_ds.optimizer import Addax
from tests.engines.setups import HYPER, batch_for, build_model, deepspeed_config, running
from tests.world import World

MODEL = "llama-tied"
ONE_RANK = pytest.mark.parametrize("world", [1], indirect=True)
TWO_RANKS = pytest.mark.parametrize("world", [2], indirect=True)

DEEPSPEED_SETTINGS = {
    "gradient_clipping": ("zero3", {"gradient_clipping": 1.0}),
    "gradient_accumulation_steps": ("zero3", {"gradient_accumulation_steps": 2}),
    "fp16": ("zero3", {"fp16": {"enabled": True}}),
    "torch_autocast": ("zero3", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "zero_optimization.offload_optimizer": ("zero3", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "zero_optimization.offload_param.device": (
        "zero3",
        {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
    ),
    "zero_optimization.zero_quantized_weights": ("zero3", {"zero_optimization": {"zero_quantized_weights": True}}),
    "zero_optimization.zenflow": (
        "zero2",
        {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}, "offload_optimizer": {"device": "cpu"}}},
    ),
    "compile.deepcompile": ("zero3", {"compile": {"deepcompile": True}}),
    "tensor_parallel": ("zero1", {"tensor_parallel": {"autotp_size": 2}}),
}


def merged(config: dict, changes: dict) -> dict:
    for key, value in changes.items():
        config[key] = merged(dict(config.get(key, {})), value) if isinstance(value, dict) else value
    return config


def initialize_with(setting: str) -> str:
    import deepspeed

    stage, changes = DEEPSPEED_SETTINGS[setting]
    config = merged(deepspeed_config(stage, HYPER), changes)
    # DeepSpeed refuses float16 itself on processors that lack it.
    float16 = mock.patch.object(deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    with float16, pytest.raises(UserError) as refused:
        deepspeed.initialize(model=build_model(MODEL), config=config)
    return str(refused.value)


@pytest.mark.parametrize("setting", DEEPSPEED_SETTINGS)
@TWO_RANKS
def test_deepspeed_settings_are_refused_by_name(world: World, setting: str):
    messages = world.run(initialize_with, setting=setting)
    if setting == "tensor_parallel":
        world.kill()  # DeepSpeed keeps its groups for good, and the next engine would trip over them
    for message in messages:
        assert setting in message or (setting.endswith("zenflow") and "offload_optimizer" in message)
        assert ": " in message and "\n" not in message  # says what to do, in one line


def initialize_with_uneven_nodes() -> None:
    with pytest.raises(UserError, match=r"zero_hpz_partition_size .* give a divisor of the 3 ranks"):
        running("zero3-hpz", build_model(MODEL)).__enter__()


@pytest.mark.parametrize("world", [3], indirect=True)
def test_hpz_partitions_that_do_not_divide_the_ranks_are_refused(world: World):
    world.run(initialize_with_uneven_nodes)


def initialize_with_two_partition_sizes() -> None:
    with running("zero3-hpz", build_model(MODEL)):
        pass
    with pytest.raises(UserError, match=r"zero_hpz_partition_size 4: .* partitions of 2 ranks"):
        running("zero3-hpz", build_model(MODEL), zero={"zero_hpz_partition_size": 4}).__enter__()
    with running("zero3-evicting", build_model(MODEL)) as run:
        run.train_step(batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6))
        assert run.engine._parameters[run.engine.names[0]].ds_secondary_tensor_num_of_groups == 1


@pytest.mark.parametrize("world", [4], indirect=True)
def test_a_process_keeps_one_hpz_partition_size_and_plain_zero3_has_none(world: World):
    world.run(initialize_with_two_partition_sizes)


def initialize_with_defaults() -> None:
    """DeepSpeed clips at 1.0 unless told otherwise; nobody asked for it, so it is off, not refused."""
    with running("zero3", build_model(MODEL)) as run:
        assert run.deepspeed.gradient_clipping() == 0.0
        run.train_step(batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6))


@TWO_RANKS
def test_deepspeeds_default_clipping_is_switched_off(world: World):
    world.run(initialize_with_defaults)


def refused_fsdp(how: str) -> str:
    mesh = init_device_mesh("cpu", (1,))
    model = build_model(MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as refused:
            if how == "FSDP1":
                Addax(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
            elif how == "FSDP1 inside":
                model.model.layers[0] = FullyShardedDataParallel(model.model.layers[0], device_id=torch.device("cpu"))
                addax_ds.shard(model, mesh)
            elif how == "fully_shard":
                Addax(fully_shard(model, mesh=mesh))
            elif how == "fully_shard, then shard":
                addax_ds.shard(fully_shard(model, mesh=mesh), mesh)
            elif how == "DistributedDataParallel":
                Addax(torch.nn.parallel.DistributedDataParallel(model))
            elif how == "float16":
                Addax(model.half())
            elif how == "frozen":
                Addax(model.requires_grad_(False))
    return str(refused.value)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("FSDP1", "FSDP1"),
        ("FSDP1 inside", "FSDP1"),
        ("fully_shard", "addax_ds.shard"),
        ("fully_shard, then shard", "already wrapped"),
        ("DistributedDataParallel", "data parallel"),
        ("float16", "float16"),
        ("frozen", "requires_grad"),
    ],
)
@ONE_RANK
def test_models_wrapped_or_typed_wrongly_are_refused(world: World, how: str, words: str):
    [message] = world.run(refused_fsdp, how=how)
    assert words in message and "\n" not in message


def refused_step(engine: str, how: str) -> str:
    model = build_model(MODEL)
    with running(engine, model) as run:
        before = run.digest()
        if how == "reduce":
            model.set_requires_gradient_sync(False)
        elif how == "all-reduce":
            model.set_requires_all_reduce(False)
        elif how == "reshard":
            model.set_reshard_after_backward(False)
        elif how == "assign":
            model.load_state_dict(model.state_dict(), assign=True)
        elif how == "reentrant":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(UserError) as refused:
            run.train_step(batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6))
        if how != "assign":
            assert run.digest() == before
            return str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("world", "engine", "how", "words"),
    [
        (2, "fsdp", "reduce", "set_requires_gradient_sync"),
        (4, "hsdp", "all-reduce", "set_requires_all_reduce"),
        (2, "fsdp", "reshard", "set_reshard_after_backward"),
        (2, "fsdp", "assign", "assign=True"),
        *((2, engine, "reentrant", "use_reentrant") for engine in ("replicated", "fsdp", "zero3")),
    ],
    indirect=["world"],
)
def test_settings_changed_after_the_build_are_refused_at_the_next_step(world: World, engine: str, how: str, words: str):
    for message in world.run(refused_step, engine=engine, how=how):
        assert words in message and "\n" not in message


def unreached(engine: str) -> str:
    model = build_model(MODEL)
    model.unused_head = torch.nn.Linear(15, 5)
    with running(engine, model) as run:
        before = run.digest()
        with pytest.raises(UserError) as refused:
            run.train_step(batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6))
        assert run.digest() == before
    model = build_model(MODEL)
    model.unused_head = torch.nn.Linear(15, 5).requires_grad_(False)
    with running(engine, model) as run:
        run.train_step(batch_for(MODEL, 2, 12), batch_for(MODEL, 2, 6))
    return str(refused.value)


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero3"])
@TWO_RANKS
def test_a_unit_that_no_forward_reaches_is_refused_unless_frozen(world: World, engine: str):
    for message in world.run(unreached, engine=engine):
        assert "unused_head" in message and "requires_grad_(False)" in message


def two_types_in_a_unit(trainable: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = build_model(MODEL, torch.bfloat16)
    model.model.layers[1].input_layernorm.float().requires_grad_(trainable)
    if not trainable:
        addax_ds.shard(model, mesh)
        return
    with pytest.raises(UserError, match=r"layers\.1\.self_attn.* is torch\.bfloat16 and model\.layers\.1\.input_lay"):
        addax_ds.shard(model, mesh)
    addax_ds.shard(model.float(), mesh)  # nothing was wrapped


@pytest.mark.parametrize("trainable", [True, False])
@TWO_RANKS
def test_two_types_in_a_unit_of_fsdp_are_refused_by_name(world: World, trainable: bool):
    world.run(two_types_in_a_unit, trainable=trainable)


def forward_replaced_after_shard() -> None:
    model = build_model(MODEL)
    addax_ds.shard(model, init_device_mesh("cpu", (2,)))
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: forward(self, *args, **kwargs), model)
    with pytest.raises(UserError, match=r"the model\.forward was replaced after addax_ds\.shard"):
        Addax(model)


@TWO_RANKS
def test_a_forward_replaced_after_shard_is_refused(world: World):
    world.run(forward_replaced_after_shard)
