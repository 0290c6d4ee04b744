"""The comparison of `pool` where words are known: SmolLM2-135M tells where a piece of clothing is, and what it is.

A photo of Fashion-MNIST lies at one of nine places of a dark picture. EfficientNet-Lite0 makes 8 x 8 positions of it,
of which the language model gets 16 tokens: pooled (each has a place), or read by 16 learned queries, or joined four to
one. Projector and a low-rank update learn "Where is it?", and "What is it?", the control that needs no place.
"""

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zoo.benches.real_data import CLOTHES, folder_of
from zoo.claims.experiment import Bound, Experiment, Run, gap
from zoo.claims.smollm import CONVOLUTIONS, LLM, LORA, loaded, place_of, scores, trained
from zoo.data.classes import read_idx

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
ENCODER = CONVOLUTIONS[:3]
STEPS, BATCH, TEST = 180, 16, 200
ARMS = {
    "pool": ["projector=pool", "projector.target=[4,4]", "projector.norm=true"],
    "16 queries": ["projector=resampler", "projector.num_queries=16"],
    "pixel shuffle": [*CONVOLUTIONS[3:]],
}
SPLITS = {"where": "", "what": ", what it is"}  # file of dev questions -> end of the name of a row


def photos(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Photos (n, 28, 28) of a split and their classes (n,)."""
    images, classes = (
        read_idx(folder_of("fashion_mnist") / f"{split}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    return images, classes


def draw(run: Run, folder: Path) -> None:
    """Write pictures and questions: train.jsonl with both kinds, where.jsonl and what.jsonl of the dev split."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        train = _questions(run, "train", run.steps(STEPS) * BATCH, archive, 0)
        dev = _questions(run, "dev", run.size(TEST, 2), archive, 1)
    for name, questions in {"train": train, "where": dev[::2], "what": dev[1::2]}.items():
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _questions(run: Run, split: str, number: int, archive: zipfile.ZipFile, offset: int) -> list[dict[str, str]]:
    """Draw pictures into an archive; return two questions about each, where and what."""
    images, classes = photos(split)
    side, g = images.shape[1], run.generator(offset)
    found = []
    for i in range(number):
        row, column = (int(torch.randint(len(names), (), generator=g)) for names in (ROWS, COLUMNS))
        chosen = int(torch.randint(len(images), (), generator=g))
        picture = np.zeros((side * len(ROWS), side * len(COLUMNS)), np.uint8)
        picture[row * side :, column * side :][:side, :side] = images[chosen]
        Image.fromarray(picture).save(written := BytesIO(), "png")
        archive.writestr(name := f"{split}-{i:05d}.png", written.getvalue())
        for question, answer in (
            ("Where is it?", f"{ROWS[row]} {COLUMNS[column]}"),
            ("What is it?", CLOTHES[classes[chosen]]),
        ):
            found.append({"image": name, "question": question, "answer": answer})
    return found


def options(folder: Path, split: str = "where") -> list[str]:
    """Return the options of the data, with a file of dev questions."""
    files = {"file": f"'{folder}/{{split}}.jsonl'", "images": f"'{folder}/pictures.zip'", "eval_split": split}
    return ["data=[chat_json]", "data.chat_json.group_by_image=true",
            *(f"data.chat_json.{key}={value}" for key, value in files.items())]  # fmt: skip


def measure(run: Run) -> None:
    """Draw the pictures, and train every arm from the same language model."""
    folder = place_of(run) / "pictures"
    draw(run, folder)
    for name, words in run.arms(ARMS):
        stages = {"learn": {"steps": STEPS, "train": ["projector", "adapter"]}}
        model = trained(run, name, [LLM, *ENCODER, *words, *LORA, *options(folder)], stages)
        for split, end in SPLITS.items():
            found = scores(run, *loaded(model), options(folder, split), TEST)
            run.add({f"{name}{end}": found["all"]})


EXPERIMENT = Experiment(
    data=("fashion_mnist",),
    setting=(
        f"SmolLM2-135M with LoRA of rank 8, EfficientNet-Lite0 at 256 pixels, 16 tokens; {STEPS} steps of {BATCH} "
        "pictures at 1e-3",
        f"accuracy on {TEST} dev pictures: the place of a piece (guessing: 0.11), and its name (0.1)",
    ),
    measure=measure,
    bounds=(
        Bound("pool above 16 queries", gap("pool", "16 queries"), over="seeds"),
        Bound("pool above pixel shuffle", gap("pool", "pixel shuffle"), over="seeds"),
        Bound("what it is, pool above 16 queries", gap("pool, what it is", "16 queries, what it is"), over="seeds"),
    ),
)
