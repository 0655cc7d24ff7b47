"""`--init-from`: a new run that starts with the weights of another, and with its optimizer state on request."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from scratch_gpt.cli import main
from scratch_gpt.config import TrainingSettings
from scratch_gpt.training.checkpoint import find_checkpoint
from scratch_gpt.training.lr_schedule import learning_rate
from scratch_gpt.training.metrics import read_metrics
from scratch_gpt.training.trainer import TrainerCallback
from tests.training.runs import STEPS, arguments, assert_same_run

NO_DROPOUT = ["--model.overrides.hidden_dropout", "0.0"]


@pytest.fixture(scope="module")
def origin(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("origin") / "run"
    assert main(arguments(run_dir, corpus, *NO_DROPOUT)) == 0
    return run_dir


@pytest.fixture
def continued(origin, corpus, tmp_path):
    """``continued(*more)``: arguments of a run that starts from ``origin`` with another data order and schedule."""

    def words(*more, run_dir=tmp_path / "run"):
        tokenizer = ["--tokenizer-path", str(origin / "tokenizer"), "--init-from", str(origin), "--seed", "7"]
        other = ["--training.schedule", "cosine", "--training.learning_rate", "1e-3", "--max-steps", "6"]
        return arguments(run_dir, corpus, *tokenizer, *other, *more)

    return words


class NoteStart(TrainerCallback):
    """Notes what the first step starts from."""

    weights = None

    def on_step_begin(self, trainer, data):
        if self.weights is None:
            self.weights = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
            self.optimizer = {name: tensor.clone() for name, tensor in trainer.optimizer.state_tensors().items()}
            self.state, self.batches = replace(trainer.state), data.batches


@pytest.fixture
def first_step(callbacks):
    callbacks.append(NoteStart())
    return callbacks[0]


@pytest.mark.parametrize("optimizer", ["false", "true"])
@pytest.mark.parametrize("batch", [128, 512])
def test_it_starts_where_the_other_run_ended(origin, continued, first_step, tmp_path, optimizer, batch):
    assert main(continued("--init-optimizer", optimizer, "--training.total_batch_size", str(batch))) == 0
    saved = origin / f"checkpoint-{STEPS}"
    weights = load_file(saved / "model.safetensors")
    assert weights.keys() == first_step.weights.keys()
    assert all(torch.equal(first_step.weights[name], weights[name]) for name in weights)
    moments = load_file(saved / "trainer_state" / "optimizer.safetensors") if optimizer == "true" else {}
    assert moments.keys() == first_step.optimizer.keys()
    assert all(torch.equal(first_step.optimizer[name], moments[name]) for name in moments)

    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first_step.state.step == first_step.state.tokens == first_step.state.data_position.row == 0
    assert first["step"] == 1 and first["tokens"] == batch
    schedule = TrainingSettings(schedule="cosine", learning_rate=1e-3, warmup_steps=2)
    assert first["learning_rate"] == learning_rate(0, 6, schedule)
    assert first["loss"] == pytest.approx(loss_of(saved, first_step.batches), rel=1e-5)
    ended = find_checkpoint(tmp_path / "run")[0] / "trainer_state" / "optimizer.safetensors"
    steps = {float(value) for name, value in load_file(ended).items() if name.endswith(".step")}
    assert steps == ({STEPS + 6.0} if optimizer == "true" else {6.0})


def loss_of(folder, batches):
    """Nats per target, by torch's loss on the logits of the saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = torch.cat([model(batch.input_ids, position_ids=batch.position_ids).logits for batch in batches])
    return cross_entropy(logits.flatten(0, 1), torch.cat([batch.targets for batch in batches]).flatten()).item()


def test_it_resumes_bit_for_bit_after_the_other_run_was_deleted(origin, continued, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(origin, gone)
    from_gone = ["--init-from", str(gone), "--init-optimizer", "true"]
    assert main(continued(*from_gone, run_dir=tmp_path / "uninterrupted")) == 0
    run = continued(*from_gone, run_dir=tmp_path / "stopped")
    assert main([*run, "--max-hours", "1e-9"]) == 75
    shutil.rmtree(gone)
    assert main(run) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_the_state_of_another_kind_of_optimizer_is_refused(continued, capsys):
    assert main(continued("--init-optimizer", "true", "--training.optimizer", "muon")) == 2
    assert "is that of another optimizer than Muon" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_by_name_and_skipped_in_a_run(origin, continued, first_step, tmp_path, capsys):
    damaged = tmp_path / "origin"
    shutil.copytree(origin, damaged)
    newest = damaged / f"checkpoint-{STEPS}"
    (newest / "trainer_state" / "state.json").write_text("{}")
    assert main(continued("--init-from", str(newest))) == 2
    assert "is not a valid checkpoint: trainer_state/state.json is damaged" in capsys.readouterr().err
    assert main(continued("--init-from", str(damaged), "--init-optimizer", "true")) == 0
    assert f"checkpoint-{STEPS} is not used: trainer_state/state.json is damaged" in capsys.readouterr().out
    before = load_file(damaged / "checkpoint-8" / "model.safetensors")
    assert all(torch.equal(first_step.weights[name], before[name]) for name in before)
