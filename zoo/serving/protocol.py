"""OpenAI's chat-completions protocol: what a request asks, and the objects of answers and errors.

Source: https://platform.openai.com/docs/api-reference/chat. Nothing here loads or runs a model.
"""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from zoo.registry import ZooError, nearest

MAX_CHOICES = 16  # answers to one request (`n`)
MAX_IGNORED = 20  # fields that are named: a search for a near name takes a quarter of a millisecond
MAX_STOPS = 4  # texts that end an answer, as OpenAI has it
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestError(ZooError):
    """A request that is refused.

    Args:
        message: for the person who asked.
        status: of HTTP.
        code: short name of the reason, for programs.
        param: the field of the request.
    """

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Args:
        temperature: 0: the most likely token each time.
        top_p: share of the probability that tokens are drawn from, in (0, 1].
        presence_penalty: subtracted from the scores of tokens that the answer has.
        frequency_penalty: the same, once for each time.
        seed: of the draws; None: a new one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the most likely token is taken, without penalties."""
        return not (self.temperature or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Picture:
    """An image part of a message: its URL, and its place in the request for messages."""

    url: str
    where: str


@dataclass
class Ask:
    """A request for a chat completion."""

    model: str
    messages: list[dict[str, Any]]  # role, and content as a list of text and image parts
    pictures: list[Picture]  # of the image parts, in their order
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    pruner: str | None = None
    keep_ratio: float | None = None
    ignored: list[str] = field(default_factory=list)  # fields that change nothing here
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


# Fields that are accounting, or advice to a provider: they do not change an answer.
NEUTRAL = frozenset(
    {
        "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "reasoning_effort", "verbosity", "prediction", "tool_choice", "function_call",
    }
)  # fmt: skip
# Fields that ask for something that is not done here, and the values with which they ask for nothing.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (lambda v: v == [], "models here do not call tools"),
    "functions": (lambda v: v == [], "models here do not call functions"),
    "response_format": (lambda v: v == {"type": "text"}, "answers are text"),
    "logprobs": (lambda v: v is False, "log-probabilities are not returned"),
    "top_logprobs": (lambda v: v == 0, "log-probabilities are not returned"),
    "logit_bias": (lambda v: v == {}, "tokens have no bias"),
    "modalities": (lambda v: v == ["text"], "answers are text"),
    "audio": (lambda v: False, "answers are text"),
    "web_search_options": (lambda v: False, "nothing is searched"),
}
TAKEN = frozenset(
    {
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n",
        "stream", "stream_options", "presence_penalty", "frequency_penalty", "pruner", "keep_ratio",
    }
)  # fmt: skip


def read_ask(body: Any) -> Ask:
    """Read the JSON of a request.

    Raises:
        RequestError: a field is missing, has a wrong value, or asks for what is not done here.
    """
    if not isinstance(body, Mapping):
        raise RequestError("The request has to be a JSON object with model and messages.")
    given = {key: value for key, value in body.items() if value is not None}
    for name, (asks_nothing, why) in REFUSED.items():
        if name in given and not asks_nothing(given[name]):
            raise RequestError(f"{name!r} is not supported: {why}.", code="unsupported_parameter", param=name)
    if not isinstance(given.get("model"), str):
        raise RequestError("'model' has to be the name of a model, see /v1/models.", param="model")
    messages, pictures = _messages(given.get("messages"))
    options = _options(given)
    shown = given.get("stream_options", {})
    if not isinstance(shown, Mapping):
        raise RequestError("'stream_options' has to be an object.", param="stream_options")
    if shown and not options["stream"]:
        raise RequestError("'stream_options' is for requests with 'stream': true.", param="stream_options")
    return Ask(
        given["model"], messages, pictures,
        sampling=Sampling(
            options["temperature"], options["top_p"], options["presence_penalty"], options["frequency_penalty"],
            options["seed"],
        ),
        max_tokens=options["max_completion_tokens"] or options["max_tokens"],
        stop=_stops(given.get("stop")), n=options["n"], stream=options["stream"],
        include_usage=bool(shown.get("include_usage")),
        pruner=options["pruner"], keep_ratio=options["keep_ratio"],
        ignored=_ignored(given),
    )  # fmt: skip


@dataclass(frozen=True)
class _Number:
    """Bounds of a field that is a number."""

    low: float
    high: float
    default: Any = None
    whole: bool = False


_NUMBERS = {
    "temperature": _Number(0, 2, 0.0),
    "top_p": _Number(0, 1, 1.0),
    "presence_penalty": _Number(-2, 2, 0.0),
    "frequency_penalty": _Number(-2, 2, 0.0),
    "seed": _Number(-(2**63), 2**63 - 1, whole=True),
    "n": _Number(1, MAX_CHOICES, 1, whole=True),
    "max_tokens": _Number(1, 2**31, whole=True),
    "max_completion_tokens": _Number(1, 2**31, whole=True),
    "keep_ratio": _Number(0, 1),
}


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the plain fields, and return them with defaults."""
    options: dict[str, Any] = {}
    for name, field_ in _NUMBERS.items():
        value = given.get(name, field_.default)
        kinds = (int,) if field_.whole else (int, float)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, kinds) or value != value:  # NaN
                what = "an integer" if field_.whole else "a number"
                raise RequestError(f"{name!r} has to be {what}, got {value!r:.60}.", param=name)
            if not field_.low <= value <= field_.high or (value == 0 and name in ("top_p", "keep_ratio")):
                low = "above 0" if name in ("top_p", "keep_ratio") else f"at least {field_.low:g}"
                raise RequestError(
                    f"{name!r} has to be {low} and at most {field_.high:g}, got {value!s:.60}.", param=name
                )
        options[name] = value
    for name in ("stream",):
        options[name] = given.get(name, False)
        if not isinstance(options[name], bool):
            raise RequestError(f"{name!r} has to be true or false, got {options[name]!r:.60}.", param=name)
    options["pruner"] = given.get("pruner")
    if not isinstance(options["pruner"], (str, type(None))):
        raise RequestError("'pruner' has to be the name of a pruner, or 'none'.", param="pruner")
    return options


