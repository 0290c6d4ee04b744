"""FastVID against a twin written from its equations, the invariants of its specification, and frame summaries."""

import math
from dataclasses import replace

import pytest
import torch

import zoo
from tests.conftest import tiny_slots
from tests.video_builders import inputs_of, rows_of, video, video_model
from zoo.checking.checker import RefusedError
from zoo.checking.checker import check as check_plan
from zoo.checking.plan import Plan
from zoo.composed.behind import rescored, windows
from zoo.registry import Cut, ZooError, build

HEAD = {"summary": "head", "score": "probe"}


def fastvid(**options):
    return build("pruner", {"name": "fastvid", **options})


def film(frames=9, n=16, dim=12, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    scores = torch.rand(frames, n, generator=g).softmax(1)
    return video(frames, n, dim, seed, pooling_attention=scores, summary=torch.randn(frames, 8, generator=g).cumsum(0))


def twin(image, r=0.1, c=8, tau=0.9, d=0.4, p=4, beta=0.6, spread=True):
    """Its equations, in loops: (frame, place) -> value of each token that stays; and the scenes."""
    x, w, g = image.tokens.double(), image.pooling_attention, image.summary.double()
    frames, n, width = x.shape
    budget = max(1, int(n * r))
    f = int(budget * d)
    alike = [float(torch.cosine_similarity(g[t], g[t + 1], dim=0)) for t in range(frames - 1)]
    cuts = {t for t in range(frames - 1) if alike[t] < tau}
    cuts |= set(sorted(range(frames - 1), key=lambda t: (alike[t], t))[: c - 1])
    scenes, start = [], 0
    for t in range(frames):
        if t in cuts or t == frames - 1:
            scenes.append(list(range(start, t + 1)))
            start = t + 1
    salient = {t: sorted(range(n), key=lambda i: (-float(w[t, i]), i))[: budget - f] for t in range(frames)}
    kept = {(t, i): x[t, i] for t in range(frames) for i in salient[t]}
    rest = {t: [i for i in range(n) if i not in salient[t]] for t in range(frames)}
    for scene in scenes if f else ():
        anchors = sorted(scene[::-1][::p])
        each, more = divmod(f * len(scene), len(anchors))
        for number, t in enumerate(anchors):
            some = rest[t]
            apart = ((x[t, some][:, None] - x[t, some][None]).norm(dim=-1) / math.sqrt(width)).tolist()
            far = {(i, j): apart[a][b] for a, i in enumerate(some) for b, j in enumerate(some)}
            rho = {i: math.exp(-sum(sorted(far[i, j] ** 2 for j in some)[:4]) / min(4, len(some))) for i in some}
            most = max(far.values())
            delta = {i: min([far[i, j] for j in some if rho[j] > rho[i]] or [most]) for i in some}
            best = sorted(some, key=lambda i: (-rho[i] * delta[i], i))[: each + (spread and number < more)]
            joined = {i: [] for i in best}
            for u in scene if best else ():
                cosines = torch.cosine_similarity(x[u, rest[u]][:, None], x[t, sorted(best)][None], dim=-1).tolist()
                for j, cosine in zip(rest[u], cosines, strict=True):
                    joined[sorted(best)[cosine.index(max(cosine))]].append(x[u, j])
            for i, members in joined.items():
                k = len(members)
                b = max(1 / (k + 1), beta)
                kept[t, i] = b * x[t, i] + (1 - b) * torch.stack(members).mean(0) if k else x[t, i]
    return kept, scenes


def check(image, **options):
    names = {"r": "keep_ratio", "c": "scenes", "tau": "similarity", "d": "context_ratio", "p": "stride"}
    given = {names.get(k, k): v for k, v in options.items() if k != "spread"}
    part = fastvid(**HEAD, **given, remainder="spread" if options.get("spread", True) else "floor")
    wanted, scenes = twin(image, **options)
    found = part(image)
    assert {tuple(at) for at in found.valid.nonzero().tolist()} == wanted.keys()
    for (t, i), value in wanted.items():
        torch.testing.assert_close(found.tokens[t, i].double(), value, atol=1e-5, rtol=1e-5)
    assert [list(s) for s in part._scenes(image)] == scenes and sum(map(len, scenes)) == len(image.tokens)
    count = part.tokens_of_image(image.tokens.shape[1], image.cuts[0])
    assert len(wanted) == count if options.get("spread", True) else len(wanted) <= count
    return found, scenes


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"r": 0.4, "c": 1, "tau": -1.0}, {"r": 0.4, "c": 3, "tau": -1.0}, {"r": 0.5, "c": 2, "tau": 0.8, "p": 2},
     {"r": 0.3, "d": 1.0}, {"r": 0.6, "d": 0.0}, {"r": 0.45, "c": 2, "p": 3, "beta": 0.0}, {"r": 0.25, "c": 9}],
)  # fmt: skip
def test_it_is_its_equations_spelt_out(options, spread):
    check(film(seed=len(options)), spread=spread, **options)


