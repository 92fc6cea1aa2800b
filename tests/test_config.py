"""Settings out of range and unknown keys are one line that says what to do."""

import dataclasses

import pytest
import torch

from addax_ds import Addax
from addax_ds.config import AddaxConfig, LoraConfig, RunConfig, build, load_run, parse_value, values_of
from addax_ds.errors import UserError


def message(call) -> str:
    with pytest.raises(UserError) as refused:
        call()
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 1.5}, "alpha is 1.5: it must lie in [0, 1]"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"eps": 0}, "eps is 0.0: it must be above 0"),
        ({"eps": -1e-3}, "eps is -0.001"),
        ({"lr": -1}, "lr is -1.0: it must be 0 or more"),
        ({"queries": 0}, "queries is 0"),
        ({"weight_decay": -1}, "weight_decay is -1.0"),
        ({"zo_micro_batch": 0}, "zo_micro_batch is 0"),
        ({"fo_micro_batch": -2}, "fo_micro_batch is -2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**53}, "seed is 9007199254740992"),
        ({"distribution": "gaussian"}, "distribution is 'gaussian'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"lr": "fast"}, "lr is 'fast'"),
    ],
)
def test_values_out_of_range_are_named(values, words):
    assert words in message(lambda: build(AddaxConfig, values, "here"))
    assert words in message(lambda: Addax(torch.nn.Linear(2, 2), **values))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("aplha", "alpha"),
        ("epsilon", "eps"),
        ("query", "queries"),
        ("weight_decy", "weight_decay"),
        ("zo_batch", "zo_micro_batch"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    assert f"unknown key {key}, did you mean {nearest}?" in message(lambda: build(AddaxConfig, {key: 1}, "here"))


def test_a_key_like_no_other_lists_what_is_known():
    assert "known: lr, alpha, eps" in message(lambda: build(AddaxConfig, {"zzzz": 1}, "here"))


def test_bounds_themselves_are_allowed_and_settings_are_frozen():
    config = AddaxConfig(alpha=1, lr=0, seed=2**53 - 1)
    assert AddaxConfig(alpha=0).alpha == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5


def test_a_run_file_with_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("alpha: 1e-2\nsteps: 7\nengine: fsdp\n")
    run = load_run(str(path), ["steps=9", "lr=1e-4", "lt=none"])
    assert (run.alpha, run.steps, run.lr, run.lt, run.engine) == (1e-2, 9, 1e-4, "none", "fsdp")


@pytest.mark.parametrize(
    ("content", "overrides", "words"),
    [
        (None, [], "give the path of a run file"),
        ("a: [", [], "not YAML"),
        ("- 1", [], "a run file is a mapping"),
        ("alpha: 3", [], "alpha is 3.0"),
        ("stepz: 3", [], "unknown key stepz, did you mean steps?"),
        ("", ["steps"], "overrides are written key=value"),
        ("", ["steps=0"], "steps is 0"),
        ("", ["k0=0"], "k0 is 0"),
        ("", ["lt=-3"], "lt is -3"),
        ("", ["engine=deepspeed"], "ds_config"),
        ("", ["replicas=2"], "replicas above 1 needs engine: fsdp"),
        ("", ["offload=true"], "offload needs engine: fsdp; DeepSpeed's is offload_param in ds_config"),
        ("", ["task.prompt=x"], "a task needs label with labels or choices, or completion"),
        ("", ["task.promt=x"], "unknown key promt, did you mean prompt?"),
        ("", ["steps.x=1"], "steps"),
    ],
)
def test_a_bad_run_file_is_one_line(tmp_path, content, overrides, words):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    assert words in message(lambda: load_run(str(path), overrides))


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3", 3), ("null", None), ("true", True), ("a b", "a b")])
def test_yaml_scalars_read_as_people_mean_them(text, value):
    assert parse_value(text) == value


def test_adapters_have_a_perturbation_of_their_own():
    assert RunConfig().eps == RunConfig(method="mezo").eps == 1e-3 and RunConfig(method="adazeta").eps == 1e-2
    assert RunConfig(adapter=LoraConfig()).eps == 1e-2 and RunConfig(adapter=LoraConfig(), eps=1e-3).eps == 1e-3
    assert build(RunConfig, {"method": "mezo", "adapter": {"kind": "prefix"}}, "test").eps == 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data": "rte", "dev_samples": 0, "eval_samples": 500},
        {"data": "sst2:train", "train_samples": 1000},
        {"adapter": {"kind": "lora"}, "eps": 1e-3},
        {"method": "adazeta", "query_schedule": {"alpha": 2}},
        {"method": "mezo", "lt": "auto"},
        {"method": "adamw", "schedule": "constant", "alpha": 0},
        {"method": "zero-shot", "save": True},
    ],
)
def test_settings_that_are_not_usual_make_the_same_run_again(settings):
    config = build(RunConfig, settings, "test")
    assert build(RunConfig, values_of(config), "again") == config


def test_every_setting_has_a_default_and_a_description():
    for cls in (AddaxConfig, RunConfig):
        assert cls() is not None
