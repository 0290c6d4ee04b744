"""Read frames of a video with decord or PyAV; the only place where videos are decoded.

Readers are opened per call and closed again: one that lives across a fork hangs. Frames are counted in presentation
order, those that players show: a clip that was cut without encoding it anew begins with hidden ones. They come upright,
as players turn the video of a phone. With PyAV, keyframes are located without decoding, and a seek happens only if one
lies between the last frame read and the next one needed, so that a few frames of a long clip cost a few decoded frames.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.registry import ZooError, first_line, unknown

if TYPE_CHECKING:
    import numpy as np

SAMPLINGS = ("uniform", "fps", "explicit", "model")
READERS = {"decord": "decord", "pyav": "av"}  # name -> package, in the order of preference
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})  # endings of files
EXACT_IN_DECORD = frozenset({"h264", "hevc", "vp8", "vp9"})  # codecs
MAX_BYTES = 8 << 30  # of decoded frames, at once
# Supported containers by FFmpeg's name, and the first bytes of a file. FFmpeg detects formats by content: it would also
# open playlists, whatever their file name, and then every file and address that they list.
CONTAINERS = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot|styp|moof|sidx)", re.DOTALL),
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
}
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}


@dataclass(frozen=True)
class Video:
    """A video of a sample: its path, and which frames to show."""

    path: str
    frames: int = 8  # number of frames (uniform), or the largest number (fps)
    # uniform: evenly from the first frame | fps: at a rate | explicit: `indices` | model: by its video processor
    sampling: str = "uniform"
    fps: float = 1.0  # frames per second, for `fps`
    indices: tuple[int, ...] = ()  # for `explicit`, counted from 0; negative from the end
    reader: str = "auto"  # auto: decord for codecs in which it is exact, else pyav | decord | pyav

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise unknown("sampling of a video", self.sampling, SAMPLINGS)
        if self.frames < 1 or not self.fps > 0:
            raise ZooError(f"frames must be at least 1 and fps above 0, got {self.frames} and {self.fps}.")
        if self.reader != "auto" and self.reader not in READERS:
            raise unknown("video reader", self.reader, READERS)
        if self.sampling == "explicit" and not self.indices:
            raise ZooError(f"Video {self.path!r}: explicit sampling needs indices.")

    def choose(self, total: int, fps: float) -> list[int]:
        """Choose indices of frames from a video of `total` frames at `fps` per second.

        Raises:
            ZooError: an explicit index is out of range.
        """
        if self.sampling == "explicit":
            wrong = [i for i in self.indices if not -total <= i < total]
            if wrong:
                raise ZooError(f"Video {self.path!r} has {total} frames; there is no frame {wrong[0]}.")
            return [i % total for i in self.indices]
        if self.sampling == "model":
            raise ZooError(f"Video {self.path!r}: sampling=model is for models whose video processor chooses frames.")
        if self.sampling == "uniform":
            count = min(self.frames, total)
            return [i * total // count for i in range(count)]
        step = max(fps / self.fps, 1.0)
        chosen = [int(i * step) for i in range(int((total - 1) / step) + 1)]
        if len(chosen) > self.frames:  # a long video is covered whole, at a lower rate
            chosen = [chosen[i * len(chosen) // self.frames] for i in range(self.frames)]
        return chosen


@dataclass(frozen=True)
class ByModel(Video):
    """The frames that a model's video processor chooses, in place of `sampling`."""

    by: Callable[[int, float], Sequence[int]] | None = None  # (frames of the video, frames per second) -> indices

    def choose(self, total: int, fps: float) -> list[int]:
        assert self.by is not None, "it is made with it"
        return [int(i) for i in self.by(total, fps)]


