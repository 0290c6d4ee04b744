"""CDPruner: the spec's equations with whole matrices, invariants of its choice, and what the question decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import zoo
from tests import vision_builders
from tests.conftest import sample, tiny_slots
from tests.fusion_builders import features, image_row
from tests.saved_builders import checkpoints
from zoo import registry
from zoo.checking.checker import check
from zoo.checking.plan import Plan
from zoo.composed.assembly import assemble
from zoo.fusion.pruners.cdpruner import greedy, mean_cosine
from zoo.registry import ImageFeatures, Question, ZooError


def build(**options):
    return registry.build("pruner", {"name": "cdpruner", **options})


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def released(y, patches, words, k, sign=-1, theta=None):
    """The indices of one prompt by the authors' steps, in float64 with whole matrices; y, patches (B, N, .), words."""
    y, patches, words = (np.asarray(v, dtype=np.float64) for v in (y, patches, words))
    s = sign * (unit(patches) @ unit(words).T).mean(-1)  # (B, N)
    r = (s - s.min() + 1e-6) / (s.max() - s.min())
    if theta is not None:
        r = np.exp(theta / (2 * (1 - theta)) * r)
    found = []
    for x, weight in zip(unit(y), r, strict=True):
        kernel = weight[:, None] * (x @ x.T) * weight  # (N, N)
        d, rows, picks = weight**2, [], []  # its diagonal; exactly, for ties
        for _ in range(k):
            j = int(d.argmax())
            row = (kernel[j] - sum((c[j] * c for c in rows), np.zeros(len(d)))) / np.sqrt(d[j])
            rows.append(row)
            d = d - row**2
            d[j] = -np.inf
            picks.append(j)
        found.append(picks)
    return found


def given(b=2, n=20, c=16, p=6, seed=0, prompts=None):
    """Features of `b` rows of one prompt, and the arrays that they hold."""
    g = torch.Generator().manual_seed(seed)
    y, patches, words = (torch.randn(*shape, generator=g) for shape in ((b, n, c), (b, n, p), (3, p)))
    asked = Question(torch.zeros(b, dtype=torch.long) if prompts is None else prompts, ("what?",) * b)
    asked.text_embeds, asked.text_mask = words.expand(b, -1, -1), torch.ones(b, 3, dtype=torch.bool)
    image = ImageFeatures(torch.randn(b, n, 10, generator=g), None, patch_embeds=patches, projected=y, question=asked)
    return image, (y, patches, words)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("theta", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_choices_are_those_of_the_equations_with_whole_matrices(sign, theta, seed):
    image, arrays = given(seed=seed)
    pruner = build(num_keep=9, sign=sign, theta=theta)
    assert pruner.choose(image, 9).tolist() == released(*arrays, 9, sign, theta)
    assert pruner(image).keep.tolist() == [sorted(x) for x in released(*arrays, 9, sign, theta)]


def test_every_choice_has_the_largest_determinant():
    image, (y, _, _) = given(1, 9)
    pruner = build(num_keep=4)
    r = pruner.relevance(image)[0].double()
    x = F.normalize(y[0].double(), dim=-1)
    kernel, chosen = r[:, None] * (x @ x.T) * r, []
    for _ in range(4):
        gains = [torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) if i not in chosen else -1 for i in range(9)]
        chosen.append(int(np.argmax([float(v) for v in gains])))
    assert pruner.choose(image, 4)[0].tolist() == chosen
    best = torch.logdet(kernel[chosen][:, chosen])
    for seed in range(100):
        some = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:4]
        assert torch.logdet(kernel[some][:, some]) <= best + 1e-9 or seed < 0


def test_the_first_choices_do_not_depend_on_how_many_follow():
    image, _ = given(n=30)
    order = build().choose(image, 12)
    for k in (1, 5, 11):
        assert torch.equal(build().choose(image, k), order[:, :k])


