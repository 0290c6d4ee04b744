"""Decode images of any source to RGB, with a bound on their size; the only place where images are decoded."""

from __future__ import annotations

import base64
import io
import math
import os
import sys
import warnings
import zlib
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from zoo.registry import ZooError

if TYPE_CHECKING:
    from PIL import Image

# A file of a few kilobytes can state any size: the header is read first, and pixels are decoded below this bound only.
# It is the size from which Pillow warns.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# Formats that are opened, by a file's first bytes; others of Pillow are documents and drawings (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
FULL = ("PPM", "JPEG2000")  # whose decoders scale a smaller depth to 16 bits, but for a PPM that states 16
DEPTHS = (8, 10, 12, 14, 16)  # bits of a value, as devices give them
# Orders of two bytes -> the other order, by which the low byte of a number is read in place of the high one.
_OTHER = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
_PHOTOMETRIC = 262  # tag of a TIFF
TEXT = 1 << 20  # largest text chunk of a PNG, in bytes, that is read for the orientation
PNG = b"\x89PNG\r\n\x1a\n"


def size_of(source: Any) -> tuple[int, int] | None:
    """Return (height, width) of an image in pixels, as stored, without decoding it; None: it is not known so.

    Args:
        source: as in `open_image`; text is taken for a path.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.height, source.width
    shape: tuple[int, ...] = getattr(source, "shape", ())
    if len(shape) >= 2:  # (3, h, w), or colours last
        h, w = shape[-2:] if len(shape) == 3 and shape[0] == 3 else shape[:2]
        return int(h), int(w)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, (str, Path)):
        return None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(source, formats=_formats()) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def open_image(source: Any, where: str = "", max_pixels: int | None = None) -> Image.Image:
    """Decode `source` to an RGB image, rotated by its EXIF orientation.

    Grey, palette and CMYK images become RGB; transparency is composed on white; of an animation the first frame is
    taken. Values of more than 8 bits are divided by the depth that holds the largest of them (8, 10, 12, 14 or 16
    bits): scanners and depth cameras store 12 bits in 16. Signed ones begin at the lowest. Colours are those of PNG and
    TIFF: of JPEG 2000, PPM and grey with alpha Pillow gives the high bytes alone. Files must be of one of `FORMATS`.

    Args:
        source: a path, a `data:` URL, encoded bytes, a binary file, a PIL image, an array or a tensor of uint8, (h, w),
            (h, w, 3|4) or (3, h, w), or a function without arguments that returns one of these.
        where: name of the image in messages, e.g. `image 0 of sample 'n17'`; a path is added to it.
        max_pixels: of an encoded image, checked before its pixels are decoded; None: `MAX_PIXELS`.

    Raises:
        ZooError: the image does not exist, is broken, is larger than `max_pixels`, is a URL (nothing is fetched), or
            is of another type.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, str) and source.startswith("data:"):
        try:
            source = data_url_bytes(source)
        except ValueError as error:
            raise ZooError(f"Image {where or repr(source[:40])} cannot be decoded: {error}.") from error
    if isinstance(source, (str, os.PathLike)):
        if str(source).startswith(("http://", "https://")):
            raise ZooError(f"Image {str(source)!r} is not fetched: download it, and give its path.")
        path = Path(source)
        where = f"{where} ({str(path)!r})" if where else repr(str(path))
        if not path.is_file():
            raise ZooError(f"Image {where} does not exist or is not a file.")
        source = path
    where = f"Image {where}" if where else "An image"
    while callable(source) and not isinstance(source, Image.Image):
        try:
            source = source()
        except OSError as error:
            raise ZooError(f"{where} cannot be read: {error}") from error
        if isinstance(source, (str, os.PathLike)):
            return open_image(source, where.removeprefix("Image ").removeprefix("An image"), max_pixels)
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
            return _to_rgb(_upright(source), source)
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            return _decoded(file, where, max_pixels or MAX_PIXELS)
    except Image.DecompressionBombError as error:
        raise ZooError(f"{where} is too large ({error}): make it smaller first.") from error
    except ZooError:
        raise
    except UnidentifiedImageError as error:
        raise ZooError(f"{where} is not an image that can be decoded; allowed are {', '.join(FORMATS)}.") from error
    except Exception as error:  # Pillow's decoders raise errors of many classes on broken files
        raise ZooError(f"{where} is broken: {error or type(error).__name__}") from error


