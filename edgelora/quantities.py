"""Bytes and seconds as people read them."""

from __future__ import annotations

UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size(count: float) -> str:
    """Bytes, in units of a thousand: "3.17 GB"."""
    for unit, value in UNITS:
        if abs(count) >= value:
            return f"{count / value:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """ "2.4 s", "3 min 20 s", "5 h 07 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
