"""From records to dialogs: LLaVA's `conversations`, chat `messages`, or columns of question and answer.

`<image>` in the text of a user or system turn marks where an image goes. The rules are:

- as many marks as images: each takes the next image; blanks around a mark at the edge of a turn are removed, since the
  chat template writes its own;
- `<video>` is such a mark, too, in a record that shows a video (a file of such a name);
- images but no mark: they are put before the first user turn, in order;
- a turn as a list of parts with images defines their places: its texts are taken literally, `<image>` too;
- anything else is an error that names the record, as is a mark in an assistant turn.

Texts may be texts, numbers or booleans; other values (an object, NaN, null in a list) are errors, and never converted
to their Python representation. Braces in a column are not columns of the prompt, and control tokens in a text are
letters (`zoo.text.plain_text`): `</s>` in a question ends nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from math import isfinite
from pathlib import PurePath
from string import Formatter
from typing import Any

from zoo.registry import Dialog, ZooError, unknown
from zoo.vision.images.decode import base64_bytes, data_url_bytes
from zoo.vision.images.video import VIDEOS

MARK, FILM = "<image>", "<video>"
FORMATS = ("auto", "conversations", "messages", "columns")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
}
IMAGE_PARTS = ("image", "image_url")
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how JPEG, PNG, GIF and WebP begin in it
IMAGE_COLUMNS = ("image", "images")  # used if no column is named


@dataclass
class RecordFields:
    """Names of the columns of a record."""

    format: str = "auto"  # conversations (LLaVA) | messages | columns (question and answer) | auto: what the record has
    turns_field: str = ""  # list of turns; empty: conversations or messages
    image_field: str = ""  # name of an image, or a list of names; empty: image or images
    question_field: str = "question"  # text of the question
    answer_field: str = "answer"  # a text or number, or a list of all accepted answers
    choices_field: str = ""  # list of options for multiple choice; empty: none
    id_field: str = ""  # empty: id, qid or question_id, else the place in the file
    kind_field: str = ""  # row of the score table, such as answer_type; empty: the data set's name
    task_field: str = ""  # name of the task that scores the record; empty: `task`
    task: str = ""  # name of the task that scores all records; empty: the one asked for
    prompt: str = "{question}"  # text of the user turn; braces take any column of the record
    system: str = ""  # system turn put before dialogs that have none
    meta_fields: list[str] = field(default_factory=list)  # columns written beside predictions

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown("format of records", self.format, FORMATS)
        for name in _columns_of(self.prompt):
            if not name.isidentifier():
                raise ZooError(f"prompt takes columns by name, as in '{{question}}'; got {{{name}}}.")

    @property
    def named(self) -> list[str]:
        """The columns that a person has named, or that the prompt takes: a record has to have them."""
        own = [self.id_field, self.image_field, self.choices_field, self.kind_field, self.task_field, *self.meta_fields]
        return [*filter(None, own), *(name for name in _columns_of(self.prompt) if name != "question")]


def _columns_of(prompt: str) -> list[str]:
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise ZooError(f"prompt {prompt!r} cannot be read: {error}. Write {{{{ for a brace.") from None
    if any(spec or conversion for _, name, spec, conversion in parts if name is not None):
        raise ZooError(f"prompt {prompt!r} must name columns only, with no format behind ':' or '!'.")
    return [name for _, name, _, _ in parts if name is not None]


def read_record(record: Mapping[str, Any], fields: RecordFields, where: str) -> tuple[list[Any], Dialog]:
    """Return the images of a record, by their names in it, and its dialog.

    Raises:
        ZooError: a column is missing or wrong; the message begins with `where`.
    """
    images = images_of(record, fields, where)
    _column(record, fields.id_field, where)
    turns_field = _turns_field(record, fields, where)
    answers: list[str] = []
    if turns_field:
        messages, images = read_turns(record[turns_field], images, f"{where}, {turns_field}")
    else:
        messages, answers = _question(record, fields, where, shows_video(images))
    if fields.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": fields.system}]})
    place_images(messages, len(images), where)
    if messages[-1]["role"] != "assistant":
        raise ZooError(f"{where}: the last turn is from the {messages[-1]['role']}; the assistant must have it.")
    return images, Dialog(
        messages,
        kind=_text(record, fields.kind_field, where),
        task=_text(record, fields.task_field, where) or fields.task,
        answers=answers,
        choices=_choices(_column(record, fields.choices_field, where), f"{where}, {fields.choices_field}"),
        meta={name: _plain(_column(record, name, where), f"{where}, {name}") for name in fields.meta_fields},
    )


def record_id(record: Mapping[str, Any], fields: RecordFields) -> str:
    """Return the id of a record, or an empty text."""
    for name in [fields.id_field] if fields.id_field else ["id", "qid", "question_id"]:
        if record.get(name) is not None:
            return str(record[name])
    return ""


def place_images(messages: list[dict[str, Any]], num_images: int, where: str) -> None:
    """Check the image parts of `messages` against the number of images; without parts, put all images first.

    Raises:
        ZooError: the counts differ.
    """
    marks = sum(_marks(message["content"]) for message in messages)
    if marks == 0 and num_images:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ZooError(f"{where}: there is no user turn to put the image into.")
        first["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif marks != num_images:
        raise ZooError(
            f"{where}: {marks} {MARK} for {num_images} image{'s' * (num_images != 1)}. Write one {MARK} per image, or "
            "none to put the images first."
        )


def shared_head(dialog: Dialog) -> str | None:
    """Return the dialog up to its last image; None without an image, or with one after an answer.

    Dialogs with the same head can share it as a prefix, so that the images are encoded once.
    """
    images = [(n, m) for n, message in enumerate(dialog.messages) for m in range(_marks(message["content"]))]
    if not images:
        return None
    head = dialog.messages[: images[-1][0] + 1]
    if any(message["role"] == "assistant" for message in head):
        return None
    last = max(n for n, part in enumerate(head[-1]["content"]) if part["type"] == "image")
    return repr([*head[:-1], head[-1]["content"][: last + 1]])


def shows_video(images: Sequence[Any]) -> bool:
    """Whether one of the images is named as a video, so that `<video>` marks its place."""
    return any(isinstance(image, str) and PurePath(image).suffix.lower() in VIDEOS for image in images)


def split_marks(text: str, film: bool = False) -> list[dict[str, Any]]:
    """Cut a text at each `<image>` into text and image parts; with `film` at each `<video>`, too."""
    text = text.replace(FILM, MARK) if film else text
    if MARK not in text:
        return [{"type": "text", "text": text}]
    pieces = text.split(MARK)
    said = [number for number, piece in enumerate(pieces) if piece.strip()]
    if said and said[0] > 0:
        pieces[said[0]] = pieces[said[0]].lstrip()
    if said and said[-1] < len(pieces) - 1:
        pieces[said[-1]] = pieces[said[-1]].rstrip()
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if number in said else []
    return parts


def _turns_field(record: Mapping[str, Any], fields: RecordFields, where: str) -> str:
    """Return the column with the turns; empty where the record is made of columns."""
    if fields.format == "columns":
        return ""
    if fields.turns_field:
        wanted = [fields.turns_field]
    else:
        wanted = ["conversations", "messages"] if fields.format == "auto" else [fields.format]
    for name in wanted:
        if record.get(name) is not None:
            return name
    if fields.format == "auto" and not fields.turns_field and fields.question_field in record:
        return ""
    allowed = [*wanted, fields.question_field] if fields.format == "auto" else wanted
    raise ZooError(f"{where} has none of {', '.join(map(repr, allowed))}; its fields are {', '.join(sorted(record))}.")


def images_of(record: Mapping[str, Any], fields: RecordFields, where: str) -> list[Any]:
    if fields.image_field:
        value = _column(record, fields.image_field, where)
    else:
        value = next((record[name] for name in IMAGE_COLUMNS if record.get(name) is not None), None)
    if value is None or (isinstance(value, str) and value == ""):
        return []
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    for image in images:
        if image is None or isinstance(image, (bool, int, float, list)):
            raise ZooError(f"{where}: an image is named by a text, got {_shown(image)}.")
    return images


def read_turns(turns: Any, images: list[Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Read LLaVA or chat turns, mixed as they come; parts with an image of their own put it among the images."""
    turns = as_rows(turns)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ZooError(f"{where}: a list of turns is needed, got {type(turns).__name__} {str(turns)[:40]!r}.")
    queue, film = list(images), shows_video(images)
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, 1):
        at = f"{where}, turn {number}"
        if not isinstance(turn, Mapping):
            raise ZooError(f"{at} is a {type(turn).__name__}; `from` and `value`, or `role` and `content`, are needed.")
        speaker, content = stated(turn, "from", "role"), stated(turn, "value", "content")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ZooError(f"{at}: {unknown('speaker', str(speaker), ROLES)}")
        if calls := next((key for key in ("tool_calls", "function_call") if turn.get(key)), None):
            raise ZooError(f"{at} has {calls!r}, which would be lost: models here answer in text.")
        parts: list[dict[str, Any]] = []
        for part in _parts(content, at, film):
            if "source" in part:
                queue.insert(sum(_marks(m["content"]) for m in messages) + _marks(parts), part["source"])
            parts.append({key: value for key, value in part.items() if key != "source"})
        if ROLES[speaker] == "assistant" and _marks(parts):
            raise ZooError(f"{at}: an assistant turn cannot have {MARK}; images belong to the user's turns.")
        messages.append({"role": ROLES[speaker], "content": parts})
    return messages, queue


