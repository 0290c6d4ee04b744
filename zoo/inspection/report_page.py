"""The page of a report: every figure, and curves of loss and scores; one HTML file without anything from elsewhere.

The page holds its data as JSON in `#data`. Its script draws a chart for the loss and for each score that was measured
during training, and sets `data-lines` of each chart to the number of its curves, for tests.
"""

import html
import json
from collections.abc import Sequence

from zoo.inspection.report_picture import smoothed
from zoo.inspection.run_summary import Summary

POINTS = 400  # of a curve, at most

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #777; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1300px; padding: 0 1rem; }
h1 { font-size: 1.2rem; margin: 0 0 .4rem; } h2 { font-size: 1rem; margin: .2rem 0; }
.soft { color: var(--soft); }
#figures { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: pre; border-bottom: 1px solid var(--line); }
th:nth-child(1), td:nth-child(1) { text-align: left; white-space: normal; min-width: 12rem; }
thead th { vertical-align: bottom; font-weight: 600; }
td.best { font-weight: 700; }
label { cursor: pointer; } label i { display: inline-block; width: 1rem; height: .7rem; border-radius: 2px; }
#charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem; margin-top: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: currentColor; }
svg .grid { stroke: var(--line); stroke-width: .6; }
svg path { fill: none; stroke-width: 1.8; }
#tip { position: fixed; pointer-events: none; background: Canvas; border: 1px solid var(--line); border-radius: 4px;
  padding: .25rem .5rem; font-size: 13px; white-space: pre; z-index: 3; }
