"""Adapters train alone, on every engine, to the same bits; in float32 beside a bfloat16 backbone too."""

import copy

import pytest
import torch
from torch import nn

from addax_ds.adapters import add_adapters, through_peft
from addax_ds.config import LoraConfig, PrefixConfig, TensorTrainConfig
from tests.engines.agreement import check_steps
from tests.engines.setups import batch_for, build_model, loss_for, running
from tests.world import World

ENGINES = ("replicated", "zero2", "fsdp", "zero3", "zero3-evicting")
KINDS = {
    "tensor-train": TensorTrainConfig(bottleneck=6, rank=2),
    "lora": LoraConfig(rank=2),
    "prefix": PrefixConfig(tokens=3),
}


def adapted_model(adapter: str, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model, config = build_model(kind, dtype), KINDS[adapter]
    if isinstance(config, TensorTrainConfig):
        add_adapters(model, config)
    else:
        model = through_peft.add(model, config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def train(engine: str, alpha: float, adapter: str, kind: str, dtype: torch.dtype = torch.float32) -> str:
    model = adapted_model(adapter, kind, dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    with running(engine, model, alpha=alpha, queries=2, distribution="rademacher") as run:
        for step in range(3):
            batches = batch_for(kind, 5, 12, 2 * step), batch_for(kind, 3, 6, 2 * step + 1)
            assert not run.train_step(*batches)["skipped"]
        weights = run.weights()
        moved = {name for name in before if not torch.equal(weights[name], before[name])}
        assert moved == own
        assert {weights[name].dtype for name in own} == {torch.float32}
        assert {weights[name].dtype for name in before.keys() - own} == {dtype}
        return run.digest()


@pytest.mark.parametrize("world", [3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", KINDS)
def test_zeroth_order_steps_of_adapters_are_the_same_on_every_engine(world: World, adapter: str, dtype: torch.dtype):
    steps = {"alpha": 1.0, "adapter": adapter, "kind": "llama-tied", "dtype": dtype}
    digests = {
        (engine, rank): digest
        for engine in ENGINES
        for rank, digest in enumerate(world.run(train, engine=engine, **steps))
    }
    assert len(set(digests.values())) == 1, digests


def take_steps(engine: str, adapter: str, kind: str) -> None:
    plain = adapted_model(adapter, kind)
    reference = copy.deepcopy(plain)
    batches = [(batch_for(kind, 5, 12, 2 * i), batch_for(kind, 3, 6, 2 * i + 1)) for i in range(3)]
    with running(engine, plain) as run:
        check_steps(run, reference, batches, loss_for(kind))


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        *(("tensor-train", kind) for kind in ("llama-untied", "opt", "bert", "roberta", "qwen2", "qwen3")),
        *((adapter, kind) for adapter in ("lora", "prefix") for kind in ("llama-tied", "opt")),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_mixed_steps_of_adapters_agree_with_the_reference(world: World, engine: str, adapter: str, kind: str):
    world.run(take_steps, engine=engine, adapter=adapter, kind=kind)
