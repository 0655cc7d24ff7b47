"""Texts and conversations to tokens, by the base model's own tokenizer and chat template: one way for every stage.

What a person wrote stays text. A user who types `<|im_end|>` gets those ten characters and not the token that ends a turn,
else whoever writes the prompt could put words into the assistant's mouth. Special tokens come from the template alone.

And what is learnt is what will be asked: an answer's tokens begin where the prompt's end, though answer and prompt, written
in one go, might share one (two line breaks, say).
"""

import itertools
import re
from functools import lru_cache
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

Messages: TypeAlias = list[dict[str, Any]]
"""Turns with `role` and `content`."""
Hidden: TypeAlias = dict[str, str]
"""Special tokens that are text, by the characters that stand for them while a template writes the conversation."""
PRIVATE = range(0xF0000, 0xFFFFE)
"""A plane of Unicode that has no characters, to take such stand-ins from."""


# ------------------------------------------------------------------------------------------------ texts


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of ``text`` as it stands, without special tokens, whatever it holds.

    Raises:
        ValueError: the tokenizer knows no other way to write a special token that the text holds than by that token.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    if smuggled := _special_ids(tokenizer, len(tokenizer)).intersection(ids):
        raise ValueError(
            f"the text {text[:80]!r} holds the special token {tokenizer.convert_ids_to_tokens(min(smuggled))}, which this "
            "tokenizer cannot take for text: take it out"
        )
    return ids


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """``size``: of the vocabulary, in case tokens are added."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special - {tokenizer.unk_token_id})  # which stands for text, if for any


@lru_cache(maxsize=8)
def _special_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")" if texts else r"(?!)")


@lru_cache(maxsize=8)
def _beginning(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[int, ...]:
    """What the tokenizer puts before every text: nothing, or a beginning of sequence."""
    text, marked = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    starts = (start for start in range(len(marked)) if marked[start : start + len(text)] == text)
    return tuple(marked[: next(starts, 0)])


# ------------------------------------------------------------------------------------------------ conversations


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and for each whether the template says that the assistant writes it (1) or not (0).

    ``answer``: up to where the assistant begins to answer.

    Raises:
        ValueError: the tokenizer has no chat template, or the template does not take these messages.
    """
    disguised, hidden = _hide(tokenizer, messages)
    text, spans = _render(tokenizer, disguised, answer)
    pieces = _encode_apart(tokenizer, text, [edge for span in spans for edge in span], hidden)
    ids = [token for piece in pieces for token in piece]
    return ids, [
        number % 2 for number, piece in enumerate(pieces) for _ in piece
    ]  # every second one is the assistant's


def _hide(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[Messages, Hidden]:
    """``messages`` with a character for each special token in them, which no message has; and what the characters mean."""
    pattern = _special_pattern(tokenizer, len(tokenizer))
    for message in messages:
        if type(message.get("content")) is not str:
            raise ValueError(f"the message {message!r} has no text as its content")
    texts = [value for message in messages for value in message.values() if isinstance(value, str)]
    found = dict.fromkeys(special for text in texts for special in pattern.findall(text))
    if not found:
        return messages, {}
    taken = set().union(*texts)
    spare = (chr(code) for code in PRIVATE if chr(code) not in taken)
    stand_ins = dict(zip(found, spare, strict=False))

    def replaced(value: Any) -> Any:
        return pattern.sub(lambda special: stand_ins[special.group()], value) if isinstance(value, str) else value

    disguised = [{key: replaced(value) for key, value in message.items()} for message in messages]
    return disguised, {stand_in: special for special, stand_in in stand_ins.items()}


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, answer: bool) -> tuple[str, list[tuple[int, int]]]:
    """The template's text, and from where to where the assistant writes it."""
    template = _template(tokenizer)
    try:
        (text,), spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=_is_marked(template),
            add_generation_prompt=answer,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return text, spans[0] if spans else []


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str, cuts: list[int], hidden: Hidden) -> list[list[int]]:
    """Ids of what lies before, between and behind ``cuts`` of a template's text, none of them over a cut."""
    pieces = [_encode(tokenizer, text[a:b], hidden) for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = _encode(tokenizer, text, hidden)
    if not cuts or list(itertools.chain(*pieces)) == whole:
        return pieces
    # Some tokenizers write the beginning of a text otherwise than its middle, so that pieces are not what the whole is of.
    heads = [_encode(tokenizer, text[:cut], hidden) for cut in cuts]
    if all(whole[: len(head)] == head for head in heads):
        return [whole[a:b] for a, b in itertools.pairwise([0, *map(len, heads), len(whole)])]
    return pieces


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, hidden: Hidden) -> list[int]:
    """Ids of a template's text: its special tokens are tokens, those that are hidden in it are text."""
    if not any(stand_in in text for stand_in in hidden):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False).input_ids
    revealed = str.maketrans(hidden)
    ids: list[int] = []
    for number, piece in enumerate(_special_pattern(tokenizer, len(tokenizer)).split(text)):
        is_special = number % 2 == 1
        ids += [tokenizer.convert_tokens_to_ids(piece)] if is_special else []
        ids += encode_text(tokenizer, piece.translate(revealed)) if piece and not is_special else []
    return ids


