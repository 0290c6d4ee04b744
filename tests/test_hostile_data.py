"""Data of others: names inside rows never leave the data folder, and broken or endless files are errors, at once."""

import io
import json
import os
import socket
import tarfile
from pathlib import Path
from tempfile import gettempdir

import pytest
from PIL import Image

from zoo import ZooError
from zoo.data.image_store import open_store
from zoo.registry import build

# Names that lead out of a folder of images; SECRET is a picture beside it.
ESCAPES = [
    "../secret.png", "a/../../secret.png", "SECRET", "file://SECRET", "/etc/passwd", "/dev/zero", "/proc/self/environ",
    "http://127.0.0.1:9/x.png", "https://example.org/x.png", "s3://bucket/x.png", "ftp://h/x.png",
    "zip://x.png::http://127.0.0.1:9/x.zip", "hf://datasets/org/name/x.png", "\\\\server\\share\\x.png",
    "C:\\secret.png", "c:/secret.png", "link.png", "folder_link/secret.png", "..\\secret.png", "x\0.png",
    "data://x", "~/secret.png", "pipe.png", "",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder of data with one picture, a link that leads out and a pipe; a secret picture lies beside it."""
    data = tmp_path / "data"
    (data / "real").mkdir(parents=True)
    for file in (tmp_path / "secret.png", data / "real" / "a.png"):
        Image.new("RGB", (4, 4)).save(file)
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "folder_link").symlink_to(tmp_path)
    os.mkfifo(data / "pipe.png")
    return data


def named(name: str, place: Path) -> str:
    return name.replace("SECRET", str(place.parent / "secret.png"))


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("images", ["folder", "tar"])
def test_a_name_in_a_record(name, images, place):
    """Of a picture, and with the ending of a video."""
    if images == "tar":
        with tarfile.open(place / "x.tar", "w") as tar:
            tar.add(place / "real" / "a.png", "real/a.png")
    store = str(place / "x.tar") if images == "tar" else str(place)
    for wanted in (named(name, place), named(name, place).replace(".png", ".mp4")):
        record = {"image": wanted or ".", "question": "q", "answer": "a"}
        (place / "rows.jsonl").write_text(json.dumps(record) + "\n")
        data = build("dataset", {"name": "chat_json", "file": str(place / "rows.jsonl"), "images": store})
        with pytest.raises(ZooError, match=r"rows\.jsonl|image"):
            data.get(0)


def parquet(file: Path, path: str) -> None:
    """Write a row whose image is the name of a file."""
    pytest.importorskip("datasets")
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.array([{"bytes": None, "path": path}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "question": ["q"], "answer": ["a"]}), file)


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("images", [False, True])
def test_a_path_in_a_row_of_parquet(name, images, place):
    parquet(place / "rows.parquet", named(name, place))
    node = {"name": "hf", "path": str(place / "rows.parquet"), **({"images": str(place)} if images else {})}
    with pytest.raises(ZooError, match="image"):
        build("dataset", node).get(0)


def test_a_path_of_the_data_set_itself(place):
    """Below its folder, as it is written or from the root; and below `images`."""
    for name in ("real/a.png", str(place / "real" / "a.png")):
        parquet(place / "rows.parquet", name)
        data = build("dataset", {"name": "hf", "path": str(place / "rows.parquet")})
        assert data.get(0).images == [place / "real" / "a.png"]
    parquet(place / "rows.parquet", "a.png")
    data = build("dataset", {"name": "hf", "path": str(place / "rows.parquet"), "images": str(place / "real")})
    assert data.get(0).images == [place / "real" / "a.png"]


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("hf://datasets/org/name@abc/x/a.png", True),
        ("hf://datasets/org/name/a.png", True),
        ("zip://a.png::hf://datasets/org/name@abc/a.zip", True),
        ("hf://datasets/org/name@abc/../../other/a.png", False),
        ("hf://datasets/org/names/a.png", False),
        ("hf://datasets/org/other@abc/a.png", False),
        ("zip://a.png::http://127.0.0.1/a.zip::hf://datasets/org/name/a", False),
        ("zip://hf://datasets/org/name/a.png", False),
        ("http://127.0.0.1/hf://datasets/org/name/a.png", False),
    ],
)
def test_an_address_of_a_repository(address, inside):
    """A row of a repository names files of that repository, and of archives in it."""
    from zoo.data.hub_rows import RemoteImage, row_image

    if inside:
        assert row_image({"path": address}, None, "row 1", "org/name") == RemoteImage(address)
    else:
        with pytest.raises(ZooError, match="does not belong to the data set"):
            row_image({"path": address}, None, "row 1", "org/name")


def shard(kind: str, path: Path) -> None:
    """Write what is no sound archive."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    sound = path.read_bytes()
    if kind == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif kind == "device":
        path.unlink()
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        path.unlink()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "member of a terabyte":
        info.size = 1 << 40
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + sound[512:])
    elif kind == "negative member":
        header = bytearray(sound[:512])
        header[124:136] = b"\xff" * 12
        header[148:156] = b"        "
        header[148:155] = b"%06o\0" % sum(header)
        path.write_bytes(bytes(header) + sound[512:])
    elif kind == "name of a terabyte":
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
        path.write_bytes(long.tobuf(tarfile.GNU_FORMAT) + sound)
    elif kind == "names without end":
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1
        path.write_bytes((long.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 3000 + sound)
    elif kind == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    elif kind == "noise":
        path.write_bytes(os.urandom(5000))
    elif kind == "twice":
        path.write_bytes(sound[:1024] + sound)
    elif kind == "half":
        path.write_bytes(sound[:700])


@pytest.mark.parametrize(
    "kind",
    ["fifo", "device", "socket", "member of a terabyte", "negative member", "name of a terabyte", "names without end",
     "compressed", "noise", "twice", "half"],
)  # fmt: skip
def test_an_archive(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shard(kind, Path("shard.tar"))
    with pytest.raises(ZooError, match=r"shard\.tar"):
        open_store("*.tar").find("a.png", "record 1").__call__()


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl", "json", "csv"])
def test_pipes_in_the_place_of_shards(ending, tmp_path):
    pytest.importorskip("datasets")
    os.mkfifo(tmp_path / f"a.{ending}")
    for path in (f"a.{ending}", f"*.{ending}", ""):
        with pytest.raises(ZooError, match="pipe"):
            build("dataset", {"name": "hf", "path": str(tmp_path / path)})


def playlists(place: Path) -> dict[str, bytes]:
    """Files that FFmpeg would take for a video, and that name others."""
    secret = place / "secret.txt"
    secret.write_text("a secret")
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n".encode(),
        "hls on the network": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "dash": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>',
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "avi with a playlist": b"RIFF\0\0\0\0AVI #EXTM3U\nhttp://127.0.0.1:9/x.ts\n",
        "mov with a playlist": b"\0\0\0\x18ftypisom#EXTM3U\nhttp://127.0.0.1:9/x.ts\n",
        "zeros": bytes(4096),
        "text": b"no video " * 100,
    }


@pytest.mark.parametrize("kind", list(playlists(Path(gettempdir()))))
@pytest.mark.parametrize("reader", ["auto", "decord", "pyav"])
def test_a_video_that_is_a_list(kind, reader, tmp_path):
    pytest.importorskip("av")
    from zoo.vision.images.video import Video, read_video

    file = tmp_path / "x.mp4"
    file.write_bytes(playlists(tmp_path)[kind])
    with pytest.raises(ZooError, match=r"x\.mp4|video reader"):
        read_video(Video(str(file), reader=reader))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "address"])
