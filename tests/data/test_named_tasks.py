"""The eleven tasks by name: prompts and right answers of records with their datasets' schemas, and runs of them."""

import json
import shutil

import pytest

from addax_ds.config import RunConfig, TaskConfig, load_run
from addax_ds.config.task import SPLITS
from addax_ds.data.batches import collate_choices, micro_batches
from addax_ds.data.embedded import EMBEDDED_DATA
from addax_ds.data.named_tasks import HUB_TASKS, named_task
from addax_ds.data.sources import held_out_beside
from addax_ds.data.tasks import encode
from addax_ds.errors import UserError
from addax_ds.training.metrics import read_json
from addax_ds.training.models import load_tokenizer
from addax_ds.training.run import prepare_inputs
from tests.cli.commands import run

# A record of each dataset, what is asked of it, what may follow, and which of that is right.
CASES = {
    "sst2": ({"sentence": "a warm day ", "label": 1, "idx": 0}, "a warm day It was", [" terrible", " great"], [1]),
    "rte": (
        {"premise": "It rained.", "hypothesis": "It was dry.", "label": 1, "idx": 0},
        'It rained.\nDoes this mean that "It was dry." is true? Yes or No?\n',
        ["No", "Yes"],
        [0],
    ),
    "cb": (
        {"premise": "He left.", "hypothesis": "He was there", "label": 2, "idx": 0},
        'Suppose He left. Can we infer that "He was there"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        [2],
    ),
    "boolq": (
        {"question": "is the sea salt", "passage": "Seas hold salt.", "answer": True},
        "Seas hold salt. Is the sea salt?\n",
        ["No", "Yes"],
        [1],
    ),
    "wsc": (
        {
            **{"text": "Ann saw Bea, and she ran.", "span1_text": "Bea", "span2_text": "She"},
            **{"span1_index": 2, "span2_index": 4, "label": 0, "idx": 0},
        },
        'Ann saw Bea, and she ran.\nIn the previous sentence, does the pronoun "she" refer to Bea? Yes or No?\n',
        ["No", "Yes"],
        [0],
    ),
    "wic": (
        {
            **{"word": "bank", "sentence1": "A bank of mud.", "sentence2": "The bank was shut.", "label": 0},
            **{"start1": 2, "end1": 6, "start2": 4, "end2": 8, "idx": 0},
        },
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank of mud.\n'
        "The bank was shut.\n",
        ["No", "Yes"],
        [0],
    ),
    "multirc": (
        {"paragraph": "Tom ate.", "question": "Who ate?", "answer": "Tom", "label": 1, "idx": {"paragraph": 0}},
        'Tom ate.\nQuestion: Who ate?\nI found this answer "Tom". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        [1],
    ),
    "copa": (
        {
            **{"premise": "The cup fell.", "choice1": "It broke.", "choice2": "I slept.", "question": "effect"},
            **{"label": 0, "idx": 0},
        },
        "The cup fell so",
        [" it broke.", " I slept."],
        [0],
    ),
    "record": (
        {
            **{"passage": "Rain fell in Rome.\n@highlight\nOslo was dry.", "query": "In @placeholder it rained."},
            **{"entities": ["Oslo", "Rome", "Rain"], "answers": ["Rome", "Rain"], "idx": {"passage": 0}},
        },
        "Rain fell in Rome.\n- Oslo was dry.\n-",
        [" In Oslo it rained.", " In Rome it rained.", " In Rain it rained."],
        [1, 2],
    ),
    "squad": (
        {
            **{"id": "0", "title": "Rain", "context": "It fell in Rome.", "question": " Where?"},
            "answers": {"text": ["Rome", "in Rome", "Rome"], "answer_start": [11, 8, 11]},
        },
        "Title: Rain\nContext: It fell in Rome.\nQuestion: Where?\nAnswer:",
        ["Rome", "in Rome"],
        None,
    ),
    "drop": (
        {
            **{"passage": "Two of ten fell.", "question": "How many stood? ", "section_id": "a", "query_id": "b"},
            "answers_spans": {"spans": ["8", "eight"], "types": ["number", "span"]},
        },
        "Passage: Two of ten fell.\nQuestion: How many stood?\nAnswer:",
        ["8", "eight"],
        None,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(str(tiny.model))


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The tiny model, of which longer texts may be asked."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return folder


def test_every_task_has_a_case():
    assert CASES.keys() == HUB_TASKS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_record_becomes_its_prompt_and_answers(tokenizer, name):
    record, prompt, answers, right = CASES[name]
    task, records = named_task(name, [record])
    (example,) = encode(records, task, tokenizer, 10_000)

    def text(tokens):
        return tokenizer.decode(tokens, skip_special_tokens=True).strip()

    # Words that the tiny vocabulary lacks read alike on both sides.
    assert text(example.prompt) == text(tokenizer(prompt)["input_ids"])
    filled = task.prompt.format_map(records[0])
    assert filled == prompt
    if right is None:
        assert list(example.references) == answers and not example.choices
    else:
        words = list(task.labels.values()) if task.labels else records[0]["choices"]
        assert words == answers and len(example.choices) == len(answers)
        assert [example.answer, *example.also_right] == right
        assert example.contrasted == (task.labels is not None)


def many(name, count=24):
    """Records like the one of the case, each a little different, of all classes."""
    record = CASES[name][0]
    field = next(
        field
        for field in ("sentence", "premise", "passage", "text", "sentence1", "paragraph", "context")
        if field in record
    )
    made = []
    for number in range(count):
        one = {**record, field: f"{'again ' * (number % 5)}{record[field]}"}
        if name == "record":
            one["entities"] = record["entities"] + ["Bonn", "Bern"][: number % 3]
        elif "label" in record:
            one["label"] = number % (3 if name == "cb" else 2)
        elif name == "boolq":
            one["answer"] = number % 2 == 0
        made.append(one)
    return made


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_every_task_comes_to_its_end(tiny, model, tmp_path, name):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in many(name)))
    words = [
        "data=data.jsonl",
        f"task={name}",
        "train_samples=16",
        "eval_samples=8",
        "steps=2",
        "save=false",
        "lt=auto",
    ]
    run("train", tiny.run_file, *words, f"model={model}", "output=out", cwd=tmp_path).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    metric = "f1" if name in ("squad", "drop") else "accuracy"
    assert summary["metric_name"] == metric and 0 <= summary[f"{metric}_after"] <= 1
    assert metric == "accuracy" or 0 <= summary["exact_match_after"] <= summary["f1_after"]


