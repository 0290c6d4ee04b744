"""`zoo inspect`: the views, the picture and the page, which a browser opens where there is one."""

import json
import math
import re
from dataclasses import replace
from math import isqrt

import numpy as np
import pytest
from PIL import Image

from tests import published_builders
from tests.browser import Browser
from tests.conftest import picture
from tests.data_places import shared
from zoo import registry
from zoo.inspection.views import NONE, View
from zoo.inspection.xray import inspect, main
from zoo.inspection.xray_page import data_of, page
from zoo.inspection.xray_picture import paint, write_picture
from zoo.registry import ZooError

TINY = ["vision=timm", "vision.image_size=32", "vision.patch_size=8", "vision.width=32", "vision.heads=2"]
TINY += ["vision.depth=2", "vision.layer=-1", "projector=mlp", "llm=hf", "llm.hidden_size=32", "llm.num_layers=6"]
TINY += ["llm.num_heads=2", "llm.intermediate_size=64", "tokenizer.vocab_size=300"]
QUESTION = "is </script> <b>red</b>?"


@pytest.fixture(scope="module")
def xray():
    """A tiny model with random weights under every registered pruner."""
    fitting = ["pruner.cdpruner.relevance=embeddings", "pruner.prumerge.score=column_mean"]
    return inspect("", [*TINY, *fitting], picture(3), question=QUESTION)


def view_of(xray, name):
    return next(v for v in xray.views if v.name == name)


def test_every_registered_pruner_is_shown(xray):
    assert [v.name for v in xray.views] == [NONE, *registry.names("pruner")] and not xray.refused
    for view in xray.views:
        assert view.grid == ((2, 2) if view.name == "downsample" else (4, 4))
        assert len(view.layers) == len(view.tokens) == 6
        for patches, tokens in zip(view.layers, view.tokens, strict=True):
            assert len(patches) == math.prod(view.grid)
            shown = set(patches) - {-1}
            # A summary of the picture, [CLS] say, is a token that holds no patch.
            assert tokens - 1 <= len(shown) <= tokens and all(t < view.tokens[0] for t in shown)
    plain = view_of(xray, NONE)
    assert plain.layers == [list(range(16))] * 6 and not plain.merged and plain.moments == [0]
    assert xray.image.size == (576, 576)  # the picture of a small encoder, large enough to look at


def test_views_say_what_their_kind_does(xray):
    ranked, merged, inside = (view_of(xray, n) for n in ("fastervlm", "pool", "fastv"))
    kept = [i for i, t in enumerate(ranked.layers[0]) if t >= 0]
    assert kept == sorted(sorted(range(16), key=lambda i: -ranked.scores[i])[:4]) and ranked.moments == [0]
    assert [ranked.layers[0][i] for i in kept] == [0, 1, 2, 3]
    assert merged.merged and merged.layers[0][:8] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert inside.moments == [0, 2] and inside.tokens == [16, 16, 8, 8, 8, 8]
    (row,) = inside.layer_scores.values()
    gone = {i for i, t in enumerate(inside.layers[2]) if t < 0}
    assert gone == set(sorted(range(16), key=lambda i: row[i])[:8]) and list(inside.layer_scores) == [1]
    flow = view_of(xray, "aim")
    assert flow.tokens == sorted(flow.tokens, reverse=True) and flow.tokens[-1] == 0
    assert set(flow.layers[-1]) == {-1} and len(flow.moments) > 1


def test_a_chain_and_its_options_and_one_that_keeps_all():
    chain = ["pruner.pool.stride=2", "pruner.fastervlm.num_keep=1", "pruner.random.keep_ratio=1.0"]
    xray = inspect("", TINY + chain, picture(3), ["pool+fastervlm", "random"], "red?")
    both, whole = xray.views[1:]
    assert both.tokens[0] == 1 and sum(t >= 0 for t in both.layers[0]) == 4 and both.merged
    assert both.options == {"pool.stride": "2", "fastervlm.num_keep": "1"} and whole.options
    assert sum(s == max(both.scores) for s in both.scores) == 4  # a pooled score is that of all its patches
    assert whole.layers == xray.views[0].layers and whole.answer == xray.views[0].answer


