"""One slip of a finger in any name or option, and the right one is suggested first."""

import inspect
import random
import string
from dataclasses import replace

import pytest

from zoo import ZooError
from zoo.cli.entry import COMMANDS
from zoo.registry import KINDS, build, names, nearest, options_of, source_options
from zoo.registry.errors import edits
from zoo.settings import presets
from zoo.settings.config import compose
from zoo.settings.schema import ModelSource, RunConfig, RunRoot, TokenizerConfig
from zoo.settings.stage import Stage

LETTERS = string.ascii_lowercase + string.digits + "_"


def one_edit(word: str, letters: str = LETTERS) -> set[str]:
    """Every string that one insertion, deletion, substitution or transposition makes of `word`."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    found = {a + b[1:] for a, b in cuts if b} | {a + b[1] + b[0] + b[2:] for a, b in cuts if len(b) > 1}
    found |= {a + c + b[1:] for a, b in cuts if b for c in letters} | {a + c + b for a, b in cuts for c in letters}
    return found - {word, ""}


def typos(word: str, words: list[str]) -> dict[str, int]:
    """Every typo of `word` that is no other word, and how many are like it.

    Letters that no word has are all alike to a count of edits: one of them is tried, and counts for each.
    """
    used = set("".join(words).lower())
    others = [letter for letter in LETTERS if letter not in used]
    tried = "".join(letter for letter in LETTERS if letter in used or letter in others[:1])
    made = one_edit(word, tried) - set(words)
    return {typo: len(others) if others and others[0] in typo else 1 for typo in made}


def pools() -> dict[str, list[str]]:
    """What a word can be mistaken within: the names of a kind, or the options of a component."""
    found = {kind: names(kind) for kind in KINDS}
    found |= {f"{group}=": presets.available(group) for group in ("model", "recipe", "data")}
    found |= {f"{k}/{n}": [o.name for o in source_options(k, n)] for k in KINDS for n in names(k)}
    schemas = {"run": RunRoot, "stage": Stage, "run.": RunConfig, "tokenizer.": TokenizerConfig, "model.": ModelSource}
    found |= {key: [o.name for o in options_of(schema)] for key, schema in schemas.items()}
    return found | {"commands": list(COMMANDS)}


def naive_edits(a: str, b: str) -> int:
    """Optimal string alignment by its definition, recursively."""
    if not a or not b:
        return len(a) + len(b)
    costs = [naive_edits(a[1:], b) + 1, naive_edits(a, b[1:]) + 1, naive_edits(a[1:], b[1:]) + (a[0] != b[0])]
    if len(a) > 1 and len(b) > 1 and a[0] == b[1] and a[1] == b[0]:
        costs.append(naive_edits(a[2:], b[2:]) + 1)
    return min(costs)


def test_edits_is_what_its_definition_says():
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abc", k=draw.randint(0, 5))) for _ in range(2))
        assert edits(a, b) == naive_edits(a, b), (a, b)
        assert edits(a, b, most=1) == min(2, naive_edits(a, b)), (a, b)


def test_letters_that_no_word_has_are_alike():
    for words in (["fastv", "random", "pool"], ["depth", "dim"]):
        for word in words:
            every = one_edit(word) - set(words)
            tried = typos(word, words)
            assert sum(tried.values()) == len(every) > 2 * len(tried)
            right = sum(times for typo, times in tried.items() if nearest(typo, words) == [word])
            assert right == sum(nearest(typo, words) == [word] for typo in every)


def test_one_edit_typos_of_every_name_and_option_get_the_right_suggestion():
    """Of every fifth word of each pool, from a first that differs: all of them take half a minute."""
    right = total = 0
    wrong = []
    for place, (pool, words) in enumerate(pools().items()):
        for word in words[place % min(5, len(words)) :: 5] if words else []:
            for typo, times in typos(word, words).items():
                total += times
                if nearest(typo, words) == [word]:
                    right += times
                else:
                    wrong.append((pool, typo, word))
    share = right / total
    print(f"\n{right} of {total} one-edit typos ({share:.2%}) get the right suggestion first; not: {wrong[:8]}")
    assert total > 30_000
    assert share >= 0.99


def test_every_component_has_options_in_its_text_that_equal_those_of_its_dataclass():
    """The corpus and the early errors read source text; this is what they rest on."""
    from zoo.registry import entries
    from zoo.registry.source_text import options_in
    from zoo.registry.table import source_of

    for entry in entries():
        read = options_in(source_of(entry.kind, entry.name), entry.kind, entry.name)
        assert [o.name for o in read] == [o.name for o in entry.options], (entry.kind, entry.name)


def test_what_the_text_of_a_component_says_equals_what_its_class_says():
    """`zoo info` imports nothing for it, so each of our components says all of it in plain words."""
    from zoo.registry import entries, facts
    from zoo.registry.table import source_of

    for entry in entries():
        read = facts.facts_in(source_of(entry.kind, entry.name), entry.cls.__module__, entry.kind, entry.name)
        known = facts.facts_of(entry.kind, entry.name)
        assert read is not None, f"{entry.kind}/{entry.name}: its text leaves something open"
        assert replace(read, about="") == replace(known, about=""), (entry.kind, entry.name)
        assert read.about == inspect.cleandoc(known.about)


PLANTED = """
from dataclasses import dataclass, field
from zoo.registry import Pruner, register
from zoo.fusion.pruners.random import RandomPruner

