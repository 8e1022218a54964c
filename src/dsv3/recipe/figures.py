"""Numbers and times for people to read."""


def human(value: float) -> str:
    """At most four digits, with K, M, B, T as powers of ten; ints below 10,000 in full."""
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def storage(size: float) -> str:
    """Bytes in GB, or in MB below one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