def test_one_that_does_not_fit_is_told_unless_it_was_asked_for(monkeypatch):
    names = registry.names
    some = ["fastervlm", "fastv", "random"]  # all of them are shown above
    monkeypatch.setattr(registry, "names", lambda kind: some if kind == "pruner" else names(kind))
    blind = [*TINY, "vision.cls_token=false"]
    xray = inspect("", blind, picture(3), question="red?")
    assert "needs cls_attention" in xray.refused["fastervlm"] and "random" in [v.name for v in xray.views]
    assert "fastervlm does not fit" in page(xray)
    with pytest.raises(ZooError, match="needs cls_attention"):
        inspect("", blind, picture(3), ["fastervlm"], "red?")
    with pytest.raises(ZooError, match=r"No pruner named 'fastvlm'. Did you mean 'fastervlm'"):
        inspect("", TINY, picture(3), ["fastvlm"])


def test_dropped_patches_are_dark_and_merged_ones_share_a_colour():
    image = Image.new("RGB", (40, 40), (200, 200, 200))
    view = View("x", (2, 2), [[0, -1, 1, 1]], [2], "")
    painted = paint(image, view, 0)
    corners = [painted[12, 12], painted[12, 32], painted[32, 12], painted[32, 32]]
    assert np.allclose(corners[0], 200 / 255) and (corners[1] < 0.25).all()
    assert np.allclose(corners[2], corners[3]) and np.ptp(corners[2]) > 0.2


