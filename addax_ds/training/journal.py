"""The journal: what every step did, in about 80 bytes, so that a run can be replayed and audited.

RUN/journal.jsonl begins with a header, an object. Each step is an array

    [step, seed, g0 of each direction or null where the step was skipped, lr, zeroth-order samples, first-order
     samples, digest]

and what happens between steps (a checkpoint, the resumption of a run) is an object. A run that goes on
without its journal begins another one; "after" in its header are the steps taken by then. Samples are
numbers of training samples, written as digits of base 64. Every line ends in a digest of itself and
of the digest before it, so that no line can be changed, lost or moved unnoticed.
"""

import hashlib
import json
import math
import os
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from addax_ds.errors import UserError
from addax_ds.training.folder import JOURNAL

FORMAT = 2
WITHOUT = "remove it to go on from the newest checkpoint, without a record of the steps before"
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
_DIGEST = 6  # digits of base 64: 36 bits


@dataclass(frozen=True)
class Record:
    """One step."""

    step: int
    """From 1."""
    seed: int
    g0: tuple[float, ...] | None
    """Projected gradients, one per direction; none without a zeroth-order part; None: skipped."""
    lr: float
    zo: tuple[int, ...]
    """Training samples of the zeroth-order batch, in order."""
    fo: tuple[int, ...]


@dataclass(frozen=True)
class Entries:
    """What a journal holds."""

    header: dict[str, Any]
    first: int
    """Steps taken before it was begun."""
    records: list[Record]
    events: list[dict[str, Any]]
    """Objects after the header, each with the number of steps taken before it in "after"."""
    ends: list[tuple[int, int, str]]
    """For each line, the header first: steps taken by its end, its end in bytes, its digest."""
    damage: str
    """What is wrong with the line after the last of these; empty where nothing is."""

    @property
    def steps(self) -> int:
        """Steps taken by its end."""
        return self.first + len(self.records)

    def between(self, start: int, stop: int) -> list[Record]:
        """The steps after the first `start`, up to the first `stop`."""
        return self.records[start - self.first : stop - self.first]

    def line_of(self, steps: int, digest: str, weights: str) -> str:
        """Digest of the line that a checkpoint of these weights was saved at; `UserError` where it is not there.

        digest: of the line, as the checkpoint notes it. A journal that was begun with the checkpoint does
        not hold that one.
        """
        if steps == self.first and weights == self.header["weights"]:
            return self.ends[0][2]
        self.position(steps, digest)
        return digest

    def position(self, steps: int, digest: str) -> int:
        """End in bytes of the line with this digest, after the first `steps` steps."""
        for after, end, line in self.ends:
            if after == steps and line == digest:
                return end
        raise UserError(
            self.damage
            or f"{JOURNAL} does not hold the {steps} steps of the checkpoint: put back the right one, or {WITHOUT}"
        )


