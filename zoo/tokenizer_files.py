"""What the files of a tokenizer say without its library, which takes a second to import."""

import json
from pathlib import Path


def has_template(checkpoint: str) -> bool:
    """Whether a checkpoint's tokenizer has a chat template of its own; taken for granted of one on the hub."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return True
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # what is wrong with it is said where it is loaded
        return False
    return isinstance(content, dict) and bool(content.get("chat_template"))