def test_the_picture_has_a_column_for_each_view(xray, tmp_path):
    write_picture(xray, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.width > 300 * len(xray.views) and drawn.height > 700


def held(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_needs_nothing_else_and_holds_the_views(xray):
    text = page(xray)
    assert not re.search(r"https?:|//[a-z]|<link|@import|src=|url\(", text) and "default-src 'none'" in text
    assert text.count("</script>") == 2 and "<b>red</b>" not in text  # what a question holds ends nothing
    found = held(text)
    assert found == json.loads(json.dumps(data_of(xray))) and found["picture"].startswith("data:image/jpeg;base64,")
    for view, shown in zip(xray.views, found["views"], strict=True):
        assert (shown["name"], shown["layers"], shown["tokens"]) == (view.name, view.layers, view.tokens)


FIGURES = "[...document.querySelectorAll('figure')]"
MOVE = "slider.value = %d; slider.dispatchEvent(new Event('input'));"
STATE = f"JSON.stringify({FIGURES}.map(f => [f.dataset.name, ...['layer', 'kept', 'tokens'].map(k => +f.dataset[k])]))"
# The brightness of the middle of patch 5 (row 1, column 1 of 4 x 4) of each view.
LIGHT = f"""JSON.stringify({FIGURES}.map(f => {{
  const canvas = f.querySelector('canvas'), pen = canvas.getContext('2d');
  const {{data}} = pen.getImageData(canvas.width * 3 / 8, canvas.height * 3 / 8, 1, 1);
  return data[0] + data[1] + data[2];
}}))"""
HOVER = f"""(name => {{
  const canvas = {FIGURES}.find(f => f.dataset.name === name).querySelector('canvas');
  const box = canvas.getBoundingClientRect();
  const at = {{clientX: box.left + box.width * 3 / 8, clientY: box.top + box.height * 3 / 8}};
  canvas.dispatchEvent(new PointerEvent('pointermove', at));
  return document.getElementById('tip').textContent;
}})"""


def test_a_browser_shows_what_the_views_say_as_the_slider_moves(xray, tmp_path):
    (tmp_path / "page.html").write_text(page(replace(xray, image=Image.new("RGB", (560, 560), "white"))))
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(tmp_path / "page.html")
        assert browser.value("bar.hidden") is False and browser.value("slider.max") == "5"
        for layer in (0, 2, 5, 1):
            shown = json.loads(browser.value(MOVE % layer + STATE))
            assert shown == [[v.name, layer, sum(t >= 0 for t in v.layers[layer]), v.tokens[layer]] for v in xray.views]
            for view, light in zip(xray.views, json.loads(browser.value(LIGHT)), strict=True):
                side = isqrt(len(view.layers[layer]))  # a smaller picture has fewer patches
                at = int(side * 3 / 8) * (side + 1)
                assert (light < 200) == (view.layers[layer][at] < 0), view.name
        tips = {v.name: browser.value(f"{HOVER}({v.name!r})").split("\n") for v in xray.views}
        ranked, inside = view_of(xray, "fastervlm"), view_of(xray, "fastv")
        assert tips[NONE] == ["row 1, column 1", "token 5"]
        assert tips["fastervlm"][2].startswith("score ")
        assert float(tips["fastervlm"][2].split()[1]) == pytest.approx(ranked.scores[5], rel=1e-2)
        assert float(tips["fastv"][2].partition(": ")[2]) == pytest.approx(inside.layer_scores[1][5], rel=1e-2)
        assert tips["pool"][1] == "token 0, of 4 patches"
        assert browser.value("document.querySelector('h1').textContent") == QUESTION
    finally:
        browser.close()


def test_the_command_looks_at_a_photograph(tmp_path, capsys):
    import tarfile

    with tarfile.open(shared("coco_cc") / "images.tar") as tar:
        tar.extract("000000000030.jpg", tmp_path, filter="data")
    words = ["scenes_tiny", "--image", str(tmp_path / "000000000030.jpg"), "--pruner=pool,aim", f"--out={tmp_path}/x"]
    assert main([*words, "--question", "how many circles are there?", "pruner.aim.merge_ratio=0.5"]) == 0
    said = capsys.readouterr().out
    assert "none: 64 of 64 patches in 64 tokens" in said and "pool: 64 of 64 patches in 16 tokens" in said
    assert re.search(r"aim: 64 of 64 patches in 32 tokens(, \d+ from layer \d)+; ", said)
    views = held((tmp_path / "x" / "xray.html").read_text())["views"]
    assert views[2]["options"] == {"aim.merge_ratio": "0.5"} and views[0]["answer"]
    assert (tmp_path / "x" / "xray.png").stat().st_size > 10_000


def test_words_of_the_command():
    for words, message in [
        (["m", "--imag=a"], "zoo inspect has no flag '--imag=a'. Did you mean '--image'"),
        (["m", "--image"], "--image needs a value"),
        (["m"], "it needs --image"),
        (["--image=/no/such.jpg", *TINY, "--pruner=random"], "There is no file '/no/such.jpg'"),
    ]:
        with pytest.raises(ZooError, match=message):
            main(words)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.inspection.xray.inspect", lambda *given: None)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").write_text("")
    with pytest.raises(ZooError, match=r"Cannot write the picture to '.*file/x'.*Choose another place with --out"):
        main(["m", f"--image={tmp_path}/a.png", f"--out={tmp_path}/file/x"])


def test_a_model_without_image_tokens_is_refused():
    with pytest.raises(ZooError, match="this model has none in the LLM"):
        inspect("", [w.replace("projector=mlp", "projector=null") for w in TINY] + ["adapter=[vlora]"], picture(3))


def test_a_published_model_shows_the_overview_of_its_crops(tmp_path):
    reference, _ = published_builders.llava_next(tmp_path)
    side = reference.config.vision_config.image_size // reference.config.vision_config.patch_size
    xray = inspect(f"dir:{tmp_path}", [], published_builders.photo(40, 90), ["fastervlm", "fastv"], "red?")
    plain, ranked, inside = xray.views
    assert plain.grid == (side, side) and plain.layers[0] == list(range(side**2)) and plain.tokens[0] > side**2
    assert sum(t >= 0 for t in ranked.layers[0]) == round(side**2 / 4) < ranked.tokens[0]
    assert len(inside.moments) == (1 if len(inside.tokens) <= 2 else 2) and not inside.mixed
    assert xray.image.size[0] == xray.image.size[1] >= 560


def test_of_tiles_the_overview_is_the_last():
    photo = published_builders.photo(40, 90)
    xray = inspect("", [*TINY, "layout=tiles", "layout.most=7"], photo, ["random", "fastv"], "red?")
    plain, ranked, inside = xray.views
    small = np.asarray(xray.image.resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(photo.resize((32, 32))) - small).mean() < 8
    rows = plain.tokens[0] // 16
    assert rows > 2 and ranked.tokens[0] == rows * sum(t >= 0 for t in ranked.layers[0])
    assert len(inside.moments) == 2 and 0 < sum(t >= 0 for t in inside.layers[-1]) < 16


def test_options_of_pruners_reach_them_or_are_refused():
    words = ["pruner.keep_ratio=0.25"]
    assert inspect("", TINY + words, picture(3), ["random"], "red?").views[1].tokens[0] == 4
    for word in ("pruner.keep_ratoi=0.5", "pruner.pool.stride=2"):
        with pytest.raises(ZooError, match="is of none of these pruners: random"):
            inspect("", [*TINY, word], picture(3), ["random"], "red?")
