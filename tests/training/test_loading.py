"""Weights read straight into shards: the same as those that are loaded whole, without the memory for them."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import addax_ds
from addax_ds.config import LoraConfig, PrefixConfig, RunConfig, TensorTrainConfig
from addax_ds.core.shard import Shard
from addax_ds.digest import weights_digest
from addax_ds.errors import UserError
from addax_ds.training import export, models
from addax_ds.training.loading import fill
from addax_ds.training.models import build_optimizer, load_model, load_tokenizer, open_model
from addax_ds.training.world import World as Ranks
from tests.cli.commands import run
from tests.training.test_export import write_zero3
from tests.world import World

ENGINES = ("fsdp", "zero3")
SIZES = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "vocab_size": 67, "pad_token_id": 0}
WEIGHTS = "model.safetensors"


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **{"intermediate_size": 40, **settings}))


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=32))


def without_head(folder: Path) -> None:
    """The file of a model without a head: its names lack the prefix."""
    opt().model.save_pretrained(folder)
    opt().config.save_pretrained(folder)


def with_tied_twice(folder: Path) -> None:
    """A file with a tied weight under both of its names."""
    llama(tie_word_embeddings=True).save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "tied": lambda folder: llama(tie_word_embeddings=True).save_pretrained(folder),
    "untied": lambda folder: llama(tie_word_embeddings=False).save_pretrained(folder),
    "several files": lambda folder: llama(tie_word_embeddings=False).save_pretrained(folder, max_shard_size="9KB"),
    "opt": lambda folder: opt().save_pretrained(folder),
    "without head": without_head,
    "tied twice": with_tied_twice,
}
WHOLE = {"tied twice"}
"""Those that are loaded whole all the same."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for number, (name, write) in enumerate(FOLDERS.items()):
        made[name] = tmp_path_factory.mktemp("models") / str(number)
        write(made[name])
    return made


def config_for(engine: str, model: Path, folder: Path, **settings: Any) -> RunConfig:
    """A run of this engine."""
    words = dict(word.split("=") for word in (write_zero3(folder) if engine == "zero3" else ["engine=fsdp"]))
    return RunConfig(model=str(model), data="movies", activation_checkpointing=False, **words, **settings)


def ranks() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def weights_and_buffers(config: RunConfig, whole: bool) -> tuple[str, dict[str, torch.Tensor], bool]:
    """Of the model on its engine; and whether it was loaded whole."""
    model, unread = (load_model(config.model, config), {}) if whole else open_model(config.model, config)
    engine = build_optimizer(model, config, ranks(), unread).engine
    return weights_digest(engine), dict(engine.model.named_buffers()), not unread


@pytest.mark.parametrize("world", [2, 3], indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FOLDERS)
def test_weights_read_into_shards_are_those_loaded_whole(world: World, folders, tmp_path, name, engine):
    for dtype in ("float32", "bfloat16"):
        config = config_for(engine, folders[name], tmp_path, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype)
        digest = weights_digest(addax_ds.Addax(model).engine)
        for found, buffers, whole in world.run(weights_and_buffers, config=config, whole=False):
            assert found == digest and whole == (name in WHOLE)
            for path, buffer in model.named_buffers():
                assert torch.equal(buffers[path], buffer) and buffers[path].dtype == buffer.dtype


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("adapter", [LoraConfig(), TensorTrainConfig()], ids=["lora", "tensor-train"])
def test_adapters_beside_weights_in_files_are_drawn_as_beside_whole_ones(
    world: World, folders, tmp_path, engine, adapter
):
    config = config_for(engine, folders["tied"], tmp_path, dtype="bfloat16", adapter=adapter)
    apart = world.run(weights_and_buffers, config=config, whole=False)
    together = world.run(weights_and_buffers, config=config, whole=True)
    assert [digest for digest, _, _ in apart] == [digest for digest, _, _ in together]
    assert not any(whole for _, _, whole in apart)


