"""The byte-level BPE tokenizer: trained on a stream of text, saved so that ``AutoTokenizer`` loads it.

Byte-level BPE (Sennrich et al., 2016, arXiv:1508.07909; bytes as in GPT-2, Radford et al., 2019) has a token for each
of the 256 bytes, so decoding returns any text exactly.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from scratch_gpt.config import TokenizerSettings, TokenizerTrainSettings
from scratch_gpt.data.encoding import word_pattern
from scratch_gpt.data.sources import split_documents
from scratch_gpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, PADDING, TURN_START, TURN_END]

# ChatML. The {% generation %} block marks the assistant's tokens for trainers; it includes the end of the turn, without
# which the model would never learn to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(documents: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``documents``.

    Raises:
        UserError: the vocabulary is smaller than bytes and special tokens, or larger than the text supports.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if settings.vocab_size < smallest:
        raise UserError(
            f"--tokenizer.vocab_size is {settings.vocab_size}, but bytes and special tokens alone need {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(word_pattern(settings.split_pattern, settings.max_digits)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document[: settings.max_document_characters] for document in documents)
    tokenizer.train_from_iterator(_lines(texts, settings.max_characters), trainer)
    if tokenizer.get_vocab_size() < settings.vocab_size:
        raise UserError(
            f"--tokenizer.vocab_size is {settings.vocab_size}, but the corpus supports only "
            f"{tokenizer.get_vocab_size()} tokens: lower it, or provide more text"
        )
    return tokenizer


def _lines(documents: Iterable[str], max_characters: int) -> Iterator[str]:
    """Yield lines, which keep the trainer's queue small, up to about ``max_characters`` characters."""
    seen = 0
    for document in documents:
        for line in document.splitlines(keepends=True):
            yield line
            seen += len(line)
            if seen >= max_characters:
                return


def save_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int | None = None) -> None:
    """Save the tokenizer and its chat template in ``folder``, for ``AutoTokenizer.from_pretrained(folder)``."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,  # the document separator; lm_eval starts from it when the context is empty
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=[TURN_START, TURN_END],
        padding_side="left",
        clean_up_tokenization_spaces=False,  # otherwise decoding would remove spaces before punctuation
        **({"model_max_length": model_max_length} if model_max_length else {}),
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load a saved tokenizer.

    Raises:
        UserError: the folder holds no tokenizer.json.
    """
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer.json: make one with `scratch-gpt tokenizer train --output {folder}`"
        )
    return AutoTokenizer.from_pretrained(folder)


def any_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """Load any tokenizer: a folder (GPT-2's two files suffice) or a name on the Hub.

    Raises:
        UserError: not found, or not a tokenizer of the `tokenizers` library.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name_or_path)
    if (folder / "merges.txt").is_file() and not (folder / "tokenizer.json").is_file():
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        known = END_OF_TEXT if END_OF_TEXT in backend.get_vocab() else None
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=known, eos_token=known)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {name_or_path}: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"{name_or_path} is not a tokenizer of the `tokenizers` library: choose one that has a tokenizer.json"
        )
    return tokenizer


def take_tokenizer(name_or_path: str, folder: Path) -> list[str]:
    """Save an existing tokenizer in ``folder``, adding the tokens and chat template that training needs.

    Existing tokens keep their ids. Returns one line per addition.
    """
    tokenizer = any_tokenizer(name_or_path)
    added = []
    before = len(tokenizer)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
        added.append(f"eos_token {END_OF_TEXT}")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PADDING})
        added.append(f"pad_token {PADDING}")
    if tokenizer.chat_template is None:
        tokenizer.add_tokens([TURN_START, TURN_END], special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        added.append(f"chat template with {TURN_START} and {TURN_END}")
    if len(tokenizer) > before:
        added.append(f"{len(tokenizer) - before} new tokens: a model trained with the original needs larger embeddings")
    tokenizer.save_pretrained(folder)
    return added


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id that ends each document: ``<|endoftext|>`` if in the vocabulary, else the tokenizer's eos_token.

    Raises:
        UserError: the tokenizer has neither.
    """
    token = END_OF_TEXT if END_OF_TEXT in tokenizer.get_vocab() else tokenizer.eos_token
    if token is None:
        raise UserError(
            f"{tokenizer.name_or_path} has neither {END_OF_TEXT} nor an eos_token to end documents with; "
            f"add them with `scratch-gpt tokenizer train --from {tokenizer.name_or_path}`"
        )
    return int(tokenizer.convert_tokens_to_ids(token))


def fingerprint(folder: str | Path) -> str:
    """Return the SHA-256 of ``tokenizer.json``. Shards record it, and a different tokenizer is refused."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def train_command(settings: TokenizerTrainSettings) -> None:
    """`scratch-gpt tokenizer train`."""
    output = Path(settings.output)
    if output.exists() and any(output.iterdir()) and not (output / "tokenizer.json").is_file():
        raise UserError(f"{output} holds files that are not a tokenizer: choose another --output")
    if settings.from_ is not None:
        for line in take_tokenizer(settings.from_, output):
            print(f"added: {line}")
        print(f"{output}: {settings.from_}, {len(load_tokenizer(output)):,} tokens")
        return
    train, valid, _ = split_documents(settings)
    tokenizer = train_tokenizer(train, settings.tokenizer)
    save_tokenizer(tokenizer, output)
    print(
        f"{output}: {tokenizer.get_vocab_size():,} tokens, "
        f"{bytes_per_token(tokenizer, valid):.2f} bytes per token on held-out text"
    )


def bytes_per_token(tokenizer: Tokenizer, documents: Iterable[str]) -> float:
    """Return the mean number of UTF-8 bytes per token of ``documents``."""
    num_bytes = num_tokens = 0
    for document in documents:
        num_bytes += len(document.encode("utf-8"))
        num_tokens += len(tokenizer.encode(document, add_special_tokens=False))
    return num_bytes / max(num_tokens, 1)
