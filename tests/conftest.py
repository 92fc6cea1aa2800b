"""Fixtures shared by all tests."""

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world(request):
    """A world of `request.param` ranks: parametrize with `indirect=["world"]`.

    One world lives at a time, and tests are ordered by its size, so that each is started once.
    """
    world = World(request.param)
    yield world
    world.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Tests without a world first, then by size of the world, else in the order they were written."""

    def size(item) -> int:
        callspec = getattr(item, "callspec", None)
        return callspec.params.get("world", 0) if callspec else 0

    items.sort(key=size)
