"""Images that keep their shapes in a composed model, as transformers' classes compute it, in every form of a batch."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, talk
from tests.qwen_builders import NATIVE, encoder_node, for_whole, picture, sharpen, slots, towers, whole_of
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.composed.model import ZooModel
from zoo.inspection.xray import look
from zoo.published.export import place_for
from zoo.registry import Cut, Sample, ZooError
from zoo.registry.versions import cache_argument
from zoo.teaching.teacher import Teacher
from zoo.training.step import count_images

SHOWN = [picture(40, 24, 1), picture(33, 90, 2), picture(8, 8, 3)]
TEXTS = [f"<image> {QUESTIONS[0]} <image> {QUESTIONS[1]}", f"{QUESTIONS[2]} <image> no", QUESTIONS[3]]
FIXED = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=NATIVE)
def family(request):
    return request.param


@pytest.fixture
def pair(family, make_model):
    """A composed model, its processor, and transformers' model with its weights."""
    model, processor = make_model(**slots(family))
    sharpen(model)
    return model, processor, whole_of(model, family)


def agree(a, b, mask=None, atol=1e-5):
    scale = b.abs().max()
    a, b = (a, b) if mask is None else (a[mask], b[mask])
    assert (a - b).abs().max() <= atol * max(1.0, scale), float((a - b).abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_are_those_of_transformers_and_a_row_is_the_row_alone(pair, side):
    model, processor, theirs = pair
    batch = processor(images=SHOWN, text=TEXTS, padding_side=side)
    mask = batch["attention_mask"].bool()
    got = model(**batch).logits
    agree(got, theirs(**for_whole(batch, model.image_token_id)).logits, mask)
    shown = [SHOWN[:2], SHOWN[2:], []]
    for i, text in enumerate(TEXTS):
        alone = processor(images=shown[i] or None, text=text)
        agree(got[i][mask[i]], model(**alone).logits[0])
    positions = theirs.model.get_rope_index(**for_whole(batch, model.image_token_id))[0]
    axes = model(**batch).passed.sequence.axes
    assert torch.equal(axes[:, mask], positions[:, mask])


@torch.no_grad()
def test_greedy_answers_and_beams_are_those_of_transformers(pair, family):
    model, processor, theirs = pair
    # transformers' beams of GLM-4.1V get the images of a row in another order, [A, A, B, B] of A and B twice.
    shown, texts = (SHOWN[1:], [f"<image> {QUESTIONS[0]}", *TEXTS[1:]]) if family == "glm4v" else (SHOWN, TEXTS)
    batch = processor(images=shown, text=texts, padding_side="left")
    for how in (
        {"max_new_tokens": 32, "min_new_tokens": 32},
        {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3},
    ):
        assert torch.equal(
            model.generate(**batch, **FIXED, **how),
            theirs.generate(**for_whole(batch, model.image_token_id), **FIXED, **how),
        )


@torch.no_grad()
def test_a_cache_goes_on_where_the_image_ended(pair):
    """Token by token, a second turn with another image, and a cache that ends with an image token."""
    model, processor, _ = pair
    text = f"<image> {QUESTIONS[0]} <image> {QUESTIONS[1]} yes"
    whole = processor(images=SHOWN[:2], text=text)
    wanted = model(**whole).logits
    ids = whole["input_ids"]
    second = int((ids[0] == model.image_token_id).nonzero()[-1]) - 3  # inside of the second image, and at its end
    first = int((ids[0] == model.image_token_id).nonzero()[0])
    count = model.layout.count(whole["cuts"][0])
    for at in (first + count, first + count + 4):
        own = whole["cuts"][0].patches[0] * whole["cuts"][0].patches[1] * 4
        start = model(ids[:, :at], pixel_values=whole["pixel_values"][:own], cuts=whole["cuts"][:1], use_cache=True)
        later = model(
            ids[:, at:], pixel_values=whole["pixel_values"][own:], cuts=whole["cuts"][1:], **cache_argument(start.cache)
        )
        agree(torch.cat([start.logits, later.logits], 1), wanted)
    assert second > first
    cache = model(ids[:, :-3], pixel_values=whole["pixel_values"], cuts=whole["cuts"], use_cache=True).cache
    for i in (-3, -2, -1):
        step = model(ids[:, i : ids.shape[1] + i + 1], **cache_argument(cache), use_cache=True)
        agree(step.logits[:, 0], wanted[:, i])


@torch.no_grad()
def test_own_loops_and_chunked_prefill_write_what_generate_writes(pair):
    model, processor, _ = pair
    batch = processor(images=SHOWN[:2], text=TEXTS[0])
    wanted = model.generate(**batch, **FIXED, max_new_tokens=6, min_new_tokens=6)
    ids, out = batch["input_ids"], model(**batch, use_cache=True)
    for _ in range(6):
        new = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
        out = model(new, **cache_argument(out.cache), use_cache=True)
    assert torch.equal(ids, wanted)
    chunks = model.generate(**batch, **FIXED, max_new_tokens=6, min_new_tokens=6, prefill_chunk_size=7)
    assert torch.equal(chunks, wanted)


# ---- training ------------------------------------------------------------------------------------------------------


def shown_sample(*pairs, sizes=((40, 24),), seed=0):
    images = [picture(w, h, seed + i) for i, (w, h) in enumerate(sizes)]
    return Sample("s", images, [talk(q, a, len(sizes)) for q, a in pairs])


def test_a_step_learns_what_transformers_class_learns(pair):
    model, processor, theirs = pair
    # One image each: transformers' class takes images without text between them for one.
    rows = [processor.encode(shown_sample((QUESTIONS[i], ANSWERS[i]), sizes=SIZES[i][-1:], seed=i)) for i in (0, 1)]
    batch = processor.collate(rows)
    assert count_images(batch) == 2
    ours = model.train()(**batch)
    ours.loss.backward()
    given = for_whole(batch, model.image_token_id)
    wanted = theirs.train()(**given, labels=batch["labels"])
    wanted.loss.backward()
    torch.testing.assert_close(ours.loss, wanted.loss, atol=1e-5, rtol=1e-5)
    pairs = [(model.llm.decoder, theirs.model.language_model), (model.llm.lm.lm_head, theirs.lm_head)]
    for mine, other in [*pairs, *towers(model, theirs)]:
        reference = dict(other.named_parameters())
        for name, p in mine.named_parameters():
            grad = reference[name].grad
            assert (p.grad - grad).abs().max() <= 1e-5 * max(1.0, float(grad.abs().max())), name


SIZES = [((40, 24), (8, 30)), ((33, 64),)]


def test_packed_rows_dialogs_that_share_images_and_checkpointing_learn_what_each_learns_alone(make_model):
    model, processor = make_model(**slots("qwen3_vl"))
    sharpen(model, 2.0)
    model.train()
    samples = [
        shown_sample(*zip(QUESTIONS[:3], ANSWERS[:3], strict=True), sizes=SIZES[0], seed=1),
        shown_sample((QUESTIONS[3], ANSWERS[3]), sizes=SIZES[1], seed=5),
        shown_sample((QUESTIONS[4], ANSWERS[4]), sizes=SIZES[0], seed=7),
    ]
    packed = processor.collate(processor.pack([processor.encode(s) for s in samples], 600))
    assert len(packed["input_ids"]) == 1 and int(packed["segment_ids"].max()) == 2 and count_images(packed) == 5

    def grads(batches):
        model.zero_grad()
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for b in batches:
            model(**b, num_items_in_batch=total).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = [processor.collate([processor.encode(replace(s, dialogs=[d]))]) for s in samples for d in s.dialogs]
    one, other = grads([packed]), grads(alone)
    model.activation_checkpointing_enable()
    again = grads([packed])
    assert one.keys() == other.keys() == again.keys()
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], atol=5e-5, rtol=2e-3, msg=lambda why, n=name: f"{n}: {why}")
        torch.testing.assert_close(grad, again[name], atol=1e-6, rtol=1e-4)


