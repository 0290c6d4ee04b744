"""Export a model as GGUF files: its language model, and its encoder with the projector as llama.cpp's clip reads them.

Names come from the tables of the package gguf; what llama.cpp has no name for is refused. Each file is read back, and
every tensor compared, before it counts as written. Sources of the layout: llama.cpp's `tools/mtmd` (clip-impl.h,
models/llava.cpp, legacy-models/convert_image_encoder_to_gguf.py) and its `conversion/`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.published.export import merge_adapters, place_for, refuse_adapters, state_of_layout
from zoo.published.gguf_clip import clip_fields, clip_tensors, require_clip
from zoo.published.gguf_llm import llm_fields, llm_tensors, require_llm
from zoo.registry import ZooError, unknown
from zoo.storage.atomic import made_folder, written_beside

TYPES = ("f32", "f16", "bf16", "q8_0")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_OF_DTYPE = {torch.float16: "f16", torch.bfloat16: "bf16"}
# Stays float32 in llama.cpp's own files: norms, biases (one dimension), positions.
_WHOLE = ("position_embd.weight", "class_embd")


def export_gguf(
    model: Any, processor: Any, folder: str | Path, *, name: str = "model", type: str = "", card: Any = None
) -> list[Path]:
    """Write the language model and the encoder with its projector as GGUF files.

    Adapters that can be merged are merged into `model` for good.

    Args:
        model: composed, as LLaVA is: CLIP or SigLIP, a projector of two layers, a language model.
        processor: of the model.
        folder: is made.
        name: begins the files' names: `<name>-F16.gguf`, `mmproj-<name>-F16.gguf`.
        type: of matrices: f32, f16, bf16 or q8_0; empty: as the model holds its weights.
        card: facts for README.md; None: those of the card that the model came with.

    Returns:
        The files: of the language model, of encoder and projector.

    Raises:
        ZooError: llama.cpp has no name for a part, with the reason; the package gguf is missing; or a file, read back,
            does not hold what was written.
    """
    _require_package()
    kind = type.lower() or _OF_DTYPE.get(next(model.llm.parameters()).dtype, "f32")
    if kind not in TYPES:
        raise unknown("type of GGUF weights", kind, TYPES)
    refuse_adapters(model)
    known, encoder = place_for(model, "llava", None)
    config = known.config(model, encoder)
    tokenizer = processor.tokenizer
    require_llm(config.text_config, tokenizer)
    require_clip(config)
    merge_adapters(model)
    state = state_of_layout(model, encoder, known, config)
    folder = Path(folder)
    title = f"{name}-{kind.upper()}.gguf"
    files = folder / title, folder / f"mmproj-{title}"
    text = config.text_config
    ends = model.generation_config.eos_token_id
    about_llm = partial(llm_fields, text=text, tokenizer=tokenizer, ends=ends, name=name)
    about_clip = partial(clip_fields, config=config, processor=processor, name=name)
    with made_folder(folder), written_beside(files[0]) as first, written_beside(files[1]) as second:  # both, or none
        _write(first, text, llm_tensors(state, text), kind, about_llm)
        _write(second, None, clip_tensors(state, config), kind, about_clip)
    note = f"Matrices are {kind.upper()}. The files were read back and compared; llama.cpp itself was not run."
    if kind == "q8_0" or (card is not None and card.scores):
        note += " Scores, where there are some, are those of the weights before they were converted."
    model.write_card(folder, card, layout="gguf", name=name, notes=[note], files=[f.name for f in files])
    return list(files)


def _require_package() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ZooError("To write GGUF files, the package gguf is needed: pip install gguf (0.1 MB, MIT).") from error


def _write(file: Path, text: Any, tensors: Mapping[str, Tensor], kind: str, fields: Callable[[Any], None]) -> None:
    """Write a file and compare what it holds with what was written.

    Args:
        file: to write.
        text: config of the language model; None: the file is one of clip.
        tensors: by llama.cpp's names.
        kind: one of `TYPES`.
        fields: adds the metadata.
    """
    import gguf

    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ] if text is None else architecture(text)
    writer = gguf.GGUFWriter(file, arch, use_temp_file=True)  # holds at most one tensor and a part of the rest
    fields(writer)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors.items():
        stored, as_type = _stored(name, tensor, kind)
        writer.add_tensor(name, stored, raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(file, tensors, kind)


def architecture(text: Any) -> str:
    """Return llama.cpp's name of a language model's architecture."""
    from zoo.published.gguf_llm import ARCHITECTURES

    return ARCHITECTURES[text.model_type].name


def _stored(name: str, tensor: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """Return a tensor as it is stored, and its type."""
    import gguf

    values = tensor.detach().to(torch.float32).contiguous().cpu().numpy()
    as_type = gguf.GGMLQuantizationType[_type_of(name, values.shape, kind).upper()]
    if as_type == gguf.GGMLQuantizationType.F32:
        return values, as_type
    if as_type == gguf.GGMLQuantizationType.F16:
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ZooError(f"{name} has values beyond what float16 holds: --type bf16 or f32.")
        return values.astype(np.float16), as_type
    return gguf.quants.quantize(values, as_type), as_type


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) < 2 or name.endswith(_WHOLE):
        return "f32"
    if name == "v.patch_embd.weight" and kind != "f32":
        return "f16"  # the convolution of clip takes no other type beside float32
    return "f16" if kind == "q8_0" and shape[-1] % 32 else kind


def compare(file: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Read a file back, and compare every tensor with the one it was made of.

    Raises:
        ZooError: a tensor is missing, or its values are not those of its type nearest to the model's.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    wrong = sorted(found.keys() ^ tensors.keys())
    for name in found.keys() & tensors.keys():
        values = tensors[name].detach().to(torch.float32).contiguous().cpu().numpy()
        again = gguf.quants.dequantize(found[name].data, found[name].tensor_type).reshape(values.shape)
        if not np.all(np.abs(again - values) <= _error(values, _type_of(name, values.shape, kind))):
            wrong.append(name)
    if wrong:
        raise ZooError(f"{file.name}, read back, does not hold what was written: {', '.join(wrong[:4])}.")


def _error(values: np.ndarray, kind: str) -> Any:
    """Return how far a stored value may be from the model's."""
    if kind == "f32":
        return 0.0
    if kind == "q8_0":  # blocks of 32 with a step of 1/127 of the largest, itself rounded to 16 bits
        blocks = np.abs(values).reshape(-1, 32)
        most = np.repeat(blocks.max(axis=1, keepdims=True), 32, axis=1).reshape(values.shape)
        return most / 127 * 0.5 + most * 2.0**-10 + 1e-7
    bits = 11 if kind == "f16" else 8
    return np.abs(values) * 2.0**-bits + 2.0**-24
