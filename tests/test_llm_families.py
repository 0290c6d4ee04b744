"""Every causal LM of the installed transformers that can be built small: its attention, its answers, and pruners in it.

A family is one of transformers' own list; what it needs beside our sizes stands in EXTRA. Those that transformers does
not build from sizes like ours, or that are large whatever the sizes say, are left out here.
"""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from tests.conftest import picture, tiny_slots
from tests.dropping_builders import IMAGE, dropper, embeds_of, forward, kept, row
from tests.test_inside_contract import dropping, of_columns
from zoo import registry
from zoo.checking.checker import check
from zoo.checking.plan import Plan
from zoo.composed.generate import Prompt, prompted
from zoo.fusion.llm.attention import as_backend_mask, block_mask, resolve_attention
from zoo.fusion.llm.text_model import TEXT_MODELS, causal_types
from zoo.fusion.pruners.inside.attention_tap import tap_attention
from zoo.registry import ZooError

EXTRA = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "granitemoehybrid": {"mamba_n_heads": 4},
    "falcon_h1": {"mamba_chunk_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
}
NOT_DENSE = {"fuyu", *TEXT_MODELS}  # another model inside makes the tables; positions of several axes
MOST = 5_000_000  # parameters of a model that is tried
CPU = torch.device("cpu")


def built(model_type, attention=None):
    node = {"name": "hf", "model_type": model_type, "hidden_size": 32, "num_layers": 3, "num_heads": 4}
    node |= {"intermediate_size": 48, "max_positions": 128, "extra": EXTRA.get(model_type, {})}
    torch.manual_seed(0)
    return registry.build("llm", node, vocab_size=97, attention=attention).eval()


@pytest.fixture(params=sorted({*FAMILIES, *causal_types()}))
def llm(request):
    model_type = request.param
    try:
        with torch.device("meta"):
            meta = built(model_type)
        if sum(p.numel() for p in meta.parameters()) > MOST:
            pytest.skip("large whatever the sizes say")
        llm = built(model_type)
    except (ZooError, ValueError) as error:
        pytest.skip(f"transformers builds none of these sizes: {str(error)[:80]}")
    with torch.no_grad():
        for p in llm.parameters():  # sharp enough for a wrong mask to show
            p.mul_(6) if p.dim() > 1 else None
    return llm


class Stand:
    """What a prompt asks of the composed model around the LLM."""

    inside_pruners: dict = {}

    def __init__(self, llm):
        self.llm = llm

    def _placeholders(self, ids):
        return torch.zeros_like(ids, dtype=torch.bool)

    def _condition(self, *args, **kwargs):
        pass

    def place(self, ids, index, image_tokens):
        return torch.where((index >= 0)[..., None], image_tokens[index.clamp(min=0)], self.llm.embed(ids))


@torch.no_grad()
def test_a_family(llm):
    runs = attends(llm)
    if not runs:
        pytest.skip("transformers cannot run it with these sizes")
    packs(llm)
    answers(llm)
    drops(llm)
    reads(llm)


def packs(llm):
    """Samples of one row compute what each computes alone, or the family is known to mix them."""
    ids, kernel = row()[None], llm.lm.config._attn_implementation
    parts = ids.tensor_split(2, 1)
    places = [torch.arange(part.shape[1])[None] for part in parts]
    segments = torch.cat([torch.full_like(place, n) for n, place in enumerate(places)], 1)
    mask = as_backend_mask(block_mask(None, segments), kernel, torch.float32)
    alone = [
        llm.hidden(inputs_embeds=llm.embed(part), attention_mask=torch.ones_like(part), position_ids=place)
        for part, place in zip(parts, places, strict=True)
    ]
    given = {"attention_mask": mask, "padding_mask": torch.ones_like(ids), "position_ids": torch.cat(places, 1)}
    try:
        together = llm.hidden(inputs_embeds=llm.embed(ids), **given).last_hidden_state
        same = torch.allclose(together, torch.cat([out.last_hidden_state for out in alone], 1), atol=2e-3)
    except Exception:  # a mask of another form than it takes
        same = False
    assert same == (not llm.mixes_rows)


