"""The manifest of a saved curvature, read and changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())


def rewrite(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = manifest(directory)
    change(content)
    (directory / "manifest.json").write_text(json.dumps(content))
