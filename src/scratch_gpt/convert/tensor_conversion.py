"""Conversion of weights: each target tensor from tensors of the source, read from memory or from a saved folder."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from scratch_gpt.convert.family_tables import Family
from scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig


@dataclass(frozen=True)
class TensorConversion:
    """Computation of one tensor of the target model from tensors of the source model."""

    target: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool
    chunk: tuple[int, int] | None = None
    """(index, number of chunks): the target is one of several equal chunks of the source, by rows."""

    def convert(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The converted tensor, contiguous and in its own memory.

        Raises:
            ValueError: the source tensor does not have the shape that its config implies.
        """
        tensors = [read(name) for name in self.sources]
        if self.chunk is None:
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            tensor = tensor.t() if self.transposed and tensor.ndim == 2 else tensor
        else:
            tensor = tensors[0].t() if self.transposed and tensors[0].ndim == 2 else tensors[0]
            tensor = tensor.chunk(self.chunk[1])[self.chunk[0]]
        if _has_vocabulary_rows(self.target) and tensor.shape[0] > self.shape[0]:
            tensor = tensor[: self.shape[0]]  # drop the padding of the vocabulary
        if tuple(tensor.shape) != self.shape:
            raise ValueError(
                f"{' + '.join(self.sources)} gives {self.target} the shape {tuple(tensor.shape)}, but the config says "
                f"{self.shape}: config.json and the weights belong to different models"
            )
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _has_vocabulary_rows(name: str) -> bool:
    return name.split(".")[-2] in ("wte", "embed_tokens", "lm_head")


def tensor_conversions(
    target_class: type[PreTrainedModel], config: PreTrainedConfig, family: Family
) -> list[TensorConversion]:
    """One conversion for every tensor that a saved `target_class` contains, in the order of its state dict."""
    target_is_ours = config.model_type == ScratchGPTConfig.model_type
    with torch.device("meta"):
        state = target_class(config).state_dict()
    tied = target_class._tied_weights_keys if config.tie_word_embeddings else None
    conversions = []
    for name, tensor in state.items():
        if name in (tied or {}):
            continue
        stem, _, suffix = name.rpartition(".")
        pattern = re.sub(r"\.\d+\.", ".*.", stem)
        layer = re.search(r"\.(\d+)\.", stem)

        def source(stem: str, layer=layer, suffix=suffix) -> str:
            return (stem.replace("*", layer.group(1)) if layer else stem) + f".{suffix}"

        for weight in family.weights:
            chunk: tuple[int, int] | None = None
            sources: tuple[str, ...]
            if target_is_ours and pattern in weight.ours:
                sources = (source(weight.theirs),)
                if len(weight.ours) > 1:
                    chunk = (weight.ours.index(pattern), len(weight.ours))
            elif not target_is_ours and pattern == weight.theirs:
                sources = tuple(source(stem) for stem in weight.ours)
            else:
                continue
            conversions.append(TensorConversion(name, tuple(tensor.shape), sources, weight.transposed, chunk))
            break
        else:
            raise AssertionError(f"{name} is missing from the table of {family.model_type}")
    return conversions


def check_names(conversions: Iterable[TensorConversion], available: Iterable[str], where: str) -> None:
    """Compare the tensors that conversions read with those available.

    Raises:
        ValueError: tensors are missing or unknown, other than a tied head or a saved mask.
    """
    needed = {name for conversion in conversions for name in conversion.sources}
    missing = sorted(needed - set(available))
    # Some files store a tied head, and old GPT-2 and Llama files contain masks and rotary frequencies.
    harmless = re.compile(r"lm_head\.weight$|\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
    extra = sorted(name for name in set(available) - needed if not harmless.search(name))
    if missing or extra:
        problems = [
            f"{kind}: {_first_names(names)}" for kind, names in (("missing", missing), ("unknown", extra)) if names
        ]
        raise ValueError(f"{where} does not contain the weights that its config requires; " + "; ".join(problems))


def _first_names(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class SafetensorsFolder:
    """The tensors of a saved model, read one at a time by name. Names of a model saved without a head get its prefix."""

    def __init__(self, folder: Path, base_prefix: str, stack: ExitStack):
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / name for name in weight_map.values()})
        elif single.is_file():
            files = [single]
        else:
            raise ValueError(
                f"{folder} contains neither {single.name} nor {index.name}: only safetensors are supported "
                "(load other formats with transformers and save them again)"
            )
        if absent := [str(file) for file in files if not file.is_file()]:
            raise ValueError(f"{index} lists files that do not exist: {_first_names(absent)}")
        self._locations = {}
        for file in files:
            reader = stack.enter_context(safe_open(file, framework="pt"))
            for stored in reader.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                name = (
                    stored
                    if stored.startswith((f"{base_prefix}.", "lm_head.", "score."))
                    else f"{base_prefix}.{stored}"
                )
                self._locations[name] = (reader, stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def read(self, name: str) -> torch.Tensor:
        reader, stored = self._locations[name]
        return reader.get_tensor(stored)
