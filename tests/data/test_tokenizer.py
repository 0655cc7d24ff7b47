"""Training, saving, completing and comparing tokenizers."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from scratch_gpt.cli import main
from scratch_gpt.config import TokenizerSettings
from scratch_gpt.data.encoding import encode
from scratch_gpt.data.tokenizer import SPECIAL_TOKENS, any_tokenizer, fingerprint, load_tokenizer, train_tokenizer
from scratch_gpt.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=200))
def test_encoding_and_decoding_any_text_is_lossless(tokenizer, text):
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
def test_encoding_and_decoding_difficult_text_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == 400


def test_special_tokens_in_a_document_are_encoded_as_text(tokenizer_folder):
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
    conversation = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert prompt == "<|im_start|>user\nWho is she?<|im_end|>\n<|im_start|>assistant\n"
    assert conversation.startswith(prompt)


def test_a_vocabulary_larger_than_the_text_supports_is_refused():
    with pytest.raises(UserError, match=r"vocab_size is 5000, but the corpus supports only \d+ tokens"):
        train_tokenizer(["too little text for so many tokens"], TokenizerSettings(vocab_size=5000))


def test_a_vocabulary_smaller_than_bytes_and_special_tokens_is_refused():
    with pytest.raises(UserError, match="bytes and special tokens alone need 260"):
        train_tokenizer(["text"], TokenizerSettings(vocab_size=259))


def test_max_characters_limits_the_training_text():
    capped = train_tokenizer(["aaaa bbbb\n"] * 10 + ["zyzy zyzy\n"] * 50, TokenizerSettings(262, max_characters=90))
    assert not any("zy" in token for token in capped.get_vocab())


def test_the_fingerprint_differs_between_tokenizers(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + " ")
    assert fingerprint(tmp_path) != fingerprint(tokenizer_folder)


def test_the_message_about_a_missing_tokenizer_names_the_command_that_trains_one(tmp_path):
    with pytest.raises(UserError, match="scratch-gpt tokenizer train"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("words", ["gpt2", "gpt4"])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_split_pattern_and_max_digits_are_in_effect(words, digits):
    text = "1234567 people!\n\nIt's 2024, (they say) 99 of 1000.\n" * 30
    settings = TokenizerSettings(265, split_pattern=words, max_digits=digits)
    split = train_tokenizer([text], settings).pre_tokenizer.pre_tokenize_str
    runs = [word for word, _ in split("1234567")]
    assert "".join(runs) == "1234567"
    assert {len(run) for run in runs[:-1]} == {digits}
    words_found = [word for word, _ in split("a(they")]
    assert words_found == (["a", "(they"] if words == "gpt4" else ["a", "(", "they"])


def test_max_document_characters_limits_each_document():
    settings = TokenizerSettings(261, max_document_characters=50)
    tokenizer = train_tokenizer(["ab " * 20 + "zy" * 500], settings)
    assert not any("zy" in token for token in tokenizer.get_vocab())


def test_an_existing_tokenizer_is_saved_with_missing_tokens_added(tokenizer_folder, tmp_path, capsys):
    assert main(["tokenizer", "train", "--from", str(tokenizer_folder), "--output", str(tmp_path / "same")]) == 0
    assert "added" not in capsys.readouterr().out
    assert fingerprint(tmp_path / "same") == fingerprint(tokenizer_folder)

    bare = load_tokenizer(tokenizer_folder).backend_tokenizer
    rules = json.loads(bare.to_str())
    rules["added_tokens"] = []
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert main(["tokenizer", "train", "--from", str(tmp_path / "bare"), "--output", str(tmp_path / "full")]) == 0
    printed = capsys.readouterr().out
    for what in ("eos_token <|endoftext|>", "pad_token <|pad|>", "chat template"):
        assert f"added: {what}" in printed
    full = load_tokenizer(tmp_path / "full")
    assert (full.eos_token, full.pad_token) == ("<|endoftext|>", "<|pad|>")
    text = "It is a truth, universally acknowledged."
    assert full(text)["input_ids"] == load_tokenizer(tokenizer_folder)(text)["input_ids"]
    assert full.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )


def test_vocab_and_merges_files_load_as_the_gpt2_tokenizer(shared_data, tmp_path):
    folder = shared_data / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path)
    text = "Hello   world's 12345\n\n naïve 👩🏽‍🚀"
    assert any_tokenizer(str(tmp_path))(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_a_tokenizer_without_an_end_of_text_is_refused_by_prepare(tokenizer_folder, corpus, tmp_path, capsys):
    rules = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    rules["added_tokens"] = []
    rules["model"]["vocab"] = {
        ("<|other|>" if k == "<|endoftext|>" else k): v for k, v in rules["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    arguments = ["--corpus", str(corpus), "--tokenizer-path", str(tmp_path), "--output", str(tmp_path / "data")]
    assert main(["data", "prepare", *arguments]) == 2
    assert "neither <|endoftext|> nor an eos_token" in capsys.readouterr().err


def test_report_compares_tokenizers_on_each_text(tokenizer_folder, corpus, tmp_path, capsys):
    (tmp_path / "all.txt").write_text("e" * 10 + "\n<|endoftext|>\n" + "e" * 10)
    lower = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    lower["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "tokenizer.json").write_text(json.dumps(lower))
    (tmp_path / "lower" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    lists = [
        "--tokenizers",
        f"[{tokenizer_folder},{tmp_path / 'lower'}]",
        "--texts",
        f"[{corpus},{tmp_path / 'all.txt'}]",
    ]
    assert main(["tokenizer", "report", *lists]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["text", "bytes", "tokenizer", "vocabulary", "bytes/token", "in", "use", "round", "trip"]
    assert len(rows) == 4
    assert rows[0].endswith("exact")
    assert rows[1].endswith("30 of 30 documents differ")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    seen = set(tokenizer("e" * 10)["input_ids"])
    assert f"{20 / (2 * len(tokenizer('e' * 10)['input_ids'])):.3f}" in rows[2]
    assert f"{len(seen) / 400:.1%}" in rows[2]
