import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scratch_gpt.cli import COMMANDS, main

CONSOLE = ["-c", "from scratch_gpt_command import command; command()"]
MODULE = ["-m", "scratch_gpt"]


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_the_console_command_starts_through_the_light_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"scratch-gpt": "scratch_gpt_command:command"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_neither_torch_nor_transformers(command):
    for start in (CONSOLE, MODULE):
        done = python("-X", "importtime", *start, *command.split(), "--help")
        assert done.returncode == 0, done.stderr
        assert "--config" in done.stdout
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
        assert "scratch_gpt.config" in imported
        assert not {"torch", "transformers", "tokenizers", "numpy", "jsonargparse"} & imported


@pytest.mark.parametrize("start", [["-c", "import scratch_gpt"], ["-m", "other.program", "-m", "scratch_gpt"]])
def test_any_other_program_that_imports_the_package_has_the_model_registered(start, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import scratch_gpt\n")
    check = "\nimport sys\nprint('scratch_gpt.model' in sys.modules)\n"
    (tmp_path / "other" / "program.py").write_text("import scratch_gpt" + check)
    if start[0] == "-c":
        start = ["-c", start[1] + check]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = python(*start, PYTHONPATH=path)
    assert done.stdout == "True\n", done.stderr


LAUNCHED = """
import atexit
from scratch_gpt.cli import leave
atexit.register(lambda: print("tracker finished"))
print("done")
leave(75)
"""


def test_a_launched_process_runs_exit_functions_and_keeps_its_exit_code():
    done = python("-c", LAUNCHED, RANK="0")
    assert (done.returncode, done.stdout) == (75, "done\ntracker finished\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretain"], "Did you mean 'pretrain'"),
        (["data"], "scratch-gpt data prepare, scratch-gpt data inspect"),
        (["pretrain", "--corpus", "absent.txt"], "there is no text file absent.txt"),
    ],
)
def test_a_mistake_exits_with_2_and_no_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_overview_names_every_command(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("order", ["scratch_gpt transformers", "transformers scratch_gpt"])
def test_importing_the_package_registers_the_auto_classes(order):
    first, second = order.split()
    code = (
        f"import {first}, {second}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification\n"
        "config = AutoConfig.for_model('scratch_gpt', vocab_size=64, hidden_size=16, num_hidden_layers=1,"
        " num_attention_heads=2)\n"
        "for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):\n"
        "    assert type(auto.from_config(config)).__name__.startswith('ScratchGPTFor')\n"
        "assert type(AutoModelForCausalLM.from_config(config)) is scratch_gpt.ScratchGPTForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
