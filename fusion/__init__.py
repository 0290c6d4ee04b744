"""What joins vision to language: projectors, token pruners, language models, adapters inside them. One line each."""

from zoo.registry import declare

declare("adapter", "lora", "zoo.fusion.lora")
declare("adapter", "moextend", "zoo.fusion.moextend")
declare("adapter", "mole", "zoo.fusion.mole")
declare("adapter", "upcycle", "zoo.fusion.upcycle")
declare("adapter", "vlora", "zoo.fusion.vlora")
declare("layout", "anyres", "zoo.fusion.anyres")
declare("layout", "tiles", "zoo.fusion.tiles")
declare("llm", "hf", "zoo.fusion.llm")
declare("projector", "linear", "zoo.fusion.linear")
declare("projector", "mlp", "zoo.fusion.mlp")
declare("projector", "pixel_shuffle", "zoo.fusion.pixel_shuffle")
declare("projector", "pool", "zoo.fusion.pool")
declare("projector", "resampler", "zoo.fusion.resampler")
declare("pruner", "aim", "zoo.fusion.aim")
declare("pruner", "divprune", "zoo.fusion.divprune")
declare("pruner", "fastervlm", "zoo.fusion.fastervlm")
declare("pruner", "fastv", "zoo.fusion.fastv")
declare("pruner", "pool", "zoo.fusion.pool_pruner")
declare("pruner", "random", "zoo.fusion.random_pruner")
declare("pruner", "visionzip", "zoo.fusion.visionzip")
