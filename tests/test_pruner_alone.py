"""A pruner without a composed model: what it needs, what it gives, and its answers in a plain transformers LLaVA."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from tests import published_builders as build
from tests.fusion_builders import features
from zoo import registry
from zoo.registry import ImageFeatures, Pruner, register

ROOT = Path(__file__).resolve().parents[1]
GRID, N, DIM = (4, 6), 24, 24
GIVEN = {"cls_attention", "key_attention", "pooling_head", "keys", "prefix_tokens", "grid", "key_attention@1"}


def alone(name, **given):
    return zoo.pruner(name, **{"grid": GRID, "vision_dim": DIM, "vision_depth": 3, **given})


def before_llm() -> list[str]:
    """Pruners that act on the encoder's features: not inside the LLM, and not in front of the encoder."""
    found = {name: registry.get("pruner", name) for name in registry.names("pruner")}
    return [name for name, entry in found.items() if "image_tokens" not in entry.needs and not entry.cls.front]


def image_for(**given):
    return features(m=3, grid=GRID, dim=DIM, prefix=torch.zeros(3, 1, DIM), **given)


def known_of(image: ImageFeatures) -> dict:
    """The fields beside tokens and grid that are set."""
    known = {f.name: getattr(image, f.name) for f in fields(image) if f.name not in ("tokens", "grid")}
    return {name: value for name, value in known.items() if value is not None}


# ---- torch is the only dependency --------------------------------------------------------------------------------

WITHOUT = """
import sys
OTHERS = {"accelerate", "huggingface_hub", "hydra", "matplotlib", "numpy", "omegaconf", "open_clip", "peft", "PIL",
          "psutil", "rich", "sacrebleu", "safetensors", "timm", "tokenizers", "torchvision", "transformers", "yaml"}


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing())
import torch, zoo

torch.manual_seed(0)
m, h, w, d = 2, 4, 6, 8
n = h * w
scores = lambda: torch.rand(m, n).softmax(1)
everything = {"cls_attention": scores(), "key_attention": scores(), "pooling_attention": scores(),
              "keys": torch.randn(m, n, 2, 4), "prefix": torch.randn(m, 1, d), "key_attention@1": scores(),
              "next_attention": scores(), "next_keys": torch.randn(m, n, 8)}
from zoo.registry import get, names

for name in names("pruner"):
    if "image_tokens" in get("pruner", name).needs or get("pruner", name).cls.front:
        continue
    prune = zoo.pruner(name, grid=(h, w), vision_dim=d, vision_depth=3)
    print(name)
    if prune.needs - GIVEN:
        continue
    pruned = prune(torch.randn(m, n, d), **everything)
    assert pruned.tokens.shape == (m, prune.kept, d) and pruned.positions.shape == (m, prune.kept), name
assert zoo.pruner("fastervlm", keep_ratio=1, num_tokens=4).kept == 4  # a whole number for a float
for mistake in ({"keep_ratio": "a"}, {"keep_rato": 0.5}, {"keep_ratio": 2.0}, {"score": "none"}):
    try:
        zoo.pruner("fastervlm", num_tokens=4, **mistake)
    except zoo.ZooError as error:
        assert str(error).startswith(("pruner 'fastervlm'", "No option of pruner 'fastervlm'")), error
    else:
        raise AssertionError(mistake)
assert not OTHERS & set(sys.modules), OTHERS & set(sys.modules)
"""


def test_torch_is_the_only_dependency():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", f"GIVEN = {GIVEN}{WITHOUT}"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == before_llm()


# ---- the registered class, its shapes and its errors -------------------------------------------------------------


