"""Claim: one low-rank update shared by conflicting domains hurts each, and routed experts repair it (arXiv:2401.16160).

A small Llama knows four permutations of 64 symbols, each named by a domain token. Frozen, it is taught two new ones for
two of the tokens: the same inputs, contradicting answers. Controls: one update of the same rank for twice the steps,
one of the rank of all experts together, and a router that nothing trains.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.benches.claims import over
from zoo.benches.measure import Value
from zoo.benches.report import Row
from zoo.claims.steps import train
from zoo.registry import build

SYMBOLS, DOMAINS, PAIRS = 64, 4, 8
BASE_STEPS, STEPS, BATCH, TEST = 1500, 600, 32, 256
RATE, WARMUP = 3e-3, 50
LORA = {"name": "lora", "rank": 1, "alpha": 2.0, "targets": ["gate_proj", "up_proj", "down_proj"]}
MOLE = {"name": "mole", "num_experts": 3, "rank": 1, "alpha": 2.0, "dropout": 0.0}
MIX, TWICE, ROUTED = "one update, both domains", "one update, twice the steps", "3 experts"
# Arm -> adapter, steps as a multiple, domains.
ARMS: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "one update, domain 0 alone": (LORA, 1, [0]),
    "one update, domain 1 alone": (LORA, 1, [1]),
    MIX: (LORA, 1, [0, 1]),
    TWICE: (LORA, 2, [0, 1]),
    "one update of rank 3": ({**LORA, "rank": 3, "alpha": 6.0}, 1, [0, 1]),
    ROUTED: (MOLE, 1, [0, 1]),
    f"{ROUTED}, router never trained": ({**MOLE, "balance": 0.0}, 1, [0, 1]),
    f"{ROUTED}, gate prob": ({**MOLE, "gate": "prob"}, 1, [0, 1]),
    f"{ROUTED}, gate ste": ({**MOLE, "gate": "ste"}, 1, [0, 1]),
}
SETTING = [
    "a frozen Llama of 2 layers, width 64; rank 1 on the feed-forward layers, 600 steps of 32 at 3e-3",
    "cross-entropy of an answer, mean of the two new domains; 256 fresh sequences each",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Teach the base, and every arm on a copy of it."""
    g = torch.Generator().manual_seed(seed)
    old, new = (torch.stack([torch.randperm(SYMBOLS, generator=g) for _ in range(n)]) for n in (DOMAINS, 2))
    base = _base(old, seed, share)
    found = {}
    for name, (node, times, domains) in ARMS.items():
        llm = copy.deepcopy(base)
        torch.manual_seed(seed)
        adapter = build("adapter", node, llm=llm)
        adapter.attach()
        own = [*adapter.parameters(), *(p for n, p in llm.lm.named_parameters() if adapter.owns(n))]
        llm.train()

        def loss(llm: Any = llm, adapter: Any = adapter, domains: list[int] = domains) -> Tensor:
            words = torch.cat([_draw(new, [d], BATCH // len(domains), g) for d in domains])
            return _loss(llm, words) + sum(adapter.aux_losses().values())

        train(own, max(2, round(times * STEPS * share)), loss, rate=RATE, warmup=WARMUP, decay=0.0)
        llm.eval()
        adapter.eval()
        scores = [_score(llm, new, d, seed, share) for d in domains]
        found[f"{name}, loss"], found[f"{name}, right"] = (sum(s[i] for s in scores) / len(scores) for i in (0, 1))
        show(f"  {name}: {found[f'{name}, loss']:.3f}")
    alone = [name for name in found if "alone, loss" in name]
    return found | {"one update, each domain alone, loss": sum(found[name] for name in alone) / len(alone)}


def judge(found: dict[str, list[float]]) -> list[Row]:
    """Twice as good as one update on the mix, and better than twice its steps; the controls without a bound."""
    mix, twice, routed = (found[f"{name}, loss"] for name in (MIX, TWICE, ROUTED))
    total = found["one update of rank 3, loss"]
    gain = sum(mix) / sum(routed)
    wins = [float(a < b) for a, b in zip(routed, twice, strict=True)]
    return [
        Row("mole: loss of one update over that of experts", Value(gain, gain, gain), bound=2.0),
        Row("mole: seeds on which experts beat twice the steps", over(wins), "", bound=1.0),
        Row("mole: loss of experts over that of one update with as many weights in all",
            over([a / b for a, b in zip(routed, total, strict=True)]), note="above 1: the plain update is better"),
    ]  # fmt: skip


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
def _score(llm: Any, tables: Tensor, domain: int, seed: int, share: float) -> tuple[float, float]:
    words = _draw(tables, [domain], TEST if share == 1 else 8, torch.Generator().manual_seed(10_000 + seed))
    logits, wanted = _answers(llm, words)
    return float(F.cross_entropy(logits, wanted)), float((logits.argmax(-1) == wanted).float().mean())


def _base(tables: Tensor, seed: int, share: float) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_positions": 64}
    llm = build("llm", {"name": "hf", **sizes}, vocab_size=SYMBOLS + DOMAINS)
    g = torch.Generator().manual_seed(seed + 1)
    steps = max(2, round(BASE_STEPS * share))
    everything = list(range(DOMAINS))
    train(llm.parameters(), steps, lambda: _loss(llm, _draw(tables, everything, BATCH, g)), rate=RATE, warmup=WARMUP)
    return llm.requires_grad_(False)
