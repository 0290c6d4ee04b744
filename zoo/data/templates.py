"""Questions by template about the rows of a table: open ones, yes or no, one of several.

Braces in a template take columns of the row: `{name}`; `{counts.WBC}` takes a value of a mapping, `{objects.label}`
that of each mapping in a list. A list gives one of its values, drawn anew for each question; all are accepted answers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from string import Formatter
from typing import Any

import numpy as np

from zoo.registry import Dialog, ZooError, require_at_least, unknown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """What is known of a table's columns beside its rows."""

    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column -> value -> what is written for it
    missing: Mapping[str, str] = field(default_factory=dict)  # column -> value of rows that lack it


def written(words: Mapping[str, Any], option: str) -> dict[str, dict[str, str]]:
    """Return what is written for the values of columns, as text.

    The options are not typed as a dict of dicts: OmegaConf cannot merge two of those (`AnyNode` is refused, 2.3.1).

    Args:
        words: column -> value -> text or number.
        option: for messages.

    Raises:
        ZooError: a column is not given a mapping, or a value neither text nor a number.
    """
    for column, values in words.items():
        if not isinstance(values, Mapping):
            raise ZooError(f"{option}.{column} must map values to what is written for them, got {values!r}.")
        for value, text in values.items():
            if not isinstance(text, str | int | float):
                raise ZooError(f"{option}.{column}.{value} must be text or a number, got {text!r}.")
    return {str(c): {str(value): str(text) for value, text in values.items()} for c, values in words.items()}


@dataclass
class Template:
    """One kind of question; gives `answer` or `claim`."""

    ask: list[str] = field(default_factory=list)  # wordings: training draws one of them, evaluation takes the first
    answer: str = ""  # what the row's answer is: {name}
    # What a yes/no question states, {claim} in its wordings: {name}. Half of the time it is what another row gives.
    claim: str = ""
    options: int = 0  # answers to choose from, the right one among them; {options} in a wording names them; 0: none
    words: dict[str, Any] = field(default_factory=dict)  # as those of the table, for this kind alone
    only: dict[str, list[str]] = field(default_factory=dict)  # column -> values of the rows that are asked; empty: all
    # The answer is a column with a box, x1, y1, x2, y2 in pixels of an image whose size is in the columns width and
    # height; it is written as four numbers from 0 to bins - 1, shares of the image, as those of `scenes` (32). 0: none
    bins: int = 0
    task: str = ""  # that scores it; empty: exact, yes_no of claims, choice of options, boxes of bins


class Question:
    """A template, checked, with what each row of the table gives for it.

    Args:
        kind: row of the score table.
        template: its wordings and its answer.
        rows: of the table.
        columns: what is known of their columns.
        where: names the place of a row for messages, by its index.

    Raises:
        ZooError: the template contradicts itself, or a row lacks a column.
    """

    def __init__(
        self, kind: str, template: Template, rows: Sequence[Row], columns: Columns, where: Callable[[int], str]
    ) -> None:
        self.kind, self.template = kind, template
        own = written(template.words, f"questions.{kind}.words")
        self.columns = replace(columns, words={**columns.words, **own})
        self.check()
        self.gives: list[list[str]] = []  # row -> what it gives; empty: it is not asked
        for index, row in enumerate(rows):
            asked = matches(row, template.only, where(index), self.columns)
            self.gives.append(list(dict.fromkeys(self._given(row, where(index)))) if asked else [])
        self.pool = [value for values in self.gives for value in values]  # values in the frequency of the rows
        different = len(set(self.pool))
        if template.claim and different < 2:
            raise ZooError(f"questions.{kind}: all rows give the same claim, so that no claim would be wrong.")
        if template.options > different:
            raise ZooError(f"questions.{kind}: options is {template.options}, and the rows give {different} answers.")

    def _given(self, row: Row, where: str) -> list[str]:
        if not self.template.bins:
            return filled(self.template.answer or self.template.claim, row, where, self.columns)
        column = columns_of(self.template.answer)[0]
        box, width, height = (value_of(row, name, where) for name in (column, "width", "height"))
        return [box_in_words(box, width, height, self.template.bins, f"{where}, {column}")]

    def check(self) -> None:
        """Refuse a template that contradicts itself.

        Raises:
            ZooError: with the kind of question, and what is allowed.
        """
        own, name = self.template, f"questions.{self.kind}"
        if not own.ask:
            raise ZooError(f"{name}: ask is empty; give it one or more wordings.")
        if bool(own.answer) == bool(own.claim):
            raise ZooError(f"{name}: give either an answer or a claim, which is answered by yes or no.")
        require_at_least(0, **{f"{name}.options": own.options})
        if own.options == 1 or (own.options and own.claim):
            raise ZooError(f"{name}: options goes with an answer, and is 2 or more, got {own.options}.")
        if own.bins and (own.bins < 2 or own.options or not re.fullmatch(r"\{[^{}]+\}", own.answer)):
            raise ZooError(f"{name}: bins is 2 or more, and goes with an answer that is one column, as '{{box}}'.")
        for text in own.ask:
            if own.claim and "claim" not in columns_of(text):
                raise ZooError(f"{name}: {text!r} must have {{claim}} where the claim is to be.")
            if "options" in columns_of(text) and not own.options:
                raise ZooError(f"{name}: {text!r} names options, and options is 0.")

    def about(self, row: Row, index: int, random: np.random.Generator, training: bool, where: str) -> Dialog:
        """Ask about a row that is asked (`gives`); what is drawn depends on `random` alone."""
        own = self.template
        right = self.gives[index]
        said = right[int(random.integers(len(right)))]
        wording = own.ask[int(random.integers(len(own.ask))) if training else 0]
        more: dict[str, Any] = {}
        choices: list[str] = []
        if own.claim:
            truth = random.random() < 0.5
            claim = said if truth else self._other(random, {*right})
            more, answer, answers = {"claim": claim}, "yes" if truth else "no", []
        else:
            answer, answers = said, right if len(right) > 1 else []
        if own.options:
            choices = [said]
            while len(choices) < own.options:
                choices.append(self._other(random, {*right, *choices}))
            choices = [choices[int(i)] for i in random.permutation(len(choices))]
            more = {"options": f"{', '.join(choices[:-1])} or {choices[-1]}"}
            answers = []
        text = filled(wording, {**row, **more}, where, self.columns)[0]
        by_kind = "yes_no" if own.claim else "choice" if own.options else "boxes" if own.bins else "exact"
        asked = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return Dialog(messages, kind=self.kind, task=own.task or by_kind, answers=answers, choices=choices)

    def _other(self, random: np.random.Generator, than: set[str]) -> str:
        """Draw what another row gives, as often as rows give it, so that a claim alone does not tell its truth."""
        for _ in range(20):
            if (value := self.pool[int(random.integers(len(self.pool)))]) not in than:
                return value
        others = [value for value in self.pool if value not in than]  # almost all rows give the same
        if not others:
            raise ZooError(f"questions.{self.kind}: no row gives anything but {', '.join(map(repr, sorted(than)))}.")
        return others[int(random.integers(len(others)))]


