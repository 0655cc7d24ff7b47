import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scratch_gpt.config import TokenizerSettings
from scratch_gpt.data.encoding import encode
from scratch_gpt.data.tokenizer import SPECIAL_TOKENS, fingerprint, load_tokenizer, train_tokenizer
from scratch_gpt.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "  two  spaces , and a comma",
        "don't, she'll",
        "naïve 👩🏽‍🚀 日本語 \u200b\x00",
        "a\r\nb\tc",
        "<|endoftext|>",
    ],
)
def test_awkward_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_reserved_ids(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == 400


def test_special_tokens_typed_in_a_document_stay_text(tokenizer_folder):
    backend = load_tokenizer(tokenizer_folder).backend_tokenizer
    [(ids, num_bytes)] = encode(["a<|endoftext|>b"], backend)
    assert not set(ids) & {0, 1, 2, 3}
    assert backend.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"
    assert num_bytes == len("a<|endoftext|>b")


def test_chat_template_marks_exactly_the_assistants_tokens(tokenizer):
    messages = [
        {"role": "user", "content": "Who is she?"},
        {"role": "assistant", "content": "Miss Bennet."},
        {"role": "user", "content": "And he?"},
        {"role": "assistant", "content": "Mr. Darcy."},
    ]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [token for token, mark in zip(out["input_ids"], out["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "Miss Bennet.<|im_end|>Mr. Darcy.<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert prompt == "<|im_start|>user\nWho is she?<|im_end|>\n<|im_start|>assistant\n"
    assert whole.startswith(prompt)


def test_vocabulary_larger_than_the_text_supports_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 5000, but the corpus supports only \d+ tokens"):
        train_tokenizer(["too little text for so many tokens"], TokenizerSettings(vocab_size=5000))


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="bytes and special tokens alone need 260"):
        train_tokenizer(["text"], TokenizerSettings(vocab_size=259))


def test_training_text_is_capped():
    capped = train_tokenizer(["aaaa bbbb\n"] * 10 + ["zyzy zyzy\n"] * 50, TokenizerSettings(262, max_characters=90))
    assert not any("zy" in token for token in capped.get_vocab())


def test_fingerprint_differs_between_tokenizers(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + " ")
    assert fingerprint(tmp_path) != fingerprint(tokenizer_folder)


def test_missing_tokenizer_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(UserError, match="scratch-gpt tokenizer train"):
        load_tokenizer(tmp_path)
