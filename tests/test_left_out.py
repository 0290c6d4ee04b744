"""Rows of unequal counts, and pruners behind the projector: a column left out is a column hidden, in every pass."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from tests.conftest import ANSWERS, QUESTIONS, sample
from tests.test_positions import WAYS, batch_of, made, pruned, step_by_step
from zoo.composed.left_out import Columns, leave_out
from zoo.registry import Cut, ImageFeatures, Pruner, ZooError, register
from zoo.registry.versions import cache_argument


@dataclass
class NoOptions:
    pass


def chosen(tokens):
    """Some of the tokens (M, N, C), another number in each row; one at least."""
    score = tokens.float().mean(-1)
    return (score > score.mean(1, keepdim=True)) | (score == score.amax(1, keepdim=True))


@pytest.fixture
def pruners():
    """`behind`: acts on projected tokens; `ahead`: on those of the encoder, in an order of its own, at most 3 of 4."""

    @register("pruner", "behind")
    class Behind(Pruner, nn.Module):
        behind = ragged = True

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            return image.stay(chosen(image.tokens), image.tokens * 1.5)

    @register("pruner", "ahead")
    class Ahead(Pruner, nn.Module):
        ragged = True
        destroys = frozenset({"grid"})

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n * 3 // 4

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            valid = chosen(image.tokens)
            order = valid.float().argsort(dim=1, descending=True, stable=True)[:, : self.num_tokens(valid.shape[1])]
            return image.take(order).stay(valid.gather(1, order))

    @register("pruner", "budget")
    class Budget(Pruner, nn.Module):
        """A third of the tokens of all rows of an image."""

        behind = ragged = per_image = True

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n

        def tokens_of_image(self, n: int, cut: Cut) -> int:
            return cut.rows * n // 3

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            score = image.tokens.float().mean(-1)
            best = score.flatten().argsort(descending=True)[: score.numel() // 3]
            valid = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, best, True)
            return image.stay(valid.view_as(score))

    return {name: {name: {"name": name}} for name in ("behind", "ahead", "budget")}


def expected(model, bare, batch, positions="kept", mask=None):
    """Logits of each row at the columns that stay, from the prompt of `bare` with the others hidden (or not there).

    Args:
        mask: of the pass, where it hides image tokens that `behind` leaves.
    """
    out = pruned(model, batch if mask is None else {**batch, "attention_mask": mask})
    shown = model.encode_images(batch["pixel_values"])
    n = bare.num_image_tokens
    if any(pruner.behind for pruner in model.pruner.values()):
        alive, tokens = shown.valid, shown.tokens
        if mask is not None:
            alive = alive & mask[model._placeholders(batch["input_ids"])].view_as(alive).bool()
    else:  # put into their places
        places, valid = shown.kept.keep, shown.valid
        alive = torch.zeros(len(places), n, dtype=torch.bool).scatter(1, places, valid)
        wide = places.unsqueeze(-1).expand_as(shown.tokens)
        tokens = torch.zeros(len(places), n, shown.tokens.shape[-1]).scatter(1, wide, shown.tokens)
    rows, at = [], 0
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        pieces, seen, left = [], [], ids[real]
        slots, i = model._placeholders(left), 0
        while i < len(left):
            if slots[i]:
                pieces.append(tokens[at]), seen.append(alive[at])
                at, i = at + 1, i + model.num_image_tokens
            else:
                pieces.append(model.llm.embed(left[i : i + 1])), seen.append(torch.ones(1, dtype=torch.bool))
                i += 1
        embeds, visible = torch.cat(pieces)[None], torch.cat(seen)
        if positions == "dense":
            embeds, visible = embeds[:, visible], visible[visible]
        place = torch.arange(len(visible))[None]
        with torch.no_grad():
            hidden = model.llm.hidden(
                inputs_embeds=embeds, attention_mask=visible[None].long(), position_ids=place
            ).last_hidden_state
            rows.append(model.llm.head(hidden[0, visible]))
    return out, rows


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["behind", "ahead", "budget"])
def test_left_out_is_hidden(make_model, pruners, name, side, positions):
    model, processor = made(make_model, pruners[name], positions=positions)
    bare, _ = made(make_model, None)
    batch = batch_of(processor, side)
    out, rows = expected(model, bare, batch, positions)
    real = out.sequence.attention_mask.bool()
    assert len({len(row) for row in rows}) > 1 and out.logits.shape[1] == max(map(len, rows))
    for logits, valid, row in zip(out.logits, real, rows, strict=True):
        torch.testing.assert_close(logits[valid], row, atol=2e-5, rtol=1e-4)
    stay = real & out.sequence.image_mask
    assert int(stay.sum()) == len(out.image_tokens)  # and in this order
    torch.testing.assert_close(out.image_tokens, out.image_tokens[out.sequence.image_index()[stay]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_may_hide_image_tokens_beside(make_model, pruners, side):
    """Of tokens that a pruner leaves, too: their columns went, and the tokens stayed, one too many for the rest."""
    model, processor = made(make_model, pruners["behind"])
    bare, _ = made(make_model, None)
    batch = batch_of(processor, side)
    slots = model._placeholders(batch["input_ids"])
    mask = batch["attention_mask"].masked_fill(slots & (slots.cumsum(1) % 3 == 1), 0)
    out, rows = expected(model, bare, batch, mask=mask)
    assert 0 < len(out.image_tokens) < len(pruned(model, batch).image_tokens)
    for logits, valid, row in zip(out.logits, out.sequence.attention_mask.bool(), rows, strict=True):
        torch.testing.assert_close(logits[valid], row, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["behind", "ahead"])
def test_a_row_of_a_batch_is_the_row_alone(make_model, pruners, name):
    model, processor = made(make_model, pruners[name])
    many = pruned(model, batch_of(processor))
    for i, n in enumerate((2, 1, 1)):
        row = processor.encode(sample((QUESTIONS[i], ANSWERS[i]), images=n, seed=3 * i))
        alone = pruned(model, processor.collate([row])).logits[0]
        valid = many.sequence.attention_mask[i].bool()
        torch.testing.assert_close(many.logits[i][valid], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["kept", "dense"])
@pytest.mark.parametrize("name", ["behind", "ahead"])
def test_packed_rows_learn_what_each_learns_alone(make_model, pruners, name, positions):
    model, processor = made(make_model, pruners[name], positions=positions)
    samples = [
        sample(*zip(QUESTIONS[:3], ANSWERS[:3], strict=True), images=2, seed=1),
        sample((QUESTIONS[3], ANSWERS[3]), seed=5),
        sample((QUESTIONS[4], ANSWERS[4]), images=2, seed=7),
    ]
    packed = processor.collate(processor.pack([processor.encode(s) for s in samples], 400))
    assert len(packed["input_ids"]) == 1

    def grads(batches):
        model.zero_grad()
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        for b in batches:
            model(**b, num_items_in_batch=total).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    dialogs = [replace(s, dialogs=[d]) for s in samples for d in s.dialogs]
    one, other = grads([packed]), grads([processor.collate([processor.encode(s)]) for s in dialogs])
    assert one.keys() == other.keys()
    for key, grad in one.items():
        torch.testing.assert_close(grad, other[key], atol=2e-5, rtol=1e-3, msg=lambda why, n=key: f"{n}: {why}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["behind", "ahead"])
@pytest.mark.parametrize("positions", ["kept", "dense"])
def test_generation_is_forward_step_by_step(make_model, pruners, name, way, positions):
    model, processor = made(make_model, pruners[name], positions=positions)
    batch = processor.collate([processor.encode_prompt(s := sample((QUESTIONS[0], "yes"), images=2), s.dialogs[0])])
    model.generation_config.eos_token_id = None
    out = model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=6, do_sample=False, **WAYS[way])
    assert out.tolist() == step_by_step(model, batch).tolist()


@pytest.mark.parametrize("name", ["behind", "ahead"])
def test_a_family_that_counts_tokens_by_itself_generates(make_model, pruners, name):
    """It takes no positions, so that there are none to shift."""
    model, processor = made(make_model, pruners[name], "bloom", "dense", "auto")
    batch = processor.collate([processor.encode_prompt(s := sample((QUESTIONS[0], "yes"), images=2), s.dialogs[0])])
    model.generation_config.eos_token_id = None
    out = model.generate(batch["input_ids"], batch["pixel_values"], max_new_tokens=6, do_sample=False)
    assert out.tolist() == step_by_step(model, batch).tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["behind", "ahead"])
def test_a_batch_is_generated_as_each_alone(make_model, pruners, name, options):
    model, processor = made(make_model, pruners[name])
    model.generation_config.eos_token_id = None
    samples = [sample((QUESTIONS[i], "yes"), images=n, seed=i) for i, n in enumerate((1, 2, 1))]
    rows = [processor.encode_prompt(s, s.dialogs[0]) for s in samples]

    def answers(some):
        batch = processor.collate(some, padding_side="left")
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
        out = model.generate(**given, max_new_tokens=5, do_sample=False, **options)
        copies = len(out) // len(some)
        assert torch.equal(out[:, : batch["input_ids"].shape[1]], batch["input_ids"].repeat_interleave(copies, 0))
        return out[:, batch["input_ids"].shape[1] :].tolist()

    assert answers(rows) == [line for row in rows for line in answers([row])]


def test_padding_is_found_in_the_ids_where_no_mask_is_given(make_model, pruners):
    model, processor = made(make_model, pruners["behind"])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    rows = [sample((QUESTIONS[i], "yes"), images=n, seed=i) for i, n in enumerate((1, 2))]
    batch = processor.collate([processor.encode_prompt(s, s.dialogs[0]) for s in rows], padding_side="left")
    assert not bool(batch["attention_mask"].all())
    given = {"max_new_tokens": 5, "do_sample": False, "pixel_values": batch["pixel_values"]}
    masked = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **given)
    assert torch.equal(model.generate(batch["input_ids"], **given), masked)


def test_lengths_that_include_the_prompt_count_all_of_it(make_model, pruners):
    model, processor = made(make_model, pruners["behind"])
    model.generation_config.eos_token_id = None
    batch = processor.collate([processor.encode_prompt(s := sample((QUESTIONS[0], "yes")), s.dialogs[0])])
    length = batch["input_ids"].shape[1]
    given = batch["input_ids"], batch["pixel_values"]
    assert model.generate(*given, max_length=length + 4, do_sample=False).shape[1] == length + 4
    config = GenerationConfig(max_length=length + 4)
    assert model.generate(*given, generation_config=config).shape[1] == config.max_length == length + 4
    model.generation_config.max_length = length + 5  # as Vicuna states one
    assert model.generate(*given, do_sample=False).shape[1] == length + 5
    assert model.generate(*given, generation_config=GenerationConfig(do_sample=False)).shape[1] == length + 5
    assert model.generate(*given, max_new_tokens=7).shape[1] == length + 7


def test_a_loop_of_ones_own_with_a_mask_of_the_whole_prompt(make_model, pruners):
    model, processor = made(make_model, pruners["behind"])
    rows = [sample((QUESTIONS[i], "yes"), images=n, seed=i) for i, n in enumerate((1, 2))]
    batch = processor.collate([processor.encode_prompt(s, s.dialogs[0]) for s in rows], padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.generation_config.eos_token_id = None
    wanted = model.generate(ids, batch["pixel_values"], attention_mask=mask, max_new_tokens=5, do_sample=False)
    cache, found = DynamicCache(), ids
    with torch.no_grad():
        out = model(ids, batch["pixel_values"], mask, **cache_argument(cache), use_cache=True)
        for _ in range(5):
            new = out.logits[:, -1:].argmax(-1)
            found, mask = torch.cat([found, new], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = model(new, attention_mask=mask, **cache_argument(cache), use_cache=True)
    assert found.tolist() == wanted.tolist()


def test_a_prompt_in_pieces_and_generation_behind_its_cache(make_model, pruners):
    model, processor = made(make_model, pruners["behind"])
    model.generation_config.eos_token_id = None
    s = sample((QUESTIONS[2], "two"), images=2)
    ids = processor.collate([processor.encode_prompt(s, s.dialogs[0])])["input_ids"]
    pixels = torch.stack(processor.prepare(s.images))
    wanted = step_by_step(model, {"input_ids": ids, "pixel_values": pixels})
    found, cache = ids, DynamicCache()
    border = model._placeholders(ids)[0].nonzero().flatten().tolist()[model.num_image_tokens]
    with torch.no_grad():
        model(ids[:, :border], pixels[:1], **cache_argument(cache), use_cache=True)
        out = model(ids[:, border:], pixels[1:], **cache_argument(cache), use_cache=True)
        for _ in range(3):
            found = torch.cat([found, out.logits[:, -1:].argmax(-1)], 1)
            out = model(found[:, -1:], **cache_argument(cache), use_cache=True)
    found = torch.cat([found, out.logits[:, -1:].argmax(-1)], 1)
    out = model.generate(found, **cache_argument(cache), max_new_tokens=2, do_sample=False)
    assert out.tolist() == wanted.tolist()


def test_questions_about_one_image_in_batches(make_model, pruners):
    from zoo.evaluation.predict import Question, answer

    model, processor = made(make_model, pruners["behind"])
    pictures = [sample(*zip(QUESTIONS, ANSWERS, strict=False), seed=i) for i in range(2)]
    asked = [Question(s, d, "generate", 5) for s in pictures for d in s.dialogs]
    asked += [Question(s, replace(s.dialogs[0], choices=["yes", "no"]), "choice", 1) for s in pictures]
    together = [text for _, text in answer(model, processor, asked, batch_size=5)]
    assert together == [text for q in asked for _, text in answer(model, processor, [q], batch_size=1)]


def test_columns_of_a_cache_and_of_what_follows():
    stay = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]]).bool()
    first = Columns.of(stay)
    assert first.index.tolist() == [[0, 2, 3], [1, 2, 3]] and first.valid.tolist() == [[True] * 3, [False, True, True]]
    both = first.then(2, Columns.of(torch.tensor([[1, 0, 1]] * 2).bool()))
    ids = torch.arange(9)[None].expand(2, -1) + 1
    assert both.take(ids).tolist() == [[1, 3, 4, 5, 6, 7, 9], [0, 3, 4, 5, 6, 7, 9]]
    assert both.take(torch.cat([ids, ids[:, :2]], 1)).shape == (2, 9)  # and two tokens decoded since


def test_positions_of_packed_samples_count_from_their_own_first_column():
    index = torch.tensor([[-1, 0, 1, -1, -1, 2, 3, -1]])
    alive = torch.tensor([True, False, False, True])
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    columns, kept = leave_out(index, alive, None, places, segments, kept=True)
    assert columns.index.tolist() == [[0, 1, 3, 4, 6, 7]] and kept.tolist() == [[0, 1, 3, 0, 2, 3]]
    assert leave_out(index, alive, None, places, segments, kept=False)[1].tolist() == [[0, 1, 2, 0, 1, 2]]


# ---- what does not fit -------------------------------------------------------------------------------------------


def test_parts_that_take_rows_of_one_length_are_refused_behind_ragged_ones(make_model, pruners):
    with pytest.raises(ZooError, match=r"pruner 'divprune' takes equally many tokens.*pruner 'ahead'"):
        make_model(pruner=pruners["ahead"] | {"divprune": {"name": "divprune", "keep_ratio": 0.5}})
    with pytest.raises(ZooError, match="projector 'resampler' takes equally many tokens"):
        make_model(pruner=pruners["ahead"], projector={"name": "resampler", "num_queries": 4, "num_heads": 2})


def test_tokens_behind_the_projector_stay_in_place(make_model):
    @register("pruner", "short")
    class Short(Pruner, nn.Module):
        behind = True

        def __init__(self, config: NoOptions) -> None:
            super().__init__()

        def num_tokens(self, n: int) -> int:
            return n // 2

        def forward(self, image: ImageFeatures) -> ImageFeatures:
            return image

    with pytest.raises(ZooError, match=r"its num_tokens\(16\) has to be 16, not 8"):
        make_model(pruner={"short": {"name": "short"}})


def test_the_check_tries_two_images_and_a_video(make_model, pruners):
    from zoo.registry import table

    def refused(name, change):
        cls = table.get("pruner", name).cls
        own = {n: vars(cls)[n] for n in change if n in vars(cls)}
        for attribute, value in change.items():
            setattr(cls, attribute, value)
        try:
            return zoo.check("scenes_tiny", f"pruner=[{name}]")
        finally:
            for attribute in change:
                setattr(cls, attribute, own[attribute]) if attribute in own else delattr(cls, attribute)

    import zoo

    for name in ("behind", "ahead", "budget"):
        zoo.check("scenes_tiny", f"pruner=[{name}]")
    with pytest.raises(ZooError, match=r"keeps \d+ tokens of a video of 4 frames, and its tokens_of_image.*is 8"):
        refused("budget", {"tokens_of_image": lambda self, n, cut: n // 8 if cut.rows > 1 else n})
    with pytest.raises(ZooError, match=r"`valid` as int64 \[1, 64\], and has to give bool \[1, 64\]"):
        refused("behind", {"forward": lambda self, image: replace(image, valid=image.tokens.long()[..., 0])})
    with pytest.raises(ZooError, match="does not declare that rows are ragged"):
        refused("ahead", {"ragged": False})


def test_what_needs_equal_lengths_is_refused_ahead(make_model, pruners):
    from types import SimpleNamespace

    from zoo.checking.stage_check import _check_shorter

    with pytest.raises(ZooError, match=r"chooses the length of the sequence by the image.*compile=false"):
        _check_shorter(SimpleNamespace(compile=True), make_model(pruner=pruners["behind"])[0])


def test_the_page_of_an_image_hides_what_was_left_out(make_model, pruners):
    from zoo.inspection.xray import look

    model, processor = made(make_model, pruners["behind"])
    view, _ = look(model, processor, sample((QUESTIONS[0], "yes")).images[0], QUESTIONS[0])
    kept = int(model.encode_images(torch.stack(processor.prepare(sample((QUESTIONS[0], "yes")).images))).valid.sum())
    assert view.tokens == [kept, kept] and sum(t >= 0 for t in view.layers[0]) == kept < 16
