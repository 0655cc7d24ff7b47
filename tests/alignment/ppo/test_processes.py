"""PPO on two ranks under `accelerate launch`: takes minutes on a small machine."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from scratch_gpt.training.metrics import read_metrics
from tests.alignment.ppo.test_command import arguments
from tests.distributed.test_data_parallel import launch

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import torch
from torch.nn.parallel import DistributedDataParallel
from scratch_gpt.alignment.ppo import actor_critic, rollout
from scratch_gpt.alignment.ppo.config import PPOConfig
from scratch_gpt.alignment.ppo.trainer import PPOTrainer
from scratch_gpt.model.loading import load_model

folder, device_batch_size, completions = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def fixed_completions(model, prompt_ids, *, stop_ids, pad_id, **_):
    # a function of the prompt alone, so that any rank gives the same
    completions = torch.tensor([[(7 * sum(ids) + 11 * t) % 300 + 4 if t < 2 + sum(ids) % 4 else stop_ids[0]
                                 for t in range(6)] for ids in prompt_ids])
    length = max(map(len, prompt_ids))
    prompts = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompt_ids])
    real = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    mask, ended = rollout.completion_mask(completions, stop_ids)
    return rollout.RolloutBatch(torch.cat([prompts, completions], 1), torch.cat([real, mask], 1), mask, ended)

if completions == "fixed":
    actor_critic.generate = fixed_completions
model, tokenizer = load_model("base")
prompts = [{"prompt": " ".join(["word"] * (1 + i % 5)) + " " + "abcdefgh"[i % 8]} for i in range(32)]
trainer = PPOTrainer(
    model, lambda completions, **_: [len(text) / 20 for text in completions],
    PPOConfig(output_dir=folder, per_device_train_batch_size=device_batch_size, max_steps=8, num_ppo_epochs=4, learning_rate=1e-3,
              max_completion_length=6, save_strategy="no", report_to=[], use_cpu=True, kl_coef=0.1, lam=0.9,
              score_normalization="running", adaptive_kl_target=0.1, adaptive_kl_horizon=100),
    train_dataset=prompts, eval_dataset=prompts[:5], processing_class=tokenizer,
)
trainer.train()
evaluated = trainer.evaluate()
rank = trainer.accelerator.process_index
torch.save(trainer.model.state_dict(), f"{folder}-{rank}.pt")
record = {"parallel": isinstance(trainer.model_wrapped, DistributedDataParallel), "evaluated": evaluated,
          "completions": trainer.rollout.batch.completion_ids.tolist(), "kl_coef": trainer.kl_controller.coefficient,
          "log": [entry for entry in trainer.state.log_history if "loss" in entry]}
open(f"{folder}-{rank}.json", "w").write(json.dumps(record))
"""


def run(material, name, processes, completions):
    (material / "program.py").write_text(PROGRAM)
    given = [name, str(16 // processes), completions]
    if processes == 1:
        done = subprocess.run([sys.executable, "program.py", *given], capture_output=True, text=True, check=False)
    else:
        done = launch(given, program=("program.py",), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = range(processes)
    weights = [torch.load(material / f"{name}-{rank}.pt") for rank in ranks]
    return weights, [json.loads((material / f"{name}-{rank}.json").read_text()) for rank in ranks]


def test_two_ranks_equal_one_on_the_same_completions(material):
    """Whitening, normalization, the adaptive coefficient and the mean over tokens are global."""
    one, (alone,) = run(material, "one", 1, "fixed")
    two, both = run(material, "two", 2, "fixed")
    assert [record["parallel"] for record in (alone, *both)] == [False, True, True]
    for name, tensor in one[0].items():
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(two[0][name], two[1][name])
    assert alone["kl_coef"] == pytest.approx(both[0]["kl_coef"]) and both[0]["kl_coef"] != 0.1
    for name in ("objective/scores", "objective/kl", "loss/value", "policy/approx_kl", "completions/mean_length"):
        for ours, theirs in zip(alone["log"], both[0]["log"], strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)
    assert alone["evaluated"] == pytest.approx(both[0]["evaluated"], rel=1e-3, abs=1e-5)


def test_each_rank_samples_different_completions(material):
    weights, (first, second) = run(material, "sampled", 2, "sampled")
    assert first["parallel"] and first["completions"] != second["completions"]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_command_on_two_processes(material):
    words = arguments(steps=16)
    done = launch(words, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_metrics(material / "run" / "metrics.jsonl")
    assert [(record["step"], "loss" in record) for record in records] == [(8, True), (16, True), (16, False)]
    assert load_file(material / "run" / "final" / "model.safetensors")
    again = launch(words, ACCELERATE_USE_CPU="true")
    assert again.returncode == 0 and "is finished" in again.stdout
