"""Names, options and attributes of a component, read from its source text without importing it.

Names and options of components are shown, completed and checked before torch is imported. What code computes is not
guessed: it is a LookupError here, and known once the file is imported.
"""

import ast
import operator
import re
import sys
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zoo.registry.options import MISSING, Option, field_comments
from zoo.registry.presets import Preset

_MAKERS: dict[str, Callable[..., Any]] = {t.__name__: t for t in (frozenset, set, list, tuple, dict)}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.BitOr: operator.or_,
}
UNSAID = (OSError, SyntaxError, LookupError, ImportError, TypeError, AttributeError)  # a text that does not say it
_PLAIN = {"torch", "abc", "typing"}  # packages whose classes have no hooks of ours


def stated(doc: str, what: str) -> str:
    """Return the first sentence behind `what:` at the beginning of a line of a docstring, without its full stop."""
    found = re.search(rf"^{what}: +(.*?)(\.\s+(?=[A-Z])|\.?\s*\n\s*\n|\.?\s*\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def summary_of(file: Path) -> str:
    """Return the first line of a module's docstring."""
    try:
        return SourceText(file).doc.partition("\n")[0].strip()
    except (OSError, SyntaxError):
        return ""


def options_in(file: Path, kind: str, name: str) -> list[Option]:
    """Return the options of the component that `file` registers under `name`; none where the text does not say.

    A default that is made by code is None.
    """
    try:
        return list(_options_in(file, file.read_text(encoding="utf-8"), kind, name))
    except UNSAID:
        return []


@lru_cache(maxsize=256)  # one config asks for those of ten components, which it chose or may have meant
def _options_in(file: Path, text: str, kind: str, name: str) -> list[Option]:
    source = SourceText(file)
    return source.options(source.component(kind, name))


def presets_in(file: Path, kind: str, name: str) -> Any:
    """Return the presets of the component that `file` registers under `name`; None where the text does not say."""
    try:
        return _presets_in(file, file.stat().st_mtime_ns, kind, name)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _presets_in(file: Path, stamp: int, kind: str, name: str) -> Any:
    try:
        text = SourceText(file)
        return text.attribute(text.component(kind, name), "presets")
    except UNSAID:
        return None


def line_in(file: Path, kind: str, name: str) -> int:
    """Return the line of the class that `file` registers under `name`, or 1."""
    try:
        return SourceText(file).component(kind, name).lineno
    except (OSError, SyntaxError, LookupError):
        return 1


class SourceText:
    """A source file: its docstring, its classes and constants, and where it imports others from."""

    def __init__(self, file: Path) -> None:
        self.text = file.read_text(encoding="utf-8")
        tree = ast.parse(self.text)
        self.body, self.doc = tree.body, ast.get_docstring(tree) or ""
        self.classes = {node.name: node for node in self.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def imported(self) -> dict[str, tuple[str, str]]:
        """Name here -> module and name there; the name there is empty for a module."""
        found: dict[str, tuple[str, str]] = {}
        for node in self.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.partition(".")[0]: (alias.name, "") for alias in node.names}
        return found

    @cached_property
    def constants(self) -> dict[str, ast.expr]:
        """Names that are assigned once, at the top level."""
        found: dict[str, ast.expr] = {}
        for node in self.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            value = getattr(node, "value", None)
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                    found[target.id] = value if target.id not in found else ast.Name("_")  # assigned again: unknown
        return found

    def component(self, kind: str, name: str) -> ast.ClassDef:
        """Return the class that is registered under `name`.

        Raises:
            LookupError: there is none.
        """
        for node in self.classes.values():
            if _registers(node, kind, name):
                return node
        raise LookupError(f"{kind}/{name}")

    def options(self, component: ast.ClassDef, exact: bool = False) -> list[Option]:
        """Return the options of a component: the fields of the dataclass that annotates `config` in `__init__`.

        Args:
            exact: refuse a default that is made by code, which is None otherwise.

        Raises:
            LookupError: the dataclass, or one of its bases, is neither here nor imported from a file; or see `exact`.
        """
        return self._fields(_config_annotation(component), exact)

    def _fields(self, name: str, exact: bool) -> list[Option]:
        """The fields of a dataclass, those it inherits first."""
        if name not in self.classes:
            module, original = self.imported[name]
            return _text_of(module)._fields(original, exact)
        config = self.classes[name]
        options: dict[str, Option] = {}
        for base in reversed(config.bases):
            if not isinstance(base, ast.Name):
                raise LookupError(ast.unparse(base))
            options |= {option.name: option for option in self._fields(base.id, exact)}
        docs = field_comments(self.lines[config.lineno - 1 : config.end_lineno])
        for item in config.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if ast.unparse(item.annotation).startswith("ClassVar"):
                    continue
                field = item.target.id
                default = self._default(item.value, exact)
                options[field] = Option(field, ast.unparse(item.annotation), default, docs.get(field, ""))
        return list(options.values())

    def _default(self, value: ast.expr | None, exact: bool) -> Any:
        if value is None or ast.unparse(value) == "MISSING":
            return MISSING
        try:
            return self.value(value)
        except (LookupError, TypeError):
            if exact:
                raise
            return None

    def attribute(self, node: ast.ClassDef, name: str) -> Any:
        """Return the value of a class attribute, of the class itself or of one that it derives from.

        Raises:
            LookupError: there is none, it is computed, or it would come from a class of another package.
        """
        found = self._attribute(node, name)
        if found is None:
            raise LookupError(f"{node.name}.{name}")
        return found

    def _attribute(self, node: ast.ClassDef, name: str) -> Any:
        """The value of a class attribute; a property for one, None where there is none."""
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == name:
                return property()
            target = item.targets[0] if isinstance(item, ast.Assign) else getattr(item, "target", None)
            if isinstance(target, ast.Name) and target.id == name and getattr(item, "value", None) is not None:
                return self.value(item.value)  # type: ignore[attr-defined]
        for parent in node.bases:
            found = self._inherited(ast.unparse(parent), name)
            if found is not None:
                return found
        return None

    def _inherited(self, parent: str, name: str) -> Any:
        if parent in self.classes:
            return self._attribute(self.classes[parent], name)
        first, _, rest = parent.partition(".")
        module, original = self.imported[first]
        if module.partition(".")[0] in _PLAIN:
            return None
        if rest or not original:
            raise LookupError(parent)
        if module in sys.modules:
            return getattr(getattr(sys.modules[module], original), name, None)
        text = _text_of(module)
        return text._attribute(text.classes[original], name)

    def value(self, node: ast.expr) -> Any:
        """Return the value of an expression made of literals, constants of files and their containers.

        Raises:
            LookupError: code makes it.
        """
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
                made = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
                return made(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.value(key): self.value(v) for key, v in zip(keys, values, strict=True) if key is not None}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self.value(left), self.value(right))
            case ast.Name(id=name):
                return self._constant(name)
            case ast.Call(func=ast.Name(id="field")):
                return self._of_field(node)
            case ast.Call(func=ast.Name(id="Preset"), args=[options, source], keywords=[]):
                return Preset(self.value(options), self.value(source))
            case ast.Call(func=ast.Name(id=maker), args=args, keywords=[]) if maker in _MAKERS and len(args) < 2:
                return _MAKERS[maker](*(self.value(arg) for arg in args))
        raise LookupError(ast.unparse(node))

    def _constant(self, name: str) -> Any:
        if name in self.constants:
            return self.value(self.constants[name])
        module, original = self.imported[name]
        if module in sys.modules:
            return getattr(sys.modules[module], original)
        return _text_of(module)._constant(original)

    def _of_field(self, call: ast.Call) -> Any:
        """The default of `dataclasses.field(...)`."""
        words = {word.arg: word.value for word in call.keywords}
        if "default" in words:
            return self.value(words["default"])
        match words.get("default_factory"):
            case None:
                return MISSING
            case ast.Name(id=maker) if maker in _MAKERS:
                return _MAKERS[maker]()
            case ast.Lambda(body=body):
                return self.value(body)
        raise LookupError(ast.unparse(call))


def _text_of(module: str) -> SourceText:
    """The file of a module that is not imported for it; its package is."""
    spec = find_spec(module)
    if spec is None or not spec.origin:
        raise LookupError(module)
    return SourceText(Path(spec.origin))


def _registers(node: ast.ClassDef, kind: str, name: str) -> bool:
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and [a.value for a in call.args if isinstance(a, ast.Constant)] == [kind, name]:
            return True
    return False


def _config_annotation(node: ast.ClassDef) -> str:
    """Return the name of the dataclass that annotates `config` in `__init__`."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for argument in [*item.args.posonlyargs, *item.args.args]:
                if argument.arg == "config" and isinstance(argument.annotation, ast.Name):
                    return argument.annotation.id
    return ""
