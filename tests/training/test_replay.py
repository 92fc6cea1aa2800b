"""A zeroth-order run is rebuilt from its journal bit for bit; any run is audited against it."""

import dataclasses
import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

import addax_ds
from addax_ds.digest import weights_digest
from addax_ds.errors import UserError
from addax_ds.training.checkpoint import _sha256
from addax_ds.training.journal import Journal, read_journal
from addax_ds.training.replay import audit, replay
from tests.cli.commands import run


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def zeroth_order(request, tiny, tmp_path_factory):
    """A run of 20 steps on 2 ranks under FSDP2, with checkpoints after 10, 15 and 20."""
    cwd = tmp_path_factory.mktemp("zeroth_order")
    settings = ["alpha=1", "lr=0.01", "queries=2", "weight_decay=0.1", "schedule=cosine", "warmup_steps=3"]
    settings += ["steps=20", "checkpoint_every=5", "save=false", "engine=fsdp", f"dtype={request.param}"]
    settings += ["perturb=shard", "checkpoints_kept=3"]
    run("train", tiny.run_file, "output=out", *settings, cwd=cwd, ranks=2).check()
    return cwd / "out"


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("mixed")
    run("train", tiny.run_file, "output=out", "steps=6", "checkpoint_every=2", "save=false", cwd=cwd).check()
    return cwd / "out"


def final(folder):
    return json.loads((folder / "summary.json").read_text())["final_digest"]


def test_weights_are_rebuilt_from_any_checkpoint_without_data(zeroth_order, tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(zeroth_order, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(tiny.reviews), "/nowhere/reviews.jsonl"))
    for start, first in ((None, 10), (15, 15), (0, 0)):
        found = replay(folder, start, None, None)
        assert (found.first, found.last, found.digest, found.noted) == (first, 20, final(zeroth_order), True)
    halfway = replay(folder, 0, 15, None)
    assert halfway.noted and halfway.digest != found.digest
    assert not replay(folder, 0, 13, None).noted
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert replay(folder, 15, 20, None).journal_bytes == sum(map(len, lines[-8:-2]))  # an event, five steps; two more


def test_the_command_says_what_it_did_and_writes_the_model(zeroth_order, tmp_path):
    result = run("replay", zeroth_order, "--output", tmp_path / "model", cwd=tmp_path).check()
    agreeing = ("seed", "samples", "lr", "directions", "g0", "difference of losses")
    assert "agree: " + ", ".join(f"20 of {item}" for item in agreeing) in result.output
    assert re.search(r"rebuilt: steps 11 to 20 from [\d,]+ bytes of the journal \(\d+ a step\)", result.output)
    assert f"digest: {final(zeroth_order)}, that of the run" in result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert weights_digest(addax_ds.Addax(model).engine) == final(zeroth_order)


def test_neither_metrics_nor_lengths_are_needed(zeroth_order, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "journal.jsonl"):
        shutil.copy(zeroth_order / name, tmp_path / "run")
    shutil.copytree(zeroth_order / "checkpoints" / "step-000010", tmp_path / "run" / "checkpoints" / "step-000010")
    result = run("replay", "run", cwd=tmp_path).check()
    assert "not there to compare with: lengths.json, metrics.jsonl, summary.json" in result.output
    assert f"digest: {final(zeroth_order)}, that of the run" in result.output


def test_a_mixed_run_is_audited_and_not_rebuilt(mixed, tmp_path):
    result = run("replay", mixed, cwd=tmp_path).check()
    assert "6 of seed" in result.output and "3 of weights" in result.output
    assert "can be audited, not rebuilt" in result.output
    refused = run("replay", mixed, "--start", 0, cwd=tmp_path)
    assert refused.status == 2 and "only a run of alpha 1 can be repeated" in refused.error


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", 7, "step 3: the journal has seed 7"),
        ("lr", 0.2, "step 3: the journal has lr 0.2"),
        ("lr", 10**400, "line 4 is damaged .*too large"),
        ("g0", (10**400,), "line 4 is damaged .*too large"),
        ("g0", (1.5,), r"step 3: the journal has g0 \(1.5,\)"),
        ("g0", (1.5, 2.5), "step 3: the journal has directions 2"),
        ("zo", (0, 1, 2, 3, 4), "step 3: the journal has samples"),
    ],
)
def test_an_audit_names_what_disagrees(mixed, tmp_path, field, value, words):
    """A journal whose digests are in order, as a program with a fault would have written it."""
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    entries = read_journal(folder / "journal.jsonl")
    header = {key: value for key, value in entries.header.items() if key != "journal"}
    journal = Journal(folder / "journal.jsonl", header)
    for record in entries.records:
        if record.step == 3:
            object.__setattr__(record, field, value)
        journal.step(record)
    journal.close()
    with pytest.raises(UserError, match=words):
        audit(folder)