def test_a_batch_of_text_gives_the_encoder_gradients_of_zero(make_model):
    model, processor = make_model(**slots("qwen3_vl"))
    model.train()
    out = model(**processor(text=[QUESTIONS[0]]), labels=processor(text=[QUESTIONS[0]])["input_ids"])
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.vision.parameters())


# ---- other encoders, other LLMs ------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_llm_of_one_axis_counts_tokens_or_places(make_model):
    llama = {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 512}
    parts = {"llm": llama, "projector": {"name": "mlp"}}
    model, processor = make_model(**slots("qwen2_vl", **parts))
    batch = processor(images=SHOWN, text=TEXTS)
    assert model.unpruned is None and model(**batch).passed.sequence.axes is None
    random = {"random": {"name": "random", "keep_ratio": 0.5}}
    kept, processor = make_model(**slots("qwen2_vl", **parts, pruner=random))
    batch = processor(images=SHOWN[:1], text="<image> a b")
    where = kept(**batch).passed.sequence.position_ids[0]
    count, whole = kept.layout.count(batch["cuts"][0]), 15
    at = int((batch["input_ids"][0] == kept.image_token_id).nonzero()[0])
    assert where[at + count] == at + whole and where[at : at + count].max() < at + whole


@pytest.mark.parametrize("other", ["llama", "next"])
@torch.no_grad()
def test_an_encoder_with_another_llm_is_right_and_no_layout_of_a_family_has_a_place_for_it(make_model, family, other):
    """Rows are the rows alone, a step on a cache is the whole pass, and transformers has no class for the pair."""
    llm = slots(NATIVE[NATIVE.index(family) - 1])["llm"]
    if other == "llama":
        llm = {"name": "hf", "hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_positions": 1024}
    model, processor = make_model(**slots(family, llm=llm))
    sharpen(model)
    batch = processor(images=SHOWN, text=TEXTS, padding_side="left")
    got, mask = model(**batch).logits, batch["attention_mask"].bool()
    shown = [SHOWN[:2], SHOWN[2:], []]
    for i, text in enumerate(TEXTS):
        agree(got[i][mask[i]], model(**processor(images=shown[i] or None, text=text)).logits[0])
    one = processor(images=SHOWN[:2], text=TEXTS[0])
    ids = one["input_ids"]
    cache = model(ids[:, :-1], pixel_values=one["pixel_values"], cuts=one["cuts"], use_cache=True).cache
    step = model(ids[:, -1:], **cache_argument(cache), use_cache=True)
    agree(step.logits[:, 0], model(**one).logits[:, -1])
    with pytest.raises(ZooError, match=rf"{family}: (its language model is of type|layout\.)"):
        place_for(model, "", None)


