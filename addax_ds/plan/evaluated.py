"""What a run evaluates, as far as its memory depends on it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from addax_ds.config import RunConfig
from addax_ds.data.tasks import Example
from addax_ds.training import evaluation
from addax_ds.training.models import Optimizer


@dataclass(frozen=True)
class Evaluated:
    """Samples that are all like one of them."""

    example: Example
    samples: int
    """How many there are."""
    new_tokens: int
    """Generated after each prompt that has no choices."""

    @classmethod
    def of(cls, examples: Iterable[Example], config: RunConfig, new_tokens: int) -> "Evaluated":
        """As many as the examples, all like the one that takes most."""

        def tokens(example: Example) -> int:
            rows = evaluation.rows_of(example)
            width = len(example.prompt) + max(map(len, example.choices), default=new_tokens)
            return _at_once(example, config) * rows * width

        examples = [*examples]
        return cls(max(examples, key=tokens), len(examples), new_tokens)

    @classmethod
    def words(cls, tokens: int, config: RunConfig) -> "Evaluated":
        """Label words of one token after prompts, of so many tokens in all."""
        example = Example((0,) * max(tokens - 1, 1), (0,), ((0,), (1,)), answer=0, references=(), contrasted=True)
        return cls(example, config.eval_samples, new_tokens=0)

    def run(self, optimizer: Optimizer, config: RunConfig, inputs: frozenset[str]) -> None:
        """Evaluate so many that every lane of every rank is full, or all. What is generated is read by nobody."""
        reader: Any = SimpleNamespace(pad_token_id=0, eos_token_id=-1, decode=lambda *_, **__: "")
        # Every other prompt is padded, so that there is a mask; none is longer, so that they stay in this order.
        prompt, target = self.example.prompt[1:], (*self.example.target, 0)
        pair = [self.example, replace(self.example, prompt=prompt, target=target)]
        full = optimizer.engine.world_size * evaluation.LANES * _at_once(self.example, config)
        examples = [pair[index % 2] for index in range(min(full, self.samples))]
        evaluation.evaluate(optimizer, examples, reader, config, inputs, self.new_tokens)


def _at_once(example: Example, config: RunConfig) -> int:
    """Samples like it in one forward."""
    return max(config.eval_micro_batch // evaluation.rows_of(example), 1)
