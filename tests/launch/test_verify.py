"""Ranks compare themselves through mpi4py or the launcher's store, and a rank that differs is named."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from addax_ds.training.verify import Report, disagreements
from tests.cli.commands import environment, free_port, run

ITEMS = ("torch", "device", "noise, normal", "noise, rademacher", "settings", "weights", "adapters", "batches", "step")
SECONDS = 600


def launch(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    variables = {**environment(), **allowed, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=SECONDS)


def mpirun(*of_each_rank: list[str]) -> list[str]:
    found = Path(sys.executable).with_name("mpirun")
    words = [str(found if found.exists() else shutil.which("mpirun")), "--oversubscribe"]
    for settings in of_each_rank:
        words += ["-n", "1", sys.executable, "-m", "addax_ds", "verify", *settings, ":"]
    return words[:-1]


def test_ranks_of_mpirun_that_agree(tiny, tmp_path):
    done = launch(mpirun(*[[str(tiny.run_file)]] * 2), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on 1 nodes") == 1
    for item in ITEMS:
        (line,) = [line for line in done.stdout.splitlines() if f" {item} " in line]
        assert "2 of 2" in line and "failed" not in line


def test_a_rank_that_differs_is_named_with_its_node_and_items(tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "other")
    other = AutoModelForCausalLM.from_pretrained(tiny.model)
    other.model.norm.weight.data[0] += 1e-6
    other.save_pretrained(tmp_path / "other")
    changed = [str(tiny.run_file), f"model={tmp_path / 'other'}", "seed=1", "distribution=rademacher"]
    done = launch(mpirun([str(tiny.run_file)], [str(tiny.run_file)], changed), tmp_path)
    assert done.returncode == 2
    node = socket.gethostname()
    for item in ("settings", "weights", "batches", "step"):
        assert f"rank 2 on {node}: {item} is " in done.stdout.replace("\n", " "), done.stdout
    assert f"rank 2 on {node}: torch" not in done.stdout
    assert "mend that before a job runs on it" in done.stderr


def test_other_settings_and_other_adapters_are_a_difference(tiny, tmp_path):
    words = [str(tiny.run_file), "adapter.kind=lora"]
    for seed in (0, 1):
        run("train", *words, "steps=1", f"seed={seed}", f"output=of-{seed}", cwd=tmp_path).check()
    ranks = [[*words, f"adapter_weights=of-{seed}/adapter", f"steps={3 + seed}"] for seed in (0, 1)]
    done = launch(mpirun(*ranks), tmp_path)
    assert done.returncode == 2
    node = socket.gethostname()
    differing = [line for line in done.stdout.splitlines() if line.startswith("rank 1 on ")]
    assert [line.split(" is ")[0] for line in differing] == [f"rank 1 on {node}: {x}" for x in ("settings", "adapters")]


def test_a_rank_without_the_run_file_is_named(tiny, tmp_path):
    done = launch(mpirun([str(tiny.run_file)], ["nowhere.yaml"]), tmp_path)
    assert done.returncode == 2
    told = f"rank 1 on {socket.gethostname()}: settings failed: UserError: nowhere.yaml: No such file or directory"
    assert told in done.stderr and "2 ranks on 1 nodes" in done.stdout


def test_a_rank_that_does_not_report_is_named_in_time(tiny, tmp_path):
    os.mkfifo(tmp_path / "never.jsonl")
    soon = [str(tiny.run_file), "timeout_minutes=0.3"]
    done = launch(mpirun(soon, [*soon, "data=never.jsonl"], soon), tmp_path)
    assert done.returncode == 2
    assert f"addax-ds: rank 1 on {socket.gethostname()} did not report within 0.3 minutes: look at" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_of_torchrun_use_its_store(tiny, tmp_path):
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = [sys.executable, "-m", "torch.distributed.run", *address, "--nproc_per_node", "2"]
    done = launch([*words, "-m", "addax_ds", "verify", str(tiny.run_file)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 nodes" in done.stdout


def test_without_a_launcher_the_one_rank_serves_itself(tiny, tmp_path):
    done = run("verify", tiny.run_file, cwd=tmp_path).check()
    assert "1 of 1" in done.output


def test_what_fails_on_every_rank_is_no_agreement(tiny, tmp_path):
    failed = run("verify", tiny.run_file, "model=nowhere/at/all", cwd=tmp_path)
    assert failed.status == 2
    assert "weights failed: UserError" in failed.error


@pytest.mark.parametrize(("odd", "named"), [(0, 0), (1, 1), (2, 2)])
def test_the_odd_one_out_is_named_whichever_it_is(odd, named):
    reports = [Report(rank, f"node{rank}", {"torch": "2.12" if rank == odd else "2.13"}) for rank in range(3)]
    (line,) = disagreements(reports)
    first = 1 if odd == 0 else 0
    assert line == f"rank {named} on node{named}: torch is 2.12, and on rank {first} on node{first} it is 2.13"


def test_agreement_is_silent():
    assert disagreements([Report(rank, "node", {"torch": "2.13"}) for rank in range(4)]) == []
