"""How a composed model answers: transformers' `generate` on its language model, for a prompt with images."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.composed import generate_options
from zoo.composed.image_path import Encoded
from zoo.composed.prompted import Prompt, prompted, with_own_depth
from zoo.composed.turns import turn_of
from zoo.fusion.llm.decoder import generator_of
from zoo.registry import Cut, ZooError
from zoo.registry.versions import cache_argument


class GenerateMixin(nn.Module):
    """Generates, and chats."""

    llm: Any
    vision: Any
    adapter: Any
    inside_pruners: Any
    _encode: Any
    inside_llm: Any
    _placeholders: Any
    image_index: Any
    name_or_path: str

    @property
    def generation_config(self) -> Any:
        """Defaults of `generate`: those of the language model, which is what generates."""
        llm: Any = self._modules.get("llm")
        return None if llm is None else getattr(llm.lm, "generation_config", None)

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        llm: Any = self._modules.get("llm")
        if llm is not None:  # transformers sets one before there are parts
            getattr(llm.lm, "get_base_model", lambda: llm.lm)().generation_config = config

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images_per_row: Sequence[int] | None = None,
        cuts: Sequence[Cut] | None = None,
        encoded: tuple[Any, ...] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' own `generate`: greedy, sampling, beams, drafts of another model, and so on.

        What of it is refused, and why, stands in `zoo.composed.generate_options`.

        Args:
            input_ids: (B, T), padded on the left where lengths differ.
            pixel_values: (M, 3, S, S).
            attention_mask: (B, T); worked out from the ids where absent, as transformers does.
            images_per_row: needed only where images have no placeholders and rows do not hold one image each.
            cuts: of each image, where images have rows of their own (crops, frames).
            encoded: what `encode_images` gave, instead of `pixel_values`.
            generation_config: of transformers.
            kwargs: its fields, and what else transformers' `generate` takes: `cache` (or `past_key_values`), a
                `streamer`, an `assistant_model` (a causal LM, or a composed model of the same tokenizer), ...

        Returns:
            What transformers returns: prompt and new ids (B * num_return_sequences, T + new), or a dict if asked for.
        """
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if input_ids is None:
            raise ZooError("generate needs input_ids: a prompt, if only the token that begins one.")
        if kwargs.get("inputs_embeds") is not None:
            raise ZooError(
                "generate takes input_ids and puts image tokens where their placeholders are: no inputs_embeds."
            )
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ZooError(
                "generate needs padding on the left: the last token of some row is padding. Set padding_side='left'."
            )
        lm = generator_of(self.llm.lm)
        options = generate_options.options_of(generation_config, kwargs)
        generate_options.check_names(lm, kwargs, drafts=bool(options.get("is_assistant")))
        generate_options.check_options(options)
        device = lm.get_input_embeddings().weight.device
        input_ids = input_ids.to(device)
        given, past = kwargs.pop("past_key_values", None), 0
        if (given := kwargs.pop("cache", given)) is not None:
            past = int(given.get_seq_length())
            kwargs |= cache_argument(given)
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        shown, slots = self._encode(pixel_values, cuts, encoded), self._placeholders(input_ids)
        if options.get("is_assistant") and shown.kept is None:  # it drafts for a model that sees the images
            kwargs.pop("mm_encoder_outputs", None)
            slots = torch.zeros_like(slots)
        prompt = self._prompt(slots, input_ids, shown, images_per_row, past, whole)
        asked = generate_options.options_of(self.generation_config, {}) | options
        if prompt.image is not None:
            generate_options.check_parts(asked, input_ids.shape[1], self.inside_pruners, self.adapter)
        if isinstance(drafts := kwargs.get("assistant_model"), GenerateMixin):
            kwargs["assistant_model"] = self._drafting(drafts, input_ids, pixel_values, cuts, images_per_row, prompt)
        if (asked.get("stop_strings") or asked.get("token_healing")) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self._tokenizer()
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(device)
        if asked.get("assistant_early_exit"):
            lm = with_own_depth(lm)
        with turn_of(self, self.inside_llm), _own_errors():
            return prompted(lm, prompt).generate(input_ids, generation_config=generation_config, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        """What transformers asks of a model that drafts."""
        return bool(generator_of(self.llm.lm)._supports_logits_to_keep())

    def _prompt(
        self,
        slots: Tensor,
        input_ids: Tensor,
        encoded: Encoded,
        images_per_row: Sequence[int] | None,
        past: int = 0,
        whole: bool = True,
    ) -> Prompt:
        """Join ids (B, T), the places (B, T) of image tokens in them, and the images.

        Args:
            past: tokens that a given cache holds.
            whole: whether their ids are among the given ones.
        """
        index = self.image_index(slots, encoded.tokens, past if whole else 0)
        told: dict[str, Any] = {"past": 0 if whole else past, "goes_on": past > 0}
        return Prompt(self, index, encoded.tokens, encoded.kept, images_per_row, input_ids, **told)

    def _drafting(
        self,
        drafts: Any,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        cuts: Sequence[Cut] | None,
        images_per_row: Sequence[int] | None,
        prompt: Prompt,
    ) -> Any:
        """Give the language model of a composed model that drafts, with the images of the prompt where it sees any."""
        lm, nothing = generator_of(drafts.llm.lm), Encoded()
        if (prompt.index is None and prompt.image is None) or drafts.vision is None:
            return prompted(lm, drafts._prompt(torch.zeros_like(input_ids).bool(), input_ids, nothing, None))
        if drafts is self:
            return prompted(lm, prompt)
        if pixel_values is None or drafts.vision.transform != self.vision.transform:
            what = "encoded= is of one encoder" if pixel_values is None else "their encoders take other pixels"
            raise ZooError(
                f"The composed model in assistant_model cannot see the images of this one: {what}. Pass its language "
                "model instead (assistant_model=other.llm.lm), which drafts without them."
            )
        slots = self._placeholders(input_ids)
        seen = drafts.encode_images(pixel_values, cuts)
        made = 0 if seen.tokens is None else seen.tokens.shape[:-1].numel()
        if made != int(slots.sum()):
            raise ZooError(
                f"The composed model in assistant_model makes {made} tokens of the images, and the prompt has "
                f"{int(slots.sum())} placeholders. Pass its language model instead (assistant_model=other.llm.lm), "
                "which drafts without images."
            )
        return prompted(lm, drafts._prompt(slots, input_ids, seen, images_per_row))

    def _tokenizer(self) -> Any:
        """The tokenizer, where an answer ends with text: that of the processor, or in the folder of the model."""
        if (processor := self.__dict__.get("processor")) is not None:
            return processor.tokenizer
        from zoo.text.tokenizer_files import read_tokenizer

        try:
            return read_tokenizer(self.name_or_path)
        except ZooError as error:
            raise ZooError(
                "Answers of this model end with a text: pass its tokenizer, generate(tokenizer=...)."
            ) from error

    def chat(self, text: str, image: Any = None, images: Iterable[Any] = (), video: Any = None, **options: Any) -> str:
        """Ask about images or a video, and return the answer; `zoo.composed.chat_session.Talk` holds several turns.

        Args:
            text: the question.
            image: a path, PIL image, array or bytes.
            images: several of them.
            video: a path, or a `zoo.vision.images.video.Video`.
            options: `max_new_tokens`, `stream`, and those of `generate`.
        """
        from zoo.composed.chat_session import Talk

        shown = [*([image] if image is not None else []), *images]
        return Talk(self).say(text, shown, [video] if video is not None else [], **options)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Say what transformers' `generate` refuses, not what fails in a model, as errors that a user can fix."""
    try:
        yield
    except ZooError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if not where.startswith(("transformers.generation", "transformers.cache_utils")):
            raise
        raise ZooError(f"generate: {' '.join(str(error).split())}") from error
