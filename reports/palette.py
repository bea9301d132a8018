"""The colours of the page and its charts, by role, for light and for dark.

Series are told apart by shape and dash as well; every text colour stands out 4.5 to 1 or more on what it is written on,
every line and bar 3 to 1 or more on the paper.
"""

from __future__ import annotations

from halobench.reports import canvas

LIGHT = {
    "paper": "#FFFFFF",
    "panel": "#F5F7F9",
    "ink": canvas.INK,
    "soft": "#545C67",
    "line": "#D5DAE0",
    "grid": canvas.GRID,
    "shade": "#F1F4F7",
    "accent": "#005F96",
    "kept": canvas.BLUE,
    "rest": "#8B949E",
    "s0": canvas.BLUE,
    "s1": "#C65400",
    "s2": "#00805E",
    "s3": "#A5487C",
    "s4": "#946600",
    "s5": "#5B6B7C",
}
DARK = {
    "paper": "#14171B",
    "panel": "#1C2127",
    "ink": "#E8EBEF",
    "soft": "#A9B2BD",
    "line": "#39424D",
    "grid": "#2A313A",
    "shade": "#1B2128",
    "accent": "#8CC7F2",
    "kept": "#5FB0EA",
    "rest": "#6C7784",
    "s0": "#5FB0EA",
    "s1": "#FF9A4D",
    "s2": "#3CC9A0",
    "s3": "#E59BC6",
    "s4": "#E3B94A",
    "s5": "#B4C0CC",
}
# Steps of a heat map from none to all, each with the colour of the text on it.
HEAT_LIGHT = ("#F1F5F9", "#D6E4F0", "#AECDE6", "#7FB0D8", "#4C8DC4", "#1F69A8", "#0B4A80")
HEAT_DARK = ("#1B2430", "#1F3850", "#235073", "#2C6C9C", "#4A8EC4", "#7DB4E0", "#B5D9F5")
STEPS = len(HEAT_LIGHT)
LIGHT |= {f"h{i}": colour for i, colour in enumerate(HEAT_LIGHT)}
LIGHT |= {f"t{i}": canvas.INK if i < 5 else "#FFFFFF" for i in range(STEPS)}
DARK |= {f"h{i}": colour for i, colour in enumerate(HEAT_DARK)}
DARK |= {f"t{i}": "#FFFFFF" if i < 4 else "#0E1216" for i in range(STEPS)}
SERIES = 6


def variables() -> str:
    """CSS that names every colour, following the reader's choice of light or dark."""
    light, dark = (";".join(f"--{name}:{value}" for name, value in found.items()) for found in (LIGHT, DARK))
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
