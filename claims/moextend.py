"""Claim: new experts learn a new modality and forget less than full fine-tuning (arXiv:2408.03511).

A small Mixtral knows four permutations of 32 symbols ("text"). A projector learns to caption "images" of eight classes
for it; then come questions whose answer depends on the class. New experts against training every weight, at the same
rate, a fifth and a twentieth of it; what is left of the text is read without any text in the training. With the guard,
text runs as before by construction; the loss it does not prevent is shown beside it.
"""

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.claims.experiment import Experiment, Run, gap, in_seeds, row
from zoo.claims.steps import train
from zoo.fusion.adapters.expert_shift import counted, select
from zoo.registry import build
from zoo.registry.forward_pass import running

SYMBOLS, DOMAINS, CLASSES, QUESTIONS = 32, 4, 8, 8
SEPARATOR = SYMBOLS + DOMAINS
ASK, NAME = SEPARATOR + 1, SEPARATOR + 1 + QUESTIONS
WIDTH, DIM, PATCHES = 64, 24, 4
TEXT_STEPS, ALIGN_STEPS, PROBE_STEPS, STEPS, BATCH, TEST = 1000, 300, 200, 400, 32, 256
RATE = 2e-3
NEW, FULL, GUARD = "new experts in half of the layers", "every weight", "text under the guard same to the bit"
LOW, LOWEST = f"{FULL}, rate / 5", f"{FULL}, rate / 20"


class Task:
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


def measure(task: Callable[[int], Task], only: Collection[str], run: Run) -> None:
    """Text, captions, the probe; then every way of learning the task on a copy, or those that `only` names."""
    drawn, g = task(run.seed), run.generator(1)
    base = _Model(run.seed, drawn)
    base.llm.router_aux_coef = 0.01
    train(base.llm.parameters(), run.steps(TEXT_STEPS), lambda: base.loss(drawn.text(BATCH, g)), rate=3e-3, warmup=20)
    base.requires_grad_(False)
    base.llm.router_aux_coef = 0.0
    base.projector.requires_grad_(True)

    def caption() -> Tensor:
        patches, label = drawn.images(BATCH, g)
        return base.loss(torch.stack([torch.full_like(label, SEPARATOR), NAME + label], dim=1), patches)

    train(base.projector.parameters(), run.steps(ALIGN_STEPS), caption, rate=3e-3, warmup=20)
    layers, sources = _chosen(base, drawn, g, run.steps(PROBE_STEPS))
    run.show(f"  layers {layers} from experts {sources}")
    probe = run.generator(10_000)
    test = drawn.text(run.size(TEST, 8), probe)
    shown = drawn.unseen(len(test), probe)
    asked = drawn.questions(shown[1], probe)
    with torch.no_grad():
        before = base.eval().logits(test)
    run.add({"before, text": base.right(test), "before, task": base.right(asked, shown[0])})
    node = {"name": "moextend", "guard": True}
    everywhere = [dict(zip(layers, sources, strict=True)).get(i, 0) for i in range(4)]  # expert 0 where none is chosen
    arms: dict[str, tuple[dict[str, Any] | None, float]] = {
        NEW: ({**node, "layers": layers, "sources": sources}, 1.0),
        "new experts in all layers": ({**node, "layers": [0, 1, 2, 3], "sources": everywhere}, 1.0),
        FULL: (None, 1.0),
        LOW: (None, 0.2),
        LOWEST: (None, 0.05),
    }
    for name, (wanted, factor) in run.arms({name: arm for name, arm in arms.items() if name in (only or arms)}, g):
        torch.manual_seed(run.seed)
        model = copy.deepcopy(base)
        model.requires_grad_(wanted is None)
        model.projector.requires_grad_(True)
        model.llm.router_aux_coef = 0.001 if wanted is None else 0.0
        if wanted is not None:
            model.adapter = build("adapter", wanted, llm=model.llm)
            model.adapter.attach()
            if name == NEW:
                run.add({f"{name}, text at the start": model.eval().right(test)})

        def loss(model: Any = model) -> Tensor:
            patches, label = drawn.images(BATCH, g)
            return model.loss(drawn.questions(label, g), patches)

        model.train()
        train(model.parameters(), run.steps(STEPS), loss, rate=RATE * factor, warmup=20, decay=0.0)
        model.eval()
        run.add({f"{name}, text": model.right(test), f"{name}, task": model.right(asked, shown[0])})
        if wanted is not None:
            with torch.no_grad():
                same = torch.equal(model.logits(test, guarded=True), before)
            run.add({f"{name}, {GUARD}": same})


