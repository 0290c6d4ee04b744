"""`zoo demo MODEL [MODEL] [option=value ...]`: a page on which people talk to models about pictures."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from zoo.cli.serve_command import MODEL, OF_MODEL, own_options
from zoo.registry import ZooError
from zoo.text.command_line import Parser

EXAMPLES = """zoo demo scenes_tiny
zoo demo scenes_tiny last --port 8080 pruners=[random,hiprune]"""
MOST = 4  # models of a page


@dataclass
class DemoOptions:
    """Options of `zoo demo`."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: every one of this machine
    port: int = 7860  # 0: a free one, which is printed
    share: bool = False  # also under a public address, by a tunnel of Gradio's
    pruners: list[str] = field(default_factory=list)  # to offer; none: all that fit the model and act on images
    max_tokens: int = 256  # of an answer
    batch: int = 8  # answers that are generated together
    threads: int = 2  # batches at once
    image_mb: int = 20  # size of a picture, in MiB
    device: str | None = None  # cpu, cuda, cuda:0, mps; null: CUDA if available
    dtype: str | None = None  # of the parameters, e.g. bfloat16; null: that of the files

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch", "threads", "image_mb"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name} has to be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.port < 65536:
            raise ZooError(f"port has to be from 0 to 65535, got {self.port}.")


def main(words: Sequence[str]) -> int:
    """Load the models and show the page until it is interrupted."""
    args = parser_of_demo().read(words)
    names, overrides = args.model, args.options
    if len(names) > MOST:
        raise ZooError(f"zoo demo takes one to {MOST} models, got {', '.join(map(repr, names))}.")
    options = own_options(args, DemoOptions, "zoo demo")
    try:
        from zoo.inspection.demo_page import build_page, launch
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ZooError("zoo demo needs gradio: pip install 'zoo-vlm[demo]'") from error
    from zoo.inspection.demo import Demo
    from zoo.loading.other_pruners import Pruned

    models = {name: Pruned(name, overrides, device=options.device, dtype=options.dtype) for name in names}
    demo = Demo(models, options.max_tokens, options.batch, options.threads, options.pruners)
    page = build_page(demo, f"zoo demo: {', '.join(names)}")
    try:
        address = launch(page, options.host, options.port, options.share, options.image_mb)
        print(f"{', '.join(names)}: {address}  (Ctrl-C ends)", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        page.close(verbose=False)
        demo.close()
    return 0


def parser_of_demo() -> Parser:
    """Return what reads the words behind `zoo demo`."""
    parser = Parser(
        "demo",
        "Show a page with a picture, questions about it in several turns, a pruner and how much it keeps, and two of "
        "them side by side.",
        EXAMPLES,
        schema=DemoOptions,
        options=OF_MODEL,
    )
    parser.add_argument("model", nargs="+", help=f"{MODEL}; up to {MOST}")
    return parser
