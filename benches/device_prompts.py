"""Prompts of `zoo bench device`: prefill and decoding of the 7B model, with and without each pruner."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from zoo.benches.device import DevicePlace
from zoo.benches.device_models import SIZES, made, with_pruner
from zoo.benches.measure import Value
from zoo.benches.prune_models import Variant
from zoo.benches.prune_options import NONE
from zoo.benches.prune_options import Options as PruneOptions
from zoo.composed.inputs import Inputs
from zoo.registry import Asked

# Image tokens of a prompt -> images, pixels of each: one image; an overview with four crops; 32 frames of 14 x 14.
SHAPES = {576: (1, 336), 2880: (5, 336), 6272: (32, 196)}
TINY = {576: (1, 16), 2880: (3, 16), 6272: (4, 8)}
TEXT, NEW = 64, 16  # tokens of text in a prompt, and generated in a turn


@dataclass
class ManyImages(Variant):
    """A prompt of several images."""

    images: int = 1

    def read(self, ids: torch.Tensor, shown: Any) -> Any:
        with torch.no_grad():
            counts = [self.images] * len(ids)
            return self.model(input_ids=ids, encoded=shown, images_per_row=counts, use_cache=True, logits_to_keep=1)

    def _question(self) -> Any:
        if not self.model.asks:
            return None
        asked = [Asked("", tuple(row.tolist()), images=self.images) for row in self.text]
        return self.model.question_of(Inputs(questions=asked), None, len(self.pixels), self.text.device)


def prompts(place: DevicePlace, tokens: int) -> None:
    """Measure prompts of so many image tokens: without a pruner first, then each pruner, one prompt before several."""
    images, pixels = (TINY if place.tiny else SHAPES)[tokens]
    sizes = replace(SIZES[place.options.sizes]["7b"], image_size=pixels)
    kept = place.kept.pop("prompts", None)
    base = kept[1] if kept and kept[0] == pixels else None
    if base is None:
        kept = None  # one model at a time
        place.clean()
        place.show("  building the model")
        base = made(sizes, place.device, torch.bfloat16).eval().requires_grad_(False)
        place.begin()
    place.kept["prompts"] = (pixels, base)
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    options = PruneOptions(keep_ratio=place.options.keep_ratio)
    grid = (pixels // sizes.patch_size,) * 2
    asked = [(batch, name) for batch in place.options.prompts for name in [NONE, *place.options.pruners]]
    plain: dict[int, Value] = {}  # number of prompts -> seconds of their prefill without a pruner
    for number, (batch, name) in enumerate(asked):
        if number and place.left <= 0:
            place.left_out.append(f"no time: {', '.join(f'{n} of {b}' for b, n in asked[number:])}")
            break
        with place.trying(f"{name}, {batch} prompts"):
            node = options.node(name, grid)
            model = base if node is None else with_pruner(base, sizes, name, node)
            what = f"{tokens} image tokens, {batch} prompt{'s' * (batch > 1)}, {name}"
            took = _measure(
                place, what, _prompt(place, model, name, batch, images), len(asked) - number, plain.get(batch)
            )
            if name == NONE:
                plain[batch] = took
    if place.device.type == "cuda":
        note = f"largest of the section; attention {base.llm.lm.config.get_text_config()._attn_implementation}"
        place.row(f"{tokens} image tokens: memory", Value.one(torch.cuda.max_memory_allocated() / 1e9), " GB", note)


def _measure(place: DevicePlace, what: str, prompt: ManyImages, parts: int, plain: Value | None) -> Value:
    """Write down prefill and decoding of a prompt, in one of `parts` of the time that is left; return the prefill."""
    cache = prompt.after().cache
    entered = prompt.tokens_of(cache)
    took = place.seconds(prompt.after, 1 / parts / 2, most=5, warm=True)
    speed = f", {plain.median / took.median:.2f}x the speed" if plain else ""
    place.row(f"{what}: prefill", took.over(1e-3), " ms", f"{sum(entered) / len(entered):.0f} tokens in a layer{speed}")
    step = place.seconds(partial(prompt.decode, cache, NEW), 1 / parts / 2, most=3)
    place.row(f"{what}: decoding", step.over(1e-3 * NEW), " ms", f"a token of each, {NEW} in a turn")
    return took


def _prompt(place: DevicePlace, model: Any, name: str, batch: int, images: int) -> ManyImages:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(8, model.llm.vocab_size, (batch, TEXT // (8 if place.tiny else 1)), generator=generator)
    pixels = torch.randn((batch * images, *model.vision.transform.shape), generator=generator)
    here = pixels.to(place.device, torch.bfloat16)
    found = ManyImages.of(name, model, here, text.to(place.device))
    return ManyImages(name, model, here, found.text, found.features, images=images)
