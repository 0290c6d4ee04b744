"""Whatever call pattern a person writes around `forward` gives what transformers' own LLaVA class gives."""

import copy

import pytest
import torch
from transformers import DynamicCache

import zoo
from tests import published_builders as build
from tests.fusion_builders import SMALL
from tests.published_builders import CASES, said
from zoo.registry import ZooError
from zoo.registry.versions import cache_argument, cache_of


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The model and processor of transformers, and our model from the same folder."""
    folder = tmp_path_factory.mktemp("forward") / "llava"
    reference, processor = build.llava(folder)
    return reference, processor, zoo.load(f"dir:{folder}")[0]


def inputs(processor, case="unlike samples", side="left"):
    texts = [processor.apply_chat_template(said(n, q), add_generation_prompt=True) for n, q in CASES[case]]
    images = [build.photo(30 + 9 * i, 50, seed=i) for i in range(sum(n for n, _ in CASES[case]))]
    batch = processor(images=images or None, text=texts, padding=True, padding_side=side, return_tensors="pt")
    return dict(batch)


def labelled(batch):
    """Labels of the last third of each row."""
    labels = batch["input_ids"].clone()
    labels[:, : labels.shape[1] * 2 // 3] = -100
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def close(ours, theirs, mask=None):
    mask = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[mask], theirs[mask], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_loss_logits_cache_and_tuple(llava, case, side):
    reference, processor, model = llava
    batch = labelled(inputs(processor, case, side))
    for given in (batch, {k: v for k, v in batch.items() if k != "labels"}):
        theirs, ours = reference(**given), model(**given)
        mask = batch["attention_mask"]
        close(ours.logits, theirs.logits, mask)
        if "labels" in given:
            torch.testing.assert_close(ours.loss, theirs.loss)
            assert ours[0] is ours.loss and ours["loss"] is ours.loss
        assert ours.cache.get_seq_length() == cache_of(theirs).get_seq_length() == mask.shape[1]
        as_tuple = model(**given, return_dict=False)
        wanted = reference(**given, return_dict=False)[: 3 if "labels" in given else 2]  # behind them its image tower
        assert [type(x) for x in as_tuple] == [type(x) for x in wanted]
        close(as_tuple[-2], wanted[-2], mask)


OPTIONS = {
    "use_cache=False": {"use_cache": False},
    "use_cache=True": {"use_cache": True},
    "hidden": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "last": {"logits_to_keep": 1},
    "last five": {"logits_to_keep": 5},
    "positions": {"logits_to_keep": torch.tensor([-3, -1])},
    "positions of rows": {"logits_to_keep": torch.tensor([[-3], [-2], [-1]])},
    "mask of positions": {"logits_to_keep": torch.arange(63).expand(3, 63) > 60},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_options_give_what_transformers_gives(llava, name, attention):
    reference, processor, model = (copy.deepcopy(x) for x in llava)
    reference.set_attn_implementation(attention)
    model.set_attention(attention)
    batch = inputs(processor)
    theirs, ours = reference(**batch, **OPTIONS[name]), model(**batch, **OPTIONS[name])
    assert ours.logits.shape == theirs.logits.shape
    assert (ours.cache is None) == (cache_of(theirs) is None)
    for ours_of, theirs_of in ((ours.hidden_states, theirs.hidden_states), (ours.attentions, theirs.attentions)):
        assert (ours_of is None) == (theirs_of is None)
        assert len(ours_of or ()) == len(theirs_of or ())
        for a, b in zip(ours_of or (), theirs_of or (), strict=True):
            assert a.shape == b.shape
            mask = batch["attention_mask"] if a.dim() == 3 else batch["attention_mask"][:, None].expand(a.shape[:3])
            close(a, b, mask)
    if name != "mask of positions" and "positions" not in name:
        close(ours.logits[:, -1], theirs.logits[:, -1])
    elif theirs.logits.dim() == 2:
        close(ours.logits, theirs.logits)
    else:
        close(ours.logits[:, -1], theirs.logits[:, -1])


def test_arguments_by_position(llava):
    reference, processor, model = llava
    batch = inputs(processor, "one image")
    order = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    close(model(*order).logits, reference(*order).logits)
    close(model(*order, positions).logits, reference(*order, positions).logits)
    cache, other = DynamicCache(), DynamicCache()
    close(model(*order, positions, cache).logits, reference(*order, positions, other).logits)
    assert cache.get_seq_length() == other.get_seq_length() > 0


def test_embeddings_instead_of_ids(llava):
    """With the images, which go where the placeholder's embedding stands, and with what was merged before."""
    reference, processor, model = llava
    batch = labelled(inputs(processor))
    ids = batch.pop("input_ids")
    theirs = reference(inputs_embeds=reference.get_input_embeddings()(ids), **batch)
    ours = model(inputs_embeds=model.get_input_embeddings()(ids), **batch)
    close(ours.logits, theirs.logits, batch["attention_mask"])
    torch.testing.assert_close(ours.loss, theirs.loss)
    merged = model.merge(ids, model.encode_images(batch.pop("pixel_values"))[2])
    close(model(inputs_embeds=merged, **batch).logits, theirs.logits, batch["attention_mask"])


