"""Runs under their launchers that are killed, preempted or held up: each goes on, or ends with a cause."""

import json
import signal
import time

import pytest

from addax_ds.training.checkpoint import complete
from addax_ds.training.metrics import read_metrics
from tests.cli.commands import run
from tests.launch.processes import ROOT, Launched

ZERO3 = ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"]
ENGINE = {"torchrun": ["engine=fsdp"], "torchrun-restarting": ["engine=fsdp"], "deepspeed": ZERO3}
STEPS = ["steps=80", "checkpoint_every=3", "save=false"]
SECONDS = 600


def steps_of(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory):
    """Final digest by engine of the run that nothing happens to."""
    digests = {}

    def untouched(launcher):
        engine = tuple(ENGINE[launcher])
        if engine not in digests:
            cwd = tmp_path_factory.mktemp("untouched")
            run("train", tiny.run_file, "output=out", *STEPS, *engine, cwd=cwd, ranks=2).check()
            digests[engine] = json.loads((cwd / "out" / "summary.json").read_text())["final_digest"]
        return digests[engine]

    return untouched


def digest(cwd):
    return json.loads((cwd / "out" / "summary.json").read_text())["final_digest"]


def test_torchrun_starts_killed_ranks_again_and_the_run_goes_on(untouched, tiny, tmp_path):
    words = [tiny.run_file, "output=out", *STEPS, "engine=fsdp"]
    with Launched("torchrun-restarting", 2, *words, cwd=tmp_path) as launched:
        for at, victims in ((5, slice(1, 2)), (14, slice(0, 2)), (24, slice(0, 1))):
            launched.until(lambda at=at: steps_of(tmp_path / "out") >= at, SECONDS)
            for process in launched.ranks()[victims]:
                process.send_signal(signal.SIGKILL)
        assert launched.wait(SECONDS) == 0, launched.log[-4000:]
        assert launched.log.count("going on after step") == 3
    assert digest(tmp_path) == untouched("torchrun")
    assert len(read_metrics(tmp_path / "out")) == 80


def test_restarts_do_not_take_another_run_for_their_own(tiny, tmp_path):
    run("train", tiny.run_file, "output=out", "save=false", cwd=tmp_path).check()
    with Launched("torchrun-restarting", 1, tiny.run_file, "output=out", "seed=5", cwd=tmp_path) as launched:
        assert launched.wait(SECONDS) != 0
        assert "output out holds a run with seed 0, and this one has 5" in launched.log


def test_restarts_without_a_folder_to_come_back_to_are_refused(tiny, tmp_path):
    with Launched("torchrun-restarting", 2, tiny.run_file, *STEPS, cwd=tmp_path) as launched:
        assert launched.wait(SECONDS) != 0
        assert "--max-restarts needs a run folder" in launched.log


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_sigterm_saves_and_the_same_command_goes_on(untouched, tiny, tmp_path, launcher):
    words = [tiny.run_file, "output=out", *STEPS, "checkpoint_every=0", *ENGINE[launcher]]
    with Launched(launcher, 2, *words, cwd=tmp_path) as launched:
        launched.until(lambda: steps_of(tmp_path / "out") >= 7, SECONDS)
        launched.terminate()
        asked = time.monotonic()
        assert launched.wait(60) != 0
        launched.until(lambda: not launched.alive(), 60 - (time.monotonic() - asked))
        # torchrun has a traceback of its own to show.
        assert "asked to end after step" in launched.log and "/addax_ds/" not in launched.log, launched.log
    taken = steps_of(tmp_path / "out")
    assert 7 <= taken < 80
    (saved,) = complete(tmp_path / "out" / "checkpoints")
    assert saved.name == f"step-{taken:06d}"
    with Launched(launcher, 2, *words, cwd=tmp_path) as launched:
        assert launched.wait(SECONDS) == 0, launched.log[-4000:]
        assert f"going on after step {taken}" in launched.log
    assert digest(tmp_path) == untouched(launcher)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_hangs_ends_the_run_with_a_cause_within_the_time_out(tiny, tmp_path, launcher):
    words = [tiny.run_file, "output=out", "steps=1000000", "timeout_minutes=0.2", *ENGINE[launcher]]
    with Launched(launcher, 2, *words, cwd=tmp_path) as launched:
        launched.until(lambda: steps_of(tmp_path / "out") >= 3, SECONDS)
        launched.ranks()[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        # 12 seconds, and what the launcher gives its ranks to leave.
        assert launched.wait(90) != 0
        launched.until(lambda: not launched.alive(), 90 - (time.monotonic() - stopped))
        assert "another rank has ended or did not answer for 0.2 minutes" in launched.log, launched.log


def test_a_second_run_in_the_same_folder_is_kept_out(tiny, tmp_path):
    words = [tiny.run_file, "output=out", "steps=1000000", "save=false"]
    with Launched("python", 1, *words, cwd=tmp_path) as launched:
        launched.until(lambda: steps_of(tmp_path / "out") >= 3, SECONDS)
        second = run("train", *words, cwd=tmp_path)
        assert second.status == 2 and "is being written by another process" in second.error
        before = steps_of(tmp_path / "out")
        launched.until(lambda: steps_of(tmp_path / "out") > before, SECONDS)
