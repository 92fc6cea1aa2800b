"""Records to token ids: the prompt template, and what counts as a right answer."""

import re
import string
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from addax_ds.config import TaskConfig
from addax_ds.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """One sample in tokens."""

    prompt: tuple[int, ...]
    """The filled template, with the tokenizer's special tokens."""
    target: tuple[int, ...]
    """The right label word, or the completion and what ends it: the tokens that bear the loss."""
    choices: tuple[tuple[int, ...], ...]
    """Every label word, in the order of task.labels, or every choice of the record; empty for completions."""
    answer: int
    """Index of the right choice, the first of several; -1 for completions."""
    references: tuple[str, ...]
    """Accepted answers of a completion; empty otherwise."""
    also_right: tuple[int, ...] = ()
    """Indices of further right choices."""
    contrasted: bool = False
    """Whether the loss is that of the right one among the choices, not that of the target's tokens alone."""
    cut: bool = False
    """Whether the beginning of the prompt was left out for want of context."""

    @property
    def length(self) -> int:
        """Tokens of prompt and target: what L_T is compared with."""
        return len(self.prompt) + len(self.target)


def encode(
    records: Sequence[dict[str, Any]],
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    generated: int = 0,
) -> list[Example]:
    """The records as examples, in order.

    max_length: the model's context in tokens; generated: tokens that are to be generated after each
    prompt, which the context must hold too.

    A completion is set off from the prompt by a space unless one of them brings white space; with
    several accepted answers the first is the target. Raises `UserError` for a template or label
    field that a record lacks, a label without a label word, an empty prompt or answer, and a
    sample longer than `max_length`, unless the task has such prompts cut; records are numbered from 1
    in the order given.
    """
    prompts = _fill(records, task)
    prompt_ids: list[list[int]] = tokenizer(prompts, verbose=False)["input_ids"]
    if task.labels is not None:
        examples = _classified(records, prompt_ids, task, tokenizer)
    elif task.choices is not None:
        examples = _chosen(records, prompt_ids, task, tokenizer)
    else:
        examples = _completed(records, prompts, prompt_ids, task, tokenizer)

    after = [max(generated, *map(len, (e.target, *e.choices))) for e in examples]
    if task.too_long == "cut":
        begin = tokenizer.bos_token_id
        examples = [_cut(e, max_length - size, begin) for e, size in zip(examples, after, strict=True)]
    sizes = [len(e.prompt) + size for e, size in zip(examples, after, strict=True)]
    too_long = [index for index, size in enumerate(sizes) if size > max_length]
    if too_long:
        first = too_long[0]
        raise UserError(
            f"{_name(first + 1, records)}: {sizes[first]} tokens, the model takes {max_length} "
            f"({len(too_long)} of {len(records)} records are too long): shorten or drop them"
        )
    return examples


def _cut(example: Example, room: int, begin: int | None) -> Example:
    """With the end of its prompt where that is longer than its room; its first token stays where that begins texts."""
    kept = int(example.prompt[0] == begin)
    if len(example.prompt) <= room or room <= kept:
        return example
    prompt = example.prompt[:kept] + example.prompt[len(example.prompt) - room + kept :]
    return replace(example, prompt=prompt, cut=True)


def _fill(records: Sequence[dict[str, Any]], task: TaskConfig) -> list[str]:
    """task.prompt with the fields of each record filled in."""
    prompts = []
    try:
        parts = list(string.Formatter().parse(task.prompt))
    except ValueError as error:
        raise UserError(f"task.prompt is no template: {error}: write a brace of the text twice") from None
    # "{answers[text]}" reaches into field answers
    used = [re.split(r"[.\[]", field)[0] for _, field, _, _ in parts if field is not None]
    for number, record in enumerate(records, 1):
        for field in used:
            _require(record, field, "task.prompt", number, records)
        try:
            prompt = task.prompt.format_map(record)
            prompt.encode()  # half an emoji (a lone surrogate) is valid JSON, but no text for a tokenizer
        except (ValueError, TypeError, LookupError, AttributeError, MemoryError, OverflowError) as error:
            raise UserError(f"{_name(number, records)}: task.prompt cannot be filled in: {error}") from None
        if not prompt.strip():
            raise UserError(f"{_name(number, records)}: the prompt is empty: drop the record")
        prompts.append(prompt)
    return prompts


