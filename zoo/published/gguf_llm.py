"""The language model of a GGUF file: which architectures and tokenizers llama.cpp has names for, and their metadata."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zoo.registry import ZooError
from zoo.text.chat_template import ChatTemplate, takes_parts

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's graph of an architecture computes, which a config must not differ from.

    Attributes:
        name: of llama.cpp.
        activation: of the feed-forward layers.
        turned: whether the two halves of each head of queries and keys are stored interleaved, as its RoPE takes them.
        fixed: fields of the config with the values that the graph takes; absent ones count as the first.
        eps: field of the norms' epsilon.
    """

    name: str
    activation: str = "silu"
    turned: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    eps: str = "rms_norm_eps"


ARCHITECTURES = {
    "llama": Architecture("llama", turned=True, fixed={"mlp_bias": (False,), "attention_bias": (False,)}),
    "mistral": Architecture("llama", turned=True),
    "qwen2": Architecture("qwen2", fixed={"use_sliding_window": (False,)}),
    "qwen3": Architecture("qwen3", fixed={"use_sliding_window": (False,), "attention_bias": (False,)}),
    "starcoder2": Architecture(
        "starcoder2", activation="gelu_pytorch_tanh", fixed={"use_bias": (True,)}, eps="norm_epsilon"
    ),
}
# How text is cut before merges: the pattern of the first split -> llama.cpp's name.
_CUTS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": name
    for digits, name in ((r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe"))
}


def require_llm(text: Any, tokenizer: Any) -> None:
    """Refuse a language model or a tokenizer that llama.cpp has no name for, or computes otherwise.

    Raises:
        ZooError: with the reason.
    """
    kind = text.model_type
    if kind not in ARCHITECTURES:
        raise ZooError(
            f"A language model of type {kind!r} is not written as GGUF; {', '.join(ARCHITECTURES)} are. "
            "For transformers: --format hf."
        )
    known, wrong = ARCHITECTURES[kind], []
    act = str(getattr(text, "hidden_act", known.activation))
    if act != known.activation:
        wrong.append(f"hidden_act is {act!r}, and llama.cpp computes {known.activation!r}")
    for key, allowed in known.fixed.items():
        if getattr(text, key, allowed[0]) not in allowed:
            wrong.append(f"{key} is {getattr(text, key)!r}, and llama.cpp's graph is of {allowed[0]!r}")
    window = getattr(text, "sliding_window", None)
    if kind in ("mistral", "starcoder2") and window and window < text.max_position_embeddings:
        wrong.append(f"attention looks {window} tokens back (sliding_window), and llama.cpp's to the beginning")
    rope = _rope(text)
    if rope.get("rope_type", "default") not in ("default", "linear"):
        wrong.append(f"positions are scaled by {rope['rope_type']!r}, which is not written")
    if wrong:
        raise ZooError(f"llama.cpp's {known.name} is another model than this {kind}: {'; '.join(wrong)}.")
    cut_name(tokenizer)


def _rope(text: Any) -> dict[str, Any]:
    return dict(getattr(text, "rope_parameters", None) or {})


def cut_name(tokenizer: Any) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts text before merges.

    Raises:
        ZooError: it has none that is known here, or the tokenizer is not a byte-level BPE.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    before = backend.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    bpe = backend["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"] and not steps[-1].get("add_prefix_space")
    normal = (backend.get("normalizer") or {}).get("type")
    if bpe and normal in (None, "NFC"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (found := _CUTS.get(str(steps[0]["pattern"].get("Regex")))):
            return found
    raise ZooError(
        f"The tokenizer ({backend['model']['type']}, cut by {' and '.join(map(str, kinds))}) is not written as GGUF: "
        "byte-level BPE that cuts as GPT-2, SmolLM, Qwen2 or Llama 3 does is. For transformers: --format hf."
    )


def llm_fields(writer: Any, text: Any, tokenizer: Any, ends: Any, name: str) -> None:
    """Add the metadata of a language model and its tokenizer.

    Args:
        writer: of the package gguf.
        text: config of transformers.
        tokenizer: with a chat template.
        ends: ids that end answers; the first is the end of the sequence, another one of a turn.
        name: of the model.
    """
    known = ARCHITECTURES[text.model_type]
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_vocab_size(text.vocab_size)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_rope_dimension_count(size)
    if size != text.hidden_size // text.num_attention_heads:
        writer.add_key_length(size)
        writer.add_value_length(size)
    eps = getattr(text, known.eps)
    (writer.add_layer_norm_rms_eps if known.eps == "rms_norm_eps" else writer.add_layer_norm_eps)(eps)
    rope = _rope(text)
    theta: Any = rope.get("rope_theta") or getattr(text, "rope_theta", 10000.0)
    writer.add_rope_freq_base(float(theta))
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    _tokenizer_fields(writer, text, tokenizer, ends)


def _tokenizer_fields(writer: Any, text: Any, tokenizer: Any, ends: Any) -> None:
    import gguf

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in backend.get("added_tokens") or []}
    words = {at: word for word, at in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for at in range(text.vocab_size):
        word, entry = words.get(at), added.get(at)
        if word is None:  # rows of the table without a token
            word, kind = f"[PAD{at}]", gguf.TokenType.UNUSED
        elif entry is None:
            kind = gguf.TokenType.NORMAL
        else:
            kind = gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        tokens.append(word)
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = backend["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ends = [ends] if isinstance(ends, int) else list(ends or [tokenizer.eos_token_id])
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    for key in ("bos", "pad", "unk"):
        if (at := getattr(tokenizer, f"{key}_token_id")) is not None:
            getattr(writer, f"add_{key}_token_id")(at)
    writer.add_add_bos_token(_begins(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _begins(tokenizer: Any) -> bool:
    """Whether prompts of the model begin as the tokenizer begins texts.

    Templates of text write the whole beginning; llama.cpp does not write it twice.
    """
    if not tokenizer.bos_token or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    asked = [{"role": "user", "content": "a"}]
    return takes_parts(tokenizer) or ChatTemplate(tokenizer).render(asked, True).startswith(tokenizer.bos_token)


def llm_tensors(state: Mapping[str, Tensor], text: Any) -> dict[str, Tensor]:
    """Return the weights of the language model by llama.cpp's names.

    Args:
        state: by the names of published LLaVA files.
        text: config of transformers.
    """
    import gguf

    known = ARCHITECTURES[text.model_type]
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for file_name, tensor in state.items():
        if not file_name.startswith("language_model."):
            continue
        name = file_name.removeprefix("language_model.")
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise ZooError(f"llama.cpp's {known.name} has no name for the weight {name}.")
        if known.turned and re.search(r"\.[qk]_proj\.", name):
            heads = text.num_attention_heads if ".q_proj." in name else text.num_key_value_heads
            tensor = interleaved(tensor, heads)
        found[ours] = tensor
    return found


def interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows: llama.cpp rotates neighbours, transformers the halves."""
    rows = tensor.shape[0]
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
