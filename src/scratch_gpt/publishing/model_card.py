"""Model card: the template ``model_card.md``, filled with measured numbers only."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scratch_gpt import __version__
from scratch_gpt.compute.mfu import hardware
from scratch_gpt.evaluation.evaluate import Evaluation
from scratch_gpt.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "position_embedding_type",
    "norm_type",
    "mlp_type",
    "hidden_act",
    "qk_norm",
    "tie_word_embeddings",
)


def write_model_card(
    folder: Path,
    model: "PreTrainedModel",
    evaluation: Evaluation,
    *,
    title: str,
    evaluation_text: str,
    samples: list[str],
    training: dict[str, Any],
) -> None:
    """Write ``folder/README.md``; ``training`` holds the template's values about the run (corpus, steps, time, ...)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = [_result("perplexity", "bits_per_byte", evaluation.bits_per_byte, evaluation_text)]
    results += [_result(score.task, score.metric, score.value, evaluation_text) for score in evaluation.scores]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["scratch_gpt", "custom_code"],
        model_name=title,
        eval_results=[EvalResult(**result) for result in results],
    )
    card = ModelCard.from_template(
        data,
        template_str=(files("scratch_gpt.publishing") / "model_card.md").read_text(encoding="utf-8"),
        version=__version__,
        num_parameters=model.num_parameters(),
        title=title,
        prompt=" ".join(samples[0].split()[:4]).replace('"', "'") if samples else "It was",
        evaluation_text=evaluation_text,
        samples=samples,
        architecture={name: getattr(model.config, name) for name in ARCHITECTURE_FIELDS},
        hardware=hardware(),
        **evaluation.as_dict(),
        **training,
    )
    write_text(folder / "README.md", str(card))


def _result(task: str, metric: str, value: float, text: str) -> dict[str, Any]:
    return {
        "task_type": "text-generation",
        "dataset_type": "text",
        "dataset_name": text,
        "dataset_config": task,
        "metric_type": metric,
        "metric_value": value,
    }
