"""The recipes on several ranks under `accelerate launch`: each strategy trains as one process does.

Where models generate, either all ranks are given the same completions, which are a function of the prompt ("fixed"), or
completions are sampled but kept short ("short").
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationMixin
from trl import GRPOTrainer, RLOOTrainer

from scratch_gpt.alignment import grpo
from scratch_gpt.alignment.models import unwrap_peft
from scratch_gpt.alignment.ppo import actor_critic, rollout
from scratch_gpt.alignment.ppo import trainer as ppo_trainer
from scratch_gpt.alignment.rewards import RewardModel
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.cli import leave, main
from scratch_gpt.distributed.dtensor import full_shape, num_shards, to_local
from scratch_gpt.training.metrics import read_metrics
from tests.alignment.test_recipes import command_line as words
from tests.alignment.test_recipes import pairs  # noqa: F401 (a fixture)
from tests.distributed.launch import alone, configuration, launch

PROGRAM = ("-m", "tests.alignment.test_recipe_processes")
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'scratch-gpt[deepspeed]'"
)
PPO = ["ppo", "--model", "base", "--data", "pairs.jsonl", "--validation-data", "held_pairs.jsonl", "--max-steps", 12]
PPO += ["--reward-model", "judge", "--ppo.num_ppo_epochs", 2, "--ppo.num_mini_batches", 1, "--ppo.mini_batch_size", 8]
PPO += ["--ppo.learning_rate", "3e-3", "--ppo.save_every", 6, "--ppo.eval_every", 12, "--ppo.max_completion_length", 8]
PPO = [str(word) for word in PPO]
GENERATING_RUNS = {
    "ppo": [*PPO, "--run-dir", "ppo"],
    "ppo-early-stop": [*PPO, "--ppo.target_kl", "1e-7", "--run-dir", "ppo-early-stop"],
    "ppo-lora": [*PPO, "--lora-rank", "4", "--run-dir", "ppo-lora"],
    "grpo": words("grpo", "--grpo.beta", 0.1, save_every=3),
    "rloo": words("rloo", save_every=3),
    "rloo-lora": words("rloo", "--lora-rank", 4, "--reward-model", "judge", run_dir="rloo-lora", save_every=3),
}
GENERATING_RUNS["rloo-lora"] = [
    word for word in GENERATING_RUNS["rloo-lora"] if word not in ("--reward", "rewards_of_test:vowels_said")
]
OFFLINE_RUNS = {
    "sft": words("sft", run_dir="sft", save_every=3),
    "lora": words("sft", "--lora-rank", 4, run_dir="lora", save_every=3),
    "dpo": words("dpo", "--dpo.device_batch_size", 2, save_every=3),
    "reward": words("reward", save_every=3),
    "reward-lora": words("reward", "--lora-rank", 4, run_dir="reward-lora", save_every=3),
    "kto": words("kto", save_every=3),
    "kto-lora": words("kto", "--lora-rank", 4, run_dir="kto-lora", save_every=3),
}


def sharding(models):
    """Which fraction of the parameters of ``models`` is sharded, and which fraction of their elements is on this rank."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    return {
        "sharded": sum(num_shards(p) > 1 for p in parameters) / max(1, len(parameters)),
        "local": sum(to_local(p).numel() for p in parameters) / max(1, sum(full_shape(p).numel() for p in parameters)),
    }


def zero_sharding(trainer):
    """The ZeRO stage, and for which fraction of the trained elements this rank has optimizer state."""
    if trainer.deepspeed is None:
        return None
    optimizers = trainer.deepspeed.optimizers
    total = sum(full_shape(p).numel() for p in optimizers.parameters.values())
    return {"stage": optimizers.stage, "local": optimizers.held / total, "offloaded": optimizers.offloaded}


def train(trainer, *arguments, original=ResumableTrainerMixin.train, **keywords):
    """Write facts-RANK.json with what was in effect when training ended."""
    COMPLETION_LENGTHS.clear()
    sequence_lengths = record_sequence_lengths(unwrap_peft(trainer.trained_models[0]).base_model)
    result = original(trainer, *arguments, **keywords)
    of_trl = [cell.cell_contents for function in getattr(trainer, "reward_funcs", []) for cell in function.__closure__]
    rewards = [reward for reward in getattr(trainer, "rewards", of_trl) if isinstance(reward, RewardModel)]
    frozen = [model for model in [getattr(trainer, "ref_model", None)] if model is not None]
    frozen += [reward.model for reward in rewards]
    facts = {
        "parallel": isinstance(trainer.model_wrapped, DistributedDataParallel),
        **sharding([trainer.model]),
        "frozen": sharding(frozen) if frozen else None,
        "zero": zero_sharding(trainer),
        "training": [trainer.accelerator.unwrap_model(model).training for model in frozen],
        "completion_lengths": COMPLETION_LENGTHS,
        "sequence_lengths": sequence_lengths,
    }
    Path(trainer.args.output_dir, f"facts-{trainer.args.process_index}.json").write_text(json.dumps(facts))
    return result


