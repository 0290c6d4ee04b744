"""Answers of a model: dialogs in, texts out, in batches that change only the speed.

Dialogs of similar length share a batch. An image is encoded once for all dialogs about it, and equal questions about
the same image (a blind model has one image for all) are answered once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from math import isnan
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.composed.image_path import Encoded
from zoo.composed.outputs import LOSS_ALONE
from zoo.composed.prefix_cache import PrefixCache
from zoo.registry import IGNORE_INDEX, Dialog, ImageFeatures, RecordError, Sample, ZooError, naming
from zoo.runs.lengths import require_room, room_for_answer
from zoo.text.batch import EncodedSample, to_device
from zoo.text.stops import reader_for
from zoo.vision.images.processors import blank, stack
from zoo.vision.images.video import Video

WINDOW = 8  # batches whose dialogs are sorted by length together


@dataclass
class Question:
    """One dialog to answer."""

    sample: Sample
    dialog: Dialog
    mode: str  # generate | choice | scores | hidden, as `Task.mode`
    max_new_tokens: int
    order: tuple[Any, ...] = ()  # sort key in the evaluation: data set, sample, dialog
    candidates: tuple[str, ...] | None = None  # of choice and scores; None: `dialog.choices`
    layer: int = -1  # of hidden


def answer(
    model: Any,
    processor: Any,
    questions: Iterable[Question],
    *,
    batch_size: int,
    blind: bool = False,
    leave_out: Callable[[Question, RecordError], None] | None = None,
) -> Iterator[tuple[Question, Any]]:
    """Yield each question with the model's answer, in the order of `questions`: of the form of `Task.mode`.

    Args:
        model: in eval mode.
        processor: of the model.
        questions: in any order; best grouped by sample.
        batch_size: dialogs (or options, in multiple choice) per batch.
        blind: replace the images by zeros.
        leave_out: called with each question that cannot be answered, and the reason; None: the reason is raised.

    Raises:
        RecordError: an image is broken, the template or the tokenizer refuses the text, or it is longer than the
            model's positions.
    """
    source = iter(questions)
    # Windows bound the memory for images, and are long enough to sort by length and to share images.
    while window := list(islice(source, WINDOW * batch_size)):
        pictures = _Pictures(model, processor, window, blind, batch_size)
        texts: dict[int, Any] = {}
        broken = {i: pictures.broken[id(q.sample)] for i, q in enumerate(window) if id(q.sample) in pictures.broken}
        for mode, write, do in _MODES:
            asked = {i: q for i, q in enumerate(window) if q.mode == mode and i not in broken}
            rows, refused = _encoded(write, model, processor, asked, pictures)
            broken |= refused
            asked = {i: q for i, q in asked.items() if i in rows}
            texts |= do(model, processor, asked, rows, pictures, batch_size) if asked else {}
        for i, error in sorted(broken.items()):
            if leave_out is None:
                raise error
            leave_out(window[i], error)
        yield from ((q, texts[i]) for i, q in enumerate(window) if i in texts)


def _encoded(
    write: Any, model: Any, processor: Any, questions: dict[int, Question], pictures: "_Pictures"
) -> tuple[dict[int, Any], dict[int, RecordError]]:
    """Encode the questions; return the rows, and the errors of questions that cannot be encoded."""
    rows: dict[int, Any] = {}
    broken: dict[int, RecordError] = {}
    for i, q in questions.items():
        try:
            with naming(q.sample.data, q.sample.where, q.sample.id, "text"):
                rows[i] = write(model, processor, q, pictures)
        except RecordError as error:
            broken[i] = error
    return rows, broken


class _Pictures:
    """The images of a window of questions, each encoded once."""

    def __init__(self, model: Any, processor: Any, window: Sequence[Question], blind: bool, batch_size: int) -> None:
        self.model, self.blind = model, blind
        self.of: dict[int, list[int]] = {}  # id of a sample -> indices of its images
        self.broken: dict[int, RecordError] = {}  # id of a sample -> why its images cannot be used
        self.shared = True  # features can be selected by image
        pixels: list[Any] = []
        blanks: dict[bool, int] = {}  # whether of videos -> index of the picture of zeros
        for question in window:
            sample = question.sample
            if id(sample) in self.of or id(sample) in self.broken:
                continue
            films = [isinstance(source, Video) for source in sample.images]
            try:
                with naming(sample.data, sample.where, sample.id, "image"):
                    # The blind model's images are one picture of zeros, of the shape of the first; so are its videos.
                    shown = [] if blind and blanks.keys() >= set(films) else processor.prepare(sample.images)
            except RecordError as error:
                self.broken[id(sample)] = error
                continue
            if blind:
                for film, picture in zip(films, shown, strict=False):
                    if film not in blanks:
                        blanks[film] = len(pixels)
                        pixels.append(blank(picture))
                self.of[id(sample)] = [blanks[film] for film in films]
            else:
                self.of[id(sample)] = list(range(len(pixels), len(pixels) + len(shown)))
                pixels += shown
        self.pixels = pixels
        self.parts = [self._encode(pixels[at : at + batch_size]) for at in range(0, len(pixels), batch_size)]
        self.encoded = _join(self.parts) if self.parts and self.shared else None

    def _encode(self, pixels: list[Any]) -> Any:
        self.shared = self.shared and self.model.layout is None
        if not self.shared:  # with a layout an image has several rows (crops, frames), so pixels are passed on
            return None
        return self.model.encode_images(torch.stack(pixels).to(self.model.device))

    def show(self, sample: Sample) -> list[Any]:
        """Return the processed images of a sample if its number of placeholders depends on them, else none."""
        return [] if self.shared else [self.pixels[i] for i in self.of[id(sample)]]

    def batch(self, which: Sequence[int]) -> dict[str, Any]:
        """Return the model's arguments for the images `which`, in this order."""
        if not which:
            return {}
        if not self.shared or self.encoded is None:
            return to_device(stack([self.pixels[i] for i in which]), self.model.device)
        index = torch.tensor(which, device=self.model.device)
        image, kept, tokens, valid, _ = self.encoded  # without a layout there is nothing behind the first layer
        assert image is not None, "there are images"
        # What is kept is None where it depends on the question.
        one, other = (None if x is None else x.picked(index) for x in (image, kept))
        own, stays = (None if x is None else x[index] for x in (tokens, valid))
        return {"encoded": Encoded(one, other, own, stays)}