def _classified(
    records: Sequence[dict[str, Any]],
    prompt_ids: list[list[int]],
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    assert task.label is not None and task.labels is not None
    classes = list(task.labels)
    choices = tuple(_continuations(list(task.labels.values()), tokenizer))
    for index, (key, word) in enumerate(task.labels.items()):
        if not choices[index]:
            raise UserError(f"task.labels: the word of {key} is empty: give one")
        if choices[index][0] in [earlier[0] for earlier in choices[:index]]:
            raise UserError(f"task.labels: {word!r} of {key} begins with the token of another label word: change one")
    examples = []
    for number, (record, prompt) in enumerate(zip(records, prompt_ids, strict=True), 1):
        label = str(_require(record, task.label, "task.label", number, records))
        if label not in task.labels:
            raise UserError(
                f"{_name(number, records)}: no label word covers label {label}; known: {', '.join(classes)}: "
                "add it to task.labels or drop the record"
            )
        answer = classes.index(label)
        examples.append(Example(tuple(prompt), choices[answer], choices, answer, (), contrasted=True))
    return examples


def _chosen(
    records: Sequence[dict[str, Any]],
    prompt_ids: list[list[int]],
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    assert task.label is not None and task.choices is not None
    examples = []
    for number, (record, prompt) in enumerate(zip(records, prompt_ids, strict=True), 1):
        texts = _require(record, task.choices, "task.choices", number, records)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(
                f"{_name(number, records)}: field {task.choices} must be a list of texts, none of them empty"
            )
        label = _require(record, task.label, "task.label", number, records)
        right = label if isinstance(label, list) else [label]
        if not right or not all(type(index) is int and 0 <= index < len(texts) for index in right):
            raise UserError(
                f"{_name(number, records)}: field {task.label} is {label}: give the number of the right one of "
                f"{len(texts)} choices, from 0, or a list of such"
            )
        choices = tuple(_continuations(texts, tokenizer))
        examples.append(Example(tuple(prompt), choices[right[0]], choices, right[0], (), tuple(right[1:])))
    return examples


def _completed(
    records: Sequence[dict[str, Any]],
    prompts: list[str],
    prompt_ids: list[list[int]],
    task: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    assert task.completion is not None
    if tokenizer.eos_token_id is None and task.stop is None:
        raise UserError("the tokenizer has no end token, so an answer could never end: set its eos_token, or task.stop")
    references = []
    for number, record in enumerate(records, 1):
        value = _require(record, task.completion, "task.completion", number, records)
        accepted = value if isinstance(value, list | tuple) else [value]
        if not accepted or not all(isinstance(a, str | int | float) and str(a).strip() for a in accepted):
            raise UserError(
                f"{_name(number, records)}: field {task.completion} must be an answer or a list of answers, "
                "none of them empty"
            )
        references.append(tuple(map(str, accepted)))
    texts = []
    for prompt, accepted in zip(prompts, references, strict=True):
        apart = prompt[-1].isspace() or accepted[0][0].isspace()
        texts.append((accepted[0] if apart else " " + accepted[0]) + (task.stop or ""))
    targets = _continuations(texts, tokenizer)
    end = (tokenizer.eos_token_id,) if task.stop is None else ()
    return [
        Example(tuple(prompt), target + end, (), -1, accepted)
        for prompt, target, accepted in zip(prompt_ids, targets, references, strict=True)
    ]


def _continuations(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Token ids of each text as it reads after other text, without special tokens."""
    # Sentencepiece tokenizers set a space before the first word of whatever they are given, so that
    # " great" alone becomes two tokens, the first the same for every label. After a line break they
    # do not. Where the line break merges with the text, the text alone is right.
    anchor: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    after = tokenizer(["\n" + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    alone = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [
        tuple(joint[len(anchor) :] if joint[: len(anchor)] == anchor else single)
        for joint, single in zip(after, alone, strict=True)
    ]


def _require(record: dict[str, Any], field: str, setting: str, number: int, records: Sequence[dict[str, Any]]) -> Any:
    if record.get(field) is None:
        raise UserError(
            f"{_name(number, records)}: {setting} names field {field or '{}'}, which the record lacks; "
            f"its fields: {', '.join(map(str, record)) or 'none'}"
        )
    return record[field]


def _name(number: int, records: Sequence[dict[str, Any]]) -> str:
    """ "record 3 {'text': 'The Rock is...": records are shuffled, so a number alone finds nothing."""
    return f"record {number} {textwrap.shorten(repr(records[number - 1]), 60, placeholder='...')}"
