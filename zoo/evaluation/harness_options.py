"""Options that evaluation harnesses pass on as one text, as the words of `zoo.load`."""

from typing import Any

from zoo.registry import ZooError, names, unknown


def pruner_words(pruner: Any = None, positions: str | None = None) -> list[str]:
    """Return overrides for a model's pruners and its positions.

    Args:
        pruner: `fastervlm`, with options behind colons `fastervlm:keep_ratio=0.25:score=column_mean`, or with a preset,
            a word without `=`: `fastervlm:llava15_144`. `fastervlm:llava15_144+aim` is a chain. `null`: the model's own
            are left out. None: they stay.
        positions: kept, dense or auto; None: the model's own.

    Raises:
        ZooError: the text cannot be read, or a name does not exist.

    Example:
        >>> pruner_words("fastervlm:keep_ratio=0.25", "dense")
        ['pruner=[fastervlm]', 'pruner.fastervlm.keep_ratio=0.25', 'positions=dense']
    """
    words: list[str] = []
    text = "" if pruner is None else str(pruner).strip()
    if text in ("null", "none", "None"):
        words.append("pruner=null")
    elif text:
        chosen: list[str] = []
        for part in text.split("+"):
            name, *options = (word.strip() for word in part.split(":"))
            if name not in names("pruner"):
                raise unknown("pruner", name, names("pruner"))
            chosen.append(name)
            for option in options:
                key, given, value = option.partition("=")
                if not key or (given and not value):
                    raise ZooError(f"pruner={text}: {option!r} is neither option=value nor the name of a preset.")
                words.append(f"pruner.{name}.{key}={value}" if given else f"pruner.{name}.preset={key}")
        words.insert(0, f"pruner=[{','.join(chosen)}]")
    return words if positions is None else [*words, f"positions={positions}"]