@dataclass(frozen=True)
class _Prompt:
    """The key of a question: questions with equal tokens, images and length have equal answers."""

    max_new_tokens: int
    ids: bytes
    images: tuple[int, ...]
    shared: int  # bytes of `ids` up to the last image token

    @property
    def prefix(self) -> tuple[bytes, tuple[int, ...]]:
        return self.ids[: self.shared], self.images


def _prompts(model: Any, processor: Any, q: Question, pictures: _Pictures) -> tuple[_Prompt, EncodedSample]:
    """Encode a question for free generation; return its key and row."""
    row = processor.encode_prompt(q.sample, q.dialog, pixel_values=pictures.show(q.sample))
    row.pixel_values = []  # the batch takes them from `pictures`
    most = min(q.max_new_tokens, room_for_answer(row, model.llm.max_positions))
    shown = np.flatnonzero(row.input_ids == processor.image_token_id)
    shared = row.input_ids.itemsize * (int(shown[-1]) + 1) if len(shown) else 0
    return _Prompt(most, row.input_ids.tobytes(), tuple(pictures.of[id(q.sample)]), shared), row


def _options(model: Any, processor: Any, q: Question, pictures: _Pictures) -> list[tuple[str, EncodedSample]]:
    """Encode a question once for each option."""
    turns = q.dialog.messages
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    rows = []
    options = q.dialog.choices if q.candidates is None else q.candidates
    if not options:
        raise ZooError("the dialog has no options to choose from (`choices`).")
    for option in options:
        answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": option}]}]
        shown = pictures.show(q.sample)
        ids, last = processor.tokenize_dialog(answered, q.sample.id, shown, only_last=True)
        asked = processor.asked(answered, only_last=True)
        row = EncodedSample(ids, last, [], gap=processor.gap_of(ids, shown), asked=asked)
        rows.append((option, require_room(row, model.llm.max_positions)))
    return rows


