"""The default loss: mean cross entropy over each sample's label tokens."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from addax_ds.adapters.choose import adapt
from addax_ds.config import LoraConfig, PrefixConfig
from addax_ds.loss import IGNORED, takes_logits_to_keep, token_loss


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


class WithoutLogitsToKeep(torch.nn.Module):
    """The same model, as one that always computes every position's logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


SAMPLES = [[5, 6, 7, 8, 9], [1, 2, 3], [11, 12, 13, 14]]
LABELLED = [2, 1, 3]  # label tokens at the end of each


def batch(side: str, samples=SAMPLES, labelled=LABELLED, width: int = 6) -> dict[str, torch.Tensor]:
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, count in zip(samples, labelled, strict=True):
        pad = [0] * (width - len(ids))
        parts = {
            "input_ids": (ids, pad),
            "attention_mask": ([1] * len(ids), pad),
            "labels": ([IGNORED] * (len(ids) - count) + ids[len(ids) - count :], [IGNORED] * len(pad)),
        }
        for key, (content, padding) in parts.items():
            rows[key].append(padding + content if side == "left" else content + padding)
    return {key: torch.tensor(value) for key, value in rows.items()}


def by_hand(model, ids: list[int], count: int) -> float:
    """The token at position t is predicted by the logits at t - 1."""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    places = range(len(ids) - count, len(ids))
    return -sum(logs[t - 1, ids[t]].item() for t in places) / count


# A loss of about 3.4, float32 logits from batched products in another order: a few ulps of each logit.
TOLERANCE = 2e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_sample_weighs_its_own_label_tokens_whatever_the_padding(model, side):
    losses = token_loss(model, batch(side))
    assert losses.shape == (3,) and losses.dtype == torch.float32
    for loss, ids, count in zip(losses, SAMPLES, LABELLED, strict=True):
        assert abs(loss.item() - by_hand(model, ids, count)) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_label_positions_only_give_the_same_loss_and_gradient(model, side):
    whole = WithoutLogitsToKeep(model)
    assert takes_logits_to_keep(model) and not takes_logits_to_keep(whole)
    losses, gradients = [], []
    for each in (model, whole):
        model.zero_grad()
        loss = token_loss(each, batch(side))
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("adapter", [None, LoraConfig(rank=2), PrefixConfig(tokens=2)])
def test_only_label_positions_reach_the_head(model, adapter):
    seen = []
    adapted = adapt(copy.deepcopy(model), adapter, None, seed=0) if adapter else model
    head = next(module for name, module in adapted.named_modules() if name.endswith("lm_head"))
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    token_loss(adapted, batch("left"))
    handle.remove()
    assert seen == [(3, 3, 31)]  # of 6 positions, the 3 before a label


def test_a_sample_without_labels_has_loss_zero_and_no_part_in_others(model):
    data = batch("right")
    alone = token_loss(model, data)
    data["labels"][1] = IGNORED
    losses = token_loss(model, data)
    assert losses[1] == 0.0
    torch.testing.assert_close(losses[[0, 2]], alone[[0, 2]], rtol=1e-6, atol=0)


def test_a_label_at_the_first_position_is_predicted_by_nothing(model):
    data = batch("right", [[4, 5, 6]], [3], width=3)
    assert abs(token_loss(model, data).item() - by_hand(model, [4, 5, 6], 2)) < TOLERANCE
