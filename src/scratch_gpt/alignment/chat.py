"""Texts and conversations to tokens, by the base model's own tokenizer and chat template: one way for every stage.

What a person wrote stays text. A user who types `<|im_end|>` gets those ten characters and not the token that ends a turn,
else whoever writes the prompt could put words into the assistant's mouth. Special tokens come from the template alone.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
"""Turns with `role` and `content`."""

_DISGUISE = 0xF0000
"""Start of a private plane of Unicode, whose characters no text and no template has a use for."""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` as it stands, without special tokens, whatever it holds.

    Raises:
        ValueError: the tokenizer knows no other way to write a special token that the text holds than by that token.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if smuggled := sorted({id for id in ids if id in _special_ids(tokenizer)}):
        raise ValueError(
            f"the text {text[:80]!r} holds the special token {tokenizer.convert_ids_to_tokens(smuggled[0])}, which this "
            "tokenizer cannot take for text: take it out"
        )
    return ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and for each whether the template says that the assistant writes it (1) or not (0).

    ``answer``: up to where the assistant begins to answer.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not take these roles.
    """
    require_template(tokenizer)
    disguised, secrets = _disguise(tokenizer, messages)
    marked = _marks_the_assistant(tokenizer)
    try:
        encoded = tokenizer.apply_chat_template(
            disguised,
            add_generation_prompt=answer,
            return_dict=True,
            return_assistant_tokens_mask=marked and not answer,
            tokenizer_kwargs={"return_offsets_mapping": True} if secrets else {},
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    ids = list(encoded["input_ids"])
    mask = list(encoded["assistant_masks"]) if marked and not answer else [0] * len(ids)
    if secrets:
        text = tokenizer.apply_chat_template(disguised, add_generation_prompt=answer, tokenize=False)
        ids, mask = _undisguise(tokenizer, text, ids, mask, encoded["offset_mapping"])
    return ids, mask


def _disguise(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[Messages, bool]:
    """``messages`` with every special token in them in characters that the tokenizer takes for nothing of its own."""
    specials = sorted(special_texts(tokenizer), key=len, reverse=True)
    found = False
    disguised = []
    for message in messages:
        content = message["content"]
        for special in specials:
            if special in content:
                content, found = content.replace(special, "".join(chr(_DISGUISE + ord(c)) for c in special)), True
        disguised.append({**message, "content": content})
    return (disguised, True) if found else (messages, False)


def _undisguise(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: list[int],
    mask: list[int],
    offsets: Sequence[tuple[int, int]],
) -> tuple[list[int], list[int]]:
    """The tokens of disguised stretches of ``text`` replaced by those of what they stand for."""
    plain_ids: list[int] = []
    plain_mask: list[int] = []
    position = 0
    while position < len(ids):
        start = offsets[position][0]
        if not _is_disguised(text[start : start + 1]):
            plain_ids.append(ids[position])
            plain_mask.append(mask[position])
            position += 1
            continue
        first, end = position, start
        while end < len(text) and _is_disguised(text[end]):
            end += 1
        while position < len(ids) and offsets[position][0] < end:
            position += 1
        assert offsets[position - 1][1] <= end, "a token reaches out of what stands for a special token"
        new = encode_text(tokenizer, "".join(chr(ord(c) - _DISGUISE) for c in text[start:end]))
        plain_ids += new
        plain_mask += [mask[first]] * len(new)
    return plain_ids, plain_mask


def _is_disguised(character: str) -> bool:
    return bool(character) and _DISGUISE <= ord(character) < _DISGUISE + 0xFFFE


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """How the tokens are written that text may not become."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError if ``tokenizer`` has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: give messages to a model whose tokenizer has one "
            "(`scratch-gpt tokenizer train --from` adds one), or plain texts with --data.plain-text continue"
        )


def _marks_the_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None


def require_generation_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError if the template does not say which tokens are the assistant's, the end of its turn included."""
    require_template(tokenizer)
    if not _marks_the_assistant(tokenizer):
        raise ValueError(
            "the tokenizer's chat template does not mark what the assistant writes: put {% generation %} before the "
            "assistant's content and {% endgeneration %} after the token that ends its turn"
        )
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    special = set(tokenizer.all_special_ids)
    if not any(one and token in special for token, one in zip(ids, mask, strict=True)):
        raise ValueError(
            "the chat template leaves the token that ends the assistant's turn outside of {% generation %}: the model would "
            "never learn to stop"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Ids of a text that is to go on, or of messages up to where the assistant answers."""
    return encode_text(tokenizer, prompt) if isinstance(prompt, str) else encode_chat(tokenizer, prompt, answer=True)[0]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, answer: str | Messages
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of an answer to it up to the token that ends it, as a policy would draw them.

    Raises:
        ValueError: the tokenizer has no such token, or its template does not put an answer behind its prompt.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end of sequence, so a model could not learn to stop")
        return prompt_ids, [*encode_text(tokenizer, answer), tokenizer.eos_token_id]
    assert not isinstance(answer, str)
    ids, _ = encode_chat(tokenizer, prompt + answer)
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            "the chat template writes a prompt otherwise when an answer follows it: what is learnt would not be what is asked"
        )
    end = end_of_turn(tokenizer)
    if end is None or end not in ids[len(prompt_ids) :]:
        raise ValueError(
            "the chat template puts no special token behind the assistant's turn: a model could not learn to stop"
        )
    last = len(ids) - ids[::-1].index(end)  # what follows it, a line break say, nobody has to write
    return prompt_ids, ids[len(prompt_ids) : last]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after the assistant's words; None if it puts none."""
    marker = "the answer"
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = tokenizer(text[text.rindex(marker) + len(marker) :], add_special_tokens=False).input_ids
    special = after[:1] and tokenizer.convert_ids_to_tokens(after[0]) in tokenizer.added_tokens_encoder
    return after[0] if special else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """What ends an answer: the end of sequence, and in conversations the end of the turn."""
    found = [tokenizer.eos_token_id, end_of_turn(tokenizer) if chat else None]
    return list(dict.fromkeys(token for token in found if token is not None))
