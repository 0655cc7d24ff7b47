"""Restored random states continue the same random numbers, from every generator."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from scratch_gpt.alignment.rng import random_states, set_random_states


def numbers():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


@pytest.mark.parametrize("warm_up", [0, 1], ids=["fresh", "with_cached_normals"])
def test_restored_states_continue_the_same_numbers(tmp_path, warm_up):
    """Python and NumPy keep the second of two normal numbers for the next call: it is part of the state."""
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    for _ in range(warm_up):
        random.gauss(0, 1), np.random.randn()
    save_file(random_states(), tmp_path / "rng.safetensors")
    expected = [numbers() for _ in range(3)]
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    set_random_states(load_file(tmp_path / "rng.safetensors"))
    assert [numbers() for _ in range(3)] == expected
