"""Whatever is wrong with a file, there is one clear line, and nothing is loaded or written."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from addax_ds.config import load_run
from addax_ds.errors import UserError
from addax_ds.training.checkpoint import _sha256, complete
from addax_ds.training.folder import JOURNAL
from addax_ds.training.models import context_length, load_model, load_tokenizer
from addax_ds.training.replay import audit
from tests.cli.commands import run
from tests.training.dying import Death

Damage = Callable[[Path], None]
NORM = "model.norm.weight"


# -- ways to damage a file ----------------------------------------------------------------------


def cut(share: float) -> Damage:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flip(share: float) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int((len(content) - 1) * share)] ^= 0b00010000
        path.write_bytes(bytes(content))

    return damage


def replace_by(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content) and None


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 16)


def missing(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """A file of tensors that is in order but for its content."""

    def damage(path: Path) -> None:
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        loaded = load_file(path)
        change(loaded)
        save_file({name: tensor.contiguous() for name, tensor in loaded.items()}, path, header.get("__metadata__"))

    return damage


def first_of(loaded: dict[str, torch.Tensor]) -> str:
    return min(loaded)


def manifest(change: Callable[[dict], object], signed: bool = True) -> Damage:
    """A manifest that was changed on purpose, its own digest made to match again."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        if signed:
            content.pop("sha256", None)
            content["sha256"] = _sha256(content)
        path.write_text(json.dumps(content))

    return damage


ANY_FILE: dict[str, Damage] = {
    **{f"cut-{share}": cut(share) for share in (0, 0.001, 0.3, 0.5, 0.99)},
    **{f"flip-{share}": flip(share) for share in (0, 0.01, 0.3, 0.6, 1)},
    "grown": grown,
    "missing": missing,
    "folder": a_folder,
    "text": replace_by(b"not what it was\n"),
    "pickle": replace_by(b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94."),
}
SHARD: dict[str, Damage] = {
    "value": tensors(lambda loaded: loaded[first_of(loaded)].view(-1)[0].add_(1)),
    "swapped": tensors(lambda loaded: loaded[first_of(loaded)].copy_(loaded[first_of(loaded)].flip(0))),
    "infinite": tensors(lambda loaded: loaded[first_of(loaded)].view(-1)[0].fill_(float("inf"))),
    "header length": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]) and None,
}
MANIFEST: dict[str, Damage] = {
    "unsigned": manifest(lambda content: content.update(step=3), signed=False),
    "sha": manifest(lambda content: content.update(sha256="0" * 64), signed=False),
    "digest": manifest(lambda content: content.update(digest="0" * 64)),
    "format": manifest(lambda content: content.update(format=99)),
    "shape": manifest(lambda content: content["parameters"]["model.norm.weight"].__setitem__(0, 7)),
    "type": manifest(lambda content: content["parameters"]["model.norm.weight"].__setitem__(1, "float16")),
    "lost parameter": manifest(lambda content: content["parameters"].pop("model.norm.weight")),
    "outside": manifest(lambda content: content["files"].update({"../../config.yaml": 1})),
    "absolute": manifest(lambda content: content["files"].update({"/etc/passwd": 1})),
    "size": manifest(lambda content: content["files"].update({name: 5 for name in content["files"]})),
    "no files": manifest(lambda content: content.update(files={})),
    "files of another kind": manifest(lambda content: content.update(files=[1, 2])),
    "parameters of another kind": manifest(lambda content: content.update(parameters=3)),
    "no step": manifest(lambda content: content.pop("step")),
    "step of another kind": manifest(lambda content: content.update(step="4")),
    "no run": manifest(lambda content: content.pop("run")),
    "a run without a journal": manifest(lambda content: content.update(run={})),
    "a list": replace_by(b"[1, 2, 3]"),
}

# -- a run that was killed after its checkpoint of step 4 ---------------------------------------


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("killed")
    words = ["train", tiny.run_file, "output=out", "steps=8", "checkpoint_every=4", "save=false"]
    run(*words, cwd=cwd, before=Death("journal", 0, 7))
    assert len(complete(cwd / "out" / "checkpoints")) == 1
    return cwd / "out", words


def resumed(killed, tmp_path, file, damage):
    """What the same command says after the damage to a file of the run."""
    folder, words = killed
    shutil.copytree(folder, tmp_path / "out")
    damage(next((tmp_path / "out").glob(file)))
    return run(*words, cwd=tmp_path)


