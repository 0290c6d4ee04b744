"""Templates of `zoo new`: for each kind a small working component; their tests are in `template_tests`."""

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

INSIDE_PRUNER = '''"""CLASS: from a layer of the LLM on, keep the image tokens that the last token attends to most."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.fusion.pruners.inside.attention_tap import AttentionInputs
from zoo.fusion.pruners.inside.dropper import Dropper, DropsInside
from zoo.registry import LanguageModel, ZooError, register


@dataclass
class CLASSConfig:
    keep_ratio: float = 0.5  # share of the image tokens kept, in (0, 1]
    layer: int = 1  # first layer with fewer tokens, counted from 0; at least 1

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ZooError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}.")
        if self.layer < 1:
            raise ZooError(f"layer must be at least 1, the layer before it is scored, got {self.layer}.")


@register("pruner", "NAME")
class CLASS(DropsInside, nn.Module):
    def __init__(self, config: CLASSConfig) -> None:
        super().__init__()
        self.config = config

    def tokens_per_layer(self, n: int, num_layers: int) -> list[int]:
        left = int(self._budget(0, torch.tensor(n, device="cpu")))
        return [n if layer < self.config.layer else left for layer in range(num_layers)]

    def attach(self, llm: LanguageModel) -> None:
        after = [] if self.config.keep_ratio == 1 else [self.config.layer - 1]
        self.drop_by(Dropper(llm, "pruner 'NAME'", after, self._budget, self._score))

    def _budget(self, layer: int, total: Tensor) -> Tensor:
        return (total * self.config.keep_ratio + 0.5).long().clamp(min=1)  # (B, samples), of so many image tokens

    def _score(self, given: AttentionInputs) -> Tensor:
        return given.voted()  # (B, L), attention of the prompt's last token, the mean over heads
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

LAYOUT = '''"""CLASS: the rows of an image (crops, frames) one after the other, each with a learned token at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.registry import Cut, ImageFeatures, Layout, register


@dataclass
class CLASSConfig:
    std: float = 0.02  # of the learned token's initial values


@register("layout", "NAME")
class CLASS(Layout, nn.Module):
    def __init__(self, config: CLASSConfig, *, num_tokens: int, text_dim: int | None) -> None:
        super().__init__()
        self.tokens = num_tokens  # K, of a row behind the projector
        self.given = {"num_tokens": num_tokens}  # the processor builds another one of these, which only counts
        self.end = None if text_dim is None else nn.Parameter(config.std * torch.randn(text_dim))

    def num_tokens(self, n: int) -> int:
        return n + 1

    def count(self, cut: Cut) -> int:
        return cut.rows * (self.tokens + 1)

    def forward(self, tokens: Tensor, cuts: Sequence[Cut]) -> Tensor:
        m, _, c = tokens.shape
        # Marks of tokens (M, K, 1) are laid out like the tokens themselves; what is added here stays.
        end = tokens.new_ones(1) if c == 1 or self.end is None else self.end.to(tokens.dtype)
        return torch.cat([tokens, end.expand(m, 1, c)], dim=1).flatten(0, 1)  # (M * (K + 1), C)

    def places(self, rows: Tensor, image: ImageFeatures, cuts: Sequence[Cut], whole: Layout) -> Tensor:
        """Give where each token stood without a pruner; `rows` (M, K) has that of each among its row's."""
        n = whole.tokens  # type: ignore[attr-defined]
        rows = torch.cat([rows, rows.new_full((len(rows), 1), n)], dim=1)  # the end token is the row's last
        number = torch.cat([torch.arange(cut.rows, device=rows.device) for cut in cuts])  # of a row in its image
        return (rows + number.unsqueeze(1) * (n + 1)).flatten()
'''

LLM = '''"""CLASS: a decoder of transformers; put your own class and config in the place of Llama's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.registry import LanguageModel, LinearHead, register


@dataclass
class CLASSConfig:
    hidden_size: int = 128  # C
    num_layers: int = 4  # of the decoder
    num_heads: int = 4  # of attention, a divisor of hidden_size
    max_positions: int = 512  # longest sequence


@register("llm", "NAME")
class CLASS(LanguageModel, nn.Module):
    provides = frozenset({"dense"})  # "moe" for one with experts

    def __init__(
        self, config: CLASSConfig, *, vocab_size: int, dtype: torch.dtype | None = None, attention: str | None = None
    ) -> None:
        super().__init__()
        sizes = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
        )
        how: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
        self.lm = LlamaForCausalLM._from_config(sizes, **{k: v for k, v in how.items() if v is not None})
        self.hidden_size, self.num_layers = config.hidden_size, config.num_layers
        self.vocab_size, self.max_positions = vocab_size, config.max_positions

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        return self.lm.model.layers

    def set_attention(self, name: str) -> None:
        self.lm.set_attn_implementation(name)

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.lm.get_input_embeddings()(input_ids)  # (B, T, C)

    def hidden(self, *, padding_mask: Tensor | None = None, **inputs: Any) -> Any:
        return self.lm.model(**{"use_cache": False, **inputs})  # .last_hidden_state (B, T, C)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm.lm_head(hidden)  # (..., V)

    def linear_head(self) -> LinearHead | None:
        return None  # LinearHead(weight, bias), where `head` is one linear layer: losses then compute fewer logits
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

DISTILLER = '''"""CLASS: the student's last hidden states should be as long as the teacher's, at answers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.registry import IGNORE_INDEX, Distiller, register


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
        ours, theirs = (_lengths(seen) for seen in (student, teacher))  # (S,)
        return {"NAME": self.weight * (ours - theirs).square().mean()}


def _lengths(seen: Any) -> Tensor:
    where = seen.labels[:, 1:] != IGNORE_INDEX  # labels are shared; other positions are not, behind a pruner for one
    return seen.last_hidden_state[:, :-1][where].float().norm(dim=-1)  # (S,)
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
