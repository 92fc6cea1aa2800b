"""`addax-ds plan`: its tables, the run that it writes, and what it refuses."""

import json
import time

import pytest
from transformers import LlamaConfig

from addax_ds.config import RunConfig, build, load_run
from addax_ds.data.partition import check_pools, partition
from addax_ds.errors import UserError
from addax_ds.plan.batches import Targets
from addax_ds.plan.cluster import RESERVED
from addax_ds.plan.methods import METHODS
from addax_ds.plan.parts import PARTS
from addax_ds.plan.rehearsals import Rehearsals
from addax_ds.plan.rehearse import rehearse
from addax_ds.shapes import count_of, shape_of
from addax_ds.training.run import prepare_inputs
from tests.cli.commands import run

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 9, "num_attention_heads": 4}
MEMORY = 2.01  # GiB, of which 2 are not torch's


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500, **SIZES}))
    return folder


def few_methods():
    """In the command's process: to plan every method takes minutes."""
    for name in ("adazeta", "ip-sgd", "sgd", "lora, adamw"):
        METHODS.pop(name)


def planned(*words, cwd, memory=f"{MEMORY}GiB"):
    """What it prints, and its tables."""
    where = ["--nodes", "2", "--gpus-per-node", "2", "--gpu-memory", memory, "--output", "plan"]
    done = run("plan", *where, *words, cwd=cwd, seconds=1500, before=few_methods).check()
    return done.output, json.loads((cwd / "plan" / "plan.json").read_text())


@pytest.mark.timeout(1600)  # dozens of rehearsals
def test_a_plan_tells_what_each_method_takes_of_a_gpu(model, tmp_path):
    told, tables = planned("--model", model, "--long", "256", "--lt", "32", "--rehearse", cwd=tmp_path)
    assert "2 nodes of 2 GPUs" in told
    rows = {row["method"]: row for row in tables["methods"]}
    assert set(rows) == {"addax", "mezo", "adamw", "evaluation"}
    for row in rows.values():
        assert sum(row[part] for part in PARTS) == pytest.approx(row["peak"]) and row["overhead"] == 2
        assert row["fits"] == ("yes" if row["peak"] <= MEMORY - 2 else "no")
        enough = row["GPUs at least"]
        assert enough is None or row["fits"] == "yes" or enough > 4
    assert rows["mezo"]["peak"] < rows["addax"]["peak"] < rows["adamw"]["peak"]
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
    by_kind = [row["rehearsed"] for figure, row in whole.items() if figure.startswith("by ")]
    assert sum(by_kind) == pytest.approx(whole["received, GiB"]["rehearsed"]) and len(by_kind) == 3


def checked(folder, tiny, monkeypatch):
    """The run that was written, whose data make its batches, and which starts."""
    monkeypatch.chdir(folder.parent)
    config = load_run(str(folder / "run.yaml"), [f"model={tiny.model}"])
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    check_pools(pools, config.k0, config.k1, config.alpha)
    assert (folder / "memory.png").stat().st_size > 5000
    words = [f"model={tiny.model}", "steps=1", "save=false", "output=out"]
    done = run("train", folder / "run.yaml", *words, cwd=folder.parent, seconds=400).check()
    assert "after: accuracy" in done.output
    return config, pools


