"""Runs of every method: what a name sets, and baselines that take the same steps on every engine."""

import dataclasses
import json
import math
import signal
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from addax_ds import loss
from addax_ds.adapters.files import WEIGHTS
from addax_ds.config import METHODS, LoraConfig, RunConfig, load_run
from addax_ds.data.partition import partition
from addax_ds.errors import UserError
from addax_ds.loss import choice_loss
from addax_ds.training.metrics import read_json, read_metrics
from addax_ds.training.models import load_model
from addax_ds.training.run import prepare_inputs, step_batches, step_samples
from tests.cli.commands import run
from tests.launch.processes import ROOT
from tests.training.dying import Death

ZERO = ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero3.json'}"]
ZERO2 = ["engine=deepspeed", f"ds_config={ROOT / 'ds_configs' / 'zero2.json'}"]
ENGINES = {"replicated": [], "fsdp": ["engine=fsdp"], "zero2": ZERO2, "zero3": ZERO}
RATES = {"sgd": "lr=0.05", "adamw": "lr=3e-3"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_it_means_and_goes_by_its_name(method):
    config = RunConfig(method=method)
    assert config.method_name == method
    if method not in ("sgd", "adamw", "zero-shot"):  # a run without the name is the same
        settings = {name: getattr(config, name) for name in ("alpha", "lt", "adapter", "query_schedule")}
        assert RunConfig(**settings).method_name == method
    assert RunConfig(method="mezo", lt=30).lt == 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "adam"}, "method is adam, did you mean adamw?"),
        ({"method": "mezo", "alpha": 0.5}, "method mezo means alpha: 1.0, and alpha is 0.5"),
        ({"method": "addax-wa", "lt": 30}, "method addax-wa means lt: none, and lt is 30"),
        ({"method": "addax", "alpha": 1}, "method addax takes alpha between 0 and 1, and it is 1.0"),
        ({"method": "addax", "lt": "none"}, "method addax without lt is addax-wa"),
        ({"method": "adamw", "checkpoint_every": 5}, "adamw keeps no checkpoints"),
        ({"method": "adazeta", "adapter": LoraConfig()}, "adazeta trains tensor-train adapters: leave adapter out"),
        ({"method": "adazeta", "queries": 3}, "query_schedule and queries: set one of them"),
        ({"method": "sgd", "momentum": 1}, "momentum is 1"),
        ({"method": "sgd", "max_grad_norm": -1}, "max_grad_norm is -1"),
        ({"method": "adamw", "queries": 2}, "method adamw probes no directions: leave queries, directions"),
        ({"method": "ip-sgd", "directions": "per-micro-batch"}, "method ip-sgd probes no directions"),
        ({"method": "sgd", "query_schedule": {}}, "method sgd probes no directions"),
        ({"method": "adamw", "max_loss": 3.0}, "method adamw skips no steps: leave max_loss out"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_contradicts_a_method_is_refused(settings, words):
    with pytest.raises((UserError, ValueError), match=words):
        RunConfig(**settings)


def test_a_method_on_the_command_line_takes_the_place_of_what_the_file_says(tmp_path):
    (tmp_path / "run.yaml").write_text("{alpha: 0.1, lt: 24, lr: 0.5, steps: 7}")

    def loaded(*overrides):
        config = load_run(str(tmp_path / "run.yaml"), [*overrides])
        return config.alpha, config.lt, config.lr, config.steps

    assert loaded() == (0.1, 24, 0.5, 7)
    assert loaded("method=addax") == (0.1, 24, 0.5, 7)
    assert loaded("method=ip-sgd") == (0, "none", 0.5, 7)
    assert loaded("lt=30", "method=ip-sgd") == loaded("method=ip-sgd", "lt=30") == (0, 30, 0.5, 7)
    assert loaded("method=zero-shot") == (0.1, "none", 0.5, 0)
    with pytest.raises(UserError, match="means alpha"):
        loaded("method=mezo", "alpha=0.5")


def expected_weights(config):
    """What is trained, before and after the run's steps written out with torch (and peft) alone; gradient norms."""
    prepared = prepare_inputs(config)
    pools = partition([example.length for example in prepared.train], config.lt)
    model = load_model(prepared.location, dataclasses.replace(config, dtype="float32")).eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    begun = {name: parameter.detach().clone() for name, parameter in trained.items()}
    if config.method == "sgd":
        optimizer = torch.optim.SGD(trained.values(), config.lr, config.momentum, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay)
    inputs = frozenset(("input_ids", "attention_mask", "position_ids"))
    norms = []
    for step in range(config.steps):
        _, fo = step_batches(config, prepared, step_samples(config, pools, step), inputs, torch.device("cpu"))
        losses = torch.cat([choice_loss(model, batch) for batch in fo])
        losses.mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm or math.inf).item())
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        optimizer.step()
        optimizer.zero_grad()
    return begun, {name: parameter.detach() for name, parameter in trained.items()}, norms


