"""The X-ray as one self-contained HTML file, without scripts, fonts or images from elsewhere.

The page holds its data as JSON in `#data`. Its script draws each view on a canvas, and sets `data-kept` and
`data-tokens` of each figure to the drawn counts, for tests. `#layer=3` in the address opens it at layer 3.
"""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from zoo.inspection.views import NONE, Xray

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #777; --warn: #c60; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.2rem auto; max-width: 1500px; padding: 0 1rem; }
h1 { font-size: 1.15rem; margin: 0 0 .2rem; }
.soft { color: var(--soft); margin: .1rem 0 .6rem; }
#bar { position: sticky; top: 0; background: Canvas; padding: .5rem 0; display: flex; gap: .8rem; align-items: center;
  border-bottom: 1px solid var(--line); z-index: 2; }
#bar input { flex: 1; min-width: 8rem; max-width: 40rem; }
#bar[hidden] { display: none; }
#views { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1rem; margin-top: .8rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
figure h2 { font-size: 1rem; margin: 0; }
figure p { margin: .25rem 0; overflow-wrap: anywhere; }
canvas { width: 100%; display: block; border-radius: 3px; }
.differs { color: var(--warn); }
#tip { position: fixed; pointer-events: none; background: Canvas; border: 1px solid var(--line); border-radius: 4px;
  padding: .25rem .5rem; font-size: 13px; white-space: pre; z-index: 3; }
#tip[hidden] { display: none; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const hue = token => Math.round(token * 0.61803399 % 1 * 360);
const stateAt = (view, layer) => {
  const at = Math.min(layer, view.layers.length - 1), patches = view.layers[at];
  const sizes = new Map();
  for (const t of patches) if (t >= 0) sizes.set(t, (sizes.get(t) || 0) + 1);
  return {at, patches, sizes, kept: patches.filter(t => t >= 0).length, tokens: view.tokens[at]};
};
const picture = new Image();
const panels = [];
let layer = 0;

const draw = panel => {
  const {view, canvas} = panel, [h, w] = view.grid, state = stateAt(view, layer);
  panel.state = state;
  panel.figure.dataset.kept = state.kept;
  panel.figure.dataset.tokens = state.tokens;
  panel.figure.dataset.layer = state.at;
  panel.count.textContent = `${state.tokens} image tokens, ${state.kept} of ${state.patches.length} patches` +
    (view.mixed ? " (the projector mixes tokens)" : "");
  const pen = canvas.getContext("2d"), W = canvas.width, H = canvas.height;
  pen.drawImage(picture, 0, 0, W, H);
  const x = c => Math.round(c * W / w), y = r => Math.round(r * H / h);
  for (let i = 0; i < state.patches.length; i++) {
    const r = Math.floor(i / w), c = i % w, t = state.patches[i];
    const box = [x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r)];
    if (t < 0) { pen.fillStyle = "rgba(12, 12, 16, .82)"; pen.fillRect(...box); }
    else if (state.sizes.get(t) > 1) { pen.fillStyle = `hsla(${hue(t)}, 85%, 55%, .45)`; pen.fillRect(...box); }
  }
  pen.strokeStyle = "rgba(255, 255, 255, .8)";
  pen.beginPath();
  const merged = state.sizes.size < state.kept;  // else borders between kept patches say nothing
  const area = (r, c) => { const t = state.patches[r * w + c]; return t < 0 ? -1 : merged ? t : 0; };
  for (let r = 0; r < h; r++) for (let c = 0; c < w; c++) {
    if (r && area(r, c) !== area(r - 1, c)) { pen.moveTo(x(c), y(r)); pen.lineTo(x(c + 1), y(r)); }
    if (c && area(r, c) !== area(r, c - 1)) { pen.moveTo(x(c), y(r)); pen.lineTo(x(c), y(r + 1)); }
  }
  pen.stroke();
};

