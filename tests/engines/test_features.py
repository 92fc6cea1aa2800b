"""What a step may come with, on every engine and two world sizes, 3 among them.

Features that share nothing run in one case, so that each meets every engine within the suite's time.
"""

import copy

import pytest
import torch
from torch import nn

from tests.engines.agreement import check_steps
from tests.engines.setups import ENGINES, HIDDEN, TWO_BY_TWO, batch_for, build_model, loss_for, running
from tests.world import World

SLOW_LR, LR = 0.02, 0.1
CELLS = [
    pytest.param(size, engine, id=f"{engine}-{size}")
    for engine in ENGINES
    for size in ((4,) if engine in TWO_BY_TWO else (2, 3))
]
ON_EVERY_ENGINE = pytest.mark.parametrize(("world", "engine"), CELLS, indirect=["world"])


def add_unused_part(block: nn.Module) -> None:
    """A part of a block that no forward enters: it is trained, but gets no gradient."""
    torch.manual_seed(1)
    block.unused = nn.Linear(HIDDEN, 5)


def is_slow(name: str) -> bool:
    return "norm" in name


def two_groups(model: nn.Module) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if not is_slow(name)]},
        {"params": [p for name, p in named if is_slow(name)], "lr": SLOW_LR},
    ]


def frozen_layer_unused_part_groups_and_decay(engine: str) -> None:
    model = build_model("llama-untied")
    add_unused_part(model.model.layers[1])
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    reference = copy.deepcopy(model)
    batches = [(batch_for("llama", 5, 12, i), batch_for("llama", 3, 6, 9 + i)) for i in range(2)]
    with running(engine, model, groups=two_groups, weight_decay=0.1) as run:
        check_steps(run, reference, batches, loss_for("llama"), lr_of=lambda name: SLOW_LR if is_slow(name) else LR)


@ON_EVERY_ENGINE
def test_frozen_weights_stay_and_unreached_ones_get_their_zeroth_order_part(world: World, engine: str):
    world.run(frozen_layer_unused_part_groups_and_decay, engine=engine)


def idle_ranks_then_accumulation_with_checkpointing(engine: str) -> None:
    model = build_model("opt")
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # One micro-batch of each: all other ranks only take part. Then 3 and 7, the last of them uneven.
    batches = [
        (batch_for("opt", 1, 12, 0), batch_for("opt", 1, 6, 1)),
        (batch_for("opt", 5, 12, 2), batch_for("opt", 13, 6, 3)),
    ]
    with running(engine, model, queries=2) as run:
        check_steps(run, reference, batches, loss_for("opt"))


@ON_EVERY_ENGINE
def test_ranks_without_a_micro_batch_and_ranks_with_several_weigh_samples_alike(world: World, engine: str):
    world.run(idle_ranks_then_accumulation_with_checkpointing, engine=engine)


def zeroth_order_only(engine: str) -> None:
    model = build_model("llama-tied")
    reference = copy.deepcopy(model)
    batches = [(batch_for("llama", samples, 12, samples), None) for samples in (1, 5)]
    with running(engine, model, alpha=1.0, queries=2, distribution="rademacher") as run:
        check_steps(run, reference, batches, loss_for("llama"))


@ON_EVERY_ENGINE
def test_alpha_1_is_mezo_without_a_first_order_batch(world: World, engine: str):
    world.run(zeroth_order_only, engine=engine)


def first_order_only(engine: str) -> None:
    model = build_model("bert")
    add_unused_part(model.bert.encoder.layer[1])
    reference = copy.deepcopy(model)
    batches = [(None, batch_for("bert", samples, 7, samples)) for samples in (1, 7)]
    with running(engine, model, alpha=0.0, weight_decay=0.1) as run:
        check_steps(run, reference, batches, loss_for("bert"))


@ON_EVERY_ENGINE
def test_alpha_0_is_sgd_and_leaves_what_no_gradient_reaches(world: World, engine: str):
    world.run(first_order_only, engine=engine)
