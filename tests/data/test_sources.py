import json

import datasets
import pytest

from addax_ds.data.sources import load_records, split_records
from addax_ds.errors import UserError

RECORDS = [{"text": "good, really", "label": 1}, {"text": "bad\u2028 é", "label": 0}]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(data):
    """The message of the error, which must be one line."""
    with pytest.raises(UserError) as error:
        load_records(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_jsonl_gives_its_records_in_order_and_no_task(tmp_path):
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    for content in (
        lines,
        lines.rstrip("\n"),
        "\ufeff" + lines,
        lines.replace("\n", "\r\n"),
        "\n" + lines + "\n",
    ):
        assert load_records(write(tmp_path / "data.jsonl", content)) == (RECORDS, None)


def test_truncated_jsonl_names_the_line(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"text": "a"}\n\n{"text": "b"}\n{"text": "c')
    assert f"{path}, line 4: not JSON" in refused(path)


@pytest.mark.parametrize("line", [b"\xff\xfe{", b"{'text': 1}", b"[" * 100_000, b'{"text": "\xe9"}'])
def test_unreadable_jsonl_names_the_line(tmp_path, line):
    assert "line 2: not JSON" in refused(write(tmp_path / "data.jsonl", b'{"text": "a"}\n' + line + b"\n"))


@pytest.mark.parametrize("line", ["[1]", '"text"', "3", "null"])
def test_a_record_that_is_no_object_names_the_line(tmp_path, line):
    assert "line 2: a record is an object" in refused(write(tmp_path / "data.jsonl", '{"a": 1}\n' + line))


def test_csv_gives_strings_by_header_and_keeps_quoted_commas_and_lines(tmp_path):
    path = write(tmp_path / "data.csv", '\ufefftext,label\r\n"good, really",1\r\n"two\nlines",0\r\n\r\n')
    records, task = load_records(path)
    assert records == [{"text": "good, really", "label": "1"}, {"text": "two\nlines", "label": "0"}]
    assert task is None


def test_csv_with_ragged_lines_names_the_line(tmp_path):
    assert "line 3: 3 values for 2 fields" in refused(write(tmp_path / "a.csv", "text,label\na,1\nb,c,0\n"))
    assert "line 2: 1 values for 2 fields" in refused(write(tmp_path / "b.csv", "text,label\na\n"))


def test_csv_cut_off_inside_a_quote_is_refused(tmp_path):
    assert "line 3: not CSV" in refused(write(tmp_path / "data.csv", 'text,label\na,1\n"b'))


def test_csv_with_a_field_twice_or_in_another_encoding_is_refused(tmp_path):
    assert "stands twice" in refused(write(tmp_path / "a.csv", "text,text\na,b\n"))
    assert "not UTF-8" in refused(write(tmp_path / "b.csv", b"text,label\n\xe9,1\n"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.csv", ""), ("d.csv", "text,label\n")]
)
def test_data_without_records_is_refused(tmp_path, name, content):
    assert "holds no records" in refused(write(tmp_path / name, content))


@pytest.mark.parametrize(
    "data", ["nowhere.jsonl", "some/nowhere.csv", "./nowhere", "/nowhere/at/all", "~/nowhere/at", "a/b/c"]
)
def test_a_path_that_does_not_exist_is_never_looked_up_on_the_hub(data, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert refused(data).startswith(f"{data}: ")


def test_a_folder_named_like_a_file_and_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert "directory" in refused(str(tmp_path / "folder.jsonl"))
    assert ".jsonl or .csv" in refused(write(tmp_path / "data.json", "{}"))


def test_a_local_dataset_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train.jsonl", json.dumps(RECORDS[0]) + "\n")
    write(tmp_path / "test.jsonl", json.dumps(RECORDS[1]) + "\n")
    assert load_records(str(tmp_path))[0] == RECORDS[:1]
    assert load_records(f"{tmp_path}:test")[0] == RECORDS[1:]
    assert "Unknown split" in refused(f"{tmp_path}:validation")


@pytest.mark.parametrize("metadata", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "settings",
    [
        "data_files: ../secret/x.jsonl",
        "data_files: {}/secret/x.jsonl",
        "data_files: ../*/x.jsonl",
        "data_files: [{{split: train, path: [train.jsonl, ../secret/x.jsonl]}}]",
        "data_dir: ../secret",
    ],
)
def test_a_dataset_folder_that_leads_out_of_itself_is_refused(tmp_path, metadata, settings):
    for name in ("set/train.jsonl", "secret/x.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, '{"text": "fine"}\n')
    text = "configs:\n- config_name: default\n  " + settings.format(tmp_path) + "\n"
    write(tmp_path / "set" / metadata, f"---\n{text}---\n" if metadata == "README.md" else text)
    assert "lead out of the folder" in refused(str(tmp_path / "set"))


def test_a_dataset_folder_may_be_a_link_and_name_its_own_files(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "x.jsonl", '{"text": "fine"}\n')
    write(tmp_path / "set" / "README.md", '---\nconfigs:\n- config_name: default\n  data_files: "*.jsonl"\n---\n')
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert load_records(str(tmp_path / "link"))[0] == [{"text": "fine"}]


@pytest.mark.parametrize(
    ("data", "name", "config", "split"),
    [
        ("imdb", "imdb", None, "train"),
        ("org/name:test", "org/name", None, "test"),
        ("org/name:sst2:validation", "org/name", "sst2", "validation"),
    ],
)
def test_hub_ids_carry_config_and_split_and_never_trust_remote_code(monkeypatch, data, name, config, split):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or iter(RECORDS))
    assert load_records(data) == (RECORDS, None)
    assert calls == [((name, config), {"split": split})]


@pytest.mark.parametrize("data", ["a:b:c:d", "a:", ":train", ""])
def test_a_malformed_hub_id_is_refused(data):
    assert "ID:CONFIG:SPLIT" in refused(data)


def test_a_hub_failure_is_one_line_that_names_the_nearest_data(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused("moviez")
    assert "no route to host" in message and "no data of that name, did you mean movies?" in message
    assert "did you mean copa?" in refused("coppa")
    assert "known: movies, amazon" in refused("zzzz")


NUMBERED = [{"id": number} for number in range(100)]


def ids(records):
    return [record["id"] for record in records]


def test_split_takes_each_record_at_most_once_and_shuffles():
    train, held_out = split_records(NUMBERED, 60, 20, seed=1)
    assert (len(train), len(held_out)) == (60, 20)
    assert len({*ids(train), *ids(held_out)}) == 80
    assert ids(train) != sorted(ids(train))


def test_split_is_the_same_for_a_seed_and_another_for_another():
    assert split_records(NUMBERED, 60, 20, seed=1) == split_records(NUMBERED, 60, 20, seed=1)
    assert split_records(NUMBERED, 60, 20, seed=1) != split_records(NUMBERED, 60, 20, seed=2)


def test_held_out_records_do_not_move_with_train_samples():
    few, many = (split_records(NUMBERED, count, 20, seed=1) for count in (10, None))
    assert few[1] == many[1]
    assert few[0] == many[0][:10]
    assert len(many[0]) == 80


def test_split_may_leave_either_side_empty_on_request():
    assert split_records(NUMBERED, 0, 100, seed=1)[0] == []
    assert split_records(NUMBERED, 100, 0, seed=1)[1] == []


@pytest.mark.parametrize(
    ("train", "held_out", "told"),
    [
        (81, 20, "81 to train and choose settings on and 20 held out"),
        (None, 100, "any to train and choose settings on and 100 held out"),
        (None, 101, "any to train and choose settings on and 101 held out"),
        (0, 101, "101 held out"),
        (101, 0, "101 to train and choose settings on"),
    ],
)
def test_too_few_records_name_the_numbers(train, held_out, told):
    with pytest.raises(UserError, match=f"100 records are too few for {told}: lower train_samples, dev_samples or"):
        split_records(NUMBERED, train, held_out, seed=1)
