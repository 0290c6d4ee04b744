"""Pruners of videos in whole models: two videos of unlike length and an image in a batch, in every kind of pass."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.test_published_families import film  # noqa: F401 (a fixture)
from tests.video_builders import LAYOUTS, inputs_of, kept_of, rows_of, video, video_model
from tests.video_builders import film as moving
from zoo.registry import ZooError, build
from zoo.vision.images.processors import Picture

PRUNERS = {
    "dycoke": {"name": "dycoke", "keep_ratio": 0.4},
    "dycoke released": {"name": "dycoke", "k": 0.7, "order": "released", "last_group": "released", "odd": "drop"},
    "fastvid": {"name": "fastvid", "keep_ratio": 0.4, "scenes": 2, "summary": "mean"},
    "fastvid floor": {"name": "fastvid", "keep_ratio": 0.3, "scenes": 1, "summary": "mean", "remainder": "floor"},
    "evs": {"name": "evs", "keep_ratio": 0.4},
    "evs last": {"name": "evs", "q": 0.5, "reference": "last_kept"},
}
NAMES = sorted(PRUNERS)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    """Folder of a SmolVLM."""
    from tests import published_builders

    folder = tmp_path_factory.mktemp("published") / "smolvlm"
    published_builders.smolvlm(folder)
    return folder


def node(name):
    return PRUNERS[name]


def hidden_tokens(model, batch, positions):
    """Logits of each row at the columns that stay, of the whole prompts with the other columns hidden, or not there."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        shown = model.encode_images(batch["pixel_values"], batch.get("cuts"))
        embeds, slots = model.merge(ids, shown.tokens), model._placeholders(ids)
        visible = mask.clone()
        visible[slots] = shown.valid
        rows = []
        for row, real, seen in zip(embeds, mask, visible, strict=True):
            row, seen = row[real], seen[real]
            if positions == "dense":
                row, seen = row[seen], seen[seen]
            place = torch.arange(len(row))[None]
            out = model.llm.hidden(inputs_embeds=row[None], attention_mask=seen[None].long(), position_ids=place)
            rows.append(model.llm.head(out.last_hidden_state[0, seen]))
    return rows


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_videos_and_an_image_is_each_alone_with_tokens_hidden(make_model, name, layout, positions):
    model, processor = video_model(make_model, node(name), layout, positions)
    rows = rows_of(processor)
    side = "left" if positions == "kept" else "right"
    batch = processor.collate(rows, padding_side=side)
    with torch.no_grad():
        out = model(**inputs_of(batch))
        alone = [model(**inputs_of(processor.collate([row]))).logits[0] for row in rows]
    real = out.sequence.attention_mask.bool()
    for logits, valid, one, hidden in zip(out.logits, real, alone, hidden_tokens(model, batch, positions), strict=True):
        torch.testing.assert_close(logits[valid], one, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(logits[valid], hidden, atol=2e-5, rtol=1e-4)
    # An image keeps all of its tokens, a video as many as the pruner counts; [CLS] and newlines beside them.
    pruner = next(iter(model.pruner.values()))
    slots = model._placeholders(batch["input_ids"]).sum(1).tolist()
    for found, whole, cut in zip(kept_of(model, batch), slots, batch["cuts"], strict=True):
        n = model.layout.frame_tokens(cut)
        counted = pruner.tokens_of_image(n, cut) + whole - cut.rows * n if cut.kind == "frame" else whole
        exact = name != "fastvid floor" or cut.kind == "image"  # whose count is the most
        assert (found == counted if exact else found <= counted) and (found < whole or cut.kind == "image")


@pytest.mark.parametrize("layout", ["bilinear", "spelt"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_is_forward_step_by_step_and_each_alone(make_model, name, layout):
    model, processor = video_model(make_model, node(name), layout)
    model.generation_config.eos_token_id = None
    rows = rows_of(processor, encode="encode_prompt")
    batch = processor.collate(rows, padding_side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "cuts")}
    out = model.generate(**given, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, answer in zip(rows, out, strict=True):
        one = processor.collate([row])
        images = {"pixel_values": one["pixel_values"], "cuts": one["cuts"]}
        alone = model.generate(one["input_ids"], **images, max_new_tokens=4, do_sample=False)
        assert alone[0, one["input_ids"].shape[1] :].tolist() == answer.tolist()
        with torch.no_grad():
            logits = model(alone[:, :-1], **images).logits[0, -4:]  # of one pass over the whole
        assert logits.argmax(-1).tolist() == answer.tolist()


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_learn_what_each_learns_alone(make_model, name, positions):
    model, processor = video_model(make_model, node(name), "average", positions)
    rows = rows_of(processor)
    packed = processor.collate(processor.pack(rows, 400))
    assert len(packed["input_ids"]) == 1

    def grads(batches):
        model.zero_grad()
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for b in batches:
            model(**b, num_items_in_batch=total).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    one, other = grads([packed]), grads([processor.collate([row]) for row in rows])
    assert one.keys() == other.keys() and any(n.startswith("vision") for n in one)
    for key, grad in one.items():
        torch.testing.assert_close(grad, other[key], atol=2e-5, rtol=1e-3, msg=lambda why, n=key: f"{n}: {why}")


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_and_on_images_alone(make_model, name):
    model, processor = video_model(make_model, node(name))
    (plain, _), rows = video_model(make_model, None), rows_of(processor, (1, 1))
    batch = inputs_of(processor.collate(rows))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)  # images are as without a pruner
        batch = inputs_of(processor.collate(rows_of(processor)))
        out = model.to(torch.bfloat16)(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_video_of_a_batch_is_the_video_alone_and_an_image_is_left_alone(name):
    from zoo.composed.behind import run

    part = build("pruner", {**node(name)}, num_tokens=16, grid=(4, 4), vision_dim=12, vision_depth=2)
    videos = [video(n, seed=n, key_attention=torch.rand(n, 16).softmax(1)) for n in (4, 7, 2)]
    image = replace(video(1, key_attention=torch.rand(1, 16).softmax(1)), row_kind="image")
    image.cuts = (replace(image.cuts[0], kind="image"),)
    joined = type(image).joined([*videos[:2], image, videos[2]])
    together = run(part, joined)
    at = 0
    for one in (*videos[:2], image, videos[2]):
        alone, rows = part(one), slice(at, at + len(one.tokens))
        valid = torch.ones(one.tokens.shape[:2]).bool() if alone.valid is None else alone.valid
        assert torch.equal(together.valid[rows], valid) and torch.equal(together.tokens[rows], alone.tokens)
        at += len(one.tokens)
    assert part(image) is image


@pytest.mark.parametrize("layout", ["frames", "bilinear"])
@pytest.mark.parametrize("name", NAMES)
def test_the_check_takes_a_model_of_videos(name, layout):
    words = [f"pruner.{PRUNERS[name]['name']}.{k}={v}" for k, v in PRUNERS[name].items() if k != "name"]
    more = ["layout=anyres", "layout.pinpoints=[[64,64]]", "layout.frames=bilinear"] if layout != "frames" else []
    more += ["layout.newline=false"] if more else []  # which has a weight, and the model's were trained without one
    report = zoo.check("scenes_tiny", f"pruner=[{PRUNERS[name]['name']}]", *words, *(more or ["layout=frames"]))
    assert report.num_image_tokens == (128 if more else 64)  # an image of a crop, and its overview


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", ["dycoke released", "evs", "fastvid"])
def test_several_videos_and_an_image_of_one_prompt(make_model, name, positions):
    model, processor = video_model(make_model, node(name), "bilinear", positions)
    lengths = ((4, 1, 6), (7, 2))
    rows = []
    for i, some in enumerate(lengths):
        s = sample((QUESTIONS[i], ANSWERS[i]), images=len(some))
        rows.append(processor.encode(s, pixel_values=[moving(n, seed=10 * i + n) for n in some]))
    batch = processor.collate(rows)
    with torch.no_grad():
        out = model(**inputs_of(batch))
    real = out.sequence.attention_mask.bool()
    for logits, valid, hidden in zip(out.logits, real, hidden_tokens(model, batch, positions), strict=True):
        torch.testing.assert_close(logits[valid], hidden, atol=2e-5, rtol=1e-4)
    part, n = next(iter(model.pruner.values())), 4
    videos = [c for c in batch["cuts"] if c.kind == "frame"]
    expected = sum(part.tokens_of_image(n, c) + 1 for c in videos) + 17  # newlines, and an image of one row
    assert int(out.sequence.image_mask.sum()) == expected


@pytest.mark.parametrize("name", ["dycoke", "evs", "fastvid"])
def test_layers_that_are_recomputed_learn_the_same(make_model, name):
    model, processor = video_model(make_model, node(name), "average")
    batch = processor.collate(rows_of(processor))
    found = []
    for recompute in (False, True):
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", ["dycoke released", "evs", "fastvid"])
def test_without_a_model_of_ours(name, positions):
    given = [video(t, seed=t, key_attention=torch.rand(t, 16)) for t in (6, 3)]
    options = {k: v for k, v in node(name).items() if k != "name"}
    prune = zoo.pruner(node(name)["name"], grid=(4, 4), positions=positions, **options)
    joined = {k: torch.cat([getattr(g, k) for g in given]) for k in ("tokens", "key_attention")}
    pruned = prune(**joined, rows=(6, 3), row_kind="frame")
    at = 0
    for one in given:
        alone = prune.part(one)
        rows = slice(at, at + len(one.tokens))
        left, found = alone.tokens[alone.valid], pruned.tokens[rows][pruned.valid[rows]]
        assert int(alone.valid.sum()) == prune.part.tokens_of_image(16, one.cuts[0]) == len(found)
        if positions == "dense":
            assert torch.equal(left, found)  # in the pruner's own order
        else:
            places = torch.arange(16).expand(len(one.tokens), -1) if alone.keep is None else alone.keep
            want = places.masked_fill(~alone.valid, 16).sort(1)
            have = pruned.positions[rows].masked_fill(~pruned.valid[rows], 16).sort(1)
            assert torch.equal(want.values, have.values)
        at += len(one.tokens)


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("name", ["dycoke", "evs", "evs last", "fastvid"])
def test_no_tensor_of_all_tokens_squared(name):
    """Of 24 frames of 64 tokens: those, P x P of a frame's for `fastvid`, T x T of a place's for `last_kept`."""
    part = build("pruner", dict(node(name)), num_tokens=64, grid=(8, 8))
    image = video(24, 64, 8, grid=(8, 8), key_attention=torch.rand(24, 64))
    with Largest() as made:
        part(image)
    allowed = {"fastvid": 24 * 64 * 64, "evs last": max(24 * 24 * 64, 32 * 24 * 64)}.get(name, 24 * 64 * 8)
    assert 24 * 64 <= made.most <= allowed < (24 * 64) ** 2


@pytest.mark.parametrize("name", ["dycoke", "evs", "fastvid"])
def test_frames_with_words_between_them_share_a_budget(spelling, film, name):  # noqa: F811
    """SmolVLM writes the time of each frame into the prompt: its frames are still those of one video."""
    model, processor = zoo.load(f"dir:{spelling}", f"pruner=[{name}]", f"pruner.{name}.keep_ratio=0.3")
    inputs = processor(videos=[film[0]], text=processor.video_token + "what?", return_tensors="pt")
    with torch.no_grad():
        out = model.eval()(**inputs)
    ((cut,), n) = inputs["cuts"], model.layout.row_tokens
    part = model.pruner[name]
    assert (cut.kind, cut.rows) == ("frame", 5) and int(model._placeholders(inputs["input_ids"]).sum()) == 5 * n
    assert int(out.sequence.image_mask.sum()) == part.tokens_of_image(n, cut) < 5 * n
    assert processor.fewer_of(inputs["input_ids"][0].numpy(), [Picture(inputs["pixel_values"], cut)]) == (
        5 * n - part.tokens_of_image(n, cut)
    )


@pytest.mark.parametrize("name", ["dycoke", "evs"])
def test_behind_a_pruner_that_leaves_no_grid_places_are_refused(make_model, name):
    first = {"random": {"name": "random", "keep_ratio": 0.5}}
    with pytest.raises(ZooError, match=f"pruner '{PRUNERS[name]['name']}' needs grid, but pruner 'random' destroys it"):
        make_model(pruner={**first, PRUNERS[name]["name"]: node(name)}, layout=LAYOUTS["frames"])
