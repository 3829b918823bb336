"""Random scenes of a few coloured shapes on a background (host only: NumPy and Pillow).

Sizes are fractions of the square root of the image's area, so that small and large mean the same at any aspect ratio
and resolution.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (30, 160, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 210, 225),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
SIZES = {"small": (0.17, 0.19), "large": (0.29, 0.33)}  # diameter
BACKGROUNDS = ("plain", "gradient", "noisy")
MAX_OBJECTS = 6  # in a scene
MAX_ASPECT = 3.0
GAP = 0.03  # between objects, and to the edge
PIXELS = (80, 160)  # square root of the area
SUPERSAMPLE = 4  # per side, to smooth edges


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object. `box` is left, top, right, bottom in pixels."""

    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The contents of an image, which determine the drawing and the questions. `things` are ordered left to right."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]

    def having(self, **wanted: str) -> list[Thing]:
        """The objects with these properties: `scene.having(colour="red", shape="star")`."""
        return [thing for thing in self.things if all(getattr(thing, key) == value for key, value in wanted.items())]


def make_scene(rng: np.random.Generator) -> Scene:
    """A random scene of 1 to `MAX_OBJECTS` objects that do not touch."""
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    width, height = _make_canvas(rng)
    while (things := _place(rng, count, width, height)) is None:
        pass
    things.sort(key=lambda thing: thing.box[0] + thing.box[2])
    return Scene(width, height, str(rng.choice(BACKGROUNDS)), tuple(things))


def _make_canvas(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height. A quarter have an aspect ratio of exactly 2, which two tiles fit best."""
    root, ratio = rng.uniform(*PIXELS), MAX_ASPECT ** rng.uniform(-1, 1)
    if rng.random() < 0.25:
        short = round(root / math.sqrt(2))
        return (2 * short, short) if ratio > 1 else (short, 2 * short)
    return round(root * math.sqrt(ratio)), round(root / math.sqrt(ratio))


def _place(rng: np.random.Generator, count: int, width: int, height: int) -> list[Thing] | None:
    """Place objects at random; None if one does not fit. Few shapes and colours, so that objects share them."""
    shapes = rng.choice(SHAPES, rng.integers(1, 5), replace=False)
    colours = rng.choice(list(COLOURS), rng.integers(2, 6), replace=False)
    root = math.sqrt(width * height)
    things: list[Thing] = []
    for _ in range(count):
        size = "large" if rng.random() < 0.45 else "small"
        side, gap = rng.uniform(*SIZES[size]) * root, GAP * root
        for _ in range(40):
            left, top = rng.uniform(gap, np.subtract((width, height), side + gap))
            box = (left, top, left + side, top + side)
            if not any(_overlap(box, other.box, gap) for other in things):
                break
        else:
            return None
        things.append(Thing(str(rng.choice(shapes)), str(rng.choice(colours)), size, box))
    return things


def _overlap(a, b, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


# ---------------------------------------------------------------- pixels


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene. `rng` determines what no question is about: shades and noise."""
    image = Image.fromarray(_draw_background(scene, rng))
    for thing in scene.things:
        shade = np.add(COLOURS[thing.colour], rng.integers(-10, 11) + rng.integers(-4, 5, 3)).clip(0, 255)
        corner = math.floor(thing.box[0]), math.floor(thing.box[1])
        side = math.ceil(thing.box[2] - thing.box[0]) + 2
        mask = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
        box = np.subtract(thing.box, corner * 2) * SUPERSAMPLE
        _draw_shape(ImageDraw.Draw(mask), thing.shape, box)
        image.paste(tuple(map(int, shade)), corner, mask.reduce(SUPERSAMPLE))
    return image


def _draw_background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3], in muted colours that contrast with all objects."""
    first, second = (rng.uniform(100, 160) + rng.uniform(-18, 18, 3) for _ in range(2))
    pixels = np.broadcast_to(first, (scene.height, scene.width, 3))
    if scene.background == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[-1 : 1 : scene.height * 1j, -1 : 1 : scene.width * 1j]
        share = (1 + (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2)) / 2
        pixels = first + share[..., None] * (second - first)
    if scene.background == "noisy":
        pixels = pixels + rng.normal(0, rng.uniform(6, 16), pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: np.ndarray) -> None:
    """Fill a shape into its box."""
    (left, top), (width, height) = box[:2], box[2:] - box[:2]

    def at(points):
        return [(left + x * width, top + y * height) for x, y in points]

    if shape in ("circle", "ring"):
        pen.ellipse(tuple(box), fill=255)
        if shape == "ring":
            pen.ellipse([*at([(0.24, 0.24)])[0], *at([(0.76, 0.76)])[0]], fill=0)
    elif shape == "square":
        pen.rectangle([*at([(0.07, 0.07)])[0], *at([(0.93, 0.93)])[0]], fill=255)
    elif shape == "triangle":
        pen.polygon(at([(0.5, 0.02), (1.0, 0.93), (0.0, 0.93)]), fill=255)
    elif shape == "star":
        angles = [math.pi * k / 5 for k in range(10)]
        radii = [0.55 if k % 2 == 0 else 0.23 for k in range(10)]
        pen.polygon(
            at([(0.5 + r * math.sin(a), 0.53 - r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]), fill=255
        )
    else:
        pen.rectangle([*at([(0.33, 0.02)])[0], *at([(0.67, 0.98)])[0]], fill=255)
        pen.rectangle([*at([(0.02, 0.33)])[0], *at([(0.98, 0.67)])[0]], fill=255)
