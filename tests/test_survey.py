"""`zoo data`: figures as a loop over encoded samples gives them, every broken record, what is there twice."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import sample
from tests.test_broken_records import BROKEN, GOOD, RaisingStream, png
from tests.test_broken_records import broken_file as broken_file
from zoo.cli.complete import complete
from zoo.cli.entry import main
from zoo.inspection.survey import Look, Tally, survey
from zoo.registry import IGNORE_INDEX, Dataset, ZooError
from zoo.runs.lengths import length_of
from zoo.runs.scored import chosen


class Talks(Dataset):
    """Samples of one or two dialogs, number 3 twice, and one that cannot be read."""

    def __len__(self):
        return 1200

    def get(self, index, epoch=0):
        if index == 700:
            raise KeyError("image")
        number = 3 if index == 900 else index
        dialogs = [("what? " * (1 + number % 7), "yes"), ("how many?", "two " * (1 + number % 5))][: 1 + number % 2]
        return sample(*dialogs, name=f"n{5 if index == 901 else index}", seed=number % 11)


def looked(dataset, processor, limit=None, workers=0, open_images=False, **options):
    whole = Tally()
    for part in survey("d", dataset, Look(processor, limit, open_images), workers=workers, **options):
        whole.add(part)
    return whole


@pytest.mark.parametrize("workers", [0, 2])
def test_figures_are_those_of_a_loop(make_model, workers):
    processor = make_model()[1]
    tally = looked(Talks(), processor, workers=workers)
    rows = [processor.encode(Talks().get(i)) for i in range(1200) if i != 700]
    assert tally.lengths == [length_of(row) for row in rows]
    assert tally.learnt == sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows)
    assert tally.turns == tally.dialogs == sum(1 + (3 if i == 900 else i) % 2 for i in range(1200) if i != 700)
    assert tally.image_tokens == 16 * len(rows) and tally.images == len(rows) and tally.records == 1200
    assert [line["where"] for line in tally.broken] == ["record 700"]
    assert ("record 5 (n5)", "record 901 (n5)") in tally.twice("ids") and len(tally.twice("ids")) == 1


def test_a_stream_is_looked_through_up_to_a_limit(make_model):
    processor = make_model()[1]
    alone, stream = looked(Talks(), processor, limit=30), looked(RaisingStream(Talks()), processor, limit=30)
    assert stream.lengths == alone.lengths and len(stream.broken) == len(alone.broken)
    assert alone.kinds()["length"] == sum(n > 30 for n in alone.lengths) > 0


def test_a_limit_draws_records_of_the_whole(make_model):
    processor, whole, head = make_model()[1], Tally(), Tally()
    for part in survey("d", Talks(), Look(processor, None, False), limit=600):
        whole.add(part)
    assert whole.places == [f"record {i} (n{5 if i == 901 else i})" for i in chosen("d", Talks(), 600) if i != 700]
    for part in survey("d", RaisingStream(Talks()), Look(processor, None, False), limit=20):
        head.add(part)
    assert head.places == [f"record {i} of the stream (n{i})" for i in range(20)]


@pytest.fixture
def words(broken_file):
    """The broken records of other tests, with one that says what another says, and one of an id that is taken."""
    more = [{"id": "other", "image": "a.png", **GOOD}, {"id": "g0", "image": "a.png", "question": "q", "answer": "a"}]
    with (broken_file / "d.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in more))
    data = ["data=[chat_json]", f"data.chat_json.file={broken_file / 'd.jsonl'}"]
    return ["data", *data, f"data.chat_json.images={broken_file / 'images'}", f"survey.json={broken_file / 'out.json'}"]


@pytest.mark.parametrize("images", ["exists", "open"])
def test_the_command_reports_every_kind(words, broken_file, images, capsys):
    assert main([*words, f"survey.images={images}"]) == 1
    out = capsys.readouterr().out
    report = json.loads((broken_file / "out.json").read_text())["chat_json"]
    lines = {int(line["where"].rpartition(":")[2]): line for line in report["broken"]["list"]}
    wanted = dict(enumerate([*(kind for _, kind in BROKEN.values()), "record"], 13))
    templates = {n for n, name in enumerate(BROKEN, 13) if name in ("system", "two users")}  # this model takes them
    unopened = {n for n, kind in wanted.items() if kind == "image"} if images == "exists" else set()
    assert {n: line["kind"] for n, line in lines.items()} == {
        n: kind for n, kind in wanted.items() if n not in templates | unopened
    }
    assert report["records"] == 31 and report["usable"] == 31 - len(lines)
    assert report["same_id"]["records"] == 1 and "(g0)" in report["same_id"]["first"][0][0]
    assert report["same_words_and_images"]["records"] >= 12  # eleven good ones say what the first says
    assert "missing image" in out and "beyond the LLM's positions" in out and "none.png" in out


def test_a_sound_file_has_nothing_to_report(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "1", "image": "a.png", **GOOD}) + "\n")
    assert main(["data", "data=[chat_json]", f"data.chat_json.file={tmp_path / 'd.jsonl'}", "workers=1"]) == 0
    assert "broken" not in capsys.readouterr().out


def test_tokens_of_images_that_are_cut_are_those_of_training(make_model):
    from tests.test_teacher_store import CUT, TILES
    from zoo.vision.images.processors import Pictures

    processor = make_model(layout=TILES)[1]
    processor.pictures = Pictures(CUT)

    class Sizes(Dataset):
        def __len__(self):
            return 4

        def get(self, index, epoch=0):
            one = sample(("what?", "yes"), name=str(index))
            one.images[0] = np.zeros((16 * (1 + index), 32, 3), dtype=np.uint8)
            return one

    tally = looked(Sizes(), processor)
    assert tally.lengths == [len(processor.encode(Sizes().get(i))) for i in range(4)] and len(set(tally.lengths)) > 1


def test_a_video_does_not_make_an_image_one_of_several():
    from zoo.vision.images.video import Video

    look = Look(None, None, open_images=False)
    look._picture = lambda source, several: several
    shown = sample(("what?", "yes"))
    for images, several in (([*shown.images, Video("a.mp4")], False), (shown.images * 2, True)):
        shown.images = images
        assert look._pictures(shown) == [several] * 2


def test_it_is_completed_and_its_options_are_checked():
    assert "survey.json=" in complete("zoo data survey.", {"data": True})
    assert "data" in complete("zoo da", {"data": True, "train": True})
    with pytest.raises(ZooError, match=r"check of images \(survey.images\) named 'opne'. Did you mean 'open'"):
        from zoo.settings.schema import SurveyConfig

        SurveyConfig(images="opne")


def png_of(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def of_array(pixels):
    return pixels


def of_torch(pixels):
    return torch.from_numpy(pixels)


def of_function(pixels):
    return lambda: pixels


@pytest.mark.parametrize("made", [of_array, of_torch, Image.fromarray, png_of, of_function])
def test_unlike_pictures_are_unlike_whatever_holds_them(make_model, made):
    class Pictures(Dataset):
        def __len__(self):
            return 40

        def get(self, index, epoch=0):
            pixels = np.zeros((40, 40, 3), np.uint8)
            pixels[20, 20] = 3 if index == 9 else index  # corners and size are alike, and so may be addresses
            return replace(sample(("what?", "yes"), name=f"n{index}"), images=[made(pixels)])

    twice = looked(Pictures(), make_model()[1]).twice("contents")
    assert twice == ([] if made is of_function else [("record 3 (n3)", "record 9 (n9)")])
