"""The models that stages begin with."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from scratch_gpt.errors import UserError
from scratch_gpt.training.build import load_model


def load_for_training(settings: Any) -> tuple[Any, Any]:
    """The model of the settings, whole in float32, or frozen in 4 bits; and its tokenizer.

    Raises:
        UserError: there is none, or it holds adapters only.
    """
    if not settings.load_in_4bit:
        return load_model(settings.model)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.model, quantization_config=quantized)
        return model, AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"{settings.model} cannot be loaded in 4 bits: {error}") from error


def load_scorer(name_or_path: str) -> tuple[Any, Any]:
    """A sequence classifier with one score, and its tokenizer; of a language model, its body with a new head.

    Raises:
        UserError: there is no such model.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, num_labels=1, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path} holds no model that could give scores: {error}") from error


def context_of(model: Any) -> int:
    """The longest row that ``model`` reads."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 1024))
