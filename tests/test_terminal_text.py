"""What is shown at 80 columns: files of presets and cards, times and sizes in units of people, progress of a run."""

import io
import random

import pytest
import yaml
from rich.console import Console

from zoo.benches.measure import Value
from zoo.benches.report import Row, _cells
from zoo.cli.listing import NOUNS, _find, _names, describe
from zoo.runs.progress import Display
from zoo.settings import presets
from zoo.text.file_text import markdown_text, yaml_text
from zoo.text.sizes import bytes_text, seconds_text


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


def wide(text: str) -> list[str]:
    """Lines beyond 80 columns, without those that end in a word that is not to be broken: a path, an address."""
    return [line for line in text.splitlines() if len(line) > 80 and max(map(len, line.split())) < 60]


@pytest.mark.parametrize("noun", NOUNS)
def test_whatever_info_shows_fits_80_columns(noun):
    found = [
        line
        for name in _names(noun)
        if ("", name) not in _find(f"{noun}/{name}")
        for line in wide(describe(f"{noun}/{name}"))
    ]
    assert not found


@pytest.mark.parametrize("noun", ["model", "recipe", "data"])
def test_a_preset_that_is_wrapped_means_the_same(noun):
    shown = {name: yaml_text(file.read_text()) for name, file in presets.preset_files(noun).items()}
    for name, file in presets.preset_files(noun).items():
        assert yaml.safe_load(shown[name]) == yaml.safe_load(file.read_text())
        assert not wide(shown[name])
    assert any(text != presets.preset_files(noun)[name].read_text().rstrip() for name, text in shown.items())


@pytest.mark.parametrize("seed", range(20))
def test_any_yaml_that_is_wrapped_means_the_same(seed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    draw = random.Random(seed)
    words = [
        "a",
        "it's",
        'say "x"',
        "# no comment",
        "two  blanks",
        "a: b",
        "[x]",
        "word " * 20,
        "x" * 60,
        1.5,
        None,
        True,
    ]

    def value(depth):
        kind = draw.choice(["text", "list", "dict"]) if depth else "text"
        if kind == "text":
            return draw.choice(words)
        several = [value(depth - 1) for _ in range(draw.randint(1, 6))]
        return several if kind == "list" else {f"k{i}": item for i, item in enumerate(several)}

    data = {f"key{i}": value(3) for i in range(4)}
    for flow in (True, None, False):
        text = "# " + "about " * 20 + "\n" + yaml.safe_dump(data, default_flow_style=flow, width=10_000)
        assert yaml.safe_load(yaml_text(text)) == data


def test_comments_go_above_and_literal_text_stays(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = yaml_text("a:\n  b: [1, 2]  # why it is so, in more words than fit a line\n")
    assert shown == "a:\n  # why it is so, in more words than fit\n  # a line\n  b: [1, 2]"
    literal = "a: |\n  " + "word " * 20 + "end\nb: 1  # of it"
    assert yaml_text(literal) == literal


def test_markdown_fits_too():
    words = "word " * 40
    text = f"# Title\n\n{words}\n\n| a | b |\n|---|---|\n| x | {words} |\n\n- {words}\n- short\n\n    {words}"
    shown = markdown_text(text)
    *others, code = shown.split("\n\n")
    assert code == f"    {words}".rstrip() or code == f"    {words}"
    assert max(map(len, "\n".join(others).splitlines())) <= 80 and shown.count("word") == text.count("word")
    assert "| a" not in shown and "\n- short" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 s"), (3e-10, "0.3 ns"), (2.36e-5, "23.6 µs"), (0.0042, "4.2 ms"), (0.1234, "123 ms")),
        *((0.9999, "1 s"), (1.5, "1.5 s"), (59, "59 s"), (125, "2 min 5 s"), (12_000, "3 h 20 min")),
    ],
)
def test_times_have_units_of_people(seconds, text):
    assert seconds_text(seconds) == text


def test_rows_of_a_bench_have_them_too():
    row = Row("a step", Value(2.36e-5, 2e-5, 3e-5), " s", bound=1e-4, at_most=True)
    assert _cells(row)[1:3] == ["23.6 µs", "20.0 to 30.0"] and row.verdict == "bound <= 100 µs: reached 23.6 µs"
    assert _cells(Row("a step", Value(0.2, 0.2, 0.2), " ms"))[1] == "200 µs"
    assert _cells(Row("loss", Value(1e-5, 1e-5, 1e-5), ""))[1] == "1.0e-05"
    assert bytes_text(199) == "199 B" and bytes_text(0) == "0 B" and bytes_text(9_940) == "9.9 KB"


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("columns", [80, 140])
def test_progress_fits_the_terminal(live, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    file = io.StringIO()
    with Display(console=Console(file=file, force_terminal=live, width=columns, color_system=None)) as display:
        display.begin("relate", 12_000, 3)
        losses = {"answer": 4.83, "dense": 10.2, "distil": 3.1}
        display.shown = float("-inf")
        display.update(1234, losses, 18, "images", 0.2)
        text = display._text(1234, 18, "images", 0.2, display.started + 60)
    lines = [line for line in file.getvalue().replace("\r", "\n").splitlines() if "relate" in line]
    assert lines and all(len(line.rstrip()) <= columns + 20 * live for line in lines)  # codes that move the cursor
    assert text.startswith("step 1,234 of 12,000 | ") and text.endswith(" left") and "waits for data 20%" in text
    assert ("images/s" in text) == (not live or columns == 140)
