"""Accuracy in the lm-eval harness against scores computed by hand."""

import pytest
import torch

from scratch_gpt.evaluation.builtin_tasks import make_questions
from scratch_gpt.evaluation.lm_eval import run_tasks
from scratch_gpt.model.loading import load_model


def log_probability(model, tokenizer, context, continuation):
    """Summed log-probability of ``continuation`` after ``context``, as the harness defines it."""
    ids = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"] if context else []
    inputs = torch.tensor([[*([] if before else [tokenizer.bos_token_id]), *ids]])
    with torch.no_grad():
        log_probs = model(inputs).logits[0, :-1].double().log_softmax(-1)
    count = len(ids) - len(before)
    return log_probs.gather(1, inputs[0, 1:, None])[-count:].sum().item()


def test_harness_accuracy_equals_scores_by_hand(held_out, saved_model, tmp_path):
    model, tokenizer = load_model(str(saved_model))
    tasks = make_questions(held_out, limit=12, seed=0)
    scores = {score.task: score for score in run_tasks(model, tokenizer, tasks, tmp_path)}
    for name, questions in tasks.items():
        right = 0
        for question in questions:
            # the harness puts a space between context and choice, also where the context is empty
            values = [log_probability(model, tokenizer, question.context, " " + c) for c in question.choices]
            if name == "next_sentence":
                values = [value / len(c) for value, c in zip(values, question.choices, strict=True)]
            right += max(range(len(values)), key=values.__getitem__) == question.answer
        assert scores[name].value == pytest.approx(right / len(questions))
        assert scores[name].questions == 12
    assert scores["next_sentence"].chance == 0.25
    assert scores["word_order"].chance == 0.5
