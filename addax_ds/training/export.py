"""The fine-tuned model as a folder that plain `from_pretrained` loads."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from addax_ds.adapters import files, through_peft
from addax_ds.config import RunConfig, TensorTrainConfig
from addax_ds.core.skeleton import Absent, link_buffers
from addax_ds.digest import digest_over
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError
from addax_ds.training.agreement import from_main
from addax_ds.training.metrics import write_json

FILE_BYTES = 4 * 2**30
"""Most weights of a file, but for a single one that is larger."""


def export(engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to `folder`, whole or not at all.

    Persistent buffers are saved too. A collective: parameters are gathered one by one, and rank 0
    keeps and writes a file's worth of them at a time, with an index where there are several.
    """
    link_buffers(engine.skeleton, engine.model)
    weights = {key: value for key, value in engine.skeleton.state_dict().items() if not isinstance(value, Absent)}
    unfinished = folder.with_name(folder.name + ".tmp")
    from_main(engine, lambda: shutil.rmtree(unfinished, ignore_errors=True))
    files = _files(engine)
    for number, names in enumerate(files):
        for name in names:
            whole = engine.whole(name)
            if engine.rank == 0:
                weights[name] = whole.cpu()
            del whole
        from_main(engine, partial(_write_file, engine.skeleton, weights, unfinished, number, len(files)))
        weights = {}

    def finish() -> None:
        if len(files) > 1:
            _write_index(unfinished, sum(_bytes(engine, name) for name in engine.names))
        try:
            tokenizer.save_pretrained(unfinished)
        except Exception as error:
            if type(error) is Exception:  # all that the tokenizers' own language says of a full disk
                raise UserError(f"{unfinished} cannot be written: {error}: mend that and start again") from None
            raise
        shutil.rmtree(folder, ignore_errors=True)  # of this run too, ended before its summary was written
        os.replace(unfinished, folder)

    from_main(engine, finish)


def _files(engine: Engine) -> list[list[str]]:
    """Names of the parameters of each file."""
    if getattr(engine.skeleton, "_weight_conversions", None):
        return [engine.names]  # transformers makes the stored tensors out of several parameters
    files: list[list[str]] = [[]]
    left = FILE_BYTES
    for name in engine.names:
        size = _bytes(engine, name)
        if size > left and files[-1]:
            files.append([])
            left = FILE_BYTES
        files[-1].append(name)
        left -= size
    return files


def _bytes(engine: Engine, name: str) -> int:
    """Of the whole parameter."""
    return engine.shape(name).numel() * engine.shard(name).local.element_size()


def _write_file(skeleton: Any, weights: dict[str, torch.Tensor], folder: Path, number: int, files: int) -> None:
    """Write these weights as file `number` (from 0) of a folder, with the model's configuration."""
    # The skeleton is the model's own class with its configuration, without an engine's traces.
    skeleton.save_pretrained(folder, state_dict=weights)
    if files > 1:  # by a name that the next call does not take for an older model's, which it removes
        (folder / SAFE_WEIGHTS_NAME).rename(folder / f".model-{number + 1:05d}-of-{files:05d}.safetensors")


def _write_index(folder: Path, size: int) -> None:
    """Give the files of a folder their names, and write which tensor lies in which; size: of all, in bytes."""
    places: dict[str, str] = {}
    for path in sorted(folder.glob(".model-*.safetensors")):
        named = path.rename(path.with_name(path.name.removeprefix(".")))
        with safe_open(named, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), named.name))
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": places})


def export_adapter(engine: Engine, config: RunConfig, folder: Path) -> None:
    """Write the run's adapters alone to `folder`, whole or not at all (a collective)."""
    weights = {name: engine.whole(name).cpu() for name in engine.names if engine.trainable(name)}
    own = isinstance(config.adapter, TensorTrainConfig)
    backbone = (files if own else through_peft).backbone(engine.skeleton, engine.shards())
    digest = digest_over(engine, list(backbone))

    def write() -> None:
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(config.adapter, TensorTrainConfig):
            files.write_adapters(unfinished, config.adapter, weights, config.model, digest)
        else:
            through_peft.write(unfinished, engine.skeleton, weights, config.model, digest)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)

    from_main(engine, write)
