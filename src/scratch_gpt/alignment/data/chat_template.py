"""Encode texts and conversations with the model's own tokenizer and chat template, in the same way for every recipe.

Two rules hold throughout:

1. Text stays text. If a user types `<|im_end|>`, those ten characters are encoded, not the special token that ends a turn;
   else whoever writes a prompt could put words into the assistant's mouth. Only the template writes special tokens.
2. Training sees the tokens that generation sees: a completion's tokens begin where its prompt's end, even if the tokenizer
   would merge the last character of one with the first of the other (two line breaks, say).
"""

import itertools
import re
from functools import lru_cache
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Messages: TypeAlias = list[dict[str, Any]]
"""Messages with `role` and `content`."""
Placeholders: TypeAlias = dict[str, str]
"""Special tokens that were typed as text, by the character that replaces each while the template renders the messages."""
PLACEHOLDER_CODE_POINTS = range(0xF0000, 0xFFFFE)
"""A private-use plane of Unicode: no character of a real text."""


# ------------------------------------------------------------------------------------------------ prompts and completions


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Return the ids of a text to continue, or of messages up to where the assistant's answer begins."""
    if isinstance(prompt, str):
        return [*_bos_ids(tokenizer, len(tokenizer)), *encode_text(tokenizer, prompt)]
    return encode_chat(tokenizer, prompt, add_generation_prompt=True)[0]


def encode_prompt_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt, and of a completion up to the token that ends it, as a policy would generate them.

    Raises:
        ValueError: the tokenizer has no such token, or its template does not append a completion to its prompt.
    """
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end of sequence, so a model could not learn to stop")
        return encode_prompt(tokenizer, prompt), [*encode_text(tokenizer, completion), tokenizer.eos_token_id]
    assert not isinstance(completion, str)
    messages, placeholders = _replace_special_tokens(tokenizer, prompt + completion)
    prompt_text, _ = _render(tokenizer, messages[: len(prompt)], add_generation_prompt=True)
    text, _ = _render(tokenizer, messages, add_generation_prompt=False)
    if not text.startswith(prompt_text):
        raise ValueError(
            "the chat template renders a prompt differently when an answer follows it, so training would not match generation"
        )
    end = end_of_turn(tokenizer)
    end_text = None if end is None else tokenizer.convert_ids_to_tokens(end)
    if end_text is None or end_text not in text[len(prompt_text) :]:
        raise ValueError(
            "the chat template puts no special token behind the assistant's turn: a model could not learn to stop"
        )
    stop = text.rindex(end_text) + len(end_text)  # the model need not write what follows, such as a line break
    prompt_ids, completion_ids = _encode_segments(tokenizer, text[:stop], [len(prompt_text)], placeholders)
    return prompt_ids, completion_ids


def eos_token_ids(tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> list[int]:
    """Return the ids that end a completion: the end of sequence and, in conversations, the end of the turn."""
    ids = [tokenizer.eos_token_id, end_of_turn(tokenizer) if is_chat else None]
    return list(dict.fromkeys(token for token in ids if token is not None))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token that the chat template puts after the assistant's content; None without one."""
    return _end_of_turn(tokenizer, _training_template(tokenizer))


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    answer = "the answer"
    messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": answer}]
    text, _ = _render(tokenizer, messages, add_generation_prompt=False)
    following = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False).input_ids
    is_special = following[:1] and tokenizer.convert_ids_to_tokens(following[0]) in tokenizer.added_tokens_encoder
    return following[0] if is_special else None


# ------------------------------------------------------------------------------------------------ texts


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of ``text``, without special tokens, even if it spells one.

    Raises:
        ValueError: the tokenizer cannot encode a special token's text except as that token.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    if special := _special_ids(tokenizer, len(tokenizer)).intersection(ids):
        raise ValueError(
            f"the text {text[:80]!r} contains the special token {tokenizer.convert_ids_to_tokens(min(special))}, which this "
            "tokenizer cannot encode as plain text: remove it"
        )
    return ids


# The size of the vocabulary is a parameter, and so part of the cache's key, because tokens may be added to a tokenizer.


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> frozenset[int]:
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special - {tokenizer.unk_token_id})  # the unknown token stands for text


@lru_cache(maxsize=8)
def _special_pattern(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> re.Pattern[str]:
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")" if texts else r"(?!)")


@lru_cache(maxsize=8)
def _bos_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """The ids that the tokenizer puts in front of every text: none, or a beginning of sequence."""
    plain, with_special = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    starts = (start for start in range(len(with_special)) if with_special[start : start + len(plain)] == plain)
    return tuple(with_special[: next(starts, 0)])


