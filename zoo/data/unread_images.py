"""Refuse data with images in a column that is not read: they would be learnt as text alone, without a word."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from zoo.data.image_store import ENDINGS, ImageStore
from zoo.data.records import IMAGE_COLUMNS
from zoo.registry import ZooError
from zoo.vision.images.video import VIDEOS

NAMED = {*(ending.lower() for ending in ENDINGS), ".gif", ".bmp", ".tif", ".tiff", *VIDEOS}  # endings of files


def require_seen(record: Mapping[str, Any], texts: Collection[str], store: ImageStore | None, where: str) -> None:
    """Refuse a record that holds an image, or names one of the store, in a column that is not read.

    One that has a column of images, which is empty there, is of text alone.

    Args:
        record: that shows no image.
        texts: columns that are read.
        store: of the images; None: names of files mean nothing.
        where: its place.

    Raises:
        ZooError: with the column, and how to read it.
    """
    if {*record} & {*IMAGE_COLUMNS}:
        return
    for column in [name for name in record if name not in texts]:
        value = record[column]
        for one in value if isinstance(value, list) else [value]:
            if what := _shown(one, store):
                raise ZooError(f"{where}: {column!r} {what}, {_instead(column)}")


def require_column(columns: Collection[str], images: Collection[str], where: str) -> None:
    """Refuse a table whose images are in none of the columns in which images are looked for.

    Args:
        columns: of the table.
        images: those that hold images.
        where: the table.

    Raises:
        ZooError: with the first column of images, and how to read it.
    """
    if images and not {*columns} & {*IMAGE_COLUMNS}:
        raise ZooError(f"{where}: {next(iter(images))!r} holds images, {_instead(next(iter(images)))}")


def _shown(value: Any, store: ImageStore | None) -> str:
    """Say which image a value is or names; empty: none."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return "holds an image"
    ending = PurePath(value).suffix.lower() if isinstance(value, str) else ""
    if store is not None and ending in NAMED:
        with suppress(ZooError):
            store.find(value, "")
            return f"names the {'video' if ending in VIDEOS else 'image'} {value!r}"
    return ""


def _instead(column: str) -> str:
    read = " or ".join(IMAGE_COLUMNS)
    return f"and images are read of {read}. Set image_field={column}; or check=false to train on text alone."
