"""What is learned from records."""

import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from addax_ds.config.checks import STRICT, require
from addax_ds.errors import UserError


def _text_keys(labels: Any) -> Any:
    """YAML reads the class 0 as a number; records are matched by text."""
    return {str(key): word for key, word in labels.items()} if isinstance(labels, dict) else labels


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """How a record becomes a prompt and what counts as a right answer.

    One of `labels` (classification: field value -> label word), `choices` (multiple choice: the field that
    lists what may follow) and `completion` (generation: the field that holds the text to produce) is given.
    """

    prompt: str
    """Python format string over the record's fields, for example "{text} It was"."""
    label: str | None = None
    """Field that holds the class; of choices the number of the right one, from 0, or a list of right ones."""
    labels: Annotated[dict[str, str] | None, BeforeValidator(_text_keys)] = None
    """Label words by class, with their leading space, for example {"0": " terrible"}."""
    choices: str | None = None
    """Field that lists continuations of the prompt, with their leading space; it is trained on the right one
    alone, and the likeliest per token is the answer."""
    completion: str | None = None
    """Field that holds the answer to generate (a string or a list of accepted strings)."""
    max_new_tokens: int = 32
    """Longest answer generated."""
    stop: str | None = None
    """Text that ends an answer in place of the end token: it follows the answer in training, and what is generated
    counts up to it."""
    too_long: Literal["refuse", "cut"] = "refuse"
    """Samples longer than the model's context: refuse them, or cut the beginning of their prompts."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in ("labels", "choices", "completion") if getattr(self, kind) is not None]
        if not kinds:
            raise UserError("a task needs label with labels or choices, or completion: set one of them")
        require(len(kinds) == 1, f"a task has either {' or '.join(kinds)}: remove one of them")
        needs_label = self.completion is None
        require(
            bool(self.label) == needs_label, f"task.{kinds[0]} goes {'with' if needs_label else 'without'} task.label"
        )
        require(self.labels is None or len(self.labels) >= 2, "task.labels needs two classes or more")
        require(self.max_new_tokens >= 1, "task.max_new_tokens must be 1 or more")
        require(self.stop != "", "task.stop is empty: give text that ends an answer, or leave it out")
        require(self.stop is None or self.completion is not None, "task.stop goes with task.completion")
        try:
            specs = [spec or "" for _, _, spec, _ in string.Formatter().parse(self.prompt)]
        except ValueError:
            specs = []  # no template, which is told with the data
        # Each record would be padded to gigabytes.
        require(not re.search(r"\d{5}", " ".join(specs)), "task.prompt pads a field to 10,000 characters or more")


_PROTOCOL = {"train_samples": 1000, "dev_samples": 500, "eval_samples": 1000}
_LARGE = ("sst2", "rte", "boolq", "wic", "multirc", "record", "squad", "drop")
_SMALL = ("cb", "copa", "wsc")  # they have a few hundred samples in all
SPLITS = {name: _PROTOCOL for name in _LARGE} | {name: {**_PROTOCOL, "dev_samples": 100} for name in _SMALL}
"""How many samples a task by name takes unless told otherwise (Malladi et al., 2023, section 3)."""
