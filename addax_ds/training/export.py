"""The fine-tuned model as a folder that plain `from_pretrained` loads."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from addax_ds.adapters import files, through_peft
from addax_ds.config import RunConfig, TensorTrainConfig
from addax_ds.core.skeleton import Absent, link_buffers
from addax_ds.digest import digest_over
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError
from addax_ds.training.agreement import from_main


def export(engine: Engine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (safetensors), configuration and tokenizer to `folder`, whole or not at all.

    Persistent buffers are saved too. A collective: parameters are gathered one by one, and rank 0
    keeps and writes them.
    """
    link_buffers(engine.skeleton, engine.model)
    weights = {key: value for key, value in engine.skeleton.state_dict().items() if not isinstance(value, Absent)}
    for name in engine.names:
        whole = engine.whole(name)
        if engine.rank == 0:
            weights[name] = whole.cpu()

    def write() -> None:
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        # The skeleton is the model's own class with its configuration, without an engine's traces.
        skeleton: Any = engine.skeleton
        skeleton.save_pretrained(unfinished, state_dict=weights)
        try:
            tokenizer.save_pretrained(unfinished)
        except Exception as error:
            if type(error) is Exception:  # all that the tokenizers' own language says of a full disk
                raise UserError(f"{unfinished} cannot be written: {error}: mend that and start again") from None
            raise
        shutil.rmtree(folder, ignore_errors=True)  # of this run too, ended before its summary was written
        os.replace(unfinished, folder)

    from_main(engine, write)


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
