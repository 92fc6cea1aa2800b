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

    @classmethod
    def of(cls, examples: Sequence[Example], padding: Side) -> "Targets":
        """Those of the examples, at most."""
        words = max((len(example.choices) for example in examples if example.contrasted), default=0)
        bearing = [example.choices if words else (example.target,) for example in examples]
        return cls(max(len(tokens) for targets in bearing for tokens in targets), words, padding == "right")

    @property
    def loss_fn(self) -> LossFunction:
        """The loss of such samples."""
        return choice_loss if self.words else token_loss

    def columns(self, rows: int, width: int) -> int:
        """Places at which some of the rows, `width` tokens wide, need logits."""
        return min(rows * self.tokens if self.scattered else self.tokens, width - 1)

    def micro_batches(self, samples: int, size: int, tokens: int, vocabulary: int) -> list[Batch]:
        """Micro-batches of at most `size` samples, all padded, and so with a mask: see `data.batches`."""
        generator = torch.Generator().manual_seed(0)
        each = [min(size, samples - first) for first in range(0, samples, size)]
        return [self._micro_batch(count, max(tokens, self.tokens + 1), vocabulary, generator) for count in each]

    def _micro_batch(self, samples: int, width: int, vocabulary: int, generator: torch.Generator) -> Batch:
        in_rows = self.words > 0 and self.tokens > 1  # for every label word
        rows = samples * self.words if in_rows else samples
        ids = torch.randint(vocabulary, (rows, width), generator=generator)
        mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
        for row in range(rows):
            padded = min(row * self.tokens, width - 1 - self.tokens) if self.scattered else 0
            mask[row, width - 1 - padded :] = 0
            labels[row, width - self.tokens - padded : width - padded] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(dim=1)}
        if not self.words:
            return {**batch, "labels": labels}
        answer = torch.zeros(samples, dtype=torch.int64)
        if not in_rows:
            return {**batch, "choices": ids[:, : self.words], "answer": answer}
        batch["labels"] = labels
        return {**{name: tensor.unflatten(0, (samples, -1)) for name, tensor in batch.items()}, "answer": answer}


LAST_TOKEN = Targets()
"""One at the end of each sample."""
