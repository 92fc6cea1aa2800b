"""Two nodes, each with a network and a name of its own, joined by a link of 1 Gbit/s."""

import contextlib
import json
import signal
import subprocess
import sys

import pytest

from tests.cli.commands import environment, run
from tests.launch.processes import Launched, two_nodes

SECONDS = 600
ZEROTH_ORDER = ["alpha=1", "lr=0.01", "save=false", "output=out"]


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as nodes:
        yield nodes


@contextlib.contextmanager
def on_each(nodes, words, cwd):
    """A rank of one job on each node, started by torchrun."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Launched("torchrun-node", 1, *words, cwd=cwd, node=node)) for node in nodes]


def verified(node, rank, *settings, cwd):
    """`addax-ds verify` as one of two ranks; a process."""
    job = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    job["MASTER_ADDR"] = node.variables["PET_MASTER_ADDR"]
    words = [*node.words, sys.executable, "-m", "addax_ds", "verify", *map(str, settings)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=cwd, env={**environment(), **node.variables, **job}, **streams)


def test_verify_names_the_node_whose_data_differ(nodes, tiny, tmp_path):
    (tmp_path / "reviews.jsonl").write_text(tiny.reviews.read_text().replace("film", "book"))
    ranks = [
        verified(nodes[0], 0, tiny.run_file, cwd=tmp_path),
        verified(nodes[1], 1, tiny.run_file, f"data={tmp_path / 'reviews.jsonl'}", cwd=tmp_path),
    ]
    output, _ = [rank.communicate(timeout=SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    words = " ".join(output.split())
    assert "2 ranks on 2 nodes" in words, output
    assert "rank 1 on node-1: batches is" in words and "on rank 0 on node-0 it is" in words
    assert "node-1: weights" not in words and "node-1: step" not in words


def test_a_run_on_two_nodes_is_that_of_one(nodes, tiny, tmp_path):
    words = [tiny.run_file, *ZEROTH_ORDER, "engine=fsdp"]
    with on_each(nodes, words, tmp_path) as (first, second):
        assert first.wait(SECONDS) == 0, first.log[-4000:]
        assert second.wait(SECONDS) == 0, second.log[-4000:]
    (tmp_path / "one").mkdir()
    run("train", tiny.run_file, *ZEROTH_ORDER, cwd=tmp_path / "one").check()
    two, one = (json.loads((cwd / "out" / "summary.json").read_text()) for cwd in (tmp_path, tmp_path / "one"))
    assert two["world_size"] == 2 and two["final_digest"] == one["final_digest"]


def test_a_node_that_is_lost_ends_the_other_with_a_cause(nodes, tiny, tmp_path):
    words = [tiny.run_file, "output=out", "engine=fsdp", "steps=1000000", "timeout_minutes=0.2"]
    with on_each(nodes, words, tmp_path) as (first, second):
        metrics = tmp_path / "out" / "metrics.jsonl"
        first.until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, SECONDS)
        second.send_to_all(signal.SIGSTOP)  # as if it were gone: nothing closes its connections
        assert first.wait(90) != 0
        assert "another rank has ended or did not answer for 0.2 minutes" in first.log, first.log
