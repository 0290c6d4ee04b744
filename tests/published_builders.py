"""Tiny models of published families, with random weights, saved by transformers' own classes as hubs hold them."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ["is there a red circle?", "what color is the square?", "describe the picture.", "yes no blue red two"]

# A chat template as LLaVA's processors publish: typed parts, images first.
LLAVA_CHAT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 2048}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
VISION |= {"image_size": 32, "patch_size": 8}


def tokenizer(image_token="<image>", extra=(), bos=False):
    """A byte-level BPE with the special tokens of a published tokenizer; `bos`: it begins texts, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", *extra, image_token]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS * 3, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens={"image_token": image_token},
    )  # fmt: skip


def text_config(kind, tok, **more):
    """A config of a tiny language model whose table is larger than the tokenizer, as published ones are."""
    import transformers as t

    sizes = {**TEXT, "vocab_size": len(tok) + 7, "pad_token_id": tok.pad_token_id, **more}
    sizes |= {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    kinds = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "mistral": t.MistralConfig, "mixtral": t.MixtralConfig}
    kinds |= {"qwen2_moe": t.Qwen2MoeConfig, "qwen3_moe": t.Qwen3MoeConfig, "phimoe": t.PhimoeConfig}
    return kinds[kind](**{**sizes, **MIXTURES.get(kind, {})})


