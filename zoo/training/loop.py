"""`zoo train`: run the stages of a recipe, in one process or several.

Also `accelerate launch -m zoo.train ...` and `torchrun --nproc_per_node 2 -m zoo.train ...`. SIGTERM saves a checkpoint
and exits with code 143. `zoo train resume=last` continues a run that was killed, to the same losses, weights and
scores.
"""

import os
import shlex
import signal
import threading
import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from zoo.checking.checker import check
from zoo.checking.data_check import check_data
from zoo.checking.plan import plan_from
from zoo.evaluation.score_table import in_words
from zoo.registry import Distiller, ZooError
from zoo.runs import checkpoint
from zoo.runs.allocator import keep_memory
from zoo.runs.batches import Batches, Loader
from zoo.runs.data import RunData
from zoo.runs.dealing import image_cost
from zoo.runs.folder import RunFolder, read_metrics
from zoo.runs.kept_features import Recall, keep_features
from zoo.runs.launchers import is_first
from zoo.runs.left_out import LeftOut
from zoo.runs.lengths import room_of
from zoo.runs.lock import RunLock
from zoo.runs.order import ShardPosition
from zoo.runs.processes import by_first, gather, start_accelerator, stop_all
from zoo.runs.progress import Display
from zoo.runs.replay import replayed, verdict
from zoo.runs.resume import Beginning, begin, device_and_trackers, parallel_of, read_config
from zoo.runs.saving import Saver
from zoo.runs.step_log import StepLog, not_finite
from zoo.runs.tensor_parallel import reader_of
from zoo.runs.trackers import check_trackers, start_trackers
from zoo.runs.watch import Watch, as_gone
from zoo.settings.source import source_of
from zoo.settings.stage import Stage, stages_of
from zoo.storage.precision import fast_products, resolve_precision
from zoo.teaching.teacher import Teacher
from zoo.text.sizes import count_text
from zoo.text.terminal import wrapped
from zoo.training.calibration import calibrate_adapters
from zoo.training.finish import finish, score, track_answers
from zoo.training.run_model import compose_model, restore, share_out, start_adapters
from zoo.training.stage_teachers import StageTeachers
from zoo.training.step import Engine, count_images, reseed

TERMINATED = 143  # exit code after SIGTERM, as a shell reports it
KEEP = 2  # number of checkpoints; the older one is for a newest that turns out to be damaged


def main(cfg: DictConfig) -> RunFolder:
    """Train, save and evaluate, and print which commands may follow.

    Raises:
        SystemExit: on SIGTERM, with code 143; the run can be resumed.
    """
    check_trackers(list(cfg.log))  # before anything costs time
    if cfg.lock and not cfg.resume:
        cfg, notes = replayed(cfg)
        if is_first():
            print("\n".join([f"Replaying {cfg.lock}.", *(f"  different here: {note}" for note in notes)]))
    elif not cfg.resume:
        plan = plan_from(cfg)
        if os.environ.get("WORLD_SIZE", "1") == "1":  # or launched otherwise: the run finds it when processes are there
            plan = replace(plan, parallel=None)  # one process holds the model whole, whatever the config asks for
        report = check(plan)  # before a folder is made or data is read
        if alone := [stage for stage in report.stages if stage.one_dialog]:  # in a later stage it would cost a training
            check_data(cfg, alone)
    with Run(cfg) as run:
        run.train()
        finish(run)
    if run.main and run.cfg.lock:
        print("\n".join(verdict(run.cfg.lock, run.folder)))
    return run.folder


