"""`scratch-gpt generate`."""

import subprocess
import sys

from scratch_gpt.cli import main


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
