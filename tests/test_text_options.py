"""Options whose type is text keep what was typed, wherever it is typed and wherever it goes."""

from dataclasses import dataclass, field, make_dataclass
from typing import Any, Optional

import pytest
import yaml
from omegaconf import OmegaConf

from zoo import ZooError, registry
from zoo.cli.bench import parse as parse_bench
from zoo.cli.sweep import plan
from zoo.registry import config_of
from zoo.registry import table as core
from zoo.runs.folder import RunFolder
from zoo.runs.resume import read_config
from zoo.settings.config import compose
from zoo.settings.overrides import parse, prepare, values
from zoo.settings.text_options import quoted_where, text_of, words

WORDS = """695e051 1e10 12e4567 0012345 1234567 1_000 2024_01_05 0x1f 0b11 0o17 1.10 1.0 007 +5 -3 .5 5. 1e3 1E-3 nan
NaN inf -inf .inf .nan true True FALSE on off yes No y n null NULL Null ~ 12:30 12:30:45 190:20:30 2024-01-05 é 模型
2024-01-05T12:30:00Z ß/ü #1 a#b <b> [/b] $x$ ! & * a=b x;y C:\\data \\\\host it's 50% v1.0 1.0.0 +-1 0 00 -0 1e 0x %s
{split} a\tb"""
SCALARS = [w for w in WORDS.replace("\n", " ").split(" ") if w] + ["a b", "12 34", "", "Größe 1e5"]


def quoted_for_hydra(text: str) -> str:
    """A word as a person types it: in quotes only where Hydra gives its marks a meaning of their own."""
    return "'" + text.replace("'", "\\'") + "'" if set(text) & set("{}[],()\t\\") or text == "" else text


def yaml_word(text: str) -> str:
    """A word as a person writes it in YAML: in quotes only where YAML would not take it for a plain scalar."""
    return (
        yaml.safe_dump(text).splitlines()[0] if not text or text[0] in "#!&*[{%" or set(text) & set("#:{}\t") else text
    )


@dataclass
class Lists:
    many: list[str] = field(default_factory=list)  # texts
    table: dict[str, str] = field(default_factory=dict)  # texts by name
    maybe: str | None = "x"  # text, or nothing
    old: Optional[str] = "x"  # noqa: UP045  the same
    number: float = 1.0  # no text
    flag: bool | None = None  # no text
    anything: dict[str, Any] = field(default_factory=dict)  # as YAML says


def _made(name: str, config: type) -> type:
    def start(self: Any, config: Any) -> None:
        self.config = config

    start.__annotations__ = {"config": config}
    calls = {"num_tokens": lambda self, n: n, "__call__": lambda self, image: image}
    return type(name, (), {"__init__": start, "__module__": __name__, **calls})


@pytest.fixture(scope="module", autouse=True)
def components():
    """A pruner with a text option for each word, and one with lists and dicts; gone again after this file."""
    fields = [(f"w{i}", str, field(default="")) for i in range(len(SCALARS))]
    for name, config in (("words", make_dataclass("Words", fields)), ("lists", Lists)):
        registry.register("pruner", name)(_made(name.title(), config))
    yield
    for name in ("words", "lists"):
        del core._entries["pruner"][name]


def pruners(cfg: Any) -> dict[str, Any]:
    return OmegaConf.to_container(cfg.pruner)


def test_every_word_on_the_command_line():
    overrides = [f"pruner.words.w{i}={quoted_for_hydra(w)}" for i, w in enumerate(SCALARS)]
    found = pruners(compose("load", ["pruner=words", *overrides]))["words"]
    assert [found[f"w{i}"] for i in range(len(SCALARS))] == SCALARS


def test_every_word_in_a_recipe_a_list_and_a_dict(tmp_path):
    (tmp_path / "recipe").mkdir()
    rows = [f"    w{i}: {yaml_word(w)}" for i, w in enumerate(SCALARS)]
    many = "".join(f"\n      - {yaml_word(w)}" for w in SCALARS)
    table = "".join(f"\n      k{i}: {yaml_word(w)}" for i, w in enumerate(SCALARS))
    text = "# @package _global_\ndefaults: [{override /pruner: [words, lists]}, {override /model: scenes_tiny}]\n"
    text += "pruner:\n  words:\n"
    text += "\n".join(rows) + f"\n  lists:\n    many: {many}\n    table: {table}\n    number: 1e3\n    flag: on\n"
    text += "    maybe: ~\n    old: null\n    anything: {a: 1e3, b: on, c: 1_000, d: ~}\n"
    (tmp_path / "recipe/r.yaml").write_text(text, encoding="utf-8")
    found = pruners(compose("train", ["recipe=r"], tmp_path))
    assert [found["words"][f"w{i}"] for i in range(len(SCALARS))] == SCALARS
    lists = found["lists"]
    assert lists["many"] == SCALARS and list(lists["table"].values()) == SCALARS
    assert lists["maybe"] is lists["old"] is None and lists["number"] == 1000 and lists["flag"] is True
    assert lists["anything"] == {"a": 1000.0, "b": True, "c": 1000, "d": None}


