import pytest

from addax_ds.data.partition import check_pools, partition
from addax_ds.errors import UserError


def test_longer_than_lt_is_zeroth_order_and_equal_is_first_order():
    pools = partition([10, 20, 30, 20, 5], 20)
    assert pools.lt == 20
    assert pools.zo == (2,)
    assert pools.fo == (0, 1, 3, 4)


def test_auto_is_the_median_length():
    assert partition([1, 9, 5], "auto").lt == 5
    assert partition([1, 4, 7, 9], "auto").lt == 5  # 5.5: both halves stay non-empty


def test_none_gives_every_sample_to_both_pools():
    pools = partition([3, 1, 2], "none")
    assert pools.lt is None
    assert pools.zo == pools.fo == (0, 1, 2)


def test_describe_tells_samples_tokens_and_lengths_of_both_sides():
    text = partition([10, 20, 30, 2000], 20).describe()
    for fact in (
        "L_T = 20",
        "2 samples (2,030 tokens)",
        "2 samples (30 tokens)",
        "10, median 25, longest 2000",
    ):
        assert fact in text
    assert "both pools hold all 2 samples (7 tokens)" in partition([3, 4], "none").describe()


def test_empty_side_says_which_and_what_to_set():
    with pytest.raises(UserError, match=r"zeroth-order pool is empty.*lt=30.*\(lengths 10 to 30\).*between 10 and 29"):
        check_pools(partition([10, 20, 30], 30), 1, 1, 0.5)
    with pytest.raises(UserError, match=r"first-order pool is empty.*lt=9 "):
        check_pools(partition([10, 20, 30], 9), 1, 1, 0.5)


def test_samples_of_one_length_are_told_to_split_nothing():
    with pytest.raises(UserError, match=r"lengths 7 to 7\): set lt=none \(method addax-wa\)$"):
        check_pools(partition([7, 7, 7], "auto"), 1, 1, 0.5)
    check_pools(partition([7, 7, 7], "none"), 3, 3, 0.5)


def test_batch_larger_than_its_pool_names_both_numbers():
    pools = partition([10, 20, 30], 20)
    check_pools(pools, 1, 2, 0.5)
    with pytest.raises(UserError, match="k0=2 is more than the 1 samples of the zeroth-order pool"):
        check_pools(pools, 2, 2, 0.5)
    with pytest.raises(UserError, match="k1=3 is more than the 2 samples of the first-order pool"):
        check_pools(pools, 1, 3, 0.5)


def test_a_pool_that_alpha_leaves_unused_may_be_empty_or_small():
    all_short, all_long = partition([5, 6], 6), partition([5, 6], 4)
    check_pools(all_short, 9, 2, 0.0)
    check_pools(all_long, 2, 9, 1.0)
    with pytest.raises(UserError, match="zeroth-order pool is empty"):
        check_pools(all_short, 1, 1, 1.0)
