"""Settings of the commands that run before a training run: plan, doctor, find-batch-size."""

from dataclasses import dataclass
from typing import Literal

from scratch_gpt.config.data import TokenizerSettings
from scratch_gpt.config.fields import setting
from scratch_gpt.config.pretraining import PretrainSettings


@dataclass
class PlannedTokenizerSettings(TokenizerSettings):
    """The tokenizer of a run that is only planned."""

    vocab_size: int | None = None  # type: ignore[assignment]
    """Number of tokens; left out: the preset's own."""


@dataclass
class PlanSettings(PretrainSettings):
    """Before a run: parameters, FLOPs, memory per device and layout, largest batch, time and cost. Trains nothing."""

    tokenizer: PlannedTokenizerSettings = setting(default_factory=PlannedTokenizerSettings, tracked=True)
    devices: int = setting(1, more_than=0)
    """Number of devices."""
    devices_per_node: int = setting(8, more_than=0)
    """Devices of one machine, with a fast network between them: tensor parallelism and hsdp's shards stay inside."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Kind of device; auto: this machine's if device_memory is left out, else cuda."""
    device_memory: str | None = None
    """Memory of a device, such as 80GB or 24GiB; left out: what this machine has."""
    peak_flops: float | None = setting(None, more_than=0)
    """Peak FLOP/s of a device in the run's precision, from its data sheet (990e12: H100 SXM, dense bf16)."""
    mfu: float = setting(0.4, more_than=0, below=1)
    """Share of the peak that the run is expected to reach."""
    price: float | None = setting(None, more_than=0)
    """Price of one device for one hour."""
    tokens: float | None = setting(None, more_than=0)
    """Tokens to train on; left out: max_steps times training.total_batch_size."""
    dry_run: bool = setting(False, may_change=True)
    """Also take a step of the chosen layout on devices that do not exist, without memory, and count what one holds."""


@dataclass
class DoctorSettings(PretrainSettings):
    """Print the machine, the versions, the devices, and the layout that each process of this launch runs."""


@dataclass
class FindBatchSizeSettings(PretrainSettings):
    """Try real training steps on this machine, with larger and larger device batches, until memory runs out."""

    tokenizer: PlannedTokenizerSettings = setting(default_factory=PlannedTokenizerSettings, tracked=True)
    max_memory: str | None = None
    """Memory that a try may take, such as 4GB; left out: the GPU's, on CPU what is free now."""
    max_batch_size: int = setting(256, more_than=0)
    """Largest device batch to try."""