def is_one_clear_line(result) -> None:
    assert result.status == 2, result.error
    lines = [line for line in result.error.splitlines() if "addax-ds:" in line]
    assert len(lines) == 1 and "Traceback" not in result.error, result.error
    assert ": " in lines[0] and len(lines[0]) < 600


@pytest.mark.parametrize("damage", [*ANY_FILE, *SHARD])
def test_damaged_weights_of_a_checkpoint(killed, tmp_path, damage):
    result = resumed(killed, tmp_path, "checkpoints/step-*/*.safetensors", {**ANY_FILE, **SHARD}[damage])
    is_one_clear_line(result)
    assert "step-000004" in result.error
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("damage", [*ANY_FILE, *MANIFEST])
def test_a_damaged_manifest(killed, tmp_path, damage):
    result = resumed(killed, tmp_path, "checkpoints/step-*/manifest.json", {**ANY_FILE, **MANIFEST}[damage])
    is_one_clear_line(result)
    assert "step-000004" in result.error


ODD_KINDS = {
    f"{name}: {value}": manifest(lambda content, at=at, value=value: content["parameters"][NORM].__setitem__(at, value))
    for at, name in enumerate(("number", "type"))
    for value in ("nope", "nn", 5, "int64", -1, None, [1])
    if (at, value) != (0, 5)
}


@pytest.mark.parametrize("damage", [*ANY_FILE, *MANIFEST, *ODD_KINDS])
def test_a_damaged_manifest_is_one_line_for_an_audit(killed, tmp_path, damage):
    shutil.copytree(killed[0], tmp_path / "out")
    {**ANY_FILE, **MANIFEST, **ODD_KINDS}[damage](next((tmp_path / "out").glob("checkpoints/step-*/manifest.json")))
    if damage == "a run without a journal":  # which an audit does not read
        audit(tmp_path / "out")
        return
    with pytest.raises(UserError) as refused:
        audit(tmp_path / "out")
    assert "\n" not in str(refused.value) and "step" in str(refused.value)


@pytest.mark.parametrize("damage", ANY_FILE)
def test_a_damaged_journal(killed, tmp_path, damage):
    """Damage behind the checkpoint costs nothing: those steps are taken again."""
    result = resumed(killed, tmp_path, JOURNAL, ANY_FILE[damage])
    if result.status == 0:
        assert "going on after step 4" in result.output
        run("replay", "out", cwd=tmp_path).check()
        assert damage in ("cut-0.99", "flip-0.6", "flip-1", "grown", "missing")
    else:
        is_one_clear_line(result)
        assert JOURNAL in result.error


@pytest.mark.parametrize("damage", ["cut-0", "cut-0.3", "flip-0.3", "text", "pickle"])
def test_a_damaged_config_of_the_run(killed, tmp_path, damage):
    is_one_clear_line(resumed(killed, tmp_path, "config.yaml", ANY_FILE[damage]))


# -- what a run begins with ---------------------------------------------------------------------


@pytest.mark.parametrize("damage", [name for name in ANY_FILE if not name.startswith("flip-0.") and name != "flip-1"])
def test_damaged_weights_of_the_model(tiny, tmp_path, damage):
    """Single bits of the weights themselves nobody can know of here: `verify` compares them across ranks."""
    shutil.copytree(tiny.model, tmp_path / "model")
    ANY_FILE[damage](tmp_path / "model" / "model.safetensors")
    is_one_clear_line(run("train", tiny.run_file, f"model={tmp_path / 'model'}", "output=out", cwd=tmp_path))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def with_code(model: Path) -> None:
    """A model that comes with code of its own."""
    config = json.loads((model / "config.json").read_text())
    config.update(model_type="unheard-of", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text("open('executed', 'w')\n")


def with_a_pickle(model: Path) -> None:
    """A model whose weights are a pickle that calls something."""
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Executed()}, model / "pytorch_model.bin")


class Executed:
    def __reduce__(self) -> tuple:
        return open, ("executed", "w")


def with_an_index_that_leads(target: str) -> Damage:
    def damage(model: Path) -> None:
        shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
        names = load_file(model.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target.format(model.parent))}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def with_an_empty_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"")


