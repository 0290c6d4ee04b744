"""Tiny models of PaddleOCR-VL by transformers' own classes."""

import torch

from tests import published_builders as build

CHAT = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}User: {% else %}Assistant: {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'user' %}\n{% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
WORDS = {"paddleocr_vl": "PaddleOCRVL"}
MARKS = ("<|IMAGE_START|>", "<|IMAGE_END|>")


def made(name, folder, tie=True, **text):
    """A tiny model, saved and loaded again."""
    import transformers as t

    tok = build.tokenizer("<|IMAGE_PLACEHOLDER|>", extra=MARKS)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = {**build.TEXT, "vocab_size": len(tok) + 7, "rope_parameters": rope, "head_dim": 12, **text}
    text |= {"pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    vision = {**build.VISION, "patch_size": 4, "image_size": 24, "intermediate_size": 72}
    ids = {"image": "<|IMAGE_PLACEHOLDER|>", "vision_start": MARKS[0], "vision_end": MARKS[1]}
    ids = {f"{key}_token_id": tok.convert_tokens_to_ids(token) for key, token in ids.items()}
    parts = {"text_config": text | {"tie_word_embeddings": tie}, "vision_config": vision}
    config = t.PaddleOCRVLConfig(**parts, tie_word_embeddings=tie, **ids)
    images = t.PaddleOCRVLImageProcessor(patch_size=4, size={"shortest_edge": 64, "longest_edge": 64 * 64})
    processor = t.PaddleOCRVLProcessor(images, tok, chat_template=CHAT)
    return build.finish(build.shake(t.PaddleOCRVLForConditionalGeneration(config)), processor, folder)
