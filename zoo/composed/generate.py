"""Generation of a composed model: transformers' `generate` on its language model, for a prompt with images.

`generate` runs on the language model itself, so strategies, caches and peculiarities of its family are those of
transformers. Its ids include the placeholders of images; image tokens replace them only where a pass makes its inputs
from ids. So whatever reads ids (penalties, lookups, drafts), splits them (chunked prefill) or rolls them back (assisted
decoding) works without knowing of images.

Each call makes one object of a subclass of the language model's own class, which shares everything with the language
model and holds the prompt. Nothing is set on the language model, so threads cannot interfere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache as once
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.composed import generate_options
from zoo.composed.image_path import Encoded
from zoo.composed.inputs import Inputs
from zoo.composed.left_out import columns_of, put_columns, text_id
from zoo.composed.outputs import LLMSequence
from zoo.composed.positions import put_shift, repeated, shift_of, whole_row
from zoo.composed.turns import turn_of
from zoo.fusion.llm.decoder import generator_of
from zoo.fusion.llm.deep import DeepFeatures
from zoo.registry import Adapter, Cut, Encoder, ImageFeatures, LanguageModel, ZooError
from zoo.registry.forward_pass import conditions_in, put_conditions, running
from zoo.registry.versions import cache_argument, cache_in

_SEQUENCE = "zoo_sequence"  # key of a pass's sequence among the inputs that transformers passes on to the call


class GenerateMixin(nn.Module):
    """Generates, and chats."""

    llm: LanguageModel
    vision: Encoder | None
    adapter: MutableMapping[str, Adapter]
    inside_pruners: Any
    _encode: Any
    inside_llm: Any
    _leave_out: Any
    _placeholders: Any
    config: Any
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
        questions: Sequence[Any] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' own `generate`: greedy, sampling, beams, drafts of another model, and so on.

        What is refused, and why, is listed in `zoo.composed.generate_options`.

        Args:
            input_ids: (B, T), padded on the left where lengths differ.
            pixel_values: (M, 3, S, S).
            attention_mask: (B, T); where absent, derived from the ids as transformers does.
            images_per_row: needed only where images have no placeholders and rows do not hold one image each.
            cuts: of each image, where images have rows of their own (crops, frames).
            encoded: output of `encode_images`, instead of `pixel_values`.
            questions: what is asked about the images, a text for each row, for parts that need it; where absent, read
                from the ids.
            generation_config: of transformers.
            kwargs: its fields, and further arguments of transformers' `generate`: `cache` (or `past_key_values`), a
                `streamer`, an `assistant_model` (a causal LM, or a composed model of the same tokenizer), ...

        Returns:
            As transformers: prompt and new ids (B * num_return_sequences, T + new), or a dict if asked for.
        """
        input_ids = kwargs.pop("inputs", None) if input_ids is None else input_ids
        if input_ids is None:
            raise ZooError("generate needs input_ids: a prompt, if only the token that begins one.")
        if kwargs.get("inputs_embeds") is not None:
            raise ZooError(
                "generate takes input_ids and puts image tokens where their placeholders are: no inputs_embeds."
            )
        generate_options.check_rows(input_ids, attention_mask)
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
        prompts = Inputs(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            images_per_row=images_per_row,
            cuts=cuts,
            encoded=encoded,
            questions=questions,
        )
        shown, slots = self._encode(prompts), self._placeholders(input_ids)
        if options.get("is_assistant") and shown.kept is None:  # a draft model without images: placeholders are text
            kwargs.pop("mm_encoder_outputs", None)
            slots = torch.zeros_like(slots)
        written = input_ids
        if past and whole and (held := columns_of(given, len(input_ids))) is not None:
            input_ids = held.take(input_ids, text_id(self.config))
            attention_mask = None if attention_mask is None else held.take(attention_mask.to(device))
            slots = self._placeholders(input_ids)
        if shown.valid is not None and past:
            raise ZooError("With a cache, the images of which a pruner keeps a number of its own are in the cache.")
        left = Inputs(input_ids=input_ids, attention_mask=attention_mask, images_per_row=images_per_row)
        if shown.valid is not None:  # go on with fewer placeholders
            if attention_mask is None:
                attention_mask = _mask(input_ids, generate_options.options_of(self.generation_config, {}) | options)
            left, shown = self._leave_out(replace(left, attention_mask=attention_mask.to(device)), shown)
            input_ids, attention_mask, images_per_row = left.input_ids, left.attention_mask, left.images_per_row
            slots = self._placeholders(input_ids)
        prompt = self._prompt(slots, input_ids, shown, images_per_row, past, whole, given)
        if left.columns is not None:
            prompt.shift, prompt.columns = left.shift, left.columns
        if gone := written.shape[1] - input_ids.shape[1]:
            generation_config = generate_options.shorten(generation_config, kwargs, gone, self.generation_config)
        asked = generate_options.options_of(self.generation_config, {}) | options
        if prompt.image is not None:
            generate_options.check_parts(asked, input_ids.shape[1], self.inside_pruners, self.adapter)
        if isinstance(drafts := kwargs.get("assistant_model"), GenerateMixin):
            kwargs["assistant_model"] = self._drafting(drafts, prompts, input_ids, images_per_row, prompt)
        if (asked.get("stop_strings") or asked.get("token_healing")) and kwargs.get("tokenizer") is None:
            kwargs["tokenizer"] = self._tokenizer()
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(device)
        if asked.get("assistant_early_exit"):  # transformers sets `num_hidden_layers` on the config for each draft
            lm = with_own_depth(lm)
        with turn_of(self, self.inside_llm), _own_errors():
            out = prompted(lm, prompt).generate(input_ids, generation_config=generation_config, **kwargs)
        return _with_prompt(out, written, input_ids.shape[1]) if gone else out

    def _supports_logits_to_keep(self) -> bool:
        """Whether a draft model may compute logits of the last positions only; called by transformers."""
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
        """Join ids (B, T), the placeholders (B, T) among them, and the images.

        Args:
            past: tokens in the given cache.
            whole: whether `input_ids` include theirs.
            cache: the given one.
        """
        index = self.image_index(slots, encoded.tokens, past if whole else 0)
        more: dict[str, Any] = {"past": 0 if whole else past, "goes_on": past > 0}
        anew = whole and index is not None and bool((index[:, :past] >= 0).any())  # with the images of the cache
        shift = None if anew or not past else shift_of(cache, len(input_ids))
        if self.unpruned is not None and encoded.kept is not None and index is not None:
            shift = self.unpruned.gaps(encoded.kept).shift(index, before=shift)
        more |= {"shift": shift, "deep": encoded.deep}
        return Prompt(self, index, encoded.tokens, encoded.kept, images_per_row, input_ids, **more)

    def _drafting(
        self,
        drafts: Any,
        given: Inputs,
        input_ids: Tensor,
        images_per_row: Sequence[int] | None,
        prompt: Prompt,
    ) -> Any:
        """Return the language model of a composed draft model, with the prompt's images where it has an encoder."""
        lm, nothing = generator_of(drafts.llm.lm), Encoded()
        if (prompt.index is None and prompt.image is None) or drafts.vision is None:
            return prompted(lm, drafts._prompt(torch.zeros_like(input_ids).bool(), input_ids, nothing, None))
        if drafts is self:
            return prompted(lm, prompt)
        assert self.vision is not None, "the prompt has images"
        if given.pixel_values is None or drafts.vision.transform != self.vision.transform:
            what = "encoded= is of one encoder" if given.pixel_values is None else "their encoders take other pixels"
            raise ZooError(
                f"The composed model in assistant_model cannot take the images of this one: {what}. Pass its language "
                "model instead (assistant_model=other.llm.lm), which drafts without them."
            )
        slots = self._placeholders(input_ids)
        images = drafts._encode(replace(given, encoded=None))
        made = 0 if images.tokens is None else images.tokens.shape[:-1].numel()
        if made != int(slots.sum()):
            raise ZooError(
                f"The composed model in assistant_model makes {made} tokens of the images, and the prompt has "
                f"{int(slots.sum())} placeholders. Pass its language model instead (assistant_model=other.llm.lm), "
                "which drafts without images."
            )
        return prompted(lm, drafts._prompt(slots, input_ids, images, images_per_row))

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
        from zoo.composed.chat_session import Talk, shown_in

        if isinstance(image, list | tuple):
            raise ZooError(
                f"chat(image=) takes one image, got a {type(image).__name__}. Several go beside it: images=."
            )
        shown = [*([image] if image is not None else []), *shown_in(images)]
        return Talk(self).say(text, shown, [video] if video is not None else [], **options)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what transformers' `generate` refuses as a `ZooError`; errors from inside a model stay as they are."""
    try:
        yield
    except ZooError:
        raise
    except (ValueError, ImportError, NotImplementedError) as error:
        trace = error.__traceback__  # the innermost frame tells a refusal from a failure: both are ValueErrors
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
        if not where.startswith(("transformers.generation", "transformers.cache_utils")):
            raise
        raise ZooError(f"generate: {' '.join(str(error).split())}") from error


