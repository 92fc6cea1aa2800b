"""`addax-ds plan`: the table, and what it refuses."""

import json

import pytest

from addax_ds.cli.plan import bytes_of
from addax_ds.errors import UserError
from addax_ds.plan.compare import METHODS
from tests.cli.commands import run

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500, **SIZES}))
    return folder


def test_a_plan_tells_what_each_method_takes_of_a_gpu(model, tmp_path):
    words = ["--model", model, "--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", "2.01GiB", "--long", "256"]
    done = run("plan", *words, "--lt", "32", "--json", "plan.json", cwd=tmp_path, seconds=300).check()
    assert "4 GPUs" in done.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "plan.json").read_text())["rows"]}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert row["fits"] == ("yes" if row["peak"] <= 0.01 else "no")
    assert rows["mezo"]["peak"] < rows["addax"]["peak"] < rows["ip-sgd"]["peak"] < rows["adamw"]["peak"]
    assert rows["mezo"]["fits"] == "yes" and rows["adamw"]["fits"] == "no"
    assert rows["addax"]["received"] == pytest.approx(3 * rows["mezo"]["received"], rel=0.01)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "meta-llama/Llama-2-70b"], "did you mean meta-llama/Llama-2-70b-hf"),
        (["--model", "facebook/opt-13b", "--nodes", "0"], "nodes is 0: it must be 1 or more"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "80 apples"], "give a size such as 80GiB"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "1GiB"], "gpu_memory is 1 GiB: it must be above 2 GiB"),
        (["--model", "facebook/opt-13b", "--lt", "600"], "lt is 600 and long 512"),
        (["--model", "facebook/opt-13b", "--json", "nowhere/plan.json"], "no folder nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, words, told):
    done = run("plan", *words, cwd=tmp_path)
    told_of = " ".join(done.errors[0].split())
    assert done.status == 2 and told in told_of and len(done.errors[0].splitlines()) == 1, told_of


@pytest.mark.parametrize(("text", "bytes"), [("80GiB", 80 * 2**30), ("1.5 GB", 1.5e9), ("12", 12), ("3MiB", 3 * 2**20)])
def test_sizes_are_read(text, bytes):
    assert bytes_of(text) == bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "8 G"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UserError, match="give a size such as 80GiB"):
        bytes_of(text)
