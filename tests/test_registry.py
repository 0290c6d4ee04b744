"""The table: names, entries, building, and what is refused."""

import inspect
import json
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from zoo import registry
from zoo.registry import MISSING, ZooError
from zoo.registry import table as core


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, so that a test's components are gone after it."""
    monkeypatch.setattr(core, "_entries", {kind: dict(found) for kind, found in core._entries.items()})
    monkeypatch.setattr(core, "_declared", {kind: dict(found) for kind, found in core._declared.items()})


@dataclass
class TinyConfig:
    rate: float = 0.5  # a number
    # Above the field.
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    must: str = MISSING
    flag: bool | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ZooError(f"rate must not be negative, got {self.rate}.")


class Tiny:
    needs = frozenset({"grid"})

    def __init__(self, config: TinyConfig, *, vision_dim: int = 0) -> None:
        self.config, self.vision_dim = config, vision_dim

    def num_tokens(self, n):
        return n

    def __call__(self, image):
        return image


LINE = inspect.getsourcelines(Tiny)[1]


class Order(Enum):
    FIRST = "first"
    LAST = "last"


@dataclass
class Inner:
    size: int = 3


@dataclass
class TypedConfig:
    percent: float = 50.0  # one blank ahead of the comment
    order: Order = Order.FIRST  # which end
    file: Path = Path("a")  # of the order
    grid: tuple[int, int] = (
        2,
        3,
    )  # behind a bracket
    separator: str = "a  # b"  # between words

    def __post_init__(self) -> None:
        self.percent = self.percent / 100
        self.half = self.percent / 2


@dataclass
class NestedConfig(TypedConfig):
    inner: Inner = field(default_factory=Inner)
    """Of a kind of its own.

    More of it."""


def typed(config: Any) -> type:
    """A part with these options."""
    made = type("Typed", (Tiny,), {"__init__": lambda self, config: setattr(self, "config", config)})
    made.__init__.__annotations__["config"] = config
    return made


def test_register_build_and_derived_values(table):
    registry.register("pruner", "tiny")(Tiny)
    node = {"name": "tiny", "must": "x", "rate": 1}
    made = registry.build("pruner", node, vision_dim=7, grid=(2, 2))  # grid is not asked for, so not given
    assert (made.config.rate, made.config.sizes, made.vision_dim) == (1.0, [1, 2], 7)
    assert "tiny" in registry.names("pruner", "t*")


@pytest.mark.parametrize("schema", [TypedConfig, NestedConfig])
def test_options_have_their_types_and_rules_run_once(table, schema):
    """An option computed from itself was computed twice, and a file's or an enum's could not be saved."""
    registry.register("pruner", "typed")(typed(schema))
    node = {"name": "typed", "order": "LAST", "grid": [4, 5]}
    config = registry.build("pruner", node).config
    assert type(config) is schema and (config.percent, config.half) == (0.5, 0.25)
    assert (config.order, config.file) == (Order.LAST, Path("a"))
    assert config.grid == (4, 5) and (schema is TypedConfig or config.inner == Inner(3))
    again = json.loads(json.dumps(registry.completed("pruner", node)))
    assert (again["percent"], again["order"], again["file"], again["grid"]) == (50.0, "LAST", "a", [4, 5])
    assert registry.build("pruner", again).config == config


def test_what_is_said_of_options(table):
    registry.register("pruner", "typed")(typed(NestedConfig))
    options = {o.name: o for o in registry.get("pruner", "typed").options}
    assert [o.doc for o in options.values()] == [
        "one blank ahead of the comment", "which end", "of the order", "behind a bracket", "between words",
        "Of a kind of its own.",
    ]  # fmt: skip
    assert (options["order"].type, options["order"].default) == ("FIRST | LAST", "FIRST")
    assert json.dumps([o.default for o in options.values()])
    with pytest.raises(ZooError, match=r"Option 'inner.size' of pruner 'typed' cannot be that: Value 'a'"):
        registry.build("pruner", {"name": "typed", "inner": {"size": "a"}})


