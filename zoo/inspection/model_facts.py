"""Facts about a named model: sizes as they are stored beside the cards, licences from its card.

Sizes are those of the model on the meta device, which takes an import of torch. `model_cards/facts.json` has them for
every preset, with a fingerprint of the preset's files: a preset that was changed since is built again.

    python -m zoo.inspection.model_facts      writes the file
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from zoo.registry import ZooError, unknown
from zoo.settings import presets
from zoo.text.sizes import count_text, size_text
from zoo.text.terminal import columns

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "=": lambda a, b: a == b,
}
TEXTS = ("name", "licence", "license", "family", "weights")
FIELDS = ("params", "vision", "llm", "tokens", "memory", *TEXTS)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, in parameters, tokens and bytes."""

    parts: tuple[dict[str, Any], ...]  # kind, name, parameters, tokens, width
    image_tokens: int  # of one image at most
    positions: int  # that an image takes where they are kept; 0: as many as it has tokens
    memory_bytes: int  # inference with one image in float32
    encoders: tuple[str, ...] = ()  # a line for each of several

    @property
    def parameters(self) -> int:
        """Return the parameters of all parts."""
        return sum(part["parameters"] for part in self.parts)


@dataclass
class Facts:
    """Facts about a model."""

    name: str
    repository: str
    family: str
    licence: str  # one word, of the card's front matter
    licences: str  # of each part, a sentence of the card

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes as they are stored; built, where they are not."""
        return stored(self.name) or measured(self.name)

    @cached_property
    def weights(self) -> str:
        """Where trained weights are from: `here`, and packages that they build on; `hub:<org>/<name>`; empty: none."""
        if self.repository:
            return f"hub:{self.repository}"
        file = Path(str(files("zoo.model_cards"))) / self.name / "config.json"
        if not file.is_file():
            return ""
        bases = (json.loads(file.read_text(encoding="utf-8")).get("base") or {}).values()
        return " ".join(["here", *(str(base["checkpoint"]) for base in bases)])

    def value(self, field: str) -> Any:
        """Return the value of one of `FIELDS`."""
        if field == "params":
            return self.sizes.parameters
        if field in ("vision", "llm"):
            return sum(part["parameters"] for part in self.sizes.parts if part["kind"] == field)
        if field == "tokens":
            return self.sizes.image_tokens
        if field == "memory":
            return self.sizes.memory_bytes
        return getattr(self, "licence" if field == "license" else field)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        sizes = asdict(self.sizes)
        texts = {"repository": self.repository, "family": self.family, "license": self.licence, "weights": self.weights}
        own = {key: text or None for key, text in texts.items()}
        return {"name": self.name, **own, "parameters": self.sizes.parameters, **sizes}


def facts_of(name: str) -> Facts:
    """Read a model preset and its card."""
    kept = _kept(name)
    stated = kept or presets.read("model", name).get("model") or {}
    text = card_of(name)
    front = re.search(r"^license: *(\S+)", text, re.MULTILINE)
    sentence = re.search(r"\*\*Licence\.\*\* *(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    return Facts(
        name,
        str(stated.get("repository", "")),
        str(stated.get("family", "")),
        front[1] if front else "",
        " ".join(sentence[1].split()) if sentence else "",
    )


# ---- sizes -------------------------------------------------------------------------------------------------------


def stored(name: str) -> Sizes | None:
    """Return the stored sizes of a preset; None without any, or if its files were changed since."""
    found = _kept(name)
    if found is None:
        return None
    parts, encoders = tuple(found["parts"]), tuple(found.get("encoders", ()))
    return Sizes(parts, found["image_tokens"], found["positions"], found["memory_bytes"], encoders)


def _kept(name: str) -> dict[str, Any] | None:
    found = _stored().get(name)
    return found if found is not None and found["preset"] == fingerprint(name) else None


def measured(name: str) -> Sizes:
    """Build a preset on the meta device, without its weights and without the hub."""
    from zoo.checking.checker import check
    from zoo.checking.plan import plan_for
    from zoo.settings.config import compose
    from zoo.settings.overrides import quoted
    from zoo.settings.source import source_of

    walk = check(plan_for(source_of(compose("load", [f"model={quoted(name)}"]))))
    parts = tuple(
        {key: getattr(row, key) for key in ("kind", "name", "parameters", "tokens", "width")} for row in walk.rows
    )
    return Sizes(parts, walk.num_image_tokens, walk.places, walk.memory, tuple(walk.encoders))


def fingerprint(name: str) -> str:
    """Return a hash of the files that a preset is composed from, comments apart."""
    digest, waiting, seen = hashlib.sha256(), [name], set()
    while waiting:
        file = presets.preset_files("model").get(waiting.pop())
        if file is None or file in seen:
            continue
        seen.add(file)
        lines = [line.partition(" #")[0].rstrip() for line in file.read_text(encoding="utf-8").splitlines()]
        digest.update("\n".join(line for line in lines if not line.startswith("#")).encode())
        waiting += [word for line in lines for word in re.findall(r"^  - (\w+)$", line)]
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def _stored() -> Mapping[str, Any]:
    file = _file()
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _file() -> Path:
    return Path(str(files("zoo.model_cards"))) / "facts.json"


def write() -> Path:
    """Write the sizes of all presets; those of presets that are as they were stay."""
    found = {}
    for name in sorted(presets.preset_files("model")):
        sizes = {k: v for k, v in asdict(stored(name) or measured(name)).items() if v or k != "encoders"}
        facts = facts_of(name)
        own = {key: value for key in ("repository", "family") if (value := getattr(facts, key))}
        found[name] = {"preset": fingerprint(name), **own, **sizes}
    lines = [f"  {json.dumps(name)}: {json.dumps(sizes)}" for name, sizes in found.items()]
    _file().write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return _file()


# ---- cards, conditions, text -------------------------------------------------------------------------------------


def card_of(name: str) -> str:
    """Return the text of a model's card; empty if it has none."""
    file = Path(str(files("zoo.model_cards"))) / f"{name}.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def matcher(where: str) -> Callable[[Facts], bool]:
    """Make a filter of models from comparisons such as `params<8B`, joined by `and` or commas.

    Raises:
        ZooError: a word is not a comparison, or a field does not exist.
    """
    tests = [_comparison(word.strip()) for word in re.split(r",|\band\b", where) if word.strip()]
    if where and not tests:
        tests = [_comparison(where)]
    return lambda facts: all(test(facts) for test in tests)


