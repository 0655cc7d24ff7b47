"""Every access to a private attribute of another object in the package is listed here, with its file.

The contract tests in the packages' own `test_private_attributes.py` say what is relied on. This list finds new accesses.
"""

import ast
from pathlib import Path

import torch

SOURCE = Path(__file__).parents[1] / "src" / "scratch_gpt"
OWN = {"self", "cls", "os"}
"""An object's own attributes, and `os._exit`, which the standard library documents."""

LISTED = {
    "compute/activation_checkpointing.py": {  # names of aten's operators
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_mm",
    },
    "compute/compile.py": {"_compiled_call_impl"},
    "convert/families.py": {"_attn_implementation"},
    "convert/tensor_conversion.py": {"_tied_weights_keys"},
    "data/sources.py": {"_fingerprint"},
    "distributed/context_parallel.py": {"_default_position_ids"},  # of this package's model
    "distributed/deepspeed.py": {"_hp_mapping"},
    "distributed/materialize.py": {"_init_weights"},
    "distributed/strategy.py": {"_foreach_mul_", "_foreach_norm"},
    "model/configuration_scratch_gpt.py": {"_get_default_generation_params"},
    "model/kernels_scratch_gpt.py": {"_linear_pointwise"},
    "model/modeling_scratch_gpt.py": {"_attn_implementation", "_hf_peft_config_loaded"},
    "planning/activations.py": {"_attn_implementation"},
    "training/profiler.py": {"_dump_snapshot", "_record_memory_history"},
}


def private_accesses(code: str) -> set[str]:
    """Names beginning with one underscore that are read from, or set on, any object but the one that has the method."""
    return {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in OWN)
        and not (isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super")
    }


def test_every_private_access_is_listed():
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        accesses = private_accesses(path.read_text(encoding="utf-8"))
        if accesses and not name.startswith("alignment/"):  # tests/alignment/test_private_attributes.py lists these
            found[name] = accesses
    assert found == LISTED


def test_a_private_access_is_found():
    assert private_accesses("model._secret = self._own + super()._base + os._exit") == {"_secret"}


def test_cuda_memory_history():
    """training/profiler.py: torch documents these two functions for memory snapshots under their private names."""
    assert callable(torch.cuda.memory._record_memory_history) and callable(torch.cuda.memory._dump_snapshot)


def test_onednn_linear():
    """model/kernels_scratch_gpt.py: `linear_pointwise` of oneDNN with these arguments is a linear layer."""
    if not torch.backends.mkldnn.is_available():
        return
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4)
    out = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, bias))
