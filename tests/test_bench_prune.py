"""`zoo bench prune`: counts that agree with what runs, and words that follow from the numbers."""

import json

import pytest
import torch

from tests.fusion_builders import tiny_llm
from zoo.benches import prune
from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.flops import count_flops
from zoo.benches.measure import Clock, Turns, Value
from zoo.benches.peak import peak_bytes
from zoo.benches.prune import Options, words
from zoo.benches.prune_card import Summary, where_counts_differ, where_it_pays
from zoo.cli.bench import describe, main, parse
from zoo.registry import ZooError

TINY = [
    "model=tiny",
    "pruner=null,random,fastervlm,aim,fastv",
    "rounds=2",
    "text_tokens=6",
    "new_tokens=2",
    "threads=1",
]
TINY += ["device=cpu", "scored_tokens=40", "keep_ratio=0.25", "pruner.fastv.layer=3"]


def test_the_command_writes_a_card_for_each_pruner(tmp_path, capsys):
    files = {kind: tmp_path / f"card.{kind}" for kind in ("json", "markdown", "png")}
    assert main(["prune", *TINY, *(f"{k}={p}" for k, p in files.items())]) == 0
    printed, found = capsys.readouterr().out, json.loads(files["json"].read_text())
    cards, rows = found["cards"], {row["what"]: row for row in found["rows"]}
    assert list(cards) == ["null", "random", "fastervlm", "aim", "fastv"]
    assert cards["null"]["layers"] == [64] * 6 and cards["random"]["layers"] == [16] * 6
    assert cards["aim"]["stages"] == {"encoder": 64, "pruner": 16, "projector": 16}
    assert cards["aim"]["layers"] == [16, 16, 16, 16, 8, 0]
    assert cards["fastv"]["layers"] == [64] * 3 + [16] * 3
    for name, card in cards.items():
        exact = rows[f"{name}: closed form of the prefill's FLOPs against torch's counter"]
        assert exact["reached"] and exact["bound"] == 1.0
        assert rows[f"{name}: bytes of the cache beside those counted"]["value"]["median"] == 0
        assert card["peak_bytes"] > 0 and card["prefill_ms"]["median"] > 0 and card["decode_ms"]["median"] > 0
        assert card["task"] == "not measured: random weights"
    assert cards["aim"]["scoring_flops"] > 0 and cards["random"]["scoring_flops"] == 0
    assert cards["random"]["ideal"] == pytest.approx(cards["null"]["flops"] / cards["random"]["flops"])
    bounds = {what.partition(": ")[0]: row["bound"] for what, row in rows.items() if "ratio of FLOPs" in what}
    assert bounds == {"random": 0.85, "fastervlm": 0.85, "aim": 0.75, "fastv": 0.75}
    assert rows["fastervlm: scoring and choosing, share of the encoder's time"]["bound"] == 3.0
    assert {"4", "16", "64"} <= set(cards["aim"]["by_size"])
    assert len(found["words"]) == 4 and all(line in printed for line in found["words"])
    assert "| aim | 64 | 16 |" in files["markdown"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_a_saved_model_is_asked_its_task_and_counted_by_its_own_weights():
    options = Options(model="scenes_tiny", pruner="aim", only="prefill,task", limit=2, rounds=1, text_tokens=4)
    report = prune.run(options)
    assert list(report.cards) == ["null", "aim"]
    for card in report.cards.values():
        figures = [f.split(" ") for f in card.task.split(", ")]
        names = [" ".join(f[:-3]) for f in figures]
        assert all(f[-2] == "+-" for f in figures) and len(set(names)) == len(names) > 5
    # Its feed-forward layers have two matrices, where a gated one has three.
    exact = [row for row in report.rows if "torch's counter" in row.what]
    assert len(exact) == 2 and all(row.reached for row in exact)


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "phi3", "gpt2", "mixtral", "qwen2_moe"])
def test_closed_form_holds_for_any_feed_forward_layer(model_type):
    llm = tiny_llm(model_type)
    sizes = DecoderSizes.of(llm.lm.config, llm.layers[0])
    ids = torch.randint(8, 90, (1, 40))
    counted = count_flops(lambda: llm.lm(input_ids=ids, use_cache=False, logits_to_keep=1))
    assert counted == pytest.approx(matmul_flops(sizes, [40, 40], head_rows=1), rel=0.01)


