"""Models of the zoo in VLMEvalKit: a class with `generate_inner`, for its table of models.

from functools import partial
from zoo.evaluation.vlmevalkit import ZooVLM
supported_VLM["llava15_7b_zoo"] = partial(ZooVLM, model_path="llava15_7b", dtype="bfloat16")
supported_VLM["llava15_7b_zoo_144"] = partial(ZooVLM, model_path="llava15_7b", pruner="fastervlm:llava15_144")
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from zoo.registry import Dialog, Sample, ZooError


def _base() -> type:
    """Return VLMEvalKit's base class if it is installed; it adds `generate`, which calls `generate_inner`."""
    if find_spec("vlmeval") is None:
        return object
    from vlmeval.vlm.base import BaseModel

    return BaseModel


class ZooVLM(_base()):  # type: ignore[misc]
    """A composed model as a VLMEvalKit model.

    Args:
        model_path: as for `zoo.load`: a preset, `dir:<folder>`, `hub:<org>/<name>`.
        pruner: `fastervlm:keep_ratio=0.25`, `fastervlm:llava15_144`, `null`, ...: see `pruner_words`.
        positions: of image tokens that a pruner left: kept or dense.
        overrides: further options, as words: `["adapter=null"]`.
        max_new_tokens: maximum length of an answer.
        options: `device`, `dtype`, `attention` of `zoo.load`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True
    VIDEO_LLM = False

    def __init__(
        self,
        model_path: str = "scenes_tiny",
        overrides: Sequence[str] = (),
        max_new_tokens: int = 256,
        pruner: str | None = None,
        positions: str | None = None,
        **options: Any,
    ) -> None:
        from zoo.evaluation.harness_options import pruner_words
        from zoo.loading.build import load

        super().__init__()
        self.model, self.processor = load(model_path, *pruner_words(pruner, positions), *overrides, **options)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Answer one message: parts `{"type": "image" | "text", "value": ...}` in order."""
        from zoo.evaluation.predict import Question, answer

        content: list[dict[str, Any]] = []
        shown: list[Any] = []
        for part in message:
            if part["type"] == "image":
                content.append({"type": "image"})
                shown.append(part["value"])
            elif part["type"] == "text":
                content.append({"type": "text", "text": part["value"]})
            else:
                raise ZooError(f"A part of type {part['type']!r} was given; images and text are supported.")
        dialog = Dialog([{"role": "user", "content": content}])
        asked = Question(Sample("one", shown, [dialog]), dialog, "generate", self.max_new_tokens)
        return next(iter(answer(self.model, self.processor, [asked], batch_size=1)))[1]
