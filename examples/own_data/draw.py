"""Draw sixty pictures of one shape each, and write records.json with two questions about every one."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"red": (214, 48, 49), "green": (0, 148, 90), "blue": (30, 90, 220)}
SHAPES = ("circle", "square", "triangle")
SIZE = 64  # pixels a side


def draw(shape: str, color: str, random: np.random.Generator) -> Image.Image:
    """A shape somewhere on a grey picture with a little noise."""
    ground = np.clip(128 + random.normal(0, 12, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(ground)
    r = int(random.integers(10, 18))
    x, y = (int(v) for v in random.integers(r + 2, SIZE - r - 2, 2))
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[color])
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=COLORS[color])
    else:
        pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=COLORS[color])
    return picture


def main(folder: Path = Path()) -> None:
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir(exist_ok=True)
    records = []
    for i in range(60):
        shape, color = SHAPES[i % 3], list(COLORS)[i // 3 % 3]
        name = f"{i:02}.png"
        draw(shape, color, random).save(folder / "pictures" / name)
        split = "eval" if i >= 45 else "train"
        for question, answer in (("Which color is it?", color), ("Which shape is it?", shape)):
            record = {"image": name, "question": question, "answer": answer}
            records.append(record | {"kind": question.split()[1], "split": split})
    (folder / "records.json").write_text(json.dumps(records, indent=1))
    print(f"drew 60 pictures; records.json has {len(records)} questions")


if __name__ == "__main__":
    main()
