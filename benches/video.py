"""`zoo bench video`: what a few frames of a clip cost, against decoding all of it.

The least that a decoder can do is to begin at the keyframe before each wanted frame; that count is the floor.
"""

import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zoo.benches.measure import Value
from zoo.benches.report import Report, Row, machine
from zoo.registry import ZooError
from zoo.vision.images.video import Video, _places, read_video


@dataclass
class Options:
    file: str = ""  # of a clip; empty: one is made, 20 seconds of 640 x 360 with a keyframe every two
    frames: int = 8  # that are wanted, evenly
    rounds: int = 3  # turns of each

    def __post_init__(self) -> None:
        if min(self.frames, self.rounds) < 1:
            raise ZooError(f"frames and rounds must be at least 1, got {self.frames} and {self.rounds}.")


def run(options: Options, show: Callable[[str], None] = print) -> Report:
    """Decode a few frames and all of them, in turns."""
    report = Report("zoo bench video", machine=machine(torch.device("cpu"), 1))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(options.file).expanduser() if options.file else _made(Path(temporary) / "clip.mp4")
        times: dict[str, list[float]] = {"few": [], "all": []}
        for turn in range(options.rounds + 1):
            for who, count in (("few", options.frames), ("all", 10**9)):
                start = time.process_time()
                clip = read_video(Video(str(file), frames=count, reader="pyav"))
                times[who] += [time.process_time() - start] if turn else []
                if who == "few":
                    few = clip
            show(f"{few.decoded} of {clip.decoded} frames decoded")
        least = _least(file, few.indices)
    height, width = clip.frames.shape[1:3]
    report.setting = [
        f"{options.file or 'made'}: {clip.total} frames of {width} x {height}, {clip.fps:g} a second; "
        f"CPU time, {options.rounds} rounds, PyAV"
    ]
    assert few.decoded is not None and clip.decoded is not None, "PyAV says how many frames it decoded"
    shares = {"over all": few.decoded / clip.decoded, "over the least": few.decoded / least}
    for what, share in shares.items():
        bound = 1.5 if "least" in what else None  # frames that are shown before others are stored behind them
        report.add(Row(f"decoded {what}", Value.of([share]), bound=bound, at_most=True, note=f"{few.decoded} frames"))
    ratio = [a / b for a, b in zip(times["few"], times["all"], strict=True)]
    report.add(Row("time over all", Value.of(ratio), note=f"{options.frames} frames are wanted"))
    return report


def _least(file: Path, indices: Sequence[int]) -> int:
    """Count the frames from the keyframe before each wanted one up to it."""
    import av

    with av.open(str(file)) as container:
        places, keys = _places(container, container.streams.video[0])
    last: dict[int, int] = {}  # keyframe -> the last wanted frame behind it
    for index in indices:
        key = places.index(keys[max(bisect_right(keys, places[index]) - 1, 0)])
        last[key] = max(last.get(key, 0), index)
    return sum(index - key + 1 for key, index in last.items())


def _made(file: Path) -> Path:
    import av

    generator = np.random.default_rng(0)
    ground = generator.integers(0, 256, (360, 1280, 3), dtype=np.uint8)
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 640, 360, "yuv420p", 50
        for i in range(500):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ground[:, i : i + 640]), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file
