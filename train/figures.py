"""Figures of matplotlib, drawn and written without its global state."""

import io
import warnings
from pathlib import Path
from typing import Any

from llava_jax.checkpoints.outputs import write_file
from llava_jax.console import InputError

ACROSS, WIDTH, HEIGHT = 3, 4.6, 3.0  # panels per line; inches of one panel


def new_figure(panels: int) -> tuple[Any, list[Any]]:
    """A matplotlib figure, and the axes of its panels.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'llava-jax[plots]'") from None
    across, lines = min(ACROSS, panels), -(-panels // ACROSS)
    figure = Figure(figsize=(WIDTH * across, HEIGHT * lines), layout="constrained")
    axes = list(figure.subplots(lines, across, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def label_counts(axis: Any) -> None:
    """Label an axis, linear or logarithmic, with whole numbers such as 20,000."""
    from matplotlib.ticker import LogFormatter

    class Counts(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.0f}" if super().__call__(x, pos) else ""  # it decides which minor ticks have labels

    axis.set_major_formatter("{x:,.0f}")
    if axis.get_scale() == "log":
        axis.set_minor_formatter(Counts())
    else:
        axis.get_major_locator().set_params(integer=True)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure in the format of the file's extension."""
    import matplotlib

    data = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.simplefilter("ignore")  # about characters that the font lacks
        figure.savefig(data, format=Path(path).suffix[1:].lower(), dpi=100)
    write_file(path, data.getvalue())
