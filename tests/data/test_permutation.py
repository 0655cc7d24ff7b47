"""The computed shuffle is a bijection and statistically uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.data import permutation
from scratch_gpt.data.permutation import Permutation


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_every_value_occurs_exactly_once(size, key):
    shuffle = Permutation(size, key)
    assert sorted(map(shuffle, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 10**15 - 7])
def test_an_index_of_a_huge_shuffle_is_computed_without_storing_it(size):
    shuffle = Permutation(size, "epoch", 3)
    values = [shuffle(index) for index in [*range(1000), *range(size - 1000, size)]]
    assert len(set(values)) == 2000
    assert all(0 <= value < size for value in values)
    assert np.mean(values) / size == pytest.approx(0.5, abs=0.03)


def all_shuffles(size, keys, rounds=permutation.ROUNDS):
    """Return the complete shuffle for each key, (keys, size)."""
    shuffles = [Permutation(size, "draw", key) for key in range(keys)]
    for shuffle in shuffles:
        del shuffle._keys[rounds:]
    return np.array([[shuffle(index) for index in range(size)] for shuffle in shuffles])


def chi_square(counts):
    """Chi-square statistic of counts that should be equal, in standard deviations of its distribution."""
    expected = counts.mean()
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [5, 12, 37])
def test_values_and_distances_of_neighbors_are_uniform_over_keys(size):
    """The value of an index and the distance between the values of adjacent indices are uniform over keys."""
    shuffles = all_shuffles(size, 4000)
    values = np.stack([np.bincount(column, minlength=size) for column in shuffles.T])
    assert abs(chi_square(values)) < 5
    steps = (shuffles[:, 1:] - shuffles[:, :-1]) % size
    assert (steps != 0).all()
    assert abs(chi_square(np.bincount(steps[:, 0], minlength=size)[1:])) < 5
    # two rounds are not enough, and the test detects it
    weak = all_shuffles(size, 4000, rounds=2)
    weak_steps = (weak[:, 1:] - weak[:, :-1]) % size
    weak_values = np.stack([np.bincount(column, minlength=size) for column in weak.T])
    assert max(abs(chi_square(weak_values)), abs(chi_square(np.bincount(weak_steps[:, 0], minlength=size)[1:]))) > 5


def test_neighbors_and_epochs_are_not_correlated():
    size = 20_000
    one, other = (np.array([Permutation(size, 1, epoch)(index) for index in range(size)]) for epoch in (0, 1))
    threshold = 4 / np.sqrt(size)
    for lag in (1, 2, 3, 141, 142, 1000):  # 142 = the number of columns
        assert abs(np.corrcoef(one[lag:], one[:-lag])[0, 1]) < threshold, lag
    assert abs(np.corrcoef(one, other)[0, 1]) < threshold
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < threshold
    assert abs((one == np.arange(size)).sum() - 1) < 6  # fixed points: one, as for any shuffle
