"""Draw the objects of `scenes`, with their places and appearance, many scenes at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLORS = {
    "red": (220, 50, 45),
    "green": (50, 175, 60),
    "blue": (50, 90, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 205),
    "cyan": (60, 210, 220),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
SIZES = ("small", "large")
RADII = (6 / 64, 10 / 64)  # of the image's side

# Pairs that no training image and no training question contains. Each colour and each shape is seen in other pairs.
HELD_OUT = (("red", "square"), ("blue", "triangle"), ("yellow", "circle"), ("purple", "cross"))

WOBBLE = 0.8 / 64  # most that a radius departs from its size
MARGIN = 2  # pixels above and left of the picture, cut off in the end
TRIES = 30  # places tried for an object before it is left out


@dataclass(frozen=True)
class Level:
    """What one step of the difficulty dial means."""

    objects: tuple[int, int]  # fewest and most in a scene
    num_colors: int
    num_shapes: int
    spacing: float  # of the sum of two radii: smaller lets objects overlap more; below 1 / 1.5 centres may be covered
    texture: tuple[int, int]  # range of the ground's RGB values
    noise: int  # grey noise of each pixel of the ground, plus and minus
    jitter: float  # standard deviation of an object's colour


LEVELS = (
    Level((2, 3), 6, 4, 1.3, (100, 120), 0, 0.0),
    Level((2, 5), 6, 4, 0.75, (70, 150), 14, 12.0),
    Level((4, 8), 8, 6, 0.7, (50, 180), 30, 18.0),
)


@dataclass
class Objects:
    """Objects of n scenes, at most k in each; those from `count` on do not exist. A later one lies over an earlier."""

    count: np.ndarray  # (n,)
    color: np.ndarray  # (n, k) index into COLORS
    shape: np.ndarray  # (n, k) index into SHAPES
    large: np.ndarray  # (n, k) index into SIZES
    x: np.ndarray  # (n, k) centre in pixels
    y: np.ndarray  # (n, k)
    radius: np.ndarray  # (n, k) half the side of the bounding box, in pixels
    rgb: np.ndarray  # (n, k, 3) float32

    @property
    def exists(self) -> np.ndarray:
        return np.arange(self.color.shape[1]) < self.count[:, None]  # (n, k)

    def boxes(self, bins: int, size: int) -> np.ndarray:
        """Bounding boxes x1, y1, x2, y2 as bins in [0, bins): (n, k, 4)."""
        corners = [self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius]
        return np.clip(np.stack(corners, -1) * (bins / size), 0, bins - 1).astype(np.int64)


def pair_table(level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Return which pairs (colour * num_shapes + shape) training may show, and which are held out: two lists of ids."""
    colors, n = list(COLORS), level.num_shapes
    held = [colors.index(c) * n + SHAPES.index(s) for c, s in HELD_OUT]
    seen = [p for p in range(level.num_colors * n) if p not in held]
    return np.array(seen), np.array(held)


