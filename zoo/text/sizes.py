"""Format sizes and times with a unit."""


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


def bytes_text(count: float) -> str:
    """Format a number of bytes: 199 B, 1.5 KB, 23.4 MB."""
    text = size_text(count)
    return f"{text}B" if " " in text else f"{text} B"


def seconds_text(seconds: float) -> str:
    """Format a duration: 23.6 µs, 4.2 ms, 1.5 s, 2 min 5 s, 3 h 20 min."""
    if seconds >= 60:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns")):
        value = seconds * factor
        if value >= 0.9995 or unit == "ns" or not seconds:
            return f"{value:.0f} {unit}" if value >= 99.95 or not seconds else f"{value:.3g} {unit}"
    raise AssertionError("unreachable")
