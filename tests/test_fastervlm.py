"""FasterVLM against the paper's formula, naively, and against the library's own attention matrix."""

import pytest
import torch

from tests.fusion_builders import features
from tests.vision_builders import hf_model, open_clip_model, pixels, save_open_clip, save_timm, shake, timm_model
from zoo import registry
from zoo.checking.checker import RefusedError, check
from zoo.checking.plan import Plan
from zoo.fusion.pruners.topk import count_kept, top
from zoo.registry import ImageFeatures, ZooError
from zoo.registry.versions import cache_of
from zoo.vision.encoders.attention_scores import row

CLIP = {"name": "hf", "model_type": "clip", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 3}


def build(**options):
    return registry.build("pruner", {"name": "fastervlm", **options}, num_tokens=16).eval()


def test_keeps_the_most_attended_tokens_in_grid_order():
    tokens = torch.arange(6.0).view(1, 6, 1)  # token i holds the number i
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.0, 0.7]])
    out = build(keep_ratio=0.5)(ImageFeatures(tokens, grid=(2, 3), cls_attention=attention))
    assert out.tokens.flatten().tolist() == [1.0, 3.0, 5.0] == out.keep.flatten().tolist()
    assert out.grid is None and out.cls_attention.tolist() == [pytest.approx([0.9, 0.8, 0.7])]


@pytest.mark.parametrize(
    ("n", "reduction", "t"),
    [
        *[(576, 25, 432), (576, 50, 288), (576, 75, 144), (576, 90, 58), (576, 95, 29), (256, 25, 192)],
        *[(256, 50, 128), (256, 75, 64), (256, 90, 26), (256, 95, 13), (10, 75, 3), (3, 99, 1), (7, 0, 7)],
    ],
)
def test_counts_are_those_of_the_published_tables(n, reduction, t):
    assert build(keep_ratio=1 - reduction / 100).num_tokens(n) == t


def test_a_count_may_be_given_and_is_never_more_than_there_is():
    assert build(num_keep=5).num_tokens(16) == 5 and build(num_keep=99).num_tokens(16) == 16
    assert build(num_keep=99).destroys == frozenset() and build(num_keep=5).destroys == {"grid"}
    image = features(m=2)
    assert build(num_keep=16)(image) is image and build(keep_ratio=1.0)(image) is image


