"""Reading videos: which frames, when, from which file; what is broken is said with its path."""

import json
import platform
import shutil
import struct
import time

import numpy as np
import pytest
from PIL import Image

from tests.data_places import shared
from zoo.registry import ZooError
from zoo.vision.images.processors import Videos
from zoo.vision.images.video import READERS, ByModel, Video, read_video

av = pytest.importorskip("av")


CODECS = {"mpeg4": {"g": "10", "bf": "2", "qmin": "1", "qmax": "1"}, "libx264": {"g": "10", "bf": "2", "crf": "1"}}


@pytest.fixture(scope="module", params=CODECS)
def clip(request, tmp_path_factory):
    """Forty frames at ten a second, a keyframe every ten, B-frames; frame i has the grey level 6 i."""
    if request.param not in av.codecs_available:
        pytest.skip(f"no encoder {request.param} here")
    path = tmp_path_factory.mktemp("video") / f"{request.param}.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(request.param, rate=10, options=CODECS[request.param])
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def installed():
    from importlib.util import find_spec

    return [name for name, package in READERS.items() if find_spec(package)]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="decord has no wheel for this machine")
def test_the_reader_named_first_is_among_what_the_tests_install():
    assert next(iter(READERS)) == "decord" and "decord" in installed(), "make install"


@pytest.mark.parametrize("reader", ["auto", *READERS])
@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"frames": 4}, [0, 10, 20, 30]),
        ({"frames": 100}, list(range(40))),
        ({"sampling": "fps", "fps": 2.0, "frames": 50}, [0, 5, 10, 15, 20, 25, 30, 35]),
        ({"sampling": "fps", "fps": 5.0, "frames": 4}, [0, 10, 20, 30]),
        ({"sampling": "explicit", "indices": (39, 3, -1, 3)}, [39, 3, 39, 3]),
    ],
)
def test_the_frames_that_were_asked_for_come(clip, reader, options, indices):
    if reader not in ["auto", *installed()]:
        pytest.skip(f"{reader} is not installed")
    if reader == "decord" and clip.stem not in ("libx264",):
        pytest.skip("decord gives other frames than it is asked for in MPEG-4 with B-frames")
    got = read_video(Video(str(clip), reader=reader, **options))
    exact = reader != "auto" or (clip.stem == "libx264" and "decord" in installed())
    assert got.reader == ("pyav" if not exact else "decord" if reader == "auto" else reader)
    assert got.indices == indices and got.total == 40 and got.fps == pytest.approx(10)
    assert got.frames.shape == (len(indices), 48, 64, 3)
    np.testing.assert_allclose(got.frames.mean((1, 2, 3)), [6 * i for i in indices], atol=2.9)
    assert got.times == pytest.approx([i / 10 for i in indices], abs=1e-3)
    assert got.duration == pytest.approx(4)


def test_few_frames_cost_few_frames(clip):
    """Never more than from the last keyframe on: the least a decoder can do."""
    for indices in ([0], [39], [5, 35], [9, 10, 11], [19, 0]):
        got = read_video(Video(str(clip), sampling="explicit", indices=tuple(indices), reader="pyav"))
        spans = {i // 10: max(j % 10 for j in indices if j // 10 == i // 10) for i in indices}
        least = sum(last + 1 for last in spans.values())
        assert got.decoded <= least + 3, (indices, got.decoded, least)  # B-frames come a little later


def test_real_clips(capsys):
    folder = shared("video")
    for line in (folder / "clips.jsonl").read_text().splitlines():
        facts = json.loads(line)
        path = str(folder / facts["file"])
        start = time.perf_counter()
        whole = read_video(Video(path, frames=10_000, reader="pyav"))
        all_seconds, start = time.perf_counter() - start, time.perf_counter()
        eight = read_video(Video(path, reader="pyav"))
        seconds = time.perf_counter() - start
        assert whole.total == facts["frames"] and whole.fps == pytest.approx(facts["fps"], rel=0.02)
        assert whole.frames.shape[1:] == (facts["height"], facts["width"], 3)
        assert np.array_equal(eight.frames, whole.frames[eight.indices])
        assert 10 < whole.frames.mean() < 245 and whole.frames.std() > 10  # pictures, neither black nor white
        assert eight.decoded <= whole.decoded
        for reader in installed():
            assert np.array_equal(read_video(Video(path, reader=reader)).frames, eight.frames)
        with capsys.disabled():
            ratio = f"{eight.decoded} of {whole.decoded} frames decoded, {seconds / all_seconds:.2f} of the time"
            print(f"\n{facts['file']}: 8 frames cost {ratio}", end="")


def test_a_record_may_show_a_video(tmp_path):
    from zoo.registry import build

    shutil.copy(shared("video") / "car_a.mp4", tmp_path / "car.mp4")
    turns = [{"from": "human", "value": "<image>\nWhat drives?"}, {"from": "gpt", "value": "a car"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"id": "1", "image": "car.mp4", "conversations": turns}]))
    data = build("dataset", {"name": "chat_json", "file": str(tmp_path / "talk.json"), "frames": 4})
    sample = data.get(0)
    assert sample.images == [Video(str(tmp_path / "car.mp4"), frames=4)]
    assert [p["type"] for p in sample.dialogs[0].messages[0]["content"]] == ["video", "text"]
    assert len(read_video(sample.images[0]).frames) == 4


