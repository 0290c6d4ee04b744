"""Tasks: predictions in, scores out. One line per component."""

from zoo.registry import declare

declare("task", "boxes", "zoo.tasks.boxes")
declare("task", "caption", "zoo.tasks.caption")
declare("task", "choice", "zoo.tasks.choice")
declare("task", "exact", "zoo.tasks.exact")
declare("task", "recall", "zoo.tasks.recall")
declare("task", "rerank", "zoo.tasks.rerank")
declare("task", "vqa", "zoo.tasks.vqa")
declare("task", "yes_no", "zoo.tasks.yes_no")
