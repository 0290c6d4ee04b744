"""What is asked about the images of a pass, for parts that choose image tokens by the question.

The processor writes it into the batch (`questions`), where it knows the turns. A caller of plain `forward` or
`generate` may pass `questions=[...]`, a text for each row. Where neither is there, it is read from the ids: the text
behind a row's last image token and before its first label, with the words of the chat template around it; of a packed
row that of each sample.

A pass that continues a cache keeps what was chosen for the turns in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.composed.inputs import Inputs
from zoo.registry import IGNORE_INDEX, Asked, Cut, Encoder, LanguageModel, Layout, Question, ZooError


@dataclass
class _Prompt:
    """The question of one prompt: its text, or its tokens, or both."""

    images: int
    text: str | None = None
    ids: Tensor | None = None  # (L,)
    embeds: Tensor | None = None  # (L, C), where there are no ids


class QuestionMixin(nn.Module):
    """Makes the `Question` of the images of a pass."""

    asks: bool  # whether a part needs it
    requested: frozenset[str]
    vision: Encoder | None
    layout: Layout | None
    llm: LanguageModel
    num_image_tokens: int
    _placeholders: Any
    _placeholders_among: Any
    _tokenizer: Any

    def question_of(
        self, given: Inputs, cuts: Sequence[Cut] | None, rows: int, device: torch.device
    ) -> Question | None:
        """Return what a pass asks about its images; None if that is not known.

        Args:
            given: with the questions, or the ids to read them from.
            cuts: of each image, where images have rows of their own.
            rows: of the features, M.
            device: of the features.

        Raises:
            ZooError: the questions do not fit to the images, or several dialogs of a row share an image.
        """
        images = rows if cuts is None else len(cuts)
        if given.questions is not None:
            prompts = self._asked(given, cuts, images)
        elif given.input_ids is not None or given.inputs_embeds is not None:
            prompts = self._read(given, cuts, images)
        else:
            return None
        if (found := sum(p.images for p in prompts)) != images:
            raise ZooError(f"The questions are about {found} images, and there are {images}.")
        owner = [i for i, prompt in enumerate(prompts) for _ in range(prompt.images)]  # of each image
        if cuts is not None:
            owner = [i for i, cut in zip(owner, cuts, strict=True) for _ in range(cut.rows)]
        return self._made(prompts, device).picked(torch.tensor(owner, device=device, dtype=torch.long))

    def no_question(self, device: torch.device) -> Question:
        """Return the empty question of one image."""
        return self._made([_Prompt(1, "", torch.zeros(0, dtype=torch.long))], device)

    @torch.no_grad()
    def _made(self, prompts: Sequence[_Prompt], device: torch.device) -> Question:
        """Make the question of each prompt, in one batch."""
        made = Question(torch.arange(len(prompts), device=device))
        if not any(prompt.text is None for prompt in prompts):
            made.texts = tuple(prompt.text or "" for prompt in prompts)
        self._tokenize(prompts)
        if prompts and all(p.ids is not None for p in prompts):
            made.ids, made.mask = padded([p.ids for p in prompts if p.ids is not None], device)  # (Q, L)
            made.embeds = self.llm.embed(made.ids)  # (Q, L, C)
        elif prompts and all(p.embeds is not None for p in prompts):
            made.embeds, made.mask = padded([p.embeds for p in prompts if p.embeds is not None], device)
        if "text_tower" in self.requested and self.vision is not None:
            made.texts = made.texts or self._decoded(prompts)
            made.text_embeds, made.text_mask = padded(self.vision.embed_texts(made.texts), device)  # (Q, S, P)
        return made

    def _tokenize(self, prompts: Sequence[_Prompt]) -> None:
        """Tokenize texts, where the model has its tokenizer."""
        left = [p for p in prompts if p.ids is None and p.text is not None]
        if not left:
            return
        try:
            tokenizer = self._tokenizer()
        except ZooError:
            return
        for prompt in left:
            prompt.ids = torch.tensor(tokenizer(prompt.text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def _decoded(self, prompts: Sequence[_Prompt]) -> tuple[str, ...]:
        """Return the texts of prompts whose tokens alone are known."""
        ids = [p.ids for p in prompts]
        try:
            tokenizer = self._tokenizer()
        except ZooError:
            tokenizer = None
        if tokenizer is None or any(i is None for i in ids):
            raise ZooError(
                "A part of the model compares images with the text of the question, which is not known here: pass "
                "questions=[...], a text for each row."
            )
        return tuple(tokenizer.decode(i.tolist(), skip_special_tokens=True).strip() for i in ids if i is not None)

    # ---- which text, and about which images ------------------------------------------------------------------------

    def _asked(self, given: Inputs, cuts: Sequence[Cut] | None, images: int) -> list[_Prompt]:
        """Return the questions that were given, with the number of images of each."""
        questions = given.questions
        if isinstance(questions, str) or not all(isinstance(q, (str, Asked)) for q in questions or ()):
            raise ZooError(f"questions must be a list of texts, one for each row, got {questions!r}.")
        asked = [q if isinstance(q, Asked) else Asked(q) for q in questions or ()]
        counts = [a.images for a in asked if a.images is not None]
        if len(counts) != len(asked):
            counts = self._counted(given, cuts, images)
        if len(counts) != len(asked):
            raise ZooError(f"{len(asked)} questions for {len(counts)} rows: pass one for each.")
        ids = [None if a.ids is None else torch.tensor(a.ids, dtype=torch.long) for a in asked]
        return [_Prompt(n, a.text, i) for a, n, i in zip(asked, counts, ids, strict=True)]

    def _counted(self, given: Inputs, cuts: Sequence[Cut] | None, images: int) -> list[int]:
        """Count the images of each row of ids."""
        if given.images_per_row is not None:
            return list(given.images_per_row)
        if given.input_ids is None and given.inputs_embeds is None:
            return [1] * images
        slots = self._slots(given).sum(1).tolist()
        return self._shared_out(slots, cuts, images)

    def _shared_out(self, slots: Sequence[int], cuts: Sequence[Cut] | None, images: int) -> list[int]:
        """Count the images of each prompt by its number of placeholders."""
        if self.layout is not None and cuts is not None:
            left, counts = list(cuts), []
            for found in slots:
                before = len(left)
                while found > 0 and left:
                    found -= self.layout.count(left.pop(0))
                counts.append(before - len(left))
            return counts
        if self.num_image_tokens:
            return [found // self.num_image_tokens for found in slots]
        if images == len(slots):
            return [1] * images
        raise ZooError(f"{images} images for {len(slots)} rows without placeholders: pass images_per_row.")

    def _slots(self, given: Inputs) -> Tensor:
        ids = given.input_ids
        return self._placeholders_among(given.inputs_embeds) if ids is None else self._placeholders(ids)

    def _read(self, given: Inputs, cuts: Sequence[Cut] | None, images: int) -> list[_Prompt]:
        """Read the question of each row, or of each sample of a packed row, from its tokens."""
        if given.block_ids is not None and int(given.block_ids.max()) > 1:
            raise ZooError(
                "A part of the model chooses image tokens by the question, and here several dialogs of a row share an "
                "image. Set pack=none in the stage, and no pack_length."
            )
        slots = self._slots(given).cpu()  # (B, T)
        b, t = slots.shape
        mask = given.attention_mask
        valid = torch.ones(b, t, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= t:
            valid = mask[:, -t:].bool().cpu()
        segments = torch.zeros(b, t, dtype=torch.long) if given.segment_ids is None else given.segment_ids.cpu()
        learnt = torch.zeros_like(valid) if given.labels is None else given.labels.cpu() != IGNORE_INDEX
        spans: list[tuple[int, Tensor]] = []  # of each prompt its row, and (T,) its columns
        for row in range(b):
            inside = sorted(set(segments[row][valid[row]].tolist())) or [0]
            spans += [(row, valid[row] & (segments[row] == s)) for s in inside if s >= 0]
        if given.images_per_row is not None and len(spans) == b:
            counts = list(given.images_per_row)
        else:
            counts = self._shared_out([int((slots[row] & own).sum()) for row, own in spans], cuts, images)
        prompts = []
        for (row, own), count in zip(spans, counts, strict=True):
            at = _question_columns(own, slots[row], learnt[row])
            known = given.input_ids if given.input_ids is not None else given.inputs_embeds
            assert known is not None, "one of them is there"
            chosen = known[row, at.to(known.device)]
            if given.input_ids is not None:
                prompts.append(_Prompt(count, ids=chosen.cpu()))
            else:
                prompts.append(_Prompt(count, embeds=chosen.detach()))
        return prompts


def _question_columns(own: Tensor, slots: Tensor, learnt: Tensor) -> Tensor:
    """Return the columns of a question: (L,) int64.

    Args:
        own: (T,) bool, of the prompt.
        slots: (T,) bool, placeholders.
        learnt: (T,) bool, labels.
    """
    column = torch.arange(len(own))
    shown = column[own & slots]
    last = int(shown[-1]) if len(shown) else -1
    labels = column[own & learnt & (column > last)]
    end = int(labels[0]) if len(labels) else len(own)
    return column[own & ~slots & (column > last) & (column < end)]


def padded(parts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack (L, ...) of unlike lengths with zeros behind: (Q, L, ...), and where they are (Q, L) bool."""
    longest = max((len(p) for p in parts), default=0)
    values = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:], device=device)
    mask = torch.zeros(len(parts), longest, dtype=torch.bool, device=device)
    for i, part in enumerate(parts):
        values[i, : len(part)], mask[i, : len(part)] = part.to(device), True
    return values, mask