def test_the_kept_set_is_the_largest_scores_and_ties_go_to_the_first():
    scores = torch.rand(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keep = top(scores.float(), 13)
    for row_of, kept in zip(scores, keep, strict=True):
        assert set(kept.tolist()) == set(sorted(range(50), key=lambda j: -row_of[j])[:13])
        assert (kept.diff() > 0).all()
    assert top(torch.ones(1, 9), 4).tolist() == [[0, 1, 2, 3]]
    assert [count_kept(1, r) for r in (0.01, 0.5, 1.0)] == [1, 1, 1]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Library -> (node of a saved tower, the attention matrix (M, H, L, L) of block -2 by the library, unfused)."""
    from tests.test_vision_hf import reference as of_hf
    from tests.test_vision_open_clip import reference as of_open_clip
    from tests.test_vision_timm import reference as of_timm

    folder = tmp_path_factory.mktemp("towers")
    made = {}
    clip = hf_model("clip")
    clip.save_pretrained(folder / "hf")
    made["hf"] = of_hf(clip, pixels(), eager=True).attentions[-2]
    vit = timm_model("vit_base_patch16_clip_quickgelu_224")
    save_timm(vit, folder / "timm")
    made["timm"] = of_timm(vit, -2)[2]
    whole, architecture = open_clip_model()
    save_open_clip(whole, architecture, folder / "open_clip")
    made["open_clip"] = of_open_clip(whole, -2)[2]
    return {name: ({"name": name, "checkpoint": str(folder / name)}, matrix) for name, matrix in made.items()}


@pytest.mark.parametrize("name", ["hf", "timm", "open_clip"])
@pytest.mark.parametrize("score", ["cls", "column_mean"])
def test_scores_of_a_fused_encoder_are_those_of_the_eager_one(libraries, name, score):
    node, matrix = libraries[name]
    tower, pruner = registry.build("vision", node).eval(), build(score=score)
    tower.set_attention("sdpa")
    image = tower(pixels(), need=pruner.needs)
    looks = matrix[:, :, :1] if score == "cls" else matrix
    naive = looks.double().mean((1, 2))[:, 1:]
    torch.testing.assert_close(pruner.scores(image).double(), naive, atol=1e-6, rtol=0)
    if score == "cls":  # the share that heads leave on [CLS] is not given back
        left = 1 - matrix[:, :, 0, 0].mean(1)
        torch.testing.assert_close(pruner.scores(image).sum(1), left, atol=1e-6, rtol=0)
    keep = pruner(image).keep
    assert [set(k.tolist()) for k in keep] == [set(s.topk(4).indices.tolist()) for s in naive]


def test_a_constant_on_one_heads_logits_changes_nothing_and_a_silent_head_votes_for_all_alike():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 1, 8, generator=g), torch.randn(2, 4, 17, 8, generator=g)
    want = row(query, key, 0.3)
    along = query / query.square().sum(-1, keepdim=True)
    moved = key.clone()
    moved[:, 1] += 2.5 * along[:, 1]  # q.k of head 1 grows by 2.5 for every key
    torch.testing.assert_close(row(query, moved, 0.3), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(want.sum(1), torch.ones(2))
    silent = query.clone()
    silent[:, 1] = 0
    others = [0, 2, 3]
    rest = row(query[:, others], key[:, others], 0.3)
    torch.testing.assert_close(row(silent, key, 0.3), (3 * rest + 1 / 17) / 4, atol=1e-6, rtol=0)


def test_permuted_patches_are_kept_wherever_they_stand():
    torch.manual_seed(0)
    tower, pruner = shake(registry.build("vision", CLIP)), build(num_keep=5)
    order = torch.randperm(16)
    blocks = pixels().view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (M, N, 3, 8, 8)
    shuffled = blocks[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    before = pruner(tower(pixels(), need=pruner.needs))
    places = tower.tower.embeddings.position_embedding.weight
    with torch.no_grad():
        places[1:] = places[1:][order].clone()
    after = pruner(tower(shuffled, need=pruner.needs))
    for old, new in zip(before.keep, after.keep, strict=True):
        assert set(order[new].tolist()) == set(old.tolist())


def model_with(make_model, positions="auto", **options):
    pruner = {"fastervlm": {"name": "fastervlm", **options}} if options else {}
    model, processor = make_model(vision=CLIP, pruner=pruner, positions=positions)
    return shake(model), processor


def ask(processor, *questions, side="left"):
    from tests.conftest import sample

    some = [sample((q, "yes"), seed=i) for i, q in enumerate(questions)]
    encoded = [processor.encode_prompt(s, s.dialogs[0]) for s in some]
    batch = processor.collate(encoded, padding_side=side)
    return {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}


def test_keeping_all_is_no_pruner_bit_for_bit(make_model):
    model, processor = model_with(make_model, keep_ratio=1.0)
    plain, _ = model_with(make_model)
    inputs = ask(processor, "is there a red circle?", "what color?")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_the_whole_model_is_the_formula_spelt_out(make_model):
    """Encoder, eager matrix, topk, projector, LLM: each by itself, as the paper's text has it."""
    model, processor = model_with(make_model, "dense", num_keep=6)
    inputs = ask(processor, "is there a red circle?")
    tower = model.vision.tower
    with torch.no_grad():
        got = model(**inputs)
        tower.set_attn_implementation("eager")
        out = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        scores = out.attentions[-1][:, :, 0, 1:].mean(1)[0]  # the tower ends behind the block that made the features
        keep = scores.topk(6).indices.sort().values
        assert got.image_kept.keep[0].tolist() == keep.tolist()
        tokens = model.projector(ImageFeatures(out.hidden_states[-1][:, 1:][:, keep], None))
        embeds = model.llm.embed(inputs["input_ids"])
        embeds[inputs["input_ids"] == model.image_token_id] = tokens[0]
        want = model.llm.lm(inputs_embeds=embeds).logits
    torch.testing.assert_close(got.logits, want, atol=2e-6, rtol=1e-5)


def test_dropping_equals_masking_where_positions_leave_no_gap(make_model):
    model, processor = model_with(make_model, "dense", num_keep=6)
    full, wide = model_with(make_model)
    inputs, long = ask(processor, "what color is the square?"), ask(wide, "what color is the square?")
    with torch.no_grad():
        dropped = model(**inputs)
        slots = (long["input_ids"] == full.image_token_id)[0].nonzero().flatten()
        mask = long["attention_mask"].clone()
        mask[0, slots] = 0
        mask[0, slots[dropped.image_kept.keep[0]]] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # of the tokens that are left
        masked = full(**{**long, "attention_mask": mask, "position_ids": positions})
    torch.testing.assert_close(dropped.logits, masked.logits[:, mask[0].bool()], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_unlike_questions_is_each_alone(make_model, side):
    model, processor = model_with(make_model, num_keep=6)
    questions = ["what color is the square in the middle?", "how many?", "is there a red circle?"]
    together = ask(processor, *questions, side=side)
    with torch.no_grad():
        logits = model(**together).logits
        for i in range(3):
            mask = together["attention_mask"][i : i + 1]
            real = mask[0].bool()
            one = {"input_ids": together["input_ids"][i : i + 1, real], "attention_mask": mask[:, real]}
            alone = model(**one, pixel_values=together["pixel_values"][i : i + 1]).logits
            torch.testing.assert_close(logits[i : i + 1, real], alone, atol=1e-5, rtol=1e-5)


def test_every_layer_caches_the_kept_tokens_and_no_others(make_model):
    model, processor = model_with(make_model, num_keep=6)
    inputs = ask(processor, "how many shapes are there?")
    text = int((inputs["input_ids"] != model.image_token_id).sum())
    assert processor.num_image_tokens == model.num_image_tokens == 6
    assert inputs["input_ids"].shape[1] == text + 6
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    cache = cache_of(out)
    assert {cache.get_seq_length(i) for i in range(2)} == {text + 6 + 3}  # the last token written is not read


def test_the_question_changes_no_score(make_model):
    model, processor = model_with(make_model, num_keep=6)
    first, second = (ask(processor, q) for q in ("how many?", "what color is the square?"))
    with torch.no_grad():
        a, b = model(**first).image_kept, model(**second).image_kept
    assert torch.equal(a.keep, b.keep) and torch.equal(a.cls_attention, b.cls_attention)


def test_crops_and_frames_are_chosen_from_one_by_one():
    image = features(m=5, rows=(3, 2), row_kind="crop")
    image.cls_attention[0] *= 100  # a crop that all look at takes nothing from the others
    out = build(num_keep=6)(image)
    assert out.tokens.shape == (5, 6, 24) and out.rows == (3, 2) and out.row_kind == "crop"
    for i in range(5):
        assert set(out.keep[i].tolist()) == set(image.cls_attention[i].topk(6).indices.tolist())


def test_pooled_tokens_are_ranked_by_pooled_scores():
    image = features(m=2, grid=(4, 6))
    pooled = registry.build("pruner", {"name": "pool"}, grid=(4, 6))(image)
    out = registry.build("pruner", {"name": "fastervlm", "num_keep": 2})(pooled)
    windows = image.cls_attention.view(2, 2, 2, 3, 2).mean((2, 4)).flatten(1)
    best = windows.topk(2, dim=1).indices.sort(dim=1).values
    for i in range(2):
        # Of the 24 patches, those of the two best windows are left, and each knows its token.
        shown = [(j // 12) * 3 + (j % 6) // 2 for j in range(24)]
        want = [best[i].tolist().index(w) if w in best[i] else -1 for w in shown]
        assert out.groups[i].tolist() == want


def siglip(**options):
    sizes = {"image_size": 32, "patch_size": 8, "depth": 2, "width": 32, "heads": 2}
    return {"vision": {"name": "hf", "model_type": "siglip", **sizes, **options}, "projector": {"name": "mlp"}} | {
        "llm": {"name": "hf", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64},
        "adapter": {},
    }


@pytest.mark.fixes
def test_an_encoder_without_cls_is_refused_with_what_would_fit():
    def plan(score, **options):
        return Plan({**siglip(**options), "pruner": {"fastervlm": {"name": "fastervlm", "score": score}}}, 360)

    with pytest.raises(RefusedError, match="'fastervlm' needs cls_attention, but vision 'hf' does not give it") as said:
        check(plan("cls"))
    assert "pruner.fastervlm.score=column_mean" in said.value.fixes
    with pytest.raises(RefusedError, match="needs pooling_head") as said:
        check(plan("probe"))
    assert "vision.pooling_head=true" in said.value.fixes
    assert check(plan("column_mean")).num_image_tokens == 4
    assert check(plan("probe", pooling_head=True)).num_image_tokens == 4


@pytest.mark.parametrize("score", ["column_mean", "probe"])
def test_siglip_is_pruned_by_what_it_has(make_model, score):
    model, processor = make_model(
        vision=siglip(pooling_head=True)["vision"], pruner={"fastervlm": {"name": "fastervlm", "score": score}}
    )
    shake(model.vision)
    with torch.no_grad():
        out = model(**ask(processor, "how many?"))
    scores = out.image.key_attention if score == "column_mean" else out.image.pooling_attention
    assert out.image_kept.keep[0].tolist() == scores[0].topk(4).indices.sort().values.tolist()
    assert out.image.cls_attention is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"num_keep": -1}, "num_keep must not be negative"),
        ({"score": "clss"}, "No score named 'clss'. Did you mean 'cls'"),
        ({"keep_ration": 0.5}, "'keep_ration'. Did you mean 'keep_ratio'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        build(**options)


def test_a_score_that_was_not_computed_says_so():
    image = ImageFeatures(torch.zeros(1, 16, 4), (4, 4))
    with pytest.raises(ZooError, match="score=cls needs cls_attention"):
        build()(image)
