"""Micro-batches of any width, as a task's samples make them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from addax_ds.data.batches import Batch, Side
from addax_ds.data.tasks import Example
from addax_ds.loss import IGNORED, LossFunction, choice_loss, token_loss


@dataclass(frozen=True)
class Targets:
    """What bears the loss of a task's samples: where logits are computed, and for how many rows."""

    tokens: int = 1
    """Of the longest target."""
    words: int = 0
    """Label words, of which the right one counts against the others; 0 where a target's own tokens count."""
    scattered: bool = False
    """Whether those of a batch are at places of their own, as on the left of padding."""
    beyond: int = 0
    """Tokens by which rows are wider than their sample counts: as of the longest label word beside the right one."""

    @classmethod
    def of(cls, examples: Sequence[Example], padding: Side) -> "Targets":
        """Those of the examples, at most."""
        scattered = padding == "right"
        if not examples[0].contrasted:
            return cls(max(len(example.target) for example in examples), scattered=scattered)
        words = max(len(example.choices) for example in examples)
        tokens = max(len(word) for example in examples for word in example.choices)
        # Where each word is one token, its logit follows the prompt, and the word is in no row.
        ends = [max(map(len, example.choices)) if tokens > 1 else 0 for example in examples]
        beyond = max(end - len(example.target) for end, example in zip(ends, examples, strict=True))
        return cls(tokens, words, scattered, beyond)

    @property
    def loss_fn(self) -> LossFunction:
        """The loss of such samples."""
        return choice_loss if self.words else token_loss

    def columns(self, rows: int, width: int) -> int:
        """Places at which some of the rows, `width` tokens wide, need logits."""
        return min(self._apart(rows), width - 1)

    def kinks(self, micro_batch: int) -> list[int]:
        """Tokens of samples at which a micro-batch's memory begins to grow otherwise: rows are no narrower than their
        targets, and have room for all of them apart."""
        return [width - self.beyond for width in (self.tokens + 1, self._apart(micro_batch * self._rows) + 1)]

    def micro_batches(self, samples: int, size: int, tokens: int, vocabulary: int) -> list[Batch]:
        """Micro-batches of at most `size` samples of so many tokens, all padded, and so with a mask.

        Their keys and shapes are those of `data.batches.micro_batches`.
        """
        each = [min(size, samples - first) for first in range(0, samples, size)]
        width = max(tokens + self.beyond, self.tokens + 1)
        largest = self._micro_batch(min(size, samples), width, vocabulary)
        # Copied, since under fake tensors every operation takes as long as any other.
        return [{name: tensor[:count].clone() for name, tensor in largest.items()} for count in each]

    def _micro_batch(self, samples: int, width: int, vocabulary: int) -> Batch:
        rows = samples * self._rows
        ids = torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(0))
        mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
        for row in range(rows):
            padded = min(row * self.tokens, width - 1 - self.tokens) if self.scattered else 0
            mask[row, width - 1 - padded :] = 0
            labels[row, width - self.tokens - padded : width - padded] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(dim=1)}
        if not self.words:
            return {**batch, "labels": labels}
        answer = torch.zeros(samples, dtype=torch.int64)
        if self._rows == 1:
            return {**batch, "choices": ids.new_zeros(samples, self.words), "answer": answer}
        batch["labels"] = labels
        return {**{name: tensor.unflatten(0, (samples, -1)) for name, tensor in batch.items()}, "answer": answer}

    @property
    def _rows(self) -> int:
        """Of a sample: one, or one for every label word."""
        return self.words if self.words > 0 and self.tokens > 1 else 1

    def _apart(self, rows: int) -> int:
        """Places of targets where rows have room for them."""
        return rows * self.tokens if self.scattered else self.tokens


LAST_TOKEN = Targets()
"""One at the end of each sample."""
