"""An adapter in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def write(model: Any, name: str, folder: Path, beginnings: Mapping[str, Any], ranks: Any = None) -> None:
    """Write the files that `PeftModel.from_pretrained(lm, folder)` reads.

    Args:
        model: PEFT's, with the layers in.
        name: of the set of weights.
        folder: made where it is missing.
        beginnings: path -> term with the factors A (R, I) and B (O, R) that the layer subtracts. With them it has
            twice the rank: B A - B0 A0 = [B, -B0] [A; A0], on the base weights as they are.
        ranks: of AdaLoRA, which singular values are left; None: all.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    kept = model.peft_config[name]
    before = getattr(kept, "rank_pattern", None)
    try:
        if ranks is not None:
            kept.rank_pattern = ranks  # PEFT leaves out the others, and shortens the names
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config = copy.deepcopy(kept)
    finally:
        if ranks is not None:
            kept.rank_pattern = before
    for path, beginning in beginnings.items():
        for factor, first, dim in (("lora_A", beginning.A, 0), ("lora_B", -beginning.B, 1)):
            key = f"base_model.model.{path}.{factor}.weight"
            state[key] = torch.cat([state[key], first.to(state[key])], dim)
    if beginnings:
        _double(config)
    config.inference_mode = True
    config.base_model_name_or_path = getattr(model.base_model.model, "name_or_path", None) or None
    folder.mkdir(parents=True, exist_ok=True)
    held = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}  # none shared
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _double(config: Any) -> None:
    """Set twice the rank at the same scale, which is alpha / r, or alpha / sqrt(r) for rsLoRA."""
    more = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, more * config.lora_alpha, True
    config.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {key: more * alpha for key, alpha in (config.alpha_pattern or {}).items()}
    config.corda_config = config.eva_config = None
