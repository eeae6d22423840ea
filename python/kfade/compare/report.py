"""The page of a comparison: curves, tables, plain sentences and replies, in one file that fetches nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..page import BLUE, GREEN, GREY, ORANGE, html_cells, html_figure, html_page, html_table, number_text, svg_of
from ..storage import write_text
from .methods import OURS, OWN
from .points import Point, at_equal_kl, spread
from .results import Sweep, our_best, our_seconds, points_csv, ranked, verdict

# K-FADE is blue and thick, as published dark blue; then Okabe and Ito's other colours, and more by line style.
_COLOURS = (ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#7b3f9e", "#8c6d31", "#000000", GREY)
_DASHES = ("-", "--", ":")
_WIDTH, _HEIGHT = 7.6, 5.0
_SHARED = "Thin lines are single seeds, thick ones their mean."


def _look(sweep: Sweep, method: str) -> dict[str, Any]:
    if method in OWN:
        return {"color": BLUE if method == OURS else "#00304f", "linewidth": 3.2, "zorder": 5}
    number = [m for m in dict.fromkeys(run.method for run in sweep.runs) if m not in OWN].index(method)
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": dashes, "linewidth": 1.7}


def _methods(sweep: Sweep) -> list[str]:
    """Labels, K-FADE last so that it lies on top."""
    return sorted(dict.fromkeys(run.method for run in sweep.runs), key=lambda method: method in OWN)


def _value(sweep: Sweep, point: Point) -> float:
    """What is drawn upwards: the distance, or the forget NLL."""
    return point.distance if sweep.aims else point.forget_nll


def _axis(sweep: Sweep) -> str:
    return "KL(retrained ‖ model) on forget" if sweep.aims else "forget NLL"


def _logarithmic(axes: Any, low: float, high: float) -> None:
    """A logarithmic abscissa; over more than a decade only the powers of ten are named."""
    axes.set(xscale="log", xlim=(low, high))
    if high > 10 * low:
        axes.xaxis.set_minor_formatter("")


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: not labels[i].startswith("K-FADE"))
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="upper center", bbox_to_anchor=(0.5, -0.14),
        ncols=4 if max(map(len, labels), default=0) < 24 else 3, fontsize=9,
    )  # fmt: skip


def _steps(sweep: Sweep, axes: Any, grid: Sequence[float], best: Any) -> list[float]:
    """Draw the best value within each abscissa, a faint step line a seed and a strong one for the mean; all values."""
    found: list[float] = []
    chosen = [best(x) for x in grid]
    for method in _methods(sweep):
        look = _look(sweep, method)
        rows = [{p.seed: _value(sweep, p) for p in at.get(method, ())} for at in chosen]
        for seed in range(sweep.options.seeds):
            line = [row.get(seed, math.nan) for row in rows]
            axes.plot(grid, line, drawstyle="steps-post", **{**look, "linewidth": 0.7, "alpha": 0.45})
        mean = [spread(list(row.values()))[0] if row else math.nan for row in rows]
        axes.plot(grid, mean, drawstyle="steps-post", label=sweep.title(method), **look)
        found += mean
    return [value for value in found if math.isfinite(value)]


def _draw_trade(axes: Any, sweep: Sweep) -> None:
    spent = [p.retain_kl for p in sweep.points if p.retain_kl > 0]
    budgets = sweep.options.budgets
    low = min(max(min([*spent, *budgets]), min(budgets) / 30), min(budgets) / 3)
    high = 3 * max(budgets)
    targets = [float(values["retain_kl"]) for values in sweep.retrained]
    high = max([high, *(1.5 * kl for kl in targets)])
    grid = list(np.geomspace(low, high, 160))
    values = _steps(sweep, axes, grid, lambda kl: at_equal_kl(sweep.points, kl))
    start = spread([_value(sweep, run.points[0]) for run in sweep.runs])[0]
    axes.plot([low], [start], "o", color="black", markersize=8, label="original (KL 0)", clip_on=False, zorder=6)
    if targets:
        goal = math.exp(spread([math.log(max(kl, low)) for kl in targets])[0])
        axes.plot([goal], [0.0], "*", color="black", markersize=16, label="retrained", clip_on=False, zorder=6)
    for budget in budgets:
        axes.axvline(budget, color=GREY, linewidth=0.9, linestyle=":")
    top = max([*values, start]) * 1.05 + 1e-9
    _logarithmic(axes, low, high)
    axes.set_ylim(0, top)
    axes.set_xlabel("retain KL to the original, held out (nats/token); dotted: the budgets")
    axes.set_ylabel(f"{_axis(sweep)} (nats/token)")
    _legend(axes)


def _draw_time(axes: Any, sweep: Sweep, budget: float) -> None:
    times = [p.seconds for p in sweep.points if p.seconds > 0]
    low, high = min(times), max(times)
    if high <= low:
        low, high = low / 2, 2 * high
    values = _steps(
        sweep, axes, list(np.geomspace(low, high, 160)), lambda s: at_equal_kl(sweep.points, budget, seconds=s)
    )
    _logarithmic(axes, low, high)
    axes.set_ylim(0, max(values) * 1.05 + 1e-9)
    axes.set_xlabel("seconds of unlearning, its fits and searches included")
    axes.set_ylabel(f"{_axis(sweep)} (nats/token)")
    _legend(axes)


def _utilities(sweep: Sweep) -> dict[str, list[tuple[int, float, float]]]:
    """By method: number of the budget, utility and value of each chosen point that has one."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for number, budget in enumerate(sorted(sweep.options.budgets)):
        for method, points in at_equal_kl(sweep.points, budget).items():
            for point in points:
                utility = sweep.detail(point, budget).get("values", {}).get("utility")
                if utility is not None:
                    found.setdefault(method, []).append((number, utility, _value(sweep, point)))
    return found