def test_official_settings_at_the_official_size():
    image = film(12, 196, 32)
    found, scenes = check(image, c=8, spread=False)
    part = fastvid(preset="as_released")
    assert part.budget(196) == 19 and torch.equal(part(image).valid, found.valid) and len(scenes) >= 8
    context = sum(math.ceil(len(s) / 4) * (7 * len(s) // math.ceil(len(s) / 4)) for s in scenes)
    assert int(found.valid.sum()) == 12 * 12 + context
    assert fastvid().tokens_of_image(196, Cut(32, "frame")) == 32 * 19  # 90.3 % fewer
    assert fastvid(keep_ratio=0.01).budget(16) == 1


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7, 0.95])
def test_a_video_keeps_its_count_whatever_its_scenes(frames, ratio):
    for seed, scenes in enumerate((1, 3, 8)):
        image = film(frames, seed=seed)
        part = fastvid(keep_ratio=ratio, scenes=scenes, similarity=0.5, **HEAD)
        assert int(part(image).valid.sum()) == part.tokens_of_image(16, image.cuts[0]) == frames * part.budget(16)
        assert len(part._scenes(image)) >= min(scenes, frames)
        floor = fastvid(keep_ratio=ratio, scenes=scenes, similarity=0.5, remainder="floor", **HEAD)
        assert int(floor(image).valid.sum()) <= frames * part.budget(16)


def test_salient_tokens_pass_and_merging_is_a_mean():
    image = film()
    part = fastvid(keep_ratio=0.5, scenes=2, **HEAD)
    found = part(image)
    salient = image.pooling_attention.argsort(1, descending=True)[:, : 8 - int(8 * 0.4)]
    at = salient.unsqueeze(-1).expand(-1, -1, 12)
    assert torch.equal(found.tokens.gather(1, at), image.tokens.gather(1, at))
    assert bool(found.valid.gather(1, salient).all())
    changed = (found.tokens != image.tokens).any(-1)
    assert bool((changed <= found.valid).all()) and int(changed.sum()) > 0
    pure = fastvid(keep_ratio=0.5, scenes=2, beta=1.0, **HEAD)(image)
    torch.testing.assert_close(pure.tokens, image.tokens, atol=0, rtol=0)
    assert torch.equal(pure.valid, found.valid)
    same = replace(image, tokens=image.tokens[:1, :1].expand_as(image.tokens))
    torch.testing.assert_close(part(same).tokens, same.tokens, atol=1e-6, rtol=0)


def test_a_cut_is_a_border_and_frames_by_themselves_have_targets_of_their_own():
    image = film(8)
    image.summary = torch.eye(8)[[0, 0, 0, 1, 1, 1, 1, 1]]
    assert fastvid(scenes=1, **HEAD)._scenes(image) == [range(3), range(3, 8)]
    part = fastvid(keep_ratio=0.5, scenes=8, **HEAD)
    assert part(image).valid.sum(1).tolist() == [8] * 8


def test_places_permuted_alike_permute_the_result():
    image = film(seed=5)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    part = fastvid(keep_ratio=0.5, scenes=2, **HEAD)
    one = part(image)
    moved = replace(image, tokens=image.tokens[:, order], pooling_attention=image.pooling_attention[:, order])
    other = part(moved)
    assert torch.equal(one.valid[:, order], other.valid)
    torch.testing.assert_close(one.tokens[:, order], other.tokens, atol=1e-6, rtol=1e-5)


def test_gradients_reach_what_was_merged():
    image = film()
    image.tokens.requires_grad_()
    found = fastvid(keep_ratio=0.4, scenes=1, similarity=-1.0, **HEAD)(image)
    found.tokens[found.valid].square().sum().backward()
    assert bool((image.tokens.grad.abs().sum(-1) > 0).float().mean() > 0.95)  # through means, where targets moved


def test_images_and_whole_budgets_are_left_alone():
    image = film()
    assert fastvid(keep_ratio=1.0, **HEAD)(image) is image
    crops = replace(image, row_kind="crop")
    assert fastvid(**HEAD)(crops) is crops and fastvid().tokens_of_image(16, Cut(3, "crop")) == 48


