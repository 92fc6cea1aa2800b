import pytest
import torch

from tests.training.tiny import tiny as tiny


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads that wait for each other on shared cores cost a tiny model more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
