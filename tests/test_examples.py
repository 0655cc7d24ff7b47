"""Every configuration file of examples/ trains, or prepares its data."""

import json
from pathlib import Path

import pytest

from scratch_gpt.cli import main

ROOT = Path(__file__).parents[1]
# Those of examples/stories are stages that build on one another: test_stories.py runs them in their order.
CONFIGS = sorted(path for path in ROOT.glob("examples/**/*.yaml") if path.parent.name != "stories")


@pytest.mark.parametrize("config", [path for path in CONFIGS if path.stem != "prepare"], ids=lambda path: path.stem)
def test_example_trains(config, tmp_path, capsys):
    more = ["--max-steps", "2", "--training.precision", "fp32", "--training.compile", "off"]
    assert main(["pretrain", "--config", str(config), "--run-dir", str(tmp_path / "run"), *more]) == 0
    assert "saved" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if path.stem == "prepare"], ids=lambda path: path.parent.stem
)
def test_example_prepares_its_data(config, tokenizer_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = ["--output", str(tmp_path / "data"), "--tokenizer-path", str(tokenizer_folder)]
    assert main(["data", "prepare", "--config", str(config), *place]) == 0
    assert main(["data", "inspect", "--path", str(tmp_path / "data"), "--tokenizer-path", str(tokenizer_folder)]) == 0
    printed = capsys.readouterr().out
    for name, entry in json.loads((tmp_path / "data" / "manifest.json").read_text())["sources"].items():
        assert f"{name}: {entry['source']}" in printed
