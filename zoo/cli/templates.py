"""Templates of `zoo new`: for each kind a small working component."""

# NAME is replaced by the component's name, and CLASS by the name of its class.

PRUNER = '''"""CLASS: keep the first image tokens of each image, in grid order."""

from dataclasses import dataclass

import torch
from torch import nn

from zoo.registry import ImageFeatures, Pruner, ZooError, register


@dataclass
class CLASSConfig:
    keep_ratio: float = 0.5  # share of image tokens kept, in (0, 1]

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ZooError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")


@register("pruner", "NAME")
class CLASS(Pruner, nn.Module):
    # needs = frozenset({"cls_attention"})  # what the encoder must provide; also "keys", "grid", ...
    destroys = frozenset({"grid"})

    def __init__(self, config: CLASSConfig) -> None:
        super().__init__()
        self.config = config
        if config.keep_ratio == 1:
            self.destroys = frozenset()  # all tokens are kept, and their grid

    def num_tokens(self, n: int) -> int:
        return max(1, round(n * self.config.keep_ratio))

    def forward(self, image: ImageFeatures) -> ImageFeatures:
        m, n = image.tokens.shape[:2]
        k = self.num_tokens(n)
        if k == n:
            return image
        best_first = torch.arange(k, device=image.tokens.device).expand(m, -1)  # (M, K), indices into N
        return image.take_best(best_first)  # (M, K, D), in grid order
'''

PROJECTOR = '''"""CLASS: a norm and a linear layer from the encoder's width to the LLM's."""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import ImageFeatures, Projector, register


@dataclass
class CLASSConfig:
    bias: bool = True  # of the linear layer


@register("projector", "NAME")
class CLASS(Projector, nn.Module):
    def __init__(self, config: CLASSConfig, *, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(vision_dim)
        self.proj = nn.Linear(vision_dim, text_dim, bias=config.bias)

    def num_tokens(self, n: int) -> int:
        return n

    def forward(self, image: ImageFeatures) -> Tensor:
        return self.proj(self.norm(image.tokens))  # (M, N, C)
'''

VISION = '''"""CLASS: a linear projection of each patch."""

from dataclasses import dataclass

from torch import Tensor, nn

from zoo.registry import Encoder, ImageFeatures, ImageTransform, register


@dataclass
class CLASSConfig:
    image_size: int = 64  # pixels a side
    patch_size: int = 8  # pixels a side
    width: int = 64  # D


@register("vision", "NAME")
class CLASS(Encoder, nn.Module):
    provides = frozenset({"grid"})

    def __init__(self, config: CLASSConfig) -> None:
        super().__init__()
        side = config.image_size // config.patch_size
        self.hidden_size, self.grid, self.num_tokens = config.width, (side, side), side * side
        size, half = (config.image_size, config.image_size), (0.5, 0.5, 0.5)
        self.transform = ImageTransform(size=size, mean=half, std=half, fit="squash")
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor, *, need: frozenset[str] = frozenset()) -> ImageFeatures:
        tokens = self.proj(pixel_values).flatten(2).transpose(1, 2)  # (M, N, D)
        return ImageFeatures(tokens, self.grid)
'''

ADAPTER = '''"""CLASS: add a learned vector to the output of each decoder layer, at first zero: the base model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo.fusion.attach import refer
from zoo.registry import Adapter, LanguageModel, register


@dataclass
class CLASSConfig:
    scale: float = 1.0  # of the added vectors


@register("adapter", "NAME")
class CLASS(Adapter, nn.Module):
    concurrent = True  # this object keeps no state of a pass, so threads may share it

    def __init__(self, config: CLASSConfig, *, llm: LanguageModel, text_dim: int) -> None:
        super().__init__()
        self.scale = config.scale
        self.shift = nn.Parameter(torch.zeros(llm.num_layers, text_dim))
        refer(self, layers=llm.layers)  # not a child module: the base weights belong to the language model
        self._hooks: list[Any] = []

    def attach(self) -> None:
        self._hooks = self._hooks or [
            layer.register_forward_hook(lambda module, args, out, i=i: self._add(out, i))
            for i, layer in enumerate(self.layers)
        ]

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _add(self, out: Any, i: int) -> Any:
        states = out[0] if isinstance(out, tuple) else out
        shift = (self.scale * self.shift[i]).to(states.dtype)  # the weights stay float32 in a model of 16 bits
        return (states + shift, *out[1:]) if isinstance(out, tuple) else states + shift

    def owns(self, name: str) -> bool:
        return False  # no parameter of the language model belongs to this adapter
'''

DISTILLER = '''"""CLASS: the student's last hidden states should be as long as the teacher's."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.registry import Distiller, register


@dataclass
class CLASSConfig:
    weight: float = 1.0  # of the loss


@register("distiller", "NAME")
class CLASS(Distiller, nn.Module):
    needs = frozenset({"student.hidden", "teacher.hidden"})
    losses = frozenset({"NAME"})

    def __init__(self, config: CLASSConfig) -> None:
        super().__init__()
        self.weight = config.weight

    def forward(self, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        ours, theirs = (out.last_hidden_state.float().norm(dim=-1) for out in (student, teacher))  # (B, T)
        return {"NAME": self.weight * (ours - theirs).square().mean()}
'''

