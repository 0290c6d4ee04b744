"""The end of a run: save the model, score it, and print the scores and the next commands."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zoo.composed.card_facts import facts_in
from zoo.composed.masters import is_mixed, narrow
from zoo.evaluation.evaluate import evaluate
from zoo.evaluation.result import EvalResult
from zoo.evaluation.score_table import score_table
from zoo.registry import build
from zoo.registry.foreign import read_object
from zoo.runs.consent import forget
from zoo.runs.folder import RunFolder, read_metrics
from zoo.runs.processes import by_first
from zoo.runs.progress import clock
from zoo.runs.trackers import send_pictures
from zoo.runs.whole_weights import whole_weights
from zoo.storage.atomic import hashes, write_json, written_beside
from zoo.training.run_model import facts_of
from zoo.training.shown_answers import shown_answers
from zoo.training.step import reseed

if TYPE_CHECKING:
    from zoo.training.loop import Run

SAMPLES = 400  # scored of each data set at the end of a run; `zoo eval` scores all


def finish(run: "Run") -> None:
    """Save the model, score it, and print the table, the folder and three commands.

    A run that was killed in between resumes here and repeats the unfinished part, to the same bits.
    """
    # The first process looks: to another one, late or on a network file system, the folder may look different.
    if not by_first(run.accelerator, lambda: run.resumed_trained and _is_saved(run.folder)):
        save_model(run)
    if not any(hasattr(p, "full_tensor") for p in run.model.parameters()):
        narrow(run.model)  # as a saved model loads
    run.model.compile_parts(False)  # as in `zoo eval`, so that both give the same scores
    # Random pruners draw from torch's generator: a process that resumes here must draw the same numbers.
    reseed(run.cfg.seed, run.progress.global_step, -5)
    result = score(run, limit=run.cfg.limit or SAMPLES, baselines=True)
    if result is not None:
        run.step_log.track(result.summary(), run.progress.global_step)
        track_answers(run, result)
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
        folder=run.folder.path,
        precision="bf16" if run.gather_short or is_mixed(run.model) else "fp32",
        skip_broken=run.skips,
        max_broken=run.cfg.max_broken,
    )
    at = {"step": run.progress.global_step, "stage": "scores"}
    new = [{**at, **line} for line in run.step_log.left_out.new(result.skipped)]
    by_first(run.accelerator, lambda: run.folder.log_skipped(*new))
    return result


def track_answers(run: "Run", result: EvalResult) -> None:
    """Send images with their answers to the trackers, if asked for."""
    count = run.cfg.log_pictures
    if not (count and run.main and run.accelerator.trackers):
        return
    pictures = shown_answers(run.data.evaluation, result.predictions, count)
    refused = send_pictures(run.accelerator, "answers", pictures, run.progress.global_step)
    if refused and not run.noted_pictures:
        run.noted_pictures = True
        run.display.note(f"log_pictures: {', '.join(refused)} takes no pictures from here.")


def _is_saved(folder: RunFolder) -> bool:
    """Whether the final model is there, and zoo.lock has its hashes, which is written behind it."""
    return folder.has_model and "model" in read_object(folder.lock)


def save_model(run: "Run") -> None:
    """Write the final model and its processor to the run's folder."""
    model = run.model
    with whole_weights(run.accelerator, model, run.folder) as state:

        def write() -> None:
            with run.folder.writing("the model"), written_beside(run.folder.model, folder=True) as beside:
                model.save_pretrained(beside, state_dict=state)
                run.processor.save_pretrained(beside)
                _card(run, beside)
            run.folder.write_lock(**facts_of(run, model), model=hashes(run.folder.model.glob("*.safetensors")))

        by_first(run.accelerator, write)


def write_report(run: "Run", result: EvalResult | None) -> None:
    """Write scores, model card and summary; the summary last, since it marks the run as finished."""
    with run.folder.writing("scores"):
        if result is not None:
            result.save(run.folder.path)
            _card(run, run.folder.model, result)
        write_json(run.folder.summary, _summary(run, result))
    forget(run.folder.path)


def report(run: "Run", result: EvalResult | None, console: Console) -> None:
    """Print scores, folder and the next commands."""
    path = _short(run.folder.path)
    named = json.dumps(f"dir:{path}", ensure_ascii=False)
    if result is not None:
        console.print(score_table(result.lines, "Scores in per cent"))
        most = run.cfg.limit or SAMPLES
        if any(d.is_stream or len(d) > most for d in run.data.evaluation.values()):
            console.print(f"Of each data set {most} samples were scored, drawn or the first ones.", highlight=False)
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
    root, here = Path(run.cfg.run.dir), run.folder.path.resolve()
    given = ", ".join([named, *(json.dumps(word, ensure_ascii=False) for word in plugins)])
    for command in (
        f"zoo eval {shlex.join([f'model=dir:{path}', *plugins])}",
        f"zoo report {shlex.quote(_short(root if here.is_relative_to(root.resolve()) else here))}",
        f"python -c {shlex.quote(f'import zoo; print(zoo.load({given}))')}",
    ):
        console.print(f"    {command}", soft_wrap=True, highlight=False, markup=False)


def _summary(run: "Run", result: EvalResult | None) -> dict[str, Any]:
    metrics = [m for m in read_metrics(run.folder.metrics) if "loss" in m]
    return {
        "name": run.folder.path.name,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "image_tokens": run.model.num_image_tokens,
        "steps": run.progress.global_step,
        "seconds": round(run.progress.seconds, 1),
        "skipped": len(read_metrics(run.folder.skipped)),
        "loss": metrics[-1]["loss"] if metrics else None,
        "scores": result.summary() if result is not None else {},
    }


def _card(run: "Run", folder: Path, result: EvalResult | None = None) -> None:
    """Write the model card: what it was trained on, and its scores, beside what the model itself states."""
    before = facts_in(run.model.described)
    lines = [] if result is None else json.loads(json.dumps([asdict(line) for line in result.lines]))
    datasets = dict.fromkeys([*before.datasets, *(_dataset_name(n, run.cfg.data[n]) for n in run.data.training)])
    facts = replace(before, datasets=tuple(datasets), scores=tuple(lines))
    run.model.write_card(folder, facts, name=run.folder.path.name)


def _dataset_name(name: str, node: Any) -> str:
    """Return the name of a data set: on the hub where it is of the hub, else in the run."""
    path = str(node.get("path") or "") if node["name"] == "hf" else ""
    return path if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists() else name


def _short(path: Path) -> str:
    """Return a path relative to the working folder, if it is below it."""
    here = Path.cwd()
    return str(path.resolve().relative_to(here)) if path.resolve().is_relative_to(here) else str(path)
