"""Convert the processor of a composed model to the equivalent one of transformers."""

from typing import Any

from zoo.published.family import Family
from zoo.published.prompts import tokenizer_of
from zoo.registry import ZooError
from zoo.vision.images.processors import as_clip


def their_processor(model: Any, processor: Any, known: Family) -> Any:
    """Convert our processor to the one of a published family.

    Raises:
        ZooError: there is no equivalent, with the reason.
    """
    import transformers

    from zoo.vision.images.processors import processor_of

    try:
        tokenizer = tokenizer_of(processor, known.tokens(model, processor))
        if processor.pictures is not None:
            images = processor_of(processor.pictures.config)
        elif model.layout is None:
            images = processor_of(as_clip(processor.transform))
        else:
            raise ZooError("its images were never cut, and the layout's are")
    except ZooError as error:
        raise ZooError(f"{known.model} has no place for the model: {error}.") from error
    more = known.processor_options(model, processor)
    if processor.videos is not None and "video_processor" not in more:
        more["video_processor"] = processor_of(processor.videos.config)
    try:
        theirs = getattr(transformers, known.processor)(
            image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **more
        )
    except ImportError as error:
        raise ZooError(f"The layout cannot be written: {' '.join(str(error).split())}") from error
    if len(theirs.tokenizer) > model.llm.vocab_size:
        raise ZooError(
            f"{known.processor} adds tokens to the tokenizer, {len(theirs.tokenizer)} in all, and the language model's "
            f"table has {model.llm.vocab_size} rows."
        )
    if theirs.image_token != processor.image_token:
        raise ZooError(f"{known.processor} calls an image {theirs.image_token!r}, the model {processor.image_token!r}.")
    return theirs