def test_orthogonal_tokens_are_kept_by_relevance_and_lengths_count_nothing():
    image, (y, _, _) = given(1, 12, 12)
    image.projected = torch.eye(12).unsqueeze(0) * torch.rand(1, 12, 1)
    pruner = build(num_keep=5)
    assert pruner.choose(image, 5)[0].tolist() == pruner.relevance(image)[0].argsort(descending=True)[:5].tolist()
    image.projected = y
    longer = replace(image, projected=y * (0.1 + torch.rand(1, 12, 1)))
    assert torch.equal(pruner.choose(image, 5), pruner.choose(longer, 5))


def test_permuted_patches_give_the_permuted_set():
    image, _ = given(1, 15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    moved = replace(image, **{n: getattr(image, n)[:, order] for n in ("tokens", "projected", "patch_embeds")})
    assert [int(order[i]) for i in build().choose(moved, 6)[0]] == build().choose(image, 6)[0].tolist()


def test_a_spent_span_is_filled_by_relevance_and_never_twice():
    """More tokens than dimensions, copies of tokens, and all of them."""
    for k in (3, 8, 20):
        image, _ = given(2, 20, 3)
        order = build().choose(image, k)
        assert all(len(set(row)) == k for row in order.tolist())
        r = build().relevance(image)
        for row, own in zip(order, r, strict=True):
            assert torch.equal(own[row[3:]], own[row[3:]].sort(descending=True).values), "by relevance behind the span"
    image, _ = given(1, 10, 16)
    image.projected = torch.cat([image.projected[:, :5]] * 2, dim=1)
    image.patch_embeds = torch.cat([image.patch_embeds[:, :5]] * 2, dim=1)
    assert sorted(i % 5 for i in build().choose(image, 5)[0].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(build().choose(image, 10)[0].tolist()) == list(range(10))
    everything = build(keep_ratio=1.0)
    assert everything(image) is image


def test_equal_relevance_and_no_question_are_diversity_alone():
    image, (_, _, words) = given(1)
    plain = build(relevance="none").choose(image, 8)
    constant = replace(image, patch_embeds=words[0].expand(1, 20, -1).clone())
    assert torch.equal(build().choose(constant, 8), plain)
    silent = replace(image.question, texts=("",))
    assert torch.equal(build().choose(replace(image, question=silent), 8), plain)
    assert not torch.equal(build(as_released=True).choose(replace(image, question=silent), 8), plain)
    none = Question(torch.zeros(1, dtype=torch.long), mask=torch.zeros(1, 0).bool(), embeds=torch.zeros(1, 0, 16))
    by_words = build(relevance="embeddings")
    assert torch.equal(by_words.choose(replace(image, question=none), 8), plain)


def test_crops_of_a_prompt_share_the_range_of_relevance_and_other_prompts_do_not():
    image, arrays = given(3, prompts=torch.tensor([0, 0, 4]))
    y, patches, words = arrays
    first, last = released(y[:2], patches[:2], words, 7), released(y[2:], patches[2:], words, 7)
    assert build().choose(image, 7).tolist() == [*first, *last]
    crop = build(normalise="crop").choose(image, 7).tolist()
    assert crop == [released(y[i : i + 1], patches[i : i + 1], words, 7)[0] for i in range(3)]


def test_embeddings_compare_projected_tokens_with_words_and_padding_counts_nothing():
    image = features(m=4)
    asked, pruner = image.question, build(relevance="embeddings", normalise="crop", num_keep=6)
    for i in range(4):
        words = asked.embeds[i][asked.mask[i]]
        want = released(image.projected[i : i + 1], image.projected[i : i + 1], words, 6)
        assert pruner.choose(image, 6)[i].tolist() == want[0]
    cosines = F.cosine_similarity(image.projected[:, :, None], asked.embeds[:, None], dim=-1)
    want = (cosines * asked.mask[:, None]).sum(-1) / asked.mask.sum(1)[:, None]
    torch.testing.assert_close(mean_cosine(image.projected, asked.embeds, asked.mask), want)


@pytest.mark.parametrize("options", [{}, {"relevance": "embeddings"}, {"relevance": "none"}, {"as_released": True}])
def test_sixteen_rows_are_each_alone_also_in_bf16(options):
    image = features(m=16, grid=(6, 6))
    pruner = build(num_keep=7, **options)
    order = pruner.choose(image, 7)
    for i in range(16):
        assert torch.equal(pruner.choose(image_row(image, i), 7)[0], order[i])
    short = replace(image, tokens=image.tokens.bfloat16(), projected=image.projected.bfloat16())
    assert pruner(short).tokens.shape == (16, 7, 24)


def test_no_array_has_n_times_n_numbers():
    image = features(m=1, grid=(40, 40))
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(x, "numel"))
            return out

    with Sizes():
        build().choose(image, 64)
    assert max(largest) <= 1600 * 64


def test_options_out_of_range_are_refused_and_the_release_is_a_preset():
    for options, why in (
        ({"sign": 0}, "sign must be -1 or 1"),
        ({"theta": 1.0}, "theta must be in"),
        ({"relevance": "clop"}, "clip"),
        ({"similarity": "none"}, "encoder"),
        ({"num_keep": -1}, "num_keep"),
    ):
        with pytest.raises(ZooError, match=why):
            build(**options)
    assert build(preset="llava15_64").num_tokens(576) == 64 and build(num_keep=99).num_tokens(20) == 20
    assert build(preset="embeddings").needs == {"question", "projected"}
    assert build(relevance="none", similarity="encoder").needs == set()
    with pytest.raises(ZooError, match="needs text_tower"):
        build().choose(replace(given()[0], patch_embeds=None), 3)


# ---- in a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = checkpoints(tmp_path_factory.mktemp("cdpruner"))
    vision_builders.clip_checkpoint(root / "clip")
    return root


def composed(places, *words):
    parts = ["vision=hf", f"vision.checkpoint={places / 'clip'}", f"llm.checkpoint={places / 'llm'}", "llm=hf"]
    return zoo.compose(*parts, "projector=linear", "device=cpu", "pruner=[cdpruner]", *words)


@torch.no_grad()
def test_another_question_keeps_other_patches_and_the_text_tower_decides(places, tmp_path):
    model, processor = composed(places, "pruner.cdpruner.num_keep=5")
    rows = processor.collate([processor.encode(sample((q, "yes"))) for q in ("is it red", "how many", "is it red")])
    kept = model(**rows).image_kept
    assert kept.keep[0].tolist() == kept.keep[2].tolist() != kept.keep[1].tolist()
    encoder, pixels = model.vision, rows["pixel_values"][:1]
    image = encoder(pixels, need=frozenset({"text_tower"}))
    words = encoder.embed_texts(["is it red"])[0]
    want = released(model.projector(image), image.patch_embeds, words, 5)
    assert kept.keep[0].tolist() == sorted(want[0])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, _ = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert torch.equal(again(**rows).image_kept.keep, kept.keep)
    net, _ = composed(places, "pruner.cdpruner.relevance=embeddings", "pruner.cdpruner.num_keep=5")
    assert net.vision.text is None and net.chat("is it red", image=sample(("", "")).images[0], max_new_tokens=2) != "a"


@pytest.mark.fixes
def test_an_encoder_without_a_text_tower_is_refused_with_what_fits():
    with pytest.raises(ZooError, match="needs text_tower, but vision 'timm' does not give it") as refusal:
        check(Plan(tiny_slots(pruner={"cdpruner": {}}), vocab_size=360))
    assert "pruner.cdpruner.relevance=embeddings" in refusal.value.fixes
    with torch.device("meta"):
        parts = assemble(tiny_slots(pruner={"cdpruner": {"relevance": "none"}}), vocab_size=360)
    assert not parts.asks and "projected" in parts.pruner["cdpruner"].needs


def test_an_exhausted_kernel_in_float32_is_found_at_every_scale():
    g = torch.Generator().manual_seed(0)
    for rank in (1, 2, 5):
        x = F.normalize(torch.randn(1, 40, rank, generator=g) @ torch.randn(rank, 64, generator=g), dim=-1)
        for low in (1e-5, 1e-2, 1.0):
            r = low + (1 - low) * torch.rand(1, 40, generator=g)
            order = greedy(x, r, 12)[0]
            assert len(set(order.tolist())) == 12
            rest = r[0, order[rank:]]
            assert torch.equal(rest, rest.sort(descending=True).values)