@torch.no_grad()
def _generate(
    model: Any,
    processor: Any,
    questions: dict[int, Question],
    written: dict[int, tuple[_Prompt, EncodedSample]],
    pictures: _Pictures,
    batch_size: int,
) -> dict[int, str]:
    """Answer in free text by greedy decoding."""
    groups: dict[_Prompt, list[int]] = {}
    rows: dict[_Prompt, EncodedSample] = {}
    for i in questions:
        prompt, row = written[i]
        groups.setdefault(prompt, []).append(i)
        rows[prompt] = row
    # Questions about the same images share the prompt up to the last image token: its keys and values are computed once
    # and copied to the rows of a batch.
    prefixes = PrefixCache(model, pictures, batch_size)
    several = len({p.prefix for p in groups}) < len(groups)
    cached = several and PrefixCache.serves(model) and prefixes.read([p.prefix for p in groups if p.shared])
    texts: dict[int, str] = {}
    reader = reader_for(model, processor.template)
    for chunk in _batches(list(groups), batch_size, cached):
        batch = to_device(processor.collate([rows[p] for p in chunk], padding_side="left"), model.device)
        # Overrides the checkpoint's generation config, which may sample.
        fixed = {"max_new_tokens": chunk[0].max_new_tokens, "do_sample": False, "num_beams": 1}
        fixed |= {"num_return_sequences": 1, "return_dict_in_generate": False}
        fixed |= {"synced_gpus": False}  # of a model that FSDP shares out, transformers waits for all processes
        fixed |= {"tokenizer": processor.tokenizer} if model.generation_config.stop_strings else {}
        both = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **fixed}
        if cached and chunk[0].shared:
            out = model.generate(**both, cache=prefixes.rows([p.prefix for p in chunk]))
        else:
            images = [i for p in chunk for i in p.images]
            both |= {"questions": batch["questions"]} if "questions" in batch else {}
            out = model.generate(**both, images_per_row=[len(p.images) for p in chunk], **pictures.batch(images))
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        texts |= {i: reader.read(ids) for p, ids in zip(chunk, new, strict=True) for i in groups[p]}
    return texts


def _batches(prompts: list[_Prompt], batch_size: int, cached: bool) -> Iterator[list[_Prompt]]:
    """Group prompts that can share a batch: of similar length, and with cached prefixes of equal length.

    A cached prefix has no padding, so its rows must begin and end at the same positions.
    """

    def alike(prompt: _Prompt) -> tuple[int, ...]:
        equal = (len(prompt.ids), prompt.shared) if cached and prompt.shared else (0, 0)
        return prompt.max_new_tokens, *equal

    prompts = sorted(prompts, key=lambda p: (alike(p), len(p.ids)))
    for _, same in groupby(prompts, key=alike):
        some = list(same)
        yield from (some[at : at + batch_size] for at in range(0, len(some), batch_size))


@torch.no_grad()
def _choose(
    model: Any,
    processor: Any,
    questions: dict[int, Question],
    written: dict[int, list[tuple[str, EncodedSample]]],
    pictures: _Pictures,
    batch_size: int,
) -> dict[int, str]:
    """Answer with the most likely option: the one whose tokens, end of turn included, have the largest probability.

    The answer of a broken model, which gives NaN, is empty: the first option would often be right.
    """
    scored = _score(model, processor, questions, written, pictures, batch_size)
    broken = {i for i, some in scored.items() if any(map(isnan, some.values()))}
    return {i: "" if i in broken else max(some, key=some.__getitem__) for i, some in scored.items()}


