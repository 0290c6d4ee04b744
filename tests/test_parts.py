"""Parts and their base classes: what is misspelt or missing is refused, and a class without a base is made whole."""

import ast
import copy
import inspect
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zoo import registry
from zoo.cli import new
from zoo.registry import KINDS, ZooError, hooks, whole
from zoo.registry.data_parts import Dataset, Records, StreamingDataset
from zoo.registry.parts import Adapter, Distiller, Encoder, InsidePruner, LanguageModel, Layout, Projector, Pruner

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    size: int = 2


# ---- every component -------------------------------------------------------------------------------------------------


def test_every_component_derives_from_the_base_of_its_kind():
    for entry in registry.entries():
        base = hooks.base_of(entry.kind, entry.cls)
        assert base in entry.cls.__mro__, f"{entry.kind}/{entry.name}"
        hooks.require_component(entry.kind, entry.name, entry.cls)


def test_a_part_takes_the_class_that_fsdp_gives_it():
    """It sets `__class__` to a class made of its own and the part's, which Python allows where layouts are alike."""
    from torch.distributed.fsdp import FSDPModule

    for entry in registry.entries():
        if issubclass(entry.cls, nn.Module):
            part = entry.cls.__new__(entry.cls)
            nn.Module.__init__(part)
            part.__class__ = type(f"FSDP{entry.cls.__name__}", (FSDPModule, entry.cls), {})


