"""The report: one file, nothing fetched, all text escaped."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from kfade import Outcome, Step, UnlearnConfig, UnlearnReport
from kfade.config import to_dict
from kfade.evaluate import Evaluation, Generation
from kfade.outcome import Trial
from kfade.progress import StageCost
from kfade.report import Comparison, Example, spread, to_html, write_report

EVIL = "<script>alert('x')</script> & \"quotes\" https://example.org/a.png"


def step(number: int, kl: float = 0.01) -> Step:
    return Step(number, 0.5, kl, 1.2 * kl, 2.0 + number, 1.1, 0, 10.0)


def outcome(kept: bool = True, kl: float = 0.01) -> Outcome:
    trials = tuple(Trial(eta, 1e-3 * eta**2, 1.4e-3 * eta**2) for eta in (1.0, 2.0, 4.0))
    return Outcome(0.9 * kept, "" if kept else EVIL, kl, 1.2 * kl, 4.0, 1.1, trials)


def report(*steps: Step, end: Outcome | None = None) -> UnlearnReport:
    costs = [StageCost("factors A, S", 2.5, 1000, "token", 2**30), StageCost("save " + EVIL, 0.1, 0, "token", 2**29)]
    return UnlearnReport(
        to_dict(UnlearnConfig.published()),
        EVIL,
        0.5,
        1.0,
        list(steps),
        end,
        100,
        costs,
        ["the curvature is stale " + EVIL],
    )


def scores(found: float | None = 0.9) -> Evaluation:
    return Evaluation(10, 200, 0.5, 0.6, found, found, found, found, 0.01)


def reply(text: str) -> Generation:
    return Generation(EVIL, "Rome", text, bool(text), False)


COMPARISONS = [Comparison("Forget " + EVIL, scores(), scores(0.1)), Comparison("Text", scores(None), scores(None))]
EXAMPLES = [Example("Forget", reply("Rome " + EVIL), reply(""))]


class _Page(html.parser.HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "use", "br", "img", "link", "rect"):
            self.open.append(tag)
        for name, value in attrs:
            outside = name in ("src", "href", "xlink:href", "action", "data") and not (value or "").startswith("#")
            if outside or name.startswith("on") or tag in ("script", "link", "iframe", "object", "img"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in ("path", "use", "rect"):
            return
        assert self.open.pop() == tag


def parse(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_fetches_nothing_and_escapes_everything() -> None:
    page = to_html(report(step(1), step(2), end=outcome(False)), COMPARISONS, EXAMPLES, {"model": EVIL}, title=EVIL)
    assert parse(page).fetched == []
    assert "<script" not in page
    assert re.findall(r"(?:src|href)=[\"']?https?:|url\(\s*[\"']?https?:|@import", page) == []
    for part in ("dropped", "Loss by step", "Time by stage", "answer not found", "(empty)"):
        assert part in page
    assert page.count("<svg") == 4


def test_same_data_same_bytes() -> None:
    assert len({to_html(report(step(1), end=outcome()), COMPARISONS, EXAMPLES) for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("steps", "end"),
    [
        ((), None),
        ((), outcome()),
        ((step(1),), outcome(False)),
        ((step(1, math.nan),), outcome(True, math.nan)),
        ((step(1, math.inf), step(2)), outcome()),
        ((step(1, 0.0),), outcome(True, 0.0)),
    ],
)
def test_odd_runs_are_reported_too(tmp_path: Path, steps: tuple[Step, ...], end: Outcome | None) -> None:
    page = write_report(tmp_path / "deep" / "down", report(*steps, end=end))
    parse(page.read_text(encoding="utf-8"))
    values = json.loads((page.parent / "report.json").read_text(encoding="utf-8"), parse_constant=_refuse)
    assert len(values["unlearn"]["steps"]) == len(steps)
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def test_report_json_says_what_the_page_says(tmp_path: Path) -> None:
    write_report(tmp_path, report(step(1)), COMPARISONS, EXAMPLES, configuration={"steps": 1})
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert values["evaluation"][0]["after"]["answer_found"] == 0.1
    assert values["examples"][0]["before"]["reply"].startswith("Rome")
    assert values["unlearn"]["costs"][0]["rate"] == 400
    assert values["configuration"] == {"steps": 1}


def test_spread_takes_examples_evenly() -> None:
    replies = [reply(str(i)) for i in range(10)]
    assert [e.before.reply for e in spread("x", replies, replies, 4)] == ["0", "2", "5", "7"]
    assert len(spread("x", replies[:2], replies[:2], 4)) == 2
    assert spread("x", [], [], 4) == []
