"""What the file of a family says: its fields in foreign `config.json` files and its tensors' names, read both ways.

A family is a vision tower or a decoder. Its file holds one table of fields, one table of tensors, and the few facts
that fit in neither; whatever reads, writes, completes or inspects a checkpoint looks them up there.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np

from llava_jax.checkpoints.config_keys import Keys, Quantization
from llava_jax.config import TextConfig, VisionConfig, field_types
from llava_jax.json_files import check_json

# ---------------------------------------------------------------- the table of fields


class Field(NamedTuple):
    """A field of a part's object in `config.json`."""

    theirs: str
    ours: str
    default: Any = None  # of the part's class in transformers, for files that leave the field out
    kind: Any = None  # the type that it has in a file; None: that of our field


def with_defaults(fields: tuple[Field, ...], **defaults) -> tuple[Field, ...]:
    """A table of fields with the defaults of another class."""
    return tuple(field._replace(default=defaults.get(field.theirs, field.default)) for field in fields)


# ---------------------------------------------------------------- the table of tensors


def _keep(x: np.ndarray) -> np.ndarray:
    return x


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _to_hwio(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


def _to_oihw(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1)


Layout = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]  # to ours, to theirs
KEEP: Layout = (_keep, _keep)
LINEAR: Layout = (_transpose, _transpose)
CONV: Layout = (_to_hwio, _to_oihw)

# Name within the part, path here, layout; {i} is a layer.
Tensors = tuple[tuple[str, str, Layout], ...]


def linear(theirs: str, ours: str) -> Tensors:
    """The rows of a linear layer with a bias, or without."""
    return (f"{theirs}.weight", f"{ours}/kernel", LINEAR), (f"{theirs}.bias", f"{ours}/bias", KEEP)


def layer_norm(theirs: str, ours: str) -> Tensors:
    """The rows of a norm with scale and bias."""
    return (f"{theirs}.weight", f"{ours}/scale", KEEP), (f"{theirs}.bias", f"{ours}/bias", KEEP)


# ---------------------------------------------------------------- families


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """What vision towers and decoders have in common.

    name        `family` in our configuration
    model_type  of its object in transformers' files
    fields      the table of fields
    more        fields that `read` and `write` take care of: name -> the type that it has in a file
    read        (get a field or its default) -> our fields that are no field of theirs as it stands
    write       our part -> their fields that are no field of ours as it stands; raises `InputError` if there is no way
    ignored     fields that make no difference; `only`: those that are supported with these values only
    tensors     the table of tensors
    computed    ends of the names of tensors that older files hold and nothing needs: tables that are computed
    """

    name: str
    model_type: str
    fields: tuple[Field, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Callable[[str], Any]], dict[str, Any]] = lambda get: {}
    write: Callable[[Any], dict[str, Any]] = lambda part: {}
    ignored: frozenset[str]
    only: Mapping[str, tuple]
    tensors: Tensors
    computed: tuple[str, ...] = ()

    config: ClassVar[type]

    @functools.cached_property
    def types(self) -> dict[str, Any]:
        """Name of each field that is read -> what can be there."""
        ours = field_types(self.config)
        own = {field.theirs: field.kind or ours[field.ours] for field in self.fields}
        return {"model_type": str | None, "quantization_config": Quantization | None} | own | dict(self.more)

    @functools.cached_property
    def keys(self) -> Keys:
        return Keys(frozenset(self.types), self.ignored, self.only)

    def check(self, given: Any, file: str, key: str = "") -> None:
        """Raise an `InputError` if a part's object, the file's or what it has under a key, has something else than it
        should."""
        schema: Any = TypedDict(self.name, self.types, total=False)  # type: ignore[misc]  # known at run time alone
        if key:
            given, schema = {key: given}, TypedDict(self.name, {key: schema})  # type: ignore[misc, operator]  # likewise
        check_json(given, schema, file)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of our configuration that a part's object makes, its types being right."""
        get = ({field.theirs: field.default for field in self.fields} | dict(given)).get
        return {field.ours: get(field.theirs) for field in self.fields} | self.read(get) | {"family": self.name}

    def given(self, part: Any) -> dict[str, Any]:
        """The part's object that our configuration makes.

        Raises:
          InputError: the family's class has no fields for it.
        """
        fields = {field.theirs: getattr(part, field.ours) for field in self.fields}
        return {"model_type": self.model_type} | fields | self.write(part)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decoder(Family):
    """A decoder.

    originals   its model types in files of the original and of plain language models; the first is written
    classes     its classes there; the first is written
    """

    originals: tuple[str, ...]
    classes: tuple[str, ...]

    config = TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tower(Family):
    """A vision tower.

    title       for people
    classes     its class in transformers
    inner       what that class puts in front of its tensors' names, or does not
    unused      our configuration -> path and shape of tensors that the class has and LLaVA has no use for
    whole       model type of a directory that holds a text model too, whose tensors have names that match `other_half`
    published   towers by the names that the original fetches them by, and what their own config.json says
    processor   the class of its image processor, and `pixels`, the settings that this has by default
    """

    title: str
    classes: tuple[str, ...]
    inner: str
    unused: Callable[[VisionConfig], dict[str, tuple[int, ...]]]
    whole: str
    other_half: str
    published: Mapping[str, dict[str, Any]]
    processor: str
    pixels: Mapping[str, Any]

    config = VisionConfig
