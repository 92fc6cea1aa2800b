"""Scripts that start a job on several nodes: what they would start, and what they do start on one machine."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from addax_ds.config import load_run
from addax_ds.plan import ready
from addax_ds.plan.cluster import Cluster, gpu_of
from tests.cli.commands import environment, free_port, run
from tests.launch.processes import ROOT, TRAIN
from tests.training.tiny import LABELS

LAUNCH = ROOT / "launch"
PYTHON = Path(sys.executable).with_name("python")
SECONDS = 600
ZEROTH_ORDER = ["alpha=1", "lr=0.01", "save=false", "output=out"]
NASTY = 'task.prompt={text} isn\'t "$HOME" \\n %h;'


def script(name, *words, cwd=None, first=None, **variables):
    """A launch script; `first` is a folder whose programs come before others."""
    path = os.pathsep.join([*([str(first)] if first else []), str(PYTHON.parent), os.environ["PATH"]])
    own = {**environment(), **{name: str(value) for name, value in variables.items()}, "PATH": path}
    command = ["bash", str(LAUNCH / name), *map(str, words)]
    return subprocess.run(command, cwd=cwd or ROOT, env=own, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize(
    ("name", "variables", "started"),
    [
        ("deepspeed.sh", {}, ["deepspeed", "--launcher", "pdsh", "--master_addr", "node-0"]),
        (
            "deepspeed.sh",
            {"LAUNCHER": "openmpi"},
            ["--launcher", "openmpi", "--bind-to none --mca btl_tcp_if_include eth0"],
        ),
        (
            "deepspeed.sh",
            {"LAUNCHER": "slurm", "HEAD": "n"},
            ["MASTER_ADDR=n", "MASTER_PORT=29500", "slurm"],
        ),
        ("deepspeed.sh", {"LAUNCHER": "no_ssh", "NODE_RANK": 1}, ["--no_ssh", "--node_rank", "1", "node-0"]),
        ("deepspeed.sh", {"LAUNCHER": "slurm"}, ["--launcher", "slurm", "--launcher_args", "--ntasks-per-node 8"]),
        ("torchrun.sh", {"HEAD": "n", "NODES": 4}, ["torchrun", "--nnodes", "4", "c10d", "n:29500"]),
        ("mpirun.sh", {"HOSTFILE": "hosts"}, ["mpirun", "--hostfile", "hosts", str(PYTHON)]),
        ("mpirun.sh", {"MPI_OPTIONS": "-x A=b"}, ["mpirun", "-x", "A=b", str(PYTHON)]),
        ("torchrun.sbatch", {"HEAD": "n", "SLURM_NNODES": 4}, ["srun", "--nodes", "4", "launch/torchrun.sh"]),
    ],
)
def test_a_dry_run_prints_the_command_with_every_argument_whole_and_starts_nothing(name, variables, started):
    done = script(name, "--dry-run", "run.yaml", NASTY, **variables)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done
    words = shlex.split(done.stdout)
    last = read_on_a_node(words[-2:]) if "pdsh" in words else words[-2:]
    assert last == ["run.yaml", NASTY]
    assert set(started) <= set(words), words


def read_on_a_node(words):
    """What comes of words that DeepSpeed leaves as they are and pdsh hands to a shell."""
    assert not any(" " in word or "%" in word for word in words)
    read = subprocess.run(["bash", "-c", "printf '%s\\0' " + " ".join(words)], capture_output=True, text=True)
    return read.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("name", "variables", "complaint"),
    [
        ("torchrun.sh", {}, "HEAD: set it to the name or address of a node"),
        ("deepspeed.sh", {"LAUNCHER": "no_ssh"}, "NODE_RANK: set it to the place of this node in the hostfile, from 0"),
        ("torchrun.sbatch", {}, "SLURM_JOB_NODELIST: set HEAD, or submit the file with sbatch"),
        ("deepspeed.sh", {"LAUNCHER": "ssh"}, "LAUNCHER is ssh: set it to pdsh, openmpi, slurm or no_ssh"),
        ("deepspeed.sh", {"HOSTFILE": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_missing_is_one_line_and_nothing_is_started(name, variables, complaint):
    done = script(name, "--dry-run", "run.yaml", **variables)
    assert done.returncode and not done.stdout
    assert done.stderr.count("\n") == 1 and complaint in done.stderr, done.stderr


SRUN = """#!/usr/bin/env bash
# A Slurm step on this machine: of so many tasks, or of one on each of so many nodes.
set -euo pipefail
tasks=1
while [[ $1 == -* ]]; do
  case $1 in
    -n | --nodes) tasks=$2; shift 2 ;;
    --ntasks-per-node) shift 2 ;;
    --export) IFS=, read -ra variables <<< "${2#ALL,}"; export "${variables[@]}"; shift 2 ;;
    *) shift ;;
  esac
