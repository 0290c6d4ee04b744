"""Keywords of a processor's `from_pretrained`: each has an effect, or is refused by name."""

import inspect
from typing import Any

from zoo.registry import ZooError, unknown

# Options of fetching files, and keywords without effect here, since code is never fetched.
_HUB = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
_IDLE = {"backend", "code_revision", "config", "trust_remote_code", "use_fast"}
# Arguments of the tokenizer.
_TOKENIZER = {
    "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "bos_token",
    "clean_up_tokenization_spaces", "cls_token", "eos_token", "extra_special_tokens", "legacy", "mask_token",
    "model_input_names", "model_max_length", "pad_token", "padding_side", "sep_token", "split_special_tokens",
    "truncation_side", "unk_token",
}  # fmt: skip
_PIXELS = "pixels are prepared for the model's encoder; options that may differ belong to the call"
_REFUSED = {
    "audio_tokenizer": "the model takes no sound",
    "feature_extractor": "the model takes no sound",
    "image_processor": _PIXELS,
    "video_processor": _PIXELS,
    "return_unused_kwargs": "unused keywords are refused",
}


class LoadedMixin:
    """`from_pretrained` of `ZooProcessor`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *, tokenizer: Any = None, **kwargs: Any) -> Any:
        """Load the processor of a folder or of a hub repository.

        Args:
            pretrained_model_name_or_path: folder written by `save_pretrained`, or a hub name.
            tokenizer: replaces the saved one; without a chat template it gets that one's.
            kwargs: options of the processor, of its tokenizer (`padding_side`, `model_max_length`, ...), and of
                fetching a repository.

        Raises:
            ZooError: a keyword that is unknown or unsupported, or the tokenizer of another model.
        """
        own = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}  # type: ignore[misc]
        known = own | _HUB | _IDLE | _TOKENIZER
        if kwargs.get("_from_pipeline") is not None:  # pipelines pass the model's keywords too, which the model checks
            kwargs = {name: value for name, value in kwargs.items() if name in known or name.startswith("_")}
        for name, value in kwargs.items():
            if name in _REFUSED and value not in (None, False):
                raise ZooError(f"from_pretrained: {name}= is not possible here: {_REFUSED[name]}.")
            if name not in known and name not in _REFUSED and not name.startswith("_"):
                raise unknown("keyword of the processor's from_pretrained", name, known)
        kept = {name: value for name, value in kwargs.items() if name not in _REFUSED}
        processor: Any = super().from_pretrained(pretrained_model_name_or_path, **kept)  # type: ignore[misc]
        if tokenizer is not None:
            if not hasattr(tokenizer, "convert_tokens_to_ids"):
                raise ZooError(f"tokenizer= takes a tokenizer of transformers, got {type(tokenizer).__name__}.")
            if not tokenizer.chat_template:
                tokenizer.chat_template = processor.chat_template
            processor.tokenizer = tokenizer
            processor.require_own_tokenizer()
        return processor