def test_every_hook_says_what_it_is():
    for base in [*hooks.BASES.values(), InsidePruner, Dataset, StreamingDataset]:
        lines = inspect.getsource(base)
        (tree,) = ast.parse(lines).body
        documented = {
            n.target.id
            for n, after in zip(tree.body, tree.body[1:], strict=False)
            if isinstance(n, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        }
        for name, value in vars(base).items():
            if not name.startswith("_") and hooks._is_method(value):
                assert inspect.getdoc(value), f"{base.__name__}.{name}"
            elif isinstance(value, registry.parts.derived):
                assert value.__doc__
        assert documented == set(vars(base).get("__annotations__", {})), base.__name__


# Names by which the application holds parts -> the bases that they may be of.
HELD = {
    "vision": (Encoder,),
    "pruner": (InsidePruner,),
    "projector": (Projector,),
    "layout": (Layout,),
    "llm": (LanguageModel,),
    "adapter": (Adapter,),
    "distiller": (Distiller,),
    "dataset": (Dataset, StreamingDataset),
    "task": (registry.Task,),
}
OF_A_DICT = {"values", "items", "keys", "get"}  # `adapter` and others hold several
# What knows components of ours by name, or calls something else so: published families, nodes, drawn scenes.
ELSEWHERE = ("zoo/published/", "zoo/data/", "zoo/composed/slots.py")
EVERY = {n for base in [*hooks.BASES.values(), InsidePruner, Dataset, StreamingDataset] for n in hooks.hooks_of(base)}


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def undeclared(tree: ast.AST) -> list[str]:
    """What is read of something called `vision`, `adapter`, ... that neither its base has, nor `nn.Module`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _name(node.value) in HELD:
            bases = HELD[_name(node.value)]
            known = {n for base in bases for n in hooks.hooks_of(base)} | set(dir(nn.Module)) | OF_A_DICT
            if node.attr not in known:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def asked(tree: ast.AST) -> list[str]:
    """`hasattr(part, hook)` and `getattr(part, hook, default)`: they would hide a misspelt hook again."""
    held = {*HELD, "part", "a", "p", "d"}
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and _name(node.func) in ("hasattr", "getattr")
        and len(node.args) > 1
        and _name(node.args[0]) in held
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in EVERY
    ]


@pytest.mark.parametrize("look", [undeclared, asked])
def test_the_application_calls_what_bases_declare_and_never_asks(look):
    found = []
    for file in (ROOT / "zoo").rglob("*.py"):
        name = str(file.relative_to(ROOT))
        if not name.startswith(ELSEWHERE):
            found += [f"{name}, {line}" for line in look(ast.parse(file.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


def test_a_planted_one_is_found():
    planted = ast.parse("self.adapter.idle(1) or model.vision.by_kinds\nif hasattr(dataset, 'stream'): pass\n")
    assert [len(look(planted)) for look in (undeclared, asked)] == [2, 1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _module(**members: Any) -> type:
    def begin(self: Any, config: Config) -> None:
        nn.Module.__init__(self)

    found = {"__init__": begin, "__module__": __name__, "forward": lambda self, *a, **k: None, **members}
    return type("Mine", (nn.Module,), found)


ADAPTER = {n: (lambda self, *a: None) for n in ("attach", "detach", "owns")}


@pytest.mark.parametrize(
    ("kind", "member", "value", "nearest"),
    [
        ("pruner", "num_token", lambda self, n: n, "num_tokens"),
        ("pruner", "need", frozenset({"grid"}), "needs"),
        ("pruner", "destroy", property(lambda self: frozenset()), "destroys"),
        ("pruner", "score", lambda self, image: image, "scores"),
        ("projector", "provide", frozenset(), "provides"),
        ("adapter", "aux_loss", lambda self: {}, "aux_losses"),
        ("adapter", "idle", lambda self, name: False, "idles"),
        ("adapter", "exclude", frozenset({"moe"}), "excludes"),
        ("adapter", "concurent", True, "concurrent"),
        ("adapter", "starts", lambda self: None, "start"),
        ("vision", "by_kinds", True, "by_kind"),
        ("distiller", "begin_steps", lambda self, step, steps: None, "begin_step"),
        ("distiller", "per_labels", frozenset(), "per_label"),
        ("distiller", "equal_width", True, "equal_widths"),
        ("layout", "row_token", 4, "row_tokens"),
        ("layout", "spel", lambda self, cut, token: "", "spell"),
        ("llm", "keyword", lambda self: frozenset(), "keywords"),
        ("dataset", "evalsplit", lambda self: None, "eval_split"),
        ("task", "max_new_token", 3, "max_new_tokens"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_nearest_name(kind, member, value, nearest):
    with pytest.raises(ZooError) as error:
        registry.register(kind, "mine")(_module(**{member: value}))
    assert f"{kind} 'mine': Mine.{member} (" in str(error.value) and f"Did you mean {nearest!r}?" in str(error.value)
    assert "mine" not in registry.names(kind)


def test_a_misspelt_method_of_the_zoos_class_behind_it_is_refused():
    """Python would run that of the class behind it."""
    behind = registry.get("pruner", "divprune").cls
    found = {"__module__": __name__, "chose": lambda self, image, k: image}
    with pytest.raises(ZooError, match=r"Mine.chose \(.* looks like a misspelt hook. Did you mean 'choose'\?"):
        registry.register("pruner", "mine")(type("Mine", (behind,), found))
    registry.register("pruner", "mine")(type("Mine", (behind,), {"__module__": __name__, "choose": found["chose"]}))


def test_what_is_the_classes_own_is_let_be():
    """A name near to a hook that the class has, or with an underscore; and a value near to a method."""
    own = {"attached": lambda self: True, "_aux_loss": lambda self: 0, "conditions": 3, "usage": lambda self: {}}
    registry.register("adapter", "mine")(_module(**ADAPTER, **own))


@pytest.mark.parametrize(
    ("kind", "members", "missing"),
    [
        ("pruner", {}, "'num_tokens'"),
        ("projector", {}, "'num_tokens'"),
        ("layout", {"num_tokens": lambda self, n: n}, "'count'"),
        ("adapter", {"attach": lambda self: None}, "'detach', 'owns'"),
        ("llm", {"embed": lambda self, ids: ids}, "'head', 'hidden', 'linear_head'"),
        ("dataset", {"__len__": lambda self: 3}, "'get'"),
        ("task", {"score": lambda self, dialog, said: {}}, "'summarise'"),
    ],
)
def test_a_method_that_is_missing_is_refused(kind, members, missing):
    with pytest.raises(ZooError) as error:
        registry.register(kind, "mine")(_module(**members))
    said = str(error.value)
    assert f"has no method {missing}, which every {kind} needs" in said
    assert "(self" in said  # how the first of them is called


def test_a_part_that_is_never_called_is_refused_with_its_line():
    with pytest.raises(ZooError, match=rf"Silent \({__file__}:\d+\) has no method 'forward', which every pruner needs"):

        @registry.register("pruner", "silent")
        class Silent(Pruner, nn.Module):
            def __init__(self, config: Config) -> None:
                super().__init__()

            def num_tokens(self, n: int) -> int:
                return n


def test_an_attribute_that_is_never_set_is_refused_when_it_is_built():
    @registry.register("vision", "plain")
    class Plain(Encoder, nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.hidden_size, self.grid, self.num_tokens = 8, (2, 2), 4

        def forward(self, pixel_values, *, need=frozenset()): ...

    with pytest.raises(ZooError, match=r"vision 'plain': .*Plain .* sets no 'transform', which every vision has"):
        registry.build("vision", {"name": "plain"})


def test_a_module_under_the_name_of_a_hook_is_refused():
    """Python would find the hook, and never the module."""

    @registry.register("pruner", "hidden")
    class Hidden(Pruner, nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.scores = nn.Linear(2, 2)

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image):
            return image

    with pytest.raises(ZooError, match=r"Hidden .* keeps a module as 'scores', which is the name of a hook"):
        registry.build("pruner", {"name": "hidden"})


PLAIN = {"num_tokens": lambda self, n: n}


@pytest.mark.parametrize(
    ("kind", "members", "said"),
    [
        ("pruner", {"num_tokens": 32}, "is 32, and has to be a method, num_tokens"),
        ("pruner", {**PLAIN, "scores": None}, "is None, and has to be a method, scores"),
        ("pruner", {**PLAIN, "needs": lambda self: {"grid"}}, "is a method, and is read as a value: frozenset"),
        ("adapter", {**ADAPTER, "can_merge": lambda self: True}, "is a method, and is read as a value: a value"),
        ("pruner", {**PLAIN, "destroys": "grid"}, "is the text 'grid', and has to be a set of words: {'grid'}"),
        ("adapter", {**ADAPTER, "notes": "mind the gap"}, "is the text 'mind the gap', and has to be a set of words"),
    ],
)
def test_a_hook_of_another_form_is_refused(kind, members, said):
    with pytest.raises(ZooError, match=re.escape(said)) as error:
        registry.register(kind, "mine")(_module(**members))
    assert str(error.value).startswith(f"{kind} 'mine': Mine.")


@pytest.mark.parametrize(
    ("kind", "members", "name", "value", "said"),
    [
        ("pruner", PLAIN, "num_tokens", 16, "is 16, and has to be a method"),  # as `__init__` is given it
        ("pruner", PLAIN, "need", frozenset({"keys"}), "misspelt hook. Did you mean 'needs'?"),
        ("adapter", ADAPTER, "concurent", True, "misspelt hook. Did you mean 'concurrent'?"),
        ("pruner", PLAIN, "destroys", "grid", "is the text 'grid'"),
    ],
)
def test_what_init_sets_is_held_to_the_base_too(kind, members, name, value, said):
    def begin(self: Any, config: Config) -> None:
        nn.Module.__init__(self)
        setattr(self, name, value)

    registry.register(kind, "mine")(_module(**members, __init__=begin))
    with pytest.raises(ZooError, match=re.escape(said)):
        registry.build(kind, {"name": "mine"})


def test_attributes_of_ones_own_are_let_be():
    """Near a hook by name, and of another type; or beside the hook itself."""

    def begin(self: Any, config: Config) -> None:
        nn.Module.__init__(self)
        self.need, self.note, self.concurrent, self.concurrently = 3, "x", True, True

    registry.register("adapter", "mine")(_module(**ADAPTER, __init__=begin))
    assert registry.build("adapter", {"name": "mine"}).need == 3


class _Counts:
    def __init__(self, config: Config) -> None:
        super().__init__()

    def num_tokens(self, n: int) -> int:
        return n

    def forward(self, image):
        return image


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        ((Pruner,), r"is not a torch module. Write: class Mine\(Pruner, nn.Module\)"),
        ((Projector, nn.Module), "derives from Projector; the base class of a pruner is Pruner"),
    ],
)
def test_bases_that_are_not_enough_are_refused(bases, said):
    with pytest.raises(ZooError, match=said):
        registry.register("pruner", "mine")(type("Mine", (_Counts, *bases), {}))


def test_an_init_that_forgets_its_parents_or_asks_for_what_is_not_given():
    def forgets(self: Any, config: Config) -> None: ...

    registry.register("pruner", "forgets")(_module(**PLAIN, __init__=forgets))
    with pytest.raises(ZooError, match=r"Mine.__init__ .* calls no super\(\).__init__\(\)"):
        registry.build("pruner", {"name": "forgets"})

    def asks(self: Any, config: Config, vision_dims: int) -> None: ...

    registry.register("projector", "asks")(_module(**PLAIN, __init__=asks))
    with pytest.raises(ZooError, match=r"No value for .*Mine.__init__ .*'vision_dims'. Did you mean 'vision_dim'\?"):
        registry.build("projector", {"name": "asks"}, vision_dim=3, text_dim=4)


def test_the_templates_and_their_tests_use_the_bases():
    assert set(new.TEMPLATES) - {"inside_pruner"} == set(hooks.BASES)
    for kind, source in new.TEMPLATES.items():
        base = {"inside_pruner": "DropsInside", "dataset": "Dataset"}.get(kind) or hooks.BASES[kind].__name__
        assert f"class CLASS({base}" in source, kind


# ---- classes without a base ------------------------------------------------------------------------------------------


class Plug(nn.Module):
    """An adapter as it was written when there was no base; its needs depend on its options."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.needs = frozenset({"image"} if config.size > 2 else ())
        self.weight = nn.Linear(config.size, config.size)
        self.weights = nn.Parameter(torch.zeros(3))  # no hook of an adapter

    def attach(self) -> None: ...

    def detach(self) -> None: ...

    def owns(self, name: str) -> bool:
        return False


def test_a_module_without_a_base_is_made_whole():
    registry.register("adapter", "plug")(Plug)
    part = registry.build("adapter", {"name": "plug"})
    assert type(part) is Plug and isinstance(part, Adapter) and Adapter not in Plug.__mro__
    assert (part.provides, part.excludes, part.exclusive) == (frozenset(), frozenset(), ())
    assert part.losses is None and part.aux_losses() == {} and not part.idles("x") and not part.reads_image
    assert not part.can_merge and part.begin(None) is None
    wants = registry.build("adapter", {"name": "plug", "size": 3})
    assert wants.reads_image and wants.needs == {"image"} and not part.reads_image
    assert list(part.state_dict()) == ["weights", "weight.weight", "weight.bias"]
    assert repr(part).startswith("Plug(")
    for again in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert type(again) is Plug and again.state_dict().keys() == part.state_dict().keys()
        assert torch.equal(again.weight.weight, part.weight.weight) and again.aux_losses() == {}


class Merges(Plug):
    """Merges for one image, as a class without a base says it."""

    merged = True

    def merge(self) -> None: ...

    def unmerge(self) -> None: ...


def test_what_a_class_without_a_base_has_is_kept():
    registry.register("adapter", "merges")(Merges)
    part = registry.build("adapter", {"name": "merges"})
    assert part.can_merge and part.merged and not part.merged_for_good


class Slotted:
    """A task in slots."""

    __slots__ = ("config", "max_new_tokens", "mode")

    def __init__(self, config: Config) -> None:
        self.config, self.mode, self.max_new_tokens = config, "generate", 4

    def score(self, dialog, prediction):
        return {"right": 1.0}

    def summarise(self, rows):
        return {}


@dataclass
class Listed:
    """A data set as a dataclass."""

    config: Config
    rows: list[int] = field(default_factory=lambda: [1, 2, 3])

    def __init__(self, config: Config) -> None:
        self.config, self.rows = config, [1, 2, 3]

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, index: int, epoch: int = 0):
        return self.rows[index]


