"""examples/stories: the data, the checks of requests, and a small run of all steps."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from scratch_gpt.cli import main

FOLDER = Path(__file__).parents[1] / "examples" / "stories"


@pytest.fixture(scope="module")
def stories():
    """The example's modules, imported as its scripts import each other."""
    sys.path.insert(0, str(FOLDER))
    yield {name: importlib.import_module(name) for name in ("checks", "make_data")}
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def made(stories, tmp_path_factory):
    """The data made from 120 synthetic stories: (folder, summary)."""
    rng = random.Random(5)
    folder = tmp_path_factory.mktemp("stories")
    nouns = ["lantern", "river", "meadow", "castle", "garden", "window", "forest", "bridge", "kitten", "harbor"]
    askable = [f"{noun}{ending}" for noun in nouns for ending in "abcdefghijkl"]
    common = [first + second + third for first in "bcdfghlmnprst" for second in "aeiou" for third in "bdgnpt"]
    stories_made = []
    for number in range(120):
        paragraphs = []
        for _ in range(6):
            parts = [" ".join(rng.choices(common, k=9)) + " " + rng.choice(askable) for _ in range(3)]
            hero = rng.choice(["Luna", "Max", "Aria"])
            sentences = [
                f"The {part} went to {hero} and the {rng.choice(askable)}." for part in parts[: rng.randint(1, 3)]
            ]
            paragraphs.append(" ".join(sentences))
        stories_made.append("\n".join([f"Story {number}.", *paragraphs]))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("\n<|endoftext|>\n".join(stories_made), encoding="utf-8")
    summary = stories["make_data"].make_data(folder / "corpus", folder / "data")
    return folder, summary


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def request(**demands):
    return {"words": [], "hero": "", "begins_with": "", "ends_with": "", "sentences": 0, **demands}


@pytest.mark.parametrize(
    "demands, good, bad",
    [
        ({"words": ["river", "brave"]}, "Brave Tom swam the river.", "The rivers made Tom brave."),
        ({"hero": "Luna"}, "Here is Luna's hat. Luna smiled.", "The lunar light fell."),
        ({"begins_with": "One stormy night"}, '"One stormy night, we sailed."', "It was one stormy night."),
        ({"ends_with": "smile"}, 'She said, "Just smile!"', "A smile crossed her face."),
        ({"sentences": 2}, 'Mr. Tom said, "Go!" He went.', "He went. She ran. They"),
        ({"sentences": 2}, '"Go!" he said. He went.', '"Go!" he said.'),
        ({"sentences": 1}, "She waited... and then, after 3.5 miles, it came.", "She waited. It came."),
    ],
)
def test_checks_distinguish_an_answer_from_a_near_miss(stories, demands, good, bad):
    checks = stories["checks"]
    columns = {name: [value] * 2 for name, value in request(**demands).items()}
    assert checks.obeyed([good, bad], **columns) == [1.0, 0.0]
    assert checks.obeyed([[{"role": "assistant", "content": good}]], **{k: v[:1] for k, v in columns.items()}) == [1.0]


def test_the_reward_is_the_mean_over_demands_and_counts_some_of_the_words(stories):
    columns = {name: [value] for name, value in request(words=["river", "brave"], sentences=2).items()}
    assert stories["checks"].demands_met(["The river rose."], **columns) == [0.25]
    assert stories["checks"].obeyed(["The river rose."], **columns) == [0.0]


def test_every_answer_obeys_its_own_request(stories, made):
    folder, summary = made
    for part in ("preferences", "judge", "test"):
        rows = read(folder / "data" / f"requests_{part}.jsonl")
        assert len(rows) == summary[f"requests_{part}.jsonl"] > 10
        columns = {name: [row[name] for row in rows] for name in stories["checks"].DEMANDS}
        assert set(stories["checks"].obeyed([row["answer"] for row in rows], **columns)) == {1.0}
        assert all(any(values) for values in columns.values()), "a kind of demand never occurs"
        for row in rows:
            request_text = row["prompt"][0]["content"]
            demanded = [*row["words"], row["hero"], row["begins_with"], row["ends_with"]]
            assert all(word in request_text for word in demanded if word)


