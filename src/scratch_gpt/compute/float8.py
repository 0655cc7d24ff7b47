"""Compute the matrix products of the blocks in float8, through torchao, on GPUs that have it: twice the peak of bf16.

Micikevicius et al., 2022, arXiv:2209.05433. Inputs and weights are rounded to e4m3 and gradients to e5m2, each tensor with
its own scale from its current maximum. The weights stay float32 parameters with unchanged names, so checkpoints do not
depend on it; embeddings, head and attention compute in bf16.
"""

from importlib.util import find_spec

import torch
from torch import nn

from scratch_gpt.errors import UserError
from scratch_gpt.model import ScratchGPTForCausalLM

MULTIPLE = 16
"""The hardware multiplies float8 matrices whose sizes are multiples of this."""


def check_float8(device: torch.device) -> None:
    """Raise a UserError that names what is missing: a GPU, float8 on it, or torchao."""
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
    """Replace the linear layers of the blocks by torchao's, with the same parameters.

    Raises:
        UserError: The sizes of some layers, which it names, are not multiples of 16.
    """
    from torchao.float8 import convert_to_float8_training

    linear = {name: m for name, m in model.transformer.h.named_modules() if isinstance(m, nn.Linear)}
    unsupported = {  # as keys, because all blocks have the same layers
        f"{name.split('.', 1)[1]} ({m.in_features} x {m.out_features})": None
        for name, m in linear.items()
        if m.in_features % MULTIPLE or m.out_features % MULTIPLE
    }
    if unsupported:
        raise UserError(
            f"precision fp8 takes matrices whose sizes are multiples of {MULTIPLE}. These would have to stay in bf16: "
            f"{', '.join(unsupported)}. Change the model's sizes, or take bf16"
        )
    convert_to_float8_training(model.transformer.h)


def check_num_tokens(num_sequences: int, seq_length: int) -> None:
    """Raise a UserError unless a forward pass has a multiple of 16 tokens, the inner size of products for weight gradients."""
    num_tokens = num_sequences * seq_length
    if num_tokens % MULTIPLE:
        raise UserError(
            f"precision fp8 takes forward passes of a multiple of {MULTIPLE} tokens, and "
            f"{num_sequences} sequences x {seq_length} tokens are {num_tokens}: change --training.device_batch_size or --training.context_length"
        )
