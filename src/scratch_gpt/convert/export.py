"""Models in and out: `scratch-gpt export` writes a stock class of transformers, `scratch-gpt import` reads one.

A folder is converted one tensor at a time and written in shards, so that no more than one shard is in memory.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.dynamic_module_utils import custom_object_save

from scratch_gpt.config import ExportSettings, ImportSettings
from scratch_gpt.convert.families import Conversion, open_folder
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, new_folder, write_json
from scratch_gpt.model import ScratchGPTConfig

# What a tokenizer and generation need beside the weights; the code of our classes stays behind.
COMPANIONS = [
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "generation_config.json",
]
SHARD_BYTES = 2_000_000_000


def convert_folder(source: Path, output: Path, to: str | None, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write the model saved in `source` to `output`: as the stock family `to`, or as ours where `to` is None.

    Raises:
        UserError: it cannot be expressed (the fields are named), does not hold what its config says, or `output`
            holds something already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another --output, or delete it")
    try:
        with open_folder(source, to) as conversion, disk_errors(str(output)), new_folder(output) as folder:
            _write_weights(conversion, folder, shard_bytes)
            _write_config(conversion, folder)
            for pattern in COMPANIONS:
                for file in source.glob(pattern):
                    shutil.copyfile(file, folder / file.name)
            return conversion
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _write_weights(conversion: Conversion, folder: Path, shard_bytes: int) -> None:
    held: list[list[str]] = []  # the names in each shard
    total = 0
    for number, shard in enumerate(_shards(conversion, shard_bytes)):
        save_file(shard, folder / f"{number}.safetensors", metadata={"format": "pt"})
        held.append(list(shard))
        total += sum(_bytes(tensor) for tensor in shard.values())
    if len(held) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, tensors in enumerate(held):
        name = f"model-{number + 1:05d}-of-{len(held):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        places |= dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(conversion: Conversion, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for recipe in conversion.recipes:
        tensor = recipe.make(conversion.read)
        if shard and held + _bytes(tensor) > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[recipe.target] = tensor
        held += _bytes(tensor)
    yield shard


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_config(conversion: Conversion, folder: Path) -> None:
    """config.json; ours with the code that loads it anywhere."""
    config = conversion.config
    config.architectures = [conversion.model_class.__name__]
    config.save_pretrained(folder)
    if config.model_type == ScratchGPTConfig.model_type:
        with torch.device("meta"):
            custom_object_save(conversion.model_class(config), folder)


@torch.no_grad()
def largest_difference(first: Path, second: Path, text_length: int = 64) -> tuple[float, float]:
    """(largest absolute difference of the two models' outputs, largest output), float32, one model in memory at a time."""
    outputs = []
    for folder in (first, second):
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        auto = AutoModelForSequenceClassification if "Classification" in architecture else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        length = min(text_length, model.config.max_position_embeddings)
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        outputs.append(model(ids).logits)
        del model
    return (outputs[0] - outputs[1]).abs().max().item(), outputs[0].abs().max().item()


def export_command(settings: ExportSettings) -> None:
    """`scratch-gpt export`."""
    _convert_and_report(Path(settings.model), Path(settings.output), settings.to, settings.verify)


def import_command(settings: ImportSettings) -> None:
    """`scratch-gpt import`."""
    _convert_and_report(Path(settings.path), Path(settings.output), None, settings.verify)


def _convert_and_report(source: Path, output: Path, to: str | None, verify: bool) -> None:
    if not source.is_dir():
        raise UserError(f"there is no folder {source}; give the folder of a saved model")
    conversion = convert_folder(source, output, to)
    report = f"{output}: {conversion.model_class.__name__}"
    if verify:
        difference, largest = largest_difference(source, output)
        if not difference <= 1e-4 * max(largest, 1.0):
            raise RuntimeError(f"{output} gives logits {difference:.1e} away from {source}: do not use it")
        report += f", logits equal to {difference:.1e} (the largest is {largest:.1f})"
    print(report)
