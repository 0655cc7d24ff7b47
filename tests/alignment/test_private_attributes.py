"""The private and undocumented parts of other libraries that the alignment code relies on.

An upgrade of transformers, trl, accelerate, peft or torch that changes one of them fails here, by name. The last two tests
keep the lists complete: they find what the code overrides or reads.
"""

import ast
import importlib
import inspect
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from accelerate import Accelerator, ParallelismConfig
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import GradientState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.utils import RepeatSampler

import scratch_gpt.alignment
from scratch_gpt.alignment.dpo import ResumableDPOTrainer
from scratch_gpt.alignment.grpo import ResumableGRPOTrainer, ResumableRLOOTrainer
from scratch_gpt.alignment.kto import ResumableKTOTrainer
from scratch_gpt.alignment.ppo.trainer import PPOTrainer
from scratch_gpt.alignment.reward import ResumableRewardTrainer
from scratch_gpt.alignment.sft import ResumableSFTTrainer
from scratch_gpt.alignment.trainer_parallel import ShardedStepOptimizer
from scratch_gpt.model import ScratchGPTForCausalLM

TRL_TRAINERS = (SFTTrainer, RewardTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer)

SIGNATURES = {
    # transformers: private methods that are overridden
    Trainer._save_checkpoint: "self, model, trial",
    Trainer._load_from_checkpoint: "self, resume_from_checkpoint, model",
    Trainer._load_optimizer_and_scheduler: "self, checkpoint",
    Trainer._load_rng_state: "self, checkpoint",
    Trainer._wrap_model: "self, model, training, dataloader",
    Trainer._track_num_input_tokens: "self, inputs",
    Trainer._get_grad_norm: "self, model, grad_norm",
    Trainer._clip_grad_norm: "self, model",
    Trainer._prepare_inputs: "self, inputs",
    Trainer._save: "self, output_dir, state_dict",
    Trainer._get_train_sampler: "self, train_dataset",
    # transformers: public methods without documentation that are overridden or called
    Trainer.create_accelerator_and_postprocess: "self",
    Trainer.create_optimizer: "self, model",
    Trainer.get_tp_size: "self",
    Trainer.get_train_dataloader: "self",
    Trainer.log: "self, logs, start_time",
    Trainer.store_flos: "self",
    Trainer.training_step: "self, model, inputs, num_items_in_batch",
    Trainer.compute_loss: "self, model, inputs, return_outputs, num_items_in_batch",
    Trainer.evaluate: "self, eval_dataset, ignore_keys, metric_key_prefix",
    # trl
    **{trainer._save_checkpoint: "self, model, trial" for trainer in TRL_TRAINERS},
    DPOTrainer._prepare_dataset: "self, dataset, processing_class, args, dataset_name",
    KTOTrainer._prepare_dataset: "self, dataset, processing_class, args, dataset_name",
    GRPOTrainer._tokenize_prompts: "self, prompts",
    RLOOTrainer._tokenize_prompts: "self, prompts",
    GRPOTrainer._generate: "self, prompts",
    RLOOTrainer._generate: "self, prompts",
    GRPOTrainer._generate_single_turn: (
        "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images"
    ),
    RLOOTrainer._generate_single_turn: "self, prompt_ids, images, multimodal_fields",
    GRPOTrainer._load_optimizer_and_scheduler: "self, checkpoint",
    GRPOTrainer._get_train_sampler: "self, dataset",
    RLOOTrainer._get_train_sampler: "self, dataset",
    # accelerate
    Accelerator.prepare_model: "self, model, device_placement, evaluation_mode",
    Accelerator.backward: "self, loss, kwargs",
}
"""Methods of other libraries, and the parameters that overrides and calls rely on."""

FUNCTIONS = {
    "trl.models.utils:add_hooks": "model",
    "trl.models.utils:remove_hooks": "model",
    "trl.chat_template_utils:get_training_chat_template": None,
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling": None,
    "transformers.utils.chat_template_utils:render_jinja_template": None,
    "transformers.trainer:TRAINER_STATE_NAME": None,
    "transformers.utils:TRANSFORMERS_DYNAMIC_MODULE_NAME": None,
    "peft:load_peft_weights": None,
    "peft:set_peft_model_state_dict": None,
}
"""Imports that these libraries do not document, and their parameters where they are called with more than names."""

