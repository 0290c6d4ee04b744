"""Qwen-VL, GLM-V and PaddleOCR-VL as published: loaded, asked, trained from, saved and exported."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.video_utils import VideoMetadata

import zoo
from tests import glm_builders, paddle_builders
from tests import published_builders as build
from tests.qwen_builders import EXTRA, FAMILIES
from zoo.published import family_named
from zoo.registry import Dialog, Sample, ZooError
from zoo.registry.versions import cache_argument
from zoo.vision.images.video import Video, read_video

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
WORDS = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
OPTIONS = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}


def made(name, folder, tie=False):
    """A tiny model by transformers' own classes, saved and loaded again."""
    import transformers as t

    for others in (glm_builders, paddle_builders):
        if name in others.WORDS:
            return others.made(name, folder, tie)
    tok = build.tokenizer("<|image_pad|>", extra=SPECIAL)
    tok = type(tok)(
        tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left"
    )
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    rope |= {"mrope_interleaved": True} if name.startswith("qwen3") else {}
    text = {**build.TEXT, "vocab_size": len(tok) + 7, "rope_parameters": rope, "pad_token_id": tok.pad_token_id}
    text |= {"tie_word_embeddings": tie, "max_position_embeddings": 4096}
    text |= {"head_dim": 12} if name.startswith("qwen3") else {}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40} if name.endswith("moe") else {}
    vision = {"depth": 4, "num_heads": 2, "patch_size": 4, "intermediate_size": 72, **EXTRA[name]}
    vision |= {"embed_dim": 32, "hidden_size": 48} if name == "qwen2_vl" else {"hidden_size": 32, "out_hidden_size": 48}
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = getattr(t, f"{WORDS[name]}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tie,
        **{key: tok.convert_tokens_to_ids(token) for key, token in ids.items()},
    )  # fmt: skip
    model = getattr(t, f"{WORDS[name]}ForConditionalGeneration")(config)
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
    three = name.startswith("qwen3")
    videos = (t.Qwen3VLVideoProcessor if three else t.Qwen2VLVideoProcessor)(**sizes)
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(name, "Qwen3VL")
    processor = getattr(t, f"{kind}Processor")(
        image_processor=t.Qwen2VLImageProcessor(**sizes), tokenizer=tok, video_processor=videos, chat_template=CHAT
    )
    return build.finish(build.shake(model), processor, folder)


