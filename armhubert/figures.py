"""The look of every picture. No pyplot: no display, no global state, no backend chosen behind the caller's back."""

import io
from pathlib import Path
from typing import Any

from armhubert.files import write_atomic

WIDTH, HEIGHT = 8.0, 4.5
"""Inches of one panel's figure."""


def panels(count: int = 1, *, width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    """A figure with `count` panels side by side, in the house's style: matplotlib's Figure and its Axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in axes:
        panel.grid(alpha=0.25, which="both")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def logarithmic(panel: Any) -> None:
    """A logarithmic ordinate whose ticks are plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter

    panel.set_yscale("log")
    for ticks in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}"))


def shades(count: int) -> list[Any]:
    """`count` colours that tell an order, dark to bright."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.05 + 0.85 * i / max(1, count - 1)) for i in range(count)]


def png(figure: Any) -> bytes:
    """The figure as PNG, with a legend in every panel that has labels and none yet."""
    for panel in figure.axes:
        if panel.get_legend_handles_labels()[0] and panel.get_legend() is None:
            panel.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    write_atomic(path, png(figure))