@pytest.mark.parametrize(
    ("hint", "default", "said"),
    [
        (Literal["a", "b"], "a", r"has the type Literal\['a', 'b'\], .* Write str and check it"),
        (set[int], None, r"has the type set\[int\], which a config cannot hold"),
        (int | list[int], 3, r"has the type int \| list\[int\], .* a union is of plain values"),
        (list[object], None, "has the type object"),
        (float, field(init=False), "has init=False"),
    ],
)
def test_options_that_no_config_can_hold_are_refused(table, hint, default, said):
    schema = dataclass(type("Odd", (), {"__annotations__": {"odd": hint}, "odd": default}))
    with pytest.raises(ZooError, match=f"pruner 'odd': option 'odd' {said}"):
        registry.register("pruner", "odd")(typed(schema))


def test_dataclasses_and_signatures_that_cannot_be_used_are_refused(table):
    frozen = dataclass(frozen=True)(type("Frozen", (), {"__annotations__": {"a": int}, "a": 1}))
    with pytest.raises(ZooError, match="pruner 'odd': its dataclass Frozen is frozen"):
        registry.register("pruner", "odd")(typed(frozen))
    preset = dataclass(type("Taken", (), {"__annotations__": {"preset": str}, "preset": "x"}))
    with pytest.raises(ZooError, match="an option cannot be called 'preset'"):
        registry.register("pruner", "odd")(typed(preset))

    class Odd(Tiny):
        def __init__(self, *, config: TinyConfig) -> None: ...

    with pytest.raises(TypeError, match="must take `config` first"):
        registry.register("pruner", "odd")(Odd)


def test_facts_of_an_entry(table):
    registry.register("pruner", "tiny")(Tiny)
    entry = registry.get("pruner", "tiny")
    assert entry.needs == {"grid"} and entry.provides == frozenset()
    assert entry.summary == "The table: names, entries, building, and what is refused."
    assert entry.file == __file__ and entry.line == LINE
    assert [(o.name, o.type, o.default, o.doc) for o in entry.options] == [
        ("rate", "float", 0.5, "a number"),
        ("sizes", "list[int]", [1, 2], "Above the field."),
        ("must", "str", MISSING, ""),
        ("flag", "bool | None", None, ""),
    ]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"must": "x"}, "A pruner config needs a `name`. Available: "),
        ({"name": "tiny"}, "pruner 'tiny': a value is needed for 'must'."),
        ({"name": "tiny", "must": "x", "rate": -1}, "pruner 'tiny': rate must not be negative, got -1.0."),
        ({"name": "tiny", "must": "x", "rate": "fast"}, "takes float (default 0.5), got 'fast'."),
        ({"name": "tiny", "must": "x", "sizes": [1, "b"]}, "Option 'sizes' of pruner 'tiny' takes list[int]"),
        ({"name": "tiny", "must": "x", "rate": 10**400}, "pruner 'tiny': rate must be a finite number"),
        ({"name": "tiny", "must": "x", "rat": 1}, "named 'rat'. Did you mean 'rate' (float, default 0.5)?"),
        ({"name": "tiny", "must": "${oc.env:HOME}"}, "holds the interpolation"),
        ({"name": "tiny", "_target_": "os.system"}, "holds '_target_': configs name registered components"),
        ({"name": "tiyn"}, "No pruner named 'tiyn'. Did you mean 'tiny'?"),
    ],
)
def test_what_is_refused(table, node, message):
    registry.register("pruner", "tiny")(Tiny)
    with pytest.raises(ZooError) as error:
        registry.build("pruner", node)
    assert message in str(error.value)


def test_a_duplicate_names_file_and_line_of_the_first(table):
    registry.register("pruner", "tiny")(Tiny)
    other = type("Other", (Tiny,), {"__init__": Tiny.__init__, "__module__": __name__})
    with pytest.raises(ZooError, match=rf"pruner 'tiny' is taken: Tiny in {__file__}:{LINE}"):
        registry.register("pruner", "tiny")(other)


