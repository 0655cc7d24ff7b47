"""The plan of a run: memory and speed of every layout, and the layout to choose. `plan.py` prints it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from scratch_gpt.config import FindBatchSizeSettings, PlanSettings, parse_bytes
from scratch_gpt.data.tokenizer import load_tokenizer
from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTConfig
from scratch_gpt.model.flops import flops_per_token
from scratch_gpt.model.loading import build_config, build_config_without_tokenizer
from scratch_gpt.planning.activations import Precision, Workload
from scratch_gpt.planning.layouts import SIMPLE_LAYOUTS, Layout, possible_layouts
from scratch_gpt.planning.memory import MemoryEstimate, estimate_memory, largest_fitting_batch
from scratch_gpt.planning.parameters import parameter_counts

USABLE_MEMORY = 0.92
"""Fraction of a device's memory that a plan uses. The rest is for the device's context and for fragmentation."""


@dataclass(frozen=True)
class LayoutEstimate:
    """One layout, with or without activation checkpointing."""

    layout: Layout
    workload: Workload
    memory: MemoryEstimate
    fits: bool
    max_batch_size: int
    """Largest device batch that fits, in sequences."""


class Plan:
    """Memory and speed of every layout for one model.

    Raises:
        UserError: settings that contradict each other, or an amount of memory that cannot be parsed.
    """

    def __init__(self, settings: PlanSettings):
        self.settings = settings
        self.config, self.vocabulary_source = planned_config(settings)
        self.parameters = parameter_counts(self.config)
        self.context_length = planned_context_length(settings.training.context_length, self.config)
        self.flops = flops_per_token(self.config, self.context_length)
        self.device: Literal["cuda", "cpu"] = _device(settings)
        self.device_bytes = _device_bytes(settings, self.device)
        self.optimizer: str = settings.training.optimizer

    def estimates(self, precision: Precision) -> list[LayoutEstimate]:
        """Every layout, without and with activation checkpointing, at the device batch that `pretrain` would use."""
        return [
            self.estimate(layout, precision, checkpointing)
            for layout in possible_layouts(self.config, self.settings.devices, self.settings.devices_per_node)
            for checkpointing in (False, True)
        ]

    def estimate(self, layout: Layout, precision: Precision, checkpointing: bool) -> LayoutEstimate:
        batch_size = self.settings.training.device_batch_size or self.sequences_per_step(layout) or 1
        workload = Workload(batch_size, self.context_length, precision, self.device, checkpointing)

        def memory_of(sequences: int) -> MemoryEstimate:
            resized = replace(workload, sequences=sequences)
            return estimate_memory(self.config, self.parameters, layout, resized, self.optimizer)

        available = USABLE_MEMORY * self.device_bytes
        max_batch_size = largest_fitting_batch(lambda sequences: memory_of(sequences).total, available)
        memory = memory_of(batch_size)
        return LayoutEstimate(layout, workload, memory, memory.total <= available, max_batch_size)

    def sequences_per_step(self, layout: Layout) -> int | None:
        """Sequences per optimizer step on each data-parallel rank; None if the total batch size is not divisible."""
        sequences, remainder = divmod(self.settings.training.total_batch_size, self.context_length * layout.dp_size)
        return sequences if sequences and not remainder else None

    def device_batch_size(self, estimate: LayoutEstimate) -> int:
        """The given device batch, or the largest that fits and divides the sequences per step; 0 if none fits."""
        given = self.settings.training.device_batch_size
        if given:
            return given if given <= estimate.max_batch_size else 0
        per_step = self.sequences_per_step(estimate.layout)
        if per_step is None:
            return estimate.max_batch_size
        sizes = range(1, min(estimate.max_batch_size, per_step) + 1)
        return max((size for size in sizes if per_step % size == 0), default=0)

    def choose(self, estimates: list[LayoutEstimate]) -> LayoutEstimate | None:
        """The simplest layout that fits and uses all devices; with activation checkpointing only if needed to fit."""
        candidates = [estimate for estimate in estimates if not estimate.layout.deepspeed]
        if self.settings.devices > 1:
            candidates = [estimate for estimate in candidates if estimate.layout.name != "single"]

        def complexity(estimate: LayoutEstimate) -> int:
            name = estimate.layout.name
            return SIMPLE_LAYOUTS.index(name) if name in SIMPLE_LAYOUTS else len(SIMPLE_LAYOUTS)

        candidates.sort(key=complexity)
        return next((estimate for estimate in candidates if self.device_batch_size(estimate)), None)

    def tokens_per_second(self, estimate: LayoutEstimate) -> float | None:
        """Throughput of all devices at the given MFU; None if the peak FLOP/s is unknown.

        MFU counts only the FLOPs that the model needs. Recomputation takes time and does not count.
        """
        if self.settings.peak_flops is None:
            return None
        computed = self.flops.total + (self.flops.recomputed if estimate.workload.checkpointing else 0)
        return estimate.layout.devices * self.settings.peak_flops * self.settings.mfu / computed


def planned_config(settings: PlanSettings | FindBatchSizeSettings) -> tuple[ScratchGPTConfig, str]:
    """The model configuration of a run that has not started, and a phrase that says where its vocabulary comes from.

    Raises:
        UserError: an unknown model, or pipeline parallelism, which is not supported here.
    """
    if settings.parallel.pipeline > 1:
        raise UserError("plan and find-batch-size do not support pipeline parallelism: set --parallel.pipeline 1")
    if settings.tokenizer_path is not None:
        tokenizer = load_tokenizer(Path(settings.tokenizer_path))
        return build_config(settings.model, tokenizer), f"from {settings.tokenizer_path}"
    if settings.tokenizer.vocab_size is None:
        return build_config_without_tokenizer(settings.model), "the preset's; pretrain uses --tokenizer.vocab_size"
    return build_config_without_tokenizer(
        settings.model, vocab_size=settings.tokenizer.vocab_size
    ), "--tokenizer.vocab_size"


def planned_context_length(context_length: int | None, config: ScratchGPTConfig) -> int:
    """The given context length; default: the model's longest.

    Raises:
        UserError: it exceeds the model's learned positions.
    """
    context_length = context_length or config.max_position_embeddings
    if config.position_embedding_type == "learned" and context_length > config.max_position_embeddings:
        raise UserError(
            f"--training.context_length is {context_length}, but the model has only {config.max_position_embeddings} "
            "learned positions: reduce it, or choose a model with more"
        )
    return context_length


def _device(settings: PlanSettings) -> Literal["cuda", "cpu"]:
    if settings.device != "auto":
        return settings.device
    return "cuda" if settings.device_memory is not None or torch.cuda.is_available() else "cpu"


def _device_bytes(settings: PlanSettings, device: str) -> int:
    if settings.device_memory is not None:
        return parse_bytes(settings.device_memory, "device-memory")
    if device == "cpu":
        return psutil.virtual_memory().total // settings.devices
    if not torch.cuda.is_available():
        raise UserError(
            "this machine has no GPU whose memory could be read: give --device-memory 80GB, or --device cpu"
        )
    return torch.cuda.get_device_properties(0).total_memory
