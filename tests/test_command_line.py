"""What commands print: 80 columns, flags in any place, and with --json one object alone on stdout."""

import json
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from zoo.cli import entry
from zoo.cli.entry import main
from zoo.registry import ZooError
from zoo.registry.devices import require_device
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
        (["--where"], "zoo thing: --where needs a value. Its form: zoo thing"),
        (["a", "b"], "zoo thing takes no 'b'. Its form: zoo thing [name] [flags]"),
    ],
)
def test_mistakes_repeat_what_was_typed(words, message):
    parser = Parser("thing", "Do it.")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--where", default="")
    with pytest.raises(ZooError) as caught:
        parser.read(words)
    assert str(caught.value).startswith(message)


HELPS = [name for name in entry.COMMANDS if name != "version"]


@dataclass
class Options:
    port: int = 8000  # to listen on
    share: bool = False  # with others


def thing() -> Parser:
    parser = Parser("thing", "Do it.", options="of the model", schema=Options)
    parser.add_argument("model")
    parser.add_argument("-q", "--question", default="")
    parser.add_argument("--image", action="append", default=[])
    parser.add_argument("--merge", action="store_true")
    return parser


WORDS = [
    "-q what",
    "--port 80",
    "--share",
    "--merge",
    "image=b.jpg",
    "--image=a.jpg",
    "pruner.keep_ratio=.5",
    "pruner=x",
]


@pytest.mark.parametrize("seed", range(6))
def test_names_flags_and_options_come_in_any_order(seed, capsys):
    order = [*WORDS, "dir:runs/lr=1"]
    random.Random(seed).shuffle(order)
    args = thing().read([word for words in order for word in words.split(" ")])
    assert (args.model, args.question, args.merge) == ("dir:runs/lr=1", "what", True)
    assert sorted(args.image) == ["a.jpg", "b.jpg"] and sorted(args.given) == ["port=80", "share=true"]
    assert sorted(args.options) == ["pruner.keep_ratio=.5", "pruner=x"] and capsys.readouterr().err == ""


def test_what_was_given_several_values_is_named(capsys):
    words = ["seed=1", "m", "--port", "80", "seed=2", "-q", "a", "port=80", "--question=b", "seed=1", "--port=81"]
    args = thing().read([*words, "image=a", "image=b"])
    assert args.options == ["seed=1", "seed=2", "seed=1"] and args.question == "b" and args.given[-1] == "port=81"
    lines = " ".join(capsys.readouterr().err.split()).split(" zoo: ")
    assert lines == [
        "zoo: seed was given twice, seed=2 and seed=1: seed=1 is used.",
        "port was given twice, port=80 and --port=81: --port=81 is used.",
        "question was given twice, -q a and --question=b: --question=b is used.",
    ]


def test_of_a_run_too(monkeypatch, capsys):
    ran: list = []
    monkeypatch.setattr(entry.Command, "load", lambda self: ran.append)
    assert main(["train", "seed=3", "recipe=nlvr", "seed=4", "pruner=random", "seed=5", "recipe=scenes_tiny"]) == 0
    assert ran[0].seed == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "zoo: seed was given 3 times, seed=3, seed=4 and seed=5: seed=5 is used." in said
    assert "zoo: recipe was given twice, recipe=nlvr and recipe=scenes_tiny: recipe=scenes_tiny is used." in said


