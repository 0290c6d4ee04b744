"""Chat templates: rendering of messages, and the texts written around an answer.

A template is a program, so it is run rather than parsed: rendered with marks as contents, it shows the text that it
writes around them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from zoo.registry import ZooError, one_line
from zoo.text.chat_sandbox import TooMuchError, bounded, names_in

Messages = Sequence[Mapping[str, str]]  # role and content, both plain text
Span = tuple[int, int]  # [start, end) in characters

_MARKS = re.compile("\x02\\d+\x03")
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a block that transformers adds to the language
# Markers (a single token or not), words, blanks, characters: units for the common beginning of two texts.
_ATOMS = r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|\w+|\s+|."


def mark(number: int) -> str:
    """Return a content that can be found in rendered text: templates neither trim nor split it."""
    return f"\x02{number}\x03"


def marked(text: str) -> tuple[list[str], list[int]]:
    """Split a text at its marks: the pieces around them, and their numbers."""
    return _MARKS.split(text), [int(found[1:-1]) for found in _MARKS.findall(text)]


@dataclass(frozen=True)
class Closing:
    """Texts that a template writes around an answer.

    Attributes:
        ends: after it; several if they depend on what follows. Empty: none.
        lead: between the opening of an answer, which belongs to the prompt, and the answer.
    """

    ends: tuple[str, ...] = ()
    lead: str = ""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        video_token: placeholder of a video; None: there are no videos.
        stated: end tokens stated by the model's checkpoint: if a template writes nothing after an answer, the token
            that begins the next question may end it (GLM 4).
    """

    def __init__(self, tokenizer: Any, video_token: str | None = None, stated: Sequence[str] = ()) -> None:
        self.tokenizer, self.video_token, self.stated = tokenizer, video_token, tuple(stated)
        self.typed = takes_parts(tokenizer)
        self._closings: dict[str, tuple[Closing, re.Pattern[str]]] = {}

    # ---- text ----------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, opening: bool = False, sample_id: str = "") -> str:
        """Return the text of the messages; with `opening`, a prompt for another answer.

        Raises:
            ZooError: the template refuses the messages; with its reason and the turns.
        """
        return self.render_marked(messages, opening, sample_id)[0]

    def render_marked(
        self, messages: Messages, opening: bool = False, sample_id: str = ""
    ) -> tuple[str, list[Span] | None]:
        """As `render`, with the spans of `{% generation %}` blocks; None if the template has no such block."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages and not opening:
            return "", None
        template = self.tokenizer.get_chat_template()
        blocks = bool(GENERATION.search(template))
        try:
            with bounded():
                texts, spans = render_jinja_template(  # type: ignore[str-unpack]  # annotated as str, returns two lists
                    conversations=[self.shown(messages)],
                    chat_template=template,
                    add_generation_prompt=opening,
                    return_assistant_tokens_mask=blocks,
                    **self.tokenizer.special_tokens_map,
                )
        except Exception as error:  # a template is a program of others and may fail in any way
            raise ZooError(self._refusal(messages, opening, error, sample_id)) from error
        return texts[0], list(spans[0]) if blocks else None  # type: ignore[arg-type]

    def _refusal(self, messages: Messages, opening: bool, error: Exception, sample_id: str) -> str:
        roles = [m["role"] for m in messages]
        whose = f"Sample {sample_id!r}: the" if sample_id else "The"
        reason = one_line(error).rstrip(".")
        text = f"{whose} chat template refuses the turns [{', '.join(roles)}]: {reason}."
        if "system" in roles:
            try:
                self.render([m for m in messages if m["role"] != "system"], opening)
            except ZooError:
                pass
            else:
                return text + " It takes no system turn: put that text before the first question."
        return text + " Change the turns, or choose another template with tokenizer.chat_template."

    def shown(self, messages: Messages) -> list[dict[str, Any]]:
        """Convert messages to the form that the template takes."""
        if not self.typed:
            return [dict(m) for m in messages]
        return [{"role": m["role"], "content": self.parts(m["content"])} for m in messages]

    def parts(self, content: str) -> list[dict[str, str]]:
        """Convert content to typed parts: an image or a video for each of their tokens, text in between."""
        kinds = {getattr(self.tokenizer, "image_token", None): "image"}
        if self.shows_videos:
            kinds[self.video_token] = "video"
        tokens = "|".join(re.escape(token) for token in kinds if token)
        pieces = re.split(f"({tokens})", content) if tokens else [content]
        return [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]

    @cached_property
    def shows_videos(self) -> bool:
        """Whether the template writes the token of a video; SmolVLM's, for one, expects it in the text."""
        if not self.video_token:
            return False
        talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
        try:
            with bounded():
                return self.video_token in self.tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:  # a template may fail in any way on parts that it does not support
            return False

    # ---- around contents -----------------------------------------------------------------------------------------

    def around(self, roles: Sequence[str]) -> list[str] | None:
        """Return the texts before, between and after the contents of turns; None if a content is not written."""
        literals, found = marked(self.render(_talk(roles)))
        return literals if found == list(range(len(roles))) else None

    def lead(self, roles: Sequence[str]) -> str | None:
        """Return the text between the opening of the last turn, an answer, and its content.

        None if the conversation does not begin with the prompt for that turn.
        """
        talk = _talk(roles)
        whole, opening = self.render(talk), self.render(talk[:-1], True)
        at = whole.find(talk[-1]["content"])
        return whole[len(opening) : at] if whole.startswith(opening) and len(opening) <= at else None

    @property
    def closing(self) -> Closing:
        """Texts that the template writes around an answer."""
        return self._closing[0]

    @property
    def ends(self) -> list[str]:
        """All ends of answers: the end-of-sequence token, those that the template writes, those that are stated."""
        return self._ended_by(self.closing)

    def _ended_by(self, closing: Closing) -> list[str]:
        eos = self.tokenizer.eos_token
        return list(_texts(eos or "", *closing.ends, *self.stated))

    def turn_end(self, text: str, at: int) -> int | None:
        """Return where an end of an answer ends, if there is one at `at`, blanks before it allowed; else None."""
        found = self._closing[1].match(text, at)
        return found.end() if found else None

    @property
    def _closing(self) -> tuple[Closing, re.Pattern[str]]:
        template = self.tokenizer.chat_template
        key = template if isinstance(template, str) else repr(template)
        if key not in self._closings:
            closing = self._find_closing() or self._find_closing("system") or Closing()
            known = "|".join(re.escape(end) for end in sorted(self._ended_by(closing), key=len, reverse=True))
            self._closings[key] = closing, re.compile(rf"\s*(?:{known})" if known else "(?!)")
        return self._closings[key]

    def _find_closing(self, *before: str) -> Closing | None:
        """Compare the text after an answer at the end of a conversation and before another question.

        None if the template refuses one question with its answer after the turns `before`.
        """
        roles = (*before, "user", "assistant")
        try:
            once, lead = self.around(roles), self.lead(roles) or ""
        except ZooError:
            return None
        if once is None:
            return None
        try:
            twice = self.around((*roles, "user", "assistant"))
        except ZooError:  # the template takes a single question
            twice = None
        last = once[-1]
        if twice is None:
            return Closing(_texts(self._first(last)), lead)
        between = twice[len(roles)]
        if common := self._first(self._common(last, between)):
            return Closing((common,), lead)
        # The last answer has an end of its own. Others end with the next token, unless questions begin with it.
        follows = self._atoms.match(between.lstrip())
        token = follows.group() if follows and follows.group() in self.special else ""
        opens = token in twice[len(before)]
        return Closing(_texts(self._first(last), "" if opens else token), lead)

    @cached_property
    def special(self) -> frozenset[str]:
        """The tokenizer's added tokens, which are recognised in any text around them."""
        return frozenset(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip())

    @cached_property
    def _atoms(self) -> re.Pattern[str]:
        special = [re.escape(t) for t in sorted(self.special, key=len, reverse=True)]
        return re.compile("|".join([*special, _ATOMS]), re.DOTALL)

    def _common(self, one: str, other: str) -> str:
        """Return the common beginning of two texts, in whole tokens and words."""
        same = []
        for a, b in zip(self._atoms.findall(one), self._atoms.findall(other), strict=False):
            if a != b:
                break
            same.append(a)
        return "".join(same)

    def _first(self, text: str) -> str:
        """Return a text up to its first special token, at which an answer ends; without one, the whole text."""
        found = ""
        for atom in self._atoms.findall(text.strip()):
            found += atom
            if atom in self.special:
                break
        return found


