"""Questions about scenes, with answers that follow from the scene by rules.

There is a function per kind of question. It returns a question and its answer, or None if the scene allows no
unambiguous one: names of objects are unique in the scene, and "left" is only used if the objects do not overlap. If
there are few possible answers, the answer is drawn first and the question chosen to fit, so that guessing fails.

The texts are the bundled model's training data, so they call an image a picture.
"""

from collections.abc import Callable, Sequence

import numpy as np

from train.datasets.shapes.scenes import COLOURS, SHAPES, SIZES, Scene, Thing

Turn = tuple[str, str]  # question, answer
Rng = np.random.Generator
DOWN, ACROSS = ("top", "middle", "bottom"), ("left", "center", "right")  # thirds of an image
CLEAR = 0.04  # of a side: the distance from the edge of a third at which a place is unambiguous


def pick(rng: Rng, options: Sequence):
    return options[int(rng.integers(len(options)))]


# ---------------------------------------------------------------- names


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def names_of(thing: Thing, scene: Scene, without: str = "") -> list[str]:
    """The unique names of an object in a scene, excluding the property `without`: "circle", "red object"."""
    names = []
    for keys in (("shape",), ("colour",), ("colour", "shape")):
        if without not in keys and len(scene.having(**{key: getattr(thing, key) for key in keys})) == 1:
            words = [getattr(thing, key) for key in keys]
            names.append(" ".join(words if "shape" in keys else [*words, "object"]))
    return names


def pick_named(rng: Rng, scene: Scene, without: str = "") -> tuple[Thing, str] | None:
    """A random object and a unique name of it."""
    named = [(thing, names) for thing in scene.things if (names := names_of(thing, scene, without))]
    if not named:
        return None
    thing, names = pick(rng, named)
    return thing, pick(rng, names)


def pick_group(rng: Rng) -> tuple[dict[str, str], str]:
    """Random properties, and the plural name of objects with these properties."""
    colour, shape, size = pick(rng, list(COLOURS)), pick(rng, SHAPES), pick(rng, list(SIZES))
    return pick(
        rng,
        [
            ({"colour": colour}, f"{colour} objects"),
            ({"shape": shape}, plural(shape)),
            ({"size": size}, f"{size} objects"),
            ({"colour": colour, "shape": shape}, f"{colour} {plural(shape)}"),
        ],
    )


def pick_group_where(rng: Rng, scene: Scene, accepts: Callable[[int], bool]) -> tuple[int, str] | None:
    """The number of objects of a random group and its name, such that `accepts(number)`; None if none is found soon."""
    for _ in range(30):
        wanted, name = pick_group(rng)
        number = len(scene.having(**wanted))
        if accepts(number):
            return number, name
    return None


# ---------------------------------------------------------------- one image, a short answer


def count(rng: Rng, scene: Scene) -> Turn | None:
    number = len(scene.things)
    group = "objects"
    if rng.random() < 0.7:
        fewest = int(rng.random() < 0.9)  # few questions about absent objects, which `existence` covers
        found = pick_group_where(rng, scene, lambda n: n >= fewest)
        if found is None:
            return None
        number, group = found
    asked = ("how many {} are there?", "count the {}.", "how many {} do you see?", "what is the number of {}?")
    return pick(rng, asked).format(group), str(number)


def colour(rng: Rng, scene: Scene) -> Turn | None:
    if (found := pick_named(rng, scene, "colour")) is None:
        return None
    thing, name = found
    asked = (
        "what colour is the {}?",
        "what color is the {}?",
        "which colour does the {} have?",
        "tell me the colour of the {}.",
    )
    return pick(rng, asked).format(name), thing.colour


def shape(rng: Rng, scene: Scene) -> Turn | None:
    if (found := pick_named(rng, scene, "shape")) is None:
        return None
    thing, name = found
    asked = ("what shape is the {}?", "which shape does the {} have?", "tell me the shape of the {}.")
    return pick(rng, asked).format(name), thing.shape


def size(rng: Rng, scene: Scene) -> Turn | None:
    if (found := pick_named(rng, scene, "size")) is None:
        return None
    thing, name = found
    asked = ("is the {} small or large?", "is the {} large or small?", "what size is the {}?")
    return pick(rng, asked).format(name), thing.size


def members(rng: Rng, scene: Scene) -> Turn | None:
    """The colours of the objects of a shape, or the shapes of those of a colour, each once and in a fixed order."""
    thing = pick(rng, scene.things)
    if rng.random() < 0.5:
        asked, group = ("which colours do the {} have?", "list the colours of the {}."), plural(thing.shape)
        answers = {other.colour for other in scene.having(shape=thing.shape)}
    else:
        asked, group = ("which shapes do the {} have?", "list the shapes of the {}."), f"{thing.colour} objects"
        answers = {other.shape for other in scene.having(colour=thing.colour)}
    return pick(rng, asked).format(group), listed([name for name in (*COLOURS, *SHAPES) if name in answers])