DEVICES = {  # as typed -> what is proposed
    "cud": "cuda",
    "CUDA": "cuda",
    "cuda0": "cuda:0",
    "cuda:x": "cuda",
    "cpu:3": "cpu",
    "gpu": "cuda",
    "gpu1": "cuda:1",
    "1": "cuda:1",
    "xla": "",
    "": "",
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_does_not_exist_is_refused_with_the_nearest_one(device):
    with pytest.raises(ZooError) as caught:
        require_device(device)
    hint = f" Did you mean device={DEVICES[device]}?" if DEVICES[device] else ""
    allowed = "auto, cpu, cuda, cuda:<n> (cuda:0 is the first one), mps"
    assert str(caught.value) == f"device={device}: there is no such device.{hint} Allowed: {allowed}."


@pytest.mark.parametrize("device", ["auto", "cpu", "cpu:0", "cuda", "cuda:0", "cuda:11", "mps", None])
def test_a_device_that_may_exist_is_taken(device):
    require_device(device)


@pytest.mark.parametrize(
    "words",
    [
        *([name, "device=cud"] for name, command in entry.COMMANDS.items() if command.composed),
        ["train", "stages.look.teacher={model: scenes_tiny, device: cud}"],
        *(["chat", "scenes_tiny", *flag] for flag in (["--device", "cud"], ["device=cud"])),
        ["serve", "scenes_tiny", "--device", "cud"],
        ["demo", "scenes_tiny", "device=cud"],
        ["inspect", "scenes_tiny", "--image", __file__, "device=cud"],
        ["export", "scenes_tiny", "device=cud"],
        ["bench", "train", "device=cud"],
        ["shift", "base=scenes_tiny", "probe=scenes_tiny", "device=cud"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_it_before_anything_is_loaded(words, monkeypatch, capsys):
    def loads(*args, **kwargs):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("zoo.loading.build.build", loads)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "=cud: there is no such device. Did you mean " in said and "=cuda? Allowed: auto, cpu, cuda" in said


@pytest.mark.parametrize("words", [*HELPS, "", "bench train", "bench prune", "bench claims"])
def test_every_help_fits_80_columns(words, capsys):
    assert main([*words.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    wide = [line for line in out.splitlines() if len(line) > 80]
    assert not wide and not err and "\x1b" not in out
    assert f"usage: zoo {words}".rstrip() in out and "--help" in out
    assert out == out.strip("\n") + "\n" and "\n\n\n" not in out


@pytest.mark.parametrize("name", [name for name in HELPS if name not in ("doctor", "list", "report")])
def test_every_command_names_the_nearest_flag_and_takes_help_anywhere(name, capsys):
    typed = ["train"] if name == "bench" else ["a"]
    assert main([name, *typed, "--hepl"]) == 2
    assert "has no flag '--hepl'. Did you mean '--help'?" in capsys.readouterr().err
    assert main([name, *typed, "-h"]) == 0 and f"usage: zoo {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chat", "export", "push", "serve", "demo", "inspect", "shift", "new", "info"])
def test_a_command_without_what_it_needs_shows_its_help(name, capsys):
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert f"usage: zoo {name}" in err and out == ""


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


@pytest.mark.parametrize("word", ["--merge=false", "merge=no", "--merge=0"])
def test_a_switch_that_is_off_is_off(word):
    assert thing().read(["m", word]).merge is False
    assert thing().read(["m", word.partition("=")[0] + "=true"]).merge is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--merge=maybe"], "zoo thing: --merge takes true or false, got 'maybe'."),
        (["m", "-q", "--image", "a.jpg"], "zoo thing: -q needs a value."),
        (["m", "--port", "--share"], "zoo thing: --port needs a value."),
    ],
)
def test_a_value_that_is_none_is_refused(words, message):
    with pytest.raises(ZooError, match=message):
        thing().read(words)


def test_a_switch_is_found_by_either_spelling():
    parser = Parser("thing", "Do it.", json=True)
    parser.add_argument("--dry-run", action="store_true")
    assert parser.read(["dry_run=true"]).dry_run and not parser.read(["dry-run=false"]).dry_run
    for word in ("json=true", "--json=true"):  # which the command itself would not act on
        with pytest.raises(ZooError, match="--json is written without a value"):
            parser.read([word])


def test_values_of_flags_are_no_folders_to_compare(monkeypatch, capsys, tmp_path):
    ran: list = []
    monkeypatch.setattr(entry.Command, "load", lambda self: ran.append)
    assert main(["eval", "--config-dir", str(tmp_path), "model=scenes_tiny"]) == 0 and len(ran) == 1
    assert main(["eval", "--cfg", "job", "model=scenes_tiny"]) == 0
    assert "name: scenes_tiny" in capsys.readouterr().out
    assert main(["eval", "--json", "help"]) == 0 and "usage: zoo eval" in capsys.readouterr().out


def test_the_json_of_a_bench_is_a_file(monkeypatch, tmp_path):
    from zoo.benches import train

    files: list = []
    report = SimpleNamespace(print=lambda: None, write_json=files.append)
    monkeypatch.setattr(train, "run", lambda options, show: report)
    for words in (["--json", "x.json"], ["--json=x.json"], ["json=x.json"]):
        assert main(["bench", "train", *words]) == 0
    assert list(map(str, files)) == 3 * ["x.json"]


def test_fixes_in_json_are_words_to_append(monkeypatch, capsys):
    from zoo.checking.checker import RefusedError
    from zoo.checking.fixes import AND

    def refused(cfg):
        raise RefusedError("It does not fit.", ["pruner=null", f"pruner.x.score=y{AND}projector=mlp"])

    monkeypatch.setattr(entry.Command, "load", lambda self: refused)
    assert answered(capsys, "check", "--json")[1]["fixes"] == ["pruner=null", "pruner.x.score=y projector=mlp"]
