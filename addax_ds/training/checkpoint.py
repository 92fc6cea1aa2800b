"""Checkpoints: every trained parameter as flat ranges, saved on any engine and world size, loaded on any other.

torch.distributed.checkpoint plans, writes and reads; the files are safetensors and JSON, of which
nothing is ever executed. A checkpoint is a folder that gets its name when it is complete:

    checkpoints/step-000020/      shard-*.safetensors, manifest.json
    checkpoints/latest            names the one that was completed last, for scripts
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from addax_ds.core.shard import Shard
from addax_ds.digest import digest_of, digest_over, weights_digest
from addax_ds.engines.base import Engine
from addax_ds.errors import UserError, of_another_rank
from addax_ds.training.agreement import agree, from_main
from addax_ds.training.finite import not_finite
from addax_ds.training.metrics import sync_folder, write_json, write_whole

# Said of every save and load in a process that is no rank of several.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

FORMAT = 2
MANIFEST = "manifest.json"
LATEST = "latest"
FILE_BYTES = 2**30
"""Of a file, of which a rank writes one after the other: each is put together in memory before."""
_COMPLETE = re.compile(r"step-(\d{6,})")
_KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights that are trained
# Names of folders that are being written or removed: never read.
_UNFINISHED = (".partial", ".removed")


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Manifest:
    """What a checkpoint holds."""

    step: int
    """Steps that its weights have taken."""
    digest: str
    """Of all weights, with those that are not trained."""
    stored: str
    """Of those that it holds."""
    parameters: dict[str, list[int | str]]
    """Elements and type of each."""
    files: dict[str, int]
    """Bytes of each."""
    run: dict[str, Any]
    """What the run wanted to find again."""


class FlatRange(torch.Tensor):
    """A shard as torch.distributed.checkpoint asks for it: a tensor of which this rank holds one range.

    It has the size of the flattened parameter and the planner's protocol, and nothing else of a tensor.
    """

    _shard: Shard

    @staticmethod
    def __new__(cls, shard: Shard) -> "FlatRange":
        whole = torch.Tensor._make_wrapper_subclass(cls, (shard.numel,), dtype=shard.local.dtype)
        whole._shard = shard
        return whole

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function}: a flat range is saved and loaded, nothing else")

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._shard.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        start, local = self._shard.start, self._shard.local
        return [ChunkStorageMetadata(torch.Size([start]), local.shape)] if local.numel() else []

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        return self._shard.local


class UnusableError(UserError):
    """A checkpoint that is damaged, or of something else: whoever reads it again will find the same."""


class _Writing:
    """Work in a thread of its own, which does not keep the process alive where a rank is lost meanwhile."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread's is GPU 0, on which torch would make a context
            work()
        except BaseException as error:  # CheckpointException is no Exception
            self._error = error

    def result(self) -> None:
        """Wait for the end; raises what the work has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Checkpoints:
    """The checkpoints of one run, in one folder that every rank sees. All methods are collectives.

    keep: how many of the newest remain. timeout: how long a rank waits for another in a save or a load;
    torch's 30 minutes where it is not given.
    """

    def __init__(self, folder: Path, engine: Engine, keep: int, timeout: timedelta | None = None) -> None:
        self.folder, self._engine, self._keep = folder, engine, keep
        self._writing: _Writing | None = None
        # The thread's collectives run beside those of the next step.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if engine.world_size > 1 else None

    def tidy(self) -> None:
        """Make the folder, and remove what was left unfinished in it.

        Raises `UserError` where it cannot be written.
        """

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():
                if left.suffix in _UNFINISHED:
                    shutil.rmtree(left)

        from_main(self._engine, work)

    # -- saving ---------------------------------------------------------------------------------

    def save(self, step: int, run: dict[str, Any], prune: bool = True) -> str | None:
        """Copy this rank's trained shards and write them in the background, with `run` of rank 0 beside them (JSON).

        prune: remove all but the newest `keep` once it is complete.
        Returns the digest of the weights, when the copies are made and weights may be written again;
        None, and saves nothing, where a weight is not finite. Raises what the previous save has met.
        """
        self.wait()
        trained = self._trained()
        if not_finite(self._engine, trained):
            return None
        mine = self._engine.is_primary_copy()
        staged = {}
        for shard in trained:
            # Further replicas hold the same and write nothing.
            local = shard.local.detach() if mine else shard.local[:0]
            copy = torch.empty(local.shape, dtype=local.dtype).copy_(local)
            staged[shard.name] = Shard(shard.name, shard.numel, shard.start, copy)
        stored = digest_over(self._engine, [*staged.values()])
        digest = stored if len(staged) == len(self._engine.names) else weights_digest(self._engine)
        self._writing = _Writing(lambda: self._write(step, staged, (digest, stored), run, prune))
        return digest

    def _trained(self) -> list[Shard]:
        """A frozen backbone comes from the model itself, which is looked at by its digest."""
        return [shard for shard in self._engine.shards() if self._engine.trainable(shard.name)]

    def wait(self) -> None:
        """Return when the save under way is complete; raises `UserError` on every rank where one failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        error = ""
        try:
            writing.result()
        except (OSError, CheckpointException, SafetensorError, UserError) as failure:
            error = cause_of(failure)
        agree(
            self._engine,
            error
            and f"a checkpoint could not be written to {self.folder}: {error}: "
            "mend that and start the same command again, which goes on from the checkpoint before",
        )

    def _write(
        self, step: int, staged: dict[str, Shard], digests: tuple[str, str], run: dict[str, Any], prune: bool
    ) -> None:
        final = self.folder / f"step-{step:06d}"
        partial = final.with_suffix(".partial")
        state: dict[str, Any] = {name: FlatRange(shard) for name, shard in staged.items()}
        files = _files_of(staged.values())
        writer = HuggingFaceStorageWriter(str(partial), files, save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        if self._engine.rank != 0:
            return
        parameters = {name: _kind(shard) for name, shard in staged.items()}
        check_complete(HuggingFaceStorageReader(str(partial)).read_metadata(), parameters, partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        manifest = {"format": FORMAT, **asdict(Manifest(step, *digests, parameters, sizes, run))}
        write_json(partial / MANIFEST, {**manifest, "sha256": _sha256(manifest)})
        sync_folder(partial)
        os.replace(partial, final)
        sync_folder(self.folder)
        self._name_latest()
        for old in complete(self.folder)[self._keep :] if prune else []:
            _remove(old)

    def _name_latest(self) -> None:
        newest, *_ = complete(self.folder)
        write_whole(self.folder / LATEST, f"{newest.name}\n".encode())

    # -- loading --------------------------------------------------------------------------------

    def load_newest(self, check: Callable[[Manifest], None] = lambda _: None) -> tuple[Manifest | None, list[str]]:
        """Load the newest checkpoint that is whole; its manifest, and what is wrong with newer ones.

        check: raises `UnusableError` for one that cannot be used; the same on every rank. Newer ones are
        set aside as step-....damaged, so that what the run saves from here on is the newest again.
        None without any checkpoint. Raises `UserError` where there are some and none can be loaded, and
        where one cannot be read now but may be another time.
        """
        found = from_main(self._engine, lambda: [str(path) for path in complete(self.folder)])
        complaints: list[str] = []
        for path in map(Path, found):
            try:
                manifest = self.load(path)
                check(manifest)
            except UnusableError as error:
                complaints.append(str(error))
                continue
            from_main(self._engine, lambda: self._set_aside(found[: len(complaints)]))
            return manifest, complaints
        if complaints:
            raise UserError(
                f"{complaints[0]}; no older one can be used: mend that, or remove {self.folder} to start again"
            )
        return None, []

    def _set_aside(self, paths: list[str]) -> None:
        """Keep checkpoints that cannot be used for people to look at, in place of earlier such ones."""
        for path in map(Path, paths):
            aside = path.with_suffix(".damaged")
            if aside.is_dir():
                shutil.rmtree(aside)
            os.replace(path, aside)
        self._name_latest()  # also where none is set aside: a process may have ended just before this

    def load(self, path: Path) -> Manifest:
        """Load a checkpoint into the engine's weights and return its manifest.

        Raises `UnusableError` where it is damaged or of another model, and `UserError` where the system
        does not give its files out; weights are undefined then.
        """
        engine = self._engine
        manifest, unusable = from_main(engine, lambda: _checked(path))
        if unusable:
            raise UnusableError(unusable)
        shards = self._trained()
        _check_model(manifest.parameters, shards, path)
        unread = damage = ""
        try:
            _read(path, shards, self._group)
        except UnusableError as error:
            damage = str(error)
        except UserError as error:
            unread = str(error)
        agree(engine, unread)
        agree(engine, damage, UnusableError)
        engine.after_step(True)
        if digest_over(engine, shards) != manifest.stored:
            raise UnusableError(_other_digest(path))
        if weights_digest(engine) != manifest.digest:
            raise UserError(f"weights beside those of checkpoint {path} are not the run's: restore its model")
        if name := not_finite(engine, engine.shards()):
            raise UnusableError(f"checkpoint {path} holds weights of {name} that are not finite: load another")
        return manifest


def audited(path: Path) -> Manifest:
    """The manifest of a checkpoint that holds weights of the digest that it says; in one process, without a model.

    Raises `UserError` where they do not.
    """
    manifest, unusable = _checked(path)
    if manifest is None:
        raise UnusableError(unusable)
    shards = [
        Shard(name, int(numel), 0, torch.empty(int(numel), dtype=_KINDS[str(kind)]))
        for name, (numel, kind) in manifest.parameters.items()
    ]
    _read(path, shards, None)
    if digest_of(shards) != manifest.stored:
        raise UnusableError(_other_digest(path))
    return manifest


def _read(path: Path, shards: list[Shard], group: dist.ProcessGroup | None) -> None:
    """Read these shards from a checkpoint's files. Raises `UnusableError` for damage, else `UserError`."""
    state: dict[str, Any] = {shard.name: FlatRange(shard) for shard in shards}
    try:
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as failure:  # a damaged file can fail anywhere in its readers
        if of_another_rank(failure):
            raise
        if isinstance(_first_of(failure), OSError | MemoryError):
            raise UserError(_unread(path, failure)) from None
        raise UnusableError(f"checkpoint {path} is damaged: {cause_of(failure)}: load another") from None


def _other_digest(path: Path) -> str:
    return f"checkpoint {path} is damaged: its weights have another digest: load another"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest first."""
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint, its own digest and the sizes of all files checked."""
    damaged = f"checkpoint {path} is damaged"
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        if content.pop("sha256") != _sha256(content):
            raise ValueError("it does not match its sha256")
        if content.pop("format") != FORMAT:
            raise UnusableError(f"checkpoint {path} is of another format than {FORMAT}: use the version that wrote it")
        manifest = Manifest(**content)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UnusableError(f"{damaged}: {MANIFEST}: {error.strerror}: load another") from None
    except UnusableError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise UnusableError(f"{damaged}: {MANIFEST}: {first['loc'][0]}: {first['msg'].lower()}: load another") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableError(f"{damaged}: {MANIFEST}: {' '.join(str(error).split())[:200]}: load another") from None
    for name, entry in manifest.parameters.items():
        if list(map(type, entry)) != [int, str] or entry[1] not in _KINDS:
            raise UnusableError(f"{damaged}: {MANIFEST}: {name} has no number and type of weights: load another")
    for name, size in manifest.files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise UnusableError(f"{damaged}: {name} is missing: load another")
        if file.stat().st_size != size:
            raise UnusableError(f"{damaged}: {name} has {file.stat().st_size:,} bytes, not {size:,}: load another")
    if extra := {file.name for file in path.glob("*.safetensors")} - manifest.files.keys():
        raise UnusableError(f"{damaged}: {min(extra)} does not belong to it: remove that file")
    return manifest


def _checked(path: Path) -> tuple[Manifest | None, str]:
    """The manifest, held against what the files themselves say of their tensors, or why it is unusable."""
    try:
        manifest = read_manifest(path)
        check_complete(HuggingFaceStorageReader(str(path)).read_metadata(), manifest.parameters, path)
    except (OSError, MemoryError) as error:
        raise UserError(_unread(path, error)) from None
    except UserError as error:
        return None, str(error)
    except Exception as failure:  # a damaged header can fail anywhere in its readers
        return None, f"checkpoint {path} is damaged: {cause_of(failure)}: load another"
    return manifest, ""


def check_complete(stored: Metadata, parameters: dict[str, list[int | str]], path: Path) -> None:
    """Raises `UserError` where the files lack elements of a parameter."""
    for name, (numel, _) in parameters.items():
        found: Any = stored.state_dict_metadata.get(name)
        if numel and (found is None or sum(chunk.sizes.numel() for chunk in found.chunks) != numel):
            raise UserError(f"{path} lacks parts of {name}: put the run folder where every node sees it")


def _unread(path: Path, failure: BaseException) -> str:
    return f"checkpoint {path} cannot be read: {cause_of(failure)}: mend that and start again"


def _first_of(failure: BaseException) -> BaseException:
    """What the first rank that failed has met."""
    if isinstance(failure, CheckpointException) and failure.failures:
        return _first_of(min(failure.failures.items())[1][0])
    return failure


def cause_of(failure: BaseException) -> str:
    """What is wrong, in one line, whichever rank has met it."""
    if isinstance(failure, CheckpointException) and failure.failures:
        return f"rank {min(failure.failures)}: {cause_of(_first_of(failure))}"
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return " ".join(str(failure).split())[:200] or type(failure).__name__


def _check_model(parameters: dict[str, list[int | str]], shards: list[Shard], path: Path) -> None:
    mine = {shard.name: _kind(shard) for shard in shards}
    for name in sorted(mine.keys() | parameters.keys()):
        if mine.get(name) != parameters.get(name):
            there, here = (_described(held.get(name)) for held in (parameters, mine))
            raise UnusableError(f"checkpoint {path} is of another model: {name} is {there} there and {here} here")


def _described(parameter: list[int | str] | None) -> str:
    return "missing" if parameter is None else f"{parameter[0]:,} elements of {parameter[1]}"


def _files_of(shards: Iterable[Shard]) -> dict[str, int]:
    """The number of the file, from 1 on, that a rank writes its part of a parameter to: rank 0's holds for all."""
    number, size, files = 1, 0, {}
    for shard in shards:
        if size and size + shard.local.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        files[shard.name] = number
        size += shard.local.nbytes
    return files


def _kind(shard: Shard) -> list[int | str]:
    """Elements and type of a parameter."""
    return [shard.numel, str(shard.local.dtype).removeprefix("torch.")]


def _sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Take the name away first: half a checkpoint never looks complete."""
    removed = path.with_suffix(".removed")
    os.replace(path, removed)
    shutil.rmtree(removed)
