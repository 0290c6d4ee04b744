"""Rules for distillers, each built alone; its losses are tried in a model."""

from typing import Any

import torch

from zoo.contracts.case import Case, add_options_rule
from zoo.contracts.rules import NotForThisPart, Rules, expect
from zoo.registry import Distiller, build, nearest
from zoo.registry.llm_parts import OF_DISTILLERS as NEEDS

RULES = Rules()


class DistillerCase(Case):
    """A distiller of a student with 4 x 4 image tokens."""

    def build(self, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        derived = {"vision_dim": 24, "text_dim": 40, "vocab_size": 97, "grid": (4, 4)}
        return build("distiller", {**self.node, **options}, **derived)


@RULES.add("needs", "its `needs` are words that the zoo gives")
def needs(case: DistillerCase) -> str:
    distiller = case.build()
    expect(isinstance(distiller, Distiller), f"its class is {type(distiller).__mro__[1].__name__}", "a Distiller")
    for word in sorted(distiller.needs):
        near = nearest(word, NEEDS)
        meant = f"{near[0]!r}" if near else f"one of {', '.join(NEEDS)}, batch.<key>"
        expect(word in NEEDS or word.startswith("batch."), f"needs {word!r}", meant)
    return ", ".join(sorted(distiller.needs)) or "nothing"


@RULES.add("schedule", "begin_step sets its weights in any order: they follow from the step alone")
def schedule(case: DistillerCase) -> str:
    distiller = case.build()
    seen = []
    for step in (0, 5, 9, 5, 0):
        distiller.begin_step(step, 10)
        seen.append(dict(distiller.weights))
    expect(seen[1] == seen[3] and seen[0] == seen[4], f"weights at step 5 are {seen[1]}, later {seen[3]}", "equal")
    if not seen[0]:
        raise NotForThisPart("it declares no weights")
    return f"{', '.join(seen[0])}"


add_options_rule(RULES)
