"""The comparison of `pool` where words are known: SmolLM2-135M tells where a piece of clothing is.

Four photos of Fashion-MNIST, of unlike classes, share a picture, one in each corner. EfficientNet-Lite0 makes 8 x 8
positions of it, of which the language model gets 16 tokens: pooled (each has a place), or read by 16 learned queries,
or joined four to one. Projector and a low-rank update learn "Where is the coat?", and "Is there a coat?", the control
that needs no place.
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

CORNERS = ("top left", "top right", "bottom left", "bottom right")
ENCODER = CONVOLUTIONS[:3]
STEPS, BATCH, TEST = 180, 16, 200
ASKED = 2  # places that are asked for, of four; and whether one piece is there
ARMS = {
    "pool": ["projector=pool", "projector.target=[4,4]", "projector.norm=true"],
    "16 queries": ["projector=resampler", "projector.num_queries=16"],
    "pixel shuffle": [*CONVOLUTIONS[3:]],
}
SPLITS = {"where": "", "there": ", is it there"}  # file of dev questions -> end of the name of a row


def photos(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Photos (n, 28, 28) of a split and their classes (n,)."""
    images, classes = (
        read_idx(folder_of("fashion_mnist") / f"{split}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    return images, classes


def draw(run: Run, folder: Path) -> None:
    """Write pictures and questions: train.jsonl with both kinds, where.jsonl and there.jsonl of the dev split."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        train = _questions(run, "train", run.steps(STEPS) * BATCH, archive, 0)
        dev = _questions(run, "dev", run.size(TEST, 2), archive, 1)
    found = {"train": train, "where": [q for q in dev if "Where" in q["question"]]}
    found["there"] = [q for q in dev if "Where" not in q["question"]]
    for name, questions in found.items():
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _questions(run: Run, split: str, number: int, archive: zipfile.ZipFile, offset: int) -> list[dict[str, str]]:
    images, classes = photos(split)
    g = run.generator(offset)
    of_class = [np.flatnonzero(classes == c) for c in range(len(CLOTHES))]
    found = []
    for i in range(number):
        drawn = torch.randperm(len(CLOTHES), generator=g)
        chosen = [int(c) for c in drawn[: len(CORNERS)]]
        each = [images[of_class[c][int(torch.randint(len(of_class[c]), (), generator=g))]] for c in chosen]
        picture, name = np.block([each[:2], each[2:]]), f"{split}-{i:05d}.png"
        Image.fromarray(picture).save(written := BytesIO(), "png")
        archive.writestr(name, written.getvalue())
        order = torch.randperm(len(CORNERS), generator=g)
        asked = [(f"Where is the {CLOTHES[chosen[k]]}?", CORNERS[k]) for k in map(int, order[:ASKED])]
        there = bool(torch.randint(2, (), generator=g))
        named = CLOTHES[chosen[int(order[-1])] if there else int(drawn[-1])]
        asked.append((f"Is there a {named}?", "yes" if there else "no"))
        found += [{"image": name, "question": question, "answer": answer} for question, answer in asked]
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
        "pictures of four photos at 1e-3",
        f"accuracy on {TEST} dev pictures: the corner of a named piece (guessing: 0.25), whether it is there (0.5)",
    ),
    measure=measure,
    bounds=(
        Bound("pool above 16 queries", gap("pool", "16 queries"), over="seeds"),
        Bound("pool above pixel shuffle", gap("pool", "pixel shuffle"), over="seeds"),
        Bound("is it there, pool above 16 queries", gap("pool, is it there", "16 queries, is it there"), over="seeds"),
    ),
)