@torch.no_grad()
def test_images_of_one_size_are_text_to_an_llm_of_three_axes(make_model, family):
    model, processor = make_model(llm=slots(family)["llm"])
    sharpen(model)
    batch = processor(images=SHOWN[:1], text=["<image> a", "yes"], padding_side="left")
    out = model(**batch)
    assert out.passed.sequence.axes is None
    for i, alone in enumerate(({"images": SHOWN[:1], "text": "<image> a"}, {"text": "yes"})):
        agree(out.logits[i][batch["attention_mask"][i].bool()], model(**processor(**alone)).logits[0])
    if family != "paddleocr_vl":  # whose text model transformers builds in its own class alone
        assert place_for(model, "", None)[0].model_type == "llava"
        return
    with pytest.raises(ZooError, match="AutoModel, which has none of type 'paddleocr_vl_text'"):
        place_for(model, "", None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layout": None}, "no layout joins them: layout=native"),
        ({"projector": {"name": "linear"}}, "makes new tokens, and vision 'qwen_vision' gives features for 3 layers"),
        ({"vision": encoder_node("qwen3_vl", out_width=32)}, "tokens are 32 wide and the LLM's 64"),
        ({"adapter": {"vlora": {"rank": 4}}, "projector": None, "layout": None}, "image"),
        (
            {"vision": {"name": "timm", "image_size": 32, "patch_size": 8, "width": 64, "heads": 2, "depth": 2}},
            "leave the layout out",
        ),
        ({"llm": {**slots("qwen3_vl")["llm"], "num_layers": 2}}, "features for 3 layers of the LLM, which has 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make_model, changed, message):
    with pytest.raises(ZooError, match=message):
        make_model(**slots("qwen3_vl", **changed))


def test_saved_and_loaded_it_answers_alike(make_model, tmp_path):
    model, processor = make_model(**slots("qwen3_vl", pruner={"random": {"name": "random", "keep_ratio": 0.5}}))
    batch = processor(images=SHOWN, text=TEXTS)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = ZooModel.from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)
    assert torch.equal(again(**other(images=SHOWN, text=TEXTS)).logits, model(**batch).logits)
    assert (
        other.encode(shown_sample((QUESTIONS[0], "yes"))).gap
        == processor.encode(shown_sample((QUESTIONS[0], "yes"))).gap
    )
    with pytest.raises(ZooError, match="need `cuts` with the grid of each"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])


