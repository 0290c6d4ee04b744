"""Who may import whom, and what stays unimported: walked over syntax trees, and asked of real processes."""

import ast
import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from zoo.registry import KINDS
from zoo.registry.table import _declared

ROOT = Path(__file__).resolve().parents[1]
# The floors of the house, from the ground up. A file imports from its own room and from floors below; rooms on one
# floor do not import each other. A name is a folder, at the top level or in zoo/.
FLOORS = (
    ("registry",),
    ("storage",),
    ("pretrained",),
    ("vision", "fusion", "distill"),
    ("data", "tasks"),
    ("text",),
    ("published",),
    ("composed",),
    ("settings",),
    ("runs",),
    ("teaching",),
    ("checking",),
    ("loading",),
    ("evaluation", "serving"),
    ("training",),
    ("contracts",),
    ("inspection",),
    ("cli",),
    ("benches",),
    ("claims",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
COMPONENTS = ("vision", "fusion", "distill", "zoo/data", "zoo/tasks")
TOP_LEVEL = ("registry", "vision", "fusion", "distill", "benches", "claims")
AT_THE_TOP = {"zoo/autoclasses.py", "zoo/model_config.py", "zoo/moved.py"}  # on the ground: all floors may import them
OTHERS_AT_THE_TOP = {
    "zoo/__init__.py",
    "zoo/__main__.py",
    "zoo/lmms_eval_plugin.py",
    "zoo/train.py",
    "zoo/vllm_plugin.py",
}
# Imports that go up, each with its reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}
BACKENDS = {"transformers", "timm", "open_clip", "torchvision", "peft", "accelerate", "datasets"}
HEAVY = {"torch", *BACKENDS}


def imports(file: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `top_level`, when it is itself imported."""

    def walk(nodes) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports relatively"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and top_level:
                continue
            elif not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
                yield from walk(ast.iter_child_nodes(node))

    yield from walk(ast.parse(file.read_text(encoding="utf-8")).body)


def sources() -> Iterator[Path]:
    """Every Python file of the product and of its benches."""
    for folder in ("zoo", *TOP_LEVEL):
        yield from (ROOT / folder).rglob("*.py")


def room_of(file: Path) -> str | None:
    """The room of a file; None for one directly in `zoo/`."""
    parts = file.relative_to(ROOT).parts
    return (parts[1] if len(parts) > 2 else None) if parts[0] == "zoo" else parts[0]


def room_named(name: str) -> str | None:
    """The room that a dotted name lies in; None for what is not ours, or directly in `zoo`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "zoo" and len(parts) > 1 and parts[1] in HEIGHT else None


def upward(name_of_file: str, room: str, names: Iterable[str]) -> list[str]:
    """The imports among `names` that go up, or to a neighbour."""
    found = []
    for name in names:
        target = room_named(name)
        if target is None or target == room or HEIGHT[target] < HEIGHT[room]:
            continue
        if not any(name_of_file == file and name.startswith(allowed) for file, allowed in EXCEPTIONS):
            found.append(f"{name_of_file} ({room}) imports {name} ({target})")
    return found


def test_the_package_names_every_folder_that_belongs_to_it():
    """Folders of data too: setuptools warns in pages, at every installation, where one is missing."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / place for name, place in setup["package-dir"].items()} | {"zoo": ROOT / "zoo"}
    found = {
        ".".join([name, *inner.relative_to(folder).parts])
        for name, folder in folders.items()
        for inner in [folder, *folder.rglob("*/")]
        if any(file.is_file() and "__pycache__" not in file.parts for file in inner.rglob("*"))
    }
    assert found == set(setup["packages"])


def test_imports_go_down():
    found = []
    for file in sources():
        if (room := room_of(file)) is not None:
            found += upward(str(file.relative_to(ROOT)), room, imports(file))
    assert not found, "\n".join(found)


def test_the_files_of_settings_do_not_import_each_other_in_circles():
    """Inside functions neither: what one knows of a run's options, the next may ask, and never the other way."""
    files = {file.stem: file for file in (ROOT / "zoo" / "settings").glob("*.py")}
    graph = {
        name: {parts[2] for n in imports(file) if len(parts := n.split(".")) > 2 and n.startswith("zoo.settings.")}
        for name, file in files.items()
    }
    while free := [name for name, below in graph.items() if not below & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph, f"in a circle: {sorted(graph)}"


def test_an_import_that_goes_up_is_found(tmp_path):
    """Inside a function too, and one to a neighbour on the same floor."""
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from zoo.cli.entry import main\n    import zoo.vision.video\n    return main\n")
    found = upward("fusion/planted.py", "fusion", imports(planted))
    assert len(found) == 2 and "(cli)" in found[0] and "(vision)" in found[1]


def test_the_named_exceptions_are_still_needed():
    for file, name in EXCEPTIONS:
        assert any(found.startswith(name) for found in imports(ROOT / file)), f"{file} imports no {name} any more"


def test_every_room_has_a_floor():
    rooms = {room_of(file) for file in sources()} - {None}
    assert rooms == set(HEIGHT)
    at_the_top = {str(f.relative_to(ROOT)) for f in (ROOT / "zoo").glob("*.py")}
    assert at_the_top == AT_THE_TOP | OTHERS_AT_THE_TOP
    for file in AT_THE_TOP:
        assert {room_named(name) for name in imports(ROOT / file)} <= {None, "registry"}


def test_old_names_of_modules_give_those_of_today():
    from zoo.moved import MOVED

    assert all(file_of(today).is_file() for today in MOVED.values())
    code = """
import importlib, warnings
warnings.simplefilter("error", DeprecationWarning)
import zoo
import zoo.train, zoo.fusion.llm, zoo.vision.images
from zoo.loading import build
from zoo.cli import entry
from zoo.fusion.llm import attention, decoder, hf
from zoo.vision.images import decode, transform, video
from zoo.fusion.attach import refer
for package, name, today in (
    ("zoo.loading", "load", "zoo.loading.build"),
    ("zoo.train", "Run", "zoo.training.loop"),
    ("zoo.cli", "main", "zoo.cli.entry"),
    ("zoo.fusion.llm", "HFLanguageModel", "zoo.fusion.llm.hf"),
    ("zoo.vision.images", "open_image", "zoo.vision.images.decode"),
):
    try:
        exec(f"from {package} import {name}")
    except DeprecationWarning as warning:
        assert str(warning) == f"{name} is now in {today}.", warning
    else:
        raise AssertionError(package)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        exec(f"from {package} import {name} as found")
        assert found is getattr(importlib.import_module(today), name) and given[0].filename == "<string>"
try:
    import zoo.stage
except DeprecationWarning as warning:
    assert str(warning) == "zoo.stage is now zoo.settings.stage."
warnings.simplefilter("ignore", DeprecationWarning)
from zoo.stage import Stage
import zoo.settings.stage
assert Stage is zoo.settings.stage.Stage and zoo.settings.stage.__spec__.name == "zoo.settings.stage"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)


def file_of(module: str) -> Path:
    """The file of a module of ours by its dotted name."""
    parts = module.split(".")[1:]
    return (ROOT.joinpath(*parts) if parts[0] in TOP_LEVEL else ROOT.joinpath("zoo", *parts)).with_suffix(".py")


def test_no_component_imports_another():
    """Not one of another kind, and not one of its own: what two share has a file of its own."""
    modules = {module for kind in KINDS for module in _declared[kind].values()}
    for module in sorted(modules):
        for name in imports(file_of(module)):
            found = {name, name.rpartition(".")[0]} & modules - {module}
            assert not found, f"{module} imports the component {found}"


def test_no_backend_is_imported_at_the_top_of_a_component():
    for file in (f for folder in COMPONENTS for f in (ROOT / folder).rglob("*.py")):
        tops = {name.partition(".")[0] for name in imports(file, top_level=True)}
        assert not tops & BACKENDS, f"{file.relative_to(ROOT)} imports {tops & BACKENDS} at its top"


LIGHT = (
    "cli/complete", "cli/doctor", "cli/entry", "cli/launch", "cli/listing", "cli/new", "cli/sweep", "cli/templates",
    "settings/messages", "settings/model_names", "settings/overrides", "settings/presets", "settings/schema",
    "settings/stage", "settings/static_check",
)  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_the_way_to_an_error_is_free_of_torch(name):
    tops = {found.partition(".")[0] for found in imports(ROOT / "zoo" / f"{name}.py", top_level=True)}
    assert not tops & HEAVY


def test_tables_of_the_folders_hold_strings_only():
    for folder in COMPONENTS:
        names = set(imports(ROOT / folder / "__init__.py"))
        assert names == {"zoo.registry.declare"}, folder


PROBE = """
import json, sys
sys.argv = ["zoo", *{words!r}]
from zoo.cli.entry import main
code = main()
heavy = [m for m in {heavy!r} if m in sys.modules]
print("PROBE", json.dumps([code, heavy]), file=sys.stderr)
"""


def probe(*words: str, **env: str) -> tuple[int, list[str], str, str, float]:
    """Run `zoo <words>`: exit status, heavy modules it imported, what it printed, CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=list(words), heavy=sorted(HEAVY))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    *said, last = done.stderr.rstrip().splitlines()
    assert last.startswith("PROBE "), done.stderr
    code, heavy = json.loads(last.removeprefix("PROBE "))
    return code, heavy, done.stdout, "\n".join(said), seconds


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], "usage: zoo <command>"),
        (["version"], "0."),
        (["list"], "random"),
        (["list", "pruner", "r*"], "random"),
        (["train", "--help"], "usage: zoo train"),
        (["info", "pruner/random"], "destroys  grid"),
        (["info", "vision/hf", "pruner/aim", "data/scenes", "distiller/llava_mod"], "image_tokens"),
        (["info", "recipe/scenes_tiny", "model/llava15_7b"], "7.1 B"),
        (["list", "model", "--where", "params<1B and license=apache-2.0", "--json"], '"parameters": '),
    ],
)
def test_names_and_help_import_no_torch(words, shown):
    code, heavy, out, _, seconds = probe(*words)
    assert code == 0 and shown in out
    assert heavy == []
    print(f"\nzoo {' '.join(words)}: {seconds:.2f} s of CPU")
    assert seconds < 1.0  # 0.3 s on a quiet machine; a torch import alone is 2 s


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("zoo tr", "train"),
        ("zoo train pruner=", "pruner=random"),
        ("zoo train pruner=[random,", "pruner=[random,pool"),
        ("zoo train pruner=random pruner.random.", "pruner.random.keep_ratio="),
        ("zoo eval model=", "model=last"),
        ("zoo train vision.", "vision.layer="),
        ("zoo train vision=hf vision.", "vision.checkpoint="),
        ("zoo check stages.x.opt", "stages.x.optimizer="),
        ("zoo info pruner/", "pruner/random"),
        ("zoo list pru", "pruner"),
        ("zoo new ", "adapter"),
    ],
)
def test_completion_imports_no_torch(line, offered):
    code, heavy, out, _, seconds = probe("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert code == 0 and offered in out.split()
    assert heavy == []
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("words", "message", "torch_free"),
    [
        (["train", "pruner=rndom"], "Did you mean 'random'", True),
        (["train", "projector.dept=3"], "Did you mean 'depth'", True),
        (["check", "projector.depth=x"], "takes int (default 2), got 'x'", True),
        (["eval", "model=runs/none/such"], "No model named", True),
        (["train", "-m", "pruner=null,rndom"], "Did you mean 'random'", True),
        (["train", "projector.depth=0"], "depth must be at least 1", False),
        (["train", "stages.nowhere.lr=1"], "No stage named 'nowhere'", False),
    ],
)
def test_a_mistake_is_reported_before_backends_are_imported(words, message, torch_free):
    code, heavy, out, said, seconds = probe(*words)
    assert code == 2 and out == ""
    assert said.startswith("zoo: ") and message in said and "Traceback" not in said
    assert not set(heavy) - {"torch"}
    assert heavy == [] if torch_free else True
    print(f"\nzoo {' '.join(words)}: {seconds:.2f} s of CPU")
    assert seconds < (1.0 if torch_free else 4.0)
