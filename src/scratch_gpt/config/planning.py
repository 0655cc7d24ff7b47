"""Settings of the commands that run before a training run: plan, doctor, find-batch-size."""

from dataclasses import dataclass
from typing import Literal

from scratch_gpt.config.data import TokenizerSettings
from scratch_gpt.config.fields import setting
from scratch_gpt.config.pretraining import PretrainSettings


@dataclass
class PlannedTokenizerSettings(TokenizerSettings):
    """The byte-level BPE tokenizer of a planned run."""

    vocab_size: int | None = None  # type: ignore[assignment]
    """Number of tokens. Default: the preset's vocabulary size."""


@dataclass
class PlanSettings(PretrainSettings):
    """Estimate parameters, FLOPs, memory per device and sharding strategy, largest batch, time and cost of a run."""

    tokenizer: PlannedTokenizerSettings = setting(default_factory=PlannedTokenizerSettings, tracked=True)
    devices: int = setting(1, more_than=0, common=True)
    """Number of devices."""
    devices_per_node: int = setting(8, more_than=0)
    """Devices per machine; tensor parallelism and HSDP's shards stay within one machine."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Kind of device; auto: cuda if device_memory is given, else this machine's."""
    device_memory: str | None = setting(None, common=True)
    """Memory per device, such as 80GB or 24GiB. Default: this machine's."""
    peak_flops: float | None = setting(None, more_than=0, common=True)
    """Peak FLOP/s of a device in the run's precision, from its data sheet, such as 990e12 for an H100 SXM in dense bf16.
    Default: that of a known device."""
    mfu: float = setting(0.4, more_than=0, below=1, common=True)
    """Expected model FLOPs utilization (fraction of the peak)."""
    price: float | None = setting(None, more_than=0, common=True)
    """Price of one device per hour. Default: the cost is not estimated."""
    tokens: float | None = setting(None, more_than=0, common=True)
    """Number of tokens to train on. Default: max_steps times training.total_batch_size."""
    dry_run: bool = setting(False, may_change=True, common=True)
    """Also simulate one training step of the chosen strategy, without allocating memory, and count the memory per device."""


@dataclass
class DoctorSettings(PretrainSettings):
    """Print the machine, versions, devices, and the sharding strategy of each rank of this launch."""


@dataclass
class FindBatchSizeSettings(PretrainSettings):
    """Find the largest device batch size, by training steps with growing batches until memory runs out."""

    tokenizer: PlannedTokenizerSettings = setting(default_factory=PlannedTokenizerSettings, tracked=True)
    max_memory: str | None = setting(None, common=True)
    """Memory that a trial may use, such as 4GB. Default: the GPU's memory; on CPU, the memory that is free now."""
    max_batch_size: int = setting(256, more_than=0, common=True)
    """Largest device batch size to try."""
