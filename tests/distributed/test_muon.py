"""Muon on one process equals torch's own, bit for bit. On sharded matrices: `test_strategies.py`."""

import copy

import pytest
import torch

from scratch_gpt.distributed.muon import Muon, match_rms_adamw, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)], ids=["square", "tall", "wide"])
def test_steps_equal_those_of_torch_bit_for_bit(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = copy.deepcopy(ours)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for _ in range(5):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(ours, theirs)
    momenta = [optimizer.state_dict()["state"][0]["momentum_buffer"] for optimizer in optimizers]
    assert torch.equal(*momenta)


@pytest.mark.parametrize("shape", [(24, 24), (64, 24), (24, 64)], ids=str)
def test_orthogonalized_matrices_have_singular_values_near_1(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    group = torch.optim.Muon([torch.nn.Parameter(matrix)]).param_groups[0]
    result = orthogonalize(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"])
    values = torch.linalg.svdvals(result.float())
    assert result.dtype == torch.bfloat16 and result.shape == matrix.shape
    assert 0.3 < values.min() and values.max() < 1.3


def test_updates_have_the_size_of_an_adamw_update():
    for shape in ((64, 64), (256, 64)):
        update = torch.linalg.qr(torch.randn(shape)).Q * match_rms_adamw(1.0, torch.Size(shape))
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)  # Liu et al., 2025
