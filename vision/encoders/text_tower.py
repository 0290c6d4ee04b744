"""The text side of a contrastive model, for parts that compare patches with texts (the capability `text_tower`).

It holds the text tower, and what turns a patch into a vector of the space that images and texts share. CLIP trained
that for the last layer's [CLS] alone, SigLIP for the output of its pooling head; applying it to patches follows
CDPruner (arXiv:2506.10967), whose released code does so for CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import ZooError, first_line
from zoo.registry.foreign import require_file
from zoo.vision.encoders.buffers import as_buffers

FOLDER = "text_tower"  # of its tokenizer, in the folder of a saved model
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_MOST = 64 << 20  # bytes of a tokenizer's file


class TextTower(nn.Module):
    """Embeds texts and patches in one space.

    Its weights are buffers, in the data type they were read in: choosing tokens by it has no gradient to train it.

    Args:
        model: ids (Q, L) -> an object with `text_embeds` or `pooler_output`, or a tensor, (Q, P).
        project: patches (M, N, D) -> (M, N, P) float32.
        tokenizer: see `Words`; None: not read yet.
        length: most ids of a piece of text.
        pad_to_length: whether shorter pieces are padded to `length`, as SigLIP was trained and open_clip runs.
    """

    def __init__(
        self, model: nn.Module, project: nn.Module, tokenizer: Words | None, length: int, pad_to_length: bool = False
    ) -> None:
        super().__init__()
        self.model, self.project = model, project
        self.words, self.length, self.pad_to_length = tokenizer, length, pad_to_length
        as_buffers(self)
        self.eval()

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)

    @torch.no_grad()
    def patches(self, tokens: Tensor) -> Tensor:
        """Embed patches (M, N, D) in the shared space: (M, N, P) float32."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.project(tokens.detach())

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """Embed texts: (S, P) float32 for each, S pieces of at most `length` ids with the beginning and end of a text.

        A text without words is one piece of no words.

        Raises:
            ZooError: there is no tokenizer.
        """
        if self.words is None:
            raise ZooError("The text tower has no tokenizer: load the model from the folder it was saved to.")
        known = {text: self.words.pieces(text, self.length) for text in dict.fromkeys(texts)}
        rows = [piece for pieces in known.values() for piece in pieces]
        if not rows:
            return []
        width = self.length if self.pad_to_length else max(map(len, rows))
        ids = torch.full((len(rows), width), self.words.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        device = next(self.project.buffers()).device
        with torch.autocast(device.type, enabled=False):
            out = self.model(ids.to(device))
        found = getattr(out, "text_embeds", None)
        found = getattr(out, "pooler_output", None) if found is None else found
        vectors = (out if found is None else found).float()  # (Q, P)
        parts = dict(zip(known, vectors.split([len(pieces) for pieces in known.values()]), strict=True))
        return [parts[text] for text in texts]


class Words:
    """Texts to pieces of ids.

    Args:
        encode: text -> ids without the tokens that begin and end a text.
        begin, end: ids of those tokens, () for none.
        pad: id behind the end of shorter pieces.
        save: writes the tokenizer's files into a folder; None: it needs none.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        begin: Sequence[int],
        end: Sequence[int],
        pad: int,
        save: Callable[[Path], Any] | None = None,
    ) -> None:
        self.encode, self.begin, self.end, self.pad, self.save = encode, list(begin), list(end), pad, save

    def pieces(self, text: str, length: int) -> list[list[int]]:
        """Cut the ids of a text into pieces of at most `length`, each with the tokens that begin and end a text."""
        ids, room = self.encode(text), length - len(self.begin) - len(self.end)
        starts = range(0, max(1, len(ids)), room)
        return [[*self.begin, *ids[at : at + room], *self.end] for at in starts]

    @classmethod
    def of_transformers(cls, tokenizer: Any, pad: int | None = None) -> Words:
        """Take a tokenizer of transformers; which tokens begin and end a text is read off an empty one."""
        own = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        empty = list(tokenizer("")["input_ids"])
        ends = len(empty) - (empty[-1:] == [tokenizer.eos_token_id])
        return cls(
            partial(_ids, tokenizer),
            empty[:ends],
            empty[ends:],
            own if pad is None else pad,
            tokenizer.save_pretrained,
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def has_words(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any(all((folder / name).is_file() for name in names) for names in (FILES[:1], FILES[-2:]))


def read_words(folder: Path, pad: int | None = None) -> Words | None:
    """Read a tokenizer of transformers from JSON and text files; None where the folder has none.

    Raises:
        ZooError: its files cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_words(folder):
        return None
    for file in (folder / name for name in FILES if (folder / name).is_file()):
        require_file(file, _MOST)
    try:
        return Words.of_transformers(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False), pad)
    except (Exception, BaseException) as error:  # tokenizers, in Rust, raises various classes, and panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ZooError(
            f"The tokenizer of the text tower in {str(folder)!r} cannot be read: {first_line(error)}"
        ) from error


class Linear(nn.Module):
    """CLIP's way into the shared space: the final norm, where it was not applied yet, and a projection without bias.

    Both in float32, as the released code of CDPruner computes them.
    """

    def __init__(self, width: int, to: int, eps: float, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps) if norm else None
        self.weight = nn.Parameter(torch.zeros(to, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()  # (M, N, D)
        if self.norm is not None:
            x = F.layer_norm(
                x, self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps
            )
        return F.linear(x, self.weight.float())  # (M, N, P)


class Pooled(nn.Module):
    """SigLIP's way into the shared space: final norm and pooling head, of each patch as if it were the only one."""

    def __init__(self, head: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.head, self.norm = head, norm

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.to(next(self.buffers()).dtype)
        x = x if self.norm is None else self.norm(x)  # (M, N, D)
        return self.head(x.flatten(0, 1).unsqueeze(1)).view(*x.shape[:2], -1).float()  # (M, N, P)
