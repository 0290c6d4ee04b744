"""Every published family alike: pixels, ids, logits and answers are those of transformers' classes; saved, exported."""

import json

import pytest
import torch

import zoo
from tests import published_builders as build
from tests.published_builders import ASK, CASES, said
from zoo.registry import ZooError

FAMILIES = (
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "smolvlm",
    "video_llava",
)
# Images of unlike shapes, so that they are cut into unlike numbers of crops.
SIZES = [(40, 90), (70, 60), (30, 30), (1, 200)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, folder, transformers' model and processor, ours."""
    folder = tmp_path_factory.mktemp("published") / request.param
    reference, processor = getattr(build, request.param)(folder)
    return request.param, folder, reference, processor, *zoo.load(f"dir:{folder}")


def made(processor, case, side="left"):
    """Texts and nested images of a case, and what the family's own processor makes of them."""
    texts = [processor.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES[case]]
    images, at = [], 0
    for n, _ in CASES[case]:
        images.append([build.photo(*SIZES[(at + i) % len(SIZES)], seed=at + i) for i in range(n)])
        at += n
    processor.tokenizer.padding_side = side
    given = nested(processor, images)
    return texts, images, processor(images=given or None, text=texts, padding=True, return_tensors="pt")


def pixels_in(batch):
    """Pixels of images, which Video-LLaVA's processor calls by another name."""
    return batch["pixel_values_images" if "pixel_values_images" in batch else "pixel_values"]


def nested(processor, images):
    """Images as the family's processor wants them: of every text, or of those that have some."""
    every = type(processor).__name__ in ("Idefics3Processor", "SmolVLMProcessor")
    return images if every and any(images) else [some for some in images if some]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "zoo_eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal(family, case, attention):
    _, _, reference, processor, ours, mine = family
    reference.set_attn_implementation(attention.removeprefix("zoo_"))  # ours is eager with fewer copies
    ours.set_attention(attention)
    side = "right" if attention == "eager" else "left"
    texts, images, batch = made(processor, case, side)
    mine.tokenizer.padding_side = side
    got = mine(images=images, text=texts)
    assert torch.equal(got["input_ids"], batch["input_ids"])
    assert torch.equal(got["attention_mask"], batch["attention_mask"])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(**batch, position_ids=positions).logits
        logits = ours(**got).logits
    reference.set_attn_implementation("sdpa")
    ours.set_attention("sdpa")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", ["llava"], indirect=True)  # all but video_llava take it; compiling takes minutes
def test_logits_are_equal_with_flex_attention(family):
    test_logits_are_equal(family, "one image", "flex_attention")


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_is_equal(family, case):
    _, _, reference, processor, ours, mine = family
    texts, images, batch = made(processor, case)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = reference.generate(**batch, **options)
    mine.tokenizer.padding_side = "left"
    assert torch.equal(ours.generate(**mine(images=images, text=texts), **options), expected)


def test_pixels_and_ids_are_those_of_the_family_for_every_shape(family, tmp_path):
    _, _, _, theirs, _, mine = family
    text = theirs.apply_chat_template(said(1), add_generation_prompt=True)
    for name, image in build.shapes(tmp_path).items():
        seen = build.high_bytes(image) if name == "16-bit" else image
        # Video-LLaVA's takes the one row of 1 x 2000 for channels, unless it is told.
        told = {"input_data_format": "channels_last"} if name == "1x2000" and family[0] == "video_llava" else {}
        expected = theirs(images=[seen], text=[text], return_tensors="pt", **told)
        got = mine(images=[image], text=text)
        pixels = pixels_in(expected)
        pixels = pixels[0] if pixels.ndim == 5 else pixels
        assert torch.equal(got["pixel_values"], pixels), name
        assert torch.equal(got["input_ids"], expected["input_ids"]), name


def test_two_matrices_of_embeddings_that_the_language_models_config_alone_states(tmp_path):
    reference, theirs = build.internvl(tmp_path, tie=False)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model, processor = zoo.load(f"dir:{tmp_path}")
    text = theirs.apply_chat_template(said(1), add_generation_prompt=True)
    batch, image = {"text": [text], "return_tensors": "pt"}, build.photo(40, 90)
    with torch.no_grad():
        expected = reference(**theirs(images=[image], **batch)).logits
        assert torch.allclose(model(**processor(images=[image], **batch)).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "tiles"),
    [
        ({}, 10),
        ({"size": {"longest_edge": 160}}, 26),
        ({"do_image_splitting": False}, 1),
        ({"size": {"longest_edge": 32}}, 1),
    ],
)
def test_the_largest_number_of_tiles_is_that_of_the_image_processor(tmp_path, values, tiles):
    build.idefics3(tmp_path)
    content = json.loads((tmp_path / "processor_config.json").read_text())
    content["image_processor"] |= values
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    model, processor = zoo.load(f"dir:{tmp_path}")
    found = [processor.pictures(build.photo(h, w)).cut.rows for h, w in ((300, 300), (40, 90), (30, 30))]
    assert model.num_image_tokens == 4 * tiles and max(found) == tiles
    again = zoo.load(f"dir:{zoo.export(model, processor, tmp_path / 'out')}")[1]
    one, two = (p(images=[build.photo(40, 90)], text="<image>a") for p in (again, processor))
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["input_ids"], two["input_ids"])


