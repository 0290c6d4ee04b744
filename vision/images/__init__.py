"""Files and bytes -> pixels."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.vision.images.decode")