class Run:
    """One run: its folder, model and data, and the loop over stages.

    Holds the lock of its folder until `close`, the end of the `with` block, or an error in `train`.
    """

    def __init__(self, cfg: DictConfig, display: Display | None = None) -> None:
        device, self.trackers = device_and_trackers(cfg)
        check_trackers(self.trackers)  # before anything costs time
        self.parallel = parallel_of(cfg)
        self.accelerator = start_accelerator(device, self.parallel)
        self.main = self.accelerator.is_main_process
        self.display = display or Display(silent=not self.main)
        self._lock: RunLock | None = None
        self.saver: Any = None
        self._watch: Watch | None = None
        try:
            self._prepare(cfg)
        except BaseException as error:  # Ctrl-C too: the lock must be released
            self._note(error)
            self.close(error)
            raise

    def _prepare(self, cfg: DictConfig) -> None:
        # Several processes share one folder: the first one makes or opens it, the others are sent the result.
        began = by_first(self.accelerator, lambda: self._begin(cfg))
        self.folder, self.progress, self.newest = RunFolder(began.path), began.progress, began.newest
        self.saver = Saver(self.accelerator, self.folder, KEEP)
        self._go_on = f"zoo train resume={shlex.quote(str(self.folder.path))}"
        self._watch = Watch(self.accelerator, self._go_on)
        for note in began.notes:
            self.display.note(note)
        self.cfg = read_config(self.folder, cfg, began.plugins) if cfg.resume else cfg
        self.stages = stages_of(self.cfg)
        if not self.stages:
            raise ZooError("There is nothing to train: the config has no stages. Choose a recipe, recipe=<name>.")
        fast_products()
        if self.accelerator.device.type == "cpu":
            keep_memory()
        self.resumed_trained = self.is_trained  # killed after the last stage: saving or scoring is left
        self.skips = self.cfg.skip_broken or any(s.skip_broken for s in self.stages.values())
        self.data = RunData(self.cfg.data, skip_broken=self.skips)
        for name, stage in self.stages.items():
            self.data.require_order(name, stage, reader_of(self.accelerator)[1])
        self.source = source_of(self.cfg, pretrained=False)
        self.model, self.processor = compose_model(self)
        self.gather_short = False
        if getattr(self.accelerator, "is_fsdp2", False):
            share_out(self)
        if self.newest is not None:
            restore(self, self.newest)
        left_out = LeftOut(self.folder, self.cfg.max_broken, self.progress.seen, self.progress.left_out)
        self.step_log = StepLog(self.accelerator, self.folder, self.display, left_out)
        self.teachers = StageTeachers(self)
        self.noted_pictures = False  # that a tracker takes none
        self._asked = False  # this process received SIGTERM
        self._leave = False  # one of the processes received SIGTERM, and all agreed to stop after this step

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._note(error)
        self.close(error)

    def _note(self, error: BaseException | None) -> None:
        """Note what ended the run, which is neither a signal nor the end of its recipe."""
        if isinstance(error, Exception) and self.main and hasattr(self, "folder"):
            self.folder.note_error(error)

    def close(self, error: BaseException | None = None) -> None:
        """Release the lock and flush the trackers.

        Args:
            error: that ended the run in this process.
        """
        if self.saver is not None:
            self.saver.close()
        if self._watch is not None:
            # Processes that agreed to end exit with SystemExit; another error may be of this process alone.
            self._watch.stop(failed=error is not None and not isinstance(error, SystemExit))
        trackers, self.accelerator.trackers = self.accelerator.trackers, []
        for tracker in trackers:
            tracker.finish()
        if self._lock is not None:
            self._lock.release()

    @property
    def is_trained(self) -> bool:
        """Whether all stages are finished."""
        return self.progress.stage >= len(self.stages)

    def train(self) -> None:
        """Run the remaining stages."""
        about = {"run": str(self.folder.path), "seed": self.cfg.seed}
        start_trackers(self.accelerator, self.trackers, self.folder.path, self.progress.global_step, about)
        self._since = time.monotonic()
        listen = threading.current_thread() is threading.main_thread()  # Python allows handlers in this thread only
        before = signal.signal(signal.SIGTERM, self._on_sigterm) if listen else None
        try:
            with self.display:
                for index, (name, stage) in enumerate(self.stages.items()):
                    if index >= self.progress.stage:
                        self._run_stage(index, name, stage)
                self.saver.wait()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self.display.note(f"Stopped. To go on from the newest checkpoint: {self._go_on}")
            self.close(error)
            if (gone := as_gone(error, self.accelerator, self._go_on)) is not None:
                raise gone from error
            raise
        finally:
            if listen:
                signal.signal(signal.SIGTERM, before)
        if any(gather(self.accelerator, self._asked)):  # SIGTERM after the processes agreed on the last step
            self._terminate()

    # ---- start -------------------------------------------------------------------------------------------------

    def _begin(self, cfg: DictConfig) -> Beginning:
        found, self._lock = begin(cfg)
        return found

    def precision_of(self, stage: Stage) -> str:
        """Return the number format of a stage's products, fp32 or bf16."""
        return resolve_precision(stage.precision or self.cfg.precision, self.accelerator.device)

    # ---- stages ------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, name: str, stage: Stage) -> None:
        mix = self.data.mix(stage, self.cfg.seed * 1000 + index)  # each stage has an order of its own
        steps = stage.steps or -(-mix.samples_in(stage.epochs or 1) // stage.batch_size)
        done = self.progress.step
        if done >= steps:  # config.yaml was changed, or a data set, whose records count the steps of an epoch
            what = f"Stage {name!r} has {steps} steps now, and the run has taken {done} of it"
            more = f"give it more in {str(self.folder.config)!r}, {done + 1} say"
            stop_all(self.accelerator, ZooError(f"{what}: {more}."))
        reseed(self.cfg.seed, index, -2)  # new weights of a distiller are a function of the seed and the stage
        distiller = self.teachers.distiller(stage)
        teacher, twins = self.teachers.teacher(stage, distiller)
        self.teachers.require_same(name, stage)
        engine = self._engine(index, stage, steps, distiller, teacher)
        kept = engine.unwrapped.features = keep_features(
            self.cfg.features,
            self.model,
            self.processor,
            stage=name,
            precision=engine.precision,
            sharded=engine.sharded,
            folder=Path(self.cfg.run.dir) / "features",
            note=self.display.note,
        )
        if not done:
            self.step_log.left_out.begin()  # max_broken is a share of each stage's records
        place = ShardPosition(*reader_of(self.accelerator), done, self.progress.streams)
        # Padding to multiples of 32 bounds the number of shapes that torch.compile specialises on.
        options = {"multiple_of": 32 if stage.compile else 1, "text": engine.run_llm, "teacher": twins}
        options["room"] = room_of(stage, self.model.llm.max_positions, self.processor)
        options["image_cost"] = image_cost(self.model, self.processor.num_image_tokens)
        if not done:
            calibrate_adapters(self, index, engine, options)
        if kept is not None:
            pixels = isinstance(teacher, Teacher) and teacher.needs_pixels
            options["recall"] = Recall(kept.store, self.processor, pixels)
        batches = Batches(mix, self.processor, stage, steps, place, **options)
        loader = Loader(batches, pin_memory=self.accelerator.device.type == "cuda")
        parts = ", ".join(f"{part} {count_text(count)}" for part, count in engine.trainable.items())
        many = "step" if steps == 1 else "steps"
        about = f"stage {name}, {index + 1} of {len(self.stages)}: {steps:,} {many}; trains {parts} parameters"
        self.display.note(wrapped(f"{about}; {engine.precision}, {engine.attention} attention", subsequent="  "))
        self.display.begin(name, steps, done)
        with closing(iter(loader)) as source:  # workers end with the stage, whatever a traceback holds
            if done and _is_due(stage.eval_every, done) and not by_first(self.accelerator, self._is_scored):
                self._evaluate(engine)  # killed in it, or on SIGTERM ahead of it
            for number in range(done, steps):
                self._step(name, number, engine, loader, source)
                last = number + 1 == steps
                if last:
                    self.step_log.end_stage(name, allow_nonfinite=stage.allow_nonfinite)
                    # Before saving, so that a resumed run begins the next stage.
                    self.progress.stage, self.progress.step, self.progress.streams = index + 1, 0, {}
                if last or self._leave or _is_due(stage.checkpoint_every, number + 1):
                    self._save(engine)
                if self._leave:
                    self._terminate()
                if _is_due(stage.eval_every, number + 1) and not last:  # behind the checkpoint: it may take long
                    self._evaluate(engine)
        self.display.end()
        engine.release()
        if kept is not None:
            self.display.note(f"features: {kept}")

    def _step(self, name: str, number: int, engine: Engine, loader: Loader, source: Any) -> None:
        """Take one optimiser step and note its losses, which stay on the device until the log reads several at once."""
        start, waited = time.perf_counter(), loader.waited
        items = [next(source) for _ in range(engine.stage.accumulate)]
        batches, spares = [i["batch"] for i in items], [i["spare"] for i in items] if "spare" in items[0] else []
        losses, self._leave = engine.run(number, self.progress.global_step, batches, self._asked, spares)
        self.progress.step, self.progress.streams = number + 1, items[-1]["info"]["streams"]
        self.progress.global_step += 1
        record = {
            "step": self.progress.global_step,
            "stage": name,
            "stage_step": number + 1,
            "lr": engine.rate,
            "weights": engine.weights,
            "images": sum(count_images(b) for b in batches if b is not None),
            "samples": sum(i["info"]["samples"] for i in items),
            "broken": [line for i in items for line in i["info"]["broken"]],
            "start": start,
            "wait": loader.waited - waited,
        }
        self.step_log.add(record, losses, allow_nonfinite=engine.stage.allow_nonfinite)

    def _engine(self, index: int, stage: Stage, steps: int, distiller: Distiller | None, teacher: Any) -> Engine:
        """Set up the stage; in the first one after a resume, load distiller and optimisers from the checkpoint."""
        reseed(self.cfg.seed, index, -2)
        engine = Engine(
            self.accelerator,
            self.model,
            stage,
            steps,
            seed=self.cfg.seed,
            precision=self.cfg.precision,
            master_weights=self.cfg.master_weights,
            distiller=distiller,
            teacher=teacher,
            parallel=self.parallel,
            gather_short=self.gather_short,
        )
        self.progress.trained = sorted({*self.progress.trained, *engine.named_parameters()})
        if not self.progress.step:
            start_adapters(self, range(index, index + 1))
        if self.newest is not None:
            # At the beginning of a stage the checkpoint holds the previous stage's distiller, which continues only if
            # both stages configure it alike, as in a run that was not interrupted.
            if self.progress.step or stage.distiller_node == list(self.stages.values())[index - 1].distiller_node:
                checkpoint.load_weights(self.newest, self.named_tensors(engine), "distiller.")
            if self.progress.step:
                checkpoint.load_optimizers(self.newest, engine.optimizers, self.named_tensors(engine))
            self.newest = None
        return engine

    # ---- checkpoints and the end -------------------------------------------------------------------------------

    def named_tensors(self, engine: Engine | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint: weights that any stage trained so far, and the model's buffers."""
        named = {f"model.{n}": t for n, t in checkpoint.tensors_of(self.model).items()}
        if engine is not None and isinstance(engine.distiller, nn.Module):
            named |= {f"distiller.{n}": t for n, t in checkpoint.tensors_of(engine.distiller).items()}
        for name, adapter in self.model.adapter.items():
            named |= {f"model.adapter.{name}.run.{n}": t for n, t in adapter.run_state().items()}
        ever = set(self.progress.trained)
        return {n: t for n, t in named.items() if n in ever or not isinstance(t, nn.Parameter)}

    def _save(self, engine: Engine) -> None:
        """Write a checkpoint."""
        # The metrics of its steps first: a resumed run removes lines after the checkpoint, and cannot restore others.
        self.step_log.flush(allow_nonfinite=engine.stage.allow_nonfinite)
        now = time.monotonic()
        self.progress.seconds, self._since = self.progress.seconds + now - self._since, now
        self.progress.seen, self.progress.left_out = self.step_log.left_out.counts
        if engine.unwrapped.features is not None:
            engine.unwrapped.features.store.flush()
        optimizers = engine.optimizers if self.progress.step else []  # the next stage begins with new ones
        named = self.named_tensors(engine)
        if not engine.stage.allow_nonfinite:  # a checkpoint with NaN would replace the last good one
            ever = set(self.progress.trained)
            found = gather(self.accelerator, checkpoint.not_finite({n: t for n, t in named.items() if n in ever}))
            if bad := sorted({name for each in found for name in each}):
                what = f"{len(bad)} weights, the first {bad[0]!r}, are not finite"
                stop_all(self.accelerator, not_finite(what, self.step_log.newest, self.folder))
        self.saver.save(self.progress.global_step, named, optimizers, asdict(self.progress))

    def _is_scored(self) -> bool:
        step = self.progress.global_step
        return any("scores" in row and row["step"] == step for row in read_metrics(self.folder.metrics))

    def _evaluate(self, engine: Engine) -> None:
        """Score the model during a stage."""
        self.step_log.flush(allow_nonfinite=engine.stage.allow_nonfinite)
        reseed(self.cfg.seed, self.progress.global_step, -5)  # as in a run that resumes here
        result = score(self, limit=100)
        if result is not None:
            scores, step = result.summary(), self.progress.global_step
            by_first(self.accelerator, lambda: self.folder.log({"step": step, "scores": scores}))
            self.step_log.track(scores, step)
            track_answers(self, result)
            self.display.note(in_words(result.lines, step))
        engine.resume_training()

    def _terminate(self) -> None:
        self.saver.wait()
        self.display.note(f"Saved after SIGTERM. To go on: {self._go_on}")
        raise SystemExit(TERMINATED)

    def _on_sigterm(self, *_: Any) -> None:
        self._asked = True  # only noted: all processes must stop after the same step, which `Engine.run` agrees on


def _is_due(every: int, step: int) -> bool:
    """Whether what follows every n-th step, none for 0, follows this one."""
    return every > 0 and step % every == 0
