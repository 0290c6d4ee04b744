"""A cache of tokenized texts that does not fill the memory."""

from typing import Any

_ENTRY = 16  # tokens that an entry counts beside its own: key and value take memory, too


class TokenCache:
    """Values by key, emptied where they have too many tokens in all; threads may share it.

    Questions of drawn data repeat, and a step may have hundreds of them. Those of most data sets do not, and every
    process that reads data would keep them all.

    Args:
        most: tokens.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self.tokens = 0
        self._values: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """Return a value; None: it is not there."""
        return self._values.get(key)

    def put(self, key: Any, value: Any, tokens: int) -> Any:
        """Keep a value that has this number of tokens, and return it."""
        if self.tokens + tokens + _ENTRY > self.most:
            self.clear()
        self._values[key] = value
        self.tokens += tokens + _ENTRY
        return value
