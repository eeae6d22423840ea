"""The examples of a documentation page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"


def run_examples(name: str) -> dict[str, Any]:
    """Run all Python blocks of `docs/<name>`, in order and in one namespace, which is returned."""
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks, f"{name} has no examples"
    namespace: dict[str, Any] = {"__name__": name}
    for block in blocks:
        # Blank lines in front, so that an error names the line of the page.
        lines = text[: block.start(1)].count("\n")
        exec(compile("\n" * lines + block.group(1), str(DOCS / name), "exec"), namespace)
    return namespace
