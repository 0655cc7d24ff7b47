"""The stages on two processes under `accelerate launch`, copied and sharded: what one process learns."""

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
from scratch_gpt.alignment.ppo import rollout
from scratch_gpt.alignment.ppo import trainer as ppo_trainer
from scratch_gpt.alignment.rewards import RewardModel
from scratch_gpt.alignment.trainer_checkpoints import ResumableTrainerMixin
from scratch_gpt.cli import leave, main
from scratch_gpt.distributed.dtensor import full_shape, num_shards, to_local
from scratch_gpt.training.metrics import read_metrics
from tests.alignment.test_recipes import pairs, words  # noqa: F401 (a fixture)
from tests.distributed.launch import alone, configuration, launch

PROGRAM = ("-m", "tests.alignment.test_recipe_processes")
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'scratch-gpt[deepspeed]'"
)
PPO = ["ppo", "--model", "base", "--data", "pairs.jsonl", "--validation-data", "held_pairs.jsonl", "--max-steps", 12]
PPO += ["--reward-model", "judge", "--ppo.num_ppo_epochs", 2, "--ppo.num_mini_batches", 1, "--ppo.mini_batch_size", 8]
PPO += ["--ppo.learning_rate", "3e-3", "--ppo.save_every", 6, "--ppo.eval_every", 12, "--ppo.max_completion_length", 8]
PPO = [str(word) for word in PPO]
DRAWING = {
    "ppo": [*PPO, "--run-dir", "ppo"],
    "ppo-left": [*PPO, "--ppo.target_kl", "1e-7", "--run-dir", "ppo-left"],
    "ppo-lora": [*PPO, "--lora-rank", "4", "--run-dir", "ppo-lora"],
    "grpo": words("grpo", "--grpo.beta", 0.1, save_every=3),
    "rloo": words("rloo", save_every=3),
    "rloo-lora": words("rloo", "--lora-rank", 4, "--reward-model", "judge", run_dir="rloo-lora", save_every=3),
}
DRAWING["rloo-lora"] = [
    word for word in DRAWING["rloo-lora"] if word not in ("--reward", "rewards_of_test:vowels_said")
]
RUNS = {
    "sft": words("sft", run_dir="sft", save_every=3),
    "lora": words("sft", "--lora-rank", 4, run_dir="lora", save_every=3),
    "dpo": words("dpo", "--dpo.device_batch_size", 2, save_every=3),
    "reward": words("reward", save_every=3),
    "reward-lora": words("reward", "--lora-rank", 4, run_dir="reward-lora", save_every=3),
    "kto": words("kto", save_every=3),
    "kto-lora": words("kto", "--lora-rank", 4, run_dir="kto-lora", save_every=3),
}


def parts(models):
    """Of all parameters of ``models``: the share that is sharded, and the share of the numbers that lies in this process."""
    parameters = [parameter for model in models for parameter in model.parameters()]
    return {
        "sharded": sum(num_shards(p) > 1 for p in parameters) / max(1, len(parameters)),
        "held": sum(to_local(p).numel() for p in parameters) / max(1, sum(full_shape(p).numel() for p in parameters)),
    }


def zero(trainer):
    """The stage of ZeRO, and the share of the trained numbers whose optimizer's state lies in this process."""
    if trainer.zero is None:
        return None
    optimizers = trainer.zero.optimizers
    number = sum(full_shape(p).numel() for p in optimizers.parameters.values())
    return {"stage": optimizers.stage, "held": optimizers.local_numel / number, "offloaded": optimizers.is_offloaded}


