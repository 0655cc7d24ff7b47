"""The import rule of CONTRIBUTING.md: a package imports only packages further down, and so does a file within its package."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "scratch_gpt"
ABOVE_THE_TREE = {"", "__main__"}
"""The package itself and `python -m scratch_gpt`: entry points, which the rule is not about."""


def documented_order() -> list[str]:
    """Every module of the package as CONTRIBUTING.md lists it, from top to bottom: "alignment.sft", "files", ..."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree.*?-->\n```\n(.*?)```", text, flags=re.DOTALL)
    assert block is not None
    order, package = [], ""
    for line in block.group(1).splitlines():
        if line.startswith(" "):
            order += [f"{package}.{name}" for name in line.split()]
        else:
            package = line.split()[0]
            if (SOURCE / f"{package}.py").exists():
                order.append(package)
    return order


ORDER = documented_order()


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(code: str, package: tuple[str, ...]) -> set[str]:
    """The modules of this package that ``code``, a file of ``package``, imports anywhere in it, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("scratch_gpt.") for name in names if name.startswith("scratch_gpt.")}
    return {resolved for name in found if (resolved := resolve(name)) is not None}


def resolve(name: str) -> str | None:
    """The module that "package.module.name" is in; None for a package's own names."""
    parts = name.split(".")
    while parts:
        if ".".join(parts) in ORDER:
            return ".".join(parts)
        parts.pop()
    return None


FILES = sorted(path for path in SOURCE.rglob("*.py") if module_name(path) not in ABOVE_THE_TREE)


def test_every_module_is_in_the_tree_and_the_tree_lists_no_other():
    modules = {module_name(path) for path in FILES if path.name != "__init__.py"}
    assert modules == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_module_imports_only_modules_further_down(path):
    module = module_name(path)
    if path.name == "__init__.py":  # stands where the first of its package's modules stands
        inside = [name for name in ORDER if name.startswith(f"{module}.")]
        position = ORDER.index(inside[0]) - 1 if inside else len(ORDER)
    else:
        position = ORDER.index(module)
    imported = imported_modules(
        path.read_text(encoding="utf-8"), ("scratch_gpt", *path.relative_to(SOURCE).parent.parts)
    )
    above = {name for name in imported if ORDER.index(name) <= position and name != module}
    assert not above, f"{module} imports {sorted(above)}, which CONTRIBUTING.md lists above it"


def test_imports_are_found_wherever_they_stand():
    code = "import scratch_gpt.files\nfrom ..data import batches\ndef f():\n    from scratch_gpt.training.trainer import Trainer\n"
    assert imported_modules(code, ("scratch_gpt", "training")) == {"files", "data.batches", "training.trainer"}
    assert ORDER.index("training.trainer") < ORDER.index("data.batches") < ORDER.index("files")