READ_ATTRIBUTES = {"_is_accelerate_prepared", "_forward_pre_hooks", "_hf_hook", "_no_split_modules"}
"""Private attributes that the code reads or sets on objects of other libraries; each has a test below."""

TRAINERS = (
    ResumableSFTTrainer,
    ResumableRewardTrainer,
    ResumableDPOTrainer,
    ResumableKTOTrainer,
    ResumableGRPOTrainer,
    ResumableRLOOTrainer,
    PPOTrainer,
)


def parameters(function):
    return ", ".join(inspect.signature(function).parameters)


def source(thing):
    return inspect.getsource(thing)


def test_versions_are_the_pinned_ones():
    found = {module.__name__: module.__version__.split(".")[:2] for module in (transformers, trl, peft)}
    assert found == {"transformers": ["5", "23"], "trl": ["1", "16"], "peft": ["0", "21"]}


@pytest.mark.parametrize("method", SIGNATURES, ids=lambda method: method.__qualname__)
def test_signature_of_method(method):
    assert parameters(method) == SIGNATURES[method]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_undocumented_import_exists(name):
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert FUNCTIONS[name] is None or parameters(found) == FUNCTIONS[name]


# ---------------------------------------------------------------------------------------------------- transformers


def test_trainer_calls_the_private_methods_that_are_overridden():
    text = source(Trainer)
    for call in (
        "self._save_checkpoint(model, trial)",
        "self._wrap_model(self.model_wrapped)",
        "self._track_num_input_tokens(inputs)",
        "self._clip_grad_norm(model)",
        "self._get_grad_norm(model",
        "self._load_optimizer_and_scheduler(",
        "self._load_rng_state(",
        "self._load_from_checkpoint(",
    ):
        assert call in text, call


def test_trainer_attributes():
    text = source(Trainer)
    for attribute in ("self.loss_is_scaled_for_ga", "self.is_fsdp_enabled", "self.is_deepspeed_enabled"):
        assert attribute in text, attribute
    assert "num_input_tokens_seen" in {field.name for field in fields(transformers.TrainerState)}


def test_trainer_gathers_a_sharded_module_for_its_method_generate():
    assert 'register_fsdp_forward_method(self.model, "generate")' in source(Trainer)


def test_trainer_decides_on_checkpoints_in_its_first_callback():
    """`_StopCallback` is inserted at position 1, after it."""
    from transformers.trainer import DEFAULT_CALLBACKS
    from transformers.trainer_callback import DefaultFlowCallback

    assert DEFAULT_CALLBACKS[0] is DefaultFlowCallback
    assert "control.should_save = True" in source(DefaultFlowCallback)


def test_models_name_their_blocks():
    assert hasattr(PreTrainedModel, "_no_split_modules") and ScratchGPTForCausalLM._no_split_modules


# ---------------------------------------------------------------------------------------------------- trl


def test_repeat_sampler_attributes():
    sampler = RepeatSampler(range(4), mini_repeat_count=1, batch_size=2, seed=0)
    assert sampler.num_samples == 4 and sampler.batch_size == 2 and isinstance(sampler.generator, torch.Generator)


def test_group_trainers_call_the_private_methods_that_are_overridden():
    for trainer in (GRPOTrainer, RLOOTrainer):
        text = source(trainer)
        for call in ("self._tokenize_prompts(", "self._generate(", "self._generate_single_turn("):
            assert call in text, (trainer, call)


def test_kto_trainer_says_whether_it_needs_kl_completions():
    assert "self.calculate_KL" in source(KTOTrainer) and "KL_completion_ids" in source(KTOTrainer)


def test_fused_lm_head_returns_what_the_sft_evaluation_sums():
    from trl.trainer import utils

    text = source(utils)
    assert all(re.search(rf"\b{name}: torch.Tensor \| None", text) for name in ("log_probs", "is_top1", "label_mask"))
    assert "fused_lm_head" in text