def test_a_video_that_is_no_file(kind, tmp_path):
    from zoo.vision.images.video import read_video

    file = tmp_path / "x.mp4"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(ZooError, match="does not exist or is not a file"):
        read_video("http://127.0.0.1:9/x.mp4" if kind == "address" else str(file))


def header_of(width: int, height: int) -> bytes:
    """A PNG that states a size and holds nothing."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


PICTURES = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(MARKER) (w) file closefile\nshowpage\n%%EOF\n",
    "PostScript in a wrapper": b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n",
    "a page": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n",
    "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "a metafile": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "Photoshop": b"8BPS\0\1" + bytes(60),
    "a font": b"STARTFONT 2.1\n" + bytes(60),
    "a playlist": b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n",
    "a picture of a terapixel": header_of(1 << 20, 1 << 20),
    "a picture of a line": header_of(1 << 30, 1),
    "a picture without pixels": header_of(0, 0),
    "a text of gigabytes": b"P6\n99999 99999\n255\n",
    "a text without end": b"P6\n#" + b"#" * 200_000,
    "an archive": b"PK\3\4" + bytes(60),
    "a pickle": b"\x80\4cos\nsystem\n(S'touch MARKER'\ntR.",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("given", ["bytes", "file", "name that lies"])
def test_a_picture(kind, given, tmp_path):
    from zoo.vision.images.decode import open_image

    marker = tmp_path / "ran"
    data = PICTURES[kind].replace(b"MARKER", str(marker).encode())
    file = tmp_path / ("x.png" if given == "name that lies" else "x.eps")
    file.write_bytes(data)
    with pytest.raises(ZooError):
        open_image(data if given == "bytes" else file)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_picture_that_is_no_file(kind, tmp_path):
    from zoo.vision.images.decode import open_image

    file = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with pytest.raises(ZooError, match="does not exist or is not a file"):
        open_image(file)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "a bomb", "half of an archive", "no archive", "brackets"])
def test_a_file_of_records(kind, tmp_path, monkeypatch):
    import gzip

    from zoo.data import record_file

    file = tmp_path / ("x.jsonl.gz" if "archive" in kind or kind == "a bomb" else "x.json")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "brackets":
        file.write_text("[" * 200_000)
    else:
        packed = gzip.compress(b" " * 20_000_000)
        file.write_bytes({"a bomb": packed, "half of an archive": packed[:1000]}.get(kind, b"{}"))
        monkeypatch.setattr(record_file, "_BESIDE", 1 << 20)
    with pytest.raises(ZooError, match=r"x\.json"):
        record_file.RecordFile(file)[0]
