"""A saved model reloads in an environment without this package, and its model card holds the measured numbers."""

import pytest
import torch
from huggingface_hub import ModelCard

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.evaluate import Evaluation
from scratch_gpt.evaluation.lm_eval import Score
from scratch_gpt.publishing.model_card import write_model_card
from scratch_gpt.publishing.verify import reload_elsewhere

STYLES = {
    "gpt2": {"position_embedding_type": "learned", "norm_type": "layernorm", "mlp_type": "plain", "qk_norm": False},
    "modern": {"num_key_value_heads": 1},
}


@pytest.fixture
def saved(request, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    style = STYLES[getattr(request, "param", "modern")]
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(**sizes, max_position_embeddings=64, **style)).eval()
    tokenizer = load_tokenizer(tokenizer_folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


@pytest.mark.parametrize("saved", STYLES, indirect=True)
def test_a_model_reloaded_without_the_package_gives_equal_logits(saved):
    assert reload_elsewhere(*saved, "It was a fine day.") == 0.0


def test_the_check_detects_changed_weights(saved):
    folder, model, tokenizer = saved
    with torch.no_grad():
        model.transformer.ln_f.weight += 0.1
    assert reload_elsewhere(folder, model, tokenizer, "It was a fine day.") > 1e-4


def test_the_check_fails_if_the_saved_code_imports_the_package(saved):
    folder, model, tokenizer = saved
    code = folder / "modeling_scratch_gpt.py"
    code.write_text("import scratch_gpt.files\n" + code.read_text())
    with pytest.raises(UserError, match="does not load without this package"):
        reload_elsewhere(folder, model, tokenizer, "It was a fine day.")


def test_the_model_card_holds_the_measured_numbers_and_parses(saved):
    folder, model, _ = saved
    scores = [Score("next_sentence", "acc_norm", 0.4321, 0.05, 0.25, 77)]
    write_model_card(
        folder,
        model,
        Evaluation(bits_per_byte=1.2345, loss=3.21, scores=scores),
        title="a test",
        evaluation_text="the end of a book",
        samples=["It was a\nsample <of> text."],
        training={
            "corpus": "book.txt",
            "train_tokens": 1000,
            "train_bytes": 3000,
            "tokens_seen": 2500,
            "steps": 10,
            "precision": "fp32",
            "training_time": "0:12 minutes",
            "seed": 5,
            "guard": "2 x skipped (steps 7, 8)",
        },
    )
    card = ModelCard.load(folder / "README.md")
    for number in (
        "1.234",
        "2 x skipped (steps 7, 8)",
        "3.210",
        "43.2 %",
        "77 questions",
        "chance 25 %",
        "2,500 (2.5 epochs)",
        f"{model.num_parameters():,}",
    ):
        assert number in card.text, number
    assert "> It was a\n> sample <of> text." in card.text
    assert card.data.library_name == "transformers"
    measured = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    assert measured == {"perplexity": 1.2345, "next_sentence": 0.4321}
    assert str(folder) not in str(card)
    assert "{{" not in str(card)
