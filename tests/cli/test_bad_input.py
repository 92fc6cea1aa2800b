"""Bad input: status 2, one line that says what is wrong, no traceback, nothing written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from addax_ds.cli.main import main
from tests.cli.commands import environment, run


@pytest.fixture(scope="module")
def bad(tiny, tmp_path_factory):
    """Files with one fault each, and the run file that is sound."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copy(tiny.run_file, folder / "run.yaml")
    (folder / "list.yaml").write_text("- model\n- data\n")
    (folder / "aliases.yaml").write_text("model: &a [lol, lol]\ndata: [*a, *a]\n")
    (folder / "twice.yaml").write_text("steps: 3\nlr: 0.1\nsteps: 4\n")
    (folder / "broken.yaml").write_text("model: [tiny\nlr: 1\n")
    (folder / "deep.yaml").write_text("[" * 5000)
    (folder / "date.yaml").write_text("model: 2024-13-45\n")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin1.yaml").write_bytes("model: caf\xe9\n".encode("latin-1"))
    (folder / "empty").mkdir()

    lines = tiny.reviews.read_text().splitlines(keepends=True)
    (folder / "truncated.jsonl").write_text("".join(lines[:200]) + lines[200][:20])
    (folder / "nothing.jsonl").write_text("\n")
    (folder / "list.jsonl").write_text(lines[0] + "[1, 2]\n")
    (folder / "ragged.csv").write_text("text,label\nfine,1\ndull, slow,0\n")
    (folder / "prose.txt").write_text("fine")
    long = {"text": "fine " * 70, "label": 1}
    (folder / "long.jsonl").write_text("".join(lines[:-1]) + json.dumps(long) + "\n")
    third = {"text": "fine", "label": 2}
    (folder / "third.jsonl").write_text("".join(lines[:-1]) + json.dumps(third) + "\n")

    (folder / "ds.json").write_text(json.dumps(ds_config()))
    (folder / "ds_broken.json").write_text('{"zero_optimization": {"stage": 3}')
    (folder / "ds_list.json").write_text("[]")
    (folder / "ds_null.json").write_text('{"optimizer": null, "bf16": 3}')
    (folder / "ds_adam.json").write_text(json.dumps(ds_config(optimizer={"type": "AdamW"})))
    (folder / "ds_scheduler.json").write_text(json.dumps(ds_config(scheduler={"type": "WarmupLR"})))
    (folder / "ds_bf16.json").write_text(json.dumps(ds_config(bf16={"enabled": True})))

    old = folder / "old_run"
    old.mkdir()
    (old / "metrics.jsonl").write_text("")
    trained = folder / "old_model"
    shutil.copytree(tiny.model, trained / "model")

    no_weights = folder / "no_weights"
    shutil.copytree(tiny.model, no_weights)
    (no_weights / "model.safetensors").unlink()
    torn = folder / "torn_weights"
    shutil.copytree(tiny.model, torn)
    content = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    other = folder / "other_shape"
    shutil.copytree(tiny.model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return folder


def ds_config(stage: int = 3, **settings) -> dict:
    zero = {"stage": stage, **settings.pop("zero", {})}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0, "zero_optimization": zero, **settings}


def command_line(settings, bad):
    return ["train", "output=out", *(setting.replace("BAD", str(bad)) for setting in settings)]


def assert_refused(status, error, words, folder):
    lines = [line for line in error.splitlines() if line.strip()]
    assert status == 2, error
    assert len(lines) == 1 and lines[0].startswith("addax-ds: "), error
    for word in words:
        assert word in lines[0]
    assert not list(folder.iterdir()), "something was written"


