"""`zoo bench generate model=NAME`: a named model against its language model in plain transformers, LoRA by PEFT.

Both decode behind the same image tokens and text: ours from ids and pixels, theirs from their embeddings. LoRA is a
term beside the layers on both sides, as loaded, and then added to the weights on both sides.
"""

from collections.abc import Callable
from typing import Any

import torch

from zoo.benches.measure import Clock, Plain, Value, interleave
from zoo.benches.report import Row
from zoo.registry import ZooError


def named_rows(options: Any, device: torch.device, clock: Clock) -> list[Row]:
    """Measure decoding of `options.model`, a composed model without parts that act between the LLM's layers."""
    import zoo

    ours, processor = zoo.load(options.model, device=device, attention=options.attention)
    if set(ours.adapter) - {"lora"} or ours.pruner:
        raise ZooError(f"model={options.model} has {[*ours.adapter, *ours.pruner]}: this compares LoRA, or none.")
    image_tokens = processor.num_image_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 256, (options.batch, options.text + image_tokens), generator=generator)
    ids[:, 4 : 4 + image_tokens] = processor.image_token_id
    pixels = torch.randn(options.batch, 3, *processor.transform.size, generator=generator).to(device)
    ids, mask = ids.to(device), torch.ones_like(ids, device=device)
    with torch.no_grad():
        embeds = ours.merge(ids, ours.encode_images(pixels).tokens)
    theirs = _plain(ours)
    rows = []
    for what in ("as loaded", "LoRA merged") if ours.adapter else ("as loaded",):
        if what != "as loaded":
            ours.adapter["lora"].merge()
            theirs = theirs.merge_and_unload()
        mine = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        rows += _compare(
            options, clock, what, (ours, mine), (theirs, {"inputs_embeds": embeds, "attention_mask": mask})
        )
    return rows


def _plain(ours: Any) -> Any:
    """A copy of the language model as transformers loads it, with the same LoRA by PEFT."""
    from peft import get_peft_model, set_peft_model_state_dict

    lora = ours.adapter["lora"] if ours.adapter else None
    held = {} if lora is None else lora.adapter_state_dict()
    if lora is not None:
        lora.detach()
    lm = type(ours.llm.lm)(ours.llm.lm.config).eval().to(ours.llm.lm.dtype)
    lm.load_state_dict(ours.llm.lm.state_dict())
    lm.set_attn_implementation("sdpa")
    lm.generation_config = ours.generation_config
    if lora is None:
        return lm
    lora.attach()
    plain = get_peft_model(lm, lora._peft_config()).eval()
    set_peft_model_state_dict(plain, {f"base_model.model.{name.replace('.lora.', '.')}": v for name, v in held.items()})
    return plain


def _compare(options: Any, clock: Clock, what: str, *sides: tuple[Any, dict[str, Any]]) -> list[Row]:
    def answer(model: Any, given: dict[str, Any], new: int) -> Callable[[], Any]:
        fixed = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        return lambda: model.generate(**given, **fixed)

    new = 1 + options.new
    said = [answer(*side, new)()[:, -new:] for side in sides]
    variants = {
        f"{who} {count}": Plain(answer(*side, count))
        for count in (1, new)
        for who, side in zip(("ours", "theirs"), sides, strict=True)
    }
    times = interleave(variants, clock, options.rounds, 1)
    taken = {
        who: [max(a - b, 1e-9) for a, b in zip(times.seconds(f"{who} {new}"), times.seconds(f"{who} 1"), strict=True)]
        for who in ("ours", "theirs")
    }
    note = f"{(said[0] == said[1]).float().mean():.0%} of the tokens are the same"
    per = {who: Value.of([1e3 * t / options.new for t in each]) for who, each in taken.items()}
    ratio = Value.of([a / b for a, b in zip(taken["theirs"], taken["ours"], strict=True)])
    return [
        Row(f"{options.model}, {what}: a step of decoding, ours", per["ours"], unit=" ms"),
        Row(f"{options.model}, {what}: a step of decoding, transformers", per["theirs"], unit=" ms"),
        Row(f"{options.model}, {what}: speed of decoding over transformers'", ratio, bound=1.0, note=note),
    ]
