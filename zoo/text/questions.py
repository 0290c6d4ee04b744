"""What a prompt asks about its images, for parts that choose image tokens by the question."""

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.registry import Asked


class QuestionsMixin:
    """Finds the question of a conversation, for `ZooProcessor`."""

    asks: bool
    image_token: str
    video_token: str | None
    _chat: Any

    def asked(
        self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False, only_last: bool = False
    ) -> list[Asked]:
        """Return what a conversation asks about its images; nothing unless the model's parts need it.

        It is the last turn of the user before the first answer behind an image, without images. The prompt of another
        answer asks its last question, and so does a conversation of which only the last answer is learned.

        Args:
            messages: typed or plain.
            prompt: the conversation is a prompt: its answers are history.
            only_last: only the last answer is learned.
        """
        if not self.asks:
            return []
        shown = [self._count_shown(m.get("content")) for m in messages]
        first = next((i for i, count in enumerate(shown) if count), 0)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > first]
        end = len(messages) if prompt or not answers else answers[-1 if only_last else 0]
        turns = (self._said(m.get("content")) for m in reversed(messages[:end]) if m["role"] == "user")
        text = next(turns, "")
        return [Asked(text, tuple(self._chat.words(text)), sum(shown))]

    def _count_shown(self, content: Any) -> int:
        """Count the images and videos of a message; one that calls tools may have no content."""
        if isinstance(content, str):
            return sum(content.count(token) for token in self._tokens)
        return sum(part["type"] in ("image", "video") for part in content or ())

    def _said(self, content: Any) -> str:
        """The text of a message, without images."""
        if isinstance(content, str):
            for token in self._tokens:
                content = content.replace(token, "")
            return content.strip()
        return "".join(part["text"] for part in content or () if part["type"] == "text").strip()

    @property
    def _tokens(self) -> set[str]:
        return {token for token in (self.image_token, self.video_token) if token}
