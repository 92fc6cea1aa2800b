"""Skeletons hold no weights, and say so where one is asked for."""

import types

import pytest
import torch
from torch import nn

from addax_ds.core.skeleton import Absent, duplicate, link_buffers, owned_weights, strip
from addax_ds.errors import UserError


class Small(nn.Module):
    """Tied weights, a buffer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.embed(ids))))


def test_a_skeleton_owns_no_memory_but_answers_for_its_weights():
    model = Small()
    skeleton = strip(model)
    for parameter in skeleton.parameters():
        assert isinstance(parameter, Absent)
    weight = skeleton.head.weight
    assert (weight.shape, weight.dtype, weight.device) == ((7, 4), torch.float32, torch.device("cpu"))
    assert not any(module.training for module in skeleton.modules())
    assert model.training, "the model itself is left alone"


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 1,
        lambda w: w @ torch.ones(4, 2),
        lambda w: nn.functional.linear(torch.ones(1, 4), w),
        lambda w: w.sum(),
        lambda w: w[0],
        lambda w: w.to(torch.bfloat16),
        lambda w: torch.cat([w, w]),
        lambda w: w.copy_(torch.zeros(7, 4)),
    ],
    ids=["add", "matmul", "linear", "sum", "index", "to", "cat", "copy"],
)
def test_arithmetic_on_an_absent_weight_raises_and_names_it(use):
    with pytest.raises(UserError, match=r"embed\.weight is read outside the forward"):
        use(strip(Small()).head.weight)


def test_tied_weights_have_one_name_and_buffers_are_shared():
    model = Small()
    skeleton = strip(model)
    owned = {path: names for path, _, names in owned_weights(skeleton)}
    assert owned["embed"] == owned["head"] == {"weight": "embed.weight"}
    assert set(owned) == {"embed", "norm", "head"}
    assert skeleton.norm.running_mean is model.norm.running_mean
    copy = duplicate(skeleton)
    assert copy.norm is not skeleton.norm and copy.norm.running_mean is model.norm.running_mean
    assert copy.head.weight is skeleton.head.weight


def test_buffers_that_were_replaced_are_linked_again():
    model = Small()
    skeleton = strip(model)
    model.norm.running_mean = torch.full((4,), 3.0)
    assert skeleton.norm.running_mean is not model.norm.running_mean
    link_buffers(skeleton, model)
    assert skeleton.norm.running_mean is model.norm.running_mean


def test_a_forward_of_the_models_own_goes_with_it_where_it_is_a_method_and_is_refused_else():
    model = Small()
    model.forward = types.MethodType(lambda self, ids: self.head, model)
    skeleton = strip(model)
    assert skeleton(None) is skeleton.head and skeleton.head is not model.head
    forward = model.forward
    model.head.forward = lambda x: forward(x)
    with pytest.raises(UserError, match=r"head\.forward was replaced by a function that is no method of it"):
        strip(model)
