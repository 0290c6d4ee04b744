"""Files of unknown origin: configs, indexes and lists that may have been downloaded, read as plain values.

Each has to be a regular file (reading a FIFO or a device may never end) of a plausible size, and to hold nothing but
text, numbers, lists and mappings. What names code or reads the environment is refused before anything acts on it.
"""

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo.registry.errors import ZooError
from zoo.registry.table import refuse_code

CONFIG = 4 << 20  # bytes: of a config
INDEX = 64 << 20  # of an index of weights; 140,000 tensors in a thousand shards take 13 MB
RUN = 1 << 20  # of a run's config.yaml, which a few kilobytes are usual for

# Fields of model configs whose value may name a kernel in a repository of the hub, which transformers fetches and runs.
_KERNELS = re.compile(r"(attn|attention|experts|kernel)_implementation(_internal)?$")
# (part of a field's name, its largest value): far above every published model, far below what exhausts a machine's
# memory before a single weight is compared with its file.
_SIZES = (
    (re.compile(r"layers?$|layers?_|depth|n_layer|blocks?$"), 256),
    (re.compile(r"experts?"), 4096),
    (re.compile(r"labels|codebook|regist|heads?$|image_size|crop_size|patch_size|tile|crops?$|frames$"), 1 << 16),
    (re.compile(r"position|length|n_ctx|theta|token|window"), 1 << 40),
    (re.compile(r"^(?!pixels ).*(height|width|edge)"), 1 << 14),
    (re.compile(r"size|dim|hidden|inner|num_|n_|rank|channels|pixels"), 1 << 28),
)
# Processors whose `shortest_edge` and `longest_edge` are pixels of an image, not of a side.
_AREAS = re.compile(r"^(Qwen[23]VL|Glm4v|Glm46V|PaddleOCRVL)(Image|Video)Processor(Fast)?$")
_LABELS = ("id2label", "label2id")  # of classifiers: their keys are words of any kind
# field of config.json -> its type, where it is not null; `true` is not accepted as a number
_TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("slots", "tokenizer", "versions", "base", "masters", "data", "task"), (Mapping, "an object")),
    **dict.fromkeys(("image_token_id", "video_token_id", "text_vocab_size"), (int, "a whole number")),
    "plugins": (list, "a list of names"),
    **dict.fromkeys(("attention", "positions"), (str, "a text")),
}
_TEXTS = ("family", "checkpoint", "revision", "fingerprint")  # of each base
# Most numbers that a config may describe: for each byte of its weights (4 bits: 2), and in any case.
_PLAUSIBLE = 32, 1 << 28


def gone(checkpoint: str) -> str:
    """Return why a checkpoint named by a path is not found; empty where it exists, and for names of the hub."""
    path = checkpoint.startswith(("./", "../", "/", "~")) or checkpoint.count("/") > 1
    return "there is no such folder." if path and not Path(checkpoint).expanduser().exists() else ""


def require_file(path: Path, most: int | None = None) -> int:
    """Return the bytes of a file.

    Raises:
        ZooError: it does not exist, is not a regular file, or is longer than `most`.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ZooError(f"{str(path)!r} does not exist.") from error
    except OSError as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    return _plain_size(path, found, most)


def _plain_size(path: Path, found: os.stat_result, most: int | None) -> int:
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise ZooError(f"{str(path)!r} is {kind}, where a file is needed.")
    if most is not None and found.st_size > most:
        raise ZooError(f"{str(path)!r} has {found.st_size:,} bytes; at most {most:,} are read.")
    return found.st_size


def read_text(path: Path, most: int = CONFIG) -> str:
    """Read a text file in UTF-8.

    Raises:
        ZooError: it does not exist, is not a regular file, is too long, or is not text.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a process that writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:  # noqa: PTH123  a handle has no path
            _plain_size(path, os.fstat(handle), most)
            data = file.read(most + 1)  # the file may have grown since fstat
    except OSError as error:
        raise ZooError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ZooError(f"{str(path)!r} is not text in UTF-8: {error}.") from error


def read_json(path: Path, most: int = CONFIG) -> Any:
    """Read a JSON file.

    Raises:
        ZooError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_text(path, most))
    except RecursionError as error:
        raise ZooError(f"{str(path)!r} is nested too deep.") from error
    except ValueError as error:
        if isinstance(error, ZooError):
            raise
        raise ZooError(f"{str(path)!r} is not JSON: {error}") from error


def read_run_config(path: Path) -> dict[str, Any]:
    """Read the config.yaml of a run, which holds resolved values: aliases, tags, interpolations and code are refused.

    Raises:
        ZooError: the file cannot be read, or holds one of these.
    """
    import yaml
    from omegaconf._utils import get_yaml_loader

    class Plain(get_yaml_loader()):  # type: ignore[misc]
        """OmegaConf's loader without aliases: nested aliases let a few lines expand until memory is full."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ZooError(f"{str(path)!r} holds the alias '*{self.peek_event().anchor}': write the value itself.")
            return super().compose_node(parent, index)

    try:
        content = yaml.load(read_text(path, RUN), Loader=Plain)
    except ZooError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{str(path)!r} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ZooError(f"{str(path)!r} cannot be read: it holds a {type(content).__name__}, not a mapping.")
    refuse_code(content, repr(str(path)))
    return content


