"""What differs between the versions of libraries that the project runs on; nothing else asks for a version.

`TESTED` says which versions those are: `pyproject.toml` states the same ranges, `zoo doctor` compares them with what is
installed, and a test holds the two together.

    transformers 5.24   `past_key_values` is called `cache`: in the arguments of models and decoder layers, and in
                        outputs. The old name works there until 5.40, with a warning.
    torchvision 0.27    resamples tensors by lanczos too.

Two more differences need no version to be asked for, since what is done about them is right on every version:
torch's FLOP counter has no formula for attention fused on a CPU (`zoo/benches/flops.py`, torch 2.14), and its grouped
products refuse float32 on the meta device (`fusion/experts.py`, torch 2.14).
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any


def numbers(text: str) -> tuple[int, ...]:
    """Give the leading numbers of a version: `2.14.1+cpu` -> (2, 14, 1), `5.25.0.dev0` -> (5, 25, 0)."""
    found: list[int] = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def at_least(package: str, least: str) -> bool:
    """Whether the installed version of a package is `least` or newer."""
    return numbers(version(package)) >= numbers(least)


# ---- the key/value cache ---------------------------------------------------------------------------------------------


@cache
def cache_name() -> str:
    """Give the name that transformers' models and decoder layers have for the key/value cache."""
    return "cache" if at_least("transformers", "5.24") else "past_key_values"


def cache_argument(value: Any) -> dict[str, Any]:
    """Give the keyword argument that hands a key/value cache to a model of transformers."""
    return {cache_name(): value}


def cache_in(given: Mapping[str, Any]) -> Any:
    """Find the key/value cache among the keyword arguments of a decoder layer; None where there is none."""
    return next((given[n] for n in (cache_name(), "layer_past") if given.get(n) is not None), None)


def cache_of(output: Any) -> Any:
    """Give the key/value cache of a model's output; None where it has none."""
    return getattr(output, cache_name(), None)


def with_old_cache_name(output: type) -> type:
    """Let an output class with a field `cache` answer to `past_key_values` too, where transformers does not do so."""
    if cache_name() != "cache":
        output.past_key_values = property(lambda self: self.cache)  # type: ignore[attr-defined]
    return output


# ---- images --------------------------------------------------------------------------------------------------------


@cache
def torchvision_has_lanczos() -> bool:
    """Whether torchvision resamples tensors by lanczos."""
    return at_least("torchvision", "0.27")
