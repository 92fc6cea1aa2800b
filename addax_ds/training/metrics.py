"""The files of a run folder: one JSON line per step, and whole JSON files written at once.

Only rank 0 writes. JSON has no word for numbers that are not finite, and a skipped step has such
numbers, so they are written as the strings "nan", "inf" and "-inf" and read back as floats.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from addax_ds.errors import UserError

METRICS = "metrics.jsonl"
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends one line per step to FOLDER/metrics.jsonl; makes the folder where there is none.

    A line counts once its newline is written, so a crash loses at most the line being written. What
    follows the first `steps` steps is cut off here: a run that goes on from there writes it again.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / METRICS, "a+b")  # noqa: SIM115 (close() closes it)
        self._file.seek(0)
        kept = 0
        for line in self._file:
            if not line.endswith(b"\n") or not _is_of_step(line, steps):
                break
            kept += len(line)
        self._file.truncate(kept)

    def append(self, record: dict[str, Any]) -> None:
        """Write `record` as one line and hand it to the operating system."""
        self._file.write(_dump(record).encode() + b"\n")
        self._file.flush()

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
        return 1 <= json.loads(line)["step"] <= last
    except (ValueError, TypeError, KeyError):
        return False


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` to `path` as JSON, whole or not at all."""
    write_whole(path, _dump(obj, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees half of it, nor does one after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
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
    except ValueError as error:
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
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is damaged: mend or remove it")
        records.append(_restored(record))
    return records


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
