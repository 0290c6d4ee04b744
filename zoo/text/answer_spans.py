"""Find the answers in a rendered conversation, and the spans of them that are learned.

An answer begins where the prompt that asks for it ends, and ends after the text that closes its turn. Spans are taken
from the template's text, not from the contents of messages: a template may trim a content, strip thinking from it or
put an empty thought before it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from zoo.registry import ZooError
from zoo.text.chat_template import ChatTemplate, Messages, Span, mark, marked


class TurnChangedError(ZooError):
    """The text before an answer depends on later turns, so that it differs from the prompt that asks for the answer."""


@dataclass(frozen=True)
class Learnt:
    """A learned span of the text, in characters."""

    start: int
    end: int
    ended: bool  # whether it includes the end token or text of the answer


@dataclass(frozen=True)
class Answers:
    """A rendered conversation.

    Attributes:
        text: as the template writes it, with an end added after the last answer if it writes none.
        openings: start of each answer, where the prompt that asks for it ends.
        learnt: each answer with its end; or the spans that the template marks with `{% generation %}`.
    """

    text: str
    openings: list[int]
    learnt: list[Learnt]


@dataclass
class _Places:
    """Start of each answer and end of its content, by turn; trailing blanks of contents are excluded."""

    text: str
    starts: dict[int, int]
    stops: dict[int, int]
    blocks: list[Span] | None = None  # spans that the template marks as generated; None: it marks nothing


class AnswerFinder:
    """Finds answers in the text of a chat template.

    Args:
        template: of the tokenizer.
        verbatim: templates that write any content unchanged: the text that they write around contents is cached, which
            is several times as fast as rendering.
    """

    def __init__(self, template: ChatTemplate, verbatim: Collection[str] = ()) -> None:
        self.template, self.verbatim = template, verbatim
        self._shapes: dict[tuple[Any, ...], tuple[list[str], dict[int, str]] | None] = {}

    def openings(self, messages: Messages, text: str, sample_id: str = "") -> list[int]:
        """Return the starts of earlier answers in `text`, a prompt for another one."""
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        prompts = [self.template.render(messages[:i], True, sample_id) for i in asked]
        return [len(p) for p in prompts if text.startswith(p)]

    def find(self, messages: Messages, sample_id: str = "", only_last: bool = False) -> Answers:
        """Render a conversation and find its answers.

        Args:
            messages: role and content of each turn.
            sample_id: for messages.
            only_last: only the last answer is learned.

        Raises:
            TurnChangedError: the text before an answer differs from the prompt for it.
            ZooError: there is no answer, or one is empty; the template refuses the turns or does not show an answer.
        """
        asked = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if any(not messages[i]["content"].strip() for i in asked):
            raise ZooError(f"Sample {sample_id!r} has an empty answer.")
        if not asked:
            shown = self.template.render(messages, sample_id=sample_id)[:200]
            raise ZooError(f"Sample {sample_id!r} leaves nothing to learn: no assistant turn in {shown!r}.")
        places = self._remembered(messages) or self._places(messages, asked, sample_id, only_last)
        text = places.text
        learnt: list[Learnt] = []
        for i in asked[-1:] if only_last else asked:
            end = self.template.turn_end(text, places.stops[i])
            # Without an end, a model trained on the text would never stop; inside a conversation the next turn ends it.
            if end is None and i == len(messages) - 1:
                text, end = self._closed(text, places.stops[i], sample_id)
            learnt += _pieces(places, i, end, text)
        if not learnt:
            raise ZooError(
                f"Sample {sample_id!r} leaves nothing to learn: the chat template marks none of its answers with "
                f"{{% generation %}}: {text[:200]!r}."
            )
        return Answers(text, list(places.starts.values()), learnt)

    def _places(self, messages: Messages, asked: list[int], sample_id: str, only_last: bool) -> _Places:
        """Render the conversation, the prompt of each answer, and the conversation with marks after the answers."""
        text, blocks = self.template.render_marked(messages, sample_id=sample_id)
        stops = self._stops(messages, asked, text, sample_id)
        starts: dict[int, int] = {}
        for i in asked:
            # The start of an answer is the length of its prompt, if the whole conversation begins with that prompt.
            opening = self.template.render(messages[:i], True, sample_id)
            if text.startswith(opening) and len(opening) <= stops[i]:
                starts[i] = len(opening)
            elif not only_last or i == asked[-1]:  # earlier answers may change if they are not learned
                raise TurnChangedError(_changed(text, opening, i, sample_id, i == asked[-1]))
        for i, start in starts.items():
            if not text[start : stops[i]].strip():
                raise ZooError(
                    f"Sample {sample_id!r}: the chat template writes nothing of the answer "
                    f"{messages[i]['content'][:80]!r}, so there is nothing to learn."
                )
        return _Places(text, starts, stops, blocks)

    def _stops(self, messages: Messages, asked: list[int], text: str, sample_id: str) -> dict[int, int]:
        """Return the end of each answer's content in the text.

        The conversation is rendered once more with a mark after each answer. The text between marks is then located in
        the unmarked text, where blanks at the end of a content may be kept or trimmed.
        """
        contents = {i: messages[i]["content"] for i in asked}
        ends = [dict(m) for m in messages]
        for i in asked:
            # Trailing blanks are removed before the mark: templates that trim would trim them, and keep the mark.
            ends[i]["content"] = contents[i].rstrip() + mark(i)
        pieces, found = marked(self.template.render(ends, sample_id=sample_id))
        if found != asked:
            lost = next((contents[i] for i in asked if found.count(i) != 1), contents[asked[0]])
            raise ZooError(f"Sample {sample_id!r}: the chat template does not show the answer {lost[:80]!r}.")
        at, blank = 0, ""
        stops: dict[int, int] = {}
        for piece, number in zip(pieces, [*found, None], strict=True):
            if blank and text.startswith(blank + piece, at):  # kept by some templates, trimmed by others
                at += len(blank)
            if not text.startswith(piece, at):
                raise ZooError(
                    f"Sample {sample_id!r}: the chat template's text depends on how an answer ends, so the end of the "
                    f"answer cannot be located. It is about {text[max(0, at - 40) : at + 40]!r}."
                )
            at += len(piece)
            if number is not None:
                stops[number], blank = at, contents[number][len(contents[number].rstrip()) :]
        return stops

    def _remembered(self, messages: Messages) -> _Places | None:
        """Compose the text from cached literals of these roles; None if the template may change contents."""
        template = self.template.tokenizer.chat_template
        # Only for templates of ours: of others it is not known whether a content changes the text around it.
        if self.template.typed or not isinstance(template, str) or template not in self.verbatim:
            return None
        shape = (template, *[m["role"] for m in messages])
        if shape not in self._shapes:
            self._shapes[shape] = self._shape(shape[1:])
        known = self._shapes[shape]
        if known is None:
            return None
        literals, leads = known
        places = _Places(literals[0], {}, {})
        for i, (message, after) in enumerate(zip(messages, literals[1:], strict=True)):
            if i in leads:
                places.starts[i] = len(places.text) - len(leads[i])
                places.stops[i] = len(places.text) + len(message["content"].rstrip())
            places.text += message["content"] + after
        return places

    def _shape(self, roles: tuple[str, ...]) -> tuple[list[str], dict[int, str]] | None:
        """Return the texts around contents of turns with these roles, and the text between a prompt and its answer."""
        literals = self.template.around(roles)
        leads = {i: self.template.lead(roles[: i + 1]) for i, role in enumerate(roles) if role == "assistant"}
        known = {i: lead for i, lead in leads.items() if lead is not None}
        return (literals, known) if literals is not None and len(known) == len(leads) else None

    def _closed(self, text: str, stop: int, sample_id: str) -> tuple[str, int]:
        """Add an end after the last answer if the template writes none: that of other answers, or end-of-sequence.

        LLaVA's published templates write none: a model trained on them would unlearn to stop.
        """
        if text[stop:].strip():
            raise ZooError(
                f"Sample {sample_id!r}: the chat template writes {text[stop:][:80]!r} after the last answer, and other "
                f"answers end with {' or '.join(map(repr, self.template.ends))}: the end cannot be located."
            )
        # Without an end written anywhere, the first stated one: end-of-sequence.
        added = (self.template.closing.ends or self.template.ends)[0]
        return text[:stop] + added, stop + len(added)


def _pieces(places: _Places, turn: int, end: int | None, text: str) -> list[Learnt]:
    """Return the learned spans of an answer whose turn ends at `end`; None: the turn has no end token or text."""
    start, stop = places.starts[turn], places.stops[turn]
    last = stop if end is None else end
    if places.blocks is None:
        return [Learnt(start, last, end is not None)]
    found = [[max(a, start), b] for a, b in places.blocks if a < last and b > start]
    if found and not text[start : found[0][0]].strip():
        found[0][0] = start  # blanks between prompt and block: in generation the model must write them
    if found and found[-1][1] >= stop:  # the end is learned with the content, inside the block or not
        if end is None:  # further text in the block, after the content, is the answer's end
            last = end = stop + len(text[stop : found[-1][1]].rstrip())
        found[-1][1] = last
    return [Learnt(a, min(b, last), end is not None and b == end) for a, b in found if a < b]


def _changed(text: str, opening: str, turn: int, sample_id: str, last: bool) -> str:
    pairs = enumerate(zip(text, opening, strict=False))
    part = next((k for k, (a, b) in pairs if a != b), min(len(text), len(opening)))
    ways = "" if last else "give each answer a dialog of its own that shows all images in its first turn, "
    ways += "set variables of the template (tokenizer.template_options={enable_thinking: false}, if it has that one), "
    ways += "or choose another one with tokenizer.chat_template."
    return (
        f"Sample {sample_id!r}: the chat template renders turn {turn} differently with and without what follows: a "
        f"prompt that asks for it ends with {opening[-40:]!r}. They part at {text[max(0, part - 40) : part + 40]!r}. "
        f"{ways[0].upper()}{ways[1:]}"
    )