def record_sequence_lengths(backbone):
    """Return a list that gets, for each forward pass without a cache, the length of the sequences and of a block's shard."""
    lengths = []

    def record_full(_, arguments, keywords):
        if keywords.get("past_key_values") is None:
            input_ids = arguments[0] if arguments else keywords["input_ids"]
            lengths.append([input_ids.shape[1]])

    def record_local(_, arguments):
        if lengths and len(lengths[-1]) == 1:
            lengths[-1].append(arguments[0].shape[1])

    backbone.register_forward_pre_hook(record_full, with_kwargs=True)
    backbone.h[0].register_forward_pre_hook(record_local)
    return lengths


COMPLETION_LENGTHS = []
"""The longest completion of each call of `generate`."""


def generate(model, *arguments, original=GenerationMixin.generate, **keywords):
    sequences = original(model, *arguments, **keywords)
    COMPLETION_LENGTHS.append(sequences.shape[1] - keywords["input_ids"].shape[1])
    return sequences


def fixed_completion(prompt, index):
    """A function of the prompt and the index in its group, so that any rank gives the same."""
    return [(7 * sum(prompt) + 13 * index + 11 * t) % 300 + 4 for t in range(2 + (sum(prompt) + index) % 6)]


def fixed_completions_for_ppo(model, prompt_ids, *, stop_ids, pad_id, **_):
    answers = [[*fixed_completion(ids, 0), stop_ids[0]] for ids in prompt_ids]
    completions = torch.tensor([ids + [stop_ids[0]] * (8 - len(ids)) for ids in answers])
    length = max(map(len, prompt_ids))
    prompts = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompt_ids])
    real = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    mask, ended = rollout.completion_mask(completions, stop_ids)
    return rollout.RolloutBatch(torch.cat([prompts, completions], 1), torch.cat([real, mask], 1), mask, ended)


def fixed_completions_for_trl(trainer, prompt_ids, *arguments):
    stop = trainer.model.generation_config.eos_token_id[0]
    first = trainer.accelerator.process_index * len(prompt_ids)
    completions = [[*fixed_completion(ids, (first + i) % 4), stop] for i, ids in enumerate(prompt_ids)]
    return (completions, None) if isinstance(trainer, GRPOTrainer) else completions


def fix_completions(patch):
    patch(actor_critic, "generate", fixed_completions_for_ppo)
    for trainer in (GRPOTrainer, RLOOTrainer):
        patch(trainer, "_generate_single_turn", fixed_completions_for_trl)


def curve(run_dir, key):
    return [record[key] for record in read_metrics(Path(run_dir) / "metrics.jsonl") if key in record]


def assert_same(one, other):
    """Two runs have the same metrics, final weights and optimizer state."""
    for key in ("loss", "grad_norm", "tokens", "learning_rate"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=1e-3, abs=1e-6), key
    assert len(curve(other, "loss")) == 6
    newest = max(Path(one).glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])).name
    weights = "adapters/adapter_model" if Path(one, "adapters").exists() else "final/model"
    files = [f"{weights}.safetensors", f"{newest}/trainer_state/optimizer.safetensors"]
    for file in files:
        expected, got = load_file(Path(one) / file), load_file(Path(other) / file)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert (tensor - got[name]).abs().max() <= 2e-3 * tensor.abs().max().clamp(min=0.01), (file, name)


