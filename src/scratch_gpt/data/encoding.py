"""Fast encoding of documents to token ids.

Nearly all words of a text repeat. For a byte-level BPE tokenizer whose split pattern is known, :class:`WordEncoder`
splits the text with Python's ``re`` and looks each word up in a dictionary; only a new word goes through the merges.
On one core this is about five times as fast as `tokenizers` (benchmarks/data_prepare.py), with the same ids. All other
tokenizers use :class:`BackendEncoder`.

Special tokens that occur in a document are encoded as ordinary text: only this package inserts control tokens.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Protocol

import numpy as np
from tokenizers import Regex, Tokenizer, pre_tokenizers

BATCH_CHARACTERS = 4_000_000
CACHED_WORDS, CACHED_LENGTH = 2**18, 64
"""Limits of the word cache: number of words (the first ones found, so mostly frequent ones) and characters per word."""
WINDOW = 2**20
"""Characters of a long document that are split into words at a time."""
LONGEST_WORD = 2**22
"""Longest word, in characters, that is merged at once; a longer one (a file without spaces) is merged in chunks."""

# How text is split into words before merging. GPT-4 style: contractions, a word with one leading space or sign, up to
# three digits, punctuation with its line breaks, white space. Then GPT-2's own pattern.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def word_pattern(split_pattern: str, max_digits: int) -> str:
    """Return the regex of a `tokenizers` ``Split``: "gpt4" or "gpt2" words, numbers in runs of up to ``max_digits``."""
    run = rf"\p{{N}}{{1,{max_digits}}}" if max_digits > 1 else r"\p{N}"
    if split_pattern == "gpt4":
        return GPT4_WORDS.replace(r"\p{N}{1,3}", run)
    return GPT2_WORDS.replace(r"\p{N}+", run, 1)


KNOWN_PATTERNS = {word_pattern(name, digits) for name in ("gpt4", "gpt2") for digits in (1, 2, 3)} | {GPT2_WORDS}


class Encoder(Protocol):
    """Encodes one document at a time."""

    def encode(self, text: str) -> bytes:
        """Return the token ids of one document as little-endian bytes of the encoder's dtype."""


def special_tokens_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of ``tokenizer`` that encodes special tokens in a text as ordinary text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


class BackendEncoder:
    """Encodes with the `tokenizers` library itself, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.tokenizer, self.dtype = special_tokens_as_text(tokenizer), dtype

    def encode(self, text: str) -> bytes:
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=self.dtype).tobytes()


class WordEncoder:
    """Encodes by looking words up in a cache. ``pattern`` is one of :data:`KNOWN_PATTERNS`.

    A document longer than :data:`WINDOW` characters is split a window at a time, so that memory stays constant.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, pattern: str):
        letters, numbers, spaces = (_characters(of) for of in (r"\p{L}", r"\p{N}", r"\s"))
        self.cut = re.compile(_as_re(pattern, letters, numbers, spaces)).findall
        self.ids_of = _Words(tokenizer, dtype).__getitem__

    def encode(self, text: str) -> bytes:
        return b"".join([b"".join(map(self.ids_of, words)) for words in self.words(text)])

    def words(self, text: str) -> Iterator[list[str]]:
        """Yield the words of ``text`` in order, one list per window."""
        start, size = 0, WINDOW
        while len(text) - start > size:
            words = self._words(text[start : start + size])
            # A word's end is certain where no white space precedes it and two characters after it have been seen.
            length, margin = size, 0
            while words and (margin < 2 or words[-1][-1].isspace()):
                margin += len(words[-1])
                length -= len(words.pop())
            if words:
                yield words
                start, size = start + length, WINDOW
            else:
                size *= 2
        yield self._words(text[start:])

    def _words(self, text: str) -> list[str]:
        if not _ASTRAL.search(text):
            return self.cut(text)
        # Python's re is slow with character sets beyond 16 bits: substitute 16-bit characters of the same class first.
        similar = self.cut(_ASTRAL.sub(lambda found: _representative(found.group()), text))
        ends = list(itertools.accumulate(map(len, similar), initial=0))
        return [text[start:end] for start, end in itertools.pairwise(ends)]


