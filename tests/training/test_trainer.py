"""The training loop: spike guard, rollback, time limit, kept checkpoints, dry run, batch warm-up."""

import json
import math
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from scratch_gpt.cli import main
from scratch_gpt.config import TrainingSettings
from scratch_gpt.evaluation.bits_per_byte import TextScore
from scratch_gpt.training.checkpoint import best_step, find_checkpoint
from scratch_gpt.training.lr_schedule import learning_rate
from scratch_gpt.training.metrics import read_events, read_metrics
from scratch_gpt.training.trainer import TrainerCallback
from tests.training.runs import SEQUENCES_PER_STEP, arguments, assert_same_run, losses

STEPS = 60
LONG = ["--max-steps", str(STEPS), "--training.save_every", "10", "--training.eval_every", "60"]
LONG += ["--training.schedule", "constant"]
GUARD = ["--guard.window", "20", "--guard.max_skips", "3"]


def validation(run_dir):
    return read_metrics(run_dir / "metrics.jsonl")[-1]["validation_bits_per_byte"]


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("clean") / "run"
    assert main([*arguments(run_dir, corpus, *GUARD), *LONG]) == 0
    assert not read_events(run_dir / "metrics.jsonl")
    return run_dir


def test_a_step_with_a_nan_is_skipped(clean, poison, corpus, tmp_path, capsys):
    poison({25: math.nan, 41: math.inf})
    assert main([*arguments(tmp_path / "run", corpus, *GUARD), *LONG]) == 0
    assert "step    25  skipped: the loss is nan" in capsys.readouterr().out
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    assert [(event["event"], event["step"], event["row"]) for event in events] == [
        ("skipped", 25, 25 * SEQUENCES_PER_STEP),
        ("skipped", 40, 41 * SEQUENCES_PER_STEP),
    ]
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))
    assert validation(tmp_path / "run") == pytest.approx(validation(clean), abs=0.02)


def test_spoiled_data_leads_to_a_rollback_and_does_no_harm(clean, poison, corpus, tmp_path):
    poison({step: 50.0 for step in range(50, 58)})
    run_dir, unguarded = tmp_path / "run", tmp_path / "unguarded"
    assert main([*arguments(run_dir, corpus, *GUARD, "--guard.rollback_lr_factor", "0.9"), *LONG]) == 0
    events = [event["event"] for event in read_events(run_dir / "metrics.jsonl")]
    assert events == [*(["skipped"] * 3 + ["rolled back"]) * 2, "skipped", "skipped"]
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    assert validation(run_dir) == pytest.approx(validation(clean), abs=0.03)
    state = json.loads((run_dir / f"checkpoint-{STEPS}" / "trainer_state" / "state.json").read_text())
    assert state["learning_rate_scale"] == pytest.approx(0.81)

    assert main([*arguments(unguarded, corpus, "--guard.sigmas", "0"), *LONG]) == 0
    assert not read_events(unguarded / "metrics.jsonl")
    assert validation(unguarded) > validation(clean) + 0.04


def test_a_loss_that_stays_high_is_accepted_and_ends_no_run(poison, corpus, tmp_path):
    poison({step: 50.0 for step in range(30, 400)})
    run = [*arguments(tmp_path / "run", corpus, *GUARD, "--guard.max_rollbacks", "1"), *LONG]
    assert main(run) == 0
    events = [event["event"] for event in read_events(tmp_path / "run" / "metrics.jsonl")]
    assert events == [*(["skipped"] * 3), "rolled back", *(["skipped"] * 3), "accepted"]
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_run_stopped_and_resumed_after_skipped_steps_is_the_same(poison, corpus, tmp_path):
    poison({25: math.nan, **{step: 50.0 for step in range(36, 41)}})
    more = [*arguments(tmp_path / "x", corpus, *GUARD), *LONG]
    run, other = ([word.replace(str(tmp_path / "x"), str(tmp_path / name)) for word in more] for name in "ab")
    assert main(run) == 0
    assert main([*other, "--max-hours", "1e-9"]) == 75
    while main([*other, "--max-hours", "0.0005"]) == 75:
        pass
    assert_same_run(tmp_path / "b", tmp_path / "a")
    first, second = ([{**event, "time": 0} for event in read_events(tmp_path / n / "metrics.jsonl")] for n in "ab")
    assert first == second != []


def test_the_time_limit_saves_and_exits_with_75(corpus, tmp_path, capsys):
    assert main([*arguments(tmp_path / "run", corpus), "--max-hours", "1e-9"]) == 75
    assert "The same command resumes" in capsys.readouterr().err
    assert find_checkpoint(tmp_path / "run")[0].name == "checkpoint-1"


def test_every_nth_and_the_best_checkpoint_are_kept(corpus, tmp_path, monkeypatch):
    scores = iter([TextScore(loss=bits, bits_per_byte=bits) for bits in (2.0, 1.5, 1.7, 1.9, 1.8, 1.6)])
    monkeypatch.setattr("scratch_gpt.training.trainer.validate", lambda *_: (next(scores), {}))
    keep = ["--training.save_every", "2", "--training.eval_every", "2", "--training.keep_last", "1"]
    assert main([*arguments(tmp_path / "run", corpus, *keep), "--training.keep_every", "6"]) == 0
    assert best_step(tmp_path / "run") == 4
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (4, 6, 12)}


