"""Escape control tokens in messages: `</s>`, `<|im_end|>` or `<image>` typed by a user stays text.

In the text that a chat template renders, control tokens of the template and of messages look alike. So control tokens
in messages are veiled: each becomes one character of a private plane of Unicode, which templates do not change, and is
tokenized as plain letters later. Control tokens begin or end a text or a turn, pad, or are placeholders of images and
videos. Other added tokens (`<think>`, `<|box_start|>`, `<loc0123>`) belong to the model's language and stay tokens.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

from zoo.registry import ZooError
from zoo.text.chat_template import ChatTemplate

FIRST, LAST = 0x10F000, 0x10FFFD  # private characters that replace tokens
VEILED = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
TALKS = (("user", "assistant", "user"), ("system", "user", "assistant"))


class PlainText:
    """Veils control tokens in texts, and tokenizes veiled texts as letters.

    Args:
        template: chat template of the tokenizer.
        placeholders: tokens of images and videos.
    """

    def __init__(self, template: ChatTemplate, placeholders: Sequence[str | None]) -> None:
        self.template, self.tokenizer = template, template.tokenizer
        self.placeholders = frozenset(token for token in placeholders if token)
        self._characters: dict[str, str] = {}  # token -> character that replaces it
        self._texts: dict[str, str] = {}  # the inverse

    @cached_property
    def control(self) -> frozenset[str]:
        """Tokens that text of a message is never read as."""
        added = {t.content: t.special for t in self.tokenizer.added_tokens_decoder.values() if t.content.strip()}
        named = {getattr(self.tokenizer, name, None) for name in NAMED} | {*self.template.ends}
        written = "".join(self._written(roles) for roles in TALKS)
        return frozenset(t for t, special in added.items() if t in named or (special and t in written)) | (
            self.placeholders & added.keys()
        )

    def _written(self, roles: Sequence[str]) -> str:
        try:
            return "".join(self.template.around(roles) or ())
        except ZooError:  # the template refuses turns of these roles
            return ""

    def veil(self, text: str, leave: frozenset[str] = frozenset()) -> str:
        """Replace control tokens by private characters, except those in `leave`."""
        pattern = self._pattern
        return pattern.sub(lambda m: m[0] if m[0] in leave else self._character(m[0]), text)

    def unveil(self, text: str) -> str:
        """Undo `veil`."""
        return VEILED.sub(lambda m: self._texts.get(m[0], m[0]), text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        tokens = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, tokens), VEILED.pattern]))

    def _character(self, text: str) -> str:
        if text not in self._characters:
            number = len(self._texts)
            while self._texts.setdefault(character := chr(FIRST + number), text) != text:
                number += 1  # another thread has taken it
            self._characters[text] = character
        return self._characters[text]

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Tokenize a veiled text as letters: its tokens, and the character of the veiled text at which each ends.

        Raises:
            ZooError: this tokenizer can only read the text as control tokens.
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
        """A copy of the tokenizer without control tokens; None if it is not of the library `tokenizers`."""
        from tokenizers import Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        # Control tokens are renamed to noncharacters instead of removed, so that all others keep their ids.
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
