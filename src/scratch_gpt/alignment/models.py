"""The models that stages begin with."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from scratch_gpt.compute.precision import has_bf16
from scratch_gpt.distributed.dtensor import num_shards
from scratch_gpt.distributed.launch import launch_state
from scratch_gpt.errors import UserError
from scratch_gpt.model.loading import load_model


def load_for_training(settings: Any) -> tuple[Any, Any]:
    """The model of the settings, whole in float32, or its matrices frozen in 4 bits (NF4: Dettmers et al., 2023,
    arXiv:2305.14314); and its tokenizer.

    Raises:
        UserError: there is none, or it holds adapters only.
    """
    if not settings.load_in_4bit:
        return load_model(settings.model)
    dtype = torch.bfloat16 if has_bf16(launch_state().device) else torch.float32
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.model, quantization_config=quantized, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"{settings.model} cannot be loaded in 4 bits: {error}") from error
    if not any(parameter.dtype == torch.uint8 for parameter in model.parameters()):
        raise UserError(f"--load-in-4bit: no weight of {settings.model} could be packed into 4 bits")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation bitsandbytes 0.50 would pack the weights anew for a kernel that takes multiples of 64 inputs only.
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def load_reward_model(name_or_path: str) -> tuple[Any, Any]:
    """A sequence classifier with one score, and its tokenizer; of a language model, its body with a new head.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path} holds no model that could give scores: {error}") from error


def merge(model: Any, name_or_path: str, adapters: Path) -> Any:
    """``model``, which has adapters around it, as a plain one with them in its weights.

    What it began with may lie in 4 bits or in parts here; then that is loaded once more, and the saved adapters with it.
    """
    sharded = any(num_shards(parameter) > 1 for parameter in model.parameters())
    base = model.get_base_model()
    if not sharded and not getattr(base, "is_loaded_in_4bit", False):
        base.config.use_cache = True  # which Trainer switches off
        return model.merge_and_unload()
    from peft import PeftModel

    model_class: Any = next(one for one in type(base).__mro__ if not issubclass(one, FSDPModule))
    labels = {"num_labels": 1} if base.config.num_labels == 1 else {}
    fresh = model_class.from_pretrained(name_or_path, dtype=torch.float32, **labels)
    if fresh.can_generate():
        fresh.generation_config = base.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(fresh.config, name, getattr(base.config, name))
    return PeftModel.from_pretrained(fresh, adapters).merge_and_unload()


def shard(accelerator: Any, model: nn.Module, *modules: nn.Module) -> None:
    """Leave each process its part of ``model``: in place, before there is an optimizer, and once.

    Each block is gathered when it computes, and what is in none of them when ``modules`` (default: the whole model) are
    called, in float32. Accelerate shards one model, with its optimizer, and by what is called when all of it is called.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    settings = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(), **settings)
    for module in modules or (model,):
        if not isinstance(module, FSDPModule):  # one model may be two rewards
            fully_shard(module, **settings)


def context_of(model: Any) -> int:
    """The longest row that ``model`` reads."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1024))


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The model itself, where PEFT wraps it; its adapters are inside and stay in force."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