def columns_of(text: str) -> list[str]:
    """Return the columns that a template takes.

    Raises:
        ZooError: its braces cannot be read.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ZooError(f"The template {text!r} cannot be read: {error}. Write {{{{ for a brace.") from None
    if wrong := [name for _, name, spec, change in parts if name is not None and (spec or change or not name)]:
        raise ZooError(f"The template {text!r} must name columns only, as in '{{name}}', got {{{wrong[0]}}}.")
    return [name for _, name, _, _ in parts if name is not None]


def filled(text: str, row: Row, where: str, columns: Columns = Columns()) -> list[str]:
    """Fill a template with a row's values: a text for each value of a column that is a list, else one.

    Raises:
        ZooError: the row lacks a column, or it holds no text and no number; the message begins with `where`.
    """
    names = columns_of(text)
    several: dict[str, list[str]] = {}
    for name in names:
        value = value_of(row, name, where, columns.missing)
        several[name] = [_word(v, columns.words.get(name, {}), f"{where}, {name}") for v in listed(value)]
    longest = [name for name, values in several.items() if len(values) != 1]
    if len(longest) > 1:
        raise ZooError(f"{where}: {text!r} takes {longest[0]} and {longest[1]}, which both are lists; one may be.")
    number = len(several[longest[0]]) if longest else 1
    pick = {name: values if name in longest else values * number for name, values in several.items()}
    return ["".join(_pieces(text, {name: values[i] for name, values in pick.items()})) for i in range(number)]


def _pieces(text: str, values: Mapping[str, str]) -> list[str]:
    found = []
    for literal, name, _, _ in Formatter().parse(text):
        found += [literal] if name is None else [literal, values[name]]
    return found


def value_of(row: Row, name: str, where: str, missing: Mapping[str, str] | None = None) -> Any:
    """Return a column's value; dots lead into mappings, and into each mapping of a list.

    Raises:
        ZooError: there is no such column, and no value for it in `missing`.
    """
    value: Any = row
    for part in name.split("."):
        found = []
        for each in listed(value):
            if not isinstance(each, Mapping) or part not in each:
                if missing and name in missing:
                    return missing[name]
                raise ZooError(f"{where}: {unknown('column', name, each if isinstance(each, Mapping) else row)}")
            found.append(each[part])
        value = found if isinstance(value, (list, tuple)) else found[0]
    return value


def box_in_words(box: Any, width: Any, height: Any, bins: int, where: str) -> str:
    """Write a box in pixels as `x1 y1 x2 y2`, each the bin of the image that it is in.

    Raises:
        ZooError: it is not four numbers, or has no area; the message begins with `where`.
    """
    numbers = [*listed(box), width, height]
    if len(numbers) != 6 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
        raise ZooError(f"{where}: a box of four numbers and the image's width and height are needed, got {numbers}.")
    x1, y1, x2, y2 = numbers[:4]
    if not (x1 < x2 and y1 < y2 and width > 0 and height > 0):
        raise ZooError(f"{where}: a box has x1 < x2 and y1 < y2, got {box} in an image of {width} x {height}.")
    shares = (x1 / width, y1 / height, x2 / width, y2 / height)
    return " ".join(str(min(bins - 1, max(0, int(share * bins)))) for share in shares)


def listed(value: Any) -> list[Any]:
    """Return the values of a list, or the one value as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def matches(row: Row, wanted: Mapping[str, Sequence[str]], where: str, columns: Columns) -> bool:
    """Whether each column holds one of its wanted values; of a list one must be wanted."""
    found = {name: listed(value_of(row, name, where, columns.missing)) for name in wanted}
    return all({*map(str, found[name])} & {*values} for name, values in wanted.items())


def _word(value: Any, words: Mapping[str, str], where: str) -> str:
    number = isinstance(value, (int, float)) and (isinstance(value, bool) or isfinite(value))
    if not number and (not isinstance(value, str) or not value.strip()):
        raise ZooError(f"{where}: a text or a number is needed, got {type(value).__name__} {str(value)[:40]!r}.")
    return words.get(str(value), str(value))
