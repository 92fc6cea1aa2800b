"""Permutations that stay the same for ever."""

import numpy as np


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """A permutation of range(count) as int64 [count], a pure function of its arguments.

    `key` names what is shuffled, so that streams of one seed are independent. Sorting the raw words
    of PCG64 instead of calling `Generator.permutation`: numpy promises the former for every version,
    and a run resumed under a newer numpy must see the same batches.
    """
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(words, kind="stable")