def existence(rng: Rng, scene: Scene) -> Turn | None:
    is_present = rng.random() < 0.5
    if (found := pick_group_where(rng, scene, lambda n: (n > 0) == is_present)) is None:
        return None
    asked = ("are there any {}?", "do you see any {}?", "does the picture show {}?")
    return pick(rng, asked).format(found[1]), "yes" if is_present else "no"


def position(rng: Rng, scene: Scene) -> Turn | None:
    named = [(thing, names) for thing in scene.things if (names := names_of(thing, scene))]
    pairs = [(a, b) for a in named for b in named if side_of(a[0], b[0])]
    if not pairs:
        return None
    (a, names_a), (b, names_b) = pick(rng, pairs)
    side = pick(rng, side_of(a, b))
    one, other = pick(rng, names_a), pick(rng, names_b)
    if rng.random() < 0.6:
        choice = next(pair for pair in SIDES if side in pair)[:: 1 if rng.random() < 0.5 else -1]
        return f"is the {one} {choice[0].removesuffix(' of')} or {choice[1]} the {other}?", side.removesuffix(" of")
    is_true = rng.random() < 0.5
    claimed = side if is_true else next(pair[1 - pair.index(side)] for pair in SIDES if side in pair)
    return f"is the {one} {claimed} the {other}?", "yes" if is_true else "no"


SIDES = (("left of", "right of"), ("above", "below"))


def side_of(a: Thing, b: Thing) -> list[str]:
    """The sides of `b` on which all of `a` is."""
    sides = {
        "left of": a.box[2] < b.box[0], "right of": b.box[2] < a.box[0],
        "above": a.box[3] < b.box[1], "below": b.box[3] < a.box[1],
    }  # fmt: skip
    return [side for side, is_true in sides.items() if is_true]


def place(rng: Rng, scene: Scene) -> Turn | None:
    """The ninth of the image that an object is in; only for objects whose centre is not near the edge of a ninth."""
    if (found := pick_named(rng, scene)) is None or min(map(_from_thirds, middle_of(found[0], scene))) < CLEAR:
        return None
    asked = ("where is the {}?", "in which part of the picture is the {}?", "where do you see the {}?")
    return pick(rng, asked).format(found[1]), place_of(found[0], scene)


def _from_thirds(share: float) -> float:
    return min(abs(share - 1 / 3), abs(share - 2 / 3))


def largest(rng: Rng, scene: Scene) -> Turn | None:
    """The one large object among small ones, or the one small object among large ones."""
    options = [
        (which, scene.having(size=size)[0])
        for which, size in (("largest", "large"), ("smallest", "small"))
        if len(scene.having(size=size)) == 1 < len(scene.things)
    ]
    if not options:
        return None
    which, thing = pick(rng, options)
    asked = ("which object is the {}?", "what is the {} object?", "name the {} object.")
    return pick(rng, asked).format(which), thing.name


def comparison(rng: Rng, scene: Scene) -> Turn | None:
    if (found := pick_compared(rng, scene)) is None:
        return None
    (one, a), (other, b) = found
    if rng.random() < 0.5:
        return f"are there more {one} than {other}?", "yes" if a > b else "no"
    return f"are there fewer {one} than {other}?", "yes" if a < b else "no"


def pick_compared(rng: Rng, scene: Scene) -> tuple[tuple[str, int], tuple[str, int]] | None:
    """Names and numbers of two shapes or two colours, at least one of them present. The numbers mostly differ."""
    key, options, called = pick(
        rng, [("shape", SHAPES, plural), ("colour", list(COLOURS), lambda colour: f"{colour} objects")]
    )
    here = sorted({getattr(thing, key) for thing in scene.things})
    for _ in range(20):
        a = pick(rng, here)
        b = pick(rng, here if rng.random() < 0.7 else options)
        numbers = len(scene.having(**{key: a})), len(scene.having(**{key: b}))
        if a != b and (numbers[0] != numbers[1] or rng.random() < 0.1):
            one, other = (called(a), numbers[0]), (called(b), numbers[1])
            return (one, other) if rng.random() < 0.5 else (other, one)
    return None


# ---------------------------------------------------------------- one image, a longer answer