def as_rows(value: Any) -> Any:
    """Return the list of mappings that a mapping of equally long lists is, as tables of older libraries hold one."""
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if columns and all(isinstance(c, (list, tuple)) and len(c) == len(columns[0]) for c in columns):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def stated(turn: Mapping[str, Any], *names: str) -> Any:
    """Return the first of these fields that is there and not null: tables give every turn the fields of all."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _marks(parts: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for part in parts)


def _parts(content: Any, where: str, film: bool = False) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return split_marks(content, film)
    if not isinstance(content, Sequence):
        raise ZooError(f"{where}: a text or a list of parts is needed, got {type(content).__name__}.")
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    shows = any(kind in IMAGE_PARTS for kind in kinds)  # then `<image>` in texts is taken literally
    parts: list[dict[str, Any]] = []
    for part, kind in zip(content, kinds, strict=True):
        if isinstance(part, str) or kind == "text":
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):
                raise ZooError(f"{where}: the text of a part is {_shown(text)}.")
            parts += [{"type": "text", "text": text}] if shows else split_marks(text, film)
        elif kind in IMAGE_PARTS:
            source = next((part[k] for k in ("image", "image_url", "path", "url") if part.get(k)), None)
            source = source.get("url") if isinstance(source, Mapping) and "url" in source else source
            parts.append({"type": "image"} if source is None else {"type": "image", "source": source})
        else:
            raise ZooError(f"{where}: {unknown('part of a message', str(kind), ['text', 'image', 'image_url'])}")
    return parts


def _question(
    record: Mapping[str, Any], fields: RecordFields, where: str, film: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Make the two turns of a question and its answer; a list of answers keeps them all and trains on the commonest."""
    columns = {
        name: _text(record, fields.question_field if name == "question" else name, where)
        for name in _columns_of(fields.prompt)
    }
    answer = as_rows(_column(record, fields.answer_field, where))
    answers = []
    if isinstance(answer, (list, tuple)):
        given = [a["answer"] if isinstance(a, Mapping) and "answer" in a else a for a in answer]
        answers = [_as_text(a, f"{where}, {fields.answer_field}") for a in given]
        answer = next(iter(Counter(a for a in answers if a.strip()).most_common(1)), (None,))[0]
    answer = None if answer is None else _as_text(answer, f"{where}, {fields.answer_field}")
    if answer is None or answer.strip() == "":
        raise ZooError(f"{where}: {fields.answer_field!r} is empty, so there is nothing to learn or to compare with.")
    question = fields.prompt.format(**columns)
    return [
        {"role": "user", "content": split_marks(question, film)},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ], answers