def train(trainer, *arguments, original=ResumableTrainerMixin.train, **keywords):
    """Note beside the metrics what was in force when the training ended."""
    DRAWN.clear()
    columns = columns_of(rollout.unwrap_peft(trainer.trained[0]).base_model)
    result = original(trainer, *arguments, **keywords)
    of_trl = [cell.cell_contents for function in getattr(trainer, "reward_funcs", []) for cell in function.__closure__]
    rewards = [reward for reward in getattr(trainer, "rewards", of_trl) if isinstance(reward, RewardModel)]
    frozen = [model for model in [getattr(trainer, "ref_model", None)] if model is not None]
    frozen += [reward.model for reward in rewards]
    facts = {
        "parallel": isinstance(trainer.model_wrapped, DistributedDataParallel),
        **parts([trainer.model]),
        "frozen": parts(frozen) if frozen else None,
        "zero": zero(trainer),
        "training": [trainer.accelerator.unwrap_model(model).training for model in frozen],
        "drawn": DRAWN,
        "columns": columns,
    }
    Path(trainer.args.output_dir, f"facts-{trainer.args.process_index}.json").write_text(json.dumps(facts))
    return result


def columns_of(backbone):
    """Of each call without a cache: how many columns the rows have, and the blocks."""
    found = []

    def note(_, arguments, keywords):
        if keywords.get("past_key_values") is None:
            rows = arguments[0] if arguments else keywords["input_ids"]
            found.append([rows.shape[1]])

    def note_own(_, arguments):
        if found and len(found[-1]) == 1:
            found[-1].append(arguments[0].shape[1])

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    backbone.h[0].register_forward_pre_hook(note_own)
    return found


DRAWN = []
"""The tokens after the prompts, each time that completions were drawn."""


def generate(model, *arguments, original=GenerationMixin.generate, **keywords):
    drawn = original(model, *arguments, **keywords)
    DRAWN.append(drawn.shape[1] - keywords["input_ids"].shape[1])
    return drawn


def written(prompt, at):
    """A completion that follows from the prompt and its place, so that it does not matter which process draws it."""
    return [(7 * sum(prompt) + 13 * at + 11 * t) % 300 + 4 for t in range(2 + (sum(prompt) + at) % 6)]


def written_by_ppo(model, prompt_ids, *, stop_ids, pad_id, **_):
    answers = [[*written(ids, 0), stop_ids[0]] for ids in prompt_ids]
    completions = torch.tensor([ids + [stop_ids[0]] * (8 - len(ids)) for ids in answers])
    width = max(map(len, prompt_ids))
    prompts = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompt_ids])
    real = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    mask, ended = rollout.completion_mask(completions, stop_ids)
    return rollout.RolloutBatch(torch.cat([prompts, completions], 1), torch.cat([real, mask], 1), mask, ended)


def written_by_trl(trainer, prompt_ids, *arguments):
    stop = trainer.model.generation_config.eos_token_id[0]
    before = trainer.accelerator.process_index * len(prompt_ids)
    completions = [[*written(ids, (before + at) % 4), stop] for at, ids in enumerate(prompt_ids)]
    return (completions, None) if isinstance(trainer, GRPOTrainer) else completions


def write_completions(patch):
    patch(ppo_trainer, "generate", written_by_ppo)
    for trainer in (GRPOTrainer, RLOOTrainer):
        patch(trainer, "_generate_single_turn", written_by_trl)


def curve(run_dir, key):
    return [record[key] for record in read_metrics(Path(run_dir) / "metrics.jsonl") if key in record]


def assert_same(one, other):
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