@dataclass(frozen=True)
class _Thinned(Video):
    """A share of the frames that another one shows."""

    whole: Video | None = None
    share: float = 1.0

    def choose(self, total: int, fps: float) -> list[int]:
        assert self.whole is not None, "it is made with it"
        chosen = self.whole.choose(total, fps)
        count = max(1, math.floor(len(chosen) * self.share + 0.5))
        return [chosen[i * len(chosen) // count] for i in range(count)]


@dataclass
class Clip:
    """Decoded frames of a video, with their times."""

    frames: np.ndarray  # (F, h, w, 3) uint8 RGB
    indices: list[int]
    times: list[float]  # of each frame, in seconds
    fps: float
    total: int  # frames of the whole video
    reader: str
    decoded: int | None = None  # frames decoded to get these, for measurements; None: the reader does not report it

    @property
    def duration(self) -> float:
        """Length of the video in seconds."""
        return self.total / self.fps if self.fps else 0.0


def as_video(source: Any) -> Video:
    """Return a `Video` as it is, and a path as eight frames of it, evenly.

    Raises:
        ZooError: it is something else, as frames that were decoded.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, (str, Path)):
        return Video(str(source))
    shape = getattr(source, "shape", None)
    given = type(source).__name__ + (f" {list(shape)}" if shape is not None else "")
    raise ZooError(f"A video is a path or a Video(path, frames=...) of zoo.vision.images.video, got {given}.")


def read_video(video: Video | str | Path, share: float = 1.0) -> Clip:
    """Read the frames selected by `video`; a path alone means eight frames, evenly.

    Args:
        video: which frames to read.
        share: of these frames, in (0, 1]: evenly from the first one, and at least one.

    Raises:
        ZooError: the file does not exist, is not a video, has no frames or is broken.
    """
    video = as_video(video)
    if share != 1:
        video = _Thinned(video.path, reader=video.reader, whole=video, share=share)
    path = Path(video.path).expanduser()
    if not path.is_file():
        raise ZooError(f"Video {str(path)!r} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise ZooError(f"Video {str(path)!r} is empty.")
    with path.open("rb") as file:
        begins = file.read(16)
    if not any(known.match(begins) for known in CONTAINERS.values()):
        raise ZooError(f"Video {str(path)!r} is in none of the supported containers: {', '.join(CONTAINERS)}.")
    there = [name for name, package in READERS.items() if find_spec(package)]
    if video.reader != "auto" and video.reader not in there:
        raise ZooError(f"The video reader {video.reader!r} is not installed: pip install 'zoo-vlm[video]'.")
    if not there:
        raise ZooError("Reading videos needs PyAV or decord: pip install 'zoo-vlm[video]'.")
    read: dict[str, Callable[[Path, Video], Clip]] = {"decord": _with_decord, "pyav": _with_pyav}
    wanted = there if video.reader == "auto" else [video.reader]
    if len(wanted) > 1 and not _exact_in_decord(path):
        wanted = ["pyav"]
    for name in wanted[:-1]:
        try:
            return read[name](path, video)
        except _UnreadableError:
            continue
    return read[wanted[-1]](path, video)


def _exact_in_decord(path: Path) -> bool:
    """Whether decord returns exact frames of this file; not so for MPEG-4 with B-frames, and AV1 is unsupported.

    Where frames are hidden ahead of the first one it counts them, and then gives others than it is asked for.
    """
    import av

    try:
        with av.open(f"file:{path}", container_options=_OPTIONS) as container:
            stream: Any = next((s for s in container.streams.video if s.codec_context.name in EXACT_IN_DECORD), None)
            return stream is not None and not next(container.demux(stream)).is_discard
    except av.error.FFmpegError:
        return False


class _UnreadableError(ZooError):
    """A reader failed on a file that another one may read."""


def _with_decord(path: Path, video: Video) -> Clip:
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
    except Exception as error:  # DECORDError or RuntimeError
        raise _UnreadableError(f"Video {str(path)!r} cannot be read: {first_line(error)}") from error
    if not total:
        raise _UnreadableError(f"Video {str(path)!r} has no frames.")
    indices = video.choose(total, fps)
    try:
        frames = reader.get_batch(indices).asnumpy()  # not by decord's bridge to torch, which is global state
        times = [float(start) for start, _ in reader.get_frame_timestamp(indices)]
    except Exception as error:
        raise _UnreadableError(f"Video {str(path)!r} is broken: {first_line(error)}") from error
    return Clip(frames, indices, times, fps, total, "decord")


def _with_pyav(path: Path, video: Video) -> Clip:
    import av
    import numpy as np

    try:
        with av.open(f"file:{path}", container_options=_OPTIONS) as container:
            stream: Any = next(iter(container.streams.video), None)
            if stream is None:
                raise _UnreadableError(f"Video {str(path)!r} holds no video, only {_kinds(container)}.")
            places, keys = _places(container, stream)
            if not places:
                raise _UnreadableError(f"Video {str(path)!r} has no frames.")
            fps = float(stream.average_rate or stream.base_rate or 0) or 1.0
            indices = video.choose(len(places), fps)
            size = stream.width * stream.height * 3 * len(set(indices))
            if size > MAX_BYTES:
                raise ZooError(f"Video {str(path)!r}: {len(indices)} frames take {size >> 20} MB; the limit is 8 GB.")
            found, decoded = _decode(container, stream, sorted({places[i] for i in indices}), keys)
            missing = [i for i in indices if places[i] not in found]
            if missing:
                raise _UnreadableError(f"Video {str(path)!r} is broken: frame {missing[0]} cannot be decoded.")
            start = places[0]
            times = [float((places[i] - start) * stream.time_base) for i in indices]
    except av.error.FFmpegError as error:
        raise _UnreadableError(f"Video {str(path)!r} is broken or not a video: {first_line(error)}") from error
    frames = np.stack([found[places[i]] for i in indices])
    return Clip(frames, indices, times, fps, len(places), "pyav", decoded)


def _places(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """List the times of all frames and of keyframes in units of the stream, ascending, without decoding.

    Hidden frames are left out; a keyframe may be one of them.
    """
    places, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            if not packet.is_discard:
                places.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    return sorted(places), sorted(keys)


def _decode(container: Any, stream: Any, wanted: Sequence[int], keys: list[int]) -> tuple[dict[int, Any], int]:
    """Decode the frames at the times `wanted`, ascending, and as few others as keyframes allow.

    Returns:
        Time -> frame, and the number of frames decoded.
    """
    found: dict[int, Any] = {}
    decoded, at, frames = 0, None, iter(())
    for place in wanted:
        before = bisect_right(keys, place)
        key = keys[before - 1] if before else (keys[0] if keys else place)
        # Seek only forwards past a keyframe; otherwise the decoder is already closer than any keyframe.
        if at is None or key > at:
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
        while at is None or at < place or place not in found:
            frame = next(frames, None)
            if frame is None:
                return found, decoded
            decoded, at = decoded + 1, frame.pts
            if at == place:
                found[place] = _upright(frame)
            elif at > place:
                break
    return found, decoded


def _upright(frame: Any) -> np.ndarray:
    """Return a frame as RGB, turned and mirrored as its file asks; by quarters of a turn."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is None:
        return pixels
    a, b, _, c, d = memoryview(bytes(matrix)).cast("i")[:5]  # x' = a x + c y, y' = b x + d y
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _kinds(container: Any) -> str:
    return ", ".join(sorted({s.type for s in container.streams})) or "nothing"