def test_training_batches_hold_the_same_ids_and_learn_answers_only(family):
    from zoo.registry import Dialog, Sample

    _, _, _, theirs, ours, mine = family
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    photos = [build.photo(40, 90), build.photo(60, 30)]
    samples = [
        Sample("a", photos[:1], [Dialog([*said(1), answer])]),
        Sample("b", photos, [Dialog([*said(2), answer]), Dialog([*said(2, "yes no"), answer])]),
    ]
    batch = mine.collate([mine.encode(s) for s in samples])
    for row in batch["labels"]:
        learnt = mine.tokenizer.decode(row[row >= 0], skip_special_tokens=True)
        assert set(learnt.replace("<end_of_utterance>", "").replace("yes", " yes ").split()) == {"yes"}
    text = theirs.apply_chat_template([*said(1), answer])
    expected = theirs(images=[photos[:1]], text=[text], return_tensors="pt")["input_ids"][0]
    length = int((batch["labels"][0] >= 0).nonzero()[0])  # up to the answer
    assert batch["input_ids"][0, :length].tolist() == expected.tolist()[:length]
    out = ours(**batch)
    assert out.loss.isfinite()


def test_export_is_loaded_by_transformers_alone(family, tmp_path):
    _, _, reference, processor, ours, mine = family
    zoo.export(ours, mine, tmp_path / "out")
    again, info = type(reference).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    texts, images, batch = made(processor, "unlike samples")
    torch.testing.assert_close(again.eval()(**batch).logits, reference(**batch).logits, atol=0, rtol=0)
    theirs = type(processor).from_pretrained(tmp_path / "out")
    same = theirs(images=nested(theirs, images), text=texts, padding=True, return_tensors="pt")
    assert torch.equal(same["input_ids"], batch["input_ids"])
    assert torch.equal(pixels_in(same), pixels_in(batch))


def test_saved_is_loaded(family, tmp_path):
    _, folder, _, processor, ours, mine = family
    model, same = zoo.load(f"dir:{folder}", "adapter=[lora]")
    model.save_pretrained(tmp_path)
    same.save_pretrained(tmp_path)
    again, loaded = zoo.load(f"dir:{tmp_path}")
    texts, images, _ = made(processor, "unlike samples")
    loaded.tokenizer.padding_side = mine.tokenizer.padding_side = "left"
    one, two = loaded(images=images, text=texts), mine(images=images, text=texts)
    assert torch.equal(one["input_ids"], two["input_ids"]) and torch.equal(one["pixel_values"], two["pixel_values"])
    torch.testing.assert_close(again(**one).logits, ours(**two).logits, atol=1e-6, rtol=0)


def test_an_encoder_that_is_named_as_the_whole_model_is_known(family, tmp_path):
    import shutil

    name, folder, _, _, ours, _ = family
    if name not in ("idefics3", "smolvlm"):
        pytest.skip("its encoder is a model of its own")
    shutil.copytree(folder, tmp_path / "named")
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"]["model_type"] = name  # as SmolVLM's repositories do
    (tmp_path / "named" / "config.json").write_text(json.dumps(content))
    assert zoo.load(f"dir:{tmp_path / 'named'}")[0].config.slots == ours.config.slots


def test_a_pruner_takes_tokens_of_every_crop(family):
    name, folder, _, processor, _, _ = family
    for words in (["pruner=[pool]"], ["pruner=[random]"]):
        if words == ["pruner=[random]"] and "llava" not in name:
            with pytest.raises(ZooError, match="'pixel_shuffle' needs grid"):
                zoo.load(f"dir:{folder}", *words)
            continue
        model, mine = zoo.load(f"dir:{folder}", *words)
        texts, images, full = made(processor, "unlike samples")
        batch = mine(images=images, text=texts)
        assert batch["input_ids"].shape[1] < full["input_ids"].shape[1]
        assert model(**batch).logits.isfinite().all()


