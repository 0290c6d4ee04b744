"""`zoo serve`'s server: from options to a listening socket, until it is interrupted."""

import logging
import os
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zoo.registry import ZooError
from zoo.serving.hosts import host_named

LOCAL = ("127.0.0.1", "::1", "localhost")


@dataclass
class ServeOptions:
    """Options of `zoo serve`."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: every one of this machine
    port: int = 8000  # 0: a free one, which is printed
    name: str = ""  # of the model in requests; empty: as it was loaded
    api_key: str = ""  # that requests have to bring; empty: that of ZOO_API_KEY in the environment, or none
    pruners: list[str] = field(default_factory=list)  # that /v1/models lists, as random or random:0.5; others work too
    batch: int = 8  # answers that are generated together
    threads: int = 2  # batches at once: a long answer does not keep later ones waiting
    queue: int = 64  # answers that may wait; further requests are refused with status 429
    max_tokens: int = 1024  # of an answer whose request states none
    body_mb: int = 64  # size of a request, in MiB
    image_mb: int = 20  # size of an encoded image, in MiB
    image_pixels: int = 89_478_485  # of a decoded image
    images: int = 32  # of a request
    fetch: list[str] = field(
        default_factory=list
    )  # hosts (images.example.org, or with :port) whose http(s) images are fetched
    grace: int = 10  # seconds that answers have to end after an interrupt
    device: str | None = None  # cpu, cuda, cuda:0, mps; null: CUDA if available
    dtype: str | None = None  # of the parameters, e.g. bfloat16; null: that of the files
    bits: int = 0  # 8 or 4 for the language model, on CUDA; 0: not quantized

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "queue", "max_tokens", "body_mb", "image_mb", "image_pixels", "images"):
            if getattr(self, name) < 1:
                raise ZooError(f"{name} has to be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.port < 65536:
            raise ZooError(f"port has to be from 0 to 65535, got {self.port}.")
        if self.grace < 0:
            raise ZooError(f"grace has to be at least 0, got {self.grace}.")
        for host in self.fetch:
            host_named(host)


def require_packages() -> None:
    """Refuse to start without the packages of the extra.

    Raises:
        ZooError: one is missing.
    """
    for package in ("starlette", "uvicorn"):
        try:
            __import__(package)
        except ImportError as error:
            raise ZooError(f"zoo serve needs {package}: pip install 'zoo-vlm[serve]'") from error


def listen(options: ServeOptions) -> socket.socket:
    """Return a socket that listens, so that a port that is taken is known before weights are loaded.

    Raises:
        ZooError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    found = socket.socket(family)
    try:
        if os.name == "posix":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((options.host, options.port))
        found.listen(128)
    except OSError as error:
        found.close()
        raise ZooError(f"Cannot listen on {options.host}:{options.port}: {error.strerror or error}.") from error
    return found


def server_for(name: str, pruned: Any, options: ServeOptions) -> Any:
    """Return the `Server` of a loaded model.

    Args:
        name: of the model.
        pruned: `zoo.loading.other_pruners.Pruned`.
        options: of the server.

    Raises:
        ZooError: a pruner of `options.pruners` does not exist or does not fit.
    """
    from zoo.serving.app import Limits, Server
    from zoo.serving.batches import Batcher
    from zoo.serving.pictures import Pictures

    for listed in options.pruners:
        chain, colon, ratio = listed.partition(":")
        try:
            pruned.get(chain, float(ratio) if colon else None)
        except ValueError as error:
            raise (
                error if isinstance(error, ZooError) else ZooError(f"{listed!r}: {ratio!r} is not a ratio.")
            ) from error
    return Server(
        options.name or name,
        pruned,
        Batcher(options.batch, options.threads),
        Pictures(options.images, options.image_mb << 20, options.image_pixels, options.fetch),
        Limits(options.queue, options.body_mb << 20, options.max_tokens),
        options.api_key or os.environ.get("ZOO_API_KEY", ""),
        options.pruners,
    )


def run(server: Any, options: ServeOptions, listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; answers that run then have `grace` seconds to end."""
    import uvicorn

    logging.basicConfig(format="zoo serve: %(message)s", stream=sys.stderr, level=logging.WARNING)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    device = next(server.pruned.model.parameters()).device
    print(f"{server.name} on {device}: http://{shown}:{port}/v1  (Ctrl-C ends)", flush=True)
    if options.host not in LOCAL and not server.api_key:
        print("zoo serve: without api_key=, everyone who reaches this address may use the model", file=sys.stderr)
    config = uvicorn.Config(
        server.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=options.grace, lifespan="on"
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once all has ended
        uvicorn.Server(config).run(sockets=[listening])