def test_text_behind_a_video_goes_on_at_its_side_or_at_its_end():
    def layout(**options):
        return registry.build("layout", {"name": "native", **options}, num_tokens=99)

    cut = Cut(10, "frame", patches=(1, 1), interval=1.0)
    cases = [({}, 1, 9), ({"after_video": "extent"}, 10, 9), ({"tokens_per_second": 2.0}, 1, 18)]
    cases += [({"tokens_per_second": 2.0, "after_video": "extent"}, 19, 18)]
    for options, behind, last in cases:
        made = layout(**options)
        assert made.advance(cut, 3, False) == behind
        assert made.coordinates(cut, torch.zeros(10, 1, dtype=torch.long), 3, False)[0].tolist()[-1] == last
    image = Cut(patches=(2, 3))
    where = layout().coordinates(image, torch.arange(6)[None], 3, False)
    assert where.tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert layout(after_video="extent").advance(image, 3, False) == 3
    with pytest.raises(ZooError, match="Available: extent, side"):
        layout(after_video="end")


@pytest.mark.parametrize("pruner", ["fastervlm", "visionzip", "fastv"])
def test_a_picture_is_shown_on_its_own_grid(make_model, pruner):
    options = {"layer": 1} if pruner == "fastv" else {"score": "column_mean"}
    node = {pruner: {"name": pruner, "keep_ratio": 0.5, **options}}
    model, processor = make_model(**slots("qwen3_vl", pruner=node))
    view, shown = look(model, processor, picture(40, 24), "is it red?")
    assert view.grid == (3, 5) and len(view.layers[0]) == 15 and shown.size[0] * 3 == shown.size[1] * 5
    left = model.layout.count(Cut(patches=(3, 5)))
    assert view.tokens[0] == left and len({t for t in view.layers[0] if t >= 0}) == left
    assert view.tokens[-1] < 15


@torch.no_grad()
def test_a_teacher_shares_a_frozen_encoder(make_model):
    student, processor = make_model(seed=1, **slots("qwen3_vl"))
    model, _ = make_model(seed=2, **slots("qwen3_vl"))
    model.vision.load_state_dict(student.vision.state_dict())
    student.vision.requires_grad_(False)
    teacher = Teacher(model, frozenset({"teacher.logits"}))
    teacher.share_vision(student)
    assert teacher.same_vision
    batch = processor(images=SHOWN, text=TEXTS)
    ran = []
    model.vision.register_forward_hook(lambda *given: ran.append(given))
    seen = teacher.outputs_for(dict(batch), student(**batch))
    assert not ran and torch.equal(seen.logits, model(**batch).logits)


