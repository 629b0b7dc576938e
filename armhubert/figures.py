"""The look of every picture. No pyplot: no display, no global state, no backend chosen behind the caller's back."""

import io
from pathlib import Path
from typing import Any

from armhubert.files import write_atomic

WIDTH, HEIGHT = 8.0, 4.5
"""Inches of one panel's figure."""


def panels(count: int = 1, *, rows: int = 1, width: float = WIDTH, height: float = HEIGHT) -> tuple[Any, list[Any]]:
    """A figure with `rows` of `count` panels, in the house's style: matplotlib's Figure and its Axes, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, count, squeeze=False).flat)
    for panel in axes:
        panel.grid(alpha=0.25, which="both")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure, axes


def logarithmic(panel: Any, which: str = "y") -> None:
    """A logarithmic axis whose ticks are plain numbers, also where it spans less than a decade. An axis without values
    above 0 stays linear.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(panel, f"{which}axis")
    if not axis.get_data_interval()[1] > 0:
        return
    getattr(panel, f"set_{which}scale")("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axis.get_view_interval()
    if high > 30 * low:  # a number at every minor tick would lie over the next
        axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter() if high > 30 * low else plain)


def line_style(number: int) -> dict[str, Any]:
    """Colour and marker that tell the `number`-th of many lines apart."""
    return {"color": f"C{number % 10}", "marker": "osD^vP*X<>"[number % 10], "markersize": 4}


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
