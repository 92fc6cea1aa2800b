"""A build of an op of DeepSpeed that was killed stops nobody after it."""

import os
import threading
import time

import deepspeed
import pytest
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory
from torch.utils.file_baton import FileBaton

from addax_ds.engines.ops import build_op


class Builder:
    """Stands for DeepSpeed's, with torch's own guard around what it builds."""

    NAME = "some_op"
    built = 0

    @classmethod
    def guard(cls) -> FileBaton:
        return FileBaton(os.path.join(_get_build_directory(cls.NAME, verbose=False), "lock"))

    def load(self, verbose: bool) -> None:
        baton = self.guard()
        assert baton.try_acquire(), "the build would wait for ever"
        type(self).built += 1
        baton.release()


@pytest.fixture
def builder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    # First, since this is what imports the table, by way of every builder.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, Builder.NAME, True)
    monkeypatch.setattr(get_accelerator(), "create_op_builder", {"Some": Builder()}.get)
    monkeypatch.setattr(Builder, "built", 0)
    return Builder


def test_nothing_in_the_way(builder):
    build_op("Some")
    assert builder.built == 1


def test_what_a_killed_build_left_behind_is_removed_once_it_is_old(builder):
    guard = builder.guard()
    guard.try_acquire()
    began = time.monotonic()
    build_op("Some", abandoned=1.0)
    assert builder.built == 1
    assert time.monotonic() - began > 0.5

    guard.try_acquire()
    an_hour_ago = time.time() - 3600
    os.utime(guard.lock_file_path, (an_hour_ago, an_hour_ago))
    build_op("Some")
    assert builder.built == 2


def test_a_build_under_way_is_waited_for(builder):
    guard = builder.guard()
    guard.try_acquire()
    began = time.monotonic()
    timer = threading.Timer(0.5, guard.release)
    timer.start()
    build_op("Some")
    timer.join()
    assert builder.built == 1
    assert 0.4 < time.monotonic() - began < 30


def test_an_accelerator_without_the_op_needs_no_build(builder, monkeypatch):
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, Builder.NAME, False)
    build_op("Some")
    assert builder.built == 0
