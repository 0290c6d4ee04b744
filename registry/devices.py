"""Names of devices, and whether they exist here: asked before anything is loaded."""

from typing import Any

from zoo.registry.errors import ZooError, nearest

KINDS_OF_DEVICES = ("auto", "cpu", "cuda", "mps")
ALLOWED = "auto, cpu, cuda, cuda:<n> (cuda:0 is the first one), mps"
_OTHERS = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps"}  # what people call them


def require_device(given: Any, option: str = "device") -> None:
    """Refuse a name that no device has; torch is not imported.

    Args:
        given: as typed; None: none was.
        option: for the message.

    Raises:
        ZooError: with the nearest name, and what is allowed.
    """
    if given is None:
        return
    word = str(given)
    kind, colon, index = word.partition(":")
    if kind in KINDS_OF_DEVICES and (not colon or (index.isdecimal() and (kind == "cuda" or index == "0"))):
        return
    near = _nearest(word)
    hint = f" Did you mean {option}={near}?" if near else ""
    raise ZooError(f"{option}={word}: there is no such device.{hint} Allowed: {ALLOWED}.")


def _nearest(word: str) -> str:
    name = word.lower().rstrip("0123456789").rstrip(":")
    number = word[len(name) :].lstrip(":")
    if not name:
        kind = "cuda" if number else ""  # as in CUDA_VISIBLE_DEVICES
    else:
        kind = _OTHERS.get(name) or next(iter(nearest(name, KINDS_OF_DEVICES)), "")
    return f"{kind}:{number}" if kind == "cuda" and number.isdecimal() else kind


def require_present(given: Any, option: str = "device") -> None:
    """Refuse a device that this machine does not have.

    Args:
        given: a name, a `torch.device`, or None.
        option: for the message.

    Raises:
        ZooError: there is no such device, or none here.
    """
    require_device(given, option)
    if given is None:
        return
    import torch

    kind, _, index = str(given).partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ZooError(f"{option}={given} was asked for, but torch {torch.__version__} finds no CUDA device here.")
        if index and int(index) >= count:
            known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise ZooError(f"{option}={given} was asked for, but this machine has {known}.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ZooError(f"{option}={given} was asked for, but there is none here.")