def test_a_duplicate_of_one_that_is_not_imported_yet(table):
    with pytest.raises(ZooError, match=r"projector 'linear' is taken: .*linear.py:(1\d|2\d)\."):
        registry.register("projector", "linear")(type("Mine", (Tiny,), {"__init__": Tiny.__init__}))


def test_what_a_plugin_declares_does_not_replace_another_one(table):
    registry.register("pruner", "tiny")(Tiny)
    for kind, known, file in (("projector", "linear", "linear"), ("pruner", "tiny", "test_registry")):
        with pytest.raises(ZooError, match=rf"{kind} '{known}' is taken: .* in .*{file}.py:\d+"):
            registry.declare(kind, known, "theirs.parts")
    registry.declare("pruner", "tiny", Tiny.__module__)  # a package that is reloaded
    assert registry.get("pruner", "tiny").cls is Tiny


def test_the_same_class_again_is_a_reload(table):
    registry.register("pruner", "tiny")(Tiny)
    again = type("Tiny", (Tiny,), {"__init__": Tiny.__init__, "__module__": __name__})
    registry.register("pruner", "tiny")(again)
    assert registry.get("pruner", "tiny").cls is again


@pytest.mark.parametrize("name", ["My-Pruner", "a b", "a/b", "../x", "", "Caps"])
def test_names_are_plain_words(table, name):
    with pytest.raises(ZooError, match="lower case letters, digits and underscores"):
        registry.register("pruner", name)


@pytest.mark.parametrize("name", ["null", "true", "on", "nan"])
def test_names_are_not_values(table, name):
    """`pruner=null` empties the slot, whatever is called so."""
    with pytest.raises(ZooError, match=f"in data={name} the word is a value"):
        registry.register("dataset", name)


@pytest.mark.parametrize("kind", ["pruner", "adapter"])
@pytest.mark.parametrize("name", ["train", "keys", "half", "training", "forward"])
def test_a_name_that_every_module_has_is_refused(table, kind, name):
    with pytest.raises(ZooError, match=f"{kind} {name!r}: every torch module has an attribute"):
        registry.register(kind, name)


def test_a_class_without_a_dataclass_or_with_a_field_name(table):
    with pytest.raises(TypeError, match="must annotate `config` with a dataclass"):
        registry.register("pruner", "odd")(type("Odd", (), {"__init__": lambda self, config: None}))

    @dataclass
    class Named:
        name: str = ""

    class Odd:
        def __init__(self, config) -> None: ...

    Odd.__init__.__annotations__["config"] = Named
    with pytest.raises(TypeError, match="must not have a field `name`"):
        registry.register("pruner", "odd")(Odd)


def test_a_component_whose_module_cannot_be_imported(table):
    registry.declare("pruner", "lost", "no.such.module")
    with pytest.raises(ZooError, match=r"pruner 'lost' cannot be imported from no.such.module: No module named 'no'"):
        registry.get("pruner", "lost")


