"""Sound pictures of every kind open, wherever they are read; broken and foreign ones are named."""

import base64
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, PngImagePlugin, features

from tests.test_images import photo, png
from zoo import registry
from zoo.registry import ZooError
from zoo.vision.images import decode as images
from zoo.vision.images.decode import open_image


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(*chunks, data=None, last=False):
    """A PNG with further chunks, behind its header or behind its pixels."""
    data = data or png(photo())
    at = len(data) - 12 if last else 33
    return data[:at] + b"".join(chunks) + data[at:]


def raw_png(width, height, depth, colour, rows, *chunks):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", head), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def frames(kind, **options):
    others = [Image.new("RGB", photo().size, colour) for colour in ("black", "white")]
    return saved(photo(), kind, save_all=True, append_images=others, duration=50, **options)


LONG = zlib.compress(b"a" * (3 << 20), 9)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
TURNED = photo().transpose(Image.Transpose.ROTATE_180)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
WIDE = [np.repeat(row.ravel(), 2).tobytes() for row in np.asarray(photo())]  # 16 bits a colour
SOUND = {
    "text": with_chunks(chunk(b"tEXt", b"parameters\0" + b"a" * ((1 << 26) + 1))),
    "packed text": with_chunks(chunk(b"zTXt", b"parameters\0\0" + LONG)),
    "text of the world": with_chunks(chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)),
    "texts behind the pixels": with_chunks(
        chunk(b"zTXt", b"a\0\0" + LONG), chunk(b"iTXt", b"b\0\1\0\0\0" + LONG), last=True
    ),
    "profile": with_chunks(chunk(b"iCCP", b"icc\0\0" + LONG)),
    "odd chunks": with_chunks(chunk(b"iCCP", b"icc\0\7"), chunk(b"zTXt", b"a\0\7"), chunk(b"gAMA", b"")),
    "text called transparency": with_chunks(chunk(b"tEXt", b"transparency\0red"), chunk(b"tEXt", b"exif\0red")),
    "orientation in XMP": with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), data=png(TURNED)),
    "orientation in packed XMP": with_chunks(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)), data=png(TURNED)
    ),
    "long XMP": with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)),
    "broken EXIF": with_chunks(chunk(b"eXIf", b"MM\0*\xff\xff")),
    "profile of colours": saved(photo(), "png", icc_profile=SRGB),
    "animated PNG": frames("png"),
    "animated PNG, other first": frames("png", default_image=True),
    "animated WebP": frames("webp", lossless=True),
    "WebP": saved(photo(), "webp", lossless=True),
    "TIFF": saved(photo(), "tiff", compression="tiff_lzw"),
    "TIFF of several pages": frames("tiff"),
    "BMP": saved(photo(), "bmp"),
    "PPM": saved(photo(), "ppm"),
    "RGBA": saved(photo().convert("RGBA"), "png"),
    "palette": saved(photo().quantize(16), "png"),
    "palette of 4 bits": saved(photo().quantize(5), "png", bits=4),
    "sixteen bits a colour": raw_png(40, 30, 16, 2, WIDE),
    "sixteen bits, a clear colour": raw_png(40, 30, 16, 2, WIDE, chunk(b"tRNS", b"\xff" * 5 + b"\0")),
}  # fmt: skip
ABOUT = {  # formats that lose something: how much, in the mean
    "JPEG": (saved(photo(), "jpeg", quality=97, subsampling=0), 1),
    "progressive JPEG": (saved(photo(), "jpeg", quality=97, subsampling=0, progressive=True), 1),
    "CMYK JPEG": (saved(photo().convert("CMYK"), "jpeg", quality=98, subsampling=0), 1),
    "MPO": (saved(photo(), "mpo", save_all=True, append_images=[TURNED], quality=97, subsampling=0), 1),
    "CMYK TIFF": (saved(photo().convert("CMYK"), "tiff"), 1),
    "animated GIF": (frames("gif"), 1),
    "lossy WebP": (saved(photo(), "webp", quality=98), 6),
}
if features.check("avif"):
    ABOUT["AVIF"] = (saved(photo(), "avif", quality=98), 6)
if features.check("jpg_2000"):
    SOUND["JPEG 2000"] = saved(photo(), "jpeg2000", irreversible=False)


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_picture_keeps_its_pixels(name):
    assert np.array_equal(np.asarray(open_image(SOUND[name])), np.asarray(photo()))


@pytest.mark.parametrize("name", ABOUT)
def test_a_lossy_picture_nearly_does(name):
    data, most = ABOUT[name]
    assert np.abs(np.asarray(open_image(data)).astype(int) - np.asarray(photo())).mean() <= most