MIXTURES = {  # four experts, two of them for a token
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def shake(model, seed=0):
    """Move all weights, norms and biases too, so that no error hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.08)
    return model.eval()


def finish(model, processor, folder: Path, dtype=None):
    """Save both, and give back what transformers loads from the folder: that is the reference."""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval(), type(processor).from_pretrained(folder)


def llava(folder: Path, dtype=None, text="llama", **config):
    """LLaVA-1.5: CLIP, two linear layers, a Llama."""
    import transformers as t

    tok = tokenizer(bos=True)
    torch.manual_seed(0)
    vision = t.CLIPVisionConfig(**VISION)
    model = t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=vision, text_config=text_config(text, tok), image_token_index=tok.image_token_id,
            image_seq_length=16, **config,
        )
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = t.LlavaProcessor(
        image_processor=images, tokenizer=tok, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return finish(shake(model), processor, folder, dtype)


def photo(height, width, seed=0, mode="RGB"):
    """A random image with some structure."""
    generator = np.random.default_rng([seed, height, width])
    coarse = generator.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(-20, 20, (height, width, 3))
    image = Image.fromarray(np.clip(np.asarray(image).astype(int) + noise, 0, 255).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(generator.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    return image.convert(mode)


def shapes(folder: Path) -> dict[str, object]:
    """The table of images: name -> what people hand in (a PIL image, or a file where a file is the point)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "square": photo(50, 50),
        "portrait": photo(90, 40),
        "landscape": photo(40, 90),
        "exact": photo(32, 32),
        "tiny": photo(5, 7),
        "1x2000": photo(1, 2000),
        "2000x1": photo(2000, 1),
        "grey": photo(45, 60, mode="L"),
        "palette": photo(45, 60, mode="P"),
        "rgba": photo(45, 60, mode="RGBA"),
    }
    rotated = photo(40, 70, seed=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated.save(folder / "rotated.png", exif=exif)
    table["exif"] = str(folder / "rotated.png")
    values = np.random.default_rng(5).integers(0, 2**16, (33, 47), dtype=np.uint16)
    Image.fromarray(values).save(folder / "sixteen.png")
    table["16-bit"] = str(folder / "sixteen.png")
    return table


def high_bytes(path):
    """A 16-bit image in 8 bits. transformers' own loader keeps 16 bits here and gives pixels of several hundreds."""
    return Image.fromarray((np.asarray(Image.open(path)) // 256).astype(np.uint8))


def edit_json(folder: Path, name: str, **values):
    """Change values of a JSON file in a folder."""
    content = json.loads((folder / name).read_text())
    content.update(values)
    (folder / name).write_text(json.dumps(content))


PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def llava_next(folder: Path, text="mistral"):
    """LLaVA-NeXT: crops of 32 pixels by pinpoints."""
    import transformers as t

    tok = tokenizer(bos=True)
    torch.manual_seed(0)
    model = t.LlavaNextForConditionalGeneration(
        t.LlavaNextConfig(
            vision_config=t.CLIPVisionConfig(**VISION), text_config=text_config(text, tok),
            image_token_index=tok.image_token_id, image_grid_pinpoints=PINPOINTS,
        )
    )  # fmt: skip
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    processor = t.LlavaNextProcessor(
        image_processor=images, tokenizer=tok, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return finish(shake(model), processor, folder)


def llava_next_video(folder: Path):
    """LLaVA-NeXT-Video: frames are pooled ahead of the projector."""
    import transformers as t

    tok = tokenizer(extra=("<video>",))
    torch.manual_seed(0)
    model = t.LlavaNextVideoForConditionalGeneration(
        t.LlavaNextVideoConfig(
            vision_config=t.CLIPVisionConfig(**VISION), text_config=text_config("llama", tok),
            image_token_index=tok.image_token_id, video_token_index=tok.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=PINPOINTS,
        )
    )  # fmt: skip
    images = t.LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    videos = t.LlavaNextVideoVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = t.LlavaNextVideoProcessor(
        image_processor=images, video_processor=videos, tokenizer=tok, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return finish(shake(model), processor, folder)


def video_llava(folder: Path):
    """Video-LLaVA: one encoder for images and another one for frames."""
    import transformers as t

    tok = tokenizer(extra=("<video>",), bos=True)
    torch.manual_seed(0)
    model = t.VideoLlavaForConditionalGeneration(
        t.VideoLlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION), text_config=text_config("llama", tok),
            image_token_index=tok.image_token_id, video_token_index=tok.convert_tokens_to_ids("<video>"),
            image_seq_length=16, video_seq_length=8 * 17,
        )
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = t.VideoLlavaProcessor(
        image_processor=t.VideoLlavaImageProcessor(**sizes), video_processor=t.VideoLlavaVideoProcessor(**sizes),
        tokenizer=tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )  # fmt: skip
    return finish(shake(model), processor, folder)


def llava_onevision(folder: Path):
    """LLaVA-OneVision: SigLIP, at most two crops' tokens, so that large images are scaled down."""
    import transformers as t

    tok = tokenizer(extra=("<video>",))
    tok.add_special_tokens({"additional_special_tokens": ["<video>"]})
    torch.manual_seed(0)
    pinpoints = [[32 * a, 32 * b] for a in (1, 2, 3) for b in (1, 2, 3)]
    model = t.LlavaOnevisionForConditionalGeneration(
        t.LlavaOnevisionConfig(
            vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=text_config("qwen2", tok),
            image_token_index=tok.image_token_id, video_token_index=tok.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_2",
        )
    )  # fmt: skip
    images = t.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    processor = t.LlavaOnevisionProcessor(
        image_processor=images, tokenizer=tok, num_image_tokens=16, vision_feature_select_strategy="full",
        video_processor=t.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}), chat_template=LLAVA_CHAT,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return finish(shake(model), processor, folder)


SMOL_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _smol(folder: Path, names):
    import transformers as t

    places = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    extra = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *places)
    tok = tokenizer(extra=extra)
    torch.manual_seed(0)
    vision = getattr(t, f"{names}VisionConfig")(**VISION)
    config = getattr(t, f"{names}Config")(
        vision_config=vision, text_config=text_config("llama", tok), image_token_id=tok.image_token_id, scale_factor=2
    )
    model = getattr(t, f"{names}ForConditionalGeneration")(config)
    sides = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    images = getattr(t, f"{names}ImageProcessor")(**sides)
    more = {"video_processor": t.SmolVLMVideoProcessor(**sides)} if names == "SmolVLM" else {}
    processor = getattr(t, f"{names}Processor")(
        image_processor=images, tokenizer=tok, image_seq_len=4, chat_template=SMOL_CHAT, **more
    )
    return finish(shake(model), processor, folder)


def idefics3(folder: Path):
    """Idefics3, as the first SmolVLM is published: tiles of 32 pixels, four tokens each."""
    return _smol(folder, "Idefics3")


def smolvlm(folder: Path):
    """SmolVLM 2. Its processor wants a package that spells numbers, for videos only: here of five frames."""
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or {5: "five"}.get
    return _smol(folder, "SmolVLM")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif c['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(folder: Path, text="qwen2", tie=True):
    """InternVL: tiles of 32 pixels, an overview behind them, four tokens each."""
    import transformers as t

    tok = tokenizer("<IMG_CONTEXT>", extra=("<img>", "</img>", "<video>", "<|im_start|>", "<|im_end|>"))
    tok = type(tok)(
        tokenizer_object=tok.backend_tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )  # fmt: skip
    torch.manual_seed(0)
    sides = {"image_size": [32, 32], "patch_size": [8, 8]}
    vision = t.InternVLVisionConfig(**{**VISION, **sides}, attention_bias=True)
    model = t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            vision_config=vision, text_config=text_config(text, tok, tie_word_embeddings=tie),
            tie_word_embeddings=tie,
            image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
        )
    )  # fmt: skip
    images = t.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, max_patches=6)
    videos = t.InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = t.InternVLProcessor(
        image_processor=images, tokenizer=tok, video_processor=videos,
        image_seq_length=4, chat_template=CHATML,
    )  # fmt: skip
    return finish(shake(model), processor, folder)


# ---- what is asked of them ---------------------------------------------------------------------------------------

ASK = "is there a red circle?"
CASES = {  # samples: number of images, question
    "one image": [(1, ASK)],
    "several images": [(3, "describe the picture.")],
    "text only": [(0, "yes no blue")],
    "unlike samples": [(1, ASK), (0, "yes"), (2, "what color is the square? describe the picture.")],
}


def said(images, question=ASK):
    """A question about several images, as chat messages."""
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}]
