"""Chat messages to tokens and labels, through any chat template; a sample without labels is an error.

Tokenizing takes long compared with a small training step, so tokens of the text between special tokens are cached. If
a tokenizer does not allow it, the text is tokenized whole.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from zoo.registry import IGNORE_INDEX, ZooError
from zoo.text.answer_spans import AnswerFinder
from zoo.text.chat_template import ChatTemplate, Messages
from zoo.text.plain_text import VEILED, PlainText
from zoo.text.token_cache import TokenCache
from zoo.text.tokenizer import TEXTS

_HALVES = re.compile("[\ud800-\udfff]")
Tokens = tuple[list[int], list[int]]  # ids, and the character at which each ends
_CACHED = 1 << 20  # tokens of pieces of text, some 80 bytes each


class Chat:
    """The chat template and the tokenizer of a model.

    Args:
        tokenizer: of transformers, with a chat template and an end-of-sequence token.
        video_token: placeholder of a video; None: there are no videos.
        end_tokens: further end tokens, stated by the model's checkpoint.
    """

    def __init__(self, tokenizer: Any, video_token: str | None = None, end_tokens: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, video_token, end_tokens)
        self.answers = AnswerFinder(self.template, verbatim=TEXTS)
        self.plain = PlainText(self.template, (getattr(tokenizer, "image_token", None), video_token))
        self._segments = TokenCache(_CACHED)

    @property
    def typed(self) -> bool:
        """Whether the template takes typed parts and writes the tokens of images."""
        return self.template.typed

    def prompt(self, messages: Messages, sample_id: str = "") -> list[int]:
        """Tokenize a conversation that asks for an answer. The row of `labelled` begins with these tokens."""
        text = self.template.render(messages, True, sample_id)
        return self.tokenize(text, self.answers.openings(messages, text, sample_id), sample_id)[0]

    def labelled(
        self, messages: Messages, sample_id: str = "", only_last: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a conversation; labels are the answers, each with the token or the text that ends it.

        Args:
            messages: role and content of each turn.
            sample_id: for messages.
            only_last: only the last answer is learned.

        Returns:
            Token ids and labels, both (T,) int64; IGNORE_INDEX for tokens that are not learned.

        Raises:
            ZooError: there is no answer, one is empty, or the template or the tokenizer leaves no clear border before
                it; the message shows the text and where it broke.
        """
        found = self.answers.find(messages, sample_id, only_last)
        ids, ends = self.tokenize(found.text, found.openings, sample_id)
        tokens = np.array(ids, dtype=np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
        for piece in found.learnt:
            # Characters to tokens: the tokens whose last character is inside the span.
            first, last = bisect_right(ends, piece.start), bisect_right(ends, piece.end)
            if piece.ended and last < len(ends) and (ends[last - 1] if last else 0) < piece.end:
                last += 1  # the end token includes blanks after it
            if (ends[first - 1] if first else 0) < piece.start:
                if piece.start in found.openings:
                    raise ZooError(self.plain.unveil(_crossed(found.text, piece.start, sample_id)))
                first += 1  # a token that crosses the start of a `{% generation %}` block
            labels[first:last] = tokens[first:last]
        return tokens, labels

    # ---- tokens ------------------------------------------------------------------------------------------------

    def words(self, text: str) -> list[int]:
        """Tokenize the text of a message by itself; control tokens in it are read as letters."""
        return self._tokenize(self.plain.veil(text))[0] if text else []

    def tokenize(self, text: str, borders: Sequence[int] = (), sample_id: str = "") -> tuple[list[int], list[int]]:
        """Return the token ids of a rendered text, and the character at which each ends.

        The tokenizer's own beginning (<s>) is added if the template leaves it to the tokenizer, as those of
        vision-language models do.

        Args:
            text: rendered by the template.
            borders: characters at which a token must end, since in generation the prompt ends there: a text with a
                token across a border is tokenized in pieces.
            sample_id: for messages.
        """
        begin = [] if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token) else self._begin
        try:
            ids, ends = self._tokenize(text)
            crossed = [b for b in borders if b < len(text) and b not in ends[(at := bisect_left(ends, b)) : at + 1]]
            if crossed:
                ids, ends = self._tokenize_pieces(text, crossed) or (ids, ends)
        except (TypeError, ValueError, UnicodeError) as error:  # for example a lone surrogate
            whose = f"Sample {sample_id!r}: the" if sample_id else "The"
            half = "it holds half of a surrogate pair, which is not a character" if _HALVES.search(text) else ""
            raise ZooError(f"{whose} tokenizer refuses the text: {half or ' '.join(str(error).split())}.") from error
        return [*begin, *ids], [*[0] * len(begin), *ends]

    def _tokenize_pieces(self, text: str, borders: Iterable[int]) -> tuple[list[int], list[int]] | None:
        """As `_tokenize`, with a token boundary at each of `borders`; None if the tokenizer does not allow it."""
        places = [0, *sorted(borders), len(text)]
        ids, ends = self._tokenize(text[: places[1]])
        for start, end in pairwise(places[1:]):
            found = self._tokenize_on(text[start:end])
            if found is None:
                return None
            ids, ends = [*ids, *found[0]], [*ends, *(start + e for e in found[1])]
        return ids, ends

    def _tokenize_on(self, text: str) -> tuple[list[int], list[int]] | None:
        """As `_tokenize`, for a text that continues another one: tokenized after a letter whose token is removed."""
        return self._tokenize(text) if self._divisible else _behind_a_letter(text, self._tokenize)

    @cached_property
    def _divisible(self) -> bool:
        """Whether tokens of pieces can be concatenated; not so for tokenizers that put a blank before each text."""
        ids = [i for t in ("a", "\n", "b") for i in self.tokenizer(t, add_special_tokens=False)["input_ids"]]
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a\nb"

    @cached_property
    def _begin(self) -> list[int]:
        """Ids that the tokenizer puts before a text; none for templates of text, which write the whole beginning."""
        if not self.typed:
            return []
        whole, alone = (self.tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return list(whole[:at])

    def _tokenize(self, text: str) -> tuple[list[int], list[int]]:
        if self._special is None:
            if VEILED.search(text):
                return self._tokenize_veiled(text)
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(out["input_ids"]), _rising(out["offset_mapping"])
        ids, ends, at = [], [], 0
        for segment in self._special.split(text):
            found: Tokens | None = self._segments.get(segment)
            if found is None:
                if VEILED.search(segment):
                    found = self.plain.encode(segment)
                else:
                    encoding = self.tokenizer.backend_tokenizer.encode(segment, add_special_tokens=False)
                    found = encoding.ids, _rising(encoding.offsets)
                self._segments.put(segment, found, len(found[0]))
            some, stops = found
            ids += some
            ends += [at + s for s in stops]
            at += len(segment)
        return ids, ends

    def _tokenize_veiled(self, text: str) -> tuple[list[int], list[int]]:
        """As `_tokenize`, for veiled texts and tokenizers that cannot be split at special tokens: in pieces."""
        ids: list[int] = []
        ends: list[int] = []
        at = 0
        for piece in re.split(f"({VEILED.pattern})", text):
            if not piece:
                continue
            read = self.plain.encode if VEILED.match(piece) else self._tokenize
            found = read(piece) if at == 0 or self._divisible else _behind_a_letter(piece, read)
            if found is None:
                shown = self.plain.unveil(piece)
                raise ZooError(f"This tokenizer cannot write {shown!r} as a text: take the token out of it.")
            ids, ends = [*ids, *found[0]], [*ends, *(at + end for end in found[1])]
            at += len(piece)
        return ids, ends

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        """Pattern that splits a text at special tokens; None if tokens depend on text across them."""
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
        return re.compile("(" + "|".join(re.escape(t) for t in sorted((t.content for t in added), key=len)[::-1]) + ")")


def _behind_a_letter(text: str, read: Callable[[str], Tokens]) -> Tokens | None:
    """Tokenize a text after a letter, and remove the letter's token; None if a token joins both."""
    for letter in ("\n", "a"):
        ids, ends = read(letter + text)
        first = bisect_right(ends, 1)
        if first and ends[first - 1] == 1:
            return ids[first:], [end - 1 for end in ends[first:]]
    return None


def _crossed(text: str, border: int, sample_id: str) -> str:
    where = f"{text[max(0, border - 40) : border]} >>> {text[border : border + 40]}"
    return (
        f"Sample {sample_id!r}: a token runs across the border between question and answer, so the answer cannot be "
        f"learned cleanly. The border is at >>>: {where!r}. Remove blanks from the beginning of the answer, or choose "
        f"another template with tokenizer.chat_template."
    )


def _rising(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Cumulative maximum of the ends: tokens of single bytes of a character have equal or empty spans of text."""
    return list(accumulate((end for _, end in offsets), max))
