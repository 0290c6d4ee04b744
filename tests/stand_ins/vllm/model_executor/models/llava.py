"""LLaVA as vLLM has it: q, k and v in one layer, the tower cut behind the features, prompts updated by rules."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class BaseLlavaProcessingInfo:
    def __init__(self, ctx):
        self.ctx = ctx  # of the stand-in: the config and transformers' processor

    def get_hf_config(self):
        return self.ctx.config

    def get_num_image_tokens(self, *, image_width, image_height):
        vision = self.get_hf_config().vision_config
        return (vision.image_size // vision.patch_size) ** 2


class LlavaProcessingInfo(BaseLlavaProcessingInfo):
    def get_hf_processor(self, **kwargs):
        return self.ctx.processor


class LlavaDummyInputsBuilder:
    pass


class LlavaMultiModalProcessor:
    def __init__(self, info):
        self.info = info

    def _apply_hf_processor_main(self, prompt, images, *, enable_hf_prompt_update):
        """Ids, pixels, and whether transformers' processor wrote the placeholders."""
        processor = self.info.get_hf_processor()
        if enable_hf_prompt_update:
            made = processor(text=prompt, images=images, return_tensors="pt")
            return made.input_ids[0].tolist(), made.pixel_values, True
        pixels = processor.image_processor(images, return_tensors="pt").pixel_values
        return processor.tokenizer(prompt).input_ids, pixels, False

    def apply(self, prompt, images):
        """Ids with the placeholders of `get_num_image_tokens`, and pixels."""
        token = self.info.get_hf_config().image_token_index
        ids, pixels, written = self._apply_hf_processor_main(prompt, images, enable_hf_prompt_update=True)
        counts = [self.info.get_num_image_tokens(image_width=i.width, image_height=i.height) for i in images]
        if not written:
            left = iter(counts)
            ids = [x for i in ids for x in ([token] * next(left) if i == token else [i])]
        assert ids.count(token) == sum(counts), "placeholders that were not found"
        return ids, pixels


class Attention(nn.Module):
    def __init__(self, theirs):
        super().__init__()
        self.num_heads_per_partition, self.head_dim, self.tp_size = theirs.num_heads, theirs.head_dim, 1
        self.scale = self.head_dim**-0.5
        parts = theirs.q_proj, theirs.k_proj, theirs.v_proj
        weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
        self.qkv_proj = Linear(weight, bias)
        self.out_proj = Linear(theirs.out_proj.weight, theirs.out_proj.bias)

    def forward(self, hidden):
        heads = (self.num_heads_per_partition, self.head_dim)
        qkv, _ = self.qkv_proj(hidden)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Linear(nn.Module):
    """Its output comes with the bias that was not added, as that of vLLM's parallel layers."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), None


class Block(nn.Module):
    def __init__(self, theirs):
        super().__init__()
        self.self_attn, self.mlp = Attention(theirs.self_attn), theirs.mlp
        self.layer_norm1, self.layer_norm2 = theirs.layer_norm1, theirs.layer_norm2

    def forward(self, hidden):
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))[0]
        return hidden + self.mlp(self.layer_norm2(hidden))


class Tower(nn.Module):
    def __init__(self, theirs, depth):
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList(Block(b) for b in theirs.encoder.layers[:depth])
        self.embeddings, self.pre_layrnorm = theirs.embeddings, theirs.pre_layrnorm

    def forward(self, pixels):
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.vision_model.encoder.layers:
            hidden = block(hidden)
        return hidden[:, 1:]  # the strategy `default`


class LlavaForConditionalGeneration(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        theirs = vllm_config.weights  # of the stand-in: transformers' model
        self.config = vllm_config.model_config.hf_config
        depth = len(theirs.model.vision_tower.encoder.layers) + self.config.vision_feature_layer + 1
        self.vision_tower = Tower(theirs.model.vision_tower, depth)
        self.multi_modal_projector = theirs.model.multi_modal_projector

    def _process_image_pixels(self, inputs):
        return self.vision_tower(inputs["pixel_values"])

    def _process_image_input(self, image_input):
        return self.multi_modal_projector(self._process_image_pixels(image_input))

    def embed_multimodal(self, **kwargs):
        return self._process_image_input({"type": next(iter(kwargs)), **kwargs})


def config_for(config, theirs, video_pruning_rate=None):
    """A `VllmConfig` of the stand-in."""
    enabled = video_pruning_rate is not None and video_pruning_rate > 0
    multimodal = SimpleNamespace(is_multimodal_pruning_enabled=lambda: enabled)
    return SimpleNamespace(weights=theirs, model_config=SimpleNamespace(hf_config=config, multimodal_config=multimodal))