class Journal:
    """Appends to a journal; only rank 0 holds one. A line is handed to the system as soon as it is written."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Start a journal, in place of any that is there."""
        self._samples = int(header["train_samples"])
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (close() closes it)
        self.digest = ""
        """Of the last line."""
        self._append({"journal": FORMAT, **header})

    @classmethod
    def resume(cls, path: Path, entries: Entries, steps: int, digest: str) -> "Journal":
        """Go on after the first `steps` steps, at the line with this digest; what follows it is cut off."""
        end = entries.position(steps, digest)
        journal = cls.__new__(cls)
        journal._samples = int(entries.header["train_samples"])
        journal._file = open(path, "r+b")  # noqa: SIM115
        journal._file.truncate(end)
        journal._file.seek(0, os.SEEK_END)
        journal.digest = digest
        return journal

    def step(self, record: Record) -> None:
        """Append a step."""
        samples = [_packed(numbers, self._samples) for numbers in (record.zo, record.fo)]
        self._append([record.step, record.seed, record.g0, record.lr, *samples])

    def event(self, **what: Any) -> None:
        """Append something that happened between two steps."""
        self._append(what)

    def sync(self) -> None:
        """Have everything so far survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def _append(self, body: Any) -> None:
        self.digest = _chained(self.digest, body)
        self._file.write(_line(body, self.digest))
        self._file.flush()


def is_begun(path: Path) -> bool:
    """Whether there is a journal with at least one whole line: a run may be killed as it makes it."""
    return path.exists() and b"\n" in path.read_bytes()


def read_journal(path: Path, to_go_on: bool = False) -> Entries:
    """What a journal holds, without a torn last line. Raises `UserError` where it is missing or damaged.

    to_go_on: end at the first damaged line in place of raising; what follows it can be done again.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the folder of a run") from None
    header: dict[str, Any] | None = None
    records: list[Record] = []
    events, ends = [], []
    digest, end, damage = "", 0, ""
    whole = content.split(b"\n")[:-1]  # what follows the last line end was torn by a crash
    for number, line in enumerate((line + b"\n" for line in whole), start=1):
        try:
            body, written = _unsigned(json.loads(line))
            if written != _chained(digest, body) or line != _line(body, written):
                raise ValueError("its digest does not follow from the line before")
            if header is None:
                header = _checked_header(body, path)
            elif isinstance(body, dict):
                events.append({**body, "after": header["after"] + len(records)})
            else:
                records.append(_record(body, int(header["train_samples"])))
                if records[-1].step != header["after"] + len(records):
                    raise ValueError(f"step {records[-1].step} follows step {header['after'] + len(records) - 1}")
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            damage = f"{path}: line {number} is damaged ({error}): restore the file, or {WITHOUT}"
            if header is None or not to_go_on:
                raise UserError(damage) from None
            break
        digest, end = written, end + len(line)
        ends.append((header["after"] + len(records), end, digest))
    if header is None:
        raise UserError(f"{path} is empty: restore it, or {WITHOUT}")
    return Entries(header, header["after"], records, events, ends, damage)


def _checked_header(body: Any, path: Path) -> dict[str, Any]:
    if not isinstance(body, dict) or body.get("journal") != FORMAT:
        raise UserError(f"{path} is not a journal of format {FORMAT}: use the version that wrote it")
    if not isinstance(body.get("train_samples"), int) or body["train_samples"] < 1:
        raise ValueError("train_samples is no number of samples")
    if not isinstance(body.get("weights"), str):
        raise ValueError("weights is no digest")
    if type(body.setdefault("after", 0)) is not int or body["after"] < 0:
        raise ValueError("after is no number of steps")
    return body


def _unsigned(line: Any) -> tuple[Any, str]:
    """A line's content and its digest."""
    if isinstance(line, dict):
        return {key: value for key, value in line.items() if key != "digest"}, line["digest"]
    if isinstance(line, list) and line:
        return line[:-1], line[-1]
    raise ValueError("neither a step nor an event")


def _record(body: list, samples: int) -> Record:
    step, seed, g0, lr, zo, fo = body
    if not (type(step) is int and type(seed) is int and isinstance(lr, float | int) and math.isfinite(lr)):
        raise ValueError("no numbers of a step")
    if g0 is not None and not all(isinstance(g, float | int) and math.isfinite(g) for g in g0):
        raise ValueError("no projected gradients")
    return Record(
        step, seed, None if g0 is None else tuple(g0), float(lr), _unpacked(zo, samples), _unpacked(fo, samples)
    )


def _chained(before: str, body: Any) -> str:
    digest = hashlib.sha256(before.encode() + _dump(body)).digest()
    number = int.from_bytes(digest[:8], "big")
    return "".join(_DIGITS[(number >> 6 * place) & 63] for place in range(_DIGEST))


def _line(body: Any, digest: str) -> bytes:
    return _dump([*body, digest] if isinstance(body, list) else {**body, "digest": digest}) + b"\n"


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _width(samples: int) -> int:
    """Digits of base 64 for a number below `samples`."""
    return max(1, -(-(samples - 1).bit_length() // 6))


def _packed(numbers: Sequence[int], samples: int) -> str:
    places = range(_width(samples))
    return "".join(_DIGITS[(number >> 6 * place) & 63] for number in numbers for place in places)


def _unpacked(text: str, samples: int) -> tuple[int, ...]:
    width = _width(samples)
    digits = [_DIGITS.index(digit) for digit in text]
    if len(digits) % width:
        raise ValueError("half a sample number")
    numbers = tuple(
        sum(digit << 6 * place for place, digit in enumerate(digits[at : at + width]))
        for at in range(0, len(digits), width)
    )
    if any(number >= samples for number in numbers):
        raise ValueError("a sample that the run does not have")
    return numbers
