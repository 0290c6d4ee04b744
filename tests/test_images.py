"""Images of every kind that a data set may hand over, read from real files."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from zoo.registry import ZooError
from zoo.vision.images import decode as images
from zoo.vision.images.decode import open_image


def photo(width=40, height=30):
    """A picture whose corners differ: red, green, blue, white."""
    image = Image.new("RGB", (width, height), (90, 120, 30))
    draw = ImageDraw.Draw(image)
    for x, y, colour in ((0, 0, "red"), (1, 0, "lime"), (0, 1, "blue"), (1, 1, "white")):
        draw.rectangle([x * (width - 8), y * (height - 8), x * (width - 8) + 7, y * (height - 8) + 7], fill=colour)
    return image


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def test_all_sources_give_the_same_picture(tmp_path):
    want = np.asarray(photo())
    photo().save(tmp_path / "a.png")
    data = png(photo())
    sources = [
        tmp_path / "a.png", str(tmp_path / "a.png"), data, bytearray(data), io.BytesIO(data), photo(), want,
        lambda: data, lambda: tmp_path / "a.png", lambda: lambda: photo(), 
        np.dstack([want, np.full((30, 40, 1), 255, "u1")]),
    ]  # fmt: skip
    for source in sources:
        image = open_image(source)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), want), source


def test_the_given_image_is_left_alone():
    given = photo()
    open_image(given).putpixel((0, 0), (1, 2, 3))
    assert given.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = photo()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    assert np.array_equal(np.asarray(open_image(file.getvalue())), np.asarray(upright))


def test_grey_palette_and_bilevel_become_rgb():
    for mode in ("L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB"):
        image = open_image(photo().convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4)))
        assert image.mode == "RGB"
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(open_image(ramp)), ramp[..., None].repeat(3, 2))
    assert np.array_equal(np.asarray(open_image(ramp[..., None])), ramp[..., None].repeat(3, 2))
    palette = open_image(png(photo().convert("P", palette=Image.Palette.ADAPTIVE)))
    assert np.abs(np.asarray(palette).astype(int) - np.asarray(photo())).max() < 8


def test_sixteen_bits_keep_their_high_byte():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    want = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "png")
    assert np.array_equal(np.asarray(open_image(file.getvalue())), want)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "tiff")
    assert np.array_equal(np.asarray(open_image(file.getvalue())), want)
    assert np.array_equal(np.asarray(open_image(Image.fromarray(ramp.astype(np.int32)))), want)
    floats = Image.fromarray((ramp / 65535).astype(np.float32))
    assert np.abs(np.asarray(open_image(floats)).astype(int) - want).max() <= 1


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_depth_below_sixteen_bits_is_not_black(bits, tmp_path):
    """Scanners, cameras and depth sensors store 10 to 14 bits in 16; a float or an integer holds any."""
    want = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    stored = (np.arange(256) << (bits - 8)).reshape(16, 16)
    wide = Image.fromarray(stored.astype(np.uint16))
    for kind in ("png", "tiff"):
        wide.save(tmp_path / f"a.{kind}")
        assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{kind}")), want)
    wide.save(tmp_path / "x-ray.tiff", tiffinfo={262: 0})  # 0 is white
    assert np.abs(np.asarray(open_image(tmp_path / "x-ray.tiff")).astype(int) - want[::-1, ::-1]).max() <= 1
    for image in (wide, Image.fromarray(stored.astype(np.int32)), Image.fromarray(stored.astype(np.float32))):
        assert np.array_equal(np.asarray(open_image(image)), want)
    deep = Image.fromarray(stored.astype(np.int32) << 8)
    assert np.array_equal(np.asarray(open_image(deep)), want)
    infinite = stored.astype(np.float32)
    infinite[0, 0], want[0, 0] = np.inf, 255
    assert np.array_equal(np.asarray(open_image(Image.fromarray(infinite))), want)
    signed = Image.fromarray(np.array([[-1024, 0, 3071]], np.int16))  # of a CT: air, water, bone
    assert np.asarray(open_image(signed))[0, :, 0].tolist() == [0, 64, 255]
    dark = b"P5 2 1 4095\n" + np.array([0, 256], ">u2").tobytes()  # scaled by its own depth
    assert np.asarray(open_image(dark))[0, :, 0].tolist() == [0, 16]
    depth = b"P5 16 16 65535\n" + stored.astype(">u2").tobytes()  # as OpenCV writes any depth
    assert np.array_equal(np.asarray(open_image(depth))[1:], want[1:])
    file = io.BytesIO()
    wide.save(file, "JPEG2000", irreversible=False)  # which states 16 bits
    assert np.array_equal(np.asarray(open_image(file.getvalue()))[1:], want[1:])


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for source in (image, png(image), np.asarray(image), image.convert("LA")):
        got = np.asarray(open_image(source))
        assert got[0, 1].tolist() == [255, 255, 255]
        assert got[0, 0].tolist() != [255, 255, 255]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    file = io.BytesIO()
    palette.save(file, "png", transparency=1)
    assert np.asarray(open_image(file.getvalue()))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_a_huge_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ZooError, match=r"image 3 of sample 'x' has 40 x 30 pixels; at most 1000 .*: 36 x 27 is"):
        open_image(png(photo()), "image 3 of sample 'x'")
    monkeypatch.undo()
    bomb = png(Image.new("1", (20_000, 20_000)))  # 400 million pixels in 50 kB
    assert len(bomb) < 100_000
    with pytest.raises(ZooError, match=r"too large|at most"):
        open_image(bomb)


def test_broken_images_name_themselves(tmp_path):
    data = png(photo(200, 200))
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    file = io.BytesIO()
    photo(200, 200).save(file, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:900])
    for name, message in [("cut.png", "broken"), ("cut.jpg", "broken"), ("text.png", "not an image that can be"),
                          ("empty.png", "not an image that"), ("gone.png", "does not exist")]:  # fmt: skip
        with pytest.raises(ZooError, match=f"{name}.*{message}"):
            open_image(tmp_path / name)
        with pytest.raises(ZooError, match=rf"sample 'n7' .*{name}.*{message}"):
            open_image(lambda name=name: tmp_path / name, "sample 'n7'")
    with pytest.raises(ZooError, match="image 2 of sample 'n7' is broken"):
        open_image(data[:300], "image 2 of sample 'n7'")


@pytest.mark.parametrize(
    "source",
    [3, None, np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), [1, 2]],
    ids=str,
)
def test_other_things_are_refused(source):
    with pytest.raises(ZooError, match="allowed are a path, bytes"):
        open_image(source)


def test_real_photographs_are_read(real_data):
    import tarfile

    count = 0
    with tarfile.open(real_data / "coco_cc" / "images.tar") as tar:
        for member in tar:
            if member.isfile() and count < 5:
                image = open_image(tar.extractfile(member).read(), member.name)
                assert image.mode == "RGB" and min(image.size) > 50
                count += 1
    assert count == 5