ASKED = frozenset({{"grid"}}) | {{"keys"}}

@dataclass
class Config:
    ratio: float = {default}

@register("pruner", "planted")
class Planted({base}):
    needs = {needs}
    def __init__(self, config: Config) -> None: ...
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, True),
        ({"default": "field(default_factory=lambda: 2 * 0.25)"}, True),
        ({"base": "RandomPruner"}, True),
        ({"needs": "ASKED"}, True),
        ({"default": "float('0.5')"}, False),
        ({"default": "elsewhere"}, False),
        ({"needs": "frozenset(word for word in ())"}, False),
        ({"base": "made()"}, False),
        ({"base": "object"}, False),
        ({"default": "1 + 'a'"}, False),
    ],
)
def test_what_code_computes_is_not_guessed_from_the_text(words, said, tmp_path):
    from zoo.registry.facts import facts_in

    file = tmp_path / "planted.py"
    plain = {"default": 0.5, "base": "Pruner", "needs": 'frozenset({"grid", "keys"})'}
    file.write_text(PLANTED.format(**plain | words))
    found = facts_in(file, "planted", "pruner", "planted")
    assert (found is not None) == said
    if found is not None:
        assert [o.default for o in found.options] == [0.5] and found.needs == {"grid", "keys"}
        assert found.destroys == ({"grid"} if words.get("base") == "RandomPruner" else frozenset())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pruner=rndom", "No pruner named 'rndom'. Did you mean 'random'? Available: "),
        ("prunr=random", "No option named 'prunr'. Did you mean 'pruner'?"),
        ("recipe=scenes_tny", "No recipe named 'scenes_tny'. Did you mean 'scenes_tiny'?"),
        ("model=scenes_tny", "No model named 'scenes_tny'. Did you mean 'scenes_tiny'?"),
        ("data=[scens]", "No data set named 'scens'. Did you mean 'scenes'?"),
        ("task=exct", "No task named 'exct'. Did you mean 'exact'?"),
        ("projector.dept=3", "No option of projector 'mlp' named 'dept'. Did you mean 'depth' (int, default 2)?"),
        ("run.nam=x", "No option of 'run' named 'nam'. Did you mean 'name' (str, default '')?"),
        ("stages.x.stps=3", "No option of stage 'x' named 'stps'. Did you mean 'steps' (int | None, default None)?"),
        ("batch_sze=3", "No option named 'batch_sze'. Did you mean 'batch_size'?"),
    ],
)
def test_overrides(override, message):
    with pytest.raises(ZooError) as error:
        compose("train", ["pruner=[random]", override] if not override.startswith("pruner") else [override])
    assert message in str(error.value)
    assert "+" not in str(error.value)


def test_python_calls():
    with pytest.raises(ZooError, match=r"No kind of component named 'prunr'. Did you mean 'pruner'"):
        names("prunr")
    with pytest.raises(ZooError, match=r"No pruner named 'rndom'. Did you mean 'random'"):
        build("pruner", {"name": "rndom"})
    with pytest.raises(ZooError, match=r"'keep_ration'. Did you mean 'keep_ratio'"):
        build("pruner", {"name": "random", "keep_ration": 0.5})
    with pytest.raises(
        ZooError, match=r"Option 'keep_ratio' of pruner 'random' takes float \(default 0.25\), got 'abc'"
    ):
        build("pruner", {"name": "random", "keep_ratio": "abc"})