@torch.no_grad()
def _score(
    model: Any,
    processor: Any,
    questions: dict[int, Question],
    written: dict[int, list[tuple[str, EncodedSample]]],
    pictures: _Pictures,
    batch_size: int,
) -> dict[int, dict[str, float]]:
    """Return the log-probability of each option's tokens, end of turn included."""
    options = [(i, option, row) for i in questions for option, row in written[i]]
    options.sort(key=lambda o: len(o[2]))
    found: dict[int, dict[str, float]] = {}
    for at in range(0, len(options), batch_size):
        chunk = options[at : at + batch_size]
        batch = to_device(processor.collate([o[2] for o in chunk]), model.device)
        images = [pictures.of[id(questions[i].sample)] for i, _, _ in chunk]
        batch["images_per_row"] = [len(some) for some in images]
        out = model(**batch, **pictures.batch([i for some in images for i in some]), **LOSS_ALONE)
        for (i, option, _), value in zip(chunk, _likelihood(model, out).tolist(), strict=True):
            found.setdefault(i, {})[option] = value
    return found


@torch.no_grad()
def _embed(
    model: Any,
    processor: Any,
    questions: dict[int, Question],
    written: dict[int, tuple[_Prompt, EncodedSample]],
    pictures: _Pictures,
    batch_size: int,
) -> dict[int, list[float]]:
    """Return the hidden state behind the last token of each prompt: C numbers. Pruners never drop that token."""
    found: dict[int, list[float]] = {}
    for layer in {q.layer for q in questions.values()}:
        if layer > model.llm.num_layers:
            raise ZooError(f"layer must be at most {model.llm.num_layers}, the layers of this LLM, got {layer}.")
        asked = sorted((i for i in questions if questions[i].layer == layer), key=lambda i: len(written[i][0].ids))
        for at in range(0, len(asked), batch_size):
            chunk = asked[at : at + batch_size]
            prompts = [written[i][0] for i in chunk]
            batch = to_device(processor.collate([written[i][1] for i in chunk], padding_side="left"), model.device)
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "questions") if k in batch}
            inputs |= pictures.batch([i for p in prompts for i in p.images]) | dict(LOSS_ALONE)
            shown = [len(p.images) for p in prompts]
            out = model(**inputs, images_per_row=shown, output_hidden_states=layer >= 0)
            states = out.last_hidden_state if layer < 0 else out.hidden_states[layer]
            found |= dict(zip(chunk, states[:, -1].float().tolist(), strict=True))
    return found


_MODES: tuple[tuple[str, Callable[..., Any], Callable[..., dict[int, Any]]], ...] = (
    ("generate", _prompts, _generate),
    ("choice", _options, _choose),
    ("scores", _options, _score),
    ("hidden", _prompts, _embed),
)


def _likelihood(model: Any, out: Any) -> Tensor:
    """Return the log-probability of the labels of each row: (B,)."""
    wanted = out.labels[:, 1:]
    where = wanted != IGNORE_INDEX  # (B, T - 1)
    # Logits at labelled positions only: those of whole prompts would take (B, T, V).
    logits = model.llm.head(out.last_hidden_state[:, :-1][where]).float()  # (S, V)
    each = -F.cross_entropy(logits, wanted[where], reduction="none")  # (S,)
    return torch.zeros(len(wanted), device=each.device).index_add_(0, where.nonzero()[:, 0], each)


def _join(parts: list[Encoded]) -> Encoded:
    image, kept, tokens, valid, _ = zip(*parts, strict=True)
    if any(x is not None for x in valid):  # an image without marks keeps all of its tokens
        valid = tuple(t.new_ones(t.shape[:2]).bool() if x is None else x for x, t in zip(valid, tokens, strict=True))
    own, stays = (None if x[0] is None else torch.cat(x) for x in (tokens, valid))
    left = None if kept[0] is None else ImageFeatures.joined(kept)
    return Encoded(ImageFeatures.joined(image), left, own, stays)