def rgb_png(colours):
    """A PNG with colours of 16 bits, which Pillow does not write."""
    h, w = colours.shape[:2]
    return raw_png(w, h, 16, 2, [row.astype(">u2").tobytes() for row in colours])


def rgb_tiff(colours):
    h, w = colours.shape[:2]
    body = colours.astype("<u2").tobytes()
    tags = {256: w, 257: h, 258: 8, 259: 1, 262: 2, 273: 14, 277: 3, 278: h, 279: len(body)}
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    head = struct.pack("<2sHI3H", b"II", 42, 14 + len(body), 16, 16, 16)
    return head + body + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colours_of_a_depth_below_sixteen_bits_are_not_black(bits):
    stored = (np.arange(256) << (bits - 8)).reshape(16, 16)
    colours = np.stack([stored, stored // 2, stored // 4], axis=-1)
    for form in (rgb_png, rgb_tiff):
        assert np.array_equal(np.asarray(open_image(form(colours))), colours >> (bits - 8))
    turned = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0")
    upright = np.asarray(open_image(with_chunks(turned, data=rgb_png(colours))))
    assert np.array_equal(upright, (colours >> (bits - 8))[::-1, ::-1])


def test_what_is_transparent_is_white_at_every_depth():
    def seen(data):
        return np.asarray(open_image(data))[0].tolist()

    half, grey = struct.pack(">HH", 0x8000, 0x1234), [[0x80] * 3, [255] * 3]
    assert seen(raw_png(2, 1, 16, 0, [half], chunk(b"tRNS", b"\x12\x34"))) == grey
    assert seen(raw_png(2, 1, 8, 0, [b"\x80\x12"], chunk(b"tRNS", b"\0\x12"))) == grey
    assert seen(raw_png(2, 1, 16, 4, [struct.pack(">HHHH", 0x8000, 0xFFFF, 0, 0)])) == grey
    assert seen(raw_png(2, 1, 8, 4, [b"\x80\xff\0\0"])) == grey
    assert seen(raw_png(2, 1, 4, 0, [b"\x85"], chunk(b"tRNS", b"\0\5"))) == [[0x88] * 3, [255] * 3]
    assert seen(raw_png(2, 1, 2, 0, [b"\x90"], chunk(b"tRNS", b"\0\1"))) == [[0xAA] * 3, [255] * 3]
    low = struct.pack(">HH", 0x80, 0xFFFF)  # what is clear does not count for the depth
    assert seen(raw_png(2, 1, 16, 0, [low], chunk(b"tRNS", b"\xff\xff"))) == grey
    assert seen(raw_png(2, 1, 1, 0, [b"\x40"], chunk(b"tRNS", b"\0\1"))) == [[0] * 3, [255] * 3]
    assert seen(raw_png(2, 1, 8, 2, [b"\x80\x80\x80\1\2\3"], chunk(b"tRNS", b"\0\1\0\2\0\3"))) == grey
    wide = struct.pack(">6H", 0x8000, 0x8000, 0x8000, 0x1234, 0x5678, 0x9ABC)
    assert seen(raw_png(2, 1, 16, 2, [wide], chunk(b"tRNS", b"\x12\x34\x56\x78\x9a\xbc"))) == grey
    palette = chunk(b"PLTE", b"\x80\x80\x80\1\2\3"), chunk(b"tRNS", b"\xff\0")
    assert seen(raw_png(2, 1, 8, 3, [b"\0\1"], *palette)) == grey
    one_bit = saved(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), "png")
    assert seen(one_bit) == [[0] * 3, [255] * 3]


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "F",
    "I;16",
    "I;16B",
    "I;16L",
]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_a_program_of_every_mode(mode):
    image = Image.new(mode, (4, 4))
    image.info["transparency"] = "a text"
    assert open_image(image).mode == "RGB"
    floats = Image.fromarray(np.array([[0.0, np.nan], [1.0, np.inf]], np.float32))
    assert np.asarray(open_image(floats)).shape == (2, 2, 3)


