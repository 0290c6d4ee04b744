"""AdaLoRA: ranks that fall during training to where they matter, by PEFT's own allocator.

Paper: Zhang et al., arXiv:2303.10512. After each step the importance of each singular value is a running mean of
|weight * gradient| and of its changes; the least important ones are set to 0 until the budget is met. The budget falls
over the steps of the first stage that trains the adapter, and stays as it is afterwards.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.fusion.attach import refer
from zoo.registry import ZooError

LOSS = "adalora_orthogonal"


class Budget(nn.Module):
    """State of the allocator as tensors, so that a run that is killed goes on with it.

    Args:
        tuner: PEFT's `AdaLoraModel`.
        config: of PEFT, that the tuner reads too.
        named: the adapter's parameters by their names in the language model.
    """

    ended: Tensor  # () bool, whether the schedule is over
    tuner: Any
    config: Any

    def __init__(self, tuner: Any, config: Any, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        refer(self, tuner=tuner, config=config)
        self.names = [n for n in named if ".lora_" in n]
        self.ranked = [n for n in self.names if ".lora_E." in n]
        device = named[self.names[0]].device
        self.register_buffer("ended", torch.zeros((), dtype=torch.bool, device=device))
        for n in self.ranked:
            self.register_buffer(f"kept-{_key(n)}", torch.ones_like(named[n], dtype=torch.bool))
        for n in self.names:  # of a run alone: a saved model does not need them
            for what in ("importance", "change"):
                self.register_buffer(f"{what}-{_key(n)}", torch.zeros_like(named[n].detach()), persistent=False)

    def begin(self, steps: int) -> None:
        """Set the number of steps of the schedule.

        Raises:
            ZooError: they are too few.
        """
        config = self.config
        if not bool(self.ended) and config.tinit >= steps - config.tfinal:
            raise ZooError(
                f"AdaLoRA's budget falls between its first tinit={config.tinit} and its last tfinal={config.tfinal} "
                f"steps, and the stage that trains it has {steps}: set adapter.peft.options.tinit and tfinal lower."
            )
        config.total_step = steps

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Note the importances of a step, count from 1, while its gradients are there, and meet the budget."""
        allocator, lm = self.tuner.rankallocator, self.tuner.model
        if not bool(self.ended):
            allocator.ipt = {n: self._of("importance", n) for n in self.names}  # those that are there are not reset
            allocator.exp_avg_ipt = dict(allocator.ipt)
            allocator.exp_avg_unc = {n: self._of("change", n) for n in self.names}
            at, named = self.config.total_step - self.config.tfinal, dict(lm.named_parameters())
            values = {n: named[n].clone() for n in self.ranked}
            _, pattern = allocator.update_and_allocate(lm, step, force_mask=step >= at)
            if pattern and not any(map(any, pattern.values())):
                # All equal, as where a warm-up begins at rate 0: values set to 0 now would never change again.
                pattern = None
                for n, value in values.items():
                    named[n].copy_(value)
            self.ended.fill_(step >= at)
            for n in self.names:
                self._of("importance", n).copy_(allocator.exp_avg_ipt[n])
                self._of("change", n).copy_(allocator.exp_avg_unc[n])
            allocator.reset_ipt()
            for n, kept in (pattern or {}).items():
                mask = self._of("kept", n)
                mask.copy_(torch.tensor(kept, device=mask.device).view_as(mask))
        else:
            named = dict(lm.named_parameters())
            for n in self.ranked:
                named[n].masked_fill_(~self._of("kept", n), 0.0)

    def loss(self) -> Tensor:
        """How far A and B are from orthogonal, weighted as configured: a scalar."""
        named = dict(self.tuner.model.named_parameters())
        far = []
        for n in self.names:
            if ".lora_E." not in n:
                p = named[n]
                square = p @ p.T if ".lora_A." in n else p.T @ p  # (R, R)
                far.append(torch.norm(square - torch.eye(len(square), device=p.device, dtype=p.dtype), p="fro"))
        return self.config.orth_reg_weight * torch.stack(far).sum() / len(far)

    def ranks(self) -> dict[str, list[bool]] | None:
        """Which singular values are left of each layer, as PEFT's `rank_pattern`; None before the schedule is over."""
        if not bool(self.ended):
            return None
        return {n: self._of("kept", n).flatten().tolist() for n in self.ranked}

    def state(self) -> dict[str, Tensor]:
        """What a run needs beside the weights: by name, to be read and written in place."""
        return {f"{what}-{_key(n)}": self._of(what, n) for n in self.names for what in ("importance", "change")}

    def _of(self, what: str, name: str) -> Tensor:
        return self.get_buffer(f"{what}-{_key(name)}")


def _key(name: str) -> str:
    return name.replace(".", "-")
