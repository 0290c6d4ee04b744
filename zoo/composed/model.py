"""The composed model as a transformers model: `from_pretrained`, `forward`, `generate`, `save_pretrained`.

`ZooModel` has no modelling code of its own: it runs the encoder, the pruners and the projector, replaces placeholders
by image tokens, runs an unmodified causal LM, and computes the loss only where labels are.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.autoclasses import register_model
from zoo.composed.assembly import Parts, assemble
from zoo.composed.bases import Bases, as_whole, bases_of
from zoo.composed.card import FILE, LAYOUTS, write_card
from zoo.composed.forward import ForwardMixin
from zoo.composed.generate import GenerateMixin
from zoo.composed.keywords import require_own_layers, require_save, split_load
from zoo.composed.language_model import LanguageModelMixin
from zoo.composed.loader import load_model, reader_for
from zoo.composed.masters import as_saved
from zoo.composed.own_checkpoints import checkpoints_at, require_there, with_node
from zoo.composed.positions import decided
from zoo.composed.slots import slots_now, without_checkpoint
from zoo.composed.summary import ModelSummary, summary_of
from zoo.composed.trainable import PartsMixin
from zoo.fusion.llm.attention import resolve_attention
from zoo.model_config import ZooConfig
from zoo.published.checkpoint import base_at
from zoo.registry import ZooError, refuse_code
from zoo.storage.weights import library_versions, local_folder, named_weights, state_of, write_weights
from zoo.text.stops import require_valid, stated_config, write_config


class ZooModel(PartsMixin, ForwardMixin, GenerateMixin, LanguageModelMixin, PreTrainedModel):  # type: ignore[misc]
    """A vision-language model composed of registered parts.

    `zoo.load(name)` and `zoo.compose(...)` make one together with its processor; `ZooModel(config)` builds the parts
    that `config.slots` names, with the weights of their checkpoints.
    """

    config_class = ZooConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _supports_flex_attn = True

    fresh_parts: list[str]  # that have untrained weights
    masters: dict[str, torch.dtype]  # weights that train in float32 -> the data type that they were loaded in

    def __init__(self, config: ZooConfig, parts: Parts | None = None, base: Any = None) -> None:
        """Build the parts of `config.slots`, or take them.

        Args:
            config: with the options of the parts.
            parts: already built; None: built here.
            base: reader of weights for the parts while they are built (see `zoo.published.reader`); where absent, of
                the checkpoint that the config names.
        """
        super().__init__(config)
        built = parts is None
        if parts is None:
            base = base if base is not None else reader_for(config, None)
            parts = assemble(config.slots or {}, vocab_size=config.text_vocab_size, fill=base)
        self.steps = parts.steps
        self.num_image_tokens = parts.num_image_tokens
        self.requested, self.projected_grid, self.asks = parts.requested, parts.projected_grid, parts.asks
        self.decided = decided(parts, config.slots or {}, config.positions)
        config.positions, self.unpruned = self.decided.positions, self.decided.unpruned
        self.vision = parts.vision
        self.pruner = nn.ModuleDict(parts.pruner)  # type: ignore[assignment]
        self.projector = parts.projector
        self.layout = parts.layout
        self.llm = parts.llm
        self.adapter = nn.ModuleDict(parts.adapter)  # type: ignore[assignment]
        config.__dict__["_llm"] = self.llm.lm.config.get_text_config()
        self.compiled = False
        self.fresh_parts, self.masters = [], {}
        # Weights of a saved folder -> those that it left to the bases, for `load_state_dict`.
        self.left_out: dict[frozenset[str], Any] = {}
        self.described: Path | None = None  # card of the folder that the weights were loaded from
        self.loss_type = "ForCausalLM"  # transformers' Trainer then counts labels from the second position on
        self.set_attention(config.attention)
        self.bases = bases_of(self, config.slots or {}, base) if built else Bases()
        config.base = self.bases.record or None

    # ---- what it is --------------------------------------------------------------------------------------------

    def set_attention(self, name: str) -> str:
        """Choose the LLM's attention: `auto` or a name in transformers; returns the one used."""
        probe = next(self.llm.parameters())
        taken = resolve_attention(name, probe.device, self._compute_dtype(), lm=self.llm.lm)
        self.llm.lm.set_attn_implementation(taken)
        if self.vision is not None:  # rows of its own length, never packed
            self.vision.set_attention(
                resolve_attention(name, probe.device, self._compute_dtype(), self.vision.num_tokens)
            )
        self.config.attention = name
        return taken

    def summary(self) -> ModelSummary:
        """Return what the model is made of, in numbers: parameters, tokens and widths part by part."""
        return summary_of(self)

    def __repr__(self) -> str:
        """The composition; `print(model.llm)` and the like show modules."""
        return str(self.summary())

    @classmethod
    def can_generate(cls) -> bool:
        return True

    # ---- save and load -----------------------------------------------------------------------------------------

    def save_pretrained(  # type: ignore[override]  # no options for formats that are not ours
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: str | int = "5GB",
        include_base: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json, the weights that differ from the base checkpoints, as safetensors, and the card README.md.

        Master weights of training are float32 in the folder, and load in the data type that they had before.

        Args:
            is_main_process: False writes nothing; one process of several writes.
            state_dict: whole tensors of a model that is sharded over processes.
            include_base: also write weights that did not change since they came from a part's own checkpoint.
            kwargs: of `push_to_hub`.

        Raises:
            ZooError: a keyword is unknown or not supported; or the weights cannot be saved so, or not in this folder.
        """
        require_save(kwargs, push_to_hub)
        state = state_of(self, state_dict) if is_main_process or state_dict is None else {}
        if not is_main_process:
            return
        require_own_layers(self, state)
        if include_base:
            self.bases.require_whole(self)
        folder = Path(save_directory)
        self.bases.require_elsewhere(folder)
        if self.generation_config is not None:
            require_valid(self.generation_config)
        config = type(self.config).from_dict(self.config.to_dict())
        config.slots = slots_now(self)
        state, config.masters = as_saved(state, self.masters, self.part_of)
        record = {key: as_whole(entry) for key, entry in self.bases.record.items()}
        if not include_base:
            every = state.keys()
            state, record = self.bases.changed(self, state, config.slots)
            self.left_out[frozenset(state)] = every - state.keys()
        for key in [k for k in self.bases.nodes if record[k].get("whole")]:
            if node := without_checkpoint(self, key, config.slots):
                config.slots = with_node(config.slots, self.bases.own[key].path, node)
            else:
                if include_base and Path(record[key]["checkpoint"]).is_dir():
                    own, place = self.bases.own[key], record[key]["checkpoint"]
                    warnings.warn(
                        f"The architecture of {own.part} is described in {place!r} alone, so the saved model needs "
                        f"the configuration there. If it moves: {own.module}.{own.option}=<folder>.",
                        stacklevel=2,
                    )
                del record[key]  # only its checkpoint can build it; its fingerprint must not be required any more
        config.base = record or None
        folder.mkdir(parents=True, exist_ok=True)
        config.architectures = [type(self).__name__]
        config.versions = library_versions()
        config.save_pretrained(folder)
        if self.generation_config is not None:
            write_config(self.generation_config, folder)
        if self.vision is not None:
            self.vision.write_files(folder)
        for adapter in self.adapter.values():
            adapter.write_files(folder)
        write_weights(state, folder, max_shard_size)
        write_card(self, folder, record=record)
        if push_to_hub:
            idle = {"save_function", "save_original_format", "save_peft_format", "safe_serialization"}
            kwargs = {key: value for key, value in kwargs.items() if key not in idle}
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by their names, as torch does.

        The weights of a folder that this model wrote are those of the model then: what the folder leaves to base
        checkpoints is read from there. So transformers' `Trainer` brings back its best checkpoint.

        Raises:
            ZooError: a base checkpoint cannot be read any more.
        """
        left = () if strict else self.left_out.get(frozenset(state_dict), ())
        own = named_weights(self) if left else {}
        # Frozen parameters are what they were; buffers, such as running means, change while others train.
        self.bases.restore(self, [n for n in left if own[n].requires_grad or not isinstance(own[n], nn.Parameter)])
        found = super().load_state_dict(state_dict, strict, assign)
        return found._replace(missing_keys=[n for n in found.missing_keys if n not in left])

    def write_card(self, folder: str | Path, facts: Any = None, *, layout: str = "zoo", **more: Any) -> None:
        """Write the card of a saved or exported model, README.md; one that a person wrote or changed stays.

        Args:
            folder: with the files.
            facts: `zoo.composed.card_facts.Facts`; None: those of the card that the model was loaded with.
            layout: zoo, transformers or gguf.
            more: `name` and `notes` of `zoo.composed.card.write_card`.
        """
        write_card(self, Path(folder), facts, form=LAYOUTS[layout], **more)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: ZooConfig | None = None,
        fresh: Iterable[str] = (),
        revision: str | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        base: str | Path | Mapping[str, Any] = "",
        state_dict: Mapping[str, Tensor] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a folder or a hub repository that `save_pretrained` wrote; the model is in eval mode.

        Args:
            config: of the same parts, or of other ones: those without weights in the folder must be in `fresh`.
            fresh: parts that may start without weights.
            dtype: of the parameters, a torch dtype or its name; None: as saved, and master weights in the data type
                that they had before training.
            device_map: a device, None for the CPU, `auto`, or a dict from prefixes of names (`vision`, `llm`, ...) to
                devices.
            attn_implementation: `auto` or a name in transformers; None: as saved.
            base: present folder of the published checkpoint that the model was made from, or a dict from parts
                (`vision`, `llm`) to the folders of their checkpoints; empty: as in the config.
            state_dict: weights that replace the folder's.
            output_loading_info: also return the names of missing weights, as transformers does.
            kwargs: fields of the config, and options of fetching a repository (`cache_dir`, `force_download`,
                `local_files_only`, `token`).

        Raises:
            ZooError: a keyword is unknown or not supported; or the weights do not fit.
        """
        if model_args:
            raise ZooError("from_pretrained takes one argument without a name: the folder, or the repository.")
        fields, hub = split_load(kwargs, config or ZooConfig())
        folder = local_folder(pretrained_model_name_or_path, revision, **hub)
        config = config or ZooConfig.read(folder)
        for name, value in fields.items():
            setattr(config, name, value)
        refuse_code(config.slots, f"{folder}/config.json")
        if isinstance(base, Mapping):
            config.slots, base = checkpoints_at(config.slots or {}, base), ""
        require_there(config.slots or {})
        config.base = base_at(config.base, str(base or ""))
        dtype = dtype if dtype is not None else torch_dtype
        model, missing = load_model(
            cls, config, folder, fresh=fresh, dtype=dtype, device_map=device_map, state_dict=state_dict
        )
        model.name_or_path = str(folder)
        model.described = folder / FILE
        model.generation_config = stated_config(model, folder)  # what ends answers
        if attn_implementation is not None:
            model.set_attention(attn_implementation)
        if output_loading_info:  # unexpected and mismatched weights were errors above
            return model, {
                "missing_keys": missing,
                "unexpected_keys": set(),
                "mismatched_keys": set(),
                "error_msgs": [],
            }
        return model


register_model(ZooConfig, ZooModel)