def _draw_utility(axes: Any, sweep: Sweep) -> None:
    found = _utilities(sweep)
    for method in _methods(sweep):
        rows = found.get(method, [])
        if not rows:
            continue
        look = _look(sweep, method)
        axes.scatter([u for _, u, _ in rows], [v for _, _, v in rows], s=9, color=look["color"], alpha=0.45)
        line = []
        for number in sorted({n for n, _, _ in rows}):
            some = [(u, v) for n, u, v in rows if n == number]
            line.append((spread([u for u, _ in some])[0], spread([v for _, v in some])[0]))
        axes.plot([u for u, _ in line], [v for _, v in line], marker="o", label=sweep.title(method), **look)
    utilities = [values["utility"] for values in sweep.retrained if "utility" in values]
    if utilities:
        axes.plot([spread(utilities)[0]], [0.0], "*", color="black", markersize=16, label="retrained", clip_on=False)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("utility")
    axes.set_ylabel(f"{_axis(sweep)} (nats/token)")
    _legend(axes)


def _pm(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and deviation of what is there."""
    some = [v for v in values if v is not None]
    if not some:
        return "–"
    mean, deviation = spread(some)
    return number_text(mean, digits) + (f" ± {deviation:.2g}" if len(some) > 1 else "")


def _table_of(sweep: Sweep, budget: float) -> str:
    chosen = at_equal_kl(sweep.points, budget)
    limit = our_seconds(chosen)
    timed = at_equal_kl(sweep.points, budget, seconds=limit) if math.isfinite(limit) else {}
    details = {m: [sweep.detail(p, budget).get("values", {}) for p in points] for m, points in chosen.items()}
    extra = list(dict.fromkeys(name for some in details.values() for values in some for name in values))
    others = list(dict.fromkeys(name for points in chosen.values() for p in points for name in p.others))
    nll = spread([float(v["forget_nll"]) for v in sweep.retrained])[0] if sweep.aims else math.inf
    head = ["method", *(["KL to retrained, forget"] if sweep.aims else []), "forget NLL", "retain KL"]
    head += ["KL to retrained, retain"] if sweep.aims else []
    head += [*(f"KL, {name}" for name in others), *extra, "seconds", "tokens"]
    head += ["the same in K-FADE's time"] if timed else []
    head += ["chosen"]
    rows = []
    for method in ranked(chosen):
        points = chosen[method]
        forget = _pm([p.forget_nll for p in points])
        if spread([p.forget_nll for p in points])[0] > nll:
            forget += " (beyond the retrained)"
        values = [_pm([p.distance for p in points])] if sweep.aims else []
        values += [forget, _pm([p.retain_kl for p in points], 4)]
        values += [_pm([p.retain_kl_retrained for p in points], 4)] if sweep.aims else []
        values += [_pm([p.others.get(name) for p in points], 4) for name in others]
        values += [_pm([v.get(name) for v in details[method]]) for name in extra]
        values += [_pm([p.seconds for p in points], 1), number_text(spread([float(p.tokens) for p in points])[0], 0)]
        values += [_pm([_value(sweep, p) for p in timed[method]])] if timed else []
        picks = dict.fromkeys(f"{p.strength}, step {p.step}" for p in points)
        values.append("; ".join(picks))
        strong = "strong" if method in OWN else "span"
        rows.append(
            f'<tr><th scope="row"><{strong}>{escape(sweep.title(method))}</{strong}></th>{html_cells(values)}</tr>'
        )
    start = sweep.original or [asdict(run.points[0]) for run in sweep.runs]
    for name, found in (("original", start), ("retrained", sweep.retrained)):
        if found:
            rows.append(_reference_row(sweep, name, found, others, extra, len(head)))
    return f"<h3>Within a retain KL of {budget:g} nats a token</h3>{html_table(head, rows)}"


def _reference_row(
    sweep: Sweep, name: str, found: Sequence[Any], others: Sequence[str], extra: Sequence[str], width: int
) -> str:
    values = [_pm([v.get("forget_kl_retrained") for v in found])] if sweep.aims else []
    values += [_pm([v["forget_nll"] for v in found]), _pm([v["retain_kl"] for v in found], 4)]
    values += [_pm([v.get("retain_kl_retrained") for v in found], 4)] if sweep.aims else []
    values += [_pm([v["others"].get(n) for v in found], 4) for n in others]
    values += [_pm([v.get(n) for v in found]) for n in extra]
    values += ["–"] * (width - 1 - len(values))
    return f'<tr class="group"><th scope="row">{name}</th>{html_cells(values)}</tr>'


def _figures(sweep: Sweep) -> str:
    middle = sorted(sweep.options.budgets)[len(sweep.options.budgets) // 2]
    low = "Low is near the retrained model" if sweep.aims else "High is forgotten"
    parts = [
        html_figure(
            "Forgetting against damage",
            f"The best model within each retain KL. {low}. {_SHARED}",
            svg_of(lambda axes: _draw_trade(axes, sweep), f"{sweep.name}: trade-off", _WIDTH, _HEIGHT),
        ),
        html_figure(
            "Forgetting against time",
            f"The best model within a retain KL of {middle:g}, so far. {_SHARED}",
            svg_of(lambda axes: _draw_time(axes, sweep, middle), f"{sweep.name}: time", _WIDTH, _HEIGHT),
        ),
    ]
    if _utilities(sweep):
        parts.append(
            html_figure(
                "Forgetting against utility",
                "The same models, a mark a budget (mean over seeds; small dots are single seeds).",
                svg_of(lambda axes: _draw_utility(axes, sweep), f"{sweep.name}: utility", _WIDTH, _HEIGHT),
            )
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def _replies(sweep: Sweep) -> str:
    """Replies of the original, the retrained, K-FADE's and the best baseline's model of the first seed."""
    if not sweep.questions:
        return ""
    budget = sorted(sweep.options.budgets)[len(sweep.options.budgets) // 2]
    chosen = at_equal_kl([p for p in sweep.points if p.seed == 0], budget)
    shown = [our_best(chosen) or next((m for m in OWN if m in chosen), None)]
    shown.append(next((m for m in ranked(chosen) if m not in OWN), None))
    columns = dict(sweep.replies)
    for method in (m for m in shown if m):
        texts = sweep.detail(chosen[method][0], budget).get("replies") if chosen[method] else None
        columns[sweep.title(method)] = texts or ["(nothing was unlearned within this budget)"] * len(sweep.questions)
    head = ["question", *columns]
    rows = []
    for number, question in enumerate(sweep.questions):
        texts = "".join(f"<td>{escape(replies[number]) or '(empty)'}</td>" for replies in columns.values())
        rows.append(f"<tr><td>{escape(question)}</td>{texts}</tr>")
    note = f'<p class="soft">Greedy; the best model of the first seed within a retain KL of {budget:g}.</p>'
    return f"<h3>Replies</h3>{note}{html_table(head, rows, len(head))}"


def _warnings(sweep: Sweep) -> str:
    counts: dict[str, int] = {}
    for run in sweep.runs:
        for text in run.warnings:
            short = f"{sweep.title(run.method)}, {run.strength}: {text}"
            counts[short] = counts.get(short, 0) + 1
    items = "".join(f"<li>{escape(text)}{f' ({n} times)' if n > 1 else ''}</li>" for text, n in counts.items())
    return f"<details><summary>Notes of the runs ({len(counts)})</summary><ul>{items}</ul></details>" if counts else ""


def allowance_text(sweep: Sweep) -> str:
    """What every method was allowed, in plain words."""
    options = sweep.options
    tries = {m: len({run.strength for run in sweep.runs if run.method == m}) for m in _methods(sweep)}
    same = set(tries.values())
    count = f"{same.pop()}" if len(same) == 1 else "/".join(str(n) for n in tries.values())
    what = (
        f"Every variant: {count} try"
        if sweep.variants
        else f"Every method: {count} tries (K-FADE: budgets of its own; others: learning rates, since the published"
        " ones are for models of billions of parameters)"
    )
    text = f"{what}, {options.seeds} seed{'s' * (options.seeds > 1)}, the same forget and retain batches"
    text += "" if sweep.variants else f", {options.epochs:g} passes over the forget set at most"
    text += f", {options.seconds:g} s" if options.seconds is not None else ""
    how = "nearest to the retrained model" if sweep.aims else "with the highest forget NLL"
    text += f". A table shows, of all models that a method passed through on any try, the one {how} within the budget;"
    text += " the budget is KL measured on retain data that no method saw. Nothing is interpolated."
    text += (
        " Forgetting more than the retrained model is not better: the distance to it counts."
        if sweep.aims
        else " Without a retrained model there is no telling how much forgetting would be enough."
    )
    return text


def section(sweep: Sweep, *, intro: str = "") -> str:
    """One comparison as HTML: sentences, pictures, tables, replies."""
    sentences = "".join(f"<li>{escape(verdict(sweep, budget))}</li>" for budget in sorted(sweep.options.budgets))
    tables = "".join(_table_of(sweep, budget) for budget in sorted(sweep.options.budgets))
    lead = f"<p>{escape(intro)}</p>" if intro else ""
    return (
        f"<h2>{escape(sweep.name)}</h2>{lead}<p class=soft>{escape(allowance_text(sweep))}</p><ul>{sentences}</ul>"
        f"{_figures(sweep)}{tables}{_replies(sweep)}{_warnings(sweep)}"
    )


def rows_section(title: str, intro: str, rows: Sequence[dict[str, Any]]) -> str:
    """Plain rows as a table."""
    head = list(rows[0]) if rows else []
    body = [f"<tr>{html_cells([number_text(v) if isinstance(v, float) else str(v) for v in row.values()])}</tr>"
            for row in rows]  # fmt: skip
    return f"<h2>{escape(title)}</h2><p class=soft>{escape(intro)}</p>{html_table(head, body, 0)}"


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole report."""
    head = f"<header><h1>{escape(title)}</h1><p class=soft>{escape(lead)}</p></header>"
    return html_page(title, [head, *sections, "<footer>Written by kfade.</footer>"])


def write(
    out: Path, title: str, lead: str, sweeps: Sequence[Sweep], *, intros: Sequence[str] = (), more: Sequence[str] = ()
) -> Path:
    """Write `report.html`, `points.csv` and `compare.json`, each whole or not at all.

    Args:
        out: directory, made if need be.
        title, lead: of the page.
        sweeps: a section each.
        intros: what to say in front of each.
        more: further sections, as HTML.

    Returns:
        The path of the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    intros = [*intros, *[""] * (len(sweeps) - len(intros))]
    sections = [section(sweep, intro=intro) for sweep, intro in zip(sweeps, intros, strict=True)]
    write_text(out / "points.csv", points_csv(sweeps))
    values = [sweep.to_json() for sweep in sweeps]
    write_text(out / "compare.json", json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    path = out / "report.html"
    write_text(path, page(title, lead, [*sections, *more]))
    return path
