"""Who may import whom, and what stays unimported: walked over syntax trees, and asked of real processes."""

import ast
import json
import os
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.registry import KINDS
from zoo.registry.table import _declared

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"registry": set(), "vision": {"registry"}, "fusion": {"registry"}, "distill": {"registry"}}
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


def folder_of(name: str) -> str | None:
    """Folder of ours that a dotted name lies in, or None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "zoo":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "zoo"


def test_the_package_names_every_folder_that_belongs_to_it():
    """Folders of data too: setuptools warns in pages, at every installation, where one is missing."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: ROOT / place for name, place in setup["package-dir"].items()} | {"zoo": ROOT / "zoo"}
    found = {
        ".".join([name, *inner.relative_to(folder).parts])
        for name, folder in folders.items()
        for inner in [folder, *folder.rglob("*/")]
        if inner.name != "__pycache__"
    }
    assert found == set(setup["packages"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_what_they_may(folder):
    for file in (ROOT / folder).glob("*.py"):
        for name in imports(file):
            target = folder_of(name)
            allowed = {None, folder, *FOLDERS[folder]}
            assert target in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_no_component_imports_another():
    """Not one of another kind, and not one of its own: what two share has a file of its own."""
    modules = {module for kind in KINDS for module in _declared[kind].values()}
    for module in sorted(modules):
        folder, _, stem = module.removeprefix("zoo.").rpartition(".")
        file = ROOT / (folder if folder in FOLDERS else f"zoo/{folder}") / f"{stem}.py"
        for name in imports(file):
            found = {name, name.rpartition(".")[0]} & modules - {module}
            assert not found, f"{file.relative_to(ROOT)} imports the component {found}"


def test_components_of_zoo_know_nothing_of_the_application():
    for folder in ("data", "tasks"):
        for file in (ROOT / "zoo" / folder).glob("*.py"):
            for name in imports(file):
                own = name.startswith((f"zoo.{folder}", "zoo.registry", "zoo.vision"))
                assert folder_of(name) is None or own, f"{file.relative_to(ROOT)} imports {name}"


def test_no_backend_is_imported_at_the_top_of_a_component():
    files = [
        f for folder in ("vision", "fusion", "distill", "zoo/data", "zoo/tasks") for f in (ROOT / folder).glob("*.py")
    ]
    for file in files:
        tops = {name.partition(".")[0] for name in imports(file, top_level=True)}
        assert not tops & BACKENDS, f"{file.relative_to(ROOT)} imports {tops & BACKENDS} at its top"


LIGHT = ("cli", "complete", "config", "doctor", "explain", "launch", "listing", "new", "prepare", "presets", "saved")


@pytest.mark.parametrize("name", [*LIGHT, "stage", "sweep", "templates", "trial"])
def test_the_way_to_an_error_is_free_of_torch(name):
    tops = {found.partition(".")[0] for found in imports(ROOT / "zoo" / f"{name}.py", top_level=True)}
    assert not tops & HEAVY


def test_tables_of_the_folders_hold_strings_only():
    for folder in ("vision", "fusion", "distill", "zoo/data", "zoo/tasks"):
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