@pytest.mark.parametrize("name", before_llm())
@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_it_gives_what_a_composed_model_gets(name, positions):
    image = image_for()
    prune = alone(name, positions=positions)
    if unknown := prune.needs - GIVEN - {"question", "text_tower", "projected"}:
        pytest.skip(f"needs {', '.join(unknown)}")
    pruned = prune(image.tokens, **known_of(image))
    part = registry.build("pruner", {"name": name}, vision_dim=DIM, vision_depth=3, grid=GRID, num_tokens=N).eval()
    left = part(image) if positions == "dense" else part(image).placed(N)
    assert type(prune.part) is type(part) and prune.needs == part.needs
    assert torch.equal(pruned.tokens, left.tokens)
    for given, expected in ((pruned.keep, left.keep), (pruned.groups, left.groups)):
        assert (given is None) == (expected is None) and (given is None or torch.equal(given, expected))
    k = prune.kept
    assert torch.equal(pruned.valid, torch.ones(3, k).bool() if left.valid is None else left.valid)
    assert pruned.counts == ([k] * 3 if left.valid is None else left.valid.sum(1).tolist())
    assert pruned.lengths == ([N] * 3 if positions == "kept" else pruned.counts)
    for places, valid, count in zip(pruned.positions, pruned.valid, pruned.counts, strict=True):
        assert (places[valid].diff() > 0).all() and places[valid].max() < N
        assert positions == "kept" or places[valid].tolist() == list(range(count))


def test_it_draws_for_each_image_by_its_pixels():
    image, pixels = image_for(), torch.rand(3, 3, 8, 8)
    prune = alone("random")
    one = [prune(image.tokens[i : i + 1], pixel_values=pixels[i : i + 1]).keep for i in range(3)]
    together = prune(image.tokens, pixel_values=pixels).keep
    assert torch.equal(torch.cat(one), together) and len(together.unique(dim=0)) == 3
    assert len(prune(image.tokens).keep.unique(dim=0)) == 1


def test_a_preset_is_an_option():
    prune = zoo.pruner("fastervlm", preset="llava15_144", grid=(24, 24))
    assert prune.kept == 144
    with pytest.raises(zoo.ZooError, match="No preset of pruner 'fastervlm' named 'llava15_143'"):
        zoo.pruner("fastervlm", preset="llava15_143", grid=(24, 24))


