"""Build a model and its processor from a name or a config."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.loading.build")
