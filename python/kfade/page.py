"""Pages that are one file: no script, nothing fetched, charts inline as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

# Okabe and Ito's colours, which most colour-blind readers can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5f6b76"

_STYLE = """
:root { --ink:#1f2933; --soft:#52606d; --line:#d9dee4; --wash:#f5f7f9; --accent:#0072B2; --bad:#b3440a; }
* { box-sizing:border-box; }
body { margin:0; background:#fff; color:var(--ink); font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue","Liberation Sans",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:40px 28px 64px; }
header { border-bottom:3px solid var(--accent); padding-bottom:14px; margin-bottom:26px; }
h1 { font-size:29px; line-height:1.2; margin:0 0 4px; letter-spacing:-.01em; }
h2 { font-size:20px; margin:42px 0 12px; letter-spacing:-.005em; }
p { margin:.4em 0; max-width:75ch; } .soft { color:var(--soft); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(195px,1fr)); gap:14px; }
.tile { border:1px solid var(--line); border-radius:8px; padding:13px 16px; }
.tile .name { color:var(--soft); font-size:14px; }
.tile .value { font-size:21px; font-weight:650; line-height:1.3; font-variant-numeric:tabular-nums;
  overflow-wrap:anywhere; } .tile .value span { display:inline-block; }
.tile .note { color:var(--soft); font-size:13px; line-height:1.35; }
.arrow { color:var(--soft); font-weight:400; padding:0 .12em; }
.charts { display:grid; grid-template-columns:repeat(auto-fit,minmax(400px,1fr)); gap:26px; }
figure { margin:0; break-inside:avoid; } figure svg { width:100%; height:auto; display:block; }
figure svg text { font-family:inherit !important; }
figcaption { font-weight:600; margin-bottom:4px; } figcaption span { display:block; font-weight:400; color:var(--soft);
  font-size:14px; line-height:1.4; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14.5px; font-variant-numeric:tabular-nums; }
th, td { text-align:left; padding:7px 12px; border-bottom:1px solid var(--line); vertical-align:top; }
thead th { color:var(--soft); font-weight:600; border-bottom:2px solid var(--line); white-space:nowrap; }
td.n, th.n { text-align:right; white-space:nowrap; } tbody th { font-weight:600; min-width:9em; }
tr.group th { background:var(--wash); padding-top:9px; }
.warn { border-left:4px solid var(--bad); background:#fdf3ec; padding:10px 16px; margin:16px 0;
  border-radius:0 6px 6px 0; }
.example { border:1px solid var(--line); border-radius:8px; margin:12px 0; break-inside:avoid; overflow:hidden; }
.example .ask { background:var(--wash); padding:9px 16px; border-bottom:1px solid var(--line); overflow-wrap:anywhere; }
.example .tag { float:right; color:var(--soft); font-size:13px; margin-left:14px; }
.example .pair { display:grid; grid-template-columns:1fr 1fr; }
.example .pair > div { padding:9px 16px 12px; white-space:pre-wrap; overflow-wrap:anywhere; }
.example .pair > div + div { border-left:1px solid var(--line); }
.example .who { color:var(--soft); font-size:13px; } .yes, .no { font-weight:600; }
.yes { color:#00664b; } .no { color:var(--bad); }
code, pre { font:13.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace; }
pre { background:var(--wash); padding:14px 18px; border-radius:8px; white-space:pre-wrap;
  overflow-wrap:anywhere; margin:0; }
footer { margin-top:46px; padding-top:12px; border-top:1px solid var(--line); color:var(--soft); font-size:13.5px; }
@media (max-width:640px) { main { padding:24px 14px; } .charts { grid-template-columns:1fr; }
  .example .pair { grid-template-columns:1fr; }
  .example .pair > div + div { border-left:0; border-top:1px solid var(--line); } }
@media print { @page { margin:16mm 14mm; } body { font-size:12px; } main { max-width:none; padding:0; }
  h2 { break-after:avoid; margin-top:26px; } .charts { grid-template-columns:1fr 1fr; gap:16px; }
  .tile .value { font-size:19px; } tr, .tile, .warn { break-inside:avoid; } }
"""


def number_text(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if 1e3 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    if value != 0 and (abs(value) < 10.0**-digits or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def svg_of(draw: Callable[[Any], None], label: str, width: float = 5.6, height: float = 3.3) -> str:
    """Draw on matplotlib axes and give inline SVG, the same bytes for the same data."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": f"kfade {label}",
        "svg.fonttype": "none",  # the page's own font, and text that can be searched
        "font.size": 10,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa5b1",
        "axes.labelcolor": "#1f2933",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e7eb",
        "grid.linewidth": 0.8,
        "xtick.color": "#52606d",
        "ytick.color": "#52606d",
        "lines.linewidth": 2.0,
        "lines.markersize": 6,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def html_figure(title: str, note: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}<span>{escape(note)}</span></figcaption>{svg}</figure>"


def html_table(head: Sequence[str], rows: Sequence[str], numeric_from: int = 1) -> str:
    titles = "".join(
        f'<th scope="col"{" class=n" if i >= numeric_from else ""}>{escape(title)}</th>' for i, title in enumerate(head)
    )
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def html_cells(values: Sequence[str]) -> str:
    return "".join(f'<td class="n">{escape(value)}</td>' for value in values)


def html_page(title: str, parts: Sequence[str]) -> str:
    """One whole page around parts that are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
