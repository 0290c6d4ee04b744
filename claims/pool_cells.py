"""The experiment of `pool` on photos: the white blood cell of a micrograph is to be boxed (BCCD).

Pictures with exactly one white cell, 64 x 64 pixels, mirrored both ways in training; two convolutions that learn along
give 8 x 8 features, to which learnt positions are added, so that a resampler can tell places. In place of a class whose
presence is asked: whether there are platelets.
"""

import gzip
import json
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.benches.real_data import folder_of
from zoo.claims import pool
from zoo.claims.experiment import Experiment, in_seeds
from zoo.data.image_store import open_store
from zoo.vision.images.decode import open_image

SIZE, BINS, DIM, STEPS = 64, 8, 32, 600
WHITE, PLATELETS = 0, 1


class Cells:
    """Micrographs with one white cell."""

    dim, bins = DIM, BINS

    def __init__(self, seed: int) -> None:  # the pictures are the same ones for every seed
        pass

    def encoder(self) -> nn.Module:
        """Pixels (n, 3, 64, 64) to features (n, 64, D)."""
        return _Encoder()

    def unseen(self, n: int) -> dict[str, Tensor]:
        """The dev split, at most `n` of it."""
        return {name: values[:n] for name, values in _pictures("dev").items()}

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw pictures of the training split, each side half of the time turned round."""
        known = _pictures("train")
        chosen = torch.randint(len(known["x"]), (n,), generator=g)
        batch = {name: values[chosen] for name, values in known.items()}
        for axis, (low, high) in ((3, (0, 2)), (2, (1, 3))):  # boxes are x1 y1 x2 y2, the last ones inside
            turned = torch.rand(n, generator=g) < 0.5
            batch["x"] = torch.where(turned[:, None, None, None], batch["x"].flip(axis), batch["x"])
            box = batch["box"].clone()
            box[turned, low], box[turned, high] = (BINS - 1 - batch["box"][turned][:, side] for side in (high, low))
            batch["box"] = box
        return batch


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), nn.GELU(), nn.Conv2d(DIM, DIM, 2, 2), nn.GELU())
        self.norm = nn.LayerNorm(DIM)  # else the places are louder than the picture
        self.places = nn.Parameter(0.5 * torch.randn(pool.SIDE**2, DIM))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.layers(pixels).flatten(2).mT) + self.places  # (n, 64, D)


@cache
def _pictures(split: str) -> dict[str, Tensor]:
    folder = folder_of("bccd")
    store, rows = open_store(str(folder / f"{split}_images.tar")), []
    with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        records: list[dict[str, Any]] = [json.loads(line) for line in file]
    for record in records:
        boxes = [thing["box"] for thing in record["objects"] if thing["label"] == "WBC"]
        if len(boxes) != 1:
            continue
        image = open_image(store.find(record["image"], split)).resize((SIZE, SIZE))
        sides = np.array([record["width"], record["height"]] * 2)
        first_and_last = np.array(boxes[0]) - [0, 0, 1, 1]
        box = np.clip(first_and_last * BINS // sides, 0, BINS - 1)
        platelets = any(thing["label"] == "Platelets" for thing in record["objects"])
        rows.append((np.asarray(image), box, platelets))
    pixels = torch.tensor(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2)  # (n, 3, 64, 64)
    return {
        "x": pixels.float() / 128 - 1,
        "box": torch.tensor(np.stack([row[1] for row in rows])).long(),
        "class": torch.full((len(rows),), WHITE),
        "asked": torch.full((len(rows),), PLATELETS),
        "there": torch.tensor([row[2] for row in rows]).long(),
    }


EXPERIMENT = Experiment(
    data=("bccd",),
    setting=(
        "as pool, on micrographs of BCCD at 64 x 64 pixels, two convolutions ahead; 600 steps of 64, about 190 "
        "pictures",
        "acc: boxes of the white cell with IoU of at least 0.5, on a grid of 8 x 8, on dev pictures with exactly one",
    ),
    measure=partial(pool.measure, Cells, STEPS),
    bounds=[
        in_seeds(f"acc at {STEPS // part} above {than}", number(part, STEPS))
        for part in (4, 2, 1)
        for than, number in (
            ("the better resampler", pool.above_resamplers),
            ("its own shuffled tokens", pool.above_shuffled),
        )
    ],
)
