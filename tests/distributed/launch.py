"""Real processes under `accelerate launch`, with the configuration files that ship, on CPU.

A launch takes seconds, so one launch does several runs, one after the other. What was in effect on each rank is recorded by
the processes themselves (`program.py`), independently of what the runs print.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from scratch_gpt.cli import main
from scratch_gpt.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# At a learning rate of 1e-2 the residual streams of all tokens of a GPT-2 of four blocks soon point in one of two directions.
# A token between the two has a gradient thousands of times that of the others (the norm is 14 at one step and 0.4 at the
# steps before and after), which magnifies the rounding of weights, 1e-5, to 1e-3 of the norm. Not so at 3e-3.
STYLES = {  # the first has tied embeddings
    "gpt2": ["--model.preset", "gpt2", "--model.num_key_value_heads", "4", "--training.learning_rate", "3e-3"],
    "modern": ["--model.num_key_value_heads", "2", "--model.overrides.tie_word_embeddings", "false"],
}
TINY = ["--model.hidden_size", "32", "--model.num_attention_heads", "4", "--model.num_hidden_layers", "2"]
TINY += ["--model.intermediate_size", "64"]
TINY += ["--model.max_position_embeddings", "32", "--training.total_batch_size", "256", "--training.warmup_steps", "2"]
TINY += ["--training.precision", "fp32", "--training.compile", "off", "--training.learning_rate", "1e-2"]


def arguments(run_dir, shards, style="modern", steps=20, *more):
    """Return the arguments of a tiny run on ``shards``, a pair of tokenizer folder and data folder."""
    tokenizer, data = shards
    words = ["pretrain", "--run-dir", run_dir, "--tokenizer-path", tokenizer, "--data-path", data, "--max-steps", steps]
    return [str(word) for word in [*words, *TINY, *STYLES[style], "--training.eval_every", 10, *more]]


def configuration(name, folder, processes, offload=False, **sizes):
    """Write configs/accelerate/{name}.yaml, changed to ``processes`` and ``sizes`` of parallelism_config; return the path."""
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{name}.yaml").read_text())
    settings["num_processes"] = processes
    if offload:
        settings["fsdp_config"]["fsdp_offload_params"] = True
    for key, value in sizes.items():
        settings["parallelism_config"][f"parallelism_config_{key}"] = value
    path = folder / f"{name}-{processes}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


PROGRAM = ("-m", "tests.distributed.program")


def launcher(config, runs, options=(), program=PROGRAM, port="0"):
    """Return the command that does ``runs``, each a list of arguments, in the processes that ``config`` starts."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", port] if port is not None else []
    return [*command, *options, *program, json.dumps(runs)]


def environment(**more):
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", **more}


def finish(command, timeout=300, **how):
    """Run ``command`` to its end. If it hangs, fail with all output and the stacks of all its processes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, **how) as process:
        try:
            printed = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            launched = psutil.Process(process.pid)
            for one in [*launched.children(recursive=True), launched]:  # each prints its threads, see faulthandler
                one.send_signal(signal.SIGABRT)
            printed = process.communicate(timeout=60)
            pytest.fail(f"{command} did not end in {timeout} seconds\n{printed[0]}\n{printed[1]}")
    return subprocess.CompletedProcess(command, process.returncode, *printed)


def launch(
    config, *runs, timeout=300, check=True, options=(), program=PROGRAM, port="0", folder=ROOT, enter=(), **more
):
    """Run the command of :func:`launcher` to its end, in ``folder``, prefixed with ``enter``; ``more``: environment variables."""
    command = [*enter, *launcher(config, runs, options, program, port)]
    done = finish(command, timeout, env=environment(**more), cwd=folder)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def alone(*runs):
    """Do ``runs``, one after the other, in this process."""
    for run in runs:
        assert main(run) == 0


def facts(run_dir):
    """Return what was in effect on each rank of the run in ``run_dir``; see `program.py`."""
    files = sorted(Path(run_dir).glob("facts-*.json"))
    return [json.loads(file.read_text()) for file in files]


def assert_only_local_shards_were_read(run_dir):
    """Assert that each rank read its shards of weights and two moments from the checkpoint that the run resumed from."""
    for process in facts(run_dir):
        assert process["read"] == 3 * process["held"] and process["began_on_meta"]


def curve(run_dir, key="loss"):
    return [record[key] for record in read_metrics(Path(run_dir) / "metrics.jsonl") if key in record]


def assert_same_run(one, other, steps, rel=1e-4, weights=2e-3):
    """Losses, gradient norms, validation results and final weights are equal within tolerance."""
    for key in ("loss", "grad_norm", "tokens", "validation_bits_per_byte"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=rel), key
    assert len(curve(other)) == steps
    expected, got = (load_file(Path(run) / "final" / "model.safetensors") for run in (one, other))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert (tensor - got[name]).abs().max() < weights * tensor.abs().max().clamp(min=0.1), name
