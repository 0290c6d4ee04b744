"""Models of the zoo in lmms-eval: images and a question in, free text or a likelihood out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
import torch.nn.functional as F
from lmms_eval.api.model import lmms
from tqdm import tqdm

from zoo.composed.outputs import LOSS_ALONE
from zoo.evaluation.harness_options import pruner_words
from zoo.evaluation.predict import Question, answer
from zoo.loading.build import load
from zoo.registry import IGNORE_INDEX, Dialog, Sample, ZooError
from zoo.vision.images.video import VIDEOS, Video, as_video


class ZooLmms(lmms):
    """A composed model as an lmms-eval model.

    Args:
        model: as for `zoo.load`: a preset, `dir:<folder>`, `hub:<org>/<name>`.
        pruner: `fastervlm:keep_ratio=0.25`, `fastervlm:llava15_144`, `null`, ...: see `pruner_words`.
        positions: of image tokens that a pruner left: kept or dense.
        overrides: further options, separated by semicolons: `vision.layer=-1;adapter=null`.
        batch_size: dialogs at once.
        device, dtype, attention: see `zoo.load`.
        max_new_tokens: of tasks that do not set it.
    """

    is_simple = True

    def __init__(
        self,
        model: str = "scenes_tiny",
        overrides: str = "",
        pruner: str | None = None,
        positions: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            known = "model, pruner, positions, overrides, device, dtype, attention, max_new_tokens"
            raise ZooError(f"Unknown model_args {', '.join(sorted(kwargs))}; there are {known}.")
        words = pruner_words(pruner, positions)
        words += [word for word in str(overrides).split(";") if word]  # lmms-eval splits model_args at commas
        self.model, self.processor = load(model, *words, device=device, dtype=dtype, attention=attention)
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.max_new_tokens = int(max_new_tokens)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer by greedy decoding; answers end before the strings of `until`."""
        stops = [_stops(request.args[1]) for request in requests]
        questions = map(self._question, requests, map(str, range(len(requests))))  # images of a window at a time
        texts = []
        found = answer(self.model, self.processor, questions, batch_size=self.batch_size)
        for (_, text), stop in zip(tqdm(found, total=len(requests), desc="zoo"), stops, strict=True):
            texts.append(_until(text, stop))
        return texts

    def _question(self, request: Any, name: str) -> Question:
        context, options, doc_to_visual, doc_id, task, split = request.args
        shown = _shown(doc_to_visual, self.task_dict[task][split][doc_id])
        most = int(options.get("max_new_tokens") or self.max_new_tokens)
        dialog = _dialog(context, shown)
        return Question(Sample(name, shown, [dialog]), dialog, "generate", most)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the mean negative log-likelihood of each answer's tokens, and whether greedy decoding gives it."""
        results = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            target = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
            shown = _shown(doc_to_visual, doc)
            dialog = _dialog(context, shown, str(target))
            row = self.processor.encode(Sample("one", shown, [dialog]))
            results.append(self._likelihood(self.processor.collate([row])))
        return results

    @torch.no_grad()
    def _likelihood(self, batch: Mapping[str, Any]) -> tuple[float, bool]:
        device = self.model.device
        given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        out = self.model(**given, **LOSS_ALONE)
        wanted = out.labels[:, 1:]
        where = wanted != IGNORE_INDEX
        logits = self.model.llm.head(out.last_hidden_state[:, :-1][where]).float()
        same = bool((logits.argmax(-1) == wanted[where]).all())
        return float(F.cross_entropy(logits, wanted[where])), same

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds, each of which depends on the previous answer."""
        raise ZooError("The zoo's adapter answers one round; tasks of several rounds are not supported.")


def _shown(doc_to_visual: Any, doc: Any) -> list[Any]:
    found = doc_to_visual(doc) if callable(doc_to_visual) else doc_to_visual
    several = isinstance(found, Iterable) and not isinstance(found, str)
    shown = [] if found is None else list(found) if several else [found]
    return [as_video(s) if isinstance(s, str) and PurePath(s).suffix.lower() in VIDEOS else s for s in shown]


def _dialog(context: str, shown: Sequence[Any], target: str | None = None) -> Dialog:
    # Tasks mark images in the text in different ways, or not at all: images come first.
    kinds = [{"type": "video" if isinstance(s, Video) else "image"} for s in shown]
    content = [*kinds, {"type": "text", "text": context.replace("<image>", "").strip()}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if target is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": target}]})
    return Dialog(messages)


def _stops(options: Mapping[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text
