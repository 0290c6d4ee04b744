"""A language model in a GGUF file, as a folder: safetensors, config, tokenizer and generation config.

transformers reads the file, with all weights unpacked. Blocks of 4 to 8 bits are values of up to 24 bits, which only
float32 holds exactly; models of more than a billion weights are stored as bfloat16.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zoo.pretrained.gguf_positions import DIVISORS, scale_positions
from zoo.pretrained.origin import JOIN
from zoo.registry import ZooError, one_line
from zoo.registry.foreign import require_model_config, require_plausible
from zoo.registry.quiet import no_progress_bar
from zoo.registry.versions import gguf_fields, gguf_taken, gguf_tensors, gguf_text_cuts, unpacked_gguf

_EXACT = 10**9  # weights up to which nothing is rounded: 4 GB
# Text is cut into single digits before GPT-2's cuts, by names of llama.cpp; transformers does the latter alone.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Tensors that need no weight: divisors are in the config then, and tied outputs may be in the file once more. Layers of
# several tokens at once (`.nextn.`) are for speculative decoding.
_SPARE = (DIVISORS, "output.weight")
_AS_GPT2 = ("gpt-2", "gpt2", "default", "")


def convert(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder.

    Raises:
        ZooError: transformers cannot read the file, or it lacks weights.
    """
    try:
        import gguf  # noqa: F401  transformers reads by it
    except ImportError as error:
        raise ZooError(f"To read {file.name}, the package gguf is needed: pip install gguf (0.1 MB, MIT).") from error
    with _alone(file) as place:
        _write_model(file, place, folder)
        _write_tokenizer(file, place, folder)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a folder with nothing but the file: transformers acts on other files beside it, an adapter's for one."""
    with TemporaryDirectory() as made:
        place = Path(made) / "model.gguf"
        try:
            place.symlink_to(file.absolute())
        except OSError:  # Windows without the right to make links
            os.link(file, place)
        yield place


def _write_model(file: Path, place: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    given: dict[str, Any] = {"gguf_file": place.name, "trust_remote_code": False}
    with _refused(file), no_progress_bar():
        if (pieces := int(gguf_fields(file).get("split.count") or 1)) > 1:
            raise ZooError(f"{str(file)!r} is one of {pieces} GGUF files of a model: {JOIN}")
        config = AutoConfig.from_pretrained(place.parent, **given)
        stated, names = gguf_fields(file), gguf_tensors(file)
        divisors = _tensor(file, DIVISORS) if DIVISORS in names else None
    require_model_config(config.to_dict(), f"The config in {str(file)!r}")
    scale_positions(config, stated, divisors, repr(str(file)))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ZooError(f"{str(file)!r} holds a model of type {config.model_type!r}, which is not a causal LM.")
    with torch.device("meta"), _refused(file):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
    require_plausible(weights, [file], f"The config in {str(file)!r}")
    dtype = torch.float32 if weights <= _EXACT else torch.bfloat16
    with _refused(file), no_progress_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.parent,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            **given,
            **unpacked_gguf(),
        )
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers initialises them at random
        raise ZooError(f"{str(file)!r} lacks {len(missing)} weights, {missing[0]!r} for one.")
    _require_read(names, str(stated.get("general.architecture")), lm, [*report["unexpected_keys"]], file)
    # Marks of a quantised model, with which transformers refuses to save it: its weights are plain numbers now.
    lm.hf_quantizer = None
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    lm.config._name_or_path = file.stem
    lm.save_pretrained(folder)


def _tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor of a GGUF file, as float32."""
    from gguf import GGUFReader, dequantize

    found = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == name)
    return torch.from_numpy(dequantize(found.data, found.tensor_type).astype("float32"))


def _require_read(names: Iterable[str], architecture: str, lm: Any, unread: list[str], file: Path) -> None:
    """Refuse a file with tensors that are in no weight of the model: without them it computes something else.

    Args:
        names: of all tensors.
        architecture: by the name that the file has for it.
        lm: what was read.
        unread: names that transformers reports.
        file: for the message.
    """
    if (taken := gguf_taken(architecture, lm)) is not None:
        unread += [name for name in names if not {name, name.removesuffix(".weight")} & taken]
    if left := sorted(name for name in unread if name not in _SPARE and ".nextn." not in name):
        raise ZooError(
            f"{str(file)!r} has {len(left)} tensors that transformers does not read into a {lm.config.model_type!r}, "
            f"{left[0]!r} for one, so that it would compute something else. "
            "The model's folder of safetensors has what is needed: llm.checkpoint=<folder or hub name>."
        )


def _write_tokenizer(file: Path, place: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    with _refused(file), no_progress_bar():
        tokenizer: Any = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name, trust_remote_code=False)
        stated = gguf_fields(file)
    if stated.get("tokenizer.ggml.model") == "gpt2":
        _cut_text(tokenizer, str(stated.get("tokenizer.ggml.pre") or ""), file)
    if longest := stated.get(f"{stated.get('general.architecture')}.context_length"):
        tokenizer.model_max_length = int(longest)
    tokenizer.save_pretrained(folder)


def _cut_text(tokenizer: Any, way: str, file: Path) -> None:
    """Let a byte-level tokenizer cut text before merges as its merges were learnt, where transformers does not."""
    from tokenizers import pre_tokenizers

    if way in _DIGITS:
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    elif way not in _AS_GPT2 and way not in gguf_text_cuts():
        warnings.warn(
            f"{file.name} cuts text in the way {way!r}, which is unknown here: it is cut as GPT-2 does, so that some "
            "words may become other tokens than the model was trained on. A tokenizer with the right cuts: "
            "tokenizer.checkpoint=<hub name or folder>.",
            stacklevel=2,
        )


@contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Turn what transformers raises for a file into an error that names it."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:  # an architecture it does not know, a file cut short: each raises its own class
        why = re.sub(r"\S*/model\.gguf", file.name, one_line(error))  # by the name that it was given here
        raise ZooError(f"{str(file)!r} cannot be read as a GGUF file of a language model: {why}") from error