def read_object(path: Path, most: int = CONFIG) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ZooError: the file cannot be read, is not JSON, or holds something else.
    """
    content = read_json(path, most)
    if not isinstance(content, dict):
        raise ZooError(f"{str(path)!r} holds a {type(content).__name__}, not an object.")
    return content


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a config.json or the like of a model, checked by `require_model_config`.

    Raises:
        ZooError: the file cannot be read, is not an object, names code, or states an absurd size.
    """
    content = read_object(path)
    require_model_config(content, repr(str(path)))
    return content


def require_model_config(content: Any, where: str) -> None:
    """Refuse a model's config that names kernels in repositories, or sizes that no model has.

    `auto_map` and the like are accepted: many models that need no code of their own have them, and every loader is
    called with `trust_remote_code=False`.

    Raises:
        ZooError: with `where`, the field and its value.
    """
    rest: list[tuple[str, Any]] = [("", content)]  # a list in place of recursion: a config may be nested very deep
    while rest:
        name, item = rest.pop()
        if isinstance(item, Mapping):
            part = f"{name}." if _KERNELS.search(name) else ""  # a kernel for each part of a model
            kind = item.get("video_processor_type") or item.get("image_processor_type")
            if isinstance(kind, str) and _AREAS.match(kind):
                areas = {key: item[key] for key in ("size", "max_image_size") if isinstance(item.get(key), Mapping)}
                rest += [(f"pixels {key}", value) for area in areas.values() for key, value in area.items()]
                item = {key: value for key, value in item.items() if key not in areas}
            rest += [(f"{part}{key}", value) for key, value in item.items() if key not in _LABELS]
        elif isinstance(item, (list, tuple)):
            rest += [(name, value) for value in item]
        elif isinstance(item, str):
            _require_name(name, item, where)
        elif isinstance(item, int | float):
            _require_size(name, item, where)


def require_types(content: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json of a composed model whose fields are of other types than it is written with.

    Raises:
        ZooError: with `where`, the field and its value.
    """
    for name, (kind, words) in _TYPES.items():
        value = content.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ZooError(f"{where} states {name}={value!r:.60}, where {words} is needed.")
    for part, base in (content.get("base") or {}).items():
        given = base if isinstance(base, Mapping) else {"": base}
        wrong = [key for key in given if (key in _TEXTS and not isinstance(given[key], str | None)) or not key]
        if base is not None and wrong:
            raise ZooError(f"{where} states base.{part}={base!r:.60}; {', '.join(_TEXTS)} are needed, each a text.")
    if wrong := [name for name in content.get("plugins") or [] if not isinstance(name, str)]:
        raise ZooError(f"{where} states plugins={wrong!r:.60}, where a list of names is needed.")


def said_since(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the config of a model what earlier versions left unsaid, as it was then.

    Positions of what pruners left were counted anew (`positions: dense`), but not inside the LLM, and `random` chose
    alike for all images.
    """
    slots, known = content.get("slots"), dict(content)
    if known.get("positions"):
        return known
    pruners = slots.get("pruner") if isinstance(slots, Mapping) else None
    if not pruners:
        return known | {"positions": "auto"}
    if isinstance(slots, Mapping) and isinstance(pruners, Mapping):
        then: dict[str, dict[str, Any]] = {"random": {"draw": "fixed"}, "fastv": {"renumber": False}}
        nodes = {
            k: then.get(str(n.get("name")), {}) | dict(n) if isinstance(n, Mapping) else n for k, n in pruners.items()
        }
        known["slots"] = {**slots, "pruner": nodes}
    return known | {"positions": "dense"}


def _require_name(name: str, value: str, where: str) -> None:
    if _KERNELS.search(name.partition(".")[0]) and not re.fullmatch(r"[\w|]*", value):
        raise ZooError(f"{where} names the kernel {value!r} in {name!r}, which would be fetched and run: remove it.")
    if name == "_commit_hash" and not re.fullmatch(r"[0-9a-f]{0,64}", value):
        raise ZooError(f"{where} holds {name!r}: {value!r} is not a commit.")


def _require_size(name: str, value: float, where: str) -> None:
    for pattern, most in _SIZES:
        if pattern.search(name):
            if abs(value) > most:
                raise ZooError(f"{where} states {name}={value!r:.40}; at most {most:,} is taken.")
            return


def require_plausible(numbers: int, files: Iterable[Path], what: str) -> None:
    """Refuse a config that describes far more numbers than its files could hold: they would be initialised, in memory.

    Args:
        numbers: parameters and buffers of what the config describes.
        files: of its weights.
        what: the name of the model in the error.

    Raises:
        ZooError: there are too few bytes.
    """
    held = sum(require_file(file) for file in files)
    times, beside = _PLAUSIBLE
    if numbers > times * held + beside:
        raise ZooError(
            f"{what} describes {numbers:,} numbers, and its files hold {held:,} bytes: they are not its own."
        )