def assert_context_parallel(facts, cp_size):
    """Each rank computes two of 2 x cp_size equal chunks, to which sequences are padded."""
    assert facts["sequence_lengths"]
    for full, local in facts["sequence_lengths"]:
        assert local == (full if cp_size == 1 else -(-full // (2 * cp_size)) * 2)


def launch_runs(strategy, *runs, processes=2, sizes=None, **environment):
    done = launch(
        configuration(strategy, Path(), processes, **(sizes or {})),
        *runs,
        program=PROGRAM,
        folder=Path(),
        **environment,
    )
    return done.stdout


def under(run, strategy):
    """The same command with the strategy's name added to its run directory."""
    return [word if run[i - 1] != "--run-dir" else f"{word}-{strategy}" for i, word in enumerate(run)]


def assert_in_effect(strategy, run):
    """Models and optimizer state were sharded, or replicated, as the strategy says. Returns the facts of both ranks."""
    directory = run[run.index("--run-dir") + 1]
    facts = [json.loads(Path(f"{directory}-{strategy}/facts-{rank}.json").read_text()) for rank in range(2)]
    for on_rank in facts:
        models = [on_rank, on_rank["frozen"]] if on_rank["frozen"] else [on_rank]
        assert not any(on_rank["training"])
        if strategy.startswith("zero"):
            stage = int(strategy[4])
            assert on_rank["zero"]["stage"] == stage and on_rank["zero"]["local"] < 0.6
            assert on_rank["zero"]["offloaded"] == strategy.endswith("offload")
            assert all(model["sharded"] == (stage == 3) for model in models), directory
            assert stage < 3 or all(model["local"] < 0.6 for model in models), directory
        elif strategy != "ddp_cpu":
            assert all(model["sharded"] == 1 and model["local"] < 0.6 for model in models), directory
        else:
            assert on_rank["parallel"] and all(model["sharded"] == 0 for model in models), directory
    return facts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "fsdp2"])
def test_two_ranks_train_as_one_process_does(pairs, strategy, monkeypatch):  # noqa: F811
    """With fixed completions: the same losses, weights and optimizer state."""
    fix_completions(monkeypatch.setattr)
    runs = [*OFFLINE_RUNS.values(), *GENERATING_RUNS.values()]
    alone(*runs)
    bf16 = [*PPO, "--run-dir", "bf16", "--ppo.precision", "bf16", "--ppo.activation_checkpointing", "true"]
    launch_runs(strategy, *(under(run, strategy) for run in [*runs, bf16]), COMPLETIONS="fixed")
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-{strategy}")
        assert_in_effect(strategy, run)
    assert curve(f"bf16-{strategy}", "loss") == pytest.approx(curve("ppo", "loss"), abs=5e-3)
    assert curve(f"bf16-{strategy}", "loss") != pytest.approx(curve("ppo", "loss"), abs=1e-5)
    assert_in_effect(strategy, bf16)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    "strategy, names",
    [
        ("zero1", ["sft", "reward-lora", "dpo", "grpo", "ppo"]),
        ("zero2", [*OFFLINE_RUNS, *GENERATING_RUNS]),
        ("zero3", [*OFFLINE_RUNS, *GENERATING_RUNS]),
        ("zero3_offload", ["sft", "lora", "dpo", "reward", "ppo", "rloo"]),
    ],
)
def test_zero_trains_as_one_process_does_and_each_resumes_the_other(pairs, strategy, names, monkeypatch):  # noqa: F811
    fix_completions(monkeypatch.setattr)
    runs = [{**OFFLINE_RUNS, **GENERATING_RUNS}[name] for name in names]
    alone(*runs)
    resumed = words("sft", save_every=3, run_dir="resumed")
    copy_unfinished("sft", f"resumed-{strategy}")
    bf16 = words("sft", precision="bf16", activation_checkpointing="true", run_dir="bf16")
    launched = [*runs, resumed, bf16]
    output = launch_runs(strategy, *(under(run, strategy) for run in launched), COMPLETIONS="fixed")
    assert output.count(f"layout     {strategy.split('_')[0]} on 2 process(es)") == len(launched)
    assert "resumed    checkpoint-3" in output
    for run in launched:
        assert_in_effect(strategy, run)
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-{strategy}")
    assert_same("sft", f"resumed-{strategy}")
    assert curve(f"bf16-{strategy}", "loss") == pytest.approx(curve("sft", "loss"), abs=5e-3)
    assert curve(f"bf16-{strategy}", "loss") != pytest.approx(curve("sft", "loss"), abs=1e-5)
    copy_unfinished(f"sft-{strategy}", "back")
    alone(words("sft", save_every=3, run_dir="back"))
    assert_same("sft", "back")


