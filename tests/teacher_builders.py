"""A tiny saved model to teach, and runs that learn from it."""

from pathlib import Path
from typing import Any

import torch

from tests.conftest import tiny_slots
from tests.train_builders import config, recipe

KD = "train: [all], batch_size: 8, lr: 0.01, distiller: llava_kd, teacher: '{teacher}'"


def save_teacher(folder: Path, tokenizer: Any, seed: int = 5, **slots: Any) -> str:
    """Save a tiny random model with 4 x 4 image tokens; returns its name."""
    from zoo.composed.model import ZooModel
    from zoo.loading.build import processor_for
    from zoo.model_config import ZooConfig

    torch.manual_seed(seed)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids = {"image_token_id": tokenizer.image_token_id, "text_vocab_size": len(tokenizer)}
    model = ZooModel(ZooConfig(slots=tiny_slots(**slots), attention="sdpa", **ids, **special)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # at their first size, weights say almost the same of everything
    model.save_pretrained(folder)
    processor_for(model, tokenizer).save_pretrained(folder)
    return f"dir:{folder}"


def taught(place: Path, teacher: str, stages: dict[str, str], *more: str) -> Any:
    """The config of a run whose stages may name `{teacher}`, with the teacher's tokenizer."""
    stages = {name: fields.replace("{teacher}", teacher) for name, fields in stages.items()}
    return config(recipe(place, stages), f"tokenizer.checkpoint='model:{teacher}'", *more)