def place(rng: np.random.Generator, n: int, level: Level, size: int, held_out: bool, skew: float = 0.0) -> Objects:
    """Draw the objects of n scenes. No pair of colour and shape occurs twice in a scene; half the scenes repeat a
    colour or a shape on purpose, so that questions cannot be answered from one attribute.

    Args:
        rng: the only source of randomness.
        n: number of scenes.
        level: difficulty.
        size: side of the image in pixels.
        held_out: make the first object of each scene a held-out pair; otherwise held-out pairs do not occur.
        skew: how much more frequent some pairs are: the i-th is drawn with a weight of (1 + i) ** -skew.
    """
    lowest, k = level.objects
    seen, held = pair_table(level)
    pairs = level.num_colors * level.num_shapes
    order = rng.random((n, pairs))  # the k smallest keys are the pairs of a scene
    ids = np.arange(pairs)
    if skew:
        order = 1 - (1 - order) ** _rarity(ids, pairs, skew)
    order[:, held] += 2
    rows = np.arange(n)
    first = held[rng.integers(len(held), size=n)] if held_out else seen[rng.integers(len(seen), size=n)]
    if skew and not held_out:
        first = seen[(1 - rng.random((n, len(seen))) ** _rarity(seen, pairs, skew)).argmin(1)]
    same_color = ids // level.num_shapes == (first // level.num_shapes)[:, None]
    same_shape = ids % level.num_shapes == (first % level.num_shapes)[:, None]
    partner = np.where(rng.random((n, 1)) < 0.5, same_color, same_shape)
    partner[:, held] = False
    second = np.where(partner, rng.random((n, pairs)), 2).argmin(1)
    shared = rng.random(n) < 0.5
    order[rows[shared], second[shared]] = -1
    order[rows, first] = -2
    chosen = order.argsort(1)[:, :k]  # (n, k)

    wanted = rng.integers(lowest, k + 1, size=n)
    large = rng.integers(2, size=(n, k))
    radius = (np.array(RADII)[large] + rng.uniform(-WOBBLE, WOBBLE, (n, k))) * size
    x, y = _spread(rng, radius, level.spacing, size)
    keep = (np.arange(k) < wanted[:, None]) & np.isfinite(x)
    perm = np.argsort(np.where(keep, rng.random((n, k)), 2), 1)  # existing first, in random order of depth
    if held_out:
        perm = np.argsort(np.where(keep, np.arange(k), k + 1), 1)  # the first object stays the first
    take = lambda a: np.take_along_axis(a, perm, 1)  # noqa: E731
    chosen, large, radius, x, y = map(take, (chosen, large, radius, x, y))
    color = chosen // level.num_shapes
    rgb = np.array(list(COLORS.values()), np.float32)[color] + rng.normal(0, level.jitter, (n, k, 3))
    x, y = np.nan_to_num(x), np.nan_to_num(y)
    return Objects(
        keep.sum(1), color, chosen % level.num_shapes, large, x, y, radius, rgb.clip(0, 255).astype(np.float32)
    )


def _rarity(ids: np.ndarray, pairs: int, skew: float) -> np.ndarray:
    """One over the weight of each of `ids`; the steps of 7 spread frequent pairs over colours and shapes."""
    return (1.0 + ids * 7 % pairs) ** skew