def _column(record: Mapping[str, Any], name: str, where: str) -> Any:
    if not name:
        return None
    if name not in record:
        raise ZooError(f"{where}: {unknown('field', name, map(str, record))}")
    if isinstance(value := record[name], float) and not isfinite(value):
        raise ZooError(f"{where}: {name!r} is {_shown(value)}. Write null where there is nothing.")
    return value


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = _column(record, name, where)
    if isinstance(value, (list, tuple)):
        return ",".join(_as_text(v, f"{where}, {name}") for v in value)
    return "" if value is None else _as_text(value, f"{where}, {name}")


def _choices(value: Any, where: str) -> list[str]:
    value = as_rows(value)
    if value is not None and not isinstance(value, (list, tuple)):
        raise ZooError(f"{where}: a list of options is needed, got {_shown(value)}.")
    texts = [c["text"] if isinstance(c, Mapping) and "text" in c else c for c in value or []]
    return [_as_text(text, where) for text in texts]


def _as_text(value: Any, where: str) -> str:
    """Convert a text, number or boolean to a text."""
    if value is None or isinstance(value, (Mapping, list, tuple, bytes)):
        raise ZooError(f"{where}: a text is needed, got {_shown(value)}.")
    if isinstance(value, float) and not isfinite(value):
        raise ZooError(f"{where}: a text is needed, got {_shown(value)}.")
    if isinstance(value, datetime) and value.time() == time():  # the library makes times of dates: 2020-01-31
        return str(value.date())
    return str(value)


def _plain(value: Any, where: str) -> Any:
    """Return a value as JSON holds it, since predictions are written with it: a date becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one, where) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    return value if value is None or isinstance(value, (str, int, float)) else _as_text(value, where)


def _shown(value: Any) -> str:
    """Format a value for a message."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def inline_image(name: str, where: str) -> bytes | None:
    """Return the bytes of a `data:` address, or of an image in base64 without one; None for any other name.

    Raises:
        ZooError: the address, or the base64, is broken.
    """
    bare = name.startswith(BASE64) and "." not in name  # a file's name has an ending
    if not (bare or name.startswith("data:")):
        return None
    try:
        return base64_bytes(name) if bare else data_url_bytes(name)
    except ValueError as error:
        shown = name[:40] if bare else name.partition(",")[0][:40]
        raise ZooError(f"{where}: the image in {shown!r} cannot be read: {error}") from None
