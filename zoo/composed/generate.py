"""How a composed model answers: transformers' `generate` on its language model, for a prompt with images.

The language model is what generates, so that each strategy, cache and habit of its family is its own. It is given ids
as any language model, placeholders of images among them; the image tokens take their places where the inputs of a pass
are made of the ids. So whatever looks at ids (penalties, lookups, drafts), splits them (chunks of a prefill) or goes
back in them (assisted decoding) needs to know nothing of images.

For one call there is one object: of a subclass of the language model's own class, which shares all that the language
model holds, and knows the prompt. Nothing is left on the language model, and threads do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache as once
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.composed import generate_options
from zoo.composed.image_path import Encoded
from zoo.composed.outputs import LLMSequence
from zoo.composed.positions import put_shift, shift_of, whole_row
from zoo.composed.turns import turn_of
from zoo.fusion.llm.decoder import generator_of
from zoo.registry import Adapter, Cut, Encoder, ImageFeatures, LanguageModel, ZooError
from zoo.registry.forward_pass import conditions_in, put_conditions, running
from zoo.registry.versions import cache_argument, cache_in

_SEQUENCE = "zoo_sequence"  # under which a pass's sequence travels from the inputs to the call


class GenerateMixin(nn.Module):
    """Generates, and chats."""

    llm: LanguageModel
    vision: Encoder | None
    adapter: MutableMapping[str, Adapter]
    inside_pruners: Any
    _encode: Any
    inside_llm: Any
    _placeholders: Any
    image_index: Any
    unpruned: Any
    name_or_path: str

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
        prompt = self._prompt(slots, input_ids, shown, images_per_row, past, whole, given)
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
        cache: Any = None,
    ) -> Prompt:
        """Join ids (B, T), the places (B, T) of image tokens in them, and the images.

        Args:
            past: tokens that a given cache holds.
            whole: whether their ids are among the given ones.
            cache: the given one.
        """
        index = self.image_index(slots, encoded.tokens, past if whole else 0)
        told: dict[str, Any] = {"past": 0 if whole else past, "goes_on": past > 0}
        anew = whole and index is not None and bool((index[:, :past] >= 0).any())  # the images of the cache come again
        shift = None if anew or not past else shift_of(cache, len(input_ids))
        if self.unpruned is not None and encoded.kept is not None and index is not None:
            shift = self.unpruned.gaps(encoded.kept).shift(index, before=shift)
        told["shift"] = shift
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
        assert self.vision is not None, "the prompt has images"
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


# ---- one call -----------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """What one call of `generate` begins with.

    Args:
        model: the composed model.
        index: (B, T) which image token stands in each column of the given ids, -1 a word; None: words alone.
        image_tokens: (S, C).
        image: what the pruners left of the encoder's features, for adapters; None: no image.
        images_per_row: images of each row.
        shift: (B, T) what is added to the positions of the given ids, (B, 1) of all; None: nothing.
        past: tokens in the given cache whose ids are not among the given ones.
        goes_on: the cache holds a beginning, whose image adapters stay with.
    """

    model: Any
    index: Tensor | None
    image_tokens: Tensor | None
    image: ImageFeatures | None
    images_per_row: Sequence[int] | None
    ids: Tensor
    shift: Tensor | None = None
    past: int = 0
    goes_on: bool = False
    rows: int = field(default=0, init=False)  # of the LLM's batch that adapters were conditioned for
    conditions: dict[str, Any] = field(default_factory=dict, init=False)  # what they made of the images

    def condition(self, rows: int, cache: Any) -> None:
        """Hand the images to the adapters, once it is known how many copies of each row there are."""
        if self.goes_on and self.image is None:
            self.conditions = conditions_in(cache)
        else:
            slots = self.model._placeholders(self.ids)
            with running() as now:
                self.model._condition(self.image, self.images_per_row, slots, expand=max(1, rows // len(self.ids)))
            self.conditions = now.conditions
        self.rows = rows

    def place(self, inputs: dict[str, Any], given: Tensor) -> dict[str, Any]:
        """Put image tokens into the inputs of one pass.

        Args:
            inputs: what the language model's class made of `given`.
            given: (rows, L) ids: the prompt and what came after, or a chunk of the prompt.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            return inputs
        rows, q = ids.shape
        cache = cache_in(inputs)
        if rows != self.rows:
            self.condition(rows, cache)
            put_conditions(cache, self.conditions)
            if self.shift is not None:
                put_shift(cache, self.shift.repeat_interleave(rows // len(self.shift), 0), self.past)
        length = self.ids.shape[1]
        chunk = given.shape[1] < length
        start = int(cache.get_seq_length()) - self.past if chunk else given.shape[1] - q
        if self.shift is not None:
            inputs = self._shifted(inputs, self.shift, start, rows, q)
        if self.index is None or start >= length:
            return inputs  # words behind the prompt
        index = F.pad(self.index[:, start : start + q], (0, max(0, start + q - length)), value=-1)  # (B, q)
        if not bool((index >= 0).any()):
            return inputs
        copies = rows // len(index)
        if inside := self.model.inside_pruners:
            mask = inputs.get("attention_mask")
            mask = mask if mask is None else mask[::copies]
            sequence = LLMSequence(index >= 0, mask, None, None, drafts=max(0, start + q - length))
            for pruner in inside.values():
                pruner.begin(sequence)
            inputs[_SEQUENCE] = sequence
        index = index.repeat_interleave(copies, 0) if copies > 1 else index
        return inputs | {"input_ids": None, "inputs_embeds": self.model.place(ids, index, self.image_tokens)}

    def _shifted(self, inputs: dict[str, Any], shift: Tensor, start: int, rows: int, q: int) -> dict[str, Any]:
        """Shift the positions of the columns from `start` on, and see that no gap is taken for a border."""
        cache, columns = cache_in(inputs), torch.arange(start, start + q, device=shift.device)
        shift = shift[:, columns.clamp(max=shift.shape[1] - 1)].repeat_interleave(rows // len(shift), 0)  # (rows, q)
        held = 0 if cache is None else int(cache.get_seq_length())
        told: dict[str, Any] = {"position_ids": inputs["position_ids"] + shift}
        if cache is None and inputs.get("attention_mask") is None:
            told["attention_mask"] = torch.ones_like(shift)
        if held and q > 1:
            told |= whole_row(self.model.llm.lm, rows, q, held)
        return inputs | told


def prompted(lm: Any, prompt: Prompt) -> Any:
    """Give the language model as it is to generate from `prompt`."""
    cls: Any = type(lm)
    made: Any = object.__new__(_class_of(cls))
    object.__setattr__(made, "__dict__", lm.__dict__)
    object.__setattr__(made, "zoo_lm", lm)
    object.__setattr__(made, "zoo_prompt", prompt)
    return made


def with_own_depth(lm: Any) -> Any:
    """Give a language model that shares all but its config, where early exit changes the depth for each draft."""
    decoder = getattr(lm, lm.base_model_prefix)
    config = copy(decoder.config)
    inner: Any = object.__new__(type(decoder))
    inner.__dict__.update(decoder.__dict__, config=config, _compiled_call_impl=None)  # a graph is of one depth
    made: Any = object.__new__(type(lm))
    made.__dict__.update(lm.__dict__, config=config, _modules={**lm._modules, lm.base_model_prefix: inner})
    return made


@once
def _class_of(cls: Any) -> type:
    """The subclass of a language model's class that knows a prompt."""

    class Prompted(cls):
        __slots__ = ("zoo_lm", "zoo_prompt")  # beside the `__dict__` that is the language model's

        @wraps(cls.prepare_inputs_for_generation)  # transformers reads its signature
        def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            return self.zoo_prompt.place(inputs, input_ids)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _run(self.zoo_lm, self.zoo_prompt, *args, **kwargs)

        def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
            call = self.zoo_lm.get_compiled_call(compile_config)  # kept there from one call to the next
            return lambda *args, **kwargs: _run(call, self.zoo_prompt, *args, **kwargs)

    Prompted.__name__, Prompted.__qualname__, Prompted.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Prompted


def _run(call: Callable[..., Any], prompt: Prompt, *args: Any, **kwargs: Any) -> Any:
    with running(kwargs.pop(_SEQUENCE, None), prompt.conditions):
        return call(*args, **kwargs)