def test_evaluation_answers_what_generate_answers(family):
    from zoo.evaluation.predict import Question, answer
    from zoo.registry import Dialog, Sample

    _, _, _, _, ours, mine = family
    photos = [build.photo(40, 90), build.photo(60, 30)]
    samples = [
        Sample("a", photos[:1], [Dialog(said(1)), Dialog(said(1, "yes no"))]),
        Sample("b", photos, [Dialog(said(2))]),
    ]
    asked = [Question(s, d, "generate", 6) for s in samples for d in s.dialogs]
    got = [text for _, text in answer(ours, mine, asked, batch_size=2)]
    for question, text in zip(asked, got, strict=True):
        row = mine.collate([mine.encode_prompt(question.sample, question.dialog)], padding_side="left")
        inputs = {k: row[k] for k in ("input_ids", "attention_mask", "pixel_values", "cuts") if k in row}
        out = ours.generate(**inputs, max_new_tokens=6, do_sample=False)
        alone = mine.tokenizer.decode(out[0, row["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert text == alone


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A clip of twenty frames, and the same frames as arrays."""
    from zoo.vision.images.video import Video, read_video

    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_image(build.photo(48, 64, seed=i))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return Video(str(path), frames=5), read_video(Video(str(path), frames=5)).frames


def test_videos_and_images_are_scored_together(family, film):
    from zoo.evaluation.evaluate import evaluate
    from zoo.registry import Dataset, Dialog, Sample

    name, _, _, _, ours, mine = family
    if mine.videos is None:
        pytest.skip(f"{name} takes no videos")
    shown = {"video": film[0], "image": build.photo(40, 60)}

    class Both(Dataset):
        def __len__(self):
            return 2

        def get(self, index, epoch=0):
            kind, source = list(shown.items())[index]
            content = [{"type": kind}, {"type": "text", "text": "is it red?"}]
            return Sample(kind, [source], [Dialog([{"role": "user", "content": content}], kind=kind, answers=["yes"])])

    found = evaluate(ours, mine, {"both": Both()}, batch_size=2)
    assert [row["prompt"] for row in found.predictions] == ["<video> is it red?", "<image> is it red?"]
    assert all(line.score.n == line.blind.n == 1 for line in found.lines) and len(found.lines) == 2


def test_video_frames_are_the_familys(family, film):
    from zoo.vision.images.video import Video

    name, _, reference, processor, ours, mine = family
    if name in ("idefics3", "llava", "llava_next"):
        pytest.skip(f"{name} has no videos")
    video, frames = film
    talks = [[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASK}]}]]
    photos, clips, films = [], [frames], [video]
    if name != "smolvlm":  # whose processor gives pixels of images or of videos
        talks += [
            [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "yes"}]}]
        ]
        photos, clips = [build.photo(40, 90)], [frames, frames[::-1].copy()]
        films = [video, Video(video.path, sampling="explicit", indices=(16, 12, 8, 4, 0))]
    texts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in talks]
    assert texts == [mine.apply_chat_template(t, add_generation_prompt=True) for t in talks]
    processor.tokenizer.padding_side = mine.tokenizer.padding_side = "left"
    known = {"total_num_frames": 20, "fps": 10, "duration": 2.0, "frames_indices": [0, 4, 8, 12, 16]}
    batch = processor(
        images=[photos] if photos else None, videos=[clips] if name == "smolvlm" else clips, text=texts,
        padding=True, return_tensors="pt", do_sample_frames=False, video_metadata=[known] * len(clips),
    )  # fmt: skip
    got = mine(images=photos or None, videos=films, text=texts)
    assert torch.equal(got["input_ids"], batch["input_ids"])
    shown, expected = torch.cat([got["pixel_values"][:5], got["pixel_values"][-5:]]), batch.get("pixel_values_videos")
    if expected is None:  # images and frames in one
        pixels = batch["pixel_values"]
        assert torch.equal(got["pixel_values"], pixels[0] if pixels.ndim == 5 else pixels)
    else:
        assert torch.equal(shown, expected.flatten(0, 1))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(**batch, position_ids=positions).logits
        logits = ours(**got).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(**got, **options), reference.generate(**batch, **options))


def test_a_question_about_a_video_is_asked_as_the_family_asks_it(family, film):
    """In evaluation and talks too, where prompts are made of messages; and an answer is learnt behind the same."""
    from zoo.registry import Dialog, Sample

    name, _, _, processor, _, mine = family
    if name in ("idefics3", "llava", "llava_next"):
        pytest.skip(f"{name} has no videos")
    talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASK}]}]
    asked = mine(videos=[film[0]], text=processor.apply_chat_template(talk, add_generation_prompt=True))
    row = mine.encode_prompt(Sample("a", [film[0]], []), Dialog(talk))
    assert row.input_ids.tolist() == asked["input_ids"][0].tolist()
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    learnt = mine.encode(Sample("a", [film[0]], [Dialog([*talk, answer])]))
    begin = int((learnt.labels >= 0).nonzero()[0][0])
    assert learnt.input_ids[:begin].tolist() == row.input_ids.tolist()[:begin] and begin > 20


def test_an_older_repository_prepares_videos_as_images(family, film, tmp_path):
    """One file that states both, as before transformers told them apart."""
    import shutil

    name, folder, _, _, _, mine = family
    if name != "video_llava":
        pytest.skip("tested with Video-LLaVA")
    shutil.copytree(folder, tmp_path / "old")
    content = json.loads((folder / "processor_config.json").read_text())
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(content["image_processor"]))
    (tmp_path / "old" / "processor_config.json").unlink()
    _, old = zoo.load(f"dir:{tmp_path / 'old'}")
    text, photo = "<image> <video> a", build.photo(40, 90)
    one, two = (p(images=[photo], videos=[film[0]], text=text) for p in (old, mine))
    assert torch.equal(one["pixel_values"], two["pixel_values"]) and torch.equal(one["input_ids"], two["input_ids"])
