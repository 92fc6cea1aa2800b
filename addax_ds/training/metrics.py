"""The files of a run folder: one JSON line per step, and whole JSON files written at once.

Only rank 0 writes. JSON has no word for numbers that are not finite, and a skipped step has such
numbers, so they are written as the strings "nan", "inf" and "-inf" and read back as floats.
"""

import functools
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import AllowInfNan, Field, Strict, StrictBool, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from addax_ds.errors import UserError

METRICS = "metrics.jsonl"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_Count = Annotated[int, Strict(), Field(ge=0, le=2**53)]
_Number = Annotated[float, Strict()]
_Finite = Annotated[float, Strict(), AllowInfNan(False)]


@dataclass
class Probes:
    """Losses on both sides of the weights, one per direction."""

    plus: Annotated[list[_Number], Field(min_length=1)]
    minus: Annotated[list[_Number], Field(min_length=1)]

    def __post_init__(self) -> None:
        if len(self.plus) != len(self.minus):
            raise ValueError("one side has more losses than the other")


@dataclass
class Step:
    """A line of metrics.jsonl: what is read of it."""

    step: Annotated[_Count, Field(ge=1)]
    g0: list[_Number]
    loss_zo: Probes | None
    loss_fo: _Number | None
    skipped: StrictBool
    memory_bytes: _Count
    seconds: _Finite
    wire_bytes: dict[str, _Count] | None = None
    """By kind of collective, of a step whose traffic was counted."""
    accuracy: _Finite | None = None
    exact_match: _Finite | None = None
    f1: _Finite | None = None


@dataclass
class Lengths:
    """lengths.json."""

    lengths: Annotated[list[_Count], Field(min_length=1)]
    lt: _Count | None
    zo: _Count
    fo: _Count


@dataclass
class Summary:
    """summary.json: what is read of it."""

    method: StrictStr
    engine: StrictStr
    world_size: _Count
    steps: _Count
    skipped_steps: _Count
    model: StrictStr
    data: StrictStr
    metric_name: StrictStr
    seconds_per_step: _Number  # nan where the lines of all steps were lost
    wire_bytes_per_step: dict[str, _Count]
    peak_memory_bytes: Annotated[list[_Count], Field(min_length=1)]
    step_memory_bytes: Annotated[list[_Count], Field(min_length=1)]
    seconds_total: _Number
    final_digest: StrictStr
    metrics_lost: _Count
    trainable_parameters: _Count
    accuracy_before: _Finite | None = None
    accuracy_after: _Finite | None = None
    exact_match_before: _Finite | None = None
    exact_match_after: _Finite | None = None
    f1_before: _Finite | None = None
    f1_after: _Finite | None = None
    dev_accuracy: _Finite | None = None
    dev_exact_match: _Finite | None = None
    dev_f1: _Finite | None = None


class MetricsWriter:
    """Appends one line per step to FOLDER/metrics.jsonl; makes the folder where there is none.

    A line counts once its newline is written, so a crash loses at most the line being written. Lines of
    steps after the first `steps` are dropped here, since a run that goes on from there writes them again,
    and damaged ones.
    """

    kept: int
    """Steps that the file held and still holds."""
    last: dict[str, Any]
    """Record of the last of them; empty where there is none."""

    def __init__(self, folder: Path, steps: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        good = [line for line in lines if line.endswith(b"\n") and _is_of_step(line, steps)]
        self.kept = len(good)
        self.last = _restored(json.loads(good[-1])) if good else {}
        if good != lines:
            write_whole(path, b"".join(good))
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 (close() closes it)

    def append(self, record: dict[str, Any]) -> None:
        """Write `record` as one line and hand it to the operating system."""
        self._file.write(_dump(record).encode() + b"\n")
        self._file.flush()

    def amend_last(self, more: dict[str, Any]) -> None:
        """Add to the record of the last line that was kept, before anything is appended."""
        self.last |= more
        earlier = self._path.read_bytes().splitlines(keepends=True)[:-1]
        self._file.close()
        write_whole(self._path, b"".join(earlier) + _dump(self.last).encode() + b"\n")
        self._file = open(self._path, "ab")  # noqa: SIM115 (close() closes it)

    def sync(self) -> None:
        """Have everything so far survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_of_step(line: bytes, last: int) -> bool:
    """Whether a line is the record of a step up to `last`."""
    try:
        return 1 <= _restored(json.loads(line))["step"] <= last
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` to `path` as JSON, whole or not at all."""
    write_whole(path, (_dump(obj, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader never sees half of it, nor does one after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """What `write_json` wrote to `path`. Raises `UserError` where it is missing or damaged."""
    try:
        return _restored(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the folder of a finished run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): restore the file or repeat the run") from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of FOLDER/metrics.jsonl in order, without a torn last line.

    Raises `UserError` if the folder or the file is missing, and for damage anywhere else, naming
    the line.
    """
    path = folder / METRICS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the folder of a run") from None
    lines = content.split(b"\n")[:-1]  # what follows the last newline is nothing, or a torn line
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _restored(json.loads(line))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is damaged: mend or remove it")
        records.append(record)
    return records


_adapter = functools.cache(TypeAdapter)


def check_kind(values: Any, kind: type, where: str) -> None:
    """Raises `UserError` where what was read is not of this kind: lacks a key, or has another kind of value."""
    try:
        _adapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        fault = (
            f"no {key} in it" if first["type"] == "missing" else f"{key or 'it'} is damaged ({first['msg'].lower()})"
        )
        raise UserError(f"{where}: {fault}: give the folder of a run made by this version") from None


def _dump(obj: Any, indent: int | None = None) -> str:
    return json.dumps(_encoded(obj), indent=indent, allow_nan=False, ensure_ascii=False)


def _encoded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value
