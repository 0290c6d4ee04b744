"""What a model's card takes from elsewhere: the cards of the checkpoints that it came from, and scores of a run.

A fact that no card, package or run states is left out. Cards may come from elsewhere, so only short words are taken.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo.pretrained.known import KNOWN
from zoo.pretrained.origin import PYPI
from zoo.registry import ZooError
from zoo.registry.foreign import read_json, read_text
from zoo.storage.weights import snapshot

# Licences that ask for no more than notices, by the hub's names, the one with the most conditions last.
PERMISSIVE = ("cc0-1.0", "unlicense", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
UNKNOWN = "not stated"
HELD_OUT = "_held_out"  # behind a kind of questions whose combinations the training data lack
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.+-]{0,95})?")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its parts.

    Attributes:
        license: by the hub's name; empty: not known.
        datasets, language, base_models: as cards state them.
        scores: lines as in scores.json, for `model-index`.
    """

    license: str = ""
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    scores: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    def without_scores(self) -> "Facts":
        """Return what still holds when weights or parts were changed."""
        return replace(self, scores=())


def facts_in(card: Path | None) -> Facts:
    """Read the metadata of a card; empty where there is none, or none that can be read."""
    try:
        return _facts_of(read_text(card)) if card is not None and card.is_file() else Facts()
    except ZooError:
        return Facts()


@lru_cache(maxsize=128)
def _facts_of(text: str) -> Facts:
    """Facts of a card's text. Cached, since every model that is saved looks through all cards of ours."""
    front = _front_matter(text)
    names = front.get("license"), front.get("license_name")
    stated = names[1] if names[0] == "other" else names[0]
    return Facts(
        next(iter(_words(stated)), ""),
        _words(front.get("datasets")),
        _words(front.get("language")),
        _words(front.get("base_model")),
        _scores_of(front.get("model-index")),
    )


def scores_in(file: Path) -> tuple[Mapping[str, Any], ...]:
    """Return the lines of a scores.json, as `zoo train` and `zoo eval` write it.

    Raises:
        ZooError: the file does not hold such lines.
    """
    found = read_json(file)
    lines = [line for line in found if isinstance(line, dict)] if isinstance(found, list) else []
    if not lines or not all({"data", "kind", "metric", "score"} <= line.keys() for line in lines):
        raise ZooError(f"{str(file)!r} does not hold scores: it must be a scores.json of zoo train or zoo eval.")
    return tuple(line for line in lines if _is_score(line["score"]))


def licence_words(text: str) -> tuple[str, ...]:
    """Return the licences that a text names, by the hub's names."""
    found = re.findall(r"[a-z0-9][a-z0-9.+-]*[a-z0-9]", text.lower())
    return tuple(dict.fromkeys(word for word in found if word in PERMISSIVE or re.match(r"(a?l?gpl|cc-by)-?\d*", word)))


def licence_of_base(entry: Mapping[str, Any], part: Any = None) -> str:
    """Return the licence of a base checkpoint, by the hub's name; `UNKNOWN` where nothing here states it.

    Args:
        entry: of `Bases.record`.
        part: that was built from it.
    """
    name = str(entry.get("checkpoint", ""))
    if name.startswith(PYPI):
        known = KNOWN.get(name.removeprefix(PYPI))
        words = licence_words(known.licence) if known else ()
        return words[0] if words else UNKNOWN
    settings = _timm_settings(part)
    if settings.get("license"):
        return str(settings["license"]).lower()
    for card in cards_of(name, entry.get("revision")):
        if found := facts_in(card).license:
            return found
    return UNKNOWN


def hub_name(entry: Mapping[str, Any], part: Any = None) -> str:
    """Return the repository of a base checkpoint on the hub; empty for a folder or a file."""
    name = str(entry.get("checkpoint", ""))
    if name.startswith(PYPI):
        known = KNOWN.get(name.removeprefix(PYPI))
        return known.model if known else ""
    if name == "pretrained":
        return str(_timm_settings(part).get("hf_hub_id") or "")
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else ""


def cards_of(name: str, revision: str | None = None) -> list[Path]:
    """Return the cards of a checkpoint that are on this machine: in its folder, the hub's cache, and our own."""
    from importlib.resources import files

    folder = Path(name) if Path(name).is_dir() else snapshot(name, revision)
    found = [folder / "README.md"] if folder is not None and (folder / "README.md").is_file() else []
    ours = sorted(Path(str(files("zoo.model_cards"))).glob("*.md"))
    return found + [card for card in ours if facts_in(card).base_models == (name,)]


def strictest(licences: Iterable[str]) -> tuple[str, str]:
    """Return the `license` and the `license_name` of what several licences apply to.

    Of permissive ones it is the one with the most conditions; one other than these applies to the whole; several of
    them, or one beside a base whose licence is not known, are `other`, with all names. Without a licence, both are
    empty.
    """
    names = tuple(dict.fromkeys(licences))
    known = [name for name in names if name != UNKNOWN]
    strict = [name for name in known if name not in PERMISSIVE]
    if not known:
        return "", ""
    if UNKNOWN in names or len(strict) > 1:
        return "other", "-and-".join([*known, *(["not-stated"] if UNKNOWN in names else [])])
    return strict[0] if strict else max(known, key=PERMISSIVE.index), ""


# ---- reading ---------------------------------------------------------------------------------------------------------


def _front_matter(text: str) -> dict[str, Any]:
    import yaml

    try:
        found = _FRONT.match(text)
        content = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _words(value: Any) -> tuple[str, ...]:
    listed: Sequence[Any] = value if isinstance(value, list) else [value]
    return tuple(word for word in listed[:64] if isinstance(word, str) and _WORD.fullmatch(word))


def _scores_of(index: Any) -> tuple[Mapping[str, Any], ...]:
    """Read a `model-index` as lines of scores.json; results that are not ours have no standard error and are left."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        results = model_index_to_eval_results(index) if index else ("", [])
    except Exception:  # a card of another origin may hold anything
        return ()
    lines = []
    for result in results[1]:
        args = result.metric_args if isinstance(result.metric_args, dict) else {}
        score = {"value": result.metric_value, "n": args.get("n"), "stderr": args.get("stderr")}
        if not _is_score(score):
            continue
        held = args.get("held_out") is True
        kind = str(result.dataset_config or result.dataset_type)
        line: dict[str, Any] = {"data": result.dataset_type, "kind": kind.removesuffix(HELD_OUT) if held else kind}
        line |= {"metric": result.metric_type, "held_out": held, "score": score}
        lines.append(line | {key: args[key] for key in ("majority", "blind") if _is_score(args.get(key))})
    return tuple(lines)


def _is_score(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    numbers = [value.get(key) for key in ("value", "n", "stderr")]
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers)


def _timm_settings(part: Any) -> dict[str, Any]:
    found = getattr(getattr(part, "tower", None), "pretrained_cfg", None)
    found = found if isinstance(found, Mapping) else {}
    return json.loads(json.dumps(dict(found), default=str))
