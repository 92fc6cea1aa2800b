from dataclasses import replace

import pytest

from addax_ds.config import TaskConfig
from addax_ds.data.tasks import encode
from addax_ds.errors import UserError

SENTIMENT = TaskConfig(prompt="{text} It was", label="label", labels={"0": " terrible", "1": " great"})
ANSWER = TaskConfig(prompt="{question} Answer:", completion="answer")
FILM = {"text": "the film was great.", "label": 1}


def one(record, task, tokenizer, max_length=100):
    (example,) = encode([record], task, tokenizer, max_length)
    return example


def test_prompt_and_target_join_to_the_tokens_of_the_whole_text(byte_level):
    example = one(FILM, SENTIMENT, byte_level)
    whole = byte_level("the film was great. It was great")["input_ids"]
    assert list(example.prompt + example.target) == whole
    assert example.length == len(whole)


def test_label_word_gets_no_extra_space_from_a_sentencepiece_tokenizer(sentencepiece):
    assert len(sentencepiece(" great", add_special_tokens=False)["input_ids"]) > 1  # the trap is there
    example = one(FILM, SENTIMENT, sentencepiece)
    assert sentencepiece.convert_ids_to_tokens(list(example.target)) == ["▁great"]
    whole = sentencepiece("the film was great. It was great")["input_ids"]
    assert list(example.prompt + example.target) == whole


def test_label_word_after_a_line_break_starts_without_a_space(byte_level, sentencepiece):
    task = TaskConfig(prompt="{text}\n", label="label", labels={"0": "no", "1": "yes"})
    for tokenizer in (byte_level, sentencepiece):
        example = one(FILM, task, tokenizer)
        assert tokenizer.decode(list(example.target)) == "yes"
        assert list(example.prompt + example.target) == tokenizer(FILM["text"] + "\nyes")["input_ids"]


def test_special_tokens_stand_before_the_prompt_only(sentencepiece):
    example = one(FILM, SENTIMENT, sentencepiece)
    assert example.prompt[0] == sentencepiece.bos_token_id
    assert sentencepiece.bos_token_id not in example.prompt[1:] + example.target


def test_choices_keep_the_order_of_the_labels_and_answer_points_at_the_target(byte_level):
    bad, good = encode([{"text": "a mess.", "label": 0}, FILM], SENTIMENT, byte_level, 100)
    assert (bad.answer, good.answer) == (0, 1)
    assert bad.choices == good.choices
    assert [byte_level.decode(list(choice)) for choice in good.choices] == [" terrible", " great"]
    assert good.target == good.choices[1]
    assert good.references == ()


@pytest.mark.parametrize("label", [1, "1"])
def test_labels_match_as_text_whether_a_source_gives_numbers_or_strings(byte_level, label):
    assert one(FILM | {"label": label}, SENTIMENT, byte_level).answer == 1


def test_number_keys_of_a_yaml_file_are_labels_too(byte_level):
    task = TaskConfig(prompt="{text}", label="label", labels={0: " terrible", 1: " great"})
    assert one(FILM, task, byte_level).answer == 1


def test_braces_in_a_record_are_text(byte_level):
    example = one({"text": "{{hug}} {x}", "label": 1}, SENTIMENT, byte_level)
    assert byte_level.decode(list(example.prompt)) == "{{hug}} {x} It was"


def test_template_reaches_into_nested_fields(byte_level):
    task = TaskConfig(prompt="{film[title]}", label="label", labels={"0": " terrible", "1": " great"})
    example = one({"film": {"title": "the film"}, "label": 1}, task, byte_level)
    assert byte_level.decode(list(example.prompt)) == "the film"


def test_completion_ends_with_the_end_token_and_keeps_all_references(byte_level):
    example = one({"question": "capital?", "answer": ["Paris", "the Paris"]}, ANSWER, byte_level)
    assert example.target[-1] == byte_level.eos_token_id
    assert byte_level.decode(list(example.target[:-1])) == " Paris"
    assert (example.choices, example.answer, example.references) == ((), -1, ("Paris", "the Paris"))


def test_completion_brings_or_finds_white_space_instead_of_a_second_space(byte_level):
    spaced = one({"question": "q", "answer": " Paris"}, ANSWER, byte_level)
    assert byte_level.decode(list(spaced.target[:-1])) == " Paris"
    task = TaskConfig(prompt="{question}\n", completion="answer")
    assert byte_level.decode(list(one({"question": "q", "answer": "yes"}, task, byte_level).target[:-1])) == "yes"


def test_text_that_ends_answers_takes_the_place_of_the_end_token(byte_level):
    example = one({"question": "capital?", "answer": "Paris"}, replace(ANSWER, stop="\n"), byte_level)
    assert byte_level.decode(list(example.target)) == " Paris\n" and example.references == ("Paris",)


def test_a_number_is_an_answer(byte_level):
    example = one({"question": "q", "answer": 42}, ANSWER, byte_level)
    assert byte_level.decode(list(example.target[:-1])) == " 42"
    assert example.references == ("42",)


