"""Matrix products of the blocks in float8, through torchao: the faster half of a GPU that has them.

Micikevicius et al., 2022, arXiv:2209.05433. Inputs and weights are rounded to e4m3 and gradients to e5m2, each tensor with
a scale of its own from its present maximum. The weights stay float32 parameters under the names they have, so that a
checkpoint says nothing of it; embeddings, head and attention compute in bf16.
"""

from importlib.util import find_spec

import torch
from torch import nn

from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTForCausalLM

MULTIPLE = 16
"""What the sizes of float8 products divide by, in the hardware."""


def check_float8(device: torch.device) -> None:
    """Raises a UserError that says what is missing here: a GPU, one that has float8, or torchao."""
    if device.type != "cuda":
        raise UserError(f"precision fp8 needs a CUDA GPU, and this run is on {device.type}: take bf16 or auto")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(
            f"precision fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper), and this one has "
            f"{major}.{minor}: take bf16 or auto"
        )
    if find_spec("torchao") is None:
        raise UserError("precision fp8 needs the package torchao: pip install 'scratch-gpt[fp8]'")


def use_float8(model: ScratchGPTForCausalLM) -> None:
    """Put torchao's linear layers in the place of those of the blocks, over the same parameters.

    Raises:
        UserError: the sizes of some are no multiple of 16; it names them.
    """
    from torchao.float8 import convert_to_float8_training

    linear = {name: m for name, m in model.transformer.h.named_modules() if isinstance(m, nn.Linear)}
    odd = {  # the blocks are alike
        f"{name.split('.', 1)[1]} ({m.in_features} x {m.out_features})": None
        for name, m in linear.items()
        if m.in_features % MULTIPLE or m.out_features % MULTIPLE
    }
    if odd:
        raise UserError(
            f"precision fp8 takes matrices whose sizes are multiples of {MULTIPLE}. These would have to stay in bf16: "
            f"{', '.join(odd)}. Change the model's sizes, or take bf16"
        )
    convert_to_float8_training(model.transformer.h)


def check_tokens(rows: int, context: int) -> None:
    """Raises a UserError if a forward pass of so many tokens, the inner size of the weights' gradients, does not fit."""
    if rows * context % MULTIPLE:
        raise UserError(
            f"precision fp8 takes forward passes of a multiple of {MULTIPLE} tokens, and {rows} rows x {context} tokens "
            f"are {rows * context}: change --training.device_batch_size or --training.context_length"
        )
