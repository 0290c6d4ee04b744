"""One place where an image is decoded, as late as possible and never larger than a bound."""

from __future__ import annotations

import base64
import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.registry import ZooError

if TYPE_CHECKING:
    from PIL import Image

# A file of a few kilobytes can claim any size; the header is read first, and pixels only below this bound. It is the
# size at which Pillow itself starts to warn.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3


def open_image(source: Any, where: str = "") -> Image.Image:
    """Decode `source` to an RGB image, upright as its EXIF orientation says.

    Grey and palette images become RGB; 16-bit values keep their high byte; what is transparent is laid on white.

    Args:
        source: a path, a `data:` URL, encoded bytes, a binary file, a PIL image, an array or a tensor of uint8, (h, w),
            (h, w, 3|4) or (3, h, w), or a function without arguments that returns one of these.
        where: what to call the image in an error, e.g. `image 0 of sample 'n17'`; a path is named by itself.

    Raises:
        ZooError: the image does not exist, is broken, is larger than `MAX_PIXELS`, stands behind a URL (nothing is
            fetched), or is of no kind named above.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, str) and source.startswith("data:image/"):
        source = _of_data_url(source, where)
    if isinstance(source, (str, os.PathLike)):
        if str(source).startswith(("http://", "https://")):
            raise ZooError(f"Image {str(source)!r} is not fetched: download it, and give its path.")
        path = Path(source)
        where = f"{where} ({str(path)!r})" if where else repr(str(path))
        if not path.is_file():
            raise ZooError(f"Image {where} does not exist or is no file.")
        source = path
    where = f"Image {where}" if where else "An image"
    while callable(source) and not isinstance(source, Image.Image):
        source = source()
        if isinstance(source, (str, os.PathLike)):
            return open_image(source, where.removeprefix("Image ").removeprefix("An image"))
    if hasattr(source, "detach") and hasattr(source, "dtype"):  # a tensor
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        source = _of_array(source, where)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    elif not isinstance(source, (Image.Image, Path)) and not hasattr(source, "read"):
        raise ZooError(f"{where} is a {type(source).__name__}; allowed are {_ALLOWED}.")
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(source))
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(source)
        with image:
            _check_size(image.size, where)
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ZooError(f"{where} is too large: {error}") from error
    except ZooError:
        raise
    except UnidentifiedImageError as error:
        raise ZooError(f"{where} is no image that can be decoded.") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise
        raise ZooError(f"{where} is broken: {error}") from error


_ALLOWED = (
    "a path, bytes, a binary file, a PIL image, "
    "a uint8 array or tensor (h, w), (h, w, 3), (h, w, 4) or (3, h, w), or a function"
)


def _of_data_url(url: str, where: str) -> bytes:
    head, _, body = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it is not in base64")
        return base64.b64decode(body, validate=True)
    except ValueError as error:
        raise ZooError(f"Image {where or repr(url[:40])} cannot be decoded: {error}.") from error


def _check_size(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ZooError(f"{where} has {size[0]} x {size[1]} pixels; at most {MAX_PIXELS} are decoded.")


def _of_array(array: Any, where: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)  # (h, w, 3)
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype.name != "uint8" or not shaped or 0 in array.shape:
        raise ZooError(f"{where} is an array {array.shape} of {array.dtype}; allowed are {_ALLOWED}.")
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        values = np.asarray(image).astype(np.float64)
        high = values.max(initial=0)
        if image.mode.startswith("I;16") or high > 255:  # Pillow clips at 255 instead, which gives a white image
            values = values / 256
        elif image.mode == "F" and high <= 1:
            values = values * 255
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    # `convert` returns the same object for RGB: decode here, so that a broken file is reported here.
    image.load()
    return image.convert("RGB") if image.mode != "RGB" else image.copy()
