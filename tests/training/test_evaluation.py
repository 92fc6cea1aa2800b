"""Scores are what a reader of the data would compute by hand, whatever path computes them."""

import copy
import dataclasses
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

import addax_ds
from addax_ds.adapters import through_peft
from addax_ds.config import PrefixConfig, load_run
from addax_ds.data.batches import collate, collate_choices, collate_prompts
from addax_ds.loss import choice_loss, choice_scores, token_loss
from addax_ds.training import evaluation
from addax_ds.training.models import accepted
from addax_ds.training.run import prepare_inputs
from tests.training.tiny import MOODS


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.model)


@pytest.fixture
def score(model):
    """score(prepared, config) on the tiny model."""
    optimizer = addax_ds.Addax(model)
    inputs = accepted(model)

    def score(prepared, config, examples=None):
        return evaluation.evaluate(
            optimizer,
            prepared.held_out if examples is None else examples,
            prepared.tokenizer,
            config,
            inputs,
            prepared.task.max_new_tokens,
        )

    yield score
    optimizer.detach()


def load(file, *settings):
    config = load_run(str(file), list(settings))
    return prepare_inputs(config), config


def by_hand(model, example) -> bool:
    """Whether the right label word is the likeliest, one forward a choice, no batch, no padding."""
    means = []
    for choice in example.choices:
        tokens = torch.tensor([example.prompt + choice])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits.float().log_softmax(-1)[0]
        positions = range(len(example.prompt), tokens.shape[1])
        means.append(sum(float(logits[p - 1, tokens[0, p]]) for p in positions) / len(choice))
    return means.index(max(means)) in (example.answer, *example.also_right)


@pytest.mark.parametrize("words", [[], ['task.labels={"0": " a terrible mess", "1": " great"}']])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_accuracy_is_what_single_forwards_without_padding_give(tiny, model, score, words, padding):
    prepared, config = load(tiny.run_file, f"padding={padding}", *words)
    right = [by_hand(model, example) for example in prepared.held_out]
    assert score(prepared, config) == {"accuracy": pytest.approx(sum(right) / len(right), abs=1e-12)}
    assert 0 < sum(right) < len(right), "a constant score would show nothing"


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_forward_for_all_label_words_scores_as_one_forward_for_each(tiny, model, side):
    prepared, _ = load(tiny.run_file)
    examples = prepared.held_out[:9]
    assert all(len(choice) == 1 for choice in examples[0].choices)
    together = collate_choices(examples, 0, side)
    each = [dataclasses.replace(example, target=choice) for example in examples for choice in example.choices]
    with torch.no_grad():
        scores = choice_scores(model, together)
        likelihoods = -token_loss(model, collate(each, 0, side)).view(len(examples), -1)
        losses = choice_loss(model, together)
    # One is logits, the other log probabilities: they differ by the same number for every word.
    torch.testing.assert_close(scores.log_softmax(1), likelihoods.log_softmax(1), rtol=1e-4, atol=1e-5)
    answers = torch.tensor([example.answer for example in examples])
    expected = -likelihoods.log_softmax(1)[torch.arange(9), answers]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_size_of_evaluation_batches_does_not_change_the_score(tiny, score, size):
    prepared, config = load(tiny.run_file)
    expected = score(prepared, config)
    assert score(prepared, dataclasses.replace(config, eval_micro_batch=size)) == expected


@pytest.fixture(scope="module")
def choices_file(tiny, tmp_path_factory):
    """Records with two to five choices of one to four words, of which one or two are right."""
    draw = random.Random(1)
    lines = []
    for line in tiny.reviews.read_text().splitlines()[:80]:
        count = draw.randint(2, 5)
        options = [" " + " ".join(draw.choices(MOODS[0] + MOODS[1], k=draw.randint(1, 4))) for _ in range(count)]
        right = draw.sample(range(count), draw.randint(1, 2))
        lines.append(json.dumps({"text": json.loads(line)["text"], "options": options, "right": right}) + "\n")
    path = tmp_path_factory.mktemp("choices") / "choices.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("padding", ["left", "right"])
