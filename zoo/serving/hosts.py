"""Hosts that `zoo serve` fetches images from: as they are named in `fetch=`, and as a URL has them."""

from urllib.parse import urlsplit

from zoo.registry import ZooError

PORTS = {"http": 80, "https": 443}


def host_named(word: str) -> str:
    """Return a host of `fetch=` in the form of `names_of`.

    Raises:
        ZooError: it is a URL, a pattern or empty, so that no image would be from it.
    """
    try:
        parts = urlsplit(f"//{word}")
        _ = parts.port
        valid = bool(parts.hostname) and parts.netloc == word and not set(word) & {"@", "*"}
    except ValueError:
        valid = False
    if not valid:
        raise ZooError(f"fetch={word!r}: name a host, such as images.example.org or images.example.org:8080.")
    return word.lower()


def names_of(url: str) -> set[str]:
    """Return the names of the host of an http or https URL: with its port, and alone where that is the scheme's own."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return set()
    host, usual = f"[{host}]" if ":" in host else host, PORTS[parts.scheme]
    port = usual if port is None else port
    return {f"{host}:{port}", *([host] if port == usual else [])}