def test_a_module_that_raises_or_lacks_what_it_declares(table, tmp_path, monkeypatch):
    (tmp_path / "own_module_raises.py").write_text("x = undefined")
    (tmp_path / "own_module_lacks.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("raises", "lacks"):
        registry.declare("pruner", name, f"own_module_{name}")
    with pytest.raises(ZooError, match=r"cannot be imported from own_module_raises: NameError: name 'undefined'"):
        registry.get("pruner", "raises")
    with pytest.raises(ZooError, match=r"No pruner in own_module_lacks, where it is declared to be, named 'lacks'"):
        registry.get("pruner", "lacks")


def test_a_class_that_hands_on_keywords_gets_what_the_one_behind_it_asks_for(table):
    """It was built with the defaults of these, as if there were no grid."""

    class Behind(Tiny):
        def __init__(self, config: TinyConfig, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)

    registry.register("pruner", "behind")(Behind)
    assert registry.build("pruner", {"name": "behind", "must": "x"}, vision_dim=7, grid=(2, 2)).vision_dim == 7


def test_every_component_says_what_it_is():
    for entry in registry.entries():
        where = f"{entry.kind}/{entry.name}"
        assert 10 < len(entry.summary) <= 160 and entry.summary.endswith((".", "?")), where
        assert entry.cls.__doc__, f"{where}: the class has no docstring"
        assert entry.licence and entry.package, where
        for option in entry.options:
            assert option.name.islower() and option.name not in {"needs", "provides"}, where


def test_a_value_below_its_least_is_named_and_none_is_not_checked():
    registry.require_at_least(1, rank=1, depth=None)
    registry.require_at_least(0, weight=0.0)
    with pytest.raises(ZooError, match=r"^depth must be at least 1, got 0\.$"):
        registry.require_at_least(1, rank=2, depth=0)
    with pytest.raises(ZooError, match=r"^weight must not be negative, got -0\.5\.$"):
        registry.require_at_least(0, weight=-0.5)


def test_an_error_in_one_line():
    error = RuntimeError("\n  first \n\tsecond\n")
    assert registry.first_line(error) == "first " and registry.one_line(error) == "first second"
    assert registry.first_line(KeyError()) == registry.one_line(KeyError()) == "KeyError"


def test_a_config_that_was_converted_before_is_the_same_and_nobody_elses(monkeypatch):
    """What OmegaConf made of plain values is kept, by value and type; the dataclass is made and checked anew."""
    from zoo.registry import conversion, table

    monkeypatch.setattr(conversion, "_converted", {})
    node = {"name": "hf", "model_type": "llama", "extra": {"rope_theta": 5}, "max_positions": "64"}
    first = table.config_of("llm", node)[1]
    assert len(conversion._converted) == 1
    again = table.config_of("llm", node)[1]
    assert again == first and again is not first and type(again) is type(first)
    again.extra["rope_theta"] = 6  # a copy of its own
    assert table.config_of("llm", node)[1] == first
    asked = []
    monkeypatch.setattr(type(first), "__post_init__", lambda self: asked.append(self.max_positions))
    table.config_of("llm", node)
    assert asked == [64]
    assert table.config_of("llm", {**node, "max_positions": "64"})[1].max_positions == 64
    for value in (64.0, True, "many") * 2:  # equal to what is kept, of another type; and wrong each time
        with pytest.raises(ZooError, match="max_positions"):
            table.config_of("llm", {**node, "max_positions": value})


def test_values_that_are_taken_as_they_are_equal_what_omegaconf_makes_of_them():
    """For every type of an option that there is, with values of its own type and of others."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zoo.registry.conversion import exact

    values = (0, 1, 0.5, 1.0, True, None, "", "x", "1", "${x}", "???", [], [1], [0.5, 2], ["x"], ["${x}"], [[1, 2]], {},
              {"a": 1}, {"a": {"b": "???"}}, {"a": 0.5})  # fmt: skip
    seen, taken = {}, 0
    for entry in registry.entries():
        for f in fields(entry.config):
            seen.setdefault(str((f.type, entry.config.__dict__.get(f.name))), (entry, f.name))
    for entry, name in seen.values():
        least = {f.name: "x" for f in fields(entry.config) if f.default == registry.MISSING}
        for value in values:
            plain = {**least, name: value}
            if (found := exact(entry.node, plain)) is None:
                continue
            taken += 1
            try:
                theirs = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(entry.node), plain), resolve=True)
            except OmegaConfBaseException as error:
                pytest.fail(f"{entry.kind}/{entry.name}: {name}={value!r} is refused: {error}")
            assert repr(found) == repr(theirs), (entry.kind, entry.name, name, value)
    assert len(seen) > 30 and taken > 100
    assert exact(registry.get("pruner", "random").node, {"none": 1}) is None