def test_a_dry_run_prints_what_it_would_do_and_trains_nothing(corpus, tmp_path, capsys):
    run = arguments(tmp_path / "run", corpus, "--training.optimizer", "muon", "--training.batch_warmup_steps", "3")
    run += ["--training.device_batch_size", "2"]
    assert main([*run, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer  Muon" in printed and "attn.q_proj.weight" in printed and "AdamW" in printed
    assert "learning rate" in printed and "64 tokens in 1 forward pass(es)" in printed
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(run) == 0


def test_a_growing_batch_and_muon_resume_bit_for_bit(corpus, tmp_path):
    more = ["--training.optimizer", "muon", "--training.batch_warmup_steps", "6", "--training.device_batch_size", "2"]
    assert main(arguments(tmp_path / "uninterrupted", corpus, *more)) == 0
    records = read_metrics(tmp_path / "uninterrupted" / "metrics.jsonl")
    tokens = [now["tokens"] - before["tokens"] for before, now in zip([{"tokens": 0}, *records], records, strict=False)]
    assert tokens[0] == 64 and tokens == sorted(tokens) and tokens[-1] == 256
    run = arguments(tmp_path / "stopped", corpus, *more)
    assert main([*run, "--max-hours", "1e-9"]) == 75
    assert main(run) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "uninterrupted")


@pytest.mark.parametrize("optimizer", ["false", "true"])
def test_continued_pretraining_starts_where_the_other_run_ended(clean, corpus, tmp_path, optimizer):
    last = read_metrics(clean / "metrics.jsonl")[-1]
    more = ["--init-from", str(clean), "--init-optimizer", optimizer, "--training.schedule", "constant"]
    more += ["--tokenizer-path", str(clean / "tokenizer"), "--training.total_batch_size", "512"]
    more += ["--training.learning_rate", "1e-5", "--training.warmup_steps", "0", "--max-steps", "3"]
    assert main([*arguments(tmp_path / "run", corpus), *more]) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["step"] == 1 and first["tokens"] == 512
    assert first["loss"] < last["loss"] + 0.3
    state = find_checkpoint(tmp_path / "run")[0] / "trainer_state" / "optimizer.safetensors"
    steps = {float(value) for name, value in load_file(state).items() if name.endswith(".step")}
    assert steps == ({STEPS + 3.0} if optimizer == "true" else {3.0})


@pytest.mark.parametrize(("folder", "message"), [("absent", "holds no saved model or run")])
def test_init_from_a_folder_without_a_model_is_refused(corpus, tmp_path, capsys, folder, message):
    assert main([*arguments(tmp_path / "run", corpus), "--init-from", str(tmp_path / folder)]) == 2
    assert message in capsys.readouterr().err


def test_running_out_of_memory_reports_what_to_change(callbacks, corpus, tmp_path, capsys):
    class OutOfMemory(TrainerCallback):
        def on_step_begin(self, trainer, data):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    callbacks.append(OutOfMemory())
    assert main([*arguments(tmp_path / "run", corpus), "--training.device_batch_size", "4"]) == 2
    assert "set --training.device_batch_size 2 (now 4" in capsys.readouterr().err


def test_callbacks_see_every_step_in_order_and_may_change_its_loss(callbacks, corpus, tmp_path):
    class Record(TrainerCallback):
        def __init__(self):
            self.calls = []

        def on_train_begin(self, trainer):
            self.calls.append(("train begin", trainer.state.step))

        def on_step_begin(self, trainer, data):
            self.calls.append(("step begin", trainer.state.step, data.cursor.row))

        def on_loss(self, trainer, data, loss):
            assert all(parameter.grad is not None for parameter in trainer.model.parameters())
            self.calls.append(("loss", trainer.state.step))
            return loss + 1

        def on_step_end(self, trainer, record):
            self.calls.append(("step end", record["step"]))

    callbacks.append(Record())
    assert main([*arguments(tmp_path / "run", corpus), "--max-steps", "2"]) == 0
    rows = SEQUENCES_PER_STEP
    assert callbacks[0].calls == [
        ("train begin", 0),
        *[("step begin", 0, rows), ("loss", 0), ("step end", 1)],
        *[("step begin", 1, 2 * rows), ("loss", 1), ("step end", 2)],
    ]
    changed = losses(tmp_path / "run")
    callbacks.clear()
    assert main([*arguments(tmp_path / "plain", corpus), "--max-steps", "2"]) == 0
    assert changed == {step: pytest.approx(loss + 1) for step, loss in losses(tmp_path / "plain").items()}


def test_losses_gradient_norms_and_weights_are_those_of_a_plain_torch_loop(callbacks, corpus, tmp_path):
    class Collect(TrainerCallback):
        def on_train_begin(self, trainer):
            self.model, self.batches = deepcopy(trainer.model), []

        def on_step_begin(self, trainer, data):
            self.batches.append(data.batches)

    callbacks.append(Collect())
    more = ["--training.device_batch_size", "2", "--training.max_grad_norm", "0.5"]
    assert main([*arguments(tmp_path / "run", corpus, *more), "--model.overrides.hidden_dropout", "0.0"]) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")

    model, training = callbacks[0].model, TrainingSettings(warmup_steps=2)
    matrices = [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("_proj.weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, (micro_batches, record) in enumerate(zip(callbacks[0].batches, records, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(records), training)
        inputs, targets = (torch.cat([getattr(b, name) for b in micro_batches]) for name in ("input_ids", "targets"))
        assert len(micro_batches) == 4 and inputs.shape == (8, 32)
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-4) and grad_norm > 0.5
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(final[name], parameter.detach(), rtol=1e-3, atol=1e-4)
