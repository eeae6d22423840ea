"""No module of the packages needs, at any time, one that needs it: imports inside functions are looked at too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import kfade_kernels
import pytest

import kfade


def imports(root: Path) -> dict[str, set[str]]:
    """By module those of the same package that it imports; the package itself is left out, for it has them all."""
    files = {p: ".".join(p.relative_to(root.parent).with_suffix("").parts) for p in root.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for path, name in files.items()}
    del paths[root.name]
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = here[: len(here) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                # `from . import name` may name a module, or something in one
                names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in paths else base for alias in node.names}
        found[module] = names & paths.keys() - {module}
    return found


@pytest.mark.parametrize("package", [kfade, kfade_kernels])
def test_no_modules_import_each_other(package: object) -> None:
    found = imports(Path(str(package.__file__)).parent)  # type: ignore[attr-defined]
    assert len(found) > 40 and any(found.values())
    list(TopologicalSorter(found).static_order())


def test_a_circle_inside_functions_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "some"
    root.mkdir()
    (root / "__init__.py").touch()
    (root / "a.py").write_text("from .b import x")
    (root / "b.py").write_text("def x():\n    from . import a\n    return a")
    with pytest.raises(CycleError):
        list(TopologicalSorter(imports(root)).static_order())