@pytest.fixture(scope="module", params=[*FAMILIES, *glm_builders.FAMILIES, *paddle_builders.WORDS])
def family(request, tmp_path_factory):
    """Name, folder, transformers' model and processor, ours."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs, processor = made(request.param, folder)
    ours, mine = zoo.load(f"dir:{folder}")
    return request.param, folder, theirs, processor, ours, mine


SIDES = [
    (1, 1),
    (1, 200),
    (200, 1),
    (3, 7),
    (8, 8),
    (9, 8),
    (27, 27),
    (28, 28),
    (29, 27),
    (56, 56),
    (16, 130),
    (300, 5),
]
SIDES += [(64, 64), (65, 63), (480, 640), (200, 210), (12, 12), (11, 90), (97, 41)]
SHAPES = {f"{h} x {w}": build.photo(h, w, seed=h) for h, w in SIDES}  # with those of `build.shapes` 40
SHAPES |= {
    f"{mode} {h} x {w}": build.photo(h, w, seed=w, mode=mode) for mode in ("L", "P", "RGBA") for h, w in SIDES[10:13]
}
PHOTOS = [build.photo(40, 90), build.photo(70, 30, 1), build.photo(9, 9, 2)]


def prompts(processor):
    """Prompts of two, of no and of one image."""
    talks = [build.said(2), build.said(0, "yes no"), build.said(1, "what color is the square?")]
    return [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]


def asked(processor, texts):
    return processor(images=[PHOTOS[:2], [], PHOTOS[2:]], text=texts, padding=True, return_tensors="pt")


@torch.no_grad()
def test_pixels_ids_logits_and_answers_are_those_of_transformers(family):
    _, _, theirs, processor, ours, mine = family
    texts = prompts(processor)
    assert texts == prompts(mine)
    mine.tokenizer.padding_side = "left"
    batch, got = asked(processor, texts), mine(images=PHOTOS, text=texts)
    assert torch.equal(got["input_ids"], batch["input_ids"])
    assert torch.equal(got["pixel_values"], batch["pixel_values"].flatten(1))
    mask = batch["attention_mask"].bool()
    wanted = theirs(**batch).logits[mask]
    assert (ours(**got).logits[mask] - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    for more in ({}, {"num_beams": 3}):
        assert torch.equal(ours.generate(**got, **OPTIONS, **more), theirs.generate(**batch, **OPTIONS, **more))


def test_every_shape_gives_the_same_pixels_and_ids_or_is_refused(family, tmp_path):
    _, _, _, processor, _, mine = family
    text = processor.apply_chat_template(build.said(1), add_generation_prompt=True)
    for name, image in {**build.shapes(tmp_path), **SHAPES}.items():
        if "2000" in name:
            with pytest.raises(ZooError, match="aspect ratio"):
                mine(images=[image], text=text)
            continue
        from zoo.vision.images.decode import open_image

        expected = processor(images=[open_image(image)], text=[text], return_tensors="pt")
        got = mine(images=[image], text=text)
        assert torch.equal(got["pixel_values"], expected["pixel_values"].flatten(1)), name
        assert torch.equal(got["input_ids"], expected["input_ids"]), name


@torch.no_grad()
def test_chat_shows_images_and_goes_on(family):
    _, _, theirs, processor, ours, _ = family
    from zoo.composed.chat_session import Talk

    talk = Talk(ours)
    first = talk.say("is there a red circle?", [PHOTOS[0]], max_new_tokens=5)
    second = talk.say("and here?", [PHOTOS[1]], max_new_tokens=5)
    assert isinstance(first, str) and isinstance(second, str)
    text = processor.apply_chat_template(build.said(1), add_generation_prompt=True)
    batch = processor(images=[PHOTOS[0]], text=[text], return_tensors="pt")
    out = theirs.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert first == processor.decode(out[0], skip_special_tokens=True).strip()


def test_export_is_loaded_by_transformers_alone(family, tmp_path, monkeypatch):
    name, folder, theirs, processor, ours, mine = family
    monkeypatch.delitem(ours.__dict__, "processor")  # as `from_pretrained` gives a model
    zoo.export(ours, mine, tmp_path / "out")
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    for mark in family_named(name).marks:
        assert getattr(again.config, mark) == getattr(theirs.config, mark), mark
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = asked(processor, prompts(processor))
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, theirs(**batch).logits)
    same = asked(type(processor).from_pretrained(tmp_path / "out"), prompts(processor))
    assert torch.equal(same["input_ids"], batch["input_ids"]) and torch.equal(
        same["pixel_values"], batch["pixel_values"]
    )
    again = type(processor).from_pretrained(tmp_path / "out")
    for kind in {"image_processor", "video_processor"} & vars(processor).keys():
        assert getattr(again, kind).to_dict() == getattr(processor, kind).to_dict()
    written = {n for file in (tmp_path / "out").glob("*.safetensors") for n in load_file(file)}
    assert written == {n for file in folder.glob("*.safetensors") for n in load_file(file)}, name


def test_saved_is_loaded_with_an_adapter_and_a_pruner(family, tmp_path):
    _, folder, _, _, _, mine = family
    pruner = ["pruner=[fastervlm]", "pruner.fastervlm.score=column_mean", "pruner.fastervlm.keep_ratio=0.5"]
    model, processor = zoo.load(f"dir:{folder}", "adapter=[lora]", *pruner)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, loaded = zoo.load(f"dir:{tmp_path}")
    texts = prompts(processor)
    one, two = loaded(images=PHOTOS, text=texts), processor(images=PHOTOS, text=texts)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert one["input_ids"].shape[1] < mine(images=PHOTOS, text=texts)["input_ids"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(again(**one).logits, model(**two).logits, atol=1e-6, rtol=0)


def test_evaluation_answers_what_generate_answers(family):
    from zoo.evaluation.predict import Question, answer

    _, _, _, _, ours, mine = family
    samples = [
        Sample("a", PHOTOS[:1], [Dialog(build.said(1)), Dialog(build.said(1, "yes no"))]),
        Sample("b", PHOTOS[:2], [Dialog(build.said(2))]),
    ]
    questions = [Question(s, d, "generate", 6) for s in samples for d in s.dialogs]
    got = [text for _, text in answer(ours, mine, questions, batch_size=2)]
    for question, text in zip(questions, got, strict=True):
        row = mine.collate([mine.encode_prompt(question.sample, question.dialog)], padding_side="left")
        inputs = {k: row[k] for k in ("input_ids", "attention_mask", "pixel_values", "cuts") if k in row}
        out = ours.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert text == mine.tokenizer.decode(out[0, row["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_fewer_pixels_are_an_option_that_counts_follow(family):
    _, folder, _, _, _, mine = family
    model, processor = zoo.load(f"dir:{folder}", "vision.max_pixels=1024")
    text = processor.apply_chat_template(build.said(1), add_generation_prompt=True)
    small, large = (p(images=PHOTOS[:1], text=text) for p in (processor, mine))
    (h, w), (high, wide) = small["cuts"][0].patches, large["cuts"][0].patches
    assert h * w <= 1024 // 64 < high * wide <= 4096 // 64
    assert model(**small).logits.isfinite().all()
    with pytest.raises(ZooError, match=r"vision\.depth is 3"):
        zoo.load(f"dir:{folder}", "vision.depth=3")


# ---- videos ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """The path of a clip of twenty frames, ten a second."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            out.mux(stream.encode(av.VideoFrame.from_image(build.photo(48, 64, seed=i))))
        out.mux(stream.encode())
    return str(path)


