"""The comparison of `claim_mole` on real domains: clothes, radiology, and sentences about shapes, in one frozen model.

A small model is trained on yes-or-no questions about photos of clothes (Fashion-MNIST) and frozen. Then one update, or
routed ones, have to name the clothes, answer clinicians' questions (VQA-RAD), and judge sentences about shapes (NLVR),
a third of each batch each. NLVR stays at chance for every small model of the zoo; it is there as a domain of other
words.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.benches.claims import over
from zoo.benches.real_data import CLOTHES, folder_of
from zoo.benches.report import Row
from zoo.claims.steps import train
from zoo.composed.model import ZooModel
from zoo.loading.build import processor_for
from zoo.model_config import ZooConfig
from zoo.registry import IGNORE_INDEX, build
from zoo.text.batch import EncodedSample
from zoo.text.tokenizer import train_tokenizer

DATA = ("fashion_mnist", "vqa_rad", "nlvr")
BASE_STEPS, STEPS, BATCH, MOST, TEST = 300, 300, 24, 1500, 256
RATE, WARMUP, RANK = 3e-3, 20, 2
LORA = {"name": "lora", "rank": RANK, "alpha": 2.0 * RANK, "targets": ["gate_proj", "up_proj", "down_proj"]}
MOLE = {"name": "mole", "num_experts": 3, "rank": RANK, "alpha": 2.0 * RANK, "dropout": 0.0}
MIX, TWICE, TOTAL, ROUTED = "one update", "one update, twice the steps", "one update of rank 6", "3 experts"
ARMS: dict[str, tuple[dict[str, Any], int]] = {
    MIX: (LORA, 1),
    TWICE: (LORA, 2),
    TOTAL: ({**LORA, "rank": 3 * RANK, "alpha": 6.0 * RANK}, 1),
    ROUTED: (MOLE, 1),
    f"{ROUTED}, gate prob": ({**MOLE, "gate": "prob"}, 1),
}
SETTING = [
    "a frozen model of 32 px, width 64, 2 layers; rank 2 on the feed-forward layers, 300 steps of 24 at 3e-3",
    "nll: of a token of the answers of dev, mean of three domains; right: answers with every token the likeliest",
]


def measure(seed: int, share: float, show: Callable[[str], None]) -> dict[str, float]:
    """Teach the base, and every arm on a copy of it."""
    tokenizer, rows = _rows(MOST if share == 1 else 20)
    base, processor = _model(tokenizer, seed)
    g = torch.Generator().manual_seed(seed)

    def batch(domains: list[str]) -> dict[str, Any]:
        chosen = [rows[d, "train"] for d in domains for _ in range(BATCH // len(domains))]
        return processor.collate([some[int(torch.randint(len(some), (), generator=g))] for some in chosen])

    base.train().set_trainable(["all"])
    steps = max(2, round(BASE_STEPS * share))
    train(base.parameters(), steps, lambda: base(**batch(["base"])).loss, rate=RATE, warmup=WARMUP)
    base.requires_grad_(False)
    found: dict[str, float] = {}
    for name, (node, times) in ARMS.items():
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        model.adapter[node["name"]] = build("adapter", node, llm=model.llm)
        model.adapter[node["name"]].attach()
        model.train().set_trainable(["adapter"])

        def loss(model: ZooModel = model) -> Tensor:
            return model(**batch(list(DATA))).loss

        train(model.parameters(), max(2, round(times * STEPS * share)), loss, rate=RATE, warmup=WARMUP, decay=0.0)
        model.eval()
        scores = {d: _score(model, processor, rows[d, "dev"]) for d in DATA}
        found |= {f"{name}, {d}, {what}": s[i] for d, s in scores.items() for i, what in enumerate(("nll", "right"))}
        found[f"{name}, nll"] = sum(s[0] for s in scores.values()) / len(scores)
        show(f"  {name}: {found[f'{name}, nll']:.3f}")
    return found


def judge(found: dict[str, list[float]]) -> list[Row]:
    """As on symbols, without a bound."""
    routed = found[f"{ROUTED}, nll"]
    rows = []
    for other, why in ((MIX, "equal weights at work"), (TWICE, "twice its steps"), (TOTAL, "equal weights in all")):
        ratios = [a / b for a, b in zip(found[f"{other}, nll"], routed, strict=True)]
        note = f"{why}; above 1: experts are better"
        rows.append(Row(f"mole_domains: nll of {other} over that of experts", over(ratios), note=note))
    return rows


@torch.no_grad()
def _score(model: ZooModel, processor: Any, rows: list[EncodedSample]) -> tuple[float, float]:
    """Mean negative log-likelihood of a token, and share of answers that are right in all."""
    lost, count, right = 0.0, 0, 0
    for at in range(0, len(rows), 64):
        batch = processor.collate(rows[at : at + 64])
        logits, labels = model(**batch, all_logits=True).logits[:, :-1], batch["labels"][:, 1:]
        asked = labels != IGNORE_INDEX
        logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        lost, count = lost - float(logp[asked].sum()), count + int(asked.sum())
        right += int(((logits.argmax(-1) == labels) | ~asked).all(1).sum())
    return lost / count, right / len(rows)


def _model(tokenizer: Any, seed: int) -> tuple[ZooModel, Any]:
    torch.manual_seed(seed)
    tower = {"name": "timm", "image_size": 32, "patch_size": 8, "stem": "conv", "width": 64, "heads": 4, "depth": 1}
    llm = {"name": "hf", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}
    slots = {"vision": {**tower, "layer": -1}, "projector": {"name": "mlp"}, "llm": llm}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids = {"image_token_id": tokenizer.image_token_id, "text_vocab_size": len(tokenizer)}
    model = ZooModel(ZooConfig(slots=slots, attention="sdpa", **ids, **special))
    return model, processor_for(model, tokenizer)


@cache
def _rows(most: int) -> tuple[Any, dict[tuple[str, str], list[EncodedSample]]]:
    """The tokenizer, and encoded questions: (domain, split) -> rows; `base` is what the frozen model knows."""
    clothes, rad = folder_of("fashion_mnist"), folder_of("vqa_rad")
    kinds = {"images": "idx3", "labels": "idx1"}
    files = {what: f"{clothes}/{{split}}-{what}-{kind}-ubyte.gz" for what, kind in kinds.items()}
    known: dict[str, dict[str, Any]] = {
        "base": {"name": "classes", **files, "classes": CLOTHES, "name_question": "", "limit": most},
        "fashion_mnist": {"name": "classes", **files, "classes": CLOTHES, "yes_no_question": "", "limit": most},
        "vqa_rad": {"name": "chat_json", "file": f"{rad}/{{split}}.jsonl.gz", "images": f"{rad}/images.tar"},
        "nlvr": {"name": "nlvr", "root": str(folder_of("nlvr")), "layout": "square", "group_by_image": False},
    }
    known["nlvr"] |= {"limit": most, "plain_text": True}
    samples = {}
    for domain, node in known.items():
        for split in ("train", "dev"):
            data = build("dataset", {**node, "split": split})
            samples[domain, split] = [
                data.get(i) for i in range(min(len(data), most if split == "train" else TEST, most))
            ]
    said = [m["content"][-1]["text"] for some in samples.values() for s in some for m in s.dialogs[0].messages]
    tokenizer = train_tokenizer(said, 1024)
    processor = _model(tokenizer, 0)[1]
    return tokenizer, {key: [processor.encode(s) for s in some] for key, some in samples.items()}