done
export SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_ID=0
for ((task = 1; task < tasks; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
for task in $(jobs -p); do wait "$task"; done
"""
SCONTROL = """#!/bin/sh
# The nodes of a list.
echo "$3" | tr , '\\n'
"""
PDSH = """#!/usr/bin/env bash
# The command's words, joined, for this machine's shell; --node_rank=%n is the place of a node among all.
set -euo pipefail
while [[ $1 == -* ]]; do shift $([[ $1 == -S ]] && echo 1 || echo 2); done
line="$*"
exec bash -c "${line//%n/0}"
"""
SBATCH = """#!/bin/sh
# The batch file, here and now.
while [ "${1#--}" != "$1" ]; do shift 2; done
exec bash "$@"
"""


@pytest.fixture
def cluster(tmp_path):
    """A folder with a hostfile of this machine, two ranks, and with a Slurm, pdsh and ssh of its own."""
    (tmp_path / "hostfile").write_text("# this machine\nlocalhost slots=2\n")
    (tmp_path / "others").write_text("nowhere slots=2\n")
    programs = {"srun": SRUN, "scontrol": SCONTROL, "pdsh": PDSH, "sbatch": SBATCH}
    programs |= dict.fromkeys(("sinfo", "ssh"), "#!/bin/sh\n")
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Digest of the run in one process."""
    cwd = tmp_path_factory.mktemp("alone")
    run("train", tiny.run_file, *ZEROTH_ORDER, cwd=cwd).check()
    return json.loads((cwd / "out" / "summary.json").read_text())["final_digest"]


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("torchrun.sh", {"HEAD": "localhost", "NODES": 1, "GPUS_PER_NODE": 2}),
        ("mpirun.sh", {}),
        ("deepspeed.sh", {"LAUNCHER": "openmpi", "INTERFACE": "lo"}),
        ("deepspeed.sh", {"LAUNCHER": "slurm", "SLURM_JOB_NODELIST": "localhost,other", "HOSTFILE": "others"}),
        ("deepspeed.sh", {}),
        ("torchrun.sbatch", {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": 1, "SLURM_GPUS_ON_NODE": 2}),
    ],
)
def test_a_script_starts_as_many_ranks_as_it_is_told_and_they_find_each_other(alone, tiny, cluster, name, variables):
    # Open MPI asks for both before it runs as root, as containers do.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1}
    own = {**allowed, "HOSTFILE": cluster / "hostfile", "PORT": free_port(), **variables}
    labels = yaml.safe_dump(LABELS, default_flow_style=True, width=1000).strip()
    words = [tiny.run_file, *ZEROTH_ORDER, "engine=fsdp", f"task.labels={labels}", f"output={cluster / 'out'}"]
    # A batch script begins in the folder of the project.
    done = script(name, *words, cwd=ROOT if name.endswith(".sbatch") else cluster, first=cluster, **own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((cluster / "out" / "summary.json").read_text())
    assert (summary["world_size"], summary["final_digest"]) == (2, alone)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["torchrun", "deepspeed", "sbatch"])
def test_the_commands_that_a_plan_prints_start_its_run(alone, tiny, cluster, place):
    config = load_run(str(tiny.run_file), [*ZEROTH_ORDER, "engine=fsdp"])
    folder = cluster / "plan"
    folder.mkdir()
    commands = ready.write(config, "a test", Cluster(1, 2, gpu_of("h100")), folder)
    # With names of one's own.
    hosts = folder / "hostfile"
    hosts.write_text(hosts.read_text().replace("node-0", "localhost"))
    command = commands[place].replace("node-0", "localhost").replace("/shared/run", shlex.quote(str(cluster / "out")))
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2"} if place == 2 else {}
    path = os.pathsep.join([str(cluster), str(PYTHON.parent), os.environ["PATH"]])
    own = {**environment(), **slurm, "PORT": str(free_port()), "PATH": path}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=own, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((cluster / "out" / "summary.json").read_text())
    assert (summary["world_size"], summary["final_digest"]) == (2, alone)


def test_tasks_of_srun_without_an_address_say_what_to_set(tiny, tmp_path):
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, TRAIN, tiny.run_file],
        cwd=tmp_path,
        env={**environment(), **step},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "addax-ds: srun does not tell ranks their address: set MASTER_ADDR, or start" in done.stderr
    assert not (tmp_path / "runs").exists()