@pytest.mark.parametrize("name", EMBEDDED_DATA)
def test_a_run_of_embedded_data_comes_to_its_end(tiny, model, tmp_path, name):
    words = [f"data={name}", "task=null", "train_samples=40", "eval_samples=8", "steps=2", "save=false", "lt=auto"]
    run("train", tiny.run_file, *words, f"model={model}", "output=out", cwd=tmp_path).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["metric_name"] == "accuracy" and 0 <= summary["accuracy_after"] <= 1


def test_a_task_by_name_takes_the_protocols_samples_unless_told_otherwise():
    def split(**settings):
        config = RunConfig(**settings)
        return config.train_samples, config.dev_samples, config.eval_samples

    assert SPLITS.keys() == HUB_TASKS.keys()
    assert split(data="squad") == split(data="rte") == (1000, 500, 1000)
    assert split(data="copa") == (1000, 100, 1000)
    assert split(data="sst2", dev_samples=7, train_samples=None) == (None, 7, 1000)
    assert split(data="movies") == split(data="reviews.jsonl", task="sst2") == split() == (1000, 0, 500)
    assert split(data="rte:train") == split()  # which has no more than that


def test_a_small_task_by_name_is_taken_whole(tiny, model, monkeypatch):
    held = {"copa": many("copa", 60), "copa:validation": many("copa", 20)}
    monkeypatch.setattr("addax_ds.training.run.load_records", lambda data: (held[data], "copa"))
    settings = ["data=copa", "task=null", f"model={model}", "train_samples=1000", "eval_samples=500"]
    prepared = prepare_inputs(load_run(str(tiny.run_file), [*settings, "dev_samples=10"]))
    assert [len(examples) for examples in (prepared.train, prepared.dev, prepared.held_out)] == [50, 10, 20]
    prepared = prepare_inputs(
        load_run(str(tiny.run_file), [*settings, "train_samples=30", "dev_samples=0", "eval_samples=5"])
    )
    assert [len(examples) for examples in (prepared.train, prepared.held_out)] == [30, 5]
    with pytest.raises(UserError, match="60 samples are too few for dev_samples=60"):
        prepare_inputs(load_run(str(tiny.run_file), [*settings, "dev_samples=60"]))


