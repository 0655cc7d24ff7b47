"""torch.compile of the model's blocks, in place.

torch has no public way to ask whether a module is compiled, or to undo it: the private attribute stands in this file only.
"""

from torch import nn

from scratch_gpt.model import ScratchGPTForCausalLM


def compile_blocks(model: ScratchGPTForCausalLM) -> None:
    """Compile each block in place: blocks share one graph, and names in the state dict do not change."""
    for block in model.transformer.h:
        block.compile()


def uncompile_blocks(model: ScratchGPTForCausalLM) -> None:
    """Let the blocks run eagerly again."""
    for block in model.transformer.h:
        block._compiled_call_impl = None


def is_compiled(block: nn.Module) -> bool:
    """Whether calling ``block`` runs compiled code."""
    return block._compiled_call_impl is not None