def copy_unfinished(run_dir, other, first=3, last=6):
    """Copy a run as it was at its checkpoint ``first``, before ``last``."""
    shutil.copytree(run_dir, other)
    assert Path(other, f"checkpoint-{first}").is_dir()
    for gone in (f"checkpoint-{last}", "final"):
        shutil.rmtree(f"{other}/{gone}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sharded_models_generate_what_replicas_generate(pairs, strategy):  # noqa: F811
    """Also if one rank finishes its completions before the other."""
    for one in ("ddp_cpu", strategy):
        launch_runs(one, *(under(run, one) for run in GENERATING_RUNS.values()), COMPLETIONS="short")
    for run in GENERATING_RUNS.values():
        directory = run[run.index("--run-dir") + 1]
        assert_same(f"{directory}-ddp_cpu", f"{directory}-{strategy}")
        first, second = (facts["completion_lengths"] for facts in assert_in_effect(strategy, run))
        assert len(first) == len(second) and first != second
        assert first == assert_in_effect("ddp_cpu", run)[0]["completion_lengths"]


MODEL_PARALLEL = [
    ("tp", 2, {"tp_size": 2}, "tp on 2 process(es), tp 2"),
    ("fsdp2_tp", 4, {"dp_shard_size": 2, "tp_size": 2}, "fsdp2 x tp on 4 process(es), dp_shard 2 x tp 2"),
    ("fsdp2_cp", 2, {"dp_shard_size": 1, "cp_size": 2}, "fsdp2 x cp on 2 process(es), cp 2"),
    ("fsdp2_cp", 4, {"dp_shard_size": 2, "cp_size": 2}, "fsdp2 x cp on 4 process(es), dp_shard 2 x cp 2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes", "sizes", "description"), MODEL_PARALLEL)
def test_model_parallel_ranks_train_as_one_process_does(pairs, strategy, processes, sizes, description):  # noqa: F811
    more = [["--sft.device_batch_size", 2], ["--sft.precision", "bf16", "--sft.activation_checkpointing", "true"]]
    runs = [words(command, save_every=3) for command in ("sft", "reward", "dpo", "kto")]
    accumulated, bf16 = (words("sft", *some, save_every=3, run_dir=f"sft{at}") for at, some in enumerate(more))
    packed = words("sft", "--sft.packing", "true", save_every=3, run_dir="packed")
    runs += [accumulated, packed, *(OFFLINE_RUNS[name] for name in ("lora", "reward-lora", "kto-lora"))]
    alone(*runs)
    resumed = words("sft", save_every=3, run_dir="resumed")
    copy_unfinished("sft", f"resumed-{strategy}")
    launched = [*runs, resumed, bf16]
    output = launch_runs(strategy, *(under(run, strategy) for run in launched), processes=processes, sizes=sizes)
    assert output.count(f"layout     {description}") == len(launched)
    assert "resumed    checkpoint-3" in output
    for run in launched:
        directory = run[run.index("--run-dir") + 1]
        for rank in range(processes):
            facts = json.loads(Path(f"{directory}-{strategy}/facts-{rank}.json").read_text())
            for one in filter(None, (facts, facts["frozen"])):
                assert one["local"] == pytest.approx(1 / processes, rel=0.1), directory
            assert_context_parallel(facts, sizes.get("cp_size", 1))
        if run in runs:
            assert_same(directory, f"{directory}-{strategy}")
    assert_same("sft", f"resumed-{strategy}")
    assert curve(f"sft1-{strategy}", "loss") == pytest.approx(curve("sft", "loss"), abs=5e-3)
    copy_unfinished(f"dpo-{strategy}", "back")
    alone(words("dpo", save_every=3, run_dir="back"))
    assert_same("dpo", "back")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes", "sizes", "description"), MODEL_PARALLEL)
def test_model_parallel_ranks_generate_the_same(pairs, strategy, processes, sizes, description):  # noqa: F811
    """Like one process, or two replicas; the user's reward function is called once per group."""
    Path("counted.py").write_text(
        "import os, rewards_of_test\n"
        "def vowels(completions, **columns):\n"
        "    open(f'calls-{os.environ[\"NAME\"]}-{os.getpid()}', 'a').write('1')\n"
        "    return rewards_of_test.vowels_said(completions=completions, **columns)\n"
    )
    counting = [word if word != "rewards_of_test:vowels_said" else "counted:vowels" for word in GENERATING_RUNS["grpo"]]
    accumulated = words(
        "rloo", "--rloo.device_batch_size", 2, "--rloo.num_iterations", 2, save_every=4, run_dir="again"
    )
    judged = words("rloo", "--reward-model", "judge", "--rloo.beta", 0.1, save_every=3, run_dir="judged")
    judged = [word for word in judged if word not in ("--reward", "rewards_of_test:vowels_said")]
    runs = [*(GENERATING_RUNS[name] for name in ("ppo", "ppo-early-stop", "ppo-lora", "rloo-lora")), counting, judged]
    dp_size = processes // 2
    replicas = "ddp_cpu" if dp_size > 1 else "cpu"
    if dp_size == 1:
        runs.append(accumulated)
    launch_runs(
        replicas, *(under(run, replicas) for run in runs), processes=dp_size, COMPLETIONS="short", NAME=replicas
    )
    copy_unfinished("ppo-" + replicas, f"resumed-{strategy}", first=6, last=12)
    resumed = [*PPO, "--run-dir", "resumed"]
    launched = [*runs, resumed]
    output = launch_runs(
        strategy,
        *(under(run, strategy) for run in launched),
        processes=processes,
        sizes=sizes,
        COMPLETIONS="short",
        NAME=strategy,
    )
    assert output.count(f"layout     {description}") == len(launched)
    assert "resumed    checkpoint-6" in output
    for run in launched:
        directory = run[run.index("--run-dir") + 1]
        facts = [json.loads(Path(f"{directory}-{strategy}/facts-{rank}.json").read_text()) for rank in range(processes)]
        for one in facts:
            assert not any(one["training"])
            for model in filter(None, (one, one["frozen"])):
                assert model["local"] == pytest.approx(1 / processes, rel=0.1), directory
            assert_context_parallel(one, sizes.get("cp_size", 1))
        if run is resumed:
            assert_same(f"ppo-{replicas}", f"{directory}-{strategy}")
            continue
        assert_same(f"{directory}-{replicas}", f"{directory}-{strategy}")
        for rank in range(processes):
            like = json.loads(Path(f"{directory}-{replicas}/facts-{rank // 2}.json").read_text())
            assert facts[rank]["completion_lengths"] == like["completion_lengths"] != []
    calls = {name: [path.read_text() for path in Path().glob(f"calls-{name}-*")] for name in (replicas, strategy)}
    assert sorted(calls[strategy]) == sorted(calls[replicas]) and len(calls[strategy]) == dp_size


@pytest.mark.slow
def test_hsdp_trains_as_one_process_does(pairs, monkeypatch):  # noqa: F811
    fix_completions(monkeypatch.setattr)
    runs = [words(command, save_every=3, batch_size=8) for command in ("sft", "reward", "dpo", "kto")]
    runs += [GENERATING_RUNS[name] for name in ("ppo", "ppo-lora", "grpo")]
    alone(*runs)
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 2}
    launch_runs("hsdp", *(under(run, "hsdp") for run in runs), processes=4, sizes=sizes, COMPLETIONS="fixed")
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-hsdp")
        assert_in_effect("hsdp", run)


