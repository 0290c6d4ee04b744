"""What makes an image the same image: its content, read but not decoded where it is a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from zoo.registry import ZooError
from zoo.registry.foreign import require_file
from zoo.vision.images.decode import data_url_bytes, open_image
from zoo.vision.images.video import Video


def identify(image: Any) -> tuple[tuple[bytes, ...], Any, str]:
    """Return what an image's pixels are a function of, beside a transform; the image itself; its name in messages.

    A file is read, so that one that changed is another image whatever its date, and what is decoded later is what
    was looked at here. The first is empty for what cannot be read: decoding it states why.

    Args:
        image: as in `open_image`, or a `Video`.
    """
    try:
        return _identified(image)
    except (OSError, ValueError, ZooError):
        return (), image, ""


def _identified(image: Any) -> tuple[tuple[bytes, ...], Any, str]:
    from PIL import Image

    if isinstance(image, Video):
        place = Path(image.path).expanduser()
        require_file(place)
        with place.open("rb") as file:  # too large to be held in memory
            content = hashlib.file_digest(file, hashlib.blake2b).digest()
        # Indices may be integers of numpy.
        choice = {name: value for name, value in asdict(image).items() if name != "path"}
        return (b"video", json.dumps(choice, default=int).encode(), content), image, ""
    if callable(image) and not isinstance(image, Image.Image):
        return _identified(image())
    where = ""
    if isinstance(image, str) and image.startswith("data:"):
        image = data_url_bytes(image)
    elif isinstance(image, (str, Path)):
        place = Path(image)
        require_file(place)  # reading a pipe or a device may never end
        image, where = place.read_bytes(), repr(str(place))
    elif hasattr(image, "read"):
        image.seek(0)
        image = image.read()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return (b"file", bytes(image)), image, where
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        return (b"array", f"{image.dtype} {image.shape}".encode(), np.ascontiguousarray(image).tobytes()), image, where
    decoded = open_image(image)
    return (b"rgb", str(decoded.size).encode(), decoded.tobytes()), decoded, where
