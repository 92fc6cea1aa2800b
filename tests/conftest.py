"""Fixtures shared by all tests."""

import pytest

from tests.world import World


@pytest.fixture(scope="session")
def world(request):
    """A world of `request.param` ranks: parametrize with `indirect=["world"]`.

    pytest groups tests by the parameter of a session's fixture, so one world lives at a time.
    """
    world = World(request.param)
    yield world
    world.close()
