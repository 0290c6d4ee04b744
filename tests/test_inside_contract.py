"""What a pruner inside the LLM may ask for: the layer behind the cut, states, votes, own sets, new rows, places."""

import copy

import pytest
import torch

from tests.conftest import ANSWERS, QUESTIONS, sample, tiny_slots
from tests.dropping_builders import IMAGE, embeds_of, forward, generate, kept, labelled, llm_of, loss_of, padded, row
from tests.fusion_builders import same_state
from zoo.fusion.pruners.inside.attention_tap import tap_attention
from zoo.fusion.pruners.inside.dropper import Choice, Dropper
from zoo.fusion.pruners.inside.sequence import TokenSequence
from zoo.registry import ZooError
from zoo.registry.versions import cache_argument, cache_of, checkpoint_activations

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "gemma2", "gemma3_text", "stablelm"]
FAMILIES += ["granite", "gpt_neox", "cohere", "phi", "qwen2_moe", "starcoder2"]
TWO = [row("tit", 8), row("titit", 4, 1)]


def half(layer, total):
    return total // (2 if layer == 0 else 4)


def of_columns(given):
    """Scores that hang on the column alone, so that any run chooses alike."""
    return (given.tokens.column * 7 % 11).float()


def dropping(llm, score=of_columns, budget=half, hide=False, after=(0, 1), **how):
    made = Dropper(llm, "pruner 'test'", list(after), budget, score, hide, **how)
    made.attach()
    return made


def attention(given):
    """Score by the mean of the attention of the voters."""
    from zoo.fusion.pruners.inside.attention_flow import attention_flow

    how = {"scaling": given.scaling, "visible": given.visible, "softcap": given.softcap}
    return attention_flow(given.query, given.key, given.votes, **how).mean(1)


