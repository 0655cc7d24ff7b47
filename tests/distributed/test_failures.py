"""A process that is killed, hangs or is told to stop: the others neither hang nor lose anything."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from scratch_gpt.training.checkpoint import newest_checkpoint
from tests.distributed.launch import ROOT, arguments, configuration, curve, environment, finish, launch, launcher

STEPS = 10
SAVES = ["--training.save_every", "3", "--training.schedule", "constant", "--model.overrides.hidden_dropout", "0.1"]
PROGRAM = ["-m", "tests.distributed.faulty"]
RESTARTS = ["--max_restarts", "1", "--rdzv_backend", "c10d"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return configuration("ddp", tmp_path_factory.mktemp("configuration"), 2)


def strike(folder, config, shards, fault):
    """A run whose second process sends itself the signal ``fault`` in step 5; the finished launcher."""
    run = arguments(folder / "struck", shards, "modern", STEPS, *SAVES)
    return launch(config, run, program=[*PROGRAM, fault, "1", "5"], check=False)


@pytest.fixture(scope="module")
def killed(config, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    start = time.monotonic()
    done = strike(folder, config, shards, "SIGKILL")
    return folder / "struck", done, time.monotonic() - start


@pytest.fixture(scope="module")
def stopped(config, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return folder / "struck", strike(folder, config, shards, "SIGTERM")


def assert_same_bits(one, other):
    for key in ("loss", "grad_norm", "validation_loss"):
        assert curve(other, key) == curve(one, key), key
    assert len(curve(other)) == STEPS
    assert (other / "final" / "model.safetensors").read_bytes() == (one / "final" / "model.safetensors").read_bytes()


def test_a_killed_process_ends_the_job_with_the_cause(killed):
    folder, done, seconds = killed
    assert done.returncode != 0 and seconds < 60
    assert f"Signal 9 (SIGKILL) received by PID {(folder / 'pid').read_text()}" in done.stderr
    assert newest_checkpoint(folder).name == "checkpoint-3"


def test_all_save_when_one_is_told_to_stop(stopped):
    _, done = stopped
    assert done.stderr.count("stopped after step 5 of 10, saved in") == 2, done.stderr
    assert sorted(re.findall(r"exitcode  : (-?\d+)", done.stderr)) == ["75", "75"], done.stderr


def test_the_same_command_goes_on_after_a_kill_and_after_a_stop(config, killed, stopped, shards, tmp_path):
    folders = tmp_path / "whole", killed[0], stopped[0]
    done = launch(config, *(arguments(folder, shards, "modern", STEPS, *SAVES) for folder in folders))
    for step, folder in zip((3, 5), folders[1:], strict=True):
        assert f"resumed    checkpoint-{step}" in done.stdout
        assert_same_bits(folders[0], folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_launcher_restarts_after_a_kill(config, shards, tmp_path, rank):
    runs = [arguments(tmp_path / name, shards, "modern", STEPS, *SAVES) for name in ("struck", "whole")]
    launch(config, *runs, program=[*PROGRAM, "SIGKILL", str(rank), "5"], options=RESTARTS, **OWN_STORE)
    assert (tmp_path / "struck" / "pid").is_file()
    assert_same_bits(tmp_path / "whole", tmp_path / "struck")


def hang(config, folder, shards, fault, rank, options=(), **more):
    """What the processes say of a run in which one hangs, until they have given up."""
    run = arguments(folder / "struck", shards, "modern", STEPS, "--parallel.timeout", 4, *SAVES)
    process = subprocess.Popen(
        launcher(config, [run], options, program=[*PROGRAM, fault, str(rank), "5"]),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment(**more),
    )
    said = ""
    with process:
        for line in process.stderr:
            said += line
            if "scratch-gpt: process" in line and fault == "SIGSTOP":  # let it be ended
                os.kill(int((folder / "struck" / "pid").read_text()), signal.SIGCONT)
    assert process.returncode != 0
    return said


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_hung_process_is_named(config, shards, tmp_path, rank):
    said = hang(config, tmp_path, shards, "SIGSTOP", rank)
    silent = rf"process {rank} \({(tmp_path / 'struck' / 'pid').read_text()} on \S+\) gives no sign of life"
    assert re.search(f"process {1 - rank} gives up in step 5: {silent}", said), said


@pytest.mark.slow
def test_process_0_is_named_if_it_hangs_and_the_store_with_it(config, shards, tmp_path):
    said = hang(config, tmp_path, shards, "SIGSTOP", 0, ["--rdzv_backend", "c10d"], **OWN_STORE)
    named = r"process 1 gives up in step 5: process 0 on \S+, which has the store of the launch, does not answer"
    assert re.search(named, said), said


@pytest.mark.slow
def test_a_process_that_cannot_read_its_data_is_named(config, shards, tmp_path):
    said = hang(config, tmp_path, shards, "SLOW_DISK", 1)
    assert re.search(r"process 1 \(\d+ on \S+\) is reading the data of step 5", said), said


# A thread of torch's that is to free the tensors of a collective cannot, for this one keeps the interpreter to itself.
BUSY_AT_ITS_END = """
import sys, tempfile, time, torch, torch.distributed as dist
from scratch_gpt.cli import leave

dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
sys.setswitchinterval(1000)
dist.all_reduce(torch.ones(20_000_000), async_op=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:
    pass
print("done")
leave(75)
"""


def test_a_launched_process_ends_with_its_exit_code_whatever_the_threads_of_torch_do():
    done = finish([sys.executable, "-c", BUSY_AT_ITS_END], env=environment(RANK="0"))
    assert (done.returncode, done.stdout) == (75, "done\n"), done.stderr


def test_a_process_that_ends_does_not_wait_for_threads_that_wait_for_it(config, shards, tmp_path):
    run = arguments(tmp_path / "run", shards, "modern", 2)
    launch(config, run, program=["-m", "tests.distributed.busy"], timeout=90)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