def attends(llm):
    """`auto` gives what a family knows, another kernel is refused or computes the same; whether it runs at all."""
    ids = row()[None]
    taken = resolve_attention("auto", CPU, torch.float32, lm=llm.lm)
    assert taken == ("sdpa" if llm.lm._supports_sdpa else "eager")
    states = {}
    for name in ("eager", "sdpa"):
        if name == "sdpa" and not llm.lm._supports_sdpa:
            with pytest.raises(ZooError, match=f"attention 'sdpa' cannot run: {type(llm.lm).__name__} has none"):
                resolve_attention(name, CPU, torch.float32, lm=llm.lm)
            continue
        llm.lm.set_attn_implementation(resolve_attention(name, CPU, torch.float32, lm=llm.lm))
        try:
            states[name] = llm.hidden(inputs_embeds=llm.embed(ids)).last_hidden_state
        except Exception:  # a family may fail in any way on sizes that it was not made for
            return False
        if not states[name].isfinite().all():
            return False
    if len(states) == 2:
        assert torch.allclose(*states.values(), atol=2e-3)
    return True


def answers(llm):
    """Ids with image tokens in their places are the embeddings that they stand for, where the family takes those."""
    ids = row()[None]
    image = ids == IMAGE
    index = (image.flatten().cumsum(0) - 1).view_as(ids).masked_fill(~image, -1)
    tokens = embeds_of(llm, ids)[image]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    wanted = []
    for given in ({"inputs_embeds": embeds_of(llm, ids)}, {"input_ids": ids}):
        try:
            wanted.append(llm.lm.generate(**given, **options)[0, -4:])
        except Exception:  # families without a cache that transformers makes, or that take no embeddings
            wanted.append(None)
    prompt = Prompt(Stand(llm), index, tokens, None, None, ids)
    if wanted[1] is not None:  # it can generate
        got = prompted(llm.lm, prompt).generate(ids, **options)[0, -4:]
        assert wanted[0] is None or torch.equal(got, wanted[0])


def drops(llm):
    """Tokens go inside as if they were hidden, or the pruner is refused when it is attached."""
    ids, keep = row()[None], {0: 0.5}
    try:
        drop = dropper(llm, keep)
    except ZooError as error:
        assert llm.lm.config.get_text_config().model_type in str(error) or type(llm.lm).__name__ in str(error)
        return
    dropped = forward(llm, drop, ids)
    drop.detach()
    hidden = forward(llm, dropper(llm, keep, hide=True), ids)
    assert all(torch.equal(a, b) for a, b in zip(kept(hidden), kept(dropped), strict=True))
    shorter, hidden = (out.last_hidden_state[:, -1] for out in (dropped, hidden))
    assert torch.allclose(shorter, hidden, atol=1e-4, rtol=1e-3)


def reads(llm):
    """The layer behind a cut is read as it would attend, and dense positions are those of hiding, or refused."""
    ids, seen, read = row()[None], [], []
    try:
        undo = tap_attention(llm.layers[1], lambda *given: seen.append(given), "test")
        forward(llm, None, ids)
        undo()
        drop = dropping(llm, lambda given: read.append(given) or of_columns(given), after=[0], reads="behind")
    except ZooError:
        return
    forward(llm, drop, ids)
    drop.detach()
    torch.testing.assert_close(read[0].key, seen[0][1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read[0].query[:, :, -1], seen[0][0][:, :, -1], atol=1e-5, rtol=1e-4)
    found = []
    for hide in (False, True):
        drop = dropping(llm, hide=hide, after=[0])
        try:
            found.append(forward(llm, drop, ids, dense=True).last_hidden_state[:, -1])
        except ZooError as error:
            assert "cannot count positions anew" in str(error) and llm.lm.config.model_type in NOT_DENSE
        drop.detach()
    assert not found or torch.allclose(*found, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "gpt_neox_japanese", "llama4_text", "gemma4_text"])
def test_a_family_composes_with_the_attention_it_has(model_type, attention, make_model):
    sizes = {**tiny_slots()["llm"], "model_type": model_type}
    sizes["extra"] = {"hidden_size_per_layer_input": 0} if model_type == "gemma4_text" else {}
    sizes |= {"num_experts": 4, "top_k": 2} if model_type == "gpt_oss" else {}
    check(Plan(tiny_slots(llm=sizes), vocab_size=360, attention=attention))
    model, processor = make_model(llm=sizes, attention=attention)
    taken = "sdpa" if "4_text" in model_type and attention == "auto" else "eager"
    assert model.llm.lm.config._attn_implementation == taken
    inputs = processor(images=[picture()], text=["<image>is it red?"])
    out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


def test_layers_that_embed_ids_anew_are_refused():
    node = {"name": "hf", "model_type": "gemma4_text", "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    with pytest.raises(ZooError, match="embeds the ids again in every layer"), torch.device("meta"):
        registry.build("llm", node, vocab_size=97)
