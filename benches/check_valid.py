"""Compositions drawn from the registry, with options drawn for each part; many fit and some do not.

Every encoder, pruner, projector, layout and adapter that the zoo registers may come, with language models of families
with and without experts, with and without sdpa. Sizes are tiny, so that a composition runs in a fraction of a second.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.checking.plan import Plan
from zoo.registry import names
from zoo.settings.stage import Stage

_TOWER = {"image_size": 32, "patch_size": 8, "depth": 3}
_HF = ("clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "dinov3_vit")
_FAMILIES = {  # of language models -> what each takes beside the common sizes
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "smollm3", "olmo2", "cohere"), ("kv",)),
    **dict.fromkeys(("starcoder2", "stablelm", "granite", "glm4", "phi3"), ("kv",)),
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "phi", "bloom", "falcon"), ()),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"), ("kv", "experts")),
}


@dataclass
class Drawn:
    """A composition: slots, as a config has them, and the attention that is asked for."""

    slots: dict[str, Any]
    attention: str = "auto"

    def plan(self, vocab_size: int, tokenizer: Any = None) -> Plan:
        """What the check takes."""
        stages = {"main": Stage(steps=1)}
        return Plan(self.slots, vocab_size, made=tokenizer, attention=self.attention, stages=stages)

    def __str__(self) -> str:
        return f"{ {k: v for k, v in self.slots.items() if v} } attention={self.attention}"

    @staticmethod
    def kinds() -> str:
        """What compositions are drawn from, in words."""
        counted = ((kind, len(names(kind))) for kind in ("vision", "pruner", "projector", "layout", "adapter"))
        parts = ", ".join(f"{n} of kind {kind}" for kind, n in counted)
        return f"{parts}, {len(_HF)} families of encoders of transformers, {len(_FAMILIES)} of language models"


def draw(seed: int) -> Iterator[Drawn]:
    """Yield compositions, other ones for each seed."""
    chance = random.Random(seed)
    while True:
        adapters = _some(chance, names("adapter"), (0.55, 0.4, 0.05))
        pruners = _some(chance, names("pruner"), (0.35, 0.5, 0.15))
        layers = chance.choice((2, 3, 4))
        slots = {
            "vision": _vision(chance),
            "pruner": {name: _pruner(chance, name, layers) for name in pruners},
            "projector": None if "vlora" in adapters and chance.random() < 0.9 else _projector(chance),
            "layout": _layout(chance),
            "llm": _llm(chance, layers, adapters),
            "adapter": {name: _adapter(chance, name, layers) for name in adapters},
        }
        yield Drawn(slots, chance.choice(("auto", "auto", "eager", "sdpa")))


def _some(chance: random.Random, known: list[str], odds: tuple[float, float, float]) -> list[str]:
    return chance.sample(known, chance.choices((0, 1, 2), odds)[0])


def _encoders() -> list[str]:
    """Those whose images have one size: others go with a layout and a projector of their own."""
    return [name for name in names("vision") if name != "qwen_vision"]


def _vision(chance: random.Random, among: Sequence[str] = ()) -> dict[str, Any]:
    heads, name = chance.choice((2, 4)), chance.choice(among or _encoders())
    if name == "fused":
        others = [n for n in _encoders() if n != name]
        node: dict[str, Any] = {"name": name, "encoders": {key: _vision(chance, others) for key in ("one", "two")}}
        return {**node, "join": chance.choice(("channels", "channels", "tokens")), "grid": chance.choice(("", "two"))}
    node = {"name": name, **_TOWER, "heads": heads, "width": 16 * heads}
    node |= {"layer": chance.choice((-1, -2, 1, 2)), "norm": chance.random() < 0.2}
    if node["name"] == "hf":
        node |= {"model_type": chance.choice(_HF), "patch_size": 8}
        if node["model_type"].startswith("siglip") and chance.random() < 0.3:
            node[chance.choice(("pooling_head", "summary"))] = True
    if node["name"] == "timm":
        node |= {"cls_token": chance.random() < 0.7, "stem": chance.choice(("patch", "conv"))}
        node |= {"registers": chance.choice((0, 0, 2)), "activation": chance.choice(("gelu", "relu", "quick_gelu"))}
        node |= {"bias": chance.random() < 0.8, "zero_init": chance.random() < 0.2}
    return node


def _pruner(chance: random.Random, name: str, layers: int) -> dict[str, Any]:
    ratio = {"keep_ratio": chance.choice((0.25, 0.5, 0.75, 1.0))}
    options: dict[str, dict[str, Any]] = {
        "aim": {"merge_ratio": ratio["keep_ratio"], "prune": chance.random() < 0.7}
        | {"metric": chance.choice(("tokens", "keys"))},
        "dycoke": {**ratio, "order": chance.choice(("raster", "released")), "odd": chance.choice(("keep", "drop"))},
        "cdpruner": {**ratio, "relevance": chance.choice(("clip", "embeddings", "embeddings", "none"))}
        | {"similarity": chance.choice(("projected", "encoder")), "sign": chance.choice((-1, 1))},
        "evs": {**ratio, "reference": chance.choice(("previous", "last_kept"))},
        "fastvid": {**ratio, "summary": chance.choice(("head", "mean")), "scenes": chance.randint(1, 9)}
        | {"remainder": chance.choice(("spread", "floor"))},
        "fastv": {**ratio, "layer": chance.randint(1, layers - 1)},
        "dart": {**ratio, "layer": chance.randint(1, layers - 1), "as_released": chance.random() < 0.5},
        "pyramiddrop": {**ratio, "votes": chance.choice(("turns", "last", "text"))}
        | {"layers": chance.choice(([], [chance.randint(1, layers - 1)]))},
        "fastervlm": {**ratio, "score": chance.choice(("cls", "column_mean", "probe"))},
        "hiprune": {**ratio, "alpha": chance.choice((0.0, 0.1, 1.0)), "edges": chance.choice(("grid", "released"))},
        "holov": {**ratio, "score": chance.choice(("cls", "column_mean")), "crops": chance.choice((0, 1, 3, 50))}
        | {"shape": chance.choice(("grid", "run")), "spread": chance.choice(("image", "crop"))},
        "sparsevlm": {**ratio, "after": chance.choice(([], [chance.randint(0, layers - 2)]))}
        | chance.choice(({}, {"recycle": True}, {"plus": True}, {"counts": "rank"})),
        "visionzip": {**ratio, "score": chance.choice(("cls", "column_mean"))},
        "vispruner": {**ratio, "score": chance.choice(("cls", "column_mean", "probe"))}
        | {"important_ratio": chance.choice((0.0, 0.5, 1.0)), "order": chance.choice(("score", "released"))},
        "pool": chance.choice(({"stride": 1}, {"stride": 2}, {"stride": 3}, {"target": [2, 2]})),
        "prumerge": {**ratio, "score": chance.choice(("cls", "column_mean")), "plus": chance.random() < 0.5},
        "vscan": {**ratio, "score": chance.choice(("cls", "column_mean")), "llm_ratio": chance.choice((0.3, 1.0))}
        | {"windows": chance.choice(("capped", "square")), "local_share": chance.choice((0.0, 0.5, 1.0))},
        "random": {**ratio, "seed": chance.randint(0, 9), "resample": chance.random() < 0.3},
    }
    return options.get(name, ratio)


def _projector(chance: random.Random) -> dict[str, Any]:
    name = chance.choice([n for n in names("projector") if n != "identity"])
    options: dict[str, dict[str, Any]] = {
        "linear": {"bias": chance.random() < 0.5},
        "mlp": {"depth": chance.randint(1, 3), "activation": chance.choice(("gelu", "relu"))},
        "resampler": {"num_queries": chance.randint(1, 9), "num_heads": 2, "depth": 1},
        "pixel_shuffle": {"factor": chance.choice((1, 2)), "norm": chance.random() < 0.5},
        "pool": chance.choice(({"stride": 2}, {"target": [2, 4]}, {"stride": 3, "uneven": "adaptive"})),
    }
    return {"name": name, **options.get(name, {})}


def _layout(chance: random.Random) -> dict[str, Any] | None:
    if chance.random() < 0.85:
        return None
    name = chance.choice([n for n in names("layout") if n != "native"])
    return {"name": name, **({"most": 2} if name == "tiles" else {})}


def _llm(chance: random.Random, layers: int, adapters: list[str]) -> dict[str, Any]:
    known = [f for f, takes in _FAMILIES.items() if "experts" in takes or "moextend" not in adapters]
    family = chance.choice(known)
    takes = _FAMILIES[family]
    node = {"name": "hf", "model_type": family, "hidden_size": 32, "num_layers": layers, "num_heads": 4}
    node |= {"intermediate_size": 48, "max_positions": chance.choice((128, 256))}
    node |= {"tie_embeddings": chance.random() < 0.3}
    if "kv" in takes and family != "phi3":
        node["num_kv_heads"] = chance.choice((1, 2, 4))
    if "experts" in takes:
        node |= {"num_experts": 4, "top_k": chance.choice((1, 2, 4))}
        node |= {"router_aux_coef": chance.choice((0.0, 0.01))}
    if family in ("llama", "qwen2", "starcoder2") and chance.random() < 0.2:
        node["zero_init_residual"] = True
    return node


def _adapter(chance: random.Random, name: str, layers: int) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {
        "lora": {"rank": chance.choice((1, 2, 8)), "dropout": chance.choice((0.0, 0.1))},
        "mole": {"rank": 2, "num_experts": chance.choice((2, 3))}
        | {"gate": chance.choice(("none", "prob", "ste", "dense"))},
        "moextend": {"calibration_width": chance.choice((0, 4)), "num_new": chance.choice((1, 2))},
        "upcycle": {"num_experts": chance.choice((2, 4)), "every": chance.choice((1, 2))},
        "vlora": {"rank": 4, "skip": chance.choice((1, 2)), "width": 16, "depth": 2, "num_heads": 2},
    }
    return options.get(name, {})