def watched(*parts):
    return [{"role": "user", "content": [*({"type": kind} for kind in parts), {"type": "text", "text": "is it red?"}]}]


@pytest.mark.parametrize("frames", [1, 2, 7])
@torch.no_grad()
def test_videos_are_those_of_transformers(family, film, frames):
    name, _, theirs, processor, ours, mine = family
    if name in paddle_builders.WORDS:
        with pytest.raises(ZooError, match="takes images only"):
            ours.chat("is it red?", video=Video(film, frames=frames))
        return
    video = Video(film, sampling="explicit", indices=tuple(range(1, 20, 2))[:frames])
    clip = read_video(video)
    known = {"total_num_frames": 20, "fps": 10.0, "frames_indices": list(clip.indices)}
    shown = clip.frames
    if frames == 1 and not name.startswith("qwen2"):  # which transformers refuses: it is shown twice
        shown, known["frames_indices"] = shown.repeat(2, axis=0), known["frames_indices"] * 2
    glm = name in glm_builders.FAMILIES  # whose class takes images or videos, not both
    talks = [watched("video"), watched(*["image"] * (not glm), "video", "video")]
    images = {} if glm else {"images": [PHOTOS[0]]}
    texts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in talks]
    assert texts == [mine.apply_chat_template(t, add_generation_prompt=True) for t in talks]
    processor.tokenizer.padding_side = mine.tokenizer.padding_side = "left"
    batch = processor(
        **images, videos=[shown] * 3, text=texts, padding=True, return_tensors="pt",
        do_sample_frames=False, video_metadata=[dict(known) for _ in range(3)], cap_pixels_per_frame=False,
    )  # fmt: skip
    got = mine(**images, videos=[video] * 3, text=texts)
    assert torch.equal(got["input_ids"], batch["input_ids"])
    n = len(batch["pixel_values_videos"]) // 3
    own = [batch["pixel_values_videos"][:n], *[batch[k] for k in ["pixel_values"] if k in batch]]
    own += [batch["pixel_values_videos"][n:]]
    assert torch.equal(got["pixel_values"], torch.cat(own))
    mask = batch["attention_mask"].bool()
    wanted = theirs(**batch).logits[mask]
    assert (ours(**got).logits[mask] - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    short = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**got, **short), theirs.generate(**batch, **short))


@torch.no_grad()
def test_a_pruned_video_has_the_places_of_the_whole_and_its_frames_are_the_models_choice(family, film):
    name, folder, _, _, _, mine = family
    if name in paddle_builders.WORDS:
        pytest.skip("it takes no videos")
    chosen = mine.prepare([Video(film, sampling="model")])[0].cut
    assert chosen.rows == 2 and chosen.kind == "frame"  # four frames: two a second of two seconds
    model, processor = zoo.load(f"dir:{folder}", "pruner=[random]", "pruner.random.keep_ratio=0.5")
    text = processor.apply_chat_template(watched("video"), add_generation_prompt=True)
    few, many = (p(videos=[Video(film, frames=6)], text=text) for p in (processor, mine))
    assert few["input_ids"].shape[1] < many["input_ids"].shape[1]
    out = model(**few)
    whole, _ = zoo.load(f"dir:{folder}")
    last = whole(**many).passed.sequence.axes[:, 0, -1]
    assert torch.equal(out.passed.sequence.axes[:, 0, -1], last), name
    row = mine.encode_prompt(Sample("v", [Video(film, frames=6)], []), Dialog(watched("video")))
    assert row.gap == int(last[0]) + 1 - len(row)
    assert isinstance(whole.chat("is it red?", video=Video(film, frames=3), max_new_tokens=3), str)
    _, fewer = zoo.load(f"dir:{folder}", "pruner=[frames]", "pruner.frames.keep_ratio=0.5")
    assert fewer.prepare([Video(film, frames=8)])[0].cut.rows == 2


