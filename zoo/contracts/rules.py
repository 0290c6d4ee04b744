"""A rule: a name, a sentence, and a function that tries it on one part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Try = Callable[[Any], str | None]


class BrokenRuleError(AssertionError):
    """A part breaks a rule."""

    def __init__(self, given: str, expected: str) -> None:
        self.given, self.expected = given, expected
        super().__init__(f"{given}; expected: {expected}")


class NotForThisPart(Exception):  # not an error: the rule is about parts of another form
    """A rule does not concern a part; the message is the reason."""


def expect(holds: Any, given: str, expected: str) -> None:
    """Break the rule unless it holds."""
    if not bool(holds):
        raise BrokenRuleError(given, expected)


def expect_close(got: Tensor, wanted: Tensor, what: str, atol: float) -> None:
    """Break the rule unless two tensors have one shape and differ by at most `atol`."""
    expect(got.shape == wanted.shape, f"{what} has shape {tuple(got.shape)}", f"{tuple(wanted.shape)}")
    off = (got.float() - wanted.float()).abs().max().item() if got.numel() else 0.0
    expect(off <= atol, f"{what} differs by {off:.1e}", f"at most {atol:.0e}")


@dataclass(frozen=True)
class Rule:
    """What a part of a kind has to do."""

    name: str
    sentence: str
    run: Try  # takes a case; returns what was given, raises BrokenRuleError or NotForThisPart

    def __str__(self) -> str:
        return self.name


class Rules(list[Rule]):
    """The rules of a kind, in the order in which they are tried; `@rules.add(name, sentence)` adds one."""

    def add(self, name: str, sentence: str) -> Callable[[Try], Try]:
        def keep(function: Try) -> Try:
            self.append(Rule(name, sentence, function))
            return function

        return keep