def distance(some, others):
    return math.sqrt(sum((some[name] - weight).square().sum().item() for name, weight in others.items()))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_baselines_take_the_steps_of_torch(tiny, tmp_path, method, engine, ranks):
    words = [f"method={method}", RATES[method], "k1=5", "fo_micro_batch=1", "steps=4", "max_grad_norm=0.5"]
    words += ["weight_decay=0.5", "eval_every=2"]
    run("train", tiny.run_file, *words, *ENGINES[engine], "output=out", cwd=tmp_path, ranks=ranks).check()
    begun, expected, norms = expected_weights(load_run(str(tiny.run_file), words))
    assert max(norms) > 0.5, "nothing was clipped"
    records, summary = read_metrics(tmp_path / "out"), read_json(tmp_path / "out" / "summary.json")
    assert [record["gradient_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    # AdamW divides by the root of squares, which makes whole steps of the rounding of gradients near zero.
    assert distance(written, expected) <= {"sgd": 1e-4, "adamw": 1e-2}[method] * distance(begun, expected)
    assert summary["method"] == method and summary["engine"] == engine
    assert "accuracy" in records[1]
    assert not (tmp_path / "out" / "checkpoints").exists()
    again = run("eval", "out", cwd=tmp_path).check()
    assert f'"accuracy": {summary["accuracy_after"]}' in again.output


def test_what_a_run_has_no_name_for_is_the_ds_configs(tiny, tmp_path):
    """Betas of 0 make steps of sign descent, which the usual ones do not."""
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    own = {"torch_adam": True, "betas": [0.0, 0.0], "lr": 7.0}
    (tmp_path / "ds.json").write_text(json.dumps({**config, "optimizer": {"type": "AdamW", "params": own}}))
    words = ["method=adamw", "lr=0.01", "k1=4", "fo_micro_batch=4", "steps=1", "weight_decay=0", "max_grad_norm=0"]
    words += ["engine=deepspeed", "ds_config=ds.json", "schedule=constant", "output=out"]
    run("train", tiny.run_file, *words, cwd=tmp_path, before=without_compilers).check()
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
        for folder in (tiny.model, tmp_path / "out" / "model")
    )
    moved = (after - before).abs().view(-1)
    assert moved.median().item() == pytest.approx(0.01, rel=1e-3)


def without_compilers() -> None:
    """As on a machine on which DeepSpeed's Adam cannot be built."""
    from addax_ds.engines.ops import ADAM
    from addax_ds.training import models

    def build_op(name: str) -> None:
        if name == ADAM:
            raise RuntimeError("Ninja is required to load C++ extensions")

    models.build_op = build_op


def test_an_adam_that_cannot_be_built_is_one_line(tiny, tmp_path):
    words = ["method=adamw", *ZERO, "output=out"]
    ended = run("train", tiny.run_file, *words, cwd=tmp_path, ranks=2, before=without_compilers)
    assert ended.status == 2 and all(ended.statuses)
    assert "DeepSpeed's FusedAdam cannot be built (Ninja is required" in ended.error
    assert "Traceback" not in ended.error


@pytest.mark.parametrize("method", ["method=adamw lr=1e-3 steps=6", "method=sgd momentum=0 lr=0.08 steps=16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_in_bfloat16_baselines_keep_float32_weights(tiny, tmp_path, engine, method):
    """Small steps of a weight of 1 are lost in bfloat16 one by one (SGD's move 3 % of them), and add up beside it."""
    words = [*method.split(), "k1=4", "dtype=bfloat16", "schedule=constant"]
    run("train", tiny.run_file, *words, *ENGINES[engine], "output=out", cwd=tmp_path, ranks=2).check()
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
        for folder in (tiny.model, tmp_path / "out" / "model")
    )
    assert (before == 1).all() and (after != 1).float().mean() > 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_lora_with_adamw_takes_the_steps_of_torch_and_peft(tiny, tmp_path, engine, dtype):
    words = ["method=adamw", "lr=0.02", "k1=5", "fo_micro_batch=1", "steps=4", "max_grad_norm=0.5"]
    words += ["adapter.kind=lora", "adapter.rank=4", f"dtype={dtype}"]
    run("train", tiny.run_file, *words, *ENGINES[engine], "output=out", cwd=tmp_path, ranks=2).check()
    begun, expected, norms = expected_weights(load_run(str(tiny.run_file), words))
    assert max(norms) > 0.5, "nothing was clipped"
    written = load_file(tmp_path / "out" / "adapter" / WEIGHTS)
    expected = {name.replace(".default", ""): weight for name, weight in expected.items()}
    assert written.keys() == expected.keys()
    begun = {name.replace(".default", ""): weight for name, weight in begun.items()}
    # In bfloat16 forwards and backwards round; the steps are those of float32 weights all the same.
    near = {"float32": 1e-2, "bfloat16": 0.2}[dtype]
    assert distance(written, expected) <= near * distance(begun, expected)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
@pytest.mark.parametrize(
    "adapter", [["adapter.kind=lora", "adapter.rank=4"], ["adapter.kind=tensor-train", "adapter.bottleneck=8"]]
)
def test_adamw_trains_adapters(tiny, tmp_path, engine, adapter):
    words = ["method=adamw", "lr=0.02", "steps=40", "k1=8", "fo_micro_batch=4", *adapter]
    run("train", tiny.run_file, *words, *ENGINES[engine], "output=out", cwd=tmp_path, ranks=2).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    assert (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_trained_in_bfloat16_is_scored_in_it_by_the_run_and_again(tiny, tmp_path, engine):
    words = ["method=adamw", "lr=3e-3", "dtype=bfloat16", "steps=2", *ENGINES[engine], "output=out"]
    for command in (["train", tiny.run_file, *words], ["eval", "out"]):
        told = run(*command, cwd=tmp_path, before=TellsDtypes()).check().error
        assert "logits in torch.bfloat16" in told and "logits in torch.float32" not in told


@dataclass(frozen=True)
class TellsDtypes:
    """What logits are computed in."""

    def __call__(self) -> None:
        logits_at = loss._logits_at

        def told(*arguments):
            logits = logits_at(*arguments)
            print(f"logits in {logits.dtype}", file=sys.stderr)
            return logits

        loss._logits_at = told


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_shot_measures_and_trains_nothing(tiny, tmp_path, engine):
    run("train", tiny.run_file, "method=zero-shot", *ENGINES[engine], "output=out", cwd=tmp_path, ranks=2).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["method"] == "zero-shot" and summary["steps"] == 0
    assert summary["accuracy_before"] == summary["accuracy_after"] > 0
    assert summary["trainable_parameters"] == 0


def test_a_loss_that_is_not_finite_ends_a_baseline(tiny, tmp_path):
    words = ["method=sgd", "lr=1e30", "max_grad_norm=0", "steps=4", "output=out"]
    spoilt = run("train", tiny.run_file, *words, cwd=tmp_path, ranks=2)
    assert spoilt.statuses == [2, 2] and "lower lr, or look at the data" in spoilt.error


def test_a_baseline_that_was_killed_starts_anew(tiny, tmp_path):
    words = ["train", tiny.run_file, "method=adamw", "lr=3e-3", "steps=6", "eval_every=2", "save=false"]
    run(*words, "output=whole", cwd=tmp_path).check()
    killed = run(*words, "output=out", cwd=tmp_path, before=Death("evaluation", 0, 2))
    assert killed.status == -signal.SIGKILL and len(read_metrics(tmp_path / "out")) == 3
    asked = run(*words, "output=out", cwd=tmp_path, before=Death("evaluation", 0, 1, signal.SIGTERM))
    assert asked.status == 143 and "after step 2: adamw keeps no checkpoints" in asked.error
    assert "the run starts anew" in run(*words, "output=out", cwd=tmp_path).check().output
    assert [record["step"] for record in read_metrics(tmp_path / "out")] == [*range(1, 7)]
    digests = {read_json(tmp_path / name / "summary.json")["final_digest"] for name in ("whole", "out")}
    assert len(digests) == 1


def test_a_baseline_has_nothing_to_replay(tiny, tmp_path):
    run("train", tiny.run_file, "method=sgd", "steps=2", "save=false", "output=out", cwd=tmp_path).check()
    refused = run("replay", "out", cwd=tmp_path)
    assert refused.status == 2 and refused.error.count("addax-ds:") == 1 and "Traceback" not in refused.error
