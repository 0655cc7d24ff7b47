"""What the project shows runs: every configuration file of examples/ begins to train."""

from pathlib import Path

import pytest

from scratch_gpt.cli import main

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("config", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda path: path.stem)
def test_example_trains(config, tmp_path, capsys):
    more = ["--max-steps", "2", "--training.precision", "fp32", "--training.compile", "off"]
    assert main(["pretrain", "--config", str(config), "--run-dir", str(tmp_path / "run"), *more]) == 0
    assert "saved" in capsys.readouterr().out
