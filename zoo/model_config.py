"""The config of a composed model, as transformers saves and reads it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from zoo.autoclasses import register_config
from zoo.registry import refuse_code
from zoo.registry.foreign import read_model_config, require_model_config, require_types, said_since


class ZooConfig(PreTrainedConfig):
    """The parts of a composed model: registry names and options, never code.

    Args:
        slots: `vision`, `projector`, `llm` (a node or None), `pruner`, `adapter` (nodes keyed by component name).
        tokenizer: its source (a checkpoint, or trained) and options.
        plugins: modules that must be imported for the names in `slots` to exist.
        image_token_id: the placeholder, one per image token.
        video_token_id: the placeholder of videos, where it is another one.
        text_vocab_size: ids of the tokenizer; the LLM's table may be larger.
        positions: of image tokens that pruners left, kept or dense; auto: decided when the model is built.
        versions: of the libraries that wrote the model.
        base: for each part whose unchanged weights stay in its own checkpoint: checkpoint, revision and hash.
        masters: data type -> names of weights, or of parts, that are loaded in it, and that the folder holds in
            float32 as they were trained.
    """

    model_type = "zoo"
    keys_to_ignore_at_inference = [  # what transformers' Trainer does not gather beside the logits
        "cache", "past_key_values", "losses", "last_hidden_state", "labels", "image", "image_kept", "image_tokens",
        "passed",
    ]  # fmt: skip
    slots: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None
    plugins: list[str] | None = None
    image_token_id: int = -1
    video_token_id: int | None = None
    text_vocab_size: int | None = None
    versions: dict[str, str] | None = None
    base: dict[str, Any] | None = None
    masters: dict[str, Any] | None = None
    attention: str = "auto"
    positions: str = "auto"
    data: dict[str, Any] | None = None  # what it was trained on, for `zoo eval model=...` without more words
    task: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config of a file's content, which is not trusted.

        Raises:
            ZooError: it names code, absurd sizes, or holds values of other types.
        """
        require_types(config_dict, "The config")
        for part in ("slots", "tokenizer"):
            refuse_code(config_dict.get(part), f"The config's {part}")
        require_model_config(config_dict, "The config")
        config_dict = said_since(config_dict)
        named = ("attn_implementation", "experts_implementation")  # set by `attention`, and by the run
        config_dict = {k: v for k, v in config_dict.items() if k not in named}
        if not kwargs.get("return_unused_kwargs") or "base" not in kwargs:
            return super().from_dict(config_dict, **kwargs)
        # Auto classes ask which keywords are left for the model: its `base`, where bases lie now, is not the field here
        place = kwargs.pop("base")
        config, unused = super().from_dict(config_dict, **kwargs)
        return config, {**unused, "base": place}

    @classmethod
    def read(cls, folder: Path) -> Any:
        """Read the config.json of a folder."""
        return cls.from_dict(read_model_config(folder / "config.json"))

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Return the config of the language model, once a model is built; before, this one, see `__getattr__`."""
        return self.__dict__.get("_llm", self)

    def __getattr__(self, name: str) -> Any:
        """Return sizes of the text side: of the language model once it is built, else those in the slots.

        Raises:
            AttributeError: any other name; or `hidden_size` follows from a checkpoint, which is not read here.
        """
        if name not in ("vocab_size", "hidden_size"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if (llm := self.__dict__.get("_llm")) is not None:
            return getattr(llm, name)
        slot = (self.__dict__.get("slots") or {}).get("llm") or {}
        stated = self.__dict__.get("text_vocab_size") if name == "vocab_size" else slot.get("hidden_size")
        if stated is None or (name == "hidden_size" and slot.get("checkpoint")):
            where = f"follows from the checkpoint {slot['checkpoint']!r}" if slot.get("checkpoint") else "is not stated"
            raise AttributeError(f"{name} {where}: load the model, and ask model.config.get_text_config().{name}.")
        return stated

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved, without the language model's own config, which follows from the slots."""
        return {key: value for key, value in super().to_dict().items() if key != "_llm"}

    def to_json_string(self, use_diff: bool = True) -> str:
        """Write JSON as transformers does, which sorts all keys, but keep the order of pruners and adapters."""
        content = json.loads(super().to_json_string(use_diff))
        return json.dumps(content | ({"slots": self.slots} if self.slots else {}), indent=2) + "\n"


register_config(ZooConfig)
