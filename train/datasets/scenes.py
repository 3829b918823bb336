"""Scenes: a few coloured shapes on a background, of which everything is known (host only: NumPy and Pillow).

Sizes are shares of the square root of the picture's area, so that small and large mean the same in a picture of any
shape and any number of pixels.
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
MAX_OBJECTS = 6  # objects of a scene
MOST_RATIO = 3.0  # of a picture's sides
GAP = 0.03  # between objects, and to the edge
PIXELS = (80, 160)  # square root of the area
SUPERSAMPLE = 4  # edges are drawn so many times as fine


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
    """What a picture shows: all that it is drawn from, and questions. `things` are in order from left to right."""

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
    """Width and height. A quarter are exactly twice as long one way as the other, which is what two tiles fit best."""
    root, ratio = rng.uniform(*PIXELS), MOST_RATIO ** rng.uniform(-1, 1)
    if rng.random() < 0.25:
        short = round(root / math.sqrt(2))
        return (2 * short, short) if ratio > 1 else (short, 2 * short)
    return round(root * math.sqrt(ratio)), round(root / math.sqrt(ratio))


def _place(rng: np.random.Generator, count: int, width: int, height: int) -> list[Thing] | None:
    """Objects at random places; None if one found none. Few shapes and colours, so that several have one in common."""
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
            if not any(_meet(box, other.box, gap) for other in things):
                break
        else:
            return None
        things.append(Thing(str(rng.choice(shapes)), str(rng.choice(colours)), size, tuple(map(float, box))))
    return things


def _meet(a, b, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


# ---------------------------------------------------------------- pixels


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene. `rng` gives what no question is about: shades and noise."""
    image = Image.fromarray(_draw_background(scene, rng))
    for thing in scene.things:
        shade = np.add(COLOURS[thing.colour], rng.integers(-10, 11) + rng.integers(-4, 5, 3)).clip(0, 255)
        corner = math.floor(thing.box[0]), math.floor(thing.box[1])
        side = math.ceil(thing.box[2] - thing.box[0]) + 2
        mask = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
        place = np.subtract(thing.box, corner * 2) * SUPERSAMPLE
        _draw_shape(ImageDraw.Draw(mask), thing.shape, place)
        image.paste(tuple(map(int, shade)), corner, mask.reduce(SUPERSAMPLE))
    return image


def _draw_background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [H, W, 3]: muted, so that no object's colour drowns in it."""
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