RUN = "BAD/run.yaml"
BEFORE_START = {
    "unknown key": ([RUN, "zzz=1"], ["unknown key zzz; known: lr, alpha"]),
    "misspelt key": ([RUN, "stepz=3"], ["unknown key stepz, did you mean steps?"]),
    "misspelt task key": ([RUN, "task.promt=x"], ["task: unknown key promt, did you mean prompt?"]),
    "key under a plain setting": ([RUN, "model.path=x"], ["model is no group of settings"]),
    "override that is not YAML": ([RUN, "model=[1"], ["model=[1: the value is not YAML"]),
    "two run files": ([RUN, RUN], ["one run file at most"]),
    "word that is no setting": ([RUN, "steps"], ["steps: one run file at most; settings are written key=value"]),
    "run file that does not exist": (["BAD/nowhere.yaml"], ["nowhere.yaml: No such file"]),
    "run file that is a folder": (["BAD/empty"], ["Is a directory"]),
    "run file with aliases": (["BAD/aliases.yaml"], ["aliases.yaml: not YAML: line 2: *a is not taken"]),
    "run file with a key twice": (["BAD/twice.yaml"], ["twice.yaml: not YAML: line 3: steps stands there twice"]),
    "yes or no in place of a number": ([RUN, "steps=yes"], ["steps is true: give a value, not yes or no"]),
    "number in base 60": ([RUN, "steps=1:30"], ["steps is '1:30'"]),
    "kind of adapter that is a list": ([RUN, "adapter.kind=[1]"], ["adapter: kind is [1]: give one of"]),
    "value that is long": ([RUN, "steps=" + "x" * 5000], ["steps is 'xxx"]),
    "run file that is a list": (["BAD/list.yaml"], ["a run file is a mapping"]),
    "run file that is not YAML": (["BAD/broken.yaml"], ["broken.yaml: not YAML", "line 2"]),
    "run file that is not UTF-8": (["BAD/latin1.yaml"], ["latin1.yaml: not YAML"]),
    "run file nested too deeply": (["BAD/deep.yaml"], ["deep.yaml: not YAML: maximum recursion depth"]),
    "run file with a date that is none": (["BAD/date.yaml"], ["date.yaml: not YAML: month must be in 1..12"]),
    "override nested too deeply": ([RUN, "model=" + "[" * 5000], ["the value is not YAML"]),
    "ds_config nested too deeply": (
        [RUN, "engine=deepspeed", "ds_config=BAD/deep.json"],
        ["deep.json: not JSON: maximum recursion depth"],
    ),
    **{
        f"NUL in {name}": ([RUN, f'{name}="a\\0b"'], [f"{name} holds a NUL character: remove it"])
        for name in ("model", "data", "eval_data", "output")
    },
    "model path that is too long": ([RUN, "model=/" + "a" * 5000], ["no such folder"]),
    "model id that is too long": ([RUN, "model=" + "a" * 5000], ["cannot be loaded: Repo id must"]),
    "data path that is too long": ([RUN, "data=/" + "a" * 5000], ["File name too long"]),
    "output path that is too long": ([RUN, "output=/" + "a" * 5000], ["aaa: File name too long"]),
    "prompt padded beyond memory": ([RUN, 'task.prompt="{text:>99999999999}"'], ["task.prompt pads a field to 10,000"]),
    "timeout_minutes that no clock holds": ([RUN, "timeout_minutes=1e300"], ["timeout_minutes is 1e+300", "at most"]),
    "timeout_minutes inf": ([RUN, "timeout_minutes=.inf"], ["timeout_minutes is inf", "at most"]),
    "alpha above 1": ([RUN, "alpha=1.5"], ["alpha is 1.5: it must lie in [0, 1]"]),
    "alpha below 0": ([RUN, "alpha=-1e-9"], ["alpha is -1e-09"]),
    "alpha nan": ([RUN, "alpha=.nan"], ["alpha is nan"]),
    "alpha null": ([RUN, "alpha=null"], ["alpha is None"]),
    "eps 0": ([RUN, "eps=0"], ["eps is 0.0: it must be above 0"]),
    "eps below 0": ([RUN, "eps=-1e-3"], ["eps is -0.001"]),
    "eps nan": ([RUN, "eps=nan"], ["eps is nan"]),
    "eps inf": ([RUN, "eps=inf"], ["eps is inf"]),
    "lr below 0": ([RUN, "lr=-1"], ["lr is -1.0"]),
    "lr nan": ([RUN, "lr=nan"], ["lr is nan"]),
    "lr inf": ([RUN, "lr=.inf"], ["lr is inf"]),
    "lr that is no number": ([RUN, "lr=fast"], ["lr is 'fast'"]),
    "weight_decay nan": ([RUN, "weight_decay=nan"], ["weight_decay is nan"]),
    "weight_decay inf": ([RUN, "weight_decay=inf"], ["weight_decay is inf"]),
    "steps 0": ([RUN, "steps=0"], ["steps is 0"]),
    "steps that are no whole number": ([RUN, "steps=2.5"], ["steps is 2.5"]),
    "k0 of 0": ([RUN, "k0=0"], ["k0 is 0"]),
    "queries 0": ([RUN, "queries=0"], ["queries is 0"]),
    "negative seed": ([RUN, "seed=-1"], ["seed is -1"]),
    "lt of 0": ([RUN, "lt=0"], ["lt is 0: give tokens, auto or none"]),
    "lt that is no word we know": ([RUN, "lt=median"], ["lt is 'median'", "auto", "none"]),
    "float16 weights": ([RUN, "dtype=float16"], ["dtype is 'float16'", "'float32' or 'bfloat16'"]),
    "unknown engine": ([RUN, "engine=fsdp1"], ["engine is 'fsdp1'", "'fsdp'"]),
    "unknown schedule": ([RUN, "schedule=step"], ["schedule is 'step'"]),
    "engine deepspeed without ds_config": ([RUN, "engine=deepspeed"], ["engine: deepspeed and ds_config go together"]),
    "ds_config without engine deepspeed": ([RUN, "ds_config=BAD/ds.json"], ["go together"]),
    "replicas without fsdp": ([RUN, "replicas=2"], ["replicas above 1 needs engine: fsdp"]),
    "ds_config that does not exist": (
        [RUN, "engine=deepspeed", "ds_config=BAD/nowhere.json"],
        ["nowhere.json: No such file"],
    ),
    "ds_config that is not JSON": ([RUN, "engine=deepspeed", "ds_config=BAD/ds_broken.json"], ["not JSON"]),
    "ds_config that is a list": ([RUN, "engine=deepspeed", "ds_config=BAD/ds_list.json"], ["ds_list.json"]),
    "ds_config with values of a wrong kind": (
        [RUN, "engine=deepspeed", "ds_config=BAD/ds_null.json"],
        ["optimizer is None"],
    ),
    "ds_config with another optimizer": ([RUN, "engine=deepspeed", "ds_config=BAD/ds_adam.json"], ["type is AdamW"]),
    "ds_config with a schedule": (
        [RUN, "engine=deepspeed", "ds_config=BAD/ds_scheduler.json"],
        ["remove scheduler, set schedule"],
    ),
    "ds_config of another dtype": (
        [RUN, "engine=deepspeed", "ds_config=BAD/ds_bf16.json"],
        ["bf16.enabled is True but dtype is float32"],
    ),
    "model path that does not exist": ([RUN, "model=./nowhere"], ["./nowhere: no such folder"]),
    "absolute model path that does not exist": ([RUN, "model=/nowhere/model"], ["/nowhere/model: no such folder"]),
    "model folder that holds no model": ([RUN, "model=BAD/empty"], ["empty cannot be loaded"]),
    "data file that does not exist": ([RUN, "data=./nowhere.jsonl"], ["nowhere.jsonl: No such file"]),
    "data folder that does not exist": ([RUN, "data=./nowhere"], ["./nowhere: no such file or folder"]),
    "held-out file that does not exist": ([RUN, "eval_data=nowhere.csv"], ["nowhere.csv: No such file"]),
    "data file of another kind": ([RUN, "data=BAD/prose.txt"], ["data files are .jsonl or .csv"]),
    "truncated JSONL": ([RUN, "data=BAD/truncated.jsonl"], ["truncated.jsonl, line 201: not JSON"]),
    "JSONL without records": ([RUN, "data=BAD/nothing.jsonl"], ["nothing.jsonl: holds no records"]),
    "JSONL line that is no object": ([RUN, "data=BAD/list.jsonl"], ["list.jsonl, line 2"]),
    "CSV line with a value too many": ([RUN, "data=BAD/ragged.csv"], ["ragged.csv, line 3"]),
    "label without a label word": (
        [RUN, "data=BAD/third.jsonl", "train_samples=null"],
        ["no label word covers label 2", "known: 0, 1"],
    ),
    "field that the template names and no record has": (
        [RUN, 'task.prompt="{review} It was"'],
        ["task.prompt names field review", "its fields: text, label"],
    ),
    "label field that no record has": ([RUN, "task.label=class"], ["task.label names field class"]),
    "one label word": ([RUN, 'task.labels={"0": " dull"}'], ["task.labels needs two classes"]),
    "label words that begin alike": (
        [RUN, 'task.labels={"0": " fine film", "1": " fine plot"}'],
        ["begins with the token of another label word"],
    ),
    "labels and a completion": ([RUN, "task.completion=label"], ["either labels or completion"]),
    "sample longer than the context": (
        [RUN, "data=BAD/long.jsonl", "train_samples=null"],
        ["tokens, the model takes 64", "1 of"],
    ),
    "empty zeroth-order pool": ([RUN, "lt=50"], ["the zeroth-order pool is empty: no sample is longer than lt=50"]),
    "empty first-order pool": ([RUN, "lt=2"], ["the first-order pool is empty: no sample is of at most lt=2"]),
    "k0 above its pool": ([RUN, "k0=1000"], ["k0=1000 is more than", "of the zeroth-order pool"]),
    "k1 above its pool": ([RUN, "k1=1000"], ["k1=1000 is more than", "of the first-order pool"]),
    "more samples than records": ([RUN, "train_samples=1000"], ["240 records are too few for 1000 to train"]),
    "data without a task": (["model=BAD/empty", "data=BAD/long.jsonl"], ["brings no task"]),
}