def _spread(rng: np.random.Generator, radius: np.ndarray, spacing: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Find a centre for each object, far enough from those before it; nan where there was none."""
    n, k = radius.shape
    x, y = np.full((n, k), np.nan), np.full((n, k), np.nan)
    for j in range(k):
        r = radius[:, j, None]
        spot = r[..., None] + rng.random((n, TRIES, 2)) * (size - 2 * r[..., None])  # (n, TRIES, 2)
        free = np.ones((n, TRIES), bool)
        for i in range(j):
            far = np.maximum(abs(spot[..., 0] - x[:, i, None]), abs(spot[..., 1] - y[:, i, None]))
            free &= ~(far <= spacing * (r + radius[:, i, None]))  # nan counts as far
        found = free.argmax(1)
        spot = spot[np.arange(n), found]
        ok = free.any(1)
        x[ok, j], y[ok, j] = spot[ok, 0], spot[ok, 1]
    return x, y


def draw(rng: np.random.Generator, objects: Objects, level: Level, size: int) -> np.ndarray:
    """Render the scenes, antialiased: (n, size, size, 3) uint8."""
    canvas = _ground(rng, len(objects.count), level, size)
    alphas = _alphas(objects, level, size)
    left = np.floor(objects.x - objects.radius).astype(int) - 1
    top = np.floor(objects.y - objects.radius).astype(int) - 1
    for i in range(len(canvas)):
        for j in range(objects.count[i]):  # later objects over earlier ones
            alpha, x, y = alphas[i, j], left[i, j] + MARGIN, top[i, j] + MARGIN
            window = canvas[i, y : y + len(alpha), x : x + len(alpha)]
            window += alpha[..., None] * (objects.rgb[i, j] - window)
    canvas += 0.5  # rounds; values stay within 0 and 255, being mixtures of such
    return canvas[:, MARGIN : MARGIN + size, MARGIN : MARGIN + size].astype(np.uint8)


def _ground(rng: np.random.Generator, n: int, level: Level, size: int) -> np.ndarray:
    """Six by six random colours, stretched, and grain on top: (n, size + rim, size + rim, 3) float32."""
    stretch = _bilinear(6, size)  # (size, 6)
    full = MARGIN + size + 5 + int(np.ceil(4 * WOBBLE * size))  # a small object's window may reach over the edge
    ground = np.zeros((n, full, full, 3), np.float32)
    coarse = rng.uniform(*level.texture, (n, 6, 6 * 3)).astype(np.float32)
    across = np.kron(stretch, np.eye(3, dtype=np.float32)).T  # (6 * 3, size * 3)
    fine = (stretch @ coarse).reshape(n * size, 6 * 3) @ across  # one product gives rows of RGB
    fine = fine.reshape(n, size, size, 3)
    if level.noise:
        fine += rng.integers(-level.noise, level.noise + 1, (n, size, size, 1), dtype=np.int8)
    ground[:, MARGIN : MARGIN + size, MARGIN : MARGIN + size] = fine
    return ground


def _alphas(objects: Objects, level: Level, size: int) -> dict[tuple[int, int], np.ndarray]:
    """How much of each pixel of its window an object covers, by (scene, place in it)."""
    alphas: dict[tuple[int, int], np.ndarray] = {}
    for large, radius in enumerate(RADII):
        side = int(np.ceil(2 * (radius + WOBBLE) * size)) + 3  # holds the object and its rim
        pixel = np.arange(side, dtype=np.float32) + 0.5
        for shape in range(level.num_shapes):
            where = np.nonzero((objects.shape == shape) & (objects.large == large) & objects.exists)
            x, y, r = objects.x[where], objects.y[where], objects.radius[where]
            dx = (np.floor(x - r) - 1 - x).astype(np.float32)[:, None, None] + pixel
            dy = (np.floor(y - r) - 1 - y).astype(np.float32)[:, None, None] + pixel[:, None]
            alpha = coverage(SHAPES[shape], dx, dy, r.astype(np.float32)[:, None, None])
            alphas.update(zip(zip(*(axis.tolist() for axis in where), strict=True), alpha, strict=True))
    return alphas


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers, from the signed distance of the pixel's centre to its edge.

    Args:
        shape: one of SHAPES.
        dx: pixels to the right of the shape's centre.
        dy: pixels below it.
        r: half the side of its bounding box.
    """
    ax, ay = abs(dx), abs(dy)
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - r
    elif shape == "square":
        distance = np.maximum(ax, ay) - r
    elif shape == "triangle":  # apex up
        distance = np.maximum(dy - r, (2 * ax - dy - r) * np.float32(5**-0.5))
    elif shape == "cross":
        distance = np.minimum(np.maximum(ax - r, ay - r / 3), np.maximum(ax - r / 3, ay - r))
    elif shape == "diamond":
        distance = (ax + ay - r) * np.float32(2**-0.5)
    else:  # ring
        distance = abs(np.sqrt(dx * dx + dy * dy) - np.float32(0.75) * r) - np.float32(0.25) * r
    return np.clip(np.float32(0.5) - distance, 0, 1)


def _bilinear(coarse: int, fine: int) -> np.ndarray:
    """The matrix that stretches `coarse` values to `fine` ones: (fine, coarse)."""
    at = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
    return np.maximum(0, 1 - abs(at[:, None] - np.arange(coarse))).astype(np.float32)


def cell_labels(objects: Objects, grid: int, bins: int, size: int, ignore: int) -> np.ndarray:
    """Label each cell of a grid: (n, grid * grid, 7) int16.

    A cell belongs to the uppermost object whose bounding box, one pixel wider, holds its centre. The seven labels are
    colour, shape and size (0: ground, else 1 + index) and the box as bins (`ignore` on the ground).
    """
    n, k = objects.color.shape
    labels = np.zeros((n, grid * grid, 7), np.int16)
    labels[..., 3:] = ignore
    middle = (np.arange(grid) + 0.5) * size / grid
    cx, cy = np.tile(middle, grid), np.repeat(middle, grid)
    boxes, exists = objects.boxes(bins, size), objects.exists
    for j in range(k):
        reach = objects.radius[:, j, None] + size / 64
        inside = (abs(cx - objects.x[:, j, None]) <= reach) & (abs(cy - objects.y[:, j, None]) <= reach)
        inside &= exists[:, j, None]
        kinds = np.stack([objects.color[:, j], objects.shape[:, j], objects.large[:, j]], -1) + 1
        values = np.concatenate([kinds, boxes[:, j]], -1).astype(np.int16)  # (n, 7)
        labels = np.where(inside[..., None], values[:, None], labels)
    return labels
