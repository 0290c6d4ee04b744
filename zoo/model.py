"""The composed model, in the shape people of this ecosystem know: a transformers model with `generate`.

`ZooModel` owns no modelling code: it runs the encoder, the pruners and the projector, puts image tokens where the
placeholders are, runs an unmodified causal LM, and computes the loss only where labels are.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo.assembly import Parts, assemble
from zoo.auto import register_model
from zoo.bases import Bases, bases_of
from zoo.fusion.attention import resolve_attention
from zoo.model_forward import ForwardMixin
from zoo.model_llm import LanguageModelMixin
from zoo.model_parts import PartsMixin
from zoo.model_slots import slots_now, without_checkpoint
from zoo.model_types import LLMSequence, ZooConfig
from zoo.registry import Cut, ImageFeatures, ZooError, refuse_code
from zoo.stops import stated_config
from zoo.weights import library_versions, local_folder, read_weights, state_of, write_weights


class ZooModel(PartsMixin, ForwardMixin, LanguageModelMixin, PreTrainedModel):  # type: ignore[misc]
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

    generation_config: Any
    fresh_parts: list[str]  # that started without trained weights

    def __init__(self, config: ZooConfig, parts: Parts | None = None, base: Any = None) -> None:
        """Build the parts of `config.slots`, or take them.

        Args:
            config: what it is made of.
            parts: built already.
            base: weights that are read into the parts while they are built (see `zoo.published.base`); found by what
                the config says of them where absent.
        """
        super().__init__(config)
        built = parts is None
        if parts is None:
            if base is None:
                from zoo.published.base import base_for

                base = base_for(config, None)
            parts = assemble(config.slots or {}, vocab_size=config.text_vocab_size, fill=base)
        self.steps = parts.steps
        self.num_image_tokens = parts.num_image_tokens
        self.requested = parts.requested
        self.vision = parts.vision
        self.pruner = nn.ModuleDict(parts.pruner)
        self.projector = parts.projector
        self.layout = parts.layout
        self.llm = parts.llm
        self.adapter = nn.ModuleDict(parts.adapter)
        config.__dict__["_llm"] = self.llm.lm.config.get_text_config()
        self.compiled = False
        self.fresh_parts = []
        self.loss_type = "ForCausalLM"  # labels are shifted here: transformers' Trainer counts those behind the first
        self.generation_config = getattr(self.llm.lm, "generation_config", None)
        self.set_attention(config.attention)
        self.bases = bases_of(self, config.slots or {}, base) if built else Bases()
        config.base = self.bases.record or None

    # ---- what it is --------------------------------------------------------------------------------------------

    def set_attention(self, name: str) -> str:
        """Choose the LLM's attention: `auto` or a name that transformers knows; returns the one taken."""
        probe = next(self.llm.parameters())
        taken = resolve_attention(name, probe.device, self._compute_dtype(), lm=self.llm.lm)
        self.llm.lm.set_attn_implementation(taken)
        if hasattr(self.vision, "set_attention"):  # rows of its own length, never packed
            self.vision.set_attention(
                resolve_attention(name, probe.device, self._compute_dtype(), self.vision.num_tokens)
            )
        self.config.attention = name
        return taken

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def _sequence(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        segment_ids: Tensor | None = None,
        block_ids: Tensor | None = None,
    ) -> LLMSequence:
        slots = self._placeholders(input_ids) if input_ids is not None else None
        rows = attention_mask, position_ids, labels, segment_ids, block_ids
        return LLMSequence(slots, *rows, tokens_per_image=0 if self.layout is not None else self.num_image_tokens)

    # ---- generate ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images_per_row: Sequence[int] | None = None,
        cuts: Sequence[Cut] | None = None,
        encoded: tuple[ImageFeatures, ImageFeatures, Tensor | None] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' own `generate`: greedy, sampling, beams, several sequences, any of its options.

        Args:
            input_ids: (B, T), padded on the left where lengths differ.
            pixel_values: (M, 3, S, S).
            images_per_row: needed only where images have no placeholders and rows do not hold one image each.
            cuts: of each image, where images have rows of their own (crops, frames).
            encoded: what `encode_images` gave, instead of `pixel_values`.

        Returns:
            What transformers returns: prompt and new ids (B * num_return_sequences, T + new), or a dict if asked for.
        """
        if input_ids is None:
            raise ZooError("generate needs input_ids: a prompt, if only the token that begins one.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif not bool(attention_mask[:, -1].all()):
            raise ZooError(
                "generate needs padding on the left: the last token of some row is padding. Set padding_side='left'."
            )
        _, kept, image_tokens = self._encoded(pixel_values, cuts, encoded)
        embeds = self.merge(input_ids, image_tokens)
        config = generation_config or self.generation_config
        if getattr(config, "stop_strings", None) or kwargs.get("stop_strings"):
            kwargs.setdefault("tokenizer", self._tokenizer())
        beams = kwargs.get("num_beams", getattr(config, "num_beams", None)) or 1
        copies = kwargs.get("num_return_sequences", getattr(config, "num_return_sequences", None)) or 1
        self._condition(kept, images_per_row, input_ids, expand=max(beams, copies))
        sequence = self._sequence(input_ids, attention_mask, None, None)
        for pruner in self.pruner.values():
            if hasattr(pruner, "begin"):
                pruner.begin(sequence)
        return self.llm.lm.generate(
            input_ids=input_ids.to(embeds.device),
            inputs_embeds=embeds,
            attention_mask=attention_mask.to(embeds.device),
            generation_config=generation_config,
            **kwargs,
        )

    def _tokenizer(self) -> Any:
        """The tokenizer, where an answer ends with text: that of the processor, or in the folder of the model."""
        if (processor := self.__dict__.get("processor")) is not None:
            return processor.tokenizer
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.name_or_path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ZooError(
                "Answers of this model end with a text: pass its tokenizer, generate(tokenizer=...)."
            ) from error

    def chat(self, text: str, image: Any = None, images: Iterable[Any] = (), video: Any = None, **options: Any) -> str:
        """Ask something about images or a video, and return the answer; `zoo.talk.Talk` holds several turns.

        Args:
            text: the question.
            image: a path, PIL image, array or bytes.
            images: several of them.
            video: a path, or a `zoo.vision.video.Video`.
            options: `max_new_tokens`, `stream`, and those of `generate`.
        """
        from zoo.talk import Talk

        shown = [*([image] if image is not None else []), *images]
        return Talk(self).say(text, shown, [video] if video is not None else [], **options)

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
        """Write config.json and the weights that differ from the base checkpoints, as safetensors.

        Args:
            is_main_process: False writes nothing; one process of several writes.
            state_dict: whole tensors of a model that is sharded over processes.
            include_base: also write weights that did not change since they came from a part's own checkpoint.
        """
        state = state_of(self, state_dict) if is_main_process or state_dict is None else {}
        if not is_main_process:
            return
        if include_base:
            self.bases.require_whole(self)
        folder = Path(save_directory)
        self.bases.require_elsewhere(folder)
        config = type(self.config).from_dict(self.config.to_dict())
        config.slots = slots_now(self)
        record: dict[str, Any] = {}
        if not include_base:
            state, record = self.bases.changed(self, state, config.slots)
        config.base = record or None
        for part in self.bases.nodes.keys() - record.keys():  # all of its weights are in the folder
            config.slots[part] = without_checkpoint(self, part) or config.slots[part]
        folder.mkdir(parents=True, exist_ok=True)
        config.architectures = [type(self).__name__]
        config.versions = library_versions()
        config.save_pretrained(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        write_weights(state, folder, max_shard_size)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

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
        **kwargs: Any,
    ) -> "ZooModel":
        """Load a folder or a hub repository that `save_pretrained` wrote; the model is in eval mode.

        Args:
            config: of the same parts, or of other ones: those without weights in the folder must be in `fresh`.
            fresh: parts that may start without weights.
            dtype: of the parameters, a torch dtype or its name; None keeps what was saved.
            device_map: a device, None for the CPU, `auto`, or a dict from prefixes of names (`vision`, `llm`, ...) to
                devices.
            attn_implementation: `auto` or a name that transformers knows; None: as it was saved.
        """
        from zoo.published.base import base_for, placed

        folder = local_folder(pretrained_model_name_or_path, revision)
        config = config or ZooConfig.from_pretrained(folder)
        refuse_code(config.slots, f"{folder}/config.json")
        saved_base = config.base
        dtype = dtype if dtype is not None else torch_dtype
        base = base_for(config, folder, fresh=fresh, dtype=dtype, device_map=device_map)
        model = cls(config, base=base)
        model.name_or_path = str(folder)
        model.bases.require_same(saved_base)
        read_weights(model, folder, fresh=fresh, done=base.read_here if base else None)
        model.generation_config = model.llm.lm.generation_config = stated_config(model, folder)  # what ends answers
        model = placed(model, device_map, dtype, base).eval()
        if attn_implementation is not None:
            model.set_attention(attn_implementation)
        return model


register_model(ZooConfig, ZooModel)
