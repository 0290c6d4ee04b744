"""`zoo chat MODEL`: talk to a model on the command line, with images and videos."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.registry import ZooError
from zoo.registry.devices import require_device
from zoo.text.command_line import Parser
from zoo.text.markup import harmless

HELP = "/image PATH and /video PATH add a file to the next question, /new starts a new conversation, /quit exits."


def main(words: Sequence[str]) -> int:
    """Load the model and answer the question of `--question`, or each line of the input."""
    args = _parsed(words)
    require_device(args.device, "--device")
    args.image, args.video = ([_file(path) for path in paths] for paths in (args.image, args.video))
    from zoo.composed.chat_session import Talk  # after the checks above, which need no torch
    from zoo.loading.build import load

    model, processor = load(args.model, *args.options, device=args.device, dtype=args.dtype, bits=args.bits)
    talk = Talk(model, processor, system=args.system)
    images, videos = list(args.image), [_video(path, args) for path in args.video]
    if args.question:
        _answer(talk, args.question, images, videos, args)
        return 0
    if sys.stdin.isatty():
        print(HELP)
    while True:
        line = _line()
        if line is None or line in ("/quit", "/exit"):
            return 0
        command, _, rest = line.partition(" ")
        if line == "/new":
            talk, images, videos = Talk(model, processor, system=args.system), [], []
        elif command in ("/image", "/video"):
            try:
                file = _file(rest)
            except ZooError as error:
                print(error)
                continue
            if command == "/image":
                images.append(file)
            else:
                videos.append(_video(file, args))
        elif line.startswith("/"):
            print(HELP)
        elif line:
            try:
                _answer(talk, line, images, videos, args)
            except ZooError as error:
                print(f"zoo: {error}", file=sys.stderr)
                if images or videos:  # one of them may be the reason
                    print("Its images and videos are not part of the next question; add them again.", file=sys.stderr)
            images, videos = [], []


def _file(path: str) -> str:
    """Return the path of a file that was typed, in which a shell has not always expanded `~`.

    Raises:
        ZooError: there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ZooError(f"There is no file {path!r}.")
    return str(file)


def _answer(talk: Any, text: str, images: list[Any], videos: list[Any], args: Any) -> None:
    talk.say(
        text,
        images,
        videos,
        stream=lambda piece: print(harmless(piece), end="", flush=True),
        max_new_tokens=args.max_new_tokens,
    )
    print()


def _video(path: str, args: Any) -> Any:
    from zoo.vision.images.video import Video

    return Video(path, frames=args.frames)


def _line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _parsed(words: Sequence[str]) -> Any:
    parser = Parser(
        "chat",
        "Talk to a model on the command line, with images and videos.",
        """zoo chat picturebook_135m --image photo.jpg -q "What is in the picture?"
        zoo chat last pruner=fastervlm pruner.fastervlm.keep_ratio=0.25""",
        more=HELP,
        options="of the model, as for zoo.load: pruner=[pool]",
    )
    parser.add_argument("model", help="a preset, dir:<folder>, hub:<org>/<name>, or last: that of the newest run")
    parser.add_argument("-q", "--question", default="", metavar="text", help="answer this and exit; else one a line")
    parser.add_argument(
        "--image", action="append", default=[], metavar="file", help="of the first question; repeatable"
    )
    parser.add_argument("--video", action="append", default=[], metavar="file", help="the same for videos")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of each video; default: 8")
    parser.add_argument("--system", default="", metavar="text", help="message before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer; default: 256")
    parser.add_argument("--dtype", metavar="name", help="of the parameters: bfloat16; default: that of the files")
    parser.add_argument("--bits", type=int, default=0, metavar="N", help="8 or 4 for the language model, on CUDA")
    parser.add_argument("--device", metavar="name", help="cpu, cuda, cuda:0, mps; default: CUDA if available")
    return parser.read(words)