LOOPS = {
    "mask alone": lambda step, mask: {"attention_mask": mask},
    "positions too": lambda step, mask: {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -step:],
    },
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told", LOOPS)
@pytest.mark.parametrize("case", ["one image", "unlike samples"])
def test_a_loop_of_ones_own_with_a_cache(llava, case, told, side):
    """Greedy by hand: the cache of one pass goes into the next, by either name, and the mask grows."""
    reference, processor, model = llava
    batch = inputs(processor, case, side)

    def loop(net):
        mask, given = batch["attention_mask"], dict(batch)
        given |= LOOPS[told](mask.shape[1], mask)
        steps = []
        for _ in range(6):
            out = net(**given)
            steps.append(out.logits[:, -1])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            token = wanted[len(steps) - 1] if net is model else out.logits[:, -1:].argmax(-1)
            wanted.append(token) if net is reference else None
            given = {"input_ids": token, **cache_argument(cache_of(out)), **LOOPS[told](1, mask)}
        return torch.stack(steps, 1)

    wanted: list[torch.Tensor] = []
    theirs = loop(reference)
    close(loop(model), theirs, None if side == "left" else batch["attention_mask"][:, -1:].expand(-1, 6))


def test_a_loop_without_a_mask_and_one_that_writes_the_placeholder(llava):
    reference, processor, model = llava
    batch = inputs(processor, "one image")
    ours, theirs = model(**batch), reference(**batch)
    token = torch.tensor([[model.image_token_id]])
    for _ in range(2):
        ours = model(input_ids=token, past_key_values=ours.cache)
        theirs = reference(input_ids=token, **cache_argument(cache_of(theirs)))
        close(ours.logits, theirs.logits)


def test_a_prompt_in_pieces(llava):
    """A prefix with the image, then the rest of the prompt on its cache."""
    reference, processor, model = llava
    batch = inputs(processor, "one image")
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    at = int((ids[0] == model.image_token_id).nonzero()[-1]) + 3
    whole = reference(**batch).logits[:, at:]
    first = model(input_ids=ids[:, :at], pixel_values=pixels)
    close(model(input_ids=ids[:, at:], cache=first.cache).logits, whole)
    first = model(input_ids=ids[:, :at], pixel_values=pixels)
    rest = model(input_ids=ids[:, at:], cache=first.cache, attention_mask=batch["attention_mask"], logits_to_keep=2)
    close(rest.logits, whole[:, -2:])


HALF = {
    "to bfloat16": (torch.bfloat16, lambda net: net.to(torch.bfloat16)),
    "to float16": (torch.float16, lambda net: net.to(dtype=torch.float16)),
    "bfloat16()": (torch.bfloat16, lambda net: net.bfloat16()),
    "half()": (torch.float16, lambda net: net.half()),
}


@pytest.mark.parametrize("how", HALF)
def test_half_precision(llava, how):
    """Pixels may come in float32, as a processor gives them."""
    reference, processor, model = (copy.deepcopy(x) for x in llava)
    batch = inputs(processor, "one image")
    dtype, change = HALF[how]
    for net in (reference, model):
        assert change(net) is net and net.dtype == dtype and net.device.type == "cpu"
    ours, theirs = model(**batch).logits, reference(**batch).logits
    assert ours.dtype == theirs.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=0.02 if dtype is torch.bfloat16 else 2e-3, rtol=0.02)


