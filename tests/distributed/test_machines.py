"""Several machines, emulated by two launches in separate networks; the Slurm script; `doctor` under a launch."""

import os
import shutil
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.distributed.launch import ROOT, alone, arguments, assert_same_run, configuration, facts, launch


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


CABLE = """
set -e
mount -t tmpfs none /run && mkdir /run/netns
for i in 1 2; do ip netns add m$i; done
ip link add eth0 netns m1 type veth peer name eth0 netns m2
for i in 1 2; do
    ip -n m$i address add 10.77.0.$i/24 dev eth0
    for device in lo eth0; do ip -n m$i link set $device up; done
done
echo ready
exec cat
"""


@pytest.fixture
def networks():
    """Two network namespaces joined by a cable: the prefix of a command in each, and the address of the first.

    Where the system does not allow that, both commands run in this network.
    """
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        holder = None
    else:
        command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", CABLE]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        holder = subprocess.Popen(command, text=True, **pipes)
    if holder is not None and holder.stdout.readline() == "ready\n":
        enter = ["nsenter", "--target", str(holder.pid), "--preserve-credentials", "--user", "--net", "--mount"]
        yield [[*enter, "ip", "netns", "exec", name] for name in ("m1", "m2")], "10.77.0.1"
    else:
        warnings.warn("no network namespaces here: two machines in one network", stacklevel=1)
        yield [[], []], "127.0.0.1"
    if holder is not None:
        holder.communicate()


def test_two_machines_give_the_run_of_one_process(networks, shards, tmp_path):
    config = configuration("fsdp2_multi_node", tmp_path, 2)
    settings = yaml.safe_load(config.read_text())
    enter, address = networks
    settings |= {"main_process_ip": address, "main_process_port": free_port()}
    run = arguments(tmp_path / "two", shards, "gpt2")
    interface = {"GLOO_SOCKET_IFNAME": "eth0"} if enter[0] else {}

    def machine(rank):
        path = tmp_path / f"machine-{rank}.yaml"
        path.write_text(yaml.safe_dump({**settings, "machine_rank": rank}))
        return launch(path, run, port=None, enter=enter[rank], **interface)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(machine, range(2))
    alone(arguments(tmp_path / "one", shards, "gpt2"))
    assert_same_run(tmp_path / "one", tmp_path / "two", 20)
    assert [process["dtensors"] for process in facts(tmp_path / "two")] == [36, 36]
    assert "fsdp2 on 2 process(es)" in first.stdout and "fsdp2" not in second.stdout  # only the main process prints


def test_doctor_reports_what_each_process_of_a_launch_runs(tmp_path):
    config = configuration("hsdp_multi_node", tmp_path, 2, dp_replicate_size=1, dp_shard_size=2)
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**settings, "num_machines": 1}))
    done = launch(config, ["doctor", "--training.precision", "bf16"])
    assert done.stdout.count("rank 0 on") == done.stdout.count("rank 1 on") == 1
    assert "fsdp2 on 2 process(es), dp_shard 2, cpu" in done.stdout
    assert (
        "24 of 24 parameters sharded, 49,328 of 98,656 weights held; bf16, gradients reduced in float32" in done.stdout
    )


def test_every_configuration_is_tested_and_documented():
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "distributed").glob("test_*.py"))
    documentation = (ROOT / "docs" / "distributed.md").read_text()
    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        assert f'"{path.stem}"' in tests or f'"{path.name}"' in tests, path
        assert f"`{path.name}`" in documentation, path


@pytest.mark.parametrize("name", ["cpu", pytest.param("single_gpu", marks=pytest.mark.slow)])
def test_configurations_of_one_process(name, tmp_path):
    said = launch(configuration(name, tmp_path, 1), ["doctor"]).stdout
    assert "single on 1 process(es), cpu" in said and "0 of 24 parameters sharded" in said


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_the_launch_is_refused(tmp_path):
    done = launch(configuration("hsdp", tmp_path, 2, dp_replicate_size=2, dp_shard_size=2), ["doctor"], check=False)
    assert done.returncode != 0 and "requests 4 processes, the launcher started 2" in done.stderr


@pytest.mark.slow
def test_the_slurm_script_queues_itself_again_until_the_run_is_finished(shards, tmp_path):
    """Slurm's commands are replaced by shell scripts."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    commands = {
        "srun": 'shift; SLURM_PROCID=0 exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/requeued',
        "accelerate": f'shift; exec {sys.executable} -m accelerate.commands.launch "$@"',
    }
    for name, body in commands.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_CONFIG": str(configuration("fsdp2", tmp_path, 2)),
        "MAIN_PROCESS_PORT": str(free_port()),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
    }

    def job(*more):
        script, run = ROOT / "examples" / "slurm" / "pretrain.sbatch", arguments(tmp_path / "run", shards, "gpt2", 4)
        command = ["bash", str(script), *run[1:], *more]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)

    stopped = job("--max-hours", "1e-7")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    finished = job()
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and "resumed    checkpoint-1" in finished.stdout