def test_models_share_their_weights_and_differ_in_the_pruner():
    bench = prune._Bench(parse("prune", Options, words(TINY)), lambda line: None)
    own = [p.data_ptr() for p in bench.base.model.parameters()]
    assert all([p.data_ptr() for p in v.model.parameters()] == own for v in bench.variants.values())
    assert torch.equal(bench.base.features.tokens, bench.variants["fastervlm"].features.tokens)
    ids, embeds = bench.base.prompt(bench.base.features)
    plain = bench.base.model(input_ids=ids, encoded=(None, None, bench.base.model.projector(bench.base.features)))
    assert torch.allclose(bench.base.read(ids, embeds)[0], plain.logits[:, -1], atol=1e-5)


def test_words_follow_from_the_numbers():
    def card(decode=1.0, **by_size):
        values = {int(n[1:]): Value(m, m - 0.05, m + 0.05) for n, m in by_size.items()}
        return Summary({}, [], 0, 0, 0, by_size=values, decode_ratio=Value(decode, decode - 0.05, decode + 0.05))

    found = where_it_pays(
        {
            "null": card(),
            "a": card(n16=0.8, n64=1.0, n144=1.4),
            "b": card(n16=1.2, n64=2.0),
            "c": card(n16=1.3, n64=0.7),
            "d": card(n64=1.4, decode=1.3),
        }
    )
    assert found == [
        "a pays from 144 image tokens on (1.4x at 144). It is slower than no pruner at 16. "
        "It makes no difference at 64.",
        "b pays at every number of image tokens measured, 16 to 64 (2x at 64).",
        "c does not pay up to 64 image tokens (0.7x at 64). It is slower than no pruner at 64.",
        "d pays at the one number of image tokens measured (1.4x at 64). "
        "A decoded token takes 1.3x as long as without.",
    ]


def test_own_time_is_a_share_of_what_a_pruner_saves():
    seconds = {"null": [0.5, 0.9, 0.6], "divprune": [0.1, 0.4, 0.2], "divprune alone": [0.01, 0.02, 0.016]}
    times = Turns(Clock(torch.device("cpu"), 1), seconds)
    for name, taken in seconds.items():
        times[name].cpu, times[name].wall = taken, taken
    (row,) = prune.own_time("divprune", times)  # 16 ms of 0.4 s
    assert row.value.median == pytest.approx(4) and row.bound == 5 and row.reached and row.note == "16 of 400 ms"
    times["random"] = times["random alone"] = times["null"]
    assert not prune.own_time("random", times)  # it saved nothing


def test_costs_that_the_counter_does_not_confirm_are_warned_of():
    def card(counted):
        return Summary({}, [], flops=1000, scoring_flops=100, cache_bytes=0, counted_flops=counted)

    found = where_counts_differ({"null": card(1100), "a": card(1105), "b": card(800), "c": card(0), "d": card(None)})
    assert [line.split(": ")[1] for line in found] == ["b", "c"]
    assert "27.3 % apart" in found[0] and "100 % apart" in found[1]


def test_peak_is_what_was_held_at_once_and_asking_prints_nothing(capfd):
    def work():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        c = torch.empty(1 << 18)
        return b, c

    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(2 * 4 * (1 << 20), rel=0.01)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["pruner=null,fastvlm"], "'fastvlm'. Did you mean 'fastervlm'"),
        (["only=prefil"], "'prefil'. Did you mean 'prefill'"),
        (["rounds=0"], "rounds must be at least 1"),
        (["pruner.pol.stride=1"], "'pol'. Did you mean 'pool'"),
        (["keep_ration=1"], "'keep_ration'. Did you mean 'keep_ratio'"),
        (["dtype=fp32"], "dtype"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ZooError, match=message):
        parse("prune", Options, words(given))


def test_its_options_are_described():
    assert "pruner.aim.start=4" in describe("prune", Options)
