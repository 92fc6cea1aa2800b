import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from addax_ds.data.batches import (
    batch_indices,
    collate,
    collate_choices,
    collate_prompts,
    micro_batches,
    single_token_choices,
)
from addax_ds.data.tasks import Example

PAD = 0
CHOICES = ((11, 12), (13,))
EXAMPLES = [
    Example((1, 2, 3, 4, 5), (11, 12), CHOICES, 0, ()),
    Example((6,), (13,), CHOICES, 1, ()),
    Example((PAD, 7, 8), (13,), CHOICES, 1, ()),  # a pad token that is text: OPT and SmolLM2 have such
]
POOL = [3, 14, 15, 92, 65, 35, 89]


def stream(steps, size, **changes):
    arguments = {"pool": POOL, "size": size, "seed": 5, "stream": "zo"} | changes
    return [batch_indices(step=step, **arguments) for step in steps]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).double().eval()


def test_every_epoch_holds_each_sample_exactly_once():
    drawn = [index for batch in stream(range(7 * 3), 3) for index in batch]
    for epoch in range(9):
        assert sorted(drawn[epoch * 7 : epoch * 7 + 7]) == sorted(POOL)


def test_every_batch_has_the_full_size_where_an_epoch_ends_too():
    assert all(len(batch) == 3 for batch in stream(range(20), 3))
    assert all(len(batch) == 7 for batch in stream(range(3), 7))


def test_a_batch_needs_no_history_so_that_resume_needs_no_state():
    ahead = stream(range(30), 4)
    assert stream(reversed(range(30)), 4) == ahead[::-1]
    assert stream([17], 4) == [ahead[17]]


def test_batches_of_another_size_cut_the_same_row():
    flat = [index for batch in stream(range(12), 1) for index in batch]
    assert flat == [index for batch in stream(range(3), 4) for index in batch]


def test_epochs_seeds_and_streams_are_shuffled_apart():
    pool = list(range(50))
    first, second = stream(range(2), 50, pool=pool)
    assert first != second
    assert stream([0], 50, pool=pool, seed=6) != [first]
    assert stream([0], 50, pool=pool, stream="fo") != [first]


def test_the_order_is_the_one_of_every_earlier_release():
    # A resumed run must draw what it would have drawn; change this only with the checkpoint format.
    assert stream([0, 1], 4) == [[92, 15, 65, 89], [14, 3, 35, 14]]


def test_labels_bear_the_target_only_and_masks_the_text_only():
    batch = collate(EXAMPLES, PAD, "right")
    assert batch["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 11, 12],
        [6, 13, 0, 0, 0, 0, 0],
        [0, 7, 8, 13, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 2, 4]
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert [row[row != -100].tolist() for row in batch["labels"]] == [[11, 12], [13], [13]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_left_and_right_padding_give_each_token_the_same_position_and_label():
    left, right = (collate(EXAMPLES, PAD, side) for side in ("left", "right"))
    for key in ("input_ids", "position_ids", "labels"):
        for row in range(len(EXAMPLES)):
            kept = [batch[key][row][batch["attention_mask"][row] == 1].tolist() for batch in (left, right)]
            assert kept[0] == kept[1]
    assert left["position_ids"].min() == 0
    assert left["attention_mask"][1].tolist() == [0, 0, 0, 0, 0, 1, 1]


def losses(model, batch):
    """Mean over each sample's label tokens [batch]."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, :-1].transpose(1, 2)
    per_token = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:], reduction="none")
    return per_token.sum(dim=1) / (batch["labels"][:, 1:] != -100).sum(dim=1)


def test_padding_on_either_side_leaves_the_loss_of_a_real_model_alone(model):
    with torch.no_grad():
        alone = torch.cat([losses(model, collate([example], PAD, "right")) for example in EXAMPLES])
        for side in ("left", "right"):
            torch.testing.assert_close(losses(model, collate(EXAMPLES, PAD, side)), alone, rtol=1e-9, atol=0)


def test_micro_batches_keep_the_order_and_pad_to_their_own_longest():
    batches = micro_batches(EXAMPLES, 2, PAD, "right")
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 7), (1, 4)]
    assert batches[1]["input_ids"].tolist() == [[0, 7, 8, 13]]


def test_prompt_batches_end_at_the_prompt_so_that_position_minus_1_predicts(model):
    batch = collate_prompts(EXAMPLES, PAD)
    assert set(batch) == {"input_ids", "attention_mask", "position_ids"}
    assert batch["input_ids"][:, -1].tolist() == [5, 6, 8]
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row, example in enumerate(EXAMPLES):
            alone = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-9, atol=1e-12)


def test_single_token_choices_are_found_only_when_every_word_is_one_token():
    assert single_token_choices(EXAMPLES[0]) is None
    one = Example((1,), (11,), ((11,), (13,)), 0, ())
    assert single_token_choices(one).tolist() == [11, 13]


def test_choice_rows_score_as_each_choice_alone_does(model):
    with torch.no_grad():
        rows = losses(model, collate_choices(EXAMPLES[:2], PAD, "left"))
        alone = [
            losses(model, collate([Example(e.prompt, choice, (), 0, ())], PAD, "right"))
            for e in EXAMPLES[:2]
            for choice in CHOICES
        ]
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-9, atol=0)
