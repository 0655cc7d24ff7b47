"""Check that a saved model works where this package is not installed.

A new Python process, in which ``import scratch_gpt`` fails, loads the directory with ``AutoModelForCausalLM`` and
``AutoTokenizer``, and its logits are compared with those of this process.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from scratch_gpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RELOAD = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scratch_gpt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import scratch_gpt
except ModuleNotFoundError:
    pass
else:
    sys.exit("scratch_gpt can be imported: the check would prove nothing")

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, text, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(ids).logits
save_file({"ids": ids, "logits": logits}, output)
"""


def reload_elsewhere(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str) -> float:
    """Return the largest absolute difference between the logits of ``model`` and of ``folder`` loaded without this package.

    Raises:
        UserError: the directory does not load, or its tokenizer gives different ids.
    """
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "logits.safetensors"
        # The cache of remote code is fresh, and -I shuts out PYTHONPATH and the working directory.
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": temporary,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RELOAD, str(folder.resolve()), text, str(output)],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            raise UserError(f"{folder} does not load without this package:\n{done.stderr.strip()[-2000:]}")
        reloaded = load_file(output)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not torch.equal(ids, reloaded["ids"]):
        raise UserError(f"the tokenizer in {folder} gives different ids when reloaded")
    model.eval()
    with torch.no_grad():
        logits = model(ids.to(model.device)).logits.cpu()
    return (logits - reloaded["logits"]).abs().max().item()
