"""A chat with a model: turns of a conversation, with images and videos in any of them."""

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from os import PathLike
from typing import Any

from torch import Tensor

from zoo.composed.generate_options import options_of
from zoo.registry import Dialog, Sample, ZooError
from zoo.text.stops import reader_for, streamer
from zoo.vision.images.decode import open_image
from zoo.vision.images.processors import flat
from zoo.vision.images.video import Video, as_video

LONGEST = 256  # tokens of an answer, where nothing states another number
# Options that act on draws alone: one of them asks for draws.
_DRAWN = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Talk:
    """A conversation that keeps its earlier turns and images.

    Args:
        model: composed.
        processor: of the model; None: the one that `zoo.load` returned with it.
        system: text before the conversation.
    """

    def __init__(self, model: Any, processor: Any = None, system: str = "") -> None:
        self.model = model
        self.processor = processor if processor is not None else model.__dict__.get("processor")
        if self.processor is None:
            raise ZooError("The model came without its processor: load it with zoo.load, or pass processor=.")
        self.messages: list[dict[str, Any]] = []
        self.shown: list[Any] = []  # images and videos as the encoder takes them, each prepared once
        self._sources: list[Any] = []  # the same as they were given, where they may be prepared again
        if system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    def say(
        self,
        text: str,
        images: Iterable[Any] = (),
        videos: Iterable[Any] = (),
        *,
        stream: Callable[[str], None] | None = None,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> str:
        """Add a turn of the user, with images and videos, and return the answer.

        Args:
            text: the question.
            images: paths, PIL images, arrays or bytes; one of them may be given by itself.
            videos: paths, or `zoo.vision.images.video.Video`s, or one of them.
            stream: is called with each piece of the answer as soon as it is generated.
            max_new_tokens: the longest answer; None: 256, unless `max_length` or a `generation_config` states another.
            options: further ones of `generate`. Answers are greedy, unless `do_sample` or an option of draws is given,
                such as `temperature`.

        Raises:
            ZooError: `text` is something else, such as a list of messages; or several answers are asked for.
        """
        if not isinstance(text, str):
            raise ZooError(
                f"A chat takes the question as a text, got {type(text).__name__}. Images go beside it (images=), "
                "and zoo.composed.chat_session.Talk keeps earlier turns. Messages go through "
                "processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True), "
                "and their output to model.generate."
            )
        options = _settled(options, max_new_tokens)
        films = [as_video(v) for v in shown_in(videos)]
        sources = [*shown_in(images), *films]
        content = [{"type": "video" if isinstance(s, Video) else "image"} for s in sources]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        shown, sources = self._prepared(sources)
        messages = [*self.messages, turn]
        row = self.processor.encode_prompt(
            Sample("chat", [None] * len(shown), []), Dialog(messages), pixel_values=list(shown)
        )
        batch = self.processor.collate([row], padding_side="left")
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
        given = {k: v.to(self.model.device) for k, v in given.items()}
        given |= {k: batch[k] for k in ("cuts", "images_per_row", "questions") if k in batch}
        reader = reader_for(self.model, self.processor.template)
        if stream is not None:
            options["streamer"] = streamer(reader, stream)
        if self.model.generation_config.stop_strings:
            options.setdefault("tokenizer", self.processor.tokenizer)
        out = self.model.generate(**given, **options)
        ids = out if isinstance(out, Tensor) else out["sequences"]
        answer = reader.read(ids[0, row.input_ids.shape[0] :].tolist())
        self.shown, self._sources = shown, sources  # only now: a refused turn leaves the conversation as it was
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer or "..."}]}]
        return answer

    def _prepared(self, sources: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Prepare the images and videos of a turn: those of the conversation as the encoder takes them, and as given.

        A processor that cuts a single image alone (LLaVA-OneVision) gets those of earlier turns again.
        """
        if not self.processor.whole_if_several:
            return [*self.shown, *self.processor.prepare(sources)], []
        every = [*self._sources, *(s if isinstance(s, Video) else open_image(s) for s in sources)]
        return (self.processor.prepare(every) if sources else self.shown), every


def shown_in(given: Any) -> list[Any]:
    """Return the images or videos of an argument: those of a list or another iterable, or the one that it is."""
    single = isinstance(given, (str, bytes, PathLike)) or hasattr(given, "shape") or hasattr(given, "read")
    return flat(given if single or not isinstance(given, Iterable) else list(given))


def _settled(options: dict[str, Any], longest: int | None) -> dict[str, Any]:
    """Add what the options of an answer leave open: greedy, and `LONGEST`.

    A checkpoint's own generation config may sample; answers of a chat are to be reproducible unless asked otherwise.

    Args:
        options: of `generate`.
        longest: tokens of the answer; None: as the options state it.

    Raises:
        ZooError: they ask for several answers.
    """
    config = options.get("generation_config")
    stated = options_of(config, options)
    if (count := stated.get("num_return_sequences", 1)) != 1:
        raise ZooError(f"A chat gives one answer; num_return_sequences={count} goes to model.generate.")
    more: dict[str, Any] = {} if longest is None else {"max_new_tokens": longest}
    if longest is None and not {"max_new_tokens", "max_length"} & stated.keys():
        more["max_new_tokens"] = LONGEST
    if "do_sample" not in stated:
        more["do_sample"] = stated.get("temperature") != 0 and any(name in stated for name in _DRAWN)
    if config is None:
        return options | more
    config = copy(config)  # transformers takes an object or keywords, not both
    for name, value in more.items():
        setattr(config, name, value)
    return options | {"generation_config": config}
