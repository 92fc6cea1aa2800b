"""The run folder's files survive crashes, numbers that are not finite, and damage is named."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from addax_ds.errors import UserError
from addax_ds.training.metrics import MetricsWriter, read_json, read_metrics, write_json


def test_records_come_back_as_they_were_written(tmp_path):
    records = [
        {"step": 1, "g0": [1.5, -2.25e-8], "loss_zo": None, "data": "zażółć"},
        {"step": 2, "skipped": False},
    ]
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        for record in records:
            writer.append(record)
    assert read_metrics(tmp_path / "new" / "run") == records


def test_not_finite_numbers_stay_valid_json_and_come_back_as_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.append({"g0": [math.nan, math.inf], "loss_zo": {"plus": (-math.inf,)}})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"g0": ["nan", "inf"], "loss_zo": {"plus": ["-inf"]}}
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["g0"][0]) and record["g0"][1] == math.inf
    assert record["loss_zo"]["plus"] == [-math.inf]


def test_a_process_killed_after_append_loses_no_line(tmp_path):
    program = (
        "import os, pathlib, signal\n"
        "from addax_ds.training.metrics import MetricsWriter\n"
        f"writer = MetricsWriter(pathlib.Path({str(tmp_path)!r}))\n"
        "writer.append({'step': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], timeout=240)
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "g0": [1.', '{"step": 3}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_torn_utf8_letter_is_dropped_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"data": "' + "ż".encode()[:1])
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_appending_after_a_crash_does_not_glue_onto_the_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "g')
    with MetricsWriter(tmp_path, steps=1) as writer:
        writer.append({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", ["{broken", "", "[1]", "3", "[" * 100_000, '{"a":' * 600 + "1" + "}" * 600])
def test_damage_before_the_end_names_the_line(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + damage + '\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(tmp_path)


def test_a_line_nested_too_deeply_is_dropped_when_a_run_goes_on(tmp_path):
    for line in ('{"step": 1, "a": ' + "[" * 100_000, '{"step": 1, "a": ' + "[" * 600 + "]" * 600 + "}"):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with MetricsWriter(tmp_path, steps=1) as writer:
            assert writer.kept == 0


def test_missing_folder_and_missing_file_are_user_errors(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"metrics\.jsonl: No such file"):
            read_metrics(folder)


def test_write_json_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    write_json(path, {"steps": 2, "loss": math.nan})
    assert json.loads(path.read_text()) == {"steps": 2, "loss": "nan"}
    assert math.isnan(read_json(path)["loss"])
    assert os.listdir(tmp_path) == ["summary.json"]


def test_what_cannot_be_written_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    with pytest.raises(TypeError):
        write_json(path, {"steps": object()})
    assert read_json(path) == {"steps": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_reader_meets_only_whole_files_while_one_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    replace, seen = os.replace, []

    def look_then_replace(source, target):
        seen.append(read_json(path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    write_json(path, {"steps": 2})
    assert seen == [{"steps": 1}] and read_json(path) == {"steps": 2}


def test_damaged_json_is_a_user_error_of_one_line(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": ')
    with pytest.raises(UserError, match=r"summary\.json: not JSON") as caught:
        read_json(tmp_path / "summary.json")
    assert "\n" not in str(caught.value)