def test_missing_field_names_field_record_and_the_fields_there_are(byte_level):
    with pytest.raises(UserError, match=r"record 2 .*task.prompt names field text.*fields: body, label"):
        encode([FILM, {"body": "x", "label": 0}], SENTIMENT, byte_level, 100)
    with pytest.raises(UserError, match=r"task.label names field label.*fields: text$"):
        one({"text": "x"}, SENTIMENT, byte_level)


def test_null_field_is_missing_and_not_the_word_none(byte_level):
    with pytest.raises(UserError, match=r"task\.prompt names field text"):
        one({"text": None, "label": 1}, SENTIMENT, byte_level)


@pytest.mark.parametrize("prompt", ["{text", "{}", "{text:d}", "{text[x]}", "{text.nothing}"])
def test_broken_template_is_one_line(byte_level, prompt):
    task = TaskConfig(prompt=prompt, label="label", labels={"0": " a", "1": " b"})
    with pytest.raises(UserError, match=r"task\.prompt") as error:
        one(FILM, task, byte_level)
    assert "\n" not in str(error.value)


def test_label_without_a_word_is_named_with_the_known_ones(byte_level):
    with pytest.raises(UserError, match=r"record 1 .*no label word covers label -1; known: 0, 1"):
        one({"text": "x", "label": -1}, SENTIMENT, byte_level)


def test_label_words_that_cannot_be_told_apart_are_refused(byte_level):
    task = TaskConfig(prompt="{text}", label="label", labels={"0": " great", "1": " great"})
    with pytest.raises(UserError, match="begins with the token of another label word"):
        one(FILM, task, byte_level)
    with pytest.raises(UserError, match="word of 0 is empty"):
        one(FILM, TaskConfig(prompt="{text}", label="label", labels={"0": "", "1": " b"}), byte_level)


def test_empty_prompt_is_refused(byte_level):
    task = TaskConfig(prompt="{text}", label="label", labels={"0": " terrible", "1": " great"})
    with pytest.raises(UserError, match=r"record 1 .*prompt is empty"):
        one({"text": " ", "label": 1}, task, byte_level)


def test_half_an_emoji_is_one_line_and_no_tokenizer_crash(byte_level):
    with pytest.raises(UserError, match=r"record 1 .*surrogates"):
        one({"text": "oh \ud83d", "label": 1}, SENTIMENT, byte_level)


@pytest.mark.parametrize("answer", ["", [], [" "], {"text": ["a"]}, [["a"]]])
def test_empty_or_odd_answers_are_refused(byte_level, answer):
    with pytest.raises(UserError, match=r"record 1 .*field answer must be an answer"):
        one({"question": "q", "answer": answer}, ANSWER, byte_level)


def test_too_long_names_the_record_its_length_and_the_limit(byte_level):
    length = one(FILM, SENTIMENT, byte_level).length
    assert one(FILM, SENTIMENT, byte_level, length)
    short = {"text": "a", "label": 1}
    with pytest.raises(UserError, match=rf"record 2 .*: {length} tokens, the model takes {length - 1} \(1 of 2"):
        encode([short, FILM], SENTIMENT, byte_level, length - 1)


def test_a_prompt_that_is_too_long_loses_its_beginning_where_the_task_says_so(byte_level, sentencepiece):
    task = replace(SENTIMENT, too_long="cut")
    begins = []
    for tokenizer in (byte_level, sentencepiece):
        whole = one(FILM, task, tokenizer)
        most = len(whole.prompt) + max(map(len, whole.choices))
        short = one(FILM, task, tokenizer, most - 2)
        begins.append(whole.prompt[0] == tokenizer.bos_token_id)
        kept = whole.prompt[:1] if begins[-1] else ()
        assert short == replace(whole, prompt=kept + whole.prompt[2 + len(kept) :], cut=True) and not whole.cut
        with pytest.raises(UserError, match="the model takes 1"):
            one(FILM, task, tokenizer, 1)
    assert begins == [False, True]  # the token that begins texts stays


def test_a_prompt_leaves_room_for_what_is_generated_or_for_its_answer_but_not_for_both(byte_level):
    record = {"question": "q", "answer": "a day"}
    example = one(record, ANSWER, byte_level)
    prompt, answer = len(example.prompt), len(example.target)
    assert encode([record], ANSWER, byte_level, prompt + answer, generated=answer)
    assert encode([record], ANSWER, byte_level, prompt + answer + 1, generated=answer + 1)
    with pytest.raises(UserError, match=f"{prompt + answer + 1} tokens, the model takes {prompt + answer}"):
        encode([record], ANSWER, byte_level, prompt + answer, generated=answer + 1)


def test_the_longest_choice_must_fit_as_evaluation_scores_them_all(byte_level):
    task = TaskConfig(prompt="{text}", label="label", labels={"0": " a great film and a mess", "1": " great"})
    length = one(FILM, task, byte_level).length
    with pytest.raises(UserError, match="the model takes"):
        one(FILM, task, byte_level, length)
