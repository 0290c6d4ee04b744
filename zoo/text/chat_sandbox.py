"""Run foreign chat templates within bounds of time and memory.

A template is a program. transformers runs it in Jinja's sandbox, which hides Python's internals but bounds neither
time nor memory. Here each loop, call, filter and comparison is counted, the sizes of their results are summed, and
widths, powers and repetitions are checked before they are computed. The limits are far above the needs of any dialog.
The same inputs give the same count on every machine; a limit on the thread's time is a last resort.
"""

import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import meta, nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST = 256 << 10  # characters of a template; the longest published ones have 30,000
STEPS = 2_000_000  # loops, calls and the like for one text; a dialog of a thousand turns takes 50,000
MADE = 64 << 20  # characters that they make
ITEM = 64  # characters that an item of a list counts as
SECONDS = 5.0  # of the thread that renders

# A width in a format, or one that is an argument.
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^{}]*\d{5,}|\{[^{}]*\{")
_LINEAR = frozenset(
    {"strip", "lstrip", "rstrip", "startswith", "endswith", "split", "rsplit", "splitlines", "partition", "rpartition"}
    | {"find", "rfind", "index", "rindex", "count", "upper", "lower", "title", "capitalize", "casefold", "swapcase"}
    | {"removeprefix", "removesuffix", "isdigit", "isalpha", "isspace", "isupper", "islower", "isalnum", "isnumeric"}
)  # methods of texts that make no more than they are given
# Filters whose result may be longer than their input: by its items at any depth, or by what they are given beside it.
_GROWING = frozenset({"batch", "center", "format", "indent", "join", "replace", "slice", "sum", "tojson", "truncate"})
_LEFT_OUT = ("urlize", "striptags", "wordwrap", "pprint", "xmlattr")  # take longer than their input is long
_budget: ContextVar["Budget | None"] = ContextVar("budget", default=None)


class TooMuchError(Exception):
    """A template exceeds a limit."""


class Budget:
    """Remaining steps, characters and time for rendering."""

    def __init__(self, texts: int) -> None:
        self.steps, self.made, self._until = STEPS * texts, MADE * texts, time.thread_time() + SECONDS * texts

    def spend(self, steps: int = 1, made: int = 0) -> None:
        """Count steps and characters, and stop a template beyond its limits."""
        self.steps -= steps
        self.made -= made
        if self.steps < 0 or self.made < 0 or (not self.steps % 32 and time.thread_time() > self._until):
            raise TooMuchError("it loops or grows without end")


@contextmanager
def bounded(texts: int = 1) -> Iterator[None]:
    """Within the block, templates that transformers renders in this thread take what dialogs take at most.

    Args:
        texts: how many are rendered.
    """
    _install()
    token = _budget.set(Budget(max(1, texts)))
    try:
        yield
    finally:
        _budget.reset(token)


def _install() -> None:
    """Let transformers ask here for compiled templates; outside of `bounded` it gets its own."""
    from transformers.utils import chat_template_utils as theirs

    plain = theirs._compile_jinja_template
    if hasattr(plain, "within_bounds"):
        return

    def compiled(template: str) -> Any:
        return _compiled(template, plain) if _budget.get() is not None else plain(template)

    compiled.within_bounds = plain  # type: ignore[attr-defined]
    theirs._compile_jinja_template = compiled  # type: ignore[assignment]


def names_in(template: str) -> frozenset[str]:
    """Names of the variables that a template takes; it is parsed within bounds, since parsing folds constants.

    Raises:
        TemplateSyntaxError: it is not Jinja.
        TooMuchError: it is too long.
    """
    from transformers.utils import chat_template_utils as theirs

    if len(template) > LONGEST:
        raise TooMuchError(f"it has {len(template):,} characters; at most {LONGEST:,} are read")
    with bounded():
        environment = _environment(theirs._compile_jinja_template.within_bounds)  # type: ignore[attr-defined]
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))


@lru_cache(maxsize=64)
def _compiled(template: str, plain: Callable[[str], Any]) -> Any:
    if len(template) > LONGEST:
        raise TooMuchError(f"it has {len(template):,} characters; at most {LONGEST:,} are read")
    return _environment(plain).from_string(template)


