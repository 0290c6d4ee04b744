"""A chat with a model: turns of a conversation, with images and videos in any of them."""

from collections.abc import Callable, Iterable
from typing import Any

from zoo.registry import Dialog, Sample, ZooError
from zoo.text.stops import reader_for, streamer
from zoo.vision.images.video import Video, as_video


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
        if system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    def say(
        self,
        text: str,
        images: Iterable[Any] = (),
        videos: Iterable[Any] = (),
        *,
        stream: Callable[[str], None] | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> str:
        """Add a turn of the user, with images and videos, and return the answer.

        Args:
            text: the question.
            images: paths, PIL images, arrays or bytes.
            videos: paths, or `zoo.vision.images.video.Video`s.
            stream: is called with each piece of the answer as soon as it is generated.
            max_new_tokens: the longest answer.
            options: further ones of `generate`; greedy by default.

        Raises:
            ZooError: `text` is something else, such as a list of messages.
        """
        if not isinstance(text, str):
            raise ZooError(
                f"A chat takes the question as a text, got {type(text).__name__}. Images go beside it (images=), "
                "and zoo.composed.chat_session.Talk keeps earlier turns. Messages go through "
                "processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True), "
                "and their output to model.generate."
            )
        films = [as_video(v) for v in videos]
        sources = [*images, *films]
        content = [{"type": "video" if isinstance(s, Video) else "image"} for s in sources]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        shown = [*self.shown, *self.processor.prepare(sources)]
        messages = [*self.messages, turn]
        row = self.processor.encode_prompt(
            Sample("chat", [None] * len(shown), []), Dialog(messages), pixel_values=list(shown)
        )
        batch = self.processor.collate([row], padding_side="left")
        given = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in batch}
        given = {k: v.to(self.model.device) for k, v in given.items()}
        given |= {k: batch[k] for k in ("cuts", "images_per_row", "questions") if k in batch}
        # A checkpoint's generation_config may sample; answers of a chat are to be reproducible unless asked otherwise.
        if "do_sample" not in options and not options.get("temperature"):
            options["do_sample"] = False
        reader = reader_for(self.model, self.processor.template)
        if stream is not None:
            options["streamer"] = streamer(reader, stream)
        if self.model.generation_config.stop_strings:
            options.setdefault("tokenizer", self.processor.tokenizer)
        out = self.model.generate(**given, max_new_tokens=max_new_tokens, **options)
        answer = reader.read(out[0, row.input_ids.shape[0] :].tolist())
        self.shown = shown  # only now: a refused turn leaves the conversation as it was
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer or "..."}]}]
        return answer