def test_an_audit_misses_directions_that_a_step_owes(mixed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    entries = read_journal(folder / "journal.jsonl")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))  # which would tell as well
    header = {key: value for key, value in entries.header.items() if key != "journal"}
    journal = Journal(folder / "journal.jsonl", header)
    for record in entries.records:
        journal.step(dataclasses.replace(record, g0=()) if record.step == 3 else record)
    journal.close()
    with pytest.raises(UserError, match="step 3: the journal has directions 0"):
        audit(folder)


def test_an_audit_holds_g0_against_the_losses(mixed, tmp_path):
    """Metrics and journal of one mind, as a program that reckons wrongly would write them."""
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    entries = read_journal(folder / "journal.jsonl")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[2]["g0"] = [2 * g for g in lines[2]["g0"]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal(
        folder / "journal.jsonl", {key: value for key, value in entries.header.items() if key != "journal"}
    )
    for record in entries.records:
        journal.step(dataclasses.replace(record, g0=tuple(lines[record.step - 1]["g0"])))
    journal.close()
    with pytest.raises(UserError, match="step 3: the journal has difference of losses"):
        audit(folder)


def test_a_checkpoint_that_does_not_say_where_in_the_journal_is_refused(zeroth_order, tmp_path):
    shutil.copytree(zeroth_order, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-000010" / "manifest.json"
    content = {**json.loads(path.read_text()), "run": {}}
    content["sha256"] = _sha256({key: value for key, value in content.items() if key != "sha256"})
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not hold the 10 steps of the checkpoint"):
        replay(tmp_path / "run", 10, None, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, text) for name in ("summary.json", "lengths.json", "metrics.jsonl") for text in ("{}", "[1]", "3")),
        *((name, "[" * 100_000) for name in ("summary.json", "lengths.json", "metrics.jsonl")),
        ("metrics.jsonl", '{"step": 1}'),
        ("metrics.jsonl", {"loss_zo": 3}),
        ("metrics.jsonl", {"loss_zo": {"plus": [1], "minus": []}}),
        ("metrics.jsonl", {"g0": [1], "step": [1]}),
        ("lengths.json", '{"lengths": []}'),
        ("lengths.json", {"lengths": [3]}),
        ("lengths.json", {"lengths": [3] * 160}),
        ("lengths.json", {"lengths": ["inf"] * 160}),
        ("summary.json", {"final_digest": None}),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(mixed, tmp_path, name, content):
    folder = tmp_path / "run"
    shutil.copytree(mixed, folder)
    if isinstance(content, dict):
        whole = (folder / name).read_text()
        content = json.dumps(json.loads(whole.splitlines()[0] if name == "metrics.jsonl" else whole) | content)
    (folder / name).write_text(content + "\n")
    with pytest.raises(UserError, match=name) as refusal:
        audit(folder)
    assert "\n" not in str(refusal.value)


def test_an_audit_notices_other_weights_and_other_noise(mixed, tmp_path, monkeypatch):
    shutil.copytree(mixed, tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    path.write_text(path.read_text().replace(final(mixed), "0" * 64))
    with pytest.raises(UserError, match="step 6: the journal has weights"):
        audit(tmp_path / "run")
    shard = next((tmp_path / "run" / "checkpoints").glob("*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="is damaged: its weights have another digest"):
        audit(tmp_path / "run")
    monkeypatch.setattr("addax_ds.training.state.noise", lambda *_, **__: __import__("torch").zeros(1000))
    with pytest.raises(UserError, match="the journal was begun with noise"):
        audit(mixed)


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        (5, None, "has no checkpoint of step 5, only 10, 15, 20"),
        (15, 12, "give a last step from 15"),
        (0, 21, "ends with step 20"),
    ],
)
def test_steps_that_are_not_there_are_refused(zeroth_order, start, stop, words):
    with pytest.raises(UserError, match=words):
        replay(zeroth_order, start, stop, None)


def test_another_model_than_the_runs_is_refused(zeroth_order, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(zeroth_order, folder)
    config = (folder / "config.yaml").read_text()
    model = re.search(r"^model: (.*)$", config, re.MULTILINE)[1]
    shutil.copytree(model, tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(model)
    other.model.norm.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    (folder / "config.yaml").write_text(config.replace(model, str(tmp_path / "other")))
    with pytest.raises(UserError, match="is not the one that the run began with"):
        replay(folder, 0, None, None)