def _stops(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts) or len(texts) > MAX_STOPS:
        raise RequestError(f"'stop' has to be a text, or up to {MAX_STOPS} of them.", param="stop")
    return tuple(texts)


def _ignored(given: Mapping[str, Any]) -> list[str]:
    """Name the first fields that this server does not know, with the nearest one that it knows."""
    unknown = (name for name in given if name not in TAKEN and name not in NEUTRAL and name not in REFUSED)
    named = []
    for name in islice(unknown, MAX_IGNORED):
        near = nearest(name[:60], TAKEN)
        named.append(f"{name!r:.60}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return named


def _messages(given: Any) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Convert messages to typed parts; images are named by their place."""
    if not isinstance(given, list) or not given:
        raise RequestError("'messages' has to be a list with at least one message.", param="messages")
    messages, pictures = [], []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in ROLES:
            allowed = ", ".join(ROLES)
            raise RequestError(f"{where}.role is {role!r:.60}; allowed: {allowed}.", param=f"{where}.role")
        parts: list[dict[str, Any]] = []
        for j, part in enumerate(_parts(message.get("content"), where)):
            kind = part.get("type") if isinstance(part, Mapping) else None
            at = f"{where}.content[{j}]"
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and ROLES[role] == "user":
                pictures.append(Picture(_url(part, at), at))
                parts.append({"type": "image"})
            else:
                can = "text and image_url" if ROLES[role] == "user" else "text"
                raise RequestError(f"{at} is of type {kind!r:.60}; allowed of a {role}: {can}.", param=at)
        messages.append({"role": ROLES[role], "content": parts})
    if messages[-1]["role"] != "user":
        raise RequestError("The last message has to be of the user: it is what is answered.", param="messages")
    return messages, pictures


def _parts(content: Any, where: str) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}.content has to be a text or a list of parts.", param=f"{where}.content")
    return content


def _url(part: Mapping[str, Any], at: str) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise RequestError(f"{at}.image_url has to hold a url.", param=at)
    return url


# ---- answers ------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One answer to a request."""

    text: str
    finish: str  # stop | length
    tokens: int  # generated, the end included


def usage(prompt: int, image: int, answer: int) -> dict[str, Any]:
    """Return the counts of tokens of a request.

    Args:
        prompt: of the prompt, image tokens included.
        image: image tokens among them, those that pruners leave.
        answer: of all choices.
    """
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"image_tokens": image},
    }


def completion(ask: Ask, choices: Sequence[Choice], counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object of a whole answer."""
    made = [
        {
            "index": i,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": None,
            "finish_reason": choice.finish,
        }
        for i, choice in enumerate(choices)
    ]
    return {**_head(ask, "chat.completion"), "choices": made, "usage": dict(counts)}


def chunk(ask: Ask, index: int, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    """Return the object of a piece of a streamed answer."""
    choice = {"index": index, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
    more = {"usage": None} if ask.include_usage else {}
    return {**_head(ask, "chat.completion.chunk"), "choices": [choice], **more}


def last_chunk(ask: Ask, counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object behind a streamed answer, with the counts of tokens."""
    return {**_head(ask, "chat.completion.chunk"), "choices": [], "usage": dict(counts)}


def _head(ask: Ask, kind: str) -> dict[str, Any]:
    return {"id": ask.id, "object": kind, "created": ask.created, "model": ask.model}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """Return the object of a model in /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "zoo"}
