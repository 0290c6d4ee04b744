"""The exception for mistakes a user can fix, and the one way to phrase "no such name"."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from zoo.registry.options import MISSING, Option

# What can be wrong with a record, as reports count it.
KINDS_BROKEN = ("record", "missing image", "image", "text", "length")


class ZooError(ValueError):
    """A mistake in a config or a call: the message names what was wrong, what was given and what is allowed."""


class ImageError(ZooError):
    """An image, or a member of an archive, does not exist."""


class LengthError(ZooError):
    """A sample has more tokens than the model has positions, or a stage allows."""


class RecordError(ZooError):
    """A record of a data set cannot be used; the message names the record and the reason.

    Args:
        reason: what is wrong.
        data: name of the data set in the run.
        where: file and line, row or member.
        sample: id of the record, where that is known.
        kind: one of `KINDS_BROKEN`.
    """

    def __init__(self, reason: str, *, data: str = "", where: str = "", sample: str = "", kind: str = "record") -> None:
        self.data, self.where, self.kind = data, _plain(where), kind
        self.reason, named = _without(_plain(reason), self.where, sample)
        self.sample = _plain(sample) or named
        head = [f"data {data!r}"] if data else []
        head += [where] if where else []
        head += [f"sample {self.sample!r}"] if self.sample else []
        super().__init__(f"{', '.join(head)}: {self.reason}" if head else reason)

    def __reduce__(self) -> Any:  # what crosses to another process; causes do not
        return _again, (self.reason, self.data, self.where, self.sample, self.kind)

    def line(self) -> dict[str, str]:
        """Return the row of this record in a list of records that were left out."""
        return {"data": self.data, "where": self.where, "id": self.sample, "kind": self.kind, "reason": self.reason}


def _again(reason: str, data: str, where: str, sample: str, kind: str) -> RecordError:
    return RecordError(reason, data=data, where=where, sample=sample, kind=kind)


def _plain(text: str) -> str:
    """Escape what UTF-8 cannot hold, half of a surrogate pair, so that the text can be printed and written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _without(reason: str, where: str, sample: str) -> tuple[str, str]:
    """Remove place and id from the beginning of a reason, where the message repeats them; return the id it had, too."""
    named = re.search(r" \(record '(.*?)'\)", reason)
    rest = reason
    if where and rest.startswith(where):
        rest = rest[len(where) :]
        rest = rest.removeprefix(named[0]) if named else rest
    for prefix in (f"Sample {sample!r}: ", f"Sample {sample!r} "):
        rest = rest.removeprefix(prefix) if sample else rest
    return rest.lstrip(",: ") or reason, named[1] if named else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """Return an error's message with line breaks and runs of blanks as one blank, or its class."""
    return " ".join(str(error).split()) or type(error).__name__


def require_at_least(low: float, **values: float | None) -> None:
    """Refuse values below `low`, each named as the user names it; values of None are not checked.

    Raises:
        ZooError: with the first name and its value.
    """
    for name, value in values.items():
        if value is not None and value < low:
            must = f"must be at least {low}" if low else "must not be negative"
            raise ZooError(f"{name} {must}, got {value}.")


def edits(given: str, wanted: str, most: int | None = None) -> int:
    """Count the insertions, deletions, substitutions and swaps of neighbours that lead from one word to the other.

    This is the optimal string alignment distance: one slip of a finger costs one, which `difflib` does not promise.
    Beyond `most` the count stops, and `most + 1` is returned.
    """
    most = max(len(given), len(wanted)) if most is None else most
    letters, others = set(given), set(wanted)
    if max(abs(len(given) - len(wanted)), len(letters - others), len(others - letters)) > most:
        return most + 1  # each letter that the other word lacks costs an edit
    before: list[int] = []  # the row above: only two rows of the table are ever needed, and a third for swaps
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(given, 1):
        before, row, above = row, [i], before
        for j, b in enumerate(wanted, 1):
            best = before[j - 1] if a == b else 1 + min(before[j - 1], before[j], row[j - 1])
            if a != b and i > 1 and j > 1 and a == wanted[j - 2] and given[i - 2] == b:
                best = min(best, above[j - 2] + 1)
            row.append(best)
        if min(row) > most and min(before) > most:
            return most + 1
    return min(row[-1], most + 1)


