"""Lengths and sizes as people write them: 4k, 1m, 1.5M tokens, 3.2 GB."""

from __future__ import annotations

import re

from halobench.errors import UserError

_SCALE = {"": 1, "k": 1024, "m": 1024**2}
_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_length(text: str | int) -> int:
    """Tokens in a context length such as 512, "4k" (4096) or "1m" (1048576)."""
    match = re.fullmatch(r"\s*(\d+)\s*([kKmM]?)\s*", str(text))
    if match is None or int(match[1]) == 0:
        raise UserError(f"length {str(text)!r} is not a number of tokens; write 512, 4k or 1m")
    return int(match[1]) * _SCALE[match[2].lower()]


def parse_lengths(text: str) -> list[int]:
    """Comma-separated lengths, ascending, without repeats."""
    return sorted({parse_length(part) for part in text.split(",")})


def parse_count(text: str | int | float) -> int:
    """Tokens in a budget such as 500000, "500k", "1.5M" or "1B" (powers of ten)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMbB]?)\s*", str(text).replace("_", ""))
    if match is None:
        raise UserError(f"count {str(text)!r} is not a number; write 500000, 500k, 1.5M or 1B")
    return round(float(match[1]) * _COUNT[match[2].lower()])


def parse_bytes(text: str) -> int:
    """Bytes in a size such as "4GB" (4 * 10^9), "3.5 GiB" (3.5 * 2^30) or "512MiB". The unit is required."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b\s*", text, flags=re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UserError(f"size {text!r} is not a number of bytes with its unit; write 4GB, 3.5GiB or 512MiB")
    return round(float(match[1]) * (1024 if match[3] else 1000) ** _POWER[match[2].lower()])


def format_length(tokens: int) -> str:
    """4096 -> "4K", 1048576 -> "1M", 700 -> "700"."""
    for unit, scale in (("M", 1024**2), ("K", 1024)):
        if tokens >= scale and tokens % scale == 0:
            return f"{tokens // scale}{unit}"
    return str(tokens)


def format_count(number: float) -> str:
    """1234567 -> "1.23M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def format_flops(operations: float) -> str:
    """Floating-point operations: 17.6e9 -> "17.6 GFLOP", 8.83e16 -> "88.3 PFLOP"."""
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if operations >= scale:
            return f"{operations / scale:.3g} {unit}FLOP"
    return f"{operations:.0f} FLOP"


def format_bytes(size: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """Time left or spent: 42 -> "42s", 125 -> "2m05s", 7300 -> "2h01m"."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
