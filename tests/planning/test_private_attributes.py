"""The private names of torch that planning depends on: an upgrade that moves one fails here."""

import ast
import importlib
from pathlib import Path

import pytest
import torch.distributed as dist

PLANNING = Path(__file__).parents[2] / "src" / "scratch_gpt" / "planning"
PRIVATE_NAMES = {
    "torch._subclasses.fake_tensor": {"FakeTensorMode"},
    "torch.testing._internal.distributed.fake_pg": {"FakeStore"},
}


def private_imports(path):
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and "._" in node.module:
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("module", PRIVATE_NAMES)
def test_private_names_exist(module):
    for name in PRIVATE_NAMES[module]:
        assert hasattr(importlib.import_module(module), name)


def test_fake_backend_is_registered():
    assert dist.Backend.backend_list.count("fake") == 1


def test_only_dry_run_imports_private_modules():
    imports = {path.name: private_imports(path) for path in PLANNING.glob("*.py")}
    assert {name: found for name, found in imports.items() if found} == {"dry_run.py": PRIVATE_NAMES}