const tip = document.getElementById("tip");
const describe = (panel, event) => {
  const {view, canvas, state} = panel, [h, w] = view.grid, box = canvas.getBoundingClientRect();
  const c = Math.floor((event.clientX - box.left) / box.width * w);
  const r = Math.floor((event.clientY - box.top) / box.height * h);
  if (c < 0 || r < 0 || c >= w || r >= h) { tip.hidden = true; return; }
  const i = r * w + c, t = state.patches[i], lines = [`row ${r}, column ${c}`];
  lines.push(t < 0 ? "dropped" : `token ${t}` + (state.sizes.get(t) > 1 ? `, of ${state.sizes.get(t)} patches` : ""));
  if (view.scores) lines.push(`score ${view.scores[i].toPrecision(3)}`);
  const inside = Object.keys(view.layer_scores).map(Number).filter(l => l <= state.at);
  if (inside.length) {
    const last = Math.max(...inside), score = view.layer_scores[last][i];
    lines.push(`score in layer ${last}: ${score === null ? "none" : score.toPrecision(3)}`);
  }
  const gone = view.layers.findIndex(now => now[i] < 0);
  if (gone > 0) lines.push(`gone from layer ${gone} on`);
  tip.textContent = lines.join("\\n");
  tip.style.left = Math.min(event.clientX + 14, window.innerWidth - 190) + "px";
  tip.style.top = event.clientY + 14 + "px";
  tip.hidden = false;
};

const plain = data.views.find(view => view.name === data.none);
for (const view of data.views) {
  const figure = make("figure"), canvas = make("canvas"), count = make("p", "", "soft");
  [canvas.width, canvas.height] = data.size;
  figure.dataset.name = view.name;
  figure.append(make("h2", view.name === data.none ? "no pruner" : view.name));
  const chosen = Object.entries(view.options).map(([key, value]) => `${key}=${value}`).join(" ");
  if (chosen) figure.append(make("p", chosen, "soft"));
  figure.append(count, canvas);
  figure.append(make("p", view.answer || "(nothing)", plain && plain.answer !== view.answer ? "differs" : ""));
  const panel = {view, figure, canvas, count};
  panels.push(panel);
  canvas.addEventListener("pointermove", event => describe(panel, event));
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  document.getElementById("views").append(figure);
}
const slider = document.getElementById("slider"), bar = document.getElementById("bar");
const deepest = Math.max(...data.views.map(view => view.layers.length)) - 1;
slider.max = deepest;
bar.hidden = data.views.every(view => view.layers.every(now => now.join() === view.layers[0].join()));
const show = number => {
  layer = Math.max(0, Math.min(deepest, number));
  slider.value = layer;
  document.getElementById("number").textContent = `${layer} of ${deepest}`;
  panels.forEach(draw);
};
slider.addEventListener("input", () => show(Number(slider.value)));
const asked = /layer=(\\d+)/.exec(window.location.hash);
picture.onload = () => panels.forEach(draw);
picture.src = data.picture;
show(asked ? Number(asked[1]) : 0);
"""


def write_page(xray: Xray, path: Path) -> None:
    """Write the page."""
    path.write_text(page(xray), encoding="utf-8")


def page(xray: Xray) -> str:
    """Return the text of the page."""
    refused = "".join(
        f'<p class="soft">{html.escape(name)} does not fit: {html.escape(why)}</p>'
        for name, why in xray.refused.items()
    )
    # Questions and answers may contain "</script>", which would end the element.
    held = json.dumps(data_of(xray), separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">
<title>X-ray: {html.escape(xray.model)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(xray.question)}</h1>
<p class="soft">{html.escape(xray.model)}. Dark: dropped. One colour: merged into one token. Point at a patch for its
score. An answer in orange differs from that without a pruner.</p>
<div id="bar"><label for="slider">layer of the LLM</label><input id="slider" type="range" min="0" value="0">
<span id="number"></span></div>
<div id="views"></div>
{refused}
<div id="tip" hidden></div>
<script type="application/json" id="data">{held}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def data_of(xray: Xray) -> dict[str, Any]:
    """Return the data of the page: the image as a data URL, and the views."""
    buffer = io.BytesIO()
    xray.image.save(buffer, "JPEG", quality=88)
    views = [
        {
            "name": v.name,
            "grid": list(v.grid),
            "layers": v.layers,
            "tokens": v.tokens,
            "answer": v.answer,
            "scores": None if v.scores is None else [_short(s) for s in v.scores],
            "layer_scores": {str(i): [_short(s) for s in row] for i, row in v.layer_scores.items()},
            "mixed": v.mixed,
            "options": v.options,
        }
        for v in xray.views
    ]
    picture = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"none": NONE, "size": list(xray.image.size), "picture": picture, "views": views}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
