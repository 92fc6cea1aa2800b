"""Where records come from: embedded data, a local file, or a dataset of the hub.

A data setting is one of
  movies                         embedded data, by name
  sst2, sst2:validation          a task by name (data/named_tasks.py), and a split of its dataset
  reviews.jsonl, reviews.csv     a local file, one record a line; a CSV file names its fields in line 1
  ID, ID:SPLIT, ID:CONFIG:SPLIT  a dataset id of the hub or a local dataset folder, read by the `datasets`
                                 library; the split is "train" unless given. Example: nyu-mll/glue:sst2:train
"""

import csv
import json
import os.path
from pathlib import Path
from typing import Any

from addax_ds.config import nearest
from addax_ds.data.embedded import EMBEDDED_DATA, prepare_data
from addax_ds.data.named_tasks import HUB_TASKS
from addax_ds.data.shuffle import permutation
from addax_ds.errors import UserError

Record = dict[str, Any]

_SPLIT_STREAM = 0  # batches use the other streams of the seed


def load_records(data: str) -> tuple[list[Record], str | None]:
    """All records that `data` names (see the top of this file), in order, and the name of the task they bring.

    Only data known by name brings a task. Raises `UserError` for a path that does not exist, a file that
    cannot be read (naming the line), records that are no objects, and data without records.
    """
    if data in EMBEDDED_DATA:
        return _read_jsonl(prepare_data(data)), data
    name, _, split = data.partition(":")
    if name in HUB_TASKS:
        return _read_dataset(f"{HUB_TASKS[name].dataset}:{split or 'train'}"), name
    path = Path(data).expanduser()
    try:
        if path.suffix == ".jsonl":
            records = _read_jsonl(path)
        elif path.suffix == ".csv":
            records = _read_csv(path)
        else:
            records = _read_dataset(data)
    except OSError as error:
        raise UserError(f"{data}: {error.strerror}: give a file that can be read") from None
    if not records:
        raise UserError(f"{data}: holds no records")
    return records, None


def held_out_beside(data: str) -> str | None:
    """Data that are held out for `data`, where its name says so."""
    return f"{data}:validation" if data in HUB_TASKS else None


def split_records(
    records: list[Record], train_samples: int | None, eval_samples: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """(train, held out): the first and the last records of one shuffle, without overlap.

    `train_samples` None takes all that are not held out; either number may be 0. The held-out
    records depend on `seed` and `eval_samples` only. Raises `UserError` when there are too few.
    """
    remaining = len(records) - eval_samples
    count = remaining if train_samples is None else train_samples
    if remaining < (1 if train_samples is None else count):
        wanted = [f"{train_samples or 'any'} to train and choose settings on"] if train_samples != 0 else []
        wanted += [f"{eval_samples} held out"] if eval_samples else []
        raise UserError(
            f"{len(records)} records are too few for {' and '.join(wanted)}: lower train_samples, dev_samples or "
            "eval_samples"
        )
    order = [records[index] for index in permutation(len(records), seed, _SPLIT_STREAM)]
    return order[:count], order[remaining:]


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    # As bytes: an undecodable byte is then an error of its line, too.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}): mend the line") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: a record is an object in braces: mend the line")
            records.append(record)
    return records


def _read_csv(path: Path) -> list[Record]:
    records = []
    csv.field_size_limit(2**31 - 1)  # a long document is one field
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise UserError(f"{path}, line 1: a field name stands twice: rename one")
            for row in rows:
                if row and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {rows.line_num}: {len(row)} values for {len(header)} fields: "
                        "quote values that hold a comma or a line break"
                    )
                if row:
                    records.append(dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: not CSV ({error}): mend the line") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 (byte {error.start}): save the file as UTF-8") from None
    return records


def _read_dataset(data: str) -> list[Record]:
    name, *parts = data.split(":")
    if len(parts) > 2 or not all([name, *parts]):
        raise UserError(f"{data}: a dataset is written ID, ID:SPLIT or ID:CONFIG:SPLIT")
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"{data}: data files are .jsonl or .csv: convert it")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{data}: no such file or folder")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{data}: reading it needs the datasets library: pip install datasets") from None
    split = parts[-1] if parts else "train"
    config = parts[0] if len(parts) == 2 else None
    try:
        if path.is_dir():
            path = path.resolve()
            _check_stays_inside(path, datasets.load_dataset_builder(str(path), config).config.data_files)
        return list(datasets.load_dataset(str(path) if path.is_dir() else name, config, split=split))
    except UserError:
        raise
    except Exception as error:  # the library, the hub client and the HTTP stack share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = nearest(data, [*EMBEDDED_DATA, *HUB_TASKS])
        raise UserError(
            f"{data}: no local path, no dataset that could be loaded ({reason}), no data of that name{hint}"
        ) from None


def _check_stays_inside(folder: Path, data_files: dict[str, list[str]] | None) -> None:
    """Raises `UserError` where the metadata of a dataset folder leads out of it."""
    for file in (file for files in (data_files or {}).values() for file in files):
        if not Path(os.path.normpath(file)).is_relative_to(folder):
            raise UserError(
                f"{folder}: the data_files of its metadata lead out of the folder, to {file}: mend README.md"
            )
