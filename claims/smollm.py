"""What the claims on SmolLM2-135M share: an arm is options of `zoo train`, trained by it and scored as `zoo eval` does.

The language model and the encoders are those of the packages of `.[weights]`. Everything is kept in a folder beside the
rows, so that a run that was killed goes on within an arm.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from zoo.claims.experiment import Numbers, Run, mean
from zoo.evaluation.evaluate import evaluate
from zoo.evaluation.result import Line
from zoo.loading.build import load
from zoo.registry import Score, build
from zoo.runs.data import RunData
from zoo.runs.progress import Display
from zoo.settings.config import compose
from zoo.training.finish import save_model
from zoo.training.loop import Run as Training

LLM = "llm=smollm2_135m"
CONVOLUTIONS = (  # 8 x 8 positions, joined to 16 tokens: as in `picturebook_135m`
    "vision=efficientnet_lite0", "vision.image_size=256", "vision.fit=squash",
    "projector=pixel_shuffle", "projector.factor=2", "projector.norm=true", "projector.depth=2", "projector.bias=true",
)  # fmt: skip
LORA = ("adapter=[lora]", "adapter.lora.rank=8", "adapter.lora.alpha=16")
PACKED = 288  # tokens of a row, at most
COST = "seconds_of_a_step.json"
STAGE: dict[str, Any] = {
    "lr": 1e-3,
    "weight_decay": 0.01,
    "warmup_ratio": 0.05,
    "flat_ratio": 0.4,
    "final_ratio": 0.02,
    "pack_length": PACKED,
    "batch_size": 16,
    "accumulate": 2,
    "checkpoint_every": 25,
}


def trained(run: Run, name: str, words: Sequence[str], stages: Mapping[str, Mapping[str, Any]]) -> Path:
    """Train one model, or go on where a killed run left it; return the folder of the trained model.

    Args:
        run: whose seed and share of the steps it has.
        name: of the arm.
        words: options of `zoo train` that compose the model and its data.
        stages: name of a stage -> its options where they differ from `STAGE`.
    """
    folder = place_of(run) / "".join(c if c.isalnum() else "_" for c in name)
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "config.yaml").is_file():
        cfg = compose("train", [f"resume={folder}"])
    else:
        cfg = compose("train", [f"run.folder={folder}", *words, *options_of(run, stages)])
    with Training(cfg, Display(silent=True)) as training:
        begun, done = time.process_time(), training.progress.global_step
        training.train()
        if (steps := training.progress.global_step - done) > 0:
            (folder / COST).write_text(json.dumps((time.process_time() - begun) / steps), encoding="utf-8")
        save_model(training)
    rmtree(folder / "checkpoints", ignore_errors=True)  # of a whole model with its moments: a gigabyte an arm
    return folder / "model"


def options_of(run: Run, stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the options of `zoo train` for the stages of an arm, as `trained` takes them."""
    words = [f"seed={run.seed}", "precision=bf16", "recipe=null"]
    for stage, options in stages.items():
        node = {**STAGE, **options}
        node["steps"] = run.steps(node["steps"])
        if run.share < 0.1:
            node |= {"batch_size": 2, "accumulate": 1}
        words += [f"+stages.{stage}.{key}={_word(value)}" for key, value in node.items()]
    return words


def seconds_of_a_step(folder: Path) -> float:
    """CPU seconds of an optimiser step of `trained`, the teacher's included, where it took its last ones at once."""
    return float(json.loads((folder.parent / COST).read_text(encoding="utf-8")))


def loaded(folder: Path, *words: str) -> tuple[Any, Any]:
    """Load a trained model with other options, such as a pruner, and its processor."""
    return load(f"dir:{folder}", *words, device="cpu")


def scores(run: Run, model: Any, processor: Any, data: Iterable[str], samples: int, baselines: bool = False,
           metric: str = "accuracy") -> Numbers:  # fmt: skip
    """Share of right answers (or mean of `metric`) on the dev split of each data set, and `all`, their mean.

    Args:
        run: with a small share of the steps, two samples of each.
        model: in eval mode.
        processor: of the model.
        data: options of `zoo eval` that choose the data, `data=[...]` first.
        samples: of each data set.
        baselines: add `..., blind` (images of zeros) and `..., majority` (the commonest training answer of a kind).
        metric: that the task of the data gives.
    """
    cfg = compose("eval", ["model=scenes_tiny", *data])
    tasks = {str(name): build("task", node) for name, node in cfg.task.items()}
    found = evaluate(
        model, processor, RunData(cfg.data).evaluation, tasks, limit=run.size(samples, 2), precision="bf16",
        baselines=baselines,
    )  # fmt: skip
    lines = [line for line in found.lines if line.metric == metric]
    rows = _by_set(lines, "", lambda line: line.score)
    if baselines:
        rows |= _by_set(lines, ", blind", lambda line: line.blind)
        rows |= _by_set(lines, ", majority", lambda line: line.majority)
    return rows


def _by_set(lines: Sequence[Line], end: str, score_of: Callable[[Line], Score | None]) -> dict[str, float]:
    """Accuracy on each data set, kinds of question by their number, and the mean over data sets."""
    right: dict[str, float] = defaultdict(float)
    asked = Counter[str]()
    for line in lines:
        if (score := score_of(line)) is not None:
            right[line.data] += score.value * score.n
            asked[line.data] += score.n
    rows = {f"{name}{end}": right[name] / asked[name] for name in asked}
    return {f"all{end}": mean(list(rows.values())), **rows}


def place_of(run: Run) -> Path:
    """Where a seed keeps its models: beside its rows, or in a new folder where rows are not kept."""
    return run.folder if run.folder is not None else Path(mkdtemp(prefix="zoo-claims-"))


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_word(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_word, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
