"""Texts of people stay text: `</s>`, `<|im_end|>` or `<image>` in a message is these letters, and no token of control.

A chat template is rendered to one text in which what it writes and what people wrote look alike. So tokens of control
in messages are veiled: each becomes one character of a private plane of Unicode, which templates leave alone, and is
written as its letters when the text is tokenized. Tokens of control are those that begin and end a text or a turn, pad,
or stand for images and videos. Others of a tokenizer (`<think>`, `<|box_start|>`, `<loc0123>`) are words of its
language and stay tokens. A text without tokens of control is read as it was.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from zoo.registry import ZooError
from zoo.text.chat_template import ChatTemplate

FIRST, LAST = 0x10F000, 0x10FFFD  # characters that stand for tokens
VEILED = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TALKS = (("user", "assistant", "user"), ("system", "user", "assistant"))


class PlainText:
    """Veils tokens of control in texts, and says what tokens their letters are.

    Args:
        template: chat template of the tokenizer.
        placeholders: tokens that stand for images and videos.
    """

    def __init__(self, template: ChatTemplate, placeholders: Sequence[str | None]) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        self.placeholders = frozenset(token for token in placeholders if token)
        self._characters: dict[str, str] = {}  # what is veiled -> the character in its place
        self._texts: dict[str, str] = {}  # and back

    @cached_property
    def control(self) -> frozenset[str]:
        """Tokens that no text of a person is."""
        added = {t.content: t.special for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()}
        named = {getattr(self.tokenizer, name, None) for name in NAMED} | {*self.template.ends}
        written = "".join(self._written(roles) for roles in TALKS)
        return frozenset(t for t, special in added.items() if t in named or (special and t in written)) | (
            self.placeholders & added.keys()
        )

    def _written(self, roles: Sequence[str]) -> str:
        try:
            return "".join(self.template.around(roles) or ())
        except ZooError:  # it takes no such turns
            return ""

    def veil(self, text: str, leave: frozenset[str] = frozenset()) -> str:
        """Return a text with characters in the place of tokens of control; those in `leave` stay."""
        pattern = self._pattern
        return pattern.sub(lambda m: m[0] if m[0] in leave else self._character(m[0]), text)

    def unveil(self, text: str) -> str:
        """Return a text as it was."""
        return VEILED.sub(lambda m: self._texts.get(m[0], m[0]), text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        tokens = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, tokens), VEILED.pattern]))

    def _character(self, text: str) -> str:
        if text not in self._characters:
            character = chr(FIRST + len(self._characters))
            self._characters[text], self._texts[character] = character, text
        return self._characters[text]

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a veiled text as letters, and the character of the veiled text at which each ends.

        Raises:
            ZooError: this tokenizer has no other way to read it than as tokens of control.
        """
        plain = self.unveil(text)
        if self._letters is None:
            raise ZooError(f"This tokenizer cannot write {plain[:80]!r} as a text: take the token out of it.")
        encoding = self._letters.encode(plain, add_special_tokens=False)
        if not self._ids.isdisjoint(encoding.ids):
            raise ZooError(f"This tokenizer cannot write {plain[:80]!r} as a text: take the token out of it.")
        ends = list(accumulate(len(self._texts.get(c, c)) for c in text))  # of the veiled characters, in the plain text
        places, at = [], 0
        for end in accumulate((end for _, end in encoding.offsets), max):
            while at < len(ends) and (ends[at - 1] if at else 0) < end:
                at += 1
            places.append(at)
        return list(encoding.ids), places

    @cached_property
    def _ids(self) -> frozenset[int]:
        known = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, t in known if t.content in self.control and t.content != self.tokenizer.unk_token)

    @cached_property
    def _letters(self) -> Any:
        """The tokenizer, without tokens of control; None for one that is not of the library `tokenizers`."""
        from tokenizers import Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        # They get names that no text has, and keep their places, so that all others keep their ids.
        names = {token: f"\ufdd0{number}\ufdd1" for number, token in enumerate(sorted(self.control))}
        content = json.loads(backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(vocab := model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(content))
