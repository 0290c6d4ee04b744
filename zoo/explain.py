"""Hydra's and OmegaConf's errors, said in our words: what was given, what is allowed, what was probably meant."""

from collections.abc import Iterator
from contextlib import contextmanager

from zoo.registry import ZooError


@contextmanager
def explained() -> Iterator[None]:
    """Raise a ZooError in place of whatever Hydra says about a config."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ZooError(str(error)) from error
