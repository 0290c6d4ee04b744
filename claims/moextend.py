"""Claim: new experts learn a new modality and forget less than full fine-tuning (arXiv:2408.03511).

A small Mixtral knows four permutations of 32 symbols ("text"). A projector learns to caption "images" of eight classes
for it; then come questions whose answer depends on the class. New experts against training every weight, at the same
rate, a fifth and a twentieth of it; what is left of the text is read without any text in the training. With the guard,
text runs as before by construction; the loss it does not prevent is shown beside it.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.benches.claims import over
from zoo.benches.report import Row
from zoo.claims.steps import train
from zoo.fusion.adapters.expert_shift import counted, select
from zoo.registry import build

SYMBOLS, DOMAINS, CLASSES, QUESTIONS = 32, 4, 8, 8
SEPARATOR = SYMBOLS + DOMAINS
ASK, NAME = SEPARATOR + 1, SEPARATOR + 1 + QUESTIONS
WIDTH, DIM, PATCHES = 64, 24, 4
TEXT_STEPS, ALIGN_STEPS, PROBE_STEPS, STEPS, BATCH, TEST = 1000, 300, 200, 400, 32, 256
RATE = 2e-3
NEW, FULL = "new experts in half of the layers", "every weight"
SETTING = [
    "a Mixtral of 4 layers, width 64, 2 of 8 experts; steps: text 1000, captions 300, routers 200, task 400 at 2e-3",
    "text: share of right answers after the task, which has no text in it; task: the same of the questions",
]


class World:
    """Permutations, prototypes of classes, and the table of answers."""

    num_classes, dim = CLASSES, DIM

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tables = torch.stack([torch.randperm(SYMBOLS, generator=g) for _ in range(DOMAINS)])
        self.classes = torch.randn(CLASSES, DIM, generator=g)
        self.answers = torch.randint(SYMBOLS, (self.num_classes, QUESTIONS), generator=g)

    def text(self, n: int, g: torch.Generator) -> Tensor:
        """Draw (n, 17): a domain token, then eight symbols each followed by its image."""
        domain, s = torch.randint(DOMAINS, (n,), generator=g), torch.randint(SYMBOLS, (n, 8), generator=g)
        pairs = torch.stack([s, self.tables[domain].gather(1, s)], dim=2).flatten(1)
        return torch.cat([SYMBOLS + domain[:, None], pairs], dim=1)

    def images(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw patches (n, 4, D) and their classes (n,)."""
        label = torch.randint(CLASSES, (n,), generator=g)
        return self.classes[label][:, None] + 0.5 * torch.randn(n, PATCHES, DIM, generator=g), label

    def unseen(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images that nothing learns from."""
        return self.images(n, g)

    def questions(self, label: Tensor, g: torch.Generator) -> Tensor:
        """Draw (n, 13): the separator, then six questions each followed by its answer."""
        q = torch.randint(QUESTIONS, (len(label), 6), generator=g)
        pairs = torch.stack([ASK + q, self.answers[label[:, None], q]], dim=2).flatten(1)
        return torch.cat([torch.full_like(label, SEPARATOR)[:, None], pairs], dim=1)


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Drawn images."""
    return experiment(World(seed), seed, share, show)


def experiment(
    world: World, seed: int, share: float, show: Callable[[str], None], only: Collection[str] = ()
) -> dict[str, float]:
    """Text, captions, the probe; then every way of learning the task on a copy, or those that `only` names."""
    g = torch.Generator().manual_seed(seed + 1)
    steps = {n: max(2, round(c * share)) for n, c in
             (("text", TEXT_STEPS), ("align", ALIGN_STEPS), ("probe", PROBE_STEPS), ("task", STEPS))}  # fmt: skip
    base = _Model(seed, world)
    base.llm.router_aux_coef = 0.01
    train(base.llm.parameters(), steps["text"], lambda: base.loss(world.text(BATCH, g)), rate=3e-3, warmup=20)
    base.requires_grad_(False)
    base.llm.router_aux_coef = 0.0
    base.projector.requires_grad_(True)

    def caption() -> Tensor:
        patches, label = world.images(BATCH, g)
        return base.loss(torch.stack([torch.full_like(label, SEPARATOR), NAME + label], dim=1), patches)

    train(base.projector.parameters(), steps["align"], caption, rate=3e-3, warmup=20)
    layers, sources = _chosen(base, world, g, steps["probe"])
    show(f"  layers {layers} from experts {sources}")
    probe = torch.Generator().manual_seed(10_000 + seed)
    test = world.text(TEST if share == 1 else 8, probe)
    shown = world.unseen(len(test), probe)
    asked = world.questions(shown[1], probe)
    with torch.no_grad():
        before = base.eval().logits(test)
    found = {"before, text": base.right(test), "before, task": base.right(asked, shown[0])}
    node = {"name": "moextend", "guard": True}
    arms: dict[str, tuple[dict[str, Any] | None, float]] = {
        NEW: ({**node, "layers": layers, "sources": sources}, 1.0),
        "new experts in all layers": ({**node, "layers": [0, 1, 2, 3], "sources": _sources(layers, sources)}, 1.0),
        FULL: (None, 1.0),
        f"{FULL}, rate / 5": (None, 0.2),
        f"{FULL}, rate / 20": (None, 0.05),
    }
    for name, (wanted, factor) in arms.items():
        if only and name not in only:
            continue
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        model.requires_grad_(wanted is None)
        model.projector.requires_grad_(True)
        model.llm.router_aux_coef = 0.001 if wanted is None else 0.0
        if wanted is not None:
            model.adapter = build("adapter", wanted, llm=model.llm)
            model.adapter.attach()
            if name == NEW:
                found[f"{name}, text at the start"] = model.eval().right(test)

        def loss(model: Any = model) -> Tensor:
            patches, label = world.images(BATCH, g)
            return model.loss(world.questions(label, g), patches)

        model.train()
        train(model.parameters(), steps["task"], loss, rate=RATE * factor, warmup=20, decay=0.0)
        model.eval()
        found |= {f"{name}, text": model.right(test), f"{name}, task": model.right(asked, shown[0])}
        if wanted is not None:
            with torch.no_grad():
                found[f"{name}, text under the guard same to the bit"] = float(
                    torch.equal(model.logits(test, guarded=True), before)
                )
        show(f"  {name}: text {found[f'{name}, text']:.2f}, task {found[f'{name}, task']:.2f}")
    return found


def judge(found: dict[str, list[float]]) -> list[Row]:
    """Less forgetting at the same rate, the task learnt, the guard exact; lower rates are shown without a bound."""
    text, full = found[f"{NEW}, text"], found[f"{FULL}, text"]
    low = [max(a, b) for a, b in zip(found[f"{FULL}, rate / 5, text"], found[f"{FULL}, rate / 20, text"], strict=True)]
    guard = found[f"{NEW}, text under the guard same to the bit"]
    return [
        Row("moextend: text kept beyond full fine-tuning at the same rate",
            over([a - b for a, b in zip(text, full, strict=True)]), "", bound=0.15),
        Row("moextend: task, new experts", over(found[f"{NEW}, task"]), "", bound=0.9),
        Row("moextend: task, every weight", over(found[f"{FULL}, task"]), "", bound=0.9),
        Row("moextend: text under the guard, same to the bit", over(guard), "", bound=1.0),
        Row("moextend: text kept beyond full fine-tuning at lower rates",
            over([a - b for a, b in zip(text, low, strict=True)]), "", note="below 0: full fine-tuning forgets less"),
    ]  # fmt: skip


class _Model(nn.Module):
    """The language model, a projector of patches, and the adapter where there is one."""

    def __init__(self, seed: int, world: World) -> None:
        super().__init__()
        self.adapter: Any = None
        torch.manual_seed(seed)
        sizes = {"hidden_size": WIDTH, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "max_positions": 64}
        node = {"name": "hf", "model_type": "mixtral", "num_experts": 8, "top_k": 2, **sizes}
        self.llm = build("llm", node, vocab_size=NAME + world.num_classes)
        self.projector = nn.Sequential(nn.Linear(world.dim, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def logits(self, words: Tensor, patches: Tensor | None = None, guarded: bool = False) -> Tensor:
        """Logits behind each of `words` (B, T)."""
        embeds = self.llm.embed(words)
        if patches is not None:
            embeds = torch.cat([self.projector(patches), embeds], dim=1)
        if self.adapter is not None:
            self.adapter.condition(None, [int(not guarded)] * len(words))
        hidden = self.llm.hidden(inputs_embeds=embeds).last_hidden_state
        return self.llm.head(hidden[:, -words.shape[1] :])

    def loss(self, words: Tensor, patches: Tensor | None = None) -> Tensor:
        """Loss of the answers: every other word, from the third on; of a caption its only one."""
        logits = self.logits(words[:, :-1], patches)
        first = 1 if words.shape[1] > 2 else 0
        parts = [F.cross_entropy(logits[:, first::2].flatten(0, 1), words[:, first + 1 :: 2].flatten())]
        parts += [*self.llm.aux_losses().values(), *(self.adapter.aux_losses().values() if self.adapter else ())]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def right(self, words: Tensor, patches: Tensor | None = None) -> float:
        """Share of answers that are right."""
        logits = self.logits(words[:, :-1], patches)
        hits = (logits[:, 1::2].argmax(-1) == words[:, 2::2]).float()
        return float(hits.mean())


def _chosen(base: _Model, world: World, g: torch.Generator, steps: int) -> tuple[list[int], list[int]]:
    """Tune the routers of a copy on the task, and choose by what that shifts."""
    probe = copy.deepcopy(base)
    probe.requires_grad_(False)
    routers = [layer.mlp.gate.weight.requires_grad_(True) for layer in probe.llm.layers]

    def task() -> Tensor:
        patches, label = world.images(BATCH, g)
        return probe.loss(world.questions(label, g), patches)

    train(routers, steps, task, rate=1e-3, warmup=20, decay=0.0)
    seen = torch.Generator().manual_seed(0)
    patches, label = world.images(TEST, seen)
    words = world.questions(label, seen)
    counts = []
    for model in (base, probe):
        with torch.no_grad(), counted(model.llm) as count:
            model.logits(words, patches)
        counts.append(count)
    return select(counts[0], counts[1])


def _sources(layers: list[int], sources: list[int]) -> list[int]:
    """For all four layers: those chosen from where they were, the others from expert 0."""
    return [dict(zip(layers, sources, strict=True)).get(i, 0) for i in range(4)]
