"""Continue a prompt: `scratch-gpt generate`."""

import dataclasses
from typing import TYPE_CHECKING

from scratch_gpt.config import GenerateSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_TOKENS = 80
"""Longest continuation of :func:`generate_samples`."""


def generate_command(settings: GenerateSettings) -> None:
    """`scratch-gpt generate`."""
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(settings.model)
    for text in generate(model, tokenizer, settings.prompt, settings):
        print0(text)
        print0()


def generate(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, settings: GenerateSettings
) -> list[str]:
    """Generate ``num_return_sequences`` continuations of ``prompt``, each returned with the exact prompt before it.

    An empty prompt starts a document. ``temperature`` 0 is greedy decoding, which has one result.

    Raises:
        UserError: prompt and new tokens do not fit into the model's context.
    """
    import torch
    from transformers import GenerationConfig

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.tensor([[tokenizer.bos_token_id]])
    prompt_length, context_length = ids.shape[1], model.config.max_position_embeddings
    if prompt_length + settings.max_new_tokens > context_length:
        raise UserError(
            f"the prompt has {prompt_length} tokens and --max-new-tokens is {settings.max_new_tokens}, but the model "
            f"takes {context_length} in all: ask for at most {max(context_length - prompt_length, 0)}"
        )
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    generation_config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_return_sequences=settings.num_return_sequences if settings.temperature > 0 else 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if settings.temperature > 0 else {"do_sample": False}),
    )
    torch.manual_seed(settings.seed)
    model.eval()
    with torch.no_grad():
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            generation_config=generation_config,
        )
    completions = output[:, prompt_length:]
    return [prompt + tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]


def generate_samples(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[str], seed: int
) -> list[str]:
    """One short continuation of each prompt, shortened to what the model's context allows."""
    longest_prompt = max(len(tokenizer(prompt)["input_ids"]) or 1 for prompt in prompts)
    max_new_tokens = min(SAMPLE_TOKENS, model.config.max_position_embeddings - longest_prompt)
    settings = GenerateSettings(max_new_tokens=max_new_tokens)
    return [
        generate(model, tokenizer, prompt, dataclasses.replace(settings, seed=seed + number))[0]
        for number, prompt in enumerate(prompts)
    ]
