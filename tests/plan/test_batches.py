"""Batches of rehearsals, held against those of runs."""

import pytest

from addax_ds import loss
from addax_ds.data.batches import micro_batches
from addax_ds.data.tasks import Example
from addax_ds.plan.batches import Targets


def example(length: int, target: int, choices: tuple[int, ...] = ()) -> Example:
    """Of so many tokens of prompt and target; with choices of so many, of which the first is right."""
    words = tuple((1,) * tokens for tokens in choices)
    prompt = (2,) * (length - target)
    return Example(prompt, words[0] if words else (1,) * target, words, 0 if words else -1, (), contrasted=bool(words))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("target", "choices"),
    [(1, ()), (4, ()), (1, (1, 1)), (2, (2, 3, 1))],
    ids=["one token", "a span", "label words", "label words of several tokens"],
)
def test_a_batch_is_as_wide_as_one_of_a_run_and_has_as_many_logits(padding, target, choices):
    longest = max((target, *choices))
    # Rows of different choices end apart where choices do, and those of different samples always.
    examples = [example(40 - 8 * index, target, choices) for index in range(3)]
    targets = Targets.of(examples, padding)
    (real,) = micro_batches(examples, 3, pad_id=0, side=padding)
    (planned,) = targets.micro_batches(3, 3, max(example.length for example in examples), vocabulary=50)
    assert {name: tensor.shape for name, tensor in planned.items()} == {name: t.shape for name, t in real.items()}
    assert targets.loss_fn is (loss.choice_loss if choices else loss.token_loss)

    def columns(batch):
        if "choices" in batch:
            return len(loss._last_columns(batch["attention_mask"])[0])
        return len(loss._target_columns(batch["labels"].flatten(0, -2)[:, 1:]))

    rows = planned["input_ids"].flatten(0, -2)
    assert columns(planned) == targets.columns(*rows.shape)
    # Choices of a sample overlap, which plans do not count on.
    at_most = longest > 1 and bool(choices) and padding == "right"
    assert columns(real) < columns(planned) if at_most else columns(real) == columns(planned)


def test_more_places_than_a_batch_is_wide_are_all_of_them():
    targets = Targets(tokens=6, scattered=True)
    (batch,) = targets.micro_batches(4, 4, 10, vocabulary=50)
    assert len(loss._target_columns(batch["labels"][:, 1:])) == targets.columns(4, 10) == 9


def test_micro_batches_take_all_samples_and_hold_their_target():
    assert [len(batch["input_ids"]) for batch in Targets().micro_batches(5, 2, 8, vocabulary=50)] == [2, 2, 1]
    (batch,) = Targets(tokens=3).micro_batches(1, 1, 1, vocabulary=50)
    assert batch["input_ids"].shape == (1, 4)