class _Model(nn.Module):
    """The language model, a projector of patches, and the adapter where there is one."""

    def __init__(self, seed: int, task: Task) -> None:
        super().__init__()
        self.adapter: Any = None
        torch.manual_seed(seed)
        sizes = {"hidden_size": WIDTH, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "max_positions": 64}
        node = {"name": "hf", "model_type": "mixtral", "num_experts": 8, "top_k": 2, **sizes}
        self.llm = build("llm", node, vocab_size=NAME + task.num_classes)
        self.projector = nn.Sequential(nn.Linear(task.dim, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

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
        first = 1 if words.shape[1] > 2 else 0
        with running():
            logits = self.logits(words[:, :-1], patches)
            parts = [F.cross_entropy(logits[:, first::2].flatten(0, 1), words[:, first + 1 :: 2].flatten())]
            parts += [*self.llm.aux_losses().values(), *(self.adapter.aux_losses().values() if self.adapter else ())]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def right(self, words: Tensor, patches: Tensor | None = None) -> float:
        """Share of answers that are right."""
        logits = self.logits(words[:, :-1], patches)
        hits = (logits[:, 1::2].argmax(-1) == words[:, 2::2]).float()
        return float(hits.mean())


def _chosen(base: _Model, task: Task, g: torch.Generator, steps: int) -> tuple[list[int], list[int]]:
    """Tune the routers of a copy on the task, and choose by what that shifts."""
    probe = copy.deepcopy(base)
    probe.requires_grad_(False)
    routers = [layer.mlp.gate.weight.requires_grad_(True) for layer in probe.llm.layers]

    def answer() -> Tensor:
        patches, label = task.images(BATCH, g)
        return probe.loss(task.questions(label, g), patches)

    train(routers, steps, answer, rate=1e-3, warmup=20, decay=0.0)
    seen = torch.Generator().manual_seed(0)
    patches, label = task.images(TEST, seen)
    words = task.questions(label, seen)
    counts = []
    for model in (base, probe):
        with torch.no_grad(), counted(model.llm) as count:
            model.logits(words, patches)
        counts.append(count)
    return select(counts[0], counts[1])


EXPERIMENT = Experiment(
    setting=(
        "a Mixtral of 4 layers, width 64, 2 of 8 experts; steps: text 1000, captions 300, routers 200, task 400 at "
        "2e-3",
        "text: share of right answers after the task, which has no text in it; task: the same of the questions",
    ),
    measure=partial(measure, Task, ()),
    bounds=(
        in_seeds("text kept beyond full fine-tuning at the same rate", gap(f"{NEW}, text", f"{FULL}, text"), 0.15),
        in_seeds("task, new experts", row(f"{NEW}, task"), 0.9),
        in_seeds("task, every weight", row(f"{FULL}, task"), 0.9),
        in_seeds("text under the guard, same to the bit", row(f"{NEW}, {GUARD}"), 1.0),
        in_seeds(
            "text kept beyond full fine-tuning at lower rates",
            lambda found: found[f"{NEW}, text"] - max(found[f"{LOW}, text"], found[f"{LOWEST}, text"]),
            note="below 0: full fine-tuning forgets less",
        ),
    ),
)
