"""Devices that `zoo check` plans a training for. Plain values, without torch."""

from dataclasses import dataclass

from zoo.registry import ZooError


@dataclass
class ScaleConfig:
    """Devices, what each belongs to, and how fast they are; nothing of it changes a run."""

    devices: int = 0  # of the whole training, for which `zoo check` states bytes of each; 0: it does not
    node: int = 8  # devices of one machine
    memory: float = 80.0  # of a device, in GB
    within: float = 450.0  # GB/s that a device sends inside of a machine; 0: no seconds are stated
    between: float = 400.0  # GB/s that all devices of a machine send to others
    tflops: float = 400.0  # TFLOP/s that a device reaches in training; 0: no seconds are stated

    def __post_init__(self) -> None:
        if self.node < 1:
            raise ZooError(f"scale.node must be at least 1, got {self.node}.")
        if min(self.devices, self.within, self.between, self.tflops) < 0 or self.memory <= 0:
            raise ZooError("scale.devices, within, between and tflops must not be negative, and memory more than 0.")

    def rate(self, size: int, stride: int) -> float:
        """Return the bytes a second that each member of a group sends around the group's ring.

        Args:
            size: members.
            stride: devices from a member to the next.
        """
        if size * stride <= self.node:
            return self.within * 1e9
        here = max(1, self.node // stride)  # members of one machine, which share its network
        return min(self.within, self.between * here / self.node) * 1e9


@dataclass
class Devices(ScaleConfig):
    """Devices, and how they share a model: the options of `parallel`."""

    replicate: int = 1  # copies of the model, each spread over devices / (replicate * tensor) of them (HSDP)
    tensor: int = 1  # devices that share each layer of the LLM

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices and self.devices % (self.replicate * self.tensor):
            raise ZooError(
                f"scale.devices={self.devices} is not a multiple of parallel.replicate={self.replicate} times "
                f"parallel.tensor={self.tensor}."
            )
        if self.tensor > self.node:
            raise ZooError(
                f"parallel.tensor={self.tensor} would send each layer between machines of {self.node} devices "
                "(scale.node)."
            )

    @property
    def shards(self) -> int:
        """Devices that a copy of the model is spread over."""
        return self.devices // (self.replicate * self.tensor)

    @property
    def readers(self) -> int:
        """Groups of devices that have samples of their own."""
        return self.devices // self.tensor
