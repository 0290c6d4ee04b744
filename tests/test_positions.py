"""`positions=kept`: image tokens that pruners leave have the places that they had without, in every kind of pass."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.fusion_builders import NO_GROUPS, features
from zoo.registry import ImageFeatures, ZooError
from zoo.registry.versions import cache_argument

PRUNERS = {
    "divprune": {"keep_ratio": 0.4},
    "random": {"keep_ratio": 0.4},
    "fastervlm": {"keep_ratio": 0.4, "score": "column_mean"},
    "hiprune": {"keep_ratio": 0.4, "alpha": 1.0},
    "holov": {"keep_ratio": 0.4, "score": "column_mean"},
    "visionzip": {"keep_ratio": 0.4, "score": "column_mean"},
    "vispruner": {"keep_ratio": 0.4, "score": "column_mean"},
    "pool": {},
    "aim": {"merge_ratio": 0.4, "prune": False},
}
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gemma3_text", "phi", "phi3", "gpt2", "opt", "gpt_neox")


def made(make_model, pruner="divprune", family="llama", positions="kept", attention="sdpa", **more):
    """A model of 16 image tokens with a pruner; its attention is sharp enough for a wrong mask or place to show."""
    llm = {"name": "hf", "model_type": family, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    llm |= {"intermediate_size": 48, "max_positions": 256} | (
        {} if family in {*NO_GROUPS, "bloom"} else {"num_kv_heads": 2}
    )
    pruners = {pruner: {"name": pruner, **PRUNERS[pruner]}} if isinstance(pruner, str) else pruner or {}
    model, processor = make_model(attention=attention, positions=positions, pruner=pruners, llm=llm, **more)
    with torch.no_grad():
        for p in model.llm.layers.parameters():
            p.mul_(4) if p.dim() > 1 else None
    return model, processor


def batch_of(processor, side="left", images=(2, 1, 1), **options):
    """Prompts of unlike length that show several images."""
    rows = [sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i) for i, n in enumerate(images)]
    return processor.collate([processor.encode(row) for row in rows], padding_side=side, **options)


def pruned(model, batch, **options):
    given = {k: v for k, v in batch.items() if k not in ("labels", "position_ids")}
    with torch.no_grad():
        return model(**given, **options)


def whole(model, out, ids, mask, runs=None):
    """Logits of the unpruned prompts (list of (T, V), at the columns that are left) with what was dropped hidden.

    Args:
        runs: of each image the places of its tokens, and how many there would be; None: those of each row, of 16.
    """
    runs = [(places, 16) for places in out.image_kept.places] if runs is None else runs
    shown = iter(out.image_tokens.flatten(0, -2).split([len(places) for places, _ in runs]))
    runs, found = iter(runs), []
    for row, real in zip(ids, mask.bool(), strict=True):
        pieces, seen, at = [], [], 0
        left = row[real]
        slot = model._placeholders(left)
        while at < len(left):
            if not slot[at]:
                pieces.append(model.llm.embed(left[at : at + 1]))
                seen.append(torch.ones(1, dtype=torch.bool))
                at += 1
                continue
            (where, tokens), these = next(runs), next(shown)
            pieces.append(torch.zeros(tokens, these.shape[-1]).index_copy(0, where, these))
            seen.append(torch.zeros(tokens, dtype=torch.bool).index_fill(0, where, True))
            at += len(where)
        embeds, visible = torch.cat(pieces)[None], torch.cat(seen)
        with torch.no_grad():
            hidden = model.llm.hidden(
                inputs_embeds=embeds, attention_mask=visible[None].long(), position_ids=torch.arange(len(visible))[None]
            ).last_hidden_state
            found.append(model.llm.head(hidden[0, visible]))
    return found


def agree(out, batch, wanted, atol=2e-5):
    for logits, real, row in zip(out.logits, batch["attention_mask"].bool(), wanted, strict=True):
        torch.testing.assert_close(logits[real], row, atol=atol, rtol=1e-4)


# ---- places ------------------------------------------------------------------------------------------------------


def test_dropped_tokens_leave_their_places_and_merged_ones_stand_in_the_middle():
    image = features(m=1, grid=(2, 4))
    assert image.take(torch.tensor([[1, 2, 6]])).placed(8).places.tolist() == [[1, 2, 6]]
    # Token 0 is of patches 5 and 7, token 1 of no patch, token 2 of patches 0, 1 and 4, token 3 of patch 3.
    groups = torch.tensor([[2, 2, -1, 3, 2, 0, -1, 0]])
    merged = replace(image, tokens=torch.arange(4.0).view(1, 4, 1), grid=None, keys=None, groups=groups)
    merged = replace(merged, cls_attention=None, key_attention=None, pooling_attention=None).placed(8)
    assert merged.places.tolist() == [[0, 1, 3, 5]]  # the first free place; the middle of three; one; the first of two
    assert merged.tokens.flatten().tolist() == [1, 2, 3, 0]
    assert merged.groups.tolist() == [[1, 1, -1, 2, 1, 3, -1, 3]]


@pytest.mark.parametrize("seed", range(8))
def test_places_ascend_and_are_those_of_members(seed):
    torch.manual_seed(seed)
    n, k = 24, int(torch.randint(2, 20, ()))
    groups = torch.randint(-1, k, (5, n))
    image = ImageFeatures(torch.randn(5, k, 3), None, groups=groups, num_patches=n)
    placed = image.placed(n)
    assert bool((placed.places.diff(dim=1) > 0).all()) and 0 <= int(placed.places.min()) <= int(placed.places.max()) < n
    for row in range(5):
        for token, place in enumerate(placed.places[row].tolist()):
            members = (placed.groups[row] == token).nonzero().flatten().tolist()
            assert not members or place == members[(len(members) - 1) // 2]
    before = [sorted((image.groups[0] == int(t)).nonzero().flatten().tolist()) for t in range(k)]
    after = [sorted((placed.groups[0] == int(t)).nonzero().flatten().tolist()) for t in range(k)]
    assert sorted(before) == sorted(after)


def test_a_pruner_that_does_not_say_which_tokens_it_left_is_an_error():
    with pytest.raises(ZooError, match=r"neither `keep` nor `groups`.*positions=dense"):
        ImageFeatures(torch.zeros(1, 4, 3), None).placed(9)


# ---- a pass is the unpruned one with what was dropped hidden -----------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_kept_is_the_whole_prompt_with_what_was_dropped_hidden(make_model, pruner, side):
    model, processor = made(make_model, pruner)
    batch = batch_of(processor, side)
    out = pruned(model, batch)
    assert out.image_tokens.shape[1] < 16
    agree(out, batch, whole(model, out, batch["input_ids"], batch["attention_mask"]))
    given = {k: v for k, v in batch.items() if k != "labels"}  # with positions as the processor counts them
    with torch.no_grad():
        real = batch["attention_mask"].bool()
        assert torch.equal(model(**given).logits[real], out.logits[real])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_gaps_are_no_borders_without_a_mask(make_model, family, cached):
    attention = "eager" if family == "gemma2" else "sdpa"
    model, processor = made(make_model, family=family, attention=attention)
    batch = batch_of(processor, images=(2,))
    out = pruned(model, {k: v for k, v in batch.items() if k != "attention_mask"}, use_cache=cached)
    wanted = whole(model, out, batch["input_ids"], batch["attention_mask"])
    agree(out, batch, wanted, atol=1e-4)
    dense, _ = made(make_model, family=family, attention=attention, positions="dense")
    assert not torch.allclose(pruned(dense, batch).logits, out.logits, atol=1e-3)


def test_a_row_of_a_batch_is_the_row_alone(make_model):
    model, processor = made(make_model)
    many = pruned(model, batch := batch_of(processor))
    for i, n in enumerate((2, 1, 1)):
        row = processor.encode(sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i))
        alone = pruned(model, processor.collate([row])).logits[0]
        torch.testing.assert_close(many.logits[i][batch["attention_mask"][i].bool()], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pruner", ["divprune", "fastervlm", "hiprune", "holov", "random", "visionzip", "vispruner"])
def test_keeping_all_is_no_pruner_to_the_bit(make_model, pruner):
    bare, processor = made(make_model, None)
    all_of_it = {pruner: {"name": pruner, **PRUNERS[pruner], "keep_ratio": 1.0}}
    model, _ = made(make_model, all_of_it)
    assert model.unpruned is None
    batch = batch_of(processor)
    assert torch.equal(pruned(model, batch).logits, pruned(bare, batch).logits)


# ---- training ----------------------------------------------------------------------------------------------------


def test_packed_rows_and_dialogs_that_share_an_image_learn_what_each_learns_alone(make_model):
    model, processor = made(make_model)
    samples = [
        sample(*zip(QUESTIONS[:3], ANSWERS[:3], strict=True), images=2, seed=1),
        sample((QUESTIONS[3], ANSWERS[3]), seed=5),
        sample((QUESTIONS[4], ANSWERS[4]), images=2, seed=7),
    ]
    packed = processor.collate(processor.pack([processor.encode(s) for s in samples], 400))
    assert len(packed["input_ids"]) == 1 and int(packed["segment_ids"].max()) == 2

    def grads(batches):
        model.zero_grad()
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for b in batches:
            model(**b, num_items_in_batch=total).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    alone = []
    for s in samples:
        for dialog in s.dialogs:
            alone.append(processor.collate([processor.encode(replace(s, dialogs=[dialog]))]))
    one, other = grads([packed]), grads(alone)
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], atol=2e-5, rtol=1e-3, msg=lambda why, n=name: f"{n}: {why}")


# ---- generation --------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def step_by_step(model, batch, new=6):
    """Greedy answers of one prompt, from whole passes without a cache."""
    ids = batch["input_ids"]
    with torch.no_grad():
        for _ in range(new):
            out = model(ids, batch.get("pixel_values"), use_cache=False)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_generation_is_forward_step_by_step(make_model, way, family):
    model, processor = made(make_model, family=family)
    batch = processor.collate([processor.encode_prompt(s := sample((QUESTIONS[0], "yes"), images=2), s.dialogs[0])])
    model.generation_config.eos_token_id = None
    out = model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=6, do_sample=False, **WAYS[way])
    assert out.tolist() == step_by_step(model, batch).tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_batch_is_generated_as_each_alone(make_model, options):
    model, processor = made(make_model, "visionzip")
    model.generation_config.eos_token_id = None
    samples = [sample((QUESTIONS[i], "yes"), images=n, seed=i) for i, n in enumerate((1, 2, 1))]
    rows = [processor.encode_prompt(s, s.dialogs[0]) for s in samples]

    def said(some):
        batch = processor.collate(some, padding_side="left")
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        out = model.generate(**given, max_new_tokens=5, do_sample=False, **options)
        return out[:, batch["input_ids"].shape[1] :].tolist()

    assert said(rows) == [line for row in rows for line in said([row])]


def test_a_loop_of_ones_own_and_a_prompt_in_pieces(make_model):
    model, processor = made(make_model)
    s = sample((QUESTIONS[2], "two"), images=2)
    ids = processor.collate([processor.encode_prompt(s, s.dialogs[0])])["input_ids"]
    pixels = torch.stack(processor.prepare(s.images))
    wanted = step_by_step(model, {"input_ids": ids, "pixel_values": pixels})
    found, cache = ids, DynamicCache()
    slots = model._placeholders(ids)[0].nonzero().flatten().tolist()
    border = slots[model.num_image_tokens]  # the first token of the second image
    with torch.no_grad():
        model(ids[:, :border], pixels[:1], **cache_argument(cache), use_cache=True)
        out = model(ids[:, border:], pixels[1:], **cache_argument(cache), use_cache=True)
        for _ in range(6):
            new = out.logits[:, -1:].argmax(-1)
            found = torch.cat([found, new], 1)
            out = model(new, **cache_argument(cache), use_cache=True)
    assert found.tolist() == wanted.tolist()


def test_generation_goes_on_behind_a_cache(make_model):
    model, processor = made(make_model)
    model.generation_config.eos_token_id = None
    s = sample((QUESTIONS[0], "yes"))
    ids = processor.collate([processor.encode_prompt(s, s.dialogs[0])])["input_ids"]
    pixels = torch.stack(processor.prepare(s.images))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(ids, pixels, **options)
    cache = first.get("cache", first.get("past_key_values"))
    more = torch.cat([first.sequences, ids[:, -3:]], 1)
    out = model.generate(more, **cache_argument(cache), **options)
    assert out.sequences.tolist() == step_by_step(model, {"input_ids": more, "pixel_values": pixels}, 3).tolist()


def test_drafts_of_another_composed_model(make_model):
    model, processor = made(make_model)
    drafts, _ = made(make_model, "random", family="qwen2")
    model.generation_config.eos_token_id = None
    s = sample((QUESTIONS[0], "yes"), images=2)
    ids = processor.collate([processor.encode_prompt(s, s.dialogs[0])])["input_ids"]
    pixels = torch.stack(processor.prepare(s.images))
    out = model.generate(ids, pixels, max_new_tokens=6, do_sample=False, assistant_model=drafts)
    assert out.tolist() == step_by_step(model, {"input_ids": ids, "pixel_values": pixels}).tolist()


def test_answers_about_one_image_share_its_prefix(make_model):
    from zoo.evaluation.predict import Question, answer

    model, processor = made(make_model)
    s = sample(*zip(QUESTIONS, ANSWERS, strict=False))
    asked = [Question(s, d, "generate", 5) for d in s.dialogs]
    together = [text for _, text in answer(model, processor, asked, batch_size=5)]
    alone = [text for q in asked for _, text in answer(model, processor, [q], batch_size=1)]
    assert together == alone


# ---- the word ----------------------------------------------------------------------------------------------------


def test_the_word_is_saved_and_a_model_from_before_it_is_dense(make_model, tmp_path):
    import json

    from zoo.composed.model import ZooModel

    model, processor = made(make_model)
    batch = batch_of(processor)
    logits = pruned(model, batch).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["positions"] == "kept"
    assert torch.equal(pruned(ZooModel.from_pretrained(tmp_path), batch).logits, logits)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["positions"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    before = ZooModel.from_pretrained(tmp_path)
    dense, _ = made(make_model, positions="dense")
    assert before.config.positions == "dense" and before.unpruned is None
    assert torch.equal(pruned(before, batch).logits, pruned(dense, batch).logits)


def test_a_model_from_before_the_word_keeps_positions_inside_the_llm(make_model, tmp_path):
    import json

    from zoo.composed.model import ZooModel

    for pruner in (
        {"fastv": {"name": "fastv", "keep_ratio": 0.5, "layer": 1}},
        {"aim": {"name": "aim", "merge_ratio": 1}},
    ):
        model, processor = made(make_model, pruner)
        model.save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text())
        del content["positions"]
        content["slots"]["pruner"].get("fastv", {}).pop("renumber", None)
        (tmp_path / "config.json").write_text(json.dumps(content))
        before, batch = ZooModel.from_pretrained(tmp_path), batch_of(processor)
        assert before.config.positions == "dense"
        assert torch.equal(pruned(before, batch).logits, pruned(model, batch).logits)


def test_what_cannot_be_kept_is_refused_or_is_dense(make_model):
    with pytest.raises(ZooError, match=r"Bloom.*takes no positions\. Set positions=dense"):
        made(make_model, family="bloom", attention="eager")
    assert made(make_model, family="bloom", positions="auto", attention="eager")[0].config.positions == "dense"
    with pytest.raises(ZooError, match="positions"):
        made(make_model, positions="kep")


def test_the_check_refuses_a_plug_in_that_does_not_say_what_it_left_and_offers_dense():
    from dataclasses import dataclass

    from torch import nn

    from tests.conftest import tiny_slots
    from zoo.checking.checker import RefusedError, check
    from zoo.checking.plan import Plan
    from zoo.registry import Pruner, register

    @dataclass
    class Options:
        pass

    @register("pruner", "silent")
    class Silent(Pruner, nn.Module):
        destroys = frozenset({"grid"})

        def __init__(self, config: Options) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            return ImageFeatures(image.tokens[:, ::2], None)

    plan = Plan(tiny_slots(pruner={"silent": {"name": "silent"}}), vocab_size=360)
    with pytest.raises(RefusedError, match="neither `keep` nor `groups`") as refused:
        check(plan)
    assert "positions=dense" in refused.value.fixes
    assert check(replace(plan, positions="dense")).places == 0
    kept = check(replace(plan, slots=tiny_slots(pruner={"random": {"name": "random"}})))
    assert (kept.num_image_tokens, kept.places) == (4, 16)


# ---- lengths -----------------------------------------------------------------------------------------------------


def test_what_is_too_long_counts_the_places_of_images(make_model, tmp_path):
    """GPT-2 has a table of positions: one more than it has would be an index out of range."""
    from zoo.evaluation.predict import Question, answer
    from zoo.registry import Dialog, LengthError, RecordError
    from zoo.runs.lengths import length_of, require_room, shorten

    model, processor = made(make_model, family="gpt2")
    s = sample((QUESTIONS[0], "yes"), images=2)
    row = processor.encode(s)
    assert row.gap == 2 * (16 - model.num_image_tokens) and length_of(row) == len(row) + row.gap
    prompt = processor.encode_prompt(s, s.dialogs[0])
    assert prompt.gap == row.gap
    with pytest.raises(LengthError):
        require_room(row, length_of(row) - 1)
    cut = shorten(row, length_of(row) - 1, (processor.image_token_id,))
    assert len(cut) == len(row) - 1
    own = made(make_model, family="gpt2", positions="dense")[1]
    assert own.encode(s).gap == 0 and "unpruned" not in own.to_dict()
    processor.save_pretrained(tmp_path)
    assert type(processor).from_pretrained(tmp_path).encode(s).gap == row.gap
    model.generation_config.eos_token_id = None
    limit = length_of(prompt) + 3
    model.llm.max_positions = limit  # of the 256 that it has
    asked = [Question(s, Dialog(s.dialogs[0].messages), "generate", 50)]
    list(answer(model, processor, asked, batch_size=1))
    model.llm.max_positions = length_of(prompt)
    with pytest.raises(RecordError, match=r"tokens on .* positions, and the LLM has"):
        list(answer(model, processor, asked, batch_size=1))


# ---- beside pruners inside the LLM -------------------------------------------------------------------------------

INSIDE = {
    "merged, then dropped inside": {"aim": {"name": "aim", "merge_ratio": 0.5, "start": 0, "stop": 2}},
    "two pruners": {
        "divprune": {"name": "divprune", "keep_ratio": 0.5},
        "fastv": {"name": "fastv", "keep_ratio": 0.5, "layer": 1},
    },
}


@pytest.mark.parametrize("name", INSIDE)
def test_tokens_dropped_inside_the_llm_stand_on_kept_places(make_model, name):
    """Text ends where it would without pruners, a row of a batch is the row alone, generation begins as forward."""
    model, processor = made(make_model, INSIDE[name])
    batch = batch_of(processor)
    out = pruned(model, batch)
    positions = out.passed.sequence.position_ids
    for i in range(len(positions)):
        assert int(positions[i, -1]) + 1 == int(batch["attention_mask"][i].sum()) + (2, 1, 1)[i] * 8  # 8 of 16 entered
    for i, n in enumerate((2, 1, 1)):
        row = processor.encode(sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i))
        alone = pruned(model, processor.collate([row])).logits[0, -1]
        torch.testing.assert_close(out.logits[i, -1], alone, atol=1e-5, rtol=1e-4)
    model.generation_config.eos_token_id = None
    s = sample((QUESTIONS[0], "yes"), images=2)
    given = processor.collate([processor.encode_prompt(s, s.dialogs[0])])
    said = model.generate(given["input_ids"], given["pixel_values"], max_new_tokens=1, do_sample=False)
    with torch.no_grad():
        assert int(said[0, -1]) == int(model(given["input_ids"], given["pixel_values"]).logits[0, -1].argmax())