MODEL: dict[str, Damage] = {
    "empty pickle": with_an_empty_pickle,
    "code": with_code,
    "pickle": with_a_pickle,
    "outside": with_an_index_that_leads("../outside.safetensors"),
    "absolute": with_an_index_that_leads("{}/outside.safetensors"),
    "config of another kind": lambda model: (model / "config.json").write_text("null") and None,
    "adapters": lambda model: (model / "adapter_config.json").write_text('{"peft_type": "LORA"}') and None,
    "index of another kind": lambda model: (model / "model.safetensors.index.json").write_text("[1]") and None,
}


@pytest.mark.parametrize("damage", MODEL)
def test_models_that_want_to_be_executed_or_lead_outside(tiny, tmp_path, damage):
    shutil.copytree(tiny.model, tmp_path / "model")
    MODEL[damage](tmp_path / "model")
    is_one_clear_line(run("train", tiny.run_file, f"model={tmp_path / 'model'}", "output=out", cwd=tmp_path))
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out" / "metrics.jsonl").exists()


def changed(file: str, **values: object) -> Damage:
    def damage(model: Path) -> None:
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


DEEP = "[" * 100_000
ODD: dict[str, Damage] = {
    **{
        f"{file} of {content}": lambda model, file=file, content=content: (model / file).write_text(content) and None
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
        for content in ("[1]", "3", "null")
    },
    "deep index": lambda model: (model / "model.safetensors.index.json").write_text(DEEP) and None,
    "limit that is no number": changed("tokenizer_config.json", model_max_length="x"),
    "tokenizer of another kind": changed("tokenizer_config.json", tokenizer_class="BertTokenizer"),
    "tokenizer without a model": changed("tokenizer.json", model=None),
    **{
        f"{name} {value}": changed("config.json", **{name: value})
        for name, value in (
            ("hidden_size", "abc"),
            ("num_attention_heads", 0),
            ("hidden_act", "nope"),
            ("dtype", "nope"),
            ("pad_token_id", 10**6),
            ("attn_implementation", "flash_attention_2"),
            ("attn_implementation", "someone/kernel"),
            ("_attn_implementation", {"": "someone/kernel"}),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("quantization_config", 3),
        )
    },
}


def test_a_tokenizer_without_special_tokens_pads_with_any(tiny, tmp_path):
    shutil.copytree(tiny.model, tmp_path / "model")
    changed("tokenizer_config.json", pad_token=None, eos_token=None)(tmp_path / "model")
    run("train", tiny.run_file, f"model={tmp_path / 'model'}", "output=out", cwd=tmp_path).check()


@pytest.mark.parametrize("damage", ODD)
def test_an_odd_model_folder_is_one_line_that_names_it(tiny, tmp_path, damage):
    shutil.copytree(tiny.model, tmp_path / "model")
    ODD[damage](tmp_path / "model")
    location = str(tmp_path / "model")
    with pytest.raises(UserError, match=re.escape(f"model {location}")) as refusal:
        load_tokenizer(location)
        context_length(location)
        load_model(location, load_run(str(tiny.run_file), []))
    assert len(str(refusal.value)) < 600
    if "kernel" in damage:
        assert "has attention from someone/kernel: remove that setting" in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", b"{", b"[]\n", b'{"text": 3}\n', b'{"text": "a", "label": 7}\n' * 300, b"\xff\xfe\x00" * 50],
)
def test_damaged_data(tiny, tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    is_one_clear_line(run("train", tiny.run_file, f"data={tmp_path / 'data.jsonl'}", "output=out", cwd=tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"!!python/object/apply:os.system ['touch executed']",
        b"lr: !!python/name:os.system",
        b"- 1\n- 2\n",
        b"lr: [1",
        b"\x00\x01",
        b"a: &a [*a]",
    ],
)
def test_configs_that_want_to_be_executed_or_are_none(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    is_one_clear_line(run("train", "run.yaml", cwd=tmp_path))
    assert not (tmp_path / "executed").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"optimizer": 3}', '{"zero_optimization": {"stage": 9}}', "\x00"])
def test_damaged_ds_configs(tiny, tmp_path, content):
    (tmp_path / "ds.json").write_text(content)
    settings = ["engine=deepspeed", "ds_config=ds.json", "output=out"]
    is_one_clear_line(run("train", tiny.run_file, *settings, cwd=tmp_path))
