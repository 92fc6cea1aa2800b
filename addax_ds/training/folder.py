"""The run folder: what it is named, whose it is, and whether a run in it can go on."""

import dataclasses
import datetime
import fcntl
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from addax_ds.config import RunConfig, load_run
from addax_ds.data.partition import Partition
from addax_ds.errors import UserError
from addax_ds.training.metrics import METRICS, Summary, check_kind, read_json, write_json, write_whole
from addax_ds.training.world import World

CONFIG = "config.yaml"
SUMMARY = "summary.json"
JOURNAL = "journal.jsonl"
CHECKPOINTS = "checkpoints"
LENGTHS = "lengths.json"

# Settings that a resumed run may change: none of them moves a weight by more than another engine does.
_FREE = {
    "output",
    "engine",
    "ds_config",
    "replicas",
    "offload",
    "perturb",
    "activation_checkpointing",
    "eval_every",
    "eval_micro_batch",
    "checkpoint_every",
    "checkpoints_kept",
    "max_skipped",
    "timeout_minutes",
    "save",
}


def finished(config: RunConfig, pools: Partition) -> dict[str, Any] | None:
    """The summary of a run that was complete when it was started again: nothing is left to do.

    Raises `UserError` where the folder holds a run of other settings, or one without the model asked for.
    """
    if config.output is None:
        return None
    folder = Path(config.output)
    if not os.path.exists(folder / SUMMARY):  # False, too, for a name that no file can have
        return None
    _check_settings(config, pools, folder)
    summary = read_json(folder / SUMMARY)
    check_kind(summary, Summary, str(folder / SUMMARY))
    if summary["steps"] != config.steps:
        return None
    trained = "model" if config.adapter is None else "adapter"
    if config.save and not (folder / trained).exists():
        raise UserError(f"output {config.output} holds a finished run without its {trained}: choose another folder")
    return {**summary, "folder": config.output}


def can_resume(config: RunConfig, pools: Partition) -> bool:
    """Whether `config.output` holds an unfinished run of these settings.

    Raises `UserError` where it holds anything else of a run.
    """
    if config.output is None:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
            raise UserError("--max-restarts needs a run folder to come back to: set output=FOLDER")
        return False
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {config.output} is a file: choose another folder")
    if (folder / SUMMARY).exists():
        raise UserError(f"output {config.output} holds a finished run already: choose another folder or remove it")
    if not (folder / CONFIG).exists():
        for name in (METRICS, JOURNAL, CHECKPOINTS, "model"):
            if (folder / name).exists():
                raise UserError(f"output {config.output} holds {name} of another run: choose another folder")
        return False
    _check_settings(config, pools, folder)
    return True


def _check_settings(config: RunConfig, pools: Partition, folder: Path) -> None:
    """Raises `UserError` where the run in a folder has other settings than this one."""
    before = dataclasses.asdict(load_run(str(folder / CONFIG), []))
    now = dataclasses.asdict(_resolved(config, pools, folder))
    free = _FREE | ({"steps"} if config.schedule == "constant" else set())
    for name in before:
        if name not in free and before[name] != now[name]:
            raise UserError(
                f"output {config.output} holds a run with {name} {before[name]}, and this one has "
                f"{now[name]}: go on with {before[name]}, or choose another folder"
            )


def open_folder(config: RunConfig, pools: Partition, world: World) -> Path:
    """Make the run folder and write what is known of the run before its first step (a collective)."""
    outcome = [datetime.datetime.now().strftime("%Y%m%d-%H%M%S"), ""]
    if world.is_main:
        folder = Path(config.output or f"runs/{outcome[0]}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
            _describe(config, pools, folder)
        except OSError as error:
            outcome[1] = f"output {folder}: {error.strerror}: choose another folder"
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise UserError(outcome[1])
    return Path(config.output or f"runs/{outcome[0]}")


def _lock(folder: Path) -> None:
    """Keep a second run out for as long as this process lives."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"output {folder} is being written by another process: wait for it, or end it") from None
    except OSError:
        os.close(handle)  # a file system without locks


def _describe(config: RunConfig, pools: Partition, folder: Path) -> None:
    write_json(
        folder / LENGTHS,
        {"lengths": list(pools.lengths), "lt": pools.lt, "zo": len(pools.zo), "fo": len(pools.fo)},
    )
    text = yaml.safe_dump(dataclasses.asdict(_resolved(config, pools, folder)), sort_keys=False, allow_unicode=True)
    comments = "".join(f"# {name} {version}\n" for name, version in versions().items())
    write_whole(folder / CONFIG, (comments + text).encode())


def _resolved(config: RunConfig, pools: Partition, folder: Path) -> RunConfig:
    return dataclasses.replace(config, output=str(folder), lt=pools.lt if pools.lt is not None else "none")


def versions() -> dict[str, str]:
    """Of everything that numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in ("addax-ds", "torch", "transformers", "deepspeed", "datasets", "numba"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