# ---- the layer behind the cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_layer_behind_is_read_as_it_would_attend(model_type):
    kernel = "eager" if model_type == "gemma2" else "sdpa"
    plain, llm = llm_of(model_type, kernel), llm_of(model_type, kernel)
    ids, mask = padded(TWO)
    seen, read = [], []
    undo = tap_attention(plain.layers[2], lambda *given: seen.append(given), "test")
    forward(plain, None, ids, mask)
    undo()
    drop = dropping(llm, lambda given: read.append(given) or of_columns(given), after=[1], reads="behind")
    before = copy.deepcopy(llm.state_dict())
    cache = cache_of(forward(llm, drop, ids, mask, use_cache=True))
    query, key, scaling, softcap = seen[0]
    (given,) = read
    valid = mask.bool()
    torch.testing.assert_close(given.key.transpose(1, 2)[valid], key.transpose(1, 2)[valid], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(given.query[:, :, -1], query[:, :, -1], atol=1e-5, rtol=1e-4)
    own = key.shape[-1] ** -0.5
    assert given.layer == 2 and given.scaling == (own if scaling is None else scaling) and given.softcap == softcap
    assert given.votes.nonzero().tolist() == [[0, 16], [1, 16]]
    images = (ids == IMAGE).sum(1)
    longest = int((mask.sum(1) - images + images // 4).max())
    assert [cache.get_seq_length(i) for i in range(4)] == [17, 17, longest, longest]
    assert same_state(before, llm.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scores_of_the_layer_behind_drop_as_hiding_does_and_a_batch_is_each_alone(model_type, side):
    ids, mask = padded(TWO, side)
    found = []
    for hide in (False, True):
        llm = llm_of(model_type, "eager" if model_type == "gemma2" else "sdpa")
        drop = dropping(llm, attention, hide=hide, reads="behind")
        found.append(forward(llm, drop, ids, mask))
    assert all(torch.equal(a, b) for a, b in zip(*map(kept, found), strict=True))
    assert [k.sum(1).tolist() for k in kept(found[0])] == [[14, 17], [10, 13], [8, 11], [8, 11]]
    for i, one in enumerate(TWO):
        alone = kept(forward(llm, drop, one[None]))[-1][0]
        assert torch.equal(kept(found[0])[-1][i][mask[i].bool()], alone)


def test_reading_costs_the_keys_and_one_query():
    from zoo.benches.flops import flop_counter

    llm = llm_of()
    ids = row("tit", 40)[None]
    counts = []
    for reads in ("before", "behind"):
        drop = dropping(llm, after=[1], reads=reads)
        with flop_counter() as counter, torch.no_grad():
            forward(llm, drop, ids)
        counts.append(counter.get_total_flops())
        drop.detach()
    width, keys = 32, 16
    assert counts[1] - counts[0] == 2 * width * (46 * keys + width) == drop.reading_flops([46] * 4)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("on", [False, True], ids=["kept", "recomputed"])
def test_scoring_leaves_gradients_those_of_a_given_set(mixed, on):
    ids = row("titt", 8)[None]
    labels, grads = labelled(ids[0])[None], []
    chosen = {}
    for given in (False, True):
        llm, calls = llm_of("qwen2").train(), []

        def score(at, calls=calls):
            calls.append(at.layer)
            return attention(at)

        def same(cut, chosen=chosen):
            return torch.isin(cut.tokens.column, chosen[cut.layer])

        how = {"choose": same, "score": None} if given else {"score": score}
        drop = dropping(llm, reads="behind", **how)
        if on:
            checkpoint_activations(llm.lm)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            total, _, passed = loss_of(llm, ids, torch.ones_like(ids), labels)
        chosen = chosen or {i: passed.dropped.layers[i].column[0] for i in (1, 2)}
        total.backward()
        assert calls == ([] if given else [1, 2])
        grads.append([p.grad for p in llm.layers.parameters()])
        drop.detach()
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- states, votes, sets and rows of the pruner's own --------------------------------------------------------------


@torch.no_grad()
def test_states_at_the_cut_and_at_the_input_are_the_models_own():
    llm, cuts, starts = llm_of(), [], []

    def choose(cut):
        cuts.append(cut)
        return cut.best()

    def votes(start):
        starts.append(start)
        return (~start.tokens.image & start.tokens.seen).float() * start.hidden.abs().sum(-1)

    drop = dropping(llm, lambda given: given.votes + of_columns(given), choose=choose, votes=votes, after=[1])
    ids, mask = padded(TWO)
    out = forward(llm, drop, ids, mask)
    drop.detach()
    states = forward(llm, None, ids, mask, output_hidden_states=True).hidden_states
    assert torch.equal(starts[0].hidden, states[0]) and torch.equal(cuts[0].hidden, states[2])
    assert (cuts[0].layer, starts[0].layer) == (2, 0) and cuts[0].total.tolist() == [[8], [8]]
    expected = states[0].abs().sum(-1).masked_fill((ids == IMAGE) | ~mask.bool(), 0)
    torch.testing.assert_close(cuts[0].scores - of_columns(cuts[0]), expected)
    assert kept(out)[-1].sum(1).tolist() == [8, 11]


@torch.no_grad()
def test_a_pruner_keeps_the_set_that_it_names_and_what_predicts():
    llm = llm_of()
    drop = dropping(llm, None, None, after=[0], choose=lambda cut: cut.tokens.column % 4 == 0)
    ids, mask = padded([*TWO, row("ti", 4)])
    image = ids == IMAGE
    wanted = (~image | (torch.arange(ids.shape[1]) % 4 == 0)) & mask.bool()
    wanted[:, -1] = True  # an image token that predicts
    assert torch.equal(kept(forward(llm, drop, ids, mask))[-1], wanted)
    beams = generate(llm, drop, ids, mask, num_beams=2)
    hidden = llm_of()
    hide = dropping(hidden, None, None, True, after=[0], choose=lambda cut: cut.tokens.column % 4 == 0)
    assert torch.equal(beams.sequences, generate(hidden, hide, ids, mask, num_beams=2).sequences)


@torch.no_grad()
def test_a_budget_may_hang_on_the_scores():
    llm = llm_of()

    def score(given):
        return of_columns(given), given.tokens.count() // 4 + torch.tensor([[1], [3]])

    drop = dropping(llm, score, None, after=[1])
    ids, mask = padded(TWO)
    assert (kept(forward(llm, drop, ids, mask))[-1] & (ids == IMAGE)).sum(1).tolist() == [3, 5]


def merging(cut):
    """Keep every other image token, as the mean of itself and the one behind."""
    image = cut.tokens.image
    keep = image & (cut.tokens.column % 2 == 0)
    behind = cut.hidden.roll(-1, 1)
    return Choice(keep, torch.where(keep[..., None], (cut.hidden + behind) / 2, behind * 0))


@pytest.mark.parametrize("hide", [False, True])
def test_new_rows_take_the_column_of_a_kept_token_and_gradients_reach_what_they_are_made_of(hide):
    llm = llm_of().train()
    ids = row("tit", 6)[None]
    labels = labelled(ids[0])[None]
    dropping(llm, None, None, hide, after=[0], choose=merging)
    grads, states = [], []
    handle = llm.layers[0].register_forward_hook(lambda m, a, out: out.register_hook(grads.append) and None)
    handle2 = llm.layers[1].register_forward_pre_hook(lambda m, a, k: states.append((a, k)), with_kwargs=True)
    total, _, passed = loss_of(llm, ids, torch.ones_like(ids), labels)
    total.backward()
    handle.remove()
    handle2.remove()
    assert passed.dropped.kept()[-1][0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert all(bool(g) for g in grads[0][0, 3:9].abs().sum(-1).gt(0)[1:])  # dropped ones have a part in what is left


@torch.no_grad()
def test_merged_rows_are_means_and_text_stays_as_it_was():
    llm, seen = llm_of(), {}
    ids = row("tit", 6)[None]
    dropping(llm, None, None, after=[0], choose=lambda cut: merging(seen.setdefault("cut", cut)))
    out = forward(llm, None, ids)
    assert out.last_hidden_state.shape[1] == 12  # no pass, nothing is dropped
    out = forward(llm, True, ids)
    states = seen["cut"].hidden
    llm2 = llm_of()
    merged = [states[:, i : i + 2].mean(1, keepdim=True) for i in (4, 6, 8)]
    wanted = torch.cat([states[:, :3], *merged, states[:, 9:]], 1)
    index = torch.tensor([0, 1, 2, 4, 6, 8, 9, 10, 11])
    tables = llm2.decoder.rotary_emb(wanted, index[None])
    for layer in llm2.layers[1:]:
        wanted = layer(wanted, position_embeddings=tables, position_ids=index[None], attention_mask=None)
    torch.testing.assert_close(out.last_hidden_state, llm2.norm(wanted), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_choices_that_do_not_fit_are_refused():
    ids = row()[None]
    for choose, what in (
        (lambda cut: cut.tokens.column, r"must choose a bool tensor \[1, 24\], not torch.int64 \[1, 24\]"),
        (lambda cut: None, "must choose a bool tensor .*, not NoneType"),
        (lambda cut: (cut.tokens.image, cut.hidden[:, 1:]), r"gives states \[1, 23, 32\] in place of \[1, 24, 32\]"),
    ):
        llm = llm_of()
        with pytest.raises(ZooError, match=f"pruner 'test' {what}"):
            forward(llm, dropping(llm, None, None, choose=choose), ids)
    llm = llm_of()
    with pytest.raises(ZooError, match="without a score or a budget needs `choose`"):
        forward(llm, dropping(llm, None, None), ids)
    llm = llm_of()
    with pytest.raises(ZooError, match=r"gives votes \[1, 3\] for \[1, 24\]"):
        forward(llm, dropping(llm, votes=lambda start: start.hidden[:, :3, 0]), ids)


def test_votes_of_turns_are_the_tokens_in_front_of_the_answers():
    labels = torch.tensor([[-100, -100, -100, 5, 6, -100, -100, 7, -100], [-100] * 9])
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[:, 1] = True
    tokens = TokenSequence.of(image, None, None, labels)
    assert tokens.start("turns").tolist() == [[0, 0, 0.5, 0, 0, 0, 0.5, 0, 0], [0] * 8 + [1]]
    assert tokens.start("last")[0].nonzero().tolist() == [[2]]
    segments = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0] * 7 + [-1] * 2])
    tokens = TokenSequence.of(image, None, segments, labels)
    assert tokens.start("turns").tolist() == [[0, 0, 1, 0, 0, 0, 1, 0, 0], [0] * 6 + [1, 0, 0]]
    alone = TokenSequence.of(image, None, None, None)
    assert torch.equal(alone.start("turns"), alone.start("last"))


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "gemma", "phi"])
@torch.no_grad()
def test_the_final_norm_is_found(model_type):
    llm = llm_of(model_type)
    states = []
    llm.layers[-1].register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    out = forward(llm, None, row()[None]).last_hidden_state
    assert torch.equal(llm.norm(states[0]), out)


# ---- dense positions -----------------------------------------------------------------------------------------------


def staged(llm, ids, layers):
    """Run the layers by hand: before each, take what is kept of the row and count its positions from 0."""
    hidden, left = embeds_of(llm, ids[None]), torch.arange(len(ids))
    hidden = hidden * getattr(llm.lm.config, "embedding_multiplier", 1.0)
    for number, layer in enumerate(llm.layers):
        now = layers[number]
        hidden = hidden[:, torch.isin(left, now)]
        left = now
        positions = torch.arange(len(left))[None]
        tables = llm.decoder.rotary_emb(hidden, positions)
        out = layer(hidden, position_embeddings=tables, position_ids=positions, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out
    return llm.norm(hidden)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "stablelm", "granite"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_dense_positions_count_the_tokens_left_from_each_cut_on(model_type, side):
    llm = llm_of(model_type)
    drop = dropping(llm)
    ids, mask = padded(TWO, side)
    out = forward(llm, drop, ids, mask, dense=True)
    seen = out.passed.dropped.layers[-1].seen
    for i, one in enumerate(TWO):
        alone = forward(llm, drop, one[None], dense=True)
        assert torch.allclose(out.last_hidden_state[i][seen[i]], alone.last_hidden_state[0], atol=1e-5)
        layers = [k[0].nonzero()[:, 0] for k in kept(alone)]
        torch.testing.assert_close(alone.last_hidden_state, staged(llm, one, layers), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "phi3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_decoding_at_dense_positions_is_that_of_hiding_and_of_the_whole_sequence(model_type, how):
    ids, mask = padded(TWO)
    found = []
    for hide in (False, True):
        llm = llm_of(model_type)
        drop = dropping(llm, hide=hide)
        found.append(generate(llm, drop, ids, mask, dense=True, **how))
    a, b = found
    assert torch.equal(a.sequences, b.sequences)
    if how:
        return
    assert all(torch.allclose(x, y, atol=1e-5, rtol=1e-5) for x, y in zip(a.scores, b.scores, strict=True))
    drop.detach()
    drop = dropping(llm, budget=lambda layer, total: half(layer, torch.tensor([[8], [8]])))
    new = a.sequences[:, -5:]
    whole, longer = torch.cat([ids, new[:, :4]], 1), torch.cat([mask, torch.ones_like(new[:, :4])], 1)
    logits = llm.head(forward(llm, drop, whole, longer, dense=True).last_hidden_state[:, -5:])
    for i, scores in enumerate(a.scores):
        assert torch.allclose(logits[:, i], scores, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dense_positions_go_on_with_several_tokens_at_once_and_of_a_sliding_window():
    for options in ({}, {"extra": {"sliding_window": 8}}):
        llm = llm_of("mistral", **options)
        drop = dropping(llm)
        ids, mask = padded(TWO)
        more = row("tt", seed=9).expand(2, -1)
        longer = torch.cat([mask, torch.ones_like(more)], 1)
        states = []
        for chunks in ([6], [1, 2, 3]):
            cache, at = cache_of(forward(llm, drop, ids, mask, dense=True, use_cache=True)), ids.shape[1]
            for size in chunks:
                embeds = llm.embed(more[:, at - ids.shape[1] : at - ids.shape[1] + size])
                given = {"attention_mask": longer[:, : at + size]}
                given["position_ids"] = (longer.cumsum(1) - 1)[:, at : at + size]
                out = llm.hidden(inputs_embeds=embeds, **given, **cache_argument(cache), use_cache=True)
                at += size
            states.append(out.last_hidden_state[:, -1])
        assert torch.allclose(*states, atol=1e-5)


def test_packed_samples_count_their_own_dense_positions():
    image = torch.zeros(1, 12, dtype=torch.bool)
    image[0, [1, 2, 3, 8, 9]] = True
    segments = torch.tensor([[0] * 6 + [1] * 5 + [-1]])
    tokens = TokenSequence.of(image, None, segments, None, dense=True)
    keep = tokens.seen.clone()
    keep[0, [2, 3, 8]] = False
    for left in (tokens.gather(keep)[0], tokens.hide(keep)):
        assert left.place[left.seen].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    again = tokens.gather(keep)[0]
    more = again.seen & (again.column != 1) & (again.column != 9)
    assert again.gather(more)[0].place[0, :6].tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("model_type", ["opt", "biogpt", "moshi"])
@torch.no_grad()
def test_positions_in_the_embeddings_or_made_in_each_layer_go_on(model_type):
    ids, mask = padded(TWO)
    found = []
    for hide in (False, True):
        llm = llm_of(model_type, num_kv_heads=0)
        found.append(generate(llm, dropping(llm, hide=hide), ids, mask, dense=True))
    a, b = found
    assert all(torch.allclose(x, y, atol=1e-5, rtol=1e-5) for x, y in zip(a.scores, b.scores, strict=True))


@torch.no_grad()
def test_a_decoder_without_a_module_of_rotary_tables_cannot_be_dense(monkeypatch):
    llm = llm_of()
    drop = dropping(llm)
    monkeypatch.setattr(drop.arguments, "rotary", lambda: None)
    with pytest.raises(ZooError, match=r"cannot count positions anew inside 'llama'.*positions=kept"):
        forward(llm, drop, row()[None], dense=True)


def test_a_dense_model_counts_anew_in_batches_packed_rows_caches_and_generation(make_model):
    node = {"fastv": {"name": "fastv", "keep_ratio": 0.4, "layer": 1}}
    llm = {**tiny_slots()["llm"], "num_layers": 4}
    (kept_model, _), (model, processor) = (
        make_model(seed=3, pruner=node, llm=llm, positions=word) for word in ("auto", "dense")
    )
    assert (kept_model.config.positions, model.config.positions) == ("kept", "dense")
    model.load_state_dict({k: v * 3 for k, v in model.state_dict().items()})
    kept_model.load_state_dict(model.state_dict())
    rows = [
        processor.encode(sample((QUESTIONS[i], ANSWERS[i]), images=n, name=str(i), seed=i))
        for i, n in enumerate((1, 2, 0))
    ]
    alone = [model(**processor.collate([one])) for one in rows]
    many = [int((out.labels != -100).sum()) for out in alone]
    mean = sum(out.loss * n for out, n in zip(alone, many, strict=True)) / sum(many)
    batches = [processor.collate(rows, padding_side=side) for side in ("left", "right")]
    for batch in [*batches, processor.collate(processor.pack(rows, 200))]:
        torch.testing.assert_close(model(**batch).loss, mean, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(kept_model(**batch).loss, mean, atol=1e-3, rtol=1e-3)
    model.generation_config.eos_token_id = None
    s = sample((QUESTIONS[0], "yes"), images=2)
    given = processor.collate([processor.encode_prompt(s, s.dialogs[0])])
    ids, pixels = given["input_ids"], given["pixel_values"]
    new = model.generate(ids, pixels, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    with torch.no_grad():
        out, said = model(ids, pixels, use_cache=True), []
        for _ in range(4):
            said.append(out.logits[:, -1].argmax(-1, keepdim=True))
            out = model(said[-1], cache=out.cache, use_cache=True)
    assert torch.equal(torch.cat(said, 1), new)
