"""The fast encoder gives the same ids as `tokenizers`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from scratch_gpt.data import encoding
from scratch_gpt.data.encoding import (
    GPT2_WORDS,
    KNOWN_PATTERNS,
    BackendEncoder,
    WordEncoder,
    known_pattern,
    make_encoder,
    word_pattern,
)
from scratch_gpt.data.tokenizer_report import measure

DIFFICULT = [
    "",
    " ",
    "  two  spaces , and\ta tab ",
    "\n\n \n x\r\n\r\n  y",
    "don't she'LL we'Ve 'S 'ſ it's'",
    "12345678 1,234.5 ½ ² ٣٤٥ Ⅷ",
    "naïve 日本語 \u200b\x00 \u3000wide \x85next\xa0hard",
    "👩🏽‍🚀👩🏽‍🚀 𝒜𝓑𝟙𝟚 \U000e0001 𐍈𐍉",
    "<|endoftext|><|im_start|>",
    "!!!???...\n\n--- (a)[b]{c}",
    "\x1c\x1d\x1e\x1f\x0b\x0c control",
    "\ufeffbom \ud7ff\ue000\uffff",
]


def tokenizer_with(pattern, tokenizer_folder) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    if pattern == GPT2_WORDS:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]
        )
    return tokenizer


@pytest.fixture(scope="module", params=sorted(KNOWN_PATTERNS))
def encoders(request, tokenizer_folder):
    tokenizer = tokenizer_with(request.param, tokenizer_folder)
    fast = make_encoder(tokenizer, "<u2")
    assert isinstance(fast, WordEncoder)
    return fast, BackendEncoder(tokenizer, "<u2")


def test_difficult_texts_get_the_same_ids(encoders):
    fast, backend = encoders
    for text in [*DIFFICULT, "".join(DIFFICULT), " ".join(reversed(DIFFICULT))]:
        assert fast.encode(text) == backend.encode(text), text


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.one_of(st.sampled_from(" \n\r\t'stlaA1.,é👩\u3000²"), st.characters(codec="utf-8")), max_size=60)
)
def test_any_text_gets_the_same_ids(encoders, text):
    fast, backend = encoders
    assert fast.encode(text) == backend.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("  \n\r\t'srela1.é👩"), max_size=40), window=st.integers(1, 12))
@example(text="\n\n  \nx", window=4)
@example(text="a'rex", window=3)
def test_a_long_document_is_split_into_windows_at_word_boundaries(encoders, text, window):
    fast, _ = encoders
    expected = [word for window_words in fast.words(text) for word in window_words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "WINDOW", window)
        assert [word for window_words in fast.words(text) for word in window_words] == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
def test_every_unicode_character_is_split_as_tokenizers_splits_it(pattern, tokenizer_folder):
    fast = WordEncoder(Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")), "<u2", pattern)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    characters = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x110000)]]
    for form in ("{0}", "a{0}b", "1{0}2", "'{0}", "'l{0}x", " {0}{0} ", " {0}a", "\n{0}\n", "!{0}!\n"):
        for start in range(0, len(characters), 4096):
            text = "".join("\u4e00 . " + form.format(character) for character in characters[start : start + 4096])
            words = [word for window_words in fast.words(text) for word in window_words]
            assert words == [word for word, _ in split.pre_tokenize_str(text)]


def test_a_very_long_word_is_merged_in_chunks(encoders, monkeypatch):
    fast, backend = encoders
    text = "a" * 5000 + " b"
    monkeypatch.setattr(encoding, "WINDOW", 100)
    assert fast.encode(text) == backend.encode(text)
    monkeypatch.setattr(encoding, "LONGEST_WORD", 1000)
    fast.ids_of.__self__.clear()
    tokenizer = backend.tokenizer
    assert tokenizer.decode(np.frombuffer(fast.encode(text), dtype="<u2").tolist()) == text


def test_the_word_cache_is_bounded(tokenizer_folder, monkeypatch):
    monkeypatch.setattr(encoding, "CACHED_WORDS", 10)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    fast, backend = make_encoder(tokenizer, "<u4"), BackendEncoder(tokenizer, "<u4")
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(300))
    assert fast.encode(text) == backend.encode(text)
    assert len(fast.ids_of.__self__) == 10


def change(path, value):
    """Return a function that sets one value of a parsed tokenizer.json."""

    def changed(rules):
        *parents, last = path
        for key in parents:
            rules = rules[key]
        rules[last] = value

    return changed


@pytest.mark.parametrize(
    "changed",
    [
        change(["normalizer"], json.loads(normalizers.NFC().__getstate__())),
        change(["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], r"\w+|\W+"),
        change(["pre_tokenizer", "pretokenizers", 0, "behavior"], "MergedWithNext"),
        change(["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True),
        change(["pre_tokenizer"], None),
        change(["added_tokens", 1, "special"], False),
        change(["model", "dropout"], 0.1),
    ],
)
def test_an_unknown_bpe_variant_is_encoded_by_tokenizers(changed, tokenizer_folder):
    rules = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    assert known_pattern(Tokenizer.from_str(json.dumps(rules))) == word_pattern("gpt4", 3)
    changed(rules)
    tokenizer = Tokenizer.from_str(json.dumps(rules))
    assert known_pattern(tokenizer) is None
    assert isinstance(make_encoder(tokenizer, "<u2"), BackendEncoder)


def test_a_word_level_tokenizer_is_encoded_by_tokenizers():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    assert np.frombuffer(make_encoder(tokenizer, "<u2").encode("b a c"), dtype="<u2").tolist() == [1, 0, 2]


@pytest.mark.parametrize("use", ["encode", "backend", "measure"])
def test_the_callers_tokenizer_is_not_changed(use, tokenizer_folder):
    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    text = "one<|endoftext|>two"
    before = backend.encode(text).ids
    if use == "encode":
        [(ids, _)] = list(encoding.encode([text], backend))
        assert len(ids) > len(before)  # the special token is spelled out
    elif use == "backend":
        BackendEncoder(backend, "<u2").encode(text)
    else:
        measure(SimpleNamespace(backend_tokenizer=backend), [text])
    assert not backend.encode_special_tokens
    assert backend.encode(text).ids == before
