"""Batches as ranks compare them."""

import pytest
import torch

from addax_ds.micro_batches import fingerprint


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_batch_that_is_cut_from_a_wider_tensor_has_the_checksum_of_its_content(samples, dtype):
    wide = torch.arange(10 * samples).view(samples, 10).to(dtype)
    cut = fingerprint([{"labels": wide[:, 0]}])
    assert cut == fingerprint([{"labels": wide[:, 0].clone()}])
    assert cut != fingerprint([{"labels": wide[:, 1]}])
