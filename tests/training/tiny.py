"""A tiny random Llama with its tokenizer, data that it learns in seconds, and a run file for them.

The class of a review is that of its mood words, half of its words on average. Everything is a pure
function of fixed seeds, so that all tests see the same files.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MOODS = (("dull", "slow", "cold", "flat"), ("fine", "warm", "wise", "glad"))
OTHERS = ("the", "film", "plot", "cast", "with", "and", "of", "this")
LABELS = {"0": " terrible", "1": " great"}
ANSWERS = (["a dull day", "dull"], ["a warm day", "warm"])
CONTEXT = 64
"""Tokens that the model takes."""
RECORDS, TRAIN, HELD_OUT = 240, 160, 60


@dataclass(frozen=True)
class Tiny:
    """Where everything lies."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def reviews(self) -> Path:
        """Records with text and label."""
        return self.root / "reviews.jsonl"

    @property
    def table(self) -> Path:
        """The reviews as CSV."""
        return self.root / "reviews.csv"

    @property
    def questions(self) -> Path:
        """Records with text and a list of accepted answers."""
        return self.root / "questions.jsonl"

    @property
    def run_file(self) -> Path:
        """A mixed run of three steps on the reviews, one process, no engine."""
        return self.root / "run.yaml"

    @property
    def completion_file(self) -> Path:
        """The same on the questions."""
        return self.root / "completion.yaml"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    files = Tiny(tmp_path_factory.mktemp("tiny"))
    reviews, questions = _records()
    tokenizer = _tokenizer([record["text"] for record in reviews])
    tokenizer.save_pretrained(files.model)
    _model(len(tokenizer)).save_pretrained(files.model)
    files.reviews.write_text("".join(json.dumps(record) + "\n" for record in reviews))
    files.questions.write_text("".join(json.dumps(record) + "\n" for record in questions))
    with files.table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(reviews)
    settings = {
        "model": str(files.model),
        "data": str(files.reviews),
        "task": {"prompt": "{text} It was", "label": "label", "labels": LABELS},
        "train_samples": TRAIN,
        "eval_samples": HELD_OUT,
        "lr": 0.1,
        "alpha": 0.01,
        "k0": 5,
        "k1": 4,
        "zo_micro_batch": 2,
        "fo_micro_batch": 2,
        "steps": 3,
    }
    files.run_file.write_text(yaml.safe_dump(settings))
    task = {"prompt": "{text} It was", "completion": "answers", "max_new_tokens": 4}
    completion = settings | {"data": str(files.questions), "task": task}
    files.completion_file.write_text(yaml.safe_dump(completion))
    return files


def _records() -> tuple[list[dict], list[dict]]:
    draw = random.Random(0)
    reviews, questions = [], []
    for number in range(RECORDS):
        label = number % 2
        words = [draw.choice(MOODS[label])]
        words += [draw.choice(MOODS[label] if draw.random() < 0.5 else OTHERS) for _ in range(draw.randint(2, 14))]
        draw.shuffle(words)
        reviews.append({"text": " ".join(words), "label": label})
        questions.append({"text": " ".join(words), "answers": ANSWERS[label]})
    return reviews, questions


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a word with the space before it is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<pad>", "</s>"], show_progress=False)
    words = [f" {word}" for word in ("It was great", "It was terrible", "a dull day", "a warm day")]
    tokenizer.train_from_iterator([f" {text}" for text in texts] + words * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def _model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
