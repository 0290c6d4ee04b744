"""A Qwen-VL of each generation with random weights, in the published layout."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zoo.benches.random_files import write_random
from zoo.registry import Cut
from zoo.vision.encoders.qwen import MERGE

CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
PATCH = 14
IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
IDS |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class QwenVL:
    """Sizes of an encoder with heads of 80 and of an LLM with heads of 64; images of one grid.

    Args:
        family: model type.
        grid: of an image, in tokens.
        experts: of each layer in a mixture, each with half of the feed-forward width; two of them for a token.
    """

    family: str
    grid: tuple[int, int] = (10, 6)
    vision_width: int = 320
    vision_depth: int = 8
    text_width: int = 768
    text_depth: int = 6
    intermediate: int = 2048
    vocab: int = 16384
    experts: int = 6

    @property
    def tiny(self) -> "QwenVL":
        """The same family as small as it gets, to be loaded first."""
        return replace(
            self, vision_width=80, vision_depth=4, text_width=64, text_depth=4, intermediate=64, vocab=512, experts=2
        )

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def describe(self) -> str:
        mixture = f", {self.experts} experts of {self.intermediate // 2}" if self.family.endswith("moe") else ""
        return (
            f"{self.vision_depth} x {self.vision_width} at {self.grid[0]} x {self.grid[1]} image tokens, LLM of "
            f"{self.text_depth} x {self.text_width} (feed-forward {self.intermediate}{mixture}), "
            f"vocabulary {self.vocab}"
        )

    def write(self, folder: Path, dtype: torch.dtype) -> int:
        """Write the model and its processor as hub repositories hold them; returns the bytes of its weights."""
        import transformers

        processor = self._processor()
        config = self._config(processor.tokenizer)
        config.dtype = dtype
        with torch.device("meta"):
            model = getattr(transformers, f"{CLASSES[self.family]}ForConditionalGeneration")(config)
        config.architectures = [type(model).__name__]
        model.generation_config.eos_token_id = None  # every answer is as long as it was asked to be
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return write_random(shapes, folder / "model.safetensors", dtype)

    def prompts(self, image_token: int, rows: int, text: int, dtype: torch.dtype) -> tuple[dict, dict]:
        """Return prompts of one image and `text` tokens each, as our model takes them and as transformers' does."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(8, 256, (rows, text + self.image_tokens), generator=generator)
        ids[:, 4 : 4 + self.image_tokens] = image_token
        patch = 3 * 2 * PATCH**2  # a still image is shown twice
        pixels = torch.randn(rows * self.image_tokens * MERGE**2, patch, generator=generator).to(dtype)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        height, width = (MERGE * side for side in self.grid)
        theirs = {
            "image_grid_thw": torch.tensor([[1, height, width]] * rows),
            "mm_token_type_ids": (ids == image_token).int(),
        }
        return {**both, "cuts": [Cut(patches=self.grid)] * rows}, {**both, **theirs}

    def _config(self, tokenizer: Any) -> Any:
        import transformers

        three = self.family.startswith("qwen3")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
        rope |= {"mrope_interleaved": True} if three else {}
        text: dict[str, Any] = {
            "vocab_size": self.vocab, "hidden_size": self.text_width, "num_hidden_layers": self.text_depth,
            "num_attention_heads": self.text_width // 64, "num_key_value_heads": max(1, self.text_width // 192),
            "intermediate_size": self.intermediate, "max_position_embeddings": 4096, "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
        }  # fmt: skip
        text |= {"head_dim": 64} if three else {}
        if self.family.endswith("moe"):
            experts = {"num_experts": self.experts, "num_experts_per_tok": 2}
            text |= {**experts, "moe_intermediate_size": self.intermediate // 2}
        old = self.family == "qwen2_vl"
        vision: dict[str, Any] = {
            "depth": self.vision_depth, "num_heads": self.vision_width // 80, "patch_size": PATCH,
            "intermediate_size": 3 * self.vision_width, "hidden_size": self.text_width if old else self.vision_width,
        }  # fmt: skip
        vision |= {"embed_dim": self.vision_width, "mlp_ratio": 3} if old else {"out_hidden_size": self.text_width}
        last = self.vision_depth - 1
        vision |= {"fullatt_block_indexes": [last // 2, last]} if self.family == "qwen2_5_vl" else {}
        vision |= {"deepstack_visual_indexes": [0, 1, 2]} if three else {}
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IDS.items()}
        cls = getattr(transformers, f"{CLASSES[self.family]}Config")
        return cls(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)

    def _processor(self) -> Any:
        import transformers

        from zoo.text.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(["a picture of a red circle"], 320, "chatml")
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(IDS.values())})
        three = self.family.startswith("qwen3")
        sizes: dict[str, Any] = {"patch_size": PATCH, "size": {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}}
        videos = transformers.Qwen3VLVideoProcessor if three else transformers.Qwen2VLVideoProcessor
        cls = getattr(transformers, f"{'Qwen3VL' if three else CLASSES[self.family]}Processor")
        return cls(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer=tokenizer,
            video_processor=videos(**sizes),
            chat_template=TEMPLATE,
        )


QWEN = {family: QwenVL(family) for family in CLASSES}