class Stream:
    """A stream, which is no data set with a length."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def stream(self, epoch: int = 0, start: int = 0):
        yield from range(start, 3)


@pytest.mark.parametrize(("kind", "cls"), [("task", Slotted), ("dataset", Listed), ("dataset", Stream)])
def test_plain_classes_are_made_whole(kind, cls):
    registry.register(kind, "plain")(cls)
    part = registry.build(kind, {"name": "plain"})
    assert type(part) is cls and part.needs == frozenset()
    again = pickle.loads(pickle.dumps(part))
    assert type(again) is cls and again.config == part.config
    assert type(copy.copy(part)) is cls
    if cls is Slotted:
        assert not hasattr(part, "__dict__")
    if cls is Listed:
        assert part == again and repr(part).endswith("Listed(config=Config(size=2), rows=[1, 2, 3])")
        assert not part.is_stream and part.place(2) == "record 2" and part.eval_split() is None
        assert isinstance(part, Dataset) and not isinstance(part, StreamingDataset)
    if cls is Stream:
        assert part.is_stream and part.order("", 1, {}) is None and part.place(2) == "record 2 of the stream"
        assert isinstance(part, StreamingDataset) and not hasattr(part, "get")


def test_a_process_that_imports_a_class_and_builds_nothing_has_its_hooks():
    """As a loader worker that was not forked does: it is handed the data set."""

    class Fresh:
        def __init__(self, config: Config) -> None: ...

        def __len__(self):
            return 1

        def get(self, index, epoch=0):
            return 1

    registry.register("dataset", "fresh")(Fresh)
    assert Fresh(Config()).place(3) == "record 3" and not Fresh(Config()).is_stream


class Child(nn.Module):
    """Has a module of the name of a hook."""

    attach, detach, owns = Plug.attach, Plug.detach, Plug.owns

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.start = nn.Linear(1, 1)


def test_a_module_of_the_name_of_a_hook_is_let_be_in_a_class_without_a_base():
    registry.register("adapter", "child")(Child)
    for _ in range(2):
        assert isinstance(registry.build("adapter", {"name": "child"}).start, nn.Linear)


class Drops(nn.Module):
    """A pruner inside the LLM that says `begin` and nothing else of it."""

    needs = frozenset({"image_tokens"})

    def __init__(self, config: Config) -> None:
        super().__init__()

    def num_tokens(self, n: int) -> int:
        return n

    def forward(self, image):
        return image

    def begin(self, sequence) -> None:
        self.sequence = sequence


def test_a_pruner_inside_the_llm_without_a_base():
    registry.register("pruner", "drops")(Drops)
    part = registry.build("pruner", {"name": "drops"})
    assert part.inside and not part.concurrent and not part.shortens and isinstance(part, InsidePruner)
    assert part.attach(None) is None and part.kept(None) == [] and part.tokens_per_layer(5, 2) == [5, 5]


class Calls:
    """A distiller that is called, and is no module."""

    weights = {"mine": 0.5}

    def __init__(self, config: Config) -> None: ...

    def __call__(self, student, teacher, batch):
        return {"mine": torch.ones(())}


def test_a_distiller_that_is_no_module():
    registry.register("distiller", "calls")(Calls)
    part = registry.build("distiller", {"name": "calls"})
    assert part(None, None, {}) == {"mine": 1} and part.weights == {"mine": 0.5}
    assert part.begin_step(0, 1) is None and part.per_label == frozenset() and part.losses is None


class Chooses(Records):
    """A data set that builds one of two classes, as that of the hub does."""

    def __new__(cls, config: Config):
        return object.__new__(Long if config.size > 2 else Short)

    def __init__(self, config: Config) -> None:
        self.config = config


class Long(Chooses, StreamingDataset):
    def stream(self, epoch=0, start=0):
        yield 1


class Short(Chooses, Dataset):
    def __len__(self):
        return 1

    def get(self, index, epoch=0):
        return 1


def test_a_class_that_chooses_another_is_looked_at_when_it_is_built():
    registry.register("dataset", "chooses")(Chooses)
    assert not registry.build("dataset", {"name": "chooses"}).is_stream
    assert registry.build("dataset", {"name": "chooses", "size": 3}).is_stream


def test_a_data_set_that_was_never_registered_is_made_whole_where_it_is_given():
    class Given(list):
        def get(self, index, epoch=0):
            return self[index]

    assert whole("dataset", Given([1])).train_split() is None


def test_names_from_before_still_import():
    from zoo.registry import values

    old = ("Part", "Vision", "Pruner", "InsidePruner", "Projector", "Layout", "LanguageModel", "Adapter", "Distiller")
    for name in (*old, "Dataset", "StreamingDataset", "Task"):
        assert isinstance(getattr(values, name), type)
    assert values.Vision is Encoder
    with pytest.raises(AttributeError, match="has no attribute 'Encoders'"):
        values.Encoders  # noqa: B018


def test_the_kinds_have_bases():
    assert set(hooks.BASES) == set(KINDS)


def test_fsdp_can_exchange_the_class_of_every_part_that_is_a_module():
    """It shards a module by giving it a class of its own, which Python allows for objects of one layout alone."""
    from torch.distributed.fsdp import FSDPModule

    for base in (Encoder, Projector, Pruner, Adapter, Distiller):
        own = type("Own", (base, nn.Module), {})
        own.__abstractmethods__ = frozenset()
        made = own()
        made.__class__ = type("FSDPOwn", (FSDPModule, own), {})
        assert isinstance(made, FSDPModule)


def test_no_source_is_read_for_a_part_that_is_right(monkeypatch):
    """Finding the line of a method takes milliseconds, and a model is loaded with some eight parts."""
    monkeypatch.setattr(hooks, "_where", lambda *args: pytest.fail("a source file was read"))
    for kind, node in (("pruner", {"name": "random"}), ("task", {"name": "vqa"})):
        part = registry.build(kind, node)
        hooks.require_component(kind, node["name"], type(part))