@lru_cache(maxsize=1)
def _environment(plain: Callable[[str], Any]) -> "_Environment":
    """Copy of transformers' Jinja environment in which all operations are counted."""
    theirs = plain("").environment
    mine = _Environment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_written,
        optimized=False,  # the optimiser would compute constants while compiling, uncounted
    )
    mine.globals.update(theirs.globals)
    mine.globals.pop("lipsum", None)
    known = {name: f for name, f in theirs.filters.items() if name not in _LEFT_OUT}
    mine.filters = {name: _counted(f, name in _GROWING) for name, f in known.items()} | _MARKS
    mine.tests.update(theirs.tests)
    return mine


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return template

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _of_render()
        if operator == "*":
            _require(budget, _size(left) * _size(right) if _grows(left, right) else 1)
        elif operator == "**" and isinstance(right, int):
            _require(budget, _digits(left) * abs(right) * 1000)
        elif operator == "%" and isinstance(left, str):
            _require_widths(left)
            _require(budget, len(left) + _deep(right, budget.made))
        return _kept(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` of a text, which the sandbox runs in its own way."""
        plain = super().wrap_str_format(value)
        if plain is None:
            return None

        def within(*args: Any, **kwargs: Any) -> str:
            budget, text = _of_render(), str(value.__self__)
            _require_widths(text)
            _require(budget, len(text) * (1 + _deep([*args, *kwargs.values()], budget.made)))
            return plain(*args, **kwargs)

        return within

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _of_render()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        values = [*args, *kwargs.values()]
        if isinstance(owner, str | bytes | int) and name not in _LINEAR:
            if name == "replace" and len(args) > 1:
                _require(budget, _replaced(owner, args))
            elif name == "join" and args:
                _require(budget, _joined(owner, args[0], budget))
            else:
                _require(budget, _product([1 if isinstance(owner, int) else owner, *values]))
        elif name == "strftime_now":
            _require_widths("".join(map(str, values)))
        return _kept(super().call(__context, __obj, *args, **kwargs))


class _Counting(NodeTransformer):
    """Puts marks, which are filters, around what loops, compares and makes values."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _mark(node.iter, "_each")
        elif isinstance(node, nodes.Output):
            written = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
            if written:
                node.nodes.append(_mark(nodes.Const(written, lineno=node.lineno), "_text"))
        elif isinstance(node, nodes.Compare | nodes.Test):
            return _mark(node, "_step")
        elif isinstance(node, nodes.Concat | nodes.List | nodes.Dict) or (
            isinstance(node, nodes.Tuple | nodes.Getitem) and node.ctx == "load"
        ):
            whole = isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice)
            return node if whole else _mark(node, "_kept")
        return node


def _mark(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _of_render() -> Budget:
    budget = _budget.get()
    assert budget is not None, "a template of this environment is rendered within `bounded`"
    budget.spend()
    return budget


def _require(budget: Budget, size: int) -> None:
    if size > budget.made:
        raise TooMuchError("it would make a text or list without end")


def _require_widths(text: str) -> None:
    if _WIDE.search(text):
        raise TooMuchError(f"it formats with the width in {text[:40]!r}")


def _grows(left: Any, right: Any) -> bool:
    return isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)


def _digits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 1


def _size(value: Any) -> int:
    """How much of a result may come of a value: its length, or what a number counts."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, Iterator):
        return STEPS  # more items than that it cannot give
    return len(value) if hasattr(value, "__len__") else 1


def _replaced(text: Any, args: Any) -> int:
    """The most that replacing makes."""
    return _size(text) + (1 + _size(text) // max(1, _size(args[0]))) * _size(args[1])


def _joined(separator: Any, items: Any, budget: Budget) -> int:
    return _size(items) * (_size(separator) + 1) + _deep(items, budget.made)


def _product(values: Iterable[Any]) -> int:
    product = 1
    for value in values:
        product *= max(1, _size(value))
    return product


def _deep(value: Any, most: int) -> int:
    """Characters that a value counts as, whatever it is nested of; counting ends beyond `most`."""
    count, rest = 0, [value]
    while rest and count <= most:
        item = rest.pop()
        if isinstance(item, Namespace):
            item = item._Namespace__attrs  # type: ignore[attr-defined]
        if isinstance(item, Mapping):
            rest += item.keys()
            rest += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            rest += item
        count += len(item) if isinstance(item, str) else ITEM
    return count


def _kept(value: Any) -> Any:
    """Count what was made."""
    budget = _of_render()
    if isinstance(value, str):
        budget.spend(0, len(value))
    elif isinstance(value, Generator):
        return _stepped(value)
    elif isinstance(value, list | tuple | dict | set):
        budget.spend(0, _deep(value, budget.made))
    elif isinstance(value, int):
        _require(budget, _digits(value) * 1000)  # numbers are written in time that grows with their square
    return value


def _stepped(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _of_render()
        yield item


def _each(items: Any) -> Any:
    """What a loop runs over: as it is where its length is known."""
    if hasattr(items, "__len__"):
        _of_render().spend(len(items))
        return items
    return _stepped(items) if isinstance(items, Iterator) else items


def _text(length: int) -> str:
    _of_render().spend(0, length)
    return ""


def _step(value: Any) -> Any:
    _of_render()
    return value


_MARKS: dict[str, Callable[..., Any]] = {"_kept": _kept, "_each": _each, "_text": _text, "_step": _step}


@pass_context
def _written(context: Any, value: Any) -> Any:
    """Count what is written; taking the context keeps it from being computed while the template compiles."""
    budget = _of_render()
    budget.spend(0, len(value) if isinstance(value, str) else _deep(value, budget.made))
    return value


def _counted(function: Callable[..., Any], grows: bool) -> Callable[..., Any]:
    """A filter whose work is counted."""
    first = int(getattr(function, "jinja_pass_arg", None) is not None)
    name = function.__name__

    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        budget = _of_render()
        given, more = args[first], [*args[first + 1 :], *kwargs.values()]
        if grows and name == "do_replace" and len(more) > 1:
            _require(budget, _replaced(given, more))
        elif grows and name in ("do_join", "sync_do_join"):
            _require(budget, _joined(more[0] if more else "", given, budget))
        elif grows:
            if name == "do_format":
                _require_widths(str(given))
            _require(budget, _deep(given, budget.made) * _product(more))
        return _kept(function(*args, **kwargs))

    return within