def require_field(field: str) -> None:
    """Refuse a field that models do not have.

    Raises:
        ZooError: with the nearest.
    """
    if field not in FIELDS:
        raise unknown("fact of a model", field, FIELDS)


def _comparison(word: str) -> Callable[[Facts], bool]:
    found = re.fullmatch(r"(\w+)\s*(<=|>=|!=|==|<|>|=)\s*(\S+)", word)
    if found is None:
        known = ", ".join(FIELDS)
        raise ZooError(f"--where {word!r}: write comparisons such as 'params<8B and licence=mit'. Facts: {known}.")
    field, compare, given = found[1], _COMPARE[found[2].replace("==", "=")], found[3]
    require_field(field)
    if field in TEXTS:
        return lambda facts: compare(facts.value(field).lower(), given.lower())
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGBT]?)B?", given, re.IGNORECASE)
    if number is None:
        raise ZooError(f"--where {word!r}: {field} is a number, such as 8B or 500M.")  # also refuses `vision=timm`
    wanted = float(number[1]) * _UNITS[number[2].upper()]
    return lambda facts: compare(facts.value(field), wanted)


def written(facts: Facts, field: str) -> str:
    """Write a value as people say it."""
    value = facts.value(field)
    if field in TEXTS:
        return value or "-"
    return size_text(value) + "B" if field == "memory" else f"{value:,}" if field == "tokens" else count_text(value)


def shown(facts: Facts) -> str:
    """Write facts as lines for `zoo info`."""
    sizes = facts.sizes
    rows = [
        (
            f"{p['kind']} {p['name']}",
            f"{count_text(p['parameters'])} parameters, {p['tokens']} tokens, width {p['width']}",
        )
        for p in sizes.parts
    ]
    more = {
        "parameters": count_text(sizes.parameters),
        "image tokens": f"{sizes.image_tokens} at most for an image"
        + (f", on {sizes.positions} positions" if sizes.positions else ""),
        "memory": f"{size_text(sizes.memory_bytes)}B in float32 with one image, half of it in bfloat16",
        "repository": facts.repository,
        "licence": facts.licence,
        "of its parts": facts.licences,
    }
    width = max(len(a) for a in [*(a for a, _ in rows), *more])
    lines = columns([(f"{a:<{width}}", b) for a, b in rows], widest=width)
    facts_text = columns([(f"{a:<{width}}", b) for a, b in more.items() if b], widest=width)
    return "\n".join(["parts", lines, *(f"  {line}" for line in sizes.encoders), "facts", facts_text])


if __name__ == "__main__":
    print(write())
