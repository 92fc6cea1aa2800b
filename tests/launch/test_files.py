"""Scripts and configurations that people start from are sound."""

import json
import subprocess

import pytest
import torch
from transformers import AutoModelForCausalLM

from addax_ds.compare.plan import check, load_comparison
from addax_ds.config import RunConfig, load_run
from addax_ds.shapes import shape_of
from addax_ds.training.models import read_ds_config
from tests.launch.processes import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"])
DS_CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))
LARGE_DS_CONFIGS = sorted(ROOT.glob("ds_configs/*/*.json"))
LARGE = {size: f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")}
COMPARISONS = sorted(ROOT.glob("launch/reproduce/compare_*.yaml"))
RUN_FILES = sorted({*ROOT.glob("launch/**/*.yaml")} - {*COMPARISONS})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_stop_at_the_first_failure(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
def test_ds_configs_take_the_runs_settings(path):
    config = RunConfig(engine="deepspeed", ds_config=str(path), lr=0.5, eps=0.25, fo_micro_batch=7)
    ds_config = read_ds_config(config)
    optimizer = ds_config["optimizer"]
    assert optimizer["type"] == "Addax"
    assert (optimizer["params"]["lr"], optimizer["params"]["eps"], optimizer["params"]["fo_micro_batch"]) == (
        0.5,
        0.25,
        7,
    )
    assert ds_config["bf16"] == {"enabled": False}
    assert read_ds_config(RunConfig(engine="deepspeed", ds_config=str(path), dtype="bfloat16"))["bf16"]["enabled"]
    # Alone, without a run, the file must be what deepspeed.initialize takes: DeepSpeed clips by default.
    assert json.loads(path.read_text())["gradient_clipping"] == 0


@pytest.mark.parametrize("path", LARGE_DS_CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_ds_configs_of_large_models_are_taken_and_keep_two_blocks_gathered_but_no_more(path):
    from deepspeed import DeepSpeedConfig

    config = RunConfig(engine="deepspeed", ds_config=str(path), dtype="bfloat16", lr=0.5)
    ds_config = read_ds_config(config)
    assert (ds_config["optimizer"]["type"], ds_config["optimizer"]["params"]["lr"]) == ("Addax", 0.5)
    taken = DeepSpeedConfig(json.loads(path.read_text()))
    assert taken.bfloat16_config.enabled and taken.gradient_clipping == 0
    zero = taken.zero_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_of(LARGE[path.parent.name]))
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert block <= zero.prefetch_bucket_size <= 1.05 * block
    assert 2 * block <= zero.max_live_parameters <= 2.1 * block
    assert zero.max_reuse_distance == 0
    offloads = zero.offload_param is not None and zero.offload_param.device == "cpu"
    assert (offloads, zero.zero_hpz_partition_size) == ("offload" in path.stem, 8 if "hpz" in path.stem else 1)


def test_each_large_size_has_a_ds_config_of_each_kind():
    kinds = ("zero3", "zero3_hpz", "zero3_offload_param")
    assert {(path.parent.name, path.stem) for path in LARGE_DS_CONFIGS} == {(s, k) for s in LARGE for k in kinds}


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.name)
def test_run_files_load(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_run(str(path), [])
    if config.ds_config is not None:
        read_ds_config(config)


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_comparisons_load(path):
    check(load_comparison(path))


def test_the_quickstart_is_zero3_on_the_embedded_model_and_data():
    config = load_run(str(ROOT / "launch" / "quickstart.yaml"), [])
    assert (config.model, config.data, config.engine) == ("smollm2-135m", "movies", "deepspeed")
    assert config.ds_config == "ds_configs/zero3.json"
    assert 0 < config.alpha < 1
    assert config.eps == 1e-3 and load_run(str(ROOT / "launch" / "quickstart.yaml"), ["method=adazeta"]).eps == 1e-2
    text = (ROOT / "launch" / "quickstart.sh").read_text()
    assert "launch/quickstart.yaml" in text and "--num_accelerators" in text


def test_constraints_pin_one_version_each_of_what_the_project_stands_on():
    lines = [line for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    needed = {"torch", "transformers", "numba", "deepspeed", "mpi4py", "openmpi", "datasets", "gguf", "pytest", "ruff"}
    assert needed <= pinned.keys()
