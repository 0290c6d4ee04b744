"""Answers in the making: one row of a batch each, with its own length, ends, draws and reader of its text.

transformers' `generate` has one set of options for all rows of a batch. Here a logits processor draws the tokens of
each row, and a stopping criterion hands every token to its row and reports which rows are done. So requests with
different options share a batch, are streamed from it, and each gets what it would get alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

from zoo.registry import ZooError
from zoo.runs.lengths import length_of
from zoo.serving.protocol import Sampling
from zoo.text.batch import EncodedSample
from zoo.text.stops import AnswerReader, listed, reader_for

COLDEST = 1e-6  # temperature, below which scores would be divided to infinity


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text; `finish` is set in the last one: stop, length or error."""

    text: str = ""
    finish: str = ""
    error: Exception | None = None


class Reading:
    """Reads the text of an answer from its tokens, one after the other.

    The pieces joined are the whole answer: text that a later token may change or remove (a character of several
    tokens, blanks at the end, the beginning of a text that ends answers) is held back.

    Args:
        reader: of the model's answers.
        stop: texts that end this answer too.
        over: texts at which generation ends, and which are part of the answer.
    """

    def __init__(self, reader: AnswerReader, stop: Sequence[str] = (), over: Sequence[str] = ()) -> None:
        self.reader = copy.copy(reader)
        self.reader.ends = (*reader.ends, *stop)
        self.over = tuple(over)
        self.ids: list[int] = []
        self.text = ""  # of the first `at` tokens
        self.start = self.at = 0  # tokens from `start` on are decoded together: the first of a text lose their blank
        self.sent = 0  # characters of the answer that were handed out
        self.ended = False

    def take(self, token: int) -> str:
        """Read the next token, and return the text that is certain from now on."""
        if token in self.reader.ids:
            self.ended = True
            return ""
        self.ids.append(token)
        before = self._decode(self.ids[self.start : self.at])
        now = self._decode(self.ids[self.start :])
        if len(now) <= len(before) or now.endswith("\ufffd"):  # a character that is not complete
            return ""
        self.text += now[len(before) :]
        self.start, self.at = self.at, len(self.ids)
        self.ended = any(end in self.text for end in (*self.reader.ends, *self.over))
        return self._new(self.reader.visible(self.text, final=self.ended).strip())

    def rest(self) -> str:
        """Return the text that was held back, at the end of the answer."""
        return self._new(self.reader.read(self.ids))

    def _new(self, shown: str) -> str:
        new = shown[self.sent :]
        self.sent = max(self.sent, len(shown))
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.reader.tokenizer.decode(ids, skip_special_tokens=True))


class Row:
    """One answer in the making.

    Args:
        model: composed; rows of one model share batches.
        processor: of the model.
        prompt: encoded.
        limit: tokens of the answer.
        stop: texts that end it.
        sampling: how its tokens are chosen.
        seed: of its draws; None: a new one.
        hand: is called with each piece, from the thread that generates.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompt: EncodedSample,
        limit: int,
        sampling: Sampling,
        hand: Callable[[Piece], None],
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> None:
        self.model, self.processor, self.prompt = model, processor, prompt
        self.limit, self.sampling, self.hand = limit, sampling, hand
        config = model.generation_config
        over = listed(config.stop_strings) if config is not None else []
        self.reading = Reading(reader_for(model, processor.template), stop, over)
        self.tokens = 0  # generated, the end included
        self.done = False
        self.cancelled = False  # set from the thread that waits for the answer
        self.generator: torch.Generator | None = None
        if sampling.temperature:
            self.generator = torch.Generator()
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)

    def take(self, token: int) -> None:
        """Read the next token of the answer."""
        if self.done:
            return
        if self.cancelled:
            self.finish("stop")
            return
        self.tokens += 1
        text = self.reading.take(token)
        if self.reading.ended or self.tokens >= self.limit:
            self.finish("stop" if self.reading.ended else "length", text)
        elif text:
            self.hand(Piece(text))

    def finish(self, reason: str, text: str = "") -> None:
        """End the answer: what was held back is handed out, with the reason."""
        if not self.done:
            self.done = True
            self.hand(Piece(text + self.reading.rest(), reason))

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        if not self.done:
            self.done = True
            self.hand(Piece(finish="error", error=error))

    def choose(self, scores: Tensor) -> None:
        """Leave one token of the scores (V,), in place, where it is not just the most likely one."""
        how, ids = self.sampling, self.reading.ids
        if how.plain or self.done:
            return
        if ids and (how.presence_penalty or how.frequency_penalty):
            used, counts = torch.tensor(ids, device=scores.device).unique(return_counts=True)
            scores[used] -= how.presence_penalty + how.frequency_penalty * counts
        if self.generator is None:
            return
        heat = max(how.temperature, COLDEST)
        probs, order = (scores / heat).softmax(-1).sort(descending=True, stable=True)
        mass = probs.cumsum(-1)
        # The fewest tokens that have `top_p` of the probability, at least one; the draw is a place in their sum. One
        # number is drawn on the CPU, so that a seed means the same on every device.
        within = mass[(mass < how.top_p).sum().clamp(max=len(mass) - 1)]
        drawn = torch.rand((), generator=self.generator).to(mass.device) * within
        token = order[torch.searchsorted(mass, drawn, right=True).clamp(max=len(mass) - 1)]
        scores.fill_(-torch.inf)
        scores[token] = 0.0


class Draws(LogitsProcessor):
    """Leaves of each row's scores (B, V) the token that the row draws; generation itself takes the most likely one."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, own in zip(self.rows, scores, strict=True):
            row.choose(own)
        return scores


