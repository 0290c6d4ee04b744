"""Data sets that are read by number or as a stream, as their config chooses: two classes behind one name."""

from abc import abstractmethod
from typing import Any, Self

from zoo.registry import Records


class InTwoForms(Records):
    """Its constructor makes an object of the class that `form` returns."""

    config: Any

    def __new__(cls, config: Any = None) -> Self:
        """Make an object of the form, unless a subclass was called; without a config, as pickle calls it, of `cls`."""
        form = cls if config is None else cls.form(config)
        made: Self = object.__new__(form if issubclass(form, cls) else cls)
        return made

    @classmethod
    @abstractmethod
    def form(cls, config: Any) -> type[Records]:
        """Return the class for a config: one of the base that is a `Dataset`, one that is a `StreamingDataset`."""
