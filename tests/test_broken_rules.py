"""Rules of `zoo test` that are about what a pass leaves behind, about losses, heads and streams: who breaks them."""

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from zoo import registry
from zoo.contracts.battery import ALONE, tried
from zoo.contracts.composed import RULES, ComposedCase
from zoo.fusion.attach import refer
from zoo.registry import (
    Adapter,
    Dialog,
    Distiller,
    ImageFeatures,
    LanguageModel,
    LinearHead,
    Pruner,
    Sample,
    StreamingDataset,
    Task,
    ZooError,
)
from zoo.registry import table as core


@dataclass
class Config:
    pass


@pytest.fixture(autouse=True)
def _table():
    yield
    for found in core._entries.values():
        found.pop("mine", None)


def verdict(kind: str, cls: type, rule: str, folder: Any = None) -> Any:
    """Register a part as `mine`, and try one rule on it, or the first rules of a model as far as that one."""
    registry.register(kind, "mine")(cls)
    case_of, rules = ALONE[kind]
    if found := [r for r in rules if r.name == rule]:
        return tried(found[0], case_of(kind, {"name": "mine"}))
    whole = ComposedCase(kind, {"name": "mine"}, folder)
    return next(v for r in RULES if (v := tried(r, whole)).rule == rule)


def half(image: ImageFeatures) -> ImageFeatures:
    m, n = image.tokens.shape[:2]
    return image.take(torch.arange(n // 2).expand(m, -1))


def a_pruner(forward: Any, **attributes: Any) -> type:
    class Mine(Pruner, nn.Module):
        destroys = frozenset({"grid"})

        def __init__(self, config: Config) -> None:
            super().__init__()
            self.table, self._calls = None, []

        def num_tokens(self, n):
            return n // 2

        def forward(self, image):
            return forward(self, image)

    for name, value in attributes.items():
        setattr(Mine, name, value)
    return Mine


def _counts(self, image):
    self._calls.append(1)
    return half(image)


def _last(self, image):
    self.last = image.tokens
    return half(image)


def _in_place(self, image):
    image.cls_attention[:, 0] = 0
    return half(image)


def _renames(self, image):
    image.grid, image.tokens = None, image.tokens * 1.0 + 1
    return half(image)


def _seeds(self, image):
    torch.manual_seed(0)
    return half(image)


def _draws(self, image):
    return half(image) if random.random() < 2 else image


def _numpy(self, image):
    np.random.seed(0)
    return half(image)


def _remembers(self, image):
    if self.table is None:
        self.table = torch.arange(image.tokens.shape[1])
    return half(image)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (_counts, "a pass leaves _calls behind"),
        (_last, "a pass leaves last behind"),
        (_in_place, "what it is given has other values"),
        (_renames, "what it is given has other values"),
        (_seeds, "it moves or sets the seed"),
        (_draws, "it moves or sets the seed"),
        (_numpy, "it moves or sets the seed"),
        (_remembers, ""),  # what is made once is no trace of a pass
    ],
)
def test_a_pass_leaves_no_trace(forward, said):
    found = verdict("pruner", a_pruner(forward), "no trace")
    assert (found.word, said in found.given) == ("broken" if said else "ok", True), found


@pytest.mark.parametrize("concurrent", [True, False])
def test_what_threads_share_knows_nothing_of_a_pass(concurrent, tmp_path):
    """An adapter that keeps the image of a pass has threads take turns, unless it states that it keeps none."""
    mine = an_adapter()
    mine.concurrent = concurrent
    found = verdict("adapter", mine, "shared", tmp_path)
    said = "a pass leaves adapter.mine.shift behind" if concurrent else "threads take turns on its account"
    assert (found.word, found.given) == ("broken" if concurrent else "none", said)


def test_what_a_pruner_leaves_behind_is_out_of_step():
    def forgets(self, image):
        known = dict.fromkeys(("cls_attention", "key_attention", "pooling_attention", "keys", "next_keys"))
        kept = half(image)
        return replace(image, tokens=kept.tokens, keep=kept.keep, grid=None, block_attention={}, **known)

    assert "next_attention has shape (3, 24)" in verdict("pruner", a_pruner(forgets), "in step").given


