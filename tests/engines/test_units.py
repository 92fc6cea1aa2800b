"""Units: what is gathered together, and weights that more than one of them holds."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from addax_ds.engines.units import units_of
from tests.engines.agreement import check_steps
from tests.engines.setups import HIDDEN, batch_for, build_model, loss_for, running
from tests.world import World


def tie(model: nn.Module, *pairs: tuple[str, str]) -> nn.Module:
    """Have the second weight of each pair be the first."""
    for first, second in pairs:
        owner, _, local = second.rpartition(".")
        setattr(model.get_submodule(owner), local, model.get_parameter(first))
    return model


def test_every_block_and_what_stands_outside_is_a_unit_and_tied_weights_are_one():
    blocks = [["model.layers.0"], ["model.layers.1"]]
    outside = [["model.embed_tokens"], ["model.norm"], ["lm_head"]]
    assert units_of(build_model("llama-untied")) == blocks + outside
    assert units_of(build_model("llama-tied")) == [*blocks, ["model.norm"], ["model.embed_tokens", "lm_head"]]


def test_units_that_share_a_weight_are_merged_however_the_sharing_goes_round():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(4))
    model.head = nn.Linear(3, 3)
    tie(model, ("layers.0.0.weight", "layers.2.0.weight"), ("layers.1.1.weight", "layers.3.1.weight"))
    assert units_of(model) == [["layers.0", "layers.2"], ["layers.1", "layers.3"], ["head"]]
    tie(model, ("layers.0.0.bias", "head.bias"), ("layers.1.1.bias", "head.weight"))
    assert [sorted(unit) for unit in units_of(model)] == [["head", "layers.0", "layers.1", "layers.2", "layers.3"]]


class WithRootWeight(nn.Module):
    """A model around another that owns a weight of its own, needed when all of the inner one has run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.bias = nn.Parameter(torch.randn(HIDDEN))
        self.scale = nn.Parameter(torch.randn(HIDDEN), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return ((hidden * self.scale + self.bias) ** 2).mean(dim=(1, 2)).float()


def a_root_with_weights() -> nn.Module:
    torch.manual_seed(2)
    return WithRootWeight(build_model("llama-untied").model)


def blocks_that_share() -> nn.Module:
    return tie(build_model("llama-untied"), ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"))


def steps_and_evaluation(engine: str, build: Callable[[], nn.Module], of_root: bool) -> None:
    model = build()
    reference = copy.deepcopy(model)
    batches = [(batch_for("llama", 5, 12, i), batch_for("llama", 3, 6, 9 + i)) for i in range(2)]
    loss_fn = (lambda model, batch: model(**batch)) if of_root else loss_for("llama")
    with running(engine, model) as run:
        check_steps(run, reference, batches, loss_fn)
        (losses,) = run.optimizer.run_guests([lambda guest: loss_fn(guest, batches[0][0])])
    with torch.no_grad():
        expected = loss_fn(reference.eval(), batches[0][0])
    torch.testing.assert_close(losses, expected)


ENGINES = ("replicated", "fsdp", "zero3", "zero3-evicting")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_blocks_that_share_a_weight_agree_with_the_reference(world: World, engine: str):
    world.run(steps_and_evaluation, engine=engine, build=blocks_that_share, of_root=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world", [2], indirect=True)
def test_weights_of_the_root_last_through_the_forward_of_its_parts(world: World, engine: str):
    world.run(steps_and_evaluation, engine=engine, build=a_root_with_weights, of_root=True)
