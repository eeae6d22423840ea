"""`report.json` and `report.html`: what a run did, to be read by programs and by people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, Generation
from .outcome import Outcome, Step, UnlearnReport
from .page import BLUE, GREY, ORANGE, html_cells, html_figure, html_page, html_table, number_text, svg_of
from .progress import StageCost, seconds_text
from .storage import plain, write_text

FORMAT = "kfade-report"
VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Scores of one data set before and after.

    Attributes:
        name: of the data, as readers should see it.
        before, after: the scores.
    """

    name: str
    before: Evaluation
    after: Evaluation


@dataclass(frozen=True)
class Example:
    """One question and its replies.

    Attributes:
        name: of the data it is from.
        before, after: the replies.
        judged: whether to say if the answer was found; False where the data has no short answer.
    """

    name: str
    before: Generation
    after: Generation
    judged: bool = True


def spread(
    name: str, before: Sequence[Generation], after: Sequence[Generation], at_most: int, *, judged: bool = True
) -> list[Example]:
    """At most so many examples, taken evenly from all replies."""
    count = min(at_most, len(before))
    picked = [i * len(before) // count for i in range(count)]
    return [Example(name, before[i], after[i], judged) for i in picked]


def to_json(
    report: UnlearnReport,
    comparisons: Sequence[Comparison] = (),
    examples: Sequence[Example] = (),
    configuration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything in a report as plain JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "unlearn": plain(report.summary()),
        "evaluation": [
            plain({"name": c.name, "before": c.before.summary(), "after": c.after.summary()}) for c in comparisons
        ],
        "examples": [plain(asdict(example)) for example in examples],
        "configuration": plain(dict(configuration or {})),
    }


# ---- numbers


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _short_percent(value: float | None) -> str:
    return _percent(value).replace(".0 %", " %")


def _memory(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


METRICS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("answer_found", "answer found", _percent),
    ("exact_match", "exact match", _percent),
    ("answer_probability", "answer probability", _percent),
    ("nll", "NLL (nats/token)", number_text),
    ("perplexity", "perplexity", lambda value: number_text(value, 2)),
    ("rouge_l_recall", "ROUGE-L recall", number_text),
    ("rouge_l_f1", "ROUGE-L F1", number_text),
    ("kl", "KL to the original (nats/token)", lambda value: number_text(value, 4)),
)


# ---- charts


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _whole_steps(axes: Any, last: int) -> None:
    axes.set_xticks(range(0, last + 1, 1 + last // 12))
    axes.set_xlim(-0.25, last + 0.25)
    axes.set_xlabel("step")


def _course(report: UnlearnReport, key: str, start: float) -> tuple[list[int], list[float]]:
    """Steps, and a figure of the states after them; the last is what was kept."""
    end = [] if report.outcome is None else [report.outcome]
    total = report.steps[-1].number if report.steps else 1
    looks = [step for step in report.steps if not end or step.number < total]
    numbers = [0, *(step.number for step in looks), *[total] * len(end)]
    return numbers, _finite([start, *(getattr(state, key) for state in (*looks, *end))])


def _draw_losses(axes: Any, report: UnlearnReport) -> None:
    for name, start, key, colour, marker in (
        ("forget", report.forget_nll, "forget_nll", ORANGE, "o"),
        ("retain, held out", report.retain_nll, "retain_nll", BLUE, "s"),
    ):
        numbers, values = _course(report, key, start)
        axes.plot(numbers, values, color=colour, marker=marker, label=name, clip_on=False)
    _whole_steps(axes, numbers[-1])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("NLL (nats/token)")
    axes.legend(loc="best")


def _draw_kl(axes: Any, report: UnlearnReport) -> None:
    numbers, measured = _course(report, "measured_kl", 0.0)
    _, predicted = _course(report, "predicted_kl", 0.0)
    budget = report.config.get("kl_budget")
    if budget is not None:
        axes.axhline(budget, color=GREY, linestyle="--", linewidth=1.4, label="budget of the end")
    axes.plot(numbers, measured, color=BLUE, marker="s", label="measured", clip_on=False)
    axes.plot(numbers, predicted, color=ORANGE, marker="o", label="predicted ½ΔᵀFΔ", clip_on=False)
    _whole_steps(axes, numbers[-1])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("retain KL (nats/token)")
    axes.legend(loc="best")


def _trial_points(report: UnlearnReport) -> list[tuple[float, float]]:
    return [
        (trial.predicted_kl, trial.measured_kl)
        for trial in (report.outcome.trials if report.outcome is not None else ())
        if 0 < trial.predicted_kl < math.inf and 0 < trial.measured_kl < math.inf
    ]


def _draw_trials(axes: Any, report: UnlearnReport) -> None:
    points = _trial_points(report)
    values = [value for pair in points for value in pair]
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.2, linestyle="--", label="equal")
    axes.scatter(*zip(*points, strict=True), color=BLUE, s=34, alpha=0.85, linewidths=0, label="trial")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set_xlabel("predicted KL (nats/token)")
    axes.set_ylabel("measured KL (nats/token)")
    axes.legend(loc="upper left")


def _draw_costs(axes: Any, costs: Sequence[StageCost]) -> None:
    names = [cost.name for cost in costs]
    seconds = [cost.seconds for cost in costs]
    axes.barh(range(len(names)), seconds, color=BLUE, height=0.62)
    for row, value in enumerate(seconds):
        axes.annotate(
            f"{value:.1f} s", (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * max([*seconds, 1e-9]))
    axes.set_xlabel("wall time (s)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


# ---- page


def _change(before: str, after: str) -> str:
    return f'<span>{escape(before)}</span><span class="arrow">→</span><span>{escape(after)}</span>'


def _tile(name: str, value: str, note: str = "") -> str:
    """A headline number; `value` is HTML."""
    extra = f'<div class="note">{escape(note)}</div>' if note else ""
    return f'<div class="tile"><div class="name">{escape(name)}</div><div class="value">{value}</div>{extra}</div>'


def _tiles(report: UnlearnReport, comparisons: Sequence[Comparison]) -> str:
    last = report.outcome
    nll = last.forget_nll if last else report.forget_nll
    retain = last.retain_nll if last else report.retain_nll
    tiles = [
        _tile(
            c.name,
            _change(_short_percent(c.before.answer_found), _short_percent(c.after.answer_found)),
            "of the replies hold the answer",
        )
        for c in comparisons
        if c.before.answer_found is not None
    ]
    tiles.append(
        _tile("Forget NLL", _change(number_text(report.forget_nll), number_text(nll)), "nats a token to unlearn")
    )
    budget = report.config.get("kl_budget")
    tiles.append(
        _tile(
            "Retain KL, held out",
            escape(number_text(last.measured_kl if last else 0.0, 4)),
            "nats a token, measured" + (f"; the budget was {budget:g}" if budget is not None else ""),
        )
    )
    tiles.append(
        _tile(
            "Retain NLL, held out", _change(number_text(report.retain_nll, 3), number_text(retain, 3)), "nats a token"
        )
    )
    tiles += [
        _tile(c.name, _change(number_text(c.before.perplexity, 2), number_text(c.after.perplexity, 2)), "perplexity")
        for c in comparisons
        if c.before.answer_probability is None
    ]
    if report.costs:
        peak = max(cost.peak_bytes for cost in report.costs)
        tiles.append(_tile("Time", escape(seconds_text(sum(c.seconds for c in report.costs))), "all stages below"))
        tiles.append(_tile("Peak memory", escape(_memory(peak)), "resident memory of the process"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _charts(report: UnlearnReport) -> str:
    figures = []
    if report.outcome is not None:
        figures.append(
            html_figure(
                "Loss by step",
                "Forget should rise, retain should stay.",
                svg_of(lambda axes: _draw_losses(axes, report), "Forget and retain loss by step"),
            )
        )
        figures.append(
            html_figure(
                "Retain KL by step",
                "On held-out retain sequences: on a few along the way, on all at the end, after scaling.",
                svg_of(lambda axes: _draw_kl(axes, report), "Predicted and measured retain KL by step"),
            )
        )
    if _trial_points(report):
        figures.append(
            html_figure(
                "Predicted and measured KL of every trial",
                "The search for the scale; above the dashed line it costs more than the curvature predicted.",
                svg_of(
                    lambda axes: _draw_trials(axes, report), "Measured against predicted KL of all trials", 5.6, 4.2
                ),
            )
        )
    if report.costs:
        costs = report.costs
        height = 1.0 + 0.3 * len(costs)
        figures.append(
            html_figure(
                "Time by stage",
                "Rates and memory are in the table.",
                svg_of(lambda axes: _draw_costs(axes, costs), "Wall time by stage", 5.6, max(4.2, height)),
            )
        )
    return f'<h2>Course of the run</h2><div class="charts">{"".join(figures)}</div>' if figures else ""


def _evaluation(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for comparison in comparisons:
        before, after = comparison.before.summary(), comparison.after.summary()
        rows.append(
            f'<tr class="group"><th colspan="3" scope="colgroup">{escape(comparison.name)}'
            f' <span class="soft">· {before["records"]} records, {before["tokens"]:,} tokens</span></th></tr>'
        )
        for key, title, show in METRICS:
            if before[key] is not None or after[key] is not None:
                cells = html_cells([show(before[key]), show(after[key])])
                rows.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    return f"<h2>Before and after</h2>{html_table(['', 'before', 'after'], rows)}" if rows else ""


def _steps(report: UnlearnReport) -> str:
    end = report.outcome
    states: list[tuple[str, str, float, Step | Outcome]]
    states = [(f"after {step.number}", "", step.eta, step) for step in report.steps]
    if end is not None:
        mark = "no" if end.reason else "yes"
        verdict = f'<span class="{mark}">{"dropped" if end.reason else "kept"}</span>'
        states.append(("end", verdict, end.scale, end))
    rows = []
    for name, verdict, size, state in states:
        figures = [number_text(x, 4) for x in (size, state.predicted_kl, state.measured_kl)]
        figures += [number_text(x) for x in (state.forget_nll, state.retain_nll)]
        rows.append(f'<tr><th scope="row">{name} {verdict}</th>{html_cells(figures)}</tr>')
    head = ["steps", "η, scale", "predicted KL", "measured KL", "forget NLL", "retain NLL"]
    note = (
        '<p class="soft">η is the size of the last step, and of the end the factor by which the whole change was scaled'
        " into the budget. KL and NLL in nats a token, on a few batches along the way and on all at the end.</p>"
    )
    return f"<h2>Steps</h2>{html_table(head, rows)}{note}" if rows else ""


def _costs(costs: Sequence[StageCost]) -> str:
    rows = []
    for cost in costs:
        units = [f"{cost.units:,}", f"{cost.rate:,.0f} {cost.unit}s/s"] if cost.units else ["–", "–"]
        cells = html_cells([seconds_text(cost.seconds), *units, _memory(cost.peak_bytes)])
        rows.append(f'<tr><th scope="row">{escape(cost.name)}</th>{cells}</tr>')
    head = ["stage", "time", "units", "rate", "peak memory"]
    return f"<h2>Cost of each stage</h2>{html_table(head, rows)}" if rows else ""


def _reply(who: str, reply: Generation, judged: bool) -> str:
    verdict = '<span class="yes">answer found</span>' if reply.found else '<span class="no">answer not found</span>'
    text = escape(reply.reply) or '<span class="soft">(empty)</span>'
    return f'<div><span class="who">{who}{f" · {verdict}" if judged else ""}</span>\n{text}</div>'


def _expected(example: Example) -> str:
    return f'<span class="soft"> · expected {escape(example.before.expected)}</span>' if example.judged else ""


def _examples(examples: Sequence[Example]) -> str:
    blocks = [
        f'<div class="example"><div class="ask"><span class="tag">{escape(example.name)}</span>'
        f"{escape(example.before.prompt)}{_expected(example)}</div><div class=pair>"
        f"{_reply('before', example.before, example.judged)}"
        f"{_reply('after', example.after, example.judged)}</div></div>"
        for example in examples
    ]
    return (
        f'<h2>Replies</h2><p class="soft">Greedy, cut at the length asked for.</p>{"".join(blocks)}' if blocks else ""
    )


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f'<div class="warn"><strong>Note.</strong> {escape(text)}.</div>' for text in warnings)


def _configuration(values: Mapping[str, Any]) -> str:
    import yaml

    text = yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)
    return f"<h2>Configuration</h2><pre>{escape(text)}</pre>"


def to_html(
    report: UnlearnReport,
    comparisons: Sequence[Comparison] = (),
    examples: Sequence[Example] = (),
    configuration: Mapping[str, Any] | None = None,
    title: str = "Unlearning report",
) -> str:
    """The page; see `write_report`."""
    scale = report.outcome.scale if report.outcome is not None else 0.0
    model = Path(report.model_id).name if Path(report.model_id).is_absolute() else report.model_id
    steps = report.config.get("steps", 1)
    end = f"scale {scale:.3g}" if scale else "none kept"
    lead = f"Model {model}. {steps} step{'s' * (steps > 1)} taken, {end}."
    parts = [
        f"<header><h1>{escape(title)}</h1><p class=soft>{escape(lead)}</p></header>",
        _tiles(report, comparisons),
        _warnings(report.warnings),
        _evaluation(comparisons),
        _charts(report),
        _steps(report),
        _examples(examples),
        _costs(report.costs),
        _configuration(configuration if configuration is not None else report.config),
        "<footer>Written by kfade. The same figures are in report.json beside this page.</footer>",
    ]
    return html_page(title, parts)


def write_report(
    out_dir: str | Path,
    report: UnlearnReport,
    comparisons: Sequence[Comparison] = (),
    examples: Sequence[Example] = (),
    *,
    configuration: Mapping[str, Any] | None = None,
    title: str = "Unlearning report",
) -> Path:
    """Write `report.json` and `report.html`, each whole or not at all.

    Args:
        out_dir: the directory, made if need be.
        report: of the run.
        comparisons: scores before and after, a data set each.
        examples: replies to show side by side.
        configuration: all options in force; the run's own by default.
        title: of the page.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    values = to_json(report, comparisons, examples, configuration)
    write_text(folder / "report.json", json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page = folder / "report.html"
    write_text(page, to_html(report, comparisons, examples, configuration, title))
    return page
