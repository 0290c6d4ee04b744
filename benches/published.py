"""Models with random weights, in the published layout: what loading and generating are measured on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zoo.benches.llava import Sizes, config
from zoo.benches.published_qwen import QWEN, QwenVL
from zoo.benches.random_files import write_random

SIZES = {  # as those of zoo.benches.llava
    "tiny": Sizes(),
    "100m": Sizes(112, 14, 512, 8, 8, -2, 768, 8, 12, 2048, 16384),
    "1b": Sizes(336, 14, 1024, 12, 16, -2, 2048, 16, 16, 5504, 32064),
    "7b": Sizes(336, 14, 1024, 24, 16, -2, 4096, 32, 32, 11008, 32064),
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write(sizes: Sizes, folder: Path, dtype: torch.dtype) -> int:
    """Write the model and its processor as hub repositories hold them; returns the bytes of its weights."""
    from transformers import CLIPImageProcessor, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    from zoo.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a picture of a red circle"], 320, "chatml")
    tokenizer.chat_template = TEMPLATE
    image, end, pad = tokenizer.image_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    whole = config(sizes, positions=4096, image_token=image, eos=end, pad=pad)
    whole.dtype, whole.architectures = dtype, [Llava.__name__]
    with torch.device("meta"):
        model: Any = Llava(whole)
    model.generation_config.eos_token_id = None  # every answer is as long as it was asked to be
    folder.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    written = write_random(shapes, folder / "model.safetensors", dtype)
    side = sizes.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return written


@dataclass(frozen=True)
class Llava:
    """A LLaVA, as `QwenVL` is a Qwen-VL."""

    sizes: Sizes

    @property
    def tiny(self) -> "Llava":
        return Llava(SIZES["tiny"])

    @property
    def image_tokens(self) -> int:
        return self.sizes.image_tokens

    def describe(self) -> str:
        return self.sizes.describe()

    def write(self, folder: Path, dtype: torch.dtype) -> int:
        return write(self.sizes, folder, dtype)

    def prompts(self, image_token: int, rows: int, text: int, dtype: torch.dtype) -> tuple[dict, dict]:
        """Return prompts of one image and `text` tokens each, as both models take them."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(8, 256, (rows, text + self.image_tokens), generator=generator)
        ids[:, 4 : 4 + self.image_tokens] = image_token
        side = self.sizes.image_size
        pixels = torch.randn(rows, 3, side, side, generator=generator).to(dtype)
        both = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return both, both


MODELS: dict[str, Llava | QwenVL] = {name: Llava(sizes) for name, sizes in SIZES.items()} | QWEN
