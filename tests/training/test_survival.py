"""Killed at any instant and started again, a run ends with the weights of one that was never touched."""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from addax_ds.config import load_run
from addax_ds.optimizer import Addax
from addax_ds.training.checkpoint import complete, read_manifest
from addax_ds.training.folder import versions
from addax_ds.training.journal import read_journal
from addax_ds.training.metrics import read_metrics
from addax_ds.training.state import recorded
from tests.cli.commands import run
from tests.launch.processes import ROOT
from tests.training.dying import PLACES, Death
from tests.training.tiny import TRAIN

STEPS = ["steps=8", "checkpoint_every=2", "save=false"]
ENGINES = {
    "replicated": [],
    "fsdp": ["engine=fsdp"],
    "zero3": ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"],
}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def without_times(folder):
    times = ("seconds", "memory_bytes", "wire_bytes")
    return [{key: value for key, value in record.items() if key not in times} for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory):
    """untouched(engine, *settings): the folder of a run on 2 ranks that nothing has happened to."""
    runs = {}

    def untouched(engine, *settings):
        key = (engine, settings)
        if key not in runs:
            cwd = tmp_path_factory.mktemp("untouched")
            words = ["train", tiny.run_file, "output=out", *STEPS, *ENGINES[engine], *settings]
            run(*words, cwd=cwd, ranks=2).check()
            runs[key] = cwd / "out"
        return runs[key]

    return untouched


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_in_any_place_a_mixed_run_ends_as_if_nothing_had_happened(untouched, tiny, tmp_path, engine, place):
    words = ["train", tiny.run_file, "output=out", *STEPS, *ENGINES[engine]]
    # Files are rank 0's; replicas stage but do not write.
    rank = 1 if place in ("probe", "backward", "staging") or (place == "shard" and engine != "replicated") else 0
    killed = run(*words, cwd=tmp_path, ranks=2, before=Death(place, rank, 5))
    assert killed.statuses[rank] == -signal.SIGKILL, "\n".join(killed.errors)
    assert killed.statuses[1 - rank] == 1, killed.errors[1 - rank]
    assert "another rank has ended or did not answer" in killed.errors[1 - rank]
    assert not (tmp_path / "out" / "summary.json").exists()
    taken = len(read_metrics(tmp_path / "out"))
    resumed = run(*words, cwd=tmp_path, ranks=2).check()
    assert "going on after step" in resumed.output
    expected = untouched(engine)
    assert summary(tmp_path / "out")["final_digest"] == summary(expected)["final_digest"]
    assert without_times(tmp_path / "out") == without_times(expected)
    entries = read_journal(tmp_path / "out" / "journal.jsonl")
    assert entries.records == read_journal(expected / "journal.jsonl").records
    begun_again = [event["resumed"] for event in entries.events if "resumed" in event]
    # The next save, two steps on, is what waits for the one before, and its step is noted by then.
    assert len(begun_again) == 1 and taken - 4 <= begun_again[0] <= taken
    run("replay", "out", cwd=tmp_path).check()
    left = {path.suffix for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert left == {""} and len(complete(tmp_path / "out" / "checkpoints")) == 2


@pytest.mark.parametrize("place", ["staging", "shard", "loading"])
def test_a_rank_that_hangs_while_saving_or_loading_ends_the_others_with_a_cause(tiny, tmp_path, place):
    words = ["train", tiny.run_file, "output=out", *STEPS, "engine=fsdp", "timeout_minutes=0.2"]
    if place == "loading":
        run(*words, cwd=tmp_path, ranks=2, before=Death("journal", 0, 6))
    stopped = Death(place, 1, 0, signal.SIGSTOP)
    # The rank that hangs is killed when the other has ended, as a launcher does.
    result = run(*words, cwd=tmp_path, ranks=2, before=stopped, until=0)
    assert result.status == 1, result.error
    assert "another rank has ended or did not answer for 0.2 minutes" in result.error
    assert "Traceback" not in result.error
    assert run(*words, cwd=tmp_path, ranks=2).check().output.count("going on after step") == 1


@pytest.mark.parametrize(
    ("evaluation", "words"), [(0, "before the first step"), (1, "after step 4"), (2, "after step 8")]
)
@pytest.mark.parametrize("method", [(), ("alpha=1", "lr=0.01")], ids=["mixed", "zeroth-order"])
def test_asked_to_end_in_an_evaluation_a_run_saves_at_once(untouched, tiny, tmp_path, method, evaluation, words):
    method = ("eval_every=4", *method)
    settings = ["train", tiny.run_file, "output=out", *STEPS, *method]
    asked = run(*settings, cwd=tmp_path, ranks=2, before=Death("evaluation", 1, evaluation, signal.SIGTERM))
    assert asked.statuses == [143, 143], asked.errors
    assert f"asked to end {words}" in asked.error
    if evaluation:  # and once more in the same one
        asked = run(*settings, cwd=tmp_path, ranks=2, before=Death("evaluation", 0, 0, signal.SIGTERM))
        assert asked.statuses == [143, 143] and f"asked to end {words}, and saved" in asked.error
    run(*settings, cwd=tmp_path, ranks=2).check()
    expected = untouched("replicated", *method)
    assert without_times(tmp_path / "out") == without_times(expected)
    assert [record["step"] for record in read_metrics(expected) if "accuracy" in record] == [4]
    for key in ("accuracy_before", "accuracy_after", "final_digest", "wire_bytes_per_step"):
        assert summary(tmp_path / "out")[key] == summary(expected)[key]
    peak, _ = summary(tmp_path / "out")["step_memory_bytes"]
    assert peak == max(record["memory_bytes"] for record in read_metrics(tmp_path / "out"))


@pytest.fixture
def untied(tiny, tmp_path):
    """A folder with a model that has embeddings of three tokens that no text has."""
    before = AutoModelForCausalLM.from_pretrained(tiny.model).config
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**before.to_dict(), "tie_word_embeddings": False, "vocab_size": before.vocab_size + 3})
    )
    shutil.copytree(tiny.model, tmp_path / "untied")
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
def test_a_model_with_weights_that_are_not_finite_is_refused(tiny, untied, tmp_path, engine):
    model = AutoModelForCausalLM.from_pretrained(untied)
    words = ["train", tiny.run_file, f"model={untied}", "output=out", *STEPS, *ENGINES[engine]]
    weights = model.get_input_embeddings().weight.data
    weights[-1, 0] = math.inf
    model.save_pretrained(untied)
    refused = run(*words, cwd=tmp_path, ranks=2)
    assert refused.statuses == [2, 2]
    assert "model.embed_tokens.weight has weights that are not finite: mend" in refused.error
    assert "Traceback" not in refused.error and not (tmp_path / "out" / "journal.jsonl").exists()
    weights[-1, 0] = 1.0
    model.save_pretrained(untied)
    run(*words, "steps=1", cwd=tmp_path, ranks=2).check()


