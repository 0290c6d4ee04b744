"""A language model that generates from a prompt with images: transformers' `generate` itself, on ids.

The language model is what generates, so that each strategy, cache and habit of its family is its own. It is given ids
as any language model, placeholders of images among them; the image tokens take their places where the inputs of a pass
are made of the ids. So whatever looks at ids (penalties, lookups, drafts), splits them (chunks of a prefill) or goes
back in them (assisted decoding) needs to know nothing of images.

For one call there is one object: of a subclass of the language model's own class, which shares all that the language
model holds, and knows the prompt. Nothing is left on the language model, and threads do not meet.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache as once
from functools import wraps
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from zoo.composed.outputs import LLMSequence
from zoo.registry import ImageFeatures
from zoo.registry.forward_pass import conditions_in, put_conditions, running
from zoo.registry.versions import cache_in

_SEQUENCE = "zoo_sequence"  # under which a pass's sequence travels from the inputs to the call


@dataclass
class Prompt:
    """What one call of `generate` begins with.

    Args:
        model: the composed model.
        index: (B, T) which image token stands in each column of the given ids, -1 a word; None: words alone.
        image_tokens: (S, C).
        image: what the pruners left of the encoder's features, for adapters; None: no image.
        images_per_row: images of each row.
        past: tokens in the given cache whose ids are not among the given ones.
        goes_on: the cache holds a beginning, whose image adapters stay with.
    """

    model: Any
    index: Tensor | None
    image_tokens: Tensor | None
    image: ImageFeatures | None
    images_per_row: Sequence[int] | None
    ids: Tensor
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
        length = self.ids.shape[1]
        if self.index is None or given.shape[1] - q >= length:
            return inputs  # words behind the prompt
        chunk = given.shape[1] < length
        start = int(cache.get_seq_length()) - self.past if chunk else given.shape[1] - q
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
