"""What a stage compares its model with: the distiller, and the teacher, loaded or stored."""

import json
import warnings
from pathlib import Path
from typing import Any

from zoo.composed.assembly import build_distiller
from zoo.loading.build import load_teacher
from zoo.registry import Distiller, ZooError
from zoo.runs.sharding import may_share, shard_layers
from zoo.settings.stage import Stage
from zoo.storage.weights import sha256_of
from zoo.teaching.teacher import Teacher, TeacherRows
from zoo.teaching.teacher_store import INDEX, TeacherStore, files_of
from zoo.text.tokenizer import shared_tokens, tokens_hash


class StageTeachers:
    """Distillers and teachers of the stages of a run; what consecutive stages share is made once.

    Args:
        run: with its model, processor and data.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self.loaded: dict[str, tuple[Any, Any]] = {}  # options of a teacher -> it and its processor
        self._distiller: tuple[Any, Any] = (None, None)  # node and distiller

    def distiller(self, stage: Stage) -> Any:
        """Return the stage's distiller: the previous stage's, with its trained weights, if the options are the same."""
        node = stage.distiller_node
        if node != self._distiller[0]:
            self._distiller = (node, None if node is None else build_distiller(self.run.model, node))
        return self._distiller[1]

    def teacher(self, stage: Stage, distiller: Distiller | None) -> tuple[Any, Any]:
        """Return the stage's teacher and what adds its rows to the student's.

        A model that consecutive stages share is loaded once, where both hold its weights in one number format.
        """
        node = stage.teacher_node
        if node is None or node["store"]:
            self.loaded.clear()  # the check counts no teacher's weights for such a stage
        if node is None:
            return None, None
        needs: frozenset[str] = frozenset() if distiller is None else distiller.needs
        if node["store"]:
            return self._stored(stage, node["store"], needs)
        precision = self.run.precision_of(stage)
        key = json.dumps([node, None if node["dtype"] else precision], default=str, sort_keys=True)
        if key not in self.loaded:
            self.loaded.clear()  # frees the previous teacher before the next one is loaded
            self.loaded[key] = load_teacher(node, device=self.run.accelerator.device, precision=precision)
            if getattr(self.run.accelerator, "is_fsdp2", False) and may_share(node):
                shard_layers(self.run.accelerator, self.loaded[key][0])
        model, processor = self.loaded[key]
        shared = shared_tokens(self.run.processor.tokenizer, processor.tokenizer)
        return Teacher(model, needs, shared), TeacherRows(processor, self.run.processor, model.llm.max_positions)

    def require_same(self, name: str, stage: Stage) -> None:
        """Note the state of a stage's teacher; refuse to go on within the stage with another state of it.

        Another teacher is what a person wrote into the run's config.yaml.

        Args:
            name: of the stage.
            stage: its settings.
        """
        node, progress, who, now = stage.teacher_node, self.run.progress, "", ""
        if node is not None and node["store"]:
            who, now = node["store"], sha256_of(Path(node["store"]) / INDEX)
        elif node is not None and (now := files_of(node)):
            who = node["model"]
        before, _, was = progress.teacher.rpartition(" ")
        if progress.step and who == before and now != was:
            raise ZooError(
                f"Stage {name!r} began with its teacher {who!r} in another state (fingerprint {now[:12]}, was "
                f"{was[:12]}): it cannot go on with this one."
            )
        progress.teacher = f"{who} {now}" if who else ""

    def _stored(self, stage: Stage, folder: str, needs: frozenset[str]) -> tuple[TeacherStore, TeacherStore]:
        """Open a store of `zoo teach`; refuse one of other data or another tokenizer."""
        stored = TeacherStore(folder, needs)
        if stored.about["tokens"] != tokens_hash(self.run.processor.tokenizer):
            teacher = stored.about["teacher"]["model"]
            raise ZooError(
                f"The stored teacher {teacher!r} has another tokenizer or chat template than the student. "
                f"Set tokenizer.checkpoint=model:{teacher}."
            )
        mix = self.run.data.mix(stage, 0)
        stored.verify(dict(zip(mix.names, mix.datasets, strict=True)))
        if stored.teacher_has_changed() and self.run.accelerator.is_main_process:
            warnings.warn(
                f"The teacher {stored.about['teacher']['model']!r} has other weights than when {folder!r} was stored: "
                "the stage learns from its outputs of then. Run zoo teach with another teach.folder for those of now.",
                stacklevel=2,
            )
        return stored, stored
