"""Tiny models of GLM-4.1V and GLM-4.6V by transformers' own classes."""

import torch

from tests import published_builders as build

CHAT = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif c['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>{% elif c['type'] == 'text' %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>")
SPECIAL = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>", *MARKS)
WORDS = {"glm4v": "Glm4v", "glm46v": "Glm46V", "glm4v_moe": "Glm4vMoe"}
FAMILIES = ["glm4v"]
VISION = {"depth": 4, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 72}
VISION |= {"patch_size": 4, "image_size": 24}


def made(name, folder, tie=False, **text):
    """A tiny model of the family, saved and loaded again."""
    import transformers as t

    tok = build.tokenizer("<|image|>", extra=SPECIAL)
    tok = type(tok)(
        tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", eos_token="<|user|>", padding_side="left"
    )
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
    text = {**build.TEXT, "vocab_size": len(tok) + 7, "rope_parameters": rope, "pad_token_id": tok.pad_token_id, **text}
    names = {"image_start": MARKS[0], "image_end": MARKS[1], "video_start": MARKS[2], "video_end": MARKS[3]}
    names |= {"image": "<|image|>", "video": "<|video|>"}
    ids = {f"{name}_token_id": tok.convert_tokens_to_ids(token) for name, token in names.items()}
    words, kind = WORDS[name], "glm4v"
    if name == "glm4v_moe":
        kind = name
        text |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    parts = {
        "text_config": {"model_type": f"{kind}_text", **text},
        "vision_config": {"model_type": f"{kind}_vision", **VISION},
    }
    config = getattr(t, f"{words}Config")(**parts, tie_word_embeddings=tie, **ids)
    model = getattr(t, f"{words}ForConditionalGeneration")(config)
    words = "Glm4v" if name == "glm4v_moe" else words
    sizes = {"patch_size": 4, "size": {"shortest_edge": 128, "longest_edge": 2 * 64 * 64}}
    videos = getattr(t, f"{words}VideoProcessor")(**sizes | {"size": {"shortest_edge": 128, "longest_edge": 16384}})
    images = getattr(t, f"{words}ImageProcessor")(**sizes)
    processor = getattr(t, f"{words}Processor")(images, tok, video_processor=videos, chat_template=CHAT)
    return build.finish(build.shake(model), processor, folder)
