"""What a rank holds of a model in its host's memory: its shard, a parameter in loading, a file in exports and saves."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from addax_ds.config import RunConfig
from addax_ds.engines.base import Engine
from addax_ds.training import checkpoint, export
from addax_ds.training.checkpoint import Checkpoints
from addax_ds.training.memory import read_peak, reset_peak, resident
from addax_ds.training.models import build_optimizer, load_model, open_model
from tests.training.test_loading import ENGINES, config_for, ranks
from tests.world import World

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="resident peaks are Linux's"
)
LARGE = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
SMALL = {**LARGE, "num_hidden_layers": 1}
M_MMAP_THRESHOLD = -3  # of malloc.h
KEPT = 8 * 2**20
"""Bytes for what is kept of one load to the next, such as the memory of collectives."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of 104 MiB in float32, and one that is loaded before it, for what is imported then."""
    made = {}
    for name, sizes in (("large", LARGE), ("small", SMALL)):
        made[name] = tmp_path_factory.mktemp(name)
        config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False, pad_token_id=0)
        LlamaForCausalLM(config).save_pretrained(made[name])
    return made


@pytest.fixture
def world() -> Iterator[World]:
    """Two ranks that have held nothing before."""
    world = World(2)
    yield world
    world.close()


def built(config: RunConfig, whole: bool) -> Engine:
    model, unread = (load_model(config.model, config), {}) if whole else open_model(config.model, config)
    return build_optimizer(model, config, ranks(), unread).engine


def growth_in(action: Callable[[], object]) -> int:
    """Bytes at most beyond those before, of which malloc keeps nothing that is freed."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    reset_peak()
    before = resident()
    action()
    return read_peak() - before


def growth_in_loading(config: RunConfig, first: RunConfig, whole: bool) -> int:
    held = [built(first, whole)]
    return growth_in(lambda: held.append(built(config, whole)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_holds_its_shard_and_a_parameter_while_it_loads(world: World, folders, tmp_path, engine, dtype):
    configs = {name: config_for(engine, folder, tmp_path, dtype=dtype) for name, folder in folders.items()}
    sizes = [p.nbytes for p in LlamaForCausalLM.from_pretrained(folders["large"]).parameters()]
    shard = sum(sizes) // 2 if dtype == "float32" else sum(sizes) // 4
    most = shard + max(sizes) + KEPT
    settings = {"config": configs["large"], "first": configs["small"]}
    apart = world.run(growth_in_loading, **settings, whole=False)
    assert shard - KEPT < min(apart) and max(apart) < most  # what is kept of one load may serve the next
    assert min(world.run(growth_in_loading, **settings, whole=True)) > most


def growth_in_export(config: RunConfig, first: RunConfig, folder: Path, bytes_of_file: int) -> int:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    export.export(built(first, False), tokenizer, folder / "small")
    export.FILE_BYTES = bytes_of_file
    engine = built(config, False)
    return growth_in(lambda: export.export(engine, tokenizer, folder / "large"))


@pytest.mark.parametrize("engine", ENGINES)
def test_rank_0_holds_a_file_while_it_exports_and_others_a_parameter(world: World, folders, tmp_path, engine):
    configs = {name: config_for(engine, folder, tmp_path) for name, folder in folders.items()}
    sizes = [p.nbytes for p in LlamaForCausalLM.from_pretrained(folders["large"]).parameters()]
    settings = {"config": configs["large"], "first": configs["small"], "folder": tmp_path}
    several = world.run(growth_in_export, **settings, bytes_of_file=2 * max(sizes))
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 5
    assert max(several) < sum(sizes) / 2
    main, other = world.run(growth_in_export, **settings, bytes_of_file=2 * sum(sizes))
    assert (tmp_path / "large" / "model.safetensors").exists()
    assert main > sum(sizes) / 1.1 and other < sum(sizes) / 2


def growth_in_save(config: RunConfig, first: RunConfig, folder: Path, bytes_of_file: int) -> int:
    def save(engine: Engine, name: str) -> None:
        saved = Checkpoints(folder / name, engine, keep=1)
        saved.save(1, {})
        saved.wait()

    save(built(first, False), "small")
    checkpoint.FILE_BYTES = bytes_of_file
    engine = built(config, False)
    return growth_in(lambda: save(engine, "large"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_holds_its_shards_and_a_file_while_it_saves(world: World, folders, tmp_path, engine):
    configs = {name: config_for(engine, folder, tmp_path) for name, folder in folders.items()}
    sizes = [p.nbytes for p in LlamaForCausalLM.from_pretrained(folders["large"]).parameters()]
    shard = sum(sizes) // 2
    settings = {"config": configs["large"], "first": configs["small"]}
    several = world.run(growth_in_save, **settings, folder=tmp_path / "several", bytes_of_file=max(sizes))
    assert len(list((tmp_path / "several" / "large" / "step-000001").glob("*.safetensors"))) > 4
    assert max(several) < shard + 3 * max(sizes) + KEPT
    one = world.run(growth_in_save, **settings, folder=tmp_path / "one", bytes_of_file=2 * sum(sizes))
    assert min(one) > 2 * shard - KEPT
