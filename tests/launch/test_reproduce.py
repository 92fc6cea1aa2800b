"""The reproduction scripts do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environment
from tests.launch.processes import ROOT

SCRIPTS = ROOT / "launch" / "reproduce"


def script(name, *words, cwd, seconds=860):
    variables = environment()
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    command = [sys.executable, str(SCRIPTS / name), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds)


def rows_of(output):
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")
    ]
    return {(cells[0], cells[1]): cells[2:] for cells in lines}


def gathered(output, launcher, kind):
    """Bytes that a rank receives in all-gathers of a step."""
    summary = json.loads((output / f"{launcher.split()[0]}-{kind}" / "summary.json").read_text())
    return summary["wire_bytes_per_step"]["all_gather"]


def test_worlds_print_one_table_and_a_second_run_is_the_first_to_the_last_bit(tiny, tmp_path):
    words = [tiny.run_file, "alpha=1", "lr=0.01", "save=false", "--ranks", 1, "--ranks", 2]
    words += ["--engines", "hsdp", "--engines", "zero3"]
    first, second = (
        script("worlds.py", *words, "--output", tmp_path / name, cwd=tmp_path) for name in ("first", "second")
    )
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    rows = rows_of(first.stdout)
    assert set(rows) == {("hsdp", "2"), ("zero3", "1"), ("zero3", "2")}
    assert len({tuple(cells) for cells in rows.values()}) == 1
    assert rows == rows_of(second.stdout)
    third = script("worlds.py", *words, "--output", tmp_path / "first", cwd=tmp_path)
    assert third.returncode == 2
    assert third.stderr == f"{tmp_path / 'first' / 'run'} holds runs already: give another --output, or remove it\n"


def test_a_mixed_run_is_repeated_to_the_last_bit(tiny, tmp_path):
    words = [tiny.run_file, "alpha=0.01", "save=false", "--ranks", 2, "--engines", "fsdp", "--engines", "zero3"]
    first, second = (
        script("worlds.py", *words, "--output", tmp_path / name, cwd=tmp_path) for name in ("first", "second")
    )
    assert first.returncode == second.returncode == 0, first.stderr[-3000:] + second.stderr[-3000:]
    assert rows_of(first.stdout) == rows_of(second.stdout) and len(rows_of(first.stdout)) == 2


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("torchrun", ["engine=fsdp"]),
        ("deepspeed", ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"]),
    ],
)
def test_kills_are_survived(tiny, tmp_path, launcher, engine):
    words = [tiny.run_file, "steps=300", "checkpoint_every=5", "save=false", *engine]
    done = script("kills.py", *words, "--kills", 3, "--launcher", launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.search(r"3 kills \{.*\} survived", done.stdout)


@pytest.mark.timeout(1500)  # nine starts of four ranks, with other tests on the same cores
def test_two_hosts_gather_once_for_all_lanes_and_survive_the_loss_of_their_link(tiny, tmp_path):
    words = [tiny.run_file, "steps=40", "timeout_minutes=0.2", "--link", "0.01", "--output", tmp_path / "out"]
    done = script("two_hosts.py", *words, cwd=tmp_path, seconds=1480)
    if done.returncode == 2 and "two hosts cannot be rehearsed here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for launcher in ("torchrun", "deepspeed --no_ssh"):
        _, told = done.stdout.split(f"{launcher}, link of 0.01 Gbit/s: ")
        assert re.search(r"\(\S+ times\)", told)  # of seconds, which other work on these cores changes
        assert gathered(tmp_path / "out", launcher, "shard") > 1.5 * gathered(tmp_path / "out", launcher, "gathered")
        cause = r"  node \d, status 1: addax-ds: rank \d: another rank has ended or did not answer for 0.2 minutes"
        assert len(re.findall(cause, told.split("link up again")[0])) == 2
        assert re.search(r"link up again: digest (\w+), undisturbed \1: the same", told)