_ALLOWED = (
    "a path, bytes, a binary file, a PIL image, "
    "a uint8 array or tensor (h, w), (h, w, 3), (h, w, 4) or (3, h, w), or a function"
)


def base64_bytes(text: str) -> bytes:
    """Decode base64, also if it is wrapped in lines, percent-encoded or lacks its padding.

    Raises:
        ValueError: it contains other characters.
    """
    text = "".join((unquote(text) if "%" in text else text).split()).rstrip("=")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def data_url_bytes(url: str) -> bytes:
    """Return the content of a `data:` URL.

    Raises:
        ValueError: it is broken, or not in base64.
    """
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("it is not in base64")
    return base64_bytes(body)


@cache
def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in every build of Pillow


def _decoded(file: Any, where: str, max_pixels: int) -> Image.Image:
    from PIL import Image

    try:
        file.seek(0)
    except (AttributeError, OSError):
        file = io.BytesIO(file.read())
    if file.read(8) == PNG:
        file = _png_pixels(file)
    with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
        image = Image.open(file, formats=_formats())
    with image:
        _check_size(image.size, where, max_pixels)
        as_stored = bool(image.tile) and image.tile[0][0] == "raw"  # until it is loaded
        as_stored = as_stored or (image.format == "JPEG2000" and _states_16_bits(file))
        _lift(image, file)
        return _to_rgb(_upright(image), image, as_stored)


def _states_16_bits(file: Any) -> bool:
    """Whether a JPEG 2000 file has values of 16 bits: the decoder scales those of fewer to 16."""
    file.seek(0)
    head = file.read(1 << 20)
    sizes = head.find(b"\xff\x4f\xff\x51")  # how the code stream begins
    return sizes >= 0 and head[sizes + 42 : sizes + 43] in (b"\x0f", b"\x8f")


def _lift(image: Any, file: Any) -> None:
    """Scale colours of 16 bits, in place, by the depth that holds the largest of them, as grey values are.

    Pillow keeps their high bytes. Where those are low, the file is read once more for the others.
    """
    import numpy as np
    from PIL import Image

    mode, _, order = _stored_as(image.tile[0]).partition(";") if image.tile else ("", "", "")
    if image.mode != mode or mode not in ("RGB", "RGBA") or order not in _OTHER or "transparency" in image.info:
        return
    tiles: list[Any] = [(*tile[:3], _in_order(tile[3], f"{mode};{_OTHER[order]}")) for tile in image.tile]
    high = np.asarray(image)  # (h, w, 3 or 4)
    if high[..., :3].max() >= 1 << 6:
        return
    file.seek(0)
    with Image.open(file, formats=[image.format]) as again:
        again.tile = tiles
        values = high[..., :3].astype(np.int32) << 8 | np.asarray(again)[..., :3]
    bits = next(b for b in DEPTHS if values.max() < 1 << b)
    image.paste(Image.fromarray(np.concatenate([(values >> (bits - 8)).astype(np.uint8), high[..., 3:]], axis=-1)))


def _stored_as(tile: Any) -> str:
    """Return the form of the pixels in a file, such as `RGB;16B`, which the arguments of a decoder begin with."""
    return str(tile[3] if isinstance(tile[3], str) else next(iter(tile[3] or [""])))


def _in_order(arguments: Any, form: str) -> Any:
    return form if isinstance(arguments, str) else (form, *arguments[1:])