class _Words(dict[str, bytes]):
    """Cache from a word to its token ids; a missing word goes through the merges."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.model, self.dtype = tokenizer.model, dtype
        self.alphabet = _byte_alphabet()

    def __missing__(self, word: str) -> bytes:
        if len(word) > LONGEST_WORD:
            parts = (word[start : start + LONGEST_WORD] for start in range(0, len(word), LONGEST_WORD))
            return b"".join(map(self.__getitem__, parts))
        tokens = self.model.tokenize(word.encode("utf-8").decode("latin-1").translate(self.alphabet))
        ids = np.asarray([token.id for token in tokens], dtype=self.dtype).tobytes()
        if len(self) < CACHED_WORDS and len(word) <= CACHED_LENGTH:
            self[word] = ids
        return ids


def make_encoder(tokenizer: Tokenizer, dtype: str) -> Encoder:
    """Return the fastest encoder that is exact for ``tokenizer``; ``dtype`` is "<u2" or "<u4"."""
    pattern = known_pattern(tokenizer)
    return BackendEncoder(tokenizer, dtype) if pattern is None else WordEncoder(tokenizer, dtype, pattern)


def known_pattern(tokenizer: Tokenizer) -> str | None:
    """Return the split pattern of a plain byte-level BPE tokenizer, or None for any other tokenizer."""
    rules = json.loads(tokenizer.to_str())
    if rules["normalizer"] is not None or rules["model"]["type"] != "BPE" or rules["model"]["dropout"]:
        return None
    if not all(token["special"] for token in rules["added_tokens"]):
        return None  # a non-special added token is matched before the split
    pre_tokenizer = rules["pre_tokenizer"] or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return GPT2_WORDS
    if len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        if pattern in KNOWN_PATTERNS and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return pattern
    return None


def encode(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, UTF-8 bytes) of each document, encoded by `tokenizers` in batches on all cores.

    Special tokens in a document are encoded as ordinary text.
    """
    tokenizer = special_tokens_as_text(tokenizer)
    for batch in in_batches(documents):
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            yield encoding.ids, len(text.encode("utf-8"))


def in_batches(documents: Iterable[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Group documents into lists of about ``characters`` characters each."""
    batch: list[str] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += len(document)
        if filled >= characters:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


# ------------------------------------------------------------------------------------------------ classes of characters

_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


@cache
def _characters(regex: str) -> str:
    """Return the 16-bit characters that match ``regex`` in `tokenizers`, as ranges for Python's ``re``.

    Computed with the regex engine of `tokenizers`, because each library has its own version of Unicode.
    """
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    split = pre_tokenizers.Split(Regex(regex + "+"), "removed", invert=True)
    codes = [ord(character) for run, _ in split.pre_tokenize_str(plane) for character in run]
    starts = [code for before, code in zip([-2, *codes], codes, strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if after != code + 1]
    return "".join(rf"\u{start:04x}-\u{end:04x}" for start, end in zip(starts, ends, strict=True))


@cache
def _representative(character: str) -> str:
    """Return a caseless 16-bit character of the same class as ``character``, which lies beyond 16 bits."""
    for regex, stand_in in ((r"\p{L}", "\u05d0"), (r"\p{N}", "\u00b2"), (r"\s", "\u2003")):
        if not pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(character):
            return stand_in
    return "\u00a1"


def _as_re(pattern: str, letters: str, numbers: str, spaces: str) -> str:
    r"""Translate ``pattern`` for Python's ``re``, which knows neither \p{L} nor \p{N} and defines \s differently."""
    inside = {r"\p{L}": letters, r"\p{N}": numbers, r"\s": spaces}

    def replace(found: re.Match[str]) -> str:
        if found.group() == r"\S":
            return f"[^{spaces}]"
        brackets = found.group() if found.group().startswith("[") else f"[{found.group()}]"
        for name, ranges in inside.items():
            brackets = brackets.replace(name, ranges)
        return brackets

    return re.sub(r"\[[^\]]*\]|\\p\{[LN]\}|\\[sS]", replace, pattern)


def _byte_alphabet() -> dict[int, int]:
    """Map each byte to its character in byte-level BPE: itself if visible, otherwise the next one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return dict(zip(visible, visible, strict=True)) | {byte: 0x100 + index for index, byte in enumerate(hidden)}
