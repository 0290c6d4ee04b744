"""The comparison of `mole` on real domains: clothes, radiology, and sentences about shapes, in one frozen model.

A small model is trained on yes-or-no questions about photos of clothes (Fashion-MNIST) and frozen. Then one update, or
routed ones, have to name the clothes, answer clinicians' questions (VQA-RAD), and judge sentences about shapes (NLVR),
a third of each batch each. NLVR stays at chance for every small model of the zoo; it is there as a domain of other
words.
"""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from zoo.benches.real_data import CLOTHES, folder_of
from zoo.claims.experiment import Bound, Experiment, Run, ratio
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
ARMS: dict[str, tuple[dict[str, Any], int]] = {
    "one update": (LORA, 1),
    "one update, twice the steps": (LORA, 2),
    "one update of rank 6": ({**LORA, "rank": 3 * RANK, "alpha": 6.0 * RANK}, 1),
    "3 experts": (MOLE, 1),
    "3 experts, gate prob": ({**MOLE, "gate": "prob"}, 1),
}


def measure(run: Run) -> None:
    """Teach the base, and every arm on a copy of it."""
    tokenizer, rows = _rows(run.size(MOST, 20))
    base, processor = _model(tokenizer, run.seed)
    g = run.generator()

    def batch(domains: list[str]) -> dict[str, Any]:
        chosen = [rows[d, "train"] for d in domains for _ in range(BATCH // len(domains))]
        return processor.collate([some[int(torch.randint(len(some), (), generator=g))] for some in chosen])

    base.train().set_trainable(["all"])
    steps = run.steps(BASE_STEPS)
    train(base.parameters(), steps, lambda: base(**batch(["base"])).loss, rate=RATE, warmup=WARMUP)
    base.requires_grad_(False)
    for name, (node, times) in run.arms(ARMS, g):
        torch.manual_seed(run.seed)
        model = copy.deepcopy(base)
        model.adapter[node["name"]] = build("adapter", node, llm=model.llm)
        model.adapter[node["name"]].attach()
        model.train().set_trainable(["adapter"])

        def loss(model: ZooModel = model) -> Tensor:
            return model(**batch(list(DATA))).loss

        train(model.parameters(), run.steps(times * STEPS), loss, rate=RATE, warmup=WARMUP, decay=0.0)
        model.eval()
        scores = {d: _score(model, processor, rows[d, "dev"]) for d in DATA}
        run.add({f"{name}, {d}, {what}": s[i] for d, s in scores.items() for i, what in enumerate(("nll", "right"))})
        run.add({f"{name}, nll": sum(s[0] for s in scores.values()) / len(scores)})


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


EXPERIMENT = Experiment(
    data=DATA,
    setting=(
        "a frozen model of 32 px, width 64, 2 layers; rank 2 on the feed-forward layers, 300 steps of 24 at 3e-3",
        "nll: of a token of the answers of dev, mean of three domains; right: answers with every token the likeliest",
    ),
    measure=measure,
    bounds=[
        Bound(
            f"nll of {other} over that of experts",
            ratio(f"{other}, nll", "3 experts, nll"),
            over="seeds",
            unit="x",
            note=f"{why}; above 1: experts are better",
        )
        for other, why in (
            ("one update", "equal weights at work"),
            ("one update, twice the steps", "twice its steps"),
            ("one update of rank 6", "equal weights in all"),
        )
    ],
)
