"""Names with markup in them never break a table, a picture, Markdown or a page."""

import html
import io
import json
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from zoo.benches.measure import Value
from zoo.benches.report import Report, Row
from zoo.checking.checker import CheckReport, Stagecheck, show
from zoo.checking.checker import PartSummary as Part
from zoo.checking.memory import Memory
from zoo.evaluation.result import EvalResult, Line
from zoo.evaluation.score_table import score_table
from zoo.inspection.report import report_tables
from zoo.inspection.report_picture import draw
from zoo.inspection.run_summary import summaries
from zoo.inspection.views import View, Xray
from zoo.inspection.xray_page import page
from zoo.inspection.xray_picture import write_picture
from zoo.registry import Score
from zoo.runs.progress import Display
from zoo.text.markup import in_cell, label, markdown, printable
from zoo.training.finish import report

NAMES = ["[/b]", "[bold]x", "[red]", "$\\frac$", "$x$", "a$b", "$$", "\\$", "<b>", "</script>", "a|b", "`x`", "*x*"]
NAMES += ["__x__", "_x", "#1", "&amp;", ":smile:", "{x}", "%s", "a\nb", "\x1b[2Jx", "\u202ex", "猫", "\\", "~~x~~"]
NAMES += ["[link=x]y[/link]", "'\"", "\x00", "-", " ", "\ud83d"]


def printed(thing):
    file = io.StringIO()
    Console(file=file, width=400, force_terminal=True, color_system="truecolor").print(thing)
    return file.getvalue()


def lines(name):
    score = Score(0.5, 4, 0.1)
    return [Line(name, name, "exact", name, held, score, score, score) for held in (False, True)]


MEMORY = Memory(1, 0, 0, 0, (1, 1), 1, False)


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_as_they_are(name):
    text = printed(score_table(lines(name), name))
    assert text.count(printable(name).strip()) >= 5 and "50.0" in text
    bench = Report(name, rows=[Row(name, Value(1.0, 0.5, 2.0), note=name)])
    row = next(line for line in bench.markdown().splitlines() if line.startswith("| ") and "1" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    shown = io.StringIO()
    out, sys.stdout = sys.stdout, shown
    try:
        bench.print()
        rows = [Part("vision", name, 4, None, 8, 1, 1, frozenset({name}), frozenset(), frozenset(), 2)]
        show(
            CheckReport(
                rows,
                4,
                1,
                [Stagecheck(name, {name: 1}, lambda batch, placeholder: MEMORY, lambda *_: None)],
                0.1,
                notes=[name],
            ),
            name,
        )
    finally:
        sys.stdout = out
    assert shown.getvalue().count(printable(name).strip()) >= 4


@pytest.mark.parametrize("name", ["[/b]", "$\\frac$", "\x1b[2Jx"])
def test_the_progress_bar_shows_stages_as_they_are(name):
    file = io.StringIO()
    with Display(console=Console(file=file, force_terminal=True, width=200)) as display:
        display.begin(name, 2)
        display.update(1, {name: 1.0}, 1, "images", 0)
        display.note(name)
    assert printable(name) in file.getvalue()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_report_shows_runs_and_scores_as_they_are(tmp_path):
    shown = [n for n in NAMES if "\x00" not in n and n != "\ud83d"]
    for number, name in enumerate(shown):
        run = tmp_path / (name.replace("/", "_") + f".{number}")
        run.mkdir()
        (run / "config.yaml").write_text("")
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
        EvalResult(lines(name)[:1]).save(run)
    found = summaries([tmp_path])
    assert len(found) == len(shown)
    text = "".join(printed(table) for table in report_tables(found))
    assert "[/b]" in text and "$\\frac$" in text and "\x1b[2J" not in text
    for some in (found[:3], found[:1], found):
        draw(some, tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").size[0] > 100


def test_a_legend_has_every_name():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    shown = [n for n in NAMES if n.strip() and n not in ("猫",)]
    for name in shown:
        axis.plot([0, 1], [0, 1], label=label(name))
    axis.set_title(label("$\\frac$"))
    texts = axis.legend().get_texts()
    assert len(texts) == len(shown)
    figure.savefig(io.BytesIO())
    assert [t._preprocess_math(t.get_text())[1] for t in texts] == [False] * len(shown)
    assert texts[shown.index("$x$")]._preprocess_math(label("$x$"))[0] == "$x$"
    plt.close(figure)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_names_as_they_are(name):
    found = markdown(name)
    assert "\n" not in found and not re.search(r"(?<!\\)(?:\\\\)*[|*`\[\]$~]", found) and "<" not in found
    plain = html.unescape(re.sub(r"\\([\\`*\[\]|$~_])", r"\1", found))
    assert plain == printable(name)
    assert not re.search(r"(?<!\\)\|", in_cell(name)) and "<" not in in_cell(name)
    assert "\x1b" not in printable(name) and printable(name).encode()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_an_xray_holds_any_text(name, tmp_path):
    view = View(name=name, grid=(2, 2), layers=[[0, 1, 2, -1]], tokens=[3], answer=name, options={name: name})
    found = Xray(model=name, question=name, image=Image.fromarray(np.zeros((8, 8, 3), np.uint8)), views=[view],
                 refused={name: name})  # fmt: skip
    text = page(found)
    assert text.count("</script>") == 2 and text.count("<b>") == 0
    held = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert held["views"][0]["name"] == name
    if name in ("$\\frac$", "[/b]", "\x1b[2Jx"):
        write_picture(found, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["[/b]", "a b", "it's", "$(x)", 'a"b', "a|b"])
def test_the_commands_at_the_end_of_a_run_work_as_they_are(name, tmp_path):
    from types import SimpleNamespace

    folder = SimpleNamespace(path=tmp_path / name, skipped=tmp_path / "skipped.jsonl")
    cfg = SimpleNamespace(plugins=[], run=SimpleNamespace(dir=str(tmp_path / "runs")), limit=None)
    data = SimpleNamespace(evaluation={})
    run = SimpleNamespace(folder=folder, progress=SimpleNamespace(seconds=1), cfg=cfg, data=data)
    file = io.StringIO()
    report(run, EvalResult(lines(name)), Console(file=file, width=500))
    said = [line.strip() for line in file.getvalue().splitlines() if line.startswith(("    zoo", "    python"))]
    words = [shlex.split(line) for line in said]
    assert words[0] == ["zoo", "eval", f"model=dir:{tmp_path / name}"]
    assert words[1] == ["zoo", "report", str(tmp_path / name)]  # the folder of all runs where the run is below it
    assert words[2][:2] == ["python", "-c"] and compile(words[2][2], "x", "exec") and str(tmp_path) in words[2][2]


def test_scores_at_the_end_of_a_run_name_how_many_samples_they_are_of(tmp_path):
    from types import SimpleNamespace

    class Data(list):
        is_stream = False

    folder = SimpleNamespace(path=tmp_path / "run", skipped=tmp_path / "skipped.jsonl")
    for limit, length, note in ((None, 400, ""), (None, 401, "400 samples"), (20, 50, "20 samples")):
        cfg = SimpleNamespace(plugins=[], run=SimpleNamespace(dir=str(tmp_path)), limit=limit)
        data = SimpleNamespace(evaluation={"a": Data(range(length))})
        run, file = (
            SimpleNamespace(folder=folder, progress=SimpleNamespace(seconds=1), cfg=cfg, data=data),
            io.StringIO(),
        )
        report(run, EvalResult(lines("a")), Console(file=file, width=500))
        assert note in file.getvalue() and ("samples were scored" in file.getvalue()) is bool(note)
