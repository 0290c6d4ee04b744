"""Pruners that keep image tokens at equal distances. Names are listed without an import of torch."""

from zoo.registry import declare

declare("pruner", "even", "zoo_even.pruner")