class Ends(StoppingCriteria):
    """Hands each new token to its row, and reports which rows are done: (B,) bool."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)


# Options of a checkpoint's generation config that count tokens of the whole row, padding included.
_READ_IDS = ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")


_OFFSET = 2  # rows of a table of positions ahead of the first one (OPT)


def may_share(row: Row, other: Row) -> bool:
    """Whether two rows may be in one batch, with the answers that they have alone."""
    if row.model is not other.model:
        return False
    config = row.model.generation_config
    reads = config is not None and any(getattr(config, name, None) not in (None, 0, 1, 1.0) for name in _READ_IDS)
    return (not reads or len(row.prompt) == len(other.prompt)) and _within_table(row, other)


def _within_table(row: Row, other: Row) -> bool:
    """Whether a batch of both stays within the LLM's table of positions, where it has one.

    An answer that has ended is continued with padding until all have: behind a long prompt it may come to positions
    that the table does not have, which fails for the whole batch.
    """
    lm, most = row.model.llm.lm, row.model.llm.max_positions
    rows = (row, other)
    if most is None or max(length_of(r.prompt) for r in rows) + max(r.limit for r in rows) <= most:
        return True
    others = (m for m in lm.modules() if isinstance(m, nn.Embedding) and m is not lm.get_input_embeddings())
    return not any(most <= table.num_embeddings <= most + _OFFSET for table in others)


@torch.no_grad()
def generate(rows: Sequence[Row]) -> None:
    """Generate the answers of rows as one batch; a batch that fails is tried again row by row.

    Rows get the errors themselves.
    """
    try:
        _generate(rows)
    except Exception as error:
        begun = any(row.tokens for row in rows)
        if len(rows) > 1 and not begun:  # what fails for one must not fail for the others
            for row in rows:
                generate([row])
            return
        for row in rows:
            row.fail(error)
    for row in rows:
        row.finish("length")  # an option of the checkpoint, such as max_time, ended generation before


def _generate(rows: Sequence[Row]) -> None:
    model, processor = rows[0].model, rows[0].processor
    batch = processor.collate([row.prompt for row in rows], padding_side="left")
    given = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in batch}
    given = {key: value.to(model.device) for key, value in given.items()}
    given |= {key: batch[key] for key in ("cuts", "images_per_row", "questions") if key in batch}
    if any(not row.sampling.plain for row in rows):
        given["logits_processor"] = [Draws(rows)]
    if model.generation_config is not None and model.generation_config.stop_strings:
        given["tokenizer"] = processor.tokenizer
    most = max(row.limit for row in rows)
    model.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1, stopping_criteria=[Ends(rows)])


def described(error: Exception) -> str:
    """Return what a person may read of an error: that of a `ZooError`, and only the kind of others."""
    return str(error) if isinstance(error, ZooError) else f"The model failed with {type(error).__name__}."
