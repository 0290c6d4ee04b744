"""The transformers causal LM as a part: sizes, head, embeddings, experts, checkpoints."""

import json
import warnings

import pytest
import torch

from tests.fusion_builders import DENSE, MOE, VOCAB, llm_node, padded_batch, tiny_llm
from zoo import registry
from zoo.registry import ZooError
from zoo.registry.forward_pass import running
from zoo.registry.versions import checkpoint_activations


@pytest.mark.parametrize("model_type", [*DENSE, *MOE])
@torch.no_grad()
def test_hidden_and_head_are_the_models_own_forward(model_type):
    llm = tiny_llm(model_type)
    ids, mask = padded_batch()
    wanted = llm.lm(input_ids=ids, attention_mask=mask).logits
    hidden = llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask).last_hidden_state
    assert torch.equal(llm.head(hidden), wanted)
    assert torch.allclose(llm.head(hidden[0, 3:5]), wanted[0, 3:5], atol=1e-6)  # any leading shape
    assert hidden.shape[-1] == llm.hidden_size == 32
    assert len(llm.layers) == llm.num_layers == 2
    assert (llm.vocab_size, llm.max_positions) == (VOCAB, 128)
    assert llm.provides == (frozenset({"moe"}) if model_type in MOE else frozenset({"dense"}))


@pytest.mark.parametrize("model_type", [*DENSE, *MOE])
@torch.no_grad()
def test_a_head_in_numbers_is_the_head(model_type):
    llm, hidden = tiny_llm(model_type), torch.randn(3, 32)
    weight, bias, scale, cap = llm.linear_head()
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, llm.head(hidden))


def test_a_head_with_a_hook_is_not_in_numbers():
    llm = tiny_llm()
    handle = llm.lm.get_output_embeddings().register_forward_hook(lambda module, args, out: out + 1)
    assert llm.linear_head() is None
    handle.remove()
    assert llm.linear_head() is not None


def _without_last(logits):
    logits[..., 298] = -1e9  # as families do with ids that are never to be written
    return logits


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1, lambda x: x * 1.05, lambda x: torch.tanh(x / 2) * 2, lambda x: x[..., :-1], _without_last],
    ids=["shifted", "scaled", "capped", "cut", "one of the vocabulary"],
)
def test_a_head_that_is_not_known_is_refused(monkeypatch, change):
    """Also one that shows only in the whole vocabulary: some rows are compared first."""
    from transformers import LlamaForCausalLM

    own, node = LlamaForCausalLM.forward, llm_node("llama", extra={"initializer_range": 0.2})
    registry.build("llm", node, vocab_size=300)

    def changed(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    with pytest.raises(ZooError, match="cannot be reproduced from its hidden states"):
        registry.build("llm", node, vocab_size=300)


def test_the_head_is_whole_after_it_was_compared():
    llm = registry.build("llm", llm_node("llama"), vocab_size=300)
    assert llm.lm.lm_head.weight.shape[0] == llm.vocab_size == llm.lm.lm_head.out_features > 128
    assert llm.lm.lm_head.weight.requires_grad and not llm.lm.lm_head.weight.is_meta
    tied = registry.build("llm", llm_node("llama", tie_embeddings=True), vocab_size=300)
    assert tied.lm.lm_head.weight is tied.lm.get_input_embeddings().weight


def test_scaled_embeddings_are_not_scaled_twice():
    llm = tiny_llm("gemma")
    ids = torch.tensor([[5]])
    assert torch.allclose(llm.embed(ids), llm.lm.get_input_embeddings().weight[5] * 32**0.5)


def test_random_weights_follow_from_torchs_seed_alone():
    a, b, c = (tiny_llm(seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "gpt2", "gpt_neox", "opt", "mixtral"])
@torch.no_grad()
def test_zero_init_residual_starts_every_layer_as_the_identity(model_type):
    llm = tiny_llm(model_type, zero_init_residual=True)
    states = llm.hidden(input_ids=padded_batch()[0], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])


def test_zero_init_is_refused_where_a_norm_follows():
    with pytest.raises(ZooError, match="normalises the outputs added"):
        tiny_llm("olmo2", zero_init_residual=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "type 'lama' in transformers. Did you mean 'llama'"),
        ({"extra": {"rope_paramters": {}}}, "'rope_paramters'. Did you mean 'rope_parameters'"),
        ({"extra": {"hidden_act": "gelo"}}, "cannot be built: 'gelo'"),
        ({"extra": {"rms_norm_eps": "small"}}, "rms_norm_eps"),
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"num_experts": 4}, "num_experts is for MoE families; 'llama'"),
        ({"model_type": "olmoe", "num_experts": 4, "top_k": 5}, "runs top_k=5 experts for each token and has num_exp"),
        ({"model_type": "gpt2"}, "leave num_kv_heads at 0"),
        ({"router_aux_coef": 0.1}, "for MoE LLMs"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"checkpoint": "x/y", "zero_init_residual": True}, "zero_init_residual is for random weights"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ZooError, match=message):
        registry.build("llm", llm_node() | options, vocab_size=VOCAB)


