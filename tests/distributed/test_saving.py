"""Saving with several processes: an error of the one that writes ends all of them."""

from tests.distributed.launch import arguments, configuration, curve, launch

PROGRAM = """
import errno, json, os, sys
import torch.distributed as dist
from accelerate import Accelerator
from scratch_gpt.cli import main
from scratch_gpt.training import checkpoint

def full_disk(tensors, file, save=checkpoint.save_file):
    if "checkpoint-6" in str(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(tensors, file)

Accelerator.end_training = lambda self: None  # the next run needs the processes
undisturbed, disturbed = json.loads(sys.argv[1])
codes, save = [main(undisturbed)], checkpoint.save_file
checkpoint.save_file = full_disk
codes.append(main(disturbed))
checkpoint.save_file = save
codes.append(main(disturbed))
print(f"process {dist.get_rank()} ended with {codes}", flush=True)
dist.destroy_process_group()
"""


def test_a_full_disk_ends_all_processes_with_its_message_and_none_hangs(shards, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    more = ["--training.save_every", "3"]
    undisturbed = arguments(tmp_path / "undisturbed", shards, "modern", 12, *more)
    disturbed = arguments(tmp_path / "disturbed", shards, "modern", 12, *more, "--training.async_save", "on")
    done = launch(configuration("fsdp2", tmp_path, 2), undisturbed, disturbed, program=[str(script)])
    for process in range(2):
        assert f"process {process} ended with [0, 2, 0]" in done.stdout
    message = "checkpoint-6 (earlier checkpoints are untouched): No space left on device. Free some space"
    assert done.stderr.count(message) == 2
    assert "resumed    checkpoint-3" in done.stdout
    assert len(curve(tmp_path / "disturbed")) == 12
    assert curve(tmp_path / "disturbed") == curve(tmp_path / "undisturbed")
