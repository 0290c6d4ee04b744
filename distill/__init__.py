"""Losses beside the answer loss: from a teacher, or from dense targets that the data set knows. One line each."""

from zoo.registry import declare

declare("distiller", "dense", "zoo.distill.dense")
