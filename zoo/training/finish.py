"""The end of a run: save the model, score it, and print the scores and the next commands."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zoo.composed.masters import is_mixed, narrow
from zoo.evaluation.evaluate import evaluate
from zoo.evaluation.result import EvalResult
from zoo.evaluation.score_table import score_table
from zoo.registry import MODEL_SLOTS, build
from zoo.runs.consent import forget
from zoo.runs.folder import read_metrics
from zoo.runs.processes import by_first
from zoo.runs.progress import clock
from zoo.storage.atomic import hashes, write_json, write_text, written_beside
from zoo.storage.weights import state_of
from zoo.text.markup import markdown
from zoo.training.step import reseed

if TYPE_CHECKING:
    from zoo.training.loop import Run

SAMPLES = 400  # scored of each data set at the end of a run; `zoo eval` scores all


def finish(run: "Run") -> None:
    """Save the model, score it, and print the table, the folder and three commands.

    A run that was killed in between resumes here and repeats the unfinished part, to the same bits.
    """
    if not (run.resumed_trained and run.folder.has_model):
        save_model(run)
    if not any(hasattr(p, "full_tensor") for p in run.model.parameters()):
        narrow(run.model)  # as a saved model loads
    run.model.compile_parts(False)  # as in `zoo eval`, so that both give the same scores
    # Random pruners draw from torch's generator: a process that resumes here must draw the same numbers.
    reseed(run.cfg.seed, run.progress.global_step, -5)
    result = score(run, limit=run.cfg.limit or SAMPLES, baselines=True)
    if result is not None:
        run.step_log.track(result.summary(), run.progress.global_step)
    by_first(run.accelerator, lambda: write_report(run, result))
    if run.main:
        report(run, result, Console())
    run.close()
    run.accelerator.end_training()  # leaves the process group


def score(run: "Run", limit: int, baselines: bool = False) -> EvalResult | None:
    """Evaluate the run's model on the run's evaluation data; None without such data."""
    datasets = run.data.evaluation
    if not datasets:
        return None
    result = evaluate(
        run.model,
        run.processor,
        datasets,
        {str(name): build("task", node) for name, node in run.cfg.task.items()},
        limit=limit,
        baselines=baselines,
        accelerator=run.accelerator,
        precision="bf16" if is_mixed(run.model) else "fp32",
        skip_broken=run.skips,
        max_broken=run.cfg.max_broken,
    )
    at = {"step": run.progress.global_step, "stage": "scores"}
    new = [{**at, **line} for line in run.step_log.left_out.new(result.skipped)]
    by_first(run.accelerator, lambda: run.folder.log_skipped(*new))
    return result


def save_model(run: "Run") -> None:
    """Write the final model and its processor to the run's folder."""
    model, state = run.model, state_of(run.model)  # gathers shards, so every process takes part

    def write() -> None:
        with run.folder.writing("the model"), written_beside(run.folder.model, folder=True) as beside:
            model.save_pretrained(beside, state_dict=state)
            run.processor.save_pretrained(beside)
            (beside / "README.md").write_text(_card(run), encoding="utf-8")
        run.folder.write_lock(**run.facts(model), model=hashes(run.folder.model.glob("*.safetensors")))

    by_first(run.accelerator, write)


def write_report(run: "Run", result: EvalResult | None) -> None:
    """Write scores, model card and summary; the summary last, since it marks the run as finished."""
    with run.folder.writing("scores"):
        if result is not None:
            result.save(run.folder.path)
            write_text(run.folder.model / "README.md", _card(run, result))
        write_json(run.folder.summary, _summary(run, result))
    forget(run.folder.path)


def report(run: "Run", result: EvalResult | None, console: Console) -> None:
    """Print scores, folder and the next commands."""
    path = _short(run.folder.path)
    named = json.dumps(f"dir:{path}", ensure_ascii=False)
    if result is not None:
        console.print(score_table(result.lines, "Scores in per cent"))
    else:
        console.print("Nothing was scored: data holds no split for evaluation, such as data=[..., scenes_eval].")
    if skipped := len(read_metrics(run.folder.skipped)):
        text = f"{skipped} records were left out; {run.folder.skipped.name} has the reasons."
        console.print(text, soft_wrap=True, highlight=False)
    done = f"Trained in {clock(run.progress.seconds)}. Everything is in {path}"
    console.print(done, soft_wrap=True, highlight=False, markup=False)
    console.print("Try next:")
    # A model folder names its plugins but does not bring their code: the commands must name them as well.
    plugins = [f"plugins=[{','.join(run.cfg.plugins)}]"] if run.cfg.plugins else []
    given = ", ".join([named, *(json.dumps(word, ensure_ascii=False) for word in plugins)])
    for command in (
        f"zoo eval {shlex.join([f'model=dir:{path}', *plugins])}",
        "zoo report runs",
        f"python -c {shlex.quote(f'import zoo; print(zoo.load({given}))')}",
    ):
        console.print(f"    {command}", soft_wrap=True, highlight=False, markup=False)


def _summary(run: "Run", result: EvalResult | None) -> dict[str, Any]:
    metrics = [m for m in read_metrics(run.folder.metrics) if "loss" in m]
    return {
        "name": run.folder.path.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.progress.global_step,
        "seconds": round(run.progress.seconds, 1),
        "skipped": len(read_metrics(run.folder.skipped)),
        "loss": metrics[-1]["loss"] if metrics else None,
        "scores": result.summary() if result is not None else {},
    }


def _card(run: "Run", result: EvalResult | None = None) -> str:
    """Return a short model card: parts, how to load it, scores."""
    slots = run.model.config.slots or {}
    rows = []
    for slot in MODEL_SLOTS:
        node = slots.get(slot) or {}
        rows.append(f"| {slot} | {markdown(node.get('name') or ', '.join(node) or '-')} |")
    lines = [
        "---",
        "library_name: zoo",
        "pipeline_tag: image-text-to-text",
        "---",
        f"# {markdown(run.folder.path.name)}",
        "",
    ]
    lines += ["| slot | part |", "|---|---|", *rows, "", "```python", "import zoo", ""]
    lines += [
        f"model, processor = zoo.load({json.dumps(f'dir:{_short(run.folder.path)}', ensure_ascii=False)})",
        "```",
        "",
    ]
    if result is not None:
        lines += ["| data | kind | metric | score | s.e. | n | majority | blind |", "|---|---|---|---|---|---|---|---|"]
        for x in result.lines:
            others = " | ".join("-" if s is None else f"{s.value:.3f}" for s in (x.majority, x.blind))
            figures = f"{x.score.value:.3f} | {x.score.stderr:.3f} | {x.score.n}"
            names = " | ".join(markdown(name) for name in (x.data, x.kind, x.metric))
            lines.append(f"| {names} | {figures} | {others} |")
    return "\n".join(lines) + "\n"


def _short(path: Path) -> str:
    """Return a path relative to the working folder, if it is below it."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