def reasoning(rng: Rng, scene: Scene) -> Turn | None:
    """A question whose answer first states the facts that it follows from. Names precede counts."""
    if rng.random() < 0.5:
        if (found := pick_compared(rng, scene)) is None:
            return None
        (one, a), (other, b) = found
        facts = f"{one}: {a}, {other}: {b}"
        if rng.random() < 0.5:
            return f"are there more {one} than {other}? explain.", f"{facts}, so {'yes' if a > b else 'no'}"
        if a <= b:
            return None
        return f"how many more {one} than {other} are there? explain.", f"{facts}, so {a - b}"
    if (group := pick_group_where(rng, scene, lambda n: 0 < n < len(scene.things))) is None:
        return None
    number, name = group
    question = f"how many objects are left without the {name}? explain."
    whole = len(scene.things)
    return question, f"objects: {whole}, {name}: {number}, so {whole - number}"


def described(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`"""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def middle_of(thing: Thing, scene: Scene) -> tuple[float, float]:
    """The centre of an object: across and down, as fractions of the image's sides."""
    left, top, right, bottom = thing.box
    return (left + right) / 2 / scene.width, (top + bottom) / 2 / scene.height


def place_of(thing: Thing, scene: Scene) -> str:
    across, down = middle_of(thing, scene)
    return f"{DOWN[int(3 * down)]} {ACROSS[int(3 * across)]}"


def placed(scene: Scene) -> str:
    """All objects in reading order, each after its place in thirds of the image."""
    order = [f"{down} {across}" for down in DOWN for across in ACROSS]
    placed_things = sorted(
        ((place_of(thing, scene), thing) for thing in scene.things), key=lambda pair: order.index(pair[0])
    )
    return listed([f"at the {place} {described(thing)}" for place, thing in placed_things])


def detail(rng: Rng, scene: Scene) -> Turn:
    asked = ("describe the picture in detail.", "what is in the picture, and where?", "describe everything you see.")
    number = len(scene.things)
    return pick(rng, asked), f"{number} object{'s' if number > 1 else ''}: {placed(scene)}"


def description(rng: Rng, scene: Scene) -> Turn:
    asked = ("describe the picture.", "what is in the picture?", "what do you see?")
    return pick(rng, asked), placed(scene)


def caption(rng: Rng, scene: Scene) -> Turn:
    """A caption for stage 1 with everything that the projector has to convey: numbers of each kind, and places."""
    asked = ("count and describe what is in the picture.", "how many objects are there of what, and where?")
    return pick(rng, asked), f"{', '.join(counted(scene))}, {placed(scene)}"


def counted(scene: Scene) -> list[str]:
    """The number of all objects, and of objects of each size, shape and colour present."""
    groups: list[tuple[str, dict[str, str]]] = [("objects", {})]
    groups += [(f"{size} objects", {"size": size}) for size in SIZES]
    groups += [(plural(shape), {"shape": shape}) for shape in SHAPES]
    groups += [(f"{colour} objects", {"colour": colour}) for colour in COLOURS]
    return [f"{name}: {number}" for name, wanted in groups if (number := len(scene.having(**wanted)))]


# ---------------------------------------------------------------- two images, no image


def two_images(rng: Rng, first: Scene, second: Scene) -> Turn | None:
    """A question about two images; the caller adds their `<image>` tokens."""
    scenes = (first, second)
    kind = rng.random()
    if kind < 0.35:
        a, b = len(first.things), len(second.things)
        if a == b:
            return None
        more = rng.random() < 0.5
        asked = ("which picture has {} objects, the first or the second?", "which of the two pictures has {} objects?")
        return pick(rng, asked).format("more" if more else "fewer"), "first" if (a > b) == more else "second"
    if kind < 0.7:
        one = int(rng.integers(2))
        for _ in range(30):
            wanted, name = pick_group(rng)
            if scenes[one].having(**wanted) and not scenes[1 - one].having(**wanted):
                asked = ("which picture shows {}, the first or the second?", "which of the two pictures has {}?")
                return pick(rng, asked).format(name), ("first", "second")[one]
        return None
    one = int(rng.integers(2))
    if (found := pick_named(rng, scenes[one], "colour")) is None:
        return None
    thing, name = found
    return f"what colour is the {name} in the {('first', 'second')[one]} picture?", thing.colour


def text(rng: Rng) -> Turn:
    """A question without an image."""
    a, b = (int(n) for n in rng.integers(1, 7, 2))
    low, high = sorted((a, b))
    corners = {"triangle": 3, "square": 4, "circle": 0, "ring": 0}
    called = pick(rng, list(corners))
    return pick(
        rng,
        [
            (f"what is {a} plus {b}?", str(a + b)),
            (f"what is {high} minus {low}?", str(high - low)),
            (f"which number comes after {a}?", str(a + 1)),
            (f"is {a} more than {b}?", "yes" if a > b else "no"),
            (f"how many corners does a {called} have?", str(corners[called])),
        ],
    )


SHORT: dict[str, Callable[[Rng, Scene], Turn | None]] = {
    "count": count, "colour": colour, "shape": shape, "size": size, "existence": existence, "position": position,
    "place": place, "largest": largest, "comparison": comparison,
}  # fmt: skip