def test_a_block_is_given_by_its_word():
    image = image_for()
    known = {"key_attention": image.key_attention, "key_attention@1": image.block_attention["key_attention@1"]}
    prune = alone("hiprune", alpha=0.5, keep_ratio=0.5)
    assert prune.needs == {"key_attention", "grid", "key_attention@1"}
    assert torch.equal(prune(image.tokens, **known).keep, prune(image.tokens, **known_of(image)).keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zoo.pruner("rndom", grid=GRID), "Did you mean 'random'"),
        (lambda: zoo.pruner("rndom"), "Did you mean 'random'"),
        (lambda: zoo.pruner("random", keep_rato=0.5, grid=GRID), "Did you mean 'keep_ratio'"),
        (lambda: zoo.pruner("random", keep_ratio=2.0, grid=GRID), r"keep_ratio must be in \(0, 1\]"),
        (lambda: zoo.pruner("random"), r"set grid=\(h, w\), or num_tokens"),
        (lambda: zoo.pruner("random", grid=GRID, num_tokens=25), "has 24 tokens, got num_tokens=25"),
        (lambda: zoo.pruner("random", grid=GRID, positions="keept"), "Did you mean 'kept'"),
        (lambda: zoo.pruner("fastv", grid=GRID), "acts between layers of the LLM"),
        (lambda: zoo.pruner("downsample", grid=GRID), "acts in front of the encoder"),
        (lambda: alone("random")(torch.zeros(1, 23, DIM)), r"made for tokens \(M, 24, D\), got \(1, 23, 24\)"),
        (lambda: alone("fastervlm")(torch.zeros(1, 24, DIM)), "needs cls_attention: pass them"),
        (lambda: zoo.pruner("pool", num_tokens=24)(torch.zeros(1, 24, DIM)), r"zoo.pruner\('pool', grid=\(h, w\)\)"),
        (lambda: alone("fastervlm")(torch.zeros(1, 24, 8), cls_atention=torch.zeros(1, 24)), "'cls_attention'"),
        (lambda: alone("fastervlm")(torch.zeros(1, 24, 8), cls_attention=torch.zeros(1, 25)), "without the columns"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(zoo.ZooError, match=message):
        make()


# ---- a plain transformers LLaVA ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "llava"
    model, processor = build.llava(folder)
    model.set_attn_implementation({"vision_config": "eager"})
    return folder, model, processor


@pytest.fixture(scope="module")
def documented():
    """The function of docs/how_to/anywhere.md."""
    page = (ROOT / "docs" / "how_to" / "anywhere.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "def answer(" in block)
    names: dict = {}
    exec(code, names)
    assert len(code.partition("def answer")[2].strip().splitlines()) == 11  # the head, and ten lines
    return names["answer"]


def answers(model, processor, prune, prompts, photos, **options):
    """As the documented lines, with all that a pruner may need."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    pixels = processor.image_processor(photos, return_tensors="pt").pixel_values
    seen = tower(pixels, output_hidden_states=True, output_attentions=True)
    hidden, scores = seen.hidden_states[layer], seen.attentions[layer]  # (M, H, 1 + N, 1 + N) of the block before
    block = tower.encoder.layers[layer]
    keys = block.self_attn.k_proj(block.layer_norm1(seen.hidden_states[layer - 1]))[:, 1:]
    pruned = prune(
        hidden[:, 1:],
        prefix=hidden[:, :1],
        cls_attention=scores[:, :, 0, 1:].float().mean(1),
        key_attention=scores[..., 1:].float().mean((1, 2)),
        keys=keys.unflatten(-1, (-1, block.self_attn.head_dim)),
        pixel_values=pixels,
    )
    assert pruned.counts == [prune.kept] * len(photos)
    texts = [prompt.replace("<image>", "<image>" * prune.kept) for prompt in prompts]
    given = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    shown = given.input_ids == model.config.image_token_id
    image = model.model.multi_modal_projector(pruned.tokens)
    embeds = model.get_input_embeddings()(given.input_ids).masked_scatter(shown[..., None], image)
    places = {"attention_mask": given.attention_mask, "position_ids": pruned.position_ids(shown, given.attention_mask)}
    return model.generate(inputs_embeds=embeds, **places, **options)


def chosen(name, **options):
    """Words of `zoo.load` and a pruner alone with the same options."""
    words = [f"pruner=[{name}]", *(f"pruner.{name}.{key}={value}" for key, value in options.items())]
    return words, lambda **given: zoo.pruner(name, **options, grid=(4, 4), vision_dim=32, vision_depth=4, **given)


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastervlm", {"keep_ratio": 0.25}),
        ("visionzip", {"keep_ratio": 0.5}),
        ("random", {"keep_ratio": 0.4, "seed": 3}),
        ("pool", {}),
        ("fastervlm", {"score": "column_mean", "num_keep": 3}),
    ],
)
def test_a_plain_llava_answers_as_the_composed_model(llava, documented, name, options, positions):
    """Three rows of unlike length, padded on the left; the last one shows two pictures."""
    folder, model, processor = llava
    words, make = chosen(name, **options)
    composed, ours = zoo.load(f"dir:{folder}", *words, f"positions={positions}")
    photos = [build.photo(40, 60, seed=i) for i in range(4)]
    prompts = [
        "USER: <image>\nis there a red circle? ASSISTANT:",
        "USER: <image>\ndescribe the picture. two two blue ASSISTANT:",
        "USER: <image>\nyes no<image>\nred ASSISTANT:",
    ]
    options = {"do_sample": False, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    prune = make(positions=positions)
    found = answers(model, processor, prune, prompts, photos, **options)
    if prune.needs == {"cls_attention"}:
        again = documented(model, processor, prune, prompts, photos, **options)
        assert torch.equal(again.sequences, found.sequences) and torch.equal(again.logits[7], found.logits[7])
    other = answers(
        model, processor, make(positions={"kept": "dense", "dense": "kept"}[positions]), prompts, photos, **options
    )
    shown = [photos[:1], photos[1:2], photos[2:]]
    for row, (prompt, pictures) in enumerate(zip(prompts, shown, strict=True)):
        given = ours(images=pictures, text=prompt, return_tensors="pt")
        out = composed.generate(**given, **options)
        steps = len(out.logits)
        assert found.sequences[row, :steps].tolist() == out.sequences[0, -steps:].tolist()
        ours_, theirs, otherwise = (
            torch.stack(x)[:steps, i] for x, i in ((out.logits, 0), (found.logits, row), (other.logits, row))
        )
        assert torch.allclose(theirs, ours_, atol=2e-4)
        assert not torch.allclose(otherwise[:1], ours_[:1], atol=2e-3)  # positions matter


@dataclass
class NoOptions:
    pass


@pytest.fixture
def uneven():
    """A pruner that keeps another number of tokens of each image, before the projector or behind it."""

    @register("pruner", "uneven")
    class Uneven(Pruner, nn.Module):
        ragged, destroys = True, frozenset({"grid"})

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n - 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            score = image.tokens.float().mean(-1)
            order = score.argsort(dim=1, descending=True)[:, : self.num_tokens(score.shape[1])].sort(dim=1).values
            left = image.take(order)
            return left.stay(score.gather(1, order) > score.mean(1, keepdim=True))

    @register("pruner", "uneven_behind")
    class UnevenBehind(Pruner, nn.Module):
        ragged = behind = True

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            score = image.tokens.float().mean(-1)
            return image.stay(score > score.mean(1, keepdim=True), image.tokens * 1.5)

    return zoo.pruner


@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_rows_of_unequal_counts_are_those_of_the_composed_model(llava, documented, uneven, positions):
    folder, model, processor = llava
    composed, ours = zoo.load(f"dir:{folder}", "pruner=[uneven]", f"positions={positions}")
    photos = [build.photo(40, 60, seed=i) for i in range(3)]
    prompts = ["USER: <image>\nis there a red circle? ASSISTANT:", "USER: <image>\nyes no<image>\nred ASSISTANT:"]
    options = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    prune = uneven("uneven", grid=(4, 4), positions=positions)
    found = documented(model, processor, prune, prompts, photos, **options)
    for row, (prompt, pictures) in enumerate(zip(prompts, [photos[:1], photos[1:]], strict=True)):
        out = composed.generate(**ours(images=pictures, text=prompt, return_tensors="pt"), **options)
        steps = len(out.logits)
        assert found.sequences[row, :steps].tolist() == out.sequences[0, -steps:].tolist()
        both = torch.stack(found.logits)[:steps, row], torch.stack(out.logits)[:, 0]
        assert torch.allclose(*both, atol=2e-4)


@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_a_pruner_behind_the_projector_takes_its_tokens(llava, uneven, positions):
    folder, model, processor = llava
    composed, _ = zoo.load(f"dir:{folder}", "pruner=[uneven_behind]", f"positions={positions}")
    photos = [build.photo(40, 60, seed=i) for i in range(3)]
    pixels = processor.image_processor(photos, return_tensors="pt").pixel_values
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        projected = model.model.multi_modal_projector(tower.hidden_states[model.config.vision_feature_layer][:, 1:])
        shown = composed.encode_images(pixels)
    pruned = uneven("uneven_behind", grid=(4, 4), positions=positions)(projected)
    assert torch.equal(pruned.valid, shown.valid) and len(set(pruned.counts)) > 1
    assert torch.allclose(pruned.tokens[pruned.valid], shown.tokens[shown.valid], atol=1e-5)
    places = [row.nonzero()[:, 0] for row in pruned.valid]
    expected = places if positions == "kept" else [torch.arange(len(row)) for row in places]
    assert torch.equal(pruned.positions[pruned.valid], torch.cat(expected))
    assert pruned.lengths == ([16] * 3 if positions == "kept" else pruned.counts)


def test_a_pruner_that_asks_takes_the_questions_embeddings(llava):
    """Two questions about one picture: what is kept is that of the composed model, another for each."""

    @register("pruner", "asks_alone")
    class Asks(Pruner, nn.Module):
        needs, destroys = frozenset({"question", "projected"}), frozenset({"grid"})

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            asked = image.question
            mean = (asked.embeds * asked.mask.unsqueeze(-1)).sum(1) / asked.mask.sum(1, keepdim=True)
            score = (image.projected @ mean.unsqueeze(-1)).squeeze(-1)
            return image.take_best(score.argsort(dim=1, descending=True)[:, : score.shape[1] // 2])

    folder, model, processor = llava
    composed, ours = zoo.load(f"dir:{folder}", "pruner=[asks_alone]")
    photo = build.photo(40, 60)
    pixels = processor.image_processor([photo], return_tensors="pt").pixel_values
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        tokens = hidden[model.config.vision_feature_layer][:, 1:]
        projected = model.model.multi_modal_projector(tokens)
    prune, kept = zoo.pruner("asks_alone", grid=(4, 4)), []
    assert prune.needs == {"question", "projected"}
    for question in ("is there a red circle?", "describe the picture."):
        ids = processor.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
        embeds = model.get_input_embeddings()(ids)
        kept.append(prune(tokens, question=embeds, projected=projected).keep)
        given = ours(images=[photo], text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(kept[-1], composed(**given, questions=[question]).image_kept.keep)
    assert not torch.equal(*kept)
    with pytest.raises(zoo.ZooError, match="needs projected, question: pass them"):
        prune(tokens)


def test_one_budget_over_the_rows_of_an_image():
    """Of 2 and 1 rows, given by `rows`; without it each row is an image."""

    @register("pruner", "shared_budget")
    class Shared(Pruner, nn.Module):
        ragged = per_image = True

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            score = image.tokens.sum(-1)
            return image.stay(score >= score.flatten().topk(8).values[-1])

    prune, tokens = zoo.pruner("shared_budget", grid=(2, 4)), torch.randn(3, 8, 4)
    together = prune(tokens, rows=(2, 1)).counts
    assert together[0] + together[1] == 8 and together[2] == 8 and prune(tokens).counts == [8, 8, 8]


def test_prompts_that_show_another_number_of_images_are_refused():
    pruned = zoo.pruner("random", keep_ratio=0.5, grid=(2, 2))(torch.randn(2, 4, 8))
    assert (
        pruned.expand(["a<i>b<i>"], "<i>") == ["a<i><i>b<i><i>"]
        and pruned.expand(["<i>", "<i>c"], "<i>")[1] == "<i><i>c"
    )
    with pytest.raises(zoo.ZooError, match="The prompts have <i> 1 times, for 2 images"):
        pruned.expand(["a<i>b"], "<i>")


def test_positions_with_gaps_need_a_mask(llava):
    """The trap: without a mask transformers takes gaps for borders of packed samples; with one, places change it."""
    model = llava[1].model.language_model
    pruned = zoo.pruner("random", grid=(4, 4))(torch.randn(1, 16, 8))
    shown = torch.zeros(1, 12, dtype=torch.bool)
    shown[:, 3:7] = True
    embeds, positions = torch.randn(1, 12, 48), pruned.position_ids(shown)
    mask = torch.ones(1, 12)
    with torch.no_grad():
        whole = model(inputs_embeds=embeds, position_ids=positions, attention_mask=mask).last_hidden_state
        split = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    assert positions[0, -1] == 23 and not torch.allclose(whole[:, -1], split[:, -1], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_prompts_are_those_alone(side):
    """Rows of two and one image, padded to one length."""
    prune = zoo.pruner("random", keep_ratio=0.5, grid=(2, 4))
    pruned = prune(torch.randn(3, 8, 4), pixel_values=torch.rand(3, 2))
    rows = ["t" + "i" * 4 + "tt" + "i" * 4 + "t", "t" + "i" * 4 + "t"]
    width = max(map(len, rows)) + 1
    texts = [row.rjust(width, ".") if side == "left" else row.ljust(width, ".") for row in rows]
    shown = torch.tensor([[c == "i" for c in text] for text in texts])
    mask = torch.tensor([[c != "." for c in text] for text in texts])
    found = pruned.position_ids(shown, mask.long())
    p = pruned.positions
    image = [1 + p[0], torch.tensor([9, 10]), 11 + p[1], torch.tensor([19])]
    assert found[0][mask[0]].tolist() == [0, *torch.cat(image).tolist()]
    assert found[1][mask[1]].tolist() == [0, *(1 + p[2]).tolist(), 9]
    with pytest.raises(zoo.ZooError, match="4 image placeholders, and 3 images have 12 tokens"):
        pruned.position_ids(shown[1:])