DATASET = '''"""CLASS: pictures of one colour, and the question which colour that is."""

from dataclasses import dataclass

import numpy as np

from zoo.registry import Dataset, Dialog, Sample, register

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}


@dataclass
class CLASSConfig:
    split: str = "train"  # train | eval
    size: int = 64  # side of a picture in pixels
    samples: int = 300  # pictures
    seed: int = 0  # of the colours and the noise


@register("dataset", "NAME")
class CLASS(Dataset):
    def __init__(self, config: CLASSConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.samples

    def get(self, index: int, epoch: int = 0) -> Sample:
        c = self.config
        if not 0 <= index < c.samples:
            raise IndexError(index)
        random = np.random.default_rng([c.seed, index, c.split == "eval"])  # of seed and index alone, so runs resume
        colour = str(random.choice(list(COLOURS)))
        noise = random.integers(-30, 30, (c.size, c.size, 3))
        image = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        question = [{"type": "image"}, {"type": "text", "text": "Which colour is this?"}]
        answer = [{"type": "text", "text": colour}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Sample(f"NAME-{index}", [image], [Dialog(messages, task="exact")])
'''

TASK = '''"""CLASS: is the accepted answer somewhere in the prediction?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from zoo.registry import Dialog, Score, Task, register


@dataclass
class CLASSConfig:
    max_new_tokens: int = 32  # maximum length of an answer


@register("task", "NAME")
class CLASS(Task):
    mode = "generate"

    def __init__(self, config: CLASSConfig) -> None:
        self.max_new_tokens = config.max_new_tokens

    def score(self, dialog: Dialog, prediction: str) -> dict[str, float]:
        answers = dialog.answers or [part["text"] for part in dialog.messages[-1]["content"]]
        return {"mentioned": float(any(answer.lower() in prediction.lower() for answer in answers))}

    def summarise(self, rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
        values = [row["mentioned"] for row in rows]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return {"mentioned": Score(fmean(values) if values else 0.0, len(values), error)}
'''

QUESTIONS = """{"id": "1", "question": "Is there a red circle?", "answer": "yes"}
{"id": "2", "question": "What color is the square?", "answer": "blue"}
{"id": "3", "question": "How many shapes are there?", "answer": "3"}
"""

TESTS = {
    "pruner": """    pruner = registry.build("pruner", {"name": "NAME"})
    image = ImageFeatures(torch.randn(2, 16, 8), (4, 4))
    assert pruner(image).tokens.shape == (2, pruner.num_tokens(16), 8)
    keeps_all = registry.build("pruner", {"name": "NAME", "keep_ratio": 1.0})
    assert keeps_all(image).grid == (4, 4) and "grid" not in keeps_all.destroys
""",
    "projector": """    projector = registry.build("projector", {"name": "NAME"}, vision_dim=8, text_dim=12)
    tokens = projector(ImageFeatures(torch.randn(2, 16, 8), (4, 4)))
    assert tokens.shape == (2, projector.num_tokens(16), 12)
""",
    "vision": """    vision = registry.build("vision", {"name": "NAME"})
    image = vision(torch.randn(2, 3, *vision.transform.size))
    assert image.tokens.shape == (2, vision.num_tokens, vision.hidden_size)
    assert image.grid == vision.grid
""",
    "adapter": """    llm = registry.build("llm", {"name": "hf", "hidden_size": 32, "num_layers": 2}, vocab_size=64)
    ids = torch.arange(8).unsqueeze(0)
    base = llm.lm(input_ids=ids).logits
    adapter = registry.build("adapter", {"name": "NAME"}, llm=llm, text_dim=32)
    adapter.attach()
    assert torch.equal(llm.lm(input_ids=ids).logits, base)  # it starts as the base model
    adapter.detach()
    assert torch.equal(llm.lm(input_ids=ids).logits, base)
""",
    "distiller": """    distiller = registry.build("distiller", {"name": "NAME"})
    out = SimpleNamespace(last_hidden_state=torch.randn(2, 5, 8))
    assert distiller(out, out, {})["NAME"] == 0  # teacher == student: nothing to learn
""",
    "dataset": """    data = registry.build("dataset", {"name": "NAME"})
    one, two = data.get(3), data.get(3)
    assert one.dialogs == two.dialogs  # the same index gives the same sample
    assert (one.images[0] == two.images[0]).all()
    assert data.get(0).images[0].shape == (64, 64, 3)
""",
    "task": """    task = registry.build("task", {"name": "NAME"})
    dialog = Dialog([], answers=["red"])
    rows = [task.score(dialog, text) for text in ("It is red.", "It is blue.")]
    assert task.summarise(rows)["mentioned"].value == 0.5
""",
}