def test_a_checkpoint_that_runs_more_experts_than_it_has_is_refused(tmp_path):
    config = tiny_llm("mixtral").lm.config
    config.num_experts_per_tok = 9
    config.save_pretrained(tmp_path)
    with pytest.raises(ZooError, match=f"{tmp_path.name}.*runs top_k=9 experts for each token and has num_experts=4"):
        registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=VOCAB)


def test_without_a_tokenizer_there_is_no_vocabulary():
    with pytest.raises(ZooError, match="takes its vocabulary size from the tokenizer"):
        registry.build("llm", llm_node())


def test_further_fields_reach_the_transformers_config():
    llm = tiny_llm(extra={"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "attention_bias": True})
    assert llm.lm.config.rope_parameters["rope_theta"] == 500.0
    assert llm.layers[0].self_attn.q_proj.bias is not None


def test_a_checkpoint_gives_its_weights_and_grows_with_the_tokenizer(tmp_path):
    first = tiny_llm("qwen2", tie_embeddings=True)
    first.lm.save_pretrained(tmp_path)
    node = {"name": "hf", "checkpoint": str(tmp_path)}
    same = registry.build("llm", node, vocab_size=50).eval()
    assert same.vocab_size == VOCAB  # never shrinks
    ids, mask = padded_batch()
    wanted = first.lm(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(same.lm(input_ids=ids, attention_mask=mask).logits, wanted)
    larger = registry.build("llm", node, vocab_size=VOCAB + 3).eval()
    got = larger.lm(input_ids=ids, attention_mask=mask).logits
    assert got.shape[-1] == VOCAB + 3 == larger.vocab_size
    assert torch.equal(got[..., :VOCAB], wanted)
    with torch.device("meta"):
        structure = registry.build("llm", node, vocab_size=VOCAB + 3)
    assert {k: v.shape for k, v in structure.state_dict().items()} == {
        k: v.shape for k, v in larger.state_dict().items()
    }
    half = registry.build("llm", node, vocab_size=50, dtype="bfloat16")
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_checkpoint_without_some_of_its_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_llm().lm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ZooError, match=r"lacks 1 weights, 'model.layers.1.mlp.up_proj.weight'"):
        registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("stated", "first"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.input"),
        ({"attention_bias": False}, "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_weights_that_the_config_of_a_checkpoint_leaves_out_are_named(tmp_path, stated, first):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    node = {"name": "hf", "checkpoint": str(tmp_path)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.build("llm", node, vocab_size=40)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **stated}))
    with pytest.warns(UserWarning, match=rf"has \d+ weights that a 'llama' .*{first}.*left out"):
        registry.build("llm", node, vocab_size=40)


@pytest.mark.parametrize("grows", [0, 8])
def test_two_matrices_of_a_checkpoint_stay_two_whatever_its_config_ties(tmp_path, grows):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=False)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "tie_word_embeddings": True}))
    lm = registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=40 + grows).lm
    held = load_file(tmp_path / "model.safetensors")
    assert torch.equal(lm.get_input_embeddings().weight[:40], held["model.embed_tokens.weight"])
    assert torch.equal(lm.get_output_embeddings().weight[:40], held["lm_head.weight"])
    assert not lm.config.tie_word_embeddings  # what a saved model will state


def test_only_safetensors_and_causal_lms_are_read(tmp_path):
    llm = tiny_llm()
    llm.lm.config.save_pretrained(tmp_path)
    torch.save(llm.lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ZooError, match=r"pytorch_model\.bin; only safetensors are read"):
        registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=VOCAB)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(ZooError, match="'clip_vision_model', which is not a causal LM"):
        registry.build("llm", {"name": "hf", "checkpoint": str(tmp_path)}, vocab_size=VOCAB)


@pytest.mark.parametrize("model_type", MOE)
def test_balance_loss_is_transformers_own_and_ignores_padding(model_type):
    llm = tiny_llm(model_type, router_aux_coef=0.5).train()
    ids, mask = padded_batch()
    with running():
        llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=mask)
        got = llm.aux_losses()["router_balance"]
    wanted = llm.lm(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert torch.allclose(got, 0.5 * wanted)
    assert torch.autograd.grad(got, list(llm.layers[0].parameters()), allow_unused=True)[0] is not None
    four = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool() | torch.eye(9).bool()
    with running():
        llm.hidden(inputs_embeds=llm.embed(ids), attention_mask=four, padding_mask=mask)
        assert torch.allclose(llm.aux_losses()["router_balance"], got, atol=1e-6)
    with running():
        llm.eval().hidden(input_ids=ids)
        assert llm.aux_losses() == {}
    with pytest.raises(ZooError, match="Losses of a pass are read within it"):
        llm.aux_losses()


def test_balance_loss_says_when_checkpointing_takes_its_gradient():
    llm = tiny_llm("mixtral", router_aux_coef=0.5).train()
    checkpoint_activations(llm.lm, {"use_reentrant": True})
    ids = padded_batch()[0]
    with running(), pytest.raises(ZooError, match="use_reentrant=False"):
        llm.hidden(inputs_embeds=llm.embed(ids).detach().requires_grad_())
        llm.aux_losses()