@pytest.mark.parametrize("name", BEFORE_START)
def test_a_fault_in_the_settings_or_the_data_is_named_before_anything_starts(bad, name, tmp_path, monkeypatch, capfd):
    settings, words = BEFORE_START[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")  # what a launcher sets; no process group may be needed to find these
    monkeypatch.setattr(sys, "argv", ["addax-ds", *command_line(settings, bad)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert_refused(stop.value.code, capfd.readouterr().err, words, tmp_path)


COMPARISONS = {
    "that does not exist": (None, ["No such file"]),
    "that is not YAML": ("run: [", ["not YAML"]),
    "without methods": ("{run: {dev_samples: 4}, methods: {}}", ["methods is empty"]),
    "with a setting nobody knows": ("{run: {stepz: 1}, methods: {a: {}}}", ["methods: a: unknown key stepz"]),
    "with grids of different sizes": (
        "{run: {dev_samples: 4}, methods: {a: {grid: {lr: [1, 2]}}, b: {}}}",
        ["grids differ in size (a 2, b 1 points)"],
    ),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_that_is_wrong_is_named_before_anything_runs(name, tmp_path, monkeypatch, capfd):
    content, words = COMPARISONS[name]
    file, folder = tmp_path / "compare.yaml", tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        file.write_text(content)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["addax-ds", "compare", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert_refused(stop.value.code, capfd.readouterr().err, words, folder)


@pytest.mark.parametrize("settings", [["output=BAD/old_run"], ["output=BAD/old_model"], ["output=BAD/run.yaml"]])
def test_a_folder_that_holds_a_run_or_a_model_and_a_file_are_no_place_for_a_run(
    bad, settings, tmp_path, monkeypatch, capfd
):
    before = sorted(bad.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["addax-ds", *command_line([RUN, *settings], bad)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert_refused(stop.value.code, capfd.readouterr().err, ["output", "choose another"], tmp_path)
    assert sorted(bad.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_weights", ["no_weights cannot be loaded: Error no file named"]),
        ("torn_weights", ["torn_weights cannot be loaded: Error while deserializing header"]),
        ("other_shape", ["other_shape cannot be loaded: You set `ignore_mismatched_sizes`"]),
    ],
)
def test_damaged_weights_are_refused_before_a_run_folder_is_made(bad, name, words, tmp_path):
    result = run(*command_line([RUN, f"model=BAD/{name}"], bad), cwd=tmp_path)
    # transformers prints a table of the weights that do not fit before it raises.
    assert_refused(result.status, result.error.splitlines()[-1], words, tmp_path)
    assert "Traceback" not in result.error


def read_only() -> None:
    def mkdir(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    Path.mkdir = mkdir


def test_a_read_only_disk_is_one_line_on_every_rank(bad, tmp_path):
    result = run(*command_line([RUN], bad), cwd=tmp_path, ranks=2, before=read_only)
    for status, error in zip(result.statuses, result.errors, strict=True):
        assert_refused(status, error, ["output out: Read-only file system: choose another folder"], tmp_path)


def test_replicas_must_divide_the_ranks(bad, tmp_path):
    result = run(*command_line([RUN, "engine=fsdp", "replicas=2"], bad), cwd=tmp_path)
    assert_refused(result.status, result.error, ["replicas=2 does not divide the 1 ranks"], tmp_path)


REFUSED = {
    "gradient_clipping": (ds_config(gradient_clipping=1.0), "gradient_clipping"),
    "gradient_clipping at stage 2": (ds_config(2, gradient_clipping=1.0), "gradient_clipping"),
    "gradient accumulation": (ds_config(gradient_accumulation_steps=2), "gradient_accumulation_steps"),
    "offload_optimizer": (ds_config(zero={"offload_optimizer": {"device": "cpu"}}), "offload_optimizer"),
    "NVMe parameters": (
        ds_config(zero={"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}),
        "offload_param.device",
    ),
    "fp16": (ds_config(fp16={"enabled": True}), "fp16"),
    "autocast": (ds_config(torch_autocast={"enabled": True, "dtype": "bfloat16"}), "torch_autocast"),
    "quantized weights": (ds_config(zero={"zero_quantized_weights": True}), "zero_quantized_weights"),
    "ZenFlow": (ds_config(2, zero={"zenflow": {"topk_ratio": 0.1}}), "zenflow"),
    "DeepCompile": (ds_config(compile={"deepcompile": True}), "deepcompile"),
    "unknown ZeRO setting": (ds_config(zero={"stagee": 3}), "stagee"),
    "batch sizes that contradict each other": (
        ds_config(train_batch_size=7, gradient_accumulation_steps=1),
        "train_batch_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_deepspeed_setting_that_would_spoil_the_run_is_refused_before_a_run_folder_is_made(bad, name, tmp_path):
    ds, word = REFUSED[name]
    (bad / "refused.json").write_text(json.dumps(ds))
    result = run(*command_line([RUN, "engine=deepspeed", "ds_config=BAD/refused.json"], bad), cwd=tmp_path)
    assert_refused(result.status, result.error, [word], tmp_path)


def test_tensor_parallelism_is_refused(bad, tmp_path):
    (bad / "refused.json").write_text(json.dumps(ds_config(tensor_parallel={"autotp_size": 2})))
    settings = command_line([RUN, "engine=deepspeed", "ds_config=BAD/refused.json"], bad)
    result = run(*settings, cwd=tmp_path, ranks=2)
    assert result.statuses == [2, 2]
    assert_refused(result.status, result.error, ["tensor_parallel"], tmp_path)


def test_a_rank_that_no_launcher_ends_says_itself_why_it_stops(bad, tmp_path):
    # Under a launcher the first rank's end is that of all: tests/launch.
    result = run(*command_line([RUN, "data=BAD/truncated.jsonl"], bad), cwd=tmp_path, ranks=2)
    for status, error in zip(result.statuses, result.errors, strict=True):
        assert_refused(status, error, ["line 201"], tmp_path)


def test_a_process_of_its_own_ends_the_same_way(bad, tmp_path):
    words = [sys.executable, "-m", "addax_ds", *command_line([RUN, "data=BAD/truncated.jsonl"], bad)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert_refused(done.returncode, done.stderr, ["line 201"], tmp_path)
    assert done.stdout == ""


def test_the_fixture_itself_is_sound(bad, tmp_path):
    """Else every test here could pass for another reason."""
    settings = yaml.safe_load((bad / "run.yaml").read_text())
    assert settings["task"]["labels"] == {"0": " terrible", "1": " great"}
    run(*command_line([RUN, "steps=1"], bad), cwd=tmp_path).check()
    assert (tmp_path / "out" / "summary.json").exists()
