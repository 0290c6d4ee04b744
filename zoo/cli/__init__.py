"""The command line."""

from zoo.moved import attributes_of

__getattr__ = attributes_of("zoo.cli.entry")
