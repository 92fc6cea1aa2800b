"""The same run under every launcher, and what happens when one of its ranks dies."""

import json
import re
import signal
import time

import pytest

from tests.cli.commands import run
from tests.launch.processes import ROOT, Launched

ZERO3 = ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"]
ZO = ["alpha=1", "lr=0.01", "queries=2"]
SECONDS = 600
"""For a launcher to come up, train and end on slow shared cores; DeepSpeed may build an extension first."""


def launch(launcher, ranks, *settings, cwd):
    with Launched(launcher, ranks, *settings, "output=out", cwd=cwd) as launched:
        status = launched.wait(SECONDS)
        assert status == 0, launched.log[-6000:]
    return json.loads((cwd / "out" / "summary.json").read_text())


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Digest and scores of the zeroth-order run in one plain process."""
    cwd = tmp_path_factory.mktemp("alone")
    return launch("python", 1, tiny.run_file, *ZO, cwd=cwd)


@pytest.mark.parametrize(
    ("launcher", "settings"), [("torchrun", ["engine=fsdp"]), ("deepspeed", ZERO3), ("mpirun", ZERO3)]
)
def test_a_zeroth_order_run_gives_the_same_bits_under_every_launcher(alone, tiny, tmp_path, launcher, settings):
    summary = launch(launcher, 2, tiny.run_file, *ZO, *settings, cwd=tmp_path)
    assert summary["world_size"] == 2, "the ranks did not find each other"
    assert len(summary["peak_memory_bytes"]) == 2
    assert summary["final_digest"] == alone["final_digest"]
    assert summary["accuracy_after"] == alone["accuracy_after"]
    assert (tmp_path / "out" / "report.html").exists()


ENGINES = {
    "replicated": [],
    "fsdp": ["engine=fsdp"],
    **{path.stem: ["engine=deepspeed", f"ds_config={path}"] for path in sorted((ROOT / "ds_configs").glob("*.json"))},
}


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        (engine, ranks)
        for engine in ENGINES
        for ranks in (1, 2, 3)
        if ranks == 2 or engine in ("replicated", "fsdp", "zero3")
    ],
)
def test_a_zeroth_order_run_gives_the_same_bits_on_every_engine_and_world_size(alone, tiny, tmp_path, engine, ranks):
    settings = ["output=out", "save=false", *ZO, *ENGINES[engine]]
    run("train", tiny.run_file, *settings, cwd=tmp_path, ranks=ranks).check()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = next((stage for stage in ("zero2", "zero3") if stage in engine), engine)
    assert (summary["engine"], summary["world_size"]) == (expected, ranks)
    assert summary["final_digest"] == alone["final_digest"]
    assert summary["accuracy_after"] == alone["accuracy_after"]


def test_hsdp_gives_the_same_bits_too(alone, tiny, tmp_path):
    settings = ["output=out", "save=false", *ZO, "engine=fsdp", "replicas=2"]
    run("train", tiny.run_file, *settings, cwd=tmp_path, ranks=4).check()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["final_digest"] == alone["final_digest"]


@pytest.mark.parametrize(("kind", "ranks"), [("zero3", 2), ("zero3_offload_param", 2), ("zero3_hpz", 4)])
def test_a_step_under_a_ds_config_of_a_large_model_is_that_of_one_process(tiny, tmp_path, kind, ranks):
    settings = json.loads((ROOT / "ds_configs" / "70b" / f"{kind}.json").read_text())
    if kind == "zero3_hpz":  # two nodes of two ranks, not of eight
        settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "ds_config.json").write_text(json.dumps(settings))
    losses = []
    for output, size, engine in (("one", 1, []), ("out", ranks, ["engine=deepspeed", "ds_config=ds_config.json"])):
        words = [tiny.run_file, "dtype=bfloat16", "save=false", f"output={output}", *engine]
        run("train", *words, cwd=tmp_path, ranks=size).check()
        lines = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss_fo"] for line in lines])
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)  # gradients are rounded to bfloat16 before they are summed


MIXED = ["steps=10"]


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """Summary of the mixed run in one process."""
    cwd = tmp_path_factory.mktemp("mixed")
    run("train", tiny.run_file, "output=out", "save=false", *MIXED, cwd=cwd).check()
    return json.loads((cwd / "out" / "summary.json").read_text())


@pytest.mark.parametrize(("engine", "ranks", "other"), [("fsdp", 2, 3), ("zero3", 2, 1), ("zero3", 3, 2)])
def test_a_mixed_run_agrees_across_engines_and_its_model_scores_the_same_on_other_ranks(
    mixed, tiny, tmp_path, engine, ranks, other
):
    run("train", tiny.run_file, "output=out", *MIXED, *ENGINES[engine], cwd=tmp_path, ranks=ranks).check()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy_before"] == mixed["accuracy_before"]
    # Sums of gradients differ in their last bits, and with them at most a sample on the border.
    assert abs(summary["accuracy_after"] - mixed["accuracy_after"]) <= 1 / 60 + 1e-9
    result = run("eval", "out", cwd=tmp_path, ranks=other).check()
    assert json.loads(result.output.splitlines()[-1])["accuracy"] == summary["accuracy_after"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "mpirun"])
def test_a_rank_that_is_killed_takes_the_run_down_within_a_minute(tiny, tmp_path, launcher):
    settings = ["engine=fsdp"] if launcher == "torchrun" else ZERO3
    metrics = tmp_path / "out" / "metrics.jsonl"
    with Launched(launcher, 2, tiny.run_file, "steps=1000000", *settings, "output=out", cwd=tmp_path) as launched:
        launched.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, SECONDS)
        ranks = launched.ranks()
        assert len(ranks) == 2, launched.log
        ranks[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert launched.wait(60) != 0, "a lost rank went unnoticed"
        launched.until(lambda: not launched.alive(), 60 - (time.monotonic() - killed))
        # The other rank says so, unless the launcher is faster, and then it names the signal itself.
        causes = {"mpirun": "signal 9", "deepspeed": "return code = -9|another rank has ended"}
        assert re.search(causes.get(launcher, "another rank has ended"), launched.log), launched.log[-4000:]
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_fault_that_every_rank_meets_is_told_once(tiny, tmp_path, launcher):
    with Launched(launcher, 2, tiny.run_file, "data=nowhere.jsonl", cwd=tmp_path) as launched:
        assert launched.wait(SECONDS) != 0
        assert launched.log.count("addax-ds: nowhere.jsonl: No such file") == 1, launched.log