def nearest(given: str, allowed: Iterable[str], most: int = 1) -> list[str]:
    """Return up to `most` of `allowed` that a person may have meant by `given`, best first; none if all are far off."""
    lowered = given.lower()
    ranked: list[tuple[int, str]] = []
    closest = len(given) + 1  # where one is asked for, only a name that is closer still is worth the count
    for name in sorted(set(allowed)):
        other = name.lower()
        limit = max(1, (max(len(given), len(name)) + 1) // 3)
        least = min(limit, closest - 1) if most == 1 else limit
        distance = edits(lowered, other, least) if least >= 0 else least + 1
        if distance <= least:
            ranked.append((distance, name))
            closest = distance
        elif len(lowered) >= 3 and (lowered in other or other in lowered):
            ranked.append((limit + 100, name))
    return [name for _, name in sorted(ranked)[:most]]


def unknown(what: str, given: str, allowed: Iterable[str]) -> ZooError:
    """The error for a name that is not in `allowed`, with the nearest allowed name."""
    allowed = sorted(allowed)
    near = nearest(given, allowed)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ZooError(f"No {what} named {given!r}.{hint} Available: {', '.join(allowed) or 'none'}.")


# Words that other projects have for parts -> the kind that they are here. The kinds are the places of a model and of a
# run, with a contract each that every command relies on: plugins add parts to them, and no kinds.
_KIND_OF = {
    **dict.fromkeys(("merger", "token_merger", "reducer", "compressor", "selector", "pooler"), "pruner"),
    **dict.fromkeys(("connector", "resampler", "qformer", "abstractor", "mm_projector", "bridge"), "projector"),
    **dict.fromkeys(("encoder", "tower", "vision_tower", "image_encoder", "backbone"), "vision"),
    **dict.fromkeys(("decoder", "language_model", "lm", "text_model"), "llm"),
    **dict.fromkeys(("tuner", "peft", "lora", "moe", "expert"), "adapter"),
    **dict.fromkeys(("loss", "criterion", "teacher"), "distiller"),
    **dict.fromkeys(("tiling", "cropping", "tiler", "anyres"), "layout"),
    **dict.fromkeys(("metric", "benchmark", "evaluator", "scorer", "reranker", "rerank", "retriever"), "task"),
    **dict.fromkeys(("retrieval", "reranking", "embedding", "embedder"), "task"),
    **dict.fromkeys(("loader", "dataloader", "reader", "corpus"), "dataset"),
}
_ABOUT = {
    "pruner": "it may drop image tokens or merge them, ahead of the projector, behind it or inside the LLM",
    "projector": "it makes tokens of the LLM's width, as many as it counts",
    "adapter": "it adds weights to the LLM, or changes its layers",
    "task": "it may ask for texts, choices, log-probabilities of answers, or hidden states",
    "distiller": "its losses need no teacher",
}


def unknown_kind(what: str, given: str, allowed: Iterable[str]) -> ZooError:
    """The error for a kind that does not exist: the nearest one, or the one that such a part is of."""
    kind, allowed = _KIND_OF.get(given.lower().replace("-", "_").rstrip("s")), list(allowed)
    if kind not in allowed:
        return unknown(what, given, allowed)
    about = f": {_ABOUT[kind]}" if kind in _ABOUT else ""
    return ZooError(
        f"No {what} named {given!r}. The list of kinds is fixed, and a plugin adds parts to it; what others call "
        f"{given!r} is a {kind} here{about}. Available: {', '.join(sorted(allowed))}."
    )


def unknown_option(owner: str, given: str, options: Sequence[Option]) -> ZooError:
    """The error for an option that `owner` ("pruner 'random'") does not have, with the nearest one and its type."""
    by_name = {option.name: option for option in options}
    near = nearest(given, by_name)
    hint = f" Did you mean {near[0]!r} ({facts(by_name[near[0]])})?" if near else ""
    return ZooError(f"No option of {owner} named {given!r}.{hint} Available: {', '.join(sorted(by_name)) or 'none'}.")


def wrong_value(owner: str, option: str, options: Sequence[Option], message: str) -> ZooError:
    """The error for a value that OmegaConf refused with `message`, with the type that the option takes."""
    if "." in option:  # of a dataclass, or a mapping, that is an option
        return ZooError(f"Option {option!r} of {owner} cannot be that: {message.rstrip('.')}.")
    takes = next((f"{o.type} ({_default(o)})" for o in options if o.name == option), "another type")
    given = re.match(r"Value '(.*?)' (?:of type|could not|is not)", message, re.DOTALL)
    got = f"got {given[1]!r}." if given else f"and: {message}"
    return ZooError(f"Option {option!r} of {owner} takes {takes}, {got}")


def facts(option: Option) -> str:
    """Type and default of an option, as messages show them."""
    return f"{option.type}, {_default(option)}"


def _default(option: Option) -> str:
    return "required" if option.default == MISSING else f"default {option.default!r}"
