import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from addax_ds.data.batches import (
    batch_indices,
    collate,
    collate_choices,
    collate_prompts,
    micro_batches,
)
from addax_ds.data.tasks import Example
from addax_ds.loss import choice_loss, choice_scores

PAD = 0
CHOICES = ((11, 12), (13,))
EXAMPLES = [
    Example((1, 2, 3, 4, 5), (11, 12), CHOICES, 0, (), contrasted=True),
    Example((6,), (13,), CHOICES, 1, (), contrasted=True),
    Example((PAD, 7, 8), (13,), CHOICES, 1, (), contrasted=True),  # a pad token that is text: OPT and SmolLM2 have such
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
    completions = [Example(e.prompt, e.target, (), -1, ("x",)) for e in EXAMPLES]
    batches = micro_batches(completions, 2, PAD, "right")
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_label_words_of_several_tokens_score_as_each_alone_does(model, side):
    with torch.no_grad():
        scores = choice_scores(model, collate_choices(EXAMPLES, PAD, side))
        alone = [
            [-losses(model, collate([Example(e.prompt, choice, (), 0, ())], PAD, "right")) for choice in CHOICES]
            for e in EXAMPLES
        ]
    torch.testing.assert_close(scores.double(), torch.tensor(alone, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_forward_for_one_token_words_gives_the_loss_of_a_forward_for_each(model, side):
    words = ((11,), (13,), (9,))
    examples = [Example(e.prompt, words[e.answer], words, e.answer, ()) for e in EXAMPLES]
    one = collate_choices(examples, PAD, side)
    assert one["input_ids"].shape == (3, 5)
    rows = [collate([Example(e.prompt, w, (), 0, ()) for w in words], PAD, side) for e in examples]
    with torch.no_grad():
        each = torch.stack([-losses(model, batch) for batch in rows])
        expected = torch.nn.functional.cross_entropy(each, one["answer"], reduction="none")
        torch.testing.assert_close(choice_loss(model, one).double(), expected, rtol=1e-6, atol=1e-7)


def test_micro_batches_of_a_classification_ask_for_its_label_words():
    (batch,) = micro_batches(EXAMPLES, 3, PAD, "left")
    assert batch["answer"].tolist() == [0, 1, 1]
    assert batch["input_ids"].shape == (3, 2, 7)