def test_one_budget_for_an_image_is_no_dependence_on_others():
    def by_image(self, image):
        best = image.tokens.norm(dim=-1).mean(0).topk(image.tokens.shape[1] // 2).indices.sort().values
        return image.take(best.expand(len(image.tokens), -1))

    assert verdict("pruner", a_pruner(by_image), "alone").word == "broken"
    assert verdict("pruner", a_pruner(by_image, per_image=True), "alone").word == "ok"


def test_a_grid_that_is_gone_is_destroyed():
    found = verdict("pruner", a_pruner(lambda self, image: half(image), destroys=frozenset()), "grid")
    assert found.given == "it gives no grid, and does not destroy 'grid'"


def an_llm(rows: int = 0, scale: float = 1.0, embeds: float = 1.0) -> type:
    """A language model of one depth, with rows for more tokens than there are, and a head that is stated wrongly."""

    class Mine(LanguageModel, nn.Module):
        provides = frozenset({"dense"})

        def __init__(self, config: Config, *, vocab_size: int, dtype: Any = None, attention: Any = None) -> None:
            super().__init__()
            self.vocab_size, self.hidden_size, self.num_layers = max(rows, vocab_size), 32, 2
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            self.lm = LlamaForCausalLM(LlamaConfig(vocab_size=self.vocab_size, **sizes)).to(dtype or torch.float32)

        @property
        def layers(self):
            return self.lm.model.layers

        def embed(self, input_ids):
            return embeds * self.lm.get_input_embeddings()(input_ids)

        def hidden(self, *, padding_mask=None, **inputs):
            return self.lm.model(**{"use_cache": False, **inputs})

        def head(self, hidden):
            return self.lm.lm_head(hidden)

        def linear_head(self):
            return LinearHead(self.lm.lm_head.weight, scale=scale)

    return Mine


def test_heads_and_embeddings_are_those_of_the_model():
    assert verdict("llm", an_llm(), "head").given == "with its linear_head"
    assert "by linear_head, the logits differs" in verdict("llm", an_llm(scale=2.0), "head").given
    assert "by embed, hidden and head" in verdict("llm", an_llm(embeds=2.0), "head").given


def test_a_language_model_of_one_depth_with_spare_rows_is_right(tmp_path):
    """The check built it with fewer layers, by an option that it need not have."""
    assert verdict("llm", an_llm(rows=512), "counts").word == "ok"
    assert verdict("llm", an_llm(rows=512), "saved", tmp_path).word == "ok"


def an_adapter() -> type:
    """One that keeps the image of a pass, and takes no notice where the next has none."""

    class Mine(Adapter, nn.Module):
        needs = frozenset({"image"})

        def __init__(self, config: Config, *, llm: Any, vision_dim: int, text_dim: int) -> None:
            super().__init__()
            self.weight, self.hooks, self.shift = nn.Parameter(torch.zeros(vision_dim, text_dim)), [], 0.0
            refer(self, layer=llm.layers[-1])

        def attach(self):
            self.hooks = [self.layer.register_forward_hook(lambda module, args, out: out + self.shift)]

        def detach(self):
            self.hooks.pop().remove()

        def owns(self, name):
            return False

        def condition(self, image, images_per_row, expand=1):
            if image is not None:
                self.shift = (image.tokens.mean((0, 1)) @ self.weight).to(image.tokens)

    return Mine


def test_an_adapter_that_keeps_the_last_image_is_found():
    assert "text behind a pass with images differs by" in verdict("adapter", an_adapter(), "text alone").given


def a_distiller(losses: Any) -> type:
    class Mine(Distiller, nn.Module):
        needs, losses = frozenset({"student.hidden", "teacher.hidden"}), frozenset({"mine"})

        def __init__(self, config: Config) -> None:
            super().__init__()

        def forward(self, student, teacher, batch):
            return given((student.last_hidden_state - teacher.last_hidden_state).square())

    given = losses
    return Mine


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (lambda off: {"mine": off.mean()}, ""),
        (lambda off: {"mine": off.mean().detach()}, "no gradient follows from its loss mine"),
        (lambda off: {"other": off.mean()}, "it gives other, and declares mine"),
        (lambda off: {"answer": off.mean()}, "calls a loss 'answer', as one of the model's own is called"),
        (lambda off: {"mine": off.mean(-1)}, "loss 'mine' is of the shape [2, "),
        (lambda off: {"mine": off.mean().item()}, "loss 'mine' is a float"),
        (lambda off: off.mean(), "gives a Tensor, and has to give losses by name"),
    ],
)
def test_losses_that_teach_nothing_or_are_none(losses, said, tmp_path):
    found = verdict("distiller", a_distiller(losses), "learns", tmp_path)
    assert (found.word, said in found.given) == ("broken" if said else "ok", True), found


@pytest.mark.parametrize("name", registry.names("distiller"))
def test_distillers_of_the_zoo_teach(name, tmp_path):
    whole = ComposedCase("distiller", {"name": name}, tmp_path)
    assert [v.word for rule in RULES[:2] if (v := tried(rule, whole)).given] == ["ok", "ok"]


@pytest.mark.parametrize("begins", [True, False])
def test_a_stream_begins_where_it_is_asked_to(begins):
    class Mine(StreamingDataset):
        def __init__(self, config: Config) -> None: ...

        def stream(self, epoch=0, start=0):
            turns = [{"role": r, "content": [{"type": "text", "text": r}]} for r in ("user", "assistant")]
            for i in range(start if begins else 0, 9):
                yield Sample(f"n{i}", [], [Dialog(turns)])

    found = verdict("dataset", Mine, "stream")
    assert (found.word, found.given) == (
        ("ok", "9 looked at") if begins else ("broken", "stream(0, start=1) gives other samples")
    )


def test_a_split_for_evaluation_is_looked_at_before_a_run_ends():
    class Mine(registry.Dataset):
        def __init__(self, config: Config) -> None:
            self.size = 2

        def __len__(self):
            return self.size

        def get(self, index, epoch=0):
            raise IndexError(index)

        def eval_split(self):
            other = Mine(Config())
            other.size = 0
            return other

    assert verdict("dataset", Mine, "splits").given == "its eval_split has no samples"


def test_content_that_is_no_list_of_parts_is_named():
    class Mine(registry.Dataset):
        def __init__(self, config: Config) -> None: ...

        def __len__(self):
            return 2

        def get(self, index, epoch=0):
            return Sample(f"n{index}", [], [Dialog([{"role": "user", "content": "what?"}])])

    assert "has the content 'what?'" in verdict("dataset", Mine, "samples").given


def test_a_task_for_answers_of_its_own_form_is_not_wrong():
    class Mine(Task):
        max_new_tokens = 8

        def __init__(self, config: Config) -> None: ...

        def score(self, dialog, prediction):
            raise ZooError("the reference has no point")

        def summarise(self, rows):
            return {}

    found = verdict("task", Mine, "order")
    assert found.word == "none" and found.given.endswith("'red': the reference has no point")
