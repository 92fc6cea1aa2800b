"""`addax-ds plan`: its tables, the run that it writes, and what it refuses."""

import json

import pytest

from addax_ds.config import load_run
from addax_ds.plan.methods import METHODS
from tests.cli.commands import run

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 9, "num_attention_heads": 4}
MEMORY = 2.01  # GiB, of which 2 are not torch's


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500, **SIZES}))
    return folder


def planned(*words, cwd):
    """Its tables."""
    where = ["--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", f"{MEMORY}GiB", "--output", "plan"]
    done = run("plan", *where, *words, cwd=cwd, seconds=500).check()
    return done.output, json.loads((cwd / "plan" / "plan.json").read_text())


@pytest.mark.timeout(600)
def test_a_plan_tells_what_each_method_takes_of_a_gpu(model, tmp_path):
    told, tables = planned("--model", model, "--long", "256", "--lt", "32", "--rehearse", cwd=tmp_path)
    assert "2 nodes of 2 GPUs" in told
    rows = {row["method"]: row for row in tables["methods"]}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row["fits"] == ("yes" if row["peak"] <= MEMORY - 2 else "no")
        enough = row["GPUs at least"]
        assert enough is None or row["fits"] == "yes" or enough > 4
    assert rows["mezo"]["peak"] < rows["addax"]["peak"] < rows["ip-sgd"]["peak"] < rows["adamw"]["peak"]
    assert rows["mezo"]["fits"] == "yes" and rows["adamw"]["fits"] == "no"
    assert rows["addax"]["received"] == pytest.approx(3 * rows["mezo"]["received"], rel=0.01)
    assert rows["mezo"]["GPUs at least"] == 1 and rows["adamw"]["GPUs at least"] is None
    # A fast link has room for perturbed weights that are gathered anew; over a slow one they cost their bytes.
    fastest, *_, slowest = tables["links"]
    assert fastest["Gbit/s into a node"] == 3200 and slowest["faster"] == "perturb: gathered"
    assert slowest["a gather for each"] > 1.5 * slowest["one gather for all"]
    whole = {row["figure"]: row for row in tables["rehearsal"]}
    assert whole["peak, GiB"]["planned"] == pytest.approx(whole["peak, GiB"]["rehearsed"], rel=0.01)
    assert whole["model sizes received"]["rehearsed"] == pytest.approx(3, rel=0.01)


@pytest.mark.timeout(600)
def test_with_data_a_plan_chooses_lt_and_writes_a_run(tiny, model, tmp_path):
    words = [tiny.run_file, "dtype=bfloat16", "--tokenizer", tiny.model, "--zo-micro-batch", "1"]
    told, tables = planned(*words, "--model", model, cwd=tmp_path)
    assert {row["method"]: row for row in tables["methods"]}["addax"]["fits"] == "yes"
    config = load_run(str(tmp_path / "plan" / "run.yaml"), [])
    assert config.k0 == 4 and config.k1 == 4 * config.fo_micro_batch and config.dtype == "bfloat16"
    assert config.method == ("addax-wa" if config.lt == "none" else "addax")
    assert "bash launch/torchrun.sh" in told and (tmp_path / "plan" / "memory.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "meta-llama/Llama-2-70b"], "did you mean meta-llama/Llama-2-70b-hf"),
        (["--model", "facebook/opt-13b", "--nodes", "0"], "nodes is 0: it must be 1 or more"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "80 apples"], "give a size such as 80GiB"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "1GiB"], "gpu_memory is 1 GiB: it must be above 2 GiB"),
        (["--model", "facebook/opt-13b", "--node-link", "400"], "give a speed such as 400Gbit/s"),
        (["--model", "facebook/opt-13b", "--gpu", "h10"], "gpu h10, did you mean h100?"),
        (["--model", "facebook/opt-13b", "--sharding", "zero"], "sharding zero, did you mean zero3?"),
        (["--model", "facebook/opt-13b", "--sharding", "hsdp"], "hsdp keeps a copy on each node, and there is one"),
        (["--model", "facebook/opt-13b", "--lt", "600"], "lt is 600 and long 512"),
        (["--model", "facebook/opt-13b", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "facebook/opt-13b", "--data", "movies", "--lt", "60"], "leave --long and --lt out"),
        (["--model", "facebook/opt-13b", "--long", "0"], "long is 0"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, words, told):
    done = run("plan", *words, cwd=tmp_path)
    told_of = " ".join(done.errors[0].split())
    assert done.status == 2 and told in told_of and len(done.errors[0].splitlines()) == 1, told_of
