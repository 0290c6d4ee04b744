"""One place where a video is read: a few of its frames, as late as possible, by decord or PyAV behind the same call.

Readers are opened where frames are needed and closed again: one that lives across a fork hangs. Frames are counted in
the order in which they are shown. PyAV finds keyframes without decoding and jumps only where one lies between what was
read last and what is wanted next, so that a few frames of a long clip cost a few frames.
"""

from __future__ import annotations

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

SAMPLINGS = ("uniform", "fps", "explicit")
READERS = {"decord": "decord", "pyav": "av"}  # name -> package; in this order where none is asked for
VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})  # endings of files
EXACT_IN_DECORD = frozenset({"h264", "hevc", "vp8", "vp9"})  # codecs
MAX_BYTES = 8 << 30  # of decoded frames, at once
# Containers that are read: what a file begins with, and what FFmpeg calls it. FFmpeg would take playlists and lists of
# segments for videos too, whatever the file is called, and open each file and address that they name.
CONTAINERS = {
    "mov": re.compile(rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot|styp|moof|sidx)", re.DOTALL),
    "matroska": re.compile(rb"\x1a\x45\xdf\xa3"),
    "avi": re.compile(rb"RIFF.{4}AVI ", re.DOTALL),
}
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"}


@dataclass(frozen=True)
class Video:
    """A video as a data set may give it: where it is, and which frames to show."""

    path: str
    frames: int = 8  # uniform: how many; fps: the most
    sampling: str = "uniform"  # uniform: evenly from the first | fps: so many a second | explicit: those of `indices`
    fps: float = 1.0  # frames a second, for `fps`
    indices: tuple[int, ...] = ()  # counted from 0, for `explicit`; negative from the end
    reader: str = "auto"  # auto: decord where it is exact, else pyav | decord | pyav

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
        """The frames to show of `total` at `fps` a second.

        Raises:
            ZooError: an explicit index lies outside.
        """
        if self.sampling == "explicit":
            wrong = [i for i in self.indices if not -total <= i < total]
            if wrong:
                raise ZooError(f"Video {self.path!r} has {total} frames; there is no frame {wrong[0]}.")
            return [i % total for i in self.indices]
        if self.sampling == "uniform":
            count = min(self.frames, total)
            return [i * total // count for i in range(count)]
        step = max(fps / self.fps, 1.0)
        chosen = [int(i * step) for i in range(int((total - 1) / step) + 1)]
        if len(chosen) > self.frames:  # a long one is shown whole, with larger steps
            chosen = [chosen[i * len(chosen) // self.frames] for i in range(self.frames)]
        return chosen


@dataclass
class Clip:
    """Frames that were read, and what is known of the video."""

    frames: np.ndarray  # (F, h, w, 3) uint8 RGB
    indices: list[int]
    times: list[float]  # of each frame, in seconds
    fps: float
    total: int  # frames of the video
    reader: str
    decoded: int | None = None  # frames that were decoded for it; None: the reader does not say

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.total / self.fps if self.fps else 0.0


def read_video(video: Video | str | Path) -> Clip:
    """Read the frames that `video` asks for; a path means eight, evenly.

    Raises:
        ZooError: the file does not exist, holds no video, has no frames or is broken; with its path.
    """
    video = video if isinstance(video, Video) else Video(str(video))
    path = Path(video.path).expanduser()
    if not path.is_file():
        raise ZooError(f"Video {str(path)!r} does not exist or is no file.")
    if path.stat().st_size == 0:
        raise ZooError(f"Video {str(path)!r} is empty.")
    with path.open("rb") as file:
        begins = file.read(16)
    if not any(known.match(begins) for known in CONTAINERS.values()):
        raise ZooError(f"Video {str(path)!r} is none of {', '.join(CONTAINERS)}, the containers that are read.")
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
    """Whether decord gives the frames that it is asked for: of MPEG-4 with B-frames it gives others, AV1 it cannot."""
    import av

    try:
        with av.open(f"file:{path}", container_options=_OPTIONS) as container:
            return any(s.codec_context.name in EXACT_IN_DECORD for s in container.streams.video)
    except av.error.FFmpegError:
        return False


class _UnreadableError(ZooError):
    """A reader cannot read a file; another one may."""


def _with_decord(path: Path, video: Video) -> Clip:
    import decord

    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        total, fps = len(reader), float(reader.get_avg_fps())
    except Exception as error:  # DECORDError and RuntimeError, by what is wrong
        raise _UnreadableError(f"Video {str(path)!r} cannot be read: {first_line(error)}") from error
    if not total:
        raise _UnreadableError(f"Video {str(path)!r} has no frames.")
    indices = video.choose(total, fps)
    try:
        frames = reader.get_batch(indices).asnumpy()  # never through decord's bridge, which is global
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
                raise ZooError(f"Video {str(path)!r}: {len(indices)} frames take {size >> 20} MB; the most is 8 GB.")
            found, decoded = _decode(container, stream, sorted({places[i] for i in indices}), keys)
            missing = [i for i in indices if places[i] not in found]
            if missing:
                raise _UnreadableError(f"Video {str(path)!r} is broken: frame {missing[0]} cannot be decoded.")
            start = places[0]
            times = [float((places[i] - start) * stream.time_base) for i in indices]
    except av.error.FFmpegError as error:
        raise _UnreadableError(f"Video {str(path)!r} is broken or no video: {first_line(error)}") from error
    frames = np.stack([found[places[i]] for i in indices])
    return Clip(frames, indices, times, fps, len(places), "pyav", decoded)


def _places(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Times of all frames and of the keyframes in units of the stream, ascending; nothing is decoded."""
    places, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is not None and packet.size:
            places.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
    return sorted(places), sorted(keys)


def _decode(container: Any, stream: Any, wanted: Sequence[int], keys: list[int]) -> tuple[dict[int, Any], int]:
    """Decode the frames at the times `wanted`, ascending, and as few others as keyframes allow."""
    found: dict[int, Any] = {}
    decoded, at, frames = 0, None, iter(())
    for place in wanted:
        before = bisect_right(keys, place)
        key = keys[before - 1] if before else (keys[0] if keys else place)
        if at is None or key > at:
            container.seek(key, stream=stream, backward=True)
            frames = container.decode(stream)
        while at is None or at < place or place not in found:
            frame = next(frames, None)
            if frame is None:
                return found, decoded
            decoded, at = decoded + 1, frame.pts
            if at == place:
                found[place] = frame.to_ndarray(format="rgb24")
            elif at > place:
                break
    return found, decoded


def _kinds(container: Any) -> str:
    return ", ".join(sorted({s.type for s in container.streams})) or "nothing"
