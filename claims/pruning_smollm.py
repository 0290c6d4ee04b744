"""The comparison of `pruning` where words are known: SmolLM2-135M looks at photos through DINOv2-small.

One model learns to name clothes from 144 image tokens. Then it answers behind each pruner, which it never learnt with:
FasterVLM and VisionZip rank by [CLS], DivPrune by differences, AIM merges and drops inside the LLM. Controls: tokens at
random, pooled tokens, and a smaller picture.
"""

from zoo.claims.experiment import Bound, Experiment, Run, gap, in_seeds, least_of_seeds, ratio
from zoo.claims.smollm import LLM, LORA, loaded, scores, trained

SIZE, TOKENS = 168, 144  # pixels a side, patches of 14
KEPT, COMPARED = (72, 36, 16), 36  # tokens; where dense positions are compared
STEPS, TEST = 160, 200
SET = "fashion_mnist"
DATA = (f"data=[{SET}]", f"data.{SET}.yes_no=0")
READER = (
    LLM,
    "vision=dinov2_small",
    f"vision.image_size={SIZE}",
    "vision.fit=squash",
    "projector=mlp",
    *LORA,
)
DENSE = "dense positions"


def chains() -> dict[str, list[str]]:
    """Name of an arm -> options that put its pruner in."""
    found: dict[str, list[str]] = {f"all {TOKENS}": []}
    for k in KEPT:
        share = k / TOKENS
        found[f"fastervlm {k}"] = ["pruner=fastervlm", f"pruner.fastervlm.num_keep={k}"]
        for name in ("visionzip", "divprune", "random"):
            found[f"{name} {k}"] = [f"pruner={name}", f"pruner.{name}.keep_ratio={share}"]
        found[f"aim merged to {k}"] = ["pruner=aim", f"pruner.aim.merge_ratio={share}", "pruner.aim.prune=false"]
    found["aim, none from layer 24"] = ["pruner=aim", "pruner.aim.merge_ratio=1"]
    found["aim merged to 36, none from layer 24"] = ["pruner=aim", "pruner.aim.merge_ratio=0.25"]
    found["pool 36"] = ["pruner=pool", "pruner.pool.stride=2"]
    found["downsample 36"] = ["pruner=downsample", "pruner.downsample.keep_ratio=0.25"]
    return found


def measure(run: Run) -> None:
    """Teach one model, and ask it behind every pruner, with kept and with dense positions."""
    stages = {"answer": {"steps": STEPS, "train": ["projector", "adapter"]}}
    folder = trained(run, "reader", [*READER, *DATA], stages)
    for name, words in run.arms(chains()):
        both = words and not any(name.endswith(f" {k}") for k in KEPT if k != COMPARED)
        for positions in ("kept", "dense") if both else ("kept",):
            model, processor = loaded(folder, f"positions={positions}", *words)
            found = scores(run, model, processor, DATA, TEST, baselines=not words)
            end = f", {DENSE}" if positions == "dense" else ""
            run.add({f"{name}{end}{what.removeprefix('all')}": one for what, one in found.items() if SET not in what})


EXPERIMENT = Experiment(
    data=(SET,),
    setting=(
        f"SmolLM2-135M with LoRA of rank 8, DINOv2-small at {SIZE} pixels, {TOKENS} tokens, {STEPS} steps of 16",
        f"accuracy of the name on {TEST} dev photos of clothes; no pruner took part in the training",
    ),
    measure=measure,
    bounds=(
        Bound("fastervlm at 36, share of what all tokens reach", ratio("fastervlm 36", "all 144"), at_least=0.95),
        in_seeds("fastervlm above random at 36", gap("fastervlm 36", "random 36"), 0.02),
        in_seeds("fastervlm above random at 16", gap("fastervlm 16", "random 16"), 0.02),
        in_seeds("visionzip above random at 36", gap("visionzip 36", "random 36")),
        in_seeds("divprune above random at 36", gap("divprune 36", "random 36")),
        in_seeds("fastervlm above downsample at 36", gap("fastervlm 36", "downsample 36")),
        least_of_seeds("aim inside the LLM, share of all", ratio("aim, none from layer 24", "all 144"), 0.95),
        in_seeds("kept above dense positions, fastervlm at 36", gap("fastervlm 36", f"fastervlm 36, {DENSE}")),
    ),
)
