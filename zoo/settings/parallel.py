"""How the processes of a run share the model. Plain values, without torch."""

from dataclasses import dataclass

from zoo.registry import ZooError, unknown

SHARDING = ("launcher", "fsdp2", "none")
FORMATS = ("auto", "fp32", "bf16")


@dataclass
class ParallelConfig:
    """What each process of a training run holds, and in which number format they send it to each other."""

    shard: str = "launcher"  # fsdp2: a process holds a share of the model | none: all of it, DDP | launcher: as it asks
    replicate: int = 1  # FSDP2: groups of processes, each with the whole model in shares (HSDP)
    tensor: int = 1  # processes that share each layer of the LLM, by the plan that transformers has for it; FSDP2
    gather: str = "auto"  # FSDP2, number format that layers are gathered in: fp32 | bf16 | auto: as the products
    reduce: str = "fp32"  # FSDP2, number format that gradients are summed in over processes: fp32 | bf16

    def __post_init__(self) -> None:
        for name in ("replicate", "tensor"):
            if (given := getattr(self, name)) < 1:
                raise ZooError(f"parallel.{name} must be at least 1, got {given}.")
            if given > 1 and self.shard == "none":
                raise ZooError(f"parallel.{name}={given} is for parallel.shard=fsdp2, not none.")
        for name, allowed in (("shard", SHARDING), ("gather", FORMATS), ("reduce", FORMATS[1:])):
            if (given := getattr(self, name)) not in allowed:
                raise unknown(f"value of parallel.{name}", given, allowed)
