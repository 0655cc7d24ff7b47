"""torch.compile of the model's blocks."""

from scratch_gpt.model import ScratchGPTForCausalLM


def compile_blocks(model: ScratchGPTForCausalLM) -> None:
    """torch.compile each block in place: one graph for all of them, names in the state dict unchanged."""
    for block in model.transformer.h:
        block.compile()


def uncompile_blocks(model: ScratchGPTForCausalLM) -> None:
    for block in model.transformer.h:
        block._compiled_call_impl = None
