"""lm-eval scores an exported model as a run does."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from addax_ds.training.metrics import read_json
from tests.cli.commands import run
from tests.training.tiny import LABELS

pytest.importorskip("lm_eval", reason="of the test extra: pip install 'addax-ds[test]'")


def test_an_exported_model_gets_the_runs_accuracy_from_lm_eval(tiny, tmp_path):
    reviews = tiny.reviews.read_text().splitlines(keepends=True)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(reviews[-60:]))
    (tmp_path / "reviews.jsonl").write_text("".join(reviews[:-60]))
    data = ["data=reviews.jsonl", "eval_data=held_out.jsonl", "eval_samples=60"]
    run("train", tiny.run_file, *data, "output=out", "steps=12", cwd=tmp_path).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["accuracy_before"] < summary["accuracy_after"] < 1, "a score that any model would get"
    task = {
        "task": "mood",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(held_out)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} It was",
        "doc_to_choice": [word.strip() for word in LABELS.values()],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mood.yaml").write_text(yaml.safe_dump(task))
    arguments = {
        "--model": "hf",
        "--model_args": "pretrained=out/model,dtype=float32",
        "--tasks": "mood",
        "--include_path": ".",
        "--device": "cpu",
        "--output_path": "scores.json",
    }
    words = [word for pair in arguments.items() for word in pair]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("scores*.json")
    assert json.loads(written.read_text())["results"]["mood"]["acc,none"] == summary["accuracy_after"]