@torch.no_grad()
def test_glm46v_is_glm4v_with_other_times_and_another_choice_of_frames(film, tmp_path):
    theirs, processor = made("glm46v", tmp_path / "own")
    ours, mine = zoo.load(f"dir:{tmp_path / 'own'}")
    video = Video(film, sampling="model")
    about = VideoMetadata(total_num_frames=20, fps=10.0, duration=2.0)
    chosen = tuple(int(i) for i in processor.video_processor.sample_frames(about))
    clip = read_video(Video(film, sampling="explicit", indices=chosen))
    assert mine.prepare([video])[0].cut.starts == (0.0, 0.4, 0.7, 1.0, 1.4, 1.7)  # three pairs a second
    text = processor.apply_chat_template(watched("video"), add_generation_prompt=True)
    known = {"total_num_frames": 20, "fps": 10.0, "frames_indices": list(clip.indices)}
    batch = processor(
        videos=[clip.frames], text=[text], return_tensors="pt", do_sample_frames=False, video_metadata=[known]
    )
    got = mine(videos=[video], text=text)
    assert "0.4 seconds" in mine.tokenizer.decode(got["input_ids"][0])
    assert torch.equal(got["input_ids"], batch["input_ids"])
    assert torch.equal(got["pixel_values"], batch["pixel_values_videos"])
    wanted = theirs(**batch).logits
    assert (ours(**got).logits - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
    zoo.export(ours, mine, tmp_path / "out")
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(**batch).logits, wanted)


@torch.no_grad()
def test_own_loops_behind_a_video_write_what_generate_writes(family, film):
    """In transformers `forward` goes on elsewhere than `generate`; ours go on at the same place, by either option."""
    name, folder, _, _, ours, mine = family
    if name in paddle_builders.WORDS:
        pytest.skip("it takes no videos")
    models = [(ours, mine), zoo.load(f"dir:{folder}", "layout.after_video=extent")]
    where = []
    for model, processor in models:
        text = processor.apply_chat_template(watched("video"), add_generation_prompt=True)
        batch = processor(videos=[Video(film, sampling="explicit", indices=tuple(range(20)))], text=text)
        wanted = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids, out = batch["input_ids"], model(**batch, use_cache=True)
        where.append(out.passed.sequence.axes[:, 0, -1].tolist())
        for _ in range(4):
            new = out.logits[:, -1:].argmax(-1)
            ids, out = torch.cat([ids, new], 1), model(new, **cache_argument(out.cache), use_cache=True)
        assert torch.equal(ids, wanted)
    side, extent = where  # ten pairs of 6 x 8 tokens; by seconds they take eight positions, and with words none
    assert side < extent if name == "qwen2_vl" else side == extent


