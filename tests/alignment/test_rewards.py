"""Rewards: scores do not depend on padding, and mistakes of the user are named."""

import math

import pytest
import torch

from scratch_gpt.alignment.rewards import (
    Completions,
    FunctionReward,
    RewardError,
    import_reward_function,
    load_rewards,
    reward_name,
    reward_problems,
    score,
    score_sequences,
)
from scratch_gpt.config import GRPOSettings
from scratch_gpt.errors import UserError


def completions(*texts):
    """A batch of one-word prompts with these completions, and the column `bonus`."""
    count = len(texts)
    return Completions(
        ["p"] * count, list(texts), [[1]] * count, [torch.tensor([0, 1])] * count, {"bonus": [2] * count}
    )


@torch.no_grad()
def test_scores_do_not_depend_on_the_padding(words, classifier):
    tokenizer = words(48)
    model = classifier(tokenizer).eval()
    sequences = [torch.arange(2, 2 + length) for length in (3, 17, 8)]
    alone = [model(input_ids=sequence[None]).logits.item() for sequence in sequences]
    assert len(set(alone)) == 3
    assert score_sequences(model, sequences).tolist() == pytest.approx(alone, abs=1e-6)
    model.config.pad_token_id = int(sequences[0][-1])  # a padding token that is also a token of the text
    assert score_sequences(model, sequences).tolist() == pytest.approx(alone, abs=1e-6)


def test_a_function_gets_the_completions_and_the_columns():
    def length_and_bonus(prompts, completions, completion_ids, bonus):
        return [len(text) + extra for text, extra in zip(completions, bonus, strict=True)]

    (reward,) = load_rewards(length_and_bonus, None, None, [])
    assert reward.name == "length_and_bonus"
    assert score(reward, completions("a", "bcd")).tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], r"returned 1 scores for 2 completions"),
        ([1.0, math.inf], r"returned inf, not a finite number, for the completion 'b' of the prompt 'p'"),
        ([1.0, None], r"returned None, not a finite number"),
    ],
)
def test_scores_that_are_no_numbers_are_refused(scores, message):
    with pytest.raises(RewardError, match=message):
        score(FunctionReward(lambda **columns: scores), completions("a", "b"))


def test_a_function_that_raises_is_named_with_its_line():
    def divide(completions, **columns):
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match=r"divide raised ZeroDivisionError: .*test_rewards.py, line \d+.* was 'a'"):
        score(FunctionReward(divide), completions("a"))


def test_reward_functions_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_in_this_folder.py").write_text("def one(completions, **columns):\n    return [1]\n")
    assert import_reward_function("rewards_in_this_folder:one")([]) == [1]
    with pytest.raises(UserError, match="cannot import nowhere here"):
        import_reward_function("nowhere:one")
    for name in ("rewards_in_this_folder", "rewards_in_this_folder:two"):
        with pytest.raises(UserError, match="give MODULE:FUNCTION"):
            import_reward_function(name)


def test_the_demonstration_data_has_a_reward_of_its_own(tmp_path):
    demo = GRPOSettings(data="bundled")
    assert reward_problems(demo) == []
    assert import_reward_function(reward_name(demo))(["One sentence.", "One. Two.", "Cut o"]) == [1.0, 0.5, 0.0]
    assert "give either" in reward_problems(GRPOSettings(data="other.jsonl"))[0]
    assert "give either" in reward_problems(GRPOSettings(reward="a:b", reward_model="c"))[0]
    assert "holds no model" in reward_problems(GRPOSettings(reward_model=str(tmp_path)))[0]