def test_gradients_are_transformers_own_with_and_without_checkpointing(llava):
    reference, processor, model = (copy.deepcopy(x) for x in llava)
    batch = labelled(inputs(processor))

    def gradients(net):
        net.train().zero_grad()
        net(**batch).loss.backward()
        return net.get_input_embeddings().weight.grad.clone(), net.get_output_embeddings().weight.grad.clone()

    theirs = gradients(reference)
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        for a, b in zip(gradients(model), theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        model.disable_input_require_grads()
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    for a, b in zip(gradients(model), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_what_it_does_not_know_it_refuses_by_name(llava):
    _, processor, model = llava
    batch = inputs(processor, "one image")
    with pytest.raises(ZooError, match=r"forward named 'atention_mask'. Did you mean 'attention_mask'"):
        model(**batch, atention_mask=batch["attention_mask"])
    with pytest.raises(ZooError, match="'output_router_logits'"):  # no experts here
        model(**batch, output_router_logits=True)
    for name, value, hint in (
        ("vision_feature_layer", -1, "vision.layer"), ("image_sizes", torch.tensor([[32, 32]]), "cuts"),
        ("mm_encoder_outputs", {}, "encoded"), ("shift_labels", batch["input_ids"], "labels"),
        ("vision_feature_select_strategy", "full", "belongs to the model"), ("num_labels", 3, "num_items_in_batch"),
    ):  # fmt: skip
        with pytest.raises(ZooError, match=f"{name}: .*{hint}"):
            model(**batch, **{name: value})
        assert torch.equal(model(**batch, **{name: None}).logits, model(**batch).logits)
    with pytest.raises(ZooError, match="two names of one argument"):
        model(**batch, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ZooError, match=r"cache must be a cache of transformers.*got tuple"):
        model(**batch, cache=((1, 2),))
    with pytest.raises(ZooError, match="one of them; both was given"):
        model(**batch, inputs_embeds=model.get_input_embeddings()(batch["input_ids"]))
    with pytest.raises(ZooError, match="one of them; neither was given"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(ZooError, match=r"16 image placeholders .* for 0 images"):
        model(input_ids=batch["input_ids"])


def test_every_argument_of_transformers_class_is_taken_or_refused_by_name(llava):
    """Built from the installed signatures, so that a new argument cannot slip through."""
    import inspect

    from transformers.utils.generic import TransformersKwargs

    reference, processor, model = llava
    batch = inputs(processor, "one image")
    theirs = {n for n in inspect.signature(reference.forward).parameters if n != "kwargs"}
    theirs |= set(TransformersKwargs.__annotations__)
    ours = set(inspect.signature(model.forward).parameters)
    for name in sorted(theirs - ours):
        with pytest.raises(ZooError, match=name):
            model(**batch, **{name: torch.ones(1)})


def test_a_loss_function_of_ones_own(llava):
    reference, processor, model = (copy.deepcopy(x) for x in llava)
    batch = labelled(inputs(processor))

    def squared(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return logits[labels >= 0].square().sum() / (num_items_in_batch or 1) / vocab_size

    reference.loss_function = model.loss_function = squared
    for given in ({}, {"num_items_in_batch": 7}):
        torch.testing.assert_close(model(**batch, **given).loss, reference(**batch, **given).loss)


def test_experts_are_shown_and_their_loss_counts_by_its_share_of_labels(make_model):
    """Passes that make a step: the answer loss is divided by all labels, the balance loss is a mean of each pass."""
    from tests.conftest import sample

    llm = {"name": "hf", "model_type": "mixtral", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_experts": 4,
           "top_k": 2, "intermediate_size": 16, "router_aux_coef": 0.5}  # fmt: skip
    model, processor = make_model(llm=llm)
    model.train()
    samples = [sample(("what is it?", "a"), seed=0), sample(("which?", "a long answer it is"), seed=1)]
    rows = [processor.collate([processor.encode(s)]) for s in samples]
    counts = [int((row["labels"][:, 1:] >= 0).sum()) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        alone, part = model(**row), model(**row, num_items_in_batch=sum(counts))
        torch.testing.assert_close(alone.loss, alone.losses["answer"] + alone.losses["router_balance"])
        torch.testing.assert_close(part.losses["router_balance"], alone.losses["router_balance"])
        torch.testing.assert_close(part.loss, alone.loss * count / sum(counts))
    model.eval()
    out = model(**rows[0], output_router_logits=True)
    assert len(out.router_logits) == 2 and out.router_logits[0].shape == (rows[0]["input_ids"].numel(), 4)
    assert model(**rows[0]).router_logits is None


PARTS = {
    "fastv": {"pruner": {"fastv": {"name": "fastv", "layer": 1, "keep_ratio": 0.5}}},
    "mole": {"adapter": {"mole": {"name": "mole"}}},
    "vlora": {"projector": None, "adapter": {"vlora": {"name": "vlora", **SMALL["vlora"], "max_images": 2}}},
}


@pytest.mark.parametrize("part", PARTS)
def test_a_loop_of_ones_own_over_our_parts_writes_what_generate_writes(make_model, part):
    model, processor = make_model(**PARTS[part])
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    texts = ["<image>\nwhat is it?", "and <image> this one is longer"]
    given = dict(processor(images=[build.photo(40, 40, seed=i) for i in range(2)], text=texts, padding_side="left"))
    wanted = model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(6):
        out = model(**given)
        token = out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, mask.new_ones(2, 1)], 1)
        given = {"input_ids": token, "attention_mask": mask, "past_key_values": out.cache}
    assert torch.equal(ids, wanted)


def drawn(random, batch):
    """A way to call that somebody may write: options, masks of all kinds, embeddings for ids, a prefix on a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    kind = random.choice(["as it is", "none", "bool", "holes", "four dimensions", "float"])
    if kind == "holes":
        mask = mask * (torch.rand(mask.shape, generator=random.torch) > 0.1)
        mask[ids == 3] = batch["attention_mask"][ids == 3]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen = (mask[:, None, None, :].bool() & causal) | torch.eye(ids.shape[1], dtype=torch.bool)
    masks = {"bool": mask.bool(), "holes": mask, "four dimensions": seen, "float": mask.float(), "as it is": mask}
    if kind != "none":
        given["attention_mask"] = masks[kind]
    if random.random() < 0.3:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if random.random() < 0.5:
        given["labels"] = labelled(batch)["labels"]
        if random.random() < 0.5:
            given["num_items_in_batch"] = random.choice([5, 7.0, torch.tensor(9)])
    elif random.random() < 0.5:
        given["logits_to_keep"] = random.choice([1, 4, torch.tensor([-2, -1])])
    for name in ("use_cache", "output_hidden_states", "output_attentions", "return_dict"):
        if random.random() < 0.4:
            given[name] = random.choice([True, False, None])
    return ids, given, masks.get(kind, torch.ones_like(mask)), random.random() < 0.3


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_are_drawn(llava, seed):
    from random import Random

    reference, processor, model = llava
    random = Random(seed)
    random.torch = torch.Generator().manual_seed(seed)
    for _ in range(12):
        batch = inputs(processor, random.choice(list(CASES)), random.choice(["left", "right"]))
        ids, given, mask, by_embedding = drawn(random, batch)
        results = []
        for net in (reference, model):
            first = {"inputs_embeds": net.get_input_embeddings()(ids)} if by_embedding else {"input_ids": ids}
            with torch.autocast("cpu", torch.bfloat16, enabled=seed == 3), torch.inference_mode(seed == 2):
                results.append(net(**first, **given))
        theirs, ours = results
        named = given.get("return_dict") is not False
        real = batch["attention_mask"].bool() if mask.dim() == 4 else mask.bool()
        tolerance = {"atol": 0.05, "rtol": 0.05} if seed == 3 else {"atol": 3e-5, "rtol": 1e-4}
        if named:
            assert (ours.cache is None) == (cache_of(theirs) is None)
            assert len(ours.hidden_states or ()) == len(theirs.hidden_states or ())
        else:
            assert isinstance(ours, tuple)
        at = 1 if "labels" in given else 0
        if at:
            torch.testing.assert_close(ours[0], theirs[0], **tolerance)
        a, b = ours[at], theirs[at]
        assert a.shape == b.shape and a.dtype == b.dtype
        keep = given.get("logits_to_keep")
        if keep is not None:
            real = real[:, keep] if isinstance(keep, torch.Tensor) else real[:, -keep:]
        torch.testing.assert_close(a[real], b[real], **tolerance)
