"""The journal says what every step did, in few bytes, and no line of it changes unnoticed."""

import itertools
import json
import random

import pytest

from addax_ds.errors import UserError
from addax_ds.training import journal
from addax_ds.training.journal import Journal, Record, read_journal

HEADER = {"train_samples": 1000, "seed": 3, "alpha": 1.0, "weights": "00"}


def records(count: int, samples: int = 1000, k0: int = 5) -> list[Record]:
    draw = random.Random(0)
    return [
        Record(
            step,
            draw.getrandbits(53),
            None if step % 7 == 0 else (draw.gauss(0, 1), draw.gauss(0, 1e-7)),
            1e-6 * step,
            tuple(draw.randrange(samples) for _ in range(k0)),
            tuple(draw.randrange(samples) for _ in range(step % 3)),
        )
        for step in range(1, count + 1)
    ]


def write(path, taken, header=HEADER):
    journal = Journal(path, header)
    for record in taken:
        journal.step(record)
        if record.step == 4:
            journal.event(checkpoint=4, weights="abc")
    journal.close()
    return journal.digest


@pytest.mark.parametrize("samples", [1, 2, 63, 64, 65, 1000, 4096, 4097, 67349])
def test_what_is_written_is_read_bit_for_bit(tmp_path, samples):
    taken = records(20, samples)
    digest = write(tmp_path / "j", taken, {**HEADER, "train_samples": samples})
    entries = read_journal(tmp_path / "j")
    assert entries.records == taken
    assert entries.header["seed"] == 3
    assert entries.events == [{"checkpoint": 4, "weights": "abc", "after": 4}]
    assert entries.position(20, digest) == (tmp_path / "j").stat().st_size


@pytest.mark.parametrize(("samples_of_a_step", "megabytes"), [(6, 1.6), (16, 2.0)])
def test_twenty_thousand_zeroth_order_steps_take_two_megabytes(tmp_path, samples_of_a_step, megabytes):
    draw = random.Random(1)
    journal = Journal(tmp_path / "j", {**HEADER, "train_samples": 1000})
    for step in range(1, 20_001):
        samples = tuple(draw.randrange(1000) for _ in range(samples_of_a_step))
        journal.step(Record(step, draw.getrandbits(53), (draw.gauss(0, 10),), 1e-6, samples, ()))
    assert 0.97 * megabytes <= (tmp_path / "j").stat().st_size / 1e6 <= megabytes


@pytest.mark.parametrize("torn", ["[", '[21,123,[0.5],1e-06,"A', '{"resumed":2', "\x00\x00"])
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path, torn):
    taken = records(20)
    digest = write(tmp_path / "j", taken)
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole + torn.encode())
    entries = read_journal(tmp_path / "j")
    assert entries.records == taken
    journal = Journal.resume(tmp_path / "j", entries, 20, digest)
    assert (tmp_path / "j").read_bytes() == whole
    (next_record,) = records(21)[20:]
    journal.step(next_record)
    assert read_journal(tmp_path / "j").records == records(21)


def test_resuming_cuts_off_what_comes_after_the_checkpoint(tmp_path):
    digest = write(tmp_path / "a", records(10))
    write(tmp_path / "j", records(20))
    journal = Journal.resume(tmp_path / "j", read_journal(tmp_path / "j"), 10, digest)
    journal.close()
    assert (tmp_path / "j").read_bytes() == (tmp_path / "a").read_bytes()
    assert journal.digest == digest


def test_a_journal_of_other_steps_is_refused(tmp_path):
    write(tmp_path / "j", records(20))
    with pytest.raises(UserError, match="does not hold the 10 steps of the checkpoint"):
        Journal.resume(tmp_path / "j", read_journal(tmp_path / "j"), 10, "AAAAAA")


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("number", [0, 3, 12, 20])
def test_every_single_changed_byte_is_noticed(tmp_path, number):
    write(tmp_path / "j", records(20))
    lines = lines_of(tmp_path / "j")
    for at, byte in itertools.product(range(len(lines[number]) - 1), (None, *b"\r\n")):
        changed = bytearray(lines[number])
        changed[at] = changed[at] ^ 1 if byte is None else byte
        (tmp_path / "j").write_bytes(b"".join([*lines[:number], bytes(changed), *lines[number + 1 :]]))
        with pytest.raises(UserError):
            read_journal(tmp_path / "j")


@pytest.mark.parametrize("change", ["lost", "twice", "swapped"])
def test_lost_repeated_and_swapped_lines_are_named(tmp_path, change):
    write(tmp_path / "j", records(20))
    lines = lines_of(tmp_path / "j")
    lines[8:10] = {"lost": lines[8:9], "twice": [lines[8], *lines[8:10]], "swapped": lines[9:7:-1]}[change]
    (tmp_path / "j").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"line (9|10) is damaged .*: restore the file"):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize("content", ["", "\n", "[]\n", "{}\n", "3\n", '{"journal":3}\n', "[" * 100_000 + "\n"])
def test_what_is_no_journal_is_refused(tmp_path, content):
    (tmp_path / "j").write_text(content)
    with pytest.raises(UserError):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize("to_go_on", [False, True])
def test_a_journal_of_another_format_is_not_taken_for_damaged(tmp_path, monkeypatch, to_go_on):
    monkeypatch.setattr(journal, "FORMAT", 1)
    write(tmp_path / "j", records(3))
    monkeypatch.undo()
    with pytest.raises(UserError) as refused:
        read_journal(tmp_path / "j", to_go_on)
    assert str(refused.value) == f"{tmp_path / 'j'} is not a journal of format 2: use the version that wrote it"


def test_to_go_on_a_journal_ends_where_it_is_damaged(tmp_path):
    write(tmp_path / "j", records(20))
    lines = lines_of(tmp_path / "j")
    lines[14] = lines[14].replace(b",", b";", 1)  # the line of step 13: a header and an event come before
    (tmp_path / "j").write_bytes(b"".join(lines))
    entries = read_journal(tmp_path / "j", to_go_on=True)
    assert entries.records == records(12)
    assert "line 15 is damaged" in entries.damage
    assert entries.position(12, entries.ends[-1][2]) == sum(map(len, lines[:14]))
    with pytest.raises(UserError, match="line 15 is damaged"):
        entries.position(13, "AAAAAA")


def test_a_missing_journal_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file or directory"):
        read_journal(tmp_path / "j")


def test_lines_are_json(tmp_path):
    write(tmp_path / "j", records(3))
    header, *steps = map(json.loads, (tmp_path / "j").read_text().splitlines())
    assert header["journal"] == 2
    assert [step[0] for step in steps] == [1, 2, 3]
