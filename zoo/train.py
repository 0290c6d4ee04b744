"""`zoo train`: runs the stages of a recipe, one loop for one process and for many.

Also `accelerate launch -m zoo.train ...` and `torchrun --nproc_per_node 2 -m zoo.train ...`. SIGTERM saves a checkpoint
and leaves with code 143; a run that was killed goes on with `zoo train resume=last`, to the same losses.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from zoo import checkpoint
from zoo.engine import Engine, build_distiller, reseed
from zoo.finish import finish, score
from zoo.loader import Batches, Loader, Place
from zoo.memory import keep_memory
from zoo.precision import fast_products, resolve_precision
from zoo.processes import broadcast, gather, start_accelerator
from zoo.progress import Display
from zoo.registry import ZooError
from zoo.run_data import RunData
from zoo.run_folder import RunFolder
from zoo.stage import Stage
from zoo.teacher import Teacher, Twins, load_teacher, shared_tokens, tokens_hash
from zoo.teacher_store import Stored

TERMINATED = 143  # exit code after SIGTERM, as a shell reports it
KEEP = 2  # checkpoints that stay
FLUSH = 10  # steps between writes of metrics on a device that would have to wait for its losses


@dataclass
class Progress:
    """How far a run is: all that a checkpoint needs beside weights and optimisers."""

    stage: int = 0  # index of the stage to run next
    step: int = 0  # steps of it that were taken
    global_step: int = 0  # steps of the run that were taken
    streams: dict[str, list[int]] = field(default_factory=dict)  # of each streaming data set: epoch and samples read
    trained: list[str] = field(default_factory=list)  # weights that were ever trained


def main(cfg: DictConfig) -> RunFolder:
    """Train as the config says; evaluate, save and say what to do next.

    Raises:
        SystemExit: SIGTERM came; the code is 143, and the run can be resumed.
    """
    run = Run(cfg)
    seconds = run.train()
    finish(run, seconds)
    return run.folder


class Run:
    """One run: its folder, model and data, and the loop over stages."""

    def __init__(self, cfg: DictConfig, display: Display | None = None) -> None:
        self.accelerator = start_accelerator(cfg.device, list(cfg.log))
        self.main = self.accelerator.is_main_process
        self.display = display or Display(silent=not self.main)
        self.progress = Progress()
        self.newest: Path | None = None  # checkpoint to start from
        self.folder, self.cfg = self._open(cfg)
        self.stages: dict[str, Any] = {str(n): OmegaConf.to_object(s) for n, s in self.cfg.stages.items()}  # of Stage
        if not self.stages:
            raise ZooError("There is nothing to train: the config has no stages. Choose a recipe, recipe=<name>.")
        fast_products()
        if self.accelerator.device.type == "cpu":
            keep_memory()
        self.data = RunData(self.cfg.data)
        self.model, self.processor = self._compose()
        self._distiller: tuple[Any, Any] = (None, None)  # its node, and itself
        self._teachers: dict[str, Any] = {}
        self._asked = False  # SIGTERM came to this process
        self._leave = False  # it came to one of the processes, and all know it
        self._pending: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = []

    def train(self) -> float:
        """Run what is left of the stages; returns the seconds it took."""
        began = time.monotonic()
        if self.accelerator.log_with:
            self.accelerator.init_trackers("zoo", config={"run": str(self.folder.path), "seed": self.cfg.seed})
        listen = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._on_sigterm) if listen else None
        try:
            with self.display:
                for index, (name, stage) in enumerate(self.stages.items()):
                    if index >= self.progress.stage:
                        self._run_stage(index, name, stage)
        except KeyboardInterrupt:
            self.display.note(f"Stopped. To go on from the newest checkpoint: zoo train resume={self.folder.path}")
            raise
        finally:
            if listen:
                signal.signal(signal.SIGTERM, before)
        return time.monotonic() - began

    # ---- start -------------------------------------------------------------------------------------------------

    def _open(self, cfg: DictConfig) -> tuple[RunFolder, DictConfig]:
        """Make the run's folder, one for all processes; or open one, with the config it was started with."""
        root, path = Path(cfg.run.dir), None
        if cfg.resume:
            path = str(RunFolder.open(cfg.resume, root).path)
        elif self.main:
            path = str(RunFolder.create(root, cfg.run.name or cfg.run.recipe or cfg.model.name, cfg.run.folder).path)
        folder = RunFolder(broadcast(self.accelerator, path))
        if not cfg.resume:
            if self.main:
                OmegaConf.save(cfg, folder.config, resolve=True)
                folder.point_last(root)
            return folder, cfg
        if (folder.model / "config.json").is_file():
            raise ZooError(f"The run {str(folder.path)!r} is finished: its model is in {str(folder.model)!r}.")
        self.newest = next(reversed(folder.list_checkpoints()), None)
        if self.newest:
            known = {f.name for f in fields(Progress)}
            self.progress = Progress(**{k: v for k, v in checkpoint.read_state(self.newest).items() if k in known})
        self.accelerator.wait_for_everyone()
        if self.main:
            folder.rewind(self.progress.global_step)
            self.display.note(f"Resuming {folder.path} after step {self.progress.global_step}.")
        return folder, read_config(folder.config, cfg)

    def _compose(self) -> tuple[Any, Any]:
        """Compose the model. One process makes the tokenizer where a new one is needed; the others read it."""
        made = self.folder.path / "tokenizer"
        result = None
        if self.main and not (made / "tokenizer_config.json").is_file():
            result = self._build(None)
            result[1].tokenizer.save_pretrained(made)
            processes = self.accelerator.num_processes
            self.folder.write_lock(processes=processes, plugins=list(self.cfg.plugins), base=result[0].config.base)
        self.accelerator.wait_for_everyone()
        return result or self._build(made)

    def _build(self, tokenizer: Path | None) -> tuple[Any, Any]:
        from zoo.loading import build

        cfg = self.cfg.copy()
        if tokenizer is not None and cfg.model.source == "preset":
            OmegaConf.update(cfg, "tokenizer.checkpoint", str(tokenizer))
        reseed(cfg.seed, 0, -1)  # new weights are a function of the seed alone, the same in every process
        model, processor = build(cfg, texts=self.data.texts(), pretrained=False, device=self.accelerator.device)
        model.config.tokenizer = OmegaConf.to_container(self.cfg.tokenizer, resolve=True)
        return model, processor

    # ---- stages ------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, name: str, stage: Stage) -> None:
        mix = self.data.mix(stage, self.cfg.seed * 1000 + index)
        steps = stage.steps or -(-mix.samples_in(stage.epochs or 1) // stage.batch_size)
        reseed(self.cfg.seed, index, -2)  # what is new in a distiller is a function of the seed and the stage
        distiller = self._distiller_of(stage)
        teacher, twins = self._teacher_of(stage, distiller)
        engine = self._engine(index, stage, steps, distiller, teacher)
        done = self.progress.step
        place = Place(self.accelerator.process_index, self.accelerator.num_processes, done, self.progress.streams)
        options = {"multiple_of": 32 if stage.compile else 1, "text": engine.run_llm, "teacher": twins}
        batches = Batches(mix, self.processor, stage, steps, place, **options)
        loader = Loader(batches, pin_memory=self.accelerator.device.type == "cuda")
        parts = ", ".join(f"{part} {count:,}" for part, count in engine.trainable.items())
        self.display.note(
            f"stage {name}: {steps} steps, trains {parts}; {engine.precision}, {engine.attention} attention"
        )
        self.display.begin(f"{name} ({index + 1}/{len(self.stages)})", steps, done)
        source = iter(loader)
        for number in range(done, steps):
            self._step(name, number, engine, loader, source)
            last = number + 1 == steps
            if stage.eval_every and (number + 1) % stage.eval_every == 0 and not last:
                self._evaluate(engine)
            if last:
                self.progress.stage, self.progress.step, self.progress.streams = index + 1, 0, {}
            if last or self._leave or (stage.checkpoint_every and (number + 1) % stage.checkpoint_every == 0):
                self._save(engine)
            if self._leave:
                self.display.note(f"Saved after SIGTERM. To go on: zoo train resume={self.folder.path}")
                raise SystemExit(TERMINATED)
        self.display.end()

    def _step(self, name: str, number: int, engine: Engine, loader: Loader, source: Any) -> None:
        start, waited = time.perf_counter(), loader.waited
        items = [next(source) for _ in range(engine.stage.accumulate)]
        losses, self._leave = engine.run(number, self.progress.global_step, [i["batch"] for i in items], self._asked)
        for line in (line for i in items for line in i["info"]["broken"]):
            self.display.note(f"skipped {line}")
        self.progress.step, self.progress.streams = number + 1, items[-1]["info"]["streams"]
        self.progress.global_step += 1
        images = sum(len(i["batch"].get("pixel_values", ())) for i in items)
        record = {
            "step": self.progress.global_step,
            "stage": name,
            "stage_step": number + 1,
            "lr": engine.rate,
            "weights": engine.weights,
            "images": images,
            "samples": sum(i["info"]["samples"] for i in items),
            "start": start,
            "wait": loader.waited - waited,
        }
        self._pending.append((record, losses))
        eager = self.accelerator.device.type == "cpu" and self.accelerator.num_processes == 1
        if eager or len(self._pending) >= FLUSH or number + 1 == engine.steps or self._leave:
            self._flush(engine)

    def _flush(self, engine: Engine) -> None:
        """Write the metrics of the steps since the last time, averaged over processes."""
        rows = [(record, {k: v.item() for k, v in losses.items()}) for record, losses in self._pending]
        now, self._pending = time.perf_counter(), []
        everyone = gather(self.accelerator, rows)
        seconds = (now - rows[0][0]["start"]) / len(rows)
        for at, (record, _) in enumerate(rows):
            losses = _mean([ranks[at][1] for ranks in everyone])
            images, samples = (sum(ranks[at][0][key] for ranks in everyone) for key in ("images", "samples"))
            weights = record["weights"]
            line = {
                "step": record["step"],
                "stage": record["stage"],
                "stage_step": record["stage_step"],
                "loss": sum(weights.get(n, 1.0) * v for n, v in losses.items()),
                "losses": losses,
                "lr": record["lr"],
                "images_per_s": round(images / seconds, 1),
                "samples_per_s": round(samples / seconds, 1),
                "wait": round(min(1.0, record["wait"] / seconds), 4),
            }
            if self.main:
                self.folder.log(line)
            if self.accelerator.log_with:
                self.accelerator.log(
                    {k: v for k, v in line.items() if isinstance(v, float)} | losses, step=record["step"]
                )
            rate, unit = (line["images_per_s"], "images") if images else (line["samples_per_s"], "samples")
            self.display.update(record["stage_step"], losses, rate, unit, line["wait"])

    def _engine(self, index: int, stage: Stage, steps: int, distiller: Any, teacher: Any) -> Engine:
        """Set up the stage; in the middle of one, with the state of the newest checkpoint."""
        reseed(self.cfg.seed, index, -2)
        engine = Engine(
            self.accelerator,
            self.model,
            stage,
            steps,
            seed=self.cfg.seed,
            precision=self.cfg.precision,
            distiller=distiller,
            teacher=teacher,
        )
        self.progress.trained = sorted({*self.progress.trained, *engine.named_parameters()})
        if self.newest is None:
            self._start_adapters(index)
        else:
            for again in (False, True):
                checkpoint.load_weights(self.newest, self._named(engine), new=self._new_parts(index))
                if again or not self._start_adapters(index, resumed=True):
                    break
            if self.progress.step:
                checkpoint.load_optimizers(self.newest, engine.optimizers)
            self.newest = None
        return engine

    def _start_adapters(self, index: int, *, resumed: bool = False) -> bool:
        """Start the adapters that begin in this stage, or, where a run is resumed, began before; says if there are any.

        What they copy was trained by the stages before.
        """
        found = False
        for name, adapter in self.model.adapter.items():
            began = sum(name in stage.detach for stage in self.stages.values())
            if began and (began <= index if resumed else began == index) and hasattr(adapter, "start"):
                reseed(self.cfg.seed, began, -4)
                adapter.start()
                found = True
        return found

    def _new_parts(self, index: int) -> tuple[str, ...]:
        """What the newest checkpoint holds that this stage does not go on with: the distiller of the stage before."""
        stages = list(self.stages.values())
        goes_on = self.progress.step or stages[index].distiller_node == stages[index - 1].distiller_node
        return () if goes_on else ("distiller.",)

    def _distiller_of(self, stage: Stage) -> Any:
        """The stage's distiller; one that goes on from the stage before keeps what it has learnt."""
        node = stage.distiller_node
        if node != self._distiller[0]:
            self._distiller = (node, None if node is None else build_distiller(self.model, node))
        return self._distiller[1]

    def _teacher_of(self, stage: Stage, distiller: Any) -> tuple[Any, Any]:
        """The stage's teacher, and what adds its rows to the student's; a model that two stages name is loaded once."""
        node = stage.teacher_node
        if node is None:
            return None, None
        needs: frozenset[str] = getattr(distiller, "needs", frozenset())
        if node["store"]:
            return self._stored(stage, node["store"], needs)
        key = json.dumps(node, default=str, sort_keys=True)
        if key not in self._teachers:
            self._teachers.clear()  # two large models are not kept for the sake of the second one's turn
            precision = resolve_precision(stage.precision or self.cfg.precision, self.accelerator.device)
            self._teachers[key] = load_teacher(node, device=self.accelerator.device, precision=precision)
        model, processor = self._teachers[key]
        shared = shared_tokens(self.processor.tokenizer, processor.tokenizer)
        return Teacher(model, needs, shared), Twins(processor, self.processor)

    def _stored(self, stage: Stage, folder: str, needs: frozenset[str]) -> tuple[Stored, Stored]:
        """What `zoo teach` wrote, once it is known to be of this data and these tokens."""
        stored = Stored(folder, needs)
        if stored.about["tokens"] != tokens_hash(self.processor.tokenizer):
            teacher = stored.about["teacher"]["model"]
            raise ZooError(
                f"The stored teacher {teacher!r} has another tokenizer or chat template than the student. "
                f"Set tokenizer.checkpoint=model:{teacher}."
            )
        mix = self.data.mix(stage, 0)
        stored.verify(dict(zip(mix.names, mix.datasets, strict=True)))
        return stored, stored

    # ---- checkpoints and the end -------------------------------------------------------------------------------

    def _named(self, engine: Engine) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: weights that were ever trained, and the model's buffers."""
        named = {f"model.{n}": t for n, t in checkpoint.tensors_of(self.model).items()}
        if isinstance(engine.distiller, nn.Module):
            named |= {f"distiller.{n}": p for n, p in engine.distiller.named_parameters()}
        ever = set(self.progress.trained)
        return {n: t for n, t in named.items() if n in ever or not isinstance(t, nn.Parameter)}

    def _save(self, engine: Engine) -> None:
        named, state = self._named(engine), asdict(self.progress)
        if self.main:
            with self.folder.checkpoint(self.progress.global_step, KEEP) as path:
                checkpoint.save(path, named, engine.optimizers, state)
        else:
            checkpoint.save(None, named, engine.optimizers, state)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, engine: Engine) -> None:
        """Score the model as it is, in the middle of a stage."""
        result = score(self, limit=100)
        if result is not None and self.main:
            self.folder.log({"step": self.progress.global_step, "scores": result.summary()})
            self.display.note("  ".join(f"{k} {v:.3f}" for k, v in result.summary().items()))
        engine.resume_training()

    def _on_sigterm(self, *_: Any) -> None:
        self._asked = True  # a signal that comes during a step is agreed upon in the next


def read_config(path: Path, given: DictConfig) -> DictConfig:
    """Return the config that a run was started with, typed; its plugins are loaded first."""
    from zoo.config import RunRoot
    from zoo.registry import config_of, plugins

    saved: Any = OmegaConf.load(path)
    plugins.load(list(saved.get("plugins") or []))
    cfg: Any = OmegaConf.merge(OmegaConf.structured(RunRoot), saved)
    OmegaConf.update(cfg, "resume", given.resume)
    for node in cfg.data.values():
        config_of("dataset", node)
    return cfg


def _mean(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Average each loss over the processes that had it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {n: [row[n] for row in rows if n in row] for n in names}
    return {n: sum(v) / len(v) for n, v in values.items()}


if __name__ == "__main__":
    from zoo.cli import main as cli

    sys.exit(cli(["train", *sys.argv[1:]]))
