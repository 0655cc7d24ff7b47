"""Score a model on one text: `scratch-gpt evaluate`."""

import dataclasses
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scratch_gpt.config import EvaluateSettings
from scratch_gpt.console import print0
from scratch_gpt.data.sources import bundled_corpus, find_files, read_documents
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.builtin_tasks import make_questions_for
from scratch_gpt.evaluation.lm_eval import Score, run_tasks
from scratch_gpt.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CONTEXT_LENGTH = 1024


@dataclass(frozen=True)
class Evaluation:
    bits_per_byte: float
    loss: float
    """Nats per token."""
    scores: list[Score]
    """Empty where the text is too short to make questions from."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate_command(settings: EvaluateSettings) -> None:
    """`scratch-gpt evaluate`."""
    paths = [bundled_corpus("valid")] if settings.text is None else find_files(settings.text)
    documents = list(read_documents(paths, settings.encoding_errors))
    from scratch_gpt.model.loading import load_model

    model, tokenizer = load_model(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        evaluation = evaluate(
            model, tokenizer, documents, task_folder=Path(folder), limit=settings.limit, seed=settings.seed
        )
    print0(f"bits per byte {evaluation.bits_per_byte:.4f}, loss {evaluation.loss:.4f} nats per token")
    for score in evaluation.scores:
        print0(describe(score))
    if not evaluation.scores:
        print0("the text is too short to make questions from")
    if settings.output is not None:
        write_json(Path(settings.output), {"model": settings.model, **evaluation.as_dict()})


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    *,
    task_folder: Path,
    limit: int,
    seed: int,
) -> Evaluation:
    """Compute bits per byte of ``documents``, and run the sentence benchmarks made from them.

    Args:
        task_folder: where the benchmarks are written, as task files for the lm-eval harness.
        limit: questions per benchmark.
        seed: decides the questions.

    Raises:
        UserError: there is no text.
    """
    from scratch_gpt.data.encoding import encode
    from scratch_gpt.data.shards import TokenStream
    from scratch_gpt.evaluation.bits_per_byte import score_stream, to_text_score

    texts = list(documents)
    if not texts:
        raise UserError("there is no text to evaluate on")
    backend = tokenizer.backend_tokenizer
    stream = TokenStream.of_documents(encode(texts, backend), tokenizer.eos_token_id)
    backend.encode_special_tokens = False
    context_length = min(MAX_CONTEXT_LENGTH, model.config.max_position_embeddings)
    nats, num_targets = score_stream(model, stream, context_length, model.config.vocab_size).tolist()
    result = to_text_score(nats, num_targets, stream.num_bytes)
    tasks = make_questions_for(model, tokenizer, texts, limit, seed)
    scores = run_tasks(model, tokenizer, tasks, task_folder) if tasks else []
    return Evaluation(bits_per_byte=result.bits_per_byte, loss=result.loss, scores=scores)


def describe(score: Score) -> str:
    return (
        f"{score.task} {score.value:.1%} ± {score.stderr:.1%} ({score.metric}, chance {score.chance:.0%}, "
        f"{score.questions} questions)"
    )