# ---- one call -----------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """The prompt of one call of `generate`.

    Args:
        model: the composed model.
        index: (B, T) image token of each column of the given ids, -1 text; None: text only.
        image_tokens: (S, C).
        image: features after pruning, for adapters; None: no image.
        images_per_row: images of each row.
        shift: (B, T + 1) added to the positions of the given ids and of what follows, (B, 1) to all; (A, B, ...) with
            positions of several axes; None: nothing.
        deep: (S, C) for each of the LLM's first layers, see `zoo.fusion.llm.deep`.
        past: tokens in the given cache whose ids are not given.
        goes_on: the given cache has a beginning, whose condition adapters keep.
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
    deep: tuple[Tensor, ...] = ()
    columns: Any = None  # that the ids are of a longer prompt, see `zoo.composed.left_out`; None: all
    rows: int = field(default=0, init=False)  # of the LLM's batch when adapters were conditioned; 0: not yet
    conditions: dict[str, Any] = field(default_factory=dict, init=False)  # what adapters made of the images

    def condition(self, rows: int, cache: Any) -> None:
        """Pass the images to the adapters, once the number of copies of each row (beams) is known."""
        if self.goes_on and self.image is None:
            self.conditions = conditions_in(cache)
        else:
            slots = self.model._placeholders(self.ids)
            with running() as now:
                self.model._condition(self.image, self.images_per_row, slots, expand=max(1, rows // len(self.ids)))
            self.conditions = now.conditions
        self.rows = rows

    def place(self, inputs: dict[str, Any], given: Tensor) -> dict[str, Any]:
        """Insert image tokens into the inputs of one pass.

        Args:
            inputs: made of `given` by the language model's class.
            given: (rows, L) ids: the prompt and the tokens after it, or a chunk of the prompt.
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
                put_shift(cache, repeated(self.shift, rows), self.past)
            put_columns(cache, self.columns)
        length = self.ids.shape[1]
        chunk = given.shape[1] < length  # of a chunked prefill: its place follows from what the cache holds
        start = int(cache.get_seq_length()) - self.past if chunk else given.shape[1] - q
        if self.shift is not None:
            inputs = self._shifted(inputs, self.shift, start, rows, q)
        if self.index is None or start >= length:
            return inputs  # behind the prompt: text only
        index = F.pad(self.index[:, start : start + q], (0, max(0, start + q - length)), value=-1)  # (B, q)
        if not bool((index >= 0).any()):
            return inputs
        copies = rows // len(index)
        deep = DeepFeatures(index.repeat_interleave(copies, 0), self.deep) if self.deep else None
        inside = self.model.inside_pruners
        if deep is not None or inside:
            mask = inputs.get("attention_mask") if inside else None
            mask = mask if mask is None else mask[::copies]  # beams of a row share its mask
            drafts, dense = max(0, start + q - length), self.model.config.positions == "dense"
            sequence = LLMSequence(index >= 0, mask, None, None, drafts=drafts, dense=dense, deep=deep)
            for pruner in inside.values():
                pruner.begin(sequence)
            inputs[_SEQUENCE] = sequence
        index = index.repeat_interleave(copies, 0) if copies > 1 else index
        return inputs | {"input_ids": None, "inputs_embeds": self.model.place(ids, index, self.image_tokens)}

    def _shifted(self, inputs: dict[str, Any], shift: Tensor, start: int, rows: int, q: int) -> dict[str, Any]:
        """Shift the positions of the columns from `start` on; a mask keeps gaps from being taken for packed samples."""
        if "position_ids" not in inputs and not bool(shift.any()):
            return inputs  # the family counts tokens by itself (BLOOM, MPT), so that positions are dense
        cache, columns = cache_in(inputs), torch.arange(start, start + q, device=shift.device)
        shift = repeated(shift[..., columns.clamp(max=shift.shape[-1] - 1)], rows)  # (rows, q), or (A, rows, q)
        held = 0 if cache is None else int(cache.get_seq_length())
        more: dict[str, Any] = {"position_ids": inputs["position_ids"] + shift}
        if cache is None and inputs.get("attention_mask") is None:
            more["attention_mask"] = shift.new_ones(rows, q)
        if held and q > 1:
            more |= whole_row(self.model.llm.lm, rows, q, held)
        return inputs | more


def _mask(input_ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Derive the mask of a prompt from its ids, as transformers does: padding that also ends answers is not masked."""
    pad, ends = options.get("pad_token_id"), options.get("eos_token_id")
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if pad is None or pad in [int(x) for x in ends if x is not None]:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def _with_prompt(out: Any, written: Tensor, length: int) -> Any:
    """Put the whole prompt (B, T) in front of new ids, in place of the `length` columns that were run."""

    def whole(ids: Tensor) -> Tensor:
        return torch.cat([written.repeat_interleave(len(ids) // len(written), 0), ids[:, length:]], 1)

    if isinstance(out, Tensor):
        return whole(out)
    out["sequences"] = whole(out["sequences"])
    return out


def prompted(lm: Any, prompt: Prompt) -> Any:
    """Return an object that shares all of the language model and inserts the images of `prompt` into its passes."""
    cls: Any = type(lm)
    made: Any = object.__new__(_class_of(cls))
    object.__setattr__(made, "__dict__", lm.__dict__)  # the same dict: modules, hooks and config are shared
    object.__setattr__(made, "zoo_lm", lm)
    object.__setattr__(made, "zoo_prompt", prompt)
    return made


def with_own_depth(lm: Any) -> Any:
    """Return a language model that shares all but its config, whose depth early exit changes for each draft."""
    decoder = getattr(lm, lm.base_model_prefix)
    config = copy(decoder.config)
    inner: Any = object.__new__(type(decoder))
    inner.__dict__.update(decoder.__dict__, config=config, _compiled_call_impl=None)  # a graph has a fixed depth
    made: Any = object.__new__(type(lm))
    made.__dict__.update(lm.__dict__, config=config, _modules={**lm._modules, lm.base_model_prefix: inner})
    return made


@once
def _class_of(cls: Any) -> type:
    """Make the subclass of a language model's class that holds a prompt."""

    class Prompted(cls):
        __slots__ = ("zoo_lm", "zoo_prompt")  # beside the `__dict__` that is the language model's

        @wraps(cls.prepare_inputs_for_generation)  # transformers reads its signature
        def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            return self.zoo_prompt.place(inputs, input_ids)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _run(self.zoo_lm, self.zoo_prompt, *args, **kwargs)

        def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
            call = self.zoo_lm.get_compiled_call(compile_config)  # cached on the LLM, so that it compiles once
            return lambda *args, **kwargs: _run(call, self.zoo_prompt, *args, **kwargs)

    Prompted.__name__, Prompted.__qualname__, Prompted.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Prompted


def _run(call: Callable[..., Any], prompt: Prompt, *args: Any, **kwargs: Any) -> Any:
    with running(kwargs.pop(_SEQUENCE, None), prompt.conditions):
        return call(*args, **kwargs)