def test_lists_dicts_and_what_is_no_text_on_the_command_line():
    some = [w for w in SCALARS if w]
    many = ",".join(map(quoted_for_hydra, some))
    table = ",".join(f"k{i}:{quoted_for_hydra(w)}" for i, w in enumerate(some))
    overrides = [f"pruner.lists.many=[{many}]", f"pruner.lists.table={{{table}}}", "pruner.lists.maybe=null"]
    overrides += ["pruner.lists.old=~", "pruner.lists.number=1e3", "pruner.lists.flag=true"]
    overrides += ["pruner.lists.anything={a:1e3,b:true,c:null,d:é}"]
    lists = pruners(compose("load", ["pruner=lists", *overrides]))["lists"]
    assert lists["many"] == some and list(lists["table"].values()) == some
    assert (lists["maybe"], lists["old"], lists["number"], lists["flag"]) == (None, "~", 1000.0, True)
    assert lists["anything"] == {"a": 1000.0, "b": True, "c": None, "d": "é"}
    short = pruners(compose("load", ["pruner=[lists,random]", "pruner.many=[1e5]", "pruner.lists.table.k=0012"]))
    assert short["lists"]["many"] == ["1e5"] and short["lists"]["table"] == {"k": "0012"}


def test_sections_stages_and_the_run_itself(tmp_path):
    lines = ["run.name=1e5", "run.dir=007", "tokenizer.checkpoint=12e4567", "log=[null]", "device=cpu", "resume=null"]
    lines += ["stages.look.train=[1e5,vision]", "stages.look.teacher={store:0012}", "stages.look.precision=fp32"]
    cfg = compose("train", lines)
    assert (cfg.run.name, cfg.run.dir, cfg.tokenizer.checkpoint, cfg.resume) == ("1e5", "007", "12e4567", None)
    stage = cfg.stages.look
    assert list(stage.train) == ["1e5", "vision"] and stage.teacher.store == "0012" and list(cfg.log) == ["null"]
    with pytest.raises(ZooError, match="takes float"):
        compose("train", ["stages.look.lr=0x1f"])


def test_teachers_and_distillers_of_stages(tmp_path):
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\ndefaults: [{override /model: scenes_tiny}, {override /data: [scenes]}]\nstages:\n"
    text += (
        "  a: {steps: 1, teacher: 12e4567, distiller: {name: dense, target: 0012, weights: [1e0, 1, 1, 1, 1, 1, 1]}}\n"
    )
    text += "  b: {steps: 1, teacher: {store: 1_0, bits: 8, options: [], dtype: ''}, distiller: null}\n"
    (tmp_path / "recipe/r.yaml").write_text(text)
    stages = compose("train", ["recipe=r"], tmp_path).stages
    assert (
        stages.a.teacher == "12e4567" and stages.a.distiller.target == "0012" and stages.a.distiller.weights[0] == 1.0
    )
    assert (stages.b.teacher.store, stages.b.teacher.bits, stages.b.distiller) == ("1_0", 8, None)
    lines = ["recipe=r", "stages.a.distiller.target=1e5", "stages.b.teacher=null", "stages.a.teacher=1e5"]
    stages = compose("train", lines, tmp_path).stages
    assert (stages.a.distiller.target, stages.b.teacher, stages.a.teacher) == ("1e5", None, "1e5")