def _png_pixels(file: Any) -> io.BytesIO:
    """Copy a PNG file, already read up to its magic, without chunks other than pixels, transparency and orientation.

    Pillow refuses a picture for a long text chunk, and takes a text chunk named `transparency` for a colour.
    """
    kept, names, depth, colours = [PNG], {b"Raw profile type exif", b"XML:com.adobe.xmp"}, 8, 0
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"}:
            body = file.read(length + 4)
            clear = b""  # the colour that is transparent, as Pillow has the pixels that it compares with it
            if kind == b"IHDR" and len(body) > 9:
                depth, colours = body[8], body[9]
            elif kind == b"tRNS" and (depth, colours, length) == (16, 2, 6):  # of RGB it keeps the high bytes
                clear = bytes([0, body[0], 0, body[2], 0, body[4]])
            elif kind == b"tRNS" and depth in (2, 4) and (colours, length) == (0, 2):  # grey is scaled to 8 bits
                clear = bytes([0, (body[1] & ((1 << depth) - 1)) * 255 // ((1 << depth) - 1)])
            if clear:
                body = clear + zlib.crc32(kind + clear).to_bytes(4, "big")
            kept += [head, body]
        elif kind in {b"tEXt", b"zTXt", b"iTXt"} and length < TEXT:
            body = file.read(length + 4)
            name, _, text = body[:-4].partition(b"\0")
            if name in names and _is_short(kind, text):
                kept += [head, body]
                names.remove(name)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return io.BytesIO(b"".join([*kept, head]))


def _is_short(kind: bytes, text: bytes) -> bool:
    """Whether the text of a PNG chunk, given after its name, decompresses to a length that Pillow accepts."""
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return True
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1], TEXT)
    except zlib.error:
        return False
    return unpack.eof


def _upright(image: Image.Image) -> Image.Image:
    """Rotate an image by its EXIF orientation; unreadable metadata is ignored."""
    from PIL.Image import Transpose

    image.load()
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # the pixels are intact, and viewers show such images too
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _check_size(size: tuple[int, int], where: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        share = math.sqrt(max_pixels / (size[0] * size[1]))
        raise ZooError(
            f"{where} has {size[0]} x {size[1]} pixels; at most {max_pixels} are decoded. Make it smaller first: "
            f"{math.floor(size[0] * share)} x {math.floor(size[1] * share)} is taken."
        )


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


def _to_rgb(image: Image.Image, opened: Any, as_stored: bool = False) -> Image.Image:
    """Convert to RGB.

    Args:
        image: upright.
        opened: the same as it was opened, with the format of its file.
        as_stored: the decoder scales no values.
    """
    from PIL import Image

    clear = image.info.get("transparency")
    if clear is not None and not isinstance(clear, (int, bytes, tuple)):  # a text chunk of that name, not a colour
        image, clear = image.copy(), None
        del image.info["transparency"]
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return Image.fromarray(_in_bytes(image, clear, opened, as_stored)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or clear is not None:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    # `convert` returns the same object for RGB: decode here, so that a broken file is reported here.
    image.load()
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _in_bytes(image: Image.Image, clear: Any, opened: Any, as_stored: bool) -> Any:
    """Scale grey values of any depth to bytes, (h, w); transparent ones are white."""
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    hidden = values == clear if isinstance(clear, int) else np.zeros(values.shape, dtype=bool)
    if image.mode == "I":  # signed, as in CT
        values = values - values[~hidden].min(initial=0)
    high = values[np.isfinite(values) & ~hidden].max(initial=0)
    if image.mode == "F" and high <= 1:
        values = values * 255
    else:  # Pillow would clip at 255, to a white image
        full = opened.format in FULL and not as_stored
        bits = 16 if full else next((b for b in DEPTHS if high < 1 << b), math.frexp(high)[1])
        if opened.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == 0:  # 0 is white, as in some X-rays
            values = 2.0**bits - 1 - values  # Pillow does so with 8 bits
        values = values / 2.0 ** (bits - 8)
    return np.where(hidden, 255, np.nan_to_num(values).clip(0, 255)).astype(np.uint8)
