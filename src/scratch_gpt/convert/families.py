"""Conversion between ScratchGPT models and transformers' stock classes.

    from scratch_gpt.convert.families import from_hf, to_hf

    ours = from_hf("path/of/a/llama")            # a folder, a name on the Hub, or a model in memory
    stock = to_hf(ours, "auto")                  # the first stock class that can express it, here LlamaForCausalLM

Nothing is approximated: the logits are equal up to float rounding, and a model that no stock class can express is refused
with a message that names the unsupported fields. `family_tables.py` describes each architecture.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from scratch_gpt.convert.family_tables import FAMILIES, Family
from scratch_gpt.convert.tensor_conversion import SafetensorsFolder, TensorConversion, check_names, tensor_conversions
from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig
from scratch_gpt.model.modeling_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTPreTrainedModel,
)

logger = transformers.utils.logging.get_logger(__name__)

OUR_CLASSES = {"CausalLM": ScratchGPTForCausalLM, "SequenceClassification": ScratchGPTForSequenceClassification}


# ------------------------------------------------------------------------------------------------ models


def _head_of(class_name: str) -> str:
    return "SequenceClassification" if class_name.endswith("ForSequenceClassification") else "CausalLM"


def from_hf(model_or_path: PreTrainedModel | str | Path) -> ScratchGPTPreTrainedModel:
    """Convert a stock GPT-2, Llama, Mistral, Qwen2, Qwen3 or SmolLM3 to a ScratchGPT model with the same logits.

    Args:
        model_or_path: a model in memory (its weights are copied), the folder of a saved model, or a name on the Hub.

    Returns:
        The language model (or the sequence classifier, if that is what was given), in evaluation mode, in the dtype of
        the source, with its generation config.

    Raises:
        ValueError: an unsupported model or feature, or weights that do not fit the config.
    """
    if isinstance(model_or_path, PreTrainedModel):
        stock = model_or_path
        config = from_hf_config(stock.config)
        return _convert(stock, OUR_CLASSES[_head_of(type(stock).__name__)], config, FAMILIES[stock.config.model_type])
    folder = Path(model_or_path)
    if not folder.is_dir():
        folder = _download(str(model_or_path))
    with open_folder(folder, to=None) as conversion:
        state = {tensor.target: tensor.convert(conversion.read) for tensor in conversion.tensors}
    model = _build(conversion.model_class, conversion.config, state)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def to_hf(model: ScratchGPTPreTrainedModel, to: str = "auto") -> PreTrainedModel:
    """Convert a ScratchGPT model to a stock model of transformers with the same logits; `model` is not modified.

    Args:
        to: "gpt2", "llama", "qwen3", "qwen2", "mistral", "smollm3", or "auto" for the first that can express it.

    Raises:
        ValueError: no class can express it; the message names the fields.
    """
    head = _head_of(type(model).__name__)
    family = choose_family(model.config, to)
    config = to_hf_config(model.config, family.model_type, head)
    return _convert(model, getattr(transformers, family.class_names[head]), config, family)


def _convert(source: PreTrainedModel, target_class, config: PreTrainedConfig, family: Family):
    tensors = source.state_dict()
    conversions = tensor_conversions(target_class, config, family)
    check_names(conversions, tensors, type(source).__name__)
    state = {conversion.target: conversion.convert(tensors.__getitem__) for conversion in conversions}
    model = _build(target_class, config, state, source.config._attn_implementation)
    if model.can_generate() and getattr(source, "generation_config", None) is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(source.generation_config.to_dict())
    return model


def _build(model_class, config: PreTrainedConfig, state: dict[str, torch.Tensor], attention: str | None = None):
    dtype = next(tensor.dtype for tensor in state.values())
    return model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention
    ).eval()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(f"{name} is neither a folder here nor a model that can be downloaded from the Hub") from error


# ------------------------------------------------------------------------------------------------ saved folders


@dataclass(frozen=True)
class FolderConversion:
    """The conversion of a saved model to another class; tensors are read one at a time."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    tensors: list[TensorConversion]
    read: Callable[[str], torch.Tensor]