def test_data_sets_of_yaml_and_their_choice(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe").mkdir()
    base = "# A comment\n# @package data.base\ndefaults: [/data/chat_json@_here_, _self_]\n"
    (tmp_path / "data/base.yaml").write_text(base + "file: 1e5\nsplit: 007\nmeta_fields: [on, 1_0]\n")
    (tmp_path / "data/mine.yaml").write_text("# @package data.mine\ndefaults: [base@_here_, _self_]\nimages: 12:30\n")
    recipe = "# @package _global_\ndefaults: [{override /model: scenes_tiny}, {override /data: [scenes, mine]}]\n"
    (tmp_path / "recipe/r.yaml").write_text(recipe + "data: {mine: {system: 0x1f}}\n")
    for overrides in (["recipe=r"], ["recipe=r", "data=[mine]"], ["data=mine", "data.mine.system=0x1f"]):
        found = compose("train", overrides, tmp_path).data.mine
        assert (found.file, found.split, list(found.meta_fields)) == ("1e5", "007", ["on", "1_0"])
        assert (found.images, found.system, found.limit) == ("12:30", "0x1f", 0)


def test_sweeps_keep_what_was_typed():
    found = plan("train", ["pruner=[words]", "pruner.words.w0=1e5,0012,null,é", "run.name=1_000"]).jobs
    jobs = [values(parse(job)) for job in found]
    assert [job["pruner.words.w0"] for job in jobs] == ["1e5", "0012", "null", "é"]
    assert {job["run.name"] for job in jobs} == {"1_000"}


def test_a_saved_run_keeps_what_was_typed(tmp_path):
    overrides = [f"pruner.words.w{i}={quoted_for_hydra(w)}" for i, w in enumerate(SCALARS)]
    cfg = compose("train", ["pruner=words", *overrides])
    folder = RunFolder(tmp_path)
    OmegaConf.save(cfg, folder.config, resolve=True)
    again = read_config(folder, compose("train", ["resume=x"]), [])
    assert pruners(again) == pruners(cfg)
    plain = OmegaConf.to_container(OmegaConf.load(folder.config))["pruner"]["words"]
    assert config_of("pruner", plain)[1] == config_of("pruner", cfg.pruner.words)[1]


@pytest.mark.parametrize(
    ("annotation", "inside", "optional"),
    [
        ("str", False, False), ("str | None", False, True), ("None | str", False, True), ("Optional[str]", False, True),
        ("Path", False, False),
        ("typing.Optional[str]", False, True), ("list[str]", True, False), ("List[str] | None", True, True),
        ("dict[str, str]", True, False), ("dict[str, list[str]]", True, False), ("tuple[str, ...]", True, False),
    ],
)  # fmt: skip
def test_types_that_hold_text(annotation, inside, optional):
    found = text_of(annotation)
    assert found is not None and (found.inside, found.optional) == (inside, optional)
    for other in (
        "int",
        "float | None",
        "bool",
        "Any",
        "dict[str, Any]",
        "dict[str, float]",
        "list[int]",
        "int | str",
        "Strange",
    ):
        assert text_of(other) is None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a", ["a"]), ("a,b", ["a", "b"]), ("[a,[b,c]]", ["a", "b", "c"]), ("{k:a,l:{m:b:c}}", ["a", "b:c"]), ("", []),
        ("choice(a,b)", ["a", "b"]), ("'a,b',c", ["c"]), ('"x"', []), ("a\\,b", ["a,b"]), ("photo (1)", ["photo (1)"]),
        ("${a}", []), ("x${a,b}y,z", ["z"]), ("sort(3,1,reverse=true)", ["3", "1"]), ("[]", []),
        ("it's,b", ["it's", "b"]),
    ],
)  # fmt: skip
def test_the_words_of_a_value(value, found):
    assert [word.text for word in words(value)] == found
    assert quoted_where(value, lambda word: False) == value
    quoted = quoted_where(value, lambda word: True)
    assert quoted_where(quoted, lambda word: True) == quoted


def test_benches_keep_what_was_typed():
    found = parse_bench("x", Lists, ["maybe=12e4567", "old=null", "number=1e3", "flag=on", "anything.a=1e3"])
    assert (found.maybe, found.old, found.number, found.flag, found.anything) == (
        "12e4567",
        None,
        1e3,
        True,
        {"a": 1e3},
    )
    assert parse_bench("x", Lists, ["maybe=~"]).maybe == "~" and parse_bench("x", Lists, []).maybe == "x"


def test_lines_without_such_words_stay_as_they_are():
    lines = ["pruner=random", "pruner.random.keep_ratio=0.25", "seed=3", "run.name=a", "projector=null"]
    assert set(lines[1:4]) <= set(prepare("load", lines))
