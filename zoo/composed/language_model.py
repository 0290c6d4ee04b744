"""Methods of a transformers model that its language model implements: embeddings, tied weights, checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Encoder, LanguageModel, ZooError
from zoo.registry.versions import checkpoint_activations, keep_activations
from zoo.storage.rows import split


class LanguageModelMixin(nn.Module):
    """Delegates to the language model what concerns the text side of a composed model."""

    config: Any  # ZooConfig
    vision: Encoder | None
    llm: LanguageModel

    @property
    def generation_config(self) -> Any:
        """Defaults of `generate`: those of the language model, which runs it."""
        llm: Any = self._modules.get("llm")
        return None if llm is None else getattr(llm.lm, "generation_config", None)

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        llm: Any = self._modules.get("llm")
        if llm is not None:  # transformers sets one before parts are built
            getattr(llm.lm, "get_base_model", lambda: llm.lm)().generation_config = config

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the ids."""
        return self.llm.lm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the ids."""
        self.llm.lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the vocabulary projection."""
        return self.llm.lm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the vocabulary projection."""
        self.llm.lm.set_output_embeddings(new_embeddings)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Make embedding and vocabulary projection one tensor again, where the LLM's config ties them."""
        self.llm.lm.tie_weights(*args, **kwargs)

    def get_decoder(self) -> nn.Module:
        """Return the decoder, without the vocabulary projection."""
        return self.llm.lm.get_decoder()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the embedding and the vocabulary projection more rows, or fewer, as transformers does.

        Args:
            new_num_tokens: rows; None: as many as there are.
            pad_to_multiple_of: rows are rounded up to a multiple of this.
            mean_resizing: new rows are drawn around the mean of the old ones; False: around zero.

        Returns:
            The embedding.

        Raises:
            ZooError: an adapter has replaced one of the two, the placeholder of images would have no row, or a saved
                model could not be loaded.
        """
        lm = self.llm.lm
        before = self.llm.vocab_size
        for what, layer, kind in (
            ("embedding", lm.get_input_embeddings(), nn.Embedding),
            ("vocabulary projection", lm.get_output_embeddings(), nn.Linear),
        ):
            if not isinstance(layer, kind):  # wrapped by PEFT, say: transformers would drop the wrapper
                kind_of = f"{type(layer).__name__} of {type(layer).__module__.partition('.')[0]}"
                raise ZooError(f"The {what} is a {kind_of}, whose rows cannot be changed: resize before it is there.")
        wanted = before if new_num_tokens is None else new_num_tokens
        if wanted <= self.config.image_token_id:
            raise ZooError(f"{wanted} tokens leave no row for the image placeholder, id {self.config.image_token_id}.")
        node = (self.config.slots or {}).get("llm") or {}
        if wanted < before and node.get("checkpoint"):
            raise ZooError(
                f"The LLM's checkpoint {node['checkpoint']!r} gives {before} rows whenever the model is loaded, so "
                f"{wanted} would not last: keep at least {before}."
            )
        table = lm.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.llm.vocab_size != before:  # what the model is built with when it is loaded
            self.config.text_vocab_size = self.llm.vocab_size
            if "vocab_size" in (node.get("extra") or {}):
                node["extra"]["vocab_size"] = self.llm.vocab_size
        return table

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the rows of a table that `save_pretrained` wrote alone: those ahead of them are the model's own.

        transformers' `Trainer` loads the tensors of its checkpoints by their names when it resumes.
        """
        parts = [key for key in state_dict if key.startswith(prefix) and split(key)[1]]
        own = dict(self.named_parameters(prefix.removesuffix("."), remove_duplicate=False)) if parts else {}
        for listed in parts:
            (name, first), rows = split(listed), state_dict[listed]
            if name in own and own[name][first:].shape == rows.shape:
                state_dict[name] = torch.cat([own[name].detach()[:first].to(rows), state_dict.pop(listed)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def prepare_inputs_for_generation(self) -> Callable[..., dict[str, Any]]:
        """The language model's method, as `generate` runs on the language model."""
        return self.llm.lm.prepare_inputs_for_generation

    @prepare_inputs_for_generation.setter
    def prepare_inputs_for_generation(self, value: Any) -> None:
        raise ZooError(
            "What each step of generation is given cannot be replaced, as PEFT's prompt and prefix methods do: use one "
            "that changes layers, such as LoRA."
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute activations of the LLM (and the encoder where it can) in backward.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint`; None: `use_reentrant=False`.
            options: what transformers takes beside them.
        """
        checkpoint_activations(self.llm.lm, activation_checkpointing_kwargs, **options)
        if self.vision is not None:
            self.vision.set_gradient_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations for backward again."""
        keep_activations(self.llm.lm)
        if self.vision is not None:
            self.vision.set_gradient_checkpointing(False)

    # The names in transformers before 5.23, which PEFT and others still use.

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Do what `activation_checkpointing_enable` does."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Do what `activation_checkpointing_disable` does."""
        self.activation_checkpointing_disable()