@pytest.mark.slow
def test_a_run_resumes_under_another_strategy(pairs, monkeypatch):  # noqa: F811
    fix_completions(monkeypatch.setattr)
    # each with the steps of its checkpoints
    runs = {"sft": (OFFLINE_RUNS["sft"], 3, 6), "ppo": (GENERATING_RUNS["ppo"], 6, 12)}
    alone(*(run for run, _, _ in runs.values()))
    for strategy in ("fsdp2", "ddp_cpu"):
        for name, (_, _, last) in runs.items():
            shutil.copytree(name, f"{name}-{strategy}")
            for gone in (f"checkpoint-{last}", "final"):
                shutil.rmtree(f"{name}-{strategy}/{gone}")
        output = launch_runs(strategy, *(under(run, strategy) for run, _, _ in runs.values()), COMPLETIONS="fixed")
        for name, (_, first, _) in runs.items():
            assert f"checkpoint-{first}" in output
            assert_same(name, f"{name}-{strategy}")
    for name, (run, _, last) in runs.items():
        for gone in (f"checkpoint-{last}", "final"):
            shutil.rmtree(f"{name}-fsdp2/{gone}")
        alone(under(run, "fsdp2"))  # its first checkpoint is still that of one process
        assert_same(name, f"{name}-fsdp2")


if __name__ == "__main__":
    ResumableTrainerMixin.train, GenerationMixin.generate = train, generate
    if os.environ.get("COMPLETIONS") == "fixed":
        fix_completions(setattr)
    elif os.environ.get("COMPLETIONS") == "short":  # each token stops with a probability of one half
        ppo_trainer.stop_token_ids = grpo.eos_token_ids = lambda *_: list(range(4, 400, 2))
    torch.set_num_threads(1)
    leave(max(main(run) for run in json.loads(sys.argv[1])))
