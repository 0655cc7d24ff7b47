"""Documents to token ids, fast.

Nearly all words of a text have been met before. For a byte-level BPE tokenizer whose rule for cutting words is a known
one, :class:`WordEncoder` cuts with Python's ``re`` and looks the words up in a dictionary, and only a new word goes
through the merges: about five times as fast on one core as ``tokenizers`` (benchmarks/data_prepare.py), with the same
ids. Other tokenizers encode with :class:`BackendEncoder`.

Special tokens that stand in the text are text: only this package writes control tokens.
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
"""Bounds of the dictionary: number of words (the first ones, which are the frequent ones), and their characters."""
WINDOW = 2**20
"""Characters of a long document that are cut into words at a time."""
LONGEST_WORD = 2**22
"""A word of more characters than this is merged in parts. No text holds one: it is a file of letters without a space."""

# Where words are cut before merging. In the manner of GPT-4's tokenizer: contractions, a word with one leading space or
# sign, up to three digits, punctuation with its line breaks, white space; and as GPT-2 does.
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def word_pattern(words: str, digits: int) -> str:
    """The rule ``words`` ("gpt4", "gpt2") with runs of up to ``digits`` digits, for a ``Split`` of tokenizers."""
    run = rf"\p{{N}}{{1,{digits}}}" if digits > 1 else r"\p{N}"
    return (GPT4_WORDS.replace(r"\p{N}{1,3}", run)) if words == "gpt4" else GPT2_WORDS.replace(r"\p{N}+", run, 1)


KNOWN_PATTERNS = {word_pattern(words, digits) for words in ("gpt4", "gpt2") for digits in (1, 2, 3)} | {GPT2_WORDS}


class Encoder(Protocol):
    def encode(self, text: str) -> bytes:
        """Little-endian token ids of one document."""


class BackendEncoder:
    """What ``tokenizers`` says, for any tokenizer."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.tokenizer, self.dtype = tokenizer, dtype
        tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> bytes:
        [encoding] = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=self.dtype).tobytes()


class WordEncoder:
    """The same ids by way of a dictionary of words. ``pattern`` is one of :data:`KNOWN_PATTERNS`.

    A document longer than :data:`WINDOW` is cut into words a window at a time, so that memory stays flat.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, pattern: str):
        letters, numbers, spaces = (_characters(of) for of in (r"\p{L}", r"\p{N}", r"\s"))
        self.cut = re.compile(_as_re(pattern, letters, numbers, spaces)).findall
        self.ids_of = _Words(tokenizer, dtype).__getitem__

    def encode(self, text: str) -> bytes:
        return b"".join([b"".join(map(self.ids_of, words)) for words in self.words(text)])

    def words(self, text: str) -> Iterator[list[str]]:
        """The words of ``text``, some at a time."""
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
        # Python's re is slow with sets of characters beyond 16 bits: cut a text with others of their class instead.
        alike = self.cut(_ASTRAL.sub(lambda found: _representative(found.group()), text))
        ends = list(itertools.accumulate(map(len, alike), initial=0))
        return [text[start:end] for start, end in itertools.pairwise(ends)]


class _Words(dict[str, bytes]):
    """Word to ids; a new word goes through the merges."""

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
    """The fastest encoder that gives the tokenizer's ids."""
    pattern = known_pattern(tokenizer)
    return BackendEncoder(tokenizer, dtype) if pattern is None else WordEncoder(tokenizer, dtype, pattern)


def known_pattern(tokenizer: Tokenizer) -> str | None:
    """The rule by which a plain byte-level BPE tokenizer cuts words, or None where it is anything else."""
    rules = json.loads(tokenizer.to_str())
    if rules["normalizer"] is not None or rules["model"]["type"] != "BPE" or rules["model"]["dropout"]:
        return None
    if not all(token["special"] for token in rules["added_tokens"]):
        return None  # such a token is cut out of the text before anything else
    cutter = rules["pre_tokenizer"] or {}
    steps = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
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
    """(token ids, UTF-8 bytes) of each document, by ``tokenizers`` itself, several documents at a time on all cores."""
    tokenizer.encode_special_tokens = True
    for batch in in_batches(documents):
        for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            yield encoding.ids, len(text.encode("utf-8"))


def in_batches(documents: Iterable[str], characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Lists of documents, each of about so many characters."""
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
    """The characters of 16 bits that ``tokenizers`` takes for ``regex``, as ranges for Python's ``re``.

    Asked of its own engine, because each library has its own version of Unicode.
    """
    plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    cutter = pre_tokenizers.Split(Regex(regex + "+"), "removed", invert=True)
    codes = [ord(character) for run, _ in cutter.pre_tokenize_str(plane) for character in run]
    starts = [code for before, code in zip([-2, *codes], codes, strict=False) if code != before + 1]
    ends = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if after != code + 1]
    return "".join(rf"\u{start:04x}-\u{end:04x}" for start, end in zip(starts, ends, strict=True))


@cache
def _representative(character: str) -> str:
    """A character of 16 bits, without upper and lower case, of the same class as one beyond them."""
    for regex, stand_in in ((r"\p{L}", "\u05d0"), (r"\p{N}", "\u00b2"), (r"\s", "\u2003")):
        if not pre_tokenizers.Split(Regex(regex), "removed").pre_tokenize_str(character):
            return stand_in
    return "\u00a1"


def _as_re(pattern: str, letters: str, numbers: str, spaces: str) -> str:
    r"""``pattern`` for Python's ``re``, which knows neither \p{L} nor \p{N} and has another \s."""
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
    """The character that stands for each byte in byte-level BPE: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return dict(zip(visible, visible, strict=True)) | {byte: 0x100 + place for place, byte in enumerate(hidden)}
