"""Films for the tests of pruners of videos: tiny models, and batches of two videos of unlike length and an image."""

import torch

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.test_positions import made
from zoo.registry import Cut, ImageFeatures
from zoo.vision.images.processors import Picture

LAYOUTS = {
    "frames": {"name": "frames"},
    "frames cls": {"name": "frames", "cls": True},
    "keep": {"name": "anyres", "pinpoints": [[32, 64]]},
    "bilinear": {"name": "anyres", "pinpoints": [[32, 64]], "frames": "bilinear"},
    "average": {"name": "anyres", "pinpoints": [[32, 64]], "frames": "average"},
    "spelt": {"name": "tiles", "style": "grid", "begin": "no", "end": "yes", "overview": "red"},
}
LENGTHS = (5, 1, 8)  # frames of a video, an image, a longer video


def film(frames: int, seed: int = 0, size: int = 32) -> Picture:
    """A video whose later frames change in some of their patches; of one frame, an image."""
    g = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(3, size, size, generator=g)]
    for _ in range(frames - 1):
        change = torch.rand(1, size // 8, size // 8, generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
        pixels.append(pixels[-1] + (change > 0.4) * change * torch.randn(3, size, size, generator=g))
    times = tuple(i / 2 for i in range(frames))
    kind, more = ("frame", {"times": times, "duration": frames / 2}) if frames > 1 else ("image", {})
    return Picture(torch.stack(pixels), Cut(frames, kind, (size, size), **more))


def video(frames: int = 6, n: int = 16, dim: int = 12, seed: int = 0, grid=(4, 4), **known) -> ImageFeatures:
    """Random tokens of a video as a pruner behind the projector gets them."""
    g = torch.Generator().manual_seed(seed)
    cut = Cut(frames, "frame")
    tokens = torch.randn(frames, n, dim, generator=g).cumsum(0)  # frames that follow each other are alike
    return ImageFeatures(tokens, grid, rows=(frames,), cuts=(cut,), row_kind="frame", **known)


def video_model(make_model, pruner: dict | None, layout: str = "frames", positions: str = "kept", **more):
    """A model of 16 tokens a frame with the pruner, of a node."""
    named = None if pruner is None else {pruner["name"]: pruner}
    return made(make_model, named, positions=positions, layout=LAYOUTS[layout], **more)


def rows_of(processor, lengths=LENGTHS, encode="encode"):
    """An encoded sample for each length."""
    rows = []
    for i, frames in enumerate(lengths):
        s = sample((QUESTIONS[i], ANSWERS[i]))
        given = (s,) if encode == "encode" else (s, s.dialogs[0])
        rows.append(getattr(processor, encode)(*given, pixel_values=[film(frames, seed=i)]))
    return rows


def inputs_of(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k not in ("labels", "position_ids")}


def kept_of(model, batch: dict) -> list[int]:
    """How many image tokens each row of a batch keeps, what a layout adds included."""
    with torch.no_grad():
        out = model(**inputs_of(batch))
    return out.passed.sequence.image_mask.sum(1).tolist()
