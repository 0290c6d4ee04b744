"""Every published family alike: pixels, ids, logits and answers are those of transformers' classes; saved, exported."""

import pytest
import torch

import zoo
from tests import published_builders as build

ASK = "is there a red circle?"
FAMILIES = ("idefics3", "internvl", "llava_next", "llava_onevision", "smolvlm")
# Images of unlike shapes, so that they are cut into unlike numbers of crops.
SIZES = [(40, 90), (70, 60), (30, 30), (1, 200)]
CASES = {
    "one image": [(1, ASK)],
    "several images": [(3, "describe the picture.")],
    "text only": [(0, "yes no blue")],
    "unlike samples": [(1, ASK), (0, "yes"), (2, "what color is the square? describe the picture.")],
}


def said(images, question=ASK):
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}]


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
    nested = [some for some in images if some]
    return texts, images, processor(images=nested or None, text=texts, padding=True, return_tensors="pt")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal(family, case, attention):
    _, _, reference, processor, ours, mine = family
    reference.set_attn_implementation(attention)
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


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_is_equal(family, case):
    _, _, reference, processor, ours, mine = family
    texts, images, batch = made(processor, case)
    options = {"max_new_tokens": 32, "do_sample": False}
    expected = reference.generate(**batch, **options)
    mine.tokenizer.padding_side = "left"
    assert torch.equal(ours.generate(**mine(images=images, text=texts), **options), expected)


def test_pixels_and_ids_are_those_of_the_family_for_every_shape(family, tmp_path):
    _, _, _, theirs, _, mine = family
    text = theirs.apply_chat_template(said(1), add_generation_prompt=True)
    for name, image in build.shapes(tmp_path).items():
        seen = build.high_bytes(image) if name == "16-bit" else image
        expected = theirs(images=[seen], text=[text], return_tensors="pt")
        got = mine(images=[image], text=text)
        pixels = expected["pixel_values"]
        pixels = pixels[0] if pixels.ndim == 5 else pixels
        assert torch.equal(got["pixel_values"], pixels), name
        assert torch.equal(got["input_ids"], expected["input_ids"]), name


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
        assert set(mine.tokenizer.decode(row[row >= 0]).split()) <= {"yes", "</s>", "<end_of_utterance>", "<|im_end|>"}
    text = theirs.apply_chat_template([*said(1), answer])
    expected = theirs(images=[photos[:1]], text=[text], return_tensors="pt")["input_ids"][0]
    length = int(batch["attention_mask"][0].sum())
    assert batch["input_ids"][0, :length].tolist() == expected.tolist()[-length:]
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
    nested = [some for some in images if some]
    same = theirs(images=nested, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(same["input_ids"], batch["input_ids"])
    assert torch.equal(same["pixel_values"], batch["pixel_values"])


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


def test_a_pruner_takes_tokens_of_every_crop(family):
    _, folder, _, processor, _, _ = family
    for words in (["pruner=[pool]"], ["pruner=[random]"]):
        model, mine = zoo.load(f"dir:{folder}", *words)
        texts, images, full = made(processor, "unlike samples")
        batch = mine(images=images, text=texts)
        assert batch["input_ids"].shape[1] < full["input_ids"].shape[1]
        assert model(**batch).logits.isfinite().all()


def test_evaluation_answers_what_generate_answers(family):
    from zoo.predict import Question, answer
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