#tip[hidden] { display: none; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), W = 520, H = 260, L = 54, R = 10, T = 8, B = 26;
const tip = document.getElementById("tip"), hidden = new Set();
const make = (parent, name, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const nice = value => Number(value.toPrecision(3)).toLocaleString("en");
const ticks = (low, high, log) => {
  if (log) {
    const all = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of [1, 2, 5]) all.push(m * 10 ** e);
    return all.filter(v => v >= low && v <= high);
  }
  const raw = (high - low) / 5, e = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * e).find(s => s >= raw), first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => (first + i) * step);
};
const draw = figure => {
  const chart = figure.chart, svg = figure.querySelector("svg");
  svg.replaceChildren();
  const lines = chart.lines.filter(line => !hidden.has(line.run));
  figure.dataset.lines = lines.length;
  const points = lines.flatMap(line => line.points);
  if (!points.length) return;
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const low = Math.min(...ys), log = chart.log && low > 0;
  let x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = low, y1 = Math.max(...ys);
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { y0 = log ? y0 / 1.1 : y0 - 1; y1 = log ? y1 * 1.1 : y1 + 1; }
  const scale = v => log ? Math.log(v) : v;
  const x = v => L + (v - x0) / (x1 - x0) * (W - L - R);
  const y = v => H - B - (scale(v) - scale(y0)) / (scale(y1) - scale(y0)) * (H - B - T);
  for (const v of ticks(y0, y1, log)) {
    make(svg, "line", {class: "grid", x1: L, x2: W - R, y1: y(v), y2: y(v)});
    make(svg, "text", {x: L - 6, y: y(v) + 4, "text-anchor": "end"}, nice(v));
  }
  for (const v of ticks(x0, x1, false))
    make(svg, "text", {x: x(v), y: H - 8, "text-anchor": "middle"}, v.toLocaleString("en"));
  for (const line of lines) {
    make(svg, "path", {stroke: data.runs[line.run].color,
      d: line.points.map((p, i) => (i ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("")});
    for (const p of line.points.length < 40 ? line.points : [])
      make(svg, "circle", {cx: x(p[0]), cy: y(p[1]), r: 2.2, fill: data.runs[line.run].color});
  }
  figure.at = at => x0 + (at - L) / (W - L - R) * (x1 - x0);
};
const figures = data.charts.map(chart => {
  const figure = document.createElement("figure"), head = document.createElement("h2");
  head.textContent = chart.title;
  figure.append(head);
  make(figure, "svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": chart.title});
  figure.chart = chart;
  document.getElementById("charts").append(figure);
  const svg = figure.querySelector("svg");
  svg.addEventListener("mousemove", event => {
    const box = svg.getBoundingClientRect(), step = figure.at((event.clientX - box.left) / box.width * W);
    const near = line => line.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    const lines = chart.lines.filter(line => !hidden.has(line.run) && line.points.length);
    tip.textContent = [`step ${Math.round(step)}`,
      ...lines.map(line => `${nice(near(line)[1])}  ${data.runs[line.run].name}`)].join("\\n");
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.clientY + 14 + "px";
  });
  svg.addEventListener("mouseleave", () => { tip.hidden = true; });
  draw(figure);
  return figure;
});
for (const box of document.querySelectorAll("input[data-run]"))
  box.addEventListener("change", () => {
    hidden[box.checked ? "delete" : "add"](Number(box.dataset.run));
    figures.forEach(draw);
  });
"""
_COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def page(found: Sequence[Summary], figures: Sequence[tuple[str, list[str], list[bool]]], stated: str = "") -> str:
    """Return the page.

    Args:
        found: the runs.
        figures: columns of the table, from `zoo.inspection.report.figures`.
        stated: what is equal in all runs.
    """
    held = json.dumps(_data(found), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    heads = "".join(f"<th>{html.escape(heading)}</th>" for heading, _, _ in figures)
    rows = []
    for at, run in enumerate(found):
        mark = f'<i style="background:{_color(at)}"></i>'
        box = f'<label><input type="checkbox" checked data-run="{at}"> {mark} {html.escape(run.label)}</label>'
        cells = "".join(f"<td{' class=best' * best[at]}>{html.escape(text[at])}</td>" for _, text, best in figures)
        note = f'<br><span class="soft">{html.escape(run.error)}</span>' if run.error else ""
        rows.append(f'<tr title="{html.escape(str(run.path))}"><td>{box}{note}</td>{cells}</tr>')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title>Report of {len(found)} runs</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Report of {len(found)} runs</h1>
<p class="soft">{html.escape(stated)}</p>
<div id="figures"><table><thead><tr><th>run</th>{heads}</tr></thead><tbody>
{"".join(rows)}
</tbody></table></div>
<p class="soft">Scores in per cent with their standard errors; the best is bold. Untick a run to hide its curves.</p>
<div id="charts"></div>
<div id="tip" hidden></div>
<script type="application/json" id="data">{held}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _data(found: Sequence[Summary]) -> dict[str, object]:
    names = list(dict.fromkeys(name for run in found for name in run.score_curves))
    loss = [{"run": at, "points": _points(run.curve, smooth=True)} for at, run in enumerate(found) if run.curve]
    charts: list[dict[str, object]] = [{"title": "loss", "log": True, "lines": loss}] if loss else []
    for name in names:
        some = [(at, run.score_curves[name]) for at, run in enumerate(found) if name in run.score_curves]
        lines = [{"run": at, "points": [[x, 100 * y] for x, y in _points(curve)]} for at, curve in some]
        charts.append({"title": f"{name}, per cent", "log": False, "lines": lines})
    return {"runs": [{"name": run.label, "color": _color(at)} for at, run in enumerate(found)], "charts": charts}


def _points(curve: Sequence[tuple[int, float]], smooth: bool = False) -> list[list[float]]:
    """Return a curve in at most `POINTS` points, without values that are not finite."""
    finite = [(x, y) for x, y in curve if abs(y) != float("inf") and y == y]
    if not finite:
        return []
    steps, values = smoothed(finite) if smooth else tuple(zip(*finite, strict=True))
    every = max(1, -(-len(finite) // POINTS))
    kept = [i for i in range(len(finite)) if i % every == 0 or i == len(finite) - 1]
    return [[float(steps[i]), float(f"{values[i]:.5g}")] for i in kept]


def _color(at: int) -> str:
    return _COLORS[at % len(_COLORS)]