def test_each_multiple_choice_is_scored_as_alone_whatever_its_neighbours(tiny, model, score, choices_file, padding):
    task = {"prompt": "{text} It was", "choices": "options", "label": "right"}
    settings = [f"task={json.dumps(task)}", f"data={choices_file}", "train_samples=20", "eval_samples=60"]
    prepared, config = load(tiny.run_file, *settings, f"padding={padding}")
    right = [by_hand(model, example) for example in prepared.held_out]
    assert 0 < sum(right) < len(right), "a constant score would show nothing"
    for size in (1, 7, 64):
        resized = dataclasses.replace(config, eval_micro_batch=size)
        assert score(prepared, resized) == {"accuracy": pytest.approx(sum(right) / len(right), abs=1e-12)}
    # A sum could hide two that changed places.
    batch = collate_choices(prepared.held_out, prepared.tokenizer.pad_token_id, padding)
    with torch.no_grad():
        each = evaluation._choice_score(choice_scores(model, batch), prepared.held_out)[:, 0].tolist()
    assert each == [float(one) for one in right]


def test_evaluation_forwards_hold_as_many_sequences_as_they_may_and_one_example_at_least():
    assert evaluation._chunks([2, 0, 1, 3, 4], [3, 1, 9, 4, 2], 8) == [[2], [0, 1], [3, 4]]
    assert evaluation._chunks([0, 1, 2, 3], [1, 1, 1, 1], 3) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_generation_is_what_generate_gives_greedily(tiny, model, kind):
    prepared, _ = load(tiny.completion_file)
    if kind == "opt":
        torch.manual_seed(1)
        config = OPTConfig(
            vocab_size=len(prepared.tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.1,
            pad_token_id=0,
            eos_token_id=1,
        )
        model = OPTForCausalLM(config)
    model.eval()
    batch = collate_prompts(prepared.held_out[:9], prepared.tokenizer.pad_token_id)
    inputs = {key: value for key, value in batch.items() if key in accepted(model)}
    with torch.no_grad():
        ours = evaluation._generate(model, inputs, 12)
        prompt = {key: batch[key] for key in ("input_ids", "attention_mask")}
        theirs = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    length = batch["input_ids"].shape[1]
    assert len(set(ours.flatten().tolist())) > 3, "a constant answer would show nothing"
    assert ours.tolist() == theirs[:, length:].tolist()


def test_behind_a_prefix_neither_padding_nor_the_words_generated_before_change_what_comes_next(tiny, model):
    torch.manual_seed(0)
    wrapped = through_peft.add(copy.deepcopy(model), PrefixConfig(tokens=3)).eval()
    prepared, _ = load(tiny.completion_file)
    batch = collate_prompts(prepared.held_out[:9], prepared.tokenizer.pad_token_id)
    inputs = {key: value for key, value in batch.items() if key in accepted(wrapped)}
    lengths = batch["attention_mask"].sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "without padding nothing is shown"
    with torch.no_grad():
        ours = evaluation._generate(wrapped, inputs, 12)
        for row, length, words in zip(batch["input_ids"], lengths.tolist(), ours.tolist(), strict=True):
            alone = row[-length:].tolist()
            for word in words:  # one whole forward a word
                logits = wrapped(input_ids=torch.tensor([alone])).logits[0, -1]
                assert logits[word] >= logits.max() - 1e-4
                alone.append(word)
    assert len(set(ours.flatten().tolist())) > 3, "a constant answer would show nothing"


def test_exact_match_and_f1_stop_at_the_end_token_and_take_any_accepted_answer(tiny):
    prepared, _ = load(tiny.completion_file)
    tokenizer = prepared.tokenizer
    said = [" a warm day</s> dull", " warm</s> the film", " a cold day</s>", " nothing", "</s> a warm day"]
    rows = [tokenizer(text)["input_ids"] for text in said]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    example = dataclasses.replace(prepared.held_out[0], references=("a warm day", "warm"))
    scores = evaluation._completion_score(tokens, [example] * len(said), tokenizer, None)
    # "a" is an article and counts for nothing: "cold day" shares one of two words with "warm day".
    expected = [[1, 1], [1, 1], [0, 0.5], [0, 0], [0, 0]]
    assert scores.tolist() == [pytest.approx(row) for row in expected]
    # And where the task says so, at other text.
    said = [" a warm day dull warm", " warm dull day day", " dull day warm day"]
    stopped = [tokenizer(text)["input_ids"][:4] for text in said]
    scores = evaluation._completion_score(torch.tensor(stopped), [example] * 3, tokenizer, " dull")
    assert scores.tolist() == [[1, 1], [1, 1], [0, 0]]
