"""`docs/operations.md`: its examples run, and it says of each operation what there is to say."""

from __future__ import annotations

import re

import kfade_kernels as kk
import pytest
from kfade_kernels import native
from pages import DOCS, run_examples

TEXT = (DOCS / "operations.md").read_text(encoding="utf-8")
ASPECTS = ("Shapes", "Dtypes", "Cost", "Backends", "Autograd")


def test_examples_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(native, "missing", "the native module is not built")  # as the page says
    run_examples("operations.md")
    explained, refused = capsys.readouterr().out.splitlines()
    # What is printed is what the page says.
    assert f"# {explained}" in TEXT
    assert f"# {refused.split(', or ')[0]}" in TEXT


@pytest.mark.parametrize("operation", kk.operations())
def test_every_operation_has_its_section(operation: str) -> None:
    section = TEXT.split(f"\n## `{operation}`\n")[1].split("\n## ")[0]
    assert re.findall(r"^- \*\*(\w+)\.\*\*", section, re.MULTILINE) == list(ASPECTS)
    assert f"kk.{operation}(" in section
    assert f"| [`{operation}`](#{operation}) |" in TEXT


@pytest.mark.parametrize("name", sorted(set(kk.__all__) - {"CrossEntropy", "Explanation"}))
def test_every_public_name_is_in_an_example(name: str) -> None:
    assert f"kk.{name}" in TEXT
