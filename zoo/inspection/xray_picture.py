"""The X-ray as one picture: a column for each pruner, a row for each layer at which tokens change."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from zoo.inspection.views import View, Xray
from zoo.text.markup import label

ROWS = 4  # maximum number of drawn layers
DIM = 0.22  # factor on the brightness of a dropped patch


def write_picture(xray: Xray, path: Path) -> None:
    """Draw kept patches bright, dropped ones dark, and merged groups in one colour each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    moments = {view.name: _some(view.moments) for view in xray.views}
    rows, columns = max(map(len, moments.values())), len(xray.views)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.1 * columns, 3.75 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for column, view in enumerate(xray.views):
        for row in range(rows):
            axis = axes[row][column]
            axis.set_axis_off()
            if row >= len(moments[view.name]):
                continue
            layer = moments[view.name][row]
            axis.imshow(paint(xray.image, view, layer))
            axis.set_title(_title(view, layer), fontsize=9)
            if row == 0:
                printable = "".join(c for c in view.answer if c.isprintable())  # fonts lack control characters
                answer = "\n".join(textwrap.wrap(printable.strip() or "(nothing)", 44)[:3]).replace("$", "\\$")
                axis.text(0.5, -0.02, answer, transform=axis.transAxes, ha="center", va="top", fontsize=7)
    figure.suptitle(label(f"{xray.model}: {xray.question}"), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paint(image: Any, view: View, layer: int) -> np.ndarray:
    """Paint a view on its picture: (height, width, 3) in [0, 1]."""
    picture = np.asarray(image, dtype=np.float32) / 255
    height, width = picture.shape[:2]
    h, w = view.grid
    tokens = np.array(view.layers[layer]).reshape(h, w)
    patch_of_row, patch_of_column = np.arange(height) * h // height, np.arange(width) * w // width
    at = tokens[patch_of_row][:, patch_of_column]  # (height, width) token of each pixel
    painted = picture.copy()
    gone = at < 0
    painted[gone] = DIM * picture[gone].mean(-1, keepdims=True)
    if view.merged:
        ids, sizes = np.unique(tokens[tokens >= 0], return_counts=True)
        for token in ids[sizes > 1]:
            here = at == token
            painted[here] = 0.55 * picture[here] + 0.45 * np.array(colour(int(token)))
    area = at if view.merged else gone  # without merging, borders between kept patches mean nothing
    borders = np.zeros(at.shape, dtype=bool)
    borders[1:] |= area[1:] != area[:-1]
    borders[:, 1:] |= area[:, 1:] != area[:, :-1]
    if view.merged or (tokens < 0).any():
        painted[borders & ~gone] = 0.25 * painted[borders & ~gone] + 0.75
    return painted


def colour(token: int) -> tuple[float, float, float]:
    """Return a colour for a token, different from those of its neighbours."""
    import colorsys

    # Steps of the golden ratio spread the hues of consecutive indices.
    return colorsys.hsv_to_rgb(token * 0.61803399 % 1, 0.75, 1.0)


def _title(view: View, layer: int) -> str:
    kept = sum(t >= 0 for t in view.layers[layer])
    at = f", from layer {layer}" if len(view.moments) > 1 else ""
    return f"{label(view.name)}: {view.tokens[layer]} tokens\n{kept} of {len(view.layers[layer])} patches{at}"


def _some(moments: list[int]) -> list[int]:
    """Return at most `ROWS` of the layers, including the first and the last."""
    if len(moments) <= ROWS:
        return moments
    return [moments[round(i * (len(moments) - 1) / (ROWS - 1))] for i in range(ROWS)]
