"""The sentence benchmarks and the harness, against scores worked out by hand."""

import json
import subprocess
import sys

import pytest
import torch

from scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from scratch_gpt.cli import main
from scratch_gpt.data.sources import bundled_corpus, read_documents
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.evaluation.builtin_tasks import questions, sentences_of
from scratch_gpt.evaluation.evaluate import evaluate
from scratch_gpt.evaluation.lm_eval import run_tasks
from scratch_gpt.model.loading import load_model


@pytest.fixture(scope="module")
def held_out():
    return list(read_documents([bundled_corpus("valid")]))


@pytest.fixture(scope="module")
def saved_model(tokenizer_folder, tmp_path_factory):
    torch.manual_seed(0)
    config = ScratchGPTConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # far from uniform, so that the choices differ
    )
    folder = tmp_path_factory.mktemp("model")
    ScratchGPTForCausalLM(config).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


def test_sentences_end_at_their_marks_or_lines():
    assert sentences_of(['"Who?" she said. Mr. B! Yes\nCHAPTER 1\n']) == [
        '"Who?"',
        "she said.",
        "Mr.",
        "B!",
        "Yes",
        "CHAPTER 1",
    ]


def test_questions_hold_the_true_sentence_where_they_say(held_out):
    sentences = sentences_of(held_out)
    tasks = questions(held_out, limit=50, seed=0)
    assert {name: len(asked) for name, asked in tasks.items()} == {"next_sentence": 50, "word_order": 50}
    for question in tasks["next_sentence"]:
        true = question.choices[question.answer]
        place = next(i for i, s in enumerate(sentences) if s == true and question.context.endswith(sentences[i - 1]))
        assert question.context == " ".join(sentences[max(0, place - 3) : place])
        assert len(set(question.choices)) == 4
    for question in tasks["word_order"]:
        assert question.choices[question.answer] in sentences
        assert sorted(question.choices[0].split(" ")) == sorted(question.choices[1].split(" "))
    answers = [question.answer for question in tasks["next_sentence"]]
    assert {0, 1, 2, 3} == set(answers)


def test_questions_are_decided_by_the_seed(held_out):
    assert questions(held_out, 20, seed=1) == questions(held_out, 20, seed=1)
    assert questions(held_out, 20, seed=1) != questions(held_out, 20, seed=2)


def test_too_little_text_makes_no_questions():
    assert questions(["Only one sentence of some length stands here."], 20, seed=0) == {}


def log_probability(model, tokenizer, context, continuation):
    """Summed log-probability of ``continuation`` after ``context``, as the harness defines it."""
    whole = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"] if context else []
    ids = torch.tensor([[*([] if before else [tokenizer.bos_token_id]), *whole]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].double().log_softmax(-1)
    count = len(whole) - len(before)
    return log_probs.gather(1, ids[0, 1:, None])[-count:].sum().item()


def test_harness_accuracy_equals_scores_by_hand(held_out, saved_model, tmp_path):
    model, tokenizer = load_model(str(saved_model))
    tasks = questions(held_out, limit=12, seed=0)
    scores = {score.task: score for score in run_tasks(model, tokenizer, tasks, tmp_path)}
    for name, asked in tasks.items():
        right = 0
        for question in asked:
            # the harness puts a space between context and choice, also where the context is empty
            values = [log_probability(model, tokenizer, question.context, " " + c) for c in question.choices]
            if name == "next_sentence":
                values = [value / len(c) for value, c in zip(values, question.choices, strict=True)]
            right += max(range(len(values)), key=values.__getitem__) == question.answer
        assert scores[name].value == pytest.approx(right / len(asked))
        assert scores[name].questions == 12
    assert scores["next_sentence"].chance == 0.25
    assert scores["word_order"].chance == 0.5


def test_an_untrained_model_is_at_the_loss_of_guessing(held_out, tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    config = ScratchGPTConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = ScratchGPTForCausalLM(config)
    result = evaluate(model, load_tokenizer(tokenizer_folder), held_out[:1], task_folder=tmp_path, limit=10, seed=0)
    assert result.loss == pytest.approx(torch.tensor(400.0).log().item(), rel=0.02)


def test_the_command_writes_what_it_prints(saved_model, tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert main(["evaluate", "--model", str(saved_model), "--limit", "10", "--output", str(output)]) == 0
    results, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert f"bits per byte {results['bits_per_byte']:.4f}" in printed
    assert [score["task"] for score in results["scores"]] == ["next_sentence", "word_order"]


@pytest.mark.parametrize("present", [False, True])
def test_a_folder_without_a_model_is_refused(present, tmp_path):
    folder = tmp_path / "nothing"
    if present:
        folder.mkdir()
    with pytest.raises(UserError, match="holds no complete model" if present else "there is no model"):
        load_model(str(folder))


def test_generate_continues_the_prompt(saved_model, capsys):
    more = ["--max-new-tokens", "8", "--num-return-sequences", "2"]
    assert main(["generate", "--model", str(saved_model), "--prompt", "It was 🙂", *more]) == 0
    printed = capsys.readouterr().out
    assert printed.count("It was 🙂") == 2
    assert main(["generate", "--model", str(saved_model), "--max-new-tokens", "5000"]) == 2
    assert "takes 256 in all" in capsys.readouterr().err


def test_generate_imports_neither_adapters_nor_quantizers(saved_model):
    code = "import sys\nfrom scratch_gpt.cli import main\nmain(sys.argv[1:])\nprint({'peft', 'bitsandbytes'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "generate", "--model", str(saved_model), "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