def test_options_and_what_they_need():
    for wrong in (
        {"keep_ratio": 0}, {"scenes": 0}, {"stride": 0}, {"context_ratio": 1.1}, {"beta": -0.1}, {"summary": "cls"},
        {"score": "head"}, {"remainder": "up"},
    ):  # fmt: skip
        with pytest.raises(ZooError):
            fastvid(**wrong)
    assert fastvid(summary="head").needs == {"pooling_head", "summary"} and fastvid().needs == {"key_attention"}
    assert fastvid(score="cls").needs == {"cls_attention"}
    with pytest.raises(ZooError, match="summary=head needs summary"):
        fastvid(keep_ratio=0.5, **HEAD)(replace(film(), summary=None))
    with pytest.raises(ZooError, match="needs pooling_head"):
        fastvid(**HEAD)(replace(film(), pooling_attention=None))


# ---- with an encoder that has the head -----------------------------------------------------------------------------

SIGLIP = {"name": "hf", "model_type": "siglip", "image_size": 32, "patch_size": 8, "width": 32, "heads": 2, "depth": 2}


def test_scores_of_merged_patches_are_the_means_of_their_windows():
    image = replace(film(2), grid=(4, 4), block_attention={"key_attention@1": torch.rand(2, 16)})
    found = rescored(image, (2, 2), 4)
    maps = image.pooling_attention.view(2, 2, 2, 2, 2)  # (T, rows, in a row, columns, in a column)
    torch.testing.assert_close(found.pooling_attention, maps.mean((2, 4)).flatten(1))
    assert found.block_attention["key_attention@1"].shape == (2, 4) and found.summary is image.summary
    assert rescored(image, None, 4).pooling_attention is None and rescored(image, (4, 4), 16) is image
    assert [windows((4, 4), into) for into in ((2, 2), (4, 1), (3, 2), (4, 4), None)] == [
        (2, 2), (1, 4), (1, 1), (1, 1), (1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("projector", ["mlp", "pixel_shuffle"])
@pytest.mark.parametrize("layout", ["frames", "bilinear", "average"])
def test_in_a_model_scores_follow_the_pooling_of_frames(make_model, layout, projector):
    node = {"name": "fastvid", "keep_ratio": 0.4, "scenes": 2, "summary": "head"}
    vision = {**SIGLIP, "layer": -2, "summary": True}
    model, processor = video_model(make_model, node, layout, vision=vision, projector={"name": projector})
    batch = processor.collate(rows_of(processor))
    with torch.no_grad():
        encoded = model.encode_images(batch["pixel_values"], batch["cuts"])
        out = model(**inputs_of(batch))
        alone = [model(**inputs_of(processor.collate([row]))).logits[0] for row in rows_of(processor)]
    assert encoded.image.summary.shape == (14, 32) and encoded.image.pooling_attention.shape == (14, 16)
    for logits, valid, one in zip(out.logits, out.sequence.attention_mask.bool(), alone, strict=True):
        torch.testing.assert_close(logits[valid], one, atol=2e-5, rtol=1e-4)
    n = model.layout.frame_tokens(batch["cuts"][0])
    of_image = 16 if projector == "mlp" else 4
    kept = 13 * max(1, int(n * 0.4)) + of_image + (layout != "frames") + 2 * (layout == "bilinear")
    assert int(out.sequence.image_mask.sum()) == kept


def test_a_model_with_a_whole_head_is_saved_and_loaded(make_model, tmp_path):
    node = {"name": "fastvid", "keep_ratio": 0.4, "scenes": 2, "summary": "head"}
    model, processor = video_model(make_model, node, vision={**SIGLIP, "layer": -2, "summary": True})
    assert not any(n.startswith("vision.pooling") for n, _ in model.named_parameters())
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    again, _ = zoo.load(f"dir:{tmp_path}")
    batch = inputs_of(processor.collate(rows_of(processor)))
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.fixes
@pytest.mark.parametrize(
    ("vision", "fix"),
    [({**SIGLIP, "layer": -1}, "vision.summary=true"), ({**SIGLIP, "name": "timm"}, "pruner.fastvid.summary=mean")],
)
def test_the_check_offers_a_head_or_a_mean(vision, fix):
    vision.pop("model_type") if vision["name"] == "timm" else None
    slots = tiny_slots(vision=vision, pruner={"fastvid": {"name": "fastvid", "summary": "head"}})
    with pytest.raises(RefusedError, match=f"needs pooling_head, summary, but vision '{vision['name']}'") as refused:
        check_plan(Plan({**slots, "layout": {"name": "frames"}}, 360), fixes=1)
    assert refused.value.fixes == [fix]
