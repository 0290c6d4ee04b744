"""Chat templates: the text of messages, and what is written around an answer.

A template is a program, so it is asked rather than read: rendered with marks in place of contents it shows what it
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
# Markers that the tokenizer need not know as one token, and words: what two literals have in common is told in these.
_ATOMS = r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]|\w+|\s+|."


def mark(number: int) -> str:
    """Give a content that can be found again: no template trims it or splits it."""
    return f"\x02{number}\x03"


def marked(text: str) -> tuple[list[str], list[int]]:
    """Split a text at its marks: what stands around them, and their numbers."""
    return _MARKS.split(text), [int(found[1:-1]) for found in _MARKS.findall(text)]


@dataclass(frozen=True)
class Closing:
    """What a template writes around an answer.

    Attributes:
        ends: behind it; several where that differs with what follows. Empty: nothing.
        lead: between the opening of an answer, which is part of the prompt, and the answer itself.
    """

    ends: tuple[str, ...] = ()
    lead: str = ""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        video_token: that stands where a video goes; None: there are no videos.
        stated: tokens that the model's checkpoint says end an answer: where a template writes nothing behind one, the
            token that begins the next question may do so (GLM 4).
    """

    def __init__(self, tokenizer: Any, video_token: str | None = None, stated: Sequence[str] = ()) -> None:
        self.tokenizer, self.video_token, self.stated = tokenizer, video_token, tuple(stated)
        self.typed = takes_parts(tokenizer)
        self._closings: dict[str, tuple[Closing, re.Pattern[str]]] = {}

    # ---- text ----------------------------------------------------------------------------------------------------

    def render(self, messages: Messages, opening: bool = False, sample_id: str = "") -> str:
        """Return the text of the messages, with the opening of an answer behind it if asked for.

        Raises:
            ZooError: the template refuses the messages; with its reason and the turns.
        """
        return self.render_marked(messages, opening, sample_id)[0]

    def render_marked(
        self, messages: Messages, opening: bool = False, sample_id: str = ""
    ) -> tuple[str, list[Span] | None]:
        """As `render`, with what stands in `{% generation %}`; None where the template has no such block."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages and not opening:
            return "", None
        template = self.tokenizer.get_chat_template()
        blocks = bool(GENERATION.search(template))
        try:
            with bounded():
                texts, spans = render_jinja_template(  # type: ignore[str-unpack]  # it says str, returns two lists
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
        """Messages as the template takes them."""
        if not self.typed:
            return [dict(m) for m in messages]
        return [{"role": m["role"], "content": self.parts(m["content"])} for m in messages]

    def parts(self, content: str) -> list[dict[str, str]]:
        """Content as typed parts: an image or a video where its token stands, text in between."""
        kinds = {getattr(self.tokenizer, "image_token", None): "image"}
        if self.shows_videos:
            kinds[self.video_token] = "video"
        tokens = "|".join(re.escape(token) for token in kinds if token)
        pieces = re.split(f"({tokens})", content) if tokens else [content]
        return [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]

    @cached_property
    def shows_videos(self) -> bool:
        """Whether the template writes a token for a video; else it stands in the text, as SmolVLM's template wants."""
        if not self.video_token:
            return False
        talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
        try:
            with bounded():
                return self.video_token in self.tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:  # a template may fail in any way on what it does not know
            return False

    # ---- around contents -----------------------------------------------------------------------------------------

    def around(self, roles: Sequence[str]) -> list[str] | None:
        """What is written before, between and behind the contents of such turns; None where one is not shown."""
        literals, found = marked(self.render(_talk(roles)))
        return literals if found == list(range(len(roles))) else None

    def lead(self, roles: Sequence[str]) -> str | None:
        """What stands between the opening of the last turn, an answer, and its content.

        None where the turn does not begin with what asks for it.
        """
        talk = _talk(roles)
        whole, opening = self.render(talk), self.render(talk[:-1], True)
        at = whole.find(talk[-1]["content"])
        return whole[len(opening) : at] if whole.startswith(opening) and len(opening) <= at else None

    @property
    def closing(self) -> Closing:
        """What is written around an answer, whatever that holds."""
        return self._closing[0]

    @property
    def ends(self) -> list[str]:
        """All that ends an answer: the end-of-sequence token, what the template writes behind one, what is stated."""
        return self._ended_by(self.closing)

    def _ended_by(self, closing: Closing) -> list[str]:
        eos = self.tokenizer.eos_token
        return list(_texts(eos or "", *closing.ends, *self.stated))

    def turn_end(self, text: str, at: int) -> int | None:
        """Where what ends an answer ends, if it stands at `at`, blanks before it or not; None: it does not."""
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
        """Compare what follows an answer at the end of a conversation and before another question.

        None where the template does not take one question and its answer, with the turns `before` them.
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
        except ZooError:  # it takes one question
            twice = None
        last = once[-1]
        if twice is None:
            return Closing(_texts(self._first(last)), lead)
        between = twice[len(roles)]
        if common := self._first(self._common(last, between)):
            return Closing((common,), lead)
        # The last answer ends in its own way. Others end with the token behind them if questions do not begin with it.
        follows = self._atoms.match(between.lstrip())
        token = follows.group() if follows and follows.group() in self.special else ""
        opens = token in twice[len(before)]
        return Closing(_texts(self._first(last), "" if opens else token), lead)

    @cached_property
    def special(self) -> frozenset[str]:
        """The tokenizer's added tokens: text becomes them whatever stands around it."""
        return frozenset(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip())

    @cached_property
    def _atoms(self) -> re.Pattern[str]:
        special = [re.escape(t) for t in sorted(self.special, key=len, reverse=True)]
        return re.compile("|".join([*special, _ATOMS]), re.DOTALL)

    def _common(self, one: str, other: str) -> str:
        """What two texts begin with alike, in whole tokens and words."""
        same = []
        for a, b in zip(self._atoms.findall(one), self._atoms.findall(other), strict=False):
            if a != b:
                break
            same.append(a)
        return "".join(same)

    def _first(self, text: str) -> str:
        """The first special token of a text with what stands before it, at which an answer ends; else all of it."""
        found = ""
        for atom in self._atoms.findall(text.strip()):
            found += atom
            if atom in self.special:
                break
        return found


@lru_cache(maxsize=32)
def variables_of(template: str) -> frozenset[str]:
    """Names that a template reads from outside."""
    from jinja2 import TemplateSyntaxError

    try:
        return names_in(template)
    except (RecursionError, TooMuchError) as error:
        raise ZooError(f"The chat template cannot be read: {error}.") from error
    except TemplateSyntaxError as error:
        raise ZooError(f"The chat template is no Jinja: {error.message}, in line {error.lineno}.") from error


def _talk(roles: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": mark(i)} for i, role in enumerate(roles)]


def _texts(*found: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f for f in found if f))


def takes_parts(tokenizer: Any, template: str | None = None) -> bool:
    """Whether a chat template wants typed parts, as those of vision-language models do, and shows images by itself.

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
    except Exception:  # a template may fail in any way on what it does not know
        return False
    return shown.count(image) == 1 and shown.count("\x02") == 1
