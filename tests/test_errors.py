"""Which errors are another rank's, in the words of gloo and of the system."""

import pytest

from addax_ds.errors import of_another_rank

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:41659: "


@pytest.mark.parametrize("reason", ["Connection reset by peer", "No route to host", "Network is unreachable"])
def test_a_rank_that_cannot_be_reached_is_told_from_a_fault_of_this_one(reason):
    assert of_another_rank(RuntimeError(GLOO + reason)) is not None
    assert of_another_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_the_cause_is_the_collectives_error_and_not_what_failed_after_it():
    collective = RuntimeError(GLOO + "Timed out waiting 12000ms for recv operation to complete")
    try:
        try:
            raise collective
        finally:
            raise RuntimeError("parameters expected to be released")
    except RuntimeError as error:
        assert of_another_rank(error) is collective