@pytest.mark.parametrize("place", ["file", "tar", "parquet", "base64", "lines of base64", "chat", "image of PIL"])
@pytest.mark.parametrize("name", ["packed text", "palette", "orientation in XMP"])
def test_wherever_it_is_read(tmp_path, place, name):
    data = SOUND[name]
    record = {"id": "a", "question": "What?", "answer": "that", "image": "a.png"}
    coded = base64.b64encode(data).decode()
    if place == "parquet":
        datasets = pytest.importorskip("datasets")
        column = {"image": [{"bytes": data, "path": None}], "question": ["What?"], "answer": ["that"]}
        text = datasets.Value("string")
        kinds = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
        datasets.Dataset.from_dict(column, kinds).to_parquet(tmp_path / "rows.parquet")
        source = registry.build("dataset", {"name": "hf", "path": str(tmp_path / "rows.parquet")}).get(0).images[0]
    elif place == "image of PIL":
        source = Image.open(io.BytesIO(data)) if name != "packed text" else Image.open(io.BytesIO(png(photo())))
    elif place == "chat":
        from zoo.text.processor_chat import _media

        parts = [{"type": "image", "base64": base64.encodebytes(data).decode()}]
        [source] = _media([{"role": "user", "content": parts}], "image")
    else:
        (tmp_path / "a.png").write_bytes(data)
        if place == "tar":
            with tarfile.open(tmp_path / "a.tar", "w") as tar:
                tar.add(tmp_path / "a.png", "a.png")
        elif place != "file":
            record["image"] = "data:image/png;base64," + (
                coded if place == "base64" else coded[:40] + "\n" + coded[40:]
            )
        (tmp_path / "rows.json").write_text(json.dumps([record]))
        options = {"images": str(tmp_path / "a.tar")} if place == "tar" else {}
        node = {"name": "chat_json", "file": str(tmp_path / "rows.json"), **options}
        source = registry.build("dataset", node).get(0).images[0]
    assert np.array_equal(np.asarray(open_image(source)), np.asarray(photo()))


@pytest.mark.parametrize(
    "name", ["JPEG", "progressive JPEG", "animated GIF", "lossy WebP", "WebP", "TIFF", "BMP", "RGBA"]
)
def test_half_a_picture_is_broken(name):
    data = SOUND.get(name) or ABOUT[name][0]
    with pytest.raises(ZooError, match=r"^Image 3 of 'x' (is broken|is not an image)"):
        open_image(data[: len(data) // 2], "3 of 'x'")


@pytest.mark.parametrize("name", [*SOUND, *ABOUT])
def test_bytes_that_changed_give_a_picture_or_an_error(name):
    data = SOUND.get(name) or ABOUT[name][0]
    if len(data) > 100_000:
        pytest.skip("too long to be changed often")
    random = np.random.default_rng(0)
    for _ in range(25):
        changed = bytearray(data)
        for at in random.integers(0, len(data), random.integers(1, 12)):
            changed[at] = random.integers(256)
        try:
            assert open_image(bytes(changed), "3 of 'x'").mode == "RGB"
        except ZooError as error:
            assert str(error).startswith("Image 3 of 'x'")


def test_other_formats_are_not_opened(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    others = {"eps": eps, "ico": saved(photo(), "ico"), "tga": saved(photo(), "tga"), "svg": b"<svg xmlns='x'/>"}
    for kind, data in others.items():
        (tmp_path / f"a.{kind}").write_bytes(data)
        (tmp_path / "a.png").write_bytes(data)
        for source in (tmp_path / f"a.{kind}", tmp_path / "a.png", data, io.BytesIO(data)):
            with pytest.raises(ZooError, match="is not an image that can be decoded; allowed are JPEG, PNG, WEBP"):
                open_image(source)
    assert not started


def test_bombs_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1100)
    for data in [SOUND["WebP"], SOUND["TIFF"], SOUND["BMP"], SOUND["PPM"], ABOUT["JPEG"][0], ABOUT["animated GIF"][0]]:
        with pytest.raises(ZooError, match="An image has 40 x 30 pixels; at most 1100 are decoded"):
            open_image(data)
    monkeypatch.undo()
    huge = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    with pytest.raises(ZooError, match=r"too large|at most"):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_a_file_that_vanished_is_named(tmp_path):
    with pytest.raises(ZooError, match=r"Image 0 of 'x' cannot be read: .*No such file"):
        open_image(lambda: (tmp_path / "gone").read_bytes(), "0 of 'x'")


@pytest.mark.parametrize("body", ["!!!!", "QUJD*", "QUJDR"])
def test_base64_that_is_none_is_named(body):
    with pytest.raises(ZooError, match=r"Image 'data:image/png;base64,.* cannot be decoded"):
        open_image(f"data:image/png;base64,{body}")


def test_limits_of_pillow_stay_as_they_are():
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20 and PngImagePlugin.MAX_TEXT_MEMORY == 64 << 20
