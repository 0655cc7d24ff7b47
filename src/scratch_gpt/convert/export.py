"""`scratch-gpt export` converts a saved model to a stock class of transformers, `scratch-gpt import` converts one back.

Tensors are converted one at a time and written in shards, so that at most one shard is in memory.
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
from scratch_gpt.convert.families import FolderConversion, open_folder
from scratch_gpt.errors import UserError
from scratch_gpt.files import disk_errors, new_folder, write_json
from scratch_gpt.model import ScratchGPTConfig

# Files of the tokenizer and of generation, copied as they are; the code of our classes is not.
COPIED_FILES = [
    *("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "generation_config.json",
]
SHARD_BYTES = 2_000_000_000


def convert_folder(source: Path, output: Path, to: str | None, shard_bytes: int = SHARD_BYTES) -> FolderConversion:
    """Convert the model saved in `source` to the stock family `to`, or to our class if `to` is None; write it to `output`.

    Raises:
        UserError: it cannot be expressed (the message names the fields), its weights do not fit its config, or
            `output` is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: choose another --output, or delete it")
    try:
        with open_folder(source, to) as conversion, disk_errors(str(output)), new_folder(output) as folder:
            _write_weights(conversion, folder, shard_bytes)
            _write_config(conversion, folder)
            for pattern in COPIED_FILES:
                for file in source.glob(pattern):
                    shutil.copyfile(file, folder / file.name)
            return conversion
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _write_weights(conversion: FolderConversion, folder: Path, shard_bytes: int) -> None:
    names_of_shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(conversion, shard_bytes)):
        save_file(shard, folder / f"{number}.safetensors", metadata={"format": "pt"})
        names_of_shards.append(list(shard))
        total += sum(_bytes(tensor) for tensor in shard.values())
    if len(names_of_shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    file_of_tensor: dict[str, str] = {}
    for number, tensors in enumerate(names_of_shards):
        name = f"model-{number + 1:05d}-of-{len(names_of_shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        file_of_tensor |= dict.fromkeys(tensors, name)
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": file_of_tensor}
    )


def _shards(conversion: FolderConversion, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    shard_size = 0
    for tensor_conversion in conversion.tensors:
        tensor = tensor_conversion.convert(conversion.read)
        if shard and shard_size + _bytes(tensor) > shard_bytes:
            yield shard
            shard, shard_size = {}, 0
        shard[tensor_conversion.target] = tensor
        shard_size += _bytes(tensor)
    yield shard


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_config(conversion: FolderConversion, folder: Path) -> None:
    """Write config.json and, for our class, the code that `trust_remote_code` loads."""
    config = conversion.config
    config.architectures = [conversion.model_class.__name__]
    config.save_pretrained(folder)
    if config.model_type == ScratchGPTConfig.model_type:
        with torch.device("meta"):
            custom_object_save(conversion.model_class(config), folder)


@torch.no_grad()
def largest_difference(first: Path, second: Path, text_length: int = 64) -> tuple[float, float]:
    """Compare the logits of two saved models in float32, with one model in memory at a time.

    Returns:
        The largest absolute difference, and the largest absolute logit.
    """
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
        raise UserError(f"there is no folder {source}: give the folder of a saved model")
    conversion = convert_folder(source, output, to)
    report = f"{output}: {conversion.model_class.__name__}"
    if verify:
        difference, largest = largest_difference(source, output)
        if not difference <= 1e-4 * max(largest, 1.0):
            raise RuntimeError(
                f"{output} has logits that differ by {difference:.1e} from those of {source}: do not use it"
            )
        report += f", logits equal to {difference:.1e} (the largest is {largest:.1f})"
    print(report)
