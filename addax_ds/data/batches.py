"""Batches that depend on the seed and the step only: no state to resume, no world size to change them.

Tensors are int64 [batch, length]; `position_ids` make left and right padding equal for the model.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from addax_ds.data.shuffle import permutation
from addax_ds.data.tasks import Example

Side = Literal["left", "right"]
Batch = dict[str, torch.Tensor]

_STREAMS = {"zo": 1, "fo": 2}
_IGNORED = -100  # what the loss skips


def batch_indices(pool: Sequence[int], size: int, seed: int, stream: Literal["zo", "fo"], step: int) -> list[int]:
    """The `size` members of `pool` that step `step` (from 0) of `stream` takes.

    A pure function: the pool is permuted anew for every epoch, the epochs are joined end to end, and
    step s is the slice [s * size, (s + 1) * size) of that endless row. A batch may straddle two epochs.
    """
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, len(pool))
        chosen.append(pool[_epoch(len(pool), seed, _STREAMS[stream], epoch)[offset]])
    return chosen


@lru_cache(maxsize=8)  # the current epoch of each stream, and the next while a batch straddles
def _epoch(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return permutation(count, seed, stream, epoch)


def collate(examples: Sequence[Example], pad_id: int, side: Side) -> Batch:
    """Prompt and target of each example: input_ids, attention_mask, position_ids, labels.

    Padded to the longest of these examples. Labels are -100 everywhere but on the target's tokens
    (not shifted: the token at position i is predicted from the logits at i - 1).
    """
    return _pad([(example.prompt, example.target) for example in examples], pad_id, side)


def micro_batches(examples: Sequence[Example], size: int, pad_id: int, side: Side) -> list[Batch]:
    """The examples in order, `size` to a batch for their task's loss; the last may be smaller."""
    gather = collate_choices if examples[0].contrasted else collate
    return [gather(examples[start : start + size], pad_id, side) for start in range(0, len(examples), size)]


def collate_prompts(examples: Sequence[Example], pad_id: int) -> Batch:
    """Prompts alone: input_ids, attention_mask, position_ids.

    Always padded on the left, so that what follows each prompt is predicted at position -1.
    """
    batch = _pad([(example.prompt, ()) for example in examples], pad_id, "left")
    del batch["labels"]
    return batch


def collate_choices(examples: Sequence[Example], pad_id: int, side: Side) -> Batch:
    """What `loss.choice_scores` takes: every label word of each example, and `answer` [batch].

    Where each label word is one token, prompts [batch, length] and `choices` [batch, words], since one
    forward of the prompt scores them all. Otherwise one row for every label word, [batch, words, length],
    with labels on the word. Examples with fewer choices than others have their first again, at the end.
    """
    answer = torch.tensor([example.answer for example in examples])
    most = max(len(example.choices) for example in examples)
    filled = [e.choices + e.choices[:1] * (most - len(e.choices)) for e in examples]
    if all(len(choice) == 1 for choices in filled for choice in choices):
        batch = _pad([(example.prompt, ()) for example in examples], pad_id, side)
        del batch["labels"]
        words = torch.tensor([[choice[0] for choice in choices] for choices in filled])
        return {**batch, "choices": words, "answer": answer}
    rows = _pad([(e.prompt, c) for e, choices in zip(examples, filled, strict=True) for c in choices], pad_id, side)
    return {**{key: value.unflatten(0, (len(examples), -1)) for key, value in rows.items()}, "answer": answer}


def _pad(rows: list[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int, side: Side) -> Batch:
    """(prompt, target) rows as one batch, labels on the targets."""
    shape = (len(rows), max(len(prompt) + len(target) for prompt, target in rows))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, _IGNORED),
    }
    for index, (prompt, target) in enumerate(rows):
        length = len(prompt) + len(target)
        start = shape[1] - length if side == "left" else 0
        batch["input_ids"][index, start : start + length] = torch.tensor(prompt + target)
        batch["attention_mask"][index, start : start + length] = 1
        batch["labels"][index, start + len(prompt) : start + length] = torch.tensor(target, dtype=torch.int64)
    # Counted from the first real token, wherever it stands. Without this, left padding shifts the
    # positions that the model sees and changes its logits in silence.
    batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return batch
