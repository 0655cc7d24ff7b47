"""Load, shard and merge the models of the alignment recipes."""

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
    """Load the model of ``settings`` and its tokenizer.

    The model is in float32 or, with ``load_in_4bit``, its matrices are frozen in 4 bits (NF4: Dettmers et al., 2023,
    arXiv:2305.14314).

    Raises:
        UserError: there is no such model, it holds adapters only, or it cannot be quantized.
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
        raise UserError(f"--load-in-4bit: no weight of {settings.model} could be quantized to 4 bits")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes 0.50 repacks the weights in evaluation, for a kernel that needs a multiple of 64 inputs.
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def load_reference(settings: Any) -> PreTrainedModel | None:
    """Load the initial model again, frozen, as the reference; None with LoRA, where it is the model without its adapters."""
    if settings.lora_rank is not None:
        return None
    return load_model(settings.model)[0].eval().requires_grad_(False)


def load_reward_model(name_or_path: str) -> tuple[Any, Any]:
    """Load a sequence classifier with one label, and its tokenizer; a language model gets a new head.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path} cannot be loaded as a reward model: {error}") from error


def merge(model: Any, name_or_path: str, adapters: Path) -> Any:
    """Return the PEFT ``model`` as a plain one with its adapters merged into the weights.

    A quantized or sharded base cannot be merged in place: then it is loaded again from ``name_or_path``, with the saved
    ``adapters``.
    """
    sharded = any(num_shards(parameter) > 1 for parameter in model.parameters())
    base = model.get_base_model()
    if not sharded and not getattr(base, "is_loaded_in_4bit", False):
        base.config.use_cache = True  # Trainer switches it off
        return model.merge_and_unload()
    from peft import PeftModel

    model_class: Any = next(one for one in type(base).__mro__ if not issubclass(one, FSDPModule))
    labels = {"num_labels": 1} if base.config.num_labels == 1 else {}
    reloaded = model_class.from_pretrained(name_or_path, dtype=torch.float32, **labels)
    if reloaded.can_generate():
        reloaded.generation_config = base.generation_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(reloaded.config, name, getattr(base.config, name))
    return PeftModel.from_pretrained(reloaded, adapters).merge_and_unload()


def shard(accelerator: Any, model: nn.Module, *modules: nn.Module) -> None:
    """Shard ``model`` over the ranks with FSDP2, in place, once, before there is an optimizer.

    Each block is gathered while it computes; the parameters outside of the blocks while one of ``modules`` is called, in
    float32. Accelerate's own sharding takes a single model, with its optimizer, that is only called as a whole.

    Args:
        accelerator: Its FSDP plugin and mesh decide how.
        model: The model to shard.
        modules: The modules of ``model`` that are called from outside. Default: the model itself.
    """
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    options = {
        "reshard_after_forward": plugin.reshard_after_forward,
        "offload_policy": plugin.cpu_offload,
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(), **options)
    for module in modules or (model,):
        if not isinstance(module, FSDPModule):  # a model may serve as two rewards
            fully_shard(module, **options)


def context_length(model: Any) -> int:
    """The longest sequence that ``model`` takes, in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1024))


def max_length_for(model: Any, max_length: int | None) -> int:
    """The longest sequence to train on, in tokens: ``max_length`` (default: no limit), but at most the model's context."""
    return min(max_length or context_length(model), context_length(model))


def unwrap_peft(model: Any) -> PreTrainedModel:
    """Return the model inside PEFT's wrapper, or ``model`` itself; the adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