def test_sft_collator_returns_position_ids_of_packed_sequences():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    assert "return_position_ids" in {field.name for field in fields(DataCollatorForLanguageModeling)}


# ---------------------------------------------------------------------------------------------------- accelerate


def test_accelerate_skips_what_is_marked_as_prepared():
    for method in (Accelerator.prepare_model, Accelerator.prepare_optimizer):
        assert "_is_accelerate_prepared" in source(method)
    assert ShardedStepOptimizer._is_accelerate_prepared and not ShardedStepOptimizer.step_was_skipped
    assert "step_was_skipped" in source(Accelerator.optimizer_step_was_skipped.fget)


def test_accelerate_marks_its_forward_hooks():
    module = nn.Linear(1, 1)
    add_hook_to_module(module, ModelHook())
    assert hasattr(module, "_hf_hook") and "forward" in module.__dict__
    remove_hook_from_module(module)
    assert not hasattr(module, "_hf_hook")


def test_accelerate_synchronizes_each_batch_on_request():
    assert isinstance(GradientState().plugin_kwargs, dict)
    assert 'plugin_kwargs.get("sync_each_batch"' in source(Trainer)


def test_accelerate_finds_model_parallel_ranks_by_the_device_mesh_of_its_state():
    assert "self.state.device_mesh" in source(Accelerator.torch_device_mesh.fget)
    assert isinstance(ParallelismConfig.fsdp_dim_names, property)


def test_fsdp_plugin_settings():
    names = {field.name for field in fields(FullyShardedDataParallelPlugin)}
    assert names >= {
        "auto_wrap_policy", "mixed_precision_policy", "cpu_ram_efficient_loading", "reshard_after_forward",
        "cpu_offload",
    }  # fmt: skip
    assert isinstance(Accelerator.is_fsdp2, property)


# ---------------------------------------------------------------------------------------------------- torch and others


def test_torch_keeps_forward_pre_hooks_by_the_id_of_their_handle():
    module = nn.Linear(1, 1)
    handle = module.register_forward_pre_hook(print)
    assert module._forward_pre_hooks[handle.id] is print


def test_torch_schedule_state():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = schedule.state_dict()
    assert state.keys() >= {"last_epoch", "_step_count", "_last_lr"}
    assert schedule.base_lrs == [1.0] and len(schedule.lr_lambdas) == 1


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_repacks_weights_by_a_flag():
    import bitsandbytes

    assert "self.support_avx512bf16_for_cpu" in source(bitsandbytes.nn.Linear4bit)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_registers_its_hooks_where_generation_removes_them():
    from deepspeed.runtime.zero import parameter_offload, stage3

    assert "self.parameter_offload" in source(stage3)
    assert "self.fwd_pre_hook" in source(parameter_offload)


# ---------------------------------------------------------------------------------------------------- completeness


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def is_ours(owner):
    return owner.__module__.startswith("scratch_gpt.")


def test_every_private_method_that_a_trainer_overrides_is_listed():
    listed = {method.__qualname__ for method in SIGNATURES}
    for trainer in TRAINERS:
        theirs = [owner for owner in trainer.__mro__ if not is_ours(owner) and owner is not object]
        for name in {name for owner in trainer.__mro__ if is_ours(owner) for name in vars(owner) if is_private(name)}:
            overridden = next((owner for owner in theirs if name in vars(owner)), None)
            if overridden is not None and callable(getattr(overridden, name)):
                assert vars(overridden)[name].__qualname__ in listed, (trainer.__name__, name)


def test_every_private_attribute_of_another_librarys_object_is_listed():
    trees = [ast.parse(file.read_text()) for file in Path(scratch_gpt.alignment.__path__[0]).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)}
    set_on_self = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    by_string = {
        node.args[1].value
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr")
        and isinstance(node.args[1], ast.Constant)
        and is_private(node.args[1].value)
    }
    assert used - ours - set_on_self | by_string == READ_ATTRIBUTES
