"""The states of a process's random number generators, as tensors for a checkpoint."""

import math
import random

import numpy as np
import torch


def random_states() -> dict[str, torch.Tensor]:
    """Return the states of Python's, NumPy's, torch's and, if there is one, this GPU's generator."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    cached_normals = torch.tensor([math.nan if gauss is None else gauss, has_gauss, cached], dtype=torch.float64)
    states = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(words),
        "numpy": torch.tensor([*map(int, keys), position]),
        "gauss": cached_normals,
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`random_states` returned; without a GPU, its state is ignored."""
    gauss, has_gauss, cached = states["gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), cached))
    torch.set_rng_state(states["cpu"].clone())  # torch 2.13 crashes on a view into a larger tensor
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
