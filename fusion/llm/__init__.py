"""The language model, unmodified, and its attention."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.fusion.llm.hf")
