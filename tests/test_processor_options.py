"""Every option of the processor's call and of `apply_chat_template`: as transformers' LlavaProcessor, or refused."""

import base64
import io

import numpy as np
import pytest
import torch

import zoo
from tests import published_builders as build
from tests.fusion_builders import SMALL
from tests.published_builders import CASES, said
from zoo.registry import ZooError
from zoo.text.processor_options import known_options


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Processors of transformers and ours, texts, images, nested and flat."""
    folder = tmp_path_factory.mktemp("options") / "llava"
    _, theirs = build.llava(folder)
    ours = zoo.load(f"dir:{folder}")[1]
    texts = [theirs.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES["unlike samples"]]
    images = [build.photo(30 + 9 * i, 50, seed=i) for i in range(3)]
    return theirs, ours, texts, images


def same(ours, theirs, names=None):
    """All that transformers gives is there, with its values and types."""
    assert set(theirs) <= set(ours), set(theirs) ^ set(ours)
    for name in names or theirs:
        a, b = ours[name], theirs[name]
        if isinstance(b, torch.Tensor):
            assert isinstance(a, torch.Tensor) and a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        elif isinstance(b, np.ndarray):
            assert isinstance(a, np.ndarray) and a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        elif name == "pixel_values":
            assert type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        else:
            assert a == b, name


CALLS = {  # name of an option in it -> options
    "padding": [{"padding": p, "return_tensors": t} for p in (True, "longest") for t in ("pt", "np", None)]
    + [{"padding": False}, {"padding": "do_not_pad"}, {"padding": False, "return_tensors": None}],
    "max_length": [{"padding": "max_length", "max_length": 100, "return_tensors": "pt"}],
    "pad_to_multiple_of": [
        {"padding": True, "pad_to_multiple_of": 16, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 70, "pad_to_multiple_of": 32, "return_tensors": "np"},
    ],
    "padding_side": [{"padding": True, "padding_side": side, "return_tensors": "pt"} for side in ("left", "right")],
    "truncation": [
        {"truncation": True, "max_length": 63, "padding": True, "return_tensors": "pt"},
        {"truncation": "longest_first", "max_length": 60, "padding": True, "return_tensors": "pt"},
        {"truncation": False, "padding": True, "return_tensors": "pt"},
    ],
    "add_special_tokens": [{"add_special_tokens": False, "padding": True, "return_tensors": "pt"}],
    "return_token_type_ids": [{"return_token_type_ids": True, "padding": False}],
    "return_attention_mask": [{"return_attention_mask": False, "padding": True, "return_tensors": "pt"}],
    "return_special_tokens_mask": [{"return_special_tokens_mask": True, "padding": True, "return_tensors": "pt"}],
    "return_offsets_mapping": [
        {"return_offsets_mapping": True, "padding": False},
        {"return_offsets_mapping": True, "padding": True, "return_tensors": "pt"},
    ],
    "return_length": [{"return_length": True, "padding": False}],
    "return_mm_token_type_ids": [
        {"return_mm_token_type_ids": True, "padding": False},
        {"return_mm_token_type_ids": True, "padding": True, "return_tensors": "pt"},
    ],
    "return_text_replacement_offsets": [{"return_text_replacement_offsets": True, "padding": False}],
    "verbose": [{"verbose": False, "padding": True, "return_tensors": "pt"}],
    "text_kwargs": [{"text_kwargs": {"padding": "max_length", "max_length": 80}, "return_tensors": "pt"}],
    "images_kwargs": [{"images_kwargs": {"do_normalize": False}, "padding": True, "return_tensors": "pt"}],
    "common_kwargs": [{"common_kwargs": {"return_tensors": "np"}, "padding": True}],
    "text_pair": [{"text_pair": ["yes", "no", "two"], "padding": False}],
    "text_pair_target": [
        {"text_target": ["yes", "no", "two"], "text_pair_target": ["a", "b", "blue"], "padding": False}
    ],
    "text_target": [{"text_target": ["yes", "no", "blue two"], "padding": False}],
    "do_convert_rgb": [{"do_convert_rgb": True, "padding": True, "return_tensors": "pt"}],
    "do_rescale": [{"do_rescale": False, "do_normalize": False, "padding": True, "return_tensors": "pt"}],
    "rescale_factor": [{"rescale_factor": 0.5, "padding": True, "return_tensors": "pt"}],
    "image_mean": [{"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "padding": True, "return_tensors": "pt"}],
    "resample": [{"resample": 2, "padding": True, "return_tensors": "pt"}],
    "size": [{"size": {"shortest_edge": 40}, "padding": True, "return_tensors": "pt"}],
    "do_resize": [
        {"do_resize": False, "crop_size": {"height": 32, "width": 32}, "padding": True, "return_tensors": "pt"}
    ],
    "do_center_crop": [
        {"do_center_crop": False, "size": {"height": 32, "width": 32}, "padding": True, "return_tensors": "pt"}
    ],
    "default_to_square": [{"size": 32, "default_to_square": True, "padding": True, "return_tensors": "pt"}],
    "device": [{"device": "cpu", "padding": True, "return_tensors": "pt"}],
    "disable_grouping": [{"disable_grouping": True, "padding": True, "return_tensors": "pt"}],
    "do_pad": [
        {"do_pad": False, "padding": True, "return_tensors": "pt"},
        {"do_pad": True, "pad_size": {"height": 32, "width": 32}, "padding": True, "return_tensors": "pt"},
    ],
}
DONE_WITH = {  # tested in the line of another one
    "return_tensors": "padding", "do_normalize": "images_kwargs", "image_std": "image_mean", "crop_size": "do_resize",
}  # fmt: skip
REFUSED = {  # option -> a value that means something
    "is_split_into_words": True, "stride": 4, "return_overflowing_tokens": True,
    "sanitize_control_tokens": True, "data_format": "channels_last", "input_data_format": "channels_first",
    "image_seq_length": 3, "do_sample_frames": True, "video_metadata": [{}], "fps": 2, "num_frames": 4,
    "return_metadata": True, "sampling_rate": 16000, "raw_speech": [0.0], "load_audio_backend": "auto",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_an_option_does_what_it_does_in_transformers(llava, name):
    theirs, ours, texts, images = llava
    for options in CALLS[name]:
        same(ours(images=images, text=texts, **options), theirs(images=images, text=texts, **options))


def test_no_option_of_the_installed_transformers_is_left_out(llava):
    """A new one must be shown to be done, or be refused by name."""
    _, ours, texts, images = llava
    tested = {n for options in CALLS.values() for given in options for n in given} | set(DONE_WITH)
    for name in sorted(frozenset().union(*known_options(ours.pictures.processor).values()) - tested):
        with pytest.raises(ZooError, match=f"The option '{name}' is not taken"):
            ours(images=images, text=texts, **{name: REFUSED.get(name, 7)})
        for nothing in (None, False) if name in REFUSED else ():
            same(ours(images=images, text=texts, **{name: nothing}), ours(images=images, text=texts))


def test_what_goes_wrong_is_said(llava):
    _, ours, texts, images = llava
    cases = [
        ({"paddding": True}, "No option of the processor's call named 'paddding'. Did you mean 'padding'"),
        ({"text_kwargs": {"max_lenght": 3}}, "No option of text_kwargs named 'max_lenght'. Did you mean 'max_length'"),
        ({"text_kwargs": {"padding": True}, "padding": True}, "'padding' is given twice, directly and in text_kwargs"),
        ({"return_tensors": "jax"}, "return_tensors must be 'pt', 'np' or None, got 'jax'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"audio": [1.0]}, "The model takes no sound: leave out audio"),
        ({"truncation": True, "max_length": 20}, "cuts the images of text 0: 13 of 16 '<image>' would be left"),
        ({"truncation": True, "max_length": 30}, "cuts the images of text 2: 22 of 32 '<image>' would be left"),
        ({"crop_size": {"height": 48, "width": 48}}, "make pixels of 48 x 48, and the encoder takes 32 x 32"),
        (
            {"videos_kwargs": {"fps": 3}},
            "'fps' is not taken: a zoo.vision.images.video.Video selects its frames",
        ),
        ({"images": images[:2]}, "holds 3 times '<image>', but 2 images were given"),
        (
            {"images": [images[:2], [], images[2:]]},
            "Text 0 holds 1 times '<image>', but 2 images were given for it",
        ),
        ({"text": [images[0]]}, "text must be a string or a list of strings, got Image; images come first"),
        ({"text": None, "images": None}, "needs text, images or videos"),
        ({"videos": ["x.mp4"]}, "'x.mp4' was given to a model that takes images only"),
    ]
    for options, words in cases:
        with pytest.raises(ZooError) as found:
            ours(**{"images": images, "text": texts, **options})
        assert words in str(found.value)
    with pytest.raises(ValueError, match="longst is not a valid PaddingStrategy"):  # the tokenizer's own words
        ours(images=images, text=texts, padding="longst")
    with pytest.raises(ValueError, match="Unable to create tensor"):
        ours(images=images, text=texts, padding=False, return_tensors="pt")


def test_images_come_as_they_like(llava, tmp_path):
    theirs, ours, texts, images = llava
    wanted = theirs(images=images, text=texts, padding=True, return_tensors="pt")
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    png = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    arrays = [np.asarray(image) for image in images]
    forms = {
        "nested": [images[:1], [], images[1:]],
        "paths": [str(tmp_path / f"{i}.png") for i in range(3)],
        "bytes": png,
        "files": [io.BytesIO(some) for some in png],
        "data URLs": ["data:image/png;base64," + base64.b64encode(some).decode() for some in png],
        "arrays": arrays,
        "channels first": [a.transpose(2, 0, 1) for a in arrays],
        "tensors": [torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays],
        "a tuple": tuple(images),
    }
    for given in forms.values():
        same(ours(images=given, text=texts), wanted)
    stacked = np.stack([arrays[0]] * 3)  # (3, h, w, 3)
    same(
        ours(images=stacked, text=texts), theirs(images=[arrays[0]] * 3, text=texts, padding=True, return_tensors="pt")
    )
    same(ours(images[0], texts[0]), theirs(images[0], texts[0], padding=True, return_tensors="pt"))
    same(ours(text=texts[1]), theirs(text=texts[1], padding=True, return_tensors="pt"))
    same(ours(images=images, return_tensors="np"), theirs(images=images, return_tensors="np"))
    same(ours(images=images, return_tensors=None), theirs(images=images))
    with pytest.raises(ZooError, match=r"'https://x.org/a.png' is not fetched: download it, and give its path"):
        ours(images="https://x.org/a.png", text=texts[0])
    with pytest.raises(ZooError, match=r"data:image/png;base64,.* cannot be decoded"):
        ours(images="data:image/png;base64,a", text=texts[0])


def test_defaults_of_the_processor_and_the_tokenizer(llava):
    import copy

    from transformers import ProcessorMixin

    if "text_kwargs" not in ProcessorMixin.__annotations__:
        pytest.skip("this transformers knows no defaults of a processor")
    theirs, ours = copy.deepcopy(llava[:2])
    _, _, texts, images = llava
    for processor in (theirs, ours):
        processor.text_kwargs = {"padding": "max_length", "max_length": 80}
        processor.images_kwargs = {"do_normalize": False}
        processor.return_mm_token_type_ids = True
    for options in ({}, {"max_length": 90}, {"padding": True}):
        same(ours(images=images, text=texts, return_tensors="pt", **options),
             theirs(images=images, text=texts, return_tensors="pt", **options))  # fmt: skip
    for processor in (theirs, ours):
        processor.text_kwargs = {}
        processor.tokenizer.init_kwargs["max_length"] = 77
    options = {"padding": "max_length", "return_tensors": "pt"}
    same(ours(images=images, text=texts, **options), theirs(images=images, text=texts, **options))
    assert set(theirs.model_input_names) <= set(ours.model_input_names)


def test_a_batch_moves_to_a_data_type_and_into_the_model(llava):
    _, ours, texts, images = llava
    batch = ours(images=images, text=texts).to("cpu", torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64


def test_options_where_an_image_leaves_no_token_and_where_pixels_are_our_own(make_model):
    vlora = {"name": "vlora", **SMALL["vlora"], "max_images": 2}
    _, processor = make_model(projector=None, adapter={"vlora": vlora})
    assert processor.num_image_tokens == 0
    images, texts = [build.photo(20, 30, seed=i) for i in range(2)], ["<image>what is it?", "a <image>b and some more"]
    alone = [processor(images=[i], text=[t])["input_ids"][0] for i, t in zip(images, texts, strict=True)]
    for side in ("left", "right"):
        batch = processor(
            images=images, text=texts, padding="max_length", max_length=40, padding_side=side, return_tensors="np"
        )
        assert batch["input_ids"].shape == (2, 40) and batch["images_per_row"] == [1, 1]
        for ids, mask, wanted in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
            assert ids[mask.astype(bool)].tolist() == wanted.tolist()
            assert (mask[0] == 0) == (side == "left")
    rows = processor(images=images, text=texts, padding=False)["input_ids"]
    assert [list(r) for r in rows] == [a.tolist() for a in alone]
    with pytest.raises(ZooError, match="'do_normalize' is not taken: pixels are prepared for the encoder"):
        processor(images=images, text=texts, do_normalize=False)


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "internvl"])
def test_options_where_images_are_cut(tmp_path, family):
    """An image is then as many tokens as its shape makes of it, with words of the layout around them."""
    _, theirs = getattr(build, family)(tmp_path)
    ours = zoo.load(f"dir:{tmp_path}")[1]
    texts = [theirs.apply_chat_template(said(n), add_generation_prompt=True) for n in (1, 0, 2)]
    images = [[build.photo(40, 90)], [], [build.photo(90, 40), build.photo(30, 30)]]
    given = images if family == "idefics3" else [i for some in images for i in some]
    for options in (
        {"padding": "max_length", "max_length": 600, "return_offsets_mapping": True},
        {"padding": True, "pad_to_multiple_of": 64, "padding_side": "right", "return_special_tokens_mask": True},
    ):
        wanted = theirs(images=given, text=texts, return_tensors="pt", **options)
        names = [n for n in wanted if n in ("input_ids", "attention_mask", "offset_mapping", "special_tokens_mask")]
        assert len(names) == 3
        same(ours(images=images, text=texts, **options), {n: wanted[n] for n in names})
    with pytest.raises(ZooError, match="cuts the images of text 0"):
        ours(images=images, text=texts, truncation=True, max_length=10)


@pytest.mark.parametrize("seed", range(3))
def test_texts_and_options_that_are_drawn(llava, seed):
    from random import Random

    theirs, ours, _, images = llava
    random = Random(seed)
    pieces = [
        "<image>",
        "<image>",
        " ",
        "\n",
        "\n\n",
        "yes",
        " blue",
        "é",
        "猫",
        "🙂",
        "</s>",
        "<s>",
        "<pad>",
        "<im",
        "x" * 40,
        "",
    ]
    for _ in range(25):
        texts = ["".join(random.choices(pieces, k=random.randint(1, 7))) or "a" for _ in range(random.randint(1, 3))]
        shown = [random.choice(images) for _ in range(sum(t.count("<image>") for t in texts))] or None
        options = {"padding": random.choice([True, False, "longest", "max_length"])}
        options |= {"max_length": random.choice([50, 120])} if options["padding"] == "max_length" else {}
        if options["padding"]:
            options["return_tensors"] = random.choice(["pt", "np", None])
        for name, values in (
            ("add_special_tokens", [True, False]), ("pad_to_multiple_of", [8, 32]), ("padding_side", ["left", "right"]),
            ("return_offsets_mapping", [True]), ("return_special_tokens_mask", [True]), ("return_length", [True]),
            ("return_mm_token_type_ids", [True]), ("return_attention_mask", [False]),
        ):  # fmt: skip
            if random.random() < 0.3:
                options[name] = random.choice(values)
        if "max_length" in options and random.random() < 0.5:
            options["truncation"] = True
        try:
            wanted = theirs(images=shown, text=list(texts), **options)
        except ValueError as error:
            with pytest.raises(ValueError) as found:  # the tokenizer's own, or ours
                ours(images=shown, text=texts, **{"return_tensors": None} | options)
            cut = "cuts the images" in str(found.value) and "token count" in str(error)
            assert cut or str(found.value) == str(error)
        else:
            same(ours(images=shown, text=texts, **{"return_tensors": None} | options), wanted)
