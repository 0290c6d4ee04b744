"""Rows of the embedding and the vocabulary projection change as in transformers' LLaVA class, and last."""

import copy

import pytest
import torch
from torch import nn

import zoo
from tests import published_builders as build
from tests.published_builders import ASK, said
from zoo.registry import ZooError

SIZES = {
    "five more": {"new_num_tokens": 322},
    "around zero": {"new_num_tokens": 322, "mean_resizing": False},
    "to a multiple": {"pad_to_multiple_of": 64},
    "more, to a multiple": {"new_num_tokens": 322, "pad_to_multiple_of": 64},
    "fewer": {"new_num_tokens": 312},
    "as many": {"new_num_tokens": 317},
    "none": {},
}


@pytest.fixture(scope="module", params=["apart", "tied"])
def llava(request, tmp_path_factory):
    """The folder, transformers' model and processor, ours; 317 rows."""
    folder = tmp_path_factory.mktemp("embeddings") / "llava"
    config = {"tie_word_embeddings": True} if request.param == "tied" else {}
    reference, processor = build.llava(folder, **config)
    return folder, reference, processor, *zoo.load(f"dir:{folder}")


def inputs(processor):
    text = processor.apply_chat_template(said(1, ASK), add_generation_prompt=True)
    return dict(processor(images=[build.photo(40, 60)], text=[text], return_tensors="pt"))


@pytest.mark.parametrize("size", SIZES)
def test_rows_change_as_in_transformers(llava, size):
    _, reference, processor, model, _ = copy.deepcopy(llava)
    batch = inputs(processor)
    tables, logits = [], []
    before = model(**batch).logits
    for net in (reference, model):
        torch.manual_seed(3)
        tables.append(net.resize_token_embeddings(**SIZES[size]))
        logits.append(net(**batch).logits)
        assert net.get_input_embeddings() is tables[-1]
        assert net.get_output_embeddings().weight.shape == tables[-1].weight.shape
        assert net.config.get_text_config().vocab_size == len(tables[-1].weight)
    torch.testing.assert_close(tables[1].weight, tables[0].weight, atol=0, rtol=0)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-5)
    old = min(before.shape[-1], logits[1].shape[-1])
    torch.testing.assert_close(logits[1][..., :old], before[..., :old], atol=2e-5, rtol=0)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == reference.config.tie_word_embeddings


def test_other_layers_in_their_place(llava):
    _, _, processor, model, _ = copy.deepcopy(llava)
    batch = inputs(processor)
    embedding, head = nn.Embedding(317, 48), nn.Linear(48, 317, bias=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head
    out = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(out.logits, head(out.last_hidden_state))
    text = batch["input_ids"][0] != model.image_token_id
    torch.testing.assert_close(out.hidden_states[0][0, text], embedding(batch["input_ids"][0, text]))
    model.tie_weights()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.llm.lm.config.tie_word_embeddings


@pytest.mark.parametrize("size", ["five more", "fewer"])
def test_new_rows_are_saved_loaded_and_exported(llava, tmp_path, size):
    _, reference, processor, model, mine = copy.deepcopy(llava)
    if size == "five more":
        mine.tokenizer.add_tokens([f"<new{i}>" for i in range(5)])
    model.resize_token_embeddings(**SIZES[size])
    batch = inputs(processor)
    wanted = model(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    mine.save_pretrained(tmp_path / "saved")
    for again in (zoo.load(f"dir:{tmp_path / 'saved'}")[0], zoo.ZooModel.from_pretrained(tmp_path / "saved")):
        assert torch.equal(again(**batch).logits, wanted)
    again, same = zoo.load(f"dir:{tmp_path / 'saved'}")
    assert len(same.tokenizer) == len(mine.tokenizer)
    zoo.export(again, same, tmp_path / "exported")
    theirs = type(reference).from_pretrained(tmp_path / "exported").eval()
    assert theirs.get_input_embeddings().weight.shape == again.get_input_embeddings().weight.shape
    torch.testing.assert_close(theirs(**batch).logits, wanted, atol=1e-5, rtol=0)


def test_an_llm_from_sizes_and_one_from_a_checkpoint(tmp_path):
    """Own parts: what is saved says how many rows there are; a checkpoint of an LLM gives at least its own."""
    import transformers as t

    tok = build.tokenizer()
    (tmp_path / "lm").mkdir()
    lm = t.LlamaForCausalLM(t.LlamaConfig(**{**build.TEXT, "vocab_size": len(tok) + 7}))
    lm.save_pretrained(tmp_path / "lm")
    tok.save_pretrained(tmp_path / "lm")
    vision = {
        "name": "hf",
        "model_type": "siglip",
        "image_size": 32,
        "patch_size": 16,
        "width": 32,
        "depth": 1,
        "heads": 2,
    }
    for llm in ({"checkpoint": str(tmp_path / "lm")}, {"hidden_size": 48, "num_layers": 1}):
        model = zoo.ZooModel(
            zoo.ZooConfig(
                slots={"vision": vision, "projector": {"name": "linear"}, "llm": {"name": "hf", **llm}},
                image_token_id=tok.image_token_id, text_vocab_size=len(tok),
            )
        ).eval()  # fmt: skip
        rows = model.llm.vocab_size
        if "checkpoint" in llm:
            with pytest.raises(ZooError, match=f"gives {rows} rows whenever the model is loaded"):
                model.resize_token_embeddings(rows - 1)
        model.resize_token_embeddings(rows + 9)
        model.save_pretrained(tmp_path / "saved", include_base=True)
        again = zoo.ZooModel.from_pretrained(tmp_path / "saved")
        ids = torch.arange(rows - 4, rows + 9)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_what_cannot_change_is_refused(llava):
    _, _, _, model, _ = llava
    with pytest.raises(ZooError, match=f"leave no row for the image placeholder, id {model.image_token_id}"):
        model.resize_token_embeddings(model.image_token_id)
    import peft

    wrapped = copy.deepcopy(model)
    peft.get_peft_model(wrapped, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ZooError, match="vocabulary projection is a Linear of peft, whose rows cannot be changed"):
        wrapped.resize_token_embeddings(400)


def test_what_people_ask_of_a_model(llava):
    """Numbers of parameters, devices and data types; printing; the decoder."""
    _, reference, _, model, _ = llava
    named = dict(model.named_parameters())
    assert model.num_parameters() == sum(p.numel() for p in named.values())
    text = reference.model.language_model.num_parameters() + reference.get_output_embeddings().weight.numel()
    text -= reference.get_input_embeddings().weight.numel() if reference.config.tie_word_embeddings else 0
    assert model.llm.lm.num_parameters() == text
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - sum(
        m.weight.numel() for m in embeddings
    )
    assert "llama, 3 layers" in repr(model) and "LlamaForCausalLM" in repr(model.llm)
    assert model.get_decoder() is model.llm.lm.model and model.dtype == torch.float32
    assert model.get_memory_footprint() > 4 * model.num_parameters()
