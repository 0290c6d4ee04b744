"""Facts about a named model without reading weights: sizes from the meta device, licences from its card."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.registry import ZooError, unknown
from zoo.settings import presets

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "=": lambda a, b: a == b,
}
FIELDS = ("params", "vision", "llm", "tokens", "memory", "licence", "family")


@dataclass
class Facts:
    """Facts about a model, as plain numbers of parameters, tokens and bytes."""

    name: str
    walk: Any  # of `zoo.checking.checker`
    repository: str
    family: str
    licence: str  # one word, of the card's front matter
    licences: str  # of each part, a sentence of the card

    def value(self, field: str) -> Any:
        """Return the value of one of `FIELDS`."""
        if field == "params":
            return sum(row.parameters for row in self.walk.rows)
        if field in ("vision", "llm"):
            return sum(row.parameters for row in self.walk.rows if row.kind == field)
        if field == "tokens":
            return self.walk.num_image_tokens
        if field == "memory":
            return self.walk.memory
        return getattr(self, field)


def facts_of(name: str) -> Facts:
    """Walk a model preset on the meta device and read its card."""
    from zoo.checking.checker import check

    stated = presets.read("model", name).get("model") or {}
    text = card_of(name)
    front = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    sentence = re.search(r"\*\*Licence\.\*\* *(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    return Facts(
        name,
        check(name),
        str(stated.get("repository", "")),
        str(stated.get("family", "")),
        front[1] if front else "",
        " ".join(sentence[1].split()) if sentence else "",
    )


def card_of(name: str) -> str:
    """Return the text of a model's card; empty if it has none."""
    file = Path(str(files("zoo.model_cards"))) / f"{name}.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def matcher(where: str) -> Callable[[Facts], bool]:
    """Make a filter of models from comparisons such as `params<8B`, separated by commas.

    Raises:
        ZooError: a word is not a comparison, or a field does not exist.
    """
    tests = [_comparison(word.strip()) for word in where.split(",") if word.strip()]
    return lambda facts: all(test(facts) for test in tests)


def _comparison(word: str) -> Callable[[Facts], bool]:
    found = re.fullmatch(r"(\w+)\s*(<=|>=|!=|<|>|=)\s*(\S+)", word)
    if found is None:
        raise ZooError(f"--where {word!r}: write a comparison such as params<8B or licence=apache-2.0.")
    field, compare, given = found[1], _COMPARE[found[2]], found[3]
    if field not in FIELDS:
        raise unknown("fact of a model", field, FIELDS)
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGBT]?)B?", given, re.IGNORECASE)
    if field in ("licence", "family"):
        return lambda facts: compare(facts.value(field), given)
    if number is None:
        raise ZooError(f"--where {word!r}: {field} is a number, such as 8B or 500M.")  # also refuses `vision=timm`
    wanted = float(number[1]) * _UNITS[number[2].upper()]
    return lambda facts: compare(facts.value(field), wanted)


def shown(facts: Facts) -> str:
    """Write facts as lines for `zoo info`."""
    from zoo.text.sizes import count_text, size_text

    rows = [
        (f"{r.kind} {r.name}", f"{count_text(r.parameters)} parameters, {r.tokens} tokens, width {r.width}")
        for r in facts.walk.rows
    ]
    more = {
        "parameters": count_text(facts.value("params")),
        "image tokens": f"{facts.walk.num_image_tokens} at most for an image"
        + (f", on {facts.walk.places} positions" if facts.walk.places else ""),
        "memory": f"{size_text(facts.walk.memory)}B in float32 with one image, half of it in bfloat16",
        "repository": facts.repository,
        "licence": facts.licence,
        "of its parts": facts.licences,
    }
    width = max(len(a) for a in [*(a for a, _ in rows), *more]) + 2
    lines = ["parts", *(f"  {a:<{width}}{b}" for a, b in rows), "facts"]
    lines[1 + len(rows) : 1 + len(rows)] = [f"  {line}" for line in facts.walk.encoders]
    return "\n".join(lines + [f"  {key:<{width}}{value}" for key, value in more.items() if value])
