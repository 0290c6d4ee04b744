"""From a name or a config to a model and its processor."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.loading.build")
