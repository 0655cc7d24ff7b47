import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scratch_gpt.data import permutation
from scratch_gpt.data.permutation import Permutation


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_every_value_comes_exactly_once(size, key):
    shuffle = Permutation(size, key)
    assert sorted(map(shuffle, range(size))) == list(range(size))


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 10**15 - 7])
def test_a_place_in_a_huge_shuffle_is_found_without_making_it(size):
    shuffle = Permutation(size, "epoch", 3)
    places = [shuffle(index) for index in [*range(1000), *range(size - 1000, size)]]
    assert len(set(places)) == 2000
    assert all(0 <= place < size for place in places)
    assert np.mean(places) / size == pytest.approx(0.5, abs=0.03)


def draws(size, keys, rounds=permutation.ROUNDS):
    """(keys, size): the whole shuffle for each key."""
    whole = [Permutation(size, "draw", key) for key in range(keys)]
    for shuffle in whole:
        del shuffle._keys[rounds:]
    return np.array([[shuffle(index) for index in range(size)] for shuffle in whole])


def chi_square(counts):
    """Of counts that should all be equal, in standard deviations of its own distribution."""
    expected = counts.mean()
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [5, 12, 37])
def test_every_place_takes_every_value_equally_often_and_so_do_neighbours(size):
    """Where an index goes, and the distance at which its neighbour lands, are uniform over keys."""
    shuffles = draws(size, 4000)
    places = np.stack([np.bincount(column, minlength=size) for column in shuffles.T])
    assert abs(chi_square(places)) < 5
    steps = (shuffles[:, 1:] - shuffles[:, :-1]) % size
    assert (steps != 0).all()
    assert abs(chi_square(np.bincount(steps[:, 0], minlength=size)[1:])) < 5
    # with two rounds the defects are plain to see, so the test can see them
    weak = draws(size, 4000, rounds=2)
    weak_steps = (weak[:, 1:] - weak[:, :-1]) % size
    weak_places = np.stack([np.bincount(column, minlength=size) for column in weak.T])
    assert max(abs(chi_square(weak_places)), abs(chi_square(np.bincount(weak_steps[:, 0], minlength=size)[1:]))) > 5


def test_neighbours_and_epochs_are_not_correlated():
    size = 20_000
    one, other = (np.array([Permutation(size, 1, epoch)(index) for index in range(size)]) for epoch in (0, 1))
    threshold = 4 / np.sqrt(size)
    for lag in (1, 2, 3, 141, 142, 1000):  # 142 = the number of columns
        assert abs(np.corrcoef(one[lag:], one[:-lag])[0, 1]) < threshold, lag
    assert abs(np.corrcoef(one, other)[0, 1]) < threshold
    assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < threshold
    assert abs((one == np.arange(size)).sum() - 1) < 6  # fixed points: one, as for any shuffle
