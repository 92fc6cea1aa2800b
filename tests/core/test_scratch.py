"""Memory for perturbed copies: one block, of which nothing is given out twice in a stretch."""

import torch

from addax_ds.core.scratch import Scratch


def weights(*sizes):
    return [torch.empty(size) for size in sizes]


def blocks_of(pairs):
    return {side.untyped_storage().data_ptr(): side.untyped_storage().nbytes() for pair in pairs for side in pair}


def test_every_stretch_from_the_second_on_lies_in_one_block_of_the_largest_stretch():
    scratch = Scratch()
    for stretch, sizes in enumerate([(16, 160), (320,), (16, 16, 160), (160, 320), (16, 160), (320, 160), (16,)]):
        scratch.begin(afresh=False)
        # Module by module, as guests ask for them.
        pairs = [pair for size in sizes for pair in scratch.pairs(weights(size))]
        assert len({side.data_ptr() for pair in pairs for side in pair}) == 2 * len(sizes)
        blocks = blocks_of(pairs)
        if stretch in (4, 5, 6):
            assert list(blocks.values()) == [4 * 2 * (160 + 320)], stretch
        del pairs


def test_a_stretch_that_begins_afresh_leaves_what_was_taken_alone():
    scratch = Scratch()
    scratch.begin(afresh=False)
    (before,) = scratch.pairs(weights(32))
    for side in before:
        side.fill_(7.0)
    scratch.begin(afresh=True)
    for side in scratch.pairs(weights(32))[0]:
        side.fill_(0.0)
    assert all((side == 7.0).all() for side in before)
    assert not scratch.holds(before[0])