def with_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def with_quantization(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(settings))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def cut_off(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize("other", [with_pickle, with_quantization])
def test_weights_in_other_forms_are_loaded_whole(folders, tmp_path, other):
    shutil.copytree(folders["untied"], tmp_path / "model")
    other(tmp_path / "model")
    model, unread = open_model(str(tmp_path / "model"), config_for("fsdp", tmp_path / "model", tmp_path))
    assert not unread
    assert torch.equal(model.get_parameter("lm_head.weight"), llama(tie_word_embeddings=False).lm_head.weight)


def test_adapters_that_begin_as_what_the_backbone_computes_have_it_whole(folders, tmp_path):
    config = config_for("fsdp", folders["untied"], tmp_path, adapter=PrefixConfig())
    assert not open_model(config.model, config)[1]


@pytest.mark.parametrize("damage", [without_a_weight, of_another_shape, cut_off])
def test_what_cannot_be_loaded_is_refused_in_the_words_of_loading_it_whole(folders, tmp_path, damage):
    shutil.copytree(folders["untied"], tmp_path / "model")
    damage(tmp_path / "model")
    config = config_for("fsdp", tmp_path / "model", tmp_path)
    with pytest.raises(UserError) as whole:
        load_model(config.model, config)
    with pytest.raises(UserError) as apart:
        open_model(config.model, config)
    assert str(apart.value) == str(whole.value)


def test_a_file_that_goes_bad_before_it_is_read_is_one_line(folders, tmp_path):
    shutil.copytree(folders["untied"], tmp_path / "model")
    config = config_for("fsdp", tmp_path / "model", tmp_path)
    _, unread = open_model(config.model, config)
    cut_off(tmp_path / "model")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read .*: restore it"):
        fill([Shard("lm_head.weight", 67 * 24, 0, torch.empty(67 * 24))], unread)


class BufferedConfig(LlamaConfig):
    model_type = "buffered"


class Buffered(LlamaForCausalLM):
    """A model with a buffer that is saved."""

    config_class = BufferedConfig

    def __init__(self, config: BufferedConfig) -> None:
        super().__init__(config)
        self.register_buffer("offset", torch.zeros(3, 2))


def test_saved_buffers_are_read_and_exported(tiny, tmp_path, monkeypatch):
    AutoConfig.register("buffered", BufferedConfig, exist_ok=True)
    AutoModelForCausalLM.register(BufferedConfig, Buffered, exist_ok=True)
    made = Buffered(BufferedConfig(**SIZES, intermediate_size=40))
    made.offset.copy_(torch.arange(6.0).view(3, 2))
    made.save_pretrained(tmp_path / "model")
    config = config_for("fsdp", tmp_path / "model", tmp_path)
    model, unread = open_model(config.model, config)
    assert unread and torch.equal(model.get_buffer("offset"), made.offset)
    monkeypatch.setattr(export, "FILE_BYTES", 4096)
    export.export(addax_ds.Addax(made).engine, load_tokenizer(str(tiny.model)), tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.offset, made.offset)
    assert weights_digest(addax_ds.Addax(exported).engine) == weights_digest(addax_ds.Addax(made).engine)


def whole_ones_left(config: RunConfig) -> int:
    """Of the parameters that a model had before it was sharded, with memory that was whole then, how many live on."""
    model, unread = open_model(config.model, config)
    before = [weakref.ref(parameter) for parameter in model.parameters()]
    optimizer = build_optimizer(model, config, ranks(), unread)
    gc.collect()
    assert optimizer.engine.model is model and unread
    return sum(parameter() is not None for parameter in before)


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"offload": True},
        {"method": "adamw", "checkpoint_every": 0},
        {"method": "mezo", "adapter": LoraConfig()},
    ],
)
def test_what_was_whole_is_given_up_when_it_is_sharded(world: World, folders, tmp_path, settings):
    config = config_for("fsdp", folders["untied"], tmp_path, **settings)
    assert world.run(whole_ones_left, config=config) == [0, 0]


@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("engine", ["hsdp", "hpz"])
def test_replicas_and_secondary_copies_hold_the_same(world: World, folders, tmp_path, engine):
    config = config_for("fsdp", folders["untied"], tmp_path, replicas=2)
    if engine == "hpz":
        config = config_for("zero3", folders["untied"], tmp_path)
        ds_config = json.loads((tmp_path / "zero3.json").read_text())
        ds_config["zero_optimization"]["zero_hpz_partition_size"] = 2
        (tmp_path / "zero3.json").write_text(json.dumps(ds_config))
    digest = weights_digest(addax_ds.Addax(AutoModelForCausalLM.from_pretrained(folders["untied"])).engine)
    found = world.run(weights_and_buffers, config=config, whole=False)
    assert [(there, whole) for there, _, whole in found] == [(digest, False)] * 4


def whole_on_every_rank() -> None:
    models.may_stay_in_files = lambda *_: False


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["addax", "adamw"])
def test_a_run_ends_with_the_weights_of_one_that_loaded_its_model_whole(tiny, tmp_path, engine, method):
    settings = write_zero3(tmp_path) if engine == "zero3" else ["engine=fsdp"]
    if method == "adamw":
        settings += ["method=adamw", "lr=0.01"]
    digests = []
    for output, before in (("apart", None), ("whole", whole_on_every_rank)):
        run("train", tiny.run_file, f"output={output}", *settings, cwd=tmp_path, ranks=2, before=before).check()
        digests.append(json.loads((tmp_path / output / "summary.json").read_text())["final_digest"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("settings", [["method=addax"], ["method=adamw", "lr=0.01"], ["method=adazeta"]])
def test_a_run_with_shards_on_the_host_ends_with_the_same_weights(tiny, tmp_path, settings):
    digests = []
    for output, offload in (("gpu", "false"), ("host", "true")):
        words = ["engine=fsdp", f"offload={offload}", *settings, f"output={output}"]
        run("train", tiny.run_file, *words, cwd=tmp_path, ranks=2).check()
        digests.append(json.loads((tmp_path / output / "summary.json").read_text())["final_digest"])
    assert digests[0] == digests[1]