def assert_columns(facts, parts):
    """Rows are filled up for two pieces each."""
    assert facts["columns"]
    assert all(own == (row if parts == 1 else -(-row // (2 * parts)) * 2) for row, own in facts["columns"])


def in_processes(strategy, *runs, processes=2, sizes=None, **environment):
    done = launch(
        configuration(strategy, Path(), processes, **(sizes or {})),
        *runs,
        program=PROGRAM,
        folder=Path(),
        **environment,
    )
    return done.stdout


def under(run, strategy):
    return [word if run[at - 1] != "--run-dir" else f"{word}-{strategy}" for at, word in enumerate(run)]


def assert_in_force(strategy, run):
    directory = run[run.index("--run-dir") + 1]
    facts = [json.loads(Path(f"{directory}-{strategy}/facts-{rank}.json").read_text()) for rank in range(2)]
    for of_one in facts:
        models = [of_one, of_one["frozen"]] if of_one["frozen"] else [of_one]
        assert not any(of_one["training"])
        if strategy.startswith("zero"):
            stage = int(strategy[4])
            assert of_one["zero"]["stage"] == stage and of_one["zero"]["held"] < 0.6
            assert of_one["zero"]["offloaded"] == strategy.endswith("offload")
            assert all(model["sharded"] == (stage == 3) for model in models), directory
            assert stage < 3 or all(model["held"] < 0.6 for model in models), directory
        elif strategy != "ddp_cpu":
            assert all(model["sharded"] == 1 and model["held"] < 0.6 for model in models), directory
        else:
            assert of_one["parallel"] and all(model["sharded"] == 0 for model in models), directory
    return facts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_cpu", "fsdp2"])
def test_two_processes_learn_what_one_learns_and_leave_the_same_model(pairs, strategy, monkeypatch):  # noqa: F811
    """Those that draw completions are given them here."""
    write_completions(monkeypatch.setattr)
    runs = [*RUNS.values(), *DRAWING.values()]
    alone(*runs)
    rough = [*PPO, "--run-dir", "rough", "--ppo.precision", "bf16", "--ppo.activation_checkpointing", "true"]
    in_processes(strategy, *(under(run, strategy) for run in [*runs, rough]), COMPLETIONS="written")
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-{strategy}")
        assert_in_force(strategy, run)
    assert curve(f"rough-{strategy}", "loss") == pytest.approx(curve("ppo", "loss"), abs=5e-3)
    assert curve(f"rough-{strategy}", "loss") != pytest.approx(curve("ppo", "loss"), abs=1e-5)
    assert_in_force(strategy, rough)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    "strategy, names",
    [
        ("zero1", ["sft", "reward-lora", "dpo", "grpo", "ppo"]),
        ("zero2", [*RUNS, *DRAWING]),
        ("zero3", [*RUNS, *DRAWING]),
        ("zero3_offload", ["sft", "lora", "dpo", "reward", "ppo", "rloo"]),
    ],
)
def test_zero_learns_what_one_process_learns_and_each_goes_on_with_the_other(pairs, strategy, names, monkeypatch):  # noqa: F811
    write_completions(monkeypatch.setattr)
    runs = [{**RUNS, **DRAWING}[name] for name in names]
    alone(*runs)
    further = words("sft", save_every=3, run_dir="further")
    half_done("sft", f"further-{strategy}")
    rough = words("sft", precision="bf16", activation_checkpointing="true", run_dir="rough")
    started = [*runs, further, rough]
    said = in_processes(strategy, *(under(run, strategy) for run in started), COMPLETIONS="written")
    assert said.count(f"layout     {strategy.split('_')[0]} on 2 process(es)") == len(started)
    assert "resumed    checkpoint-3" in said
    for run in started:
        assert_in_force(strategy, run)
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-{strategy}")
    assert_same("sft", f"further-{strategy}")
    assert curve(f"rough-{strategy}", "loss") == pytest.approx(curve("sft", "loss"), abs=5e-3)
    assert curve(f"rough-{strategy}", "loss") != pytest.approx(curve("sft", "loss"), abs=1e-5)
    half_done(f"sft-{strategy}", "back")
    alone(words("sft", save_every=3, run_dir="back"))
    assert_same("sft", "back")


def half_done(run_dir, other, first=3, last=6):
    """A copy of a run of six steps as it was after three."""
    shutil.copytree(run_dir, other)
    assert Path(other, f"checkpoint-{first}").is_dir()
    for gone in (f"checkpoint-{last}", "final"):
        shutil.rmtree(f"{other}/{gone}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_sharded_models_draw_what_copies_draw(pairs, strategy):  # noqa: F811
    """Also where one process has come to the end of its completions before the other."""
    for one in ("ddp_cpu", strategy):
        in_processes(one, *(under(run, one) for run in DRAWING.values()), COMPLETIONS="short")
    for run in DRAWING.values():
        directory = run[run.index("--run-dir") + 1]
        assert_same(f"{directory}-ddp_cpu", f"{directory}-{strategy}")
        first, second = (facts["drawn"] for facts in assert_in_force(strategy, run))
        assert len(first) == len(second) and first != second
        assert first == assert_in_force("ddp_cpu", run)[0]["drawn"]


SHARING = [
    ("tp", 2, {"tp_size": 2}, "tp on 2 process(es), tp 2"),
    ("fsdp2_tp", 4, {"dp_shard_size": 2, "tp_size": 2}, "fsdp2 x tp on 4 process(es), dp_shard 2 x tp 2"),
    ("fsdp2_cp", 2, {"dp_shard_size": 1, "cp_size": 2}, "fsdp2 x cp on 2 process(es), cp 2"),
    ("fsdp2_cp", 4, {"dp_shard_size": 2, "cp_size": 2}, "fsdp2 x cp on 4 process(es), dp_shard 2 x cp 2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes", "sizes", "description"), SHARING)
def test_processes_that_share_rows_learn_what_one_learns(pairs, layout, processes, sizes, description):  # noqa: F811
    more = [["--sft.device_batch_size", 2], ["--sft.precision", "bf16", "--sft.activation_checkpointing", "true"]]
    runs = [words(verb, save_every=3) for verb in ("sft", "reward", "dpo", "kto")]
    accumulated, rough = (words("sft", *some, save_every=3, run_dir=f"sft{at}") for at, some in enumerate(more))
    packed = words("sft", "--sft.packing", "true", save_every=3, run_dir="packed")
    runs += [accumulated, packed, *(RUNS[name] for name in ("lora", "reward-lora", "kto-lora"))]
    alone(*runs)
    further = words("sft", save_every=3, run_dir="further")
    half_done("sft", f"further-{layout}")
    started = [*runs, further, rough]
    said = in_processes(layout, *(under(run, layout) for run in started), processes=processes, sizes=sizes)
    assert said.count(f"layout     {description}") == len(started)
    assert "resumed    checkpoint-3" in said
    for run in started:
        directory = run[run.index("--run-dir") + 1]
        for rank in range(processes):
            facts = json.loads(Path(f"{directory}-{layout}/facts-{rank}.json").read_text())
            for one in filter(None, (facts, facts["frozen"])):
                assert one["held"] == pytest.approx(1 / processes, rel=0.1), directory
            assert_columns(facts, sizes.get("cp_size", 1))
        if run in runs:
            assert_same(directory, f"{directory}-{layout}")
    assert_same("sft", f"further-{layout}")
    assert curve(f"sft1-{layout}", "loss") == pytest.approx(curve("sft", "loss"), abs=5e-3)
    half_done(f"dpo-{layout}", "back")
    alone(words("dpo", save_every=3, run_dir="back"))
    assert_same("dpo", "back")


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "processes", "sizes", "description"), SHARING)
def test_processes_that_share_rows_draw_the_same(pairs, layout, processes, sizes, description):  # noqa: F811
    """Like one process, or two copies: what they draw and what they learn of it; the user's function is asked once."""
    Path("asked.py").write_text(
        "import os, rewards_of_test\n"
        "def vowels(completions, **columns):\n"
        "    open(f'asked-{os.environ[\"NAME\"]}-{os.getpid()}', 'a').write('1')\n"
        "    return rewards_of_test.vowels_said(completions=completions, **columns)\n"
    )
    asking = [word if word != "rewards_of_test:vowels_said" else "asked:vowels" for word in DRAWING["grpo"]]
    accumulated = words(
        "rloo", "--rloo.device_batch_size", 2, "--rloo.num_iterations", 2, save_every=4, run_dir="again"
    )
    judged = words("rloo", "--reward-model", "judge", "--rloo.beta", 0.1, save_every=3, run_dir="judged")
    judged = [word for word in judged if word not in ("--reward", "rewards_of_test:vowels_said")]
    runs = [*(DRAWING[name] for name in ("ppo", "ppo-left", "ppo-lora", "rloo-lora")), asking, judged]
    data = processes // 2
    copies = "ddp_cpu" if data > 1 else "cpu"
    if data == 1:
        runs.append(accumulated)
    in_processes(copies, *(under(run, copies) for run in runs), processes=data, COMPLETIONS="short", NAME=copies)
    half_done("ppo-" + copies, f"further-{layout}", first=6, last=12)
    further = [*PPO, "--run-dir", "further"]
    started = [*runs, further]
    said = in_processes(
        layout,
        *(under(run, layout) for run in started),
        processes=processes,
        sizes=sizes,
        COMPLETIONS="short",
        NAME=layout,
    )
    assert said.count(f"layout     {description}") == len(started)
    assert "resumed    checkpoint-6" in said
    for run in started:
        directory = run[run.index("--run-dir") + 1]
        facts = [json.loads(Path(f"{directory}-{layout}/facts-{rank}.json").read_text()) for rank in range(processes)]
        for one in facts:
            assert not any(one["training"])
            for model in filter(None, (one, one["frozen"])):
                assert model["held"] == pytest.approx(1 / processes, rel=0.1), directory
            assert_columns(one, sizes.get("cp_size", 1))
        if run is further:
            assert_same(f"ppo-{copies}", f"{directory}-{layout}")
            continue
        assert_same(f"{directory}-{copies}", f"{directory}-{layout}")
        for rank in range(processes):
            like = json.loads(Path(f"{directory}-{copies}/facts-{rank // 2}.json").read_text())
            assert facts[rank]["drawn"] == like["drawn"] != []
    asked = {name: [path.read_text() for path in Path().glob(f"asked-{name}-*")] for name in (copies, layout)}
    assert sorted(asked[layout]) == sorted(asked[copies]) and len(asked[layout]) == data


@pytest.mark.slow
def test_two_copies_in_two_parts_learn_what_one_process_learns(pairs, monkeypatch):  # noqa: F811
    write_completions(monkeypatch.setattr)
    runs = [words(verb, save_every=3, batch_size=8) for verb in ("sft", "reward", "dpo", "kto")]
    runs += [DRAWING[name] for name in ("ppo", "ppo-lora", "grpo")]
    alone(*runs)
    sizes = {"dp_replicate_size": 2, "dp_shard_size": 2}
    in_processes("hsdp", *(under(run, "hsdp") for run in runs), processes=4, sizes=sizes, COMPLETIONS="written")
    for run in runs:
        directory = run[run.index("--run-dir") + 1]
        assert_same(directory, f"{directory}-hsdp")
        assert_in_force("hsdp", run)


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(pairs, monkeypatch):  # noqa: F811
    write_completions(monkeypatch.setattr)
    runs = {"sft": (RUNS["sft"], 3, 6), "ppo": (DRAWING["ppo"], 6, 12)}  # and the steps of their checkpoints
    alone(*(run for run, _, _ in runs.values()))
    for strategy in ("fsdp2", "ddp_cpu"):
        for name, (_, _, last) in runs.items():
            shutil.copytree(name, f"{name}-{strategy}")
            for gone in (f"checkpoint-{last}", "final"):
                shutil.rmtree(f"{name}-{strategy}/{gone}")
        said = in_processes(strategy, *(under(run, strategy) for run, _, _ in runs.values()), COMPLETIONS="written")
        for name, (_, first, _) in runs.items():
            assert f"checkpoint-{first}" in said
            assert_same(name, f"{name}-{strategy}")
    for name, (run, _, last) in runs.items():
        for gone in (f"checkpoint-{last}", "final"):
            shutil.rmtree(f"{name}-fsdp2/{gone}")
        alone(under(run, "fsdp2"))  # whose first checkpoint is still that of one process
        assert_same(name, f"{name}-fsdp2")


if __name__ == "__main__":
    ResumableTrainerMixin.train, GenerationMixin.generate = train, generate
    if os.environ.get("COMPLETIONS") == "written":
        write_completions(setattr)
    elif os.environ.get("COMPLETIONS") == "short":  # each token is the last with a chance of one in two
        ppo_trainer._stop_ids = grpo.stop_tokens = lambda *_: list(range(4, 400, 2))
    torch.set_num_threads(1)
    leave(max(main(run) for run in json.loads(sys.argv[1])))
