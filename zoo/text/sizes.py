"""Format sizes with a unit."""


def count_text(count: float) -> str:
    """Format a number of parameters as people say it: 1.5 K, 23.4 M, 7.1 B."""
    return size_text(count).replace(" G", " B")


def size_text(count: float) -> str:
    """Format a number of bytes, without their B: 1.5 K, 23.4 M, 7.1 G."""
    for unit in ("", " K", " M", " G", " T"):
        if abs(count) < 1000 or unit == " T":
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")