# ------------------------------------------------------------------------------------------------ conversations


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation, and the assistant mask: 1 where the template marks a token as the assistant's.

    Args:
        tokenizer: With a chat template.
        messages: The conversation.
        add_generation_prompt: End with the tokens that begin the assistant's answer.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not take these messages.
    """
    messages, placeholders = _replace_special_tokens(tokenizer, messages)
    text, spans = _render(tokenizer, messages, add_generation_prompt)
    segments = _encode_segments(tokenizer, text, [edge for span in spans for edge in span], placeholders)
    ids = [token for segment in segments for token in segment]
    mask = [index % 2 for index, segment in enumerate(segments) for _ in segment]  # every second one is the assistant's
    return ids, mask


def _replace_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[Messages, Placeholders]:
    """Replace each special token in ``messages`` by a character that they do not contain."""
    pattern = _special_pattern(tokenizer, len(tokenizer))
    for message in messages:
        if type(message.get("content")) is not str:
            raise ValueError(f"the content of the message {message!r} is not text")
    texts = [value for message in messages for value in message.values() if isinstance(value, str)]
    found = dict.fromkeys(special for text in texts for special in pattern.findall(text))
    if not found:
        return messages, {}
    used = set().union(*texts)
    unused = (chr(code) for code in PLACEHOLDER_CODE_POINTS if chr(code) not in used)
    placeholder_of = dict(zip(found, unused, strict=False))

    def replace(value: Any) -> Any:
        return pattern.sub(lambda match: placeholder_of[match.group()], value) if isinstance(value, str) else value

    replaced = [{key: replace(value) for key, value in message.items()} for message in messages]
    return replaced, {placeholder: special for special, placeholder in placeholder_of.items()}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation as the template writes it, and the (start, end) of each span of the assistant in it."""
    template = _training_template(tokenizer)
    try:
        (text,), spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=_has_generation_markers(template),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates may raise anything
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return text, spans[0] if spans else []


def _encode_segments(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: list[int], placeholders: Placeholders
) -> list[list[int]]:
    """Encode a rendered text in segments that begin and end at ``cuts``, so that no token spans a cut."""
    segments = [
        _encode_rendered(tokenizer, text[a:b], placeholders) for a, b in itertools.pairwise([0, *cuts, len(text)])
    ]
    ids = _encode_rendered(tokenizer, text, placeholders)
    if not cuts or list(itertools.chain(*segments)) == ids:
        return segments
    # Some tokenizers encode the beginning of a text differently, for example with a space in front of it. If no token of
    # the full text spans a cut, it is split there instead.
    prefixes = [_encode_rendered(tokenizer, text[:cut], placeholders) for cut in cuts]
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        return [ids[a:b] for a, b in itertools.pairwise([0, *map(len, prefixes), len(ids)])]
    return segments


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str, placeholders: Placeholders) -> list[int]:
    """Encode a rendered text: special tokens in it become tokens, placeholders become the text that they stand for."""
    if not any(placeholder in text for placeholder in placeholders):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids
    original = str.maketrans(placeholders)
    ids: list[int] = []
    for index, segment in enumerate(_special_pattern(tokenizer, len(tokenizer)).split(text)):
        if index % 2 == 1:  # `split` returns text and special tokens in turn
            ids.append(tokenizer.convert_tokens_to_ids(segment))
        elif segment:
            ids += encode_text(tokenizer, segment.translate(original))
    return ids


# ------------------------------------------------------------------------------------------------ templates


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if ``tokenizer`` has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: use a model whose tokenizer has one (`scratch-gpt tokenizer train` and "
            "`tokenizer train --from` add one before pretraining), or give plain texts with --plain-text continue"
        )


def require_generation_markers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the template does not mark the assistant's tokens, including the end of its turn."""
    problem = _generation_marker_problem(tokenizer, _training_template(tokenizer))
    if problem is not None:
        raise ValueError(problem)


@lru_cache(maxsize=8)
def _generation_marker_problem(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    if not _has_generation_markers(template):
        return (
            "the tokenizer's chat template does not mark what the assistant writes: put {% generation %} before the "
            "assistant's content and {% endgeneration %} after the token that ends its turn"
        )
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    special = _special_ids(tokenizer, len(tokenizer))
    if not any(assistant and token in special for token, assistant in zip(ids, mask, strict=True)):
        return (
            "the chat template puts the token that ends the assistant's turn outside of {% generation %}: the model would "
            "never learn to stop"
        )
    return None


def _has_generation_markers(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template; for well-known models without generation markers, TRL's equivalent with markers."""
    require_chat_template(tokenizer)
    return _add_generation_markers(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _add_generation_markers(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    from trl.chat_template_utils import get_training_chat_template

    if _has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError:  # TRL does not know the template
        return template