@pytest.mark.timeout(1600)  # dozens of rehearsals
def test_with_data_a_plan_chooses_lt_and_writes_a_run(tiny, model, tmp_path, monkeypatch):
    settings = ["dtype=bfloat16", "activation_checkpointing=true"]
    prepared = prepare_inputs(load_run(str(tiny.run_file), [f"model={tiny.model}", *settings]))
    lengths = sorted(example.length for example in prepared.train)
    wanted = lengths[len(lengths) * 3 // 5]
    sizes = {"engine": "fsdp", "k0": 4, "k1": 16, "zo_micro_batch": 1, "fo_micro_batch": 4}
    config = build(RunConfig, {"dtype": "bfloat16", "activation_checkpointing": True, **sizes}, "test")
    targets = Targets.of(prepared.train, "right")
    memory = rehearse(shape_of(str(model)), config, 4, lengths[-1], wanted, targets=targets).peak + RESERVED

    words = [tiny.run_file, *settings, "--tokenizer", tiny.model, "--zo-micro-batch", "1", "--model", model]
    told, tables = planned(*words, memory=f"{memory + 1:.0f}", cwd=tmp_path)
    assert {row["method"]: row for row in tables["methods"]}["addax"]["fits"] == "yes"
    config, pools = checked(tmp_path / "plan", tiny, monkeypatch)
    assert config.method == "addax" and config.lt == wanted and f"L_T = {wanted} tokens" in told
    assert config.k0 == 4 and config.k1 == 16 and len(pools.zo) >= 4
    assert config.dtype == "bfloat16" and config.activation_checkpointing and config.engine == "fsdp"
    assert "bash launch/torchrun.sh" in told
    again = run("plan", *words, "--output", "plan", cwd=tmp_path)
    assert again.status == 2 and "run.yaml is there already" in again.error


@pytest.mark.timeout(1600)  # dozens of rehearsals
def test_so_it_does_for_zero_3_with_parameters_on_the_host(tiny, model, tmp_path, monkeypatch):
    words = [tiny.run_file, "--tokenizer", tiny.model, "--zo-micro-batch", "1", "--sharding", "zero3-offload"]
    _, tables = planned(*words, "--model", model, cwd=tmp_path)
    rows = {row["method"]: row for row in tables["methods"]}
    assert "plan fsdp-offload" in rows.pop("adamw")["left out"]
    assert all(row["on each node"] > 0 for row in rows.values())
    assert tables.keys() == {"methods"}  # links say nothing of hosts
    config, _ = checked(tmp_path / "plan", tiny, monkeypatch)
    assert config.engine == "deepspeed" and config.dtype == "float32"  # as the file has it
    zero = json.loads((tmp_path / "plan" / "ds_config.json").read_text())
    assert not zero["bf16"]["enabled"] and zero["zero_optimization"]["offload_param"]["device"] == "cpu"


@pytest.mark.timeout(1600)  # dozens of rehearsals
@pytest.mark.parametrize("sharding", ["hsdp", "fsdp-offload", "zero3"])
def test_so_is_every_way_to_shard(model, tmp_path, sharding):
    words = ["--model", model, "--long", "256", "--lt", "32", "--sharding", sharding, "--rehearse"]
    _, tables = planned(*words, cwd=tmp_path)
    rows = {row["method"]: row for row in tables["methods"]}
    assert set(rows) == {"addax", "mezo", "adamw", "evaluation"}
    # HSDP: as many of each node.
    assert rows["mezo"]["GPUs at least"] == (2 if sharding == "hsdp" else 1)
    assert rows["mezo"]["peak"] < rows["addax"]["peak"] < rows["adamw"]["peak"]
    whole = {row["figure"]: row for row in tables["rehearsal"]}
    assert whole["peak, GiB"]["planned"] == pytest.approx(whole["peak, GiB"]["rehearsed"], rel=0.01)
    # ZeRO-3 has the weights of so small a model gathered from the forward to the backward.
    assert whole["model sizes received"]["rehearsed"] == pytest.approx(2 if sharding == "zero3" else 3, rel=0.01)
    if sharding == "fsdp-offload":
        halves = count_of(shape_of(str(model))) * 2 / 2  # of bfloat16 weights, on two nodes
        assert rows["mezo"]["on each node"] == pytest.approx(halves / 2**30, rel=0.02)
        assert rows["adamw"]["on each node"] > 2 * rows["mezo"]["on each node"]
    assert ("links" in tables) == (sharding != "fsdp-offload")


def addax_alone():
    for name in [*METHODS][1:]:
        METHODS.pop(name)


@pytest.mark.parametrize("settings", [["directions=per-micro-batch"], ["perturb=shard", "--rehearse"]])
def test_other_ways_to_gather_are_planned_too(model, tmp_path, settings):
    where = ["--nodes", "1", "--gpus-per-node", "2", "--long", "64", "--output", "plan"]
    run("plan", "--model", model, *where, *settings, cwd=tmp_path, seconds=800, before=addax_alone).check()
    tables = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert tables.keys() == ({"methods", "rehearsal", "links"} if "--rehearse" in settings else {"methods"})
    assert all(row["GB/s into a GPU"] > 0 for row in tables.get("links", []))
    for row in tables.get("rehearsal", []):
        if row["figure"] == "model sizes received":
            assert row["rehearsed"] > 4


def test_where_no_sample_fits_what_it_takes_is_shown(tiny, model, tmp_path):
    words = [tiny.run_file, "--tokenizer", tiny.model, "--model", model, "--gpus-per-node", "2", "--output", "plan"]
    done = run("plan", *words, "--gpu-memory", "2.0005GiB", cwd=tmp_path, seconds=800, before=addax_alone)
    assert done.status == 2 and "GPUs at least" in done.output
    assert "one sample of " in done.error and "plan more GPUs" in done.error
    assert not (tmp_path / "plan").exists()


def test_what_a_rehearsal_cannot_do_is_one_line(tmp_path):
    shape = LlamaConfig(**{**SIZES, "num_key_value_heads": 3})  # which 4 heads cannot share
    config = build(RunConfig, {"engine": "fsdp", "k0": 1, "k1": 1}, "test")
    told = r"llama with addax cannot be rehearsed in float32: .*: plan another model, or dtype=bfloat16"
    with Rehearsals(shape, False) as rehearsals, pytest.raises(UserError, match=told):
        rehearsals.begin(config, 2, 8, 8).result()


def test_a_process_takes_one_rehearsal_after_another_and_tells_how_many_are_done():
    shape = LlamaConfig(**{**SIZES, "num_hidden_layers": 2})
    config = build(RunConfig, {"engine": "fsdp", "k0": 1, "k1": 1}, "test")
    told = []
    with Rehearsals(shape, False) as rehearsals:
        rehearsals.told = told.append
        first = rehearsals.begin(config, 2, 8, 8).result()
        (process,) = rehearsals._processes
        assert rehearsals.begin(config, 4, 8, 8).result().peak < first.peak
        assert rehearsals._processes == {process}
        process.kill()
        process.join()
        # One that has died meanwhile is not asked.
        assert rehearsals.begin(config, 2, 16, 8).result() == rehearse(shape, config, 2, 16, 8)
    assert told[-1] == "rehearsed 3 steps of 3 so far"


def test_a_plan_that_is_left_ends_processes_that_begin():
    shape = LlamaConfig(**{**SIZES, "num_hidden_layers": 2000})  # minutes
    config = build(RunConfig, {"engine": "fsdp", "k0": 1, "k1": 1}, "test")
    left = time.monotonic()
    with Rehearsals(shape, False) as rehearsals:
        begun = rehearsals.begin(config, 2, 8, 8, all_layers=True)
        while not begun.running():
            time.sleep(0.001)
    assert time.monotonic() - left < 60
    assert not any(process.is_alive() for process in rehearsals._processes)


def test_a_rehearsal_that_is_killed_is_one_line():
    shape = LlamaConfig(**{**SIZES, "num_hidden_layers": 8})
    config = build(RunConfig, {"engine": "fsdp", "k0": 1, "k1": 1}, "test")
    with Rehearsals(shape, False) as rehearsals:
        begun = rehearsals.begin(config, 2, 8, 8)
        while not rehearsals._processes:
            time.sleep(0.01)
        for process in [*rehearsals._processes]:
            process.kill()
        with pytest.raises(UserError, match="a rehearsal was killed"):
            begun.result()
        # And another begins all the same.
        assert rehearsals.begin(config, 4, 8, 8).result().peak > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model", "smollm2-135"], "did you mean smollm2-135m?"),
        (["--model", "facebook/opt-13b", "--nodes", "0"], "nodes is 0: it must be 1 or more"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "80 apples"], "give a size such as 80GiB"),
        (["--model", "facebook/opt-13b", "--gpu-memory", "1GiB"], "gpu_memory is 1 GiB: it must be above 2 GiB"),
        (["--model", "facebook/opt-13b", "--node-link", "400"], "give a speed such as 400Gbit/s"),
        (["--model", "facebook/opt-13b", "--gpu", "h10"], "gpu h10, did you mean h100?"),
        (["--model", "facebook/opt-13b", "--sharding", "zero"], "sharding zero, did you mean zero3?"),
        (["--model", "facebook/opt-13b", "--sharding", "hsdp"], "hsdp keeps a copy on each node, and there is one"),
        (["--model", "facebook/opt-13b", "--lt", "600"], "lt is 600 and long 512"),
        (["--model", "facebook/opt-13b", "--data", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--model", "facebook/opt-13b", "--output", "taken/plan"], "taken: no folder that can be written"),
        (["RUN", "--tokenizer", "TINY", "--model", "short"], "the model takes 10"),
        (["--model", "facebook/opt-13b", "--data", "movies", "--lt", "60"], "leave --long and --lt out"),
        (["--model", "facebook/opt-13b", "--long", "0"], "long is 0"),
        (["--model", "facebook/opt-13b", "--long", "4096"], "longer than the 2048 that facebook/opt-13b takes"),
        (["--model", "facebook/opt-13b", "method=mezo"], "leave method=mezo out"),
        (["--model", "facebook/opt-13b", "lt=60"], "lt=60: a plan chooses that"),
    ],
)
def test_what_is_wrong_is_one_line(tiny, model, tmp_path, words, told):
    (tmp_path / "taken").touch()
    shape = json.loads((model / "config.json").read_text())
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 10}))
    places = {"RUN": tiny.run_file, "TINY": tiny.model}
    done = run("plan", *(places.get(word, word) for word in words), cwd=tmp_path)
    told_of = " ".join(done.errors[0].split())
    assert done.status == 2 and told in told_of and len(done.errors[0].splitlines()) == 1, told_of