@pytest.mark.parametrize("frames", [np.zeros((4, 8, 8, 3), np.uint8), Image.new("RGB", (8, 8))])
def test_decoded_frames_are_refused(frames):
    with pytest.raises(ZooError, match=r"A video is a path or a Video\(path, .*, got (ndarray \[4|Image)"):
        read_video(frames)


def audio(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)


def test_what_cannot_be_read_is_said_with_its_path(clip, tmp_path):
    data = clip.read_bytes()
    files = {
        "missing.mp4": None,
        "empty.mp4": b"",
        "text.mp4": b"no video at all " * 100,
        "truncated.mp4": data[: len(data) // 3],
        "header.mp4": data[:40],
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    audio(tmp_path / "audio.m4a")
    with av.open(str(tmp_path / "zero.mkv"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    for name in [*files, "audio.m4a", "zero.mkv"]:
        for reader in ["auto", *installed()]:
            with pytest.raises(ZooError) as caught:
                read_video(Video(str(tmp_path / name), reader=reader))
            assert name in str(caught.value)
    with pytest.raises(ZooError, match="only audio"):
        read_video(Video(str(tmp_path / "audio.m4a"), reader="pyav"))


def test_mistakes_are_said(clip):
    with pytest.raises(ZooError, match="has 40 frames; there is no frame 40"):
        read_video(Video(str(clip), sampling="explicit", indices=(40,)))
    with pytest.raises(ZooError, match="Did you mean 'uniform'"):
        Video("x.mp4", sampling="unifrom")
    with pytest.raises(ZooError, match="frames must be at least 1"):
        Video("x.mp4", frames=0)


QUARTER = 1 << 16  # 1 in the numbers of a track's matrix


@pytest.fixture(scope="module", params=CODECS)
def marked(request, tmp_path_factory):
    """Twelve frames at ten a second, the first one a keyframe; red on top, else frame i has the grey level 20 i."""
    if request.param not in av.codecs_available:
        pytest.skip(f"no encoder {request.param} here")
    path = tmp_path_factory.mktemp("marked") / f"{request.param}.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(request.param, rate=10, options=CODECS[request.param])
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(12):
            picture = np.full((32, 64, 3), 20 * i, np.uint8)
            picture[:8] = 255, 0, 0
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("reader", ["auto", *READERS])
@pytest.mark.parametrize(
    ("matrix", "turn"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)],
    ids=["right", "half", "left", "upright"],
)
def test_a_video_of_a_phone_is_upright(marked, tmp_path, matrix, turn, reader):
    if reader not in ["auto", *installed()] or (reader == "decord" and marked.stem != "libx264"):
        pytest.skip(f"{reader} does not read it")
    data = bytearray(marked.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (x * QUARTER for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    got = read_video(Video(str(tmp_path / "phone.mp4"), frames=3, reader=reader)).frames
    as_stored = read_video(Video(str(marked), frames=3, reader="pyav")).frames
    np.testing.assert_array_equal(got, np.rot90(as_stored, turn, axes=(1, 2)))


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_frames_that_a_cut_clip_hides_do_not_count(marked, tmp_path, reader):
    """As `ffmpeg -ss 0.5 -c copy` leaves it: the file has all frames from a keyframe on, and shows the last seven."""
    data = bytearray(marked.read_bytes())
    at = data.index(b"elst") + 12
    length, start, hidden = *struct.unpack(">Ii", data[at : at + 8]), 5
    with av.open(str(marked)) as container:
        unit = container.streams.video[0].time_base
    data[at : at + 8] = struct.pack(">Ii", length * 7 // 12, start + int(hidden / 10 / unit))
    (tmp_path / "cut.mp4").write_bytes(data)
    for indices in ((0,), (6, 0, 3), tuple(range(7))):
        got = read_video(Video(str(tmp_path / "cut.mp4"), sampling="explicit", indices=indices, reader=reader))
        assert got.total == 7 and got.times == pytest.approx([i / 10 for i in indices], abs=1e-3)
        shown = got.frames[:, 16:].mean((1, 2, 3))
        np.testing.assert_allclose(shown, [20 * (i + hidden) for i in indices], atol=4)


def test_a_share_of_the_frames_that_a_model_chooses(clip):
    chosen = ByModel(str(clip), sampling="model", by=lambda total, fps: range(0, total, 4))
    assert read_video(chosen, share=0.5).indices == [0, 8, 16, 24, 32]
    assert read_video(Video(str(clip), sampling="explicit", indices=(3, 9, 5)), share=0.3).indices == [3]


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen3VL", "Glm4v", "Glm46V"])
def test_a_model_chooses_frames_of_the_shortest_clips(kind):
    """Qwen2-VL's rule divides by zero for a single frame, GLM-4.6V's finds none in a tenth of a second."""
    videos = Videos({"video_processor_type": f"{kind}VideoProcessor"})
    for total in (1, 2, 3, 5):
        chosen = videos._chosen(total, 30.0)
        assert chosen and all(0 <= i < total for i in chosen) and list(chosen) == sorted(chosen)