@torch.no_grad()
def test_a_mixture_of_glm_is_read_and_written_with_a_matrix_for_each_expert(tmp_path):
    theirs, processor = made("glm4v_moe", tmp_path / "own")
    held = load_file(tmp_path / "own" / "model.safetensors")
    assert "model.language_model.layers.1.mlp.experts.3.up_proj.weight" in held
    ours, mine = zoo.load(f"dir:{tmp_path / 'own'}")
    mine.tokenizer.padding_side = "left"
    batch, got = asked(processor, prompts(processor)), mine(images=PHOTOS, text=prompts(mine))
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**got).logits[mask], theirs(**batch).logits[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.generate(**got, **OPTIONS), theirs.generate(**batch, **OPTIONS))
    zoo.export(ours, mine, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == held.keys() and all(torch.equal(held[n], t) for n, t in written.items())


# ---- names and configs of repositories ---------------------------------------------------------------------------


def renamed(folder, target, change):
    """Copy a folder with other names of weights."""
    import shutil

    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    save_file({change(n): t.clone() for n, t in load_file(file).items()}, file)
    return target


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_names_of_repositories_and_of_memory_are_read(name, tmp_path):
    theirs, processor = made(name, tmp_path / "own", tie=True)
    batch = asked(processor, prompts(processor))
    wanted = theirs(**batch).logits

    def flat(key):
        return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    def nested(key):
        key = key if key.startswith(("model.visual", "lm_head")) else key.replace("visual.", "model.visual.", 1)
        inside = key.startswith("model.") and not key.startswith(("model.visual", "model.language_model"))
        return key.replace("model.", "model.language_model.", 1) if inside else key

    for change in (flat, nested):
        folder = renamed(tmp_path / "own", tmp_path / change.__name__, change)
        ours, mine = zoo.load(f"dir:{folder}")
        mine.tokenizer.padding_side = "left"
        got = ours(**mine(images=PHOTOS, text=prompts(mine))).logits
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(got[mask], wanted[mask], atol=1e-5, rtol=1e-5)
        assert ours.llm.lm.lm_head.weight is ours.llm.lm.get_input_embeddings().weight


@torch.no_grad()
def test_a_flat_config_of_old_repositories_is_read(tmp_path):
    theirs, processor = made("qwen2_vl", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    content = {**text, **content, "sliding_window": 4096, "use_sliding_window": False, "model_type": "qwen2_vl"}
    content["vision_config"]["model_type"] = "qwen2_vl"
    (tmp_path / "config.json").write_text(json.dumps(content))
    pixels = {**processor.image_processor.to_dict(), "size": {"shortest_edge": 64, "longest_edge": 1 << 17}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    (tmp_path / "processor_config.json").unlink(missing_ok=True)  # of version 5, and read first
    ours, mine = zoo.load(f"dir:{tmp_path}")
    assert mine.num_image_tokens == (1 << 17) // 64
    mine.tokenizer.padding_side = "left"
    batch = asked(processor, prompts(processor))
    mask = batch["attention_mask"].bool()
    got = ours(**mine(images=PHOTOS, text=prompts(mine))).logits[mask]
    torch.testing.assert_close(got, theirs(**batch).logits[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tie", [True, False])
@torch.no_grad()
def test_a_repository_of_paddleocr_is_read_with_its_flat_config_and_weights_that_no_model_has(tmp_path, tie):
    theirs, processor = made("paddleocr_vl", tmp_path, tie)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {**content.pop("text_config"), "model_type": "paddleocr_vl", "tie_word_embeddings": tie}
    content["vision_config"]["model_type"] = "paddleocr_vl"
    (tmp_path / "config.json").write_text(json.dumps(content))
    held = load_file(tmp_path / "model.safetensors")
    spare = ("head.probe", "embeddings.packing_position_embedding.weight")
    save_file({**held, **{f"visual.vision_model.{n}": torch.zeros(3) for n in spare}}, tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in held} == {"visual", "mlp_AR", "model", *["lm_head"] * (not tie)}
    ours, mine = zoo.load(f"dir:{tmp_path}")
    mine.tokenizer.padding_side = "left"
    batch = asked(processor, prompts(processor))
    mask = batch["attention_mask"].bool()
    got = ours(**mine(images=PHOTOS, text=prompts(mine))).logits[mask]
    torch.testing.assert_close(got, theirs(**batch).logits[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_statistics_of_pixels_may_be_one_number(tmp_path):
    _, processor = made("glm4v", tmp_path)
    processor.image_processor.image_mean, processor.image_processor.image_std = 0.5, 0.25
    processor.save_pretrained(tmp_path)
    model, mine = zoo.load(f"dir:{tmp_path}")
    assert model.vision.transform.mean == (0.5, 0.5, 0.5) and model.vision.transform.std == (0.25, 0.25, 0.25)
    texts = prompts(processor)[2:]
    batch = processor(images=PHOTOS[2:], text=texts, return_tensors="pt")
    assert torch.equal(mine(images=PHOTOS[2:], text=texts)["pixel_values"], batch["pixel_values"])


@torch.no_grad()
def test_experts_that_are_stored_turned_are_read(tmp_path):
    theirs, processor = made("qwen3_vl_moe", tmp_path / "own")
    folder = renamed(tmp_path / "own", tmp_path / "hub", lambda n: n)
    file = folder / "model.safetensors"
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in load_file(file).items()}
    assert any(".experts.gate_up_proj" in n for n in turned)
    save_file(turned, file)
    ours, mine = zoo.load(f"dir:{folder}")
    mine.tokenizer.padding_side = "left"
    batch = asked(processor, prompts(processor))
    mask = batch["attention_mask"].bool()
    got = ours(**mine(images=PHOTOS, text=prompts(mine))).logits[mask]
    torch.testing.assert_close(got, theirs(**batch).logits[mask], atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "saved")  # nothing changed: nothing is written
    assert sum(f.stat().st_size for f in (tmp_path / "saved").glob("*.safetensors")) < 10_000
