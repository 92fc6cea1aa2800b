"""Ranks on a slowed link really are slowed, and leave no namespace behind."""

import subprocess

import pytest

from addax_ds.bench.link import linked
from addax_ds.bench.ranks import on_ranks
from addax_ds.errors import UserError
from tests.bench.cases import seconds_of_an_all_reduce

NUMBERS = 2_500_000  # 80 Mbit of float32, of which 8 may pass in a burst


def test_two_ranks_exchange_at_the_speed_of_their_link():
    try:
        with linked(1.0) as hosts:
            seconds = on_ranks(seconds_of_an_all_reduce, 2, hosts=hosts, numbers=NUMBERS)
    except UserError as error:
        if "slowed link" not in str(error):
            raise
        pytest.skip(f"network namespaces are not allowed here: {error}")
    assert max(seconds) >= 0.07  # of the rank that begins first; 0.01 without the link
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(host.namespace in listed for host in hosts)
