"""What commands print: 80 columns, flags in any place, and with --json one object alone on stdout."""

import json

import pytest

from zoo.cli import entry
from zoo.cli.entry import main
from zoo.registry import ZooError
from zoo.text import terminal
from zoo.text.command_line import Parser
from zoo.text.terminal import Answer, columns, console, say, wrapped


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "ZOO_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("wide", [None, 40, 120])
def test_texts_are_as_wide_as_the_terminal(wide, monkeypatch, capsys):
    if wide:
        monkeypatch.setenv("COLUMNS", str(wide))
    most = wide or 80
    rows = [("name", "word " * 50), ("a_name_of_thirty_characters_or_so", "word " * 50), ("short", "x")]
    shown = columns(rows)
    assert most - 10 < widest(shown) <= most and shown.count("word") == 100
    say("word " * 50)
    assert most - 10 < widest(capsys.readouterr().out) <= most
    assert wrapped("--path=" + "x" * 200).endswith("x" * 200), "what is copied is not broken"


def test_cells_that_are_too_long_do_not_move_the_others():
    lines = columns([("a", "1", "first"), ("a" * 30, "2", "second"), ("b", "3", "third")]).splitlines()
    assert lines[0].index("first") == lines[2].index("third") == 2 + 3 + 3
    assert lines[1] == f"  {'a' * 30}  2  second"


def test_a_pipe_and_no_color_get_plain_text(monkeypatch, capsys):
    console().print("[bold red]x[/]")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    console().print("[bold red]x[/]")
    monkeypatch.setenv("NO_COLOR", "1")
    console().print("[bold red]x[/]")
    plain, colour, none = capsys.readouterr().out.splitlines()
    assert plain == none == "x" and "\x1b[" in colour


@pytest.mark.parametrize("words", ["--where a<b x y", "x --where a<b y", "x y --where=a<b"])
def test_flags_are_before_or_behind_names(words):
    parser = Parser("thing", "Do it.", json=True)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--where", default="")
    args = parser.read([*words.split(), "--json"])
    assert (args.name, args.where, args.json) == (["x", "y"], "a<b", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wher", "x"], "zoo thing has no flag '--wher'. Did you mean '--where'? Flags: --help, --where."),
        (["--where"], "zoo thing: argument --where: expected one argument. Its form: zoo thing"),
        (["a", "b"], "zoo thing takes no 'b'. Its form: zoo thing [-h] [--where WHERE] [name]"),
    ],
)
def test_mistakes_repeat_what_was_typed(words, message):
    parser = Parser("thing", "Do it.")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--where", default="")
    with pytest.raises(ZooError) as caught:
        parser.read(words)
    assert str(caught.value).startswith(message)


def answered(capsys, *words: str) -> tuple[int, dict]:
    """Exit status and the JSON that stdout holds, which is nothing else."""
    status = main([*words])
    return status, json.loads(capsys.readouterr().out)


def test_json_is_alone_on_stdout(monkeypatch, capsys):
    def noisy(words):
        print("a library prints")
        say("a table")
        console().print("a table of rich")
        return Answer({"seconds": float("nan"), "kinds": {"b", "a"}, "count": 3}, status=1)

    monkeypatch.setattr(entry.Command, "load", lambda self: noisy)
    assert main(["list", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["command"], found["status"], found["seconds"], found["kinds"]) == ("list", 1, None, ["a", "b"])
    assert err == "a library prints\n" and not terminal.is_json()
    assert main(["list"]) == 1
    assert capsys.readouterr().out == "a library prints\na table\na table of rich\n"


def test_a_mistake_is_json_too(capsys):
    status, found = answered(capsys, "list", "--json", "prunr")
    assert status == found["status"] == 2 and found["error"].startswith("No kind named 'prunr'. Did you mean 'pruner'?")
    assert answered(capsys, "--json", "list", "layout")[1]["layout"][0]["name"] == "anyres"
    assert main(["new", "--json"]) == 2
    assert "zoo new has no flag '--json'. Commands that have it: " in capsys.readouterr().err