def test_choices_of_different_numbers_do_not_disturb_each_other(tiny, tokenizer):
    from transformers import AutoModelForCausalLM

    from addax_ds.loss import choice_scores

    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    task, records = named_task("record", many("record", 6))
    examples = encode(records, task, tokenizer, 10_000)
    assert len({len(example.choices) for example in examples}) > 1
    inputs = ("input_ids", "attention_mask", "position_ids", "labels", "choices")

    def scores(some):
        batch = collate_choices(some, tokenizer.pad_token_id, "right")
        found = choice_scores(model, {key: batch[key] for key in inputs if key in batch})
        return [row[: len(example.choices)].tolist() for row, example in zip(found, some, strict=True)]

    alone = [scores([example])[0] for example in examples]
    for together, apart in zip(scores(examples), alone, strict=True):
        assert together == pytest.approx(apart, abs=1e-4)


def test_multiple_choice_trains_on_the_right_answer_alone(tokenizer):
    task, records = named_task("copa", many("copa", 2))
    examples = encode(records, task, tokenizer, 10_000)
    (batch,) = micro_batches(examples, 2, tokenizer.pad_token_id, "right")
    assert "labels" in batch and "answer" not in batch
    assert (batch["labels"] >= 0).sum() == sum(len(example.target) for example in examples)


DATASETS = {
    "sst2": ("nyu-mll/glue", "sst2"),
    **{name: ("aps/super_glue", name) for name in ("rte", "cb", "wic", "multirc", "copa", "record")},
    "wsc": ("aps/super_glue", "wsc.fixed"),
    "boolq": ("google/boolq", None),
    "squad": ("rajpurkar/squad", None),
    "drop": ("ucinlp/drop", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_name_asks_the_hub_for_its_dataset_and_both_splits(tiny, model, monkeypatch, name):
    import datasets

    asked = []

    def load_dataset(*words, **options):
        asked.append((words, options))
        return many(name, 24 if options["split"] == "train" else 9)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = [f"data={name}", "task=null", f"model={model}", "train_samples=14", "dev_samples=3", "eval_samples=500"]
    prepared = prepare_inputs(load_run(str(tiny.run_file), settings))
    assert asked == [(DATASETS[name], {"split": split}) for split in ("train", "validation")]
    assert [len(examples) for examples in (prepared.train, prepared.dev, prepared.held_out)] == [14, 3, 9]
    assert prepared.task == named_task(name, [])[0]


def test_data_without_a_name_bring_no_samples_to_hold_out():
    assert held_out_beside("movies") is None and held_out_beside("data.jsonl") is None


def test_what_is_no_task_or_no_record_of_it_is_one_line():
    with pytest.raises(UserError, match=r"task is coppa, did you mean copa\?"):
        named_task("coppa", [])
    with pytest.raises(UserError, match="record 2 is none of squad: KeyError 'answers': its fields are question"):
        named_task("squad", [CASES["squad"][0], {"question": "Where?"}])


def labelled(first, second):
    return TaskConfig(prompt="{text} It was", label="label", labels={"0": first, "1": second})


def test_label_words_that_begin_alike_are_refused(tokenizer):
    records = [{"text": "a warm day", "label": 0}]
    with pytest.raises(UserError, match="begins with the token of another label word"):
        encode(records, labelled(" great day", " great film"), tokenizer, 100)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"choices": "one", "label": 0}, "choices must be a list of texts"),
        ({"choices": [" a", " "], "label": 0}, "choices must be a list of texts, none of them empty"),
        ({"choices": [" a", " b"], "label": 2}, "label is 2: give the number of the right one of 2 choices"),
        ({"choices": [" a", " b"], "label": True}, "label is True: give the number"),
        ({"choices": [" a", " b"], "label": []}, r"label is \[\]: give the number"),
        ({"choices": [" a", " b"]}, "task.label names field label, which the record lacks"),
    ],
)
def test_choices_that_cannot_be_read_are_one_line(tokenizer, record, words):
    task = TaskConfig(prompt="{text}", label="label", choices="choices")
    with pytest.raises(UserError, match=words):
        encode([{"text": "so", **record}], task, tokenizer, 100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label": "a", "choices": "b", "completion": "c"}, "either choices or completion"),
        ({"label": "a", "labels": {"0": "x", "1": "y"}, "choices": "b"}, "either labels or choices"),
        ({"choices": "b"}, "task.choices goes with task.label"),
        ({"completion": "b", "label": "a"}, "task.completion goes without task.label"),
        ({"label": "a"}, "a task needs label with labels or choices, or completion"),
    ],
)
def test_a_task_is_of_one_kind(settings, words):
    with pytest.raises(ValueError, match=words):
        TaskConfig(prompt="{text}", **settings)