@dataclass(frozen=True)
class Overflow:
    """An embedding that no text has becomes infinite after a step."""

    step: int

    def __call__(self) -> None:
        original = Addax.train_step

        def overflowing(optimizer, *args, **kwargs):
            metrics = original(optimizer, *args, **kwargs)
            if optimizer.steps == self.step:
                optimizer.engine.shard("model.embed_tokens.weight").local[-1] = math.inf
            return metrics

        Addax.train_step = overflowing


def test_a_checkpoint_that_is_refused_is_told(tiny, untied, tmp_path):
    words = ["train", tiny.run_file, f"model={untied}", "output=out", *STEPS]
    done = run(*words, cwd=tmp_path, before=Overflow(3))
    assert done.status == 2
    told = "no checkpoint of step {}: model.embed_tokens.weight has weights that are not finite"
    assert [step for step in range(1, 9) if told.format(step) in done.output] == [4, 6, 8]
    assert [path.name for path in complete(tmp_path / "out" / "checkpoints")] == ["step-000002"]


def test_asked_to_end_between_spoilt_steps_a_run_keeps_its_good_checkpoint_and_its_count(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", "lr=1e38", "steps=40", "checkpoint_every=1", "checkpoints_kept=1"]
    words += ["max_skipped=4"]
    asked = run(*words, cwd=tmp_path, ranks=2, before=Death("probe", 1, 3, signal.SIGTERM))
    assert asked.statuses == [143, 143] and "asked to end after step 4, and saved" in asked.error
    taken = read_metrics(tmp_path / "out")
    # Spoilt by gradients alone, which the journal does not tell.
    assert [bool(record["gradients_left_out"]) for record in taken] == [False, True, True, True]
    assert not any(record["skipped"] for record in taken)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert [path.name for path in complete(checkpoints)] == ["step-000004", "step-000001"]
    ended = run(*words, cwd=tmp_path, ranks=2)
    assert ended.statuses == [2, 2]
    assert "4 steps in a row, up to step 5, had losses or gradients that are not" in ended.error
    assert [path.name for path in complete(checkpoints)] == ["step-000004", "step-000001"]


def test_dropout_resumes_with_the_same_masks(tiny, tmp_path):
    """The tiny Llama has attention dropout alone."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    digests = {}
    for name, extra in (("untouched", []), ("killed", []), ("without", ["dropout=false"])):
        words = ["train", tiny.run_file, f"model={model}", "dropout=true", f"output={name}", *STEPS, *extra]
        if name == "killed":
            run(*words, cwd=tmp_path, before=Death("journal", 0, 6))
        run(*words, cwd=tmp_path).check()
        digests[name] = summary(tmp_path / name)["final_digest"]
    assert digests["killed"] == digests["untouched"] != digests["without"]


def test_a_damaged_checkpoint_costs_its_steps_and_no_more(untouched, tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS, "checkpoints_kept=3"]
    run(*words, cwd=tmp_path, ranks=2, before=Death("journal", 0, 8))
    newest = tmp_path / "out" / "checkpoints" / "step-000006"
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed = run(*words, cwd=tmp_path, ranks=2).check()
    assert "step-000006 is damaged" in resumed.output and "going on after step 4" in resumed.output
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]
    run("replay", "out", cwd=tmp_path).check()


def test_damaged_metrics_are_told_and_cost_no_step(untouched, tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, ranks=2, before=Death("journal", 0, 8))
    metrics = tmp_path / "out" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:2], "{" + lines[2], *lines[3:]]))
    resumed = run(*words, cwd=tmp_path, ranks=2).check()
    assert "metrics.jsonl has lines of 5 of the 6 steps taken" in resumed.output
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]
    assert [record["step"] for record in read_metrics(tmp_path / "out")] == [1, 2, 4, 5, 6, 7, 8]
    assert summary(tmp_path / "out")["metrics_lost"] == 1


def test_changed_data_is_noticed(tiny, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny.reviews.read_bytes())
    words = ["train", tiny.run_file, f"data={data}", "output=out", *STEPS]
    run(*words, cwd=tmp_path, before=Death("journal", 0, 6))
    data.write_text(data.read_text().replace("film", "cast"))
    refused = run(*words, cwd=tmp_path)
    assert refused.status == 2 and "the journal was begun with data" in refused.error


def test_fewer_steps_than_were_taken_are_refused(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, before=Death("journal", 0, 6))
    refused = run(*words, "steps=3", cwd=tmp_path)
    assert refused.status == 2 and "has taken 4 steps already" in refused.error


@dataclass(frozen=True)
class FullDisk:
    """Writes of rank 0 to a file fail from a step on."""

    method: str
    step: int

    def __call__(self) -> None:
        from addax_ds.training.journal import Journal
        from addax_ds.training.metrics import MetricsWriter

        owner = {"append": MetricsWriter, "step": Journal, "sync": Journal, "event": Journal}[self.method]
        original, calls = getattr(owner, self.method), itertools.count(1)

        def full(*args, **kwargs):
            if next(calls) >= self.step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        setattr(owner, self.method, full)


@pytest.mark.parametrize(("method", "times"), [("append", 5), ("step", 5), ("sync", 2), ("event", 2)])
def test_a_full_disk_ends_every_rank_with_one_line_and_the_run_goes_on(untouched, tiny, tmp_path, method, times):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    ended = run(*words, cwd=tmp_path, ranks=2, before=FullDisk(method, times))
    assert ended.statuses == [2, 2], ended.errors
    assert "No space left on device" in ended.error and "Traceback" not in "".join(ended.errors)
    run(*words, cwd=tmp_path, ranks=2).check()
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]


@pytest.mark.parametrize(("first", "second", "ranks"), [("zero3", "fsdp", 3), ("fsdp", "replicated", 1)])
def test_a_zeroth_order_run_goes_on_elsewhere_with_the_same_bits(untouched, tiny, tmp_path, first, second, ranks):
    zeroth_order = ["alpha=1", "lr=0.01", "checkpoint_every=3"]
    words = ["train", tiny.run_file, "output=out", *STEPS, *zeroth_order]
    killed = run(*words, *ENGINES[first], cwd=tmp_path, ranks=2, before=Death("journal", 0, 6))
    assert killed.statuses[0] == -signal.SIGKILL, "\n".join(killed.errors)
    resumed = run(*words, *ENGINES[second], cwd=tmp_path, ranks=ranks).check()
    # From the checkpoint of step 3 and the journal of steps 4 and 5, without a forward.
    assert "2 steps repeated from the journal" in resumed.output
    assert "going on after step 5" in resumed.output
    expected = untouched("fsdp", *zeroth_order)
    assert summary(tmp_path / "out")["final_digest"] == summary(expected)["final_digest"]


def test_a_mixed_run_goes_on_elsewhere_within_rounding(untouched, tiny, tmp_path):
    longer = ("steps=200", "checkpoint_every=20")
    words = ["train", tiny.run_file, "output=out", *STEPS, *longer]
    run(*words, *ENGINES["zero3"], cwd=tmp_path, ranks=2, before=Death("backward", 1, 45))
    run(*words, *ENGINES["fsdp"], cwd=tmp_path, ranks=3, before=Death("backward", 1, 45))
    run(*words, cwd=tmp_path).check()
    expected, got = (read_metrics(folder) for folder in (untouched("zero3", *longer), tmp_path / "out"))
    worst = max(abs(b["loss_fo"] - a["loss_fo"]) for b, a in zip(expected, got, strict=True))
    assert 0 < worst < 1e-5 * expected[0]["loss_fo"]


@pytest.mark.parametrize("written", [b"", b'{"journal":2,"tra'])
def test_a_run_killed_as_it_made_its_journal_starts_again(untouched, tiny, tmp_path, written):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, ranks=2, before=Death("backward", 1, 0))
    (tmp_path / "out" / "journal.jsonl").write_bytes(written)
    run(*words, cwd=tmp_path, ranks=2).check()
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]
    run("replay", "out", cwd=tmp_path).check()


def test_a_run_killed_before_its_first_checkpoint_starts_again(untouched, tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, ranks=2, before=Death("backward", 1, 0))
    resumed = run(*words, cwd=tmp_path, ranks=2).check()
    assert "going on after step 0" in resumed.output
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["lr=0.2"], "with lr 0.1, and this one has 0.2"),
        (["k0=6"], "with k0 5, and this one has 6"),
        (["dtype=bfloat16"], "with dtype float32, and this one has bfloat16"),
        (["schedule=linear"], "with schedule constant"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(tiny, tmp_path, change, words):
    command = ["train", tiny.run_file, "output=out", *STEPS]
    run(*command, cwd=tmp_path, before=Death("journal", 0, 5))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    refused = run(*command, *change, cwd=tmp_path)
    assert refused.status == 2 and words in refused.error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@dataclass(frozen=True)
class OtherVersion:
    """What is installed says that it is of another version."""

    version: str

    def __call__(self) -> None:
        importlib.metadata.version = lambda _: self.version


def test_the_journal_tells_which_versions_took_which_steps(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, before=Death("journal", 0, 6))
    run(*words, cwd=tmp_path, before=OtherVersion("7.8.9")).check()
    entries = read_journal(tmp_path / "out" / "journal.jsonl")
    (resumed,) = (event for event in entries.events if "resumed" in event)
    assert entries.header["versions"] == versions()
    assert resumed["resumed"] == 4
    assert resumed["versions"] == {**dict.fromkeys(versions(), "7.8.9"), "python": versions()["python"]}


def test_a_checkpoint_tells_the_settings_of_its_run(untouched):
    folder = untouched("fsdp")
    config, (newest, _) = load_run(str(folder / "config.yaml"), []), complete(folder / "checkpoints")
    expected = {"steps": 8, "lr": 0.1, "schedule": "constant", "warmup_steps": 0, "engine": "fsdp", "ranks": 2}
    expected |= {"k0": 5, "k1": 4, "alpha": 0.01, "train_samples": TRAIN, **recorded(config)}
    told = read_manifest(newest).run
    assert {name: told[name] for name in expected} == expected
    assert told.keys() - expected.keys() == {"data", "before", "journal"}


def test_a_finished_run_is_left_alone(untouched, tiny):
    folder = untouched("replicated")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "report" not in path.name}
    words = ["train", tiny.run_file, f"output={folder}", *STEPS]
    done = run(*words, cwd=folder, ranks=2).check()
    assert "is finished: nothing is left to do" in done.output
    assert summary(folder)["final_digest"][:12] in done.output
    refused = run(*words, "seed=5", cwd=folder)
    assert refused.status == 2 and "with seed 0, and this one has 5" in refused.error
    assert before == {path: path.read_bytes() for path in before}
    without = run(*words, "save=true", cwd=folder)
    assert without.status == 2 and "holds a finished run without its model" in without.error


@pytest.mark.parametrize("content", ["{}", "[]", '{"steps": 8}', "{", ""])
def test_a_damaged_summary_is_one_line(untouched, tiny, tmp_path, content):
    shutil.copytree(untouched("replicated"), tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text(content)
    refused = run("train", tiny.run_file, "output=out", *STEPS, cwd=tmp_path)
    assert refused.status == 2 and "summary.json" in refused.error, refused.error
    assert refused.error.strip().count("\n") == 0


def test_an_address_that_is_taken_is_said_so(tiny, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run("train", tiny.run_file, *STEPS, cwd=tmp_path, ranks=2, before=Joins(port), until=0)
    assert refused.status == 1 and "rank 0 cannot join the others" in refused.error, refused.error


@dataclass(frozen=True)
class Joins:
    """The others at this port."""

    port: int

    def __call__(self) -> None:
        os.environ["MASTER_PORT"] = str(self.port)


@pytest.mark.parametrize(
    ("number", "every"), [(signal.SIGKILL, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 5), (signal.SIGTERM, 0)]
)
def test_ended_while_the_model_is_exported_a_run_loses_nothing(untouched, tiny, tmp_path, number, every):
    words = ["train", tiny.run_file, "output=out", *STEPS, "save=true", f"checkpoint_every={every}"]
    ended = run(*words, cwd=tmp_path, ranks=2, before=Death("export", 0, 0, number))
    if every:
        assert ended.statuses == [-number, 1], ended.errors
        assert not (tmp_path / "out" / "model").exists()
        assert "going on after step 8" in run(*words, cwd=tmp_path, ranks=2).check().output
    else:  # nothing is saved but by the export itself, which is finished
        assert ended.statuses == [0, 0], ended.errors
    assert (tmp_path / "out" / "model").is_dir()
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]


def test_a_run_goes_on_without_its_journal(untouched, tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, cwd=tmp_path, ranks=2, before=Death("journal", 0, 6))
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    refused = run(*words, cwd=tmp_path, ranks=2)
    assert refused.statuses == [2, 2]
    assert "remove it to go on from the newest checkpoint" in refused.error
    journal.unlink()
    again = run(*words, cwd=tmp_path, ranks=2, before=Death("probe", 1, 1))  # before it has saved anything
    assert "going on after step 4" in again.output
    done = run(*words, cwd=tmp_path, ranks=2).check()
    assert "going on after step 4" in done.output
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]
    assert [record.step for record in read_journal(journal).records] == [5, 6, 7, 8]
    assert "4 of seed" in run("replay", "out", cwd=tmp_path).check().output


def test_a_zeroth_order_run_is_rebuilt_from_where_its_second_journal_begins(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS, "alpha=1", "lr=0.01"]
    run(*words, cwd=tmp_path, before=Death("journal", 0, 6))
    (tmp_path / "out" / "journal.jsonl").unlink()
    run(*words, "checkpoints_kept=9", cwd=tmp_path).check()
    rebuilt = run("replay", "out", cwd=tmp_path).check()
    assert "rebuilt: steps 5 to 8" in rebuilt.output and "that of the run" in rebuilt.output
    refused = run("replay", "out", "--start", 2, cwd=tmp_path)
    assert refused.status == 2 and "the journal begins after step 4" in refused.error
    journal = (tmp_path / "out" / "journal.jsonl").read_bytes()
    (tmp_path / "out" / "summary.json").unlink()
    for path in complete(tmp_path / "out" / "checkpoints"):
        shutil.rmtree(path)
    refused = run(*words, cwd=tmp_path)
    assert refused.status == 2 and "begins after step 4, and there is no checkpoint: restore one" in refused.error
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == journal


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of a given size")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 0.88, 0.92, 0.94, 0.96, 0.98])
def test_a_disk_that_is_full_is_one_line_and_nothing_is_lost(untouched, tiny, tmp_path, share):
    words = ["train", tiny.run_file, "output=disk/out", *STEPS, "save=true"]
    run("train", tiny.run_file, "output=whole", *STEPS, "save=true", cwd=tmp_path, ranks=2).check()
    size = sum(path.stat().st_blocks * 512 for path in (tmp_path / "whole").rglob("*"))
    with small_disk(tmp_path / "disk", int(size * share)):
        full = run(*words, cwd=tmp_path, ranks=2)
        assert set(full.statuses) <= {0, 2} and "Traceback" not in "".join(full.errors), full.errors
        assert full.status == 0 or any("No space left" in error for error in full.errors), full.errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path / "disk")], check=True)
        run(*words, cwd=tmp_path, ranks=2).check()
        assert summary(tmp_path / "disk" / "out")["final_digest"] == summary(tmp_path / "whole")["final_digest"]


@dataclass(frozen=True)
class LastSaveFails:
    """As on a disk that is full half-way through the save of step 8."""

    def __call__(self) -> None:
        from addax_ds.training import checkpoint

        save = checkpoint.dcp.save

        def torn(*args, storage_writer, **kwargs):
            if "step-000008" in str(storage_writer.path):
                Path(storage_writer.path).mkdir(exist_ok=True)
                (Path(storage_writer.path) / "torn").write_bytes(b"1")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(*args, storage_writer=storage_writer, **kwargs)

        checkpoint.dcp.save = torn


def test_a_last_save_that_fails_leaves_its_place_to_the_runs_end(untouched, tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS, "save=true"]
    ended = run(*words, cwd=tmp_path, ranks=2, before=LastSaveFails()).check()
    assert "the last step is not saved" in ended.output and "No space left" in ended.output
    assert summary(tmp_path / "out")["final_digest"] == summary(untouched("replicated"))["final_digest"]
    assert (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("file", ["", "out"])
def test_a_read_only_disk_is_one_line(tiny, tmp_path, file):
    words = ["train", tiny.run_file, "output=disk/out", *STEPS, "save=true"]
    with small_disk(tmp_path / "disk", "64m"):
        if file:
            run(*words, cwd=tmp_path, before=Death("journal", 0, 5))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        refused = run(*words, cwd=tmp_path, ranks=2)
        assert refused.statuses == [2, 2] and "Read-only file system" in refused.error
        assert "Traceback" not in "".join(refused.errors)


def test_ranks_that_do_not_join_end_the_others_with_a_cause(tiny, tmp_path):
    words = ["train", tiny.run_file, "output=out", *STEPS, "engine=fsdp", "timeout_minutes=0.1"]
    result = run(*words, cwd=tmp_path, ranks=2, before=NeverJoins(), until=0)
    assert result.status == 1, result.error
    assert "the 2 ranks did not all join within 0.1 minutes" in result.error and "Traceback" not in result.error


@dataclass(frozen=True)
class NeverJoins:
    def __call__(self) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(600)


def test_more_steps_may_be_asked_of_an_unfinished_run(tiny, tmp_path):
    command = ["train", tiny.run_file, "output=out", *STEPS]
    run(*command, cwd=tmp_path, before=Death("journal", 0, 5))
    run(*command, "steps=9", cwd=tmp_path).check()
    assert len(read_metrics(tmp_path / "out")) == 9
