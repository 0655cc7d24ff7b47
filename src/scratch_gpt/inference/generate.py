"""Continue text: `scratch-gpt generate`."""

import dataclasses
from typing import TYPE_CHECKING

from scratch_gpt.config import GenerateSettings
from scratch_gpt.console import print0
from scratch_gpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE_TOKENS = 80


def continuations(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, settings: GenerateSettings
) -> list[str]:
    """``num_return_sequences`` texts that begin with ``prompt``; the prompt itself comes back exactly.

    Raises:
        UserError: prompt and new tokens do not fit into the model's context.
    """
    import torch
    from transformers import GenerationConfig

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"] if prompt else torch.tensor([[tokenizer.bos_token_id]])
    room = model.config.max_position_embeddings - ids.shape[1]
    if settings.max_new_tokens > room:
        raise UserError(
            f"the prompt has {ids.shape[1]} tokens and --max-new-tokens is {settings.max_new_tokens}, but the model "
            f"takes {model.config.max_position_embeddings} in all: ask for at most {max(room, 0)}"
        )
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    generation = GenerationConfig(
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
            ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device), generation_config=generation
        )
    new = output[:, ids.shape[1] :]
    return [prompt + tokenizer.decode(row, skip_special_tokens=True) for row in new]


def samples(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: list[str], seed: int) -> list[str]:
    """One short continuation of each prompt, as long as the model's context has room."""
    room = model.config.max_position_embeddings - max(len(tokenizer(prompt)["input_ids"]) or 1 for prompt in prompts)
    settings = GenerateSettings(max_new_tokens=min(SAMPLE_TOKENS, room))
    return [
        continuations(model, tokenizer, prompt, dataclasses.replace(settings, seed=seed + number))[0]
        for number, prompt in enumerate(prompts)
    ]


def generate_command(settings: GenerateSettings) -> None:
    """`scratch-gpt generate`."""
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(settings.model)
    for text in continuations(model, tokenizer, settings.prompt, settings):
        print0(text)
        print0()