@contextmanager
def open_folder(folder: Path, to: str | None) -> Iterator[FolderConversion]:
    """Prepare to convert the model saved in `folder` to our class (`to=None`), or from our class to the family `to`.

    Raises:
        ValueError: an unsupported model, or weights that do not fit its config.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} contains no config.json: give the folder of a saved model")
    source_config = AutoConfig.from_pretrained(folder)
    ours = source_config.model_type == ScratchGPTConfig.model_type
    if ours and to is None:
        raise ValueError(f"{folder} is a {source_config.model_type} model already: no import is needed")
    if not ours and to is not None:
        raise ValueError(f"{folder} is a {source_config.model_type} model, not a ScratchGPT model: import it first")
    head = _head_of((source_config.architectures or [""])[0])
    if to is None:
        config, family = from_hf_config(source_config), FAMILIES.get(source_config.model_type)
        model_class: type[PreTrainedModel] = OUR_CLASSES[head]
        prefix = getattr(transformers, family.class_names[head]).base_model_prefix
    else:
        family = choose_family(source_config, to)
        config = to_hf_config(source_config, family.model_type, head)
        model_class, prefix = getattr(transformers, family.class_names[head]), "transformer"
    with ExitStack() as stack:
        source = SafetensorsFolder(folder, prefix, stack)
        tensors = tensor_conversions(model_class, config, family)
        check_names(tensors, source, str(folder))
        yield FolderConversion(config, model_class, tensors, source.read)


# ------------------------------------------------------------------------------------------------ configs


def unsupported_fields(config: ScratchGPTConfig, family: Family) -> list[str]:
    """The fields of `config` that `family` cannot express, each with the reason; empty if it can express all."""
    found = [
        f"{name}={getattr(config, name)!r}: this class supports only {value!r}"
        for name, value in family.fixed.items()
        if getattr(config, name) != value
    ]
    return found + [problem for check in family.checks if (problem := check(config)) is not None]


def choose_family(config: ScratchGPTConfig, to: str = "auto") -> Family:
    """The family named `to`; for "auto" the first that can express `config`.

    Raises:
        ValueError: no such family, or the family cannot express `config`; the message names the fields.
    """
    if to != "auto" and to not in FAMILIES:
        raise ValueError(f"no family {to!r}: the choices are auto, {', '.join(FAMILIES)}")
    refusals = []
    for name in FAMILIES if to == "auto" else [to]:
        problems = unsupported_fields(config, FAMILIES[name])
        if not problems:
            return FAMILIES[name]
        refusals.append(f"  {FAMILIES[name].class_names['CausalLM']}: " + "; ".join(problems))
    subject = "no stock class can" if to == "auto" else "this stock class cannot"
    raise ValueError(f"{subject} express this model, because of\n" + "\n".join(refusals))


def to_hf_config(config: ScratchGPTConfig, to: str = "auto", head: str = "CausalLM") -> PreTrainedConfig:
    """The stock config that expresses `config`.

    Raises:
        ValueError: the class `to`, or for "auto" every class, cannot express it; the message names the fields.
    """
    family = choose_family(config, to)
    fields = {theirs: getattr(config, ours) for ours, theirs in family.fields.items()}
    for name in ("hidden_dropout", "embedding_dropout"):
        if name not in family.fields and getattr(config, name):
            logger.warning(f"{name}={getattr(config, name)} is not exported: {family.model_type} has no such dropout.")
    if family.model_type == "smollm3" and config.no_rope_layers is None:
        fields["no_rope_layers"] = [1] * config.num_hidden_layers
    if family.model_type == "mistral":
        fields["sliding_window"] = config.sliding_window if "sliding_attention" in config.layer_types else None
    if family.uses_window:
        fields["layer_types"] = list(config.layer_types)
        fields["use_sliding_window"] = "sliding_attention" in config.layer_types
        fields["sliding_window"] = config.sliding_window if fields["use_sliding_window"] else None
    if isinstance(fields.get("rope_parameters"), dict):
        fields["rope_parameters"] = dict(fields["rope_parameters"])
    if head == "SequenceClassification":
        fields["num_labels"] = config.num_labels
    stock = AutoConfig.for_model(family.model_type, **fields)
    stock.architectures, stock.dtype = [family.class_names[head]], config.dtype
    return stock


def from_hf_config(config: PreTrainedConfig) -> ScratchGPTConfig:
    """The `ScratchGPTConfig` that expresses a stock config.

    Raises:
        ValueError: it cannot be expressed; the message names the model type or the fields.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type={config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[config.model_type]
    problems = [
        f"{name}={getattr(config, name)!r}: only {value!r} is supported"
        for name, value in family.required_stock_values
        if getattr(config, name) != value
    ]
    if problems:
        raise ValueError(f"this {config.model_type} model cannot be converted, because of " + "; ".join(problems))

    fields = {**family.fixed, **{ours: getattr(config, theirs, None) for ours, theirs in family.fields.items()}}
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if family.model_type == "mistral" and window is not None:
        fields |= {"sliding_window": window, "layer_types": ["sliding_attention"] * layers}
    if family.uses_window and "sliding_attention" in config.layer_types:
        fields |= {"sliding_window": window, "layer_types": list(config.layer_types)}
    if fields.get("no_rope_layers") == [1] * layers:
        fields["no_rope_layers"] = None
    if fields.get("attention_dropout") is None:
        fields["attention_dropout"] = 0.0
    return ScratchGPTConfig(**fields, num_labels=config.num_labels, dtype=config.dtype)
