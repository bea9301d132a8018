"""The plots of a report: needles found by context length, and what each selector thinks of each layer."""

from __future__ import annotations

from halobench.reports.layer_plot import plot_layer_scores
from halobench.reports.needle_plot import plot_needles

__all__ = ["plot_layer_scores", "plot_needles"]
