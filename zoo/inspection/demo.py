"""What the page of `zoo demo` does: answers about a picture, and what pruners keep of it. Nothing here knows Gradio.

A conversation is a value of its visitor. Models, and the batches in which answers are generated, are shared by all.
"""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from zoo import registry
from zoo.composed.front import frame_share
from zoo.inspection.views import View
from zoo.inspection.xray import look
from zoo.inspection.xray_picture import paint
from zoo.loading.other_pruners import NONE, Pruned, has_ratio
from zoo.registry import Cut, Dialog, Pruner, Sample, ZooError
from zoo.runs.lengths import room_for_answer
from zoo.serving.answers import Piece, Row, described
from zoo.serving.batches import Batcher
from zoo.serving.protocol import Sampling
from zoo.vision.images.decode import open_image

AS_LOADED = "as loaded"  # instead of a pruner: those that the model came with
QUESTION = "What is in the picture?"  # of an X-ray before anything is asked
SECONDS = 300.0  # that a visitor waits for the next piece of an answer


@dataclass(frozen=True)
class Side:
    """A choice on the page: a model, a pruner of it, and the keep ratio of that."""

    model: str
    pruner: str = AS_LOADED
    keep_ratio: float = 0.5


@dataclass
class Turn:
    """A question, and the answers of the sides that were asked."""

    question: str
    answers: list[str] = field(default_factory=list)


@dataclass
class Talk:
    """The conversation of a visitor: one picture or none, and turns about it."""

    picture: Any = None  # a source for `open_image`
    turns: list[Turn] = field(default_factory=list)

    def messages(self, side: int, question: str) -> list[dict[str, Any]]:
        """Return the messages of a side, with a new question; turns in which it was not asked are left out."""
        shown = [] if self.picture is None else [{"type": "image"}]
        messages: list[dict[str, Any]] = []
        for turn in [t for t in self.turns if side < len(t.answers) and t.answers[side]]:
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answers[side]}]})
            shown = []
        return [*messages, {"role": "user", "content": [*shown, {"type": "text", "text": question}]}]


