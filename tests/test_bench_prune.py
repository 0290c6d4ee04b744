"""`zoo bench prune`: counts that agree with what runs, and words that follow from the numbers."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.fusion_builders import tiny_llm
from zoo.benches import prune
from zoo.benches.abilities import Ability, drawn, mean_of
from zoo.benches.costs import DecoderSizes, matmul_flops
from zoo.benches.flops import count_flops
from zoo.benches.measure import Clock, Times, Turns, Value
from zoo.benches.peak import peak_bytes
from zoo.benches.prune import Options, words
from zoo.benches.prune_card import Point, Summary
from zoo.benches.prune_words import where_counts_differ, where_it_pays, who_wins
from zoo.benches.tables import Table
from zoo.cli.bench import describe, main, parse
from zoo.registry import Dataset, Sample, Score, ZooError

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
    assert list(cards)[:4] == ["null", "random", "pool", "downsample"] and list(cards)[-3:] == [
        "fastervlm",
        "aim",
        "fastv",
    ]
    assert cards["null"]["layers"] == [64] * 6 and cards["random"]["layers"] == cards["pool"]["layers"] == [16] * 6
    assert cards["aim"]["stages"] == {"encoder": 64, "pruner": 16, "projector": 16}
    assert cards["aim"]["layers"] == [16, 16, 16, 16, 8, 0] and cards["aim"]["tokens"] == 12
    assert cards["fastv"]["layers"] == [64] * 3 + [16] * 3 and cards["fastv"]["options"]["layer"] == 3
    for name, card in cards.items():
        for what in ("prefill", "encoder"):
            exact = rows[f"{name}: closed form of the {what}'s FLOPs against torch's counter"]
            assert exact["reached"] and exact["bound"] == 1.0
        assert rows[f"{name}: bytes of the cache beside those counted"]["value"]["median"] == 0
        assert card["peak_bytes"] > 0 and card["decode_ms"]["median"] > 0
        assert card["prefill"]["1"]["ms"]["median"] > 0
        assert card["points"] == [] and card["alike"] is None  # random weights answer nothing
    assert cards["aim"]["scoring_flops"] > 0 and cards["random"]["scoring_flops"] == 0
    assert cards["fastervlm"]["encoder_counted"] > cards["random"]["encoder_counted"]  # the row of scores
    assert cards["random"]["ideal"] == pytest.approx(cards["null"]["flops"] / cards["random"]["flops"])
    speed = ("share", "time", "scoring")  # is judged on decoders of 100 M, not on toys
    assert all(row["bound"] is None for what, row in rows.items() if any(word in what for word in speed))
    assert {"4", "16", "64"} <= set(cards["aim"]["by_size"])
    assert "product of 640 tokens by 32 x 64 and back, 1 thread" in rows
    flat = " ".join(printed.split())
    assert len(found["words"]) == sum(bool(card["by_size"]) for card in cards.values()) == 5 and all(
        " ".join(line.split()) in flat for line in found["words"]
    )
    assert max(map(len, printed.splitlines())) <= 100 and "0 MISSED" in printed
    assert "0 of these pruners are judged" in flat
    assert "| aim | 64 | 16 | 12 | 0 |" in files["markdown"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    again = [*TINY, "only=prefill", "pruner=null,fastervlm,divprune", f"against={files['json']}"]
    assert main(["prune", *again]) == 0
    printed = capsys.readouterr().out
    assert f"against the card of {found['date']}: zoo bench prune" in printed
    assert "divprune" in printed and "new" in printed and printed.count("not measured") == 2  # aim and fastv


def test_two_threads_are_compared_with_one():
    report = prune.run(Options("tiny", pruner="null", only="prefill", threads="1,2", rounds=1, text_tokens=4, limit=0))
    for name in ("random", "pool", "downsample"):
        assert list(report.cards[name].prefill) == [1, 2]
    assert sum("share of that ratio of FLOPs, 2 threads" in row.what for row in report.rows) == 3


def test_a_trained_model_is_scored_ability_by_ability_and_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.evaluation.evaluate.TRAIN_SAMPLES", 100)  # the commonest answers of so many are found, too
    given = {"keep": "0.25", "limit": 1, "seeds": 2, "rounds": 1, "text_tokens": 4, "questions": 4, "together": 4}
    options = Options("scenes_tiny", pruner="fastervlm", only="prefill,abilities,batches", threads="1", **given)
    report = prune.run(options)
    cards = report.cards
    assert [p.share for p in cards["null"].points] == [None] and cards["null"].points[0].tokens == 64
    assert [(p.share, p.tokens) for p in cards["random"].points] == [(0.25, 16)]
    assert [(p.share, p.tokens) for p in cards["pool"].points] == [(0.25, 16)]  # 4 x 4
    assert cards["fastervlm"].options["score"] == "column_mean"  # this encoder has no [CLS]
    for of, least in (("majority", 0), ("blind", 0)):
        assert all(least <= a.mean <= 100 for a in cards["null"].points[0].baselines[of].values())
    assert cards["null"].points[0].baselines["blind"]["exist"].mean < cards["null"].points[0].abilities["exist"].mean
    assert not cards["random"].points[0].baselines
    answers = next(table for table in report.tables() if table.title.startswith("answers"))
    assert [row[0] for row in answers.rows][:3] == ["null", "majority", "blind"]
    for card in cards.values():
        assert card.alike == 100
        for point in card.points:
            assert len(point.abilities) > 4 and all(0 <= a.mean <= 100 for a in point.abilities.values())
            assert len(point.abilities["exist"].draws) == 2 and point.abilities["exist"].stderr > 0
    # Its feed-forward layers have two matrices, where a gated one has three.
    exact = [row for row in report.rows if "prefill's FLOPs" in row.what]
    assert len(exact) == len(cards) and all(row.reached for row in exact)
    report.write_png(tmp_path / "card.png")
    report.write_json(tmp_path / "card.json")
    later = prune.run(
        Options("scenes_tiny", only="abilities", against=str(tmp_path / "card.json"), **given, pruner="null")
    )
    (answers,) = [table for table in later.tables() if table.title.startswith("answers against")]
    assert answers.rows[0][:3] == ["null", "", "+0.0"] and "exist" in answers.head


def test_what_does_not_go_with_a_model_is_left_out_with_the_reason():
    report = prune.run(Options("tiny", pruner="pool", only="memory", set={"pool": {"target": [90, 90]}}, text_tokens=4))
    assert report.left_out == {"pool": "pruner 'pool': target [90, 90] is larger than the grid [8, 8]."}
    assert "pool" not in report.cards and "pool is left out: pruner 'pool': target" in report.markdown()


def test_a_preset_is_measured_as_its_options():
    words_given = words([*TINY, "pruner.fastervlm.preset=llava15_29"])
    options = parse("prune", Options, [*words_given, "pruner=fastervlm", "only=memory"])
    assert prune.run(options).cards["fastervlm"].layers == [29] * 6


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "phi3", "gpt2", "mixtral", "qwen2_moe", "ernie4_5_moe"])
def test_closed_form_holds_for_any_feed_forward_layer(model_type):
    experts = {"num_experts": 4, "top_k": 2} if model_type == "ernie4_5_moe" else {}  # behind a first layer without
    llm = tiny_llm(model_type, **experts)
    sizes = DecoderSizes.of(llm.lm.config, llm.layers)
    ids = torch.randint(8, 90, (1, 40))
    counted = count_flops(lambda: llm.lm(input_ids=ids, use_cache=False, logits_to_keep=1))
    assert counted == pytest.approx(matmul_flops(sizes, [40, 40], head_rows=1), rel=0.01)


def test_models_share_their_weights_and_differ_in_the_pruner():
    bench = prune._Bench(parse("prune", Options, words(TINY)), lambda line: None)
    own = [p.data_ptr() for p in bench.base.model.parameters()]
    assert all([p.data_ptr() for p in v.model.parameters()] == own for v in bench.variants.values())
    assert torch.equal(bench.base.features.tokens, bench.variants["fastervlm"].features.tokens)
    ids = bench.base.ids(bench.base.shown())
    plain = bench.base.model(input_ids=ids, pixel_values=bench.base.pixels)
    assert torch.allclose(bench.base.after().logits[:, -1], plain.logits[:, -1], atol=1e-5)


def test_draws_are_of_different_samples_and_errors_are_never_none():
    several = [drawn("a", _Numbers(), 3 * d, 3) for d in range(3)]
    ids = [some.get(i).id for some in several for i in range(len(some))]
    assert len(set(ids)) == len(ids) == 9, "no sample is in two draws"
    with pytest.raises(ZooError, match="has 10 samples, 12 are needed for 4 draws"):
        drawn("a", _Numbers(), 9, 3)
    ability = Ability.of([Score(1.0, 20, 0.0), Score(1.0, 20, 0.0)])
    assert ability.mean == 100 and 2 < ability.stderr < 5
    apart = Ability.of([Score(0.2, 1000, 0.01), Score(0.8, 1000, 0.01)])
    assert apart.stderr == pytest.approx(30)  # the draws differ by more than their answers explain
    assert mean_of({"a": ability, "b": apart}).mean == pytest.approx(75)


class _Numbers(Dataset):
    def __len__(self):
        return 10

    def get(self, index, epoch=0):
        return Sample(str(index), [], [])


def test_words_say_who_wins_and_who_loses_to_a_control():
    def card(**abilities):
        scored = {kind: Ability(mean, 1.0, [mean]) for kind, mean in abilities.items()}
        return Summary({}, [4], 0, 0, 0, points=[Point(0.25, 4, 1, scored)])

    cards = {"null": card(a=99), "random": card(a=50, b=80), "x": card(a=70, b=60), "y": card(a=69, b=81)}
    assert who_wins(cards, ("random",)) == [
        "keep 0.25, a: best are x 70.0, y 69.0.",
        "keep 0.25, b: best are y 81.0, random 80.0.",
        "keep 0.25: x loses to random in b (60.0, 80.0).",
    ]


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
    (row,) = prune.own_time("divprune", times, "", "1 thread")  # 16 ms of 0.4 s
    assert row.value.median == pytest.approx(4) and row.bound == 5 and row.reached
    assert row.note == "16 ms to choose and 0 in the encoder, of 400 ms saved"
    for name, taken in (("scores", [0.30, 0.31, 0.32]), ("encoder", [0.29, 0.29, 0.30])):
        times[name] = Times(taken, taken)
    (row,) = prune.own_time("divprune", times, "scores", "1 thread")
    assert row.value.median == pytest.approx(100 * 0.036 / 0.4) and not row.reached
    times["random"] = times["random alone"] = times["null"]
    assert not prune.own_time("random", times, "", "1 thread")  # it saved nothing


@pytest.mark.parametrize(
    ("weights", "patches", "inside", "tokens", "judged"),
    [
        (98e6, 576, False, 64, True),
        (98e6, 576, True, 270, True),  # a schedule
        (98e6, 576, False, 144, False),  # a quarter is left
        (98e6, 64, False, 7, False),
        (1e6, 576, False, 64, False),
    ],
)
def test_speed_is_judged_where_its_bounds_are_meant(weights, patches, inside, tokens, judged):
    bench = object.__new__(prune._Bench)
    bench.weights, bench.base = weights, SimpleNamespace(patches=patches)
    bench.variants = {"x": SimpleNamespace(inside=inside)}
    bench.cards = {"x": Summary({}, [tokens], 0, 0, 0)}
    assert bench._judged("x") is judged


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
        (["threads=0"], "threads must be at least 1"),
        (["threads=two"], "threads is numbers"),
        (["keep=0.5,2"], "keep must be shares"),
        (["positions=denso"], "'denso'. Did you mean 'dense'"),
        (["keep_ration=1"], "'keep_ration'. Did you mean 'keep_ratio'"),
        (["dtype=fp32"], "dtype"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ZooError, match=message):
        parse("prune", Options, words(given))


def test_tables_fit_a_screen(tmp_path):
    table = Table("wide", ["name", *(f"a long head {i}" for i in range(30))])
    table.add("row", *["12345.6 ± 7.8"] * 30)
    assert max(map(len, table.lines())) <= 100 and sum(line.startswith("row") for line in table.lines()) > 3
    (tmp_path / "other.json").write_text('{"cards": 3}')
    for path, why in ((tmp_path / "none.json", "No such file"), (tmp_path / "other.json", "is not a card")):
        with pytest.raises(ZooError, match=why):
            prune.run(Options("tiny", against=str(path)))


def test_its_options_are_described():
    assert "pruner.aim.start=4" in describe("prune", Options)
