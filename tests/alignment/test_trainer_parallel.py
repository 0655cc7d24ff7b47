"""The parts of ParallelTrainerMixin that need no launch; `test_recipe_processes.py` has the strategies themselves."""

from types import SimpleNamespace

import pytest
import torch

from scratch_gpt.alignment.trainer_parallel import ParallelTrainerMixin, ShardedStepOptimizer, gather_full
from scratch_gpt.distributed.optimizer import Optimizers
from scratch_gpt.errors import UserError


def test_model_parallelism_refuses_models_of_other_packages():
    trainer = SimpleNamespace(output_model=torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="tp shards .* this is a Linear: convert it with `scratch-gpt import`"):
        ParallelTrainerMixin.use_model_parallel(trainer, SimpleNamespace(name="tp"))


def test_sharded_step_optimizer_steps_only_after_a_backward_pass():
    """Else AdamW's momentum would change the weights in the steps that PPO skips."""
    parameter = torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([parameter], lr=0.1)
    optimizer = ShardedStepOptimizer(Optimizers(adamw), adamw)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2))
    optimizer.has_gradients = True
    optimizer.step()
    stepped = parameter.detach().clone()
    assert not torch.equal(stepped, torch.ones(2)) and not optimizer.has_gradients
    optimizer.step()
    assert torch.equal(parameter, stepped)
    optimizer.param_groups[0]["lr"] = 0.5  # as a schedule sets it
    assert adamw.param_groups[0]["lr"] == 0.5


def test_gather_full_keeps_tensors_only_where_asked():
    tensors = {"weight": torch.arange(6.0).reshape(2, 3).T}
    gathered = gather_full(tensors, keep=True)["weight"]
    assert torch.equal(gathered, tensors["weight"]) and gathered.is_contiguous()
    assert gather_full(tensors, keep=False) == {}
