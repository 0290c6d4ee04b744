"""Tokenizer and processor of a published model, from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.published import family_of
from zoo.published.folder import pixels_of, processor_values, read_content
from zoo.registry import ZooError
from zoo.registry.foreign import read_text
from zoo.text.tokenizer import fit_tokenizer
from zoo.text.tokenizer_files import TEMPLATE, read_tokenizer


def tokenizer_in(folder: Path, template: str = "") -> Any:
    """Load the tokenizer, with the chat template of the processor and the image token of the config."""
    from zoo.published.family import parse

    hf = parse(read_content(folder), f"{folder}/config.json")
    tokenizer = read_tokenizer(str(folder))
    stated = chat_template_in(folder)
    if stated:
        tokenizer.chat_template = stated
    token = tokenizer.convert_ids_to_tokens(hf.image_token_id)
    if token is None:
        raise ZooError(f"{folder}/config.json names the image token {hf.image_token_id}, which its tokenizer lacks.")
    tokenizer.image_token = token
    return fit_tokenizer(tokenizer, str(folder), template)


def chat_template_in(folder: Path) -> str | None:
    """Return the chat template of a processor, from the file that transformers takes where there are several."""
    for name in ("processor_config.json", "chat_template.json"):  # older ones go first
        found = read_content(folder, name).get("chat_template")
        if isinstance(found, str):
            return found
    file = folder / "chat_template.jinja"
    return read_text(file, TEMPLATE) if file.is_file() else None


def pictures_in(folder: Path) -> Mapping[str, Any] | None:
    """Return the values of the image processor, with the family's options of its call."""
    stated = pixels_of(folder)
    if not stated:
        return None
    known = family_of(read_content(folder), f"{folder}/config.json")
    more: dict[str, Any] = {"call": dict(known.call)} if known.call else {}
    return {**stated, **more, **({"whole_if_several": True} if known.whole_if_several else {})}


def video_token_id_in(folder: Path) -> int | None:
    """Return the placeholder of videos, if the family has one."""
    from zoo.published.family import parse

    content = read_content(folder)
    if not family_of(content, f"{folder}/config.json").videos:
        return None  # some configs number one that no processor writes
    return getattr(parse(content, f"{folder}/config.json"), "video_token_id", None)


def video_token_in(folder: Path, tokenizer: Any) -> str | None:
    """Return the placeholder of a video in texts; None if the family takes no videos, or uses the image's token."""
    number = video_token_id_in(folder)
    if number is not None:
        return tokenizer.convert_ids_to_tokens(number)
    known = family_of(read_content(folder), f"{folder}/config.json")
    return getattr(tokenizer, "video_token", None) or known.video_token


def videos_in(folder: Path) -> dict[str, Any] | None:
    """Return the values of a published folder's video processor, if the family takes videos."""
    known = family_of(read_content(folder), f"{folder}/config.json")
    if not known.videos:
        return None
    # Older repositories have one file for images and videos.
    files = "video_preprocessor_config.json", "preprocessor_config.json"
    stated = processor_values(folder, "video_processor", *files)
    stated.pop("image_processor_type", None)
    kind = known.video_processor or known.model.replace("ForConditionalGeneration", "VideoProcessor")
    named = {"video_processor_type": kind}
    return {**named, **stated} if stated else None