# ------------------------------------------------------------------------------------------------ templates


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError if ``tokenizer`` has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: take a model whose tokenizer has one (`scratch-gpt tokenizer train` and "
            "`tokenizer train --from` give it one before pretraining), or give plain texts with --plain-text continue"
        )


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    require_template(tokenizer)
    return _training_template(tokenizer, tokenizer.get_chat_template())


@lru_cache(maxsize=8)
def _training_template(tokenizer: PreTrainedTokenizerBase, own: str) -> str:
    """``own``; of well-known models whose template does not mark the assistant's words, TRL has one that does."""
    from trl.chat_template_utils import get_training_chat_template

    if _is_marked(own):
        return own
    try:
        return get_training_chat_template(tokenizer) or own
    except ValueError:  # it knows none
        return own


def _is_marked(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def require_generation_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError if the template does not say which tokens are the assistant's, the end of its turn included."""
    problem = _problem_with_marks(tokenizer, _template(tokenizer))
    if problem is not None:
        raise ValueError(problem)


@lru_cache(maxsize=8)
def _problem_with_marks(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    if not _is_marked(template):
        return (
            "the tokenizer's chat template does not mark what the assistant writes: put {% generation %} before the "
            "assistant's content and {% endgeneration %} after the token that ends its turn"
        )
    ids, mask = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    special = _special_ids(tokenizer, len(tokenizer))
    if not any(one and token in special for token, one in zip(ids, mask, strict=True)):
        return (
            "the chat template leaves the token that ends the assistant's turn outside of {% generation %}: the model would "
            "never learn to stop"
        )
    return None


# ------------------------------------------------------------------------------------------------ prompts and answers


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> list[int]:
    """Ids of a text that is to go on, or of messages up to where the assistant answers."""
    if isinstance(prompt, str):
        return [*_beginning(tokenizer, len(tokenizer)), *encode_text(tokenizer, prompt)]
    return encode_chat(tokenizer, prompt, answer=True)[0]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, answer: str | Messages
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of an answer to it up to the token that ends it, as a policy would draw them.

    Raises:
        ValueError: the tokenizer has no such token, or its template does not put an answer behind its prompt.
    """
    if isinstance(prompt, str):
        assert isinstance(answer, str)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end of sequence, so a model could not learn to stop")
        return encode_prompt(tokenizer, prompt), [*encode_text(tokenizer, answer), tokenizer.eos_token_id]
    assert not isinstance(answer, str)
    disguised, hidden = _hide(tokenizer, prompt + answer)
    asked, _ = _render(tokenizer, disguised[: len(prompt)], answer=True)
    text, _ = _render(tokenizer, disguised, answer=False)
    if not text.startswith(asked):
        raise ValueError(
            "the chat template writes a prompt otherwise when an answer follows it: what is learnt would not be what is asked"
        )
    end = end_of_turn(tokenizer)
    written = None if end is None else tokenizer.convert_ids_to_tokens(end)
    if written is None or written not in text[len(asked) :]:
        raise ValueError(
            "the chat template puts no special token behind the assistant's turn: a model could not learn to stop"
        )
    stop = text.rindex(written) + len(written)  # what follows it, a line break say, nobody has to write
    prompt_ids, answer_ids = _encode_apart(tokenizer, text[:stop], [len(asked)], hidden)
    return prompt_ids, answer_ids


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after the assistant's words; None if it puts none."""
    return _end_of_turn(tokenizer, _template(tokenizer))


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    marker = "the answer"
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": marker}]
    text, _ = _render(tokenizer, turns, answer=False)
    after = tokenizer(text[text.rindex(marker) + len(marker) :], add_special_tokens=False).input_ids
    special = after[:1] and tokenizer.convert_ids_to_tokens(after[0]) in tokenizer.added_tokens_encoder
    return after[0] if special else None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """What ends an answer: the end of sequence, and in conversations the end of the turn."""
    found = [tokenizer.eos_token_id, end_of_turn(tokenizer) if chat else None]
    return list(dict.fromkeys(token for token in found if token is not None))
