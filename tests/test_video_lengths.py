"""Placeholders that a pruner of videos leaves out: what counts against the LLM's positions, and in a packed row."""

import pytest
import torch

from tests.conftest import QUESTIONS, sample
from tests.test_video_pruners import NAMES, PRUNERS
from tests.video_builders import LAYOUTS, film, inputs_of, rows_of, video_model
from zoo.checking.checker import check
from zoo.checking.plan import plan_for
from zoo.registry import Cut, ZooError
from zoo.runs.lengths import length_of, require_room, room_for_answer, shorten
from zoo.settings.config import compose
from zoo.settings.source import source_of
from zoo.text.batch import pack
from zoo.text.processor import ZooProcessor

EVS = {"name": "evs", "keep_ratio": 0.25}


def columns(model, processor, row):
    with torch.no_grad():
        return int(model(**inputs_of(processor.collate([row]))).sequence.attention_mask.sum())


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_prompt_is_as_long_as_what_the_model_runs(make_model, name, layout):
    model, processor = video_model(make_model, PRUNERS[name], layout, "dense")
    for row in rows_of(processor):
        ran = columns(model, processor, row)
        assert length_of(row) == len(row) - row.fewer >= ran
        assert length_of(row) == ran or name == "fastvid floor"
        assert row.fewer > 0 or row.pixel_values[0].cut.kind == "image"


def test_kept_positions_reach_as_far_as_all_placeholders(make_model):
    model, processor = video_model(make_model, EVS)
    row = rows_of(processor)[2]
    assert row.fewer == 128 - 32 and row.gap == 0 and length_of(row) == len(row)
    with torch.no_grad():
        out = model(**inputs_of(processor.collate([row])))
    assert int(out.sequence.position_ids.max()) == len(row) - 1 and out.logits.shape[1] == len(row) - row.fewer


def test_a_long_video_is_refused_only_where_it_does_not_fit(make_model):
    _, dense = video_model(make_model, EVS, positions="dense")
    _, kept = video_model(make_model, EVS)
    long = {p: rows_of(p, (40,), "encode_prompt")[0] for p in (dense, kept)}  # 640 placeholders, 160 tokens
    for row in long.values():
        assert len(row) > 640 and row.fewer == 480
    limit = len(long[dense]) - 480 + 10
    assert require_room(long[dense], limit) is long[dense] and room_for_answer(long[dense], limit) == 10
    for refused in (require_room, room_for_answer):
        with pytest.raises(ZooError, match=r"leaves out 480 of them: with positions=dense they take \d+ positions"):
            refused(long[kept], limit)
        with pytest.raises(ZooError) as message:
            refused(long[dense], 100)
        assert "positions=dense" not in str(message.value)


def test_text_is_cut_where_it_is_too_long_and_not_where_placeholders_are(make_model):
    _, processor = video_model(make_model, EVS, positions="dense")
    row = rows_of(processor, (8,))[0]
    assert shorten(row, len(row) - row.fewer, (processor.image_token_id,)) is row
    answer = int((row.labels != -100).sum())
    cut = shorten(row, len(row) - row.fewer - answer + 1, (processor.image_token_id,))
    assert len(row) - len(cut) == answer - 1


@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_rows_are_packed_by_what_is_left_of_them(make_model, positions):
    _, processor = video_model(make_model, EVS, positions=positions)
    rows = rows_of(processor, (8, 8, 8))
    left = [len(row) - row.fewer for row in rows]
    assert len(pack(rows, sum(left))) == 1 and len(pack(rows, sum(left) - 1)) == 2 and len(pack(rows, 40)) == 3


def test_a_saved_processor_counts_as_before(make_model, tmp_path):
    _, processor = video_model(make_model, PRUNERS["fastvid"], "bilinear", "dense")
    processor.save_pretrained(tmp_path)
    again = ZooProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict() and again.left_out["dense"]
    one, other = (rows_of(p)[0] for p in (processor, again))
    assert (one.gap, one.fewer) == (other.gap, other.fewer) and one.fewer > 0


def test_without_such_a_pruner_nothing_is_saved(make_model):
    for node in (None, {"name": "random", "keep_ratio": 0.5}):
        _, processor = video_model(make_model, node)
        assert processor.left_out is None and "left_out" not in processor.to_dict()
        assert rows_of(processor)[0].fewer == 0


@pytest.fixture
def third():
    """A pruner from outside that keeps a third of an image's tokens, behind the projector."""
    from dataclasses import dataclass

    from torch import nn

    from zoo.registry import ImageFeatures, Pruner, register

    @dataclass
    class NoOptions:
        pass

    @register("pruner", "third")
    class Third(Pruner, nn.Module):
        behind = ragged = True

        def __init__(self, config: NoOptions, *, num_tokens: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(num_tokens))

        def num_tokens(self, n: int) -> int:
            return n

        def tokens_of_image(self, n: int, cut: Cut) -> int:
            return cut.rows * n // 3

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            stays = torch.arange(image.tokens.shape[1]) < image.tokens.shape[1] // 3
            return image.stay(stays.expand(image.tokens.shape[:2]), image.tokens * self.weight[:, None])


def test_images_without_a_layout_count_too(make_model, third):
    llm = {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
    node = {"third": {"name": "third"}}
    model, processor = make_model(pruner=node, positions="dense", llm={**llm, "max_positions": 256})
    row = processor.encode(sample((QUESTIONS[0], "yes"), images=2))
    assert row.fewer == 2 * (16 - 5) == -row.gap and length_of(row) == columns(model, processor, row)


def test_the_check_asks_for_as_many_positions_as_are_left(third):
    words = ["model=scenes_tiny", "pruner=[third]", "llm.max_positions=100"]
    # Images of 64 tokens, 21 of them left, and 64 of text; the pruner has weights: all are random here.
    with pytest.raises(ZooError, match=r"has 100 positions; one image of 64 tokens and 64 of text need 128"):
        check(plan_for(source_of(compose("load", words), pretrained=False)))
    check(plan_for(source_of(compose("load", [*words, "positions=dense"]), pretrained=False)))


def test_films_of_these_tests():
    assert film(40).pixels.shape == (40, 3, 32, 32)
