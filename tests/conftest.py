"""Fixtures shared by all tests."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as soon as triton is imported, by whomever

from tests.world import World


@pytest.fixture(scope="session")
def world(request):
    """A world of `request.param` ranks: parametrize with `indirect=["world"]`.

    One world lives at a time, and tests are ordered by its size, so that each is started once.
    """
    world = World(request.param)
    yield world
    world.close()


@pytest.fixture
def one_thread():
    """As many threads as a rank of a world has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """In an order that starts each world once and has two workers end together.

    Tests of launchers and benchmarks, which mostly wait for processes, come first, and then those with a
    world, by its size.
    """

    def size(item) -> int:
        callspec = getattr(item, "callspec", None)
        return callspec.params.get("world", 0) if callspec else 0

    def place(item) -> int:
        folder = item.path.parent.name
        return -1 if folder in ("launch", "bench") else size(item) or 5

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter):
    """What tests have measured, of those that passed, too: (table, row) by `record_property`."""
    reports = [report for status in ("passed", "failed") for report in terminalreporter.stats.get(status, [])]
    told = [(table, row) for report in reports if report.when == "call" for table, row in report.user_properties]
    for table in dict.fromkeys(table for table, _ in told):
        terminalreporter.section(table)
        for row in sorted(row for named, row in told if named == table):
            terminalreporter.write_line(str(row))
