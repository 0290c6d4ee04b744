"""Drawn scenes and their captions, to find one by the other.

For task `recall`, a sample is a picture or a caption, each with the prompt that E5-V embeds (Jiang et al.,
arXiv:2407.12580). For task `rerank`, a sample is a picture with several captions, its own and those of others, and the
question of each is whether it fits.
"""

from dataclasses import dataclass
from typing import Any

from zoo.registry import Dataset, Dialog, Sample, ZooError, build, register

TASKS = ("recall", "rerank")


@dataclass
class RetrievalConfig:
    task: str = "recall"  # recall: pictures and captions by themselves; rerank: captions to choose from
    pairs: int = 100  # pictures, each with its caption
    others: int = 4  # captions of other pictures among which rerank looks for the right one
    size: int = 64  # side of a picture in pixels
    difficulty: int = 1  # of the scenes: 0, 1 or 2
    split: str = "eval"  # of the scenes: train | eval
    seed: int = 0  # of the scenes

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ZooError(f"task must be {' or '.join(TASKS)}, got {self.task!r}.")
        if self.pairs < 2 or not 1 <= self.others < self.pairs:
            raise ZooError(f"pairs must be 2 or more and others from 1 to below it, got {self.pairs}, {self.others}.")


@register("dataset", "retrieval")
class Retrieval(Dataset):
    """Caption i belongs to picture i."""

    def __init__(self, config: RetrievalConfig) -> None:
        self.config = config
        node: dict[str, Any] = {"name": "scenes", "scenes": config.pairs, "eval_scenes": config.pairs, "grid": 0}
        node |= {key: getattr(config, key) for key in ("split", "size", "difficulty", "seed")}
        self.scenes = build("dataset", {**node, "questions": {"caption": 1}})

    def __len__(self) -> int:
        return self.config.pairs * (2 if self.config.task == "recall" else 1)

    def get(self, index: int, epoch: int = 0) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.config.task == "rerank":
            return self._candidates(index)
        pair, text = divmod(index, 2)
        scene, caption = self._pair(pair)
        if text:
            asked = [{"type": "text", "text": f"{caption}\nSummary above sentence in one word:"}]
        else:
            asked = [{"type": "image"}, {"type": "text", "text": "Summary above image in one word:"}]
        dialog = _dialog(asked, caption, caption, "recall")  # pictures of equal captions belong together
        return Sample(f"pair-{pair}-{'text' if text else 'image'}", [] if text else scene.images, [dialog])

    def _candidates(self, pair: int) -> Sample:
        scene, own = self._pair(pair)
        dialogs = []
        for step in range(self.config.others + 1):  # its own, and those of the pictures behind it
            caption = self._pair((pair + step) % self.config.pairs)[1]
            question = {"type": "text", "text": f"Does this describe the picture: {caption}"}
            fits = "yes" if caption == own else "no"  # of many pictures, two may have the same
            dialogs.append(_dialog([{"type": "image"}, question], fits, f"pair-{pair}", "rerank"))
        return Sample(f"pair-{pair}", scene.images, dialogs)

    def _pair(self, index: int) -> tuple[Sample, str]:
        scene = self.scenes.get(index)
        caption = next(dialog for dialog in scene.dialogs if dialog.kind == "caption")
        return scene, caption.messages[-1]["content"][0]["text"]


def _dialog(asked: list[dict[str, Any]], answer: str, group: str, task: str) -> Dialog:
    messages = [{"role": "user", "content": asked}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Dialog(messages, kind=task, task=task, meta={"group": group})
