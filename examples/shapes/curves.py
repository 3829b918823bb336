"""Curves of a few runs, side by side, as a picture (Pillow alone)."""

import dataclasses
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 460, 300  # of one panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 40
INK, GRID = (60, 60, 60), (225, 225, 225)
COLOURS = ((40, 90, 200), (215, 95, 30), (30, 150, 80), (160, 60, 170))


@dataclasses.dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False  # a dot at each point


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves over a common axis. `high` None: from the points. Values are shown as percent where `percent`."""

    title: str
    across: str
    curves: Sequence[Curve]
    low: float = 0.0
    high: float | None = None
    percent: bool = False


def smooth(values: Sequence[float], share: float = 0.9) -> list[float]:
    """Running mean that forgets, without a bias towards the first value."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + (1 - share)
        out.append(total / weight)
    return out


def draw_panels(panels: Sequence[Panel], across: int) -> Image.Image:
    """Panels from left to right, `across` in a line."""
    image = Image.new("RGB", (WIDTH * min(across, len(panels)), HEIGHT * -(-len(panels) // across)), "white")
    for i, panel in enumerate(panels):
        image.paste(_draw_panel(panel), (i % across * WIDTH, i // across * HEIGHT))
    return image


def _draw_panel(panel: Panel) -> Image.Image:
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    small, large = ImageFont.load_default(11), ImageFont.load_default(13)
    points = [point for curve in panel.curves for point in curve.points]
    right = max((a for a, _ in points), default=1) or 1
    high = panel.high or max((b for _, b in points), default=1) * 1.05 or 1
    left, bottom = LEFT, HEIGHT - BOTTOM
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(a: float, b: float) -> tuple[float, float]:
        return left + wide * a / right, bottom - tall * (min(max(b, panel.low), high) - panel.low) / (high - panel.low)

    for k in range(5):
        value = panel.low + k / 4 * (high - panel.low)
        y = at(0, value)[1]
        pen.line([(left, y), (left + wide, y)], fill=GRID)
        text = f"{value:.0%}" if panel.percent else f"{value:.2g}"
        pen.text((left - 6, y), text, fill=INK, font=small, anchor="rm")
        pen.text((left + wide * k / 4, bottom + 6), f"{right * k / 4:,.0f}", fill=INK, font=small, anchor="ma")
    pen.text((left + wide / 2, HEIGHT - 6), panel.across, fill=INK, font=small, anchor="mb")
    pen.text((left, 8), panel.title, fill=INK, font=large)
    for k, curve in enumerate(panel.curves):
        colour = COLOURS[k % len(COLOURS)]
        line = [at(*point) for point in curve.points]
        pen.line(line, fill=colour, width=2, joint="curve")
        for dot in line if curve.dots else ():
            pen.ellipse((dot[0] - 3, dot[1] - 3, dot[0] + 3, dot[1] + 3), fill=colour)
        pen.text((left + wide - 4, TOP + 2 + 15 * k), curve.name, fill=colour, font=small, anchor="ra")
    return image
