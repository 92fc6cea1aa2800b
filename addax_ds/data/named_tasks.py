"""Tasks by name: the eleven of MeZO's protocol (Malladi et al., NeurIPS 2023), and those of the embedded data.

Each of the eleven is a dataset of the hub with a prompt, and what makes its records fit the prompt. Its
held-out samples come from the validation split, since the tests' labels are not public. Prompts longer
than a model's context lose their beginning.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from addax_ds.config import TaskConfig, nearest
from addax_ds.data.embedded import EMBEDDED_DATA
from addax_ds.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class HubTask:
    """A dataset of the hub as a task."""

    dataset: str
    """ID:CONFIG, or ID."""
    task: TaskConfig
    fit: Callable[[Record], Record] = dict
    """A record with the fields that the task reads."""


def _yes_or_no(prompt: str, yes: int = 1) -> TaskConfig:
    return TaskConfig(prompt=prompt, label="label", labels={str(1 - yes): "No", str(yes): "Yes"})


_BOOLQ = TaskConfig(prompt="{passage} {question}?\n", label="answer", labels={"False": "No", "True": "Yes"})


def _sst2(record: Record) -> Record:
    # The dataset ends every sentence with a space.
    return {**record, "sentence": record["sentence"].strip()}


def _boolq(record: Record) -> Record:
    # The dataset's questions are as people typed them into a search engine.
    return {**record, "question": record["question"][:1].upper() + record["question"][1:].removesuffix("?")}


def _wsc(record: Record) -> Record:
    return {**record, "span2_text": record["span2_text"].lower()}


def _copa(record: Record) -> Record:
    """The premise runs on into each choice."""
    connective = {"cause": "because", "effect": "so"}[record["question"]]
    choices = [f" {_within_a_sentence(record[name])}" for name in ("choice1", "choice2")]
    return {**record, "premise": record["premise"].rstrip(" ."), "connective": connective, "choices": choices}


def _within_a_sentence(text: str) -> str:
    first, space, rest = text.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def _record(record: Record) -> Record:
    """The choices are the query with each entity in its gap, as one more point of the summary; any answer is right."""
    entities = list(dict.fromkeys([*record["entities"], *record["answers"]]))
    return {
        "passage": record["passage"].replace("@highlight\n", "- "),
        "choices": [" " + record["query"].replace("@placeholder", entity) for entity in entities],
        "label": [entities.index(answer) for answer in dict.fromkeys(record["answers"])],
    }


def _squad(record: Record) -> Record:
    answers = list(dict.fromkeys(record["answers"]["text"]))
    return {**record, "question": record["question"].strip(), "answers": answers}


def _drop(record: Record) -> Record:
    answers = list(dict.fromkeys(record["answers_spans"]["spans"]))
    return {**record, "question": record["question"].strip(), "answers": answers}


_SUPER_GLUE = "aps/super_glue"
HUB_TASKS: dict[str, HubTask] = {
    "sst2": HubTask(
        "nyu-mll/glue:sst2",
        TaskConfig(prompt="{sentence} It was", label="label", labels={"0": " terrible", "1": " great"}),
        _sst2,
    ),
    "rte": HubTask(
        f"{_SUPER_GLUE}:rte",
        _yes_or_no('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', yes=0),
    ),
    "cb": HubTask(
        f"{_SUPER_GLUE}:cb",
        TaskConfig(
            prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            label="label",
            labels={"0": "Yes", "1": "No", "2": "Maybe"},
        ),
    ),
    # Not SuperGLUE's, whose passages begin with their titles.
    "boolq": HubTask("google/boolq", _BOOLQ, _boolq),
    "wsc": HubTask(
        f"{_SUPER_GLUE}:wsc.fixed",
        _yes_or_no(
            '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n'
        ),
        _wsc,
    ),
    "wic": HubTask(
        f"{_SUPER_GLUE}:wic",
        _yes_or_no(
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n'
        ),
    ),
    "multirc": HubTask(
        f"{_SUPER_GLUE}:multirc",
        _yes_or_no('{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'),
    ),
    "copa": HubTask(
        f"{_SUPER_GLUE}:copa", TaskConfig(prompt="{premise} {connective}", label="label", choices="choices"), _copa
    ),
    "record": HubTask(
        f"{_SUPER_GLUE}:record",
        TaskConfig(prompt="{passage}\n-", label="label", choices="choices"),
        _record,
    ),
    "squad": HubTask(
        "rajpurkar/squad",
        TaskConfig(
            prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            completion="answers",
            max_new_tokens=50,
            stop="\n",
        ),
        _squad,
    ),
    "drop": HubTask(
        "ucinlp/drop",
        TaskConfig(
            prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
            completion="answers",
            max_new_tokens=50,
            stop="\n",
        ),
        _drop,
    ),
}


def named_task(name: str, records: list[Record]) -> tuple[TaskConfig, list[Record]]:
    """The task of this name, and records of its dataset's schema with the fields that it reads.

    Raises `UserError` for an unknown name and for a record of another schema, numbered from 1.
    """
    if name in EMBEDDED_DATA:
        return EMBEDDED_DATA[name].task, records
    if name not in HUB_TASKS:
        raise UserError(f"task is {name}{nearest(name, [*HUB_TASKS, *EMBEDDED_DATA])}")
    fitted = []
    for number, record in enumerate(records, 1):
        try:
            fitted.append(HUB_TASKS[name].fit(record))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"record {number} is none of {name}: {type(error).__name__} {error}: its fields are "
                f"{', '.join(map(str, record))}"
            ) from None
    return replace(HUB_TASKS[name].task, too_long="cut"), fitted