class Demo:
    """Models that visitors talk to.

    Args:
        models: by the names that the page shows.
        max_tokens: of an answer.
        batch: answers that are generated together.
        threads: batches at once.
        pruners: that are offered; empty: every registered one that fits the model and acts on images.
    """

    def __init__(
        self,
        models: dict[str, Pruned],
        max_tokens: int = 256,
        batch: int = 8,
        threads: int = 2,
        pruners: Sequence[str] = (),
    ) -> None:
        self.models, self.max_tokens = models, max_tokens
        self.batcher = Batcher(batch, threads)
        self.pruners = {name: [AS_LOADED, NONE] for name in models}
        for pruner in pruners or registry.names("pruner"):
            self._offer(pruner, named=bool(pruners))

    def _offer(self, pruner: str, named: bool) -> None:
        """Offer a pruner for the models that it fits."""
        refusals = []
        for name, pruned in self.models.items():
            try:
                model, _ = pruned.get(pruner)
            except ZooError as error:
                refusals.append(error)
            else:
                if named or not _for_videos(model):
                    self.pruners[name].append(pruner)
        if named and len(refusals) == len(self.models):
            raise refusals[0]

    def has_ratio(self, side: Side) -> bool:
        """Whether the keep ratio of a side means anything."""
        chosen = list(self.models[side.model].model.pruner) if side.pruner == AS_LOADED else str(side.pruner).split("+")
        return any(name != NONE and has_ratio(name) for name in chosen)

    def model_of(self, side: Side) -> tuple[Any, Any]:
        """Return the model and the processor of a side.

        Raises:
            ZooError: the pruner does not fit the model.
        """
        if side.model not in self.models:
            raise registry.unknown("model", side.model, self.models)
        if side.pruner == AS_LOADED and not self.has_ratio(side):
            return self.models[side.model].get()
        pruner = None if side.pruner == AS_LOADED else side.pruner
        return self.models[side.model].get(pruner, side.keep_ratio if self.has_ratio(side) else None)

    def answer(self, talk: Talk, question: str, sides: Sequence[Side]) -> Iterator[list[str]]:
        """Ask all sides at once; yields their answers so far, and adds the turn to the conversation at the end.

        Raises:
            ZooError: the question is empty, or it does not fit a model; the conversation is as before.
        """
        if not question.strip():
            raise ZooError("There is no question.")
        pieces: queue.Queue[tuple[int, Piece]] = queue.Queue()

        def hand(index: int, piece: Piece) -> None:
            pieces.put((index, piece))

        rows = [self._row(talk, question, i, side, partial(hand, i)) for i, side in enumerate(sides)]
        texts, left = [""] * len(rows), len(rows)
        try:
            self.batcher.add(rows)
            while left:
                index, piece = pieces.get(timeout=SECONDS)
                if piece.error is not None:
                    raise piece.error if isinstance(piece.error, ZooError) else ZooError(described(piece.error))
                texts[index] += piece.text
                left -= bool(piece.finish)
                yield list(texts)
        except queue.Empty as error:
            raise ZooError(f"No answer came in {SECONDS:.0f} seconds.") from error
        finally:  # also where the visitor has left
            for row in rows:
                row.cancelled = True
        talk.turns.append(Turn(question, texts))

    def _row(self, talk: Talk, question: str, index: int, side: Side, hand: Callable[[Piece], None]) -> Row:
        model, processor = self.model_of(side)
        shown = [] if talk.picture is None else processor.prepare([talk.picture])
        dialog = Dialog(talk.messages(index, question))
        prompt = processor.encode_prompt(Sample("page", [None] * len(shown), []), dialog, pixel_values=shown)
        limit = min(self.max_tokens, room_for_answer(prompt, model.llm.max_positions))
        return Row(model, processor, prompt, limit, Sampling(), hand)

    @torch.no_grad()
    def xray(self, picture: Any, question: str, side: Side) -> tuple[np.ndarray, str]:
        """Return the picture with what is dropped of it dark, (h, w, 3) uint8, and a sentence on what is kept.

        Raises:
            ZooError: the pruner does not fit the model, or the model has no image tokens.
        """
        model, processor = self.model_of(side)
        started = time.perf_counter()
        view, shown = look(model, processor, picture, question.strip() or QUESTION, side.pruner, answer="")
        seconds = time.perf_counter() - started
        layer = max(i for i in view.moments if view.tokens[i] or i == 0)  # with something to show
        return (paint(shown, view, layer) * 255).round().astype(np.uint8), described_view(view, seconds)

    def close(self) -> None:
        """End what is running."""
        self.batcher.close()


def _for_videos(model: Any) -> bool:
    """Whether a pruner of a model leaves a single image as it is."""
    n = model.num_image_tokens
    counted = [p for p in model.pruner.values() if type(p).tokens_of_image is not Pruner.tokens_of_image]
    return frame_share(model.pruner) != 1 or any(p.behind and p.tokens_of_image(n, Cut()) >= n for p in counted)


def described_view(view: View, seconds: float) -> str:
    """Describe what is kept of a picture, layer by layer, in a sentence."""
    patches = len(view.layers[0])
    first = view.tokens[0]
    kept = sum(token >= 0 for token in view.layers[0])
    text = f"{first} image tokens" if first != 1 else "1 image token"
    if view.merged:
        text += f", made of {kept} of {patches} patches"
    elif kept != patches or first != patches:
        text += f" of {patches}"
    later = [f"{view.tokens[i]} from layer {i}" for i in view.moments[1:]]
    if len(later) > 3:
        later = [*later[:2], f"... {later[-1]}"]
    return "; ".join([text, *later, f"{1000 * seconds:.0f} ms for the prompt"])


def examples(count: int = 3) -> list[tuple[Any, str]]:
    """Return drawn scenes, each as a PIL image with a question about it."""
    scenes = registry.build("dataset", {"name": "scenes", "split": "eval", "size": 256})
    found = []
    for i in range(count):
        sample = scenes.get(i)
        dialog = sample.dialogs[i % len(sample.dialogs)]
        text = next(part["text"] for part in dialog.messages[0]["content"] if part["type"] == "text")
        found.append((open_image(sample.images[0]), text))
    return found
