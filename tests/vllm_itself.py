"""vLLM's own configuration, processor, CLIP tower and projector with the plug-in: `python tests/vllm_itself.py FOLDER`.

FOLDER has a LLaVA. On a CPU, and without vLLM's compiled kernels where they are missing: torch's linear layers and
transformers' activations are in their place. The engine, its language model and its kernels do not run here.
"""

# ruff: noqa: E402  # the platform is set ahead of what asks for it

import os
import sys
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
import vllm
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

import vllm.model_executor.models.clip as clip
import vllm.model_executor.models.llava as llava
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext

import zoo
from tests import published_builders as build
from tests.test_vllm import PROMPT, prefilled
from zoo import vllm_plugin

folder = sys.argv[1]
assert vllm_plugin.register()
overrides = {
    "architectures": [vllm_plugin.ARCHITECTURE],
    "zoo_pruner": {"name": "fastervlm", "keep_ratio": 0.25, "positions": "kept"},
    "text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}},
}
options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
config = ModelConfig(model=folder, tokenizer=folder, hf_overrides=overrides, video_pruning_rate=0.5, **options)
assert config.uses_mrope and config.multimodal_config.is_multimodal_pruning_enabled()

processor = MULTIMODAL_REGISTRY.create_processor(config)
photos = [build.photo(40, 60, seed=i) for i in range(2)]
prompt = AutoProcessor.from_pretrained(folder).tokenizer(PROMPT).input_ids
items = processor.info.parse_mm_data({"image": photos})
made = processor.apply(ProcessorInputs(prompt=prompt, mm_data_items=items), TimingContext())
ids = list(made["prompt_token_ids"])
composed, ours = zoo.load(f"dir:{folder}", "pruner=[fastervlm]", "pruner.fastervlm.keep_ratio=0.25", "positions=kept")
given = ours(images=photos, text=PROMPT, return_tensors="pt")
assert given["input_ids"][0].tolist() == ids, "placeholders"

clip.get_act_fn = llava.get_act_fn = lambda name, *_, **__: ACT2FN[name]
llava.init_vllm_registered_model = lambda **_: torch.nn.Module()
torch.nn.Module.make_empty_intermediate_tensors = None
whole = VllmConfig(model_config=config)
with set_current_vllm_config(whole), torch.no_grad():
    init_distributed_environment(1, 0, f"file://{Path(folder).resolve()}/rendezvous", 0, backend="gloo")
    initialize_model_parallel(1, 1)
    from zoo.serving.vllm_llava import ZooLlavaForConditionalGeneration

    model = ZooLlavaForConditionalGeneration(vllm_config=whole).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(folder)
    state = theirs.model.vision_tower.state_dict()
    for name, p in model.vision_tower.named_parameters():
        name = name.removeprefix("vision_model.")
        p.copy_(torch.cat([state[name.replace("qkv", x)] for x in "qkv"]) if "qkv" in name else state[name])
    for name, p in model.multi_modal_projector.named_parameters():
        p.copy_(theirs.model.multi_modal_projector.state_dict()[name])
    for layer in model.modules():
        if hasattr(layer, "quant_method"):
            layer.cpu_linear = torch.nn.functional.linear
    pixels = torch.stack([item["pixel_values"].data for item in made["mm_kwargs"]["image"]])
    embeds = model.embed_multimodal(pixel_values=pixels)
    shown = composed.encode_images(given["pixel_values"])
    difference = float((embeds[..., :-2] - shown.tokens).abs().max())
    assert difference < 1e-5, difference
    placeholders = given["input_ids"] == model.config.image_token_index
    shift = composed.unpruned.gaps(shown.kept).shift(placeholders.flatten().cumsum(0)[None] * placeholders - 1)
    for chunk in (1000, 5):
        positions = prefilled(model, ids, embeds, chunk)[1]
        assert (positions == torch.arange(len(ids)) + shift).all(), "positions"
print(f"vLLM {vllm.__version__}: placeholders and positions equal, image tokens within {difference:.0e}")
sys.stdout.flush()
os._exit(0)  # gloo's threads would wait