def test_no_story_is_in_two_parts_and_a_seed_makes_the_same_files_again(stories, made, tmp_path):
    folder, _ = made
    data = folder / "data"
    stories["make_data"].make_data(folder / "corpus", tmp_path)
    assert {file.name: file.read_bytes() for file in data.iterdir()} == {
        file.name: file.read_bytes() for file in tmp_path.iterdir()
    }
    stories["make_data"].make_data(folder / "corpus", tmp_path, seed=1)
    assert (data / "pretrain.txt").read_bytes() != (tmp_path / "pretrain.txt").read_bytes()
    trained_on = set((data / "pretrain.txt").read_text().splitlines())
    answers = {
        part: {row["answer"] for row in read(data / f"requests_{part}.jsonl")}
        for part in ("preferences", "judge", "test")
    }
    assert all(answers[part].isdisjoint(trained_on) for part in answers)
    assert answers["preferences"].isdisjoint(answers["judge"]) and answers["judge"].isdisjoint(answers["test"])
    assert {row["completion"][0]["content"] for row in read(data / "sft_train.jsonl")} <= trained_on


def test_rejected_texts_have_the_length_or_the_words_of_the_chosen_ones(stories, made):
    folder, _ = made
    rows = read(folder / "data" / "pairs_preferences.jsonl")
    assert {row["kind"] for row in rows} == {"swapped", "shuffled"}
    for row in rows:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        if row["kind"] == "shuffled":
            assert sorted(chosen.split()) == sorted(rejected.split())
        else:
            assert abs(len(chosen) - len(rejected)) < 5


def test_few_documents_are_cut_into_stories_and_an_empty_corpus_is_refused(stories, tmp_path):
    (tmp_path / "novel.txt").write_text("\n".join(f"Paragraph {number}." for number in range(30)))
    read_stories = stories["make_data"].read_stories
    assert [len(story) for story in read_stories(tmp_path / "novel.txt")] == [12, 12, 6]
    (tmp_path / "novel.txt").write_text("\n\n")
    with pytest.raises(SystemExit, match="holds no text"):
        read_stories(tmp_path)


def test_the_smoke_size_runs_and_measures_every_step(stories, tmp_path, monkeypatch, capsys):
    """All YAML files, from the bundled novels to PPO and GRPO; a second run has nothing to do."""
    monkeypatch.chdir(FOLDER.parents[1])
    run = importlib.import_module("run")
    run.Lineage(run.SMOKE, None, tmp_path, main).run(until=None)
    results = json.loads((tmp_path / "results.json").read_text())
    yamls = {path.stem for path in FOLDER.glob("*.yaml")}
    assert yamls == set(run.SMOKE.overrides) == set(run.REAL.overrides)
    assert list(results) == ["data", "base", "sft", "pairs", "reward", "judge", "answers", "dpo", "ppo-1",
                             "checks-dpo-1", "checks-ppo-1", "checks-grpo-1"]  # fmt: skip
    assert results["sft"]["validation_loss"] < results["sft"]["validation_loss_before"]
    for name in ("dpo", "ppo-1", "checks-dpo-1", "checks-ppo-1", "checks-grpo-1"):
        assert results[name]["asked"]["obeyed"]["number"] == 20 and results[name]["asked"]["kl"] != 0
        assert set(results[name]["against_sft"]) == {"reward", "judge"}
    assert set(results["reward"]["kinds"]) == {"swapped", "shuffled", "sampled"}
    tables = (tmp_path / "results.md").read_text()
    assert tables.count("\n## ") + tables.startswith("## ") == 4
    assert f"{results['checks-ppo-1']['asked']['kl']:.1f} |" in tables
    capsys.readouterr()
    run.Lineage(run.SMOKE, None, tmp_path, main).run(until=None)
    assert "$" not in capsys.readouterr().out
