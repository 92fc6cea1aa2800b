"""Killed at any instant and started again, a run ends with the weights of one that was never touched."""

import errno
import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass

import pytest

from addax_ds.training.checkpoint import complete
from addax_ds.training.journal import read_journal
from addax_ds.training.metrics import read_metrics
from tests.cli.commands import run
from tests.launch.processes import ROOT
from tests.training.dying import PLACES, Death

STEPS = ["steps=8", "checkpoint_every=2", "save=false"]
ENGINES = {
    "replicated": [],
    "fsdp": ["engine=fsdp"],
    "zero3": ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"],
}


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def without_times(folder):
    times = ("seconds", "memory_bytes")
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
    assert killed.statuses[1 - rank] not in (0, 2), killed.errors[1 - rank]
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
    assert len(begun_again) == 1 and taken - 2 <= begun_again[0] <= taken
    run("replay", "out", cwd=tmp_path).check()
    left = {path.suffix for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert left == {""} and len(complete(tmp_path / "out" / "checkpoints")) == 2


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
    words = ["train", tiny.run_file, "output=out", *STEPS]
    run(*words, *ENGINES["zero3"], cwd=tmp_path, ranks=2, before=Death("backward", 1, 5))
    run(*words, *ENGINES["fsdp"], cwd=tmp_path, ranks=3).check()
    expected, got = (read_metrics(folder) for folder in (untouched("zero3"), tmp_path / "out"))
    for before, after in zip(expected, got, strict=True):
        assert after["loss_fo"] == pytest.approx(before["loss_fo"], rel=1e-5)


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


def test_a_finished_run_is_left_alone(untouched, tiny):
    folder = untouched("replicated")
    refused = run("train", tiny.run_file, f"output={folder}", *STEPS, cwd=folder)
    assert refused.status == 2 and "holds a finished run" in refused.error


def test_more_steps_may_be_asked_of_an_unfinished_run(tiny, tmp_path):
    command = ["train", tiny.run_file, "output=out", *STEPS]
    run(*command, cwd=tmp_path, before=Death("journal", 0, 5))
    run(*command, "steps=9", cwd=tmp_path).check()
    assert len(read_metrics(tmp_path / "out")) == 9