@lru_cache(maxsize=32)
def variables_of(template: str) -> frozenset[str]:
    """Names of the variables that a template takes."""
    from jinja2 import TemplateSyntaxError

    try:
        return names_in(template)
    except (RecursionError, TooMuchError) as error:
        raise ZooError(f"The chat template cannot be read: {error}.") from error
    except TemplateSyntaxError as error:
        raise ZooError(f"The chat template is not Jinja: {error.message}, in line {error.lineno}.") from error


def _talk(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": mark(i)} for i, role in enumerate(roles)]


def _texts(*found: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f for f in found if f))


def takes_parts(tokenizer: Any, template: str | None = None) -> bool:
    """Whether a chat template takes typed parts, as those of vision-language models do, and writes image tokens.

    Args:
        tokenizer: with the token of images.
        template: None: the tokenizer's own.
    """
    image = getattr(tokenizer, "image_token", None)
    template = tokenizer.chat_template if template is None else template
    if not image or not template or not isinstance(template, str):
        return False
    content = [{"type": "image"}, {"type": "text", "text": "\x02"}]
    try:
        talk = [{"role": "user", "content": content}]
        with bounded():
            shown = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)
    except Exception:  # a template may fail in any way on parts that it does not support
        return False
    return shown.count(image) == 1 and shown.count("\x02") == 1
