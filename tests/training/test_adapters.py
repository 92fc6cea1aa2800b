"""Runs that train adapters: written alone, scored again, resumed, repeated from the journal."""

import dataclasses
import json
import os
import shutil
import statistics

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from addax_ds.adapters import load_adapters, merge
from addax_ds.adapters.files import CONFIG, WEIGHTS
from addax_ds.config import load_run
from addax_ds.errors import UserError
from addax_ds.training.checkpoint import read_manifest
from addax_ds.training.metrics import read_json, read_metrics
from addax_ds.training.models import load_model
from tests.cli.commands import run
from tests.launch.processes import ROOT
from tests.training.dying import Death

KINDS = {
    "lora": ["adapter.kind=lora", "adapter.rank=4"],
    "prefix": ["adapter.kind=prefix", "adapter.tokens=3"],
    "tensor-train": ["adapter.kind=tensor-train", "adapter.bottleneck=8", "adapter.rank=2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_written_and_scored_again(tiny, tmp_path, kind):
    lr = {"lora": 0.05, "prefix": 2, "tensor-train": 0.05}[kind]
    words = ["train", tiny.run_file, *KINDS[kind], "output=out", "steps=60", f"lr={lr}", "alpha=1e-4"]
    run(*words, cwd=tmp_path).check()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["trained"] == kind
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    assert not (tmp_path / "out" / "model").exists()
    weights = load_file(tmp_path / "out" / "adapter" / WEIGHTS)
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())
    again = run("eval", "out", cwd=tmp_path).check()
    assert json.loads(again.output.splitlines()[-1])["accuracy"] == summary["accuracy_after"]


def test_linear_adapters_of_a_run_become_an_ordinary_model(tiny, tmp_path):
    settings = [*KINDS["tensor-train"], "adapter.activation=none", "adapter.bias=false", "lr=0.05"]
    run("train", tiny.run_file, *settings, "output=out", cwd=tmp_path).check()
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        untrained = model(ids).logits
        load_adapters(model, tmp_path / "out" / "adapter")
        trained = model(ids).logits
        merge(model)
    model.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits.detach()
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert (trained - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_peft_loads_what_a_run_has_written(tiny, tmp_path, kind):
    peft = pytest.importorskip("peft")
    run("train", tiny.run_file, *KINDS[kind], "output=out", cwd=tmp_path).check()
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "out" / "adapter"))
    stored, loaded = load_file(tmp_path / "out" / "adapter" / WEIGHTS), peft.get_peft_model_state_dict(wrapped)
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert wrapped(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_adazeta_learns(tiny, tmp_path):
    words = ["train", tiny.run_file, *KINDS["tensor-train"], "method=adazeta", "query_schedule.alpha=2", "lr=0.02"]
    run(*words, "k0=16", "zo_micro_batch=16", "steps=150", "output=out", cwd=tmp_path).check()
    summary, records = read_json(tmp_path / "out" / "summary.json"), read_metrics(tmp_path / "out")
    losses = [statistics.fmean(record["loss_zo"]["plus"] + record["loss_zo"]["minus"]) for record in records]
    assert statistics.fmean(losses[-30:]) < 0.9 * statistics.fmean(losses[:30])
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1


def test_adazeta_by_name_is_its_adapters_and_its_schedule(tiny, tmp_path):
    words = ["train", tiny.run_file, "adapter.bottleneck=8", "adapter.kind=tensor-train", "k0=40", "steps=5"]
    run(*words, "method=adazeta", "query_schedule.alpha=2", "output=named", cwd=tmp_path).check()
    spelt = ["alpha=1", "lt=none", "eps=1e-2", "query_schedule.alpha=2"]
    run(*words, *spelt, "output=spelt", cwd=tmp_path).check()
    named, spelt = (read_json(tmp_path / name / "summary.json") for name in ("named", "spelt"))
    assert named["final_digest"] == spelt["final_digest"] and named["method"] == spelt["method"] == "adazeta"
    # Four steps an epoch: 2 e^0.45 is 0 at first, and at least 1, then 2.
    assert [len(record["g0"]) for record in read_metrics(tmp_path / "named")] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("tensor-train", "float32"), ("tensor-train", "bfloat16"), ("prefix", "float32")]
)
def test_engines_and_worlds_write_the_same_adapters(tiny, tmp_path, kind, dtype):
    method = ["method=mezo", "queries=2"]
    if kind == "tensor-train":  # AdaZeta: two steps an epoch, of 1, 2 and 4 directions
        method = ["method=adazeta", "query_schedule.alpha=2", "query_schedule.beta=1", "k0=80", "zo_micro_batch=20"]
        method += ["steps=6"]
    words = ["train", tiny.run_file, *KINDS[kind], *method, f"dtype={dtype}"]
    engines = {"one": (1, []), "fsdp": (3, ["engine=fsdp"])}
    for path in sorted(ROOT.glob("ds_configs/adazeta_*.json")):
        engines[path.stem] = 2, ["engine=deepspeed", f"ds_config={path}"]
    assert len(engines) == 4
    for name, (ranks, settings) in engines.items():
        run(*words, *settings, f"output={name}", cwd=tmp_path, ranks=ranks).check()
    if kind == "tensor-train":
        assert [len(record["g0"]) for record in read_metrics(tmp_path / "fsdp")] == [1, 1, 2, 2, 4, 4]
    one, *others = (load_file(tmp_path / name / "adapter" / WEIGHTS) for name in engines)
    for other in others:
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    if kind == "tensor-train":
        load_adapters(AutoModelForCausalLM.from_pretrained(tiny.model), tmp_path / "fsdp" / "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_of_adapters_goes_on_and_can_be_repeated(tiny, tmp_path, kind):
    words = ["train", tiny.run_file, *KINDS[kind], "alpha=1", "steps=8", "checkpoint_every=2"]
    if kind == "tensor-train":  # AdaZeta: two steps an epoch
        words += ["query_schedule.alpha=2", "query_schedule.beta=0.5", "k0=40", "zo_micro_batch=20"]
    run(*words, "output=whole", cwd=tmp_path).check()
    kept = read_manifest(tmp_path / "whole" / "checkpoints" / "step-000006").parameters
    trained = read_json(tmp_path / "whole" / "summary.json")["trainable_parameters"]
    assert sum(int(numel) for numel, _ in kept.values()) == trained, "a checkpoint holds the backbone"
    run(*words, "output=killed", cwd=tmp_path, before=Death("journal", 0, 5))
    assert "going on after step" in run(*words, "output=killed", cwd=tmp_path).check().output
    digests = {read_json(tmp_path / name / "summary.json")["final_digest"] for name in ("whole", "killed")}
    assert len(digests) == 1
    replayed = run("replay", "whole", "--start", "0", "--output", "again", cwd=tmp_path).check()
    assert "that of the run" in replayed.output
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("whole/adapter", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapter.kind=lra"], "adapter: kind is lra: give one of tensor-train, lora, prefix"),
        (["adapter.rank=4"], "adapter: kind is None: give one of"),
        (["adapter.kind=lora", "adapter.rnk=4"], "adapter: unknown key rnk, did you mean rank?"),
        (["adapter.kind=lora", "adapter.rank=0"], "adapter: rank is 0: it must be 1 or more"),
        (["adapter.kind=lora", "adapter.modules=[nothing]"], "adapter: Target modules {'nothing'} not found"),
        (
            ["adapter.kind=tensor-train", "adapter.modules=['*.o_prj']"],
            "matches no projection of the model, did you mean",
        ),
        (["adapter.kind=tensor-train", "adapter.hidden_modes=[5,5]"], "modes [5, 5] multiply to 25, and the layer has"),
        (["adapter.kind=tensor-train", "adapter.groups=5"], "groups is 5"),
        (["adapter.kind=tensor-train", "adapter.rank=0"], "adapter: rank is 0: it must be 1 or more"),
        (["adapter.kind=prefix", "adapter.tokens=0"], "adapter: tokens is 0"),
        (["adapter.kind=prefix", "adapter.tokens=60"], "the model takes 4"),
        (["adapter.kind=prefix", "activation_checkpointing=true"], "leave activation_checkpointing out"),
        (["adapter_weights=x"], "adapter_weights without adapter"),
        (["adapter.kind=lora", "adapter_weights=x"], "adapter_config.json: No such file or directory"),
    ],
)
def test_what_does_not_fit_is_one_line(tiny, tmp_path, settings, words):
    ended = run("train", tiny.run_file, *settings, "output=out", cwd=tmp_path)
    assert ended.status == 2, ended.error
    assert words in ended.error and ended.error.strip().count("\n") == 0


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Folders of adapters by their kind, and the settings that they were trained with."""
    folder = tmp_path_factory.mktemp("trained")
    for kind, settings in KINDS.items():
        run("train", tiny.run_file, *settings, f"output={kind}", "steps=2", "lr=0.05", cwd=folder).check()
    return {
        kind: (folder / kind / "adapter", load_run(str(tiny.run_file), settings)) for kind, settings in KINDS.items()
    }


def with_settings(**changes):
    def damage(folder):
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **changes}))

    return damage


def with_tensors(change):
    def damage(folder):
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS, metadata)

    return damage


def a_backbone_of_another(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"backbone_digest": "0" * 32})


ODD = {
    "lora": {
        **{f"r {value}": with_settings(r=value) for value in ("abc", None, 16, [4])},
        **{f"lora_alpha {value}": with_settings(lora_alpha=value) for value in ("x", 1e6)},
        **{f"target_modules {value}": with_settings(target_modules=value) for value in (3, "(((", ["o_proj"], [])},
        **{f"peft_type {value}": with_settings(peft_type=value) for value in ([1], "LOHA", "XLORA", "PREFIX_TUNING")},
        "another scale": with_settings(use_rslora=True),
        "ranks of some layers": with_settings(rank_pattern={"q_proj": 2}),
        "some layers": with_settings(layers_to_transform="x"),
        "code of its own": with_settings(megatron_core="os"),
        "adapters of adapters": with_settings(adapters={"0": "/etc"}),
    },
    "prefix": {
        "tokens": with_settings(num_virtual_tokens=4),
        "projection": with_settings(prefix_projection=True),
    },
}
ODD_TENSORS = {
    "none of them": with_tensors(lambda tensors: {"x": torch.zeros(1)}),
    "a shape": with_tensors(lambda tensors: {name: tensor[:1].contiguous() for name, tensor in tensors.items()}),
    "names": with_tensors(lambda tensors: {f"{name}.x": tensor for name, tensor in tensors.items()}),
    "cut": lambda folder: os.truncate(folder / WEIGHTS, 100),
    "no file": lambda folder: (folder / WEIGHTS).unlink(),
    "text": lambda folder: (folder / WEIGHTS).write_text("adapters") and None,
    "settings that are no JSON": lambda folder: (folder / CONFIG).write_text("{") and None,
    "settings that are a list": lambda folder: (folder / CONFIG).write_text("[]") and None,
}
DAMAGED = [
    *((kind, name, damage) for kind, damages in ODD.items() for name, damage in damages.items()),
    *((kind, name, damage) for kind in KINDS for name, damage in ODD_TENSORS.items()),
    *((kind, "another backbone", a_backbone_of_another) for kind in ("lora", "prefix")),
    ("tensor-train", "another backbone", with_settings(backbone_digest="0" * 32, base_model_name_or_path="a\nb" * 99)),
]


@pytest.mark.parametrize(("kind", "damage"), [pytest.param(k, d, id=f"{k}-{name}") for k, name, d in DAMAGED])
def test_adapters_that_are_damaged_or_others_are_refused_in_one_line(tiny, trained, tmp_path, kind, damage):
    folder, config = trained[kind]
    shutil.copytree(folder, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(UserError) as refused:
        load_model(str(tiny.model), dataclasses.replace(config, adapter_weights=str(tmp_path / "adapter")))
    assert str(tmp_path / "adapter") in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_come_back_as_they_were_onto_their_backbone_alone(tiny, trained, kind):
    folder, config = trained[kind]
    config = dataclasses.replace(config, adapter_weights=str(folder))
    model = load_model(str(tiny.model), config)
    held = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(float(p.detach().sum()) for p in held.values()) == sorted(
        float(tensor.sum()) for tensor in load_file(folder / WEIGHTS).values()
    )
    other = AutoModelForCausalLM.from_pretrained(tiny.model)
    other.model.norm.weight.data[0] += 0.1
    shutil.copytree(tiny.model, folder.parent / "other")  # with its tokenizer
    other.save_pretrained(folder.parent / "other")
    with pytest.raises(UserError, match="they belong to the backbone"):
        load_model(str(folder.parent / "other"), config)
    words = [*KINDS[kind], f"adapter_weights={folder}", f"model={folder.parent / 'other'}"]
    ended = run("train", tiny.run_file, *words, f"output={folder.parent / 'refused'}", cwd=folder.parent)
    assert ended.status == 2 and "they belong to the backbone" in ended.error
    assert len(ended.error.splitlines()) == 1
    assert not (folder.parent / "refused").exists()


def test_adapters_that_are_not_finite_are_not_scored(trained, tmp_path):
    folder, _ = trained["lora"]
    shutil.copytree(folder.parent, tmp_path / "out")
    with_tensors(lambda tensors: {name: tensor.fill_(torch.nan) for name, tensor in tensors.items()})(
        tmp_path / "out" / "adapter"
    )
    ended = run("eval", "out", cwd=tmp_path)
    assert ended.status == 2 and "has weights that are not finite" in ended.error
