"""Chat messages to tokens and labels, through any chat template; nothing is masked in silence.

Rendering a template and tokenizing take longer than a small training step can spare, so both are remembered in
pieces: the text that a template puts around contents, and the tokens between special tokens. Where a template or a
tokenizer does not allow it, the text is rendered and tokenized whole.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from zoo.registry import IGNORE_INDEX, ZooError

Messages = Sequence[dict[str, str]]  # role and content, both plain text

_CACHE = 200_000  # pieces of text whose tokens are remembered


class Chat:
    """The chat template and the tokenizer of a model.

    Args:
        tokenizer: of transformers, with a chat template and an end-of-sequence token.
        video_token: that stands where a video goes; None: there are no videos.
    """

    def __init__(self, tokenizer: Any, video_token: str | None = None) -> None:
        self.video_token = video_token
        self.tokenizer = tokenizer
        self.typed = takes_parts(tokenizer)
        self._segments: dict[str, tuple[list[int], list[int]]] = {}
        self._literals: dict[tuple[str, ...], list[str] | None] = {}

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Return the text of the messages, with the opening of an answer behind it if asked for."""
        if not messages and not add_generation_prompt:
            return ""
        return self.tokenizer.apply_chat_template(
            self.shown(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def shown(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages as the template takes them."""
        if not self.typed:
            return [dict(m) for m in messages]
        return [{"role": m["role"], "content": self._parts(m["content"])} for m in messages]

    def _parts(self, content: str) -> list[dict[str, str]]:
        """Content as typed parts: an image or a video where its token stands, text in between."""
        kinds = {getattr(self.tokenizer, "image_token", None): "image"}
        if self._shows_videos:
            kinds[self.video_token] = "video"
        marks = "|".join(re.escape(token) for token in kinds if token)
        pieces = re.split(f"({marks})", content) if marks else [content]
        return [{"type": kinds[p]} if p in kinds else {"type": "text", "text": p} for p in pieces if p]

    @cached_property
    def _shows_videos(self) -> bool:
        """Whether the template writes a token for a video; else it stands in the text, as SmolVLM's template wants."""
        if not self.video_token:
            return False
        talk = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "a"}]}]
        try:
            return self.video_token in self.tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:  # a template may fail in any way on what it does not know
            return False

    def labelled(self, messages: Messages, sample_id: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a conversation; labels are the answers, each with the token that ends it.

        Returns:
            Token ids and labels, both (T,) int64; IGNORE_INDEX where nothing is learnt.

        Raises:
            ZooError: there is no answer, one is empty, or the template or the tokenizer leaves no clear border before
                it; the message shows the text and where it broke.
        """
        text, spans = self._stopping(*self._answers(messages, sample_id))
        ids, ends = self.tokenize(text)
        tokens, stops = np.array(ids, dtype=np.int64), np.array(ends)
        starts = np.array([0, *ends[:-1]])
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        for start, end in spans:
            inside = (stops > start) & (starts < end)
            if not inside.any() or starts[inside.argmax()] < start:
                where = f"{text[max(0, start - 40) : start]} >>> {text[start : start + 40]}"
                raise ZooError(
                    f"Sample {sample_id!r}: a token runs across the border between question and answer, so the answer "
                    f"cannot be learnt cleanly. The border is at >>>: {where!r}."
                )
            labels[inside] = tokens[inside]
        if not spans:
            raise ZooError(f"Sample {sample_id!r} leaves nothing to learn: no assistant turn in {text[:200]!r}.")
        return tokens, labels

    # ---- where answers stand -----------------------------------------------------------------------------------

    def _answers(self, messages: Messages, sample_id: str) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and the [start, end) of each answer up to and with the token that ends it."""
        if any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
            raise ZooError(f"Sample {sample_id!r} has an empty answer.")
        literals = self._around(tuple(m["role"] for m in messages))
        if literals is None or any(m["content"] != m["content"].strip() for m in messages):
            return self._search(messages, sample_id)
        text, starts = literals[0], []
        for message, after in zip(messages, literals[1:], strict=True):
            starts.append(len(text))
            text += message["content"] + after
        spans = [
            (start, self._turn_end(text, start + len(m["content"])))
            for start, m in zip(starts, messages, strict=True)
            if m["role"] == "assistant"
        ]
        return text, spans

    def _around(self, roles: tuple[str, ...]) -> list[str] | None:
        """What the template writes before, between and behind the contents of such messages.

        None if it does not take contents as they are, or if its answers do not start where generation would.
        """
        if self.typed:
            return None  # what such a template writes may depend on the kinds of parts
        if roles not in self._literals:
            self._literals[roles] = self._find_literals(roles)
        return self._literals[roles]

    def _find_literals(self, roles: tuple[str, ...]) -> list[str] | None:
        marks = [f"\x02{i}\x03" for i in range(len(roles))]
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        text = self.render(messages)
        places = [text.find(mark) for mark in marks]
        if places != sorted(places) or any(text.count(mark) != 1 for mark in marks):
            return None
        for i, role in enumerate(roles):
            if role == "assistant" and self.render(messages[:i], add_generation_prompt=True) != text[: places[i]]:
                return None
        return re.split("\x02\\d+\x03", text)

    def _search(self, messages: Messages, sample_id: str) -> tuple[str, list[tuple[int, int]]]:
        """Find the answers in the text: each begins where generation would, and is rendered as it is."""
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            opening = self.render(messages[:i], add_generation_prompt=True)
            if not text.startswith(opening):
                pairs = enumerate(zip(text, opening, strict=False))
                part = next((k for k, (a, b) in pairs if a != b), min(len(text), len(opening)))
                raise ZooError(
                    f"Sample {sample_id!r}: the chat template renders turn {i} differently with and without what "
                    f"follows, so its answer cannot be found. They part at {text[max(0, part - 40) : part + 40]!r}."
                )
            answer = message["content"].strip()
            start = text.find(answer, len(opening))
            if start < 0:
                raise ZooError(f"Sample {sample_id!r}: the chat template does not show the answer {answer[:80]!r}.")
            spans.append((len(opening), self._turn_end(text, start + len(answer))))
        return text, spans

    def _stopping(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """End the last answer with the end-of-sequence token where the template ends with it and writes none.

        LLaVA's published templates are such: without it a model that trains on them would unlearn to stop.
        """
        if not spans:
            return text, spans
        (start, end), eos = spans[-1], self.tokenizer.eos_token
        if eos in text[start:] or text[end:].strip():
            return text, spans
        return text[:end] + eos, [*spans[:-1], (start, end + len(eos))]

    def _turn_end(self, text: str, end: int) -> int:
        """Where the turn ends whose content ends at `end`: behind the end-of-sequence token, if that follows."""
        follows = self._end_token.match(text, end)
        return follows.end() if follows else end

    @cached_property
    def _end_token(self) -> re.Pattern[str]:
        return re.compile(r"\s*" + re.escape(self.tokenizer.eos_token))

    # ---- tokens ------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a rendered text, and the character at which each ends.

        In front stands what the tokenizer itself puts there (<s>) where the template leaves that to it, as those of
        vision-language models do.
        """
        ids, ends = self._tokenize(text)
        begin = [] if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token) else self._begin
        return [*begin, *ids], [*[0] * len(begin), *ends]

    @cached_property
    def _begin(self) -> list[int]:
        """Ids that the tokenizer puts before a text; none for a template that writes all there is."""
        if not self.typed:
            return []
        whole, alone = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return list(whole[:at])

    def _tokenize(self, text: str) -> tuple[list[int], list[int]]:
        if self._special is None:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(out["input_ids"]), _rising(out["offset_mapping"])
        ids, ends, at = [], [], 0
        for segment in self._special.split(text):
            if segment not in self._segments:
                if len(self._segments) >= _CACHE:
                    self._segments.clear()
                encoding = self.tokenizer.backend_tokenizer.encode(segment, add_special_tokens=False)
                self._segments[segment] = encoding.ids, _rising(encoding.offsets)
            some, stops = self._segments[segment]
            ids += some
            ends += [at + s for s in stops]
            at += len(segment)
        return ids, ends

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Splits a text at special tokens; None where a tokenizer looks across them and needs the text whole."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        by_bytes = type(getattr(backend, "pre_tokenizer", None)).__name__ == "ByteLevel"
        added = list(self.tokenizer.added_tokens_decoder.values())
        if (
            backend is None
            or not by_bytes
            or backend.normalizer
            or any(t.lstrip or t.rstrip or t.single_word for t in added)
        ):
            return None
        return re.compile("(" + "|".join(re.escape(t.content) for t in added) + ")")


def takes_parts(tokenizer: Any) -> bool:
    """Whether a chat template wants typed parts, as those of vision-language models do, and shows images by itself."""
    image = getattr(tokenizer, "image_token", None)
    if not image or not tokenizer.chat_template or not isinstance(tokenizer.chat_template, str):
        return False
    content = [{"type": "image"}, {"type": "text", "text": "\x02"}]
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # a template may fail in any way on what it does not know
        return False
    return shown.count(image) == 1 and shown.count("\x02") == 1


def _rising(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The largest end so far: bytes of one character give their tokens the same, or an empty, stretch of text."""
    return list(accumulate((end for _, end in offsets), max))
