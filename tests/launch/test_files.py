"""Scripts and configurations that people start from are sound."""

import json
import subprocess

import pytest

from addax_ds.compare.plan import check, load_comparison
from addax_ds.config import RunConfig, load_run
from addax_ds.training.models import read_ds_config
from tests.launch.processes import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), ROOT / ".ci" / "run"])
DS_CONFIGS = sorted(ROOT.glob("ds_configs/*.json"))
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
    text = (ROOT / "launch" / "quickstart.sh").read_text()
    assert "launch/quickstart.yaml" in text and "--num_accelerators" in text


def test_constraints_pin_one_version_each_of_what_the_project_stands_on():
    lines = [line for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    needed = {"torch", "transformers", "numba", "deepspeed", "mpi4py", "openmpi", "datasets", "gguf", "pytest", "ruff"}
    assert needed <= pinned.keys()
