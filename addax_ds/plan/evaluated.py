"""What a run evaluates, as far as its memory depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from addax_ds import loss
from addax_ds.config import RunConfig
from addax_ds.data.batches import collate_choices
from addax_ds.data.tasks import Example
from addax_ds.training import evaluation
from addax_ds.training.models import Optimizer


@dataclass(frozen=True)
class Evaluated:
    """Samples that are all like the one that takes most; a forward of different ones takes what lies between."""

    widest: tuple[Example, ...]
    """Of each number of sequences that an example is scored with."""
    samples: int
    """How many there are."""
    new_tokens: int
    """Generated after each prompt that has no choices."""

    @classmethod
    def of(cls, evaluations: Sequence[Sequence[Example]], new_tokens: int) -> "Evaluated":
        """What takes most of evaluations that run one after the other."""
        widest: dict[int, Example] = {}
        for example in (example for examples in evaluations for example in examples):
            other = widest.setdefault(evaluation.rows_of(example), example)
            if _width(example, new_tokens) > _width(other, new_tokens):
                widest[evaluation.rows_of(example)] = example
        return cls((*widest.values(),), max(map(len, evaluations)), new_tokens)

    @classmethod
    def words(cls, tokens: int, samples: int) -> "Evaluated":
        """Label words of one token after prompts, of so many tokens in all."""
        example = Example((0,) * max(tokens - 1, 1), (0,), ((0,), (1,)), answer=0, references=(), contrasted=True)
        return cls((example,), samples, new_tokens=0)

    @property
    def fewest_rows(self) -> int:
        """Sequences of a forward of one example at least."""
        return min(map(evaluation.rows_of, self.widest))

    def columns(self, config: RunConfig) -> int:
        """Places of a forward at which logits are computed."""
        examples = self._examples(config, 1)
        if not examples[0].choices:
            return 1
        batch = collate_choices(examples[: _at_once(examples[0], config)], 0, config.padding)
        if "labels" in batch:
            return len(loss._target_columns(batch["labels"].flatten(0, 1)[:, 1:]))
        return len(loss._last_columns(batch["attention_mask"])[0])

    def run(self, optimizer: Optimizer, config: RunConfig, inputs: frozenset[str]) -> None:
        """Evaluate so many that every lane of every rank is full, or all. What is generated is read by nobody."""
        reader: Any = SimpleNamespace(pad_token_id=0, eos_token_id=-1, decode=lambda *_, **__: "")
        examples = self._examples(config, optimizer.engine.world_size)
        evaluation.evaluate(optimizer, examples, reader, config, inputs, self.new_tokens)

    def _examples(self, config: RunConfig, ranks: int) -> list[Example]:
        def tokens(example: Example) -> int:
            return _at_once(example, config) * evaluation.rows_of(example) * _width(example, self.new_tokens)

        most = max(self.widest, key=tokens)
        at_once = _at_once(most, config)
        # Of a forward all prompts end at places of their own; with their targets they are as long, and stay in order.
        shorter = [min(number, len(most.prompt) - 1) for number in range(at_once)]
        forward = [replace(most, prompt=most.prompt[by:], target=(*most.target, *(0,) * by)) for by in shorter]
        return [forward[index % at_once] for index in range(min(ranks * evaluation.LANES * at_once, self.samples))]


def _width(example: Example, new_tokens: int) -> int:
    return len(example.prompt) + max(map(len, example.choices), default=new_tokens)


def _at_once(example: Example, config: RunConfig) -> int:
    """Samples like it in one forward."""
    return max(config.eval_micro_batch // evaluation.rows_of(example), 1)
