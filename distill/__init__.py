"""Losses beside the answer loss, from a teacher or from dense targets of the data set. One line each."""

from zoo.registry import declare

declare("distiller", "dense", "zoo.distill.dense")
declare("distiller", "kl", "zoo.distill.kl")
declare("distiller", "llava_kd", "zoo.distill.llava_kd")
declare("distiller", "llava_mod", "zoo.distill.llava_mod")