@pytest.mark.parametrize("normalise", ["none", "centred_unit"])
def test_image_tokens_are_distilled_by_row_and_cell(make_model, normalise):
    """Visual and relation losses of LLaVA-KD, as they follow from logits: of all tokens, and of those a pruner left."""
    from zoo.composed.outputs import Seen

    few = {"divprune": {"name": "divprune", "keep_ratio": 0.5}}
    batches, models = [], []
    for seed, pruner in ((1, {}), (1, few), (2, {})):
        model, processor = make_model(seed=seed, **slots("qwen3_vl", pruner=pruner))
        sharpen(model, 2.0)
        rows = [processor.encode(shown_sample((QUESTIONS[i], ANSWERS[i]), sizes=SIZES[i], seed=i)) for i in (0, 1)]
        batches.append(processor.collate(rows))
        models.append(model)
    teacher = models[2].requires_grad_(False).eval()
    taught = Seen(teacher(**batches[2], all_logits=True), teacher.llm)
    node = {"name": "llava_kd", "relation_normalise": normalise, "response_weight": 0.0}
    for model, batch in zip(models[:2], batches[:2], strict=True):
        seen = Seen(model.train()(**batch, all_logits=True), model.llm)
        losses = registry.build("distiller", node)(seen, taught, {**batch, "num_images": count_images(batch)})
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in model.vision.parameters())
        logits, wanted, kept, place = seen.logits, taught.logits, seen.image_kept, 0
        ours, theirs = (x[m["input_ids"] == model.image_token_id] for x, m in ((logits, batch), (wanted, batches[2])))
        visual, relation = [], []
        at = 0
        for row, cells in enumerate(
            kept.in_order(lambda g: g.tokens.new_zeros(g.tokens.shape[:2]) if g.places is None else g.places)
        ):
            n = int(torch.tensor(batch["cuts"][row].patches).prod())
            whole = theirs[at : at + n]
            mine = ours[place : place + len(cells)]
            chosen = whole if len(cells) == n else whole[cells.long()]
            visual.append(
                torch.nn.functional.kl_div(
                    mine.log_softmax(-1), chosen.log_softmax(-1), reduction="none", log_target=True
                )
                .sum(-1)
                .mean()
            )
            pair = [x - x.mean(-1, keepdim=True) if normalise != "none" else x for x in (mine, chosen)]
            pair = [torch.nn.functional.normalize(x, dim=-1) if normalise != "none" else x for x in pair]
            flat = [(x @ x.T).flatten() for x in pair]
            relation.append(1 - torch.nn.functional.cosine_similarity(*flat, dim=0))
            at, place = at + n, place + len(cells)
        torch.testing.assert_close(losses["visual"], torch.stack(visual).mean(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(losses["relation"], torch.stack(relation).mean(), atol=1e-5, rtol=1e-3)


@pytest.mark.fixes
@pytest.mark.parametrize(
    ("changed", "fix"),
    [({"layout": None}, "layout=native"), ({"projector": {"name": "linear"}}, "projector=identity")],
)
def test_a_refusal_offers_what_fits(changed, fix):
    with pytest.raises(RefusedError) as refusal:
        check(Plan({"pruner": {}, "adapter": {}, **slots("qwen3_vl", **changed)}, vocab_size=512))
    assert fix in refusal.value.fixes
    assert check(Plan({"pruner": {}, "adapter": {}, **slots("qwen3_vl")}, vocab_size=512)).num_image_tokens == 64


def test_image_tokens_of_a_teacher_align_or_are_refused(make_model):
    from types import SimpleNamespace

    from zoo.checking.teachers import ON_IMAGES, _check_images
    from zoo.composed.assembly import assemble

    stage = SimpleNamespace(distiller_node={"name": "llava_kd"})
    whole = slots("qwen3_vl")
    teacher = assemble({"pruner": {}, "adapter": {}, **whole}, vocab_size=512)
    for changed, message in (
        ({}, ""),
        ({"pruner": {"divprune": {"name": "divprune"}}}, ""),
        ({"pruner": {"pool": {"name": "pool"}}}, "makes new tokens, which the teacher does not have"),
        ({"pruner": {"evs": {"name": "evs"}}}, "keeps a number of its own"),
        ({"vision": encoder_node("qwen3_vl", max_pixels=1024)}, "each of 8 pixels a side, by the shape of an image of"),
    ):
        model, _ = make_model(**slots("qwen3_vl", **changed))
        given = ("kd", stage, ON_IMAGES, model, model.config.slots, teacher, {"pruner": {}, **whole})
        if not message:
            _check_images(*given)
            continue
        with pytest.raises(ZooError, match=message):
            _check_images(*given)


@pytest.mark.parametrize(
    ("family", "node"),
    [
        ("qwen2_5_vl", {"name": "mole", "rank": 4, "dropout": 0.0}),
        ("qwen3_vl_moe", {"name": "mole", "rank": 4, "dropout": 0.0}),
        ("qwen3_vl_moe", {"name": "moextend", "calibration_width": 4}),
        ("qwen3_vl", {"name": "upcycle"}),
    ],
    ids=lambda x: x if isinstance(x, str) else x["name"],
)
def test_adapters_learn_and_are_saved(make_model, tmp_path, family, node):
    model, processor = make_model(**slots(family, adapter={node["name"]: node}))
    sharpen(model, 2.0)
    model.requires_grad_(False)
    g, part = torch.Generator().manual_seed(1), model.adapter[node["name"]]
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    part.requires_grad_(True)
    sample = shown_sample((QUESTIONS[0], ANSWERS[0]), sizes=SIZES[0])
    loss = model.train()(**processor.collate([processor.encode(sample)])).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.any() for p in part.parameters())
    batch = processor(images=SHOWN, text=TEXTS)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        alone = model(**processor(images=SHOWN[2:], text=TEXTS[1])).logits[0]
        agree(wanted[1][mask[1]], alone, atol=2e-5)
        model.save_pretrained(tmp_path)
        assert torch.equal(ZooModel.from_pretrained(tmp_path)(**batch).logits, wanted)


def test_buckets_put_images_of_like_shapes_together(make_model, tmp_path):
    """By the sizes in the files' headers, rotated ones too; a batch is then hardly padded."""
    from zoo.runs.batches import Batches, Loader
    from zoo.runs.order import Mix, ShardPosition
    from zoo.settings.stage import Stage

    _, processor = make_model(**slots("qwen3_vl"))
    sides = torch.randint(6, 90, (64, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for i, (w, h) in enumerate(sides):
        picture(w, h, i).save(tmp_path / f"{i}.png")

    class Shapes(registry.Dataset):
        def __len__(self):
            return len(sides)

        def get(self, index, epoch=0):
            shown = str(tmp_path / f"{index}.png") if index % 2 else picture(*sides[index], index)
            return Sample(str(index), [shown], [talk(QUESTIONS[0], "yes", 1)])

    def padding(buckets):
        stage = Stage(steps=16, batch_size=4, length_buckets=buckets)
        batches = [
            i["batch"] for i in Loader(Batches(Mix({"a": Shapes()}, {}, 0), processor, stage, 16, ShardPosition()))
        ]
        assert sorted(c.size for b in batches for c in b["cuts"]) == sorted((h, w) for w, h in sides)
        masks = [b["attention_mask"] for b in batches]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    assert padding(True) < 0.06 < 0.25 < padding(False), (padding(True), padding(False))
    assert processor.pictures.share_of(str(tmp_path / "none.png")) == 1.0
