"""Claim: one low-rank update shared by conflicting domains hurts each, and routed experts repair it (arXiv:2401.16160).

A small Llama knows four permutations of 64 symbols, each named by a domain token. Frozen, it is taught two new ones for
two of the tokens: the same inputs, contradicting answers. Controls: one update of the same rank for twice the steps,
one of the rank of all experts together, and a router that nothing trains.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.claims.experiment import Bound, Experiment, Numbers, Run, in_seeds, mean, ratio
from zoo.claims.steps import train
from zoo.registry import build
from zoo.registry.forward_pass import running

SYMBOLS, DOMAINS, PAIRS = 64, 4, 8
BASE_STEPS, STEPS, BATCH, TEST = 1500, 600, 32, 256
RATE, WARMUP = 3e-3, 50
LORA = {"name": "lora", "rank": 1, "alpha": 2.0, "targets": ["gate_proj", "up_proj", "down_proj"]}
MOLE = {"name": "mole", "num_experts": 3, "rank": 1, "alpha": 2.0, "dropout": 0.0}
MIX, TWICE = "one update, both domains", "one update, twice the steps"
# Arm -> adapter, steps as a multiple, domains.
ARMS: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "one update, domain 0 alone": (LORA, 1, [0]),
    "one update, domain 1 alone": (LORA, 1, [1]),
    MIX: (LORA, 1, [0, 1]),
    TWICE: (LORA, 2, [0, 1]),
    "one update of rank 3": ({**LORA, "rank": 3, "alpha": 6.0}, 1, [0, 1]),
    "3 experts": (MOLE, 1, [0, 1]),
    "3 experts, router never trained": ({**MOLE, "balance": 0.0}, 1, [0, 1]),
    "3 experts, gate prob": ({**MOLE, "gate": "prob"}, 1, [0, 1]),
    "3 experts, gate ste": ({**MOLE, "gate": "ste"}, 1, [0, 1]),
}


def measure(run: Run) -> None:
    """Teach the base, and every arm on a copy of it."""
    g = run.generator()
    old, new = (torch.stack([torch.randperm(SYMBOLS, generator=g) for _ in range(n)]) for n in (DOMAINS, 2))
    base = _base(old, run)
    for name, (node, times, domains) in run.arms(ARMS, g):
        llm = copy.deepcopy(base)
        torch.manual_seed(run.seed)
        adapter = build("adapter", node, llm=llm)
        adapter.attach()
        own = [*adapter.parameters(), *(p for n, p in llm.lm.named_parameters() if adapter.owns(n))]
        llm.train()

        def loss(llm: Any = llm, adapter: Any = adapter, domains: list[int] = domains) -> Tensor:
            words = torch.cat([_draw(new, [d], BATCH // len(domains), g) for d in domains])
            with running():
                return _loss(llm, words) + sum(adapter.aux_losses().values())

        train(own, run.steps(times * STEPS), loss, rate=RATE, warmup=WARMUP, decay=0.0)
        llm.eval()
        adapter.eval()
        scores = [_score(llm, new, d, run) for d in domains]
        run.add({f"{name}, {what}": mean([s[i] for s in scores]) for i, what in enumerate(("loss", "right"))})
    alone = [run.found[f"one update, domain {d} alone, loss"] for d in (0, 1)]
    run.add({"one update, each domain alone, loss": sum(alone) / 2})


def _draw(tables: Tensor, domains: list[int], n: int, g: torch.Generator) -> Tensor:
    """Draw sequences (n, 1 + 2 * PAIRS): a domain token, then symbols each followed by its image."""
    domain = torch.tensor(domains)[torch.randint(len(domains), (n,), generator=g)]
    s = torch.randint(SYMBOLS, (n, PAIRS), generator=g)
    pairs = torch.stack([s, tables[domain].gather(1, s)], dim=2).flatten(1)
    return torch.cat([SYMBOLS + domain[:, None], pairs], dim=1)


def _answers(llm: Any, words: Tensor) -> tuple[Tensor, Tensor]:
    hidden = llm.hidden(inputs_embeds=llm.embed(words[:, :-1])).last_hidden_state
    return llm.head(hidden[:, 1::2]).flatten(0, 1), words[:, 2::2].flatten()


def _loss(llm: Any, words: Tensor) -> Tensor:
    return F.cross_entropy(*_answers(llm, words))


@torch.no_grad()
def _score(llm: Any, tables: Tensor, domain: int, run: Run) -> tuple[float, float]:
    logits, wanted = _answers(llm, _draw(tables, [domain], run.size(TEST, 8), run.generator(10_000)))
    return float(F.cross_entropy(logits, wanted)), float((logits.argmax(-1) == wanted).float().mean())


def _base(tables: Tensor, run: Run) -> Any:
    torch.manual_seed(run.seed)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_positions": 64}
    llm = build("llm", {"name": "hf", **sizes}, vocab_size=SYMBOLS + DOMAINS)
    g, everything = run.generator(1), list(range(DOMAINS))
    train(llm.parameters(), run.steps(BASE_STEPS), lambda: _loss(llm, _draw(tables, everything, BATCH, g)), rate=RATE,
          warmup=WARMUP)  # fmt: skip
    return llm.requires_grad_(False)


def _beats_twice(found: Numbers) -> float:
    return float(found["3 experts, loss"] < found[f"{TWICE}, loss"])


EXPERIMENT = Experiment(
    setting=(
        "a frozen Llama of 2 layers, width 64; rank 1 on the feed-forward layers, 600 steps of 32 at 3e-3",
        "cross-entropy of an answer, mean of the two new domains; 256 fresh sequences each",
    ),
    measure=measure,
    bounds=(
        Bound("loss of one update over that of experts", ratio(f"{MIX}, loss", "3 experts, loss"), 2.0, unit="x"),
        in_seeds("seeds on which experts beat twice the steps", _beats_twice, 1.0),
        in_seeds(
            "loss of experts over that of one update with as many weights in all",
            ratio("3 experts, loss", "one update of rank 3, loss"),
            unit="x",
            note="above 1: the plain update is better",
        ),
    ),
)
